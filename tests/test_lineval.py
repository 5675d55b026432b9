"""lineval.py: the cached protocol's fit, the four protocols as a whole, resuming, refusals, exports."""
import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import augment
import lineval
import related
import resnet
import simsiam
from harness.common import draws, files
from harness.data import opening
from harness.evaluation.result import describe_accuracy
from harness.training import recipes
from tests.helpers import EVALUATION, PROTOCOL_OPTIONS, RELEASED_HEADS, ROOT, TINY
from tests.helpers import close, equal, here, interrupted_before, kill_when, log_of, prefixed, python, refusal
from tests.helpers import result_of, save_image, slow, torchrun, torchvision_names, untrained, weights_of

pytest_plugins = ["tests.fixtures"]


# --- The cached protocol's fit ------------------------------------------------------------------------------

def torch_fit(x, labels, lr, batches, epochs):
    """A linear layer by torch's own loss, gradient, optimiser and cosine. batches: epoch -> lists of rows."""
    layer = torch.nn.Linear(6, 4).double()
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches(0)))
    for epoch in range(epochs):
        for rows in batches(epoch):
            optimizer.zero_grad()
            F.cross_entropy(layer(x[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return layer


def test_cached_fit_is_sgd_on_the_cross_entropy():
    """Against torch's own, one classifier after the other, in float64; the last batch is incomplete."""
    torch.manual_seed(0)
    x = torch.randn(50, 6, dtype=torch.float64)
    labels = torch.randint(0, 4, (50,))
    lrs = [0.03, 1.0]

    def batches(epoch):
        order = draws.permutation(5, epoch, 50)
        return np.split(order, [16, 32, 48])

    with_ones = F.pad(x, (0, 1), value=1.0)
    ours = lineval.fit(with_ones, labels, 4, lrs, epochs=3, batch=16, seed=5)
    for lr, w in zip(lrs, ours, strict=True):
        layer = torch_fit(x, labels, lr, batches, epochs=3)
        assert close(w[:-1].T, layer.weight)
        assert close(w[-1], layer.bias)


def test_cached_protocol_judges_the_lr_on_training_images_that_the_fit_has_not_seen():
    """With more dimensions than images, a fit learns random labels by heart, but not the held-out ones."""
    torch.manual_seed(0)
    x = torch.randn(200, 300)
    labels = torch.randint(0, 2, (200,))
    layer, base_lr, lr, held_out = lineval.fit_cached(
        x, labels, 2, (0.1, 0.3), epochs=30, batch=20, seed=0)
    assert torch.equal(layer(x).argmax(1), labels)
    assert max(held_out.values()) <= 75
    assert lr == base_lr * 20 / 256


def test_cached_protocol_chooses_the_lr_that_learns():
    """Of two lrs, the one that is not zero, at any scale of the features: the fit standardises them."""
    torch.manual_seed(0)
    x = torch.randn(200, 5, dtype=torch.float64)
    labels = (x[:, 0] > 0).long()
    scores = []
    for features in (x, 7 * x + 3):
        layer, base_lr, *_ = lineval.fit_cached(
            features, labels, 2, (0.0, 1.0), epochs=10, batch=20, seed=0)
        assert base_lr == 1.0
        scores.append(layer(features.to(layer.weight.dtype)))
    assert close(scores[1], scores[0], 1e-4)                         # the layer is float32


def drawn(kind, seed, per_class, classes=10, judged=2000):
    """Classes in 64 dimensions, some of which overlap: training images, labels, then those that judge.

    kind: whether the directions have equal variances
    """
    generator = torch.Generator().manual_seed(seed)
    scale = torch.ones(64) if kind == "equal" else torch.arange(1, 65) ** -0.7
    means = torch.randn(classes, 64, generator=generator) * scale * 0.3
    mixed = torch.randn(64, 64, generator=generator)
    sets = []
    for count in (per_class, judged // classes):
        labels = torch.arange(classes).repeat(count)
        noise = torch.randn(len(labels), 64, generator=generator) * scale
        sets += [(means[labels] + noise) @ mixed, labels]
    return sets


@pytest.mark.parametrize("kind, seed, per_class", [
    ("unequal", 3, 20),
    *(pytest.param(*given, 20, marks=slow) for given in (("equal", 4), ("equal", 6), ("unequal", 4)))])
def test_few_images_choose_an_lr_that_is_nearly_the_best(kind, seed, per_class):
    """Within 1.5 points of the best lr of the sweep, by 2,000 images that play no part in the choice."""
    x, labels, queries, truth = drawn(kind, seed, per_class)
    queries = (queries - x.mean(dim=0)) / x.std(dim=0)
    x = (x - x.mean(dim=0)) / x.std(dim=0)
    options = dict(epochs=100, batch=256, seed=0)
    w = lineval.fit(x, labels, 10, lineval.SWEEP, **options)  # at this batch, lr is base_lr
    percents = 100 * ((queries @ w).argmax(dim=2) == truth).float().mean(dim=1)
    chosen, _ = lineval.choose_lr(x, labels, 10, lineval.SWEEP, **options)
    assert percents[lineval.SWEEP.index(chosen)] >= percents.max() - 1.5


def test_one_tenth_of_many_images_chooses_the_lr(monkeypatch):
    """By top-1, against a fit to the other nine tenths. Here 120 images are many."""
    monkeypatch.setattr(lineval, "ENOUGH_IMAGES", 120)
    x, labels, *_ = drawn("equal", 0, 12)
    base_lrs = (0.0, 0.1)
    chosen, held_out = lineval.choose_lr(x, labels, 10, base_lrs, epochs=4, batch=20, seed=0)
    order = torch.from_numpy(draws.permutation(0, 4, 120))
    judged, fitted = order[:12], order[12:]
    lrs = [base_lr * 20 / 256 for base_lr in base_lrs]
    fits = lineval.fit(x[fitted], labels[fitted], 10, lrs, epochs=4, batch=20, seed=0)
    right = [((x[judged] @ w).argmax(dim=1) == labels[judged]).sum().item() for w in fits]
    assert list(held_out.values()) == [100 * n / 12 for n in right]
    assert right[0] < right[1]
    assert chosen == 0.1


@pytest.mark.parametrize("per_class", [[1, 1], [3, 3], [30, 1]])
def test_classes_of_few_images_have_a_choice(per_class):
    """Even where a class is in no fit: each image judges once."""
    labels = torch.arange(2).repeat_interleave(torch.tensor(per_class))
    x = torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(0))
    chosen, held_out = lineval.choose_lr(x, labels, 2, lineval.SWEEP, epochs=3, batch=256, seed=0)
    assert chosen in lineval.SWEEP
    assert all((percent * len(labels) / 100) == pytest.approx(round(percent * len(labels) / 100))
               for percent in held_out.values())


# --- Which protocol -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("recipe, images, options, name, why", [
    ("imagenet", 1_281_167, "", "lars", ""),
    ("imagenet", 4200, "", "cached", "; chosen because 4,200 images give lars 90 steps"),
    ("imagenet", 96, "", "cached", "; chosen because 96 images give lars no steps"),
    ("imagenet", 96, "--epochs 50", "cached", "; chosen because 96 images give lars no steps"),
    ("imagenet", 4200, "--lars", "lars", ""),
    ("imagenet", 4200, "--batch 64", "lars", ""),
    ("imagenet", 4200, "--resume", "cached", "; chosen because 4,200 images give lars 90 steps"),
    ("cifar10", 50_000, "", "sgd", ""),
    ("cifar10", 500, "", "cached", "; chosen because 500 images give sgd 100 steps"),
    ("shapes", 96, "", "cached", ""),
])
def test_the_default_protocol_is_one_that_the_images_can_bear(recipe, images, options, name, why):
    """Against a table. Who names a setting, or resumes, gets the recipe's wherever it has a step."""
    args = lineval.parse(["--ckpt", "b.pth", *options.split()])
    assert lineval.choose_protocol(args, recipe, images) == (name, why)


def test_a_checkpoint_of_few_images_is_evaluated_without_an_option(tmp_path, finished, capsys):
    """50 images; the start block says which protocol, and why."""
    arguments = ["--ckpt", finished[0] / "checkpoint.pth", "--out", tmp_path / "out"]
    assert here("lineval.py", *arguments) is None
    printed = " ".join(capsys.readouterr().out.split())
    assert "protocol cached: NOT the paper's protocol" in printed
    assert "chosen because 50 images give sgd no steps; 100 epochs" in printed
    assert "give sgd no steps" in result_of(tmp_path / "out")["note"]


def test_a_protocol_that_has_too_few_images_is_told(tmp_path, ten, capsys):
    """Also with a batch that gives enough steps, because the lr falls with it."""
    for name, batch in (("lars", 20), ("sgd", 10)):
        options = [f"--{name}", "--batch", batch, "--epochs", 200, "--out", tmp_path / name]
        with interrupted_before(1):
            here("lineval.py", ten, *EVALUATION, *options)
        assert "few images  lars ended 20 points below --cached on 4,200" in capsys.readouterr().out


# --- Unequal classes ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    """A folder of two classes that no network can tell apart: 30 and 4 images to train, 12 and 2 to judge."""
    folder = tmp_path_factory.mktemp("unequal")
    rng = torch.Generator().manual_seed(0)
    for split, counts in (("train", (30, 4)), ("val", (12, 2))):
        for name, count in zip(("cats", "dogs"), counts):
            for i in range(count):
                pixels = torch.randint(256, (16, 16, 3), generator=rng, dtype=torch.uint8)
                save_image(folder / split / name / f"{i}.png", pixels)
    return folder


@pytest.mark.parametrize("protocol", ["--knn", "--cached", "--lars --batch 34 --epochs 2"])
def test_an_accuracy_of_unequal_classes_is_not_shown_alone(tmp_path, unequal, capsys, protocol):
    """Against the saved features where there is a layer; without top-5, which two classes always reach."""
    arguments = [*EVALUATION, *protocol.split(), "--features", tmp_path / "f.npz", "--out", tmp_path / "out"]
    assert here("lineval.py", unequal, *arguments) is None
    result = result_of(tmp_path / "out")
    assert result["largest_class"] == 100 * 12 / 14
    assert "top5" not in result
    line = capsys.readouterr().out.splitlines()[-2]
    assert "top-5" not in line
    assert (f"top-1 {result['top1']:.2f}% (balanced {result['balanced']:.2f}%; the largest class is 85.71%)"
            in line)
    if protocol != "--knn":
        saved = np.load(tmp_path / "f.npz")
        classifier = torch.load(tmp_path / "out/classifier.pth", weights_only=True)
        scores = saved["val_features"] @ classifier["weight"].numpy().T + classifier["bias"].numpy()
        right = scores.argmax(axis=1) == saved["val_labels"]
        assert result["balanced"] == pytest.approx(50 * (right[:12].mean() + right[12:].mean()))


def test_the_monitor_of_unequal_classes_is_not_shown_alone(tmp_path, unequal, capsys):
    """The log and the screen against lineval.py --knn."""
    options = ["--epochs", 1, "--workers", 0, "--knn-k", 5]
    assert here("simsiam.py", unequal, *TINY, *options, "--out", tmp_path) is None
    printed = capsys.readouterr().out
    last = log_of(tmp_path)[-2]
    arguments = ["--ckpt", tmp_path / "checkpoint.pth", "--knn", "--knn-k", 5]
    assert here("lineval.py", *arguments) is None
    result = result_of(tmp_path / "lineval-knn")
    assert result["k"] == 5
    names = ["top1", "balanced", "largest_class"]
    monitored = [last[name] for name in ("knn", "knn_balanced", "knn_largest_class")]
    assert monitored == [result[name] for name in names]
    skew = f"(balanced {last['knn_balanced']:.2f}%; the largest class is 85.71%)"
    assert f"kNN {last['knn']:.2f}% of 14 {skew}" in printed


def test_a_run_from_before_k_could_be_set_goes_on(tmp_path, finished, small):
    """Its checkpoint says nothing of k."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    checkpoint = torch.load(out / "checkpoint.pth", weights_only=True)
    del checkpoint["settings"]["knn_k"]
    files.save(checkpoint, out / "checkpoint.pth")
    assert here("simsiam.py", small, *TINY, "--out", out, "--resume", "--knn-k", 4) is None
    assert "resume" in [record["event"] for record in log_of(out)]


# --- The protocols ------------------------------------------------------------------------------------------

def percent_of_labels_among_the_best(scores, labels):
    """Top-1 and top-5 in percent, by counting the scores above the label's."""
    own = scores[np.arange(len(labels)), labels]
    above = (scores > own[:, None]).sum(axis=1)
    return [100 * np.mean(above < k) for k in (1, 5)]


@pytest.mark.parametrize("protocol", ["lars", "sgd", "cached"])
def test_accuracy_is_that_of_a_count(evaluated, protocol):
    """Against the saved classifier on the saved features, in numpy."""
    out = evaluated(protocol)
    classifier = torch.load(out / "classifier.pth", weights_only=True)
    weight, bias = (classifier[name].numpy() for name in ("weight", "bias"))
    saved = np.load(out.parent / "features.npz")
    scores = saved["val_features"] @ weight.T + bias
    expected = percent_of_labels_among_the_best(scores, saved["val_labels"])
    result = result_of(out)
    assert close([result["top1"], result["top5"]], expected)
    assert result["val_images"] == 37
    assert result["top5"] > result["top1"] > 0


def test_knn_accuracy_is_that_of_a_count(evaluated):
    """Against the label of the nearest training image, in numpy on the saved features: 80 / 10 / 5 = 1 votes.

    A class without a vote is never a hit.
    """
    out = evaluated("knn")
    saved = np.load(out.parent / "features.npz")
    bank = saved["train_features"]
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    nearest = (saved["val_features"] @ bank.T).argmax(axis=1)
    expected = 100 * np.mean(saved["train_labels"][nearest] == saved["val_labels"])
    assert close([result_of(out)["top1"]], [expected])
    assert "top5" not in result_of(out)  # one neighbour votes for one class


@slow
@pytest.mark.parametrize("protocol", PROTOCOL_OPTIONS)
def test_two_processes_give_the_accuracy_of_one(tmp_path, ten, evaluated, protocol):
    """Neither 2 nor the batch divides 37 validation images."""
    arguments = [ten, *EVALUATION, *PROTOCOL_OPTIONS[protocol], "--out", tmp_path]
    done = torchrun(ROOT / "lineval.py", *arguments)
    assert done.returncode == 0, done.stderr
    one, two = result_of(evaluated(protocol)), result_of(tmp_path)
    for key in ("top1", "top5", "balanced", "largest_class", "val_images"):
        assert two.get(key) == one.get(key)
    assert two["world"] == 2


# --- The files of an evaluation -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def judged(tmp_path_factory, ten):
    """A file of weights, next to its evaluation's files; and the network in it."""
    folder = tmp_path_factory.mktemp("judged")
    network = untrained("resnet18", 1 / 16, True).eval()
    torch.save(network.state_dict(), folder / "b.pth")
    arguments = [ten, "--ckpt", folder / "b.pth", "--cached", "--epochs", "2", "--features", folder / "f.npz"]
    assert here("lineval.py", *arguments) is None
    return folder / "b.pth", network


def test_evaluation_writes_what_it_says(judged, ten):
    """The result names everything that it depends on, and which protocol it is not."""
    path, _ = judged
    out = path.parent / f"lineval-cached-b-{ten.name}"
    written = ["classifier.pth", "lineval.json", "neighbors.png"]
    assert sorted(p.name for p in out.iterdir()) == [".writer", *written]
    result = result_of(out)
    expected = {
        "backbone": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "epochs": 2,
        "data": str(ten),
        "images": 80,
        "classes": 10,
        "seed": 0,
        "lr": result["base_lr"],
    }
    assert {name: result[name] for name in expected} == expected
    assert result["note"].startswith("NOT the paper's protocol")
    classifier = torch.load(out / "classifier.pth", weights_only=True)
    assert classifier["note"] == result["note"]
    assert classifier["classes"] == opening.open_data(ten)[0].classes


def test_saved_features_are_the_networks(judged, ten):
    """Against the network on images that numpy normalised."""
    path, network = judged
    recipe = recipes.recipe("cifar10", simsiam.SETTINGS)
    mean = np.reshape(recipe["mean"], (3, 1, 1))
    std = np.reshape(recipe["std"], (3, 1, 1))
    saved = np.load(path.parent / "f.npz")
    train, val, _ = opening.open_data(ten)
    for split, source in (("train", train), ("val", val)):
        images = (source.pixels.numpy() / 255 - mean) / std
        expected = network.features(torch.tensor(images).float())
        assert close(saved[f"{split}_features"], expected, 1e-4)
        assert np.array_equal(saved[f"{split}_labels"], source.labels)
        assert np.array_equal(saved[f"{split}_files"], source.files)


def test_knn_of_a_checkpoint_is_the_monitors(tmp_path, finished, small):
    """Against the last epoch in the log of the run; the checkpoint says on which data."""
    out, _ = finished
    assert here("lineval.py", "--ckpt", out / "checkpoint.pth", "--knn", "--out", tmp_path / "knn") is None
    result = result_of(tmp_path / "knn")
    assert close(result["top1"], log_of(out)[-2]["knn"])
    assert result["data"] == str(small)


def test_knn_has_as_many_neighbours_as_in_pre_training(tmp_path, small):
    """5 of them, by the option; the file tells. The log against the evaluation."""
    options = ["--epochs", 1, "--workers", 0, "--knn-k", 5, "--out", tmp_path]
    assert here("simsiam.py", small, *TINY, *options) is None
    assert here("lineval.py", "--ckpt", tmp_path / "backbone.pth", "--knn", "--out", tmp_path / "knn") is None
    result = result_of(tmp_path / "knn")
    assert result["k"] == 5
    assert close(result["top1"], log_of(tmp_path)[-2]["knn"])


def test_checkpoint_says_data_and_protocol(tmp_path, finished, small):
    """The recipe cifar10 calls for MoCo's protocol; the result is the last epoch's, not the best one's."""
    arguments = ["--ckpt", finished[0] / "checkpoint.pth", "--epochs", "2", "--batch", "9"]
    assert here("lineval.py", *arguments, "--out", tmp_path / "run") is None
    result = result_of(tmp_path / "run")
    expected = {"protocol": "sgd", "recipe": "cifar10", "size": 16, "data": str(small)}
    assert {name: result[name] for name in expected} == expected
    _, first, last, _ = log_of(tmp_path / "run")
    assert last["step"] == 10
    assert result["top1"] == last["top1"]
    assert result["balanced"] == last["balanced"]
    assert "top5" not in {**result, **last}  # of three classes
    assert result["best_epoch_not_the_result"]["top1"] == max(first["top1"], last["top1"])


# --- What gives no number -----------------------------------------------------------------------------------

def test_a_backbone_that_is_not_frozen_gives_no_number(tmp_path, ten, monkeypatch):
    """A backbone in training mode changes its running statistics."""
    features = resnet.ResNet.features

    def features_in_training_mode(self, x):
        return features(self.train(), x)

    monkeypatch.setattr(resnet.ResNet, "features", features_in_training_mode)
    message = refusal("lineval.py", ten, *EVALUATION, "--knn", "--out", tmp_path / "run")
    assert "the backbone has changed during the evaluation" in message
    assert not (tmp_path / "run/lineval.json").exists()


def test_features_that_are_not_finite_give_no_number(tmp_path, ten):
    """Weights of 1e38 are finite, their products aren't."""
    state = untrained("resnet18", 1 / 16, True).state_dict()
    state["bn1.weight"] = torch.full((4,), 1e38)
    torch.save(state, tmp_path / "huge.pth")
    arguments = ["--ckpt", tmp_path / "huge.pth", "--knn", "--out", tmp_path / "run"]
    assert "its features are not all finite" in refusal("lineval.py", ten, *arguments)
    assert not (tmp_path / "run/lineval.json").exists()


# --- Resuming -----------------------------------------------------------------------------------------------

def assert_same_evaluation(whole, resumed):
    """Two runs of the same evaluation have the same layer, momentum, epochs and result."""
    assert equal(weights_of(whole), weights_of(resumed))
    keys = ("epoch", "step", "loss", "lr", "top1", "balanced")
    epochs = []
    for folder in (whole, resumed):
        records = [record for record in log_of(folder) if record["event"] == "epoch"]
        epochs.append([{key: record[key] for key in keys} for record in records])
    assert epochs[0] == epochs[1]
    result = result_of(resumed)
    assert (result["top1"], result["balanced"]) == (epochs[0][-1]["top1"], epochs[0][-1]["balanced"])


@pytest.mark.parametrize("protocol", ["lars", pytest.param("sgd", marks=slow)])
def test_interrupted_and_resumed_evaluation_ends_with_the_uninterrupted_layer(
        tmp_path, ten, evaluated, protocol):
    """Interrupted after the first step of the second epoch, with a checkpoint after every step."""
    arguments = [ten, *EVALUATION, *PROTOCOL_OPTIONS[protocol], "--save-minutes", "0", "--out", tmp_path]
    steps_per_epoch = {"lars": 2, "sgd": 8}[protocol]
    with interrupted_before(steps_per_epoch + 1):
        assert "interrupted" in here("lineval.py", *arguments)
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["step"]) == (1, 1)
    assert here("lineval.py", *arguments, "--resume") is None
    assert_same_evaluation(evaluated(protocol), tmp_path)


@slow
def test_killed_and_resumed_evaluation_ends_with_the_uninterrupted_layer(tmp_path, large):
    """kill -9 in the middle of an epoch, with workers."""
    torch.save(untrained("resnet18", 1 / 16, False).state_dict(), tmp_path / "b.pth")
    arguments = f"{large} --ckpt {tmp_path}/b.pth --lars --epochs 8 --batch 2 --save-minutes 0 --workers 1"
    command = [str(ROOT / "lineval.py"), *arguments.split(), "--out"]
    killed = tmp_path / "killed"
    done = python(*command, tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    position = kill_when([sys.executable, *command, str(killed)], killed, epoch=2)
    assert 0 < position["step"] < 10, "the kill came at a moment that shows nothing"
    assert position["epoch"] < 5, "the kill came at a moment that shows nothing"
    again = python(*command, killed, "--resume")
    assert again.returncode == 0, again.stderr
    assert_same_evaluation(tmp_path / "whole", killed)


@pytest.mark.parametrize("protocol", ["cached", "knn", "lars"])
def test_an_evaluation_that_is_done_ends_well_again(tmp_path, evaluated, ten, capsys, protocol):
    """--resume auto, as a job script gives it again: the number. A layer with other settings is another
    evaluation, and refused; nothing changes."""
    out = tmp_path / protocol
    shutil.copytree(evaluated(protocol), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    features = ["--features", tmp_path / "features.npz"]
    command = [ten, *EVALUATION, *PROTOCOL_OPTIONS[protocol], *features, "--out", out, "--resume", "auto"]
    assert here("lineval.py", *command) is None
    assert f"{protocol}: {describe_accuracy(result_of(out))} on 37 of 37" in capsys.readouterr().out
    assert "was made with other settings (seed 0 -> 1)" in refusal("lineval.py", *command, "--seed", "1")
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert after.items() >= {name: before[name] for name in ("lineval.json", "neighbors.png")}.items()


# --- Refusals -----------------------------------------------------------------------------------------------

REFUSALS = {  # the arguments, and the message; {files} has good.pth, a ResNet-18 of width 1/16
    "missing file": ("{ten} --ckpt {files}/missing.pth", "missing.pth: no such file"),
    "no checkpoint": ("{ten}", "--ckpt"),
    "unknown network": ("{ten} --ckpt random:vgg16", "or one of random:resnet18"),
    "another width": ("{ten} --ckpt {files}/good.pth --width 1/8", "size mismatch for conv1.weight"),
    "no data": ("--ckpt {files}/good.pth", "doesn't say what it was trained on; name the DATA"),
    "no labels": ("{ten}/train {untrained}", "needs labels: train/<class>/... and val/<class>/..."),
    "batch larger than the data": (
        "{ten} {untrained} --lars", "--batch 4096 must be at most 80, the number of images"),
    "neighbours without knn": ("{ten} {untrained} --cached --knn-k 3", "--knn-k needs --knn"),
    "epochs of knn": ("{ten} {untrained} --knn --epochs 3", "--epochs: --knn trains nothing"),
    "folder with a result": ("{ten} {untrained} --cached --out {files}", "another folder with --out"),
    "resuming the cached protocol": (
        "{ten} {untrained} --cached --resume", "nothing to resume; leave out --resume"),
    "features in a file that is there": (
        "{ten} {untrained} --knn --features {files}/good.pth", "good.pth: already exists"),
    "features in no folder": (
        "{ten} {untrained} --knn --features {files}/no/f.npz", "no/f.npz: its folder must be there"),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with good.pth, and a result."""
    folder = tmp_path_factory.mktemp("prepared")
    torch.save(untrained("resnet18", 1 / 16, True).state_dict(), folder / "good.pth")
    (folder / "lineval.json").write_text("{}")
    return folder


@pytest.mark.parametrize("arguments, message", REFUSALS.values(), ids=REFUSALS)
def test_evaluation_of_what_cannot_be_evaluated_is_refused_in_one_line(
        tmp_path, monkeypatch, ten, prepared, arguments, message):
    """Against the message that tells what to do; nothing is written."""
    monkeypatch.chdir(tmp_path)
    before = sorted(prepared.iterdir())
    filled_in = arguments.format(ten=ten, files=prepared, untrained="--ckpt random:resnet18")
    assert message in refusal("lineval.py", *filled_in.split())
    assert list(tmp_path.iterdir()) == []
    assert sorted(prepared.iterdir()) == before


@slow
def test_a_refusal_ends_the_program_under_torchrun_too(tmp_path, prepared):
    """The message comes once, from one of the two processes."""
    done = torchrun(ROOT / "lineval.py", "--ckpt", prepared / "good.pth", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("doesn't say what it was trained on") == 1
    assert list(tmp_path.iterdir()) == []


# --- Exports ------------------------------------------------------------------------------------------------

RESNET50 = torchvision_names(3, (3, 4, 6, 3), 4)
BACKBONE_NAMES = [name for name in RESNET50 if not name.startswith("fc.")]


def test_the_torchvision_export_has_torchvisions_names(exported):
    """Against the names spelled out, in order, and the model's tensors."""
    folder, model = exported
    ours = model.state_dict()
    state = torch.load(folder / "resnet50-torchvision.pth", weights_only=True)
    assert list(state) == BACKBONE_NAMES
    assert equal(state, {name: ours[f"encoder.{name}"] for name in BACKBONE_NAMES})


def test_the_released_export_has_the_released_names(exported):
    """Against the names spelled out, and the model's tensors; the projector's last bias is zero.

    No other export replaces it.
    """
    folder, model = exported
    again = ["--ckpt", folder / "checkpoint.pth", "--export", "released"]
    assert "already exists" in refusal("lineval.py", *again)
    content = torch.load(folder / "released.pth.tar", weights_only=True)
    assert content["arch"] == "resnet50"
    assert content["epoch"] == 7  # 6, and 9 steps
    state = content["state_dict"]
    names = [f"encoder.{name}" for name in BACKBONE_NAMES] + [*RELEASED_HEADS, "encoder.fc.6.bias"]
    assert sorted(state) == sorted("module." + name for name in names)
    assert not state.pop("module.encoder.fc.6.bias").any()
    assert equal(state, prefixed("module.", model.state_dict()))


# --- Features alone -----------------------------------------------------------------------------------------

def test_data_without_labels_gets_features_alone(tmp_path, judged, ten, capsys):
    """Against those that an evaluation saved of the same images, and the weights that they say they are of.
    Nothing else is written."""
    path, _ = judged
    arguments = [ten / "train", "--ckpt", path, "--features", tmp_path / "f.npz"]
    assert here("lineval.py", *arguments) is None
    assert f"writes to   {tmp_path}/f.npz" in capsys.readouterr().out
    alone = np.load(tmp_path / "f.npz")
    beside_the_result = np.load(path.parent / "f.npz")
    assert set(alone) == {"train_features", "train_files", "settings"}
    assert json.loads(str(alone["settings"]))["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    for name in ("train_features", "train_files"):
        assert np.array_equal(alone[name], beside_the_result[name])
    assert list(tmp_path.iterdir()) == [tmp_path / "f.npz"]


# --- The options --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script, needed", [
    (simsiam, ""), (lineval, "--ckpt b.pth"), (related, "--method byol"), (augment, "")])
def test_options_cannot_be_abbreviated(script, needed, capsys):
    """--see is no --seed."""
    with pytest.raises(SystemExit) as end:
        script.parse([*needed.split(), "--see", "20"])
    assert "unrecognized arguments: --see" in f"{end.value.code} {capsys.readouterr().err}"


# --- The whole way ------------------------------------------------------------------------------------------

@slow
def test_linear_evaluation_of_the_shapes_run_beats_the_untrained_network(tmp_path):
    """The README's first commands, with 3 of the 6 epochs, against each other."""
    commands = [
        "simsiam.py --epochs 3",
        "lineval.py --ckpt runs/shapes/checkpoint.pth",
        "lineval.py --ckpt random:resnet18",
    ]
    for command in commands:
        arguments = [sys.executable, *command.split()]
        arguments[1] = ROOT / arguments[1]
        subprocess.run(arguments, cwd=tmp_path, check=True, capture_output=True)  # it takes minutes
    trained = result_of(tmp_path / "runs/shapes/lineval-cached")
    by_chance = result_of(tmp_path / "runs/shapes-random-resnet18/lineval-cached")
    assert trained["top1"] >= by_chance["top1"] + 20
