"""What lies at DATA, as a value; which files below a folder are its images, and why the others are none.

Systems and tools leave files behind, hidden ones and others, and so do our own programs: none of them is
data. Every file that is passed over is counted, with the reason.
"""
import collections
import os
from typing import NamedTuple

import numpy as np

from ..common.errors import Refused, printable
from ..common.files import OURS, has_mark, is_ours
from .images import SUFFIXES, is_image
from .tars import as_folder, index_of, is_tar

# Beside all names that begin with a dot: what macOS and its archives, Windows, Linux and network disks put
# into folders, in lower case.
SYSTEMS = {
    "__macosx", "icon\r", "network trash folder", "temporary items",
    "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information",
    "lost+found", "@eadir", "#recycle", "#snapshot", "__pycache__",
}

FEW = 10_000  # pictures in DATA itself, up to which each is searched for our mark

REASONS = 12  # shown; the others are added up


class Split(NamedTuple):
    """The images of a split, not read yet."""
    where: str              # the folder or the file that they come from
    files: object = None    # (N,) array of byte strings
    labels: object = None   # (N,) int64, or None where there are none
    classes: object = None  # list of names, or None
    batches: tuple = ()     # of CIFAR: the files that hold the images
    layout: object = None   # of CIFAR: how they are read, a cifar.Layout


class Found(NamedTuple):
    """What lies at DATA."""
    layout: str             # a row of layouts.LAYOUTS, in words
    train: Split
    val: object = None      # Split, or None
    left_out: dict = {}     # {reason: how many files}
    notes: tuple = ()       # what else has to be said: of val/, of classes, of where the images were found
    tars: tuple = ()        # tars.Index of each tar file that images lie in


def describe(left_out):
    """The files that are left out, by reason, in one line; None where there are none.

    The most frequent reason comes first.
    """
    reasons = {reason: n for reason, n in left_out.items() if n > 0}
    if not reasons:
        return None
    most_first = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{n} {printable(reason)}" for reason, n in most_first[:REASONS]]
    rest = sum(n for _, n in most_first[REASONS:])
    if rest:
        shown.append(f"{rest} others")
    total = sum(reasons.values())
    return f"{total} file{'s' if total > 1 else ''}: {', '.join(shown)}"


# --- Walking ------------------------------------------------------------------------------------------------

class Listing(NamedTuple):
    """The files below a folder: those that are used, and how many are not."""
    images: list   # paths (bytes), sorted
    left_out: collections.Counter  # {reason: files}
    tars: list     # tars.Index of each tar file, whose images are among `images`


def is_left_behind(name):
    """Whether a name (bytes) is a hidden one, or one that a system has made for itself."""
    name = os.fsdecode(name)
    return name.startswith(".") or name.lower() in SYSTEMS


def entries(folder):
    """A folder's entries, by name. Raises Refused where it can't be listed: what is in it would be missing
    without a word."""
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise Refused(f"{os.fsdecode(folder)}: can't be listed ({error.strerror}); give yourself the right "
                      "to read it, or move it away") from None


def is_folder(entry):
    """Whether an entry is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def walk(root, keep=None):
    """All files below a folder, at any depth, and in tar files there -> Listing

    keep    the folder in which the indexes of tar files are kept, or None
    Links to folders are followed, but never into a folder that they lie in, nor from one link into another:
    links across class folders could lead round in any order. Of a hidden folder nothing is looked at: it
    counts as one file. Raises Refused where a folder can't be listed.
    """
    if is_within(keep, root):
        keep = None  # nothing is ever written below DATA
    images = []
    tars = []
    at_the_top = []  # pictures in the root itself, any of which may be a contact sheet of ours
    left_out = collections.Counter()
    waiting = [(root, frozenset(), False)]  # folder, identities of those above it, whether a link led there
    while waiting:
        folder, above, linked = waiting.pop()
        status = os.stat(folder)
        above |= {(status.st_dev, status.st_ino)}
        for entry in entries(folder):
            if is_left_behind(entry.name):
                left_out["hidden or a system's"] += 1
            elif is_folder(entry):
                link = entry.is_symlink()
                inside = os.stat(entry.path)
                if link and ((inside.st_dev, inside.st_ino) in above or linked):
                    left_out["links that lead back, or on to links"] += 1
                else:
                    waiting.append((entry.path, above, linked or link))
            elif not entry.is_symlink() and not entry.is_file():
                left_out["pipes, sockets or devices"] += 1  # to open a pipe can take for ever
            elif is_tar(entry.name) and os.path.isfile(entry.path):
                check_alone(entry.path, tars)
                tars.append(look_into(entry.path, keep))
                images += tars[-1].names.tolist()
                left_out.update(tars[-1].left_out)
            elif not is_image(entry.name):
                left_out[suffix_of(entry.name)] += 1
            elif entry.name in OURS and is_ours(entry.path):
                left_out["pictures that our programs drew"] += 1
            elif folder == root:
                at_the_top.append(entry.path)
            else:
                images.append(entry.path)
    for path in at_the_top:
        # Each is opened: not in a folder of a million pictures, where it would take minutes on a slow disk.
        if len(at_the_top) <= FEW and path.endswith(b".png") and has_mark(path):
            left_out["pictures that our programs drew"] += 1
        else:
            images.append(path)
    return Listing(sorted(images), left_out, tars)


def is_within(folder, root):
    """Whether a folder, if any, is another one or lies in it."""
    if folder is None:
        return False
    root = os.path.realpath(root)
    return os.path.commonpath([os.path.realpath(os.fsencode(folder)), root]) == root


def check_alone(path, tars):
    """Raise Refused where a folder of a tar file's name is there too, or another tar file of it: a path would
    have two meanings."""
    folder = as_folder(path)
    if os.path.isdir(folder):
        raise Refused(f"{os.fsdecode(path)}: {os.fsdecode(folder)}/ is there too, perhaps unpacked from it; "
                      "move one of them away")
    for index in tars:
        if as_folder(index.archive.path) == folder:
            raise Refused(f"{os.fsdecode(path)}: {os.fsdecode(index.archive.path)} is there too; rename one")


def look_into(path, keep):
    """A tar file -> tars.Index. Raises Refused where it is damaged or compressed."""
    return index_of(path, keep, why_no_image, rules=repr((SUFFIXES, sorted(SYSTEMS))))


def why_no_image(name):
    """Why a member of a tar file (its path there) is no image; None where it is one."""
    if any(map(is_left_behind, name.split(b"/"))):
        return "hidden or a system's"
    return None if is_image(name) else suffix_of(name)


def suffix_of(name):
    """The end of a file's name, as the reason why it is no image."""
    _, suffix = os.path.splitext(os.fsdecode(name).lower())
    return suffix or "without a suffix"


def as_files(images):
    """Paths as one buffer, which worker processes share: (N,) array of byte strings."""
    return np.array(images)
