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

from ..common.errors import Refused
from ..common.files import has_checksums, read, refusing
from ..common.unpickling import Inert
from ..training.folder import check_format

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
# A ResNet's parts, but for fc, and what its tensors are called in them.
STEM = ("conv1", "bn1")
STAGES = ("layer1", "layer2", "layer3", "layer4")
TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
# What these parts are called in a file: so; or by numbers in an nn.Sequential, as lightly has them. Between
# bn1 and layer1 there may be a ReLU, and a max-pooling.
FORMS = [{part: part for part in STEM + STAGES}]
FORMS += [dict(zip(("0", "1", *map(str, range(first, first + 4))), STEM + STAGES)) for first in (2, 3, 4)]
MOST_NAMES = 10 ** 6  # in a file
LONGEST = 1000        # letters of a name
DEEPEST = 100         # dicts in each other
# What stands in a name but for a network's parts: a whole network that was pickled has its tensors in the
# first three; torch.compile, FSDP and gradient checkpointing wrap what they are given.
BETWEEN = {"_modules", "_parameters", "_buffers",
           "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


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
        if not {"format", "settings", "model"} <= content.keys():
            epochs = content.get("epoch")
            return fold_biases(flatten(content)), epochs if is_count(epochs) else None, {}
        check_format(content, path)
        settings = content["settings"]
        steps_per_epoch = int(settings["images"]) // int(settings["batch"])
        if not (is_count(content["epoch"]) and is_count(content["step"])):
            raise ValueError(f"epoch {content['epoch']}, step {content['step']}")
        epochs = content["epoch"] + content["step"] // steps_per_epoch
        return fold_biases(flatten(content["model"])), epochs, settings


def is_count(value):
    """Whether a value in a file is a number of epochs, or of steps."""
    return type(value) is int and 0 <= value < 10 ** 9


def flatten(content):
    """Dicts and lists in each other -> {name: value}, the names with dots between the keys.

    A list of plain values is one value; so is a dict that lies in itself, or too deep.
    Raises ValueError where there are more names, or longer ones, than in anybody's network: a few dicts, each
    twice in the next, hold any number of them.
    """
    flat = {}
    above = [content]
    waiting = [iter(items_of("", content))]  # of each in `above`, what is still to come
    for _ in range(MOST_NAMES):
        name, value = next(waiting[-1], (None, None))
        if name is None:
            above.pop()
            waiting.pop()
            if not waiting:
                return flat
        elif len(name) > LONGEST:
            raise ValueError(f"a name of more than {LONGEST:,} letters, {name[:50]}...")
        elif holds_names(value) and len(above) < DEEPEST and not any(value is one for one in above):
            above.append(value)
            waiting.append(iter(items_of(name, value)))
        else:
            put(flat, name, value)
    raise ValueError(f"more than {MOST_NAMES:,} names")


def holds_names(value):
    """Whether a value is a dict, or a list that has some in it."""
    if isinstance(value, (list, tuple)):
        return any(isinstance(inner, dict) for inner in value)
    # A stand-in without content is a value: what it stands for is said by its name.
    return isinstance(value, dict) and (len(value) > 0 or not isinstance(value, Inert))


def items_of(above, value):
    """The (name, value) of all that lies in a dict or a list of the name `above`."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        key = str(getattr(key, "name", key))  # a class, or an object of one
        parts = [part for part in [above, *key.split(".")] if part not in BETWEEN]
        yield ".".join(parts if above else parts[1:]), inner


def put(flat, name, value):
    """Give a value its name. A tensor comes before what else has this name; raises ValueError where two
    tensors have it."""
    there = flat.get(name)
    if not isinstance(there, torch.Tensor):
        flat[name] = value
    elif isinstance(value, torch.Tensor) and value is not there:
        raise ValueError(f"two tensors are called {name}")


def check_tensor(name, t, path):
    """Raise Refused unless t is a plain tensor of finite values.

    A tensor can claim more values than the file has: one that was expanded repeats a few bytes, and could
    ask for terabytes when it is copied. So its storage must be as large as its values.
    """
    is_plain = isinstance(t, torch.Tensor) and t.layout == torch.strided and not t.is_quantized
    if not is_plain or t.untyped_storage().nbytes() < t.nbytes:
        kind = getattr(t, "name", None) or type(t).__name__
        raise Refused(f"{path}: not a file of weights ({name} in it is a {kind}, not a plain tensor)")
    if not (t.is_floating_point() or name.endswith("num_batches_tracked") and not t.is_complex()):
        raise Refused(f"{path}: not a file of weights ({name} in it has values of {t.dtype})")
    if not t.isfinite().all():
        raise Refused(f"{path}: {name} has values that are not finite; the run that wrote it had diverged")
    if name.endswith("running_var") and (t < 0).any():
        raise Refused(f"{path}: not a file of weights ({name} in it has variances below zero)")


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
    with refusing(path, "not a file of weights"):
        return take_resnet(state, path, prefix)


def take_resnet(state, path, prefix):
    """The same. A hostile file can make it raise anything."""
    there = prefixes(state)
    if not there:
        shown = ", ".join(name_groups(state))[:200] or "nothing"
        code = sorted({value.name for value in state.values() if isinstance(value, Inert)})
        if code:
            shown += f"; what {', '.join(code)[:200]} would make is not made, because no code is run"
        raise Refused(f"{path}: no ResNet in it: no tensor is called conv1.weight, under whatever prefix, "
                      f"with layer1 to layer4 beside it; it has {shown}")
    chosen = choose(there, state, path, prefix)
    form = form_of(chosen, state)
    tensors = {}
    left_out = {}
    for name, value in state.items():
        plain = plain_name(name, chosen, form)
        part, *_ = plain.split(".")
        *_, last = plain.split(".")
        is_meant = last in TENSORS and value is not None
        if part in STEM + STAGES and (is_meant or isinstance(value, torch.Tensor)):
            check_tensor(name, value, path)
            tensors[plain] = value
        else:  # a pickled network has numbers and words beside its tensors
            left_out[name] = value
            if isinstance(value, torch.Tensor) and re.fullmatch(r"(conv|bn|layer)[02-9]", part):
                raise Refused(f"{path}: {name}: another network than a ResNet of the paper, which has no "
                              f"{part}")
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
    """What stands before the names of each ResNet among these names -> prefixes, as the file has them."""
    found = []
    for name in state:
        for stem in ("conv1.weight", "0.weight"):
            prefix = name.removesuffix(stem)
            if prefix != name and (prefix == "" or prefix.endswith(".")) and form_of(prefix, state):
                found.append(prefix)
    return found


def form_of(prefix, names):
    """{part in the file: part of a ResNet} of the ResNet under a prefix, one of FORMS; None where none is."""
    for form in FORMS:
        stem, _, *stages = form
        first = [f"{prefix}{stem}.weight", *(f"{prefix}{stage}.0.conv1.weight" for stage in stages)]
        if all(name in names for name in first):
            return form
    return None


def plain_name(name, prefix, form):
    """Torchvision's name of a tensor of the ResNet under this prefix; empty for what isn't under it."""
    if not name.startswith(prefix):
        return ""
    part, _, rest = name.removeprefix(prefix).partition(".")
    rest = rest.replace(".shortcut.", ".downsample.")  # lightly's
    return f"{form.get(part, part)}.{rest}"


def choose(there, state, path, wanted):
    """The prefix that is meant: the one that was asked for, or else that of the network which is trained.

    Of networks with equal tensors, the first will do: some programs keep one under two names.
    """
    shown = ", ".join(f"'{prefix}'" for prefix in there)
    fitting = there
    if wanted is not None:
        end = f".{wanted.strip('.')}." if wanted else "."
        fitting = ([prefix for prefix in there if f".{prefix}" == end]
                   or [prefix for prefix in there if f".{prefix}".endswith(end)])
        if not fitting:
            raise Refused(f"{path}: no ResNet under --prefix {wanted}; there are {shown}")
    elif any(likely(prefix) < 0 for prefix in there):
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
    """Whether the ResNets under two prefixes have the same tensors."""
    one, two = (parts_of(state, prefix) for prefix in (first, second))
    return one.keys() == two.keys() and all(
        isinstance(t, torch.Tensor) and isinstance(two[name], torch.Tensor) and torch.equal(t, two[name])
        for name, t in one.items())


def parts_of(state, prefix):
    """{torchvision's name: value} of the ResNet under a prefix, without fc."""
    form = form_of(prefix, state)
    named = {plain_name(name, prefix, form): value for name, value in state.items()}
    return {plain: value for plain, value in named.items() if plain.split(".")[0] in STEM + STAGES}


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
