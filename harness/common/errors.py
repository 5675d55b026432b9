"""What the programs say when they can't go on, and the signals that end a run.

Whoever meets input that can't be used raises Refused with one line: what, where, what to do. The scripts
print it and exit with 1 (harness/training/ends.py). Everything else that is raised is a bug, and shows its
traceback.
"""
import re
import signal

# After one of these signals a run ends as soon as its step is done. Schedulers send the first, terminals
# the second; the third is what a job script can ask a scheduler for, some minutes before its time is up.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

WORKER_KILLED = ("a process that decodes images was killed, usually because memory or /dev/shm ran out; use "
                 "fewer --workers")


class Refused(Exception):
    """Input that can't be used. The text is one line: what, where, and what to do."""


class BadImage(Refused):
    """A file that Pillow can't read as an image."""


class Stopped(Exception):
    """A signal has ended a run, and everything is saved. Arguments: the signal's number, and what to say."""


def printable(text):
    """The text without what a terminal would obey: file names can hold escape sequences, and bytes that are
    no text. Both are written out: \\x1b, caf\\xe9."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", written_out, str(text))


def written_out(character):
    """A match of one character -> its number in letters. A byte that is no text has 0xdc00 added to it."""
    number = ord(character[0])
    return f"\\x{number & 0xff:02x}" if number < 0xa0 or 0xdc80 <= number <= 0xdcff else f"\\u{number:04x}"
