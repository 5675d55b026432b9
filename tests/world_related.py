"""SimSiam's neighbours in any number of processes; test_related.py compares two with one."""
import contextlib
import functools
import pathlib
import sys
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import augment
import related
import resnet
import simsiam
from harness.data import loading, shapes
from harness.data.opening import Data
from harness.training import ends, processes, recipes
from tests.helpers import CPU, TINY_BACKBONE, TINY_HEADS

STEPS = 6
WRONG = {  # common mistakes: {method: variants}; see `spoiled`
    "simclr": ["negatives of one process", "negatives without a gradient", "own gradient alone"],
    "mocov2": ["keys of one process", "target's BN of one process"],
    "byol": ["target's BN of one process"],
    "swav": ["codes of one process"],
    "clip": ["captions of one process", "captions without a gradient"],
}


def settings(name, **more):
    """Settings of a run of 48 images, three steps an epoch."""
    s = recipes.recipe("shapes", related.METHODS[name].SETTINGS)
    tiny = TINY_BACKBONE | TINY_HEADS
    short = {"size": 16, "epochs": 3, "batch": 16, "base_lr": 1.0, "warmup": 0}
    small = {"queue": 64, "prototypes": 8, "temperature": 0.3, "words_width": 8}
    changes = {key: value for key, value in (tiny | short | small).items() if key in s}
    return s | changes | {"images": 48, "amp": False} | more


@functools.cache
def data():
    """48 drawn shapes of 16 pixels, with captions, and 10 to validate."""
    train = shapes.draw_shapes(0, 0, 48, 16)
    val = shapes.draw_shapes(0, 48, 10, 16)
    return Data(train, val, None)


def views(count=2):
    """This process's share of each step's views, in float64."""
    rank, world = dist.get_rank(), dist.get_world_size()
    batches = loading.index_batches(0, 48, 16, 2, rank=rank, world=world)
    policy = augment.Policy(size=16)
    loaded = augment.load_views(data().train, policy, 0, batches, CPU, 0, count)
    for index, x in loaded:
        yield index, [v.double() for v in x]


def new_method(name, **more):
    """A method with a tiny model of one block a stage."""
    one_block = functools.partial(resnet.ResNet, resnet.BasicBlock, (1, 1, 1, 1))
    torch.manual_seed(0)
    method = related.METHODS[name](settings(name, **more), data(), CPU)
    with mock.patch.dict(resnet.ARCHS, resnet18=one_block):
        method.build()
    return method


ALONE = {"all_sum": related.identity, "rank": 0, "world": 1}


class SumWithOwnGradient(torch.autograd.Function):
    """A sum over the processes whose backward pass takes only this process's gradient."""

    @staticmethod
    def forward(ctx, t):
        return processes.all_sum(t.clone())

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class LocalBN(nn.modules.batchnorm._BatchNorm):
    """BN over this process's images, in any number of dimensions."""
    _check_input_dim = staticmethod(lambda x: None)


def sums(all_sum):
    """A replacement for related.over_processes."""
    return {"all_sum": all_sum, "rank": dist.get_rank(), "world": dist.get_world_size()}


def sum_without_gradient(t):
    return processes.all_sum(t.detach().clone())


@contextlib.contextmanager
def spoiled(method, variant):
    """Within the block, a method makes one of the mistakes in WRONG."""
    with contextlib.ExitStack() as stack:
        def replace(name, function):
            stack.enter_context(mock.patch.object(related, name, function))

        if variant in ("negatives of one process", "captions of one process"):
            replace("over_processes", lambda: ALONE)
        elif variant in ("negatives without a gradient", "captions without a gradient"):
            replace("over_processes", lambda: sums(sum_without_gradient))
        elif variant == "own gradient alone":
            replace("over_processes", lambda: sums(SumWithOwnGradient.apply))
        elif variant == "keys of one process":
            put = method.queue.put
            mine = 16 // dist.get_world_size()  # of a batch
            method.queue.put = lambda keys, count: put(keys[:mine], count)
        elif variant == "target's BN of one process":
            for module in method.target.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.__class__ = LocalBN
        elif variant == "codes of one process":
            method.codes = functools.partial(method.codes, **ALONE)
        else:
            assert variant == "right"
        yield


def train(name, variant="right", **more):
    """Six steps in float64 -> {name of a part: its state}, and each step's loss."""
    method = new_method(name, **more)
    method.model.double()
    network = simsiam.distribute(method.model, CPU)
    optimizer = method.optimizer()
    parts = method.parts()
    losses = []
    with spoiled(method, variant):
        for step, (index, x) in enumerate(views(method.views)):
            method.set_lr(optimizer, step)
            L, _ = method.train_step(network, optimizer, step, index, x)
            losses.append(processes.mean_over_processes(L.detach()).item())
    assert len(losses) == STEPS
    modules = {"model": method.model, **parts}
    modules.pop("vocabulary", None)
    return {part: module.state_dict() for part, module in modules.items()}, losses


def everything(file, wrong=True):
    """All methods, right and wrong; process 0 writes {(method, variant): what train returns}."""
    result = {}
    for name, variants in WRONG.items():
        for variant in ["right", *(variants if wrong else [])]:
            result[name, variant] = train(name, variant)
    result["swav", "without stop-gradient"] = train("swav", stopgrad=False)
    result["swav", "with a predictor"] = train("swav", predictor="mlp")
    result["simclr", "with a predictor"] = train("simclr", predictor="mlp")
    if dist.get_rank() == 0:
        torch.save(result, file)
    return file


if __name__ == "__main__":
    processes.join_world(CPU)
    everything(pathlib.Path(sys.argv[1]))
    dist.destroy_process_group()
    ends.leave(None)
