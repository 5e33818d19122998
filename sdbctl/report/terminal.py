"""The report as rich tables."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from textwrap import fill

from rich import box
from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from sdbctl.report import Report
from sdbctl.report.gates import GateResult
from sdbctl.report.view import NOT_MEASURED, Table, compare, gates_table, headline, made_otherwise, view

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
        Fitting(headline(shown.cards)),
    ]
    result += [Fitting(table) for table in shown.tables]
    result += [Text(f"Note: {note}", "dim") for note in shown.notes]
    return result


def gate_table(results: Sequence[GateResult]) -> list[RenderableType]:
    """The gates alone, if there are any."""
    table = gates_table(results)
    return [Fitting(table)] if table.rows else []


def comparison(report: Report, baseline: Report) -> RenderableType:
    """What changed since another report."""
    other = made_otherwise(report, baseline)
    return Group(*([Text(other, "bold")] if other else []), Fitting(compare(report, baseline)))


@dataclass(frozen=True)
class Fitting:
    """A table without the columns for which a terminal is too narrow."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """See ``rich``."""
        columns = self.table.columns
        giving = sorted(
            (index for index, column in enumerate(columns) if column.spare), key=lambda index: columns[index].spare
        )
        for count in range(len(giving) + 1):
            rich = rich_table(self.table, giving[:count])
            if rich.__rich_measure__(console, options).minimum <= options.max_width:
                break
        yield rich


def rich_table(table: Table, without: Collection[int] = ()) -> RichTable:
    """A rich table; cells are plain text, so no markup is read."""
    kept = [index for index, column in enumerate(table.columns) if not column.wide and index not in without]
    note = table.about(table.columns[index] for index in kept)
    rich = RichTable(
        title=Text(table.title, "bold") if table.title else None,
        title_justify="left",
        caption=Text(note, "dim") if note else None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    cells = list(zip(*table.rows, strict=True)) or [()] * len(table.columns)
    for column, content in ((table.columns[index], cells[index]) for index in kept):
        # numbers stay on one line, so their titles break, and words give way
        justify: JustifyMethod = "right" if column.numeric else "left"
        title = fill(column.title, NARROW) if column.numeric else column.title
        widest = max(map(len, (*title.split("\n"), *content)))
        least = widest if column.numeric else min(NARROW, widest)
        rich.add_column(Text(title), justify=justify, no_wrap=column.numeric, overflow="fold", min_width=least)
    marks = table.marks or ("",) * len(table.rows)
    for row, mark in zip(table.rows, marks, strict=True):
        rich.add_row(
            *(Text(row[index], "dim" if row[index] == NOT_MEASURED else "") for index in kept),
            style=_STYLES.get(mark, ""),
        )
    return rich
