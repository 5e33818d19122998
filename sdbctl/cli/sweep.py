"""``sdbctl sweep``."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from sdbctl.cli import options as o
from sdbctl.cli.output import emit, say
from sdbctl.errors import UsageError


def grid(given: list[str]) -> list[dict[str, str]]:
    """Turn ``NAME=A,B`` options into all combinations, in order."""
    axes: dict[str, list[str]] = {}
    for item in given:
        name, _, values = item.partition("=")
        found = [value.strip() for value in values.split(",") if value.strip()]
        try:
            [float(value) for value in found]
        except ValueError:
            found = []
        if not found or not name.strip():
            raise UsageError(f"--set {item} is not NAME=NUMBER,NUMBER", "for example --set hide=2,8,32")
        axes[name.strip()] = found
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def sweep(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="The trained classifier.")],
    key_file: Annotated[Path, typer.Option("--key-file", metavar="FILE", help="Secret key made by keygen.")],
    set_: Annotated[
        list[str], typer.Option("--set", metavar="NAME=A,B,C", help="Values of a parameter of the objective.")
    ],
    objective: Annotated[str, typer.Option("--objective", help="See sdbctl list objectives.")] = "conceal",
    data: o.Data = None,
    data_root: o.DataRoot = Path("data"),
    owner_size: o.OwnerSize = None,
    transfer_size: o.TransferSize = None,
    test_size: o.TestSize = None,
    epochs: o.Epochs = None,
    batch_size: o.BatchSize = None,
    student: Annotated[str, typer.Option("--student", help="See sdbctl list students.")] = "wrn16",
    student_epochs: Annotated[int | None, typer.Option("--student-epochs", min=1, help="Epochs of a student.")] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Students per reported row.")] = 5,
    suite: Annotated[str, typer.Option("--suite", help="See sdbctl list suites.")] = "core",
    tune: Annotated[int, typer.Option("--tune", min=1, help="Configurations to try per row.")] = 6,
    device: o.Device = "auto",
    precision: o.PrecisionOption = "auto",
    report: Annotated[Path, typer.Option("--report", help="Folder of boxes and reports.")] = Path("sdbctl-sweep"),
    trust: o.Trust = False,
    json_: o.Json = False,
) -> None:
    """Box with several settings, evaluate each box, and show protection over cost.

    Whatever is finished is kept in the report folder, so the same command goes on where it stopped. All settings
    share one reference.
    """
    if str(key_file) == "-":
        raise UsageError("a sweep reads the key more than once", "give --key-file FILE")
    settings = grid(set_)
    from sdbctl import files
    from sdbctl.cli import box, evaluate, export
    from sdbctl.report import Report, sweep
    from sdbctl.report.terminal import rich_table

    shared = report / "reference.safetensors"
    reports: dict[str, Report] = {}
    for number, setting in enumerate(settings, 1):
        name = ", ".join(f"{key}={value}" for key, value in setting.items())
        say(f"setting {number} of {len(settings)}: {name}")
        folder = report / name.replace(", ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        boxed, done = folder / "box.safetensors", folder / "report" / "report.json"
        onnx = boxed.with_suffix(".onnx")
        own = boxed.with_suffix(".reference.safetensors")
        with contextlib.redirect_stdout(sys.stderr):
            if not boxed.exists():
                if shared.exists() and not own.exists():
                    files.write(own, shared.read_bytes())
                box.box(
                    checkpoint,
                    key_file,
                    data=data,
                    data_root=data_root,
                    owner_size=owner_size,
                    transfer_size=transfer_size,
                    test_size=test_size,
                    objective=objective,
                    set_=[f"{key}={value}" for key, value in setting.items()],
                    epochs=epochs,
                    batch_size=batch_size,
                    device=device,
                    precision=precision,
                    output=boxed,
                    resume=True,
                    trust=trust,
                )
            if not shared.exists():
                files.write(shared, own.read_bytes())
            if not onnx.exists():
                export.export(boxed, output=onnx)
            if not done.exists():
                evaluate.evaluate(
                    onnx,
                    original=checkpoint,
                    attack=True,
                    key_file=key_file,
                    student=student,
                    seeds=seeds,
                    suite=suite,
                    tune=tune,
                    report=done.parent,
                    data=data,
                    data_root=data_root,
                    epochs=student_epochs,
                    device=device,
                    precision=precision,
                    force=True,
                    trust=trust,
                )
        reports[name] = Report.read(done)
    title = f"{checkpoint.stem}: {objective}, {len(settings)} settings"
    text = sweep.to_json(title, reports)
    for suffix, content in (
        ("json", text),
        ("md", sweep.markdown(title, reports)),
        ("html", sweep.html(title, reports)),
    ):
        files.write(report / f"sweep.{suffix}", content)
    emit(json.loads(text), json_, rich_table(sweep.table(reports)))
    say(f"report: {report / 'sweep.html'} (sweep.json, sweep.md, sweep.html)")
