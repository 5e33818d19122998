"""``sdbctl list``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from sdbctl.cli import options as o
from sdbctl.cli.output import emit, pairs
from sdbctl.errors import check_known


def _objectives() -> dict[str, str]:
    from sdbctl.objectives import OBJECTIVES

    def line(name: str) -> str:
        one = OBJECTIVES[name]
        parameters = " ".join(f"{key}={value:g}" for key, value in asdict(one.parameters()).items())
        presets = ", ".join(f"{name}:{preset}" for preset in one.presets if preset != "default")
        return (
            one.summary
            + (f" [{parameters}, each by --set]" if parameters else "")
            + (f" [{presets}]" if presets else "")
        )

    return {name: line(name) for name in OBJECTIVES}


def _attacks() -> dict[str, str]:
    from sdbctl.attacks import ATTACKS

    return {
        name: f"{attack.summary} ({attack.source}) [{attack.access.name.lower()}{', labels' if attack.labels else ''}]"
        for name, attack in ATTACKS.items()
    }


def _students() -> dict[str, str]:
    from sdbctl import models

    return {**models.students(), "…": "any torchvision classifier by its name, such as resnet18"}


def _suites() -> dict[str, str]:
    from sdbctl.suites import SUITES

    return {name: suite.summary for name, suite in SUITES.items()}


def _wrappers() -> dict[str, str]:
    from sdbctl.wrappers import WRAPPERS

    return {name: (wrapper.__doc__ or "").partition("\n")[0] for name, wrapper in WRAPPERS.items()}


def _data() -> dict[str, str]:
    from sdbctl.data import sources

    return sources()


TOPICS = {
    "objectives": _objectives,
    "attacks": _attacks,
    "students": _students,
    "suites": _suites,
    "wrappers": _wrappers,
    "data": _data,
}
"""Names and one line each, straight from the registries."""


def list_(
    topic: Annotated[str, typer.Argument(help=f"One of: {', '.join(TOPICS)}; or all.")] = "all",
    json_: o.Json = False,
) -> None:
    """Show the objectives, attacks, students, suites, serving-time wrappers and data sources that there are."""
    check_known("topic", topic, (*TOPICS, "all"))
    tables = {name: TOPICS[name]() for name in (TOPICS if topic == "all" else (topic,))}
    emit(tables, json_, *(pairs(f"\n{name}", rows) for name, rows in tables.items()))
