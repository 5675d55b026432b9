"""harness/data, tars.py: uncompressed tar files in the place of folders, against Python's tarfile."""
import io
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch

from harness.common.errors import Refused
from harness.data import tars
from harness.data.images import read_image
from harness.data.opening import find_data, open_data
from tests.helpers import TINY, equal, here, losses_of, odd_files, save_image, weights_of, write_folder

pytest_plugins = ["tests.fixtures"]
FORMATS = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}


def pack(folder, path, form=tarfile.GNU_FORMAT):
    """A tar file of what lies in a folder, named from there on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name in sorted(os.listdir(folder)):
            archive.add(folder / name, name)
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
    ways = {"a folder": folder}
    for split in ("train", "val"):
        pack(folder / split, where / "a tar a split" / f"{split}.tar")
        for name in os.listdir(folder / split):
            pack(folder / split / name, where / "unpacked once" / split / f"{name}.tar")
            pack(folder / split / name, where / "classes" / split / f"{name}.tar")
        pack(where / "classes" / split, where / "as downloaded" / f"ILSVRC2012_img_{split}.tar")
    for name in ("a tar a split", "unpacked once", "as downloaded"):
        ways[name] = where / name
    ways["one tar"] = pack(folder, where / "one.tar", tarfile.PAX_FORMAT)
    shutil.copytree(folder / "val", where / "mixed" / "val")
    pack(folder / "train", where / "mixed" / "train.tar", tarfile.USTAR_FORMAT)
    return ways | {"a tar and a folder": where / "mixed"}


@pytest.fixture(scope="module")
def ways(tmp_path_factory):
    """Images of two sizes, so that they stay files; in every way."""
    where = tmp_path_factory.mktemp("ways")
    folder = write_folder(where / "folder", "train", 33, (70, 90))
    return layouts_of(write_folder(folder, "val", 9, (70, 90), start=33), where)


WAYS = ["a folder", "a tar a split", "unpacked once", "as downloaded", "one tar", "a tar and a folder"]


@pytest.mark.parametrize("way", WAYS)
def test_the_same_images_in_every_way(ways, way):
    """Against the folder: names, labels, classes, fingerprint, each image."""
    expected, data = open_data(ways["a folder"]), open_data(ways[way])
    for theirs, ours in ((expected.train, data.train), (expected.val, data.val)):
        assert ours.fingerprint() == theirs.fingerprint()
        assert np.array_equal(ours.labels, theirs.labels)
        assert ours.classes == theirs.classes
        assert all(torch.equal(ours.image(i), theirs.image(i)) for i in range(len(theirs)))


def test_the_same_weights_after_an_epoch(tmp_path, ways):
    """Against the folder: worker processes read both. The evaluation too, and the names that it saves."""
    options = [*TINY, "--epochs", "1", "--recipe", "imagenet", "--size", "32", "--workers", "2"]
    saved = []
    for way in ("a folder", "as downloaded"):
        out = tmp_path / way
        assert here("simsiam.py", ways[way], *options, "--out", out) is None
        evaluation = ["--ckpt", out / "checkpoint.pth", "--knn", "--workers", "1"]
        assert here("lineval.py", *evaluation, "--features", tmp_path / f"{way}.npz") is None
        saved.append(np.load(tmp_path / f"{way}.npz"))
    assert equal(weights_of(tmp_path / "as downloaded"), weights_of(tmp_path / "a folder"))
    assert losses_of(tmp_path / "as downloaded") == losses_of(tmp_path / "a folder")
    assert np.array_equal(saved[0]["train_features"], saved[1]["train_features"])
    names = [[name.split(b"/")[-2:] for name in file["train_files"]] for file in saved]
    assert names[0] == names[1]


def test_small_images_of_one_size_are_held_in_memory(tmp_path):
    """Against the folder's pixels."""
    folder = write_folder(tmp_path / "folder", "train", 12, 20)
    path = pack(folder / "train", tmp_path / "tars" / "train.tar")
    assert torch.equal(open_data(path.parent).train.pixels, open_data(folder).train.pixels)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_names_of_any_length_in_each_format(tmp_path, form):
    """Of 90 letters, which only extended headers hold, or a prefix; letters beyond ASCII."""
    folder = tmp_path / "folder"
    for i in range(6):
        letters = 45 if form == tarfile.USTAR_FORMAT else 90
        name = f"{'ab'[i % 2] * letters}/{'x' * 90}\u00e9{i}.png"
        save_image(folder / "train" / name, torch.full((70, 80 + i, 3), 9 * i, dtype=torch.uint8))
    pack(folder / "train", tmp_path / "tars" / "train.tar", form)
    expected, data = open_data(folder), open_data(tmp_path / "tars")
    assert data.train.fingerprint() == expected.train.fingerprint()
    assert all(torch.equal(data.train.image(i), expected.train.image(i)) for i in range(6))


def test_a_flat_validation_tar_has_its_labels_beside_it(tmp_path):
    """As ImageNet's 50,000 are downloaded, with val.txt; against the labels that were written."""
    folder = write_folder(tmp_path / "folder", "train", 12, (70, 90))
    (tmp_path / "flat").mkdir()
    lines = []
    for i, source in enumerate(sorted((folder / "train").rglob("*.png"))[:8]):
        shutil.copy(source, tmp_path / "flat" / f"ILSVRC2012_val_{i:08}.png")
        lines.append(f"ILSVRC2012_val_{i:08}.png {source.parent.name}")
    data = tmp_path / "data"
    pack(folder / "train", data / "ILSVRC2012_img_train.tar")
    pack(tmp_path / "flat", data / "ILSVRC2012_img_val.tar")
    (data / "val.txt").write_text("\n".join(lines))
    val = open_data(data).val
    assert [val.classes[k] for k in val.labels] == [line.split()[1] for line in lines]


def test_members_that_are_no_images_are_counted(tmp_path):
    """Links, a pipe, hidden files, a text, a tar file in a tar file in this one."""
    folder = write_folder(tmp_path / "folder", "train", 12, (70, 90))
    path = pack(folder / "train", tmp_path / "tars" / "train.tar")
    with_member(path, "a/link.png", type=tarfile.SYMTYPE, linkname="000.png")
    with_member(path, "a/hard.png", type=tarfile.LNKTYPE, linkname="a/000.png")
    with_member(path, "a/pipe.png", type=tarfile.FIFOTYPE)
    with_member(path, "a/._000.png", b"resource fork")
    with_member(path, "__MACOSX/a/000.png", b"resource fork")
    with_member(path, "README.txt", b"text")
    with_member(path, "c.tar", pack(tmp_path / "tars", tmp_path / "deep.tar").read_bytes())
    train, _, found = find_data(path.parent)
    assert len(train) == 12
    assert found.left_out == {
        "links and the like in a tar file": 3, "hidden or a system's": 2, ".tar": 1,
        ".txt in a tar file, where labels are not read: they must lie beside it": 1}


def test_a_bad_image_in_a_tar_file_is_told_as_in_a_folder(tmp_path):
    """The same file in both: the same words."""
    odd_files(tmp_path / "odd")
    (tmp_path / "odd" / "loop.png").unlink()  # a link is no image in a tar file
    pack(tmp_path / "odd", tmp_path / "odd.tar")
    told = []
    for way in ("odd", "odd.tar"):
        files = find_data(tmp_path / way).train.files
        told.append([told_of(path) for path in files])
    assert told[0] == told[1]
    assert len(set(told[0])) == 7  # six are bad


def told_of(path):
    """What is said of a bad file; None of a good one."""
    try:
        read_image(path)
    except Refused as error:
        return str(error)
    return None


# --- Refused ------------------------------------------------------------------------------------------------

@pytest.fixture
def packed(tmp_path):
    """A tar file with 12 images, in the place of train/."""
    folder = write_folder(tmp_path / "folder", "train", 12, (70, 90))
    return pack(folder / "train", tmp_path / "tars" / "train.tar")


def negative():
    """Headers that claim a negative size, which would lead back."""
    info = tarfile.TarInfo("a/x.png")
    info.pax_headers = {"size": "-1536"}
    return info.tobuf(tarfile.PAX_FORMAT)


DAMAGES = {  # what happens to the bytes
    "cut in a member": lambda whole: whole[:len(whole) // 2 + 100],
    "cut in a header": lambda whole: whole[:tarfile.BLOCKSIZE // 2],
    "without an end mark": lambda whole: whole.rstrip(b"\0") + bytes(-len(whole.rstrip(b"\0")) % 512),
    "a letter of a name": lambda whole: whole.replace(b"a/003", b"a/\xff03"),
    "a size below 0": lambda whole: whole[:512] + negative() + whole[512:],
    "empty": lambda whole: b"",
    "text": lambda whole: b"no tar file" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_tar_file_is_refused_in_one_line(packed, damage):
    """Alone, and as a class in another tar file, whose line names it too."""
    packed.write_bytes(damage(packed.read_bytes()))
    with pytest.raises(Refused, match=r"train.tar: no whole tar file .*; copy it again"):
        find_data(packed.parent)
    packed.rename(packed.parent / "n02.tar")
    outer = pack(packed.parent, packed.parent.parent / "outer" / "train.tar")
    with pytest.raises(Refused, match=r"train.tar, n02.tar in it: no whole tar file .*; copy it again"):
        find_data(outer.parent)


@pytest.mark.parametrize("how", ["gz", "bz2", "xz"])
def test_a_compressed_tar_file_is_refused_in_one_line(tmp_path, packed, how):
    """Under its own name, and under that of an uncompressed one."""
    for name in ("train.tar", f"train.tar.{how}"):
        folder = tmp_path / f"{how} {name}"
        folder.mkdir()
        with tarfile.open(folder / name, f"w:{how}") as archive:
            archive.add(tmp_path / "folder" / "train" / "a", "a")
        with pytest.raises(Refused, match="unpack it"):
            find_data(folder)
        with pytest.raises(Refused, match="unpack it"):
            find_data(folder / name)


def test_a_tar_file_beside_the_folder_that_was_unpacked_from_it_is_refused(tmp_path, packed):
    """Its images would count twice."""
    shutil.copytree(tmp_path / "folder" / "train", packed.parent / "train")
    with pytest.raises(Refused, match=r"train/ is there too, perhaps unpacked from it"):
        find_data(packed.parent)


def test_a_checkpoint_and_a_pipe_are_no_tar_files(tmp_path, packed):
    """Both are counted: the authors' file is called checkpoint_0099.pth.tar; a pipe would block."""
    torch.save({}, packed.parent / "model_best.pth.tar")
    os.mkfifo(tmp_path / "pipe")
    os.symlink(tmp_path / "pipe", packed.parent / "pipe.tar")
    os.symlink(tmp_path / "gone", packed.parent / "gone.tar")
    data = find_data(packed.parent)
    assert len(data.train) == 12
    assert data.found.left_out == {".tar": 3}


def test_a_tar_file_that_has_vanished_is_refused_by_name(packed):
    """Not as a bad image, of which the next one would take the place."""
    train = find_data(packed.parent).train
    tars.opened.cache_clear()
    packed.unlink()
    with pytest.raises(Refused, match=r"train.tar: can't be read \(No such file or directory\)"):
        train.image(0)


def test_a_folder_of_its_own_name_in_a_tar_file_is_no_level(tmp_path, packed):
    """As `tar cf train.tar train` makes it; in a tar file of a class too."""
    folder = tmp_path / "folder" / "train"
    expected = find_data(packed.parent).train
    for name in "abc":
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            archive.add(folder / name, name)
    nested, plain = tmp_path / "nested", tmp_path / "plain"
    nested.mkdir()
    plain.mkdir()
    with tarfile.open(plain / "train.tar", "w") as archive:
        archive.add(folder, "train")
    with tarfile.open(nested / "train.tar", "w") as archive:
        for name in "abc":
            archive.add(tmp_path / f"{name}.tar", f"train/{name}.tar")
    for way in (plain, nested):
        train = find_data(way).train
        assert train.fingerprint() == expected.fingerprint()
        assert torch.equal(train.image(7), expected.image(7))


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
