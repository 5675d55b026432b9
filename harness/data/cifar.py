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
FOLDERS = (b"cifar-10-batches-py", b"cifar-10-batches-bin", b"cifar-100-python", b"cifar-100-binary")


def layout_of(folder):
    """The layout of CIFAR that a folder has, or None."""
    for layout in LAYOUTS:
        paths = [os.path.join(os.fsdecode(folder), sign) for sign in layout.signs]
        if all(map(os.path.isfile, paths)):
            return layout
    return None


def read(folder, layout):
    """The training and the validation images of a folder -> two Sources of (N, 3, 32, 32) pixels.

    Raises Refused, naming the file, where one isn't as it must be.
    """
    folder = os.fsdecode(folder)
    classes = CLASSES if layout.name == "CIFAR-10" else hundred_classes(folder)
    return [read_split(folder, layout, batches, classes) for batches in layout.batches]


def read_split(folder, layout, batches, classes):
    """One split -> Source"""
    pixels = []
    labels = []
    for name in batches:  # CIFAR-10's training images come in five files
        path = os.path.join(folder, name)
        try:
            data, numbers = read_batch(path, layout)
        except Exception as error:  # a damaged pickle can raise anything
            problem = f"not a batch of {layout.name} ({type(error).__name__}: {error})"
            raise Refused(f"{path}: {problem}; unpack the archive again") from None
        fits = data.dtype == np.uint8 and data.shape == (len(numbers), 3072) and len(data) > 0
        if not fits or numbers.min() < 0 or numbers.max() >= len(classes):
            problem = f"not a batch of {layout.name} ({data.dtype} {data.shape}, {len(numbers)} labels)"
            raise Refused(f"{path}: {problem}; unpack the archive again")
        pixels.append(data)
        labels.append(numbers)
    pixels = torch.from_numpy(np.concatenate(pixels).reshape(-1, 3, 32, 32))
    return Source(pixels=pixels, labels=np.concatenate(labels), classes=classes, where=folder)


def read_batch(path, layout):
    """A file -> data (N, 3072), labels (N,) int64

    The binary layout has for each image its label, a byte, and 3072 bytes of pixels; CIFAR-100 has the number
    of a coarser class before it. The Python layout is a pickled dict.
    """
    if layout.form == "binary":
        records = np.fromfile(path + ".bin", np.uint8).reshape(-1, layout.skip + 3073)
        return records[:, layout.skip + 1:], records[:, layout.skip].astype(np.int64)
    batch = unpickle(path)
    return np.asarray(batch[b"data"]), np.array(batch[layout.labels], np.int64)


def unpickle(path):
    """A file of CIFAR's Python layout -> dict"""
    with open(path, "rb") as f:
        return CifarUnpickler(f, encoding="bytes").load()


def hundred_classes(folder):
    """The names of CIFAR-100's classes, from the file beside the images; numbers where that is missing or
    damaged."""
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
