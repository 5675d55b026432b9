"""CIFAR-10 as in supplement D of the paper: runs, linear evaluations, seeds, ablations, a page of results.

    python results/cifar10.py CIFAR --minutes 9    on a GPU, until it says that all is done
    python results/cifar10.py CIFAR                on a CPU: 10,000 of the images, a network an eighth as wide
    ... --keep results/cifar10 --note TEXT         how the results in the repository were made

Start it from the repository's root, on Linux. A job is one command, and a job that is done is not done again.
The next start resumes a job that --minutes or Ctrl-C has interrupted. On a CPU each job has a core of its
own. The runs lie in runs/cifar10. The script keeps logs and accuracies in the folder --keep, and makes the
page beside that folder of them.

We choose nothing by looking at test images. Every figure is the last epoch's, on all 10,000 of them. The base
lr of the linear evaluations by sgd and lars is chosen on a tenth of the training images, held out, of the
first run of seed 0: MoCo's 30 is made for the 2048 features of ImageNet, and lars for 28,000 steps.
"""
import argparse
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

sys.path.insert(0, os.getcwd())
import numpy as np
import torch

from harness.common.errors import Refused
from harness.data import cifar
from harness.data.opening import open_data
from results.cores import results_of


class Runs(NamedTuple):
    """Runs that differ in nothing but the seed."""
    options: str    # beside the recipe's
    seeds: int      # how many, from 0 on
    protocols: str  # of the linear evaluations


# In the order in which they are run: what takes minutes first
ON_A_GPU = {
    "50-epochs": Runs("--epochs 50", 3, "sgd cached"),
    "200-epochs": Runs("--epochs 200", 3, "sgd cached"),
    "800-epochs": Runs("", 1, "sgd lars cached"),
    "200-epochs-decayed-predictor": Runs("--epochs 200 --pred-lr cosine", 3, "cached"),
    "50-epochs-float32": Runs("--epochs 50 --no-amp", 1, "cached"),
    "50-epochs-compiled": Runs("--epochs 50 --compile", 1, "cached"),
    "50-epochs-affine": Runs("--epochs 50 --affine", 1, "cached"),
    "50-epochs-released-projection": Runs("--epochs 50 --proj-hidden 512", 1, "cached"),
}
# Backbone and heads have 1/8 of the width. Batch and lr are those of an earlier run at 1/4 of the width
# (results/README.md); nothing was tuned here.
SMALL = ("--width 1/8 --proj-hidden 256 --dim 256 --pred-dim 64 --batch 64 --base-lr 0.4 --epochs 40 "
         "--knn-every 5")
ON_A_CPU = {
    "small": Runs(SMALL, 3, "sgd lars cached"),
    "small-decayed-predictor": Runs(f"{SMALL} --pred-lr cosine", 3, "cached"),
}
BASE_LRS = {"sgd": (0.3, 1, 3, 10, 30), "lars": (0.1, 0.3, 1, 3, 10, 30)}  # tried on held-out images
PUBLISHED = [  # who, epochs, what was measured
    ("the paper, supplement D", 800, "linear 91.8 (SimCLR in the same setting: 91.1)"),
    ("lightly, batch 512", 200, "kNN 76.4"),
    ("lightly", 800, "kNN 90.4, best epoch"),
    ("PatrickHua/SimSiam", 800, "kNN 90.3, on 9,728 test images; linear 90.8, and 91.9 on 9,984"),
    ("solo-learn's maintainer", 800, "linear 91.6"),
]
RUNS = "runs/cifar10"
SUBSET = "runs/cifar10-10000"
SIZES = (50_000, 10_000, 10)  # training and test images, classes
KEEPS_CURVES = ("800-epochs-0", "small-0")  # the pictures of the others look the same


# --- What is to be run ----------------------------------------------------------------------------

class Job(NamedTuple):
    command: list
    made: str  # the file that the command makes in the end
    kept: str  # the file that is kept of it: where there is one, the job is done


def pretraining(data, programme, keep):
    """Yield the name of each run, and its jobs: pre-training, and the cached evaluation, which chooses its lr
    by itself."""
    for name, runs, seed in each(programme):
        out, kept = f"{RUNS}/{name}-{seed}", f"{keep}/{name}-{seed}"
        options = shlex.split(f"{runs.options} --seed {seed} --out {out} --resume auto")
        todo = [Job(["simsiam.py", data, *options], f"{out}/backbone.pth", f"{kept}/log.jsonl")]
        if "cached" in runs.protocols:
            todo.append(evaluation(data, name, seed, keep, "cached", ["--cached"]))
        yield f"{name}-{seed}", todo


def choosing(held_out, programme, keep):
    """Yield the name and the only job of each evaluation on held-out training images. They are of the first
    run, of seed 0."""
    first = next(iter(programme))
    for protocol, lrs in BASE_LRS.items():
        for lr in lrs:
            name = f"held-out-{protocol}-{lr:g}"
            options = [f"--{protocol}", "--base-lr", f"{lr:g}", "--out", f"{RUNS}/{first}-0/{name}"]
            yield f"{first}-0, {name}", [evaluation(held_out, first, 0, keep, name, options)]


def evaluating(data, programme, keep):
    """Yield the name of each run, and its evaluations at the lr that was chosen."""
    for name, runs, seed in each(programme):
        todo = []
        for protocol in runs.protocols.split():
            if protocol in BASE_LRS:
                options = [f"--{protocol}", "--base-lr", f"{chosen(programme, protocol, keep):g}"]
                todo.append(evaluation(data, name, seed, keep, protocol, options))
        yield f"{name}-{seed}, evaluated", todo


def each(programme):
    """Yield the runs of a programme: name, Runs, seed."""
    for name, runs in programme.items():
        for seed in range(runs.seeds):
            yield name, runs, seed


def evaluation(data, name, seed, keep, kind, options):
    """The Job of a linear evaluation. kind: what it is called in the folders"""
    out = f"{RUNS}/{name}-{seed}"
    folder = kind if kind.startswith("held-out") else f"lineval-{kind}"
    options = ["--ckpt", f"{out}/checkpoint.pth", *options, "--resume", "auto"]
    return Job(["lineval.py", data, *options], f"{out}/{folder}/lineval.json",
               f"{keep}/{name}-{seed}/{folder}.json")


def held_out_top1(programme, protocol, keep):
    """{base lr: top-1 on the held-out training images}, as far as there is one."""
    first = next(iter(programme))
    found = {}
    for lr in BASE_LRS[protocol]:
        path = f"{keep}/{first}-0/held-out-{protocol}-{lr:g}.json"
        if os.path.exists(path):
            with open(path) as f:
                found[lr] = json.load(f)["top1"]
    return found


def chosen(programme, protocol, keep):
    """The base lr that is the best on the held-out images."""
    found = held_out_top1(programme, protocol, keep)
    return max(found, key=found.get)


def subset(train, val, n, folder):
    """A folder in the binary layout: n training images, the first of each class, and all test images."""
    mine = [np.flatnonzero(train.labels == k)[:n // 10] for k in range(10)]
    return write_folder(folder, train, np.sort(np.concatenate(mine)), val, np.arange(len(val)))


def hold_out(folder):
    """Of a folder of CIFAR-10 one in which every tenth training image stands in the place of the test
    images, and is no longer trained on."""
    train, *_ = open_data(folder)
    tenth = np.arange(0, len(train), 10)
    rest = np.setdiff1d(np.arange(len(train)), tenth)
    return write_folder(f"{RUNS}-held-out-of-{len(train)}", train, rest, train, tenth)


def write_folder(folder, train, train_index, val, val_index):
    """These images of two sources as a folder in the binary layout -> the folder"""
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
    """These images of a source, spread over files of these names. An image is its label, then its pixels."""
    for name, part in zip(names, np.array_split(index, len(names))):
        labels = source.labels[part, None].astype(np.uint8)
        pixels = source.pixels[part].flatten(1).numpy()
        np.concatenate([labels, pixels], axis=1).tofile(f"{folder}/{name}.bin")


# --- Running it -----------------------------------------------------------------------------------

class Interrupted(Exception):
    """The time is up."""


def do_all(todo, deadline):
    """Do (name, jobs) of todo, several at a time; say first what is missing."""
    todo = [(name, jobs, deadline) for name, jobs in todo
            if not all(os.path.exists(job.kept) for job in jobs)]
    for name, *_ in todo:
        print(f"missing: {name}")
    for name in results_of(run, todo):
        print(f"done: {name}", flush=True)


def run(name, todo, deadline):
    """Do the jobs of a run that are not done yet, and keep their results. -> its name

    Raises Interrupted at the deadline, and RuntimeError where a command fails.
    """
    for job in todo:
        if not os.path.exists(job.made):
            do(job.command, deadline)
        keep_results(job)
    return name


def do(command, deadline):
    """One command, to its end or to the deadline."""
    if time.monotonic() > deadline:
        raise Interrupted
    print(f"python {shlex.join(command)}", flush=True)
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    try:
        _, errors = process.communicate(timeout=max(0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # it saves what it has
        process.communicate()
        raise Interrupted from None
    if process.returncode != 0:
        raise RuntimeError(f"python {shlex.join(command)}: {errors}")


def keep_results(job):
    """Copy the results of a job that has ended. The file that marks it as done comes last."""
    source = os.path.dirname(job.made)
    folder = os.path.dirname(job.kept)
    os.makedirs(folder, exist_ok=True)
    log = f"{source}/log.jsonl"
    if job.command[0] == "simsiam.py":
        if os.path.basename(folder) in KEEPS_CURVES:
            shutil.copy(f"{source}/curves.png", folder)
        shutil.copy(log, job.kept)
        return
    if os.path.exists(log):
        shutil.copy(log, f"{job.kept}l")  # lineval-sgd.jsonl beside lineval-sgd.json
    shutil.copy(job.made, job.kept)


# --- The page -------------------------------------------------------------------------------------

PROTOCOLS = ("sgd", "lars", "cached")
HEADS = ("run", "seeds", "epochs", "loss", "kNN", "linear, sgd", "linear, lars", "linear, cached",
         "minutes of training")


def page(note, keep):
    """The page, made of the kept files."""
    of_the_data = f"{note} " if note else ""
    out = [f"CIFAR-10, made by `results/cifar10.py` from the logs in `{keep}`. {of_the_data}Top-1 in percent "
           "on all 10,000 test images, of the last epoch; mean and standard deviation over the seeds.", ""]
    out += section("As in supplement D", ON_A_GPU, keep)
    out += section("Small, on a CPU", ON_A_CPU, keep)
    out += ["## Published, by others", "", "| who | epochs | measured |", "|---|---|---|"]
    out += [f"| {who} | {epochs} | {what} |" for who, epochs, what in PUBLISHED]
    return "\n".join(out) + "\n"


def section(title, programme, keep):
    """The lines of a programme: the machines, a row for each of its runs, the kNN curves."""
    if not any(records(f"{keep}/{name}-{seed}/log.jsonl") for name, _, seed in each(programme)):
        return [f"## {title}", "", 'Nothing yet; README.md, "Not run", has the command.', ""]
    machines = set()
    rows = []
    curves = []
    for name, runs in programme.items():
        logs = [records(f"{keep}/{name}-{seed}/log.jsonl") for seed in range(runs.seeds)]
        logs = [log for log in logs if log]
        if not logs:
            rows.append(f"| {name} | not run | | | | | | | |")
            continue
        for start, *_ in logs:
            images = start["settings"]["images"]
            machines.add(f"{start['device']}, torch {start['torch']}, {images:,} training images")
        epochs = [[r for r in log if r["event"] == "epoch"] for log in logs]
        linear_top1 = [linear(name, runs, protocol, keep) for protocol in PROTOCOLS]
        rows.append(row(name, epochs, linear_top1))
        curves.append(f"- {name}: {curve(epochs)}")
    rule = "---|" * len(HEADS)
    out = [f"## {title}", "", *sorted(machines), ""]
    out += [f"| {' | '.join(HEADS)} |", f"|{rule}", *rows, ""]
    if curves:
        out += ["kNN while training, at these epochs (0: untrained, BN calibrated):", "", *curves, ""]
    for protocol in BASE_LRS:
        found = held_out_top1(programme, protocol, keep)
        if found:
            shown = ", ".join(f"{lr:g}: {top1:.1f}" for lr, top1 in found.items())
            out += [f"Base lr of {protocol}, and top-1 on held-out training images ({next(iter(programme))}, "
                    f"seed 0): {shown}. Taken for all: {chosen(programme, protocol, keep):g}.", ""]
    return out


def row(name, epochs, linear_top1):
    """epochs: the records of each seed's epochs. linear_top1: of each protocol, the accuracies there are."""
    last = [run[-1] for run in epochs]
    loss = statistics.mean(r["loss"] for r in last)
    minutes = statistics.mean(minutes_of(run) for run in epochs)
    cells = [name, f"{len(epochs)}", f"{last[0]['epoch']}", f"{loss:.3f}", cell([r["knn"] for r in last])]
    cells += [cell(values) + which(values, epochs) for values in linear_top1]
    cells.append(f"{minutes:.1f}")
    return f"| {' | '.join(cells)} |"


def which(values, runs):
    """Said of an accuracy that isn't there for all of the runs."""
    return f" ({len(values)} of {len(runs)} seeds)" if 0 < len(values) < len(runs) else ""


def minutes_of(run):
    """Of all epochs, with everything; of logs that are older than that, the steps alone. The first record is
    that of the untrained network."""
    return sum(r.get("wall_seconds", r["seconds"]) for r in run[1:]) / 60


def curve(epochs):
    """The kNN accuracy at the first and the last epoch, and at some eight between."""
    measured = [r["epoch"] for r in epochs[0] if r["knn"] is not None]
    every = max(1, len(measured) // 8)
    shown = []
    for k, number in enumerate(measured):
        if k % every == 0 or number == measured[-1]:
            values = [r["knn"] for run in epochs for r in run if r["epoch"] == number]
            shown.append(f"{number}: {cell(values)}")
    return ", ".join(shown)


def linear(name, runs, protocol, keep):
    """The linear evaluation's top-1 of each seed, as far as there is one."""
    found = []
    for seed in range(runs.seeds):
        path = f"{keep}/{name}-{seed}/lineval-{protocol}.json"
        if os.path.exists(path):
            with open(path) as f:
                found.append(json.load(f)["top1"])
    return found


def records(path):
    """A log's records; none where there is no log yet. A kill may have cut the last line short."""
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return [json.loads(line) for line in f if line.endswith("}\n")]


def cell(values):
    """Mean and, of several, the standard deviation."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} +- {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def open_cifar10(path):
    """-> train, val. Raises Refused where it is anything but CIFAR-10."""
    train, val, _ = open_data(path)
    if val is not None and train.labels is not None:
        if (len(train), len(val), len(train.classes)) == SIZES:
            return train, val
    raise Refused(f"{path}: not CIFAR-10, which has 50,000 training and 10,000 test images of 10 classes")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", metavar="CIFAR", help="a CIFAR-10 folder")
    parser.add_argument("--minutes", type=float, default=1e4,
                        help="stop after so many, everything saved; the same command goes on")
    parser.add_argument("--keep", default="runs/cifar10-kept",
                        help="folder for logs and accuracies, and the page beside it (default: %(default)s)")
    parser.add_argument("--note", default="", help="a sentence for the page about the data")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    state = "all is done"
    try:
        train, val = open_cifar10(args.data)
        if torch.cuda.is_available():
            programme, data = ON_A_GPU, args.data
        else:
            programme, data = ON_A_CPU, subset(train, val, 10_000, SUBSET)
        do_all(pretraining(data, programme, args.keep), deadline)
        do_all(choosing(hold_out(data), programme, args.keep), deadline)
        do_all(evaluating(data, programme, args.keep), deadline)
    except Interrupted:
        state = "time is up; the same command goes on"
    except (Refused, OSError, RuntimeError) as error:
        sys.exit(f"cifar10.py: {error}")
    os.makedirs(args.keep, exist_ok=True)
    with open(f"{args.keep}.md", "w") as f:
        f.write(page(args.note, args.keep))
    print(f"{state}; {args.keep}.md has the results so far")


if __name__ == "__main__":
    main()
