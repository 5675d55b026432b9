"""bf16 on CPUs: where it is the default, and runs in it, resumed and in two processes."""

import pytest

import simsiam
from harness.common import machine
from harness.common.errors import Refused
from harness.training import processes
from tests.helpers import CPU, EVALUATION, ROOT, TINY, equal, here, interrupted_before, log_of, losses_of
from tests.helpers import result_of, settings_of_row, slow, torchrun, weights_of

pytest_plugins = ["tests.fixtures"]


@pytest.fixture(params=[True, False], ids=["with instructions", "without"])
def cpu(request, monkeypatch):
    """Whether the CPU has instructions for bf16."""
    monkeypatch.setattr(machine, "cpu_has_bf16", lambda: request.param)
    return request.param


# --- Where it is the default --------------------------------------------------------------------------------

@pytest.mark.parametrize("width, wide", [("3/16", False), ("1/4", True), ("1", True)])
def test_bf16_is_the_default_where_it_pays(cpu, width, wide):
    """From a quarter of the width up, on a CPU with instructions; an option decides otherwise."""
    options = ["--width", width]
    assert settings_of_row(simsiam, "simsiam", "cifar10", *options)["amp"] == (cpu and wide)
    for option, amp in (("--no-amp", False), ("--amp", True)):
        assert settings_of_row(simsiam, "simsiam", "cifar10", *options, option)["amp"] is amp


@pytest.mark.parametrize("flags, has", [("fpu sse avx512_bf16 sha", True), ("fpu avx2 avx512f", False)])
def test_instructions_are_known_by_the_kernels_list(monkeypatch, flags, has):
    """Those in /proc/cpuinfo."""
    monkeypatch.setattr(machine, "text_of", lambda path: flags)
    assert machine.cpu_has_bf16.__wrapped__() is has


def test_the_start_block_tells_of_a_precision_that_does_not_pay(cpu):
    """In the line on the hardware."""
    def said(amp, width):
        return machine.hardware({"amp": amp, "width": width, "workers": 0}, CPU)

    assert "bf16 autocast (slower than float32 here)" in said(True, 1 / 8)
    assert ("slower" in said(True, 1)) == (not cpu)
    assert "float32, 0 workers" in said(False, 1)


def test_processes_of_different_precisions_are_refused(monkeypatch):
    """Two kinds of machines, of which only this one would choose bf16."""
    def with_zero(both, op):
        both.clamp_(min=0)

    monkeypatch.setattr(processes.dist, "all_reduce", with_zero)
    processes.check_same("CPUs", [False], CPU)
    with pytest.raises(Refused, match="CPUs: the processes see different ones"):
        processes.check_same("CPUs", [True], CPU)


# --- Runs ---------------------------------------------------------------------------------------------------

def test_a_run_in_bf16_goes_on_bit_for_bit_and_keeps_its_precision(tmp_path, small):
    """Interrupted within an epoch. The second start doesn't say --amp, and its default would be float32.

    It may not ask for another precision.
    """
    options = [*TINY, "--epochs", "2", "--knn-every", "0", "--save-minutes", "0"]
    assert here("simsiam.py", small, *options, "--amp", "--out", tmp_path / "alone") is None
    with interrupted_before(4):
        assert "interrupted" in here("simsiam.py", small, *options, "--amp", "--out", tmp_path / "parts")
    again = [small, *options, "--resume", "--out", tmp_path / "parts"]
    assert "amp True -> False" in here("simsiam.py", *again, "--no-amp")
    assert here("simsiam.py", *again) is None
    assert equal(weights_of(tmp_path / "parts"), weights_of(tmp_path / "alone"))
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "alone")
    resumed = [r for r in log_of(tmp_path / "parts") if r["event"] == "resume"]
    assert resumed[-1]["settings"]["amp"] is True


@slow
def test_two_processes_in_bf16_are_one_to_its_digits(tmp_path, small):
    """Loss and std of an epoch: bf16 has 8 bits, so 0.4% a number, and a loss is a mean of many."""
    options = [*TINY, "--epochs", "1", "--knn-every", "0", "--workers", "0"]
    assert here("simsiam.py", small, *options, "--amp", "--out", tmp_path / "one") is None
    assert here("simsiam.py", small, *options, "--no-amp", "--out", tmp_path / "plain") is None
    done = torchrun(ROOT / "simsiam.py", small, *options, "--amp", "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    one, two, plain = (log_of(tmp_path / name)[2] for name in ("one", "two", "plain"))
    assert two["loss"] == pytest.approx(one["loss"], abs=0.01)
    assert two["std"] == pytest.approx(one["std"], abs=0.01)
    assert plain["loss"] != one["loss"]


def test_an_evaluation_takes_bf16_features_where_it_is_asked_to(tmp_path, ten, evaluated, capsys):
    """Float32 is the default."""
    assert here("lineval.py", ten, *EVALUATION, "--knn", "--amp", "--out", tmp_path) is None
    assert result_of(tmp_path)["amp"] is True
    assert "bf16 autocast" in capsys.readouterr().out
    assert result_of(evaluated("knn"))["amp"] is False
