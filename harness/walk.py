"""Which files below a folder are its images; of the others, how many there are and why they are none.

Systems and tools leave files behind, hidden ones and others, and so do our own programs: none of them is
data. Every file that is passed over is counted, with the reason.
"""
import collections
import os
from typing import NamedTuple

import numpy as np

from .errors import Refused
from .images import is_image
from .pictures import OURS, is_ours

# Beside all names that begin with a dot: what macOS and its archives, Windows, Linux and network disks put
# into folders, in lower case.
SYSTEMS = {
    "__macosx", "icon\r", "network trash folder", "temporary items",
    "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information",
    "lost+found", "@eadir", "#recycle", "#snapshot", "__pycache__",
}


class Listing(NamedTuple):
    """The files below a folder."""
    images: list   # paths (bytes), sorted
    left_out: collections.Counter  # {reason: files}


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


def subfolders(folder):
    """The names (bytes) of the folders in a folder, sorted, without those that systems leave behind."""
    if not os.path.isdir(folder):
        return []
    return [entry.name for entry in entries(folder) if is_folder(entry) and not is_left_behind(entry.name)]


def walk(root):
    """All files below a folder, at any depth -> Listing. Links are followed, but never into a folder that
    they lie in."""
    images = []
    left_out = collections.Counter()
    waiting = [(root, frozenset())]
    while waiting:
        folder, above = waiting.pop()
        status = os.stat(folder)
        identity = status.st_dev, status.st_ino
        if identity in above:
            continue
        for entry in entries(folder):
            if is_left_behind(entry.name):
                left_out["hidden or a system's"] += 1
            elif is_folder(entry):
                waiting.append((entry.path, above | {identity}))
            elif not is_image(entry.name):
                left_out[suffix_of(entry.name)] += 1
            elif is_ours(entry.path, at_the_top=folder == root):
                left_out["pictures that our programs drew"] += 1
            else:
                images.append(entry.path)
    return Listing(sorted(images), left_out)


def suffix_of(name):
    """The end of a file's name, as the reason why it is no image."""
    _, suffix = os.path.splitext(os.fsdecode(name).lower())
    return suffix or "without a suffix"


def as_files(images):
    """Paths as one buffer, which worker processes share: (N,) array of byte strings."""
    return np.array(images)
