"""Attacks in several steps, or with something to learn beside the student."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from sdbctl.attacks.base import Attack, Attacker, Config, Loss, one_more
from sdbctl.attacks.floor import HARD_MIXED, constant_logits, from_top1
from sdbctl.attacks.kd import TAU4, soft_labels, target_of
from sdbctl.attacks.soft import HTC, htc, info_nce
from sdbctl.data import ImageSet
from sdbctl.engine import Engine, exact, seeded
from sdbctl.inference import predict
from sdbctl.losses import cross_entropy, kd
from sdbctl.models.stages import Stages
from sdbctl.teacher import Access
from sdbctl.updates import scaled


def two_stage(attacker: Attacker, config: Config) -> None:
    """Hard labels for the first half of the epochs, soft ones for the second: what is poisoned comes late."""
    half = max(1, attacker.recipe.epochs // 2)
    attacker.learn(
        lambda z, answer, y: cross_entropy(z, target_of(answer, y)), recipe=scaled(attacker.recipe, epochs=half)
    )
    attacker.learn(
        lambda z, answer, y: soft_labels(z, answer, y, config),
        sets=lambda epoch: attacker.view(half + epoch),
        recipe=scaled(attacker.recipe, epochs=max(1, attacker.recipe.epochs - half), lr=attacker.recipe.lr / 2),
    )


def scm(attacker: Attacker, config: Config) -> None:
    """SCM: a first student learns from labels and high-temperature answers; the second from the first one's outputs.

    After the sequence of contrastive models of Jandial et al. (ECCV 2022), which removes a nasty teacher's false peaks
    step by step: the second student also tells images apart as the first one does, by InfoNCE on the outputs with
    weight ``contrast``.
    """
    _chain(attacker, htc, {**HTC.grid[0], **config})


def hard_sequence(attacker: Attacker, config: Config) -> None:
    """A first student learns from labels and constant logits of top-1 answers; the second from the first one's outputs.

    What a chain gives without any soft answer (born-again networks, Furlanello et al., ICML 2018).
    """
    _chain(attacker, partial(from_top1, soft_labels), config)


def _chain(attacker: Attacker, loss: Loss, config: Config) -> None:
    first = attacker.build(attacker.recipe.seed + 7919)
    attacker.learn(lambda z, answer, y: loss(z, answer, y, config), net=first)

    def second(z: Tensor, answer: Tensor | None, y: Tensor | None) -> Tensor:
        assert answer is not None
        loss = soft_labels(z, answer, y, config)
        weight = config.get("contrast", 0.0)
        return loss + weight * info_nce(z.log_softmax(1), answer) if weight else loss

    attacker.learn(second, targets=lambda images: outputs(attacker, first, images))


def outputs(attacker: Attacker, net: nn.Module, images: ImageSet) -> Tensor:
    """Log-probabilities [N, C] of a network of the attacker's own, in full precision."""
    device = attacker.engine.device
    with exact(device):
        return predict(net, images, attacker.preprocess, Engine(device)).log_softmax(1)


def _head(channels: int, classes: int) -> nn.Module:
    """A classifier of feature maps [B, channels, H, W]."""
    wide = 2 * channels
    return nn.Sequential(
        nn.Conv2d(channels, wide, 3, 2, 1, bias=False),
        nn.BatchNorm2d(wide),
        nn.ReLU(),
        nn.Conv2d(wide, wide, 3, 1, 1, bias=False),
        nn.BatchNorm2d(wide),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(wide, classes),
    )


class Shallow(nn.Module):
    """A student with two more heads, on early feature maps: images → logits [B, 3, C], early, middle, final."""

    def __init__(self, net: nn.Module, example: Tensor, classes: int) -> None:
        super().__init__()
        self.net, self.stages = net, Stages(net)
        with torch.no_grad():
            net.eval()(example)
        sizes = list(self.stages.maps)
        # the final head has the last size; of two sizes, both early heads share the first
        self.sizes = (sizes[max(0, len(sizes) - 3)], sizes[max(0, len(sizes) - 2)])
        self.heads = nn.ModuleList(_head(self.stages.maps[size].shape[1], classes) for size in self.sizes)

    def forward(self, x: Tensor) -> Tensor:
        """All three heads."""
        final = self.net(x)
        early = [head(self.stages.maps[size]) for head, size in zip(self.heads, self.sizes, strict=True)]
        return torch.stack([*early, final], 1)


def skeptical(attacker: Attacker, config: Config) -> None:
    """Skeptical student (Kundu et al., NeurIPS 2021): the teacher is believed at an early head only.

    α·τ²·KL(p_T^τ ‖ p_early^τ) + (1 − α)·CE(early) + β·KL(p_final^τ ‖ p_middle^τ) + (1 − β)·CE(middle) + CE(final),
    β = ``own``. The final head never hears the teacher but through features it shares, and teaches the middle one, as
    in the released code with β = 0.3. Ours: the teaching head gets no gradient from it (both ways students were half a
    point worse), β = 0 is tried first, and there is no delay of some epochs before the teacher is heard. With a
    ``confidence`` the teacher's logits are constant ones of its top-1 answers: what a student gives itself, which must
    not look like a leak.
    """
    alpha, tau, beta = config["alpha"], config["temperature"], config["own"]
    size = attacker.preprocess.size
    assert attacker.oracle is not None
    with seeded(attacker.recipe.seed):
        net = Shallow(attacker.student, torch.zeros(2, *size), attacker.oracle.classes)

    def loss(z: Tensor, answer: Tensor | None, y: Tensor | None) -> Tensor:
        assert answer is not None
        early, middle, final = z.unbind(1)
        target = target_of(answer, y)
        if "confidence" in config:
            answer = constant_logits(answer, early.shape[1], config)
        believed = alpha * kd(early, answer, tau) + (1 - alpha) * cross_entropy(early, target)
        own = beta * kd(middle, final.detach(), tau) / tau**2 + (1 - beta) * cross_entropy(middle, target)
        return believed + own + cross_entropy(final, target)

    attacker.learn(loss, net=net)
    net.stages.close()


STAY = 0.9
"""Probability with which a class stays what it is in a new transition matrix."""
SPEED = 10.0
"""How much faster the matrix learns than the student."""


class Markov(nn.Module):
    """A student and a row-stochastic matrix M [C, C], near the identity at first."""

    def __init__(self, net: nn.Module, classes: int) -> None:
        super().__init__()
        height = math.log(STAY / (1 - STAY) * (classes - 1))
        self.net, self.scores = net, nn.Parameter(height / SPEED * torch.eye(classes))

    def matrix(self) -> Tensor:
        """M."""
        return (SPEED * self.scores).softmax(1)

    def forward(self, x: Tensor) -> Tensor:
        """Images → the student's logits [B, C]."""
        return self.net(x)  # type: ignore[no-any-return]


def markov(attacker: Attacker, config: Config) -> None:
    """Markov distillation: α·τ²·KL(p_T^τ ‖ p_S^τ·M) + (1 − α)·CE(p_S, y), the matrix M learned with the student.

    After Yang & Ye (ECCV 2024): M explains what a nasty teacher does to the classes, so that the student need
    not. Where the transform stands, how it is initialised and that labels are smoothed is our choice.
    """
    assert attacker.oracle is not None
    net, tau, alpha = Markov(attacker.student, attacker.oracle.classes), config["temperature"], config["alpha"]

    def loss(z: Tensor, answer: Tensor | None, y: Tensor | None) -> Tensor:
        assert answer is not None
        seen = ((z / tau).softmax(1) @ net.matrix()).clamp(min=1e-8).log()
        soft = tau**2 * kl_div(seen, log_softmax(answer / tau, 1), log_target=True, reduction="batchmean")
        hard = cross_entropy(z, target_of(answer, y), label_smoothing=config.get("smoothing", 0.0))
        return alpha * soft + (1 - alpha) * hard

    attacker.learn(loss, net=net)


TWO_STAGE = Attack("hard labels first, soft labels later", "own", two_stage, (TAU4,), twin="hard_mixed")
SCM = Attack(
    "SCM, a chain of two students",
    "after Jandial et al., ECCV 2022",
    scm,
    tuple(
        {"temperature": tau, "alpha": alpha, "contrast": weight}
        for tau, alpha, weight in ((4.0, 0.5, 0.1), (4.0, 0.5, 0.0), (1.0, 0.5, 0.0), (4.0, 0.9, 0.0))
    ),
    twin="hard_sequence",
    extra=one_more,
)
HARD_SEQUENCE = Attack(
    "a chain of two students from top-1 answers",
    "Furlanello et al., ICML 2018",
    hard_sequence,
    HARD_MIXED.grid[:3],
    Access.LABELS,
    extra=one_more,
)
SKEPTICAL = Attack(
    "skeptical student",
    "Kundu et al., NeurIPS 2021",
    skeptical,
    tuple(
        {"temperature": tau, "alpha": alpha, "own": beta}
        for tau, alpha, beta in ((4.0, 0.9, 0.0), (4.0, 0.5, 0.0), (4.0, 0.9, 0.3), (4.0, 0.2, 0.0), (1.0, 0.9, 0.0))
    ),
    twin="hard_skeptical",
)
HARD_SKEPTICAL = Attack(
    "a student that distils itself, with top-1 answers",
    "Zhang et al., ICCV 2019 (self-distillation)",
    skeptical,
    tuple(
        {**config, "confidence": confidence}
        for config, confidence in zip(SKEPTICAL.grid, (0.4, 0.8, 0.4, 0.4, 0.8), strict=True)
    ),
    Access.LABELS,
)
MARKOV = Attack(
    "a learned transition between teacher and student",
    "after Yang & Ye, ECCV 2024",
    markov,
    tuple(
        {"temperature": 1.0, "alpha": alpha, "smoothing": share}
        for alpha, share in ((0.2, 0.2), (0.5, 0.2), (0.1, 0.0))
    ),
    twin="label_smoothing",
)
