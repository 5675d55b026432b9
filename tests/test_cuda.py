"""What runs on a GPU alone, run here on a CPU: each branch that tells the devices apart, through stand-ins.

No test reaches NCCL, cuDNN or a kernel. What torch has for SyncBatchNorm is in tests/cuda_kernels.py, and
tests/test_processes.py compares it with one process.
"""
import json
import math

import numpy as np
import pytest
import torch

import augment
import simsiam
from harness.common import machine
from harness.common.errors import Refused
from harness.data import loading
from harness.training import processes
from harness.training.batchnorm import synchronize
from tests import cuda_kernels
from tests.helpers import CPU, ROOT, TINY, tiny_model, torchrun

pytest_plugins = ["tests.fixtures"]
CUDA = torch.device("cuda", 0)


# --- Numbers and images on their way ------------------------------------------------------------------------

class OnAGpu:
    """Numbers on a GPU: their copy has nothing in it until somebody waits for the event."""
    is_cuda = True

    def __init__(self, numbers):
        self.numbers = torch.tensor(numbers)
        self.copy = torch.full_like(self.numbers, math.nan)

    def to(self, where, non_blocking):
        assert (where, non_blocking) == ("cpu", True)
        return self.copy


def test_numbers_are_read_when_their_event_has_come(monkeypatch):
    """Against a stand-in of the event, which is recorded behind the copy."""
    on_gpu = OnAGpu([1.5, -2.0])

    class Event:
        def record(self):
            self.recorded = True

        def synchronize(self):
            assert self.recorded
            on_gpu.copy.copy_(on_gpu.numbers)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    on_their_way = machine.OnTheirWay(on_gpu)
    assert on_gpu.copy.isnan().all()
    assert on_their_way.read() == [1.5, -2.0]


def test_an_array_goes_to_a_gpu_from_pinned_memory(monkeypatch):
    """From other memory the copy would wait for all that the GPU has to do."""
    pinned = []

    class Pinned:
        def __init__(self, t):
            self.t = t

        def to(self, device, non_blocking):
            pinned.append((device, non_blocking))
            return self.t

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: Pinned(t))
    for device in (CUDA, "cuda"):
        assert machine.to_device(np.arange(3), device).tolist() == [0, 1, 2]
    assert pinned == [(CUDA, True), ("cuda", True)]


def test_batches_from_workers_are_pinned_for_a_gpu(monkeypatch):
    """What the loader is asked for, and how its batches are sent on."""
    asked = []
    sent = []

    class View:
        def to(self, device, non_blocking):
            sent.append((device, non_blocking))
            return self

    class Loader:
        def __init__(self, *args, pin_memory, **more):
            asked.append(pin_memory)

        def __iter__(self):
            yield 1, np.arange(2), True, [View(), View()], {}

    class Noting:
        files = ()
        value_range = None

        def note(self, bad):
            assert bad == {}

    monkeypatch.setattr(torch.utils.data, "DataLoader", Loader)
    for device in (CUDA, CPU):
        (_, index, views), = loading.decode(Noting(), None, [], device, 0)
        assert len(views) == 2
    assert asked == [True, False]
    assert sent == 2 * [(CUDA, True)] + 2 * [(CPU, True)]


# --- Views --------------------------------------------------------------------------------------------------

def test_views_do_not_depend_on_the_pieces_in_which_a_cpu_makes_them(monkeypatch):
    """A GPU works on all images at once: the same bits."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (200, 3, 40, 40), np.uint8))
    changes = augment.draw_colour(augment.Policy(size=40), 0, 0, np.arange(200), 0)
    assert len(augment.pieces(images, 0, 200)) > 1
    by_pieces = augment.photometric(images, changes, augment.Policy(size=40))

    class OfGpu:
        """What pieces() asks of images on a GPU."""
        device = CUDA

        def __len__(self):
            return 200

    assert augment.pieces(OfGpu(), 0, 200) == [slice(0, 200)]
    assert augment.pieces(OfGpu(), 7, 7) == []
    plain = augment.pieces
    monkeypatch.setattr(augment, "pieces", lambda x, start, end: plain(OfGpu(), start, end))
    assert torch.equal(augment.photometric(images, changes, augment.Policy(size=40)), by_pieces)


# --- Joining, distributing ----------------------------------------------------------------------------------

@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with two GPUs, on paper, for the second of two processes. -> what has been asked of torch"""
    asked = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.update(device=device))
    monkeypatch.setattr(processes, "new_store_for_this_start", lambda: ("store", 1, 2))
    monkeypatch.setattr(torch.distributed, "init_process_group",
                        lambda backend, **more: asked.update(backend=backend, **more))
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
             "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    torch.backends.cuda.matmul.allow_tf32 = True
    yield asked
    torch.backends.cuda.matmul.allow_tf32 = False  # as torch has it
    torch.backends.cudnn.benchmark = False


def test_each_process_takes_a_gpu_of_its_own(two_gpus, monkeypatch):
    """The second process the second; NCCL, cuDNN's trials, and no TF32 where views are made."""
    device, rank, world = processes.join_world(torch.device("cuda"))
    assert (device, rank, world) == (torch.device("cuda", 1), 1, 2)
    assert two_gpus["device"] == device
    assert two_gpus["backend"] == "nccl"
    assert two_gpus["timeout"] == processes.PATIENCE
    assert torch.backends.cudnn.benchmark
    assert not torch.backends.cuda.matmul.allow_tf32
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(Refused, match="2 processes on this machine, but 1 GPUs"):
        processes.join_world(torch.device("cuda"))


@pytest.mark.parametrize("device, compiled, bn", [
    (CUDA, False, "FusedSyncBatchNorm"),
    (CUDA, True, "SyncBatchNorm"),
    (CPU, False, "SyncBatchNorm"),
], ids=["cuda", "cuda, compiled", "cpu"])
def test_a_network_is_distributed_as_its_device_needs(monkeypatch, device, compiled, bn):
    """Which BN it gets."""
    told = {}

    class Recorder:
        def __init__(self, model, **options):
            told.update(options, model=model)

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", Recorder)
    network = simsiam.distribute(tiny_model(), device, compiled)
    assert not network.broadcast_buffers
    norms = [m for m in told["model"].modules() if hasattr(m, "running_mean")]
    assert {type(m).__name__ for m in norms} == {bn}


def test_the_bn_of_gpus_in_one_process_is_torchs_plain_one():
    """Values, gradients and running statistics, with and without an affine part, in both modes."""
    cuda_kernels.make_known()
    processes.join_world(CPU)
    try:
        torch.manual_seed(0)
        x = torch.randn(8, 5, 3, 3).to(memory_format=torch.channels_last)
        for affine in (True, False):
            plain = torch.nn.BatchNorm2d(5, affine=affine, momentum=None)
            ours = torch.nn.BatchNorm2d(5, affine=affine, momentum=None)
            synchronize(ours, CUDA)
            gradients = []
            for layer in (plain, ours):
                inner = x.clone().requires_grad_()
                layer(inner).sin().sum().backward()
                layer.eval()
                layer(inner).cos().sum().backward()
                gradients.append([inner.grad, *(w.grad for w in layer.parameters()), layer.running_mean,
                                  layer.running_var])
            for a, b in zip(*gradients, strict=True):
                assert torch.allclose(a, b, atol=1e-5)
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_the_synchronised_bn_is_part_of_one_graph():
    """Several GPUs with --compile: the network is one graph, and computes what it does uncompiled."""
    processes.join_world(CPU)
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    try:
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(3, 4, 3)
        network = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.BatchNorm2d(4))
        synchronize(network, CUDA, compiled=True)
        x = torch.randn(5, 3, 8, 8)
        plain = network(x)
        compiled = torch.compile(network, backend=backend)
        assert torch.allclose(compiled(x), plain, atol=1e-6)
        compiled(x).sum().backward()
        assert len(graphs) == 1
        assert conv.weight.grad is not None
    finally:
        torch.distributed.destroy_process_group()
        torch._dynamo.reset()


# --- What is said of the machine, and chosen by it ----------------------------------------------------------

def test_what_is_said_of_a_gpu(monkeypatch):
    """Its name, its memory, the precision."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 20)
    assert machine.peak_memory(CUDA) == 3
    said = {amp: machine.hardware({"amp": amp, "workers": 5}, CUDA) for amp in (True, False)}
    assert said[True] == "a GPU, bf16 autocast, 5 workers"
    assert said[False] == "a GPU, float32 (convolutions TF32; --amp takes less time), 5 workers"
    assert machine.bf16_pays("cuda", 1 / 64)
    narrow = torch.nn.Module()
    narrow.conv1 = torch.nn.Conv2d(3, 8, 3)
    assert machine.fastest_layout(narrow, CUDA) == torch.channels_last
    assert machine.fastest_layout(narrow, CPU) == torch.contiguous_format


@pytest.mark.parametrize("is_there", [True, False])
def test_a_gpu_is_taken_where_there_is_one(monkeypatch, is_there):
    """--device by default."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
    assert simsiam.parse([]).device == ("cuda" if is_there else "cpu")


# --- Sums that come late ------------------------------------------------------------------------------------

def test_nobody_leaves_before_the_checkpoint_is_written(tmp_path, small):
    """Two processes whose sums come as late as NCCL's: process 1 leaves behind process 0's last checkpoint.
    And both have made the same sums in the same order, of tensors that NCCL takes."""
    arguments = [tmp_path, small, *TINY, "--epochs", "9", "--workers", "0", "--batch", "10"]
    done = torchrun("-m", "tests.recorded", *arguments, "--out", tmp_path / "run", cwd=ROOT)
    assert "stopped by a signal" in done.stderr, done.stderr
    told = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir() if path.is_file()}
    assert told["left-1"] > told["saved-0"]
    assert told["sums-0"] == told["sums-1"]
    assert len(told["sums-0"]) > 100
    for _, dtype, _, device, is_contiguous in told["sums-0"]:
        assert dtype in ("torch.float32", "torch.float64", "torch.int64", "torch.uint8")
        assert device == "cpu"
        assert is_contiguous
