"""harness/data, images.py: pixels of more than 8 bits; bad files; the small options for odd images."""
import os
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import augment
import lineval
from harness.common.errors import BadImage, Refused
from harness.data import images, opening
from tests.helpers import CPU, REAL, ROOT, TINY, here, log_of, png_chunk, python, real, result_of, slow

pytest_plugins = ["tests.fixtures"]


# --- Files of every depth, from the same levels -----------------------------------------------------------

def levels(seed=0, side=70):
    """A grey picture: (side, side) uint8, smooth, from 20 to 235."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(20, 236, (8, 8), np.uint8))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BILINEAR))


def write_png16(path, a):
    """A PNG of 16 bits: a (H, W, 3) of RGB, (H, W, 2) of grey and alpha, (H, W, 4) of RGBA."""
    height, width, bands = a.shape
    kind = {2: 4, 3: 2, 4: 6}[bands]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in a)
    path.write_bytes(png(width, height, 16, kind, zlib.compress(rows)))


def png(width, height, bits, kind, content):
    """A PNG file of three chunks."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), png_chunk(b"IDAT", content), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def write_tiff(path, a, order="<", compressed=False, planes=False):
    """A TIFF of several bands: a (H, W, bands) of uint16 or float32.

    order: of the bytes. planes: the header says that each band has a plane of its own.
    """
    height, width, bands = a.shape
    content = a.astype(a.dtype.newbyteorder(order)).tobytes()
    if compressed:
        content = zlib.compress(content)
    short, long = 3, 4  # kinds of numbers
    behind = 8 + 2 + 12 * 11 + 4  # the header and the tags: there stand bits and kinds, then the pixels
    tags = [  # number, kind, count, value or where the values are
        (256, long, 1, width),
        (257, long, 1, height),
        (258, short, bands, behind),               # bits
        (259, short, 1, 8 if compressed else 1),
        (262, short, 1, 2 if bands == 3 else 1),   # RGB, or grey
        (273, long, 1, behind + 4 * bands),        # the pixels
        (277, short, 1, bands),
        (278, long, 1, height),                    # all rows in one strip
        (279, long, 1, len(content)),
        (284, short, 1, 2 if planes else 1),       # 1: the bands of a pixel side by side
        (339, short, bands, behind + 2 * bands),   # the kind of each band: 1 whole numbers, 3 floating point
    ]
    out = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HIH", 42, 8, len(tags))
    for number, kind, count, value in tags:
        out += struct.pack(order + "HHI", number, kind, count)
        in_place = kind == short and count == 1
        out += struct.pack(order + "HH", value, 0) if in_place else struct.pack(order + "I", value)
    bits = [8 * a.dtype.itemsize] * bands
    kinds = [3 if a.dtype.kind == "f" else 1] * bands
    out += struct.pack(order + "I", 0) + struct.pack(f"{order}{2 * bands}H", *bits, *kinds)
    path.write_bytes(out + content)


def whole(dtype, factor):
    """Writes levels times a factor, in one band, by Pillow."""
    return lambda path, g: Image.fromarray(g.astype(dtype) * dtype(factor)).save(path)


def twelve(g, bands):
    """Levels times 16, in several equal bands: 12 bits in 16."""
    return np.dstack([g.astype(np.uint16) * 16] * bands)


def portable(path, g):
    """A PGM of 16 bits, whose header says that white is 4080."""
    height, width = g.shape
    header = f"P5 {width} {height} 4080\n".encode()
    path.write_bytes(header + (g.astype(np.uint16) * 16).astype(">u2").tobytes())


DEEP = {  # id: (suffix, (path, levels (H, W) uint8) -> writes a file that shows the same)
    "12 bits in 16": (".png", whole(np.uint16, 16)),
    "all of 16 bits": (".png", whole(np.uint16, 257)),
    "10 bits in 16, TIFF": (".tif", whole(np.uint16, 4)),
    "fractions": (".tif", whole(np.float32, 1 / 255)),
    "levels as float": (".tif", whole(np.float32, 1)),
    "32 bits": (".tif", whole(np.int32, 16)),
    "RGB of 12 bits in a PNG": (".png", lambda path, g: write_png16(path, twelve(g, 3))),
    "RGBA of 12 bits": (".png", lambda path, g: write_png16(path, twelve(g, 4))),
    "grey and alpha of 12 bits": (".png", lambda path, g: write_png16(path, twelve(g, 2))),
    "RGB of 12 bits in a TIFF": (".tif", lambda path, g: write_tiff(path, twelve(g, 3))),
    "the other byte order": (".tif", lambda path, g: write_tiff(path, twelve(g, 3), ">")),
    "compressed": (".tif", lambda path, g: write_tiff(path, twelve(g, 3), compressed=True)),
    "a PGM that says its white": (".pgm", portable),
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


RANGES = {  # id: (values, the range)
    "12 bits": (np.array([0, 7, 4080]), (0, 4095)),
    "8 bits": (np.array([0, 7, 100]), (0, 255)),
    "16 bits": (np.array([300, 60_000]), (0, 65_535)),
    "fractions": (np.array([0.1, 0.9]), (0, 1)),
    "levels as float": (np.array([0.0, 80.0, 255.0]), (0, 255)),
    "Hounsfield": (np.array([-1024, 40, 3071]), (-1024, 3071)),
    "reflectance": (np.array([0.5, 80.5, 9999.5]), (0.5, 9999.5)),
    "no number at all": (np.array([np.nan, np.inf]), (0, 1)),
    "nothing but black": (np.zeros(5), (0, 1)),
    "one hot pixel": (np.append(np.full(100_000, 4000), 65_535), (0, 4095)),
}


@pytest.mark.parametrize("case", RANGES)
def test_the_range_of_some_values(case):
    """Against ranges by hand."""
    found, expected = RANGES[case]
    assert images.range_of(found) == pytest.approx(expected)


@pytest.mark.parametrize("given", [(4095, 0), (5, 5), (float("nan"), 1), (0, float("inf"))])
def test_a_range_that_is_none_is_refused(tmp_path, given):
    """Two finite numbers, the lower one first."""
    Image.new("L", (70, 70)).save(tmp_path / "0.png")
    with pytest.raises(Refused, match="two finite numbers, the lower one first"):
        opening.open_data(tmp_path, given)


def test_the_range_is_of_both_splits(tmp_path):
    """8 bits to train, 16 to validate: one range for all validation images."""
    (tmp_path / "train/a").mkdir(parents=True)
    for split in ("train", "val"):
        for k, name in enumerate("ab"):
            path = tmp_path / split / name / "0.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            g = np.full((70, 70), 1000 * (1 + 2 * k), np.uint16)
            Image.fromarray(g if split == "val" else g.astype(np.uint8)).save(path)
    _, val, _ = opening.open_data(tmp_path)
    assert val.value_range == (0, 4095)
    assert val.image(1).float().mean() > 2.9 * val.image(0).float().mean()


def test_a_deep_file_that_no_sample_has_met_is_shown_by_its_kind(tmp_path):
    """Among 1,000 others: by all that 16 bits hold, not by its own darkest and brightest."""
    for i in range(1000):
        Image.new("L", (65, 2), i % 255).save(tmp_path / f"{i:04}.png")
    Image.fromarray(np.full((2, 65), 4000, np.uint16)).save(tmp_path / "0001.png")
    train, *_ = opening.open_data(tmp_path)
    assert train.value_range is None
    assert train.image(1).float().mean().item() == pytest.approx(255 * 4000 / 65535, abs=0.5)


def test_brightness_between_files_is_kept(tmp_path):
    """One range for the data set: a dark picture stays darker than a bright one; NaN is black."""
    for k, level in enumerate((100, 2000, 4000)):
        Image.fromarray(np.full((70, 70), level, np.uint16)).save(tmp_path / f"{k}.png")
    train, *_ = opening.open_data(tmp_path)
    shown = [train.image(k).float().mean().item() for k in range(3)]
    assert shown == pytest.approx([255 * v / 4095 for v in (100, 2000, 4000)], abs=0.5)
    assert images.to_levels(np.array([np.nan, 5]), (0, 5)).tolist() == [0, 255]


def test_in_mixed_folders_8_bits_stay_as_they_are(tmp_path):
    """Two files of 8 bits, exactly; one of 12."""
    g = levels()
    Image.fromarray(g).save(tmp_path / "a.png")
    Image.fromarray(g.astype(np.uint16) * 16).save(tmp_path / "b.png")
    Image.fromarray(g // 2).save(tmp_path / "c.png")
    train, *_ = opening.open_data(tmp_path)
    shown = [train.image(k)[..., 0].numpy().astype(int) for k in range(3)]
    assert np.array_equal(shown[0], g)
    assert np.array_equal(shown[2], g // 2)
    assert abs(shown[1] - g).max() <= 1


def deep_folder(folder, side=70):
    """Labelled, of 12 bits: 24 training and 9 validation images."""
    for split, count in (("train", 24), ("val", 9)):
        for i in range(count):
            path = folder / split / "abc"[i % 3] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(levels(i, side).astype(np.uint16) * 16).save(path)
    return folder


def test_the_range_is_said_and_kept_and_read_alike(tmp_path, capsys, monkeypatch):
    """In the start block, in the settings, in the evaluation's; --range overrides it; --check says it."""
    folder = deep_folder(tmp_path / "data")
    for more, high in (([], 4095), (["--range", 0, 8190], 8190)):
        out = tmp_path / str(high)
        assert here("simsiam.py", folder, *TINY, "--epochs", 1, *more, "--out", out) is None
        said = f"0 to {high} become 0 to 255 in files of more than 8 bits (--range)"
        assert said in capsys.readouterr().out
        assert log_of(out)[0]["settings"]["range"] == [0, high]
        assert here("lineval.py", "--ckpt", out / "checkpoint.pth", "--knn") is None
        assert result_of(out / "lineval-knn")["range"] == [0, high]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["augment.py", str(folder), "--check"])
    augment.main()
    printed = capsys.readouterr()
    assert "0 to 4095 become 0 to 255" in printed.err
    assert printed.out == "all 33 image files are good\n"


def test_workers_read_with_the_same_range(tmp_path):
    """A batch from a worker against the main process's reading."""
    folder = deep_folder(tmp_path)
    train, *_ = opening.open_data(folder)
    policy = augment.Policy(size=16)
    (_, by_worker), = augment.load_centres(train, policy, [(0, np.arange(8))], CPU, 1)
    for k in range(8):
        image = train.image(k).permute(2, 0, 1)[None]
        centre = augment.resize_centre(image, policy).float()
        assert torch.equal(by_worker[k], augment.normalize(centre, policy)[0])


def test_images_that_are_all_the_same_are_noticed(tmp_path, capsys):
    """24 black pictures: a warning in epoch 1, though the loss is 0."""
    for i in range(24):
        Image.new("L", (70, 70)).save(tmp_path / f"{i}.png")
    assert here("simsiam.py", tmp_path, *TINY, "--out", tmp_path / "run") is None
    epochs = [record for record in log_of(tmp_path / "run") if record["event"] == "epoch"]
    assert [record["collapsed"] for record in epochs[1:]] == [True] * 3
    assert capsys.readouterr().out.count("collapsed: all outputs are (nearly) the same vector") == 1


@real
@slow
def test_deep_files_give_the_accuracy_of_8_bits(tmp_path):
    """Grey CIFAR-10, 1,000 + 400 images, in three depths: the cached protocol on the backbone in results/."""
    assert python(REAL / "unpack", tmp_path).returncode == 0
    rng = np.random.default_rng(0)
    writers = {"8": whole(np.uint8, 1), "12": DEEP["12 bits in 16"][1], "float": DEEP["fractions"][1]}
    for split, count in (("train", 100), ("val", 40)):
        for folder in sorted((tmp_path / "cifar10" / split).iterdir()):
            for path in rng.choice(sorted(folder.iterdir()), count, replace=False):
                g = np.asarray(Image.open(path).convert("L"))
                for depth, write in writers.items():
                    out = tmp_path / depth / split / folder.name
                    out.mkdir(parents=True, exist_ok=True)
                    write(out / f"{path.stem}.{'tif' if depth == 'float' else 'png'}", g)
    top1 = {}
    for depth in writers:
        out = tmp_path / f"out{depth}"
        options = ["--ckpt", ROOT / "results/cifar10-width4/backbone.pth", "--cached", "--out", out]
        assert here("lineval.py", tmp_path / depth, *options) is None
        top1[depth] = result_of(out)["top1"]
    assert top1["8"] > 35
    assert top1["12"] == pytest.approx(top1["8"], abs=1.5)
    assert top1["float"] == pytest.approx(top1["8"], abs=1.5)


# --- Bad files take no part where labels are used -----------------------------------------------------------

def red_and_blue(folder, side=70):
    """Two classes of noise, told apart by colour; blue's last validation file is cut in half."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 5)):
        for k, name in enumerate(("blue", "red")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                a = np.zeros((side, side, 3), np.uint8)
                a[..., 2 - 2 * k] = rng.integers(100, 256, (side, side))
                Image.fromarray(a).save(folder / split / name / f"{i}.png")
    cut = folder / "val/blue/4.png"
    cut.write_bytes(cut.read_bytes()[:cut.stat().st_size // 2])
    return folder


RANDOM = ["--ckpt", "random:resnet18", "--width", "1/8", "--size", "32"]


@pytest.mark.parametrize("side", [70, 32], ids=["files", "in memory"])
@pytest.mark.parametrize("protocol", ["--knn", "--cached"])
def test_a_bad_image_is_not_judged(tmp_path, side, protocol, capsys):
    """100% of 9, which colour decides; the tenth is named, and isn't among the saved features."""
    folder = red_and_blue(tmp_path / "data", side)
    more = ["--features", tmp_path / "f.npz", "--out", tmp_path / "out"]
    assert here("lineval.py", folder, *RANDOM, protocol, *more) is None
    printed = capsys.readouterr()
    result = result_of(tmp_path / "out")
    assert (result["top1"], result["val_images"], result["bad_images"]) == (100, 9, 1)
    assert "on the 9 good ones of 10 validation images" in printed.out
    assert "val/blue/4.png: can't be read" in printed.err
    saved = np.load(tmp_path / "f.npz")
    assert len(saved["val_features"]) == len(saved["val_labels"]) == len(saved["val_files"]) == 9
    assert not any(b"blue/4.png" in name for name in saved["val_files"])


def test_a_bad_training_image_does_not_vote_or_teach(tmp_path):
    """lars and sgd too: the counts in lineval.json, and a run that goes on."""
    folder = red_and_blue(tmp_path / "data")
    (folder / "train/red/3.png").write_bytes(b"")
    for protocol in ("--lars", "--sgd", "--knn"):
        out = tmp_path / protocol[2:]
        more = [] if protocol == "--knn" else ["--batch", "19", "--epochs", "2"]
        assert here("lineval.py", folder, *RANDOM, protocol, *more, "--out", out) is None
        result = result_of(out)
        assert (result["images"], result["val_images"], result["bad_images"]) == (19, 9, 2)


def test_a_stand_in_has_no_part_in_the_rank(tmp_path):
    """24 pictures without labels, 8 of them cut: the rank is that of the other 16 alone."""
    ranks = {}
    for name, bad in (("cut", True), ("gone", False)):
        folder = tmp_path / name
        folder.mkdir()
        for i in range(24):
            Image.fromarray(levels(i)).save(folder / f"{i:02}.png")
            if i % 3 == 2:
                (folder / f"{i:02}.png").unlink()
                if bad:
                    (folder / f"{i:02}.png").write_bytes(b"")
        assert here("simsiam.py", folder, *TINY, "--epochs", 1, "--out", tmp_path / f"run-{name}") is None
        ranks[name] = log_of(tmp_path / f"run-{name}")[1]["rank"]
    assert ranks["cut"] == pytest.approx(ranks["gone"], rel=0.05)
    assert ranks["cut"] != ranks["gone"]  # BN is calibrated on stand-ins too


def test_the_monitors_knn_judges_good_images_only(tmp_path):
    """Epoch 0's, of an untrained network: 100% of 9, in the log."""
    folder = red_and_blue(tmp_path / "data")
    assert here("simsiam.py", folder, *TINY, "--epochs", 1, "--out", tmp_path / "run") is None
    untrained = log_of(tmp_path / "run")[1]
    assert (untrained["knn"], untrained["knn_images"]) == (100, 9)


# --- What is said of bad files ------------------------------------------------------------------------------

def content(these):
    """Writes these bytes."""
    return lambda path: path.write_bytes(these)


def half(path):
    """The first half of a picture's file."""
    Image.fromarray(levels()).save(path)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def tiff(bands, kind, **options):
    """Writes a TIFF of so many bands."""
    return lambda path: write_tiff(path, np.zeros((8, 8, bands), kind), **options)


BAD = {  # id: (suffix, writes the file, a part of the line)
    "13 bands": (".tif", tiff(13, np.uint16), "13 bands of 16 bits: write 1, 3 or 4 bands"),
    "float RGB": (".tif", tiff(3, np.float32), "3 bands of floating point: write 1, 3 or 4 bands of 8 or 16"),
    "32 bits": (".tif", tiff(3, np.uint32), "3 bands of 32 bits: write"),
    "colours in planes": (".tif", tiff(3, np.uint16, planes=True),
                          "16 bits with each colour in a plane of its own: write them pixel by pixel"),
    "git-LFS": (".jpg", content(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
                "a git-LFS pointer: git lfs pull"),
    "a web page": (".jpg", content(b"<!DOCTYPE html><html>"), "a web page: download"),
    "heic": (".jpg", content(b"\0\0\0\x18ftypheic" + bytes(50)), "a HEIC picture, or a video: convert it"),
    "SVG": (".png", content(b"<svg width='9' height='9'/>"), "a drawing of lines (SVG)"),
    "PostScript": (".jpg", content(b"%!PS-Adobe-3.0\n"), "a PostScript program"),
    "a sound file": (".jpg", content(b"RIFF\x24\0\0\0WAVEfmt "), "nothing in it that an image begins with"),
    "half a GIF": (".gif", half, "mend it or take it away"),
    "empty": (".png", content(b""), "it is empty; mend it or take it away"),
    "195 million pixels": (".png", content(png(15_000, 13_000, 8, 2, b"")),
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


@pytest.mark.parametrize("name", ["is_deep", "raw_mode", "to_levels"])
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
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "x.png", pnginfo=text)
    assert images.read_image(os.fsencode(tmp_path / "x.png"))[0, 0].tolist() == [1, 2, 3]


# --- Small options ----------------------------------------------------------------------------------------

@slow
def test_views_are_the_pretrainings_or_told_to_be_others(tmp_path, large, capsys):
    """--size 32 on files: checkpoint.pth knows it, backbone.pth is told it, and both give the same."""
    assert here("simsiam.py", large, *TINY, "--size", 32, "--epochs", 1, "--out", tmp_path / "run") is None
    views = ["--mean", .485, .456, .406, "--std", .229, .224, .225, "--size", 32]
    for name, more in (("checkpoint", []), ("backbone", views)):
        out = tmp_path / name
        capsys.readouterr()
        options = [large, "--ckpt", tmp_path / f"run/{name}.pth", "--knn", "--out", out]
        assert here("lineval.py", *options, *more, "--features", tmp_path / f"{name}.npz") is None
        assert "views       32 pixels, mean 0.485 0.456 0.406" in capsys.readouterr().out
    given = result_of(tmp_path / "backbone")
    assert (given["size"], given["mean"], given["views_given"]) == (32, views[1:4], ["size", "mean", "std"])
    a, b = (np.load(tmp_path / f"{name}.npz") for name in ("checkpoint", "backbone"))
    assert np.array_equal(a["val_features"], b["val_features"])
    untold = ["--ckpt", tmp_path / "run/backbone.pth", "--knn", "--out", tmp_path / "untold"]
    assert here("lineval.py", large, *untold) is None
    printed = capsys.readouterr().out
    assert "224 pixels, mean 0.485 0.456 0.406, std 0.229 0.224 0.225 (of recipe imagenet" in printed


def test_features_of_images_without_labels(tmp_path):
    """Names and features of all good files."""
    for i in range(12):
        Image.fromarray(levels(i)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "05.png").write_bytes(b"")
    assert here("lineval.py", tmp_path, *RANDOM, "--features", tmp_path / "f.npz") is None
    saved = np.load(tmp_path / "f.npz")
    assert set(saved) == {"train_features", "train_files"}
    assert saved["train_features"].shape == (11, 64)
    names = [os.path.basename(os.fsdecode(name)) for name in saved["train_files"]]
    assert names == [f"{i:02}.png" for i in range(12) if i != 5]


@pytest.mark.parametrize("kind", ["small", "large"])
def test_vflip_turns_views_upside_down(kind, request):
    """At probability 1 each view is the mirror image of the view at 0, in memory and from files."""
    train, *_ = opening.open_data(request.getfixturevalue(kind))
    plain = augment.Policy(size=16, jitter=0, gray=0, blur=0)
    batches = [(0, np.arange(6))]
    views = [next(augment.load_views(train, policy, 0, batches, CPU, 0))[1]
             for policy in (plain, plain._replace(vflip=1.0))]
    for x, y in zip(*views):
        assert (x.flip(2) - y).abs().max() < 0.02
        assert (x - y).abs().max() > 0.1


def test_vflip_flips_half_of_the_views_and_changes_no_other_draw():
    """At 0.5: the share of 2,000 views; boxes and horizontal flips against those without."""
    index = np.arange(2000)
    policies = augment.Policy(vflip=0.5), augment.Policy()
    with_it, without = (augment.draw_crop(policy, 0, 0, index, index * 0, 90, 90) for policy in policies)
    assert 0.46 < with_it.vflip.mean() < 0.54
    assert not without.vflip.any()
    assert 0.2 < (with_it.vflip & with_it.flip).mean() < 0.3
    for a, b in zip(with_it[:5], without[:5]):
        assert np.array_equal(a, b)


def test_every_nth_checkpoint_is_kept(tmp_path, small):
    """--keep-every 2 of 3 epochs: one file, with the weights after 2."""
    assert here("simsiam.py", small, *TINY, "--keep-every", 2, "--out", tmp_path / "run") is None
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-0*.pth"))
    assert kept == ["checkpoint-0002.pth"]
    content = torch.load(tmp_path / "run/checkpoint-0002.pth", weights_only=True)
    assert (content["epoch"], content["step"]) == (1, 3)
    assert lineval.read_backbone(str(tmp_path / "run/checkpoint-0002.pth")).epochs is not None


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


@pytest.mark.parametrize("height, width", [(40, 160), (160, 40), (70, 100), (33, 130)])
def test_ordinary_shapes_are_resized_whole(height, width):
    """Up to four times as long as wide: the same as resizing all of it, and cutting then."""
    image = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
    size = [side * 256 // min(height, width) for side in (height, width)]
    resized = torch.nn.functional.interpolate(image, size, mode="bilinear", antialias=True)
    top, left = (round((side - 224) / 2) for side in size)
    expected = resized[:, :, top:top + 224, left:left + 224]
    assert torch.equal(augment.resize_centre(image, augment.Policy()), expected)


def test_the_middle_of_a_strip_is_what_is_seen():
    """A strip with one bright column in its middle: it is in the middle of the view."""
    image = torch.zeros(1, 3, 12, 3001, dtype=torch.uint8)
    image[..., 1500] = 255
    view = augment.resize_centre(image, augment.Policy()).float()
    columns = view.sum(dim=(0, 1, 2))
    centre = (columns * torch.arange(224)).sum() / columns.sum()
    assert centre.item() == pytest.approx(111.5, abs=1)
