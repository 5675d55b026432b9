"""The folder of a run: its name, who may write there, and its checkpoints.

A run never starts in a folder that holds another one, and never goes on where there is none, unless it is
told to: --resume auto is for job scripts, which give the same command again and again. A scheduler can start
a job again while the old one is still alive. So a run locks its folder; the system unlocks it when the
process has ended, however it ends. Process 0 locks it for all processes of the run.

checkpoint.pth is the newest, checkpoint-previous.pth the one before it; Run.save writes them. Each is a dict:
"format", the state of each part of the run ("model", "optimizer", ...), the position ("epoch", "step"), what
the log needs of the epoch that it is in ("sums", "seconds", "waited", "wall"), and "settings".
"""
import fcntl
import os
import pathlib
import socket
import time

import torch
import torch.distributed as dist

from ..common.errors import Refused, printable
from ..common.files import read
from ..common.progress import warn
from .processes import all_sum, check_same

FORMAT = 1  # of checkpoint.pth; to be raised when its contents change
NEWEST = "checkpoint.pth"
PREVIOUS = "checkpoint-previous.pth"
CHECKPOINTS = (NEWEST, PREVIOUS)
RUN = (*CHECKPOINTS, "backbone.pth")  # a folder with any has a run
MAY_CHANGE = {"data", "more", "knn_data", "init", "backbone", "workers", "world", "knn_every", "save_minutes",
              "compile", "keep_every", "knn_k"}  # settings that a resumed run may change without --override
LOCK = ".writer"   # a hidden file, so that nobody takes it for data
PATIENCE = 60      # seconds that a start waits for the lock: the old process may be about to end
locked = []        # the files that this process has locked


def folder_name(data):
    """The name of the folder for runs on this data. It leads out of no folder."""
    if data is None:
        return "shapes"
    path = pathlib.Path(os.path.abspath(data))  # a path may end in a slash, or be ".."
    return path.stem.strip(".") or "data"


# --- Who may write there ----------------------------------------------------------------------------------

def enter(out, names, resume, device):
    """Make a folder and lock it for this run, until unlock() -> whether it holds a run already: any file of
    these names.

    resume: None, "yes" or "auto". Raises Refused if the folder is not what that expects, or if another
    process has the lock.
    """
    look(out, names, resume, device)  # before a folder is made, or anybody waits for the lock
    holder = lock(out) if dist.get_rank() == 0 else None
    if all_sum(torch.tensor(float(holder is not None), device=device)):
        raise Refused(f"{out}: another process ({holder or 'see ' + LOCK + ' there'}) is writing there; wait "
                      "until it ends, or give another folder with --out")
    return look(out, names, resume, device)  # a run may have begun there while we waited


def look(out, names, resume, device):
    """Whether a folder holds a run. Raises Refused if that is not what --resume expects."""
    found = any(os.path.exists(os.path.join(out, name)) for name in names)
    check_same(f"run in {out}", [found], device)
    # When a process dies, torchrun starts them all again with the same command, and there may be a checkpoint
    # or not. An agent that only sees the restart of others doesn't count it, so we ask all.
    restarts = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), device=device)
    if all_sum(restarts) > 0:
        return found
    if found and not resume:
        raise Refused(f"{out}: holds a run or a result already (perhaps of other data of this name); give "
                      "another folder with --out or, if it is a run to be continued, --resume")
    if resume == "yes" and not found:
        raise Refused(f"{out}: nothing to resume; leave out --resume to start, or name the run's folder with "
                      "--out")
    return found


def lock(out):
    """Make a folder and lock it, if need be when another process ends -> None, or who has the lock."""
    make_folder(out)
    file = open(os.path.join(out, LOCK), "a+")  # it says who has the lock: only the owner may empty it
    locked.append(file)
    holder = try_to_lock(file, out)
    if holder:
        warn(f"{out}: another process ({holder}) is writing there; waiting up to {PATIENCE} s for it to end")
    deadline = time.monotonic() + PATIENCE
    while holder and time.monotonic() < deadline:
        time.sleep(0.1)
        holder = try_to_lock(file, out)
    return holder


def make_folder(out):
    """Make the folder of --out, unless it is there. Raises Refused if it can't be made."""
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise Refused(f"--out {out}: can't be made a folder ({error.strerror}); name another one") from None


def check_new(path):
    """Raise Refused unless a file of this name can be written, and is not there yet."""
    if os.path.exists(path):
        raise Refused(f"{path}: already exists; move it away, or name another one")
    if not os.access(os.path.dirname(path) or ".", os.W_OK):
        raise Refused(f"{path}: its folder must be there, and writable; make it, or name another one")


def try_to_lock(file, out):
    """Lock a file, and write into it who has it -> None, or who has it already."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return file.read(200).strip() or "unknown"
    except OSError as error:  # some file systems have no locks
        warn(f"{out}: can't be locked ({error.strerror}); make sure that no other process writes there")
    file.truncate(0)
    os.write(file.fileno(), f"pid {os.getpid()} on {socket.gethostname()}\n".encode())  # at the end: "a+"
    return None


def unlock():
    """Let go of the folder. harness/training/ends.py does it when the program ends."""
    while locked:
        locked.pop().close()


# A worker process gets a copy of the open file, and would keep the lock of a run that was killed.
os.register_at_fork(after_in_child=unlock)


# --- Its checkpoints --------------------------------------------------------------------------------------

def newest_checkpoint(folder):
    """The newest checkpoint that can be read -> its content, its path, and what is wrong with a newer one.

    Raises Refused if none can be read.
    """
    newest = os.path.join(folder, NEWEST)
    previous = os.path.join(folder, PREVIOUS)
    try:
        return read(newest), newest, None
    except (Refused, OSError) as error:
        if not os.path.exists(previous):
            if os.path.exists(newest):
                raise
            raise Refused(f"{folder}: has no checkpoint.pth to go on from; give another --out") from None
        problem = printable(error)
    return read(previous), previous, problem


def check_format(content, path):
    """Raise Refused for a checkpoint of another format than ours."""
    if content["format"] != FORMAT:
        raise Refused(f"{path}: not a checkpoint in this program's format {FORMAT}")


def compare_settings(then, now, override, path):
    """What has changed between a checkpoint's settings and a run's, in words; empty if nothing has.

    override: names of settings that may differ this time, besides MAY_CHANGE. Raises Refused if others do.
    """
    changed = {}
    for name in sorted({*then, *now}, key=str):
        if then.get(name) != now.get(name):
            changed[name] = f"{name} {then.get(name)} -> {now.get(name)}"
    if "sha256" in changed:
        epochs = then.get("pretrained_epochs")
        raise Refused(f"{path}: is an evaluation of another backbone, or of this one after {epochs} epochs; "
                      "give another --out")
    to_name = [name for name in changed if name not in MAY_CHANGE]
    forbidden = [changed[name] for name in to_name if name not in override]
    if forbidden:
        raise Refused(f"{path}: was made with other settings ({'; '.join(forbidden)}); repeat its command, "
                      "start in another --out without --resume, or name what may change (nothing that shapes "
                      f"the network): --override {' '.join(map(str, to_name))}")
    return "; ".join(changed.values())
