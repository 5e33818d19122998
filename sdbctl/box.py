"""Put a trained classifier into a Safe Distillation Box."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdbctl import boxfile, metrics, models
from sdbctl.boxfile import Box, Loaded, Metadata
from sdbctl.data import Batch, ImageSet, Preprocess, Splits, presets
from sdbctl.errors import BadInput, UsageError
from sdbctl.key import Key, embed, near
from sdbctl.losses import cross_entropy
from sdbctl.objectives import OBJECTIVES, Views
from sdbctl.objectives.base import decoy_offset
from sdbctl.training import Engine, Progress, Recipe, Silent, Step, fit, predict, seeded, step_seconds

SHOWN_IMAGES = 1000
"""Validation images that the progress display measures after each epoch."""


@dataclass(frozen=True)
class BoxConfig:
    """How to box.

    Attributes:
        objective: Name in :data:`sdbctl.objectives.OBJECTIVES`.
        parameters: Its parameters, by name; those not given keep their defaults.
        strength: λ of the key embedding x_k = λx + (1 − λ)K, in (0, 1).
        wrong_share: Share of the public batch that is mixed with wrong keys.
        disturb: 0, or how far to lead plain distillation astray, up to 1, at a price in calibration.
        recipe: Training of the box, and of the reference N_ft before it.
    """

    objective: str = "conceal"
    parameters: Mapping[str, float] = field(default_factory=dict)
    strength: float = 0.5
    wrong_share: float = 0.25
    disturb: float = 0.0
    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=20, lr=0.05))

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise UsageError(f"unknown objective {self.objective}", f"use one of: {', '.join(OBJECTIVES)}")
        if not 0 < self.strength < 1:
            raise UsageError(f"key strength is {self.strength}", "use a number between 0 and 1, such as 0.5")
        if not 0 <= self.disturb <= 1:
            raise UsageError(f"disturb is {self.disturb}", "use a number from 0 (off) to 1")
        if not 0 <= self.wrong_share <= 1:
            raise UsageError(f"wrong share is {self.wrong_share}", "use a number from 0 to 1")
        self.resolved()

    def resolved(self) -> Any:
        """The objective's parameter dataclass, filled in.

        Raises:
            UsageError: A parameter is unknown.
        """
        kind = OBJECTIVES[self.objective].parameters
        known = [item.name for item in fields(kind)]
        for name in self.parameters:
            if name not in known:
                raise UsageError(
                    f"objective {self.objective} has no parameter {name}", f"it has: {', '.join(known)}"
                )
        return kind(**self.parameters)

    def trainable_and_frozen(self) -> tuple[int, int]:
        """Forward passes per image of one step: with gradient, and without."""
        return 2, 1 + OBJECTIVES[self.objective].needs_random

    def describe(self) -> dict[str, Any]:
        """Everything that decides the result, for the metadata."""
        return {
            "objective": self.objective,
            **asdict(self.resolved()),
            "strength": self.strength,
            "wrong_share": self.wrong_share,
            "disturb": self.disturb,
            "recipe": asdict(self.recipe),
        }


@dataclass(frozen=True)
class Boxed:
    """Result of :func:`box`.

    Attributes:
        model: The box.
        state_dict: Its weights under the original file's keys.
        reference: N_ft, the original fine-tuned with plain cross-entropy on the same data.
        reference_state: Its weights under the original file's keys.
        original_top1: Accuracy of the original on the test split, percent.
        reference_top1: Of N_ft.
        top1: Of the box.
        keyed_top1: Of the box with the key.
        seconds: Wall time of each phase.
    """

    model: Box
    state_dict: dict[str, Tensor]
    reference: nn.Module
    reference_state: dict[str, Tensor]
    original_top1: float
    reference_top1: float
    top1: float
    keyed_top1: float
    seconds: dict[str, float]

    @property
    def cost(self) -> float:
        """Top-1 points that the box costs against N_ft."""
        return self.reference_top1 - self.top1


def find_preprocess(
    net: nn.Module, images: ImageSet, engine: Engine, *, size: tuple[int, int, int], limit: int = 2000
) -> tuple[Preprocess, dict[str, float]]:
    """Try the known normalisations and take the one with which the model is most accurate.

    Args:
        net: The original.
        images: Validation images.
        engine: Where to compute.
        size: Input shape (C, H, W).
        limit: Number of images to try.

    Returns:
        The best, and the accuracy in percent of each preset by name.
    """
    some = images.take(range(min(limit, len(images))))
    tried = {}
    found = {name: Preprocess(mean, std, size) for name, (mean, std) in presets(size[0]).items()}
    for name, preprocess in found.items():
        tried[name] = metrics.top1(predict(net, some, preprocess, engine), some.labels)
    return found[max(tried, key=lambda name: tried[name])], tried


def check_above_chance(
    net: nn.Module, images: ImageSet, preprocess: Preprocess, engine: Engine, classes: int
) -> float:
    """Measure the original, and refuse one that knows nothing of this data.

    Returns:
        Its accuracy in percent.

    Raises:
        BadInput: It is not clearly better than guessing.
    """
    accuracy = metrics.top1(predict(net, images, preprocess, engine), images.labels)
    chance = 100 / classes
    if accuracy < chance + max(5.0 * chance**0.5 / len(images) ** 0.5 * 10, 1.0):
        raise BadInput(
            f"the original is at chance: {accuracy:.1f} % top-1 on {len(images)} images, guessing gives {chance:.1f} %",
            "check --data, --arch and --normalize",
        )
    return accuracy


def estimate(
    config: BoxConfig, net: nn.Module, preprocess: Preprocess, images: int, engine: Engine
) -> dict[str, float]:
    """Expected seconds of the reference and the box run, from a timed training step."""
    size = config.recipe.batch_size
    example = torch.zeros(size, *preprocess.size)
    one = step_seconds(copy.deepcopy(net), example, engine) / size
    trainable, frozen = config.trainable_and_frozen()
    plain = one * images * config.recipe.epochs
    return {"reference": plain, "box": plain * (3 * trainable + frozen) / 3}


def box(
    original: Loaded,
    key: Key,
    data: Splits,
    preprocess: Preprocess,
    classes: tuple[str, ...],
    config: BoxConfig,
    engine: Engine,
    *,
    data_name: str = "",
    progress: Progress | None = None,
    reference: nn.Module | None = None,
    resume_from: Path | None = None,
) -> Boxed:
    """Fine-tune a box from an original.

    First the original is fine-tuned with plain cross-entropy on the same data (N_ft, the reference), so that
    adaptation to the data is counted neither as protection nor as gain. The box starts from it.

    Args:
        original: The checkpoint.
        key: The secret key.
        data: Splits; ``owner`` is trained on, ``validation`` watched, ``test`` measured once at the end.
        preprocess: The original's normalisation.
        classes: Class names.
        config: How to box.
        engine: Where to compute.
        data_name: Name of the data set, for the metadata.
        progress: Where progress goes.
        reference: N_ft, if it exists already.
        resume_from: Path of the state that survives an interrupted run.

    Raises:
        UsageError: Data and checkpoint differ in their number of classes.
    """
    if original.classes != len(classes):
        raise UsageError(
            f"the checkpoint has {original.classes} classes, the data {len(classes)}",
            "use the data it was trained on",
        )
    progress = progress or Silent()
    seconds = {}
    begin = time.perf_counter()
    if reference is None:
        reference = copy.deepcopy(original.net)
        state = resume_from.with_suffix(".reference" + resume_from.suffix) if resume_from else None
        fit(
            reference,
            plain_step(),
            data.owner,
            preprocess,
            config.recipe,
            engine,
            name="reference",
            progress=progress,
            resume_from=state,
        )
        seconds["reference"] = time.perf_counter() - begin
    begin = time.perf_counter()
    meta = Metadata(
        kind="box",
        architecture=original.architecture,
        classes=classes,
        preprocess=preprocess,
        strength=config.strength,
        key_id=key.id,
        objective=config.objective,
        parameters=config.describe(),
        data={"name": data_name, **data.describe()},
        original_sha256=original.sha256,
        versions=boxfile.versions(),
    )
    net = copy.deepcopy(reference)
    made = Box(net, meta)
    unlocked = made.unlock(key).to(engine.device)
    some = data.validation.take(range(min(SHOWN_IMAGES, len(data.validation))))

    def watch(epoch: int) -> Mapping[str, float]:
        public = predict(net, some, preprocess, engine)
        keyed = predict(unlocked, some, preprocess, engine)
        return {
            "clean": metrics.top1(public, some.labels),
            "keyed": metrics.top1(keyed, some.labels),
            "residual": metrics.residual(public),
        }

    fit(
        net,
        box_step(reference, key, preprocess, config, engine),
        data.owner,
        preprocess,
        config.recipe,
        engine,
        name="box",
        progress=progress,
        resume_from=resume_from,
        after_epoch=watch,
    )
    seconds["box"] = time.perf_counter() - begin

    def test(model: nn.Module) -> Tensor:
        return predict(model, data.test, preprocess, engine)

    public, keyed = test(net), test(unlocked)
    accuracies = {
        "original": metrics.top1(test(original.net.to(engine.device)), data.test.labels),
        "reference": metrics.top1(test(reference), data.test.labels),
        "boxed": metrics.top1(public, data.test.labels),
        "keyed": metrics.top1(keyed, data.test.labels),
    }
    made.meta = boxfile.with_measured(
        meta,
        n=len(data.test),
        **{f"{name}_top1": round(value, 3) for name, value in accuracies.items()},
        residual=metrics.residual(public),
        keyed_residual=metrics.residual(keyed),
        seconds={name: round(value, 1) for name, value in seconds.items()},
    )
    return Boxed(
        made,
        original.file_state(net),
        reference,
        original.file_state(reference),
        accuracies["original"],
        accuracies["reference"],
        accuracies["boxed"],
        accuracies["keyed"],
        seconds,
    )


def plain_step() -> Step:
    """Cross-entropy on the labels."""

    def step(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        return {"label": cross_entropy(model(batch.x), batch.y)}

    return step


def box_step(
    reference: nn.Module, key: Key, preprocess: Preprocess, config: BoxConfig, engine: Engine
) -> Step:
    """The step that trains a box: public and keyed branch in one forward pass, the reference frozen."""
    objective, parameters = OBJECTIVES[config.objective], config.resolved()
    frozen = _frozen(reference, engine)
    secret = key.pattern(preprocess.size).to(engine.device)
    pattern = preprocess(secret[None])[0]
    random = _random_twin(reference, config.recipe.seed, engine) if objective.needs_random else None
    strength = config.strength

    def step(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        x, wrong = batch.x, round(config.wrong_share * len(batch.x))
        keyed = embed(x, pattern, strength)
        with torch.no_grad(), engine.autocast():
            original = frozen(x).float()
            other = random(keyed).float() if random else None
        public = (
            torch.cat([embed(x[:wrong], _wrong_key(secret, preprocess), strength), x[wrong:]]) if wrong else x
        )
        outputs = model(torch.cat([public, keyed])).float()
        clean, unlocked = outputs.chunk(2)
        predicted = original.argmax(1)
        confidence = original.softmax(1).gather(1, predicted[:, None]).squeeze(1)
        offset, confidence = disturbed(predicted, confidence, original.shape[1], config.disturb)
        views = Views(clean, unlocked, original, original, other, batch.y, offset, confidence, wrong)
        return objective.terms(views, parameters)

    return step


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


def _wrong_key(secret: Tensor, preprocess: Preprocess) -> Tensor:
    """A normalised pattern whose correlation with the secret is anything from −1 (inverted) to 0.9."""
    correlation = float(torch.empty(()).uniform_(-1.0, 0.9))
    return preprocess(near(secret, correlation, None)[None])[0]


def _frozen(model: nn.Module, engine: Engine) -> nn.Module:
    copied = copy.deepcopy(model).to(engine.device, memory_format=torch.channels_last).eval()
    return copied.requires_grad_(False)


def _random_twin(model: nn.Module, seed: int, engine: Engine) -> nn.Module:
    """The same architecture with fresh weights, the R of SDB's knowledge augmentation."""
    twin = copy.deepcopy(model)
    with seeded(seed):
        for module in twin.modules():
            reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
    return _frozen(twin, engine)


__all__ = ["BoxConfig", "Boxed", "box", "box_step", "estimate", "find_preprocess", "models"]
