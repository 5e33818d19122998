"""``sdbctl.toml``: defaults for any option of any command."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any

import typer

from sdbctl import files
from sdbctl.errors import BadInput, UsageError

SETTINGS_FILE = "sdbctl.toml"
SPOKEN = ("--help", "--json", "--force", "--trust", "--insecure-key-file")
"""Options that must be given where everybody sees them: a file in a folder from elsewhere must neither lower
the guard nor replace files."""

APPLIED: set[str] = set()
"""Parameters of the running command whose values are of the file: it may set for all what has no meaning for one."""


def read_settings(path: Path, root: Any) -> dict[str, dict[str, Any]]:
    """Read defaults for the command line.

    Keys at the top apply to every command that has the option; those in a table ``[box]``, ``[eval]``, … to
    that command alone, and win. Names are those of the options, with ``-`` or ``_``; but see :data:`SPOKEN`.

    Args:
        path: The file; a missing one sets nothing.
        root: The command group, whose parameters are the valid keys.

    Returns:
        Per command, parameter names and their defaults.

    Raises:
        BadInput: It is no TOML.
        UsageError: A key is unknown; the nearest valid one is named.
    """
    if not path.exists():
        return {}
    try:
        content = tomllib.loads(files.text(path, "settings"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not TOML: {error}", "fix that line") from None
    options = {name: _options(command) for name, command in root.commands.items()}
    everywhere = {option: option for known in options.values() for option in known}
    defaults: dict[str, dict[str, Any]] = {name: {} for name in options}
    tables = {key: value for key, value in content.items() if isinstance(value, dict)}
    for key, value in content.items():
        if key in tables:
            continue
        option = _lookup(key, everywhere, f"{path}", [*everywhere, *options])
        for name, known in options.items():
            if option in known:
                own = known[option]
                defaults[name][own.name] = _fitting(root.commands[name], own, value, f"{path}: {key}")
    for command, table in tables.items():
        if command not in options:
            raise UsageError(f"{path}: unknown command [{command}]", _nearest(command, options))
        for key, value in table.items():
            where = f"{path}, [{command}]"
            parameter = _lookup(key, options[command], where, options[command])
            defaults[command][parameter.name] = _fitting(root.commands[command], parameter, value, f"{where}: {key}")
    return defaults


def _fitting(command: Any, parameter: Any, value: Any, where: str) -> Any:
    """A value of an option; a list of values if it may be repeated."""
    several, flag = getattr(parameter, "multiple", False), getattr(parameter, "is_flag", False)
    items = value if several and isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, bool) != flag or isinstance(item, list | dict):
            raise UsageError(f"{where} is {value}", f"give {'true or false' if flag else 'one number or text'}")
    found = items if several else value
    try:
        parameter.process_value(typer.Context(command), found)
    except Exception as error:
        # what the command line says of an option, which nobody typed here
        if not hasattr(error, "message"):
            raise
        raise UsageError(f"{where} is {value}", str(error.message)) from None
    return found


def _options(command: Any) -> dict[str, Any]:
    """Option names without dashes → parameters."""
    found = {}
    for parameter in command.params:
        for option in parameter.opts:
            if option.startswith("--") and option not in SPOKEN:
                found[option.removeprefix("--").replace("_", "-")] = parameter
        if not parameter.opts[0].startswith("-"):
            found[parameter.name] = parameter
    return found


def _lookup(key: str, known: dict[str, Any], where: str, candidates: Any) -> Any:
    name = key.replace("_", "-")
    if f"--{name}" in SPOKEN:
        raise UsageError(f"{where}: {key} is not taken from a file", "it must be said on the command line")
    if name not in known and name in candidates:
        raise UsageError(f"{where}: {key} is a command", f"write its options below [{key}]")
    if name not in known:
        raise UsageError(f"{where}: unknown key {key}", _nearest(name, candidates))
    return known[name]


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"did you mean {close[0]}?" if close else "see sdbctl --help for the options"
