"""What holds for each row of simsiam.py's and related.py's experiments: its settings, a run of it,
a run that is interrupted and resumed."""
import contextlib
import io
import math
import re

import torch

from tests.helpers import CPU, equal, here, interrupted_before, log_of, losses_of
from tests.helpers import settings_of_row, weights_of


def check_rows(program, methods, table):
    """A program's experiments against {name: (what it changes on ImageNet, the paper's result)}: nothing else
    changes. The list that the program prints shows the results."""
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
    """A run of a method's experiment: it says which row it is, its losses are finite, and all weights have
    moved from where they start, but for those of the fixed modules."""
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
    """A run that is interrupted before a step and resumed, against an uninterrupted one: all tensors and
    losses -> the names of the checkpoint's parts"""
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
    return checkpoint.keys()
