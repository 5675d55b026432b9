"""Reading one image file, good or bad.

What Pillow opens becomes RGB: the first frame, without transparency; EXIF turns nothing. Values of more than
8 bits are brought to 0 to 255 by one range for the data set. What Pillow can't open or decode whole is bad. A
bad file never ends a run by itself: the next good one takes its place (read_or_replace), and the Source that
the file belongs to counts it (source.py).
"""
import concurrent.futures
import contextlib
import io
import logging
import os
import sys
import warnings
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from ..common.errors import BadImage, Refused, printable
from .tars import Member

# Pillow knows more formats. Of those left out, some are no pictures, some need another program, which a file
# from anywhere must not start.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "WEBP", "AVIF", "TIFF", "PPM", "JPEG2000", "TGA", "PCX", "SGI",
           "SUN", "PSD", "QOI", "DDS", "FITS")
Image.init()
FORMATS = tuple(name for name in FORMATS if name in Image.OPEN)  # AVIF may be missing in a Pillow
SUFFIXES = tuple(sorted(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS))
IN_A_ROW = 20  # so many bad files one after the other end a run
BITS, BANDS, PLANES, KIND_OF_VALUE = 258, 277, 284, 339  # tags of a TIFF file

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


def open_bytes(path):
    """A file, or a member of a tar file -> an open file; of a member, one in memory."""
    return io.BytesIO(path.content()) if isinstance(path, Member) else open(path, "rb")


@contextlib.contextmanager
def pillow_reads(path):
    """Turn whatever Pillow raises within into BadImage: a damaged file can raise anything."""
    try:
        yield
    except Refused:  # the tar file is gone
        raise
    except Exception as error:
        problem = what_is_wrong(path, error)
        raise BadImage(f"{os.fsdecode(path)}: can't be read as an image: {problem}") from None


def open_image(path):
    """A file -> a PIL image, its header read, its pixels not yet. Raises BadImage."""
    with pillow_reads(path):
        source = open_bytes(path) if isinstance(path, Member) else os.fsdecode(path)
        return Image.open(source, formats=FORMATS)


def read_rgb(path, value_range=None):
    """A file -> a PIL image in RGB, decoded. Raises BadImage.

    value_range: (low, high), for files of more than 8 bits; by default all that the file could hold.
    """
    with open_image(path) as image:
        if is_deep(image):
            values = deep_values(path, image)
            image = Image.fromarray(to_levels(values, value_range or whole_range(values)))
        with pillow_reads(path):
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")


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


# --- More than 8 bits -----------------------------------------------------------------------------------
# A camera, a microscope or a satellite writes 12 bits in a file of 16, floating point from 0 to 1, Hounsfield
# units from -1024 on. Which value is black and which is white stands nowhere in such files. So we look at a
# sample of the data set, and choose one range for all of it: a range for each file would lose what is
# brighter in one than in another. The run says it, keeps it in its settings, and --range overrides it.

HEADERS = 256    # files in the sample
DEEP = 64        # of those with more than 8 bits, files whose values are looked at
OUTLIERS = 0.01  # percent of the values at either end that don't count: hot pixels


class Header(NamedTuple):
    """What an image file says before its pixels."""
    size: tuple    # width, height
    is_deep: bool  # more than 8 bits a value


def spread(n, count):
    """Of n things, `count` or all, evenly -> their indices"""
    if n == 0:
        return []
    places = np.linspace(0, n - 1, count).astype(int)
    return np.unique(places).tolist()


def sample_headers(files):
    """The headers of some files -> {index: Header}, without bad files: whoever reads them says what is wrong.

    The sample is the same for the same files: a run that goes on finds the same range.
    """
    headers = {}
    for i in spread(len(files), HEADERS):
        path = files[i]
        # A link to a pipe, for one, into which nobody writes, is not opened.
        if isinstance(path, Member) or os.path.isfile(path):
            with contextlib.suppress(BadImage), open_image(path) as image:
                headers[i] = Header(image.size, is_deep(image))
    return headers


def range_of_files(files):
    """The range of the values in files of more than 8 bits, by some of them -> (low, high), or None where no
    file is good."""
    values = []
    for i in spread(len(files), DEEP):
        with contextlib.suppress(BadImage), open_image(files[i]) as image:
            found = deep_values(files[i], image).ravel()
            values.append(found[::1 + len(found) // 2 ** 16])  # some of a large picture's pixels
    return range_of(np.concatenate(values)) if values else None


def range_of(values):
    """The range that these values of many pixels, a flat array, seem to be meant in -> (low, high)

    whole numbers, none below 0     0 to 2^k - 1, the fewest bits k (8 at least) that hold the largest
    fractions, all from 0 to 1      0 to 1
    all others                      from the smallest to the largest
    At either end OUTLIERS percent don't count.
    """
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return 0.0, 1.0
    low, high = np.percentile(values, (OUTLIERS, 100 - OUTLIERS), method="nearest").tolist()
    is_whole = values.dtype.kind == "i" or (high > 1 and np.array_equal(values, np.rint(values)))
    if is_whole and low >= 0:
        bits = max(8, int(high).bit_length())
        return 0.0, float(2 ** bits - 1)
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    if high == low:
        high = low + 1
    return float(low), float(high)


def to_levels(values, value_range):
    """Values, of which the range (low, high) becomes 0 to 255: -> uint8 of the same shape. What lies beyond
    is cut; NaN becomes 0."""
    low, high = value_range
    levels = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.nan_to_num(levels.clip(0, 255), nan=0).round().astype(np.uint8)


def whole_range(values):
    """All that a file could hold, for a file that no sample has met: 16 bits, or fractions from 0 to 1"""
    return (0.0, 65535.0) if values.dtype.kind == "i" else (0.0, 1.0)


def is_deep(image):
    """Whether an open image file (PIL) has more than 8 bits a value. It reads no pixels."""
    if image.format == "TIFF" and max(image.tag_v2.get(BITS, (8, ))) > 8:
        return True
    return image.mode.startswith("I") or image.mode == "F" or ";16" in raw_mode(image)


def deep_values(path, image):
    """The values of an open file of more than 8 bits -> (H, W) or (H, W, 3) int64 or float32, without
    transparency. Raises BadImage.

    Pillow has no colour of 16 bits: it keeps the higher byte of each value. So such a file is read twice, the
    second time with the bytes in the other order.
    """
    if image.format == "TIFF" and len(image.getbands()) > 1 and image.tag_v2.get(PLANES) == 2:
        raise BadImage(f"{os.fsdecode(path)}: can't be read as an image: 16 bits with each colour in a plane "
                       "of its own: write them pixel by pixel (gdal_translate -co INTERLEAVE=PIXEL)")
    name = raw_mode(image)
    if image.mode == "F":
        return pixels_of(path, image)
    if image.mode.startswith("I"):
        return pixels_of(path, image).astype(np.int64)
    if name.startswith("LA;16"):  # read as four channels of 8 bits, these are the four bytes of a pixel
        high, low = np.moveaxis(pixels_of(path, image, "RGBA"), 2, 0)[:2].astype(np.int64)
        return 256 * high + low
    high = pixels_of(path, image)[..., :3].astype(np.int64)
    other_order = name[:-1] + ("L" if name.endswith("B") else "B")
    with open_image(path) as again:
        low = pixels_of(path, again, other_order)[..., :3]
    return 256 * high + low


def pixels_of(path, image, name=None):
    """The pixels of an open image, (H, W) or (H, W, bands). Raises BadImage.

    name: the order of bytes that Pillow's decoder shall take the file's for
    """
    if name:
        for k, tile in enumerate(image.tile):
            arguments = name if isinstance(tile[3], str) else (name, *tile[3][1:])
            make = getattr(type(tile), "_make", tuple)  # a plain tuple before Pillow 11
            image.tile[k] = make((*tile[:3], arguments))
    with pillow_reads(path):
        return np.asarray(image)


def raw_mode(image):
    """How Pillow's decoder names the order of the bytes in the file, RGB;16B for one."""
    if not image.tile:
        return ""
    arguments = image.tile[0][3]
    name = arguments if isinstance(arguments, str) else arguments and arguments[0]
    return str(name or "")


# --- What is wrong with a bad file ----------------------------------------------------------------------

MEND = "mend it or take it away"
BEGINNINGS = [  # in lower case, after so many bytes: what a file is that is no picture, and what to do
    (0, b"version https://git-lfs", "a git-LFS pointer: git lfs pull"),
    (0, b"<!doctype", "a web page: download the picture again"),
    (0, b"<html", "a web page: download the picture again"),
    (4, b"ftyp", "a HEIC picture, or a video: convert it to JPEG or PNG"),
    (0, b"<svg", "a drawing of lines (SVG): convert it to PNG"),
    (0, b"<?xml", "an XML file, SVG perhaps: convert it to PNG"),
    (0, b"%pdf", "a PDF document: convert its pages to PNG"),
    (0, b"%!ps", "a PostScript program: convert it to PNG"),
]


def what_is_wrong(path, error):
    """In words: what a file is that Pillow couldn't read, and what to do.

    error: what was raised. It comes into the words only where the file's beginning doesn't tell more.
    """
    if isinstance(error, Image.DecompressionBombError):
        return f"larger than {2 * Image.MAX_IMAGE_PIXELS} pixels: cut it into tiles, or make it smaller"
    try:
        with open_bytes(path) as f:
            beginning = f.read(64).lower()
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror}; {MEND}"
    if not beginning:
        return f"it is empty; {MEND}"
    for start, signature, what in BEGINNINGS:
        if beginning[start:].startswith(signature):
            return what
    if isinstance(error, UnidentifiedImageError):  # whose text has the path once more
        return wrong_with_tiff(path) or f"nothing in it that an image begins with; {MEND}"
    return f"{type(error).__name__}: {error}; {MEND}"


def wrong_with_tiff(path):
    """What of a TIFF file Pillow can't read, in words; None where it is none, or damaged.

    Satellites have 13 bands, and floating point in three; Pillow only says that it knows no such mode.
    """
    try:
        with open_bytes(path) as f:
            tags = TiffImagePlugin.ImageFileDirectory_v2(f.read(8))
            f.seek(tags.next)
            tags.load(f)
            bands = int(tags.get(BANDS, 1))
            bits = int(tags.get(BITS, (1, ))[0])
            is_float = 3 in tags.get(KIND_OF_VALUE, (1, ))
    except Exception:  # a damaged file can raise anything
        return None
    kind = "floating point" if is_float else f"{bits} bits"
    return f"{bands} bands of {kind}: write 1, 3 or 4 bands of 8 or 16 bits, or one band of floating point"


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
