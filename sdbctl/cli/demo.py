"""``sdbctl demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdbctl.cli import options as o
from sdbctl.cli.evaluate import finish
from sdbctl.cli.output import Live, duration, say
from sdbctl.errors import EnvironmentFailure, UsageError

FILES = ("teacher.safetensors", "boxed.safetensors", "boxed.onnx")


def demo(
    folder: Annotated[Path, typer.Option("--output", "-o", help="Folder of the files and the report.")] = Path(
        "sdbctl-demo"
    ),
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Students per row.")] = 10,
    force: o.Force = False,
    json_: o.Json = False,
) -> None:
    """Run the whole job on scikit-learn's digits: train, box, export, attack, report."""
    from sdbctl.report.render import FORMATS

    for name in (*FORMATS, *FILES):
        if (folder / name).exists() and not force:
            raise UsageError(f"output {folder / name} already exists", "use --force to replace it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFailure(f"cannot make folder {folder}: {error.strerror}", "choose another --output") from None
    say(f"time estimate: {duration(40 + 26 * seeds)}")
    from sdbctl.demo import demo as run

    with Live() as progress:
        made = run(folder, seeds=seeds, progress=progress)
    say(f"files: {', '.join(str(path) for path in made.files)}")
    finish(made.report, folder, [], force, json_)
