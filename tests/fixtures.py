"""The fixtures: data sets and runs, each made once for all tests. No test may change them."""
import functools
import io
import os
import signal
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import simsiam
from harness.data import shapes
from harness.training import processes
from tests import children
from tests.helpers import CPU, EVALUATION, LONGER, PROTOCOL_OPTIONS, REAL, ROOT, TINY
from tests.helpers import here, program, save_image, settings_of, torchrun, write_folder


def pytest_configure(config):
    """Torch warns that decoded images are read-only. The programs silence that, but pytest resets it.

    The tests' networks are too small for two threads, which would also wait for any other busy process. And
    the server of our children can start while the tests are collected.

    Behind a shell's & SIGINT is ignored, which our children would inherit; they are sent it.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("filterwarnings", "ignore:The given NumPy array is not writable")
    if os.environ.setdefault("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(1)
    children.start_server()


def real_photos():
    """Four photographs from the folder next to the repository."""
    photos = []
    with tarfile.open(REAL / "imagenet-sample.tar") as tar:
        for member in [m for m in tar if m.isfile()][:4]:
            photo = Image.open(io.BytesIO(tar.extractfile(member).read()))
            photos.append(np.array(photo.convert("RGB")))
    return photos


def drawn_photos():
    """Four stand-ins for photographs: drawn shapes under smooth noise."""
    rng = np.random.default_rng(0)
    photos = []
    sizes = (500, 375), (500, 333), (375, 500), (320, 240)
    for i, size in enumerate(sizes):
        width, height = size
        shape = shapes.draw_shapes(0, i, 1, 64).image(0).numpy()
        noise = rng.bytes(height // 8 * (width // 8) * 3)
        noise = np.frombuffer(noise, np.uint8).reshape(height // 8, width // 8, 3)
        shape = Image.fromarray(shape).resize(size, Image.Resampling.BICUBIC)
        noise = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
        photos.append(np.array(Image.blend(shape, noise, 0.4)))
    return photos


@pytest.fixture(scope="session")
def photos():
    """Four photographs, (H, W, 3) uint8: real ones if there are any."""
    return real_photos() if REAL.is_dir() else drawn_photos()


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A labelled folder of 16-pixel images, held in memory: 50 to train, 9 to validate."""
    folder = tmp_path_factory.mktemp("data") / "small"
    write_folder(folder, "train", 50, 16)
    return write_folder(folder, "val", 9, 16, start=500)


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    """A labelled folder of images of several sizes, decoded by workers: 20 to train, 6 to validate."""
    folder = tmp_path_factory.mktemp("data") / "large"
    write_folder(folder, "train", 20, (70, 80, 91), suffix=".jpg")
    return write_folder(folder, "val", 6, (70, 80), start=500, suffix=".jpg")


@pytest.fixture(scope="session")
def ten(tmp_path_factory):
    """A labelled folder with ten classes: 80 training and 37 validation images of 16 pixels."""
    folder = tmp_path_factory.mktemp("data") / "ten"
    for split, first, count in (("train", 0, 80), ("val", 800, 37)):
        drawn = shapes.draw_shapes(3, first, count, 16)
        for i in range(count):
            name = drawn.classes[drawn.labels[i]]
            save_image(folder / split / name / f"{i:03}.png", drawn.image(i))
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory, small):
    """The folder of an uninterrupted run on `small`, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = program(small, *TINY, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture(scope="session")
def longer(tmp_path_factory, small):
    """The folder of an uninterrupted run of LONGER in two processes."""
    out = tmp_path_factory.mktemp("longer") / "two"
    two = torchrun(ROOT / "simsiam.py", small, *LONGER, "--out", out)
    assert two.returncode == 0, two.stderr
    return out


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Released heads on a narrow ResNet-50: a folder with its checkpoint.pth and both exports; the model."""
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    model = simsiam.SimSiam("resnet50", width=1 / 64, dim=6, pred_dim=3, proj_hidden=5)
    for t in model.state_dict().values():
        if t.is_floating_point():
            t.add_(torch.rand_like(t))
    checkpoint = {
        "format": 1,
        "model": model.state_dict(),
        "epoch": 6,
        "step": 9,
        "settings": settings_of("imagenet", width=1 / 64),
    }
    torch.save(checkpoint, folder / "checkpoint.pth")
    for layout in ("torchvision", "released"):
        assert here("lineval.py", "--ckpt", folder / "checkpoint.pth", "--export", layout) is None
    return folder, model


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory, ten):
    """A function: protocol -> the folder of its evaluation of an untrained network on `ten`, made once."""

    @functools.cache
    def evaluate(protocol):
        out = tmp_path_factory.mktemp("evaluated") / protocol
        arguments = [*EVALUATION, *PROTOCOL_OPTIONS[protocol], "--features", out.parent / "features.npz"]
        assert here("lineval.py", ten, *arguments, "--out", out) is None
        return out

    return evaluate


@pytest.fixture
def world_of_one():
    """This process alone as a process group."""
    processes.join_world(CPU)
    yield
    torch.distributed.destroy_process_group()
