"""harness, weights.py: files of weights in every known layout, and damaged, foreign and crafted ones."""
import argparse
import collections
import contextlib
import copy
import io
import math
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lineval
from harness.common import files, unpickling
from harness.common.errors import Refused
from harness.evaluation import weights
from harness.training import folder as run_folder
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
        ["epoch", "arch", "optimizer.param_groups", *prefixed("state_dict.", RELEASED_HEAD)]),
    "released without module": (
        {"state_dict": prefixed("encoder.", BACKBONE) | {"encoder.fc.6.bias": torch.ones(3)}},
        ["state_dict.encoder.fc.6.bias"]),
    "MoCo": (
        {"epoch": 200,
         "state_dict": prefixed("module.encoder_q.", BACKBONE) | MOCO_HEAD | MOCO_QUEUE | MOCO_KEY_NETWORK},
        ["epoch", *prefixed("state_dict.", MOCO_HEAD | MOCO_QUEUE | MOCO_KEY_NETWORK)]),
    "DataParallel": (
        {"state_dict": prefixed("module.", WHOLE)},
        ["state_dict.module.fc.weight", "state_dict.module.fc.bias"]),
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
    assert list(backbone.found.left_out) == names_left_out
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


# --- Other people's files -----------------------------------------------------------------------------------

OTHER = filled(RESNET18, seed=2)
def with_attributes(state):
    """The same tensors as nn.Parameters to which somebody has added an attribute."""
    parameters = {}
    for name, t in state.items():
        parameters[name] = torch.nn.Parameter(t, requires_grad=t.is_floating_point())
        parameters[name].sequence_parallel = False
    return parameters


OTHERS_HEAD = {"0.weight": torch.ones(8, 64), "2.weight": torch.ones(4, 8)}


def in_sequential(first):
    """The backbone in an nn.Sequential: conv1, bn1, what has no weights, and from `first` on the stages."""
    numbers = {"conv1": 0, "bn1": 1} | {f"layer{k + 1}": first + k for k in range(4)}
    named = {}
    for name, t in BACKBONE.items():
        part, _, rest = name.partition(".")
        named[f"{numbers[part]}.{rest}"] = t
    return named


def renamed(old, new, state=BACKBONE):
    """The backbone, with this part of its names replaced."""
    assert any(old in name for name in state)
    return {name.replace(old, new): t for name, t in state.items()}


def in_itself():
    """A dict that lies in itself, as some programs' options do."""
    options = {"lr": 0.1}
    options["parent"] = {"child": options, "other": options}
    return options


PICKLED = untrained("resnet18", 1 / 8, False)
PICKLED.load_state_dict(BACKBONE)
FOREIGN_GOOD = {  # content, and the prefix that is found
    "under backbone.": (prefixed("backbone.", BACKBONE), "backbone."),
    "beside a momentum encoder": (
        {"state_dict": {
            **prefixed("module.momentum_encoder.", OTHER), **prefixed("module.base_encoder.", WHOLE)}},
        "state_dict.module.base_encoder."),
    "compiled": (prefixed("_orig_mod.", BACKBONE), ""),
    "beside a projection head": (
        prefixed("module.", BACKBONE) | prefixed("module.projection_head.", OTHERS_HEAD), "module."),
    "with numpy's number and a Namespace": (
        {"state_dict": BACKBONE, "best_acc1": np.float64(61.5),
         "args": argparse.Namespace(lr=0.1, arch="x")},
        "state_dict."),
    "teacher and student": (
        {"teacher": prefixed("backbone.", OTHER), "student": prefixed("module.backbone.", BACKBONE),
         "epoch": np.int64(3)},
        "student.module.backbone."),
    "lightly's, with a momentum network": (
        {"state_dict": prefixed("backbone_momentum.", OTHER) | prefixed("backbone.", in_sequential(4))},
        "state_dict.backbone."),
    "numbered, without max-pooling": (prefixed("backbone.", in_sequential(3)), "backbone."),
    "numbered, without any layer between": (
        prefixed("backbone.", renamed(".downsample.", ".shortcut.", in_sequential(2))),
        "backbone."),
    "compiled inside": (prefixed("module.", renamed("layer1.", "layer1._orig_mod.")), "module."),
    "sharded": (
        prefixed("_fsdp_wrapped_module.", renamed("layer2.0.", "layer2.0._fsdp_wrapped_module.")), ""),
    "checkpointed blocks": (renamed("layer3.1.", "layer3.1._checkpoint_wrapped_module."), ""),
    "beside options in themselves": ({"cfg": in_itself(), "state_dict": BACKBONE}, "state_dict."),
    "in a list": ({"models": [{"net": BACKBONE}, 5]}, "models.0.net."),
    "with a format that isn't ours": ({"format": "pt", "state_dict": BACKBONE}, "state_dict."),
    "with odd keys": ({"state_dict": BACKBONE, "seen": {("cat", 3): 1, ((1, 2), 3): 2, torch.float16: 3}},
                      "state_dict."),
    "with a storage": ({"state_dict": BACKBONE, "bytes": torch.ones(3).untyped_storage()}, "state_dict."),
    "with 16-bit numbers of a newer kind": (
        {"state_dict": BACKBONE, "seen": torch.ones(3, dtype=torch.uint16)}, "state_dict."),
    "with a negative view": (
        {"state_dict": BACKBONE, "wave": torch.ones(3, dtype=torch.cfloat).conj().imag},
        "state_dict."),
    "five dicts deep": (
        {"a": {"b": {"base_model": {"model": {"trunk": {"_feature_blocks": BACKBONE}}}}}},
        "a.b.base_model.model.trunk._feature_blocks."),
    "twice the same": (
        prefixed("net.", BACKBONE) | prefixed("online_encoder.net.", BACKBONE)
        | prefixed("target_encoder.net.", OTHER),
        "online_encoder.net."),
    "a follower alone": (prefixed("target_network.", BACKBONE), "target_network."),
    "with an optimiser": (
        {"net": BACKBONE, "optimizer": {"state": {0: {"momentum_buffer": torch.full((2,), math.nan)}}}},
        "net."),
    "a whole pickled network": ({"model": PICKLED}, "model."),
    "parameters, with gradients and attributes": (with_attributes(BACKBONE), ""),
    "a dict of another class": (collections.defaultdict(int, model=collections.Counter(BACKBONE)), "model."),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("content, prefix", FOREIGN_GOOD.values(), ids=FOREIGN_GOOD)
def test_the_backbone_in_anybodys_file(tmp_path, content, prefix, legacy):
    """Against the tensors that went in: those of the trained network, under whatever names."""
    path = str(tmp_path / "file.pth")
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    backbone = lineval.read_backbone(path)
    assert equal(backbone.network.state_dict(), BACKBONE)
    assert backbone.found.prefix == prefix
    names = set(weights.flatten(files.read(path)))
    assert len(backbone.found.tensors) + len(backbone.found.left_out) == len(names)


def test_prefix_chooses_another_network(tmp_path, monkeypatch, ten):
    """By the end of its names' beginning; both networks are named."""
    content = {"teacher": prefixed("backbone.", OTHER), "student": prefixed("backbone.", BACKBONE)}
    path = str(tmp_path / "file.pth")
    torch.save(content, path)
    for prefix in ("teacher.backbone", "teacher.backbone.", "teacher"):
        if prefix == "teacher":
            with pytest.raises(Refused, match=r"no ResNet under --prefix teacher; there are 'teacher\.back"):
                lineval.read_backbone(path, prefix=prefix)
            continue
        backbone = lineval.read_backbone(path, prefix=prefix)
        assert equal(backbone.network.state_dict(), without("fc.", OTHER))
    said = weights.describe_found(lineval.read_backbone(path).found, path)
    assert "of student.backbone.* matched" in said
    assert "not teacher.backbone.* (--prefix)" in said
    assert "checksums" not in said
    torch.save(content, path, _use_new_zipfile_serialization=False)
    said = weights.describe_found(lineval.read_backbone(path).found, path)
    assert said.endswith("; this old form of file has no checksums")


def test_two_networks_of_which_none_is_known_to_be_trained_are_refused(tmp_path):
    """--prefix decides."""
    path = str(tmp_path / "file.pth")
    torch.save({"first": BACKBONE, "second": OTHER}, path)
    with pytest.raises(Refused, match="in it: 'first.', 'second.'; choose one with --prefix"):
        lineval.read_backbone(path)
    assert equal(lineval.read_backbone(path, prefix="first").network.state_dict(), BACKBONE)
    # "base" names the trained network only beside one that follows it.
    torch.save({"base": BACKBONE, "best": OTHER}, path)
    with pytest.raises(Refused, match="in it: 'base.', 'best.'; choose one with --prefix"):
        lineval.read_backbone(path)


def test_a_whole_prefix_comes_before_the_end_of_another(tmp_path):
    """Every prefix ends as the empty one does."""
    path = str(tmp_path / "file.pth")
    third = without("fc.", filled(RESNET18, seed=4))
    torch.save(prefixed("net.", BACKBONE) | prefixed("ema.net.", OTHER) | third, path)
    assert equal(lineval.read_backbone(path, prefix="net").network.state_dict(), BACKBONE)
    assert equal(lineval.read_backbone(path, prefix="ema.net").network.state_dict(), without("fc.", OTHER))
    assert equal(lineval.read_backbone(path, prefix="").network.state_dict(), third)


def test_networks_that_differ_in_their_heads_alone_are_one(tmp_path):
    """Which head a network had does not matter here."""
    path = str(tmp_path / "file.pth")
    heads = {"first.fc.weight": torch.ones(2, 64), "second.fc.weight": torch.zeros(3, 64)}
    torch.save(prefixed("first.", BACKBONE) | prefixed("second.", BACKBONE) | heads, path)
    assert equal(lineval.read_backbone(path).network.state_dict(), BACKBONE)


def test_a_tensor_comes_before_what_else_has_its_name(tmp_path):
    """Two tensors of one name are refused."""
    path = str(tmp_path / "file.pth")
    for other in ({"conv1.weight": "a word", "conv1": {"weight": BACKBONE["conv1.weight"]}},
                  {"conv1": {"weight": BACKBONE["conv1.weight"]}, "conv1.weight": "a word"}):
        torch.save(without("conv1.", BACKBONE) | other, path)
        assert equal(lineval.read_backbone(path).network.state_dict(), BACKBONE)
    torch.save(BACKBONE | {"conv1": {"weight": torch.ones(8, 3, 7, 7)}}, path)
    with pytest.raises(Refused, match="two tensors are called conv1.weight"):
        lineval.read_backbone(path)


class Unknown(dict):
    """A dict of a class that no reader knows."""


def test_what_is_taken_and_left_is_said(tmp_path, ten, capsys):
    """Against what went into the file; the class of a value is not made."""
    path = tmp_path / "file.pth"
    content = {"hyper_parameters": Unknown(lr=0.1), "callback": Unknown(), "state_dict": prefixed(
        "backbone.", BACKBONE) | prefixed("projection_head.", OTHERS_HEAD)}
    torch.save(content, path)
    options = ["--ckpt", path, "--knn", "--workers", "0", "--out", tmp_path / "out"]
    assert here("lineval.py", ten, *options) is None
    said = capsys.readouterr().out
    assert f"{len(BACKBONE)} tensors of state_dict.backbone.* matched; " in said
    assert "left out: hyper_parameters.lr, callback, state_dict.projection_head.* (2)" in said


# --- Files that would run something -------------------------------------------------------------------------

def set_attribute(module, name, attribute):
    """A pickle that takes a name, gives it an attribute, and is a dict then."""
    build = pickle.GLOBAL + f"{module}\n{name}\n".encode() + pickle.NONE
    build += pickle.EMPTY_DICT + pickle.UNICODE + f"{attribute}\n".encode() + pickle.INT + b"1\n"
    build += pickle.SETITEM
    return pickle.PROTO + b"\x02" + build + pickle.TUPLE2 + pickle.BUILD + pickle.POP + b"}."


def zip_with(pickled):
    """A file as torch.save writes it, with this pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


CALLS = {
    "os.system": Hostile(os.system, ("touch HACKED",)),
    "eval": Hostile(eval, ("open('HACKED', 'w')",)),
    "getattr": Hostile(getattr, ("x", "upper")),
    "torch.load": Hostile(torch.load, ("HACKED",)),
    "a class with side effects": Hostile(open, ("HACKED", "w")),
    "an attribute of ours": Hostile(setattr, ("x", "y", 1)),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_hostile_file_runs_nothing(tmp_path, monkeypatch, call, legacy):
    """Beside good weights the call is left out; in their place it is named."""
    monkeypatch.chdir(tmp_path)
    form = {"_use_new_zipfile_serialization": not legacy}
    torch.save({"state_dict": BACKBONE, "more": call}, "beside.pth", **form)
    torch.save({"state_dict": change(BACKBONE, **{"bn1.weight": call})}, "inside.pth", **form)
    found = lineval.read_backbone("beside.pth").found
    assert list(found.left_out) == ["more"]
    with pytest.raises(Refused, match=r"bn1.weight in it is a [\w.]+, not a plain tensor"):
        lineval.read_backbone("inside.pth")
    assert not os.path.exists("HACKED")


def test_a_few_dicts_with_any_number_of_names_are_refused(tmp_path):
    """Each lies twice in the next: 2^60 names in a file of two kilobytes. And names without an end."""
    content = {"conv1.weight": torch.ones(1)}
    for _ in range(60):
        content = {"a": content, "b": content}
    for number, odd in enumerate((content, {"a" * 10 ** 4: {"b": 1}})):
        torch.save(odd, tmp_path / f"{number}.pth")
        with pytest.raises(Refused, match="not a file of weights"):
            weights.read_weights(str(tmp_path / f"{number}.pth"))


def test_dicts_too_deep_are_one_value():
    """Of a hundred and fifty dicts in each other the inner ones are left as they are."""
    content = {"end": 1}
    for _ in range(150):
        content = {"a": content}
    (name, value), = weights.flatten(content).items()
    assert set(name) <= set("a.")
    assert isinstance(value, dict)


# --- Files of old: a chain of pickles, with the values behind it ------------------------------------------

def old_form(content, path):
    """Save a file in the form of before torch 1.6 -> its bytes."""
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path.read_bytes()


def test_an_old_file_lacks_no_values(tmp_path):
    """Without a key in its list of storages, torch leaves in a tensor what was in memory."""
    path = tmp_path / "file.pth"
    whole = old_form({"x": torch.full((1000,), 3.0)}, path)
    assert torch.equal(files.read(path)["x"], torch.full((1000,), 3.0))
    place = whole.index(pickle.EMPTY_LIST, whole.index(b"torch\nFloatStorage"))
    path.write_bytes(whole[:place] + pickle.EMPTY_LIST + pickle.STOP + bytes(4000))
    assert torch.load(path)["x"].shape == (1000,)  # so that the file was a dangerous one
    with pytest.raises(Refused, match="damaged"):
        files.read(path)


def test_an_old_file_claims_no_more_than_it_has(tmp_path):
    """torch would take the memory first, here a terabyte, and look then."""
    path = tmp_path / "file.pth"
    whole = old_form({"x": torch.ones(1000)}, path)
    length = pickle.BININT2 + (1000).to_bytes(2, "little")
    place = whole.index(length)
    huge = pickle.LONG1 + b"\x06" + (2 ** 40 // 4).to_bytes(6, "little")
    path.write_bytes(whole[:place] + huge + whole[place + len(length):])
    with pytest.raises(Refused, match="damaged"):
        files.read(path)
    pickles = unpickling.Pickles(100)
    pickles.claim("0", 60)
    pickles.claim("0", 60)  # the same one
    with pytest.raises(ValueError, match="more values"):
        pickles.claim("1", 41)


@pytest.mark.parametrize("value", [((1,), 2), 3.5, None], ids=str)
def test_keys_of_storages_are_text(value):
    """To look for a tuple in a tuple, a million times over, would end the process."""
    with pytest.raises(ValueError, match="no text"):
        unpickling.Pickles(100).claim(value, 4)
    with pytest.raises(ValueError, match="no text"):
        unpickling.Pickles(100).load(io.BytesIO(pickle.dumps(["0", value])))


def test_a_deep_key_does_not_end_the_process(tmp_path):
    """A tuple in a tuple, 200,000 times over, as a key: python would end with a segmentation fault."""
    deep = pickle.NONE + pickle.TUPLE1 * 200_000
    pickled = pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + deep + pickle.NONE + pickle.SETITEM + pickle.STOP
    (tmp_path / "file.pth").write_bytes(zip_with(pickled))
    assert files.read(str(tmp_path / "file.pth")) == {}


def test_what_python_2_has_pickled_is_read(tmp_path):
    """Its text is bytes, which need not be any in UTF-8."""
    pickled = pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.SHORT_BINSTRING + b"\x04caf\xe9"
    (tmp_path / "file.pth").write_bytes(zip_with(pickled + pickle.NONE + pickle.SETITEM + pickle.STOP))
    assert files.read(str(tmp_path / "file.pth")) == {"caf\xe9": None}


def test_torchs_own_restriction_is_named(tmp_path, monkeypatch):
    """With this variable torch refuses every reader but its own."""
    torch.save(BACKBONE, tmp_path / "file.pth")
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(Refused, match="TORCH_FORCE_WEIGHTS_ONLY_LOAD .* unset it here"):
        files.read(str(tmp_path / "file.pth"))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_file_for_which_the_memory_is_too_small_is_not_called_damaged(tmp_path, monkeypatch, error):
    """Whoever runs out of it, Python or torch."""
    def fails(*given, **options):
        raise error

    torch.save(BACKBONE, tmp_path / "file.pth")
    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(Refused, match="not enough memory for it"):
        files.read(str(tmp_path / "file.pth"))


def test_a_pickle_in_the_place_of_the_old_formats_number_runs_nothing(tmp_path, monkeypatch):
    """Files of before torch 1.6 begin with pickles of their own."""
    monkeypatch.chdir(tmp_path)
    with open("file.pth", "wb") as f:
        pickle.dump(Hostile(os.system, ("touch HACKED",)), f, protocol=2)
    with pytest.raises(Refused, match="damaged, or nothing that torch.save wrote"):
        files.read("file.pth")
    assert not os.path.exists("HACKED")


@pytest.mark.parametrize("name", ["torch.serialization StorageType", "torch._utils _rebuild_parameter",
                                  "collections OrderedDict", "argparse Namespace"])
def test_a_pickle_sets_no_attribute_of_what_it_names(tmp_path, name):
    """Neither of our functions nor of anybody's classes."""
    module, _, attribute = name.partition(" ")
    (tmp_path / "file.pth").write_bytes(zip_with(set_attribute(module, attribute, "hacked")))
    with contextlib.suppress(Refused):
        files.read(str(tmp_path / "file.pth"))
    known = unpickling.KNOWN.values()
    assert not any(hasattr(value, "hacked") for value in (*known, argparse.Namespace, unpickling.Inert))


class Writes(torch.nn.Module):
    """A TorchScript program that writes a file when it is loaded."""

    def __init__(self):
        super().__init__()
        self.training = False

    @torch.jit.export
    def __getstate__(self):
        return torch.ones(1), False

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        torch.save(state[0], "HACKED")
        self.training = state[1]

    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_program_that_hides_from_one_reader_is_not_run(tmp_path, monkeypatch):
    """torch takes a file for a zip archive by its beginning, Python by its end: behind four bytes more,
    Python finds none. torch.load without the check runs it."""
    monkeypatch.chdir(tmp_path)
    torch.jit.save(torch.jit.script(Writes()), "program.pt")
    with open("program.pt", "rb") as f:
        program = f.read()
    (tmp_path / "hidden.pth").write_bytes(program + b"PK\x05\x06")
    assert not zipfile.is_zipfile("hidden.pth")
    for name in ("program.pt", "hidden.pth"):
        with pytest.raises(Refused):
            files.read(name)
        assert not os.path.exists("HACKED")
    torch.jit.load("hidden.pth")
    assert os.path.exists("HACKED")  # so that the file was a dangerous one


def test_readers_that_find_different_members_are_not_trusted(tmp_path, monkeypatch):
    """Whatever torch's reader finds must be what was checked: names and places."""
    path = str(tmp_path / "file.pth")
    torch.save({"x": torch.ones(3)}, path)
    files.check_zip(path)

    class Other:
        """A reader that finds another member, or one at another place."""
        shift = 0
        more = ()

        def __init__(self, path):
            self.reader = really(path)

        def get_all_records(self):
            return [*self.reader.get_all_records(), *self.more]

        def get_record_offset(self, name):
            return 0 if name in self.more else self.reader.get_record_offset(name) + self.shift

    really = torch._C.PyTorchFileReader
    monkeypatch.setattr(torch._C, "PyTorchFileReader", Other)
    files.check_zip(path)
    for key, value in (("shift", 64), ("more", ("constants.pkl",))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Other, key, value)
            with pytest.raises(Refused, match="two tables of contents"):
                files.check_zip(path)


@pytest.mark.parametrize("behind", [b"PK\x05\x06", bytes(66_000)], ids=["a mark", "zeros"])
def test_what_lies_behind_a_file_does_not_switch_its_checksums_off(tmp_path, behind):
    """With a bit of a weight flipped. A run's own checkpoint too."""
    path = tmp_path / "checkpoint.pth"
    torch.save({"format": 1, "x": torch.full((1000,), 3.0)}, path)
    whole = path.read_bytes()
    place = whole.index(torch.full((9,), 3.0).numpy().tobytes()) + 99
    path.write_bytes(flipped(whole, place) + behind)
    with pytest.raises(Refused):
        files.read(str(path))
    with pytest.raises(Refused):
        run_folder.newest_checkpoint(str(tmp_path))


def test_a_run_does_not_go_on_from_the_form_without_checksums(tmp_path):
    """No run has written it, and a flipped bit in it would not be noticed."""
    content = {"format": 1, "x": torch.ones(3)}
    torch.save(content, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(Refused, match="nothing that a run has written"):
        run_folder.newest_checkpoint(str(tmp_path))


def test_a_compressed_archive_is_refused(tmp_path):
    """A small file could hold any amount of zeros."""
    with zipfile.ZipFile(tmp_path / "file.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"x": "0" * 10 ** 6}, protocol=2))
    with pytest.raises(Refused, match="is compressed, which torch.save never does"):
        files.read(str(tmp_path / "file.pth"))


@pytest.mark.parametrize("code", [
    pickle.BYTEARRAY8 + b"\0\0\0\0\x10\0\0\0", pickle.MARK + pickle.NONE + pickle.ADDITEMS, pickle.EMPTY_SET,
    pickle.MARK + pickle.NONE + pickle.FROZENSET])
def test_opcodes_that_torch_never_writes_are_refused(tmp_path, code):
    """One asks for 64 GiB, one calls a method of what lies on the stack, two hash what they are given."""
    pickled = pickle.PROTO + b"\x05" + pickle.EMPTY_DICT + code + pickle.STOP
    (tmp_path / "file.pth").write_bytes(zip_with(pickled))
    with pytest.raises(Refused, match="damaged"):
        files.read(str(tmp_path / "file.pth"))


def test_a_tensor_larger_than_its_storage_is_refused():
    """torch would enlarge the storage for it."""
    storage = torch.zeros(4)._typed_storage()
    assert torch.equal(unpickling.rebuilt(storage, 1, (3,), (1,)), torch.zeros(3))
    for offset, size in ((0, (10 ** 12,)), (2, (3,)), (-1, (2,))):
        with pytest.raises(ValueError, match="larger than its storage"):
            unpickling.rebuilt(storage, offset, size, (1,))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_what_is_no_file_of_weights_is_named(tmp_path):
    """A TorchScript program, archives, safetensors, an empty file: one line each, none of torch's words."""
    layer = torch.jit.script(torch.nn.Linear(2, 2))
    torch.jit.save(layer, tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    with tarfile.open(tmp_path / "weights.tar", "w") as archive:
        archive.add(tmp_path / "photos.zip", "photos.zip")
    with tarfile.open(tmp_path / "old.tar", "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            archive.add(tmp_path / "photos.zip", name)
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (tmp_path / "empty.pth").write_bytes(b"")
    expected = {
        "script.pt": "a TorchScript program, not weights",
        "photos.zip": "a zip archive, not a file that torch.save wrote",
        "weights.tar": "a tar archive; unpack it",
        "old.tar": "in the form of torch before 0.1.10",
        "model.safetensors": "safetensors are not read",
        "empty.pth": "damaged, or nothing that torch.save wrote",
    }
    for name, words in expected.items():
        with pytest.raises(Refused) as refused:
            files.read(str(tmp_path / name))
        assert words in str(refused.value)
        assert "weights_only" not in str(refused.value)


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
        "what posix.system would make is not made, because no code is run"),
    "tensor": (torch.ones(3), "it holds a Tensor, not named tensors"),
    "words": (change(GOOD, **{"bn1.weight": "a word"}), "bn1.weight in it is a str, not a plain tensor"),
    "no state_dict": ({"state_dict": 5}, "no ResNet in it"),
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
    "another stem": (
        GOOD | {"bn2.weight": torch.ones(4)}, "bn2.weight: another network than a ResNet of the paper"),
    "whole numbers": (
        change(GOOD, **{"conv1.weight": torch.ones(4, 3, 3, 3, dtype=torch.int64)}),
        "conv1.weight in it has values of torch.int64"),
    "a variance below zero": (
        change(GOOD, **{"bn1.running_var": torch.full((4,), -1.0)}),
        "bn1.running_var in it has variances below zero"),
    "a negative view": (
        change(GOOD, **{"bn1.weight": torch.ones(4, dtype=torch.cfloat).conj().imag}),
        "bn1.weight in it is a tensor with a negative or conjugate bit"),
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
    """Whatever is taken has names that are text, and tensors that are as large as they claim."""
    read = 0
    for name, path in crafted_files.items():
        with contextlib.suppress(Refused):
            state, _, _ = weights.read_weights(path)
            found = weights.find_resnet(state, path)
            read += 1
            for key, t in weights.whole_model(found, path).items():
                assert isinstance(key, str), name
                assert t.untyped_storage().nbytes() >= t.nbytes, name
    assert 10 < read < len(crafted_files)


# An evaluation needs none of these.
NOT_NEEDED = ("optimizer", "momentum of", "sums", "seconds", "odd keys")
NOT_OURS = ("no format", "no settings")  # all three make a file ours: format, settings, model


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, on a tensor where settings should be
def test_a_crafted_checkpoint_is_evaluated_where_nothing_that_counts_is_odd(crafted_files):
    """Against a list of what an evaluation does not look at."""
    evaluated = set()
    for name, path in crafted_files.items():
        with contextlib.suppress(Refused):
            settings = lineval.read_backbone(path).settings
            evaluated.add(name)
            if name not in NOT_OURS:
                assert settings["recipe"] == "cifar10", name
                assert settings["size"] == 16, name
    harmless = {name for name in crafted_files if any(word in name for word in NOT_NEEDED)}
    assert evaluated == harmless | set(NOT_OURS)


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
    weights.load_strictly(model, weights.whole_model(weights.find_resnet(state, ""), ""), "")
    model.eval()
    projector = model.encoder.fc
    x = torch.randn(9, 32)
    hidden = projector[:6](x)
    output = F.linear(hidden, theirs["encoder.fc.6.weight"], theirs["encoder.fc.6.bias"])
    statistics = theirs["encoder.fc.7.running_mean"], theirs["encoder.fc.7.running_var"]
    assert torch.allclose(projector(x), F.batch_norm(output, *statistics), atol=1e-5)


BACKBONES = {  # of the model's encoder: what is given to --init, and what is said of it
    "torchvision": (lambda state: state, "left out: nothing"),
    "MoCo": (lambda state: {"state_dict": prefixed("module.encoder_q.", state) | MOCO_HEAD},
             "left out: state_dict.module.encoder_q.fc.* (4)"),
}


@pytest.mark.parametrize("content_of, said", BACKBONES.values(), ids=BACKBONES)
def test_init_takes_a_backbone_alone(tmp_path, exported, small, capsys, content_of, said):
    """At lr 0 the run ends with the backbone that was loaded, and the heads that its seed makes."""
    state = without("fc.", exported[1].encoder.state_dict())
    path = tmp_path / "backbone.pth"
    torch.save(content_of(state), path)
    assert here("simsiam.py", small, *INIT, "--init", path, "--out", tmp_path / "run") is None
    assert here("simsiam.py", small, *INIT, "--out", tmp_path / "new") is None
    ended = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)["model"]
    fresh = torch.load(tmp_path / "new/checkpoint.pth", weights_only=True)["model"]
    for name, parameter in exported[1].named_parameters():
        is_head = name.startswith(("encoder.fc.", "predictor."))
        expected = fresh[name] if is_head else parameter
        assert torch.equal(ended[name], expected), name
    shown = " ".join(capsys.readouterr().out.split())
    assert f"init {path}, the backbone; the heads are new" in shown
    assert said in shown


def test_init_takes_no_part_of_a_longer_projector(tmp_path, exported, small, capsys):
    """Two layers have all their names among those of three: the backbone is taken alone, and said."""
    longer = copy.deepcopy(exported[1])
    longer.encoder.fc = torch.nn.Sequential(*longer.encoder.fc, *copy.deepcopy(longer.encoder.fc[-2:]))
    torch.save(longer.state_dict(), tmp_path / "longer.pth")
    options = [*INIT, "--init", tmp_path / "longer.pth", "--out", tmp_path / "run"]
    assert here("simsiam.py", small, *options) is None
    assert "the backbone; the heads are new" in " ".join(capsys.readouterr().out.split())


def test_init_takes_all_that_a_model_without_predictor_has(tmp_path, exported, small, capsys):
    """SimCLR from a SimSiam: backbone and projector are the file's, and the predictor is named."""
    path = exported[0] / "released.pth.tar"
    options = [*INIT, "--method", "simclr", *"--bn 1 1 1 1".split(), "--init", path]
    assert here("related.py", small, *options, "--out", tmp_path / "run") is None
    after = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)["model"]
    for name, t in exported[1].encoder.named_parameters():
        assert torch.equal(after[f"encoder.{name}"], t), name
    assert "all of it but predictor.*" in " ".join(capsys.readouterr().out.split())


def test_init_refuses_what_does_not_fit(tmp_path, exported, small):
    """The run leaves no folder behind."""
    path = exported[0] / "released.pth.tar"
    message = refusal("simsiam.py", small, *TINY, "--init", path, "--out", tmp_path / "run")
    assert "another network than the run's: arch resnet50, not resnet18" in message
    assert not (tmp_path / "run").exists()
