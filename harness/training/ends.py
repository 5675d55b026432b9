"""How a program ends, and hints at why.

    from .ends import run_and_leave
    run_and_leave("simsiam.py", pretrain, parse())

Exit status: 0 at the end; 1 with one line of text if the input can't be used or the machine failed; 128 + the
signal's number if a signal has ended the run, with everything saved. Other exceptions are bugs, and leave
with their traceback.
"""
import contextlib
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
import traceback

import torch.distributed as dist

from ..common.errors import STOPPING, Refused, Stopped, printable
from ..common.machine import WORKER_KILLED
from ..common.progress import warn
from . import folder

HINTS = {  # words of torch's message (a regular expression): what to do
    "No working C\\+\\+ compiler|Failed to find C compiler|Cannot find a working triton":
        "--compile needs one; leave it out",
    # Of CUDA, cuBLAS and cuDNN: the last says it in many ways.
    "out of memory|can't allocate memory|[Uu]nable to allocate|ALLOC_FAILED|[Uu]nable to find an engine":
        "use a smaller --batch or fewer --workers, more GPUs, or more memory (ulimit -v, the job's limit)",
    "can't start new thread|Resource temporarily unavailable":
        "as many processes and threads as are allowed run already (ulimit -u, a container's limit of pids); "
        "use fewer --workers, or --workers 0",
    "Too many open files": "raise ulimit -n, or use fewer --workers, or --workers 0",
    "No usable temporary directory": "all are full or can't be written to; set TMPDIR to a folder "
                                     "with room",
    "No space left|quota exceeded|File too large|Read-only file system|Permission denied":
        "the run must be able to write there: make room, or name another --out; if there is a "
        "checkpoint.pth, --resume goes on",
    "DataLoader worker .* (killed|exited)|allocate shared memory": WORKER_KILLED,
    "NCCL error|Connection (closed|reset)|[Tt]imed out":
        "another process has ended, is stuck, or was suspended for ten minutes, or the network is down; look "
        "for its message (NCCL_DEBUG=INFO says more of GPUs)",
}


def run_and_leave(script, run, args):
    """Run a program, run(args), and end the process with what comes of it, or only the program if another one
    runs it."""
    if has_host():
        sys.exit(launch(script, run, args))
    try:
        status = launch(script, run, args)
    except Exception:  # a bug
        traceback.print_exc()
        status = 1
    leave(status)


def has_host():
    """Whether a notebook's %run, runpy or a profiler runs the script, whose first frame is then not the
    process's first."""
    return sys._getframe(2).f_back is not None


def launch(script, run, args):
    """Run a program, run(args), to its end, and give signals and folder back.

    Returns None if it ends well, else what sys.exit would take: a line of text, or a number.
    """
    show_any_name()
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    try:
        run(args)
        dist.destroy_process_group()  # only now: after a failure it would wait for the other processes
        return None
    except Stopped as stopped:
        number, message = stopped.args
        if os.environ.get("RANK", "0") == "0":
            warn(f"{script}: {message}")
        return 128 + number
    except Refused as error:
        message = error
    except (OSError, RuntimeError, MemoryError) as error:
        problem, *_ = str(error).splitlines() or ["can't allocate memory"]
        hints = [f": {hint}" for words, hint in HINTS.items() if re.search(words, str(error) or problem)]
        if not hints and not isinstance(error, OSError):
            raise
        message = "".join([problem, *hints[:1]])
    except KeyboardInterrupt:
        message = "interrupted; if it has left a checkpoint.pth, --resume goes on from there"
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        folder.unlock()
        if dist.is_initialized() and dist.get_world_size() == 1:
            dist.destroy_process_group()  # the same Python may start another run
    if os.environ.get("LOCAL_RANK", "0") != "0":
        # The first process of a machine usually has the same trouble, and says so. Then torchrun ends this
        # one.
        time.sleep(3)
    start = "\n" if sys.stdout.isatty() else ""  # below the progress line
    return f"{start}{script}: {printable(message)}"


def handle_signals(handler):
    """Let this function get the signals in STOPPING, except ignored ones: nohup has SIGHUP ignored."""
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)
    # SIGXCPU comes at the lower limit of CPU seconds, and `ulimit -t` sets both: then SIGKILL comes alone.
    lower, upper = resource.getrlimit(resource.RLIMIT_CPU)
    if lower == upper != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_CPU, (upper * 9 // 10, upper))


def stop_now(number, frame):
    """A handler for signals where there is nothing to save."""
    raise Stopped(number, "stopped by a signal; the same command starts again")


def show_any_name():
    """Print characters that the terminal lacks as escapes, such as \\xe9 for an e with an accent: a name must
    not end a run. If stdout or stderr is closed, print nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="backslashreplace")


def leave(status):
    """End the process at once with what launch returned. Threads and workers may be stuck, so nobody waits
    for them."""
    for worker in multiprocessing.active_children():
        worker.kill()
    if isinstance(status, str):
        with contextlib.suppress(OSError):  # warn() would escape the line break before it
            print(status, file=sys.stderr)
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status or 0)
