"""BatchNorm of processes that train together: statistics of the whole batch, not of each share."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sdbctl import team

ENOUGH = 64
"""Images from which a process's share of a batch has statistics of its own that are good enough."""


@contextmanager
def one_batch(model: nn.Module, batch_size: int) -> Iterator[None]:
    """While the processes' shares are small, let BatchNorm take its statistics from the whole batch.

    Torch's own SyncBatchNorm does so on GPUs alone; this one on any device, and it leaves the network as it was.

    Args:
        model: The network.
        batch_size: Images of all processes together.
    """
    small = team.size() > 1 and batch_size // team.size() < ENOUGH
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)] if small else []
    for layer in layers:
        layer.forward = functools.partial(_normalise, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class _Sum(torch.autograd.Function):
    """Sum over processes; each one's gradient is the sum of all, since all of their losses depend on it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        torch.distributed.all_reduce(total)
        return total


def _normalise(layer: _BatchNorm, x: Tensor) -> Tensor:
    """BatchNorm of [B, C, …], in training with mean and variance over the images of all processes."""
    if not layer.training:
        plain: Tensor = type(layer).forward(layer, x)
        return plain
    others, shape = [axis for axis in range(x.ndim) if axis != 1], [1, -1] + [1] * (x.ndim - 2)
    wide, count = x.float(), team.size() * x.numel() // x.shape[1]
    total: Tensor = _Sum.apply(torch.stack([wide.sum(others), wide.square().sum(others)]))
    mean, square = total / count
    variance = (square - mean.square()).clamp(min=0)
    if layer.running_mean is not None and layer.running_var is not None and layer.num_batches_tracked is not None:
        layer.num_batches_tracked += 1
        share = layer.momentum if layer.momentum is not None else 1 / int(layer.num_batches_tracked)
        layer.running_mean.lerp_(mean.detach(), share)
        layer.running_var.lerp_(variance.detach() * count / max(1, count - 1), share)
    y = (wide - mean.view(shape)) * (variance + layer.eps).rsqrt().view(shape)
    if layer.weight is not None:
        y = y * layer.weight.view(shape)
    if layer.bias is not None:
        y = y + layer.bias.view(shape)
    made: Tensor = y.to(x.dtype)
    return made
