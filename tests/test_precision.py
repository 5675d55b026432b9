"""bf16 on CPUs: where it is the default, what stays in float32, and that runs in it go on, and are shared."""
import types

import pytest
import torch

import simsiam
from harness.common import machine
from harness.common.errors import Refused
from harness.training import batchnorm, processes
from tests import cuda_kernels
from tests.helpers import CPU, LONGER, ROOT, TINY, equal, here, log_of, losses_of, settings_of_row, torchrun
from tests.helpers import interrupted_before, weights_of

pytest_plugins = ["tests.fixtures"]
CPUS = {"with instructions": True, "without": False}


@pytest.fixture(params=CPUS.values(), ids=CPUS)
def cpu(request, monkeypatch):
    """A CPU that has instructions for bf16, or hasn't."""
    monkeypatch.setattr(machine, "cpu_has_bf16", lambda: request.param)
    return request.param


# --- Where it is the default --------------------------------------------------------------------------------

@pytest.mark.parametrize("width, wide", [("1/16", False), ("1/8", False), ("3/16", False), ("1/4", True),
                                         ("1", True), ("2", True)])
def test_bf16_is_the_default_where_it_pays(cpu, width, wide):
    """From a quarter of the width up, on a CPU with instructions; an option decides otherwise."""
    options = ["--width", width]
    assert settings_of_row(simsiam, "simsiam", "cifar10", *options)["amp"] == (cpu and wide)
    assert settings_of_row(simsiam, "simsiam", "cifar10", *options, "--no-amp")["amp"] is False
    assert settings_of_row(simsiam, "simsiam", "cifar10", *options, "--amp")["amp"] is True


@pytest.mark.parametrize("flags, has", [("fpu sse avx512f avx512_bf16 sha", True), ("fpu amx_bf16", True),
                                        ("Features : fp asimd bf16", True), ("fpu avx2 avx512f", False)])
def test_instructions_are_known_by_the_kernels_list(monkeypatch, flags, has):
    """/proc/cpuinfo of x86 and of ARM."""
    monkeypatch.setattr("builtins.open", lambda path: FileOf(flags))
    assert machine.cpu_has_bf16.__wrapped__() is has


class FileOf:
    """An open file with this text in it."""

    def __init__(self, text):
        self.text = text

    def __enter__(self):
        return types.SimpleNamespace(read=lambda: self.text)

    def __exit__(self, *raised):
        pass


def test_what_was_chosen_is_said_and_why(cpu):
    """In the line on the hardware."""
    def said(amp, width):
        return machine.hardware({"amp": amp, "width": width, "workers": 0}, CPU)

    assert ("bf16 autocast, which is slower than float32 here" in said(True, 1 / 8))
    assert ("slower" in said(True, 1)) == (not cpu)
    reason = "bf16 pays from --width 1/4 up" if cpu else "this CPU has no instructions for bf16"
    assert f"float32 ({reason})" in said(False, 1 / 8)
    assert ("float32, 0 workers" in said(False, 1)) == cpu


def test_processes_of_different_precisions_are_refused(monkeypatch):
    """Machines of two kinds, of which only one would take bf16."""
    monkeypatch.setattr(processes, "same_everywhere", lambda number, device: False)
    with pytest.raises(Refused, match="give --amp or --no-amp to all"):
        processes.check_same_precision(True, CPU)


# --- What stays in float32 ----------------------------------------------------------------------------------

@pytest.fixture
def world():
    """A world of one process."""
    processes.join_world(CPU)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_synchronised_bn_returns_its_inputs_type_and_counts_in_float32(world, dtype, kind, affine):
    """Against the formula in float64. A mean of 30 beside a std of 1 would lose all digits in bf16 sums of
    squares."""
    torch.manual_seed(0)
    x = (30 + torch.randn(64, 8, 5, 5)).to(dtype)
    cuda_kernels.make_known()
    layer = batchnorm.synchronize(torch.nn.BatchNorm2d(8, affine=affine), torch.device(kind))
    if dtype == torch.float64:
        layer.double()
    out = layer(x)
    exact = x.double()
    mean = exact.mean((0, 2, 3), keepdim=True)
    expected = (exact - mean) / (exact.var((0, 2, 3), unbiased=False, keepdim=True) + layer.eps).sqrt()
    assert out.dtype == dtype
    assert torch.allclose(out.double(), expected, rtol=0.01, atol=0.02 if dtype == torch.bfloat16 else 2e-5)
    assert layer.running_mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(layer.running_mean.double(), 0.1 * mean.flatten(), rtol=1e-5)
    assert torch.allclose(layer.running_var.double(), 0.9 + 0.1 * exact.var((0, 2, 3)), rtol=1e-4)


# --- Runs ---------------------------------------------------------------------------------------------------

def test_a_run_in_bf16_goes_on_bit_for_bit_and_keeps_its_precision(tmp_path, small):
    """Interrupted within an epoch. The second start doesn't say --amp, and its default would be float32."""
    options = [*LONGER, "--epochs", "3", "--amp", "--save-minutes", "0"]
    assert here("simsiam.py", small, *options, "--out", tmp_path / "alone") is None
    with interrupted_before(13):
        assert "interrupted" in here("simsiam.py", small, *options, "--out", tmp_path / "parts")
    again = [option for option in options if option != "--amp"]
    assert here("simsiam.py", small, *again, "--resume", "--out", tmp_path / "parts") is None
    assert equal(weights_of(tmp_path / "parts"), weights_of(tmp_path / "alone"))
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "alone")
    resumed = [r for r in log_of(tmp_path / "parts") if r["event"] == "resume"]
    assert resumed[-1]["settings"]["amp"] is True


def test_another_precision_than_the_checkpoints_is_refused_where_it_is_asked_for(tmp_path, small):
    """As any other setting."""
    assert here("simsiam.py", small, *TINY, "--amp", "--epochs", "1", "--out", tmp_path / "run") is None
    options = [*TINY, "--no-amp", "--epochs", "1", "--resume"]
    message = here("simsiam.py", small, *options, "--out", tmp_path / "run")
    assert "amp True -> False" in message


def test_two_processes_in_bf16_are_one_to_its_digits(tmp_path, small):
    """Loss and std of each epoch: bf16 has 8 bits, so 0.4% a number, and a loss is a mean of many."""
    options = [*TINY, "--amp", "--knn-every", "0", "--workers", "0"]
    assert here("simsiam.py", small, *options, "--out", tmp_path / "one") is None
    done = torchrun(ROOT / "simsiam.py", small, *options, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    for one, two in zip(log_of(tmp_path / "one")[2:-1], log_of(tmp_path / "two")[2:-1], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=0.01)
        assert two["std"] == pytest.approx(one["std"], abs=0.01)
    plain = tmp_path / "plain"
    assert here("simsiam.py", small, *options, "--no-amp", "--out", plain) is None
    assert losses_of(plain) != losses_of(tmp_path / "one")


def test_an_evaluation_takes_bf16_features_where_it_is_asked_to(tmp_path, ten, capsys):
    """Float32 is the default; both are said."""
    for amp, said in (([], "float32"), (["--amp"], "bf16 autocast")):
        out = tmp_path / f"out{len(amp)}"
        options = ["--ckpt", "random:resnet18", "--width", "1/4", "--knn", "--workers", "0", "--out", out]
        assert here("lineval.py", ten, *options, *amp) is None
        assert said in capsys.readouterr().out
