"""The formats a report can be written in: one registry, one function that writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdbctl import files
from sdbctl.errors import EnvironmentFailure, UsageError
from sdbctl.report import Report
from sdbctl.report.gates import GateResult
from sdbctl.report.html import html
from sdbctl.report.junit import junit
from sdbctl.report.markdown import markdown


@dataclass(frozen=True)
class Format:
    """How a report becomes a file.

    Attributes:
        file: Its name.
        render: Makes its text from a report and the gates it was held against.
    """

    file: str
    render: Callable[[Report, Sequence[GateResult]], str]


FORMATS = {
    "json": Format("report.json", lambda report, _: report.to_json()),
    "markdown": Format("report.md", markdown),
    "html": Format("report.html", html),
    "junit": Format("junit.xml", junit),
}


def write(
    report: Report,
    folder: Path,
    formats: Sequence[str] = ("json", "markdown", "html"),
    force: bool = False,
    gates: Sequence[GateResult] = (),
) -> list[Path]:
    """Write a report into ``folder``, which is made if it does not exist.

    Every format is rendered from the JSON, and nothing is written before all are rendered.

    Args:
        report: The report.
        folder: Where to.
        formats: Keys of ``FORMATS``; with gates, "junit" is added.
        force: Whether existing files may be replaced; without gates the JUnit file of another report is removed.
        gates: The gates it was held against.

    Returns:
        The files, in the order of ``formats``.

    Raises:
        UsageError: A format is unknown, "junit" has no gates, or a file exists and ``force`` is off.
        EnvironmentFailure: The folder cannot be made or written to.
    """
    names = list(dict.fromkeys([*formats, "junit"] if gates else formats))
    for name in names:
        if name not in FORMATS:
            raise UsageError(f"report format {name!r} is unknown", f"choose from {', '.join(FORMATS)}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFailure(f"cannot make report folder {folder}: {error.strerror}") from None
    paths = {name: files.claim(folder / FORMATS[name].file, force=force) for name in names}
    report = Report.from_json(report.to_json())
    texts = {name: FORMATS[name].render(report, gates) for name in names}
    if force and not gates:
        # what stands there says how another report was judged
        (folder / FORMATS["junit"].file).unlink(missing_ok=True)
    return [files.write(path, texts[name], force=force) for name, path in paths.items()]
