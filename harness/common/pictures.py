"""The pictures that the programs draw: contact sheets, training curves, nearest neighbours."""
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .errors import printable
from .files import save_picture

GREEN = "#2a9d3a"
RED = "#d62728"
BLUE = "#1f4e9c"
ORANGE = "#e08214"
GREY = "#dddddd"

# --- The contact sheet ----------------------------------------------------------------------------------

def draw_contact_sheet(rows, size, gap=4):
    """An image and its views on each row: (original, [view, view, ...]) of PIL images -> PIL image.

    The views come in pairs, size x size. If they are below 96 pixels, we enlarge them by a whole factor.
    """
    tile = size * max(1, 96 // size)
    pairs = len(rows[0][1]) // 2
    width = tile + pairs * (2 * tile + 3 * gap)
    height = len(rows) * (tile + gap) - gap
    sheet = Image.new("RGB", (width, height), "white")
    for row, (original, views) in enumerate(rows):
        y = row * (tile + gap)
        sheet.paste(on_a_square(original, tile), (0, y))
        for k, view in enumerate(views):
            x = (k + 1) * (tile + gap) + (k // 2 + 1) * gap  # pairs are a little apart
            view = view.resize((tile, tile), Image.Resampling.NEAREST)
            sheet.paste(view, (x, y))
    return sheet


def on_a_square(image, side):
    """An image, resized to fit onto a white square."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)  # some Pillows refuse a 0 here
    image = image.resize((width, height))
    return ImageOps.pad(image, (side, side), color="white")


# --- Training curves ------------------------------------------------------------------------------------

WIDTH = 420   # of a panel, in pixels
HEIGHT = 300


def draw_curves(path, records, knn_pixels, minimum, low_rank):
    """The three panels of the paper's Fig. 2, from a log's epochs, and one for the rank of the features.

    The paper's are the loss, the std with a line at 1/sqrt(d), and the accuracy, here kNN's.
    records     the log's records of epochs, with epoch, loss, std, knn, rank; None where there is no value
    knn_pixels  kNN accuracy of raw pixels, or None
    minimum     of the loss
    low_rank    the rank below which the run warns, or None
    """
    panels = [
        ("loss", f"training loss (minimum {minimum:.4g})", minimum, minimum + 1, None),
        ("std", "std x sqrt(d)  (red: scattered, 0: collapsed)", 0, 1.1, 1),
        ("knn", "kNN top-1 in percent  (red: raw pixels)", 0, 100, knn_pixels),
        ("rank", "effective rank of the features  (red: too low)", 0, 1, low_rank),
    ]
    draw_panels(path, panels, [(records, BLUE)], columns=2)


def draw_panels(path, panels, runs, columns):
    """A picture of panels, so many in a row.

    panels      [(key in a record, title, the ends of the axis, the value of a red line or None)]
    runs        [(records of its epochs, colour)]
    """
    rows = math.ceil(len(panels) / columns)
    image = Image.new("RGB", (columns * WIDTH, rows * HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    for k, panel in enumerate(panels):
        corner = k % columns * WIDTH, k // columns * HEIGHT
        draw_panel(pen, corner, runs, *panel)
    save_picture(image, path)


def draw_panel(pen, corner, runs, key, title, low, high, red):
    """One panel: a line for each run, and a red one at the value `red`, unless None.

    corner      the left upper one
    low, high   ends of the vertical axis, which goes further if a value does
    """
    last_epoch = max(1, runs[0][0][-1]["epoch"])
    left, top = corner
    font = ImageFont.load_default(15)
    values = [r[key] for records, _ in runs for r in records if r[key] is not None]
    low = min([low, *values])
    high = max([high, *values])
    x0 = left + 58
    x1 = left + WIDTH - 16
    y0 = top + HEIGHT - 44
    y1 = top + 40

    def at(epoch, value):  # y grows downwards
        x = x0 + (x1 - x0) * epoch / last_epoch
        y = y0 + (y1 - y0) * (value - low) / (high - low)
        return x, y

    pen.text((x0, top + 12), title, "black", font)
    for value in np.linspace(low, high, 5):
        _, y = at(0, value)
        pen.line([(x0, y), (x1, y)], GREY)
        pen.text((x0 - 6, y), f"{value:.3g}", "black", font, anchor="rm")
    for epoch in (0, last_epoch // 2, last_epoch):
        x, _ = at(epoch, low)
        pen.text((x, y0 + 6), f"{epoch}", "black", font, anchor="mt")
    pen.text((x1, y0 + 25), "epoch", "black", font, anchor="rt")
    if red is not None:
        pen.line([at(0, red), at(last_epoch, red)], RED)
    for records, colour in runs:
        points = [at(r["epoch"], r[key]) for r in records if r[key] is not None]
        if points:  # without labels, kNN has none
            pen.line(points, colour, 2)
            pen.circle(points[-1], 3, colour)
    pen.rectangle((x0, y1, x1, y0), outline="black")


# --- Nearest neighbours ---------------------------------------------------------------------------------

def draw_neighbors(path, train, val, chosen, nearest, tile=96, gap=6):
    """On each row a validation image and its nearest training images, in a green frame if the class is right.

    train, val  Sources with labels
    chosen      (R,) indices of validation images
    nearest     (R, C) indices of the training images nearest to each
    """
    font = ImageFont.load_default(12)
    text = 16  # pixels under a tile, for the class
    cell = tile + 2 * gap
    columns = 1 + nearest.shape[1]
    width = columns * cell + 2 * gap
    height = len(chosen) * (cell + text)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)

    def show(source, i, left, top, colour):
        x = left + gap
        y = top + gap
        picture = on_a_square(Image.fromarray(source.image(i).numpy()), tile)
        sheet.paste(ImageOps.expand(picture, 3, colour), (x - 3, y - 3))
        name = printable(source.classes[source.labels[i]])
        pen.text((x, y + tile + 4), name[:14], colour, font)  # more would not fit

    # The validation image is on the left, its neighbours a little apart from it.
    for row, i in enumerate(chosen):
        top = row * (cell + text)
        show(val, i, 0, top, "black")
        for column, k in enumerate(nearest[row], 1):
            same = train.labels[k] == val.labels[i]
            show(train, k, column * cell + 2 * gap, top, GREEN if same else RED)
    save_picture(sheet, path)
