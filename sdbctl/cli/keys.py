"""``sdbctl keygen``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdbctl.cli import options as o
from sdbctl.cli.common import named
from sdbctl.cli.output import emit
from sdbctl.errors import UsageError


def keygen(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write the key.")],
    force: o.Force = False,
    json_: o.Json = False,
) -> None:
    """Make a secret key: 32 random bytes that only you can read."""
    from sdbctl.key import Key

    if str(path) == "-":
        raise UsageError("a key is not written to standard output, where it may be logged", "name a file")
    key = Key.generate()
    key.save(named(path), force=force)
    emit({"key_file": str(path), "key_id": key.id}, json_, f"{path}: key {key.id}; keep it secret, keep a copy")
