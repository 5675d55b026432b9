"""results/speed.py: the conventional pipeline makes the same views as ours, and every part is measured."""
import numpy as np
import pytest
import torch
from PIL import Image

import augment
from harness.data import opening, shapes
from results import speed
from tests.helpers import CPU, slow

pytest_plugins = ["tests.fixtures"]


def distance(x, y):
    """The mean difference of each pair of views, in levels."""
    return (x - y).abs().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("epoch", [0, pytest.param(1, marks=slow)])
def test_the_benchmarks_pillow_views_are_ours(tmp_path, photos, epoch):
    """With the same draws, both pipelines are as close as Pillow's hue and blur are to exact ones."""
    for k, photo in enumerate(photos):
        Image.fromarray(photo).save(tmp_path / f"{k}.png")
    source, _, _ = opening.open_data(tmp_path)
    index = np.arange(len(photos))
    std = (1 / 255,) * 3
    levels = augment.Policy(size=96, mean=(0,) * 3, std=std)
    batches = [(epoch, index)]
    (_, ours), = augment.load_views(source, levels, 3, batches, CPU, 0)
    by_pillow = speed.views_by_pillow(source, levels, 3, epoch, index)
    for x, y in zip(ours, by_pillow, strict=True):
        assert distance(x, y).max() < 4
        assert x.std() > 20
    assert distance(ours[0], by_pillow[1]).median() > 10


PARTS = ["decode and cut", "colour", "all", "all, by Pillow"]


def check_bench(source, policy, parts):
    """Measure, and compare the parts with these and the rates with possible ones."""
    threads = torch.get_num_threads()
    found = speed.bench(source, policy, CPU, repeats=1)
    assert torch.get_num_threads() == threads
    assert list(found) == parts
    for rates in found.values():
        assert 0 < min(rates) <= max(rates) < 1e7
    assert speed.pipeline_table(found).count("\n") == 2 + len(parts)


@slow
def test_the_benchmark_measures_every_part_of_files(large):
    """The parts for images that are decoded."""
    source, _, _ = opening.open_data(large)
    check_bench(source, augment.Policy(size=24), ["decode", *PARTS, "DataLoader, 1 and 2 workers"])


@slow
def test_the_benchmark_measures_every_part_in_memory():
    """The parts for images that are held in memory."""
    source = shapes.draw_shapes(0, 0, 16)
    check_bench(source, augment.Policy(size=32, blur=0), PARTS)
