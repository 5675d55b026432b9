"""harness, images.py, augment.py --check: odd files become RGB or are bad; a bad one is replaced."""
import errno
import io
import os
import re
import shutil
import sys
import types

import numpy as np
import pytest
import torch

import augment
from harness.common.errors import Away, BadImage, printable
from harness.data import images
from harness.data.source import Source
from harness.evaluation.features import share_bad
from tests.helpers import CPU, TINY, bad_levels, before_each_step, here, log_of, odd_files, refusal

pytest_plugins = ["tests.fixtures"]

SIZES = {"line.png": (5000, 1)}  # all others: (20, 30)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder of odd files, and {name: the mean colour to expect, or None where the file is bad}."""
    folder = tmp_path_factory.mktemp("images") / "odd"
    return folder, odd_files(folder)


def test_what_pillow_opens_becomes_rgb(odd):
    """The tensor against the colour and the size with which the file was written. Others are bad."""
    folder, expected = odd
    for name, colour in expected.items():
        path = os.fsencode(folder / name)
        if colour is None:
            with pytest.raises(BadImage, match="can't be read as an image: "):
                images.read_image(path)
        else:
            image = images.read_image(path)
            assert image.dtype == torch.uint8
            assert image.shape == (*SIZES.get(name, (20, 30)), 3), name
            assert np.allclose(image.float().mean((0, 1)), colour, atol=3), name


def test_a_bad_image_is_replaced_by_the_next_good_one_and_named_once(tmp_path, capsys):
    """Which image comes in whose place, by a list written by hand; the last one's next is the first.

    The lines on stderr, and the source's own record, have the three that are bad.
    """
    source = bad_levels(tmp_path, bad=(1, 2, 5))
    for _ in range(2):
        shown = [source.image(i).max().item() for i in range(6)]
        assert shown == [0, 30, 30, 30, 40, 0]
    line = r"bad image, replaced by the next good one: .*/(\d+).png: can't be read .*\n"
    lines = capsys.readouterr().err
    assert re.fullmatch(line * 3, lines).groups() == ("001", "002", "005")
    assert sorted(source.bad) == [1, 2, 5]


def test_a_file_that_is_away_for_a_moment_is_read_again(tmp_path, monkeypatch):
    """The waits are a second in all. It comes back in the last of them."""
    source = bad_levels(tmp_path)
    file = tmp_path / "003.png"
    file.rename(tmp_path / "away")
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == len(images.WAITS):
            (tmp_path / "away").rename(file)

    monkeypatch.setattr(images, "time", types.SimpleNamespace(sleep=sleep))
    assert source.image(3).max() == 30
    assert sum(waited) == pytest.approx(1)
    assert source.bad == {}


def test_a_file_that_is_away_for_longer_is_not_bad_for_ever(tmp_path, monkeypatch, world_of_one, capsys):
    """It is replaced and counted once, with the one that is damaged; then it is forgotten."""
    monkeypatch.setattr(images, "WAITS", ())
    source = bad_levels(tmp_path, bad=[1])
    file = tmp_path / "003.png"
    file.rename(tmp_path / "away")
    assert [source.image(i).max() for i in (1, 3)] == [20, 40]
    assert f"{file}: can't be read (No such file or directory)\n" in capsys.readouterr().err
    assert share_bad(source, CPU) == [1, 3]
    source.forget_away()
    (tmp_path / "away").rename(file)
    assert source.image(3).max() == 30
    assert share_bad(source, CPU) == [1]


def test_files_that_were_away_count_in_their_epoch_alone(tmp_path, large, monkeypatch, capsys):
    """A class is gone in the second of three steps of the first epoch."""
    monkeypatch.setattr(images, "WAITS", ())
    data = shutil.copytree(large, tmp_path / "data")
    places = [data / "train/a", tmp_path / "away"]

    def move(step):
        if step in (0, 1):
            places[step].rename(places[1 - step])

    options = "--batch 6 --epochs 2 --size 24 --workers 0".split()
    with before_each_step(move):
        assert here("simsiam.py", data, *TINY, *options, "--out", tmp_path / "run") is None
    one, two = [record["bad_images"] for record in log_of(tmp_path / "run")[2:4]]
    assert one == capsys.readouterr().err.count("can't be read (No such file or directory)") > 0
    assert two == 0


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
def test_an_error_of_the_system_while_reading_says_nothing_about_the_file(tmp_path, monkeypatch, number):
    """As a network disk gives it, in the middle of a file."""
    class Stale(io.BytesIO):
        def read(self, size=-1):
            raise OSError(number, "gone")

    source = bad_levels(tmp_path)
    monkeypatch.setattr(images, "open_bytes", lambda path: Stale())
    with pytest.raises(Away, match=r"002.png: can't be read \(gone\)"):
        images.read_image(source.files[2])


def test_data_that_is_gone_ends_a_run_which_can_go_on(tmp_path, large, monkeypatch):
    """The folder is moved away before the second step. Its advice is followed: it is back, and --resume."""
    monkeypatch.setattr(images, "WAITS", ())
    data = shutil.copytree(large, tmp_path / "data")
    options = [data, *TINY, "--batch", 6, "--epochs", 1, "--size", 24, "--workers", 0, "--out", tmp_path / "run"]

    def move(step):
        if step == 1:
            data.rename(tmp_path / "away")

    with before_each_step(move):
        said = refusal("simsiam.py", *options)
    assert "; DATA is gone, or a part of it; when it is back, --resume goes on" in said
    (tmp_path / "away").rename(data)
    assert here("simsiam.py", *options, "--resume") is None
    assert log_of(tmp_path / "run")[-2]["bad_images"] == 0


def test_more_bad_images_than_ten_and_one_in_a_hundred_are_too_many():
    """Of 100 images, 11 bad ones are not too many, 12 are."""
    source = Source(files=np.array([b"x"] * 100))
    source.note({i: "bad" for i in range(11)})
    message = "12 of 100 images can't be read, which is too many; .*--check lists them"
    with pytest.raises(BadImage, match=message):
        source.note({50: "bad"})


def test_twenty_bad_images_in_a_row_are_too_many(tmp_path):
    """19 in a row are passed over; of 20, the message names the first."""
    source = bad_levels(tmp_path, bad=range(1, 21), count=22)
    image, bad = images.read_or_replace(source.files, 2)
    assert image.max() == 210
    assert sorted(bad) == list(range(2, 21))
    message = "20 files in a row can't be read as images, the first: .*/001.png"
    with pytest.raises(BadImage, match=message):
        images.read_or_replace(source.files, 1)


def test_check_lists_what_is_bad(odd, monkeypatch, capsys):
    """The list and the count against the files that are bad."""
    folder, expected = odd
    monkeypatch.setattr(sys, "argv", ["augment.py", str(folder), "--check"])
    with pytest.raises(SystemExit) as end:
        augment.main()
    bad = [printable(name) for name, colour in expected.items() if colour is None]
    assert end.value.code == f"augment.py: {len(bad)} of {len(expected)} image files are bad"
    printed = capsys.readouterr().out
    named = re.findall(r"^.*/odd/(.*?): can't be read as an image: .*\n", printed, re.M)
    assert sorted(named) == sorted(bad)
    assert printed.count("\n") == len(bad)
