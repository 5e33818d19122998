"""The report as rich tables."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

from rich import box
from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from sdbctl.report import Report
from sdbctl.report.gates import GateResult
from sdbctl.report.view import NOT_MEASURED, Table, compare, gates_table, headline, view

NARROW = 10
"""Characters of a line of a numeric column's title, and the least that a column of words keeps."""
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


def gate_table(results: Sequence[GateResult]) -> list[RenderableType]:
    """The gates alone, if there are any."""
    table = gates_table(results)
    return [rich_table(table)] if table.rows else []


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
        collapse_padding=True,
    )
    cells = list(zip(*table.rows, strict=True)) or [()] * len(table.columns)
    for column, content in zip(table.columns, cells, strict=True):
        if column.wide:
            continue
        # numbers stay on one line, so their titles break, and words give way
        justify: JustifyMethod = "right" if column.numeric else "left"
        title = fill(column.title, NARROW) if column.numeric else column.title
        least = None if column.numeric else min(NARROW, max(map(len, (column.title, *content))))
        rich.add_column(Text(title), justify=justify, no_wrap=column.numeric, overflow="fold", min_width=least)
    marks = table.marks or ("",) * len(table.rows)
    for row, mark in zip(table.rows, marks, strict=True):
        shown = [cell for column, cell in zip(table.columns, row, strict=True) if not column.wide]
        rich.add_row(
            *(Text(cell, "dim" if cell == NOT_MEASURED else "") for cell in shown),
            style=_STYLES.get(mark, ""),
        )
    return rich
