"""The report as Markdown, made for a GitHub step summary."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape

from sdbctl.report import Report
from sdbctl.report.gates import GateResult
from sdbctl.report.view import ABOUT, Column, Table, headline, view

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#~|!@$])")


def markdown(report: Report, gates: Sequence[GateResult] = ()) -> str:
    """The report as Markdown; text from it can neither add markup nor links."""
    shown = view(report, gates)
    parts = [f"# {_text(shown.title)}", f"**{_text(shown.verdict)}**", *_table(headline(shown.cards))]
    for table in shown.tables:
        parts += [f"## {_text(table.title)}", *_table(table)]
    if shown.notes:
        parts += ["## Notes", "\n".join(f"- {_text(note)}" for note in shown.notes)]
    about = "\n".join(f"- **{_text(term)}**: {_text(words)}" for term, words in ABOUT)
    parts += ["<details><summary>What this measures</summary>", about, "</details>"]
    names = (Column("Name", numeric=False), Column("Value", numeric=False))
    for title, settings in shown.details:
        table = Table(title, names, settings)
        parts += [f"<details><summary>{_text(title)}</summary>", *_table(table), "</details>"]
    parts.append(f"Written by sdbctl {_text(shown.tool)}, {_text(shown.created)}.")
    return "\n\n".join(parts) + "\n"


def document(title: str, table: Table) -> str:
    """A table under a heading."""
    return "\n\n".join([f"# {_text(title)}", *_table(table)]) + "\n"


def _table(table: Table) -> Iterator[str]:
    lines = [
        [_text(column.title) for column in table.columns],
        ["---:" if column.numeric else ":---" for column in table.columns],
        *([_text(cell) for cell in row] for row in table.rows),
    ]
    yield "\n".join(f"| {' | '.join(line)} |" for line in lines)
    if note := table.about():
        yield _text(note)


def _text(text: str) -> str:
    """Escape what Markdown or HTML would read as markup, and the start of a bare link."""
    return _SPECIAL.sub(r"\\\1", escape(text, quote=False)).replace("://", ":&#47;/").replace("www.", "www&#46;")
