"""A data set with the number of files that ImageNet has: how long it takes to start, and what the memory does.

    python results/start_up.py --files 1300000          from the repository's root, on Linux; needs a folder with as many free inodes: TMPDIR

The files are links to one photograph-sized JPEG, in 1000 folders. Listing, fingerprint and order are timed once each, after the links were made,
and so with a warm cache: a network's disk takes longer. Memory is each process's share (Pss), which adds up; batches on their way from a worker
lie in memory that both share, and come and go, so that they are counted apart. Views are small here, 32 pixels a side, to see many batches.
"""
import argparse
import json
import os
import shlex
import sys
import tempfile
import time

sys.path.insert(0, os.getcwd())
import augment
import numpy as np
import torch
from PIL import Image


def memory(pid):
    """MiB that this process has, with its share of what it has in common with others, without and of shared memory."""
    with open(f"/proc/{pid}/smaps_rollup") as f:
        values = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in f if line.startswith("Pss")}
    return round(values["Pss"] - values["Pss_Shmem"]), round(values["Pss_Shmem"])


def children():
    with open(f"/proc/self/task/{os.getpid()}/children") as f:
        return f.read().split()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=1_300_000)
    parser.add_argument("--steps", type=int, default=1000, help="of 64 images (default: %(default)s)")
    args = parser.parse_args()
    result = {"command": shlex.join(["python", *sys.argv]), "files": args.files, "torch": torch.__version__}

    def timed(name, function, *values):
        began = time.perf_counter()
        out = function(*values)
        result[f"{name}, s"] = round(time.perf_counter() - began, 2)
        return out

    with tempfile.TemporaryDirectory() as folder:
        photo = os.path.join(folder, "photo.jpg")
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (47, 63, 3), np.uint8)).resize((500, 375)).save(photo)
        for c in range(1000):
            os.makedirs(place := os.path.join(folder, "data", "train", f"n{c:08}"))
            for i in range(args.files // 1000):
                os.symlink(photo, os.path.join(place, f"n{c:08}_{i:06}.JPEG"))
        result["memory before, MiB"] = memory("self")[0]
        train, _ = timed("listing", augment.open_data, os.path.join(folder, "data"))
        result["memory with the names, MiB"] = memory("self")[0]
        timed("fingerprint", train.fingerprint)
        timed("order of an epoch", augment.permutation, 0, 0, len(train))
        batches = augment.steps(0, len(train), 64, 1)
        views = augment.load_views(train, augment.Policy(size=32), 0, batches, torch.device("cpu"), 2)
        timed("first batch, 2 workers", next, views)
        for step in range(1, args.steps + 1):
            next(views)
            if step in (20, args.steps // 10, args.steps // 2, args.steps):
                result[f"memory after {step} steps, MiB: main, workers; and shared"] = [memory(pid) for pid in ("self", *children())]
    with open("results/start-up.json", "w") as f:
        f.write(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
