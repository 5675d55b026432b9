"""How long to train on a small data set, and how many neighbours to judge it by.

    python results/own_data.py CIFAR [--minutes 60]     repeat until everything is done
    python results/own_data.py --show                   only write the page

Start it from the repository's root, on Linux. CIFAR is a CIFAR-10 folder. It makes the tables in
docs/own-data.md.

Subsets of CIFAR-10, with the first images of each class, stand in for your own data. On each, a ResNet-18 at
a quarter of the width is trained in several ways and judged by the cached protocol on the first 2,000 test
images, as is the untrained network. A run with a line in own-data.jsonl is not run again. Each run has one
core.
"""
import json
import os
import sys

sys.path.insert(0, os.getcwd())
import numpy as np
import torch

from harness.common.errors import Refused
from harness.evaluation.features import hits
from results.cifar10 import open_cifar10, subset
from results.pages import page_with, table
from results.rows import (Kept, Runs, append, evaluate, last, make, minutes_of, parser_for, records,
                          results_of, run_script, top1_of)
from simsiam import knn, l2_normalize

LINES = "results/own-data.jsonl"
PAGE = "docs/own-data.md"
RUNS = "runs/own-data"
SMALL = ("--recipe cifar10 --width 1/4 --proj-hidden 512 --dim 512 --pred-dim 128 --knn-every 1000 "
         "--workers 0")
TEST = 2000
UNTRAINED = (0, 0, 0)  # batch, lr, steps
# Images, batch, lr, steps, in the order in which they are run: the first tell the most.
WAYS = [
    (1000, *UNTRAINED), (2000, *UNTRAINED), (5000, *UNTRAINED),
    (1000, 32, 0.1, 1500), (2000, 32, 0.1, 1500),
    (2000, 32, 0.1, 500), (2000, 32, 0.1, 4000),
    (1000, 32, 0.1, 500),
    (5000, 32, 0.1, 1500), (5000, 32, 0.1, 500),
    (2000, 64, 0.1, 1500),
    (2000, 32, 0.05, 1500), (2000, 32, 0.2, 1500),
    (1000, 32, 0.1, 4000), (5000, 32, 0.1, 4000),
    (2000, 64, 0.1, 500),
    (2000, 16, 0.1, 1500),
]
NEIGHBOURS = (1, 5, 10, 20, 40, 80, 200)


# --- The runs -------------------------------------------------------------------------------------

def make_runs(args, deadline):
    """Make those that have no line yet."""
    if args.data is None:
        raise Refused("name a CIFAR-10 folder, or --show")
    train, val = open_cifar10(args.data)
    done = {way_of(record) for record in records(LINES)}
    todo = []
    for n, *way in WAYS:
        if (n, *way) not in done:
            folder = subset(train, val, n, f"{RUNS}/cifar-{n}", TEST)
            todo.append((folder, n, *way, deadline))
    for record in results_of(judged_run, todo):
        append(LINES, record)
        print(json.dumps(record), flush=True)


def judged_run(folder, n, batch, lr, steps, deadline):
    """Train and judge -> a record."""
    name = f"{n}-{batch}-{lr}-{steps}"
    features = f"{RUNS}/{name}.npz"
    judging = f"--cached --features {features}"
    record = {"images": n, "batch": batch, "lr": lr, "asked": steps, "seed": 0}
    record["torch"] = torch.__version__
    if steps == 0:
        words = [folder, "--ckpt", "random:resnet18", "--width", "1/4", *judging.split(), "--workers", "0"]
        top1 = evaluate(words, f"{RUNS}/{name}", deadline)["top1"]
        return record | {"steps": 0, "epochs": 0, "cached": top1, "knn": knn_of(features)}
    epochs = round(steps * batch / (n // batch * batch))
    options = f"{SMALL} --batch {batch} --base-lr {lr * 256 / batch} --epochs {epochs}"
    runs = Runs(name, f"simsiam.py {folder} {options}", (0,), {"cached": judging})
    _, line = make(Kept(None, RUNS), runs, 0, deadline)
    return record | {
        "steps": epochs * (n // batch),
        "epochs": epochs,
        "loss": last(line, "loss"),
        "rank": last(line, "rank"),
        "seconds": round(60 * minutes_of(line)),
        "cached": top1_of(line),
        "knn": knn_of(features),
        "command": line["command"],
    }


def knn_of(path):
    """{k: kNN top-1} of saved features."""
    saved = np.load(path)
    bank = l2_normalize(torch.from_numpy(saved["train_features"]))
    queries = l2_normalize(torch.from_numpy(saved["val_features"]))
    labels = torch.from_numpy(saved["train_labels"])
    truth = torch.from_numpy(saved["val_labels"])
    found = {}
    for k in NEIGHBOURS:
        scores = knn(bank, labels, queries, min(k, len(bank)))
        first, _ = hits(scores, truth)
        found[k] = round(100 * first.sum().item() / len(truth), 2)
    return found


# --- The page -------------------------------------------------------------------------------------

def steps_of(record):
    return record["steps"]


def way_of(record):
    return record["images"], record["batch"], record["lr"], record["asked"]


def gain(r, untrained):
    """Points above the untrained network on the same images."""
    return r["cached"] - untrained[r["images"]]["cached"]


def rows_table(trained, untrained):
    lines = [[f"{r['images']:,}", r["batch"], r["lr"], r["epochs"], f"{r['steps']:,}", f"{r['loss']:.3f}",
              f"{r['rank']:.1f}", f"{r['cached']:.1f}", f"{gain(r, untrained):+.1f}",
              f"{r['seconds'] / 60:.0f}"] for r in trained]
    return table(["images", "batch", "lr", "epochs", "steps", "loss", "rank", "cached linear",
                  "above untrained", "minutes"], lines)


def neighbours_table(trained, untrained):
    """The untrained network, and the longest run on the same images."""
    lines = []
    for n, r in sorted(untrained.items()):
        *_, longest = sorted((t for t in trained if t["images"] == n), key=steps_of)
        for network, found in (("untrained", r), (f"{longest['steps']:,} steps", longest)):
            lines.append([f"{n:,}", network, *(f"{found['knn'][f'{k}']:.1f}" for k in NEIGHBOURS)])
    return table(["images", "network", *(f"k {k}" for k in NEIGHBOURS)], lines)


def gains_table(trained, untrained):
    """By the number of steps, for all numbers of images."""
    lines = []
    for steps in sorted({r["asked"] for r in trained}):
        same = [r for r in trained if way_of(r) == (r["images"], 32, 0.1, steps)]
        gains = [gain(r, untrained) for r in same]
        lines.append([f"{steps:,}", f"{min(gains):+.1f} to {max(gains):+.1f}"])
    return table(["steps, about", "points above the untrained network, batch 32, lr 0.1"], lines)


def pages():
    found = records(LINES)
    untrained = {r["images"]: r for r in found if r["steps"] == 0}
    trained = sorted((r for r in found if r["steps"]), key=way_of)
    return page_with(PAGE, [made(trained, untrained) for made in (rows_table, neighbours_table, gains_table)])


def main():
    parser = parser_for(__doc__)
    parser.add_argument("data", metavar="CIFAR", nargs="?")
    run_script(parser, make_runs, pages)


if __name__ == "__main__":
    main()
