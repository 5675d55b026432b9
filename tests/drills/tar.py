"""Tar files instead of folders: how long a start takes with 1.3 million images, and how fast they are read.

    python tests/drills/tar.py --files 1300000

Start it from the repository's root, on Linux; TMPDIR needs 7 GB. The large file is a tar of 1000 tars, like
ILSVRC2012_img_train.tar. Its members have ImageNet's mean size, but after their first bytes there is only a
hole on the disk. The first start finds none of the headers in the cache, the second finds all. Speed is that
of one worker on JPEGs as large as photographs, in a folder and in a tar of the same files, in turn. Memory is
that worker's own, with the names and places of all 1.3 million.
"""
import argparse
import io
import json
import os
import pathlib
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
from harness.data.opening import open_data
from results.rows import write_json
from tests.drills.start_up import memory_of_steps, photograph, timed, views_of

CLASSES = 1000
SIZE = 110_000  # bytes of a member
BLOCK = tarfile.BLOCKSIZE
PHOTOS = 600
BATCH = 50
ROUNDS = 7


def make_large(path, files):
    """A tar of CLASSES tars, with so many files in all.

    Pictures of two sizes, because those of one size would be held in memory.
    """
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
    for i in range(PHOTOS):
        path = folder / f"files/train/{'ab'[i % 2]}/{i:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photograph(rng))
    (folder / "tars").mkdir()
    with tarfile.open(folder / "tars/train.tar", "w") as archive:
        archive.add(folder / "files/train", "")


def rate(data):
    """Images a second of one worker, in an epoch of 224-pixel views."""
    views = views_of(open_data(data).train, augment.Policy(), 1, BATCH)
    next(views)  # the worker has started
    began = time.perf_counter()
    steps = sum(1 for _ in views)
    return steps * BATCH / (time.perf_counter() - began)


def start_and_read(folder, files, result):
    """Start twice with the large tar, and measure the memory of a worker that reads from it."""
    path = folder / "ILSVRC2012_img_train.tar"
    make_large(path, files)
    forget(path)
    for name in ("first start, s", "second start, s"):
        train, *_ = timed(result, name, open_data, path)
    result["images"] = len(train)
    timed(result, "fingerprint, s", train.fingerprint)
    views = views_of(train, augment.Policy(size=32), 1, BATCH)
    memory_of_steps(views, [min(200, files // BATCH)], result)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=1_300_000)
    args = parser.parse_args()
    result = {"command": shlex.join(["python", *sys.argv]), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        make_photos(folder)
        rounds = [(rate(folder / "files"), rate(folder / "tars")) for _ in range(ROUNDS)]
        for name, values in zip(("folder", "tar"), zip(*rounds)):
            result[f"images/s, {name}"] = round(statistics.median(values), 1)
        ratios = [tar / plain for plain, tar in rounds]
        result["ratio, tar to folder"] = round(statistics.median(ratios), 3)
        start_and_read(folder, args.files, result)
    write_json("results/drills/tar.json", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
