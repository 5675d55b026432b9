"""SimSiam and its neighbours under one roof: the same network, views and batch; see related.py.

    python results/neighbours.py [--data CIFAR] [--minutes 60]      again until it says that all is done
    python results/neighbours.py [--data CIFAR] --speed             seconds a step, the rows in turn

Start it from the repository's root, on Linux. Without CIFAR it makes the runs on drawn shapes alone. A run
whose results lie in results/related is not made again; one that was interrupted goes on. Each has a core of
its own. What they gave becomes two tables and a picture in results/related.md, and a column in the README.

What a method needs beside SimSiam's settings (temperature, tau, queue, prototypes) was chosen for shapes on
seeds 7 and 8; nothing was chosen on CIFAR-10, nor on seeds 0 to 4.
"""
import argparse
import contextlib
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import statistics
import sys
import time

sys.path.insert(0, os.getcwd())

import torch

import augment
import related
import simsiam
from harness.common.machine import device_name, fastest_layout
from harness.common.errors import Refused
from harness.data.loading import index_batches
from harness.common.pictures import BLUE, RED
from harness.training.processes import join_world
from results.cifar10 import SMALL, SUBSET, Interrupted, cell, do, open_cifar10, records, subset
from results.cores import results_of
from results.pages import Panel, draw_rows, write_tables
from results.pairs import difference

KEPT = "results/related"
RUNS = "runs/neighbours"
PAGE = pathlib.Path("results/related.md")
README = pathlib.Path("README.md")
PICTURE = "results/related.png"
SPEED = f"{KEPT}/speed.json"
TITLES = {"shapes": "drawn shapes, 6 epochs (seeds)", "cifar10": "CIFAR-10, 10,000 images, 40 epochs (seeds)"}
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
AS_ON_SHAPES = {  # on CIFAR-10: what was chosen for shapes, where BYOL and SwAV have half of SimSiam's lr
    "simsiam": "",
    "simclr": "--temperature 0.2",
    "mocov2": "--temperature 0.2 --queue 2048 --tau 0.99",
    "byol": "--tau 0.9 --base-lr 0.2",
    "swav": "--temperature 0.05 --prototypes 32 --eps 0.02 --base-lr 0.2",
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


def command_of(data, folder, row):
    """The command of a row, but for its seed and its folder: a list of words."""
    script, *options = shlex.split(ROWS[data][row])
    if data == "shapes":
        return [script, *options, "--epochs", f"{EPOCHS_OF_SHAPES}", "--workers", "0"]
    return [script, folder, *options, *shlex.split(SMALL), *shlex.split(AS_ON_SHAPES[row]), "--workers", "0"]


def run(data, folder, row, seed, deadline):
    """A run and its linear evaluation, and their results to KEPT -> its name. Raises Interrupted at the
    deadline."""
    name = name_of(data, row, seed)
    out = f"{RUNS}/{name}"
    if not os.path.exists(f"{out}/backbone.pth"):
        command = command_of(data, folder, row)
        do([*command, "--seed", f"{seed}", "--out", out, "--resume", "auto"], deadline)
    do(["lineval.py", "--ckpt", f"{out}/checkpoint.pth", "--cached", "--workers", "0"], deadline)
    os.makedirs(KEPT, exist_ok=True)
    shutil.copy(f"{out}/log.jsonl", f"{KEPT}/{name}.jsonl")
    shutil.copy(f"{out}/lineval-cached/lineval.json", f"{KEPT}/{name}.json")
    return name


# --- The page -------------------------------------------------------------------------------------

def found_of(data, row):
    """The kept runs of a row, {seed: figures}."""
    paths = {seed: f"{KEPT}/{name_of(data, row, seed)}" for seed in range(SEEDS[data])}
    return {seed: figures(path) for seed, path in paths.items() if os.path.exists(f"{path}.json")}


def figures(path):
    """Of a kept run: what its last epoch has, and "linear"."""
    last = [r for r in records(f"{path}.jsonl") if r["event"] == "epoch"][-1]
    with open(f"{path}.json") as f:
        return {**last, "linear": json.load(f)["top1"]}


def linear_of(found):
    """{seed: linear accuracy} of the kept runs of a row."""
    return {seed: run_of_seed["linear"] for seed, run_of_seed in found.items()}


def table():
    """What was measured, a line for each row of each data set, from the files in KEPT alone."""
    lines = [
        "| data | row | seeds | loss | std x sqrt(d) | kNN | cached linear | s a step | MiB | the paper |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    with open(SPEED) as f:
        seconds = json.load(f)["seconds"]
    for data, rows in ROWS.items():
        for row in rows:
            found = list(found_of(data, row).values())
            if found:
                step = seconds[data].get(row)
                cells = [data, row, f"{len(found)}", *columns(found),
                         f"{step:.3f}" if step else "-", memory(found)]
                lines.append(f"| {' | '.join(cells)} | {PAPER[row]} |")
    return "\n".join(lines) + "\n"


def columns(found):
    """Of some seeds, as cells: the mean loss and std, the accuracies with their standard deviation."""
    loss, std = (statistics.mean(r[key] for r in found) for key in ("loss", "std"))
    return [f"{loss:.3f}", f"{std:.2f}", *(cell([r[key] for r in found]) for key in ("knn", "linear"))]


def memory(found):
    """The most memory that one of the runs had, as a cell."""
    return f"{max(r['memory_mb'] for r in found)}"


def in_readme(text):
    """The README, with each method's kNN accuracy in its table; of CLIP, zero-shot accuracy too."""
    for method in related.METHODS:
        found = list(found_of("shapes", method).values())
        shown = f"{cell([r['knn'] for r in found])}"
        if method == "clip":
            shown += f"; zero-shot {cell([r['zero_shot'] for r in found])}"
        row = rf"(\| `--method {method}` \|[^|]*\|)[^|]*\|"
        text = re.sub(row, rf"\1 {shown} |", text)
    return text


# --- Sec. 6.2 -------------------------------------------------------------------------------------

CLAIMS = {  # row: the row that it is compared with, and what the paper's figures say of it
    "simclr, predictor": ("simclr", "no better"),
    "simclr, predictor, stop-gradient": ("simclr", "no better"),
    "swav, predictor": ("swav", "no better"),
    "swav, no stop-gradient": ("swav", "worse: it diverges"),
}
POINT = 1.0  # a gain below this counts as none


def comparison():
    """Sec. 6.2's rows beside the rows without, on shapes: pairs of one seed, so of the same images, views and
    first weights."""
    lines = [
        "| row | the paper | seeds | cached linear, difference | 95% | the paper's finding, in kind |",
        "|---|---|---|---|---|---|",
    ]
    for row, (without, claim) in CLAIMS.items():
        mine, theirs = (linear_of(found_of("shapes", one)) for one in (row, without))
        between = difference(mine, theirs)
        if between is None:
            continue
        told = verdict(claim, between.low, between.high)
        interval = f"{between.low:+.1f} to {between.high:+.1f}"
        cells = [row, f"{PAPER[without]} -> {PAPER[row]}", f"{len(between.pairs)}", f"{between.mean:+.2f}",
                 interval]
        lines.append(f"| {' | '.join(cells)} | {claim}: {told} |")
    return "\n".join(lines) + "\n"


def verdict(claim, low, high):
    """Whether an interval of differences, in points, bears a claim out."""
    if claim.startswith("worse"):
        return "holds" if high < 0 else "does not hold" if low > -POINT else "can't be told here"
    return "holds" if high < POINT else "does not hold" if low > 0 else "can't be told here"


def picture():
    """The accuracies of all rows with their spread, a panel for each data set."""
    panels = []
    for data, rows in ROWS.items():
        shown = []
        for row in rows:
            found = list(found_of(data, row).values())
            if found:
                measured = [[r[key] for r in found] for key in ("knn", "linear")]
                shown.append((f"{row} ({len(found)})", measured))
        if shown:
            ends = [end for _, measured in shown for values in measured for end in ends_of(values)]
            low = 20 * math.floor(min(ends) / 20)
            panels.append(Panel(TITLES[data], shown, low, high=20 * math.ceil(max(ends) / 20)))
    draw_rows(PICTURE, panels, {"kNN": BLUE, "cached linear": RED})


def ends_of(values):
    """The least and the most of some accuracies, and the lower end of their bar of a standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else 0
    return min(min(values), statistics.mean(values) - spread), max(values)


# --- Seconds a step -------------------------------------------------------------------------------

def measure_speed(folder, rounds=12):
    """The median seconds of a step of each row, the rows in turn, one thread; views and all. To SPEED."""
    device, *_ = join_world(torch.device("cpu"))
    torch.set_num_threads(1)
    steppers = {}
    for data, rows in ROWS.items():
        if data == "shapes" or folder:
            for row in rows:
                steppers[data, row] = steps_of(command_of(data, folder, row), device)
    times = {key: [] for key in steppers}
    for key in [key for _ in range(rounds) for key in steppers]:
        began = time.perf_counter()
        next(steppers[key])
        times[key].append(time.perf_counter() - began)
    seconds = {data: {} for data in ROWS}
    for (data, row), its in times.items():
        seconds[data][row] = statistics.median(its[2:])  # the first two warm up
    content = {"command": "results/neighbours.py --speed", "device": device_name(device),
               "torch": torch.__version__, "rounds": rounds - 2, "seconds": seconds}
    with open(SPEED, "w") as f:
        f.write(json.dumps(content, indent=1) + "\n")


def steps_of(command, device, autocast=contextlib.nullcontext()):
    """A generator that makes a training step of a command each time it is asked."""
    script, *options = command
    args = {"simsiam.py": simsiam, "related.py": related}[script].parse(options)
    data = args.method.open(args.data)
    s = simsiam.settings_for(args, data.train, 1)
    method = args.method(s, data)
    torch.manual_seed(s["seed"])
    method.build()
    layout = fastest_layout(method.model.encoder, device)
    method.model.to(device, memory_format=layout)
    optimizer = method.optimizer()
    policy = augment.Policy(**{name: s[name] for name in augment.Policy._fields})
    batches = index_batches(s["seed"], len(data.train), s["batch"], s["epochs"])

    def load(batches):
        loaded = augment.load_views(data.train, policy, s["seed"], batches, device, 0, method.views)
        for index, views in loaded:
            yield index, [x.contiguous(memory_format=layout) for x in views]

    stream = method.stream(load, batches, method.parts(device), 0, autocast)
    for step, (views, objective) in enumerate(stream):
        method.set_lr(optimizer, step)
        simsiam.train_step(method.model, objective, optimizer, autocast, views)
        method.after_step(step)
        yield


def make_runs(folder, rows, seeds, minutes):
    """Make the runs that are missing, for so long -> what to say of them."""
    deadline = time.monotonic() + 60 * minutes
    todo = [(data, folder, row, seed, deadline) for data, row, seed in jobs()
            if (data == "shapes" or folder) and row in rows and seed in seeds
            and not os.path.exists(kept(data, row, seed))]
    try:
        for name in results_of(run, todo):
            print(f"done: {name}", flush=True)
    except Interrupted:
        return "time is up; the same command goes on"
    return "all is done"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="CIFAR", help="a CIFAR-10 folder")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="these only (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, help="these only (default: all)")
    parser.add_argument("--speed", action="store_true",
                        help="measure seconds a step instead, on a machine that does nothing else")
    parser.add_argument("--minutes", type=float, default=1e4,
                        help="stop after so many, everything saved; the same command goes on")
    args = parser.parse_args()
    try:
        folder = subset(*open_cifar10(args.data), 10_000, SUBSET) if args.data else None
        if args.speed:
            measure_speed(folder)
            state = f"measured: {SPEED}"
        else:
            seeds = args.seeds or range(max(SEEDS.values()))
            state = make_runs(folder, args.rows or PAPER, seeds, args.minutes)
    except (Refused, OSError, RuntimeError) as error:
        sys.exit(f"neighbours.py: {error}")
    finally:
        write_tables(PAGE, [table(), comparison()])
        picture()
        README.write_text(in_readme(README.read_text()))
    print(state)


if __name__ == "__main__":
    main()
