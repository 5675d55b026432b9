"""A folder of images: which of them are to train on and which to validate with, and what their classes are.

A class is a folder of the training split that has images below. One class alone is nothing to classify. A
folder called images, alone or beside masks/ and the like, isn't a class: it holds the images. If a validation
split can't be used, a note says why: pre-training goes on without it, and an evaluation ends with the same
words. Class folders alone have no validation split: they are classes only if a share of each is to be held
out.
"""
import os
import re
import unicodedata
from typing import NamedTuple

import numpy as np

from ..common.errors import Refused
from .lists import read_lines, suffix_of
from .source import Source
from .tars import plain
from .walk import REASONS, key


def named(words):
    """A pattern for names of splits, in lower case, with what people put around them: train2017,
    training_set, val_images; ILSVRC2012_img_val.tar as it is downloaded."""
    return re.compile(rf"(ilsvrc\d+_img_)?({words})([-_ ]?(set|data|split|images))?[-_]?\d*")


TRAIN = named("train|training")
PARTS = re.compile(r"(part|shard|chunk)[-_]?\d\d+|fold[-_ ]?\d+")  # names of folders of any images: part-0012
VAL = [named("val"), named("valid|validation"), named("test|testing")]  # the first that is there
# A folder of the first names holds the images of the folder that it is in, alone or beside one of the second.
IMAGES = set("images image imgs img jpegimages".split())
BESIDE = set("labels masks mask annotations segmentation segmentations segmentationclass segmentationobject "
             "depth trimaps gt ground_truth groundtruth".split())


class Validation(NamedTuple):
    """Which images judge: by default those of the first of VAL that is there."""
    name: object = None   # of the folder, beside train/
    share: object = None  # of each class, held out of the training images
    seed: int = 0         # chooses which


def find_splits(listing, wanted):
    """What is below a folder (walk.Listing) -> training Source, validation Source or None

    What a split takes leaves the listing's tree; the images that are still there at the end count as left
    out. The listing's notes say what was chosen. Raises Refused if several folders could be the training
    split.
    """
    val = None
    parent = parent_of_splits(listing)
    if parent is None:
        train = without_splits(listing, wanted)
    else:
        judge = wanted.name and os.fsencode(os.path.normpath(wanted.name))
        train = training_split(listing, parent, judge)
        if not wanted.share:
            val = validation_split(listing, parent, train.classes, judge)
    if listing.has_links:
        known = inodes(train)
        if twice := len(known) - len(set(known)):
            listing.notes.append(f"{twice} training images are there twice, by links")
        if val and not set(known).isdisjoint(inodes(val)):
            listing.notes.append(f"{val.where} is not used: links in it lead to training images")
            val = None
    depth = 2 if len(listing.tree) <= REASONS // 2 else 1  # what a line can hold
    for place, names in listing.tree.items():
        where = f"in {shown(*place[:depth])}/" if place else "beside them"
        listing.left_out[f"images {where}"] += len(names)
    return train, val


def inodes(source):
    """What all names of an image file have in common; of those in no tar file"""
    return [os.stat(file)[1:3] for file in filter(os.path.isfile, source.names)]  # its number, and the disk's


def shown(*place):
    """A place, for people."""
    return os.fsdecode(b"/".join(place))


def matching(pattern, names):
    """The names (bytes) that match, the shortest, which is the plain one, first."""
    return sorted((name for name in names if pattern.fullmatch(os.fsdecode(name).lower())),
                  key=lambda name: (len(name), name))


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
                      f"name one of them, or train on all without labels: {listing.shell_path()}/*/")
    return parents.pop() if parents else None


def holding_place(listing, place):
    """Where in a place the images or the classes are: the place itself, or the folder images/ in it, or one
    of its own name, as archives unpack."""
    names = {os.fsdecode(name).lower(): name for name in listing.names(place)}
    holding = names.keys() & IMAGES
    if place and list(names.values()) == [place[-1]]:
        inner = place[-1]
    elif len(holding) == 1 and names.keys() - IMAGES <= BESIDE:
        inner = names[holding.pop()]
    else:
        return place
    return holding_place(listing, (*place, inner))


# --- What they are --------------------------------------------------------------------------------------

HOLD_OUT = "--val-share 0.2 holds out a fifth of each class, for kNN and lineval.py"


def class_name(folder):
    """The class of a folder (bytes), in one Unicode form: Linux and macOS write accents in different ones."""
    return unicodedata.normalize("NFC", os.fsdecode(folder))


def class_folders(listing, place):
    """The classes whose folders are in a place, sorted. Shards and numbered parts are none."""
    names = sorted(listing.names(place))
    for name in names:
        if is_part(listing, (*place, name)):
            listing.notes.append(f"{shown(name)} is no class, but a shard or a part of the images: no labels")
            return []
    deeper = [(name, min(inside)) for name in names
              if len(inside := listing.names(holding_place(listing, (*place, name)))) > 1]
    if deeper and not any((*place, name) in listing.tree for name in names):
        examples = ", ".join(map(shown, names[:3]))
        listing.notes.append(f"the classes are {examples}, ...; the folders in each, such as "
                             f"{shown(*deeper[0])}, are not told apart, and with "
                             "--val-share images of one such folder judge each other")
    return sorted(set(map(class_name, names)))


def is_part(listing, place):
    """Whether a folder is a shard, or a numbered part, with images of any class. img2dataset numbers them as
    some data sets number classes, but writes a KEY.json beside each image."""
    *_, name = place
    if place in listing.shards or PARTS.fullmatch(shown(name).lower()):
        return True
    images = listing.tree.get(place)
    return name.isdigit() and images and os.path.exists(
        os.path.join(listing.path(place), key(images[0]) + b".json"))


def without_splits(listing, wanted):
    """All images at any depth -> Source. Of a folder with images/ beside masks/, only the images. They have
    labels, of class folders, if a share of each class is to be held out."""
    place = holding_place(listing, ())
    while place not in listing.tree and len(listing.names(place)) == 1:
        place = (*place, *listing.names(place))
    place = holding_place(listing, place)
    if names := ", ".join(map(shown, candidates(listing.names(place)))):
        listing.notes.append(f"no train/ there: the images in {names}/ are trained on too; name the others "
                             "train/ or, if it is a class, rename it")
        return by_folder(listing, place)
    classes = class_folders(listing, place)
    splits = [name for name in classes if re.search("train|val|test", name.lower())]
    if splits:
        examples = ", ".join(splits[:3])
        listing.notes.append(f"{examples} may be splits: name them train/ and val/ (links will do)")
    elif len(classes) > 1 and not wanted.share:
        examples = ", ".join(classes[:2])
        listing.notes.append(f"{len(classes)} folders look like classes ({examples}, ...): {HOLD_OUT}")
    return by_folder(listing, place, classes if wanted.share else ())


def training_split(listing, parent, judge):
    """The images of train/, and its classes if there are two or more -> Source

    judge   the name of the folder that --val names, or None
    An image outside the class folders has no class, and is left out.
    """
    beside = listing.names(parent)
    name, *_ = matching(TRAIN, beside)
    place = holding_place(listing, (*parent, name))
    classes = class_folders(listing, place)
    masks = [other for other in beside if shown(other).lower() in BESIDE]
    others = beside - {name, *candidates(beside), judge, *masks}
    if others:
        # With labels and val/, it judges what was trained on the others; else the images of both are joined.
        option = "--knn-data " if len(classes) > 1 and candidates(beside) else ""
        folders = " ".join(listing.shell_path(*parent, other) for other in sorted(others))
        listing.notes.append(
            f"{shown(name)}/ is used as the training split: the images beside it are left out; rename it if "
            f"it is a class; to train on them: {folders} {option}{listing.shell_path(*parent)}")
    if len(classes) == 1:
        listing.notes.append(f"one class ({classes[0]}): nothing to classify")
    return by_folder(listing, place, classes)


def validation_split(listing, parent, classes, judge):
    """The images of val/ that have labels, by their folders or by a text file -> Source or None

    classes     of the training split: nothing was learned of a class that it lacks
    judge       the name of the folder to take, or None
    """
    names = [judge] if judge else candidates(listing.names(parent))
    if not names:
        if classes:
            listing.notes.append(f"no validation split (val/ with images): {HOLD_OUT}")
        return None
    name, *_ = names
    place = holding_place(listing, (*parent, name))
    folders = set(map(class_name, listing.names(place)))
    val = None
    if classes is None:
        problem = "the training images have no labels"
    elif folders & set(classes):
        val = by_folder(listing, place, classes)
    elif folders:
        problem = f"{min(folders)} is not a class of the training split"
    else:
        word = name if b"val" not in name.lower() else b"val"
        texts = [os.path.join(folder, word + end)
                 for folder in (listing.path(parent), listing.path((*parent, name)))
                 for end in (b".txt", b"_annotations.txt")]
        val = by_text(listing, place, classes, texts)
        problem = (f"without class folders, it needs a {shown(word)}.txt; on each line an image there, with "
                   "its ending, a space, and its class: a folder of train/, or its number from 0")
    if val is None:
        listing.notes.append(f"{shown(name)}/ is not used: {problem}")
    return val


# --- The images of a split ------------------------------------------------------------------------------

def by_folder(listing, place, classes=()):
    """The images below a place -> Source

    classes     with two or more, only the images in class folders: the others have no class
    """
    numbers = {name: k for k, name in enumerate(classes) if len(classes) > 1}
    taken = {}
    for inside in listing.inside(place):
        if not numbers:
            taken |= dict.fromkeys(listing.take(inside))
        elif inside != place and (name := class_name(inside[len(place)])) in numbers:
            taken |= dict.fromkeys(listing.take(inside), numbers[name])
    return source_of(listing, place, taken, list(numbers))


def source_of(listing, place, taken, classes):
    """Images, {path: the number of its class}, sorted by path -> Source"""
    paths = sorted(taken)
    return Source(
        files=np.array(paths),
        labels=np.array([taken[path] for path in paths]) if classes else None,
        classes=classes or None,
        where=os.fsdecode(listing.path(place)))


def by_text(listing, place, classes, texts):
    """The images of a flat val/ with a class in the first text file that is there -> Source, or None if there
    is none, or its lines aren't clear

    val_annotations.txt of Tiny-ImageNet, or val.txt for ImageNet's 50,000 as they are downloaded: each line
    has an image's name and its class, the name of a training folder or its number as sorted, from 0. We
    guess nothing that could have two meanings: a wrong label would only show as a low accuracy.
    """
    path = next(filter(os.path.isfile, texts), None)
    if path is None:
        return None
    class_of = {}
    for line in read_lines(path):
        image, text, *_ = [*line.split(), b""]
        class_of[os.path.basename(image)] = class_name(text)
    said = {image: class_of.get(plain(image), "") for image in listing.tree[place]}
    numbers = {name: k for k, name in enumerate(classes)}
    if "0" in said.values() and not any(map(str.isdecimal, numbers)):
        numbers = {str(k): k for k in numbers.values()}
    elif all(map(str.isdecimal, numbers)):  # 00007 is 7
        numbers |= {str(int(name)): k for name, k in numbers.items()}
    known = {image: numbers[text] for image, text in said.items() if text in numbers}
    unknown = set(said.values()) - numbers.keys()
    if not known or any(map(str.isdecimal, unknown)):
        return None
    listing.left_out[suffix_of(path)] -= 1
    if absent := len(class_of.keys() - set(map(plain, said))):
        listing.notes.append(f"{absent} images in {os.fsdecode(os.path.basename(path))} are not there")
    listing.tree[place] = [image for image in said if image not in known]
    taken = {os.path.join(listing.path(place), image): k for image, k in known.items()}
    return source_of(listing, place, taken, classes)
