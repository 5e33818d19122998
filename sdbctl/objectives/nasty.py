"""``nasty``: the Nasty Teacher (Ma et al., ICLR 2021, arXiv 2105.07381), with a keyed branch of its own."""

from __future__ import annotations

from dataclasses import dataclass

from sdbctl.losses import cross_entropy, kd, saturate
from sdbctl.objectives.base import Objective, Preset, Terms, Views


@dataclass(frozen=True)
class NastyParameters:
    """Weights of the terms.

    Attributes:
        omega: ω, weight of the distance from the original.
        temperature: τ of both branches.
        preserve: Weight of the keyed branch; 0 is the published objective, which has no key.
        limit: Upper bound of the distance, nats.
    """

    omega: float = 0.04
    temperature: float = 4.0
    preserve: float = 1.0
    limit: float = 400.0


def terms(v: Views, p: NastyParameters) -> Terms:
    """CE(p, y) − ω·sat(τ²·KL(p_B^τ ‖ p_F^τ)) (eq. 2), and τ²·KL(p_N^τ ‖ p_k^τ) on keyed images.

    F is the fine-tuned original, N the key's teacher; the paper, which does not fine-tune, has one.

    The paper leaves the distance unbounded; here it saturates, or training would go on without end.
    """
    return {
        "label": cross_entropy(v.clean[v.wrong :], v.label[v.wrong :]),
        "nasty": -p.omega * saturate(kd(v.reference, v.clean, p.temperature), p.limit),
        "preserve": p.preserve * kd(v.keyed, v.teacher, p.temperature),
    }


NASTY = Objective(
    "Nasty Teacher: far from the original in distribution, with a keyed branch",
    NastyParameters,
    terms,
    presets={
        "default": Preset(),
        "paper": Preset({"omega": 0.04, "preserve": 0.0}, wrong_share=0.0, epochs=160, lr=0.1),
        "paper-100": Preset(
            {"omega": 0.005, "temperature": 20.0, "preserve": 0.0}, wrong_share=0.0, epochs=200, lr=0.1
        ),
        "paper-200": Preset({"omega": 0.01, "temperature": 20.0, "preserve": 0.0}, wrong_share=0.0, epochs=200, lr=0.1),
    },
    divisors=("temperature", "limit"),
)
