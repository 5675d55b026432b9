"""SimSiam's neighbours, each written as its own algorithm (Sec. 2, 6.2, Fig. 3, Table 4), and CLIP.

    python related.py --method simclr                           no data needed: drawn shapes
    python related.py CIFAR --method mocov2                     the rest is as in simsiam.py
    torchrun --nproc-per-node 8 related.py IMAGENET --method byol
    python related.py --experiment list                         a row for each result in SimSiam's paper
    python related.py --experiment sec62-swav-predictor         a row; its name implies the method
    python related.py --method swav --help                      a method's settings

    SimCLR    SimSiam with negatives from the batch, with no predictor or stop-gradient
    MoCo v2   SimSiam with negatives from a queue and a momentum encoder, without predictor
    BYOL      SimSiam with a momentum encoder
    SwAV      SimSiam with prototypes and codes that Sinkhorn-Knopp balances, without predictor
    CLIP      images contrasted with captions only, and captions with images only

Order of this file: 1. a step of each method; 2. their losses, and what else the steps use; 3. the methods,
as a run needs them; 4. their settings and experiments. Loop, views, heads, checkpoints and monitors are
simsiam.py's. On CIFAR-10 and shapes, all but CLIP use SimSiam's projection MLP, and its settings unless
the tables in 4 say otherwise. lineval.py reads their checkpoints like others.

Sources: SimCLR, Chen et al. 2020 (arXiv 2002.05709); MoCo v2, Chen et al. 2020 (2003.04297); BYOL, Grill et
al. 2020 (2006.07733); SwAV, Caron et al. 2020 (2006.09882); CLIP, Radford et al. 2021 (2103.00020); and the
code their authors released. "Sec.", "Table" and "supp." refer to SimSiam's paper. "OURS": no source specifies
it, so we chose. Differences from a source are marked as departures.

The symbols are simsiam.py's: N images in this process's share of a batch, B in the whole batch; z1, z2 (N, d)
the encoder's outputs for two views, p1, p2 the predictor's. K: rows of a queue, or prototypes.
"""
import argparse
import collections
import copy
import functools
import math
import sys

# harness comes before torch, because it sets how torch's threads wait.
from harness.common.draws import permutation
from harness.common.errors import Refused
from harness.common.machine import to_device
from harness.data.captions import Vocabulary, bag, hash_of
from harness.data.opening import open_captions, open_data
from harness.evaluation.features import extract
from harness.training.batchnorm import AllSum
from harness.training.ends import run_and_leave
from harness.training.method import Method
from harness.training.options import number
from harness.training.processes import everyones
from harness.training.recipes import RECIPES, list_experiments, options

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import resnet
from lineval import LARS
from simsiam import CHOICES, HELP, IDLE, OF_THE_MODEL, SETTINGS, SimSiam, as_float32, collapsed, cosine
from simsiam import initial_lr, l2_normalize, loss, prediction_mlp, pretrain, stopgrad, update, warmup

# --- 1. A step of each method ----------------------------------------------------------------------------
# In the form of simsiam.train_step: the forward passes, in the run's precision; the loss, over the global
# batch; the optimiser's update; then whatever follows it. Each returns the loss, and the outputs whose std is
# monitored. An argument `encoder` is the network's own encoder, and `target` its slow copy.


def simclr(network, optimizer, autocast, temperature, x1, x2):
    """SimCLR: each output must find the other view of its image among all outputs of the batch."""
    with autocast:
        _, (z1, z2) = network(x1, x2)
    L = nt_xent(z1, z2, temperature, **over_processes())
    update(optimizer, L)
    return L, (z1, z2)


def simclr_with_predictor(network, optimizer, autocast, temperature, as_target, x1, x2):
    """Sec. 6.2's rows, which the paper describes only in words; OURS: Eq. (4) with NT-Xent in place of D.

    NT-Xent is symmetric: p and z are both anchors.
    as_target   stopgrad, or identity: whether z is a constant
    """
    with autocast:
        (p1, p2), (z1, z2) = network(x1, x2)
    target1, target2 = as_target(z1), as_target(z2)
    L = (nt_xent(p1, target2, temperature, **over_processes()) / 2
         + nt_xent(p2, target1, temperature, **over_processes()) / 2)
    update(optimizer, L)
    return L, (z1, z2)


def mocov2(encoder, target, queue, tau, network, optimizer, autocast, temperature, step, x1, x2):
    """MoCo v2: each query must tell its key (by the target encoder) from the keys of earlier steps.

    The authors move the target before the forward passes; moving it after the update is the same. The keys
    enter the queue only after both directions: otherwise the second direction's queries would find keys of
    their own views among the negatives.

    DEPARTURE: half the sum of both directions, as in SimSiam. The authors' example for CIFAR-10 has the sum:
    at the same lr, the sum's steps are twice as long.
    """
    with autocast:
        k1, k2 = target(x1), target(x2)       # keys; the target's parameters take no gradient
        _, (z1, z2) = network(x1, x2)         # queries
    L = info_nce(z1, k2, queue.rows, temperature) / 2 + info_nce(z2, k1, queue.rows, temperature) / 2
    update(optimizer, L)
    momentum_update(target, encoder, tau)
    enqueue(queue, step, k1, k2)
    return L, (z1, z2)


def byol(encoder, target, tau, network, optimizer, autocast, x1, x2):
    """BYOL: SimSiam's loss, with z from the target encoder, which follows the encoder.

    L is the sum over both directions of |p/|p| - z'/|z'||^2 = 2 + 2 D(p, z').
    """
    with autocast:
        target1, target2 = target(x1), target(x2)   # its parameters take no gradient
        (p1, p2), (z1, z2) = network(x1, x2)
    L = 4 + 4 * loss(p1, p2, target1, target2)                        # BYOL Eq. (2): of the target's z
    update(optimizer, L)
    momentum_update(target, encoder, tau)
    return L, (z1, z2)


def swav(prototypes, codes, is_frozen, network, optimizer, autocast, temperature, x1, x2):
    """SwAV: each view's scores must predict the other view's codes.

    codes       Sinkhorn-Knopp: scores (N, K) -> (N, K), without gradient except in a row of Sec. 6.2
    is_frozen   whether the prototypes are frozen in this step
    L is the mean of both directions, as in the authors' code; SwAV's Eq. (1) has the sum.
    """
    with autocast:
        (p1, p2), (z1, z2) = network(x1, x2)  # p: the scores of z, or of h(z)
    q1, q2 = codes(prototypes(z1)), codes(prototypes(z2))  # from z, even where p comes from h(z)
    t = temperature
    L = swapped(p1, q2, t) / 2 + swapped(p2, q1, t) / 2               # SwAV Eq. (1): swapped prediction
    optimizer.zero_grad()
    L.backward()
    if is_frozen:
        prototypes.weight.grad = None         # so the optimiser skips them
    optimizer.step()
    return L, (z1, z2)


def clip(log_scale, network, optimizer, autocast, x, words):
    """CLIP: each image must find its caption among the batch's, and each caption its image.

    words: the captions as word numbers, one row each
    """
    with autocast:
        image, text = network(x, words)
    L = clip_loss(image, text, log_scale, **over_processes())
    update(optimizer, L)
    with torch.no_grad():
        log_scale.clamp_(0.0, math.log(100))  # the scale stays between 1 and 100
    return L, (image, text)


# --- 2. Their losses, and what else the steps use --------------------------------------------------------

def identity(t):
    """t itself: the sum over the processes if there is only one."""
    return t


def over_processes():
    """Arguments for the losses below, over the global batch: a sum over the processes, with gradient."""
    return {"all_sum": AllSum.apply, "rank": dist.get_rank(), "world": dist.get_world_size()}


@torch.no_grad()
def momentum_update(target, online, tau):
    """Move the target network's parameters towards the online network's; each keeps a share tau of itself.

    Parameters only: the target's BN statistics come from its own forward passes. So use the target for
    training, in train mode, and evaluate the online network.
    """
    for xi, theta in zip(target.parameters(), online.parameters(), strict=True):
        xi.copy_(tau * xi + (1 - tau) * theta)                        # BYOL Eq. (1): momentum encoder


def nt_xent(z1, z2, temperature, all_sum=identity, rank=0, world=1):
    """NT-Xent: each of the 2B outputs must find the other view of its image among all outputs but itself.

    (N, d), (N, d) -> scalar, the mean over the outputs. With all_sum (batchnorm.AllSum), this process's
    outputs are compared with those of all `world` processes, of which it is number `rank`. The loss is the
    mean over its own. Its gradient, averaged over the processes, is that of one process.
    """
    n = len(z1)
    z1 = l2_normalize(z1)                                             # (N, d)
    z2 = l2_normalize(z2)                                             # (N, d)
    # Each view is gathered separately: gathering [z1; z2] would put the outputs in another order.
    every = [everyones(z, all_sum, rank, world) for z in (z1, z2)]
    logits = torch.cat([z1, z2]) @ torch.cat(every).T / temperature
    # The columns of z1 itself, and of z2.
    own1 = torch.arange(n, device=z1.device) + rank * n               # (N,)
    own2 = own1 + world * n                                           # (N,)
    own = torch.cat([own1, own2]).view(-1, 1)                         # (2 * N, 1)
    other = torch.cat([own2, own1]).view(-1, 1)                       # (2 * N, 1)
    logits.scatter_(1, own, -math.inf)
    positive = logits.gather(1, other).flatten()                      # (2 * N,)
    return (logits.logsumexp(dim=1) - positive).mean()                # SimCLR Eq. (1): NT-Xent


def info_nce(q, k, queue, temperature):
    """InfoNCE: each query must find its key k among k and the queue.

    q, k (N, d), queue (K, d) of length 1 -> scalar, the mean over the queries. No gradient flows into keys.
    """
    q = l2_normalize(q)                                               # (N, d)
    k = l2_normalize(stopgrad(k))                                     # (N, d)
    positive = (q * k).sum(dim=1, keepdim=True)                       # (N, 1)
    logits = torch.cat([positive, q @ queue.T], dim=1) / temperature
    return (logits.logsumexp(dim=1) - logits[:, 0]).mean()            # MoCo v2 Eq. (1): InfoNCE


class Queue(nn.Module):
    """The last K keys, of length 1: `rows` (K, d); at first they are random."""

    def __init__(self, K, d, like):
        """like: a tensor with the device and type for the rows"""
        super().__init__()
        # Drawn on the CPU, so all processes have the same.
        rows = l2_normalize(torch.randn(K, d))                        # (K, d)
        self.register_buffer("rows", rows.to(like))

    def put(self, keys, count):
        """Replace the oldest rows by keys (B, d); `count` were put before, and B divides K."""
        start = count % len(self.rows)
        self.rows[start:start + len(keys)] = keys


def enqueue(queue, step, *keys):
    """Replace the oldest keys in the queue by those of all processes, (N, d) for each view."""
    for view, k in enumerate(keys):
        everybodys = everyones(l2_normalize(k), **over_processes())
        queue.put(everybodys, (len(keys) * step + view) * len(everybodys))


class Prototypes(nn.Linear):
    """Scores: the cosines of z (N, d) with K prototypes -> (N, K).

    DEPARTURE: the prototypes are normalised here, with gradient, as in SimSiam's footnote 7; SwAV
    normalises the stored ones at each step. Footnote 8: the same accuracy.
    """

    def __init__(self, d, K):
        super().__init__(d, K, bias=False)

    def forward(self, z):
        with torch.autocast(z.device.type, enabled=False):  # bf16 would cost a score its third digit
            return l2_normalize(z) @ l2_normalize(self.weight).T


def balance(scores, eps, iterations, all_sum=identity, rank=0, world=1):
    """Sinkhorn-Knopp: codes that spread the batch evenly over the prototypes.

    (N, K) -> (N, K), each row sums to 1. exp(scores / eps) gets a factor u for each prototype and a factor v
    for each image, in turns: u makes the prototypes' shares equal, v the images' sums 1. Here the images are
    the rows; in the paper they are the columns, and all is divided by B. In logarithms, because exp(1 / eps)
    overflows half precision, and for small eps single precision, too. all_sum, rank and world as in
    nt_xent: a prototype's share is that of the global batch.
    """
    log_e = as_float32(scores) / eps                                  # (N, K)
    log_v = log_e.new_zeros(len(log_e), 1)                            # (N, 1)
    for _ in range(iterations):
        here = (log_e + log_v).logsumexp(dim=0, keepdim=True)         # (1, K)
        log_u = -everyones(here, all_sum, rank, world).logsumexp(dim=0)   # (K,)
        log_v = -(log_e + log_u).logsumexp(dim=1, keepdim=True)       # (N, 1)
    return (log_u + log_e + log_v).exp()                              # SwAV Eq. (5): scaled both ways


sinkhorn = torch.no_grad()(balance)  # as a target; `balance` itself has a gradient, for a row of Sec. 6.2


def swapped(scores, q, temperature):
    """Cross-entropy of the softmax of scores (N, K) and codes q (N, K), the mean over the images."""
    log_p = (as_float32(scores) / temperature).log_softmax(dim=1)     # (N, K)
    return -(q * log_p).sum(dim=1).mean()                             # SwAV Eq. (2): cross-entropy


def clip_loss(image, text, log_scale, all_sum=identity, rank=0, world=1):
    """CLIP's loss: each image is to find its caption among all, and each caption its image.

    (N, d), (N, d), scalar -> scalar. It normalises both. log_scale: the logarithm of 1 / temperature.
    all_sum, rank and world as in nt_xent.
    """
    image = l2_normalize(image)                                       # (N, d)
    text = l2_normalize(text)                                         # (N, d)
    images = everyones(image, all_sum, rank, world)                   # (B, d)
    texts = everyones(text, all_sum, rank, world)                     # (B, d)
    scale = log_scale.exp()
    own = torch.arange(len(image), device=image.device) + rank * len(image)   # (N,)
    of_images = F.cross_entropy(scale * image @ texts.T, own)
    of_texts = F.cross_entropy(scale * text @ images.T, own)
    return (of_images + of_texts) / 2                                 # CLIP Fig. 3: both directions


class ImageAndText(nn.Module):
    """An image and a text encoder, each with a linear projection to d, and the logarithm of the scale.

    The first is a ResNet, the second the mean of a caption's word embeddings. A bag of words is one of the
    two forms that CLIP's authors used. It ignores the words' order.
    """

    def __init__(self, encoder, dim, words, words_width, scale):
        super().__init__()
        self.encoder = encoder
        self.encoder.fc = nn.Linear(encoder.num_features, dim, bias=False)
        self.words = nn.EmbeddingBag(words + 1, words_width, mode="mean", padding_idx=0)
        self.project = nn.Linear(words_width, dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def text(self, numbers):
        """Captions as numbers of words (N, L) -> (N, d)"""
        return self.project(self.words(numbers))

    def forward(self, x, numbers):
        """Images (N, 3, S, S) and their captions (N, L) -> image, text, (N, d) each"""
        return self.encoder(x), self.text(numbers)


# --- 3. The methods, as a run needs them -----------------------------------------------------------------

def start_last_bn(encoder, value):
    """Start the scale of each residual block's last BN at this value."""
    for module in encoder.modules():
        if isinstance(module, resnet.Bottleneck):
            nn.init.constant_(module.bn3.weight, value)
        if isinstance(module, resnet.BasicBlock):
            nn.init.constant_(module.bn2.weight, value)


def adamw(groups, lr, momentum):
    """AdamW as in CLIP."""
    return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999), eps=1e-8)


class JointLARS(LARS):
    """LARS as in SimCLR and BYOL: local lr = trust |w| / |gradient + wd w|.

    Groups of parameters with adapted=False are trained by plain SGD.
    lr_inside   the lr scales what goes into the momentum (SimCLR), not the step (BYOL): the same while the
                lr is constant
    """

    def __init__(self, groups, lr, momentum, lr_inside=False):
        super().__init__(groups, lr, momentum)
        self.lr_inside = lr_inside

    def update(self, w, lr, momentum, weight_decay, adapted=True, **others):
        gradient = w.grad + weight_decay * w
        if adapted:
            norm = w.norm()
            grad_norm = gradient.norm()
            scaled = self.trust * norm / grad_norm * gradient
            gradient = torch.where((norm > 0) & (grad_norm > 0), scaled, gradient)
        if self.lr_inside:
            gradient = lr * gradient
            lr = 1
        self.momentum_step(w, gradient, lr, momentum)


# {optimizer: (its constructor, whether BN's tensors, biases and scales are neither adapted nor decayed)}
FORMS = {
    "sgd": (functools.partial(torch.optim.SGD, fused=True), False),
    "lars-inside": (functools.partial(JointLARS, lr_inside=True), True),    # SimCLR's
    "lars-outside": (JointLARS, True),                                      # BYOL's
    "larc": (LARS, False),                                                  # SwAV's
    "adamw": (adamw, True),                                                 # CLIP's
}


class Related(Method):
    """What these methods share: an optimiser that may treat tensors differently, and its schedule.

    DEPARTURE: images are resized bilinearly, as in SimSiam's released code; the authors of SimCLR and BYOL
    resized bicubically.

    DEPARTURE: brightness is a factor, and contrast is about the image's mean, as in SimSiam; in SimCLR and
    BYOL brightness is added, and contrast is about each channel's mean.

    DEPARTURE: each view passes through the network separately, as in SimSiam; SimCLR and SwAV pass both views
    together. BN is over the whole batch; SwAV's is over groups of 8 GPUs.

    DEPARTURE: the lr is proportional to the batch, and is set at every step. MoCo v2's is set once an epoch;
    SimCLR below 4096 images is better with 0.075 x sqrt(batch), SwAV at 256 with 0.6 (--base-lr 0.6).

    DEPARTURE: a warm-up starts at 1/n of the lr, as in SimSiam; SimCLR's and BYOL's at 0, SwAV's at 0.3.
    """
    REMEDY = "views that are easier to match"
    HELP = {
        **HELP,
        "last_bn": "initial scale of each residual block's last BN",
        "optimizer": "SGD, or a form of LARS, or AdamW",
        "temperature": "divisor of the similarities",
        "stopgrad": "whether the target is a constant",
        "queue": "keys in the queue",
        "tau": "share of the target encoder kept at each step (MoCo's m)",
        "tau_rises": "whether tau rises to 1 by half a cosine",
        "pred_lr_times": "a factor on the predictor's lr",
        "lr_end": "the last lr, as a share of the first",
        "prototypes": "number of prototypes",
        "eps": "of Sinkhorn-Knopp: the larger, the softer the codes",
        "iterations": "of Sinkhorn-Knopp",
        "freeze": "epochs in which the prototypes are frozen",
        "words_width": "width of a word's embedding",
        "scale": "initial 1 / temperature",
    }
    ABLATIONS = ("predictor", "bn", "affine", "stopgrad")
    IDLE = {**IDLE, "pred_lr_times": ("predictor", "none")}
    open = staticmethod(open_data)
    lr_end = 0.0         # the last lr, as a share of the first
    pred_lr_times = 1.0  # a factor on the predictor's lr

    def __init__(self, s, data, device):
        super().__init__(s, data, device)
        self.lr = initial_lr(s["base_lr"], s["batch"])

    def build(self):
        """SimSiam's model, except that the last BN scale of each residual block may start at 1."""
        self.model = SimSiam(**{name: self.s[name] for name in OF_THE_MODEL if name in self.s})
        start_last_bn(self.model.encoder, self.s["last_bn"])
        return self.model

    def modules(self):
        """The parts of the model that the optimiser treats separately, the encoder first."""
        return {"encoder": self.model.encoder, "predictor": self.model.predictor}

    def optimizer(self):
        """One of FORMS, over two groups of each module: adapted and decayed, or left out of both."""
        s = self.s
        make, leaves_out = FORMS[s["optimizer"]]
        groups = []
        for name, module in self.modules().items():
            for left_out in (False, True):
                chosen = [w for w in module.parameters() if (leaves_out and w.dim() < 2) == left_out]
                groups.append({
                    "params": chosen, "module": name,
                    "adapted": not left_out,
                    "weight_decay": 0.0 if left_out else s["weight_decay"]})
        return make(groups, lr=0.0, momentum=s["momentum"])

    def set_lr(self, optimizer, step):
        """Warm-up and half a cosine, perhaps not down to 0; the predictor's lr may be constant."""
        fall = self.lr_end + (1 - self.lr_end) * cosine(step, self.total_steps, self.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = self.lr * warmup(step, self.warmup_steps) * fall
            if group["module"] == "predictor":
                if self.s["pred_lr"] == "constant":
                    group["lr"] = self.lr
                group["lr"] *= self.pred_lr_times

    def collapsed(self, loss, std_sqrt_d):
        """By the std alone: with negatives or codes, collapse is not at the loss's minimum.

        Behind an output BN the std can't be 0, so simsiam.collapsed has a higher bound for it.
        """
        behind_bn = self.s["bn"][1]
        return collapsed(0.0 if behind_bn else math.inf, std_sqrt_d, self.s["batch"])

    def rows(self):
        return {"method": f"{self.NAME}, {self.describe()}"}


class SimCLR(Related):
    """SimSiam + negatives - predictor - stop-gradient. The negatives are the batch's other outputs.

    DEPARTURE: pixels are standardised as in SimSiam; SimCLR's are in [0, 1].

    DEPARTURE: the loss is the mean over the 2B outputs, as in the paper; the released code has the sum of the
    two views' means. Under LARS it affects only BN and biases: their steps are half as long here. Weight
    decay is the paper's 1e-6; that code's later versions have 1e-4.

    DEPARTURE: weights start as SimSiam's do; SimCLR's code draws convolutions by their fan-in.
    """
    NAME = "simclr"

    def __init__(self, s, data, device):
        super().__init__(s, data, device)
        # Reached when the images are at the corners of a simplex, both views of an image at the same one.
        n = s["batch"]
        apart = math.exp(-n / ((n - 1) * s["temperature"]))
        self.minimum = math.log(1 + (2 * n - 2) * apart)

    def build(self):
        super().build()
        if self.s["affine"]:  # SimCLR's output BN has a scale; its offset stays 0
            self.model.encoder.fc[-1].bias.requires_grad_(False)
        return self.model

    def train_step(self, network, optimizer, step, index, views):
        s = self.s
        if s["predictor"] == "mlp" or s["stopgrad"]:
            as_target = stopgrad if s["stopgrad"] else identity
            return simclr_with_predictor(
                network, optimizer, self.autocast, s["temperature"], as_target, *views)
        return simclr(network, optimizer, self.autocast, s["temperature"], *views)

    def describe(self):
        n = self.s["batch"]
        return (f"temperature {self.s['temperature']:g}, {2 * n - 2} negatives, chance and collapse at a "
                f"loss of {math.log(2 * n - 1):.2f}")


class MomentumEncoder(Related):
    """The targets come from a second encoder, which follows the first, keeping a share `tau` at each step."""

    def parts(self):
        # The authors of BYOL start it from other random numbers, and saw no difference from a copy.
        self.target = copy.deepcopy(self.model.encoder).requires_grad_(False)
        return {"target": self.target}

    def describe(self):
        return f"momentum encoder, tau {self.s['tau']:g}"


class MoCoV2(MomentumEncoder):
    """SimSiam + negatives + momentum encoder - predictor. The negatives are keys of earlier steps.

    As MoCo v2+ in Table 4: both views are queries (supp. C).

    DEPARTURE: BN is over the whole batch, and keys aren't shuffled. In MoCo v2 BN sees the images of one GPU,
    different ones for a query and its key; otherwise the network may find the key by the batch's statistics.
    The authors' small example, with BN over eighths of a batch, lost 4 points without the shuffle (CIFAR-10,
    800 epochs); solo-learn does without both, and has 92.9% there.
    """
    NAME = "mocov2"

    def __init__(self, s, data, device):
        super().__init__(s, data, device)
        self.minimum = math.log(1 + s["queue"] * math.exp(-2 / s["temperature"]))

    @staticmethod
    def check(s):
        if s["queue"] % (2 * s["batch"]) != 0:
            keys = 2 * s["batch"]
            raise Refused(f"--queue {s['queue']} must be a multiple of {keys}, the keys of a step: twice the "
                          "batch")

    def parts(self):
        w = self.model.encoder.conv1.weight
        self.queue = Queue(self.s["queue"], self.s["dim"], like=w).to(self.device)
        return {**super().parts(), "queue": self.queue}

    def train_step(self, network, optimizer, step, index, views):
        s = self.s
        return mocov2(self.model.encoder, self.target, self.queue, s["tau"], network, optimizer,
                      self.autocast, s["temperature"], step, *views)

    def describe(self):
        s = self.s
        text = (f"{super().describe()}; a queue of {s['queue']} keys, temperature {s['temperature']:g}, "
                f"chance and collapse at a loss of {math.log(1 + s['queue']):.2f}")
        if s["queue"] > s["images"]:
            text += ("; an image's own older keys are among its negatives: a --queue below the "
                     f"{s['images']} images has fewer of them")
        return text


class BYOL(MomentumEncoder):
    """SimSiam + momentum encoder: SimSiam's loss, with z from the target encoder.

    With tau 0 the target is the online encoder: the gradients are SimSiam's, 4 times as large. (The results
    aren't: BYOL's recipe without momentum encoder needs 10 times the lr in the predictor.)

    DEPARTURE: SimSiam's blur, of probability 0.5 for both views; BYOL blurs all first views, a tenth of the
    second. Its authors found no difference (its Table 17).

    DEPARTURE: no solarisation, which BYOL applies to a fifth of second views: 72.3 instead of 72.5 (there).

    DEPARTURE: fc layers before a BN have no bias, which the BN would subtract. The last of each MLP has one;
    in BYOL it has none.
    """
    NAME = "byol"

    def __init__(self, s, data, device):
        super().__init__(s, data, device)
        self.pred_lr_times = s["pred_lr_times"]

    def tau(self, step):
        """From tau to 1 by half a cosine; steps count from 0."""
        if not self.s["tau_rises"]:
            return self.s["tau"]
        return 1 - (1 - self.s["tau"]) * cosine(step, self.total_steps, 0)

    def train_step(self, network, optimizer, step, index, views):
        return byol(self.model.encoder, self.target, self.tau(step), network, optimizer, self.autocast,
                    *views)

    def collapsed(self, loss, std_sqrt_d):
        """As in SimSiam, whose loss is a quarter of this one, less 1."""
        return collapsed(loss / 4, std_sqrt_d, self.s["batch"])

    def describe(self):
        return super().describe() + (" at the start, 1 at the end" if self.s["tau_rises"] else ", constant")


class SwAV(Related):
    """SimSiam + prototypes + Sinkhorn-Knopp on the target - predictor.

    As SwAV+ in Table 4: two views, no multi-crop. In the model the prototypes take the predictor's place:
    p is an image's scores.

    DEPARTURE: there is no queue of earlier outputs, which SwAV uses if batches are small relative to K. Use
    fewer prototypes.
    """
    NAME = "swav"
    REMEDY = "--eps 0.03; a longer --freeze; --bn 1 0 1 0, which has no BN at the projection's end"

    def __init__(self, s, data, device):
        super().__init__(s, data, device)
        self.lr_end = s["lr_end"]
        # The prototypes are frozen for at most all epochs but one.
        self.frozen_steps = min(s["freeze"], s["epochs"] - 1) * self.steps_per_epoch
        self.codes = functools.partial(
            sinkhorn if s["stopgrad"] else balance, eps=s["eps"], iterations=s["iterations"],
            **over_processes())

    def build(self):
        """In Sec. 6.2's row with a predictor, p has the scores of h(z); the codes come from those of z.

        OURS: the paper doesn't say whether h comes before or after the prototypes. After them, its outputs
        are no longer cosines; divided by the temperature they are so large that nothing is learned on
        shapes.
        """
        super().build()
        s = self.s
        h = nn.Identity()
        if s["predictor"] == "mlp":
            _, _, hidden_bn, output_bn = s["bn"]
            h = prediction_mlp(s["dim"], s["pred_dim"], hidden_bn, output_bn)
        self.prototypes = Prototypes(s["dim"], s["prototypes"])
        named = collections.OrderedDict(h=h, prototypes=self.prototypes)
        self.model.predictor = nn.Sequential(named)
        return self.model

    def modules(self):
        h, prototypes = self.model.predictor
        return {"encoder": self.model.encoder, "prototypes": prototypes, "predictor": h}

    def train_step(self, network, optimizer, step, index, views):
        return swav(self.prototypes, self.codes, step < self.frozen_steps, network, optimizer, self.autocast,
                    self.s["temperature"], *views)

    def describe(self):
        s = self.s
        text = (f"{s['prototypes']} prototypes, Sinkhorn eps {s['eps']:g}, {s['iterations']} iterations, "
                f"temperature {s['temperature']:g}, chance and collapse at a loss of "
                f"{math.log(s['prototypes']):.2f}")
        if s["prototypes"] > s["batch"]:
            text += f"; more prototypes than the batch's {s['batch']} images can be spread over evenly"
        return text


class CLIP(Related):
    """Images and captions, in CLIP's smallest form.

    Each image is pulled towards its caption and pushed away from the batch's other captions. On shapes
    every caption names the kind, so kNN, linear and zero-shot accuracy are not label-free.

    DEPARTURE: the text encoder is a bag of words. CLIP's is a Transformer; its Fig. 2 has both. Words start
    as PyTorch's embeddings do, with std 1; CLIP's with 0.02.

    DEPARTURE: the image encoder is the ResNet of the paper. CLIP's has another stem, and attention
    instead of average pooling.

    DEPARTURE: a crop is a square of at least 0.6 of the image's area, or the largest central one if none
    fits. CLIP takes the largest, anywhere.

    DEPARTURE: CLIP's lr is for a batch of 32,768, 2,000 steps of warm-up and 400 million pairs. Here it is
    for batches that fit a GPU, with an epoch of warm-up.
    """
    NAME = "clip"
    MEASURED = ("zero_shot", "image_to_text", "text_to_image")
    views = 1
    open = staticmethod(open_captions)

    def __init__(self, s, data, device):
        super().__init__(s, data, device)
        captions = data.train.captions
        self.vocabulary = Vocabulary(captions)
        self.words = self.vocabulary.numbers(captions).to(device)
        self.s["captions"] = hash_of(captions)

    def numbers(self):
        return [self.s["captions"]]

    def build(self):
        """The image encoder, and a text encoder for the words of the training captions."""
        s = self.s
        encoder = resnet.ARCHS[s["arch"]](width=s["width"], cifar_stem=s["cifar_stem"])
        start_last_bn(encoder, s["last_bn"])
        self.model = ImageAndText(encoder, s["dim"], len(self.vocabulary.words), s["words_width"], s["scale"])
        return self.model

    def modules(self):
        model = self.model
        return {"encoder": model.encoder, "words": model.words, "project": model.project,
                "scale": nn.ParameterList([model.log_scale])}

    def parts(self):
        """The words, for whoever uses the text encoder."""
        return {"vocabulary": self.vocabulary}

    def train_step(self, network, optimizer, step, index, views):
        x, = views
        words = self.words[to_device(self.shown(index), self.device)]
        return clip(self.model.log_scale, network, optimizer, self.autocast, x, words)

    def shown(self, index):
        """The images shown for these indices: for a bad file the next good one, with its own caption."""
        n, bad = len(self.data.train), self.data.train.bad
        return np.array([next(k % n for k in range(i, i + n) if k % n not in bad) for i in index.tolist()])

    @torch.no_grad()
    def measure(self, encoder, job):
        """On validation images: zero-shot top-1 by "a <class>", and retrieval at 1 both ways.

        Without a validation split, retrieval among up to 1,000 of the training images.
        """
        source = job.val or job.train
        chosen = permutation(0, 0, len(source))[:1000] if job.val is None else None
        source, v = extract(encoder, job.test_views, source, job.device, self.autocast, chosen)
        image = l2_normalize(v)
        captions = [bag(caption) for caption in source.captions]
        text = self.text_vectors([" ".join(words) for words in captions], job.device)
        found = {
            "image_to_text": share_right(image @ text.T, captions),
            "text_to_image": share_right(text @ image.T, captions),
        }
        if source.labels is not None:
            names = self.text_vectors([f"a {name}" for name in source.classes], job.device)
            right = (image @ names.T).argmax(dim=1).cpu().numpy() == source.labels
            found["zero_shot"] = 100 * right.mean()
        return found

    def text_vectors(self, texts, device):
        """Texts as unit vectors (n, d); 0 if no word of a text is known."""
        return l2_normalize(self.model.text(self.vocabulary.numbers(texts).to(device)))

    def collapsed(self, loss, std_sqrt_d):
        """By a std of 0 alone: no BN follows the projections."""
        return collapsed(math.inf, std_sqrt_d, self.s["batch"])

    def describe(self):
        s = self.s
        n = s["batch"]
        captions = self.data.train.captions
        judged = "the validation images" if self.data.val else "1,000 of the training images, at most"
        return (f"{len(self.vocabulary.words)} words, a bag of them a caption, such as '{captions[0][:80]}'; "
                f"{len(set(map(bag, captions)))} different bags for {len(captions)} images; chance at a loss "
                f"of {math.log(n):.2f}; retrieval is measured among {judged}")


def share_right(similarity, captions):
    """Percent of rows of (n, n) whose highest entry has a caption with the same words as the row's own."""
    found = similarity.argmax(dim=1).tolist()
    right = [captions[k] == captions[i] for i, k in enumerate(found)]
    return 100 * sum(right) / len(right)


# --- 4. Settings and experiments ---------------------------------------------------------------------------

OWN_TO_SIMSIAM = ("objective", "eta", "k", "m", "fc_std")  # settings of SimSiam's ablations alone


def table(imagenet, everywhere, added, last_bn=1.0, without=()):
    """A method's table of settings, with rows as in simsiam.SETTINGS, from what differs.

    imagenet    {setting: value}: the authors' recipe for ImageNet
    everywhere  {setting: value}: in all three recipes
    added       {setting: (type, imagenet, cifar10, shapes)}: what SimSiam doesn't need
    last_bn     the initial scale of a residual block's last BN, on ImageNet
    without     settings that the method doesn't use
    The rest, for CIFAR-10 and shapes, is SimSiam's, as in the paper's comparison with SimCLR (supp. D).
    """
    rows = {}
    for name, (kind, own, *small) in SETTINGS.items():
        if name not in (*OWN_TO_SIMSIAM, *without):
            rows[name] = (kind, imagenet.get(name, own), *small)
    for name, value in everywhere.items():
        kind, *_ = rows[name]
        rows[name] = (kind, *[value] * len(RECIPES))
    return {**rows, "last_bn": (number, last_bn, 0.0, 0.0), **added}


def by_length(name, results):
    """Rows of Table 4, from {epochs: top-1}: {experiment: (the paper's top-1, what changes)}"""
    return {f"table4-{name}-{epochs}-epochs": (top1, {"epochs": epochs}) for epochs, top1 in results.items()}


Related.CHOICES = {**CHOICES, "predictor": ("mlp", "none"), "optimizer": tuple(FORMS)}

SimCLR.SETTINGS = table(
    imagenet=dict(  # SimCLR+: 3 layers in the projection MLP instead of 2 (supp. C)
        dim=128, affine=True, batch=4096, base_lr=0.3, weight_decay=1e-6, warmup=10, pred_lr="cosine",
        area=(0.08, 1.0), strength=(0.8, 0.8, 0.8, 0.2)),
    everywhere=dict(predictor="none"),
    last_bn=0.0,
    added={
        "optimizer":   (str,    "lars-inside", "sgd", "sgd"),
        "temperature": (number, 0.1,           0.5,   0.2),   # CIFAR-10: SimCLR's B.9; shapes: OURS
        "stopgrad":    (bool,   False,         False, False),
    })
SimCLR.EXPERIMENTS = {
    "simclr": ("66.5", {}),
    **by_length("simclr", {100: "66.5", 200: "68.3", 400: "69.8", 800: "70.4"}),
    "sec62-simclr": ("66.5", {}),
    "sec62-simclr-predictor": ("66.4", {"predictor": "mlp"}),  # its width is OURS
    "sec62-simclr-predictor-stopgrad": ("66.0", {"predictor": "mlp", "stopgrad": True}),
    "suppD-simclr": ("66.5; on CIFAR-10 91.1", {}),
}

MoCoV2.CHOICES = {**Related.CHOICES, "predictor": ("none",)}
MoCoV2.SETTINGS = table(
    imagenet=dict(
        proj_layers=2, dim=128, bn=(0, 0, 1, 0), batch=256, base_lr=0.03, weight_decay=1e-4),  # no BN
    everywhere=dict(predictor="none"),
    added={
        "optimizer":   (str,    "sgd",  "sgd", "sgd"),
        "epochs":      (int,    100,    800,   4),     # a step takes longer than SimSiam's: OURS
        "temperature": (number, 0.2,    0.1,   0.2),   # CIFAR-10: the authors' example; shapes: OURS
        "queue":       (int,    65536,  4096,  2048),  # the same
        "tau":         (number, 0.999,  0.99,  0.99),  # the same; MoCo's m
    })
MoCoV2.EXPERIMENTS = {
    "mocov2": ("67.4", {}),
    **by_length("mocov2", {100: "67.4", 200: "69.9", 400: "71.0", 800: "72.2"}),
}

BYOL.SETTINGS = table(
    imagenet=dict(
        proj_layers=2, proj_hidden=4096, dim=256, pred_dim=4096, bn=(1, 0, 1, 0), batch=4096,
        weight_decay=1e-6, warmup=10, pred_lr="cosine", area=(0.08, 1.0), strength=(0.4, 0.4, 0.2, 0.1)),
    everywhere={},
    added={
        "optimizer":     (str,    "lars-outside", "sgd", "sgd"),  # last_bn: the paper's; its code has 0
        # Small recipes: SimSiam's divided by the loss's factor, 4, or on shapes by 2, OURS.
        "base_lr":       (number, 0.45,           0.0075, 0.9),
        "epochs":        (int,    100,            800,   4),     # a step takes longer: OURS
        "tau":           (number, 0.99,           0.99,  0.9),   # at the start; small recipes: OURS
        "tau_rises":     (bool,   True,           True,  True),  # to 1
        "pred_lr_times": (number, 1.0,            1.0,   1.0),
    })
STILL = dict(epochs=300, tau=0.0, tau_rises=False)
BYOL.EXPERIMENTS = {
    "byol": ("66.5", {}),
    **by_length("byol", {100: "66.5", 200: "70.6", 400: "73.2", 800: "74.3"}),
    "byol-tau-0": ("5.5 (BYOL's Table 21)", STILL),
    "fn2-byol-tau-0": ("66.9", {**STILL, "pred_lr_times": 10.0}),
}
# Footnote 6: BYOL's recipe for 100 epochs is the one above; these are for 300 and 1000.
OF_300 = dict(base_lr=0.3, weight_decay=1e-6)
OF_1000 = dict(base_lr=0.2, weight_decay=1.5e-6, tau=0.996)
BYOL.ON_IMAGENET = {
    "table4-byol-200-epochs": OF_300,
    "table4-byol-400-epochs": OF_300,
    "table4-byol-800-epochs": OF_1000,
    "byol-tau-0": OF_300,
    "fn2-byol-tau-0": OF_300,
}

SwAV.SETTINGS = table(
    imagenet=dict(  # SwAV+: 3 layers in the projection MLP instead of 2 (supp. C)
        dim=128, bn=(1, 0, 1, 0), batch=4096, weight_decay=1e-6, warmup=10, pred_lr="cosine",
        area=(0.08, 1.0), strength=(0.8, 0.8, 0.8, 0.2)),
    everywhere=dict(predictor="none"),
    added={
        "optimizer":   (str,    "larc", "sgd", "sgd"),
        "base_lr":     (number, 0.3,    0.03,  0.9),   # shapes: half of SimSiam's, OURS
        "lr_end":      (number, 0.001,  0.0,   0.0),   # the last lr, as a share of the first
        # Small recipes: OURS. SimSiam's z has more dimensions than SwAV's 128, so its cosines with the
        # prototypes are smaller at first; with SwAV's temperature and eps the loss stays at log K.
        "temperature": (number, 0.1,    0.05,  0.05),
        "prototypes":  (int,    3000,   512,   32),
        "eps":         (number, 0.05,   0.02,  0.02),
        "iterations":  (int,    3,      3,     3),
        "freeze":      (int,    1,      0,     0),     # epochs in which the prototypes are frozen
        "stopgrad":    (bool,   True,   True,  True),
    })
SwAV.EXPERIMENTS = {
    "swav": ("66.5", {}),
    **by_length("swav", {100: "66.5", 200: "69.1", 400: "70.7", 800: "71.8"}),
    "sec62-swav": ("66.5", {}),
    "sec62-swav-predictor": ("65.2", {"predictor": "mlp"}),  # its width and place are OURS
    "sec62-swav-without-stopgrad": ("NaN: diverges", {"stopgrad": False}),
}

VIEW = dict(jitter=0.0, gray=0.0, blur=0.0, flip=0.0, vflip=0.0, aspect=(1.0, 1.0), area=(0.6, 1.0))
CLIP.SETTINGS = table(
    imagenet=dict(dim=1024, epochs=32, batch=256, warmup=1),
    everywhere=VIEW,
    last_bn=0.0,
    without=("proj_layers", "proj_hidden", "pred_dim", "predictor", "bn", "affine", "pred_lr"),
    added={
        "optimizer":    (str,    "adamw",  "adamw",  "adamw"),
        "base_lr":      (number, 5e-4,     1e-3,     4e-3),      # small recipes: OURS
        "weight_decay": (number, 0.2,      0.2,      0.2),
        "words_width":  (int,    512,      512,      128),       # of the embeddings: OURS
        "scale":        (number, 1 / 0.07, 1 / 0.07, 1 / 0.07),  # at the start; 100 at most
    })
CLIP.EXPERIMENTS = {"clip": ("not in the paper", {})}


# --- The program ----------------------------------------------------------------------------------------

METHODS = {method.NAME: method for method in (SimCLR, MoCoV2, BYOL, SwAV, CLIP)}


def parse(argv=None):
    """The command line -> options; `--experiment list` prints the table of all rows and exits."""
    # The method decides which settings there are.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.error = lambda message: sys.exit(f"related.py: {message}")
    first.add_argument("--method", choices=METHODS)
    first.add_argument("--experiment")
    first.add_argument("--help", "-h", action="store_true")
    known, _ = first.parse_known_args(argv)
    if known.experiment == "list":
        list_experiments(METHODS.values())
        sys.exit()
    of_the_row = next((m.NAME for m in METHODS.values() if known.experiment in m.EXPERIMENTS), None)
    name = known.method or of_the_row
    if name is None:
        if known.help:
            print(__doc__)
            sys.exit()
        what = f"no row is called {known.experiment}" if known.experiment else "no method is named"
        sys.exit(f"related.py: {what}; give --method {'|'.join(METHODS)}, or a row of --experiment list")
    parser = options("related.py", METHODS[name].__doc__.splitlines()[0], METHODS[name])
    parser.add_argument("--method", dest="method_name", choices=METHODS,
                        help="the method whose settings are below (default: the experiment's)")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    run_and_leave("related.py", pretrain, parse())
