"""What any training program needs, in four folders. To understand the paper, you need none of them.

    common      for all the others: errors, random numbers, files, pictures, progress, the machine
    data        from DATA on the command line to batches on the device
    training    a run: its processes, its folder and log, its options, and how it ends
    evaluation  networks in files of weights, features of many images, reports and results

data and training use common, and don't know each other; evaluation uses common and training. Nothing here
imports a script at the top level. Views, networks and the kNN rule come as arguments.
"""
import signal
import sys

import torch

# The oldest versions that pass the tests.
OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 6)


def check_versions(python, torch_version):
    """End the program with one line if Python, (major, minor, ...), or torch, "2.13.0+cpu", is too old."""
    if python[:2] < OLDEST_PYTHON:
        sys.exit("Python {}.{} is too old: use {}.{} or newer".format(*python[:2], *OLDEST_PYTHON))
    major, minor, *_ = torch_version.split(".")
    if (int(major), int(minor)) < OLDEST_TORCH:
        sys.exit("torch {} is too old: use {}.{} or newer".format(torch_version, *OLDEST_TORCH))


check_versions(sys.version_info, torch.__version__)
if not hasattr(signal, "SIGUSR1"):
    sys.exit("this needs Linux or macOS; on Windows, use WSL")
