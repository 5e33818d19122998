"""The one exception hierarchy; each class carries the exit code that ``cli`` returns for it."""

from __future__ import annotations

from collections.abc import Collection


class SdbError(Exception):
    """A failure that is explained in one line.

    Args:
        message: What is wrong and where, without a trailing period.
        hint: What to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class UsageError(SdbError):
    """The command or its options do not fit together."""

    exit_code = 2


class GateFailed(SdbError):
    """A gate or a budget such as ``--max-cost`` is broken."""

    exit_code = 3


class BadInput(SdbError):
    """A file is missing, damaged, untrusted, or not what was asked for."""

    exit_code = 4


class ParityMismatch(SdbError):
    """An exported model does not compute what the torch model computes."""

    exit_code = 5


class EnvironmentFailure(SdbError):
    """The disk, the device, or a download failed."""

    exit_code = 6


class Interrupted(SdbError):
    """The user stopped the run (Ctrl-C or SIGTERM)."""

    exit_code = 130


def check_known(kind: str, name: str | None, known: Collection[str]) -> None:
    """Refuse a name that no registry has; None is no name.

    Raises:
        UsageError: It is unknown.
    """
    if name is not None and name not in known:
        raise UsageError(f"unknown {kind} {name}", f"use one of: {', '.join(known)}")
