"""harness/training, processes, batchnorm, per_image: several processes do what one does, or say why not."""
import datetime
import re
import types

import numpy as np
import pytest
import torch

import simsiam
from harness.common.errors import Refused
from harness.data import opening
from harness.training import processes
from tests import world
from tests.helpers import CPU, ROOT, TINY, free_port, log_of, refusal, slow, torchrun, write_folder

pytest_plugins = ["tests.fixtures"]


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


def gap(one, two):
    """The largest difference between two trained models, and between the numbers on the way."""
    (state_one, numbers_one), (state_two, numbers_two) = one, two
    assert state_one.keys() == state_two.keys()
    gaps = [(state_one[k].double() - state_two[k].double()).abs().max() for k in state_one]
    gaps.append((numbers_one - numbers_two).abs().max())
    return max(gaps).item()


def test_two_processes_equal_one_in_float64(one, two):
    """Weights, statistics, loss and std after six steps, against one process; and every wrong way differs."""
    bound = 1e-9
    assert gap(one["right"], two["right"]) < bound
    assert gap(one["right"], two["fused"]) < bound
    for variant in ("local-bn", "local-lr", "wrong-sampler"):
        assert gap(one["right"], two[variant]) > 10 * bound, variant


def test_eta_is_spread_over_the_processes_without_a_difference(one, two):
    """PerImageVectors in two processes and in one against an array in numpy."""
    rng = np.random.default_rng(0)
    kept = np.zeros((11, 3), np.float32)
    seen = []
    for _ in range(6):
        index = rng.permutation(11)[:4]
        seen.append(kept[index].sum(axis=0))
        kept[index] = rng.normal(size=(4, 3))
    assert np.abs(seen).sum() > 1
    for found in (one["vectors"], two["vectors"]):
        assert np.array_equal(found["vectors"], kept)
        assert np.allclose(found["seen"], seen, atol=1e-6)
        assert found["equal"] == 1


def test_processes_speak_together(one, two):
    """Sums, means, shares and comparisons against those counted by hand."""
    assert two["together"]["sum"] == [2, 1]
    assert two["together"]["mean"] == [1, 0.5]
    assert two["together"]["what the mean is of"] == [1, 0]
    assert two["together"]["shares"] == [1] * 11
    assert two["together"]["same"]
    assert not two["together"]["not the same"]
    assert one["together"]["mean"] == [1, 0]
    assert one["together"]["shares"] == [1] * 11


def test_a_process_that_is_left_alone_ends_by_itself(tmp_path, small, monkeypatch):
    """The second of two processes, where nobody starts the first."""
    environment = {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(processes, "PATIENCE", datetime.timedelta(seconds=1))
    said = refusal("simsiam.py", small, *TINY, "--out", tmp_path / "run")
    assert "the processes did not find each other within 0:00:01" in said


@pytest.mark.parametrize("rank, there", [(0, False), (1, True)])
def test_a_restart_forgets_that_nccl_had_failed(monkeypatch, rank, there):
    """The key lies below all prefixes, in the store that torchrun hands to every start. Process 0 clears
    it."""
    store = torch.distributed.HashStore()
    store.set("exception_dump", "1")
    prefixed = torch.distributed.PrefixStore("attempt", torch.distributed.PrefixStore("worker", store))
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(prefixed, rank, 1)]))
    monkeypatch.setattr(processes.uuid, "uuid4", lambda: types.SimpleNamespace(hex="start"))
    prefixed.set("welcome start", "part")
    processes.new_store_for_this_start()
    assert store.check(["exception_dump"]) == there


def test_a_batch_that_processes_do_not_divide_has_no_settings(small):
    """15 images for two processes."""
    train, _, _ = opening.open_data(small)
    args = simsiam.parse([str(small), *TINY, "--batch", "15"])
    with pytest.raises(Refused, match="--batch 15: 2 processes don't divide it"):
        simsiam.settings_for(args, train, 2)
    assert simsiam.settings_for(args, train, 3)["batch"] == 15


@slow
def test_a_batch_that_the_processes_do_not_divide_is_refused(small, tmp_path):
    """By two processes, and one of them says it."""
    out = torchrun(ROOT / "simsiam.py", small, *TINY, "--batch", "15", "--out", tmp_path / "run")
    assert out.returncode != 0
    assert out.stderr.count("2 processes don't divide it") == 1


@slow
def test_processes_that_see_different_images_are_found_out(tmp_path, small):
    """Each process is given another folder."""
    other = tmp_path / "other"
    write_folder(other, "train", 50, 16, start=1)
    write_folder(other, "val", 9, 16)
    out = torchrun("-m", "tests.by_rank", f"{small}//{other}", *TINY, "--out", tmp_path / "run", cwd=ROOT)
    assert out.returncode != 0
    assert "the processes see different images there" in out.stderr
    assert not (tmp_path / "run").exists()


@slow
def test_two_processes_run_the_same_command(tmp_path, finished, small):
    """A whole run in two processes against one: loss, std and kNN of every epoch."""
    out = torchrun(ROOT / "simsiam.py", small, *TINY, "--out", tmp_path / "two")
    assert out.returncode == 0, out.stderr
    one = log_of(finished[0])
    two = log_of(tmp_path / "two")
    assert two[0]["settings"]["world"] == 2
    assert len(one) == len(two)
    assert out.stdout.count("epoch 1/3  loss") == 1
    for a, b in zip(one[1:-1], two[1:-1]):
        for key in ("loss", "std"):
            expected = None if a[key] is None else pytest.approx(a[key], abs=1e-3)
            assert b[key] == expected
    assert two[1]["knn"] == one[1]["knn"]
    assert two[0]["knn_pixels"] == one[0]["knn_pixels"]


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
    done = torchrun("-m", "tests.by_rank", small, *options, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    previous = torch.load(out / "checkpoint-previous.pth", weights_only=True)
    assert (0 < previous["step"] < 5) == within  # an epoch has 5 steps
    assert previous["eta"]["vectors"].shape == (50, 16)
    assert re.search(r"epoch 3/3  loss", done.stdout)
