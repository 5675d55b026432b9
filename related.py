"""SimSiam's neighbours, each told as what it changes in SimSiam (Sec. 2, 6.2, Fig. 3, Table 4); and CLIP.

    python related.py --method simclr                           no data needed: drawn shapes
    python related.py CIFAR --method mocov2                     all else is as in simsiam.py
    torchrun --nproc-per-node 8 related.py IMAGENET --method byol
    python related.py --experiment list                         the rows that SimSiam's paper has of them
    python related.py --experiment sec62-swav-predictor         a row; it names its method
    python related.py --method swav --help                      a method's settings

    SimCLR    SimSiam + negatives, from the batch               - predictor - stop-gradient
    MoCo v2   SimSiam + negatives, from a queue + momentum encoder          - predictor
    BYOL      SimSiam + momentum encoder
    SwAV      SimSiam + prototypes, whose codes Sinkhorn-Knopp balances     - predictor
    CLIP      SimCLR with captions in the place of second views

Loop, views, heads, checkpoints and monitors are simsiam.py's. A method here is a class that says what else
a run needs (simsiam.Method has the list, in the order in which a run asks for it). On CIFAR-10 and shapes all
have SimSiam's settings and projection MLP. lineval.py reads their checkpoints as any other's.

Sources: SimCLR, Chen et al. 2020 (arXiv 2002.05709); MoCo v2, Chen et al. 2020 (2003.04297); BYOL, Grill et
al. 2020 (2006.07733); SwAV, Caron et al. 2020 (2006.09882); CLIP, Radford et al. 2021 (2103.00020); the code
that their authors released. "Sec.", "Table", "supp.": SimSiam's paper. "OURS": no source says it, so that we
chose.

The letters are simsiam.py's: N images of this process's share of a batch, B of the whole batch; z1, z2 (N, d)
the encoder's outputs for two views, p1, p2 the predictor's. K: rows of a queue, or prototypes.
"""
import argparse
import collections
import copy
import functools
import math
import sys

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import resnet
from harness.common.machine import to_device
from harness.common.draws import permutation
from harness.common.errors import Refused
from harness.data.captions import Vocabulary, bag, hash_of
from harness.data.opening import open_captions
from harness.evaluation.features import extract, good_ones
from harness.training.batchnorm import AllSum
from harness.training.ends import run_and_leave
from harness.training.options import number
from harness.training.processes import everyones
from lineval import LARS
from simsiam import CHOICES, RECIPES, SETTINGS, Method, as_float32, collapsed, cosine, initial_lr
from simsiam import l2_normalize, list_experiments, loss, options, prediction_mlp, pretrain, stopgrad, warmup

# --- What they have in common ----------------------------------------------------------------------------


def identity(t):
    """t as it is: the sum over the processes where there is but one."""
    return t


def over_processes():
    """What the losses below take to be those of the global batch: a sum over the processes, with gradient."""
    return {"all_sum": AllSum.apply, "rank": dist.get_rank(), "world": dist.get_world_size()}


@torch.no_grad()
def momentum_update(target, online, tau):
    """Move the target network's parameters towards the online network's: each becomes tau times itself, plus
    1 - tau times the other's.

    Parameters only: BN statistics aren't averaged. So the target is for training, in train mode; what is
    evaluated is the online network.
    """
    for xi, theta in zip(target.parameters(), online.parameters(), strict=True):
        xi.copy_(tau * xi + (1 - tau) * theta)                        # BYOL Eq. (1): momentum encoder


def start_last_bn(encoder, value):
    """Let the scale of each residual block's last BN start at this value."""
    for module in encoder.modules():
        if isinstance(module, resnet.Bottleneck):
            nn.init.constant_(module.bn3.weight, value)
        if isinstance(module, resnet.BasicBlock):
            nn.init.constant_(module.bn2.weight, value)


def adamw(groups, lr, momentum):
    """AdamW as CLIP has it."""
    return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999), eps=1e-8)


class JointLARS(LARS):
    """LARS as SimCLR and BYOL have it: local lr = trust |w| / |gradient + wd w|.

    Groups of parameters with adapted=False are trained by plain SGD.
    lr_inside   the lr is a factor of what goes into the momentum (SimCLR), and not of the step (BYOL): the same
                while it stays
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


# optimizer: (what makes it, whether BN's tensors, biases and scales are neither adapted nor decayed)
FORMS = {
    "sgd": (functools.partial(torch.optim.SGD, fused=True), False),
    "lars-inside": (functools.partial(JointLARS, lr_inside=True), True),    # SimCLR's
    "lars-outside": (JointLARS, True),                                      # BYOL's
    "larc": (LARS, False),                                                  # SwAV's
    "adamw": (adamw, True),                                                 # CLIP's
}


class Related(Method):
    """What they have in common: a loss for each step, and an optimiser that may treat tensors unlike.

    A method adds `minimum`, and a `loss` of what its model returns, or an `objective` that makes one.

    DEPARTURE: images are resized bilinearly, as in SimSiam's released code; the authors of SimCLR and BYOL
    did it bicubically.

    DEPARTURE: each view passes through the network by itself, as in SimSiam; SimCLR and SwAV pass both views
    together. BN is over the whole batch; SwAV's over groups of 8 GPUs.

    DEPARTURE: the lr is in proportion to the batch, and is set at every step. MoCo v2's is set once an epoch;
    SimCLR below 4096 images is better with 0.075 x sqrt(batch), SwAV at 256 with 0.6 (--base-lr 0.6).
    """
    CHOICES = {**CHOICES, "predictor": ("mlp", "none"), "optimizer": tuple(FORMS)}
    REMEDY = "views that are easier to match"
    views = 2

    @staticmethod
    def check(s):
        """Here nothing is refused; MoCo v2 has a rule."""

    def set_up(self):
        """Here the settings decide nothing."""

    def build(self):
        """As in SimSiam; but the last BN scale of each residual block, which starts at 0, may start at 1."""
        super().build()
        start_last_bn(self.model.encoder, self.s["last_bn"])

    def parts(self, device):
        """Here nothing is kept beside model and optimiser."""
        return {}

    def stream(self, load, batches, parts, step, autocast):
        """Yields (views, objective) for each step, as in SimSiam."""
        for _, x in load(batches):
            yield x, self.objective(x, autocast)

    def objective(self, views, autocast):
        """The loss of the step on these views: a function of p1, p2, z1, z2. Called once a step, before the
        model sees the views, so that a target network may see them first."""
        return self.loss

    def modules(self):
        """The parts of the model that the optimiser tells apart, the encoder first."""
        return {"encoder": self.model.encoder, "predictor": self.model.predictor}

    def optimizer(self):
        """One of FORMS, over each module's tensors in two groups: those that are adapted and decayed, and
        those that a form may leave out, BN's and biases."""
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
        """As in SimSiam; but there may be an end other than 0, and another lr for the predictor."""
        s = self.s
        lr = initial_lr(s["base_lr"], s["batch"])
        end = s.get("lr_end", 0.0)
        fall = end + (1 - end) * cosine(step, self.total_steps, self.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * warmup(step, self.warmup_steps) * fall
            if group["module"] == "predictor":
                if s["pred_lr"] == "constant":
                    group["lr"] = lr
                group["lr"] *= s.get("pred_lr_times", 1.0)

    def collapsed(self, loss, std_sqrt_d):
        """By the std alone: where there are negatives or codes, collapse is not at the loss's minimum. Behind
        an output BN the std can't be 0, so that simsiam.collapsed has a higher bound for it."""
        behind_bn = self.s["bn"][1]
        return collapsed(0.0 if behind_bn else math.inf, std_sqrt_d, self.s["batch"])

    def rows(self):
        """What the start block says of the method: {heading: text}"""
        return {"method": f"{self.NAME}, {self.describe()}"}


OWN_TO_SIMSIAM = ("objective", "eta", "k", "m", "fc_std")  # settings of ablations that are SimSiam's alone


def table(imagenet, everywhere, added, last_bn=1.0, without=()):
    """A method's table of settings, a row each as in simsiam.SETTINGS, by what differs.

    imagenet    {setting: value}: the authors' recipe for ImageNet
    everywhere  {setting: value}: in all three recipes
    added       {setting: (type, imagenet, cifar10, shapes)}: what SimSiam has no need of
    last_bn     the last BN scale of a residual block, as it starts, on ImageNet
    without     settings that the method has no use for
    All else, for CIFAR-10 and shapes, is SimSiam's: the paper compares with SimCLR so (supp. D).
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
    """Rows of Table 4, from {epochs: top-1}: {experiment: (what changes, the paper's top-1)}"""
    return {f"table4-{name}-{epochs}-epochs": ({"epochs": epochs}, top1) for epochs, top1 in results.items()}


# --- SimCLR: + negatives, - predictor, - stop-gradient --------------------------------------------------

def nt_xent(z1, z2, temperature, all_sum=identity, rank=0, world=1):
    """NT-Xent, the mean over the 2B outputs: each is to find the other view of its image, z1's in z2 or the
    other way round, among all outputs but itself. (N, d), (N, d) -> scalar

    With all_sum (batchnorm.AllSum), this process's outputs are compared with those of all `world` processes,
    of which it is number `rank`. The loss is the mean over its own. Its gradient, averaged over
    the processes, is that of one process.
    """
    n = len(z1)
    z1 = l2_normalize(z1)                                             # (N, d)
    z2 = l2_normalize(z2)                                             # (N, d)
    # Each view is gathered by itself. [z1; z2] of all processes, one after the other, would be another order.
    every = [everyones(z, all_sum, rank, world) for z in (z1, z2)]
    logits = torch.cat([z1, z2]) @ torch.cat(every).T / temperature
    # Where z1's own columns are, and z2's.
    own1 = torch.arange(n, device=z1.device) + rank * n               # (N,)
    own2 = own1 + world * n                                           # (N,)
    own = torch.cat([own1, own2]).view(-1, 1)                         # (2 * N, 1)
    other = torch.cat([own2, own1]).view(-1, 1)                       # (2 * N, 1)
    logits.scatter_(1, own, -math.inf)
    positive = logits.gather(1, other).flatten()                      # (2 * N,)
    return (logits.logsumexp(dim=1) - positive).mean()                # SimCLR Eq. (1): NT-Xent


class SimCLR(Related):
    """SimSiam + negatives - predictor - stop-gradient. The negatives are the batch's other outputs.

    DEPARTURE: pixels are standardised as in SimSiam; SimCLR's are in [0, 1].
    """
    NAME = "simclr"
    SETTINGS = table(
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
    EXPERIMENTS = {
        "simclr": ({}, "66.5"),
        **by_length("simclr", {100: "66.5", 200: "68.3", 400: "69.8", 800: "70.4"}),
        "sec62-simclr": ({}, "66.5"),
        "sec62-simclr-predictor": ({"predictor": "mlp"}, "66.4"),  # its width is OURS
        "sec62-simclr-predictor-stopgrad": ({"predictor": "mlp", "stopgrad": True}, "66.0"),
        "suppD-simclr": ({}, "66.5; on CIFAR-10 91.1"),
    }

    def set_up(self):
        s = self.s
        self.nt_xent = functools.partial(nt_xent, temperature=s["temperature"], **over_processes())
        self.loss = self.without_predictor
        if s["predictor"] == "mlp" or s["stopgrad"]:
            self.as_target = stopgrad if s["stopgrad"] else identity
            self.loss = self.with_predictor
        # It is reached where the images are at the corners of a simplex, and both views of one at the same.
        n = s["batch"]
        apart = math.exp(-n / ((n - 1) * s["temperature"]))
        self.minimum = math.log(1 + (2 * n - 2) * apart)

    def build(self):
        super().build()
        if self.s["affine"]:  # SimCLR's output BN has a scale; its offset stays 0
            self.model.encoder.fc[-1].bias.requires_grad_(False)

    def describe(self):
        n = self.s["batch"]
        return (f"temperature {self.s['temperature']:g}, {2 * n - 2} negatives, chance and collapse at a "
                f"loss of {math.log(2 * n - 1):.2f}")

    def without_predictor(self, p1, p2, z1, z2):
        return self.nt_xent(z1, z2)

    def with_predictor(self, p1, p2, z1, z2):
        """Sec. 6.2, in words only; so the formula is OURS: Eq. (4) with NT-Xent in the place of D."""
        z1, z2 = self.as_target(z1), self.as_target(z2)
        return self.nt_xent(p1, z2) / 2 + self.nt_xent(p2, z1) / 2


# --- A momentum encoder, for MoCo v2 and BYOL -----------------------------------------------------------

class MomentumEncoder(Related):
    """The targets come from a second encoder, which follows the first: `tau` of it stays at each step."""

    def parts(self, device):
        # The authors of BYOL start it from other random numbers, and saw no difference to a copy.
        self.target = copy.deepcopy(self.model.encoder).requires_grad_(False)
        return {"target": self.target}

    @torch.no_grad()
    def targets(self, views, autocast):
        """z of each view by the target encoder, in train mode, (N, d) each."""
        with autocast:
            return [self.target(x) for x in views]

    def tau(self, step):
        """How much of the target stays after this step."""
        return self.s["tau"]

    def after_step(self, step):
        momentum_update(self.target, self.model.encoder, self.tau(step))

    def describe(self):
        return f"momentum encoder, tau {self.s['tau']:g}"


# --- MoCo v2: + negatives from a queue, + momentum encoder, - predictor ---------------------------------

def info_nce(q, k, queue, temperature):
    """InfoNCE, the mean over the queries: each is to find its key k among k and the queue. q, k (N, d), queue
    (K, d) of length 1 -> scalar

    No gradient flows into the keys.
    """
    q = l2_normalize(q)                                               # (N, d)
    k = l2_normalize(stopgrad(k))                                     # (N, d)
    positive = (q * k).sum(dim=1, keepdim=True)                       # (N, 1)
    logits = torch.cat([positive, q @ queue.T], dim=1) / temperature
    return (logits.logsumexp(dim=1) - logits[:, 0]).mean()            # MoCo v2 Eq. (1): InfoNCE


class Queue(nn.Module):
    """The last K keys, of length 1: `rows` (K, d). At first they are random."""

    def __init__(self, K, d, like):
        """like: a tensor, of the device and type that the rows are to have"""
        super().__init__()
        # Drawn on the CPU, so that all processes have the same.
        rows = l2_normalize(torch.randn(K, d))                        # (K, d)
        self.register_buffer("rows", rows.to(like))

    def put(self, keys, count):
        """Put keys (B, d) in the place of the oldest; `count` were put before. B divides K."""
        start = count % len(self.rows)
        self.rows[start:start + len(keys)] = keys


class MoCoV2(MomentumEncoder):
    """SimSiam + negatives + momentum encoder - predictor. The negatives are keys of earlier steps.

    As MoCo v2+ in Table 4: both views are queries (supp. C).

    DEPARTURE: BN is over the whole batch, and keys aren't shuffled. In MoCo v2 BN sees the images of one GPU,
    others for a query than for its key; otherwise the network may find the key by the batch's statistics.
    The authors' small example, with BN over eighths of a batch, lost 4 points without the shuffle (CIFAR-10,
    800 epochs); solo-learn does without both, and has 92.9% there.
    """
    NAME = "mocov2"
    CHOICES = {**Related.CHOICES, "predictor": ("none",)}
    SETTINGS = table(
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
    EXPERIMENTS = {
        "mocov2": ({}, "67.4"),
        **by_length("mocov2", {100: "67.4", 200: "69.9", 400: "71.0", 800: "72.2"}),
    }

    @staticmethod
    def check(s):
        if s["queue"] % (2 * s["batch"]) != 0:
            raise Refused(f"--queue {s['queue']}: twice the batch, {2 * s['batch']} keys a step, doesn't "
                          "divide it")

    def set_up(self):
        s = self.s
        self.minimum = math.log(1 + s["queue"] * math.exp(-2 / s["temperature"]))

    def parts(self, device):
        w = self.model.encoder.conv1.weight
        self.queue = Queue(self.s["queue"], self.s["dim"], like=w).to(device)
        return {**super().parts(device), "queue": self.queue}

    def objective(self, views, autocast):
        k1, k2 = self.keys = self.targets(views, autocast)
        queue, t = self.queue.rows, self.s["temperature"]

        def mean(p1, p2, z1, z2):
            """OURS: half the sum of both directions, as in SimSiam. Both meet the same queue: otherwise one's
            queries would meet their own views' keys as negatives."""
            return info_nce(z1, k2, queue, t) / 2 + info_nce(z2, k1, queue, t) / 2

        return mean

    def after_step(self, step):
        """A step is: keys by the target; queries; the loss, with the queue as it is; the optimiser; and then,
        here, the target follows, and the keys enter the queue.

        The authors move the target first and the queue last, so that the same keys meet the same queues.
        """
        super().after_step(step)
        batch = self.s["batch"]
        for view, keys in enumerate(self.keys):
            keys = everyones(l2_normalize(keys), **over_processes())
            self.queue.put(keys, (2 * step + view) * batch)

    def describe(self):
        s = self.s
        text = (f"{super().describe()}; a queue of {s['queue']} keys, temperature {s['temperature']:g}, "
                f"chance and collapse at a loss of {math.log(1 + s['queue']):.2f}")
        if s["queue"] > s["images"]:
            text += ("; an image's own older keys are among its negatives: a --queue below the "
                     f"{s['images']} images has fewer of them")
        return text


# --- BYOL: + momentum encoder ---------------------------------------------------------------------------

class BYOL(MomentumEncoder):
    """SimSiam + momentum encoder: SimSiam's loss, with z of the target encoder.

    With tau 0 the target is the online encoder, so that the gradients are SimSiam's, 4 times as long. (The
    results aren't: BYOL's recipe without momentum encoder needs 10 times the lr in the predictor.)

    DEPARTURE: both views have SimSiam's blur, half of them; BYOL blurs all first views and a tenth of the
    second. It found no difference (its Table 17).

    DEPARTURE: no solarisation, which BYOL does to a fifth of the second views: 72.3 instead of 72.5 (there).

    DEPARTURE: fc layers before a BN have no bias, which the BN would subtract. The last of each MLP has one;
    BYOL's haven't.
    """
    NAME = "byol"
    SETTINGS = table(
        imagenet=dict(
            proj_layers=2, proj_hidden=4096, dim=256, pred_dim=4096, bn=(1, 0, 1, 0), batch=4096,
            weight_decay=1e-6, warmup=10, pred_lr="cosine", area=(0.08, 1.0), strength=(0.4, 0.4, 0.2, 0.1)),
        everywhere={},
        added={
            "optimizer":     (str,    "lars-outside", "sgd", "sgd"),  # last_bn: the paper's; its code has 0
            # Small recipes: SimSiam's by the factor of the loss, 4, or on shapes 2, OURS.
            "base_lr":       (number, 0.45,           0.0075, 1.0),
            "epochs":        (int,    100,            800,   4),     # a step takes longer: OURS
            "tau":           (number, 0.99,           0.99,  0.9),   # at the start; small recipes: OURS
            "tau_rises":     (bool,   True,           True,  True),  # to 1
            "pred_lr_times": (number, 1.0,            1.0,   1.0),
        })
    STILL = dict(epochs=300, tau=0.0, tau_rises=False)
    EXPERIMENTS = {
        "byol": ({}, "66.5"),
        **by_length("byol", {100: "66.5", 200: "70.6", 400: "73.2", 800: "74.3"}),
        "byol-tau-0": ({**STILL}, "5.5 (BYOL's Table 21)"),
        "fn2-byol-tau-0": ({**STILL, "pred_lr_times": 10.0}, "66.9"),
    }
    # Footnote 6: BYOL's recipe for 100 epochs is the one above; here are those for 300 and for 1000.
    OF_300 = dict(base_lr=0.3, weight_decay=1e-6)
    OF_1000 = dict(base_lr=0.2, weight_decay=1.5e-6, tau=0.996)
    ON_IMAGENET = {
        "table4-byol-200-epochs": OF_300,
        "table4-byol-400-epochs": OF_300,
        "table4-byol-800-epochs": OF_1000,
        "byol-tau-0": OF_300,
        "fn2-byol-tau-0": OF_300,
    }
    minimum = 0

    def objective(self, views, autocast):
        target1, target2 = self.targets(views, autocast)

        def byol(p1, p2, z1, z2):
            """The sum of both directions' |p/|p| - z'/|z'||^2 = 2 + 2 D(p, z')."""
            return 4 + 4 * loss(p1, p2, target1, target2)             # BYOL Eq. (2): of the target's z

        return byol

    def describe(self):
        return super().describe() + (" at the start, 1 at the end" if self.s["tau_rises"] else ", constant")

    def tau(self, step):
        """From tau to 1 by half a cosine; steps count from 0."""
        if not self.s["tau_rises"]:
            return self.s["tau"]
        return 1 - (1 - self.s["tau"]) * cosine(step, self.total_steps, 0)

    def collapsed(self, loss, std_sqrt_d):
        """As in SimSiam, whose loss is a quarter of this one, less 1."""
        return collapsed(loss / 4, std_sqrt_d, self.s["batch"])


# --- SwAV: + prototypes, + Sinkhorn-Knopp on the target, - predictor ------------------------------------

class Prototypes(nn.Linear):
    """Scores: the cosines of z (N, d) with K prototypes -> (N, K).

    DEPARTURE: the prototypes are normalised here, with gradient, as SimSiam's footnote 7 has it; SwAV
    normalises the stored ones at each step. Footnote 8: the same accuracy.
    """

    def __init__(self, d, K):
        super().__init__(d, K, bias=False)

    def forward(self, z):
        with torch.autocast(z.device.type, enabled=False):  # bf16 would cost a score its third digit
            return l2_normalize(z) @ l2_normalize(self.weight).T


def balance(scores, eps, iterations, all_sum=identity, rank=0, world=1):
    """Sinkhorn-Knopp: codes that spread the batch evenly over the prototypes. (N, K) -> (N, K), each row
    sums to 1

    exp(scores / eps) gets a factor u for each prototype and a factor v for each image, in turns: u makes the
    prototypes' shares equal, v the images' sums 1. Here the images are the rows; in the paper they are the
    columns, and all is divided by B. In logarithms, because exp(1 / eps) is beyond half precision, and for
    small eps beyond single precision, too. all_sum, rank and world as in nt_xent: a prototype's share is that
    of the global batch.
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


class SwAV(Related):
    """SimSiam + prototypes + Sinkhorn-Knopp on the target - predictor.

    As SwAV+ in Table 4: two views, no multi-crop. In the model the prototypes stand where SimSiam has the
    predictor: p is an image's scores.

    DEPARTURE: there is no queue of earlier outputs, which SwAV has for batches that are small against K. Take
    fewer prototypes.
    """
    NAME = "swav"
    REMEDY = "--eps 0.03; a longer --freeze; --bn 1 0 1 0, which has no BN at the projection's end"
    SETTINGS = table(
        imagenet=dict(  # SwAV+: 3 layers in the projection MLP instead of 2 (supp. C)
            dim=128, bn=(1, 0, 1, 0), batch=4096, weight_decay=1e-6, warmup=10, pred_lr="cosine",
            area=(0.08, 1.0), strength=(0.8, 0.8, 0.8, 0.2)),
        everywhere=dict(predictor="none"),
        added={
            "optimizer":   (str,    "larc", "sgd", "sgd"),
            "base_lr":     (number, 0.3,    0.03,  1.0),   # shapes, OURS: SimSiam's 2.0 failed on a seed of 3
            "lr_end":      (number, 0.001,  0.0,   0.0),   # the last lr, as a share of the first
            # Small recipes: OURS. SimSiam's z has more numbers than SwAV's 128, so that its cosines with the
            # prototypes are smaller at first; with SwAV's temperature and eps the loss stays at log K.
            "temperature": (number, 0.1,    0.05,  0.05),
            "prototypes":  (int,    3000,   512,   32),
            "eps":         (number, 0.05,   0.02,  0.02),
            "iterations":  (int,    3,      3,     3),
            "freeze":      (int,    1,      0,     0),     # epochs in which the prototypes stay as they are
            "stopgrad":    (bool,   True,   True,  True),
        })
    EXPERIMENTS = {
        "swav": ({}, "66.5"),
        **by_length("swav", {100: "66.5", 200: "69.1", 400: "70.7", 800: "71.8"}),
        "sec62-swav": ({}, "66.5"),
        "sec62-swav-predictor": ({"predictor": "mlp"}, "65.2"),  # its width and place are OURS
        "sec62-swav-without-stopgrad": ({"stopgrad": False}, "NaN: diverges"),
    }
    minimum = 0

    def set_up(self):
        self.codes = functools.partial(
            sinkhorn if self.s["stopgrad"] else balance, eps=self.s["eps"], iterations=self.s["iterations"],
            **over_processes())

    def build(self):
        """In Sec. 6.2's row with a predictor, it is z that it predicts: p has the scores of h(z), the codes
        come from those of z.

        OURS: the paper doesn't say whether h stands before the prototypes or behind them. Behind them its
        outputs are no cosines any more; divided by the temperature they are so large that nothing is learned
        on shapes.
        """
        super().build()
        s = self.s
        h = nn.Identity()
        if s["predictor"] == "mlp":
            _, _, hidden_bn, output_bn = s["bn"]
            h = prediction_mlp(s["dim"], s["pred_dim"], hidden_bn, output_bn)
        prototypes = Prototypes(s["dim"], s["prototypes"])
        self.model.predictor = nn.Sequential(collections.OrderedDict(h=h, prototypes=prototypes))

    def modules(self):
        """The prototypes by themselves, because they may be frozen."""
        h, prototypes = self.model.predictor
        return {"encoder": self.model.encoder, "prototypes": prototypes, "predictor": h}

    def set_lr(self, optimizer, step):
        """As for the others; but the prototypes stay as they are for the first epochs (one less than all, at
        most), and gather no momentum there."""
        super().set_lr(optimizer, step)
        frozen = min(self.s["freeze"], self.s["epochs"] - 1) * self.steps_per_epoch
        if step > frozen:
            return
        for group in optimizer.param_groups:
            if group["module"] == "prototypes":
                for w in group["params"]:
                    optimizer.state.pop(w, None)
                if step < frozen:
                    group["lr"] = 0.0

    def loss(self, p1, p2, z1, z2):
        """The mean of both directions, as in the authors' code, where SwAV's Eq. (1) has the sum."""
        _, prototypes = self.model.predictor
        q1, q2 = (self.codes(prototypes(z)) for z in (z1, z2))
        t = self.s["temperature"]
        return swapped(p1, q2, t) / 2 + swapped(p2, q1, t) / 2        # SwAV Eq. (1): swapped prediction

    def describe(self):
        s = self.s
        text = (f"{s['prototypes']} prototypes, Sinkhorn eps {s['eps']:g}, {s['iterations']} iterations, "
                f"temperature {s['temperature']:g}, chance and collapse at a loss of "
                f"{math.log(s['prototypes']):.2f}")
        if s["prototypes"] > s["batch"]:
            text += f"; more prototypes than the batch's {s['batch']} images can be spread over evenly"
        return text


# --- CLIP: captions in the place of second views ----------------------------------------------------------

def clip_loss(image, text, log_scale, all_sum=identity, rank=0, world=1):
    """CLIP's loss: each image is to find its caption among all, and each caption its image. (N, d), (N, d),
    scalar -> scalar

    It normalises both. log_scale: the logarithm of 1 / temperature. With all_sum, rank and world as in
    nt_xent.
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
    """An image encoder (a ResNet) and a text encoder (the mean of a caption's word embeddings), each with a
    linear projection to d without bias; and the scale, as its logarithm.

    A bag of words is one of the two forms that CLIP's authors used. It can't tell the words' order.
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
        """Images (N, 3, S, S) and their captions (N, L) -> (log_scale,), (image, text), (N, d) each"""
        return (self.log_scale,), (self.encoder(x), self.text(numbers))


class CLIP(Related):
    """Images and captions, in CLIP's smallest form.

    What an image is pulled to is its caption; what it is pushed from are the batch's other captions. On
    shapes every caption names the kind, so that kNN, linear and zero-shot accuracy are not without labels.

    DEPARTURE: the text encoder is a bag of words. CLIP's is a Transformer; its Fig. 2 has both.

    DEPARTURE: a crop is a square of 0.6 of the image's area at least, or the largest one in the middle where
    none fits. CLIP takes the largest, anywhere.

    DEPARTURE: CLIP's lr is for a batch of 32,768, 2,000 steps of warm-up and 400 million pairs. Here it is
    for batches that a GPU holds, with an epoch of warm-up.
    """
    NAME = "clip"
    VIEW = dict(jitter=0.0, gray=0.0, blur=0.0, flip=0.0, aspect=(1.0, 1.0), area=(0.6, 1.0))
    SETTINGS = table(
        imagenet=dict(dim=1024, epochs=32, batch=256, warmup=1),
        everywhere=VIEW,
        last_bn=0.0,
        without=("proj_layers", "proj_hidden", "pred_dim", "predictor", "bn", "affine", "pred_lr"),
        added={
            "optimizer":    (str,    "adamw",  "adamw",  "adamw"),
            "base_lr":      (number, 5e-4,     1e-3,     8e-3),      # small recipes: OURS
            "weight_decay": (number, 0.2,      0.2,      0.2),
            "words_width":  (int,    512,      512,      128),       # of the embeddings: OURS
            "scale":        (number, 1 / 0.07, 1 / 0.07, 1 / 0.07),  # at the start; 100 at most
        })
    EXPERIMENTS = {"clip": ({}, "not in the paper")}
    MEASURED = {"zero_shot": "zero-shot {:.2f}%", "image_to_text": "image to text {:.2f}%",
                "text_to_image": "text to image {:.2f}%"}
    views = 1
    minimum = 0
    open = staticmethod(open_captions)

    def set_up(self):
        if self.data is None:
            return
        captions = self.data.train.captions
        self.vocabulary = Vocabulary(captions)
        self.numbers = self.vocabulary.numbers(captions)
        self.s["captions"] = hash_of(captions)

    def build(self):
        """The image encoder, and a text encoder for the words of the training captions."""
        s = self.s
        encoder = resnet.ARCHS[s["arch"]](width=s["width"], cifar_stem=s["cifar_stem"])
        start_last_bn(encoder, s["last_bn"])
        self.model = ImageAndText(encoder, s["dim"], len(self.vocabulary.words), s["words_width"], s["scale"])

    def modules(self):
        """The image encoder first; then all else."""
        model = self.model
        return {"encoder": model.encoder, "words": model.words, "project": model.project,
                "scale": nn.ParameterList([model.log_scale])}

    def parts(self, device):
        """The words, for whoever uses the text encoder."""
        self.numbers = self.numbers.to(device)
        return {"vocabulary": self.vocabulary}

    def stream(self, load, batches, parts, step, autocast):
        """Yields ((images, their captions), objective) for each step."""
        for index, (x,) in load(batches):
            shown = to_device(self.shown(index), x.device)
            yield (x, self.numbers[shown]), self.loss

    def shown(self, index):
        """Which images stand at these places: a bad file's is the next good one, with its own caption."""
        n, bad = len(self.data.train), self.data.train.bad
        return np.array([next(k % n for k in range(i, i + n) if k % n not in bad) for i in index.tolist()])

    def loss(self, log_scale, image, text):
        return clip_loss(image, text, log_scale, **over_processes())

    @torch.no_grad()
    def after_step(self, step):
        """The scale stays between 1 and 100."""
        self.model.log_scale.clamp_(0.0, math.log(100))

    @torch.no_grad()
    def measure(self, encoder, job, autocast):
        """On validation images: zero-shot top-1 by "a <class>", and retrieval at 1 both ways, in percent.

        Without a validation split, retrieval among up to 1,000 of the training images.
        """
        source = job.val or job.train
        chosen = permutation(0, 0, len(source))[:1000] if job.val is None else None
        image = l2_normalize(extract(encoder, job.test_views, source, job.device, autocast, chosen))
        image, good = good_ones(source, image, chosen)
        captions = [bag(source.captions[i]) for i in good]
        text = self.text_vectors([" ".join(words) for words in captions], job.device)
        found = {
            "image_to_text": share_right(image @ text.T, captions),
            "text_to_image": share_right(text @ image.T, captions),
        }
        if source.labels is not None:
            names = self.text_vectors([f"a {name}" for name in source.classes], job.device)
            right = (image @ names.T).argmax(dim=1).cpu().numpy() == source.labels[good]
            found["zero_shot"] = 100 * right.mean()
        return found

    def text_vectors(self, texts, device):
        """Texts as unit vectors (n, d): 0 where no word of a text is known."""
        return l2_normalize(self.model.text(self.vocabulary.numbers(texts).to(device)))

    def collapsed(self, loss, std_sqrt_d):
        """By a std of 0 alone: no BN stands behind the projections."""
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
    """In how many rows of (n, n), in percent, the highest is of the row's own caption, or of one that has the
    same words."""
    found = similarity.argmax(dim=1).tolist()
    right = [captions[k] == captions[i] for i, k in enumerate(found)]
    return 100 * sum(right) / len(right)


# --- The program ----------------------------------------------------------------------------------------

METHODS = {method.NAME: method for method in (SimCLR, MoCoV2, BYOL, SwAV, CLIP)}


def parse(argv=None):
    """The command line -> options. `--experiment list` prints the table of all rows, and ends."""
    # The method decides which settings there are.
    first = argparse.ArgumentParser(add_help=False)
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
                        help="whose settings are those below (default: the experiment's)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_and_leave("related.py", pretrain, parse())
