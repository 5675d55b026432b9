"""harness/tars.py: uncompressed tar files in the place of folders."""
import io
import os
import pathlib
import shutil
import tarfile

import numpy as np
import pytest
import torch

from harness import images, tars, walk
from harness.data import find_data, open_data
from harness.errors import Refused
from tests.helpers import ROOT, TINY, equal, here, losses_of, odd_files, python, real, refusal, result_of
from tests.helpers import REAL, save_image, slow, weights_of, write_folder

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
def test_the_same_images_in_every_way(tmp_path, ways, way):
    """Against the folder: names, labels, classes, fingerprint, each image; once with a new index, once with
    the one that was kept."""
    expected = open_data(ways["a folder"])
    for _ in range(2):
        data = open_data(ways[way], None, tmp_path)
        for theirs, ours in ((expected.train, data.train), (expected.val, data.val)):
            assert ours.fingerprint() == theirs.fingerprint()
            assert np.array_equal(ours.labels, theirs.labels)
            assert ours.classes == theirs.classes
            assert all(torch.equal(ours.image(i), theirs.image(i)) for i in range(len(theirs)))
    kept = [path.name for path in tmp_path.iterdir()]
    assert len(kept) == {"a folder": 0, "unpacked once": 6, "one tar": 1, "a tar and a folder": 1}.get(way, 2)


@pytest.mark.parametrize("way", ["a tar a split", "as downloaded"])
def test_the_same_weights_after_an_epoch_in_every_way(tmp_path, ways, way):
    """Against the folder: worker processes read both. The evaluation too, and the names that it saves."""
    options = [*TINY, "--epochs", "1", "--recipe", "imagenet", "--size", "32", "--workers", "2"]
    for name, data in (("folder", ways["a folder"]), ("tar", ways[way])):
        assert here("simsiam.py", data, *options, "--out", tmp_path / name) is None
        evaluation = ["--ckpt", tmp_path / name / "checkpoint.pth", "--cached", "--workers", "1"]
        assert here("lineval.py", *evaluation, "--features", tmp_path / f"{name}.npz") is None
    assert equal(weights_of(tmp_path / "tar"), weights_of(tmp_path / "folder"))
    assert losses_of(tmp_path / "tar") == losses_of(tmp_path / "folder")
    results = [result_of(tmp_path / name / "lineval-cached") for name in ("tar", "folder")]
    assert results[0]["top1"] == results[1]["top1"]
    saved = [np.load(tmp_path / f"{name}.npz") for name in ("tar", "folder")]
    assert np.array_equal(saved[0]["train_features"], saved[1]["train_features"])
    above = [os.path.commonpath(list(file["train_files"])) for file in saved]
    assert [n[len(above[0]):] for n in saved[0]["train_files"]] == [
        n[len(above[1]):] for n in saved[1]["train_files"]]
    assert sorted(tmp_path.glob("index-of-*.npz"))  # beside the run folders


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
    """A link, a hidden file, a name that leads out, a text; of two members of one name the last counts."""
    folder = write_folder(tmp_path / "folder", "train", 12, (70, 90))
    path = pack(folder / "train", tmp_path / "tars" / "train.tar")
    with_member(path, "a/link.png", type=tarfile.SYMTYPE, linkname="000.png")
    with_member(path, "a/hard.png", type=tarfile.LNKTYPE, linkname="a/000.png")
    with_member(path, "a/._000.png", b"resource fork")
    with_member(path, "__MACOSX/a/000.png", b"resource fork")
    with_member(path, "../../out.png", b"x")
    with_member(path, "a/pipe.png", type=tarfile.FIFOTYPE)
    with_member(path, "README.txt", b"text")
    with_member(path, "a/000.png", (folder / "train" / "b" / "001.png").read_bytes())
    data = find_data(path.parent)
    assert len(data.train) == 12
    assert data.found.left_out == {
        "links in a tar file": 2, "hidden or a system's": 2, ".txt": 1,
        "members whose names lead out of the tar file": 1,
        "members of a tar file that are no plain files": 1}
    assert torch.equal(data.train.image(0), images.read_image(folder / "train" / "b" / "001.png"))


def test_a_bad_image_in_a_tar_file_is_named_with_what_it_is(tmp_path):
    """Against the same files in a folder: the list of --check, but for the place."""
    odd_files(tmp_path / "odd")
    os.remove(tmp_path / "odd" / "loop.png")  # a link is no image in a tar file
    pack(tmp_path / "odd", tmp_path / "odd.tar")
    listed = [python(ROOT / "augment.py", tmp_path / name, "--check") for name in ("odd", "odd.tar")]
    assert listed[0].stdout.count("\n") == 6
    assert listed[1].stdout == listed[0].stdout
    assert "6 of 17 image files are bad" in listed[1].stderr


# --- Refused ------------------------------------------------------------------------------------------------

@pytest.fixture
def packed(tmp_path):
    """A tar file with 12 images, in the place of train/."""
    folder = write_folder(tmp_path / "folder", "train", 12, (70, 90))
    return pack(folder / "train", tmp_path / "tars" / "train.tar")


DAMAGES = {  # what happens to the bytes
    "cut in a member": lambda whole: whole[:len(whole) // 2 + 100],
    "cut in a header": lambda whole: whole[:tarfile.BLOCKSIZE // 2],
    "without an end mark": lambda whole: whole.rstrip(b"\0") + bytes(-len(whole.rstrip(b"\0")) % 512),
    "a letter of a name": lambda whole: whole.replace(b"a/003", b"a/\xff03"),
    "empty": lambda whole: b"",
    "text": lambda whole: b"no tar file" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_tar_file_is_refused_in_one_line(tmp_path, packed, damage):
    """No index is kept of it."""
    packed.write_bytes(damage(packed.read_bytes()))
    message = refusal("simsiam.py", packed.parent, *TINY, "--out", tmp_path / "runs" / "run")
    assert f"{packed}: no whole tar file" in message
    assert "copy it again" in message
    assert not (tmp_path / "runs").exists()


def test_a_damaged_tar_file_within_one_is_refused(tmp_path, packed):
    """The class is named."""
    (tmp_path / "classes").mkdir()
    (tmp_path / "classes" / "n01.tar").write_bytes(packed.read_bytes())
    (tmp_path / "classes" / "n02.tar").write_bytes(packed.read_bytes()[:3000])
    outer = pack(tmp_path / "classes", tmp_path / "outer" / "train.tar")
    with pytest.raises(Refused, match=r"train.tar, n02.tar in it: no whole tar file"):
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


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tar_file_that_changes_ends_the_run_in_one_line(tmp_path, packed, workers):
    """After its index was made: a process that opens it then finds another one."""
    data = open_data(packed.parent)
    os.utime(packed, ns=(1, 1))
    tars.descriptors.clear()
    with pytest.raises(Refused, match="has changed since its index was made; start again"):
        data.train.image(0)
    message = None
    if workers:
        scan = tars.scan

        def changes(archive, is_wanted):
            index = scan(archive, is_wanted)
            os.utime(archive.path, ns=(2, 2))
            return index

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tars, "scan", changes)
            options = [*TINY, "--batch", "4", "--workers", workers, "--out", tmp_path / "run"]
            message = refusal("simsiam.py", packed.parent, *options)
        assert "has changed since its index was made" in message


# --- The index ----------------------------------------------------------------------------------------------

def scans(monkeypatch):
    """A list that grows whenever an index is made."""
    made = []
    scan = tars.scan

    def counting(archive, is_wanted):
        made.append(archive.path)
        return scan(archive, is_wanted)

    monkeypatch.setattr(tars, "scan", counting)
    return made


def test_an_index_is_made_once_and_again_when_the_file_has_changed(tmp_path, packed, monkeypatch):
    """By size and time; a damaged index is made again; so is one of another tar file of this name."""
    made = scans(monkeypatch)
    keep = tmp_path / "keep"
    for _ in range(2):
        assert len(find_data(packed.parent, None, keep).train) == 12
    assert len(made) == 1
    with_member(packed, "c/new.png", (tmp_path / "folder/train/a/000.png").read_bytes())
    for _ in range(2):
        assert len(find_data(packed.parent, None, keep).train) == 13
    assert len(made) == 2
    os.utime(packed, ns=(5, 5))
    find_data(packed.parent, None, keep)
    assert len(made) == 3
    kept, = keep.iterdir()
    whole = kept.read_bytes()
    for place in range(0, len(whole), 97):
        kept.write_bytes(whole[:place] + b"\xff" + whole[place + 1:])
        assert len(find_data(packed.parent, None, keep).train) == 13
    shutil.copytree(packed.parent, tmp_path / "other")
    find_data(tmp_path / "other", None, keep)
    assert len(list(keep.iterdir())) == 2


@pytest.mark.parametrize("keep", ["data", "data/runs", "data/../data"])
def test_no_index_is_written_below_data(tmp_path, packed, monkeypatch, keep):
    """Whatever the folder is called."""
    shutil.move(packed.parent, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    find_data("data", None, keep)
    find_data(tmp_path / "data", None, keep)
    assert [path.name for path in (tmp_path / "data").rglob("*")] == ["train.tar"]


def test_a_folder_that_cannot_be_written_to_keeps_no_index(tmp_path, packed):
    """That is no reason to end."""
    (tmp_path / "file").write_text("in the way")
    assert len(find_data(packed.parent, None, tmp_path / "file").train) == 12


def test_only_one_of_several_processes_writes_the_index(tmp_path, packed, monkeypatch):
    """The first."""
    monkeypatch.setenv("RANK", "1")
    find_data(packed.parent, None, tmp_path / "keep")
    assert not (tmp_path / "keep").exists()
    monkeypatch.setenv("RANK", "0")
    find_data(packed.parent, None, tmp_path / "keep")
    assert (tmp_path / "keep").exists()


def test_a_long_index_says_how_far_it_is(packed, monkeypatch, capsys):
    """Every so many seconds, in members and percent."""
    with_member(packed, "padding.txt", bytes(10))
    monkeypatch.setattr(tars, "LINES", -1)
    with tarfile.open(packed, "a") as archive:
        for i in range(1000):
            archive.addfile(tarfile.TarInfo(f"{i}.txt"))
    tars.index_of(os.fsencode(packed), None, walk.why_no_image)
    said = capsys.readouterr().err
    assert said.startswith(f"{packed}: index of 1,000 members, ")
    assert said.endswith("% of the file\n")


@slow
@real
def test_real_photographs_in_a_tar_file(tmp_path):
    """The 240 of ImageNet against their folder: each image, to the last bit."""
    folder = pathlib.Path(REAL) / "imagenet-sample"
    path = pack(folder, tmp_path / "photos.tar")
    expected, data = find_data(folder), find_data(path)
    assert data.train.fingerprint() == expected.train.fingerprint()
    assert all(torch.equal(data.train.image(i), expected.train.image(i)) for i in range(len(expected.train)))
