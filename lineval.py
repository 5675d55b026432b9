"""Frozen linear classification: how the paper judges what was learned (Sec. 4, supplement A).

    python lineval.py --ckpt runs/shapes/checkpoint.pth                 as its recipe calls for, on the data it was trained on
    python lineval.py IMAGENET --ckpt checkpoint_0099.pth.tar           the authors' checkpoint; also MoCo's, torchvision's
    python lineval.py CIFAR --ckpt random:resnet18                      an untrained network, to compare with
    torchrun --nproc-per-node 8 lineval.py --ckpt runs/IMAGENET/checkpoint.pth
    python lineval.py --ckpt runs/IMAGENET/checkpoint.pth --export torchvision          no evaluation: another file layout

Every protocol looks at pooled features of the frozen backbone in eval mode, and is judged on each validation image once:

    --lars      the paper's: 90 epochs, batch 4096, SGD with layer-wise rates, cosine      the default for recipe imagenet
    --sgd       MoCo's, the paper's alternative: 100 epochs, batch 256, lr 30 in steps    the default for cifar10
    --cached    not the paper's: features computed once, without augmentation, then a linear layer on them      for shapes
    --knn       not the paper's: no training, the classifier that pre-training is monitored with

Read top to bottom: the layer and its optimisers, the cached protocol, the backbone and its files, then the program.
"""
import collections
import hashlib
import json
import math
import os
import re
import shlex
import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn

import augment
import resnet
import simsiam
from simsiam import all_sum, require

# lr = base_lr x batch / 256, as in pre-training
PROTOCOLS = {
    "lars": {"base_lr": 0.1, "batch": 4096, "epochs": 90},   # supp. A. DEPARTURE: the released code's lr; the paper says 0.02
    "sgd": {"base_lr": 30.0, "batch": 256, "epochs": 100},   # supp. A's alternative, MoCo's
    "cached": {"base_lr": None, "batch": 256, "epochs": 100},
    "knn": {},
}
NOTE = {"lars": "the paper's protocol (supplement A), at the released code's base lr", "sgd": "MoCo's protocol, supplement A's alternative",
        "cached": "NOT the paper's protocol: a linear layer on features computed once, without augmentation",
        "knn": "NOT the paper's protocol: weighted kNN, no training"}
DEFAULT = {"imagenet": "lars", "cifar10": "sgd", "shapes": "cached"}  # by recipe
SWEEP = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)                # base_lr of the cached protocol


# --- The layer and its optimisers (supplement A) ---------------------------------------------------------------------

def linear_layer(features, classes):
    """All that is trained. Weight from a normal of std 0.01, bias 0, as in MoCo and the released code."""
    layer = nn.Linear(features, classes)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


class LARS(torch.optim.SGD):
    """SGD in which each tensor's gradient first gets a norm in proportion to the tensor's own (You et al. 2017), in the
    LARC form of the released code: no clipping, momentum after the scaling, bias included.

    A tensor or gradient that is zero takes the plain step, or a bias could never leave 0. At weight decay 0, the paper's, the
    scaling is done all the same.
    """

    def __init__(self, parameters, weight_decay=0.0, trust=0.001, eps=1e-8, **options):
        super().__init__(parameters, **options)
        self.lars_weight_decay, self.trust, self.eps = weight_decay, trust, eps

    @torch.no_grad()
    def step(self):
        for w in self.param_groups[0]["params"]:
            norm, grad_norm, wd = w.norm(), w.grad.norm(), self.lars_weight_decay
            rate = self.trust * norm / (grad_norm + wd * norm + self.eps)                   # LARS Alg. 1: local lr = trust |w| / (|gradient| + wd |w| + eps)
            w.grad = torch.where((norm > 0) & (grad_norm > 0), rate * (w.grad + wd * w), w.grad)
        super().step()


OPTIMIZERS = {"lars": LARS, "sgd": torch.optim.SGD}  # of the protocols that train on augmented views


def optimizer_for(protocol, layer):
    """Momentum 0.9 and no weight decay in both; the lr is set before every step."""
    return OPTIMIZERS[protocol](layer.parameters(), lr=0.0, momentum=0.9)


def lr_factor(protocol, step, total_steps):
    """The factor on the lr: half a cosine (lars), or x 0.1 after 60% and again after 80% of the steps (sgd: MoCo's 60 and
    80 of 100 epochs)."""
    if protocol == "lars":
        return simsiam.cosine(step, total_steps, 0)
    return 0.1 ** ((10 * step >= 6 * total_steps) + (10 * step >= 8 * total_steps))


def probe_step(layer, optimizer, v, labels, world):
    """One step of the linear layer on features (N, D) and labels (N,) of this process's share of the batch -> loss."""
    L = F.cross_entropy(layer(v), labels)
    optimizer.zero_grad()
    L.backward()
    for w in layer.parameters():
        all_sum(w.grad).div_(world)
    optimizer.step()
    return L.detach()


# --- The cached protocol ---------------------------------------------------------------------------------------------

def fit(features, labels, classes, lrs, epochs, batch, seed):
    """One linear classifier per lr, trained side by side on features (n, D): weights (R, D, C).

    Cross-entropy, SGD with momentum 0.9 and a cosine, from zero. One tensor holds all R, because a small matrix product takes
    as long for eight of them as for one.
    """
    lr = features.new_tensor(lrs).view(-1, 1, 1)
    w = features.new_zeros(len(lrs), features.shape[1], classes)
    velocity = torch.zeros_like(w)
    steps_per_epoch = math.ceil(len(features) / batch)
    for epoch in range(epochs):
        order = torch.from_numpy(augment.permutation(seed, epoch, len(features))).to(features.device)
        for step, rows in enumerate(order.split(batch), epoch * steps_per_epoch):
            x = features[rows]                                                          # (N, D)
            error = (x @ w).softmax(dim=2)                                              # (R, N, C)
            error[:, torch.arange(len(rows), device=x.device), labels[rows]] -= 1       # d cross-entropy / d logits
            velocity = 0.9 * velocity + x.T @ error / len(rows)
            w -= lr * simsiam.cosine(step, epochs * steps_per_epoch, 0) * velocity
    return w


def fit_cached(features, labels, classes, base_lrs, epochs, batch, seed):
    """The cached protocol: choose the lr on a tenth of the training features that the others are fitted without, then fit all
    of them with it. -> the linear layer for features as they are, base_lr, lr, {base_lr: held-out top-1 in percent}

    Features are standardised for the fit: what scale a backbone happens to have should not decide which lr is right.
    """
    mean, scale = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    x = F.pad((features - mean) / scale, (0, 1), value=1.0)  # (n, D + 1): a column of ones, whose weights are the biases
    lrs, held_out, best = [simsiam.initial_lr(base_lr, batch) for base_lr in base_lrs], {}, 0
    if len(base_lrs) > 1:
        order = torch.from_numpy(augment.permutation(seed, epochs, len(x))).to(x.device)
        judged, fitted = order.tensor_split([max(1, len(x) // 10)])
        logits = x[judged] @ fit(x[fitted], labels[fitted], classes, lrs, epochs, batch, seed)
        held_out = {base_lr: 100 * simsiam.hits(scores, labels[judged])[0].item() / len(judged) for base_lr, scores in zip(base_lrs, logits)}
        best = int(np.argmax(list(held_out.values())))
    w = fit(x, labels, classes, lrs[best:best + 1], epochs, batch, seed)[0]
    layer, weight = linear_layer(features.shape[1], classes).to(x.device), w[:-1] / scale[:, None]
    with torch.no_grad():
        layer.weight.copy_(weight.T)
        layer.bias.copy_(w[-1] - mean @ weight)
    return layer, base_lrs[best], lrs[best], held_out


# --- The frozen backbone, and the files it comes in ------------------------------------------------------------------

PREFIXES = ("module.encoder_q.", "module.encoder.", "encoder_q.", "encoder.", "module.", "")  # MoCo, released, ours, torchvision
KINDS = {  # (blocks have a third convolution, blocks per stage): arch
    (False, (2, 2, 2, 2)): "resnet18", (False, (3, 4, 6, 3)): "resnet34", (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101", (True, (3, 8, 36, 3)): "resnet152"}


class Backbone(NamedTuple):
    network: nn.Module         # the ResNet, without fc
    shape: tuple               # arch, width, cifar_stem
    left_out: dict = {}        # {name in the file: tensor}: projector, predictor, fc, ...
    settings: dict = {}        # of its pre-training, where the file is ours
    epochs: object = None      # of its pre-training, where the file tells
    sha256: object = None      # of the file


def untrained(arch, width, cifar_stem):
    """A ResNet as initialised, without fc. The global random numbers must have been seeded alike on all processes."""
    network = resnet.ARCHS[arch](width=width, cifar_stem=cifar_stem)
    network.fc = nn.Sequential()
    return Backbone(network, (arch, width, cifar_stem))


def read_backbone(path, width=None):
    """The ResNet in a file of any of the known layouts. Raises Refused where any of its tensors is missing, unexpected or of
    another shape. width: what to insist on; by default what the file tells, which rounding can hide if it is odd (1/3)."""
    sha256 = file_hash(path)
    state, epochs, settings = simsiam.read_weights(path)
    require((file_hash(path) == sha256, f"{path}: is being written; wait for it, or evaluate a copy"))
    prefix = next((p for p in PREFIXES if p + "conv1.weight" in state), None)
    require((prefix is not None, f"{path}: no ResNet in it: no tensor is called conv1.weight, with or without {', '.join(PREFIXES[:-1])}; "
                                 f"it has {', '.join(groups(state))[:200] or 'nothing'}"))
    tensors = {name[len(prefix):]: t for name, t in state.items() if name.startswith(prefix) and not name.startswith(prefix + "fc.")}
    left_out = {name: t for name, t in state.items() if not name.startswith(prefix) or name.startswith(prefix + "fc.")}
    blocks = tuple(len({name.split(".")[1] for name in tensors if name.startswith(f"layer{k}.")}) for k in range(1, 5))
    stem = tensors["conv1.weight"].shape
    arch = KINDS.get(("layer1.0.conv3.weight" in tensors, blocks))
    require((len(stem) == 4 and min(stem) > 0, f"{path}: conv1.weight is {tuple(stem)}, no convolution"),
            (arch, f"{path}: its stages have {blocks} blocks, as none of {', '.join(resnet.ARCHS)} has"))
    backbone = untrained(arch, width or settings.get("width", stem[0] / 64), stem[-1] == 3)
    if not any("num_batches_tracked" in name for name in tensors):  # older than PyTorch 0.4.1, as some of torchvision's
        tensors |= {name: t for name, t in backbone.network.state_dict().items() if "num_batches_tracked" in name}
    simsiam.load_strictly(backbone.network, tensors, path)
    return backbone._replace(left_out=left_out, settings=settings, epochs=epochs, sha256=sha256)


def file_hash(path):
    require((os.path.isfile(path), f"{path}: no such file; nor one of {', '.join('random:' + arch for arch in resnet.ARCHS)}"))
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def groups(names):
    """Names, or where many share a beginning, that: {"module.predictor.*": 8, ...}"""
    return collections.Counter(re.sub(r"^(.*?\b(fc|predictor|encoder_k|layer\d))\..*", r"\1.*", name) for name in names)


def fingerprint(network):
    """{name: hash of the bytes} of all parameters and buffers."""
    return {name: hashlib.sha256(t.cpu().contiguous().numpy().tobytes()).hexdigest() for name, t in network.state_dict().items()}


def check_frozen(network, loaded):
    """Raise Refused, naming the tensors, unless every parameter and buffer is bit for bit what it was when `loaded` was taken."""
    changed = [name for name, value in fingerprint(network).items() if value != loaded[name]]
    require((not changed, f"the backbone has changed during the evaluation ({', '.join(changed[:3])}; {len(changed)} tensors): "
                          "its accuracy would mean nothing; please report this"))


def export(path, layout, out):
    """Write the network in a file of another layout: torchvision's (without fc), or the authors' released one."""
    backbone = read_backbone(path)
    arch, width, cifar_stem = backbone.shape
    if layout == "torchvision":
        name, content = f"{arch}-torchvision.pth", backbone.network.state_dict()
    else:
        state = {f"module.encoder.{name}": t for name, t in backbone.network.state_dict().items()}
        heads = {name.removeprefix("module."): t for name, t in backbone.left_out.items()}
        state |= {f"module.{name}": t for name, t in heads.items() if name.startswith(("encoder.fc.", "predictor."))}
        for name in [name for name in heads if name.startswith("encoder.fc.") and heads[name].dim() == 2][-1:]:
            state[f"module.{name.replace('weight', 'bias')}"] = torch.zeros(len(heads[name]))  # theirs has one, which BN voids
        name, content = "released.pth.tar", {"epoch": backbone.epochs or 0, "arch": arch, "state_dict": state}
    target = os.path.join(out or os.path.dirname(path), name)
    require((not os.path.exists(target), f"{target}: exists already; move it away, or name another folder with --out"))
    os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
    simsiam.save(content, target)
    odd = width != 1 or cifar_stem
    print(f"{target}: {arch}, {len(content.get('state_dict', content))} tensors in {layout}'s layout"
          + f"; not the standard {arch}: width {width:g}{', CIFAR stem' * cifar_stem}" * odd)


# --- The picture -----------------------------------------------------------------------------------------------------

def draw_neighbors(path, train, val, bank, queries, rows=10, columns=8, tile=96):
    """Validation images (left), of each class in turn, with the training images nearest by the cosine of their features, the
    nearest first: framed green where the class is the same, red where it is another."""
    gap, text, font = 6, 16, ImageFont.load_default(12)
    chosen = np.argsort(val.labels, kind="stable")[np.linspace(0, len(val) - 1, min(rows, len(val))).astype(int)]
    similarity = simsiam.l2_normalize(queries[torch.from_numpy(chosen)]) @ simsiam.l2_normalize(bank).T
    nearest = similarity.topk(min(columns, len(train)), dim=1).indices.cpu().numpy()
    cell = tile + 2 * gap
    sheet = Image.new("RGB", ((1 + nearest.shape[1]) * cell + 2 * gap, len(chosen) * (cell + text)), "white")
    pen = ImageDraw.Draw(sheet)

    def show(source, i, left, top, frame):
        pen.rectangle((left + gap - 3, top + gap - 3, left + gap + tile + 2, top + gap + tile + 2), fill=frame)
        sheet.paste(ImageOps.pad(Image.fromarray(source.image(i).numpy()), (tile, tile), color="white"), (left + gap, top + gap))
        name = source.classes[source.labels[i]]
        while pen.textlength(name, font) > tile:
            name = name[:-1]
        pen.text((left + gap, top + gap + tile + 4), name, frame, font)

    for row, i in enumerate(chosen):
        top = row * (cell + text)
        show(val, i, 0, top, "black")
        for column, k in enumerate(nearest[row], 1):
            show(train, k, column * cell + 2 * gap, top, "#2a9d3a" if train.labels[k] == val.labels[i] else "#d62728")
    with simsiam.replacing(path) as f:
        sheet.save(f, "png")


# === Plumbing only below =============================================================================================

def parse(argv=None):
    parser = simsiam.new_parser("lineval.py", "Evaluate a frozen backbone.", data="what the checkpoint was trained on; shapes: the drawn ones",
                                out="lineval-<protocol>, beside the checkpoint", amp="off")
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint.pth or backbone.pth of simsiam.py, the authors' released "
                        "layout, MoCo's, torchvision's; or random:resnet50 for an untrained network")
    protocol = parser.add_mutually_exclusive_group()
    for name in PROTOCOLS:
        protocol.add_argument(f"--{name}", dest="protocol", action="store_const", const=name, help=NOTE[name])
    for name, kind in (("base_lr", simsiam.number), ("batch", int), ("epochs", int)):
        shown = ", ".join(f"{protocol} {values[name] or 'by a sweep'}" for protocol, values in PROTOCOLS.items() if values)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=shown)
    parser.add_argument("--width", type=simsiam.number, help="of the network (default: the file's own; random: the recipe's)")
    parser.add_argument("--features", metavar="FILE.npz", help="save features, labels and file names of both splits there")
    parser.add_argument("--export", choices=("torchvision", "released"), help="write the network in this layout, and evaluate nothing")
    return parser.parse_args(argv)


def open_all(args):
    """What is evaluated, on what -> Backbone, settings of its pre-training or else the data's recipe, (train, val) Sources."""
    arch = {f"random:{arch}": arch for arch in resnet.ARCHS}.get(args.ckpt)
    backbone = None if arch else read_backbone(args.ckpt, args.width)
    saved = backbone.settings if backbone else {}
    require((args.data or saved or not backbone, f"{args.ckpt}: doesn't say what it was trained on; name the DATA (shapes: the drawn ones)"))
    args.data = None if args.data == "shapes" else args.data or saved.get("data")
    train, val = augment.open_data(args.data, saved.get("seed", args.seed))
    require((train.labels is not None and val is not None,
             f"{args.data}: linear evaluation needs labels: train/<class>/... and val/<class>/..., or CIFAR-10"))
    recipe = saved or simsiam.recipe_for(args.data, train)
    if backbone is None:
        torch.manual_seed(args.seed)  # the weights that pre-training with this seed starts from
        backbone = untrained(arch, args.width or recipe["width"], recipe["cifar_stem"])
    return backbone, recipe, (train, val)


def resolve(args, backbone, recipe, train, val, world):
    """The settings of the evaluation. Raises Refused for impossible ones."""
    protocol = args.protocol or DEFAULT[recipe["recipe"]]
    trains, default = protocol in OPTIMIZERS, PROTOCOLS[protocol]
    given = {name: getattr(args, name) for name in ("base_lr", "batch", "epochs") if getattr(args, name) is not None}
    require((default or not given, f"--{'/--'.join(given)}: --knn trains nothing"),
            (trains or args.resume != "yes", f"--resume: --{protocol} is not done in parts; give another --out, or nothing, to do it again"),
            (min(len(train), len(val)) >= world, f"{args.data}: {len(train)} training and {len(val)} validation images for {world} processes"))
    changed = [f"{name} {value} instead of {default[name] or 'a sweep'}" for name, value in given.items() if value != default[name]]
    arch, width, cifar_stem = backbone.shape
    # the released code's augmentation: crop and flip only
    policy = augment.Policy(area=(0.08, 1.0), jitter=0.0, gray=0.0, blur=0.0, **{name: recipe[name] for name in ("size", "mean", "std", "centre")})
    s = {"protocol": protocol, "note": NOTE[protocol] + (f", but with {', '.join(changed)}" if changed else ""), **default, **given,
         "backbone": args.ckpt, "sha256": backbone.sha256, "pretrained_epochs": backbone.epochs, "arch": arch, "width": width,
         "cifar_stem": cifar_stem, "recipe": recipe["recipe"], "data": args.data, "data_seed": recipe.get("seed", args.seed),
         "images": len(train), "val_images": len(val), "classes": len(train.classes), "size": policy.size, "mean": policy.mean,
         "std": policy.std, "centre": policy.centre, **({"area": policy.area, "aspect": policy.aspect, "flip": policy.flip} if trains else {}),
         "seed": args.seed, "device": args.device, "amp": bool(args.amp), "world": world, "workers": args.workers, "save_minutes": args.save_minutes}
    simsiam.check(s if trains else {**s, "batch": world})
    if trains:
        s["lr"] = simsiam.initial_lr(s["base_lr"], s["batch"])
    return s, policy


def evaluate(args):
    # 1. Backbone, data, settings: nothing is written before all of it is known to be good
    simsiam.check_limits(vars(args))
    device, rank, world = simsiam.join_world(torch.device(args.device))
    if args.export:
        return export(args.ckpt, args.export, args.out) if rank == 0 else None
    backbone, recipe, data = open_all(args)
    train, val = data
    s, policy = resolve(args, backbone, recipe, train, val, world)
    trains = s["protocol"] in OPTIMIZERS
    folder = os.path.dirname(args.ckpt) if s["sha256"] else os.path.join("runs", f"{simsiam.name_of(args.data)}-{args.ckpt.replace(':', '-')}")
    out = args.out or os.path.join(folder, f"lineval-{s['protocol']}")
    resuming = simsiam.holds_run(out, ["checkpoint.pth", "checkpoint-previous.pth", "lineval.json"], args.resume if trains else None, device)
    require((not args.features or resuming or not os.path.exists(args.features), f"--features {args.features}: exists already; name another file"))

    # 2. The layer, and the frozen backbone
    network = backbone.network.to(device, memory_format=resnet.fastest_layout(backbone.network, device))
    if trains:
        torch.manual_seed(s["seed"])
        layer = linear_layer(network.num_features, s["classes"]).to(device)
        parts = {"model": layer, "optimizer": optimizer_for(s["protocol"], layer)}
        run = simsiam.Run(out, parts, s, len(train) // s["batch"], resuming, device, args.override)
    progress = simsiam.Progress(math.ceil(len(train) / world / 256) + math.ceil(len(val) / world / 256), quiet=rank > 0)
    progress.line(describe(s, backbone, device, out))
    run.begin() if trains else os.makedirs(out, exist_ok=True)
    if s["sha256"] is None:
        network = simsiam.calibrated(network, train, policy, device, s["workers"])
        for statistics in network.buffers():
            dist.broadcast(statistics, 0)  # GPUs can differ in the last bits
    network.eval().requires_grad_(False)
    loaded = fingerprint(network)
    digest = int(hashlib.sha256("".join(loaded.values()).encode()).hexdigest()[:8], 16)
    require((simsiam.same_everywhere(digest, device),
             f"{args.ckpt}: the processes have read different weights from it; put one file where all of them read it"))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=s["amp"])

    def features(x):
        """Images (N, 3, S, S) -> (N, D), in pieces, because a batch of 4096 need not fit a GPU whole."""
        with autocast:
            return torch.cat([network.features(part).float() for part in x.split(256)])

    # 3. Features of all images as they are: to classify, to save, to look at
    def watched(x):
        progress.step(lambda: f"features of {len(train)} + {len(val)} images")
        return features(x)

    bank, queries = (simsiam.extract(watched, source, policy, device, s["workers"]) for source in data)
    labels, truth = (torch.from_numpy(source.labels).to(device) for source in data)
    require((bank.isfinite().all() and queries.isfinite().all(), f"{args.ckpt}: its features are not all finite; the run that wrote it had diverged"))
    if rank == 0:
        draw_neighbors(os.path.join(out, "neighbors.png"), train, val, bank, queries)

    # 4. Classify
    def test(layer):
        """Top-1 and top-5 in percent over all validation images."""
        with torch.no_grad():
            return simsiam.accuracy(lambda mine: layer(queries[mine]), truth)

    found = {}
    if s["protocol"] == "knn":
        top1, top5 = simsiam.knn_accuracy(bank, labels, queries, truth)
    elif s["protocol"] == "cached":
        sweep = SWEEP if s["base_lr"] is None else [s["base_lr"]]
        layer, found["base_lr"], found["lr"], found["held_out_top1"] = fit_cached(bank, labels, s["classes"], sweep, s["epochs"], s["batch"], s["seed"])
        for w in layer.parameters():
            dist.broadcast(w.data, 0)  # on GPUs the processes' fits can differ in the last bits
        top1, top5 = test(layer)
        if len(sweep) > 1:
            end = "; the best is at an end of the sweep: try --base-lr beyond it" * (found["base_lr"] in (sweep[0], sweep[-1]))
            progress.line("held-out top-1 by base lr: " + ", ".join(f"{lr:g} {percent:.1f}%" for lr, percent in found["held_out_top1"].items()) + end)
    else:
        top1, top5 = train_layer(run, s, features, train, policy, labels, test)
        best = max(run.epochs(), key=lambda record: record["top1"])
        found["best_epoch_not_the_result"] = {"epoch": best["epoch"], "top1": best["top1"]}
    check_frozen(network, loaded)
    found["bad_images"] = sum(simsiam.bad_images(source, device) for source in data)

    # 5. The number
    if rank == 0:
        if s["protocol"] != "knn":
            weights = {name: t.cpu() for name, t in layer.state_dict().items()}
            simsiam.save({**weights, "classes": train.classes, "note": s["note"]}, os.path.join(out, "classifier.pth"))
        if args.features:
            save_features(args.features, data, (bank, queries))
        result = {"top1": top1, "top5": top5, **s, **found, "torch": torch.__version__, "hardware": simsiam.device_name(device),
                  "command": shlex.join(sys.argv)}
        with simsiam.replacing(os.path.join(out, "lineval.json"), "w") as f:
            f.write(json.dumps(result, indent=1) + "\n")
    if trains:
        run.record("end", epochs=run.epoch, top1=top1, top5=top5)
    progress.line(f"{s['protocol']}: top-1 {top1:.2f}%, top-5 {top5:.2f}% on all {len(val)} validation images ({s['note']})\n"
                  f"done: {os.path.join(out, 'lineval.json')}, neighbors.png" + ", classifier.pth" * (s["protocol"] != "knn"))


def train_layer(run, s, features, train, policy, labels, test):
    """The lars and sgd protocols: train on augmented views, test after every epoch -> the last epoch's top-1 and top-5. Raises
    Refused where the loss stops being finite. DEPARTURE: an epoch's last, incomplete batch is dropped; the released code uses it."""
    layer, optimizer = run.parts["model"], run.parts["optimizer"]
    rank, world, total_steps = dist.get_rank(), dist.get_world_size(), s["epochs"] * run.steps_per_epoch
    progress = simsiam.Progress(total_steps - run.epoch * run.steps_per_epoch - run.step, quiet=rank > 0)
    batches = augment.steps(s["seed"], len(train), s["batch"], s["epochs"], run.epoch, run.step, rank, world)
    views = run.waiting_for(augment.load_views(train, policy, s["seed"], batches, run.device, s["workers"], views=1))
    while run.epoch < s["epochs"]:
        for step, (index, (x,)) in run.rest_of_epoch(views):
            optimizer.param_groups[0]["lr"] = s["lr"] * lr_factor(s["protocol"], step, total_steps)
            L = probe_step(layer, optimizer, features(x), labels[augment.on(labels, index)], world)
            L = run.watch(L, optimizer, torch.zeros_like(L))
            progress.step(lambda: f"epoch {run.epoch + 1}/{s['epochs']}  step {run.step}/{run.steps_per_epoch}  loss {L.item():.4f}  "
                          f"{s['batch'] * run.step / run.seconds:.0f} images/s")
        top1, top5 = test(layer)
        record = run.record("epoch", epoch=run.epoch + 1, step=(run.epoch + 1) * run.steps_per_epoch, loss=run.means[0],
                            lr=optimizer.param_groups[0]["lr"], top1=top1, top5=top5, **run.speed())
        progress.line("epoch {epoch}/{epochs}  loss {loss:.4f}  lr {lr:.4g}  top-1 {top1:.2f}%  top-5 {top5:.2f}%  {images_per_s:.0f} images/s"
                      .format(epochs=s["epochs"], **record))
        run.next_epoch()
    return top1, top5


def describe(s, backbone, device, out):
    """The block that an evaluation starts with."""
    left_out = ", ".join(f"{name} ({count})" for name, count in groups(backbone.left_out).items()) or "nothing"
    known = "" if backbone.epochs is None else f"{backbone.epochs} epochs, "
    origin = f"{known}sha256 {s['sha256'][:12]}, {len(backbone.network.state_dict())} tensors matched; " \
             f"left out: {left_out}" if s["sha256"] else "untrained, BN calibrated"
    how = f"{s['epochs']} epochs, batch {s['batch']}, base lr {'by a sweep' if s['base_lr'] is None else s['base_lr']}" if "epochs" in s else "k 200"
    return "\n".join([
        f"backbone    {s['backbone']}: {s['arch']}, width {s['width']:g}{', CIFAR stem' * s['cifar_stem']} ({origin})",
        f"data        {s['data'] or 'shapes (drawn)'}: {s['images']} training and {s['val_images']} validation images, {s['classes']} classes, "
        f"{s['size']}-pixel views",
        f"protocol    {s['protocol']}: {s['note']}; {how}",
        f"processes   {s['world']}, {simsiam.hardware(s, device)}",
        f"writes to   {out}"])


def save_features(path, data, features):
    """train_ and val_ features (n, D) float32, labels (n,) and, where images have files, their names (bytes)."""
    arrays = {"classes": np.array(data[0].classes)}
    for split, source, v in zip(("train", "val"), data, features):
        arrays |= {f"{split}_features": v.cpu().numpy(), f"{split}_labels": source.labels}
        arrays |= {} if source.files is None else {f"{split}_files": source.files}
    with simsiam.replacing(path) as f:
        np.savez(f, **arrays)


if __name__ == "__main__":
    simsiam.leave(simsiam.launch("lineval.py", evaluate, parse()))
