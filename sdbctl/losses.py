"""Pure loss functions of tensors; each docstring is the formula and its source.

Shapes: ``z`` and other logits are [B, C], class indices [B]. Every loss is a mean over the batch in nats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, kl_div, log_softmax

__all__ = [
    "binary_kl",
    "conceal_kl",
    "conceal_spread",
    "cross_entropy",
    "kd",
    "saturate",
    "split_target",
]


def kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Distillation loss τ²·KL(p_T^τ ‖ p_S^τ) (Hinton et al., arXiv 1503.02531).

    Args:
        student: Logits [B, C] that get the gradient.
        teacher: Logits [B, C]; log-probabilities serve as well.
        temperature: τ > 0.
    """
    return temperature**2 * kl_div(
        log_softmax(student / temperature, 1),
        log_softmax(teacher / temperature, 1),
        log_target=True,
        reduction="batchmean",
    )


def saturate(value: Tensor, limit: float) -> Tensor:
    """Bound a maximised term: limit·(1 − exp(−value/limit)) for value ≥ 0, below ``limit`` and monotone."""
    return limit * -torch.expm1(-value.clamp(min=0) / limit)


def split_target(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Split logits into target and non-target part (DKD, CVPR 2022, eq. 2).

    Args:
        z: Logits [B, C].
        target: Class indices [B].

    Returns:
        Target logits [B] and non-target logits [B, C−1], classes in order.
    """
    others = torch.arange(z.shape[1] - 1, device=z.device)
    others = others + (others >= target[:, None])
    return z.gather(1, target[:, None]).squeeze(1), z.gather(1, others)


def conceal_spread(z: Tensor, target: Tensor, offset: Tensor | None = None) -> Tensor:
    """Spread of the non-target logits, mean over the batch of √(Var_j(z_j − o_j) + ε), j ≠ target.

    The variance is twice the high-temperature limit of τ²·KL(u ‖ p̂^τ), where p̂ is the softmax over the
    non-target classes: zero if and only if the outputs carry no dark knowledge at any temperature. The root
    keeps its gradient when little is left to hide.

    Args:
        z: Logits [B, C].
        target: Predicted classes [B].
        offset: Logits [B, C] of another non-target distribution ĉ to hide behind, instead of the uniform.
    """
    _, rest = split_target(z if offset is None else z - offset, target)
    return (rest.var(1, unbiased=False) + 1e-4).sqrt().mean()


def conceal_kl(z: Tensor, target: Tensor, temperature: float | Tensor) -> Tensor:
    """Residual dark knowledge τ²·KL(u ‖ p̂^τ), p̂^τ the softmax of the non-target logits over τ.

    Args:
        z: Logits [B, C].
        target: Predicted classes [B].
        temperature: τ, one number or [B, 1].
    """
    _, rest = split_target(z, target)
    divergence = -log_softmax(rest / temperature, 1).mean(1, keepdim=True) - math.log(rest.shape[1])
    return (temperature**2 * divergence).mean()


def binary_kl(reference: Tensor, z: Tensor, target: Tensor) -> Tensor:
    """KL between two Bernoulli distributions of "the class is ``target``": KL_binary(p_ref ‖ p_z).

    Args:
        reference: Probabilities [B] that the target class should have.
        z: Logits [B, C] that get the gradient.
        target: Class indices [B].
    """
    own, rest = split_target(z, target)
    margin = own - rest.logsumexp(1)
    reference = reference.clamp(0, 1)
    entropy = torch.special.entr(reference) + torch.special.entr(1 - reference)
    divergence: Tensor = binary_cross_entropy_with_logits(margin, reference) - entropy.mean()
    return divergence
