"""SimSiam and its neighbours under one roof: the same network, views and batch; see related.py.

    python results/neighbours.py [--data CIFAR] [--minutes 60]      again until it says that all is done

Start it from the repository's root, on Linux. Without CIFAR it makes the runs on drawn shapes alone. A run
whose results lie in results/related is not made again; one that was interrupted goes on. Each has a core of
its own. What they gave becomes a table in results/related.md.

What a method needs beside SimSiam's settings (temperature, tau, queue, prototypes) was chosen for shapes on
seeds 7 to 9; nothing was chosen on CIFAR-10, nor on seeds 0 to 4.
"""
import argparse
import json
import os
import pathlib
import shlex
import shutil
import sys
import time

sys.path.insert(0, os.getcwd())

from harness.errors import Refused
from results.cifar10 import SMALL, SUBSET, Interrupted, cell, do, open_cifar10, records, subset
from results.cores import results_of
from results.pages import write_tables

KEPT = "results/related"
RUNS = "runs/neighbours"
PAGE = pathlib.Path("results/related.md")
METHODS = {  # row: the command
    "simsiam": "simsiam.py",
    "simclr": "related.py --method simclr",
    "mocov2": "related.py --method mocov2",
    "byol": "related.py --method byol",
    "swav": "related.py --method swav",
}
ON_SHAPES = {  # beside these: CLIP, whose captions only the shapes have; Sec. 6.2
    "clip": "related.py --method clip",
    "simclr, predictor": "related.py --experiment sec62-simclr-predictor",
    "simclr, predictor, stop-gradient": "related.py --experiment sec62-simclr-predictor-stopgrad",
    "swav, predictor": "related.py --experiment sec62-swav-predictor",
    "swav, no stop-gradient": "related.py --experiment sec62-swav-without-stopgrad",
}
ROWS = {"shapes": METHODS | ON_SHAPES, "cifar10": METHODS}
PAPER = {  # ImageNet, 100 epochs: Table 4, Sec. 6.2
    "clip": "-", "simsiam": "68.1", "simclr": "66.5", "mocov2": "67.4", "byol": "66.5", "swav": "66.5",
    "simclr, predictor": "66.4", "simclr, predictor, stop-gradient": "66.0",
    "swav, predictor": "65.2", "swav, no stop-gradient": "NaN: diverges",
}
SEEDS = {"shapes": 5, "cifar10": 2}
EPOCHS_OF_SHAPES = 6  # for all; by themselves MoCo v2 and BYOL have 4, because their steps take longer
AS_ON_SHAPES = {  # on CIFAR-10: what was chosen for shapes, beside SMALL. BYOL's lr is half of SimSiam's there
    "simsiam": "",
    "simclr": "--temperature 0.2",
    "mocov2": "--temperature 0.2 --queue 2048 --tau 0.99",
    "byol": "--tau 0.9 --base-lr 0.2",
    "swav": "--temperature 0.05 --prototypes 32 --eps 0.02",
}


def jobs():
    """(data, row, seed) of all runs, in the order of their use: a seed of each row, then the next seed."""
    for seed in range(max(SEEDS.values())):
        for data, rows in ROWS.items():
            if seed < SEEDS[data]:
                yield from ((data, row, seed) for row in rows)


def name_of(data, row, seed):
    """The name of a run's folder, and of its files in KEPT."""
    return f"{data}-{row.replace(', ', '-').replace(' ', '-')}-{seed}"


def kept(data, row, seed):
    """The file that is there once a run's results are kept."""
    return f"{KEPT}/{name_of(data, row, seed)}.json"


def run(data, folder, row, seed, deadline):
    """A run and its linear evaluation, and their results to KEPT -> its name. Raises Interrupted at the
    deadline."""
    name = name_of(data, row, seed)
    out = f"{RUNS}/{name}"
    script, *options = shlex.split(ROWS[data][row])
    if data == "shapes":
        options += ["--epochs", f"{EPOCHS_OF_SHAPES}"]
    else:
        options += [folder, *shlex.split(SMALL), *shlex.split(AS_ON_SHAPES[row])]
    options += ["--seed", f"{seed}", "--workers", "0"]
    if not os.path.exists(f"{out}/backbone.pth"):
        do([script, *options, "--out", out, "--resume", "auto"], deadline)
    do(["lineval.py", "--ckpt", f"{out}/checkpoint.pth", "--cached", "--workers", "0"], deadline)
    os.makedirs(KEPT, exist_ok=True)
    shutil.copy(f"{out}/log.jsonl", f"{KEPT}/{name}.jsonl")
    shutil.copy(f"{out}/lineval-cached/lineval.json", f"{KEPT}/{name}.json")
    return name


def table():
    """What was measured, a line for each row of each data set, from the files in KEPT alone."""
    lines = [
        "| data | row | seeds | loss | std x sqrt(d) | kNN | cached linear | s a step | MiB | the paper |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for data, rows in ROWS.items():
        for row in rows:
            found = []
            for seed in range(SEEDS[data]):
                path = f"{KEPT}/{name_of(data, row, seed)}"
                if os.path.exists(f"{path}.json"):
                    found.append(figures(path))
            if found:
                cells = [data, row, f"{len(found)}", *columns(found), PAPER[row]]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figures(path):
    """Of a kept run: {figure: value}"""
    log = records(f"{path}.jsonl")
    epochs = [r for r in log if r["event"] == "epoch" and r["epoch"] > 0]
    with open(f"{path}.json") as f:
        linear = json.load(f)["top1"]
    seconds = sum(r["seconds"] for r in epochs) / epochs[-1]["step"]
    return {**epochs[-1], "linear": linear, "step_seconds": seconds}


def columns(found):
    """The figures of some seeds as cells: mean, and standard deviation of the accuracies."""
    def mean(key, digits):
        return f"{sum(r[key] for r in found) / len(found):.{digits}f}"

    accuracies = [cell([r[key] for r in found]) for key in ("knn", "linear")]
    return [mean("loss", 3), mean("std", 2), *accuracies, mean("step_seconds", 2), mean("memory_mb", 0)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="CIFAR", help="a CIFAR-10 folder")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="these only (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, help="these only (default: all)")
    parser.add_argument("--minutes", type=float, default=1e4,
                        help="stop after so many, everything saved; the same command goes on")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    state = "all is done"
    try:
        folder = subset(*open_cifar10(args.data), 10_000, SUBSET) if args.data else None
        todo = [(data, folder, row, seed, deadline) for data, row, seed in jobs()
                if (data == "shapes" or folder) and not os.path.exists(kept(data, row, seed))
                and row in (args.rows or PAPER) and seed in (args.seeds or range(100))]
        for name in results_of(run, todo):
            print(f"done: {name}", flush=True)
    except Interrupted:
        state = "time is up; the same command goes on"
    except (Refused, OSError, RuntimeError) as error:
        sys.exit(f"neighbours.py: {error}")
    finally:
        write_tables(PAGE, [table()])
    print(state)


if __name__ == "__main__":
    main()
