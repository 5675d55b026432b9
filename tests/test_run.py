"""harness, run.py and files.py: what a run leaves in its folder, and how it goes on from there."""
import contextlib
import math
import os
import re
import resource
import shutil
import signal
import types

import pytest
import torch
from PIL import Image

from harness.common import files
from harness.common.errors import Refused, printable
from harness.data import shapes
from harness.evaluation import report
from harness.training.folder import compare_settings, folder_name, locked
from harness.training.run import Run
from tests.helpers import LONGER, ROOT, TINY, equal, flipped, here, log_of, odd_files, python, refusal
from tests.helpers import result_of, save_image, slow, weights_of, write_folder

pytest_plugins = ["tests.fixtures"]
QUIET = [*TINY, "--knn-every", "0"]


# --- What is in the folder ----------------------------------------------------------------------------------

def test_run_folder_holds_what_the_readme_promises(finished):
    """The files, against the README's list."""
    out, _ = finished
    assert sorted(path.name for path in out.iterdir()) == [
        ".writer",
        "backbone.pth",
        "checkpoint-previous.pth",
        "checkpoint.pth",
        "curves.png",
        "log.jsonl",
        "views.png",
    ]
    assert Image.open(out / "curves.png").size == (840, 600)
    assert Image.open(out / "views.png").height > 8 * 16


def test_log_holds_what_the_readme_promises(finished):
    """The values' ranges, for 3 epochs of 3 steps. tests/test_help.py has the keys."""
    start, *epochs, _ = log_of(finished[0])
    assert 0 <= start["knn_pixels"] <= 100
    assert [(r["epoch"], r["step"]) for r in epochs] == [(0, 0), (1, 3), (2, 6), (3, 9)]
    assert all(0 <= r["knn"] <= 100 for r in epochs)
    untrained, *trained = epochs
    for key in ("loss", "std", "lr", "images_per_s", "data_wait", "seconds", "wall_seconds"):
        assert untrained[key] is None, key
    assert all(-1 <= r["loss"] <= 1 for r in trained)
    assert all(r["data_wait"] == 0 for r in trained)  # the images are in memory
    assert all(r["wall_seconds"] > r["seconds"] > 0 for r in trained)  # saving and measuring are in it


def test_screen_says_what_the_run_does(finished):
    """Words that its output must have, for 50 training images."""
    _, printed = finished
    assert "k 3 (--knn-k, or a fifth of the average class, at most 200), on 9 images" in printed
    assert "3 epochs of 3 steps, 9 in all (the recipe on its own data: 77,600)" in " ".join(printed.split())
    assert "\ntoo short   on 1,000 to 5,000 images, 500 steps gained" in printed
    assert "low rank" not in printed


def test_the_saved_backbone_has_the_knn_that_was_monitored_last(finished, small, tmp_path):
    """lineval.py --knn on backbone.pth, against the log."""
    out, _ = finished
    options = "--knn --size 16 --mean 0.4914 0.4822 0.4465 --std 0.2470 0.2435 0.2616".split()
    assert here("lineval.py", small, "--ckpt", out / "backbone.pth", *options, "--out", tmp_path) is None
    assert result_of(tmp_path)["top1"] == log_of(out)[-2]["knn"]


def test_unlabelled_photographs_train_without_knn(large, tmp_path, capsys):
    """A folder without classes: no kNN in the log, and the screen says why. Files take time to decode, a
    share of the steps'."""
    options = [*TINY, "--batch", "8", "--epochs", "1", "--size", "48", "--workers", "0"]
    assert here("simsiam.py", large / "train", *options, "--out", tmp_path / "run") is None
    start, *epochs, _ = log_of(tmp_path / "run")
    assert start["settings"]["recipe"] == "imagenet"
    assert all(r["knn"] is None for r in epochs)
    assert 0 < epochs[1]["data_wait"] < 1
    assert "needs labels" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["..", "/", "a/../..", "x/...", None])
def test_a_name_cannot_lead_out_of_the_runs_folder(name):
    """Every name of a run is one folder below runs/."""
    place = os.path.normpath(os.path.join("runs", folder_name(name)))
    assert re.fullmatch(r"runs/[^/]+", place, re.DOTALL)


# --- Going on -----------------------------------------------------------------------------------------------

def positions_saved(monkeypatch):
    """A list that grows by (epoch, step) with every checkpoint that a run in this process writes."""
    save = Run.save
    positions = []

    def watched(run, *args):
        save(run, *args)
        positions.append((run.epoch, run.step))

    monkeypatch.setattr(Run, "save", watched)
    return positions


def reproducible(log):
    """The epochs of a log, without what the clock and the machine make of them."""
    keys = ("epoch", "step", "loss", "std", "lr", "knn")
    return [[r[key] for key in keys] for r in log if r["event"] == "epoch"]


def test_a_checkpoint_is_written_after_every_step(tmp_path, small, monkeypatch):
    """With --save-minutes 0: the positions, which are all from the second step on."""
    options = [*QUIET, "--epochs", "2", "--experiment", "sec52-moving-average", "--save-minutes", "0"]
    positions = positions_saved(monkeypatch)
    assert here("simsiam.py", small, *options, "--out", tmp_path / "run") is None
    assert sorted(set(positions)) == [(0, 0), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]
    assert positions == sorted(positions)
    checkpoint = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)
    assert checkpoint["settings"]["save_minutes"] == 0


@pytest.mark.parametrize("seconds, expected", [
    pytest.param(0.0, [(0, 0), (0, 3), (1, 3), (2, 3)], id="quickly saved"),
    pytest.param(9.0, [(0, 0), (2, 3)], id="slowly saved"),
])
def test_an_epochs_end_is_saved_if_that_takes_no_time(tmp_path, small, monkeypatch, seconds, expected):
    """The positions, in a run of seconds, if each save takes so long; the last epoch's end is always one.
    The picture is drawn with each checkpoint."""
    positions = positions_saved(monkeypatch)
    drawn = []
    monkeypatch.setattr(report, "draw_curves", lambda *arguments: drawn.append(arguments))
    save = Run.save

    def slow_save(self):
        save(self)
        self.saving = seconds

    monkeypatch.setattr(Run, "save", slow_save)
    assert here("simsiam.py", small, *QUIET, "--out", tmp_path / "run") is None
    assert positions == expected
    assert len(drawn) == len(expected)


@pytest.mark.parametrize("kind, batch", [
    pytest.param("small", 16, id="in memory"),
    pytest.param("large", 6, id="files", marks=slow),
])
def test_killed_and_resumed_run_ends_with_the_uninterrupted_weights(tmp_path, request, kind, batch):
    """kill -9 within the second of three epochs; weights and log against those of an uninterrupted run, bit
    for bit."""
    options = [request.getfixturevalue(kind), *QUIET, "--batch", batch, "--save-minutes", "0"]
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    assert here("simsiam.py", *options, "--out", whole) is None
    run = python("-m", "tests.odd_runs", "killed", *options, "--out", killed, cwd=ROOT)
    assert run.returncode == -signal.SIGKILL
    checkpoint = torch.load(killed / "checkpoint.pth", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["step"]) == (1, 2)
    assert here("simsiam.py", *options, "--out", killed, "--resume") is None
    assert equal(weights_of(whole), weights_of(killed))
    assert [r["event"] for r in log_of(killed)].count("resume") == 1
    assert reproducible(log_of(whole)) == reproducible(log_of(killed))


def test_resume_auto_starts_and_then_continues(small, tmp_path, capsys):
    """The same command twice: the log's events, and the lr of the last step, which does not change."""
    command = [small, *TINY, "--epochs", "1", "--workers", "0", "--out", tmp_path / "run", "--resume", "auto"]
    assert here("simsiam.py", *command) is None
    lr = log_of(tmp_path / "run")[-2]["lr"]
    capsys.readouterr()
    assert here("simsiam.py", *command) is None
    assert "continuing after 0 epochs and 3 steps" in capsys.readouterr().out
    events = [r["event"] for r in log_of(tmp_path / "run")]
    assert events == ["start", "epoch", "resume", "epoch", "end"]
    assert log_of(tmp_path / "run")[-2]["lr"] == lr
    assert lr > 0
    assert locked == []  # a start leaves the lock behind for the next in the same process


def test_an_evaluation_of_another_backbone_does_not_go_on():
    """Not by --override either: half of its result would be of the older one."""
    then = {"sha256": "a", "pretrained_epochs": 1}
    now = {"sha256": "b", "pretrained_epochs": 2}
    with pytest.raises(Refused, match="of this one after 1 epochs; give another --out"):
        compare_settings(then, now, ["sha256", "pretrained_epochs"], "run")


def test_settings_may_be_overridden_by_name(tmp_path, small, finished, capsys):
    """Four epochs and another weight decay, for a run of three: refused, until both are named."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    options = [small, *TINY, "--epochs", "4", "--weight-decay", "0.1", "--workers", "0"]
    options += ["--out", out, "--resume"]
    said = refusal("simsiam.py", *options)
    assert "epochs 3 -> 4; weight_decay 0.0005 -> 0.1" in said
    assert said.endswith("--override epochs weight_decay")
    assert "weight_decay 0.0005 -> 0.1" in refusal("simsiam.py", *options, "--override", "epochs")
    capsys.readouterr()
    assert here("simsiam.py", *options, "--override", "epochs", "weight_decay") is None
    note = "settings changed since then: epochs 3 -> 4; weight_decay 0.0005 -> 0.1; workers 1 -> 0\n"
    assert note in capsys.readouterr().out
    assert log_of(out)[-2]["epoch"] == 4
    optimizer = torch.load(out / "checkpoint.pth", weights_only=True)["optimizer"]
    assert {group["weight_decay"] for group in optimizer["param_groups"]} == {0.1}


def test_resume_with_a_file_is_told_how_to_go_on(tmp_path, small, finished):
    """Both advices are followed: the newest checkpoint of a folder, and an older one in a new folder."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    options = [small, *TINY]
    said = refusal("simsiam.py", *options, "--resume", out / "checkpoint.pth")
    assert "here it is --out FOLDER --resume, after DATA: it continues from FOLDER/checkpoint.pth" in said
    assert "(from an older checkpoint: copy it, by this name, and log.jsonl to a new folder)" in said
    assert here("simsiam.py", *options, "--out", out, "--resume") is None
    older = tmp_path / "older"
    older.mkdir()
    shutil.copy(out / "checkpoint-previous.pth", older / "checkpoint.pth")
    shutil.copy(out / "log.jsonl", older)
    assert here("simsiam.py", *options, "--out", older, "--resume") is None
    assert equal(weights_of(older), weights_of(finished[0]))


@pytest.mark.parametrize("options, message", [
    ([], "holds a run or a result already"),
    (["--resume"], "has no checkpoint.pth to go on from; give another --out"),
    (["--resume", "auto"], "has no checkpoint.pth to go on from; give another --out"),
])
def test_a_finished_run_without_its_checkpoints_is_not_overwritten(tmp_path, small, options, message):
    """They were removed to save room."""
    (tmp_path / "backbone.pth").write_bytes(b"features")
    assert message in refusal("simsiam.py", small, *TINY, "--out", tmp_path, *options)
    assert (tmp_path / "backbone.pth").read_bytes() == b"features"
    assert not (tmp_path / "log.jsonl").exists()


# --- Damaged and crafted files ------------------------------------------------------------------------------

def test_checkpoints_are_whole_at_every_instant(tmp_path, monkeypatch):
    """A crash between any two system calls of files.save leaves the old file or the new one."""
    path = tmp_path / "checkpoint.pth"
    files.save({"a": 1}, str(path))

    def crash(*args):
        raise KeyboardInterrupt

    for call in ("fsync", "replace"):
        monkeypatch.setattr(os, call, crash)
        with pytest.raises(KeyboardInterrupt):
            files.save({"a": 2}, str(path))
        monkeypatch.undo()
        assert torch.load(path, weights_only=True) == {"a": 1}
    files.save({"a": 3}, str(path))
    assert torch.load(path, weights_only=True) == {"a": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, small, finished):
    """A limit on the size of files stands for the disk. The first checkpoint, without momentum yet, fits."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    enough_for_the_first = (finished[0] / "checkpoint.pth").stat().st_size * 3 // 4
    resource.setrlimit(resource.RLIMIT_FSIZE, (enough_for_the_first, limits[1]))
    try:
        said = refusal("simsiam.py", small, *TINY, "--out", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "checkpoint.pth: can't be written" in said
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["epoch"] == 0
    assert not list(tmp_path.glob("*.tmp"))
    assert here("simsiam.py", small, *TINY, "--out", tmp_path, "--resume") is None
    assert equal(weights_of(tmp_path), weights_of(finished[0]))


def readable(out):
    """Whether one of the checkpoints in a run's folder can be read."""
    for path in out.glob("checkpoint*.pth"):
        with contextlib.suppress(Refused):
            return bool(files.read(path))
    return False


def test_resume_falls_back_to_the_older_checkpoint(tmp_path, small, finished, monkeypatch, capsys):
    """A bit of the newest is flipped. The weights against the uninterrupted run's; one of the two checkpoints
    is good at every instant."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    damaged = flipped((out / "checkpoint.pth").read_bytes(), 9000)
    (out / "checkpoint.pth").write_bytes(damaged)
    replace = os.replace

    def watched(old, new):
        replace(old, new)
        assert readable(out)

    monkeypatch.setattr(os, "replace", watched)
    assert here("simsiam.py", small, *TINY, "--out", out, "--resume") is None
    said = capsys.readouterr().out
    assert "checkpoint.pth: can't be read" in said
    assert "going on from" in said
    position = re.search("continuing after . epochs and . steps", said)[0]
    assert position != "continuing after 2 epochs and 3 steps"  # where the damaged one stands
    assert equal(weights_of(out), weights_of(finished[0]))
    assert reproducible(log_of(out)) == reproducible(log_of(finished[0]))
    for path in out.glob("checkpoint*.pth"):
        path.write_bytes(damaged)
    assert "can't be read" in refusal("simsiam.py", small, *TINY, "--out", out, "--resume")


def test_a_damaged_log_is_refused_in_one_line(tmp_path, small, finished):
    """It is no text, while the checkpoint is good."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    (out / "log.jsonl").write_bytes(b"\0\xff{{\n")
    said = refusal("simsiam.py", small, *TINY, "--out", out, "--resume")
    assert "log.jsonl: not a log of this run; restore it, or give another --out (" in said


# --- What else may happen in a run --------------------------------------------------------------------------

def test_what_is_not_finite_ends_the_run(tmp_path, small):
    """The loss or the gradient. The last checkpoint is finite."""
    options = ["--base-lr", "1e6", "--weight-decay", "1"]
    said = refusal("simsiam.py", small, *LONGER, *options, "--out", tmp_path / "run")
    what = r"the loss, \S+, or the gradient, of norm \S+, is not finite in epoch \d+, by step \d+"
    assert re.match(rf"simsiam.py: {what}; the last good checkpoint is .*/checkpoint.pth\. Try", said)
    checkpoint = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)
    assert all(t.isfinite().all() for t in checkpoint["model"].values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path, small, monkeypatch):
    """They overflow in a step whose loss was finite. The last checkpoint stays."""
    save = Run.save

    def overflow(run):
        if run.position() > 0:
            run.parts["model"].encoder.conv1.weight.data.fill_(math.inf)
        save(run)

    monkeypatch.setattr(Run, "save", overflow)
    said = refusal("simsiam.py", small, *QUIET, "--save-minutes", "0", "--out", tmp_path)
    assert "a weight is not finite in epoch 1, by step 2; the last good checkpoint is" in said
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] == 0


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=slow)])
def test_a_run_goes_on_without_its_bad_images(tmp_path, workers, capfd):
    """Odd files among good ones: the bad are named once, counted, and replaced by the next good one."""
    folder = tmp_path / "good"
    write_folder(folder, "train", 40, (70, 80))
    write_folder(folder, "val", 6, (70, 80))
    expected = odd_files(folder / "train/odd")
    bad = [name for name, colour in expected.items() if colour is None]
    options = [*TINY, "--batch", "6", "--epochs", "2", "--size", "24", "--workers", workers]
    assert here("simsiam.py", folder, *options, "--out", tmp_path / "run") is None
    line = r"^bad image, not used \(.*?\): .*/odd/(.*?): can't"
    named = re.findall(line, capfd.readouterr().err, re.MULTILINE)
    assert sorted(named) == sorted(map(printable, bad))
    epochs = [r for r in log_of(tmp_path / "run") if r["event"] == "epoch"]
    assert [r["bad_images"] for r in epochs[1:]] == [len(bad)] * 2


@slow
def test_without_stopgrad_the_run_collapses_and_says_so(tmp_path, capsys):
    """Two epochs of the drawn shapes: near the minimum, with a small std; what is said is what is logged."""
    options = "--width 1/8 --base-lr 1 --batch 64 --epochs 2 --knn-every 0 --size 24 --workers 0".split()
    experiment = ["--experiment", "fig2-without-stopgrad"]
    assert here("simsiam.py", *TINY, *options, *experiment, "--out", tmp_path) is None
    last = log_of(tmp_path)[-2]
    assert last["loss"] < -0.8
    assert last["std"] < 0.5
    assert log_of(tmp_path)[0]["settings"]["pred_lr"] == "cosine"
    assert ("collapsed: all outputs" in capsys.readouterr().out) == last["collapsed"]


@slow
def test_two_thousand_steps_leave_nothing_behind(tmp_path, small, monkeypatch):
    """Memory, open files and log lines, early in the run against its end."""
    open_files = []
    draw_curves = report.draw_curves

    def watched(*args):
        draw_curves(*args)
        open_files.append(len(os.listdir("/proc/self/fd")))

    monkeypatch.setattr(report, "draw_curves", watched)
    options = "--recipe cifar10 --batch 2 --knn-every 0 --workers 0 --epochs 80".split()
    assert here("simsiam.py", small, *TINY, *options, "--out", tmp_path / "run") is None
    log = log_of(tmp_path / "run")
    epochs = [r for r in log if r["event"] == "epoch"]
    assert len(log) == len(epochs) + 2 == 83
    assert epochs[-1]["step"] == 2000
    assert epochs[-1]["memory_mb"] - epochs[10]["memory_mb"] < 10
    assert len(open_files) > 2  # with each checkpoint, and not after every epoch
    assert open_files[-1] == open_files[1]


# --- The rank ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lr, alarms", [
    pytest.param(256, 1, id="five hundred times its lr"),
    pytest.param(0.5, 0, id="its lr", marks=slow),
])
def test_a_low_rank_is_told_although_loss_and_std_look_healthy(tmp_path, capsys, lr, alarms):
    """The std is near 1: the alarm comes once, and no other. The images have no labels."""
    for i in range(240):
        save_image(tmp_path / f"data/{i}.png", shapes.draw_shapes(0, i, 1, 16).image(0))
    options = "--width 1/8 --dim 64 --pred-dim 16 --proj-hidden 64 --epochs 2 --workers 0".split()
    out = tmp_path / "run"
    assert here("simsiam.py", tmp_path / "data", *TINY, *options, "--base-lr", lr, "--out", out) is None
    printed = capsys.readouterr().out
    assert printed.count("low rank: the features spread in") == alarms
    assert "collapsed" not in printed
    untrained, one, two, _ = log_of(out)[1:]
    assert untrained["knn"] is None
    assert (two["rank"] < 0.3 * untrained["rank"]) == bool(alarms)
    assert one["std"] > 0.8


LAYOUTS = torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize("saved, loaded", [LAYOUTS, LAYOUTS[::-1]])
def test_momentum_takes_the_layout_of_the_weights(saved, loaded):
    """A checkpoint of another device has another one, and fused SGD reads weights and momentum in one order.
    A step without a gradient against w - lr 0.9 m, in float64."""
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 8, 3, bias=False).double().to(memory_format=loaded)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, fused=True)
    w, m = torch.randn(2, 8, 3, 3, 3, dtype=torch.float64)
    state = {0: {"momentum_buffer": m.to(memory_format=saved)}}
    checkpoint = {
        "model": {"weight": w.to(memory_format=saved)},
        "optimizer": optimizer.state_dict() | {"state": state},
    }
    Run.load_parts(types.SimpleNamespace(parts={"model": layer, "optimizer": optimizer}), checkpoint)
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    assert torch.allclose(layer.weight, w - 0.1 * 0.9 * m)
