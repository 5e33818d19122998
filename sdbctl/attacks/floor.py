"""The floor: students that anybody has without a soft output of the teacher."""

from __future__ import annotations

import math
from itertools import product

from torch import Tensor
from torch.nn.functional import one_hot

from sdbctl.attacks.base import Attack, Config, PerBatch
from sdbctl.losses import cross_entropy, kd
from sdbctl.teacher import Access


def label_smoothing(z: Tensor, answer: Tensor | None, y: Tensor | None, config: Config) -> Tensor:
    """CE(z, (1 − ε)·y + ε/C) (Szegedy et al., CVPR 2016); ε = 0 is plain cross-entropy."""
    assert y is not None
    return cross_entropy(z, y, label_smoothing=config.get("smoothing", 0.0))


def class_constant(z: Tensor, answer: Tensor | None, y: Tensor | None, config: Config) -> Tensor:
    """KD from a teacher that knows nothing but the label: logits m·onehot(y), τ²·KL(p_T^τ ‖ p_S^τ).

    The margin m gives the label the probability ``confidence`` at temperature τ, whatever the number of
    classes: m = τ·(log(c / (1 − c)) + log(C − 1)). It is the regularisation of distillation without any
    information (compare teacher-free KD, Yuan et al., CVPR 2020). With α < 1, (1 − α)·CE is added as in KD.
    """
    assert y is not None
    return _from_constant(z, y, y, config)


def _from_constant(z: Tensor, told: Tensor, y: Tensor, config: Config) -> Tensor:
    alpha, soft = config.get("alpha", 1.0), kd(z, constant_logits(told, z.shape[1], config), config["temperature"])
    return soft if alpha == 1.0 else alpha * soft + (1 - alpha) * cross_entropy(z, y)


def constant_logits(y: Tensor, classes: int, config: Config) -> Tensor:
    """Logits m·onehot(y) [B, C], whose label has probability ``confidence`` at ``temperature``.

    With few classes that is at least half as much again as chance: it must favour the label.
    """
    tau, share = config["temperature"], max(config["confidence"], min(1.5 / classes, 0.9))
    margin = tau * (math.log(share / (1 - share)) + math.log(classes - 1))
    return margin * one_hot(y, classes).float()


def hard_label(z: Tensor, answer: Tensor | None, y: Tensor | None, config: Config) -> Tensor:
    """CE(z, ŷ_T): the teacher's top-1 answers on every augmented query; with smoothing, if configured."""
    assert answer is not None
    return cross_entropy(z, answer, label_smoothing=config.get("smoothing", 0.0))


def hard_constant(z: Tensor, answer: Tensor | None, y: Tensor | None, config: Config) -> Tensor:
    """:func:`class_constant` with the teacher's top-1 answers in place of labels."""
    assert answer is not None
    return _from_constant(z, answer, answer, config)


def hard_mixed(z: Tensor, answer: Tensor | None, y: Tensor | None, config: Config) -> Tensor:
    """α·KD from constant logits of the teacher's top-1 answers + (1 − α)·CE(z, y): KD's mixture."""
    assert answer is not None and y is not None
    return _from_constant(z, answer, y, config)


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

CROSS_ENTROPY = Attack(
    "cross-entropy on the labels", "textbook", "floor", Access.NONE, True, ({},), PerBatch(label_smoothing)
)
LABEL_SMOOTHING = Attack(
    "cross-entropy on smoothed labels",
    "Szegedy et al., CVPR 2016",
    "floor",
    Access.NONE,
    True,
    tuple({"smoothing": share} for share in (0.1, 0.3, 0.2, 0.05)),
    PerBatch(label_smoothing),
)
CLASS_CONSTANT = Attack(
    "distillation from constant logits of the label",
    "Yuan et al., CVPR 2020",
    "floor",
    Access.NONE,
    True,
    CONSTANTS,
    PerBatch(class_constant),
)
HARD_LABEL = Attack(
    "the teacher's top-1 answers as labels",
    "Orekondy et al., CVPR 2019 (top-1 access)",
    "floor",
    Access.LABELS,
    False,
    ({}, {"smoothing": 0.1}),
    PerBatch(hard_label),
)
HARD_CONSTANT = Attack(
    "distillation from constant logits of the teacher's top-1 answers",
    "top-1 access, regularised like KD",
    "floor",
    Access.LABELS,
    False,
    CONSTANTS,
    PerBatch(hard_constant),
)
HARD_MIXED = Attack(
    "labels, and constant logits of the teacher's top-1 answers",
    "top-1 access, mixed like KD",
    "floor",
    Access.LABELS,
    True,
    (*_FIRST, *(config for config in _MIXED if config not in _FIRST)),
    PerBatch(hard_mixed),
)
