"""From image files to augmented views: SimSiam's input pipeline, Sec. 3 and supplement A of the paper.

    python augment.py PHOTO_OR_DATA --out views.png       a contact sheet: originals beside several pairs of views
    python augment.py DATA --check                        reads every image file, on all cores, and lists the bad ones
    python augment.py DATA --bench                        what each part costs here, and what the conventional way would

A view is made in two steps that meet only in plain numbers:

    draw    random numbers -> a recipe: crop box, flip, colour changes and their order, grayscale, blur
    apply   image, recipe  -> view: deterministic; crop and resize first, everything photometric after

Every random number is a pure function of (seed, epoch, image, view, draw number). So a view does not depend on how many
workers, processes or interruptions there were, and any view of any epoch can be shown again by asking for it.

Order of this file: drawing, applying, sources (folders, lists, CIFAR-10, shapes), loading; the contact sheet, the benchmark.
Shapes in comments: N images or views, H x W pixels as stored, S pixels a side as trained, V views per image.
"""
import argparse
import codecs
import hashlib
import multiprocessing
import os
import pickle
import re
import signal
import statistics
import sys
import time
import warnings
from collections import namedtuple
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter


class Refused(Exception):
    """Input that can't be used: says in one line what, where, and what to do. The scripts print it and exit with 1."""


class BadImage(Refused):
    """A file that isn't an image that Pillow can read."""


warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd files that it reads all the same, from every worker in every epoch
warnings.filterwarnings("ignore", "The given buffer is not writable")  # a decoded image, which nobody writes to


# --- Drawing: random numbers without state ---------------------------------------------------------------------------

SHUFFLE, SHAPES = 1000, 1001  # taken in the place of a view number by what is drawn per image but is no view


def mix(h):
    """uint64 -> uint64: the finaliser of SplitMix64 (Steele et al. 2014). Flipping one input bit flips half the output."""
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


def uniforms(seed, epoch, index, view, draw):
    """Uniform numbers in [0, 1), float64: a hash of five non-negative integers or arrays of them, which broadcast."""
    h = np.zeros(1, np.uint64)  # an array, because numpy warns when a scalar wraps around
    for key in (seed, epoch, index, view, draw):
        h = mix((h ^ np.asarray(key).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15))
    return (h >> np.uint64(11)) * 2.0 ** -53


def permutation(seed, epoch, n):
    """The order in which an epoch visits n images: int64 (n,)"""
    return np.argsort(uniforms(seed, epoch, np.arange(n), SHUFFLE, 0), kind="stable")


class Policy(NamedTuple):
    """What is drawn, and how strongly. The defaults are the paper's (supplement A) for ImageNet."""
    size: int = 224                                  # S, pixels a side
    area: tuple = (0.2, 1.0)                         # share of the image that the crop covers, uniform
    aspect: tuple = (3 / 4, 4 / 3)                   # width / height of the crop, log-uniform
    jitter: float = 0.8                              # probability of the four colour changes, together
    strength: tuple = (0.4, 0.4, 0.4, 0.1)           # of brightness, contrast, saturation (factor 1 +- s), hue (turns, +- s)
    gray: float = 0.2                                # probability of grayscale
    blur: float = 0.5                                # probability of blur. DEPARTURE: the released code's; the paper gives none
    sigma: tuple = (0.1, 2.0)                        # std of the Gaussian in pixels, uniform
    flip: float = 0.5                                # probability of the horizontal flip
    mean: tuple = (0.485, 0.456, 0.406)              # ImageNet's normalisation
    std: tuple = (0.229, 0.224, 0.225)
    centre: float = 224 / 256                        # at test time: the share of the shorter side that is kept


# Where views lie in their images: arrays (N,), pixels; flip is bool.
Crop = namedtuple("Crop", "top left height width flip")


class Colour(NamedTuple):
    """What happens to the views' pixels."""
    jitter: np.ndarray   # (N,)    bool: whether the four changes apply
    order: np.ndarray    # (N, 4)  order[n, k]: the change that comes k-th; 0 brightness, 1 contrast, 2 saturation, 3 hue
    factor: np.ndarray   # (N, 4)  of brightness, contrast, saturation (1 = as it was); hue shift in turns (0 = as it was)
    gray: np.ndarray     # (N,)    bool
    sigma: np.ndarray    # (N,)    std of the blur in pixels, 0 = none


# Each random decision has its own draw number, so that a new one can be added without changing the others.
AREA, ASPECT, TOP, LEFT, FLIP = slice(0, 10), slice(10, 20), 20, 21, 22
JITTER, ORDER, FACTOR, GRAY, BLUR, SIGMA = 23, slice(24, 28), slice(28, 32), 32, 33, 34


def draw_crop(policy, seed, epoch, index, view, height, width):
    """RandomResizedCrop and flip for images `index` (N,), view numbers `view` (N,), of height x width pixels -> Crop.

    Ten tries at an area and an aspect; the first box that fits the image is placed uniformly. If none fits, the largest
    centred box with an admissible aspect. This is the procedure of the PyTorch notation that the paper refers to.
    """
    u = uniforms(seed, epoch, np.asarray(index)[:, None], np.asarray(view)[:, None], np.arange(23))  # (N, 23)
    area = height * width * (policy.area[0] + (policy.area[1] - policy.area[0]) * u[:, AREA])        # (N, 10)
    low, high = np.log(policy.aspect)
    aspect = np.exp(low + (high - low) * u[:, ASPECT])                                               # (N, 10)
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))                          # (N, 10)
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first, found = (np.arange(len(u)), fits.argmax(axis=1)), fits.any(axis=1)
    w = np.where(found, w[first], np.clip(np.rint(height * policy.aspect[1]), 1, width))
    h = np.where(found, h[first], np.clip(np.rint(width / policy.aspect[0]), 1, height))
    top = np.where(found, np.floor(u[:, TOP] * (height - h + 1)), (height - h) // 2)
    left = np.where(found, np.floor(u[:, LEFT] * (width - w + 1)), (width - w) // 2)
    return Crop(*(a.astype(np.int64) for a in (top, left, h, w)), u[:, FLIP] < policy.flip)


def draw_colour(policy, seed, epoch, index, view):
    """ColorJitter, grayscale and blur for images `index` (N,), view number `view` -> Colour."""
    u = uniforms(seed, epoch, np.asarray(index)[:, None], view, np.arange(35))  # (N, 35)
    centre, spread = np.array([1, 1, 1, 0]), np.array(policy.strength)
    return Colour(jitter=u[:, JITTER] < policy.jitter,
                  order=np.argsort(u[:, ORDER], axis=1),
                  factor=centre + spread * (2 * u[:, FACTOR] - 1),
                  gray=u[:, GRAY] < policy.gray,
                  sigma=np.where(u[:, BLUR] < policy.blur, policy.sigma[0] + np.ptp(policy.sigma) * u[:, SIGMA], 0))


# --- Applying, first part: crop, resize, flip. uint8 -> uint8 --------------------------------------------------------
# The flip comes last in the paper; here it comes with the crop, which changes nothing: later steps treat left and right alike.

def crop_resize(image, crop, n, size):
    """One stored image (H, W, 3) uint8 and the n-th box of `crop` -> (3, S, S) uint8, on the CPU. Bilinear, antialiased.
    The crop is cut first, so that no pixel outside it is read."""
    top, left = crop.top[n], crop.left[n]
    part = image[top:top + crop.height[n], left:left + crop.width[n]].permute(2, 0, 1)
    view = F.interpolate(part[None], (size, size), mode="bilinear", antialias=True)[0]
    return view.flip(-1) if crop.flip[n] else view


def crop_resize_batch(images, crop, size):
    """Images of one size (N, 3, H, W) uint8, on any device -> (N, 3, S, S) uint8. What crop_resize does, by two matrices an image."""
    height, width = images.shape[2:]
    out = torch.empty(len(images), 3, size, size, dtype=torch.uint8, device=images.device)
    rows, cols = (resize_matrices(side, size, images.device) for side in (height, width))
    row = on(images, crop.top * (height + 1) + crop.height)
    col = on(images, (crop.flip * width + crop.left) * (width + 1) + crop.width)
    for part in pieces(images, 0, len(images)):
        x = images[part].transpose(1, 2).contiguous().float()  # (n, H, 3, W) for n images: both products find their numbers in a row
        x = rows.index_select(0, row[part]) @ x.flatten(2)
        x = x.view(-1, size * 3, width) @ cols.index_select(0, col[part]).mT
        out[part] = x.round_().view(-1, size, 3, size).transpose(1, 2)
    return out


@lru_cache
def resize_matrices(side, size, device):
    """Bilinear, antialiased resizing of every part [start, start + length) of a line of `side` pixels to `size`: a matrix (size, side)
    each, at start * (side + 1) + length, then all once more with the output flipped; made once: 9 MB for 32 pixels, 136 MB for 64.
    Row i holds the weights of the pixels that make output i: a triangle around its centre that reaches one output pixel either way
    (one input pixel where that is larger), nothing outside the part. Those for parts beyond the line mean nothing."""
    start, length = (torch.arange(n, dtype=torch.float32, device=device) for n in (side, side + 1))
    start, length = start[:, None, None, None], length[:, None, None]
    pixel = torch.arange(side, device=device) + 0.5                                    # (side,)
    output = torch.arange(size, device=device)[:, None] + 0.5                          # (size, 1)
    scale = length / size
    weight = (1 - (pixel - (start + output * scale)).abs() / scale.clamp(min=1)).clamp(min=0)
    weight *= (pixel > start) & (pixel < start + length)
    weight /= weight.sum(dim=3, keepdim=True)
    return torch.stack([weight, weight.flip(2)]).flatten(0, 2)


def resize_centre(images, policy):
    """The test view: shorter side to S / centre, then the centre S x S. (N, 3, H, W) uint8 -> (N, 3, S, S) uint8"""
    height, width = images.shape[2:]
    size, resize = policy.size, round(policy.size / policy.centre)
    if resize != min(height, width):
        height, width = (side * resize // min(height, width) for side in (height, width))
        images = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return images[:, :, top:top + size, left:left + size]


# --- Applying, second part: colour, grayscale, blur, normalisation. uint8 -> float32, batched, CPU and GPU alike -----
# How far from Pillow's result for the same recipe, in levels of 255, worst pixel / mean (24 photographs at 224 pixels): crop
# and resize 1 / 0.1; brightness, contrast, saturation 1.2 / 0.5 and gray 0.5 / 0.2 (Pillow rounds); hue 11 / 0.5 (Pillow's HSV has
# 8 bits; ours is exact to 0.001); blur 28 / 0.5 (Pillow approximates by three boxes; ours is exact to 0.05 up to std 2). On a CPU,
# what costs is the passes over memory: hence few of them, in place, over pieces that the cache holds.

def pieces(x, start, end):
    """Slices of x[start:end] to work on one after the other: on a CPU, of 2^19 numbers, which its cache holds as float32; elsewhere, all."""
    size = max(1, 2 ** 19 // x[0].numel()) if x.device.type == "cpu" else len(x)
    return [slice(i, min(i + size, end)) for i in range(start, end, size)]


def photometric(x, colour, policy):
    """Cropped views (N, 3, S, S) uint8 and their Colour -> normalised views (N, 3, S, S) float32, on x's device."""
    hue_at = np.where(colour.jitter, np.argmax(colour.order == 3, axis=1), 4)  # (N,): 0 to 3, 4 = no colour changes
    sort = np.argsort(hue_at, kind="stable")  # views that take hue at the same place are neighbours: see change_colours
    x, colour = x.index_select(0, on(x, sort)).float(), Colour(*(a[sort] for a in colour))
    change_colours(x, colour, np.searchsorted(hue_at[sort], range(5)))
    for part in pieces(x, 0, len(x)):
        view, sigma = x[part], colour.sigma[part].astype(np.float32)
        gray, blurred = (on(x, np.flatnonzero(chosen)) for chosen in (colour.gray[part], sigma))
        view.index_copy_(0, gray, luma(view.index_select(0, gray)).expand(-1, 3, -1, -1))
        if len(blurred):
            view.index_copy_(0, blurred, blur(view.index_select(0, blurred), on(x, sigma[sigma > 0])))
        normalize(view, policy)
    return x.index_select(0, on(x, np.argsort(sort)))


def on(x, array):
    """A numpy array on x's device, without waiting for the device (hence pinned)."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(x.device, non_blocking=True) if x.is_cuda else tensor


def normalize(x, policy):
    """(x / 255 - mean) / std per channel, in place. x (N, 3, S, S) float in [0, 255]"""
    mean, std = on(x, 255 * np.array([policy.mean, policy.std], np.float32)[..., None, None])
    return x.sub_(mean).div_(std)


def luma(x):
    """ITU-R 601-2 luma, Pillow's grayscale: (N, 3, S, S) -> (N, 1, S, S)"""
    return (0.299 * x[:, 0:1]).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:3], alpha=0.114)


def change_colours(x, colour, bounds):
    """Apply the four changes to x (N, 3, S, S) in [0, 255], in place, each view in its own order.

    Only hue differs from the other three, which are one operation with three kinds of weights (see blend). The views of a group,
    x[bounds[k]:bounds[k + 1]], take hue as the k-th: so all do the same operations in the same order. x[bounds[4]:] stays as it is.
    """
    f = np.take_along_axis(colour.factor, colour.order, axis=1)       # (N, 4): of the change that comes k-th
    weights = np.stack([1 - f, colour.order == 2, colour.order == 1]).astype(np.float32).transpose(2, 0, 1)     # (4, 3, N)
    weights, shift = (on(x, w)[..., None, None, None] for w in (weights, colour.factor[:, 3].astype(np.float32)))
    for hue_at in range(4):
        for part in pieces(x, *bounds[hue_at:hue_at + 2]):
            view = x[part]
            for k in range(4):
                if k == hue_at:
                    shift_hue(view, shift[part])
                else:
                    blend(view, *weights[k, :, part])


def blend(x, share, to_luma, to_mean):
    """f x + (1 - f) grey, in place, where share is 1 - f. x (N, 3, S, S); share, to_luma, to_mean (N, 1, 1, 1). The grey is black for brightness
    (the other two are 0), the mean of x's luma for contrast (to_mean is 1), x's luma for saturation (to_luma is 1)."""
    gray = luma(x)                                                    # (N, 1, S, S)
    mean = gray.mean(dim=(2, 3), keepdim=True)                        # (N, 1, 1, 1)
    x.lerp_(gray.mul_(to_luma).add_(to_mean * mean), share).clamp_(0, 255)


def shift_hue(x, shift):
    """Rotate the hue of x (N, 3, S, S) by `shift` (N, 1, 1, 1) turns, at most half a turn, in place. What HSV does, without HSV.

    Let c = max - min, and h the hue, six to a turn: red 0, green 2, blue 4. HSV's way back to RGB (Smith 1978) gives each channel min +
    c clamp(2 - d, 0, 1), where d is how far h is around the circle from that channel's own hue. No division, no condition is needed:
    - |h - 3| = 2 + (r - g - b + min) / c, and h > 3 just where b > g (at b = g either sign is right)
    - for v in [-9, 9], d = abs(abs(abs(v) - 3) - 3) is how far v is from 0 around a circle of 6
    Both are computed times c, so that a grey pixel, c = 0, stays as it is.
    """
    r, g, b = x.split(1, dim=1)                                       # (N, 1, S, S) each
    top, bottom = r.maximum(g).maximum(b), r.minimum(g).minimum(b)
    c = top - bottom                                                  # (N, 1, S, S)
    h_3 = (r - g).sub_(b).add_(bottom).add_(c, alpha=2).copysign_(b - g)        # c (h - 3)
    h_3.addcmul_(6 * shift, c)
    channels = torch.arange(3, -2, -2, dtype=x.dtype, device=x.device)[:, None, None]   # 3 - 0, 2, 4: the channels' own hues
    v = torch.addcmul(h_3, c, channels)                               # (N, 3, S, S)
    d = v.abs_().sub_(c, alpha=3).abs_().sub_(c, alpha=3).abs_()      # (N, 3, S, S)
    torch.sub(top + c, d, out=x).clamp_(bottom, top)


REACH, BLOCK = 8, 16  # pixels. REACH: four times the paper's largest std, beyond which a Gaussian holds 6e-5 of its mass


def blur(x, sigma):
    """Gaussian blur of x (N, 3, S, S) with std sigma (N,) > 0, in pixels, the Gaussian cut at REACH, the edges repeated for ever. Each line
    is cut into blocks, with what the Gaussian reaches on both sides, and multiplied by one small matrix; then each column."""
    distance = torch.arange(BLOCK + 2 * REACH, device=x.device)[:, None] - torch.arange(REACH, REACH + BLOCK, device=x.device)
    kernel = torch.exp(-distance ** 2 / (2 * sigma[:, None, None] ** 2)) * (distance.abs() <= REACH)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)                 # (N, 32, 16): a column makes a pixel from all that it sees
    (n, c, side, _), more = x.shape, -x.shape[3] % BLOCK  # more: pixels that the last block has beyond the line
    for _ in range(2):
        lines = F.pad(x, (REACH, REACH + more, 0, 0), mode="replicate")
        blocks = lines.unfold(3, BLOCK + 2 * REACH, BLOCK).flatten(1, 3)        # of 32 pixels each, overlapping
        x = (blocks @ kernel).view(n, c, side, side + more)[..., :side].mT      # (N, 3, S, S): transposed, so that the second time lines are columns
    return x


# --- Sources: what DATA can be ---------------------------------------------------------------------------------------

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff")
SMALL = 64  # pixels: images of one size up to this many a side are held in memory


@dataclass(frozen=True)
class Source:
    """One split of a data set: small images in memory, others as files. Labels and classes only where they are known.

    A bad file is replaced by the next good one, so that a run doesn't end for it; note() names it, and raises BadImage
    where more files than 10 and one in a hundred are bad.
    """
    pixels: object = None   # (N, 3, H, W) uint8 tensor
    files: object = None    # (N,) array of byte strings: one buffer, which workers share; a list's reference counts would copy it
    labels: object = None   # (N,) int64 array
    classes: object = None  # list of names
    bad: dict = field(default_factory=dict)  # {index: what is wrong with the file}, as far as it was met

    def __len__(self):
        return len(self.files if self.pixels is None else self.pixels)

    def image(self, i):
        """The i-th image as stored: (H, W, 3) uint8 tensor. Raises BadImage."""
        if self.pixels is not None:
            return self.pixels[i].permute(1, 2, 0)
        image, bad = read_or_replace(self.files, i)
        self.note(bad)
        return image

    def fingerprint(self):
        """A number below 2^48 that tells data sets apart: by their pixels, or their files' names below the folder, and labels."""
        if self.pixels is not None:
            content = [self.pixels.numpy()]
        else:
            above = len(os.path.commonprefix([min(self.files), max(self.files)]))
            content = [b"\n".join(name[above:] for name in self.files)]
        content += [] if self.labels is None else [np.ascontiguousarray(self.labels, np.int64)]
        return int(hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in content)).hexdigest()[:12], 16)

    def note(self, bad):
        """Remember bad files, {index: what is wrong}, and name each once."""
        for i in bad.keys() - self.bad.keys():
            print(f"bad image, replaced by the next good one: {printable(bad[i])}", file=sys.stderr, flush=True)
        self.bad.update(bad)
        if len(self.bad) > 10 + len(self) / 100:
            raise BadImage(f"{len(self.bad)} of {len(self)} images can't be read, which is too many; python augment.py DATA --check lists them")


def open_data(path, seed=0):
    """DATA as given by the user -> (train Source, val Source or None). None: the embedded shapes, drawn with this seed.
    Raises Refused where there is nothing there that can be used."""
    if path is None:
        return draw_shapes(seed, 0, 4000), draw_shapes(seed, 4000, 1000)
    root = os.fsencode(path)
    if os.path.isfile(root):
        return in_memory(Source(files=read_list(root))), None
    if not os.path.isdir(root):
        raise Refused(f"{path}: no such file or folder; give an image folder, a list of files or a CIFAR-10 folder")
    names = os.listdir(root)
    for first, read in ((b"data_batch_1.bin", read_cifar_bin), (b"data_batch_1", read_cifar_py)):
        if first in names:
            return tuple(read_cifar(path, batches, read) for batches in CIFAR_BATCHES)
    train, val = (os.path.join(root, split) for split in (b"train", b"val"))
    classes = subfolders(train)
    if not classes:
        return in_memory(Source(files=list_images(train if os.path.isdir(train) else root))), None
    return tuple(in_memory(list_classes(split, classes)) if subfolders(split) else None for split in (train, val))


def subfolders(path):
    return sorted(os.fsdecode(entry.name) for entry in os.scandir(path) if entry.is_dir()) if os.path.isdir(path) else []


def list_images(root):
    """All images under a folder, at any depth, through links but never twice through the same folder, sorted."""
    names, seen = [], set()
    for folder, inner, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        inner.sort()
        if (status.st_dev, status.st_ino) in seen:
            inner.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        names += [os.path.join(folder, name) for name in files if is_image(name)]
    if not names:
        raise Refused(f"{os.fsdecode(root)}: no images there (looked for {' '.join(SUFFIXES)})")
    return np.array(sorted(names))


def is_image(path):
    return os.fsdecode(path).lower().endswith(SUFFIXES)


def list_classes(root, classes):
    """A split of an image folder. An image's class is its first folder under root, numbered as sorted in train/."""
    files, number = list_images(root), {os.fsencode(name): k for k, name in enumerate(classes)}
    folders = [name[len(root) + 1:].partition(b"/")[0] for name in files]
    for name, folder in zip(files, folders):
        if folder not in number:
            raise Refused(f"{os.fsdecode(name)}: not in one of the {len(classes)} class folders of train/; move it into one, or away")
    return Source(files=files, labels=np.array([number[folder] for folder in folders]), classes=classes)


def read_list(path):
    """A text file with the path of an image on each line (relative to the text file), or a single image -> files."""
    if is_image(path):
        return np.array([path])
    with open(path, "rb") as f:
        names = [os.path.join(os.path.dirname(path), line.strip()) for line in f if line.strip()]
    missing = next((name for name in names if not os.path.isfile(name)), None)
    if missing is not None or not names:
        problem = f"{os.fsdecode(missing[:200])} is no file" if names else "it is empty"
        raise Refused(f"{os.fsdecode(path)}: a list of images should name a file on each line; {problem}")
    return np.array(names)


def read_rgb(path):
    """A file -> RGB PIL image, decoded. What Pillow opens becomes RGB: its first frame, as it lies there (EXIF turns nothing),
    without transparency; of 16 bits the higher 8. What Pillow doesn't open or decode whole is bad: raises BadImage."""
    path = os.fsdecode(path)
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # Pillow itself would cut all above 255
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # a damaged file can raise anything
        raise BadImage(f"{path}: can't be read as an image ({type(error).__name__}: {error}); mend it or take it away") from None


def read_image(path):
    """A file -> (H, W, 3) uint8 tensor, to be read only. Raises BadImage as read_rgb does."""
    image = read_rgb(path)
    return torch.frombuffer(image.tobytes(), dtype=torch.uint8).view(image.height, image.width, 3)


def read_or_replace(files, i):
    """File i or, where that is bad, the next good one -> (H, W, 3) uint8 tensor, {index: what is wrong} of the bad ones.
    Raises BadImage where 20 in a row are bad."""
    bad = {}
    for k in range(20):
        try:
            return read_image(files[(i + k) % len(files)]), bad
        except BadImage as error:
            bad[(i + k) % len(files)] = str(error)
    raise BadImage(f"20 files in a row can't be read as images, the first: {bad[i]}")


def printable(text):
    """Text without what a terminal would obey: file names can hold it."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "?", str(text))


def in_memory(source):
    """The same source, its pixels in one tensor if all images are small and of one size. A look at 16 files tells most."""
    def size(i):
        try:
            with Image.open(os.fsdecode(source.files[i])) as image:
                return image.size
        except Exception:  # a bad file: whoever reads it says what is wrong with it
            return None

    (width, height), *others = {size(i) for i in np.linspace(0, len(source) - 1, 16).astype(int)} - {None} or {(SMALL + 1, 0)}
    if others or max(width, height) > SMALL:
        return source
    pixels = torch.empty(len(source), 3, height, width, dtype=torch.uint8)
    for i in range(len(source)):
        image = source.image(i)
        if image.shape != (height, width, 3):
            return source
        pixels[i] = image.permute(2, 0, 1)
    return replace(source, pixels=pixels)


# CIFAR-10 (Krizhevsky 2009), in the two layouts that its page offers
CIFAR_BATCHES = [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]
CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def read_cifar(folder, batches, read):
    """One split of CIFAR-10 -> Source of (N, 3, 32, 32) pixels. Raises Refused, naming the file, if one isn't as it must be."""
    parts = []
    for name in batches:
        path = os.path.join(folder, name)
        try:
            data, labels = read(path)
            if data.dtype != np.uint8 or data.shape != (len(labels), 3072) or not {*labels} <= {*range(10)} or len(data) == 0:
                raise ValueError(f"data {data.dtype} {data.shape}, {len(labels)} labels from {min(labels)} to {max(labels)}")
        except Exception as error:  # a damaged pickle can raise anything
            raise Refused(f"{path}: not a batch of CIFAR-10 ({type(error).__name__}: {error}); unpack the archive again") from None
        parts.append((data, np.asarray(labels, np.int64)))
    data, labels = (np.concatenate(part) for part in zip(*parts))
    return Source(pixels=torch.from_numpy(data.reshape(-1, 3, 32, 32)), labels=labels, classes=CIFAR_CLASSES)


def read_cifar_bin(path):
    records = np.fromfile(path + ".bin", np.uint8).reshape(-1, 3073)  # one label byte and 3072 pixel bytes each
    return records[:, 1:], records[:, 0]


def read_cifar_py(path):
    with open(path, "rb") as f:
        batch = CifarUnpickler(f, encoding="bytes").load()
    return batch[b"data"], batch[b"labels"]


class CifarUnpickler(pickle.Unpickler):
    """A pickle can call any function it names. This reader knows the four that CIFAR's files name, and no other."""
    RECONSTRUCT = np.empty(0).__reduce__()[0]
    KNOWN = {("numpy.core.multiarray", "_reconstruct"): RECONSTRUCT, ("numpy._core.multiarray", "_reconstruct"): RECONSTRUCT,
             ("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype, ("_codecs", "encode"): codecs.encode}

    def find_class(self, module, name):
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which CIFAR-10 does not hold")
        return self.KNOWN[module, name]


# Shapes: a data set that needs no download. Ten kinds of object, told apart by form alone
def box(left, top, right, bottom):
    return [complex(left, top), complex(right, top), complex(right, bottom), complex(left, bottom)]


def corners(*radii):
    return radii * np.exp(2j * np.pi * np.arange(len(radii)) / len(radii))


OBJECTS = {  # polygons, and discs as (centre, radius, 255 paint or 0 hole), within the unit disc of the complex plane
    "disc": [(0, 0.85, 255)],
    "ring": [(0, 1, 255), (0, 0.6, 0)],
    "crescent": [(0, 1, 255), (0.5, 0.75, 0)],
    "square": [corners(1, 1, 1, 1)],
    "triangle": [corners(1, 1, 1)],
    "star": [corners(*(1, 0.42) * 5)],
    "cross": [box(-1, -0.28, 1, 0.28), box(-0.28, -1, 0.28, 1)],
    "bars": [box(-0.8, -0.8, 0.8, -0.4), box(-0.8, -0.2, 0.8, 0.2), box(-0.8, 0.4, 0.8, 0.8)],
    "dots": [(-0.55 - 0.35j, 0.38, 255), (0.55 - 0.35j, 0.38, 255), (0.6j, 0.38, 255)],
    "arrow": [box(-1, -0.2, 0.1, 0.2), [0.05 - 0.7j, 1, 0.05 + 0.7j]],
}
SCALE = 4  # images are drawn this much larger and averaged down, for smooth edges


def draw_shapes(seed, start, count, side=32):
    """Images start ... start + count - 1 of the shapes of this seed, `side` pixels each -> Source. The kinds take turns.

    Colours, place, size, rotation, background and clutter don't depend on the kind, so that no statistic of colour tells
    it. The object is always lighter than its ground: otherwise that one bit, which no augmentation takes away, is what
    SimSiam learns first."""
    index = np.arange(start, start + count)
    u = uniforms(seed, 0, index[:, None], SHAPES, np.arange(80))
    pixels = np.stack([draw_shape(list(OBJECTS)[i % 10], iter(u_i), side) for i, u_i in zip(index, u)])
    return Source(pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels=index % 10, classes=list(OBJECTS))


def draw_shape(kind, u, side):
    """An image of this kind from an iterator over 80 uniform numbers -> (side, side, 3) uint8"""
    big = SCALE * side

    def colour(low, high):
        return tuple(int(low + (high - low) * next(u)) for _ in range(3))

    ramp = Image.linear_gradient("L").rotate(360 * next(u)).resize((big, big), box=(37, 37, 219, 219))
    image = Image.composite(Image.new("RGB", (big, big), colour(0, 90)), Image.new("RGB", (big, big), colour(0, 90)), ramp)
    draw = ImageDraw.Draw(image)
    for _ in range(8):  # strokes of clutter, under the object
        x, y, dx, dy = (big * next(u) for _ in range(4))
        draw.line((x, y, x + (dx - big / 2) / 2, y + (dy - big / 2) / 2), fill=colour(40, 110), width=SCALE)
    radius = big * (0.18 + 0.24 * next(u))
    centre = complex(*(radius + (big - 2 * radius) * next(u) for _ in range(2)))
    turned = radius * np.exp(1j * np.pi * next(u))
    mask = Image.new("L", (big, big))
    pen = ImageDraw.Draw(mask)
    for part in OBJECTS[kind]:
        if isinstance(part, tuple):
            at, r = centre + turned * part[0], radius * part[1]
            pen.ellipse((at.real - r, at.imag - r, at.real + r, at.imag + r), fill=part[2])
        else:
            pen.polygon([(z.real, z.imag) for z in centre + turned * np.array(part)], fill=255)
    image.paste(colour(150, 256), mask=mask)
    return np.array(image.reduce(SCALE))


# --- Loading: from a source to batches on the device -----------------------------------------------------------------

def steps(seed, n, batch, epochs, start_epoch=0, start_step=0, rank=0, world=1):
    """Yield (epoch, indices) for every step from the start on: this process's share of each global batch of n images.
    The last, incomplete batch of an epoch is dropped. The global batches are the same whatever the number of processes."""
    share = batch // world
    for epoch in range(start_epoch, epochs):
        order = permutation(seed, epoch, n)
        for step in range(start_step if epoch == start_epoch else 0, n // batch):
            start = step * batch + rank * share
            yield epoch, order[start:start + share]


def load_views(source, policy, seed, batches, device, workers, views=2):
    """For each (epoch, indices) of `batches`, yield (indices, [x1, x2, ...]): views (N, 3, S, S), normalised, on the device.
    Raises BadImage where too many files can't be read."""
    if source.pixels is None:
        crops = decode(source, partial(cut_views, policy, seed, views), batches, device, workers)
    else:
        crops = cut_views_in_memory(source.pixels.to(device), policy, seed, batches, views)
    for epoch, index, x in crops:
        yield index, [photometric(x[v], draw_colour(policy, seed, epoch, index, v), policy) for v in range(views)]


def load_centres(source, policy, batches, device, workers):
    """The same without randomness, for evaluation: yield (indices, x), test views (N, 3, S, S), normalised."""
    if source.pixels is None:
        stored = decode(source, partial(cut_centre, policy), batches, device, workers)
    else:
        stored = ((epoch, i, [resize_centre(source.pixels[torch.from_numpy(i)], policy).to(device)]) for epoch, i in batches)
    for _, index, (x,) in stored:
        yield index, normalize(x.float(), policy)


def cut_views(policy, seed, views, image, epoch, i):
    """The geometry of an image's views: (H, W, 3) uint8 -> [(3, S, S) uint8, one per view]"""
    crop = draw_crop(policy, seed, epoch, np.full(views, i), np.arange(views), *image.shape[:2])
    return [crop_resize(image, crop, v, policy.size) for v in range(views)]


def cut_centre(policy, image, epoch, i):
    return list(resize_centre(image.permute(2, 0, 1)[None], policy))


def cut_views_in_memory(pixels, policy, seed, batches, views):
    for epoch, index in batches:
        images = pixels.index_select(0, on(pixels, index))
        crops = [draw_crop(policy, seed, epoch, index, np.full(len(index), v), *images.shape[2:]) for v in range(views)]
        yield epoch, index, [crop_resize_batch(images, crop, policy.size) for crop in crops]


LOADER_TIMEOUT = 600  # seconds


def decode(source, cut, batches, device, workers):
    """Yield (epoch, indices, [(N, 3, S, S) uint8 on the device, one per view]), decoded and cut by worker processes."""
    loader = torch.utils.data.DataLoader(Decoder(source.files, cut), batch_sampler=batches, num_workers=workers, collate_fn=tuple,
                                         prefetch_factor=(2 if workers <= 4 else 1) if workers else None,  # fewer in /dev/shm
                                         timeout=LOADER_TIMEOUT if workers else 0, worker_init_fn=outlive_signals, pin_memory=device.type == "cuda")
    for epoch, index, views, bad in loader:
        if isinstance(bad, BadImage):
            raise bad
        source.note(bad)
        yield epoch, index, [x.to(device, non_blocking=True) for x in views]


STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # signals that end a run after its step


def outlive_signals(worker):
    """In a worker: a signal to the whole job must leave the main process with batches for the steps that it has to finish."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


class Decoder(torch.utils.data.Dataset):
    """In a worker: (epoch, indices) -> a batch of cut images. Each file is read and decoded once for all its views."""

    def __init__(self, files, cut):
        self.files, self.cut = files, cut

    def __getitems__(self, batch):
        epoch, index = batch
        cuts, bad = [], {}
        try:
            for i in index:
                image, met = read_or_replace(self.files, i)
                cuts.append(self.cut(image, epoch, i))
                bad |= met
            return epoch, index, torch.utils.data.default_collate(cuts), bad  # into memory that the main process shares
        except BadImage as error:
            return epoch, index, None, error  # raised in the main process: from here it would arrive wrapped in a traceback


# --- The contact sheet -----------------------------------------------------------------------------------------------

def contact_sheet(source, policy, seed, epoch=0, rows=8, pairs=4):
    """A picture (PIL Image): on each row an image as stored, then pairs of its views x1, x2, of consecutive epochs."""
    tile, gap = policy.size * max(1, 96 // policy.size), 4
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (policy.mean, policy.std))
    chosen = np.linspace(0, len(source) - 1, min(rows, len(source))).astype(int)
    sheet = Image.new("RGB", (tile + pairs * (2 * tile + 3 * gap), len(chosen) * (tile + gap) - gap), "white")
    for i, y in zip(chosen, range(0, sheet.height, tile + gap)):
        stored = source.image(i)
        original = Image.fromarray(stored.numpy())
        original = original.resize([max(1, round(side * tile / max(original.size))) for side in original.size])
        sheet.paste(original, ((tile - original.width) // 2, y + (tile - original.height) // 2))
        for pair in range(pairs):
            crops = cut_views(policy, seed, 2, stored, epoch + pair, i)
            for v in range(2):
                x = photometric(crops[v][None], draw_colour(policy, seed, epoch + pair, [i], v), policy)[0] * std + mean
                view = Image.fromarray((x * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
                left = tile + 2 * gap + pair * (2 * tile + 3 * gap) + v * (tile + gap)
                sheet.paste(view.resize((tile, tile), Image.Resampling.NEAREST), (left, y))
    return sheet


# --- The benchmark: what each part costs on this machine, and what the conventional way would ------------------------

def opened(source, i):
    """The i-th image as a PIL image, decoded."""
    return read_rgb(source.files[i]) if source.pixels is None else Image.fromarray(source.image(i).numpy())


def view_by_pillow(image, crop, colour, policy):
    """A view of a PIL image as the released code's kind of pipeline makes it: by Pillow's operations, in floats at the very end.
    crop, colour: of this one view -> (3, S, S) float32, normalised"""
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    view = image.crop(box).resize((policy.size, policy.size), Image.Resampling.BILINEAR)
    for change in colour.order if colour.jitter else ():
        if change < 3:
            view = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[change](view).enhance(colour.factor[change])
        else:
            h, s, v = view.convert("HSV").split()
            h = Image.fromarray(np.asarray(h) + np.uint8(round(255 * colour.factor[3]) % 256))
            view = Image.merge("HSV", (h, s, v)).convert("RGB")
    view = view.convert("L").convert("RGB") if colour.gray else view
    view = view.filter(ImageFilter.GaussianBlur(float(colour.sigma))) if colour.sigma > 0 else view
    view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.flip else view
    return normalize(torch.from_numpy(np.array(view)).permute(2, 0, 1).contiguous().float(), policy)


def views_by_pillow(source, policy, seed, epoch, index):
    """What load_views makes of these images, the conventional way, one view after the other: [x1, x2]"""
    colour, views = [draw_colour(policy, seed, epoch, index, v) for v in range(2)], ([], [])
    for k, i in enumerate(index):
        image = opened(source, i)
        crop = draw_crop(policy, seed, epoch, np.full(2, i), np.arange(2), image.height, image.width)
        for v in range(2):
            views[v].append(view_by_pillow(image, Crop(*(a[v] for a in crop)), Colour(*(a[k] for a in colour[v])), policy))
    return [torch.stack(x) for x in views]


def rate(source, policy, device, part):
    """Images a second that this process does of a part of the pipeline, by two views of each image of the source."""
    index = np.arange(len(source))
    cut = Decoder(source.files, partial(cut_views, policy, 0, 2)).__getitems__ if source.pixels is None else \
        lambda batch: next(cut_views_in_memory(source.pixels.to(device), policy, 0, [batch], 2))
    x = [x_v.to(device) for x_v in cut((0, index))[2]] if part == "colour" else None
    work = {"decode": lambda: [opened(source, i) for i in index],
            "decode and cut": lambda: cut((0, index)),
            "colour": lambda: [photometric(x[v], draw_colour(policy, 0, 0, index, v), policy) for v in range(2)],
            "all": lambda: list(load_views(source, policy, 0, [(0, index)], device, 0)),
            "all, by Pillow": lambda: views_by_pillow(source, policy, 0, 0, index)}[part]
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return len(source) / (time.perf_counter() - began)


def loader_rate(source, policy, device, workers):
    """Images a second that the DataLoader brings, decoded and cut, from when its queues have been emptied once."""
    batches, start = [(0, np.arange(len(source)))] * 12 * workers, 4 * workers
    arrivals = [time.perf_counter() for _ in decode(source, partial(cut_views, policy, 0, 2), batches, device, workers)]
    return len(source) * (len(arrivals) - 1 - start) / (arrivals[-1] - arrivals[start])


def bench(source, policy, device, repeats=9):
    """Print what each part of the pipeline costs, for 48 of the images, or 512 that are in memory -> {part: images/s on one core, on all},
    medians of interleaved repeats. On one core the device is used; on all, each has the whole of its work."""
    cores, threads, chosen = os.cpu_count(), torch.get_num_threads(), np.linspace(0, len(source) - 1, 48 if source.pixels is None else 512).astype(int)
    source = Source(files=source.files[chosen]) if source.pixels is None else Source(pixels=source.pixels[chosen])
    torch.set_num_threads(1)
    found = {part: ([], []) for part in ["decode"] * (source.pixels is None) + ["decode and cut", "colour", "all", "all, by Pillow"]}
    with multiprocessing.Pool(cores, torch.set_num_threads, (1,)) as pool:
        for part in list(found) * repeats:
            found[part][0].append(rate(source, policy, device, part))
            found[part][1].append(sum(pool.map(partial(rate, source, policy, torch.device("cpu")), [part] * cores, chunksize=1)))
    if source.pixels is None:
        found["DataLoader, 1 and 2 workers"] = [[loader_rate(source, policy, device, workers) for _ in range(max(1, repeats // 3))] for workers in (1, 2)]
    torch.set_num_threads(threads)
    found = {part: [statistics.median(rates) for rates in both] for part, both in found.items()}
    beside = {name: found[part] for name, part in (("times Pillow", "all, by Pillow"), ("times decode", "decode")) if part in found}
    print(f"{'images/s (' + '; '.join(beside) + ')':40}{f'one core, {device.type}':>26}{f'{cores} cores':>26}")
    for part, both in found.items():
        shown = [f"{r:.0f} ({'; '.join(f'{r / b:.2f}' for b in others)})" for r, *others in zip(both, *beside.values())]
        print(f"{part:40}{shown[0]:>26}{shown[1]:>26}")
    return found


def complaint(path):
    """What is wrong with a file, or None."""
    try:
        read_image(path)
    except BadImage as error:
        return printable(error)


def check_files(files):
    """Read all files, on all cores, and print what is wrong with which -> how many are bad."""
    bad, shown = 0, sys.stderr.isatty()
    with multiprocessing.Pool() as pool:
        for n, problem in enumerate(pool.imap(complaint, files, chunksize=16), 1):
            bad += problem is not None
            if problem:
                print("\r\033[K" * shown + problem, flush=True)
            if shown and (n % 100 == 0 or n == len(files)):
                print(f"\r{n} of {len(files)}, {bad} bad", end="\n" * (n == len(files)), file=sys.stderr, flush=True)
    return bad


def main():
    parser = argparse.ArgumentParser(description="Draw a contact sheet: images beside several pairs of views, made with "
                                     "the paper's settings. (A run's own views, with its own settings, are in its folder.) Or check image files.")
    parser.add_argument("data", nargs="?", help="a photo, or whatever simsiam.py takes as DATA (default: the embedded shapes)")
    parser.add_argument("--out", default="views.png", help="the picture to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epoch", type=int, default=0, help="of the views (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="read every image instead, and list what is wrong with which")
    parser.add_argument("--bench", action="store_true", help="measure the pipeline instead, on 48 of the images, or 512 that are in memory")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu", help="for --bench")
    args = parser.parse_args()
    try:
        train, val = open_data(args.data, args.seed)
        if args.check:
            files = [name for source in (train, val) if source is not None and source.files is not None for name in source.files]
            bad = check_files(files)
            sys.exit(f"augment.py: {bad} of {len(files)} image files are bad" if bad else print(f"all {len(files)} image files are good"))
        policy = Policy() if train.pixels is None else Policy(size=max(train.pixels.shape[2:]), blur=0)
        if args.bench:
            return bench(train, policy, torch.device(args.device))
        contact_sheet(train, policy, args.seed, args.epoch).save(args.out)
    except (Refused, OSError, ValueError) as error:
        sys.exit(f"augment.py: {printable(error)}")
    print(f"{args.out}: some of {len(train)} images, and pairs of {policy.size}-pixel views of each")


if __name__ == "__main__":
    main()
