"""harness/weights.py: files of weights in every known layout, and damaged, foreign and crafted ones."""
import contextlib
import copy
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lineval
from harness import files, weights
from harness.errors import Refused
from tests.helpers import Hostile, TINY
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
FC = ["fc.weight", "fc.bias"]
MOCO_HEAD = {
    "module.encoder_q.fc.0.weight": torch.ones(64, 64),
    "module.encoder_q.fc.0.bias": torch.ones(64),
    "module.encoder_q.fc.2.weight": torch.ones(16, 64),
    "module.encoder_q.fc.2.bias": torch.ones(16),
}
MOCO_KEY_NETWORK = prefixed("module.encoder_k.", filled(RESNET18, seed=1))
MOCO_QUEUE = {"module.queue": torch.ones(2, 2)}
RELEASED_HEAD = {"module.encoder.fc.0.weight": torch.ones(3, 64), "module.predictor.3.bias": torch.ones(2)}
LAYOUTS = {  # the content of a file, and the names in it that are not the backbone's
    "torchvision": (WHOLE, FC),
    "torchvision before 0.4.1": (
        {name: t for name, t in WHOLE.items() if "num_batches" not in name},
        FC),
    "backbone.pth": (BACKBONE, []),
    "checkpoint.pth": (
        {"format": 1, "epoch": 3, "step": 0,
         "settings": settings_of("imagenet", arch="resnet18", width=1 / 8),
         "model": prefixed("encoder.", BACKBONE) | {"predictor.3.bias": torch.ones(2)}},
        ["predictor.3.bias"]),
    "released": (
        {"epoch": 100, "arch": "resnet18", "optimizer": {"state": {}, "param_groups": []},
         "state_dict": prefixed("module.encoder.", BACKBONE) | RELEASED_HEAD},
        list(RELEASED_HEAD)),
    "released without module": (
        {"state_dict": prefixed("encoder.", BACKBONE) | {"encoder.fc.6.bias": torch.ones(3)}},
        ["encoder.fc.6.bias"]),
    "MoCo": (
        {"epoch": 200,
         "state_dict": prefixed("module.encoder_q.", BACKBONE) | MOCO_HEAD | MOCO_QUEUE | MOCO_KEY_NETWORK},
        [*MOCO_HEAD, *MOCO_QUEUE, *MOCO_KEY_NETWORK]),
    "DataParallel": (
        {"state_dict": prefixed("module.", WHOLE)},
        ["module.fc.weight", "module.fc.bias"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_known_layout_gives_the_same_backbone(tmp_path, layout):
    """Against the tensors that went into the file; a file without BN counters gets zeros."""
    content, names_left_out = LAYOUTS[layout]
    torch.save(content, tmp_path / "file.pth")
    backbone = lineval.read_backbone(str(tmp_path / "file.pth"))
    expected = dict(BACKBONE)
    if layout == "torchvision before 0.4.1":
        counters = [name for name in BACKBONE if "num_batches" in name]
        expected |= dict.fromkeys(counters, torch.tensor(0))
    assert equal(backbone.network.state_dict(), expected)
    assert backbone.shape == ("resnet18", 1 / 8, False)
    assert list(backbone.left_out) == names_left_out
    assert len(backbone.sha256) == 64


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_says_the_settings_if_it_is_ours_and_the_epochs_if_it_tells(tmp_path, layout):
    """Against what went into the file."""
    path = str(tmp_path / "file.pth")
    torch.save(LAYOUTS[layout][0], path)
    _, epochs, settings = weights.read_weights(path)
    expected = LAYOUTS["checkpoint.pth"][0]["settings"] if layout == "checkpoint.pth" else {}
    assert settings == expected
    assert epochs == {"checkpoint.pth": 3, "released": 100, "MoCo": 200}.get(layout)
    backbone = lineval.read_backbone(path)
    assert backbone.settings == (expected and expected | {"range": None})  # which an older file lacks
    assert backbone.epochs == epochs


SHAPES = {
    "resnet18 as torchvision's": ("resnet18", 1.0, False),
    "resnet34, narrow, CIFAR stem": ("resnet34", 1 / 8, True),
    "resnet50, narrow": ("resnet50", 1 / 16, False),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_network_is_recognised_from_the_tensors(tmp_path, shape):
    """Against the shape of the network that was saved."""
    network = untrained(*shape)
    found = weights.find_resnet(network.state_dict(), "file.pth")
    assert (found.arch, found.width, found.cifar_stem) == shape
    assert found.left_out == {}
    assert equal(found.tensors, network.state_dict())
    torch.save(network.state_dict(), tmp_path / "file.pth")
    again = lineval.read_backbone(str(tmp_path / "file.pth"))
    assert again.shape == shape
    assert equal(again.network.state_dict(), network.state_dict())


def test_an_odd_width_can_be_given(tmp_path):
    """A third of 64 is 21 1/3 channels: the file shows 21."""
    network = untrained("resnet18", 1 / 3, False)
    torch.save(network.state_dict(), tmp_path / "file.pth")
    again = lineval.read_backbone(str(tmp_path / "file.pth"), 1 / 3)
    assert again.shape == ("resnet18", pytest.approx(1 / 3), False)
    assert equal(again.network.state_dict(), network.state_dict())


# --- Damage -------------------------------------------------------------------------------------------------

def test_a_flipped_byte_is_found_wherever_it_is(tmp_path):
    """Padding and time stamps may change: what is read without complaint is what was saved."""
    path = tmp_path / "file.pth"
    torch.save(untrained("resnet18", 1 / 64, True).state_dict(), path)
    whole = path.read_bytes()
    content = torch.load(path, weights_only=True)
    refused = 0
    for place in np.random.default_rng(0).integers(0, len(whole), 300):
        path.write_bytes(flipped(whole, place, bit=int(place) % 8))
        try:
            assert equal(files.read(path), content), place
        except Refused:
            refused += 1
    assert refused > 100


def refuses_to_evaluate(path, data, folder, monkeypatch):
    """What lineval.py says of a file whose weights it should refuse; it leaves nothing behind."""
    before = sorted(path.parent.iterdir())
    empty = folder / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    message = refusal("lineval.py", data, "--ckpt", path)
    assert str(path) in message
    assert list(empty.iterdir()) == []
    assert sorted(path.parent.iterdir()) == before
    return message


DAMAGED = {  # what happens to the bytes of a good file, and what is said
    "truncated": (lambda whole: whole[:len(whole) // 2], "can't be read"),
    "flipped": (lambda whole: flipped(whole, len(whole) // 2), "fails its checksum"),
    "text": (lambda whole: b"not a checkpoint", "nothing that torch.save wrote"),
}
GOOD = untrained("resnet18", 1 / 16, True).state_dict()


@pytest.mark.parametrize("damage, message", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, monkeypatch, ten, damage, message):
    """Against the message that tells what to do."""
    path = tmp_path / "files" / "file.pth"
    path.parent.mkdir()
    torch.save(GOOD, path)
    path.write_bytes(damage(path.read_bytes()))
    assert message in refuses_to_evaluate(path, ten, tmp_path, monkeypatch)


FOREIGN = {  # what torch.save wrote, and what is said
    "code": (
        {"state_dict": Hostile(os.system, ("touch HACKED",))},
        "it names posix.system, code that no file of weights needs"),
    "tensor": (torch.ones(3), "it holds a Tensor, not named tensors"),
    "words": ({"model": {"conv1.weight": "a word"}}, "conv1.weight in it is a str, not a plain tensor"),
    "no state_dict": ({"state_dict": 5}, "not a file of weights"),
    "only a projector": ({"state_dict": {"module.encoder.fc.0.weight": torch.ones(2, 2)}}, "no ResNet in it"),
    "deep": (
        change(GOOD, **{"layer3.2.conv1.weight": torch.ones(1)}),
        "(2, 2, 3, 2) blocks, as none of resnet18"),
    "without a statistic": (
        change(GOOD, **{"layer2.0.bn1.running_var": None}),
        "lacks layer2.0.bn1.running_var"),
    "without a counter": (
        change(GOOD, **{"bn1.num_batches_tracked": None}),
        "lacks bn1.num_batches_tracked"),
    "with a tensor more": (
        change(GOOD, **{"layer2.0.se.weight": torch.ones(1)}),
        'Unexpected key(s) in state_dict: "layer2.0.se.weight"'),
    "flat": (change(GOOD, **{"conv1.weight": torch.ones(3)}), "conv1.weight is (3,), no convolution"),
    "wide": (
        change(GOOD, **{"layer4.1.conv2.weight": torch.ones(64, 64, 3, 3)}),
        "size mismatch for layer4.1.conv2.weight"),
    "not finite": (
        change(GOOD, **{"bn1.bias": torch.full((4,), math.nan)}),
        "bn1.bias has values that are not finite"),
}


@pytest.mark.parametrize("content, message", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_refused_in_one_line(tmp_path, monkeypatch, ten, content, message):
    """Against the message that tells what is wrong; code in a file is not run."""
    path = tmp_path / "files" / "file.pth"
    path.parent.mkdir()
    torch.save(content, path)
    assert message in refuses_to_evaluate(path, ten, tmp_path, monkeypatch)


# --- Checkpoints that no run has written --------------------------------------------------------------------

@pytest.fixture(scope="module")
def crafted_files(tmp_path_factory, finished):
    """{id: path}"""
    whole = torch.load(finished[0] / "checkpoint.pth", weights_only=True)
    folder = tmp_path_factory.mktemp("crafted")
    paths = {}
    for name, content in crafted_checkpoints(whole).items():
        paths[name] = folder / f"{name}.pth"
        torch.save(content, paths[name])
    return paths


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, on a tensor where settings should be
def test_weights_of_a_crafted_checkpoint_are_refused_or_read(crafted_files):
    """Whatever is read has names that are text, and tensors that are as large as they claim."""
    read = 0
    for name, path in crafted_files.items():
        with contextlib.suppress(Refused):
            state, _, _ = weights.read_weights(path)
            read += 1
            for key, t in state.items():
                assert isinstance(key, str), name
                assert t.untyped_storage().nbytes() >= t.nbytes, name
    assert 10 < read < len(crafted_files)


# An evaluation needs none of these. A file without a format is not ours: its settings don't count.
NOT_NEEDED = ("optimizer", "momentum of one number", "sums", "seconds", "odd keys", "no format")
POSITIONS = ("epoch is too large", "step is too large", "step is negative")


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, on a tensor where settings should be
def test_a_crafted_checkpoint_is_evaluated_where_nothing_that_counts_is_odd(crafted_files):
    """Against a list of what an evaluation does not look at."""
    evaluated = set()
    for name, path in crafted_files.items():
        with contextlib.suppress(Refused):
            settings = lineval.read_backbone(path).settings
            evaluated.add(name)
            if name != "no format":
                assert settings["recipe"] == "cifar10", name
                assert settings["size"] == 16, name
    harmless = {name for name in crafted_files if any(word in name for word in NOT_NEEDED)}
    assert evaluated == harmless | set(POSITIONS)


# --- Going in: the released bias, --init --------------------------------------------------------------------

INIT = ("--arch resnet50 --width 1/64 --no-cifar-stem --proj-layers 3 --proj-hidden 5 --dim 6 --pred-dim 3 "
        "--size 32 --batch 25 --epochs 1 --base-lr 0 --knn-every 0 --workers 0").split()
PREFIXES = {"as released": "module.", "without module": ""}


@pytest.fixture(params=PREFIXES.values(), ids=PREFIXES)
def released_with_bias(request, tmp_path, exported):
    """A released file whose projector's last bias is not zero: its path, and its tensors."""
    content = torch.load(exported[0] / "released.pth.tar", weights_only=True)
    state = {name.removeprefix("module."): t for name, t in content["state_dict"].items()}
    state["encoder.fc.6.bias"] = torch.randn(6)
    torch.save(content | {"state_dict": prefixed(request.param, state)}, tmp_path / "released.pth.tar")
    return tmp_path / "released.pth.tar", state


def test_init_starts_from_the_released_weights(tmp_path, exported, small, released_with_bias):
    """At lr 0 the run ends with the weights that were loaded."""
    path, _ = released_with_bias
    assert here("simsiam.py", small, *INIT, "--init", path, "--out", tmp_path / "run") is None
    after = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)["model"]
    for name, t in exported[1].named_parameters():
        assert torch.equal(after[name], t), name


def test_init_folds_the_released_bias_into_the_running_mean(exported, released_with_bias):
    """Against the released projector's last layer, with its bias, in eval mode."""
    path, theirs = released_with_bias
    model = copy.deepcopy(exported[1])
    state, _, _ = weights.read_weights(str(path))
    state = {name.removeprefix("module."): t for name, t in state.items()}
    weights.load_strictly(model, state, "")
    model.eval()
    projector = model.encoder.fc
    x = torch.randn(9, 32)
    hidden = projector[:6](x)
    output = F.linear(hidden, theirs["encoder.fc.6.weight"], theirs["encoder.fc.6.bias"])
    statistics = theirs["encoder.fc.7.running_mean"], theirs["encoder.fc.7.running_var"]
    assert torch.allclose(projector(x), F.batch_norm(output, *statistics), atol=1e-5)


def test_init_refuses_what_does_not_fit(tmp_path, exported, small):
    """The run leaves no folder behind."""
    path = exported[0] / "released.pth.tar"
    message = refusal("simsiam.py", small, *TINY, "--init", path, "--out", tmp_path / "run")
    assert "doesn't fit the network asked for" in message
    assert not (tmp_path / "run").exists()
