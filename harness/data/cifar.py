"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), in the two layouts that their page offers: the binary one and the
Python one.

The Python layout is pickled, and a pickle can call any function that it names. So it is read by an unpickler
that knows the few names that CIFAR's files have.
"""
import codecs
import os
import pickle
from typing import NamedTuple

import numpy as np
import torch

from ..common.errors import Refused
from .source import Source

CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
TEN = [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]
HUNDRED = ["train"], ["test"]


class Layout(NamedTuple):
    """How a CIFAR lies in a folder."""
    name: str
    form: str           # binary or Python
    signs: set          # names that show it
    batches: tuple      # of the training and of the test images: the files, without .bin
    read: object        # (path, layout) -> data (N, 3072) uint8, labels (N,)
    classes: object     # folder -> names of the classes
    labels: bytes = b"labels"  # Python: the key of the labels
    skip: int = 0       # binary: bytes before an image's label

    def fits(self, path, names):
        """Whether a folder with these names (bytes) in it is one."""
        return self.signs <= names and all(os.path.isfile(os.path.join(path, sign)) for sign in self.signs)


def read_split(split):
    """A found.Split of CIFAR -> Source of (N, 3, 32, 32) pixels.

    Raises Refused, naming the file, where one isn't as it must be.
    """
    layout = split.layout
    classes = layout.classes(split.where)
    pixels = []
    labels = []
    for name in split.batches:  # CIFAR-10's training images come in five files
        path = os.path.join(split.where, name)
        try:
            data, numbers = layout.read(path, layout)
            check_batch(data, numbers, len(classes))
        except Exception as error:  # a damaged pickle can raise anything
            problem = f"not a batch of {layout.name} ({type(error).__name__}: {error})"
            raise Refused(f"{path}: {problem}; unpack the archive again") from None
        pixels.append(data)
        labels.append(np.asarray(numbers, np.int64))
    pixels = torch.from_numpy(np.concatenate(pixels).reshape(-1, 3, 32, 32))
    return Source(pixels=pixels, labels=np.concatenate(labels), classes=classes)


def check_batch(data, labels, classes):
    """Raise ValueError unless data is (N, 3072) uint8 and labels are N numbers below `classes`, N > 0."""
    if data.dtype != np.uint8 or data.shape != (len(labels), 3072):
        raise ValueError(f"data {data.dtype} {data.shape} for {len(labels)} labels")
    if len(data) == 0 or not {*labels} <= {*range(classes)}:
        raise ValueError(f"{len(data)} images, labels other than 0 to {classes - 1}")


def read_bin(path, layout):
    """The binary layout: for each image its label, a byte, and 3072 bytes of pixels. CIFAR-100 has the number
    of a coarser class before it."""
    records = np.fromfile(path + ".bin", np.uint8).reshape(-1, layout.skip + 3073)
    return records[:, layout.skip + 1:], records[:, layout.skip]


def read_py(path, layout):
    """The Python layout: a pickled dict."""
    batch = unpickle(path)
    return batch[b"data"], batch[layout.labels]


def unpickle(path):
    """A file of CIFAR's Python layout -> dict"""
    with open(path, "rb") as f:
        return CifarUnpickler(f, encoding="bytes").load()


def ten_classes(folder):
    """CIFAR-10's"""
    return CLASSES


def hundred_classes(folder):
    """CIFAR-100's, from the file beside the images; numbers where that is missing or damaged."""
    text = os.path.join(folder, "fine_label_names.txt")
    try:
        if os.path.exists(text):
            with open(text, "rb") as f:
                names = f.read().split()
        else:
            names = unpickle(os.path.join(folder, "meta"))[b"fine_label_names"]
        names = [name.decode("ascii") for name in names]
    except Exception:  # a damaged pickle can raise anything
        names = []
    return names if len(names) == 100 else [str(k) for k in range(100)]


LAYOUTS = [
    Layout("CIFAR-10", "binary", {b"data_batch_1.bin"}, TEN, read_bin, ten_classes),
    Layout("CIFAR-10", "Python", {b"data_batch_1"}, TEN, read_py, ten_classes),
    Layout("CIFAR-100", "binary", {b"train.bin", b"test.bin"}, HUNDRED, read_bin, hundred_classes, skip=1),
    Layout("CIFAR-100", "Python", {b"train", b"test", b"meta"}, HUNDRED, read_py, hundred_classes,
           labels=b"fine_labels"),
]
# The folders that the archives unpack to.
FOLDERS = (b"cifar-10-batches-py", b"cifar-10-batches-bin", b"cifar-100-python", b"cifar-100-binary")


class CifarUnpickler(pickle.Unpickler):
    """An unpickler that knows the four functions CIFAR's files name, under old and new numpy, and no
    other."""
    RECONSTRUCT = np.empty(0).__reduce__()[0]
    KNOWN = {  # numpy 2 has moved the first
        ("numpy.core.multiarray", "_reconstruct"): RECONSTRUCT,
        ("numpy._core.multiarray", "_reconstruct"): RECONSTRUCT,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): codecs.encode,
    }

    def find_class(self, module, name):
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which CIFAR does not hold")
        return self.KNOWN[module, name]
