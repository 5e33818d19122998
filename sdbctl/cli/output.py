"""Where everything that a person or a script sees goes out, and where errors become exit codes."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import typer
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Column, Table
from rich.text import Text

from sdbctl import team
from sdbctl.errors import EnvironmentFailure, Interrupted, SdbError

# a pipe or a CI log has no width of its own, and 80 columns break the names in the tables
out = Console(highlight=False, width=None if os.isatty(1) or "COLUMNS" in os.environ else 110)
err = Console(stderr=True, highlight=False, soft_wrap=True)


ending = contextlib.ExitStack()
"""What is held until the command ends."""
warned: list[str] = []
"""What this command warned of, for those who read its JSON alone."""


def printable(text: str) -> str:
    """``text`` without what could control a terminal, since names may come from a file somebody else made."""
    return "".join(character for character in text if character.isprintable())


def say(text: str) -> None:
    """A line for people, on stderr."""
    err.print(printable(text), markup=False)


def warn(text: str) -> None:
    """A warning for people; scripts find it in :data:`warned`."""
    warned.append(text)
    err.print("warning: ", style="yellow", end="")
    say(text)


def emit(result: Mapping[str, Any], as_json: bool, *human: RenderableType) -> None:
    """The result, on stdout: one JSON object, or what people read.

    Args:
        result: The object that scripts get.
        as_json: Whether ``--json`` was given.
        human: Tables and lines for people.
    """
    if team.rank() > 0:
        return
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    for item in human:
        out.print(printable(item), markup=False) if isinstance(item, str) else out.print(item)


def pairs(title: str, rows: Mapping[str, Any]) -> Table:
    """A two-column table of names and values."""
    table = Table(title=title or None, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(printable(name)), Text(printable(str(value))))
    return table


QUIET_SECONDS = 60.0
"""How long a log shows nothing at most while something is computed."""


class Live:
    """Progress bars on stderr: one line per run, with the loss terms and accuracies of the moment.

    Without a terminal it prints a line at every tenth of a run, and one whenever it said nothing for
    :data:`QUIET_SECONDS`.
    """

    def __init__(self) -> None:
        self._bars = Bars(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=24 if err.width > 110 else 8),
            TextColumn("{task.fields[count]}", markup=False, table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            # the others keep their width, this one gets the rest
            TextColumn("{task.fields[shown]}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
            expand=True,
            console=err,
            disable=not err.is_terminal,
        )
        self._task: Any = None
        self._name, self._total, self._done, self._told = "", 0, 0, 0
        self._metrics: dict[str, float] = {}
        self._over = threading.Event()
        # when a run began, what was done in its first second, till when, and when something was said last
        self._begun, self._known, self._since, self._said = 0.0, 0.0, 0.0, time.monotonic()
        self._work, self._worked = 0.0, 0.0

    def __enter__(self) -> Live:
        self._bars.start()
        if not err.is_terminal:
            threading.Thread(target=self._remind, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._bars.stop()

    def _remind(self) -> None:
        while not self._over.wait(min(1.0, QUIET_SECONDS)):
            if self._name and time.monotonic() - self._said >= QUIET_SECONDS:
                self._tell()

    def _tell(self) -> None:
        self._said = time.monotonic()
        # what an earlier run left is done at once, and tells nothing of the pace
        done, passed = self._worked - self._known, self._said - self._begun
        open_ = self._work - self._worked if self._done < self._total else 0.0
        left = (self._said - self._since) / done * open_ if done > 0 else 0.0
        rest = f", about {duration(left)} left" if left else ""
        shown = "  ".join(f"{name} {_short(value)}" for name, value in [*self._metrics.items()])
        say(f"{self._name} {self._done}/{self._total}, {duration(passed)} so far{rest}  {shown}".rstrip())

    def start(self, name: str, steps: int, work: float | None = None) -> None:
        """See :class:`sdbctl.training.Progress`."""
        self._name, self._total, self._done, self._told, self._metrics = name, steps, 0, 0, {}
        self._begun, self._known = time.monotonic(), 0.0
        self._work, self._worked, self._since = steps if work is None else work, 0.0, self._begun
        self._task = self._bars.add_task(name, total=self._work, shown="", count=f"0/{steps}")

    def advance(self, steps: int, metrics: Mapping[str, float], work: float | None = None) -> None:
        """See :class:`sdbctl.training.Progress`."""
        self._metrics.update(metrics)
        shown = "  ".join(f"{name} {_short(value)}" for name, value in self._metrics.items())
        self._done += steps
        self._worked += steps if work is None else work
        self._bars.update(self._task, completed=self._worked, shown=shown, count=f"{self._done}/{self._total}")
        tenth = 10 * self._done // max(1, self._total)
        if time.monotonic() - self._begun < 1:
            self._known, self._since = self._worked, time.monotonic()
        if not err.is_terminal and tenth > self._told:
            self._told = tenth
            self._tell()

    def note(self, text: str) -> None:
        """See :class:`sdbctl.training.Progress`."""
        say(text)


def _short(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def duration(seconds: float) -> str:
    """Seconds for people: ``45 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """Run a command; turn what goes wrong into one line on stderr and an exit code."""
    options = inspect.signature(command).parameters
    if "resume" in options:
        again = "--resume goes on"
    elif "seeds" in options and "dry_run" in options:  # finished students are kept
        again = "run it again to go on"
    else:
        again = "--force starts again" if "force" in options else "nothing was written"

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        signal.signal(signal.SIGTERM, _stop)
        warned.clear()
        with ending, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module=r"sdbctl\.")
            warnings.showwarning = _show_warning
            try:
                return command(*args, **kwargs)
            except KeyboardInterrupt:
                fail(Interrupted("interrupted", again))
            except (typer.Exit, typer.Abort):
                raise
            except Exception as error:
                fail(Interrupted("interrupted", again) if _hides_interrupt(error) else explained(error))

    return run


def _hides_interrupt(error: BaseException | None) -> bool:
    """Whether a library made an error of its own of Ctrl-C, as torch does if it comes while a part is imported."""
    if isinstance(error, SdbError) or error is None:
        return False
    return isinstance(error, KeyboardInterrupt) or _hides_interrupt(error.__cause__ or error.__context__)


def fail(error: SdbError) -> NoReturn:
    """Print an error in one line and leave with its exit code."""
    err.quiet = False
    err.print(f"error in process {team.rank()}: " if team.rank() else "error: ", style="bold red", end="")
    say(" ".join(str(error).split()))
    if team.size() > 1:
        ending.close()
        # threads of a group that has lost a process abort the interpreter if it ends in the usual way
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.exit_code)
    raise typer.Exit(error.exit_code) from None


def explained(error: Exception) -> SdbError:
    """Any failure as one that is explained in a line, but that ``SDBCTL_DEBUG=1`` shows what nobody expected whole."""
    if isinstance(error, SdbError):
        return error
    if os.environ.get("SDBCTL_DEBUG"):
        raise error
    if isinstance(error, OSError):
        where = f" ({Path(error.filename).name})" if error.filename else ""
        return EnvironmentFailure(f"{error.strerror or error}{where}", "check disk space and permissions")
    if isinstance(error, MemoryError) or re.search("OutOfMemory|allocate memory|size calculation", repr(error)):
        return EnvironmentFailure("out of memory", "use a smaller --batch-size, or fewer --jobs")
    text = (str(error).splitlines() or [""])[0][:200]
    return SdbError(
        f"internal error: {type(error).__name__}: {text}",
        "set SDBCTL_DEBUG=1 for details, and please report it",
    )


def _stop(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _show_warning(message: Warning | str, *rest: Any, **more: Any) -> None:
    warn(str(message))
