"""Reading one image file, good or bad.

What Pillow opens becomes RGB: the first frame, without transparency; of 16 bits the higher 8; EXIF turns
nothing. What Pillow can't open or decode whole is bad. A bad file never ends a run by itself: the next good
one takes its place, under the bad one's label (read_or_replace), and the Source that the file belongs to
counts it (harness/source.py).
"""
import multiprocessing
import os
import sys
import warnings

import numpy as np
import torch
from PIL import Image

from .errors import BadImage, printable

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff")
IN_A_ROW = 20  # so many bad files one after the other end a run

# Pillow warns of odd files that it reads all the same, from every worker in every epoch.
warnings.filterwarnings("ignore", module=r"PIL\.")
# torch warns that a decoded image can't be written to. Nobody writes to it.
warnings.filterwarnings("ignore", "The given buffer is not writable")


def is_image(path):
    """Whether a file's name (bytes or text) ends as an image's does."""
    return os.fsdecode(path).lower().endswith(SUFFIXES)


def read_rgb(path):
    """A file -> a PIL image in RGB, decoded. Raises BadImage."""
    path = os.fsdecode(path)
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits or more; Pillow's own way to 8 would cut all above 255
                high = np.asarray(image) >> 8
                image = Image.fromarray(high.clip(0, 255).astype(np.uint8))
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # a damaged file can raise anything
        problem = f"{type(error).__name__}: {error}"
    raise BadImage(f"{path}: can't be read as an image ({problem}); mend it or take it away")


def read_image(path):
    """A file -> a tensor (H, W, 3) uint8, which must not be written to. Raises BadImage."""
    image = read_rgb(path)
    pixels = torch.frombuffer(image.tobytes(), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3)


def read_or_replace(files, i):
    """File i of `files` or, where it is bad, the next good one.

    Returns the image (H, W, 3) uint8, and {index: what is wrong} for the bad files that were met. Raises
    BadImage where 20 files in a row are bad.
    """
    bad = {}
    for k in range(IN_A_ROW):
        place = (i + k) % len(files)
        try:
            return read_image(files[place]), bad
        except BadImage as error:
            bad[place] = str(error)
    raise BadImage(f"{len(bad)} files in a row can't be read as images, the first: {bad[i]}")


# --- python augment.py DATA --check ---------------------------------------------------------------------

def what_is_wrong(path):
    """One line about a bad file, or None for a good one."""
    try:
        read_image(path)
    except BadImage as error:
        return printable(error)
    return None


def check_files(files):
    """Read all files, on all cores, and print a line for each bad one. Returns how many are bad.

    A counter runs on the terminal, on stderr, so that stdout holds nothing but the list.
    """
    bad = 0
    counting = sys.stderr.isatty()
    with multiprocessing.Pool() as pool:
        for n, problem in enumerate(pool.imap(what_is_wrong, files, chunksize=16), 1):
            if problem:
                bad += 1
                if counting:
                    print("\r\033[K", end="", file=sys.stderr, flush=True)  # clears the counter's line
                print(problem, flush=True)
            if counting and (n % 100 == 0 or n == len(files)):
                print(f"\r{n} of {len(files)}, {bad} bad", end="", file=sys.stderr, flush=True)
    if counting:
        print(file=sys.stderr)
    return bad
