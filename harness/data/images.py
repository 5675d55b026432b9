"""Reading one image file, good or bad.

What Pillow opens becomes RGB: the first frame, without transparency; EXIF turns nothing. Values of more than
8 bits are brought to 0 to 255 by the range of the data set (values.py). What Pillow can't open or
decode whole is bad. A bad file never ends a run by itself: the next good one takes its place
(read_or_replace), and the Source that the file belongs to counts it (source.py).
"""
import concurrent.futures
import io
import logging
import os
import sys
import warnings
from functools import partial

import numpy as np
import torch
from PIL import Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from ..common.errors import BadImage, Refused, printable
from .tars import Member
from .values import BITS, HEADERS, SAMPLE, deep_values, is_deep, range_of, to_levels, whole_range

# Pillow knows more formats. Of those left out, some are no pictures, some need another program, which a file
# from anywhere must not start.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "WEBP", "AVIF", "TIFF", "PPM", "JPEG2000", "TGA", "PCX", "SGI",
           "SUN", "PSD", "QOI", "DDS", "FITS")
Image.init()
FORMATS = tuple(name for name in FORMATS if name in Image.OPEN)  # AVIF may be missing in a Pillow
SUFFIXES = tuple(sorted(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS))
IN_A_ROW = 20  # so many bad files one after the other end a run

# Pillow warns of odd files that it reads all the same, from every worker in every epoch.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())
# torch warns that a decoded image can't be written to. Nobody writes to it.
warnings.filterwarnings("ignore", "The given buffer is not writable")
# Some cameras and microscopes write megabytes of text into a PNG. Pillow's limit for it is one megabyte.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 26


def is_image(path):
    """Whether a file's name (bytes or text) ends as an image's does."""
    return os.fsdecode(path).lower().endswith(SUFFIXES)


def open_image(path):
    """A file -> a PIL image, its header read, its pixels not yet. Raises whatever Pillow raises."""
    source = open_bytes(path) if isinstance(path, Member) else os.fsdecode(path)
    return Image.open(source, formats=FORMATS)


def open_bytes(path):
    """A file, or a member of a tar file -> an open file; of a member, one in memory."""
    return io.BytesIO(path.content()) if isinstance(path, Member) else open(path, "rb")


def read_rgb(path, value_range=None):
    """A file -> a PIL image in RGB, decoded. Raises BadImage.

    value_range: (low, high), for files of more than 8 bits; by default all that the file could hold.
    """
    try:
        with open_image(path) as image:
            if not is_deep(image):
                image.load()
                return image if image.mode == "RGB" else image.convert("RGB")
        values = deep_values(partial(open_image, path))
        levels = to_levels(values, value_range or whole_range(values))
        return Image.fromarray(levels).convert("RGB")
    except Refused:  # a tar file has changed
        raise
    except Exception as error:  # a damaged file can raise anything
        problem = what_is_wrong(path, error)
    raise BadImage(f"{os.fsdecode(path)}: can't be read as an image: {problem}")


def read_image(path, value_range=None):
    """A file -> a tensor (H, W, 3) uint8, which must not be written to. Raises BadImage."""
    image = read_rgb(path, value_range)
    pixels = torch.frombuffer(image.tobytes(), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3)


def read_or_replace(files, i, value_range=None):
    """File i of `files` or, where it is bad, the next good one.

    Returns the image (H, W, 3) uint8, and {index: what is wrong} for the bad files that were met. Raises
    BadImage where 20 files in a row are bad.
    """
    bad = {}
    for k in range(IN_A_ROW):
        place = (i + k) % len(files)
        try:
            return read_image(files[place], value_range), bad
        except BadImage as error:
            bad[place] = str(error)
    raise BadImage(f"{len(bad)} files in a row can't be read as images, the first: {bad[i]}")


def range_of_files(files):
    """The range of the values in the files of more than 8 bits, by a sample of them -> (low, high), or None
    where it meets no such file.

    The sample is spread evenly over the files, and the same for the same files: a run that goes on finds the
    same range.
    """
    some = np.unique(np.linspace(0, len(files) - 1, HEADERS).astype(int))
    deep = [files[i] for i in some if header(files[i], is_deep)]
    if not deep:
        return None
    chosen = np.unique(np.linspace(0, len(deep) - 1, SAMPLE).astype(int))
    values = []
    for i in chosen:
        try:
            found = deep_values(partial(open_image, deep[i])).ravel()
        except Exception:  # whoever reads it later says what is wrong
            continue
        values.append(found[::1 + len(found) // 2 ** 16])  # some of a large picture's pixels
    return range_of(np.concatenate(values)) if values else None


def header(path, property_of):
    """What property_of says of a file's opened image, or None where it is bad: whoever reads it says what is
    wrong."""
    # A link to a pipe, for one, into which nobody writes.
    if not isinstance(path, Member) and not os.path.isfile(path):
        return None
    try:
        with open_image(path) as image:
            return property_of(image)
    except Exception:  # a damaged file can raise anything
        return None


# --- What is wrong with a bad file ----------------------------------------------------------------------

MEND = "mend it or take it away"
BEGINNINGS = [  # what some files that are no pictures begin with, after so many bytes: what they are
    (0, b"version https://git-lfs", "a git-LFS pointer: git lfs pull"),
    (0, b"<!DOCTYPE", "a web page: download the picture again"),
    (0, b"<!doctype", "a web page: download the picture again"),
    (0, b"<html", "a web page: download the picture again"),
    (4, b"ftypheic", "a HEIC picture: convert it to JPEG or PNG"),
    (4, b"ftypheix", "a HEIC picture: convert it to JPEG or PNG"),
    (4, b"ftypmif1", "a HEIF picture: convert it to JPEG or PNG"),
    (0, b"%!PS", "a PostScript program: convert it to PNG"),
    (0, b"%PDF", "a PDF document: convert its pages to PNG"),
    (0, b"<svg", "a drawing of lines (SVG): convert it to PNG"),
    (0, b"<?xml", "an XML file (SVG perhaps): convert it to PNG"),
]


def what_is_wrong(path, error):
    """In words: what a file is that Pillow couldn't read, and what to do.

    error: what was raised. It comes into the words only where the file's beginning doesn't tell more.
    """
    if isinstance(error, Image.DecompressionBombError):
        largest = 2 * Image.MAX_IMAGE_PIXELS
        return f"larger than {largest} pixels: cut it into tiles, or make it smaller"
    try:
        with open_bytes(path) as f:
            beginning = f.read(64)
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror}; {MEND}"
    if not beginning:
        return f"it is empty; {MEND}"
    for start, signature, what in BEGINNINGS:
        if beginning[start:].startswith(signature):
            return what
    if beginning[:2] in (b"II", b"MM"):
        problem = wrong_with_tiff(path)
        if problem:
            return problem
    if isinstance(error, UnidentifiedImageError):  # whose text has the path once more
        return f"nothing in it that an image begins with; {MEND}"
    return f"{type(error).__name__}: {error}; {MEND}"


BANDS = 277          # more tags of a TIFF file
KIND_OF_VALUE = 339  # 3: floating point


def wrong_with_tiff(path):
    """What of a TIFF file Pillow can't read, in words, or None where its header doesn't show it.

    Satellites have 13 bands, and floating point in three; Pillow only says that it knows no such mode.
    """
    try:
        with open_bytes(path) as f:
            beginning = f.read(8)
            if beginning[2] == 43 or beginning[3] == 43:  # BigTIFF has a longer header
                beginning += f.read(8)
            tags = TiffImagePlugin.ImageFileDirectory_v2(beginning)
            f.seek(tags.next)
            tags.load(f)
            bands = int(tags.get(BANDS, 1))
            bits = int(tags.get(BITS, (1,))[0])
            is_float = 3 in tags.get(KIND_OF_VALUE, (1,))
    except Exception:  # a damaged file can raise anything
        return None
    if bands not in (1, 3, 4):
        return f"{bands} bands: only 1, 3 and 4 are read; write three of them into a file of their own"
    if bands > 1 and (is_float or bits > 16):
        kind = "floating point" if is_float else f"{bits} bits"
        return f"{bands} bands of {kind}: of these only 1 is read; write 8 or 16 bits, or one band a file"
    return None


# --- python augment.py DATA --check ---------------------------------------------------------------------

def line_about(value_range, path):
    """One line about a bad file, or None for a good one."""
    try:
        read_image(path, value_range)
    except BadImage as error:
        return printable(error)
    return None


def check_files(files, value_range=None):
    """Read all files, on all cores, and print a line for each bad one. Returns how many are bad.

    A counter runs on the terminal, on stderr, so that stdout holds nothing but the list.
    """
    bad = 0
    counting = sys.stderr.isatty()
    # Of a Pool, whose process was killed, one would wait for ever.
    with concurrent.futures.ProcessPoolExecutor() as pool:
        problems = pool.map(partial(line_about, value_range), files, chunksize=16)
        for n, problem in enumerate(problems, 1):
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
