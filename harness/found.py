"""What lies at DATA, as a value: which files are which split, what is left out, and what else has to be said.

harness/layouts.py makes it, before an image is read. It can be printed, and compared in a test.
"""
from typing import NamedTuple

from .errors import printable

REASONS = 12  # shown; the others are added up


class Split(NamedTuple):
    """The images of a split, not read yet."""
    where: str              # the folder or the file that they come from
    files: object = None    # (N,) array of byte strings
    labels: object = None   # (N,) int64, or None where there are none
    classes: object = None  # list of names, or None
    batches: tuple = ()     # of CIFAR: the files that hold the images
    layout: object = None   # of CIFAR: how they are read, a cifar.Layout


class Found(NamedTuple):
    """What lies at DATA."""
    layout: str             # a row of layouts.LAYOUTS, in words
    train: Split
    val: object = None      # Split, or None
    left_out: dict = {}     # {reason: how many files}
    notes: tuple = ()       # what else has to be said: of val/, of classes, of where the images were found
    tars: tuple = ()        # tars.Index of each tar file that images lie in


def describe(left_out):
    """The files that are left out, by reason, in one line; None where there are none.

    The most frequent reason comes first.
    """
    reasons = {reason: n for reason, n in left_out.items() if n > 0}
    if not reasons:
        return None
    most_first = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{n} {printable(reason)}" for reason, n in most_first[:REASONS]]
    rest = sum(n for _, n in most_first[REASONS:])
    if rest:
        shown.append(f"{rest} others")
    total = sum(reasons.values())
    return f"{total} file{'s' if total > 1 else ''}: {', '.join(shown)}"
