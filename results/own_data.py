"""How long to train on a small data set, and with how many neighbours to judge it.

    python results/own_data.py CIFAR [--minutes 60]     again until it says that all is done

Start it from the repository's root. CIFAR is a CIFAR-10 folder. It makes results/own-data.md.

Subsets of CIFAR-10, the first so many images of each class, stand for somebody's own data. On each, a
ResNet-18 of a quarter of the width is trained in several ways, and judged by the cached protocol on the
first 2,000 test images; beside it the untrained network. A run that has its line in own-data.jsonl is not
run again. Each run has one core.
"""
import argparse
import json
import os
import shlex
import subprocess
import sys
import time

sys.path.insert(0, os.getcwd())
import numpy as np
import torch

from harness.data.cifar import TEN
from harness.data.opening import open_data
from harness.evaluation.features import hits
from results.cifar10 import write_batches
from simsiam import knn, l2_normalize

LINES = "results/own-data.jsonl"
PAGE = "results/own-data.md"
SMALL = shlex.split("--recipe cifar10 --width 1/4 --proj-hidden 512 --dim 512 --pred-dim 128 "
                    "--knn-every 1000")
TEST = 2000
# Images, batch, lr, steps. The order is that of their use: the first rows tell the most.
RUNS = [
    (1000, 32, 0.1, 1500), (2000, 32, 0.1, 1500), (2000, 32, 0.1, 500), (2000, 32, 0.1, 4000),
    (1000, 32, 0.1, 500), (5000, 32, 0.1, 1500), (5000, 32, 0.1, 500),
    (2000, 64, 0.1, 1500), (2000, 32, 0.05, 1500), (2000, 32, 0.2, 1500),
    (1000, 32, 0.1, 4000), (5000, 32, 0.1, 4000), (2000, 64, 0.1, 500), (2000, 16, 0.1, 1500),
]
NEIGHBOURS = (1, 5, 10, 20, 40, 80, 200)


def subset(data, n):
    """A folder in CIFAR-10's binary layout with the first n training and TEST test images, by class."""
    folder = f"runs/own-data/cifar-{n}"
    if not os.path.exists(folder):
        os.makedirs(folder + ".tmp", exist_ok=True)
        train, val, _ = data
        for source, names, count in ((train, TEN[0], n), (val, TEN[1], TEST)):
            first = [np.flatnonzero(source.labels == k)[:count // 10] for k in range(10)]
            write_batches(folder + ".tmp", names, source, np.sort(np.concatenate(first)))
        os.rename(folder + ".tmp", folder)
    return folder


def command(script, *options):
    """Run it on this process's core -> seconds. Raises CalledProcessError where it fails."""
    begun = time.monotonic()
    line = [sys.executable, script, *map(str, options), "--workers", "0"]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return time.monotonic() - begun


def result(out):
    with open(f"{out}/lineval.json") as f:
        return json.load(f)["top1"]


def neighbour_table(path):
    """{k: kNN top-1} of saved features."""
    saved = np.load(path)
    bank, queries = (l2_normalize(torch.from_numpy(saved[f"{split}_features"])) for split in ("train", "val"))
    labels, truth = (torch.from_numpy(saved[f"{split}_labels"]) for split in ("train", "val"))
    found = {}
    for k in NEIGHBOURS:
        top1, _ = hits(knn(bank, labels, queries, min(k, len(bank))), truth).tolist()
        found[k] = round(100 * top1 / len(truth), 2)
    return found


def evaluated(folder, checkpoint, out):
    """Cached top-1 and kNN by the number of neighbours of a backbone -> {...}"""
    command("lineval.py", folder, "--ckpt", *checkpoint, "--cached", "--features", f"{out}.npz", "--out", out)
    return {"cached": result(out), "knn": neighbour_table(f"{out}.npz")}


def one(folder, n, batch, lr, steps, seed):
    """Train and judge -> a record."""
    epochs = round(steps * batch / (n // batch * batch))
    out = f"runs/own-data/{n}-{batch}-{lr}-{steps}-{seed}"
    options = [folder, *SMALL, "--batch", batch, "--base-lr", lr * 256 / batch]
    options += ["--epochs", epochs, "--seed", seed]
    seconds = command("simsiam.py", *options, "--out", out, "--resume", "auto")
    with open(f"{out}/log.jsonl") as f:
        last = [record for record in map(json.loads, f) if record["event"] == "epoch"][-1]
    return {
        "images": n, "batch": batch, "lr": lr, "steps": epochs * (n // batch), "epochs": epochs, "seed": seed,
        "loss": last["loss"], "rank": last["rank"], "seconds": round(seconds),
        **evaluated(folder, [f"{out}/checkpoint.pth"], f"{out}/lineval"),
        "command": shlex.join(map(str, ["python", "simsiam.py", *options])),
    }


def records():
    if not os.path.exists(LINES):
        return []
    with open(LINES) as f:
        return [json.loads(line) for line in f if line.endswith("}\n")]


def keep(record):
    record["torch"] = torch.__version__
    with open(LINES, "a") as f:
        f.write(json.dumps(record) + "\n")
    print(json.dumps(record), flush=True)


def run(data, deadline):
    """Whatever has no line yet, until the deadline -> how many runs are missing."""
    done = {(r["images"], r["batch"], r["lr"], r["asked"]) for r in records()}
    for n in sorted({n for n, *_ in RUNS}):
        if (n, 0, 0, 0) not in done and time.monotonic() < deadline:
            folder = subset(data, n)
            found = evaluated(folder, ["random:resnet18", "--width", "1/4"], f"runs/own-data/untrained-{n}")
            keep({"images": n, "batch": 0, "lr": 0, "asked": 0, "steps": 0, "epochs": 0, "seed": 0, **found})
    missing = 0
    for n, batch, lr, steps in RUNS:
        if (n, batch, lr, steps) in done:
            continue
        if time.monotonic() > deadline:
            missing += 1
            continue
        keep({**one(subset(data, n), n, batch, lr, steps, 0), "asked": steps})
    return missing


def page():
    """results/own-data.md, from the lines alone."""
    found = records()
    untrained = {r["images"]: r for r in found if r["steps"] == 0}
    trained = [r for r in found if r["steps"]]
    trained.sort(key=lambda r: (r["images"], r["batch"], r["lr"], r["steps"]))
    lines = [
        "# How long to train on data of your own", "",
        "Made by `python results/own_data.py CIFAR` from own-data.jsonl: subsets of CIFAR-10, a ResNet-18 of",
        f"a quarter of the width, one seed, one core a run, others beside it; top-1 on {TEST:,} test images.",
        "",
        "| images | batch | lr | epochs | steps | loss | rank | cached linear | above untrained | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in trained:
        gain = r["cached"] - untrained[r["images"]]["cached"]
        cells = [f"{r['images']:,}", r["batch"], r["lr"], r["epochs"], f"{r['steps']:,}", f"{r['loss']:.3f}",
                 f"{r['rank']:.1f}", f"{r['cached']:.1f}", f"{gain:+.1f}", f"{r['seconds'] / 60:.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "", "kNN by the number of neighbours; untrained, and the longest run on as many images:", "",
        "| images | network | " + " | ".join(f"k {k}" for k in NEIGHBOURS) + " |",
        "|---" * (2 + len(NEIGHBOURS)) + "|",
    ]
    for n, r in sorted(untrained.items()):
        of_these = [t for t in trained if t["images"] == n]
        longest = max(of_these, key=lambda t: t["steps"]) if of_these else None
        for name, row in (("untrained", r), (longest and f"{longest['steps']:,} steps", longest)):
            if row:
                cells = " | ".join(f"{row['knn'][str(k)]:.1f}" for k in NEIGHBOURS)
                lines.append(f"| {n:,} | {name} | {cells} |")
    lines += ["", *advice(trained, untrained)]
    missing = len(RUNS) - len(trained)
    if missing:
        lines += ["", f"Not run yet: {missing} of {len(RUNS)} runs; the same command goes on."]
    return "\n".join(lines) + "\n"


def advice(trained, untrained):
    """What to take from it: lines, by the runs that there are."""
    def gains(batch, lr, asked, images=None):
        chosen = [r for r in trained if (r["batch"], r["lr"], r["asked"]) == (batch, lr, asked)]
        return [r["cached"] - untrained[r["images"]]["cached"] for r in chosen
                if images in (None, r["images"])]

    lines = ["Steps count, however few images there are: 1,000, 2,000 and 5,000 differ little. Beside the",
             "untrained network, at batch 32 and lr 0.1:", ""]
    for asked in sorted({r["asked"] for r in trained}):
        found = gains(32, 0.1, asked)
        lines.append(f"- about {asked:,} steps: {min(found):+.1f} to {max(found):+.1f} points")
    lines += ["", "On 2,000 images, 1,500 steps:", ""]
    for batch, lr in ((32, 0.05), (32, 0.1), (32, 0.2), (16, 0.1), (64, 0.1)):
        for gain in gains(batch, lr, 1500, 2000):
            lines.append(f"- batch {batch}, lr {lr}: {gain:+.1f} points")
    return [
        *lines, "",
        "So train for 4,000 steps at least, and for tens of thousands where you can: the paper's recipe for",
        "CIFAR-10 has 78,000. A small batch gives more steps from the same images than the recipe's 512; the",
        "lr, from 0.1 to 0.2, matters less than the steps. For kNN, a fifth of a class's images is a good",
        "number of neighbours. One seed each: differences of 2 points may be chance.",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", metavar="CIFAR")
    parser.add_argument("--minutes", type=float, default=1e9)
    args = parser.parse_args()
    missing = run(open_data(args.data), time.monotonic() + 60 * args.minutes)
    with open(PAGE, "w") as f:
        f.write(page())
    print(f"{missing} runs are missing" if missing else "all is done", file=sys.stderr)


if __name__ == "__main__":
    main()
