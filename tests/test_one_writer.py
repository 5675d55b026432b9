"""Two processes and one run folder: harness, folder.py's lock, and what a scheduler starts by mistake."""
import errno
import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from harness.common.errors import Refused
from harness.training import folder, processes
from tests.helpers import ROOT, TINY, here, log_of, losses_of, program, refusal, slow, start, torchrun
from tests.helpers import wait_for_epoch, weights_of

pytest_plugins = ["tests.fixtures"]
RUN = [*TINY, "--epochs", "400", "--knn-every", "0", "--save-minutes", "0"]


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
    with start(ROOT / "simsiam.py", small, *RUN, "--out", out) as first:
        wait_for_epoch(first, out)
        first.send_signal(signal.SIGSTOP)
        before = files_of(out)
        said = refusal("simsiam.py", small, *RUN, "--out", out, "--resume", "auto")
        assert f"another process (pid {first.pid} on " in said
        assert f"{out}: another process (pid {first.pid} on " in capsys.readouterr().err
        assert files_of(out) == before
        first.send_signal(signal.SIGCONT)
        wait_for_epoch(first, out, epoch=max(losses_of(out)) + 2)
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 128 + signal.SIGTERM
    epochs = [r["epoch"] for r in log_of(out) if r["event"] == "epoch"]
    assert epochs == list(range(len(epochs)))


def test_a_lock_of_a_dead_process_stops_nobody(tmp_path, small, impatient):
    """Killed by force, with its worker, it has left the file; the next start goes on."""
    out = tmp_path / "run"
    with start(ROOT / "simsiam.py", small, *RUN, "--out", out) as first:
        wait_for_epoch(first, out)
        first.kill()
    assert (out / folder.LOCK).exists()
    with start(ROOT / "simsiam.py", small, *RUN, "--out", out, "--resume", "auto") as second:
        wait_for_epoch(second, out, epoch=max(losses_of(out)) + 1)
        assert f"pid {second.pid} on " in (out / folder.LOCK).read_text()


def test_a_start_waits_for_a_process_that_is_about_to_end(tmp_path, small):
    """As after a requeue: the lock goes two seconds later, and the run goes on to the same weights as without
    the wait."""
    short = [*TINY, "--knn-every", "0"]
    assert here("simsiam.py", small, *short, "--out", tmp_path / "alone") is None
    out = tmp_path / "run"
    out.mkdir()
    hold = f"import fcntl, time; f = open({str(out / folder.LOCK)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); " \
           "print('held', flush=True); time.sleep(2)"
    with start("-c", hold) as holder:
        assert holder.stdout.readline() == "held\n"
        began = time.monotonic()
        assert here("simsiam.py", small, *short, "--out", out) is None
        assert time.monotonic() - began > 1
    assert weights_of(out).keys() == weights_of(tmp_path / "alone").keys()
    assert losses_of(out) == losses_of(tmp_path / "alone")


def test_a_run_that_began_while_a_start_waited_is_not_overwritten(tmp_path, small, impatient, monkeypatch):
    """Between the first look and the lock, somebody has made a checkpoint."""
    out = tmp_path / "run"
    taken = folder.take

    def later(path, shown):
        holder = taken(path, shown)
        (out / "checkpoint.pth").write_bytes(b"somebody's")
        return holder

    monkeypatch.setattr(folder, "take", later)
    said = refusal("simsiam.py", small, *TINY, "--out", out)
    assert "another process has begun a run there just now" in said
    assert (out / "checkpoint.pth").read_bytes() == b"somebody's"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_is_told(tmp_path, small, monkeypatch, capsys, number):
    """One line, and the run."""
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    out = tmp_path / "run"
    assert here("simsiam.py", small, *TINY, "--epochs", "1", "--knn-every", "0", "--out", out) is None
    said = [line for line in capsys.readouterr().err.splitlines() if "can't be locked" in line]
    assert said == [f"{out}: can't be locked ({os.strerror(number)}): see to it that no other process writes "
                    "there"]


def test_an_evaluation_is_alone_in_its_folder_too(tmp_path, ten, impatient):
    """lineval.py of each kind."""
    out = tmp_path / "out"
    out.mkdir()
    with open(out / folder.LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for protocol in ("--knn", "--sgd"):
            said = refusal("lineval.py", ten, "--ckpt", "random:resnet18", "--width", "1/16", protocol,
                           *(["--batch", "10"] if protocol == "--sgd" else []), "--out", out)
            assert "another process (unknown) writes there" in said
    assert [path.name for path in out.iterdir()] == [folder.LOCK]


@slow
def test_two_processes_of_one_run_are_one_writer(tmp_path, small):
    """torchrun's two start together; the first of them has the lock."""
    out = tmp_path / "run"
    command = [ROOT / "simsiam.py", small, *TINY, "--batch", "16", "--knn-every", "0", "--out", out]
    assert torchrun(*command).returncode == 0
    assert f"on {os.uname().nodename}" in (out / folder.LOCK).read_text()


# --- What a scheduler starts by mistake ---------------------------------------------------------------------

ENVIRONMENTS = {  # what is set, and what is said
    "srun without torchrun": (
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "SLURM has 2 tasks for this, and none"),
    "its second task": ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "torchrun is missing: srun --ntasks-per"),
    "a step of four in a job of eight": (
        {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4"}, "SLURM has 4 tasks"),
    "half an environment": (
        {"RANK": "0", "WORLD_SIZE": "1"}, "MASTER_ADDR, MASTER_PORT not set, but RANK is"),
    "a rank alone": ({"RANK": "0"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set, but RANK is"),
    "a word for a number": (
        {"RANK": "zero", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
        "RANK is 'zero', no number"),
    "a port that is none": (
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999"},
        "MASTER_PORT is 99999: a port is a number from 1 to 65535"),
    "a word for the local rank": (
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "LOCAL_RANK": "x"},
        "LOCAL_RANK is 'x', no number"),
    "a rank too many": (
        {"RANK": "1", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
        "RANK is 1, but WORLD_SIZE 1: ranks go from 0"),
}
HARMLESS = {
    "nothing": {},
    "one task": {"SLURM_NTASKS": "1"},
    "a step of one in a job of two": {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1"},
    "torchrun within srun": {"SLURM_NTASKS": "2", "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "::1",
                             "MASTER_PORT": "29500"},
}


@pytest.mark.parametrize("environ, said", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_an_environment_that_would_train_by_mistake_is_refused_at_once(environ, said):
    """What is missing is named."""
    with pytest.raises(Refused, match=said):
        processes.check_environment(environ)


@pytest.mark.parametrize("environ", HARMLESS.values(), ids=HARMLESS)
def test_an_environment_that_is_meant_is_none_of_our_business(environ):
    """Nothing is raised."""
    processes.check_environment(environ)


@slow
def test_srun_without_torchrun_trains_nothing(tmp_path, small):
    """Two copies with SLURM's variables, as srun starts them."""
    for number in ("0", "1"):
        environ = os.environ | {"SLURM_NTASKS": "2", "SLURM_PROCID": number}
        done = program(small, *TINY, "--out", tmp_path / "run", env=environ)
        assert done.returncode == 1
        assert "SLURM has 2 tasks" in done.stderr
    assert not (tmp_path / "run").exists()


@slow
def test_a_lock_holds_against_a_copy_of_the_process(tmp_path, small):
    """Worker processes have inherited the lock: when the main process is killed, they end and let go within
    the minute that a start waits."""
    out = tmp_path / "run"
    command = [sys.executable, ROOT / "simsiam.py", small, *RUN, "--out", out]
    first = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, start_new_session=True)
    wait_for_epoch(first, out)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    epoch = max(losses_of(out))
    with start(*command[1:], "--resume", "auto") as second:
        wait_for_epoch(second, out, epoch=epoch + 1)


@slow
def test_a_worker_that_hangs_does_not_keep_the_lock_of_a_killed_run(tmp_path, large):
    """Stopped, as on a dead network disk: it has no part in the lock."""
    out = tmp_path / "run"
    command = [ROOT / "simsiam.py", large, *TINY, "--batch", "4", "--epochs", "400", "--knn-every", "0"]
    with start(*command, "--recipe", "imagenet", "--size", "32", "--workers", "1", "--out", out) as first:
        wait_for_epoch(first, out)
        with open(f"/proc/{first.pid}/task/{first.pid}/children") as f:
            workers = [int(pid) for pid in f.read().split()]
        assert workers
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        first.kill()
        first.wait()
        began = time.monotonic()
        assert folder.take(str(out / folder.LOCK), str(out)) is None
        assert time.monotonic() - began < 2
        folder.unlock()
        for pid in workers:
            os.kill(pid, signal.SIGKILL)


def test_the_lock_is_let_go_when_a_program_ends(tmp_path, small):
    """The same process starts again: nothing is left of the first start."""
    assert here("simsiam.py", small, *TINY, "--epochs", "1", "--out", tmp_path / "run") is None
    assert folder.locked == []
    assert "holds a run already" in refusal("simsiam.py", small, *TINY, "--out", tmp_path / "run")
    assert here("simsiam.py", small, *TINY, "--epochs", "1", "--resume", "--out", tmp_path / "run") is None
