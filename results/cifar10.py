"""CIFAR-10 as in supplement D of the paper, the whole programme: pre-training, linear evaluation, seeds, ablations, and a page of the results.

    python results/cifar10.py CIFAR --minutes 9      on a GPU, until it says that all is done. Not run on a GPU by us yet
    python results/cifar10.py CIFAR                  on a CPU: the same commands on 10,000 of the images and a network an eighth as wide
    ... --keep results/cifar10 --note TEXT           how the results in the repository were made; what is there already is not done again

From the repository's root, on Linux. A job is one command; those that are done are not done again, and one that --minutes or Ctrl-C interrupts is
resumed by the next start. On a CPU each job has a core of its own. Runs lie in runs/cifar10; logs and accuracies are kept in the folder --keep, and
a page beside it is made of them. Nothing is chosen by looking at test images, and every figure is the last epoch's, on all 10,000 of them.
"""
import argparse
import concurrent.futures
import json
import os
import queue
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.getcwd())
import augment
import numpy as np
import torch

# name: (options beside the recipe's, seeds, linear evaluations), in the order in which they are run
ON_A_GPU = {
    "200-epochs": (["--epochs", "200"], [0, 1, 2], ["sgd", "cached"]),
    "800-epochs": ([], [0], ["sgd", "lars", "cached"]),
    "200-epochs-decayed-predictor": (["--epochs", "200", "--pred-lr", "cosine"], [0, 1, 2], ["cached"]),
    "50-epochs": (["--epochs", "50"], [0, 1, 2], ["cached"]),
    "50-epochs-float32": (["--epochs", "50", "--no-amp"], [0], ["cached"]),
    "50-epochs-compiled": (["--epochs", "50", "--compile"], [0], ["cached"]),
    "50-epochs-affine": (["--epochs", "50", "--affine"], [0], ["cached"]),
    "50-epochs-released-projection": (["--epochs", "50", "--proj-hidden", "512"], [0], ["cached"]),
}
# 1/8 of the width of backbone and heads. Batch and lr are those of an earlier run at 1/4 of the width (results/README.md), not tuned here
SMALL = shlex.split("--width 1/8 --proj-hidden 256 --dim 256 --pred-dim 64 --batch 64 --base-lr 0.4 --epochs 40 --knn-every 5")
ON_A_CPU = {
    "small": (SMALL, [0, 1, 2], ["sgd", "lars", "cached"]),
    "small-decayed-predictor": ([*SMALL, "--pred-lr", "cosine"], [0, 1, 2], ["cached"]),
    "small-affine": ([*SMALL, "--affine"], [0, 1, 2], ["cached"]),
}
PUBLISHED = [  # who, epochs, what was measured
    ("the paper, supplement D", 800, "linear 91.8 (SimCLR in the same setting: 91.1)"), ("lightly, batch 512", 200, "kNN 76.4"),
    ("lightly", 800, "kNN 90.4, best epoch"), ("PatrickHua/SimSiam", 800, "kNN 90.3, on 9,728 test images; linear 90.8, and 91.9 on 9,984"),
    ("solo-learn's maintainer", 800, "linear 91.6")]
RUNS = "runs/cifar10"


def subset(train, val, n, folder):
    """A folder in CIFAR-10's binary layout with the first n / 10 training images of each class, and all test images."""
    if not os.path.exists(folder):
        first = np.sort(np.concatenate([np.flatnonzero(train.labels == k)[:n // 10] for k in range(10)]))
        os.makedirs(f"{folder}.tmp", exist_ok=True)
        for names, source, index in zip(augment.CIFAR_BATCHES, (train, val), (first, np.arange(len(val)))):
            for name, part in zip(names, np.array_split(index, len(names))):
                records = np.concatenate([source.labels[part, None].astype(np.uint8), source.pixels[part].flatten(1).numpy()], axis=1)
                records.tofile(f"{folder}.tmp/{name}.bin")
        os.rename(f"{folder}.tmp", folder)
    return folder


def records(path):
    """A log's records; none where there is no log yet."""
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return [json.loads(line) for line in f if line.endswith("}\n")]


def jobs(data, programme, keep):
    """For each run its name and, of pre-training and linear evaluations, the command, what it makes in the end, and what is kept of it."""
    for name, (options, seeds, protocols) in programme.items():
        for seed in seeds:
            out, kept = f"{RUNS}/{name}-{seed}", f"{keep}/{name}-{seed}"
            yield f"{name}-{seed}", [
                (["simsiam.py", data, *options, "--seed", str(seed), "--out", out, "--resume", "auto"], f"{out}/backbone.pth", f"{kept}/log.jsonl"),
                *((["lineval.py", data, "--ckpt", f"{out}/checkpoint.pth", f"--{protocol}", "--resume", "auto"],
                   f"{out}/lineval-{protocol}/lineval.json", f"{kept}/lineval-{protocol}.json") for protocol in protocols)]


class Interrupted(Exception):
    """Time was up."""


def run(name, commands, deadline):
    """Do what is not done yet of a run, and keep its results. Raises Interrupted at the deadline, and RuntimeError where a command fails."""
    if all(os.path.exists(kept) for *_, kept in commands):
        return name
    for command, made, kept in commands:
        if not os.path.exists(made):
            if time.monotonic() > deadline:
                raise Interrupted
            print(f"python {shlex.join(command)}", flush=True)
            process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            try:
                _, said = process.communicate(timeout=max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)  # it saves what it has
                process.communicate()
                raise Interrupted from None
            if process.returncode != 0:
                raise RuntimeError(f"python {shlex.join(command)}: {said}")
        source, folder = os.path.dirname(made), os.path.dirname(kept)
        os.makedirs(folder, exist_ok=True)
        pretraining = made.endswith("backbone.pth")
        for base in ("curves.png", "backbone.pth") if pretraining else ():
            if os.path.getsize(f"{source}/{base}") < 4 * 2 ** 20:
                shutil.copy(f"{source}/{base}", folder)
        if not pretraining and os.path.exists(f"{source}/log.jsonl"):
            shutil.copy(f"{source}/log.jsonl", f"{kept}l")
        shutil.copy(f"{source}/log.jsonl" if pretraining else made, kept)
    return name


def cell(values):
    """Mean and, of several, the standard deviation."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    return f"{statistics.mean(values):.1f}" + (f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def page(note, keep):
    """The page, from what is kept."""
    out = [f"CIFAR-10, made by `results/cifar10.py` from the logs in `{keep}`. {note}{' ' * (note != '')}Top-1 in percent on all 10,000 test images, of the last epoch; mean and standard "
           "deviation over the seeds.", ""]
    for title, programme in (("As in supplement D", ON_A_GPU), ("Small, on a CPU", ON_A_CPU)):
        rows, curves, machines = [], [], set()
        for name, (options, seeds, protocols) in programme.items():
            logs = [log for log in (records(f"{keep}/{name}-{seed}/log.jsonl") for seed in seeds) if log]
            if not logs:
                rows.append(f"| {name} | not run | | | | | | | |")
                continue
            machines |= {f"{start['device']}, torch {start['torch']}, {start['settings']['images']:,} training images" for start, *_ in logs}
            epochs = [[r for r in log if r["event"] == "epoch"] for log in logs]
            linear = {}
            for protocol in ("sgd", "lars", "cached"):
                files = [f"{keep}/{name}-{seed}/lineval-{protocol}.json" for seed in seeds]
                linear[protocol] = []
                for file in filter(os.path.exists, files):
                    with open(file) as f:
                        linear[protocol].append(json.load(f)["top1"])
            minutes = statistics.mean(sum(r["seconds"] for r in run[1:]) / 60 for run in epochs)
            rows.append(f"| {name} | {len(logs)} | {epochs[0][-1]['epoch']} | {statistics.mean(run[-1]['loss'] for run in epochs):.3f} | "
                        f"{cell([run[-1]['knn'] for run in epochs])} | {' | '.join(cell(linear[p]) for p in linear)} | {minutes:.1f} |")
            last = epochs[0][-1]["epoch"]
            at = sorted({r["epoch"] for r in epochs[0] if r["knn"] is not None and (r["epoch"] in (0, last) or r["epoch"] % max(1, last // 8) == 0)})
            curves.append((name, at, [cell([r["knn"] for run in epochs for r in run if r["epoch"] == epoch]) for epoch in at]))
        out += [f"## {title}", "", *sorted(machines), "",
                "| run | seeds | epochs | loss | kNN | linear, sgd | linear, lars | linear, cached | minutes of training |", "|---|---|---|---|---|---|---|---|---|", *rows, ""]
        if curves:
            out += ["kNN while training, at these epochs (0: untrained, BN calibrated):", ""]
            for name, at, values in curves:
                out.append(f"- {name}: " + ", ".join(f"{epoch}: {value}" for epoch, value in zip(at, values)))
            out.append("")
    out += ["## Published, by others", "", "| who | epochs | measured |", "|---|---|---|", *(f"| {who} | {epochs} | {what} |" for who, epochs, what in PUBLISHED)]
    return "\n".join(out) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", metavar="CIFAR", help="a CIFAR-10 folder")
    parser.add_argument("--minutes", type=float, default=1e4, help="stop after so many, everything saved; the same command goes on")
    parser.add_argument("--keep", default="runs/cifar10-kept", help="folder for logs and accuracies, and the page beside it (default: %(default)s)")
    parser.add_argument("--note", default="", help="what the page is to say of the data")
    args = parser.parse_args()
    cuda, cores, done = torch.cuda.is_available(), queue.SimpleQueue(), "all is done"
    for core in os.sched_getaffinity(0):
        cores.put(core)
    pin = (lambda: None) if cuda else (lambda: os.sched_setaffinity(0, {cores.get()}))  # of a thread; its runs inherit it
    deadline = time.monotonic() + 60 * args.minutes
    pool = concurrent.futures.ThreadPoolExecutor(1 if cuda else cores.qsize(), initializer=pin)
    try:
        train, val = augment.open_data(args.data)
        if val is None or train.labels is None or [len(train), len(val), len(train.classes)] != [50_000, 10_000, 10]:
            raise augment.Refused(f"{args.data}: not CIFAR-10, which has 50,000 training and 10,000 test images of 10 classes")
        programme, data = (ON_A_GPU, args.data) if cuda else (ON_A_CPU, subset(train, val, 10_000, "runs/cifar10-10000"))
        for job in concurrent.futures.as_completed([pool.submit(run, *job, deadline) for job in jobs(data, programme, args.keep)]):
            print(f"done: {job.result()}", flush=True)
    except Interrupted:
        done = "time is up; the same command goes on"
    except (augment.Refused, OSError, RuntimeError) as error:
        sys.exit(f"cifar10.py: {error}")
    finally:
        pool.shutdown(cancel_futures=True)
    os.makedirs(args.keep, exist_ok=True)
    with open(f"{args.keep}.md", "w") as f:
        f.write(page(args.note, args.keep))
    print(f"{done}; {args.keep}.md has the results so far")


if __name__ == "__main__":
    main()
