"""Damaged files: images and checkpoints with bytes flipped, cut off, zeroed, doubled or inserted anywhere, and what their readers make of them.

    python results/fuzz.py --count 1000 --seed 0         from the repository's root; some minutes on one CPU core

An image must come out as an image or be refused as a bad one; a checkpoint must be refused, or be, tensor for tensor, what it was. Anything
else, or more than ten seconds, is a failure. The file itself must be as it was. Every 50th checkpoint is given to the whole program too, which
must take the older of the two and go on.
"""
import argparse
import collections
import io
import json
import os
import random
import shlex
import signal
import sys
import tempfile

sys.path.insert(0, os.getcwd())
import augment
import simsiam
import torch
from PIL import Image

OPTIONS = shlex.split("--arch resnet18 --cifar-stem --width 1/16 --dim 16 --pred-dim 4 --proj-hidden 16 --batch 16 --size 16 --base-lr 0.5 --knn-every 0 "
                      "--workers 0 --epochs 2")


def mutate(content, rng):
    """One to four changes at places all over the file."""
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(content) + 1), 2 ** rng.randrange(10)
        content = {"flip": lambda: content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1:] if at < len(content) else content,
                   "cut": lambda: content[:at], "zero": lambda: content[:at] + bytes(min(length, len(content) - at)) + content[at + length:],
                   "double": lambda: content[:at] + content[at:at + length] + content[at:], "insert": lambda: content[:at] + rng.randbytes(length) + content[at:],
                   "drop": lambda: content[:at] + content[at + length:]}[rng.choice(["flip", "flip", "cut", "zero", "double", "insert", "drop"])]()
    return content


def fuzz(name, path, originals, read, right, count, rng):
    """Damage, read, count what happens: refused, as it was (`right`), or a failure, which is kept and named."""
    outcomes = collections.Counter()
    for k in range(count):
        content = mutate(rng.choice(originals), rng)
        with open(path, "wb") as f:
            f.write(content)
        signal.alarm(10)
        try:
            outcome = "read" if right(read(path)) else "read, and wrong"
        except augment.Refused as error:
            outcome = "refused" if "\n" not in str(error) else "refused, in more than one line"
        except Exception as error:  # the SIGALRM handler's too
            outcome = f"{type(error).__name__}"
        signal.alarm(0)
        with open(path, "rb") as f:
            outcome = outcome if f.read() == content else "written to"
        outcomes[outcome] += 1
        if outcome not in ("read", "refused"):
            print(f"{name} {k}: {outcome}", file=sys.stderr)
    return dict(outcomes)


def images():
    """A drawn picture in each of the formats that Pillow writes and users have."""
    picture = Image.fromarray(augment.draw_shapes(0, 3, 1, 64).image(0).numpy()).resize((90, 70))
    kinds = [("JPEG", {}), ("JPEG", {"progressive": True, "quality": 95}), ("PNG", {}), ("PNG", {"optimize": True}), ("BMP", {}), ("PPM", {}), ("WEBP", {}),
             ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "jpeg"})]
    out = []
    for kind, options in kinds:
        picture.save(stream := io.BytesIO(), kind, **options)
        out.append(stream.getvalue())
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)

    def too_long(*_):
        raise TimeoutError("ten seconds")

    signal.signal(signal.SIGALRM, too_long)
    result = {"command": shlex.join(["python", *sys.argv]), "seed": args.seed, "torch": torch.__version__, "pillow": Image.__version__}
    with tempfile.TemporaryDirectory() as folder:
        result["images"] = fuzz("image", os.fsencode(os.path.join(folder, "image")), images(), augment.read_image,
                                lambda image: image.dtype == torch.uint8 and image.dim() == 3 and image.shape[2] == 3, args.count, rng)

        data, out = os.path.join(folder, "data"), os.path.join(folder, "run")
        os.mkdir(data)
        for i in range(48):
            Image.fromarray(augment.draw_shapes(0, i, 1, 16).image(0).numpy()).save(os.path.join(data, f"{i}.png"))

        def program(*more):
            try:
                return simsiam.launch("simsiam.py", simsiam.pretrain, simsiam.parse([data, *OPTIONS, "--out", out, *more]))
            finally:
                if torch.distributed.is_initialized():
                    torch.distributed.destroy_process_group()

        if program() is not None:
            sys.exit("fuzz.py: the run to be damaged failed")
        path = os.path.join(out, "checkpoint.pth")
        with open(path, "rb") as f:
            whole = f.read()
        content = simsiam.read(path)

        def equal(a, b):
            return torch.equal(a, b) if isinstance(a, torch.Tensor) else type(a) is type(b) and (
                a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a) if isinstance(a, dict) else
                len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, (list, tuple)) else a == b)

        result["checkpoints"] = fuzz("checkpoint", path, [whole], simsiam.read, lambda read: equal(read, content), args.count, rng)
        with open(os.path.join(out, "checkpoint-previous.pth"), "rb") as f:
            previous = f.read()
        result["whole program"] = collections.Counter()
        for _ in range(args.count // 50):
            for name, damaged in (("checkpoint.pth", mutate(whole, rng)), ("checkpoint-previous.pth", previous)):
                with open(os.path.join(out, name), "wb") as f:
                    f.write(damaged)
            result["whole program"]["went on" if program("--resume") is None and equal(simsiam.read(path)["model"], content["model"]) else "did not"] += 1
    with open("results/fuzz.json", "w") as f:
        f.write(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
