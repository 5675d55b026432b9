"""Two processes and one run folder: harness/training/folder.py's lock."""
import errno
import fcntl
import os
import resource
import signal
import time
import types

import pytest

from harness.training import folder
from tests.helpers import EVALUATION, PROTOCOL_OPTIONS, ROOT, TINY, children_of, equal, here, log_of
from tests.helpers import losses_of, refusal, start, wait_for_epoch, weights_of

pytest_plugins = ["tests.fixtures"]
ENDLESS = [*TINY, "--knn-every", "0", "--epochs", "4000", "--save-minutes", "0"]


@pytest.fixture
def impatient(monkeypatch):
    """A start waits for an instant only."""
    monkeypatch.setattr(folder, "PATIENCE", 0.1)


def files_of(out):
    """{name: content} of a folder's files."""
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_second_process_is_refused_and_changes_nothing(tmp_path, small, impatient, capsys):
    """The first is stopped meanwhile, as one on a machine that was frozen; then it goes on to write."""
    out = tmp_path / "run"
    with start(ROOT / "simsiam.py", small, *ENDLESS, "--out", out) as first:
        wait_for_epoch(first, out)
        first.send_signal(signal.SIGSTOP)
        before = files_of(out)
        said = refusal("simsiam.py", small, *TINY, "--out", out, "--resume", "auto")
        assert f"another process (pid {first.pid} on " in said
        assert f"{out}: another process (pid {first.pid} on " in capsys.readouterr().err
        assert files_of(out) == before
        first.send_signal(signal.SIGCONT)
        wait_for_epoch(first, out, epoch=max(losses_of(out)) + 2)
        first.send_signal(signal.SIGTERM)
        assert first.wait() == 128 + signal.SIGTERM
    epochs = [r["epoch"] for r in log_of(out) if r["event"] == "epoch"]
    assert epochs == list(range(len(epochs)))


def test_a_lock_of_a_killed_process_stops_nobody(tmp_path, large, impatient):
    """It has left the file, and a worker that hangs, as on a dead network disk: the worker has no part in the
    lock."""
    out = tmp_path / "run"
    with start(ROOT / "simsiam.py", large, *ENDLESS, "--batch", "4", "--size", "24", "--out", out) as first:
        wait_for_epoch(first, out, epoch=1)
        worker, = children_of(first.pid)
        os.kill(worker, signal.SIGSTOP)
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert (out / folder.LOCK).read_text() == f"pid {first.pid} on {os.uname().nodename}\n"
        assert folder.lock(str(out)) is None
        folder.unlock()


def test_a_start_waits_for_a_process_that_is_about_to_end(tmp_path, small, finished, monkeypatch, capsys):
    """As after a requeue: it lets go while the start waits, and the run has the same weights as without the
    wait."""
    out = tmp_path / "run"
    out.mkdir()
    with open(out / folder.LOCK, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        clock = types.SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: held.close())
        monkeypatch.setattr(folder, "time", clock)
        assert here("simsiam.py", small, *TINY, "--out", out) is None
    assert f"is writing there; waiting up to {folder.PATIENCE} s for it to end" in capsys.readouterr().err
    assert equal(weights_of(out), weights_of(finished[0]))


def test_a_run_that_began_while_a_start_waited_is_not_overwritten(tmp_path, small, monkeypatch):
    """Between the first look and the lock, somebody has made a checkpoint."""
    out = tmp_path / "run"
    lock = folder.lock

    def later(out):
        holder = lock(out)
        (tmp_path / "run/checkpoint.pth").write_bytes(b"somebody's")
        return holder

    monkeypatch.setattr(folder, "lock", later)
    assert "holds a run or a result already" in refusal("simsiam.py", small, *TINY, "--out", out)
    assert (out / "checkpoint.pth").read_bytes() == b"somebody's"


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    """One line, and the folder is taken."""
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert folder.lock(str(tmp_path)) is None
    folder.unlock()
    assert capsys.readouterr().err == (
        f"{tmp_path}: can't be locked (No locks available); make sure that no other process writes there\n")


def test_an_evaluation_is_alone_in_its_folder_too(tmp_path, ten, impatient):
    """lineval.py."""
    options = [*EVALUATION, *PROTOCOL_OPTIONS["knn"], "--out", tmp_path / "out"]
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / folder.LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process (unknown) is writing there" in refusal("lineval.py", ten, *options)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [folder.LOCK]


def test_a_lock_that_cannot_be_written_is_one_line(tmp_path, small):
    """ulimit -f 0, which stands for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        said = refusal("simsiam.py", small, *TINY, "--out", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large: the run must be able to write there" in said
