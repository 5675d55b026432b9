"""simsiam.py in two processes: each sum over them is recorded, and some arrive late, as NCCL's do.

    -m tests.recorded FOLDER [arguments of simsiam.py]

NCCL's all_reduce returns at once; only reading a number on the CPU waits for the sum. gloo's always waits.
So the sums of harness/training/run.py are only started here, and waited for when they are read. The first
step of process 0 asks for the end, and its last checkpoint takes a fifth of a second. FOLDER gets each
process's sums ("sums-0"), when it left ("left-0"), and when the last checkpoint was written ("saved-0").
"""
import json
import os
import pathlib
import signal
import sys
import time

import torch.distributed as dist

import simsiam
from harness.training import ends, run
from tests.helpers import watched_steps

FOLDER = pathlib.Path(sys.argv[1])
ALL_REDUCE = dist.all_reduce
SAVE = run.save
SUMS = []
STEPS = []


class Late:
    """A sum that is on its way, with what harness/training/run.py and machine.py ask of one."""
    is_cuda = False

    def __init__(self, t):
        self.t = t
        self.work = ALL_REDUCE(t, async_op=True)

    def arrived(self):
        self.work.wait()
        return self.t

    def to(self, *where, **how):
        return self

    def tolist(self):
        return self.arrived().tolist()

    def item(self):
        return self.arrived().item()

    def __bool__(self):
        return bool(self.arrived())


def recorded(t, *args, **options):
    """all_reduce, which also records what is summed."""
    SUMS.append([str(t.dtype), list(t.shape), t.device.type, t.is_contiguous()])
    return ALL_REDUCE(t, *args, **options)


def write(name, content):
    """Write a file of this process."""
    (FOLDER / f"{name}-{dist.get_rank()}").write_text(json.dumps(content))


def slow_save(content, path, keep=None):
    """files.save, but a fifth of a second late once the run has been told to stop."""
    if STEPS:
        time.sleep(0.2)
    SAVE(content, path, keep)
    write("saved", time.time())


def stop(step):
    """The first step of process 0 asks for the end."""
    STEPS.append(step)
    if step == 0 and dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    run.all_sum = Late
    run.save = slow_save
    run.Run.steps_of_epoch = watched_steps(stop)
    dist.all_reduce = recorded
    status = ends.launch("simsiam.py", simsiam.pretrain, simsiam.parse(sys.argv[2:]))
    write("sums", SUMS)
    write("left", time.time())
    ends.leave(status)
