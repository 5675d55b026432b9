"""A data set with as many files as ImageNet: how long a run takes to start, and the memory that it needs.

    python tests/drills/start_up.py --files 1300000

Start it from the repository's root, on Linux. It needs a folder with as many free inodes: TMPDIR. The files
are links to one JPEG as large as a photograph, in 1000 folders.

We time listing, fingerprint and order once each, just after the links were made: the cache is warm, and a
network's disk takes longer. Memory is each process's share (Pss), so that the figures add up. Batches on
their way from a worker lie in memory that both share. They come and go, so we count that memory by itself.
Views have only 32 pixels a side here, to see many batches.
"""
import argparse
import json
import os
import shlex
import sys
import tempfile
import time

sys.path.insert(0, os.getcwd())
import numpy as np
import torch
from PIL import Image

import augment
from harness.common.draws import permutation
from harness.data.loading import index_batches
from harness.data.opening import open_data
from results.rows import write_json

FOLDERS = 1000
BATCH = 64
WORKERS = 2


def make_links(folder, files):
    """train/<class>/<number>.JPEG, all of them links to one JPEG."""
    photo = os.path.join(folder, "photo.jpg")
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (47, 63, 3), np.uint8)
    Image.fromarray(noise).resize((500, 375)).save(photo)
    for c in range(FOLDERS):
        name = f"n{c:08}"
        place = os.path.join(folder, "data", "train", name)
        os.makedirs(place)
        for i in range(files // FOLDERS):
            os.symlink(photo, os.path.join(place, f"{name}_{i:06}.JPEG"))
    return os.path.join(folder, "data")


def memory(pid):
    """A process's share, in MiB: without shared memory, and of shared memory."""
    values = {}
    with open(f"/proc/{pid}/smaps_rollup") as f:
        for line in f:
            if line.startswith("Pss"):
                name, kib, *_ = line.split()
                values[name] = int(kib) / 1024
    shared = values["Pss_Shmem:"]
    return round(values["Pss:"] - shared), round(shared)


def children():
    with open(f"/proc/self/task/{os.getpid()}/children") as f:
        return f.read().split()


def measure(data, steps, result):
    """Write the figures into `result`: those of a run's start, then its memory after some of its steps."""
    def timed(name, function, *values):
        began = time.perf_counter()
        out = function(*values)
        result[f"{name}, s"] = round(time.perf_counter() - began, 2)
        return out

    result["memory before, MiB"], _ = memory("self")
    train, *_ = timed("listing", open_data, data)
    result["memory with the names, MiB"], _ = memory("self")
    timed("fingerprint", train.fingerprint)
    timed("order of an epoch", permutation, 0, 0, len(train))
    policy = augment.Policy(size=32)
    batches = index_batches(0, len(train), BATCH, 1)
    views = augment.load_views(train, policy, 0, batches, torch.device("cpu"), WORKERS)
    timed(f"first batch, {WORKERS} workers", next, views)
    for step in range(1, steps + 1):
        next(views)
        if step in (20, steps // 10, steps // 2, steps):
            found = [memory(pid) for pid in ("self", *children())]
            result[f"memory after {step} steps, MiB: main, workers; and shared"] = found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=1_300_000)
    parser.add_argument("--steps", type=int, default=1000, help=f"of {BATCH} images (default: %(default)s)")
    args = parser.parse_args()
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "files": args.files,
        "torch": torch.__version__,
    }
    with tempfile.TemporaryDirectory() as folder:
        measure(make_links(folder, args.files), args.steps, result)
    write_json("results/drills/start_up.json", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
