"""Text files that name images, a path on each line; and what to say about files that aren't such lists.

People name an archive, a table or a container of arrays as DATA, because other programs take those. We don't
read them: for each there are good programs, and we would have to guess what is in them. But we say what the
file is, and what to do.
"""
import codecs
import os

from ..common.errors import Refused, printable

# What a file is, and what to do, by suffix in lower case.
ARCHIVE = "an archive; unpack it, and name the folder"
ARRAYS = "arrays; write them as images, with PIL.Image.fromarray(a).save(name + '.png')"
TABLE = "a table; give a list with a path alone on each line, or class folders: train/<class>/..."
VIDEO = "a video; take pictures out of it, with ffmpeg -i FILE FOLDER/%06d.jpg"
SHARDS = "a container of records; write its images as files, in train/<class>/..."
WEIGHTS = "weights, not images; lineval.py --ckpt takes those"
DOCUMENT = "not an image format that we read; convert it to PNG or JPEG"
KINDS = {
    **dict.fromkeys((".zip", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst"), ARCHIVE),
    **dict.fromkeys((".npy", ".npz", ".mat", ".h5", ".hdf5"), ARRAYS),
    **dict.fromkeys((".csv", ".tsv", ".json", ".jsonl", ".xlsx"), TABLE),
    **dict.fromkeys((".mp4", ".avi", ".mov", ".mkv", ".webm"), VIDEO),
    **dict.fromkeys((".parquet", ".arrow", ".tfrecord", ".lmdb"), SHARDS),
    **dict.fromkeys((".pth", ".pt", ".ckpt", ".safetensors"), WEIGHTS),
    **dict.fromkeys((".heic", ".dcm", ".nii", ".svg", ".pdf", ".dng"), DOCUMENT),
}


def read_lines(path):
    """The lines of a text file that aren't empty, as bytes: names of files need not be text."""
    with open(path, "rb") as f:
        content = f.read().removeprefix(codecs.BOM_UTF8)  # Windows writes it
    lines = [line.strip() for line in content.splitlines()]
    return [line for line in lines if line]


def read_list(path):
    """A text file with a path on each line, relative to the text file -> paths (bytes).

    Raises Refused if it is another kind of file, or if a line names no file. It doesn't look at what a named
    file holds: whoever reads it says what is wrong.
    """
    shown = os.fsdecode(path)
    _, suffix = os.path.splitext(shown.lower())
    if suffix in KINDS:
        raise Refused(f"{shown}: {suffix}: {KINDS[suffix]}")
    with open(path, "rb") as f:
        if b"\0" in f.read(4096):
            raise Refused(f"{shown}: neither an image nor a list of images (UTF-8 text, a path on each line)")
    lines = read_lines(path)
    names = [os.path.join(os.path.dirname(path), line) for line in lines]
    if not names:
        raise Refused(f"{shown}: is empty; name an image on each line")
    for name, line in zip(names, lines):
        if not os.path.isfile(name):
            raise Refused(f"{shown}: '{printable(os.fsdecode(line[:80]))}' is not a file; each line must be "
                          "a path alone, relative to the list. Labels come from folders: train/<class>/... "
                          "(captions, after a tab, are for related.py --method clip)")
    return names
