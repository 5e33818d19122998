"""The formats a report can be written in: one registry, one function that writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sdbctl import files
from sdbctl.errors import EnvironmentFailure
from sdbctl.report import Report
from sdbctl.report.gates import GateResult
from sdbctl.report.html import html
from sdbctl.report.junit import junit
from sdbctl.report.markdown import markdown

FORMATS: dict[str, Callable[[Report, Sequence[GateResult]], str]] = {
    "report.json": lambda report, _: report.to_json(),
    "report.md": markdown,
    "report.html": html,
    "junit.xml": junit,
}
"""What makes the text of each file from a report and the gates it was held against."""


def write(
    report: Report,
    folder: Path,
    *,
    force: bool = False,
    gates: Sequence[GateResult] = (),
) -> list[Path]:
    """Write a report into ``folder``, which is made if it does not exist.

    Every format is rendered from the JSON, and nothing is written before all are rendered.

    Args:
        report: The report.
        folder: Where to.
        force: Whether existing files may be replaced; without gates the JUnit file of another report is removed.
        gates: The gates it was held against, without which there is no JUnit file.

    Returns:
        The files, in the order of ``FORMATS``.

    Raises:
        UsageError: A file exists and ``force`` is off.
        EnvironmentFailure: The folder cannot be made or written to.
    """
    names = [name for name in FORMATS if gates or name != "junit.xml"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFailure(f"cannot make report folder {folder}: {error.strerror}") from None
    paths = {name: files.claim(folder / name, force=force) for name in names}
    report = Report.from_json(report.to_json())
    texts = {name: FORMATS[name](report, gates) for name in names}
    if force and not gates:
        # what stands there says how another report was judged
        (folder / "junit.xml").unlink(missing_ok=True)
    return [files.write(path, texts[name], force=force) for name, path in paths.items()]
