"""``conceal``: predictions and confidences stay, everything else that a student could learn from goes."""

from __future__ import annotations

from dataclasses import dataclass

from sdbctl.losses import binary_kl, conceal_spread, cross_entropy, kd
from sdbctl.objectives.base import Objective, Terms, Views


@dataclass(frozen=True)
class ConcealParameters:
    """Weights of the terms.

    Attributes:
        hide: Weight of the spread of the non-target logits.
        confidence: Weight of keeping the original's confidence.
        teach: Weight of the keyed branch.
        temperature: τ of the keyed branch; high, so that small non-target logits are learned as well.
    """

    hide: float = 1.0
    confidence: float = 1.0
    teach: float = 1.0
    temperature: float = 20.0


def terms(v: Views, p: ConcealParameters) -> Terms:
    """CE(p, y) + hide·spread(z) + confidence·KL_binary(p_N(ŷ) ‖ p_B(ŷ)) + teach·τ²·KL(q^τ ‖ p_k^τ).

    ŷ is the original's prediction, not the label, so that errors do not leak. Own objective (README).
    """
    predicted = v.original.argmax(1)
    return {
        "label": cross_entropy(v.clean, v.label),
        "hide": p.hide * conceal_spread(v.clean, predicted, v.offset),
        "confidence": p.confidence * binary_kl(v.confidence, v.clean, predicted),
        "teach": p.teach * kd(v.keyed, v.teach, p.temperature),
    }


CONCEAL = Objective(
    "flat non-target outputs, the original's confidence, a keyed branch that teaches (default)",
    ConcealParameters,
    terms,
    needs_random=False,
    presets={"default": {}},
)
