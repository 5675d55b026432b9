"""SimSiam (Chen & He 2020, "Exploring Simple Siamese Representation Learning", arXiv 2011.10566): pre-training.

    python simsiam.py                                    no data needed: drawn shapes, minutes on a laptop
    python simsiam.py CIFAR                              a CIFAR-10 folder (-bin, -py or images); any small images
    python simsiam.py IMAGES                             train/<class>/*.jpg, or any folder or list of images, no labels
    torchrun --nproc-per-node 8 simsiam.py IMAGENET      one machine with 8 GPUs
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 simsiam.py IMAGENET
                                                         the same line on each of 4 machines; HOST is one of them
    add --resume to continue a run that was interrupted; python simsiam.py --help lists the options

Read top to bottom: the loss, the heads, the model, the schedule, one training step; then what is watched; from "plumbing
only below" on, nothing is specific to SimSiam. The views are made in augment.py, the backbone is in resnet.py.

The paper's letters: x1, x2 two views of a batch of images (N, 3, S, S); f the encoder (backbone and projection MLP), h the
prediction MLP; z1 = f(x1), p1 = h(z1), (N, d) each; D the negative cosine similarity. "Sec.", "Eq.", "Table": the paper's.
"""
import argparse
import contextlib
import copy
import datetime
import fractions
import json
import math
import os
import platform
import resource
import shlex
import shutil
import sys
import time

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import augment
import resnet
from augment import Refused

# --- The loss (Sec. 3) -----------------------------------------------------------------------------------------------


def l2_normalize(v):
    """Each row divided by its l2 norm: (N, d) -> (N, d), in float32 at least (bf16 would cost the loss its third digit)."""
    return F.normalize(v.to(torch.promote_types(v.dtype, torch.float32)), dim=1)


def D(p, z):
    """Negative cosine similarity, averaged over the batch: (N, d), (N, d) -> scalar in [-1, 1]. Does not detach."""
    return -(l2_normalize(p) * l2_normalize(z)).sum(dim=1).mean()       # Eq. (1): D(p, z) = -p/|p| . z/|z|


def stopgrad(z):
    """z as a constant: the same values, through which no gradient flows. Without it SimSiam collapses (Sec. 4.1)."""
    return z.detach()                                                   # Eq. (3): D(p1, stopgrad(z2))


def loss(p1, p2, z1, z2):
    """SimSiam's symmetrised loss; its minimum is -1.

    The encoder on x2 gets no gradient from z2 in the first term, but does from p2 in the second.
    """
    return D(p1, stopgrad(z2)) / 2 + D(p2, stopgrad(z1)) / 2            # Eq. (4): L = 1/2 D(p1, sg(z2)) + 1/2 D(p2, sg(z1))


def loss_without_stopgrad(p1, p2, z1, z2):
    """The same loss before stop-gradient enters, for Fig. 2's collapsing run."""
    return D(p1, z2) / 2 + D(p2, z1) / 2                                # Eq. (2): L = 1/2 D(p1, z2) + 1/2 D(p2, z1)


# --- The model (Sec. 3, "Baseline settings") -------------------------------------------------------------------------
# A linear layer has a bias only where no BN follows it: BN would subtract it again.

def projection_mlp(features, hidden, dim, layers):
    """The end of f: `layers` fc layers, BN on each, ReLU on all but the last. (N, features) -> (N, dim)

    DEPARTURE: the output BN has no affine scale and offset, as in the released code; with them the paper measured the same.
    The first hidden width is the paper's 2048; the released code takes the backbone's, which differs for ResNet-18.
    """
    widths = [features] + [hidden] * (layers - 1)
    mlp = []
    for width, following in zip(widths, widths[1:]):
        mlp += [nn.Linear(width, following, bias=False), nn.BatchNorm1d(following), nn.ReLU(inplace=True)]
    mlp += [nn.Linear(widths[-1], dim, bias=False), nn.BatchNorm1d(dim, affine=False)]
    return nn.Sequential(*mlp)


def prediction_mlp(dim, hidden):
    """h: a bottleneck of two fc layers, BN and ReLU on the hidden one only. (N, dim) -> (N, dim)"""
    return nn.Sequential(nn.Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True),
                         nn.Linear(hidden, dim))


class SimSiam(nn.Module):
    """The encoder f (a ResNet whose fc is the projection MLP) and the predictor h. Parameters are named as in the
    released model. Raises Refused for sizes that make no network.

    arch, width, cifar_stem           the backbone: see resnet.py
    proj_layers, proj_hidden, dim     the projection MLP: fc layers, hidden width, output width d
    pred_dim                          hidden width of h; d/4 is the paper's bottleneck
    """

    def __init__(self, arch="resnet50", dim=2048, pred_dim=512, proj_layers=3, proj_hidden=2048, width=1, cifar_stem=False):
        super().__init__()
        if min(dim, pred_dim, proj_layers, proj_hidden) < 1:
            raise Refused("--dim, --pred-dim, --proj-layers and --proj-hidden must be at least 1")
        try:
            self.encoder = resnet.ARCHS[arch](width=width, cifar_stem=cifar_stem)
        except ValueError as error:
            raise Refused(f"--width: {error}") from None
        self.encoder.fc = projection_mlp(self.encoder.num_features, proj_hidden, dim, proj_layers)
        self.predictor = prediction_mlp(dim, pred_dim)

    def forward(self, x1, x2):
        """Two views (N, 3, S, S) -> p1, p2, z1, z2, (N, d) each, all with gradient.

        Each view passes through f by itself, and so is normalised by its own batch statistics. One pass over both views
        together would be faster, and another method.
        """
        f, h = self.encoder, self.predictor
        z1, z2 = f(x1), f(x2)
        p1, p2 = h(z1), h(z2)
        return p1, p2, z1, z2


# --- Optimisation (Sec. 3) -------------------------------------------------------------------------------------------

def sgd(model, momentum, weight_decay):
    """SGD over f and h, two groups because h may have an lr schedule of its own. Weight decay is on *all* parameters, BN
    scales and biases included. The lr is set before every step, by set_lr."""
    groups = [{"params": model.encoder.parameters()}, {"params": model.predictor.parameters()}]
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, weight_decay=weight_decay, fused=True)


def initial_lr(base_lr, batch):
    """The linear scaling rule (Goyal et al. 2017), with the *global* batch."""
    return base_lr * batch / 256                                        # Sec. 3 (lr): lr = base_lr x batch / 256


def warmup(step, warmup_steps):
    """The factor on the lr while warming up, linear: 1/warmup_steps at step 0, and 1 from step warmup_steps - 1 on."""
    return min(1.0, (step + 1) / max(1, warmup_steps))


def cosine(step, total_steps, warmup_steps):
    """Half a cosine over the steps after the warm-up: the factor on the lr falls from 1 to 0 (Loshchilov & Hutter 2017).

    DEPARTURE: set at every step, where the released code does so once an epoch; the paper doesn't say.
    """
    progress = max(0, step - warmup_steps) / max(1, total_steps - warmup_steps)
    return (1 + math.cos(math.pi * progress)) / 2                       # Sec. 3 (schedule): cosine decay to 0


def set_lr(optimizer, lr, step, total_steps, warmup_steps, pred_lr):
    """Give f the decayed lr; give h the same (pred_lr "cosine") or one that stays (pred_lr "constant", Table 1 c)."""
    f, h = optimizer.param_groups
    f["lr"] = lr * warmup(step, warmup_steps) * cosine(step, total_steps, warmup_steps)
    h["lr"] = f["lr"] if pred_lr == "cosine" else lr * warmup(step, warmup_steps)


def train_step(network, objective, optimizer, autocast, x1, x2):
    """One iteration of Algorithm 1 on two views (N, 3, S, S) of this process's share of the batch.

    network     SimSiam, or its DistributedDataParallel, which averages the gradients over the processes in backward
    objective   `loss`, or another function of p1, p2, z1, z2
    autocast    the context that sets the precision of the forward pass
    Returns the loss and z1, z2, detached, for the monitors.
    """
    with autocast:
        p1, p2, z1, z2 = network(x1, x2)        # (N, d) each
        L = objective(p1, p2, z1, z2)
    optimizer.zero_grad()
    L.backward()
    optimizer.step()                                                    # Alg. 1: update(f, h)
    return L.detach(), z1.detach(), z2.detach()


# --- What is watched (Sec. 4.1): the loss, the std of z, a kNN classifier --------------------------------------------

def std(z, all_sum=lambda t: t):
    """Std over the samples of each channel of z/|z|, averaged over the channels: (N, d) -> scalar. Collapse: 0. Scattered
    over the sphere: 1/sqrt(d). all_sum adds a tensor up over the processes, so that the samples are the global batch."""
    v = l2_normalize(z)
    n, total, squares = all_sum(torch.stack([torch.ones_like(v), v, v * v]).sum(dim=1))     # (3, d) -> (d,) each
    return (squares / n - (total / n) ** 2).clamp(min=0).sqrt().mean()  # Sec. 4.1 (std): std of z/|z| over the batch


def collapsed(loss, scaled_std, n):
    """Whether a loss and a std x sqrt(d) over batches of n mean collapse. Behind an output BN the outputs can't all be one
    point, since their mean is 0: n - 1 of them meet at u and one at -u, where std x sqrt(d) is about 2/sqrt(n)."""
    return loss < -0.95 and scaled_std < max(0.1, 3 / math.sqrt(n))


def knn(bank, bank_labels, queries, k=200, temperature=0.1):
    """Weighted kNN (Wu et al. 2018, Sec. 3.4): each of the k nearest in the bank votes with exp(cosine / temperature).

    bank (B, d), queries (Q, d): l2-normalised features; bank_labels (B,) int64; k at most B -> predicted labels (Q,)
    """
    classes = int(bank_labels.max()) + 1
    predicted = []
    for q in queries.split(max(1, 2 ** 27 // len(bank))):               # half a GiB of similarities at a time
        similarity, neighbour = (q @ bank.T).topk(k, dim=1)             # (q, k)
        votes = torch.zeros(len(q), classes, device=q.device)
        votes.scatter_add_(1, bank_labels[neighbour], (similarity / temperature).exp())
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted)


# --- Recipes and experiments -----------------------------------------------------------------------------------------
# Each row is an option of the command line (--base-lr, --area, ...). shapes has no counterpart in the paper: it is the
# smallest setting that shows the method in minutes on two cores.

RECIPES = ("imagenet", "cifar10", "shapes")
SETTINGS = {          # imagenet                cifar10                   shapes                    where the paper has it
    "arch":         ("resnet50",               "resnet18",               "resnet18"),              # Sec. 3; supp. D
    "width":        (1.0,                      1.0,                      1 / 8),                   # -
    "cifar_stem":   (False,                    True,                     True),                    # supp. D
    "proj_layers":  (3,                        2,                        2),                       # Sec. 3; supp. D
    "proj_hidden":  (2048,                     2048,                     512),                     # Sec. 3
    "dim":          (2048,                     2048,                     512),                     # Sec. 3; supp. D
    "pred_dim":     (512,                      512,                      128),                     # Sec. 3
    "epochs":       (100,                      800,                      24),                      # Sec. 3; supp. D
    "batch":        (512,                      512,                      64),                      # Sec. 3; supp. D
    "base_lr":      (0.05,                     0.03,                     1.0),                     # Sec. 3; supp. D
    "momentum":     (0.9,                      0.9,                      0.9),                     # Sec. 3
    "weight_decay": (1e-4,                     5e-4,                     5e-4),                    # Sec. 3; supp. D
    "warmup":       (0,                        0,                        0),                       # Sec. 3 (epochs)
    "pred_lr":      ("constant",               "constant",               "constant"),              # Table 1 (c)
    "size":         (224,                      32,                       32),                      # supp. A; supp. D
    "area":         ((0.2, 1.0),               (0.2, 1.0),               (0.3, 1.0)),              # supp. A
    "aspect":       ((3 / 4, 4 / 3),           (3 / 4, 4 / 3),           (3 / 4, 4 / 3)),          # supp. A (PyTorch's)
    "jitter":       (0.8,                      0.8,                      0.8),                     # supp. A
    "strength":     ((0.4, 0.4, 0.4, 0.1),     (0.4, 0.4, 0.4, 0.1),     (0.6, 0.6, 0.6, 0.5)),    # supp. A
    "gray":         (0.2,                      0.2,                      0.3),                     # supp. A
    "blur":         (0.5,                      0.0,                      0.0),                     # released code; supp. D
    "sigma":        ((0.1, 2.0),               (0.1, 2.0),               (0.1, 2.0)),              # supp. A
    "flip":         (0.5,                      0.5,                      0.5),                     # supp. A
    "mean":         ((0.485, 0.456, 0.406),    (0.4914, 0.4822, 0.4465), (0.485, 0.456, 0.406)),   # supp. A (ImageNet's); CIFAR's own
    "std":          ((0.229, 0.224, 0.225),    (0.2470, 0.2435, 0.2616), (0.229, 0.224, 0.225)),   # likewise
    "centre":       (224 / 256,                1.0,                      1.0),                     # supp. A (test view)
    "knn_every":    (10,                       5,                        10),                      # supp. D (epochs)
}

# name: (objective, settings that differ from the recipe, the paper's ImageNet top-1)
EXPERIMENTS = {
    "simsiam":               (loss,                  {},                    "68.1"),
    "fig2-with-stopgrad":    (loss,                  {"pred_lr": "cosine"}, "67.7, std near 1/sqrt(d)"),
    "fig2-without-stopgrad": (loss_without_stopgrad, {"pred_lr": "cosine"}, "0.1, loss to -1, std to 0"),
}

# === Plumbing only below =============================================================================================

# --- Processes and devices. A single process is a world of one: it has a process group too, and nothing below asks ---

def join_world(device):
    """Join the processes that torchrun started, or make a world of this one. -> (device, rank, world size)"""
    if device.type == "cuda":
        wanted, there = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if wanted > there:
            raise Refused(f"{wanted} processes on this machine, but {there} GPUs: start fewer processes, or give --device cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, **alone)
    return device, dist.get_rank(), dist.get_world_size()


def cores():
    """This process's share of the machine's cores."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def my_share(n):
    """This process's part of the indices 0 ... n - 1: consecutive, and as even as n allows."""
    return np.array_split(np.arange(n), dist.get_world_size())[dist.get_rank()]


def all_sum(t):
    """The sum of a tensor over all processes, in place."""
    dist.all_reduce(t)
    return t


class AllSum(torch.autograd.Function):
    """all_sum with its gradient, which is the sum of the gradients over all processes."""

    @staticmethod
    def forward(ctx, t):
        return all_sum(t.clone())

    @staticmethod
    def backward(ctx, grad):
        return all_sum(grad.clone())


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BN over the global batch where torch.nn.SyncBatchNorm refuses to: on a CPU. Same statistics as one process has."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        dims = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        n = x.numel() // x.shape[1] * dist.get_world_size()
        mean = AllSum.apply(x.sum(dims)) / n                            # (C,)
        centred = x - mean.view(shape)
        var = AllSum.apply((centred ** 2).sum(dims)) / n                # (C,)
        with torch.no_grad():
            self.num_batches_tracked += 1
            share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(var * n / (n - 1), share)
        x = centred * (var + self.eps).rsqrt().view(shape)
        return x if self.weight is None else x * self.weight.view(shape) + self.bias.view(shape)


def distribute(model, device):
    """Make a model train as one over all processes: BN over the global batch, gradients averaged."""
    if dist.get_world_size() == 1:
        return model
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.__class__ = SyncBatchNorm  # same parameters, buffers and names
    # Buffers need no broadcast: synchronised statistics are equal on all processes already.
    return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None,
                                               broadcast_buffers=False, gradient_as_bucket_view=True)


def fastest_layout(model, device):
    """channels_last, with one exception: on a CPU, oneDNN 3.12 (in torch 2.13) writes out of bounds in the backward pass of
    strided 1x1 convolutions of fewer than 16 channels (seen from 46 pixels up), which narrow networks have."""
    narrow = device.type == "cpu" and model.encoder.conv1.out_channels < 16
    return torch.contiguous_format if narrow else torch.channels_last


# --- Evaluating while training ---------------------------------------------------------------------------------------

@torch.no_grad()
def extract(features, source, policy, device, workers):
    """l2-normalised features of a source's test views, by all processes together, in order: (n, d) on every process."""
    n, mine = len(source), my_share(len(source))
    batches = [(0, mine[i:i + 256]) for i in range(0, len(mine), 256)]
    out = None
    for index, x in augment.load_centres(source, policy, batches, device, workers):
        v = l2_normalize(features(x))
        out = torch.zeros(n, v.shape[1], device=device) if out is None else out
        out[augment.on(out, index)] = v
    return all_sum(out)


def knn_accuracy(features, data, policy, device, workers, k=200):
    """kNN top-1 in percent, over the whole validation set against the training set. features: images -> (N, d)"""
    train, val = data
    bank, queries = (extract(features, source, policy, device, workers) for source in data)
    labels, truth = (torch.from_numpy(source.labels).to(device) for source in data)
    mine = torch.from_numpy(my_share(len(val))).to(device)
    right = (knn(bank, labels, queries[mine], min(k, len(train))) == truth[mine]).sum()
    return 100 * all_sum(right).item() / len(val)


def calibrated(model, train, policy, device, workers):
    """A copy of an untrained model whose BN statistics are those of (up to 2048 of) the training images. With the initial
    ones, mean 0 and variance 1, an untrained network is a worse feature extractor than it needs to be."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # a plain average over the batches
    chosen = augment.permutation(0, 0, len(train))[:2048]
    batches = [(0, i) for i in np.array_split(chosen, math.ceil(len(chosen) / 256))]  # the same on all processes
    with torch.no_grad():
        for _, x in augment.load_centres(train, policy, batches, device, workers):
            model.encoder.features(x)
    return model


# --- The run folder: checkpoint, log, pictures -----------------------------------------------------------------------

FORMAT = 1  # of checkpoint.pth; to be raised when its contents change


@contextlib.contextmanager
def replacing(path, mode="wb"):
    """Write a file so that at every instant the old one or the new one is there, whole: under a temporary name first, out to
    the disk, then renamed."""
    with open(f"{path}.tmp", mode) as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    os.fsync(folder)  # the new name too
    os.close(folder)


def save(what, path):
    with replacing(path) as f:
        torch.save(what, f)


def load_checkpoint(path, settings):
    """The checkpoint of a run with these settings. Raises Refused if it is damaged, foreign, or of another run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["format"] != FORMAT:
            raise ValueError(f"format {checkpoint['format']}, this program reads {FORMAT}")
        saved = checkpoint["settings"]
    except Exception as error:  # a damaged file can raise anything
        reason = str(error).partition("\n")[0]
        raise Refused(f"{path}: can't be continued from ({type(error).__name__}: {reason}); "
                      "restore it, or start anew in another --out") from None
    changed = [f"{key} {saved.get(key)} -> {settings.get(key)}" for key in sorted({*saved, *settings} - MAY_CHANGE)
               if saved.get(key) != settings.get(key)]
    if changed:
        raise Refused(f"{path}: was made with other settings ({'; '.join(changed)}); give the same command, or another --out")
    return checkpoint


MAY_CHANGE = {"data", "workers", "world", "knn_every", "save_minutes"}  # between a run and its continuation


def append(path, record):
    with open(path, "a") as f:
        f.write(json.dumps(record) + "\n")


def draw_curves(path, records, knn_pixels):
    """The three panels of the paper's Fig. 2 from the log's epochs: loss, std with its 1/sqrt(d) line, accuracy (kNN)."""
    width, height, left, top, bottom = 420, 300, 58, 40, 44
    image = Image.new("RGB", (3 * width, height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    last = max(1, records[-1]["epoch"])
    panels = ("loss", "training loss (minimum -1)", -1, 0), ("std", "std x sqrt(d)  (1: scattered, 0: collapsed)", 0, 1.1), \
             ("knn", "kNN top-1 (%)", 0, 100)
    for panel, (key, title, low, high) in enumerate(panels):
        points = [(r["epoch"], r[key]) for r in records if r[key] is not None]
        x0, x1, y0, y1 = panel * width + left, (panel + 1) * width - 16, height - bottom, top
        low, high = (min([low] + [v for _, v in points]), max([high] + [v for _, v in points]))

        def at(epoch, value):
            return x0 + (x1 - x0) * epoch / last, y0 + (y1 - y0) * (value - low) / (high - low)

        pen.text((x0, 12), title, "black", font)
        for tick in np.linspace(low, high, 5):
            pen.line([at(0, tick), at(last, tick)], "#dddddd")
            pen.text((x0 - 6, at(0, tick)[1]), f"{tick:.3g}", "black", font, anchor="rm")
        for tick in sorted({round(last * share) for share in (0, 0.25, 0.5, 0.75, 1)}):
            pen.text((at(tick, low)[0], y0 + 6), str(tick), "black", font, anchor="mt")
        pen.text(((x0 + x1) / 2, y0 + 25), "epoch", "black", font, anchor="mt")
        reference = {"std": (1, "1/sqrt(d)"), "knn": (knn_pixels, "raw pixels")}.get(key, (None, None))
        if reference[0] is not None:
            pen.line([at(0, reference[0]), at(last, reference[0])], "#d62728", 1)
            pen.text((x1 - 2, at(0, reference[0])[1] - 2), reference[1], "#d62728", font, anchor="rb")
        if points:
            pen.line([at(*point) for point in points], "#1f4e9c", 2)
            pen.circle(at(*points[-1]), 3, "#1f4e9c")
        pen.rectangle((x0, y1, x1, y0), outline="black")
    with replacing(path) as f:
        image.save(f, "png")


def read_log(path, epoch, step):
    """The records that a checkpoint at this position has behind it: no epochs beyond it, and no end."""
    with open(path) as f:
        records = [json.loads(line) for line in f if line.endswith("}\n")]  # a kill may have cut the last line short
    if not records or records[0]["event"] != "start":
        raise Refused(f"{path}: does not begin with a start record; restore it, or start anew in another --out")
    behind = epoch if (epoch, step) != (0, 0) else -1
    return [r for r in records if r["event"] in ("start", "resume") or r["event"] == "epoch" and r["epoch"] <= behind]


def write_log(path, records):
    with replacing(path, "w") as f:
        f.writelines(json.dumps(record) + "\n" for record in records)


class Progress:
    """A line with rate and time left: redrawn on a terminal, printed now and then elsewhere; nothing on other ranks."""

    def __init__(self, total, quiet):
        self.total, self.live = total, sys.stdout.isatty()
        self.pause = math.inf if quiet else 1 if self.live else 30
        self.done, self.began, self.last = -1, None, 0.0  # the first step, which warms up, only starts the clock

    def step(self, describe):
        """Count one step of `total`; describe() is asked for text only when a line is due (it may wait for the GPU)."""
        self.done, now = self.done + 1, time.monotonic()
        if self.done == 0:
            self.began = self.last = now
        if now - self.last < self.pause:
            return
        self.last = now
        left = (now - self.began) / self.done * (self.total - 1 - self.done)
        line = f"{describe()}  {datetime.timedelta(seconds=round(left))} left"
        width = shutil.get_terminal_size().columns - 1  # a wrapped line could not be redrawn
        print(f"\r\033[K{line[:width]}" if self.live else line, end="" if self.live else "\n", flush=True)

    def line(self, text):
        """Print a line that stays."""
        if self.pause < math.inf:
            print(f"\r\033[K{text}" if self.live else text, flush=True)


# --- Options ---------------------------------------------------------------------------------------------------------

def parse(argv=None):
    parser = argparse.ArgumentParser(
        description="SimSiam pre-training. The recipe's options default to the paper's settings for the data at hand.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120))
    parser.error = lambda message: sys.exit(f"simsiam.py: {message}; see --help")
    parser.add_argument("data", nargs="?", metavar="DATA", help="an image folder (train/<class>/..., val/<class>/..., or any "
                        "folder of images), a text file with a path per line, or a CIFAR-10 folder (default: drawn shapes)")
    parser.add_argument("--out", help="run folder (default: runs/<name of the data>)")
    parser.add_argument("--resume", nargs="?", const="yes", choices=("yes", "auto"), metavar="auto",
                        help="after DATA: continue the run in --out; with auto: if there is one, and start otherwise")
    parser.add_argument("--recipe", choices=RECIPES, help="default: shapes without DATA, cifar10 for images of one size up to "
                        f"{augment.SMALL} pixels a side, else imagenet")
    parser.add_argument("--experiment", choices=EXPERIMENTS, default="simsiam", help="a row of the paper (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, views, order, and shapes (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: cuda where there is one")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bf16 autocast (default: on cuda)")
    parser.add_argument("--workers", type=int, help="processes that decode images, per GPU (default: its share of the cores, up to 16)")
    parser.add_argument("--save-minutes", type=float, default=10, help="a checkpoint this often within an epoch (default: %(default)s)")
    recipe = parser.add_argument_group("recipe (defaults: imagenet | cifar10 | shapes)")
    for name, values in SETTINGS.items():
        kind = type(values[0])
        how = {"type": number, "nargs": len(values[0]), "metavar": name[0].upper()} if kind is tuple \
            else {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": number if kind is float else kind}
        if name in CHOICES:
            how["choices"] = CHOICES[name]
        shown = [" ".join(f"{v:.4g}" for v in value) if kind is tuple else str(value) for value in values]
        recipe.add_argument("--" + name.replace("_", "-"), help=" | ".join(shown) if len(set(shown)) > 1 else shown[0], **how)
    return parser.parse_args(argv)


def number(text):
    """0.125 and 1/8 alike."""
    try:
        return float(fractions.Fraction(text))
    except ZeroDivisionError:
        raise ValueError from None


CHOICES = {"arch": tuple(resnet.ARCHS), "pred_lr": ("constant", "cosine")}


def resolve(args, train, world):
    """The settings of a run: recipe, then experiment, then what the command line names. Raises Refused for impossible ones."""
    small = train.pixels is not None
    recipe = args.recipe or ("shapes" if args.data is None else "cifar10" if small else "imagenet")
    settings = {name: values[RECIPES.index(recipe)] for name, values in SETTINGS.items()}
    if small and args.data is not None and recipe == "cifar10":
        settings["size"] = max(train.pixels.shape[2:])  # small images are trained on at their own size
    settings.update(EXPERIMENTS[args.experiment][1])
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    settings.update({name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
    settings.update(recipe=recipe, experiment=args.experiment, seed=args.seed, data=args.data,
                    images=len(train), device=args.device, amp=args.amp if args.amp is not None else args.device == "cuda",
                    world=world, workers=args.workers if args.workers is not None else min(16, cores()),
                    save_minutes=args.save_minutes)
    check(settings)
    return settings


def check(s):
    """Raise Refused for settings that can't work."""
    rules = [
        (s["batch"] % s["world"] == 0, f"--batch {s['batch']}: {s['world']} processes don't divide it; the batch is the global one"),
        (s["batch"] // s["world"] >= 1 and s["batch"] >= 2, f"--batch {s['batch']}: BN needs at least 2 images"),
        (s["images"] >= s["batch"], f"--batch {s['batch']}: the data has only {s['images']} images, less than one batch"),
        (s["epochs"] >= 1, f"--epochs {s['epochs']}: at least 1"),
        (0 <= s["warmup"] < s["epochs"], f"--warmup {s['warmup']}: from 0 to less than --epochs {s['epochs']}"),
        (s["size"] >= 1, f"--size {s['size']}: at least 1 pixel"),
        (0 < s["area"][0] <= s["area"][1] <= 1, f"--area {s['area']}: two shares, 0 < low <= high <= 1"),
        (0 < s["aspect"][0] <= s["aspect"][1], f"--aspect {s['aspect']}: 0 < low <= high"),
        (0 < s["sigma"][0] <= s["sigma"][1] <= augment.REACH / 3, f"--sigma {s['sigma']}: 0 < low <= high <= {augment.REACH / 3:.2g}"),
        (all(0 <= v <= 1 for v in s["strength"][:3]) and 0 <= s["strength"][3] <= 0.5,
         f"--strength {s['strength']}: brightness, contrast, saturation from 0 to 1, hue from 0 to 0.5"),
        (all(0 <= s[name] <= 1 for name in ("jitter", "gray", "blur", "flip")), "--jitter, --gray, --blur, --flip: from 0 to 1"),
        (all(v > 0 for v in s["std"]), f"--std {s['std']}: above 0"),
        (0 < s["centre"] <= 1, f"--centre {s['centre']}: above 0, at most 1"),
        (s["workers"] >= 0 and s["knn_every"] >= 0, "--workers, --knn-every: 0 or more"),
        (0 <= s["seed"] < 2 ** 63, f"--seed {s['seed']}: 0 to 2^63 - 1"),
        (s["base_lr"] >= 0 and s["weight_decay"] >= 0 and 0 <= s["momentum"] < 1,
         "--base-lr, --weight-decay: 0 or more; --momentum: 0 or more, less than 1"),
        (not s["amp"] or s["device"] == "cuda", "--amp: bf16 autocast is for GPUs"),
    ]
    for holds, message in rules:
        if not holds:
            raise Refused(message)


# --- The run ---------------------------------------------------------------------------------------------------------

def main(argv=None):
    args = parse(argv)
    try:
        run(args)
        dist.destroy_process_group()  # only now: after a failure it would wait for the other processes
    except (Refused, OSError) as error:
        speaks = os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, augment.BadImage)  # met by one process alone
        sys.exit("\n" * sys.stdout.isatty() + f"simsiam.py: {error}" if speaks else 1)
    except KeyboardInterrupt:
        sys.exit("\nsimsiam.py: interrupted; the same command with --resume goes on from the last checkpoint")


def run(args):
    # 1. Processes, data, settings
    device, rank, world = join_world(torch.device(args.device))
    first = rank == 0
    data = train, val = augment.open_data(args.data, args.seed)
    s = resolve(args, train, world)
    if device.type == "cpu":
        torch.set_num_threads(cores())
    policy = augment.Policy(**{name: s[name] for name in augment.Policy._fields})
    objective, _, published = EXPERIMENTS[args.experiment]
    steps_per_epoch = len(train) // s["batch"]
    total_steps, warmup_steps = s["epochs"] * steps_per_epoch, s["warmup"] * steps_per_epoch
    lr = initial_lr(s["base_lr"], s["batch"])
    watch_knn = s["knn_every"] > 0 and val is not None and len(val) >= world

    # 2. Model and optimiser
    torch.manual_seed(s["seed"])
    model = SimSiam(s["arch"], s["dim"], s["pred_dim"], s["proj_layers"], s["proj_hidden"], s["width"], s["cifar_stem"])
    layout = fastest_layout(model, device)
    model = model.to(device, memory_format=layout)
    network = distribute(model, device)
    optimizer = sgd(model, s["momentum"], s["weight_decay"])
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=s["amp"])  # what stays in float32 has TF32 convolutions

    # 3. The run folder: a new run, or one to continue
    name = "shapes" if args.data is None else os.path.splitext(os.path.basename(os.path.abspath(args.data)))[0]
    out = args.out or os.path.join("runs", name + ("" if args.experiment == "simsiam" else "-" + args.experiment))
    checkpoint_path, log_path = os.path.join(out, "checkpoint.pth"), os.path.join(out, "log.jsonl")
    exists = os.path.exists(checkpoint_path)
    if all_sum(torch.tensor(float(exists), device=device)) not in (0, world):
        raise Refused(f"{checkpoint_path}: some processes see it and some don't; --out must be a folder that all machines share")
    if args.resume is None and exists:
        raise Refused(f"{out}: holds a run already; continue it with --resume, or give another folder with --out")
    if args.resume == "yes" and not exists:
        raise Refused(f"{checkpoint_path}: nothing to resume; leave --resume out to start, or name the run's folder with --out")
    epoch, step = 0, 0                                                  # position: epochs done, and steps of the next one
    sums = torch.zeros(2, dtype=torch.float64, device=device)           # of loss and std x sqrt(d), over the epoch so far
    seconds, waited = 0.0, 0.0                                          # likewise
    records, knn_pixels = [], None                                      # the log's epochs, and raw pixels' kNN
    if exists:
        checkpoint = load_checkpoint(checkpoint_path, s)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        epoch, step, seconds, waited = (checkpoint[key] for key in ("epoch", "step", "seconds", "waited"))
        sums += torch.tensor(checkpoint["sums"], dtype=torch.float64, device=device)
        log = read_log(log_path, epoch, step)
        records, knn_pixels = [r for r in log if r["event"] == "epoch"], log[0]["knn_pixels"]

    def checkpoint_now():
        """What the run needs to go on from here; equal on all processes, written by the first."""
        if first:
            save({"format": FORMAT, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "step": step,
                  "sums": sums.tolist(), "seconds": seconds, "waited": waited, "settings": s}, checkpoint_path)

    def accuracy(model):
        def features(x):
            with autocast:
                return model.encoder.features(x)

        model.eval()
        percent = knn_accuracy(features, data, policy, device, s["workers"])
        model.train()
        return percent

    # 4. Say what is going to happen, on the screen and in the log
    progress = Progress(total_steps - epoch * steps_per_epoch - step, quiet=not first)
    progress.line(describe(args, s, train, val, device, world, lr, published, out, watch_knn))
    if not exists and watch_knn and train.pixels is not None:
        knn_pixels = knn_accuracy(lambda x: x.flatten(1), data, policy, device, s["workers"])
        progress.line(f"kNN on raw pixels {knn_pixels:.2f}%")
    if first:
        os.makedirs(out, exist_ok=True)
        event = {"command": shlex.join(sys.argv), "device": device_name(device), "world": world}
        if exists:
            write_log(log_path, [*log, {"event": "resume", **event, "epoch": epoch, "step": step}])
            progress.line(f"continuing after {epoch} epochs and {step} steps")
        else:
            write_log(log_path, [{"event": "start", **event, "python": platform.python_version(), "torch": torch.__version__,
                                  "numpy": np.__version__, "pillow": PIL.__version__, "seed": s["seed"], "settings": s,
                                  "knn_pixels": knn_pixels}])
            with replacing(os.path.join(out, "views.png")) as f:
                augment.contact_sheet(train, policy, s["seed"]).save(f, "png")
            checkpoint_now()

    def report(number, **measured):
        """A finished epoch, on the screen, in the log, in the picture."""
        finite = {key: v for key, v in measured.items() if not isinstance(v, float) or math.isfinite(v)}  # JSON knows no NaN
        record = {"event": "epoch", "epoch": number, "step": number * steps_per_epoch, **dict.fromkeys(MEASURED), **finite}
        records.append(record)
        if first:
            append(log_path, record)
            draw_curves(os.path.join(out, "curves.png"), records, knn_pixels)
        progress.line(f"epoch {number}/{s['epochs']}" + "  untrained (kNN: with BN calibrated)" * (number == 0) + "".join(
            "  " + shown.format(record[key]) for key, shown in MEASURED.items() if shown and record[key] is not None))

    # 5. Train
    batches = augment.steps(s["seed"], len(train), s["batch"], s["epochs"], epoch, step, rank, world)
    views = augment.load_views(train, policy, s["seed"], batches, device, s["workers"])
    if (epoch, step) == (0, 0):
        report(0, knn=accuracy(calibrated(model, train, policy, device, s["workers"])) if watch_knn else None)
    saved = time.monotonic()
    while epoch < s["epochs"]:
        origin = time.monotonic() - seconds
        while step < steps_per_epoch:
            asked = time.monotonic()
            x1, x2 = (x.contiguous(memory_format=layout) for x in next(views)[1])
            waited += time.monotonic() - asked
            set_lr(optimizer, lr, epoch * steps_per_epoch + step, total_steps, warmup_steps, s["pred_lr"])
            L, z1, z2 = train_step(network, objective, optimizer, autocast, x1, x2)
            spread = (std(z1, all_sum) + std(z2, all_sum)) / 2 * math.sqrt(s["dim"])
            sums += torch.stack([all_sum(L) / world, spread])
            step, seconds = step + 1, time.monotonic() - origin
            progress.step(lambda: f"epoch {epoch + 1}/{s['epochs']}  step {step}/{steps_per_epoch}  loss {L.item() / world:.4f}  "
                          f"std x sqrt(d) {spread.item():.3f}  {s['batch'] * step / seconds:.0f} images/s")
            if time.monotonic() - saved > 60 * s["save_minutes"]:
                checkpoint_now()
                saved = time.monotonic()
        mean_loss, mean_std = (sums / steps_per_epoch).tolist()
        seconds = time.monotonic() - origin  # asked once more, now that the GPU is done
        checkpoint_now()
        number = epoch + 1
        due = watch_knn and (number % s["knn_every"] == 0 or number == s["epochs"])
        in_trouble = collapsed(mean_loss, mean_std, s["batch"])
        report(number, loss=mean_loss, std=mean_std, lr=optimizer.param_groups[0]["lr"], knn=accuracy(model) if due else None,
               images_per_s=s["batch"] * steps_per_epoch / seconds, data_wait=waited / seconds, seconds=seconds,
               memory_mb=peak_memory(device), collapsed=in_trouble)
        if in_trouble and not any(r["collapsed"] for r in records[:-1]):
            progress.line("collapsed: all outputs are (nearly) the same vector. Try, in this order: a smaller --base-lr; --warmup 10; "
                          "a larger --batch; --pred-dim a quarter of --dim; and look at views.png")
        epoch, step, seconds, waited = number, 0, 0.0, 0.0
        sums.zero_()

    # 6. The result
    if first:
        backbone = {name: t for name, t in model.encoder.state_dict().items() if not name.startswith("fc.")}
        save(backbone, os.path.join(out, "backbone.pth"))
        append(log_path, {"event": "end", "epochs": epoch, "knn": records[-1]["knn"], "backbone": "backbone.pth"})
    progress.line(f"done: {os.path.join(out, 'backbone.pth')} (features), checkpoint.pth, log.jsonl, curves.png")


MEASURED = {  # what the log has of an epoch, null where it doesn't exist, and how the screen shows it
    "loss": "loss {:.4f} (minimum -1)", "std": "std x sqrt(d) {:.3f}", "lr": "lr {:.4g}", "knn": "kNN {:.2f}%",
    "images_per_s": "{:.0f} images/s", "data_wait": "{:.0%} waiting for data", "seconds": None, "memory_mb": "{} MiB", "collapsed": None}


def describe(args, s, train, val, device, world, lr, published, out, watch_knn):
    """The block that a run starts with."""
    kind = f"{train.pixels.shape[3]} x {train.pixels.shape[2]} pixels, in memory" if train.pixels is not None else "files"
    labels = f"{len(train.classes)} classes" if train.labels is not None else "no labels"
    k = min(200, len(train))
    monitor = f"every {s['knn_every']} epochs, k {k}{' (all there are)' if k < 200 else ''}, on {len(val)} images" \
        if watch_knn else "none (needs labels, val/ and --knn-every)"
    given = ", ".join(f"{name} {s[name]}" for name in SETTINGS if getattr(args, name) is not None)
    return "\n".join([
        f"data        {args.data or 'shapes (drawn)'}: {len(train)} images, {kind}, {labels}",
        f"recipe      {s['recipe']}, experiment {s['experiment']} (the paper on ImageNet: {published}){'; with ' + given if given else ''}",
        f"network     {s['arch']}, width {s['width']:g}; projection {s['proj_layers']} layers to d = {s['dim']}; h {s['dim']}-{s['pred_dim']}-{s['dim']}",
        f"training    {s['epochs']} epochs of {len(train) // s['batch']} steps, global batch {s['batch']}, lr {lr:.4g} (cosine; "
        f"predictor {s['pred_lr']}), {s['size']}-pixel views",
        f"processes   {world} x {s['batch'] // world} images, BN over {s['batch']}, {device_name(device)}, "
        f"{'bf16 autocast' if s['amp'] else 'float32 (convolutions TF32)' if device.type == 'cuda' else 'float32'}, {s['workers']} workers",
        f"kNN         {monitor}",
        f"writes to   {out}"])


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def peak_memory(device):
    """MiB: of the GPU if there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


if __name__ == "__main__":
    main()
