"""DATA, from the command line to images.

    nothing                                 the drawn shapes (shapes.py)
    a folder of CIFAR-10 or CIFAR-100       or one that holds such a folder (cifar.py)
    train/<class>/..., val/<class>/...      an image folder with labels; val/ is optional
    <class>/..., or train/<class>/... alone     the same, if a share of each class is to be held out
    train/ without class folders            all images below train/, at any depth, without labels
    any other folder                        all images below it, at any depth, without labels
    an uncompressed tar file                as the folder whose place it takes; so is a tar file below DATA
    an image file                           itself
    any other file                          a list: a path on each line, relative to the list
    several of them                         their training images, without labels

The rule: every file below DATA is used, or counted in one line that says why not. Images of one size up to 64
pixels a side are held in memory; all others stay files, which worker processes decode.
"""
import collections
import contextlib
import os
import re
import textwrap
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from ..common.draws import HELD_OUT, uniforms
from ..common.errors import Away, Refused
from ..common.machine import check_memory
from . import cifar
from .captions import read_captions
from .images import is_image, range_of, sample
from .lists import KINDS, read_list
from .shapes import draw_data_set
from .source import Source
from .splits import Validation, find_splits
from .tars import is_tar, open_bytes, size_of
from .walk import describe, walk

SMALL = 64  # pixels a side, up to which images of one size are held in memory


class Found(NamedTuple):
    """What a run says about DATA."""
    layout: str          # in words
    left_out: collections.Counter = collections.Counter()  # {reason: files}
    notes: tuple = ()    # on validation, on classes, on where the images were found

    def noting(self, text):
        """The same, with one note more."""
        return self._replace(notes=(*self.notes, text))


class Data(NamedTuple):
    """What there is to train on, and to validate with."""
    train: Source
    val: object  # Source, or None
    found: Found

    def can_judge(self):
        """Whether there are labels and validation images, which an accuracy needs."""
        return self.train.labels is not None and self.val is not None

    def refuse(self, text):
        """Raise Refused, and add what was found to the text."""
        raise Refused("; ".join([text, *self.found.notes]))

    def rows(self):
        """What a run says about it: {heading: text}"""
        train, found = self.train, self.found
        labels = "no labels" if train.labels is None else f"{len(train.classes)} classes"
        place = "files" if train.pixels is None else "in memory"
        text = f"{found.layout}: {len(train):,} images, {labels}, {place}, from {train.where}"
        if self.val is not None:
            text += f"; validation: {len(self.val):,}, from {self.val.where}"
            judged = len(np.unique(self.val.labels))
            if judged < len(train.classes):
                text += f", of {judged} of the classes alone"
        rows = {"data": text, "left out": describe(found.left_out), "note": "; ".join(found.notes)}
        if train.value_range:
            low, high = train.value_range
            rows["values"] = f"{low:g} to {high:g} become 0 to 255 in files of more than 8 bits (--range)"
        return {heading: text for heading, text in rows.items() if text}


def open_data(path, value_range=None, wanted=Validation()):
    """DATA as given by the user -> Data, small images in memory. None: the drawn shapes. A list: several.

    value_range     two numbers, which become 0 to 255 in files of more than 8 bits; by default a sample of
                    both splits decides
    wanted          which images judge (splits.Validation)
    Raises Refused if nothing there can be used.
    """
    return settle(with_validation(find(path, wanted), wanted), value_range, hold=True)


def find_data(path, value_range=None):
    """The same, but image files stay files."""
    return settle(find(path), value_range, hold=False)


def open_captions(path, value_range=None, wanted=Validation()):
    """The same of a list of images with captions (captions.py), or of the drawn shapes."""
    if path is None:
        return open_data(None, None, wanted)
    if isinstance(path, list) or wanted.name or wanted.share:
        raise Refused("captions come in one list, without --val, --val-share and --knn-data")
    files, captions = read_captions(path)
    train = Source(files=np.array(files), captions=captions, where=os.fsdecode(path))
    return settle(Data(train, None, Found("a list of images with captions")), value_range, hold=True)


# --- What is at DATA ------------------------------------------------------------------------------------

def find(path, wanted=Validation()):
    """What is at a path (text or bytes), or at several -> Data. It reads names, and labels in text files, but
    no image files."""
    if isinstance(path, list):
        return together(path)
    if path is None:
        return Data(*draw_data_set(), Found("the drawn shapes"))
    path = os.path.abspath(os.fsencode(path))  # without the slash that completion puts behind a folder
    if not os.path.exists(path):
        raise Refused(f"{os.fsdecode(path)}: no such file or folder; give an image folder, a list of files, "
                      "or a CIFAR-10 folder")
    if is_tar(path) or os.path.isdir(path) and not path.endswith(b".zarr"):  # which is a folder
        return find_in_folder(path, wanted)
    files = [path] if is_image(path) else read_list(path)
    train = Source(files=np.array(files), where=os.fsdecode(path))
    return Data(train, None, Found("image files"))


def find_in_folder(path, wanted):
    """A folder of CIFAR, one around it, or one of images; or a tar file in its place."""
    shown = os.fsdecode(path)
    listing = walk(path)
    layout = cifar.layout_of(shown)
    if layout:
        return Data(*cifar.read(shown, layout), Found(
            f"{layout.name} ({layout.form})",
            collections.Counter({
                "images beside its files": sum(map(len, listing.tree.values()))})))
    advice = "give a folder of files that end in .jpg, .png, ...; a list takes those without an ending, too"
    for suffix in reversed(KINDS):  # the last that is there tells least about the others
        if suffix in listing.left_out:
            advice = f"{suffix}: {KINDS[suffix]}"
    inside = [folder for name in cifar.FOLDERS
              if cifar.layout_of(folder := os.path.join(shown, name))]
    if inside:
        if len(inside) == 1 and not listing.tree:
            return find(inside[0])
        advice = f"CIFAR is there too, and left out; name its folder to use it: {', '.join(inside)}"
        listing.notes.append(advice)
    if listing.tree:
        train, val = find_splits(listing, wanted)
        return Data(train, val, Found("an image folder", listing.left_out, tuple(listing.notes)))
    raise Refused(f"{shown}: no images there ({describe(listing.left_out) or 'it is empty'}); {advice}")


def together(paths):
    """The training images at these paths, without labels -> Data. A file at two of them counts once."""
    parts = [find(path) for path in paths]
    if any(part.train.files is None for part in parts):
        raise Refused("CIFAR and the drawn shapes can't be joined with other images, nor go with --knn-data")
    files = np.unique(np.concatenate([part.train.files for part in parts]))
    left_out = collections.Counter()
    known = [os.path.abspath(path) for path in paths]
    for path, part in zip(known, parts):
        below = {other for other in known if path != other and os.path.commonpath([path, other]) == path}
        for reason, count in part.found.left_out.items():
            place = os.path.join(path, reason.removeprefix("images in ").rstrip("/"))
            if not any(os.path.commonpath([place, other]) == other for other in below):
                left_out[reason] += count  # the others are taken there
        left_out["validation images"] += len(part.val or ())
    train = Source(files=files, where=textwrap.shorten(", ".join(paths), 200))
    return Data(train, None, Found("training images alone", left_out))


def with_validation(data, wanted):
    """The same data, judged by the images that are wanted. Raises Refused if there are none."""
    train, val, found = data
    if wanted.name and (val is None or train.pixels is not None):
        data.refuse(f"--val {wanted.name}: must be a folder beside train/, with images of its classes")
    if not wanted.share:
        return data
    if train.labels is None or val is not None or np.bincount(train.labels).max() < 2:
        data.refuse("--val-share needs class folders, alone or in train/, of two images or more")
    # Every fifth, for instance, of the images sorted by class, and within a class at random.
    chance = uniforms(wanted.seed, 0, np.arange(len(train)), HELD_OUT, 0)
    order = np.lexsort((chance, train.labels))
    held = order[np.arange(0, len(train), 1 / wanted.share).astype(int)]
    held = held[np.bincount(train.labels)[train.labels[held]] > 1]  # no class loses its only image
    val = replace(train.only(np.sort(held)), where=f"{wanted.share:g} of each class in {train.where}")
    train = train.only(np.setdiff1d(order, held))
    origins = {re.sub(rb"\d+\D*$", b"", name) for name in train.names}
    if 3 * len(train.classes) < len(origins) < len(train) / 2:  # fewer can be parts of a class's name
        found = found.noting(
            f"images of one patient, or video ({os.fsdecode(min(origins))}...?) judge each other: make val/")
    return Data(train, val, found)


# --- What a sample of the files decides -----------------------------------------------------------------

def settle(data, value_range, hold):
    """The same data with the range of its values and, with `hold`, small images in memory."""
    if value_range is not None:
        low, high = value_range = tuple(map(float, value_range))
        if not low < high:
            raise Refused(f"--range must be two numbers, the lower one first, not {low:g} {high:g}")
    if data.train.pixels is not None:  # drawn, or CIFAR's
        return data
    found = data.found
    sources = [source for source in (data.train, data.val) if source]
    values, further, clear = zip(*[sample(source.files) for source in sources])
    if sum(clear):
        found = found.noting(
            f"{sum(clear)} images (in a sample) have transparent parts, where hidden colours show; to paint "
            "those: magick mogrify -background white -flatten FILES")
    if sum(further):
        found = found.noting(
            f"{sum(further)} frames after the first, or bands after the third, are not read (in a sample)")
    values = sum(values, [])
    if value_range is None and values:
        value_range = range_of(np.concatenate(values))
    sources = [replace(source, value_range=value_range) for source in sources]
    if hold:
        sources = map(in_memory, sources)
    train, val, *_ = [*sources, None]
    if val and (copies := copied(train, val)):
        found = found.noting(
            f"{len(copies)} of the {len(val)} images that judge are copies of training images "
            f"({os.fsdecode(val.names[copies[0]])}, ...): the accuracy is too high; keep one of each")
    return Data(train, val, found)


def copied(train, val):
    """Which images that judge are training images too: indices. We compare pixels in memory, or files' bytes;
    but no files of large data sets, because on a network disk the sizes of a million take minutes."""
    if train.pixels is not None and val.pixels is not None:
        known = {hash(x.numpy().tobytes()) for x in train.pixels}
        return [i for i, x in enumerate(val.pixels) if hash(x.numpy().tobytes()) in known]
    if max(len(train), len(val)) > 100_000:
        return []
    with contextlib.suppress(OSError, Away):
        of_train, of_val = by_size(train), by_size(val)
        common = of_train.keys() & of_val.keys()
        known = {hash_of(train.files[k]) for size in common for k in of_train[size]}
        return sorted(i for size in common for i in of_val[size] if hash_of(val.files[i]) in known)
    return []


def by_size(source):
    """{bytes of a file: indices of the files that have so many}"""
    found = collections.defaultdict(list)
    for i, path in enumerate(source.files):
        found[size_of(path)].append(i)
    return found


def hash_of(path):
    """A number that tells this file from all others, within this process."""
    with open_bytes(path) as file:
        return hash(file.read())


def in_memory(source):
    """The same source, its pixels in one tensor, if all its images are small and of one size."""
    shape = source.image(0).shape
    if max(shape) > SMALL:
        return source
    pixels = torch.empty(len(source), 3, *shape[:2], dtype=torch.uint8)
    for i in range(len(source)):
        image = source.image(i)
        if image.shape != shape:
            return source
        if i == 1000:  # so all others may be of the same size; fewer take some megabytes
            check_memory(pixels.nbytes, f"{source.where}: {len(source):,} images in memory")
        pixels[i] = image.permute(2, 0, 1)
    return replace(source, pixels=pixels)
