"""Files of weights: the ResNet in them, in any nesting of dicts and under any prefix.

    state, epochs, settings, sha256 = read_weights(path)    all that is in a file, by name
    found = find_resnet(state, path)                        the ResNet in it, which lineval.py builds
    load_strictly(module, found.tensors, path)              every tensor must be there, and no other

No code in a file is run. But anything can be in it, so each tensor is looked at before it is taken.
"""
import collections
import contextlib
import hashlib
import io
import os
import pickle
import re
import zipfile
from typing import NamedTuple

import torch

from ..common.errors import Refused
from ..common.files import check_sums, refusing
from ..training.folder import check_format

# How a file begins: since torch 1.6, and before.
ZIP = b"PK\x03\x04"
OLD_FORM = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
ARCHS = {  # (blocks have a third convolution, blocks per stage): arch
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}
# Words in the names of two networks in one file: of the one that is trained by its gradients, and of the one
# that follows it. A BYOL, a MoCo or a DINO has both; without the other, a word tells nothing.
TRAINED = {"student", "query", "q", "online", "base"}
FOLLOWS = {"teacher", "key", "k", "target", "momentum", "ema", "shadow"}
# What a ResNet's parts, but for fc, are called in a file: so, or by numbers in an nn.Sequential, as lightly
# has them. There a ReLU and a max-pooling can stand between bn1 and layer1.
PARTS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
FORMS = [
    PARTS,
    ("0", "1", "2", "3", "4", "5"),
    ("0", "1", "3", "4", "5", "6"),
    ("0", "1", "4", "5", "6", "7"),
]
TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
# What a name has besides a network's parts: a whole pickled network has its tensors in the first three;
# torch.compile, FSDP and gradient checkpointing wrap what they are given.
BETWEEN = {"_modules", "_parameters", "_buffers",
           "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


# --- Reading a file ---------------------------------------------------------------------------------------

def read_weights(path):
    """What is in a file of weights -> {name: value}, epochs of training or None, settings of the run, and the
    file's SHA-256 in hex.

    The names are the keys of all dicts on the way, with dots between them. epochs and settings are known
    where the file tells them; settings are {} in files that aren't ours, and unchecked in ours. Raises
    Refused where the file is damaged.
    """
    with open(path, "rb") as f:
        data = f.read()  # once: a run that goes on may put another file in its place
    sha256 = hashlib.sha256(data).hexdigest()
    content = load(data, path)
    with refusing(path, "not a file of weights"):
        if isinstance(content, dict) and {"format", "settings", "model"} <= content.keys():
            check_format(content, path)
            settings = content["settings"]
            steps_per_epoch = int(settings["images"]) // int(settings["batch"])
            epochs = int(content["epoch"]) + int(content["step"]) // steps_per_epoch
            return fold_biases(flatten(content["model"])), epochs, settings, sha256
        state = flatten(content)
        epochs = state.get("epoch")
        return fold_biases(state), epochs if type(epochs) is int else None, {}, sha256


def load(data, path):
    """The bytes of a file that torch.save wrote -> what is in it. No code in it is run.

    torch reads tensors, numbers, words, lists and dicts. A file can have other things beside them: a
    Namespace of options, a number of numpy's, a whole pickled network. Stand-ins take their places. Nothing
    says beforehand which of them are dicts: if torch can't use the first stand-ins, it gets the second.
    """
    has_sums = data.startswith(ZIP)
    if has_sums:
        with refusing(path, "damaged"):
            check_sums(data)
    for kind in (Inert, InertDict):
        with contextlib.suppress(Exception):  # a foreign file can raise anything
            with torch.serialization.safe_globals(stand_ins(data, kind) if has_sums else []):
                return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    raise Refused(f"{path}: can't be read: {why_not(data, path)}")


def stand_ins(data, kind):
    """[(class, name)] for each class or function that a file, given as bytes, names and torch does not know.

    kind    Inert or InertDict. Numbers and arrays of numpy are never dicts
    """
    classes = []
    for name in torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data)):
        base = Inert if name.startswith("numpy") else kind
        classes.append((type(name, (base,), {"name": name}), name))
    return classes


class Inert:
    """What stands in for an object. It keeps the object's attributes, and does nothing."""

    def __new__(cls, *given):
        return super().__new__(cls)

    def __setstate__(self, state):
        if isinstance(state, dict):
            vars(self).update(state)


class InertDict:
    """What stands in for a dict of a class of its own. torch fills only dicts that it knows: here is one."""

    def __new__(cls, *given):
        return collections.OrderedDict()


def why_not(data, path):
    """What a file is that torch does not read, and what to do."""
    if str(path).endswith(".safetensors"):
        return "it is a safetensors file; load it with that package, and torch.save what you get"
    if data.startswith(OLD_FORM):
        return ("it has the form of before torch 1.6, and is damaged or has more in it than tensors; if you "
                "trust it, load it with weights_only=False, and torch.save its state_dict")
    if data[257:262] == b"ustar":
        return "it is a tar archive; unpack it, and name the file of weights in it"
    if not data.startswith(ZIP):
        return "it is damaged, or torch.save did not write it"
    archive = zipfile.ZipFile(io.BytesIO(data))
    names = {os.path.basename(name) for name in archive.namelist()}
    if "constants.pkl" in names:
        return "it is a TorchScript program; load it, and torch.save its state_dict"
    if "data.pkl" not in names:
        return "it is a zip archive; unpack it, and name the file of weights in it"
    return ("it has more in it than tensors, numbers and words, and reading that could run code; if you "
            "trust it, load it with weights_only=False, and torch.save its state_dict")


def has_checksums(path):
    """Whether a file has the form that torch.save writes since torch 1.6."""
    with open(path, "rb") as f:
        return f.read(4) == ZIP


def flatten(value, name="", above=()):
    """Dicts, lists and objects in each other -> {name: value}, the names with dots between the keys.

    name    of the value itself
    above   what it lies in. What lies in itself, as some programs' options do, is not looked into again
    """
    items = items_of(value)
    if items is None:
        return {name: value}
    if any(value is one for one in above):
        return {}
    flat = {}
    for key, inner in items.items():
        key = getattr(key, "name", key)  # a stand-in's
        parts = f"{name}.{key}".split(".")
        full = ".".join(part for part in parts if part and part not in BETWEEN)
        flat |= flatten(inner, full, (*above, value))
    return flat


def items_of(value):
    """{key: value} of a dict, of an object's attributes, of a list that has some of these in it; None of
    anything else."""
    if isinstance(value, dict):
        # An OrderedDict can stand in for an object with attributes. A state_dict has an attribute too, with
        # the versions of its modules.
        attributes = getattr(value, "__dict__", {})
        return {key: attributes[key] for key in attributes if key != "_metadata"} | value
    if isinstance(value, Inert):
        return vars(value) or None
    if isinstance(value, (list, tuple)):
        inner = [one for one in value if isinstance(one, (dict, Inert))]
        return dict(enumerate(value)) if inner else None
    return None


def fold_biases(state):
    """The same without the bias of each fc layer before a BN, which is subtracted from the BN's running mean
    instead.

    The released projector has such a bias. A BN subtracts it again, so the network computes the same. Ours
    has none.
    """
    state = dict(state)
    for name in list(state):
        place = re.fullmatch(r"(.*\bfc)\.(\d+)\.bias", name)
        if not place:
            continue
        mean = f"{place[1]}.{int(place[2]) + 1}.running_mean"
        both = [state[name], state.get(mean)]
        if all(isinstance(t, torch.Tensor) for t in both):
            state[mean] = state[mean] - state.pop(name)
    return state


# --- The ResNet in it -------------------------------------------------------------------------------------

class FoundResNet(NamedTuple):
    """A ResNet in a file."""
    arch: str           # resnet18, ...
    width: float        # by the stem's channels; rounding can hide an odd one (1/3)
    cifar_stem: bool
    prefix: str         # what stands before its names in the file
    tensors: dict       # {torchvision's name: tensor}, without fc
    left_out: dict      # {name in the file: value}: projector, predictor, fc, what is no tensor
    others: list        # prefixes of other ResNets in the file


def find_resnet(state, path, prefix=None):
    """The ResNet in a file, by names and shapes.

    state   {name: value}, as read_weights has it
    prefix  of the one that is meant, or the end of its prefix; by default the one that is trained
    Raises Refused where there is none, or several of which none is known to be the trained one.
    """
    with refusing(path, "not a file of weights"):
        there = prefixes(state)
        if not there:
            shown = ", ".join(name_groups(state))[:200] or "no named tensors"
            raise Refused(f"{path}: no ResNet in it: no tensor is called conv1.weight, under any prefix, "
                          f"with layer1 to layer4 beside it; it has {shown}")
        chosen = choose(there, state, path, prefix)
        tensors, left_out = parts_of(state, chosen, there[chosen])
        for name, value in tensors.items():
            check_tensor(name, value, path)
        for name, value in left_out.items():
            other = re.match(r"((conv|bn|layer)\d)\.", name.removeprefix(chosen))
            if other and name.startswith(chosen) and isinstance(value, torch.Tensor):
                raise Refused(f"{path}: {name}: another network than a ResNet of the paper, which has no "
                              f"{other[1]}")
        others = [other for other in there if other != chosen]
        return FoundResNet(*shape_of(tensors, path), chosen, tensors, left_out, others)


def shape_of(tensors, path):
    """arch, width and cifar_stem of the ResNet with these tensors."""
    blocks = []
    for stage in PARTS[2:]:
        numbers = {name.split(".")[1] for name in tensors if name.startswith(f"{stage}.")}
        blocks.append(len(numbers))
    arch = ARCHS.get(("layer1.0.conv3.weight" in tensors, tuple(blocks)))
    if arch is None:
        raise Refused(f"{path}: its stages have {blocks} blocks, as none of {', '.join(ARCHS.values())} has")
    stem = tensors["conv1.weight"].shape
    return arch, stem[0] / 64, stem[-1] == 3  # a stem has 64 channels, times the width; CIFAR's is 3 x 3


def check_tensor(name, t, path):
    """Raise Refused unless t is a plain tensor of finite values.

    A tensor that was expanded repeats a few bytes, and could ask for terabytes when it is copied. So its
    storage must be as large as its values.
    """
    is_plain = isinstance(t, torch.Tensor) and t.layout == torch.strided and not t.is_quantized
    if not is_plain or t.untyped_storage().nbytes() < t.nbytes:
        raise Refused(f"{path}: not a file of weights ({name} in it is a {type(t).__name__}, not a plain "
                      "tensor)")
    if not (t.is_floating_point() or name.endswith("num_batches_tracked") and not t.is_complex()):
        raise Refused(f"{path}: not a file of weights ({name} in it has values of {t.dtype})")
    if not t.isfinite().all():
        raise Refused(f"{path}: {name} has values that are not finite; the run that wrote it had diverged")
    if name.endswith("running_var") and (t < 0).any():
        raise Refused(f"{path}: not a file of weights ({name} in it has variances below zero)")


def describe_found(found, path):
    """What was taken of the file at this path, and what was left, in words."""
    where = f" of {found.prefix}*" if found.prefix else ""
    text = f"{len(found.tensors)} tensors{where} matched"
    if found.others:
        shown = ", ".join(f"{prefix}*" for prefix in found.others)
        text += f", which is taken for the trained network and not {shown} (--prefix)"
    groups = name_groups(found.left_out).items()
    left_out = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in groups)
    text += f"; left out: {left_out or 'nothing'}"
    return text if has_checksums(path) else f"{text}; this old form of file has no checksums"


def whole_model(found, path):
    """The SimSiam that a ResNet is the encoder of: {"encoder. ..." or "predictor. ...": tensor}. The ResNet
    alone where it is no encoder.

    Raises Refused where a tensor in it is no plain one.
    """
    model = {f"encoder.{name}": t for name, t in found.tensors.items()}
    around = found.prefix.removesuffix("encoder.")
    if around != found.prefix:
        for name, value in found.left_out.items():
            if name.startswith(around) and isinstance(value, torch.Tensor):
                check_tensor(name, value, path)
                model[name.removeprefix(around)] = value
    return model


def prefixes(state):
    """{what stands before the names of a ResNet in a file: its form, one of FORMS}"""
    found = {}
    for name in state:
        for form in FORMS:
            stem, _, *stages = form
            prefix = name.removesuffix(f"{stem}.weight")
            is_prefix = prefix != name and (prefix == "" or prefix.endswith("."))
            if is_prefix and all(f"{prefix}{stage}.0.conv1.weight" in state for stage in stages):
                found.setdefault(prefix, form)
    return found


def parts_of(state, prefix, form):
    """The names of a file in two parts -> {torchvision's name: value} of the ResNet under a prefix, without
    fc, and {name: value} of all others."""
    parts = dict(zip(form, PARTS))
    tensors = {}
    others = {}
    for name, value in state.items():
        part, _, rest = name.removeprefix(prefix).partition(".")
        *_, last = rest.split(".")
        # A pickled network has numbers, words and None beside its tensors.
        is_meant = isinstance(value, torch.Tensor) or last in TENSORS and value is not None
        if name.startswith(prefix) and part in parts and is_meant:
            rest = rest.replace("shortcut.", "downsample.")  # the former is lightly's
            tensors[f"{parts[part]}.{rest}"] = value
        else:
            others[name] = value
    return tensors, others


def choose(there, state, path, wanted):
    """The prefix that is meant: the one that was asked for, or else that of the network which is trained.

    Of networks with equal tensors, the first will do: some programs keep one under two names.
    """
    shown = ", ".join(f"'{prefix}'" for prefix in there)
    fitting = list(there)
    if wanted is not None:
        end = f".{wanted.strip('.')}." if wanted else "."
        fitting = ([prefix for prefix in there if f".{prefix}" == end]
                   or [prefix for prefix in there if f".{prefix}".endswith(end)])
        if not fitting:
            raise Refused(f"{path}: no ResNet under --prefix {wanted}; there are {shown}")
    elif any(likely(prefix) < 0 for prefix in there):
        best = max(likely(prefix) for prefix in there)
        fitting = [prefix for prefix in there if likely(prefix) == best]
    networks = []
    for prefix in fitting:
        tensors, _ = parts_of(state, prefix, there[prefix])
        networks.append(tensors)
    first, *more = networks
    if not all(equal(first, network) for network in more):
        raise Refused(f"{path}: several networks in it: {shown}; choose one with --prefix")
    return fitting[0]


def likely(prefix):
    """Whether a prefix is that of a network which is trained (1), of one that follows it (-1), or does not
    tell (0)."""
    words = set(re.split(r"[._]", prefix.lower()))
    return -1 if words & FOLLOWS else int(bool(words & TRAINED))


def equal(one, two):
    """Whether two networks have the same tensors."""
    if one.keys() != two.keys():
        return False
    return all(torch.equal(one[name], two[name]) for name in one)


def name_groups(names, prefix=""):
    """Names in words: {name: 1}, or {beginning.*: how many} of a network's, of numbered parts, and of a part
    that has nothing but tensors: {"module.predictor.*": 8}"""
    parts = {}
    for name in names:
        part, _, rest = name.partition(".")
        parts.setdefault(part, []).append(rest)
    ends = [rests == [""] for rests in parts.values()]
    is_network = "layer1" in parts
    is_numbered = any(map(str.isdigit, parts))
    if prefix and (is_network or is_numbered or all(ends) and len(ends) > 1):
        return {f"{prefix}*": len(names)}
    groups = {}
    for (part, rests), is_end in zip(parts.items(), ends):
        groups |= {f"{prefix}{part}": 1} if is_end else name_groups(rests, f"{prefix}{part}.")
    return groups


def load_strictly(module, state, path):
    """Load all of a state_dict into all of a module. Raises Refused, naming what is missing, unexpected or
    of another shape.

    torch forgives missing counters of BNs. Files older than torch 0.4.1 have none, and they play no part.
    """
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        _, _, found = str(error).partition("\n\t")
        found = " ".join(found.split())
        if len(found) > 600:
            found = found[:600] + " ..."
        raise Refused(f"{path}: doesn't fit the network asked for: {found}") from None
