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
import tarfile

from ..common.errors import Refused

SUFFIX = b".tar"
END = bytes(tarfile.BLOCKSIZE)  # zeros, behind the last member
MOST_OPEN = 64  # tar files at a time; systems allow a process some thousand files, or 256


def is_tar(name):
    """Whether a name (bytes) is that of a tar file; checkpoint.pth.tar isn't, by an old custom."""
    return name.endswith(SUFFIX) and not name.endswith((b".pth.tar", b".pt.tar", b".ckpt.tar"))


def as_folder(path):
    """The folder whose place a tar file takes."""
    return path.removesuffix(SUFFIX)


def member_name(tar, name, member):
    """The name of a member, and behind it what its path needs."""
    return name + b"\0%d %d %d" % (len(as_folder(tar)), member.offset_data, member.size)


def plain(path):
    """A path, or a name, without what a member's has behind it."""
    return path.partition(b"\0")[0]


def open_bytes(path):
    """A file, or a member of a tar file -> an open file.

    Raises Refused if the tar file can't be read: its images aren't bad then.
    """
    name, is_member, numbers = path.partition(b"\0")
    if not is_member:
        return open(path, "rb")
    length, offset, size = map(int, numbers.split())
    tar = name[:length] + SUFFIX
    try:
        return io.BytesIO(os.pread(opened(tar).fileno(), size, offset))
    except OSError as error:
        raise Refused(f"{os.fsdecode(tar)}: can't be read ({error.strerror})") from None


@functools.lru_cache(MOST_OPEN)
def opened(path):
    """A tar file, open. Reading by offset needs no position, so processes may share it."""
    return open(path, "rb", buffering=0)


def members(path, span=None):
    """Yield each member (tarfile.TarInfo) of a tar file, except folders.

    span    where a tar file inside this one starts and ends: then it is that one
    Raises Refused if it isn't a whole, uncompressed tar file.
    """
    shown = os.fsdecode(path)
    start, end = span or (0, os.path.getsize(path))
    try:
        with open(path, "rb") as f:
            f.seek(start)
            tar = tarfile.TarFile(fileobj=f)
            while member := tar.next():
                if tar.offset <= member.offset:
                    raise tarfile.ReadError("a size below 0 leads back")
                tar.members.clear()  # of a million, it would keep them all
                if not member.isdir():
                    yield member
            f.seek(tar.offset)
            is_whole = f.read(len(END)) == END and f.tell() <= end
    except OSError as error:
        raise Refused(f"{shown}: can't be read ({error.strerror})") from None
    except Exception:  # a damaged file can raise anything
        is_whole = False
    if not is_whole:
        inside = f", the tar file inside it at byte {start}," if span else ""
        raise Refused(f"{shown}{inside} is damaged, cut off or compressed; copy it again, or unpack it")
