"""Damaged images, tar files and checkpoints: what do their readers do?

    python tests/drills/fuzz.py --count 1000 --seed 0

Start it from the repository's root; it takes some minutes on one core. It flips, cuts off, zeroes, doubles,
inserts or drops bytes anywhere in a file. A damaged image must be refused, or read as an image. A damaged
checkpoint must be refused, or read tensor for tensor as it was. Of a damaged tar file, the whole or single
members may be refused; the rest must read as images, and nothing may be unpacked. Anything else is a failure,
and so are more than ten seconds or a change to the file itself.

Every 50th damaged checkpoint also goes to the whole program, which must continue from the older checkpoint.
"""
import argparse
import collections
import contextlib
import io
import json
import os
import pathlib
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

from harness.common import files
from harness.common.errors import BadImage, Refused
from harness.data import tars
from harness.data.images import read_image
from harness.data.opening import find_data
from harness.data.shapes import draw_shapes
from results.rows import write_json
from tests.helpers import TINY, equal, here, tensors_in, write_folder

WAYS = ["flip", "flip", "cut", "zero", "double", "insert", "drop"]
FORMATS = [  # that Pillow writes and users have
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
    if way == "cut":
        return before
    if way == "flip" and part:
        part = bytes([part[0] ^ 1 << rng.randrange(8)]) + part[1:]
    elif way == "zero":
        part = bytes(len(part))
    elif way == "double":
        part = part + part
    elif way == "insert":
        part = rng.randbytes(length) + part
    elif way == "drop":
        part = b""
    return before + part + after


def fuzz(path, originals, read, is_right, count, rng):
    """Damage, read, and count the outcomes. Failures are named on stderr.

    read: called with the path. is_right: whether what it returned is acceptable
    """
    outcomes = collections.Counter()
    for k in range(count):
        content = damage(rng.choice(originals), rng)
        path.write_bytes(content)
        outcome = outcome_of(read, os.fsencode(path), is_right)
        if path.read_bytes() != content:
            outcome = "written to"
        outcomes[outcome] += 1
        if outcome not in ("read", "refused"):
            print(f"{path.name} {k}: {outcome}", file=sys.stderr)
    return dict(outcomes)


def outcome_of(read, path, is_right):
    signal.alarm(10)
    try:
        return "read" if is_right(read(path)) else "read, and wrong"
    except Refused as error:
        return "refused, in more than one line" if "\n" in str(error) else "refused"
    except Exception as error:  # the alarm's too
        return type(error).__name__
    finally:
        signal.alarm(0)


def too_long(*_):
    raise TimeoutError("ten seconds")


# --- Images ---------------------------------------------------------------------------------------

def images():
    """A drawn picture in each format and depth, as bytes."""
    drawn = draw_shapes(0, 3, 1, 64).image(0)
    picture = Image.fromarray(drawn.numpy()).resize((90, 70))
    grey = np.asarray(picture.convert("L"))
    kinds = [(picture, kind, options) for kind, options in FORMATS]
    for kind, dtype in DEEP:  # more than 8 bits
        kinds.append((Image.fromarray(grey.astype(dtype) * dtype(16)), kind, {}))
    contents = []
    for image, kind, options in kinds:
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        contents.append(stream.getvalue())
    return contents


def is_image(image):
    return image.dtype == torch.uint8 and image.dim() == 3 and image.shape[2] == 3


# --- Tar files ------------------------------------------------------------------------------------

def tar_files(pictures):
    """These pictures in a tar file of each format: in class folders, and as one tar file a class."""
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
    """All images of a tar file that can be read, and what its folder holds afterwards."""
    tars.opened.cache_clear()  # the file of this name was a different one
    data = find_data(path)
    read = []
    for i in range(len(data.train)):
        with contextlib.suppress(BadImage):
            read.append(read_image(data.train.files[i]))
    return read, sorted(os.listdir(os.path.dirname(path)))


def are_images(found):
    """Whether everything that was read is an image, and nothing was unpacked."""
    read, names = found
    return all(map(is_image, read)) and names == [b"photos.tar"]


# --- Checkpoints ----------------------------------------------------------------------------------

def fuzz_checkpoints(folder, count, rng):
    """-> the outcomes of the reader, and of the whole program: a tiny run on a few drawn shapes"""
    write_folder(folder / "data", "train", 48, 16)
    options = shlex.split("--knn-every 0 --workers 0 --epochs 2")
    run = [folder / "data", *TINY, *options, "--out", folder / "run"]
    if here("simsiam.py", *run) is not None:
        sys.exit("fuzz.py: the run to be damaged failed")
    newer = folder / "run/checkpoint.pth"
    older = folder / "run/checkpoint-previous.pth"
    kept = newer.read_bytes(), older.read_bytes()
    content = files.read(newer)

    def is_as_it_was(found):
        same_text = str(found) == str(content)  # of all that is no tensor
        return same_text and equal(tensors_in(found), tensors_in(content))

    read = fuzz(newer, [kept[0]], files.read, is_as_it_was, count, rng)
    program = collections.Counter()
    for _ in range(count // 50):
        newer.write_bytes(damage(kept[0], rng))
        older.write_bytes(kept[1])
        went_on = here("simsiam.py", *run, "--resume") is None
        went_on = went_on and equal(files.read(newer)["model"], content["model"])
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
        folder = pathlib.Path(folder)
        (folder / "tars").mkdir()
        result["images"] = fuzz(folder / "image", images(), read_image, is_image, args.count, rng)
        result["tar files"] = fuzz(folder / "tars/photos.tar", tar_files(images()[:6]), read_tar, are_images,
                                   args.count // 2, rng)
        result["checkpoints"], result["whole program"] = fuzz_checkpoints(folder, args.count, rng)
    write_json("results/drills/fuzz.json", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
