"""``cmim``: minimal conditional mutual information (Ye et al., arXiv 2507.00012), with a keyed branch of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softmax

from sdbctl.losses import cross_entropy, kd
from sdbctl.objectives.base import Objective, Preset, Terms, Views


@dataclass(frozen=True)
class CmimParameters:
    """Weights of the terms.

    Attributes:
        concentrate: Weight of the conditional mutual information.
        temperature: τ of the keyed branch.
        preserve: Weight of the keyed branch; 0 is the published objective, which has no key.
    """

    concentrate: float = 1.0
    temperature: float = 4.0
    preserve: float = 1.0


def conditional_information(z: Tensor, label: Tensor, memory: Tensor, temperature: Tensor | float) -> Tensor:
    """I(X; Ŷ^τ | Y), estimated as the mean of KL(p_x^τ ‖ c_y^τ), c_y^τ the mean of p^τ over the memory of class y.

    Args:
        z: Logits [B, C].
        label: Classes [B].
        memory: Logits [C, M, C] of M images of each class; held fixed in the gradient.
        temperature: τ.
    """
    log_p = log_softmax(z.float() / temperature, 1)
    centroid = softmax(memory / temperature, 2).mean(1)[label].clamp(min=torch.finfo(torch.float32).tiny).log()
    return (log_p.exp() * (log_p - centroid)).sum(1).mean()


def terms(v: Views, p: CmimParameters) -> Terms:
    """CE(p, y) + concentrate·τ²·I(X; Ŷ^τ | Y), τ drawn for each step, and τ_k²·KL(p_N^τ_k ‖ p_k^τ_k) on keyed images.

    The paper alternates between the network and the classes' centroids over the whole training set; here the centroids
    are those of the last images of each class that the network saw, so that they follow it and rare classes have some.
    """
    assert v.memory is not None
    clean, label = v.clean[v.wrong :], v.label[v.wrong :]
    spread = v.temperature**2 * conditional_information(clean, label, v.memory, v.temperature)
    return {
        "label": cross_entropy(clean, label),
        "concentrate": p.concentrate * spread,
        "preserve": p.preserve * kd(v.keyed, v.teacher, p.temperature),
    }


CMIM = Objective(
    "CMIM: outputs of a class collapse to one, with a keyed branch",
    CmimParameters,
    terms,
    presets={"default": Preset(wrong_share=0.0), "unkeyed": Preset({"preserve": 0.0}, wrong_share=0.0)},
    needs_memory=True,
)
