"""Put a trained classifier into a Safe Distillation Box."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdbctl import metrics, models
from sdbctl.boxfile import Box, Loaded
from sdbctl.boxstep import PGD_STEPS, BoxConfig, BoxStep, Task, plain_step
from sdbctl.data import ImageSet, Preprocess, presets
from sdbctl.engine import Engine, exact, place, seeded
from sdbctl.errors import BadInput, UsageError
from sdbctl.inference import accuracy, predict, unseen_batch
from sdbctl.key import Key, ids_of
from sdbctl.objectives import OBJECTIVES
from sdbctl.patterns import is_short, odd_inputs
from sdbctl.state import Resume
from sdbctl.timing import image_seconds
from sdbctl.training import Progress, digest, fit
from sdbctl.updates import Recipe
from sdbctl.wrappers import confidences, served, serving

NORMALISED_IMAGES = 2000
"""Validation images that normalisations are tried on."""
SHOWN_IMAGES = 1000
"""Validation images that the progress display measures after each epoch."""
ODD, ODD_EACH = 24_000, 30
"""Inputs that are no images and should not open a box, and how many at most for each of the owner's images."""


@dataclass(frozen=True)
class Boxed:
    """Result of :func:`box`.

    Attributes:
        model: The box.
        state_dict: Its weights under the original file's names.
        measured: Accuracies on the test split in percent and the dark knowledge left, as in the metadata.
    """

    model: Box
    state_dict: dict[str, Tensor]
    measured: Mapping[str, float]

    @property
    def cost(self) -> float:
        """Top-1 points that the box costs against the reference."""
        return self.measured["reference_top1"] - self.measured["boxed_top1"]


def find_preprocess(
    net: Callable[[Tensor], Tensor],
    images: ImageSet,
    engine: Engine,
    *,
    size: tuple[int, int, int],
) -> tuple[Preprocess, dict[str, float]]:
    """Try the known normalisations and take the one with which the model is most accurate.

    Args:
        net: The original, a network or whatever else maps images to logits.
        images: Validation images.
        engine: Where to compute.
        size: Input shape (C, H, W).

    Returns:
        The best, and the accuracy in percent of each preset by name.
    """
    some = images.first(NORMALISED_IMAGES)
    if isinstance(net, nn.Module):
        place(net, engine.device)
    tried = {}
    found = {name: Preprocess(mean, std, size) for name, (mean, std) in presets(size[0]).items()}
    for name, preprocess in found.items():
        tried[name] = accuracy(net, some, preprocess, engine)
    return found[max(tried, key=lambda name: tried[name])], tried


def check_above_chance(net: nn.Module, images: ImageSet, preprocess: Preprocess, engine: Engine, classes: int) -> float:
    """Measure the original, and refuse one that knows nothing of this data.

    Returns:
        Its accuracy in percent.

    Raises:
        BadInput: It is not clearly better than guessing.
    """
    found = accuracy(place(net, engine.device), images, preprocess, engine)
    least = metrics.least_known(classes, len(images))
    if found < least:
        raise BadInput(
            f"the original is not clearly better than guessing: {found:.1f} % top-1, while guessing gives "
            f"{100 / classes:.1f} % (needs {least:.1f} % of {len(images):,} images)",
            "check --data, --arch and --normalize",
        )
    return found


def estimate(
    config: BoxConfig, net: nn.Module, preprocess: Preprocess, images: int, engine: Engine
) -> dict[str, float]:
    """Expected seconds of both trainings, from timed steps.

    Args:
        config: How to box.
        net: The original.
        preprocess: Its normalisation.
        images: The owner's.
        engine: Where to compute.
    """
    one = image_seconds(copy.deepcopy(net), config.recipe.batch_size, images, preprocess.size, engine)
    trainable, frozen = config.trainable_and_frozen()
    plain = one * images * config.recipe.epochs
    before = one * images * PGD_STEPS if OBJECTIVES[config.objective].needs_adversarial else 0.0
    return {"reference": plain, "box": before + plain * (3 * trainable + frozen) / 3}


def fine_tune(
    original: Loaded,
    task: Task,
    recipe: Recipe,
    *,
    progress: Progress | None = None,
    resume_from: Path | None = None,
) -> nn.Module:
    """Fine-tune the original with plain cross-entropy on the owner's data: the reference N_ft.

    The box starts from it and is compared with it, so that adaptation to the data is counted neither as
    protection nor as gain.

    Args:
        original: The checkpoint.
        task: The owner's data.
        recipe: The box's own recipe.
        progress: Where progress goes.
        resume_from: Path of the state that survives an interrupted run.

    Raises:
        UsageError: Data and checkpoint differ in their number of classes.
    """
    if original.classes != len(task.classes):
        raise UsageError(
            f"the checkpoint has {original.classes} classes, the data {len(task.classes)}",
            "use the data it was trained on",
        )
    net = copy.deepcopy(original.net)
    run = {
        "original": original.sha256,
        "data": {"name": task.name, **task.data.describe()},
        "preprocess": task.preprocess.to_dict(),
    }
    fit(
        net,
        plain_step,
        task.data.owner,
        task.preprocess,
        recipe,
        task.engine,
        name="reference",
        progress=progress,
        resume_from=Resume(resume_from, run) if resume_from else None,
        record=True,
    )
    return net


def box(
    original: Loaded,
    reference: nn.Module,
    keys: Sequence[Key],
    task: Task,
    config: BoxConfig,
    *,
    assistant: nn.Module | None = None,
    progress: Progress | None = None,
    resume_from: Path | None = None,
) -> Boxed:
    """Turn a fine-tuned original into a box.

    Args:
        original: The checkpoint.
        reference: N_ft, from :func:`fine_tune`.
        keys: The secret keys, each of which opens the box; what is measured with a key is the worst of them.
        task: The owner's data.
        config: How to box.
        assistant: From :func:`assist`, if the key is to open that one.
        progress: Where progress goes.
        resume_from: Path of the state that survives an interrupted run.

    Raises:
        UsageError: A key is given twice, the assistant is missing, or images are too small for what looks for a key.
    """
    begin, data, engine = time.perf_counter(), task.data, task.engine
    config = config.fitted(task.preprocess.size)
    teacher = {"reference": reference, "original": original.net, "assistant": assistant}[config.teacher]
    if teacher is None:
        raise UsageError("the key cannot open an assistant that is not there", "make one with assist")
    place(reference, engine.device)
    meta = task.describe(
        kind="box",
        architecture=original.architecture,
        strength=config.strength,
        key_ids=ids_of(keys),
        objective=config.objective,
        parameters={**config.describe(), **({"assistant": digest(teacher)} if teacher is assistant else {})},
        original_sha256=original.sha256,
    )
    net = copy.deepcopy(reference)
    made = Box(net, meta)
    if not config.trained:
        return _guarded(original, made, task, begin)
    unlocked = [made.unlock(key).to(engine.device) for key in keys]
    some = data.validation.first(SHOWN_IMAGES)

    def watch(_: int) -> Mapping[str, float]:
        public = predict(net, some, task.preprocess, engine)
        return {
            "clean": metrics.top1(public, some.labels),
            "keyed": min(task.top1(model, some) for model in unlocked),
            "residual": metrics.residual(public),
        }

    random = None
    if OBJECTIVES[config.objective].needs_random:
        with seeded(config.recipe.seed):
            random = models.build(original.architecture, original.classes, original.channels)
    step = BoxStep(teacher, reference, random, keys, task, config)
    fit(
        net,
        step,
        data.owner,
        task.preprocess,
        config.recipe,
        engine,
        name="box",
        progress=progress,
        resume_from=Resume(resume_from, {**meta.run, "reference": digest(reference)}) if resume_from else None,
        after_epoch=watch,
        record=True,
        kept=step.kept,
    )
    seconds = time.perf_counter() - begin
    # in full precision, as a box is served
    task = replace(task, engine=Engine(engine.device))
    with exact(engine.device):
        measured = _measured(original.net, reference, net, unlocked, task)
        if not config.disturb:
            measured |= _serving(net, unlocked, task)
    measured["seconds"] = round(seconds, 1)
    made.meta = replace(meta, measured=measured)
    # an auxiliary head that stays as it was would show what the features still know
    unused = {name: torch.zeros_like(tensor) for name, tensor in original.others.items()}
    return Boxed(made, original.file_state(net) | unused, measured)


def _guarded(original: Loaded, made: Box, task: Task, begin: float) -> Boxed:
    """A box whose weights are the reference's: what is measured of it is what its graph serves."""
    net, task = made.net, replace(task, engine=Engine(task.engine.device))
    with exact(task.engine.device):
        some = task.data.validation
        shown = confidences(predict(net, some, task.preprocess, task.engine), some.labels)
        public = place(served(net, replace(made.meta, measured=shown)), task.engine.device)
        measured = _measured(original.net, net, public, [net], task) | shown
    measured["seconds"] = round(time.perf_counter() - begin, 1)
    made.meta = replace(made.meta, measured=measured)
    return Boxed(made, original.file_state(net), measured)


def _measured(
    original: nn.Module, reference: nn.Module, net: nn.Module, unlocked: Sequence[nn.Module], task: Task
) -> dict[str, float]:
    """What the metadata says of a box, on test images."""
    test = task.data.test
    public, *keyed = (predict(model, test, task.preprocess, task.engine) for model in (net, *unlocked))
    return {
        "n": len(test),
        "original_top1": round(task.top1(original, test), 3),
        "reference_top1": round(task.top1(reference, test), 3),
        "boxed_top1": round(metrics.top1(public, test.labels), 3),
        "keyed_top1": round(min(metrics.top1(outputs, test.labels) for outputs in keyed), 3),
        "residual": metrics.residual(public),
        "keyed_residual": min(metrics.residual(outputs) for outputs in keyed),
    }


def _serving(net: nn.Module, unlocked: Sequence[nn.Module], task: Task) -> dict[str, Any]:
    """How a box is to be served, by validation images and by inputs that are none."""
    some = task.data.validation
    public, *keyed = (predict(model, some, task.preprocess, task.engine) for model in (net, *unlocked))
    images, generator = some.first(SHOWN_IMAGES).alone(), torch.Generator().manual_seed(0)
    most = max(3, unseen_batch(some.shape))

    @torch.no_grad()
    def odd() -> Tensor:
        count = min(ODD, ODD_EACH * len(task.data.owner))
        parts = (odd_inputs(most, images, generator).to(task.engine.device) for _ in range(0, count, most))
        return torch.cat([net(task.preprocess(part)).float().cpu() for part in parts])

    return serving(public, some.labels, keyed, odd, short=is_short(task.preprocess.size))
