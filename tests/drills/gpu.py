"""Checks of what only a GPU can show: a line for each, and exit status 1 if one has failed.

    python tests/drills/gpu.py                                    some minutes on one GPU
    python tests/drills/gpu.py --only views gradients --out DIR   these alone; the outcomes go to DIR/gpu.json
    python tests/drills/gpu.py --device cpu --out DIR             to try the script itself, anywhere

Start it from the repository's root. A check that is run again replaces its last outcome. Each has a process
of its own, which ends at the check's time limit.

waits       eleven steps of each method, with monitors and views, in which a hidden wait of the CPU for the
            GPU is an error
views       the views of the GPU against those of the CPU, in levels of 255; and of several batches at a time
gradients   of a step in bf16 and in float32, plain and compiled, of an untrained network: their cosine with
            the plain ones in float32
commands    the programs in their variants, a short run each, several at a time
stop        SIGTERM after a run's first epoch, then --resume
two         two processes on one GPU by gloo, because NCCL wants a GPU for each process. Synchronised BN and
            DistributedDataParallel work as on two GPUs
"""
import argparse
import concurrent.futures
import contextlib
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
import related
import simsiam
from harness.common.machine import device_name
from harness.data.loading import index_batches
from harness.data.shapes import draw_shapes
from harness.training import ends, processes
from harness.training.run import Run
from results.rows import in_time, read_json, records, write_json

LIMITS = {"waits": 200, "views": 60, "gradients": 240, "commands": 300, "stop": 200, "two": 150}  # seconds
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
    augment.GROUP[device.type] = 1  # otherwise all views of an epoch could be made before the first step
    found = [f"{command}: {place}" for command in WATCHED if (place := place_of_a_wait(command, device))]
    return not found, "; ".join(found) or f"none in eleven steps of {len(WATCHED)} commands"


class Enough(Exception):
    """Ends a run after the steps that were watched."""


def watched(run, batches, steps_of_epoch=Run.steps_of_epoch):
    """In the place of Run.steps_of_epoch: from the fourth step to the fourteenth a hidden wait raises."""
    for number, step in enumerate(steps_of_epoch(run, batches)):
        if number == 3 and run.device.type == "cuda":  # the steps before may wait
            torch.cuda.set_sync_debug_mode("error")
        if number == 14:  # with 10 steps on the same targets, the next targets too
            raise Enough
        yield step


def place_of_a_wait(command, device):
    """The line of ours in which a run of this command waits for the GPU, or "" if none does."""
    Run.steps_of_epoch = watched
    script, *options = shlex.split(f"{command} {SHORT} --knn-every 0 --amp --device {device.type}")
    program = {"simsiam.py": simsiam, "related.py": related}[script]
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        try:
            with contextlib.redirect_stdout(nowhere):
                simsiam.pretrain(program.parse([*options, "--out", f"{folder}/run"]))
        except Enough:
            return ""
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            *_, place = (frame for frame in traceback.extract_tb(error.__traceback__)
                         if frame.filename.startswith(os.getcwd()))
            return f"{os.path.relpath(place.filename)}, line {place.lineno}: {error}".splitlines()[0]
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            dist.destroy_process_group()
    raise AssertionError(f"{command} ended before its fourteenth step")


def views(device):
    """The largest difference among the views of 512 images at 32 pixels, blurred too.

    A pixel of a crop that is half-way between two levels may be rounded to either. Brightness, contrast and
    saturation then stretch that level by up to 1.4 each.
    """
    source = draw_shapes(0, 0, 512, 48)
    made = [views_of(source, torch.device("cpu"), 512), views_of(source, device, 512)]
    std = torch.tensor(augment.Policy().std).view(3, 1, 1)
    difference = 255 * ((made[0] - made[1]) * std).abs()
    share = (difference > 0.01).float().mean().item()
    apart = (views_of(source, device, 64) - made[1]).abs().max().item()
    text = (f"at most {difference.max():.3f} levels, {share:.2%} of the pixels differ by more than 0.01; "
            f"eight batches at a time and one: at most {apart:.1g} apart")
    return difference.max().item() <= 1.4 ** 3 and share < 0.001 and apart < 1e-4, text


def views_of(source, device, batch):
    """Both views of 512 images, in batches of this size, which are made together: (2, 512, 3, 32, 32)"""
    batches = index_batches(0, 512, batch, 1)
    made = [torch.stack(views) for _, views in
            augment.load_views(source, augment.Policy(size=32), 0, batches, device, 0)]
    return torch.cat(made, dim=1).cpu()


def gradients(device):
    """A full-width ResNet-18 on 256 images, or 16 on a CPU."""
    torch.backends.cudnn.allow_tf32 = False  # this check alone: the programs' float32 has TF32 convolutions
    torch.manual_seed(0)
    model = simsiam.SimSiam("resnet18", cifar_stem=True).to(device, memory_format=torch.channels_last)
    source = draw_shapes(0, 0, 256, 32)
    batches = index_batches(0, 256, 16 if device.type == "cpu" else 256, 1)
    _, pair = next(augment.load_views(source, augment.Policy(size=32), 0, batches, device, 0))
    cosines = {}
    for compiled in ("", ", compiled"):
        if compiled:
            model.compile()
        for precision, amp in (("float32", False), ("bf16", True)):
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                p, z = model(*pair)
            gradient = torch.autograd.grad(simsiam.loss(*p, *z), list(model.parameters()))
            gradient = torch.cat([g.flatten().double() for g in gradient])
            if not cosines:
                exact = gradient
            cosine = torch.nn.functional.cosine_similarity(gradient, exact, dim=0).item()
            cosines[precision + compiled] = cosine
    is_good = min(cosines.values()) > 0.98 and cosines["float32, compiled"] > 0.9999
    return is_good, "; ".join(f"{name} {cosine:.5f}" for name, cosine in cosines.items())


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


def outcome_of(name, device_type):
    """A check in this process -> what is kept of it."""
    device = torch.device("cpu") if device_type == "cpu" else processes.own_gpu()
    is_good, seen = CHECKS[name](device)
    return {"good": is_good, "seen": seen, "device": device_name(device), "torch": torch.__version__}


def main():
    if sys.argv[1:2] == ["--as-process"]:
        as_process(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--out", default="results/drills", help="gpu.json's folder (default: %(default)s)")
    args = parser.parse_args()
    path = f"{args.out}/gpu.json"
    are_good = True
    for name in args.only:
        began = time.monotonic()
        try:
            outcome = in_time(LIMITS[name], outcome_of, name, args.device)
        except RuntimeError as error:  # whatever goes wrong on a GPU is a finding
            outcome = {"good": False, "seen": str(error)}
        outcome["seconds"] = round(time.monotonic() - began)
        told = "good" if outcome["good"] else "BAD"
        print(f"{name:10}{told:5} {outcome['seen']}  ({outcome['seconds']} s)", flush=True)
        write_json(path, read_json(path) | {name: outcome})
        are_good = are_good and outcome["good"]
    sys.exit(not are_good)


if __name__ == "__main__":
    main()
