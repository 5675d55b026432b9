"""What any training program needs, in four folders of rooms. A reader of the paper need not open them.

    common      what every room may use: errors, random numbers, files, pictures, progress, the machine
    data        from DATA on the command line to batches on the device
    training    a run: its processes, its folder and log, its options, and how it ends
    evaluation  networks in files of weights, features of many images

data and training use common, and know nothing of each other; evaluation uses common and training. Nothing
here imports a script at the top level. What a room needs of them (views, a network, the kNN rule) it gets as
an argument.
"""
import importlib.util
import signal
import sys

import torch

# The oldest that the tests passed with.
OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 6)


def as_text(version):
    """(3, 10) -> 3.10"""
    return ".".join(map(str, version))


def check_versions(python, torch_version):
    """End the program with one line where Python, (major, minor, ...), or torch, "2.13.0+cpu", is too old."""
    if tuple(python[:2]) < OLDEST_PYTHON:
        sys.exit(f"Python {python[0]}.{python[1]} is too old: use {as_text(OLDEST_PYTHON)} or newer")
    major, minor, *_ = torch_version.split(".")
    if (int(major), int(minor)) < OLDEST_TORCH:
        sys.exit(f"torch {torch_version} is too old: use {as_text(OLDEST_TORCH)} or newer")


def check_system(modules, signals):
    """End the program with one line where the system lacks what the rooms need. modules: whether one of this
    name is there. signals: the names of what there is."""
    missing = [name for name in ("fcntl", "resource") if not modules(name)]
    missing += [name for name in ("SIGUSR1",) if name not in signals]
    if missing:
        sys.exit(f"this needs Linux or macOS ({', '.join(missing)} missing); on Windows, use WSL")


check_versions(sys.version_info, torch.__version__)
check_system(importlib.util.find_spec, dir(signal))
