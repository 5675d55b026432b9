"""augment.py: what is drawn against the documented procedure, what is done against Pillow and float64."""
import collections
import colorsys
import itertools
import math
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import augment
from harness.data import loading, opening
from harness.data.source import Source
from tests.helpers import CPU, differs, slow, write_folder

pytest_plugins = ["tests.fixtures"]

PLAIN = augment.Policy(mean=(0,) * 3, std=(1,) * 3)  # views in [0, 1]


# --- Drawing ------------------------------------------------------------------------------------------------

def kolmogorov_smirnov(a, b):
    """The gap between the distributions of two equally large samples, in units that one in 1000 exceeds."""
    grid = np.unique(np.concatenate([a, b]))
    below_a = np.searchsorted(np.sort(a), grid, "right")
    below_b = np.searchsorted(np.sort(b), grid, "right")
    gap = np.abs(below_a - below_b).max() / len(a)
    return gap / (1.95 * math.sqrt(2 / len(a)))


def reference_crop(rng, height, width):
    """RandomResizedCrop as PyTorch documents it, with Python's own random numbers."""
    for _ in range(10):
        target = height * width * rng.uniform(0.2, 1)
        log_aspect = rng.uniform(math.log(3 / 4), math.log(4 / 3))
        w = round(math.sqrt(target * math.exp(log_aspect)))
        h = round(math.sqrt(target / math.exp(log_aspect)))
        if 0 < w <= width and 0 < h <= height:
            top = rng.randint(0, height - h)
            left = rng.randint(0, width - w)
            return top, left, h, w
    w = width
    h = height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def boxes(height, width, n, policy=augment.Policy()):
    """A Crop for each of the images 0 to n - 1, all of this size."""
    view = np.zeros(n, int)
    return augment.draw_crop(policy, 5, 0, np.arange(n), view, height, width)


def place_size_area_aspect(top, left, height, width):
    """The quantities by which we compare distributions of boxes."""
    return top, left, height, width, height * width, width / height


@pytest.mark.parametrize("size", ["375x500", "32x32", "33x32", "500x120", "120x500", "1x500", "500x1", "2x3"])
def test_crops_are_distributed_as_random_resized_crop_draws_them(size):
    """Kolmogorov-Smirnov against a loop that draws as PyTorch documents. Each box is within its image."""
    size = [int(side) for side in size.split("x")]
    *ours, flip, _ = boxes(*size, 4000)
    rng = random.Random(0)
    loop = np.array([reference_crop(rng, *size) for _ in range(4000)])
    for a, b in zip(place_size_area_aspect(*ours), place_size_area_aspect(*loop.T)):
        assert kolmogorov_smirnov(a, b) < 1
    assert abs(flip.mean() - 0.5) < 0.04
    for start, length, side in zip(ours[:2], ours[2:], size):
        assert start.min() >= 0
        assert length.min() >= 1
        assert (start + length).max() <= side


N_COLOURS = 40_000


def colours(view=0):
    """Colour changes of many images."""
    return augment.draw_colour(augment.Policy(), 0, 0, np.arange(N_COLOURS), view)


def test_colour_has_the_papers_probabilities():
    """Shares of 40,000 draws against the paper's, within five standard deviations."""
    c = colours()
    shares = {0.8: c.jitter, 0.2: c.gray, 0.5: c.sigma > 0}
    for expected, happens in shares.items():
        deviation = math.sqrt(expected * (1 - expected) / N_COLOURS)
        assert abs(happens.mean() - expected) < 5 * deviation


def test_colour_has_the_papers_ranges():
    """Factors, hue shifts and blurs against uniform distributions."""
    c = colours()
    bounds = [(0.6, 1.4)] * 3 + [(-0.1, 0.1), (0.1, 2.0)]
    for values, (low, high) in zip([*c.factor.T, c.sigma[c.sigma > 0]], bounds):
        assert kolmogorov_smirnov(values, np.linspace(low, high, len(values))) < 1


def test_colour_changes_come_in_all_orders():
    """The counts of the 24 orders differ by less than ten standard deviations."""
    orders = collections.Counter(map(tuple, colours().order))
    assert len(orders) == 24
    spread = max(orders.values()) - min(orders.values())
    assert spread < 10 * math.sqrt(N_COLOURS / 24)


def test_colour_draws_are_independent():
    """The correlations of all draws, and between an image's two views, are 0."""
    c = colours()
    happens = [c.jitter, c.gray, c.sigma > 0]
    places_of_hue = (c.order == 3).T[:3]
    factors = [*c.factor.T, *colours(view=1).factor.T]
    gap = np.corrcoef([*happens, *factors, *places_of_hue]) - np.eye(14)
    assert np.abs(gap[:11]).max() < 0.03  # the places of hue exclude each other


# --- Applying: crop, resize, flip ---------------------------------------------------------------------------

def assert_close(ours, expected, worst, mean):
    """No pixel may differ by more than `worst` levels, nor all of them by `mean` on average."""
    most, average = differs(ours, expected)
    assert most <= worst
    assert average < mean


def from_pil(image):
    """A PIL image -> (3, S, S) float64 array."""
    return np.array(image.convert("RGB"), float).transpose(2, 0, 1)


def in_torch(image):
    """(H, W, 3) array -> (3, H, W) tensor"""
    return torch.from_numpy(image).permute(2, 0, 1)


def pil_crop_resize(image, crop, n, size):
    """(H, W, 3) array -> (3, S, S) array, as torchvision crops and flips a Pillow image."""
    top = crop.top[n]
    left = crop.left[n]
    box = (left, top, left + crop.width[n], top + crop.height[n])
    view = Image.fromarray(image).crop(box)
    view = view.resize((size, size), Image.Resampling.BILINEAR)
    if crop.flip[n]:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if crop.vflip[n]:
        view = view.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return from_pil(view)


def noise(count, side):
    """Images (count, side, side, 3) of random levels."""
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


@pytest.mark.parametrize("side, size", [(32, 32), (48, 32), (64, 24), (20, 32)])
def test_batched_crop_and_resize_agree_with_pillow(side, size):
    """Of 40 images of noise, against Pillow's crop, resize and flip, to one level."""
    images = noise(40, side)
    crop = boxes(side, side, 40)
    ours = augment.crop_resize_batch(torch.stack([*map(in_torch, images)]), crop, size)
    assert ours.dtype == torch.uint8
    for n, image in enumerate(images):
        expected = pil_crop_resize(image, crop, n, size)
        assert_close(ours[n], expected, worst=1, mean=0.35)


def pil_centre(image):
    """(H, W, 3) array -> (3, 224, 224): the shorter side to 256 by Pillow, then the centre."""
    height, width = image.shape[:2]
    shorter = min(height, width)
    size = width * 256 // shorter, height * 256 // shorter
    left, top = (round((side - 224) / 2) for side in size)
    resized = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
    return from_pil(resized.crop((left, top, left + 224, top + 224)))


def test_centre_view_agrees_with_pillow(photos):
    """The test view against Pillow's resize, to one level; of strips, up to four times as long as wide."""
    strips = [photos[0][:90, :360], photos[1][:330, :90]]
    for image in [*photos, *strips]:
        centre = augment.resize_centre(in_torch(image)[None], augment.Policy())
        assert_close(centre[0], pil_centre(image), worst=1, mean=0.35)


# --- Applying: colour, grayscale, blur ----------------------------------------------------------------------

def levels(x, changes):
    """photometric's result on the scale 0 to 255: (N, 3, S, S) float64"""
    return augment.photometric(x, changes, PLAIN).double().numpy() * 255


def exact_hue(view, shift):
    """(3, S, S) levels -> levels, by way of the standard library's HSV in float64."""
    out = np.empty(view.shape)
    for y, x in np.ndindex(view.shape[1:]):
        h, s, v = colorsys.rgb_to_hsv(*(view[:, y, x] / 255))
        out[:, y, x] = colorsys.hsv_to_rgb((h + shift) % 1, s, v)
    return out * 255


def exact_blur(view, sigma):
    """(3, S, S) float64 -> the same, blurred: a Gaussian of 50 pixels' reach, edges repeated."""
    distance = np.arange(-50, 51)
    taps = np.exp(-distance ** 2 / (2 * sigma ** 2))
    taps /= taps.sum()
    for axis in (1, 2):
        pads = [(0, 0)] * 3
        pads[axis] = (50, 50)
        padded = np.pad(view, pads, mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 101, axis)
        view = windows @ taps
    return view


def exact_gray(view):
    """(3, S, S) levels -> (S, S): the luma of ITU-R 601-2."""
    return np.tensordot([0.299, 0.587, 0.114], view, 1)


def exact_blend(view, f, which):
    """Brightness, contrast, saturation in float64, as Pillow's documentation states them."""
    luma = exact_gray(view)
    other = [0, luma.mean(), luma][which]
    return np.clip(f * view + (1 - f) * other, 0, 255)


def exact_view(view, changes, n):
    """(3, S, S) float64 -> the same after change number n: jitter, grayscale, blur."""
    for which in changes.order[n] if changes.jitter[n] else ():
        f = changes.factor[n, which]
        view = exact_hue(view, f) if which == 3 else exact_blend(view, f, which)
    if changes.gray[n]:
        view = np.stack([exact_gray(view)] * 3)
    if changes.sigma[n]:
        view = exact_blur(view, changes.sigma[n])
    return view


def test_changes_are_exact_and_come_in_each_views_own_order():
    """All 24 orders, with and without jitter, grayscale and blur, against a float64 loop over the views.

    The last views, whose hue is shifted first, contain greys, primaries and ties. Our blur ends at 8 pixels,
    which shows with the largest std.
    """
    n = np.arange(24)
    orders = np.array(list(itertools.permutations(range(4))))
    x = torch.from_numpy(noise(24, 16)).permute(0, 3, 1, 2)
    ties = np.random.default_rng(0).choice([0, 128, 255], x[0].shape)
    x[21:] = torch.tensor(ties)
    drawn = augment.draw_colour(augment.Policy(), 0, 0, n, 0)
    changes = augment.Colour(
        jitter=n % 5 > 0,
        order=orders,
        factor=drawn.factor * [1.3, 1, 1, 4],
        gray=n % 7 == 1,
        sigma=np.resize([0, 0.1, 0, 0.5, 1, 2], 24))
    ours = levels(x, changes)
    for k, view in enumerate(x.double().numpy()):
        bound = 0.05 if changes.sigma[k] == 2 else 1e-3
        assert differs(ours[k], exact_view(view, changes, k))[0] < bound, k


@slow
def test_compiled_colour_changes_are_the_plain_ones(monkeypatch):
    """For any number of views, up to the rounding of a mean."""
    x = torch.from_numpy(noise(60, 16)).permute(0, 3, 1, 2)
    changes = augment.draw_colour(augment.Policy(), 0, 0, np.arange(60), 0)
    plain = levels(x, changes)
    before = augment.four_changes
    monkeypatch.setattr(augment, "four_changes", before)  # which makes it plain again after the test
    augment.compile_colours()
    assert augment.four_changes is not before
    for n in (60, 23, 1):
        some = augment.Colour(*(a[:n] for a in changes))
        assert differs(levels(x[:n], some), plain[:n])[0] < 0.02


# --- The views of a batch, and the contact sheet ------------------------------------------------------------

def first_views(source, workers=0, seed=1, epochs=2, options={}, **part):
    """The views of some epochs, a (V, N, 3, S, S) tensor a batch."""
    policy = augment.Policy(size=16)
    batches = loading.index_batches(seed, len(source), 8, epochs, **part)
    loaded = augment.load_views(source, policy, seed, batches, CPU, workers, **options)
    return [torch.stack(views) for _, views in loaded]


def the_same(a, b):
    """Whether two lists of tensors are the same, bit for bit."""
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("kind", ["small", "large"])
def test_a_view_is_the_same_whatever_the_workers_processes_and_interruptions(kind, request):
    """All views of two epochs against those of two workers, of two processes, and after an interruption."""
    source, _, _ = opening.open_data(request.getfixturevalue(kind))
    steps = len(source) // 8
    whole = first_views(source)
    assert len(whole) == 2 * steps
    assert the_same(whole, first_views(source, workers=2))
    first = first_views(source, rank=0, world=2)
    second = first_views(source, rank=1, world=2)
    joined = [torch.cat(halves, dim=1) for halves in zip(first, second)]
    assert the_same(whole, joined)
    rest = first_views(source, start_epoch=1, start_step=1)
    assert the_same(whole[steps + 1:], rest)


@pytest.mark.parametrize("views", [1, 2, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_several_batches_at_a_time_have_the_views_of_one(small, monkeypatch, views, layout):
    """Epochs of six batches, four and then two at a time, and all six: the same bits, from any step on."""
    source, _, _ = opening.open_data(small)
    options = {"views": views, "layout": layout}
    monkeypatch.setitem(augment.GROUP, "cpu", 1)
    alone = first_views(source, options=options)
    assert len(alone) == 12
    for batches in (4, 6):
        monkeypatch.setitem(augment.GROUP, "cpu", batches * 8 * views * 3 * 16 ** 2)
        assert the_same(alone, first_views(source, options=options))
        assert the_same(alone[3:], first_views(source, start_step=3, options=options))


def test_an_image_has_two_views_and_others_with_another_seed(small):
    """The two views of each image differ, and so do those of another seed."""
    source, _, _ = opening.open_data(small)
    x1, x2 = first_views(source, epochs=1)[0]
    assert x1.shape == (8, 3, 16, 16)
    difference = (x1 - x2).flatten(1).abs()
    assert difference.amax(dim=1).min() > 0.01
    other, _ = first_views(source, seed=2, epochs=1)[0]
    assert not torch.equal(x1, other)


def test_test_views_are_the_centre_of_each_image(large):
    """A worker's views, which draw nothing, against resizing each image alone."""
    source, _, _ = opening.open_data(large)
    policy = augment.Policy(size=56)
    batch = 0, np.array([3, 1, 8])
    (index, x), = augment.load_centres(source, policy, [batch], CPU, 1)
    assert index.tolist() == [3, 1, 8]
    for n, i in enumerate(index):
        image = source.image(i).permute(2, 0, 1)[None]
        centre = augment.resize_centre(image, policy).float()
        assert torch.equal(x[n], augment.normalize(centre, policy)[0])


def test_contact_sheet_shows_an_image_beside_its_views():
    """Uniform images, which neither crop nor flip changes: each tile has its image's colour."""
    greys = torch.tensor([40, 90, 200], dtype=torch.uint8)
    pixels = greys.view(3, 1, 1, 1).expand(3, 3, 32, 32)
    policy = augment.Policy(size=32, jitter=0, gray=0, blur=0)
    sheet = augment.contact_sheet(Source(pixels=pixels), policy, 0, pairs=2)
    sheet = np.array(sheet)
    for row, level in enumerate((40, 90, 200)):
        for left in (0, 108, 208, 316, 416):  # tiles of 96, gaps of 4 in a pair, of 12 elsewhere
            top = 108 * row
            assert (sheet[top:top + 96, left:left + 96] == level).all()


def test_contact_sheet_from_the_command_line(tmp_path, monkeypatch, capsys):
    """The picture's width, and the number of images printed."""
    folder = write_folder(tmp_path / "data", "train", 2, (70, 80))
    path = tmp_path / "views.png"
    monkeypatch.setattr(sys, "argv", ["augment.py", str(folder), "--out", str(path)])
    augment.main()
    assert "some of 2 images" in capsys.readouterr().out
    assert Image.open(path).width > 5 * 224


