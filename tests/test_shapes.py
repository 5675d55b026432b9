"""harness, shapes.py: the drawn data set is the same everywhere, and only form tells its classes apart."""
import hashlib

import numpy as np
import PIL
import pytest
import torch

from harness.data import shapes

DIGEST = "683467bb83380d32"  # of images 0 to 29 of seed 3, drawn by Pillow 13.0.0


def test_shapes_are_the_same_pixels_for_the_same_seed():
    """A part drawn alone equals that part of a longer draw."""
    a = shapes.draw_shapes(3, 0, 30)
    b = shapes.draw_shapes(3, 10, 20)
    assert torch.equal(a.pixels[10:], b.pixels)
    assert a.labels.tolist() == list(range(10)) * 3
    assert b.labels.tolist() == list(range(10)) * 2
    assert not torch.equal(a.pixels, shapes.draw_shapes(4, 0, 30).pixels)


@pytest.mark.skipif(PIL.__version__ != "13.0.0", reason="another Pillow may round otherwise")
def test_shapes_have_the_pixels_that_they_always_had():
    """A hash from when the data set was made."""
    pixels = shapes.draw_shapes(3, 0, 30).pixels.numpy()
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == DIGEST


def colour_statistics(source):
    """Means, standard deviations and quartiles of the channels: (N, 15)"""
    x = source.pixels.flatten(2).double().numpy()
    quartiles = np.quantile(x, (0.25, 0.5, 0.75), axis=2)
    s = np.hstack([x.mean(2), x.std(2), *quartiles])
    return (s - s.mean(0)) / s.std(0)


def test_shapes_cannot_be_told_apart_by_colour_statistics():
    """Nearest neighbours by colour statistics are hardly better than chance, 10%."""
    train = shapes.draw_shapes(0, 0, 800)
    val = shapes.draw_shapes(0, 800, 400)
    bank = colour_statistics(train)
    hits = 0
    for query, label in zip(colour_statistics(val), val.labels):
        distance = ((bank - query) ** 2).sum(axis=1)
        nearest = np.argsort(distance)[:20]
        guess = np.bincount(train.labels[nearest], minlength=10).argmax()
        hits += guess == label
    assert hits / len(val) < 0.25
