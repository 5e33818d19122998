"""Train a student, with whatever its attack may see of a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sdbctl import models
from sdbctl.attacks import Attack, Config
from sdbctl.data import Batch, ImageSet, Preprocess
from sdbctl.teacher import Access, Oracle, Teacher
from sdbctl.training import Engine, Progress, Recipe, fit, seeded


def build_student(name: str, classes: int, channels: int, seed: int) -> nn.Module:
    """A freshly initialised student; the same seed gives the same weights."""
    with seeded(seed):
        return models.build(name, classes, channels)


def distill(
    attack: Attack,
    config: Config,
    teacher: Teacher | None,
    student: nn.Module,
    images: ImageSet,
    preprocess: Preprocess,
    recipe: Recipe,
    engine: Engine,
    *,
    progress: Progress | None = None,
    name: str = "student",
    resume_from: Path | None = None,
) -> tuple[float, int]:
    """Train ``student`` in place.

    The teacher is asked about the very images that the student sees, augmentation included, through an
    oracle of the attack's access level. Labels are withheld from an attack that does not declare them.

    Args:
        attack: How to train.
        config: One configuration of the attack.
        teacher: Whom to ask; None for an attack that asks nobody.
        student: The network.
        images: The transfer set.
        preprocess: The teacher's normalisation, which the student shares.
        recipe: Optimisation.
        engine: Where to compute.
        progress: Where progress goes.
        name: What the progress display calls it.
        resume_from: File of the state after each epoch.

    Returns:
        Seconds of training, and the number of queries sent.
    """
    oracle = Oracle(teacher, attack.access) if teacher is not None and attack.access > Access.NONE else None

    def step(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        answer = None
        if oracle is not None:
            with torch.no_grad():
                answer = oracle(batch.x)
        return {"loss": attack.loss(model(batch.x), answer, batch.y if attack.labels else None, config)}

    seconds = fit(
        student,
        step,
        images,
        preprocess,
        recipe,
        engine,
        name=name,
        progress=progress,
        resume_from=resume_from,
    )
    return seconds, oracle.queries if oracle else 0
