"""What the scripts make of their logs: tables, each known in its page by its first line; differences between
runs of one seed; pictures of rows of results with their spread."""
import math
import pathlib
import statistics
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from harness.common.files import save_picture
from harness.common.pictures import GREY


# --- Tables -----------------------------------------------------------------------------------------------

def table(heads, rows):
    """The lines of a table, each with its line end. heads: names; rows: lists of as many cells"""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (heads, *rows)]
    lines.insert(1, "|" + "---|" * len(heads))
    return "\n".join(lines) + "\n"


def cell(values):
    """Mean and, of several, the standard deviation; a stroke where there is none."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} +- {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def with_tables(text, tables):
    """A page's text, with these tables in the place of those that have the same first line."""
    for made in tables:
        header = made.splitlines()[0]
        before, found, after = text.partition(header)
        assert found, f"no table has the header {header}"
        _, _, rest = after.partition("\n\n")
        text = f"{before}{made}\n{rest}" if rest else before + made
    return text


def page_with(path, tables):
    """{path: the page's text with these tables}"""
    return {path: with_tables(pathlib.Path(path).read_text(), tables)}


def write_tables(page, tables):
    """Put these tables into a page."""
    write(page_with(page, tables))


def write(pages):
    """pages: {path: text}"""
    for path, text in pages.items():
        pathlib.Path(path).write_text(text)


# --- Differences between runs of one seed -----------------------------------------------------------------

# Student's t, 95%, by the number of pairs
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


class Difference(NamedTuple):
    """What pairs tell of a difference, in the unit of its values."""
    pairs: list    # the differences, by seed
    mean: float
    error: float   # the standard error of the mean
    low: float     # Student's interval of 95%, from
    high: float    # to

    def interval(self):
        return f"{self.low:+.1f} to {self.high:+.1f}"


def difference(mine, theirs):
    """Of {seed: value} and {seed: value}, over the seeds that both have -> Difference; None for fewer than
    two pairs, which tell nothing of its error.

    Runs of one seed have the same images, views and first weights of the backbone: what the two have in
    common by chance cancels.
    """
    seeds = sorted(mine.keys() & theirs.keys())
    pairs = [mine[seed] - theirs[seed] for seed in seeds]
    if len(pairs) < 2:
        return None
    mean = statistics.mean(pairs)
    half = half_interval(pairs)
    return Difference(pairs, mean, half / T95[len(pairs)], mean - half, mean + half)


def half_interval(values):
    """Half the width of Student's interval of 95% for the mean of some values, two at least."""
    return T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


# --- Rows of results, as a picture ----------------------------------------------------------------------

class Panel(NamedTuple):
    """A part of a picture, with a horizontal axis of its own."""
    title: str
    rows: list  # of (label, [values of the first measure, of the second, ...]), the values one a seed


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


def axis_of(rows):
    """-> from, to, and how far its lines are apart"""
    values = [value for _, measured in rows for its in measured for value in its]
    length = max(values) - min(values)
    every = 20 if length > 50 else 10 if length > 20 else 5
    low = every * math.floor(min(values) / every)
    high = every * math.ceil(max(values) / every)
    return low, max(every, high), every


def draw_panel(pen, top, panel, measures, half_bar):
    """A panel's title, the names of the measures, the axis, and a row below the other."""
    low, high, every = axis_of(panel.rows)
    bold = ImageFont.load_default(16)
    font = ImageFont.load_default(13)
    x0 = LABELS
    bottom = top + (len(panel.rows) + 2) * ROW - 8

    def at(value):
        return x0 + AXIS * (value - low) / (high - low)

    pen.text((10, top + 10), panel.title, "black", bold)
    x = x0
    for name, colour in measures.items():
        pen.text((x, top + 36), name, colour, font)
        x += pen.textlength(name, font) + 20
    for value in range(low, high + 1, every):
        colour = GREY if value else "black"
        pen.line([at(value), top + 2 * ROW - 8, at(value), bottom], colour)
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
            arrowhead(pen, left, y, -1, colour)
        if right < mean + half:
            arrowhead(pen, right, y, 1, colour)
    for value in values:
        pen.ellipse([value - 2, y - 2, value + 2, y + 2], outline=colour)
    pen.line([mean, y - 5, mean, y + 5], colour, 3)


def arrowhead(pen, x, y, direction, colour):
    """direction: 1 to the right, -1 to the left"""
    behind = x - 2 * direction
    tip = x + 5 * direction
    pen.polygon([(tip, y), (behind, y - 4), (behind, y + 4)], colour)
