"""A split of a data set: its images, in memory or as files, and their labels if they are known."""
import hashlib
import os
from dataclasses import dataclass, field, replace

import numpy as np

from ..common.errors import BadImage, printable
from ..common.progress import warn
from .images import read_or_replace, what_to_do
from .tars import plain


@dataclass(frozen=True)
class Source:
    """One split. Small images are held in memory, others are files.

    pixels      (N, 3, H, W) uint8 tensor if the images are held in memory, else None
    files       (N,) array of paths (bytes; for members see tars.py), or None. It is one buffer, which worker
                processes share: the reference counts of a list would make each worker copy it
    labels      (N,) int64 array, or None
    classes     list of names, or None
    where       the folder or the file that they come from
    captions    list of texts, one an image, or None
    value_range (low, high), which become 0 to 255 in files of more than 8 bits; or None
    bad         {index: BadImage that says what is wrong with that file}, of the files, as last read
    """
    pixels: object = None
    files: object = None
    labels: object = None
    classes: object = None
    where: str = ""
    captions: object = None
    value_range: object = None
    bad: dict = field(default_factory=dict)

    def __len__(self):
        return len(self.files if self.pixels is None else self.pixels)

    @property
    def names(self):
        """The files' names: (N,) array of bytes"""
        return np.array([plain(path) for path in self.files])

    def image(self, i):
        """Image i as stored, or the next good one: (H, W, 3) uint8 tensor. Raises BadImage."""
        if self.pixels is not None:
            return self.pixels[i].permute(1, 2, 0)
        image, bad = read_or_replace(self.files, i, self.value_range)
        self.note(bad)
        return image

    def note(self, bad):
        """Remember bad files, {index: BadImage}, and name each once on stderr. Raises BadImage if they are
        too many."""
        for i in bad.keys() - self.bad.keys():
            warn(f"bad image, not used (training takes the next good one): {printable(bad[i])}")
        self.bad.update(bad)
        self.check_bad(len(self.bad))

    def check_bad(self, count):
        """Raise BadImage if more files are bad than 10 plus one in a hundred."""
        if count > 10 + len(self) / 100:
            raise BadImage(f"{count} of {len(self)} images can't be read, which is too many; "
                           f"{what_to_do(self.bad)}")

    def only(self, good):
        """The same split with these images only (indices), none of which is bad -> Source"""
        arrays = {"pixels": self.pixels, "files": self.files, "labels": self.labels}
        kept = {name: array[good] for name, array in arrays.items() if array is not None}
        if self.captions is not None:
            kept["captions"] = [self.captions[i] for i in good]
        return replace(self, **kept, bad={})

    def fingerprint(self):
        """A number below 2^48 that distinguishes data sets.

        It is a hash of the pixels, or of the files' names below the folder that they share, and of the
        labels.
        """
        if self.pixels is not None:
            parts = [self.pixels.numpy()]
        else:
            names = self.names
            above = len(os.path.commonprefix([min(names), max(names)]))
            parts = [b"\n".join(name[above:] for name in names)]
        if self.labels is not None:
            parts.append(np.ascontiguousarray(self.labels, np.int64))
        digests = b"".join(hashlib.sha256(part).digest() for part in parts)
        return int(hashlib.sha256(digests).hexdigest()[:12], 16)
