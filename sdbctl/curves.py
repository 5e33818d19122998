"""Curves: accuracy over the query budget, nearly right keys, and keys that leak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from sdbctl import metrics
from sdbctl.attacks import ATTACKS
from sdbctl.cells import Bench, Cell, run_cells
from sdbctl.key import correlation, embed
from sdbctl.report import (
    Curve,
    Point,
    Student,
)
from sdbctl.suites import BY_NAME, suite
from sdbctl.training import Progress, predict

BUDGETS = (1000, 5000, 10_000)
FEW_SHOT = (0.01, 0.05, 0.1)
"""Transfer images of the budget curve, in number and as shares of all."""
BUDGET_ROWS = ("cross_entropy", "kd_original", "unauthorized", "authorized")
NEAR_PERCENT = (10, 30, 50, 70, 90, 95, 99)
"""Correlations, in percent, of the keys that are nearly right."""
LEAKS = (1, 10, 100, 1000)
"""Keyed queries that somebody listens to, for the leak curve."""


def budgets(bench: Bench) -> list[tuple[str, int]]:
    """Rows and numbers of transfer images of the budget curve; none if the suite has none."""
    if bench.config.suite is None or not suite(bench.config.suite).curves:
        return []
    names = [row.name for row in bench.rows() if row.name in BUDGET_ROWS]
    whole = len(bench.transfer)
    sizes = {*BUDGETS, *(round(share * whole) for share in FEW_SHOT)}
    return [(name, size) for size in sorted(sizes) if 2 * bench.classes <= size < whole for name in names]


def budget_curve(
    bench: Bench, students: Mapping[str, Student], folder: Path | None, progress: Progress
) -> dict[str, Curve]:
    """Accuracy over the number of transfer images, with the settings chosen for all of them; one seed a point."""
    wanted = [(name, size) for name, size in budgets(bench) if students[name].config]
    if not wanted:
        return {}
    cells = {}
    for name, size in wanted:
        known = set(ATTACKS[BY_NAME[name].attack].grid[0])
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


def key_curves(bench: Bench) -> dict[str, Curve]:
    """How much a key that is nearly right opens, and how fast listening to keyed queries gives the key away."""
    secret = bench.secret
    if secret is None:
        return {}
    some = bench.validation.take(range(min(1000, len(bench.validation))))
    opened = []
    for name, source in bench.sources.items():
        if source.pattern is not None and name != "disturbed":
            teacher = source.open(bench.engine, bench.classes)
            outputs = predict(teacher.logits, some, bench.preprocess, bench.engine)
            pattern = replace(bench, sources={"keyed": source}).secret
            assert pattern is not None
            opened.append(Point(round(correlation(pattern, secret), 3), metrics.residual(outputs)))
    curves = {
        "near_keys": Curve(
            title="Keys that are nearly right",
            x_label="Correlation with the secret pattern",
            y_label="Dark knowledge shown, nats",
            series={"box": tuple(sorted(opened, key=lambda point: point.x or 0.0))},
        )
    }
    if bench.transfer.in_memory and bench.strength > 0:
        own = bench.transfer.pixels.float().mean(0) / 255
        heard = bench.validation.pixels.float() / 255 if bench.validation.in_memory else None
        if heard is not None:
            points = []
            for count in (count for count in LEAKS if count <= len(heard)):
                mean = embed(heard[:count], secret, bench.strength).mean(0)
                guess = (mean - bench.strength * own) / (1 - bench.strength)
                points.append(Point(count, round(correlation(guess, secret), 4)))
            curves["leak"] = Curve(
                title="Listening to key holders",
                x_label="Keyed queries overheard",
                y_label="Correlation of the recovered key",
                x_log=True,
                series={"mean of the queries": tuple(points)},
            )
    return curves
