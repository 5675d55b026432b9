"""A backbone, the files it comes in, and those of other programs.

    untrained(archs, "resnet18", 1.0, False)        as initialised
    read_backbone(archs, recipes, path)             out of a file
    export(backbone, path, "torchvision", folder)   into a file of another layout

The same network has many names in files:

    our checkpoint.pth      encoder.conv1.weight           and the settings of its run, and the heads
    our backbone.pth        conv1.weight                   nothing else
    the authors' file       module.encoder.conv1.weight    and the heads
    MoCo's                  module.encoder_q.conv1.weight  and a second network, left out: encoder_k
    torchvision's           conv1.weight                   and fc, left out
    lightly's               backbone.0.weight              numbers for conv1, bn1, layer1, ...

So weights.py looks for it in any nesting of dicts and under any prefix, and of two networks takes the one
that was trained. Architecture, width and stem follow from names and shapes.

    archs       {name: what makes this ResNet}
    recipes     the names that a checkpoint's setting "recipe" can have
"""
import os
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from ..common.errors import Refused
from ..common.files import refusing, save
from ..training.options import check_limits
from .weights import describe_found, find_resnet, load_strictly, read_weights, whole_model


# --- Out of a file ----------------------------------------------------------------------------------------

class Backbone(NamedTuple):
    """A network, and what is known of it."""
    network: nn.Module         # the ResNet, without fc
    shape: tuple               # arch, width, cifar_stem
    found: object = None       # how it lay in its file, a weights.FoundResNet
    settings: dict = {}        # of its pre-training, where the file is ours
    epochs: object = None      # of its pre-training, where the file tells
    sha256: object = None      # of the file; None for an untrained network


def untrained(archs, arch, width, cifar_stem):
    """A ResNet as initialised, without fc -> Backbone.

    The global random numbers must have been seeded alike on all processes.
    """
    network = archs[arch](width=width, cifar_stem=cifar_stem)
    network.fc = nn.Sequential()
    return Backbone(network, (arch, width, cifar_stem))


def read_backbone(archs, recipes, path, width=None, prefix=None):
    """The ResNet in a file -> Backbone.

    width   what to insist on. By default it is what the file tells, which rounding can hide if it is odd
            (1/3)
    prefix  which of several networks, by the end of what stands before its names
    Raises Refused where any of the ResNet's tensors is missing, unexpected or of another shape.
    """
    if not os.path.isfile(path):
        known = ", ".join("random:" + arch for arch in archs)
        raise Refused(f"{path}: no such file; nor one of {known}")
    state, epochs, settings, sha256 = read_weights(path)
    if settings:
        settings = checked(settings, recipes, path)
    found = find_resnet(state, path, prefix)
    width = width or settings.get("width", found.width)
    backbone = untrained(archs, found.arch, width, found.cifar_stem)
    load_strictly(backbone.network, found.tensors, path)
    return backbone._replace(found=found, settings=settings, epochs=epochs, sha256=sha256)


def checked(settings, recipes, path):
    """The settings of a checkpoint, with what an evaluation needs converted to the right types.

    The file may come from anywhere. Raises Refused where a setting is missing, or is not what it must be.
    """
    with refusing(path, "not a file of weights"):
        if settings["recipe"] not in recipes:
            raise ValueError(f"recipe {settings['recipe']}")
        normalisation = np.array([settings["mean"], settings["std"]], float)
        if normalisation.shape != (2, 3):
            raise ValueError(f"mean {settings['mean']}, std {settings['std']}")
        needed = {
            "data": settings["data"] and str(settings["data"]),
            "seed": int(settings["seed"]),
            "size": int(settings["size"]),
            "width": float(settings["width"]),
            "centre": float(settings["centre"]),
            "range": settings.get("range") and as_range(settings["range"]),
        }
        settings = {**settings, **needed}
        check_limits(settings)
    return settings


def as_range(value_range):
    """A setting "range" of a checkpoint -> (low, high). Raises ValueError or TypeError for anything else."""
    low, high = map(float, value_range)
    if not low < high:
        raise ValueError(f"range {value_range}")
    return low, high


# --- Into a file of another layout ------------------------------------------------------------------------

def export(backbone, path, layout, out):
    """Write a backbone in a file of another layout, and say so.

    path    of the file that it is from
    layout  "torchvision": conv1.weight, ..., without fc; "released": the authors', with the heads where the
            file has them
    out     the folder; None: that of the file
    Raises Refused where the new file exists already.
    """
    arch, *_ = backbone.shape
    if layout == "torchvision":
        name = f"{arch}-torchvision.pth"
        content = backbone.network.state_dict()
        tensors = content
    else:
        name = "released.pth.tar"
        tensors = released_state(backbone)
        content = {"epoch": backbone.epochs or 0, "arch": arch, "state_dict": tensors}
    # Nothing is replaced: the name says nothing of which network it is.
    target = os.path.join(out or os.path.dirname(path), name)
    if os.path.exists(target):
        raise Refused(f"{target}: exists already; move it away, or name another folder with --out")
    os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
    save(content, target)
    print(f"{target}: {shape_in_words(backbone)}, {len(tensors)} tensors in {layout}'s layout")
    print(f"  {describe_found(backbone.found, path)}")


def shape_in_words(backbone):
    """Which ResNet it is: resnet18, width 0.125, CIFAR stem"""
    arch, width, cifar_stem = backbone.shape
    stem = ", CIFAR stem" if cifar_stem else ""
    return f"{arch}, width {width:g}{stem}"


def released_state(backbone):
    """The backbone under the authors' names, and the heads where the file had them."""
    state = whole_model(backbone.found, "the heads")
    state |= {f"encoder.{name}": t for name, t in backbone.network.state_dict().items()}
    weights = [name for name, t in state.items() if name.startswith("encoder.fc.") and t.dim() == 2]
    if weights:  # their last fc layer has a bias, which the BN behind it cancels
        last = weights[-1]
        state.setdefault(last.replace("weight", "bias"), torch.zeros(len(state[last])))
    return {f"module.{name}": t for name, t in state.items() if name.startswith(("encoder.", "predictor."))}
