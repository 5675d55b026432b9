"""The pictures that the programs draw: contact sheets, training curves, nearest neighbours."""
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .errors import printable
from .files import save_picture

GREEN = "#2a9d3a"
RED = "#d62728"
BLUE = "#1f4e9c"
ORANGE = "#e08214"
GREY = "#dddddd"

# --- Sheets of several pictures ---------------------------------------------------------------------------

def grid(rows, gap):
    """Rows of pictures of one height, `gap` pixels apart on white -> PIL image"""
    width = sum(picture.width + gap for picture in rows[0]) - gap
    pitch = rows[0][0].height + gap
    sheet = Image.new("RGB", (width, len(rows) * pitch - gap), "white")
    for number, row in enumerate(rows):
        x = 0
        for picture in row:
            sheet.paste(picture, (x, number * pitch))
            x += picture.width + gap
    return sheet


def on_a_square(image, side):
    """An image, resized to fit onto a white square."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)  # some Pillows refuse a 0 here
    image = image.resize((width, height))
    return ImageOps.pad(image, (side, side), color="white")


def draw_contact_sheet(rows, size):
    """An image and its views on each row: (original, [view, view, ...]) of PIL images -> PIL image.

    The views come in pairs, size x size. If they are below 96 pixels, we enlarge them by a whole factor.
    """
    side = size * max(1, 96 // size)
    shown = []
    for original, views in rows:
        views = [view.resize((side, side), Image.Resampling.NEAREST) for view in views]
        row = [on_a_square(original, side)]
        for pair in zip(views[::2], views[1::2]):
            row.append(grid([pair], gap=4))
        shown.append(row)
    return grid(shown, gap=12)


# --- Training curves ------------------------------------------------------------------------------------

WIDTH, HEIGHT = 420, 300  # of a panel, in pixels
LEFT, RIGHT, TOP, BOTTOM = 58, 404, 40, 256  # the ends of its axes


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
    pictures = [draw_panel(runs, *panel) for panel in panels]
    starts = range(0, len(pictures), columns)
    rows = [pictures[k:k + columns] for k in starts]
    save_picture(grid(rows, gap=0), path)


def draw_panel(runs, key, title, low, high, red):
    """One panel: a line for each run, and a red one at the value `red`, unless None -> PIL image

    low, high   ends of the vertical axis, which goes further if a value does
    """
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    last_epoch = max(1, runs[0][0][-1]["epoch"])
    font = ImageFont.load_default(15)
    values = [r[key] for records, _ in runs for r in records if r[key] is not None]
    low = min([low, *values])
    high = max([high, *values])

    def at(epoch, value):  # y grows downwards
        x = LEFT + (RIGHT - LEFT) * epoch / last_epoch
        y = BOTTOM + (TOP - BOTTOM) * (value - low) / (high - low)
        return x, y

    pen.text((LEFT, 12), title, "black", font)
    for value in np.linspace(low, high, 5):
        _, y = at(0, value)
        pen.line([(LEFT, y), (RIGHT, y)], GREY)
        pen.text((LEFT - 6, y), f"{value:.3g}", "black", font, anchor="rm")
    for epoch in (0, last_epoch // 2, last_epoch):
        x, _ = at(epoch, low)
        pen.text((x, BOTTOM + 6), f"{epoch}", "black", font, anchor="mt")
    pen.text((RIGHT, BOTTOM + 25), "epoch", "black", font, anchor="rt")
    if red is not None:
        pen.line([at(0, red), at(last_epoch, red)], RED)
    for records, colour in runs:
        points = [at(r["epoch"], r[key]) for r in records if r[key] is not None]
        if points:  # without labels, kNN has none
            pen.line(points, colour, 2)
            pen.circle(points[-1], 3, colour)
    pen.rectangle((LEFT, TOP, RIGHT, BOTTOM), outline="black")
    return image


# --- Nearest neighbours ---------------------------------------------------------------------------------

def draw_neighbors(path, train, val, chosen, nearest, tile=96):
    """On each row a validation image and its nearest training images, in a green frame if the class is right.

    train, val  Sources with labels
    chosen      (R,) indices of validation images
    nearest     (R, C) indices of the training images nearest to each
    """
    rows = []
    for i, neighbors in zip(chosen, nearest):
        row = [framed(val, i, tile, "black")]
        for k in neighbors:
            is_right = train.labels[k] == val.labels[i]
            row.append(framed(train, k, tile, GREEN if is_right else RED))
        rows.append(row)
    save_picture(grid(rows, gap=6), path)


def framed(source, i, tile, colour):
    """Image i on a square of `tile` pixels, in a frame of this colour, its class below -> PIL image"""
    picture = on_a_square(Image.fromarray(source.image(i).numpy()), tile)
    picture = ImageOps.expand(picture, 3, colour)
    name = printable(source.classes[source.labels[i]])
    cell = Image.new("RGB", (picture.width, picture.height + 16), "white")
    cell.paste(picture)
    pen = ImageDraw.Draw(cell)
    font = ImageFont.load_default(12)
    pen.text((3, picture.height + 1), name[:14], colour, font)  # more would not fit
    return cell
