"""CIFAR-10 (Krizhevsky 2009), in the two layouts that its page offers: the binary one and the Python one.

A folder with data_batch_1.bin is the first, a folder with data_batch_1 the second. The Python layout is
pickled, and a pickle can call any function that it names. So it is read by an unpickler that knows the four
names CIFAR's files have.
"""
import codecs
import os
import pickle

import numpy as np
import torch

from .errors import Refused
from .source import Source

BATCHES = [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def read_cifar(folder, batches, read):
    """One split -> Source of (N, 3, 32, 32) pixels. read: read_bin or read_py.

    Raises Refused, naming the file, where one isn't as it must be.
    """
    pixels = []
    labels = []
    for name in batches:  # the training images come in five files
        path = os.path.join(folder, name)
        try:
            data, numbers = read(path)
            check_batch(data, numbers)
        except Exception as error:  # a damaged pickle can raise anything
            problem = f"{type(error).__name__}: {error}"
            raise Refused(f"{path}: not a batch of CIFAR-10 ({problem}); unpack the archive again") from None
        pixels.append(data)
        labels.append(np.asarray(numbers, np.int64))
    pixels = torch.from_numpy(np.concatenate(pixels).reshape(-1, 3, 32, 32))
    return Source(pixels=pixels, labels=np.concatenate(labels), classes=CLASSES)


def check_batch(data, labels):
    """Raise ValueError unless data is (N, 3072) uint8 and labels are N numbers from 0 to 9, N at least 1."""
    if data.dtype != np.uint8 or data.shape != (len(labels), 3072):
        raise ValueError(f"data {data.dtype} {data.shape} for {len(labels)} labels")
    if len(data) == 0 or not {*labels} <= {*range(10)}:
        raise ValueError(f"{len(data)} images, labels other than 0 to 9")


def read_bin(path):
    """The binary layout: for each image one byte, its label, and 3072 bytes of pixels."""
    records = np.fromfile(path + ".bin", np.uint8).reshape(-1, 3073)
    return records[:, 1:], records[:, 0]


def read_py(path):
    """The Python layout: a pickled dict."""
    with open(path, "rb") as f:
        batch = CifarUnpickler(f, encoding="bytes").load()
    return batch[b"data"], batch[b"labels"]


# A file that shows which layout a folder has, and how to read it.
LAYOUTS = {b"data_batch_1.bin": read_bin, b"data_batch_1": read_py}


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
            raise pickle.UnpicklingError(f"it names {module}.{name}, which CIFAR-10 does not hold")
        return self.KNOWN[module, name]
