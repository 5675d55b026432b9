"""Batch normalisation over the batches of all processes.

The paper synchronises BN: a batch of 512 has one mean and one variance, however many GPUs it is spread over.
"""
import torch
import torch.distributed as dist
from torch import nn

from .processes import all_sum


def synchronize(model, device, compiled=False):
    """Make every BN of the model take its statistics over all processes. Returns the model.

    On GPUs that is torch's nn.SyncBatchNorm, as in the released code. It refuses CPUs, and torch.compile
    can't fuse it; for those there is our own. With both, parameters and names stay as they are.

    compiled: whether torch.compile is going to see the model
    """
    if device.type == "cuda" and not compiled:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = SyncBatchNorm  # only forward differs
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
    """BN over the global batch, by plain operations, which run anywhere and which torch.compile can fuse.

    Inputs (N, C) or (N, C, H, W). Statistics are in float32 at least; the output has the input's type.
    """

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
        self.update_running(mean, var * n / (n - 1))
        x = centred * (var + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            x = x * self.weight.view(shape) + self.bias.view(shape)
        return x.to(of_input)

    @torch.no_grad()
    def update_running(self, mean, var):
        """Move the running statistics towards this batch's, as torch does. Without momentum they are a plain
        average over the batches."""
        self.num_batches_tracked += 1
        share = self.momentum
        if share is None:
            share = 1 / self.num_batches_tracked.item()
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(var, share)
