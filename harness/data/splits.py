"""A folder of images: where its training and its validation images are, and what their classes are.

A class is a folder of the training split that has images below. One class alone is nothing to classify. A
folder called images, alone or beside masks/ and the like, is no class: it holds the images. What can't be
used of a validation split is said in a note: pre-training goes on without it, and an evaluation ends with the
same words.
"""
import collections
import os
import re

import numpy as np

from ..common.errors import Refused, printable
from .lists import read_lines
from .walk import REASONS, Found, Split, as_files, suffix_of

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


def matching(pattern, names):
    """Those of some names (bytes) that are written like this. The shortest, the plain name, comes first."""
    fitting = [name for name in names if pattern.fullmatch(os.fsdecode(name).lower())]
    return sorted(fitting, key=lambda name: (len(name), name))


def below(images, folder):
    """Those images that lie in a folder, at any depth. images: paths (bytes)."""
    inside = os.path.join(folder, b"")  # "/" stays one slash
    return [image for image in images if image.startswith(inside)]


def place_of(image, root):
    """The folders that an image lies in, from the root on: a list of names (bytes)."""
    return image[len(root):].strip(b"/").split(b"/")[:-1]


# --- Where the splits are -------------------------------------------------------------------------------

def folder_with_splits(root, images):
    """The folder that has a training split in it, with images below: the root, or else one that is deeper ->
    its path, or None.

    Raises Refused where several folders have one: which is meant, only the user knows.
    """
    parents = set()
    for place in {tuple(place_of(image, root)[:DEPTH]) for image in images}:
        for depth, name in enumerate(place):
            if TRAIN.fullmatch(os.fsdecode(name).lower()):
                parents.add(b"/".join(place[:depth]))
                break
    if b"" in parents:
        return root
    if len(parents) > 1:
        shown = ", ".join(sorted(os.fsdecode(parent) for parent in parents))
        raise Refused(f"{os.fsdecode(root)}: several folders in it have a training split: {shown}; name one "
                      "of them")
    return os.path.join(root, parents.pop()) if parents else None


def without_splits(root, listing):
    """All images at any depth, without labels -> Found. listing: of the root, a walk.Listing

    Of a folder with images/ beside masks/, only the images.
    """
    folder, by_class, direct = classes_in(root, listing.images)
    files = sorted(direct + [image for its_images in by_class.values() for image in its_images])
    splits = [os.fsdecode(name) for pattern in VAL for name in matching(pattern, by_class)]
    notes = ()
    if splits:
        notes = (f"no train/ there: the images in {', '.join(splits)}/ are trained on too", )
    left_out = listing.left_out + others(root, listing.images, files)
    return Found("", Split(os.fsdecode(folder), as_files(files)), None, left_out, notes)


def with_splits(root, folder, listing):
    """The training split of a folder, and what can be used of a validation split -> Found

    root        what the user has named; listing is of all of it
    folder      what folder_with_splits has found there
    Raises Refused where two folders could be the training split.
    """
    places = [place_of(image, folder) for image in below(listing.images, folder)]
    names = {place[0] for place in places if place}  # of the folders in it that have images
    train_name, *more = matching(TRAIN, names)
    if more and train_name.lower() not in (b"train", b"training"):
        shown = ", ".join(map(os.fsdecode, [train_name, *more]))
        raise Refused(f"{os.fsdecode(folder)}: several training splits: {shown}; name one of them")
    train, notes = training_split(os.path.join(folder, train_name), listing.images)
    val, read = None, {}
    candidates = [name for pattern in VAL for name in matching(pattern, names)]
    if candidates:
        shown = f"{os.fsdecode(candidates[0])}/"
        val, problem, read = validation_split(folder, candidates[0], listing.images, train.classes)
        if problem:
            notes.append(f"{shown} is not used: {problem}")
        elif candidates[0] != b"val":
            notes.append(f"{shown} is taken for the validation split")
    elif train.classes:
        notes.append("no validation split (val/ with images)")
    elif len(names) > 1:
        notes.append(f"{os.fsdecode(train_name)}/ is taken for the training split: the images beside it are "
                     "left out")
    used = [*train.files.tolist(), *(val.files.tolist() if val else ())]
    left_out = listing.left_out + others(root, listing.images, used)
    left_out.subtract(read)  # the file with the labels was used
    return Found("", train, val, left_out, tuple(notes))


def others(root, images, used):
    """The images that are in no split, counted by where they lie -> Counter

    Two folders deep, or one where that would be more than a line can hold.
    """
    used = set(used)
    places = [place_of(image, root) for image in images if image not in used]
    for depth in (2, 1):
        counted = collections.Counter(os.fsdecode(b"/".join(place[:depth])) for place in places)
        if len(counted) <= REASONS // 2:
            break
    return collections.Counter({f"images in {name}/" if name else "images beside them": n
                                for name, n in counted.items()})


# --- What is in them ------------------------------------------------------------------------------------

def training_split(folder, images):
    """The images of train/, and its classes where there are two or more -> Split, notes

    An image outside the class folders has no class, and is left out.
    """
    folder, by_class, direct = classes_in(folder, images)
    where = os.fsdecode(folder)
    classes = sorted(os.fsdecode(name) for name in by_class)
    if len(classes) > 1:
        return labelled(where, pairs_of(by_class, classes), classes), []
    files = sorted(direct + [image for its_images in by_class.values() for image in its_images])
    notes = [f"one class ({printable(name)}): nothing to classify" for name in classes]
    return Split(where, as_files(files)), notes


def pairs_of(by_class, classes):
    """{name of a class: its images} -> [(image, number of its class)], sorted by image"""
    number = {os.fsencode(name): k for k, name in enumerate(classes)}
    return sorted((image, number[name]) for name in by_class for image in by_class[name])


def labelled(where, pairs, classes):
    """[(image, label)] -> Split"""
    files, labels = zip(*pairs)
    return Split(where, as_files(files), np.array(labels), classes)


def classes_in(folder, images):
    """What lies in a split's folder: the folder itself, or the folder images/ in it; {name: images} of the
    folders in it that have images; the images that lie in it directly."""
    by_class, direct = {}, []
    for image in below(images, folder):
        name, slash, _ = image[len(os.path.join(folder, b"")):].partition(b"/")
        if slash:
            by_class.setdefault(name, []).append(image)
        else:
            direct.append(image)
    holding = [name for name in by_class if os.fsdecode(name).lower() in IMAGES]
    rest = {os.fsdecode(name).lower() for name in by_class if name not in holding}
    if len(holding) == 1 and rest <= BESIDE:
        return classes_in(os.path.join(folder, holding[0]), images)
    return folder, by_class, direct


def validation_split(parent, name, images, classes):
    """The images of val/ that have labels.

    parent, name    the folder that the splits lie in, and the split's name there
    classes         of the training split: a class that it lacks would be one of which nothing was learned
    Returns Split or None, why it can't be used, and {suffix: files whose labels are used}.
    """
    if classes is None:
        return None, "the training images have no labels", {}
    folder, by_class, direct = classes_in(os.path.join(parent, name), images)
    read = {}
    if by_class:
        unknown = sorted(by_class.keys() - {os.fsencode(name) for name in classes})
        if unknown:
            return None, f"{os.fsdecode(unknown[0])} is no class of the training split", {}
        pairs = pairs_of(by_class, classes)
    else:
        pairs, problem, path = labels_beside(parent, folder, name, direct, classes)
        if problem:
            return None, problem, {}
        read = {suffix_of(path): 1}
    return labelled(os.fsdecode(folder), pairs, classes), None, read


# --- Labels of a flat validation folder, from a text file beside it ---------------------------------------
# Each line has an image's name and its class, and perhaps more: val_annotations.txt of Tiny-ImageNet has a
# box, and tabs; val.txt, for ImageNet's 50,000 as they are downloaded, has a blank. A class is the name of
# one of the training folders, or its number as sorted, from 0 on. Whatever could be meant in two ways is not
# guessed: a wrong label would only show as a low accuracy.

def labels_beside(parent, folder, split, images, classes):
    """The labels of these images in a folder -> [(image, label)] sorted, why there are none, and the file
    that was read.

    parent      the folder that the split lies in; the text file is there, or in the split, or between them
    split       the split's name, by which the file is called: val.txt, test.txt
    """
    names = [split + b".txt", split + b"_annotations.txt", b"val_annotations.txt"]
    if re.search(b"^(ilsvrc.*_)?val", split.lower()):
        names.append(b"val.txt")
    places = dict.fromkeys([folder, os.path.dirname(folder), parent])
    paths = [os.path.join(place, name) for place in places for name in names]
    path = next((path for path in paths if os.path.isfile(path)), None)
    if path is None:
        return [], f"it has no class folders, and there is no {os.fsdecode(split)}.txt with labels", None
    shown = os.fsdecode(os.path.basename(path))
    by_name = {os.path.basename(image): image for image in images}
    said = {}
    for line in read_lines(path):
        name, label = name_and_class(line, by_name)
        if name in by_name:
            said[name] = label
    if not said:
        return [], f"{shown} names none of its images", path
    numbers = numbers_of(set(said.values()), classes)
    if numbers is None:
        problem = (f"the classes in {shown} are neither names of the training folders nor numbers from 0 to "
                   f"{len(classes) - 1} (numbers count only if a 0 is among them, and no folder is a number)")
        return [], problem, path
    return sorted((by_name[name], numbers[label]) for name, label in said.items()), None, path


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
    if said <= by_number.keys() and b"0" in said and not any(name.isdigit() for name in by_name):
        return by_number
    return None
