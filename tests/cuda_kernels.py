"""CPU kernels for the five operators that torch has for GPUs alone, so that a test can run what calls them.

Plain formulas, in float32 at least.
"""
import functools

import torch


def channels_alone(x):
    """The dimensions of x (N, C, ...) over which a channel's statistics go."""
    return [0, *range(2, x.dim())]


def along_channels(v, x):
    """A vector of channels, to be broadcast against x (N, C, ...)."""
    return v.view([1, -1] + [1] * (x.dim() - 2))


def wide(x):
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def batch_norm_stats(x, eps):
    """Mean and 1/std of each channel."""
    dims = channels_alone(x)
    var = wide(x).var(dims, unbiased=False)
    return wide(x).mean(dims), (var + eps).rsqrt()


def batch_norm_gather_stats_with_counts(x, means, invstds, running_mean, running_var, share, eps, counts):
    """Those of everybody's values together, from each process's (world, C) and its count (world,); and the
    running statistics."""
    counts = counts.view(-1, 1)
    n = counts.sum()
    mean = (means * counts).sum(0) / n
    variances = invstds ** -2 - eps
    var = ((variances + (means - mean) ** 2) * counts).sum(0) / n
    running_mean.mul_(1 - share).add_(share * mean)
    running_var.mul_(1 - share).add_(share * var * n / (n - 1))
    return mean, (var + eps).rsqrt()


def batch_norm_elemt(x, weight, bias, mean, invstd, eps):
    """The normalised values."""
    y = (wide(x) - along_channels(mean, x)) * along_channels(invstd, x)
    if weight is not None:
        y = y * along_channels(weight, x) + along_channels(bias, x)
    return y.to(x.dtype)


def batch_norm_backward_reduce(gradient, x, mean, invstd, weight, of_x, of_weight, of_bias):
    """The sums over this process's values that the gradients need."""
    dims = channels_alone(x)
    sum_dy = wide(gradient).sum(dims)
    centred = wide(x) - along_channels(mean, x)
    sum_dy_xmu = (wide(gradient) * centred).sum(dims)
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy.clone()


def batch_norm_backward_elemt(gradient, x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts):
    """The gradient of x, from everybody's sums. counts are int32."""
    assert counts.dtype == torch.int32
    n = counts.sum()
    centred = wide(x) - along_channels(mean, x)
    slope = along_channels(invstd ** 2 * sum_dy_xmu / n, x)
    out = wide(gradient) - along_channels(sum_dy / n, x) - centred * slope
    out = out * along_channels(invstd, x)
    if weight is not None:
        out = out * along_channels(weight, x)
    return out.to(x.dtype)


@functools.cache  # once, and they are there as long as what it returns is
def make_known():
    """Let torch call them for tensors on a CPU, from now on."""
    library = torch.library.Library("aten", "IMPL")
    for kernel in (batch_norm_stats, batch_norm_gather_stats_with_counts, batch_norm_elemt,
                   batch_norm_backward_reduce, batch_norm_backward_elemt):
        library.impl(kernel.__name__, kernel, "CPU")
    return library
