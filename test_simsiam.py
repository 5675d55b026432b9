"""Tests: each compares the code with something independent of it (a float64 formula, Pillow, a closed form, a count).

    python -m pytest -q              the quick ones
    SLOW=1 python -m pytest -q       all
"""
import collections
import colorsys
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import pickle
import random
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import PIL
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter

import augment
import resnet
import simsiam

HERE = pathlib.Path(__file__).resolve().parent
REAL = HERE.parent / "shared" / "data"  # real images, where a folder with them lies beside the repository
CPU = torch.device("cpu")
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="slow: SLOW=1 python -m pytest")
real = pytest.mark.skipif(not REAL.is_dir(), reason="no real images beside the repository")


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
        worst, mean = differs(augment.cut_centre(augment.Policy(), torch.from_numpy(image), 0, 0)[0], expected)
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
    (lambda d: [write_folder(d, "train", 6, 16), (d / "train/a/000.png").write_bytes(b"nonsense")] and d, None)])
def test_data_that_cannot_be_used_is_refused_in_one_line(tmp_path, make, message):
    path = make(tmp_path)
    if message is None:  # an unreadable file among small ones: the source is there, the file is named when it is read
        train, _ = augment.open_data(path)
        with pytest.raises(augment.BadImage, match="000.png: can't be read as an image"):
            [train.image(i) for i in range(6)]
        return
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
    single = torch.stack([augment.cut_views(policy, 0, 2, source.image(i), 5, i) for i in index], dim=1)
    assert (batched.int() - single.int()).abs().max() <= 1


def test_file_list_is_one_buffer(large):
    files = augment.open_data(large)[0].files
    assert isinstance(files, np.ndarray) and files.dtype.kind == "S" and files.nbytes == 20 * len(bytes(files[0]))
    assert os.fsdecode(files[3]) == str(large / "train/a/009.jpg")


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
    mse = np.mean(np.sum((unit[0] - unit[1]) ** 2, axis=1))         # Eq. (1) is half of it, less a constant
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


def test_eq02_eq04_losses_and_their_gradients():
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


def test_lr_rule_and_schedule():
    assert simsiam.initial_lr(0.05, 512) == 0.1 and simsiam.initial_lr(0.05, 256) == 0.05
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
        expected.append(votes.argmax())
    got = simsiam.knn(torch.tensor(bank).float(), torch.tensor(labels), torch.tensor(queries).float(), 20, 0.1)
    assert got.tolist() == expected


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


def test_parity_with_the_released_model():
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
            L, z1, z2 = simsiam.train_step(model, simsiam.loss, optimizer, torch.autocast("cpu", enabled=False), x1, x2)
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
    L, z1, z2 = simsiam.train_step(network, simsiam.loss, optimizer, torch.autocast("cpu", enabled=False), x1.double(), x2.double())
    losses += [simsiam.all_sum(L).item() / world, simsiam.std(z1, simsiam.all_sum).item()]
if rank == 0:
    torch.save((model.state_dict(), losses), out)
torch.distributed.destroy_process_group()
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
        assert out.returncode == 0, out.stderr
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
    assert sorted(p.name for p in out.iterdir()) == ["backbone.pth", "checkpoint.pth", "curves.png", "log.jsonl", "views.png"]
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


def kill_when(command, folder, epoch):
    """Start a run, wait until its log shows `epoch`, and kill -9 everything when a checkpoint within the next epoch is there."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def position():
        try:
            return torch.load(folder / "checkpoint.pth", weights_only=True)
        except FileNotFoundError:
            return {"epoch": -1, "step": 0}

    try:
        deadline = time.monotonic() + 120
        while position()["epoch"] < epoch or position()["step"] > 2:
            assert process.poll() is None and time.monotonic() < deadline
    finally:
        for pid in [process.pid, *(int(name) for name in os.listdir("/proc") if name.isdigit())]:
            try:  # the processes that torchrun starts are in sessions of their own: found by the run folder they name
                if pid == process.pid or str(folder).encode() in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):
                pass
        process.wait()
    return position()


@pytest.mark.parametrize("processes, kind", [(1, "small"), (2, "small"), (1, "large")])
def test_killed_and_resumed_run_ends_with_the_uninterrupted_weights(tmp_path, request, processes, kind):
    data = request.getfixturevalue(kind)
    options = [data, *TINY, "--recipe", "cifar10", "--knn-every", "30", "--save-minutes", "0",
               *(["--batch", "6", "--epochs", "15"] if kind == "small" else ["--batch", "2", "--epochs", "8"])]
    launch = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def command(folder, *more):
        return [str(a) for a in (*launch, HERE / "simsiam.py", *options, "--out", tmp_path / folder, *more)]

    subprocess.run(command("whole"), check=True, capture_output=True)
    position = kill_when(command("killed"), tmp_path / "killed", epoch=2)
    steps = {"small": 8, "large": 10}[kind]
    assert 0 < position["step"] < steps and position["epoch"] < 8, "the kill came at a moment that shows nothing"
    again = subprocess.run(command("killed", "--resume"), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert equal(weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed"))
    whole, killed = log_of(tmp_path / "whole"), log_of(tmp_path / "killed")
    assert [r["event"] for r in killed].count("resume") == 1
    key = [[(r["epoch"], r["step"], r["loss"], r["std"], r["lr"], r["knn"]) for r in log if r["event"] == "epoch"] for log in (whole, killed)]
    assert key[0] == key[1]


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
    assert last["loss"] < -0.9 and last["std"] < 0.5 and log_of(tmp_path)[0]["settings"]["pred_lr"] == "cosine"
    assert ("collapsed: all outputs" in out.stdout) == last["collapsed"]
    whole = [json.loads(line) for line in (HERE / "results/shapes-fig2-without-stopgrad/log.jsonl").read_text().splitlines()]
    assert whole[-2]["collapsed"] and whole[-2]["loss"] < -0.95 and whole[-2]["std"] < 0.26  # the full run, kept in results/


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
    (["{small}", "--out", "{damaged}", "--resume"], "can't be continued from"),
    (["{small}", "--out", "{small}/train/a/000.png/run"], "000.png"),
    (["{broken}"], "003.jpg: can't be read as an image"),
]


@pytest.mark.parametrize("arguments, message", REFUSALS)
def test_input_that_cannot_be_used_is_refused_in_one_line(tmp_path, small, large, finished, arguments, message):
    damaged, broken = tmp_path / "damaged", tmp_path / "broken"
    damaged.mkdir()
    (damaged / "checkpoint.pth").write_bytes((finished[0] / "checkpoint.pth").read_bytes()[:5000])
    write_folder(broken, "train", 20, (70, 80), suffix=".jpg")
    (broken / "train/a/003.jpg").write_bytes(b"no image")
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
    again = program(small, *TINY, "--epochs", "1", "--out", tmp_path / "run", "--resume", "auto")
    assert again.returncode == 0 and "continuing" in again.stdout
    assert [r["event"] for r in log_of(tmp_path / "run")] == ["start", "epoch", "resume", "epoch", "end"]


def test_unlabelled_photographs_train_without_knn(large, tmp_path):
    out = program(large / "train", *TINY, "--batch", "8", "--epochs", "1", "--size", "48", "--out", tmp_path / "run")
    assert out.returncode == 0, out.stderr
    start, *epochs, _ = log_of(tmp_path / "run")
    assert start["settings"]["recipe"] == "imagenet" and all(r["knn"] is None for r in epochs) and "needs labels" in out.stdout


# ---------------------------------------------------------------------------------------------------------------------
# The README
# ---------------------------------------------------------------------------------------------------------------------

def test_readme_commands_parse():
    text = (HERE / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    commands = [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    ours = [shlex.split(c.split("simsiam.py", 1)[1]) for c in commands if "simsiam.py" in c]
    assert len(ours) >= 5
    for arguments in ours:
        simsiam.parse(arguments)


def test_readmes_figures_are_those_of_the_logs_in_results():
    text = (HERE / "README.md").read_text()
    for run in ("shapes", "shapes-fig2-without-stopgrad", "cifar10-width4"):
        start, first, *_, last, end = log_of(HERE / "results" / run)
        assert end["event"] == "end"
        for figure in (f"{last['loss']:.3f}", f"{last['std']:.2f}", f"{last['knn']:.1f}%", f"{first['knn']:.1f}%", f"{start['knn_pixels']:.1f}%"):
            assert figure in text, (run, figure)


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
    simsiam.train_step(reference, simsiam.loss, optimizers[1], torch.autocast("cpu", enabled=False), *images)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(model.parameters(), reference.parameters()))


def test_line_budgets():
    budgets = {"resnet.py": 170, "augment.py": 630, "simsiam.py": 850}
    assert {name: lines for name, lines in ((n, (HERE / n).read_text().count("\n")) for n in budgets) if lines > budgets[name]} == {}
