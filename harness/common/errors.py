"""Errors that end a program, the signals that end a run, and text that is safe to print.

For input that we can't use, raise Refused with one line: what is wrong, where, what to do. The scripts print
it and exit with 1 (harness/training/ends.py). Any other exception is a bug, and shows its traceback.
"""
import re
import signal

# After one of these signals a run ends as soon as its step is done. Schedulers send the first, terminals the
# second and, when they close, the third; job scripts ask for the others some minutes before time is up.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class Refused(Exception):
    """Input that we can't use. The text is one line: what is wrong, where, and what to do."""


class BadImage(Refused):
    """A file that Pillow can't read as an image."""


class Away(BadImage):
    """A file that the system can't read: that may pass, and says nothing about the file."""


class Stopped(Exception):
    """A signal has ended a program, which has saved what it can. Arguments: the signal's number, the text."""


def printable(text):
    """The text with control characters and undecodable bytes written out, \\x1b or caf\\xe9.

    File names can hold both, and a terminal would obey the former.
    """
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", written_out, str(text))


def written_out(character):
    """A match of one character -> its number, written out. Python adds 0xdc00 to a byte it can't decode."""
    number = ord(character[0])
    return f"\\x{number & 0xff:02x}" if number < 0xa0 or 0xdc80 <= number <= 0xdcff else f"\\u{number:04x}"
