"""``ast``: the Adversarial Sparse Teacher (Yilmaz & Keles, arXiv 2403.05181), with a keyed branch of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdbctl.errors import UsageError
from sdbctl.losses import cross_entropy, kd
from sdbctl.objectives.base import Objective, Preset, Terms, Views


@dataclass(frozen=True)
class AstParameters:
    """Weights of the terms.

    Attributes:
        alpha: α, weight of the divergence against that of the labels.
        temperature: τ of both branches.
        keep: k, classes that an adversarial answer keeps.
        preserve: Weight of the keyed branch; 0 is the published objective, which has no key.
    """

    alpha: float = 0.05
    temperature: float = 6.0
    keep: float = 2
    preserve: float = 1.0

    def __post_init__(self) -> None:
        if self.keep < 1 or self.keep != int(self.keep):
            raise UsageError(f"keep is {self.keep:g}", "use a whole number of classes, such as 2")


def sparse(z: Tensor, keep: int) -> Tensor:
    """Logits [B, C] of which only the ``keep`` highest stay, the others −∞."""
    best = z.topk(min(keep, z.shape[1]), 1)
    return torch.full_like(z, -torch.inf).scatter(1, best.indices, best.values)


def predictive_divergence(z: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Exponential predictive divergence Σ_j exp(q_j)·(q_j − p_j), mean over the batch.

    It is linear in p, so flatter outputs are not punished as by KL: what is pulled up are the classes of q.

    Args:
        z: Logits [B, C] of p, which get the gradient.
        target: Logits [B, C] of q; −∞ for classes without probability.
        temperature: τ of both.
    """
    p, q = (z / temperature).softmax(1), (target / temperature).softmax(1)
    return (q.exp() * (q - p)).sum(1).mean()


def terms(v: Views, p: AstParameters) -> Terms:
    """(1 − α)·CE(p, y) + α·τ²·EPD(sparse_k(z_adv) ‖ p^τ), and τ²·KL(p_N^τ ‖ p_k^τ) on keyed images.

    z_adv are the box's own answers, in evaluation mode and without gradient, to images that were made adversarial
    for the original. The released code draws them in another order than the images, so that they belong to other
    images; here they belong to the same.
    """
    assert v.adversarial is not None
    target = sparse(v.adversarial[v.wrong :], int(p.keep))
    divergence = predictive_divergence(v.clean[v.wrong :], target, p.temperature)
    return {
        "label": (1 - p.alpha) * cross_entropy(v.clean[v.wrong :], v.label[v.wrong :]),
        "sparse": p.alpha * p.temperature**2 * divergence,
        "preserve": p.preserve * kd(v.keyed, v.teacher, p.temperature),
    }


AST = Objective(
    "Adversarial Sparse Teacher: outputs of adversarial images mixed in, with a keyed branch",
    AstParameters,
    terms,
    presets={
        "default": Preset(wrong_share=0.0),
        "paper": Preset({"preserve": 0.0}, wrong_share=0.0, epochs=160, lr=0.1),
        "paper-100": Preset(
            {"alpha": 0.035, "temperature": 30.0, "keep": 7, "preserve": 0.0}, wrong_share=0.0, epochs=200, lr=0.1
        ),
    },
    needs_adversarial=True,
)
