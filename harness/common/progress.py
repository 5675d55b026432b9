"""What a run prints: its start block, the line with the time left, and lines on stderr.

On a terminal we redraw one line every second. Elsewhere, in a log file for instance, we print a line every
half minute. Only one process of a run speaks.
"""
import contextlib
import datetime
import os
import shutil
import sys
import textwrap
import time

from .errors import printable

WIDTH = 108  # columns of a start block


def start_block(rows):
    """{heading: text} -> the lines that a program starts with, headings on the left."""
    lines = []
    for heading, text in rows.items():
        lines += textwrap.wrap(
            printable(text), WIDTH, initial_indent=f"{heading:12}", subsequent_indent=" " * 12,
            break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


class Progress:
    """Lines about a run of `total` steps. With quiet, it prints nothing."""

    def __init__(self, total, quiet):
        self.total = total
        self.quiet = quiet
        self.live = sys.stdout.isatty()
        self.pause = 1 if self.live else 30  # seconds
        self.done = -1  # the first step warms up, and only starts the clock

    def step(self, describe):
        """Count one step. We ask describe() for the text only when a line is due: it may wait for the GPU."""
        self.done += 1
        now = time.monotonic()
        if self.done == 0:
            self.began = now
            self.last = now
        if self.quiet or now - self.last < self.pause:
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

        Where the screen takes no more lines, because `head` has ended or a disk is full, the run goes on
        without it.
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
            silence(error)
            warn("the run goes on, and its folder has what it finds")


def silence(error):
    """Send whatever is printed from now on nowhere, and say why on stderr."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    warn("nobody reads this output any more" if isinstance(error, BrokenPipeError) else f"no output: {error}")


def warn(text):
    """Print a line on stderr, if anybody reads that."""
    with contextlib.suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)
