"""Batch normalisation over the batches of all processes.

The paper synchronises BN: a batch of 512 has one mean and one variance, however many GPUs it is spread
over. torch has that for GPUs alone, and makes the CPU wait for the GPU three times in each layer, to leave
out processes whose batch is empty. None is empty here. So there are two forms of our own: one of torch's
kernels for GPUs, and one of plain operations, which runs anywhere and which torch.compile can fuse. In both,
two processes compute what one computes.
"""
import torch
import torch.distributed as dist
from torch import nn

from .processes import all_sum, everyones


def synchronize(model, device, compiled=False):
    """Make every BN of the model take its statistics over all processes. Returns the model.

    compiled: whether torch.compile is going to see the model
    """
    kind = SyncBatchNorm if device.type == "cpu" or compiled else FusedSyncBatchNorm
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = kind  # same parameters, buffers and names: only forward differs
    return model


class AllSum(torch.autograd.Function):
    """all_sum of a copy, with a gradient. The sum enters every process's loss, so its gradient is the sum
    of theirs."""

    @staticmethod
    def forward(ctx, t):
        return all_sum(t.clone())

    @staticmethod
    def backward(ctx, gradient):
        return all_sum(gradient.clone())


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BN over the global batch, by plain operations. Inputs (N, C) or (N, C, H, W); the same statistics as
    one process has, in float32 at least. The output has the input's type."""

    _check_input_dim = staticmethod(lambda x: None)  # any number of dimensions

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        of_input = x.dtype
        x = x.to(torch.promote_types(of_input, torch.float32))
        dims = [0, *range(2, x.dim())]         # all but the channels
        shape = [1, -1] + [1] * (x.dim() - 2)  # of a vector of channels, to be broadcast against x
        n = x.numel() // x.shape[1] * dist.get_world_size()
        mean = AllSum.apply(x.sum(dims)) / n                          # (C,)
        centred = x - mean.view(shape)
        var = AllSum.apply((centred ** 2).sum(dims)) / n              # (C,)
        self.update_running(mean, var, n)
        x = centred * (var + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            x = x * self.weight.view(shape) + self.bias.view(shape)
        return x.to(of_input)

    @torch.no_grad()
    def update_running(self, mean, var, n):
        """The running statistics, as torch has them: the variance unbiased; without momentum, a plain
        average."""
        share = self.share_of_this_batch()
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(var * n / (n - 1), share)

    def share_of_this_batch(self):
        """Count a batch -> the weight of its statistics in the running ones."""
        self.num_batches_tracked += 1
        return 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum


class FusedSyncBatchNorm(SyncBatchNorm):
    """The same by torch's kernels for GPUs."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        share = self.share_of_this_batch()
        return FusedBatchNorm.apply(
            x, self.weight, self.bias, self.running_mean, self.running_var, share, self.eps)


class FusedBatchNorm(torch.autograd.Function):
    """The five kernels of torch.nn.SyncBatchNorm, in its order; every process has as many values a
    channel."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, share, eps):
        x = dense(x)
        world = dist.get_world_size()
        own = torch.cat(torch.batch_norm_stats(x, eps))[None]  # means and 1/std of this process, in a row
        everybodys = everyones(own, all_sum, dist.get_rank(), world)
        counts = torch.full((world,), x.numel() // x.shape[1], dtype=own.dtype, device=x.device)
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            x, *everybodys.chunk(2, dim=1), running_mean, running_var, share, eps, counts)
        ctx.save_for_backward(x, weight, mean, invstd, counts.to(torch.int32))
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, mean, invstd, counts = ctx.saved_tensors
        gradient = dense(gradient)
        sum_dy, sum_dy_xmu, of_weight, of_bias = torch.batch_norm_backward_reduce(
            gradient, x, mean, invstd, weight, *ctx.needs_input_grad[:3])
        sums = all_sum(torch.cat([sum_dy, sum_dy_xmu])).chunk(2)
        of_x = torch.batch_norm_backward_elemt(gradient, x, mean, invstd, weight, *sums, counts)
        if weight is None:
            of_weight = of_bias = None
        return of_x, of_weight, of_bias, None, None, None, None


def dense(x):
    """x in one of the two layouts that torch's kernels read."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
