"""The line with the time left, and lines on stderr.

On a terminal one line is redrawn every second. Elsewhere, in a log file for instance, a line is printed
every half minute. Only one process of a run speaks.
"""
import contextlib
import datetime
import math
import os
import shutil
import sys
import time

from .errors import printable


class Progress:
    """Lines about a run of `total` steps. With quiet, nothing is ever printed."""

    def __init__(self, total, quiet):
        self.total = total
        self.quiet = quiet
        self.live = sys.stdout.isatty()
        self.pause = 1 if self.live else 30  # seconds
        if quiet:
            self.pause = math.inf
        # The time left is reckoned from the steps so far, but for the first, which warms up and only starts
        # the clock.
        self.done = -1
        self.began = None
        self.last = 0.0

    def step(self, describe):
        """Count one step. describe() is asked for text only when a line is due, because it may wait for the
        GPU."""
        self.done += 1
        now = time.monotonic()
        if self.done == 0:
            self.began = now
            self.last = now
        if now - self.last < self.pause:  # nobody reads a hundred lines a second
            return
        self.last = now
        seconds = (now - self.began) / self.done * (self.total - 1 - self.done)
        text = f"{describe()}  {datetime.timedelta(seconds=round(seconds))} left"
        if self.live:
            width = shutil.get_terminal_size().columns - 1  # a wrapped line could not be redrawn
            self.line(text[:width], end="")
        else:
            self.line(text)

    def line(self, text, end="\n"):
        """Print a line. It stays, unless step() redraws it.

        Nothing depends on the screen: where it takes no more lines, because `head` has ended or a disk is
        full, the run goes on without it.
        """
        if self.quiet:
            return
        text = "\n".join(printable(line) for line in text.split("\n"))
        if self.live:
            text = f"\r\033[K{text}"
        try:
            print(text, end=end, flush=True)
        except OSError as error:
            self.quiet = True
            self.pause = math.inf
            silence(error)
            warn("the run goes on, and its folder has what it finds")


def silence(error):
    """Let what is printed from now on go nowhere, and say so where that can be said."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    why = "nobody reads this output any more" if isinstance(error, BrokenPipeError) else f"no output: {error}"
    warn(why)


def warn(text):
    """A line on stderr. Where nobody reads that either, there is none."""
    with contextlib.suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)
