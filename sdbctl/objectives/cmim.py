"""``cmim``: minimal conditional mutual information (Ye et al., arXiv 2507.00012), with a keyed branch of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, one_hot

from sdbctl.losses import cross_entropy, kd
from sdbctl.objectives.base import Objective, Preset, Terms, Views

TEMPERATURES = (1.0, 4.0, 20.0)
"""Where the temperature spectrum is sampled."""


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


def conditional_information(z: Tensor, label: Tensor, temperature: float) -> Tensor:
    """I(X; Ŷ^τ | Y), estimated as the mean of n_y/(n_y − 1)·KL(p_x^τ ‖ mean of p^τ over the batch's class y).

    The factor corrects for an image's own share in the mean of its class; classes with one image say nothing.

    Args:
        z: Logits [B, C].
        label: Classes [B].
        temperature: τ.
    """
    log_p = log_softmax(z.float() / temperature, 1)
    same = one_hot(label, z.shape[1]).float()
    count = same.sum(0)
    mean = (same.T @ log_p.exp()) / count.clamp(min=1)[:, None]
    centroid = mean[label].clamp(min=torch.finfo(torch.float32).tiny).log().detach()
    divergence = (log_p.exp() * (log_p - centroid)).sum(1)
    several = (count / (count - 1).clamp(min=1))[label] * (count > 1)[label]
    return (several * divergence).mean()


def terms(v: Views, p: CmimParameters) -> Terms:
    """CE(p, y) + concentrate·mean over τ of τ²·I(X; Ŷ^τ | Y), and τ²·KL(p_N^τ ‖ p_k^τ) on keyed images.

    The paper alternates between the network and centroids of the whole training set, and has the temperatures
    drawn; here the centroids are those of the batch, held fixed in the gradient, and the temperatures are
    :data:`TEMPERATURES`.
    """
    clean, label = v.clean[v.wrong :], v.label[v.wrong :]
    spread = torch.stack([tau**2 * conditional_information(clean, label, tau) for tau in TEMPERATURES]).mean()
    return {
        "label": cross_entropy(clean, label),
        "concentrate": p.concentrate * spread,
        "preserve": p.preserve * kd(v.keyed, v.teacher, p.temperature),
    }


CMIM = Objective(
    "CMIM: outputs of a class collapse to one, with a keyed branch",
    CmimParameters,
    terms,
    presets={"default": Preset(), "unkeyed": Preset({"preserve": 0.0}, wrong_share=0.0)},
)
