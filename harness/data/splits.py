"""A folder of images: which of them are to train on and which to validate with, and what their classes are.

A class is a folder of the training split that has images below. One class alone is nothing to classify. A
folder called images, alone or beside masks/ and the like, isn't a class: it holds the images. If a validation
split can't be used, a note says why: pre-training goes on without it, and an evaluation ends with the same
words.
"""
import os
import re

import numpy as np

from ..common.errors import Refused, printable
from .lists import read_lines
from .source import Source
from .tars import plain
from .walk import REASONS, suffix_of


def named(words):
    """A pattern for names of splits, in lower case, with what people put around them: train2017,
    training_set, val_images; ILSVRC2012_img_val.tar as it is downloaded."""
    return re.compile(rf"(ilsvrc\d+_img_)?({words})([-_ ]?(set|data|split|images))?[-_]?\d*")


TRAIN = named("train|training")
VAL = [named("val"), named("valid|validation"), named("test|testing")]  # the first that is there
# A folder of the first names holds the images of the folder that it is in, alone or beside one of the second.
IMAGES = {"images", "image", "imgs", "img", "jpegimages"}
BESIDE = {"labels", "masks", "mask", "annotations", "segmentation", "segmentations", "segmentationclass",
          "segmentationobject", "depth", "trimaps", "gt", "ground_truth", "groundtruth"}


def find_splits(listing):
    """What is below a folder (walk.Listing) -> training Source, validation Source or None, notes

    What a split takes leaves the listing's tree; the images that are still there at the end count as left
    out. Raises Refused if several folders could be the training split.
    """
    val = None
    parent = parent_of_splits(listing)
    if parent is None:
        train, notes = without_splits(listing)
    else:
        train, notes = training_split(listing, parent)
        val, more = validation_split(listing, parent, train.classes)
        notes += more
        if parent:
            notes.insert(0, f"the splits were found in {shown(*parent)}/")
    depth = 2 if len(listing.tree) <= REASONS // 2 else 1  # what a line can hold
    for place, names in listing.tree.items():
        where = f"in {shown(*place[:depth])}/" if place else "beside them"
        listing.left_out[f"images {where}"] += len(names)
    return train, val, notes


def shown(*place):
    """A place, for people."""
    return os.fsdecode(b"/".join(place))


def matching(pattern, names):
    """The names (bytes) that match, the shortest, which is the plain one, first."""
    fitting = [name for name in names if pattern.fullmatch(os.fsdecode(name).lower())]
    return sorted(fitting, key=lambda name: (len(name), name))


def candidates(names):
    """The names that a validation split can have, the best first."""
    return [name for pattern in VAL for name in matching(pattern, names)]


# --- Where the splits are -------------------------------------------------------------------------------

def parent_of_splits(listing):
    """The place that has a training split in it: the root, or else one that is deeper; None if there is none.

    Raises Refused if several have one: only the user knows which is meant.
    """
    parents = set()
    for place in listing.tree:
        depths = [depth for depth, name in enumerate(place) if matching(TRAIN, [name])]
        if depths:
            parents.add(place[:depths[0]])
    if () in parents:
        return ()
    if len(parents) > 1:
        names = ", ".join(sorted(shown(*parent) for parent in parents))
        raise Refused(f"{os.fsdecode(listing.root)}: several folders in it have a training split: {names}; "
                      "name one of them")
    return parents.pop() if parents else None


def holding_place(listing, place):
    """Where in a place the images or the classes are: the place itself, or the folder images/ in it, or one
    of its own name, as archives unpack."""
    names = listing.names(place)
    if place and names == {place[-1]}:
        return holding_place(listing, (*place, place[-1]))
    holding = [name for name in names if os.fsdecode(name).lower() in IMAGES]
    others = {os.fsdecode(name).lower() for name in names} - IMAGES
    if len(holding) == 1 and others <= BESIDE:
        return holding_place(listing, (*place, holding[0]))
    return place


# --- What they are --------------------------------------------------------------------------------------

def without_splits(listing):
    """All images at any depth, without labels -> Source, notes. Of a folder with images/ beside masks/, only
    the images."""
    place = holding_place(listing, ())
    notes = []
    if names := ", ".join(map(shown, candidates(listing.names(place)))):
        notes.append(f"no train/ there: the images in {names}/ are trained on too")
    return by_folder(listing, place), notes


def training_split(listing, parent):
    """The images of train/, and its classes if there are two or more -> Source, notes

    An image outside the class folders has no class, and is left out. Raises Refused if two folders could be
    the training split.
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
        return by_folder(listing, place, classes), []
    notes = [f"one class ({printable(name)}): nothing to classify" for name in classes]
    if len(beside) > 1 and not candidates(beside):
        notes.append(f"{shown(name)}/ is used as the training split: the images beside it are left out")
    return by_folder(listing, place), notes


def validation_split(listing, parent, classes):
    """The images of val/ that have labels, by their folders or by a text file -> Source or None, notes

    classes     of the training split: nothing was learned of a class that it lacks
    """
    names = candidates(listing.names(parent))
    if not names:
        return None, ["no validation split (val/ with images)"] if classes else []
    name = shown(names[0])
    place = holding_place(listing, (*parent, names[0]))
    folders = listing.names(place)
    unknown = sorted(folders - set(map(os.fsencode, classes or [])))
    val = problem = None
    if classes is None:
        problem = "the training images have no labels"
    elif unknown:
        problem = f"{shown(unknown[0])} is not a class of the training split"
    elif folders:
        val = by_folder(listing, place, classes)
    else:
        val, problem = by_text(listing, parent, names[0], place, classes)
    if problem:
        return None, [f"{name}/ is not used: {problem}"]
    return val, [] if name == "val" else [f"{name}/ is used as the validation split"]


# --- The images of a split ------------------------------------------------------------------------------

def by_folder(listing, place, classes=None):
    """The images below a place -> Source

    classes     with these, only the images in class folders: the others have no class
    """
    numbers = {os.fsencode(name): k for k, name in enumerate(classes or [])}
    taken = {}
    for inside in listing.inside(place):
        if classes is None:
            taken |= dict.fromkeys(listing.take(inside))
        elif inside != place:
            taken |= dict.fromkeys(listing.take(inside), numbers[inside[len(place)]])
    return source_of(listing, place, taken, classes)


def source_of(listing, place, taken, classes):
    """Images, {path: the number of its class}, sorted by path -> Source"""
    paths = sorted(taken)
    return Source(
        files=np.array(paths),
        labels=np.array([taken[path] for path in paths]) if classes else None,
        classes=classes,
        where=os.fsdecode(listing.path(place)))


def by_text(listing, parent, name, place, classes):
    """The images of a flat val/ with a class in a text file -> Source or None, and what is wrong or None

    val_annotations.txt of Tiny-ImageNet, or val.txt for ImageNet's 50,000 as they are downloaded: each line
    has an image's name and its class, the name of a training folder or its number as sorted, from 0. We
    guess nothing that could have two meanings: a wrong label would only show as a low accuracy.
    """
    word = b"val" if b"val" in name.lower() else name
    beside, inside = listing.path(parent), listing.path((*parent, name))
    paths = [os.path.join(folder, word + end)
             for folder in (beside, inside) for end in (b".txt", b"_annotations.txt")]
    paths = list(filter(os.path.isfile, paths))
    if not paths:
        return None, f"it has no class folders, and there is no {shown(word)}.txt with labels"
    class_of = {}
    for line in read_lines(paths[0]):
        image, *more = line.split()
        class_of[os.path.basename(image)] = more[0] if more else b""
    images = listing.tree[place]
    said = {image: class_of[plain(image)] for image in images if plain(image) in class_of}
    numbers = {os.fsencode(folder): k for k, folder in enumerate(classes)}
    if b"0" in said.values() and not any(map(bytes.isdigit, numbers)):
        numbers = {str(k).encode(): k for k in range(len(classes))}
    if not said or not set(said.values()) <= numbers.keys():
        return None, (f"{shown(os.path.basename(paths[0]))} must have an image and its class on each line: a "
                      "folder of train/, or its number from 0")
    listing.left_out[suffix_of(paths[0])] -= 1
    listing.tree[place] = [image for image in images if image not in said]
    folder = listing.path(place)
    taken = {os.path.join(folder, image): numbers[text] for image, text in said.items()}
    return source_of(listing, place, taken, classes), None
