"""Linear evaluation of a frozen backbone, as in the paper (Sec. 4, supplement A).

    python lineval.py --ckpt runs/shapes/checkpoint.pth           its recipe's protocol, on its own data
    python lineval.py IMAGENET --ckpt checkpoint_0099.pth.tar     the authors' file, MoCo's or torchvision's
    python lineval.py CIFAR --ckpt random:resnet18                an untrained network, for comparison
    torchrun --nproc-per-node 8 lineval.py --ckpt runs/IMAGENET/checkpoint.pth
    python lineval.py --ckpt runs/IMAGENET/checkpoint.pth --export torchvision      another file layout
    python lineval.py PHOTOS --ckpt CKPT --classify classifier.pth                  a table of classes

Every protocol uses pooled features of the frozen backbone in eval mode. Its accuracy is over the validation
images' features, which are computed once; every image counts once:

    --lars    the paper's: 90 epochs, batch 4096, SGD with layer-wise rates, cosine     default for imagenet
    --sgd     MoCo's, the paper's alternative: 100 epochs, batch 256, lr 30 in steps    default for cifar10
    --cached  not the paper's: features computed once, then a linear layer on them      default for shapes
    --knn     not the paper's: no training; the classifier that monitors pre-training

Where the images are so few that the default would make fewer than 1,000 steps, cached takes its place.

Order of this file:

    1. the linear layer, and LARS           4. cached: training on features
    2. the protocols, in a table            5. kNN
    3. lars and sgd: training on views      6. the program: `evaluate` is a whole evaluation

harness/evaluation reads backbone files, extracts features, and prints and writes the result.
Shapes in comments: n images of a split, N of a batch, D features, C classes, R learning rates.
"""
import math
import os
from functools import partial
from typing import NamedTuple

# harness comes before torch, because it sets how torch's threads wait.
from harness.common.draws import permutation
from harness.common.errors import Refused
from harness.common.machine import set_threads, to_device
from harness.common.progress import Progress, start_block, warn
from harness.data.images import read_image
from harness.data.loading import index_batches
from harness.data.opening import Validation, open_data
from harness.evaluation import backbones
from harness.evaluation.features import Frozen, accuracy, neighbours
from harness.evaluation.result import describe_accuracy, describe_evaluation, read_classifier
from harness.evaluation.result import save_features, settings_in, write_classes, write_result
from harness.training.ends import handle_signals, run_and_leave, stop_now
from harness.training.folder import CHECKPOINTS, check_new, compare_settings, enter, folder_name
from harness.training.options import check_batch, check_limits, named, new_parser, number, weights_file
from harness.training.processes import all_sum, check_same, join_world, mean_over_processes
from harness.training.recipes import recipe_for
from harness.training.run import Job, Run

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import augment
import resnet
from simsiam import HELP, SETTINGS, cosine, gradient_norm, initial_lr, knn_accuracy, test_views

# --- 1. The linear layer, and LARS (supplement A) --------------------------------------------------------


def linear_layer(features, classes):
    """The layer of lars and sgd: weight normal with std 0.01, bias 0, as in MoCo and the released code."""
    # This uses the global random numbers: first seed them alike on all processes.
    layer = nn.Linear(features, classes)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


class LARS(torch.optim.Optimizer):
    """SGD whose gradients are first rescaled to norms proportional to their weights' (You et al. 2017).

    local lr = trust |w| / (|gradient| + wd |w| + eps), for each tensor w separately, in the LARC form of the
    released code: no clipping, momentum after the scaling, bias included. If a tensor or its gradient is
    zero, the step is plain; otherwise a bias could never leave 0. We scale at weight decay 0, the paper's,
    too.
    """

    def __init__(self, parameters, lr, momentum, weight_decay=0.0, trust=0.001, eps=1e-8):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.trust = trust
        self.eps = eps

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    self.update(w, **group)

    def update(self, w, lr, momentum, weight_decay, **others):
        """One step of one tensor, whose gradient is w.grad."""
        norm = w.norm()
        grad_norm = w.grad.norm()
        rate = self.trust * norm / (grad_norm + weight_decay * norm + self.eps)  # LARS Alg. 1: local lr
        scaled = rate * (w.grad + weight_decay * w)
        gradient = torch.where((norm > 0) & (grad_norm > 0), scaled, w.grad)
        self.momentum_step(w, gradient, lr, momentum)

    def momentum_step(self, w, gradient, lr, momentum):
        """The rest is SGD with momentum."""
        velocity = self.state[w].get("momentum_buffer")
        if velocity is None:
            velocity = self.state[w]["momentum_buffer"] = torch.zeros_like(w)
        velocity.mul_(momentum).add_(gradient)
        w.sub_(velocity, alpha=lr)


# --- 2. The protocols ------------------------------------------------------------------------------------

def half_cosine(step, total_steps):
    """The factor on the lr: from 1 to 0 along half a cosine, without warm-up."""
    return cosine(step, total_steps, 0)


def in_two_steps(step, total_steps):
    """The factor on the lr: a tenth from 60% of the steps on, a hundredth from 80% on."""
    # MoCo's 60 and 80 of 100 epochs. In integers, because 0.6 times the steps would be rounded.
    decays = (10 * step >= 6 * total_steps) + (10 * step >= 8 * total_steps)
    return 0.1 ** decays


class Protocol(NamedTuple):
    """How a frozen backbone is judged.

    optimizer       what trains the layer on augmented views; its lr is set before every step. None: no views
    schedule        (step, total_steps) -> the factor on that lr
    base_lr         lr = base_lr x batch / 256, as in pre-training. None: the best of SWEEP
    batch, epochs   None: nothing is trained
    note            for the screen and lineval.json, so that nobody mistakes our number for the paper's
    """
    optimizer: object = None
    schedule: object = None
    base_lr: object = None
    batch: object = None
    epochs: object = None
    note: str = ""


# DEPARTURE: lars has the released code's lr, 0.1 per 256 images. The paper says 0.02.
PROTOCOLS = {
    "lars": Protocol(
        partial(LARS, lr=0.0, momentum=0.9), half_cosine, 0.1, 4096, 90,
        "the paper's protocol (supplement A), at the released code's base lr"),
    "sgd": Protocol(
        partial(torch.optim.SGD, lr=0.0, momentum=0.9), in_two_steps, 30.0, 256, 100,
        "MoCo's protocol, supplement A's alternative"),
    "cached": Protocol(
        None, None, None, 256, 100,
        "NOT the paper's protocol: a linear layer on features computed once, without augmentation"),
    "knn": Protocol(note="NOT the paper's protocol: weighted kNN, no training"),
}
SWEEP = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)                # base_lr of the cached protocol
ENOUGH_IMAGES = 10_000                                                # for its choice of the lr by one fit
FILES = (*CHECKPOINTS, "lineval.json")                                # a folder with any has an evaluation
DEFAULT = {"imagenet": "lars", "cifar10": "sgd", "shapes": "cached"}  # by recipe
ENOUGH_STEPS = 1000                                                   # without them, cached is the default
FEW_IMAGES = "lars ended 20 points below --cached on 4,200 images of CIFAR-10; use --cached"
OF_THE_LAYER = ("base_lr", "batch", "epochs")                         # options of what trains the layer


class Judged(NamedTuple):
    """What a protocol measured."""
    accuracy: dict        # on all validation images that could be read: {name: percent}
    layer: object = None  # the linear layer, if one was trained
    found: dict = {}      # other entries of lineval.json


def test_layer(job, layer, queries):
    """Accuracies on all validation images, from their features queries (n, D): {name: percent}"""
    truth = to_device(job.val.labels, job.device)
    with torch.no_grad():
        return accuracy(lambda mine: layer(queries[mine]), truth)


# --- 3. lars and sgd: training on views ------------------------------------------------------------------

def probe_step(layer, optimizer, v, labels, world):
    """One step of the linear layer, on features v (N, D) and labels (N,) of this process's share -> its loss.

    The layer is small, so its gradients are averaged here, with one sum over the processes each, not by
    DistributedDataParallel. The loss returned is this process's own.
    """
    L = F.cross_entropy(layer(v), labels)
    optimizer.zero_grad()
    L.backward()
    for w in layer.parameters():
        all_sum(w.grad).div_(world)
    optimizer.step()
    return L.detach()


def train_on_views(job, frozen, policy, queries, override):
    """The lars and sgd protocols: an epoch sees each training image once, cropped and flipped at random.

    The validation images judge the layer after every epoch; the last epoch's result counts. sgd gives about
    one point less than lars (supplement A). Raises Refused if the loss stops being finite.

    queries     features of the validation images (n, D)
    override    names of settings that may differ from those of the resumed run
    DEPARTURE: an epoch's last, incomplete batch is dropped; the released code uses it.
    """
    s = job.settings
    protocol = PROTOCOLS[s["protocol"]]
    torch.manual_seed(s["seed"])
    layer = linear_layer(frozen.network.num_features, s["classes"]).to(job.device)
    optimizer = protocol.optimizer(layer.parameters())
    parts = {"model": layer, "optimizer": optimizer}
    steps_per_epoch = len(job.train) // s["batch"]
    total_steps = s["epochs"] * steps_per_epoch
    run = Run(job, parts, steps_per_epoch, override)
    run.begin()
    progress = Progress(total_steps - run.position(), quiet=not run.first)
    batches = index_batches(
        s["seed"], len(job.train), s["batch"], s["epochs"],
        run.epoch, run.step, dist.get_rank(), s["world"])
    views = augment.load_views(
        job.train, policy, s["seed"], batches, job.device, s["workers"], views=1, waiting=run.waiting_for)
    labels = to_device(job.train.labels, job.device)
    while run.epoch < s["epochs"]:
        for step, batch in run.steps_of_epoch(views):
            index, [x] = batch
            optimizer.param_groups[0]["lr"] = s["lr"] * protocol.schedule(step, total_steps)
            truth = labels[to_device(index, job.device)]
            L = probe_step(layer, optimizer, frozen.features(x), truth, s["world"])
            L = mean_over_processes(L)
            run.add_to_means(L)
            run.check_finite(L, gradient_norm(optimizer))
            run.save_or_stop_if_asked()
            progress.step(lambda: f"{run.place()}  loss {L.item():.4f}  {run.rate():.0f} images/s")
        frozen.check()
        progress.line(end_epoch(run, optimizer, test_layer(job, layer, queries)))
    # We choose the best epoch by the validation images, so it is no result. Some papers report it.
    best = max(run.log.epochs(), key=lambda record: record["top1"])
    found = {"best_epoch_not_the_result": {"epoch": best["epoch"], "top1": best["top1"]}}
    judged = Judged(test_layer(job, layer, queries), layer, found)
    run.log.add("end", epochs=run.epoch, **judged.accuracy)
    return judged


def end_epoch(run, optimizer, found):
    """Log a finished epoch and the accuracies found, and go to the next -> a line for the screen."""
    number = run.epoch + 1
    loss = run.means[0]
    lr = optimizer.param_groups[0]["lr"]
    line = (f"epoch {number}/{run.settings['epochs']}  loss {loss:.4f}  lr {lr:.4g}  "
            f"{describe_accuracy(found)}  {run.rate():.0f} images/s")
    run.log.add("epoch", epoch=number, step=number * run.steps_per_epoch, loss=loss, lr=lr, **found,
                **run.speed())
    run.next_epoch()
    return line


# --- 4. cached: training on features ---------------------------------------------------------------------

def fit(features, labels, classes, lrs, epochs, batch, seed):
    """One linear classifier per lr, trained side by side on features (n, D): weights (R, D, C).

    labels      (n,) int64, from 0 to classes - 1
    lrs         the R initial learning rates; half a cosine takes each to 0
    batch       images per batch; an epoch's last, incomplete batch is used too
    seed        seed of the order of the images

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
            w -= lr * half_cosine(step, epochs * steps_per_epoch) * velocity
    return w


def fit_cached(features, labels, classes, base_lrs, epochs, batch, seed):
    """The cached protocol's layer on features (n, D), trained with the best of these learning rates.

    -> the layer, its base_lr, its lr, {base_lr: held-out top-1 in percent}
    We judge the learning rates on held-out images; then we fit all images with the best. Features are
    standardised for the fit, because the scale of a backbone's features should not decide which lr is right.
    """
    mean = features.mean(dim=0)                                       # (D,)
    scale = features.std(dim=0).clamp(min=1e-6)                       # (D,)
    # A column of ones stands for the bias: its weights are the biases.
    x = F.pad((features - mean) / scale, (0, 1), value=1.0)           # (n, D + 1)
    base_lr = base_lrs[0]
    held_out = {}
    if len(base_lrs) > 1:  # the validation images play no part in the choice
        base_lr, held_out = choose_lr(x, labels, classes, base_lrs, epochs, batch, seed)
    lr = initial_lr(base_lr, batch)
    w, = fit(x, labels, classes, [lr], epochs, batch, seed)
    # The layer gets raw features, so the standardisation is folded into its weight and bias.
    weight = w[:-1] / scale[:, None]                                  # (D, C)
    layer = linear_layer(features.shape[1], classes).to(x.device)
    with torch.no_grad():
        layer.weight.copy_(weight.T)
        layer.bias.copy_(w[-1] - mean @ weight)
    return layer, base_lr, lr, held_out


def choose_lr(x, labels, classes, base_lrs, epochs, batch, seed):
    """The best of these base_lrs for fits to x (n, D) -> it, {base_lr: held-out top-1 in percent}

    Held out is a tenth of the images, or one tenth after the other until ENOUGH_IMAGES have taken part in
    fits. A tenth of 10,000 images or more decides by top-1. Fewer decide by cross-entropy, which differs
    less by chance; at the best scale of the scores, because top-1 does not depend on their scale.
    """
    lrs = [initial_lr(base_lr, batch) for base_lr in base_lrs]
    order = to_device(permutation(seed, epochs, len(x)), x.device)    # no epoch's order
    folds = order.split(max(1, len(x) // 10))[:math.ceil(ENOUGH_IMAGES / len(x))]
    scores = []
    for judged in folds:
        fitted = order[~torch.isin(order, judged)]
        w = fit(x[fitted], labels[fitted], classes, lrs, epochs, batch, seed)  # (R, D, C)
        scores.append(x[judged] @ w)
    scores = torch.cat(scores, dim=1)                                 # (R, M, C)
    truth = labels[torch.cat(folds)]                                  # (M,)
    right = (scores.argmax(dim=2) == truth).sum(dim=1)                # (R,)
    top1 = 100 * right.double() / len(truth)                          # (R,)
    merit = top1
    if len(folds) > 1:
        scales = [2.0 ** k for k in range(-9, 10)]
        losses = [min(F.cross_entropy(scale * logits, truth) for scale in scales) for logits in scores]
        merit = -torch.stack(losses)
    return base_lrs[merit.argmax()], dict(zip(base_lrs, top1.tolist()))


def cached(job, bank, queries):
    """Not the paper's: train on features that are computed once, which takes seconds instead of hours.

    bank, queries   features of the training and validation images, (n, D) each
    Without augmentation the layer overfits sooner, and the result differs from the paper's by a few points.
    """
    s = job.settings
    labels = to_device(job.train.labels, job.device)
    base_lrs = SWEEP if s["base_lr"] is None else [s["base_lr"]]  # --base-lr: no sweep
    layer, base_lr, lr, held_out = fit_cached(
        bank, labels, s["classes"], base_lrs, s["epochs"], s["batch"], s["seed"])
    for w in layer.parameters():
        dist.broadcast(w.data, 0)  # on GPUs the processes' fits can differ in the last bits
    found = {"base_lr": base_lr, "lr": lr, "held_out_top1": held_out}
    return Judged(test_layer(job, layer, queries), layer, found)


# --- 5. kNN ----------------------------------------------------------------------------------------------

def knn(job, bank, queries, asked):
    """Not the paper's: without training, each validation image gets the class of its nearest training images.

    The same classifier monitors pre-training; its precision may differ. bank, queries: see cached. asked:
    --knn-k
    """
    labels = to_device(job.train.labels, job.device)
    truth = to_device(job.val.labels, job.device)
    k = neighbours(len(bank), len(job.train.classes), asked)
    found = knn_accuracy(bank, labels, queries, truth, k)
    if k < 5:  # fewer than five classes can get a vote
        found.pop("top5", None)
    return Judged(found, found={"k": k})


# --- 6. The program --------------------------------------------------------------------------------------

# harness doesn't know our networks.
untrained = partial(backbones.untrained, resnet.ARCHS)
read_backbone = partial(backbones.read_backbone, resnet.ARCHS)


def open_network(path, settings=None):
    """A checkpoint.pth or backbone.pth of a run -> its network, frozen, and view(file) -> (1, 3, S, S).

    The network takes views to features (1, D), in eval mode. view opens an image file as the test views of an
    evaluation do, with the size, mean, std, centre and range in the settings of its classifier.pth or, by
    default, in those of the run: the features are those of --features. Raises Refused if the file has no
    such settings, and BadImage.
    """
    backbone = read_backbone(path)
    s = settings or backbone.settings
    if not s:
        raise Refused(f"{path}: doesn't say how its network saw images; give a classifier's settings")
    view = partial(test_view, views_of(s), s["range"])
    return backbone.network.eval().requires_grad_(False), view


def test_view(policy, value_range, file):
    """The test view of an image file: (1, 3, S, S). Raises BadImage."""
    x, = augment.cut_centre(policy, read_image(os.fsencode(file), value_range), 0, 0)
    return augment.normalize(x[None].float(), policy)


def evaluate(args):
    """A whole evaluation, from the command line to lineval.json; raises Refused, and Stopped after a signal.

    All features are computed before anything is written: only then do we know which files can be read.
    """
    # 1. Backbone and data
    check_limits(vars(args))
    device, rank, world = join_world(torch.device(args.device))
    if args.export:  # another program, which reads files the same way
        if rank == 0:
            backbone = read_backbone(args.ckpt, prefix=args.prefix)
            backbones.export(backbone, args.ckpt, args.export, args.out)
        return
    classifier = read_classifier(args.classify) if args.classify else {"settings": {}}
    backbone, data, recipe = open_all(args, classifier["settings"])
    s = describe(args, backbone, data, recipe, world)
    set_threads(s["width"], s["size"])
    policy = views_of(s)
    views = test_views(policy, device, args.workers)
    say = Progress(0, quiet=rank > 0).line

    # 2. Settings, all of them checked before the work begins, which can take hours
    if args.features and not args.resume:
        check_new(args.features)
    out = args.features  # of data without labels or val/, which no protocol can judge
    protocol = Protocol()
    resuming = False
    if args.classify:  # next to the classifier, by the name of the data
        out = args.out or os.path.join(os.path.dirname(args.classify), f"{folder_name(args.data)}.csv")
        check_new(out)
    elif data.can_judge():
        s = settings_for(args, s, policy, data)
        protocol = PROTOCOLS[s["protocol"]]
        out = args.out or default_folder(args, s, backbone)
        resuming = enter(out, FILES, args.resume, device)
        args.knn_k = args.knn_k or recipe.get("knn_k", 0)  # as in the log of pre-training
    job = Job(s, device, data.train, data.val, views, out, resuming)
    rows = describe_evaluation(job, backbone, data.rows())
    if protocol.optimizer and steps_of(protocol, s["images"], protocol.batch) < ENOUGH_STEPS:
        rows["few images"] = FEW_IMAGES
    say(start_block(rows))

    # 3. Features of all good images, without augmentation: to classify, find bad files, show neighbours
    handle_signals(stop_now)
    frozen = Frozen(backbone, job)
    if args.classify and frozen.digest != classifier["network"]:
        raise Refused(f"{args.ckpt}: is not the backbone that the classifier was trained on")
    splits = {"train": frozen.features_of(data.train)}
    if data.val:
        splits["val"] = frozen.features_of(data.val)

    # 4. The result, the accuracy first
    if "protocol" in s:
        judge(job, frozen, policy, splits, args, say)
    if args.features and rank == 0:
        save_features(args.features, splits, s)
    if args.classify and rank == 0:
        write_classes(out, splits, classifier)
    say(f"done: {out}")


def judge(job, frozen, policy, splits, args, say):
    """Classify the validation images, and write the result.

    splits  {"train" or "val": (source of good images, their features (n, D))}
    Raises Refused if too few images are left for a batch, or if processes have read different images.
    """
    s = job.settings
    protocol = PROTOCOLS[s["protocol"]]
    train, bank = splits["train"]
    val, queries = splits["val"]
    all_val = len(job.val)
    bad = len(job.train) - len(train) + all_val - len(val)
    job = job._replace(train=train, val=val)
    s["images"] = len(train)
    s["val_images"] = len(val)
    s["content"] = train.fingerprint()
    check_same(f"images in {s['data']}", [s["content"], val.fingerprint()], job.device)
    written = os.path.join(job.out, "lineval.json")
    if os.path.exists(written):  # with --resume, we do the same again, but nothing else
        compare_settings(*settings_in(written, s), args.override, written)
    if protocol.optimizer:
        check_batch(s)
        judged = train_on_views(job, frozen, policy, queries, args.override)
    elif protocol.epochs:
        judged = cached(job, bank, queries)
    else:
        judged = knn(job, bank, queries, args.knn_k)
    say(f"{s['protocol']}: {describe_accuracy(judged.accuracy)} on {len(val)} of {all_val} validation images "
        f"({s['note']})")
    if dist.get_rank() == 0:
        write_result(job, judged, bank, queries, bad, frozen.digest)


def open_all(args, seen):
    """Open the backbone and the data, and choose the recipe for the views -> Backbone, Data, recipe.

    The recipe is the settings of the backbone's pre-training, or else those that suit the data.
    seen    settings of an evaluation, which are taken instead
    Raises Refused if the user wants an accuracy, and the data can't give one.
    """
    arch = args.ckpt.removeprefix("random:")
    is_random = args.ckpt.startswith("random:") and arch in resnet.ARCHS
    backbone = None
    saved = {}  # settings of its pre-training
    if not is_random:
        backbone = read_backbone(args.ckpt, args.width, args.prefix)
        saved = backbone.settings
        if not saved and not args.data:
            raise Refused(f"{args.ckpt} doesn't say what it was trained on; name the DATA (shapes: the "
                          "drawn ones)")
    data = open_as_before(args, saved, args.range or seen.get("range") or saved.get("range"))
    if not (data.can_judge() or args.features or args.classify):
        data.refuse(f"{args.data}: linear evaluation needs labels: train/<class>/... and val/<class>/..., or "
                    "CIFAR-10 (--features needs none)")
    recipe = (saved or recipe_for(args.data, data.train, None, SETTINGS)) | seen
    if is_random:
        torch.manual_seed(args.seed)  # the weights that pre-training with this seed starts from
        backbone = untrained(arch, args.width or recipe["width"], recipe["cifar_stem"])
    return backbone, data, recipe


def open_as_before(args, saved, value_range):
    """DATA, by default that of pre-training, whose settings are `saved` -> Data

    Unless the command line says which images judge, those do that pre-training has held out: of its own data,
    and of data that have no others.
    """
    seed = saved.get("seed", args.seed)
    wanted = Validation(args.val, args.val_share, seed)
    held_out = Validation(saved.get("val"), saved.get("val_share"), seed)
    is_own = args.data is None
    if is_own:
        args.data = saved.get("knn_data") or saved.get("data")
    args.data = None if args.data == "shapes" else args.data
    if is_own and not (args.val or args.val_share):
        wanted = held_out
    data = open_data(args.data, value_range, wanted)
    if not (data.can_judge() or args.val or args.val_share) and held_out.share:
        wanted = held_out
        data = open_data(args.data, value_range, wanted)
    # The fingerprint of other images, or of images held in memory with another range, must differ.
    is_same = is_own and wanted == held_out and not (saved.get("knn_data") or args.range)
    if is_same and "content" in saved and data.train.fingerprint() != saved["content"]:
        warn(f"{args.data}: its images are not those of pre-training any more")
    if wanted.share and wanted != held_out and args.data == saved.get("data"):
        warn(f"{args.data}: pre-training has seen images that judge; for a number on unseen ones, give it "
             f"--val-share {wanted.share:g} too")
    args.val, args.val_share = wanted.name, wanted.share
    return data


def describe(args, backbone, data, recipe, world):
    """The settings for which backbone is evaluated on which data, and how: {name: value}"""
    s = {
        "backbone": args.ckpt,
        "sha256": backbone.sha256,             # of the file; None for an untrained network
        "pretrained_epochs": backbone.epochs,  # None if the file doesn't say
        "range": data.train.value_range,
        "amp": bool(args.amp),
        "world": world,
    }
    s |= zip(("arch", "width", "cifar_stem"), backbone.shape)
    for name in ("data", "val", "val_share", "seed", "device", "workers", "save_minutes", "keep_every"):
        s[name] = getattr(args, name)
    # How images are shown to the network: as in its pre-training, or as the command line says.
    for name in ("recipe", "size", "mean", "std", "centre"):
        s[name] = recipe[name]
    views_given = named(args, ["size", "mean", "std"])
    # Or they were given to the evaluation that made the classifier.
    return s | views_given | {"views_given": list(views_given) or recipe.get("views_given", [])}


def views_of(s):
    """The policy of the training views, only crop and flip as in the released code, and of the test view."""
    return augment.Policy(
        area=(0.08, 1.0), jitter=0.0, gray=0.0, blur=0.0,
        size=s["size"], mean=s["mean"], std=s["std"], centre=s["centre"])


def choose_protocol(args, recipe, images):
    """The protocol asked for, or the recipe's, or cached if the images give that one too few steps.

    Whoever names a setting of the layer means the recipe's; then one step is enough.
    -> its name, and why it is not the recipe's
    """
    name = args.protocol or DEFAULT[recipe]
    if args.protocol or name == "cached":
        return name, ""
    steps = steps_of(PROTOCOLS[name], images, args.batch or PROTOCOLS[name].batch)
    enough = 1 if named(args, OF_THE_LAYER) else ENOUGH_STEPS
    if steps >= enough:
        return name, ""
    return "cached", f"; chosen because {images:,} images give {name} {steps or 'no'} steps"


def steps_of(protocol, images, batch):
    """How many steps a protocol makes on so many images."""
    return protocol.epochs * (images // batch)


def settings_for(args, described, policy, data):
    """The settings of an evaluation, including those of `describe`; raises Refused for impossible ones."""
    name, why = choose_protocol(args, described["recipe"], len(data.train))
    protocol = PROTOCOLS[name]
    given = named(args, OF_THE_LAYER)
    if given and not protocol.epochs:
        raise Refused(f"--{'/--'.join(given)}: --{name} trains nothing")
    if args.knn_k and name != "knn":
        raise Refused("--knn-k needs --knn")
    s = {"protocol": name, "note": protocol.note + why}
    if protocol.epochs:
        s |= {option: getattr(protocol, option) for option in OF_THE_LAYER}
    changed = [f"{option} {value} instead of {s[option] or 'a sweep'}"
               for option, value in given.items() if value != s[option]]
    if changed:  # the number is no longer the protocol's
        s["note"] += f", but with {', '.join(changed)}"
    s |= given | described
    s["images"] = len(data.train)  # later, those that can be read
    s["val_images"] = len(data.val)
    s["classes"] = len(data.train.classes)
    if protocol.optimizer:
        for name in ("area", "aspect", "flip"):
            s[name] = getattr(policy, name)
        s["lr"] = initial_lr(s["base_lr"], s["batch"])
        check_batch(s)
    return s


def default_folder(args, s, backbone):
    """Next to the checkpoint, or under runs/ for an untrained network.

    Each file and each data set has its own folder, or a second evaluation would meet the first one's result.
    """
    name = f"lineval-{s['protocol']}"
    data = folder_name(args.data)
    file = folder_name(args.ckpt)
    if s["sha256"] is None:  # random:resnet18 has no folder
        return os.path.join("runs", f"{data}-{args.ckpt.replace(':', '-')}", name)
    if file != "checkpoint":
        name += f"-{file}"
    if args.data != backbone.settings.get("data"):
        name += f"-{data}"
    return os.path.join(os.path.dirname(args.ckpt), name)


def parse(argv=None):
    """The command line -> options."""
    parser = new_parser(
        "lineval.py", "Evaluate a frozen backbone.",
        data="what the checkpoint was trained on; shapes: the drawn ones",
        out="next to the checkpoint, lineval-<protocol>, and -<file> if it isn't checkpoint.pth, and -<data> "
            "if it was trained on other data", amp="off")
    parser.add_argument("--ckpt", type=weights_file, required=True, metavar="FILE",
                        help="simsiam.py's checkpoint.pth or backbone.pth, the authors' released layout, "
                             "MoCo's, torchvision's; or random:resnet50 for an untrained network")
    # Not --protocol NAME, so each has its own line in the help, which says whose it is.
    group = parser.add_mutually_exclusive_group()
    for name, protocol in PROTOCOLS.items():
        group.add_argument(f"--{name}", dest="protocol", action="store_const", const=name, help=protocol.note)
    parser.add_argument("--base-lr", type=number,
                        help=f"learning rate for a batch of 256 images ({defaults('base_lr')})")
    parser.add_argument("--batch", type=int, help=f"images per step, all processes ({defaults('batch')})")
    parser.add_argument("--epochs", type=int, help=f"passes over the training images ({defaults('epochs')})")
    parser.add_argument("--knn-k", type=int, default=0, help=HELP["knn_k"])
    parser.add_argument("--width", type=number,
                        help="width of the network; 1 is standard (default: the file's own; random: the "
                             "recipe's)")
    parser.add_argument("--features", metavar="FILE.npz",
                        help="save features, labels and file names of both splits; data without labels or "
                             "val/ then isn't evaluated")
    own = "(default: the pre-training's, or else the recipe's)"
    parser.add_argument("--size", type=int, help=f"side of the views, in pixels {own}")
    parser.add_argument("--mean", type=number, nargs=3, metavar="M", help=f"mean of the channels {own}")
    parser.add_argument("--std", type=number, nargs=3, metavar="S", help=f"std of the channels {own}")
    parser.add_argument("--classify", metavar="FILE",
                        help="a classifier.pth: write a table with the class of each image of DATA to --out "
                             "(default: <data name>.csv next to FILE), and evaluate nothing")
    parser.add_argument("--export", choices=("torchvision", "released"),
                        help="write the network in this layout, and evaluate nothing")
    return parser.parse_args(argv)


def defaults(name):
    """Each protocol's default for a setting, for the help."""
    rows = [f"{key} {getattr(row, name) or 'by a sweep'}" for key, row in PROTOCOLS.items() if row.epochs]
    return f"default: {', '.join(rows)}"


if __name__ == "__main__":
    run_and_leave("lineval.py", evaluate, parse())
