"""Train a student, with whatever its attack may see of a teacher."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from sdbctl import models
from sdbctl.attacks import Attack, Attacker, Config
from sdbctl.data import ImageSet, Preprocess
from sdbctl.engine import Engine, seeded
from sdbctl.state import Resume
from sdbctl.teacher import Access, Oracle, Record, Teacher
from sdbctl.training import Progress
from sdbctl.updates import Recipe


def build_student(name: str, classes: int, channels: int, seed: int) -> nn.Module:
    """A freshly initialised student; the same seed gives the same weights."""
    with seeded(seed):
        return models.build(name, classes, channels)


class Distilled(NamedTuple):
    """What an attack ends with.

    Attributes:
        student: The trained student.
        seconds: Time spent in training steps.
        queries: Inputs sent to the teacher.
        guess: The pattern [C, H, W] in [0, 1] that an attack on the key found, or None.
        beyond: How many answers said more than the predicted class, if ``levels`` tell what that is.
    """

    student: nn.Module
    seconds: float
    queries: int
    guess: Tensor | None
    beyond: int


def distill(
    attack: Attack,
    config: Config,
    teacher: Teacher | None,
    student: str,
    classes: int,
    images: ImageSet,
    preprocess: Preprocess,
    recipe: Recipe,
    engine: Engine,
    *,
    weights: nn.Module | None = None,
    surrogate: ImageSet | None = None,
    strength: float = 0.0,
    views: int | None = None,
    record: Record | None = None,
    levels: Tensor | None = None,
    limited: bool = False,
    progress: Progress | None = None,
    resume_from: Sequence[Resume] = (),
) -> Distilled:
    """Train a student.

    The teacher is asked about the very images that the student sees, augmentation included, through an
    oracle of the attack's access level. Labels and weights are withheld from an attack that does not declare
    them.

    Args:
        attack: How to train.
        config: One configuration of the attack.
        teacher: Whom to ask; None for an attack that asks nobody.
        student: Its architecture; ``recipe.seed`` initialises it.
        classes: Number of classes.
        images: The transfer set.
        preprocess: The teacher's normalisation, which the student shares.
        recipe: Optimisation.
        engine: Where to compute.
        weights: The teacher's network, of which an attack on the file gets a copy.
        surrogate: Unlabelled images of another kind.
        strength: λ of the box, which is public; 0 if the teacher is none.
        views: Augmented copies of the transfer set to ask about; None for one per epoch.
        record: Where answers are kept for other students.
        levels: What the teacher's answers look like that say nothing but the predicted class.
        limited: Whether the attack is told nothing else.
        progress: Where progress goes.
        resume_from: Where the state of each run of the student is kept from which it goes on if it was interrupted.

    Raises:
        UsageError: The attack needs what there is not, such as weights.
    """
    oracle = None
    if teacher is not None and attack.asks:
        oracle = Oracle(teacher, attack.access, record, levels, limited=limited)
    build = functools.partial(build_student, student, classes, preprocess.size[0])
    attacker = Attacker(
        build(recipe.seed),
        build,
        images,
        preprocess,
        recipe,
        engine,
        oracle=oracle,
        labels=attack.labels,
        weights=copy.deepcopy(weights) if attack.access == Access.WEIGHTS else None,
        surrogate=surrogate.unlabelled() if surrogate is not None and attack.surrogate else None,
        strength=strength,
        views=views,
        progress=progress,
        name=student,
        resume_from=resume_from,
    )
    attack.train(attacker, config)
    queries, beyond = (oracle.queries, oracle.beyond) if oracle else (0, 0)
    return Distilled(attacker.student, attacker.seconds, queries, attacker.guess, beyond)
