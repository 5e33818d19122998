"""``sdbctl bench``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from sdbctl.cli import options as o
from sdbctl.cli.common import pick
from sdbctl.cli.names import complete
from sdbctl.cli.output import emit


def bench(
    arch: Annotated[
        str, typer.Option("--arch", help="Network to box.", autocompletion=complete("students"))
    ] = "resnet20",
    student: Annotated[
        str, typer.Option("--student", help="Student to distil.", autocompletion=complete("students"))
    ] = "wrn16",
    image_size: Annotated[
        int, typer.Option("--image-size", min=8, max=o.MOST_PIXELS, help="Image height and width.")
    ] = 32,
    classes: Annotated[int, typer.Option("--classes", min=2, help="Number of classes.")] = 10,
    batch_size: Annotated[int, typer.Option("--batch-size", min=2, max=o.MOST_IMAGES, help="Images per step.")] = 128,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Timed rounds; the median counts.")] = 7,
    device: o.Device = "auto",
    precision: o.PrecisionOption = "auto",
    json_: o.Json = False,
) -> None:
    """Time box, training and distillation steps here, beside the physical floor of each."""
    from sdbctl import bench as library
    from sdbctl import models
    from sdbctl.engine import environment
    from sdbctl.timing import check_takes

    shape = (3, image_size, image_size)
    check_takes(models.build(student, classes, 3), shape)
    engine = pick(device, precision, models.build(arch, classes, 3), shape, batch_size, images=batch_size)
    timings = library.measure(arch, student, shape, classes, batch_size, engine, rounds)
    table = Table(title=f"{arch}, student {student}, {image_size}x{image_size}, batch {batch_size}, {engine.precision}")
    for name in ("step", "images/s", "ratio", "to"):
        table.add_column(name, justify="left" if name in ("step", "to") else "right")
    for item in timings:
        ratio = "" if item.ratio is None else f"{item.ratio:.2f}"
        table.add_row(item.name, f"{item.images_per_second:,.0f}", ratio, item.against)
    emit({"timings": [asdict(item) for item in timings], "environment": environment(engine)}, json_, table)
