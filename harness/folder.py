"""Which folder a run has, whether there is a run in it, and that nobody else writes there.

A run never starts in a folder that holds another one, and never goes on where there is none, unless it was
told so: --resume auto is for job scripts, which give the same command again and again. A scheduler can start
a job again while the old one still lives. So a run locks its folder; the system unlocks it when the process
has ended, however it ends. All processes of a run count as one, which is process 0.
"""
import fcntl
import os
import socket
import time

import torch
import torch.distributed as dist

from .checkpoint import NEWEST, PREVIOUS
from .errors import Refused
from .processes import all_sum, same_everywhere
from .progress import warn

CHECKPOINTS = (NEWEST, PREVIOUS)
LOCK = ".writer"   # a hidden file, so that it is nobody's data
PATIENCE = 60      # seconds that a start waits for the lock: the old process may be about to end
FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
locked = []        # the files that this process has locked


def folder_name(data):
    """The name of the folder for runs on this data, wherever the data lies. It leads out of no folder."""
    if data is None:
        return "shapes"
    name = os.path.basename(os.path.abspath(data))  # a path may end in a slash, or be ".."
    stem, _ = os.path.splitext(name)
    return stem.strip(".") or "data"


def holds_run(out, names, resume, device):
    """Whether a folder holds a run: any file of these names.

    resume: None, "yes" or "auto". Raises Refused where the folder is not what that expects.
    """
    paths = [os.path.join(out, name) for name in names]
    found = any(os.path.exists(path) for path in paths)
    # When a process dies, torchrun starts all anew with the same command, and there may be a checkpoint or
    # not. An agent that only sees the restart of others doesn't count it, so that we ask all.
    restarts = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), device=device)
    if all_sum(restarts) > 0:
        resume = "auto"
    if not same_everywhere(found, device):
        raise Refused(f"{out}: some processes see a run there and some don't; --out must be a folder that "
                      "all machines share")
    if found and not resume:
        raise Refused(f"{out}: holds a run already; continue it with --resume, or give another folder with "
                      "--out")
    if resume == "yes" and not found:
        raise Refused(f"{out}: nothing to resume; leave --resume out to start, or name the run's folder "
                      "with --out")
    return found


def lock(out, names, resuming, device):
    """Make the folder, and lock it for this run, until unlock().

    resuming: what holds_run has said of these names. Raises Refused where another process has the lock, and
    where it has begun a run there since. Where the file system knows no locks, a line says so.
    """
    holder = None
    answer = torch.zeros(2, device=device)  # whether another process has the lock, or has begun a run
    if dist.get_rank() == 0:
        holder = take(os.path.join(out, LOCK), out)
        answer[0] = holder is not None
        answer[1] = any(os.path.exists(os.path.join(out, name)) for name in names) != resuming
    is_taken, has_begun = all_sum(answer).tolist()
    if is_taken:
        unlock()
        raise Refused(f"{out}: another process ({holder or 'see ' + LOCK + ' there'}) writes there; wait for "
                      "its end, or give another folder with --out")
    if has_begun:
        unlock()
        raise Refused(f"{out}: another process has begun a run there just now; the same command with "
                      "--resume auto goes on from it")


def take(path, out):
    """Lock a file, and write into it who has it -> None, or who has it instead."""
    os.makedirs(out, exist_ok=True)
    # A link there would lead to somebody's file.
    file = open(path, "r+", opener=lambda name, _: os.open(name, FLAGS, 0o666))
    locked.append(file)
    deadline = time.monotonic() + PATIENCE
    waiting = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip() or "unknown"
            if time.monotonic() > deadline:
                return holder
            if not waiting:
                waiting = True
                warn(f"{out}: another process ({holder}) writes there; waiting up to {PATIENCE} s for its "
                     "end")
            time.sleep(0.1)
        except OSError as error:
            warn(f"{out}: can't be locked ({error.strerror}): see to it that no other process writes there")
            break
    file.seek(0)
    file.truncate()
    file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return None


def unlock():
    """Let go of the folder. harness/ends.py does it when the program ends."""
    while locked:
        locked.pop().close()


# A worker process gets a copy of the open file, and would keep the lock of a run that was killed.
os.register_at_fork(after_in_child=unlock)
