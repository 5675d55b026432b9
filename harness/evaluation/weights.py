"""Files of weights: the ResNet in them, in any nesting of dicts and under any prefix.

    state, epochs, settings, sha256 = read_weights(path)    everything in a file, by name
    found = find_resnet(state, path)                        the ResNet in it
    load_strictly(module, found.tensors, path)              every tensor must be there, and no other

No code in a file is run. But a file can hold anything, so each tensor is checked before it is used.
"""
import collections
import hashlib
import io
import re
from typing import NamedTuple

import torch

from ..common.errors import Refused
from ..common.files import check_sums, refusing
from ..training.folder import check_format

ZIP = b"PK\x03\x04"  # how a file begins that torch has written since version 1.6
ARCHS = {  # (blocks have a third convolution, blocks per stage): arch
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}
# BYOL, MoCo and DINO have two networks in one file. These words in a name tell the one that is trained by
# gradients from the one that follows it. Where nothing follows, they tell nothing.
TRAINED = {"student", "query", "q", "online", "base"}
FOLLOWS = {"teacher", "key", "k", "target", "momentum", "ema", "shadow"}
# The names of a ResNet's parts in a file, without fc: torchvision's, or numbers, as in lightly's
# nn.Sequential, where a ReLU and a max-pooling can come between bn1 and layer1.
PARTS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
FORMS = [
    PARTS,
    ("0", "1", "2", "3", "4", "5"),
    ("0", "1", "3", "4", "5", "6"),
    ("0", "1", "4", "5", "6", "7"),
]
# Names in a ResNet of HuggingFace's transformers, where all numbers are one lower: torchvision's.
RENAMED = {
    "embedder.embedder.convolution.": "conv1.",
    "embedder.embedder.normalization.": "bn1.",
    ".shortcut.convolution.": ".downsample.0.",
    ".shortcut.normalization.": ".downsample.1.",
    ".shortcut.": ".downsample.",  # lightly's
}
for k in range(4):
    RENAMED[f"encoder.stages.{k}.layers."] = f"layer{k + 1}."
    RENAMED[f".layer.{k}.convolution."] = f".conv{k + 1}."
    RENAMED[f".layer.{k}.normalization."] = f".bn{k + 1}."
TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
# These are left out of names. A whole pickled network keeps its tensors in the first three; torch.compile,
# FSDP and gradient checkpointing add the others.
BETWEEN = {"_modules", "_parameters", "_buffers",
           "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


# --- Reading a file ---------------------------------------------------------------------------------------

def read_weights(path):
    """Everything in a file of weights -> {name: value}, epochs, settings, and the file's SHA-256 in hex.

    A name joins the keys of all dicts on the way by dots. epochs is None where the file doesn't tell.
    settings are those of the run that wrote it, unchecked, and {} in files that aren't ours. Raises Refused
    where the file is damaged.
    """
    with open(path, "rb") as f:
        data = f.read()  # once: a run may replace the file meanwhile
    sha256 = hashlib.sha256(data).hexdigest()
    content = load(data, path)
    with refusing(path, "not a file of weights"):
        if isinstance(content, dict) and {"format", "settings", "model"} <= content.keys():
            check_format(content, path)
            settings = content["settings"]
            steps_per_epoch = int(settings["images"]) // int(settings["batch"])
            epochs = int(content["epoch"]) + int(content["step"]) // steps_per_epoch
            state = flatten(content["model"])
        else:
            settings = {}
            state = flatten(content)
            epochs = state.get("epoch")
            if type(epochs) is not int:
                epochs = None
        for theirs, ours in RENAMED.items():
            state = {name.replace(theirs, ours): value for name, value in state.items()}
        return fold_biases(state), epochs, settings, sha256


def load(data, path):
    """The bytes of a file that torch.save wrote -> its content. No code in it is run.

    torch reads tensors, numbers, words, lists and dicts. Where a file also holds other objects, such as a
    Namespace of options, a number of numpy's or a whole pickled network, stand-ins take their places.
    """
    if data.startswith(ZIP):
        with refusing(path, "damaged"):
            check_sums(data)
    try:
        with torch.serialization.safe_globals(stand_ins(data)):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # a foreign file can raise anything
        raise Refused(
            f"{path}: can't be read: it is damaged, or torch.save did not write it (safetensors: load it "
            "with that package, and torch.save what you get), or it holds more than tensors, numbers and "
            "words, which could run code; if you trust it, load it with weights_only=False, and torch.save "
            "its state_dict") from None


def stand_ins(data):
    """[(stand-in, name)] for each class or function that a file names and torch doesn't know."""
    if not data.startswith(ZIP):
        return []
    names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
    return [(Number if name.startswith("numpy") else Object, name) for name in names]


class Object:
    """Stands in for an object: torch puts its attributes, and the items of a dict, into an OrderedDict."""

    def __new__(cls, *given):
        return collections.OrderedDict()  # the only kind that torch fills with both


class Number:
    """Stands in for a number or an array of numpy's, and holds nothing."""

    def __init__(self, *given):
        pass

    def __setstate__(self, state):
        pass


def flatten(value, name="", above=()):
    """Nested dicts and lists -> {name: value}, where a name joins the keys by dots.

    name    of the value itself
    above   the containers around it. Some programs' options contain themselves; we enter them once
    """
    items = items_of(value)
    if items is None:
        return {name: value}
    if any(value is one for one in above):
        return {}
    flat = {}
    for key, inner in items.items():
        parts = f"{name}.{key}".split(".")
        full = ".".join(part for part in parts if part and part not in BETWEEN)
        flat |= flatten(inner, full, (*above, value))
    return flat


def items_of(value):
    """{key: value} of a dict, or of a list that has dicts in it; None for anything else."""
    if isinstance(value, dict):
        # The attributes are those of an object. A state_dict has one too, the versions of its modules.
        attributes = getattr(value, "__dict__", {})
        return {key: attributes[key] for key in attributes if key != "_metadata"} | value
    if isinstance(value, (list, tuple)) and any(isinstance(one, dict) for one in value):
        return dict(enumerate(value))
    return None


def fold_biases(state):
    """Subtract the bias of each fc layer before a BN from the BN's running mean, and leave it out.

    The released projector has such a bias, ours has none. The BN subtracts it again, so the network computes
    the same.
    """
    state = dict(state)
    for name in list(state):
        place = re.fullmatch(r"(.*\bfc)\.(\d+)\.bias", name)
        if place:
            mean = f"{place[1]}.{int(place[2]) + 1}.running_mean"
            if mean in state:
                state[mean] = state[mean] - state.pop(name)
    return state


# --- The ResNet in it -------------------------------------------------------------------------------------

class FoundResNet(NamedTuple):
    """A ResNet in a file."""
    arch: str           # resnet18, ...
    width: float        # from the stem's channels, which are whole: 1/3 shows as 21/64
    cifar_stem: bool
    prefix: str         # of its names in the file
    tensors: dict       # {torchvision's name: tensor}, without fc
    left_out: dict      # {name in the file: value}: projector, predictor, fc, other networks


def find_resnet(state, path, prefix=None):
    """The ResNet in a file, by names and shapes.

    state   {name: value}, from read_weights
    prefix  of the ResNet to take; by default we take the one that is trained
    Raises Refused if there is none, or several and we can't tell which is trained.
    """
    with refusing(path, "not a file of weights"):
        forms = prefixes(state)
        if not forms:
            shown = name_groups(state)[:200] or "no named tensors"
            raise Refused(f"{path}: no ResNet in it: it must have conv1.weight (a stem of one "
                          f"convolution) and layer1 to layer4 under one prefix; it has {shown}")
        chosen = choose(forms, state, path, prefix)
        tensors, left_out = parts_of(state, chosen, forms[chosen])
        for name, value in tensors.items():
            check_tensor(name, value, path)
        return FoundResNet(*shape_of(tensors, path), chosen, tensors, left_out)


def shape_of(tensors, path):
    """arch, width and cifar_stem of the ResNet with these tensors."""
    blocks = []
    for stage in PARTS[2:]:
        numbers = {name.split(".")[1] for name in tensors if name.startswith(f"{stage}.")}
        blocks.append(len(numbers))
    has_third = "layer1.0.conv3.weight" in tensors
    arch = ARCHS.get((has_third, tuple(blocks)))
    if arch is None:
        raise Refused(f"{path}: its stages have {blocks} blocks of {2 + has_third} convolutions, unlike any "
                      f"of {', '.join(ARCHS.values())}")
    stem = tensors["conv1.weight"].shape
    return arch, stem[0] / 64, stem[-1] == 3  # a stem has 64 channels, times the width; CIFAR's is 3 x 3


def check_tensor(name, t, path):
    """Raise Refused unless t is a plain tensor of finite floating-point numbers, or a BN's counter.

    An expanded tensor repeats a few bytes, and could ask for terabytes when it is copied. So its storage
    must be as large as its values.
    """
    is_plain = isinstance(t, torch.Tensor) and t.layout == torch.strided
    is_number = is_plain and (t.is_floating_point() or name.endswith("num_batches_tracked"))
    if not is_number or t.untyped_storage().nbytes() < t.nbytes:
        raise Refused(f"{path}: not a file of weights ({name} in it must be a plain tensor of floating-point "
                      "numbers)")
    if not t.isfinite().all():
        raise Refused(f"{path}: {name} has values that are not finite; the run that wrote it had diverged")


def describe_found(found):
    """What we took from a file, and what we left, in words."""
    where = f" of {found.prefix}*" if found.prefix else ""
    left_out = name_groups(found.left_out) or "nothing"
    return f"{len(found.tensors)} tensors{where} matched; left out: {left_out}"


def whole_model(found, path):
    """The SimSiam around a ResNet: {"encoder. ..." or "predictor. ...": tensor}; else the ResNet alone.

    Raises Refused where one of its tensors can't be used.
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
    """{prefix of a ResNet's names in a file: its form, one of FORMS}"""
    found = {}
    for name in state:
        for form in FORMS:
            stem, _, *stages = form
            match = re.fullmatch(rf"(|.*\.){stem}\.weight", name)
            if match and all(f"{match[1]}{stage}.0.conv1.weight" in state for stage in stages):
                found.setdefault(match[1], form)
    return found


def parts_of(state, prefix, form):
    """{torchvision's name: value} of the ResNet under a prefix, without fc; and {name: value} of the rest."""
    parts = dict(zip(form, PARTS))
    tensors = {}
    others = {}
    for name, value in state.items():
        part, _, rest = name.removeprefix(prefix).partition(".")
        *_, last = rest.split(".")
        # load_strictly must see a bn2 or a layer5 too.
        is_part = part in parts or re.fullmatch(r"(conv|bn|layer)\d", part)
        # A pickled network has numbers, words and None among its tensors.
        is_meant = isinstance(value, torch.Tensor) or last in TENSORS and value is not None
        if name.startswith(prefix) and is_part and is_meant:
            tensors[f"{parts.get(part, part)}.{rest}"] = value
        else:
            others[name] = value
    return tensors, others


def choose(forms, state, path, wanted):
    """The prefix that was asked for, or else that of the network which is trained. forms: see prefixes

    Some programs keep one network under two names. If the tensors are equal, we take the first.
    """
    shown = ", ".join(f"'{prefix}'" for prefix in forms)
    fitting = list(forms)
    if wanted is not None:
        fitting = [prefix for prefix in forms if prefix.strip(".") == wanted.strip(".")]
        if not fitting:
            raise Refused(f"{path}: no ResNet under --prefix {wanted}; there are {shown}")
    elif any(likely(prefix) < 0 for prefix in forms):
        best = max(likely(prefix) for prefix in forms)
        fitting = [prefix for prefix in forms if likely(prefix) == best]
    first, *more = [parts_of(state, prefix, forms[prefix])[0] for prefix in fitting]
    for network in more:
        same_names = network.keys() == first.keys()
        if not same_names or not all(torch.equal(first[name], network[name]) for name in first):
            raise Refused(f"{path}: several networks in it: {shown}; choose one with --prefix")
    return fitting[0]


def likely(prefix):
    """1 if a prefix names a network that is trained, -1 if one that follows it, 0 if it doesn't tell."""
    words = set(re.split(r"[._]", prefix.lower()))
    return -1 if words & FOLLOWS else int(bool(words & TRAINED))


def name_groups(names):
    """Names in words, those with a common beginning as one: epoch, module.predictor.* (8)"""
    groups = {}
    for name in names:
        # The beginning ends before a number, a part of a ResNet, or the last part of the name.
        beginning, *_ = re.split(r"\.(?:\d+|conv1|bn1|layer\d)\.|\.[^.]*$", name)
        groups.setdefault(beginning, []).append(name)
    shown = []
    for beginning, members in groups.items():
        shown.append(f"{beginning}.* ({len(members)})" if len(members) > 1 else members[0])
    return ", ".join(shown)


def load_strictly(module, state, path):
    """Load a whole state_dict into a module. Raises Refused for tensors missing, unexpected or misshapen.

    torch forgives missing counters of BNs. Files older than torch 0.4.1 have none, and nothing needs them.
    """
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        _, _, found = str(error).partition("\n\t")
        found = " ".join(found.split())[:300]
        raise Refused(f"{path}: doesn't fit the network asked for (the paper's ResNets take 3 channels, and "
                      "have BN, no wider blocks as in Wide ResNet and ResNeXt, and no GroupNorm, SE or other "
                      f"parts): {found}") from None
