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
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import re
import resource
import shlex
import shutil
import signal
import sys
import time
import uuid
import zipfile

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import augment
import resnet
from augment import STOPPING, Refused, printable

# --- Algorithm 1: the loss and the step (Sec. 3) ---------------------------------------------------------------------

def D(p, z):
    """Negative cosine similarity, averaged over the batch: (N, d), (N, d) -> scalar in [-1, 1]. Does not detach."""
    return -(l2_normalize(p) * l2_normalize(z)).sum(dim=1).mean()       # Eq. (1): D(p, z) = -p/|p| . z/|z|


def stopgrad(z):
    """z as a constant: the same values, through which no gradient flows. Without it SimSiam collapses (Sec. 4.1)."""
    return z.detach()                                                   # Eq. (3): stopgrad(z2), in D(p1, stopgrad(z2))


def loss(p1, p2, z1, z2):
    """SimSiam's symmetrised loss; its minimum is -1.

    The encoder on x2 gets no gradient from z2 in the first term, but does from p2 in the second.
    """
    return D(p1, stopgrad(z2)) / 2 + D(p2, stopgrad(z1)) / 2            # Eq. (4): L = 1/2 D(p1, sg(z2)) + 1/2 D(p2, sg(z1))


def train_step(network, objective, optimizer, autocast, views):
    """One iteration of Algorithm 1 on views x1, x2 (N, 3, S, S) of this process's share of the batch.

    network     SimSiam, or its DistributedDataParallel, which averages the gradients over the processes in backward
    objective   `loss`, or another function of what the network returns
    autocast    the context that sets the precision of the forward pass
    Returns the loss and z1, z2, detached, for the monitors.
    """
    with autocast:
        outputs = network(*views)               # p1, p2, z1, z2, (N, d) each
        L = objective(*outputs)
    optimizer.zero_grad()
    L.backward()
    optimizer.step()                                                    # Alg. 1: update(f, h), its last line; z and p are made in SimSiam.forward
    return L.detach(), [z.detach() for z in outputs[len(views):]]


def wide(v):
    """v in float32 at least: bf16 would cost the loss its third digit."""
    return v.to(torch.promote_types(v.dtype, torch.float32))


def l2_normalize(v):
    """Each row divided by its l2 norm: (N, d) -> (N, d)"""
    return F.normalize(wide(v), dim=1)


# --- Other losses, for the paper's ablations -------------------------------------------------------------------------

def loss_without_stopgrad(p1, p2, z1, z2):
    """The symmetrised loss before stop-gradient enters, for Fig. 2's collapsing run; its minimum is -1."""
    return D(p1, z2) / 2 + D(p2, z1) / 2                                # Eq. (2): L = 1/2 D(p1, z2) + 1/2 D(p2, z1)


def D_cross_entropy(p, z):
    """Cross-entropy of softmaxes over the channels: (N, d), (N, d) -> scalar, 0 at least."""
    return -(wide(z).softmax(dim=1) * wide(p).log_softmax(dim=1)).sum(dim=1).mean()  # Sec. 4.5: D(p, z) = -softmax(z) . log softmax(p)


def loss_cross_entropy(p1, p2, z1, z2):
    """Eq. (4) with the cross-entropy similarity; its minimum is 0."""
    return D_cross_entropy(p1, stopgrad(z2)) / 2 + D_cross_entropy(p2, stopgrad(z1)) / 2


def loss_asymmetric(p1, p2, z1, z2):
    """Eq. (4)'s first term alone."""
    return D(p1, stopgrad(z2))                                          # Sec. 4.6: L = D(p1, stopgrad(z2))


def loss_asymmetric_2x(p1, p2, p3, p4, z1, z2, z3, z4):
    """Two independent pairs of views per image, x1, x2 and x3, x4, so that the comparison with two symmetric terms is fair."""
    return loss_asymmetric(p1, p2, z1, z2) / 2 + loss_asymmetric(p3, p4, z3, z4) / 2


OBJECTIVES = {  # name: (function, views per image, minimum)
    "symmetric": (loss, 2, -1), "without-stopgrad": (loss_without_stopgrad, 2, -1), "cross-entropy": (loss_cross_entropy, 2, 0),
    "asymmetric": (loss_asymmetric, 2, -1), "asymmetric-2x": (loss_asymmetric_2x, 4, -1)}


# --- The model (Sec. 3, "Baseline settings") -------------------------------------------------------------------------

def fc(inputs, outputs, bn, affine=True):
    """A fully-connected layer, and BN if `bn`. It has a bias only where no BN follows, which would subtract it again."""
    return [nn.Linear(inputs, outputs, bias=not bn), *([nn.BatchNorm1d(outputs, affine=affine)] if bn else [])]


def projection_mlp(features, hidden, dim, layers, hidden_bn=True, output_bn=True, affine=False):
    """The end of f: `layers` fc layers, BN on each, ReLU on all but the last. (N, features) -> (N, dim)

    DEPARTURE: the output BN has no affine scale and offset, as in the released code; with them the paper measured the same.
    The first hidden width is the paper's 2048; the released code takes the backbone's, which differs for ResNet-18.
    """
    widths = [features] + [hidden] * (layers - 1)
    mlp = []
    for width, following in zip(widths, widths[1:]):
        mlp += [*fc(width, following, hidden_bn), nn.ReLU(inplace=True)]
    return nn.Sequential(*mlp, *fc(widths[-1], dim, output_bn, affine))


def prediction_mlp(dim, hidden, hidden_bn=True, output_bn=False):
    """h: a bottleneck of two fc layers, BN and ReLU on the hidden one only. (N, dim) -> (N, dim)"""
    return nn.Sequential(*fc(dim, hidden, hidden_bn), nn.ReLU(inplace=True), *fc(hidden, dim, output_bn))


class SimSiam(nn.Module):
    """The encoder f (a ResNet whose fc is the projection MLP) and the predictor h. Parameters are named as in the
    released model.

    arch, width, cifar_stem           the backbone: see resnet.py
    proj_layers, proj_hidden, dim     the projection MLP: fc layers, hidden width, output width d
    pred_dim                          hidden width of h; d/4 is the paper's bottleneck
    For the ablations:
    predictor                         "mlp"; "fixed", as initialised; "none", the identity (Table 1)
    bn                                whether BN follows: projection hidden, output, prediction hidden, output (Table 3)
    affine                            whether the projection's output BN has scale and offset (Sec. 3)
    fc_std                            initial std of the heads' weights; 0: PyTorch's default (supplement A)
    """

    def __init__(self, arch="resnet50", dim=2048, pred_dim=512, proj_layers=3, proj_hidden=2048, width=1, cifar_stem=False,
                 predictor="mlp", bn=(1, 1, 1, 0), affine=False, fc_std=0.0):
        super().__init__()
        self.encoder = resnet.ARCHS[arch](width=width, cifar_stem=cifar_stem)
        self.encoder.fc = projection_mlp(self.encoder.num_features, proj_hidden, dim, proj_layers, *bn[:2], affine)
        self.predictor = prediction_mlp(dim, pred_dim, *bn[2:])
        if predictor == "none":
            self.predictor = nn.Identity()                              # Sec. 4.2 (no h): p = z; Eq. (4)'s gradient is half of D(z1, z2)'s
        self.predictor.requires_grad_(predictor == "mlp")
        for module in self.modules():
            if isinstance(module, nn.Linear) and fc_std > 0:
                nn.init.normal_(module.weight, std=fc_std)

    def forward(self, *views):
        """Two views (N, 3, S, S) -> p1, p2, z1, z2, (N, d) each, all with gradient; likewise for more views.

        Each view passes through f by itself, and so is normalised by its own batch statistics. One pass over both views
        together would be faster, and another method.
        """
        f, h = self.encoder, self.predictor
        z = [f(x) for x in views]
        p = [h(z_i) for z_i in z]                                       # Sec. 5.1 (h): it learns the best h(z1) = E_z[z2] = E_T[f(T(x))]
        return *p, *z


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
    return (1 + math.cos(math.pi * progress)) / 2                       # Sec. 3 (schedule): cosine decay to 0, (1 + cos(pi t / T)) / 2


def set_lr(optimizer, lr, step, total_steps, warmup_steps, pred_lr):
    """Give f the decayed lr; give h the same (pred_lr "cosine") or one that stays (pred_lr "constant", Table 1 c)."""
    f, h = optimizer.param_groups
    f["lr"] = lr * warmup(step, warmup_steps) * cosine(step, total_steps, warmup_steps)
    h["lr"] = f["lr"] if pred_lr == "cosine" else lr * warmup(step, warmup_steps)


# --- SimSiam as alternating optimisation (Sec. 5) --------------------------------------------------------------------
# There, theta (the weights of F, which is f; here those of h too) is fitted to eta, one constant vector per image, and eta is
# computed anew from theta, in turns. The paper's error is the squared one; with normalised vectors (footnote 5) it is 2 D + 2.
# Plain training, and the two variants of Sec. 5.2, are streams of (views, objective), which stand between the loader and the step.

def towards(eta1, eta2):
    """The objective that fits theta to eta (N, d), computed from view 1 and view 2 of each image: each view to the other's."""
    return lambda p1, p2, z1, z2: loss(p1, p2, eta1, eta2)              # Eq. (7): theta^t <- argmin_theta L(theta, eta^{t-1}): this L


def plain(views, objective):
    """eta_x = F_{theta^t}(T'(x)) of the current theta, which is what stopgrad(z) in `loss` is, and one step an inner loop. h and the
    symmetrisation, which `loss` has too, are not in Eq. (11); Sec. 5.1 says why h is there."""
    for _, x in views:
        yield x, objective                                              # Eq. (11): theta^{t+1} <- argmin_theta E |F_theta(T(x)) - F_{theta^t}(T'(x))|^2


def twice(batches, k, step):
    """The batches of each inner loop of k steps, one after the other, and the same once more: for eta, and for the steps. A view is
    a pure function of its image and epoch, so that the second time draws the views of the first."""
    while inner := list(itertools.islice(batches, k - step % k)):
        yield from inner
        yield from inner
        step += len(inner)


@torch.no_grad()
def embed(model, views, autocast):
    """z1, z2 in train mode: (N, d) each. Leaves its mark in the running statistics of `model`, hence a copy's, not those trained."""
    with autocast:
        return model(*views)[2:]


def alternate(views, model, theta, k, step, total_steps, autocast):
    """Sec. 5.2's k-step alternation: before each inner loop eta for just the images its k steps need, then k SGD steps.

    views   (index, [x1, x2]) of batches in the order of `twice`
    theta   a copy of the model, for theta^t: what eta is computed with. In the middle of an inner loop, where a run may be
            resumed, it differs from the model
    """
    while step < total_steps:
        if step % k == 0:
            theta.load_state_dict(model.state_dict())
        inner = min(k - step % k, total_steps - step)
        eta = [embed(theta, next(views)[1], autocast) for _ in range(inner)]            # Eq. (10): eta_x^t <- F_{theta^t}(T'(x))
        for eta1, eta2 in eta:
            yield next(views)[1], towards(eta1, eta2)                   # Sec. 5.2 (k-step): k steps of theta, eta constant
        step += inner


def average(views, store, m):
    """Sec. 5.2's moving average, which does without a predictor: eta_x keeps a share m of what it was at the last visit.

    F's output and eta are normalised (footnote 5). store: one vector per image, zero before the first visit, whose eta is then a
    share of z alone: D takes the same direction from it. Both views' eta start from the image's one vector, and their normalised
    sum is what is stored: ours, as the paper doesn't say.
    """
    for index, x in views:
        def objective(p1, p2, z1, z2):
            old = store.get(index)
            eta1, eta2 = (m * old + (1 - m) * l2_normalize(stopgrad(z)) for z in (z1, z2))  # Sec. 5.2 (moving average): eta_x <- m eta_x + (1 - m) F(T'(x))
            store.put(index, l2_normalize(eta1 + eta2))
            return loss(p1, p2, eta1, eta2)

        yield x, objective


# --- What is watched (Sec. 4.1): the loss, the std of z, a kNN classifier --------------------------------------------

def std(z, all_sum=lambda t: t):
    """Std over the samples of each channel of z/|z|, averaged over the channels: (N, d) -> scalar. Collapse: 0. Scattered
    over the sphere: 1/sqrt(d). all_sum adds a tensor up over the processes, so that the samples are the global batch."""
    v = l2_normalize(z)
    n, total, squares = all_sum(torch.stack([torch.ones_like(v), v, v * v]).sum(dim=1))     # (3, d) -> (d,) each
    return (squares / n - (total / n) ** 2).clamp(min=0).sqrt().mean()  # Sec. 4.1 (std): of each channel of z/|z|, over the batch; their mean


def collapsed(loss, scaled_std, n):
    """Whether a loss and a std x sqrt(d) over batches of n mean collapse. Behind an output BN the outputs can't all be one
    point, since their mean is 0: n - 1 of them meet at u and one at -u, where std x sqrt(d) is about 2/sqrt(n)."""
    return loss < -0.95 and scaled_std < max(0.1, 3 / math.sqrt(n))


def knn(bank, bank_labels, queries, k=200, temperature=0.1):
    """Weighted kNN (Wu et al. 2018, Sec. 3.4): each of the k nearest in the bank votes with exp(cosine / temperature).

    bank (B, d), queries (Q, d): l2-normalised features; bank_labels (B,) int64; k at most B -> votes (Q, classes), -inf for none
    """
    votes = torch.zeros(len(queries), int(bank_labels.max()) + 1, device=queries.device)
    piece = max(1, 2 ** 27 // len(bank))                                # half a GiB of similarities at a time
    for q, v in zip(queries.split(piece), votes.split(piece)):
        similarity, neighbour = (q @ bank.T).topk(k, dim=1)             # (q, k)
        v.scatter_add_(1, bank_labels[neighbour], (similarity / temperature).exp())
    return votes.masked_fill_(votes == 0, -math.inf)


def hits(scores, labels, ks=(1, 5)):
    """How many labels (N,) are among the k highest of scores (N, C), for each k -> (len(ks),) int64. -inf is never a hit."""
    top = scores.topk(min(max(ks), scores.shape[1]), dim=1)
    hit = (top.indices == labels[:, None]) & (top.values > -math.inf)
    return torch.stack([hit[:, :k].any(dim=1).sum() for k in ks])


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
    "predictor":    ("mlp",                    "mlp",                    "mlp"),                   # Table 1
    "bn":           ((1, 1, 1, 0),             (1, 1, 1, 0),             (1, 1, 1, 0)),            # Table 3: its four columns
    "affine":       (False,                    False,                    False),                   # released code
    "fc_std":       (0.0,                      0.0,                      0.0),                     # supp. A
    "objective":    ("symmetric",              "symmetric",              "symmetric"),             # Sec. 3
    "eta":          ("current",                "current",                "current"),               # Sec. 5; alternate, average
    "k":            (1,                        1,                        1),                       # Sec. 5.2; 0: an epoch
    "m":            (0.8,                      0.8,                      0.8),                     # Sec. 5.2
    "epochs":       (100,                      800,                      24),                      # Sec. 3; supp. D
    "batch":        (512,                      512,                      64),                      # Sec. 3; supp. D
    "base_lr":      (0.05,                     0.03,                     1.0),                     # Sec. 3; supp. D
    "momentum":     (0.9,                      0.9,                      0.9),                     # Sec. 3
    "weight_decay": (1e-4,                     5e-4,                     5e-4),                    # Sec. 3; supp. D
    "warmup":       (0,                        0,                        0),                       # Sec. 3 (10 in some rows)
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
    "centre":       (224 / 256,                1.0,                      1.0),                     # released code (test view)
    "knn_every":    (10,                       5,                        10),                      # -
}

# A row of the paper each: what changes against the recipe, and what the paper measured (linear top-1 on ImageNet, if no more is said).
# Values are those for ImageNet. Recipes that are smaller scale batch, dim, pred_dim, epochs and warm-up in proportion; the others stay.
DECAYED, WARMUP = {"pred_lr": "cosine"}, {"warmup": 10}
EXPERIMENTS = {
    "simsiam":                    ({},                                                            "68.1; on CIFAR-10 91.8"),
    "fig2-with-stopgrad":         ({**DECAYED},                                                   "67.7 +- 0.1, std near 1/sqrt(d)"),
    "fig2-without-stopgrad":      ({**DECAYED, "objective": "without-stopgrad"},                  "0.1, loss to -1, std to 0"),
    "table1-baseline":            ({**DECAYED},                                                   "67.7"),
    "table1-a-no-predictor":      ({**DECAYED, "predictor": "none"},                              "0.1: collapses"),
    "table1-b-fixed-predictor":   ({**DECAYED, "predictor": "fixed"},                             "1.5: does not converge"),
    "table1-c-constant-lr":       ({"pred_lr": "constant"},                                       "68.1"),
    "table2-batch-64":            ({"batch": 64},                                                 "66.1"),
    "table2-batch-128":           ({"batch": 128},                                                "67.3"),
    "table2-batch-256":           ({"batch": 256},                                                "68.1"),
    "table2-batch-512":           ({"batch": 512},                                                "68.1"),
    "table2-batch-1024":          ({"batch": 1024, **WARMUP},                                     "68.0"),
    "table2-batch-2048":          ({"batch": 2048, **WARMUP},                                     "67.9"),
    "table2-batch-4096":          ({"batch": 4096, **WARMUP},                                     "64.0"),
    "table3-a-no-bn":             ({"bn": (0, 0, 0, 0), **WARMUP},                                "34.6"),
    "table3-b-hidden-bn":         ({"bn": (1, 0, 1, 0)},                                          "67.4"),
    "table3-c-default":           ({"bn": (1, 1, 1, 0)},                                          "68.1"),
    "table3-d-all-bn":            ({"bn": (1, 1, 1, 1)},                                          "unstable, loss oscillates"),
    "sec3-affine-output-bn":      ({"affine": True},                                              "68.1 (68.2 without)"),
    "sec42-asymmetric-no-h":      ({"objective": "asymmetric", "predictor": "none"},              "fails"),
    "sec45-cross-entropy":        ({"objective": "cross-entropy"},                                "63.2"),
    "sec46-asymmetric":           ({"objective": "asymmetric"},                                   "64.8"),
    "sec46-asymmetric-2x":        ({"objective": "asymmetric-2x"},                                "67.3"),
    "sec52-1-step":               ({"eta": "alternate", "k": 1},                                  "68.1"),
    "sec52-10-step":              ({"eta": "alternate", "k": 10},                                 "68.7"),
    "sec52-100-step":             ({"eta": "alternate", "k": 100},                                "68.9"),
    "sec52-1-epoch":              ({"eta": "alternate", "k": 0},                                  "67.0"),
    "sec52-moving-average":       ({"eta": "average", "m": 0.8, "predictor": "none"},             "55.0 (0.1 without the average)"),
    "suppA-fc-std-0.01":          ({"fc_std": 0.01},                                              "may not converge"),
    "suppB-dim-256":              ({"dim": 256, "pred_dim": 64},                                  "65.3"),
    "suppB-dim-512":              ({"dim": 512, "pred_dim": 128},                                 "67.2"),
    "suppB-dim-1024":             ({"dim": 1024, "pred_dim": 256},                                "67.5"),
    "suppB-dim-2048":             ({"dim": 2048, "pred_dim": 512},                                "68.1"),
    "suppB-hidden-d":             ({"pred_dim": 2048},                                            "less stable, can fail"),
    "table4-100-epochs":          ({"batch": 256, "epochs": 100},                                 "68.1"),
    "table4-200-epochs":          ({"batch": 256, "epochs": 200},                                 "70.0"),
    "table4-400-epochs":          ({"batch": 256, "epochs": 400},                                 "70.8"),
    "table4-800-epochs":          ({"batch": 256, "epochs": 800},                                 "71.3"),
    "table5-recipe":              ({"base_lr": 0.5, "weight_decay": 1e-5},                        "transfers best"),
}

# === Plumbing only below =============================================================================================

# --- Processes and devices. A single process is a world of one: it has a process group too, and nothing below asks ---

PATIENCE = datetime.timedelta(minutes=10)  # how long processes wait for each other


def join_world(device):
    """Join the processes that torchrun started, or make a world of this one. -> (device, rank, world size)
    Raises Refused where they don't find each other."""
    if device.type == "cuda":
        wanted, there = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if wanted > there:
            raise Refused(f"{wanted} processes on this machine, but {there} GPUs: start fewer processes, or give --device cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # as in the released code: shapes stay, so that it pays to try out which kernels are fastest
    else:
        torch.set_num_threads(cores())
    try:
        store, rank, world = meet() if "RANK" in os.environ else (dist.HashStore(), 0, 1)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE, store=store, rank=rank, world_size=world)
    except (RuntimeError, ValueError) as error:  # dist.DistError, and what is missing in the environment
        raise Refused(f"the processes did not find each other within {PATIENCE} ({str(error).partition('. ')[0]}): the same --nnodes and --rdzv-endpoint "
                      "on all machines? Its port open? As many machines started as --nnodes says?") from None
    return device, rank, world


def meet():
    """A store that only these processes share -> store, rank, world size. The one that torchrun hands out outlives its restarts, and has the
    addresses of processes that have died since: torch 2.13 connects to them. So process 0 welcomes each of the others by a name that only it
    and its newest start know, and tells it the name of a part of the store that is new."""
    store, rank, world = next(dist.rendezvous("env://", timeout=PATIENCE))
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello {rank}", name)
        start = store.get(f"welcome {name}").decode()
        store.add(f"joined {start}", 1)
        return dist.PrefixStore(start, store), rank, world
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while store.add(f"joined {name}", 0) < world - 1:
        for other in range(1, world):
            if store.check([f"hello {other}"]):
                store.set(f"welcome {store.get(f'hello {other}').decode()}", name)
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"{store.add(f'joined {name}', 0) + 1} of {world} are here")
        time.sleep(0.02)
    return dist.PrefixStore(name, store), rank, world


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


def same_everywhere(number, device):
    """Whether all processes have the same number."""
    both = torch.tensor([number, -number], dtype=torch.float64, device=device)
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    return bool(both[0] == -both[1])


class AllSum(torch.autograd.Function):
    """all_sum of a copy, with a gradient: the sum enters every process's loss, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, t):
        return all_sum(t.clone())

    @staticmethod
    def backward(ctx, gradient):
        return all_sum(gradient.clone())


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BN over the global batch where torch.nn.SyncBatchNorm refuses to: on a CPU. Same statistics as one process has."""

    _check_input_dim = staticmethod(lambda x: None)  # any number of dimensions

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        dims = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        n = x.numel() // x.shape[1] * dist.get_world_size()
        mean = AllSum.apply(x.sum(dims)) / n                          # (C,)
        centred = x - mean.view(shape)
        var = AllSum.apply((centred ** 2).sum(dims)) / n              # (C,)
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
    network = nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    network.broadcast_buffers = False  # synchronised statistics are equal on all processes already
    return network


class Spread:
    """One vector per image for n images, zero at first, spread over the processes: image i with process i mod world."""

    def __init__(self, n, dim, device):
        self.n, self.rank, self.world = n, dist.get_rank(), dist.get_world_size()
        self.mine = torch.zeros(len(range(self.rank, n, self.world)), dim, device=device)

    def locate(self, index):
        """Where this process's share (N,) lies in the global batch (B,), which of the batch are kept here (B,), and where."""
        part = slice(self.rank * len(index), (self.rank + 1) * len(index))
        indices = torch.zeros(self.world * len(index), dtype=torch.int64, device=self.mine.device)
        indices[part] = augment.on(indices, index)
        here = all_sum(indices) % self.world == self.rank
        return part, here, indices[here] // self.world

    def get(self, index):
        """The vectors of these images: (N,) -> (N, d)"""
        part, here, rows = self.locate(index)
        vectors = self.mine.new_zeros(len(here), self.mine.shape[1])
        vectors[here] = self.mine[rows]
        return all_sum(vectors)[part]

    def put(self, index, vectors):
        """Keep these from now on: (N,), (N, d)"""
        part, here, rows = self.locate(index)
        batch = self.mine.new_zeros(len(here), self.mine.shape[1])
        batch[part] = vectors.to(batch.dtype)
        self.mine[rows] = all_sum(batch)[here]

    def state_dict(self):
        """All vectors, for a checkpoint, which process 0 writes: the others, which must ask too, get nothing. Brought together in
        pieces, since they may not fit a GPU."""
        pieces = []
        for index in torch.arange(self.n).split(2 ** 16):
            here = index % self.world == self.rank
            piece = self.mine.new_zeros(len(index), self.mine.shape[1])
            piece[here] = self.mine[index[here] // self.world]
            pieces += [all_sum(piece).cpu()] if self.rank == 0 else [all_sum(piece).new_empty(0)]
        return {"vectors": torch.cat(pieces)} if self.rank == 0 else {}

    def load_state_dict(self, state):
        self.mine.copy_(state["vectors"][self.rank::self.world])


# --- Evaluating while training ---------------------------------------------------------------------------------------

@torch.no_grad()
def extract(features, source, policy, device, workers, autocast=contextlib.nullcontext()):
    """Features of a source's test views, by all processes together, in order: (n, d) on every process."""
    n, mine = len(source), my_share(len(source))
    batches = [(0, mine[i:i + 256]) for i in range(0, len(mine), 256)]
    out = None
    for index, x in augment.load_centres(source, policy, batches, device, workers):
        with autocast:
            v = features(x).float()
        out = torch.zeros(n, v.shape[1], device=device) if out is None else out
        out[augment.on(out, index)] = v
    return all_sum(out)


def accuracy(scores, labels):
    """Top-1 and top-5 in percent over all of labels (n,), each counted once, by one process. scores: indices -> (N, C)"""
    mine = torch.from_numpy(my_share(len(labels))).to(labels.device)
    return [100 * count / len(labels) for count in all_sum(hits(scores(mine), labels[mine])).tolist()]


def knn_accuracy(bank, bank_labels, queries, labels, k=200):
    """kNN's top-1 and top-5 in percent for features queries (Q, d) of these labels, against those of the bank (B, d)."""
    bank, queries = l2_normalize(bank), l2_normalize(queries)
    return accuracy(lambda mine: knn(bank, bank_labels, queries[mine], min(k, len(bank))), labels)


def bad_images(source, device):
    """How many of a source's files all processes together have found to be bad; each knows them all from then on."""
    flags = torch.zeros(len(source), dtype=torch.uint8, device=device)
    flags[list(source.bad)] = 1
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    found = flags.nonzero().flatten().tolist()
    source.bad.update((i, source.bad.get(i, "")) for i in found)
    return len(found)


def monitor(features, data, *how):
    """kNN top-1 in percent, over the whole validation set against the training set. features: images -> (N, d)"""
    bank, queries = (extract(features, source, *how) for source in data)
    labels, truth = (augment.on(bank, source.labels) for source in data)
    return knn_accuracy(bank, labels, queries, truth)[0]


def calibrated(backbone, train, policy, device, workers):
    """A copy of an untrained backbone whose BN statistics are those of (up to 2048 of) the training images. With the initial
    ones, mean 0 and variance 1, an untrained network is a worse feature extractor than it needs to be."""
    backbone = copy.deepcopy(backbone)
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # a plain average over the batches
    chosen = augment.permutation(0, 0, len(train))[:2048]
    batches = [(0, i) for i in np.array_split(chosen, math.ceil(len(chosen) / 256))]  # the same on all processes
    with torch.no_grad():
        for _, x in augment.load_centres(train, policy, batches, device, workers):
            backbone.features(x)
    return backbone


# --- The run folder: checkpoint, log, pictures -----------------------------------------------------------------------

FORMAT = 1  # of checkpoint.pth; to be raised when its contents change


@contextlib.contextmanager
def replacing(path, mode="wb", keep=None):
    """Write a file so that at every instant the old one or the new one is there, whole: under a temporary name first, out to
    the disk, then renamed. keep: what the old one is called from then on, an instant before the new one has its name. Raises Refused, the old one untouched."""
    try:
        with open(f"{path}.tmp", mode) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as error:  # torch.save makes the one the other
        with contextlib.suppress(OSError):
            os.remove(f"{path}.tmp")  # half a file, on what may be a full disk
        raise Refused(f"{path}: can't be written ({error.__cause__ or error.__context__ or error}); what was there is untouched") from None
    if keep and os.path.exists(path):
        os.replace(path, keep)
    os.replace(f"{path}.tmp", path)
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    os.fsync(folder)  # the new name too
    os.close(folder)


@contextlib.contextmanager
def suspicious(path, verdict):
    """Raise Refused for whatever is raised within: what is in a foreign or a hostile file can raise anything."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"{path}: {verdict} ({type(error).__name__}: {' '.join(str(error).split())[:300]})") from None


def save(what, path, keep=None):
    with replacing(path, keep=keep) as f:
        torch.save(what, f)


def read(path):
    """What torch.save wrote into a file: a dict. No code in the file is run. Raises Refused if it is missing, damaged or
    foreign. Files as written by torch 1.6 or later have checksums, which are all verified before anything is read."""
    try:
        damaged = zipfile.ZipFile(path).testzip() if zipfile.is_zipfile(path) else None
        if damaged is not None:
            raise ValueError(f"{damaged} in it fails its checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, dict):
            return content
        reason = f"it holds a {type(content).__name__}, not named tensors"
    except Exception as error:  # a damaged file can raise anything; torch's text on foreign ones would advise to let code in them run
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it names {code[1]}, code that no file of weights needs" if code else "damaged, or nothing that torch.save wrote" \
            if isinstance(error, pickle.UnpicklingError) else f"{type(error).__name__}: {error}".partition("\n")[0]
    raise Refused(f"{path}: can't be read ({reason})")


NEEDED = {"data": lambda data: data and str(data), "seed": int, "images": int, "batch": int, "size": int, "width": float, "centre": float}  # to evaluate


def read_weights(path):
    """The tensors in a file of weights, by the names that it has for them: of ours (checkpoint.pth, backbone.pth), the
    authors' released layout, MoCo's, torchvision's. -> (state_dict, epochs done if known, settings of the run if ours, else {})
    An fc bias before a BN is folded into that BN's running mean: the released projector has one, we have none.
    """
    content = read(path)
    with suspicious(path, "not a file of weights"):
        state = content.get("model", content.get("state_dict", content))
        for name, t in state.items():
            plain = isinstance(t, torch.Tensor) and t.layout == torch.strided and not t.is_quantized and t.untyped_storage().nbytes() >= t.nbytes
            require((plain, f"{path}: not a file of weights ({name} in it is a {type(t).__name__}, not a plain tensor)"))
            require((t.isfinite().all(), f"{path}: {name} has values that are not finite; the run that wrote it had diverged"))
        state = {str(name): t for name, t in state.items()}
        for name in list(state):
            place = re.fullmatch(r"(.*\bfc)\.(\d+)\.bias", name)
            mean = place and f"{place[1]}.{int(place[2]) + 1}.running_mean"
            if mean in state and state[mean].shape == state[name].shape:
                state[mean] = state[mean] - state.pop(name)
        if "format" not in content:
            return state, content.get("epoch"), {}
        require((content["format"] == FORMAT and "recipe" in content["settings"], f"{path}: not a checkpoint in this program's format {FORMAT}"))
        settings = content["settings"]
        settings |= {name: kind(settings[name]) for name, kind in NEEDED.items()}
        check_limits(settings)
        if settings["recipe"] not in RECIPES or np.array([settings["mean"], settings["std"]], float).shape != (2, 3):
            raise ValueError(f"recipe {settings['recipe']}, mean {settings['mean']}, std {settings['std']}")
        return state, int(content["epoch"]) + int(content["step"]) // (settings["images"] // settings["batch"]), settings


def load_strictly(module, state, path):
    """Load all of a state_dict into all of a module. Raises Refused, naming what is missing, unexpected or of another shape."""
    missing = [name for name in module.state_dict() if name not in state]  # torch itself would forgive missing BN counters
    require((not missing, f"{path}: lacks {', '.join(missing[:3])}{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}"))
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        found = " ".join(str(error).split("\n\t", 1)[-1].split())
        raise Refused(f"{path}: doesn't fit the network asked for: {found if len(found) < 600 else found[:600] + ' ...'}") from None


def name_of(data):
    """What a run on this data is called: the name of a folder, wherever the data lies."""
    return "shapes" if data is None else os.path.splitext(os.path.basename(os.path.abspath(data)))[0].strip(".") or "data"


def holds_run(out, names, resume, device):
    """Whether the folder holds a run: any file of these names. Raises Refused where that is not what --resume expects. Where torchrun
    has started the processes anew, after one of them died, there may be one or not."""
    found = any(os.path.exists(os.path.join(out, name)) for name in names)
    restarts = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), device=device)
    if all_sum(restarts) > 0:  # an agent that only sees others restart does not count it
        resume = "auto"
    require((same_everywhere(found, device), f"{out}: some processes see a run there and some don't; --out must be a folder that all machines share"),
            (resume or not found, f"{out}: holds a run already; continue it with --resume, or give another folder with --out"),
            (resume != "yes" or found, f"{out}: nothing to resume; leave --resume out to start, or name the run's folder with --out"))
    return found


class Stopped(Exception):
    """A signal has ended a run: its number, and what to say."""


class Run:
    """A run's folder (checkpoint.pth and the one before, log.jsonl), and how far the run is: `epoch` epochs done, and `step` steps of the next.

    parts: {name: model, optimiser, ...}, with a state_dict each, equal on all processes. settings: what makes the run what it is.
    override: names of settings that may differ from the checkpoint's. Raises Refused where it is to go on from a checkpoint that is
    foreign, or of other settings, and where both of the two that are kept are damaged.
    """
    MAY_CHANGE = {"data", "init", "backbone", "workers", "world", "knn_every", "save_minutes", "compile"}

    def __init__(self, out, parts, settings, steps_per_epoch, resuming, device, override=()):
        self.out, self.parts, self.settings, self.steps_per_epoch, self.device = out, parts, settings, steps_per_epoch, device
        self.resuming, self.first = resuming, dist.get_rank() == 0
        self.epoch, self.step = 0, 0
        self.seconds, self.waited = 0.0, 0.0                                # in this epoch: altogether, and for data
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)      # of what is watched, over this epoch's steps
        self.log, self.saved, self.origin = [], time.monotonic(), 0.0
        self.signal, self.late, self.notes, self.damaged = 0, None, [], False
        if resuming:
            checkpoint, path = self.last_checkpoint()
            with suspicious(path, "doesn't fit this run"):
                self.take(checkpoint, path, override)
            require((same_everywhere(self.epoch * steps_per_epoch + self.step, device),
                     f"{path}: the processes have read different ones; --out must be a folder that all machines share"))
            self.log = self.read_log()

    def path(self, name):
        return os.path.join(self.out, name)

    def take(self, checkpoint, path, override):
        """Go on from what a checkpoint holds."""
        then, now = checkpoint["settings"], self.settings
        changed = {key: f"{key} {then.get(key)} -> {now.get(key)}" for key in sorted({*then, *now}, key=str) if then.get(key) != now.get(key)}
        fatal = [text for key, text in changed.items() if key not in {*self.MAY_CHANGE, *override}]
        require((checkpoint["format"] == FORMAT, f"{path}: not a checkpoint in this program's format {FORMAT}"),
                (not fatal, f"{path}: was made with other settings ({'; '.join(fatal)}); give the same command, or another --out, or name what "
                            "may change: --override " + " ".join(str(key) for key in changed if key not in self.MAY_CHANGE)))
        self.notes += [f"other settings than so far: {'; '.join(changed.values())}"] if changed else []
        for name, part in self.parts.items():
            state = checkpoint[name]
            if name == "optimizer":  # its weight decay and momentum are this run's, which may have been overridden
                groups = [{**mine, "lr": float(group["lr"])} for mine, group in zip(part.state_dict()["param_groups"], state["param_groups"], strict=True)]
                state = {"state": state["state"], "param_groups": groups}
            part.load_state_dict(state)
        if any(t.shape != w.shape for w, kept in self.parts["optimizer"].state.items() for t in kept.values()):
            raise ValueError("momentum of other shapes")
        self.epoch, self.step, self.seconds, self.waited = (kind(checkpoint[key]) for key, kind in
                                                            (("epoch", int), ("step", int), ("seconds", float), ("waited", float)))
        require((0 <= self.epoch <= now["epochs"] and 0 <= self.step <= self.steps_per_epoch * (self.epoch < now["epochs"]),
                 f"{path}: stands at epoch {self.epoch}, step {self.step}, beyond this run's {now['epochs']} epochs of {self.steps_per_epoch} steps"))
        self.sums += torch.tensor(checkpoint["sums"], dtype=torch.float64, device=self.device)

    def last_checkpoint(self):
        """The newest checkpoint that can be read, of the two that are kept -> its content, its path"""
        try:
            return read(self.path("checkpoint.pth")), self.path("checkpoint.pth")
        except (Refused, OSError) as error:
            older = self.path("checkpoint-previous.pth")
            if not os.path.exists(older):
                raise
            self.notes.append(f"{printable(error)}; going on from {older}")
            self.damaged = True
            return read(older), older

    def read_log(self):
        """The records that the checkpoint has behind it: no epochs beyond it, and no end."""
        behind, path = self.epoch if (self.epoch, self.step) != (0, 0) else -1, self.path("log.jsonl")
        with suspicious(path, "no log of this run; restore it, or give another --out"), open(path) as f:
            log = [json.loads(line) for line in f if line.endswith("}\n")]  # a kill may have cut the last line short
            log = [r for r in log if r["event"] in ("start", "resume") or r["event"] == "epoch" and r["epoch"] <= behind]
            odd = [v for r in log if r["event"] == "epoch" for v in r.values() if not isinstance(v, (int, float, str, type(None)))]
            if log[0]["event"] != "start" or odd:
                raise ValueError(odd or "no start")
        return log

    def begin(self, **more):
        """Write the first record of the log, with all that the run could depend on, and a checkpoint; or that it goes on. From now on
        SIGTERM, SIGINT and SIGUSR1 end the run after the step that it is in."""
        self.log.append({"event": "resume", "epoch": self.epoch, "step": self.step} if self.resuming else {"event": "start", **more})
        self.log[-1] |= {"command": shlex.join(sys.argv), "device": device_name(self.device), "world": dist.get_world_size(),
                         "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                         "pillow": PIL.__version__, "seed": self.settings["seed"], "settings": self.settings}
        if self.first:
            os.makedirs(self.out, exist_ok=True)
            with replacing(self.path("log.jsonl"), "w") as f:
                f.writelines(json.dumps(record) + "\n" for record in self.log)
        if not self.resuming:
            self.save()
        for number in STOPPING:
            signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next Ctrl-C leaves at once

    def record(self, event, **values):
        """Add a line to the log. JSON knows no NaN: null stands for it."""
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
        self.log.append({"event": event, **finite})
        if self.first:
            with open(self.path("log.jsonl"), "a") as f:
                f.write(json.dumps(self.log[-1]) + "\n")
        return self.log[-1]

    def epochs(self):
        return [record for record in self.log if record["event"] == "epoch"]

    def save(self):
        """Everything that the run needs to go on from here. Raises Refused where weights are not finite."""
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        self.insist(torch.stack([t.isfinite().all() for t in parts["model"].values()]).all(), "a weight")
        if self.first:
            save({"format": FORMAT, **parts, "epoch": self.epoch, "step": self.step, "sums": self.sums.tolist(), "seconds": self.seconds,
                  "waited": self.waited, "settings": self.settings}, self.path("checkpoint.pth"),
                 keep=None if self.damaged else self.path("checkpoint-previous.pth"))  # a damaged one must not take the place of the good one
            self.damaged = False
        self.saved = time.monotonic()

    def watch(self, L, optimizer, spread):
        """Add up what a step gave: this process's loss, and the spread of all. Raises Refused where loss or gradient was not finite, and
        Stopped, with everything saved, where a process has got a signal: on all processes after the same step, one step late, because
        to wait for this step's numbers would make the GPU wait too. -> the loss of all"""
        gradients = nn.utils.get_total_norm([w.grad for group in optimizer.param_groups for w in group["params"] if w.grad is not None])
        loss, stop = all_sum(torch.stack([L.double(), L.new_full((), self.signal, dtype=torch.float64)]))
        loss = loss / dist.get_world_size()
        self.sums += torch.stack([loss, spread.double()])
        event = torch.cuda.Event() if self.device.type == "cuda" else None
        numbers = torch.stack([loss, gradients.double(), stop]).to("cpu", non_blocking=True)
        if event:
            event.record()
        before, self.late = self.late, (self.step, optimizer.param_groups[0]["lr"], numbers, event)
        if before and self.look(before):
            self.look(self.late)
            self.seconds = time.monotonic() - self.origin
            self.save()
            all_sum(torch.zeros(1, device=self.device))  # nobody leaves before the checkpoint is written: torchrun would end the others
            raise Stopped(self.signal or signal.SIGTERM, f"stopped by a signal after epoch {self.epoch}, step {self.step}; the same command with --resume goes on")
        return loss

    def look(self, late):
        """Check a step's numbers, which are there by now or are waited for -> whether a process wants to stop."""
        step, lr, numbers, event = late
        if event:
            event.synchronize()
        loss, gradients, stop = numbers.tolist()
        self.insist(math.isfinite(loss) and math.isfinite(gradients), f"at lr {lr:.4g} the loss, {loss}, or the gradient, of norm {gradients},", step)
        return stop > 0

    def insist(self, finite, what, step=None):
        require((finite, f"{what} is not finite in epoch {self.epoch + 1}, step {step or self.step}; the last good checkpoint is {self.path('checkpoint.pth')}. "
                         "Try a smaller --base-lr or --warmup 10, in another --out"))

    def waiting_for(self, batches):
        """The same batches. The time until each is there counts as waiting for data."""
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - asked
            if batch is None:
                return
            yield batch

    def rest_of_epoch(self, batches):
        """Yield the batches that this epoch still needs, each for one step; time them, and save now and then, and at the end."""
        self.origin = time.monotonic() - self.seconds
        while self.step < self.steps_per_epoch:
            batch = next(batches)
            self.step, self.seconds = self.step + 1, time.monotonic() - self.origin
            yield self.epoch * self.steps_per_epoch + self.step - 1, batch
            if self.step < self.steps_per_epoch and time.monotonic() - self.saved > 60 * self.settings["save_minutes"]:
                self.look(self.late)  # nothing that isn't finite is ever saved
                self.save()
        if self.late:
            self.look(self.late)
        self.means = (self.sums / self.steps_per_epoch).tolist()  # waits for the GPU, so that it counts
        self.seconds = time.monotonic() - self.origin
        self.save()

    def speed(self):
        """Of a finished epoch."""
        images = self.steps_per_epoch * self.settings["batch"]
        return {"images_per_s": images / self.seconds, "data_wait": self.waited / self.seconds, "seconds": self.seconds}

    def next_epoch(self):
        self.epoch, self.step, self.seconds, self.waited = self.epoch + 1, 0, 0.0, 0.0
        self.sums.zero_()


def draw_curves(path, records, knn_pixels, minimum):
    """The three panels of the paper's Fig. 2 from the log's epochs: loss, std with its 1/sqrt(d) line, accuracy (kNN)."""
    panels = [("loss", f"training loss (minimum {minimum})", minimum, minimum + 1, None, ""), ("std", "std x sqrt(d)  (1: scattered, 0: collapsed)", 0, 1.1, 1,
              "std = 1/sqrt(d)"), ("knn", "kNN top-1 (%)", 0, 100, knn_pixels, "raw pixels")]
    width, height, font, last = 420, 300, ImageFont.load_default(15), max(1, records[-1]["epoch"])
    image = Image.new("RGB", (len(panels) * width, height), "white")
    pen = ImageDraw.Draw(image)
    for k, (key, title, low, high, reference, name) in enumerate(panels):
        points = [(r["epoch"], r[key]) for r in records if r[key] is not None]
        low, high = min([low, *(v for _, v in points)]), max([high, *(v for _, v in points)])
        x0, x1, y0, y1 = k * width + 58, (k + 1) * width - 16, height - 44, 40

        def at(epoch, value):
            return x0 + (x1 - x0) * epoch / last, y0 + (y1 - y0) * (value - low) / (high - low)

        pen.text((x0, 12), title, "black", font)
        for value in np.linspace(low, high, 5):
            pen.line([at(0, value), at(last, value)], "#dddddd")
            pen.text((x0 - 6, at(0, value)[1]), f"{value:.3g}", "black", font, anchor="rm")
        for epoch in {round(last * share) for share in (0, 0.25, 0.5, 0.75, 1)}:
            pen.text((at(epoch, low)[0], y0 + 6), f"{epoch}", "black", font, anchor="mt")
        pen.text(((x0 + x1) / 2, y0 + 25), "epoch", "black", font, anchor="mt")
        if reference is not None:
            pen.line([at(0, reference), at(last, reference)], "#d62728")
            pen.text((x1 - 2, at(0, reference)[1] - 2), name, "#d62728", font, anchor="rb")
        if points:
            pen.line([at(*point) for point in points], "#1f4e9c", 2)
            pen.circle(at(*points[-1]), 3, "#1f4e9c")
        pen.rectangle((x0, y1, x1, y0), outline="black")
    with replacing(path) as f:
        image.save(f, "png")


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
        width = shutil.get_terminal_size().columns - 1 if self.live else None  # a wrapped line could not be redrawn
        self.line(f"{describe()}  {datetime.timedelta(seconds=round(left))} left"[:width], end="" if self.live else "\n")

    def line(self, text, end="\n"):
        """Print a line that stays, unless step() puts another in its place."""
        if self.pause < math.inf:
            print(f"\r\033[K{text}" if self.live else text, end=end, flush=True)


# --- Options ---------------------------------------------------------------------------------------------------------

def new_parser(script, description, data, out, amp):
    """A parser with the options that both scripts have; data, out, amp: what to say of their defaults."""
    parser = argparse.ArgumentParser(
        prog=script, description=description, formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120))
    parser.error = lambda message: sys.exit(f"{script}: {message}; see --help")
    parser.add_argument("data", nargs="?", metavar="DATA", help="an image folder (train/<class>/..., val/<class>/..., or any "
                        f"folder of images), a text file with a path per line, or a CIFAR-10 folder (default: {data})")
    parser.add_argument("--out", help=f"run folder (default: {out})")
    parser.add_argument("--resume", nargs="?", const="yes", choices=("yes", "auto"), metavar="auto",
                        help="after DATA: continue the run in --out; with auto: if there is one, and start otherwise")
    parser.add_argument("--override", nargs="+", default=[], metavar="SETTING", help="with --resume: settings that may differ from the checkpoint's")
    parser.add_argument("--seed", type=int, default=0, help="of weights, views, order, and shapes (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: cuda where there is one")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, help=f"bf16 autocast (default: {amp})")
    parser.add_argument("--workers", type=int, default=min(16, cores()),
                        help="processes that decode images, per GPU (default: its share of the cores, up to 16)")
    parser.add_argument("--save-minutes", type=float, default=10, help="a checkpoint this often within an epoch (default: %(default)s)")
    return parser


def parse(argv=None):
    parser = new_parser("simsiam.py", "SimSiam pre-training. The recipe's options default to the paper's settings for the data at hand.",
                        data="drawn shapes", out="runs/<name of the data>", amp="on cuda")
    parser.add_argument("--recipe", choices=RECIPES, help="default: shapes without DATA, cifar10 for images of one size up to "
                        f"{augment.SMALL} pixels a side, else imagenet")
    parser.add_argument("--experiment", choices=(*EXPERIMENTS, "list"), default="simsiam", metavar="NAME",
                        help="a row of the paper; list shows them all (default: %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="fuse the operations of the network and of the "
                        "colour changes with torch.compile, which takes a minute or more at the start and a C++ compiler on a CPU (default: no)")
    parser.add_argument("--init", metavar="FILE", help="start from the weights of a checkpoint.pth, or of one in the released layout")
    choices = {"arch": tuple(resnet.ARCHS), "pred_lr": ("constant", "cosine"), "predictor": ("mlp", "fixed", "none"),
               "objective": tuple(OBJECTIVES), "eta": ("current", "alternate", "average")}
    recipe = parser.add_argument_group("recipe (defaults: imagenet | cifar10 | shapes)")
    for name, values in SETTINGS.items():
        kind = type(values[0])
        how = {"type": number, "nargs": len(values[0]), "metavar": name[0].upper()} if kind is tuple \
            else {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": number if kind is float else kind}
        how |= {"choices": choices[name]} if name in choices else {}
        shown = [" ".join(f"{v:.4g}" for v in value) if kind is tuple else str(value) for value in values]
        recipe.add_argument("--" + name.replace("_", "-"), help=" | ".join(shown) if len(set(shown)) > 1 else shown[0], **how)
    args = parser.parse_args(argv)
    if args.experiment == "list":
        print(f"{'experiment':27}{'the paper, on ImageNet':33}what changes")
        for name, (changes, paper) in EXPERIMENTS.items():
            print(f"{name:27}{paper:33}{', '.join(f'{key} {value}' for key, value in changes.items())}")
        sys.exit()
    return args


def number(text):
    """0.125 and 1/8 alike."""
    numerator, _, denominator = text.partition("/")
    with np.errstate(all="ignore"):
        return float(np.float64(numerator) / np.float64(denominator or 1))


def recipe_for(data, train, name=None):
    """The settings of the recipe of this name, or else of the one that suits the data, as given and as opened."""
    small = train.pixels is not None
    name = name or ("shapes" if data is None else "cifar10" if small else "imagenet")
    settings = {key: values[RECIPES.index(name)] for key, values in SETTINGS.items()}
    if small and data is not None and name == "cifar10":
        settings["size"] = max(train.pixels.shape[2:])  # small images are trained on at their own size
    return {"recipe": name, **settings}


def resolve(args, train, world):
    """The settings of a run: recipe, then experiment, then what the command line names. Raises Refused for impossible ones."""
    settings = recipe_for(args.data, train, args.recipe)
    for name, value in EXPERIMENTS[args.experiment][0].items():
        measure = {"warmup": "epochs"}.get(name, name)
        scale = min(1, settings[measure] / SETTINGS[measure][0]) if measure in ("batch", "dim", "pred_dim", "epochs") else 1
        settings[name] = max(1, round(scale * value)) if scale < 1 else value
    settings.update({name: tuple(value) if isinstance(value, list) else value for name in SETTINGS if (value := getattr(args, name)) is not None})
    settings.update(experiment=args.experiment, init=args.init, seed=args.seed, data=args.data, images=len(train), device=args.device,
                    amp=args.amp if args.amp is not None else args.device == "cuda", compile=args.compile, world=world, workers=args.workers,
                    save_minutes=args.save_minutes if settings["eta"] != "average" else 1e9)  # its checkpoint takes all processes at once
    check(settings)
    for name in ("area", "aspect", "sigma"):
        require((settings[name][0] <= settings[name][1], f"--{name} {settings[name]}: the lower bound comes first"))
    require((settings["strength"][3] <= 0.5, f"--strength {settings['strength']}: the last, hue, at most 0.5: half a turn either way"),
            (settings["warmup"] < settings["epochs"], f"--warmup {settings['warmup']}: less than --epochs {settings['epochs']}"),
            (settings["batch"] > 1, "--batch 1: BN needs at least 2 images"),
            (settings["eta"] == "current" or settings["objective"] == "symmetric", f"--eta {settings['eta']}: goes with --objective symmetric"))
    return settings


def require(*rules):
    """Each a condition and what to say where it does not hold."""
    for holds, message in rules:
        if not holds:
            raise Refused(message)


LIMITS = {  # of what the command lines take
    "batch": (1, math.inf), "epochs": (1, math.inf), "warmup": (0, math.inf), "base_lr": (0, 1e6), "weight_decay": (0, 1e6),
    "momentum": (0, 0.9999), "width": (1 / 64, 64), "proj_layers": (1, 100), "proj_hidden": (1, 10 ** 6), "dim": (1, 10 ** 6),
    "pred_dim": (1, 10 ** 6), "size": (2, 4096), "area": (1e-4, 1), "aspect": (0.01, 100), "sigma": (0.01, augment.REACH / 3),
    "strength": (0, 1), "jitter": (0, 1), "gray": (0, 1), "blur": (0, 1), "flip": (0, 1), "std": (1e-3, 1e3), "centre": (0.01, 1),
    "bn": (0, 1), "fc_std": (0, 10),
    "k": (0, math.inf), "m": (0, 0.9999), "knn_every": (0, math.inf), "workers": (0, 1024), "seed": (0, 2 ** 63 - 1), "save_minutes": (0, 1e9)}


def check_limits(values):
    """Raise Refused for numbers, or tuples of numbers, that no run can have. values: {name: value}, None where not given."""
    for name, (low, high) in LIMITS.items():
        given = values.get(name)
        fits = given is None or all(low <= v <= high for v in np.ravel(given))
        require((fits, f"--{name.replace('_', '-')} {given}: from {low:g} to {high:g}"))


def check(s):
    """Raise Refused for settings of either script that don't go together."""
    check_limits(s)
    require(
        (s["batch"] % s["world"] == 0, f"--batch {s['batch']}: {s['world']} processes don't divide it; the batch is the global one"),
        (s["images"] >= s["batch"], f"--batch {s['batch']}: the data has only {s['images']} images, less than one batch"),
        (not s["amp"] or s["device"] == "cuda", "--amp: bf16 autocast is for GPUs"))


# --- The run ---------------------------------------------------------------------------------------------------------

def launch(script, run, args):
    """Run a script to its end -> None; where that can't be reached, what sys.exit would take: a line of text, or a number."""
    try:
        run(args)
        dist.destroy_process_group()  # only now: after a failure it would wait for the other processes
        return None
    except Stopped as stopped:
        number, message = stopped.args
        if os.environ.get("RANK", "0") == "0":
            print(f"{script}: {message}", file=sys.stderr)
        return 128 + number
    except (Refused, OSError, EOFError) as error:  # the last, and a connection: a worker was killed while it handed over a batch
        message = f"{error!r}: {HINTS['DataLoader worker']}" if isinstance(error, (ConnectionError, EOFError)) else error
    except RuntimeError as error:
        hint = next((text for words, text in HINTS.items() if re.search(words, str(error))), None)
        if hint is None:
            raise
        message = f"{str(error).splitlines()[0]}: {hint}"
    except KeyboardInterrupt:
        message = "interrupted; what has a checkpoint goes on from it with --resume"
    finally:
        for number in STOPPING:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(3)  # what the first process meets too, it says: torchrun then ends this one
    return "\n" * sys.stdout.isatty() + f"{script}: {printable(message)}"


HINTS = {  # torch's words: what to do
    "DataLoader timed out": f"no images for {augment.LOADER_TIMEOUT} s; is the disk or the network under DATA still there?",
    "DataLoader worker": "a process that decodes images was killed, mostly for want of memory or of /dev/shm; use fewer --workers",
    "No working C\\+\\+ compiler|Failed to find C compiler|Cannot find a working triton": "--compile needs one; leave it out",
    "out of memory": "use a smaller --batch, or more GPUs",
    "Connection (closed|reset)|[Tt]imed out": "another process has ended, or is stuck; look for its message"}


def leave(status):
    """End the process with what launch returned, now: threads and workers that may be stuck are not waited for."""
    for worker in multiprocessing.active_children():
        worker.kill()
    if isinstance(status, str):
        print(status, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if isinstance(status, str) else status or 0)


def pretrain(args):
    # 1. Processes, data, settings
    device, rank, world = join_world(torch.device(args.device))
    data = train, val = augment.open_data(args.data, args.seed)
    s = resolve(args, train, world)
    s["content"] = train.fingerprint()
    require((same_everywhere(s["content"], device), f"{args.data}: the processes see different images there; give all machines the same data"))
    policy = augment.Policy(**{name: s[name] for name in augment.Policy._fields})
    objective, views_per_image, minimum = OBJECTIVES[s["objective"]]
    steps_per_epoch = len(train) // s["batch"]
    total_steps, warmup_steps = s["epochs"] * steps_per_epoch, s["warmup"] * steps_per_epoch
    lr = initial_lr(s["base_lr"], s["batch"])
    watch_knn = s["knn_every"] > 0 and val is not None and len(val) >= world

    out = args.out or os.path.join("runs", name_of(args.data) + ("" if args.experiment == "simsiam" else "-" + args.experiment))
    resuming = holds_run(out, ["checkpoint.pth", "checkpoint-previous.pth"], args.resume, device)

    # 2. Model, optimiser, and how far they are
    torch.manual_seed(s["seed"])
    model = SimSiam(s["arch"], s["dim"], s["pred_dim"], s["proj_layers"], s["proj_hidden"], s["width"], s["cifar_stem"],
                    s["predictor"], s["bn"], s["affine"], s["fc_std"])
    if args.init and not resuming:
        start = {name.removeprefix("module."): t for name, t in read_weights(args.init)[0].items()}
        load_strictly(model, start, f"--init {args.init}")
    layout = resnet.fastest_layout(model.encoder, device)
    model = model.to(device, memory_format=layout)
    network = distribute(model, device)
    optimizer = sgd(model, s["momentum"], s["weight_decay"])
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=s["amp"])  # what stays in float32 has TF32 convolutions

    parts, k = {"model": model, "optimizer": optimizer}, s["k"] or steps_per_epoch
    if s["eta"] == "alternate":
        parts["theta"] = copy.deepcopy(model)
    elif s["eta"] == "average":
        parts["eta"] = Spread(len(train), s["dim"], device)
    run = Run(out, parts, s, steps_per_epoch, resuming, device, args.override)

    def watch(backbone):
        backbone.eval()
        percent = monitor(backbone.features, data, policy, device, s["workers"], autocast)
        backbone.train()
        return percent

    # 3. Say what is going to happen, on the screen and in the log
    progress = Progress(total_steps - run.epoch * steps_per_epoch - run.step, quiet=not run.first)
    progress.line(describe(args, s, train, val, device, lr, watch_knn, out))
    if s["eta"] != "current":
        vectors = {"alternate": 2 * k * s["batch"], "average": len(train)}[s["eta"]]
        progress.line(f"eta         {s['eta']}, {f'{k} steps, ' * (s['eta'] == 'alternate')}{vectors} vectors: {vectors * s['dim'] * 4 / 2 ** 20:.1f} MiB "
                      "over all processes")
    if resuming:
        progress.line("\n".join([*run.notes, f"continuing after {run.epoch} epochs and {run.step} steps"]))
        run.begin()
    else:
        run.begin(knn_pixels=monitor(lambda x: x.flatten(1), data, policy, device, s["workers"]) if watch_knn and train.pixels is not None else None)
        if run.first:
            with replacing(run.path("views.png")) as f:
                augment.contact_sheet(train, policy, s["seed"]).save(f, "png")

    def report(number, **measured):
        """A finished epoch, on the screen, in the log, in the picture."""
        record = run.record("epoch", epoch=number, step=number * steps_per_epoch, **{**dict.fromkeys(MEASURED), **measured})
        if run.first:
            draw_curves(run.path("curves.png"), run.epochs(), run.log[0].get("knn_pixels"), minimum)
        progress.line(f"epoch {number}/{s['epochs']}" + f"  {'as loaded' if args.init else 'untrained'} (kNN: with BN calibrated)" * (number == 0) + "".join(
            "  " + shown.format(record[key], minimum) for key, shown in MEASURED.items() if shown and record[key] is not None))

    # 4. Train
    if s["compile"]:
        network.compile()  # in place: names in checkpoints stay
        augment.blend, augment.shift_hue = (torch.compile(f, dynamic=True) for f in (augment.blend, augment.shift_hue))
    step = run.epoch * steps_per_epoch + run.step
    batches = augment.steps(s["seed"], len(train), s["batch"], s["epochs"], run.epoch, run.step, rank, world)
    batches = twice(batches, k, step) if s["eta"] == "alternate" else batches
    views = run.waiting_for((index, [x.contiguous(memory_format=layout) for x in views]) for index, views in
                            augment.load_views(train, policy, s["seed"], batches, device, s["workers"], views_per_image))
    stream = alternate(views, model, parts["theta"], k, step, total_steps, autocast) if s["eta"] == "alternate" else \
        average(views, parts["eta"], s["m"]) if s["eta"] == "average" else plain(views, objective)
    if not run.epochs():
        report(0, knn=watch(calibrated(model.encoder, train, policy, device, s["workers"])) if watch_knn else None)
    while run.epoch < s["epochs"]:
        for step, (x, objective) in run.rest_of_epoch(stream):
            set_lr(optimizer, lr, step, total_steps, warmup_steps, s["pred_lr"])
            L, z = train_step(network, objective, optimizer, autocast, x)
            spread = sum(std(z_i, all_sum) for z_i in z) / len(z) * math.sqrt(s["dim"])
            L = run.watch(L, optimizer, spread)
            progress.step(lambda: f"epoch {run.epoch + 1}/{s['epochs']}  step {run.step}/{steps_per_epoch}  loss {L.item():.4f}  "
                          f"std x sqrt(d) {spread.item():.3f}  {s['batch'] * run.step / run.seconds:.0f} images/s")
        due = watch_knn and ((run.epoch + 1) % s["knn_every"] == 0 or run.epoch + 1 == s["epochs"])
        in_trouble = collapsed(run.means[0] - minimum - 1, run.means[1], s["batch"])
        if in_trouble and not any(record["collapsed"] for record in run.epochs()):
            progress.line("collapsed: all outputs are (nearly) the same vector. Try, in this order: a smaller --base-lr; --warmup 10; "
                          "a larger --batch; --pred-dim a quarter of --dim; and look at views.png")
        report(run.epoch + 1, loss=run.means[0], std=run.means[1], lr=optimizer.param_groups[0]["lr"],
               knn=watch(model.encoder) if due else None, **run.speed(), memory_mb=peak_memory(device), collapsed=in_trouble,
               bad_images=sum(bad_images(source, device) for source in data if source))
        run.next_epoch()

    # 5. The result
    if run.first:
        backbone = {name: t for name, t in model.encoder.state_dict().items() if not name.startswith("fc.")}
        save(backbone, run.path("backbone.pth"))
    run.record("end", epochs=run.epoch, knn=run.epochs()[-1]["knn"], backbone="backbone.pth")
    progress.line(f"done: {run.path('backbone.pth')} (features), checkpoint.pth, log.jsonl, curves.png")


MEASURED = {  # what the log has of an epoch, null where it doesn't exist, and how the screen shows it
    "loss": "loss {:.4f} (minimum {})", "std": "std x sqrt(d) {:.3f}", "lr": "lr {:.4g}", "knn": "kNN {:.2f}%",
    "images_per_s": "{:.0f} images/s", "data_wait": "{:.0%} waiting for data", "seconds": None, "memory_mb": "{} MiB", "collapsed": None,
    "bad_images": None}


def describe(args, s, train, val, device, lr, watch_knn, out):
    """The block that a run starts with."""
    labels = "no labels" if train.labels is None else f"{len(train.classes)} classes"
    given = ", ".join(f"{name} {s[name]}" for name in SETTINGS if getattr(args, name) is not None)
    changes, paper = EXPERIMENTS[s["experiment"]]
    scaled = ", ".join(f"{name} {s[name]}" for name in changes if s[name] != changes[name])
    fixed = ", ".join(name for name in changes if name in ("k", "base_lr", "weight_decay") and s["recipe"] != "imagenet")
    return "\n".join([
        f"data        {args.data or 'shapes (drawn)'}: {len(train)} images, {labels}, {'files' if train.pixels is None else 'in memory'}",
        f"recipe      {s['recipe']}{f', with {given}' if given else ''}",
        f"experiment  {s['experiment']} (the paper on ImageNet: {paper}){f'; here {scaled}, not what the row says' if scaled else ''}"
        + (f"; {fixed} as for ImageNet" if fixed else ""),
        f"network     {s['arch']}, width {s['width']:g}{', from ' + args.init if args.init else ''}; projection {s['proj_layers']} layers "
        f"to d = {s['dim']}; h " + ("none" if s["predictor"] == "none" else f"{s['dim']}-{s['pred_dim']}-{s['dim']}{', fixed' * (s['predictor'] == 'fixed')}"),
        f"training    {s['epochs']} epochs of {len(train) // s['batch']} steps, global batch {s['batch']}, lr {lr:.4g} (cosine; "
        f"predictor {s['pred_lr']}), {s['size']}-pixel views",
        f"processes   {s['world']} x {s['batch'] // s['world']} images, BN over {s['batch']}, {hardware(s, device)}",
        "kNN         " + (f"every {s['knn_every']} epochs, k {min(200, len(train))}{' (all there are)' * (len(train) < 200)}, on {len(val)} images" if watch_knn else
                          "none (needs labels and val/)"),
        f"writes to   {out}"])


def hardware(s, device):
    precision = "bf16 autocast" if s["amp"] else "float32 (convolutions TF32)" if device.type == "cuda" else "float32"
    return f"{device_name(device)}, {precision}{', compiled' * s.get('compile', False)}, {s['workers']} workers"


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def peak_memory(device):
    """MiB: of the GPU if there is one, else of the process."""
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)
    return torch.cuda.max_memory_allocated(device) >> 20 if device.type == "cuda" else process


if __name__ == "__main__":
    leave(launch("simsiam.py", pretrain, parse()))
