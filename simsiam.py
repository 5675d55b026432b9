"""SimSiam pre-training (Chen & He 2020, "Exploring Simple Siamese Representation Learning", 2011.10566).

    python simsiam.py                                 no data needed: drawn shapes, minutes on a laptop
    python simsiam.py CIFAR                           a CIFAR-10 folder; any small images of one size
    python simsiam.py IMAGES                          train/<class>/*.jpg, or any folder or list of images
    torchrun --nproc-per-node 8 simsiam.py IMAGENET   one machine with 8 GPUs
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 simsiam.py IMAGENET
                                                      the same line on each of 4 machines; HOST is one of them
    add --resume to continue an interrupted run; python simsiam.py --help lists the options

Read it top to bottom, with the paper:

    1. the loss, and one step of Algorithm 1        5. monitoring: std and collapse, kNN
    2. the heads and the model                      6. other losses, for the ablations
    3. the optimiser and the schedule               7. Sec. 5: SimSiam as alternating optimisation
    4. the training loop, and a whole run           8. settings and experiments, with the paper's figures

Sections 1 to 4 are SimSiam; you can stop there. 5 to 8 are the rest of the paper. 9 is what `pretrain` needs
from SimSiam; its train_step calls the one in 1. augment.py makes the views, resnet.py has the backbone, and
harness/ has what any training program needs (processes, checkpoints, the log). related.py implements SimCLR,
MoCo v2, BYOL, SwAV and CLIP.

The paper's symbols: x1, x2 two views of a batch of images (N, 3, S, S); f the encoder (backbone and
projection MLP), h the prediction MLP; z1 = f(x1), p1 = h(z1), (N, d) each; D the negative cosine
similarity. "Sec.", "Eq." and "Table" refer to the paper. A tag such as "Eq. (1)" after a line of code says
that this line is the equation; README.md has the map. Where this file differs from the paper or the released
code, the place is marked as a departure. "OURS": neither specifies it, so we chose.
"""
import contextlib
import copy
import itertools
import math
import sys
from functools import partial
from typing import NamedTuple

# harness comes before torch, because it sets how torch's threads wait.
from harness.common.draws import permutation
from harness.common.errors import Refused
from harness.common.files import save_picture
from harness.common.machine import fastest_layout, set_threads, to_device
from harness.common.progress import Progress, start_block
from harness.data.loading import index_batches
from harness.data.opening import Validation, open_data
from harness.evaluation.backbones import load_init
from harness.evaluation.features import accuracy, extract, neighbours
from harness.evaluation.report import Report, describe_run, watches_knn
from harness.training.batchnorm import synchronize
from harness.training.ends import run_and_leave
from harness.training.folder import RUN, enter, look
from harness.training.method import Method
from harness.training.options import check_limits, number
from harness.training.per_image import PerImageVectors
from harness.training.processes import all_sum, check_same, join_world, mean_over_processes
from harness.training.recipes import default_folder, list_experiments, options, settings_for
from harness.training.run import Job, Run

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import augment
import resnet

# --- 1. The loss, and one step of Algorithm 1 (Sec. 3) ---------------------------------------------------


def D(p, z):
    """Negative cosine similarity, averaged over the batch: -p/|p| . z/|z|.

    (N, d), (N, d) -> scalar in [-1, 1]. It does not detach: stop-gradient is a separate function, applied
    in `loss`.
    """
    return -(l2_normalize(p) * l2_normalize(z)).sum(dim=1).mean()     # Eq. (1): negative cosine


def stopgrad(z):
    """z as a constant: the same values, through which no gradient flows.

    Without it SimSiam collapses (Sec. 4.1).
    """
    return z.detach()                                                 # Eq. (3): stop-gradient


def loss(p1, p2, z1, z2):
    """SimSiam's symmetrised loss: L = 1/2 D(p1, stopgrad(z2)) + 1/2 D(p2, stopgrad(z1)). Its minimum is -1.

    The encoder on x2 gets no gradient from z2 in the first term, but does from p2 in the second.
    """
    return D(p1, stopgrad(z2)) / 2 + D(p2, stopgrad(z1)) / 2          # Eq. (4): symmetrised loss


def train_step(network, optimizer, autocast, x1, x2, loss=loss):
    """One iteration of Algorithm 1, on two views (N, 3, S, S) of this process's share of the batch.

    network     SimSiam, or SimSiam in DistributedDataParallel, which averages gradients over the processes
    autocast    the context that sets the precision of the forward pass
    loss        a function of p1, p2, z1, z2; the ablations pass others
    Returns the loss, and z1, z2 for the monitors.
    """
    with autocast:
        (p1, p2), (z1, z2) = network(x1, x2)  # z = f(x), p = h(z), (N, d) each
    L = loss(p1, p2, z1, z2)
    update(optimizer, L)
    return L, (z1, z2)


def update(optimizer, L):
    """The end of an iteration: the gradient of L, and one step of the optimiser."""
    optimizer.zero_grad()
    L.backward()
    optimizer.step()                                                  # Alg. 1: update(f, h)


def l2_normalize(v):
    """Each row divided by its l2 norm: (N, d) -> (N, d)"""
    return F.normalize(as_float32(v), dim=1)


def as_float32(v):
    """v in at least float32, because bf16 would corrupt the loss's third digit; float64 stays float64."""
    return v.to(torch.promote_types(v.dtype, torch.float32))


# --- 2. The heads and the model (Sec. 3, "Baseline settings") -------------------------------------------

class BatchNorms(NamedTuple):
    """Which fc layers of the two heads have a BN; the defaults are the paper's, and Table 3 varies them."""
    proj_hidden: bool = True
    proj_output: bool = True
    pred_hidden: bool = True
    pred_output: bool = False


def linear_and_bn(inputs, outputs, bn, affine=True):
    """A fully connected layer, followed by a BN if `bn`."""
    if not bn:  # only here is a bias useful: a BN would cancel it
        return [nn.Linear(inputs, outputs)]
    return [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs, affine=affine)]


def projection_mlp(features, hidden, dim, layers, hidden_bn=True, output_bn=True, affine=False):
    """The end of f: `layers` fc layers, BN on each, ReLU on all but the last. (N, features) -> (N, dim)

    DEPARTURE: the output BN has no affine scale and offset, as in the released code. The paper
    measured no difference with them.

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

    The parameters have the released model's names.

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
            # p = z, and Eq. (4)'s gradient is half that of D(z1, z2) without stop-gradient: the same
            # direction.
            self.predictor = nn.Identity()                            # Sec. 4.2 (no h): p is z
        self.predictor.requires_grad_(predictor == "mlp")
        if fc_std > 0:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=fc_std)

    def forward(self, *views):
        """Two views (N, 3, S, S), or more -> (p1, p2), (z1, z2), (N, d) each, all with gradient.

        Each view passes through f separately, so it is normalised by its own batch statistics. One pass
        over both views together would be faster, but a different method. h minimises E_z |h(z1) - z2|^2; the
        minimum is h(z1) = E_z[z2] = E_T[f(T(x))], the mean over the augmentations, which one sample z2 only
        approximates (Sec. 5.1).
        """
        f, h = self.encoder, self.predictor
        z = tuple(f(x) for x in views)
        p = tuple(h(z_i) for z_i in z)                                # Sec. 5.1 (h): learns the mean of z
        return p, z


# --- 3. The optimiser and the schedule (Sec. 3) ---------------------------------------------------------

def sgd(model, momentum, weight_decay):
    """SGD over f and h: two groups, because h may have its own lr schedule.

    The lr is set before every step. Weight decay applies to *all* parameters, also BN scales and biases.
    """
    groups = [{"params": model.encoder.parameters()}, {"params": model.predictor.parameters()}]
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, weight_decay=weight_decay, fused=True)


def initial_lr(base_lr, batch):
    """The linear scaling rule (Goyal et al. 2017): lr = base_lr x batch / 256, with the *global* batch."""
    return base_lr * batch / 256                                      # Sec. 3 (lr): linear scaling


def warmup(step, warmup_steps):
    """The factor on the lr while warming up: 1/warmup_steps at step 0, rising to 1 over the warm-up."""
    return min(1.0, (step + 1) / max(1, warmup_steps))


def cosine(step, total_steps, warmup_steps):
    """The factor on the lr after the warm-up: half a cosine (Loshchilov & Hutter 2017).

    DEPARTURE: set at every step; the released code sets it once an epoch, and the paper doesn't say.
    """
    progress = max(0, step - warmup_steps) / max(1, total_steps - warmup_steps)
    return (1 + math.cos(math.pi * progress)) / 2                     # Sec. 3 (schedule): cosine decay


def set_lr(optimizer, lr, step, total_steps, warmup_steps, pred_lr):
    """Give f the decayed lr, and h the same ("cosine"), or a constant one ("constant", Table 1 c).

    The constant lr isn't warmed up either, as the authors say in the released code's issue 11.
    """
    f, h = optimizer.param_groups
    f["lr"] = lr * warmup(step, warmup_steps) * cosine(step, total_steps, warmup_steps)
    if pred_lr == "cosine":
        h["lr"] = f["lr"]
    else:
        h["lr"] = lr


# --- 4. The training loop: distributed SGD --------------------------------------------------------------

def distribute(model, device, compiled=False):
    """Make a model train as one over all processes: BN over the global batch (Sec. 3), averaged gradients.

    compiled: whether torch.compile will be applied
    """
    if dist.get_world_size() == 1:
        return model
    model = synchronize(model, device, compiled)
    network = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    network.broadcast_buffers = False  # synchronised statistics are already equal on all processes
    return network


def train(run, batches, set_lr, train_step, optimizer, progress, after_epoch):
    """The training loop, over the run's remaining epochs and steps.

    run             the run's position, checkpoints and log (harness/training/run.py)
    batches         yields (indices of the images, their views) for each step
    set_lr          called before each step with its number in the whole run; sets the optimiser's lr
    train_step      (number of the step, indices, views) -> loss, z
    after_epoch     called after each epoch, and after any save due then; measures and writes the log
    """
    while run.epoch < run.settings["epochs"]:
        for step, (index, views) in run.steps_of_epoch(batches):
            set_lr(step)
            L, z = train_step(step, index, views)
            L = mean_over_processes(stopgrad(L))
            std_sqrt_d = mean_std(z) * math.sqrt(z[0].shape[1])
            run.add_to_means(L, std_sqrt_d)
            run.check_finite(L, gradient_norm(optimizer))
            run.save_or_stop_if_asked()
            progress.step(lambda: f"{run.place()}  loss {L.item():.4f}  "
                                  f"std x sqrt(d) {std_sqrt_d.item():.3f}  {run.rate():.0f} images/s")
        after_epoch()
        run.next_epoch()


def gradient_norm(optimizer):
    """The l2 norm of all gradients together, as a tensor on the device."""
    parameters = (w for group in optimizer.param_groups for w in group["params"])
    return nn.utils.get_total_norm([w.grad for w in parameters if w.grad is not None])


def pretrain(args):
    """A whole run, from the command line to backbone.pth; raises Refused, and Stopped after a signal."""
    # Data, and the settings that suit it
    device, rank, world = join_world(torch.device(args.device))
    data, judge = open_both(args)
    s = settings_for(args, data.train, world)
    set_threads(s["width"], s["size"])
    method = args.method(s, data, device)
    policy = augment.Policy(**{name: s[name] for name in augment.Policy._fields})
    check_same_on_all_processes(method, judge, args.data)
    out = args.out or default_folder(args)

    # Model and optimiser
    torch.manual_seed(s["seed"])
    model = method.build()
    rows = data.rows()
    if args.init and not look(out, RUN, args.resume, device):
        rows["init"] = load_init(model, s, args.prefix)
    resuming = enter(out, RUN, args.resume, device)  # refuses to overwrite a run
    job = Job(s, device, data.train, data.val, test_views(policy, device, s["workers"]), out, resuming)
    watched = job._replace(train=judge.train, val=judge.val)
    layout = fastest_layout(model.encoder, device)
    model.to(device, memory_format=layout)
    network = distribute(model, device, s["compile"])
    if s["compile"]:
        network.compile()  # in place: the names in checkpoints stay the same
        augment.compile_colours()
    optimizer = method.optimizer()
    parts = {"model": model, "optimizer": optimizer, **method.parts()}

    # Where the run starts: at the beginning, or at its newest checkpoint
    follow = ["amp"] if args.amp is None else []  # a resumed run keeps its precision
    run = Run(job, parts, method.steps_per_epoch, args.override, follow)
    progress = Progress(method.total_steps - run.position(), quiet=rank > 0)
    report = Report(run, job, method, partial(watch, watched, method.autocast), progress)
    rows |= describe_run(watched, method)
    progress.line("\n".join([start_block(rows), *run.notes]))
    run.begin(knn_pixels=None if resuming else knn_of_pixels(watched, policy))
    if rank == 0 and not resuming:
        save_picture(augment.contact_sheet(data.train, policy, s["seed"]), run.path("views.png"))
    if not run.log.epochs():  # new, or interrupted before this was measured
        report.untrained(model.encoder)

    # From DATA to optimizer.step(). Worker processes decode and crop files; the rest happens in this process,
    # on its share of each global batch. SimSiamMethod.train_step, in section 9, calls section 1's
    indices = index_batches(
        s["seed"], len(data.train), s["batch"], s["epochs"], run.epoch, run.step, rank, world)
    batches = augment.load_views(
        data.train, policy, s["seed"], indices, device, s["workers"], method.views, run.waiting_for, layout)
    set_lr = partial(method.set_lr, optimizer)
    train_step = partial(method.train_step, network, optimizer)
    after_epoch = partial(report.epoch, model.encoder, optimizer)
    train(run, batches, set_lr, train_step, optimizer, progress, after_epoch)

    # The result: the backbone alone, under torchvision's names, and the settings that its features depend on
    backbone = {name: t for name, t in model.encoder.state_dict().items() if not name.startswith("fc.")}
    if rank == 0:
        run.save_result(backbone, "backbone.pth")
    run.log.add("end", epochs=run.epoch, knn=run.log.epochs()[-1]["knn"], backbone="backbone.pth")
    progress.line(f"done: {run.path('backbone.pth')} (features), checkpoint.pth, log.jsonl, curves.png")


# --- 5. Monitoring (Sec. 4.1): the std of z, a kNN classifier -------------------------------------------

def feature_std(z, all_sum=lambda t: t):
    """Std over the samples of each channel of z/|z|, averaged over the channels: (N, d) -> scalar.

    It is 0 after collapse, and 1/sqrt(d) if z/|z| is scattered over the sphere. all_sum sums a tensor over
    the processes, so the samples are those of the global batch.
    """
    v = l2_normalize(z)                                               # (N, d)
    sums = torch.stack([torch.ones_like(v), v, v * v]).sum(dim=1)     # (3, d)
    n, total, squares = all_sum(sums)                                 # (d,) each
    variance = (squares / n - (total / n) ** 2).clamp(min=0)          # (d,)
    return variance.sqrt().mean()                                     # Sec. 4.1 (std): of normalised z


def mean_std(z):
    """feature_std of the global batch, averaged over the views."""
    return sum(feature_std(stopgrad(z_i), all_sum) for z_i in z) / len(z)


def collapsed(excess, std_sqrt_d, n):
    """Whether a run with batches of n has collapsed, by its loss's excess over the minimum and std x sqrt(d).

    Behind an output BN the outputs can't all be one point, because their mean is 0. At best n - 1 of them
    are at u, and one is at -u. Then std x sqrt(d) is about 2/sqrt(n); the excess is 0 where the views
    agree on which image is the odd one, and 4/n where they don't. The bounds leave some room beyond that. A
    std of 0 is collapse whatever the loss: identical images have it from the first step on.
    """
    std_bound = min(0.75, max(0.1, 3 / math.sqrt(n)))
    return std_sqrt_d < 0.01 or (excess < max(0.05, 5 / n) and std_sqrt_d < std_bound)


RANKED = 2000       # training images used to measure the features' rank
MOST_RAW = 100_000  # most training images for which kNN on raw pixels is measured too


def effective_rank(v):
    """The number of directions in which features v (N, D) spread, 1 to D (RankMe, Garrido et al. 2023).

    It is exp of the entropy of the normalised singular values of the centred features. It sees what
    the std can't: a network whose outputs differ, but only in a few directions.
    """
    v = as_float32(v)
    v = v - v.mean(dim=0)                                             # (N, D)
    if not v.any() or not v.isfinite().all():  # all the same, or not finite: not even one direction
        return v.new_zeros(())
    singular = torch.linalg.svdvals(v)                                # min(N, D) of them
    share = singular / singular.sum()
    return torch.special.entr(share).sum().exp()


def knn(bank, bank_labels, queries, k=200, temperature=0.1):
    """Weighted kNN (Wu et al. 2018, Sec. 3.4): each of the k nearest has exp(cosine / temperature) votes.

    bank (B, d), queries (Q, d): l2-normalised features; bank_labels (B,) int64; k at most B.
    Returns votes (Q, classes), -inf if a class got none.
    """
    votes = torch.zeros(len(queries), int(bank_labels.max()) + 1, device=queries.device)
    piece = max(1, 2 ** 27 // len(bank))  # half a GiB of similarities at a time
    for q, v in zip(queries.split(piece), votes.split(piece)):
        similarity, neighbour = (q @ bank.T).topk(k, dim=1)           # (q, k) each
        v.scatter_add_(1, bank_labels[neighbour], (similarity / temperature).exp())
    return votes.masked_fill_(votes == 0, -math.inf)


def knn_accuracy(bank, bank_labels, queries, labels, k):
    """kNN accuracies of features queries (Q, d) among those of the bank (B, d): {name: percent}"""
    bank = l2_normalize(bank)
    queries = l2_normalize(queries)
    return accuracy(lambda mine: knn(bank, bank_labels, queries[mine], k), labels)


def watch(job, autocast, features):
    """Measure a network by the features (images -> (N, D)) of test views.

    Returns {"knn": top-1 in percent, "knn_images": images judged, "rank": of up to RANKED training images,
    and what tells the top-1 of unequal classes}; without labels, only the rank.
    """
    if watches_knn(job):
        found, judged, bank = knn_of(job, features, job.test_views, autocast)
        some = to_device(permutation(0, 0, len(bank))[:RANKED], job.device)
        return {
            "knn": found["top1"],
            "knn_balanced": found["balanced"],
            "knn_largest_class": found["largest_class"],
            "knn_images": judged,
            "rank": effective_rank(bank[some]).item(),
        }
    chosen = permutation(0, 0, len(job.train))[:RANKED]
    _, v = extract(features, job.test_views, job.train, job.device, autocast, chosen)
    return {"rank": effective_rank(v).item()}


def knn_of(job, features, views, autocast=contextlib.nullcontext()):
    """kNN of all validation images among all training images -> accuracies, images judged, the bank.

    features: images -> (N, D). views: as Job.test_views
    """
    train, bank = extract(features, views, job.train, job.device, autocast)
    val, queries = extract(features, views, job.val, job.device, autocast)
    labels = to_device(train.labels, job.device)
    truth = to_device(val.labels, job.device)
    k = neighbours(len(bank), len(train.classes), job.settings["knn_k"])
    return knn_accuracy(bank, labels, queries, truth, k), len(val), bank


def knn_of_pixels(job, policy):
    """kNN top-1 on raw pixels, for comparison: at 32 pixels if images are files; None if not measured."""
    if not watches_knn(job) or len(job.train) > MOST_RAW:
        return None
    views = job.test_views
    if job.train.pixels is None:
        views = test_views(policy._replace(size=32), job.device, job.settings["workers"])
    found, *_ = knn_of(job, lambda x: x.flatten(1), views)
    return found["top1"]


# --- 6. Other losses, for the paper's ablations ---------------------------------------------------------

def loss_without_stopgrad(p1, p2, z1, z2):
    """The loss without stop-gradient, for Fig. 2's collapsing run: L = 1/2 D(p1, z2) + 1/2 D(p2, z1)."""
    return D(p1, z2) / 2 + D(p2, z1) / 2                              # Eq. (2): without stop-gradient


def D_cross_entropy(p, z):
    """-softmax(z) . log softmax(p), over the channels, averaged over the batch.

    (N, d), (N, d) -> scalar, at least 0
    """
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
    """Two independent pairs of views per image, to compare fairly with the two symmetric terms."""
    return loss_asymmetric(p1, p2, z1, z2) / 2 + loss_asymmetric(p3, p4, z3, z4) / 2


def train_step_2x(network, optimizer, autocast, x1, x2, x3, x4):
    """A step on four views of each image."""
    with autocast:
        p, z = network(x1, x2, x3, x4)
    L = loss_asymmetric_2x(*p, *z)
    update(optimizer, L)
    return L, z


class Objective(NamedTuple):
    """A way to train: its step, the number of views per image, and the loss's minimum."""
    train_step: object
    views: int
    minimum: int


OBJECTIVES = {
    "symmetric": Objective(train_step, views=2, minimum=-1),
    "without-stopgrad": Objective(partial(train_step, loss=loss_without_stopgrad), views=2, minimum=-1),
    "cross-entropy": Objective(partial(train_step, loss=loss_cross_entropy), views=2, minimum=0),
    "asymmetric": Objective(partial(train_step, loss=loss_asymmetric), views=2, minimum=-1),
    "asymmetric-2x": Objective(train_step_2x, views=4, minimum=-1),
}


# --- 7. SimSiam as alternating optimisation (Sec. 5) ----------------------------------------------------
# Sec. 5 fits theta (the weights of F, which is f; here also those of h) to eta, one constant vector per
# image. Then it computes eta from the new theta, and so on in turns. The paper's error is squared; with
# normalised vectors (footnote 5) it is 2 D + 2.
#
# Plain training is the case with inner loops of one step: eta_x = F_{theta^t}(T'(x)) of the current theta,
# which is stopgrad(z) in `loss`. That is Eq. (11), except for h and the symmetrisation; Sec. 5.1 says why h
# is there. The two variants of Sec. 5.2 have their own steps.

def loss_to_eta(p1, p2, eta1, eta2):
    """The loss for fitting theta while eta is held fixed: theta^t <- argmin_theta L(theta, eta^{t-1}).

    eta1, eta2 (N, d): each image's eta, computed from its view 1 and its view 2. Each view is fitted to the
    other's. The symmetrised loss needs both; the paper has one eta per image.
    """
    return loss(p1, p2, eta1, eta2)                                   # Eq. (7): of theta; eta stays


@torch.no_grad()
def embed(model, autocast, x1, x2):
    """z1, z2 in train mode, (N, d) each.

    BN in train mode updates its running statistics: pass a copy, never the network being trained.
    """
    with autocast:
        _, z = model(x1, x2)
        return z


def alternation_step(model, theta, k, network, optimizer, autocast, step, x1, x2):
    """A step of Sec. 5.2's k-step alternation: eta is constant during each outer loop of k steps.

    theta   a copy of the model, for theta^t. The paper caches the eta of all k steps before the first; we
            keep theta^t, and compute each eta at its step. Both are F_{theta^t}(T'(x)), of the same views.
            In the middle of an inner loop theta differs from the model, so the checkpoint holds it too
    """
    if step % k == 0:
        theta.load_state_dict(model.state_dict())
    eta1, eta2 = embed(theta, autocast, x1, x2)                       # Eq. (10): one sample of eta
    with autocast:
        (p1, p2), (z1, z2) = network(x1, x2)
    L = loss_to_eta(p1, p2, eta1, eta2)                               # Sec. 5.2 (k-step): eta constant
    update(optimizer, L)
    return L, (z1, z2)


def moving_average_step(store, m, network, optimizer, autocast, index, x1, x2):
    """A step with Sec. 5.2's moving average, without a predictor: eta_x <- m eta_x + (1 - m) F(T'(x)).

    store: PerImageVectors. F's output and eta are normalised (footnote 5). Before an image's first visit
    its stored vector is 0, so eta is (1 - m) z, which D normalises to length 1. OURS, because the paper
    doesn't say: both views start from the image's one vector, and the normalised sum of both is stored.
    """
    with autocast:
        (p1, p2), (z1, z2) = network(x1, x2)
    old = store.get(index)                                            # (N, d)
    v = [l2_normalize(stopgrad(z)) for z in (z1, z2)]
    eta1, eta2 = (m * old + (1 - m) * v_i for v_i in v)               # Sec. 5.2 (moving average): of eta
    store.put(index, l2_normalize(eta1 + eta2))
    L = loss_to_eta(p1, p2, eta1, eta2)
    update(optimizer, L)
    return L, (z1, z2)


# --- 8. Settings and experiments ---------------------------------------------------------------------------
# Each row of SETTINGS is a command-line option (--base-lr, --area, ...): its type, its value in each recipe,
# and where the paper gives it. "shapes" has no counterpart in the paper: it is the smallest setting
# that shows the method in minutes on two cores.

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)
ASPECT = (3 / 4, 4 / 3)                 # PyTorch's, which the paper's notation refers to
JITTER = (0.4, 0.4, 0.4, 0.1)           # brightness, contrast, saturation, hue
HUE_JITTER = (0.4, 0.4, 0.4, 0.5)       # with any hue

PAIR = (number, 2)                      # an option that takes two numbers
THREE = (number, 3)
FOUR = (number, 4)
FLAGS = (int, 4)

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
    "batch":        (int,    512,             512,             64),              # Sec. 3; supp. D
    "base_lr":      (number, 0.05,            0.03,            1.8),             # Sec. 3; supp. D
    "momentum":     (number, 0.9,             0.9,             0.9),             # Sec. 3
    "weight_decay": (number, 1e-4,            5e-4,            5e-4),            # Sec. 3; supp. D
    "warmup":       (int,    0,               0,               1),               # Sec. 3 (10 in some rows)
    "pred_lr":      (str,    "constant",      "constant",      "constant"),      # Table 1 (c)
    "size":         (int,    224,             32,              16),              # supp. A; supp. D
    "area":         (PAIR,   (0.2, 1.0),      (0.2, 1.0),      (0.6, 1.0)),      # supp. A
    "aspect":       (PAIR,   ASPECT,          ASPECT,          ASPECT),          # PyTorch's
    "jitter":       (number, 0.8,             0.8,             0.8),             # supp. A
    "strength":     (FOUR,   JITTER,          JITTER,          HUE_JITTER),      # supp. A
    "gray":         (number, 0.2,             0.2,             0.2),             # supp. A
    "blur":         (number, 0.5,             0.0,             0.0),             # released code; supp. D
    "sigma":        (PAIR,   (0.1, 2.0),      (0.1, 2.0),      (0.1, 2.0)),      # supp. A
    "flip":         (number, 0.5,             0.5,             0.5),             # supp. A
    "vflip":        (number, 0.0,             0.0,             0.5),             # -
    "mean":         (THREE,  IMAGENET_MEAN,   CIFAR_MEAN,      IMAGENET_MEAN),   # released code
    "std":          (THREE,  IMAGENET_STD,    CIFAR_STD,       IMAGENET_STD),    # released code
    "centre":       (number, 224 / 256,       1.0,             1.0),             # released code (test view)
    "knn_every":    (int,    10,              5,               3),               # -
    "knn_k":        (int,    0,               0,               0),               # supp. D: kNN, without its k
}

HELP = {
    "arch": "the backbone",
    "width": "multiplies all the backbone's channels",
    "cifar_stem": "a stem for small images: 3x3, stride 1, no max-pooling",
    "proj_layers": "fc layers of the projection MLP",
    "proj_hidden": "hidden width of the projection MLP",
    "dim": "width d of z and p",
    "pred_dim": "hidden width of the predictor h",
    "predictor": "h trained, fixed as initialised, or left out",
    "bn": "1 where a BN follows: the projection's hidden and output layers, then h's",
    "affine": "scale and offset in the projection's output BN",
    "fc_std": "initial std of the heads' weights; 0: PyTorch's default",
    "objective": "the loss",
    "eta": "what a view is fitted to: the other view's z, Sec. 5.2's alternation or its moving average",
    "k": "with --eta alternate: steps of an inner loop, 0: an epoch; kNN's k is --knn-k",
    "m": "with --eta average: share of the moving average that is kept",
    "epochs": "training epochs",
    "batch": "images per step, over all processes",
    "base_lr": "lr = base lr x batch / 256",
    "momentum": "SGD's momentum",
    "weight_decay": "on all parameters",
    "warmup": "epochs of warm-up",
    "pred_lr": "h's lr is constant, or follows the cosine",
    "size": "side of a view, in pixels",
    "area": "share of the image that a crop covers",
    "aspect": "width / height of a crop",
    "jitter": "probability of the colour changes",
    "strength": "strengths of brightness, contrast, saturation, hue",
    "gray": "probability of grayscale",
    "blur": "probability of blur",
    "sigma": "std of the blur, in pixels",
    "flip": "probability of the horizontal flip",
    "vflip": "probability of the vertical flip",
    "mean": "subtracted from each channel (values in [0, 1])",
    "std": "divisor of each channel",
    "centre": "share of the shorter side that a test view keeps",
    "knn_every": "epochs between measurements of kNN and rank; 0: never",
    "knn_k": "how many neighbours vote in kNN; 0: a fifth of the images of an average class, at most 200",
}
ABLATIONS = ("predictor", "bn", "affine", "fc_std", "objective", "eta", "k", "m")  # only ablations use these

CHOICES = {
    "arch": tuple(resnet.ARCHS),
    "predictor": ("mlp", "fixed", "none"),
    "objective": tuple(OBJECTIVES),
    "eta": ("current", "alternate", "average"),
    "pred_lr": ("constant", "cosine"),
}

# A setting has no effect with these values of another one, and is then refused on the command line.
IDLE = {
    "k": ("eta", "current", "average"),
    "m": ("eta", "current", "alternate"),
    "proj_hidden": ("proj_layers", 1),
    "pred_lr": ("predictor", "none", "fixed"),
    "strength": ("jitter", 0),
    "sigma": ("blur", 0),
    "knn_k": ("knn_every", 0),
}

# One row per result of the paper: what it measured (linear top-1 on ImageNet, unless noted), and what
# changes from the recipe. The values are those for ImageNet: smaller recipes scale batch, widths and epochs
# down in proportion. lr, weight decay and k, the steps of an inner loop, are unchanged.
DECAYED = {"pred_lr": "cosine"}
NO_H = {"predictor": "none"}
WARMUP = {"warmup": 10}
LARGE_LR = {"base_lr": 0.5, "weight_decay": 1e-5}
EXPERIMENTS = {
    "simsiam":                  ("68.1; on CIFAR-10 91.8",     {}),
    "fig2-with-stopgrad":       ("67.7 +- 0.1, std 1/sqrt(d)", DECAYED),
    "fig2-without-stopgrad":    ("0.1, loss to -1, std to 0",  {**DECAYED, "objective": "without-stopgrad"}),
    "table1-baseline":          ("67.7",                       DECAYED),
    "table1-a-no-predictor":    ("0.1: collapses",             {**DECAYED, **NO_H}),
    "table1-b-fixed-predictor": ("1.5: does not converge",     {**DECAYED, "predictor": "fixed"}),
    "table1-c-constant-lr":     ("68.1",                       {"pred_lr": "constant"}),
    "table2-batch-64":          ("66.1",                       {"batch": 64}),
    "table2-batch-128":         ("67.3",                       {"batch": 128}),
    "table2-batch-256":         ("68.1",                       {"batch": 256}),
    "table2-batch-512":         ("68.1",                       {"batch": 512}),
    "table2-batch-1024":        ("68.0",                       {"batch": 1024, **WARMUP}),
    "table2-batch-2048":        ("67.9",                       {"batch": 2048, **WARMUP}),
    "table2-batch-4096":        ("64.0",                       {"batch": 4096, **WARMUP}),
    "table3-a-no-bn":           ("34.6",                       {"bn": (0, 0, 0, 0), **WARMUP}),
    "table3-b-hidden-bn":       ("67.4",                       {"bn": (1, 0, 1, 0)}),
    "table3-c-default":         ("68.1",                       {"bn": (1, 1, 1, 0)}),
    "table3-d-all-bn":          ("unstable, loss oscillates",  {"bn": (1, 1, 1, 1)}),
    "sec3-affine-output-bn":    ("68.1 (68.2 without)",        {"affine": True}),
    "sec42-asymmetric-no-h":    ("fails",                      {"objective": "asymmetric", **NO_H}),
    "sec45-cross-entropy":      ("63.2",                       {"objective": "cross-entropy"}),
    "sec46-asymmetric":         ("64.8",                       {"objective": "asymmetric"}),
    "sec46-asymmetric-2x":      ("67.3",                       {"objective": "asymmetric-2x"}),
    "sec52-1-step":             ("68.1",                       {"eta": "alternate", "k": 1}),
    "sec52-10-step":            ("68.7",                       {"eta": "alternate", "k": 10}),
    "sec52-100-step":           ("68.9",                       {"eta": "alternate", "k": 100}),
    "sec52-1-epoch":            ("67.0",                       {"eta": "alternate", "k": 0}),
    "sec52-moving-average":     ("55.0 (0.1 for m = 0)",       {"eta": "average", "m": 0.8, **NO_H}),
    "suppA-fc-std-0.01":        ("may not converge",           {"fc_std": 0.01}),
    "suppB-dim-256":            ("65.3",                       {"dim": 256, "pred_dim": 64}),
    "suppB-dim-512":            ("67.2",                       {"dim": 512, "pred_dim": 128}),
    "suppB-dim-1024":           ("67.5",                       {"dim": 1024, "pred_dim": 256}),
    "suppB-dim-2048":           ("68.1",                       {"dim": 2048, "pred_dim": 512}),
    "suppB-hidden-d":           ("less stable, can fail",      {"pred_dim": 2048}),
    "table4-100-epochs":        ("68.1",                       {"batch": 256, "epochs": 100}),
    "table4-200-epochs":        ("70.0",                       {"batch": 256, "epochs": 200}),
    "table4-400-epochs":        ("70.8",                       {"batch": 256, "epochs": 400}),
    "table4-800-epochs":        ("71.3",                       {"batch": 256, "epochs": 800}),
    "table5-base":              ("its transfer: the base",     {"batch": 256, "epochs": 200}),
    "table5-recipe":            ("better than the base",       {"batch": 256, "epochs": 200, **LARGE_LR}),
}
# --- 9. SimSiam as a method, and the options --------------------------------------------------------------

class SimSiamMethod(Method):
    """SimSiam as a run needs it (harness/training/method.py); related.py has other methods."""
    NAME = "simsiam"
    SETTINGS = SETTINGS
    HELP = HELP
    ABLATIONS = ABLATIONS
    CHOICES = CHOICES
    IDLE = IDLE
    EXPERIMENTS = EXPERIMENTS
    REMEDY = "--pred-dim a quarter of --dim"
    open = staticmethod(open_data)

    def __init__(self, s, data, device):
        super().__init__(s, data, device)
        self.lr = initial_lr(s["base_lr"], s["batch"])
        self.plain_step, self.views, self.minimum = OBJECTIVES[s["objective"]]

    @staticmethod
    def check(s):
        if s["eta"] != "current" and s["objective"] != "symmetric":
            raise Refused(f"--eta {s['eta']} needs --objective symmetric, not {s['objective']}")

    def build(self):
        self.model = SimSiam(**{name: self.s[name] for name in OF_THE_MODEL})
        return self.model

    def parts(self):
        if self.s["eta"] == "alternate":
            self.theta = copy.deepcopy(self.model)
            return {"theta": self.theta}
        if self.s["eta"] == "average":
            self.store = PerImageVectors(self.s["images"], self.s["dim"], self.device)
            return {"eta": self.store}
        return {}

    def optimizer(self):
        return sgd(self.model, self.s["momentum"], self.s["weight_decay"])

    def set_lr(self, optimizer, step):
        set_lr(optimizer, self.lr, step, self.total_steps, self.warmup_steps, self.s["pred_lr"])

    def train_step(self, network, optimizer, step, index, views):
        if self.s["eta"] == "alternate":
            k = self.s["k"] or self.steps_per_epoch
            return alternation_step(
                self.model, self.theta, k, network, optimizer, self.autocast, step, *views)
        if self.s["eta"] == "average":
            return moving_average_step(
                self.store, self.s["m"], network, optimizer, self.autocast, index, *views)
        return self.plain_step(network, optimizer, self.autocast, *views)

    def collapsed(self, loss, std_sqrt_d):
        return collapsed(loss - self.minimum, std_sqrt_d, self.s["batch"])


OF_THE_MODEL = ("arch", "width", "cifar_stem", "proj_layers", "proj_hidden", "dim", "pred_dim", "predictor",
                "bn", "affine", "fc_std")


def parse(argv=None):
    """The command line -> options; `--experiment list` prints the table and exits."""
    parser = options(
        "simsiam.py", "SimSiam pre-training. The recipe's options default to the paper's settings for the "
                      "data at hand.", SimSiamMethod)
    args = parser.parse_intermixed_args(argv)  # DATA may stand on both sides of an option
    if args.experiment == "list":
        list_experiments([SimSiamMethod])
        sys.exit()
    return args


def test_views(policy, device, workers):
    """-> (source, batches of (epoch, indices)) -> yields (indices, test views)"""
    return lambda source, batches: augment.load_centres(source, policy, batches, device, workers)


def open_both(args):
    """DATA, and the data set with which kNN and rank are measured: the same, unless there is --knn-data."""
    check_limits(vars(args))
    wanted = Validation(args.val, args.val_share, args.seed)
    path = [args.data, *args.more] if args.more or args.knn_data else args.data
    data = judge = args.method.open(path, args.range, Validation() if args.knn_data else wanted)
    if args.knn_data:
        judge = open_data(args.knn_data, args.range or data.train.value_range, wanted)
        if not judge.can_judge():
            judge.refuse(f"--knn-data {args.knn_data}: needs labels: train/<class>/... and val/<class>/...")
    return data, judge


def check_same_on_all_processes(method, judge, data):
    """Raise Refused if the processes see different images, or have chosen different precisions."""
    judges = [judge.val] if judge is method.data else [judge.train, judge.val]
    seen = [source.fingerprint() for source in (method.data.train, *judges) if source]
    method.s["content"] = seen[0]
    check_same(f"images in {data}", seen + method.numbers(), method.device)
    check_same("CPUs with instructions for bf16 (give --amp, or --no-amp)", [method.s["amp"]], method.device)


if __name__ == "__main__":
    run_and_leave("simsiam.py", pretrain, parse())
