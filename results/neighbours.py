"""SimSiam and its neighbours compared with the same network, views and batch; see related.py.

    python results/neighbours.py [--data CIFAR] [--minutes 60]      repeat until everything is done
    python results/neighbours.py --show                             only write the pages
    python results/neighbours.py [--data CIFAR] --speed             seconds a step, the rows in turn

Start it from the repository's root, on Linux. Without CIFAR it makes only the runs on drawn shapes. rows.py
describes how they are made and kept. They become two tables and a picture in results/related.md, and a table
in the README.

Whatever a method needs besides SimSiam's settings (temperature, tau, queue, prototypes) was chosen for shapes
on seeds 7 and 8; nothing was chosen on CIFAR-10 or on seeds 0 to 4.
"""
import os
import shlex
import sys

sys.path.insert(0, os.getcwd())

import torch

import augment
import related
import simsiam
from harness.common.machine import device_name, fastest_layout
from harness.data.loading import index_batches
from harness.common.pictures import BLUE, RED
from harness.training.processes import join_world
from harness.training.recipes import settings_for
from results.cifar10 import SMALL, SUBSET, open_cifar10, subset
from results.pages import Panel, cell, difference, draw_rows, page_with, table
from results.rows import (Kept, Runs, columns, last, make_missing, parser_for, read_json, run_script, top1_of,
                          write_json)
from results.speed import in_turn

KEPT = Kept("results/related", "runs/neighbours")
PAGE = "results/related.md"
README = "README.md"
PICTURE = "results/related.png"
SPEED = "results/related/speed.json"
TITLES = {"shapes": "drawn shapes, 6 epochs (seeds)", "cifar10": "CIFAR-10, 10,000 images, 40 epochs (seeds)"}
METHODS = {  # row: the command
    "simsiam": "simsiam.py",
    "simclr": "related.py --method simclr",
    "mocov2": "related.py --method mocov2",
    "byol": "related.py --method byol",
    "swav": "related.py --method swav",
}
ON_SHAPES = {  # also: CLIP, because only the shapes have captions; Sec. 6.2
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
EPOCHS_OF_SHAPES = 6  # for all; the recipes of MoCo v2 and BYOL have 4, because their steps take longer
AS_ON_SHAPES = {  # for CIFAR-10: what was chosen for shapes, where BYOL and SwAV have half of SimSiam's lr
    "simsiam": "",
    "simclr": "--temperature 0.2",
    "mocov2": "--temperature 0.2 --queue 2048 --tau 0.99",
    "byol": "--tau 0.9 --base-lr 0.2",
    "swav": "--temperature 0.05 --prototypes 32 --eps 0.02 --base-lr 0.2",
}
CHANGES = {  # for the README: what a method changes in SimSiam
    "simclr": "+ negatives, from the batch; - predictor, - stop-gradient",
    "mocov2": "+ negatives, from a queue, + momentum encoder; - predictor",
    "byol": "+ momentum encoder",
    "swav": "+ prototypes, + Sinkhorn-Knopp on the target; - predictor",
    "clip": "captions instead of second views",
}


# --- The runs -------------------------------------------------------------------------------------

def command_of(data, row, folder):
    """A row's command, without its seed and its folder."""
    script, *options = ROWS[data][row].split(maxsplit=1)
    if data == "shapes":
        return " ".join([script, *options, f"--epochs {EPOCHS_OF_SHAPES} --workers 0"])
    options += [SMALL, AS_ON_SHAPES[row], "--workers 0"]
    return " ".join([script, shlex.quote(folder), *options])


def name_of(data, row):
    """The name of a row's file."""
    return f"{data}-{row.replace(', ', '-').replace(' ', '-')}"


def commands(folder):
    """{(data, row): its command}; those on CIFAR-10 only if there is a folder."""
    found = {}
    for data, rows in ROWS.items():
        if data == "shapes" or folder:
            found |= {(data, row): command_of(data, row, folder) for row in rows}
    return found


def folder_of(args):
    """A folder with the part of CIFAR-10 that we use; None without --data."""
    return subset(*open_cifar10(args.data), 10_000, SUBSET) if args.data else None


def make_runs(args, deadline):
    if args.speed:
        measure_speed(folder_of(args))
        return
    rows = []
    for (data, row), command in commands(folder_of(args)).items():
        rows.append(Runs(name_of(data, row), command, range(SEEDS[data])))
    make_missing(KEPT, rows, deadline)


# --- The pages ------------------------------------------------------------------------------------

def measured():
    """Yield data, row and runs of all rows that have runs."""
    for data, rows in ROWS.items():
        for row in rows:
            runs = list(KEPT.of(name_of(data, row)).values())
            if runs:
                yield data, row, runs


def rows_table():
    """The measurements: a line for each row of each data set."""
    seconds = read_json(SPEED)["seconds"]
    lines = []
    for data, row, runs in measured():
        linear = cell([top1_of(run) for run in runs])
        memory = max(last(run, "memory_mb") for run in runs)
        step = f"{seconds[data][row]:.3f}"
        lines.append([data, row, *columns(runs), linear, step, memory, PAPER[row]])
    return table(["data", "row", "seeds", "loss", "std x sqrt(d)", "kNN", "cached linear", "s a step", "MiB",
                  "the paper"], lines)


def readme_table():
    """kNN of each method; for CLIP also zero-shot accuracy."""
    lines = []
    for method, changes in CHANGES.items():
        runs = KEPT.of(name_of("shapes", method)).values()
        shown = cell([last(run, "knn") for run in runs])
        if method == "clip":
            shown += f"; zero-shot {cell([last(run, 'zero_shot') for run in runs])}"
        lines.append([f"`--method {method}`", changes, shown])
    return table(["`python related.py`", "what it changes in SimSiam", "drawn shapes, 6 epochs: kNN"], lines)


def pages():
    tables = [rows_table(), comparison()]
    return page_with(PAGE, tables) | page_with(README, [readme_table()])


def picture():
    """All rows' accuracies with their spread, a panel for each data set."""
    panels = {data: Panel(title, []) for data, title in TITLES.items()}
    for data, row, runs in measured():
        knn = [last(run, "knn") for run in runs]
        linear = [top1_of(run) for run in runs]
        panels[data].rows.append((f"{row} ({len(runs)})", [knn, linear]))
    draw_rows(PICTURE, panels.values(), {"kNN": BLUE, "cached linear": RED})


# --- Sec. 6.2 -------------------------------------------------------------------------------------

CLAIMS = {  # row: the row that it is compared with, and what the paper's figures say
    "simclr, predictor": ("simclr", "no better"),
    "simclr, predictor, stop-gradient": ("simclr", "no better"),
    "swav, predictor": ("swav", "no better"),
    "swav, no stop-gradient": ("swav", "worse: it diverges"),
}
POINT = 1.0  # a gain below this counts as none


def comparison():
    """Sec. 6.2's rows against the rows without, on shapes, in pairs of one seed."""
    lines = []
    for row, (without, claim) in CLAIMS.items():
        between = difference(linear_of(row), linear_of(without))
        if between:
            told = verdict(claim, between.low, between.high)
            lines.append([row, f"{PAPER[without]} -> {PAPER[row]}", len(between.pairs),
                          f"{between.mean:+.2f}", between.interval(), f"{claim}: {told}"])
    return table(["row", "the paper", "seeds", "cached linear, difference", "95%",
                  "the paper's finding, in kind"], lines)


def linear_of(row):
    """{seed: accuracy} on shapes."""
    runs = KEPT.of(name_of("shapes", row))
    return {seed: top1_of(run) for seed, run in runs.items()}


def verdict(claim, low, high):
    """Whether an interval of differences, in points, supports a claim."""
    if claim.startswith("worse"):
        return "holds" if high < 0 else "does not hold" if low > -POINT else "can't be told here"
    return "holds" if high < POINT else "does not hold" if low > 0 else "can't be told here"


# --- Seconds a step -------------------------------------------------------------------------------

def measure_speed(folder, rounds=10):
    """Write each row's median seconds a step, views included, to SPEED: rows in turn, on one thread."""
    device, *_ = join_world(torch.device("cpu"))
    torch.set_num_threads(1)
    variants = {}
    for key, command in commands(folder).items():
        variants[key] = steps_of(shlex.split(command), device).__next__
        variants[key]()  # warms up
    found = in_turn(variants, rounds)
    seconds = {data: {} for data in ROWS}
    for (data, row), its in found.items():
        seconds[data][row] = its
    write_json(SPEED, {"command": "results/neighbours.py --speed", "device": device_name(device),
                       "torch": torch.__version__, "rounds": rounds, "seconds": seconds})


def steps_of(command, device):
    """A generator that makes one training step of a command each time."""
    script, *options = command
    args = {"simsiam.py": simsiam, "related.py": related}[script].parse(options)
    data = args.method.open(args.data, None)
    s = settings_for(args, data.train, 1)
    method = args.method(s, data, device)
    torch.manual_seed(s["seed"])
    method.build()
    layout = fastest_layout(method.model.encoder, device)
    method.model.to(device, memory_format=layout)
    optimizer = method.optimizer()
    policy = augment.Policy(**{name: s[name] for name in augment.Policy._fields})
    batches = index_batches(s["seed"], len(data.train), s["batch"], s["epochs"])

    batches = augment.load_views(
        data.train, policy, s["seed"], batches, device, 0, method.views, layout=layout)
    method.parts()
    for step, (index, views) in enumerate(batches):
        method.set_lr(optimizer, step)
        method.train_step(method.model, optimizer, step, index, views)
        yield


def main():
    parser = parser_for(__doc__)
    parser.add_argument("--data", metavar="CIFAR", help="a CIFAR-10 folder")
    parser.add_argument("--speed", action="store_true",
                        help="measure seconds a step instead, on an idle machine")
    run_script(parser, make_runs, pages, picture)


if __name__ == "__main__":
    main()
