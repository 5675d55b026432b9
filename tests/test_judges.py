"""Which images are trained on and which judge: --val, --val-share, several DATA, --knn-data.

harness/data/opening.py, simsiam.py's open_both and lineval.py's open_all.
"""
import glob
import io
import re
import shlex
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import augment
from harness.common.errors import Refused
from harness.data import shapes
from harness.data.captions import hash_of
from harness.data.opening import find_data, open_data
from harness.data.splits import Validation
from tests.helpers import EVALUATION, TINY, here, log_of, refusal, result_of, write_cifar, write_folder
from tests.test_layouts import SIZE, classes, many, plant

pytest_plugins = ["tests.fixtures"]
QUICK = [*TINY, "--epochs", 1, "--workers", 0, "--batch", 4]


def settings_of_run(folder):
    """The settings with which a run started."""
    return log_of(folder)[0]["settings"]


def knn_images(folder):
    """How many images kNN judged in the last epoch."""
    return log_of(folder)[-2]["knn_images"]


def names_below(folder, source):
    """A source's files, named from a folder on."""
    return [name.decode().removeprefix(f"{folder}/") for name in source.names]


# --- The split that judges ----------------------------------------------------------------------------------

def test_val_names_the_folder_that_judges(tmp_path):
    """Of three, against the images that lie there; val/ counts as left out then."""
    plant(tmp_path, classes("train"))
    counts = {"val": 12, "test": 6, "field trip": 3}
    for name, count in counts.items():
        plant(tmp_path, classes(name, count=count // 3))
    for name, count in {None: 12, **counts}.items():
        _, val, found = open_data(tmp_path, wanted=Validation(name and f"./{name}/"))
        assert len(val) == count
        assert all(file.startswith(name or "val") for file in names_below(tmp_path, val))
        assert sum(found.left_out.values()) == 12 + 6 + 3 - count
        assert any("the images beside it are left out" in note for note in found.notes) == (count != 3)


@pytest.mark.parametrize("name, tree", [
    ("nowhere", classes("train") | classes("val")),
    ("test", classes("train") | classes("val") | many("test/{}.png", 3)),   # no labels
    ("train", classes("train") | classes("val")),
    ("a", classes(".", "ab")),
    ("test", many("{}.png", 9)),
])
def test_a_folder_that_cannot_judge_is_refused(tmp_path, name, tree):
    """In one line, by both programs."""
    plant(tmp_path / "data", tree)
    message = f"--val {name}: must be a folder beside train/, with images of its classes"
    assert message in refusal("simsiam.py", tmp_path / "data", *QUICK, "--val", name)
    assert message in refusal("lineval.py", tmp_path / "data", *EVALUATION, "--val", name)


@pytest.mark.parametrize("wanted", [Validation("val"), Validation(None, 0.2)])
def test_the_drawn_shapes_have_a_validation_split_of_their_own(monkeypatch, wanted):
    """No option names another."""
    monkeypatch.setattr(shapes, "TRAINING", 60)
    monkeypatch.setattr(shapes, "VALIDATION", 20)
    with pytest.raises(Refused, match="must be a folder beside train/|needs class folders"):
        open_data(None, wanted=wanted)


def test_an_untrained_network_on_the_drawn_shapes(tmp_path, monkeypatch, capsys):
    """Without DATA: there is no pre-training whose data they could be, so nothing is told of it."""
    monkeypatch.setattr(shapes, "TRAINING", 60)
    monkeypatch.setattr(shapes, "VALIDATION", 20)
    assert here("lineval.py", *EVALUATION, "--knn", "--out", tmp_path) is None
    assert result_of(tmp_path)["val_images"] == 20
    assert capsys.readouterr().err == ""


# --- A share that is held out -------------------------------------------------------------------------------

@pytest.mark.parametrize("share", [0.2, 0.5, 0.03])
def test_a_share_of_each_class_is_held_out(tmp_path, share):
    """To within an image, at random, by the seed; each image is in one split, under its class."""
    sizes = np.array([10, 25, 31])
    for name, count in zip("abc", sizes):
        plant(tmp_path, many(f"set/{name}/{{:02}}.png", count))
    train, val, _ = open_data(tmp_path, wanted=Validation(None, share, 5))
    assert train.classes == val.classes == ["a", "b", "c"]
    counts = np.bincount(val.labels, minlength=3)
    assert np.all(abs(counts - share * sizes) < 1)
    together = sorted(names_below(tmp_path, train) + names_below(tmp_path, val))
    assert together == names_below(tmp_path, find_data(tmp_path).train)
    for source in (train, val):
        assert [name.split("/")[1] for name in names_below(tmp_path, source)] == [
            source.classes[k] for k in source.labels]
    again = open_data(str(tmp_path), wanted=Validation(None, share, 5)).val
    other = open_data(tmp_path, wanted=Validation(None, share, 6)).val
    assert list(again.files) == list(val.files) != list(other.files)


def test_an_evaluation_judges_by_what_pre_training_held_out(tmp_path, capsys):
    """Both on class folders alone, seed 3: the same images as an untrained network's, and as kNN's. Of others
    a line says that pre-training has seen them."""
    data = plant(tmp_path / "data", classes(".", "abc", count=10))
    run = tmp_path / "run"
    options = ["--val-share", "0.2"]
    assert here("simsiam.py", data, *QUICK, *options, "--seed", 3, "--out", run) is None
    assert settings_of_run(run)["images"] == 24
    assert knn_images(run) == 6
    commands = {
        "own data": ["--ckpt", run / "checkpoint.pth", "--seed", 8],
        "data named": [data, "--ckpt", run / "checkpoint.pth", "--seed", 8],
        "share named": [data, *options, "--ckpt", run / "checkpoint.pth", "--seed", 8],
        "untrained": [data, *options, *EVALUATION, "--seed", 3],
    }
    saved = []
    for name, command in commands.items():
        features = tmp_path / f"{name}.npz"
        out = tmp_path / name
        more = ["--knn", "--workers", 0, "--features", features, "--out", out]
        assert here("lineval.py", *command, *more) is None
        assert result_of(out)["val_images"] == 6
        saved.append(np.load(features))
    assert "has seen" not in capsys.readouterr().err
    more = ["--val-share", "0.4", "--knn", "--workers", 0, "--out", tmp_path / "other"]
    assert here("lineval.py", "--ckpt", run / "checkpoint.pth", *more) is None
    assert "pre-training has seen images that judge; for a number on unseen" in capsys.readouterr().err
    expected = open_data(data, wanted=Validation(None, 0.2, 3))
    for found in saved:
        assert list(found["train_files"]) == list(expected.train.files)
        assert list(found["val_files"]) == list(expected.val.files)


def test_an_evaluation_finds_the_data_of_pre_training_from_any_folder(tmp_path, monkeypatch, capsys):
    """Another folder has data of the same name. Images that were added since are told."""
    for name, count in (("here", 6), ("there", 4)):
        plant(tmp_path / name / "data", classes("train") | classes("val", count=count))
    monkeypatch.chdir(tmp_path / "here")
    assert here("simsiam.py", "data", *QUICK, "--out", tmp_path / "run") is None
    monkeypatch.chdir(tmp_path / "there")
    evaluate = ["--ckpt", tmp_path / "run", "--knn", "--workers", 0, "--out"]
    capsys.readouterr()
    assert here("lineval.py", *evaluate, tmp_path / "first") is None
    assert result_of(tmp_path / "first")["val_images"] == 18
    assert capsys.readouterr().err == ""
    plant(tmp_path / "here" / "data", {"train/a/new.png": 1})
    assert here("lineval.py", *evaluate, tmp_path / "second") is None
    assert "its images are not those of pre-training any more" in capsys.readouterr().err


def test_classes_that_nothing_judges_are_told_and_none_loses_its_only_image(tmp_path):
    """A long tail of 10, 4 and 1 images a class, of which a share is held out."""
    for name, count in zip("abc", (10, 4, 1)):
        plant(tmp_path, many(f"{name}/{{}}.png", count))
    for seed in range(5):
        data = open_data(tmp_path, wanted=Validation(None, 0.5, seed))
        assert set(data.train.labels) == {0, 1, 2}
        assert ", of 2 of the classes alone" in data.rows()["data"]
    plant(tmp_path / "c", classes(".", count=1))
    with pytest.raises(Refused, match="--val-share needs class folders, .*, of two images or more"):
        open_data(tmp_path / "c", wanted=Validation(None, 0.5))


def test_a_share_beside_val_leaves_val_alone(tmp_path):
    """The images that judge are from train/; those of val/ count as left out."""
    plant(tmp_path, classes("train", count=10) | classes("val", count=4))
    train, val, found = open_data(tmp_path, wanted=Validation(None, 0.2))
    assert (len(train), len(val)) == (24, 6)
    assert all(name.startswith("train/") for name in names_below(tmp_path, val))
    assert sum(found.left_out.values()) == 12


def test_a_note_names_the_option_and_it_can_be_followed(tmp_path):
    """Class folders alone, one folder further down; and train/ without val/."""
    for name in ("2750", "train"):
        data = plant(tmp_path / f"in {name}", classes(name, count=10))
        train, val, found = open_data(data)
        assert (len(train), val) == (30, None)
        note, = found.notes
        assert "--val-share 0.2 holds out a fifth of each class" in note
        if train.labels is None:
            assert note.startswith("3 folders look like classes (a, b, ...)")
        assert note in refusal("lineval.py", data, *EVALUATION)
        assert len(open_data(data, wanted=Validation(None, 0.2)).val) == 6


NOTES = {  # id: the tree, words of the note, whether a share of each class is advised
    "splits by names of their own": (
        classes("seg_train") | classes("seg_test"),
        "seg_test, seg_train may be splits: name them train/", False),
    "classes in folders of initials": (
        classes("train/a", ("abbey", "airport")) | classes("train/b", ("barn", "beach")),
        "the classes are a, b, ...; the folders in each, such as a/abbey, are not told apart", True),
    "domains, with images/ between": (
        classes("amazon/images", ("bag", "desk")) | classes("dslr/images", ("bag", "desk")),
        "such as amazon/bag, are not told apart", True),
    "masks below a folder": (
        many("VOC2012/JPEGImages/{}.png", 9) | many("VOC2012/SegmentationClass/{}.png", 3), "", False),
    "val/ that leads to train/": (
        classes("train") | {"val": "train"}, "val is not used: links in it lead to training images", False),
    "a class of val/ that leads to train/": (
        classes("train") | classes("val", "ab") | {"val/c": "../train/c"},
        "val is not used: links in it lead to training images", False),
    "img2dataset's parts": (
        classes("train", ("00000", "00001")) | {"train/00000/000.json": b"{}", "train/00001/000.json": b"{}"},
        "00000 is no class, but a shard or a part of the images: no labels", False),
    "folds": (
        classes("fold1") | classes("fold2"), "fold1 is no class, but a shard or a part of the images", False),
    "numbers that are classes": (classes("train", ("00000", "00001")), "no validation split", True),
}


@pytest.mark.parametrize("tree, words, advised", NOTES.values(), ids=NOTES)
def test_what_may_be_no_classes_is_told(tmp_path, tree, words, advised):
    """In a note."""
    notes = "; ".join(open_data(plant(tmp_path, tree)).found.notes)
    assert words in notes
    assert ("holds out a fifth" in notes) == advised


SHARES = {  # id: class folders, what is told if a share of each is held out
    "Market-1501": (
        classes(".", ("bounding_box_train", "bounding_box_test", "query")),
        "bounding_box_train may be splits: name them train/ and val/"),
    "patients": (
        {f"{c}/patient{p:02}_slice{s:02}.png": s for c in "ab" for p in range(5) for s in range(4)},
        "images of one patient, or video (.*/a/patient00_slice...?) judge each other"),
    "frames of videos": (
        {f"{c}/v_{c}_g{g:02}_{s:04}.png": s for c in "ab" for g in range(6) for s in range(4)},
        "one patient, or video"),
    "a name for each class": (
        {f"n0{c}/n0{c}_{i}.png": i for c in range(2) for i in range(9)}, ""),
    "names of their own": ({f"{c}/{hash_of([c, str(i)]):x}.png": i for c in "ab" for i in range(9)}, ""),
}


@pytest.mark.parametrize("tree, words", SHARES.values(), ids=SHARES)
def test_a_share_that_judges_what_is_like_it_is_told(tmp_path, tree, words):
    """In a note; there are labels all the same."""
    train, val, found = open_data(plant(tmp_path, tree), wanted=Validation(None, 0.25))
    assert val.labels is not None
    assert re.search(re.escape(words).replace(re.escape(".*"), ".*"), "; ".join(found.notes))
    assert bool(words) == bool(found.notes)


@pytest.mark.parametrize("side", [16, 70])
def test_copies_that_judge_are_counted(tmp_path, side):
    """Of training images, in memory and as files; and images that val.txt names and nobody has."""
    write_folder(tmp_path, "train", 12, side)
    write_folder(tmp_path, "val", 3, side, start=500)
    for image in sorted(tmp_path.glob("val/*/*.png")) + [tmp_path / "train/b/004.png"]:
        shutil.copy(image, tmp_path / "val" / f"{image.parent.name}.{image.name}")
    for name in "abc":
        shutil.rmtree(tmp_path / "val" / name)
    lines = [f"{path.name} {path.name[0]}\n" for path in tmp_path.glob("val/*.png")]
    (tmp_path / "val.txt").write_text("".join(lines) + "absent.png a\n")
    notes = "; ".join(open_data(tmp_path).found.notes)
    assert "1 of the 4 images that judge are copies of training images" in notes
    assert "1 images in val.txt are not there" in notes


def test_what_another_path_brings_is_not_left_out(tmp_path):
    """The folder beside train/ is named too, by the note's own advice."""
    plant(tmp_path, classes("train", "ab", count=3) | many("unlabeled/{}.png", 5) | many("other/{}.png", 2))
    data = open_data([str(tmp_path / "unlabeled"), str(tmp_path)])
    assert len(data.train) == 6 + 5
    assert +data.found.left_out == {"images in other/": 2}


@pytest.mark.parametrize("options, message", [
    (["--val-share", "20"], "--val-share must be between 0 and 0.5, not 20"),
    (["--val-share", "nan"], "--val-share must be between 0 and 0.5, not nan"),
    (["--val-share", "0.2", "--val", "test"], "not allowed with argument"),
    (["--val-share", "0.2"], "--val-share needs class folders, alone or in train/"),
    (["--mean", "123.7", "116", "104"], "between -10 and 10 (divide what is of 0 to 255 by 255), not 123.7"),
    (["--std", "58.4", "57", "57"], "between 0.001 and 10 (divide what is of 0 to 255 by 255), not 58.4"),
])
def test_a_share_that_cannot_be_held_out_is_refused(tmp_path, options, message):
    """Also of images without classes."""
    data = plant(tmp_path / "data", many("{}.png", 9))
    assert message in refusal("simsiam.py", data, *QUICK, *options)
    assert message in refusal("lineval.py", data, *EVALUATION, *options)


# --- Several DATA, and another one for kNN ------------------------------------------------------------------

def test_several_data_are_trained_on_together(tmp_path, monkeypatch, capsys):
    """Folders, files and a list, options between them, an image twice: no labels; named after the first."""
    plant(tmp_path, classes("A/train", "ab", count=3) | classes("A/val", "ab", count=2))
    plant(tmp_path, many("B/{}.png", 5) | {"B/list.txt": b"0.png\n1.png\n"})
    monkeypatch.chdir(tmp_path)
    files = sorted(glob.glob("B/*.png"))
    assert here("simsiam.py", "A", *files[:2], *QUICK, "B", "B/list.txt") is None
    settings = settings_of_run(tmp_path / "runs" / "A")
    assert settings["images"] == 6 + 5
    assert settings["data"] == str(tmp_path / "A")
    assert settings["more"] == [str(tmp_path / name) for name in (*files[:2], "B", "B/list.txt")]
    printed = " ".join(capsys.readouterr().out.split())
    assert "training images alone: 11 images, no labels" in printed
    assert "left out 5 files: 4 validation images, 1 .txt" in printed


def test_cifar_among_several_is_refused(tmp_path):
    """In one line."""
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    pixels = np.zeros((60, 3, 32, 32), np.uint8)
    write_cifar(tmp_path, pixels, np.zeros(60, np.uint8), 10, names)
    plant(tmp_path, many("B/{}.png", 5))
    message = refusal("simsiam.py", tmp_path / "B", tmp_path / "bin", *QUICK)
    assert "CIFAR and the drawn shapes can't be joined with other images" in message


def advised(message, start):
    """The arguments in a line, from this word on to its end, with the shell's patterns filled in."""
    words = shlex.split(message[message.index(start):])
    return [path for word in words for path in sorted(glob.glob(word)) or [word]]


def test_many_folders_with_a_training_split_each(tmp_path):
    """MVTec's layout: the refusal names a line, which trains on all."""
    tree = {"MVTec AD/license.txt": b"CC"}
    for name in ("bottle", "cable", "capsule"):
        tree |= many(f"MVTec AD/{name}/train/good/{{}}.png", 4)
        tree |= many(f"MVTec AD/{name}/test/broken/{{}}.png", 2)
    root = plant(tmp_path, tree) / "MVTec AD"
    message = refusal("simsiam.py", root, *QUICK)
    assert "several folders in it have a training split: bottle, cable, capsule" in message
    data = advised(message, f"'{root}'/*/")
    assert len(data) == 3
    assert here("simsiam.py", *data, *QUICK, "--out", tmp_path / "run") is None
    assert settings_of_run(tmp_path / "run")["images"] == 12


def test_a_large_folder_without_labels_beside_a_small_one_with_labels(tmp_path):
    """STL-10's layout: a note names a line, by which kNN and lineval.py judge with the labels."""
    root = plant(tmp_path / "STL 10", classes("train", count=4) | classes("test", count=3)
                 | many("unlabeled/{}.png", 17) | many("video/{}.png", 3))
    note = find_data(root).found.notes[0]
    assert "train/ is used as the training split: the images beside it are left out" in note
    run = tmp_path / "run"
    assert here("simsiam.py", *advised(note, f"'{root}/unlabeled'"), *QUICK, "--out", run) is None
    assert settings_of_run(run)["images"] == 20
    assert knn_images(run) == 9
    out = tmp_path / "judged"
    assert here("lineval.py", "--ckpt", run / "checkpoint.pth", "--knn", "--workers", 0, "--out", out) is None
    assert result_of(out)["images"] == 12
    assert result_of(out)["data"] == str(root)


def test_a_folder_beside_train_that_has_no_labels(tmp_path):
    """The line that a note names trains on both."""
    root = plant(tmp_path / "vehicles", many("bus/{}.png", 5) | many("train/{}.png", 6))
    data = advised(find_data(root).found.notes[0], f"{root}/bus")
    assert here("simsiam.py", *data, *QUICK, "--out", tmp_path / "run") is None
    assert settings_of_run(tmp_path / "run")["images"] == 11


def test_knn_watches_a_share_of_another_data_set(tmp_path):
    """The share is held out of that one; without labels it is refused."""
    plant(tmp_path, many("photos/{}.png", 9) | classes("labelled", count=10))
    options = [tmp_path / "photos", *QUICK, "--knn-data", tmp_path / "labelled", "--out", tmp_path / "run"]
    assert "--knn-data" in (message := refusal("simsiam.py", *options))
    assert "needs labels: train/<class>/... and val/<class>/...; 3 folders look like classes" in message
    assert here("simsiam.py", *options, "--val-share", "0.2") is None
    assert settings_of_run(tmp_path / "run")["images"] == 9
    assert knn_images(tmp_path / "run") == 6


def test_a_checkpoint_of_before_these_options_resumes(tmp_path, finished, small):
    """It lacks their settings: nothing has changed."""
    whole = torch.load(finished[0] / "checkpoint.pth", weights_only=True)
    for name in ("val", "val_share", "knn_data", "more"):
        assert whole["settings"].pop(name) is None
    run = tmp_path / "run"
    run.mkdir()
    torch.save(whole, run / "checkpoint.pth")
    (run / "log.jsonl").write_bytes((finished[0] / "log.jsonl").read_bytes())
    assert here("simsiam.py", small, *TINY, "--out", run, "--resume") is None
    assert here("lineval.py", "--ckpt", run / "checkpoint.pth", "--knn") is None
    assert result_of(run / "lineval-knn")["images"] == 50


# --- Containers that are no classes -------------------------------------------------------------------------

def shard(path, first, suffixes, count=4):
    """A tar file as webdataset writes it: KEY.jpg, and KEY with each of these suffixes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for i in range(first, first + count):
            picture = io.BytesIO()
            Image.new("L", SIZE, i).save(picture, "jpeg")
            label = b"%d" % (i % 3)
            parts = {".jpg": picture.getvalue(), **dict.fromkeys(suffixes, label)}
            for suffix, content in parts.items():
                info = tarfile.TarInfo(f"{i:06}{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("suffixes", [(".cls", ), (".cls", ".json"), (".json", ".txt")])
@pytest.mark.parametrize("places", [["train/{:05}.tar", "val/{:05}.tar"], ["{:05}.tar"], ["set-{:05}.tar"]])
def test_a_shard_is_never_a_class(tmp_path, suffixes, places):
    """As training and validation split, or at the top: images without labels, and a line."""
    for place in places:
        for k in range(3):
            shard(tmp_path / place.format(k), 4 * k, suffixes)
    train, val, found = find_data(tmp_path)
    assert len(train) == 12
    assert train.labels is None
    assert val is None
    assert "00000 is no class, but a shard or a part of the images: no labels" in found.notes[0]
    with pytest.raises(Refused, match="--val-share needs class folders.* is no class, but a shard"):
        open_data(tmp_path, wanted=Validation(None, 0.2))


def test_a_class_in_a_tar_file_with_a_text_stays_a_class(tmp_path):
    """With texts beside some images only."""
    folder = write_folder(tmp_path / "folder", "train", 12, (70, 90))
    (folder / "train" / "a" / "README.txt").write_text("the first class")
    (folder / "train" / "a" / "000.txt").write_text("a box")
    for name in "abc":
        with tarfile.open(tmp_path / "folder" / "train" / f"{name}-1.tar", "w") as archive:
            archive.add(folder / "train" / name, ".")
    assert len(find_data(folder).train.classes) == 6


# --- Frames -------------------------------------------------------------------------------------------------

def write_frames(folder, count=12, frames=20):
    """Files of several frames each, in four formats."""
    folder.mkdir()
    first, *others = (Image.new("L", SIZE, 12 * k) for k in range(frames))
    for i in range(count):
        suffix = [".tif", ".gif", ".png", ".webp"][i % 4]
        first.save(folder / f"{i:02}{suffix}", save_all=True, append_images=others)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damage_behind_the_first_frame_is_no_matter(tmp_path):
    """A stack that is cut off."""
    write_frames(tmp_path / "data", count=1)
    whole = (tmp_path / "data" / "00.tif").read_bytes()
    (tmp_path / "data" / "00.tif").write_bytes(whole[:len(whole) // 2])
    assert len(open_data(tmp_path).train) == 1


def test_further_frames_are_counted(tmp_path, monkeypatch, capsys):
    """12 files of 20: 228, by the check of all files and, of a sample, at the start of a run."""
    write_frames(tmp_path / "data")
    monkeypatch.setattr("sys.argv", ["augment.py", str(tmp_path / "data"), "--check"])
    augment.main()
    assert "228 further frames or bands in 12 files are not read\n" in capsys.readouterr().err
    assert here("simsiam.py", tmp_path / "data", *QUICK, "--out", tmp_path / "run") is None
    printed = " ".join(capsys.readouterr().out.split())
    assert "note 228 frames after the first, or bands after the third, are not read (in a sample)" in printed
