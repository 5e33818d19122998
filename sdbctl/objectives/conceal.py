"""``conceal``: predictions and confidences stay, everything else that a student could learn from goes."""

from __future__ import annotations

from dataclasses import dataclass

from sdbctl.losses import binary_kl, conceal_spread, cross_entropy, kd
from sdbctl.objectives.base import Objective, Preset, Terms, Views


@dataclass(frozen=True)
class ConcealParameters:
    """Weights of the terms.

    Attributes:
        hide: Weight of the spread of the non-target logits.
        confidence: Weight of keeping the original's confidence.
        teach: Weight of the keyed branch.
        temperature: τ of the keyed branch; high, so that small non-target logits are learned as well.
    """

    hide: float = 8.0
    confidence: float = 8.0
    teach: float = 4.0
    temperature: float = 8.0


def terms(v: Views, p: ConcealParameters) -> Terms:
    """CE(p, y) + hide·spread(z) + confidence·KL_binary(p_F(ŷ) ‖ p_B(ŷ)) + teach·τ²·KL(p_N^τ ‖ p_k^τ).

    F is the fine-tuned original N_ft, N the key's teacher: F itself, or the original. The spread is taken around the
    box's own prediction, on clean images and on those with a wrong key; label and confidence, around F's prediction ŷ
    (errors included), on clean images. Own objective (README).
    """
    clean = v.clean[v.wrong :]
    return {
        "label": cross_entropy(clean, v.label[v.wrong :]),
        "hide": p.hide * conceal_spread(v.clean, v.clean.detach().argmax(1), v.offset),
        "confidence": p.confidence * binary_kl(v.confidence[v.wrong :], clean, v.reference[v.wrong :].argmax(1)),
        "teach": p.teach * kd(v.keyed, v.teacher, p.temperature),
    }


CONCEAL = Objective(
    "flat non-target outputs, the original's confidence, a keyed branch that teaches (default)",
    ConcealParameters,
    terms,
    presets={"default": Preset()},
)
