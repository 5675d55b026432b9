"""simsiam.py, whose third step hangs. It says so, and says when the run has noticed a Ctrl-C."""
import itertools
import signal
import time

import simsiam
from harness.training import ends

if __name__ == "__main__":
    train_step = simsiam.train_step
    count = itertools.count(1)

    def hanging(*arguments):
        if next(count) == 3:
            print("hangs", flush=True)
            while signal.getsignal(signal.SIGINT) != signal.SIG_DFL:  # which Run.on_signal sets
                time.sleep(0.01)
            print("noticed", flush=True)
            time.sleep(1000)
        return train_step(*arguments)

    simsiam.train_step = hanging
    ends.run_and_leave("simsiam.py", simsiam.pretrain, simsiam.parse())
