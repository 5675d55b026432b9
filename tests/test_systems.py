"""Systems and terminals as people have them: a pipe that closes, names that no terminal shows, disks that
lack a call, versions that are too old, Windows."""
import errno
import math
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch

from harness import check_versions
from harness.common import files, machine
from harness.common.errors import Refused, printable
from harness.data import opening
from harness.data.source import Source
from tests.helpers import CPU, ROOT, TINY, log_of, program, python, refusal, slow, start, wait_for_epoch
from tests.helpers import write_folder

pytest_plugins = ["tests.fixtures"]
QUIET = [*TINY, "--workers", "0", "--knn-every", "0", "--epochs", "1"]


# --- Output that nobody reads (kind 9) ----------------------------------------------------------------------

@pytest.fixture
def output(tmp_path):
    """A folder for a child's output, of which stdout is a pipe."""
    folder = tmp_path / "output"
    folder.mkdir()
    os.mkfifo(folder / "stdout")
    return folder


def head(output, lines):
    """Read so many lines from the pipe, and close it."""
    with open(output / "stdout") as pipe:
        return [pipe.readline() for _ in range(lines)]


def test_a_run_goes_on_when_nobody_reads_its_output(tmp_path, small, output):
    """`| head -3`: the run ends as it would, and one line says why nothing more is printed."""
    out = tmp_path / "run"
    with start(ROOT / "simsiam.py", small, *QUIET, "--out", out, output=output) as run:
        head(output, 3)
        assert run.wait() == 0
        errors = run.written("stderr")
    assert log_of(out)[-1]["event"] == "end"
    assert errors.splitlines() == [
        "nobody reads this output any more", "the run goes on, and its folder has what it finds"]


def test_a_list_ends_when_nobody_reads_it(output):
    """`--experiment list | head`: no traceback."""
    with start(ROOT / "simsiam.py", "--experiment", "list", output=output) as listing:
        head(output, 0)
        assert listing.wait() == 0
        assert listing.written("stderr") == "nobody reads this output any more\n"


def test_a_check_ends_when_nobody_reads_its_list(tmp_path, output):
    """`augment.py DATA --check | head -1`: no traceback."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(1000):
        (photos / f"{i:04}.jpg").write_bytes(b"")
    with start(ROOT / "augment.py", photos, "--check", output=output) as check:
        assert "it is empty" in head(output, 1)[0]
        assert check.wait() == 1
        errors = check.written("stderr")
    assert "nobody reads this output any more" in errors
    assert "Traceback" not in errors and "BrokenPipe" not in errors


def test_a_signal_after_the_reader_has_gone_still_ends_with_its_number(tmp_path, small, output):
    """`2>&1 | head -1`, a bad image, then SIGTERM: a scheduler goes by the exit status."""
    os.symlink(output / "stdout", output / "stderr")
    data = write_folder(tmp_path / "photos", "train", 40, (90, 100))
    (data / "train" / "a" / "zzz.png").write_bytes(b"broken")
    out = tmp_path / "run"
    with start(ROOT / "simsiam.py", data, *QUIET, "--epochs", "4000", "--out", out, output=output) as run:
        head(output, 1)
        wait_for_epoch(run, out)
        run.send_signal(signal.SIGTERM)
        assert run.wait() == 128 + signal.SIGTERM


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_run_goes_on_when_its_output_fills_a_disk(tmp_path, small):
    """`> /dev/full`"""
    os.symlink("/dev/full", tmp_path / "stdout")
    out = tmp_path / "run"
    with start(ROOT / "simsiam.py", small, *QUIET, "--out", out, output=tmp_path) as run:
        assert run.wait() == 0
        assert "no output: [Errno 28] No space left on device\nthe run goes on" in run.written("stderr")
    assert log_of(out)[-1]["event"] == "end"


@slow
def test_a_run_without_stdout_and_stderr_goes_on(tmp_path, small):
    """`>&- 2>&-`, as some daemons start programs."""
    out = tmp_path / "run"
    words = [sys.executable, ROOT / "simsiam.py", small, *QUIET, "--out", out]
    done = subprocess.run(" ".join(map(str, words)) + " >&- 2>&-", shell=True)
    assert done.returncode == 0
    assert log_of(out)[-1]["event"] == "end"


# --- Names (kind 10) ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, encoding, shown", [
    pytest.param(b"caf\xe9 red\x1b[31m two\nlines", "utf-8:strict", "caf\\xe9 red\\x1b[31m two\\x0alines",
                 id="bytes that are no UTF-8, an escape sequence, a line break"),
    pytest.param("donn\u00e9es".encode(), "ascii", "donn\\xe9es", id="an accent on an ASCII terminal",
                 marks=slow),
])
def test_a_name_that_the_terminal_cannot_show_ends_no_run(tmp_path, name, encoding, shown):
    """The data, a class, and the run's folder have it; an escape stands in the line."""
    data = os.path.join(os.fsencode(tmp_path), name)
    folder = pathlib.Path(os.fsdecode(data))
    write_folder(folder, "train", 30, 20)
    write_folder(folder, "val", 9, 20)
    for split in ("train", "val"):
        shutil.move(folder / split / "a", folder / split / f"a {folder.name}")
    environ = os.environ | {"PYTHONIOENCODING": encoding}
    out = f"{folder}/../out {folder.name}"
    trained = program(folder, *QUIET, "--out", out, env=environ)
    options = ["--ckpt", f"{out}/checkpoint.pth", "--knn", "--workers", "0"]
    judged = python(ROOT / "lineval.py", *options, env=environ)
    for done in (trained, judged):
        assert done.returncode == 0, done.stderr
        assert shown in " ".join(done.stdout.split())
        assert "\x1b" not in done.stdout


@pytest.mark.parametrize("text, shown", [
    ("\x1b[2J\n", "\\x1b[2J\\x0a"), ("caf\udce9", "caf\\xe9"), ("\ud800", "\\ud800"), ("\u56fe", "\u56fe")])
def test_printable_writes_out_what_a_terminal_would_obey(text, shown):
    """And bytes that are no text; letters of any script stay."""
    assert printable(text) == shown


# --- Disks (kind 13) ----------------------------------------------------------------------------------------

def test_a_disk_that_cannot_sync_folders_is_no_reason_to_end(tmp_path, monkeypatch):
    """CIFS and FUSE: the file is there, whole."""
    def fsync(descriptor, really=os.fsync):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        really(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    files.save({"x": torch.ones(3)}, str(tmp_path / "file.pth"))
    assert torch.equal(files.read(str(tmp_path / "file.pth"))["x"], torch.ones(3))


# --- Systems, versions, devices (kind 13) -------------------------------------------------------------------

NOT_HERE = "this needs Linux or macOS; on Windows, use WSL"


@pytest.mark.parametrize("script", [
    "simsiam.py", *(pytest.param(name, marks=slow) for name in ("lineval.py", "augment.py", "related.py"))])
def test_every_script_tells_of_a_system_before_it_imports_more(script):
    """Nothing else is imported that would fail there."""
    code = "import signal, sys, runpy; del signal.SIGUSR1; " \
           "sys.modules['resource'] = sys.modules['fcntl'] = None; " \
           f"sys.argv = ['{script}', '--help']; runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    done = python("-c", code, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [NOT_HERE]


@pytest.mark.parametrize("name, version, message", [
    ("python", "3.10.18", "python 3.10.18 is too old: use 3.11 or newer"),
    ("torch", "2.5.1+cu124", "torch 2.5.1+cu124 is too old: use 2.6 or newer"),
    ("pillow", "10.4.0", "pillow 10.4.0 is too old: use 11.0 or newer"),
])
def test_versions_that_are_too_old_are_refused_in_one_line(name, version, message):
    """The line that ends the program, word for word."""
    with pytest.raises(SystemExit) as end:
        check_versions({"numpy": "2.4.6", name: version})
    assert end.value.code == message
    check_versions({"python": "3.11.0", "torch": "2.6.0", "numpy": "1.26.4", "pillow": "11.0.0"})


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_another_device_is_refused_with_what_works(device):
    """One line."""
    said = "here it is --device cuda or --device cpu (CUDA_VISIBLE_DEVICES=1 chooses a GPU"
    assert said in refusal("simsiam.py", "--device", device)
    assert said in refusal("lineval.py", "--ckpt", "random:resnet18", "--device", device)


# --- Cores and threads --------------------------------------------------------------------------------------

def test_a_cgroups_quota_limits_the_cores(tmp_path, monkeypatch):
    """The smallest of a group's and of those that it is in. So for memory, of which two processes share."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    ours = pathlib.Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].strip("/")
    (tmp_path / ours).mkdir(parents=True, exist_ok=True)
    assert machine.quota("cpu") == machine.quota("memory") == math.inf
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert machine.quota("cpu") == 2.5
    (tmp_path / ours / "cpu.max").write_text("max 100000\n")
    assert machine.quota("cpu") == (2.5 if ours else math.inf)
    (tmp_path / ours / "cpu.max").write_text("50000 100000\n")
    assert machine.quota("cpu") == 0.5
    assert machine.cores() == 1
    (tmp_path / ours / "memory.max").write_text(f"{2 ** 28}\n")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert machine.memory() == 2 ** 27


def test_a_quota_of_cgroups_of_version_1(tmp_path, monkeypatch):
    """As RHEL 8 and older containers have them; other controllers' numbers play no part."""
    own = tmp_path / "own"
    own.write_text("6:memory:/docker/1\n5:cpuset:/\n4:cpu,cpuacct:/docker/1\n0::/\n")
    monkeypatch.setattr(machine, "OWN_CGROUPS", own)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    names = "cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us", "memory/memory.limit_in_bytes"
    for name, text in zip(names, ("-1\n", "100000\n", "9223372036854771712\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine.quota("cpu") == math.inf
    assert machine.memory() == machine.MEMORY
    for name, text in zip(names, ("200000\n", "100000\n", "536870912\n")):
        (tmp_path / name).write_text(text)
    assert machine.quota("cpu") == 2
    assert machine.memory() == 2 ** 29
    assert "2 workers, at most 0.5 GiB of memory" in machine.hardware({"amp": False, "workers": 2}, CPU)


def test_images_and_features_that_do_not_fit_into_the_memory_are_refused(tmp_path, small, large, monkeypatch):
    """A tenth of a GiB is allowed, less than torch takes. Nothing is written."""
    monkeypatch.setattr(machine, "MEMORY", 2 ** 30 / 10)
    image = os.fsencode(small / "train" / "a" / "000.png")
    with pytest.raises(Refused, match=r"x: 1,001 images in memory: this process .* may use 0.1 \(the"):
        opening.in_memory(Source(files=np.array([image] * 1001), where="x"))
    options = ["--ckpt", "random:resnet18", "--size", "16", "--workers", "0", "--out", tmp_path / "run"]
    assert "features of 20 images: this process would need" in refusal("lineval.py", large, "--knn", *options)
    assert [path.name for path in tmp_path.glob("run/*")] == [".writer"]


@pytest.mark.parametrize("given, width, size, threads", [
    ("3", 1.0, 224, 3), ("3", 1 / 8, 16, 3), (None, 1.0, 224, 6), (None, 1 / 8, 16, 2), ("", 1 / 8, 16, 2),
    ("auto", 1.0, 224, 6)])
def test_threads_are_omps_or_the_cores_but_few_for_tiny_networks(monkeypatch, given, width, size, threads):
    """On a machine of six cores."""
    monkeypatch.setattr(machine, "cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    if given == "3":
        torch.set_num_threads(3)  # as torch does when it is imported
    try:
        machine.set_threads(width, size)
        assert machine.device_name(CPU) == f"CPU, {threads} threads"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("given, seen", [({}, "700"), ({"GOMP_SPINCOUNT": "5"}, "5")])
def test_threads_wait_briefly(given, seen):
    """harness sets the variable, unless the user has, before a script imports torch."""
    environ = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | given
    for script in ("simsiam", "lineval", "related"):
        assert python("-c", UNTIL_TORCH.format(script=script), cwd=ROOT, env=environ).stdout == f"{seen}\n"


UNTIL_TORCH = """
import os, sys

class Watch:
    def find_spec(name, *rest):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            sys.exit()

sys.meta_path.insert(0, Watch)
import {script}
"""
