"""Tests: each compares the code with something independent of it (a float64 formula, Pillow, a closed form, a count).

    python -m pytest -q              the quick ones
    SLOW=1 python -m pytest -q       all
"""
import ast
import collections
import colorsys
import contextlib
import copy
import ctypes
import dataclasses
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import pathlib
import pickle
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import time
import tokenize
import types
import zlib

import numpy as np
import PIL
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter

import augment
import lineval
import resnet
import simsiam

HERE = pathlib.Path(__file__).resolve().parent
REAL = HERE.parent / "shared" / "data"  # real images, where a folder with them lies beside the repository
CPU = torch.device("cpu")
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="slow: SLOW=1 python -m pytest")
real = pytest.mark.skipif(not REAL.is_dir(), reason="no real images beside the repository")
pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable")


# ---------------------------------------------------------------------------------------------------------------------
# resnet.py
# ---------------------------------------------------------------------------------------------------------------------

def torchvision_names(convs, blocks, expansion):
    """torchvision's state_dict, spelled out from its naming scheme: {name: shape}, in order."""
    shapes = collections.OrderedDict()

    def conv(name, out, into, k):
        shapes[name + ".weight"] = (out, into, k, k)

    def bn(name, c):
        shapes.update({f"{name}.{part}": (c,) for part in ("weight", "bias", "running_mean", "running_var")})
        shapes[name + ".num_batches_tracked"] = ()

    conv("conv1", 64, 3, 7)
    bn("bn1", 64)
    into = 64
    for stage, count in enumerate(blocks):
        c = 64 * 2 ** stage
        for block in range(count):
            at = f"layer{stage + 1}.{block}."
            widths = [into] + [c] * (convs - 1) + [c * expansion]
            for k, (a, b) in enumerate(zip(widths, widths[1:])):
                conv(f"{at}conv{k + 1}", b, a, 3 if convs == 2 or k == 1 else 1)
                bn(f"{at}bn{k + 1}", b)
            if block == 0 and (stage > 0 or expansion > 1):
                conv(at + "downsample.0", c * expansion, into, 1)
                bn(at + "downsample.1", c * expansion)
            into = c * expansion
    shapes["fc.weight"], shapes["fc.bias"] = (1000, into), (1000,)
    return shapes


@pytest.mark.parametrize("arch, convs, blocks, expansion, parameters", [
    ("resnet18", 2, (2, 2, 2, 2), 1, 11_689_512), ("resnet34", 2, (3, 4, 6, 3), 1, 21_797_672),
    ("resnet50", 3, (3, 4, 6, 3), 4, 25_557_032), ("resnet101", 3, (3, 4, 23, 3), 4, 44_549_160),
    ("resnet152", 3, (3, 8, 36, 3), 4, 60_192_808)])
def test_resnet_has_torchvisions_names_order_and_shapes(arch, convs, blocks, expansion, parameters):
    with torch.device("meta"):
        network = resnet.ARCHS[arch]()
    assert [(k, tuple(v.shape)) for k, v in network.state_dict().items()] == list(torchvision_names(convs, blocks, expansion).items())
    assert sum(p.numel() for p in network.parameters()) == parameters
    stem, *rest = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d) and m.stride == (2, 2)]
    assert stem.kernel_size == (7, 7) and len(rest) == 6
    assert sorted(m.kernel_size for m in rest) == [(1, 1)] * 3 + [(3, 3)] * 3  # the stride sits on the 3x3


def test_resnet_equals_torchvisions_where_that_is_installed():
    models = pytest.importorskip("torchvision.models")
    for arch in ("resnet18", "resnet50"):
        ours, theirs = getattr(resnet, arch)(), getattr(models, arch)(zero_init_residual=True)
        theirs.load_state_dict(ours.state_dict())
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(2, 3, 64, 64)
        assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_resnet_forward_has_the_shapes_that_its_comments_claim():
    source = (HERE / "resnet.py").read_text().split("def features")[1].split("def forward")[0]
    claimed = [eval(shape, {"N": 2}) for shape in re.findall(r"# (\(N, .*\))$", source, re.M)]
    network, seen = resnet.resnet50(), []
    x = torch.zeros(2, 3, 224, 224)
    for module in (network.conv1, network.maxpool, network.layer1, network.layer2, network.layer3, network.layer4, network.avgpool):
        module.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    with torch.no_grad():
        seen += [tuple(network.features(x).shape)]
    assert seen == claimed and len(claimed) == 8


def test_resnet_initialisation():
    torch.manual_seed(0)
    network = resnet.resnet18()
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05), name
        if isinstance(module, torch.nn.BatchNorm2d):
            assert torch.all(module.weight == (0 if re.search(r"layer.*bn2", name) else 1)), name
    network.layer1[0].bn1.weight.data.fill_(1)
    x = torch.rand(2, 64, 8, 8)
    assert torch.equal(network.layer1[0].eval()(x), x)  # a block starts as the identity


def test_resnet_width_and_cifar_stem():
    network = resnet.resnet18(width=1 / 8, cifar_stem=True)
    assert network.features(torch.zeros(2, 3, 32, 32)).shape == (2, 64) and network.num_features == 64
    sizes = []
    network.layer1.register_forward_hook(lambda m, a, out: sizes.append(out.shape))
    network(torch.zeros(2, 3, 32, 32))
    assert sizes == [(2, 8, 32, 32)]
    with pytest.raises(ValueError, match="width"):
        resnet.resnet18(width=0.001)


# ---------------------------------------------------------------------------------------------------------------------
# augment.py: drawing
# ---------------------------------------------------------------------------------------------------------------------

N_DRAWS = 200_000


@pytest.mark.parametrize("argument", range(5))
def test_uniforms_are_uniform_and_independent_along_each_argument(argument):
    keys = [3, 1, 4, 1, 5]
    keys[argument] = np.arange(N_DRAWS)
    u = augment.uniforms(*keys)
    assert u.shape == (N_DRAWS,) and 0 <= u.min() and u.max() < 1
    counts = np.bincount((u * 256).astype(int), minlength=256)
    chi2 = ((counts - N_DRAWS / 256) ** 2).sum() / (N_DRAWS / 256)
    assert 170 < chi2 < 360                                     # 255 degrees of freedom: five sigma either way
    for lag in (1, 2, 7, 64):
        assert abs(np.corrcoef(u[:-lag], u[lag:])[0, 1]) < 5 / math.sqrt(N_DRAWS)
    pairs = np.bincount((u[:-1:2] * 16).astype(int) * 16 + (u[1::2] * 16).astype(int), minlength=256)
    chi2 = ((pairs - N_DRAWS / 512) ** 2).sum() / (N_DRAWS / 512)
    assert 170 < chi2 < 360
    for other in set(range(5)) - {argument}:                    # no two arguments share a stream
        changed = list(keys)
        changed[other] += 1
        assert abs(np.corrcoef(u, augment.uniforms(*changed))[0, 1]) < 5 / math.sqrt(N_DRAWS)
        swapped = list(keys)
        swapped[argument], swapped[other] = swapped[other], swapped[argument]
        assert np.mean(u == augment.uniforms(*swapped)) < 1e-3


def test_uniforms_are_the_hash_they_claim_to_be():
    """Against plain Python integers, of any size."""
    mask = 2 ** 64 - 1

    def one(*keys):
        h = 0
        for key in keys:
            h = ((h ^ key) + 0x9E3779B97F4A7C15) & mask
            h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & mask
            h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & mask
            h ^= h >> 31
        return (h >> 11) / 2 ** 53

    u = augment.uniforms(7, np.arange(3)[:, None], 1_281_166, 1, np.arange(35))
    assert all(u[e, d] == one(7, e, 1_281_166, 1, d) for e in range(3) for d in range(35))


def test_permutation_visits_every_image_once_and_differs_between_epochs():
    orders = [augment.permutation(0, epoch, 1000) for epoch in range(3)] + [augment.permutation(1, 0, 1000)]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert all(np.mean(a == b) < 0.02 for i, a in enumerate(orders) for b in orders[:i])


def reference_crop(rng, height, width):
    """RandomResizedCrop as PyTorch documents it, written with Python's own random numbers."""
    for _ in range(10):
        target = height * width * rng.uniform(0.2, 1)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * (4 / 3)), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("height, width", [(375, 500), (32, 32), (33, 32), (500, 120), (1, 500), (500, 1), (1, 1), (2, 3)])
def test_crops_are_distributed_as_random_resized_crop_draws_them(height, width):
    n = 4000
    crop = augment.draw_crop(augment.Policy(), 0, 0, np.arange(n), np.zeros(n, int), height, width)
    assert np.all((crop.top >= 0) & (crop.left >= 0) & (crop.height > 0) & (crop.width > 0))
    assert np.all((crop.top + crop.height <= height) & (crop.left + crop.width <= width))
    rng = random.Random(0)
    expected = np.array([reference_crop(rng, height, width) for _ in range(n)]).T
    ours = np.stack([crop.top, crop.left, crop.height, crop.width])
    for a, b in [*zip(ours, expected), (ours[2] * ours[3], expected[2] * expected[3]), (ours[3] / ours[2], expected[3] / expected[2])]:
        grid = np.unique(np.concatenate([a, b]))
        gap = np.abs(np.searchsorted(np.sort(a), grid, "right") - np.searchsorted(np.sort(b), grid, "right")).max() / n
        assert gap < 1.95 * math.sqrt(2 / n)                    # Kolmogorov-Smirnov at one in a thousand
    assert abs(crop.flip.mean() - 0.5) < 0.04


def test_crop_falls_back_to_the_centre():
    crop = augment.draw_crop(augment.Policy(), 0, 0, np.arange(50), np.zeros(50, int), 1, 500)
    assert set(zip(crop.top, crop.left, crop.height, crop.width)) == {(0, 249, 1, 1)}
    policy = augment.Policy(area=(1.0, 1.0))                    # nothing of the full area fits 500 x 120: always the fallback
    crop = augment.draw_crop(policy, 0, 0, np.arange(50), np.zeros(50, int), 500, 120)
    assert set(zip(crop.top, crop.left, crop.height, crop.width)) == {(170, 0, 160, 120)}


def test_colour_has_the_papers_probabilities_and_ranges():
    n = 40_000
    c = augment.draw_colour(augment.Policy(), 0, 0, np.arange(n), 0)
    for share, expected in ((c.jitter, 0.8), (c.gray, 0.2), (c.sigma > 0, 0.5)):
        assert abs(share.mean() - expected) < 5 * math.sqrt(expected * (1 - expected) / n)
    for k, (low, high) in enumerate([(0.6, 1.4)] * 3 + [(-0.1, 0.1)]):
        f = (np.sort(c.factor[:, k]) - low) / (high - low)
        assert np.abs(f - np.arange(n) / n).max() < 1.95 / math.sqrt(n)
    sigma = (np.sort(c.sigma[c.sigma > 0]) - 0.1) / 1.9
    assert np.abs(sigma - np.arange(len(sigma)) / len(sigma)).max() < 1.95 / math.sqrt(len(sigma))
    orders = collections.Counter(map(tuple, c.order))
    assert len(orders) == 24 and max(orders.values()) - min(orders.values()) < 10 * math.sqrt(n / 24)
    independent = np.stack([c.jitter, c.gray, c.sigma > 0, *c.factor.T, *(c.order == 3).T[:3]]).astype(float)
    assert np.abs(np.corrcoef(independent) - np.eye(10))[:7].max() < 0.03
    both = augment.draw_colour(augment.Policy(), 0, 0, np.arange(n), 1)
    assert abs(np.corrcoef(c.factor[:, 0], both.factor[:, 0])[0, 1]) < 0.03   # the two views of an image


# ---------------------------------------------------------------------------------------------------------------------
# augment.py: applying, against Pillow and against exact float64
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def photos():
    """A few photographs, (H, W, 3) uint8: real ones where there are any, else drawn shapes under smooth noise."""
    if REAL.is_dir():
        with tarfile.open(REAL / "imagenet-sample.tar") as tar:
            members = [m for m in tar if m.isfile()][:4]
            return [np.array(Image.open(io.BytesIO(tar.extractfile(m).read())).convert("RGB")) for m in members]
    rng = np.random.default_rng(0)
    out = []
    for i, (h, w) in enumerate([(375, 500), (333, 500), (500, 375), (240, 320)]):
        shape = Image.fromarray(augment.draw_shapes(0, i, 1, 64).image(0).numpy()).resize((w, h), Image.Resampling.BICUBIC)
        noise = Image.fromarray(rng.integers(0, 256, (h // 8, w // 8, 3), np.uint8)).resize((w, h), Image.Resampling.BICUBIC)
        out.append(np.array(Image.blend(shape, noise, 0.4)))
    return out


def boxes(height, width, n, policy=augment.Policy()):
    return augment.draw_crop(policy, 5, 0, np.arange(n), np.zeros(n, int), height, width)


def pil_crop_resize(image, crop, n, size):
    """(H, W, 3) array -> (3, S, S) float64 array: what torchvision's RandomResizedCrop and flip do to a Pillow image."""
    t, l, h, w = crop.top[n], crop.left[n], crop.height[n], crop.width[n]
    view = Image.fromarray(image).crop((l, t, l + w, t + h)).resize((size, size), Image.Resampling.BILINEAR)
    view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.flip[n] else view
    return np.array(view).transpose(2, 0, 1).astype(float)


def differs(a, b):
    """(maximum, mean) of the difference."""
    gap = np.abs(np.asarray(a, float) - np.asarray(b, float))
    return gap.max(), gap.mean()


def test_crop_and_resize_agree_with_pillow(photos):
    for image in photos:
        crop = boxes(*image.shape[:2], 6)
        for n in range(6):
            ours = augment.crop_resize(torch.from_numpy(image), crop, n, 224)
            worst, mean = differs(ours, pil_crop_resize(image, crop, n, 224))
            assert ours.dtype == torch.uint8 and worst <= 1 and mean < 0.35


@pytest.mark.parametrize("side, size", [(32, 32), (48, 32), (64, 24), (20, 32)])
def test_batched_crop_and_resize_agree_with_pillow(side, size):
    images = np.random.default_rng(0).integers(0, 256, (40, side, side, 3), np.uint8)
    crop = boxes(side, side, 40)
    ours = augment.crop_resize_batch(torch.from_numpy(images).permute(0, 3, 1, 2), crop, size)
    expected = np.stack([pil_crop_resize(image, crop, n, size) for n, image in enumerate(images)])
    worst, mean = differs(ours, expected)
    assert ours.dtype == torch.uint8 and worst <= 1 and mean < 0.35


def test_centre_view_agrees_with_pillow(photos):
    for image in photos:
        height, width = image.shape[:2]
        scale = 256 / min(height, width)
        shape = [256 if side == min(height, width) else int(side * scale) for side in (width, height)]
        resized = Image.fromarray(image).resize(shape, Image.Resampling.BILINEAR)
        left, top = round((shape[0] - 224) / 2), round((shape[1] - 224) / 2)
        expected = np.array(resized)[top:top + 224, left:left + 224].transpose(2, 0, 1)
        centre = augment.resize_centre(torch.from_numpy(image).permute(2, 0, 1)[None], augment.Policy())
        worst, mean = differs(centre[0], expected)
        assert worst <= 1 and mean < 0.35


def views_of(photos, size=64, n=24):
    """Random crops of the photographs: (n, 3, size, size) uint8."""
    images = [photos[i % len(photos)] for i in range(n)]
    crops = [boxes(*image.shape[:2], n) for image in images]
    return torch.stack([augment.crop_resize(torch.from_numpy(image), crop, i, size) for i, (image, crop) in enumerate(zip(images, crops))])


def colour(n, jitter=False, order=(0, 1, 2, 3), factor=(1, 1, 1, 0), gray=False, sigma=0.0):
    """The same recipe for n views."""
    return augment.Colour(np.full(n, jitter), np.tile(order, (n, 1)), np.tile(np.array(factor, float), (n, 1)),
                          np.full(n, gray), np.full(n, sigma))


PLAIN = augment.Policy(mean=(0, 0, 0), std=(1, 1, 1))


def levels(x, recipe):
    """photometric's result on the scale 0 to 255, float64 (N, 3, S, S)."""
    return augment.photometric(x, recipe, PLAIN).double().numpy() * 255


def as_pil(view):
    return Image.fromarray(view.permute(1, 2, 0).contiguous().numpy())


def from_pil(image):
    return np.array(image.convert("RGB")).transpose(2, 0, 1).astype(float)


@pytest.mark.parametrize("which, enhance", [(0, ImageEnhance.Brightness), (1, ImageEnhance.Contrast), (2, ImageEnhance.Color)])
@pytest.mark.parametrize("factor", [0.6, 0.9, 1.4])
def test_brightness_contrast_saturation_agree_with_pillow(photos, which, enhance, factor):
    x = views_of(photos)
    factors = [1, 1, 1, 0]
    factors[which] = factor
    ours = levels(x, colour(len(x), jitter=True, factor=factors))
    worst, mean = differs(ours, np.stack([from_pil(enhance(as_pil(view)).enhance(factor)) for view in x]))
    assert worst < 1.3 and mean < 0.6                           # Pillow truncates to whole levels, and rounds the mean


def exact_hue(view, shift):
    """(3, S, S) levels -> levels, by way of the standard library's HSV in float64."""
    out = np.empty(view.shape)
    for y in range(view.shape[1]):
        for x in range(view.shape[2]):
            h, s, v = colorsys.rgb_to_hsv(*(view[:, y, x] / 255))
            out[:, y, x] = colorsys.hsv_to_rgb((h + shift) % 1, s, v)
    return out * 255


@pytest.mark.parametrize("shift", [-0.1, 0.03, 0.1, 0.5, -0.4])
def test_hue_is_exact(photos, shift):
    x = views_of(photos, size=24, n=8)
    x[0] = torch.tensor([0, 128, 255], dtype=torch.uint8)[torch.randint(3, (3, 24, 24))]   # greys, primaries, ties
    ours = levels(x, colour(len(x), jitter=True, factor=(1, 1, 1, shift)))
    worst, _ = differs(ours, np.stack([exact_hue(view.double().numpy(), shift) for view in x]))
    assert worst < 1e-3


def test_hue_agrees_with_pillow(photos):
    x = views_of(photos)
    for shift in (-0.1, 0.07):
        expected = []
        for view in x:
            h, s, v = as_pil(view).convert("HSV").split()
            h = Image.fromarray((np.array(h) + np.uint8(int(shift * 255) % 256)).astype(np.uint8))
            expected.append(from_pil(Image.merge("HSV", (h, s, v)).convert("RGB")))
        worst, mean = differs(levels(x, colour(len(x), jitter=True, factor=(1, 1, 1, shift))), np.stack(expected))
        assert worst < 13 and mean < 1.0                        # Pillow's HSV has 8 bits: 12 levels from the exact one


def test_grayscale_agrees_with_pillow(photos):
    x = views_of(photos)
    worst, mean = differs(levels(x, colour(len(x), gray=True)), np.stack([from_pil(as_pil(view).convert("L")) for view in x]))
    assert worst < 0.52 and mean < 0.3


def exact_blur(view, sigma):
    """(3, S, S) float64 -> the same, blurred: a Gaussian of 50 pixels' reach, edges repeated."""
    taps = np.exp(-np.arange(-50, 51) ** 2 / (2 * sigma ** 2))
    taps /= taps.sum()
    for axis in (1, 2):
        padded = np.pad(view, [(50, 50) if a == axis else (0, 0) for a in range(3)], mode="edge")
        view = sum(t * np.take(padded, np.arange(k, k + view.shape[axis]), axis) for k, t in enumerate(taps))
    return view


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_exact_and_agrees_with_pillow(photos, sigma):
    x = views_of(photos, n=8)
    ours = levels(x, colour(len(x), sigma=sigma))
    assert differs(ours, np.stack([exact_blur(view.double().numpy(), sigma) for view in x]))[0] < 0.05
    pillow = np.stack([from_pil(as_pil(view).filter(ImageFilter.GaussianBlur(sigma))) for view in x])
    worst, mean = differs(ours, pillow)
    assert worst < 32 and mean < 0.8                            # Pillow approximates the Gaussian by three boxes


def exact_blend(view, f, which):
    """Brightness, contrast, saturation in float64, as Pillow's documentation states them."""
    luma = np.tensordot([0.299, 0.587, 0.114], view, 1)
    return np.clip(f * view + (1 - f) * [0 * luma, luma.mean() + 0 * luma, luma][which], 0, 255)


def test_the_four_changes_come_in_each_views_own_order(photos):
    x = views_of(photos, size=16, n=24)
    recipe = augment.draw_colour(augment.Policy(), 0, 0, np.arange(24), 0)
    orders = np.array(list(itertools.permutations(range(4))))
    recipe = recipe._replace(jitter=np.arange(24) % 5 > 0, order=orders, factor=recipe.factor * [1.3, 1, 1, 1],
                             gray=np.arange(24) % 7 == 0, sigma=np.where(np.arange(24) % 3 == 0, 1.5, 0))
    expected = []
    for n, view in enumerate(x.double().numpy()):
        for change in orders[n] if recipe.jitter[n] else ():
            f = recipe.factor[n, change]
            view = exact_hue(view, f) if change == 3 else exact_blend(view, f, change)
        view = np.repeat(np.tensordot([0.299, 0.587, 0.114], view, 1)[None], 3, 0) if recipe.gray[n] else view
        expected.append(exact_blur(view, recipe.sigma[n]) if recipe.sigma[n] else view)
    assert differs(levels(x, recipe), np.stack(expected))[0] < 0.02


@slow
def test_compiled_colour_changes_are_the_plain_ones(photos, monkeypatch):
    """Compiled as simsiam.py does it: for any number of views. (0.02 levels: what the sums' order may do to a mean.)"""
    x, recipe = views_of(photos, size=16, n=60), augment.draw_colour(augment.Policy(), 0, 0, np.arange(60), 0)
    plain = levels(x, recipe)
    for name in ("blend", "shift_hue"):
        monkeypatch.setattr(augment, name, torch.compile(getattr(augment, name), dynamic=True))
    for n in (60, 23, 1):
        assert differs(levels(x[:n], augment.Colour(*(a[:n] for a in recipe))), plain[:n])[0] < 0.02


def test_normalisation():
    x = torch.full((1, 3, 4, 4), 128, dtype=torch.uint8)
    out = augment.photometric(x, colour(1), augment.Policy())[0, :, 0, 0]
    assert np.allclose(out, (128 / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225]), atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# augment.py: sources and loading
# ---------------------------------------------------------------------------------------------------------------------

def write_folder(folder, split, count, side, start=0, suffix=".png"):
    """count drawn shapes as image files of up to three sizes, in class folders a, b, c."""
    for i in range(count):
        square = side if isinstance(side, int) else side[i % len(side)]
        path = folder / split / "abc"[i % 3] / f"{i:03}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(augment.draw_shapes(9, start + i, 1, square).image(0).numpy()).save(path)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A labelled folder of 16-pixel images: held in memory."""
    folder = tmp_path_factory.mktemp("data") / "small"
    write_folder(folder, "train", 50, 16)
    return write_folder(folder, "val", 9, 16, start=500)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A labelled folder of images of several sizes: decoded by workers."""
    folder = tmp_path_factory.mktemp("data") / "large"
    write_folder(folder, "train", 20, (70, 80, 91), suffix=".jpg")
    return write_folder(folder, "val", 6, (70, 80), start=500, suffix=".jpg")


def test_image_folder(small, large):
    train, val = augment.open_data(small)
    assert train.classes == ["a", "b", "c"] and len(train) == 50 and len(val) == 9 and train.pixels.shape == (50, 3, 16, 16)
    assert np.bincount(train.labels).tolist() == [17, 17, 16] and val.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert np.array_equal(train.image(0), Image.open(small / "train/a/000.png"))
    train, val = augment.open_data(large)
    assert train.pixels is None and len(train) == 20 and os.fsdecode(train.files[3]) == str(large / "train/a/009.jpg")
    assert np.array_equal(train.image(3), Image.open(large / "train/a/009.jpg"))


def test_folders_without_classes_lists_and_grey_images(tmp_path, small):
    nested = tmp_path / "photos" / "2019" / "deep"
    nested.mkdir(parents=True)
    Image.new("L", (90, 70), 77).save(nested / "grey.png")
    Image.new("RGB", (80, 70), (1, 2, 3)).save(tmp_path / "photos" / "B.JPG")
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    os.symlink(tmp_path / "photos", nested / "loop")
    train, val = augment.open_data(tmp_path / "photos")
    assert sorted(map(os.fsdecode, train.files)) == sorted(map(str, (nested / "grey.png", tmp_path / "photos/B.JPG")))
    assert val is None and train.labels is None
    grey = next(train.image(i) for i in range(2) if b"grey" in train.files[i])
    assert grey.shape == (70, 90, 3) and torch.all(grey == 77)
    listing = tmp_path / "list.txt"
    listing.write_text(f"photos/B.JPG\n{small}/train/a/000.png\n\n")
    train, _ = augment.open_data(listing)
    assert [os.fsdecode(name) for name in train.files] == [str(tmp_path / "photos/B.JPG"), f"{small}/train/a/000.png"]


def write_cifar(folder, pixels, labels, per_batch, names):
    for b, name in enumerate(names):
        part = slice(b * per_batch, (b + 1) * per_batch)
        data = pixels[part].reshape(per_batch, 3072)
        np.concatenate([labels[part, None], data], axis=1).astype(np.uint8).tofile(folder / f"bin/{name}.bin")
        with open(folder / f"py/{name}", "wb") as f:
            pickle.dump({b"data": data, b"labels": labels[part].tolist(), b"batch_label": b"x"}, f, protocol=2)


def test_cifar_in_both_layouts(tmp_path):
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (60, 3, 32, 32), np.uint8), rng.integers(0, 10, 60).astype(np.uint8)
    (tmp_path / "bin").mkdir(), (tmp_path / "py").mkdir()
    write_cifar(tmp_path, pixels, labels, 10, [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"])
    for layout in ("bin", "py"):
        train, val = augment.open_data(tmp_path / layout)
        assert np.array_equal(train.pixels, pixels[:50]) and np.array_equal(val.pixels, pixels[50:])
        assert train.labels.tolist() == labels[:50].tolist() and val.labels.tolist() == labels[50:].tolist()
        assert train.classes[3] == "cat"


class Hostile:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("payload", [Hostile(os.system, ("touch HACKED",)), Hostile(eval, ("open('HACKED', 'w')",)),
                                     Hostile(getattr, ("x", "upper")), np.float64(3), {b"data": 1}, [1, 2], collections.OrderedDict()])
def test_cifar_reader_admits_nothing_else(tmp_path, monkeypatch, payload):
    monkeypatch.chdir(tmp_path)
    for i in range(1, 6):
        (tmp_path / f"data_batch_{i}").write_bytes(pickle.dumps(payload, 2))
    with pytest.raises(augment.Refused, match="data_batch_1: not a batch of CIFAR-10"):
        augment.open_data(tmp_path)
    assert not (tmp_path / "HACKED").exists()


def test_cifar_reader_reads_what_old_and_new_numpy_wrote(tmp_path):
    batch = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 2]}
    new = pickle.dumps(batch, 2)
    assert b"numpy._core.multiarray" in new
    for content in (new, new.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")):
        (tmp_path / "batch").write_bytes(content)
        data, labels = augment.read_cifar_py(tmp_path / "batch")
        assert data.shape == (2, 3072) and labels == [1, 2]


@pytest.mark.parametrize("make, message", [
    (lambda d: d / "missing", "no such file or folder"),
    (lambda d: d, "no images there"),
    (lambda d: (d / "list.txt").write_text("a.png\n") and d / "list.txt", "a.png is no file"),
    (lambda d: (d / "list.txt").write_text("\n") and d / "list.txt", "it is empty"),
    (lambda d: (d / "data_batch_1.bin").write_bytes(b"123") and d, "data_batch_1.bin|data_batch_1: not a batch"),
    (lambda d: [write_folder(d, "train", 6, 16), write_folder(d, "val", 6, 16), os.rename(d / "val/c", d / "val/z")] and d, "z/.*not in one of the 3"),
    (lambda d: [write_folder(d, "train", 6, 16), Image.new("L", (16, 16)).save(d / "train/stray.png")] and d, "stray.png: not in one"),
    (lambda d: [write_folder(d, "train", 30, 16)] + [path.write_bytes(b"") for path in (d / "train/a").iterdir()] +
     [path.write_bytes(b"") for path in (d / "train/b").glob("0[01]*")] and d, "[0-9]+ of 30 images can't be read|20 files in a row")])
def test_data_that_cannot_be_used_is_refused_in_one_line(tmp_path, make, message):
    path = make(tmp_path)
    with pytest.raises(augment.Refused, match=message) as refusal:
        augment.open_data(path)
    assert "\n" not in str(refusal.value)


@real
@slow
def test_cifar_as_folder_bin_and_py_hold_the_same_images(tmp_path):
    subprocess.run([sys.executable, REAL / "unpack", tmp_path], check=True)

    def everything(name):
        return [sorted(zip((hashlib.sha1(p.numpy().tobytes()).hexdigest() for p in source.pixels), source.labels.tolist()))
                for source in augment.open_data(tmp_path / name)]

    folder, binary, pickled = map(everything, ("cifar10", "cifar-10-batches-bin", "cifar-10-batches-py"))
    assert [len(part) for part in folder] == [50_000, 10_000] and folder == binary == pickled


def test_shapes_are_the_same_pixels_for_the_same_seed():
    a, b = augment.draw_shapes(3, 0, 30), augment.draw_shapes(3, 10, 20)
    assert torch.equal(a.pixels[10:], b.pixels) and a.labels.tolist() == list(range(10)) * 3
    assert not torch.equal(a.pixels, augment.draw_shapes(4, 0, 30).pixels)
    if PIL.__version__ == "13.0.0":
        assert hashlib.sha256(a.pixels.numpy().tobytes()).hexdigest()[:16] == SHAPES_DIGEST


SHAPES_DIGEST = "21a9da823616e33f"


def test_shapes_cannot_be_told_apart_by_colour_statistics():
    """Nearest neighbours by channel means, standard deviations and quartiles: near chance, which is 10%."""
    train, val = augment.draw_shapes(0, 0, 2000), augment.draw_shapes(0, 2000, 1000)

    def statistics(source):
        x = source.pixels.flatten(2).double().numpy()
        s = np.concatenate([x.mean(2), x.std(2), *np.quantile(x, (0.25, 0.5, 0.75), axis=2)], axis=1)
        return (s - s.mean(0)) / s.std(0)

    distance = ((statistics(val)[:, None] - statistics(train)[None]) ** 2).sum(-1)
    nearest = np.argsort(distance, axis=1)[:, :20]
    guessed = [np.bincount(row, minlength=10).argmax() for row in train.labels[nearest]]
    assert np.mean(guessed == val.labels) < 0.25


def loaded(source, policy, batches, workers=0, seed=1):
    return [views for _, views in augment.load_views(source, policy, seed, batches, CPU, workers)]


@pytest.mark.parametrize("kind", ["small", "large"])
def test_a_view_is_the_same_whatever_the_workers_processes_and_interruptions(kind, request):
    source, _ = augment.open_data(request.getfixturevalue(kind))
    policy = augment.Policy(size=16)
    whole = loaded(source, policy, augment.steps(1, len(source), 8, 2))
    assert len(whole) == 2 * (len(source) // 8)
    for workers in (1, 2) if kind == "large" else ():
        again = loaded(source, policy, augment.steps(1, len(source), 8, 2), workers)
        assert all(torch.equal(a[v], b[v]) for a, b in zip(whole, again) for v in (0, 1))
    halves = [loaded(source, policy, augment.steps(1, len(source), 8, 2, rank=r, world=2)) for r in (0, 1)]
    assert all(torch.equal(a[v], torch.cat([b[v], c[v]])) for a, b, c in zip(whole, *halves) for v in (0, 1))
    rest = loaded(source, policy, augment.steps(1, len(source), 8, 2, start_epoch=1, start_step=1))
    assert len(rest) == len(source) // 8 - 1 and all(torch.equal(a[0], b[0]) for a, b in zip(whole[-len(rest):], rest))
    x1, x2 = whole[0]
    assert x1.shape == (8, 3, 16, 16) and (x1 - x2).abs().amax(dim=(1, 2, 3)).min() > 0.01       # two views, not one twice
    assert not torch.equal(whole[0][0], loaded(source, policy, augment.steps(2, len(source), 8, 1), seed=2)[0][0])


def test_crop_in_memory_equals_crop_in_a_worker():
    source = augment.draw_shapes(0, 0, 12, 40)
    index, policy = np.arange(12), augment.Policy(size=32)
    (_, _, batched), = augment.cut_views_in_memory(source.pixels, policy, 0, [(5, index)], 2)
    single = [torch.stack(views) for views in zip(*(augment.cut_views(policy, 0, 2, source.image(i), 5, i) for i in index))]
    assert all((a.int() - b.int()).abs().max() <= 1 for a, b in zip(batched, single, strict=True))


def test_file_list_is_one_buffer(large):
    files = augment.open_data(large)[0].files
    assert isinstance(files, np.ndarray) and files.dtype.kind == "S" and files.nbytes == 20 * len(bytes(files[0]))
    assert os.fsdecode(files[3]) == str(large / "train/a/009.jpg")


def test_the_benchmarks_pillow_views_are_ours(tmp_path, photos):
    """The whole recipe, all of it drawn: as far apart as Pillow's hue and blur are from exact ones."""
    for k, photo in enumerate(photos):
        Image.fromarray(photo).save(tmp_path / f"{k}.png")
    source, index = augment.open_data(tmp_path)[0], np.arange(len(photos))
    policy = augment.Policy(size=96, mean=(0, 0, 0), std=(1 / 255,) * 3)
    for epoch in range(8):
        (_, ours), = augment.load_views(source, policy, 3, [(epoch, index)], CPU, 0)
        pillows = augment.views_by_pillow(source, policy, 3, epoch, index)
        for x, y in zip(ours, pillows, strict=True):
            off = (x - y).abs().mean(dim=(1, 2, 3))
            assert off.max() < 4 and x.std() > 20
    swapped = (ours[0] - pillows[1]).abs().mean(dim=(1, 2, 3))
    assert swapped.median() > 10


def test_the_benchmark_measures_every_part(large, capsys):
    threads = torch.get_num_threads()      # which it leaves as they were
    parts = ["decode and cut", "colour", "all", "all, by Pillow"]
    for source, policy, names in ((augment.open_data(large)[0], augment.Policy(size=24), ["decode", *parts, "DataLoader, 1 and 2 workers"]),
                                  (augment.draw_shapes(0, 0, 16), augment.Policy(size=32, blur=0), parts)):
        found = augment.bench(source, policy, CPU, repeats=3)  # the first time makes the tables of crops
        assert list(found) == names and all(0 < rate < 1e7 for both in found.values() for rate in both)
        assert all(found["all"][0] < 1.5 * found[part][0] for part in ("decode and cut", "colour"))
        assert [line[:40].strip() for line in capsys.readouterr().out.splitlines()[1:]] == names
    assert torch.get_num_threads() == threads


def test_contact_sheet_from_the_command_line(tmp_path, large):
    out = subprocess.run([sys.executable, HERE / "augment.py", large, "--out", tmp_path / "views.png"],
                         capture_output=True, text=True)
    assert out.returncode == 0 and "20 images" in out.stdout, out.stderr
    assert Image.open(tmp_path / "views.png").width > 5 * 224
    out = subprocess.run([sys.executable, HERE / "augment.py", "nowhere"], capture_output=True, text=True)
    assert out.returncode == 1 and out.stderr.count("\n") == 1 and "nowhere" in out.stderr


# ---------------------------------------------------------------------------------------------------------------------
# simsiam.py: the method
# ---------------------------------------------------------------------------------------------------------------------

def vectors(n=6, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(4)]


def numpy_D(p, z):
    p, z = p.detach().numpy(), z.detach().numpy()
    return np.mean([-np.dot(a, b) / math.sqrt(np.dot(a, a)) / math.sqrt(np.dot(b, b)) for a, b in zip(p, z)])


def test_eq01_D_is_the_negative_cosine():
    p, z, *_ = vectors()
    assert simsiam.D(p, z).item() == pytest.approx(numpy_D(p, z), abs=1e-14)
    unit = [v.detach().numpy() / np.linalg.norm(v.detach().numpy(), axis=1, keepdims=True) for v in (p, z)]
    mse = np.mean(np.sum((unit[0] - unit[1]) ** 2, axis=1))         # twice Eq. (1), and 2
    assert simsiam.D(p, z).item() == pytest.approx(mse / 2 - 1, abs=1e-14)
    assert simsiam.D(p, 3 * p).item() == pytest.approx(-1) and simsiam.D(p, -p).item() == pytest.approx(1)
    simsiam.D(p, z).backward()
    assert z.grad.abs().max() > 0                                    # D does not detach
    for x, y in ((p, z), (z, p)):                                    # d/dx of -x.y/|x||y|, by hand
        xh, yh = (v.detach() / v.detach().norm(dim=1, keepdim=True) for v in (x, y))
        by_hand = -(yh - (xh * yh).sum(1, keepdim=True) * xh) / x.detach().norm(dim=1, keepdim=True) / len(x)
        assert torch.allclose(x.grad, by_hand, atol=1e-14)


def test_eq03_stopgrad_is_the_identity_without_gradient():
    z, *_ = vectors()
    assert torch.equal(simsiam.stopgrad(z), z) and not simsiam.stopgrad(z).requires_grad


def test_eq04_loss_and_its_gradients():
    p1, p2, z1, z2 = vectors()
    expected = numpy_D(p1, z2) / 2 + numpy_D(p2, z1) / 2
    assert simsiam.loss(p1, p2, z1, z2).item() == pytest.approx(expected, abs=1e-14)
    assert simsiam.loss_without_stopgrad(p1, p2, z1, z2).item() == pytest.approx(expected, abs=1e-14)
    stopped = torch.autograd.grad(simsiam.loss(p1, p2, z1, z2), (p1, p2, z1, z2), allow_unused=True)
    whole = torch.autograd.grad(simsiam.loss_without_stopgrad(p1, p2, z1, z2), (p1, p2, z1, z2))
    assert stopped[2] is None and stopped[3] is None
    assert torch.equal(stopped[0], whole[0]) and torch.equal(stopped[1], whole[1])
    assert whole[2].abs().max() > 0 and whole[3].abs().max() > 0
    f = torch.nn.Linear(5, 5).double()                               # z1 is constant as a target, not as p1's origin
    z = f(p1.detach())
    assert torch.autograd.grad(simsiam.loss(2 * z + z.roll(1, 1), p2, z, z2), f.weight)[0].abs().max() > 0


def test_loss_is_taken_in_float32_from_bfloat16():
    p, z = (v.detach().to(torch.bfloat16) for v in vectors(64, 512)[:2])
    assert simsiam.D(p, z).dtype == torch.float32
    assert simsiam.D(p, z).item() == pytest.approx(numpy_D(p.double(), z.double()), abs=1e-6)


def step_of(dtype=torch.float32, autocast=False, compiled=False, steps=1):
    """A tiny model's loss in the last of some steps, and its gradients (float64, flat), with the same weights and views whatever the precision."""
    torch.manual_seed(0)
    model, views = tiny_model(width=1 / 4, dim=64, pred_dim=16).to(dtype), torch.randn(2, 32, 3, 16, 16).to(dtype)
    if compiled:
        model.compile()
    optimizer = simsiam.sgd(model, 0.9, 1e-4)
    for _ in range(steps):
        simsiam.set_lr(optimizer, 0.01, 0, 2, 0, "constant")
        L, _ = simsiam.train_step(model, simsiam.loss, optimizer, torch.autocast("cpu", torch.bfloat16, enabled=autocast), views)
    return L.item(), torch.cat([w.grad.double().flatten() for w in model.parameters()])


def test_bfloat16_autocast_gives_the_float64_step_up_to_its_digits():
    (L, g), (exact, gradient) = step_of(autocast=True), step_of(torch.float64)
    assert L == pytest.approx(exact, abs=5e-3) and L != exact
    assert F.cosine_similarity(g, gradient, dim=0) > 0.98 and g.norm() == pytest.approx(gradient.norm().item(), rel=0.1)


@slow
def test_a_compiled_step_is_the_float64_step():
    (L, g), (exact, gradient) = step_of(compiled=True, steps=2), step_of(torch.float64, steps=2)
    assert L == pytest.approx(exact, abs=1e-5) and torch.allclose(g, gradient, rtol=1e-3, atol=1e-4 * gradient.norm().item())


def test_sec41_std_of_the_normalised_output():
    z, *_ = vectors(50, 8)
    v = z.detach().numpy() / np.linalg.norm(z.detach().numpy(), axis=1, keepdims=True)
    assert simsiam.std(z).item() == pytest.approx(v.std(axis=0).mean(), abs=1e-12)
    torch.manual_seed(0)
    assert simsiam.std(torch.randn(4000, 256)).item() * 16 == pytest.approx(1, abs=0.01)             # Gaussian: 1/sqrt(d)
    assert simsiam.std(torch.ones(100, 256)).item() < 1e-4                                            # one point: 0


@pytest.mark.parametrize("n", [32, 128, 512])
def test_collapse_behind_an_output_bn_is_recognised(n):
    """n - 1 outputs at u, one at -u: the closest to a point that batches of mean 0 can come. Std and loss in closed form."""
    u = torch.randn(1, 64, dtype=torch.float64)
    z = torch.cat([u.expand(n - 1, -1), -u])
    scaled = simsiam.std(z).item() * 8
    assert scaled == pytest.approx(2 * math.sqrt(n - 1) / n * np.abs(u.numpy()).mean() / np.linalg.norm(u) * 8, rel=1e-6)
    reached = simsiam.D(z, z.roll(1, 0)).item()                      # views that disagree on which image is the odd one
    assert reached == pytest.approx(-1 + 4 / n)
    assert simsiam.collapsed(min(reached, -0.96), scaled, n)
    assert not simsiam.collapsed(-0.93, 0.95, n) and not simsiam.collapsed(-0.99, 0.95, n) and not simsiam.collapsed(-0.1, 0.05, n)


def test_sec3_lr_rule_is_linear():
    assert simsiam.initial_lr(0.05, 512) == 0.1 and simsiam.initial_lr(0.05, 256) == 0.05 and simsiam.initial_lr(0.03, 64) == 0.0075


def test_sec3_schedule_is_a_warm_up_and_half_a_cosine():
    assert [simsiam.cosine(t, 8, 0) for t in (0, 2, 4, 6, 8)] == pytest.approx([1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0])
    assert [simsiam.warmup(t, 4) for t in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1] and simsiam.warmup(0, 0) == 1
    assert [simsiam.cosine(t, 12, 4) for t in (0, 3, 4, 8, 12)] == pytest.approx([1, 1, 1, 0.5, 0])
    model = tiny_model()
    optimizer = simsiam.sgd(model, 0.9, 1e-4)
    for pred_lr, expected in (("constant", 2.0), ("cosine", 1.0)):
        simsiam.set_lr(optimizer, 2.0, 8, 12, 4, pred_lr)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1.0, expected])
    simsiam.set_lr(optimizer, 2.0, 1, 12, 4, "constant")
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0]      # the constant one warms up too
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()} and len(grouped) == len(list(model.parameters()))
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == {id(p) for p in model.predictor.parameters()}
    assert all(group["weight_decay"] == 1e-4 and group["momentum"] == 0.9 for group in optimizer.param_groups)


def test_knn_agrees_with_a_loop():
    rng = np.random.default_rng(0)
    bank, queries = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (rng.normal(size=(300, 8)), rng.normal(size=(70, 8))))
    labels = rng.integers(0, 5, 300)
    expected = []
    for q in queries:
        votes = np.zeros(5)
        for i in np.argsort(-bank @ q)[:20]:
            votes[labels[i]] += math.exp(bank[i] @ q / 0.1)
        expected.append(np.where(votes > 0, votes, -np.inf))         # no votes: never among the five best
    got = simsiam.knn(torch.tensor(bank).float(), torch.tensor(labels), torch.tensor(queries).float(), 20, 0.1)
    assert got.shape == (70, 5) and np.allclose(got, expected, rtol=1e-4)


def tiny_model(**options):
    return simsiam.SimSiam(**{**dict(arch="resnet18", dim=16, pred_dim=4, proj_layers=2, proj_hidden=16, width=1 / 16,
                                     cifar_stem=True), **options})


# The heads of the released checkpoint (ResNet-50), without encoder.fc.6.bias, which BN makes void.
RELEASED_HEADS = {
    "encoder.fc.0.weight": (2048, 2048), "encoder.fc.1.weight": (2048,), "encoder.fc.1.bias": (2048,),
    "encoder.fc.1.running_mean": (2048,), "encoder.fc.1.running_var": (2048,), "encoder.fc.1.num_batches_tracked": (),
    "encoder.fc.3.weight": (2048, 2048), "encoder.fc.4.weight": (2048,), "encoder.fc.4.bias": (2048,),
    "encoder.fc.4.running_mean": (2048,), "encoder.fc.4.running_var": (2048,), "encoder.fc.4.num_batches_tracked": (),
    "encoder.fc.6.weight": (2048, 2048),
    "encoder.fc.7.running_mean": (2048,), "encoder.fc.7.running_var": (2048,), "encoder.fc.7.num_batches_tracked": (),
    "predictor.0.weight": (512, 2048), "predictor.1.weight": (512,), "predictor.1.bias": (512,),
    "predictor.1.running_mean": (512,), "predictor.1.running_var": (512,), "predictor.1.num_batches_tracked": (),
    "predictor.3.weight": (2048, 512), "predictor.3.bias": (2048,)}


def test_model_has_the_released_models_names_and_shapes():
    with torch.device("meta"):
        state = {name: tuple(t.shape) for name, t in simsiam.SimSiam().state_dict().items()}
    backbone = {f"encoder.{name}": shape for name, shape in torchvision_names(3, (3, 4, 6, 3), 4).items() if not name.startswith("fc.")}
    assert list(state.items()) == [*backbone.items(), *RELEASED_HEADS.items()]


def released(state, x, blocks):
    """ResNet with bottlenecks and a three-layer projector, then h, from a state_dict: plain functions of torch, no module."""
    def bn(x, name):
        return F.batch_norm(x, None, None, state.get(name + ".weight"), state.get(name + ".bias"), training=True)

    x = F.max_pool2d(F.relu(bn(F.conv2d(x, state["encoder.conv1.weight"], stride=2, padding=3), "encoder.bn1")), 3, 2, 1)
    for stage, count in enumerate(blocks):
        for block in range(count):
            at = f"encoder.layer{stage + 1}.{block}."
            stride = 2 if stage > 0 and block == 0 else 1
            y = F.relu(bn(F.conv2d(x, state[at + "conv1.weight"]), at + "bn1"))
            y = F.relu(bn(F.conv2d(y, state[at + "conv2.weight"], stride=stride, padding=1), at + "bn2"))
            y = bn(F.conv2d(y, state[at + "conv3.weight"]), at + "bn3")
            if block == 0:
                x = bn(F.conv2d(x, state[at + "downsample.0.weight"], stride=stride), at + "downsample.1")
            x = F.relu(x + y)
    z = x.mean(dim=(2, 3))
    z = F.relu(bn(z @ state["encoder.fc.0.weight"].T, "encoder.fc.1"))
    z = F.relu(bn(z @ state["encoder.fc.3.weight"].T, "encoder.fc.4"))
    z = bn(z @ state["encoder.fc.6.weight"].T, "encoder.fc.7")
    p = F.relu(bn(z @ state["predictor.0.weight"].T, "predictor.1"))
    return p @ state["predictor.3.weight"].T + state["predictor.3.bias"], z


def test_alg1_parity_with_the_released_model():
    """Loss, all gradients, and three steps of SGD written out, in float64."""
    torch.manual_seed(0)
    model = tiny_model(arch="resnet50", proj_layers=3, cifar_stem=False).double()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)  # away from zero scales and offsets, which would hide errors
    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in state.items()}
    optimizer = simsiam.sgd(model, 0.9, 0.01)
    for step in range(3):
        x1, x2 = torch.randn(2, 6, 3, 40, 40, dtype=torch.float64)
        simsiam.set_lr(optimizer, 0.1, step, 4, 0, "cosine")
        with torch.random.fork_rng():
            L, (z1, z2) = simsiam.train_step(model, simsiam.loss, optimizer, torch.autocast("cpu", enabled=False), [x1, x2])
        (p1, y1), (p2, y2) = released(state, x1, (3, 4, 6, 3)), released(state, x2, (3, 4, 6, 3))
        cosine = torch.nn.CosineSimilarity(dim=1)
        expected = -(cosine(p1, y2.detach()).mean() + cosine(p2, y1.detach()).mean()) * 0.5
        assert L.item() == pytest.approx(expected.item(), abs=1e-10) and torch.allclose(z1, y1, atol=1e-8)
        gradients = dict(zip(state, torch.autograd.grad(expected, state.values())))
        lr = 0.1 * (1 + math.cos(math.pi * step / 4)) / 2
        for name, p in model.named_parameters():
            assert torch.allclose(p.grad, gradients[name], rtol=1e-6, atol=1e-9), name
            with torch.no_grad():
                velocity[name] = 0.9 * velocity[name] + gradients[name] + 0.01 * state[name]
                state[name] -= lr * velocity[name]
            assert torch.allclose(p, state[name], rtol=1e-6, atol=1e-9), name


def test_views_pass_through_f_separately():
    torch.manual_seed(0)
    model = tiny_model()
    x1, x2 = torch.randn(8, 3, 16, 16), 3 + torch.randn(8, 3, 16, 16)
    p1, p2, z1, z2 = model(x1, x2)
    for z in (z1, z2):                                                # each has its own batch statistics
        assert z.mean(dim=0).abs().max() < 1e-5
    alone = model.encoder(x1)
    assert torch.allclose(alone, z1, atol=1e-6) and z1.requires_grad and p1.shape == z1.shape == (8, 16)


PAPER = {  # the paper's settings, typed from its Sec. 3, supplements A and D, and Table 1 (c)
    "imagenet": dict(arch="resnet50", dim=2048, pred_dim=512, proj_layers=3, proj_hidden=2048, epochs=100, batch=512, base_lr=0.05,
                     momentum=0.9, weight_decay=0.0001, warmup=0, pred_lr="constant", size=224, area=(0.2, 1.0), jitter=0.8,
                     strength=(0.4, 0.4, 0.4, 0.1), gray=0.2, blur=0.5, sigma=(0.1, 2.0), flip=0.5, cifar_stem=False,
                     mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), aspect=(0.75, 1 / 0.75), width=1.0, centre=0.875),
    "cifar10": dict(arch="resnet18", dim=2048, proj_layers=2, epochs=800, batch=512, base_lr=0.03, momentum=0.9, weight_decay=0.0005,
                    size=32, blur=0.0, cifar_stem=True, jitter=0.8, strength=(0.4, 0.4, 0.4, 0.1), gray=0.2, flip=0.5, area=(0.2, 1.0),
                    pred_lr="constant", warmup=0, width=1.0, centre=1.0)}


def test_recipes_hold_the_papers_settings():
    for recipe, expected in PAPER.items():
        column = {name: values[simsiam.RECIPES.index(recipe)] for name, values in simsiam.SETTINGS.items()}
        assert {name: column[name] for name in expected} == expected
    imagenet = {name: values[0] for name, values in simsiam.SETTINGS.items()}
    assert augment.Policy() == augment.Policy(**{name: imagenet[name] for name in augment.Policy._fields})


# ---------------------------------------------------------------------------------------------------------------------
# simsiam.py: one process against two
# ---------------------------------------------------------------------------------------------------------------------

WORLD = """
import sys
sys.path.insert(0, {here!r})
import torch, augment, simsiam
variant, out = sys.argv[1:]
device, rank, world = simsiam.join_world(torch.device("cpu"))
torch.manual_seed(0)
model = simsiam.SimSiam("resnet18", dim=16, pred_dim=4, proj_layers=2, proj_hidden=16, width=1 / 16, cifar_stem=True).double()
network = torch.nn.parallel.DistributedDataParallel(model) if variant == "local-bn" else simsiam.distribute(model, device)
optimizer = simsiam.sgd(model, 0.9, 1e-4)
source, policy = augment.draw_shapes(0, 0, 48, 16), augment.Policy(size=16)
lr = simsiam.initial_lr(2.0, 16 // world if variant == "local-lr" else 16)
batches = augment.steps(0, 48, 16, 2, rank=0 if variant == "wrong-sampler" else rank, world=world)
losses = []
for step, (_, (x1, x2)) in enumerate(augment.load_views(source, policy, 0, batches, device, 0)):
    simsiam.set_lr(optimizer, lr, step, 8, 0, "constant")
    L, (z1, z2) = simsiam.train_step(network, simsiam.loss, optimizer, torch.autocast("cpu", enabled=False), [x1.double(), x2.double()])
    losses += [simsiam.all_sum(L).item() / world, simsiam.std(z1, simsiam.all_sum).item()]
if rank == 0:
    torch.save((model.state_dict(), losses), out)
del network  # it holds the group too, whose threads, were they still there at the end, could abort the process
torch.distributed.destroy_process_group()
simsiam.leave(None)  # as the programs end, without waiting for any thread
"""


def torchrun(*command, **options):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, command)],
                          capture_output=True, text=True, timeout=300, **options)


def test_two_processes_equal_one_in_float64(tmp_path):
    """Weights, running statistics, loss and std after six steps; and each way to get it wrong is caught."""
    script = tmp_path / "world.py"
    script.write_text(WORLD.format(here=str(HERE)))
    alone = subprocess.run([sys.executable, script, "right", tmp_path / "one"], capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    one, losses = torch.load(tmp_path / "one")

    def gap(variant):
        out = torchrun(script, variant, tmp_path / variant)
        assert out.returncode == 0 and "Warning" not in out.stderr, out.stderr
        two, losses_two = torch.load(tmp_path / variant)
        assert two.keys() == one.keys()
        return max([(one[k].double() - two[k].double()).abs().max().item() for k in one] + list(np.abs(np.subtract(losses, losses_two))))

    bound = 1e-9
    assert gap("right") < bound
    for variant in ("local-bn", "local-lr", "wrong-sampler"):
        assert gap(variant) > 10 * bound, variant


# ---------------------------------------------------------------------------------------------------------------------
# simsiam.py: the program
# ---------------------------------------------------------------------------------------------------------------------

TINY = shlex.split("--arch resnet18 --cifar-stem --width 1/16 --dim 16 --pred-dim 4 --proj-hidden 16 --batch 16 --epochs 3 "
                   "--base-lr 0.5 --knn-every 1 --size 16 --workers 1")


def program(*arguments, **options):
    return subprocess.run([sys.executable, HERE / "simsiam.py", *map(str, arguments)], capture_output=True, text=True, timeout=300, **options)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights_of(folder):
    checkpoint = torch.load(folder / "checkpoint.pth", weights_only=True)
    return checkpoint["model"] | {f"momentum {k}": v["momentum_buffer"] for k, v in checkpoint["optimizer"]["state"].items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small):
    """An uninterrupted run on the small folder, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = program(small, *TINY, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_run_folder_holds_what_the_readme_promises(finished, small):
    out, printed = finished
    assert sorted(p.name for p in out.iterdir()) == ["backbone.pth", "checkpoint-previous.pth", "checkpoint.pth", "curves.png", "log.jsonl", "views.png"]
    start, *epochs, end = log_of(out)
    assert start["event"] == "start" and start["settings"]["recipe"] == "cifar10" and 0 <= start["knn_pixels"] <= 100
    assert {"command", "torch", "numpy", "pillow", "settings", "device"} <= start.keys() and start["seed"] == 0
    assert [r["epoch"] for r in epochs] == [0, 1, 2, 3] and [r["step"] for r in epochs] == [0, 3, 6, 9] and end["event"] == "end"
    for key in ("loss", "std", "lr", "images_per_s", "data_wait", "seconds"):
        assert epochs[0][key] is None and all(isinstance(r[key], float) for r in epochs[1:]), key
    assert all(0 <= r["knn"] <= 100 for r in epochs) and all(-1 <= r["loss"] <= 1 and 0 <= r["data_wait"] <= 1 for r in epochs[1:])
    backbone = torch.load(out / "backbone.pth", weights_only=True)
    network = resnet.resnet18(width=1 / 16, cifar_stem=True)
    network.fc = torch.nn.Sequential()
    network.load_state_dict(backbone)                                # strict, torchvision's names
    assert equal({f"encoder.{k}": v for k, v in backbone.items()}, {k: v for k, v in weights_of(out).items() if f"{k[8:]}" in backbone})
    assert "50 images" in printed and "k 50 (all there are)" in printed and "minimum -1" in printed and printed.count("kNN ") >= 4
    assert Image.open(out / "curves.png").size == (1260, 300) and Image.open(out / "views.png").height > 8 * 16


def test_the_monitored_knn_is_the_knn_of_the_saved_backbone(finished, small):
    out, _ = finished
    network = resnet.resnet18(width=1 / 16, cifar_stem=True)
    network.fc = torch.nn.Sequential()
    network.load_state_dict(torch.load(out / "backbone.pth", weights_only=True))
    mean, std = (np.array(simsiam.SETTINGS[name][1]).reshape(3, 1, 1) for name in ("mean", "std"))
    features = []
    for source in augment.open_data(small):
        with torch.no_grad():
            v = network.eval()(torch.tensor((source.pixels.numpy() / 255 - mean) / std).float()).numpy()
        features.append(v / np.linalg.norm(v, axis=1, keepdims=True))
    train, val = augment.open_data(small)
    votes = np.exp(features[1] @ features[0].T / 0.1) @ np.eye(3)[train.labels]
    assert log_of(out)[-2]["knn"] == pytest.approx(100 * np.mean(votes.argmax(1) == val.labels))


def test_two_processes_run_the_same_command(tmp_path, finished, small):
    out = torchrun(HERE / "simsiam.py", small, *TINY, "--out", tmp_path / "two")
    assert out.returncode == 0, out.stderr
    one, two = log_of(finished[0]), log_of(tmp_path / "two")
    assert two[0]["settings"]["world"] == 2 and len(one) == len(two) and out.stdout.count("epoch 1/3  loss") == 1
    for a, b in zip(one[1:-1], two[1:-1]):
        assert b["loss"] == (pytest.approx(a["loss"], abs=1e-3) if a["loss"] is not None else None)
        assert b["std"] == (pytest.approx(a["std"], abs=1e-3) if a["std"] is not None else None)
    assert two[1]["knn"] == one[1]["knn"] and two[0]["knn_pixels"] == one[0]["knn_pixels"]


def kill_all(folder):
    """kill -9 every process that names the run folder: those that torchrun starts are in sessions of their own."""
    for pid in processes_of(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def processes_of(*words):
    """The processes that have all of these words in their command line."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            line = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
            found += [int(pid)] if int(pid) != os.getpid() and all(str(word).encode() in line for word in words) else []
    return found


def kill_when(command, folder, epoch):
    """Start a run, wait until its log shows `epoch`, and kill -9 everything when a checkpoint within the next epoch is there."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def position():
        for name in ("checkpoint.pth", "checkpoint-previous.pth"):     # for an instant, only the older one is there
            with contextlib.suppress(FileNotFoundError):
                return torch.load(folder / name, weights_only=True)
        return {"epoch": -1, "step": 0}

    try:
        deadline = time.monotonic() + 120
        while position()["epoch"] < epoch or position()["step"] > 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)                                         # busy waiting would take a core from the run
    finally:
        kill_all(folder)
        process.wait()
    return position()


@pytest.mark.parametrize("kind", ["small", "large"])
def test_killed_and_resumed_run_ends_with_the_uninterrupted_weights(tmp_path, request, kind):
    data = request.getfixturevalue(kind)
    options = [data, *TINY, "--recipe", "cifar10", "--knn-every", "30", "--save-minutes", "0",
               *(["--batch", "6", "--epochs", "6"] if kind == "small" else ["--batch", "2", "--epochs", "5"])]

    def command(folder, *more):
        return [str(a) for a in (sys.executable, HERE / "simsiam.py", *options, "--out", tmp_path / folder, *more)]

    subprocess.run(command("whole"), check=True, capture_output=True)
    position = kill_when(command("killed"), tmp_path / "killed", epoch=2)
    steps = {"small": 8, "large": 10}[kind]
    assert 0 < position["step"] < steps and position["epoch"] < 5, "the kill came at a moment that shows nothing"
    again = subprocess.run(command("killed", "--resume"), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert equal(weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed"))
    whole, killed = log_of(tmp_path / "whole"), log_of(tmp_path / "killed")
    assert [r["event"] for r in killed].count("resume") == 1
    key = [[(r["epoch"], r["step"], r["loss"], r["std"], r["lr"], r["knn"]) for r in log if r["event"] == "epoch"] for log in (whole, killed)]
    assert key[0] == key[1]


# ---------------------------------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------------------------------

LONGER = [*TINY, "--recipe", "cifar10", "--knn-every", "0", "--batch", "6", "--epochs", "6"]   # 8 steps an epoch of the small folder


@pytest.fixture(scope="module")
def longer(tmp_path_factory, small):
    """The weights that an uninterrupted run of LONGER ends with, in one process and in two; and the losses in two."""
    out = tmp_path_factory.mktemp("longer")
    assert here("simsiam.py", small, *LONGER, "--out", out / "one") is None
    two = torchrun(HERE / "simsiam.py", small, *LONGER, "--out", out / "two")
    assert two.returncode == 0, two.stderr
    return {1: weights_of(out / "one"), 2: weights_of(out / "two"), "losses": losses_of(out / "two")}


def losses_of(folder):
    return {r["epoch"]: r["loss"] for r in log_of(folder) if r["event"] == "epoch"}


def wait_for_epoch(process, folder, epoch=2):
    deadline = time.monotonic() + 120
    while not (folder / "log.jsonl").exists() or f'"epoch": {epoch},' not in (folder / "log.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def start(*command, **options):
    """A process that does not outlive the block."""
    process = subprocess.Popen([str(part) for part in (sys.executable, *command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def stopped_at(said, folder):
    """The position that a run says it has stopped at, which is its checkpoint's."""
    place = re.search(r"stopped by a signal after epoch (\d+), step (\d+); the same command with --resume goes on\n", said)
    checkpoint = torch.load(folder / "checkpoint.pth", weights_only=True)
    assert place and [int(n) for n in place.groups()] == [checkpoint["epoch"], checkpoint["step"]], said
    return checkpoint["epoch"], checkpoint["step"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_a_run_after_its_step_with_everything_saved(tmp_path, small, longer, number):
    out = tmp_path / "run"
    with start(HERE / "simsiam.py", small, *LONGER, "--out", out) as process:
        wait_for_epoch(process, out)
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + number and said.count("\n") == 1
    assert (0, 0) < stopped_at(said, out) < (6, 0)
    assert here("simsiam.py", small, *LONGER, "--out", out, "--resume") is None
    assert equal(weights_of(out), longer[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_job_leaves_the_workers_to_the_last_steps(tmp_path, large, number):
    """As a scheduler sends SIGTERM, and a terminal SIGINT: to the loader's workers too."""
    out = tmp_path / "run"
    with start(HERE / "simsiam.py", large, *LONGER, "--epochs", "500", "--workers", "2", "--out", out, start_new_session=True) as process:
        wait_for_epoch(process, out)
        os.killpg(process.pid, number)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + number and said.count("\n") == 1 and (0, 0) < stopped_at(said, out) < (500, 0)


def test_a_second_ctrl_c_leaves_at_once(tmp_path, small, longer):
    """The tenth step hangs."""
    code = ("import itertools, sys, time; sys.path.insert(0, sys.argv.pop(1)); import simsiam\nstep, count = simsiam.train_step, itertools.count()\n"
            "simsiam.train_step = lambda *a: next(count) == 9 and (print('hangs', flush=True), time.sleep(100)) or step(*a)\n"
            "simsiam.leave(simsiam.launch('simsiam.py', simsiam.pretrain, simsiam.parse()))")
    with start("-c", code, HERE, small, *LONGER, "--save-minutes", "0", "--out", tmp_path / "run") as process:
        for line in process.stdout:
            if line == "hangs\n":
                process.send_signal(signal.SIGINT)
                time.sleep(0.5)
                assert process.poll() is None
                process.send_signal(signal.SIGINT)
                process.wait(timeout=10)
    assert process.returncode == -signal.SIGINT
    assert here("simsiam.py", small, *LONGER, "--out", tmp_path / "run", "--resume") is None
    assert equal(weights_of(tmp_path / "run"), longer[1])


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("fault", ["SIGTERM to the agent", "a worker killed", "a worker killed, at its start", pytest.param("a worker killed, of two agents", marks=slow),
                                   "all killed, resumed", "all killed, resumed by one process"])
def test_torchrun_survives(tmp_path, small, longer, fault):
    out, agents = tmp_path / "run", 2 if "two agents" in fault else 1
    rendezvous = ["--standalone"] if agents == 1 else ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    command = ["-m", "torch.distributed.run", *rendezvous, "--nproc-per-node", 2 // agents, "--max-restarts", "2", HERE / "simsiam.py", small, *LONGER, "--out", out]
    with contextlib.ExitStack() as stack:
        stack.callback(kill_all, out)
        cores = sorted(os.sched_getaffinity(0))             # of two agents, each has a machine of its own: half of the cores
        processes = [stack.enter_context(start(*command, preexec_fn=functools.partial(os.sched_setaffinity, 0, cores[k::agents] or cores)))
                     for k in range(agents)]

        def workers():
            return sorted(set(processes_of(out)) - {process.pid for process in processes} - set(processes_of(out, "torch.distributed.run")))

        while "at its start" in fault and not workers():
            time.sleep(0.01)
        if "at its start" not in fault:
            wait_for_epoch(processes[0], out)
        if "SIGTERM" in fault:
            processes[0].send_signal(signal.SIGTERM)
        elif "all killed" in fault:
            kill_all(out)
        else:
            os.kill(workers()[-1], signal.SIGKILL)
            assert ("at its start" in fault) == (not (out / "checkpoint.pth").exists())
        said = [process.communicate(timeout=120)[1] for process in processes]
    if "SIGTERM" in fault:
        assert processes[0].returncode != 0 and (0, 0) < stopped_at(said[0], out) < (6, 0)
    if fault in ("SIGTERM to the agent", "all killed, resumed"):
        again = torchrun(HERE / "simsiam.py", small, *LONGER, "--out", out, "--resume")
        assert again.returncode == 0, again.stderr
    elif "by one process" in fault:
        assert here("simsiam.py", small, *LONGER, "--out", out, "--resume") is None
    else:
        assert [process.returncode for process in processes] == [0] * agents, said
    events = [r["event"] for r in log_of(out)]
    assert events.count("resume") == ("at its start" not in fault) and events[-1] == "end"
    if "by one process" in fault:      # the sums are in another order from there on
        assert log_of(out)[-2]["loss"] == pytest.approx(longer["losses"][6], abs=2e-3) and abs(longer["losses"][6] - longer["losses"][5]) > 4e-3
        assert losses_of(out) == pytest.approx(longer["losses"], abs=2e-3)
    else:
        assert equal(longer[2], weights_of(out))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, small, finished):
    """A limit on the size of files stands for the disk. The first checkpoint, without momentum yet, fits."""
    whole = finished[0] / "checkpoint.pth"
    out = program(small, *TINY, "--out", tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (whole.stat().st_size * 3 // 4,) * 2))
    assert out.returncode == 1 and out.stderr.count("\n") == 1 and "checkpoint.pth: can't be written" in out.stderr
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["epoch"] == 0 and not list(tmp_path.glob("*.tmp"))
    assert here("simsiam.py", small, *TINY, "--out", tmp_path, "--resume") is None
    assert equal(weights_of(tmp_path), weights_of(finished[0]))


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b[:9000] + bytes([b[9000] ^ 1]) + b[9001:]])
def test_resume_falls_back_to_the_older_checkpoint(tmp_path, small, finished, damage, monkeypatch, capsys):
    """And from then on too, one of the two is good at every instant."""
    shutil.copytree(finished[0], tmp_path / "run")
    path, replace, renamed = tmp_path / "run/checkpoint.pth", os.replace, []
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)

    def watched(a, b):
        replace(a, b)
        good = []
        for name in ("checkpoint.pth", "checkpoint-previous.pth"):
            with contextlib.suppress(augment.Refused):
                good.append(simsiam.read(tmp_path / "run" / name)["epoch"])
        assert good
        renamed.append(os.path.basename(b))

    monkeypatch.setattr(os, "replace", watched)
    capsys.readouterr()
    assert here("simsiam.py", small, *TINY, "--out", tmp_path / "run", "--resume") is None
    said = capsys.readouterr().out
    assert "checkpoint.pth: can't be read" in said and "going on from" in said and "after 1 epochs and 3 steps" in said
    assert "checkpoint.pth" in renamed and equal(weights_of(tmp_path / "run"), weights_of(finished[0]))
    for name in ("checkpoint.pth", "checkpoint-previous.pth"):
        (tmp_path / "run" / name).write_bytes(damaged)
    assert "can't be read" in here("simsiam.py", small, *TINY, "--out", tmp_path / "run", "--resume")


def test_settings_may_be_overridden_by_name(tmp_path, small, finished, capsys):
    shutil.copytree(finished[0], tmp_path / "run")
    options = [small, *TINY, "--epochs", "4", "--weight-decay", "0.1", "--workers", "0", "--out", tmp_path / "run", "--resume"]
    said = here("simsiam.py", *options)
    assert "epochs 3 -> 4; weight_decay 0.0005 -> 0.1" in said and said.endswith("--override epochs weight_decay") and "workers" not in said
    assert "weight_decay 0.0005 -> 0.1" in here("simsiam.py", *options, "--override", "epochs")
    capsys.readouterr()
    assert here("simsiam.py", *options, "--override", "epochs", "weight_decay") is None
    assert "other settings than so far: epochs 3 -> 4; weight_decay 0.0005 -> 0.1; workers 1 -> 0\n" in capsys.readouterr().out
    assert log_of(tmp_path / "run")[-2]["epoch"] == 4
    assert {group["weight_decay"] for group in torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)["optimizer"]["param_groups"]} == {0.1}


def crafted(whole):
    """Checkpoints that torch reads without complaint, and that no run has written."""
    for key in ("format", "model", "optimizer", "epoch", "step", "sums", "seconds", "settings"):
        yield {name: value for name, value in whole.items() if name != key}
        yield from ({**whole, key: value} for value in (None, "x", [], torch.zeros(3)))
    yield from ({**whole, key: value} for key, value in (("epoch", 10 ** 9), ("step", 10 ** 9), ("step", -1), ("sums", [1, 2, 3])))
    yield {**whole, "optimizer": {**whole["optimizer"], "state": {k: {"momentum_buffer": torch.zeros(1)} for k in whole["optimizer"]["state"]}}}
    yield from ({**whole, "settings": {**whole["settings"], key: [1]}} for key in ("seed", "images", "batch", "size", "width", "centre", "mean", "recipe"))
    yield {**whole, "settings": {**whole["settings"], 5: 6, "\x1b[2J": 7}}
    yield from ({**whole, "model": model} for model in ({1: torch.zeros(3)}, {name: torch.zeros(()).expand(100, 100) for name in whole["model"]}))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_crafted_checkpoint_is_refused_in_one_line(tmp_path, small, finished):
    """None is harmless enough to go on from."""
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run/checkpoint-previous.pth").unlink()
    path = tmp_path / "run/checkpoint.pth"
    for content in crafted(torch.load(path, weights_only=True)):
        torch.save(content, path)
        before = path.read_bytes()
        said = here("simsiam.py", small, *TINY, "--out", tmp_path / "run", "--resume")
        assert said and str(path) in said and "\n" not in said and "\x1b" not in said and path.read_bytes() == before


def test_weights_of_a_crafted_checkpoint_are_refused_or_read(tmp_path, finished):
    whole = torch.load(finished[0] / "checkpoint.pth", weights_only=True)
    read = 0
    for content in crafted(whole):
        torch.save(content, tmp_path / "file.pth")
        with contextlib.suppress(augment.Refused):
            state, epochs, settings = simsiam.read_weights(tmp_path / "file.pth")
            read += 1
            assert all(isinstance(name, str) and t.untyped_storage().nbytes() >= t.nbytes for name, t in state.items())
            assert settings == {} or settings["recipe"] == "cifar10" and settings["size"] == 16
    assert 10 < read < 25                           # those whose optimiser, sums, or seconds are odd, which nobody asks for here


@pytest.mark.parametrize("text", ["", "\x00\udcff{{\n", "[1]\n{}\n", '{"event": "start"}\n{"event": "epoch"}\n', '{"event": "start"}\n{"event": "epoch", "epoch": "x"}\n',
                                  "[" * 100_000 + "}\n", '{"event": "start"}\n{"event": "epoch", "epoch": 1, "loss": []}\n'])
def test_a_crafted_log_is_refused_in_one_line(tmp_path, small, finished, text):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run/log.jsonl").write_text(text, errors="surrogateescape")
    said = here("simsiam.py", small, *TINY, "--out", tmp_path / "run", "--resume")
    assert "log.jsonl: no log of this run; restore it, or give another --out (" in said and "\n" not in said


@pytest.mark.parametrize("save_minutes, what", [("0", "a weight|at lr .*"), ("10", r"at lr \S+ the loss, \S+, or the gradient, of norm \S+,")])
def test_what_is_not_finite_ends_the_run(tmp_path, small, save_minutes, what):
    """Saved or not in between: found in the weights before they are saved, or in the loss and gradient."""
    said = here("simsiam.py", small, *LONGER, "--base-lr", "1e6", "--weight-decay", "1", "--save-minutes", save_minutes, "--out", tmp_path / "run")
    assert re.match(rf"simsiam.py: ({what}) is not finite in epoch \d+, step \d+; the last good checkpoint is .*/checkpoint.pth\. Try", said), said
    checkpoint = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)
    assert all(t.isfinite().all() for t in checkpoint["model"].values()) and (checkpoint["step"] > 0) == (save_minutes == "0")


def test_processes_that_see_different_images_are_found_out(tmp_path, small):
    write_folder(tmp_path / "other", "train", 50, 16, start=1), write_folder(tmp_path / "other", "val", 9, 16)
    script = tmp_path / "run.py"
    script.write_text(f"import os, sys; sys.path.insert(0, {str(HERE)!r}); import simsiam\nsys.argv[1] = sys.argv[1 + int(os.environ['RANK'])]; del sys.argv[2]\n"
                      "simsiam.leave(simsiam.launch('simsiam.py', simsiam.pretrain, simsiam.parse()))")
    out = torchrun(script, small, tmp_path / "other", *TINY, "--out", tmp_path / "run")
    assert out.returncode != 0 and "the processes see different images there" in out.stderr and not (tmp_path / "run").exists()


def test_fingerprint_tells_data_sets_apart(small, large, tmp_path):
    def number(folder):
        return augment.open_data(folder)[0].fingerprint()

    for folder in (small, large):
        shutil.copytree(folder, tmp_path / folder.name)
        assert number(folder) == number(tmp_path / folder.name) < 2 ** 48       # wherever it lies
        one = sorted((tmp_path / folder.name / "train/b").iterdir())[0]
        one.rename(one.parents[1] / "a" / one.name)                             # the same files, another label
        assert number(folder) != number(tmp_path / folder.name)
    source = augment.draw_shapes(0, 0, 20, 16)
    assert source.fingerprint() != dataclasses.replace(source, labels=source.labels[::-1]).fingerprint()


IMPATIENT = ("import datetime, sys; sys.path.insert(0, sys.argv.pop(1)); import augment, simsiam\n"
             "simsiam.PATIENCE, augment.LOADER_TIMEOUT = datetime.timedelta(seconds=3), 3\n"
             "simsiam.leave(simsiam.launch('simsiam.py', simsiam.pretrain, simsiam.parse()))")


def test_a_process_that_is_left_alone_ends_by_itself(tmp_path, small):
    alone = os.environ | {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with start("-c", IMPATIENT, HERE, small, *TINY, "--out", tmp_path / "run", env=alone) as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "the processes did not find each other within 0:00:03" in said and "Traceback" not in said


@pytest.mark.parametrize("fault", ["stuck", "killed"])
def test_workers_that_are_stuck_or_killed_end_the_run_with_a_hint(tmp_path, large, fault):
    """Stuck: reading a pipe into which nobody writes."""
    data = write_folder(tmp_path / "data", "train", 60, (70, 80), suffix=".jpg")
    (data / "train/a/003.jpg").unlink()
    os.mkfifo(data / "train/a/003.jpg")
    with start("-c", IMPATIENT, HERE, data, *TINY, "--knn-every", "0", "--batch", "2", "--out", tmp_path / "run") as process:
        if fault == "killed":
            while not (workers := set(processes_of(tmp_path / "run")) - {process.pid}):
                time.sleep(0.01)
            time.sleep(0.2)
            os.kill(workers.pop(), signal.SIGKILL)
        _, said = process.communicate(timeout=60)
    hint = "is the disk or the network under DATA still there" if fault == "stuck" else "a process that decodes images was killed"
    assert process.returncode == 1 and hint in said and "Traceback" not in said
    kill_all(tmp_path / "run")


@slow
def test_ten_thousand_steps_leave_nothing_behind(tmp_path, small, monkeypatch):
    """No growth of memory, open files or log lines per step."""
    files, next_epoch = [], simsiam.Run.next_epoch
    monkeypatch.setattr(simsiam.Run, "next_epoch", lambda run: (next_epoch(run), files.append(len(os.listdir("/proc/self/fd")))))
    options = [*TINY, "--recipe", "cifar10", "--batch", "2", "--knn-every", "0", "--workers", "0", "--epochs", "400"]      # of 25 steps
    assert here("simsiam.py", small, *options, "--out", tmp_path / "run") is None
    epochs = [r for r in log_of(tmp_path / "run") if r["event"] == "epoch"]
    assert len(epochs) == 401 and epochs[-1]["step"] == 10_000 and len(log_of(tmp_path / "run")) == 403
    assert epochs[-1]["memory_mb"] - epochs[40]["memory_mb"] < 10 and len(files) == 400 and files[-1] == files[0]


def test_a_name_cannot_lead_out_of_the_runs_folder():
    for name in ("..", ".", "/", "a/../..", "/..", "x/...", ".hidden", "..pth", "a\nb", "../../etc/passwd", None):
        place = os.path.normpath(os.path.join("runs", simsiam.name_of(name)))
        assert re.fullmatch(r"runs/[^/]+", place, re.S), name


# ---------------------------------------------------------------------------------------------------------------------
# Bad images
# ---------------------------------------------------------------------------------------------------------------------

def odd_files(folder):
    """{name: the mean colour that it should have, or None where it is bad}: one of each kind, (30, 20) pixels if there is nothing to say."""
    def put(name, image, colour, *args, **options):
        image.save(folder / name, *args, **options)
        expected[name] = colour

    folder.mkdir(parents=True)
    expected, red = {}, Image.new("RGB", (30, 20), (200, 0, 0))
    put("cmyk.jpg", red.convert("CMYK"), (200, 0, 0)), put("grey.png", Image.new("L", (30, 20), 77), (77,) * 3)
    put("bits16.png", Image.fromarray(np.full((20, 30), 0x8123, np.uint16)), (0x81,) * 3)
    put("bits16.tif", Image.fromarray(np.full((20, 30), 0x8123, np.uint16)), (0x81,) * 3)
    put("palette.png", red.convert("P"), (200, 0, 0), transparency=0)
    put("alpha.png", Image.new("RGBA", (30, 20), (200, 0, 0, 0)), (200, 0, 0)), put("bilevel.png", Image.new("1", (30, 20), 1), (255,) * 3)
    put("animated.webp", red, (200, 0, 0), save_all=True, append_images=[Image.new("RGB", (30, 20), (0, 0, 200))], lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    put("rotated.jpg", red, (200, 0, 0), exif=exif)
    put("dot.png", Image.new("RGB", (1, 1), (9, 9, 9)), (9,) * 3), put("line.png", Image.new("RGB", (1, 5000), (9, 9, 9)), (9,) * 3)
    whole = (folder / "rotated.jpg").read_bytes()
    bad = {"truncated.jpg": whole[:len(whole) // 2], "empty.png": b"", "text.jpg": b"not an image", "zeros.bmp": bytes(1000),
           "new\nline\x1b[31m.png": b"",
           "bomb.png": b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")}
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    os.symlink(folder / "loop.png", folder / "loop.png")
    return expected | dict.fromkeys([*bad, "loop.png"])


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_what_pillow_opens_becomes_rgb_and_what_it_does_not_is_bad(tmp_path):
    for name, colour in odd_files(tmp_path / "odd").items():
        path = os.fsencode(tmp_path / "odd" / name)
        if colour is None:
            with pytest.raises(augment.BadImage, match="can't be read as an image"):
                augment.read_image(path)
        else:
            image = augment.read_image(path)
            assert image.dtype == torch.uint8 and image.dim() == 3 and image.shape[2] == 3, name
            assert np.allclose(image.float().mean((0, 1)), colour, atol=3), name
            assert tuple(image.shape[:2]) == {"dot.png": (1, 1), "line.png": (5000, 1)}.get(name, (20, 30)), name


def test_check_lists_what_is_bad(tmp_path):
    expected = odd_files(tmp_path / "odd")
    out = subprocess.run([sys.executable, HERE / "augment.py", tmp_path / "odd", "--check"], capture_output=True, text=True)
    bad = [name for name, colour in expected.items() if colour is None]
    assert out.returncode == 1 and out.stderr == f"augment.py: {len(bad)} of {len(expected)} image files are bad\n"
    named = [re.match(r".*/odd/(.*?): can't be read", line)[1] for line in out.stdout.splitlines()]
    assert sorted(named) == sorted(augment.printable(name) for name in bad)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_run_goes_on_without_its_bad_images(tmp_path, workers):
    write_folder(tmp_path / "good", "train", 40, (70, 80)), write_folder(tmp_path / "good", "val", 6, (70, 80))
    expected = odd_files(tmp_path / "good/train/odd")
    bad = [name for name, colour in expected.items() if colour is None]
    options = [*TINY, "--batch", "6", "--epochs", "2", "--size", "24", "--workers", workers]
    out = program(tmp_path / "good", *options, "--out", tmp_path / "run")
    assert out.returncode == 0, out.stderr
    assert sorted(re.findall(r"^bad image, replaced by the next good one: .*/odd/(.*?): can't", out.stderr, re.M)) == sorted(map(augment.printable, bad))
    assert [r["bad_images"] for r in log_of(tmp_path / "run") if r["event"] == "epoch"][1:] == [len(bad)] * 2
    source = augment.open_data(tmp_path / "good")[0]
    good = [i for i in range(len(source)) if expected.get(os.path.basename(os.fsdecode(source.files[i])), 1) is not None]
    for i in range(len(source)):                                               # the next good one, whoever asks
        following = next(j for k in range(len(source)) if (j := (i + k) % len(source)) in good)
        assert torch.equal(source.image(i), augment.read_image(source.files[following]))


def test_too_many_bad_images_end_the_run(tmp_path):
    write_folder(tmp_path, "train", 40, (70, 80), suffix=".jpg")
    for path in sorted((tmp_path / "train").rglob("*.jpg"))[::3]:
        path.write_bytes(b"")
    said = here("simsiam.py", tmp_path, *TINY, "--size", "24", "--knn-every", "0", "--out", tmp_path / "run")
    assert re.search(r"1[1-4] of 40 images can't be read, which is too many; python augment.py DATA --check lists them", said)


def obey_permissions():
    """In a child: root no longer reads and writes what its permissions forbid. (Of others, nothing is taken.)"""
    if os.geteuid() == 0:
        for capability in (1, 2):       # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH; the bounding set counts at the next exec
            assert ctypes.CDLL(None, use_errno=True).prctl(24, capability, 0, 0, 0) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_files_and_folders_without_permission(tmp_path):
    data = write_folder(tmp_path / "data", "train", 40, (70, 80))
    (data / "train/a/006.png").chmod(0)
    child = {"capture_output": True, "text": True, "preexec_fn": obey_permissions}
    out = subprocess.run([sys.executable, HERE / "augment.py", data, "--check"], **child)
    assert out.returncode == 1 and out.stdout.count("\n") == 1 and "006.png: can't be read as an image (PermissionError" in out.stdout, out
    (tmp_path / "locked").mkdir(mode=0o555)
    out = subprocess.run([sys.executable, HERE / "simsiam.py", data, *TINY, "--size", "24", "--out", tmp_path / "locked/run"], **child)
    assert out.returncode == 1 and re.search(r"^simsiam.py: .*Permission denied.*locked/run", out.stderr, re.M) and "Traceback" not in out.stderr, out.stderr
    made = subprocess.run([sys.executable, HERE / "simsiam.py", data, *TINY, "--size", "24", "--out", tmp_path / "run"], **child)
    assert made.returncode == 0, made.stderr
    before = (tmp_path / "run/checkpoint.pth").read_bytes()
    (tmp_path / "run").chmod(0o555)
    options = [*TINY, "--epochs", "4", "--override", "epochs", "--size", "24", "--out", tmp_path / "run", "--resume"]
    out = subprocess.run([sys.executable, HERE / "simsiam.py", data, *options], **child)
    assert out.returncode == 1 and "log.jsonl: can't be written" in out.stderr and (tmp_path / "run/checkpoint.pth").read_bytes() == before, out.stderr


def test_checkpoints_are_whole_at_every_instant(tmp_path, monkeypatch):
    """A crash between any two system calls of save() leaves the old file or the new one."""
    path = tmp_path / "checkpoint.pth"
    simsiam.save({"a": 1}, str(path))
    for call in ("fsync", "replace"):
        monkeypatch.setattr(os, call, lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            simsiam.save({"a": 2}, str(path))
        monkeypatch.undo()
        assert torch.load(path, weights_only=True) == {"a": 1}
    simsiam.save({"a": 3}, str(path))
    assert torch.load(path, weights_only=True) == {"a": 3} and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_without_stopgrad_the_run_collapses_and_says_so(tmp_path):
    out = program(*TINY, "--width", "1/8", "--base-lr", "1", "--batch", "64", "--epochs", "2", "--knn-every", "0", "--size", "24",
                  "--experiment", "fig2-without-stopgrad", "--out", tmp_path)
    assert out.returncode == 0, out.stderr
    last = log_of(tmp_path)[-2]
    assert last["loss"] < -0.8 and last["std"] < 0.5 and log_of(tmp_path)[0]["settings"]["pred_lr"] == "cosine"
    assert ("collapsed: all outputs" in out.stdout) == last["collapsed"]
    whole = [json.loads(line) for line in (HERE / "results/shapes-fig2-without-stopgrad/log.jsonl").read_text().splitlines()]
    healthy = log_of(HERE / "results/shapes")[-2]  # of the full runs, kept in results/: far below the alarm's 3/sqrt(64) = 0.375
    assert whole[-2]["collapsed"] and whole[-2]["loss"] < -0.95 and whole[-2]["std"] < 0.31 < healthy["std"] / 3 and whole[-2]["knn"] < whole[0]["knn_pixels"]


REFUSALS = [
    (["nowhere"], "nowhere: no such file or folder"),
    (["{small}", "--batch", "64"], "only 50 images"),
    (["{small}", "--area", "0.5", "0.2"], "--area"),
    (["{small}", "--width", "1/1000"], "--width"),
    (["{small}", "--width", "1/0"], "--width"),
    (["{small}", "--momentum", "-1"], "--momentum"),
    (["{small}", "--amp"], "--amp"),
    (["{small}", "--resume"], "nothing to resume"),
    (["{small}", "--out", "{whole}"], "holds a run already"),
    (["{small}", "--out", "{whole}", "--resume", "--epochs", "5"], "epochs 3 -> 5"),
    (["{small}", "--out", "{whole}", "--resume", "--seed", "5"], "seed 0 -> 5"),
    (["{small}", "--out", "{damaged}", "--resume"], "can't be read"),
    (["{small}", "--out", "{small}/train/a/000.png/run"], "000.png"),
    (["{broken}"], "20 files in a row can't be read as images, the first: "),
]


@pytest.mark.parametrize("arguments, message", REFUSALS)
def test_input_that_cannot_be_used_is_refused_in_one_line(tmp_path, small, large, finished, arguments, message):
    damaged, broken = tmp_path / "damaged", tmp_path / "broken"
    damaged.mkdir()
    (damaged / "checkpoint.pth").write_bytes((finished[0] / "checkpoint.pth").read_bytes()[:5000])
    write_folder(broken, "train", 20, (70, 80), suffix=".jpg")
    for path in broken.rglob("*.jpg"):
        path.write_bytes(b"no image")
    before = (finished[0] / "checkpoint.pth").read_bytes()
    filled = [a.format(small=small, large=large, whole=finished[0], damaged=damaged, broken=broken) for a in arguments]
    options = TINY if "--out" in filled else [*TINY, "--out", tmp_path / "new"]
    # options of the case come last, so that they win
    out = program(filled[0], *options, *filled[1:])
    assert out.returncode not in (0, None) and "Traceback" not in out.stderr
    assert message in out.stderr and out.stderr.strip().count("\n") == 0, out.stderr
    assert (finished[0] / "checkpoint.pth").read_bytes() == before


def test_a_batch_that_the_processes_do_not_divide_is_refused(small, tmp_path):
    out = torchrun(HERE / "simsiam.py", small, *TINY, "--batch", "15", "--out", tmp_path / "run")
    assert out.returncode != 0 and out.stderr.count("2 processes don't divide it") == 1


def test_resume_auto_starts_and_then_continues(small, tmp_path):
    first = program(small, *TINY, "--epochs", "1", "--out", tmp_path / "run", "--resume", "auto")
    assert first.returncode == 0, first.stderr
    lr = log_of(tmp_path / "run")[-2]["lr"]
    again = program(small, *TINY, "--epochs", "1", "--out", tmp_path / "run", "--resume", "auto")
    assert again.returncode == 0 and "continuing" in again.stdout
    assert [r["event"] for r in log_of(tmp_path / "run")] == ["start", "epoch", "resume", "epoch", "end"]
    assert log_of(tmp_path / "run")[-2]["lr"] == lr > 0


def test_unlabelled_photographs_train_without_knn(large, tmp_path):
    out = program(large / "train", *TINY, "--batch", "8", "--epochs", "1", "--size", "48", "--out", tmp_path / "run")
    assert out.returncode == 0, out.stderr
    start, *epochs, _ = log_of(tmp_path / "run")
    assert start["settings"]["recipe"] == "imagenet" and all(r["knn"] is None for r in epochs) and "needs labels" in out.stdout


def test_eq02_symmetrised_loss():
    p1, p2, z1, z2 = vectors()
    L = numpy_D(p1, z2) / 2 + numpy_D(p2, z1) / 2
    assert simsiam.loss(p1, p2, z1, z2).item() == pytest.approx(L, abs=1e-14)
    assert simsiam.loss_without_stopgrad(p1, p2, z1, z2).item() == pytest.approx(L, abs=1e-14)
    assert simsiam.loss(z1, z2, 3 * z2, 2 * z1).item() == pytest.approx(-1)          # the minimum


# ---------------------------------------------------------------------------------------------------------------------
# simsiam.py: the experiments
# ---------------------------------------------------------------------------------------------------------------------

PAPERS_RESULTS = {  # typed from the tables; the experiment's settings on ImageNet, and its top-1
    "fig2-with-stopgrad": (dict(pred_lr="cosine"), "67.7"), "fig2-without-stopgrad": (dict(pred_lr="cosine", objective="without-stopgrad"), "0.1"),
    "table1-baseline": (dict(pred_lr="cosine", predictor="mlp"), "67.7"), "table1-a-no-predictor": (dict(pred_lr="cosine", predictor="none"), "0.1"),
    "table1-b-fixed-predictor": (dict(pred_lr="cosine", predictor="fixed"), "1.5"), "table1-c-constant-lr": (dict(pred_lr="constant"), "68.1"),
    **{f"table2-batch-{batch}": (dict(batch=batch, warmup=warmup), top1) for batch, warmup, top1 in (
        (64, 0, "66.1"), (128, 0, "67.3"), (256, 0, "68.1"), (512, 0, "68.1"), (1024, 10, "68.0"), (2048, 10, "67.9"), (4096, 10, "64.0"))},
    "table3-a-no-bn": (dict(bn=(0, 0, 0, 0), warmup=10), "34.6"), "table3-b-hidden-bn": (dict(bn=(1, 0, 1, 0), warmup=0), "67.4"),
    "table3-c-default": (dict(bn=(1, 1, 1, 0), warmup=0), "68.1"), "table3-d-all-bn": (dict(bn=(1, 1, 1, 1), warmup=0), "unstable"),
    "sec3-affine-output-bn": (dict(affine=True), "68.2 without"), "sec42-asymmetric-no-h": (dict(objective="asymmetric", predictor="none"), "fails"),
    "sec45-cross-entropy": (dict(objective="cross-entropy"), "63.2"), "sec46-asymmetric": (dict(objective="asymmetric", predictor="mlp"), "64.8"),
    "sec46-asymmetric-2x": (dict(objective="asymmetric-2x"), "67.3"),
    "sec52-1-step": (dict(eta="alternate", k=1), "68.1"), "sec52-10-step": (dict(eta="alternate", k=10), "68.7"),
    "sec52-100-step": (dict(eta="alternate", k=100), "68.9"), "sec52-1-epoch": (dict(eta="alternate", k=0), "67.0"),
    "sec52-moving-average": (dict(eta="average", m=0.8, predictor="none"), "55.0"),
    "suppA-fc-std-0.01": (dict(fc_std=0.01), "may not converge"), "suppB-dim-256": (dict(dim=256, pred_dim=64), "65.3"),
    "suppB-dim-512": (dict(dim=512, pred_dim=128), "67.2"), "suppB-dim-1024": (dict(dim=1024, pred_dim=256), "67.5"),
    "suppB-dim-2048": (dict(dim=2048, pred_dim=512), "68.1"), "suppB-hidden-d": (dict(dim=2048, pred_dim=2048), "can fail"),
    **{f"table4-{epochs}-epochs": (dict(batch=256, epochs=epochs), top1) for epochs, top1 in ((100, "68.1"), (200, "70.0"), (400, "70.8"), (800, "71.3"))},
    "table5-recipe": (dict(base_lr=0.5, weight_decay=1e-5), "transfers best"), "simsiam": (dict(batch=512), "68.1")}


def settings_for(experiment, recipe, *more):
    source = augment.Source(files=np.array([b""] * 200_000))
    return simsiam.resolve(simsiam.parse(["DATA", "--recipe", recipe, "--experiment", experiment, "--device", "cpu", *more]), source, 1)


def test_experiments_hold_the_papers_settings_and_results():
    assert simsiam.EXPERIMENTS.keys() == PAPERS_RESULTS.keys()
    baseline = settings_for("simsiam", "imagenet")
    for name, (expected, result) in PAPERS_RESULTS.items():
        s = settings_for(name, "imagenet")
        assert {key: s[key] for key in expected} == expected and result in simsiam.EXPERIMENTS[name][1], name
        changed = {key for key in s if s[key] != baseline[key]} - {"experiment", "save_minutes"}
        assert changed <= expected.keys(), (name, changed)               # and nothing else changes


def test_experiments_scale_to_smaller_recipes():
    assert settings_for("table2-batch-4096", "cifar10")["batch"] == 4096 and settings_for("table2-batch-4096", "shapes")["batch"] == 512
    assert settings_for("table2-batch-64", "shapes")["batch"] == 8 and settings_for("table2-batch-1024", "shapes")["warmup"] == 2
    assert [settings_for("suppB-dim-512", "shapes")[name] for name in ("dim", "pred_dim")] == [128, 32]
    assert settings_for("table4-200-epochs", "shapes")["epochs"] == 48 and settings_for("table4-200-epochs", "cifar10")["epochs"] == 200
    assert settings_for("table2-batch-64", "shapes", "--batch", "32")["batch"] == 32         # what is given wins


def test_a_scaled_experiment_says_so(small, tmp_path, capsys):
    options = "--recipe shapes --width 1/16 --size 16 --knn-every 0 --workers 0 --epochs 1 --batch 25".split()
    for experiment, label in (("suppB-dim-512", "67.2); here dim 128, pred_dim 32, not what the row says\n"), ("sec45-cross-entropy", "63.2)\n")):
        assert here("simsiam.py", small, *options, "--experiment", experiment, "--out", tmp_path / experiment) is None
        assert f"experiment  {experiment} (the paper on ImageNet: {label}" in capsys.readouterr().out


def test_experiment_list_names_all_of_them(capsys):
    with pytest.raises(SystemExit) as end:
        simsiam.parse(["--experiment", "list"])
    printed = capsys.readouterr().out
    assert not end.value.code and all(re.search(rf"^{re.escape(name)} .*{re.escape(paper)}", printed, re.M)
                                      for name, (_, paper) in simsiam.EXPERIMENTS.items())


@pytest.mark.parametrize("recipe", ["shapes", "cifar10"])
@pytest.mark.parametrize("experiment", PAPERS_RESULTS)
def test_every_experiment_trains(tmp_path, small, experiment, recipe):
    rows = [] if "dim" in experiment or "hidden-d" in experiment else ["--dim", "16", "--pred-dim", "4"]
    rows += [] if "batch" in experiment and "1024" not in experiment else ["--batch", "25"]
    epochs = ["--epochs", "3"] if simsiam.EXPERIMENTS[experiment][0].get("warmup") else ["--epochs", "2"]
    said = here("simsiam.py", small, *shlex.split(f"--recipe {recipe} --width 1/16 --proj-hidden 16 --size 16 --knn-every 0 --workers 0 --base-lr 0.1"),
                *(["--batch", "25"] if "table2" in experiment or "table4" in experiment else []), *rows, *epochs,
                *(["--warmup", "1"] if len(epochs) and "3" in epochs else []), "--experiment", experiment, "--out", tmp_path / "run")
    assert said is None
    start, *epochs, _ = log_of(tmp_path / "run")
    assert start["settings"]["experiment"] == experiment and all(math.isfinite(r["loss"]) and r["lr"] > 0 for r in epochs[1:-1])
    torch.manual_seed(0)
    s = start["settings"]
    model = simsiam.SimSiam("resnet18", s["dim"], s["pred_dim"], 2, 16, 1 / 16, True, s["predictor"], s["bn"], s["affine"], s["fc_std"])
    after = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)["model"]
    moved = {name: not torch.equal(after[name], p) for name, p in model.named_parameters()}
    assert moved.keys() == {name for name in after if "running" not in name and "num_batches" not in name}
    for name, has_moved in moved.items():
        assert has_moved == (not name.startswith("predictor.") or experiment != "table1-b-fixed-predictor"), name


def test_sec42_no_h_gradient_is_half_of_the_unstopped_one():
    model = tiny_model(predictor="none").double()
    x1, x2 = torch.randn(2, 8, 3, 16, 16, dtype=torch.float64)
    p1, p2, z1, z2 = model(x1, x2)
    assert p1 is z1 and p2 is z2 and not [name for name in model.state_dict() if name.startswith("predictor")]
    weights = list(model.parameters())
    stopped = torch.autograd.grad(simsiam.loss(p1, p2, z1, z2), weights, retain_graph=True)
    whole = torch.autograd.grad(simsiam.D(z1, z2), weights)
    assert all(torch.allclose(a, b / 2, atol=1e-12) for a, b in zip(stopped, whole)) and max(g.abs().max() for g in whole) > 1e-3


@pytest.mark.parametrize("bn", [(1, 1, 1, 0), (0, 0, 0, 0), (1, 0, 1, 0), (1, 1, 1, 1)])
def test_table3_bn_is_where_the_row_says(bn):
    model = tiny_model(proj_layers=3, bn=bn)
    kinds = [[type(m).__name__ for m in head] for head in (model.encoder.fc, model.predictor)]
    norm = [["BatchNorm1d"] * flag for flag in bn]
    assert kinds[0] == ["Linear", *norm[0], "ReLU"] * 2 + ["Linear", *norm[1]] and kinds[1] == ["Linear", *norm[2], "ReLU", "Linear", *norm[3]]
    for head in (model.encoder.fc, model.predictor):
        for layer, following in zip(head, [*head[1:], None]):
            if isinstance(layer, torch.nn.Linear):
                assert (layer.bias is None) == isinstance(following, torch.nn.BatchNorm1d)


def test_affine_output_bn_and_fc_std():
    assert not model_has_scale(tiny_model()) and model_has_scale(tiny_model(affine=True))
    model = tiny_model(dim=512, pred_dim=128, proj_hidden=512, fc_std=0.01)
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(weights) == 4 and all(w.std().item() == pytest.approx(0.01, rel=0.05) for w in weights)
    w = tiny_model(dim=512, pred_dim=128).predictor[0].weight                      # PyTorch's default: uniform within 1/sqrt(in)
    assert w.abs().max() <= 512 ** -0.5 and w.std().item() == pytest.approx(512 ** -0.5 / 3 ** 0.5, rel=0.02)


def model_has_scale(model):
    return "encoder.fc.4.weight" in model.state_dict()


def test_sec45_cross_entropy_similarity():
    p1, p2, z1, z2 = vectors()

    def by_hand(p, z):
        p, z = p.detach().numpy(), z.detach().numpy()
        soft = [np.exp(v) / np.exp(v).sum(axis=1, keepdims=True) for v in (p, z)]
        return np.mean(-(soft[1] * np.log(soft[0])).sum(axis=1)), (soft[0] - soft[1]) / len(p)

    value, gradient = by_hand(p1, z2)
    L = simsiam.loss_cross_entropy(p1, p2, z1, z2)
    assert simsiam.D_cross_entropy(p1, z2).item() == pytest.approx(value, abs=1e-14)
    assert L.item() == pytest.approx((value + by_hand(p2, z1)[0]) / 2, abs=1e-14)
    L.backward()
    assert np.allclose(p1.grad, gradient / 2, atol=1e-14) and z1.grad is None and z2.grad is None
    certain = 100 * torch.eye(5, dtype=torch.float64)
    assert simsiam.D_cross_entropy(certain, certain).item() == pytest.approx(0, abs=1e-12)        # its minimum


def test_sec46_asymmetric_losses():
    p1, p2, z1, z2 = vectors()
    p3, p4, z3, z4 = vectors(seed=1)
    assert simsiam.loss_asymmetric(p1, p2, z1, z2).item() == pytest.approx(numpy_D(p1, z2), abs=1e-14)
    L = simsiam.loss_asymmetric_2x(p1, p2, p3, p4, z1, z2, z3, z4)
    assert L.item() == pytest.approx((numpy_D(p1, z2) + numpy_D(p3, z4)) / 2, abs=1e-14)
    gradients = torch.autograd.grad(L, (p1, p2, p3, p4, z1, z2, z3, z4), allow_unused=True)
    assert [g is not None for g in gradients] == [True, False, True, False, False, False, False, False]
    source, policy = augment.draw_shapes(0, 0, 8, 16), augment.Policy(size=16)
    _, x = next(augment.load_views(source, policy, 0, [(0, np.arange(8))], CPU, 0, views=4))
    assert len(x) == 4 and all((a - b).abs().mean() > 0.1 for a, b in itertools.combinations(x, 2))      # four independent views


# ---------------------------------------------------------------------------------------------------------------------
# simsiam.py: Sec. 5. First its statements, on a toy problem: 5 images, 4 equally likely augmentations of each, F linear
# ---------------------------------------------------------------------------------------------------------------------

TOY = np.random.default_rng(0).normal(size=(5, 4, 3))                   # T(x): image x under augmentation T


def toy_L(theta, eta):
    return np.mean(np.sum((TOY @ theta - eta[:, None]) ** 2, axis=-1))  # Eq. (5): L(theta, eta) = E_{x,T} |F_theta(T(x)) - eta_x|^2


def toy_eta(theta):
    return (TOY @ theta).mean(axis=1)                                   # Eq. (9): eta_x <- E_T[F_theta(T(x))]


def numeric_gradient(f, at, h=1e-6):
    steps = h * np.eye(at.size).reshape(at.size, *at.shape)
    return np.array([(f(at + step) - f(at - step)) / (2 * h) for step in steps]).reshape(at.shape)


def test_eq05_is_the_squared_error_that_D_stands_for():
    """With normalised outputs and eta (footnote 5), it is 2 D and a constant."""
    theta, eta = np.random.default_rng(1).normal(size=(3, 2)), np.random.default_rng(2).normal(size=(5, 2))
    assert toy_L(theta, eta) == pytest.approx(sum(((TOY[x, t] @ theta - eta[x]) ** 2).sum() for x in range(5) for t in range(4)) / 20)
    unit = [v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (TOY @ theta, np.repeat(eta[:, None], 4, axis=1))]
    error = np.mean(np.sum((unit[0] - unit[1]) ** 2, axis=-1))
    assert error == pytest.approx(2 + 2 * simsiam.D(*(torch.tensor(v.reshape(20, 2)) for v in unit)).item())


def test_eq06_alternating_lowers_the_loss_until_it_is_at_the_minimum_over_both():
    """Under a constraint, |theta's columns| = 1, without which theta = 0 is the minimum: collapse."""
    assert toy_L(np.zeros((3, 1)), np.zeros((5, 1))) == 0
    within = TOY - TOY.mean(axis=1, keepdims=True)
    minimum = np.linalg.eigvalsh(np.einsum("xti,xtj->ij", within, within) / 20)[0]   # Eq. (6): min over theta and eta of L(theta, eta), |theta| = 1; eta by Eq. (9)
    theta, losses = np.ones((3, 1)) / 3 ** 0.5, []
    for _ in range(2000):
        eta = toy_eta(theta)
        theta = theta - 0.2 * numeric_gradient(lambda v: toy_L(v, eta), theta)
        theta /= np.linalg.norm(theta)
        losses.append(toy_L(theta, toy_eta(theta)))
    assert all(b <= a + 1e-9 for a, b in zip(losses, losses[1:])) and losses[-1] == pytest.approx(minimum, rel=1e-4)


def test_eq08_the_problem_of_eta_is_one_per_image():
    theta = np.random.default_rng(1).normal(size=(3, 2))
    for x in range(5):                                                  # each image by itself, by least squares
        alone = np.linalg.lstsq(np.ones((4, 1)), TOY[x] @ theta, rcond=None)[0]  # Eq. (8): eta_x <- argmin_eta_x L(theta, eta)
        assert np.allclose(alone, toy_eta(theta)[x])


def test_eq09_eta_is_the_mean_over_the_augmentations():
    theta, rng = np.random.default_rng(1).normal(size=(3, 2)), np.random.default_rng(2)
    eta = toy_eta(theta)
    assert np.abs(numeric_gradient(lambda v: toy_L(theta, v), eta)).max() < 1e-8
    assert all(toy_L(theta, eta + 0.1 * rng.normal(size=eta.shape)) > toy_L(theta, eta) for _ in range(100))


def test_eq07_theta_is_fitted_to_an_eta_that_stays():
    p1, p2, z1, z2 = vectors()
    eta1, eta2, *_ = vectors(seed=1)
    L = simsiam.towards(eta1, eta2)(p1, p2, z1, z2)
    assert L.item() == pytest.approx((numpy_D(p1, eta2) + numpy_D(p2, eta1)) / 2, abs=1e-14)
    gradients = torch.autograd.grad(L, (p1, p2, z1, z2, eta1, eta2), allow_unused=True)
    assert [g is not None for g in gradients] == [True, True, False, False, False, False]
    unit = [v / v.norm(dim=1, keepdim=True) for v in (p1, p2, eta1.detach(), eta2.detach())]
    error = (((unit[0] - unit[3]) ** 2).sum(1).mean() + ((unit[1] - unit[2]) ** 2).sum(1).mean()) / 2
    twice = torch.autograd.grad(error, (p1, p2))                        # the gradient of the squared error is twice D's
    assert all(torch.allclose(a, 2 * b, atol=1e-14) for a, b in zip(twice, gradients))


def test_eq11_plain_training_fits_each_view_to_what_theta_makes_of_the_other():
    """One step of SGD on |F(T(x)) - F^t(T'(x))|^2 of normalised outputs, both ways round, at half of D's lr."""
    model, losses = trained(lambda model, views, batches: simsiam.plain(views(batches), simsiam.loss), steps=1, model=tiny_model_again())
    reference = tiny_model_again().double()
    source, policy = augment.draw_shapes(0, 0, 40, 16), augment.Policy(size=16)
    _, x = next(augment.load_views(source, policy, 0, augment.steps(0, 40, 10, 4), CPU, 0))
    z = [v / v.norm(dim=1, keepdim=True) for v in (reference.encoder(v.double()) for v in x)]
    error = (((z[0] - z[1].detach()) ** 2).sum(1).mean() + ((z[1] - z[0].detach()) ** 2).sum(1).mean()) / 2
    assert losses == [pytest.approx(error.item() / 2 - 1, abs=1e-9)]
    for p, g, q in zip(reference.parameters(), torch.autograd.grad(error, list(reference.parameters())), model.parameters()):
        assert torch.allclose(p - 0.3 * (g / 2 + 1e-4 * p), q, atol=1e-9)


def test_sec51_h_predicts_the_mean_over_the_augmentations():
    """The h that minimises E |h(z1) - z2|^2 over all functions of z1 is E_T[z2]; and the network's p is h(z)."""
    z = torch.tensor(TOY @ np.random.default_rng(1).normal(size=(3, 2)))             # (5, 4, 2): z of image x under T
    h = torch.zeros(5, 4, 2, dtype=torch.float64, requires_grad=True)                # any function: a table over the z1
    error = ((h[:, :, None] - z[:, None]) ** 2).sum(-1).mean()                       # over x, T of z1, T' of z2
    gradient, = torch.autograd.grad(error, h)
    assert torch.allclose(h - 10 * gradient, z.mean(dim=1, keepdim=True).expand(5, 4, 2))    # a quadratic: one exact Newton step
    model = tiny_model().double().eval()
    p1, p2, z1, z2 = model(*torch.randn(2, 4, 3, 16, 16, dtype=torch.float64))
    weights = model.predictor.state_dict()
    for p, z in ((p1, z1), (p2, z2)):
        hidden = F.batch_norm(z @ weights["0.weight"].T, weights["1.running_mean"], weights["1.running_var"], weights["1.weight"], weights["1.bias"])
        assert torch.allclose(p, F.relu(hidden) @ weights["3.weight"].T + weights["3.bias"], atol=1e-12)


def trained(stream_of, steps=7, model=None, dtype=torch.float64):
    """A tiny model after some steps on the stream (of views, objective) that stream_of(model, views) makes. -> model, losses"""
    torch.manual_seed(0)
    model = (model or tiny_model(width=1 / 8)).to(dtype)
    source, policy = augment.draw_shapes(0, 0, 40, 16), augment.Policy(size=16)

    def views(batches):
        return ((index, [v.to(dtype) for v in x]) for index, x in augment.load_views(source, policy, 0, batches, CPU, 0))

    batches = itertools.islice(augment.steps(0, 40, 10, 4), steps)
    optimizer, losses = simsiam.sgd(model, 0.9, 1e-4), []
    for t, (x, objective) in enumerate(stream_of(model, views, batches)):
        simsiam.set_lr(optimizer, 0.3, t, 2 * steps, 0, "cosine")
        L, _ = simsiam.train_step(model, objective, optimizer, torch.autocast("cpu", enabled=False), x)
        losses.append(L.item())
    assert len(losses) == steps
    return model, losses


def k_steps(k, start=0, steps=7):
    off = torch.autocast("cpu", enabled=False)
    return lambda model, views, batches: simsiam.alternate(views(simsiam.twice(batches, k, start)), model, copy.deepcopy(model), k, start, steps, off)


def test_sec52_kstep_with_one_step_is_plain_training_bit_for_bit():
    plain, losses = trained(lambda model, views, batches: simsiam.plain(views(batches), simsiam.loss), dtype=torch.float32)
    one, losses_one = trained(k_steps(1), dtype=torch.float32)
    assert equal(plain.state_dict(), one.state_dict()) and losses == losses_one
    three, losses_three = trained(k_steps(3), dtype=torch.float32)
    assert losses_three[0] == losses[0] and losses_three[1] != losses[1]


def test_eq10_eta_is_what_the_outer_loops_weights_make_of_the_same_views():
    """Against a loop that keeps all views and every theta^t, with gradients of the squared error by hand (footnote 5, Eq. 11)."""
    k, steps = 3, 7
    model, losses = trained(k_steps(k), steps)
    torch.manual_seed(0)
    reference = tiny_model(width=1 / 8).double()
    source, policy = augment.draw_shapes(0, 0, 40, 16), augment.Policy(size=16)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-4)
    for t, (_, x) in enumerate(augment.load_views(source, policy, 0, itertools.islice(augment.steps(0, 40, 10, 4), steps), CPU, 0)):
        if t % k == 0:
            old = copy.deepcopy(reference)                               # theta^t
        x = [v.double() for v in x]
        with torch.no_grad():
            eta = [v / v.norm(dim=1, keepdim=True) for v in (old.encoder(x[0]), old.encoder(x[1]))]
        p = [v / v.norm(dim=1, keepdim=True) for v in (reference.predictor(reference.encoder(v)) for v in x)]
        error = (((p[0] - eta[1]) ** 2).sum(1).mean() + ((p[1] - eta[0]) ** 2).sum(1).mean()) / 2        # twice D, and a constant
        optimizer.param_groups[0]["lr"] = 0.3 * (1 + math.cos(math.pi * t / 14)) / 2
        optimizer.zero_grad()
        (error / 2).backward()
        optimizer.step()
        assert losses[t] == pytest.approx(error.item() / 2 - 1, abs=1e-9)
    with torch.no_grad():
        for (name, a), b in zip(reference.encoder.state_dict().items(), model.encoder.state_dict().values()):
            if "running" in name or "num_batches" in name:
                assert torch.allclose(a.double(), b.double(), atol=1e-9), name    # computing eta left no mark on them


@pytest.fixture
def world_of_one():
    simsiam.join_world(CPU)
    yield
    torch.distributed.destroy_process_group()


def test_sec52_moving_average_of_eta(world_of_one):
    """Two visits of the same images, against the formula in numpy; the first initialises."""
    store, kept = simsiam.Spread(6, 5, CPU), np.zeros((6, 5))
    store.mine = store.mine.double()
    for visit, index in enumerate((np.array([4, 1, 0]), np.array([1, 5, 4]))):
        p1, p2, z1, z2 = vectors(3, 5, seed=visit)
        (_, objective), = simsiam.average([(index, None)], store, 0.8)
        L = objective(p1, p2, z1, z2)
        v1, v2 = (v.detach().numpy() / np.linalg.norm(v.detach().numpy(), axis=1, keepdims=True) for v in (z1, z2))
        eta1, eta2 = 0.8 * kept[index] + 0.2 * v1, 0.8 * kept[index] + 0.2 * v2
        expected = (numpy_D(p1, torch.tensor(eta2)) + numpy_D(p2, torch.tensor(eta1))) / 2
        kept[index] = (eta1 + eta2) / np.linalg.norm(eta1 + eta2, axis=1, keepdims=True)
        assert L.item() == pytest.approx(expected, abs=1e-7)
        assert np.allclose(store.state_dict()["vectors"], kept, atol=1e-7)
        gradients = torch.autograd.grad(L, (p1, p2, z1, z2), allow_unused=True)
        assert gradients[0] is not None and gradients[2] is None                     # eta is a constant


def test_table1_a_is_the_moving_average_with_m_0(world_of_one):
    plain, losses = trained(lambda model, views, batches: simsiam.plain(views(batches), simsiam.loss), model=tiny_model_again())
    store = simsiam.Spread(40, 16, CPU)
    store.mine = store.mine.double()
    average, losses_0 = trained(lambda model, views, batches: simsiam.average(views(batches), store, 0.0), model=tiny_model_again())
    assert losses == pytest.approx(losses_0, abs=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain.parameters(), average.parameters()))
    assert torch.allclose(store.mine.norm(dim=1), torch.ones(40, dtype=torch.float64), atol=1e-6)
    kept, losses_8 = trained(lambda model, views, batches: simsiam.average(views(batches), simsiam.Spread(40, 16, CPU), 0.8), model=tiny_model_again())
    assert losses_8[:4] == pytest.approx(losses[:4], abs=1e-6) and losses_8[4] != pytest.approx(losses[4], abs=1e-4)   # from the second visit on


def tiny_model_again():
    torch.manual_seed(3)
    return tiny_model(width=1 / 8, predictor="none")


SPREAD = """
import sys
sys.path.insert(0, {here!r})
import numpy as np, torch, simsiam
device, rank, world = simsiam.join_world(torch.device("cpu"))
store, rng, seen = simsiam.Spread(11, 3, device), np.random.default_rng(0), []
for _ in range(6):
    index, vectors = rng.permutation(11)[:4], torch.from_numpy(rng.normal(size=(4, 3))).float()
    share = slice(rank * 4 // world, (rank + 1) * 4 // world)
    seen.append(simsiam.all_sum(store.get(index[share]).sum(dim=0)))
    store.put(index[share], vectors[share])
whole = store.state_dict()
if rank == 0:
    torch.save({{"seen": torch.stack(seen), **whole}}, sys.argv[1])
torch.distributed.barrier()
again = simsiam.Spread(11, 3, device)
again.load_state_dict(torch.load(sys.argv[1]))
assert torch.equal(again.mine, store.mine)
torch.distributed.destroy_process_group()
simsiam.leave(None)
"""


def test_eta_is_spread_over_the_processes_without_a_difference(tmp_path):
    script = tmp_path / "spread.py"
    script.write_text(SPREAD.format(here=str(HERE)))
    alone = subprocess.run([sys.executable, script, tmp_path / "one"], capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    both = torchrun(script, tmp_path / "two")
    assert both.returncode == 0, both.stderr
    one, two = torch.load(tmp_path / "one"), torch.load(tmp_path / "two")
    assert torch.equal(one["vectors"], two["vectors"]) and torch.allclose(one["seen"], two["seen"], atol=1e-6) and one["vectors"].abs().sum() > 0


@pytest.mark.parametrize("experiment", ["sec52-10-step", "sec52-moving-average"])
def test_experiments_of_sec52_do_the_same_in_two_processes(tmp_path, small, experiment):
    options = [small, *TINY, "--recipe", "cifar10", "--experiment", experiment, "--batch", "10", "--knn-every", "0", "--workers", "0"]
    assert here("simsiam.py", *options, "--out", tmp_path / "one") is None
    two = torchrun(HERE / "simsiam.py", *options, "--out", tmp_path / "two")
    assert two.returncode == 0, two.stderr
    one, two = ([(r["loss"], r["std"]) for r in log_of(tmp_path / name) if r["event"] == "epoch" and r["epoch"] > 0] for name in ("one", "two"))
    assert np.allclose(one, two, atol=2e-3) and len(one) == 3
    if "average" in experiment:
        eta = [torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)["eta"]["vectors"] for name in ("one", "two")]
        assert (eta[0] * eta[1]).sum(dim=1).min() > 0.95 and torch.allclose(eta[0].norm(dim=1), torch.ones(50), atol=1e-5)


@pytest.mark.parametrize("experiment, at", [("sec52-10-step", 13), ("sec52-1-epoch", 10), ("sec52-moving-average", 13)])
def test_interrupted_experiment_ends_with_the_uninterrupted_weights(tmp_path, small, monkeypatch, experiment, at):
    """Interrupted inside an inner loop: eta is computed again from theta^t."""
    options = [small, *TINY, "--recipe", "cifar10", "--experiment", experiment, "--batch", "6", "--knn-every", "0", "--save-minutes", "0", "--workers", "0"]
    assert here("simsiam.py", *options, "--out", tmp_path / "whole") is None
    step, done = simsiam.train_step, []

    def interrupted(*arguments):
        if len(done) == at:
            raise KeyboardInterrupt
        done.append(1)
        return step(*arguments)

    monkeypatch.setattr(simsiam, "train_step", interrupted)
    assert "interrupted" in here("simsiam.py", *options, "--out", tmp_path / "parts")
    checkpoint = torch.load(tmp_path / "parts/checkpoint.pth", weights_only=True)
    assert checkpoint["epoch"] * 8 + checkpoint["step"] == (8 if "average" in experiment else at)
    monkeypatch.undo()
    assert here("simsiam.py", *options, "--out", tmp_path / "parts", "--resume") is None
    assert equal(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))


# ---------------------------------------------------------------------------------------------------------------------
# lineval.py: the layer and its optimisation
# ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lars_is_its_formula_step_by_step(weight_decay):
    """In float64, over steps at different lrs: a weight, a bias that starts at 0, and a tensor without gradient."""
    torch.manual_seed(0)
    w = [torch.nn.Parameter(t) for t in (torch.randn(4, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.float64),
                                         torch.ones(2, dtype=torch.float64))]
    ours, velocity = [p.detach().numpy().copy() for p in w], [0.0, 0.0, 0.0]
    optimizer = lineval.LARS(w, lr=0.0, momentum=0.9, weight_decay=weight_decay)
    for lr in (1.6, 0.8, 0.3, 0.1):
        gradients = [np.random.default_rng(int(10 * lr)).normal(size=p.shape) * (k != 2) for k, p in enumerate(ours)]
        for k, g in enumerate(gradients):
            w[k].grad = torch.from_numpy(g.copy())
            norm, grad_norm = math.sqrt((ours[k] ** 2).sum()), math.sqrt((g ** 2).sum())
            if norm > 0 and grad_norm > 0:
                g = 0.001 * norm / (grad_norm + weight_decay * norm + 1e-8) * (g + weight_decay * ours[k])
            velocity[k] = 0.9 * velocity[k] + g
            ours[k] = ours[k] - lr * velocity[k]
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        assert all(np.allclose(p.detach().numpy(), q, rtol=1e-12, atol=1e-15) for p, q in zip(w, ours))
    assert abs(ours[1]).max() > 0 and (ours[2] == 1).all()           # the bias left 0; no gradient, no step


def test_linear_protocols_hold_the_papers_settings():
    assert lineval.PROTOCOLS["lars"] == {"base_lr": 0.1, "batch": 4096, "epochs": 90}
    assert lineval.PROTOCOLS["sgd"] == {"base_lr": 30, "batch": 256, "epochs": 100}
    assert lineval.DEFAULT == {"imagenet": "lars", "cifar10": "sgd", "shapes": "cached"}
    factors = [lineval.lr_factor("sgd", epoch * 7 + 6, 700) for epoch in range(100)]     # of the last step of every epoch
    assert factors == pytest.approx([1] * 60 + [0.1] * 20 + [0.01] * 20)
    assert [lineval.lr_factor("lars", t, 90) for t in (0, 30, 45, 90)] == pytest.approx([1, 0.75, 0.5, 0])
    layer = lineval.linear_layer(512, 1000)
    assert layer.weight.std().item() == pytest.approx(0.01, rel=0.02) and layer.weight.mean().abs() < 1e-4 and not layer.bias.any()
    for protocol, kind in (("lars", lineval.LARS), ("sgd", torch.optim.SGD)):
        optimizer = lineval.optimizer_for(protocol, layer)
        group, = optimizer.param_groups
        assert type(optimizer) is kind and group["momentum"] == 0.9 and group["weight_decay"] == 0 and len(group["params"]) == 2


def test_cached_fit_is_sgd_on_the_cross_entropy():
    """Against torch's own loss, gradient and optimiser, one classifier after the other, in float64."""
    torch.manual_seed(0)
    x, labels, lrs = torch.randn(50, 6, dtype=torch.float64), torch.randint(0, 4, (50,)), [0.03, 1.0]
    ours = lineval.fit(F.pad(x, (0, 1), value=1.0), labels, 4, lrs, epochs=3, batch=16, seed=5)
    for lr, w in zip(lrs, ours):
        layer = torch.nn.Linear(6, 4).double()
        torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        for epoch in range(3):
            order = augment.permutation(5, epoch, 50)
            for rows in (order[:16], order[16:32], order[32:48], order[48:]):        # the last, incomplete one too
                optimizer.zero_grad()
                F.cross_entropy(layer(x[rows]), labels[rows]).backward()
                optimizer.step()
                schedule.step()
        assert torch.allclose(w[:-1].T, layer.weight, atol=1e-12) and torch.allclose(w[-1], layer.bias, atol=1e-12)


def test_cached_protocol_judges_the_lr_on_training_images_that_the_fit_has_not_seen():
    torch.manual_seed(0)
    x, labels = torch.randn(200, 300), torch.randint(0, 2, (200,))                   # more dimensions than images: memorised
    layer, base_lr, lr, held_out = lineval.fit_cached(x, labels, 2, (0.01, 0.1), epochs=30, batch=20, seed=0)
    assert (layer(x).argmax(1) == labels).all() and max(held_out.values()) <= 75 and lr == base_lr * 20 / 256
    separable = torch.randn(200, 5)
    labels = (separable[:, 0] > 0).long()
    layer, base_lr, _, held_out = lineval.fit_cached(separable, labels, 2, (0.0, 1.0), epochs=10, batch=20, seed=0)
    assert base_lr == 1.0 == max(held_out, key=held_out.get)
    moved, *_ = lineval.fit_cached(7 * separable + 3, labels, 2, (0.0, 1.0), epochs=10, batch=20, seed=0)
    assert torch.allclose(moved(7 * separable + 3), layer(separable), atol=1e-3)     # standardised, and undone in the layer


def test_hits_and_accuracy_count_every_label_once():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(101, 12)), rng.integers(0, 12, 101)
    ranks = (-scores).argsort(axis=1)
    expected = [(ranks[:, :k] == labels[:, None]).any(axis=1).sum() for k in (1, 5)]
    assert simsiam.hits(torch.from_numpy(scores), torch.from_numpy(labels)).tolist() == expected
    assert simsiam.hits(torch.eye(3), torch.tensor([0, 1, 0])).tolist() == [2, 3]    # fewer than five classes


# ---------------------------------------------------------------------------------------------------------------------
# lineval.py: the backbone and its files
# ---------------------------------------------------------------------------------------------------------------------

def untrained(*shape):
    return lineval.untrained(*shape).network


RESNET18 = torchvision_names(2, (2, 2, 2, 2), 1)
MOCO_HEAD = {"fc.0.weight": (512, 512), "fc.0.bias": (512,), "fc.2.weight": (128, 512), "fc.2.bias": (128,)}


def filled(shapes, seed=0):
    """Tensors of these shapes with reproducible values: {name: tensor}; counters are integers."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) if shape else torch.tensor(7) for name, shape in shapes.items()}


def prefixed(prefix, state):
    return {prefix + name: t for name, t in state.items()}


def without(prefix, state):
    return {name: t for name, t in state.items() if not name.startswith(prefix)}


BACKBONE = without("fc.", filled(RESNET18))
def settings_of(recipe, **more):
    """What a run with this recipe keeps in its checkpoint."""
    return {name: values[simsiam.RECIPES.index(recipe)] for name, values in simsiam.SETTINGS.items()} | \
        {"recipe": recipe, "images": 5000, "seed": 0, "data": None, **more}


LAYOUTS = {
    "torchvision": filled(RESNET18),
    "torchvision before 0.4.1": {name: t for name, t in filled(RESNET18).items() if "num_batches" not in name},
    "backbone.pth": BACKBONE,
    "checkpoint.pth": {"format": 1, "epoch": 3, "step": 0, "model": prefixed("encoder.", BACKBONE) | {"predictor.3.bias": torch.ones(2)},
                       "settings": settings_of("imagenet", arch="resnet18")},
    "released": {"epoch": 100, "arch": "resnet18", "optimizer": {"state": {}, "param_groups": []}, "state_dict":
                 prefixed("module.encoder.", BACKBONE) | {"module.encoder.fc.0.weight": torch.ones(3, 512), "module.predictor.3.bias": torch.ones(2)}},
    "released without module": {"state_dict": prefixed("encoder.", BACKBONE) | {"encoder.fc.6.bias": torch.ones(3)}},
    "MoCo": {"epoch": 200, "state_dict": prefixed("module.encoder_q.", BACKBONE | filled(MOCO_HEAD)) | {"module.queue": torch.ones(2, 2)}
             | prefixed("module.encoder_k.", filled(RESNET18, seed=1))},
    "DataParallel": {"state_dict": prefixed("module.", filled(RESNET18))},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_known_layout_gives_the_same_backbone(tmp_path, layout):
    torch.save(LAYOUTS[layout], tmp_path / "file.pth")
    network, shape, left_out, settings, epochs, sha256 = lineval.read_backbone(str(tmp_path / "file.pth"))
    assert shape == ("resnet18", 1.0, False) and (settings != {}) == (layout == "checkpoint.pth") and len(sha256) == 64
    assert epochs == {"checkpoint.pth": 3, "released": 100, "MoCo": 200}.get(layout)
    expected = BACKBONE if "0.4.1" not in layout else {k: torch.tensor(0) if "num_batches" in k else t for k, t in BACKBONE.items()}
    assert equal(network.state_dict(), expected)
    kept = {"torchvision": ["fc.weight", "fc.bias"], "MoCo": 4 + 1 + 122, "released": ["module.encoder.fc.0.weight", "module.predictor.3.bias"],
            "checkpoint.pth": ["predictor.3.bias"], "backbone.pth": []}.get(layout)
    assert kept in (None, list(left_out), len(left_out))


def test_the_network_is_recognised_from_the_tensors(tmp_path):
    for arch, width, stem in (("resnet34", 1 / 8, True), ("resnet50", 1 / 16, False), ("resnet18", 1 / 3, False)):
        network = untrained(arch, width, stem)
        torch.save(network.state_dict(), tmp_path / "file.pth")
        again, shape, *_ = lineval.read_backbone(str(tmp_path / "file.pth"), width if width == 1 / 3 else None)
        assert shape == (arch, pytest.approx(width), stem) and equal(again.state_dict(), network.state_dict())


def test_a_flipped_byte_is_found_wherever_it_is(tmp_path):
    path = tmp_path / "file.pth"
    torch.save(untrained("resnet18", 1 / 64, True).state_dict(), path)
    whole, content = path.read_bytes(), torch.load(path, weights_only=True)
    refused = 0
    for place in np.random.default_rng(0).integers(0, len(whole), 300):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << int(place) % 8]) + whole[place + 1:])
        try:
            assert equal(simsiam.read(path), content), place          # padding and time stamps may change: nothing else
        except augment.Refused:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("name", ["conv1.weight", "layer1.0.bn1.running_var", "bn1.num_batches_tracked"])
def test_a_backbone_that_changed_is_an_error(name):
    network = untrained("resnet18", 1 / 16, True)
    loaded = lineval.fingerprint(network)
    lineval.check_frozen(network, loaded)
    t = network.state_dict()[name]
    t.copy_(torch.nextafter(t, t + 1) if t.is_floating_point() else t + 1)           # the last bit
    with pytest.raises(augment.Refused, match=name.replace(".", r"\.") + r"; 1 tensors"):
        lineval.check_frozen(network, loaded)


def test_neighbors_are_the_nearest_and_framed_by_class(tmp_path):
    def source(colours, labels):
        pixels = torch.tensor(colours, dtype=torch.uint8).view(-1, 3, 1, 1).expand(-1, 3, 8, 8).contiguous()
        return augment.Source(pixels=pixels, labels=np.array(labels), classes=["one", "two"])

    train = source([(200, 0, 0), (0, 200, 0), (0, 0, 200)], [0, 1, 0])
    val = source([(9, 9, 9), (99, 99, 99)], [1, 0])
    bank = torch.tensor([[1.0, 0.0], [0.0, 5.0], [3.0, 3.0]])
    queries = torch.tensor([[0.1, 1.0], [2.0, 0.1]])
    lineval.draw_neighbors(tmp_path / "n.png", train, val, bank, queries, columns=3, tile=20)
    sheet = np.array(Image.open(tmp_path / "n.png"))
    cell, right, wrong = 32, (42, 157, 58), (214, 39, 40)
    seen = [[(tuple(sheet[48 * row + 16, left + 16]), tuple(sheet[48 * row + 4, left + 16])) for left in (0, cell + 12, 2 * cell + 12, 3 * cell + 12)]
            for row in range(2)]
    red, green, blue = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    assert seen[0] == [((99, 99, 99), (0, 0, 0)), (red, right), (blue, right), (green, wrong)]      # of class one, by the cosine
    assert seen[1] == [((9, 9, 9), (0, 0, 0)), (green, right), (blue, wrong), (red, wrong)]


# ---------------------------------------------------------------------------------------------------------------------
# lineval.py: the program
# ---------------------------------------------------------------------------------------------------------------------

def here(script, *arguments):
    """Run a script's program in this process: its lineval.json or None, and what it says when it gives up or None."""
    run, parse = {"lineval.py": (lineval.evaluate, lineval.parse), "simsiam.py": (simsiam.pretrain, simsiam.parse)}[script]
    try:
        return simsiam.launch(script, run, parse([str(a) for a in arguments]))
    except SystemExit as end:
        return str(end.code)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    """A labelled folder with ten classes: 80 training and 37 validation images."""
    folder = tmp_path_factory.mktemp("data") / "ten"
    for split, start, count in (("train", 0, 80), ("val", 800, 37)):
        shapes = augment.draw_shapes(3, start, count, 16)
        for i in range(count):
            path = folder / split / shapes.classes[shapes.labels[i]] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(shapes.image(i).numpy()).save(path)
    return folder


def result_of(folder):
    return json.loads((folder / "lineval.json").read_text())


@pytest.mark.parametrize("protocol", ["--sgd --epochs 3 --batch 10", "--lars --epochs 3 --batch 30", "--cached --epochs 5"])
def test_two_processes_give_the_accuracy_of_one_and_of_a_count(tmp_path, ten, protocol):
    """37 validation images divide by neither 2 nor the batch. The count: the saved classifier on the saved features, in numpy."""
    arguments = [ten, "--ckpt", "random:resnet18", "--width", "1/16", *protocol.split()]
    assert here("lineval.py", *arguments, "--out", tmp_path / "one", "--features", tmp_path / "f.npz") is None
    two = torchrun(HERE / "lineval.py", *arguments, "--out", tmp_path / "two")
    assert two.returncode == 0, two.stderr
    one, two = result_of(tmp_path / "one"), result_of(tmp_path / "two")
    classifier = torch.load(tmp_path / "one/classifier.pth", weights_only=True)
    saved = np.load(tmp_path / "f.npz")
    logits = saved["val_features"] @ classifier["weight"].numpy().T + classifier["bias"].numpy()
    rank = (logits > logits[np.arange(37), saved["val_labels"]][:, None]).sum(axis=1)
    assert [one["top1"], one["top5"]] == pytest.approx([100 * np.mean(rank < k) for k in (1, 5)])
    assert (two["top1"], two["top5"], two["val_images"], two["world"]) == (one["top1"], one["top5"], 37, 2)
    assert one["top5"] > one["top1"] > 0


def test_evaluation_writes_what_it_says(tmp_path, ten):
    backbone = untrained("resnet18", 1 / 16, True)
    torch.save(backbone.state_dict(), tmp_path / "b.pth")
    assert here("lineval.py", ten, "--ckpt", tmp_path / "b.pth", "--cached", "--epochs", "2", "--features", tmp_path / "f.npz") is None
    out = tmp_path / "lineval-cached"                                  # beside the checkpoint
    assert sorted(p.name for p in out.iterdir()) == ["classifier.pth", "lineval.json", "neighbors.png"]
    result = result_of(out)
    assert result["sha256"] == hashlib.sha256((tmp_path / "b.pth").read_bytes()).hexdigest() and result["backbone"] == str(tmp_path / "b.pth")
    assert (result["protocol"], result["images"], result["val_images"], result["classes"], result["seed"], result["data"]) == \
        ("cached", 80, 37, 10, 0, str(ten)) and result["epochs"] == 2 and result["lr"] == pytest.approx(result["base_lr"])
    assert result["note"].startswith("NOT the paper's protocol")
    classifier = torch.load(out / "classifier.pth", weights_only=True)
    assert classifier["note"] == result["note"] and classifier["classes"] == augment.open_data(ten)[0].classes
    saved, sources = np.load(tmp_path / "f.npz"), augment.open_data(ten)
    mean, std = (np.array(simsiam.SETTINGS[name][1]).reshape(3, 1, 1) for name in ("mean", "std"))
    backbone.eval()
    for split, source in zip(("train", "val"), sources):
        assert (saved[f"{split}_labels"] == source.labels).all() and (saved[f"{split}_files"] == source.files).all()
        with torch.no_grad():
            expected = backbone.features(torch.tensor((source.pixels.numpy() / 255 - mean) / std).float()).numpy()
        assert np.allclose(saved[f"{split}_features"], expected, atol=1e-5)
    assert here("lineval.py", ten, "--ckpt", tmp_path / "b.pth", "--cached").endswith("another folder with --out")


def test_checkpoint_says_data_and_protocol_and_knn_is_the_monitors(tmp_path, finished, small):
    out, _ = finished
    assert here("lineval.py", "--ckpt", out / "checkpoint.pth", "--knn", "--out", tmp_path / "knn") is None
    assert result_of(tmp_path / "knn")["top1"] == pytest.approx(log_of(out)[-2]["knn"]) and result_of(tmp_path / "knn")["data"] == str(small)
    assert here("lineval.py", "--ckpt", out / "checkpoint.pth", "--out", tmp_path / "d", "--epochs", "2", "--batch", "9") is None
    result, log = result_of(tmp_path / "d"), log_of(tmp_path / "d")
    assert result["protocol"] == "sgd" and result["recipe"] == "cifar10" and result["size"] == 16
    assert [r["event"] for r in log] == ["start", "epoch", "epoch", "end"] and log[2]["step"] == 10
    assert (result["top1"], result["top5"]) == (log[2]["top1"], log[2]["top5"])      # the last epoch's
    assert result["best_epoch_not_the_result"]["top1"] == max(log[1]["top1"], log[2]["top1"])


def test_a_backbone_that_is_not_frozen_gives_no_number(tmp_path, ten, monkeypatch):
    whole = resnet.ResNet.features
    monkeypatch.setattr(resnet.ResNet, "features", lambda self, x: whole(self.train(), x))
    said = here("lineval.py", ten, "--ckpt", "random:resnet18", "--width", "1/16", "--knn", "--out", tmp_path / "run")
    assert "has changed during the evaluation (" in said and "running_mean" in said and not (tmp_path / "run/lineval.json").exists()


def test_killed_and_resumed_evaluation_ends_with_the_uninterrupted_layer(tmp_path, large):
    torch.save(untrained("resnet18", 1 / 16, False).state_dict(), tmp_path / "b.pth")

    def command(folder, *more):
        return [sys.executable, str(HERE / "lineval.py"), str(large), "--ckpt", str(tmp_path / "b.pth"), *"--lars --epochs 8 --batch 2".split(),
                *"--save-minutes 0 --workers 1".split(), "--out", str(tmp_path / folder), *more]

    subprocess.run(command("whole"), check=True, capture_output=True)
    position = kill_when(command("killed"), tmp_path / "killed", epoch=2)
    assert 0 < position["step"] < 10 and position["epoch"] < 5, "the kill came at a moment that shows nothing"
    again = subprocess.run(command("killed", "--resume"), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert equal(weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed"))
    key = [[(r["epoch"], r["step"], r["loss"], r["lr"], r["top1"]) for r in log_of(tmp_path / folder) if r["event"] == "epoch"]
           for folder in ("whole", "killed")]
    assert key[0] == key[1] and result_of(tmp_path / "killed")["top1"] == key[0][-1][-1]


def change(state, **tensors):
    """A state_dict with some tensors replaced, added or, by None, taken away."""
    return {name: t for name, t in (state | tensors).items() if t is not None}


TINY_BACKBONE = untrained("resnet18", 1 / 16, True).state_dict()
BAD_FILES = {
    "missing.pth": None,
    "truncated.pth": lambda whole: whole[:len(whole) // 2],
    "flipped.pth": lambda whole: whole[:len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1:],
    "text.pth": lambda whole: b"not a checkpoint",
    "code.pth": {"state_dict": Hostile(os.system, ("touch HACKED",))},
    "tensor.pth": torch.ones(3),
    "words.pth": {"model": {"conv1.weight": "a word"}},
    "no_state.pth": {"state_dict": 5},
    "projector.pth": {"state_dict": {"module.encoder.fc.0.weight": torch.ones(2, 2)}},
    "deep.pth": change(TINY_BACKBONE, **{"layer3.2.conv1.weight": torch.ones(1)}),
    "without.pth": change(TINY_BACKBONE, **{"layer2.0.bn1.running_var": None}),
    "with.pth": change(TINY_BACKBONE, **{"layer2.0.se.weight": torch.ones(1)}),
    "counter.pth": change(TINY_BACKBONE, **{"bn1.num_batches_tracked": None}),
    "flat.pth": change(TINY_BACKBONE, **{"conv1.weight": torch.ones(3)}),
    "negative.pth": change(TINY_BACKBONE, **{"bn1.running_var": -torch.ones(4)}),
    "wide.pth": change(TINY_BACKBONE, **{"layer4.1.conv2.weight": torch.ones(64, 64, 3, 3)}),
    "nan.pth": change(TINY_BACKBONE, **{"bn1.bias": torch.full((4,), math.nan)}),
    "good.pth": TINY_BACKBONE,
}
LINEVAL_REFUSALS = [
    (["{ten}", "--ckpt", "{files}/missing.pth"], "missing.pth: no such file"),
    (["{ten}", "--ckpt", "{files}/truncated.pth"], "truncated.pth: can't be read"),
    (["{ten}", "--ckpt", "{files}/flipped.pth"], "fails its checksum"),
    (["{ten}", "--ckpt", "{files}/text.pth"], "nothing that torch.save wrote"),
    (["{ten}", "--ckpt", "{files}/code.pth"], "it names posix.system, code that no file of weights needs"),
    (["{ten}", "--ckpt", "{files}/tensor.pth"], "it holds a Tensor, not named tensors"),
    (["{ten}", "--ckpt", "{files}/words.pth"], "conv1.weight in it is a str, not a plain tensor"),
    (["{ten}", "--ckpt", "{files}/no_state.pth"], "not a file of weights"),
    (["{ten}", "--ckpt", "{files}/projector.pth"], "no ResNet in it"),
    (["{ten}", "--ckpt", "{files}/deep.pth"], "(2, 2, 3, 2) blocks, as none of resnet18"),
    (["{ten}", "--ckpt", "{files}/without.pth"], "lacks layer2.0.bn1.running_var"),
    (["{ten}", "--ckpt", "{files}/with.pth"], 'Unexpected key(s) in state_dict: "layer2.0.se.weight"'),
    (["{ten}", "--ckpt", "{files}/counter.pth"], "lacks bn1.num_batches_tracked"),
    (["{ten}", "--ckpt", "{files}/flat.pth"], "conv1.weight is (3,), no convolution"),
    (["{ten}", "--ckpt", "{files}/wide.pth"], "size mismatch for layer4.1.conv2.weight"),
    (["{ten}", "--ckpt", "{files}/good.pth", "--width", "1/8"], "size mismatch for conv1.weight"),
    (["{ten}", "--ckpt", "{files}/nan.pth"], "bn1.bias has values that are not finite"),
    (["--ckpt", "{files}/good.pth"], "doesn't say what it was trained on; name the DATA"),
    (["{ten}", "--ckpt", "random:vgg16"], "nor one of random:resnet18"),
    (["{ten}/train", "--ckpt", "random:resnet18"], "needs labels: train/<class>/... and val/<class>/..."),
    (["{odd}", "--ckpt", "random:resnet18"], "not in one of the 10 class folders of train/"),
    (["{ten}", "--ckpt", "random:resnet18", "--lars"], "--batch 4096: the data has only 80 images"),
    (["{ten}", "--ckpt", "random:resnet18", "--knn", "--epochs", "3"], "--epochs: --knn trains nothing"),
    (["{ten}", "--ckpt", "random:resnet18", "--width", "1/1000"], "--width 0.001: from 0.015625 to 64"),
    (["{ten}", "--ckpt", "random:resnet18", "--sgd", "--epochs", "0"], "--epochs 0: from 1"),
    (["{ten}", "--ckpt", "random:resnet18", "--sgd", "--batch", "8", "--resume"], "nothing to resume"),
    (["{ten}", "--ckpt", "random:resnet18", "--cached", "--resume"], "--cached is not done in parts"),
    (["{ten}", "--ckpt", "random:resnet18", "--knn", "--features", "{files}/good.pth"], "good.pth: exists already"),
    (["--ckpt", "random:resnet18", "--export", "torchvision"], "no such file"),
    (["{ten}", "--ckpt", "{files}/good.pth", "--cached", "--knn"], "not allowed with argument"),
    (["{ten}"], "--ckpt"),
]


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory, ten):
    folder = tmp_path_factory.mktemp("files")
    torch.save(TINY_BACKBONE, folder / "good.pth")
    whole = (folder / "good.pth").read_bytes()
    for name, content in BAD_FILES.items():
        if callable(content):
            (folder / name).write_bytes(content(whole))
        elif content is not None:
            torch.save(content, folder / name)
    odd = folder / "odd"
    for split, kind in (("train", "disc"), ("val", "disc"), ("val", "mystery")):
        (odd / split / kind).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(odd / split / kind / "0.png")
    for kind in augment.OBJECTS:
        (odd / "train" / kind).mkdir(exist_ok=True)
    return folder


@pytest.mark.parametrize("arguments, message", LINEVAL_REFUSALS)
def test_evaluation_of_what_cannot_be_evaluated_is_refused_in_one_line(tmp_path, monkeypatch, ten, bad_files, arguments, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(bad_files.rglob("*"))
    said = here("lineval.py", *(a.format(ten=ten, files=bad_files, odd=bad_files / "odd") for a in arguments))
    assert said is not None and message in said and said.startswith("lineval.py: ") and said.count("\n") == 0, said
    assert list(tmp_path.iterdir()) == [] and sorted(bad_files.rglob("*")) == before


def test_a_refusal_ends_the_program_under_torchrun_too(tmp_path, bad_files):
    out = torchrun(HERE / "lineval.py", "--ckpt", bad_files / "flipped.pth", cwd=tmp_path)
    assert out.returncode != 0 and out.stderr.count("fails its checksum") == 1 and list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Going in and out: --export, --init
# ---------------------------------------------------------------------------------------------------------------------

def released_names(state):
    """What the authors' checkpoint of this backbone and RELEASED_HEADS is called, in order, spelled out."""
    heads = list(RELEASED_HEADS)
    heads.insert(heads.index("encoder.fc.6.weight") + 1, "encoder.fc.6.bias")
    return [f"module.encoder.{name}" for name in state if not name.startswith("fc.")] + [f"module.{name}" for name in heads]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model of the released heads on a narrow ResNet-50, as checkpoint.pth, and both exports of it."""
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    model = simsiam.SimSiam("resnet50", width=1 / 64, dim=6, pred_dim=3, proj_hidden=5)
    for t in model.state_dict().values():
        if t.is_floating_point():
            t.add_(torch.rand_like(t))
    torch.save({"format": 1, "model": model.state_dict(), "epoch": 6, "step": 9, "settings": settings_of("imagenet", width=1 / 64)},
               folder / "checkpoint.pth")
    for layout in ("torchvision", "released"):
        assert here("lineval.py", "--ckpt", folder / "checkpoint.pth", "--export", layout) is None
    return folder, model


def test_exports_have_the_literal_names_of_their_layouts(exported):
    folder, model = exported
    names = torchvision_names(3, (3, 4, 6, 3), 4)
    ours = model.state_dict()
    state = torch.load(folder / "resnet50-torchvision.pth", weights_only=True)
    assert list(state) == [name for name in names if not name.startswith("fc.")]
    assert all(torch.equal(t, ours[f"encoder.{name}"]) for name, t in state.items())
    content = torch.load(folder / "released.pth.tar", weights_only=True)
    state = content["state_dict"]
    assert content["arch"] == "resnet50" and content["epoch"] == 7 and sorted(state) == sorted(released_names(names))
    assert not state.pop("module.encoder.fc.6.bias").any()
    assert equal({name.removeprefix("module."): t for name, t in state.items()}, ours)
    assert "exists already" in here("lineval.py", "--ckpt", folder / "checkpoint.pth", "--export", "released")


def test_main_lincls_would_find_a_backbone_in_the_released_export(exported):
    """The authors' loader: keep module.encoder.* without its fc, drop the prefix, and miss nothing but fc."""
    folder, _ = exported
    state = torch.load(folder / "released.pth.tar", weights_only=True)["state_dict"]
    kept = {name[len("module.encoder."):]: t for name, t in state.items()
            if name.startswith("module.encoder") and not name.startswith("module.encoder.fc")}
    missing = resnet.resnet50(width=1 / 64).load_state_dict(kept, strict=False)
    assert sorted(missing.missing_keys) == ["fc.bias", "fc.weight"] and missing.unexpected_keys == []


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_init_folds_the_released_bias_into_the_running_mean(tmp_path, exported, small, prefix):
    folder, model = exported
    content = torch.load(folder / "released.pth.tar", weights_only=True)
    bias = torch.randn(6)
    content["state_dict"]["module.encoder.fc.6.bias"] = bias
    content["state_dict"] = {prefix + name.removeprefix("module."): t for name, t in content["state_dict"].items()}
    torch.save(content, tmp_path / "released.pth.tar")
    said = here("simsiam.py", small, *shlex.split("--arch resnet50 --width 1/64 --no-cifar-stem --proj-layers 3 --proj-hidden 5 --dim 6 --pred-dim 3 "
                "--size 32 --batch 25 --epochs 1 --base-lr 0 --knn-every 0 --workers 0"), "--init", tmp_path / "released.pth.tar", "--out", tmp_path / "run")
    assert said is None
    after = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)["model"]
    assert all(torch.equal(after[name], t) for name, t in model.named_parameters())     # lr 0: as loaded
    state, *_ = simsiam.read_weights(str(tmp_path / "released.pth.tar"))
    simsiam.load_strictly(model, {name.removeprefix("module."): t for name, t in state.items()}, "")
    fc, x = model.eval().encoder.fc, torch.randn(9, 32)
    hidden = fc[:6](x)
    theirs = F.batch_norm(hidden @ fc[6].weight.T + bias, content["state_dict"][prefix + "encoder.fc.7.running_mean"], fc[7].running_var)
    assert torch.allclose(fc(x), theirs, atol=1e-5)


def test_init_refuses_what_does_not_fit(tmp_path, exported, small):
    folder, _ = exported
    said = here("simsiam.py", small, *TINY, "--init", folder / "released.pth.tar", "--out", tmp_path / "run")
    assert "doesn't fit the network asked for" in said and said.count("\n") == 0 and not (tmp_path / "run").exists()


def test_features_that_are_not_finite_give_no_number(tmp_path, ten, bad_files):
    said = here("lineval.py", ten, "--ckpt", bad_files / "negative.pth", "--knn", "--out", tmp_path / "run")
    assert "its features are not all finite" in said and not (tmp_path / "run/lineval.json").exists()


@slow
def test_linear_evaluation_of_the_shapes_run_beats_the_untrained_network(tmp_path):
    """The README's first two commands, as they stand."""
    for command in ("simsiam.py", "lineval.py --ckpt runs/shapes/checkpoint.pth", "lineval.py --ckpt random:resnet18"):
        script, *arguments = command.split()
        subprocess.run([sys.executable, HERE / script, *arguments], cwd=tmp_path, check=True, capture_output=True)
    trained, untrained = (result_of(tmp_path / "runs" / name / "lineval-cached") for name in ("shapes", "shapes-random-resnet18"))
    assert trained["top1"] >= untrained["top1"] + 20


# ---------------------------------------------------------------------------------------------------------------------
# The map from the paper to the code. A tag that trails a line of code claims that the line is the equation
# ---------------------------------------------------------------------------------------------------------------------

CLAIMED = [*(f"Eq. ({n})" for n in range(1, 12)), "Alg. 1", "Sec. 3 (lr)", "Sec. 3 (schedule)", "Sec. 4.1 (std)", "Sec. 4.2 (no h)", "Sec. 4.5",
           "Sec. 4.6", "Sec. 5.1 (h)",
           "Sec. 5.2 (k-step)", "Sec. 5.2 (moving average)", "LARS Alg. 1"]
TAG = re.compile(r"# ((?:LARS )?(?:Eq|Alg|Sec)\. [\d.()]+(?: \([\w -]+\))?): ")
MUTANTS = {  # tag: (what the line has, what a wrong one has)
    "Eq. (1)": ("-(l2", "(l2"), "Eq. (2)": ("D(p2, z1)", "D(p2, z2)"), "Sec. 4.2 (no h)": ("nn.Identity()", "nn.ReLU()"),
    "Sec. 4.6": ("stopgrad(z2)", "stopgrad(z1)"), "Eq. (3)": ("z.detach()", "z"), "Eq. (4)": ("stopgrad(z1)", "stopgrad(z2)"), "Alg. 1": ("optimizer.step()", "pass"),
    "Sec. 3 (lr)": ("256", "512"), "Sec. 3 (schedule)": ("math.pi", "2 * math.pi"), "Sec. 4.1 (std)": (".sqrt()", ""), "Sec. 4.5": ("log_softmax", "softmax"),
    "Sec. 5.1 (h)": ("h(z_i)", "z_i"), "Eq. (7)": ("eta1, eta2)  ", "eta2, eta1)  "), "Eq. (10)": ("next(views)[1]", "next(views)[1][::-1]"),
    "Eq. (11)": ("yield x", "yield x[:1] * 2"), "Sec. 5.2 (k-step)": ("towards(eta1, eta2)", "towards(eta2, eta1)"),
    "Sec. 5.2 (moving average)": ("(1 - m)", "m"), "LARS Alg. 1": ("rate = self.trust * norm", "rate = self.trust")}


def claims():
    """[(tag, file, line number, the test named after it)], found by tokenizing the sources."""
    found = []
    for name in ("simsiam.py", "lineval.py", "augment.py", "resnet.py", "test_simsiam.py"):
        with open(HERE / name, "rb") as f:
            for token in tokenize.tokenize(f.readline):
                match = token.type == tokenize.COMMENT and TAG.match(token.string)
                if match and not token.line.lstrip().startswith("#"):
                    found.append((match[1], name, token.start[0], named_after(match[1])))
    return sorted(found, key=lambda claim: CLAIMED.index(claim[0]) if claim[0] in CLAIMED else -1)


def named_after(tag):
    """Eq. (4) -> the one test whose name begins with test_eq04, Sec. 4.1 (std) -> with test_sec41_std, and so on."""
    stem = re.sub(r"[^a-z0-9]+", "_", tag.lower().replace("k-step", "kstep")).strip("_").replace("alg_1", "alg1").replace("lars_alg1", "lars")
    stem = re.sub(r"^eq_(\d+)$", lambda m: f"eq{int(m[1]):02}", stem)
    stem = re.sub(r"^sec_(\d)(?:_(\d)(?!\d))?", lambda m: "sec" + m[1] + (m[2] or ""), stem)
    fitting = [name for name in globals() if name.startswith(f"test_{stem}_")]
    return fitting[0] if len(fitting) == 1 else f"{len(fitting)} tests called test_{stem}_..."


def test_every_equation_is_claimed_by_one_line_and_one_test():
    found = claims()
    assert [tag for tag, *_ in found] == CLAIMED
    assert all(test in globals() for *_, test in found), found
    assert {tag for tag, name, *_ in found if name != "test_simsiam.py"} == MUTANTS.keys()


def paper_map():
    """The README's table, from the claims."""
    rows = [f"| {tag} | [{name}:{line}]({name}#L{line}) | `{test}` |" for tag, name, line, test in claims()]
    return "\n".join(["| in the paper | line | test |", "|---|---|---|", *rows]) + "\n"


def test_readme_has_the_map_of_the_sources():
    assert paper_map() in (HERE / "README.md").read_text(), "python test_simsiam.py writes it anew"


def mutant(tag):
    """The module that claims this tag, with its line made wrong. -> name, module"""
    (_, name, number, _), = (claim for claim in claims() if claim[0] == tag)
    lines = (HERE / name).read_text().splitlines(keepends=True)
    right, wrong = MUTANTS[tag]
    assert lines[number - 1].count(right) >= 1, (tag, right)
    lines[number - 1] = lines[number - 1].replace(right, wrong, 1)
    module = types.ModuleType(name.removesuffix(".py"))
    module.__file__ = str(HERE / name)
    exec(compile("".join(lines), f"a mutant of {name}", "exec"), module.__dict__)
    return module.__name__, module


@pytest.mark.parametrize("tag", MUTANTS)
def test_a_mutant_of_every_claimed_line_dies_in_its_test(tag, monkeypatch, request):
    test = globals()[named_after(tag)]
    marks = [mark.args for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    arguments = {marks[0][0]: marks[0][1][0]} if marks else {}
    if "world_of_one" in inspect.signature(test).parameters:
        arguments["world_of_one"] = request.getfixturevalue("world_of_one")
    name, module = mutant(tag)                                           # outside what is expected to fail
    test(**arguments)
    monkeypatch.setitem(globals(), name, module)
    with pytest.raises(AssertionError):
        test(**arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Shape comments: every `name = ...  # (N, d)` is executed, within each function call with one meaning for each letter
# ---------------------------------------------------------------------------------------------------------------------

DIMS = r"\((\w+(?: [+] \w+)?(?:, *\w+(?: [+] \w+)?)*),?\)"
SHAPE = re.compile(rf"# (?:[\w, ]+, |\([\w, ]+\) -> )?{DIMS}(?: each)?(?:: .*)?$")


def check_shape(seen, place, values, letters, scope):
    """Bind the letters of a shape comment that are not bound yet, and compare."""
    for value in values if isinstance(values, tuple) else (values,):
        dims = [dim.strip() for dim in SHAPE.search(place[2])[1].split(",")]
        known = {name: v for name, v in scope.items() if isinstance(v, (int, np.integer))} | letters
        for dim, size in zip(dims, value.shape):
            letter, _, more = dim.partition(" + ")
            if not letter.isdigit() and letter not in known:
                known[letter] = letters[letter] = size - int(more or 0)
        assert tuple(value.shape) == tuple(eval(dim, {}, known) for dim in dims), place
    seen.add(place)


class Instrument(ast.NodeTransformer):
    """After each assignment with a shape comment, a call of check_shape; at each function's start, its letters."""

    def __init__(self, name, lines):
        self.name, self.lines, self.places = name, lines, set()

    def visit_Assign(self, node):
        line = self.lines[node.end_lineno - 1]
        if not SHAPE.search(line):
            return node
        self.places.add(place := (self.name, node.end_lineno, line))
        return [node, ast.parse(f"_check_shape({place!r}, ({ast.unparse(node.targets[0])}), _letters, locals())").body[0]]

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        node.body[:0] = ast.parse("_letters = {}").body
        return node


def instrumented(name, seen):
    """A module of ours, its shape comments made assertions -> module, the places of the comments"""
    text = (HERE / f"{name}.py").read_text()
    transformer = Instrument(name, text.splitlines())
    module = types.ModuleType(name)
    module.__file__, module._check_shape = str(HERE / f"{name}.py"), functools.partial(check_shape, seen)
    exec(compile(ast.fix_missing_locations(transformer.visit(ast.parse(text))), name, "exec"), module.__dict__)
    return module, transformer.places


def test_shape_comments_are_what_happens(tmp_path, monkeypatch, ten, large):
    seen, places = set(), set()
    for name in ("augment", "simsiam", "lineval"):
        module, found = instrumented(name, seen)
        places |= found
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(globals(), name, module)
    assert collections.Counter(name for name, *_ in places) == {"augment": 18, "simsiam": 5, "lineval": 3}
    assert here("simsiam.py", ten, *TINY, "--epochs", "1", "--workers", "0", "--out", tmp_path / "small") is None
    assert here("simsiam.py", large, *TINY, "--recipe", "imagenet", "--epochs", "1", "--workers", "0", "--size", "24", "--out", tmp_path / "large") is None
    assert here("lineval.py", ten, "--ckpt", tmp_path / "small/checkpoint.pth", "--cached", "--epochs", "1", "--workers", "0") is None
    simsiam.join_world(CPU)
    simsiam.SyncBatchNorm(5)(torch.randn(4, 5, 2, 2))
    torch.distributed.destroy_process_group()
    assert places == seen


# ---------------------------------------------------------------------------------------------------------------------
# The README
# ---------------------------------------------------------------------------------------------------------------------

def test_readme_commands_parse():
    text = (HERE / "README.md").read_text()
    assert len(text.splitlines()) <= 235
    commands = [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    for script, parse in (("simsiam.py", simsiam.parse), ("lineval.py", lineval.parse)):
        ours = [shlex.split(c.split(script, 1)[1]) for c in commands if script in c]
        assert len(ours) >= 5
        for arguments in ours:
            with pytest.raises(SystemExit, match="^$") if "list" in arguments else contextlib.nullcontext():
                parse(arguments)


def test_readmes_first_command_runs(tmp_path):
    """As it stands, for an epoch; the slow tests run it to its end."""
    first = re.search(r"## Quick start.*?```bash\n(.*?)\n", (HERE / "README.md").read_text(), re.S)[1]
    assert first == "python simsiam.py"
    with subprocess.Popen([sys.executable, "-u", HERE / "simsiam.py"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        said = []
        for line in run.stdout:
            said.append(line)
            if line.startswith("epoch 1/24"):
                run.send_signal(signal.SIGINT)
    assert "; the same command with --resume goes on" in said[-1] and run.returncode == 128 + signal.SIGINT, said
    start, untrained, one = log_of(tmp_path / "runs/shapes")
    assert start["command"].endswith("simsiam.py") and one["epoch"] == 1 and one["loss"] < -0.1 and untrained["knn"] < start["knn_pixels"]


def test_readmes_figures_are_those_of_the_logs_in_results():
    text = (HERE / "README.md").read_text()
    for run in ("shapes", "shapes-intel", "shapes-intel-2", "shapes-fig2-without-stopgrad", "cifar10-width4"):
        start, first, *_, last, end = log_of(HERE / "results" / run)
        assert end["event"] == "end"
        for figure in (f"{last['loss']:.3f}", f"{last['std']:.2f}" * ("intel" not in run), f"{last['knn']:.1f}%", f"{first['knn']:.1f}%", f"{start['knn_pixels']:.1f}%"):
            assert figure in text, (run, figure)
    for evaluation in ("shapes-cached", "shapes-untrained-cached", "shapes-intel", "shapes-intel-2", "cifar10-width4-cached"):
        result = result_of(HERE / "results" / evaluation)
        assert f"{result['top1']:.1f}%" in text, evaluation
        if "cifar10-width4" in result["backbone"]:
            assert result["sha256"] == hashlib.sha256((HERE / "results/cifar10-width4/backbone.pth").read_bytes()).hexdigest()
    tables = (HERE / "results/README.md").read_text()  # these are quoted there only
    for evaluation in ("cifar10-width4-untrained-cached", "cifar10-width4-sgd", "cifar10-width4-lars", "cifar10-width4-knn"):
        result = result_of(HERE / "results" / evaluation)
        assert re.search(rf"^\| `{evaluation}` \|.*\| {result['top1']:.2f} \| {result['top5']:.2f} \|$", tables, re.M), evaluation
        if "cifar10-width4" in result["backbone"]:
            assert result["sha256"] == hashlib.sha256((HERE / "results/cifar10-width4/backbone.pth").read_bytes()).hexdigest()


def test_cifar10_page_is_made_of_the_logs_that_are_kept(monkeypatch):
    monkeypatch.chdir(HERE)
    page = (HERE / "results/cifar10.md").read_text()
    note = re.search(r"`results/cifar10`\. (.*?) Top-1 in percent", page)[1]
    assert runpy.run_path("results/cifar10.py")["page"](note, "results/cifar10") == page


def test_readmes_results_are_those_of_the_logs():
    rows = dict(re.findall(r"^\| `(small[\w-]*)`.*?(\| \d+ \|.*\|)$", (HERE / "README.md").read_text(), re.M))
    assert {"small", "small-decayed-predictor", "small-affine"} <= rows.keys()
    for name, cells in rows.items():
        runs = [HERE / "results/cifar10" / f"{name}-{seed}" for seed in range(3)]
        logs = [log_of(run) for run in runs]
        assert all(log[-1]["event"] == "end" and log[0]["settings"]["seed"] == seed for seed, log in enumerate(logs))
        assert cells.startswith(f"| {logs[0][-1]['epochs']} |")
        found = [[log[-2]["knn"] for log in logs]]
        for protocol in ("sgd", "lars", "cached"):
            results = [json.loads((run / f"lineval-{protocol}.json").read_text()) for run in runs if (run / f"lineval-{protocol}.json").exists()]
            assert all(r["val_images"] == 10_000 and r["protocol"] == protocol for r in results)
            found += [[r["top1"] for r in results]] if results else []
        for values in found:
            assert f"| {np.mean(values):.1f} +- {np.std(values, ddof=1):.1f} |" in cells, (name, values)


def test_reliability_figures_are_those_in_results():
    text = (HERE / "README.md").read_text()
    kills, fuzz = (json.loads((HERE / f"results/{name}.json").read_text()) for name in ("kills", "fuzz"))
    assert kills["ended with the uninterrupted weights"] == kills["runs"] and sum(kills["hits"].values()) == kills["kills"] >= 100
    assert kills["hits"]["writing a checkpoint"] >= 20 and kills["hits"]["in a step"] >= 20
    assert fuzz["images"].keys() | fuzz["checkpoints"].keys() == {"read", "refused"} and fuzz["whole program"].keys() == {"went on"}
    for figure in (f"{kills['kills']} kills", f"{kills['hits']['writing a checkpoint']} of them while a checkpoint was written", f"{kills['hits']['in a step']} in a step",
                   f"{sum(fuzz['images'].values()):,} damaged images", f"{sum(fuzz['checkpoints'].values()):,} damaged checkpoints",
                   f"{fuzz['checkpoints']['read']} of them unharmed"):
        assert figure in text, figure


def test_speed_figures_are_those_in_results():
    text = " ".join((HERE / "README.md").read_text().split())
    found = json.loads((HERE / "results/speed-cpu.json").read_text())
    files, memory = ({part: both[0] for part, both in found[what].items()} for what in ("photos", "in memory"))
    steps = {s["recipe"]: {name: v["images/s"] for name, v in s["variants"].items()} for r, s in found.items() if r.startswith("step of ")}
    for figure in (f"makes {files['decode and cut'] / files['all, by Pillow']:.2f} times", f"at {files['decode and cut'] / files['decode']:.2f} of",
                   f"it is still {files['all'] / files['all, by Pillow']:.2f} times", f"is {memory['all'] / memory['all, by Pillow']:.2f} times as fast",
                   *(f"{steps[recipe]['ours'] / steps[recipe]['plain']:.2f} {text}" for recipe, text in (("cifar10", "from channels_last"), ("imagenet", "with ResNet-50")))):
        assert figure in text, figure
    assert all(0.9 < step["ours, compiled"] / step["ours"] < 1.1 for step in steps.values())  # "nothing from --compile"


def test_readme_shows_the_algorithm_as_it_is():
    """The dozen lines of Algorithm 1 in the README run, and compute what simsiam.py computes."""
    text = (HERE / "README.md").read_text()
    listing = re.search(r"```python\n(# Algorithm 1.*?)```", text, re.S).group(1)
    torch.manual_seed(0)
    model, images = tiny_model(), torch.randn(2, 8, 3, 16, 16)
    reference = tiny_model()
    reference.load_state_dict(model.state_dict())
    optimizers = [simsiam.sgd(m, 0.9, 1e-4) for m in (model, reference)]
    for optimizer in optimizers:
        simsiam.set_lr(optimizer, 0.1, 0, 2, 0, "constant")
    scope = {"F": F, "f": model.encoder, "h": model.predictor, "optimizer": optimizers[0], "loader": [images]}
    views = iter(images)
    scope["augment"] = lambda x: next(views)
    exec(listing, scope)
    simsiam.train_step(reference, simsiam.loss, optimizers[1], torch.autocast("cpu", enabled=False), images)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(model.parameters(), reference.parameters()))


def test_line_budgets():
    budgets = {"resnet.py": 170, "augment.py": 840, "simsiam.py": 1340, "lineval.py": 485}
    assert {name: lines for name, lines in ((n, (HERE / n).read_text().count("\n")) for n in budgets) if lines > budgets[name]} == {}


if __name__ == "__main__":
    text = (HERE / "README.md").read_text()
    (HERE / "README.md").write_text(re.sub(r"\| in the paper \|.*?\n(?!\|)", lambda _: paper_map(), text, flags=re.S))
