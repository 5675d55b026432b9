"""DATA, from the command line to images: what lies there is looked at first (layouts.py), then read.

    nothing                                 the drawn shapes (shapes.py)
    a folder of CIFAR-10 or CIFAR-100       or one that holds such a folder (cifar.py)
    train/<class>/..., val/<class>/...      an image folder with labels; val/ is optional
    train/ without class folders            all images below train/, at any depth, without labels
    any other folder                        all images below it, at any depth, without labels
    an uncompressed tar file                the folder in whose place it is, as a tar file below DATA is too
    an image file                           itself
    any other file                          a list: a path on each line, relative to the list

The rule is: every file below DATA is used, or counted in one line that says why not. The classes are the
folders of train/ that have images below; what is no class of train/ makes val/ unusable. Images of one size
up to 64 pixels a side are held in memory; all others stay files, which worker processes decode.
"""
import math
import os
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from ..common.errors import Refused
from . import cifar
from .captions import read_captions
from .images import header, range_of_files
from .layouts import look
from .shapes import draw_data_set
from .source import Source
from .tars import Joined, locate
from .walk import Found, Split, as_files, describe

SMALL = 64  # pixels a side, up to which images of one size are held in memory


class Data(NamedTuple):
    """What there is to train on, and to validate with."""
    train: Source
    val: object   # Source, or None
    found: Found  # how it lies at DATA

    def can_judge(self):
        """Whether there are labels and validation images, which an accuracy needs."""
        return self.train.labels is not None and self.val is not None

    def rows(self):
        """What a run says of it: {heading: text}"""
        train, found = self.train, self.found
        labels = "no labels" if train.labels is None else f"{len(train.classes)} classes"
        place = "files" if train.pixels is None else "in memory"
        text = f"{found.layout}: {len(train)} images, {labels}, {place}, from {found.train.where}"
        if self.val is not None:
            text += f"; validation: {len(self.val)}, from {found.val.where}"
        rows = {"data": text, "left out": describe(found.left_out), "note": "; ".join(found.notes)}
        if train.value_range:
            low, high = train.value_range
            rows["values"] = f"{low:g} to {high:g} become 0 to 255 in files of more than 8 bits (--range)"
        return {heading: text for heading, text in rows.items() if text}


def open_data(path, value_range=None, keep=None):
    """DATA as given by the user -> Data, small images in memory. None: the drawn shapes.

    value_range, keep: see find_data. Raises Refused where there is nothing that can be used.
    """
    data = find_data(path, value_range, keep)
    return data._replace(train=in_memory(data.train), val=data.val and in_memory(data.val))


def open_captions(path, value_range=None, keep=None):
    """The same of a list of images with captions (captions.py), or of the drawn shapes. Sources have
    captions. Nothing is kept."""
    value_range = checked_range(value_range)
    if path is None:
        return open_data(None)
    files, captions = read_captions(path)
    files = as_files(files)
    value_range = value_range or range_of_files(files)
    train = Source(files=files, captions=captions, value_range=value_range)
    found = Found("a list of images with captions", Split(os.fsdecode(path), files))
    return Data(in_memory(train), None, found)


def find_data(path, value_range=None, keep=None):
    """The same, image files not read yet, but for a sample of those of more than 8 bits.

    value_range     two numbers, which become 0 to 255 where values have more than 8 bits. By default the
                    sample decides, which is of both splits
    keep            the folder in which the indexes of tar files are kept, or None
    """
    value_range = checked_range(value_range)
    if path is None:
        return Data(*draw_data_set(), Found("the drawn shapes", Split("this program"), Split("this program")))
    found = look(path, keep)
    if found.train.layout:
        return Data(cifar.read_split(found.train), cifar.read_split(found.val), found)
    splits = [split for split in (found.train, found.val) if split]
    files = [locate(split.files, found.tars) for split in splits]
    value_range = value_range or range_of_files(Joined(files))
    sources = [Source(files=its_files, labels=split.labels, classes=split.classes, value_range=value_range)
               for its_files, split in zip(files, splits)]
    return Data(sources[0], sources[1] if found.val else None, found._replace(tars=()))  # they are large


def checked_range(value_range):
    """--range as given, or None -> (low, high), or None. Raises Refused for what is no range."""
    if value_range is None:
        return None
    low, high = map(float, value_range)
    if not (low < high and math.isfinite(low) and math.isfinite(high)):
        raise Refused(f"--range {low:g} {high:g}: two finite numbers, the lower one first")
    return low, high


def in_memory(source):
    """The same source, its pixels in one tensor, if all images are small and of one size.

    It compares the sizes of 16 files first, so that large data sets are not opened whole.
    """
    if source.pixels is not None:
        return source
    looked_at = np.linspace(0, len(source) - 1, 16).astype(int)
    sizes = {header(source.files[i], lambda image: image.size) for i in looked_at} - {None}
    if len(sizes) != 1:
        return source
    (width, height), = sizes  # of all that could be read
    if max(width, height) > SMALL:
        return source
    pixels = torch.empty(len(source), 3, height, width, dtype=torch.uint8)
    for i in range(len(source)):
        image = source.image(i)
        if image.shape != (height, width, 3):  # the 16 were of one size by chance
            return source
        pixels[i] = image.permute(2, 0, 1)
    return replace(source, pixels=pixels)
