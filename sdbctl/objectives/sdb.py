"""``sdb``: the strategies of Safe Distillation Box (Ye et al., AAAI 2022, arXiv 2112.03695).

The preset ``release`` has the loss terms of the released code, which does not run. They differ from the paper's, and
so do ours with ``released`` = 1: the label counts twice in public; preservation is the squared distance of
probabilities at τ, not their divergence; augmentation sees what is positive of logits; and its sign is the other one.

Repaired: the squared distances, asked for with a reduction that there is not (``batchmean``), are means; the random
network, there for two architectures only, is one of the original's; the key, predictable because another generator was
seeded than the one it is drawn from, comes from the system; two names were undefined; and no model is selected on test
images.

What else differs: there both maximised distances, that of the disturbance and that of the augmentation, have no bound
(ours saturate at ``limit``); there the random network sees x (ours x_k); there the original is as it was given (ours is
fine-tuned, and the keyed branch may have another teacher); and there the learning rate falls in steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import mse_loss

from sdbctl.errors import UsageError
from sdbctl.losses import cross_entropy, kd, saturate
from sdbctl.objectives.base import Objective, Preset, Terms, Views


@dataclass(frozen=True)
class SdbParameters:
    """Weights of the strategies.

    Attributes:
        omega: ω, weight of knowledge disturbance.
        eta: η, weight of knowledge augmentation; its sign is ``away``.
        away: 1 keeps the keyed branch away from a random network (the paper), −1 pulls towards it (the
            released code).
        preserve: Weight of knowledge preservation.
        temperature: τ.
        released: 1 measures as the released code does, 0 as the paper; see above.
        limit: Upper bound of each maximised distance, nats.
    """

    omega: float = 0.3
    eta: float = 0.001
    away: float = 1.0
    preserve: float = 1.0
    temperature: float = 4.0
    released: float = 0.0
    limit: float = 8.0

    def __post_init__(self) -> None:
        if self.away not in (1.0, -1.0):
            raise UsageError(f"away is {self.away:g}", "use 1 (the paper) or -1 (the released code)")
        if self.released not in (0.0, 1.0):
            raise UsageError(f"released is {self.released:g}", "use 0 (the paper) or 1 (the released code)")


def disturbance(clean: Tensor, original: Tensor, keyed: Tensor, temperature: float, limit: float) -> Tensor:
    """Knowledge disturbance, to be maximised: D = sat(τ²·KL(p_B^τ(x) ‖ p_N^τ(x))) − KL(p_B(x) ‖ sg p_B(x_k)).

    The first distance saturates at ``limit``; the paper leaves it unbounded.
    """
    return saturate(kd(original, clean, temperature), limit) - kd(keyed.detach(), clean, 1.0)


def preservation(keyed: Tensor, teach: Tensor, label: Tensor, temperature: float, released: float = 0.0) -> Tensor:
    """Knowledge preservation: CE(p_B(x_k), y) + τ²·KL(p_N^τ(x) ‖ p_B^τ(x_k)); released: ‖p_N^τ(x) − p_B^τ(x_k)‖²."""
    if released:
        own, taught = ((z / temperature).softmax(1) for z in (keyed, teach))
        return cross_entropy(keyed, label) + mse_loss(own, taught)
    return cross_entropy(keyed, label) + kd(keyed, teach, temperature)


def augmentation(
    keyed: Tensor, original: Tensor, random: Tensor, away: float, limit: float, released: float = 0.0
) -> Tensor:
    """Knowledge augmentation, to be minimised: away·(0.01·‖B_k − N‖² − ‖B_k − R‖²), what is maximised saturated.

    Released: of logits below zero nothing is seen.
    """
    if released:
        keyed, original, random = keyed.relu(), original.relu(), random.relu()
    near, far = 0.01 * mse_loss(keyed, original), mse_loss(keyed, random)
    return near - saturate(far, limit) if away > 0 else far - saturate(near, limit)


def terms(v: Views, p: SdbParameters) -> Terms:
    """CE(p, y) − ω·D + preservation + η·augmentation (paper, eq. 4 to 8), released with 2·CE(p, y).

    The disturbance is that of the fine-tuned original; the keyed terms are those of the key's teacher.
    """
    assert v.random is not None
    return {
        "label": (1 + p.released) * cross_entropy(v.clean[v.wrong :], v.label[v.wrong :]),
        "disturb": -p.omega * disturbance(v.clean, v.reference, v.keyed, p.temperature, p.limit),
        "preserve": p.preserve * preservation(v.keyed, v.teacher, v.label, p.temperature, p.released),
        "augment": p.eta * augmentation(v.keyed, v.teacher, v.random, p.away, p.limit, p.released),
    }


SDB = Objective(
    "the paper's disturbance, preservation and augmentation",
    SdbParameters,
    terms,
    presets={
        "default": Preset(),
        "paper": Preset({"omega": 1.0}, strength=0.5, wrong_share=0.0, epochs=200, lr=0.1),
        "paper-100": Preset({"omega": 1.0, "temperature": 20.0}, strength=0.5, wrong_share=0.0, epochs=200, lr=0.1),
        "release": Preset(
            {"omega": 1.0, "away": -1.0, "released": 1.0}, strength=0.9, wrong_share=0.0, epochs=200, lr=0.1
        ),
    },
    divisors=("temperature", "limit"),
    signed=("away",),
    needs_random=True,
)
