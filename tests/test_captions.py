"""harness, captions.py: what a caption says against the image that was drawn; lists of captions; words."""
import colorsys
import re

import numpy as np
import pytest

from harness.common.errors import Refused
from harness.data import captions, opening, shapes
from tests.helpers import save_image

pytest_plugins = ["tests.fixtures"]


SIZES = "small", "medium", "large"
ROWS = "at the top", "in the middle", "at the bottom"
COLUMNS = "on the left", "in the centre", "on the right"


def words_in(caption, choices):
    """The one of some words that a caption has."""
    found = [word for word in choices if re.search(rf"\b{word}\b", caption)]
    assert len(found) == 1, (caption, choices)
    return found[0]


def lies_in(place, side, half):
    """Where the object's middle lies along one axis, of where it can lie: from 0 to 1."""
    middle = (place.max() + place.min()) / 2
    return (middle - half) / (side - 2 * half)


def test_a_caption_says_what_was_drawn():
    """Kind against the label; size, place and colour against the object's pixels, which are the lightest."""
    source = shapes.draw_shapes(5, 0, 300, 64)
    halves = {size: [] for size in SIZES}
    for i, caption in enumerate(source.captions):
        kind = source.classes[source.labels[i]]
        assert words_in(caption, source.classes) == kind
        if kind in ("crescent", "arrow", "dots", "triangle", "corner", "pair"):
            # Their middle isn't their centre.
            continue
        image = source.image(i).numpy()
        object_ = image.min(axis=2) >= 140
        rows, columns = np.nonzero(object_)
        half = (np.ptp(rows) + np.ptp(columns)) / 4
        halves[words_in(caption, SIZES)].append(half)
        for place, texts in ((rows, ROWS), (columns, COLUMNS)):
            third = texts.index(words_in(caption, texts))
            assert abs(3 * lies_in(place, 64, half) - third - 0.5) < 1.1, caption
        paint = np.median(image[object_], axis=0)
        named = words_in(caption, {*captions.COLOURS, "white"})
        if named == "white":
            assert np.ptp(paint) < 50, (caption, paint)
        else:
            hue, _, _ = colorsys.rgb_to_hsv(*paint)
            steps = 12 * hue + np.array([-0.3, 0.5, 1.3])
            around = [captions.COLOURS[int(step) % 12] for step in steps]
            assert named in around, (caption, paint)
    means = [np.mean(those) for those in halves.values()]
    assert means == sorted(means)
    assert means[2] > 1.2 * means[0]


def test_equal_captions_in_a_batch_are_rare():
    """Of 50 batches of 32 images, in order: hardly one in ten has two of the same."""
    texts = shapes.draw_shapes(0, 0, 1600, 8).captions
    batches = np.reshape(texts, (50, 32))
    equal = [len(set(batch)) < 32 for batch in batches]
    assert np.mean(equal) < 0.1


def test_colours_have_their_usual_names():
    """Some that nobody would call otherwise."""
    assert captions.colour_name((250, 150, 150)) == "red"
    assert captions.colour_name((150, 250, 150)) == "green"
    assert captions.colour_name((150, 200, 255)) == "blue"
    assert captions.colour_name((200, 200, 210)) == "white"


def listed(folder, text):
    """A list with this text, beside two images -> its path."""
    for name, number in (("a.png", 0), ("b b.png", 1)):
        save_image(folder / name, shapes.draw_shapes(0, number, 1, 16).image(0))
    (folder / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / "list.txt"


@pytest.mark.parametrize("text", [
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
    ("a.png\ta dog\nb b.png\n", "line 2 (not counting empty ones) must have a path, a tab and a caption"),
    ("a.png\ta dog\nb b.png\t...\n", "must have a path, a tab and a caption with a word in it"),
    ("c.png\ta dog\n", "names a file that doesn't exist: "),
    ("", "must be a text file with a path, a tab and a caption on each line"),
    (b"a.png\tGr\xf6\xdfe\n", "a path, a tab and a caption with a word in it, in UTF-8 (iconv converts it)")])
def test_bad_lists_are_refused_in_one_line(tmp_path, text, said):
    """With the number of the line, and what must be on it."""
    with pytest.raises(Refused) as refused:
        opening.open_captions(listed(tmp_path, text))
    assert said in str(refused.value)


def test_a_folder_is_no_list_of_captions(tmp_path):
    """It says what a list looks like."""
    with pytest.raises(Refused, match="must be a text file with a path, a tab and a caption"):
        opening.open_captions(tmp_path)


def test_words_are_numbers():
    """Against hand-made ones: the order of the alphabet from 1, 0 to fill up, unknown words left out."""
    vocabulary = captions.Vocabulary(["A dog", "a cat; the CAT"])
    assert vocabulary.words == ["a", "cat", "dog", "the"]
    found = vocabulary.numbers(["the dog", "a bird", "bird", "cat a dog"])
    assert found.tolist() == [[4, 3, 0], [1, 0, 0], [0, 0, 0], [2, 1, 3]]
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
