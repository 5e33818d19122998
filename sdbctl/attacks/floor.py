"""The floor: students that anybody has without a soft output of the teacher."""

from __future__ import annotations

import math
from functools import partial
from itertools import product

from torch import Tensor
from torch.nn.functional import one_hot

from sdbctl.attacks.base import Attack, Config, Loss, PerBatch
from sdbctl.attacks.kd import soft_labels
from sdbctl.losses import cross_entropy
from sdbctl.teacher import Access


def label_smoothing(z: Tensor, answer: Tensor | None, y: Tensor | None, config: Config) -> Tensor:
    """CE(z, (1 − ε)·y + ε/C) (Szegedy et al., CVPR 2016); ε = 0 is plain cross-entropy."""
    assert y is not None
    return cross_entropy(z, y, label_smoothing=config.get("smoothing", 0.0))


def constant_logits(y: Tensor, classes: int, config: Config) -> Tensor:
    """Logits m·onehot(y) [B, C], whose label has probability ``confidence`` at ``temperature``.

    The margin is m = τ·(log(c / (1 − c)) + log(C − 1)), whatever the number of classes. With few classes c is at least
    half as much again as chance: it must favour the label.
    """
    tau, share = config["temperature"], max(config["confidence"], min(1.5 / classes, 0.9))
    margin = tau * (math.log(share / (1 - share)) + math.log(classes - 1))
    return margin * one_hot(y, classes).float()


def hard_label(z: Tensor, answer: Tensor | None, y: Tensor | None, config: Config) -> Tensor:
    """CE(z, ŷ_T): the teacher's top-1 answers on every augmented query; with smoothing, if configured."""
    assert answer is not None
    return cross_entropy(z, answer, label_smoothing=config.get("smoothing", 0.0))


def from_label(loss: Loss, z: Tensor, answer: Tensor | None, y: Tensor | None, config: Config) -> Tensor:
    """Another loss, from constant logits of the label: what it gives without any information.

    Of KD that is its regularisation (compare teacher-free KD, Yuan et al., CVPR 2020).
    """
    assert y is not None
    return loss(z, constant_logits(y, z.shape[1], config), y, config)


def from_top1(loss: Loss, z: Tensor, answer: Tensor | None, y: Tensor | None, config: Config) -> Tensor:
    """Another loss, from constant logits of the teacher's top-1 answers."""
    assert answer is not None
    return loss(z, constant_logits(answer, z.shape[1], config), y, config)


def hard_constant(z: Tensor, answer: Tensor | None, y: Tensor | None, config: Config) -> Tensor:
    """KD from constant logits of the teacher's top-1 answers, which are the labels, too."""
    return from_top1(soft_labels, z, answer, answer, config)


# with the mixtures below as many as distillation has to choose from, or the floor would be too low
CONSTANTS = tuple(
    {"confidence": confidence, "temperature": temperature, "alpha": alpha}
    for temperature, confidence, alpha in (
        (4.0, 0.4, 1.0),
        (20.0, 0.2, 1.0),
        (4.0, 0.8, 1.0),
        (8.0, 0.2, 1.0),
        (4.0, 0.4, 0.9),
        (8.0, 0.4, 1.0),
    )
)
_FIRST = tuple(
    {**config, "alpha": alpha} for config, alpha in zip(CONSTANTS, (0.9, 0.9, 0.5, 0.9, 0.5, 0.5), strict=True)
)
_MIXED = tuple(
    {**config, "alpha": alpha} for config, alpha in product(CONSTANTS, (0.1, 0.5, 0.9)) if config["alpha"] == 1
)

CROSS_ENTROPY = Attack("cross-entropy on the labels", "textbook", PerBatch(label_smoothing), access=Access.NONE)
LABEL_SMOOTHING = Attack(
    "cross-entropy on smoothed labels",
    "Szegedy et al., CVPR 2016",
    PerBatch(label_smoothing),
    tuple({"smoothing": share} for share in (0.1, 0.3, 0.2, 0.05)),
    Access.NONE,
)
CLASS_CONSTANT = Attack(
    "distillation from constant logits of the label",
    "Yuan et al., CVPR 2020",
    PerBatch(partial(from_label, soft_labels)),
    CONSTANTS,
    Access.NONE,
)
HARD_LABEL = Attack(
    "the teacher's top-1 answers as labels",
    "Orekondy et al., CVPR 2019 (top-1 access)",
    PerBatch(hard_label),
    ({}, {"smoothing": 0.1}),
    Access.LABELS,
    labels=False,
)
HARD_CONSTANT = Attack(
    "distillation from constant logits of the teacher's top-1 answers",
    "top-1 access, regularised like KD",
    PerBatch(hard_constant),
    CONSTANTS,
    Access.LABELS,
    labels=False,
)
HARD_MIXED = Attack(
    "labels, and constant logits of the teacher's top-1 answers",
    "top-1 access, mixed like KD",
    PerBatch(partial(from_top1, soft_labels)),
    (*_FIRST, *(config for config in _MIXED if config not in _FIRST)),
    Access.LABELS,
)
