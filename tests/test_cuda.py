"""What only runs on a GPU, tested on a CPU. No test reaches NCCL or cuDNN; tests/drills/gpu.py does."""
import io
import itertools
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import augment
from harness.common.errors import Refused
from harness.data.cifar import CLASSES
from harness.data.opening import open_data
from harness.training import batchnorm, processes
from tests.drills import quarter
from tests.helpers import ROOT, TINY, tiny_model, torchrun

pytest_plugins = ["tests.fixtures"]
CUDA = torch.device("cuda", 0)


def test_views_do_not_depend_on_the_pieces_in_which_a_cpu_makes_them(monkeypatch):
    """A GPU works on all images at once: the same bits."""
    def one_piece(images, start, end):
        return [slice(start, end)] if start < end else []

    policy = augment.Policy(size=40)
    torch.manual_seed(0)
    images = torch.randint(256, (200, 3, 40, 40), dtype=torch.uint8)
    changes = augment.draw_colour(policy, 0, 0, np.arange(200), 0)
    assert len(augment.pieces(images, 0, 200)) > 1
    by_pieces = augment.photometric(images, changes, policy)
    monkeypatch.setattr(augment, "pieces", one_piece)
    assert torch.equal(augment.photometric(images, changes, policy), by_pieces)


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    """The second process takes the second of two GPUs, without TF32. A machine with one GPU is refused."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    torch.backends.cuda.matmul.allow_tf32 = True
    assert processes.own_gpu() == torch.device("cuda", 1)
    assert not torch.backends.cuda.matmul.allow_tf32
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(Refused, match="2 processes on this machine, but 1 GPUs"):
        processes.own_gpu()


def tensors_of(model):
    """[(name, which object)] of its parameters and buffers."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [(name, id(t)) for name, t in tensors]


@pytest.mark.parametrize("device, compiled, bn", [
    ("cuda", False, torch.nn.SyncBatchNorm),
    ("cuda", True, batchnorm.SyncBatchNorm),
    ("cpu", False, batchnorm.SyncBatchNorm),
])
def test_a_network_gets_the_bn_that_its_device_needs(device, compiled, bn):
    """torch's on a GPU, ours elsewhere and to be compiled. Parameters and buffers stay what they were: the
    same objects, under the same names, in the same order."""
    model = tiny_model()
    before = tensors_of(model)
    assert batchnorm.synchronize(model, torch.device(device), compiled) is model
    assert tensors_of(model) == before
    norms = [m for m in model.modules() if hasattr(m, "running_mean")]
    assert {type(m) for m in norms} == {bn}


def test_compiled_the_synchronised_bn_is_part_of_one_graph(world_of_one):
    """Several GPUs with --compile: the network is one graph, and computes what it does uncompiled."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 4, 3)
    network = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(4), torch.nn.ReLU()).double()
    batchnorm.synchronize(network, CUDA, compiled=True)
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    plain = network(x)
    compiled = torch.compile(network, backend="eager", fullgraph=True)(x)
    assert torch.allclose(compiled, plain)
    compiled.sum().backward()
    assert conv.weight.grad is not None
    torch._dynamo.reset()


def test_nobody_leaves_before_the_checkpoint_is_written(tmp_path, small):
    """Two processes whose sums come as late as NCCL's: process 1 leaves behind process 0's last checkpoint.
    And both have made the same sums in the same order, of tensors that NCCL takes."""
    arguments = [tmp_path, small, *TINY, "--workers", "0", "--batch", "10", "--knn-every", "0"]
    done = torchrun("-m", "tests.recorded", *arguments, "--out", tmp_path / "run", cwd=ROOT)
    assert "stopped by a signal after epoch 0, step 2" in done.stderr, done.stderr
    files = filter(os.path.isfile, tmp_path.iterdir())
    told = {path.name: json.loads(path.read_text()) for path in files}
    assert told["left-1"] > told["saved-0"]
    assert told["sums-0"] == told["sums-1"]
    assert len(told["sums-0"]) > 100
    for dtype, _, device, is_contiguous in told["sums-0"]:
        assert dtype in ("torch.float32", "torch.float64", "torch.int64")
        assert device == "cpu"
        assert is_contiguous


def test_the_archive_is_unpacked_in_memory_and_the_backbone_comes_in_parts(tmp_path, monkeypatch):
    """A tar of grey images, 20 a class, of which every second is taken; 25 bytes in parts of 9."""
    with tarfile.open(tmp_path / "archive.tar", "w") as tar:
        for split, name, number in itertools.product(("train", "val"), CLASSES, range(20)):
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), (number, number, number)).save(buffer, "png")
            member = tarfile.TarInfo(f"{split}/{name}/{number:02}.png")
            member.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(member, buffer)
    quarter.unpack(tmp_path / "archive.tar", tmp_path / "cifar", 2)
    expected = [(label, level) for label in range(10) for level in range(0, 20, 2)]
    for source in open_data(tmp_path / "cifar")[:2]:
        levels = source.pixels[:, 0, 0, 0].tolist()
        assert sorted(zip(source.labels.tolist(), levels)) == expected
    monkeypatch.setattr(quarter, "PART", 9)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/backbone.pth").write_bytes(b"the weights of a backbone")
    quarter.copy(tmp_path, tmp_path / "out")
    parts = sorted((tmp_path / "out").glob("backbone.pth.*"))
    assert len(parts) == 3
    assert b"".join(part.read_bytes() for part in parts) == b"the weights of a backbone"
