"""How a box is trained: the settings, the owner's task, and the step."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from sdbctl import boxfile
from sdbctl.boxfile import Metadata
from sdbctl.data import Batch, ImageSet, Preprocess, Splits, batches
from sdbctl.engine import Engine, place, seeded
from sdbctl.errors import UsageError, check_known
from sdbctl.gate import key_strength
from sdbctl.inference import accuracy, predict, unseen_batch
from sdbctl.key import Key, embed
from sdbctl.losses import cross_entropy
from sdbctl.objectives import LOSSES, OBJECTIVES, Objective, Views
from sdbctl.objectives.base import decoy_offset
from sdbctl.patterns import WrongKeys
from sdbctl.updates import Recipe, scaled

REMEMBERED = 16
"""Images of each class whose last logits an objective with a memory sees."""
HIGHEST = 20.0
"""Highest temperature that is drawn for such an objective."""
PGD_EPSILON = 0.3
PGD_STEPS = 10
"""A quarter of the published number, with steps four times as large."""
TEACHERS = ("reference", "original", "assistant")
"""Whose answers the key may open."""
LARGEST = 1_000_000
"""What no parameter of an objective may exceed: losses would overflow."""


@dataclass(frozen=True)
class BoxConfig:
    """How to box.

    Attributes:
        objective: Name in :data:`sdbctl.objectives.OBJECTIVES`.
        parameters: Its parameters, by name; those not given keep their defaults.
        strength: λ of the key embedding x_k = λx + (1 − λ)K, in (0, 1).
        wrong_share: Share of the public batch that is mixed with wrong keys.
        disturb: 0, or how far to lead plain distillation astray, up to 1, at a price in calibration.
        teacher: Whose answers the key opens: the reference N_ft, the original as it was given, or an assistant.
        recipe: Training of the box, and of the reference N_ft before it.
    """

    objective: str
    parameters: Mapping[str, float] = field(default_factory=dict)
    strength: float = 0.7
    wrong_share: float = 0.4
    disturb: float = 0.0
    teacher: str = "reference"
    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=20, lr=0.05))

    def __post_init__(self) -> None:
        check_known("objective", self.objective, OBJECTIVES)
        check_known("teacher", self.teacher, TEACHERS)
        if not 0 < self.strength < 1:
            raise UsageError(f"key strength is {self.strength}", "use a number between 0 and 1, such as 0.5")
        if not 0 <= self.disturb <= 1:
            raise UsageError(f"disturb is {self.disturb}", "use a number from 0 (off) to 1")
        if not 0 <= self.wrong_share <= 1:
            raise UsageError(f"wrong share is {self.wrong_share}", "use a number from 0 to 1")
        self.resolved()
        if not self.keyed and self.teacher == "assistant":
            raise UsageError(
                "this objective has no keyed branch that could learn from an assistant", "leave out --teacher"
            )
        if not self.trained and self.teacher != "reference":
            raise UsageError(
                f"{self.objective} teaches its key nothing else than the reference",
                "leave out --teacher, or use --objective conceal; export --keyed says who answers key holders",
            )
        if not self.trained and self.disturb:
            raise UsageError(f"{self.objective} trains nothing that could disturb", "use --objective conceal")

    @classmethod
    def of(cls, objective: str, preset: str | None, parameters: Mapping[str, float], **asked: Any) -> BoxConfig:
        """A preset of an objective, or its default one, but for what was asked for; None is not asked for.

        Raises:
            UsageError: Objective or preset is unknown, or a value is out of range.
        """
        recipe, presets = cls(objective).recipe, OBJECTIVES[objective].presets
        if asked.get("wrong_share") is not None and objective not in LOSSES:
            raise UsageError(f"{objective} trains nothing with wrong keys", "use --objective conceal")
        check_known(f"{objective} preset", preset, presets)
        base = presets[preset or "default"]
        chosen: dict[str, Any] = {"strength": base.strength, "wrong_share": base.wrong_share}
        chosen |= {name: value for name, value in asked.items() if value is not None}
        return cls(
            objective,
            {**base.parameters, **parameters},
            recipe=scaled(recipe, epochs=base.epochs, lr=base.lr),
            **{name: value for name, value in chosen.items() if value is not None},
        )

    @property
    def keyed(self) -> bool:
        """Whether the key opens the answers of a teacher."""
        weight = OBJECTIVES[self.objective].keyed
        return weight is None or bool(getattr(self.resolved(), weight))

    @property
    def trained(self) -> bool:
        """Whether the network is changed, or stays the reference."""
        return self.objective in LOSSES

    def fitted(self, size: Sequence[int]) -> BoxConfig:
        """With a λ that a graph finds in images of a size (C, H, W), where the network is not trained with one.

        Raises:
            UsageError: They are too small for a key, or for this λ.
        """
        return self if self.trained else replace(self, strength=key_strength(size, self.strength))

    def resolved(self) -> Any:
        """The objective's parameter dataclass, filled in.

        Raises:
            UsageError: A parameter is unknown, or out of range.
        """
        objective = OBJECTIVES[self.objective]
        known = _parameters(objective)
        for name, value in self.parameters.items():
            if name not in known:
                others = [other for other, one in OBJECTIVES.items() if name in _parameters(one)]
                also = f"; --objective {' or '.join(others)} has it" if others else ""
                raise UsageError(
                    f"objective {self.objective} has no parameter {name}",
                    f"it has: {', '.join(known) or 'none'}{also}",
                )
            divides = name in objective.divisors
            fits = name in objective.signed or (value > 0 if divides else value >= 0)
            if not (fits and abs(value) <= LARGEST):
                least = "above 0" if divides else "from 0"
                raise UsageError(f"{name} of {self.objective} is {value:g}", f"use a number {least} to {LARGEST:,}")
        return objective.parameters(**self.parameters)

    def check_classes(self, classes: int) -> None:
        """Refuse what too few classes make pointless, before hours of training.

        Raises:
            UsageError: They are too few.
        """
        if self.disturb and classes < 3:
            raise UsageError("--disturb moves probability to a third class", "leave it out for two classes")
        if classes < OBJECTIVES[self.objective].classes:
            raise UsageError(
                f"of {classes} classes {self.objective} has none to hide, nor to open with a key",
                "use --objective guard, or export --wrapper top1",
            )

    def trainable_and_frozen(self) -> tuple[int, int]:
        """Forward passes per image of one step: with gradient, and without."""
        if not self.trained:
            return 0, 0
        objective = OBJECTIVES[self.objective]
        return 2, 1 + (self.teacher != "reference") + objective.needs_random + objective.needs_adversarial

    def describe(self) -> dict[str, Any]:
        """Everything that decides the result, for the metadata."""
        unused = ("parameters", *(() if self.trained else ("wrong_share", "disturb", "teacher")))
        values = {name: value for name, value in asdict(self).items() if name not in unused}
        return values | asdict(self.resolved())


def _parameters(objective: Objective) -> list[str]:
    return [item.name for item in fields(objective.parameters)]


@dataclass(frozen=True)
class Task:
    """The owner's data and how the model wants it.

    Attributes:
        name: Name of the data set.
        classes: Class names.
        data: Splits; ``owner`` is trained on, ``validation`` watched, ``test`` measured once at the end.
        preprocess: The original's normalisation.
        engine: Where to compute.
    """

    name: str
    classes: tuple[str, ...]
    data: Splits
    preprocess: Preprocess
    engine: Engine

    def describe(self, **said: Any) -> Metadata:
        """What the file of a network for this task says of it, beside what is ``said``."""
        return Metadata(
            classes=self.classes,
            preprocess=self.preprocess,
            data={"name": self.name, **self.data.describe()},
            versions=boxfile.versions(),
            **said,
        )

    def top1(self, model: nn.Module, images: ImageSet) -> float:
        """Accuracy of a model, which is moved to the device, in percent."""
        return accuracy(place(model, self.engine.device), images, self.preprocess, self.engine)


def plain_step(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """Cross-entropy on the labels."""
    return {"label": cross_entropy(model(batch.x), batch.y)}


class BoxStep:
    """The step that trains a box: public and keyed branch in one forward pass, all other networks frozen.

    Each image of a batch is seen with the next key.

    Args:
        teacher: Whose answers the key opens; it may be the reference itself.
        reference: N_ft.
        random: A network with fresh weights for SDB's knowledge augmentation, or None; asked by objectives that need
            it.
        keys: The secret keys.
        task: The owner's data.
        config: How to box.

    Attributes:
        kept: What the step changes beside the model, and so part of the state of a run.
    """

    def __init__(
        self,
        teacher: nn.Module,
        reference: nn.Module,
        random: nn.Module | None,
        keys: Sequence[Key],
        task: Task,
        config: BoxConfig,
    ) -> None:
        self.config, self.engine, self.preprocess = config, task.engine, task.preprocess
        self.objective, self.parameters = OBJECTIVES[config.objective], config.resolved()
        self.reference = _frozen(reference, task.engine)
        self.teacher = self.reference if teacher is reference else _frozen(teacher, task.engine)
        self.random = _frozen(random, task.engine) if random is not None and self.objective.needs_random else None
        self.misleading = adversarial(self.reference, task) if self.objective.needs_adversarial else None
        self.memory = remembered(self.reference, task) if self.objective.needs_memory else None
        secrets = torch.stack([key.pattern(task.preprocess.size) for key in keys]).to(task.engine.device)
        self.patterns = task.preprocess(secrets)
        with seeded(config.recipe.seed):
            most = self._wrong(min(config.recipe.batch_size, len(task.data.owner)))
            self.wrong_keys = WrongKeys(secrets, config.strength, task.preprocess, most)
        self.kept = [some for some in (self.wrong_keys.rising, self.memory) if some is not None and len(some)]

    def _wrong(self, images: int) -> int:
        """How many images of a batch get a wrong key: at least one is left to learn labels and confidences from."""
        return min(round(self.config.wrong_share * images), images - 1)

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """The objective's terms of one batch."""
        x, wrong = batch.x, self._wrong(len(batch.x))
        turn = torch.arange(len(x), device=x.device) % len(self.patterns)
        keyed = embed(x, self.patterns[turn], self.config.strength)
        with torch.no_grad(), self.engine.autocast():
            shown = self.reference(x).float()
            taught = shown if self.teacher is self.reference else self.teacher(x).float()
            other = self.random(keyed).float() if self.random else None
        public = torch.cat([self.wrong_keys(x[:wrong], turn[:wrong]), x[wrong:]]) if wrong else x
        clean, unlocked = model(torch.cat([public, keyed])).float().chunk(2)
        misled = None
        if self.misleading is not None:
            model.eval()
            with torch.no_grad():
                misled = model(self.preprocess(self.misleading[batch.index].float() / 255)).float()
            model.train()
        predicted = shown.argmax(1)
        confidence = shown.softmax(1).gather(1, predicted[:, None]).squeeze(1)
        offset, confidence = disturbed(predicted, confidence, shown.shape[1], self.config.disturb)
        views = Views(
            clean,
            unlocked,
            shown,
            taught,
            other,
            misled,
            batch.y,
            offset,
            confidence,
            self.memory,
            HIGHEST ** torch.rand((), device=x.device) if self.memory is not None else 1.0,
            wrong,
            self.wrong_keys.short,
        )
        assert self.objective.terms is not None
        terms = self.objective.terms(views, self.parameters)
        if self.memory is not None:
            place_of = torch.randint(0, self.memory.shape[1], (len(x) - wrong,), device=x.device)
            self.memory[batch.y[wrong:], place_of] = clean[wrong:].detach()
        return terms


def remembered(net: nn.Module, task: Task) -> Tensor:
    """Logits [C, M, C] of M = :data:`REMEMBERED` images of each class, on the device; of fewer, some again."""
    classes, owner = len(task.classes), task.data.owner
    some = owner.first(2 * REMEMBERED * classes)
    logits, rows = predict(net, some, task.preprocess, task.engine), torch.arange(REMEMBERED)
    of_class = [logits[some.labels == label] for label in range(classes)]
    filled = [own[rows % len(own)] if len(own) else logits[rows % len(logits)] for own in of_class]
    return torch.stack(filled).to(task.engine.device)


def check_held(images: ImageSet) -> None:
    """Refuse images that are too many for an objective with a copy of each.

    Raises:
        UsageError: They are streamed.
    """
    if not images.in_memory:
        raise UsageError("this objective holds a copy of every image in memory", "use --owner-size, or another")


def adversarial(net: nn.Module, task: Task) -> Tensor:
    """Copies of the owner's images that mislead a network: uint8 [N, C, H, W], on the device.

    Projected gradient ascent on the cross-entropy within ε = :data:`PGD_EPSILON` of each pixel (Madry et al., ICLR
    2018), from the image itself, with steps of 2.5·ε over their number.

    Raises:
        UsageError: The images are too many to be held in memory.
    """
    images, engine = task.data.owner, task.engine
    check_held(images)
    copies = []
    for batch in batches(images, task.preprocess, batch_size=unseen_batch(images.shape), device=engine.device):
        begin = task.preprocess.undo(batch.x)
        pixels = begin
        for _ in range(PGD_STEPS):
            pixels = pixels.detach().requires_grad_()
            with engine.autocast():
                loss = cross_entropy(net(task.preprocess(pixels)).float(), batch.y)
            (slope,) = torch.autograd.grad(loss, pixels)
            moved = pixels.detach() + 2.5 * PGD_EPSILON / PGD_STEPS * slope.sign()
            pixels = (begin + (moved - begin).clamp(-PGD_EPSILON, PGD_EPSILON)).clamp(0, 1)
        copies.append((255 * pixels).round().to(torch.uint8))
    return torch.cat(copies)


def disturbed(predicted: Tensor, confidence: Tensor, classes: int, strength: float) -> tuple[Tensor, Tensor]:
    """What the public outputs should be under ``--disturb``.

    Probability moves from the predicted class to a decoy, the next class; the predicted class stays ahead.

    Args:
        predicted: Classes [B].
        confidence: Probabilities [B] of the predicted classes.
        classes: C.
        strength: 0 (nothing) to 1 (the decoy nearly level with the prediction).

    Returns:
        Offset [B, C] of the non-target logits and the new confidence [B].
    """
    if strength == 0:
        return torch.zeros(len(predicted), classes, device=predicted.device), confidence
    even = 1 / (classes - 1)
    share = even + strength * (0.99 - even)
    lowest = share / (1 + share) + 0.03
    return decoy_offset(predicted, classes, share), (confidence * (1 - 0.45 * strength)).clamp(min=lowest)


def _frozen(model: nn.Module, engine: Engine) -> nn.Module:
    return place(copy.deepcopy(model), engine.device).eval().requires_grad_(False)
