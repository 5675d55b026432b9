"""harness, run.py and files.py: what a run leaves in its folder, and how it goes on from there."""
import contextlib
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import resnet
import simsiam
from harness.common import files
from harness.common.errors import Refused, printable
from harness.data import opening, shapes
from harness.evaluation import report
from harness.training import recipes
from harness.training.folder import folder_name, locked
from harness.training.run import Run
from tests.helpers import LONGER, ROOT, TINY, equal, flipped, here, log_of, obey_permissions, odd_files
from tests.helpers import program, python, refusal, save_image, slow, weights_of, write_folder

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
    """Its records and the values' ranges, for 3 epochs of 3 steps. tests/test_help.py has their keys."""
    start, *epochs, _ = log_of(finished[0])
    assert 0 <= start["knn_pixels"] <= 100
    assert [r["epoch"] for r in epochs] == [0, 1, 2, 3]
    assert [r["step"] for r in epochs] == [0, 3, 6, 9]
    assert all(0 <= r["knn"] <= 100 for r in epochs)
    for key in ("loss", "std", "lr", "images_per_s", "data_wait", "seconds", "wall_seconds"):
        assert epochs[0][key] is None, key
        assert all(isinstance(r[key], float) for r in epochs[1:]), key
    assert all(-1 <= r["loss"] <= 1 for r in epochs[1:])
    assert all(r["data_wait"] == 0 for r in epochs[1:])  # the images are in memory
    assert all(r["wall_seconds"] > r["seconds"] for r in epochs[1:])  # saving and measuring are in it


def test_screen_says_what_the_run_does(finished):
    """Words that its output must have, for 50 training images."""
    _, printed = finished
    assert "50 images" in printed
    assert "k 3 (a fifth of a class, 200 at most), on 9 images" in printed
    assert "3 epochs of 3 steps, 9 in all (the recipe on its own data: 77,600)" in " ".join(printed.split())
    assert "\ntoo short   on 1,000 to 5,000 images, 500 steps gained" in printed
    assert "minimum -1" in printed
    assert "low rank" not in printed


def saved_network(out):
    """A ResNet under torchvision's names with the weights of backbone.pth, and nothing missing."""
    network = resnet.resnet18(width=1 / 16, cifar_stem=True)
    network.fc = torch.nn.Sequential()
    network.load_state_dict(torch.load(out / "backbone.pth", weights_only=True))
    return network.eval()


def test_backbone_is_the_checkpoints(finished):
    """backbone.pth against the encoder in checkpoint.pth, name by name."""
    trained = weights_of(finished[0])
    for name, t in saved_network(finished[0]).state_dict().items():
        assert torch.equal(t, trained[f".model.encoder.{name}"]), name


def test_the_monitored_knn_is_the_knn_of_the_saved_backbone(finished, small):
    """The last kNN in the log against votes in numpy, from backbone.pth."""
    network = saved_network(finished[0])
    settings = recipes.recipe("cifar10", simsiam.SETTINGS)
    mean, std = (np.array(settings[name]).reshape(3, 1, 1) for name in ("mean", "std"))
    features = []
    train, val, _ = opening.open_data(small)
    for source in (train, val):
        x = (source.pixels.numpy() / 255 - mean) / std
        with torch.no_grad():
            v = network(torch.tensor(x).float()).numpy()
        features.append(v / np.linalg.norm(v, axis=1, keepdims=True))
    similarity = features[1] @ features[0].T
    third = np.sort(similarity, axis=1)[:, [-3]]  # of 50 images in 3 classes, 3 vote
    weight = np.exp(similarity / 0.1) * (similarity >= third)
    votes = weight @ np.eye(3)[train.labels]
    top1 = np.mean(votes.argmax(axis=1) == val.labels)
    assert log_of(finished[0])[-2]["knn"] == pytest.approx(100 * top1)


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


@pytest.mark.parametrize("name", ["..", "/", "a/../..", "x/...", ".hidden", "a\nb", None])
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
def test_an_epochs_end_is_saved_where_that_takes_no_time(tmp_path, small, monkeypatch, seconds, expected):
    """The positions, in a run of seconds, where each time takes so long; the last epoch's end is always one.
    The picture is drawn where the run is saved, and by then has all epochs."""
    positions = positions_saved(monkeypatch)
    drawn = []
    monkeypatch.setattr(report, "draw_curves", lambda path, epochs, *more: drawn.append(len(epochs)))
    save = Run.save

    def slow_save(self):
        save(self)
        self.saving = seconds

    monkeypatch.setattr(Run, "save", slow_save)
    assert here("simsiam.py", small, *QUIET, "--out", tmp_path / "run") is None
    assert positions == expected
    assert drawn == [epoch + (step > 0) + 1 for epoch, step in expected]  # the first is the untrained network
    assert [r["epoch"] for r in log_of(tmp_path / "run") if r["event"] == "epoch"] == [0, 1, 2, 3]


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
    assert "continuing" not in capsys.readouterr().out
    lr = log_of(tmp_path / "run")[-2]["lr"]
    assert here("simsiam.py", *command) is None
    assert "continuing" in capsys.readouterr().out
    events = [r["event"] for r in log_of(tmp_path / "run")]
    assert events == ["start", "epoch", "resume", "epoch", "end"]
    assert log_of(tmp_path / "run")[-2]["lr"] == lr
    assert lr > 0
    assert locked == []  # a start leaves the lock behind for the next in the same process


def test_settings_may_be_overridden_by_name(tmp_path, small, finished, capsys):
    """Four epochs and another weight decay, for a run of three: refused, until both are named."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    options = [small, *TINY, "--epochs", "4", "--weight-decay", "0.1", "--workers", "0"]
    options += ["--out", out, "--resume"]
    said = refusal("simsiam.py", *options)
    assert "epochs 3 -> 4; weight_decay 0.0005 -> 0.1" in said
    assert said.endswith("--override epochs weight_decay")
    assert "workers" not in said
    assert "weight_decay 0.0005 -> 0.1" in refusal("simsiam.py", *options, "--override", "epochs")
    capsys.readouterr()
    assert here("simsiam.py", *options, "--override", "epochs", "weight_decay") is None
    note = "other settings than so far: epochs 3 -> 4; weight_decay 0.0005 -> 0.1; workers 1 -> 0\n"
    assert note in capsys.readouterr().out
    assert log_of(out)[-2]["epoch"] == 4
    optimizer = torch.load(out / "checkpoint.pth", weights_only=True)["optimizer"]
    assert {group["weight_decay"] for group in optimizer["param_groups"]} == {0.1}


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


DAMAGES = {
    "cut in half": lambda whole: whole[:len(whole) // 2],
    "a bit flipped": lambda whole: flipped(whole, 9000),
}


def readable(out):
    """Whether one of the checkpoints in a run's folder can be read."""
    for path in out.glob("checkpoint*.pth"):
        with contextlib.suppress(Refused):
            return bool(files.read(path))
    return False


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_resume_falls_back_to_the_older_checkpoint(tmp_path, small, finished, damage, monkeypatch, capsys):
    """The weights against the uninterrupted run's. One of the two checkpoints is good at every instant."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    damaged = damage((out / "checkpoint.pth").read_bytes())
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
    for path in out.glob("checkpoint*.pth"):
        path.write_bytes(damaged)
    assert "can't be read" in refusal("simsiam.py", small, *TINY, "--out", out, "--resume")


@pytest.mark.parametrize("text", [
    pytest.param("\x00\udcff{{\n", id="no text"),
    pytest.param('{"event": "start"}\n{"event": "epoch", "epoch": 1, "loss": []}\n', id="a list for a loss"),
])
def test_a_crafted_log_is_refused_in_one_line(tmp_path, small, finished, text):
    """Logs that no run has written, beside a good checkpoint."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    (out / "log.jsonl").write_text(text, errors="surrogateescape")
    said = refusal("simsiam.py", small, *TINY, "--out", out, "--resume")
    assert "log.jsonl: no log of this run; restore it, or give another --out (" in said


# --- What else may happen in a run --------------------------------------------------------------------------

@pytest.mark.parametrize("save_minutes, what", [
    pytest.param("0", r"a weight|at lr .*", id="saved in between"),
    pytest.param("10", r"at lr \S+ the loss, \S+, or the gradient, of norm \S+,", id="not saved in between"),
])
def test_what_is_not_finite_ends_the_run(tmp_path, small, save_minutes, what):
    """Found in the weights before they are saved, or in loss and gradient. The last checkpoint is finite."""
    options = ["--base-lr", "1e6", "--weight-decay", "1", "--save-minutes", save_minutes]
    said = refusal("simsiam.py", small, *LONGER, *options, "--out", tmp_path / "run")
    place = r"is not finite in epoch \d+, step \d+; the last good checkpoint is .*/checkpoint.pth\. Try"
    assert re.match(rf"simsiam.py: ({what}) {place}", said)
    checkpoint = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)
    assert all(t.isfinite().all() for t in checkpoint["model"].values())
    assert (checkpoint["step"] > 0) == (save_minutes == "0")


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
    line = r"^bad image, replaced by the next good one: .*/odd/(.*?): can't"
    named = re.findall(line, capfd.readouterr().err, re.MULTILINE)
    assert sorted(named) == sorted(map(printable, bad))
    epochs = [r for r in log_of(tmp_path / "run") if r["event"] == "epoch"]
    assert [r["bad_images"] for r in epochs[1:]] == [len(bad)] * 2


def test_too_many_bad_images_end_the_run(tmp_path):
    """14 of 40 files are empty."""
    write_folder(tmp_path, "train", 40, (70, 80), suffix=".jpg")
    for path in sorted((tmp_path / "train").rglob("*.jpg"))[::3]:
        path.write_bytes(b"")
    options = [*TINY, "--size", "24", "--knn-every", "0", "--workers", "0"]
    said = refusal("simsiam.py", tmp_path, *options, "--out", tmp_path / "run")
    assert re.search("1[1-4] of 40 images can't be read, which is too many", said)
    assert "python augment.py DATA --check lists them" in said


@slow
@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_run_folders_without_permission(tmp_path):
    """One line, and the last checkpoint untouched. A single image that can't be read is replaced."""
    folder = write_folder(tmp_path / "data", "train", 40, (70, 80))
    (folder / "train/a/006.png").chmod(0)
    options = [folder, *TINY, "--size", "24"]
    (tmp_path / "locked").mkdir(mode=0o555)
    refused = program(*options, "--out", tmp_path / "locked/run", preexec_fn=obey_permissions)
    assert refused.returncode == 1
    assert re.search(r"^simsiam.py: .*Permission denied.*locked/run", refused.stderr, re.MULTILINE)
    assert "Traceback" not in refused.stderr
    out = tmp_path / "run"
    made = program(*options, "--out", out, preexec_fn=obey_permissions)
    assert made.returncode == 0, made.stderr
    assert "006.png: can't be read as an image: PermissionError" in made.stderr
    before = (out / "checkpoint.pth").read_bytes()
    out.chmod(0o555)
    options += ["--epochs", "4", "--override", "epochs", "--resume"]
    refused = program(*options, "--out", out, preexec_fn=obey_permissions)
    assert refused.returncode == 1
    assert "log.jsonl: can't be written" in refused.stderr
    assert (out / "checkpoint.pth").read_bytes() == before


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
def test_a_low_rank_is_told_where_loss_and_std_look_healthy(tmp_path, capsys, lr, alarms):
    """The std is near 1: the alarm comes once, and nothing else does. The images have no labels."""
    for i in range(240):
        save_image(tmp_path / f"data/{i}.png", shapes.draw_shapes(0, i, 1, 16).image(0))
    heads = shlex.split("--arch resnet18 --cifar-stem --width 1/8 --dim 64 --pred-dim 16 --proj-hidden 64")
    views = shlex.split("--batch 16 --size 16 --epochs 2 --knn-every 1 --workers 0")
    options = [*heads, *views, "--base-lr", lr, "--out", tmp_path / "run"]
    assert here("simsiam.py", tmp_path / "data", *options) is None
    printed = capsys.readouterr().out
    assert printed.count("low rank: the features spread in") == alarms
    assert "collapsed" not in printed
    untrained, one, two, _ = log_of(tmp_path / "run")[1:]
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
    w = torch.randn(8, 3, 3, 3, dtype=torch.float64)
    m = torch.randn(8, 3, 3, 3, dtype=torch.float64)
    state = {
        "model": {"weight": w.to(memory_format=saved)},
        "optimizer": optimizer.state_dict() | {"state": {0: {"momentum_buffer": m.to(memory_format=saved)}}},
    }
    Run.load_parts(types.SimpleNamespace(parts={"model": layer, "optimizer": optimizer}), state)
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    assert torch.allclose(layer.weight, w - 0.1 * 0.9 * m)
