"""Several boxes of one checkpoint side by side: what each setting costs, and what it protects."""

from __future__ import annotations

import json
from collections.abc import Mapping

from sdbctl.report import Report
from sdbctl.report.html import template
from sdbctl.report.markdown import document
from sdbctl.report.view import ICONS, NOT_MEASURED, Column, Table, bounds, clean, number

AGAINST = {
    "inference_cost.top1.mean": "Top-1 cost, points",
    "inference_cost.nll_binary.mean": "Rise of the NLL of the prediction",
    "authorized_gain.mean": "Authorized gain, points",
}
_COLUMNS = (
    Column("Setting", numeric=False),
    Column("Top-1 cost"),
    Column("Top-5 cost", wide=True),
    Column("ECE", wide=True),
    Column("NLL of prediction", wide=True),
    Column("Dark knowledge", wide=True),
    Column("Advantage, API"),
    Column("95 % bounds"),
    Column("Without labels", wide=True),
    Column("95 % bounds", wide=True),
    Column("Who holds the file", wide=True),
    Column("Plain KD", wide=True),
    Column("Wrong key"),
    Column("Authorized gain"),
    Column("95 % bounds", wide=True),
    Column("Seeds", wide=True),
)


def table(reports: Mapping[str, Report]) -> Table:
    """One row per setting.

    Args:
        reports: Reports by the name of a setting.
    """
    rows = tuple(_row(name, report) for name, report in reports.items())
    return Table(
        "Settings",
        _COLUMNS,
        rows,
        "Costs against N_ft; advantages, and KD without and with a wrong key, over the best of the floor, in points.",
    )


def _row(name: str, report: Report) -> tuple[str, ...]:
    cost, threats, boxed = report.inference_cost, report.unauthorized_advantage, report.models.get("boxed")
    advantage = threats.api
    plain, wrong = (report.students.get(name) for name in ("unauthorized", "authorized_wrong_key"))
    return (
        clean(name),
        number(cost.top1.mean, sign=True),
        number(cost.top5.mean, sign=True),
        number(cost.ece.mean, 3, sign=True),
        number(cost.nll_binary.mean, 3, sign=True),
        number(boxed.residual if boxed else None, 4),
        number(advantage.labelled.mean, sign=True),
        bounds(advantage.labelled),
        number(advantage.unlabelled.mean, sign=True),
        bounds(advantage.unlabelled),
        number(threats.file.labelled.mean, sign=True),
        number(plain.difference.mean if plain else None, sign=True),
        number(wrong.difference.mean if wrong else None, sign=True),
        number(report.authorized_gain.mean, sign=True),
        bounds(report.authorized_gain),
        number(advantage.labelled.n, 0),
    )


def to_json(title: str, reports: Mapping[str, Report]) -> str:
    """Means and bounds of every setting; whole reports lie beside their boxes."""
    content = {"title": title, "settings": {name: _numbers(report) for name, report in reports.items()}}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _numbers(report: Report) -> dict[str, float]:
    """The means, and their bounds, samples and answers beyond the class; not what single students scored."""
    means, more = report.means(), (".low", ".high", ".n", ".beyond")
    return {
        path: value for path, value in report.numbers() if value is not None and (path in means or path.endswith(more))
    }


def markdown(title: str, reports: Mapping[str, Report]) -> str:
    """The table as Markdown."""
    return document(title, table(reports))


def html(title: str, reports: Mapping[str, Report]) -> str:
    """The table and the trade-offs as one page without network or script."""
    from sdbctl.report import plots  # matplotlib takes a while to import

    drawn = [plot for cost, words in AGAINST.items() if (plot := plots.trade_off(reports, cost, words))]
    return template("sweep.html.j2").render(
        title=clean(title), table=table(reports), plots=drawn, roles={}, icons=ICONS, not_measured=NOT_MEASURED
    )
