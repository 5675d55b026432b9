"""harness, weights.py: files of weights in every known layout, and damaged, foreign and hostile ones."""
import argparse
import collections
import contextlib
import copy
import math
import os
import re
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lineval
import simsiam
from harness.common import files
from harness.common.errors import Refused
from harness.evaluation import weights
from harness.evaluation.backbones import load_init
from tests.helpers import Hostile, TINY, slow
from tests.helpers import change, crafted_checkpoints, equal, filled, flipped, here, prefixed, refusal
from tests.helpers import settings_of, torchvision_names, untrained, without

pytest_plugins = ["tests.fixtures"]


# --- The layouts --------------------------------------------------------------------------------------------

def an_eighth(names):
    """{name: shape} of a network an eighth as wide."""
    narrow = {}
    for name, shape in names.items():
        narrow[name] = tuple(n // 8 if n % 64 == 0 else n for n in shape)
    return narrow


RESNET18 = an_eighth(torchvision_names(2, (2, 2, 2, 2), 1))
WHOLE = filled(RESNET18)
BACKBONE = without("fc.", WHOLE)
OTHER = without("fc.", filled(RESNET18, seed=1))
HEAD = filled({"0.weight": (64, 64), "0.bias": (64,), "2.weight": (16, 64)})
MOCO = {
    "module.queue": torch.ones(2, 2),
    **prefixed("module.encoder_q.", BACKBONE | prefixed("fc.", HEAD)),
    **prefixed("module.encoder_k.", OTHER),
}


def without_counters(state):
    """The same without BN's counters of batches."""
    return {name: t for name, t in state.items() if "num_batches" not in name}


def in_sequential(first):
    """The backbone in an nn.Sequential, whose stages have the numbers from `first` on."""
    numbers = {"conv1": 0, "bn1": 1} | {f"layer{k + 1}": first + k for k in range(4)}
    named = {}
    for name, t in BACKBONE.items():
        part, _, rest = name.partition(".")
        named[f"{numbers[part]}.{rest}"] = t
    return named


def renamed(state, **parts):
    """The same with these parts of names replaced."""
    for old, new in parts.items():
        assert any(f"{old}." in name for name in state)
        state = {name.replace(f"{old}.", f"{new}."): t for name, t in state.items()}
    return state


class Unknown(dict):
    """A dict of a class that no reader knows."""


CIRCULAR = argparse.Namespace(lr=1)
CIRCULAR.child = argparse.Namespace(parent=CIRCULAR)
PICKLED = untrained("resnet18", 1 / 8, False)
PICKLED.load_state_dict(BACKBONE)
OTHERS = {
    "best_acc1": np.float64(61.5),
    "args": argparse.Namespace(lr=0.1, arch="x"),
    "seen": {("cat", 3): 1, torch.float16: 3},
    "optimizer": {"state": {0: torch.full((2,), math.nan)}},
    "format": "not ours",
}
LAYOUTS = {  # content, and the prefix of the backbone's names in it
    "torchvision's": (WHOLE, ""),
    "torchvision's before 0.4.1": (without_counters(WHOLE), ""),
    "the authors'": (
        {"epoch": 100, "state_dict": prefixed("module.encoder.", BACKBONE | prefixed("fc.", HEAD))},
        "state_dict.module.encoder."),
    "MoCo's": ({"state_dict": MOCO}, "state_dict.module.encoder_q."),
    "beside things of many kinds": ({"state_dict": BACKBONE, **OTHERS}, "state_dict."),
    "a pickled network in dicts of other classes": (
        collections.defaultdict(int, net=PICKLED, cfg=Unknown(lr=1)), "net."),
    "options that contain themselves": ({"net": BACKBONE, "cfg": CIRCULAR}, "net."),
    "dicts and lists deep": ({"models": [{"net": BACKBONE}, 5]}, "models.0.net."),
    "compiled, sharded, checkpointed": (
        prefixed("_orig_mod.", renamed(BACKBONE, layer2="layer2._fsdp_wrapped_module",
                                       layer3="layer3._checkpoint_wrapped_module")),
        ""),
    "numbered, as lightly's, with a momentum network": (
        prefixed("backbone_momentum.", OTHER) | prefixed("backbone.", in_sequential(4)), "backbone."),
    "numbered, without max-pooling": (prefixed("backbone.", in_sequential(3)), "backbone."),
    "numbered, without any layer between": (renamed(in_sequential(2), downsample="shortcut"), ""),
    "beside a momentum encoder": (
        prefixed("module.momentum_encoder.", OTHER) | prefixed("module.base_encoder.", WHOLE),
        "module.base_encoder."),
    "a follower alone": (prefixed("target_network.", BACKBONE), "target_network."),
    "twice the same": (
        prefixed("net.", BACKBONE) | prefixed("online_encoder.net.", BACKBONE)
        | prefixed("target_encoder.net.", OTHER),
        "online_encoder.net."),
}


@pytest.mark.parametrize("content, prefix", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_gives_the_same_backbone(tmp_path, content, prefix):
    """Against the tensors that went in: those of the trained network, under whatever names."""
    path = str(tmp_path / "file.pth")
    torch.save(content, path)
    backbone = lineval.read_backbone(path)
    state = backbone.network.state_dict()
    assert equal(without_counters(state), without_counters(BACKBONE))
    assert backbone.shape == ("resnet18", 1 / 8, False)
    assert backbone.found.prefix == prefix


def test_a_checkpoint_tells_its_epochs_and_settings(tmp_path):
    """Against what went in. Other people's files can tell their epochs too."""
    path = str(tmp_path / "checkpoint.pth")
    settings = settings_of("imagenet", arch="resnet18", width=1 / 8)
    model = prefixed("encoder.", BACKBONE) | {"predictor.3.bias": torch.ones(2)}
    torch.save({"format": 1, "epoch": 3, "step": 0, "settings": settings, "model": model}, path)
    backbone = lineval.read_backbone(path)
    assert equal(backbone.network.state_dict(), BACKBONE)
    later = dict.fromkeys(["range", "val", "val_share", "knn_data"])  # settings that old checkpoints lack
    assert backbone.settings == settings | later
    assert backbone.epochs == 3
    torch.save({"epoch": 200, "state_dict": MOCO}, path)
    assert lineval.read_backbone(path).epochs == 200


def test_the_form_of_before_torch_1_6_is_read(tmp_path):
    """Such files are on the web. Ours have checksums, so a checkpoint in that form is refused."""
    path = str(tmp_path / "file.pth")
    torch.save(MOCO, path, _use_new_zipfile_serialization=False)
    assert equal(lineval.read_backbone(path).network.state_dict(), BACKBONE)
    with pytest.raises(Refused, match="damaged, or not written by a run"):
        files.read(path)


SHAPES = {
    "resnet50, narrow, CIFAR stem": ("resnet50", 1 / 16, True),
    "a third of 64, of which the file shows 21": ("resnet18", 1 / 3, False),
}


@pytest.mark.parametrize("arch, width, cifar_stem", SHAPES.values(), ids=SHAPES)
def test_the_network_is_recognised_from_the_tensors(tmp_path, arch, width, cifar_stem):
    """Against the shape of the network that was saved. An odd width has to be given."""
    network = untrained(arch, width, cifar_stem)
    torch.save(network.state_dict(), tmp_path / "file.pth")
    odd_width = width if width == 1 / 3 else None
    again = lineval.read_backbone(str(tmp_path / "file.pth"), odd_width)
    assert again.shape == (arch, width, cifar_stem)
    assert again.found.width == int(64 * width) / 64
    assert again.found.left_out == {}
    assert equal(again.network.state_dict(), network.state_dict())


def test_prefix_chooses_a_network(tmp_path):
    """With or without the dot at its end; the empty prefix too."""
    path = str(tmp_path / "file.pth")
    third = without("fc.", filled(RESNET18, seed=4))
    torch.save(prefixed("net.", BACKBONE) | prefixed("ema.net.", OTHER) | third, path)
    for prefix, expected in {"net": BACKBONE, "ema.net.": OTHER, "": third}.items():
        assert equal(lineval.read_backbone(path, prefix=prefix).network.state_dict(), expected), prefix
    with pytest.raises(Refused, match="no ResNet under --prefix ema; there are 'net.', 'ema.net.', ''"):
        lineval.read_backbone(path, prefix="ema")


@pytest.mark.parametrize("names", [("first", "second"), ("base", "best")])
def test_two_networks_of_which_none_is_known_to_be_trained_are_refused(tmp_path, names):
    """"base" names the trained network only if another follows it."""
    torch.save(dict(zip(names, (BACKBONE, OTHER))), tmp_path / "file.pth")
    with pytest.raises(Refused, match=r"in it: '\w+\.', '\w+\.'; choose one with --prefix"):
        lineval.read_backbone(str(tmp_path / "file.pth"))


def test_the_run_says_what_it_took_and_left(tmp_path):
    """Against what went into the file."""
    path = str(tmp_path / "file.pth")
    state = prefixed("student.", BACKBONE) | prefixed("ema.", OTHER) | prefixed("head.", HEAD)
    options = {"lr": 0.1, "momentum": 0.9}
    hyper = {"more": options, "seed": 0}
    torch.save({"name": "x", "hyper": hyper, "state_dict": state}, path)
    said = weights.describe_found(lineval.read_backbone(path).found)
    n = len(BACKBONE)
    assert said == (f"{n} tensors of state_dict.student.* matched; left out: name, hyper.more.* (2), "
                    f"hyper.seed, state_dict.ema.* ({n}), state_dict.head.* (3)")


def as_transformers(state):
    """A backbone under the names of transformers' ResNetModel, which count from 0."""
    found = {}
    for name, t in state.items():
        name = re.sub(r"^conv1\.", "embedder.embedder.convolution.", name)
        name = re.sub(r"^bn1\.", "embedder.embedder.normalization.", name)
        name = re.sub(r"\.conv(\d)\.", lambda match: f".layer.{int(match[1]) - 1}.convolution.", name)
        name = re.sub(r"\.bn(\d)\.", lambda match: f".layer.{int(match[1]) - 1}.normalization.", name)
        name = name.replace(".downsample.0.", ".shortcut.convolution.")
        name = name.replace(".downsample.1.", ".shortcut.normalization.")
        name = re.sub(r"^layer(\d)\.", lambda match: f"encoder.stages.{int(match[1]) - 1}.layers.", name)
        found[name] = t
    return found


@pytest.mark.parametrize("arch, last", [
    ("resnet18", "encoder.stages.3.layers.1.layer.1.normalization.running_var"),
    ("resnet50", "encoder.stages.3.layers.2.layer.2.normalization.running_var"),
])
def test_transformers_names_are_read(tmp_path, arch, last):
    """The same tensors, beside a classifier, as in ResNetForImageClassification."""
    network = untrained(arch, 1 / 64, False)
    state = as_transformers(network.state_dict())
    assert {last, "encoder.stages.1.layers.0.shortcut.convolution.weight"} <= state.keys()
    torch.save(prefixed("resnet.", state) | {"classifier.1.weight": torch.ones(3, 8)}, tmp_path / "model.bin")
    backbone = lineval.read_backbone(str(tmp_path / "model.bin"))
    assert backbone.shape == (arch, 1 / 64, False)
    assert equal(backbone.network.state_dict(), network.state_dict())
    assert list(backbone.found.left_out) == ["classifier.1.weight"]


# --- Files that are refused ---------------------------------------------------------------------------------

@pytest.mark.parametrize("is_new", [True, False], ids=["zip", "before torch 1.6"])
def test_a_hostile_file_runs_nothing(tmp_path, monkeypatch, is_new):
    """Where the call is not a weight, the weights may be read; where it is one, the file is refused."""
    monkeypatch.chdir(tmp_path)
    call = Hostile(os.system, ("touch HACKED",))
    form = {"_use_new_zipfile_serialization": is_new}
    torch.save({"state_dict": BACKBONE, "more": call}, "beside.pth", **form)
    torch.save({"state_dict": change(BACKBONE, **{"bn1.weight": call})}, "inside.pth", **form)
    with contextlib.suppress(Refused):
        assert equal(lineval.read_backbone("beside.pth").network.state_dict(), BACKBONE)
    for read in (lineval.read_backbone, files.read):
        with pytest.raises(Refused):
            read("inside.pth")
    assert not os.path.exists("HACKED")
    torch.load("beside.pth", weights_only=False)
    assert os.path.exists("HACKED")  # so the file was a dangerous one


def test_a_file_that_torch_cannot_read_is_refused_in_one_line(tmp_path):
    """Another archive, an old file with more than tensors, code, safetensors: in our words, not torch's."""
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    (tmp_path / "text.pth").write_bytes(b"not a checkpoint")
    with_more = {"state_dict": BACKBONE, "best": np.float64(61.5)}
    torch.save(with_more, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": Hostile(os.system, ("true",))}, tmp_path / "code.pth")
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    words = r"\(safetensors: load it with that package, and torch.save what you get\).*; if you trust it, "
    for name in ("photos.zip", "text.pth", "old.pth", "code.pth", "model.safetensors"):
        path = tmp_path / name
        advice = f"{words}load it with weights_only=False, and"
        with pytest.raises(Refused, match=rf"\A{path}: can't.*{advice}.*\Z"):
            lineval.read_backbone(str(path))


READERS = {
    "a checkpoint": lambda path: files.read(path),
    "anybody's file": lambda path: weights.load(path.read_bytes(), path),
}


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=slow)])
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_damage_is_found_wherever_it_is(tmp_path, read, every):
    """A flipped bit, half a file, none of it; and Python finds a zip archive by its end, torch by its start.

    Padding and time stamps may change: if a file is read, its content is what was saved. In the table of
    contents we try every bit, or every ninth: some decide where, and whether, torch looks for values.
    """
    path = tmp_path / "file.pth"
    state = untrained("resnet18", 1 / 64, True).state_dict()
    torch.save({"conv1.weight": state["conv1.weight"], "x": torch.arange(100.)}, path)
    whole = path.read_bytes()
    content = torch.load(path, weights_only=True)
    table = whole.index(b"PK\x01\x02")
    before = np.random.default_rng(0).integers(0, 8 * table, 300 // every)
    places = [*before, *range(8 * table, 8 * len(whole), every)]
    middle = len(whole) // 2
    damaged = [b"", whole[:middle], flipped(whole, middle) + b"PK\x05\x06"]
    damaged += [flipped(whole, place // 8, bit=int(place) % 8) for place in places]
    refused = []
    for i, damage in enumerate(damaged):
        path.write_bytes(damage)
        try:
            assert equal(read(path), content), i
        except Refused as error:
            assert str(error).startswith(f"{path}: ")
            assert "damaged" in str(error)
            refused.append(i)
    assert refused[:3] == [0, 1, 2]
    assert len(refused) > len(places) / 2


GOOD = untrained("resnet18", 1 / 16, True).state_dict()
ODD = {  # what is put into a good file, and what is said
    "expanded": ({"bn1.weight": torch.ones(()).expand(4)}, "bn1.weight in it must be a plain tensor"),
    "whole numbers": (
        {"bn1.weight": torch.ones(4, dtype=torch.int64)}, "bn1.weight in it must be a plain tensor of float"),
    "another depth": (
        {"layer3.2.conv1.weight": torch.ones(1)},
        r"\[2, 2, 3, 2\] blocks of 2 convolutions, unlike any of resnet18"),
    "without a statistic": (
        {"layer2.0.bn1.running_var": None}, r'Missing key\(s\) in state_dict: "layer2.0.bn1.running_var"'),
    "with a tensor more": (
        {"layer2.0.odd.weight": torch.ones(1)}, r'Unexpected key\(s\) in state_dict: "layer2.0.odd.weight"'),
    "grey": (
        {"conv1.weight": torch.ones(4, 1, 3, 3)}, r"take 3 channels.*mismatch for conv1.weight.*\[4, 1, 3"),
    "13 bands": (
        {"conv1.weight": torch.ones(4, 13, 3, 3)}, r"take 3 channels.*mismatch for conv1.weight.*\[4, 13"),
    "ResNeXt": (
        {"layer1.0.conv1.weight": torch.ones(8, 4, 3, 3), "layer1.0.conv2.weight": torch.ones(4, 2, 3, 3)},
        r"no wider blocks as in Wide ResNet and ResNeXt.*mismatch for layer1.0.conv1.weight"),
    "GroupNorm": (dict.fromkeys(
        [name for name in GOOD if "running" in name or "num_batches" in name]), "have BN, .* no GroupNorm"),
    "squeeze and excitation": ({"layer2.0.se.fc1.weight": torch.ones(1)}, "have BN, .* no GroupNorm, SE or"),
    "another stem": (
        {"bn2.weight": torch.ones(4)}, r'Unexpected key\(s\) in state_dict: "bn2.weight"'),
    "not finite": ({"bn1.bias": torch.full((4,), math.nan)}, "bn1.bias has values that are not finite"),
}


@pytest.mark.parametrize("odd, message", ODD.values(), ids=ODD)
def test_a_file_with_something_odd_is_refused_in_one_line(tmp_path, odd, message):
    """Against the message that tells what is wrong."""
    path = tmp_path / "file.pth"
    torch.save(GOOD | odd, path)
    with pytest.raises(Refused, match=rf"\A{path}: .*{message}.*\Z"):
        lineval.read_backbone(str(path))


def test_a_file_without_a_resnet_is_refused(tmp_path):
    """Against the names in it."""
    path = str(tmp_path / "file.pth")
    head = {"state_dict": prefixed("module.encoder.fc.", HEAD)}
    deep_stem = {name.replace("conv1.weight", "conv1.0.weight"): t for name, t in GOOD.items()}
    shown = {"state_dict.module.encoder.fc.* (3)": head, "no named tensors": torch.ones(3)}
    for names, content in shown.items():
        torch.save(content, path)
        with pytest.raises(Refused) as refused:
            lineval.read_backbone(path)
        said = f"{path}: no ResNet in it: it must have conv1.weight (a stem of one convolution)"
        assert str(refused.value).startswith(said)
        assert str(refused.value).endswith(f"; it has {names}")
    torch.save(deep_stem, path)
    with pytest.raises(Refused, match="a stem of one convolution"):
        lineval.read_backbone(path)


# Parts of a checkpoint that an evaluation doesn't need.
NOT_NEEDED = ("optimizer", "momentum of", "sums", "seconds", "odd keys",
              "too large", "step is negative", "epoch is True", "half a step")
NOT_OURS = ("no format", "no settings")  # all three make a file ours: format, settings, model


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, on a tensor where settings should be
def test_a_crafted_checkpoint_is_evaluated_where_nothing_that_counts_is_odd(tmp_path, finished):
    """Against a list of parts that an evaluation ignores."""
    whole = torch.load(finished[0] / "checkpoint.pth", weights_only=True)
    crafted = crafted_checkpoints(whole)
    evaluated = set()
    for name, content in crafted.items():
        torch.save(content, tmp_path / "file.pth")
        with contextlib.suppress(Refused):
            settings = lineval.read_backbone(str(tmp_path / "file.pth")).settings
            evaluated.add(name)
            if name not in NOT_OURS:
                assert settings["recipe"] == "cifar10", name
                assert settings["size"] == 16, name
    harmless = {name for name in crafted if any(word in name for word in NOT_NEEDED)}
    assert evaluated == harmless | set(NOT_OURS)


# --- Going in: the released bias, --init --------------------------------------------------------------------

INIT = ("--arch resnet50 --width 1/64 --no-cifar-stem --proj-layers 3 --proj-hidden 5 --dim 6 --pred-dim 3 "
        "--size 32 --batch 25 --epochs 1 --base-lr 0 --knn-every 0 --workers 0").split()


@pytest.fixture
def released_with_bias(tmp_path, exported):
    """A released file whose projector's last bias is not zero: its path, and its tensors."""
    content = torch.load(exported[0] / "released.pth.tar", weights_only=True)
    content["state_dict"]["module.encoder.fc.6.bias"] = torch.randn(6)
    torch.save(content, tmp_path / "released.pth.tar")
    return tmp_path / "released.pth.tar", content["state_dict"]


def test_init_starts_from_the_released_weights(tmp_path, exported, small, released_with_bias, capsys):
    """At lr 0 the run ends with the weights that were loaded."""
    path, _ = released_with_bias
    assert here("simsiam.py", small, *INIT, "--init", path, "--out", tmp_path / "run") is None
    assert f"init {path}, backbone and heads" in " ".join(capsys.readouterr().out.split())
    after = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)["model"]
    for name, t in exported[1].named_parameters():
        assert torch.equal(after[name], t), name


def started_from(path, **options):
    """A new model started from this file, its tensors before, and the words for the start block."""
    model = simsiam.SimSiam("resnet50", width=1 / 64, dim=6, pred_dim=3, proj_hidden=5, **options)
    before = copy.deepcopy(model.state_dict())
    said = load_init(model, settings_of("imagenet", width=1 / 64, init=str(path)), None)
    return model, before, said


def test_init_folds_the_released_bias_into_the_running_mean(released_with_bias):
    """Against the released projector's last layer, with its bias, in eval mode."""
    path, theirs = released_with_bias
    model, *_ = started_from(path)
    projector = model.encoder.fc.double().eval()
    x = torch.randn(9, 32, dtype=torch.float64)
    last = {name.removeprefix("module.encoder.fc."): t.double() for name, t in theirs.items()}
    output = F.linear(projector[:6](x), last["6.weight"], last["6.bias"])
    expected = F.batch_norm(output, last["7.running_mean"], last["7.running_var"])
    # The folded mean is a float32, and rounds by 2^-24 of its size.
    mean = last["7.running_mean"].abs() + last["6.bias"].abs()
    bound = 2 ** -24 * mean / last["7.running_var"].sqrt()
    assert ((projector(x) - expected).abs() <= 1.01 * bound).all()


def test_init_takes_a_backbone_alone(tmp_path, exported):
    """The backbone is the file's; the heads are the model's own."""
    theirs = exported[1].encoder.state_dict()
    path = tmp_path / "backbone.pth"
    torch.save(prefixed("encoder_q.", without("fc.", theirs)) | prefixed("encoder_q.fc.", HEAD), path)
    model, before, said = started_from(path)
    expected = before | prefixed("encoder.", without("fc.", theirs))
    assert equal(model.state_dict(), expected)
    assert said.startswith(f"{path}, the backbone; the heads are new")
    assert "left out: encoder_q.fc.* (3)" in said


def test_init_takes_a_runs_folder(tmp_path, small, finished, capsys):
    """The weights of its checkpoint.pth, at lr 0."""
    options = ["--init", finished[0], "--base-lr", 0, "--weight-decay", 0, "--epochs", 1, "--out", tmp_path]
    assert here("simsiam.py", small, *TINY, *options) is None
    printed = " ".join(capsys.readouterr().out.split())
    assert f"init {finished[0]}/checkpoint.pth, backbone and heads" in printed


def test_init_takes_no_part_of_a_longer_projector(tmp_path, exported):
    """Three layers have all the names of two. The run loads the backbone alone, and says so."""
    longer = copy.deepcopy(exported[1])
    longer.encoder.fc.extend(copy.deepcopy(longer.encoder.fc[-2:]))
    torch.save(longer.state_dict(), tmp_path / "longer.pth")
    model, before, said = started_from(tmp_path / "longer.pth")
    assert "the backbone; the heads are new" in said
    assert torch.equal(model.encoder.fc[0].weight, before["encoder.fc.0.weight"])


def test_init_takes_all_that_a_model_without_predictor_has(exported):
    """Backbone and projector are the file's; nothing needs its predictor."""
    model, _, said = started_from(exported[0] / "released.pth.tar", predictor="none")
    assert equal(model.encoder.state_dict(), exported[1].encoder.state_dict())
    assert said.endswith("backbone and heads")


def test_init_refuses_what_does_not_fit(tmp_path, exported, small):
    """The run leaves nothing behind."""
    path = exported[0] / "released.pth.tar"
    message = refusal("simsiam.py", small, *TINY, "--init", path, "--out", tmp_path / "run")
    assert "its network is resnet50, width 0.015625, the run's is resnet18, width" in message
    assert not (tmp_path / "run").exists()
