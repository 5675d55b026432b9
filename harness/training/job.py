"""What a program knows of its task before it computes anything. Both programs, and all that they call, get it
as one value."""
from typing import NamedTuple

import torch


class Job(NamedTuple):
    """A task: what is trained or evaluated on which images, where, and with which settings.

    settings    {name: value}, all that the result can depend on; the log and the result hold them
    device      of this process
    train, val  Sources; val may be None
    test_views  (source, batches of (epoch, indices)) -> yields (indices, images (N, 3, S, S))
    out         the folder that it writes to; or the file, where that is all
    resuming    whether it goes on from what is in that folder
    """
    settings: dict
    device: torch.device
    train: object
    val: object
    test_views: object
    out: str
    resuming: bool
