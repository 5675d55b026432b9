"""harness, tars.py: uncompressed tar files in the place of folders."""
import io
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch

from harness.common.errors import Refused
from harness.data import images, tars, walk
from harness.data.opening import find_data, open_data
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


@pytest.mark.parametrize("way", [pytest.param("a tar a split", marks=slow), "as downloaded"])
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
        "members of a tar file whose names no folder can have": 1,
        "members of a tar file that are no plain files": 1}
    assert data.found.notes[-1] == "text files in a tar file are not read: labels must lie beside it"
    assert torch.equal(data.train.image(0), images.read_image(folder / "train" / "b" / "001.png"))


@slow
def test_a_bad_image_in_a_tar_file_is_named_with_what_it_is(tmp_path):
    """Against the same files in a folder: the list of --check, but for the place."""
    odd_files(tmp_path / "odd")
    os.remove(tmp_path / "odd" / "loop.png")  # a link is no image in a tar file
    pack(tmp_path / "odd", tmp_path / "odd.tar")
    listed = [python(ROOT / "augment.py", tmp_path / name, "--check", cwd=tmp_path)
              for name in ("odd", "odd.tar")]
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
    with pytest.raises(Refused, match="has changed since its index was made; start again"):
        data.train.image(0)
    message = None
    if workers:
        scan = tars.Scan.index

        def changes(self):
            index = scan(self)
            os.utime(self.archive.path, ns=(2, 2))
            return index

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tars.Scan, "index", changes)
            options = [*TINY, "--batch", "4", "--workers", workers, "--out", tmp_path / "run"]
            message = refusal("simsiam.py", packed.parent, *options)
        assert "has changed since its index was made" in message


def test_two_tar_files_joined_by_cat_are_refused(packed):
    """Readers of tar files stop at the first end mark, and would lose the rest."""
    packed.write_bytes(packed.read_bytes() * 2)
    with pytest.raises(Refused, match="something behind its end mark, perhaps another tar file"):
        find_data(packed.parent)


def header(name, size):
    """A header that claims this size, by the base-256 form of GNU's."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


HOSTILE = {  # what a header claims
    "a negative size that leads back": header("a/x.png", -1024),
    "a negative size": header("a/x.png", -100),
    "more than any file has": header("a/x.png", 2 ** 62),
}


@pytest.mark.parametrize("claims", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_refused(packed, claims):
    """At the end, behind good members; nothing loops, and nothing is unpacked."""
    whole = packed.read_bytes().rstrip(b"\0")
    whole += bytes(-len(whole) % 512)
    packed.write_bytes(whole + claims + bytes(1024))
    with pytest.raises(Refused, match="no whole tar file"):
        find_data(packed.parent)
    assert [path.name for path in packed.parent.iterdir()] == ["train.tar"]


def test_endless_extended_headers_are_refused(packed):
    """3,000 of them, each of which announces another."""
    info = tarfile.TarInfo("././@LongLink")
    info.type = tarfile.GNUTYPE_LONGNAME
    info.size = 10
    packed.write_bytes((info.tobuf(tarfile.GNU_FORMAT) + bytes(512)) * 3000 + bytes(1024))
    with pytest.raises(Refused, match="no whole tar file"):
        find_data(packed.parent)


# --- What else is called .tar -------------------------------------------------------------------------------

def test_a_checkpoint_and_a_pipe_are_no_tar_files(tmp_path, packed):
    """Both are counted: the authors' file is called checkpoint_0099.pth.tar; a pipe would block."""
    torch.save({}, packed.parent / "model_best.pth.tar")
    os.mkfifo(tmp_path / "pipe")
    os.symlink(tmp_path / "pipe", packed.parent / "pipe.tar")
    os.symlink(tmp_path / "gone", packed.parent / "gone.tar")
    data = find_data(packed.parent)
    assert len(data.train) == 12
    assert data.found.left_out == {".tar": 3}


def test_a_tar_file_that_cannot_be_read_is_refused_by_name(tmp_path, packed, monkeypatch):
    """Not as a bad image, of which the next one would take the place; also when it has vanished meanwhile."""
    data = find_data(packed.parent)
    data.train.image(0)
    packed.rename(tmp_path / "elsewhere")
    while tars.descriptors:
        os.close(tars.descriptors.popitem()[1])
    with pytest.raises(Refused, match=r"train.tar: can't be read \(No such file or directory\)"):
        data.train.image(0)


def test_two_tar_files_of_one_folder_are_refused(packed):
    """x.tar and x.TAR: a path would have two meanings."""
    shutil.copy(packed, packed.with_suffix(".TAR"))
    with pytest.raises(Refused, match="is there too; rename one"):
        find_data(packed.parent)


def test_tar_files_beside_files_are_said(tmp_path, packed):
    """Images that lie in both would count twice."""
    shutil.copytree(tmp_path / "folder" / "train" / "a", packed.parent / "photos")
    packed.rename(packed.parent / "photos-2012.tar")
    data = find_data(packed.parent)
    assert len(data.train) == 12 + 4
    assert "12 of the images lie in tar files (photos-2012.tar)" in data.found.notes


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


def test_many_tar_files_need_few_descriptors(tmp_path, packed):
    """A class each, a hundred; systems allow a process 256, or 1024."""
    for k in range(100):
        shutil.copy(packed, packed.parent / f"n{k:03}.tar")
    packed.unlink()
    train = find_data(packed.parent).train
    assert len(train) == 1200
    for i in range(0, 1200, 12):
        train.image(i)
    assert len(tars.descriptors) <= tars.MOST_OPEN


# --- The index ----------------------------------------------------------------------------------------------

def scans(monkeypatch):
    """A list that grows whenever an index is made."""
    made = []
    scan = tars.Scan.index

    def counting(self):
        made.append(self.archive.path)
        return scan(self)

    monkeypatch.setattr(tars.Scan, "index", counting)
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
    monkeypatch.setattr(walk, "SUFFIXES", (*walk.SUFFIXES, ".new"))  # another Pillow reads more formats
    find_data(packed.parent, None, keep)
    assert len(made) == 4
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
    """The 240 of ImageNet as they come, in a tar file, against their folder: each image, to the last bit."""
    path = REAL / "imagenet-sample.tar"
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    expected, data = find_data(tmp_path / "unpacked"), find_data(path)
    assert len(data.train) == 240
    assert data.train.fingerprint() == expected.train.fingerprint()
    assert all(torch.equal(data.train.image(i), expected.train.image(i)) for i in range(240))
