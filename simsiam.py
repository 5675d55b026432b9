"""SimSiam (Chen & He 2020, "Exploring Simple Siamese Representation Learning", arXiv 2011.10566):
pre-training.

    python simsiam.py                                 no data needed: drawn shapes, minutes on a laptop
    python simsiam.py CIFAR                           a CIFAR-10 folder; any small images of one size
    python simsiam.py IMAGES                          train/<class>/*.jpg, or any folder or list of images
    torchrun --nproc-per-node 8 simsiam.py IMAGENET   one machine with 8 GPUs
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 simsiam.py IMAGENET
                                                      the same line on each of 4 machines; HOST is one of them
    add --resume to continue a run that was interrupted; python simsiam.py --help lists the options

Read top to bottom, beside the paper:

    1. the loss, and one step of Algorithm 1        5. what is watched: std and collapse, kNN
    2. the heads and the model                      6. other losses, for the ablations
    3. the optimiser and the schedule               7. Sec. 5: SimSiam as alternating optimisation
    4. the training loop                            8. settings and experiments, with the paper's figures

You may stop after 4: that is SimSiam. (Its batches come from `plain` in 7, the std that it shows from 5.) 5
to 8 are the rest of the paper. 9, at the end, is the program: options, and the order in which a run puts
the pieces together. The views are made in augment.py, the backbone is in resnet.py, and what any training
program needs (processes, checkpoints, the log) is in harness/. related.py has SimSiam's neighbours, each as
what it changes here.

The paper's letters: x1, x2 two views of a batch of images (N, 3, S, S); f the encoder (backbone and
projection MLP), h the prediction MLP; z1 = f(x1), p1 = h(z1), (N, d) each; D the negative cosine
similarity. "Sec.", "Eq.", "Table": the paper's. A tag such as "Eq. (1)" behind a line of code says that
this line is the equation; README.md has the map.
"""
import argparse
import contextlib
import copy
import itertools
import math
import os
import sys
import textwrap
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import augment
import resnet
from harness.common.machine import bf16_pays, fastest_layout, hardware, peak_memory, to_device
from harness.common.draws import permutation
from harness.common.errors import Refused, printable
from harness.common.files import save, save_picture
from harness.common.progress import Progress
from harness.data.loading import index_batches
from harness.data.opening import SMALL, open_data
from harness.evaluation.features import accuracy, calibrated, check_same_images, extract, good_ones
from harness.evaluation.features import neighbours, share_bad
from harness.common.pictures import draw_curves
from harness.evaluation.weights import describe_found, find_resnet, load_strictly, name_groups, read_weights
from harness.evaluation.weights import whole_model
from harness.training.batchnorm import synchronize
from harness.training.ends import run_and_leave
from harness.training.folder import CHECKPOINTS, folder_name, holds_run, lock
from harness.training.options import add_prefix, add_setting, check_batch, check_limits, new_parser, number
from harness.training.per_image import PerImageVectors
from harness.training.processes import all_sum, check_same_precision, join_world, mean_over_processes
from harness.training.run import Run

# --- 1. The loss, and one step of Algorithm 1 (Sec. 3) ---------------------------------------------------


def D(p, z):
    """Negative cosine similarity, averaged over the batch: -p/|p| . z/|z|. (N, d), (N, d) -> scalar in [-1,
    1].

    It does not detach: stop-gradient is a function of its own, applied in `loss`.
    """
    return -(l2_normalize(p) * l2_normalize(z)).sum(dim=1).mean()     # Eq. (1): negative cosine


def stopgrad(z):
    """z as a constant: the same values, through which no gradient flows. Without it SimSiam collapses (Sec.
    4.1)."""
    return z.detach()                                                 # Eq. (3): stop-gradient


def loss(p1, p2, z1, z2):
    """SimSiam's symmetrised loss: L = 1/2 D(p1, stopgrad(z2)) + 1/2 D(p2, stopgrad(z1)). Its minimum is -1.

    The encoder on x2 gets no gradient from z2 in the first term, but does from p2 in the second.
    """
    return D(p1, stopgrad(z2)) / 2 + D(p2, stopgrad(z1)) / 2          # Eq. (4): symmetrised loss


def train_step(network, objective, optimizer, autocast, views):
    """One iteration of Algorithm 1, on views x1, x2 (N, 3, S, S) of this process's share of the batch.

    network     SimSiam, or its DistributedDataParallel, which averages the gradients over the processes
    objective   `loss`, or another function of all p's and then all z's, in the order of the views
    autocast    the context that sets the precision of the forward pass
    Returns the loss and z1, z2, detached, for the monitors.
    """
    with autocast:
        p, z = network(*views)          # (p1, p2), (z1, z2): z = f(x), p = h(z), (N, d) each
    L = objective(*p, *z)               # loss(p1, p2, z1, z2)
    optimizer.zero_grad()
    L.backward()
    optimizer.step()                                                  # Alg. 1: update(f, h)
    return L.detach(), [z_i.detach() for z_i in z]


def l2_normalize(v):
    """Each row divided by its l2 norm: (N, d) -> (N, d)"""
    return F.normalize(as_float32(v), dim=1)


def as_float32(v):
    """v in float32 at least: bf16 would cost the loss its third digit. float64 stays."""
    return v.to(torch.promote_types(v.dtype, torch.float32))


# --- 2. The heads and the model (Sec. 3, "Baseline settings") -------------------------------------------

class BatchNorms(NamedTuple):
    """Behind which fc layers of the two heads a BN follows. The defaults are the paper's; Table 3 varies
    them."""
    proj_hidden: bool = True
    proj_output: bool = True
    pred_hidden: bool = True
    pred_output: bool = False


def linear_and_bn(inputs, outputs, bn, affine=True):
    """A fully-connected layer, and a BN if `bn`."""
    if not bn:  # only then a bias: a BN would subtract it again
        return [nn.Linear(inputs, outputs)]
    return [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs, affine=affine)]


def projection_mlp(features, hidden, dim, layers, hidden_bn=True, output_bn=True, affine=False):
    """The end of f: `layers` fc layers, BN on each, ReLU on all but the last. (N, features) -> (N, dim)

    DEPARTURE: the output BN has no affine scale and offset, as in the released code. With them the paper
    measured the same.

    DEPARTURE: the first hidden width is the paper's 2048. The released code takes the backbone's, which is
    512 for ResNet-18.
    """
    widths = [features] + [hidden] * (layers - 1)
    mlp = []
    for width, following in itertools.pairwise(widths):
        mlp += linear_and_bn(width, following, hidden_bn)
        mlp.append(nn.ReLU(inplace=True))
    mlp += linear_and_bn(widths[-1], dim, output_bn, affine)
    return nn.Sequential(*mlp)


def prediction_mlp(dim, hidden, hidden_bn=True, output_bn=False):
    """h: a bottleneck of two fc layers, BN and ReLU on the hidden one only. (N, dim) -> (N, dim)"""
    return nn.Sequential(
        *linear_and_bn(dim, hidden, hidden_bn),
        nn.ReLU(inplace=True),
        *linear_and_bn(hidden, dim, output_bn))


class SimSiam(nn.Module):
    """The encoder f (a ResNet whose fc is the projection MLP) and the predictor h.

    The parameters have the names of the released model.

    arch, width, cifar_stem           the backbone: see resnet.py
    proj_layers, proj_hidden, dim     the projection MLP: fc layers, hidden width, output width d
    pred_dim                          hidden width of h; d/4 is the paper's bottleneck
    For the ablations:
    predictor                         "mlp"; "fixed", as initialised; "none", the identity (Table 1)
    bn                                BatchNorms, or its four values: where a BN follows (Table 3)
    affine                            whether the projection's output BN has scale and offset (Sec. 3)
    fc_std                            initial std of the heads' weights; 0: PyTorch's default (supplement A)
    """

    def __init__(self, arch="resnet50", dim=2048, pred_dim=512, proj_layers=3, proj_hidden=2048, width=1,
                 cifar_stem=False, predictor="mlp", bn=BatchNorms(), affine=False, fc_std=0.0):
        super().__init__()
        bn = BatchNorms(*bn)
        self.encoder = resnet.ARCHS[arch](width=width, cifar_stem=cifar_stem)
        self.encoder.fc = projection_mlp(
            self.encoder.num_features, proj_hidden, dim, proj_layers, bn.proj_hidden, bn.proj_output, affine)
        self.predictor = prediction_mlp(dim, pred_dim, bn.pred_hidden, bn.pred_output)
        if predictor == "none":
            # p = z, and Eq. (4)'s gradient is half of that of D(z1, z2) without stop-gradient: the same
            # direction.
            self.predictor = nn.Identity()                            # Sec. 4.2 (no h): p is z
        self.predictor.requires_grad_(predictor == "mlp")
        if fc_std > 0:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=fc_std)

    def forward(self, *views):
        """Two views (N, 3, S, S) -> (p1, p2), (z1, z2), (N, d) each, all with gradient; likewise for more
        views.

        Each view passes through f by itself, and so is normalised by its own batch statistics. One pass
        over both views together would be faster, and another method. What h learns: E_z |h(z1) - z2|^2 is
        the smallest where h(z1) = E_z[z2] = E_T[f(T(x))], the mean over the augmentations, which one sample
        z2 only approximates (Sec. 5.1).
        """
        f, h = self.encoder, self.predictor
        z = tuple(f(x) for x in views)
        p = tuple(h(z_i) for z_i in z)                                # Sec. 5.1 (h): learns the mean of z
        return p, z


# --- 3. The optimiser and the schedule (Sec. 3) ---------------------------------------------------------

def sgd(model, momentum, weight_decay):
    """SGD over f and h, two groups, because h may have an lr schedule of its own. The lr is set before
    every step.

    Weight decay is on *all* parameters, BN scales and biases included.
    """
    groups = [{"params": model.encoder.parameters()}, {"params": model.predictor.parameters()}]
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, weight_decay=weight_decay, fused=True)


def initial_lr(base_lr, batch):
    """The linear scaling rule (Goyal et al. 2017): lr = base_lr x batch / 256, with the *global* batch."""
    return base_lr * batch / 256                                      # Sec. 3 (lr): linear scaling


def warmup(step, warmup_steps):
    """The factor on the lr while warming up, linear: 1/warmup_steps at step 0, and 1 from step warmup_steps
    - 1 on."""
    return min(1.0, (step + 1) / max(1, warmup_steps))


def cosine(step, total_steps, warmup_steps):
    """The factor on the lr after the warm-up: half a cosine, (1 + cos(pi t / T)) / 2 (Loshchilov & Hutter
    2017).

    DEPARTURE: set at every step, where the released code does so once an epoch; the paper doesn't say.
    """
    progress = max(0, step - warmup_steps) / max(1, total_steps - warmup_steps)
    return (1 + math.cos(math.pi * progress)) / 2                     # Sec. 3 (schedule): cosine decay


def set_lr(optimizer, lr, step, total_steps, warmup_steps, pred_lr):
    """Give f the decayed lr. Give h the same (pred_lr "cosine"), or one that stays (pred_lr "constant",
    Table 1 c).

    The one that stays isn't warmed up either: an answer of the authors to a question (simsiam's issue 11).
    """
    f, h = optimizer.param_groups
    f["lr"] = lr * warmup(step, warmup_steps) * cosine(step, total_steps, warmup_steps)
    if pred_lr == "cosine":
        h["lr"] = f["lr"]
    else:
        h["lr"] = lr


# --- 4. The training loop: distributed SGD --------------------------------------------------------------

def distribute(model, device, compiled=False):
    """Make a model train as one over all processes: BN over the global batch (Sec. 3), gradients averaged
    in backward. compiled: whether it is going to be compiled"""
    if dist.get_world_size() == 1:
        return model
    model = synchronize(model, device, compiled)
    network = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    network.broadcast_buffers = False  # synchronised statistics are equal on all processes already
    return network


def train(run, network, stream, optimizer, schedule, autocast, progress, after_step, after_epoch):
    """The training loop, over the steps and epochs that the run still needs.

    run             the run's position, checkpoints and log (harness/training/run.py)
    network         what distribute() made of the model
    stream          yields (views, objective) for each step; see section 7
    schedule        called before each step, with its number: sets the optimiser's lr
    after_step      called after each step, with its number; SimSiam has nothing to do there
    after_epoch     called when an epoch is done and saved: measures, writes the log
    """
    while run.epoch < run.settings["epochs"]:
        for step, (views, objective) in run.steps_of_epoch(stream):
            schedule(step)
            L, z = train_step(network, objective, optimizer, autocast, views)
            after_step(step)
            L = mean_over_processes(L)
            std_sqrt_d = mean_std(z) * math.sqrt(z[0].shape[1])
            run.add_to_means(L, std_sqrt_d)
            run.check_finite(L, gradient_norm(optimizer), optimizer.param_groups[0]["lr"])
            run.save_or_stop_if_asked()
            progress.step(lambda: f"{run.place()}  loss {L.item():.4f}  "
                                  f"std x sqrt(d) {std_sqrt_d.item():.3f}  {run.rate():.0f} images/s")
        after_epoch()
        run.next_epoch()


def gradient_norm(optimizer):
    """The l2 norm of all gradients together, a tensor on the device."""
    parameters = (w for group in optimizer.param_groups for w in group["params"])
    return nn.utils.get_total_norm([w.grad for w in parameters if w.grad is not None])


# --- 5. What is watched (Sec. 4.1): the std of z, a kNN classifier --------------------------------------

def feature_std(z, all_sum=lambda t: t):
    """Std over the samples of each channel of z/|z|, averaged over the channels: (N, d) -> scalar.

    Collapsed, it is 0. Scattered over the sphere, it is 1/sqrt(d). all_sum adds a tensor up over the
    processes, so that the samples are those of the global batch.
    """
    v = l2_normalize(z)                                               # (N, d)
    sums = torch.stack([torch.ones_like(v), v, v * v]).sum(dim=1)     # (3, d)
    n, total, squares = all_sum(sums)                                 # (d,) each
    variance = (squares / n - (total / n) ** 2).clamp(min=0)          # (d,)
    return variance.sqrt().mean()                                     # Sec. 4.1 (std): of normalised z


def mean_std(z):
    """feature_std of the global batch, its mean over the views."""
    return sum(feature_std(z_i, all_sum) for z_i in z) / len(z)


def collapsed(excess, std_sqrt_d, n):
    """Whether a run has collapsed, by its loss's excess over the minimum, and std x sqrt(d) over batches of
    n.

    Behind an output BN the outputs can't all be one point, because their mean is 0. At best n - 1 of them
    meet at u, and one is at -u. There std x sqrt(d) is about 2/sqrt(n); the excess is 0 where the views
    agree on which image is the odd one, and 4/n where they don't. The bounds leave some room beyond that. A
    std of 0 is collapse whatever the loss: images that are all the same have it from the first step on.
    """
    std_bound = min(0.75, max(0.1, 3 / math.sqrt(n)))
    return std_sqrt_d < 0.01 or (excess < max(0.05, 5 / n) and std_sqrt_d < std_bound)


RANKED = 2000       # training images whose features' rank is watched
LOW_RANK = 0.3      # of the untrained network's rank: healthy runs had 0.34 at least (results/operations.md)
MOST_RAW = 100_000  # training images up to which raw pixels are measured too, to compare with


def effective_rank(v):
    """In how many directions features v (N, D) spread, from 1 to D: exp of the entropy of the normalised
    singular values of the centred features (RankMe, Garrido et al. 2023).

    It sees what the std can't: a network whose outputs differ, but in a few directions only.
    """
    v = as_float32(v)
    v = v - v.mean(dim=0)                                             # (N, D)
    if not v.any() or not v.isfinite().all():  # all the same, or beyond all numbers: not even one direction
        return v.new_zeros(())
    singular = torch.linalg.svdvals(v)                                # min(N, D) of them
    share = singular / singular.sum()
    return torch.special.entr(share).sum().exp()


def knn(bank, bank_labels, queries, k=200, temperature=0.1):
    """Weighted kNN (Wu et al. 2018, Sec. 3.4): each of the k nearest in the bank votes with exp(cosine /
    temperature).

    bank (B, d), queries (Q, d): l2-normalised features; bank_labels (B,) int64; k at most B.
    Returns votes (Q, classes), -inf where a class got none.
    """
    votes = torch.zeros(len(queries), int(bank_labels.max()) + 1, device=queries.device)
    piece = max(1, 2 ** 27 // len(bank))  # half a GiB of similarities at a time
    for q, v in zip(queries.split(piece), votes.split(piece)):
        similarity, neighbour = (q @ bank.T).topk(k, dim=1)           # (q, k) each
        v.scatter_add_(1, bank_labels[neighbour], (similarity / temperature).exp())
    return votes.masked_fill_(votes == 0, -math.inf)


def knn_accuracy(bank, bank_labels, queries, labels, k):
    """kNN's top-1 and top-5 in percent: features queries (Q, d) of these labels, against those of the bank
    (B, d)."""
    bank = l2_normalize(bank)
    queries = l2_normalize(queries)
    return accuracy(lambda mine: knn(bank, bank_labels, queries[mine], k), labels)


# --- 6. Other losses, for the paper's ablations ---------------------------------------------------------

def loss_without_stopgrad(p1, p2, z1, z2):
    """The loss before stop-gradient enters, for Fig. 2's collapsing run: L = 1/2 D(p1, z2) + 1/2 D(p2, z1).
    Minimum -1."""
    return D(p1, z2) / 2 + D(p2, z1) / 2                              # Eq. (2): without stop-gradient


def D_cross_entropy(p, z):
    """-softmax(z) . log softmax(p), over the channels, averaged over the batch: (N, d), (N, d) -> scalar, 0
    at least."""
    target = as_float32(z).softmax(dim=1)                             # (N, d)
    log_p = as_float32(p).log_softmax(dim=1)                          # (N, d)
    return -(target * log_p).sum(dim=1).mean()                        # Sec. 4.5: cross-entropy


def loss_cross_entropy(p1, p2, z1, z2):
    """Eq. (4) with the cross-entropy similarity; its minimum is 0."""
    return D_cross_entropy(p1, stopgrad(z2)) / 2 + D_cross_entropy(p2, stopgrad(z1)) / 2


def loss_asymmetric(p1, p2, z1, z2):
    """Eq. (4)'s first term alone: L = D(p1, stopgrad(z2))."""
    return D(p1, stopgrad(z2))                                        # Sec. 4.6: asymmetric


def loss_asymmetric_2x(p1, p2, p3, p4, z1, z2, z3, z4):
    """Two independent pairs of views an image, x1, x2 and x3, x4: then the comparison with two symmetric
    terms is fair."""
    return loss_asymmetric(p1, p2, z1, z2) / 2 + loss_asymmetric(p3, p4, z3, z4) / 2


class Objective(NamedTuple):
    """A loss of p's and z's, how many views of an image it takes, and its minimum."""
    loss: object
    views: int
    minimum: int


OBJECTIVES = {
    "symmetric": Objective(loss, views=2, minimum=-1),
    "without-stopgrad": Objective(loss_without_stopgrad, views=2, minimum=-1),
    "cross-entropy": Objective(loss_cross_entropy, views=2, minimum=0),
    "asymmetric": Objective(loss_asymmetric, views=2, minimum=-1),
    "asymmetric-2x": Objective(loss_asymmetric_2x, views=4, minimum=-1),
}


# --- 7. SimSiam as alternating optimisation (Sec. 5) ----------------------------------------------------
# There, theta (the weights of F, which is f; here those of h too) is fitted to eta, one constant vector per
# image. Then eta is computed from the new theta, and so on in turns. The paper's error is the squared one;
# with normalised vectors (footnote 5) it is 2 D + 2.
#
# Plain training and the two variants of Sec. 5.2 differ in what stands between the loader and the step. So
# each is a stream: it takes (index, views) from the loader, and yields (views, objective) to the training
# loop. Method.stream, in 9, chooses one.

def plain(views, objective):
    """SimSiam: eta_x = F_{theta^t}(T'(x)) of the current theta, which is what stopgrad(z) in `loss` is, and
    inner loops of one step. That is Eq. (11), but for h and the symmetrisation; Sec. 5.1 says why h is
    there."""
    for _, x in views:
        yield x, objective


def towards(eta1, eta2):
    """The objective that fits theta to an eta that stays: theta^t <- argmin_theta L(theta, eta^{t-1}).

    eta1, eta2 (N, d): each image's eta, computed from its view 1 and its view 2. Each view is fitted to the
    other's. The symmetrised loss needs both; the paper has one eta an image.
    """
    return lambda p1, p2, z1, z2: loss(p1, p2, eta1, eta2)            # Eq. (7): of theta; eta stays


def twice(batches, k, step):
    """The batches of each inner loop of k steps one after the other, and then the same once more.

    The first time is for eta, the second for the steps. A view is a pure function of its image and epoch,
    so that both times get the same views. `step` is where the run stands: it may be inside an inner loop.
    """
    while inner := list(itertools.islice(batches, k - step % k)):
        yield from inner
        yield from inner
        step += len(inner)


@torch.no_grad()
def embed(model, views, autocast):
    """z1, z2 in train mode, (N, d) each. BN then updates its running statistics: pass a copy, not the
    network in training."""
    with autocast:
        _, z = model(*views)
        return z


def alternate(views, model, theta, k, step, total_steps, autocast):
    """Sec. 5.2's k-step alternation: before each inner loop eta for just the images that its k steps need,
    then k steps.

    views   (index, [x1, x2]) of batches in the order of `twice`: each inner loop's views come twice
    theta   a copy of the model, for theta^t: eta is computed with it, eta_x^t <- F_{theta^t}(T'(x)). In the
            middle of an inner loop it differs from the model; so it is part of the checkpoint
    """
    while step < total_steps:
        if step % k == 0:
            theta.load_state_dict(model.state_dict())
        inner = min(k - step % k, total_steps - step)
        for_eta = itertools.islice(views, inner)
        eta = [embed(theta, x, autocast) for _, x in for_eta]         # Eq. (10): one sample of eta
        for_steps = itertools.islice(views, inner)
        for (eta1, eta2), (_, x) in zip(eta, for_steps):
            yield x, towards(eta1, eta2)                              # Sec. 5.2 (k-step): eta constant
        step += inner


def average(views, store, m):
    """Sec. 5.2's moving average, which does without a predictor: eta_x <- m eta_x + (1 - m) F(T'(x)).

    store: PerImageVectors. F's output and eta are normalised (footnote 5). Before an image's first visit
    its stored vector is 0, so that eta is (1 - m) z: not of length 1, but D normalises it. Both views start
    from the image's one vector, and the normalised sum of both is stored. That is ours: the paper doesn't
    say. Calling the objective stores the new eta, so that it must be called once a step.
    """
    for index, x in views:
        def objective(p1, p2, z1, z2, index=index):  # bound now: the loop's index changes
            old = store.get(index)                                    # (N, d)
            v = [l2_normalize(stopgrad(z)) for z in (z1, z2)]
            eta1, eta2 = (m * old + (1 - m) * v_i for v_i in v)       # Sec. 5.2 (moving average): of eta
            store.put(index, l2_normalize(eta1 + eta2))
            return loss(p1, p2, eta1, eta2)

        yield x, objective


# --- 8. Settings and experiments ---------------------------------------------------------------------------
# Each row of SETTINGS is an option of the command line (--base-lr, --area, ...): its type, its value in each
# recipe, and where the paper has it. "shapes" has no counterpart in the paper: it is the smallest setting
# that shows the method in minutes on two cores.

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)
ASPECT = (3 / 4, 4 / 3)                 # PyTorch's, which the paper's notation refers to
JITTER = (0.4, 0.4, 0.4, 0.1)           # brightness, contrast, saturation, hue
STRONG_JITTER = (0.6, 0.6, 0.6, 0.5)

PAIR = (number, 2)                      # an option that takes two numbers
THREE = (number, 3)
FOUR = (number, 4)
FLAGS = (int, 4)

RECIPES = ("imagenet", "cifar10", "shapes")
SETTINGS = {        # type    imagenet         cifar10          shapes            in the paper
    "arch":         (str,    "resnet50",      "resnet18",      "resnet18"),      # Sec. 3; supp. D
    "width":        (number, 1.0,             1.0,             1 / 8),           # -
    "cifar_stem":   (bool,   False,           True,            True),            # supp. D
    "proj_layers":  (int,    3,               2,               2),               # Sec. 3; supp. D
    "proj_hidden":  (int,    2048,            2048,            512),             # Sec. 3
    "dim":          (int,    2048,            2048,            512),             # Sec. 3; supp. D
    "pred_dim":     (int,    512,             512,             128),             # Sec. 3
    "predictor":    (str,    "mlp",           "mlp",           "mlp"),           # Table 1
    "bn":           (FLAGS,  (1, 1, 1, 0),    (1, 1, 1, 0),    (1, 1, 1, 0)),    # Table 3: its columns
    "affine":       (bool,   False,           False,           False),           # released code
    "fc_std":       (number, 0.0,             0.0,             0.0),             # supp. A
    "objective":    (str,    "symmetric",     "symmetric",     "symmetric"),     # Sec. 3
    "eta":          (str,    "current",       "current",       "current"),       # Sec. 5
    "k":            (int,    1,               1,               1),               # Sec. 5.2; 0: an epoch
    "m":            (number, 0.8,             0.8,             0.8),             # Sec. 5.2
    "epochs":       (int,    100,             800,             6),               # Sec. 3; supp. D
    "batch":        (int,    512,             512,             32),              # Sec. 3; supp. D
    "base_lr":      (number, 0.05,            0.03,            2.0),             # Sec. 3; supp. D
    "momentum":     (number, 0.9,             0.9,             0.9),             # Sec. 3
    "weight_decay": (number, 1e-4,            5e-4,            5e-4),            # Sec. 3; supp. D
    "warmup":       (int,    0,               0,               1),               # Sec. 3 (10 in some rows)
    "pred_lr":      (str,    "constant",      "constant",      "constant"),      # Table 1 (c)
    "size":         (int,    224,             32,              32),              # supp. A; supp. D
    "area":         (PAIR,   (0.2, 1.0),      (0.2, 1.0),      (0.3, 1.0)),      # supp. A
    "aspect":       (PAIR,   ASPECT,          ASPECT,          ASPECT),          # PyTorch's
    "jitter":       (number, 0.8,             0.8,             0.8),             # supp. A
    "strength":     (FOUR,   JITTER,          JITTER,          STRONG_JITTER),   # supp. A
    "gray":         (number, 0.2,             0.2,             0.3),             # supp. A
    "blur":         (number, 0.5,             0.0,             0.0),             # released code; supp. D
    "sigma":        (PAIR,   (0.1, 2.0),      (0.1, 2.0),      (0.1, 2.0)),      # supp. A
    "flip":         (number, 0.5,             0.5,             0.5),             # supp. A
    "vflip":        (number, 0.0,             0.0,             0.0),             # -
    "mean":         (THREE,  IMAGENET_MEAN,   CIFAR_MEAN,      IMAGENET_MEAN),   # released code
    "std":          (THREE,  IMAGENET_STD,    CIFAR_STD,       IMAGENET_STD),    # released code
    "centre":       (number, 224 / 256,       1.0,             1.0),             # released code (test view)
    "knn_every":    (int,    10,              5,               3),               # -
}
# Images of each recipe's own data; and how many steps a small data set needs at least (results/own-data.md).
OWN_IMAGES = {"imagenet": 1_281_167, "cifar10": 50_000, "shapes": 12_000}
FEW_STEPS = 4_000

CHOICES = {
    "arch": tuple(resnet.ARCHS),
    "predictor": ("mlp", "fixed", "none"),
    "objective": tuple(OBJECTIVES),
    "eta": ("current", "alternate", "average"),
    "pred_lr": ("constant", "cosine"),
}

# A row of the paper each: what changes against the recipe, and what the paper measured (linear top-1 on
# ImageNet, if no more is said). The values are those for ImageNet. Smaller recipes scale some of them down;
# see SCALED_BY.
DECAYED = {"pred_lr": "cosine"}
WARMUP = {"warmup": 10}
EXPERIMENTS = {
    "simsiam":                  ({},                                        "68.1; on CIFAR-10 91.8"),
    "fig2-with-stopgrad":       ({**DECAYED},                                      "67.7 +- 0.1, std near "
                                                                                   "1/sqrt(d)"),
    "fig2-without-stopgrad":    ({**DECAYED, "objective": "without-stopgrad"},     "0.1, loss to -1, std "
                                                                                   "to 0"),
    "table1-baseline":          ({**DECAYED},                               "67.7"),
    "table1-a-no-predictor":    ({**DECAYED, "predictor": "none"},          "0.1: collapses"),
    "table1-b-fixed-predictor": ({**DECAYED, "predictor": "fixed"},         "1.5: does not converge"),
    "table1-c-constant-lr":     ({"pred_lr": "constant"},                   "68.1"),
    "table2-batch-64":          ({"batch": 64},                             "66.1"),
    "table2-batch-128":         ({"batch": 128},                            "67.3"),
    "table2-batch-256":         ({"batch": 256},                            "68.1"),
    "table2-batch-512":         ({"batch": 512},                            "68.1"),
    "table2-batch-1024":        ({"batch": 1024, **WARMUP},                 "68.0"),
    "table2-batch-2048":        ({"batch": 2048, **WARMUP},                 "67.9"),
    "table2-batch-4096":        ({"batch": 4096, **WARMUP},                 "64.0"),
    "table3-a-no-bn":           ({"bn": (0, 0, 0, 0), **WARMUP},            "34.6"),
    "table3-b-hidden-bn":       ({"bn": (1, 0, 1, 0)},                      "67.4"),
    "table3-c-default":         ({"bn": (1, 1, 1, 0)},                      "68.1"),
    "table3-d-all-bn":          ({"bn": (1, 1, 1, 1)},                             "unstable, loss "
                                                                                   "oscillates"),
    "sec3-affine-output-bn":    ({"affine": True},                          "68.1 (68.2 without)"),
    "sec42-asymmetric-no-h":    ({"objective": "asymmetric", "predictor": "none"},"fails"),
    "sec45-cross-entropy":      ({"objective": "cross-entropy"},            "63.2"),
    "sec46-asymmetric":         ({"objective": "asymmetric"},               "64.8"),
    "sec46-asymmetric-2x":      ({"objective": "asymmetric-2x"},            "67.3"),
    "sec52-1-step":             ({"eta": "alternate", "k": 1},              "68.1"),
    "sec52-10-step":            ({"eta": "alternate", "k": 10},             "68.7"),
    "sec52-100-step":           ({"eta": "alternate", "k": 100},            "68.9"),
    "sec52-1-epoch":            ({"eta": "alternate", "k": 0},              "67.0"),
    "sec52-moving-average":     ({"eta": "average", "m": 0.8, "predictor": "none"}, "55.0 (0.1 without the "
                                                                                    "average)"),
    "suppA-fc-std-0.01":        ({"fc_std": 0.01},                          "may not converge"),
    "suppB-dim-256":            ({"dim": 256, "pred_dim": 64},              "65.3"),
    "suppB-dim-512":            ({"dim": 512, "pred_dim": 128},             "67.2"),
    "suppB-dim-1024":           ({"dim": 1024, "pred_dim": 256},            "67.5"),
    "suppB-dim-2048":           ({"dim": 2048, "pred_dim": 512},            "68.1"),
    "suppB-hidden-d":           ({"pred_dim": 2048},                        "less stable, can fail"),
    "table4-100-epochs":        ({"batch": 256, "epochs": 100},             "68.1"),
    "table4-200-epochs":        ({"batch": 256, "epochs": 200},             "70.0"),
    "table4-400-epochs":        ({"batch": 256, "epochs": 400},             "70.8"),
    "table4-800-epochs":        ({"batch": 256, "epochs": 800},             "71.3"),
    "table5-base":              ({"batch": 256, "epochs": 200},             "its transfer: the base"),
    "table5-recipe":            ({"batch": 256, "epochs": 200, "base_lr": 0.5, "weight_decay": 1e-5},
                                 "better than the base recipe"),
}
# Where a recipe's value is smaller than ImageNet's, these settings of an experiment shrink in the same
# proportion. Warm-up shrinks with the epochs. All others stay as they are: lr, weight decay, and k, the
# steps of an inner loop.
SCALED_BY = {"batch": "batch", "dim": "dim", "pred_dim": "pred_dim", "epochs": "epochs", "warmup": "epochs"}


def recipe(name, table=SETTINGS):
    """The settings of a recipe, from a table such as SETTINGS: {setting: value}"""
    column = 1 + RECIPES.index(name)
    return {setting: row[column] for setting, row in table.items()}


def recipe_for(data, train, name=None, table=SETTINGS):
    """The settings of the recipe of this name, or else of the one that suits the data, as given and as
    opened."""
    small = train.pixels is not None
    if name is None and data is None:
        name = "shapes"
    elif name is None:
        name = "cifar10" if small else "imagenet"
    settings = {"recipe": name, **recipe(name, table)}
    if small and data is not None and name == "cifar10":
        settings["size"] = max(train.pixels.shape[2:])  # small images are trained on at their own size
    return settings


def experiment_settings(method, experiment, settings):
    """What a row of a method's experiments changes, scaled to a recipe's settings: {setting: value}"""
    imagenet = recipe("imagenet", method.SETTINGS)
    row, _ = method.EXPERIMENTS[experiment]
    if settings["recipe"] == "imagenet":
        row = row | method.ON_IMAGENET.get(experiment, {})
    changes = {}
    for name, value in row.items():
        if name in SCALED_BY:
            measure = SCALED_BY[name]
            scale = settings[measure] / imagenet[measure]
            if scale < 1:
                value = max(1, round(scale * value))
        changes[name] = value
    return changes


def settings_for(args, train, world):
    """The settings of a run: recipe, then experiment, then the options given. Raises Refused for impossible
    ones."""
    method = args.method
    settings = recipe_for(args.data, train, args.recipe, method.SETTINGS)
    settings |= experiment_settings(method, args.experiment, settings)
    settings |= given_settings(args)
    if args.warmup is None:  # a run that is shorter than its warm-up would be nothing else
        settings["warmup"] = min(settings["warmup"], settings["epochs"] - 1)
    settings["experiment"] = args.experiment
    settings["init"] = args.init
    settings["seed"] = args.seed
    settings["data"] = args.data
    settings["images"] = len(train)
    settings["range"] = train.value_range
    settings["device"] = args.device
    settings["amp"] = bf16_pays(args.device, settings["width"]) if args.amp is None else args.amp
    settings["compile"] = args.compile
    settings["world"] = world
    settings["workers"] = args.workers
    settings["save_minutes"] = args.save_minutes
    settings["keep_every"] = args.keep_every
    check_limits(settings)
    check_together(settings)
    method.check(settings)
    return settings


def given_settings(args):
    """The settings that the command line names: {setting: value}"""
    given = {}
    for name in args.method.SETTINGS:
        value = getattr(args, name)
        if value is not None:
            given[name] = tuple(value) if isinstance(value, list) else value
    return given


def check_together(s):
    """Raise Refused for settings that are good each by itself, but not together."""
    check_batch(s)
    if s["batch"] < 2:
        raise Refused("--batch 1: BN needs at least 2 images")
    for name in ("area", "aspect", "sigma"):
        low, high = s[name]
        if low > high:
            raise Refused(f"--{name} {s[name]}: the lower bound comes first")
    if s["strength"][3] > 0.5:
        raise Refused(f"--strength {s['strength']}: the last, hue, at most 0.5: half a turn either way")
    if s.get("affine") and not s["bn"][1]:
        raise Refused(f"--affine: is of the projection's output BN, which --bn {s['bn']} has not")
    if s["warmup"] >= s["epochs"]:
        raise Refused(f"--warmup {s['warmup']}: less than --epochs {s['epochs']}")


# --- 9. The program -------------------------------------------------------------------------------------

class Method:
    """What a run asks of a method of pre-training. This one is SimSiam; related.py has others.

    An object belongs to one run, which calls, in this order: open, set_up, build; then, with the model on
    its device and its BN synchronised, optimizer, parts, stream; in each step what `stream` does, set_lr,
    the step itself, after_step; now and then, measure. What a method remembers from step to step has to be
    among its parts, or a resumed run would lack it.

    NAME            of the method, and of the experiment that changes nothing
    SETTINGS, CHOICES, EXPERIMENTS      its tables, as in section 8
    ON_IMAGENET     {experiment: {setting: value}}: what an experiment changes besides, in ImageNet's recipe
    views           of an image, that a step takes
    minimum         of the loss, or a bound below it; shown beside the loss
    REMEDY          what to try against a collapse, beside more warm-up and a smaller lr
    MEASURED        {key of the log: how the screen shows it}, of what `measure` finds
    """
    NAME = "simsiam"
    SETTINGS = SETTINGS
    CHOICES = CHOICES
    EXPERIMENTS = EXPERIMENTS
    ON_IMAGENET = {}
    REMEDY = "--pred-dim a quarter of --dim"
    MEASURED = {}
    open = staticmethod(open_data)

    def __init__(self, s, data=None):
        """s: the settings of the run. data: what it trains on; for SimSiam the images are enough, which come
        in a stream"""
        self.s = s
        self.data = data
        self.steps_per_epoch = s["images"] // s["batch"]
        self.total_steps = s["epochs"] * self.steps_per_epoch
        self.warmup_steps = s["warmup"] * self.steps_per_epoch
        self.model = None  # until it is built
        self.set_up()

    @staticmethod
    def check(s):
        """Raise Refused for settings of the method that don't go together."""
        if s["eta"] != "current" and s["objective"] != "symmetric":
            raise Refused(f"--eta {s['eta']}: goes with --objective symmetric")

    def set_up(self):
        """Whatever the settings alone decide: here the loss, its views and its minimum, and the steps of an
        inner loop of Sec. 5.2."""
        self.loss, self.views, self.minimum = OBJECTIVES[self.s["objective"]]
        self.inner_steps = self.s["k"] or self.steps_per_epoch

    def build(self):
        """Make the model that the settings describe. Its encoder is a ResNet whose fc is the projection
        MLP."""
        s = self.s
        self.model = SimSiam(
            arch=s["arch"], width=s["width"], cifar_stem=s["cifar_stem"],
            proj_layers=s["proj_layers"], proj_hidden=s["proj_hidden"], dim=s["dim"],
            pred_dim=s["pred_dim"], predictor=s["predictor"],
            bn=s["bn"], affine=s["affine"], fc_std=s.get("fc_std", 0.0))

    def parts(self, device):
        """What is kept in a checkpoint beside the model and the optimiser: {name: with a state_dict}"""
        if self.s["eta"] == "alternate":
            return {"theta": copy.deepcopy(self.model)}
        if self.s["eta"] == "average":
            return {"eta": PerImageVectors(self.s["images"], self.s["dim"], device)}
        return {}

    def optimizer(self):
        """The optimiser. Its first group is the encoder's."""
        return sgd(self.model, self.s["momentum"], self.s["weight_decay"])

    def set_lr(self, optimizer, step):
        """Set the lr, before each step."""
        lr = initial_lr(self.s["base_lr"], self.s["batch"])
        set_lr(optimizer, lr, step, self.total_steps, self.warmup_steps, self.s["pred_lr"])

    def stream(self, load, batches, parts, step, autocast):
        """Yields (views, objective) for each step.

        load        batches of (epoch, indices) -> yields (indices, [x1, x2])
        batches     those from `step` on
        parts       those of the checkpoint
        """
        s = self.s
        if s["eta"] == "alternate":
            k = self.inner_steps
            views = load(twice(batches, k, step))
            return alternate(views, self.model, parts["theta"], k, step, self.total_steps, autocast)
        if s["eta"] == "average":
            return average(load(batches), parts["eta"], s["m"])
        return plain(load(batches), self.loss)

    def after_step(self, step):
        """What is to be done after each step."""

    def measure(self, encoder, job, autocast):
        """What is measured beside kNN and rank, and as often: {key of MEASURED: value}. The encoder is in
        eval mode."""
        return {}

    def collapsed(self, loss, std_sqrt_d):
        """Whether an epoch of this mean loss and std x sqrt(d) shows a collapse."""
        return collapsed(loss - self.minimum, std_sqrt_d, self.s["batch"])

    def rows(self):
        """What the start block says of the method alone: {heading: text}"""
        return {"eta": describe_eta(self)}


def parse(argv=None):
    """The command line -> options. `--experiment list` prints the table and ends."""
    parser = options(
        "simsiam.py", "SimSiam pre-training. The recipe's options default to the paper's settings for the "
                      "data at hand.", Method)
    args = parser.parse_args(argv)
    if args.experiment == "list":
        list_experiments([Method])
        sys.exit()
    return args


def options(script, description, method):
    """The parser of a program that trains this method (a class)."""
    parser = new_parser(
        script, description, data="drawn shapes",
        out="runs/<name of the data>, and -<method> or -<experiment>",
        amp="on cuda, and on a CPU with instructions for bf16 from --width 1/4 up")
    parser.set_defaults(method=method)
    parser.add_argument("--recipe", choices=RECIPES,
                        help="default: shapes without DATA, cifar10 for images of one size up to "
                             f"{SMALL} pixels a side, else imagenet")
    parser.add_argument("--experiment", choices=(*method.EXPERIMENTS, "list"), default=method.NAME,
                        metavar="NAME",
                        help="a row of the paper; list shows them all (default: %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                        help="fuse the operations of the network and of the colour changes with "
                             "torch.compile, which takes a minute or more at the start and a C++ compiler "
                             "on a CPU (default: no)")
    parser.add_argument("--init", metavar="FILE",
                        help="start from the weights in a file: of a whole model, or of a backbone alone, "
                             "in any layout that lineval.py reads")
    add_prefix(parser, "--init")
    group = parser.add_argument_group("recipe (defaults: imagenet | cifar10 | shapes)")
    for name, (kind, *defaults) in method.SETTINGS.items():
        add_setting(group, name, kind, defaults, method.CHOICES.get(name))
    return parser


def list_experiments(methods):
    """Print the table of these methods' experiments."""
    rows = [(method, name, *row) for method in methods for name, row in method.EXPERIMENTS.items()]
    longest = max(len(name) for _, name, *_ in rows)
    print(f"{'experiment':{longest}}  {'the paper, on ImageNet':31}  what changes there")
    for method, name, changes, paper in rows:
        changes = changes | method.ON_IMAGENET.get(name, {})
        shown = ", ".join(f"{key} {value}" for key, value in changes.items())
        print(f"{name:{longest}}  {paper:31}  {shown}")


class Job(NamedTuple):
    """What a run knows before there is a model."""
    settings: dict
    method: Method
    device: torch.device
    train: object           # Source
    val: object             # Source, or None
    rows: dict              # what is said of the data: {heading: text}
    policy: augment.Policy
    out: str                # the run's folder
    resuming: bool
    watches_knn: bool       # there are labels and validation images, and the settings ask for kNN

    def test_views(self, source, batches):
        """(source, batches) -> yields (indices, test views)"""
        return augment.load_centres(source, self.policy, batches, self.device, self.settings["workers"])

    def knn(self, features, autocast=contextlib.nullcontext()):
        """kNN on all good validation images, against all good training images. features: images -> (N, D)

        Returns top-1 in percent, how many were judged, and the features of up to RANKED training images.
        """
        # A bad image's stand-in has another label: it neither votes nor is judged.
        (bank, voting), (queries, judged) = (
            good_ones(source, extract(features, self.test_views, source, self.device, autocast))
            for source in (self.train, self.val))
        labels = to_device(self.train.labels[voting], self.device)
        truth = to_device(self.val.labels[judged], self.device)
        some = bank[to_device(permutation(0, 0, len(bank))[:RANKED], self.device)]
        top1, _ = knn_accuracy(bank, labels, queries, truth, neighbours(len(bank), len(self.train.classes)))
        return top1, len(judged), some

    def watch(self, features, autocast):
        """What the features of test views show of a network: {"knn": top-1, "knn_images": of so many, "rank":
        of up to RANKED training images}"""
        if self.watches_knn:
            top1, judged, some = self.knn(features, autocast)
            return {"knn": top1, "knn_images": judged, "rank": effective_rank(some).item()}
        # The rank needs no labels.
        chosen = permutation(0, 0, len(self.train))[:RANKED]
        v = extract(features, self.test_views, self.train, self.device, autocast, chosen)
        v, _ = good_ones(self.train, v, chosen)
        return {"rank": effective_rank(v).item()}


def prepare(args):
    """Join the processes, open the data, settle the settings -> Job. Raises Refused; nothing is written
    yet."""
    device, _, world = join_world(torch.device(args.device))
    name = folder_name(args.data)
    if args.experiment != "simsiam":
        name = f"{name}-{args.experiment}"
    out = args.out or os.path.join("runs", name)
    data = args.method.open(args.data, args.range, keep=os.path.dirname(os.path.normpath(out)) or ".")
    train, val, _ = data
    s = settings_for(args, train, world)
    s["content"] = train.fingerprint()
    method = args.method(s, data)
    same = s["content"], val.fingerprint() if val else 0, s.get("captions", 0)
    check_same_images(same, args.data, device)
    check_same_precision(s["amp"], device)
    return Job(
        settings=s,
        method=method,
        device=device,
        train=train,
        val=val,
        rows=data.rows(),
        policy=augment.Policy(**{name: s[name] for name in augment.Policy._fields}),
        out=out,
        resuming=holds_run(out, CHECKPOINTS, args.resume, device),
        watches_knn=s["knn_every"] > 0 and val is not None and len(val) >= world)


def pretrain(args):
    """A whole run: from the command line to backbone.pth. Raises Refused, and Stopped after a signal."""
    # 1. Data and settings, model and optimiser, and how far they are
    job = prepare(args)
    s, method = job.settings, job.method
    torch.manual_seed(s["seed"])
    method.build()
    model = method.model
    if args.init and not job.resuming:
        job = job._replace(rows=job.rows | {"init": load_init(model, s, args.prefix)})
    layout = fastest_layout(model.encoder, job.device)
    model.to(job.device, memory_format=layout)
    network = distribute(model, job.device, s["compile"])
    optimizer = method.optimizer()
    parts = {"model": model, "optimizer": optimizer, **method.parts(job.device)}
    lock(job.out, CHECKPOINTS, job.resuming, job.device)
    follow = ["amp"] if args.amp is None else []  # a run that goes on keeps its precision
    run = Run(job.out, parts, s, method.steps_per_epoch, job.resuming, job.device, args.override, follow)
    autocast = torch.autocast(job.device.type, torch.bfloat16, enabled=s["amp"])

    # 2. Say what is going to happen, on the screen and in the log
    step = run.epoch * method.steps_per_epoch + run.step
    progress = Progress(method.total_steps - step, quiet=not run.first)
    progress.line(start_block(job, given_settings(args)))
    begin(run, job, progress)

    # 3. Train
    if s["compile"]:
        network.compile()  # in place, so that the names in checkpoints stay
        augment.compile_colours()

    def load(batches):
        """Batches of (epoch, indices) -> yields (indices, [x1, x2, ...])"""
        return augment.load_views(
            job.train, job.policy, s["seed"], batches, job.device, s["workers"], method.views,
            run.waiting_for, layout)

    batches = index_batches(
        s["seed"], len(job.train), s["batch"], s["epochs"],
        run.epoch, run.step, dist.get_rank(), s["world"])
    stream = method.stream(load, batches, parts, step, autocast)
    if not run.log.epochs():
        report_untrained(run, job, model.encoder, autocast, progress)
    train(run, network, stream, optimizer,
          schedule=lambda step: method.set_lr(optimizer, step),
          autocast=autocast, progress=progress,
          after_step=method.after_step,
          after_epoch=lambda: report_epoch(run, job, model.encoder, optimizer, autocast, progress))

    # 4. The result
    finish(run, model.encoder, progress)


def load_init(model, s, prefix):
    """--init: start from the weights in a file, of a whole model or of a backbone alone -> what was taken, in
    words.

    The heads are taken where the file has all of the model's. prefix: see weights.find_resnet. Raises Refused
    where the file doesn't fit.
    """
    path = s["init"]
    state, _, settings = read_weights(path)
    found = find_resnet(state, path, prefix)
    there = {"arch": found.arch, "width": round(64 * found.width), "cifar_stem": found.cifar_stem}
    here = {"arch": s["arch"], "width": round(64 * s["width"]), "cifar_stem": s["cifar_stem"]}
    if there != here:
        shown = ", ".join(f"{key} {there[key]}, not {here[key]}" for key in here if there[key] != here[key])
        raise Refused(f"--init {path}: another network than the run's: {shown} (a width of 1 is 64); see "
                      "--arch, --width, --cifar-stem")
    around = whole_model(found, path)
    mine = model.state_dict()
    # A projector of more layers has all the names of a shorter one.
    same_encoder = ({name for name in mine if name.startswith("encoder.")}
                    == {name for name in around if name.startswith("encoder.")})
    if same_encoder and mine.keys() <= around.keys() and settings.get("captions") == s.get("captions"):
        load_strictly(model, {name: around[name] for name in mine}, f"--init {path}")
        others = [name for name in around if name not in mine]
        return f"{path}, all of it but {', '.join(name_groups(others))}" if others else f"{path}, all of it"
    backbone = {name: t for name, t in model.encoder.state_dict().items() if name.startswith("fc.")}
    load_strictly(model.encoder, backbone | found.tensors, f"--init {path}")
    return f"{path}, the backbone; the heads are new ({describe_found(found, path)})"


def begin(run, job, progress):
    """Begin the log, or go on with it; of a new run, draw some of its views."""
    if job.resuming:
        progress.line("\n".join([*run.notes, f"continuing after {run.epoch} epochs and {run.step} steps"]))
        run.begin()
        return
    knn_pixels = None
    if job.watches_knn and len(job.train) <= MOST_RAW:
        small = job
        if job.train.pixels is None:
            small = job._replace(policy=job.policy._replace(size=32))
        knn_pixels, *_ = small.knn(lambda x: x.flatten(1))
    run.begin(knn_pixels=knn_pixels)
    if run.first:
        sheet = augment.contact_sheet(job.train, job.policy, job.settings["seed"])
        save_picture(sheet, run.path("views.png"))


def finish(run, encoder, progress):
    """Write the backbone alone, under torchvision's names, and the log's last record."""
    if run.first:
        state = encoder.state_dict()
        backbone = {name: t for name, t in state.items() if not name.startswith("fc.")}
        save(backbone, run.path("backbone.pth"))
    last = run.log.epochs()[-1]
    run.log.add("end", epochs=run.epoch, knn=last["knn"], backbone="backbone.pth")
    progress.line(f"done: {run.path('backbone.pth')} (features), checkpoint.pth, log.jsonl, curves.png")


# --- What a run says of itself --------------------------------------------------------------------------

# What the log has of an epoch, null where it doesn't exist, and how the screen shows it, if at all.
MEASURED = {
    "loss": "loss {:.4f} (minimum {:.4g})",
    "std": "std x sqrt(d) {:.3f}",
    "lr": "lr {:.4g}",
    "knn": "kNN {:.2f}%",
    "knn_images": "of {}",
    "rank": "rank {:.1f}",
    "images_per_s": "{:.0f} images/s",
    "data_wait": "{:.0%} waiting for data",
    "seconds": None,
    "wall_seconds": None,
    "memory_mb": "{} MiB",
    "collapsed": None,
    "bad_images": None,
}


def report_untrained(run, job, encoder, autocast, progress):
    """Epoch 0 of the log: kNN accuracy and rank of the network as it starts."""
    watched = {}
    if job.settings["knn_every"] > 0:
        backbone = calibrated(encoder, job.test_views, job.train).eval()
        watched = job.watch(backbone.features, autocast) | job.method.measure(backbone, job, autocast)
    started = "as loaded" if job.settings["init"] else "untrained"
    report(run, job, progress, 0, f"  {started} (with BN calibrated)", **watched)


def report_epoch(run, job, encoder, optimizer, autocast, progress):
    """An epoch that is done: what was measured in it, and kNN and rank where they are due."""
    s = job.settings
    number = run.epoch + 1
    loss_mean, std_mean = run.means
    watched = {}
    if s["knn_every"] > 0 and (number % s["knn_every"] == 0 or number == s["epochs"]):
        encoder.eval()
        watched = job.watch(encoder.features, autocast) | job.method.measure(encoder, job, autocast)
        encoder.train()
    in_trouble = job.method.collapsed(loss_mean, std_mean)
    if in_trouble and not any(record["collapsed"] for record in run.log.epochs()):
        progress.line("collapsed: all outputs are (nearly) the same vector. Try, in this order: a smaller "
                      f"--base-lr; --warmup 10; a larger --batch; {job.method.REMEDY}; and look at "
                      "views.png: are the images different from each other?")
    warn_of_low_rank(run, watched.get("rank"), progress)
    sources = [source for source in (job.train, job.val) if source]
    report(run, job, progress, number, note="",
           loss=loss_mean,
           std=std_mean,
           lr=optimizer.param_groups[0]["lr"],
           **watched,
           **run.speed(),
           memory_mb=peak_memory(job.device),
           collapsed=in_trouble,
           bad_images=sum(share_bad(source, job.device) for source in sources))


def warn_of_low_rank(run, rank, progress):
    """Say it once where the rank is far below the untrained network's: a loss and a std can look healthy
    then."""
    epochs = run.log.epochs()
    bound = low_rank(epochs)
    if rank is None or bound is None:
        return
    if rank < bound and not any((record["rank"] or bound) < bound for record in epochs):
        progress.line(f"low rank: the features spread in {rank:.1f} directions, at the start in "
                      f"{epochs[0]['rank']:.1f}; below {bound:.1f} all runs that we saw had learned little, "
                      "whatever their loss and std. Try a smaller --base-lr, then --warmup 10")


def low_rank(epochs):
    """The rank below which there is an alarm, by a log's epochs; None where the untrained network's is
    unknown."""
    untrained = epochs[0]["rank"] if epochs else None
    return untrained and LOW_RANK * untrained


def report(run, job, progress, number, note, **measured):
    """A record of an epoch, in the log, on the screen, and, with each checkpoint, in the picture."""
    shows = MEASURED | job.method.MEASURED
    values = {**dict.fromkeys(shows), **measured}
    record = run.log.add("epoch", epoch=number, step=number * run.steps_per_epoch, **values)
    minimum = job.method.minimum
    if run.first and run.is_saved():
        knn_pixels = run.log.records[0].get("knn_pixels")
        draw_curves(run.path("curves.png"), run.log.epochs(), knn_pixels, minimum, low_rank(run.log.epochs()))
    line = f"epoch {number}/{job.settings['epochs']}{note}"
    for name, shown in shows.items():
        if shown and record[name] is not None:
            line += "  " + shown.format(record[name], minimum)
    progress.line(line)


def start_block(job, given):
    """The lines that a run starts with. given: the settings that the command line names."""
    s = job.settings
    lr = initial_lr(s["base_lr"], s["batch"])
    rows = {
        **job.rows,
        "recipe": ", ".join([s["recipe"], *(f"{name} {s[name]}" for name in given)]),
        "experiment": describe_experiment(job.method),
        "settings": ", ".join(f"{name} {s[name]}" for name in job.method.SETTINGS),
        "training": describe_length(job.method) + f", global batch {s['batch']}, lr {lr:.4g}",
        **warn_of_few_steps(job.method),
        "processes": f"{s['world']} x {s['batch'] // s['world']} images, BN over {s['batch']}, "
                     f"{hardware(s, job.device)}",
        "kNN": describe_knn(job),
        **job.method.rows(),
        "writes to": job.out,
    }
    lines = []
    for name, text in rows.items():
        lines += textwrap.wrap(printable(text), 108, initial_indent=f"{name:12}", subsequent_indent=" " * 12,
                               break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def own_steps(method):
    """The steps of the run's recipe on the recipe's own data."""
    own = recipe(method.s["recipe"], method.SETTINGS)
    return own["epochs"] * (OWN_IMAGES[method.s["recipe"]] // own["batch"])


def describe_length(method):
    """The steps of the run, beside those of the recipe on its own data."""
    return (f"{method.s['epochs']} epochs of {method.steps_per_epoch} steps, {method.total_steps:,} in all "
            f"(the recipe on its own data: {own_steps(method):,})")


def warn_of_few_steps(method):
    """{heading: text} where the run's steps are fewer than the recipe's own and than what was found to be too
    few; else {}"""
    if method.total_steps >= min(FEW_STEPS, own_steps(method)):
        return {}
    epochs = math.ceil(FEW_STEPS / method.steps_per_epoch)
    return {"too short": "on 1,000 to 5,000 images, 500 steps gained 1 to 3 points over the untrained "
                         "network, 1,500 gained 7 to 11, and 4,000 gained 14 to 17 (results/own-data.md); "
                         f"--epochs {epochs}, or a smaller --batch, gives {FEW_STEPS:,}"}


def describe_experiment(method):
    """The experiment, what the paper measured, and which of the row's values this recipe scales, or leaves
    as they are."""
    s = method.s
    changes, paper = method.EXPERIMENTS[s["experiment"]]
    changes = changes | method.ON_IMAGENET.get(s["experiment"], {})
    text = f"{s['experiment']} (the paper on ImageNet: {paper})"
    scaled = [f"{name} {s[name]}" for name in changes if s[name] != changes[name]]
    if scaled:
        text += f"; here {', '.join(scaled)}, not what the row says"
    kept = [name for name in ("k", "base_lr", "weight_decay") if s.get(name) == changes.get(name, "")]
    if kept and s["recipe"] != "imagenet":
        text += f"; {', '.join(kept)} as for ImageNet"
    return text


def describe_knn(job):
    """How often kNN is measured, with how many neighbours, and on what."""
    if job.settings["knn_every"] == 0:
        return "none (--knn-every 0)"
    if not job.watches_knn:
        return (f"none (needs labels, and an image of val/ for each process); the rank every "
                f"{job.settings['knn_every']} epochs")
    k = neighbours(len(job.train), len(job.train.classes))
    return (f"every {job.settings['knn_every']} epochs, k {k} (a fifth of a class, 200 at most), on "
            f"{len(job.val)} images")


def describe_eta(method):
    """What Sec. 5.2's variants keep in memory."""
    s = method.s
    if s["eta"] == "current":
        return "the current network's output"
    if s["eta"] == "alternate":
        vectors = 2 * method.inner_steps * s["batch"]
        what = f"alternate, {method.inner_steps} steps"
    else:
        vectors = s["images"]
        what = "average"
    return f"{what}, {vectors} vectors: {vectors * s['dim'] * 4 / 2 ** 20:.1f} MiB over all processes"


if __name__ == "__main__":
    run_and_leave("simsiam.py", pretrain, parse())
