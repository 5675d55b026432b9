"""The files below a folder, as a tree; which of them are images, and why the others aren't.

Systems and tools leave files behind, hidden ones and others, and so do our own programs: none of them is
data. Every file that is passed over is counted, with the reason.
"""
import collections
import concurrent.futures
import functools
import os
from typing import NamedTuple

from ..common.errors import Refused, printable
from ..common.files import OURS, has_mark
from .images import is_image
from .lists import suffix_of
from .tars import as_folder, is_tar, member_name, members

# Besides all names that begin with a dot: what macOS and its archives, Windows, Linux and network disks put
# into folders, in lower case.
SYSTEMS = {
    "__macosx", "icon\r", "network trash folder", "temporary items",
    "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information",
    "lost+found", "@eadir", "#recycle", "#snapshot", "__pycache__",
}
REASONS = 12  # shown; the others are added up
LEFT_BEHIND = "hidden or a system's"
READERS = 8   # threads that read the headers of tar files: they mostly wait for the disk


class Listing(NamedTuple):
    """The files below a folder. A place is a tuple of names (bytes), from the folder on."""
    root: bytes
    tree: dict     # {place: names of the images that are in it directly}
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

    def take(self, place):
        """Take the images of a place out of the tree -> their paths"""
        folder = self.path(place)
        return [os.path.join(folder, name) for name in self.tree.pop(place)]


def walk(root):
    """All files below a folder (its path: bytes), at any depth, and in tar files there -> Listing

    Links to folders are followed, but never into a folder that they are in, nor from one link into another:
    links across class folders could lead round in any order. A hidden folder isn't entered: it counts as one
    file. Raises Refused if a folder can't be listed.
    """
    listing = Listing(root, {}, collections.Counter())
    waiting = [((), frozenset(), False)]  # place, identities of the folders above, whether a link led there
    while waiting:
        place, above, linked = waiting.pop()
        folder = listing.path(place)
        above |= {identity(folder)}
        images = []
        for entry in entries(folder):
            kind = kind_of(entry)
            if is_left_behind(entry.name):
                listing.left_out[LEFT_BEHIND] += 1
            elif kind == "folder" and not entry.name.endswith(b".zarr"):
                is_link = entry.is_symlink()
                if is_link and (linked or identity(entry.path) in above):
                    listing.left_out["links that lead back, or on to links"] += 1
                else:
                    waiting.append(((*place, entry.name), above, linked or is_link))
            elif kind == "neither":
                listing.left_out["links to nothing, or pipes"] += 1
            elif is_tar(entry.name):
                if os.path.exists(as_folder(entry.path)):
                    raise Refused(f"{os.fsdecode(entry.path)}: the folder unpacked from it is there too; "
                                  "move one of them away")
                found = walk_tar(entry.path)
                listing.left_out.update(found.left_out)
                for inside, names in found.tree.items():
                    listing.tree[*place, as_folder(entry.name), *inside] = names
            elif not is_image(entry.name):
                listing.left_out[suffix_of(entry.path)] += 1
            elif entry.name in OURS and has_mark(entry.path):
                listing.left_out["pictures that our programs drew"] += 1
            else:
                images.append(entry.name)
        if images:
            listing.tree[place] = images
    return listing


def walk_tar(path):
    """A tar file, and the tar files inside it, as the folder whose place it takes -> Listing"""
    listing, inner = list_members(path, (), None)
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        read = functools.partial(list_members, path)
        for found, _ in pool.map(read, inner.keys(), inner.values()):
            listing.left_out.update(found.left_out)
            for inside, names in found.tree.items():
                listing.tree.setdefault(inside, []).extend(names)
    return listing


def list_members(path, place, span):
    """A tar file, or the one inside it that has this place and this span -> Listing, and {place: span} of the
    tar files inside. Those two levels down are not looked into."""
    listing = Listing(as_folder(path), {}, collections.Counter())
    inner = {}
    for inside, offset, size, is_file in members(path, span):
        *folders, name = os.path.normpath(inside).lstrip(b"/").split(b"/")
        folder = (*place, *folders)
        if any(map(is_left_behind, (*folders, name))):
            listing.left_out[LEFT_BEHIND] += 1
        elif not is_file:
            listing.left_out["links and the like in a tar file"] += 1
        elif is_tar(name) and span is None:
            inner[*folder, as_folder(name)] = offset, offset + size
        elif not is_image(name):
            listing.left_out[suffix_of(name)] += 1
        else:
            listing.tree.setdefault(folder, []).append(member_name(path, name, offset, size))
    return listing, inner


def entries(folder):
    """A folder's entries, by name. Raises Refused if it can't be listed: its images would be missing without
    a word."""
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


def kind_of(entry):
    """Whether an entry, or what it links to, is a "folder", a "file" or "neither"."""
    try:
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() else "neither"
    except OSError:  # a link to itself
        return "neither"


def is_left_behind(name):
    """Whether a name (bytes) is hidden, or one that a system has made for itself."""
    name = os.fsdecode(name)
    return name.startswith(".") or name.lower() in SYSTEMS


def describe(left_out):
    """The files left out, by reason, in one line, the most frequent first; None if there are none."""
    reasons = [(reason, n) for reason, n in left_out.items() if n > 0]
    if not reasons:
        return None
    reasons.sort(key=lambda item: (-item[1], item[0]))
    shown = [f"{n} {printable(reason)}" for reason, n in reasons[:REASONS]]
    rest = sum(n for _, n in reasons[REASONS:])
    if rest:
        shown.append(f"{rest} others")
    total = sum(n for _, n in reasons)
    return f"{total} file{'s' if total > 1 else ''}: {', '.join(shown)}"
