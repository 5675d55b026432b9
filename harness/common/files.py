"""Files that are whole at every instant, and reading files with suspicion.

A program can be killed, or a disk fill up, in the middle of writing. So we never write in place: see
replacing(). A file can be damaged, or come from anywhere. So we run no code in it, and whatever reading it
raises becomes one line: see read() and refusing().
"""
import contextlib
import io
import os
import zipfile

import torch
from PIL import PngImagePlugin

from .errors import Refused

A_FOLDER = 0x10  # an attribute in zip archives


@contextlib.contextmanager
def replacing(path, mode="wb", keep=None):
    """Write a file so that at every instant either the old one or the new one is there, whole.

    We write it under a temporary name, flush it to the disk, then rename it.
    keep    another name under which the old file stays. For an instant it has only that one
    Raises Refused if the new file can't be written. The old one is untouched then.
    """
    temporary = f"{path}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)  # somebody may have moved the folder away
        with open(temporary, mode) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as error:  # torch.save turns the one into the other
        with contextlib.suppress(OSError):
            os.remove(temporary)  # the disk may be full
        cause = error.__cause__ or error.__context__ or error
        raise Refused(f"{path}: can't be written ({cause}; no room?); what was there is untouched") from None
    if keep and os.path.exists(path):
        os.replace(path, keep)
    os.replace(temporary, path)
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    with contextlib.suppress(OSError):  # CIFS and FUSE can't do it for a folder
        os.fsync(folder)  # the new name must reach the disk too
    os.close(folder)


def save(content, path, keep=None):
    """torch.save into a file that is whole at every instant. Raises Refused if it can't be written."""
    with replacing(path, keep=keep) as f:
        torch.save(content, f)


@contextlib.contextmanager
def refusing(path, verdict):
    """Turn whatever is raised within into Refused: a foreign or hostile file can raise anything."""
    try:
        yield
    except (Refused, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise Refused(f"{path}: {verdict} ({type(error).__name__}: {reason})") from None


def read(path):
    """A checkpoint, as save() writes it -> the dict in it. Raises Refused if it is damaged or foreign."""
    with open(path, "rb") as f:
        data = f.read()
    with refusing(path, "can't be read: damaged, or not written by a run"):
        check_sums(data)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def check_sums(data):
    """Raise ValueError, or BadZipFile, unless the bytes of a file are a whole zip archive, torch.save's form.

    Each part has a checksum. torch.load ignores them, and reads a flipped bit without a word. One bit has no
    checksum: it turns a part into a folder, and torch.load leaves its tensor uninitialised.
    """
    archive = zipfile.ZipFile(io.BytesIO(data))
    folders = [part for part in archive.infolist() if part.external_attr & A_FOLDER and part.file_size > 0]
    if archive.testzip() or folders:
        raise ValueError("a checksum in it is wrong")


# --- Our own pictures -----------------------------------------------------------------------------------
# If one of them is among somebody's images, we must not train on it. It has one of these names, and a mark
# in the file.

OURS = (b"views.png", b"curves.png", b"neighbors.png")
MARK = "drawn by SimSiam, the reference"


def save_picture(image, path):
    """Write a PIL image as a PNG file with our mark. Raises Refused if it can't be written."""
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", MARK)
    with replacing(path) as f:
        image.save(f, "png", pnginfo=mark, compress_level=1)  # a quarter of the time, a tenth larger


def has_mark(path):
    """Whether a file (path: bytes) has our mark."""
    with contextlib.suppress(OSError), open(path, "rb") as f:  # reading it as an image says what is wrong
        return MARK.encode() in f.read(256)
    return False
