"""bf16 against float32 on a CPU: the accuracy of the same CIFAR-10 runs, at a quarter of the width.

    python results/bf16.py CIFAR [--minutes 60]      repeat until everything is done
    python results/bf16.py --speed                   seconds a step, for networks of several widths
    python results/bf16.py --show                    only write the page

Start it from the repository's root, on Linux, on a CPU with bf16 instructions; on others the runs take much
longer. rows.py describes how they are made and kept. It makes the tables in results/bf16.md.
"""
import os
import shlex
import sys

sys.path.insert(0, os.getcwd())
import torch

import simsiam
from harness.common.errors import Refused
from harness.training import recipes
from results.cifar10 import open_cifar10
from results.pages import cell, page_with, table
from results.rows import (Kept, Runs, columns, make_missing, parser_for, read_json, run_script, top1_of,
                          write_json)
from results.speed import in_turn, make_step, processor

KEPT = Kept("results/bf16", "runs/bf16")
PAGE = "results/bf16.md"
SPEED = "results/bf16/speed.json"
OPTIONS = ("--width 1/4 --proj-hidden 512 --dim 512 --pred-dim 128 --batch 64 --base-lr 0.4 --epochs 4 "
           "--knn-every 2 --workers 0")
PRECISIONS = {"float32": "--no-amp", "bf16": "--amp"}
EVALUATIONS = {f"{name} features": f"--cached {option}" for name, option in PRECISIONS.items()}
SEEDS = (0, 1)
RESNET_18 = recipes.recipe("cifar10", simsiam.SETTINGS)
RESNET_50 = recipes.recipe("imagenet", simsiam.SETTINGS)
NETWORKS = {  # words: a recipe's settings, the share of its width, batch
    "ResNet-18 x 1/8, 32 pixels, batch 64": (RESNET_18, 1 / 8, 64),
    "ResNet-18 x 1/4, 32 pixels, batch 32": (RESNET_18, 1 / 4, 32),
    "ResNet-18 x 1/4, 32 pixels, batch 64": (RESNET_18, 1 / 4, 64),
    "ResNet-18 x 1/2, 32 pixels, batch 64": (RESNET_18, 1 / 2, 64),
    "ResNet-18, 32 pixels, batch 64": (RESNET_18, 1, 64),
    "ResNet-50, 224 pixels, batch 8": (RESNET_50, 1, 8),
}


def make_runs(args, deadline):
    if args.speed:
        measure_speed()
        return
    if args.data is None:
        raise Refused("name a CIFAR-10 folder, or --speed, or --show")
    open_cifar10(args.data)
    rows = [Runs(name, f"simsiam.py {shlex.quote(args.data)} {OPTIONS} {option}", SEEDS, EVALUATIONS)
             for name, option in PRECISIONS.items()]
    make_missing(KEPT, rows, deadline, args.data)


def measure_speed(rounds=7):
    """Write the median seconds of a step in both precisions to SPEED. Heads are scaled like the backbone."""
    seconds = {}
    for words, (settings, share, batch) in NETWORKS.items():
        heads = {name: int(share * settings[name]) for name in ("dim", "pred_dim", "proj_hidden")}
        scaled = settings | heads | {"width": share}
        made = {precision: make_step(scaled, batch, amp=precision == "bf16") for precision in PRECISIONS}
        seconds[words] = in_turn(made, rounds)
        print(words, seconds[words], flush=True)
    write_json(SPEED, {"command": "results/bf16.py --speed",
                       "device": f"{processor()}, {os.cpu_count()} cores",
                       "torch": torch.__version__, "rounds": rounds, "seconds": seconds})


def rows_table():
    """A line for each precision of pre-training."""
    lines = []
    for precision in PRECISIONS:
        runs = list(KEPT.of(precision).values())
        linear = [cell([top1_of(run, name) for run in runs]) for name in EVALUATIONS]
        lines.append([precision, *columns(runs), *linear])
    return table(["pre-training", "seeds", "loss", "std x sqrt(d)", "kNN", "cached linear: float32 features",
                  "bf16"], lines)


def speed_table():
    """A line for each network, from SPEED."""
    lines = []
    for words, its in read_json(SPEED)["seconds"].items():
        lines.append([words, f"{its['float32']:.3f}", f"{its['bf16']:.3f}",
                      f"{its['float32'] / its['bf16']:.2f} times as fast"])
    return table(["network", "float32, s", "bf16, s", "bf16 is"], lines)


def pages():
    return page_with(PAGE, [rows_table(), speed_table()])


def main():
    parser = parser_for(__doc__)
    parser.add_argument("data", metavar="CIFAR", nargs="?", help="a CIFAR-10 folder")
    parser.add_argument("--speed", action="store_true", help="only measure seconds a step")
    run_script(parser, make_runs, pages)


if __name__ == "__main__":
    main()
