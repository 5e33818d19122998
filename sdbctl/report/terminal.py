"""The report as rich tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from sdbctl.report import Report
from sdbctl.report.gates import GateResult
from sdbctl.report.view import NOT_MEASURED, Table, compare, headline, view

_STYLES = {
    "pass": "green",
    "fail": "red",
    "neutral": "",
    "authorized": "green",
    "attack": "yellow",
    "floor": "dim",
}


def tables(report: Report, gates: Sequence[GateResult] = ()) -> list[RenderableType]:
    """The verdict, the headline, gates, models and students, to be printed one after the other."""
    shown = view(report, gates)
    result: list[RenderableType] = [
        Group(Text(shown.title, "bold"), Text(shown.verdict)),
        rich_table(headline(shown.cards)),
    ]
    result += [rich_table(table) for table in shown.tables]
    result += [Text(f"Note: {note}", "dim") for note in shown.notes]
    return result


def comparison(report: Report, baseline: Report) -> RenderableType:
    """What changed since another report."""
    return rich_table(compare(report, baseline))


def rich_table(table: Table) -> RichTable:
    """A rich table of the columns that fit a terminal; cells are plain text, so no markup is read."""
    rich = RichTable(
        title=Text(table.title, "bold") if table.title else None,
        title_justify="left",
        caption=Text(table.note, "dim") if table.note else None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in table.columns:
        if not column.wide:
            justify: JustifyMethod = "right" if column.numeric else "left"
            rich.add_column(Text(column.title), justify=justify, no_wrap=column.numeric, overflow="fold")
    marks = table.marks or ("",) * len(table.rows)
    for row, mark in zip(table.rows, marks, strict=True):
        cells = zip(table.columns, row, strict=True)
        rich.add_row(
            *(Text(cell, "dim" if cell == NOT_MEASURED else "") for column, cell in cells if not column.wide),
            style=_STYLES.get(mark, ""),
        )
    return rich
