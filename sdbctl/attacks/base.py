"""What an attack is, and all that an attacker has."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from sdbctl.data import Batch, ImageSet, Preprocess, view
from sdbctl.engine import Engine
from sdbctl.state import Resume
from sdbctl.teacher import Access, Oracle
from sdbctl.training import Progress, fit
from sdbctl.updates import Recipe, scaled

Config = Mapping[str, float]
Loss = Callable[[Tensor, Tensor | None, Tensor | None, Config], Tensor]
"""(student logits [B, C], the oracle's answer or None, labels [B] or None, configuration) → scalar loss."""


COPY_BYTES = 2**30
"""Pixels of a transfer set of which whole augmented copies are made."""
REMEMBERED_BYTES = 2**28
"""Answers that an attacker keeps in memory."""


class Attacker:
    """Everything an attacker has; nothing else can be reached from it.

    Args:
        student: The network to train.
        build: Makes another one of its kind from a seed.
        images: The transfer set.
        preprocess: The teacher's normalisation, which the student shares.
        recipe: Optimisation of one student.
        engine: Where to compute.
        oracle: Whom to ask, or None.
        labels: Whether the labels of the transfer set are known.
        weights: A copy of the teacher's network, for an attacker who holds the file.
        surrogate: Unlabelled images of another kind, if there are any.
        strength: λ of the box's key embedding, which is public; 0 if the teacher is no box.
        views: Augmented copies of the transfer set to ask about; None for one per epoch.
        progress: Where progress goes.
        name: What the progress display calls the student.
        resume_from: Where the state of each run of the student is kept from which it goes on if it was interrupted.

    Attributes:
        seconds: Time spent training.
        guess: The pattern [C, H, W] in [0, 1] that an attack on the key ended with.
    """

    def __init__(
        self,
        student: nn.Module,
        build: Callable[[int], nn.Module],
        images: ImageSet,
        preprocess: Preprocess,
        recipe: Recipe,
        engine: Engine,
        *,
        oracle: Oracle | None = None,
        labels: bool = False,
        weights: nn.Module | None = None,
        surrogate: ImageSet | None = None,
        strength: float = 0.0,
        views: int | None = None,
        progress: Progress | None = None,
        name: str = "student",
        resume_from: Sequence[Resume] = (),
    ) -> None:
        self.student, self.build, self.preprocess, self.recipe, self.engine = student, build, preprocess, recipe, engine
        self.oracle, self.labels, self.weights, self.surrogate = oracle, labels, weights, surrogate
        self.strength = strength
        self.images = images if labels else images.unlabelled()
        self.views = views or recipe.epochs
        self.seconds = 0.0
        self.guess: Tensor | None = None
        self._progress, self._name, self._resume_from = progress, name, list(resume_from)
        self._asked: dict[str, Tensor | None] = {}
        self._room = REMEMBERED_BYTES

    def view(self, epoch: int) -> ImageSet:
        """The augmented copy of the transfer set that an epoch trains on; the copies recur after ``views``."""
        return self.augmented(self.images, epoch)

    def augmented(self, images: ImageSet, epoch: int) -> ImageSet:
        """The copy of a set that an epoch trains on."""
        return view(images, epoch % self.views, self.recipe.augment)

    def ask(self, images: ImageSet) -> Tensor:
        """The oracle's answer to each image, in order: [N, C], or [N] from one that shows only classes.

        An attacker remembers what it was told: asking again costs no query.
        """
        assert self.oracle is not None
        digest = images.digest
        if self._asked.get(digest) is None:
            answers = self.oracle.answers(images, self.preprocess, self.engine, again=digest in self._asked)
            # of a thousand classes and many views not all fit; what does not is asked for again, at no cost
            fits = answers.numel() * answers.element_size() <= self._room
            self._room -= answers.numel() * answers.element_size() if fits else 0
            self._asked[digest] = answers if fits else None
            return answers
        return self._asked[digest]  # type: ignore[return-value]

    def ask_pixels(self, pixels: Tensor) -> Tensor:
        """The oracle's answers to pixels [N, C, H, W] in [0, 1], of which none is kept."""
        assert self.oracle is not None
        return self.oracle(self.preprocess(pixels.to(self.engine.device))).cpu()

    def search(self, images: ImageSet, what: Sequence[object], find: Callable[[torch.Generator], Tensor]) -> Tensor:
        """What a search comes to; of students with one seed, other settings or rows apart, the first searches for all.

        Args:
            images: What it searches with.
            what: What else the outcome depends on.
            find: Searches, by a generator of the student's seed.

        Returns:
            What was found as float64 [N].
        """
        assert self.oracle is not None
        seed = self.recipe.seed
        name = json.dumps([*what, seed, images.identity])
        return self.oracle.recall(name, lambda: find(torch.Generator().manual_seed(seed)))

    def fit(
        self,
        net: nn.Module,
        step: Callable[[nn.Module, Batch], Tensor],
        images: ImageSet | Callable[[int], ImageSet],
        *,
        recipe: Recipe | None = None,
        record: bool = True,
    ) -> None:
        """Train a network with the one training loop; ``step`` returns the loss.

        With ``record`` a GPU may replay it: see :class:`sdbctl.updates.Updater` for what it then must not do.
        """
        resume_from = self._resume_from.pop(0) if net is self.student and self._resume_from else None
        self.seconds += fit(
            net,
            lambda model, batch: {"loss": step(model, batch)},
            images,
            self.preprocess,
            recipe or self.recipe,
            self.engine,
            name=self._name,
            progress=self._progress,
            resume_from=resume_from,
            record=record,
        )

    def learn(
        self,
        loss: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
        *,
        net: nn.Module | None = None,
        sets: Callable[[int], ImageSet] | None = None,
        targets: Callable[[ImageSet], Tensor] | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        """Train a network on images and what the oracle says of them.

        Args:
            loss: (logits [B, C], answer or None, labels [B] or None) → scalar.
            net: The network; None for the student.
            sets: The images of each epoch; None for :meth:`view`.
            targets: Answers to a set, in order, which takes copies in memory; None for :meth:`ask`.
            recipe: Optimisation; None for the attacker's.
        """
        net, recipe = net or self.student, recipe or self.recipe
        if sets is None and targets is None and not self._fixed_views():

            def live(model: nn.Module, batch: Batch) -> Tensor:
                return loss(model(batch.x), self._live(batch), self._known(batch))

            self.fit(net, live, self.images, recipe=recipe, record=False)
            return
        targets = targets or (self.ask if self.oracle is not None else None)
        choose, current = sets or self.view, -1
        images, answers = self.images, torch.empty(0, device=self.engine.device)

        def of_epoch(epoch: int) -> ImageSet:
            nonlocal current, images, answers
            if current != epoch:
                current, images = epoch, choose(epoch)
                if targets is not None:
                    told = targets(images).to(self.engine.device)
                    # in place: a recorded step reads them where the first ones were
                    answers = answers.copy_(told) if answers.shape == told.shape else told.clone()
            return images

        def step(model: nn.Module, batch: Batch) -> Tensor:
            answer = answers[batch.index] if targets is not None else None
            return loss(model(batch.x), answer, self._known(batch))

        self.fit(net, step, of_epoch, recipe=scaled(recipe, augment="none"))

    def _fixed_views(self) -> bool:
        """Whether copies of the transfer set fit in memory; else every batch is augmented and asked about anew."""
        return self.images.in_memory and len(self.images) * math.prod(self.images.shape) <= COPY_BYTES

    def _live(self, batch: Batch) -> Tensor | None:
        return self.oracle(batch.x) if self.oracle is not None else None

    def _known(self, batch: Batch) -> Tensor | None:
        return batch.y if self.labels else None


Train = Callable[[Attacker, Config], None]
"""Trains the attacker's student."""


@dataclass(frozen=True)
class PerBatch:
    """The plainest attack: one loss of each batch, its answers and its labels.

    Attributes:
        loss: A pure function.
    """

    loss: Loss

    def __call__(self, attacker: Attacker, config: Config) -> None:
        """Train the student."""
        attacker.learn(lambda z, answer, y: self.loss(z, answer, y, config))


@dataclass(frozen=True)
class Attack:
    """A way to train a student.

    Attributes:
        summary: One line for ``sdbctl list``.
        source: Citation.
        train: What it does.
        grid: Configurations to choose from on validation data.
        access: What it may see of the teacher: it is given an oracle that shows this, or with WEIGHTS a copy.
        labels: Whether it needs the labels of the transfer set; they are withheld otherwise.
        surrogate: Whether it asks about images of another data set; they are withheld otherwise.
        on_key: Whether it looks for the key.
        searches: Whether it does so by a search through answers, which one seed may find nothing by and another may.
        twin: The attack of the floor that does the same without soft outputs. Where an attack is reported, so is its
            twin, with as many seeds.
        extra: (images of a run on the transfer set, images of another data set) → how many more its students see.
        own: Number of transfer images → how many the network of the box itself is trained on first.
    """

    summary: str
    source: str
    train: Train
    grid: tuple[Config, ...] = ({},)
    access: Access = Access.PROBABILITIES
    labels: bool = True
    surrogate: bool = False
    on_key: bool = False
    searches: bool = False
    twin: str = ""
    extra: Callable[[float, int], float] = lambda run, foreign: 0.0
    own: Callable[[int], int] = lambda images: 0

    @property
    def role(self) -> Literal["floor", "attack"]:
        """``floor`` for what needs no soft output, ``attack`` for what does."""
        return "floor" if self.access <= Access.LABELS else "attack"

    @property
    def asks(self) -> bool:
        """Whether it asks a teacher, and neither does without one nor holds its weights."""
        return Access.NONE < self.access < Access.WEIGHTS


def one_more(run: float, foreign: int) -> float:
    """``extra`` of an attack that trains another network for as long as the student."""
    return run


def without_labels(attack: Attack) -> Attack:
    """The same attack by somebody who has no labels, which its loss must allow."""
    twin = {"": "", "hard_mixed": "hard_constant"}.get(attack.twin, f"{attack.twin}_unlabelled")
    return replace(attack, summary=f"no labels: {attack.summary}", labels=False, twin=twin)
