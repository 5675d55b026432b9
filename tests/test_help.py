"""What users' scripts rely on: options and their defaults, and the keys of log.jsonl and lineval.json."""
import re
import shutil

import pytest
import torch

import lineval
import simsiam
from tests.helpers import PROTOCOL_OPTIONS, TINY
from tests.helpers import here, log_of, result_of

pytest_plugins = ["tests.fixtures"]


# --- The options --------------------------------------------------------------------------------------------

SHARED_OPTIONS = {  # option: what its help says of the default, "" where it has none
    "--out": "",
    "--resume": "",
    "--override": "",
    "--seed": "(default: 0)",
    "--device": "default: cuda where there is one",
    "--amp": "",
    "--no-amp": "",
    "--workers": "(default: its share of the cores, up to 16)",
    "--save-minutes": "(default: 10)",
    "--keep-every": "(default: none)",
    "--range": "(default: by a sample of the files)",
}
RUN_OPTIONS = {
    "--out": "(default: runs/<name of the data>, and -<method> or -<experiment>)",
    "--amp": "(default: on cuda, and on a CPU with instructions for bf16",
    "--recipe": "default: shapes without DATA, cifar10 for images of one size up to 64 pixels a side, else "
                "imagenet",
    "--experiment": "(default: simsiam)",
    "--compile": "(default: no)",
    "--no-compile": "(default: no)",
    "--init": "",
}
EVALUATION_OPTIONS = {
    "--out": "(default: lineval-<protocol>, beside the checkpoint)",
    "--amp": "(default: off)",
    "--ckpt": "",
    "--lars": "",
    "--sgd": "",
    "--cached": "",
    "--knn": "",
    "--base-lr": "lars 0.1, sgd 30.0, cached by a sweep",
    "--batch": "lars 4096, sgd 256, cached 256",
    "--epochs": "lars 90, sgd 100, cached 100",
    "--width": "(default: the file's own; random: the recipe's)",
    "--features": "",
    "--size": "(default: the pre-training's, or else the recipe's)",
    "--mean": "(default: the pre-training's, or else the recipe's)",
    "--std": "(default: the pre-training's, or else the recipe's)",
    "--export": "",
}
RECIPE_OPTIONS = {  # option: the defaults of imagenet | cifar10 | shapes, once where they are the same
    "--arch": "resnet50 | resnet18 | resnet18",
    "--width": "1.0 | 1.0 | 0.125",
    "--cifar-stem": "False | True | True",
    "--no-cifar-stem": "False | True | True",
    "--proj-layers": "3 | 2 | 2",
    "--proj-hidden": "2048 | 2048 | 512",
    "--dim": "2048 | 2048 | 512",
    "--pred-dim": "512 | 512 | 128",
    "--predictor": "mlp",
    "--bn": "1 1 1 0",
    "--affine": "False",
    "--no-affine": "False",
    "--fc-std": "0.0",
    "--objective": "symmetric",
    "--eta": "current",
    "--k": "1",
    "--m": "0.8",
    "--epochs": "100 | 800 | 6",
    "--batch": "512 | 512 | 32",
    "--base-lr": "0.05 | 0.03 | 2.0",
    "--momentum": "0.9",
    "--weight-decay": "0.0001 | 0.0005 | 0.0005",
    "--warmup": "0 | 0 | 1",
    "--pred-lr": "constant",
    "--size": "224 | 32 | 32",
    "--area": "0.2 1 | 0.2 1 | 0.3 1",
    "--aspect": "0.75 1.333",
    "--jitter": "0.8",
    "--strength": "0.4 0.4 0.4 0.1 | 0.4 0.4 0.4 0.1 | 0.6 0.6 0.6 0.5",
    "--gray": "0.2 | 0.2 | 0.3",
    "--blur": "0.5 | 0.0 | 0.0",
    "--sigma": "0.1 2",
    "--flip": "0.5",
    "--vflip": "0.0",
    "--mean": "0.485 0.456 0.406 | 0.4914 0.4822 0.4465 | 0.485 0.456 0.406",
    "--std": "0.229 0.224 0.225 | 0.247 0.2435 0.2616 | 0.229 0.224 0.225",
    "--centre": "0.875 | 1.0 | 1.0",
    "--knn-every": "10 | 5 | 3",
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


@pytest.fixture(params=[simsiam, lineval], ids=["simsiam.py", "lineval.py"])
def script(request):
    """One of the two programs."""
    return request.param


@pytest.fixture
def shown(script, capsys):
    """What its --help says of each option."""
    with pytest.raises(SystemExit, match="^0$"):
        script.parse(["--help"])
    return entries(capsys.readouterr().out)


def test_help_has_every_option_with_its_default(script, shown):
    """Against a list. Of the recipes' settings, the help says the defaults and nothing else."""
    own = {simsiam: RUN_OPTIONS | RECIPE_OPTIONS, lineval: EVALUATION_OPTIONS}[script]
    expected = SHARED_OPTIONS | own
    assert expected.keys() <= shown.keys()
    for option, default in expected.items():
        assert shown[option], option
        if script is simsiam and option in RECIPE_OPTIONS:
            assert shown[option].endswith(f" ({default})"), option
        else:
            assert default in shown[option], option


# --- The keys of the files ----------------------------------------------------------------------------------

MACHINE = set("event command device world python torch numpy pillow seed settings".split())
RUN_KEYS = {  # event: keys of its records in the log of a run
    "start": MACHINE | {"knn_pixels"},
    "resume": MACHINE | {"epoch", "step"},
    "epoch": set("""
        event epoch step loss std lr knn knn_images rank
        images_per_s data_wait seconds wall_seconds memory_mb collapsed bad_images
    """.split()),
    "end": {"event", "epochs", "knn", "backbone"},
}
RUN_SETTINGS = set("""
    recipe experiment init seed data images content range device amp compile world workers save_minutes
    keep_every vflip
    arch width cifar_stem proj_layers proj_hidden dim pred_dim predictor bn affine fc_std objective eta k m
    epochs batch base_lr momentum weight_decay warmup pred_lr
    size area aspect jitter strength gray blur sigma flip mean std centre knn_every
""".split())
CHECKPOINT = set("format model optimizer epoch step sums seconds waited wall settings".split())
EVALUATION_KEYS = {  # event: keys of its records in the log of an evaluation
    "start": MACHINE,
    "epoch": set("event epoch step loss lr top1 top5 images_per_s data_wait seconds wall_seconds".split()),
    "end": {"event", "epochs", "top1", "top5"},
}
EVALUATION_SETTINGS = set("""
    protocol note backbone sha256 pretrained_epochs arch width cifar_stem recipe
    data range content images val_images classes size mean std centre views_given
    seed device amp world workers save_minutes keep_every
""".split())
TRAINING = {"base_lr", "lr", "batch", "epochs"}
AUGMENTATION = {"area", "aspect", "flip"}
RESULT = EVALUATION_SETTINGS | set("top1 top5 bad_images torch hardware command".split())
RESULT_KEYS = {  # protocol: keys of lineval.json
    "lars": RESULT | TRAINING | AUGMENTATION | {"best_epoch_not_the_result"},
    "sgd": RESULT | TRAINING | AUGMENTATION | {"best_epoch_not_the_result"},
    "cached": RESULT | TRAINING | {"held_out_top1"},
    "knn": RESULT | {"k"},
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
    for record in log_of(out):
        if "settings" in record:
            assert set(record["settings"]) == RUN_SETTINGS
    checkpoint = torch.load(out / "checkpoint.pth", weights_only=True)
    assert set(checkpoint) == CHECKPOINT
    assert set(checkpoint["settings"]) == RUN_SETTINGS


@pytest.mark.parametrize("protocol", PROTOCOL_OPTIONS)
def test_the_keys_of_an_evaluations_result(evaluated, protocol):
    """Against a list."""
    assert set(result_of(evaluated(protocol))) == RESULT_KEYS[protocol]


@pytest.mark.parametrize("protocol", ["lars", "sgd"])
def test_the_keys_of_an_evaluations_log(evaluated, protocol):
    """Against lists."""
    log = log_of(evaluated(protocol))
    assert keys_of(log) == EVALUATION_KEYS
    assert set(log[0]["settings"]) == EVALUATION_SETTINGS | TRAINING | AUGMENTATION
