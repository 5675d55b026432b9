"""harness, weights.py: files of weights in every known layout, and damaged, foreign and hostile ones."""
import argparse
import collections
import contextlib
import copy
import math
import os
import tarfile
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
from harness.evaluation.init import load_init
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
WITHOUT_COUNTERS = {name: t for name, t in WHOLE.items() if "num_batches" not in name}
OTHER = without("fc.", filled(RESNET18, seed=1))
FC = ["fc.weight", "fc.bias"]
HEAD = filled({"0.weight": (64, 64), "0.bias": (64,), "2.weight": (16, 64)})
MOCO = {"module.queue": torch.ones(2, 2), **prefixed("module.encoder_q.fc.", HEAD),
        **prefixed("module.encoder_k.", OTHER)}
RELEASED_HEAD = {"module.encoder.fc.0.weight": torch.ones(3, 64), "module.predictor.3.bias": torch.ones(2)}
SETTINGS = settings_of("imagenet", arch="resnet18", width=1 / 8)
LAYOUTS = {  # the content of a file, the names in it that are not the backbone's, and the epochs it tells
    "torchvision": (WHOLE, FC, None),
    "torchvision before 0.4.1": (WITHOUT_COUNTERS, FC, None),
    "backbone.pth": (BACKBONE, [], None),
    "checkpoint.pth": (
        {"format": 1, "epoch": 3, "step": 0, "settings": SETTINGS,
         "model": prefixed("encoder.", BACKBONE) | {"predictor.3.bias": torch.ones(2)}},
        ["predictor.3.bias"], 3),
    "released": (
        {"epoch": 100, "arch": "resnet18", "optimizer": {"state": {}, "param_groups": []},
         "state_dict": prefixed("module.encoder.", BACKBONE) | RELEASED_HEAD},
        ["epoch", "arch", "optimizer.param_groups", *prefixed("state_dict.", RELEASED_HEAD)], 100),
    "released without module": (
        {"state_dict": prefixed("encoder.", BACKBONE) | {"encoder.fc.6.bias": torch.ones(3)}},
        ["state_dict.encoder.fc.6.bias"], None),
    "MoCo": (
        {"epoch": 200, "state_dict": prefixed("module.encoder_q.", BACKBONE) | MOCO},
        ["epoch", *prefixed("state_dict.", MOCO)], 200),
    "DataParallel": (
        {"state_dict": prefixed("module.", WHOLE)},
        ["state_dict.module.fc.weight", "state_dict.module.fc.bias"], None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_known_layout_gives_the_same_backbone(tmp_path, layout):
    """Against what went into the file; a file without BN counters gets zeros."""
    content, names_left_out, epochs = LAYOUTS[layout]
    path = str(tmp_path / "file.pth")
    torch.save(content, path)
    backbone = lineval.read_backbone(path)
    expected = dict(BACKBONE)
    if layout == "torchvision before 0.4.1":
        expected |= {name: torch.tensor(0) for name in BACKBONE if "num_batches" in name}
    assert equal(backbone.network.state_dict(), expected)
    assert backbone.shape == ("resnet18", 1 / 8, False)
    assert list(backbone.found.left_out) == names_left_out
    assert backbone.epochs == epochs
    settings = SETTINGS | {"range": None} if layout == "checkpoint.pth" else {}
    assert backbone.settings == settings


@pytest.mark.parametrize("layout", ["torchvision", "MoCo"])
def test_the_form_of_before_torch_1_6_is_read(tmp_path, layout):
    """As files lie on the web; no run of ours has written one, and nobody would notice a flipped bit."""
    path = str(tmp_path / "file.pth")
    torch.save(LAYOUTS[layout][0], path, _use_new_zipfile_serialization=False)
    backbone = lineval.read_backbone(path)
    assert equal(backbone.network.state_dict(), BACKBONE)
    assert weights.describe_found(backbone.found, path).endswith("this old form of file has no checksums")
    with pytest.raises(Refused, match="nothing that a run has written"):
        files.read(path)


SHAPES = {
    "resnet34, narrow, CIFAR stem": ("resnet34", 1 / 8, True),
    "resnet50, narrow": ("resnet50", 1 / 16, False),
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


# --- Other people's files -----------------------------------------------------------------------------------

def in_sequential(first):
    """The backbone in an nn.Sequential: conv1, bn1, what has no weights, and from `first` on the stages."""
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


def with_attributes(state):
    """The same tensors as nn.Parameters to which somebody has added an attribute."""
    parameters = {}
    for name, t in state.items():
        parameters[name] = torch.nn.Parameter(t, requires_grad=t.is_floating_point())
        parameters[name].sequence_parallel = False
    return parameters


class Unknown(dict):
    """A dict of a class that no reader knows."""


PICKLED = untrained("resnet18", 1 / 8, False)
PICKLED.load_state_dict(BACKBONE)
OTHERS = {
    "best_acc1": np.float64(61.5),
    "args": argparse.Namespace(lr=0.1, arch="x"),
    "seen": {("cat", 3): 1, torch.float16: 3},
    "optimizer": {"state": {0: {"momentum_buffer": torch.full((2,), math.nan)}}},
    "format": "not ours",
}
OTHER_LAYOUTS = {  # content, and the prefix that is found
    "beside things of many kinds": ({"state_dict": BACKBONE, **OTHERS}, "state_dict."),
    "a whole pickled network": (PICKLED, ""),
    "dicts of other classes": (
        collections.defaultdict(int, model=collections.Counter(BACKBONE), best=np.int64(3)),
        "model."),
    "a pickled network beside a dict of another class": ({"net": PICKLED, "cfg": Unknown(lr=1)}, "net."),
    "parameters, with gradients and attributes": (with_attributes(BACKBONE), ""),
    "dicts and lists deep": ({"a": {"b": {"models": [{"net": BACKBONE}, 5]}}}, "a.b.models.0.net."),
    "compiled, sharded, checkpointed": (
        prefixed("_orig_mod.", renamed(BACKBONE, layer2="layer2._fsdp_wrapped_module",
                                       layer3="layer3._checkpoint_wrapped_module")),
        ""),
    "numbered, as lightly's, with a momentum network": (
        prefixed("backbone_momentum.", OTHER) | prefixed("backbone.", in_sequential(4)), "backbone."),
    "numbered, without max-pooling": (prefixed("backbone.", in_sequential(3)), "backbone."),
    "numbered, without any layer between": (renamed(in_sequential(2), downsample="shortcut"), ""),
    "teacher and student": (
        {"teacher": prefixed("backbone.", OTHER), "student": prefixed("module.backbone.", BACKBONE)},
        "student.module.backbone."),
    "beside a momentum encoder": (
        prefixed("module.momentum_encoder.", OTHER) | prefixed("module.base_encoder.", WHOLE),
        "module.base_encoder."),
    "a follower alone": (prefixed("target_network.", BACKBONE), "target_network."),
    "twice the same": (
        prefixed("net.", BACKBONE) | prefixed("online_encoder.net.", BACKBONE)
        | prefixed("target_encoder.net.", OTHER),
        "online_encoder.net."),
    "twice with different heads": (
        prefixed("first.", BACKBONE) | prefixed("second.", BACKBONE)
        | {"first.fc.weight": torch.ones(2, 64), "second.fc.weight": torch.zeros(3, 64)},
        "first."),
}


@pytest.mark.parametrize("content, prefix", OTHER_LAYOUTS.values(), ids=OTHER_LAYOUTS)
def test_the_backbone_in_anybodys_file(tmp_path, content, prefix):
    """Against the tensors that went in: those of the trained network, under whatever names."""
    path = str(tmp_path / "file.pth")
    torch.save(content, path)
    backbone = lineval.read_backbone(path)
    assert equal(backbone.network.state_dict(), BACKBONE)
    assert backbone.found.prefix == prefix


def test_prefix_chooses_a_network(tmp_path):
    """By the whole of it, else by its end: every prefix ends as the empty one does."""
    path = str(tmp_path / "file.pth")
    third = without("fc.", filled(RESNET18, seed=4))
    torch.save(prefixed("net.", BACKBONE) | prefixed("ema.of.net.", OTHER) | third, path)
    networks = {"net": BACKBONE, "net.": BACKBONE, "ema.of.net": OTHER, "of.net": OTHER, "": third}
    for prefix, expected in networks.items():
        assert equal(lineval.read_backbone(path, prefix=prefix).network.state_dict(), expected), prefix
    with pytest.raises(Refused, match="no ResNet under --prefix ema; there are 'net.', 'ema.of.net.', ''"):
        lineval.read_backbone(path, prefix="ema")


@pytest.mark.parametrize("names", [("first", "second"), ("base", "best")])
def test_two_networks_of_which_none_is_known_to_be_trained_are_refused(tmp_path, names):
    """"base" names the trained network only beside one that follows it."""
    torch.save(dict(zip(names, (BACKBONE, OTHER))), tmp_path / "file.pth")
    with pytest.raises(Refused, match=r"in it: '\w+\.', '\w+\.'; choose one with --prefix"):
        lineval.read_backbone(str(tmp_path / "file.pth"))


def test_what_is_taken_and_left_is_said(tmp_path):
    """Against what went into the file."""
    path = str(tmp_path / "file.pth")
    state = prefixed("student.", BACKBONE) | prefixed("ema.", OTHER) | prefixed("head.", HEAD)
    options = {"lr": 0.1, "momentum": 0.9}
    torch.save({"name": "x", "hyper": {"more": options, "seed": 0}, "state_dict": state}, path)
    said = weights.describe_found(lineval.read_backbone(path).found, path)
    n = len(BACKBONE)
    assert said == (f"{n} tensors of state_dict.student.* matched, which is taken for the trained network "
                    "and not state_dict.ema.* (--prefix); left out: name, hyper.more.* (2), hyper.seed, "
                    f"state_dict.ema.* ({n}), state_dict.head.* (3)")


# --- Files that are refused ---------------------------------------------------------------------------------

CALLS = {  # each writes a file
    "os.system": Hostile(os.system, ("touch HACKED",)),
    "eval": Hostile(eval, ("open('HACKED', 'w')",)),
    "open": Hostile(open, ("HACKED", "w")),
}


@pytest.mark.parametrize("is_new", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_hostile_file_runs_nothing(tmp_path, monkeypatch, call, is_new):
    """Beside good weights the call is left out, or the file is refused; in their place it is refused."""
    monkeypatch.chdir(tmp_path)
    form = {"_use_new_zipfile_serialization": is_new}
    torch.save({"state_dict": BACKBONE, "more": call}, "beside.pth", **form)
    torch.save({"state_dict": change(BACKBONE, **{"bn1.weight": call})}, "inside.pth", **form)
    with contextlib.suppress(Refused):
        assert list(lineval.read_backbone("beside.pth").found.left_out) == ["more"]
    for read in (lineval.read_backbone, files.read):
        with pytest.raises(Refused):
            read("inside.pth")
    assert not os.path.exists("HACKED")
    torch.load("beside.pth", weights_only=False)
    assert os.path.exists("HACKED")  # so the file was a dangerous one


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_what_is_no_file_of_weights_is_named(tmp_path):
    """A TorchScript program, archives, safetensors and more: one line each, none of torch's words."""
    program = torch.jit.script(torch.nn.Linear(2, 2))
    torch.jit.save(program, tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    with tarfile.open(tmp_path / "weights.tar", "w") as archive:
        archive.add(tmp_path / "photos.zip", "photos.zip")
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_bytes(b"not a checkpoint")
    with_more = {"state_dict": BACKBONE, "best": np.float64(61.5)}
    torch.save(with_more, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": Hostile(os.system, ("true",))}, tmp_path / "code.pth")
    expected = {
        "script.pt": "it is a TorchScript program",
        "photos.zip": "it is a zip archive; unpack it",
        "weights.tar": "it is a tar archive; unpack it",
        "model.safetensors": "it is a safetensors file; load it",
        "empty.pth": "it is damaged, or torch.save did not write it",
        "text.pth": "it is damaged, or torch.save did not write it",
        "old.pth": "the form of before torch 1.6, and is damaged or has more in it than tensors",
        "code.pth": "it has more in it than tensors, numbers and words, and reading that could run code",
    }
    for name, words in expected.items():
        with pytest.raises(Refused) as refused:
            lineval.read_backbone(str(tmp_path / name))
        assert words in str(refused.value)
        assert "\n" not in str(refused.value)
        assert "Weights only load failed" not in str(refused.value)


READERS = {
    "a checkpoint": lambda path: files.read(path),
    "anybody's file": lambda path: weights.load(path.read_bytes(), path),
}


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=slow)])
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path, read, every):
    """Padding and time stamps may change: what is read without complaint is what was saved. In the table of
    contents every bit is tried, or every fifth: some decide where, and whether, torch looks for values."""
    path = tmp_path / "file.pth"
    state = untrained("resnet18", 1 / 64, True).state_dict()
    torch.save({"conv1.weight": state["conv1.weight"], "x": torch.arange(100.)}, path)
    whole = path.read_bytes()
    content = torch.load(path, weights_only=True)
    table = whole.index(b"PK\x01\x02")
    before = np.random.default_rng(0).integers(0, 8 * table, 300 // every)
    places = [*before, *range(8 * table, 8 * len(whole), every)]
    refused = 0
    for place in places:
        path.write_bytes(flipped(whole, place // 8, bit=int(place) % 8))
        try:
            assert equal(read(path), content), place
        except Refused:
            refused += 1
    assert refused > len(places) / 2


DAMAGED = {  # what happens to the bytes of a good file
    "empty": lambda whole: b"",
    "truncated": lambda whole: whole[:len(whole) // 2],
    "flipped": lambda whole: flipped(whole, len(whole) // 2),
    "flipped, with a mark behind its end": lambda whole: flipped(whole, len(whole) // 2) + b"PK\x05\x06",
}
GOOD = untrained("resnet18", 1 / 16, True).state_dict()


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, damage, read):
    """Python finds a zip archive by its end, torch by its beginning."""
    path = tmp_path / "file.pth"
    torch.save(GOOD, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(Refused, match=rf"\A{path}: .*damaged.*\Z"):
        read(path)


ODD = {  # what is put into a good file, and what is said
    "words": ({"bn1.weight": "a word"}, "bn1.weight in it is a str, not a plain tensor"),
    "an array": (
        {"bn1.weight": np.ones(4)}, "bn1.weight in it is a numpy.*_reconstruct, not a plain tensor"),
    "expanded": (
        {"bn1.weight": torch.ones(()).expand(4)}, "bn1.weight in it is a Tensor, not a plain tensor"),
    "another depth": (
        {"layer3.2.conv1.weight": torch.ones(1)}, r"\[2, 2, 3, 2\] blocks, as none of resnet18"),
    "without a statistic": (
        {"layer2.0.bn1.running_var": None}, r'Missing key\(s\) in state_dict: "layer2.0.bn1.running_var"'),
    "with a tensor more": (
        {"layer2.0.se.weight": torch.ones(1)}, r'Unexpected key\(s\) in state_dict: "layer2.0.se.weight"'),
    "wide": (
        {"layer4.1.conv2.weight": torch.ones(64, 64, 3, 3)}, "size mismatch for layer4.1.conv2.weight"),
    "another stem": (
        {"bn2.weight": torch.ones(4)},
        "bn2.weight: another network than a ResNet of the paper, which has no bn2"),
    "whole numbers": (
        {"bn1.weight": torch.ones(4, dtype=torch.int64)}, "bn1.weight in it has values of torch.int64"),
    "a variance below zero": (
        {"bn1.running_var": torch.full((4,), -1.0)}, "bn1.running_var in it has variances below zero"),
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
    for content, names in ((head, "state_dict.module.encoder.fc.*"), (torch.ones(3), "no named tensors")):
        torch.save(content, path)
        with pytest.raises(Refused) as refused:
            lineval.read_backbone(path)
        assert str(refused.value).startswith(f"{path}: no ResNet in it: no tensor is called conv1.weight")
        assert str(refused.value).endswith(f"; it has {names}")


# An evaluation needs none of these.
NOT_NEEDED = ("optimizer", "momentum of", "sums", "seconds", "odd keys",
              "too large", "step is negative", "epoch is True", "half a step")
NOT_OURS = ("no format", "no settings")  # all three make a file ours: format, settings, model


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, on a tensor where settings should be
def test_a_crafted_checkpoint_is_evaluated_where_nothing_that_counts_is_odd(tmp_path, finished):
    """Against a list of what an evaluation does not look at."""
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
    assert f"init {path}, all of it" in " ".join(capsys.readouterr().out.split())
    after = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)["model"]
    for name, t in exported[1].named_parameters():
        assert torch.equal(after[name], t), name


def started_from(path, **options):
    """A new model, started from this file; its tensors before; and what is said."""
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


def test_init_takes_no_part_of_a_longer_projector(tmp_path, exported):
    """Two layers have all their names among those of three: the backbone is taken alone, and said."""
    longer = copy.deepcopy(exported[1])
    longer.encoder.fc = torch.nn.Sequential(*longer.encoder.fc, *copy.deepcopy(longer.encoder.fc[-2:]))
    torch.save(longer.state_dict(), tmp_path / "longer.pth")
    model, before, said = started_from(tmp_path / "longer.pth")
    assert "the backbone; the heads are new" in said
    assert torch.equal(model.encoder.fc[0].weight, before["encoder.fc.0.weight"])


def test_init_takes_all_that_a_model_without_predictor_has(exported):
    """Backbone and projector are the file's, and the predictor is named."""
    model, _, said = started_from(exported[0] / "released.pth.tar", predictor="none")
    assert equal(model.encoder.state_dict(), exported[1].encoder.state_dict())
    assert said.endswith("all of it but predictor.*")


def test_init_refuses_what_does_not_fit(tmp_path, exported, small):
    """The run leaves no checkpoint behind."""
    path = exported[0] / "released.pth.tar"
    message = refusal("simsiam.py", small, *TINY, "--init", path, "--out", tmp_path / "run")
    assert "another network than the run's: arch resnet50, not resnet18" in message
    assert not list((tmp_path / "run").glob("*.pth"))
