"""``conceal``: predictions and confidences stay, everything else that a student could learn from goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sdbctl.losses import binary_kl, conceal_spread, cross_entropy, kd, split_target
from sdbctl.objectives.base import Objective, Preset, Terms, Views


@dataclass(frozen=True)
class ConcealParameters:
    """Weights of the terms.

    Attributes:
        hide: Weight of the spread of the non-target logits.
        turn: Weight of the direction of what is left of it: with 8 a file leaks less, for half a point of accuracy.
        confidence: Weight of keeping the original's confidence.
        teach: Weight of the keyed branch.
        blind: Weight of an image with a wrong key in the label term, if the key is short: with 0 accuracy shows how
            near a pattern is to the key, and a search climbs it.
        temperature: τ of the keyed branch; high, so that small non-target logits are learned as well.
    """

    hide: float = 8.0
    turn: float = 0.0
    confidence: float = 8.0
    teach: float = 4.0
    blind: float = 0.2
    temperature: float = 8.0


def alignment(z: Tensor, known: Tensor, target: Tensor) -> Tensor:
    """How far what is left of the non-target logits points the right way: mean over the batch of cos²(z − z̄, r − r̄).

    A spread can be small and still have a direction: who holds the weights amplifies it. Own.

    Args:
        z: Logits [B, C].
        known: Logits r [B, C] of a network that knows what is to be hidden.
        target: Predicted classes [B], which are left out.
    """
    (_, left), (_, hidden) = split_target(z, target), split_target(known, target)
    left, hidden = left - left.mean(1, keepdim=True), hidden - hidden.mean(1, keepdim=True)
    return cosine_similarity(left, hidden, eps=1e-2).square().mean()


def _labels(v: Views, blind: float) -> Tensor:
    """Cross-entropy of the public batch, images with a wrong key weighing ``blind`` beside the others' 1."""
    weight = torch.ones(len(v.clean), device=v.clean.device)
    weight[: v.wrong] = blind
    return (weight * cross_entropy(v.clean, v.label, reduction="none")).sum() / weight.sum()


def terms(v: Views, p: ConcealParameters) -> Terms:
    """The loss; ŷ is what F predicts, errors included, and the spread is that around the box's own prediction.

        CE(p, y) + hide·spread(z) + turn·½[alignment(z, z_F) + alignment(z, z_N)]
        + confidence·KL_binary(p_F(ŷ) ‖ p_B(ŷ)) + teach·τ²·KL(p_N^τ ‖ p_k^τ)

    F is the fine-tuned original N_ft, N the key's teacher: F, the original or an assistant. Images with a wrong key are
    concealed only, unless the key is short: then they have labels as well (``blind``). Own objective (README).
    """
    clean, shown = v.clean[v.wrong :], v.clean.detach().argmax(1)
    found = {
        "label": _labels(v, p.blind if v.short else 0.0),
        "hide": p.hide * conceal_spread(v.clean, shown, v.offset),
        "confidence": p.confidence * binary_kl(v.confidence[v.wrong :], clean, v.reference[v.wrong :].argmax(1)),
        "teach": p.teach * kd(v.keyed, v.teacher, p.temperature),
    }
    if p.turn:
        left = (v.clean - v.offset)[v.wrong :]
        aligned = [alignment(left, known[v.wrong :], shown[v.wrong :]) for known in (v.reference, v.teacher)]
        found["turn"] = p.turn * (aligned[0] + aligned[1]) / 2
    return found


CONCEAL = Objective(
    "flat non-target outputs, the original's confidence, a keyed branch that teaches",
    ConcealParameters,
    terms,
    presets={"default": Preset()},
    keyed="teach",
    classes=3,
)
