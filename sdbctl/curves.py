"""Curves: accuracy over the query budget, nearly right keys, and keys that leak."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sdbctl import metrics
from sdbctl.attacks import ATTACKS
from sdbctl.cells import Bench, Cell
from sdbctl.data import ImageSet
from sdbctl.inference import predict
from sdbctl.key import correlation, embed, fingerprint, near
from sdbctl.patterns import mixed_with, public_keys
from sdbctl.report import OPEN, RECOVERED, Curve, Interval, KeyStrength, Point, Student
from sdbctl.suites import BY_NAME, NEAR_PERCENT, WITH_KEY, Row
from sdbctl.teacher import KeyedTeacher
from sdbctl.training import Progress
from sdbctl.workers import run_cells
from sdbctl.wrappers import deviation

BUDGETS = (1000, 5000, 10_000)
FEW_SHOT = (0.01, 0.05, 0.1)
"""Transfer images of the budget curve, in number and as shares of all."""
BEST = "best attack"
BUDGET_ROWS = ("cross_entropy", "hard_constant", "kd_original", "unauthorized", "authorized")
"""Rows of the budget curve, beside :data:`BEST`, of all other attacks on the API the best on validation data."""
LEAKS = (1, 10, 100, 1000)
"""Keyed queries that somebody listens to, for the leak curve."""
REPEATS = 5
"""Nearly right keys of each correlation, and eavesdroppers, who hear other queries each, for the bounds of curves."""


def budgets(bench: Bench) -> list[tuple[str, int]]:
    """Rows and numbers of transfer images of the budget curve; none if the suite has none."""
    if not bench.config.chosen.curves:
        return []
    rows = bench.rows()
    names = [row.name for row in rows if row.name in BUDGET_ROWS]
    if any(_rival(row) for row in rows):
        names.append(BEST)
    whole = len(bench.transfer)
    sizes = {*BUDGETS, *(round(share * whole) for share in FEW_SHOT)}
    return [(name, size) for size in sorted(sizes) if bench.classes <= size < whole for name in names]


def _rival(row: Row) -> bool:
    # who asks about other images than these has another budget
    own = row.attack != "data_free" and not ATTACKS[row.attack].surrogate
    return row.role == "attack" and row.access == "api" and row.name not in BUDGET_ROWS and own


def budget_curve(
    bench: Bench, students: Mapping[str, Student], folder: Path | None, progress: Progress
) -> dict[str, Curve]:
    """Accuracy over the number of transfer images, with the settings chosen for all of them; one seed a point."""
    rivals = [
        one for name, one in students.items() if name in BY_NAME and _rival(BY_NAME[name]) and one.mean is not None
    ]
    winner = max(rivals, key=lambda one: (one.n, one.validation or 0.0), default=None)
    named = [(winner.name if name == BEST and winner else name, size) for name, size in budgets(bench)]
    wanted = [(name, size) for name, size in named if name in students and students[name].config]
    if not wanted:
        return {}
    cells = {}
    for name, size in wanted:
        known = {setting for config in ATTACKS[BY_NAME[name].attack].grid for setting in config}
        config = {setting: float(str(v)) for setting, v in students[name].config.items() if setting in known}
        cells[name, size] = Cell(name, str(students[name].config.get("teacher", "")), config, 0, True, images=size)
    outcomes = run_cells(bench, list(cells.values()), folder, progress)
    series: dict[str, tuple[Point, ...]] = {}
    for name in dict.fromkeys(name for name, _ in wanted):
        points = [Point(size, outcomes[cell.id].test) for (other, size), cell in cells.items() if other == name]
        whole = students[name]
        series[whole.label] = (*points, Point(len(bench.transfer), whole.values[0] if whole.values else None))
    views = bench.config.recipe.epochs
    return {
        "budget": Curve(
            title="Query budget",
            x_label=f"Transfer images, {views} queries each",
            y_label="Test accuracy, %",
            x_log=True,
            series=series,
        )
    }


def taught_by_keys(students: Mapping[str, Student]) -> dict[str, Curve]:
    """Accuracy over the correlation of a student's key with the right one, from a wrong key to the right one."""
    names = {
        0.0: "authorized_wrong_key",
        **{near / 100: f"near_key_{near}" for near in NEAR_PERCENT},
        1.0: "authorized",
    }
    # nearly right keys resemble the first pattern of several
    found = {
        near: students[name].values
        for near, name in names.items()
        if name in students and students[name].config.get("teacher", WITH_KEY[0]) not in WITH_KEY[1:]
    }
    points = [Point(near, values[0]) for near, values in found.items() if values]
    if len(points) < len(names):
        return {}
    return {
        "taught_by_keys": Curve(
            title="What nearly right keys teach",
            x_label="Correlation with the secret pattern",
            y_label="Test accuracy, %",
            series={"KD with such a key": tuple(points)},
        )
    }


def _known(curve: Curve | None) -> list[tuple[float, float, Point]]:
    points = [point for points in (curve.series.values() if curve else ()) for point in points]
    return [(point.x, point.y, point) for point in points if point.x is not None and point.y is not None]


def _crossing(points: Sequence[tuple[float, float, Point]], level: float) -> Interval:
    """Where a rising curve reaches a level: its mean, and, as the lower and upper bound, the curves of its bounds."""
    reached = [(x, point.n) for x, y, point in points if y >= level]
    if not reached:
        return Interval()
    mean, n = min(reached, key=lambda one: one[0])
    if all(point.low is None for _, _, point in points):
        return Interval(mean, n=n)
    # what was seen once bounds itself
    low = [x for x, y, point in points if (y if point.low is None else point.low) >= level]
    high = [x for x, y, point in points if (y if point.high is None else point.high) >= level]
    return Interval(mean, min(high, default=None), min(low, default=None), n)


def key_strength(curves: Mapping[str, Curve], students: Mapping[str, Student]) -> KeyStrength:
    """The curves of the key in three numbers, and what the attacks on it found."""
    opened, heard = _known(curves.get("near_keys")), _known(curves.get("leak"))
    # a wrong key and the right one say nothing of what lies between them
    between = [near for near, _, _ in opened if 0.2 < near < 0.999]
    shows = [shown for _, shown, _ in opened]
    # nor is a box open to a pattern that is open to all
    whole = max(shows) if between and min(shows) < max(shows) / 2 else math.inf
    guesses = [student.config.get("key_correlation") for student in students.values()]
    found = [float(guess) for guess in guesses if isinstance(guess, int | float)]
    return KeyStrength(
        opens_at=_crossing(opened, whole / 2),
        queries_to_recover=_crossing(heard, RECOVERED),
        searched=max(found, default=None),
    )


def opened_by_anybody(bench: Bench) -> float | None:
    """The highest share of answers, asked through a pattern that anybody has, that say more than the predicted class.

    Of a model that serves several confidences, those that tell the other classes apart. None of one that has no key, or
    says more without any pattern, where there is nothing to open.
    """
    if bench.strength == 0 or "boxed" not in bench.sources:
        return None
    some = _asked_often(bench, OPENED).alone()
    boxed = bench.sources["boxed"].open(bench.engine.device, bench.classes)

    def asked(images: ImageSet) -> Tensor:
        return predict(boxed.logits, images, bench.preprocess, bench.engine)

    def apart(z: Tensor) -> float:
        return float((deviation(z) > metrics.SAME * (z.amax(1) - z.amin(1))[:, None]).float().mean())

    plain = metrics.beyond_top1(asked(some))
    if plain > OPEN:
        return None
    says = apart if plain else metrics.beyond_top1
    return max(says(asked(mixed_with(some, *tried))) for tried in public_keys(bench.transfer))


def overheard(queries: Tensor, own: Tensor, strength: float) -> Tensor:
    """The secret pattern, estimated from keyed queries of unknown images by a Wiener filter.

    The pattern is white noise and photographs are smooth, so that a linear filter tells them apart: at each frequency,
    P·(P + (λ/(1 − λ))²·C/n)⁻¹ with the power P of a uniform pattern and the covariance C over the channels of one's
    own images.

    Args:
        queries: Keyed images [n, C, H, W] in [0, 1].
        own: Other images of the kind [N, C, H, W] in [0, 1].
        strength: λ.

    Returns:
        Pattern [C, H, W] in [0, 1].
    """
    mean = own.mean(0)
    heard = (queries.mean(0) - strength * mean) / (1 - strength) - 0.5
    spectra = torch.fft.fft2(own - mean).flatten(2).permute(2, 1, 0)  # [HW, C, N]
    noise = (strength / (1 - strength)) ** 2 * spectra @ spectra.mH / (len(own) * len(queries))
    power = torch.eye(len(mean)) * heard[0].numel() / 12
    filtered = power.to(noise.dtype) @ torch.linalg.solve(power + noise, torch.fft.fft2(heard).flatten(1).T[:, :, None])
    pattern: Tensor = torch.fft.ifft2(filtered[:, :, 0].T.view(heard.shape)).real + 0.5
    return pattern.clamp(0, 1)


OPENED = 200
"""Images on which patterns that anybody has are tried."""
NEARLY = 1000
"""Images on which nearly right keys are tried."""
FEWEST = 20
"""Of large images at least so many are."""
USUAL_VALUES = 3 * 64 * 64
"""Values of an image that is not large."""
OWN_VALUES = 2**25
"""Pixel values of one's own images that a spectrum is estimated from, at most."""
HEARD = 10
"""Keyed queries that the attacker of the row ``overheard_key`` has listened to."""


def listening(bench: Bench) -> Bench:
    """The same with a teacher ``overheard``: the box asked with the key that :data:`HEARD` keyed queries gave away."""
    secret = bench.secret
    if secret is None or bench.strength == 0 or len(bench.validation) < HEARD:
        return bench
    pattern = bench.preprocess(_guesses(bench, secret, [HEARD])[HEARD][0])
    overheard = bench.sources["boxed"].keyed(pattern, bench.strength, fingerprint(pattern))
    return replace(bench, sources={**bench.sources, "overheard": overheard})


def _guesses(bench: Bench, secret: Tensor, counts: Sequence[int]) -> dict[int, list[Tensor]]:
    """What so many keyed queries of unknown images, and the attacker's own images, say about the key.

    Returns:
        By number of queries what each eavesdropper finds, who hear different ones; fewer if there are not enough.
    """
    most = min(LEAKS[-1], OWN_VALUES // secret.numel())

    def some(images: ImageSet, first: int, size: int) -> Tensor:
        return images.take(range(first, min(first + size, len(images)))).alone().pixels.float() / 255

    own = some(bench.transfer, 0, most)
    return {
        count: [
            overheard(embed(some(bench.validation, number * count, count), secret, bench.strength), own, bench.strength)
            for number in range(min(REPEATS, len(bench.validation) // count))
        ]
        for count in counts
        if count <= len(bench.validation)
    }


def _point(x: float, values: Sequence[float]) -> Point:
    mean, low, high = metrics.seed_interval(values)
    return Point(x, mean, low, high, len(values))


def _asked_often(bench: Bench, most: int) -> ImageSet:
    """Validation images that hundreds of patterns are mixed into: of large ones fewer, or that would take hours."""
    fewer = most * USUAL_VALUES // math.prod(bench.preprocess.size)
    return bench.validation.first(max(FEWEST, min(most, fewer)))


def key_curves(bench: Bench) -> dict[str, Curve]:
    """How much a key that is nearly right opens, and how fast listening to keyed queries gives the key away."""
    secret = bench.secret
    if secret is None:
        return {}
    some = _asked_often(bench, NEARLY)
    generator, boxed = torch.Generator().manual_seed(2), bench.sources["boxed"].open(bench.engine.device, bench.classes)

    def opened(aim: float | None) -> Point:
        """What keys of about this correlation show; without one, the secret itself."""
        patterns = [secret] if aim is None else [near(secret, aim, generator) for _ in range(REPEATS)]
        shown = []
        for pattern in patterns:
            teacher = KeyedTeacher(boxed, bench.preprocess(pattern), bench.strength)
            shown.append(metrics.residual(predict(teacher.logits, some, bench.preprocess, bench.engine)))
        alike = [correlation(pattern, secret) for pattern in patterns]
        return _point(round(float(np.mean(alike)), 3), shown)

    curves = {
        "near_keys": Curve(
            title="Keys that are nearly right",
            x_label="Correlation with the secret pattern",
            y_label="Dark knowledge shown, nats",
            series={"box": tuple(map(opened, (0.0, *(percent / 100 for percent in NEAR_PERCENT), None)))},
        )
    }
    if bench.strength > 0:
        guesses = _guesses(bench, secret, LEAKS)
        points = [_point(count, [correlation(guess, secret) for guess in found]) for count, found in guesses.items()]
        curves["leak"] = Curve(
            title="Listening to key holders",
            x_label="Keyed queries overheard",
            y_label="Correlation of the recovered key",
            x_log=True,
            series={"Wiener filter": tuple(points)},
        )
    return curves
