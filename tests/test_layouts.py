"""harness/data, the tree of files: every file below DATA is used, or counted with a reason.

Each tree is a table: {path: what lies there}. A picture is drawn as a level of grey; all else is bytes.
"""
import itertools
import os
import pickle
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from harness.common.errors import Refused
from harness.common.files import save_picture
from harness.data import walk
from harness.data.opening import Data, find_data, open_data
from harness.data.splits import Validation
from tests.children import ROOT
from tests.helpers import TINY, here, log_of, refusal, write_folder

pytest_plugins = ["tests.fixtures"]

SIZE = (70, 72)  # too large to be held in memory
OURS = "a picture that one of our programs drew"
PIPE = "a pipe"


def plant(folder, tree):
    """Write a tree of files. A number is a picture of this level, OURS one with our mark, other text where a
    link leads, PIPE a pipe, None an empty folder."""
    for name, content in tree.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir(parents=True)
        elif content == OURS:
            save_picture(Image.new("L", SIZE), path)
        elif content == PIPE:
            os.mkfifo(path)
        elif isinstance(content, str):
            os.symlink(content, path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            image = Image.new("L", SIZE, content)
            image.putdata(os.fsencode(name)[-SIZE[0]:])  # which makes it one of a kind
            image.save(path)
    return folder


def each(names):
    """{name: level} of a picture for each of these names."""
    return dict.fromkeys(names.split(), 77)


def many(pattern, count):
    """{name: level} of `count` pictures; the pattern has one place for the number."""
    return {pattern.format(i): i for i in range(count)}


def classes(split, names="abc", count=8, suffix=".png"):
    """A split with class folders."""
    tree = {}
    for name in names:
        tree |= many(f"{split}/{name}/{{:03}}{suffix}", count)
    return tree


WITH_VAL = classes("train") | classes("val", count=4)
CASES = {  # id: the tree, what it gives, what is left out, a part of the notes
    "classes": (WITH_VAL, "24 images, 3 classes, 12 to validate", "", ""),
    "what systems and tools leave behind": (
        WITH_VAL | {"train/a/._000.png": bytes(100), "__MACOSX/train/a/1.png": b"", "train/.cache": None,
                    "train/a/Thumbs.db": b"", "val/a/@eaDir/x.jpg": 3, "val/__pycache__": None}
        | many("train/.git/objects/{}.png", 5),
        "24 images, 3 classes, 12 to validate", "9 files: 9 hidden or a system's", ""),
    "formats": (each("a.JPG b.avif c.jfif d.gif x/e.jp2 f.tga g.pcx h.dib"), "8 images", "", ""),
    "other files": (
        many("{}.jpg", 9) | {"a.heic": b"", "b.heic": b"", "c.txt": b"0.jpg", "README": b"", "m.zip": b""},
        "9 images", "5 files: 2 .heic, 1 .txt, 1 .zip, 1 without a suffix", ""),
    "a folder without images is no class": (
        classes("train") | {"train/d": None, "train/e/notes.txt": b""},
        "24 images, 3 classes", "1 file: 1 .txt", ""),
    "Training and Testing": (
        classes("Training") | classes("Testing", count=4),
        "24 images, 3 classes, 12 to validate", "", ""),
    "train2017 and val2017": (
        many("train2017/{}.jpg", 8) | many("val2017/{}.jpg", 4),
        "8 images", "4 files: 4 images in val2017/",
        "val2017/ is not used: the training images have no labels"),
    "ILSVRC's root": (
        classes("ILSVRC/Data/CLS-LOC/train") | classes("ILSVRC/Data/CLS-LOC/val", count=4)
        | many("ILSVRC/Data/CLS-LOC/test/{}.JPEG", 5)
        | {"ILSVRC/Annotations/CLS-LOC/train/a/1.xml": b"<a/>", "logo.png": 1},
        "24 images, 3 classes, 12 to validate",
        "7 files: 5 images in ILSVRC/Data/, 1 .xml, 1 images beside them", ""),
    "YOLO": (
        many("train/images/{}.jpg", 8) | {f"train/labels/{i}.txt": b"0 .5" for i in range(8)},
        "8 images", "8 files: 8 .txt", ""),
    "images beside their masks": (
        many("train/images/{}.jpg", 8) | many("train/masks/{}.png", 8),
        "8 images", "8 files: 8 images in train/masks/", ""),
    "one class": (
        classes("train", "a") | classes("val", "a"),
        "8 images", "8 files: 8 images in val/a/", "one class (a): nothing to classify"),
    "val goes before test": (
        WITH_VAL | classes("test", count=2),
        "24 images, 3 classes, 12 to validate",
        "6 files: 2 images in test/a/, 2 images in test/b/, 2 images in test/c/", ""),
    "a flat val": (
        classes("train") | many("val/{}.png", 5),
        "24 images, 3 classes", "5 files: 5 images in val/",
        "val/ is not used: without class folders, it needs a val.txt"),
    "strays": (
        WITH_VAL | {"train/x.png": 1, "val/y.png": 2},
        "24 images, 3 classes, 12 to validate", "2 files: 1 images in train/, 1 images in val/", ""),
    "images as a class": (classes("train", ["a", "b", "images"]), "24 images, 3 classes", "", ""),
    "a folder of trains": (
        many("bus/{}.png", 5) | many("train/{}.png", 6),
        "6 images", "5 files: 5 images in bus/", "train/ is used as the training split"),
    "an unused val of many classes": (
        classes("train") | classes("val", "defghijk", count=2),
        "24 images, 3 classes", "16 files: 16 images in val/", "val/ is not used: d is not a class"),
    "a class that train lacks": (
        classes("train") | classes("val", count=4) | {"val/z/0.png": 1},
        "24 images, 3 classes, 12 to validate", "1 file: 1 images in val/z/", ""),
    "a class in two forms of Unicode": (
        classes("train", ["caf\u00e9", "b"]) | classes("val", ["cafe\u0301", "b"], count=3),
        "16 images, 2 classes, 6 to validate", "", ""),
    "splits without train": (
        many("a/{}.png", 5) | many("test/{}.png", 3),
        "8 images", "", "no train/ there: the images in test/ are trained on too"),
    "Tiny-ImageNet": (
        {f"train/n0{k}/images/n0{k}_{i}.JPEG": i for k in range(3) for i in range(4)}
        | {f"train/n0{k}/n0{k}_boxes.txt": b"" for k in range(3)}
        | many("val/images/val_{}.JPEG", 3)
        | {"val/val_annotations.txt": b"val_0.JPEG\tn02\t0\t1\t2\t3\nval_1.JPEG\tn00\t0\t0\t1\t1\n"},
        "12 images, 3 classes, 2 to validate", "4 files: 3 .txt, 1 images in val/images/", ""),
    "ImageNet's 50,000 with numbers": (
        classes("train") | many("val/ILSVRC2012_val_{:08}.JPEG", 3)
        | {"val.txt": b"ILSVRC2012_val_00000000.JPEG 0\nILSVRC2012_val_00000002.JPEG 1\n"},
        "24 images, 3 classes, 2 to validate", "1 file: 1 images in val/", ""),
    "runs among the classes, and a curve of somebody else": (
        WITH_VAL | {"train/run/views.png": OURS, "train/run/log.jsonl": b"{}", "train/a/curves.png": 8},
        "25 images, 3 classes, 12 to validate", "2 files: 1 .jsonl, 1 pictures that our programs drew",
        ""),
    "torchvision's CIFAR-10 beside classes": (
        WITH_VAL | {"cifar-10-batches-py/data_batch_1": b""},
        "24 images, 3 classes, 12 to validate", "1 file: 1 without a suffix",
        "CIFAR is there too, and left out; name its folder to use it"),
    "COCO's two training splits": (
        many("train2014/{}.png", 2) | many("train2017/{}.png", 3),
        "2 images", "3 files: 3 images in train2017/",
        "train2014/ is used as the training split: the images beside it are left out"),
    "links to images beside them, and in another folder": (
        many("{}.png", 4) | {"l.png": "1.png", "more/2.png": "../2.png", "twice.png": "more/2.png"},
        "7 images", "", "3 training images are there twice, by links"),
    "a pipe, which would be read for ever, and dead links": (
        many("{}.png", 4) | {"pipe.png": PIPE, "gone.png": "nowhere", "loop.png": "loop.png"},
        "4 images", "3 files: 3 links to nothing, or pipes", ""),
    "DataLad's files that are not fetched": (
        many("{}.png", 4) | {f"more/{i}.png": f"../.git/annex/objects/{i}" for i in range(30)},
        "4 images", "30 files: 30 links to nothing: datalad get", ""),
    "two class folders that are links to one": (
        classes("train", "a") | many("elsewhere/{}.png", 5)
        | {"train/b": "../elsewhere", "train/c": "../elsewhere"},
        "18 images, 3 classes", "5 files: 5 images in elsewhere/", "train/ is used as the training split"),
    "photos at any depth, a link back, and one to the folder around": (
        many("2019/deep/{}.png", 3) | {"B.JPG": 1, "2019/deep/loop": "../..", "up": ".."},
        "4 images", "", ""),
    "a link below a link": (
        many("disk/{}.png", 3) | many("other/deep/{}.png", 5) | {"disk/more": "../other", "link": "disk"},
        "16 images", "5 files: 5 behind links below links", "3 folders look like classes"),
    "links from each class to all others": (
        classes("train", "abcdefg", 1)
        | {f"train/{a}/{b}": f"../{b}" for a, b in itertools.permutations("abcdefg", 2)},
        "49 images, 7 classes", "252 files: 252 behind links below links",
        "42 training images are there twice"),
    "parts": (
        many("train/part-000/{}.png", 3) | many("train/part-001/{}.png", 3) | classes("val", "ab"),
        "6 images", "16 files: 8 images in val/a/, 8 images in val/b/", "part-000 is no class, but a shard"),
}


def counted(train, val):
    """What there is of both splits, in words."""
    words = [f"{len(train)} images"]
    if train.classes:
        words.append(f"{len(train.classes)} classes")
    if val:
        words.append(f"{len(val)} to validate")
    return ", ".join(words)


@pytest.mark.parametrize("case", CASES)
def test_every_file_is_used_or_counted(tmp_path, case):
    """Images, classes, what is left out and what is said, against the table."""
    tree, gives, left_out, note = CASES[case]
    train, val, found = find_data(plant(tmp_path, tree))
    assert counted(train, val) == gives
    assert (walk.describe(found.left_out) or "") == left_out
    assert note in "; ".join(found.notes)
    if not note:
        assert all(note.startswith("no validation split (val/ with images): --val") for note in found.notes)


LABELS = [  # classes, a text file beside three images of val/, their labels; None: val/ is not used
    ("abc", b"val/0.png\tc\t1\t2\n\nval/1.png\ta\nval/2.png\tb\n", [2, 0, 1]),  # a box behind the class
    ("abc", b"0.png 2\r\n1.png 0\r\n2.png 1\r\n", [2, 0, 1]),
    ("abc", b"\xef\xbb\xbf0.png c\n1.png a\n2.png b\n", [2, 0, 1]),               # Windows' byte order mark
    (["1", "2", "10"], b"0.png 2\n1.png 10\n", [2, 1]),                            # names, sorted as text
    (["00000", "00001", "00002"], b"0.png 2\n1.png 0\n2.png 1\n", [2, 0, 1]),      # GTSRB's
    ("abc", b"0.png 1\n1.png 2\n2.png 1\n", None),                                # from 1 on
    (["1", "2", "10"], b"0.png 0\n1.png 1\n2.png 2\n", None),                      # numbers, or names?
    ("abc", b"0.png a\n1.png 2\n2.png c\n", None),                                # names and numbers mixed
    ("abc", b"8.png a\n", None),
    ("abc", b"0.png c\n1.png zebra\n2.png b\n", [2, 1]),                          # a class that train/ lacks
]


@pytest.mark.parametrize("names, lines, labels", LABELS)
def test_labels_beside_a_flat_val(tmp_path, names, lines, labels):
    """Against those by hand. What could mean something else is not guessed: the file counts as left out."""
    plant(tmp_path, classes("train", names) | many("val/{}.png", 3) | {"val.txt": lines})
    _, val, found = find_data(tmp_path)
    assert (val and val.labels.tolist()) == labels
    assert found.left_out[".txt"] == (labels is None)
    if labels is None:
        assert "it needs a val.txt; on each line an image there, with its ending" in found.notes[0]


def test_the_labels_of_val_are_not_those_of_test(tmp_path):
    """test/ stands in for val/, whose labels lie there; with its own it is used."""
    plant(tmp_path, classes("train") | many("test/{}.png", 3) | {"val.txt": b"0.png a\n1.png b\n2.png c\n"})
    assert find_data(tmp_path).val is None
    (tmp_path / "test.txt").write_bytes(b"0.png b\n1.png b\n2.png c\n")
    assert find_data(tmp_path).val.labels.tolist() == [1, 1, 2]


def test_a_mirror_of_a_tree_by_links_is_the_tree(tmp_path):
    """Each file a link to another disk's: the same names and labels."""
    disk = plant(tmp_path / "disk", WITH_VAL)
    mirror = shutil.copytree(disk, tmp_path / "mirror", copy_function=os.symlink)
    expected, found = find_data(disk), find_data(mirror)
    assert found.train.fingerprint() == expected.train.fingerprint()
    assert found.val.fingerprint() == expected.val.fingerprint()


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    """One line: its images would be missing without a word."""
    plant(tmp_path, WITH_VAL)
    scandir = os.scandir

    def forbidden(folder):
        if os.fsencode(folder).endswith(b"/train/b"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", forbidden)
    message = f"{tmp_path}/train/b: can't be listed .Permission denied.; give yourself the right to read it"
    with pytest.raises(Refused, match=message):
        find_data(tmp_path)


def test_a_runs_pictures_are_no_data_of_the_next(tmp_path, monkeypatch):
    """The same command twice inside the folder of photos: the second goes on; 16 images both times."""
    plant(tmp_path, many("{}.png", 16))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        options = ["--epochs", 1, "--workers", 0, "--resume", "auto"]
        assert here("simsiam.py", ".", *TINY, *options) is None
    starts = [record for record in log_of(tmp_path / "runs" / tmp_path.name) if "settings" in record]
    assert [record["event"] for record in starts] == ["start", "resume"]
    assert [record["settings"]["images"] for record in starts] == [16, 16]


# --- Containers, lists ------------------------------------------------------------------------------------

def write_hundred(folder, layout, pixels, labels):
    """CIFAR-100 with 20 training images, and the rest to test."""
    folder.mkdir()
    names = [f"class{k}" for k in range(100)]
    if layout == "binary":
        (folder / "fine_label_names.txt").write_text("\n".join(names))
    else:
        meta = {b"fine_label_names": [name.encode() for name in names]}
        (folder / "meta").write_bytes(pickle.dumps(meta, 2))
    for name, part in (("train", slice(20)), ("test", slice(20, None))):
        fine = labels[part]
        if layout == "binary":
            coarse = np.zeros_like(fine)
            records = np.column_stack([coarse, fine, pixels[part]])
            records.astype(np.uint8).tofile(folder / f"{name}.bin")
        else:
            batch = {b"data": pixels[part], b"fine_labels": fine.tolist(), b"coarse_labels": [0]}
            (folder / name).write_bytes(pickle.dumps(batch, 2))


@pytest.mark.parametrize("layout", ["binary", "python"])
def test_cifar_100(tmp_path, layout):
    """Pixels, labels and names against those that were written; from the folder above it too."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 3072), np.uint8)
    labels = rng.integers(0, 100, 30)
    archive = tmp_path / f"cifar-100-{layout}"
    write_hundred(archive, layout, pixels, labels)
    for place in (archive, tmp_path):
        train, val, found = open_data(place)
        assert np.array_equal(train.pixels.flatten(1), pixels[:20])
        assert "left out" not in Data(train, val, found).rows()
        assert np.array_equal(val.pixels.flatten(1), pixels[20:])
        assert np.array_equal(np.concatenate([train.labels, val.labels]), labels)
        assert train.classes[7] == "class7"
        assert len(train.classes) == 100
    plant(archive, many("more/{}.png", 3))
    assert open_data(archive).rows()["left out"] == "3 files: 3 images beside its files"


def test_two_data_sets_in_one_folder_are_to_be_named(tmp_path):
    """torchvision's root with both."""
    plant(tmp_path, {"cifar-10-batches-py/data_batch_1": b"", "cifar-100-binary/train.bin": b"",
                     "cifar-100-binary/test.bin": b""})
    with pytest.raises(Refused, match="CIFAR is there too, .*; name its folder to use it: .*-py, .*-binary"):
        find_data(tmp_path)


REFUSED = {  # id: (files, DATA, a part of the line)
    "arrays": (
        {f"{i}.npy": b"" for i in range(20)}, ".", "no images there (20 files: 20 .npy); .npy: arrays"),
    "zip": ({"photos.zip": b"PK"}, "photos.zip", "an archive; unpack it, and name the folder"),
    "names and labels": (
        {"list.txt": b"a.png cat\n", "a.png": 3}, "list.txt", "each line must be a path alone"),
    "binary": ({"weights.dat": bytes(range(256))}, "weights.dat", "neither a list of images (UTF-8 text)"),
    "empty folder": ({"x": None}, "x", "no images there (it is empty)"),
    "nothing": ({}, "missing", "no such file or folder"),
    "a list of missing files": ({"list.txt": b"a.png\n"}, "list.txt", "a.png' is not a file"),
    "an empty list": ({"list.txt": b"\n"}, "list.txt", "is empty; name an image on each line"),
    "two data sets below": (
        many("a/train/{}.png", 2) | many("b/train/{}.png", 2), ".",
        "have a training split: a, b; name one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, case):
    """It says what lies there and what to do, without a byte that is no text."""
    tree, name, message = REFUSED[case]
    plant(tmp_path, tree)
    with pytest.raises(Refused) as refused:
        find_data(tmp_path / name)
    assert message in str(refused.value)
    assert str(refused.value).isprintable()


def test_lists_as_windows_writes_them(tmp_path):
    """A byte order mark, line ends, a name with a blank and an umlaut."""
    plant(tmp_path, {"a.png": 1, "mit ü.png": 2})
    (tmp_path / "list.txt").write_bytes("a.png\r\nmit ü.png\r\n".encode("utf-8-sig"))
    files = find_data(tmp_path / "list.txt").train.files
    assert [os.path.basename(name) for name in files] == [b"a.png", "mit ü.png".encode()]


def test_the_documented_lines_make_class_folders_of_a_table(tmp_path, monkeypatch):
    """own-data.md's, executed on a table of seven images: each one's class."""
    plant(tmp_path, many("images/{}.jpg", 7))
    labels = dict(zip("0123456", "abcabca"))
    rows = [f"{name},{label}" for name, label in labels.items()]
    (tmp_path / "train.csv").write_text("\n".join(["id,label", *rows]))
    lines = re.search(r"```python\n(.*?)```", (ROOT / "docs/own-data.md").read_text(), re.S)[1]
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    train, val, _ = open_data("DATA", wanted=Validation(None, 0.4))
    for source in (train, val):
        for file, k in zip(source.names, source.labels):
            name, _ = os.path.splitext(os.path.basename(file.decode()))
            assert source.classes[k] == labels.pop(name)
    assert not labels


# --- What the programs say --------------------------------------------------------------------------------

def test_the_start_says_what_was_found(tmp_path, capsys):
    """Layout, counts, places, what is left out, notes."""
    tree = classes("train") | classes("valid", count=4) | {"x.txt": b"", "y.heic": b""}
    data = plant(tmp_path / "data", tree)
    options = ["--epochs", 1, "--workers", 0, "--out", tmp_path / "run"]
    assert here("simsiam.py", data, *TINY, *options) is None
    printed = " ".join(capsys.readouterr().out.split())
    assert "an image folder: 24 images, 3 classes, files, from" in printed
    assert "validation: 12, from" in printed
    assert "left out 2 files: 1 .heic, 1 .txt" in printed
    assert f"validation: 12, from {data}/valid" in printed


def test_linear_evaluation_says_what_of_val_it_cannot_use(tmp_path):
    """Its refusal against the note."""
    plant(tmp_path, classes("train") | many("val/{}.png", 5))
    message = refusal("lineval.py", tmp_path, "--ckpt", "random:resnet18")
    assert "needs labels" in message
    assert "val/ is not used: without class folders, it needs a val.txt" in message


def test_slashes_behind_data_make_no_difference(tmp_path):
    """As completion puts them there."""
    folder = write_folder(tmp_path / "data", "train", 12, (70, 90))
    with_slashes, plain = find_data(f"{folder}/.//").train, find_data(str(folder)).train
    assert with_slashes.fingerprint() == plain.fingerprint()
    assert with_slashes.classes == plain.classes
