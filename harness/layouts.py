"""What lies at DATA: look() says it as a value, and nothing is read yet but names, and labels in text files.

Each row of LAYOUTS is one way in which images come: how it is recognised, and who looks closer. The first
row that fits counts. Every file below DATA is used, or is counted in Found.left_out with the reason.
"""
import collections
import os
import re
from typing import NamedTuple

import numpy as np

from . import cifar
from .errors import Refused, printable
from .images import is_image
from .labels import labels_beside
from .lists import looks_like, read_list
from .walk import Listing, as_files, is_left_behind, subfolders, suffix_of, walk


class Split(NamedTuple):
    """The images of a split, not read yet."""
    where: str              # the folder or the file that they come from
    files: object = None    # (N,) array of byte strings
    labels: object = None   # (N,) int64, or None where there are none
    classes: object = None  # list of names, or None
    batches: tuple = ()     # of CIFAR: the files that hold the images, and how they are read
    layout: object = None


class Found(NamedTuple):
    """What lies at DATA."""
    layout: str             # a row of LAYOUTS, in words
    train: Split
    val: object = None      # Split, or None
    left_out: dict = {}     # {reason: how many files}
    notes: tuple = ()       # what else has to be said: of val/, of classes, of where the images were found


class Layout(NamedTuple):
    """A row of LAYOUTS."""
    name: str
    fits: object            # (path, names of what lies in it; none of a file) -> whether it is this layout
    look: object            # path -> Found


def look(path):
    """What lies at a path (text or bytes) -> Found. Raises Refused where there is nothing that can be
    used."""
    path = os.fsencode(path)
    if not os.path.exists(path):
        raise Refused(f"{os.fsdecode(path)}: no such file or folder; give an image folder, a list of files, "
                      "or a CIFAR-10 folder")
    names = set()
    if os.path.isdir(path):
        names = {name for name in list_names(path) if not is_left_behind(name)}
    row = next(row for row in LAYOUTS if row.fits(path, names))
    return row.look(path)._replace(layout=row.name)


def list_names(folder):
    """The names in a folder. Raises Refused where it can't be listed."""
    try:
        return os.listdir(folder)
    except OSError as error:
        raise Refused(f"{os.fsdecode(folder)}: can't be listed ({error.strerror})") from None


def describe(left_out):
    """The files that are left out, by reason, in one line; None where there are none."""
    reasons = {reason: n for reason, n in left_out.items() if n > 0}
    if not reasons:
        return None
    most_first = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{n} {printable(reason)}" for reason, n in most_first[:12]]
    if len(most_first) > 12:
        rest = sum(n for _, n in most_first[12:])
        shown.append(f"{rest} others")
    total = sum(reasons.values())
    return f"{total} file{'s' if total > 1 else ''}: {', '.join(shown)}"


# --- CIFAR ----------------------------------------------------------------------------------------------

def look_at_cifar(layout):
    """-> a function that looks at a folder of this layout of CIFAR."""
    def look_closer(root):
        train, val = (Split(os.fsdecode(root), batches=batches, layout=layout) for batches in layout.batches)
        return Found("", train, val)

    return look_closer


def around(path, names):
    """Whether a folder holds CIFAR's, under the name that its archive gives it: torchvision's root."""
    return any(name in names for name in cifar.FOLDERS)


def look_inside(root):
    """The one known folder in it."""
    there = [name for name in cifar.FOLDERS if os.path.isdir(os.path.join(root, name))]
    if len(there) != 1:
        raise Refused(f"{os.fsdecode(root)}: holds {len(there)} data sets, "
                      f"{', '.join(map(os.fsdecode, there))}; name one of them")
    return look(os.path.join(root, there[0]))


# --- Files ----------------------------------------------------------------------------------------------

def look_at_image(path):
    return Found("", Split(os.fsdecode(path), as_files([path])))


def look_at_list(path):
    return Found("", Split(os.fsdecode(path), as_files(read_list(path))))


def refuse_file(path):
    raise Refused(f"{os.fsdecode(path)}: {looks_like(path)}")


# --- Folders of images ----------------------------------------------------------------------------------

# Names of splits, in lower case, with what people put behind them: train2017, training_set, val_images.
BEHIND = r"([-_ ]?(set|data|split|images))?[-_]?\d*"
TRAIN = re.compile(r"(train|training)" + BEHIND)
VAL = [re.compile(names + BEHIND) for names in ("val", "(valid|validation)", "(test|testing)")]
# A folder of this name holds the images of the folder that it is in, often beside masks/ or labels/. It is
# no class.
IMAGES = {"images", "image", "imgs", "img", "jpegimages"}
DEPTH = 4  # so many folders deep, splits are searched for


def matching(pattern, names):
    """Those of some names (bytes) that are written like this. The plain name comes first."""
    fitting = [name for name in names if pattern.fullmatch(os.fsdecode(name).lower())]
    return sorted(fitting, key=lambda name: (len(name), name))


def look_at_folder(root):
    """A folder of images: with splits and classes, or without."""
    listing = walk(root)
    if not listing.images:
        raise Refused(nothing_there(root, listing.left_out))
    folder = folder_with_splits(root, listing.images)
    if folder is None:
        return without_splits(root, listing)
    found = with_splits(root, folder, listing)
    if folder != root:
        inside = os.fsdecode(os.path.relpath(folder, root))
        found = found._replace(notes=(f"the splits were found in {inside}/", *found.notes))
    return found


def folder_with_splits(root, images):
    """The folder that has a training split in it, with images below: the root, or else a deeper one, if all
    images lie in that -> its path, or None."""
    parents = collections.Counter()
    folders = {os.path.dirname(image)[len(root):] for image in images}
    for folder in folders:
        parts = folder.strip(b"/").split(b"/")[:DEPTH]
        for depth, name in enumerate(parts):
            if TRAIN.fullmatch(os.fsdecode(name).lower()):
                parents[b"/".join(parts[:depth])] += 1
                break
    if b"" in parents:
        return root
    if len(parents) > 1:
        shown = ", ".join(sorted(os.fsdecode(parent) for parent in parents))
        raise Refused(f"{os.fsdecode(root)}: several folders in it have a training split: {shown}; name one "
                      "of them")
    for parent in parents:
        folder = os.path.join(root, parent)
        if len(below(images, folder)) == len(images):
            return folder
    return None


def below(images, folder):
    """Those images that lie in a folder, at any depth."""
    return [image for image in images if image.startswith(folder + b"/")]


def without_splits(root, listing):
    """All images at any depth, without labels."""
    names = subfolders(root)
    splits = [os.fsdecode(name) for pattern in VAL for name in matching(pattern, names)]
    notes = ()
    if splits:
        notes = (f"no train/ there: the images in {', '.join(splits)}/ are trained on too", )
    return Found("", Split(os.fsdecode(root), as_files(listing.images)), None, listing.left_out, notes)


def with_splits(root, folder, listing):
    """The training split of a folder, and what can be used of a validation split."""
    left_out = collections.Counter(listing.left_out)
    names = subfolders(folder)
    train_name, *others = matching(TRAIN, names)
    if others and train_name.lower() not in (b"train", b"training"):
        shown = ", ".join(map(os.fsdecode, [train_name, *others]))
        raise Refused(f"{os.fsdecode(folder)}: several training splits: {shown}; name one of them")
    train, notes = training_split(os.path.join(folder, train_name), listing.images)
    val = None
    candidates = [name for pattern in VAL for name in matching(pattern, names)]
    candidates = [name for name in candidates if below(listing.images, os.path.join(folder, name))]
    if candidates:
        val_folder = os.path.join(folder, candidates[0])
        shown = f"{os.fsdecode(candidates[0])}/"
        val, problem, read = validation_split(folder, val_folder, listing.images, train.classes)
        left_out.subtract(read)  # the file with the labels was used
        if problem:
            notes.append(f"{shown} is not used: {problem}")
        elif candidates[0] != b"val":
            notes.append(f"{shown} is taken for the validation split")
    elif train.classes:
        notes.append("no validation split (val/ with images)")
    used = {*train.files.tolist(), *(val.files.tolist() if val else ())}
    for image in listing.images:
        if image not in used:
            where = os.fsdecode(os.path.dirname(os.path.relpath(image, root))).split("/")
            left_out[f"images in {'/'.join(where[:2])}/"] += 1
    return Found("", train, val, left_out, tuple(notes))


def training_split(folder, images):
    """The images of train/, and its classes where there are two or more -> Split, notes"""
    folder, by_class, direct = classes_in(folder, images)
    where = os.fsdecode(folder)
    classes = sorted(os.fsdecode(name) for name in by_class)
    if len(classes) > 1:
        files, labels = [], []
        for name, its_images in by_class.items():
            files += its_images
            labels += [classes.index(os.fsdecode(name))] * len(its_images)
        files, labels = zip(*sorted(zip(files, labels)))
        return Split(where, as_files(files), np.array(labels), classes), []
    files = sorted(direct + [image for its_images in by_class.values() for image in its_images])
    notes = [f"one class ({printable(name)}): nothing to classify" for name in classes]
    return Split(where, as_files(files)), notes


def classes_in(folder, images):
    """-> the folder itself, or the folder images/ in it; {name: images} of the folders in it that have
    images; the images that lie in it directly"""
    by_class, direct = {}, []
    for image in below(images, folder):
        name, slash, _ = image[len(folder) + 1:].partition(b"/")
        if slash:
            by_class.setdefault(name, []).append(image)
        else:
            direct.append(image)
    for name in by_class:
        if os.fsdecode(name).lower() in IMAGES:
            return classes_in(os.path.join(folder, name), images)
    return folder, by_class, direct


def validation_split(parent, folder, images, classes):
    """The images of val/ that have labels -> Split or None, why it can't be used, {suffix: files with labels
    that were read}"""
    if classes is None:
        return None, "the training images have no labels", {}
    folder, by_class, direct = classes_in(folder, images)
    where = os.fsdecode(folder)
    number = {os.fsencode(name): k for k, name in enumerate(classes)}
    if by_class:
        unknown = sorted(by_class.keys() - number.keys())
        if unknown:
            return None, f"{os.fsdecode(unknown[0])} is no class of the training split", {}
        pairs = sorted((image, number[name]) for name in by_class for image in by_class[name])
        problem, read = None, {}
    else:
        pairs, problem, path = labels_beside(parent, folder, direct, classes)
        read = {suffix_of(path): 1} if path else {}
    if not pairs:
        return None, problem, read
    files, labels = zip(*pairs)
    return Split(where, as_files(files), np.array(labels), classes), None, read


def nothing_there(root, left_out):
    """The line that refuses a folder without images: what lies there, and what to do."""
    there = describe(left_out) or "it is empty"
    hint = "give a folder of JPEG, PNG or other image files"
    for suffix, _ in left_out.most_common():  # of the most frequent kind that we know
        known = looks_like(os.fsencode("x" + suffix))
        if known:
            hint = known
            break
    return f"{os.fsdecode(root)}: no images there ({there}); {hint}"


LAYOUTS = [
    *(Layout(f"{row.name} ({row.form})", row.fits, look_at_cifar(row)) for row in cifar.LAYOUTS),
    Layout("a folder around CIFAR's", around, look_inside),
    Layout("an image folder", lambda path, names: os.path.isdir(path), look_at_folder),
    Layout("one image", lambda path, names: is_image(path), look_at_image),
    Layout("a file that holds no list", lambda path, names: looks_like(path), refuse_file),
    Layout("a list of images", lambda path, names: True, look_at_list),
]
