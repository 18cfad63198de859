"""Several processes that train one model: who is who, sums, and BatchNorm over all of them."""

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
    """BatchNorm over the batches of all processes, so that n of them compute what one would.

    For CPUs, where torch has none. The mean comes first and the squares of what deviates from it
    second: E[x²] - E[x]² would cancel. The processes' batches may differ in size.
    """

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        y = x.to(torch.promote_types(x.dtype, torch.float32))  # (B, C, h, w)
        count = total(y.new_tensor(y.numel() / y.shape[1], dtype=torch.float64)).item()
        if count < 2:
            raise ValueError("got one value per channel in training, expected two at least")
        mean = _AllReduce.apply(y.sum((0, 2, 3), dtype=torch.float64)) / count  # (C)
        y = y - mean.to(y.dtype)[:, None, None]  # (B, C, h, w)
        var = _AllReduce.apply(y.square().sum((0, 2, 3))) / count  # (C)
        with torch.no_grad():
            kept = self.running_mean.dtype
            self.running_mean.lerp_(mean.to(kept), self.momentum)
            self.running_var.lerp_((var * count / (count - 1)).to(kept), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(var + self.eps)  # (C)
        return (y * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class _AllReduce(torch.autograd.Function):
    """The sum over all processes; so is the gradient.

    Each process's loss depends on every process's input.
    """

    @staticmethod
    def forward(ctx, x):
        dist.all_reduce(x := x.clone())
        return x

    @staticmethod
    def backward(ctx, gradient):
        dist.all_reduce(gradient := gradient.clone())
        return gradient


def synchronize_batch_norms(model):
    """Make every BatchNorm2d inside a model count the batches of all processes, in place.

    Parameters, buffers and their names stay. On GPUs torch's own SyncBatchNorm takes its place.
    """
    if next(model.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if type(norm) is nn.BatchNorm2d:
                synchronized = SyncBatchNorm2d(norm.num_features, norm.eps, norm.momentum)
                for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                    setattr(synchronized, key, getattr(norm, key))
                setattr(parent, name, synchronized.train(norm.training))
