"""Features of many images by all processes together, counting hits, and a frozen network."""
import contextlib
import copy
import hashlib
import math

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ..common.draws import permutation
from ..common.errors import Refused
from ..common.machine import check_memory, fastest_layout, to_device
from ..common.progress import Progress
from ..training.processes import all_sum, check_same, my_share


BATCH = 256  # images at a time


@torch.no_grad()
def extract(features, test_views, source, device, autocast=contextlib.nullcontext(), chosen=None):
    """A source -> the source without bad files, and the features of its images (n, D), on every process.

    The processes share the work; each needs at least one image. The replacement for a bad file has the wrong
    label, so we leave it out. Raises BadImage on all processes if too many are bad.

    features    images (N, 3, S, S) -> (N, D)
    test_views  (source, batches of (epoch, indices)) -> yields (indices, images)
    chosen      (n,) indices of the images to take; by default all
    """
    if chosen is None:
        chosen = np.arange(len(source))
    mine = my_share(len(chosen))
    places = [mine[i:i + BATCH] for i in range(0, len(mine), BATCH)]
    batches = [(0, chosen[place]) for place in places]  # test views are the same in every epoch
    out = None
    for place, (_, x) in zip(places, test_views(source, batches)):
        with autocast:
            v = features(x).float()                                   # (N, D)
        if out is None:
            if device.type == "cpu":
                check_memory(4 * len(chosen) * v.shape[1], f"features of {len(chosen):,} images")
            out = torch.zeros(len(chosen), v.shape[1], device=device)
        out[to_device(place, device)] = v
    all_sum(out)
    is_good = ~np.isin(chosen, share_bad(source, device))
    if not is_good.all():  # the copy may take gigabytes
        out = out[to_device(np.flatnonzero(is_good), device)]
    good = chosen[is_good]
    if len(good) < len(source):
        source = source.only(good)
    return source, out


def hits(scores, labels):
    """Whether each label (N,) has the highest of its scores (N, C), and one of the five highest -> (2, N).

    A score of -inf is never a hit.
    """
    top = scores.topk(min(5, scores.shape[1]), dim=1)
    hit = (top.indices == labels[:, None]) & (top.values > -math.inf)
    return hit[:, 0], hit.any(dim=1)


def accuracy(scores, labels):
    """Accuracies over all labels (n,), each judged by one process: {name: percent}

    top1, top5      top5 only if there are more than five classes: else it says nothing
    balanced        the mean of top1 within each class, so small classes count as much as large ones
    largest_class   the share of the largest class: the top1 of always naming that one

    scores: indices -> (N, C)
    """
    mine = to_device(my_share(len(labels)), labels.device)
    found = scores(mine)
    first, among_five = hits(found, labels[mine])
    sizes = labels.bincount()                                         # (C,): 0 for a class without an image
    right = all_sum(labels[mine][first].bincount(minlength=len(sizes)))  # (C,)
    within = right.double() / sizes                                   # (C,): not a number without an image
    percent = {
        "top1": 100 * right.sum().item() / len(labels),
        "balanced": 100 * within.nanmean().item(),
        "largest_class": 100 * sizes.max().item() / len(labels),
    }
    if found.shape[1] > 5:
        percent["top5"] = 100 * all_sum(among_five.sum()).item() / len(labels)
    return percent


def if_unequal(top1, balanced, largest):
    """What to add to an accuracy on the screen where classes of unequal size make it misleading."""
    if f"{balanced:.2f}" == f"{top1:.2f}":
        return ""
    return f" (balanced {balanced:.2f}%; the largest class is {largest:.2f}%)"


def calibrated(backbone, test_views, train):
    """A copy of a backbone in train mode, with the BN statistics of up to 2048 training images.

    BN starts with mean 0 and variance 1. These make an untrained network worse than it need be, and comparing
    with it would flatter the trained one.
    """
    backbone = copy.deepcopy(backbone)
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # a plain average over the batches
    chosen = permutation(0, 0, len(train))[:2048]
    # Each process needs the statistics, so all take the same batches.
    pieces = math.ceil(len(chosen) / BATCH)
    batches = [(0, index) for index in np.array_split(chosen, pieces)]
    with torch.no_grad():
        for _, x in test_views(train, batches):
            backbone.features(x)
    return backbone


def neighbours(images, classes, asked):
    """How many neighbours vote in kNN: as many as asked, or a fifth of an average class, at most 200.

    200 is usual on ImageNet and CIFAR-10. But in a bank with 160 images a class, at least 40 of them would be
    of another class.
    """
    usual = max(1, min(200, images // (5 * classes)))
    return min(asked or usual, images)  # bad files may have left fewer images than there were


def share_bad(source, device):
    """Tell all processes which files any of them has found bad -> their indices.

    Raises BadImage on all of them where too many are bad.
    """
    flags = torch.zeros(len(source), dtype=torch.uint8, device=device)
    flags[list(source.bad)] = 1
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    found = flags.nonzero().flatten().tolist()
    source.check_bad(len(found))
    return found


def digest(network):
    """A number for all bytes of a network's parameters and buffers. A float64 can hold it."""
    hashed = hashlib.sha256()
    for t in network.state_dict().values():
        hashed.update(t.cpu().contiguous().numpy().tobytes())
    return int(hashed.hexdigest()[:13], 16)  # 52 bits


class Frozen:
    """The network of a Backbone, frozen, on a job's device: it gives the features of images.

    It is in eval mode: BN takes its running statistics, so an image's features don't depend on its batch. We
    calibrate the BN of an untrained network first, on the job's training images. Raises Refused where the
    processes have different weights, and where a split has fewer images than there are processes.
    """

    def __init__(self, backbone, job):
        self.job = job
        self.autocast = torch.autocast(job.device.type, torch.bfloat16, enabled=job.settings["amp"])
        world = dist.get_world_size()
        images = [len(source) for source in (job.train, job.val) if source]
        if min(images) < world:
            raise Refused(f"{job.settings['data']}: a split has only {min(images)} images; start at most "
                          f"that many processes, not {world}")
        layout = fastest_layout(backbone.network, job.device)
        network = backbone.network.to(job.device, memory_format=layout)
        if backbone.found is None:
            network = calibrated(network, job.test_views, job.train)
            for statistics in network.buffers():
                dist.broadcast(statistics, 0)  # GPUs can differ in the last bits
        self.network = network.eval().requires_grad_(False)
        self.digest = digest(network)
        check_same(f"weights in {job.settings['backbone']}", [self.digest], job.device)

    def features(self, x):
        """Images (N, 3, S, S) -> (N, D), in pieces: a batch of 4096 may not fit on a GPU."""
        with self.autocast:
            parts = [self.network.features(part).float() for part in x.split(256)]
        return torch.cat(parts)

    def features_of(self, source):
        """Features of a source's images -> the source without bad files, and (n, D).

        Raises Refused where features are not finite.
        """
        # Of as many steps as extract makes batches.
        progress = Progress(math.ceil(len(source) / dist.get_world_size() / BATCH), dist.get_rank() > 0)

        def watched(x):
            progress.step(lambda: f"features of {len(source)} images")
            return self.features(x)

        source, v = extract(watched, self.job.test_views, source, self.job.device)
        self.check()
        if not v.isfinite().all():
            raise Refused(f"{self.job.settings['backbone']}: its features are not all finite; the run that "
                          "wrote it had diverged")
        return source, v

    def check(self):
        """Raise Refused unless the network is bit for bit what it was."""
        if digest(self.network) != self.digest:
            raise Refused("the backbone has changed during the evaluation, so its accuracy would mean "
                          "nothing; please report this")
