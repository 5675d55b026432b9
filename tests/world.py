"""What must not depend on the number of processes. test_processes.py runs this in one process and in two."""
import functools
import itertools
import pathlib
import sys
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import augment
import resnet
import simsiam
from harness.data import loading, shapes
from harness.training import ends, processes
from harness.training.per_image import PerImageVectors
from tests.helpers import CPU, tiny_model

# How many steps of each variant. A wrong lr shows in the second step's loss, other faults in the first's.
STEPS = {"right": 3, "local-bn": 1, "local-lr": 2, "wrong-sampler": 1}


def my_batches(variant):
    """The views of two epochs of two steps, as float64. Wrong: every process takes process 0's part of the
    batch."""
    rank = 0 if variant == "wrong-sampler" else dist.get_rank()
    source = shapes.draw_shapes(0, 0, 32, 16)
    world = dist.get_world_size()
    batches = loading.index_batches(0, 32, 16, 2, rank=rank, world=world)
    policy = augment.Policy(size=16)
    for _, views in augment.load_views(source, policy, 0, batches, CPU, 0):
        yield [x.double() for x in views]


def small_model():
    """One block a stage, because each BN takes four sums over the processes a view."""
    one_block = functools.partial(resnet.ResNet, resnet.BasicBlock, (1, 1, 1, 1))
    with mock.patch.dict(resnet.ARCHS, resnet18=one_block):
        return tiny_model().double()


def train(variant):
    """Steps in float64, as many as STEPS says -> the model's state_dict; loss and std after each step."""
    torch.manual_seed(0)
    model = small_model()
    network = distribute(model, variant)
    optimizer = simsiam.sgd(model, 0.9, 1e-4)
    lr = simsiam.initial_lr(2.0, 16 // dist.get_world_size() if variant == "local-lr" else 16)
    autocast = torch.autocast("cpu", enabled=False)
    numbers = []
    for step, views in enumerate(itertools.islice(my_batches(variant), STEPS[variant])):
        simsiam.set_lr(optimizer, lr, step, 8, 0, "constant")
        L, z = simsiam.train_step(network, optimizer, autocast, *views)
        numbers.append(processes.mean_over_processes(L).item())
        numbers.append(simsiam.feature_std(z[0], processes.all_sum).item())
    return model.state_dict(), torch.tensor(numbers)


def distribute(model, variant):
    """As simsiam.distribute does. Wrong: each process with a BN of its own."""
    if variant != "local-bn":
        return simsiam.distribute(model, CPU)
    network = DistributedDataParallel(model)
    network.broadcast_buffers = False
    return network


def keep_vectors(file):
    """Write and read vectors of 11 images -> sums read, all of them, whether a file brings them back."""
    store = PerImageVectors(11, 3, CPU)
    rng = np.random.default_rng(0)
    mine = processes.my_share(4)
    seen = []
    for _ in range(6):
        index = rng.permutation(11)[:4][mine]
        vectors = torch.from_numpy(rng.normal(size=(4, 3))).float()[mine]
        seen.append(processes.all_sum(store.get(index).sum(dim=0)))
        store.put(index, vectors)
    whole = store.state_dict()
    if dist.get_rank() == 0:
        torch.save(whole, file)
    dist.barrier()
    again = PerImageVectors(11, 3, CPU)
    again.load_state_dict(torch.load(file))
    equal = torch.tensor(float(torch.equal(again.mine, store.mine)))
    equal = processes.mean_over_processes(equal).item()
    return {"seen": torch.stack(seen), "equal": equal, **whole}


def everything(folder, variants):
    """All of the above in a world that is there already, written by process 0 -> folder/result."""
    result = {variant: train(variant) for variant in variants}
    result["vectors"] = keep_vectors(folder / "vectors.pth")
    if dist.get_rank() == 0:
        torch.save(result, folder / "result")
    return folder / "result"


if __name__ == "__main__":
    processes.join_world(CPU)
    everything(pathlib.Path(sys.argv[1]), STEPS)
    dist.destroy_process_group()
    ends.leave(None)
