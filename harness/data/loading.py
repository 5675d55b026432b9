"""From files to batches on the device: worker processes, and which images a step gets.

A worker gets an epoch and indices, and returns the cut images of that batch, or of a part of a large one,
as one tensor, in memory that it shares with the main process. The caller passes the function that cuts
(augment.py), so this room knows nothing about views.
"""
import itertools
import os
import signal
import sys
import tempfile

import numpy as np
import torch

from ..common.draws import permutation
from ..common.errors import STOPPING, Refused
from ..common.machine import WORKER_KILLED, check_memory, local_world, memory
from .images import read_or_replace

LOADER_TIMEOUT = 60   # seconds of a wait for a batch
MOST_WAITS = 10       # for one batch, after which a run ends; a machine that was suspended loses one
PART = 512            # images that a worker prepares at a time: a batch of 4096 would take 600 MB at once
OWN = 2 ** 25         # bytes that a worker needs for itself, at least
SOCKETS = 75          # bytes of TMPDIR's path: sockets there have names of 32 more, and may have 107


def index_batches(seed, n, batch, epochs, start_epoch=0, start_step=0, rank=0, world=1):
    """Yield (epoch, indices) for every step from the start: this process's share of each global batch.

    n       images of the data set
    batch   images of a global batch, which `world` divides
    The last, incomplete batch of an epoch is dropped. The global batches are the same for any number of
    processes.
    """
    share = batch // world
    for epoch in range(start_epoch, epochs):
        order = permutation(seed, epoch, n)
        for step in range(start_step, n // batch):
            start = step * batch + rank * share
            yield epoch, order[start:start + share]
        start_step = 0  # of the epochs that follow


def in_groups(batches, most):
    """Yield (epoch, indices (G, N)) of G consecutive batches of an epoch: of at most so many images together,
    or one batch."""
    for (epoch, n), its in itertools.groupby(batches, lambda batch: (batch[0], len(batch[1]))):
        while group := [index for _, index in itertools.islice(its, max(1, most // n))]:
            yield epoch, np.stack(group)


def decode(source, cut, image_bytes, batches, device, workers, waiting=iter):
    """Yield (epoch, indices (1, N), [(N, 3, S, S) uint8 on the device, one per view]), decoded and cut by
    worker processes.

    cut         (image, epoch, i) -> a list of (3, S, S) uint8, one per view
    image_bytes of such a list
    waiting     the batches pass through it as they arrive: it can measure how long we wait
    Raises BadImage if too many files are bad, Refused if workers can't hand over images on this machine.
    """
    options = {}
    part = PART
    if workers > 0:
        options["timeout"] = LOADER_TIMEOUT
        options["prefetch_factor"] = 2 if workers <= 4 else 1
        check_sockets()
        check_memory(workers * OWN, f"{workers} workers")
        part = images_of_a_part(image_bytes * (workers * options["prefetch_factor"] + 1))
    loader = torch.utils.data.DataLoader(
        Decoder(source, cut), batch_sampler=parts(batches, part), collate_fn=tuple,
        num_workers=workers, worker_init_fn=outlive_signals, pin_memory=device.type == "cuda", **options)
    indices, views = [], []  # of the parts of a batch that are here
    for epoch, index, is_last, cuts, bad in waiting(in_our_words(iter(loader))):
        if isinstance(bad, Refused):
            raise bad
        for i in set(index) - bad.keys():
            source.bad.pop(i, None)  # the system can read it again
        source.note(bad)
        indices.append(index)
        views.append([x.to(device, non_blocking=True, copy=True) for x in cuts])  # out of /dev/shm
        if is_last:
            yield epoch, np.concatenate(indices)[None], [torch.cat(parts) for parts in zip(*views)]
            indices, views = [], []


def check_sockets():
    """Raise Refused if the paths of the sockets between processes would be too long."""
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > SOCKETS:
        raise Refused(f"TMPDIR, {folder}, is too long for the sockets of --workers: set one of at most "
                      f"{SOCKETS} letters, such as TMPDIR=/tmp")


def images_of_a_part(waiting_bytes):
    """How many images a worker prepares at a time: PART, or fewer if /dev/shm or memory, which it is part of,
    is small, as in a container.

    waiting_bytes   what waits there if a part has one image
    Raises Refused if nothing can be written there.
    """
    if sys.platform != "linux":
        return PART
    if not os.access("/dev/shm", os.W_OK):
        raise Refused("/dev/shm, where workers hand over images, can't be written to; give --workers 0")
    status = os.statvfs("/dev/shm")
    free = min(status.f_bavail * status.f_frsize / local_world(), memory() / 2)
    return min(PART, max(1, int(free / 2 // waiting_bytes)))


def in_our_words(batches):
    """Yield the same batches. Raises Refused if the workers stop delivering."""
    # When a worker dies, torch's handler raises wherever we are. It may only while we wait: what it raises
    # within a step would leave the step half done, and the steps before it couldn't be saved.
    handler = signal.getsignal(signal.SIGCHLD)
    waits = 0
    while True:
        signal.signal(signal.SIGCHLD, handler)
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (ConnectionError, EOFError) as error:  # a worker was killed while it handed over a batch
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the system reports its death a moment later
            raise Refused(f"{error!r}: {WORKER_KILLED}") from None
        except FileNotFoundError:
            raise Refused(f"the workers' sockets in TMPDIR ({tempfile.gettempdir()}) have been removed; set "
                          "a TMPDIR that nobody tidies up") from None
        except RuntimeError as error:
            if "DataLoader timed out" not in str(error):
                raise
            waits += 1
            if waits == MOST_WAITS:
                seconds = MOST_WAITS * LOADER_TIMEOUT
                raise Refused(f"no images for {seconds:g} s; is the disk or the network under DATA still "
                              "there? May a process open enough files (ulimit -n)?") from None
        else:
            waits = 0
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            yield batch


def parts(batches, most):
    """Yield batches of (epoch, indices) in parts of so many images at most: (epoch, indices, whether it is
    the batch's last)."""
    for epoch, index in batches:
        for start in range(0, len(index), most):
            yield epoch, index[start:start + most], start + most >= len(index)


class Decoder(torch.utils.data.Dataset):
    """In a worker: (epoch, indices, is_last) -> cut images, a part of a batch. Each file is decoded once for
    all its views."""

    def __init__(self, source, cut):
        # Not the source: where workers are spawned, its labels and captions would be copied to each.
        self.files = source.files
        self.value_range = source.value_range
        self.cut = cut

    def __getitems__(self, part):
        """-> epoch, indices, is_last, [(N, 3, S, S) uint8, one per view], {index: what is wrong} of the bad
        files.

        If too many files are bad, or a tar file is gone, the last is a Refused, and the main process raises
        it. Raised here, it would arrive there wrapped in a traceback.
        """
        epoch, index, is_last = part
        cuts = []
        bad = {}
        try:
            for i in index:
                image, met = read_or_replace(self.files, i, self.value_range)
                cuts.append(self.cut(image, epoch, i))
                bad |= met
        except Refused as error:
            return epoch, index, is_last, None, error
        return epoch, index, is_last, torch.utils.data.default_collate(cuts), bad


def outlive_signals(worker):
    """In a worker: ignore the signals that end a run. They reach the whole job, and the last steps still
    need batches."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
