"""The command line that the scripts share, and its limits.

    parser = new_parser("simsiam.py", ...)      the options that every script has
    add_setting(parser, "area", ...)            an option for a row of a script's own table of settings
    named(args, ["area"])                       {"area": (0.2, 1.0)} if the command line has it, else {}
    check_limits({"area": (0.2, 1.0)})          raises Refused for values that no run could use

A recipe's settings have no defaults here. Each script has a table of them, and takes from there whatever the
command line does not name.
"""
import argparse
import math
import os
import re
import sys

import numpy as np
import torch

from ..common.errors import Refused
from ..common.machine import cores
from .folder import NEWEST

# What people give (a regular expression), and how it is said here.
SAID_HERE = {
    "lr|learning.rate|base.learning.rate|blr": "--base-lr (lr = base lr x batch / 256)",
    "batch.size|bs|b": "--batch (of all processes together)",
    "(num|n).workers|j": "--workers",
    "epoch|(num|n).epochs|e": "--epochs",
    "wd": "--weight-decay",
    "model|backbone|network|a": "--arch",
    "(image|img|input|crop).size|img|resolution": "--size",
    "(proj|feature|feat|out).dim": "--dim",
    "warmup.epochs": "--warmup",
    "fix.pred.lr": "--pred-lr constant",
    "output|(output|out|save|log|exp|ckpt).(dir|path)|(run.|exp.)?name|o": "--out",
    "pretrained|checkpoint|weights|load": "--ckpt",
    "pretrained|checkpoint|ckpt|weights|load": "--init",
    "a|arch": "--ckpt alone (it tells the network)",
    "save.(freq|every|interval)": "--keep-every",
    "eval.(freq|every|interval)": "--knn-every",
    "fp16|bf16|mixed.precision": "--amp",
    "data|data.(dir|path|root)|dataset|root|i": "DATA (the path alone)",
    "device|(n|num.)?gpus?|gpu.ids?|device.id|no.cuda|cpu|distributed|multiprocessing.distributed|dist.url"
    "|world.size|rank":
        "--device cuda or --device cpu (CUDA_VISIBLE_DEVICES=1 chooses a GPU; torchrun starts one process "
        "for each of several)",
    "resume(.from)?|continue":
        "--out FOLDER --resume, after DATA: it continues from FOLDER/checkpoint.pth (from an older "
        "checkpoint: copy it, by this name, and log.jsonl to a new folder)",
    "[a-z]+_[a-z_]+": "- in place of _",
}

# (lowest, highest): the options that take such values. An upper limit is either a matter of meaning (a
# probability) or far beyond what anybody needs; it catches a typing error before a run has started.
LIMITS = {
    (0, math.inf): ("warmup", "k", "freeze", "knn_every", "knn_k", "keep_every"),
    (1, math.inf): ("epochs",),
    (2, math.inf): ("batch",),  # BN needs two images
    (0, 1): ("bn", "tau", "lr_end", "last_bn", "jitter", "strength", "gray", "blur", "flip", "vflip"),
    (0, 0.9999): ("momentum", "m"),
    (0, 1e6): ("base_lr", "weight_decay"),
    (1 / 64, 64): ("width",),  # below, a ResNet's stem has no channel left
    (1, 100): ("proj_layers", "scale"),  # 100 is CLIP's own limit
    (1, 1e6): ("proj_hidden", "dim", "pred_dim", "words_width"),  # as large as anybody's memory could hold
    (2, 1e6): ("prototypes",),
    (1, 1e8): ("queue",),
    (0, 10): ("fc_std",),
    (1e-3, 1e3): ("temperature",),  # near 0, a temperature or an eps would overflow
    (1e-3, 10): ("std",),
    (1e-4, 1e3): ("eps",),
    (0, 1e4): ("pred_lr_times",),
    (1, 1000): ("iterations",),
    (2, 4096): ("size",),
    (1e-4, 1): ("area",),
    (0.01, 100): ("aspect",),
    (0.01, 8 / 3): ("sigma",),  # augment.blur cuts the Gaussian at 8 pixels, which is three times this std
    (-10, 10): ("mean",),
    (0.01, 1): ("centre",),
    (0, 0.5): ("val_share",),
    (0, 1024): ("workers",),
    (0, 2 ** 63 - 1): ("seed",),
    (0, 1e9): ("save_minutes",),
}


def check_limits(values):
    """Raise Refused for a number, or one in a tuple, that is beyond its limits. values: {name: value}; None
    is not given."""
    for (low, high), names in LIMITS.items():
        for name in names:
            given = values.get(name)
            numbers = [] if given is None else np.ravel(given)
            for value in numbers:
                if not low <= value <= high:
                    allowed = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
                    if name in ("mean", "std"):
                        allowed += " (divide what is of 0 to 255 by 255)"
                    raise Refused(f"--{name.replace('_', '-')} must be {allowed}, not {value:.12g}")


def check_batch(settings):
    """Raise Refused for a batch that the processes don't divide, or that has more images than the data.

    An epoch of less than one batch would have no step.
    """
    batch = settings["batch"]
    if batch % settings["world"] != 0:
        raise Refused(f"--batch {batch} must be a multiple of the {settings['world']} processes; it is the "
                      "global batch")
    if settings["images"] < batch:
        raise Refused(f"--batch {batch} must be at most {settings['images']}, the number of images")


def named(args, names):
    """Those of these options that the command line has: {name: value}"""
    given = {}
    for name in names:
        value = getattr(args, name)
        if value is not None:
            given[name] = tuple(value) if isinstance(value, list) else value
    return given


def number(text):
    """A number on the command line: 0.125 or 1/8. Raises ValueError for other text."""
    numerator, _, denominator = text.partition("/")
    return float(numerator) / (float(denominator or 1) or math.nan)  # which is beyond every limit


def new_parser(script, description, data, out, amp):
    """A parser with the options that both scripts have. data, out, amp: their defaults, in words."""
    parser = argparse.ArgumentParser(
        prog=script, description=description,
        allow_abbrev=False,  # --knn 20 must not mean --knn-every 20
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120))
    # argparse would print the usage too, which is two screens long here.
    parser.error = lambda message: sys.exit(f"{script}: {in_our_words(parser, message)}; see --help")
    parser.add_argument("data", nargs="?", type=data_path, metavar="DATA",
                        help="an image folder (train/<class>/..., val/<class>/..., or any folder of "
                             "images), a text file with one path per line, or a CIFAR-10 folder (default: "
                             f"{data})")
    judges = parser.add_mutually_exclusive_group()
    judges.add_argument("--val", metavar="NAME",
                        help="the folder beside train/ to validate on (default: val, else valid, else test)")
    judges.add_argument("--val-share", type=number, metavar="SHARE",
                        help="hold out this share of each class, such as 0.2, for validation; --seed chooses "
                             "the images, and class folders need no train/ (default: none)")
    parser.add_argument("--out", help=f"run folder (default: {out})")
    parser.add_argument("--local-rank", "--local_rank", help=argparse.SUPPRESS)  # torch.distributed.launch's
    parser.add_argument("--resume", nargs="?", const="yes", choices=("yes", "auto"), metavar="auto",
                        help="(after DATA) continue the run in --out; auto: if there is none, start one")
    add_range(parser)
    parser.add_argument("--prefix",
                        help="if a file of weights holds several networks: the prefix of the tensor names of "
                             "the one to use (default: the trained one)")
    parser.add_argument("--override", nargs="+", default=[], metavar="SETTING",
                        help="with --resume: settings that may differ from the checkpoint's")
    parser.add_argument("--seed", type=int, default=0,
                        help="seed for weights, views and order (default: %(default)s)")
    fastest = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=fastest,
                        help="where to compute (default: cuda if there is one)")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction,
                        help=f"bf16 autocast (default: {amp})")
    parser.add_argument("--workers", type=int, default=min(16, cores()),
                        help="processes that decode images, per GPU (default: its share of the cores, up "
                             "to 16)")
    parser.add_argument("--keep-every", type=int, default=0, metavar="EPOCHS",
                        help="keep a checkpoint every so many epochs, as checkpoint-NNNN.pth (default: none)")
    parser.add_argument("--save-minutes", type=float, default=10,
                        help="minutes between checkpoints within an epoch (default: %(default)s)")
    return parser


def in_our_words(parser, message):
    """argparse's message, and what the option in it is here, if we can tell."""
    given = " ".join([message, *sys.argv]) if "required: --ckpt" in message else message
    for theirs, ours in SAID_HERE.items():
        option, *_ = ours.split()
        found = re.search(rf" --?({theirs})(?![a-z_-])", given)
        if found and option in parser.format_usage():
            return f"{message};{found[0]}: here it is {ours}"
    return message


def data_path(text):
    """DATA: a path that holds wherever the next program is started. "shapes" stays: to lineval.py, a name."""
    return text if text == "shapes" else os.path.abspath(text)


def weights_file(text):
    """--ckpt, --init: a file of weights; of a run's folder, its newest checkpoint."""
    return os.path.join(text, NEWEST) if os.path.isdir(text) else text


def add_range(parser):
    """The option that overrides the range of values that harness/data/images.py finds."""
    parser.add_argument("--range", type=number, nargs=2, metavar=("LOW", "HIGH"),
                        help="the values that become 0 and 255, in files with more than 8 bits per channel "
                             "(default: from a sample of the files)")


def add_setting(parser, name, kind, defaults, words, choices=None):
    """Add an option for a row of a table of settings.

    kind        str, int, bool, number, or (int or number, how many of them)
    defaults    one per recipe, for the help
    words       what it is, for the help
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
