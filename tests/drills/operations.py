"""Operations of a training step, and the milliseconds in which a CPU starts them: what limits a fast GPU.

    python tests/drills/operations.py NAME      kept under NAME in results/drills/operations.json

Start it from the root of the version whose step is counted. It is the CIFAR-10 recipe's step at batch 512,
with all its operations, but on images of 2 pixels and with a 64th of the channels, so that an operation takes
hardly longer than to start it. The time is that of the fastest epoch, of all starts with this NAME. As on a
GPU, each operation is done on all images at once, and 10 batches have their views made together if the
version can do that. Operations are those of torch that don't just view a tensor or allocate it; copies are
those of numpy arrays to the device.
"""
import collections
import contextlib
import os
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, os.getcwd())
import numpy as np
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import augment
import simsiam
from harness.training.run import Run
from results.rows import read_json, write_json

KEPT = pathlib.Path(__file__).parents[2] / "results/drills/operations.json"
SIDE, BATCH, STEPS, EPOCHS = 2, 512, 20, 12
OPTIONS = (f"--recipe cifar10 --size {SIDE} --batch {BATCH} --epochs {EPOCHS} --width 1/64 --proj-hidden 8 "
           "--dim 8 --pred-dim 2 --knn-every 0 --no-amp --device cpu").split()

times = []                           # of each epoch: seconds by phase, those of a phase in it included
operations = collections.Counter()   # by phase
copies = collections.Counter()
phases = ["outside"]                 # the innermost is the last


class Count(TorchDispatchMode):
    """Counts operations, by phase."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and "empty" not in function.__name__:
            operations[phases[-1]] += 1
        return function(*args, **kwargs or {})


def in_phase(phase, function):
    """The same function, as a phase of the step."""
    def told(*given, **options):
        phases.append(phase)
        began = time.perf_counter()
        try:
            return function(*given, **options)
        finally:
            times[-1][phases.pop()] += time.perf_counter() - began

    return told


def steps_of_epoch(run, stream, real=Run.steps_of_epoch):
    """In each epoch the time counts, in the last the operations."""
    is_last = run.epoch == EPOCHS - 1
    times.append(collections.Counter())
    copies.clear()
    with Count() if is_last else contextlib.nullcontext():
        for step in real(run, iter(in_phase("views", stream.__next__), None)):
            phases.append("monitors")
            began = time.perf_counter()
            yield step
            phases.pop()
            times[-1]["monitors"] += time.perf_counter() - began


def copying(array, device, real=augment.to_device):
    copies[phases[-1]] += 1
    return real(array, device)


def one_piece(x, start, end):
    return [slice(start, end)] if start < end else []


def main():
    Run.steps_of_epoch = steps_of_epoch
    simsiam.SimSiamMethod.train_step = in_phase("network", simsiam.SimSiamMethod.train_step)
    augment.to_device = copying
    augment.pieces = one_piece
    if hasattr(augment, "GROUP"):
        augment.GROUP["cpu"] = 10 * BATCH * 2 * 3 * SIDE ** 2
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for number, image in enumerate(rng.bytes(3 * SIDE ** 2) for _ in range(STEPS * BATCH)):
            Image.frombytes("RGB", (SIDE, SIDE), image).save(f"{folder}/{number}.png")
        simsiam.pretrain(simsiam.parse([folder, *OPTIONS, "--out", f"{folder}/run"]))
    _, *timed, _ = times  # the first epoch warms up, in the last we counted
    for epoch in timed:
        epoch["monitors"] -= epoch["network"]
    before = read_json(KEPT)
    found = {}
    for phase in ("views", "network", "monitors"):
        ms = round(1000 * min(epoch[phase] for epoch in timed) / STEPS, 2)
        if sys.argv[1] in before:
            ms = min(ms, before[sys.argv[1]][phase]["ms"])
        found[phase] = {"operations": operations[phase] / STEPS, "copies": copies[phase] / STEPS, "ms": ms}
    write_json(KEPT, before | {sys.argv[1]: found})
    print(found)


if __name__ == "__main__":
    main()
