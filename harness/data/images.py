"""Reading one image file, good or bad.

What Pillow opens becomes RGB: the first frame, without transparency, EXIF ignored. Values of more than 8 bits
are brought to 0 to 255 by one range for the data set. A file that Pillow can't open or decode whole is bad. A
bad file never ends a run by itself: the next good one takes its place (read_or_replace), and the Source that
the file belongs to counts it (source.py).
"""
import concurrent.futures
import contextlib
import errno
import logging
import os
import re
import sys
import time
import warnings
from functools import partial

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from ..common.errors import Away, BadImage, Refused, printable
from ..common.progress import Progress
from .tars import open_bytes, plain

# Pillow knows more formats. The others aren't pictures, or need another program, which a file from anywhere
# must not start.
FORMATS = "JPEG PNG GIF BMP DIB WEBP AVIF TIFF PPM JPEG2000 TGA PCX SGI SUN PSD QOI DDS FITS".split()
Image.init()
FORMATS = [name for name in FORMATS if name in Image.OPEN]  # AVIF may be missing in a Pillow
SUFFIXES = tuple(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)
IN_A_ROW = 20  # this many bad files in a row end a run
WAITS = (0.1, 0.3, 0.6)  # seconds before a file is read again that the system couldn't read
BITS, BANDS, PLANES = 258, 277, 284  # tags of a TIFF file

# Pillow warns about odd files that it still reads, from every worker in every epoch.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())
# torch warns that a decoded image is read-only. Nobody writes to it.
warnings.filterwarnings("ignore", "The given NumPy array is not writable")
# Some cameras and microscopes write megabytes of text into a PNG. Pillow's limit for it is one megabyte.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 26


def is_image(path):
    """Whether a file's name (bytes or text) ends as an image's does."""
    return os.fsdecode(path).lower().endswith(SUFFIXES)


@contextlib.contextmanager
def pillow_reads(path):
    """Turn whatever Pillow raises within into BadImage: a damaged file can raise anything. What the system
    raises becomes Away."""
    try:
        yield
    except (Refused, MemoryError):
        raise
    except Exception as error:
        if getattr(error, "errno", None) not in (None, errno.EINVAL):  # that is a wrong offset, in the file
            raise Away(f"{os.fsdecode(path)}: can't be read ({error.strerror})") from None
        problem = what_is_wrong(path, error)
        raise BadImage(f"{os.fsdecode(plain(path))}: can't be read as an image: {problem}") from None


@contextlib.contextmanager
def open_image(path):
    """A file -> a PIL image, its header read, its pixels not yet. Raises BadImage."""
    with pillow_reads(path):
        file = open_bytes(path)
        image = Image.open(file, formats=FORMATS)
        tags = getattr(image, "tag_v2", {})
        if tags.get(PLANES) == 2 and tags[BITS][0] > 8 and len(tags[BITS]) > 1:
            raise ValueError("16 bits with each colour in a plane of its own; gdal_translate -co "
                             "INTERLEAVE=PIXEL writes them pixel by pixel")
    with file, image:
        yield image


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
    return torch.from_numpy(np.asarray(read_rgb(path, value_range)))


def read_or_replace(files, i, value_range=None):
    """File i of `files` or, if it is bad, the next good one.

    Returns the image (H, W, 3) uint8, and {index: BadImage} for the bad files on the way. Raises BadImage if
    20 files in a row are bad.
    """
    bad = {}
    for k in range(IN_A_ROW):
        place = (i + k) % len(files)
        try:
            return read_again(files[place], value_range), bad
        except BadImage as error:
            bad[place] = error
    raise BadImage(f"{len(bad)} files in a row can't be read as images, the first: {bad[i]}; "
                   f"{what_to_do(bad)}")


def what_to_do(bad):
    """What to do if too many files are bad. bad: {index: BadImage}"""
    if any(isinstance(error, Away) for error in bad.values()):
        return "DATA is gone, or a part of it; when it is back, --resume goes on, if there is a checkpoint"
    return "python augment.py DATA --check lists them"


def read_again(path, value_range):
    """What read_image gives, if need be after some waits: a network disk can be away for a moment."""
    for wait in WAITS:
        with contextlib.suppress(Away):
            return read_image(path, value_range)
        time.sleep(wait)
    return read_image(path, value_range)


def unread(image):
    """How much of an open file (PIL) is not read: frames behind the first (a microscope's stack, an
    animation), and bands behind the third (a satellite's)."""
    with contextlib.suppress(Exception):  # damage behind the first can raise anything, and doesn't matter
        bands = getattr(image, "tag_v2", {}).get(BANDS, 0) - (4 if image.mode == "CMYK" else 3)
        return getattr(image, "n_frames", 1) - 1 + max(0, bands)
    return 0


# --- More than 8 bits -----------------------------------------------------------------------------------
# A camera, a microscope or a satellite writes 12 bits in a file of 16, floating point from 0 to 1, Hounsfield
# units from -1024 on. Nothing in such a file says which value is black and which is white. So we look at a
# sample of the data set, and choose one range for all of it: with a range for each file, a dark picture would
# look like a bright one. The run prints the range and keeps it in its settings, and --range overrides it.

SAMPLE = 128     # files of a split that are looked at
OUTLIERS = 0.01  # percent of the values at either end that don't count: hot pixels


def sample(files):
    """Look at some files -> a list of values of those with more than 8 bits, how many frames and bands of
    them are not read, and how many of them have transparent parts

    Bad files are passed over: whoever reads them says what is wrong. The same files give the same sample, so
    a run that is resumed finds the same range.
    """
    values = []
    further = clear = 0
    for i in np.unique(np.linspace(0, len(files) - 1, SAMPLE, dtype=int)):
        with contextlib.suppress(BadImage), open_image(files[i]) as image:
            if is_deep(image):
                pixels = deep_values(files[i], image).ravel()
                values.append(pixels[::1 + len(pixels) // 2 ** 16])  # some of a large picture's
            further += unread(image)
            with pillow_reads(files[i]):
                clear += is_clear(image)
    return values, further, clear


def is_clear(image):
    """Whether an open file (PIL) has transparent parts, whose colours we show all the same."""
    if image.format == "TIFF" or not image.has_transparency_data:  # of a TIFF, `unread` counts the band
        return False
    lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
    return lowest < 255


def range_of(values):
    """The range in which these values of many pixels (N,) seem to be meant -> (low, high)

    all from 0 to 1                 0 to 1
    whole numbers, none below 0     0 to 2^k - 1, the fewest bits k (8 at least) that hold the largest
    all others                      from the smallest to the largest
    At either end OUTLIERS percent don't count. Nor does a value that is farther from all others than they are
    from each other: -9999, for instance, stands for missing data.
    """
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return 0.0, 1.0
    low, high = np.percentile(values, (OUTLIERS, 100 - OUTLIERS), method="nearest")
    inner = values[(values > low) & (values < high)]
    if len(inner):
        first, last = inner.min(), inner.max()
        if first - low > last - first > 0:
            low = first
        if high - last > last - first > 0:
            high = last
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    if low >= 0 and np.array_equal(values, np.rint(values)):
        bits = max(8, int(high).bit_length())
        return 0.0, 2.0 ** bits - 1
    if high == low:
        high = low + 1
    return float(low), float(high)


def to_levels(values, value_range):
    """Values -> uint8 of the same shape: the range (low, high) becomes 0 to 255, the others are clipped,
    NaN becomes 0."""
    low, high = value_range
    with np.errstate(invalid="ignore"):  # one kind of NaN warns when it is converted
        values = values.astype(np.float64)
    levels = (values - low) * (255 / (high - low))
    return np.nan_to_num(levels.clip(0, 255)).round().astype(np.uint8)


def whole_range(values):
    """All that a file could hold, for a file that was in no sample: 16 bits, or fractions from 0 to 1"""
    return (0.0, 65535.0) if values.dtype.kind == "i" else (0.0, 1.0)


def is_deep(image):
    """Whether an open image file (PIL) has more than 8 bits a value. It reads no pixels."""
    return image.mode[0] in "IF" or deep_colours(image) is not None


def deep_colours(image):
    """How Pillow names the order of the bytes in an open file of 16 bits a colour, RGB;16B for one, as a
    match; None for other files."""
    return re.search(r"RGB[AX]?;16\w", str(image.tile[:1]))  # the arguments of its decoder


def deep_values(path, image):
    """The values of an open file of more than 8 bits -> (H, W) or (H, W, 3) int64 or float32, without
    transparency. Raises BadImage.

    Pillow has no colour of 16 bits: it keeps the higher byte of each value. So such a file is read twice, the
    second time with the bytes in the other order.
    """
    colours = deep_colours(image)  # once its pixels are read, an image no longer knows
    values = pixels_of(path, image)
    if image.mode == "F":
        return values
    values = values.astype(np.int64)
    if colours is None:
        return values
    order = colours[0]
    other_order = order[:-1] + ("L" if order.endswith("B") else "B")
    with open_image(path) as again:
        for k, tile in enumerate(again.tile):
            args = other_order if isinstance(tile.args, str) else (other_order, *tile.args[1:])
            again.tile[k] = tile._replace(args=args)
        low = pixels_of(path, again)
    return (256 * values + low)[..., :3]


def pixels_of(path, image):
    """The pixels of an open image, (H, W) or (H, W, bands). Raises BadImage."""
    with pillow_reads(path):
        return np.asarray(image)


# --- What is wrong with a bad file ----------------------------------------------------------------------

MEND = "repair it or remove it"
BEGINNINGS = {  # what some files that aren't pictures begin with, in lower case
    b"git-lfs": "a git-LFS pointer: git lfs pull",
    b"/annex/objects/": "a git-annex pointer: datalad get",
    b"html": "a web page: download the picture again",
    b"ftyp": "a HEIC picture, or a video: convert it to JPEG or PNG",
}


def what_is_wrong(path, error):
    """Why Pillow couldn't read a file, and what to do, in words.

    error: what Pillow raised. We quote it only if the file's beginning doesn't tell more.
    """
    if isinstance(error, Image.DecompressionBombError):
        return f"larger than {2 * Image.MAX_IMAGE_PIXELS} pixels: cut it into tiles, or make it smaller"
    with open_bytes(path) as f:
        beginning = f.read(64).lower()
    for signature, what in BEGINNINGS.items():
        if signature in beginning:
            return what
    if not beginning:
        return f"it is empty; {MEND}"
    if isinstance(error, UnidentifiedImageError):  # whose text repeats the path
        return ("nothing that Pillow can open; convert it to 1, 3 or 4 bands of 8 or 16 bits or one of "
                f"floating point, {MEND}")
    return f"{type(error).__name__}: {error}; {MEND}"


# --- python augment.py DATA --check ---------------------------------------------------------------------

def look_at(value_range, path):
    """One line about a bad file, or None for a good one; and how many frames and bands are not read."""
    try:
        read_image(path, value_range)
        with open_image(path) as image:
            return None, unread(image)
    except BadImage as error:
        return printable(error), 0


def check_files(files, value_range=None):
    """Read all files, on all cores, and print a line for each bad one. Returns how many are bad, and [frames
    and bands that are not read, of each file that has any].

    On a terminal a line with the time left is redrawn. Elsewhere stdout holds nothing but the list.
    """
    bad = 0
    left = []
    progress = Progress(len(files), quiet=not sys.stdout.isatty())
    say = partial(print, flush=True) if progress.quiet else progress.line
    # A multiprocessing.Pool would wait for ever for a process that was killed.
    with concurrent.futures.ProcessPoolExecutor() as pool:
        for problem, further in pool.map(partial(look_at, value_range), files, chunksize=16):
            if further:
                left.append(further)
            if problem:
                bad += 1
                say(problem)
            progress.step(lambda: f"{len(files)} files, {bad} bad so far")
    return bad, left
