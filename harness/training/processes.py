"""Joining the processes of a run, and sums over them.

A single process is a world of one: it has a process group too. So nothing else asks whether there are
several, except simsiam.distribute, which leaves a single process without DistributedDataParallel.
"""
import datetime
import os
import time
import uuid

import numpy as np
import torch
import torch.distributed as dist

from ..common.errors import Refused
from ..common.machine import local_world

PATIENCE = datetime.timedelta(minutes=10)  # how long processes wait for each other


# --- Joining --------------------------------------------------------------------------------------------

def join_world(device):
    """Join the processes that torchrun started, or make a world of this one. -> (device, rank, world size)

    Raises Refused if there are too few GPUs, or if the processes don't find each other.
    """
    check_scheduler(os.environ)
    backend = "gloo"
    if device.type == "cuda":
        device = own_gpu()
        backend = "nccl"
    try:
        if "RANK" in os.environ:
            store, rank, world = new_store_for_this_start()
        else:
            store, rank, world = dist.HashStore(), 0, 1
        dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=rank, world_size=world)
    except (RuntimeError, ValueError) as error:  # the second: something is missing in the environment
        if "RANK" not in os.environ:
            raise
        reason = str(error).partition(". ")[0]
        raise Refused(f"the processes did not find each other within {PATIENCE} ({reason}); give all "
                      "machines the same --nnodes and --rdzv-endpoint, open its port, and start as many "
                      "machines as --nnodes says") from None
    return device, rank, world


def check_scheduler(environ):
    """Raise Refused if SLURM has started several tasks that would know nothing of each other."""
    # Of the job step that this process is in, or else of the whole job.
    tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))
    if "RANK" not in environ and tasks != "1":
        raise Refused(f"SLURM has started {tasks} tasks that don't know of each other; start torchrun: "
                      "srun --ntasks-per-node 1 torchrun --nproc-per-node GPUS ... (or unset SLURM_NTASKS "
                      "for a run in one process)")


def own_gpu():
    """The GPU of this process, made the current one. Raises Refused if the machine has too few."""
    if local_world() > torch.cuda.device_count():
        raise Refused(f"{local_world()} processes on this machine, but {torch.cuda.device_count()} GPUs; "
                      "start fewer processes, or give --device cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    # As in the released code. The shapes stay the same, so it pays to try which kernels are the fastest.
    torch.backends.cudnn.benchmark = True
    # Some containers switch TF32 on for all products; views and kNN need float32's digits.
    torch.backends.cuda.matmul.allow_tf32 = False
    return device


def new_store_for_this_start():
    """A store that only this start's processes share -> store, rank, world size.

    A workaround. The store that torchrun hands out outlives its restarts. It still has the addresses of
    processes that have died since, and torch 2.13 connects to them. So each start takes a new part of the
    store. Process 0 names the part, and has to tell the others of the same start:

        process k sets  "hello k"        to a name that only this process has, and only in this start
        process 0 sets  "welcome NAME"   to the name of the part, for each name that it finds under "hello k"
        process k adds  1 to "joined PART"

    Process 0 looks at the hellos again and again until all have joined: a new one may replace an old one.
    """
    store, rank, world = next(dist.rendezvous("env://", timeout=PATIENCE))
    name = uuid.uuid4().hex
    if rank == 0:
        forget_failure(store)
    if rank > 0:
        store.set(f"hello {rank}", name)
        part = store.get(f"welcome {name}").decode()
        store.add(f"joined {part}", 1)
        return dist.PrefixStore(part, store), rank, world
    deadline = time.monotonic() + PATIENCE.total_seconds()
    joined = 0
    while joined < world - 1:
        for other in range(1, world):
            if store.check([f"hello {other}"]):
                their_name = store.get(f"hello {other}").decode()
                store.set(f"welcome {their_name}", name)
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"{joined + 1} of {world} are here")
        time.sleep(0.02)
        joined = store.add(f"joined {name}", 0)
    return dist.PrefixStore(name, store), rank, world


def forget_failure(store):
    """Delete the key by which NCCL's watchdogs tell each other that one has failed. It is in the store that
    outlives restarts, without any prefix, and would end the restarted processes minutes later."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    store.delete_key("exception_dump")


# --- Sums over the processes ----------------------------------------------------------------------------

def all_sum(t):
    """The sum of a tensor over all processes, in place."""
    dist.all_reduce(t)
    return t


def mean_over_processes(t):
    """The mean of a tensor over all processes, in float64. The tensor itself stays as it is."""
    return all_sum(t.to(torch.float64, copy=True)) / dist.get_world_size()


def everyones(v, all_sum, rank, world):
    """The rows of all processes, in their order: (N, ...) -> (world N, ...)

    With batchnorm.AllSum, gradients flow back to all of them.

    all_sum     adds a tensor up over the processes
    rank        the number of this process, of `world`
    """
    n = len(v)
    rows = v.new_zeros(world * n, *v.shape[1:])
    rows[rank * n:(rank + 1) * n] = v
    return all_sum(rows)


def my_share(n):
    """This process's part of the indices 0 ... n - 1: consecutive, and as even as n allows."""
    return np.array_split(np.arange(n), dist.get_world_size())[dist.get_rank()]


def check_same(what, numbers, device):
    """Raise Refused unless all processes have the same numbers. what: the things behind them, in words"""
    for number in numbers:
        both = torch.tensor([number, -number], dtype=torch.float64, device=device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        if both[0] != -both[1]:  # the highest is not the lowest
            raise Refused(f"{what}: the processes see different ones; give all machines the same files and "
                          "options, and a shared --out")
