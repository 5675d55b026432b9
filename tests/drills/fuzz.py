"""Damaged files: what do the readers of images, checkpoints and tar files make of them?

    python tests/drills/fuzz.py --count 1000 --seed 0

Start it from the repository's root; it takes some minutes on one CPU core. It flips, cuts off, zeroes,
doubles, inserts or drops bytes anywhere in a file. The reader must refuse a damaged image or read it as an
image. It must refuse a damaged checkpoint, or read it tensor for tensor as it was. Of a damaged tar file it
must refuse the whole, or read as an image, or refuse, each member that it finds; nothing may be unpacked.
Anything else is a failure, and so are more than ten seconds, or a change to the file itself.

Every 50th checkpoint goes to the whole program too, which must continue from the older of the two.
"""
import argparse
import collections
import contextlib
import io
import json
import os
import random
import shlex
import signal
import sys
import tarfile
import tempfile

sys.path.insert(0, os.getcwd())
import numpy as np
import torch
from PIL import Image

import simsiam
from harness.common import files
from harness.common.errors import BadImage, Refused
from harness.data import tars
from harness.data.images import read_image
from harness.data.opening import find_data
from harness.data.shapes import draw_shapes
from harness.training.ends import launch
from results.rows import write_json

OPTIONS = shlex.split("--arch resnet18 --cifar-stem --width 1/16 --dim 16 --pred-dim 4 --proj-hidden 16 "
                      "--batch 16 --size 16 --base-lr 0.5 --knn-every 0 --workers 0 --epochs 2")
WAYS = ["flip", "flip", "cut", "zero", "double", "insert", "drop"]
FORMATS = [  # those that Pillow writes and users have
    ("JPEG", {}),
    ("JPEG", {"progressive": True, "quality": 95}),
    ("PNG", {}),
    ("PNG", {"optimize": True}),
    ("BMP", {}),
    ("PPM", {}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "jpeg"}),
    ("GIF", {}),
    ("AVIF", {}),
    ("JPEG2000", {}),
    ("TGA", {}),
    ("PCX", {}),
    ("SGI", {}),
]
DEEP = [("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", np.int32), ("TIFF", np.float32)]


# --- Damage ---------------------------------------------------------------------------------------

def damage(content, rng):
    """One to four changes at places all over the file."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content) + 1)
        length = 2 ** rng.randrange(10)
        content = change(content, at, length, rng.choice(WAYS), rng)
    return content


def change(content, at, length, way, rng):
    before = content[:at]
    part = content[at:at + length]
    after = content[at + length:]
    if way == "flip":
        if at == len(content):
            return content
        flipped = content[at] ^ 1 << rng.randrange(8)
        return before + bytes([flipped]) + content[at + 1:]
    if way == "cut":
        return before
    if way == "zero":
        return before + bytes(len(part)) + after
    if way == "double":
        return before + part + part + after
    if way == "insert":
        return before + rng.randbytes(length) + part + after
    return before + after


def fuzz(name, path, originals, read, is_right, count, rng):
    """Damage, read, and count the outcomes. A failure is named on stderr.

    read: what takes the path. is_right: whether what was read is as it should be.
    """
    outcomes = collections.Counter()
    for k in range(count):
        content = damage(rng.choice(originals), rng)
        with open(path, "wb") as f:
            f.write(content)
        outcome = outcome_of(read, path, is_right)
        with open(path, "rb") as f:
            if f.read() != content:
                outcome = "written to"
        outcomes[outcome] += 1
        if outcome not in ("read", "refused"):
            print(f"{name} {k}: {outcome}", file=sys.stderr)
    return dict(outcomes)


def outcome_of(read, path, is_right):
    signal.alarm(10)
    try:
        return "read" if is_right(read(path)) else "read, and wrong"
    except Refused as error:
        return "refused, in more than one line" if "\n" in str(error) else "refused"
    except Exception as error:  # that of the alarm too
        return type(error).__name__
    finally:
        signal.alarm(0)


def too_long(*_):
    raise TimeoutError("ten seconds")


# --- Images ---------------------------------------------------------------------------------------

def images():
    """A drawn picture in each of the formats and depths, as bytes."""
    drawn = draw_shapes(0, 3, 1, 64).image(0)
    picture = Image.fromarray(drawn.numpy()).resize((90, 70))
    out = []
    for kind, options in FORMATS:
        stream = io.BytesIO()
        picture.save(stream, kind, **options)
        out.append(stream.getvalue())
    grey = np.asarray(picture.convert("L"))
    for kind, dtype in DEEP:  # more than 8 bits
        stream = io.BytesIO()
        Image.fromarray(grey.astype(dtype) * dtype(16)).save(stream, kind)
        out.append(stream.getvalue())
    return out


def is_image(image):
    return image.dtype == torch.uint8 and image.dim() == 3 and image.shape[2] == 3


# --- Tar files ------------------------------------------------------------------------------------

def tar_files(pictures):
    """These pictures in tar files of each format, in class folders; and in one of one tar file a class."""
    out = []
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        classes = {}
        for kind in ("a", "b"):
            long = kind * 120 if form != tarfile.USTAR_FORMAT else kind  # which needs an extended header
            named = {f"{k:03}-{long}.png": picture for k, picture in enumerate(pictures)}
            classes[kind] = tar_of(named, form)
            out.append(tar_of({f"{kind}/{k:03}.png": picture for k, picture in enumerate(pictures)}, form))
        out.append(tar_of({f"{kind}.tar": content for kind, content in classes.items()}, form))
    return out


def tar_of(members, form):
    """{name: content} -> the bytes of a tar file"""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def read_tar(path):
    """All images of a tar file that can be read, and what else its folder holds then."""
    tars.opened.cache_clear()  # the file of this name was another one
    data = find_data(path)
    read = []
    for i in range(len(data.train)):
        with contextlib.suppress(BadImage):
            read.append(read_image(data.train.files[i]))
    return read, sorted(os.listdir(os.path.dirname(path)))


def are_images(found):
    """Whether all is an image that was read, and nothing was unpacked."""
    read, names = found
    return all(map(is_image, read)) and names == [b"photos.tar"]


# --- Checkpoints ----------------------------------------------------------------------------------

class SmallRun:
    """A run on a few drawn shapes, that ends in seconds, and its two checkpoints."""

    def __init__(self, folder):
        self.data = os.path.join(folder, "data")
        self.out = os.path.join(folder, "run")
        self.newer = os.path.join(self.out, "checkpoint.pth")
        self.older = os.path.join(self.out, "checkpoint-previous.pth")
        os.mkdir(self.data)
        for i in range(48):
            image = draw_shapes(0, i, 1, 16).image(0)
            Image.fromarray(image.numpy()).save(f"{self.data}/{i}.png")

    def program(self, *more):
        """Run it to its end -> None, or its message."""
        args = simsiam.parse([self.data, *OPTIONS, "--out", self.out, *more])
        try:
            return launch("simsiam.py", simsiam.pretrain, args)
        finally:
            if torch.distributed.is_initialized():  # still, where it has failed
                torch.distributed.destroy_process_group()


def equal(a, b):
    """Whether two contents of checkpoints are the same, tensor for tensor."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return False
        return all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def fuzz_checkpoints(folder, count, rng):
    """-> the outcomes of the reader, and of the whole program."""
    run = SmallRun(folder)
    if run.program() is not None:
        sys.exit("fuzz.py: the run to be damaged failed")
    content = files.read(run.newer)
    with open(run.newer, "rb") as f:
        newer = f.read()
    with open(run.older, "rb") as f:
        older = f.read()

    def is_as_it_was(found):
        return equal(found, content)

    read = fuzz("checkpoint", run.newer, [newer], files.read, is_as_it_was, count, rng)
    program = collections.Counter()
    for _ in range(count // 50):
        with open(run.newer, "wb") as f:
            f.write(damage(newer, rng))
        with open(run.older, "wb") as f:
            f.write(older)
        went_on = run.program("--resume") is None
        went_on = went_on and equal(files.read(run.newer)["model"], content["model"])
        program["went on" if went_on else "did not"] += 1
    return read, dict(program)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    signal.signal(signal.SIGALRM, too_long)
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": args.seed,
        "torch": torch.__version__,
        "pillow": Image.__version__,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = os.fsencode(os.path.join(folder, "image"))
        result["images"] = fuzz("image", path, images(), read_image, is_image, args.count, rng)
        tar_folder = os.path.join(folder, "tars")
        os.mkdir(tar_folder)
        path = os.fsencode(os.path.join(tar_folder, "photos.tar"))
        result["tar files"] = fuzz("tar file", path, tar_files(images()[:6]), read_tar, are_images,
                                   args.count // 2, rng)
        result["checkpoints"], result["whole program"] = fuzz_checkpoints(folder, args.count, rng)
    write_json("results/drills/fuzz.json", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
