"""Checks of an experiment of simsiam.py or related.py: its settings, a run, an interrupted run."""
import contextlib
import io
import math
import re

import torch

from tests.helpers import CPU, equal, here, interrupted_before, log_of, losses_of
from tests.helpers import settings_of_row, weights_of


def check_rows(program, methods, table):
    """Compare a program's experiments with {name: (what it changes on ImageNet, the paper's result)}.

    Nothing else may change. The list that the program prints shows the results.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        program.parse(["--experiment", "list"])
    names = []
    for method in methods:
        baseline = settings_of_row(program, method.NAME, "imagenet")
        for name, (paper, _) in method.EXPERIMENTS.items():
            names.append(name)
            expected, result = table[name]
            row = settings_of_row(program, name, "imagenet")
            assert {key: row[key] for key in expected} == expected, name
            changed = {key for key in row if row[key] != baseline[key]}
            assert changed - {"experiment"} <= expected.keys(), name
            assert result in paper, name
            assert re.search(rf"^{re.escape(name)} .*{re.escape(paper)}", printed.getvalue(), re.M), name
    assert names == list(table)


def check_run(folder, method, fixed=()):
    """Check a run of a method's experiment -> the experiment's name in its log

    Losses are finite, and all weights have moved but those of the fixed modules.
    """
    start, _, *epochs, end = log_of(folder)
    assert end["event"] == "end"
    assert all(math.isfinite(record["loss"]) for record in epochs)
    assert all(record["lr"] > 0 for record in epochs[:-1])
    torch.manual_seed(0)
    model = method(start["settings"], None, CPU).build()
    after = torch.load(folder / "checkpoint.pth", weights_only=True)["model"]
    assert after.keys() == model.state_dict().keys()
    for name, w in model.named_parameters():
        assert torch.equal(after[name], w) == name.startswith(fixed), name
    return start["settings"]["experiment"]


def check_resumed(folder, script, options, at, steps_per_epoch):
    """Interrupt a run before a step and resume it: all tensors and losses must be the uninterrupted run's."""
    whole, parts = folder / "whole", folder / "parts"
    assert here(script, *options, "--out", whole) is None
    options = [*options, "--save-minutes", "0", "--out", parts]
    with interrupted_before(at):
        assert "interrupted" in here(script, *options)
    checkpoint = torch.load(parts / "checkpoint.pth", weights_only=True)
    assert checkpoint["epoch"] * steps_per_epoch + checkpoint["step"] == at
    assert here(script, *options, "--resume") is None
    assert equal(weights_of(whole), weights_of(parts))
    assert losses_of(whole) == losses_of(parts)
