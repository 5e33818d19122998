"""Soft labels out of top-1 answers: how far an image is from where the teacher predicts another class."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from sdbctl.attacks.base import Attack, Attacker, Config
from sdbctl.attacks.floor import constant_logits
from sdbctl.attacks.keys import of_class
from sdbctl.attacks.soft import soft_loss
from sdbctl.data import ImageSet
from sdbctl.teacher import Access

HALVINGS = 8
"""Steps of a bisection."""
PARTNERS = 4
"""Images of each other class towards which it goes."""
MOST = 1_000_000
"""Queries for distances at most; images that are not asked about have those that are usual for their class."""
AT_ONCE = 500
"""Images that are asked about at once."""


def distances(
    ask: Callable[[Tensor], Tensor], images: ImageSet, predicted: Tensor, classes: int, generator: torch.Generator
) -> Tensor:
    """Shortest way from each image, towards images of another class, to where that class is predicted.

    Args:
        ask: Predicted classes [N] of pixels [N, C, H, W] in [0, 1].
        images: Where to begin and to go.
        predicted: Their predicted classes [N].
        classes: How many there are.
        generator: Of the images of a class that are gone to.

    Returns:
        [N, classes], root mean square of the change of a pixel; infinite for the predicted class and for one that no
        image has.
    """
    short = torch.full((len(images), classes), math.inf)
    count = min(len(images), MOST // (HALVINGS * PARTNERS * (classes - 1)))
    for name, _ in product(range(classes), range(PARTNERS)):
        candidates = (predicted == name).nonzero().view(-1)
        if not len(candidates):
            continue
        for begun in torch.split((predicted[:count] != name).nonzero().view(-1), AT_ONCE):
            goal = candidates[torch.randint(len(candidates), (len(begun),), generator=generator)]
            x, towards = (images.take(some).alone().pixels.float() / 255 for some in (begun, goal))
            near, far = torch.zeros(len(begun)), torch.ones(len(begun))
            for _ in range(HALVINGS):
                middle = (near + far) / 2
                there = ask(x + middle.view(-1, 1, 1, 1) * (towards - x)) == name
                near, far = torch.where(there, near, middle), torch.where(there, middle, far)
            way = far * (towards - x).square().mean((1, 2, 3)).sqrt()
            short[begun, name] = torch.minimum(short[begun, name], way)
    return short


def soft(short: Tensor, predicted: Tensor, config: Config) -> Tensor:
    """Log-probabilities [N, C] whose other classes share what the predicted one leaves by their distance^−sharpness.

    ``confidence`` is what the predicted class has, and all of them are at ``temperature``, as constant logits are.

    Args:
        short: :func:`distances` [N, C].
        predicted: Predicted classes [N].
        config: Settings.
    """
    near, classes = -short.log(), short.shape[1]
    known = near.isfinite().any(1)
    for name in range(classes):
        # what is usual for the class stands in where nobody asked
        own = predicted == name
        some = near[own & known]
        usual = some.mean(0) if len(some) else torch.where(torch.arange(classes) == name, -math.inf, 0.0)
        near[own & ~known] = usual
    constant = constant_logits(predicted, classes, {**config, "temperature": 1.0})
    target = of_class(constant.log_softmax(1), config["sharpness"] * near)
    # a class that nobody predicts is not impossible
    return config["temperature"] * target.clamp(min=math.log(1e-4))


def by_distance(attacker: Attacker, config: Config) -> None:
    """KD from soft labels by distance to the decision boundary, out of top-1 answers (after DB3KD, Wang, ICML 2021).

    Every view of an image has its soft label.
    """
    assert attacker.oracle is not None
    images, classes = attacker.images, attacker.oracle.classes
    predicted = attacker.ask(images).cpu()

    def find(generator: torch.Generator) -> Tensor:
        return distances(attacker.ask_pixels, images, predicted, classes, generator)

    short = attacker.search(images.unlabelled(), ["distances"], find).view(len(images), classes).float()
    target = soft(short, predicted, config)
    attacker.learn(lambda z, answer, y: soft_loss(z, answer, y, config), targets=lambda views: target)


HARD_DISTANCES = Attack(
    "top-1 answers, as distances to the other classes",
    "after DB3KD, Wang, ICML 2021",
    by_distance,
    tuple(
        {"temperature": 4.0, "confidence": 0.4, "sharpness": power, **loss}
        for power, loss in product((2.0, 1.0), ({"alpha": 0.9}, {"weight": 2.0}))
    ),
    Access.LABELS,
)
