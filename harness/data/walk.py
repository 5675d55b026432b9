"""The files below a folder, as a tree; which of them are images, and why the others aren't.

Systems and tools leave files behind, hidden ones and others, and so do our own programs: none of them is
data. Every file that is passed over is counted, with the reason.

A tar file takes the place of a folder, and so may be a class. But webdataset writes shards: tar files with
some images of any class, KEY.jpg, and beside each what is known of it, KEY.cls or KEY.json.
"""
import collections
import concurrent.futures
import contextlib
import os
import shlex

from ..common.errors import Refused, printable
from ..common.files import OURS, has_mark
from .images import is_image
from .lists import kind_of_file, suffix_of
from .tars import as_folder, is_tar, member_name, members

# Besides all names that begin with a dot: what macOS and its archives, Windows, Linux and network disks put
# into folders, in lower case.
SYSTEMS = {
    "__macosx", "icon\r", "network trash folder", "temporary items",
    "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information",
    "lost+found", "@eadir", "#recycle", "#snapshot", "__pycache__",
}
REASONS = 12  # shown; the total has the others too
LEFT_BEHIND = "hidden or a system's"
BESIDE_IMAGES = (b".cls", b".json", b".txt")  # what a shard has for each image
READERS = 8   # threads that read the headers of tar files: they mostly wait for the disk


class Listing:
    """The files below a folder. A place is a tuple of names (bytes), from the folder on."""

    def __init__(self, root):
        self.root = root
        self.tree = collections.defaultdict(list)  # {place: names of the images that are in it directly}
        self.left_out = collections.Counter()      # {reason: files}
        self.shards = set()                        # places of tar files with images of any class
        self.has_links = False
        self.notes = []                            # for the user, on what the images are used for

    def inside(self, place):
        """The places at and below a place."""
        return [other for other in self.tree if other[:len(place)] == place]

    def names(self, place):
        """The names of the folders in a place that have images below."""
        return {other[len(place)] for other in self.inside(place) if other != place}

    def path(self, place):
        """Where a place is on the disk."""
        return os.path.join(self.root, *place)

    def shell_path(self, *place):
        """The same for a command line."""
        return shlex.quote(os.fsdecode(self.path(place)))

    def take(self, place):
        """Take the images of a place out of the tree -> their paths"""
        folder = self.path(place)
        return [os.path.join(folder, name) for name in self.tree.pop(place)]


def walk(root):
    """All files below a folder (its path: bytes), at any depth, and in tar files there -> Listing

    root    a folder, or a tar file in its place
    Links to folders are followed, but never back to a folder that they are in, nor from one link into
    another: links across class folders could lead round in any order. A folder that isn't entered counts as
    the files in it. Raises Refused if a folder can't be listed.
    """
    if not os.path.isdir(root):
        listing = Listing(as_folder(root))
        walk_tar(root, listing, ())
        return listing
    listing = Listing(root)
    waiting = [((), False)]  # place, whether a link led there
    while waiting:
        place, linked = waiting.pop()
        for entry in entries(listing.path(place)):
            kind = kind_of(entry)
            is_link = entry.is_symlink()
            listing.has_links |= is_link
            if is_left_behind(entry.name):
                listing.left_out[LEFT_BEHIND] += files_in(entry)
            elif kind == "folder" and not entry.name.endswith(b".zarr"):
                if is_link and linked:
                    listing.left_out["behind links below links"] += files_in(entry)
                elif not (is_link and leads_back(entry.path)):
                    waiting.append(((*place, entry.name), linked or is_link))
            elif kind not in ("folder", "file"):
                listing.left_out[kind] += 1
            elif is_tar(entry.name):
                if os.path.exists(as_folder(entry.path)):
                    raise Refused(f"{os.fsdecode(entry.path)}: the folder unpacked from it is there too; "
                                  "move one of them away")
                walk_tar(entry.path, listing, (*place, as_folder(entry.name)))
            elif not is_image(entry.name):
                listing.left_out[kind_of_file(entry.path)] += files_in(entry)
            elif entry.name in OURS and has_mark(entry.path):
                listing.left_out["pictures that our programs drew"] += 1
            else:
                listing.tree[place].append(entry.name)
    return listing


def walk_tar(path, listing, place):
    """Add a tar file, and the tar files inside it, as the folder at this place of a Listing."""
    waiting = {place: None}  # where each tar file starts and ends in this one
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        while waiting:
            inner = {}
            headers = pool.map(lambda span: list(members(path, span)), waiting.values())
            for folder, found in zip(waiting, headers):
                inner |= add_members(listing, folder, path, found)
            waiting = inner


def add_members(listing, place, path, found):
    """Add to a Listing the members of a tar file, or of one inside it, as the folder at this place.

    Returns {place: where it starts and ends} of the tar files inside it.
    """
    inner = {}
    beside = set()  # folders and KEYs
    for inside, offset, size, is_file in found:
        *folders, name = os.path.normpath(inside).lstrip(b"/").split(b"/")
        folder = (*place, *folders)
        if any(map(is_left_behind, (*folders, name))):
            listing.left_out[LEFT_BEHIND] += 1
        elif not is_file:
            listing.left_out["links and the like in a tar file"] += 1
        elif is_tar(name):
            inner[*folder, as_folder(name)] = offset, offset + size
        elif is_image(name):
            listing.tree[folder].append(member_name(path, name, offset, size))
        else:
            listing.left_out[suffix_of(name)] += 1
            if name.endswith(BESIDE_IMAGES):
                beside.add((folder, key(name)))
    if beside:  # rare; the rest takes a while
        images = [(folder, key(image)) for folder in listing.inside(place) for image in listing.tree[folder]]
        if beside.issuperset(images):
            listing.shards.add(place)
    return inner


def key(name):
    """KEY of KEY.jpg: webdataset's name for an image and all that belongs to it"""
    return name.partition(b".")[0]


def entries(folder):
    """A folder's entries, by name. Raises Refused if it can't be listed: its images would be missing without
    a word."""
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise Refused(f"{os.fsdecode(folder)}: can't be listed ({error.strerror}); give yourself the right "
                      "to read it, or move it away") from None


def leads_back(link):
    """Whether a link leads to a folder that it is in."""
    folder = os.path.realpath(os.path.dirname(link))
    target = os.path.realpath(link)
    return os.path.commonpath([folder, target]) == target


def kind_of(entry):
    """Whether an entry, or what it links to, is a "folder" or a "file"; else what it is, as a reason."""
    with contextlib.suppress(OSError):  # a link to itself, or no link
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        if b".git/annex/" in os.readlink(entry.path):
            return "links to nothing: datalad get"
    return "links to nothing, or pipes"


def files_in(entry):
    """How many files an entry that isn't entered stands for. Links to folders below it aren't followed."""
    if kind_of(entry) != "folder":
        return 1
    return sum(len(files) for _, _, files in os.walk(entry.path))


def is_left_behind(name):
    """Whether a name (bytes) is hidden, or one that a system has made for itself."""
    name = os.fsdecode(name)
    return name.startswith(".") or name.lower() in SYSTEMS


def describe(left_out):
    """The files left out (a Counter), by reason, in one line, the most frequent first; None if there are
    none."""
    total = left_out.total()
    if not total:
        return None
    reasons = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{n} {printable(reason)}" for reason, n in reasons if n]
    if len(shown) > REASONS:
        shown[REASONS:] = ["others"]
    return f"{total} file{'s' if total > 1 else ''}: {', '.join(shown)}"
