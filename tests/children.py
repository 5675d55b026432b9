"""Children of a forkserver, which has imported torch and our programs: each starts in a tenth of a second.

A child runs a script as __main__, with its own arguments, environment, working directory, output and session,
and ends with the script's exit status. The forkserver itself only imports: once torch has computed in a
process, it has threads, which a fork doesn't copy.
"""
import contextlib
import multiprocessing
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
from multiprocessing import connection, forkserver
from unittest import mock

import torch.distributed as dist

from harness.training import ends

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
# The first imports our programs. The second is what an optimiser's first step imports, in two seconds.
CONTEXT.set_forkserver_preload(["tests.helpers", "torch._dynamo"])
HANGS = 600  # seconds after which a child that has not ended hangs; no test measures time by it


def can_run(command):
    """Whether a child can run this command of Python: one of our scripts, or -m and a module of tests/."""
    first, second, *_ = [*map(str, command), ""]
    return pathlib.Path(first).parent == ROOT or (first == "-m" and second.startswith("tests."))


def become(command, environ, folder, output, start_method):
    """In the child: run the command, its output in two files."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    multiprocessing.set_start_method(start_method, force=True)  # a child of a forkserver would take its own
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    ends.has_host = lambda: False  # a child ends as a script of its own does
    encoding, _, errors = environ.get("PYTHONIOENCODING", "utf-8").partition(":")
    sys.stdout = writer(1, output / "stdout", encoding=encoding, errors=errors or "strict")
    sys.stderr = writer(2, output / "stderr", encoding=encoding, errors="backslashreplace", buffering=1)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


def writer(number, path, **options):
    """A stream to the end of a file, which takes the place of stdout (1) or stderr (2)."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, number)
    os.close(file)
    return open(number, "w", closefd=False, **options)


def start_server():
    """Start the forkserver, which then imports while this process goes on."""
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)):  # for what it imports
        forkserver.ensure_running()


class Child:
    """A child that runs a command, with what the tests use of subprocess.Popen. It does not outlive a `with`.

    env, cwd    its environment and working directory; by default this process's
    output      a folder for its output, in the files "stdout" and "stderr"; several children can share it
    """

    def __init__(self, *command, env=None, cwd=None, output=None):
        self.args = [str(part) for part in command]
        if output is None:
            self.temporary = tempfile.TemporaryDirectory()  # as long as this object
            output = self.temporary.name
        self.output = pathlib.Path(output)
        place = os.fspath(cwd or os.getcwd())
        method = multiprocessing.get_start_method()
        start_server()
        self.process = CONTEXT.Process(
            target=become, args=(self.args, dict(env or os.environ), place, self.output, method))
        self.process.start()
        self.pid = self.process.pid

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.kill()
        self.wait()

    @property
    def returncode(self):
        """Its exit status; minus a signal's number if one has ended it; None while it runs."""
        return self.process.exitcode

    def poll(self):
        """The same."""
        return self.returncode

    def wait(self, timeout=HANGS):
        """Wait for its end -> its exit status."""
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout=HANGS):
        """Wait for its end -> what it has written to stdout and to stderr."""
        self.wait(timeout)
        return self.written("stdout"), self.written("stderr")

    def written(self, name):
        """What it has written so far."""
        file = self.output / name
        return file.read_text() if file.exists() else ""

    def send_signal(self, number):
        """To it alone."""
        os.kill(self.pid, number)

    def kill(self):
        """kill -9 it and the processes that it has started."""
        self.process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def run(*command, **options):
    """Run a command in a child, to its end -> CompletedProcess."""
    with Child(*command, **options) as child:
        stdout, stderr = child.communicate()
    return subprocess.CompletedProcess(child.args, child.returncode, stdout, stderr)


def run_two(*command, **options):
    """Run a command in two children that are the processes of one run, as torchrun does: it has the store
    through which they find each other, and ends one if the other has failed."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(tempfile.TemporaryDirectory())
        pair = []
        for rank in ("0", "1"):
            environ = os.environ | world | {"RANK": rank, "LOCAL_RANK": rank}
            pair.append(stack.enter_context(Child(*command, env=environ, output=output, **options)))
        connection.wait([child.process.sentinel for child in pair], HANGS)  # for the end of one
        if any(child.returncode for child in pair):
            for child in pair:
                child.process.terminate()  # which leaves an ended one alone
        pair[1].wait()
        stdout, stderr = pair[0].communicate()
    failed = any(child.returncode for child in pair)
    return subprocess.CompletedProcess(pair[0].args, int(failed), stdout, stderr)
