"""Pages of which a part is made by a program: tables, each known by its first line; and pictures of rows of
results with their spread."""
import math
import statistics
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from harness.common.files import save_picture
from harness.common.pictures import GREY


def write_tables(page, tables):
    """Put tables in the place of those in a page that have the same first line."""
    for table in tables:
        header = table.splitlines()[0]
        before, found, after = page.read_text().partition(header)
        assert found, f"{page.name} has no table with the header {header}"
        _, end, rest = after.partition("\n\n")
        page.write_text(before + table + end[1:] + rest)


# --- Rows of results, as a picture ----------------------------------------------------------------------

class Panel(NamedTuple):
    """A part of a picture, with a horizontal axis of its own."""
    title: str
    rows: list   # of (label, [values of the first measure, of the second, ...]), the values one a seed
    low: int     # the axis, from
    high: int    # to


ROW = 34      # pixels from row to row
LABELS = 260  # width of the labels
AXIS = 520    # length of the axis


def draw_rows(path, panels, measures, half_bar=statistics.stdev):
    """One picture of panels below each other. measures: {what is measured: colour}

    In each row, for each measure: a small dot for each seed, a stroke at their mean, and a bar that reaches
    half_bar(values) to either side of it, by default one standard deviation.
    """
    height = sum((len(panel.rows) + 3) * ROW for panel in panels)
    image = Image.new("RGB", (LABELS + AXIS + 40, height), "white")
    pen = ImageDraw.Draw(image)
    top = 0
    for panel in panels:
        draw_panel(pen, top, panel, measures, half_bar)
        top += (len(panel.rows) + 3) * ROW
    save_picture(image, path)


def tick(length):
    """From one line of an axis to the next, by the axis's length."""
    return 20 if length > 50 else 10 if length > 20 else 5


def draw_panel(pen, top, panel, measures, half_bar):
    """A panel's title, the names of the measures, the axis, and a row below the other."""
    bold = ImageFont.load_default(16)
    font = ImageFont.load_default(13)
    x0 = LABELS
    bottom = top + (len(panel.rows) + 2) * ROW - 8

    def at(value):
        return x0 + AXIS * (value - panel.low) / (panel.high - panel.low)

    pen.text((10, top + 10), panel.title, "black", bold)
    x = x0
    for name, colour in measures.items():
        pen.text((x, top + 36), name, colour, font)
        x += pen.textlength(name, font) + 20
    every = tick(panel.high - panel.low)
    for value in range(every * math.ceil(panel.low / every), panel.high + 1, every):
        pen.line([at(value), top + 2 * ROW - 8, at(value), bottom], GREY if value else "black")
        pen.text((at(value), bottom + 4), f"{value:g}", "black", font, anchor="mt")
    for number, (label, measured) in enumerate(panel.rows):
        y = top + (2 + number) * ROW + 6
        pen.text((x0 - 10, y), label, "black", font, anchor="rm")
        for k, (colour, values) in enumerate(zip(measures.values(), measured)):
            line = y + 10 * k - 5 * (len(measures) - 1)
            if values:
                draw_spread(pen, [at(value) for value in values], line, colour, half_bar)


def draw_spread(pen, values, y, colour, half_bar):
    """Values in pixels: dots, a bar, and a stroke at their mean. Where the axis ends before the bar does, an
    arrowhead says so."""
    mean = statistics.mean(values)
    if len(values) > 1:
        half = half_bar(values)
        left, right = max(LABELS, mean - half), min(LABELS + AXIS, mean + half)
        pen.line([left, y, right, y], colour, 2)
        if left > mean - half:
            pen.polygon([(left - 5, y), (left + 2, y - 4), (left + 2, y + 4)], colour)
        if right < mean + half:
            pen.polygon([(right + 5, y), (right - 2, y - 4), (right - 2, y + 4)], colour)
    for value in values:
        pen.ellipse([value - 2, y - 2, value + 2, y + 2], outline=colour)
    pen.line([mean, y - 5, mean, y + 5], colour, 3)
