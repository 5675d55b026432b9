"""simsiam.py, whose tenth step hangs and says so."""
import itertools
import time

import simsiam
from harness.training import ends

if __name__ == "__main__":
    train_step = simsiam.train_step
    count = itertools.count(1)

    def hanging(*arguments):
        if next(count) == 10:
            print("hangs", flush=True)
            time.sleep(100)
        return train_step(*arguments)

    simsiam.train_step = hanging
    ends.run_and_leave("simsiam.py", simsiam.pretrain, simsiam.parse())
