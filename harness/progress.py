"""The line with the time left.

On a terminal one line is redrawn every second. Elsewhere, in a log file for instance, a line is printed
every half minute. Only one process of a run speaks.
"""
import datetime
import math
import shutil
import sys
import time


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
        """Print a line. It stays, unless step() redraws it."""
        if self.quiet:
            return
        if self.live:
            text = f"\r\033[K{text}"
        print(text, end=end, flush=True)
