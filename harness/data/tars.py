"""Uncompressed tar files in place of folders: nothing is unpacked.

A million small files are a burden for the disks that many machines share; a tar file is one file. Its members
are named as if it were a folder of its own name: train.tar has train/<class>/<file>. Headers are all read at
the start, to know where each image begins.

The path of a member is its name, then a zero byte, which no file's name can have, and three numbers: the
length of the tar file's own name without its suffix, where the member begins, and its bytes. So one array
holds the paths of files and of members alike.
"""
import functools
import io
import os
import re

from ..common.errors import Away, Refused

SUFFIX = b".tar"
MOST_OPEN = 64  # tar files at a time; systems allow a process some thousand files, or 256


def is_tar(name):
    """Whether a name (bytes) is that of a tar file; checkpoint.pth.tar isn't, by an old custom."""
    return name.endswith(SUFFIX) and not name.endswith((b".pth.tar", b".pt.tar", b".ckpt.tar"))


def as_folder(path):
    """The folder whose place a tar file takes."""
    return path.removesuffix(SUFFIX)


def member_name(tar, name, offset, size):
    """The name of a member, and behind it what its path needs."""
    return name + b"\0%d %d %d" % (len(as_folder(tar)), offset, size)


def plain(path):
    """A path, or a name, without what a member's has behind it."""
    return path.partition(b"\0")[0]


def open_bytes(path):
    """A file, or a member of a tar file -> an open file.

    Raises Away if that, or the tar file, can't be read: no image is bad then.
    """
    file, is_member, numbers = path.partition(b"\0")
    try:
        if not is_member:
            return open(file, "rb")
        length, offset, size = map(int, numbers.split())
        file = file[:length] + SUFFIX
        return io.BytesIO(os.pread(opened(file).fileno(), size, offset))
    except OSError as error:
        opened.cache_clear()  # on a network disk, an open file can become stale
        raise Away(f"{os.fsdecode(file)}: can't be read ({error.strerror})") from None


def size_of(path):
    """The size of a file, or of a member of a tar file, in bytes. Raises OSError if it is away."""
    file, is_member, numbers = path.partition(b"\0")
    return int(numbers.split()[-1]) if is_member else os.path.getsize(file)


@functools.lru_cache(MOST_OPEN)
def opened(path):
    """A tar file, open. Reading by offset needs no position, so processes may share it."""
    return open(path, "rb", buffering=0)


def members(path, span=None):
    """Yield (name, where its content begins, bytes, whether it is a plain file) of each member of a tar file,
    except folders.

    span    where a tar file inside this one starts and ends: then it is that one
    Raises Refused if it isn't a whole, uncompressed tar file.
    """
    shown = os.fsdecode(path)
    try:
        descriptor = opened(path).fileno()
        start, end = span or (0, os.path.getsize(path))
        yield from read_headers(descriptor, start, end)
    except OSError as error:
        raise Refused(f"{shown}: can't be read ({error.strerror})") from None
    except ValueError:
        raise Refused(f"{shown}, or a tar file inside it, is damaged, cut off or compressed; copy it again, "
                      "or unpack it") from None


# --- The format (POSIX pax, with GNU's long names): Python's tarfile takes two to four times as long --------

BLOCK = 512  # bytes: headers and contents start at multiples of it
FILES = (b"0", b"\0", b"7")  # kinds of members
FOLDER = b"5"
WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", FOLDER, b"6")  # links, devices, pipes
PAX, LONG_NAME, OF_ALL, LONG_LINK = b"x", b"L", b"g", b"K"  # headers about the next member, or about all
RECORD = re.compile(rb"^\d+ (path|size|GNU\.sparse\.[^=]+)=(.*)$", re.MULTILINE)  # in a pax header


def read_headers(descriptor, at, end):
    """What `members` yields, of the tar file from `at` to `end` in an open file.

    Raises ValueError if it isn't a whole one.
    """
    said = {}  # of the next member, by the headers before its own
    while (block := os.pread(descriptor, min(BLOCK, end - at), at)) != bytes(BLOCK):  # zeros end it
        name, size, kind = parse(block)
        size = int(said.get(b"size", size))
        content = at + BLOCK
        at = content if kind in WITHOUT_CONTENT else content + -(-size // BLOCK) * BLOCK
        if size < 0 or at + BLOCK > end:
            raise ValueError
        if kind == PAX:
            said |= RECORD.findall(os.pread(descriptor, size, content))
        elif kind == LONG_NAME:
            said[b"path"] = os.pread(descriptor, size, content).rstrip(b"\0")
        elif kind not in (OF_ALL, LONG_LINK):
            name = said.pop(b"path", name)
            said.pop(b"size", None)
            if b"\0" in name:  # which would end it, in a path of ours
                raise ValueError
            if kind != FOLDER and not name.endswith(b"/"):
                yield name, content, size, kind in FILES and not said  # the rest is about a sparse file
            said = {}


def parse(block):
    """A header -> the member's name, size and kind. Raises ValueError if it isn't one."""
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
    """A number in a header: octal digits, or GNU's bytes if it is large."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(text(field).strip() or b"0", 8)
