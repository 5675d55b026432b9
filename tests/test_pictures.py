"""harness, pictures.py: pixels of the pictures, against where the numbers belong."""
import numpy as np
import pytest
import torch
from PIL import Image

from harness.data.source import Source
from harness.common import pictures
from harness.evaluation import result

RED = (200, 0, 0)
GREEN = (0, 200, 0)
BLUE = (0, 0, 200)
RIGHT = (42, 157, 58)   # the frame of a neighbour of the same class
WRONG = (214, 39, 40)
BLACK = (0, 0, 0)
DARK = (9, 9, 9)
GREY = (99, 99, 99)


def source_of(colours, labels):
    """Images of 8 x 8 pixels, each of one colour."""
    pixels = torch.empty(len(colours), 3, 8, 8, dtype=torch.uint8)
    pixels.copy_(torch.tensor(colours)[:, :, None, None])
    return Source(pixels=pixels, labels=np.array(labels), classes=["one", "two with a very long name"])


def cells(sheet, y):
    """The pixels of a neighbors picture at height y, in the middle of each of its four tiles of 20 pixels."""
    cell = 20 + 2 * 6
    columns = [0, cell + 12, 2 * cell + 12, 3 * cell + 12]
    return [sheet.getpixel((left + cell // 2, y)) for left in columns]


def test_neighbors_are_the_nearest_and_framed_by_class(tmp_path):
    """Each tile's colour against the cosines, by hand; its frame's against the class."""
    train = source_of([RED, GREEN, BLUE], [0, 1, 0])
    val = source_of([DARK, GREY], [1, 0])
    bank = torch.tensor([[1.0, 0.0], [0.0, 5.0], [3.0, 3.0]])
    queries = torch.tensor([[0.1, 1.0], [2.0, 0.1]])
    found = result.neighbors(train, val, bank, queries, columns=3)
    pictures.draw_neighbors(tmp_path / "n.png", train, val, *found, tile=20)
    sheet = Image.open(tmp_path / "n.png")
    row = 20 + 2 * 6 + 16
    assert cells(sheet, 16) == [GREY, RED, BLUE, GREEN]  # of class one
    assert cells(sheet, 4) == [BLACK, RIGHT, RIGHT, WRONG]
    assert cells(sheet, row + 16) == [DARK, GREEN, BLUE, RED]
    assert cells(sheet, row + 4) == [BLACK, RIGHT, WRONG, WRONG]


def test_neighbors_are_shown_for_each_class_in_turn():
    """Which of 40 validation images are chosen: ten, sorted by class, all four classes among them."""
    labels = np.arange(40) % 4
    val = Source(files=np.zeros(40, "S1"), labels=labels)
    train = Source(files=np.zeros(6, "S1"))
    chosen, nearest = result.neighbors(train, val, torch.randn(6, 3), torch.randn(40, 3))
    assert len(set(chosen.tolist())) == 10
    assert labels[chosen].tolist() == sorted(labels[chosen])
    assert set(labels[chosen]) == {0, 1, 2, 3}
    assert nearest.shape == (10, 6)


def record(epoch, loss=None, std=None, knn=None, rank=None):
    """A log's record of an epoch, as far as the curves need it."""
    return {"epoch": epoch, "loss": loss, "std": std, "knn": knn, "rank": rank}


def curves(tmp_path, records, knn_pixels=None, low_rank=None):
    """The picture of these records: (H, W, 3) array"""
    pictures.draw_curves(tmp_path / "curves.png", records, knn_pixels, -1, low_rank)
    return np.array(Image.open(tmp_path / "curves.png"))


def panel_of(picture, panel):
    """One of the four panels."""
    row, column = divmod(panel, 2)
    return picture[300 * row:300 * (row + 1), 420 * column:420 * (column + 1)]


def middle_of(picture, colour, panel):
    """Where a panel has this colour: the mean (x, y) in the panel, or None."""
    part = panel_of(picture, panel)
    y, x = np.nonzero((part == colour).all(axis=2))
    return (x.mean(), y.mean()) if len(x) else None


LINE = (31, 78, 156)


def test_curves_show_each_value_in_its_place(tmp_path):
    """Four single points, one a panel, against their place on axes from 58 to 404 and from 256 up to 40."""
    middle = record(2, loss=-0.5, std=0.55, knn=50, rank=0.5)
    picture = curves(tmp_path, [record(0), middle, record(4)])
    assert picture.shape == (600, 840, 3)
    for panel in range(4):
        place = middle_of(picture, LINE, panel)
        assert np.allclose(place, (231, 148), atol=0.6), panel


def test_curves_have_axes_that_hold_all_values(tmp_path):
    """A loss beyond its axis: the axis grows, so that the value lies at its upper end."""
    picture = curves(tmp_path, [record(0), record(1, loss=3.0)])
    assert np.allclose(middle_of(picture, LINE, 0), (404, 40), atol=1.5)


def red_rows(picture, panel):
    """The rows in which a panel is red near its left side."""
    column = panel_of(picture, panel)[:, 80]
    return np.flatnonzero((column == WRONG).all(axis=1)).tolist()


def test_curves_mark_what_they_are_compared_with(tmp_path):
    """Red lines: at std = 1/sqrt(d) in the second panel; at the accuracy of raw pixels in the third; where a
    rank is too low in the fourth."""
    records = [record(0), record(1)]
    picture = curves(tmp_path, records)
    assert red_rows(picture, 0) == []
    assert red_rows(picture, 1) == [pytest.approx(256 - 216 / 1.1, abs=1)]
    assert red_rows(picture, 2) == []
    assert red_rows(picture, 3) == []
    picture = curves(tmp_path, records, knn_pixels=25, low_rank=0.5)
    assert red_rows(picture, 2) == [pytest.approx(256 - 216 / 4, abs=1)]
    assert red_rows(picture, 3) == [pytest.approx(256 - 216 / 2, abs=1)]
