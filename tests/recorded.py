"""simsiam.py in two processes, where each sum over them is written down, and some come late, as NCCL's do.

    torchrun ... -m tests.recorded FOLDER [arguments of simsiam.py]

NCCL's all_reduce returns at once, and nobody has the sum until he asks for a number on the CPU. gloo's waits.
So the sums that harness/training/run.py makes are started here, and waited for only when they are read.
Process 0's last checkpoint takes two seconds. FOLDER gets, of each process, what it summed ("sums-0") and
when it left ("left-0"); of process 0 also when its last checkpoint was written ("saved-0").
"""
import json
import os
import pathlib
import signal
import sys
import time

import torch
import torch.distributed as dist

import simsiam
from harness.training import ends, run

FOLDER = pathlib.Path(sys.argv[1])
SUMS = []
ALL_REDUCE = dist.all_reduce
BROADCAST = dist.broadcast


class Late:
    """A sum that is on its way, with what harness/training/run.py and late.py do with one."""
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


def recorded(name, function):
    def called(t, *args, **options):
        SUMS.append([name, str(t.dtype), list(t.shape), t.device.type, t.is_contiguous()])
        return function(t, *args, **options)

    return called


def write(name, content):
    (FOLDER / f"{name}-{dist.get_rank()}").write_text(json.dumps(content))


def slow_save(content, path, keep=None):
    """As files.save; where the run has been told to stop, two seconds late."""
    if ASKED:
        time.sleep(2)
    SAVE(content, path, keep)
    write("saved", time.time())


def step_and_stop(*arguments):
    """A step. The tenth of process 0 asks for the end."""
    COUNT.append(1)
    if len(COUNT) == 10 and dist.get_rank() == 0:
        ASKED.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
    return STEP(*arguments)


if __name__ == "__main__":
    COUNT = []
    ASKED = []
    SAVE = run.save
    STEP = simsiam.train_step
    run.all_sum = Late
    run.save = slow_save
    simsiam.train_step = step_and_stop
    dist.all_reduce = recorded("all_reduce", ALL_REDUCE)
    dist.broadcast = recorded("broadcast", BROADCAST)
    torch.set_num_threads(1)
    status = ends.launch("simsiam.py", simsiam.pretrain, simsiam.parse(sys.argv[2:]))
    write("sums", SUMS)
    write("left", time.time())
    ends.leave(status)
