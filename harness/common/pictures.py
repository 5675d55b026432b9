"""The pictures that the programs draw: contact sheets, training curves, nearest neighbours."""
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .errors import printable
from .files import save_picture

GREEN = "#2a9d3a"
RED = "#d62728"
BLUE = "#1f4e9c"
GREY = "#dddddd"

# --- The contact sheet ----------------------------------------------------------------------------------

def draw_contact_sheet(rows, size, gap=4):
    """rows: (original, [view, view, ...]) of PIL images, the views in pairs, size x size -> PIL image.

    Views smaller than 96 pixels are enlarged by a whole factor. Pairs stand a little apart.
    """
    tile = size * max(1, 96 // size)
    pairs = len(rows[0][1]) // 2
    pair_width = 2 * tile + 3 * gap
    width = tile + pairs * pair_width
    height = len(rows) * (tile + gap) - gap
    sheet = Image.new("RGB", (width, height), "white")
    for row, (original, views) in enumerate(rows):
        y = row * (tile + gap)
        original = fit_into(original, tile)
        margin_x = (tile - original.width) // 2
        margin_y = (tile - original.height) // 2
        sheet.paste(original, (margin_x, y + margin_y))
        for k, view in enumerate(views):
            pair, which = divmod(k, 2)
            x = tile + 2 * gap + pair * pair_width + which * (tile + gap)
            view = view.resize((tile, tile), Image.Resampling.NEAREST)
            sheet.paste(view, (x, y))
    return sheet


def fit_into(image, side):
    """An image, resized so that its longer side is `side`."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.resize((width, height))


# --- Training curves ------------------------------------------------------------------------------------

WIDTH = 420   # of a panel, in pixels
HEIGHT = 300


def draw_curves(path, records, knn_pixels, minimum, low_rank):
    """The three panels of the paper's Fig. 2, from a log's epochs: loss, std with its 1/sqrt(d) line,
    accuracy (kNN); and the effective rank of the features.

    records     the log's records of epochs, with keys epoch, loss, std, knn, rank; None where a value doesn't
                exist
    knn_pixels  kNN accuracy of raw pixels, or None
    minimum     of the loss
    low_rank    the rank below which there is an alarm, or None
    """
    image = Image.new("RGB", (2 * WIDTH, 2 * HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    # Each panel: key in the log, title, the axis from and to, where a red line stands, and its name.
    panels = [
        ("loss", f"training loss (minimum {minimum:.4g})", minimum, minimum + 1, None, ""),
        ("std", "std x sqrt(d)  (1: scattered, 0: collapsed)", 0, 1.1, 1, "std = 1/sqrt(d)"),
        ("knn", "kNN top-1 (%)", 0, 100, knn_pixels, "raw pixels"),
        ("rank", "effective rank of the features", 0, 1, low_rank, "too low"),
    ]
    last_epoch = max(1, records[-1]["epoch"])
    for k, (key, title, low, high, reference, name) in enumerate(panels):
        points = [(r["epoch"], r[key]) for r in records if r[key] is not None]
        corner = k % 2 * WIDTH, k // 2 * HEIGHT
        draw_panel(pen, corner, title, points, last_epoch, low, high, reference, name)
    save_picture(image, path)


def draw_panel(pen, corner, title, points, last_epoch, low, high, reference, name):
    """One panel: a line through points (epoch, value), and a red line at `reference`, where there is one.

    corner: its left upper one. The vertical axis goes from low to high, and further where points lie outside.
    """
    left, top = corner
    font = ImageFont.load_default(15)
    # A value outside of [low, high] must not be drawn outside of the panel.
    values = [value for _, value in points]
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
        start = at(0, value)
        pen.line([start, at(last_epoch, value)], GREY)
        pen.text((x0 - 6, start[1]), f"{value:.3g}", "black", font, anchor="rm")
    ticks = {round(last_epoch * share) for share in (0, 0.25, 0.5, 0.75, 1)}  # equal ones only once
    for epoch in ticks:
        x, _ = at(epoch, low)
        pen.text((x, y0 + 6), f"{epoch}", "black", font, anchor="mt")
    middle = (x0 + x1) / 2
    pen.text((middle, y0 + 25), "epoch", "black", font, anchor="mt")
    if reference is not None:
        start = at(0, reference)
        pen.line([start, at(last_epoch, reference)], RED)
        pen.text((x1 - 2, start[1] - 2), name, RED, font, anchor="rb")
    if points:  # kNN has none where there are no labels
        pen.line([at(*point) for point in points], BLUE, 2)
        pen.circle(at(*points[-1]), 3, BLUE)
    pen.rectangle((x0, y1, x1, y0), outline="black")


# --- Nearest neighbours ---------------------------------------------------------------------------------

def draw_neighbors(path, train, val, chosen, nearest, tile=96, gap=6):
    """On each row a validation image and the training images nearest to it, the nearest first.

    train, val  Sources with labels
    chosen      (R,) which validation images
    nearest     (R, C) for each of them, which training images
    A frame is green where the training image has the same class, and red where it has another.
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
        # The frame is a filled rectangle three pixels larger than the picture that is pasted into it.
        pen.rectangle((x - 3, y - 3, x + tile + 2, y + tile + 2), fill=colour)
        picture = Image.fromarray(source.image(i).numpy())
        picture = ImageOps.pad(picture, (tile, tile), color="white")
        sheet.paste(picture, (x, y))
        name = printable(source.classes[source.labels[i]])
        while pen.textlength(name, font) > tile:  # a long name loses its end
            name = name[:-1]
        pen.text((x, y + tile + 4), name, colour, font)

    # The validation image stands on the left, its neighbours a little apart from it.
    for row, i in enumerate(chosen):
        top = row * (cell + text)
        show(val, i, 0, top, "black")
        for column, k in enumerate(nearest[row], 1):
            same = train.labels[k] == val.labels[i]
            show(train, k, column * cell + 2 * gap, top, GREEN if same else RED)
    save_picture(sheet, path)
