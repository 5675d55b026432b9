"""Files that are whole at every instant, and reading files with suspicion.

A program can be killed, and a disk can be full, in the middle of writing. So nothing is ever written in
place: see replacing(). A file of weights can come from anywhere. So no code in it is run, and whatever
reading it raises becomes one line: see read() and refusing().
"""
import contextlib
import itertools
import os
import struct
import tarfile
import warnings
import zipfile

import torch
from PIL import PngImagePlugin

from . import unpickling
from .errors import Refused


@contextlib.contextmanager
def replacing(path, mode="wb", keep=None):
    """Write a file so that at every instant either the old one or the new one is there, whole.

    It is written under a temporary name, brought out to the disk, then renamed.
    keep    another name under which the old file stays. For an instant it is there under that name only
    Raises Refused, the old file untouched, where the new one can't be written.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, mode) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as error:  # torch.save wraps the one into the other
        with contextlib.suppress(OSError):
            os.remove(temporary)  # half a file, on what may be a full disk
        cause = error.__cause__ or error.__context__ or error
        raise Refused(f"{path}: can't be written ({cause}); what was there is untouched") from None
    if keep and os.path.exists(path):
        os.replace(path, keep)
    os.replace(temporary, path)
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    with contextlib.suppress(OSError):  # some network disks can't do it for a folder: CIFS, FUSE
        os.fsync(folder)  # the new name must reach the disk too
    os.close(folder)


def save(content, path, keep=None):
    """torch.save into a file that is whole at every instant. Raises Refused where it can't be written."""
    with replacing(path, keep=keep) as f:
        torch.save(content, f)


@contextlib.contextmanager
def refusing(path, verdict):
    """Turn whatever is raised within into Refused: what is in a foreign or a hostile file can raise
    anything."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise Refused(f"{path}: {verdict} ({type(error).__name__}: {reason})") from None


def read(path):
    """A file that torch.save wrote -> the dict in it. No code in the file is run (unpickling.py).

    Raises Refused where it is missing, damaged or foreign. Files of torch 1.6 or later have checksums, and
    all of them are verified before anything is read.
    """
    try:
        if os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "").lower() in ("1", "y", "yes", "true"):
            raise Refused("under TORCH_FORCE_WEIGHTS_ONLY_LOAD torch.load takes no reader but its own; unset "
                          "it here, where no code of a file is run anyway")
        is_new = has_checksums(path)
        if is_new:
            check_zip(path)
        elif members := tar_members(path):
            if {"storages", "tensors", "pickle"} <= members:
                raise Refused("in the form of torch before 0.1.10; load it with torch, and torch.save it")
            raise Refused("a tar archive; unpack it, and name the file of weights")
        elif zipfile.is_zipfile(path):
            check_names(zipfile.ZipFile(path))
        pickles = unpickling.Pickles(os.path.getsize(path))
        with warnings.catch_warnings(action="ignore"):  # the source of a pickled network is not there
            # latin1: what Python 2 has pickled as text can be any bytes.
            content = torch.load(path, map_location="cpu", pickle_module=pickles, weights_only=False,
                                 encoding="latin1")
        if not is_new:
            pickles.check_all_there()
    except Exception as error:  # a damaged file can raise anything
        raise Refused(f"{path}: can't be read ({reason_why(error, path)})") from None
    if not isinstance(content, dict):
        raise Refused(f"{path}: can't be read (it holds a {type(content).__name__}, not named tensors)")
    return content


def has_checksums(path):
    """Whether torch takes a file for a zip archive, the form since torch 1.6: by its first four bytes."""
    with open(path, "rb") as f:
        return f.read(4) == b"PK\x03\x04"


def tar_members(path):
    """The names of the first members of an uncompressed tar file; empty for any other file."""
    with contextlib.suppress(tarfile.TarError, OSError), tarfile.open(path, "r:") as archive:
        return {member.name for member in itertools.islice(archive, 10)}
    return set()


def check_zip(path):
    """Raise Refused, with the reason alone, for a zip archive that is damaged, or none of torch.save's.

    Python's reader and torch's can be made to find different things in one file, or Python's none at all:
    then what was checked is not what is read, and torch runs a TorchScript program without asking. So both
    must find the same members at the same places, uncompressed, as torch.save writes them.
    """
    if not zipfile.is_zipfile(path):
        raise Refused("damaged: cut off, or with something behind its end")
    archive = zipfile.ZipFile(path)
    check_names(archive)
    found = {}
    with open(path, "rb") as f:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise Refused(f"damaged: {member.filename} in it is compressed, which torch.save never does")
            f.seek(member.header_offset + 26)
            name, extra = struct.unpack("<HH", f.read(4))
            _, _, inside = member.filename.partition("/")  # without the folder that all are in
            found[inside] = member.header_offset + 30 + name + extra
        f.seek(0)  # where torch's reader begins
        reader = torch._C.PyTorchFileReader(f)
        places = {name: reader.get_record_offset(name) for name in reader.get_all_records()}
    if sum(member.file_size for member in archive.infolist()) > os.path.getsize(path):
        raise Refused("damaged: its members are larger than itself")
    if places != found:
        raise Refused("damaged: it has two tables of contents, which differ")
    damaged = archive.testzip()
    if damaged is not None:
        raise Refused(f"{damaged} in it fails its checksum")


def check_names(archive):
    """Raise Refused for a zip archive that is no file of weights, by the names in it."""
    names = {os.path.basename(name) for name in archive.namelist()}
    if "constants.pkl" in names:  # torch.load would run it
        raise Refused("a TorchScript program, not weights; torch.save(program.state_dict()) where it can "
                         "be run")
    if "data.pkl" not in names:
        raise Refused("a zip archive, not a file that torch.save wrote; unpack it, and name the file of "
                         "weights")


def reason_why(error, path):
    """Our words for what reading a file of weights has raised."""
    if isinstance(error, Refused):
        return str(error)
    if str(path).endswith(".safetensors"):
        return "safetensors are not read; load them where that package is, and torch.save them"
    if isinstance(error, OSError):
        return error.strerror
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "not enough memory for it"
    return "damaged, or nothing that torch.save wrote"


# --- Knowing them again ---------------------------------------------------------------------------------
# A picture of ours that lies among somebody's images must not be taken for one of them: it has one of these
# names, and a mark in its file.

OURS = (b"views.png", b"curves.png", b"neighbors.png")
MARK = "drawn by SimSiam, the reference"


def save_picture(image, path):
    """Write a PIL image as a PNG file with our mark. Raises Refused where it can't be written."""
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", MARK)
    with replacing(path) as f:
        image.save(f, "png", pnginfo=mark)


def has_mark(path):
    """Whether a file (path: bytes) has our mark. What is no regular file is not opened: it could block."""
    if not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as f:
            return MARK.encode() in f.read(256)
    except OSError:  # whoever reads it says what is wrong
        return False
