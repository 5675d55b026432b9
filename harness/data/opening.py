"""DATA, from the command line to images.

    nothing                                 the drawn shapes (shapes.py)
    a folder of CIFAR-10 or CIFAR-100       or one that holds such a folder (cifar.py)
    train/<class>/..., val/<class>/...      an image folder with labels; val/ is optional
    train/ without class folders            all images below train/, at any depth, without labels
    any other folder                        all images below it, at any depth, without labels
    an uncompressed tar file                as the folder whose place it takes; so is a tar file below DATA
    an image file                           itself
    any other file                          a list: a path on each line, relative to the list

The rule: every file below DATA is used, or counted in one line that says why not. Images of one size up to 64
pixels a side are held in memory; all others stay files, which worker processes decode.
"""
import os
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from ..common.errors import Refused
from . import cifar
from .captions import read_captions
from .images import is_image, range_of, sample
from .lists import KINDS, read_list
from .shapes import draw_data_set
from .source import Source
from .splits import find_splits
from .tars import is_tar
from .walk import describe, walk, walk_tar

SMALL = 64  # pixels a side, up to which images of one size are held in memory


class Found(NamedTuple):
    """What a run says about DATA."""
    layout: str          # in words
    left_out: dict = {}  # {reason: files}
    notes: tuple = ()    # on validation, on classes, on where the images were found


class Data(NamedTuple):
    """What there is to train on, and to validate with."""
    train: Source
    val: object  # Source, or None
    found: Found

    def can_judge(self):
        """Whether there are labels and validation images, which an accuracy needs."""
        return self.train.labels is not None and self.val is not None

    def rows(self):
        """What a run says about it: {heading: text}"""
        train, found = self.train, self.found
        labels = "no labels" if train.labels is None else f"{len(train.classes)} classes"
        place = "files" if train.pixels is None else "in memory"
        text = f"{found.layout}: {len(train)} images, {labels}, {place}, from {train.where}"
        if self.val is not None:
            text += f"; validation: {len(self.val)}, from {self.val.where}"
        rows = {"data": text, "left out": describe(found.left_out), "note": "; ".join(found.notes)}
        if train.value_range:
            low, high = train.value_range
            rows["values"] = f"{low:g} to {high:g} become 0 to 255 in files of more than 8 bits (--range)"
        return {heading: text for heading, text in rows.items() if text}


def open_data(path, value_range=None):
    """DATA as given by the user -> Data, small images in memory. None: the drawn shapes.

    value_range     two numbers, which become 0 to 255 in files of more than 8 bits; by default a sample of
                    both splits decides
    Raises Refused if nothing there can be used.
    """
    return settle(find(path), value_range, hold=True)


def find_data(path, value_range=None):
    """The same, but image files stay files."""
    return settle(find(path), value_range, hold=False)


def open_captions(path, value_range=None):
    """The same of a list of images with captions (captions.py), or of the drawn shapes."""
    if path is None:
        return open_data(None)
    files, captions = read_captions(path)
    train = Source(files=np.array(files), captions=captions, where=os.fsdecode(path))
    return settle(Data(train, None, Found("a list of images with captions")), value_range, hold=True)


# --- What is at DATA ------------------------------------------------------------------------------------

def find(path):
    """What is at a path (text or bytes) -> Data. It reads names, and labels in text files, but no image
    files."""
    if path is None:
        return Data(*draw_data_set(), Found("the drawn shapes"))
    path = os.fsencode(path)
    path = path.rstrip(b"/") or b"/"  # completion puts one behind a folder
    if not os.path.exists(path):
        raise Refused(f"{os.fsdecode(path)}: no such file or folder; give an image folder, a list of files, "
                      "or a CIFAR-10 folder")
    if os.path.isdir(path) and not path.endswith(b".zarr"):  # which is a folder
        return find_in_folder(path)
    if is_tar(path):
        return find_images("a tar file", walk_tar(path))
    if is_image(path):
        layout, files = "one image", [path]
    else:
        layout, files = "a list of images", read_list(path)
    train = Source(files=np.array(files), where=os.fsdecode(path))
    return Data(train, None, Found(layout))


def find_in_folder(path):
    """A folder of CIFAR, one around it, or one of images."""
    layout = cifar.layout_of(path)
    if layout:
        return Data(*cifar.read(path, layout), Found(f"{layout.name} ({layout.form})"))
    listing = walk(path)
    inside = [os.path.join(path, name) for name in cifar.FOLDERS]
    inside = [folder for folder in inside if cifar.layout_of(folder)]
    if listing.tree or not inside:
        return find_images("an image folder", listing)
    if len(inside) > 1:
        names = ", ".join(map(os.fsdecode, inside))
        raise Refused(f"{os.fsdecode(path)}: has several data sets in it; name one of them: {names}")
    return find_in_folder(inside[0])


def find_images(layout, listing):
    """A folder of images, or a tar file in its place: with splits and classes, or without (splits.py)."""
    if not listing.tree:
        advice = "give a folder of JPEG, PNG or other image files"
        for suffix, _ in reversed(listing.left_out.most_common()):
            if suffix in KINDS:
                advice = f"{suffix}: {KINDS[suffix]}"
        raise Refused(f"{os.fsdecode(listing.root)}: no images there "
                      f"({describe(listing.left_out) or 'it is empty'}); {advice}")
    train, val, notes = find_splits(listing)
    return Data(train, val, Found(layout, listing.left_out, tuple(notes)))


# --- What a sample of the files decides -----------------------------------------------------------------

def settle(data, value_range, hold):
    """The same data with the range of its values and, with `hold`, small images in memory."""
    if value_range is not None:
        low, high = value_range = tuple(map(float, value_range))
        if not low < high:
            raise Refused(f"--range must be two numbers, the lower one first, not {low:g} {high:g}")
    if data.train.pixels is not None:  # drawn, or CIFAR's
        return data
    sources = [source for source in (data.train, data.val) if source]
    samples = [sample(source.files) for source in sources]
    values = [deep for _, values in samples for deep in values]
    if value_range is None and values:
        value_range = range_of(np.concatenate(values))
    sources = [replace(source, value_range=value_range) for source in sources]
    if hold:
        sources = [in_memory(source, sizes) for source, (sizes, _) in zip(sources, samples)]
    return Data(sources[0], sources[1] if data.val else None, data.found)


def in_memory(source, sizes):
    """The same source, its pixels in one tensor, if all its images are small and of one size.

    sizes   of a sample: {(width, height)}
    """
    if len(sizes) != 1 or max(max(sizes)) > SMALL:
        return source
    (width, height), = sizes
    pixels = torch.empty(len(source), 3, height, width, dtype=torch.uint8)
    for i in range(len(source)):
        image = source.image(i)
        if image.shape != (height, width, 3):  # the sample was of one size by chance
            return source
        pixels[i] = image.permute(2, 0, 1)
    return replace(source, pixels=pixels)
