"""harness, pictures.py: pixels of the pictures, against the places where the numbers belong."""
import numpy as np
import torch
from PIL import Image

from harness.data.source import Source
from harness.common import pictures
from harness.evaluation import result

RED = (200, 0, 0)
GREEN = (0, 200, 0)
BLUE = (0, 0, 200)
GREY = (99, 99, 99)
RIGHT = (42, 157, 58)   # the frame of a neighbour of the same class
WRONG = (214, 39, 40)
LINE = (31, 78, 156)


def source_of(colours, labels):
    """Images of 8 x 8 pixels, each of one colour."""
    pixels = torch.empty(len(colours), 3, 8, 8, dtype=torch.uint8)
    pixels.copy_(torch.tensor(colours)[:, :, None, None])
    return Source(pixels=pixels, labels=np.array(labels), classes=["one", "two with a very long name"])


def test_neighbors_are_the_nearest_and_framed_by_class(tmp_path):
    """Each tile's colour against the cosines, done by hand; its frame's against the class."""
    train = source_of([RED, GREEN, BLUE], [0, 1, 0])
    val = source_of([GREY], [0])
    bank = torch.tensor([[1.0, 0.0], [0.0, 5.0], [3.0, 3.0]])
    query = torch.tensor([[2, 0.1]])
    found = result.neighbors(train, val, bank, query, columns=3)
    pictures.draw_neighbors(tmp_path / "n.png", train, val, *found, tile=20)
    sheet = Image.open(tmp_path / "n.png")
    expected = {  # middles of tiles of 20 pixels with frames of 3, and gaps of 6 between them
        13: (GREY, (0, 0, 0)),
        45: (RED, RIGHT),
        77: (BLUE, RIGHT),
        109: (GREEN, WRONG)}
    for x, colours in expected.items():
        shown = sheet.getpixel((x, 13)), sheet.getpixel((x, 1))
        assert shown == colours


def test_neighbors_are_shown_for_each_class_in_turn():
    """Of 40 validation images, ten different ones of all four classes, sorted by class."""
    val = source_of([GREY] * 40, np.arange(40) % 4)
    train = [RED] * 6
    chosen, _ = result.neighbors(train, val, torch.randn(6, 3), torch.randn(40, 3))
    assert len(set(chosen)) == 10
    counts = np.bincount(val.labels[chosen])
    assert counts.tolist() == [3, 2, 2, 3]
    assert np.all(np.diff(val.labels[chosen]) >= 0)


def record(epoch, loss=None, std=None, knn=None, rank=None):
    """A log's record of an epoch, as far as the curves need it."""
    return {"epoch": epoch, "loss": loss, "std": std, "knn": knn, "rank": rank}


def panels(tmp_path, records):
    """The four panels of these records' curves: arrays (300, 420, 3)"""
    pictures.draw_curves(tmp_path / "curves.png", records, None, -1, None)
    picture = np.array(Image.open(tmp_path / "curves.png"))
    above, below = picture.reshape(2, 300, 2, 420, 3)
    return [*above.swapaxes(0, 1), *below.swapaxes(0, 1)]


def middle_of(panel, colour):
    """Where a panel has this colour: the mean (x, y)."""
    y, x = np.nonzero((panel == colour).all(axis=2))
    return x.mean(), y.mean()


def test_curves_show_each_value_in_its_place(tmp_path):
    """A point in each panel, against its place on axes from 58 to 404 and from 256 up to 40.

    For a loss beyond its axis, the axis grows: the value is at its upper end.
    """
    middle = record(2, loss=-0.5, std=0.55, knn=50, rank=0.5)
    for panel in panels(tmp_path, [record(0), middle, record(4)]):
        assert np.allclose(middle_of(panel, LINE), (231, 148), atol=0.6)
    loss, *_ = panels(tmp_path, [record(0), record(1, loss=3.0)])
    assert np.allclose(middle_of(loss, LINE), (404, 40), atol=1.5)
