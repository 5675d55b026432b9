"""Frozen linear classification: how the paper judges what was learned (Sec. 4, supplement A).

    python lineval.py --ckpt runs/shapes/checkpoint.pth           as its recipe calls for, on its own data
    python lineval.py IMAGENET --ckpt checkpoint_0099.pth.tar     the authors' file; MoCo's, torchvision's
    python lineval.py CIFAR --ckpt random:resnet18                an untrained network, to compare with
    torchrun --nproc-per-node 8 lineval.py --ckpt runs/IMAGENET/checkpoint.pth
    python lineval.py --ckpt runs/IMAGENET/checkpoint.pth --export torchvision      another file layout

Every protocol looks at pooled features of the frozen backbone in eval mode, and is judged on each
validation image once:

    --lars    the paper's: 90 epochs, batch 4096, SGD with layer-wise rates, cosine     default for imagenet
    --sgd     MoCo's, the paper's alternative: 100 epochs, batch 256, lr 30 in steps    default for cifar10
    --cached  not the paper's: features computed once, then a linear layer on them      default for shapes
    --knn     not the paper's: no training, the classifier that pre-training is monitored with

Order of this file: the layer, its optimisers and the four protocols, the paper's first; the backbone and
the files it comes in; the program. Shapes in comments: n images of a split, N of a batch, D features, C
classes, R learning rates.
"""
import json
import math
import os
import shlex
import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import augment
import resnet
from harness.common.machine import device_name, fastest_layout, hardware, to_device
from harness.common.draws import permutation
from harness.common.errors import Refused, printable
from harness.common.files import refusing, replacing, save
from harness.common.pictures import draw_neighbors
from harness.common.progress import Progress
from harness.data.loading import index_batches
from harness.data.opening import open_data
from harness.evaluation.features import BATCH, accuracy, calibrated, check_frozen, check_same_images
from harness.evaluation.features import extract, good_ones, hits, neighbours, tensor_hashes
from harness.evaluation.weights import describe_found, find_resnet, load_strictly, read_weights
from harness.evaluation.weights import whole_model
from harness.training.ends import run_and_leave
from harness.training.folder import CHECKPOINTS, folder_name, holds_run, lock
from harness.training.options import add_prefix, add_setting, check_batch, check_limits, new_parser, number
from harness.training.processes import all_sum, join_world, mean_over_processes, same_everywhere
from harness.training.run import Run
from harness.training.recipes import recipe_for
from simsiam import SETTINGS, cosine, initial_lr, knn_accuracy, l2_normalize

# --- The layer and its optimisers (supplement A) ---------------------------------------------------------

# What each protocol trains with. lr = base_lr x batch / 256, as in pre-training. Momentum is 0.9 and weight
# decay 0 everywhere. The training view of lars and sgd is cropped (area 0.08 to 1) and flipped, as in the
# released code.
#
# DEPARTURE: lars has the released code's lr, 0.1 a 256 images. The paper says 0.02.
PROTOCOLS = {
    "lars": {"base_lr": 0.1, "batch": 4096, "epochs": 90},     # supp. A
    "sgd": {"base_lr": 30.0, "batch": 256, "epochs": 100},     # supp. A's alternative, MoCo's
    "cached": {"base_lr": None, "batch": 256, "epochs": 100},  # None: chosen among SWEEP
    "knn": {},
}
# What is said of each, on the screen and in lineval.json, so that no figure is taken for the paper's that
# isn't.
NOTE = {
    "lars": "the paper's protocol (supplement A), at the released code's base lr",
    "sgd": "MoCo's protocol, supplement A's alternative",
    "cached": "NOT the paper's protocol: a linear layer on features computed once, without augmentation",
    "knn": "NOT the paper's protocol: weighted kNN, no training",
}
DEFAULT = {"imagenet": "lars", "cifar10": "sgd", "shapes": "cached"}  # by recipe
SWEEP = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)                # base_lr of the cached protocol


def linear_layer(features, classes):
    """All that is trained. Weight from a normal of std 0.01, bias 0, as in MoCo and the released code."""
    # The global random numbers decide: seed them alike on all processes before.
    layer = nn.Linear(features, classes)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


class LARS(torch.optim.Optimizer):
    """SGD in which each tensor's gradient first gets a norm in proportion to the tensor's own (You et al.
    2017).

    local lr = trust |w| / (|gradient| + wd |w| + eps), in the LARC form of the released code: no clipping,
    momentum after the scaling, bias included. A tensor or gradient that is zero takes the plain step, or a
    bias could never leave 0. At weight decay 0, the paper's, the scaling is done all the same.

    A group of parameters has lr, momentum and weight_decay, and may have adapted=False: plain SGD. SimCLR and
    BYOL (related.py) have other forms:

    joint_norm  local lr = trust |w| / |gradient + wd w|
    lr_inside   the lr is a factor of what goes into the momentum, not of the step: the same while it stays
    """

    def __init__(self, parameters, lr, momentum, weight_decay=0.0, trust=0.001, eps=1e-8, joint_norm=False,
                 lr_inside=False):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay,
                                      "adapted": True})
        self.trust = trust
        self.eps = eps
        self.scaled_gradient = self.scaled_jointly if joint_norm else self.scaled
        self.lr_inside = lr_inside

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    self.update(w, **group)

    def update(self, w, lr, momentum, weight_decay, adapted, **others):
        """One step of one tensor."""
        gradient = self.scaled_gradient(w, weight_decay) if adapted else w.grad + weight_decay * w
        if self.lr_inside:
            gradient = lr * gradient
            lr = 1
        velocity = self.state[w].get("momentum_buffer")
        if velocity is None:
            velocity = self.state[w]["momentum_buffer"] = torch.zeros_like(w)
        velocity.mul_(momentum).add_(gradient)
        w.sub_(velocity, alpha=lr)

    def scaled(self, w, wd):
        """The gradient of w with weight decay, scaled; as it is, where w or the gradient is zero."""
        norm = w.norm()
        grad_norm = w.grad.norm()
        rate = self.trust * norm / (grad_norm + wd * norm + self.eps)     # LARS Alg. 1: local lr
        scaled = rate * (w.grad + wd * w)
        return torch.where((norm > 0) & (grad_norm > 0), scaled, w.grad)

    def scaled_jointly(self, w, wd):
        """The same with the norm of gradient and weight decay together."""
        norm = w.norm()
        gradient = w.grad + wd * w
        grad_norm = gradient.norm()
        scaled = self.trust * norm / grad_norm * gradient
        return torch.where((norm > 0) & (grad_norm > 0), scaled, gradient)


OPTIMIZERS = {"lars": LARS, "sgd": torch.optim.SGD}  # of the protocols that train on augmented views


def optimizer_for(protocol, layer):
    """Momentum 0.9 and no weight decay in both. The lr is set before every step."""
    return OPTIMIZERS[protocol](layer.parameters(), lr=0.0, momentum=0.9)


def lr_factor(protocol, step, total_steps):
    """The factor on the lr: half a cosine (lars), or a tenth after 60% of the steps and again after 80%
    (sgd).

    MoCo lowers it after 60 and 80 of its 100 epochs.
    Both are set at every step, as the lr of pre-training is (see simsiam.cosine).
    """
    if protocol == "lars":
        return cosine(step, total_steps, 0)
    # In whole numbers: 0.6 times the steps would be rounded.
    decays = sum(10 * step >= tenths * total_steps for tenths in (6, 8))
    return 0.1 ** decays


def probe_step(layer, optimizer, v, labels, world):
    """One step of the linear layer, on features v (N, D) and labels (N,) of this process's share -> its loss.

    The layer is small. So its gradients are averaged here, by one sum over the processes each, instead of by
    DistributedDataParallel. The loss returned is this process's own.
    """
    L = F.cross_entropy(layer(v), labels)
    optimizer.zero_grad()
    L.backward()
    for w in layer.parameters():
        all_sum(w.grad).div_(world)
    optimizer.step()
    return L.detach()


# --- The four protocols ---------------------------------------------------------------------------------

# Each protocol is a function of a Job (below: settings, data, the frozen network) and of the features of all
# training images, bank (n, D), and of all validation images, queries (m, D), seen without augmentation. All
# processes call it together, and all get the same result.

class Judged(NamedTuple):
    """What a protocol has found."""
    top1: float           # percent of all validation images that could be read
    top5: float
    layer: object = None  # the linear layer, where one was trained
    found: dict = {}      # what else goes into lineval.json


def lars(job, bank, queries):
    """The paper's protocol (supplement A): an epoch sees each training image once, cropped and flipped at
    random.

    The layer is trained by LARS (OPTIMIZERS), with half a cosine as its lr (lr_factor). The queries judge
    it after every epoch.
    """
    return train_layer(job, queries)


def sgd(job, bank, queries):
    """MoCo's protocol, which the paper names as an alternative: about one point less (supplement A).

    The same as lars, but with plain SGD, a smaller batch, and an lr that falls in steps.
    """
    return train_layer(job, queries)


def cached(job, bank, queries):
    """Not the paper's: train on the bank, which is computed once, so that it takes seconds instead of hours.

    Without augmentation the layer overfits sooner, and the result differs from the paper's by some points.
    """
    s = job.settings
    labels = to_device(job.train.labels, job.device)
    base_lrs = SWEEP if s["base_lr"] is None else [s["base_lr"]]  # --base-lr: no sweep
    layer, base_lr, lr, held_out = fit_cached(
        bank, labels, s["classes"], base_lrs, s["epochs"], s["batch"], s["seed"])
    for w in layer.parameters():
        dist.broadcast(w.data, 0)  # on GPUs the processes' fits can differ in the last bits
    if held_out:
        shown = ", ".join(f"{lr:g} {percent:.1f}%" for lr, percent in held_out.items())
        at_an_end = base_lr in (base_lrs[0], base_lrs[-1])
        note = "; the best is at an end of the sweep: try --base-lr beyond it" if at_an_end else ""
        job.say(f"held-out top-1 by base lr: {shown}{note}")
    found = {"base_lr": base_lr, "lr": lr, "held_out_top1": held_out}
    return Judged(*test_layer(job, layer, queries), layer, found)


def knn(job, bank, queries):
    """Not the paper's: no training. Each validation image gets the class of the training images most like it.

    It is the classifier that pre-training is monitored with, so that both give the same figure.
    """
    labels = to_device(job.train.labels, job.device)
    truth = to_device(job.val.labels, job.device)
    k = neighbours(len(bank), len(job.train.classes))
    return Judged(*knn_accuracy(bank, labels, queries, truth, k), found={"k": k})


EVALUATE = {"lars": lars, "sgd": sgd, "cached": cached, "knn": knn}


def test_layer(job, layer, queries):
    """Top-1 and top-5 in percent over all validation images, by their features queries (n, D)."""
    truth = to_device(job.val.labels, job.device)
    with torch.no_grad():
        return accuracy(lambda mine: layer(queries[mine]), truth)


def train_layer(job, queries):
    """The lars and sgd protocols: train on augmented views, test after every epoch. The last epoch's result
    counts.

    Raises Refused where the loss stops being finite.
    DEPARTURE: an epoch's last, incomplete batch is dropped; the released code uses it.
    """
    s, run = job.settings, job.run
    layer, optimizer = run.parts["model"], run.parts["optimizer"]
    total_steps = s["epochs"] * run.steps_per_epoch
    progress = Progress(total_steps - run.epoch * run.steps_per_epoch - run.step, quiet=not run.first)
    batches = index_batches(
        s["seed"], len(job.train), s["batch"], s["epochs"],
        run.epoch, run.step, dist.get_rank(), s["world"])
    views = augment.load_views(
        job.train, job.policy, s["seed"], batches, job.device, s["workers"], views=1, waiting=run.waiting_for)
    labels = to_device(job.train.labels, job.device)
    while run.epoch < s["epochs"]:
        for step, (index, (x,)) in run.steps_of_epoch(views):
            lr = s["lr"] * lr_factor(s["protocol"], step, total_steps)
            optimizer.param_groups[0]["lr"] = lr
            truth = labels[to_device(index, job.device)]
            L = probe_step(layer, optimizer, job.features(x), truth, s["world"])
            L = mean_over_processes(L)
            run.add_to_means(L)
            gradient_norm = nn.utils.get_total_norm([w.grad for w in layer.parameters()])
            run.check_finite(L, gradient_norm, lr)
            run.save_or_stop_if_asked()
            progress.step(lambda: f"{run.place()}  loss {L.item():.4f}  {run.rate():.0f} images/s")
        top1, top5 = test_layer(job, layer, queries)
        record = run.log.add(
            "epoch", epoch=run.epoch + 1, step=(run.epoch + 1) * run.steps_per_epoch,
            loss=run.means[0], lr=optimizer.param_groups[0]["lr"], top1=top1, top5=top5, **run.speed())
        progress.line("epoch {epoch}/{epochs}  loss {loss:.4f}  lr {lr:.4g}  top-1 {top1:.2f}%  "
                      "top-5 {top5:.2f}%  {images_per_s:.0f} images/s".format(epochs=s["epochs"], **record))
        run.next_epoch()
    # The best epoch was found by looking at the validation images, so that it is no result. We write it down
    # because some papers report it.
    best = max(run.log.epochs(), key=lambda record: record["top1"])
    found = {"best_epoch_not_the_result": {"epoch": best["epoch"], "top1": best["top1"]}}
    last = run.log.epochs()[-1]
    return Judged(last["top1"], last["top5"], layer, found)


def fit(features, labels, classes, lrs, epochs, batch, seed):
    """One linear classifier per lr, trained side by side on features (n, D): weights (R, D, C).

    labels      (n,) int64, from 0 to classes - 1
    lrs         the R learning rates, at their start; half a cosine takes each to 0
    batch       of images; the last, incomplete one of an epoch counts too
    seed        of the order of the images

    Cross-entropy, SGD with momentum 0.9, from zero. One tensor holds all R, because a small matrix product
    takes as long for eight of them as for one.
    """
    # The gradient is written out: autograd would take several times as long for products of this size.
    lr = features.new_tensor(lrs).view(-1, 1, 1)
    w = features.new_zeros(len(lrs), features.shape[1], classes)      # (R, D, C)
    velocity = torch.zeros_like(w)                                    # (R, D, C)
    steps_per_epoch = math.ceil(len(features) / batch)
    for epoch in range(epochs):
        order = to_device(permutation(seed, epoch, len(features)), features.device)
        for step, rows in enumerate(order.split(batch), epoch * steps_per_epoch):
            x = features[rows]                                        # (N, D)
            error = (x @ w).softmax(dim=2)                            # (R, N, C)
            each = torch.arange(len(rows), device=x.device)
            error[:, each, labels[rows]] -= 1                         # d cross-entropy / d logits
            velocity = 0.9 * velocity + x.T @ error / len(rows)
            w -= lr * cosine(step, epochs * steps_per_epoch, 0) * velocity
    return w


def fit_cached(features, labels, classes, base_lrs, epochs, batch, seed):
    """The cached protocol: choose the lr on a tenth of the training features, which the fit to the others
    has not seen. Then fit all of them with it.

    Returns the linear layer for features as they are, base_lr, lr, and {base_lr: held-out top-1 in
    percent}. Features are standardised for the fit: what scale a backbone happens to have should not decide
    which lr is right.
    """
    mean = features.mean(dim=0)                                       # (D,)
    scale = features.std(dim=0).clamp(min=1e-6)                       # (D,)
    # A column of ones stands for the bias: its weights are the biases.
    x = F.pad((features - mean) / scale, (0, 1), value=1.0)           # (n, D + 1)
    lrs = [initial_lr(base_lr, batch) for base_lr in base_lrs]
    held_out = {}
    best = 0
    if len(base_lrs) > 1:  # the validation images play no part in the choice
        order = to_device(permutation(seed, epochs, len(x)), x.device)
        judged, fitted = order.tensor_split([max(1, len(x) // 10)])
        w = fit(x[fitted], labels[fitted], classes, lrs, epochs, batch, seed)  # (R, D + 1, C)
        for base_lr, scores in zip(base_lrs, x[judged] @ w):
            top1, _ = hits(scores, labels[judged]).tolist()
            held_out[base_lr] = 100 * top1 / len(judged)
        best = int(np.argmax(list(held_out.values())))
    w, = fit(x, labels, classes, [lrs[best]], epochs, batch, seed)
    # The layer gets features as they are: so the standardisation is folded into its weight and bias.
    weight = w[:-1] / scale[:, None]                                  # (D, C)
    layer = linear_layer(features.shape[1], classes).to(x.device)
    with torch.no_grad():
        layer.weight.copy_(weight.T)
        layer.bias.copy_(w[-1] - mean @ weight)
    return layer, base_lrs[best], lrs[best], held_out


# --- The frozen backbone, and the files it comes in -----------------------------------------------------

# The same network lies in files under many names:
#
#     our checkpoint.pth      encoder.conv1.weight           and the settings of its run, and the heads
#     our backbone.pth        conv1.weight                   nothing else
#     the authors' file       module.encoder.conv1.weight    and the heads
#     MoCo's                  module.encoder_q.conv1.weight  and a second network, left out: encoder_k
#     torchvision's           conv1.weight                   and fc, left out
#     lightly's               backbone.0.weight              numbers for conv1, bn1, layer1, ...
#
# So it is looked for in any nesting of dicts and under any prefix, and of two networks the one that was
# trained is taken (harness/evaluation/weights.py). Architecture, width and stem are recognised from names and
# shapes.

class Backbone(NamedTuple):
    """A frozen network, and what is known of it."""
    network: nn.Module         # the ResNet, without fc
    shape: tuple               # arch, width, cifar_stem
    found: object = None       # how it lay in its file, a weights.FoundResNet
    settings: dict = {}        # of its pre-training, where the file is ours
    epochs: object = None      # of its pre-training, where the file tells
    sha256: object = None      # of the file


def untrained(arch, width, cifar_stem):
    """A ResNet as initialised, without fc -> Backbone.

    The global random numbers must have been seeded alike on all processes.
    """
    network = resnet.ARCHS[arch](width=width, cifar_stem=cifar_stem)
    network.fc = nn.Sequential()
    return Backbone(network, (arch, width, cifar_stem))


def read_backbone(path, width=None, prefix=None):
    """The ResNet in a file (harness/evaluation/weights.py).

    width   what to insist on. By default it is what the file tells, which rounding can hide if it is odd
            (1/3)
    prefix  which of several networks, by the end of what stands before its names
    Raises Refused where any of the ResNet's tensors is missing, unexpected or of another shape.
    """
    if not os.path.isfile(path):
        known = ", ".join("random:" + arch for arch in resnet.ARCHS)
        raise Refused(f"{path}: no such file; nor one of {known}")
    state, epochs, settings, sha256 = read_weights(path)
    if settings:
        settings = evaluable(settings, path)
    found = find_resnet(state, path, prefix)
    backbone = untrained(found.arch, width or settings.get("width", found.width), found.cifar_stem)
    load_strictly(backbone.network, found.tensors, path)
    return backbone._replace(found=found, settings=settings, epochs=epochs, sha256=sha256)


def evaluable(settings, path):
    """The settings of a checkpoint, those that an evaluation needs made what they must be. Raises Refused."""
    # The file may come from anywhere: a setting that is missing or of another type is as bad as no settings.
    with refusing(path, "not a file of weights"):
        if settings["recipe"] not in DEFAULT:
            raise ValueError(f"recipe {settings['recipe']}")
        normalisation = np.array([settings["mean"], settings["std"]], float)
        if normalisation.shape != (2, 3):
            raise ValueError(f"mean {settings['mean']}, std {settings['std']}")
        needed = {
            "data": settings["data"] and str(settings["data"]),
            "seed": int(settings["seed"]),
            "size": int(settings["size"]),
            "width": float(settings["width"]),
            "centre": float(settings["centre"]),
            "range": settings.get("range") and pair(settings["range"]),
        }
        settings = {**settings, **needed}
        check_limits(settings)
    return settings


def pair(value_range):
    """A setting "range" of a checkpoint -> (low, high). Raises ValueError, or TypeError, for anything
    else."""
    low, high = map(float, value_range)
    if not low < high:
        raise ValueError(f"range {value_range}")
    return low, high


def export(path, layout, out, prefix=None):
    """Write the network in a file of another layout, for programs that read that.

    prefix  see read_backbone
    layout  "torchvision": conv1.weight, ..., without fc; "released": the authors', with the heads where the
    file has them
    out     the folder; by default that of the file
    Raises Refused where the target exists already.
    """
    backbone = read_backbone(path, prefix=prefix)
    arch, width, cifar_stem = backbone.shape
    if layout == "torchvision":
        name = f"{arch}-torchvision.pth"
        content = backbone.network.state_dict()
        tensors = content
    else:
        name = "released.pth.tar"
        tensors = released_state(backbone)
        content = {"epoch": backbone.epochs or 0, "arch": arch, "state_dict": tensors}
    # Nothing is replaced: the name says nothing of which network it is.
    target = os.path.join(out or os.path.dirname(path), name)
    if os.path.exists(target):
        raise Refused(f"{target}: exists already; move it away, or name another folder with --out")
    os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
    save(content, target)
    line = f"{target}: {arch}, {len(tensors)} tensors in {layout}'s layout"
    if width != 1 or cifar_stem:
        line += f"; not the standard {arch}: width {width:g}"
    if cifar_stem:
        line += ", CIFAR stem"
    print(line)
    print(f"  {describe_found(backbone.found, path)}")


def released_state(backbone):
    """The backbone, and the heads where the file had them, under the authors' names."""
    state = {f"module.encoder.{name}": t for name, t in backbone.network.state_dict().items()}
    heads = {name: t for name, t in whole_model(backbone.found, "the heads").items()
             if name.startswith(("encoder.fc.", "predictor."))}
    state |= {f"module.{name}": t for name, t in heads.items()}
    projector = [name for name in heads if name.startswith("encoder.fc.")]
    weights = [name for name in projector if heads[name].dim() == 2]
    if weights:  # the last fc layer of theirs has a bias, which the BN behind it voids
        last = weights[-1]
        bias = f"module.{last.replace('weight', 'bias')}"
        state.setdefault(bias, torch.zeros(len(heads[last])))
    return state


# --- The program ----------------------------------------------------------------------------------------

def parse(argv=None):
    """The command line -> options."""
    parser = new_parser(
        "lineval.py", "Evaluate a frozen backbone.", data="what the checkpoint was trained on; shapes: the "
                                                          "drawn ones",
        out="lineval-<protocol>, beside the checkpoint", amp="off")
    parser.add_argument("--ckpt", required=True, metavar="FILE",
                        help="checkpoint.pth or backbone.pth of simsiam.py, the authors' released layout, "
                             "MoCo's, torchvision's; or random:resnet50 for an untrained network")
    # Not --protocol NAME: each has a line of its own in the help, with whose it is.
    protocol = parser.add_mutually_exclusive_group()
    for name in PROTOCOLS:
        protocol.add_argument(f"--{name}", dest="protocol", action="store_const", const=name, help=NOTE[name])
    for name, kind in (("base_lr", number), ("batch", int), ("epochs", int)):
        defaults = [f"{key} {row[name] or 'by a sweep'}" for key, row in PROTOCOLS.items() if row]
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=", ".join(defaults))
    parser.add_argument("--width", type=number, help="of the network (default: the file's own; random: the "
                                                     "recipe's)")
    add_prefix(parser, "--ckpt")
    parser.add_argument("--features", metavar="FILE.npz", help="save features, labels and file names of "
                                                               "both splits there")
    for name, kind in (("size", int), ("mean", (number, 3)), ("std", (number, 3))):
        add_setting(parser, name, kind, ["the pre-training's, or else the recipe's"], "of the views")
    parser.add_argument("--export", choices=("torchvision", "released"),
                        help="write the network in this layout, and evaluate nothing")
    return parser.parse_args(argv)


class Job:
    """An evaluation: what every protocol needs.

    settings    see settings_for
    policy      of the training views; the test view takes size, centre, mean and std from it
    train, val  Sources with labels. (To save features, both may lack labels, and val may be None)
    backbone    a Backbone; freeze() prepares its network
    """

    def __init__(self, settings, policy, train, val, backbone, device):
        self.settings = settings
        self.policy = policy
        self.train = train
        self.val = val
        self.device = device
        self.network = backbone.network.to(device, memory_format=fastest_layout(backbone.network, device))
        self.run = None  # of the protocols that are done in parts
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings["amp"])
        shares = [len(source) / settings["world"] for source in (train, val) if source]
        batches = sum(math.ceil(share / BATCH) for share in shares)  # as extract makes them
        self.progress = Progress(batches, quiet=dist.get_rank() > 0)
        self.say = self.progress.line

    def use(self, train, val):
        """Go on with these Sources, bad files left out, and keep what identifies them in the settings.

        Raises Refused where too few are left for a batch, and where processes have read different images.
        """
        self.train = train
        self.val = val
        self.settings["images"] = len(train)
        self.settings["val_images"] = len(val)
        self.settings["content"] = train.fingerprint()
        fingerprints = self.settings["content"], val.fingerprint()
        check_same_images(fingerprints, self.settings["data"], self.device)
        if self.settings["protocol"] in OPTIMIZERS:
            check_batch(self.settings)

    def test_views(self, source, batches):
        """(source, batches) -> yields (indices, test views)"""
        return augment.load_centres(source, self.policy, batches, self.device, self.settings["workers"])

    def features(self, x):
        """Images (N, 3, S, S) -> (N, D), in pieces, because a batch of 4096 need not fit a GPU whole."""
        with self.autocast:
            parts = [self.network.features(part).float() for part in x.split(256)]
        return torch.cat(parts)

    def features_of(self, source):
        """Features of a source's images as they are -> the source without bad files, its features (n, D), how
        many were bad.

        A bad file's stand-in has another image's label and name. So the file takes no part in anything.
        """
        def watched(x):
            self.progress.step(lambda: f"features of {len(source)} images")
            return self.features(x)

        v, good = good_ones(source, extract(watched, self.test_views, source, self.device))
        bad = len(source) - len(good)
        if bad:
            source = source.only(good)
        if not v.isfinite().all():
            raise Refused(f"{self.settings['backbone']}: its features are not all finite; the run that wrote "
                          "it had diverged")
        return source, v, bad


def evaluate(args):
    """A whole evaluation: from the command line to lineval.json. Raises Refused, and Stopped after a
    signal.

    All features are computed before anything is written: only then it is known which files can be read, and
    the protocols see no others.
    """
    # 1. Backbone, data, settings: nothing is written before all of it is known to be good
    check_limits(vars(args))
    device, rank, world = join_world(torch.device(args.device))
    if args.export:  # that is another program, which shares the reading
        if rank == 0:
            export(args.ckpt, args.export, args.out, args.prefix)
        return
    backbone, data, recipe = open_all(args)
    s, policy = settings_for(args, backbone, recipe, data, world)
    trains = s["protocol"] in OPTIMIZERS
    out = args.out or default_folder(args, s)
    names = [*CHECKPOINTS, "lineval.json"]
    resuming = holds_run(out, names, args.resume if trains else None, device)
    # An evaluation can take hours: a file that is in the way is better met now than at its end.
    if args.features and not resuming and os.path.exists(args.features):
        raise Refused(f"--features {args.features}: exists already; name another file")
    job = Job(s, policy, data.train, data.val, backbone, device)
    job.say(start_block(s, data, backbone, device, out))

    # 2. Features of all good images as they are: to classify, to save, to look at
    hashes = freeze(job, args.ckpt)
    train, bank, bad_train = job.features_of(data.train)
    if not data.can_judge():  # then only features are asked for: see open_all
        save_features(args.features, train, bank, *(job.features_of(data.val)[:2] if data.val else ()))
        job.say(f"done: {args.features}, features of {len(train)} images ({bad_train} bad)")
        return
    val, queries, bad_val = job.features_of(data.val)
    job.use(train, val)
    lock(out, names, resuming, device)
    if trains:
        job.run = new_run(job, out, resuming, args.override)
        job.run.begin()
    if rank == 0:
        chosen, nearest = neighbors(train, val, bank, queries)
        draw_neighbors(os.path.join(out, "neighbors.png"), train, val, chosen, nearest)

    # 3. Classify
    judged = EVALUATE[s["protocol"]](job, bank, queries)
    check_frozen(job.network, hashes)

    # 4. The number
    if rank == 0:
        if judged.layer is not None:
            save_classifier(job, judged.layer, os.path.join(out, "classifier.pth"))
        if args.features:
            save_features(args.features, train, bank, val, queries)
        write_result(out, job, judged, bad_train + bad_val)
    if trains:
        job.run.log.add("end", epochs=job.run.epoch, top1=judged.top1, top5=judged.top5)
    say_result(job, judged, bad_val, out)


def open_all(args):
    """What is evaluated, on what -> Backbone, Data, and the settings of the one's pre-training or else of the
    other's recipe.

    The settings say how images are shown to the network; the command line may override these. Raises Refused
    where an accuracy is asked for, and the data can't give one.
    """
    arch = args.ckpt.removeprefix("random:")
    is_random = args.ckpt.startswith("random:") and arch in resnet.ARCHS
    backbone = None if is_random else read_backbone(args.ckpt, args.width, args.prefix)
    saved = {} if is_random else backbone.settings  # {} too where the file isn't ours
    if backbone and not saved and not args.data:
        raise Refused(f"{args.ckpt}: doesn't say what it was trained on; name the DATA (shapes: the drawn "
                      "ones)")
    args.data = None if args.data == "shapes" else args.data or saved.get("data")
    data = open_data(args.data, args.range or saved.get("range"))
    if not data.can_judge() and not args.features:
        why = "".join(f"; {note}" for note in data.found.notes)
        raise Refused(f"{args.data}: linear evaluation needs labels: train/<class>/... and val/<class>/..., "
                      f"or CIFAR-10 (--features needs none){why}")
    # How images are shown to the network: as they were in its pre-training, or else as the data suggest.
    recipe = saved or recipe_for(args.data, data.train, None, SETTINGS)
    given = {name: getattr(args, name) for name in ("size", "mean", "std")}
    recipe = recipe | {name: value for name, value in given.items() if value is not None}
    if is_random:
        torch.manual_seed(args.seed)  # the weights that pre-training with this seed starts from
        backbone = untrained(arch, args.width or recipe["width"], recipe["cifar_stem"])
    return backbone, data, recipe


def settings_for(args, backbone, recipe, data, world):
    """The settings of the evaluation, and the policy of its views. Raises Refused for impossible ones."""
    train, val = data.train, data.val
    protocol = args.protocol or DEFAULT[recipe["recipe"]]
    default = PROTOCOLS[protocol]
    given = {name: getattr(args, name) for name in ("base_lr", "batch", "epochs")}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not default:
        raise Refused(f"--{'/--'.join(given)}: --knn trains nothing")
    if args.resume == "yes" and protocol not in OPTIMIZERS:
        raise Refused(f"--resume: --{protocol} is not done in parts; give another --out, or nothing, to do "
                      "it again")
    if min(len(source) for source in (train, val) if source) < world:
        raise Refused(f"{args.data}: {len(train)} training and {len(val or '')} validation images for "
                      f"{world} processes")
    # A figure of changed settings must not be taken for the protocol's: the note says what was changed.
    note = NOTE[protocol]
    changed = [f"{name} {value} instead of {default[name] or 'a sweep'}"
               for name, value in given.items() if value != default[name]]
    if changed:
        note += f", but with {', '.join(changed)}"
    # The released code's augmentation: crop and flip only.
    policy = augment.Policy(
        area=(0.08, 1.0), jitter=0.0, gray=0.0, blur=0.0,
        size=recipe["size"], mean=recipe["mean"], std=recipe["std"], centre=recipe["centre"])
    s = {
        "protocol": protocol,
        "note": note,
        **default,
        **given,
        **describe_backbone(args, backbone),
        **describe_data(args, recipe, train, val),
        # The test view.
        "size": policy.size,
        "mean": policy.mean,
        "std": policy.std,
        "centre": policy.centre,
        "views_given": [name for name in ("size", "mean", "std") if getattr(args, name) is not None],
        # How it is run.
        "seed": args.seed,
        "device": args.device,
        "amp": bool(args.amp),
        "world": world,
        "workers": args.workers,
        "save_minutes": args.save_minutes,
        "keep_every": args.keep_every,
    }
    if protocol in OPTIMIZERS and data.can_judge():  # the training view plays a part
        s["area"] = policy.area
        s["aspect"] = policy.aspect
        s["flip"] = policy.flip
        check_batch(s)
        s["lr"] = initial_lr(s["base_lr"], s["batch"])
    return s, policy


def describe_backbone(args, backbone):
    """The settings that say what is evaluated."""
    arch, width, cifar_stem = backbone.shape
    return {
        "backbone": args.ckpt,
        "sha256": backbone.sha256,             # of the file; None for an untrained network
        "pretrained_epochs": backbone.epochs,  # None where the file doesn't tell
        "arch": arch,
        "width": width,
        "cifar_stem": cifar_stem,
    }


def describe_data(args, recipe, train, val):
    """The settings that say on what it is evaluated."""
    return {
        "recipe": recipe["recipe"],
        "data": args.data,                           # None: the drawn shapes
        "range": train.value_range,
        "images": len(train),                        # later, those that can be read
        "val_images": len(val or ""),
        "classes": len(train.classes or ""),
    }


def default_folder(args, s):
    """Beside the checkpoint; for an untrained network under runs/."""
    folder = os.path.dirname(args.ckpt)
    if s["sha256"] is None:  # random:resnet18 lies nowhere
        folder = os.path.join("runs", f"{folder_name(args.data)}-{args.ckpt.replace(':', '-')}")
    return os.path.join(folder, f"lineval-{s['protocol']}")


def new_run(job, out, resuming, override):
    """The Run of a protocol that is done in parts: its layer, its optimiser, and how far they are."""
    s = job.settings
    torch.manual_seed(s["seed"])
    layer = linear_layer(job.network.num_features, s["classes"]).to(job.device)
    parts = {"model": layer, "optimizer": optimizer_for(s["protocol"], layer)}
    steps_per_epoch = len(job.train) // s["batch"]
    return Run(out, parts, s, steps_per_epoch, resuming, job.device, override)


def freeze(job, ckpt):
    """Put the network in eval mode, without gradients -> hashes of all its tensors, for check_frozen.

    In eval mode BN takes its running statistics, so that an image's features don't depend on its batch.
    The BN of an untrained network is calibrated first. Raises Refused where the processes have different
    weights.
    """
    if job.settings["sha256"] is None:
        job.network = calibrated(job.network, job.test_views, job.train)
        for statistics in job.network.buffers():
            dist.broadcast(statistics, 0)  # GPUs can differ in the last bits
    job.network.eval().requires_grad_(False)
    loaded = tensor_hashes(job.network)
    # 32 bits of each hash, added up, are a number that fits a float64.
    digest = sum(int(value[:8], 16) for value in loaded.values())
    if not same_everywhere(digest, job.device):
        raise Refused(f"{ckpt}: the processes have read different weights from it; put one file where all "
                      "of them read it")
    return loaded


def neighbors(train, val, bank, queries, rows=10, columns=8):
    """Some validation images, of each class in turn, (R,), and for each the training images nearest by
    cosine, (R, C)."""
    # Even steps through the images as sorted by class meet as many classes as there are rows.
    by_class = np.argsort(val.labels, kind="stable")
    rows = min(rows, len(val))
    chosen = by_class[np.linspace(0, len(val) - 1, rows).astype(int)]
    similarity = l2_normalize(queries[to_device(chosen, queries.device)]) @ l2_normalize(bank).T
    nearest = similarity.topk(min(columns, len(train)), dim=1).indices
    return chosen, nearest.cpu().numpy()


def start_block(s, data, backbone, device, out):
    """The lines that an evaluation starts with."""
    origin = "untrained, BN calibrated"
    if s["sha256"]:
        origin = f"sha256 {s['sha256'][:12]}, {describe_found(backbone.found, s['backbone'])}"
        if backbone.epochs is not None:
            origin = f"{backbone.epochs} epochs, {origin}"
    stem = ", CIFAR stem" if s["cifar_stem"] else ""
    trained = "k by the size of the classes"
    if "epochs" in s:
        base_lr = "by a sweep" if s["base_lr"] is None else s["base_lr"]
        trained = f"{s['epochs']} epochs, batch {s['batch']}, base lr {base_lr}"
    told = f"of recipe {s['recipe']}: the file names none"
    if backbone.settings:
        told = "as in its pre-training"
    if s["views_given"]:
        told = f"{', '.join(s['views_given'])} as given"
    mean, std = (" ".join(f"{v:g}" for v in s[name]) for name in ("mean", "std"))
    rows = {
        "backbone": f"{s['backbone']}: {s['arch']}, width {s['width']:g}{stem} ({origin})",
        **data.rows(),
        "views": f"{s['size']} pixels, mean {mean}, std {std} ({told}; --size --mean --std)",
        "protocol": f"{s['protocol']}: {s['note']}; {trained}",
        "processes": f"{s['world']}, {hardware(s, device)}",
        "writes to": out,
    }
    return "\n".join(f"{heading:12}{printable(text)}" for heading, text in rows.items())


def save_classifier(job, layer, path):
    """The linear layer's weight (C, D) and bias (C,), the classes' names, and which protocol made it."""
    content = {name: t.cpu() for name, t in layer.state_dict().items()}
    content["classes"] = job.train.classes
    content["note"] = job.settings["note"]
    save(content, path)


def save_features(path, train, bank, val=None, queries=None):
    """train_ and val_ features (n, D) float32; where there are any, labels (n,) and the names of the files
    (bytes).

    Of bad files there is nothing: whoever reads the features has the names beside them.
    """
    if dist.get_rank() > 0:
        return
    arrays = {}
    for split, source, v in (("train", train, bank), ("val", val, queries)):
        if source is None:
            continue
        arrays[f"{split}_features"] = v.cpu().numpy()
        if source.labels is not None:
            arrays["classes"] = np.array(source.classes)
            arrays[f"{split}_labels"] = source.labels
        if source.files is not None:
            arrays[f"{split}_files"] = source.names
    # Through an open file: given a name, numpy would put .npz behind it.
    with replacing(path) as f:
        np.savez(f, **arrays)


def write_result(out, job, judged, bad):
    """lineval.json: the accuracy first, then all that it could depend on.

        top1, top5                  percent of the validation images that could be read, after the last epoch
        protocol, note              which protocol, and whether it is the paper's
        base_lr, batch, epochs, lr  of the linear layer, where one was trained
        backbone, sha256, ...       what was evaluated
        data, content, ...          on what; content is a number that tells data sets apart
        views_given                 which of size, mean and std the command line named
        held_out_top1               cached: how each lr of the sweep did on held-out training images
        best_epoch_not_the_result   lars, sgd: for papers that report it
        images, val_images          those that could be read: a bad one takes no part in anything
        bad_images                  files that could not be read
    """
    result = {
        "top1": judged.top1,
        "top5": judged.top5,
        **job.settings,
        **judged.found,
        "bad_images": bad,
        "torch": torch.__version__,
        "hardware": device_name(job.device),
        "command": shlex.join(sys.argv),
    }
    with replacing(os.path.join(out, "lineval.json"), "w") as f:
        f.write(json.dumps(result, indent=1) + "\n")


def say_result(job, judged, bad_val, out):
    """The last two lines on the screen."""
    s = job.settings
    files = f"{os.path.join(out, 'lineval.json')}, neighbors.png"
    if judged.layer is not None:
        files += ", classifier.pth"
    images = f"all {s['val_images']}"
    if bad_val:
        images = f"the {s['val_images']} good ones of {s['val_images'] + bad_val}"
    job.say(f"{s['protocol']}: top-1 {judged.top1:.2f}%, top-5 {judged.top5:.2f}% on {images} validation "
            f"images ({s['note']})\ndone: {files}")


if __name__ == "__main__":
    run_and_leave("lineval.py", evaluate, parse())
