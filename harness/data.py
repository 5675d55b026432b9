"""What DATA can be.

    nothing                                 the drawn shapes (harness/shapes.py)
    a folder with data_batch_1[.bin]        CIFAR-10 (harness/cifar.py)
    train/<class>/..., val/<class>/...      an image folder with labels; val/ is optional
    train/ without class folders            all images below train/, at any depth, without labels
    any other folder                        all images below it, at any depth, without labels
    an image file                           itself
    any other file                          a list: a path on each line, relative to the list

The classes are the folders of train/: val/ must have no others. Images of one size
up to 64 pixels a side are held in memory; all others stay files, which worker processes decode.
"""
import os
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from . import cifar
from .errors import Refused
from .images import SUFFIXES, is_image
from .shapes import draw_shapes
from .source import Source

SMALL = 64  # pixels a side, up to which images of one size are held in memory


def open_data(path, seed=0):
    """DATA as given by the user -> (train Source, val Source or None). None: the shapes that this seed draws.

    Raises Refused where there is nothing that can be used.
    """
    if path is None:
        return draw_shapes(seed, 0, 4000), draw_shapes(seed, 4000, 1000)
    root = os.fsencode(path)
    if os.path.isfile(root):
        return in_memory(Source(files=read_list(root))), None
    if not os.path.isdir(root):
        raise Refused(f"{path}: no such file or folder; give an image folder, a list of files or a CIFAR-10 "
                      "folder")
    names = os.listdir(root)
    # CIFAR-10's folders hold no images: they are recognised by the names of their batches.
    for sign, read in cifar.LAYOUTS.items():
        if sign in names:
            train, val = (cifar.read_cifar(path, batches, read) for batches in cifar.BATCHES)
            return train, val
    return open_folder(root)


def open_folder(root):
    """A folder of images, with classes below train/ or without -> (train Source, val Source or None)"""
    # Paths are bytes from here on: file names need not be text.
    train = os.path.join(root, b"train")
    val = os.path.join(root, b"val")
    classes = subfolders(train)
    if not classes:
        below = train if os.path.isdir(train) else root
        return in_memory(Source(files=list_images(below))), None
    train_source = in_memory(list_classes(train, classes))
    if not subfolders(val):
        return train_source, None
    return train_source, in_memory(list_classes(val, classes))


def subfolders(path):
    """The names of the folders in a folder, sorted; none where there is no such folder."""
    if not os.path.isdir(path):
        return []
    folders = [entry.name for entry in os.scandir(path) if entry.is_dir()]
    return sorted(os.fsdecode(name) for name in folders)


def list_images(root):
    """All images under a folder, at any depth, sorted. Links are followed, but never twice into the same
    folder."""
    names = []
    seen = set()  # folders by their device and inode, whatever they are called
    for folder, inner, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        identity = status.st_dev, status.st_ino
        inner.sort()
        if identity in seen:
            inner.clear()  # os.walk then goes no deeper here
            continue
        seen.add(identity)
        names += [os.path.join(folder, name) for name in files if is_image(name)]
    if not names:
        raise Refused(f"{os.fsdecode(root)}: no images there (looked for {' '.join(SUFFIXES)})")
    return np.array(sorted(names))


def list_classes(root, classes):
    """A split of an image folder. An image's class is its first folder under root, numbered as sorted in
    train/."""
    files = list_images(root)
    number = {os.fsencode(name): k for k, name in enumerate(classes)}
    labels = []
    for name in files:  # a folder that train/ lacks would be a class that nothing was learned of
        folder = name[len(root) + 1:].partition(b"/")[0]
        if folder not in number:
            raise Refused(f"{os.fsdecode(name)}: not in one of the {len(classes)} class folders of train/; "
                          "move it into one, or away")
        labels.append(number[folder])
    return Source(files=files, labels=np.array(labels), classes=classes)


def read_list(path):
    """A text file with a path on each line, relative to the text file; or a single image -> array of byte
    strings."""
    if is_image(path):
        return np.array([path])
    folder = os.path.dirname(path)
    with open(path, "rb") as f:
        lines = [line.strip() for line in f]
    names = [os.path.join(folder, line) for line in lines if line]
    problem = None if names else "it is empty"
    for name in names:
        if not os.path.isfile(name):
            problem = f"{os.fsdecode(name[:200])} is no file"
            break
    if problem:
        raise Refused(f"{os.fsdecode(path)}: a list of images should name a file on each line; {problem}")
    return np.array(names)


def in_memory(source):
    """The same source, its pixels in one tensor, if all images are small and of one size.

    It compares the sizes of 16 files first, so that large data sets are not opened whole.
    """
    looked_at = np.linspace(0, len(source) - 1, 16).astype(int)
    sizes = {size_of(source.files[i]) for i in looked_at} - {None}
    if len(sizes) != 1:
        return source
    (width, height), = sizes  # of all that could be read
    if max(width, height) > SMALL:
        return source
    pixels = torch.empty(len(source), 3, height, width, dtype=torch.uint8)
    for i in range(len(source)):
        image = source.image(i)
        if image.shape != (height, width, 3):  # the 16 were of one size by chance
            return source
        pixels[i] = image.permute(2, 0, 1)
    return replace(source, pixels=pixels)


def size_of(path):
    """(width, height) of an image file by its header, or None where it is bad: whoever reads it says what
    is wrong."""
    try:
        with Image.open(os.fsdecode(path)) as image:
            return image.size
    except Exception:  # a damaged file can raise anything
        return None
