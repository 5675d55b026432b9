"""How a program ends, and hints at why.

    from .ends import run_and_leave
    run_and_leave("simsiam.py", pretrain, parse())

Exit status: 0 at the end; 1 with one line of text where the input can't be used or the machine failed; 128
+ the signal's number where a signal has ended the run, everything saved. Other exceptions are bugs, and
leave with their traceback.
"""
import contextlib
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback

import torch.distributed as dist

from ..common.errors import STOPPING, WORKER_KILLED, Refused, Stopped, printable
from ..common.progress import warn
from . import folder

HINTS = {  # words of torch's message (a regular expression): what to do
    "No working C\\+\\+ compiler|Failed to find C compiler|Cannot find a working triton":
        "--compile needs one; leave it out",
    # Of CUDA, cuBLAS and cuDNN: the last says it in many ways.
    "out of memory|ALLOC_FAILED|[Uu]nable to find an engine": "use a smaller --batch, or more GPUs",
    "NCCL error": "another process has ended, or the network between the GPUs is down; NCCL_DEBUG=INFO says "
                  "more",
    "DataLoader worker .* killed": WORKER_KILLED,
    "Connection (closed|reset)|[Tt]imed out": "another process has ended, or is stuck; look for its message",
}


def run_and_leave(script, run, args):
    """Run a program, run(args), and end the process with what comes of it."""
    try:
        status = launch(script, run, args)
    except Exception:  # a bug
        traceback.print_exc()
        status = 1
    leave(status)


def launch(script, run, args):
    """Run a program, run(args), to its end.

    Returns None where it ends well, else what sys.exit would take: a line of text, or a number.
    """
    show_any_name()
    try:
        run(args)
        dist.destroy_process_group()  # only now: after a failure it would wait for the other processes
        return None
    except Stopped as stopped:
        number, message = stopped.args
        if os.environ.get("RANK", "0") == "0":
            warn(f"{script}: {message}")
        return 128 + number
    except (Refused, OSError) as error:
        message = error
    except RuntimeError as error:
        hint = hint_for(error)
        if hint is None:
            raise
        first_line = str(error).splitlines()[0]
        message = f"{first_line}: {hint}"
    except KeyboardInterrupt:
        message = "interrupted; what has a checkpoint goes on from it with --resume"
    finally:
        restore_signals()
        folder.unlock()
    if os.environ.get("LOCAL_RANK", "0") != "0":
        # The first process of a machine mostly meets the same trouble and says it. torchrun then ends this
        # one.
        time.sleep(3)
    start = "\n" if sys.stdout.isatty() else ""  # below the progress line
    return f"{start}{script}: {printable(message)}"


def show_any_name():
    """Print what the terminal can't show as escapes, such as \\xe9 for an e with an accent: a name must not
    end a run. Where there is no stdout or stderr at all, print nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whatever has started us
            setattr(sys, name, open(os.devnull, "w"))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):  # a test may have put another thing there
            stream.reconfigure(errors="backslashreplace")


def hint_for(error):
    """What to do about an error of torch's, or None where nothing is known."""
    for words, hint in HINTS.items():
        if re.search(words, str(error)):
            return hint
    return None


def restore_signals():
    """Give the signals that end a run their usual meaning again: the run is over, and nobody looks for
    them."""
    for number in STOPPING:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, usual)


def leave(status):
    """End the process with what launch returned, at once: threads and workers may be stuck, and are not
    waited for."""
    for worker in multiprocessing.active_children():
        worker.kill()
    if isinstance(status, str):
        with contextlib.suppress(OSError):  # warn() would write out the line break before it
            print(status, file=sys.stderr)
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status or 0)
