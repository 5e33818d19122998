"""``sdbctl sweep``."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdbctl.cli import options as o
from sdbctl.cli.common import data_of, finite, only, open_surrogate, read_key
from sdbctl.cli.names import DEFAULT, NAMES, complete
from sdbctl.cli.output import emit, say
from sdbctl.errors import BadInput, UsageError, check_known

if TYPE_CHECKING:
    from sdbctl.boxstep import BoxConfig


def grid(given: list[str]) -> list[dict[str, str]]:
    """Turn ``NAME=A,B`` options into all combinations, in order."""
    axes: dict[str, list[str]] = {}
    for item in given:
        name, _, values = item.partition("=")
        found = [value.strip() for value in values.split(",") if value.strip()]
        try:
            [finite(value) for value in found]
        except ValueError:
            found = []
        if not found or not name.strip():
            raise UsageError(f"--set {item} is not NAME=NUMBER,NUMBER", "as in --objective conceal --set hide=2,8,32")
        axes[name.strip()] = found
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


@dataclass(frozen=True)
class Row:
    """One defence of a sweep.

    Attributes:
        name: What the tables call it, and its folder.
        objective: Of the box; None for a serving-time wrapper.
        preset: Of the objective.
        parameters: Of the objective.
        confidence: What the exported box serves; None for the usual.
        wrapper: Of the undefended model.
    """

    name: str
    objective: str | None = None
    preset: str | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)
    confidence: str | None = None
    wrapper: str | None = None

    @property
    def box(self) -> str:
        """What tells its weights apart."""
        return f"{self.objective}:{self.preset} {dict(self.parameters)}"

    @property
    def settings(self) -> list[str]:
        """Its parameters as ``--set`` takes them."""
        return [f"{key}={value}" for key, value in self.parameters.items()]

    def config(self) -> BoxConfig:
        """How it is boxed, but for what all rows share.

        Raises:
            UsageError: Its preset or a parameter is unknown.
        """
        from sdbctl.boxstep import BoxConfig
        from sdbctl.cli.box import parse_parameters

        return BoxConfig.of(str(self.objective), self.preset, parse_parameters(self.settings))

    @property
    def folder(self) -> str:
        """A name for its files."""
        return re.sub("[: /]", "-", self.name.replace(", ", "_"))


def rows_of(
    objectives: list[str], settings: list[str], wrappers: list[str], confidences: Sequence[str] = ()
) -> list[Row]:
    """Every objective with every combination of parameters and confidence, then the wrappers of the reference.

    Raises:
        UsageError: There is nothing to compare, or it is written wrongly.
    """
    combinations = grid(settings)
    chosen = [(name, preset or None) for name, _, preset in (item.partition(":") for item in objectives or [DEFAULT])]
    for name, _ in chosen:
        check_known("objective", name, NAMES["objectives"])
    rows = []
    for (name, preset), combination, confidence in itertools.product(chosen, combinations, confidences or [""]):
        parts = [f"{key}={value}" for key, value in combination.items()]
        parts.insert(0, name + (f":{preset}" if preset else ""))
        if confidence:
            parts.append(f"confidence {confidence}")
        rows.append(Row(", ".join(parts), name, preset, combination, confidence or None))
    rows += [Row(f"wrapper {name}", wrapper=name) for name in wrappers]
    twice = next((row.name for number, row in enumerate(rows) if row in rows[:number]), None)
    if twice is not None:
        raise UsageError(f"the setting {twice} is there twice", "leave one out")
    if len(rows) < 2:
        raise UsageError(
            "a sweep needs several settings",
            "give --set NAME=A,B, or --objective, --confidence or --wrapper repeatedly",
        )
    return rows


def sweep(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="The trained classifier.")],
    key_files: Annotated[list[Path], typer.Option("--key-file", metavar="FILE", help="Secret key made by keygen.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=A,B,C", help="Values of a parameter of the objective.")
    ] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            "--objective",
            metavar="NAME[:PRESET]",
            autocompletion=complete("objectives"),
            help="See sdbctl list objectives; may be repeated.",
        ),
    ] = None,
    wrapper: Annotated[
        list[str] | None,
        typer.Option(
            "--wrapper",
            metavar="NAME",
            autocompletion=complete("wrappers"),
            help="A serving-time defence as one more row; may be repeated.",
        ),
    ] = None,
    confidence: Annotated[
        list[str] | None,
        typer.Option(
            "--confidence",
            metavar="NAME",
            autocompletion=complete("confidences"),
            help="What public outputs of a box say, see export; may be repeated.",
        ),
    ] = None,
    data: o.Data = None,
    data_root: o.DataRoot = Path("data"),
    image_size: o.ImageSize = None,
    surrogate: o.Surrogate = None,
    owner_size: o.OwnerSize = None,
    transfer_size: o.TransferSize = None,
    test_size: o.TestSize = None,
    epochs: o.Epochs = None,
    batch_size: o.BatchSize = None,
    student: Annotated[
        str | None,
        typer.Option(
            "--student",
            autocompletion=complete("students"),
            help="See sdbctl list students. \\[default: wrn16, in quick resnet8]",
        ),
    ] = None,
    student_epochs: Annotated[
        int | None, typer.Option("--student-epochs", min=1, max=o.MOST_EPOCHS, help="Epochs of a student.")
    ] = None,
    student_batch_size: Annotated[
        int | None, typer.Option("--student-batch-size", min=2, max=o.MOST_IMAGES, help="Images per step of a student.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Students per reported row.")] = o.SEEDS,
    suite: Annotated[
        str, typer.Option("--suite", help="See sdbctl list suites.", autocompletion=complete("suites"))
    ] = "core",
    tune: Annotated[
        int | None, typer.Option("--tune", min=1, help="Configurations to try per row. \\[default: the suite's]")
    ] = None,
    device: o.Device = "auto",
    precision: o.PrecisionOption = "auto",
    report: Annotated[Path, typer.Option("--report", help="Folder of boxes and reports.")] = Path("sdbctl-sweep"),
    jobs: o.Jobs = 0,
    dry_run: o.DryRun = False,
    insecure_key_file: o.InsecureKey = False,
    trust: o.Trust = False,
    json_: o.Json = False,
) -> None:
    """Box with several settings or objectives, evaluate each box, and show protection over cost.

    Whatever is finished is kept in the report folder, so the same command goes on where it stopped. All rows share
    one reference, and the students that do not depend on the row.
    """
    key_file = only(key_files)
    assert key_file is not None
    if str(key_file) == "-":
        raise UsageError("a sweep reads the key more than once", "give --key-file FILE")
    rows = rows_of(objective or [], set_ or [], wrapper or [], confidence or [])
    from sdbctl import boxfile, files, models
    from sdbctl.cli import box, evaluate, export
    from sdbctl.report import Report, sweep
    from sdbctl.report.terminal import Fitting
    from sdbctl.sources import Opened
    from sdbctl.suites import suite as find_suite
    from sdbctl.updates import Recipe
    from sdbctl.wrappers import CONFIDENCES, check_exported

    chosen = find_suite(suite, foreign=surrogate is not None)
    # what is wrong with students shows before the first box is made
    models.build(student or chosen.student, 10)
    for row in rows:
        check_known("confidence", row.confidence, CONFIDENCES)
        check_exported(row.wrapper)
    configs = [row.config() for row in rows if row.objective is not None]
    original = boxfile.load(checkpoint, trust=trust)
    for config in configs:
        config.check_classes(original.classes)
    if any(row.confidence == "exact" and not row.config().trained for row in rows if row.objective):
        raise UsageError("what was not trained to hide shows classes only", "leave out --confidence exact")
    if surrogate is not None or not all(config.trained for config in configs):
        # what is wrong with it, or with images too small for a key, too
        dataset, splits = data_of(
            Opened.of(checkpoint, original), data, data_root, download=False, size=image_size, transfer=transfer_size
        )
        for config in configs:
            config.fitted(dataset.train.shape)
    if surrogate is not None:
        passes = student_epochs or chosen.epochs or Recipe().epochs
        open_surrogate(surrogate, data_root, dataset, splits.transfer, passes, download=False)
    run = {
        "checkpoint": original.sha256,
        "key": read_key(key_file, insecure_key_file).id,
        "data": data,
        "image_size": image_size,
        "splits": [owner_size, transfer_size, test_size],
        "training": [epochs, batch_size],
        "students": [student, student_epochs, student_batch_size, seeds, suite, tune, surrogate],
        "precision": precision,
    }
    shared = report / "reference.safetensors"
    common: dict[str, Any] = {
        "data": data,
        "data_root": data_root,
        "image_size": image_size,
        "transfer_size": transfer_size,
        "test_size": test_size,
        "device": device,
        "precision": precision,
        "trust": trust,
    }

    def make_box(row: Row, output: Path, dry_run: bool = False) -> None:
        trains = row.config().trained or not shared.exists()
        box.box(
            checkpoint,
            [key_file],
            owner_size=owner_size,
            reference=shared if shared.exists() else None,
            # what is sealed does not depend on how the rest is boxed; of a guarded box it answers keys
            seal=False if row.config().trained else None,
            objective=str(row.objective),
            preset=row.preset,
            set_=row.settings,
            epochs=epochs if trains else None,
            batch_size=batch_size if trains else None,
            dry_run=dry_run,
            json_=dry_run and json_,
            output=output,
            resume=True,
            insecure_key_file=insecure_key_file,
            **common,
        )

    if dry_run:
        say(f"{len(rows)} settings: {'; '.join(row.name for row in rows)}")
        # one that is trained takes longer than one that is not
        longest = max((row for row in rows if row.objective), key=lambda row: row.config().trained, default=None)
        if longest is not None:
            say("the reference is made once; each box, before its students are trained, takes about this:")
            with tempfile.TemporaryDirectory() as nowhere:
                make_box(longest, Path(nowhere) / "box.safetensors", dry_run=True)
        else:
            emit({"settings": [row.name for row in rows]}, json_)
        return
    if report.exists() and not report.is_dir():
        raise UsageError(f"--report {report} is a file", "name a folder")
    report.mkdir(parents=True, exist_ok=True)
    begun = report / "run.json"
    if begun.exists():
        try:
            old = dict(json.loads(files.text(begun, "record of the sweep")))
        except (ValueError, TypeError, RecursionError):
            raise BadInput(f"{begun} is damaged", "name another --report") from None
        other = [name for name in run if old.get(name) != run[name]]
        if other:
            raise UsageError(f"{report} holds a sweep with other {', '.join(other)}", "name another --report")
    files.write(begun, json.dumps(run, indent=2))
    reports: dict[str, Report] = {}
    alike: dict[str, Path] = {}
    for number, row in enumerate(rows, 1):
        say(f"setting {number} of {len(rows)}: {row.name}")
        folder = report / row.folder
        folder.mkdir(parents=True, exist_ok=True)
        boxed, done = folder / "box.safetensors", folder / "report" / "report.json"
        onnx = boxed.with_suffix(".onnx")
        own = boxed.with_suffix(".reference.safetensors")
        with contextlib.redirect_stdout(sys.stderr):
            if row.objective and boxed.exists():
                _check_box(row, boxed)
            elif row.objective:
                # rows that differ in what is served share a box
                if same := alike.get(row.box):
                    files.write(boxed, same.read_bytes(), private=boxfile.load_box(same).meta.private)
                else:
                    make_box(row, boxed)
            alike[row.box] = boxed
            if not shared.exists() and own.exists():
                files.write(shared, own.read_bytes(), private=True)
            if not onnx.exists():
                export.export(
                    boxed if row.objective else shared,
                    output=onnx,
                    confidence=_served_with(row, boxed),
                    wrapper=row.wrapper,
                    key_file=[key_file] if row.objective and not row.config().trained else None,
                    insecure_key_file=insecure_key_file,
                )
            if not done.exists():
                evaluate.evaluate(
                    onnx,
                    original=checkpoint,
                    reference=shared,
                    attack=True,
                    key_file=[key_file] if row.objective else None,
                    student=student,
                    seeds=seeds,
                    suite=suite,
                    tune=tune,
                    surrogate=surrogate,
                    report=done.parent,
                    cache=report / "students",
                    epochs=student_epochs,
                    batch_size=student_batch_size,
                    force=True,
                    jobs=jobs,
                    insecure_key_file=insecure_key_file,
                    **common,
                )
        reports[row.name] = Report.read(done)
    title = f"{checkpoint.stem}: {len(rows)} settings"
    text = sweep.to_json(title, reports)
    for suffix, content in (
        ("json", text),
        ("md", sweep.markdown(title, reports)),
        ("html", sweep.html(title, reports)),
    ):
        files.write(report / f"sweep.{suffix}", content)
    emit(json.loads(text), json_, Fitting(sweep.table(reports)))
    say(f"report: {report / 'sweep.html'} (sweep.json, sweep.md, sweep.html)")


def _served_with(row: Row, box: Path) -> str | None:
    """The confidence to export a row with: all, if its box turned out not to conceal, which is a finding."""
    from sdbctl.boxfile import load_box
    from sdbctl.wrappers import Concealed, served

    if row.objective is None or row.confidence == "exact":
        return row.confidence
    made = load_box(box)
    if isinstance(served(made.net, made.meta, row.confidence or "class"), Concealed):
        return row.confidence
    say(f"note: {row.name} conceals nothing: it is served with all that it shows")
    return "exact"


def _check_box(row: Row, path: Path) -> None:
    from sdbctl.boxfile import load_box

    meta, wanted = load_box(path).meta, asdict(row.config().resolved())
    if meta.objective != row.objective or any(meta.parameters.get(name) != wanted[name] for name in wanted):
        raise UsageError(f"{path} is a box with another objective or other parameters", "name another --report")
