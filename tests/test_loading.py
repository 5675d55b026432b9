"""harness, loading.py: which images a step gets, and what worker processes make of files, good and bad."""
import os
import signal
import socket
import tempfile
import types

import numpy as np
import pytest
import torch

from harness.common import draws, machine
from harness.common.errors import STOPPING, BadImage, Refused
from harness.data import loading
from tests.helpers import CPU, bad_levels

pytest_plugins = ["tests.fixtures"]


def global_order(batches):
    """[(epoch, image), ...] in the order of the steps."""
    return [(epoch, i) for epoch, index in batches for i in index.tolist()]


def test_an_epoch_visits_its_permutation_and_drops_the_rest():
    """All steps of two epochs against each epoch's permutation, without the last, incomplete batch."""
    expected = []
    for epoch in range(2):
        order = draws.permutation(7, epoch, 50)
        expected += [(epoch, i) for i in order[:48].tolist()]
    batches = list(loading.index_batches(7, 50, 8, 2))
    assert len(batches) == 12
    assert global_order(batches) == expected


@pytest.mark.parametrize("world", [2, 4, 8])
def test_the_processes_share_each_global_batch(world):
    """Each global batch of one process against the shares of several, put together."""
    ranks = range(world)
    shares = [loading.index_batches(0, 50, 8, 2, rank=rank, world=world) for rank in ranks]
    whole = loading.index_batches(0, 50, 8, 2)
    for batch, *parts in zip(whole, *shares, strict=True):
        assert {len(index) for _, index in parts} == {8 // world}
        assert global_order(parts) == global_order([batch])


def test_steps_go_on_where_a_run_was_interrupted():
    """The steps from the fourth of the second epoch on against the same steps of an uninterrupted run."""
    whole = list(loading.index_batches(0, 50, 8, 3))
    rest = loading.index_batches(0, 50, 8, 3, start_epoch=1, start_step=3)
    assert global_order(rest) == global_order(whole[6 + 3:])


def test_groups_are_whole_batches_of_one_epoch():
    """Two epochs of five batches of 4 images: two batches are at most 11 images, and no batch is halved."""
    batches = list(loading.index_batches(7, 20, 4, 2))
    for most, sizes in ((11, [2, 2, 1]), (20, [5]), (3, [1] * 5)):
        groups = list(loading.in_groups(batches, most))
        assert [len(index) for _, index in groups] == 2 * sizes
        joined = [(epoch, batch) for epoch, index in groups for batch in index]
        assert global_order(joined) == global_order(batches)


CUT = 2 * 3 * 8 * 8  # bytes of what the next function makes of an image


def cut_twice(image, epoch, i):
    """Two "views" of an image: itself, and one that shows which epoch and image were asked for."""
    asked = torch.full_like(image, 100 * epoch + i)
    return [image.permute(2, 0, 1), asked.permute(2, 0, 1)]


def decoded(source, workers):
    """Decode images 3 and 0 in epoch 1, then 5 and 4 in epoch 2.

    -> [[epoch, index, the first view's level, the second's], ...]
    """
    first = np.array([3, 0])
    second = np.array([5, 4])
    batches = [(1, first), (2, second)]
    found = []
    for epoch, (index,), views in loading.decode(source, cut_twice, CUT, batches, CPU, workers):
        levels = [x.amax(dim=(1, 2, 3)).tolist() for x in views]
        assert views[0].shape == (2, 3, 8, 8)
        found += [[epoch, *row] for row in zip(index, *levels, strict=True)]
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_large_batch_is_prepared_in_parts(tmp_path, monkeypatch, workers):
    """Parts of one image: batches of two arrive as they were asked for."""
    whole = decoded(bad_levels(tmp_path), workers)
    monkeypatch.setattr(loading, "PART", 1)
    assert decoded(bad_levels(tmp_path), workers) == whole


def shared_memory(monkeypatch, free):
    """Let the system say that /dev/shm has so many free bytes."""
    status = types.SimpleNamespace(f_bavail=free, f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda path: status)


def test_parts_fit_into_a_containers_shared_memory(tmp_path, monkeypatch):
    """64 MB, two views of 224 pixels, 8 workers: what waits takes half of it at most, and not much less."""
    image = 2 * 3 * 224 ** 2
    shared_memory(monkeypatch, 64 << 20)
    part = loading.images_of_a_part(9 * image)
    assert 25 << 20 < part * 9 * image <= 32 << 20
    whole = decoded(bad_levels(tmp_path), 2)
    shared_memory(monkeypatch, 2 * 5 * CUT)  # two workers prepare two parts each, and one is being read
    assert decoded(bad_levels(tmp_path), 2) == whole
    monkeypatch.setattr(machine, "MEMORY", 256 << 20)
    with pytest.raises(Refused, match="2 workers: this process .* may use 0.2 .* or --workers"):
        decoded(bad_levels(tmp_path), 2)
    shared_memory(monkeypatch, 64 << 30)  # it is part of the memory, which may be less
    part = loading.images_of_a_part(9 * image)
    assert 50 << 20 < part * 9 * image <= 64 << 20


def test_a_shared_memory_that_cannot_be_used_is_named(tmp_path, monkeypatch):
    """It isn't there, or may not be written to; without workers nothing needs it."""
    monkeypatch.setattr(os, "access", lambda path, mode: path != "/dev/shm")
    with pytest.raises(Refused, match="can't be written to; give --workers 0"):
        decoded(bad_levels(tmp_path), 2)
    assert decoded(bad_levels(tmp_path), 0)


def test_a_tmpdir_too_long_for_sockets_is_refused(monkeypatch):
    """The longest that we take, against a socket of the name that Python would give it."""
    folder = "/tmp/".ljust(loading.SOCKETS, "x")
    monkeypatch.setattr(tempfile, "tempdir", folder)
    loading.check_sockets()
    with socket.socket(socket.AF_UNIX) as server:
        with pytest.raises(FileNotFoundError):  # the folder isn't there; the name is short enough
            server.bind(f"{folder}/pymp-12345678/listener-12345678")
        with pytest.raises(OSError, match="too long"):
            server.bind(f"{folder}x/pymp-12345678/listener-12345678")
    monkeypatch.setattr(tempfile, "tempdir", folder + "x")
    with pytest.raises(Refused, match="at most 75 letters"):
        loading.check_sockets()


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_decode_what_they_are_asked_for_and_replace_bad_images(tmp_path, workers, capsys):
    """Images and arguments of two batches against a list by hand, in the order of the batches.

    The next good image is in the place of each bad one; the source knows the bad ones that were met.
    """
    source = bad_levels(tmp_path, bad=(3, 5, 9), count=24)
    assert decoded(source, workers) == [
        [1, 3, 40, 103],
        [1, 0, 0, 100],
        [2, 5, 60, 205],
        [2, 4, 40, 204],
    ]
    assert sorted(source.bad) == [3, 5]
    assert capsys.readouterr().err.count("bad image, not used") == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_images_in_a_worker_are_an_error_of_one_line(tmp_path, workers):
    """A worker's error arrives as it was raised, not wrapped in a traceback."""
    source = bad_levels(tmp_path, bad=range(22), count=24)
    message = "20 files in a row can't be read as images, the first: .*/000.png"
    with pytest.raises(BadImage, match=message) as error:
        decoded(source, workers)
    assert "\n" not in str(error.value)


def test_workers_ignore_the_signals_that_end_a_run():
    """The handlers of this process after the call that a worker starts with."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        loading.outlive_signals(0)
        assert [signal.getsignal(number) for number in STOPPING] == [signal.SIG_IGN] * len(STOPPING)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


TROUBLES = {  # id: (what the workers' queue raises, what the one line says)
    "a worker's connection": (ConnectionResetError("x"), "a process that decodes images has died"),
    "time": (RuntimeError("DataLoader timed out after 60 seconds"), "no images for 600 s"),
}


@pytest.mark.parametrize("raised, message", TROUBLES.values(), ids=TROUBLES)
def test_dead_or_stuck_workers_are_told_in_one_line(raised, message):
    """After two batches there come no more."""
    seen = []
    with pytest.raises(Refused, match=message):
        for batch in loading.in_our_words(Queue([1, 2] + 10 * [raised])):
            seen.append(batch)
    assert seen == [1, 2]


class Queue:
    """What the workers deliver, in turn: a batch, or an error that is raised."""

    def __init__(self, events):
        self.events = iter(events)

    def __next__(self):
        event = next(self.events)
        if isinstance(event, Exception):
            raise event
        return event


def test_a_pause_is_no_timeout():
    """A machine was suspended: a wait that ended at once counts once, and the batch comes with the next."""
    timed_out = RuntimeError("DataLoader timed out after 60 seconds")
    assert list(loading.in_our_words(Queue([timed_out, 1] * 10))) == [1] * 10


def test_a_bug_behind_the_batches_stays_a_bug():
    """What is no worker's end is raised as it is."""
    def batches():
        raise RuntimeError("a bug")
        yield  # so it is a generator

    with pytest.raises(RuntimeError, match="a bug"):
        next(loading.in_our_words(batches()))
