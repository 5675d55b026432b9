"""Checks of what only a GPU can show: a line for each, and exit status 1 if one has failed.

    python tests/drills/gpu.py                      some minutes on one GPU
    python tests/drills/gpu.py --device cpu --only views gradients      to try the script itself, anywhere

Start it from the repository's root. A GPU's outcomes are kept in results/drills/gpu.json; a check that is run
again replaces its last outcome.

waits       eleven steps of each method in which a hidden wait of the CPU for the GPU is an error; what the
            training loop measures between them is left out
views       the views of the GPU against those of the CPU, in levels of 255
gradients   of a step in bf16 against those in float32, of an untrained network: their cosine
commands    the programs in their variants, a short run each, several at a time
stop        SIGTERM after a run's first epoch, then --resume
two         two processes on one GPU by gloo, because NCCL wants a GPU for each process. Synchronised BN and
            DistributedDataParallel work as on two GPUs
"""
import argparse
import concurrent.futures
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback

sys.path.insert(0, os.getcwd())
import torch
import torch.distributed as dist

import augment
import simsiam
from harness.common.machine import device_name
from harness.data.loading import index_batches
from harness.data.shapes import draw_shapes
from harness.training import ends, processes
from results.neighbours import steps_of
from results.rows import read_json, records, write_json

KEPT = "results/drills/gpu.json"
SHORT = "--epochs 1 --workers 2"
METHODS = [f"related.py --method {method}" for method in ("simclr", "mocov2", "byol", "swav", "clip")]
EXPERIMENT = "simsiam.py --experiment"
COMMANDS = [
    "simsiam.py", "simsiam.py --no-amp", "simsiam.py --compile",
    f"{EXPERIMENT} sec52-1-step", f"{EXPERIMENT} sec52-moving-average",
    f"{EXPERIMENT} table1-b-fixed-predictor", f"{EXPERIMENT} sec46-asymmetric-2x", *METHODS,
]
PROTOCOLS = ["--knn", "--cached", "--sgd --epochs 2", "--lars --epochs 2 --batch 512"]
WATCHED = ["simsiam.py", f"{EXPERIMENT} sec52-moving-average", f"{EXPERIMENT} sec52-10-step", *METHODS]


def waits(device):
    """Each hidden wait raises."""
    if device.type == "cpu":
        return True, "a CPU waits for nothing"
    found = [f"{command}: {place}" for command in WATCHED if (place := place_of_a_wait(command, device))]
    return not found, "; ".join(found) or f"none in eleven steps of {len(WATCHED)} commands"


def place_of_a_wait(command, device):
    """The line of ours in which a step of this command waits for the GPU, or "" if none does."""
    steps = steps_of([*shlex.split(command), *shlex.split(SHORT), "--amp"], device)
    for _ in range(3):  # the first steps may
        next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(11):  # with 10 steps on the same targets, the next targets too
            next(steps)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        *_, place = (frame for frame in traceback.extract_tb(error.__traceback__)
                     if frame.filename.startswith(os.getcwd()))
        return f"{os.path.relpath(place.filename)}, line {place.lineno}: {error}".splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def views(device):
    """The largest difference among the views of 512 images at 32 pixels, blurred too.

    A pixel of a crop that is half-way between two levels may be rounded to either. Brightness, contrast and
    saturation then stretch that level by up to 1.4 each.
    """
    source = draw_shapes(0, 0, 512, 48)
    policy = augment.Policy(size=32)
    made = []
    for where in (torch.device("cpu"), device):
        batches = index_batches(0, 512, 512, 1)
        (_, pair), = augment.load_views(source, policy, 0, batches, where, 0)
        made.append(torch.cat(pair).cpu())
    std = torch.tensor(policy.std).view(3, 1, 1)
    difference = 255 * ((made[0] - made[1]) * std).abs()
    share = (difference > 0.01).float().mean().item()
    text = f"at most {difference.max():.3f} levels, {share:.2%} of the pixels differ by more than 0.01"
    return difference.max().item() <= 1.4 ** 3 and share < 0.001, text


def gradients(device):
    """A full-width ResNet-18 on 256 images, or 64 on a CPU."""
    torch.backends.cudnn.allow_tf32 = False  # this check alone: the programs' float32 has TF32 convolutions
    torch.manual_seed(0)
    model = simsiam.SimSiam("resnet18", cifar_stem=True).to(device, memory_format=torch.channels_last)
    source = draw_shapes(0, 0, 256, 32)
    batches = index_batches(0, 256, 64 if device.type == "cpu" else 256, 1)
    _, pair = next(augment.load_views(source, augment.Policy(size=32), 0, batches, device, 0))
    found = []
    for amp in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            p, z = model(*pair)
        gradient = torch.autograd.grad(simsiam.loss(*p, *z), list(model.parameters()))
        found.append(torch.cat([g.flatten().float() for g in gradient]))
    torch.backends.cudnn.allow_tf32 = True
    cosine = torch.nn.functional.cosine_similarity(*found, dim=0).item()
    return cosine > 0.98, f"cosine {cosine:.4f}"


def words_of(command, device):
    """A program's command line for this Python."""
    return [sys.executable, *shlex.split(command), "--device", device.type]


def run(command, device):
    """Run a program in a process of its own -> its exit status and last line; print everything if it fails"""
    done = subprocess.run(words_of(command, device), capture_output=True, text=True)
    if done.returncode:
        print(f"--- {command}\n{done.stdout}\n{done.stderr}", file=sys.stderr, flush=True)
    said = (done.stderr.strip() or done.stdout.strip() or "nothing was printed").splitlines()
    return done.returncode, said[-1][:200]


def commands(device):
    """Each exits with status 0."""
    with tempfile.TemporaryDirectory() as folder:
        training = [f"{command} {SHORT} --out {folder}/{number}" for number, command in enumerate(COMMANDS)]
        judging = [f"lineval.py --ckpt {folder}/0/checkpoint.pth {protocol} --out {folder}/lineval-{number}"
                   for number, protocol in enumerate(PROTOCOLS)]
        failed = [*failures(training, device), *failures(judging, device)]
    count = len(COMMANDS) + len(PROTOCOLS)
    return not failed, "; ".join(failed) or f"all {count} end well"


def failures(commands, device):
    """Run commands in parallel -> each that failed, with its last line"""
    with concurrent.futures.ThreadPoolExecutor(6 if device.type == "cuda" else 1) as pool:
        outcomes = list(pool.map(lambda command: run(command, device), commands))
    return [f"{command}: {last}" for command, (status, last) in zip(commands, outcomes) if status]


def stop(device):
    """The exit status must be 143, and then 0."""
    with tempfile.TemporaryDirectory() as folder:
        command = f"simsiam.py --epochs 4 --workers 2 --out {folder}/run"
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(words_of(command, device), **silent) as process:
            while len(records(f"{folder}/run/log.jsonl")) < 3 and process.poll() is None:
                time.sleep(0.1)  # until the log has the start, the untrained network and an epoch
            process.send_signal(signal.SIGTERM)
            stopped = process.wait()
        status, _ = run(f"{command} --resume", device)
    return (stopped, status) == (143, 0), f"exit status {stopped}, then {status}"


def two(device):
    """The loss of an epoch against that of one process.

    In float32 and at a low lr, so rounding doesn't grow; few steps, because gloo takes each sum to the CPU.
    """
    options = f"--as-process {SHORT} --no-amp --batch 256 --base-lr 0.1"
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2):
            launcher = f"-m torch.distributed.run --standalone --nproc-per-node {count}"
            status, said = run(f"{launcher} {shlex.quote(__file__)} {options} --out {folder}/{count}", device)
            if status:
                return False, said
            losses.append(records(f"{folder}/{count}/log.jsonl")[2]["loss"])
    return abs(losses[0] - losses[1]) < 0.001, f"losses {losses[0]:.4f} and {losses[1]:.4f}"


def as_process(arguments):
    """simsiam.py as one of several processes on one GPU."""
    def first_gpu():
        torch.cuda.set_device(0)
        return torch.device("cuda", 0)

    init = dist.init_process_group
    dist.init_process_group = lambda backend, **options: init("gloo", **options)
    processes.own_gpu = first_gpu
    ends.run_and_leave("simsiam.py", simsiam.pretrain, simsiam.parse(arguments))


CHECKS = {check.__name__: check for check in (waits, views, gradients, commands, stop, two)}


def main():
    if sys.argv[1:2] == ["--as-process"]:
        as_process(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    args = parser.parse_args()
    processes.join_world(torch.device(args.device))  # the checks in this process need a world
    device = torch.device(args.device)
    outcomes = {}
    for name in args.only:
        began = time.monotonic()
        try:
            is_good, seen = CHECKS[name](device)
        except Exception as error:  # whatever goes wrong on a GPU is a finding
            is_good, seen = False, f"{type(error).__name__}: {error}"
        seconds = round(time.monotonic() - began)
        print(f"{name:10}{'good' if is_good else 'BAD':5} {seen}  ({seconds} s)", flush=True)
        outcomes[name] = {"good": is_good, "seen": seen, "seconds": seconds,
                          "device": device_name(device), "torch": torch.__version__}
        if args.device == "cuda":
            write_json(KEPT, read_json(KEPT) | outcomes)
    dist.destroy_process_group()
    sys.exit(not all(outcome["good"] for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
