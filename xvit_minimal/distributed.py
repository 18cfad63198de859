"""Several processes that train one model: who is who, sums over all of them, and BatchNorm over all their batches."""

import torch
import torch.distributed as dist
from torch import nn


def rank():
    """The number of this process among `world`, 0 if it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(tensor):
    """The sum of a tensor over all processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the batches of all processes, so that n of them compute what one would; on any device."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        y = x.to(torch.promote_types(x.dtype, torch.float32))  # (B, C, h, w)
        moments = torch.stack([y.mean((0, 2, 3)), y.square().mean((0, 2, 3))])  # (2, C)
        mean, square = _AllReduce.apply(moments) / dist.get_world_size()  # (C), (C)
        var = square - mean.square()  # (C)
        n = dist.get_world_size() * x.numel() / x.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(var + self.eps)  # (C)
        shift = self.bias - mean * scale  # (C)
        return (x * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


class _AllReduce(torch.autograd.Function):
    """The sum over all processes; so is the gradient, as each process's loss depends on every process's input."""

    @staticmethod
    def forward(ctx, x):
        dist.all_reduce(x := x.clone())
        return x

    @staticmethod
    def backward(ctx, gradient):
        dist.all_reduce(gradient := gradient.clone())
        return gradient


def synchronize_batch_norms(model):
    """Turn every BatchNorm2d of a model into a SyncBatchNorm2d, in place; parameters, buffers and their names stay."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
