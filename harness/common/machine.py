"""The machine: what we say about it, what we choose by it, and how numbers travel to a GPU and back."""
import contextlib
import functools
import itertools
import math
import os
import pathlib
import re
import resource
import sys

import torch

from .errors import Refused


def cores():
    """This process's share of the cores that the machine lets us use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, int(min(usable, quota("cpu")) / local_world()))


def memory():
    """This process's share of the memory that the machine lets us use, in bytes."""
    return min(MEMORY, quota("memory")) / local_world()


def check_memory(needed, what):
    """Raise Refused if so many bytes more don't fit into this process's share of the memory.

    what: the things that take them, in words
    """
    needed += peak_memory(torch.device("cpu")) << 20
    if needed > memory():
        raise Refused(f"{what}: this process would need {needed / 2 ** 30:.1f} GiB of memory, and may use "
                      f"{memory() / 2 ** 30:.1f} (the machine's, or a container's or job's limit); allow it "
                      "more, or give fewer images or --workers")


def local_world():
    """How many processes of the run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
CGROUPS = pathlib.Path("/sys/fs/cgroup")
OWN_CGROUPS = pathlib.Path("/proc/self/cgroup")
LIMITS = {  # of a controller: the files that hold its limit, in cgroups of version 2, and of version 1
    "cpu": ("cpu.max", "cpu.cfs_quota_us cpu.cfs_period_us"),
    "memory": ("memory.max", "memory.limit_in_bytes"),
}


def quota(controller):
    """How many cores ("cpu") or bytes ("memory") the cgroups of a container or a job allow us; infinite, or
    more than there are, if they set no limit."""
    allowed = math.inf
    for controllers, ours in re.findall(":(.*?):/(.*)", text_of(OWN_CGROUPS)):
        # Version 1 has a tree for each controller; version 2 has one, and names none.
        if controllers and controller not in controllers.split(","):
            continue
        group = CGROUPS / (controller if controllers else "") / ours
        for folder, names in itertools.product((group, *group.parents), LIMITS[controller]):
            limit, *period = " ".join(text_of(folder / name) for name in names.split()).split() or ["max"]
            if limit not in ("max", "-1"):
                allowed = min(allowed, int(limit) / int(*period or [1]))
    return allowed


def text_of(path):
    """The text in a file of the system; empty if there is no such file, as on macOS."""
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""


WORKER_KILLED = ("a process that decodes images has died, usually because memory (the run's share is "
                 f"{memory() / 2 ** 30:.1f} GiB), /dev/shm, or the number of processes allowed ran out; use "
                 "fewer --workers, or --workers 0; if there is a checkpoint.pth, --resume goes on")


TINY = 64  # width of a network x pixels of a view, up to which two threads are enough


def set_threads(width, size):
    """Choose how many threads compute on a CPU, for a network of this width and views of `size` pixels.

    All our cores compute, but for tiny networks at most two: their operations are too short to be shared
    among more. If OMP_NUM_THREADS is set, torch has taken its number already.
    """
    if not re.match(r"\s*\d+\s*(,|$)", os.environ.get("OMP_NUM_THREADS", "")):
        torch.set_num_threads(min(cores(), 2) if width * size ** 2 <= TINY else cores())


def device_name(device):
    """The GPU's name, or how many threads we use on the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} threads" if threads > 1 else "CPU, 1 thread"


def hardware(settings, device):
    """Device, precision and workers, for the start block."""
    precision = "bf16 autocast" if settings["amp"] else "float32"
    if device.type == "cuda" and not settings["amp"]:
        precision += " (convolutions TF32; --amp takes less time)"
    elif settings["amp"] and not bf16_pays(device.type, settings["width"]):
        precision += " (slower than float32 here)"
    parts = [device_name(device), precision]
    if settings.get("compile"):
        parts.append("compiled")
    parts.append(f"{settings['workers']} workers")
    allowed = quota("memory")
    if allowed < MEMORY:
        parts.append(f"at most {allowed / 2 ** 30:.1f} GiB of memory")
    return ", ".join(parts)


# The width of a network from which bf16 pays on a CPU. Measured on two cores of an EPYC with AVX-512 BF16, in
# steps of ResNet-18 and -50, 32 to 224 pixels, batch 8 to 256: 1.24 to 2.2 times float32's speed from a
# quarter of the width up. At an eighth it is 1.0 to 1.35: converting takes what such small products gain.
BF16_WIDTH = 1 / 4


@functools.cache
def cpu_has_bf16():
    """Whether the CPU has instructions that multiply bf16. Without them bf16 is slower than float32."""
    words = text_of(pathlib.Path("/proc/cpuinfo")).split()
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words)  # x86, x86, ARM


def bf16_pays(device_type, width):
    """Whether bf16 is faster than float32 for a network of this width."""
    return device_type == "cuda" or (width >= BF16_WIDTH and cpu_has_bf16())


def peak_memory(device):
    """The most memory used so far, in MiB: of the GPU if there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    unit = 20 if sys.platform == "darwin" else 10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> unit


def fastest_layout(network, device):
    """The memory layout in which a ResNet's convolutions are fastest: channels_last, with one exception.

    On a CPU, oneDNN 3.12 (in torch 2.13) writes out of bounds in the backward pass of strided 1x1
    convolutions of fewer than 16 channels, which narrow networks have. We saw it from 46 pixels up.
    """
    if device.type == "cpu" and network.conv1.out_channels < 16:
        return torch.contiguous_format
    return torch.channels_last


# --- To the device and back -------------------------------------------------------------------------------

def to_device(array, device):
    """A numpy array as a tensor on the device. From pinned memory, a copy to a GPU needs no waiting."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


class OnTheirWay:
    """Numbers on their way from the device. Nobody waits for them before read().

    The CPU fills a queue that the GPU works through. If we asked for a number of the last step, we would wait
    until the queue is empty, and then the GPU for us. So we queue the copy too, and read it once the next
    step is queued.
    """

    def __init__(self, numbers):
        self.numbers = numbers.to("cpu", non_blocking=True)
        self.arrived = None
        if numbers.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self):
        """The numbers, as a list."""
        if self.arrived:
            self.arrived.synchronize()
        return self.numbers.tolist()
