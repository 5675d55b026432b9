"""Features of many images by all processes together, counting hits, and a network that stays frozen."""
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
from ..common.machine import fastest_layout, to_device
from ..common.progress import Progress
from ..training.processes import all_sum, my_share, same_everywhere


BATCH = 256  # images at a time


@torch.no_grad()
def extract(features, test_views, source, device, autocast=contextlib.nullcontext(), chosen=None):
    """Features of a source's images, in order: (n, D) on every process. The processes share the work.

    Each process needs an image at least.

    features    images (N, 3, S, S) -> (N, D)
    test_views  (source, batches of (epoch, indices)) -> yields (indices, images)
    chosen      (n,) indices of the images; by default all
    """
    if chosen is None:
        chosen = np.arange(len(source))
    mine = my_share(len(chosen))
    starts = range(0, len(mine), BATCH)
    places = [mine[i:i + BATCH] for i in starts]
    batches = [(0, chosen[place]) for place in places]  # test views don't depend on the epoch: any will do
    out = None
    for place, (_, x) in zip(places, test_views(source, batches)):
        with autocast:
            v = features(x).float()                                   # (N, D)
        if out is None:
            out = torch.zeros(len(chosen), v.shape[1], device=device)
        out[to_device(place, device)] = v
    return all_sum(out)


def hits(scores, labels, ks=(1, 5)):
    """How many labels (N,) are among the k highest of scores (N, C), for each k -> (len(ks),) int64. -inf
    is never a hit."""
    top = scores.topk(min(max(ks), scores.shape[1]), dim=1)
    hit = (top.indices == labels[:, None]) & (top.values > -math.inf)
    counts = [hit[:, :k].any(dim=1).sum() for k in ks]
    return torch.stack(counts)


def accuracy(scores, labels):
    """Top-1 and top-5 in percent over all labels (n,). Each is counted once, by one process. scores:
    indices -> (N, C)"""
    mine = torch.from_numpy(my_share(len(labels))).to(labels.device)
    counts = all_sum(hits(scores(mine), labels[mine]))
    return [100 * count / len(labels) for count in counts.tolist()]


def calibrated(backbone, test_views, train):
    """A copy of a backbone in train mode, whose BN statistics are those of up to 2048 of the training images.

    BN starts with mean 0 and variance 1. With these, an untrained network is a worse feature extractor than
    it needs to be, and a comparison with it would flatter the trained one.
    """
    backbone = copy.deepcopy(backbone)
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # a plain average over the batches
    chosen = permutation(0, 0, len(train))[:2048]
    # All processes take the same batches: each needs the statistics.
    pieces = math.ceil(len(chosen) / BATCH)
    batches = [(0, index) for index in np.array_split(chosen, pieces)]
    with torch.no_grad():
        for _, x in test_views(train, batches):
            backbone.features(x)
    return backbone


def check_same_images(fingerprints, data, device):
    """Raise Refused where the processes see different images, by the fingerprints of the splits. data: where
    they lie, for people."""
    for number in fingerprints:
        if not same_everywhere(number, device):
            raise Refused(f"{data}: the processes see different images there; give all machines the same "
                          "data")


def good_ones(source, v, chosen=None):
    """Features v (n, D) of a source's images, or of those chosen, but for files that any process has found
    bad; and the indices of these images.

    All processes call it together. Raises BadImage on all of them where too many are bad.
    """
    share_bad(source, v.device)
    if chosen is None:
        chosen = np.arange(len(source))
    is_good = ~np.isin(chosen, list(source.bad))
    if not is_good.all():  # a copy, of what may be gigabytes, only where it must be
        v = v[to_device(np.flatnonzero(is_good), v.device)]
    return v, chosen[is_good]


def neighbours(images, classes):
    """How many neighbours vote in kNN: a fifth of what a class has on average, 200 at most.

    200 is what kNN is used with on ImageNet and CIFAR-10. But of 200 neighbours in a bank with 160 images a
    class, at least 40 would be of another class.
    """
    return max(1, min(200, images // (5 * classes)))


def share_bad(source, device):
    """Tell all processes the bad files that any of them has found -> how many. Raises BadImage on all of them
    where they are too many."""
    flags = torch.zeros(len(source), dtype=torch.uint8, device=device)
    flags[list(source.bad)] = 1
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    found = flags.nonzero().flatten().tolist()
    source.bad.update((i, source.bad.get(i, "")) for i in found)
    source.check_bad()
    return len(found)


def tensor_hashes(network):
    """{name: hash of the bytes} of all parameters and buffers."""
    hashes = {}
    for name, t in network.state_dict().items():
        content = t.cpu().contiguous().numpy().tobytes()
        hashes[name] = hashlib.sha256(content).hexdigest()
    return hashes


def check_frozen(network, loaded):
    """Raise Refused, naming the tensors, unless all are bit for bit what they were when the hashes `loaded`
    were taken."""
    changed = [name for name, value in tensor_hashes(network).items() if value != loaded[name]]
    if changed:
        raise Refused(f"the backbone has changed during the evaluation ({', '.join(changed[:3])}; "
                      f"{len(changed)} tensors): its accuracy would mean nothing; please report this")


class Frozen:
    """The network of a Backbone, frozen, on a job's device: what the features of images are taken from.

    It is in eval mode: BN takes its running statistics, so an image's features don't depend on its batch. The
    BN of an untrained network is calibrated first, on the job's training images. Raises Refused where the
    processes have different weights, and where a split has fewer images than there are processes.
    """

    def __init__(self, backbone, job):
        self.job = job
        self.autocast = torch.autocast(job.device.type, torch.bfloat16, enabled=job.settings["amp"])
        world = dist.get_world_size()
        images = [len(source) for source in (job.train, job.val) if source]
        if min(images) < world:
            raise Refused(f"{job.settings['data']}: a split has only {min(images)} images; start at most as "
                          f"many processes, not {world}")
        batches = sum(math.ceil(n / world / BATCH) for n in images)  # as extract makes them
        self.progress = Progress(batches, quiet=dist.get_rank() > 0)
        layout = fastest_layout(backbone.network, job.device)
        network = backbone.network.to(job.device, memory_format=layout)
        if backbone.found is None:
            network = calibrated(network, job.test_views, job.train)
            for statistics in network.buffers():
                dist.broadcast(statistics, 0)  # GPUs can differ in the last bits
        self.network = network.eval().requires_grad_(False)
        self.hashes = tensor_hashes(network)
        # 32 bits of each hash, added up, are a number that fits a float64.
        digest = sum(int(value[:8], 16) for value in self.hashes.values())
        if not same_everywhere(digest, job.device):
            raise Refused(f"{job.settings['backbone']}: the processes have read different weights from it; "
                          "put one file where all of them read it")

    def features(self, x):
        """Images (N, 3, S, S) -> (N, D), in pieces, because a batch of 4096 need not fit a GPU whole."""
        with self.autocast:
            parts = [self.network.features(part).float() for part in x.split(256)]
        return torch.cat(parts)

    def features_of(self, source):
        """Features of a source's images as they are -> the source without bad files, and (n, D).

        A bad file is replaced by another image, which has another label: so it takes no part in anything.
        Raises Refused where features are not finite.
        """
        def watched(x):
            self.progress.step(lambda: f"features of {len(source)} images")
            return self.features(x)

        v, good = good_ones(source, extract(watched, self.job.test_views, source, self.job.device))
        self.check()
        if len(good) < len(source):
            source = source.only(good)
        if not v.isfinite().all():
            raise Refused(f"{self.job.settings['backbone']}: its features are not all finite; the run that "
                          "wrote it had diverged")
        return source, v

    def check(self):
        """Raise Refused unless the network is bit for bit what it was."""
        check_frozen(self.network, self.hashes)
