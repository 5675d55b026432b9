"""bf16 against float32 on a CPU: the accuracy of the same CIFAR-10 runs, at a quarter of the width.

    python results/bf16.py CIFAR [--minutes 60]      again until it says that all is done
    python results/bf16.py --speed                   seconds of a step, networks of several widths

Start it from the repository's root, on Linux, on a CPU with instructions for bf16: on another the runs take
much longer. Each has a core of its own. A run whose results lie in results/bf16 is not made again; one that
was interrupted goes on. What they gave becomes the tables in results/bf16.md.
"""
import argparse
import json
import os
import pathlib
import shlex
import sys
import time

sys.path.insert(0, os.getcwd())
import torch

import simsiam
from harness.common.errors import Refused
from results.cifar10 import Interrupted, cell, do, open_cifar10, records
from results.cores import results_of
from results.pages import write_tables
from results.peers import in_turn, our_step
from results.speed import processor

KEPT = "results/bf16"
RUNS = "runs/bf16"
PAGE = pathlib.Path("results/bf16.md")
OPTIONS = ("--width 1/4 --proj-hidden 512 --dim 512 --pred-dim 128 --batch 64 --base-lr 0.4 --epochs 4 "
           "--knn-every 2 --workers 0")
PRECISIONS = {"float32": "--no-amp", "bf16": "--amp"}
SEEDS = 2

SPEED = f"{KEPT}/speed.json"
RESNET_18 = simsiam.recipe("cifar10")
RESNET_50 = simsiam.recipe("imagenet")
NETWORKS = {  # words: a recipe's settings, the share of its width, batch
    "ResNet-18 x 1/8, 32 pixels, batch 64": (RESNET_18, 1 / 8, 64),
    "ResNet-18 x 1/4, 32 pixels, batch 32": (RESNET_18, 1 / 4, 32),
    "ResNet-18 x 1/4, 32 pixels, batch 64": (RESNET_18, 1 / 4, 64),
    "ResNet-18 x 1/2, 32 pixels, batch 64": (RESNET_18, 1 / 2, 64),
    "ResNet-18, 32 pixels, batch 64": (RESNET_18, 1, 64),
    "ResNet-50, 224 pixels, batch 8": (RESNET_50, 1, 8),
}


def run(data, precision, seed, deadline):
    """A run and two linear evaluations, with features in float32 and in bf16, to KEPT -> its name. Raises
    Interrupted at the deadline."""
    name = f"{precision}-{seed}"
    out = f"{RUNS}/{name}"
    if not os.path.exists(f"{out}/backbone.pth"):
        options = shlex.split(f"{OPTIONS} {PRECISIONS[precision]} --seed {seed} --out {out} --resume auto")
        do(["simsiam.py", data, *options], deadline)
    os.makedirs(KEPT, exist_ok=True)
    for features, option in PRECISIONS.items():
        options = f"--ckpt {out}/checkpoint.pth --cached {option} --workers 0 --out {out}-{features}"
        do(["lineval.py", data, *shlex.split(options)], deadline)
        keep(f"{out}-{features}/lineval.json", f"{KEPT}/{name}-{features}-features.json", data)
    keep(f"{out}/log.jsonl", f"{KEPT}/{name}.jsonl", data)
    return name


def keep(path, kept, data):
    """Copy a result; where the data lay on this machine is nobody's business."""
    pathlib.Path(kept).write_text(pathlib.Path(path).read_text().replace(data, "CIFAR"))


def kept(name):
    """Whether the results of a run are there."""
    return os.path.exists(f"{KEPT}/{name}.jsonl")


def table():
    """A line for each precision of pre-training, from the files in KEPT alone."""
    lines = [
        "| pre-training | seeds | loss | std x sqrt(d) | kNN | cached linear: float32 features | bf16 |",
        "|---|---|---|---|---|---|---|",
    ]
    for precision in PRECISIONS:
        names = [f"{precision}-{seed}" for seed in range(SEEDS) if kept(f"{precision}-{seed}")]
        if not names:
            continue
        last = [[r for r in records(f"{KEPT}/{name}.jsonl") if r["event"] == "epoch"][-1] for name in names]
        linear = [[top1_of(f"{name}-{features}-features") for name in names] for features in PRECISIONS]
        loss, std = (f"{sum(r[key] for r in last) / len(last):.3f}" for key in ("loss", "std"))
        cells = [precision, f"{len(names)}", loss, std, cell([r["knn"] for r in last])]
        cells += [cell(values) for values in linear]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def top1_of(name):
    """The accuracy of a kept evaluation."""
    with open(f"{KEPT}/{name}.json") as f:
        return json.load(f)["top1"]


# --- Seconds of a step ------------------------------------------------------------------------------------

def measure_speed(rounds=7):
    """The median seconds of a step in both precisions, in turn, to SPEED. The heads have the backbone's share
    of their width."""
    seconds = {}
    for words, (settings, share, batch) in NETWORKS.items():
        heads = {name: int(share * settings[name]) for name in ("dim", "pred_dim", "proj_hidden")}
        scaled = settings | heads | {"width": share}
        steps = {precision: our_step(scaled, batch, precision == "bf16") for precision in PRECISIONS}
        seconds[words] = in_turn(steps, rounds)
        print(words, seconds[words], flush=True)
    content = {"command": "results/bf16.py --speed", "device": f"{processor()}, {os.cpu_count()} cores",
               "torch": torch.__version__, "rounds": rounds, "seconds": seconds}
    pathlib.Path(SPEED).write_text(json.dumps(content, indent=1) + "\n")


def speed_table():
    """A line for each network, from SPEED."""
    lines = ["| network | float32, s | bf16, s | bf16 is |", "|---|---|---|---|"]
    with open(SPEED) as f:
        seconds = json.load(f)["seconds"]
    for words, its in seconds.items():
        lines.append(f"| {words} | {its['float32']:.3f} | {its['bf16']:.3f} | "
                     f"{its['float32'] / its['bf16']:.2f} times as fast |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", metavar="CIFAR", nargs="?", help="a CIFAR-10 folder")
    parser.add_argument("--speed", action="store_true", help="measure seconds of a step, and nothing else")
    parser.add_argument("--minutes", type=float, default=1e4,
                        help="stop after so many, everything saved; the same command goes on")
    args = parser.parse_args()
    if args.speed:
        measure_speed()
        write_tables(PAGE, [speed_table()])
        return
    if args.data is None:
        parser.error("name a CIFAR-10 folder, or --speed")
    deadline = time.monotonic() + 60 * args.minutes
    state = "all is done"
    try:
        open_cifar10(args.data)
        todo = [(args.data, precision, seed, deadline) for seed in range(SEEDS) for precision in PRECISIONS
                if not kept(f"{precision}-{seed}")]
        for name in results_of(run, todo):
            print(f"done: {name}", flush=True)
    except Interrupted:
        state = "time is up; the same command goes on"
    except (Refused, OSError, RuntimeError) as error:
        sys.exit(f"bf16.py: {error}")
    finally:
        write_tables(PAGE, [table()])
    print(state)


if __name__ == "__main__":
    main()
