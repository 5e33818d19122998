"""Outputs of a network on a whole set."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sdbctl import metrics
from sdbctl.data import ImageSet, Preprocess, batches
from sdbctl.engine import Engine


def unseen_batch(shape: tuple[int, ...]) -> int:
    """Images [C, H, W] of a batch that no gradient is needed of: 500, of more than 64×64 pixels fewer."""
    return max(1, min(500, 500 * 64 * 64 // (shape[1] * shape[2])))


@torch.no_grad()
def predict(
    model: Callable[[Tensor], Tensor],
    images: ImageSet,
    preprocess: Preprocess,
    engine: Engine,
) -> Tensor:
    """Logits [N, C] (float32, on the CPU) of a set in order, without augmentation, of large images in small batches."""
    if isinstance(model, nn.Module):
        model.eval()
    outputs = []
    for batch in batches(images, preprocess, batch_size=unseen_batch(images.shape), device=engine.device):
        with engine.autocast():
            outputs.append(model(batch.x).float())
    return torch.cat(outputs).cpu()


def accuracy(model: Callable[[Tensor], Tensor], images: ImageSet, preprocess: Preprocess, engine: Engine) -> float:
    """Top-1 accuracy of a model in percent, see :func:`predict`."""
    return metrics.top1(predict(model, images, preprocess, engine), images.labels)
