"""The checkpoints of a run folder: which of the two is read, and whether it fits a run. Run.save writes them.

checkpoint.pth is the newest, checkpoint-previous.pth the one before it. Each is a dict: "format", the state
of each part of the run ("model", "optimizer", ...), the position ("epoch", "step"), what the log needs of
the epoch that it is in ("sums", "seconds", "waited", "wall"), and "settings".
"""
import os

from .errors import Refused, printable
from .files import has_checksums, read

FORMAT = 1  # of checkpoint.pth; to be raised when its contents change
NEWEST = "checkpoint.pth"
PREVIOUS = "checkpoint-previous.pth"


def newest_checkpoint(folder):
    """The newest of the two checkpoints that can be read -> its content, its path, and what is wrong with
    the newer one.

    Raises Refused where none can be read.
    """
    newest = os.path.join(folder, NEWEST)
    previous = os.path.join(folder, PREVIOUS)
    try:
        return read_checked(newest), newest, None
    except (Refused, OSError) as error:
        if not os.path.exists(previous):
            raise
        problem = printable(error)
    return read_checked(previous), previous, problem


def read_checked(path):
    """A checkpoint -> its content. Raises Refused for the form without checksums too: no run has written
    it."""
    if os.path.exists(path) and not has_checksums(path):
        raise Refused(f"{path}: can't be read (damaged, or nothing that a run has written)")
    return read(path)


def check_format(content, path):
    """Raise Refused for a checkpoint of another format than ours."""
    if content["format"] != FORMAT:
        raise Refused(f"{path}: not a checkpoint in this program's format {FORMAT}")


def compare_settings(then, now, may_change, override, path):
    """What has changed between a checkpoint's settings and a run's, in words; empty if nothing has.

    may_change  names of settings that may always differ
    override    names of settings that may differ this time
    Raises Refused where another setting has changed.
    """
    changed = {}
    for name in sorted({*then, *now}, key=str):
        if then.get(name) != now.get(name):
            changed[name] = f"{name} {then.get(name)} -> {now.get(name)}"
    to_name = [str(name) for name in changed if name not in may_change]
    forbidden = [text for name, text in changed.items() if name not in {*may_change, *override}]
    if forbidden:
        raise Refused(f"{path}: was made with other settings ({'; '.join(forbidden)}); give the same "
                      f"command, or another --out, or name what may change: --override {' '.join(to_name)}")
    return "; ".join(changed.values())
