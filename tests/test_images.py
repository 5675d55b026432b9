"""harness, images.py, augment.py --check: odd files become RGB or are bad; a bad one is replaced and named."""
import os
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import augment
from harness.common.errors import BadImage, printable
from harness.data import images
from harness.data.source import Source
from harness.data.walk import as_files, walk
from tests.helpers import ROOT, obey_permissions, odd_files, python, write_folder

pytest_plugins = ["tests.fixtures"]

GOOD = ["cmyk.jpg", "palette.png", "animated.webp", "rotated.jpg", "alpha.png", "grey.png", "bilevel.png"]
GOOD += ["bits16.png", "bits16.tif", "dot.png", "line.png"]
SIZES = {"dot.png": (1, 1), "line.png": (5000, 1)}  # all others: (20, 30)
BAD = ["truncated.jpg", "empty.png", "text.jpg", "zeros.bmp", "new\nline\x1b[31m.png", "bomb.png", "loop.png"]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder of odd files, and {name: the mean colour to expect, or None where the file is bad}."""
    folder = tmp_path_factory.mktemp("images") / "odd"
    return folder, odd_files(folder)


def path_of(folder, name):
    """A file's path as a Source has it: bytes."""
    return os.fsencode(folder / name)


def test_the_odd_files_are_those_that_the_tests_name(odd):
    """The tables of this file against the folder's content."""
    folder, expected = odd
    assert sorted(expected) == sorted([*GOOD, *BAD])
    assert sorted(os.listdir(folder)) == sorted(expected)


@pytest.mark.parametrize("name", GOOD)
def test_what_pillow_opens_becomes_rgb(odd, name):
    """The tensor against the colour and the size with which the file was written."""
    folder, expected = odd
    image = images.read_image(path_of(folder, name))
    colour = image.float().mean((0, 1))
    assert image.dtype == torch.uint8
    assert image.shape == (*SIZES.get(name, (20, 30)), 3)
    assert np.allclose(colour, expected[name], atol=3)


@pytest.mark.parametrize("name", BAD, ids=printable)
def test_what_pillow_does_not_open_is_bad(odd, name):
    """The message names the file and says what to do."""
    folder, expected = odd
    assert expected[name] is None
    with pytest.raises(BadImage, match="can't be read as an image: "):
        images.read_image(path_of(folder, name))


def some_bad(folder, bad, count=6):
    """A Source of image files, image i all of level 10 i; those in `bad` are empty."""
    for i in range(count):
        path = folder / f"{i:03}.png"
        Image.new("L", (70, 70), 10 * i).save(path)
        if i in bad:
            path.write_bytes(b"")
    return Source(files=as_files(walk(os.fsencode(folder)).images))


def test_a_bad_image_is_replaced_by_the_next_good_one(tmp_path):
    """Which image comes in whose place, by a list written by hand; the last one's next is the first."""
    source = some_bad(tmp_path, bad=(1, 2, 5))
    shown = [source.image(i).max().item() for i in range(6)]
    assert shown == [0, 30, 30, 30, 40, 0]


def test_a_bad_image_is_named_once(tmp_path, capsys):
    """The lines on stderr, and the source's own record, against the two files that are bad."""
    source = some_bad(tmp_path, bad=(1, 2))
    for i in (1, 2, 1, 0):
        source.image(i)
    line = r"bad image, replaced by the next good one: .*/(\d+).png: can't be read .*\n"
    lines = capsys.readouterr().err
    assert re.fullmatch(line * 2, lines).groups() == ("001", "002")
    assert sorted(source.bad) == [1, 2]


def test_more_bad_images_than_ten_and_one_in_a_hundred_are_too_many():
    """Of 100 images, 11 bad ones are not too many, 12 are."""
    source = Source(files=np.array([b"x"] * 100))
    source.note({i: "bad" for i in range(11)})
    message = "12 of 100 images can't be read, which is too many; .*--check lists them"
    with pytest.raises(BadImage, match=message):
        source.note({50: "bad"})


def test_twenty_bad_images_in_a_row_are_too_many(tmp_path):
    """19 in a row are passed over; of 20, the message names the first."""
    source = some_bad(tmp_path, bad=range(1, 21), count=22)
    image, bad = images.read_or_replace(source.files, 2)
    assert image.max() == 210
    assert sorted(bad) == list(range(2, 21))
    message = "20 files in a row can't be read as images, the first: .*/001.png"
    with pytest.raises(BadImage, match=message):
        images.read_or_replace(source.files, 1)


def check(monkeypatch, folder):
    """Run augment.py --check in this process."""
    monkeypatch.setattr(sys, "argv", ["augment.py", str(folder), "--check"])
    augment.main()


def test_check_lists_what_is_bad(odd, monkeypatch, capsys):
    """The list and the count against the files that are bad."""
    folder, expected = odd
    with pytest.raises(SystemExit) as end:
        check(monkeypatch, folder)
    assert end.value.code == f"augment.py: {len(BAD)} of {len(expected)} image files are bad"
    printed = capsys.readouterr()
    named = re.findall(r"^.*/odd/(.*?): can't be read as an image: .*\n", printed.out, re.M)
    assert sorted(named) == sorted(printable(name) for name in BAD)
    assert printed.out.count("\n") == len(BAD)


def test_check_counts_the_files_of_both_splits(tmp_path, monkeypatch, capsys):
    """The count against the files written, of which none is bad."""
    folder = write_folder(tmp_path, "train", 4, (70, 80))
    write_folder(tmp_path, "val", 3, (70, 80))
    check(monkeypatch, folder)
    assert capsys.readouterr().out == "all 7 image files are good\n"


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_files_without_permission_are_bad(tmp_path):
    """The program's list against the one file that nobody may read."""
    folder = write_folder(tmp_path / "data", "train", 6, (70, 80))
    (folder / "train/a/003.png").chmod(0)
    out = python(ROOT / "augment.py", folder, "--check", preexec_fn=obey_permissions)
    assert out.returncode == 1
    assert out.stdout.count("\n") == 1
    assert "003.png: can't be read as an image: PermissionError" in out.stdout
    assert out.stderr.endswith("augment.py: 1 of 6 image files are bad\n")
