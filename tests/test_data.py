"""harness/data, opening.py, cifar.py and source.py: what DATA can be, and what is refused."""
import dataclasses
import os
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from harness.common.errors import Refused
from harness.data import cifar, opening, shapes
from tests.helpers import Hostile, write_cifar, write_folder

pytest_plugins = ["tests.fixtures"]


# --- Folders and lists --------------------------------------------------------------------------------------

def names_of(source):
    """The paths of a source's files as text."""
    return [os.fsdecode(name) for name in source.files]


def test_small_images_of_a_folder_are_held_in_memory(small):
    """Pixels, labels and classes against the files as Pillow reads them."""
    train, val, _ = opening.open_data(small)
    assert train.classes == ["a", "b", "c"]
    assert train.pixels.shape == (50, 3, 16, 16)
    assert np.bincount(train.labels).tolist() == [17, 17, 16]
    assert np.array_equal(val.labels, np.repeat([0, 1, 2], 3))
    assert np.array_equal(train.image(0), Image.open(small / "train/a/000.png"))
    assert opening.find_data(small).train.pixels is None


def test_large_images_of_a_folder_stay_files(large):
    """A file's name, and its pixels, against Pillow's."""
    train, _, _ = opening.open_data(large)
    assert train.pixels is None
    assert train.files.nbytes == 20 * len(bytes(train.files[0]))  # one buffer for worker processes to share
    assert names_of(train)[3] == str(large / "train/a/009.jpg")
    assert np.array_equal(train.image(3), Image.open(large / "train/a/009.jpg"))


def test_images_of_several_small_sizes_stay_files(tmp_path):
    """One of another size among 400, which the sample doesn't meet, is found too. 65 pixels are too many."""
    write_folder(tmp_path, "train", 400, 16)
    Image.new("RGB", (17, 16)).save(tmp_path / "train/a/003.png")
    train, _, _ = opening.open_data(tmp_path)
    assert train.pixels is None
    assert len(train) == 400
    Image.new("RGB", (65, 65)).save(tmp_path / "65.png")
    assert opening.open_data(tmp_path / "65.png").train.pixels is None


def test_a_list_names_files_relative_to_itself(tmp_path, small):
    """The source's files against the lines, one relative and one absolute. An image is a data set, too."""
    photo = tmp_path / "photos" / "B.JPG"
    photo.parent.mkdir()
    Image.new("RGB", (80, 70)).save(photo)
    listing = tmp_path / "list.txt"
    listing.write_text(f"photos/B.JPG\n{small}/train/a/000.png\n\n")
    train, val, _ = opening.open_data(listing)
    assert names_of(train) == [str(photo), f"{small}/train/a/000.png"]
    assert val is None
    assert names_of(opening.open_data(photo).train) == [str(photo)]


def test_nothing_stands_for_the_shapes(monkeypatch):
    """Which images are drawn, over the cores, against one draw of all: none is in both splits."""
    monkeypatch.setattr(shapes, "TRAINING", 60)
    monkeypatch.setattr(shapes, "VALIDATION", 20)
    train, val, found = opening.open_data(None)
    whole = shapes.draw_shapes(0, 0, 80)
    assert torch.equal(torch.cat([train.pixels, val.pixels]), whole.pixels)
    assert np.concatenate([train.labels, val.labels]).tolist() == whole.labels.tolist()
    assert found.layout == "the drawn shapes"


# --- The fingerprint ----------------------------------------------------------------------------------------

def fingerprint(folder):
    """The number of a folder's training split."""
    return opening.open_data(folder)[0].fingerprint()


@pytest.mark.parametrize("kind", ["small", "large"])
def test_fingerprint_tells_data_sets_apart(kind, request, tmp_path):
    """A copy in another place has the same number; the same files with another label have another."""
    original = request.getfixturevalue(kind)
    folder = shutil.copytree(original, tmp_path / "copy")
    assert fingerprint(folder) == fingerprint(original)
    assert fingerprint(folder) < 2 ** 48
    one = min((folder / "train/b").iterdir())
    one.rename(folder / "train/a" / one.name)
    assert fingerprint(folder) != fingerprint(original)


def test_fingerprint_depends_on_the_labels():
    """The same pixels with their labels in another order."""
    source = shapes.draw_shapes(0, 0, 20, 16)
    other = dataclasses.replace(source, labels=source.labels[::-1])
    assert source.fingerprint() != other.fingerprint()


# --- CIFAR-10 -----------------------------------------------------------------------------------------------

BATCHES = ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]


@pytest.mark.parametrize("layout", ["bin", "py"])
def test_cifar_in_both_layouts(tmp_path, layout):
    """Pixels and labels against those that were written: five batches to train, one to test."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 3, 32, 32), np.uint8)
    labels = rng.integers(0, 10, 60).astype(np.uint8)
    write_cifar(tmp_path, pixels, labels, 10, BATCHES)
    train, val, _ = opening.open_data(tmp_path / layout)
    assert np.array_equal(train.pixels, pixels[:50])
    assert np.array_equal(val.pixels, pixels[50:])
    assert train.labels.tolist() == labels[:50].tolist()
    assert val.labels.tolist() == labels[50:].tolist()
    assert train.classes[3] == "cat"


def test_a_batch_of_cifar_that_is_missing_is_named(tmp_path):
    """The message against the first file that is not there."""
    pixels = np.zeros((30, 3, 32, 32), np.uint8)
    write_cifar(tmp_path, pixels, np.zeros(30, np.uint8), 10, BATCHES[:3])
    for layout in ("py", "bin"):
        with pytest.raises(Refused, match="data_batch_4: not a file of CIFAR-10; .*FileNotFoundError"):
            opening.open_data(tmp_path / layout)


IMAGE = np.zeros(3072, np.uint8)
NOT_CIFAR = {  # what a file holds that is called like CIFAR's
    "calls-os.system": Hostile(os.system, ("touch HACKED",)),
    "calls-eval": Hostile(eval, ("open('HACKED', 'w')",)),
    "a-number-of-numpy": np.float64(3),
    "no-labels": {b"data": np.stack([IMAGE])},
    "one-label-too-few": {b"data": np.stack([IMAGE, IMAGE]), b"labels": [1]},
    "a-label-too-large": {b"data": np.stack([IMAGE]), b"labels": [10]},
    "not-bytes": {b"data": np.stack([IMAGE.astype(float)]), b"labels": [1]},
}


@pytest.mark.parametrize("content", NOT_CIFAR)
def test_cifar_reader_admits_nothing_else(tmp_path, monkeypatch, content):
    """Pickles of other things, some of which would run a command, are refused and run nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(NOT_CIFAR[content], 2))
    with pytest.raises(Refused, match="data_batch_1: not a file of CIFAR-10; unpack the archive again"):
        opening.open_data(tmp_path)
    assert not (tmp_path / "HACKED").exists()


@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"], ids=["new", "old"])
def test_cifar_reader_reads_what_old_and_new_numpy_wrote(tmp_path, module):
    """The same batch under the name that numpy's module has now, and under the one it had."""
    batch = {b"data": np.stack([IMAGE, IMAGE]), b"labels": [1, 2]}
    content, count = re.subn(rb"numpy\._?core\.multiarray", module, pickle.dumps(batch, 2))
    assert count == 1
    (tmp_path / "batch").write_bytes(content)
    pixels, labels = cifar.read_batch(tmp_path / "batch", cifar.LAYOUTS[1], 10)
    assert pixels.shape == (2, 3072)
    assert labels.tolist() == [1, 2]
