"""A data set with as many files as ImageNet: how long a run takes to start, and how much memory it needs.

    python tests/drills/start_up.py --files 1300000

Start it from the repository's root, on Linux. TMPDIR needs as many free inodes. The files are links to one
JPEG as large as a photograph, in 1000 folders.

Listing, fingerprint and order are each timed once, just after the links were made: the cache is warm, and a
network disk takes longer. Memory is each process's share (Pss), so the figures add up. Batches on their way
from a worker are in memory that both share; they come and go, so that memory is counted by itself. Views have
only 32 pixels a side here, so many batches are seen.
"""
import argparse
import io
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


def photograph(rng):
    """A JPEG of 500 x 375 pixels, as bytes."""
    noise = Image.fromarray(rng.integers(0, 256, (47, 63, 3), np.uint8))
    stream = io.BytesIO()
    noise.resize((500, 375)).save(stream, "jpeg", quality=90)
    return stream.getvalue()


def make_links(folder, files):
    """train/<class>/<number>.JPEG, all of them links to one JPEG."""
    photo = os.path.join(folder, "photo.jpg")
    with open(photo, "wb") as f:
        f.write(photograph(np.random.default_rng(0)))
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


def timed(result, name, function, *values):
    """Call a function; its seconds go into `result`."""
    began = time.perf_counter()
    out = function(*values)
    result[name] = round(time.perf_counter() - began, 2)
    return out


def views_of(train, policy, workers, batch=BATCH):
    """An epoch of views."""
    batches = index_batches(0, len(train), batch, 1)
    return augment.load_views(train, policy, 0, batches, torch.device("cpu"), workers)


def memory_of_steps(views, at, result):
    """Take views, and note the memory of all processes after each of these steps that there are."""
    for step, _ in enumerate(views, 1):
        if step in at:
            with open(f"/proc/self/task/{os.getpid()}/children") as f:
                workers = f.read().split()
            found = [memory(pid) for pid in ("self", *workers)]
            result[f"memory after {step} steps, MiB: main, workers; and shared"] = found
        if step == max(at):
            break


def measure(data, steps, result):
    """Write the figures into `result`: those of a run's start, then its memory after some of its steps."""
    result["memory before, MiB"], _ = memory("self")
    train, *_ = timed(result, "listing, s", open_data, data)
    result["memory with the names, MiB"], _ = memory("self")
    timed(result, "fingerprint, s", train.fingerprint)
    timed(result, "order of an epoch, s", permutation, 0, 0, len(train))
    views = views_of(train, augment.Policy(size=32), WORKERS)
    timed(result, f"first batch, {WORKERS} workers, s", next, views)
    memory_of_steps(views, (20, steps // 10, steps // 2, steps), result)


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
