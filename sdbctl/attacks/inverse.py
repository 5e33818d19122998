"""An attack that finds out which serving-time defence answers passed, and undoes it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sdbctl.attacks.base import Attack, Attacker, Config, one_more
from sdbctl.attacks.kd import soft_labels
from sdbctl.attacks.staged import outputs
from sdbctl.data import ImageSet
from sdbctl.engine import seeded
from sdbctl.losses import cross_entropy, kd
from sdbctl.wrappers import WRAPPERS, behind

COPIES, ANSWERS = 4, 40_000
"""Augmented copies of the transfer set on which shadow networks answer, and so many answers are enough."""
LOUDEST = 8.0
"""Their logits are scaled by up to this, down to its inverse, since the teacher may be surer than they are."""
LEAST = -14.0
"""Lower log-probabilities are as good as this one: defences show none below log 10⁻⁶."""
STEPS, ROWS, WIDTH = 1500, 512, 256
"""Training of the detector and of the inverse, and their hidden units."""


def shadows(attacker: Attacker) -> Tensor:
    """Log-probabilities [N, C] by the attacker's own networks, each trained on half of the images, of the other half.

    What a network says of images that it was trained on is too sure to be learned from.
    """

    def loss(z: Tensor, answer: Tensor | None, y: Tensor | None) -> Tensor:
        assert y is not None
        return cross_entropy(z, y)

    n = len(attacker.images)
    copies = max(1, min(COPIES, attacker.views, ANSWERS // n))
    answers = []
    for number in range(2):
        seen, unseen = range(number, n, 2), range(1 - number, n, 2)
        own = attacker.build(attacker.recipe.seed + 104729 + number)

        def part(epoch: int, seen: range = seen) -> ImageSet:
            return attacker.view(epoch).take(seen)

        attacker.learn(loss, net=own, sets=part, targets=lambda images: torch.empty(len(images), 0))
        answers += [outputs(attacker, own, attacker.view(copy).take(unseen)) for copy in range(copies)]
    return torch.cat(answers)


def draw(clean: Tensor, name: str, count: int) -> tuple[Tensor, Tensor]:
    """Answers [B, C] of the shadows as a defence shows them, and as they were; "" is none."""
    some = clean[torch.randint(len(clean), (count,))] * LOUDEST ** (2 * torch.rand(count, 1) - 1)
    return (behind(WRAPPERS[name], some) if name else some.log_softmax(1)), some.log_softmax(1)


def defence(clean: Tensor, answers: Tensor) -> str:
    """Which of :data:`sdbctl.wrappers.WRAPPERS` answers look like having passed, or "".

    Args:
        clean: Logits [N, C] of the shadows.
        answers: Log-probabilities [M, C].
    """
    names = ["", *WRAPPERS]
    each = ROWS // len(names) + 1
    labels = torch.arange(len(names)).repeat_interleave(each)

    def loss(net: nn.Module) -> Tensor:
        return cross_entropy(net(torch.cat([_shape(draw(clean, name, each)[0]) for name in names])), labels)

    tell = _fitted(_network(clean.shape[1], len(names)), loss)
    with torch.no_grad():
        return names[int(tell(_shape(answers)).log_softmax(1).mean(0).argmax())]


def inverse(clean: Tensor, name: str) -> nn.Module:
    """A network that maps what :func:`_shape` makes of a defence's answers to logits [B, C] of what was behind it."""

    def loss(net: nn.Module) -> Tensor:
        shown, wanted = draw(clean, name, ROWS)
        return kd(net(_shape(shown)), wanted, 2.0)

    return _fitted(_network(clean.shape[1], clean.shape[1]), loss)


def restored(attacker: Attacker, config: Config) -> None:
    """A learned inverse of the defence: which one it is, what was behind it, then KD from that.

    After D-DAE (Chen et al., IEEE S&P 2023): the attacker's own networks stand for the undefended one. Of their
    answers, behind each known defence and behind none, one network learns to tell which it was, and another, for the
    one that the box's answers look like, to undo it. If they look like those of none, they are taken as they are.
    """
    clean, answers = shadows(attacker), attacker.ask(attacker.view(0))
    with seeded(attacker.recipe.seed):
        found = defence(clean, answers)
        undo = inverse(clean, found) if found else None

    def targets(images: ImageSet) -> Tensor:
        told = attacker.ask(images)
        with torch.no_grad():
            return undo(_shape(told)).log_softmax(1) if undo is not None else told

    attacker.learn(lambda z, answer, y: soft_labels(z, answer, y, config), targets=targets)


def _shape(answers: Tensor) -> Tensor:
    """Log-probabilities [B, C] by class and by rank [B, 2C]."""
    known = answers.log_softmax(1).clamp(min=LEAST) / -LEAST
    return torch.cat([known, known.sort(1).values], 1)


def _network(classes: int, out: int) -> nn.Module:
    # a defence may leave differences that are small beside the values
    standardised = nn.BatchNorm1d(2 * classes, affine=False, momentum=None)
    return nn.Sequential(standardised, nn.Linear(2 * classes, WIDTH), nn.ReLU(), nn.Linear(WIDTH, out))


def _fitted(net: nn.Module, loss: Callable[[nn.Module], Tensor]) -> nn.Module:
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for _ in range(STEPS):
        optimiser.zero_grad()
        loss(net).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        slower.step()
    return net.eval()


RESTORED = Attack(
    "a learned inverse of the defence",
    "after D-DAE, IEEE S&P 2023",
    restored,
    tuple({"temperature": tau, "alpha": alpha} for tau, alpha in ((4.0, 0.9), (1.0, 0.9))),
    extra=one_more,
)
