"""The tables of single runs and of the drills, in results/README.md and results/drills.md.

    python results/singles.py

Start it from the repository's root. README.md has the runs' commands, tests/drills the drills'.
"""
import os
import sys

sys.path.insert(0, os.getcwd())

from results.pages import page_with, table, write
from results.rows import read_json, records

FRONT = "results/README.md"
DRILLS = "results/drills.md"
RUNS = {  # folder: what was run there
    "cifar10-width4": "8 epochs, ResNet-18 x 1/4, in bf16",
    "cifar10-width8-high-lr": "10 epochs, ResNet-18 x 1/8; by an earlier version",
}
EVALUATIONS = {  # file: the backbone
    "cifar10-width4/lineval-cached": "`cifar10-width4/backbone.pth`",
    "cifar10-width4/untrained-lineval-cached": "untrained, BN calibrated",
    "cifar10-width4/lineval-knn": "`cifar10-width4/backbone.pth`",
}


def runs_table():
    lines = []
    for folder, words in RUNS.items():
        start, untrained, *epochs, end = records(f"results/{folder}/log.jsonl")
        last = epochs[-1]
        minutes = sum(epoch["seconds"] for epoch in epochs) / 60
        lines.append([f"`{folder}`", words,
                      f"{start['knn_pixels']:.1f} / {untrained['knn']:.1f} / {last['knn']:.1f}",
                      f"{last['loss']:.3f}", f"{last['std']:.2f}", f"{minutes:.1f} min"])
    return table(["folder", "run", "kNN: raw pixels / untrained / last", "loss", "std x sqrt(d)",
                  "training time"], lines)


def evaluations_table():
    lines = []
    for name, backbone in EVALUATIONS.items():
        found = read_json(f"results/{name}.json")
        accuracies = [f"{found['top1']:.2f}", f"{found['top5']:.2f}"]
        lines.append([f"`{name}`", backbone, found["protocol"], *accuracies])
    return table(["file", "backbone", "protocol", "top-1", "top-5"], lines)


def gpu_table():
    """The checks of tests/drills/gpu.py."""
    lines = []
    for name, found in read_json("results/drills/gpu.json").items():
        outcome = "good" if found["good"] else "**bad**"
        lines.append([name, outcome, found["seen"], found["seconds"]])
    return table(["check on an H200", "outcome", "seen", "s"], lines)


def drill_table(name):
    """A drill's results."""
    found = read_json(f"results/drills/{name}.json")
    rows = [[key, shown(value)] for key, value in found.items()]
    return table([name, "what it found"], rows)


def operations_table():
    """The operations of a step and the time to start them, of each version."""
    versions = read_json("results/drills/operations.json")
    first, *_ = versions.values()
    lines = [[phase, *(version[phase][key] for key in ("operations", "copies", "ms")
                       for version in versions.values())] for phase in first]
    return table(["part of a step", *(f"{key}, {name}" for key in ("operations", "copies", "ms")
                                      for name in versions)], lines)


def shown(value):
    """Counts by name in words, anything else unchanged."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {count:,}" for name, count in value.items())
    return value


def pages():
    front = [runs_table(), evaluations_table(), gpu_table()]
    drills = [drill_table(name) for name in ("kills", "signals", "fuzz", "start_up", "tar", "quarter")]
    return page_with(FRONT, front) | page_with(DRILLS, [*drills, operations_table()])


if __name__ == "__main__":
    write(pages())
