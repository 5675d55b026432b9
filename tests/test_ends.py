"""harness/training/ends.py: how a run ends early, by signals, dead processes and refusals."""
import contextlib
import functools
import itertools
import multiprocessing
import os
import resource
import runpy
import shlex
import shutil
import signal
import sys
import time
from unittest import mock

import pytest
import torch

import augment
import resnet
import simsiam
from harness.common.errors import STOPPING, Refused
from harness.data import loading
from harness.evaluation import features
from harness.training.ends import handle_signals
from tests.children import HANGS
from tests.helpers import LONGER, ROOT, TINY, before_each_step, children_of, equal, free_port, here
from tests.helpers import kill_all, log_of, losses_of
from tests.helpers import processes_of, program, python, refusal, slow, start, stopped_at
from tests.helpers import torchrun, wait_for_epoch, wait_until, weights_of, write_folder

pytest_plugins = ["tests.fixtures"]


# --- Signals ------------------------------------------------------------------------------------------------

ENDING = "TERM INT HUP USR1 USR2 XCPU".split()  # what schedulers, terminals and job scripts send


def signalled(number, at):
    """Within the block, the process sends itself a signal in this step, counted from 0."""
    return before_each_step(lambda step: os.kill(os.getpid(), number) if step == at else None)


@pytest.mark.parametrize("name", [ENDING[0], *(pytest.param(name, marks=slow) for name in ENDING[1:])])
def test_a_signal_in_a_step_ends_the_run_with_the_next(tmp_path, small, finished, capsys, name):
    """Sent within the 4th step: the position; the resumed run's weights against the uninterrupted one's."""
    number = signal.Signals["SIG" + name]
    out = tmp_path / "run"
    with signalled(number, at=3):
        assert here("simsiam.py", small, *TINY, "--out", out) == 128 + number
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert stopped_at(said, out) == (1, 2)  # 5 steps of 3 an epoch
    assert here("simsiam.py", small, *TINY, "--out", out, "--resume") is None
    assert equal(weights_of(out), weights_of(finished[0]))


def test_nohup_keeps_a_run_going(tmp_path, small):
    """SIGHUP is ignored from the start, as nohup has it: it doesn't end the run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signalled(signal.SIGHUP, at=3):
            assert here("simsiam.py", small, *TINY, "--out", tmp_path / "run") is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("epochs", [0, pytest.param(2, marks=slow)])
def test_a_signal_ends_a_measurement_with_its_batch(tmp_path, small, finished, monkeypatch, epochs):
    """kNN can take minutes. The run is saved where it is: resumed, the weights and kNN of the uninterrupted
    one."""
    out = tmp_path / "run"
    calls = []
    real = resnet.ResNet.features

    def sending(network, x):
        if len(x) == 9 and len(knn_of(out)) == epochs:  # a batch of training is 16
            calls.append(x)
            os.kill(os.getpid(), signal.SIGTERM)
        return real(network, x)

    monkeypatch.setattr(resnet.ResNet, "features", sending)
    monkeypatch.setattr(features, "BATCH", 9)
    assert here("simsiam.py", small, *TINY, "--out", out) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert len(knn_of(out)) == epochs
    assert len(calls) == (1 if epochs else 2)  # of the first two, which calibrate BN
    assert here("simsiam.py", small, *TINY, "--out", out, "--resume") is None
    assert equal(weights_of(out), weights_of(finished[0]))
    assert knn_of(out) == knn_of(finished[0])


def test_a_signal_ends_an_evaluation_with_its_line(small, tmp_path, monkeypatch, capsys):
    """While features are computed: the status of the signal, and the handlers of before."""
    monkeypatch.setattr(resnet.ResNet, "features", lambda *given: os.kill(os.getpid(), signal.SIGTERM))
    options = ["--ckpt", "random:resnet18", "--width", "1/16", "--knn", "--out", tmp_path / "out"]
    assert here("lineval.py", small, *options) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "lineval.py: stopped by a signal; the same command starts again\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def knn_of(out):
    """kNN of each epoch in a run's log."""
    return [r["knn"] for r in log_of(out) if r["event"] == "epoch"]


@pytest.mark.parametrize("number", [
    signal.SIGTERM, pytest.param(signal.SIGINT, marks=slow), pytest.param(signal.SIGHUP, marks=slow)])
def test_a_signal_to_the_whole_job_leaves_the_workers_to_the_last_steps(tmp_path, large, number):
    """As a scheduler sends SIGTERM, and a terminal SIGINT: to the loader's workers too."""
    out = tmp_path / "run"
    options = [*LONGER, "--epochs", "500", "--workers", "1"]  # torch warns of more than there are cores
    with start(ROOT / "simsiam.py", large, *options, "--out", out) as process:
        wait_for_epoch(process, out)
        os.killpg(process.pid, number)
        _, said = process.communicate()
    assert process.returncode == 128 + number
    assert said.count("\n") == 1
    assert (0, 0) < stopped_at(said, out) < (500, 0)


def test_a_second_ctrl_c_leaves_at_once(tmp_path, small, finished):
    """In a step that hangs: the first waits for it, the second does not. The run can go on."""
    out = tmp_path / "run"
    options = [*TINY, "--save-minutes", "0", "--out", out]
    with start("-m", "tests.odd_runs", "hanging", small, *options, cwd=ROOT) as process:
        for said in ("hangs", "noticed"):
            wait_until(lambda: said in process.written("stdout"), process)
            process.send_signal(signal.SIGINT)
        assert process.wait() == 1
        assert "interrupted; if it has left a checkpoint.pth, --resume" in process.written("stderr")
    assert here("simsiam.py", small, *TINY, "--out", out, "--resume") is None
    assert equal(weights_of(out), weights_of(finished[0]))


# --- torchrun -----------------------------------------------------------------------------------------------

def cores_of(agent, agents):
    """The cores of one of several agents: each stands for a machine of its own, and threads change digits."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[agent::agents] or cores


@contextlib.contextmanager
def job(data, out, agents=1):
    """LONGER in two processes, which torchrun restarts when one dies -> its agents, for the block's time."""
    rendezvous = "--standalone"
    if agents > 1:
        rendezvous = f"--nnodes {agents} --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{free_port()}"
    launcher = f"-m torch.distributed.run {rendezvous} --nproc-per-node {2 // agents} --max-restarts 2"
    command = [*shlex.split(launcher), ROOT / "simsiam.py", data, *LONGER, "--out", out]
    with contextlib.ExitStack() as stack:
        stack.callback(kill_all, out)
        started = []
        for agent in range(agents):
            stay = functools.partial(os.sched_setaffinity, 0, cores_of(agent, agents))
            started.append(stack.enter_context(start(*command, preexec_fn=stay)))
        yield started


def workers_of(out):
    """The processes of a job that train, from the oldest on."""
    return sorted(set(processes_of(out)) - set(processes_of(out, "torch.distributed.run")))


def finish(agents):
    """Wait for the agents' end -> what each of them and its workers said."""
    return [agent.communicate(timeout=HANGS)[1] for agent in agents]


def ends_uninterrupted(out, whole, resumes=1):
    """Whether a job has ended, been resumed this often, and has the weights of the uninterrupted one."""
    events = [r["event"] for r in log_of(out)]
    ended = events[-1] == "end" and events.count("resume") == resumes
    return ended and equal(weights_of(whole), weights_of(out))


def resume_in_two(data, out):
    """The same run goes on in two processes, to its end."""
    again = torchrun(ROOT / "simsiam.py", data, *LONGER, "--out", out, "--resume")
    assert again.returncode == 0, again.stderr


@slow
@pytest.mark.parametrize("name", ["TERM", "HUP", "USR2"])
def test_torchrun_survives_a_signal_to_the_agent(tmp_path, small, longer, name):
    """Everything is saved; resumed, against the uninterrupted run in two processes. SIGUSR2 ends the agent
    alone: its processes notice."""
    out = tmp_path / "run"
    with job(small, out) as agents:
        wait_for_epoch(agents[0], out)
        agents[0].send_signal(signal.Signals["SIG" + name])
        said, = finish(agents)
    assert agents[0].returncode != 0
    assert (0, 0) < stopped_at(said, out) < (6, 0)
    resume_in_two(small, out)
    assert ends_uninterrupted(out, longer)


@slow
@pytest.mark.parametrize("agents", [
    pytest.param(1, id="one machine"),
    pytest.param(2, id="two agents, each of which stands for one"),
])
def test_torchrun_survives_a_killed_worker(tmp_path, small, longer, agents):
    """The agents start all again, and they go on from the checkpoint."""
    out = tmp_path / "run"
    with job(small, out, agents) as started:
        wait_for_epoch(started[0], out)
        os.kill(workers_of(out)[-1], signal.SIGKILL)
        said = finish(started)
    assert [agent.returncode for agent in started] == [0] * agents, said
    assert ends_uninterrupted(out, longer)


@slow
def test_torchrun_survives_a_worker_killed_at_its_start(tmp_path, small, longer):
    """There is no checkpoint yet: the second start is a first one."""
    out = tmp_path / "run"
    with job(small, out) as agents:
        wait_until(lambda: workers_of(out), agents[0])
        os.kill(workers_of(out)[-1], signal.SIGKILL)
        assert not (out / "checkpoint.pth").exists()
        said = finish(agents)
    assert agents[0].returncode == 0, said
    assert ends_uninterrupted(out, longer, resumes=0)


@slow
def test_a_run_goes_on_where_all_of_torchrun_has_died(tmp_path, small, longer):
    """kill -9 to agent and workers. Resumed in two processes, against the uninterrupted run in two; and in
    one, whose sums are in another order from there on."""
    out = tmp_path / "run"
    with job(small, out) as agents:
        wait_for_epoch(agents[0], out)
        kill_all(out)
        finish(agents)
    alone = tmp_path / "alone"
    shutil.copytree(out, alone)
    resume_in_two(small, out)
    assert ends_uninterrupted(out, longer)
    assert here("simsiam.py", small, *LONGER, "--out", alone, "--resume") is None
    losses = losses_of(longer)
    assert losses_of(alone) == pytest.approx(losses, abs=2e-3)
    assert abs(losses[6] - losses[5]) > 4e-3  # so that the bound tells epochs apart


# --- Workers that decode images -----------------------------------------------------------------------------

@pytest.fixture
def stuck(tmp_path):
    """The arguments of odd_runs.stuck: a run whose worker opens tmp_path / "pipe"."""
    data = write_folder(tmp_path / "data", "train", 60, (70, 80), suffix=".jpg")
    os.mkfifo(tmp_path / "pipe")
    return [tmp_path / "pipe", data, *TINY, "--knn-every", "0", "--batch", "2", "--out", tmp_path / "run"]


def test_a_worker_that_is_stuck_ends_the_run_with_a_hint(stuck):
    """After LOADER_TIMEOUT, one line about the disk."""
    done = python("-m", "tests.odd_runs", "impatient", *stuck, cwd=ROOT)
    assert done.returncode == 1
    assert "is the disk or the network under DATA still there" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_steps_before_a_failure_of_the_workers_are_saved(tmp_path, small, finished, monkeypatch):
    """DATA is gone after the 4th batch, 4 steps are saved; resumed, the uninterrupted run's weights."""
    real = augment.load_views

    def four(*given):
        yield from itertools.islice(real(*given), 4)
        raise Refused("DATA is gone")

    out = tmp_path / "run"
    monkeypatch.setattr(augment, "load_views", four)
    assert "DATA is gone" in here("simsiam.py", small, *TINY, "--out", out)
    checkpoint = torch.load(out / "checkpoint.pth", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["step"]) == (1, 1)  # of 3 steps an epoch
    monkeypatch.undo()
    assert here("simsiam.py", small, *TINY, "--out", out, "--resume") is None
    assert equal(weights_of(out), weights_of(finished[0]))


def test_a_folder_that_is_moved_away_in_a_run_is_made_again(tmp_path, small, finished):
    """All of the log, and the last checkpoint, against the uninterrupted run's."""
    out = tmp_path / "run"
    with before_each_step(lambda step: out.rename(tmp_path / "moved") if step == 4 else None):
        assert here("simsiam.py", small, *TINY, "--out", out) is None
    assert knn_of(out) == knn_of(finished[0])
    assert equal(weights_of(out), weights_of(finished[0]))


def test_news_of_a_workers_death_comes_once():
    """The connection breaks before the system tells of the death. torch's handler would then raise in the
    middle of the end."""
    def told(number, frame):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")

    def broken():
        raise ConnectionResetError("x")
        yield  # so it is a generator

    before = signal.signal(signal.SIGCHLD, told)
    try:
        with pytest.raises(Refused, match="a process that decodes images has died"):
            next(loading.in_our_words(broken()))
        os.kill(os.getpid(), signal.SIGCHLD)
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_worker_that_is_killed_ends_the_run_with_a_hint(tmp_path, stuck):
    """One line about memory."""
    with start("-m", "tests.odd_runs", "stuck", *stuck, cwd=ROOT) as process:
        pipe = wait_until(lambda: opened(tmp_path / "pipe"), process)
        worker, = children_of(process.pid)
        os.kill(worker, signal.SIGKILL)
        _, said = process.communicate()
        os.close(pipe)
    assert process.returncode == 1
    assert "a process that decodes images has died" in said
    assert "Traceback" not in said


def test_the_steps_before_a_workers_death_are_saved(tmp_path, large):
    """It is killed within a step, by which time others wait in the queue."""
    out = tmp_path / "run"
    options = [*TINY, "--workers", 2, "--batch", 4, "--knn-every", 0]

    def kill(step):
        if step == 3:
            worker, *_ = multiprocessing.active_children()
            os.kill(worker.pid, signal.SIGKILL)
            time.sleep(0.5)  # the system reports it within the step

    with before_each_step(kill):
        said = here("simsiam.py", large, *options, "--epochs", 50, "--out", out)
    assert "a process that decodes images has died" in said
    checkpoint = torch.load(out / "checkpoint.pth", weights_only=True)
    assert 5 * checkpoint["epoch"] + checkpoint["step"] >= 4  # 20 images in batches of 4


def opened(pipe):
    """A pipe, opened to be written to, once somebody reads it; None before."""
    with contextlib.suppress(OSError):
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)


# --- Refusals -----------------------------------------------------------------------------------------------

REFUSALS = {  # id: (arguments, what the one line says)
    "no data there": ("nowhere", "nowhere: no such file or folder"),
    "less than a batch": ("{small} --batch 64", "--batch 64 must be at most 50, the number of images"),
    "beyond a limit": ("{small} --size 5000", "--size must be between 2 and 4096, not 5000"),
    "one of two beyond": ("{small} --area 0.5 2", "--area must be between 0.0001 and 1, not 2"),
    "below all": ("{small} --epochs 0", "--epochs must be at least 1, not 0"),
    "a range upside down": ("{small} --area 0.5 0.2", "--area 0.5 0.2: the lower bound must come first"),
    "no step after the warm-up": ("{small} --warmup 3", "--warmup 3 must be less than --epochs 3"),
    "no number": ("{small} --momentum x", "--momentum: invalid number value: 'x'; see --help"),
    "an unknown option": ("{small} --colour", "--colour; see --help"),
    "eta and objective": ("{small} --eta average --objective asymmetric", "needs --objective symmetric"),
    "k without its alternation": (
        "{small} --k 20", "0: an epoch; kNN's k is --knn-k) has no effect with --eta current"),
    "m with the alternation": ("{small} --m 0.9 --eta alternate", "has no effect with --eta alternate"),
    "sigma without blur": (
        "{small} --sigma 1 2", "--sigma (std of the blur, in pixels) has no effect with --blur 0.0"),
    "strength without jitter": ("{small} --jitter 0 --strength 1 1 1 0.1", "has no effect with --jitter 0.0"),
    "the lr of no predictor": (
        "{small} --experiment table1-a-no-predictor --pred-lr constant", "no effect with --predictor none"),
    "hidden width of one layer": ("{small} --proj-layers 1", "has no effect with --proj-layers 1"),
    "neighbours, never measured": ("{small} --knn-k 3 --knn-every 0", "has no effect with --knn-every 0"),
    "a part of no file": ("{small} --prefix x", "--prefix needs --init"),
    "a negative k": ("{small} --knn-k -1", "--knn-k must be at least 0, not -1"),
    "nothing to resume": ("{small} --resume", "nothing to resume"),
    "a run is there": ("{small} --out {whole}", "holds a run or a result already"),
    "other epochs": ("{small} --out {whole} --resume --epochs 5", "epochs 3 -> 5"),
    "a folder in a file": (
        "{small} --out {small}/train/a/000.png/run", "000.png/run: can't be made a folder (Not a directory)"),
    "a file": ("{small} --out {small}/train/a/000.png", "000.png: can't be made a folder (File exists)"),
}


@pytest.fixture(scope="module")
def places(small, finished):
    """Folders that the refusals are about: {name: path}"""
    return {"small": small, "whole": finished[0]}


def refused(places, arguments, out):
    """The arguments of a case, after those of a tiny run, which they override."""
    data, *options = [part.format(**places) for part in arguments.split()]
    return [data, *TINY, "--out", out, *options]


@pytest.mark.parametrize("arguments, message", REFUSALS.values(), ids=REFUSALS)
def test_input_that_cannot_be_used_is_refused_in_one_line(tmp_path, places, arguments, message):
    """The line, which names the program; and the run that is there already, which stays as it was."""
    before = (places["whole"] / "checkpoint.pth").read_bytes()
    assert message in refusal("simsiam.py", *refused(places, arguments, tmp_path / "new"))
    assert (places["whole"] / "checkpoint.pth").read_bytes() == before
    assert not (tmp_path / "new").exists()


def test_data_without_a_good_image_is_refused_in_one_line(tmp_path):
    """20 files that are no images."""
    for i in range(20):
        (tmp_path / f"{i}.jpg").write_bytes(b"no image")
    message = "20 files in a row can't be read as images, the first: "
    assert message in refusal("simsiam.py", tmp_path, *TINY, "--out", tmp_path / "new")


def test_a_refused_program_ends_with_1_and_its_line(tmp_path, places):
    """A process of its own: nothing but the line on stderr, and no traceback."""
    arguments, message = REFUSALS["less than a batch"]
    out = program(*refused(places, arguments, tmp_path / "new"))
    assert out.returncode == 1
    assert message in out.stderr
    assert out.stderr.count("\n") == 1
    assert "Traceback" not in out.stderr


TROUBLES = {  # id: (what is raised, what the one line says)
    "Ctrl-C": (KeyboardInterrupt(), "interrupted; if it has left a checkpoint.pth, --resume goes on from"),
    "ulimit -v": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "use a smaller --batch"),
    "Python's own memory": (MemoryError(), "can't allocate memory: use a smaller --batch or fewer --workers"),
    "ulimit -u": (
        BlockingIOError(11, "Resource temporarily unavailable"), "use fewer --workers, or --workers 0"),
    "no room for sockets": (
        FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), "set TMPDIR to a folder"),
    "ulimit -n": (OSError(24, "Too many open files"), "raise ulimit -n, or use fewer --workers"),
    "no memory for cuBLAS": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "use a smaller --batch"),
    "a process is gone": (RuntimeError("Connection closed by peer"), "another process has ended"),
    "a full disk": (OSError(28, "No space left on device"), "on device: the run must be able to write there"),
    "a folder of others": (PermissionError(13, "Permission denied", ".writer"), "or name another --out"),
    "a name that a terminal would obey": (Refused("a\x1b[2J.png: no image"), "a\\x1b[2J.png: no image"),
}


@pytest.mark.parametrize("raised, message", TROUBLES.values(), ids=TROUBLES)
def test_what_may_happen_in_a_run_is_said_in_one_line(monkeypatch, raised, message):
    """Exceptions that are no bugs, raised in the program's place."""
    def fail(args):
        raise raised

    monkeypatch.setattr(simsiam, "pretrain", fail)
    assert message in refusal("simsiam.py")


def test_a_bug_shows_its_traceback_and_leaves_at_once(tmp_path, small):
    """An error that nobody expects is not turned into a line, and a thread holds nothing up."""
    out = python("-m", "tests.odd_runs", "buggy", small, *TINY, "--out", tmp_path / "run", cwd=ROOT)
    assert out.returncode == 1
    assert "Traceback" in out.stderr
    assert out.stderr.endswith("ZeroDivisionError: a bug\n")


@slow
def test_python_lives_on_behind_a_script_that_it_runs(tmp_path, small, finished, monkeypatch):
    """A notebook's %run, runpy: of three runs in this Python the first is refused, the others are done."""
    for name, code in (("whole", str), ("new", type(None)), ("another", type(None))):
        out = finished[0] if name == "whole" else tmp_path / name
        monkeypatch.setattr(sys, "argv", ["simsiam.py", *map(str, [small, *TINY, "--out", out])])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "simsiam.py"), run_name="__main__")
        assert isinstance(end.value.code, code)
    assert equal(weights_of(tmp_path / "another"), weights_of(finished[0]))


@pytest.mark.parametrize("limits, lowered", [
    ((100, 100), [(90, 100)]), ((80, 100), []), ((resource.RLIM_INFINITY,) * 2, [])])
def test_a_limit_of_cpu_time_is_told_before_it_kills(monkeypatch, limits, lowered):
    """`ulimit -t` sets both limits: SIGXCPU would come with SIGKILL."""
    changes = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda which, new: changes.append(new))
    with mock.patch.object(signal, "signal"):
        handle_signals(None)
    assert changes == lowered


def test_after_a_run_signals_do_what_they_did(monkeypatch):
    """The handlers that a run puts up are taken down, however it ends, and those before it come back."""
    def fail(args):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    before = [signal.getsignal(number) for number in STOPPING]
    monkeypatch.setattr(simsiam, "pretrain", fail)
    assert "out of memory" in refusal("simsiam.py")
    assert [signal.getsignal(number) for number in STOPPING] == before
