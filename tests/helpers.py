"""What the tests share: marks, small data sets and networks, ways to run programs and to stop them."""
import contextlib
import itertools
import json
import os
import pathlib
import pickle
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import lineval
import related
import simsiam
from harness.data import shapes
from harness.data.source import Source
from harness.training import ends, recipes
from harness.training.run import Run
from tests import children
from tests.children import ROOT

REAL = ROOT.parent / "shared" / "data"  # real images, if there is such a folder next to the repository
CPU = torch.device("cpu")


slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="SLOW=1 python -m pytest")
real = pytest.mark.skipif(not REAL.is_dir(), reason="no folder of real images next to the repository")


# --- Tensors and networks -----------------------------------------------------------------------------------

def equal(a, b):
    """Whether two state_dicts are the same, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a, b, share=1e-9):
    """Whether numbers, arrays or tensors differ by no more than a share of the largest one in b.

    The default share is for rounding in float64, which has 16 digits.
    """
    a, b = (torch.as_tensor(v, dtype=torch.float64).detach() for v in (a, b))
    return a.shape == b.shape and bool((a - b).abs().max() <= share * b.abs().max())


def differs(a, b):
    """(maximum, mean) of the difference of two arrays."""
    gap = np.abs(np.asarray(a, float) - np.asarray(b, float))
    return gap.max(), gap.mean()


def vectors(n=6, d=5, seed=0):
    """Four random float64 matrices (n, d) that require gradients, for p1, p2, z1, z2."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(4, n, d, generator=generator, dtype=torch.float64)
    return [v.clone().requires_grad_() for v in drawn]


def unit(v):
    """Each row of a tensor or an array divided by its norm."""
    return v / (v * v).sum(axis=1, keepdims=True) ** 0.5


def numpy_D(p, z):
    """Eq. (1) in numpy."""
    a, b = (unit(v.detach().numpy()) for v in (p, z))
    return -np.mean(np.sum(a * b, axis=1))


def bn_names(name, c, is_affine=True):
    """The state_dict of a BN of c channels: {name: shape}, in order."""
    parts = ["running_mean", "running_var"]
    if is_affine:
        parts = ["weight", "bias", *parts]
    return {f"{name}.{part}": (c,) for part in parts} | {f"{name}.num_batches_tracked": ()}


def torchvision_names(convs, blocks, expansion):
    """torchvision's state_dict, spelled out from its naming scheme: {name: shape}, in order."""
    kernels = (3, 3) if convs == 2 else (1, 3, 1)
    names = {"conv1.weight": (64, 3, 7, 7), **bn_names("bn1", 64)}
    into = 64
    for stage, count in enumerate(blocks):
        c = 64 * 2 ** stage
        widths = [c] * (convs - 1) + [c * expansion]
        for block in range(count):
            at = f"layer{stage + 1}.{block}"
            before = into
            for k, (kernel, out) in enumerate(zip(kernels, widths), 1):
                names[f"{at}.conv{k}.weight"] = (out, before, kernel, kernel)
                names |= bn_names(f"{at}.bn{k}", out)
                before = out
            if block == 0 and (stage > 0 or expansion > 1):
                names[f"{at}.downsample.0.weight"] = (out, into, 1, 1)
                names |= bn_names(f"{at}.downsample.1", out)
            into = out
    return names | {"fc.weight": (1000, into), "fc.bias": (1000,)}


# The heads of the authors' checkpoint (ResNet-50), without encoder.fc.6.bias, which the BN after it cancels.
RELEASED_HEADS = {
    "encoder.fc.0.weight": (2048, 2048),
    **bn_names("encoder.fc.1", 2048),
    "encoder.fc.3.weight": (2048, 2048),
    **bn_names("encoder.fc.4", 2048),
    "encoder.fc.6.weight": (2048, 2048),
    **bn_names("encoder.fc.7", 2048, is_affine=False),
    "predictor.0.weight": (512, 2048),
    **bn_names("predictor.1", 512),
    "predictor.3.weight": (2048, 512),
    "predictor.3.bias": (2048,),
}


TINY_BACKBONE = dict(arch="resnet18", width=1 / 16, cifar_stem=True)
TINY_HEADS = dict(dim=16, pred_dim=4, proj_layers=2, proj_hidden=16)


def tiny_model(**options):
    """A SimSiam small enough to train in a test."""
    return simsiam.SimSiam(**(TINY_BACKBONE | TINY_HEADS | options))


def untrained(*shape):
    """A network of this (arch, width, cifar_stem), as the linear evaluation builds it."""
    return lineval.untrained(*shape).network


def filled(names, seed=0):
    """{name: shape} -> {name: tensor} with reproducible values; counters are integers."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in names.items():
        state[name] = torch.rand(shape, generator=generator) if shape else torch.tensor(7)
    return state


def prefixed(prefix, state):
    """A state_dict with this prefix before every name."""
    return {prefix + name: t for name, t in state.items()}


def without(prefix, state):
    """A state_dict without the names that start like this."""
    return {name: t for name, t in state.items() if not name.startswith(prefix)}


def change(state, **tensors):
    """A state_dict with some tensors replaced or added, or removed by None."""
    return {name: t for name, t in (state | tensors).items() if t is not None}


def settings_of(recipe, **more):
    """The settings in the checkpoint of a run of this recipe."""
    run = {"recipe": recipe, "images": 5000, "seed": 0, "data": None}
    return recipes.recipe(recipe, simsiam.SETTINGS) | run | more


def settings_of_row(program, experiment, recipe, *more):
    """The settings of a run of this experiment of simsiam or related, on data of 200,000 images."""
    source = Source(files=np.zeros(200_000, "S1"))
    options = ["DATA", "--recipe", recipe, "--experiment", experiment, "--device", "cpu", *more]
    return recipes.settings_for(program.parse(options), source, 1)


def flipped(content, place, bit=0):
    """A file's content with one bit flipped."""
    byte = content[place] ^ (1 << bit)
    return content[:place] + bytes([byte]) + content[place + 1:]


def crafted_checkpoints(whole):
    """Checkpoints that torch reads without complaint but no run has written: {id: content}"""
    crafted = {}
    for key in ("format", "model", "optimizer", "epoch", "step", "sums", "seconds", "settings"):
        crafted[f"no {key}"] = without(key, whole)
        for kind, value in {"a word": "x", "a tensor": torch.zeros(3)}.items():
            crafted[f"{key} is {kind}"] = whole | {key: value}
    for key in ("seed", "size", "width", "mean", "recipe"):
        crafted[f"{key} in the settings is a list"] = whole | {"settings": whole["settings"] | {key: [1]}}
    expanded = dict.fromkeys(whole["model"], torch.zeros(()).expand(100, 100))
    crafted["tensors larger than their storage"] = whole | {"model": expanded}
    return crafted


# --- Data ---------------------------------------------------------------------------------------------------

def save_image(path, pixels):
    """Write an (H, W, 3) uint8 tensor as an image file; make its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).save(path)


def write_folder(folder, split, count, side, start=0, suffix=".png"):
    """Write `count` drawn shapes as image files in class folders a, b, c. side: one, or several in turn"""
    sides = side if isinstance(side, tuple) else (side,)
    for i in range(count):
        drawn = shapes.draw_shapes(9, start + i, 1, sides[i % len(sides)])
        save_image(folder / split / "abc"[i % 3] / f"{i:03}{suffix}", drawn.image(0))
    return folder


def write_cifar(folder, pixels, labels, per_batch, names):
    """Write images (N, 3, 32, 32) as batches in both of CIFAR-10's layouts, in folder/bin and folder/py."""
    for layout in ("bin", "py"):
        (folder / layout).mkdir(parents=True)
    for b, name in enumerate(names):
        part = slice(b * per_batch, (b + 1) * per_batch)
        data = pixels[part].reshape(per_batch, 3072)
        records = np.concatenate([labels[part, None], data], axis=1)
        records.astype(np.uint8).tofile(folder / f"bin/{name}.bin")
        batch = {b"data": data, b"labels": labels[part].tolist(), b"batch_label": b"x"}
        (folder / "py" / name).write_bytes(pickle.dumps(batch, protocol=2))


class Hostile:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def png_chunk(kind, content):
    """A chunk of a PNG file: length, kind, content, checksum."""
    length = struct.pack(">I", len(content))
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return length + kind + content + checksum


def decompression_bomb():
    """An image file of a few bytes that claims 50,000 x 50,000 pixels."""
    return b"P6 50000 50000 255\n"


def odd_files(folder):
    """Write odd images, 30 x 20 pixels but for one, and bad files -> {name: mean colour, or None if bad}"""
    folder.mkdir(parents=True)
    red, blue = (Image.new("RGB", (30, 20), colour) for colour in ((200, 0, 0), (0, 0, 200)))
    turned = Image.Exif()
    turned[0x0112] = 6
    red.convert("CMYK").save(folder / "cmyk.jpg")
    red.convert("P").save(folder / "palette.png", transparency=0)
    red.save(folder / "animated.webp", save_all=True, append_images=[blue], lossless=True)
    red.save(folder / "rotated.jpg", exif=turned)
    Image.new("RGBA", (30, 20), (200, 0, 0, 0)).save(folder / "alpha.png")
    Image.new("1", (30, 20), 1).save(folder / "bilevel.png")
    Image.new("RGB", (1, 5000), "#090909").save(folder / "line.png")
    whole = (folder / "rotated.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[:len(whole) // 2])
    (folder / "text.jpg").write_bytes(b"not an image")
    (folder / "new\nline\x1b[31m.png").write_bytes(b"")
    reds = ["cmyk.jpg", "palette.png", "animated.webp", "rotated.jpg", "alpha.png"]
    bad = ["truncated.jpg", "text.jpg", "new\nline\x1b[31m.png"]
    return {**dict.fromkeys(reds, (200, 0, 0)), "bilevel.png": 255, "line.png": 9, **dict.fromkeys(bad)}


def bad_levels(folder, bad=(), count=6):
    """A Source of image files, image i all of level 10 i; those in `bad` are empty."""
    paths = [folder / f"{i:03}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.new("L", (8, 8), 10 * i).save(path)
        if i in bad:
            path.write_bytes(b"")
    return Source(files=np.array([os.fsencode(path) for path in paths]))


# --- The programs -------------------------------------------------------------------------------------------

TINY = shlex.split("--arch resnet18 --cifar-stem --width 1/16 --dim 16 --pred-dim 4 --proj-hidden 16 "
                   "--batch 16 --epochs 3 --base-lr 0.5 --knn-every 1 --size 16 --workers 1")
# With `small`, these are 8 steps an epoch.
LONGER = [*TINY, *shlex.split("--recipe cifar10 --knn-every 0 --batch 6 --epochs 6")]

# A quick evaluation of an untrained network in each protocol, for 30 training images or more.
EVALUATION = ["--ckpt", "random:resnet18", "--width", "1/16"]
PROTOCOL_OPTIONS = {
    "lars": ["--lars", "--epochs", "3", "--batch", "30"],
    "sgd": ["--sgd", "--epochs", "3", "--batch", "10"],
    "cached": ["--cached", "--epochs", "5"],
    "knn": ["--knn"],
}


def python(*command, **options):
    """Run Python to its end -> CompletedProcess

    Our scripts and the tests' modules run in a child of the forkserver, which has imported torch. Anything
    else, and what needs preexec_fn, runs in a process of its own.
    """
    if children.can_run(command) and "preexec_fn" not in options:
        return children.run(*command, **options)
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, timeout=children.HANGS, **options)


def program(*arguments, **options):
    """Run simsiam.py in a child."""
    return python(ROOT / "simsiam.py", *arguments, **options)


def here(name, *arguments):
    """Run simsiam.py, lineval.py or related.py in this process -> its result, or why it gave up"""
    module = {"simsiam.py": simsiam, "lineval.py": lineval, "related.py": related}[name]
    run = lineval.evaluate if name == "lineval.py" else simsiam.pretrain
    try:
        return ends.launch(name, run, module.parse([str(a) for a in arguments]))
    except SystemExit as end:
        return str(end.code)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def interrupted_before(number):
    """Within the block, Ctrl-C comes instead of this training step, counted from 0."""
    def interrupt(step):
        if step == number:
            raise KeyboardInterrupt

    with before_each_step(interrupt):
        yield


def before_each_step(do):
    """Within the block, runs in this process call do(number of the step, from 0) before each step."""
    return mock.patch.object(Run, "steps_of_epoch", watched_steps(do))


def watched_steps(do):
    """A replacement for Run.steps_of_epoch: see before_each_step."""
    steps_of_epoch = Run.steps_of_epoch
    count = itertools.count()

    def watched(run, batches):
        for step in steps_of_epoch(run, batches):
            do(next(count))
            yield step

    return watched


def refusal(name, *arguments):
    """The one line with which a program refuses these arguments."""
    message = here(name, *arguments)
    assert isinstance(message, str)
    assert message.startswith(f"{name}: ")
    assert "\n" not in message
    assert "\x1b" not in message
    return message


def torchrun(*command, **options):
    """Run one of our scripts in two children, as one run of two processes."""
    return children.run_two(*command, **options)


@contextlib.contextmanager
def start(*command, **options):
    """A process that does not outlive the block: a child if one can run the command, else a new Python."""
    if children.can_run(command):
        with children.Child(*command, **options) as process:
            yield process
        return
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, *map(str, command)], **pipes, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def free_port():
    """A port that nobody uses."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# --- What a run leaves in its folder ------------------------------------------------------------------------

def log_of(folder):
    """The records of log.jsonl."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses_of(folder):
    """{epoch: loss}"""
    epochs = [r for r in log_of(folder) if r["event"] == "epoch"]
    return {r["epoch"]: r["loss"] for r in epochs}


def result_of(folder):
    """The content of lineval.json."""
    return json.loads((folder / "lineval.json").read_text())


def weights_of(folder):
    """All tensors of a run's checkpoint: the model's, the optimiser's, those of a method's other parts."""
    return tensors_in(torch.load(folder / "checkpoint.pth", weights_only=True))


def tensors_in(value, path=""):
    """{path: tensor} of nested dictionaries"""
    if torch.is_tensor(value):
        return {path: value}
    found = {}
    if isinstance(value, dict):
        for key, part in value.items():
            found |= tensors_in(part, f"{path}.{key}")
    return found


def stopped_at(printed, folder):
    """Where a run says that it has stopped, which must be its checkpoint's position."""
    message = r"stopped by a signal after epoch (\d+), step (\d+); the same command with --resume goes on\n"
    place = re.search(message, printed)
    assert place, printed
    checkpoint = torch.load(folder / "checkpoint.pth", weights_only=True)
    position = checkpoint["epoch"], checkpoint["step"]
    assert tuple(int(n) for n in place.groups()) == position
    return position


# --- Processes to wait for and to kill ----------------------------------------------------------------------

def processes_of(*words):
    """The other processes with all of these words in their command line."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            line = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
            if all(str(word).encode() in line for word in words):
                found.append(int(pid))
    return [pid for pid in found if pid != os.getpid()]


def children_of(pid):
    """The processes that a process has started: a run's workers, for example."""
    return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_all(folder):
    """kill -9 every process that names the run folder; torchrun starts its own in sessions of their own."""
    for pid in processes_of(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_until(met, process):
    """Wait until met() is true, while the process goes on -> what it returned"""
    deadline = time.monotonic() + children.HANGS
    while not (found := met()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)  # busy waiting would take a core from the run
    return found


def wait_for_epoch(process, folder, epoch=2):
    """Wait until the run's log has this epoch."""
    log = folder / "log.jsonl"
    wait_until(lambda: log.exists() and f'"epoch": {epoch},' in log.read_text(), process)


def saved_position(folder):
    """The newest checkpoint of a run that may be writing one: for an instant only the older one exists."""
    for name in ("checkpoint.pth", "checkpoint-previous.pth"):
        with contextlib.suppress(FileNotFoundError):
            return torch.load(folder / name, weights_only=True)
    return {"epoch": -1, "step": 0}


def kill_when(command, folder, epoch):
    """Start a run, and kill -9 it when its checkpoint is within an epoch, from `epoch` on -> that checkpoint

    command: as for subprocess, with Python itself as its first word
    """
    def within_an_epoch():
        process.send_signal(signal.SIGSTOP)  # while we look
        position = saved_position(folder)
        if position["epoch"] >= epoch and 0 < position["step"] <= 4:
            return True
        process.send_signal(signal.SIGCONT)
        return False

    with start(*command[1:]) as process:
        wait_until(within_an_epoch, process)
    return saved_position(folder)
