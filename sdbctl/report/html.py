"""The report as one HTML page that needs nothing else: no network, no script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from sdbctl.report import Report
from sdbctl.report.gates import GateResult
from sdbctl.report.view import ABOUT, ICONS, NOT_MEASURED, ROLES, view


def html(report: Report, gates: Sequence[GateResult] = ()) -> str:
    """The report as an HTML page; every text in it is escaped."""
    from sdbctl.report import plots  # matplotlib takes a while to import

    used = {student.role for student in report.students.values()}
    return template("template.html.j2").render(
        view=view(report, gates),
        about=ABOUT,
        icons=ICONS,
        not_measured=NOT_MEASURED,
        roles={role: words for role, words in ROLES.items() if role in used},
        control=report.get("students.control.mean") is not None,
        students=[plot for width in (plots.WIDE, plots.NARROW) if (plot := plots.students(report, width))],
        plots=[*plots.reliability(report), *plots.curves(report)],
    )


def template(name: str) -> Template:
    """A page of this package; every text put into it is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
