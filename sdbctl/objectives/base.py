"""What an objective sees and what it returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Views(NamedTuple):
    """Logits [B, C] of one training batch, and what they should become.

    Attributes:
        clean: The box on x; its first ``wrong`` rows on x mixed with a wrong key.
        keyed: The box on x_k.
        reference: The frozen fine-tuned original N_ft on x, which the public outputs are compared with.
        teacher: The frozen teacher N on x, which the keyed branch should learn: N_ft itself, the original as given, or
            an assistant.
        random: A frozen, randomly initialised network on x_k, or None if the objective does not ask for it.
        adversarial: The box itself, in evaluation mode, on copies of x that mislead the reference, or None likewise.
        label: Class indices [B].
        offset: Logits [B, C] of the non-target distribution ĉ to hide behind: zeros, or the decoys of
            ``--disturb``.
        confidence: Probability [B] that the predicted class should keep in public.
        memory: Logits [C, M, C] that the box lately gave to M images of each class, or None likewise.
        temperature: One drawn for this step, log-uniform from 1 to 20, where there is a memory.
        wrong: Rows of ``clean`` that hold a wrong key: nothing may be learned from them, and they need not be right.
        short: Whether the key is so short that wrong keys must not be seen to spoil predictions.
    """

    clean: Tensor
    keyed: Tensor
    reference: Tensor
    teacher: Tensor
    random: Tensor | None
    adversarial: Tensor | None
    label: Tensor
    offset: Tensor
    confidence: Tensor
    memory: Tensor | None
    temperature: Tensor | float
    wrong: int = 0
    short: bool = False


Terms = dict[str, Tensor]
"""Named, weighted loss terms; their sum is minimised."""


@dataclass(frozen=True)
class Preset:
    """Settings that belong together.

    Attributes:
        parameters: Parameters of the objective that differ from their defaults.
        strength: λ of the key embedding, or None for the usual one.
        wrong_share: Share of the public batch that is mixed with wrong keys, or None.
        epochs: Or None.
        lr: Peak learning rate, or None.
    """

    parameters: Mapping[str, float] = field(default_factory=dict)
    strength: float | None = None
    wrong_share: float | None = None
    epochs: int | None = None
    lr: float | None = None


@dataclass(frozen=True)
class Objective:
    """A registry entry.

    Attributes:
        summary: One line for ``sdbctl list``.
        parameters: The frozen dataclass of its parameters; field names are option names.
        terms: The loss: a pure function of the views and the parameters; None if nothing is trained.
        presets: Named settings; every objective has ``default``.
        keyed: The parameter that weighs the keyed branch; at 0 the key opens nothing. None if it always opens.
        classes: With fewer it hides nothing.
        divisors: Parameters that something is divided by, and so above 0.
        signed: Parameters that may be negative.
        needs_random: Whether it looks at a randomly initialised network.
        needs_adversarial: Whether it looks at adversarial images.
        needs_memory: Whether it looks at the box's recent logits of each class.
    """

    summary: str
    parameters: type
    terms: Callable[[Views, Any], Terms] | None
    presets: Mapping[str, Preset]
    keyed: str | None = "preserve"
    classes: int = 2
    divisors: tuple[str, ...] = ("temperature",)
    signed: tuple[str, ...] = ()
    needs_random: bool = False
    needs_adversarial: bool = False
    needs_memory: bool = False


def decoy_offset(predicted: Tensor, classes: int, share: float) -> Tensor:
    """Non-target logits [B, C] that put ``share`` of the probability on the next class, ŷ + 1 mod C.

    The mapping is a fixed derangement, so every student of the box is misled to the same wrong class.

    Args:
        predicted: Predicted classes [B].
        classes: C ≥ 3.
        share: Share of the non-target probability on the decoy, in [1/(C−1), 1).
    """
    decoy = (predicted + 1) % classes
    height = math.log(share / (1 - share) * (classes - 2))
    return torch.zeros(len(predicted), classes, device=predicted.device).scatter_(1, decoy[:, None], height)
