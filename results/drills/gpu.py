"""The first look at a GPU: what a CPU can't show. A line for each check, and exit status 1 if one has failed.

    python results/drills/gpu.py                    some minutes on one GPU
    python results/drills/gpu.py --device cpu --only views gradients      the script itself, anywhere

Start it from the repository's root.

waits       three training steps in which a hidden wait of the CPU for the GPU is an error
views       the views of the GPU against those of the CPU, in levels of 255
gradients   those of a step in bf16 against those in float32: their cosine
commands    the programs in their variants, a short run each
stop        SIGTERM in the middle of a run, and --resume
two         two processes on the one GPU, by gloo: NCCL takes a GPU for one process alone. All but NCCL itself
            is as on two GPUs: the synchronised BN, DistributedDataParallel, stopping together
"""
import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.getcwd())
import torch
import torch.distributed as dist

import augment
import simsiam
from harness import ends, processes
from harness.loading import index_batches
from harness.shapes import draw_shapes
from results.neighbours import steps_of

SHORT = "--epochs 1 --workers 2"
COMMANDS = [
    "simsiam.py", "simsiam.py --no-amp", "simsiam.py --compile",
    "simsiam.py --experiment sec52-1-step", "simsiam.py --experiment sec52-moving-average",
    "simsiam.py --experiment table1-b-fixed-predictor", "simsiam.py --experiment sec46-asymmetric-2x",
    "related.py --method simclr", "related.py --method mocov2", "related.py --method byol",
    "related.py --method swav", "related.py --method clip",
]
PROTOCOLS = ["--knn", "--cached", "--sgd --epochs 2", "--lars --epochs 2 --batch 512"]


def waits(device):
    """Each hidden wait raises."""
    if device.type == "cpu":
        return True, "a CPU waits for nothing"
    found = []
    watched = "simsiam.py", "simsiam.py --experiment sec52-moving-average", "related.py --method mocov2"
    for command in watched:
        steps = steps_of([*shlex.split(command), *shlex.split(SHORT)], device)
        for _ in range(3):  # the first steps may
            next(steps)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                next(steps)
        except RuntimeError as error:
            found.append(f"{command}: {str(error).splitlines()[0]}")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return not found, "; ".join(found) or "none in three steps of each"


def views(device):
    """The largest difference, of 512 images at 32 pixels, blur too."""
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
    return difference.max().item() <= 1.5, text


def gradients(device):
    """Of a ResNet-18 at full width, on 256 images."""
    torch.manual_seed(0)
    model = simsiam.SimSiam("resnet18", cifar_stem=True).to(device, memory_format=torch.channels_last)
    source = draw_shapes(0, 0, 256, 32)
    batches = index_batches(0, 256, 64 if device.type == "cpu" else 256, 1)
    _, pair = next(augment.load_views(source, augment.Policy(size=32), 0, batches, device, 0))
    found = []
    for amp in (False, True):
        optimizer = simsiam.sgd(model, 0.9, 0.0)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=amp)
        simsiam.train_step(model, simsiam.loss, optimizer, autocast, pair)
        found.append(torch.cat([w.grad.flatten().float() for w in model.parameters()]))
    cosine = torch.nn.functional.cosine_similarity(*found, dim=0).item()
    return cosine > 0.98, f"cosine {cosine:.4f}"


def run(command, device):
    """A program in a process of its own -> its exit status, and its last line."""
    words = [sys.executable, *shlex.split(command), "--device", device.type]
    done = subprocess.run(words, capture_output=True, text=True, cwd=os.getcwd())
    return done.returncode, (done.stderr.strip() or done.stdout.strip()).splitlines()[-1][:200]


def commands(device):
    """Each ends well."""
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for number, command in enumerate(COMMANDS):
            status, last = run(f"{command} {SHORT} --out {folder}/{number}", device)
            if status:
                failed.append(f"{command}: {last}")
        for number, protocol in enumerate(PROTOCOLS):
            out = f"{folder}/lineval-{number}"
            command = f"lineval.py --ckpt {folder}/0/checkpoint.pth {protocol} --out {out}"
            status, last = run(command, device)
            if status:
                failed.append(f"lineval.py {protocol}: {last}")
    count = len(COMMANDS) + len(PROTOCOLS)
    return not failed, "; ".join(failed) or f"all {count} end well"


def stop(device):
    """Exit status 143, and then 0."""
    with tempfile.TemporaryDirectory() as folder:
        command = f"simsiam.py --epochs 2 --workers 2 --out {folder}/run"
        words = [sys.executable, *shlex.split(command), "--device", device.type]
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while not os.path.exists(f"{folder}/run/views.png"):
                time.sleep(0.1)
            time.sleep(5)
            process.send_signal(signal.SIGTERM)
            stopped = process.wait()
        status, last = run(f"{command} --resume", device)
    return (stopped, status) == (143, 0), f"exit status {stopped}, then {status}: {last}"


def two(device):
    """The losses of an epoch against those of one process."""
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2):
            words = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                     f"--nproc-per-node={count}", __file__, "--as-process",
                     *shlex.split(f"{SHORT} --out {folder}/{count}"),
                     "--device", device.type]
            done = subprocess.run(words, capture_output=True, text=True, cwd=os.getcwd())
            if done.returncode:
                return False, done.stderr.strip()[-300:]
            with open(f"{folder}/{count}/log.jsonl") as f:
                losses.append([json.loads(line) for line in f][2]["loss"])
    return abs(losses[0] - losses[1]) < 0.01, f"losses {losses[0]:.4f} and {losses[1]:.4f}"


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
    processes.join_world(torch.device("cpu"))  # the checks in this process need a world
    failed = 0
    for name in args.only:
        began = time.monotonic()
        try:
            is_good, text = CHECKS[name](torch.device(args.device))
        except Exception as error:  # whatever a GPU comes up with is a finding
            is_good, text = False, f"{type(error).__name__}: {error}"
        failed += not is_good
        seconds = time.monotonic() - began
        print(f"{name:10}{'good' if is_good else 'BAD':5} {text}  ({seconds:.0f} s)", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
