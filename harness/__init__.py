"""What any training program needs, in small rooms. A reader of the paper need not open them.

    errors      what the programs say when they can't go on, and the signals that end a run
    draws       random numbers as a hash of (seed, epoch, image, view, draw), and the order of an epoch

    source      a split of a data set: images in memory or files, and labels
    data        from DATA on the command line to images
    layouts     what DATA can be: a table of layouts, and a look that reads nothing yet
    found       what was found there, as a value
    splits      where in a folder the training and validation images are, and their classes
    walk        which files below a folder are its images, and why the others are none
    lists       text files that name images, and what is no such list
    labels      labels of a flat validation folder, from a text file
    captions    words for what was drawn, lists of images with captions, and words as numbers
    cifar       CIFAR-10 and CIFAR-100 as they are downloaded
    tars        uncompressed tar files in the place of folders
    shapes      the drawn data set, for which nothing is downloaded
    images      reading one image file, good or bad
    values      pixels of more than 8 bits
    loading     worker processes, from files to batches on the device

    processes   joining the processes of a run, sums over them
    batchnorm   batch normalisation over the batches of all processes
    per_image   a vector for each image, kept by the processes together

    run         how far a run is, when it saves, and what ends it
    checkpoint  which of a folder's two checkpoints is read, and whether it fits a run
    folder      which folder a run has, whether there is a run in it, and that nobody else writes there
    log         log.jsonl: a record a line
    late        numbers that are read a step late, so that no step waits for the GPU
    files       files that are whole at every instant, and reading them with suspicion
    unpickling  what torch.load needs of pickle, without running a file's code
    weights     the ResNet in a file of weights, wherever it lies there
    evaluate    features of many images, counting hits, the images that count, whether a network is frozen
    pictures    curves, contact sheets, nearest neighbours

    options     the command line that the scripts share, and its limits
    progress    the line with the time left, and lines on stderr
    ends        how a program ends, and hints at why
    machine     the device's name, its memory, its fastest memory layout

The rooms import each other, torch, numpy and Pillow, and nothing from the scripts at the top level. What a
room needs of them (views, a network, the kNN rule) it gets as an argument.
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
