"""harness, captions.py: what a caption says against the image that was drawn; lists of captions; words."""
import colorsys
import re

import numpy as np
import pytest

from harness.common.errors import Refused
from harness.data import captions, opening, shapes
from tests.helpers import save_image

pytest_plugins = ["tests.fixtures"]


def words_in(caption, choices):
    """The one of some words that a caption has."""
    found = [word for word in choices if re.search(rf"\b{word}\b", caption)]
    assert len(found) == 1, (caption, choices)
    return found[0]


def test_a_caption_says_what_was_drawn():
    """Kind against the label; size, place and colour against the object's pixels, which are the lightest."""
    source = shapes.draw_shapes(5, 0, 300, 64)
    sides = {}
    for i in range(300):
        caption = source.captions[i]
        kind = source.classes[source.labels[i]]
        assert words_in(caption, source.classes) == kind
        if kind in ("crescent", "arrow", "dots", "triangle"):        # their middle isn't their centre
            continue
        image = source.image(i).numpy()
        object_ = image.min(axis=2) >= 140
        rows, columns = np.nonzero(object_)
        half = (rows.max() - rows.min() + columns.max() - columns.min()) / 4
        room = 64 - 2 * half
        row = words_in(caption, captions.ROWS)
        column = words_in(caption, captions.COLUMNS)
        for place, text, texts in ((rows, row, captions.ROWS), (columns, column, captions.COLUMNS)):
            share = ((place.max() + place.min()) / 2 - half) / room
            third = texts.index(text)
            assert third / 3 - 0.2 < share < (third + 1) / 3 + 0.2, (caption, share)
        sides.setdefault(words_in(caption, captions.SIZES), []).append(half)
        paint = np.median(image[object_], axis=0)
        named = words_in(caption, {*captions.COLOURS, "white"})
        if named != "white":
            hue, _, _ = colorsys.rgb_to_hsv(*paint)
            around = {captions.COLOURS[int(12 * hue + step) % 12] for step in (-0.3, 0.5, 1.3)}
            assert named in around, (caption, paint)
        else:
            assert np.ptp(paint) < 50, (caption, paint)
    means = [np.mean(sides[size]) for size in captions.SIZES]
    assert means == sorted(means)
    assert means[2] > 1.2 * means[0]


def test_captions_dont_change_the_images():
    """The fingerprint of the data set as it was without captions."""
    assert shapes.draw_shapes(3, 5, 40).fingerprint() == 140432233038511


def test_equal_captions_in_a_batch_are_rare():
    """Of 200 batches of 32 images, in order: hardly one in ten has two of the same."""
    texts = shapes.draw_shapes(0, 0, 6400, 8).captions
    equal = [len(set(texts[i:i + 32])) < 32 for i in range(0, 6400, 32)]
    assert np.mean(equal) < 0.1


@pytest.mark.parametrize("paint, name", [
    ((250, 150, 150), "red"), ((250, 240, 150), "yellow"), ((150, 250, 150), "green"),
    ((150, 200, 255), "blue"), ((200, 200, 210), "white"), ((250, 150, 240), "pink")])
def test_colours_have_their_usual_names(paint, name):
    """Some that nobody would call otherwise."""
    assert captions.colour_name(paint) == name


def listed(folder, text):
    """A list with this text, beside two images -> its path."""
    for name, number in (("a.png", 0), ("b b.png", 1)):
        save_image(folder / name, shapes.draw_shapes(0, number, 1, 16).image(0))
    (folder / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / "list.txt"


@pytest.mark.parametrize("text", [
    "a.png\ta dog\nb b.png\tA cat, asleep\n",
    "\ufeffa.png\ta dog\r\n\r\nb b.png\tA cat, asleep",
    " a.png \t a dog \nb b.png\tA cat, asleep\n"])
def test_lists_are_read_as_people_write_them(tmp_path, text):
    """A name with a space, Windows' line ends and byte order mark, empty lines, spaces around."""
    opened = opening.open_captions(listed(tmp_path, text))
    assert opened.train.captions == ["a dog", "A cat, asleep"]
    assert len(opened.train) == 2
    assert opened.train.pixels is not None
    assert opened.val is None
    assert "with captions" in opened.rows()["data"]


@pytest.mark.parametrize("text, said", [
    ("a.png\ta dog\nb b.png\n", "line 2 (empty ones not counted) has no tab and caption"),
    ("a.png\ta dog\nb b.png\tDog, a!\n", "all captions have the same words; there is nothing to tell apart"),
    ("a.png a dog\n", "line 1 (empty ones not counted) has no tab"),
    ("a.png\ta dog\nb b.png\t...\n", "line 2 (empty ones not counted) has a caption without a word"),
    ("c.png\ta dog\n", "names no file: "),
    ("", "is empty; on each line a path, a tab, and the caption"),
    (b"a.png\tGr\xf6\xdfe\n", "line 1 (empty ones not counted) has a caption that is no UTF-8 text; iconv")])
def test_bad_lists_are_refused_in_one_line(tmp_path, text, said):
    """With the number of the line, and what is wrong."""
    with pytest.raises(Refused) as refused:
        opening.open_captions(listed(tmp_path, text))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_folder_is_no_list_of_captions(tmp_path):
    """It says what a list looks like."""
    with pytest.raises(Refused, match="captions come in a text file: on each line a path, a tab"):
        opening.open_captions(tmp_path)


def test_words_are_numbers():
    """Against hand-made ones: the order of the alphabet from 1, 0 to fill up, unknown words left out."""
    vocabulary = captions.Vocabulary(["A dog", "a cat; the CAT"])
    assert vocabulary.words == ["a", "cat", "dog", "the"]
    found = vocabulary.numbers(["the dog", "a bird", "bird", "cat a dog the"])
    assert found.tolist() == [[4, 3, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [2, 1, 3, 4]]
    assert captions.words_of("golden_retriever, Cafe\u0301") == ["golden", "retriever", "caf\u00e9"]
    assert vocabulary.numbers(["dog " * 1000]).shape == (1, 256)


def test_a_vocabulary_of_other_words_is_refused():
    """What a checkpoint keeps against what the captions give."""
    vocabulary = captions.Vocabulary(["a dog"])
    vocabulary.load_state_dict(captions.Vocabulary(["dog a"]).state_dict())
    with pytest.raises(ValueError, match="captions of other words"):
        vocabulary.load_state_dict({"words": ["a", "cat"]})


def test_good_images_keep_their_captions(tmp_path):
    """Source.only."""
    source = opening.open_captions(listed(tmp_path, "a.png\tone\nb b.png\ttwo\n")).train
    assert source.only(np.array([1])).captions == ["two"]
