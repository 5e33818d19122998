"""The command line. Commands parse, call one library function and render; only they know exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sdbctl.cli import bench, box, demo, distill, evaluate, export, keys, listing, streams, sweep
from sdbctl.cli.output import explained, guarded, say
from sdbctl.cli.settings import APPLIED, SETTINGS_FILE, read_settings
from sdbctl.errors import Interrupted, UsageError

app = typer.Typer(
    name="sdbctl",
    help="Put a trained image classifier into a Safe Distillation Box, and measure what an attacker really gets.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS: dict[str, Callable[..., Any]] = {
    "keygen": keys.keygen,
    "box": box.box,
    "export": export.export,
    "inspect": export.inspect,
    "distill": distill.distill,
    "eval": evaluate.evaluate,
    "report": evaluate.rerender,
    "sweep": sweep.sweep,
    "train": distill.train,
    "demo": demo.demo,
    "bench": bench.bench,
    "list": listing.list_,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(guarded(_command))


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"sdbctl {version('sdbctl')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = None,
) -> None:
    """Put a trained image classifier into a Safe Distillation Box, and measure what an attacker really gets."""


def defaults_for(arguments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What ``sdbctl.toml`` in this folder sets, which is said; nothing for somebody who asks for help."""
    if {"-h", "--help", "--version"} & set(arguments):
        return {}
    root: Any = typer.main.get_command(app)
    defaults = read_settings(Path(SETTINGS_FILE), root)
    name = next((word for word in arguments if word in COMMANDS), "")
    given = {word.partition("=")[0] for word in arguments}
    used = {
        parameter.name: max(parameter.opts, key=len).lstrip("-")
        for parameter in (root.commands[name].params if name else ())
        if parameter.name in defaults.get(name, {}) and not given & {*parameter.opts, *parameter.secondary_opts}
    }
    APPLIED.clear()
    APPLIED.update(used)
    if used:
        say(f"defaults from {SETTINGS_FILE}: {', '.join(sorted(used.values()))}")
    return defaults


def main() -> Any:
    """Entry point of the console script; ``sdbctl.toml`` in this folder fills in options."""
    streams.mend()
    # threads that wait for one another soon sleep: beside other work, spinning keeps those from the CPU they wait for
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    arguments = sys.argv[1:] or ["--help"]
    try:
        raise SystemExit(app(arguments, default_map=defaults_for(arguments), standalone_mode=False))
    except KeyboardInterrupt:
        raise SystemExit(Interrupted.exit_code) from None
    except Exception as error:
        found = explained(misused(error))
        say(f"error: {found}")
        raise SystemExit(found.exit_code) from None


def misused(error: Exception) -> Exception:
    """What typer found wrong with a command line, which it would print in a box, as an error like all others."""
    if not hasattr(error, "format_message"):
        return error
    text, command = error.format_message().rstrip("."), getattr(getattr(error, "ctx", None), "command_path", "sdbctl")
    return UsageError(text, "" if text.endswith("?") else f"{command} -h lists what there is")
