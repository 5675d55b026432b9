"""What the programs say of the machine, and the one thing that they choose by it."""
import resource
import sys

import torch


def device_name(device):
    """The GPU's name, or how many threads the CPU has for us."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def hardware(settings, device):
    """Device, precision and workers, for the start block."""
    parts = [device_name(device)]
    if settings["amp"]:
        parts.append("bf16 autocast")
    elif device.type == "cuda":
        parts.append("float32 (convolutions TF32)")
    else:
        parts.append("float32")
    if settings.get("compile"):
        parts.append("compiled")
    parts.append(f"{settings['workers']} workers")
    return ", ".join(parts)


def peak_memory(device):
    """The most memory used so far, in MiB: of the GPU if there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    unit = 20 if sys.platform == "darwin" else 10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> unit


def fastest_layout(network, device):
    """The memory layout in which a ResNet's convolutions are the fastest: channels_last, with one exception.

    On a CPU, oneDNN 3.12 (in torch 2.13) writes out of bounds in the backward pass of strided 1x1
    convolutions of fewer than 16 channels, which narrow networks have. We saw it from 46 pixels up.
    """
    if device.type == "cpu" and network.conv1.out_channels < 16:
        return torch.contiguous_format
    return torch.channels_last
