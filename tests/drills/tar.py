"""Tar files in the place of folders: how long a start takes with ImageNet's 1.3 million, how fast and in how
much memory images are read.

    python tests/drills/tar.py --files 1300000

Start it from the repository's root, on Linux; TMPDIR needs 7 GB. The large file is a tar of 1000 tars, as
ILSVRC2012_img_train.tar is. Its members have ImageNet's mean size, but behind their first bytes there is
nothing on the disk, only a hole. The first start finds none of its headers in the cache, the second finds
all. Speed is that of one worker on JPEGs as large as photographs, in a folder and in a tar of the same, in
turn; memory is what that worker has for itself with the names and places of all 1.3 million.
"""
import argparse
import io
import json
import os
import shlex
import statistics
import sys
import tarfile
import tempfile
import time

sys.path.insert(0, os.getcwd())
import numpy as np
import torch
from PIL import Image

import augment
from harness.data.loading import index_batches
from harness.data.opening import open_data
from results.rows import write_json
from tests.drills.start_up import children, memory

CLASSES = 1000
SIZE = 110_000  # bytes of a member
BLOCK = tarfile.BLOCKSIZE
PHOTOS = 600
BATCH = 50
ROUNDS = 7


def add(archive, name, content):
    """A member more."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def photograph(rng):
    """A JPEG of 500 x 375 pixels, as bytes."""
    noise = rng.integers(0, 256, (47, 63, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize((500, 375)).save(stream, "jpeg", quality=90)
    return stream.getvalue()


def make_large(path, files):
    """A tar of CLASSES tars, of so many files in all: pictures of two sizes, because those of one size would
    be held in memory."""
    contents = []
    for side in (8, 9):
        stream = io.BytesIO()
        Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(stream, "jpeg")
        contents.append(stream.getvalue())
    in_class = files // CLASSES
    step = BLOCK + -(-SIZE // BLOCK) * BLOCK  # from one header to the next
    with open(path, "wb") as f:
        for c in range(CLASSES):
            f.write(header(f"n{c:08}.tar", in_class * step + 2 * BLOCK))
            for i in range(in_class):
                start = f.tell()
                f.write(header(f"n{c:08}_{i}.JPEG", SIZE))
                f.write(contents[(c + i) % 2])
                f.seek(start + step)
            f.seek(2 * BLOCK, os.SEEK_CUR)  # the end mark of a tar: zeros
        f.truncate(f.tell() + 2 * BLOCK)


def header(name, size):
    """A member's header."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def forget(path):
    """Take a file out of the system's cache."""
    os.sync()
    with open(path, "rb") as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_photos(folder):
    """The same photographs in folder/files/train/<class>/ and in folder/tars/train.tar."""
    rng = np.random.default_rng(0)
    os.makedirs(f"{folder}/tars")
    with tarfile.open(f"{folder}/tars/train.tar", "w") as archive:
        for i in range(PHOTOS):
            name = f"{'ab'[i % 2]}/{i:04}.jpg"
            content = photograph(rng)
            os.makedirs(os.path.dirname(f"{folder}/files/train/{name}"), exist_ok=True)
            with open(f"{folder}/files/train/{name}", "wb") as f:
                f.write(content)
            add(archive, name, content)


def rate(data):
    """Images a second of one worker, in an epoch of 224-pixel views cut from a data set."""
    train = open_data(data).train
    batches = index_batches(0, len(train), BATCH, 1)
    views = augment.load_views(train, augment.Policy(), 0, batches, torch.device("cpu"), 1)
    next(views)  # the worker has started
    began = time.perf_counter()
    steps = sum(1 for _ in views)
    return steps * BATCH / (time.perf_counter() - began)


def start_and_read(folder, files, result):
    """The start with the large tar, twice, and the memory of a worker that reads from it."""
    path = f"{folder}/ILSVRC2012_img_train.tar"
    make_large(path, files)
    forget(path)
    for name in ("first start, s", "second start, s"):
        began = time.perf_counter()
        train = open_data(path).train
        result[name] = round(time.perf_counter() - began, 1)
    result["images"] = len(train)
    began = time.perf_counter()
    train.fingerprint()
    result["fingerprint, s"] = round(time.perf_counter() - began, 1)
    policy = augment.Policy(size=32)
    batches = index_batches(0, len(train), BATCH, 1)
    views = augment.load_views(train, policy, 0, batches, torch.device("cpu"), 1)
    for _ in range(200):
        next(views)
    result["memory after 200 steps, MiB: main, worker; and shared"] = [
        memory(pid) for pid in ("self", *children())]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=1_300_000)
    args = parser.parse_args()
    result = {"command": shlex.join(["python", *sys.argv]), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        make_photos(folder)
        rates = {"folder": [], "tar": []}
        for _ in range(ROUNDS):
            rates["folder"].append(rate(f"{folder}/files"))
            rates["tar"].append(rate(f"{folder}/tars"))
        for name, values in rates.items():
            result[f"images/s, {name}"] = round(statistics.median(values), 1)
        ratios = [tar / plain for tar, plain in zip(rates["tar"], rates["folder"])]
        result["ratio, tar to folder"] = round(statistics.median(ratios), 3)
        start_and_read(folder, args.files, result)
    write_json("results/drills/tar.json", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
