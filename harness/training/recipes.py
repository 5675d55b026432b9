"""From a method's tables and the command line to the settings of a run.

A method has a row for each setting: its type, and its value in each recipe (harness/training/method.py). An
experiment changes some of them, and the command line others.
"""
import argparse
import os

from ..common.errors import Refused
from ..common.machine import bf16_pays
from ..common.progress import silence
from .folder import folder_name
from .options import add_setting, check_batch, data_path, named, new_parser, weights_file

RECIPES = ("imagenet", "cifar10", "shapes")
OWN_IMAGES = {"imagenet": 1_281_167, "cifar10": 50_000, "shapes": 12_000}  # in each recipe's own data
# If a recipe's value is smaller than ImageNet's, these settings of an experiment shrink in the same
# proportion. Warm-up shrinks with the epochs.
SCALED_BY = {"batch": "batch", "dim": "dim", "pred_dim": "pred_dim", "epochs": "epochs", "warmup": "epochs"}


# --- The command line -----------------------------------------------------------------------------------

def options(script, description, method):
    """The parser of a program that trains this method (a class)."""
    parser = new_parser(
        script, description, data="drawn shapes",
        out="runs/<data name>[-<method or experiment>]",
        amp="with cuda; from --width 1/4 up, also on CPUs with bf16 instructions")
    parser.set_defaults(method=method)
    parser.add_argument("more", nargs="*", type=data_path, metavar="MORE",
                        help="more such DATA: the training images of all are used, without labels")
    parser.add_argument("--knn-data", type=data_path, metavar="DATA",
                        help="measure kNN with this data set, and use only training images of DATA (default: "
                             "DATA itself)")
    parser.add_argument("--recipe", choices=RECIPES,
                        help="default: shapes without DATA, cifar10 if all images are the same size, "
                             "at most 64 pixels a side; else imagenet")
    parser.add_argument("--experiment", choices=(*method.EXPERIMENTS, "list"), default=method.NAME,
                        metavar="NAME",
                        help="one of the paper's experiments; 'list' shows them all (default: %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                        help="fuse the operations of the network and of the colour changes with "
                             "torch.compile; it takes a minute or more at the start, and on a CPU it needs "
                             "a C++ compiler (default: no)")
    parser.add_argument("--init", type=weights_file, metavar="FILE",
                        help="start from a file of model or backbone weights, in any layout that lineval.py "
                             "reads")
    recipe_group = parser.add_argument_group("recipe (defaults: imagenet | cifar10 | shapes)")
    ablations = parser.add_argument_group("the paper's ablations (defaults in the same order)")
    for name, (kind, *defaults) in method.SETTINGS.items():
        group = ablations if name in method.ABLATIONS else recipe_group
        add_setting(group, name, kind, defaults, method.HELP[name], method.CHOICES.get(name))
    return parser


def list_experiments(methods):
    """Print the table of these methods' experiments."""
    lines = [f"{'experiment':31}  {'the paper, on ImageNet':31}  what changes there"]
    for method in methods:
        for name, (paper, changes) in method.EXPERIMENTS.items():
            changes = changes | method.ON_IMAGENET.get(name, {})
            shown = ", ".join(f"{setting} {value}" for setting, value in changes.items())
            lines.append(f"{name:31}  {paper:31}  {shown}")
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError as error:  # as from `| head`
        silence(error)


def default_folder(args):
    """runs/, the name of the data, and the experiment unless it is plain SimSiam."""
    name = folder_name(args.data)
    if args.experiment != "simsiam":
        name = f"{name}-{args.experiment}"
    return os.path.join("runs", name)


# --- The settings of a run ------------------------------------------------------------------------------

def recipe(name, table):
    """The settings of a recipe, from a table such as SETTINGS: {setting: value}"""
    column = 1 + RECIPES.index(name)
    return {setting: row[column] for setting, row in table.items()}


def recipe_for(data, train, name, table):
    """The settings of the recipe of this name; without a name, of the one that suits the data."""
    small = train.pixels is not None
    if name is None:
        name = "cifar10" if small else "imagenet"
        if data is None:
            name = "shapes"
    settings = {"recipe": name, **recipe(name, table)}
    if small and data is not None and name == "cifar10":
        settings["size"] = max(train.pixels.shape[2:])  # small images are trained on at their own size
    return settings


def experiment_settings(method, experiment, settings):
    """The changes of a row of a method's experiments, scaled to a recipe's settings: {setting: value}"""
    imagenet = recipe("imagenet", method.SETTINGS)
    _, changes = method.EXPERIMENTS[experiment]
    if settings["recipe"] == "imagenet":
        return changes | method.ON_IMAGENET.get(experiment, {})
    scaled = {}
    for name, value in changes.items():
        measure = SCALED_BY.get(name)
        if measure and settings[measure] < imagenet[measure]:
            value = max(1, round(settings[measure] / imagenet[measure] * value))
        scaled[name] = value
    return scaled


def settings_for(args, train, world):
    """The settings of a run: recipe, then experiment, then the options given. Raises Refused."""
    method = args.method
    settings = recipe_for(args.data, train, args.recipe, method.SETTINGS)
    settings |= experiment_settings(method, args.experiment, settings)
    given = named(args, method.SETTINGS)
    settings |= given
    if args.warmup is None:  # a short run must not end before its warm-up does
        settings["warmup"] = min(settings["warmup"], settings["epochs"] - 1)
    for name in ("experiment", "init", "seed", "data", "val", "val_share", "knn_data", "device", "compile",
                 "workers", "save_minutes", "keep_every"):
        settings[name] = getattr(args, name)
    settings["more"] = args.more or None
    settings["images"] = len(train)
    settings["range"] = train.value_range
    settings["amp"] = bf16_pays(args.device, settings["width"]) if args.amp is None else args.amp
    settings["world"] = world
    if args.prefix and not args.init:
        raise Refused("--prefix needs --init")
    for name, (other, *values) in method.IDLE.items():
        if name in given and settings[other] in values:
            raise Refused(f"--{name.replace('_', '-')} ({method.HELP[name]}) has no effect with "
                          f"--{other.replace('_', '-')} {settings[other]}")
    check_together(settings)
    method.check(settings)
    return settings


def check_together(s):
    """Raise Refused for settings that are valid alone but conflict."""
    check_batch(s)
    for name in ("area", "aspect", "sigma"):
        low, high = s[name]
        if low > high:
            raise Refused(f"--{name} {low:g} {high:g}: the lower bound must come first")
    hue = s["strength"][3]
    if hue > 0.5:
        raise Refused(f"--strength: hue, the last number, must be at most 0.5, not {hue:g}: half a turn "
                      "either way is every hue")
    if s.get("affine") and not s["bn"][1]:
        raise Refused(f"--affine needs the projection's output BN, which --bn {s['bn']} turns off")
    if s["warmup"] >= s["epochs"]:
        raise Refused(f"--warmup {s['warmup']} must be less than --epochs {s['epochs']}")


def own_steps(s, method):
    """The steps of a run's recipe on the recipe's own data."""
    own = recipe(s["recipe"], method.SETTINGS)
    return own["epochs"] * (OWN_IMAGES[s["recipe"]] // own["batch"])
