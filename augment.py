"""From images to augmented views: SimSiam's input pipeline, Sec. 3 and supplement A of the paper.

    python augment.py PHOTO_OR_DATA --out views.png     a contact sheet: originals beside pairs of views
    python augment.py DATA --check                      read every image file, and list the bad ones

`one_view` is the specification: a view of one image, from beginning to end, in plain operations. The rest
does the same, fast. It makes a view in two steps that share only plain arrays:

    draw    random numbers -> what to do: crop box, flip, colour changes and their order, grayscale, blur
    apply   image, what to do -> view: deterministic; crop and resize first, then everything photometric

Every random number is a pure function of (seed, epoch, image, view, draw number); see
harness/common/draws.py. So a view does not depend on how many workers, processes or interruptions there were,
and any view can be reproduced.

Order of this file: the policy; one view; what is drawn; the same, fast: crop, resize and flip, then colour
jitter, grayscale, blur and normalisation; the views of a batch; the contact sheet.

Shapes in comments: N images or views, H x W pixels as stored, S pixels a side as trained.
"""
import argparse
import sys
from collections import namedtuple
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from harness.common.machine import to_device
from harness.common.draws import uniforms
from harness.common.errors import Refused, printable
from harness.common.files import save_picture
from harness.common.progress import silence
from harness.data.images import check_files
from harness.data.loading import decode, in_groups
from harness.data.opening import find_data, open_data
from harness.common.pictures import draw_contact_sheet
from harness.training.ends import show_any_name
from harness.training.options import add_range

# --- The policy -----------------------------------------------------------------------------------------


class Policy(NamedTuple):
    """What is drawn, and how strongly. The defaults are the paper's (supplement A) for ImageNet."""
    size: int = 224                         # S, pixels a side
    area: tuple = (0.2, 1.0)                # share of the image that the crop covers, uniform
    aspect: tuple = (3 / 4, 4 / 3)          # width / height of the crop, log-uniform
    jitter: float = 0.8                     # probability of the four colour changes, together
    strength: tuple = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation: factor 1 +- s; hue: +- s turns
    gray: float = 0.2                       # probability of grayscale
    blur: float = 0.5                       # of blur. DEPARTURE: the released code's; the paper gives none
    sigma: tuple = (0.1, 2.0)               # std of the Gaussian in pixels, uniform
    flip: float = 0.5                       # probability of the horizontal flip
    vflip: float = 0.0                      # of the vertical one. Not the paper's: for views from above
    mean: tuple = (0.485, 0.456, 0.406)     # ImageNet's, subtracted from values in [0, 1]
    std: tuple = (0.229, 0.224, 0.225)      # ImageNet's, by which they are then divided
    centre: float = 224 / 256               # test view: the share of the shorter side that is kept


# --- One view of one image, from beginning to end: the specification ------------------------------------
# tests/test_one_view.py compares its crop with Pillow's, and the fast code below with all of it.

def one_view(image, policy, seed, epoch, index, view):
    """View number `view` of image number `index` in an epoch, as the network sees it.

    image (H, W, 3) -> (3, S, S) float32, normalised. view: 0 is x1, 1 is x2

    The resized crop has integer levels from 0 to 255, like a picture. Pass images of files as uint8: torch
    rounds them after each of its two passes. Pass images in memory as float: they are rounded once, below.
    """
    height, width, _ = image.shape
    crop = pick(draw_crop(policy, seed, epoch, index, view, height, width), 0)  # arrays of one
    colour = pick(draw_colour(policy, seed, epoch, index, view), 0)

    top, left, h, w, flip, vflip = crop
    size = policy.size, policy.size
    x = image[top:top + h, left:left + w].permute(2, 0, 1)            # (3, h, w)
    x, = F.interpolate(x[None], size, mode="bilinear", antialias=True)
    x = x.round() / 255                                               # (3, S, S): in [0, 1]
    if flip:
        x = x.flip(2)  # left and right
    if vflip:
        x = x.flip(1)  # up and down
    if colour.jitter:
        for change in colour.order:  # brightness, contrast, saturation and hue, in the order drawn
            x = CHANGES[change](x, colour.factor[change]).clamp(0, 1)
    if colour.gray:
        x = grayscale(x).expand(3, -1, -1)
    if colour.sigma > 0:
        x = gaussian_blur(x, colour.sigma)
    mean = torch.tensor(policy.mean).view(3, 1, 1)
    std = torch.tensor(policy.std).view(3, 1, 1)
    return (x - mean) / std


# Brightness, contrast and saturation blend a view x (3, S, S) with something grey. Factor 1 changes nothing.

def brightness(x, factor):
    """x and black."""
    return factor * x


def contrast(x, factor):
    """x and the mean of its grayscale."""
    return factor * x + (1 - factor) * grayscale(x).mean()


def saturation(x, factor):
    """x and its grayscale."""
    return factor * x + (1 - factor) * grayscale(x)


def hue(x, turns):
    """x (3, S, S) with its hue rotated by `turns`: to HSV (Smith 1978), and back."""
    r, g, b = x
    largest = x.amax(dim=0)
    chroma = largest - x.amin(dim=0)
    c = chroma.clamp(min=1e-9)                                        # a grey pixel may have any hue
    h = (r - g) / c + 4                                               # six to a turn: red 0, green 2, blue 4
    h = torch.where(largest == g, (b - r) / c + 2, h)
    h = torch.where(largest == r, (g - b) / c, h)
    # A channel is the largest within 1 of its own hue, and the smallest from 2 on.
    own = torch.tensor([0, 2, 4]).view(3, 1, 1)
    distance = ((h + 6 * turns - own + 3) % 6 - 3).abs()              # around a circle of 6
    return largest - chroma * (distance - 1).clamp(0, 1)


CHANGES = brightness, contrast, saturation, hue
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def grayscale(x):
    """ITU-R 601-2 luma: (3, S, S) -> (S, S)"""
    r, g, b = x
    return 0.299 * r + 0.587 * g + 0.114 * b


REACH = 8   # pixels: four times the paper's largest std. Beyond it a Gaussian has 6e-5 of its mass


def gaussian_blur(x, sigma):
    """x (3, S, S) blurred by a Gaussian of std sigma in pixels, cut at REACH; edges repeat."""
    distance = torch.arange(-REACH, REACH + 1)
    gaussian = torch.exp(-distance ** 2 / (2 * sigma ** 2))
    kernel = gaussian[:, None] * gaussian
    x = F.pad(x[:, None], [REACH] * 4, mode="replicate")
    x = F.conv2d(x, kernel[None, None] / kernel.sum())
    return x[:, 0]


# --- What is drawn --------------------------------------------------------------------------------------

# The boxes of views in their images: arrays (N,), in pixels. flip (left-right), vflip (up-down) are bool.
Crop = namedtuple("Crop", "top left height width flip vflip")


class Colour(NamedTuple):
    """What happens to the pixels of N views."""
    jitter: np.ndarray  # (N,)    bool: whether the four changes apply
    order: np.ndarray   # (N, 4)  the k-th change, numbered as in CHANGES
    factor: np.ndarray  # (N, 4)  of brightness, contrast, saturation (1: no change); of hue, turns (0)
    gray: np.ndarray    # (N,)    bool
    sigma: np.ndarray   # (N,)    std of the blur in pixels; 0: none


def pick(drawn, which):
    """The Crop or Colour of one view, `which`, as plain numbers; or of several, `which` an array."""
    return drawn._make([field[which] for field in drawn])


# Each random decision has its own draw number, so a new one can be added without changing the others.
AREA = slice(0, 10)
ASPECT = slice(10, 20)
TOP = 20
LEFT = 21
FLIP = 22
JITTER = 23
ORDER = slice(24, 28)
FACTOR = slice(28, 32)
GRAY = 32
BLUR = 33
SIGMA = 34
VFLIP = 35
DRAWS = 36


def draw(seed, epoch, index, view):
    """All random numbers of N views: index (N,), view (N,), or one for all -> (N, DRAWS)"""
    index = np.reshape(index, (-1, 1))
    view = np.reshape(view, (-1, 1))
    return uniforms(seed, epoch, index, view, np.arange(DRAWS))


def between(bounds, u):
    """u in [0, 1), scaled to the range between the two bounds."""
    low, high = bounds
    return low + (high - low) * u


def draw_crop(policy, seed, epoch, index, view, height, width):
    """RandomResizedCrop and flips, for images of height x width pixels.

    index (N,), view (N,), or one for all -> Crop

    Ten tries at an area and an aspect. The first box that fits the image is placed uniformly. If none fits,
    the crop is the largest centred box with an admissible aspect. This is PyTorch's procedure, whose
    notation the paper uses.
    """
    u = draw(seed, epoch, index, view)                                # (N, 36)
    area = height * width * between(policy.area, u[:, AREA])          # (N, 10)
    aspect = np.exp(between(np.log(policy.aspect), u[:, ASPECT]))     # (N, 10)
    w = np.rint(np.sqrt(area * aspect))                               # (N, 10)
    h = np.rint(np.sqrt(area / aspect))                               # (N, 10)
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)         # (N, 10)
    found = fits.any(axis=1)                                          # (N,)
    first = np.arange(len(u)), fits.argmax(axis=1)
    widest = np.clip(np.rint(height * policy.aspect[1]), 1, width)
    highest = np.clip(np.rint(width / policy.aspect[0]), 1, height)
    w = np.where(found, w[first], widest)                             # (N,)
    h = np.where(found, h[first], highest)                            # (N,)
    top = np.floor(u[:, TOP] * (height - h + 1))                      # (N,)
    left = np.floor(u[:, LEFT] * (width - w + 1))                     # (N,)
    top = np.where(found, top, (height - h) // 2)                     # (N,)
    left = np.where(found, left, (width - w) // 2)                    # (N,)
    top, left, h, w = np.stack([top, left, h, w]).astype(np.int64)    # (N,) each
    flip = u[:, FLIP] < policy.flip
    vflip = u[:, VFLIP] < policy.vflip
    return Crop(top, left, h, w, flip, vflip)


def draw_colour(policy, seed, epoch, index, view):
    """ColorJitter, grayscale and blur.

    index (N,), view (N,), or one for all -> Colour
    """
    u = draw(seed, epoch, index, view)                                # (N, 36)
    centre = np.array([1, 1, 1, 0])
    spread = np.array(policy.strength)
    sigma = between(policy.sigma, u[:, SIGMA])                        # (N,)
    return Colour(
        jitter=u[:, JITTER] < policy.jitter,
        order=np.argsort(u[:, ORDER], axis=1),
        factor=centre + spread * (2 * u[:, FACTOR] - 1),
        gray=u[:, GRAY] < policy.gray,
        sigma=np.where(u[:, BLUR] < policy.blur, sigma, 0))


# --- The same, fast: crop, resize, flip. uint8 -> uint8 -------------------------------------------------
# In the released code the flip comes last. Here it comes with the crop, which changes nothing: all later
# steps treat left and right alike. Files are cropped by workers, one image at a time (crop_resize);
# images in memory are cropped on the device, a batch at a time, by matrix products (crop_resize_batch).

def crop_resize(image, crop, n, size):
    """The n-th box of `crop`, cut out of one stored image, resized and flipped, on the CPU.

    image (H, W, 3) uint8 -> (3, S, S) uint8. Bilinear, antialiased. The crop is cut out first, so no pixel
    outside it is read.
    """
    top, left, h, w, flip, vflip = pick(crop, n)
    part = image[None, top:top + h, left:left + w].permute(0, 3, 1, 2)  # (1, 3, h, w)
    view, = F.interpolate(part, (size, size), mode="bilinear", antialias=True)
    if flip:
        view = view.flip(2)
    if vflip:
        view = view.flip(1)
    return view


def crop_resize_batch(images, crop, size):
    """The boxes of `crop`, one per image, cut out of images of one size, resized and flipped, on any device.

    (N, 3, H, W) uint8 -> (N, 3, S, S) uint8. It takes two matrices per image: one resizes rows, the other
    columns.
    """
    height, width = images.shape[2:]
    rows = matrices_of(crop.top, crop.height, crop.vflip, height, size, images.device)
    cols = matrices_of(crop.left, crop.width, crop.flip, width, size, images.device)
    out = images.new_empty(len(images), 3, size, size)
    for part in pieces(images, 0, len(images)):
        # (n, H, 3, W): in this order both products read contiguous memory
        x = images[part].transpose(1, 2).contiguous().float()
        x = rows[part] @ x.flatten(2)
        x = x.view(-1, size * 3, width)
        x = x @ cols[part].mT
        x = x.round_().view(-1, size, 3, size)
        out[part] = x.transpose(1, 2)
    return out


def matrices_of(start, length, flip, side, size, device):
    """Matrices (N, size, side) that resize N parts [start, start + length) of lines of `side` pixels."""
    number = (flip * side + start) * (side + 1) + length              # (N,)
    return resize_matrices(side, size, device).index_select(0, to_device(number, device))


@lru_cache
def resize_matrices(side, size, device):
    """Bilinear, antialiased resizing of every part of a line of `side` pixels to `size`.

    Matrices (size, side), stacked along the first axis in the order that matrices_of expects. All are made at
    once and kept: 9 MB for 32 pixels, 136 MB for 64. Those of parts beyond the line's end are meaningless.
    Row i of a matrix holds the weights of the pixels that make output i: a triangle around its centre, which
    reaches one output pixel either way (one input pixel where that is larger), and nothing outside the part.
    The second half of the matrices has the output flipped.
    """
    # One axis each, to broadcast to (start, length, output, pixel).
    start = torch.arange(side, dtype=torch.float32, device=device).view(-1, 1, 1, 1)
    length = torch.arange(side + 1, dtype=torch.float32, device=device).view(-1, 1, 1)
    output = torch.arange(size, device=device).view(-1, 1) + 0.5      # the outputs' centres
    pixel = torch.arange(side, device=device) + 0.5
    scale = length / size
    distance = (pixel - (start + output * scale)).abs()
    weight = (1 - distance / scale.clamp(min=1)).clamp(min=0)
    weight *= (pixel > start) & (pixel < start + length)
    weight /= weight.sum(dim=3, keepdim=True)
    return torch.stack([weight, weight.flip(2)]).flatten(0, 2)


STRIP = 4  # an image longer than this many times its shorter side loses its ends before it is resized


def resize_centre(images, policy):
    """The test view: shorter side to S / centre, then the centre S x S.

    (N, 3, H, W) uint8 -> (N, 3, S, S) uint8
    """
    size = policy.size
    resize = round(size / policy.centre)
    shorter = min(images.shape[2:])
    # The ends of a strip, which are far from the centre, could take gigabytes when enlarged.
    for axis in (2, 3):
        beyond = max(0, images.shape[axis] - STRIP * shorter) // 2
        images = images.narrow(axis, beyond, images.shape[axis] - 2 * beyond)
    height, width = images.shape[2:]
    if resize != shorter:
        height = height * resize // shorter
        width = width * resize // shorter
        images = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
    top = round((height - size) / 2)
    left = round((width - size) / 2)
    return images[:, :, top:top + size, left:left + size]


# --- The same, fast: colour jitter, grayscale, blur, normalisation. uint8 -> float32, any device --------
# Difference from Pillow's result for the same draws, in levels of 255, worst pixel / mean (24 photographs at
# 224 pixels):
#
#   crop and resize 1 / 0.1; gray 0.5 / 0.2; brightness, contrast, saturation 1.2 / 0.5 (Pillow rounds)
#   hue 11 / 0.5 (Pillow's HSV has 8 bits; ours is exact to 0.001)
#   blur 28 / 0.5 (Pillow approximates the Gaussian by three boxes; ours is exact to 0.05 up to std 2)
#
# On a CPU the passes over memory cost most, so there are few of them, in place, over pieces that fit the
# cache.

def pieces(x, start, end):
    """Slices of x[start:end], to work on one at a time.

    On a CPU each has 2^19 numbers, which fit its cache; on a GPU there is one slice.
    """
    size = len(x)
    if x.device.type == "cpu":
        size = max(1, 2 ** 19 // x[0].numel())
    starts = range(start, end, size)
    return [slice(i, min(i + size, end)) for i in starts]


def photometric(x, colour, policy, layout=torch.contiguous_format):
    """Colour jitter, grayscale, blur and normalisation of cropped views.

    x (N, 3, S, S) uint8 and its Colour -> (N, 3, S, S) float32, on x's device, in this memory layout
    """
    # Sort the views by the place of hue in their order; change_colours says why.
    hue_at = np.argmax(colour.order == HUE, axis=1)
    hue_at = np.where(colour.jitter, hue_at, 4)                       # (N,)
    sort = np.argsort(hue_at, kind="stable")
    bounds = np.searchsorted(hue_at[sort], range(5))
    colour = pick(colour, sort)
    x = x.index_select(0, to_device(sort, x.device)).float()
    change_colours(x, colour, bounds)
    for part in pieces(x, 0, len(x)):
        view = x[part]
        gray = to_device(np.flatnonzero(colour.gray[part]), x.device)
        view[gray] = luma(view[gray])
        sigma = colour.sigma[part].astype(np.float32)
        if sigma.any():
            blurred = to_device(np.flatnonzero(sigma), x.device)
            std = to_device(sigma[sigma > 0], x.device)
            view[blurred] = blur(view[blurred], std)
        normalize(view, policy)
    unsort = to_device(np.argsort(sort), x.device)
    out = torch.empty_like(x, memory_format=layout)
    return torch.index_select(x, 0, unsort, out=out)


def change_colours(x, colour, bounds):
    """Colour jitter: the four changes of x (N, 3, S, S) in [0, 255], in place, each view in its own order.

    Brightness, contrast and saturation are one operation with three kinds of weights (see blend). Only hue
    differs, so the views are sorted by the place of hue in their order: in x[bounds[k]:bounds[k + 1]] it is
    the k-th change, and all views go through the same operations in the same order. x[bounds[4]:] is left
    unchanged.
    """
    factor = np.take_along_axis(colour.factor, colour.order, axis=1)  # (N, 4)
    to_luma = colour.order == SATURATION
    to_mean = colour.order == CONTRAST
    weights = np.stack([1 - factor, to_luma, to_mean]).astype(np.float32)
    weights = weights.transpose(2, 0, 1)                              # (4, 3, N)
    weights = to_device(weights, x.device)[..., None, None, None]
    shift = colour.factor[:, HUE].astype(np.float32)                  # (N,)
    shift = to_device(shift, x.device).view(-1, 1, 1, 1)              # (N, 1, 1, 1)
    for hue_at in range(4):
        for part in pieces(x, bounds[hue_at], bounds[hue_at + 1]):
            four_changes(x[part], weights[:, :, part], shift[part], hue_at)


def four_changes(x, weights, shift, hue_at):
    """The four changes of x (N, 3, S, S), in place, with hue as number hue_at; see blend and shift_hue."""
    for k in range(4):
        if k == hue_at:
            shift_hue(x, shift)
        else:
            blend(x, *weights[k])


def blend(x, share, to_luma, to_mean):
    """Brightness, contrast or saturation: f x + (1 - f) grey, in place, where share is 1 - f.

    x (N, 3, S, S); share, to_luma, to_mean (N, 1, 1, 1). The grey is black for brightness (to_luma and
    to_mean are 0), the mean of x's luma for contrast (to_mean is 1), x's luma for saturation (to_luma is
    1).
    """
    gray = luma(x)                                                    # (N, 1, S, S)
    mean = gray.mean(dim=(2, 3), keepdim=True)                        # (N, 1, 1, 1)
    gray = gray.mul_(to_luma).add_(to_mean * mean)                    # (N, 1, S, S)
    x.lerp_(gray, share).clamp_(0, 255)


def shift_hue(x, shift):
    """Rotate the hue of x (N, 3, S, S) by `shift` (N, 1, 1, 1) turns, at most half a turn, in place.

    HSV without HSV. Let c = max - min, and h the hue, six to a turn: red 0, green 2, blue 4. Converting
    back to RGB (Smith 1978) gives each channel min + c clamp(2 - d, 0, 1), where d is the distance around
    the circle from h to that channel's own hue. No division or condition is needed, because
    - |h - 3| = 2 + (r - g - b + min) / c, and h > 3 exactly where b > g (at b = g either sign is right);
    - for v in [-9, 9], d = abs(abs(abs(v) - 3) - 3) is the distance from v to 0 around a circle of 6.
    Both are computed times c, so a grey pixel, c = 0, is unchanged.
    """
    r, g, b = x.split(1, dim=1)                                       # (N, 1, S, S) each
    top = r.maximum(g).maximum(b)                                     # (N, 1, S, S)
    bottom = r.minimum(g).minimum(b)                                  # (N, 1, S, S)
    c = top - bottom                                                  # (N, 1, S, S)
    h_3 = (r - g).sub_(b).add_(bottom).add_(c, alpha=2)               # (N, 1, S, S): c |h - 3|
    h_3.copysign_(b - g).addcmul_(6 * shift, c)                       # c (h - 3), and rotated
    own_hues = torch.arange(3, -2, -2, device=x.device).view(3, 1, 1)  # 3 - 0, 3 - 2, 3 - 4
    d = torch.addcmul(h_3, c, own_hues.to(x.dtype))                   # (N, 3, S, S): c v
    d.abs_().sub_(c, alpha=3)
    d.abs_().sub_(c, alpha=3).abs_()
    torch.sub(top + c, d, out=x).clamp_(bottom, top)


def luma(x):
    """ITU-R 601-2 luma, Pillow's grayscale: (N, 3, S, S) -> (N, 1, S, S)"""
    r, g, b = x.split(1, dim=1)                                       # (N, 1, S, S) each
    return (0.299 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)


BLOCK = 16  # pixels of a line that one product computes


def blur(x, sigma):
    """Gaussian blur of x (N, 3, S, S) with std sigma (N,) > 0, in pixels.

    Each line is cut into blocks, extended by the Gaussian's reach on both sides, and multiplied by one small
    matrix; then each column is.
    """
    n, c, side, _ = x.shape
    source = torch.arange(BLOCK + 2 * REACH, device=x.device)[:, None]
    target = torch.arange(REACH, REACH + BLOCK, device=x.device)
    distance = source - target
    sigma = sigma.view(-1, 1, 1)
    kernel = torch.exp(-distance ** 2 / (2 * sigma ** 2)) * (distance.abs() <= REACH)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)                 # (N, 32, 16)
    beyond = -side % BLOCK  # pixels of the last block beyond the line
    for _ in range(2):
        lines = F.pad(x, (REACH, REACH + beyond, 0, 0), mode="replicate")
        blocks = lines.unfold(3, BLOCK + 2 * REACH, BLOCK).flatten(1, 3)  # overlapping, 32 pixels each
        blurred = (blocks @ kernel).view(n, c, side, side + beyond)
        x = blurred[..., :side].mT  # transposed, so the second pass blurs columns
    return x


def normalize(x, policy):
    """(x / 255 - mean) / std of each channel, in place. x (N, 3, S, S) float in [0, 255]"""
    mean_and_std = 255 * np.array([policy.mean, policy.std], np.float32)  # one copy to the device for both
    mean, std = to_device(mean_and_std, x.device).view(2, 3, 1, 1)
    return x.sub_(mean).div_(std)


def compile_colours():
    """Fuse the operations of the colour changes with torch.compile, from now on, for any number of views."""
    global four_changes
    four_changes = torch.compile(four_changes, dynamic=True)


# --- The views of a batch -------------------------------------------------------------------------------

# Views of several batches are made at a time, of so many numbers at most. On a CPU they fit its cache.
GROUP = {"cpu": 2 ** 20, "cuda": 2 ** 25}


def load_views(source, policy, seed, batches, device, workers, views=2, waiting=iter,
               layout=torch.contiguous_format):
    """For each (epoch, indices) of `batches`, yield (indices, views): normalised, on the device.

    views is (x1, x2, ...), (N, 3, S, S) each, in this memory layout. waiting wraps what is read from files,
    so it can be timed (harness/data/loading.py). Raises BadImage if too many files
    can't be read.
    """
    numbers = views * 3 * policy.size ** 2                            # of an image
    if source.pixels is None:
        cut = partial(cut_views, policy, seed, views)
        groups = decode(source, cut, numbers, batches, device, workers, waiting)
    else:
        batches = in_groups(batches, GROUP[device.type] // numbers)
        groups = cut_views_in_memory(source.pixels.to(device), policy, seed, batches, views)
    for epoch, index, x in groups:
        # All views of G batches at once: these operations are short, and starting them takes longer.
        view = np.repeat(np.arange(views), index.size)
        colour = draw_colour(policy, seed, epoch, np.tile(index, (views, 1)), view)
        x = photometric(torch.cat(x), colour, policy, layout)
        by_batch = x.unflatten(0, (views, *index.shape)).unbind(1)    # (V, N, 3, S, S) each
        yield from zip(index, map(torch.unbind, by_batch))


def load_centres(source, policy, batches, device, workers):
    """For each (epoch, indices), yield (indices, x): test views, without randomness.

    x (N, 3, S, S), normalised, on the device
    """
    if source.pixels is None:
        cut = partial(cut_centre, policy)
        for _, (index,), (x,) in decode(source, cut, 3 * policy.size ** 2, batches, device, workers):
            yield index, normalize(x.float(), policy)
    else:
        for _, index in batches:
            images = source.pixels.index_select(0, torch.from_numpy(index))
            x = resize_centre(images, policy).to(device)  # resized here: torch resizes uint8 only on CPUs
            yield index, normalize(x.float(), policy)


def cut_views(policy, seed, views, image, epoch, i):
    """The geometry of an image's views: (H, W, 3) uint8 -> [(3, S, S) uint8, one per view]"""
    height, width = image.shape[:2]
    crop = draw_crop(policy, seed, epoch, i, np.arange(views), height, width)
    return [crop_resize(image, crop, v, policy.size) for v in range(views)]


def cut_views_in_memory(pixels, policy, seed, groups, views):
    """The same for pixels (N, 3, H, W), and for each group of (epoch, indices (G, N) of G batches).

    Yields (epoch, indices, [(G N, 3, S, S) uint8, one per view])
    """
    height, width = pixels.shape[2:]
    for epoch, index in groups:
        images = pixels.index_select(0, to_device(index.ravel(), pixels.device))
        crops = [draw_crop(policy, seed, epoch, index, v, height, width) for v in range(views)]
        yield epoch, index, [crop_resize_batch(images, crop, policy.size) for crop in crops]


def cut_centre(policy, image, epoch, i):
    """An image's test view: (H, W, 3) uint8 -> [(3, S, S) uint8]"""
    return list(resize_centre(image.permute(2, 0, 1)[None], policy))


# --- The contact sheet ----------------------------------------------------------------------------------

def contact_sheet(source, policy, seed, epoch=0, rows=8, pairs=4):
    """A picture (PIL Image) of some images, each beside pairs of its views x1, x2, of consecutive epochs."""
    plain = policy._replace(mean=(0, 0, 0), std=(1, 1, 1))  # views in [0, 1]
    rows = min(rows, len(source))
    chosen = np.linspace(0, len(source) - 1, rows).astype(int)
    shown = []
    for i in chosen:
        stored = source.image(i)
        views = []
        for pair in range(pairs):
            for v in range(2):
                x = one_view(stored, plain, seed, epoch + pair, i, v)
                views.append(as_picture(x))
        shown.append((Image.fromarray(stored.numpy()), views))
    return draw_contact_sheet(shown, policy.size)


def as_picture(x):
    """A view (3, S, S) in [0, 1] as a PIL image."""
    levels = (255 * x).round().byte()
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def parse(argv=None):
    parser = argparse.ArgumentParser(
        prog="augment.py",
        allow_abbrev=False,
        description="Draw a contact sheet: images with several pairs of views made with the paper's "
                    "settings. (A run's own views, made with its own settings, are in its folder.) Or "
                    "check image files.")
    parser.add_argument("data", nargs="?", metavar="DATA",
                        help="a photo, or whatever simsiam.py takes as DATA (default: the drawn shapes)")
    parser.add_argument("--out", default="views.png", help="the picture to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="the views' seed (default: %(default)s)")
    parser.add_argument("--epoch", type=int, default=0,
                        help="which epoch's views to show (default: %(default)s)")
    parser.add_argument("--check", action="store_true",
                        help="report what DATA has, what is left out and why; read every image and list the "
                             "bad ones with the reasons")
    add_range(parser)
    return parser.parse_args(argv)


def check(data):
    """Report what was found, read every image file of both splits, and list the bad ones.

    Raises Refused, with their count, if there are any.
    """
    for heading, text in data.rows().items():
        print(f"{heading:10}{printable(text)}", file=sys.stderr)
    files = [source.files for source in (data.train, data.val) if source and source.files is not None]
    if not files:
        print("no image files: all pixels are in memory, and good")
        return
    files = torch.utils.data.ConcatDataset(files)
    bad, left = check_files(files, data.train.value_range)
    if left:
        print(f"{sum(left)} further frames or bands in {len(left)} files are not read", file=sys.stderr)
    if bad:
        raise Refused(f"{bad} of {len(files)} image files are bad")
    print(f"all {len(files)} image files are good")


def main():
    args = parse()
    show_any_name()
    try:
        if args.check:
            check(find_data(args.data, args.range))
            return
        if not args.out.lower().endswith(".png"):
            raise Refused(f"--out {args.out} must end in .png")
        train, *_ = open_data(args.data, args.range)
        policy = Policy()
        if train.pixels is not None:  # as in recipe cifar10
            policy = Policy(size=max(train.pixels.shape[2:]), blur=0)
        save_picture(contact_sheet(train, policy, args.seed, args.epoch), args.out)
    except BrokenPipeError as error:  # as from `--check | head`
        silence(error)
        sys.exit(1)
    except BrokenProcessPool:
        sys.exit("augment.py: a process that reads images was killed, usually because memory ran out")
    except KeyboardInterrupt:
        sys.exit("augment.py: interrupted")
    except (Refused, OSError, ValueError) as error:
        sys.exit(f"augment.py: {printable(error)}")
    print(f"{args.out}: some of {len(train)} images, and pairs of {policy.size}-pixel views of each")


if __name__ == "__main__":
    main()
