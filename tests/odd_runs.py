"""simsiam.py with something odd about it: -m tests.odd_runs HOW [arguments of simsiam.py]"""
import os
import signal
import sys
import threading
import time

import simsiam
from harness.data import loading
from harness.training import ends
from harness.training import run
from harness.training.run import Run
from tests.helpers import watched_steps


def by_rank(arguments):
    """An argument A//B is A in process 0 and B in process 1."""
    rank = int(os.environ["RANK"])
    arguments[:] = [part.split("//")[rank] if "//" in part else part for part in arguments]


def hanging(arguments):
    """The third step hangs. It says so, and then that the run has noticed a Ctrl-C."""
    def hang(step):
        if step == 2:
            print("hangs", flush=True)
            while signal.getsignal(signal.SIGINT) != run.interrupt:  # which Run.on_signal sets
                time.sleep(0.01)
            print("noticed", flush=True)
            time.sleep(1000)

    Run.steps_of_epoch = watched_steps(hang)


def killed(arguments):
    """kill -9 hits it before its sixth step."""
    def kill(step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    Run.steps_of_epoch = watched_steps(kill)


def stuck(arguments):
    """Its worker opens a pipe, the first argument, into which nobody writes."""
    pipe = arguments.pop(0)
    loading.read_or_replace = lambda *arguments: open(pipe)


def impatient(arguments):
    """It is stuck, and waits half a second for images instead of ten minutes."""
    stuck(arguments)
    loading.LOADER_TIMEOUT = 0.05


def buggy(arguments):
    """It has a bug, and a thread that would keep an ordinary program alive."""
    def fail(step):
        threading.Thread(target=time.sleep, args=(1000,)).start()
        raise ZeroDivisionError("a bug")

    Run.steps_of_epoch = watched_steps(fail)


if __name__ == "__main__":
    _, how, *arguments = sys.argv
    globals()[how](arguments)
    ends.run_and_leave("simsiam.py", simsiam.pretrain, simsiam.parse(arguments))
