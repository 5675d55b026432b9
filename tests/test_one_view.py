"""augment.one_view, the specification: its crop against Pillow's, and all of the fast code against it."""
import numpy as np
import pytest
import torch
from PIL import Image

import augment
from harness.data import opening, shapes
from tests.helpers import CPU, differs
from tests.test_augment import assert_close, pil_crop_resize

pytest_plugins = ["tests.fixtures"]

CIFAR10 = augment.Policy(size=32, blur=0)
FROM_ABOVE = augment.Policy(size=32, vflip=0.5)  # blurred too


def check_views(source, images, policy, epochs):
    """Compare all views of some epochs with one_view of these images, to 1e-4; one level of 255 is 0.017."""
    batches = [(epoch, np.arange(len(images))) for epoch in range(epochs)]
    loaded = augment.load_views(source, policy, 5, batches, CPU, 0)
    for (epoch, _), (_, views) in zip(batches, loaded, strict=True):
        for v, x in enumerate(views):
            for i, image in enumerate(images):
                expected = augment.one_view(image, policy, 5, epoch, i, v)
                assert differs(x[i], expected)[0] < 1e-4, (epoch, i, v)


@pytest.mark.parametrize("policy", [CIFAR10, FROM_ABOVE], ids=["cifar10", "from-above"])
def test_views_in_memory_are_those_of_one_view(policy):
    """32 pixels are resized to 32 without rounding, so both round to the same levels."""
    source = shapes.draw_shapes(0, 0, 50, 32)
    images = [source.image(i).float() for i in range(50)]
    check_views(source, images, policy, epochs=2)


def test_views_of_files_are_those_of_one_view(photos, tmp_path):
    """Four photographs of several sizes, stored without loss."""
    for i, photo in enumerate(photos):
        Image.fromarray(photo).save(tmp_path / f"{i}.png")
    source, *_ = opening.open_data(tmp_path)
    assert source.pixels is None
    check_views(source, [torch.from_numpy(photo) for photo in photos], FROM_ABOVE, epochs=12)


def test_views_have_the_memory_layout_that_is_asked_for():
    """channels_last has other strides and the same bits."""
    source = shapes.draw_shapes(0, 0, 6, 32)
    arguments = source, CIFAR10, 5, [(0, np.arange(6))], CPU, 0
    (_, usual), = augment.load_views(*arguments)
    (_, asked), = augment.load_views(*arguments, layout=torch.channels_last)
    for x, y in zip(usual, asked, strict=True):
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(x, y)


def test_crop_resize_and_flip_agree_with_pillow(photos):
    """Six views of each photograph, with nothing else done to them but ImageNet's normalisation."""
    policy = augment.Policy(jitter=0, gray=0, blur=0, vflip=0.5)
    mean = np.reshape([0.485, 0.456, 0.406], (3, 1, 1))
    std = np.reshape([0.229, 0.224, 0.225], (3, 1, 1))
    for i, image in enumerate(photos):
        for v in range(6):
            x = augment.one_view(torch.from_numpy(image), policy, 5, 0, i, v)
            crop = augment.draw_crop(policy, 5, 0, i, v, *image.shape[:2])
            ours = 255 * (x.double().numpy() * std + mean)
            assert_close(ours, pil_crop_resize(image, crop, 0, 224), worst=1.001, mean=0.35)


