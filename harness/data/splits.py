"""A folder of images: where its training and its validation images are, and what their classes are.

A class is a folder of the training split that has images below. One class alone is nothing to classify. A
folder called images, alone or beside masks/ and the like, is no class: it holds the images. What can't be
used of a validation split is said in a note: pre-training goes on without it, and an evaluation ends with the
same words.
"""
import collections
import os
import re
from typing import NamedTuple

import numpy as np

from ..common.errors import Refused, printable
from .lists import read_lines
from .source import Source
from .tars import gather
from .walk import REASONS, suffix_of

# Names of splits, in lower case, with what people put behind them: train2017, training_set, val_images. A
# folder called test/ stands in where there is no val/.
BEHIND = r"([-_ ]?(set|data|split|images))?[-_]?\d*"
BEFORE = r"(ilsvrc\d+_img_)?"  # ImageNet's tar files as they are downloaded
TRAIN = re.compile(BEFORE + "(train|training)" + BEHIND)
VAL = [re.compile(BEFORE + names + BEHIND) for names in ("val", "(valid|validation)", "(test|testing)")]
# A folder of the first names holds the images of the folder that it is in, alone or beside one of the second.
IMAGES = {"images", "image", "imgs", "img", "jpegimages"}
BESIDE = {"labels", "masks", "mask", "annotations", "segmentation", "segmentations", "segmentationclass",
          "segmentationobject", "depth", "trimaps", "gt", "ground_truth", "groundtruth"}
DEPTH = 6  # so many folders deep, splits are searched for


class Split(NamedTuple):
    """The images of a split. A place is one of walk.Listing's."""
    place: tuple
    labels: dict              # {place: the number of its images' class, or an array; -1: not in the split}
    classes: object = None    # list of names, or None: then numbers say nothing
    labels_from: bytes = b""  # the text file that says the classes


class Unusable(Exception):
    """Why a validation split can't be used."""


def find_splits(listing):
    """What lies below a folder (walk.Listing) -> training Source, validation Source or None, {reason: files
    left out}, notes

    Raises Refused where several folders could be the training split.
    """
    parent = parent_of_splits(listing)
    val = None
    if parent is None:
        train, notes = without_splits(listing)
    else:
        train, notes = training_split(listing, parent)
        val, more = validation_split(listing, parent, train.classes)
        notes += more
        if not val and not more and train.classes:
            notes.append("no validation split (val/ with images)")
        if parent:
            notes.insert(0, f"the splits were found in {shown(*parent)}/")
    splits = [train, val] if val else [train]
    left_out = listing.left_out + others(listing.tree, splits)
    if val and val.labels_from:
        left_out[suffix_of(val.labels_from)] -= 1
    sources = [source_of(listing, split) for split in splits]
    return sources[0], sources[1] if val else None, left_out, notes


def shown(*place):
    """A place, for people."""
    return os.fsdecode(b"/".join(place))


def matching(pattern, names):
    """Those of some names (bytes) that are written like this. The shortest, the plain name, comes first."""
    fitting = [name for name in names if pattern.fullmatch(os.fsdecode(name).lower())]
    return sorted(fitting, key=lambda name: (len(name), name))


# --- Where the splits are -------------------------------------------------------------------------------

def parent_of_splits(listing):
    """The place that has a training split in it, with images below: the root, or else one that is deeper;
    None where there is none.

    Raises Refused where several have one: which is meant, only the user knows.
    """
    parents = set()
    for place in listing.tree:
        for depth, name in enumerate(place[:DEPTH]):
            if matching(TRAIN, [name]):
                parents.add(place[:depth])
                break
    if () in parents:
        return ()
    if len(parents) > 1:
        names = ", ".join(sorted(shown(*parent) for parent in parents))
        raise Refused(f"{os.fsdecode(listing.root)}: several folders in it have a training split: {names}; "
                      "name one of them")
    return parents.pop() if parents else None


def holding_place(listing, place):
    """Where in a place the images or the classes lie: the place itself, or the folder images/ in it."""
    names = {name: os.fsdecode(name).lower() for name in listing.names(place)}
    holding = [name for name, lower in names.items() if lower in IMAGES]
    if len(holding) == 1 and set(names.values()) - IMAGES <= BESIDE:
        return holding_place(listing, (*place, holding[0]))
    return place


def without_splits(listing):
    """All images at any depth, without labels -> Split, notes. Of a folder with images/ beside masks/, only
    the images."""
    place = holding_place(listing, ())
    notes = []
    if names := ", ".join(map(shown, candidates(listing.names(place)))):
        notes.append(f"no train/ there: the images in {names}/ are trained on too")
    return unlabelled(listing, place), notes


def training_split(listing, parent):
    """The images of train/, and its classes where there are two or more -> Split, notes

    An image outside the class folders has no class, and is left out. Raises Refused where two folders could
    be the training split.
    """
    beside = listing.names(parent)
    name, *more = matching(TRAIN, beside)
    if more and name.lower() not in (b"train", b"training"):
        names = ", ".join(map(shown, [name, *more]))
        raise Refused(f"{os.fsdecode(listing.path(parent))}: several training splits: {names}; name one of "
                      "them")
    place = holding_place(listing, (*parent, name))
    classes = sorted(map(os.fsdecode, listing.names(place)))
    if len(classes) > 1:
        return by_class(listing, place, classes), []
    notes = [f"one class ({printable(name)}): nothing to classify" for name in classes]
    if len(beside) > 1 and not candidates(beside):
        notes.append(f"{shown(name)}/ is taken for the training split: the images beside it are left out")
    return unlabelled(listing, place), notes


def unlabelled(listing, place):
    """All images at and below a place -> Split"""
    return Split(place, dict.fromkeys(listing.inside(place), 0))


def by_class(listing, place, classes):
    """The images in the class folders of a place -> Split"""
    number = {os.fsencode(name): k for k, name in enumerate(classes)}
    labels = {inside: number[inside[len(place)]] for inside in listing.inside(place) if inside != place}
    return Split(place, labels, classes)


def source_of(listing, split):
    """The images of a split, sorted by path -> Source"""
    folders = {listing.path(place): listing.tree[place] for place in split.labels}
    labels = np.concatenate(list(map(of_each, folders.values(), split.labels.values())))
    source = Source(
        files=gather(folders),
        labels=labels if split.classes else None,
        classes=split.classes,
        where=os.fsdecode(listing.path(split.place)))
    used = np.flatnonzero(labels >= 0)
    return source.only(used[np.argsort(source.names[used], kind="stable")])


def of_each(folder, label):
    """The labels of a folder's images: one for all, or an array"""
    return np.broadcast_to(label, len(folder.names))


def others(tree, splits):
    """The images that are in no split, counted by where they lie -> Counter

    Two folders deep, or one where that would be more than a line can hold.
    """
    unused = collections.Counter({place: len(folder.names) for place, folder in tree.items()})
    for split in splits:
        for place, label in split.labels.items():
            unused[place] -= int((of_each(tree[place], label) >= 0).sum())
    for depth in (2, 1):
        counted = collections.Counter()
        for place, n in (+unused).items():
            counted[shown(*place[:depth])] += n
        if len(counted) <= REASONS // 2:
            break
    return collections.Counter({f"images in {name}/" if name else "images beside them": n
                                for name, n in counted.items()})


# --- Validation -----------------------------------------------------------------------------------------

def candidates(names):
    """Those of some names that a validation split can have, the best first."""
    return [name for pattern in VAL for name in matching(pattern, names)]


def validation_split(listing, parent, classes):
    """The images of val/ that have labels -> Split or None, notes

    classes     of the training split: a class that it lacks would be one of which nothing was learned
    """
    names = candidates(listing.names(parent))
    if not names:
        return None, []
    try:
        split = labelled_split(listing, parent, names[0], classes)
    except Unusable as problem:
        return None, [f"{shown(names[0])}/ is not used: {problem}"]
    if names[0] == b"val":
        return split, []
    return split, [f"{shown(names[0])}/ is taken for the validation split"]


def labelled_split(listing, parent, name, classes):
    """The images in the class folders of a validation split, or those that a text file says the classes of
    -> Split. Raises Unusable."""
    if classes is None:
        raise Unusable("the training images have no labels")
    place = holding_place(listing, (*parent, name))
    names = listing.names(place)
    unknown = sorted(names - set(map(os.fsencode, classes)))
    if unknown:
        raise Unusable(f"{shown(unknown[0])} is no class of the training split")
    if names:
        return by_class(listing, place, classes)
    path = label_file(listing, parent, name, place)
    labels = read_labels(path, listing.tree[place].names, classes)
    return Split(place, {place: labels}, classes, path)


# --- Labels of a flat validation folder, from a text file beside it ---------------------------------------
# Each line has an image's name and its class, and perhaps more: val_annotations.txt of Tiny-ImageNet has a
# box, and tabs; val.txt, for ImageNet's 50,000 as they are downloaded, has a blank. A class is the name of
# one of the training folders, or its number as sorted, from 0 on. Whatever could be meant in two ways is not
# guessed: a wrong label would only show as a low accuracy.

def label_file(listing, parent, name, place):
    """The text file with the labels of a split of this name, whose images lie at a place -> its path: in the
    split, beside it, or between. Raises Unusable where there is none."""
    names = [name + b".txt", name + b"_annotations.txt", b"val_annotations.txt"]
    if re.search(b"^(ilsvrc.*_)?val", name.lower()):
        names.append(b"val.txt")
    for folder in (place, place[:-1], parent):
        for name_of_file in names:
            path = os.path.join(listing.path(folder), name_of_file)
            if os.path.isfile(path):
                return path
    raise Unusable(f"it has no class folders, and there is no {shown(name)}.txt with labels")


def read_labels(path, images, classes):
    """A file with labels -> the number of the class of each of these images (names), or -1. Raises
    Unusable."""
    text = shown(os.path.basename(path))
    known = set(images)
    said = dict(name_and_class(line, known) for line in read_lines(path))
    said.pop(None, None)
    if not said:
        raise Unusable(f"{text} names none of its images")
    numbers = numbers_of(set(said.values()), classes)
    if numbers is None:
        raise Unusable(f"the classes in {text} are neither names of the training folders nor numbers from 0 "
                       f"to {len(classes) - 1} (numbers count only if a 0 is among them, and no folder is a "
                       "number)")
    return np.array([numbers[said[name]] if name in said else -1 for name in images])


def name_and_class(line, known):
    """An image's name, without folders, and its class: the first two things on a line.

    They are separated by a tab, or by blanks, which a name may hold too: the longest known name counts.
    """
    separator = b"\t" if b"\t" in line else None
    fields = line.split(separator)
    for k in range(len(fields) - 1, 0, -1):
        name = os.path.basename((separator or b" ").join(fields[:k]).strip())
        if name in known:
            return name, fields[k].strip()
    return None, None


def numbers_of(said, classes):
    """{class as a file says it (bytes): its number}; None unless all are names, or all are numbers.

    Folders that are numbers are names, and "1" then is no place among them. Without a 0, numbers may count
    from 1.
    """
    by_name = {os.fsencode(name): k for k, name in enumerate(classes)}
    if said <= by_name.keys():
        return by_name
    by_number = {str(k).encode(): k for k in range(len(classes))}
    folders_are_numbers = any(name.isdigit() for name in by_name)
    if said <= by_number.keys() and b"0" in said and not folders_are_numbers:
        return by_number
    return None
