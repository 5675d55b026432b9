"""The files below a folder, as a tree; which of them are images, and why the others are none.

Systems and tools leave files behind, hidden ones and others, and so do our own programs: none of them is
data. Every file that is passed over is counted, with the reason.
"""
import collections
import os
from typing import NamedTuple

from ..common.errors import Refused, printable
from ..common.files import OURS, has_mark
from .images import is_image
from .tars import Folder, as_folder, is_tar, list_tar

# Beside all names that begin with a dot: what macOS and its archives, Windows, Linux and network disks put
# into folders, in lower case.
SYSTEMS = {
    "__macosx", "icon\r", "network trash folder", "temporary items",
    "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information",
    "lost+found", "@eadir", "#recycle", "#snapshot", "__pycache__",
}
REASONS = 12  # shown; the others are added up


class Listing(NamedTuple):
    """What lies below a folder. A place is a tuple of names (bytes), from the folder on."""
    root: bytes
    tree: dict     # {place: tars.Folder} of all folders that images lie in directly
    left_out: collections.Counter  # {reason: files}

    def inside(self, place):
        """The places at and below a place."""
        return [other for other in self.tree if other[:len(place)] == place]

    def names(self, place):
        """The names of the folders in a place that have images below."""
        return {other[len(place)] for other in self.inside(place) if other != place}

    def path(self, place):
        """Where a place is on the disk."""
        return os.path.join(self.root, *place)


def walk(root):
    """All files below a folder (its path: bytes), at any depth, and in tar files there -> Listing

    Links to folders are followed, but never into a folder that they lie in, nor from one link into another:
    links across class folders could lead round in any order. Of a hidden folder nothing is looked at: it
    counts as one file. Raises Refused where a folder can't be listed.
    """
    tree = {}
    left_out = collections.Counter()
    waiting = [((), frozenset(), False)]  # place, identities of the folders above, whether a link led there
    while waiting:
        place, above, linked = waiting.pop()
        folder = os.path.join(root, *place)
        above |= {identity(folder)}
        images = []
        folders = set()
        for entry in entries(folder):
            if is_left_behind(entry.name):
                left_out["hidden or a system's"] += 1
            elif is_folder(entry):
                folders.add(entry.name)
                is_link = entry.is_symlink()
                if is_link and (linked or identity(entry.path) in above):
                    left_out["links that lead back, or on to links"] += 1
                else:
                    waiting.append(((*place, entry.name), above, linked or is_link))
            elif not entry.is_symlink() and not entry.is_file():
                left_out["pipes, sockets or devices"] += 1  # opening a pipe can take for ever
            elif is_tar(entry.name) and os.path.isfile(entry.path):
                name = as_folder(entry.name)
                if name in folders:
                    beside = os.fsdecode(as_folder(entry.path))
                    raise Refused(f"{os.fsdecode(entry.path)}: {beside}/ is there too, perhaps unpacked from "
                                  "it; move one of them away")
                folders.add(name)
                found, passed_over = list_tar(entry.path, why_no_image)
                tree |= {(*place, name, *inside): its_images for inside, its_images in found.items()}
                left_out += passed_over
            elif not is_image(entry.name):
                left_out[suffix_of(entry.name)] += 1
            elif entry.name in OURS and has_mark(entry.path):
                left_out["pictures that our programs drew"] += 1
            else:
                images.append(entry.name)
        if images:
            tree[place] = Folder(images)
    return Listing(root, tree, left_out)


def walk_tar(path):
    """A tar file, as the folder in whose place it is -> Listing"""
    return Listing(as_folder(path), *list_tar(path, why_no_image))


def entries(folder):
    """A folder's entries, by name. Raises Refused where it can't be listed: what is in it would be missing
    without a word."""
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise Refused(f"{os.fsdecode(folder)}: can't be listed ({error.strerror}); give yourself the right "
                      "to read it, or move it away") from None


def identity(folder):
    """What a folder is known by, whichever way leads to it."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def is_folder(entry):
    """Whether an entry is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def is_left_behind(name):
    """Whether a name (bytes) is a hidden one, or one that a system has made for itself."""
    name = os.fsdecode(name)
    return name.startswith(".") or name.lower() in SYSTEMS


def why_no_image(parts):
    """Why a member of a tar file, [folders and file], is no image; None where it is one."""
    if any(map(is_left_behind, parts)):
        return "hidden or a system's"
    if is_image(parts[-1]):
        return None
    suffix = suffix_of(parts[-1])
    if suffix == ".txt":
        return ".txt in a tar file, where labels are not read: they must lie beside it"
    return suffix


def suffix_of(name):
    """The end of a file's name, as the reason why it is no image."""
    _, suffix = os.path.splitext(os.fsdecode(name).lower())
    return suffix or "without a suffix"


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
