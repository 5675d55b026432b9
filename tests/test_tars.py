"""harness/data, tars.py: uncompressed tar files in the place of folders, against Python's tarfile."""
import io
import os
import shlex
import shutil
import tarfile

import numpy as np
import pytest
import torch

from harness.common.errors import Refused
from harness.data import images, tars
from harness.data.images import read_image
from harness.data.opening import find_data, open_data
from tests.helpers import TINY, equal, here, losses_of, odd_files, save_image, weights_of, write_folder

pytest_plugins = ["tests.fixtures"]
FORMATS = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}


def pack(folder, path, form=tarfile.GNU_FORMAT, above=""):
    """A tar file of what lies in a folder, named from there on; or from `above` on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name in sorted(os.listdir(folder)):
            archive.add(folder / name, above + name)
    return path


def with_member(path, name, content=b"", **attributes):
    """A tar file, and a member more."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in attributes.items():
        setattr(info, key, value)
    with tarfile.open(path, "a") as archive:
        archive.addfile(info, io.BytesIO(content))


def layouts_of(folder, where):
    """The same images in each way: {name: DATA}"""
    for split in ("train", "val"):
        pack(folder / split, where / "named after its folder" / f"{split}.tar", above=f"{split}/")
        classes = where / "a tar a class" / split
        named = where / "a tar a class, named after it" / split
        for name in os.listdir(folder / split):
            pack(folder / split / name, classes / f"{name}.tar")
            pack(folder / split / name, named / f"{name}.tar", above=f"{name}/")
        pack(classes, where / "as downloaded" / f"ILSVRC2012_img_{split}.tar")
    shutil.copytree(folder / "val", where / "a tar and a folder" / "val")
    pack(folder / "train", where / "a tar and a folder" / "train.tar", tarfile.USTAR_FORMAT)
    ways = {path.name: path for path in where.iterdir()}
    return ways | {"one tar": pack(folder, where / "one.tar", tarfile.PAX_FORMAT)}


@pytest.fixture(scope="module")
def ways(tmp_path_factory):
    """Images of two sizes, so that they stay files; in every way."""
    where = tmp_path_factory.mktemp("ways")
    folder = write_folder(where / "a folder", "train", 33, (70, 90))
    return layouts_of(write_folder(folder, "val", 9, (70, 90), start=33), where)


@pytest.fixture
def packed(tmp_path):
    """A tar file with 12 images, in the place of train/."""
    folder = write_folder(tmp_path / "folder", "train", 12, (70, 90))
    return pack(folder / "train", tmp_path / "tars" / "train.tar")


def images_of(source):
    """All of a source's images."""
    return [source.image(i) for i in range(len(source))]


def test_the_same_images_in_every_way(ways):
    """Against the folder: labels, classes, images, and the fingerprint unless names have one folder more."""
    expected = open_data(ways["a folder"])
    for way, data in zip(ways, map(open_data, ways.values())):
        for theirs, ours in zip(expected[:2], data[:2]):
            assert ours.fingerprint() == theirs.fingerprint() or "named" in way
            assert np.array_equal(ours.labels, theirs.labels)
            assert ours.classes == theirs.classes
            assert all(map(torch.equal, images_of(ours), images_of(theirs)))


def test_the_same_weights_after_an_epoch(tmp_path, ways):
    """A worker reads the tar file, this process the folder. An evaluation saves the same names."""
    options = shlex.split("--epochs 1 --knn-every 0 --recipe imagenet --size 32")
    for way, workers in (("a folder", 0), ("as downloaded", 1)):
        more = ["--workers", workers, "--out", tmp_path / way]
        assert here("simsiam.py", ways[way], *TINY, *options, *more) is None
    assert equal(weights_of(tmp_path / "as downloaded"), weights_of(tmp_path / "a folder"))
    assert losses_of(tmp_path / "as downloaded") == losses_of(tmp_path / "a folder")
    checkpoint = tmp_path / "as downloaded" / "checkpoint.pth"
    saved = tmp_path / "saved.npz"
    options = ["--knn", "--workers", 0, "--features", saved]
    assert here("lineval.py", "--ckpt", checkpoint, *options) is None
    names = [name.split(b"/")[-2:] for name in np.load(saved)["train_files"]]
    files = find_data(ways["a folder"]).train.files
    assert names == [bytes(name).split(b"/")[-2:] for name in files]


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_names_of_any_length_in_each_format(tmp_path, form):
    """Of 90 letters, which only extended headers hold, or a prefix; letters beyond ASCII."""
    folder = tmp_path / "folder"
    letters = 45 if form == tarfile.USTAR_FORMAT else 90
    for name, side in (("a", 70), ("b", 80)):
        pixels = torch.full((70, side, 3), side, dtype=torch.uint8)
        save_image(folder / "train" / (name * letters) / f"{'x' * 90}\u00e9.png", pixels)
    pack(folder / "train", tmp_path / "tars" / "train.tar", form)
    expected, data = open_data(folder), open_data(tmp_path / "tars")
    assert data.train.fingerprint() == expected.train.fingerprint()
    assert all(map(torch.equal, images_of(data.train), images_of(expected.train)))


def test_a_flat_validation_tar_has_its_labels_beside_it(tmp_path):
    """As ImageNet's 50,000 are downloaded, with val.txt; against the labels that were written."""
    folder = write_folder(tmp_path / "folder", "train", 12, (70, 90))
    names = [f"ILSVRC2012_val_{i:08}.png" for i in range(4)]
    for name in names:
        save_image(tmp_path / "flat" / name, torch.zeros(70, 90, 3, dtype=torch.uint8))
    data = tmp_path / "data"
    pack(folder / "train", data / "ILSVRC2012_img_train.tar")
    pack(tmp_path / "flat", data / "ILSVRC2012_img_val.tar")
    lines = [f"{name} {label}" for name, label in zip(names, "bcab")]
    (data / "val.txt").write_text("\n".join(lines))
    assert open_data(data).val.labels.tolist() == [1, 2, 0, 1]


def test_members_that_are_no_images_are_counted(tmp_path, packed):
    """Links, a pipe, hidden files, a text. A tar file in a tar file in this one is read too: it is this
    one, as it was."""
    with_member(packed, "a/link.png", type=tarfile.SYMTYPE, linkname="000.png")
    with_member(packed, "a/hard.png", type=tarfile.LNKTYPE, linkname="a/000.png")
    with_member(packed, "a/pipe.png", type=tarfile.FIFOTYPE)
    with_member(packed, "a/._000.png", b"resource fork")
    with_member(packed, "__MACOSX/a/000.png", b"resource fork")
    with_member(packed, "README.txt", b"text")
    with_member(packed, "c.tar", pack(tmp_path / "tars", tmp_path / "deep.tar").read_bytes())
    train, _, found = find_data(packed.parent)
    assert len(train) == 24
    assert found.left_out == {"links and the like in a tar file": 6, "hidden or a system's": 4, ".txt": 2}


def test_a_members_name_is_no_path_on_the_disk(tmp_path, packed, monkeypatch):
    """A DICOM file of its name lies in the shell's folder, and plays no part."""
    with_member(packed, "scan", b"text")
    (tmp_path / "scan").write_bytes(bytes(128) + b"DICM")
    monkeypatch.chdir(tmp_path)
    _, _, found = find_data(packed.parent)
    assert found.left_out == {"without a suffix": 1}


def test_a_folder_and_a_tar_file_of_one_name_in_one_tar(tmp_path, packed):
    """Both are read: they are one class."""
    folder = tmp_path / "more" / "a"
    save_image(folder / "x.png", torch.zeros(70, 90, 3, dtype=torch.uint8))
    with_member(packed, "a.tar", pack(folder, tmp_path / "a.tar").read_bytes())
    assert len(find_data(packed.parent).train) == 13


def test_a_bad_image_in_a_tar_file_is_told_as_in_a_folder(tmp_path):
    """The same file in both: the same words."""
    odd_files(tmp_path / "odd")
    pack(tmp_path / "odd", tmp_path / "odd.tar")
    told = []
    for way in ("odd", "odd.tar"):
        files = find_data(tmp_path / way).train.files
        told.append([told_of(path) for path in files])
    assert told[0] == told[1]
    assert len(set(told[0])) == 4  # three are bad


def told_of(path):
    """What is said of a bad file; None of a good one."""
    try:
        read_image(path)
    except Refused as error:
        return str(error)
    return None


# --- Refused ------------------------------------------------------------------------------------------------

def lie(**claims):
    """Headers that claim a negative size, which would lead back, or a name with a zero byte."""
    info = tarfile.TarInfo("a/x.png")
    info.pax_headers = claims
    return info.tobuf(tarfile.PAX_FORMAT)


def without_end_mark(whole):
    """The last member, filled up to a block, and nothing behind it."""
    members = whole.rstrip(b"\0")
    return members + bytes(-len(members) % tarfile.BLOCKSIZE)


DAMAGES = {  # what happens to the bytes
    "cut in a member": lambda whole: whole[:len(whole) // 2 + 100],
    "without an end mark": without_end_mark,
    "a letter of a name": lambda whole: whole.replace(b"a/003", b"a/\xff03"),
    "a size below 0": lambda whole: whole[:512] + lie(size="-1536") + whole[512:],
    "a zero in a name": lambda whole: whole[:512] + lie(path="a/x\0.png") + whole[512:],
    "empty": lambda whole: b"",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_tar_file_is_refused_in_one_line(packed, damage):
    """Alone, and as a class in another tar file."""
    packed.write_bytes(damage(packed.read_bytes()))
    problem = "train.tar, or a tar file inside it, is damaged, cut off or compressed; copy it again"
    with pytest.raises(Refused, match=problem):
        find_data(packed.parent)
    packed.rename(packed.parent / "n02.tar")
    outer = pack(packed.parent, packed.parent.parent / "outer" / "train.tar")
    with pytest.raises(Refused, match=problem):
        find_data(outer.parent)


@pytest.mark.parametrize("name", ["train.tar", "train.tar.gz"])
def test_a_compressed_tar_file_is_refused_in_one_line(tmp_path, name):
    """Under its own name, and under that of an uncompressed one."""
    tarfile.open(tmp_path / name, "w:gz").close()
    for place in (tmp_path, tmp_path / name):
        with pytest.raises(Refused, match="unpack it"):
            find_data(place)


def test_a_tar_file_beside_the_folder_that_was_unpacked_from_it_is_refused(tmp_path, packed):
    """Its images would count twice."""
    shutil.copytree(tmp_path / "folder" / "train", packed.parent / "train")
    with pytest.raises(Refused, match="train.tar: the folder unpacked from it is there too"):
        find_data(packed.parent)


def test_a_checkpoint_and_a_pipe_are_no_tar_files(tmp_path, packed):
    """Both are counted: the authors' file is called checkpoint_0099.pth.tar; a pipe would block."""
    torch.save({}, packed.parent / "model_best.pth.tar")
    os.mkfifo(tmp_path / "pipe")
    os.symlink(tmp_path / "pipe", packed.parent / "pipe.tar")
    os.symlink(tmp_path / "gone", packed.parent / "gone.tar")
    data = find_data(packed.parent)
    assert len(data.train) == 12
    assert data.found.left_out == {".tar": 1, "links to nothing, or pipes": 2}


def test_a_tar_file_that_has_vanished_is_refused_by_name(packed, monkeypatch):
    """Its images aren't bad. The line says how to go on."""
    monkeypatch.setattr(images, "WAITS", ())
    train = find_data(packed.parent).train
    tars.opened.cache_clear()
    packed.unlink()
    message = r"train.tar: can't be read \(No such file or directory\); DATA is gone"
    with pytest.raises(Refused, match=message):
        train.image(0)


def test_many_tar_files_need_few_descriptors(packed):
    """A class each, a hundred; systems allow a process 256, or 1024."""
    for k in range(100):
        shutil.copy(packed, packed.parent / f"n{k:03}.tar")
    packed.unlink()
    tars.opened.cache_clear()
    before = len(os.listdir("/proc/self/fd"))
    train = find_data(packed.parent).train
    assert len(train) == 1200
    for i in range(0, 1200, 12):
        train.image(i)
    assert len(os.listdir("/proc/self/fd")) <= before + tars.MOST_OPEN
