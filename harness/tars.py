"""Uncompressed tar files in the place of folders: nothing is unpacked, each image is read where it lies.

A million small files are a burden for the disks that many machines share; a tar file is one file. A member
is called as if the tar file were a folder of its name: train.tar has train/<class>/<file>. A tar file in a
tar file is a folder too, as in ILSVRC2012_img_train.tar, which has one for each class.

To know where the members lie, all of a tar file's headers are read once. This index is kept in a file, and is
good for as long as the tar file's size and time stay as they were.
"""
import collections
import contextlib
import hashlib
import os
import tarfile
import time
from typing import NamedTuple

import numpy as np

from .errors import Refused
from .files import replacing
from .progress import warn

SUFFIX = b".tar"
BLOCK = 512       # bytes, of which a tar file is made up
DEPTH = 3         # so many tar files in each other are looked into
VERSION = 1       # of the files with an index
LINES = 10        # seconds between two lines of progress
COMPRESSED = {  # by the first bytes
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}


class Archive(NamedTuple):
    """A tar file, as it was when its index was made."""
    path: bytes
    size: int
    modified: int  # time, in nanoseconds


class Index(NamedTuple):
    """Where the images of a tar file lie."""
    archive: Archive
    names: object    # (N,) byte strings, sorted: as paths, as if the tar file were a folder
    offset: object   # (N,) int64, where an image begins in the tar file
    size: object     # (N,) int64, in bytes
    left_out: dict   # {reason: how many members that are no images}


class Member(bytes):
    """An image in a tar file. The bytes are its path, as if the tar file were a folder."""

    def content(self):
        """All bytes of it. Raises Refused where the tar file has changed."""
        return os.pread(opened(self.archive), self.size, self.offset)


class Files:
    """In the place of an array of paths: files, some of which lie in tar files. Like such an array, it is a
    few large buffers, which worker processes share.

    names       (N,) byte strings
    archive     (N,) int64: the number of the tar file among `archives`, or -1 for a file of its own
    offset, size    (N,) int64, of those in tar files
    """

    def __init__(self, names, archive, offset, size, archives):
        self.names = names
        self.archive = archive
        self.offset = offset
        self.size = size
        self.archives = archives

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        """One path, or a Member; for an array of indices, these Files."""
        if not isinstance(i, (int, np.integer)):
            return Files(self.names[i], self.archive[i], self.offset[i], self.size[i], self.archives)
        if self.archive[i] < 0:
            return self.names[i]
        member = Member(self.names[i])
        member.archive = self.archives[self.archive[i]]
        member.offset = int(self.offset[i])
        member.size = int(self.size[i])
        return member


class Joined:
    """Several such sequences, one after the other."""

    def __init__(self, parts):
        self.parts = parts

    def __len__(self):
        return sum(map(len, self.parts))

    def __getitem__(self, i):
        for part in self.parts:
            if i < len(part):
                return part[i]
            i -= len(part)
        raise IndexError


def names_of(files):
    """The paths of files, in an array."""
    return files.names if isinstance(files, Files) else files


def locate(names, indexes):
    """An array of paths, some of which are members of these tar files -> Files; the array itself, where there
    is no tar file."""
    if not indexes:
        return names
    number = np.full(len(names), -1)
    offset = np.zeros(len(names), np.int64)
    size = np.zeros(len(names), np.int64)
    for k, index in enumerate(indexes):
        place = np.searchsorted(index.names, names).clip(max=max(0, len(index.names) - 1))
        found = np.flatnonzero(index.names[place] == names) if len(index.names) else []
        number[found] = k
        offset[found] = index.offset[place[found]]
        size[found] = index.size[place[found]]
    return Files(names, number, offset, size, [index.archive for index in indexes])


# --- Reading --------------------------------------------------------------------------------------------

descriptors = {}  # of the tar files that this process has open. To read by offset needs no position


def opened(archive):
    """The descriptor of a tar file. Raises Refused where it isn't the one that its index is of."""
    key = archive, os.getpid()
    if key not in descriptors:
        descriptor = os.open(archive.path, os.O_RDONLY)
        if of_now(archive.path, os.fstat(descriptor)) != archive:
            raise Refused(f"{os.fsdecode(archive.path)}: has changed since its index was made; start again")
        descriptors[key] = descriptor
    return descriptors[key]


def of_now(path, status):
    """A tar file as it is -> Archive"""
    return Archive(path, status.st_size, status.st_mtime_ns)


# --- The index ------------------------------------------------------------------------------------------

def is_tar(name):
    """Whether a name (bytes) is that of a tar file."""
    return name.lower().endswith(SUFFIX) and len(name) > len(SUFFIX)


def as_folder(path):
    """The folder that a tar file is in the place of."""
    return path[:-len(SUFFIX)]


def index_of(path, keep, is_wanted):
    """The index of a tar file, from the folder `keep` if it lies there, else made and kept there -> Index

    keep        a folder, or None
    is_wanted   (path in the tar file) -> None for an image, else the reason why it is none
    Raises Refused where it is no tar file, compressed, or damaged.
    """
    archive = of_now(path, os.stat(path))
    kept = keep and os.path.join(keep, name_of_index(path))
    index = kept and read_index(kept, archive)
    if not index:
        index = scan(archive, is_wanted)
        # Of several processes only one writes; a folder that can't be written to is no reason to end.
        if kept and os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(Refused, OSError):
                write_index(kept, index)
    folder = as_folder(path) + b"/"
    return index._replace(names=np.char.add(folder, index.names) if len(index.names) else index.names)


def name_of_index(path):
    """The file for a tar file's index: by its name, and where it lies."""
    place = hashlib.sha256(os.path.realpath(path)).hexdigest()[:12]
    return f"index-of-{os.path.basename(os.fsdecode(path))}-{place}.npz"


def write_index(kept, index):
    """The index into a file; names without the folder."""
    os.makedirs(os.path.dirname(kept) or ".", exist_ok=True)
    reasons = list(index.left_out)
    with replacing(kept) as f:
        np.savez(f, version=VERSION, archive=[index.archive.size, index.archive.modified],
                 names=index.names, offset=index.offset, size=index.size,
                 reasons=np.array(reasons, str), counts=np.array([index.left_out[r] for r in reasons], int))


def read_index(kept, archive):
    """The index in a file -> Index; None where there is none, or it is another tar file's, or damaged."""
    try:
        with np.load(kept) as found:
            if found["version"] != VERSION or tuple(found["archive"]) != archive[1:]:
                return None
            left_out = dict(zip(found["reasons"].tolist(), found["counts"].tolist()))
            names, offset, size = found["names"], found["offset"], found["size"]
    except Exception:  # a damaged file can raise anything
        return None
    sound = names.dtype.kind == "S" and offset.shape == size.shape == names.shape
    return Index(archive, names, offset, size, left_out) if sound else None


def scan(archive, is_wanted):
    """Read all headers of a tar file -> Index, the names without the folder. Says how far it is."""
    shown = os.fsdecode(archive.path)
    found = {}
    left_out = collections.Counter()
    with open(archive.path, "rb") as f:
        beginning = f.read(8)
        for signature, what in COMPRESSED.items():
            if beginning.startswith(signature):
                raise Refused(f"{shown}: compressed ({what}), so that no image can be read by its place; "
                              "decompress it, or unpack it")
        told = time.monotonic()
        for members, (name, offset, size, reason) in enumerate(walk_tar(f, 0, archive.size, b"", shown), 1):
            reason = reason or is_wanted(name)
            if reason:
                left_out[reason] += 1
            else:
                found[name] = offset, size  # of two members of a name, the last counts
            if members % 1000 == 0 and time.monotonic() - told > LINES:
                told = time.monotonic()
                if os.environ.get("LOCAL_RANK", "0") == "0":
                    warn(f"{shown}: index of {members:,} members, {offset / archive.size:.0%} of the file")
    names = sorted(found)
    places = np.array([found[name] for name in names], np.int64).reshape(-1, 2)
    return Index(archive, np.array(names, bytes), places[:, 0].copy(), places[:, 1].copy(), dict(left_out))


def walk_tar(f, start, end, folder, shown, depth=0):
    """Yield (name, offset, bytes, reason) of each member of a tar file which lies in f from start to end.

    reason: why it can't be an image, or None. Names are in `folder`. Members that are tar files are looked
    into. Raises Refused where it is damaged: where it doesn't end with a block of zeros, for one.
    """
    where = f"{shown}, {os.fsdecode(folder[:-1])}.tar in it" if folder else shown
    f.seek(start)
    try:
        tar = tarfile.open(fileobj=f, mode="r:")
        while True:
            member = tar.next()
            if member is None:
                break
            tar.members.clear()  # it would keep them all
            offset = member.offset_data
            name = os.path.join(folder, clean(member.name))
            if member.isdir():
                continue
            if member.isreg() and is_tar(name) and depth + 1 < DEPTH and not member.issparse():
                inner = as_folder(name) + b"/"
                yield from walk_tar(f, offset, offset + member.size, inner, shown, depth + 1)
            else:
                yield name, offset, member.size, reason_of(member)
        f.seek(tar.offset)
        if f.read(BLOCK) != bytes(BLOCK) or tar.offset + BLOCK > end:
            raise tarfile.ReadError(f"no end mark at byte {tar.offset - start} of {end - start}")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise Refused(f"{where}: no whole tar file ({error}): damaged, or cut off; copy it again") from None


def clean(name):
    """A member's name as bytes, without "./" and the like."""
    return b"/".join(part for part in os.fsencode(name).split(b"/") if part not in (b"", b"."))


def reason_of(member):
    """Why a member can't be an image, by its kind; None for a file."""
    if member.islnk() or member.issym():
        return "links in a tar file"
    if not member.isreg() or member.issparse():
        return "members of a tar file that are no plain files"
    if ".." in member.name.split("/"):
        return "members whose names lead out of the tar file"
    return None
