"""Captions: words for what was drawn, lists of images with captions, and words as numbers.

A drawn shape's caption says its kind, size, colour, place and rotation, in one of several wordings, so that
two images of a batch hardly ever have the same one. Your own images come as a list: on each line a path, a
tab, and a caption. We treat a caption as a bag of words: in lower case, without their order. Spaces and
punctuation separate words: a sentence in Chinese is one word, unless its words are set apart.
"""
import colorsys
import hashlib
import os
import re
import unicodedata

import torch

from ..common.errors import Refused
from .lists import read_lines

WORDINGS = (
    "a {size} {colour} {kind} {place}, turned by {turn} degrees",
    "{place}: a {kind}, {size} and {colour}, rotated {turn} degrees",
    "a picture of one {colour} {kind}; it is {size}, at {turn} degrees, {place}",
    "this {kind} is {size}, painted {colour}, {place}, and turned {turn} degrees",
)
SIZES = ("small", "medium", "large")
ROWS = ("at the top", "in the middle", "at the bottom")
COLUMNS = ("on the left", "in the centre", "on the right")
COLOURS = "red orange yellow green green turquoise turquoise blue blue violet pink pink".split()  # by hue
PALE = 40     # levels between the strongest and the weakest channel, below which a colour is white
TURN = 30     # degrees, to whose multiples a rotation is rounded down
LONGEST = 256  # words of a text that we keep: in memory, all texts are as long as the longest


# --- Words for what was drawn ------------------------------------------------------------------------------

def describe(kind, size, place, turn, paint, wording):
    """The caption of a drawn shape.

    size, turn, wording     from 0 to 1, 1 excluded: of the sizes, of a whole turn, of the wordings
    place                   a complex number, from 0 to 1 each way: as far left, and as high up, as it can be,
                            to as far right, and as low
    paint                   red, green, blue, from 0 to 255
    """
    column = COLUMNS[int(3 * place.real)]
    row = ROWS[int(3 * place.imag)]
    return WORDINGS[int(len(WORDINGS) * wording)].format(
        kind=kind, size=SIZES[int(3 * size)], colour=colour_name(paint), place=f"{row} {column}",
        turn=int(360 * turn) // TURN * TURN)


def colour_name(paint):
    """A word for a colour: by its hue, or white if it hardly has one."""
    if max(paint) - min(paint) < PALE:
        return "white"
    hue, _, _ = colorsys.rgb_to_hsv(*paint)
    return COLOURS[round(hue * len(COLOURS)) % len(COLOURS)]


# --- Lists with captions --------------------------------------------------------------------------------

def read_captions(path):
    """A text file with a path, a tab and a caption on each line -> paths (bytes), captions.

    Paths are relative to the text file. Raises Refused if a line names no file, or has no caption.
    """
    name = os.fsdecode(path)
    folder = os.path.dirname(os.fsencode(path))
    lines = read_lines(path) if os.path.isfile(path) else []
    if not lines:
        raise Refused(f"{name}: must be a text file with a path, a tab and a caption on each line")
    files, captions = [], []
    for number, line in enumerate(lines, 1):
        image, _, caption = line.partition(b"\t")
        files.append(os.path.join(folder, image.strip()))
        captions.append(caption.decode("utf-8", errors="replace").strip())
        where = f"{name}: line {number} (not counting empty ones)"
        if not words_of(captions[-1]) or "\ufffd" in captions[-1]:  # in place of bytes that aren't UTF-8
            raise Refused(f"{where} must have a path, a tab and a caption with a word in it, in UTF-8 (iconv "
                          "converts it)")
        if not os.path.isfile(files[-1]):
            raise Refused(f"{where} names a file that doesn't exist: {os.fsdecode(files[-1])}")
    return files, captions


# --- Words as numbers -----------------------------------------------------------------------------------

def words_of(text):
    """The words of a text, in lower case. golden_retriever is two words."""
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFC", text.lower()))[:LONGEST]


def bag(text):
    """A text as the text encoder sees it: its words in no order."""
    return tuple(sorted(words_of(text)))


class Vocabulary:
    """The words of the training captions, numbered from 1 in the order of the alphabet. 0 is no word.

    Words that are not among them are left out of any text.
    """

    def __init__(self, captions):
        self.words = sorted({word for caption in captions for word in words_of(caption)})
        self.number = {word: k for k, word in enumerate(self.words, 1)}

    def numbers(self, texts):
        """The words of each text by number, filled up with 0: (N, L) int64"""
        known = [[self.number[word] for word in words_of(text) if word in self.number] for text in texts]
        longest = max([1, *map(len, known)])
        return torch.tensor([row + [0] * (longest - len(row)) for row in known])

    def state_dict(self):
        """For a checkpoint: whoever uses the text encoder needs the words."""
        return {"words": self.words}

    def load_state_dict(self, state):
        """Raises ValueError if these are other words: then the run's captions have changed."""
        if state["words"] != self.words:
            raise ValueError("captions of other words")


def hash_of(captions):
    """A number below 2^48 that distinguishes lists of captions."""
    text = "\n".join(captions).encode("utf-8", errors="replace")
    return int(hashlib.sha256(text).hexdigest()[:12], 16)
