"""simsiam.py with something odd about it: -m tests.odd_runs HOW [arguments of simsiam.py]"""
import itertools
import os
import signal
import sys
import threading
import time

import simsiam
from harness.data import loading
from harness.training import ends


def by_rank(arguments):
    """An argument A//B is A in process 0 and B in process 1."""
    rank = int(os.environ["RANK"])
    arguments[:] = [part.split("//")[rank] if "//" in part else part for part in arguments]


def hanging(arguments):
    """The third step hangs. It says so, and says when the run has noticed a Ctrl-C."""
    train_step = simsiam.train_step
    count = itertools.count(1)

    def step(*given):
        if next(count) == 3:
            print("hangs", flush=True)
            while signal.getsignal(signal.SIGINT) != signal.SIG_DFL:  # which Run.on_signal sets
                time.sleep(0.01)
            print("noticed", flush=True)
            time.sleep(1000)
        return train_step(*given)

    simsiam.train_step = step


def impatient(arguments):
    """It waits a second for images instead of ten minutes."""
    loading.LOADER_TIMEOUT = 1


def buggy(arguments):
    """It has a bug, and a thread that would hold an ordinary end up."""
    def fail(*given):
        threading.Thread(target=time.sleep, args=(1000,)).start()
        raise ZeroDivisionError("a bug")

    simsiam.train_step = fail


if __name__ == "__main__":
    _, how, *arguments = sys.argv
    globals()[how](arguments)
    ends.run_and_leave("simsiam.py", simsiam.pretrain, simsiam.parse(arguments))
