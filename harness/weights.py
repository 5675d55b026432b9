"""Files of weights: ours (checkpoint.pth, backbone.pth), the authors' released layout, MoCo's, torchvision's.

    state, epochs, settings = read_weights(path)      all tensors, by the names that the file has for them
    found = find_resnet(state, path)                  the ResNet among them, which lineval.py builds
    load_strictly(module, found.tensors, path)        every tensor must be there, and no other

No code in a file is run. What is in it can be anything all the same, so that each tensor is looked at first.
"""
import collections
import hashlib
import re
from typing import NamedTuple

import torch

from .checkpoint import check_format
from .errors import Refused
from .files import read, refusing

# What stands before conv1.weight in each layout: MoCo's, the released one, ours, torchvision's.
# Each also without "module.", which a network gets from DistributedDataParallel.
PREFIXES = ("module.encoder_q.", "module.encoder.", "encoder_q.", "encoder.", "module.", "")
ARCHS = {  # (blocks have a third convolution, blocks per stage): arch
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}


def file_hash(path):
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def read_weights(path):
    """The tensors in a file of weights -> (state_dict, epochs of training or None, settings of the run).

    epochs and settings are known where the file tells them; settings are {} in files that aren't ours, and
    unchecked in ours. Raises Refused where the file is damaged, foreign, or has values that are not finite.
    """
    content = read(path)
    with refusing(path, "not a file of weights"):
        tensors = content.get("model", content.get("state_dict", content))
        for name, t in tensors.items():
            check_tensor(name, t, path)
        state = {str(name): t for name, t in tensors.items()}
        fold_biases(state)
        if "format" not in content:
            return state, content.get("epoch"), {}
        check_format(content, path)
        settings = content["settings"]
        steps_per_epoch = int(settings["images"]) // int(settings["batch"])
        epochs = int(content["epoch"]) + int(content["step"]) // steps_per_epoch
        return state, epochs, settings


def check_tensor(name, t, path):
    """Raise Refused unless t is a plain tensor of finite values.

    A tensor can claim more values than the file has: one that was expanded repeats a few bytes, and could
    ask for terabytes when it is copied. So its storage must be as large as its values.
    """
    is_plain = isinstance(t, torch.Tensor) and t.layout == torch.strided and not t.is_quantized
    if not is_plain or t.untyped_storage().nbytes() < t.nbytes:
        raise Refused(f"{path}: not a file of weights ({name} in it is a {type(t).__name__}, not a plain "
                      "tensor)")
    if not t.isfinite().all():
        raise Refused(f"{path}: {name} has values that are not finite; the run that wrote it had diverged")


def fold_biases(state):
    """Take out each bias of an fc layer before a BN, and subtract it from the BN's running mean instead.

    The released projector has such a bias. A BN subtracts it again, so that the network computes the same.
    Ours has none.
    """
    for name in list(state):
        place = re.fullmatch(r"(.*\bfc)\.(\d+)\.bias", name)
        if not place:
            continue
        mean = f"{place[1]}.{int(place[2]) + 1}.running_mean"
        if mean in state and state[mean].shape == state[name].shape:
            state[mean] = state[mean] - state.pop(name)


class FoundResNet(NamedTuple):
    """A ResNet in a file."""
    arch: str           # resnet18, ...
    width: float        # by the stem's channels; rounding can hide an odd one (1/3)
    cifar_stem: bool
    tensors: dict       # {torchvision's name: tensor}, without fc
    left_out: dict      # {name in the file: tensor}: projector, predictor, fc, ...


def find_resnet(state, path):
    """The ResNet among the tensors of a file, by their names and shapes. Raises Refused where there is
    none."""
    prefix = next((p for p in PREFIXES if p + "conv1.weight" in state), None)
    if prefix is None:
        there = ", ".join(name_groups(state))[:200] or "nothing"
        raise Refused(f"{path}: no ResNet in it: no tensor is called conv1.weight, with or without "
                      f"{', '.join(PREFIXES[:-1])}; it has {there}")
    tensors = {}
    left_out = {}
    for name, t in state.items():
        if name.startswith(prefix) and not name.startswith(prefix + "fc."):
            tensors[name.removeprefix(prefix)] = t
        else:
            left_out[name] = t
    stem = tensors["conv1.weight"].shape
    if len(stem) != 4 or min(stem) < 1:
        raise Refused(f"{path}: conv1.weight is {tuple(stem)}, no convolution")
    blocks = tuple(len(blocks_of_stage(tensors, k)) for k in range(1, 5))
    arch = ARCHS.get(("layer1.0.conv3.weight" in tensors, blocks))
    if arch is None:
        raise Refused(f"{path}: its stages have {blocks} blocks, as none of {', '.join(ARCHS.values())} has")
    width = stem[0] / 64       # a stem has 64 channels, times the width
    cifar_stem = stem[-1] == 3  # its kernel is 3 x 3 instead of 7 x 7
    return FoundResNet(arch, width, cifar_stem, tensors, left_out)


def blocks_of_stage(tensors, k):
    """The numbers of the blocks in stage k, as the names have them: {"0", "1", ...}"""
    return {name.split(".")[1] for name in tensors if name.startswith(f"layer{k}.")}


def name_groups(names):
    """Names, and how often each occurs. Those with a common beginning count as one: {"module.predictor.*":
    8}"""
    beginning = r"^(.*?\b(fc|predictor|encoder_k|layer\d))\..*"
    return collections.Counter(re.sub(beginning, r"\1.*", name) for name in names)


def load_strictly(module, state, path):
    """Load all of a state_dict into all of a module. Raises Refused, naming what is missing, unexpected or
    of another shape."""
    # torch itself would forgive missing BN counters.
    missing = [name for name in module.state_dict() if name not in state]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise Refused(f"{path}: lacks {', '.join(missing[:3])}{more}")
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        found = " ".join(str(error).split("\n\t", 1)[-1].split())
        if len(found) > 600:
            found = found[:600] + " ..."
        raise Refused(f"{path}: doesn't fit the network asked for: {found}") from None
