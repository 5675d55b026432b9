"""Pixel values of more than 8 bits: what they are in a file, and which of them become 0 to 255.

Files of 8 bits are shown as they are. A camera, a microscope or a satellite writes others: 12 bits in a
file of 16, floating point from 0 to 1, Hounsfield units from -1024 on. Which value is black and which is
white stands nowhere in such files. So we look at a sample of the data set, and choose one range for all of
it: a range for each file would lose what is brighter in one than in another. The run says it, keeps it in
its settings, and --range overrides it.
"""
import numpy as np

SAMPLE = 64       # files whose values are looked at
HEADERS = 256     # files among which they are searched for
OUTLIERS = 0.01   # percent of the values at either end that don't count: hot pixels
BITS = 258        # tags of a TIFF file
PLANES = 284


def is_deep(image):
    """Whether an open image file (PIL) has more than 8 bits a value. It reads no pixels.

    Raises ValueError for a TIFF that has 16 bits and each colour in a plane of its own: of such planes Pillow
    gives us the higher bytes only.
    """
    if image.format == "TIFF" and len(image.getbands()) > 1:
        tags = image.tag_v2
        if tags.get(PLANES) == 2 and max(tags.get(BITS, (8,))) > 8:
            raise ValueError("16 bits with each colour in a plane of its own: write them pixel by pixel "
                             "(gdal_translate -co INTERLEAVE=PIXEL)")
    return image.mode.startswith("I") or image.mode == "F" or ";16" in raw_mode(image)


def raw_mode(image):
    """How Pillow's decoder names the order of the bytes in the file, RGB;16B for one."""
    if not image.tile:
        return ""
    arguments = image.tile[0].args
    name = arguments if isinstance(arguments, str) else arguments and arguments[0]
    return str(name or "")


def deep_values(open_image):
    """The values of a file of more than 8 bits -> (H, W) or (H, W, 3) int64 or float32, without
    transparency.

    open_image: opens the file, a PIL image each time. Pillow has no colour of 16 bits: it keeps the higher
    byte of each value. So such a file is read twice, the second time with the bytes in the other order.
    """
    with open_image() as image:
        name = raw_mode(image)
        if image.mode == "F":
            return np.asarray(image, np.float32)
        if image.mode.startswith("I"):
            return np.asarray(image).astype(np.int64)
        if name.startswith("LA;16"):  # read as four channels of 8 bits, these are the four bytes of a pixel
            as_raw(image, "RGBA")
            high, low = np.moveaxis(np.asarray(image), 2, 0)[:2].astype(np.int64)
            return 256 * high + low
        high = np.asarray(image)[..., :3].astype(np.int64)
    other_order = name[:-1] + ("L" if name.endswith("B") else "B")
    with open_image() as image:
        as_raw(image, other_order)
        low = np.asarray(image)[..., :3]
    return 256 * high + low


def as_raw(image, name):
    """Make Pillow's decoder take the file's bytes for this order of them."""
    tiles = []
    for tile in image.tile:
        arguments = name if isinstance(tile.args, str) else (name, *tile.args[1:])
        tiles.append(tile._replace(args=arguments))
    image.tile = tiles


def to_levels(values, value_range):
    """Values, of which the range (low, high) becomes 0 to 255: -> uint8 of the same shape. What lies beyond
    is cut; NaN becomes 0."""
    low, high = value_range
    levels = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.nan_to_num(levels.clip(0, 255), nan=0).round().astype(np.uint8)


def whole_range(values):
    """All that a file could hold, for a file that no sample has met: 16 bits, or fractions from 0 to 1"""
    return (0.0, 65535.0) if values.dtype.kind == "i" else (0.0, 1.0)


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
    whole = values.dtype.kind == "i" or bool((values == np.rint(values)).all() and high > 1)
    if whole and low >= 0:
        bits = max(8, int(high).bit_length())
        return 0.0, float(2 ** bits - 1)
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    return (float(low), float(high)) if high > low else (float(low), float(low) + 1)
