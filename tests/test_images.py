"""harness, images.py, augment.py --check: odd files become RGB or are bad; a bad one is replaced."""
import errno
import io
import os
import re
import shutil
import sys
import types

import numpy as np
import PIL.Image
import pytest
import torch
from PIL import Image

import augment
from harness.common import files
from harness.common.errors import Away, BadImage, Refused, printable
from harness.data import images, loading
from harness.data.opening import find_data, open_data
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


@pytest.mark.parametrize("reading", [images.pillow_reads(b"x.png"), files.refusing("x.pth", "damaged")])
def test_a_lack_of_memory_is_no_fault_of_the_file(reading):
    """It isn't called bad or damaged."""
    with pytest.raises(MemoryError), reading:
        raise MemoryError


def test_a_bad_image_is_replaced_by_the_next_good_one_and_named_once(tmp_path, capsys):
    """Which image comes in whose place, by a list written by hand; the last one's next is the first.

    The lines on stderr, and the source's own record, have the three that are bad.
    """
    source = bad_levels(tmp_path, bad=(1, 2, 5))
    for _ in range(2):
        shown = [source.image(i).max().item() for i in range(6)]
        assert shown == [0, 30, 30, 30, 40, 0]
    line = r"bad image, not used \(.*?\): .*/(\d+).png: can't be read .*\n"
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


def as_it_is(image, epoch, i):
    """One "view" of an image: itself."""
    return [image.permute(2, 0, 1)]


def test_a_file_that_is_away_for_longer_is_not_bad_for_ever(tmp_path, monkeypatch, world_of_one, capsys):
    """It is replaced and counted, with the one that is damaged, until it is read."""
    monkeypatch.setattr(images, "WAITS", ())
    source = bad_levels(tmp_path, bad=[1])
    file = tmp_path / "003.png"
    file.rename(tmp_path / "away")
    assert source.image(1).max() == 20
    assert source.image(3).max() == 40
    assert f"{file}: can't be read (No such file or directory)\n" in capsys.readouterr().err
    assert share_bad(source, CPU) == [1, 3]
    (tmp_path / "away").rename(file)
    batches = [(0, np.array([1, 3]))]
    (_, _, [levels]), = loading.decode(source, as_it_is, 192, batches, CPU, 0)
    assert levels.amax((1, 2, 3)).tolist() == [20, 30]
    assert share_bad(source, CPU) == [1]
    assert "002.png" not in capsys.readouterr().err


def test_files_that_were_away_are_not_left_out_later(tmp_path, large, monkeypatch, capsys):
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
    assert "can't be read (No such file or directory)" in capsys.readouterr().err
    one, two = log_of(tmp_path / "run")[2:4]
    assert one["bad_images"] == two["bad_images"] == 0


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
    options = [data, *TINY, *"--batch 6 --epochs 1 --size 24 --workers 0".split(), "--out", tmp_path / "run"]

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
    printed, told = capsys.readouterr()
    assert "\n1 further frames or bands in 1 files are not read\n" in told  # animated.webp
    named = re.findall(r"^.*/odd/(.*?): can't be read as an image: .*\n", printed, re.M)
    assert sorted(named) == sorted(bad)
    assert printed.count("\n") == len(bad)


BANDS = {  # id: (mode, how it is written), frames and bands that are not read
    "a satellite's, in a TIFF": ("RGBA", ".tif", 2),  # of GDAL: the fourth is called transparency
    "for print": ("CMYK", ".tif", 0),
    "with transparency": ("RGBA", ".png", 0),
}


@pytest.mark.parametrize("mode, suffix, count", BANDS.values(), ids=BANDS)
def test_bands_after_the_third_are_told(tmp_path, mode, suffix, count):
    """In a note; those of two files. So is what is transparent."""
    for i in range(2):
        Image.new(mode, (70, 72), (1, 2, 3, 4)).save(tmp_path / f"{i}{suffix}")
    told = f"{count} frames after the first, or bands after the third, are not read (in a sample)"
    clear = "2 images (in a sample) have transparent parts, where hidden colours show"
    notes = "; ".join(open_data(tmp_path).found.notes)
    assert (told in notes) == (count > 0)
    assert (clear in notes) == (suffix == ".png")


def test_damage_in_a_transparent_image_is_left_to_its_reader(tmp_path):
    """The start looks for transparent parts, and passes it over."""
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (70, 72, 4), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    content = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(content[:len(content) // 2])
    notes = "; ".join(open_data(tmp_path).found.notes)
    assert "2 images (in a sample) have transparent parts" in notes


# --- Files that aren't pictures, and lists ------------------------------------------------------------------

DICOM = bytes(128) + b"DICM" + bytes(100)
FORMATS = {  # {name: content}, DATA, a part of the line
    "a volume": ({"x/a.nii.gz": b"\x1f\x8b"}, "x/a.nii.gz", ".nii: a medical image; SimpleITK."),
    "volumes": ({"x/a.nii.gz": b"\x1f\x8b"}, "x", "(1 file: 1 .nii); .nii: a medical image"),
    "DICOM without a suffix": ({"x/IM0001": DICOM}, "x/IM0001", ".dcm: a medical image"),
    "DICOM by its number": ({"x/1.2.840.37": DICOM, "x/IM1": DICOM}, "x", "(2 files: 2 .dcm); .dcm: a"),
    "a slide": ({"x/a.ndpi": b"II"}, "x", ".ndpi: a whole slide; vips dzsave FILE FOLDER"),
    "a microscope's": ({"x/a.nd2": b""}, "x/a.nd2", ".nd2: a microscope's file; bfconvert FILE"),
    "Zarr": ({"x.zarr/.zarray": b"{}", "x.zarr/0.0": b"\0"}, "x.zarr", "x.zarr: .zarr: arrays; scale"),
    "Zarr inside": ({"x/a.zarr/0.0": b"\0"}, "x", "(1 file: 1 .zarr); .zarr: arrays; scale"),
    "FFCV": ({"x/train.beton": b"\0"}, "x/train.beton", ".beton: a container of records; write its images"),
    "TFDS": (
        {"x/a.tfrecord-00000-of-00001": b"", "x/dataset_info.json": b"{}", "x/features.json": b"{}"},
        "x", "(3 files: 2 .json, 1 .tfrecord); .tfrecord: a container of records"),
    "MNIST": ({"x/t10k-images-idx3-ubyte.gz": b""}, "x", "(1 file: 1 .ubyte); .ubyte: arrays"),
    "a camera's raw files": ({"x/1.CR2": b"", "x/1.xmp": b""}, "x", ".cr2: not an image format that we read"),
    "no suffix": (
        {"x/1": b"\x89PNG", "x/2": b""}, "x",
        "give a folder of files that end in .jpg, .png, ...; a list takes those without an ending, too"),
    "Food-101's list": ({"x/train.txt": b"ribs/1\n"}, "x/train.txt", "must be a path alone, with its ending"),
}


def refused_data(path):
    """Why DATA is refused."""
    with pytest.raises(Refused) as refused:
        find_data(path)
    return str(refused.value)


@pytest.mark.parametrize("case", FORMATS)
def test_a_file_that_is_no_picture_is_told_by_what_it_is(tmp_path, case):
    """Against the table."""
    files, data, message = FORMATS[case]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert message in refused_data(tmp_path / data)


def advised(said):
    """The two pieces of code in a line: what reads a file, if there is one, and what writes a picture."""
    return re.fullmatch(r".*?(SimpleITK\..*\))?[^()]*(PIL\.Image\.fromarray\(.*\))", said).groups()


def run_advice(write, name, a):
    """Type the advised line, with a name and an array."""
    exec(write.replace("NAME", str(name)), {"PIL": PIL, "a": a})


@pytest.mark.parametrize("shape", [(70, 72), (70, 72, 3)])
@pytest.mark.parametrize("kind", ["float32", "float64", "uint8", "int64"])
def test_what_is_advised_for_arrays_works(tmp_path, shape, kind):
    """Scaled to 0 to 255, and then as the line says."""
    a = (np.arange(np.prod(shape)) % 256).reshape(shape).astype(kind)
    np.save(tmp_path / "x.npy", a)
    said = refused_data(tmp_path / "x.npy")
    assert "scale each picture a, (H, W) or (H, W, 3), to values from 0 to 255" in said
    _, write = advised(said)
    run_advice(write, tmp_path / "0", a)
    read = find_data(tmp_path).train.image(0).numpy()
    assert (read.T == a.T).all()  # grey has three equal channels


def test_what_is_advised_for_medical_images_works(tmp_path):
    """With a stand-in for SimpleITK, which the tests don't need: one range for all slices."""
    (tmp_path / "x.nii.gz").write_bytes(b"")
    volume = np.linspace(-1000, 3000, 20_160).reshape(4, 70, 72)
    reader = types.SimpleNamespace(ReadImage=str, GetArrayFromImage=lambda image: volume)
    read, write = advised(refused_data(tmp_path / "x.nii.gz"))
    for i, a in enumerate(eval(read, {"SimpleITK": reader})):
        run_advice(write, tmp_path / str(i), a)
    train = find_data(tmp_path).train
    assert train.value_range == pytest.approx((-1000, 3000), abs=1)
    assert train.image(3).max() == 255
    assert train.image(3).min() > train.image(1).max()


def brightest(source):
    """The highest level in each image."""
    return [source.image(i).max() for i in range(len(source))]


LISTS = {  # what is on a line, where the shell is
    "as Windows writes it": ("pictures\\{}.png", "."),
    "from the shell's folder on": ("deep/pictures/{}.png", ".."),
    "both": (".\\deep\\pictures\\{}.png", ".."),
}


@pytest.mark.parametrize("line, shell", LISTS.values(), ids=LISTS)
def test_a_list_is_read_as_it_was_meant(tmp_path, monkeypatch, line, shell):
    """The list lies in deep/, the pictures in deep/pictures/."""
    folder = tmp_path / "deep"
    (folder / "pictures").mkdir(parents=True)
    source = bad_levels(folder / "pictures")
    (folder / "list.txt").write_text("".join(f"{line.format(f'{i:03}')}\r\n" for i in range(6)))
    monkeypatch.chdir(folder / shell)
    train = find_data(folder / "list.txt").train
    assert brightest(train) == brightest(source)


def test_no_list_is_half_relative_to_one_folder_and_half_to_another(tmp_path, monkeypatch):
    """One picture beside the list, the other in the shell's folder: the one that is missing is named."""
    for name in ("list", "shell"):
        (tmp_path / name).mkdir()
    (tmp_path / "list/x.png").write_bytes(b"")
    (tmp_path / "shell/y.png").write_bytes(b"")
    (tmp_path / "list/list.txt").write_text("x.png\ny.png\n")
    monkeypatch.chdir(tmp_path / "shell")
    assert "'y.png' is not a file" in refused_data(tmp_path / "list/list.txt")
