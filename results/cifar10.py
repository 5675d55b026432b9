"""CIFAR-10 as in supplement D of the paper: runs, linear evaluations, seeds, ablations.

    python results/cifar10.py CIFAR --minutes 60   on a GPU; repeat until everything is done
    python results/cifar10.py CIFAR                on a CPU: 10,000 of the images, a network an eighth as wide
    python results/cifar10.py --show               only write the pages

Start it from the repository's root, on Linux. rows.py describes how the runs are made and kept. It makes the
tables in results/cifar10.md. Runs that end within the minutes come first. The logs of those that have not
ended are in results/cifar10/unfinished. A machine that starts bare can only make new runs: evaluations that
an old one lacks need its checkpoint.

Nothing is chosen on test images. Every figure is the last epoch's, on all 10,000 of them. The base lr of the
linear evaluations by sgd and lars is chosen with the first run's seed 0 on a tenth of the training images,
held out: MoCo's 30 is for the 2048 features of ImageNet, and lars for 28,000 steps.
"""
import contextlib
import os
import pathlib
import re
import shlex
import shutil
import statistics
import sys
import threading
import time
from typing import NamedTuple

sys.path.insert(0, os.getcwd())
import numpy as np
import torch

from harness.common.errors import Refused
from harness.data import cifar
from harness.data.opening import open_data
from results.pages import cell, page_with, table
from results.rows import (Kept, Runs, append, columns, epochs_of, evaluate, last, make_all, minutes_of,
                          parser_for, pretrain, records, results_of, run_script, top1_of)

PAGE = "results/cifar10.md"


class Plan(NamedTuple):
    """Runs that differ only in the seed."""
    options: str    # besides the recipe's
    seeds: int      # how many, from 0
    protocols: str  # of the linear evaluations


# On a GPU all runs are compiled, but for one that shows the difference. In the order in which they are made
ON_A_GPU = {
    "50-epochs-compiled": Plan("--epochs 50 --compile", 3, "sgd cached"),
    "200-epochs-decayed-predictor": Plan("--epochs 200 --pred-lr cosine --compile", 3, "cached"),
    "200-epochs": Plan("--epochs 200 --compile", 3, "sgd cached"),
    "800-epochs": Plan("--compile", 1, "sgd lars cached"),
    "50-epochs": Plan("--epochs 50", 1, "sgd cached"),
    "50-epochs-float32": Plan("--epochs 50 --no-amp --compile", 1, "cached"),
    "50-epochs-affine": Plan("--epochs 50 --affine --compile", 1, "cached"),
    "50-epochs-released-projection": Plan("--epochs 50 --proj-hidden 512 --compile", 1, "cached"),
}
# Backbone and heads at 1/8 of the width. Batch and lr are those of an earlier run at 1/4 of the width
# (results/README.md); nothing was tuned here.
SMALL = ("--width 1/8 --proj-hidden 256 --dim 256 --pred-dim 64 --batch 64 --base-lr 0.4 --epochs 40 "
         "--knn-every 5")
ON_A_CPU = {
    "small": Plan(SMALL, 3, "sgd lars cached"),
    "small-decayed-predictor": Plan(f"{SMALL} --pred-lr cosine", 3, "cached"),
}
BASE_LRS = {  # tried on held-out images
    "sgd": (0.3, 1, 3, 10, 30),
    "lars": (0.1, 0.3, 1, 3, 10, 30),
}
KEPT = Kept("results/cifar10", "runs/cifar10")
SUBSET = "runs/cifar10-10000"
SIZES = (50_000, 10_000, 10)  # training and test images, classes


# --- The data -------------------------------------------------------------------------------------

def open_cifar10(path):
    """-> train, val. Raises Refused if it isn't CIFAR-10."""
    train, val, _ = open_data(path)
    if val is not None and train.labels is not None:
        if (len(train), len(val), len(train.classes)) == SIZES:
            return train, val
    raise Refused(f"{path}: not CIFAR-10, which has 50,000 training and 10,000 test images of 10 classes")


def subset(train, val, n, folder, n_val=None):
    """A folder in the binary layout: n training and n_val (or all) test images, the first of each class"""
    return write_folder(folder, train, first_of_each_class(train, n),
                        val, first_of_each_class(val, n_val or len(val)))


def first_of_each_class(source, n):
    """The numbers of n images, as many of each of the ten classes."""
    of_each = [np.flatnonzero(source.labels == k)[:n // 10] for k in range(10)]
    return np.sort(np.concatenate(of_each))


def hold_out(folder):
    """A CIFAR-10 folder -> one where every tenth training image is a test image instead"""
    train, *_ = open_data(folder)
    tenth = np.arange(0, len(train), 10)
    rest = np.setdiff1d(np.arange(len(train)), tenth)
    return write_folder(f"runs/cifar10-held-out-of-{len(train)}", train, rest, train, tenth)


def write_folder(folder, train, train_index, val, val_index):
    """Write these images of two sources in the binary layout -> the folder"""
    if os.path.exists(folder):
        return folder
    unfinished = f"{folder}.tmp"
    os.makedirs(unfinished, exist_ok=True)
    train_names, val_names = cifar.TEN
    write_batches(unfinished, train_names, train, train_index)
    write_batches(unfinished, val_names, val, val_index)
    os.rename(unfinished, folder)
    return folder


def write_batches(folder, names, source, index):
    """Spread these images of a source over files of these names: of each the label, then the pixels."""
    for name, part in zip(names, np.array_split(index, len(names))):
        labels = source.labels[part, None].astype(np.uint8)
        pixels = source.pixels[part].flatten(1).numpy()
        np.concatenate([labels, pixels], axis=1).tofile(f"{folder}/{name}.bin")


# --- The runs -------------------------------------------------------------------------------------

def make_runs(args, deadline):
    """The first run, which chooses the lr of the evaluations, then all others, each with its evaluations."""
    if args.data is None:
        raise Refused("name a CIFAR-10 folder, or --show")
    train, val = open_cifar10(args.data)
    programme, data = ON_A_GPU, args.data
    if not torch.cuda.is_available():
        programme, data = ON_A_CPU, subset(train, val, 10_000, SUBSET)
    first, *_ = programme
    with keeping_logs():
        runs = runs_of(first, programme[first], data)
        if not KEPT.of(first).get(0) or checkpoint_of(first, 0).exists():
            pretrain(KEPT, runs, 0, deadline)
            choose(runs, hold_out(data), deadline)
        rows = [runs_of(name, plan, data, base_lrs(first)) for name, plan in programme.items()]
        make_all(KEPT, in_order(rows, pace_of(programme), deadline), deadline, args.data)


def runs_of(name, plan, data, lrs={}):
    """A plan's runs. lrs: {protocol: base lr}; a protocol whose lr is not chosen yet is left out"""
    evaluations = {}
    for protocol in plan.protocols.split():
        if protocol in lrs:
            evaluations[protocol] = f"--{protocol} --base-lr {lrs[protocol]:g}"
        elif protocol not in BASE_LRS:
            evaluations[protocol] = f"--{protocol}"
    return Runs(name, f"simsiam.py {shlex.quote(data)} {plan.options}", tuple(range(plan.seeds)), evaluations)


def checkpoint_of(name, seed):
    return pathlib.Path(f"{KEPT.scratch}/{name}-{seed}/checkpoint.pth")


def pace_of(programme):
    """The median minutes of an epoch in these runs so far; 0 if there is none."""
    kept = [run for name in programme for run in KEPT.of(name).values()]
    return statistics.median([minutes_of(run) / last(run, "epoch") for run in kept] or [0])


def in_order(rows, pace, deadline):
    """[(Runs, seed)] that can be made: first those that end before the deadline, at `pace` minutes an epoch.

    A kept run whose checkpoint is gone is not made again for the sake of an evaluation.
    """
    def is_long(job):
        epochs = re.search(r"--epochs (\d+)", job[0].command)
        return 60 * pace * int(epochs[1] if epochs else 800) > deadline - time.monotonic()

    todo = [(runs, seed) for runs, seed in KEPT.missing(rows)
            if seed not in KEPT.of(runs.name) or checkpoint_of(runs.name, seed).exists()]
    return sorted(todo, key=is_long)


@contextlib.contextmanager
def keeping_logs(pause=20):
    """Within the block, and at its end, copy the logs of unfinished runs every few seconds."""
    ended = threading.Event()

    def keep():
        folder = pathlib.Path(KEPT.folder, "unfinished")
        is_last = False
        while not is_last:
            is_last = ended.wait(pause)
            for log in pathlib.Path(KEPT.scratch).glob("*/log.jsonl"):
                name, _, seed = log.parent.name.rpartition("-")
                copy = folder / f"{name}-{seed}.jsonl"
                if int(seed) in KEPT.of(name):
                    copy.unlink(missing_ok=True)
                else:
                    folder.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(log, copy)

    thread = threading.Thread(target=keep)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def choose(first, held_out, deadline):
    """Evaluate the first run's seed 0 on held-out training images, at each base lr that has no line yet."""
    out = f"{KEPT.scratch}/{first.name}-0"
    todo = []
    for protocol, lrs in BASE_LRS.items():
        for lr in lrs:
            if lr not in held_out_top1(first.name, protocol):
                words = [held_out, "--ckpt", f"{out}/checkpoint.pth", f"--{protocol}", "--base-lr", f"{lr:g}"]
                todo.append((words, f"{out}/held-out-{protocol}-{lr:g}", deadline))
    for line in results_of(evaluate, todo):
        append(KEPT.path("held-out"), line)


def held_out_top1(name, protocol):
    """{base lr: top-1 on the held-out training images} of a row's first run"""
    found = {line["base_lr"]: line["top1"] for line in records(KEPT.path("held-out"))
             if line["protocol"] == protocol and f"/{name}-0/" in line["backbone"]}
    return dict(sorted(found.items()))


def base_lrs(name):
    """{protocol: the best base lr on the held-out images}, of those that were tried"""
    best = {}
    for protocol in BASE_LRS:
        found = held_out_top1(name, protocol)
        if found:
            best[protocol] = max(found, key=found.get)
    return best


# --- The pages ------------------------------------------------------------------------------------

def rows_table(title, programme):
    """A programme's rows: figures of the last epochs, and evaluations."""
    lines = []
    for name in programme:
        runs = list(KEPT.of(name).values())
        if runs:
            pixels = cell([run["log"][0]["knn_pixels"] for run in runs])
            untrained = cell([epochs_of(run)[0]["knn"] for run in runs])
            lines.append([name, last(runs[0], "epoch"), *columns(runs), pixels, untrained, *linear(runs),
                          f"{statistics.mean(map(minutes_of, runs)):.1f}",
                          ", ".join(sorted({machine_of(run) for run in runs}))])
        else:
            lines.append([name, "not run", *["-"] * 11])
    return table([title, "epochs", "seeds", "loss", "std x sqrt(d)", "kNN", "raw pixels", "untrained",
                  "linear: sgd", "lars", "cached", "minutes of training", "machine"], lines)


def linear(runs):
    """A linear layer's accuracy by each protocol, as cells."""
    return [cell([top1_of(run, protocol) for run in runs if protocol in run["evaluations"]])
            for protocol in ("sgd", "lars", "cached")]


def machine_of(run):
    start, *_ = run["log"]
    return f"{start['device']}, torch {start['torch']}"


def held_out_table():
    lines = []
    for name in ("50-epochs-compiled", "small"):
        for protocol in BASE_LRS:
            found = held_out_top1(name, protocol)
            if found:
                shown = ", ".join(f"{lr:g}: {top1:.1f}" for lr, top1 in found.items())
                lines.append([name, protocol, shown, f"{base_lrs(name)[protocol]:g}"])
    return table(["run, seed 0", "protocol", "base lr: top-1 on held-out training images", "taken"], lines)


def pages():
    tables = [rows_table("as in supplement D, on a GPU", ON_A_GPU), rows_table("small, on a CPU", ON_A_CPU),
              held_out_table()]
    return page_with(PAGE, tables)


def main():
    parser = parser_for(__doc__)
    parser.add_argument("data", metavar="CIFAR", nargs="?", help="a CIFAR-10 folder")
    run_script(parser, make_runs, pages)


if __name__ == "__main__":
    main()
