"""Text files that name images, a path on each line; and what to say about files that aren't such lists.

People name an archive, a table or a container of arrays as DATA, because other programs take those. We don't
read them: for each there are good programs, and we would have to guess what is in them. But we say what the
file is, and what to do.
"""
import codecs
import contextlib
import os
import re

from ..common.errors import Refused, printable

# What files are, and what to do: their suffixes in lower case. The later ones often lie beside the others.
FORMATS = {
    "arrays; scale each picture a, (H, W) or (H, W, 3), to values from 0 to 255, and write it: "
    "PIL.Image.fromarray(a.astype('uint8')).save('NAME.png')":
        ".npy .npz .mat .h5 .hdf5 .zarr .ubyte .pkl .pickle",
    "a medical image; SimpleITK.GetArrayFromImage(SimpleITK.ReadImage('FILE')) gives its slices; write each "
    "slice a: PIL.Image.fromarray(a.astype('float32')).save('NAME.tif')":
        ".nii .dcm .mha .nrrd",
    "a microscope's file; bfconvert FILE NAME_%s_%z_%c_%t.tif, of Bio-Formats, writes its planes":
        ".nd2 .czi .lif",
    "a whole slide; vips dzsave FILE FOLDER --depth one --overlap 0 --suffix .png cuts it into tiles":
        ".ndpi .svs .mrxs",
    "a video; take pictures out of it, with ffmpeg -i FILE FOLDER/%06d.jpg":
        ".mp4 .avi .mov .mkv .webm",
    "a container of records; write its images as files, in train/<class>/...":
        ".bin .parquet .arrow .tfrecord .array_record .rec .lmdb .mdb .beton",
    "weights, not images; lineval.py --ckpt takes those":
        ".pth .pt .ckpt",
    "weights; torch.save(safetensors.torch.load_file('FILE'), 'W.pth') writes a file for lineval.py --ckpt":
        ".safetensors",
    "not an image format that we read; convert it to PNG or JPEG":
        ".heic .heif .jxl .svg .pdf .dng .cr2 .cr3 .nef .arw .raf .rw2 .orf .exr .hdr",
    "an archive; unpack it, and name the folder":
        ".zip .gz .tgz .bz2 .xz .7z .rar .zst",
    "a table; give a .txt with a path alone on each line, or class folders (docs/own-data.md makes them)":
        ".csv .tsv .json .jsonl .xlsx",
}
KINDS = {suffix: what for what, suffixes in FORMATS.items() for suffix in suffixes.split()}


def suffix_of(name):
    """The suffix of a file's name in lower case, as the reason why it isn't an image."""
    name = os.fsdecode(name).lower().replace("-ubyte", ".ubyte")  # MNIST's
    name = re.sub(r"(?<=\.nii|byte)\.gz$|-\d{5}-of-\d{5}$", "", name)  # the last is TensorFlow's
    return os.path.splitext(name)[1] or "without a suffix"


def kind_of_file(path):
    """The same of a file on the disk. DICOM often has no suffix, or the last of many numbers: four letters in
    the file tell it."""
    suffix = suffix_of(path)
    if suffix == "without a suffix" or not suffix.strip(".0123456789"):
        with contextlib.suppress(OSError), open(path, "rb") as f:
            if f.read(132).endswith(b"DICM"):
                return ".dcm"
    return suffix


def read_lines(path):
    """The lines of a text file that aren't empty, as bytes: names of files need not be text."""
    with open(path, "rb") as f:
        content = f.read().removeprefix(codecs.BOM_UTF8)  # Windows writes it
    return list(filter(None, map(bytes.strip, content.splitlines())))


def read_list(path):
    """A text file with a path on each line, relative to the text file -> paths (bytes).

    Raises Refused if it is another kind of file, or if a line names no file. It doesn't look at what a named
    file holds: whoever reads it says what is wrong.
    """
    shown = os.fsdecode(path)
    suffix = kind_of_file(path)
    if suffix in KINDS:
        raise Refused(f"{shown}: {suffix}: {KINDS[suffix]}")
    with open(path, "rb") as f:
        if b"\0" in f.read(4096):
            raise Refused(f"{shown}: neither a list of images (UTF-8 text) nor, by its ending, an image")
    lines = read_lines(path)
    if not lines:
        raise Refused(f"{shown}: is empty; name an image on each line")
    folder = os.path.dirname(path)
    # Windows writes backslashes. `find` writes paths from the shell's folder on.
    for written in (lines, [line.replace(b"\\", b"/") for line in lines]):
        for start in (folder, b""):
            names = [os.path.join(start, line) for line in written]
            if all(map(os.path.isfile, names)):
                return names
    wrong = next(line for line in lines if not os.path.isfile(os.path.join(folder, line)))
    raise Refused(f"{shown}: '{printable(os.fsdecode(wrong[:80]))}' is not a file; each line must be a path "
                  "alone, with its ending, relative to the list or to here. Labels come from folders: "
                  "train/<class>/... (captions, after a tab, are for related.py --method clip)")
