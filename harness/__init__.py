"""What any training program needs, in four folders. To understand the paper, you need none of them.

    common      for all the others: errors, random numbers, files, pictures, progress, the machine
    data        from DATA on the command line to batches on the device
    training    a run: its processes, its folder and log, its options, and how it ends
    evaluation  networks in files of weights, features of many images, reports and results

data and training use common, and don't know each other; evaluation uses common and training. Nothing here
imports a script at the top level. Views, networks and the kNN rule come as arguments.
"""
import os
import signal
import sys

# Between two parallel operations, the threads of a CPU wait busily for the next one, by default for
# milliseconds. If another process takes a core, a training step then takes a hundred times as long. So they
# wait for a shorter time. This is read once, when torch is imported. The demo's step on two cores: 26 ms
# before and 30 now; with another process at work over 6,000 before and 116 now.
os.environ.setdefault("GOMP_SPINCOUNT", "700")

import numpy
import PIL
import torch

OLDEST = {  # versions that pass the tests
    "python": (3, 11),
    "torch": (2, 6),
    "numpy": (1, 26),
    "pillow": (11, 0),
}


def check_versions(found):
    """End the program with one line if a version, {name: "2.13.0+cpu"}, is older than in OLDEST."""
    for name, version in found.items():
        major, minor, *_ = version.split(".")
        if (int(major), int(minor)) < OLDEST[name]:
            oldest = ".".join(map(str, OLDEST[name]))
            sys.exit(f"{name} {version} is too old: use {oldest} or newer")


VERSIONS = {  # as the log has them
    "python": sys.version.split()[0],
    "torch": torch.__version__,
    "numpy": numpy.__version__,
    "pillow": PIL.__version__,
}
check_versions(VERSIONS)
if not hasattr(signal, "SIGUSR1"):
    sys.exit("this needs Linux or macOS; on Windows, use WSL")
