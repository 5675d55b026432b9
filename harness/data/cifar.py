"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), in the two layouts that their page offers: the binary one and the
Python one.

The Python layout is pickled, and a pickle can call any function that it names. So its unpickler admits only
the few names that CIFAR's files have.
"""
import os
import pathlib
import pickle
from typing import NamedTuple

import numpy as np
import torch

from ..common.files import refusing
from .source import Source

DAMAGED = "not a file of {}; unpack the archive again"
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
TEN = [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]
HUNDRED = ["train"], ["test"]


class Layout(NamedTuple):
    """How a CIFAR is stored in a folder."""
    name: str
    form: str           # binary or Python
    signs: tuple        # files that show it
    batches: tuple      # of the training and of the test images: the files, without .bin
    labels: bytes = b"labels"  # Python: the key of the labels
    skip: int = 0       # binary: bytes before an image's label


LAYOUTS = [
    Layout("CIFAR-10", "binary", ("data_batch_1.bin", ), TEN),
    Layout("CIFAR-10", "Python", ("data_batch_1", ), TEN),
    Layout("CIFAR-100", "binary", ("train.bin", "test.bin"), HUNDRED, skip=1),
    Layout("CIFAR-100", "Python", ("train", "test", "meta"), HUNDRED, labels=b"fine_labels"),
]
# The folders that the archives unpack to.
FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary")


def layout_of(folder):
    """The layout of CIFAR that a folder has, or None."""
    for layout in LAYOUTS:
        paths = [os.path.join(folder, sign) for sign in layout.signs]
        if all(map(os.path.isfile, paths)):
            return layout
    return None


def read(folder, layout):
    """The training and the validation images of a folder -> two Sources of (N, 3, 32, 32) pixels.

    Raises Refused, naming the file, if one isn't as it must be.
    """
    classes = CLASSES if layout.name == "CIFAR-10" else hundred_classes(folder, layout)
    sources = []
    for names in layout.batches:  # CIFAR-10's training images come in five files
        batches = [read_batch(os.path.join(folder, name), layout, len(classes)) for name in names]
        pixels, labels = map(np.concatenate, zip(*batches))
        pixels = torch.from_numpy(pixels.reshape(-1, 3, 32, 32))
        sources.append(Source(pixels=pixels, labels=labels, classes=classes, where=folder))
    return sources


def hundred_classes(folder, layout):
    """The names of CIFAR-100's classes, from the file beside the images"""
    path = os.path.join(folder, "meta" if layout.form == "Python" else "fine_label_names.txt")
    with refusing(path, DAMAGED.format(layout.name)):
        if layout.form == "binary":
            return pathlib.Path(path).read_text("ascii").split()
        return [name.decode("ascii") for name in unpickle(path)[b"fine_label_names"]]


def read_batch(path, layout, classes):
    """A file of images of so many classes -> data (N, 3072) uint8, labels (N,) int64

    The binary layout has for each image its label, a byte, and 3072 bytes of pixels; CIFAR-100 has the number
    of a coarser class before it. The Python layout is a pickled dict.
    """
    with refusing(path, DAMAGED.format(layout.name)):
        if layout.form == "binary":
            records = np.fromfile(path + ".bin", np.uint8).reshape(-1, layout.skip + 3073)
            data = records[:, layout.skip + 1:]
            labels = records[:, layout.skip].astype(np.int64)
        else:
            batch = unpickle(path)
            data = batch[b"data"]
            labels = np.array(batch[layout.labels], np.int64)
        if data.dtype != np.uint8 or data.shape != (len(labels), 3072):
            raise ValueError(f"{data.dtype} {data.shape}, {len(labels)} labels")
        if labels.max() >= classes:
            raise ValueError(f"a label of {labels.max()}")
        return data, labels


def unpickle(path):
    """A file of CIFAR's Python layout -> dict"""
    with open(path, "rb") as f:
        return CifarUnpickler(f, encoding="bytes").load()


class CifarUnpickler(pickle.Unpickler):
    """An unpickler that admits the four names in CIFAR's files, as old and new numpy write them."""
    ADMITTED = {"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
                "numpy.ndarray", "numpy.dtype", "_codecs.encode"}

    def find_class(self, module, name):
        if f"{module}.{name}" not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which CIFAR does not hold")
        return super().find_class(module, name)
