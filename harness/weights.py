"""Files of weights: the ResNet in them, in any nesting of dicts and under any prefix.

    state, epochs, settings = read_weights(path)      all that is in a file, by name
    found = find_resnet(state, path)                  the ResNet in it, which lineval.py builds
    load_strictly(module, found.tensors, path)        every tensor must be there, and no other

No code in a file is run. What is in it can be anything all the same, so that each tensor is looked at before
it is taken.
"""
import hashlib
import re
from typing import NamedTuple

import torch

from .checkpoint import check_format
from .errors import Refused
from .files import read, refusing
from .unpickling import Inert

ARCHS = {  # (blocks have a third convolution, blocks per stage): arch
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}
# Words in the names of two networks in one file: of the one that is trained by its gradients, and of the one
# that follows it. A BYOL, a MoCo or a DINO has both.
TRAINED = {"student", "query", "q", "online", "base"}
FOLLOWS = {"teacher", "key", "k", "target", "momentum", "ema", "shadow"}
# A ResNet's parts, but for fc, and what its tensors are called in them.
PARTS = {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}
TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
# The parts of a ResNet that was put into an nn.Sequential, without its fc: lightly's.
SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
MOST_NAMES = 10 ** 6  # in a file
DEEPEST = 100         # dicts in each other
# A whole network that was pickled has its tensors in these.
INSIDE_MODULES = ("_modules", "_parameters", "_buffers")


def file_hash(path):
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def read_weights(path):
    """What is in a file of weights -> ({name: value}, epochs of training or None, settings of the run).

    The names are the keys of all dicts on the way, with dots between them. epochs and settings are known
    where the file tells them; settings are {} in files that aren't ours, and unchecked in ours. Raises
    Refused where the file is damaged.
    """
    content = read(path)
    with refusing(path, "not a file of weights"):
        if "format" not in content:
            state = flatten(content)
            epochs = content.get("epoch")
            return fold_biases(state), epochs if isinstance(epochs, int) else None, {}
        check_format(content, path)
        settings = content["settings"]
        steps_per_epoch = int(settings["images"]) // int(settings["batch"])
        epochs = int(content["epoch"]) + int(content["step"]) // steps_per_epoch
        return fold_biases(flatten(content["model"])), epochs, settings


def flatten(content):
    """Dicts in dicts -> {name: value}, the names with dots between the keys.

    Raises ValueError where that would be more, or deeper, than anybody's network: a few dicts, each twice in
    the next, hold any number of names, and a dict in itself has no end.
    """
    flat = {}
    waiting = [iter([("", content)])]
    for _ in range(MOST_NAMES):
        if len(waiting) > DEEPEST:
            raise ValueError(f"more than {DEEPEST} dicts in each other")
        name, value = next(waiting[-1], (None, None))
        if name is None:
            waiting.pop()
            if not waiting:
                return flat
        elif isinstance(value, dict) and (value or not isinstance(value, Inert)):
            waiting.append(iter([(name_of(name, key), inner) for key, inner in value.items()]))
        else:
            flat[name] = value
    raise ValueError(f"more than {MOST_NAMES:,} names")


def name_of(above, key):
    """The name of what lies under a key, in a dict of the name `above`."""
    if key in INSIDE_MODULES:
        return above
    return f"{above}.{key}" if above else f"{key}"


def check_tensor(name, t, path):
    """Raise Refused unless t is a plain tensor of finite values.

    A tensor can claim more values than the file has: one that was expanded repeats a few bytes, and could
    ask for terabytes when it is copied. So its storage must be as large as its values.
    """
    is_plain = isinstance(t, torch.Tensor) and t.layout == torch.strided and not t.is_quantized
    if not is_plain or t.untyped_storage().nbytes() < t.nbytes:
        kind = getattr(t, "name", None) or type(t).__name__
        raise Refused(f"{path}: not a file of weights ({name} in it is a {kind}, not a plain tensor)")
    if not t.isfinite().all():
        raise Refused(f"{path}: {name} has values that are not finite; the run that wrote it had diverged")


def fold_biases(state):
    """The same without the bias of each fc layer before a BN, which is subtracted from the BN's running mean
    instead.

    The released projector has such a bias. A BN subtracts it again, so that the network computes the same.
    Ours has none.
    """
    state = dict(state)
    for name in list(state):
        place = re.fullmatch(r"(.*\bfc)\.(\d+)\.bias", name)
        if not place:
            continue
        mean = f"{place[1]}.{int(place[2]) + 1}.running_mean"
        both = state[name], state.get(mean)
        if all(isinstance(t, torch.Tensor) for t in both) and both[0].shape == both[1].shape:
            state[mean] = state[mean] - state.pop(name)
    return state


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
    there = prefixes(state)
    if not there:
        shown = ", ".join(name_groups(state))[:200] or "nothing"
        code = sorted({value.name for value in state.values() if isinstance(value, Inert)})
        if code:
            shown += f"; what {', '.join(code)[:200]} would make is not made, because no code is run"
        raise Refused(f"{path}: no ResNet in it: no tensor is called conv1.weight, under whatever prefix, "
                      f"with layer1 to layer4 beside it; it has {shown}")
    chosen = choose(there, state, path, prefix)
    tensors = {}
    left_out = {}
    for name, value in state.items():
        plain = plain_name(name, chosen, state)
        part, *_ = plain.split(".")
        *_, last = plain.split(".")
        is_meant = last in TENSORS and value is not None
        if part in PARTS and (is_meant or isinstance(value, torch.Tensor)):
            check_tensor(name, value, path)
            tensors[plain] = value
        else:  # a pickled network has numbers and words beside its tensors
            left_out[name] = value
    if not any("num_batches_tracked" in name for name in tensors):
        # The file is older than PyTorch 0.4.1, as some of torchvision's are. The counters play no part here.
        means = [name for name in tensors if name.endswith("running_mean")]
        tensors |= {name.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for name in means}
    stem = tensors["conv1.weight"].shape
    if len(stem) != 4 or min(stem) < 1:
        raise Refused(f"{path}: conv1.weight is {tuple(stem)}, no convolution")
    blocks = tuple(len(blocks_of_stage(tensors, k)) for k in range(1, 5))
    arch = ARCHS.get(("layer1.0.conv3.weight" in tensors, blocks))
    if arch is None:
        raise Refused(f"{path}: its stages have {blocks} blocks, as none of {', '.join(ARCHS.values())} has")
    width = stem[0] / 64       # a stem has 64 channels, times the width
    cifar_stem = stem[-1] == 3  # its kernel is 3 x 3 instead of 7 x 7
    others = [p for p in there if p != chosen]
    return FoundResNet(arch, width, cifar_stem, chosen, tensors, left_out, others)


def describe_found(found):
    """What was taken of a file, and what was left, in words."""
    where = f" of {found.prefix}*" if found.prefix else ""
    text = f"{len(found.tensors)} tensors{where} matched"
    if found.others:
        shown = ", ".join(f"{prefix}*" for prefix in found.others)
        text += f", which is taken for the trained network and not {shown} (--prefix)"
    groups = name_groups(found.left_out).items()
    left_out = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in groups)
    return f"{text}; left out: {left_out or 'nothing'}"


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
    """What stands before the names of each ResNet among these names -> prefixes, as the file has them."""
    found = []
    for name in state:
        for stem, stage in (("conv1.weight", "layer{}."), ("0.weight", "{}.")):
            prefix = name.removesuffix(stem)
            if prefix == name or not (prefix == "" or prefix.endswith(".")):
                continue
            numbers = range(1, 5) if stage == "layer{}." else range(4, 8)
            if all(f"{prefix}{stage.format(k)}0.conv1.weight" in state for k in numbers):
                found.append(prefix)
    return found


def plain_name(name, prefix, state):
    """Torchvision's name of a tensor of the ResNet under this prefix; empty for what isn't under it."""
    if not name.startswith(prefix):
        return ""
    plain = name.removeprefix(prefix)
    if f"{prefix}conv1.weight" in state:
        return plain
    number, _, rest = plain.partition(".")
    return f"{SEQUENTIAL.get(number, number)}.{rest}"


def choose(there, state, path, wanted):
    """The prefix that is meant: the one that was asked for, or else that of the network which is trained.

    Of networks with equal tensors, the first will do: some programs keep one under two names.
    """
    shown = ", ".join(f"'{prefix}'" for prefix in there)
    if wanted is not None:
        end = f"{wanted.strip('.')}."
        fitting = [prefix for prefix in there if f".{prefix}".endswith(f".{end}" if wanted else "..")]
        if not fitting:
            raise Refused(f"{path}: no ResNet under --prefix {wanted}; there are {shown}")
    else:
        best = max(likely(prefix) for prefix in there)
        fitting = [prefix for prefix in there if likely(prefix) == best]
    first, *more = fitting
    different = [prefix for prefix in more if not same_tensors(state, first, prefix)]
    if different:
        raise Refused(f"{path}: several networks in it: {shown}; choose one with --prefix")
    return first


def likely(prefix):
    """Whether a prefix is that of a network which is trained (1), of one that follows it (-1), or does not
    tell (0)."""
    words = set(re.split(r"[._]", prefix.lower()))
    return -1 if words & FOLLOWS else int(bool(words & TRAINED))


def same_tensors(state, first, second):
    """Whether the tensors under two prefixes are the same ones."""
    one, two = ({name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
                for prefix in (first, second))
    return one.keys() == two.keys() and all(
        isinstance(t, torch.Tensor) and isinstance(two[name], torch.Tensor) and torch.equal(t, two[name])
        for name, t in one.items())


def blocks_of_stage(tensors, k):
    """The numbers of the blocks in stage k, as the names have them: {"0", "1", ...}"""
    return {name.split(".")[1] for name in tensors if name.startswith(f"layer{k}.")}


def name_groups(names, prefix=""):
    """Names in words: {name: 1}, or {beginning.*: how many} of a network's, of numbered parts, and of a part
    that has nothing but tensors: {"module.predictor.*": 8}"""
    parts = {}
    for name in names:
        part, _, rest = name.partition(".")
        parts.setdefault(part, []).append(rest)
    ends = [rests == [""] for rests in parts.values()]
    if prefix and ("layer1" in parts or any(map(str.isdigit, parts)) or (all(ends) and len(ends) > 1)):
        return {f"{prefix}*": len(names)}
    groups = {}
    for (part, rests), is_end in zip(parts.items(), ends):
        groups |= {f"{prefix}{part}": 1} if is_end else name_groups(rests, f"{prefix}{part}.")
    return groups


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
