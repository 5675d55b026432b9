"""What the scripts make of their logs: tables, differences between runs of one seed, pictures of rows.

A table is found in its page by its first line.
"""
import math
import pathlib
import statistics
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from harness.common.files import save_picture
from harness.common.pictures import GREY


# --- Tables -----------------------------------------------------------------------------------------------

def table(heads, rows):
    """A table in Markdown. heads: names; rows: lists of as many cells"""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (heads, *rows)]
    lines.insert(1, "|" + "---|" * len(heads))
    return "\n".join(lines) + "\n"


def cell(values):
    """The mean and, for several values, the standard deviation; "-" for none."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} +- {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def with_tables(text, tables):
    """A page's text with these tables, which replace those with the same first line."""
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
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26, 11: 2.23, 12: 2.20,
       13: 2.18, 14: 2.16, 15: 2.14}


class Difference(NamedTuple):
    """A difference estimated from pairs, in the unit of its values."""
    pairs: list    # the differences, by seed
    mean: float
    error: float   # the standard error of the mean
    low: float     # Student's interval of 95%, from
    high: float    # to

    def interval(self):
        return f"{self.low:+.1f} to {self.high:+.1f}"


def difference(mine, theirs):
    """{seed: value}, {seed: value} -> their Difference over the seeds that both have; None for fewer than two

    Runs of one seed have the same images, views and initial weights of the backbone, so chance that they
    share cancels.
    """
    seeds = sorted(mine.keys() & theirs.keys())
    pairs = [mine[seed] - theirs[seed] for seed in seeds]
    if len(pairs) < 2:
        return None
    mean = statistics.mean(pairs)
    half = half_interval(pairs)
    return Difference(pairs, mean, half / T95[len(pairs)], mean - half, mean + half)


def half_interval(values):
    """Half the width of Student's 95% interval for the mean of two values or more."""
    return T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


# --- Rows of results, as a picture ----------------------------------------------------------------------

class Panel(NamedTuple):
    """A part of a picture, with its own horizontal axis."""
    title: str
    rows: list  # of (label, [values of the first measure, of the second, ...]), the values one a seed


ROW = 34      # pixels from row to row
LABELS = 260  # width of the labels
AXIS = 520    # length of the axis


def draw_rows(path, panels, measures, half_bar=statistics.stdev):
    """A picture with one panel below the other. measures: {what is measured: colour}

    Each row has, for each measure, a dot for each seed, a stroke at their mean, and a bar that reaches
    half_bar(values) to either side, by default one standard deviation, but not beyond the axis.
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
    """The axis for all dots -> its start, its end, and the distance of its lines"""
    values = [value for _, measured in rows for its in measured for value in its]
    length = max(values) - min(values)
    every = 20 if length > 50 else 10 if length > 20 else 5
    low = every * math.floor(min(values) / every)
    high = every * math.ceil(max(values) / every)
    return low, max(every, high), every


def draw_panel(pen, top, panel, measures, half_bar):
    """Draw a panel's title, the names of the measures, the axis, and the rows."""
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
                mean = statistics.mean(values)
                half = half_bar(values) if len(values) > 1 else 0
                left, right = max(low, mean - half), min(high, mean + half)
                pen.line([at(left), line, at(right), line], colour, 2)
                pen.line([at(mean), line - 5, at(mean), line + 5], colour, 3)
                for dot in map(at, values):
                    pen.ellipse([dot - 2, line - 2, dot + 2, line + 2], outline=colour)
