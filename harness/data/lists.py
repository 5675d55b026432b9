"""Text files that name images, a path on each line; and what to say of files that are no such list.

People name an archive, a table or a container of arrays as DATA, because other programs take those. We don't
read them: for each there are good programs, and what is in them would have to be guessed. But we say what
the file is, and what to do.
"""
import codecs
import os

from ..common.errors import Refused, printable

# What a file is, and what to do.
ARCHIVE = "an archive; unpack it, and name the folder"
ARRAYS = "arrays; write them as images, with PIL.Image.fromarray(a).save(name + '.png')"
TABLE = "a table; give a list with a path alone on each line, or class folders: train/<class>/..."
VIDEO = "a video; take pictures out of it, with ffmpeg -i FILE FOLDER/%06d.jpg"
SHARDS = "a container of records; write its images as files, in train/<class>/..."
WEIGHTS = "weights, not images; lineval.py --ckpt takes those"
DOCUMENT = "no image format that is read; convert it to PNG or JPEG"
KINDS = {  # by suffix, in lower case
    ".zip": ARCHIVE, ".gz": ARCHIVE, ".tgz": ARCHIVE, ".bz2": ARCHIVE, ".xz": ARCHIVE,
    ".7z": ARCHIVE, ".rar": ARCHIVE, ".zst": ARCHIVE,
    ".npy": ARRAYS, ".npz": ARRAYS, ".mat": ARRAYS, ".h5": ARRAYS, ".hdf5": ARRAYS, ".hdf": ARRAYS,
    ".csv": TABLE, ".tsv": TABLE, ".json": TABLE, ".jsonl": TABLE, ".xlsx": TABLE,
    ".mp4": VIDEO, ".avi": VIDEO, ".mov": VIDEO, ".mkv": VIDEO, ".webm": VIDEO,
    ".parquet": SHARDS, ".arrow": SHARDS, ".tfrecord": SHARDS, ".mdb": SHARDS, ".lmdb": SHARDS,
    ".pth": WEIGHTS, ".pt": WEIGHTS, ".ckpt": WEIGHTS, ".safetensors": WEIGHTS,
    ".heic": DOCUMENT, ".heif": DOCUMENT, ".dcm": DOCUMENT, ".nii": DOCUMENT, ".svg": DOCUMENT,
    ".pdf": DOCUMENT, ".eps": DOCUMENT, ".cr2": DOCUMENT, ".nef": DOCUMENT, ".dng": DOCUMENT,
    ".czi": DOCUMENT, ".svs": DOCUMENT,
}


def looks_like(path):
    """What a file (its path: bytes) is that is no list of images, and what to do; None where it may be
    one.

    The suffix decides, and then the first bytes: no text has a zero in it, but for UTF-16.
    """
    _, suffix = os.path.splitext(os.fsdecode(path).lower())
    if suffix in KINDS:
        return f"{suffix}: {KINDS[suffix]}"
    with open(path, "rb") as f:
        beginning = f.read(4096)
    if b"\0" in beginning and not beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "binary, neither an image nor a list of images"
    return None


def read_lines(path):
    """The lines of a text file that say something, as bytes: names of files need not be text.

    The byte order marks that Windows writes, of UTF-8 and UTF-16, are understood.
    """
    with open(path, "rb") as f:
        content = f.read()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        content = os.fsencode(content.decode("utf-16", errors="replace"))
    content = content.removeprefix(codecs.BOM_UTF8)
    lines = [line.strip() for line in content.splitlines()]
    return [line for line in lines if line]


def read_list(path):
    """A text file with a path on each line, relative to the text file -> paths (bytes).

    Raises Refused where it is another kind of file, where a line names no file, and where there is no line.
    What a named file holds is not looked at: whoever reads it says what is wrong.
    """
    other = looks_like(path)
    if other:
        raise Refused(f"{os.fsdecode(path)}: {other}")
    folder = os.path.dirname(path)
    lines = read_lines(path)
    names = [os.path.join(folder, line) for line in lines]
    problem = None if names else "it is empty"
    for name, line in zip(names, lines):
        if not os.path.isfile(name):
            problem = wrong_with(folder, name, line)
            break
    if problem:
        raise Refused(f"{os.fsdecode(path)}: a list of images should name a file on each line; {problem}")
    return names


def wrong_with(folder, name, line):
    """Why a line names no file, in words.

    Lists with labels, and tables, are the usual mistake: then a part of the line is a file.
    """
    for separator in (b",", b"\t", b" ", b";"):
        first, found, _ = line.rpartition(separator)
        whole = found and any(os.path.isfile(os.path.join(folder, part.strip(b' "')))
                              for part in (first, line.partition(separator)[0]))
        if whole:
            return (f"'{printable(os.fsdecode(line[:80]))}' has more on it than a path; labels come from "
                    "folders: train/<class>/... (captions, behind a tab, are for related.py --method clip)")
    return f"{os.fsdecode(name[:200])} is no file"
