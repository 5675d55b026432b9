"""Uncompressed tar files in the place of folders: nothing is unpacked, each image is read where it lies.

A million small files are a burden for the disks that many machines share; a tar file is one file. A member
is called as if the tar file were a folder of its name: train.tar has train/<class>/<file>. A tar file in a
tar file is a folder too, as in ILSVRC2012_img_train.tar, which has one for each class.

To know where the members lie, all of a tar file's headers are read once. This index is kept in a file, and is
good for as long as the tar file's size and time stay as they were.
"""
import array
import collections
import contextlib
import hashlib
import os
import tarfile
import time
from typing import NamedTuple

import numpy as np

from ..common.errors import Refused
from ..common.files import replacing
from ..common.progress import warn

SUFFIX = b".tar"
BLOCK = 512       # bytes, of which a tar file is made up
DEPTH = 3         # so many tar files in each other are looked into
VERSION = 1       # of the files with an index
LINES = 10        # seconds between two lines of progress
LONGEST = 4096    # letters of a path
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
        """All bytes of it. Raises Refused where the tar file has changed, or can't be read."""
        shown = os.fsdecode(self.archive.path)
        try:
            descriptor = opened(self.archive.path)
            if of_now(self.archive.path, os.fstat(descriptor)) != self.archive:
                raise Refused(f"{shown}: has changed since its index was made; start again")
            return os.pread(descriptor, self.size, self.offset)
        except OSError as error:  # it is not this image that is bad
            raise Refused(f"{shown}: can't be read ({error.strerror})") from None


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

MOST_OPEN = 64  # tar files at a time; systems allow a process some thousand descriptors, or 256
descriptors = collections.OrderedDict()  # {path: descriptor}, the one that was used last at the end


def opened(path):
    """The descriptor of a tar file. To read by offset needs no position, so that processes may share it."""
    if path in descriptors:
        descriptors.move_to_end(path)
        return descriptors[path]
    descriptors[path] = os.open(path, os.O_RDONLY)
    if len(descriptors) > MOST_OPEN:
        _, oldest = descriptors.popitem(last=False)
        os.close(oldest)
    return descriptors[path]


def of_now(path, status):
    """A tar file as it is -> Archive"""
    return Archive(path, status.st_size, status.st_mtime_ns)


# --- The index ------------------------------------------------------------------------------------------

def is_tar(name):
    """Whether a name (bytes) is that of a tar file; checkpoint.pth.tar is none, by an old custom."""
    stem, suffix = os.path.splitext(name.lower())
    return suffix == SUFFIX and bool(stem) and not stem.endswith((b".pth", b".pt", b".ckpt"))


def as_folder(path):
    """The folder that a tar file is in the place of."""
    return path[:-len(SUFFIX)]


def index_of(path, keep, is_wanted, rules=""):
    """The index of a tar file, from the folder `keep` if it lies there, else made and kept there -> Index

    keep        a folder, or None
    is_wanted   (path in the tar file) -> None for an image, else the reason why it is none
    rules       what is_wanted goes by, in words: a kept index of other rules is made again
    Raises Refused where it can't be read, is no tar file, compressed, or damaged.
    """
    shown = os.fsdecode(path)
    try:
        status = os.stat(path)
        archive = of_now(path, status)
        sign = hashlib.sha256(repr((VERSION, rules, archive[1:], status.st_ctime_ns)).encode()).hexdigest()
        kept = keep and os.path.join(keep, name_of_index(path))
        index = kept and read_index(kept, archive, sign)
        if not index:
            with open(path, "rb") as f:
                index = Scan(f, archive, is_wanted).index()
            # Of several processes only one writes; a folder that can't be written to is no reason to end.
            if kept and os.environ.get("RANK", "0") == "0":
                with contextlib.suppress(Refused, OSError):
                    write_index(kept, index, sign)
    except OSError as error:
        raise Refused(f"{shown}: can't be read ({error.strerror})") from None
    folder = as_folder(path) + b"/"
    return index._replace(names=np.char.add(folder, index.names) if len(index.names) else index.names)


def name_of_index(path):
    """The file for a tar file's index: by its name, and where it lies."""
    place = hashlib.sha256(os.path.realpath(path)).hexdigest()[:12]
    return f"index-of-{os.path.basename(os.fsdecode(path))}-{place}.npz"


def write_index(kept, index, sign):
    """The index into a file; names without the folder."""
    os.makedirs(os.path.dirname(kept) or ".", exist_ok=True)
    reasons = list(index.left_out)
    with replacing(kept) as f:
        np.savez(f, sign=sign, names=index.names, offset=index.offset, size=index.size,
                 reasons=np.array(reasons, str), counts=np.array([index.left_out[r] for r in reasons], int))


def read_index(kept, archive, sign):
    """The index in a file -> Index; None where there is none, or it is another tar file's, or damaged."""
    try:
        with np.load(kept) as found:
            if found["sign"] != sign:
                return None
            left_out = dict(zip(found["reasons"].tolist(), found["counts"].tolist()))
            names, offset, size = found["names"], found["offset"], found["size"]
    except Exception:  # a damaged file can raise anything
        return None
    sound = names.dtype.kind == "S" and offset.shape == size.shape == names.shape
    return Index(archive, names, offset, size, left_out) if sound else None


class Scan:
    """The reading of all headers of a tar file, which is open. It says how far it is."""

    def __init__(self, f, archive, is_wanted):
        self.f = f
        self.archive = archive
        self.is_wanted = is_wanted
        self.shown = os.fsdecode(archive.path)
        self.left_out = collections.Counter()
        self.members = 0
        self.told = time.monotonic()

    def index(self):
        """-> Index, the names without the folder. Raises Refused."""
        beginning = self.f.read(8)
        for signature, what in COMPRESSED.items():
            if beginning.startswith(signature):
                raise Refused(f"{self.shown}: compressed ({what}), so that no image can be read by its "
                              "place; decompress it, or unpack it")
        stem = os.path.basename(as_folder(self.archive.path))
        found, places = self.images(0, self.archive.size, b"", stem)
        names = np.array(found, bytes)
        order = np.argsort(names, kind="stable")
        names = names[order]
        counts = np.append(names[1:] != names[:-1], True)[:len(names)]  # of two of a name, the last
        offset, size = np.array(places, np.int64).reshape(-1, 2)[order][counts].T
        return Index(self.archive, names[counts], offset.copy(), size.copy(), dict(self.left_out))

    def images(self, start, end, folder, stem, depth=0):
        """The images of the tar file that lies from start to end: a list of names, and an array of offset and
        size of each in turn. (A million tuples would take half a gigabyte, in the worker processes too.)

        folder, stem    the folder in whose place it is, and that folder's own name
        Names are in `folder`. Members that are tar files are looked into. Raises Refused where one is
        damaged: where it doesn't end with a block of zeros, for one.
        """
        where = f"{self.shown}, {os.fsdecode(folder)}.tar in it" if folder else self.shown
        names = []
        places = array.array("q")
        try:
            for member in self.headers(start, end):
                name = os.path.join(folder, clean(member.name))
                inner = as_folder(name)
                reason = reason_of(member) or (None if is_tar(name) else self.is_wanted(name))
                if reason:
                    self.left_out[reason] += 1
                elif not is_tar(name):
                    names.append(name)
                    places.extend((member.offset_data, member.size))
                elif depth + 1 < DEPTH:
                    first, end_of_it = member.offset_data, member.offset_data + member.size
                    theirs = self.images(first, end_of_it, inner, os.path.basename(inner), depth + 1)
                    names += theirs[0]
                    places += theirs[1]
                else:
                    self.left_out["tar files deep in others"] += 1
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            problem = f"{where}: no whole tar file ({error})"
            raise Refused(f"{problem}: damaged, or cut off; copy it again") from None
        return lifted(names, folder, stem), places

    def headers(self, start, end):
        """Yield the members of the tar file that lies from start to end, but for folders. Raises
        tarfile.ReadError, and ValueError for headers that nobody writes."""
        self.f.seek(start)
        tar = tarfile.open(fileobj=self.f, mode="r:")
        before = start
        while True:
            member = tar.next()
            if member is None:
                break
            tar.members.clear()  # it would keep them all
            if member.size < 0 or not before <= member.offset_data <= tar.offset <= end:
                place = member.offset_data - start
                raise tarfile.ReadError(f"a member at byte {place} goes on behind its end")
            before = tar.offset
            self.members += 1
            self.tell(tar.offset)
            if not member.isdir():
                yield member
        self.f.seek(tar.offset)
        if self.f.read(BLOCK) != bytes(BLOCK) or tar.offset + BLOCK > end:
            raise tarfile.ReadError(f"no end mark at byte {tar.offset - start} of {end - start}")
        left = end - tar.offset - BLOCK
        while left > 0:
            block = self.f.read(min(left, 2 ** 20))
            if not block or block.strip(b"\0"):
                raise tarfile.ReadError("something behind its end mark, perhaps another tar file: tar -A "
                                        "joins them, cat does not")
            left -= len(block)

    def tell(self, position):
        """A line, every so many seconds, from one process of a machine."""
        if self.members % 1000 == 0 and time.monotonic() - self.told > LINES:
            self.told = time.monotonic()
            if os.environ.get("LOCAL_RANK", "0") == "0":
                share = position / self.archive.size
                warn(f"{self.shown}: index of {self.members:,} members, {share:.0%} of the file")


def lifted(names, folder, stem):
    """The names without a folder of the tar file's own name, if all are in it: `tar cf train.tar train`
    makes one."""
    around = os.path.join(folder, stem, b"")
    if not all(name.startswith(around) for name in names):
        return names
    return [os.path.join(folder, name[len(around):]) for name in names]


def clean(name):
    """A member's name as bytes, without "./" and the like."""
    return b"/".join(part for part in os.fsencode(name).split(b"/") if part not in (b"", b"."))


def reason_of(member):
    """Why a member can't be an image, by its kind; None for a file."""
    if member.islnk() or member.issym():
        return "links in a tar file"
    if not member.isreg() or member.issparse():
        return "members of a tar file that are no plain files"
    if ".." in member.name.split("/") or len(member.name) > LONGEST:
        return "members of a tar file whose names no folder can have"
    return None
