"""Distillation from soft outputs."""

from __future__ import annotations

from itertools import product

from torch import Tensor

from sdbctl.attacks.base import Attack, Config, PerBatch
from sdbctl.losses import cross_entropy, kd

TAU4: Config = {"temperature": 4.0, "alpha": 0.9}
"""The setting that most papers report."""
ALONE: Config = {"temperature": 4.0, "alpha": 1.0}
"""The same without labels."""


def target_of(answer: Tensor | None, y: Tensor | None) -> Tensor:
    """Classes [B]: the labels, or without them the teacher's own predictions."""
    if y is not None:
        return y
    assert answer is not None
    return answer.argmax(1)


def soft_labels(z: Tensor, answer: Tensor | None, y: Tensor | None, config: Config) -> Tensor:
    """α·τ²·KL(p_T^τ ‖ p_S^τ) + (1 − α)·CE(p_S, y) (Hinton et al., arXiv 1503.02531); α = 1 without labels."""
    assert answer is not None
    alpha = config["alpha"] if y is not None else 1.0
    loss = kd(z, answer, config["temperature"])
    return loss if y is None or alpha == 1.0 else alpha * loss + (1 - alpha) * cross_entropy(z, y)


def _grid(*pairs: tuple[float, float]) -> tuple[Config, ...]:
    return tuple({"temperature": float(temperature), "alpha": float(alpha)} for temperature, alpha in pairs)


FIRST = ((4, 0.9), (8, 1), (20, 1), (1, 0.9), (4, 0.5), (20, 0.5))
"""(τ, α) to try first; the suites ``standard`` and ``full`` try all."""

KD = Attack(
    "distillation from soft labels",
    "Hinton et al., arXiv 1503.02531",
    PerBatch(soft_labels),
    _grid(*FIRST, *(pair for pair in product((1, 2, 4, 8, 20), (0.1, 0.5, 0.9, 1)) if pair not in FIRST)),
    twin="hard_mixed",
)
KD_UNLABELLED = Attack(
    "distillation from soft labels alone",
    "Hinton et al., arXiv 1503.02531",
    PerBatch(soft_labels),
    _grid((4, 1), (8, 1), (20, 1), (1, 1), (2, 1)),
    labels=False,
    twin="hard_constant",
)
