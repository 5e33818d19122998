"""Standard output and error that are closed, full, not UTF-8, or whose reader leaves early."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO


class _Raw(io.FileIO):
    """A standard stream that leads nowhere once nobody reads it."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            # a result that is lost counts, a message does not
            if self.fileno() == 1 and not isinstance(error, BrokenPipeError):
                raise
            return len(data)


def mend() -> None:
    """Make the standard streams such that to write a message never fails, and a result only if it is lost.

    Streams that are closed are opened, or the next file that is opened would be taken for one of them. A reader that
    leaves early has seen enough. What an encoding lacks is replaced.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w"))
        elif name != "stdin" and getattr(sys, name) is getattr(sys, f"__{name}__"):
            setattr(sys, name, _lenient(getattr(sys, name)))


def _lenient(stream: TextIO) -> TextIO:
    raw = _Raw(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        stream.encoding,
        "replace",
        line_buffering=raw.isatty() or stream.fileno() == 2,
    )
