"""What users' scripts rely on: options and their defaults, and the keys of log.jsonl and lineval.json."""
import re
import shutil
import sys

import pytest
import torch

import lineval
import simsiam
from tests.helpers import PROTOCOL_OPTIONS, TINY
from tests.helpers import here, log_of, refusal, result_of

pytest_plugins = ["tests.fixtures"]


# --- The options --------------------------------------------------------------------------------------------

SHARED_OPTIONS = "--out --resume --override --amp --no-amp".split()
SHARED_DEFAULTS = {  # option: what its help says of the default
    "--seed": "(default: 0)",
    "--device": "default: cuda if there is one",
    "--workers": "(default: its share of the cores, up to 16)",
    "--save-minutes": "(default: 10)",
    "--keep-every": "(default: none)",
    "--range": "(default: from a sample of the files)",
}
RUN_OPTIONS = "--init --compile --no-compile".split()
RUN_DEFAULTS = {
    "--out": "(default: runs/<data name>[-<method or experiment>])",
    "--amp": "(default: with cuda; from --width 1/4 up, also on CPUs",
    "--recipe": "default: shapes without DATA, cifar10 if all images are the same size, at most 64 "
                "pixels a side; else imagenet",
    "--experiment": "(default: simsiam)",
}
EVALUATION_OPTIONS = "--ckpt --lars --sgd --cached --knn --knn-k --features --export".split()
OF_PRETRAINING = "(default: the pre-training's, or else the recipe's)"
EVALUATION_DEFAULTS = {
    "--out": "(default: next to the checkpoint, lineval-<protocol>, and -<file>",
    "--amp": "(default: off)",
    "--base-lr": "lars 0.1, sgd 30.0, cached by a sweep",
    "--batch": "lars 4096, sgd 256, cached 256",
    "--epochs": "lars 90, sgd 100, cached 100",
    "--width": "(default: the file's own; random: the recipe's)",
    "--size": OF_PRETRAINING,
    "--mean": OF_PRETRAINING,
    "--std": OF_PRETRAINING,
}
RECIPE_SETTINGS = set("""
    arch width cifar_stem proj_layers proj_hidden dim pred_dim predictor bn affine fc_std objective eta k m
    epochs batch base_lr momentum weight_decay warmup pred_lr
    size area aspect jitter strength gray blur sigma flip vflip mean std centre knn_every knn_k
""".split())
RECIPE_DEFAULTS = {  # examples of how they are written: imagenet | cifar10 | shapes. test_simsiam.py has all
    "--arch": "resnet50 | resnet18 | resnet18",
    "--no-cifar-stem": "False | True | True",
    "--bn": "1 1 1 0",
    "--aspect": "0.75 1.333",
}


def entries(text):
    """The text of --help -> {option: what it says of it}"""
    found = {}
    options = []
    for line in text.splitlines():
        if line.startswith("  -"):
            spelling, _, line = line.strip().partition("  ")
            options = re.findall(r"--[\w-]+", spelling)
            found |= dict.fromkeys(options, "")
        elif not line.startswith("     "):
            options = []
        for option in options:
            found[option] = f"{found[option]} {line.strip()}".strip()
    return found


def shown(script, capsys):
    """What the program's --help says of each option."""
    with pytest.raises(SystemExit, match="^0$"):
        script.parse(["--help"])
    return entries(capsys.readouterr().out)


@pytest.mark.parametrize("script, options, defaults", [
    (simsiam, RUN_OPTIONS, RUN_DEFAULTS),
    (lineval, EVALUATION_OPTIONS, EVALUATION_DEFAULTS),
])
def test_help_has_every_option_with_its_default(capsys, script, options, defaults):
    """Against lists."""
    found = shown(script, capsys)
    assert all(found[option] for option in SHARED_OPTIONS + options)
    for option, default in (SHARED_DEFAULTS | defaults).items():
        assert default in found[option], option


def test_help_has_every_setting_of_a_recipe_with_its_defaults(capsys):
    """Of each recipe, once if they are the same."""
    found = shown(simsiam, capsys)
    for name in RECIPE_SETTINGS:
        assert re.search(r" \(\S.*\)$", found["--" + name.replace("_", "-")]), name
    for option, default in RECIPE_DEFAULTS.items():
        assert found[option].endswith(f" ({default})"), option


@pytest.mark.parametrize("theirs, ours", [
    ("--lr 0.1", "--base-lr 0.1"),
    ("--learning_rate=0.1", "--base-lr=0.1"),
    ("--batch-size 64", "--batch 64"),
    ("-j 4", "--workers 4"),
    ("-j4", "--workers 4"),
    ("--num-workers 4", "--workers 4"),
    ("--arch resnet18 --bs 64", "--batch 64"),
    ("--gpu 0", "--device cuda"),
    ("--multiprocessing-distributed --world-size 1 --rank 0", "--device cuda"),
    ("--fix-pred-lr", "--pred-lr constant"),
    ("--warmup-epochs 1", "--warmup 1"),
    ("--proj-dim 64", "--dim 64"),
    ("--data x", "DATA"),
])
def test_an_option_by_another_name_is_told_by_ours(theirs, ours):
    """The refusal has each of our options for theirs; and ours can be parsed."""
    said = refusal("simsiam.py", *theirs.split())
    for option in re.findall(r"--[\w-]+|DATA", ours):
        assert f": here it is {option}" in said
    simsiam.parse(ours.split())


def test_an_option_with_underscores_is_told():
    """Ours have hyphens."""
    assert "--weight_decay: here it is - in place of _;" in refusal("simsiam.py", "--weight_decay", "0")


def test_only_options_of_the_same_program_are_advised():
    """lineval.py has no weight decay."""
    assert "here it is --batch" in refusal("lineval.py", "--ckpt", "x", "--bs", "8")
    assert "here it is" not in refusal("lineval.py", "--ckpt", "x", "--wd", "0")
    assert "-a: here it is --ckpt alone (it tells" in refusal("lineval.py", "--ckpt", "x", "-a", "resnet50")


def test_the_authors_command_of_an_evaluation_is_told(monkeypatch):
    """An option that is missing here has another name there."""
    command = ["-a", "resnet50", "--pretrained", "F"]
    monkeypatch.setattr(sys, "argv", ["lineval.py", *command])
    assert "required: --ckpt; --pretrained: here it is --ckpt;" in refusal("lineval.py", *command)


def test_the_option_of_torchs_older_launcher_is_taken():
    """python -m torch.distributed.launch passes it."""
    assert simsiam.parse(["--local-rank=1"]).local_rank == "1"
    assert lineval.parse(["--ckpt", "x", "--local_rank", "1"]).local_rank == "1"


# --- The keys of the files ----------------------------------------------------------------------------------

MACHINE = set("event command device python torch numpy pillow settings".split())
RUN_KEYS = {  # event: keys of its records in the log of a run
    "start": MACHINE | {"knn_pixels"},
    "resume": MACHINE | {"epoch", "step"},
    "epoch": set("""
        event epoch step loss std lr knn knn_balanced knn_largest_class knn_images rank
        images_per_s data_wait seconds wall_seconds memory_mb collapsed bad_images
    """.split()),
    "end": {"event", "epochs", "knn", "backbone"},
}
RUN_SETTINGS = RECIPE_SETTINGS | set("""
    recipe experiment init seed data more val val_share knn_data images content range device amp compile world
    workers save_minutes keep_every
""".split())
CHECKPOINT = set("format model optimizer epoch step sums seconds waited wall settings".split())
ACCURACY = {"top1", "top5", "balanced", "largest_class"}  # top5 only of more than five classes
EVALUATION_KEYS = {  # event: keys of its records in the log of an evaluation
    "start": MACHINE,
    "epoch": ACCURACY | set("event epoch step loss lr images_per_s data_wait seconds wall_seconds".split()),
    "end": ACCURACY | {"event", "epochs"},
}
EVALUATION_SETTINGS = set("""
    protocol note backbone sha256 pretrained_epochs arch width cifar_stem recipe
    data val val_share range content images val_images classes size mean std centre views_given
    seed device amp world workers save_minutes keep_every
""".split())
TRAINING = {"base_lr", "lr", "batch", "epochs"}
AUGMENTATION = {"area", "aspect", "flip"}
RESULT = EVALUATION_SETTINGS | ACCURACY | set("bad_images torch hardware command".split())
RESULT_KEYS = {  # protocol: keys of lineval.json
    "lars": RESULT | TRAINING | AUGMENTATION | {"best_epoch_not_the_result"},
    "sgd": RESULT | TRAINING | AUGMENTATION | {"best_epoch_not_the_result"},
    "cached": RESULT | TRAINING | {"held_out_top1"},
    "knn": RESULT - {"top5"} | {"k"},  # fewer than five neighbours vote
}


def keys_of(log):
    """{event: keys of its records}, which must be the same in all of them."""
    found = {}
    for record in log:
        assert found.setdefault(record["event"], set(record)) == set(record)
    return found


def test_the_keys_of_a_runs_log_and_checkpoint(tmp_path, finished, small):
    """Against lists; the run has been resumed."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    assert here("simsiam.py", small, *TINY, "--out", out, "--resume") is None
    assert keys_of(log_of(out)) == RUN_KEYS
    checkpoint = torch.load(out / "checkpoint.pth", weights_only=True)
    assert set(checkpoint) == CHECKPOINT
    assert set(checkpoint["settings"]) == set(log_of(out)[0]["settings"]) == RUN_SETTINGS


@pytest.mark.parametrize("protocol", PROTOCOL_OPTIONS)
def test_the_keys_of_an_evaluations_result(evaluated, protocol):
    """Against a list."""
    assert set(result_of(evaluated(protocol))) == RESULT_KEYS[protocol]


def test_the_keys_of_an_evaluations_log(evaluated):
    """Against lists."""
    log = log_of(evaluated("sgd"))
    assert keys_of(log) == EVALUATION_KEYS
    assert set(log[0]["settings"]) == EVALUATION_SETTINGS | TRAINING | AUGMENTATION
