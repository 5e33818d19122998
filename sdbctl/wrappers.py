"""Serving-time defences that change answers and need no training: what a box must be better than.

Each maps probabilities [B, C] to probabilities [B, C]. They are applied to the undefended model, and whoever
holds the file strips them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from sdbctl.teacher import Teacher

_FLOOR = 1e-6
CONFIDENCE = 0.9


def _normalised(p: Tensor) -> Tensor:
    p = p.clamp(min=_FLOOR)
    return p / p.sum(1, keepdim=True)


def top1(p: Tensor) -> Tensor:
    """The predicted class, with certainty (ART's ClassLabels)."""
    return one_hot(p.argmax(1), p.shape[1]).to(p.dtype)


def class_constant(p: Tensor) -> Tensor:
    """The predicted class with one confidence for all images, the others alike."""
    return CONFIDENCE * top1(p) + (1 - CONFIDENCE) * (1 - top1(p)) / (p.shape[1] - 1)


def uniform_nontarget(p: Tensor) -> Tensor:
    """The predicted class with its confidence, the others alike."""
    best, chosen = p.max(1, keepdim=True).values, top1(p)
    return best * chosen + (1 - best) * (1 - chosen) / (p.shape[1] - 1)


def rounded(p: Tensor) -> Tensor:
    """Three decimals (ART's Rounded), normalised again."""
    return (1000 * p).round() / 1000


def high_confidence(p: Tensor) -> Tensor:
    """Probabilities below 0.25 become zero (ART's HighConfidence), normalised again; the best one stays."""
    return torch.where((p >= 0.25) | (top1(p) > 0), p, torch.zeros_like(p))


def reverse_sigmoid(p: Tensor) -> Tensor:
    """p − β·(σ(γ·σ⁻¹(p)) − ½) with β = 1, γ = 0.1 (Lee et al., IEEE S&P workshops 2019), normalised."""
    p = p.clamp(_FLOOR, 1 - _FLOOR)
    moved: Tensor = p - (torch.sigmoid(0.1 * torch.logit(p)) - 0.5)
    return moved.clamp(min=0)


def gaussian_noise(p: Tensor) -> Tensor:
    """Noise of standard deviation 0.2 on each probability (ART's GaussianNoise), the same for the same answer.

    The noise is a hash of the answer, so that asking twice does not average it away.
    """
    seeds = (p.double() * torch.arange(1, p.shape[1] + 1, device=p.device)).sum(1, keepdim=True) * 1e6
    ranks = torch.arange(p.shape[1], device=p.device, dtype=torch.float64)
    uniform = (torch.sin(seeds + 12.9898 * ranks) * 43758.5453).frac().abs().clamp(1e-6, 1 - 1e-6)
    noisy: Tensor = p + 0.2 * torch.special.ndtri(uniform).to(p.dtype)
    return noisy.clamp(min=0)


def stingy(p: Tensor) -> Tensor:
    """Only the best fifth of the classes (Stingy Teacher, Ma et al., 2021), normalised again."""
    kept = p.topk(max(1, p.shape[1] // 5), 1)
    chosen: Tensor = torch.zeros_like(p).scatter(1, kept.indices, kept.values)
    return chosen


Wrapper = Callable[[Tensor], Tensor]
WRAPPERS: dict[str, Wrapper] = {
    "top1": top1,
    "class-constant": class_constant,
    "uniform-nontarget": uniform_nontarget,
    "rounded": rounded,
    "high-confidence": high_confidence,
    "reverse-sigmoid": reverse_sigmoid,
    "gaussian-noise": gaussian_noise,
    "stingy": stingy,
}


class WrappedTeacher:
    """A teacher whose answers pass a wrapper; its logits are log-probabilities, at least about log 10⁻⁶."""

    def __init__(self, teacher: Teacher, wrapper: str) -> None:
        self.teacher, self.wrapper = teacher, WRAPPERS[wrapper]
        self.classes, self.where = teacher.classes, teacher.where

    def logits(self, x: Tensor) -> Tensor:
        """See :class:`sdbctl.teacher.Teacher`."""
        return _normalised(self.wrapper(self.teacher.logits(x).softmax(1))).log()
