"""The folder of a run: which it is, whether a run is in it, that nobody else writes there, its checkpoints.

A run never starts in a folder that holds another one, and never goes on where there is none, unless it was
told so: --resume auto is for job scripts, which give the same command again and again. A scheduler can start
a job again while the old one still lives. So a run locks its folder; the system unlocks it when the process
has ended, however it ends. All processes of a run count as one, which is process 0.

checkpoint.pth is the newest, checkpoint-previous.pth the one before it; Run.save writes them. Each is a dict:
"format", the state of each part of the run ("model", "optimizer", ...), the position ("epoch", "step"), what
the log needs of the epoch that it is in ("sums", "seconds", "waited", "wall"), and "settings".
"""
import fcntl
import os
import socket
import time

import torch
import torch.distributed as dist

from ..common.errors import Refused, printable
from ..common.files import read
from ..common.progress import warn
from .processes import all_sum, same_everywhere

FORMAT = 1  # of checkpoint.pth; to be raised when its contents change
NEWEST = "checkpoint.pth"
PREVIOUS = "checkpoint-previous.pth"
CHECKPOINTS = (NEWEST, PREVIOUS)
LOCK = ".writer"   # a hidden file, so that it is nobody's data
PATIENCE = 60      # seconds that a start waits for the lock: the old process may be about to end
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
    file = open(path, "a+")  # whoever has the lock stands in it: it is emptied only when it is ours
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
    """Let go of the folder. harness/training/ends.py does it when the program ends."""
    while locked:
        locked.pop().close()


# A worker process gets a copy of the open file, and would keep the lock of a run that was killed.
os.register_at_fork(after_in_child=unlock)


# --- Its checkpoints --------------------------------------------------------------------------------------

def newest_checkpoint(folder):
    """The newest of the two checkpoints that can be read -> its content, its path, and what is wrong with
    the newer one.

    Raises Refused where none can be read.
    """
    newest = os.path.join(folder, NEWEST)
    previous = os.path.join(folder, PREVIOUS)
    try:
        return read(newest), newest, None
    except (Refused, OSError) as error:
        if not os.path.exists(previous):
            raise
        problem = printable(error)
    return read(previous), previous, problem


def check_format(content, path):
    """Raise Refused for a checkpoint of another format than ours."""
    if content["format"] != FORMAT:
        raise Refused(f"{path}: not a checkpoint in this program's format {FORMAT}")


def compare_settings(then, now, may_change, override, path):
    """What has changed between a checkpoint's settings and a run's, in words; empty if nothing has.

    may_change  names of settings that may always differ
    override    names of settings that may differ this time
    Raises Refused where another setting has changed.
    """
    changed = {}
    for name in sorted({*then, *now}, key=str):
        if then.get(name) != now.get(name):
            changed[name] = f"{name} {then.get(name)} -> {now.get(name)}"
    to_name = [str(name) for name in changed if name not in may_change]
    forbidden = [text for name, text in changed.items() if name not in {*may_change, *override}]
    if forbidden:
        raise Refused(f"{path}: was made with other settings ({'; '.join(forbidden)}); give the same "
                      f"command, or another --out, or name what may change: --override {' '.join(to_name)}")
    return "; ".join(changed.values())
