"""DATA, from the command line to images.

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
from torch.utils.data import ConcatDataset

from ..common.errors import Refused
from . import cifar
from .captions import read_captions
from .images import is_image, range_of_files, sample_headers
from .lists import KINDS, read_list
from .shapes import draw_data_set
from .source import Source
from .splits import find_splits
from .tars import is_tar
from .walk import describe, walk, walk_tar

SMALL = 64  # pixels a side, up to which images of one size are held in memory


class Found(NamedTuple):
    """What a run says of what lies at DATA."""
    layout: str          # in words
    left_out: dict = {}  # {reason: files}
    notes: tuple = ()    # of validation, of classes, of where the images were found


class Data(NamedTuple):
    """What there is to train on, and to validate with."""
    train: Source
    val: object  # Source, or None
    found: Found

    def can_judge(self):
        """Whether there are labels and validation images, which an accuracy needs."""
        return self.train.labels is not None and self.val is not None

    def rows(self):
        """What a run says of it: {heading: text}"""
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

    value_range     two numbers, which become 0 to 255 where values have more than 8 bits; by default a
                    sample of both splits decides
    Raises Refused where there is nothing that can be used.
    """
    return settle(look, path, value_range, hold=True)


def find_data(path, value_range=None):
    """The same, but image files stay files, of which a sample is read."""
    return settle(look, path, value_range, hold=False)


def open_captions(path, value_range=None):
    """The same of a list of images with captions (captions.py), or of the drawn shapes. Sources have
    captions."""
    return settle(look_at_captions, path, value_range, hold=True)


# --- What lies at DATA ----------------------------------------------------------------------------------

def look(path):
    """What lies at a path (text or bytes) -> Data. Names are read, and the labels in text files, but no image
    files. Raises Refused where there is nothing that can be used."""
    if path is None:
        return Data(*draw_data_set(), Found("the drawn shapes"))
    path = os.fsencode(path)
    path = path.rstrip(b"/") or b"/"  # completion puts one behind a folder
    if not os.path.exists(path):
        raise Refused(f"{os.fsdecode(path)}: no such file or folder; give an image folder, a list of files, "
                      "or a CIFAR-10 folder")
    if os.path.isdir(path):
        return look_at_folder(path)
    if is_tar(path):
        return look_at_images("a tar file", walk_tar(path))
    if is_image(path):
        files, layout = [path], "one image"
    else:
        files, layout = read_list(path), "a list of images"
    return Data(Source(files=np.array(files), where=os.fsdecode(path)), None, Found(layout))


def look_at_folder(path):
    """A folder of CIFAR, one around it, or one of images."""
    listing = walk(path)
    layout = cifar.layout_of(path)
    if layout:
        # The archive's own files are not counted, but the images beside them.
        beside = sum(len(folder.names) for folder in listing.tree.values())
        left_out = {"images beside CIFAR's files": beside}
        train, val = cifar.read(path, layout)
        return Data(train, val, Found(f"{layout.name} ({layout.form})", left_out))
    inside = [os.path.join(path, name) for name in cifar.FOLDERS]
    inside = [folder for folder in inside if cifar.layout_of(folder)]
    if listing.tree or not inside:
        return look_at_images("an image folder", listing)
    if len(inside) > 1:
        names = ", ".join(os.fsdecode(os.path.basename(folder)) for folder in inside)
        raise Refused(f"{os.fsdecode(path)}: holds {len(inside)} data sets, {names}; name one of them")
    return look_at_folder(inside[0])


def look_at_images(layout, listing):
    """A folder of images, or a tar file in its place: with splits and classes, or without (splits.py)."""
    if not listing.tree:
        raise Refused(f"{os.fsdecode(listing.root)}: no images there "
                      f"({describe(listing.left_out) or 'it is empty'}); {advice(listing.left_out)}")
    train, val, left_out, notes = find_splits(listing)
    return Data(train, val, Found(layout, left_out, tuple(notes)))


def advice(left_out):
    """What to do with a folder without images: for the most frequent kind of file that we know."""
    for suffix, _ in left_out.most_common():
        if suffix in KINDS:
            return f"{suffix}: {KINDS[suffix]}"
    return "give a folder of JPEG, PNG or other image files"


def look_at_captions(path):
    """A list of images with captions."""
    if path is None:
        return look(None)
    files, captions = read_captions(path)
    train = Source(files=np.array(files), captions=captions, where=os.fsdecode(path))
    return Data(train, None, Found("a list of images with captions"))


# --- What some of the files say -------------------------------------------------------------------------

def settle(find, path, value_range, hold):
    """DATA, as this function finds it -> Data, with the range of its values and, with `hold`, small images in
    memory: the headers of a sample of both splits' files say which."""
    value_range = checked_range(value_range)
    data = find(path)
    sources = [source for source in (data.train, data.val) if source]
    if data.train.pixels is not None:  # drawn, or CIFAR's
        return data
    files = ConcatDataset([source.files for source in sources])
    headers = sample_headers(files)
    if value_range is None:
        value_range = range_of_files([files[i] for i, header in headers.items() if header.is_deep])
    start = 0
    for k, source in enumerate(sources):
        sizes = {header.size for i, header in headers.items() if start <= i < start + len(source)}
        start += len(source)
        sources[k] = replace(source, value_range=value_range)
        if hold and len(sizes) == 1 and max(max(sizes)) <= SMALL:
            sources[k] = in_memory(sources[k], *sizes)
    return data._replace(train=sources[0], val=sources[1] if data.val else None)


def checked_range(value_range):
    """--range as given, or None -> (low, high), or None. Raises Refused for what is no range."""
    if value_range is None:
        return None
    low, high = map(float, value_range)
    if not (low < high and math.isfinite(low) and math.isfinite(high)):
        raise Refused(f"--range {low:g} {high:g}: two finite numbers, the lower one first")
    return low, high


def in_memory(source, size):
    """The same source, its pixels in one tensor, if all its images are of one size: (width, height)."""
    width, height = size
    pixels = torch.empty(len(source), 3, height, width, dtype=torch.uint8)
    for i in range(len(source)):
        image = source.image(i)
        if image.shape != (height, width, 3):  # those of the sample were of one size by chance
            return source
        pixels[i] = image.permute(2, 0, 1)
    return replace(source, pixels=pixels)
