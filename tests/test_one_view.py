"""augment.one_view, the specification: Pillow against it, and the fast code against it."""
import numpy as np
import pytest
import torch
from PIL import Image

import augment
from harness.data import opening, shapes
from tests.helpers import CPU
from tests.test_augment import ENHANCE, PLAIN, assert_close, colour, hue, of_each, pil_blur, pil_crop_resize
from tests.test_augment import pil_enhance, pil_gray, pil_hue, views_of

pytest_plugins = ["tests.fixtures"]

CIFAR10 = augment.Policy(size=32, blur=0)
FROM_ABOVE = augment.Policy(size=32, vflip=0.5)  # blurred too
IMAGENET = augment.Policy()


# --- The fast code equals it --------------------------------------------------------------------------------

def check_views(source, images, policy, epochs):
    """The 200 views of some epochs against one_view of these images, to 1e-4; one level of 255 is 0.017."""
    batches = [(epoch, np.arange(len(source))) for epoch in range(epochs)]
    loaded = augment.load_views(source, policy, 5, batches, CPU, 0)
    compared = 0
    for epoch, (_, views) in enumerate(loaded):
        for v, x in enumerate(views):
            for i, image in enumerate(images):
                expected = augment.one_view(image, policy, 5, epoch, i, v)
                gap = (x[i] - expected).abs().max()
                assert gap < 1e-4, (epoch, i, v)
                compared += 1
    assert compared == 200


@pytest.mark.parametrize("policy", [CIFAR10, FROM_ABOVE], ids=["cifar10", "from-above"])
def test_views_in_memory_are_those_of_one_view(policy):
    """Parts of 32 pixels are resized to 32 without rounding, so that both round to the same levels."""
    source = shapes.draw_shapes(0, 0, 100, 32)
    images = [source.image(i).float() for i in range(100)]
    check_views(source, images, policy, epochs=1)


def test_views_of_files_are_those_of_one_view(photos, tmp_path):
    """Four photographs of several sizes, which files hold without loss."""
    for i, photo in enumerate(photos):
        Image.fromarray(photo).save(tmp_path / f"{i}.png")
    source, *_ = opening.open_data(tmp_path)
    assert source.pixels is None
    check_views(source, [torch.from_numpy(photo) for photo in photos], IMAGENET, epochs=25)


def test_views_have_the_memory_layout_that_is_asked_for():
    """channels_last against the usual one: other strides, the same bits."""
    source = shapes.draw_shapes(0, 0, 6, 32)
    batch = 0, np.arange(6)
    (_, usual), = augment.load_views(source, CIFAR10, 5, [batch], CPU, 0)
    (_, asked), = augment.load_views(source, CIFAR10, 5, [batch], CPU, 0, layout=torch.channels_last)
    for x, y in zip(usual, asked, strict=True):
        assert x.is_contiguous()
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(x, y)


# --- It agrees with Pillow, with the bounds of tests/test_augment.py ----------------------------------------

def test_crop_resize_and_flip_agree_with_pillow(photos):
    """Six views of each photograph, in all else left as they are."""
    policy = PLAIN._replace(jitter=0, gray=0, blur=0)
    for i, image in enumerate(photos):
        for v in range(6):
            ours = augment.one_view(torch.from_numpy(image), policy, 5, 0, i, v)
            crop = augment.draw_crop(policy, 5, 0, i, v, *image.shape[:2])
            assert_close(255 * ours, pil_crop_resize(image, crop, 0, 224), worst=1, mean=0.35)


@pytest.fixture
def changed(monkeypatch):
    """A function: square views (N, 3, S, S), changes as `colour` takes them -> levels of each one's one_view.

    The crop is the whole image, and not flipped.
    """
    whole = PLAIN._replace(area=(1, 1), aspect=(1, 1), flip=0)

    def levels(x, *factors, **others):
        monkeypatch.setattr(augment, "draw_colour", lambda *drawn_for: colour(1, *factors, **others))
        policy = whole._replace(size=x.shape[-1])
        images = x.permute(0, 2, 3, 1)
        return 255 * of_each(augment.one_view, images, policy, 0, 0, 0, 0)

    return levels


@pytest.mark.parametrize("which", range(3), ids=["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("factor", [0.6, 0.9, 1.4])
def test_brightness_contrast_saturation_agree_with_pillow(photos, changed, which, factor):
    """Against Pillow, which truncates to whole levels, and rounds the mean."""
    x = views_of(photos)
    factors = [1, 1, 1, 0]
    factors[which] = factor
    ours = changed(x, factors)
    expected = of_each(pil_enhance, x, ENHANCE[which], factor)
    assert_close(ours, expected, worst=1.3, mean=0.6)


@pytest.mark.parametrize("shift", [-0.1, 0.07])
def test_hue_agrees_with_pillow(photos, changed, shift):
    """Against Pillow's HSV, whose 8 bits put it up to 12 levels from the exact one."""
    x = views_of(photos)
    ours = changed(x, hue(shift))
    assert_close(ours, of_each(pil_hue, x, shift), worst=13, mean=1.0)


def test_grayscale_agrees_with_pillow(photos, changed):
    """Against Pillow's grayscale, which rounds."""
    x = views_of(photos)
    ours = changed(x, gray=True)
    assert_close(ours, of_each(pil_gray, x), worst=0.52, mean=0.3)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_agrees_with_pillow(photos, changed, sigma):
    """Against Pillow, which approximates the Gaussian by three boxes."""
    x = views_of(photos, n=8)
    ours = changed(x, sigma=sigma)
    assert_close(ours, of_each(pil_blur, x, sigma), worst=32, mean=0.8)
