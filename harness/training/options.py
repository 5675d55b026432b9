"""The command line that the scripts share, and its limits.

    parser = new_parser("simsiam.py", ...)      the options that every script has
    add_setting(parser, "area", ...)            an option for a row of a script's own table of settings
    check_limits({"area": (0.2, 1.0)})          raises Refused for what no run could do

A recipe's settings have no defaults here. Each script has a table of them, and takes from there whatever the
command line does not name: so a value given can be told from a default. The limits are those that a
user meets; combinations of settings are checked by the script that knows what they mean.
"""
import argparse
import math
import re
import sys

import numpy as np
import torch

from ..common.machine import cores
from ..common.errors import Refused

# What the command lines take, from and to. Both scripts check whichever of these they have. An upper limit is
# either a matter of meaning (a probability) or far beyond what anybody needs; it catches a slip of the finger
# before a run has started.
LIMITS = {
    "batch": (1, math.inf),
    "epochs": (1, math.inf),
    "warmup": (0, math.inf),
    "base_lr": (0, 1e6),
    "weight_decay": (0, 1e6),
    "momentum": (0, 0.9999),
    # Of the network. As large as anybody's memory could hold.
    "width": (1 / 64, 64),  # below, a ResNet's stem has no channel left
    "proj_layers": (1, 100),
    "proj_hidden": (1, 10 ** 6),
    "dim": (1, 10 ** 6),
    "pred_dim": (1, 10 ** 6),
    "bn": (0, 1),
    "fc_std": (0, 10),
    "k": (0, math.inf),
    "m": (0, 0.9999),
    # Of SimSiam's neighbours. A temperature or an eps near 0 divides by nothing; 100 is CLIP's own limit.
    "temperature": (1e-3, 1e3),
    "queue": (1, 10 ** 8),
    "tau": (0, 1),
    "pred_lr_times": (0, 1e4),
    "prototypes": (2, 10 ** 6),
    "eps": (1e-4, 1e3),
    "iterations": (1, 1000),
    "freeze": (0, math.inf),
    "lr_end": (0, 1),
    "last_bn": (0, 1),
    "words_width": (1, 10 ** 6),
    "scale": (1, 100),
    # Of the views.
    "size": (2, 4096),
    "area": (1e-4, 1),
    "aspect": (0.01, 100),
    "jitter": (0, 1),
    "strength": (0, 1),
    "gray": (0, 1),
    "blur": (0, 1),
    "sigma": (0.01, 8 / 3),  # augment.blur cuts the Gaussian at 8 pixels, which is three times this std
    "flip": (0, 1),
    "vflip": (0, 1),
    "mean": (-1e3, 1e3),
    "std": (1e-3, 1e3),
    "centre": (0.01, 1),
    # Of the run itself.
    "knn_every": (0, math.inf),  # 0: never
    "workers": (0, 1024),
    "seed": (0, 2 ** 63 - 1),
    "save_minutes": (0, 1e9),
    "keep_every": (0, math.inf),  # 0: none
}


def check_limits(values):
    """Raise Refused for a number, or a tuple of numbers, beyond its limits. values: {name: value}, None:
    not given."""
    for name, (low, high) in LIMITS.items():
        given = values.get(name)
        if given is not None and not all(low <= v <= high for v in np.ravel(given)):
            option = name.replace("_", "-")
            raise Refused(f"--{option} {given}: from {low:g} to {high:g}")


def check_batch(settings):
    """Raise Refused for a batch that the processes don't divide, or that has more images than the data.

    An epoch of less than one batch would have no step; index_batches needs the rest.
    """
    batch = settings["batch"]
    if batch % settings["world"] != 0:
        world = settings["world"]
        raise Refused(f"--batch {batch}: {world} processes don't divide it; the batch is the global one")
    if settings["images"] < batch:
        raise Refused(f"--batch {batch}: the data has only {settings['images']} images, less than one batch")


def number(text):
    """A number of the command line: 0.125 and 1/8 alike. Raises ValueError for other text."""
    numerator, _, denominator = text.partition("/")
    with np.errstate(all="ignore"):  # 1/0 is infinite, and beyond every limit
        return float(np.float64(numerator) / np.float64(denominator or 1))


def new_parser(script, description, data, out, amp):
    """A parser with the options that both scripts have.

    data, out, amp: the help's words for their defaults. Options have to be written out.
    """
    parser = argparse.ArgumentParser(
        prog=script, description=description,
        allow_abbrev=False,  # --k 20 must not be --knn-every 20, nor what a later option begins with
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120))
    # argparse would print the usage, which is two screens long here. One line says what is wrong.
    parser.error = lambda message: sys.exit(f"{script}: {message}; see --help")
    parser.add_argument("data", nargs="?", metavar="DATA",
                        help="an image folder (train/<class>/..., val/<class>/..., or any folder of "
                             "images), a text file with a path per line, or a CIFAR-10 folder (default: "
                             f"{data})")
    parser.add_argument("--out", help=f"run folder (default: {out})")
    parser.add_argument("--resume", nargs="?", const="yes", choices=("yes", "auto"), metavar="auto",
                        help="after DATA: continue the run in --out; with auto: if there is one, and start "
                             "otherwise")
    add_range(parser)
    parser.add_argument("--override", nargs="+", default=[], metavar="SETTING",
                        help="with --resume: settings that may differ from the checkpoint's")
    parser.add_argument("--seed", type=int, default=0,
                        help="seed of weights, views and order (default: %(default)s)")
    fastest = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device_name, default=fastest, metavar="cuda|cpu",
                        help="what computes (default: cuda where there is one)")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction,
                        help=f"bf16 autocast (default: {amp})")
    parser.add_argument("--workers", type=int, default=min(16, cores()),
                        help="processes that decode images, per GPU (default: its share of the cores, up "
                             "to 16)")
    parser.add_argument("--keep-every", type=int, default=0, metavar="EPOCHS",
                        help="keep the checkpoint of every so many epochs, as checkpoint-NNNN.pth (default: "
                             "none)")
    parser.add_argument("--save-minutes", type=float, default=10,
                        help="a checkpoint this often within an epoch (default: %(default)s)")
    return parser


def device_name(text):
    """--device: cuda or cpu. Raises ArgumentTypeError, with what to do instead."""
    if text in ("cuda", "cpu"):
        return text
    if re.fullmatch(r"cuda:\d+", text):
        raise argparse.ArgumentTypeError(f"{text}: a process takes the first GPU that it sees; choose which "
                                         f"with CUDA_VISIBLE_DEVICES={text[5:]}, and --device cuda")
    raise argparse.ArgumentTypeError(f"{text}: only cuda and cpu; on a Mac, cpu")


def add_range(parser):
    """The option that overrides what harness/data/images.py finds."""
    parser.add_argument("--range", type=number, nargs=2, metavar=("LOW", "HIGH"),
                        help="the values that become 0 to 255, in files of more than 8 bits (default: by a "
                             "sample of the files)")


def add_prefix(parser, option):
    """The option that chooses among several networks in a file of weights, which another option names."""
    parser.add_argument("--prefix",
                        help=f"of several networks in the file of {option}, that whose tensors' names begin "
                             "like this (default: the one that is trained)")


def add_setting(parser, name, kind, defaults, words, choices=None):
    """Add an option for a row of a table of settings.

    words       what it is, for the help
    kind        str, int, bool, number, or (int or number, how many): the option takes so many of them
    defaults    one per recipe, for the help
    """
    options = {"choices": choices}
    if kind is bool:  # --affine and --no-affine
        options = {"action": argparse.BooleanOptionalAction}
    elif isinstance(kind, tuple):
        options["type"], options["nargs"] = kind
        options["metavar"] = name[0].upper()
    else:
        options["type"] = kind
    shown = [as_text(value) for value in defaults]
    if len(set(shown)) == 1:
        shown = shown[:1]
    option = "--" + name.replace("_", "-")
    parser.add_argument(option, help=f"{words} ({' | '.join(shown)})", **options)


def as_text(value):
    """A setting's value for the help: tuples of numbers without brackets."""
    if isinstance(value, tuple):
        return " ".join(f"{v:.4g}" for v in value)
    return str(value)
