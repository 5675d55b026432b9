"""harness/data, images.py: pixels of more than 8 bits; bad files; the small options for odd images."""
import contextlib
import csv
import os
import pickle
import re
import shlex
import shutil
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import augment
import lineval
import simsiam
from harness.common.errors import BadImage, Refused
from harness.data import images, loading, opening
from harness.evaluation import result
from harness.training.run import Job
from tests.helpers import CPU, ROOT, TINY, decompression_bomb, here, log_of, png_chunk, refusal
from tests.helpers import result_of, save_image, slow, write_cifar

pytest_plugins = ["tests.fixtures"]


# --- Files of every depth, from the same levels -----------------------------------------------------------

def levels(seed=0, side=70):
    """A grey picture: (side, side) uint8, smooth, from 20 to 235."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(20, 236, (8, 8), np.uint8))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BILINEAR))


def write_png16(path, a):
    """A PNG of 16 bits: a (H, W, 4) of RGBA."""
    height, width, _ = a.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 6, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in a)
    chunks = [
        png_chunk(b"IHDR", header),
        png_chunk(b"IDAT", zlib.compress(rows)),
        png_chunk(b"IEND", b""),
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def write_tiff(path, a, order="<", compressed=False, planes=False):
    """A TIFF of 16 bits in several bands: a (H, W, bands).

    order: of the bytes. planes: the header says that each band has a plane of its own.
    """
    height, width, bands = a.shape
    content = a.astype(order + "u2").tobytes()
    if compressed:
        content = zlib.compress(content)
    count = 10
    behind = 8 + 2 + 12 * count + 4  # the header and the tags; then come the bits, then the pixels
    tags = [  # number, how many values, the value or where the values are
        (256, 1, width),
        (257, 1, height),
        (258, bands, behind),               # bits
        (259, 1, 8 if compressed else 1),
        (262, 1, 2 if bands == 3 else 1),   # RGB, or grey
        (273, 1, behind + 4 * bands),       # the pixels
        (277, 1, bands),
        (278, 1, height),                   # all rows in one strip
        (279, 1, len(content)),
        (284, 1, 2 if planes else 1),       # 1: the bands of a pixel side by side
    ]
    mark = {"<": b"II", ">": b"MM"}[order]
    out = mark + struct.pack(order + "HIH", 42, 8, count)
    for number, values, value in tags:
        out += struct.pack(order + "HHII", number, 4, values, value)  # 4: a number of 32 bits
    out += struct.pack(f"{order}{1 + bands}I", 0, *[16] * bands)
    path.write_bytes(out + content)


def whole(dtype, factor):
    """Writes levels times a factor, in one band, by Pillow."""
    def write(path, g):
        Image.fromarray(g.astype(dtype) * dtype(factor)).save(path)

    return write


def twelve(g, bands):
    """Levels times 16, in several equal bands: 12 bits in 16."""
    return np.dstack([g.astype(np.uint16) * 16] * bands)


def as_tiff(**options):
    """Writes RGB of 12 bits in a TIFF."""
    return lambda path, g: write_tiff(path, twelve(g, 3), **options)


def as_portable(path, g):
    """Writes a PGM of 16 bits, whose header says that white is 4080."""
    height, width = g.shape
    header = f"P5 {width} {height} 4080\n".encode()
    path.write_bytes(header + twelve(g, 1).astype(">u2").tobytes())


DEEP = {  # id: (suffix, (path, levels (H, W) uint8) -> writes a file that shows the same)
    "12 bits in 16": (".png", whole(np.uint16, 16)),
    "fractions": (".tif", whole(np.float32, 1 / 255)),
    "32 bits": (".tif", whole(np.int32, 16)),
    "RGBA of 12 bits": (".png", lambda path, g: write_png16(path, twelve(g, 4))),
    "RGB of 12 bits in a TIFF": (".tif", as_tiff()),
    "the other byte order": (".tif", as_tiff(order=">")),
    "compressed": (".tif", as_tiff(compressed=True)),
    "a PGM that says its white": (".pgm", as_portable),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_files_show_what_8_bits_show(tmp_path, kind):
    """Six pictures against their 8-bit originals: within 3 levels, though no picture has the whole range."""
    suffix, write = DEEP[kind]
    originals = [levels(k) for k in range(6)]
    for k, g in enumerate(originals):
        write(tmp_path / f"{k}{suffix}", g)
    train, *_ = opening.open_data(tmp_path)
    assert train.value_range is not None
    for k, g in enumerate(originals):
        shown = train.image(k)[..., 0].numpy()
        assert abs(shown.astype(int) - g).max() <= 3
        assert abs(len(np.unique(shown)) - len(np.unique(g))) <= 8


HOT_PIXEL = np.append(np.full(100_000, 4000), 65_535)
RANGES = {  # id: (values, the range)
    "12 bits": (np.array([0, 7, 4080]), (0, 4095)),
    "fractions": (np.array([0.1, 0.9]), (0, 1)),
    "levels as float": (np.array([0.0, 80.0, 255.0]), (0, 255)),
    "Hounsfield": (np.array([-1024, 40, 3071]), (-1024, 3071)),
    "reflectance": (np.array([0.5, 80.5, 9999.5]), (0.5, 9999.5)),
    "-9999 for missing data": (np.array([-9999, -9999, 140.5, 300, 451]), (140.5, 451)),
    "65535 for missing data": (np.array([0, 7, 2999, 65_535]), (0, 4095)),
    "a far value, but no farther than others": (np.array([-4, 0.5, 5]), (-4, 5)),
    "no number at all": (np.array([np.nan, np.inf]), (0, 1)),
    "nothing but black": (np.zeros(5), (0, 1)),
    "one hot pixel": (HOT_PIXEL, (0, 4095)),
}


@pytest.mark.parametrize("case", RANGES)
def test_the_range_of_some_values(case):
    """Against ranges by hand."""
    found, expected = RANGES[case]
    assert images.range_of(found) == pytest.approx(expected)


@pytest.mark.parametrize("low, high", [(4095, 0), (5, 5), (np.nan, 1)])
def test_a_range_that_is_none_is_refused(tmp_path, low, high):
    """Two numbers, the lower one first."""
    Image.new("L", (70, 70)).save(tmp_path / "0.png")
    with pytest.raises(Refused, match="--range must be two numbers, the lower one first"):
        opening.open_data(tmp_path, (low, high))


def write_grey(path, level, dtype=np.uint16):
    """A picture of 16 bits, or of 8, all of one level."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((70, 70), level, dtype)).save(path)


def brightness(source):
    """The mean level with which each image is shown."""
    return [source.image(i).float().mean().item() for i in range(len(source))]


def test_one_range_for_both_splits(tmp_path):
    """8 bits to train, both to validate: dark files stay darker than bright ones, 8 bits stay as they are."""
    write_grey(tmp_path / "train/a/0.png", 50, np.uint8)
    write_grey(tmp_path / "train/b/0.png", 150, np.uint8)
    write_grey(tmp_path / "val/a/0.png", 50, np.uint8)
    write_grey(tmp_path / "val/a/1.png", 1000)
    write_grey(tmp_path / "val/b/0.png", 3000)
    train, val, _ = opening.open_data(tmp_path)
    assert brightness(train) == [50, 150]
    assert val.value_range == (0, 4095)
    expected = [50, 255 * 1000 / 4095, 255 * 3000 / 4095]
    assert brightness(val) == pytest.approx(expected, abs=0.5)


def test_a_deep_file_that_no_sample_has_met_is_shown_by_its_kind(tmp_path, monkeypatch):
    """By all that 16 bits hold, not by its own darkest and brightest. The sample lacks the middle one."""
    monkeypatch.setattr(images, "SAMPLE", 2)
    write_grey(tmp_path / "0.png", 10, np.uint8)
    write_grey(tmp_path / "1.png", 4000)
    write_grey(tmp_path / "2.png", 20, np.uint8)
    train, *_ = opening.open_data(tmp_path)
    assert train.value_range is None
    assert brightness(train) == pytest.approx([10, 255 * 4000 / 65535, 20], abs=0.5)


def test_values_beyond_the_range_are_cut_and_nan_is_black():
    """The ends of the range are black and white."""
    shown = images.to_levels(np.array([np.nan, -1, 0, 5, 9]), (0, 5))
    assert np.array_equal(shown, [0, 0, 0, 255, 255])


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A labelled folder of 12 bits: 24 training and 9 validation images."""
    folder = tmp_path_factory.mktemp("deep")
    for split, count in (("train", 24), ("val", 9)):
        for i in range(count):
            path = folder / split / "abc"[i % 3] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            whole(np.uint16, 16)(path, levels(i))
    return folder


def test_the_range_is_said_and_kept(tmp_path, deep, capsys):
    """--range overrides what was found: in the start block, in the settings, in the evaluation's."""
    out = tmp_path / "run"
    options = ["--epochs", 1, "--workers", 0, "--range", 0, 8190]
    assert here("simsiam.py", deep, *TINY, *options, "--out", out) is None
    said = "0 to 8190 become 0 to 255 in files of more than 8 bits (--range)"
    assert said in capsys.readouterr().out
    assert log_of(out)[0]["settings"]["range"] == [0, 8190]
    assert here("lineval.py", "--ckpt", out / "checkpoint.pth", "--knn") is None
    assert result_of(out / "lineval-knn")["range"] == [0, 8190]


def test_check_says_the_range(deep, capsys, monkeypatch):
    """What was found, on stderr."""
    monkeypatch.setattr(sys, "argv", ["augment.py", str(deep), "--check"])
    augment.main()
    printed = capsys.readouterr()
    assert "0 to 4095 become 0 to 255" in printed.err
    assert printed.out == "all 33 image files are good\n"


def as_it_is(image, epoch, i):
    """One "view" of an image: itself."""
    return [image.permute(2, 0, 1)]


def test_workers_read_with_the_same_range(deep):
    """A batch from a worker against the main process's reading."""
    train, *_ = opening.open_data(deep)
    batches = [(0, np.arange(8))]
    (_, _, (by_worker, )), = loading.decode(train, as_it_is, 1, batches, CPU, 1)
    in_here = [train.image(k).permute(2, 0, 1) for k in range(8)]
    assert torch.equal(by_worker, torch.stack(in_here))


def test_images_that_are_all_the_same_are_noticed(tmp_path, capsys):
    """16 black pictures: a warning in epoch 1, though the loss is 0."""
    for i in range(16):
        Image.new("L", (16, 16)).save(tmp_path / f"{i}.png")
    options = ["--epochs", 2, "--workers", 0, "--out", tmp_path / "run"]
    assert here("simsiam.py", tmp_path, *TINY, *options) is None
    epochs = [record for record in log_of(tmp_path / "run") if record["event"] == "epoch"]
    assert [record["collapsed"] for record in epochs[1:]] == [True] * 2
    assert capsys.readouterr().out.count("collapsed: all outputs are (nearly) the same vector") == 1


# --- Bad files take no part where labels are used -----------------------------------------------------------

BAD_TWO = ["train/red/3.png", "val/blue/4.png"]
RANDOM = shlex.split("--ckpt random:resnet18 --width 1/8 --size 32 --workers 0")


def red_and_blue(folder, side=70):
    """Two classes of noise, told apart by colour. One of red's ten training files and one of blue's five
    validation files are bad."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 5)):
        for channel, name in ((2, "blue"), (0, "red")):
            for i in range(count):
                pixels = torch.zeros(side, side, 3, dtype=torch.uint8)
                pixels[..., channel] = torch.from_numpy(rng.integers(100, 256, (side, side)))
                save_image(folder / split / name / f"{i}.png", pixels)
    for name in BAD_TWO:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:len(content) // 2])
    return folder


@pytest.mark.parametrize("side, protocol", [(70, "--knn"), (32, "--cached"), (70, "--lars")])
def test_a_bad_image_does_not_teach_and_is_not_judged(tmp_path, side, protocol, capsys):
    """It is named, and isn't among the saved features."""
    folder = red_and_blue(tmp_path / "data", side)
    options = [protocol, "--features", tmp_path / "f.npz", "--out", tmp_path / "out"]
    if protocol == "--lars":
        options += ["--batch", 19, "--epochs", 1]
    assert here("lineval.py", folder, *RANDOM, *options) is None
    result = result_of(tmp_path / "out")
    assert result["images"] == 19
    assert result["val_images"] == 9
    assert result["bad_images"] == 2
    if protocol != "--lars":
        assert result["top1"] == 100  # colour decides
    printed = capsys.readouterr()
    assert "on 9 of 10 validation images" in printed.out
    saved = np.load(tmp_path / "f.npz")
    for name in BAD_TWO:
        assert f"{name}: can't be read" in printed.err
        assert not any(name in os.fsdecode(file) for file in saved["train_files"])
        assert not any(name in os.fsdecode(file) for file in saved["val_files"])
    assert len(saved["train_features"]) == len(saved["train_labels"]) == len(saved["train_files"])
    assert len(saved["val_features"]) == len(saved["val_labels"]) == len(saved["val_files"])


def watched(folder, labelled):
    """What the log has of raw pixels, as if they were a network's features."""
    train, val, _ = opening.open_data(folder)
    views = simsiam.test_views(augment.Policy(size=8), CPU, 0)
    settings = {"knn_every": 1, "knn_k": 0, "world": 1}
    job = Job(settings, CPU, train, val if labelled else None, views, "out", False)
    return simsiam.watch(job, contextlib.nullcontext(), lambda x: x.flatten(1))


@pytest.mark.parametrize("labelled", [True, False])
def test_a_stand_in_has_no_part_in_knn_and_rank(tmp_path, world_of_one, labelled):
    """With the bad files against without them. 100% of 9 are right, which colour decides."""
    folder = red_and_blue(tmp_path)
    found = watched(folder, labelled)
    for name in BAD_TWO:
        (folder / name).unlink()
    assert found == pytest.approx(watched(folder, labelled), rel=1e-5)
    if labelled:
        assert found["knn"] == 100
        assert found["knn_images"] == 9


# --- What is said of bad files ------------------------------------------------------------------------------

def content(these):
    """Writes these bytes."""
    return lambda path: path.write_bytes(these)


def half(path):
    """The first half of a picture's file."""
    Image.fromarray(levels()).save(path)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def black_tiff(bands, **options):
    """Writes a TIFF of so many bands."""
    black = np.zeros((8, 8, bands))
    return lambda path: write_tiff(path, black, **options)


BAD = {  # id: (suffix, writes the file, a part of the line)
    "13 bands": (".tif", black_tiff(13), "convert it to 1, 3 or 4 bands of 8 or 16 bits"),
    "colours in planes": (
        ".tif", black_tiff(3, planes=True),
        "16 bits with each colour in a plane of its own; gdal_translate"),
    "git-LFS": (".jpg", content(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
                "a git-LFS pointer: git lfs pull"),
    "heic": (".jpg", content(b"\0\0\0\x18ftypheic" + bytes(50)), "a HEIC picture, or a video: convert it"),
    "a sound file": (".jpg", content(b"RIFF\x24\0\0\0WAVEfmt "), "nothing that Pillow can open"),
    "half a GIF": (".gif", half, "repair it or remove it"),
    "empty": (".png", content(b""), "it is empty; repair it or remove it"),
    "2,500 million pixels": (
        ".png", content(decompression_bomb()),
        "larger than 178956970 pixels: cut it into tiles, or make it smaller"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_told_by_what_it_is(tmp_path, case, capfd):
    """Against the table. Pillow and its C libraries print nothing."""
    suffix, write, message = BAD[case]
    path = tmp_path / f"x{suffix}"
    write(path)
    with pytest.raises(BadImage) as bad:
        images.read_image(os.fsencode(path))
    assert str(bad.value).startswith(f"{path}: can't be read as an image: ")
    assert message in str(bad.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["is_deep", "to_levels"])
def test_what_our_own_code_raises_is_no_bad_image(tmp_path, monkeypatch, name):
    """A bug behind the decoder stays a bug."""
    whole(np.uint16, 16)(tmp_path / "x.png", levels())
    monkeypatch.setattr(images, name, lambda x, *more: x.no_such_attribute)
    with pytest.raises(AttributeError):
        images.read_image(os.fsencode(tmp_path / "x.png"))


def test_a_picture_with_much_text_in_it_is_read(tmp_path):
    """3 MB of metadata."""
    text = PngImagePlugin.PngInfo()
    text.add_text("history", "x" * 3_000_000, zip=True)
    path = tmp_path / "x.png"
    Image.new("L", (8, 8), 5).save(path, pnginfo=text)
    assert (images.read_image(os.fsencode(path)) == 5).all()


# --- Small options ----------------------------------------------------------------------------------------

ODD_VIEWS = shlex.split("--size 24 --centre 0.7 --mean .5 .4 .3 --std .25 .3 .35 --range 0 3000")


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory):
    """A folder with deep images, a run with settings of its own, and its evaluation with features."""
    tmp_path = tmp_path_factory.mktemp("odd")
    data = tmp_path / "data"
    for k, name in enumerate("ab"):
        for i in range(9):
            split = "train" if i < 6 else "val"
            whole(np.uint16, 16)(new_file(data / split / name / f"{i}.png"), levels(10 * k + i))
    run = tmp_path / "run"
    assert here("simsiam.py", data, *TINY, *ODD_VIEWS, "--batch", 4, "--workers", 0, "--out", run) is None
    options = ["--cached", "--epochs", 5, "--size", 30]  # the run's is 24
    options += ["--features", tmp_path / "f.npz", "--out", tmp_path / "eval"]
    assert here("lineval.py", "--ckpt", run / "backbone.pth", *options) is None
    return tmp_path


def new_file(path):
    """A path whose folder is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_the_documented_lines_give_the_features_of_the_evaluation(odd_run, capsys):
    """operations.md's lines, executed on each validation image, against --features and the accuracy."""
    lines = re.search(r"```python\n(.*?)```", (ROOT / "docs/operations.md").read_text(), re.S)[1]
    lines = lines.replace("runs/IMAGENET/lineval-lars", str(odd_run / "eval"))
    lines = lines.replace("runs/IMAGENET", str(odd_run / "run"))
    _, view = lineval.open_network(odd_run / "run" / "backbone.pth")
    assert pickle.loads(pickle.dumps(view))  # for workers that are spawned
    saved = np.load(odd_run / "f.npz")
    right = 0
    for file, label, expected in zip(saved["val_files"], saved["val_labels"], saved["val_features"]):
        names = {}
        capsys.readouterr()
        exec(lines.replace("photo.jpg", os.fsdecode(file)), names)
        assert np.allclose(names["features"][0], expected, rtol=1e-5, atol=1e-6)
        right += capsys.readouterr().out.strip() == "ab"[label]
    assert result_of(odd_run / "eval")["top1"] == pytest.approx(100 * right / 6)


def test_a_classifier_names_the_classes_of_a_folder(odd_run, tmp_path, capsys):
    """--classify on the validation images, one of them bad: the names, and the accuracy against --cached's.

    The evaluation was told views and range, because the weights don't know them; the classifier does.
    """
    weights = torch.load(odd_run / "run" / "backbone.pth", weights_only=True)["model"]
    torch.save(weights, odd_run / "bare.pth")
    bare = ["--ckpt", odd_run / "bare.pth", "--width", "1/16"]
    told = shlex.split("--size 24 --mean .5 .4 .3 --std .25 .3 .35 --range 0 3000 --cached --epochs 5")
    assert here("lineval.py", odd_run / "data", *bare, *told, "--out", odd_run / "told") is None
    photos = tmp_path / "photos"
    for k, path in enumerate(sorted((odd_run / "data" / "val").rglob("*.png"))):
        shutil.copy(path, new_file(photos / f"{path.parent.name}, \u00e9{k}.png"))
    (new_file(photos / "x.png")).write_bytes(b"bad")
    classify = ["--classify", odd_run / "told" / "classifier.pth"]
    capsys.readouterr()
    assert here("lineval.py", photos, *bare, *classify) is None
    assert "(size, mean, std as given; --size" in " ".join(capsys.readouterr().out.split())
    with open(odd_run / "told" / "photos.csv", encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    files = [os.path.relpath(row["file"], photos) for row in rows]
    assert files == sorted(name for name in os.listdir(photos) if name != "x.png")
    right = [row["class"] == file[0] for file, row in zip(files, rows)]
    assert 100 * np.mean(right) == pytest.approx(result_of(odd_run / "told")["top1"])
    assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)  # of two classes, the more probable
    assert "photos.csv: already exists" in here("lineval.py", photos, *bare, *classify)
    other = ["--ckpt", "random:resnet18", *classify, "--out", tmp_path / "c.csv"]
    assert "is not the backbone that the classifier was trained on" in here("lineval.py", photos, *other)


def test_the_classes_of_images_without_names(odd_run, tmp_path):
    """CIFAR's files: a split and a number each, no two alike."""
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    write_cifar(tmp_path, np.zeros((60, 3, 32, 32), np.uint8), np.zeros(60, np.uint8), 10, names)
    options = ["--ckpt", odd_run / "run", "--classify", odd_run / "eval" / "classifier.pth"]
    assert here("lineval.py", tmp_path / "bin", *options, "--out", tmp_path / "c.csv") is None
    files = [line.split(",")[0] for line in (tmp_path / "c.csv").read_text().splitlines()[1:]]
    assert files == [f"train/{i}" for i in range(50)] + [f"val/{i}" for i in range(10)]


def test_what_a_run_showed_its_network_is_told(odd_run, capsys):
    """By --export, and by --init of a run with other views."""
    seen = "size 24, mean (0.5, 0.4, 0.3), std (0.25, 0.3, 0.35), centre 0.7, range (0.0, 3000.0)"
    assert here("lineval.py", "--ckpt", odd_run / "run", "--export", "torchvision") is None
    assert f"give it views as its run did: {seen}" in capsys.readouterr().out
    for options, told in ((ODD_VIEWS, False), (ODD_VIEWS[2:], True)):
        more = ["--init", odd_run / "run", "--epochs", 1, "--batch", 4, "--workers", 0]
        out = odd_run / str(told)
        assert here("simsiam.py", odd_run / "data", *TINY, *more, *options, "--out", out) is None
        assert (f"(its run had {seen})" in " ".join(capsys.readouterr().out.split())) == told


def test_the_number_comes_before_what_can_fail(tmp_path, small, monkeypatch, capsys):
    """A disk that is full after lineval.json: the accuracy is there, and on the screen."""
    def full(*given):
        raise Refused("classifier.pth: can't be written")

    monkeypatch.setattr(result, "save", full)
    options = ["--ckpt", "random:resnet18", "--width", "1/16", "--cached", "--epochs", 5, "--out", tmp_path]
    assert "classifier.pth: can't be written" in here("lineval.py", small, *options)
    assert f"top-1 {result_of(tmp_path)['top1']:.2f}%" in capsys.readouterr().out


@slow
def test_views_are_the_pretrainings_or_told_to_be_others(tmp_path, large, capsys):
    """--size 32 on files: checkpoint.pth knows it, bare weights are told it, and both give the same."""
    run = tmp_path / "run"
    assert here("simsiam.py", large, *TINY, "--size", 32, "--epochs", 1, "--out", run) is None
    capsys.readouterr()
    torch.save(torch.load(run / "backbone.pth", weights_only=True)["model"], run / "bare.pth")
    told = shlex.split("--mean .485 .456 .406 --std .229 .224 .225 --size 32")
    features = []
    for name, more in (("checkpoint", []), ("bare", told)):
        saved = tmp_path / f"{name}.npz"
        options = ["--knn", "--features", saved, "--out", tmp_path / name]
        assert here("lineval.py", large, "--ckpt", run / f"{name}.pth", *options, *more) is None
        assert "views       32 pixels, mean 0.485 0.456 0.406" in capsys.readouterr().out
        features.append(np.load(saved)["val_features"])
    assert np.array_equal(*features)
    assert result_of(tmp_path / "bare")["views_given"] == ["size", "mean", "std"]
    untold = ["--ckpt", run / "bare.pth", "--knn", "--out", tmp_path / "untold"]
    assert here("lineval.py", large, *untold) is None
    said = "224 pixels, mean 0.485 0.456 0.406, std 0.229 0.224 0.225 (of recipe imagenet"
    assert said in capsys.readouterr().out


def test_features_of_images_without_labels(tmp_path):
    """Names and features of all good files."""
    for i in range(12):
        Image.fromarray(levels(i)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "05.png").write_bytes(b"")
    assert here("lineval.py", tmp_path, *RANDOM, "--features", tmp_path / "f.npz") is None
    saved = np.load(tmp_path / "f.npz")
    assert set(saved) == {"train_features", "train_files", "settings"}
    assert saved["train_features"].shape == (11, 64)
    names = [os.path.basename(os.fsdecode(name)) for name in saved["train_files"]]
    assert names == [f"{i:02}.png" for i in range(12) if i != 5]


def test_vflip_flips_half_of_the_views_and_changes_no_other_draw():
    """At 0.5: the share of 2,000 views; boxes and horizontal flips against those without."""
    many = 0, 0, np.arange(2000), np.zeros(2000, int), 90, 90
    with_it = augment.draw_crop(augment.Policy(vflip=0.5), *many)
    without = augment.draw_crop(augment.Policy(), *many)
    assert 0.46 < with_it.vflip.mean() < 0.54
    assert 0.2 < (with_it.vflip & with_it.flip).mean() < 0.3
    assert not without.vflip.any()
    for a, b in zip(with_it[:5], without[:5]):
        assert np.array_equal(a, b)


def test_every_nth_checkpoint_is_kept(tmp_path, small):
    """--keep-every 2 of 3 epochs: one file, with the weights after 2."""
    options = ["--keep-every", 2, "--knn-every", 0, "--workers", 0, "--out", tmp_path]
    assert here("simsiam.py", small, *TINY, *options) is None
    kept, = tmp_path.glob("checkpoint-0*.pth")
    assert kept.name == "checkpoint-0002.pth"
    content = torch.load(kept, weights_only=True)
    assert content["epoch"] == 1
    assert content["step"] == 3
    assert lineval.read_backbone(str(kept)).epochs is not None


def test_each_file_and_each_data_set_has_its_own_evaluation(tmp_path, small, ten):
    """A file of --keep-every, and other data, without --out: the folders. For the same once more, the
    refusal's advice is followed to its end."""
    options = ["--epochs", 1, "--keep-every", 1, "--knn-every", 0, "--workers", 0, "--out", tmp_path]
    assert here("simsiam.py", small, *TINY, *options) is None
    for name in ("checkpoint", "checkpoint-0001"):
        assert here("lineval.py", "--ckpt", tmp_path / f"{name}.pth", "--knn") is None
    assert here("lineval.py", ten, "--ckpt", tmp_path, "--knn") is None  # its checkpoint.pth
    folders = [f"lineval-knn{rest}" for rest in ("", "-checkpoint-0001", "-ten")]
    assert sorted(path.name for path in tmp_path.glob("lineval-*")) == folders
    again = ["--ckpt", tmp_path / "checkpoint.pth", "--knn"]
    said = refusal("lineval.py", *again)
    assert "already (perhaps of other data of this name); give another folder with --out or, if it is" in said
    assert here("lineval.py", *again, "--resume") is None
    assert here("lineval.py", *again, "--out", tmp_path / "another") is None


# --- Strips -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("height, width", [(12, 30_000), (5000, 1)])
def test_the_test_view_of_a_strip_is_cheap(monkeypatch, height, width):
    """What is resized has at most four times as many pixels as a square of the shorter side's size."""
    sizes = []
    interpolate = torch.nn.functional.interpolate

    def recorded(x, size, **options):
        sizes.append(size)
        return interpolate(x, size, **options)

    monkeypatch.setattr(torch.nn.functional, "interpolate", recorded)
    image = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
    view = augment.resize_centre(image, augment.Policy())
    assert view.shape == (1, 3, 224, 224)
    (high, wide), = sizes
    assert high * wide <= 4.5 * 256 ** 2


def test_the_middle_of_a_strip_is_what_is_seen():
    """A strip with one bright column in its middle: it is in the middle of the view."""
    image = torch.zeros(1, 3, 12, 3001, dtype=torch.uint8)
    image[..., 1500] = 255
    view = augment.resize_centre(image, augment.Policy()).float()
    columns = view.sum(dim=(0, 1, 2))
    centre = (columns * torch.arange(224)).sum() / columns.sum()
    assert centre.item() == pytest.approx(111.5, abs=1)
