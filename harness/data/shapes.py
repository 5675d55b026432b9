"""Shapes: a data set for which nothing is downloaded. Ten kinds of object, told apart by their form alone.

Colours, place, size, rotation, ground and clutter don't depend on the kind, so that no statistic of colour
tells it. The object is always lighter than its ground. Otherwise "lighter or darker" would be one bit that
no augmentation takes away, and SimSiam would learn that first.

As with CIFAR-10, the images are the same whatever the seed of a run, so that runs can be compared. Each has a
caption, too, which says what was drawn (harness/data/captions.py).
"""
import itertools
import multiprocessing
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..common.machine import cores
from ..common.draws import SHAPES, uniforms
from .captions import describe
from .source import Source

TRAINING = 12_000    # images of the data set
VALIDATION = 1_000
SIDE = 16  # pixels
SCALE = 4  # images are drawn this much larger and averaged down, for smooth edges


# --- The ten objects -------------------------------------------------------------------------------------

def box(left, top, right, bottom):
    """A rectangle's corners as complex numbers."""
    return [complex(left, top), complex(right, top), complex(right, bottom), complex(left, bottom)]


TRIANGLE = np.exp(2j * np.pi * np.arange(3) / 3)

# Each object lies in the unit disc of the complex plane. A list of points is a polygon, filled; a tuple is
# a disc: its centre, its radius, and 255 to paint it or 0 to cut it out.
OBJECTS = {
    "disc": [(0, 0.85, 255)],
    "ring": [(0, 1, 255), (0, 0.6, 0)],
    "crescent": [(0, 1, 255), (0.55, 0.7, 0)],
    "triangle": [TRIANGLE],
    "cross": [box(-1, -0.28, 1, 0.28), box(-0.28, -1, 0.28, 1)],
    "bars": [box(-0.8, -0.8, 0.8, -0.4), box(-0.8, -0.2, 0.8, 0.2), box(-0.8, 0.4, 0.8, 0.8)],
    "dots": [(-0.55 - 0.35j, 0.38, 255), (0.55 - 0.35j, 0.38, 255), (0.6j, 0.38, 255)],
    "arrow": [box(-1, -0.2, 0.1, 0.2), [0.05 - 0.7j, 1, 0.05 + 0.7j]],
    "pair": [(-0.6, 0.4, 255), (0.6, 0.4, 255)],
    "corner": [box(-0.8, -0.8, -0.35, 0.8), box(-0.8, 0.35, 0.8, 0.8)],
}


# --- Drawing them ----------------------------------------------------------------------------------------

def draw_data_set():
    """The drawn data set -> (train Source, val Source). All cores draw, because it takes seconds."""
    pieces = np.array_split(np.arange(TRAINING + VALIDATION), 64)
    with multiprocessing.Pool(cores()) as pool:
        drawn = list(itertools.chain(*pool.map(partial(draw_images, 0), pieces)))
    return as_source(drawn[:TRAINING], 0), as_source(drawn[TRAINING:], TRAINING)


def draw_shapes(seed, start, count, side=SIDE):
    """Images start ... start + count - 1 of the shapes of this seed, `side` pixels each -> Source. The
    kinds take turns."""
    return as_source(draw_images(seed, np.arange(start, start + count), side), start)


def draw_images(seed, index, side=SIDE):
    """The images of these numbers -> [((side, side, 3) uint8, caption), ...]"""
    kinds = list(OBJECTS)
    u = uniforms(seed, 0, index[:, None], SHAPES, np.arange(80))  # 80 numbers an image, more than it needs
    return [draw_shape(kinds[i % len(kinds)], iter(u_i), side) for i, u_i in zip(index, u)]


def as_source(drawn, start):
    """What draw_images gives, from image number `start` on -> Source"""
    images, captions = zip(*drawn)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # (N, 3, side, side)
    labels = np.arange(start, start + len(images)) % len(OBJECTS)
    return Source(pixels=pixels.contiguous(), labels=labels, classes=list(OBJECTS), captions=list(captions),
                  where="harness/data/shapes.py")


def draw_shape(kind, u, side):
    """One image of this kind -> (side, side, 3) uint8, and its caption. u: an iterator over uniform numbers,
    taken in a fixed order."""
    big = SCALE * side

    def colour(low, high):
        return tuple(int(low + (high - low) * next(u)) for _ in range(3))

    # The ground: a ramp from one dark colour to another, turned at random; the resize cuts its corners off.
    ramp = Image.linear_gradient("L").rotate(360 * next(u))
    ramp = ramp.resize((big, big), box=(37, 37, 219, 219))
    grounds = [Image.new("RGB", (big, big), colour(0, 90)) for _ in range(2)]
    image = Image.composite(*grounds, ramp)
    pen = ImageDraw.Draw(image)
    for _ in range(8):  # strokes of clutter, under the object
        x, y, dx, dy = (big * next(u) for _ in range(4))
        end = x + (dx - big / 2) / 2, y + (dy - big / 2) / 2
        pen.line((x, y, *end), fill=colour(40, 110), width=SCALE)
    # The object: its size, place and rotation. All kinds are drawn from the same numbers.
    size = next(u)
    radius = big * (0.28 + 0.16 * size)
    room = big - 2 * radius  # where the centre may lie, so that the object stays within the image
    place = complex(next(u), next(u))
    centre = radius * (1 + 1j) + room * place
    turn = next(u)
    mask = draw_object(kind, big, centre, radius, radius * np.exp(2j * np.pi * turn))
    paint = colour(150, 256)
    image.paste(paint, mask=mask)
    caption = describe(kind, size, place, turn, paint, wording=next(u))
    return np.array(image.reduce(SCALE)), caption


def draw_object(kind, side, centre, radius, turned):
    """The object's mask, side x side, 255 where it is. turned: a complex number, the radius times the
    rotation."""
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    for part in OBJECTS[kind]:
        if isinstance(part, tuple):
            place, share, fill = part
            at = centre + turned * place
            r = radius * share
            pen.circle((at.real, at.imag), r, fill=fill)
        else:
            points = centre + turned * np.array(part)
            pen.polygon([(z.real, z.imag) for z in points], fill=255)
    return mask
