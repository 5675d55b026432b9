"""A backbone, the files it comes in, and those of other programs.

    untrained(archs, "resnet18", 1.0, False)        as initialised
    read_backbone(archs, path)                      from a file
    load_init(model, settings, None)                from a file into a run: --init
    export(backbone, path, "torchvision", folder)   into a file of another layout

The same network has many names in files:

    our checkpoint.pth      encoder.conv1.weight           and the settings of its run, and the heads
    our backbone.pth        conv1.weight                   and the settings of its run
    the authors' file       module.encoder.conv1.weight    and the heads
    MoCo's                  module.encoder_q.conv1.weight  and a second network, which we leave: encoder_k
    torchvision's           conv1.weight                   and fc, which we leave
    lightly's               backbone.0.weight              numbers for conv1, bn1, layer1, ...
    transformers'           embedder.embedder.convolution.weight, encoder.stages.0.layers. ...

So weights.py looks for it in any nesting of dicts and under any prefix, and of two networks takes the one
that was trained. Architecture, width and stem follow from names and shapes.

    archs       {name: function that makes this ResNet}
"""
import os
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from ..common.errors import Refused
from ..common.files import refusing, save
from ..training.folder import check_new, make_folder
from ..training.options import check_limits
from ..training.recipes import RECIPES
from .weights import describe_found, find_resnet, load_strictly, read_weights, whole_model


# --- From a file ------------------------------------------------------------------------------------------

class Backbone(NamedTuple):
    """A network, and what we know about it."""
    network: nn.Module         # the ResNet, without fc
    shape: tuple               # arch, width, cifar_stem
    found: object = None       # the weights.FoundResNet that it was read from
    settings: dict = {}        # of its pre-training, if the file is ours
    epochs: object = None      # of its pre-training, if the file tells
    sha256: object = None      # of the file; None for an untrained network


def untrained(archs, arch, width, cifar_stem):
    """A ResNet as initialised, without fc -> Backbone.

    First seed torch's global random numbers, alike on all processes.
    """
    network = archs[arch](width=width, cifar_stem=cifar_stem)
    network.fc = nn.Sequential()
    return Backbone(network, (arch, width, cifar_stem))


def read_backbone(archs, path, width=None, prefix=None):
    """The ResNet in a file -> Backbone.

    width   by default the file's; an odd one (1/3) must be given, as the file has only rounded channels
    prefix  of its names, if the file has several networks
    Raises Refused where a tensor is missing, unexpected or misshapen.
    """
    if not os.path.isfile(path):
        known = ", ".join("random:" + arch for arch in archs)
        raise Refused(f"{path}: no such file; give weights (HF's: model.safetensors or pytorch_model.bin) or "
                      f"one of {known}")
    state, epochs, settings, sha256 = read_weights(path)
    if settings:
        settings = checked(settings, path)
    found = find_resnet(state, path, prefix)
    width = width or settings.get("width", found.width)
    backbone = untrained(archs, found.arch, width, found.cifar_stem)
    load_strictly(backbone.network, found.tensors, path)
    return backbone._replace(found=found, settings=settings, epochs=epochs, sha256=sha256)


def floats(count, values):
    """A tuple of so many floats. Raises ValueError or TypeError for anything else."""
    return tuple(np.reshape(values, count).astype(float).tolist())


NEEDED = {
    "seed": int,
    "size": int,
    "width": float,
    "mean": partial(floats, 3),
    "std": partial(floats, 3),
    "centre": float,
}
OPTIONAL = {  # None, or missing in older files
    "data": str,
    "knn_data": str,
    "val": str,
    "val_share": float,
    "range": partial(floats, 2),
}


def checked(settings, path):
    """The settings of a checkpoint, with the ones that an evaluation needs converted to the right types.

    The file may come from anywhere. Raises Refused where a setting is missing, or is not what it must be.
    """
    with refusing(path, "not a file of weights"):
        if settings["recipe"] not in RECIPES:
            raise ValueError(f"recipe {settings['recipe']}")
        found = {name: kind(settings[name]) for name, kind in NEEDED.items()}
        for name, kind in OPTIONAL.items():
            value = settings.get(name)
            found[name] = value and kind(value)
        settings = settings | found
        check_limits(settings)
    return settings


# --- From a file into a run -------------------------------------------------------------------------------

def load_init(model, s, prefix):
    """--init: start from the weights in the file s["init"] -> what was taken, in words.

    model   its `encoder` is a ResNet. We load its heads too if the file has all of them
    s       the run's settings
    prefix  of the ResNet's names, if the file has several
    Raises Refused if the file doesn't fit.
    """
    path = s["init"]
    state, _, settings, _ = read_weights(path)
    then, now = views_in_words(settings), views_in_words(s)
    views = "" if then in ("", now) else f" (its run had {then})"
    found = find_resnet(state, path, prefix)
    there = found.arch, found.width, found.cifar_stem
    here = s["arch"], round(64 * s["width"]) / 64, s["cifar_stem"]
    if there != here:
        raise Refused(f"--init {path}: its network is {in_words(*there)}, the run's is {in_words(*here)}; "
                      "set --arch, --width, and --cifar-stem or --no-cifar-stem, as in the file")
    around = whole_model(found, path)
    mine = model.state_dict()
    # A projector of more layers has all the names of a shorter one.
    longer = any(name.startswith("encoder.") for name in around.keys() - mine.keys())
    same_captions = settings.get("captions") == s.get("captions")
    if same_captions and mine.keys() <= around.keys() and not longer:
        load_strictly(model, {name: around[name] for name in mine}, f"--init {path}")
        return f"{path}, backbone and heads{views}"
    heads = {name: t for name, t in model.encoder.state_dict().items() if name.startswith("fc.")}
    load_strictly(model.encoder, heads | found.tensors, f"--init {path}")
    return f"{path}, the backbone; the heads are new ({describe_found(found)}){views}"


# --- Into a file of another layout ------------------------------------------------------------------------

def export(backbone, path, layout, out):
    """Write a backbone into a file of another layout, and say so.

    path    the file that it is from
    layout  "torchvision": conv1.weight, ..., without fc; "released": the authors', with the heads if the
            file has them
    out     the folder; None: that of the file
    Raises Refused if the new file exists already.
    """
    arch, width, cifar_stem = backbone.shape
    if layout == "torchvision":
        name = f"{arch}-torchvision.pth"
        content = tensors = backbone.network.state_dict()
    else:
        name = "released.pth.tar"
        tensors = released_state(backbone)
        content = {"epoch": backbone.epochs or 0, "arch": arch, "state_dict": tensors}
    # We replace nothing: the name doesn't tell which network it is.
    target = os.path.join(out or os.path.dirname(path), name)
    make_folder(os.path.dirname(target) or ".")
    check_new(target)
    save(content, target)
    print(f"{target}: {in_words(*backbone.shape)}, {len(tensors)} tensors in the {layout} layout")
    print(f"  {describe_found(backbone.found)}")
    if width != 1 or cifar_stem:
        print("  torchvision's own has another stem or width: docs/operations.md, Using a run's results")
    if seen := views_in_words(backbone.settings):
        print(f"  give it views as its run did: {seen}")


def views_in_words(s):
    """How a run's settings show images to its network; empty if there are none."""
    names = ("size", "mean", "std", "centre", "range")
    return ", ".join(f"{name} {s[name]}" for name in names if s.get(name))


def in_words(arch, width, cifar_stem):
    """resnet18, width 0.125, CIFAR stem"""
    stem = ", CIFAR stem" if cifar_stem else ""
    return f"{arch}, width {width:g}{stem}"


def released_state(backbone):
    """The backbone under the authors' names, and the heads if the file had them."""
    state = whole_model(backbone.found, "the heads")
    state |= {f"encoder.{name}": t for name, t in backbone.network.state_dict().items()}
    fc = [name for name, t in state.items() if name.startswith("encoder.fc.") and t.dim() == 2]
    if fc:  # their last fc layer has a bias, which the BN behind it cancels
        bias = torch.zeros(len(state[fc[-1]]))
        state.setdefault(fc[-1].replace("weight", "bias"), bias)
    return {f"module.{name}": t for name, t in state.items() if name.startswith(("encoder.", "predictor."))}
