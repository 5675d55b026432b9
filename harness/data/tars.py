"""Uncompressed tar files in the place of folders: nothing is unpacked, each image is read where it lies.

A million small files are a burden for the disks that many machines share; a tar file is one file. A member
is called as if the tar file were a folder of its name: train.tar has train/<class>/<file>. A tar file in a
tar file is a folder too: ILSVRC2012_img_train.tar has one for each class. All headers are read at the start,
to know where the images lie.
"""
import array
import collections
import concurrent.futures
import functools
import os
import re
from typing import NamedTuple

import numpy as np

from ..common.errors import Refused
from ..common.progress import warn

SUFFIX = b".tar"
MOST_OPEN = 64         # tar files at a time; systems allow a process some thousand files, or 256
READERS = 8            # threads that read headers: they mostly wait for the disk
LARGE = 10 * 2 ** 30   # bytes; of a larger tar file the start says that it takes long
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Folder(NamedTuple):
    """The images that lie directly in a folder, on the disk or in a tar file."""
    names: list            # bytes
    tar: object = None     # the tar file's path: bytes
    places: object = None  # in a tar file: where an image begins, its bytes, where the next begins, ...


# --- Images by number -----------------------------------------------------------------------------------

class Member(bytes):
    """An image in a tar file. The bytes are its path, as if the tar file were a folder. place: the tar file,
    where the image begins in it, and its bytes."""

    def content(self):
        """All bytes of it. Raises Refused where the tar file can't be read: the image isn't bad then."""
        tar, offset, size = self.place
        try:
            return os.pread(opened(tar).fileno(), size, offset)
        except OSError as error:
            raise Refused(f"{os.fsdecode(tar)}: can't be read ({error.strerror})") from None


@functools.lru_cache(MOST_OPEN)
def opened(path):
    """A tar file, open. Reading by offset needs no position, so processes may share it."""
    return open(path, "rb", buffering=0)


class Files:
    """Takes the place of an array of paths, where some images lie in tar files. Like such an array, it is a
    few large buffers, which worker processes share.

    names       (N,) byte strings
    places      (N, 3) int64: the number of the tar file in `tars`, or -1; where the image begins; its bytes
    """

    def __init__(self, names, places, tars):
        self.names = names
        self.places = places
        self.tars = tars

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        """One path, or a Member; for an array of indices, these Files."""
        if not isinstance(i, (int, np.integer)):
            return Files(self.names[i], self.places[i], self.tars)
        number, offset, size = self.places[i].tolist()
        if number < 0:
            return self.names[i]
        member = Member(self.names[i])
        member.place = self.tars[number], offset, size
        return member


def gather(folders):
    """All images of some folders, {path: Folder} -> an array of their paths, or Files where some lie in tar
    files."""
    names = np.array([os.path.join(path, b"") + name for path, folder in folders.items()
                      for name in folder.names])
    tars = sorted({folder.tar for folder in folders.values() if folder.tar})
    if not tars:
        return names
    places = []
    for folder in folders.values():
        of_folder = np.full((len(folder.names), 3), -1)
        if folder.tar:
            of_folder[:, 0] = tars.index(folder.tar)
            of_folder[:, 1:] = np.reshape(folder.places, (-1, 2))
        places.append(of_folder)
    return Files(names, np.concatenate(places), tars)


# --- What lies in a tar file ----------------------------------------------------------------------------

def is_tar(name):
    """Whether a name (bytes) is that of a tar file; checkpoint.pth.tar is none, by an old custom."""
    stem, suffix = os.path.splitext(name.lower())
    return suffix == SUFFIX and bool(stem) and not stem.endswith((b".pth", b".pt", b".ckpt"))


def as_folder(path):
    """The folder that a tar file is in the place of."""
    return path[:-len(SUFFIX)]


def list_tar(path, why_no_image):
    """A tar file -> its images, {place: Folder}, and {reason: members that are no images}

    A place is a tuple of names, from the folder on that the tar file is in the place of.
    why_no_image    [folders and file] that a member's name is made of -> the reason, or None
    Raises Refused where it can't be read, is compressed, damaged, or no tar file.
    """
    shown = os.fsdecode(path)
    try:
        with open(path, "rb") as f:
            size = os.path.getsize(path)
            if size > LARGE and os.environ.get("LOCAL_RANK", "0") == "0":
                warn(f"{shown}: finding the images in it, which takes minutes on a slow disk")
            beginning = f.read(8)
            for signature, what in COMPRESSED.items():
                if beginning.startswith(signature):
                    raise Refused(f"{shown}: compressed ({what}), so no image can be read by its place; "
                                  "decompress it, or unpack it")
            look = functools.partial(look_into, path, f.fileno(), why_no_image)
            tree, left_out, inner = look(((), 0, size))
            with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
                for found, passed_over, _ in pool.map(look, inner):
                    tree |= found
                    left_out += passed_over
    except OSError as error:
        raise Refused(f"{shown}: can't be read ({error.strerror})") from None
    return tree, left_out


def look_into(path, descriptor, why_no_image, span):
    """A tar file, or one within it -> its images, {reason: others}, and the spans of the tar files in it: no
    deeper ones are looked into.

    span    its place, and where it starts and ends in the open file: the whole file has the place ()
    """
    place, start, end = span
    tree = {}
    left_out = collections.Counter()
    inner = []
    where = os.fsdecode(path)
    if place:
        where += f", {os.fsdecode(b'/'.join(place))}.tar in it"
    for parts, offset, size, is_file in members(descriptor, start, end, where):
        *folders, name = parts
        reason = why_no_image(parts) if is_file else "links and the like in a tar file"
        if is_file and not place and is_tar(name):
            inner.append(((*folders, as_folder(name)), offset, offset + size))
        elif reason:
            left_out[reason] += 1
        else:
            folder = tree.setdefault(tuple(folders), Folder([], path, array.array("q")))
            folder.names.append(name)
            folder.places.extend((offset, size))
    # `tar cf train.tar train` has put all into a folder of the tar file's own name: that is no level.
    stem = place[-1] if place else os.path.basename(as_folder(path))
    held = [*tree, *(folders for folders, *_ in inner)]
    first = 1 if all(folders[:1] == (stem, ) for folders in held) else 0
    tree = {place + folders[first:]: folder for folders, folder in tree.items()}
    inner = [(place + folders[first:], *rest) for folders, *rest in inner]
    return tree, left_out, inner


# --- The format (POSIX pax, with GNU's long names) --------------------------------------------------------

BLOCK = 512  # bytes, of which a tar file is made up
END = bytes(BLOCK)
PLAIN = (b"0", b"\0", b"7")  # kinds of members: files
WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes
FOLDER, PAX, LONG_NAME, OF_ALL, LONG_LINK = b"5", b"x", b"L", b"g", b"K"
RECORD = re.compile(rb"^\d+ (path|size|GNU\.sparse\.[^=]+)=(.*)$", re.MULTILINE)  # of a pax header


def members(descriptor, start, end, where):
    """Yield ([folders and file], offset, size, whether it is a plain file) of each member, but for folders,
    of the tar file that lies from start to end in an open file. Raises Refused where it is no whole one."""
    at = start
    extended = {}  # what headers before it say of the next member
    while (block := os.pread(descriptor, min(BLOCK, end - at), at)) != END:
        try:
            name, size, kind = parse(block)
            size = int(extended.get(b"size", size))
            if size < 0:
                raise ValueError
        except ValueError:
            problem = f"no whole tar file (no header at byte {at - start}): damaged, or cut off"
            raise Refused(f"{where}: {problem}; copy it again") from None
        offset = at + BLOCK
        at = offset if kind in WITHOUT_CONTENT else offset + -(-size // BLOCK) * BLOCK
        if at + BLOCK > end:
            problem = "no whole tar file (a member goes on behind its end): cut off"
            raise Refused(f"{where}: {problem}; copy it again")
        if kind == PAX:
            extended = dict(RECORD.findall(os.pread(descriptor, size, offset)))
        elif kind == LONG_NAME:
            extended = {b"path": os.pread(descriptor, size, offset).rstrip(b"\0")}
        elif kind not in (OF_ALL, LONG_LINK):
            name = extended.pop(b"path", name)
            extended.pop(b"size", None)
            parts = [part for part in name.split(b"/") if part not in (b"", b".")]
            if parts and kind != FOLDER and not name.endswith(b"/"):
                yield parts, offset, size, kind in PLAIN and not extended  # what is left is of a sparse file
            extended = {}


def parse(block):
    """A header -> the member's name, size and kind. Raises ValueError where it is none."""
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")  # the checksum counts itself as blanks
    if len(block) != BLOCK or number(block[148:156]) != total:
        raise ValueError
    name = text(block[:100])
    if block[257:263] == b"ustar\0" and block[345]:
        name = text(block[345:500]) + b"/" + name
    return name, number(block[124:136]), block[156:157]


def text(field):
    """A field of a header up to its end."""
    return field.partition(b"\0")[0]


def number(field):
    """A number in a header: octal digits, or GNU's bytes for large ones."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(text(field).strip() or b"0", 8)
