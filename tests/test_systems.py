"""Systems and terminals as people have them: a pipe that closes, names that no terminal shows, disks that
lack a call, Windows."""
import errno
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import harness
from harness.common import files
from harness.common.errors import Refused, printable
from tests.helpers import ROOT, TINY, here, log_of, program, python, refusal, slow, wait_for_epoch
from tests.helpers import write_folder

pytest_plugins = ["tests.fixtures"]


# --- Output that nobody reads (kind 9) ----------------------------------------------------------------------

def piped(command, reader, **options):
    """A shell's `command | reader`, stderr apart -> CompletedProcess of the reader, what the command's stderr
    said, its exit status."""
    words = [sys.executable, *map(str, command)]
    first = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    second = subprocess.run(reader, stdin=first.stdout, capture_output=True, text=True, timeout=120)
    first.stdout.close()
    _, errors = first.communicate(timeout=300)
    return second.stdout, errors, first.returncode


def test_a_run_goes_on_when_nobody_reads_its_output(tmp_path, small):
    """`| head -3`: the run ends as it would, and one line says why nothing more is printed."""
    out = tmp_path / "run"
    command = [ROOT / "simsiam.py", small, *TINY, "--workers", "0", "--out", out]
    shown, errors, status = piped(command, ["head", "-3"])
    assert len(shown.splitlines()) == 3
    assert status == 0
    assert log_of(out)[-1]["event"] == "end"
    assert [line for line in errors.splitlines() if "nobody reads" in line] == [
        "nobody reads this output any more"]
    assert "worker" not in errors


def test_a_check_ends_when_nobody_reads_its_list(tmp_path):
    """`augment.py DATA --check | head -1`: no traceback."""
    for i in range(3000):
        (tmp_path / "photos" / f"{i:04}.jpg").parent.mkdir(exist_ok=True)
        (tmp_path / "photos" / f"{i:04}.jpg").write_bytes(b"")
    shown, errors, status = piped([ROOT / "augment.py", tmp_path / "photos", "--check"], ["head", "-1"])
    assert "it is empty" in shown
    assert status == 1
    assert "Traceback" not in errors and "BrokenPipe" not in errors


def test_a_signal_after_the_reader_has_gone_still_ends_with_its_number(tmp_path, small):
    """`2>&1 | head -1`, then SIGTERM: a scheduler goes by the exit status."""
    out = tmp_path / "run"
    words = [sys.executable, ROOT / "simsiam.py", small, *TINY, "--epochs", "400", "--knn-every", "0"]
    words = list(map(str, [*words, "--workers", "0", "--out", out]))
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.readline()
    process.stdout.close()
    wait_for_epoch(process, out)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM


@slow
def test_a_run_without_stdout_and_stderr_goes_on(tmp_path, small):
    """`>&- 2>&-`, as some daemons start programs."""
    out = tmp_path / "run"
    words = [sys.executable, ROOT / "simsiam.py", small, *TINY, "--workers", "0", "--out", out]
    done = subprocess.run(" ".join(map(str, words)) + " >&- 2>&-", shell=True, timeout=300)
    assert done.returncode == 0
    assert log_of(out)[-1]["event"] == "end"


@slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_run_goes_on_when_its_output_fills_a_disk(tmp_path, small):
    """`> /dev/full`"""
    out = tmp_path / "run"
    with open("/dev/full", "w") as full:
        words = [sys.executable, ROOT / "simsiam.py", small, *TINY, "--workers", "0", "--out", out]
        done = subprocess.run(list(map(str, words)), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert "no output: [Errno 28] No space left on device\nthe run goes on" in done.stderr


@slow
def test_bad_images_are_no_reason_to_end_where_stderr_is_closed_too(tmp_path, small):
    """`2>&1 | head -1`, and a bad image afterwards."""
    folder = write_folder(tmp_path / "photos", "train", 40, (90, 100))
    (folder / "train" / "a" / "zzz.png").write_bytes(b"broken")
    out = tmp_path / "run"
    words = [sys.executable, ROOT / "simsiam.py", folder, *TINY, "--out", out]
    line = " ".join(map(str, words)) + " 2>&1 | head -1"
    shown = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=300)
    assert len(shown.stdout.splitlines()) == 1
    assert log_of(out)[-1]["event"] == "end"


# --- Names (kind 10) ----------------------------------------------------------------------------------------

NAMES = {  # a folder's name (bytes), PYTHONIOENCODING, and what stands in the line
    "an accent on an ASCII terminal": ("donn\u00e9es".encode(), "ascii", "donn\\xe9es"),
    "bytes that are no UTF-8": (b"caf\xe9", "utf-8:strict", "caf\\xe9"),
    "Chinese on a Windows terminal": ("\u56fe\u7247".encode(), "cp1252", "\\u56fe\\u7247"),
    "an escape sequence": (b"red\x1b[31m", "utf-8", "red\\x1b[31m"),
    "a line break": (b"two\nlines", "utf-8", "two\\x0alines"),
    "emoji on latin-1": ("\U0001f431".encode(), "latin-1", "\\U0001f431"),
}


@pytest.mark.parametrize("name, encoding, shown", [
    pytest.param(*row, id=key, marks=() if k < 1 else slow) for k, (key, row) in enumerate(NAMES.items())])
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
    done = program(folder, *TINY, "--epochs", "1", "--workers", "0", "--out", out, env=environ)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    assert "\x1b" not in done.stdout
    options = ["--ckpt", f"{out}/checkpoint.pth", "--knn", "--workers", "0"]
    done = python(ROOT / "lineval.py", *options, env=environ)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    assert "\x1b" not in done.stdout


def test_a_bad_file_of_an_odd_name_is_named(tmp_path):
    """In the line of --check, by the same escapes."""
    folder = write_folder(tmp_path / "photos", "train", 3, 20)
    with open(os.path.join(os.fsencode(folder), b"train/a/caf\xe9.png"), "wb"):
        pass
    done = python(ROOT / "augment.py", folder, "--check", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert "caf\\xe9.png: can't be read as an image: it is empty" in done.stdout
    assert done.returncode == 1


@pytest.mark.parametrize("text, shown", [
    ("plain", "plain"), ("\x1b[2J", "\\x1b[2J"), ("a\nb", "a\\x0ab"), ("caf\udce9", "caf\\xe9"),
    ("\ud800", "\\ud800"), ("\x9b1m", "\\x9b1m"), ("\u56fe", "\u56fe")])
def test_printable_writes_out_what_a_terminal_would_obey(text, shown):
    """And bytes that are no text; letters of any script stay."""
    assert printable(text) == shown


# --- Disks (kind 13) ----------------------------------------------------------------------------------------

def refuse_to_sync(monkeypatch, number, what):
    """os.fsync raises for folders, or for files."""
    def fsync(descriptor, really=os.fsync):
        if os.path.isdir(f"/proc/self/fd/{descriptor}") == (what == "folders"):
            raise OSError(number, os.strerror(number))
        really(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_disk_that_cannot_sync_folders_is_no_reason_to_end(tmp_path, monkeypatch, number):
    """CIFS and FUSE: the file is there, whole."""
    refuse_to_sync(monkeypatch, number, "folders")
    files.save({"x": torch.ones(3)}, str(tmp_path / "file.pth"))
    assert torch.equal(files.read(str(tmp_path / "file.pth"))["x"], torch.ones(3))


def test_a_file_that_cannot_be_synced_is_an_error(tmp_path, monkeypatch):
    """The old file stays."""
    (tmp_path / "file.pth").write_text("old")
    refuse_to_sync(monkeypatch, errno.EIO, "files")
    with pytest.raises(Refused, match="can't be written"):
        files.save({}, str(tmp_path / "file.pth"))
    assert (tmp_path / "file.pth").read_text() == "old"


# --- Systems (kind 13) --------------------------------------------------------------------------------------

LACKING = {  # what is taken away before our programs start, and what is said
    "Windows": ("import signal; del signal.SIGUSR1; sys.modules['resource'] = sys.modules['fcntl'] = None",
                "this needs Linux or macOS (fcntl, resource, SIGUSR1 missing); on Windows, use WSL"),
    "no resource": ("sys.modules['resource'] = None",
                    "this needs Linux or macOS (resource missing); on Windows, use WSL"),
}


SCRIPTS = ["simsiam.py", "lineval.py", "augment.py", "related.py"]


@pytest.mark.parametrize("lacking, script", [
    ("Windows", "simsiam.py"), ("no resource", "lineval.py"),
    *[pytest.param("Windows", script, marks=slow) for script in SCRIPTS[1:]],
    *[pytest.param("no resource", script, marks=slow) for script in SCRIPTS if script != "lineval.py"]])
def test_a_system_that_lacks_what_is_needed_is_told_in_one_line(lacking, script):
    """Before anything else is imported that would fail."""
    take_away, said = LACKING[lacking]
    code = f"import sys; {take_away}; import runpy; sys.argv = ['{script}', '--help']; " \
           f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    done = python("-c", code, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.strip() == said


def test_the_machine_that_runs_the_tests_lacks_nothing():
    """Else the line would be wrong."""
    assert harness.check_system(lambda name: True, ["SIGUSR1"]) is None


DEVICES = {
    "cuda:1": "choose which with CUDA_VISIBLE_DEVICES=1, and --device cuda",
    "mps": "mps: only cuda and cpu; on a Mac, cpu",
    "tpu": "tpu: only cuda and cpu",
    "cuda:": "cuda:: only cuda and cpu",
}


@pytest.mark.parametrize("device, said", DEVICES.items(), ids=DEVICES)
@pytest.mark.parametrize("script", ["simsiam.py", "lineval.py"])
def test_another_device_is_refused_with_what_works(script, device, said):
    """One line."""
    more = ["--ckpt", "random:resnet18"] if script == "lineval.py" else []
    message = here(script, *more, "--device", device)
    assert said in message
    assert "\n" not in message
    assert refusal(script, *more, "--device", device) == message
