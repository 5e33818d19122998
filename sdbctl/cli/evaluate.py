"""``sdbctl eval`` and ``sdbctl report``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdbctl.cli import options as o
from sdbctl.cli.common import (
    announce,
    box_fields,
    data_of,
    of_other_data,
    only,
    open_surrogate,
    pick,
    preprocess_for,
    read_key,
)
from sdbctl.cli.names import complete
from sdbctl.cli.output import Live, duration, emit, say
from sdbctl.errors import BadInput, GateFailed, UsageError

if TYPE_CHECKING:
    from sdbctl.report import Report
    from sdbctl.report.gates import Gate, GateResult

GPU_JOBS = 4
"""Students trained side by side on a GPU, unless told otherwise: 16 were no faster; see examples/bench/together.py."""
Gates = Annotated[Path | None, typer.Option("--gate", metavar="FILE", help="TOML rules; a broken one exits with 3.")]


def find_box() -> Path:
    """The only box in this folder that can be asked without a key, when none was named."""
    from sdbctl import boxfile

    found: list[Path] = []
    bare: list[Path] = []
    for path in sorted([*Path().glob("*.safetensors"), *Path().glob("*.onnx")]):
        try:
            meta = boxfile.read_metadata(path)
        except BadInput:
            continue
        if meta is not None and meta.kind == "box":
            (bare if meta.guarded and path.suffix != ".onnx" else found).append(path)
    stems = {path.stem for path in found}
    if len(stems) != 1:
        names = ", ".join(path.name for path in found) or "none"
        hint = f"sdbctl export {bare[0]} --key-file FILE first" if bare and not found else "name one: sdbctl eval BOX"
        raise UsageError(f"which box? in this folder: {names}", hint)
    return found[0]


def evaluate(
    box: Annotated[Path | None, typer.Argument(metavar="BOX", help="Default: the only box in this folder.")] = None,
    original: Annotated[Path | None, typer.Option("--original", help="The checkpoint that was boxed.")] = None,
    reference: Annotated[Path | None, typer.Option("--reference", help="N_ft, which box wrote beside the box.")] = None,
    attack: Annotated[bool, typer.Option("--attack", help="Train students: attackers, controls, key holders.")] = False,
    key_file: o.KeyFile = None,
    student: Annotated[
        str | None,
        typer.Option(
            "--student",
            autocompletion=complete("students"),
            help="See sdbctl list students. \\[default: wrn16, in quick resnet8]",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Students per reported row.")] = o.SEEDS,
    suite: Annotated[
        str, typer.Option("--suite", help="See sdbctl list suites.", autocompletion=complete("suites"))
    ] = "standard",
    surrogate: o.Surrogate = None,
    tune: Annotated[
        int | None,
        typer.Option("--tune", min=1, help="Configurations to try per row; 1 tunes nothing. \\[default: the suite's]"),
    ] = None,
    jobs: o.Jobs = 0,
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="Train students as jobs of a submitit cluster: slurm, or local.")
    ] = None,
    gate: Gates = None,
    report: Annotated[Path, typer.Option("--report", help="Folder of the report.")] = Path("sdbctl-report"),
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help="Folder of finished students, which reports may share. \\[default: REPORT]"),
    ] = None,
    data: o.Data = None,
    data_root: o.DataRoot = Path("data"),
    download: o.Download = False,
    image_size: o.ImageSize = None,
    transfer_size: o.TransferSize = None,
    test_size: o.TestSize = None,
    arch: o.Arch = None,
    normalize: o.Normalize = None,
    epochs: o.Epochs = None,
    batch_size: o.BatchSize = None,
    lr: o.LearningRate = None,
    device: o.Device = "auto",
    precision: o.PrecisionOption = "auto",
    dry_run: o.DryRun = False,
    force: o.Force = False,
    insecure_key_file: o.InsecureKey = False,
    trust: o.Trust = False,
    json_: o.Json = False,
) -> None:
    """Measure a box, or any other model: what users lose, what attackers gain, what key holders gain.

    Finished students are kept, so an interrupted run goes on where it stopped.
    """
    gates = known_gates(gate)
    box = box or find_box()
    key = read_key(path, insecure_key_file) if (path := only(key_file)) else None

    from sdbctl import evaluate, files, onnxfile
    from sdbctl.attacks import ATTACKS
    from sdbctl.bench import evaluation_seconds
    from sdbctl.cells import Bench, EvalConfig
    from sdbctl.curves import listening
    from sdbctl.data.images import cores
    from sdbctl.distill import build_student
    from sdbctl.engine import pick_device
    from sdbctl.protocol import plan
    from sdbctl.report.render import FORMATS
    from sdbctl.sources import gather, open_model
    from sdbctl.suites import suite as find_suite
    from sdbctl.updates import Recipe, scaled
    from sdbctl.workers import cluster_library

    chosen = find_suite(suite, foreign=surrogate is not None)
    student = student or chosen.student
    if cluster not in (None, "slurm", "local"):
        raise UsageError(f"unknown cluster {cluster}", "use slurm or local")
    if cluster and attack:
        cluster_library()
    for name in FORMATS:
        if (report / name).exists() and not (force or dry_run):
            raise UsageError(f"output {report / name} already exists", "use --force to replace it")
    if not attack:
        say("note: without --attack no student is trained")
    elif chosen.seeds is not None and seeds not in (o.SEEDS, chosen.seeds):
        say(f"note: suite {suite} trains {chosen.seeds} student(s) of each row, whatever --seeds says")
    if surrogate is not None and not any(ATTACKS[row.attack].surrogate for row in chosen.rows):
        say(f"note: nobody in suite {suite} asks about the images of --surrogate")
    cache = cache or report
    for folder in {report, cache}:
        if folder.is_file():
            raise UsageError(f"{folder} is a file, and a folder is needed", "name a folder")
    # of an ONNX file, what it was made of has one
    opened = open_model(box, device, arch=None if onnxfile.is_onnx(box) else arch, trust=trust)
    meta = opened.meta
    notes: list[str] = []
    sources = gather(
        opened, key, original, reference, notes, pick_device(device), arch=arch, trust=trust, attack=attack
    )
    if meta is not None and meta.kind == "box" and "original" in sources and "reference" not in sources:
        say("note: no reference is beside the box (--reference): costs are against the original as it was")
    dataset, splits = data_of(
        opened, data, data_root, download=download, size=image_size, transfer=transfer_size, test=test_size
    )
    size = dataset.train.shape
    if meta is not None and of_other_data(meta.data, dataset):
        notes.append("This is not the data that the file was made with: splits may overlap.")
    if jobs == 0:
        jobs = cores()
        # on a cluster each has a GPU of its own
        jobs = jobs if pick_device(device).type == "cpu" else 1 if cluster else min(jobs, GPU_JOBS)
    # attackers hold their images and no others, and processes get no more than they need
    transfer, validation, test = (
        part.alone() if part is splits.transfer or part.in_memory else part
        for part in (splits.transfer, splits.validation, splits.test)
    )
    recipe = scaled(Recipe(), epochs=epochs or chosen.epochs, batch_size=batch_size, lr=lr)
    foreign = None
    if surrogate is not None:
        foreign = open_surrogate(surrogate, data_root, dataset, splits.transfer, recipe.epochs, download=download)
    config = EvalConfig(
        student=student,
        recipe=recipe,
        seeds=seeds,
        tune=tune,
        jobs=jobs,
        cluster=cluster,
        suite=suite if attack else None,
    )
    net = build_student(student, len(dataset.classes), size[0], 0)
    # what an evaluation goes on with must not depend on what else the machine does
    remembered = cache / f"precision-{pick_device(device).type}-{student}"
    kept = remembered.read_text(errors="replace") if attack and remembered.exists() else None
    kept = kept if kept in ("fp32", "bf16") else None
    engine = pick(device, precision, net, size, config.recipe.batch_size, images=len(transfer), kept=kept)
    preprocess = preprocess_for(opened, normalize, splits.validation, engine, size)
    bench = Bench(
        sources,
        transfer,
        validation,
        test,
        preprocess,
        config,
        engine,
        len(dataset.classes),
        dataset.fingerprint,
        answers=cache / "answers" if attack else None,
        surrogate=foreign,
        strength=meta.strength if meta else 0.0,
    )
    cells = cache / "cells"
    if attack:
        if any(row.name == "overheard_key" for row in chosen.rows):
            bench = listening(bench)
        if not any(row.role == "attack" for row in bench.rows()):
            beside = box.with_suffix(".safetensors").name
            raise UsageError(
                f"suite {suite} attacks the weights, and {box.name} has none beside it",
                f"put the {beside} that it was exported from into its folder",
            )
        planned = plan(bench)
        seconds = evaluation_seconds(bench, planned)
        say(
            f"suite {suite}: {planned.students:,} students, at most {planned.runs:,.0f} whole trainings "
            f"({len(transfer):,} images × {config.recipe.epochs} epochs each), {jobs} side by side"
        )
        announce(
            {"students": seconds},
            dry_run=dry_run,
            as_json=json_,
            students=planned.students,
            whole_trainings=planned.runs,
            jobs=jobs,
        )
        for folder in (cells, cache / "answers"):
            folder.mkdir(parents=True, exist_ok=True)
        # measured again, it might be another, and all students would be trained again
        files.write(remembered, engine.precision)
    elif dry_run:
        announce({}, dry_run=True, as_json=json_)
    with Live() as progress:
        made = evaluate.evaluate(
            bench,
            title=f"{box.stem}: {meta.architecture if meta else 'undefended model'} on {dataset.name}",
            box=box_fields(meta) if meta else {},
            folder=cells if attack else None,
            progress=progress,
            notes=notes,
        )
    finish(made, report, gates, force, json_)


def finish(made: Report, folder: Path, gates: list[Gate], force: bool, as_json: bool, *, measured: bool = True) -> None:
    """Write a report, print it, and hold it against its gates; say how long it took if it was just measured."""
    from sdbctl.report.gates import check
    from sdbctl.report.render import write
    from sdbctl.report.terminal import tables

    try:
        results: list[GateResult] = check(made, gates)
    except UsageError:
        write(made, folder, force=force)
        raise
    paths = write(made, folder, force=force, gates=results)
    emit(json.loads(made.to_json()) | judged(results), as_json, *tables(made, results))
    html = next(path for path in paths if path.suffix == ".html")
    say(f"report: {html} ({', '.join(path.name for path in paths)})")
    seconds = made.cost.get("seconds")
    if measured and isinstance(seconds, float):
        say(f"took {duration(seconds)}")
    enforce(results)


def rerender(
    path: Annotated[Path, typer.Argument(metavar="REPORT.JSON", help="A report that eval or demo wrote.")],
    gate: Gates = None,
    folder: Annotated[
        Path | None, typer.Option("--report", help="Write it again, in every format, into this folder.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", metavar="REPORT.JSON", help="Show what changed since this one.")
    ] = None,
    force: o.Force = False,
    json_: o.Json = False,
) -> None:
    """Print a report, render it again, compare it, or hold it against gates."""
    from sdbctl.report import Report
    from sdbctl.report.gates import check
    from sdbctl.report.terminal import comparison, gate_table, tables
    from sdbctl.report.view import made_otherwise

    gates = known_gates(gate)
    made = Report.read(path)
    if baseline is not None:
        if folder is not None:
            raise UsageError("--baseline compares and writes nothing", "leave out --report or --baseline")
        old = Report.read(baseline)
        before, now = old.means(), made.means()
        changes = {name: {"before": before.get(name), "now": now.get(name)} for name in {**now, **before}}
        results = check(made, gates)
        told = {"made_otherwise": made_otherwise(made, old), **changes, **judged(results)}
        emit(told, json_, comparison(made, old), *gate_table(results))
        enforce(results)
        return
    if folder is not None:
        finish(made, folder, gates, force, json_, measured=False)
        return
    results = check(made, gates)
    emit(json.loads(made.to_json()) | judged(results), json_, *tables(made, results))
    enforce(results)


def known_gates(path: Path | None) -> list[Gate]:
    """The rules of a gate file, whose names are looked at before hours of work."""
    from sdbctl.report.gates import check_names, load_gates
    from sdbctl.suites import REPORTED

    gates = load_gates(path) if path else []
    check_names(gates, REPORTED)
    return gates


def judged(results: list[GateResult]) -> dict[str, object]:
    """What ``--json`` says of gates, if there are any; the report itself does not know them."""
    return {"gates": [asdict(result) for result in results]} if results else {}


def enforce(results: list[GateResult]) -> None:
    """Leave with exit code 3 if a gate is broken."""
    broken = [f"{result.rule} ({result.reason})" for result in results if not result.passed]
    if broken:
        raise GateFailed(f"gate broken: {'; '.join(broken)}", "see the report")
