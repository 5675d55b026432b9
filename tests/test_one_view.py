"""augment.one_view, the specification: Pillow against it, and the fast code against it."""
import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter

import augment
from harness.data import opening, shapes
from tests.helpers import CPU
from tests.test_augment import PLAIN, as_pil, assert_close, colour, from_pil, pil_crop_resize, views_of

pytest_plugins = ["tests.fixtures"]

CIFAR10 = augment.Policy(size=32, blur=0)
FROM_ABOVE = augment.Policy(size=32, vflip=0.5)  # blurred too


# --- The fast code equals it --------------------------------------------------------------------------------

def check_views(source, images, policy, epochs):
    """All views of some epochs against one_view of these images, to 1e-4; one level of 255 is 0.017."""
    batches = [(epoch, np.arange(len(images))) for epoch in range(epochs)]
    loaded = augment.load_views(source, policy, 5, batches, CPU, 0)
    for (epoch, _), (_, views) in zip(batches, loaded, strict=True):
        for v, x in enumerate(views):
            for i, image in enumerate(images):
                expected = augment.one_view(image, policy, 5, epoch, i, v)
                gap = (x[i] - expected).abs().max()
                assert gap < 1e-4, (epoch, i, v)


@pytest.mark.parametrize("policy", [CIFAR10, FROM_ABOVE], ids=["cifar10", "from-above"])
def test_views_in_memory_are_those_of_one_view(policy):
    """Parts of 32 pixels are resized to 32 without rounding, so that both round to the same levels."""
    source = shapes.draw_shapes(0, 0, 50, 32)
    images = [source.image(i).float() for i in range(50)]
    check_views(source, images, policy, epochs=2)


def test_views_of_files_are_those_of_one_view(photos, tmp_path):
    """Four photographs of several sizes, which files hold without loss."""
    for i, photo in enumerate(photos):
        Image.fromarray(photo).save(tmp_path / f"{i}.png")
    source, *_ = opening.open_data(tmp_path)
    assert source.pixels is None
    check_views(source, [torch.from_numpy(photo) for photo in photos], FROM_ABOVE, epochs=12)


def test_views_have_the_memory_layout_that_is_asked_for():
    """channels_last against the usual one: other strides, the same bits."""
    source = shapes.draw_shapes(0, 0, 6, 32)
    arguments = source, CIFAR10, 5, [(0, np.arange(6))], CPU, 0
    (_, usual), = augment.load_views(*arguments)
    (_, asked), = augment.load_views(*arguments, layout=torch.channels_last)
    for x, y in zip(usual, asked, strict=True):
        assert x.is_contiguous()
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(x, y)


# --- It agrees with Pillow, with the bounds of tests/test_augment.py ----------------------------------------

def test_crop_resize_and_flip_agree_with_pillow(photos):
    """Six views of each photograph, in all else left as they are."""
    policy = PLAIN._replace(jitter=0, gray=0, blur=0, vflip=0.5)
    for i, image in enumerate(photos):
        for v in range(6):
            ours = augment.one_view(torch.from_numpy(image), policy, 5, 0, i, v)
            crop = augment.draw_crop(policy, 5, 0, i, v, *image.shape[:2])
            assert_close(255 * ours, pil_crop_resize(image, crop, 0, 224), worst=1, mean=0.35)


def pil_hue(image, shift):
    """An image with its hue shifted, as torchvision does it: in Pillow's HSV of 8 bits."""
    h, s, v = image.convert("HSV").split()
    turned = np.array(h) + np.uint8(int(shift * 255) % 256)
    return Image.merge("HSV", (Image.fromarray(turned), s, v))


CHANGES = {  # what: (our change by some value; Pillow's; its values; the gap at most, and in the mean)
    "brightness": (  # Pillow truncates to whole levels
        lambda f: colour(1, (f, 1, 1, 0)),
        lambda image, f: ImageEnhance.Brightness(image).enhance(f),
        (0.6, 0.9, 1.4), 1.3, 0.6),
    "contrast": (  # and rounds the mean
        lambda f: colour(1, (1, f, 1, 0)),
        lambda image, f: ImageEnhance.Contrast(image).enhance(f),
        (0.6, 0.9, 1.4), 1.3, 0.6),
    "saturation": (
        lambda f: colour(1, (1, 1, f, 0)),
        lambda image, f: ImageEnhance.Color(image).enhance(f),
        (0.6, 0.9, 1.4), 1.3, 0.6),
    "hue": (  # 8 bits put Pillow's up to 12 levels from the exact one
        lambda f: colour(1, (1, 1, 1, f)),
        pil_hue,
        (-0.1, 0.07), 13, 1.0),
    "grayscale": (  # Pillow rounds
        lambda f: colour(1, gray=True),
        lambda image, f: image.convert("L"),
        (1,), 0.52, 0.3),
    "blur": (  # Pillow approximates the Gaussian by three boxes
        lambda f: colour(1, sigma=f),
        lambda image, f: image.filter(ImageFilter.GaussianBlur(f)),
        (0.1, 0.5, 1.0, 2.0), 32, 0.8)}


@pytest.mark.parametrize("what", CHANGES)
def test_each_change_agrees_with_pillow(photos, monkeypatch, what):
    """Of square views, as they are: the crop is the whole image, and not flipped."""
    change, in_pillow, values, worst, mean = CHANGES[what]
    whole = PLAIN._replace(area=(1, 1), aspect=(1, 1), flip=0, size=64)
    x = views_of(photos)
    stored = [view.permute(1, 2, 0) for view in x]
    for value in values:
        monkeypatch.setattr(augment, "draw_colour", lambda *drawn_for: change(value))
        ours = [255 * augment.one_view(image, whole, 0, 0, 0, 0) for image in stored]
        expected = [from_pil(in_pillow(as_pil(view), value)) for view in x]
        assert_close(torch.stack(ours), expected, worst, mean)
