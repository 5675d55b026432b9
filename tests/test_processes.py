"""harness/training, processes, batchnorm, per_image: several processes do what one does, or say why not."""
import datetime
import re
import shlex

import numpy as np
import pytest
import torch
from torch import nn

from harness.training import batchnorm, processes
from tests import world
from tests.helpers import CPU, ROOT, TINY, free_port, here, log_of, refusal, slow, start, torchrun
from tests.helpers import write_folder

pytest_plugins = ["tests.fixtures"]


# --- torchrun ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", autouse=True)
def by_torchrun(tmp_path_factory, small):
    """torchrun itself, its folder, and the options without it. It works while the other tests do."""
    out = tmp_path_factory.mktemp("torchrun") / "two"
    options = [small, *TINY, "--epochs", "1", "--batch", "24", "--out"]
    launcher = shlex.split("-m torch.distributed.run --standalone --nproc-per-node 2")
    with start(*launcher, ROOT / "simsiam.py", *options, out) as process:
        yield process, out, options


# --- Two processes and one, in float64 ----------------------------------------------------------------------

@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Everything in tests/world.py, done by two processes."""
    folder = tmp_path_factory.mktemp("two")
    out = torchrun("-m", "tests.world", folder, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    assert "Warning" not in out.stderr
    return torch.load(folder / "result")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Everything in tests/world.py, done by this process."""
    processes.join_world(CPU)
    result = world.everything(tmp_path_factory.mktemp("one"), ["right"])
    torch.distributed.destroy_process_group()
    return torch.load(result)


def test_two_processes_equal_one_in_float64(one, two):
    """Weights, statistics, loss and std after three steps, to rounding errors that the steps enlarge."""
    state, numbers = one["right"]
    their_state, their_numbers = two["right"]
    assert state.keys() == their_state.keys()
    for name, t in state.items():
        assert torch.allclose(their_state[name], t, rtol=1e-7, atol=1e-9), name
    assert torch.allclose(their_numbers, numbers, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("variant", ["local-bn", "local-lr", "wrong-sampler"])
def test_what_people_got_wrong_with_two_processes_is_seen(one, two, variant):
    """Loss and std of the first steps, against one process."""
    _, numbers = one["right"]
    _, wrong = two[variant]
    assert (wrong - numbers[:len(wrong)]).abs().max() > 1e-4


def test_eta_is_spread_over_the_processes_without_a_difference(one, two):
    """PerImageVectors in two processes and in one against an array in numpy."""
    rng = np.random.default_rng(0)
    kept = np.zeros((11, 3), np.float32)
    seen = []
    for _ in range(6):
        index = rng.permutation(11)[:4]
        seen.append(kept[index].sum(axis=0, dtype=np.float64))
        kept[index] = rng.normal(size=(4, 3))
    assert np.abs(seen).sum() > 1
    for found in (one["vectors"], two["vectors"]):
        assert np.array_equal(found["vectors"], kept)
        assert np.allclose(found["seen"], seen, atol=1e-6)  # a sum of four float32 numbers of size 2
        assert found["equal"] == 1


# --- BN over the processes, in a world of one ---------------------------------------------------------------

def synchronized(**options):
    """A BN of five channels as it is on a CPU."""
    return batchnorm.synchronize(nn.BatchNorm2d(5, **options), CPU)


@pytest.mark.parametrize("affine, momentum", [(True, 0.1), (False, None)])
def test_synchronised_bn_of_one_process_is_torchs(world_of_one, affine, momentum):
    """Values, gradients and running statistics in float64, in train and in eval mode."""
    options = {"affine": affine, "momentum": momentum}
    torch.manual_seed(0)
    x = torch.randn(8, 5, 3, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
    found = []
    for layer in (nn.BatchNorm2d(5, **options).double(), synchronized(**options).double()):
        inner = x.clone().requires_grad_()
        trained = [layer(inner), layer(2 * inner)]
        sum(trained).sin().sum().backward()
        layer.eval()
        evaluated = layer(inner)
        evaluated.cos().sum().backward()
        gradients = [inner.grad, *(w.grad for w in layer.parameters())]
        found.append([*trained, evaluated, *gradients, layer.running_mean, layer.running_var])
    for expected, ours in zip(*found, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_synchronised_bn_counts_in_float32_and_returns_its_inputs_type(world_of_one, dtype):
    """Against the formula in float64. At a mean of 30 and a std of 1, sums in bf16 would lose all digits."""
    torch.manual_seed(0)
    x = (30 + torch.randn(64, 5, 5, 5)).to(dtype)
    layer = synchronized()
    out = layer(x)
    exact = x.double()
    mean = exact.mean((0, 2, 3), keepdim=True)
    var = exact.var((0, 2, 3), unbiased=False, keepdim=True)
    expected = (exact - mean) / (var + layer.eps).sqrt()
    rounding = 30 * 2 ** -24  # of a number of the mean's size in float32
    assert out.dtype == dtype
    assert torch.allclose(out.double(), expected, rtol=torch.finfo(dtype).eps, atol=32 * rounding)


# --- Joining ------------------------------------------------------------------------------------------------

def test_a_process_that_is_left_alone_ends_by_itself(tmp_path, small, monkeypatch):
    """The second of two processes, where nobody starts the first."""
    environment = {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(processes, "PATIENCE", datetime.timedelta(seconds=0.2))
    said = refusal("simsiam.py", small, *TINY, "--out", tmp_path / "run")
    assert "the processes did not find each other within 0:00:00.2" in said


def test_a_restart_forgets_that_nccl_had_failed():
    """The key lies below all prefixes, in the store that torchrun hands to every start."""
    store = torch.distributed.HashStore()
    store.set("exception_dump", "1")
    attempt = torch.distributed.PrefixStore("attempt", store)
    processes.forget_failure(torch.distributed.PrefixStore("worker", attempt))
    assert not store.check(["exception_dump"])


SRUN = {"SLURM_NTASKS": "2"}


def test_a_scheduler_that_starts_copies_by_mistake_is_told(tmp_path, small, monkeypatch):
    """srun without torchrun: nothing is trained."""
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    assert "start torchrun: srun" in refusal("simsiam.py", small, *TINY, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("environ", [
    pytest.param(SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, id="a step of one in a job of two"),
    pytest.param(SRUN | {"RANK": "0"}, id="torchrun within srun"),
])
def test_a_scheduler_that_is_used_as_it_should_be_is_left_alone(environ):
    """Nothing is raised."""
    processes.check_scheduler(environ)


# --- Whole runs ---------------------------------------------------------------------------------------------

def test_a_batch_that_the_processes_do_not_divide_is_refused(small, tmp_path):
    """By two processes, and one of them says it."""
    out = torchrun(ROOT / "simsiam.py", small, *TINY, "--batch", "15", "--out", tmp_path / "run")
    assert out.returncode != 0
    assert out.stderr.count("--batch 15 must be a multiple of the 2 processes") == 1


def test_processes_that_see_different_images_are_found_out(tmp_path, small):
    """Each process is given another folder."""
    other = tmp_path / "other"
    write_folder(other, "train", 50, 16, start=1)
    write_folder(other, "val", 9, 16)
    odd = ["-m", "tests.odd_runs", "by_rank"]
    out = torchrun(*odd, f"{small}//{other}", *TINY, "--out", tmp_path / "run", cwd=ROOT)
    assert out.returncode != 0
    assert f"images in {small}: the processes see different ones" in out.stderr
    assert not (tmp_path / "run").exists()


@slow
@pytest.mark.parametrize("minutes, within", [
    pytest.param("0//1e9", True, id="process 0 wants to save"),
    pytest.param("1e9//0", False, id="process 1 wants to save"),
])
def test_process_0_decides_for_all_when_to_save(tmp_path, small, minutes, within):
    """Where the last checkpoint but one lies. The moving average's takes all processes at once."""
    out = tmp_path / "run"
    options = [*TINY, "--recipe", "cifar10", "--experiment", "sec52-moving-average", "--batch", "10"]
    options += ["--knn-every", "0", "--save-minutes", minutes, "--out", out]
    done = torchrun("-m", "tests.odd_runs", "by_rank", small, *options, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    previous = torch.load(out / "checkpoint-previous.pth", weights_only=True)
    assert (0 < previous["step"] < 5) == within  # an epoch has 5 steps
    assert previous["eta"]["vectors"].shape == (50, 16)
    assert re.search(r"epoch 3/3  loss", done.stdout)


def test_torchruns_two_processes_run_the_same_command(tmp_path, by_torchrun):
    """Started by torchrun itself: a whole run against one process: loss, std and kNN of every epoch."""
    process, out, options = by_torchrun
    assert here("simsiam.py", *options, tmp_path / "one") is None
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    one = log_of(tmp_path / "one")
    two = log_of(out)
    assert two[0]["settings"]["world"] == 2
    assert [r["event"] for r in two] == ["start", "epoch", "epoch", "end"]
    assert two[0]["knn_pixels"] == one[0]["knn_pixels"]
    assert two[1]["knn"] == one[1]["knn"]
    for name in ("loss", "std"):
        # Numbers of size 1 in float32, whose last bits two steps enlarge.
        assert two[2][name] == pytest.approx(one[2][name], abs=1e-3)
    assert printed.count("epoch 1/1  loss") == 1
