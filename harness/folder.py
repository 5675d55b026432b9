"""Which folder a run has, and whether there is a run in it.

A run never starts in a folder that holds another one, and never goes on where there is none, unless it was
told so: --resume auto is for job scripts, which give the same command again and again.
"""
import os

import torch

from .checkpoint import NEWEST, PREVIOUS
from .errors import Refused
from .processes import all_sum, same_everywhere

CHECKPOINTS = (NEWEST, PREVIOUS)


def folder_name(data):
    """The name of the folder for runs on this data, wherever the data lies. It leads out of no folder."""
    if data is None:
        return "shapes"
    name = os.path.basename(os.path.abspath(data))  # a path may end in a slash, or be ".."
    stem, _ = os.path.splitext(name)
    return stem.strip(".") or "data"


def holds_run(out, names, resume, device):
    """Whether a folder holds a run: any file of these names.

    resume: None, "yes" or "auto". Raises Refused where the folder is not what that expects.
    """
    paths = [os.path.join(out, name) for name in names]
    found = any(os.path.exists(path) for path in paths)
    # When a process dies, torchrun starts all anew with the same command, and there may be a checkpoint or
    # not. An agent that only sees the restart of others doesn't count it, so that we ask all.
    restarts = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), device=device)
    if all_sum(restarts) > 0:
        resume = "auto"
    if not same_everywhere(found, device):
        raise Refused(f"{out}: some processes see a run there and some don't; --out must be a folder that "
                      "all machines share")
    if found and not resume:
        raise Refused(f"{out}: holds a run already; continue it with --resume, or give another folder with "
                      "--out")
    if resume == "yes" and not found:
        raise Refused(f"{out}: nothing to resume; leave --resume out to start, or name the run's folder "
                      "with --out")
    return found
