"""``sdbctl eval`` and ``sdbctl report``."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdbctl.cli import options as o
from sdbctl.cli.common import (
    announce,
    box_fields,
    check_classes,
    open_data,
    open_model,
    open_surrogate,
    pick,
    preprocess_for,
    read_key,
    split_like,
)
from sdbctl.cli.names import complete
from sdbctl.cli.output import Live, duration, emit, say
from sdbctl.errors import BadInput, GateFailed, UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from sdbctl.boxfile import Loaded
    from sdbctl.cells import Source
    from sdbctl.cli.common import Opened
    from sdbctl.key import Key
    from sdbctl.report import Report
    from sdbctl.report.gates import Gate, GateResult
    from sdbctl.training import Engine

GPU_JOBS = 4
"""Students trained side by side on a GPU, unless told otherwise: 16 were no faster; see examples/bench/together.py."""
Gates = Annotated[Path | None, typer.Option("--gate", metavar="FILE", help="TOML rules; a broken one exits with 3.")]


def find_box() -> Path:
    """The only box in this folder, when none was named."""
    from sdbctl import boxfile

    found = []
    for path in sorted([*Path().glob("*.safetensors"), *Path().glob("*.onnx")]):
        try:
            meta = boxfile.read_metadata(path)
        except BadInput:
            continue
        if meta is not None and meta.kind == "box":
            found.append(path)
    stems = {path.stem for path in found}
    if len(stems) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UsageError(f"which box? in this folder: {names}", "name one: sdbctl eval BOX")
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
            help="See sdbctl list students. [default: wrn16, in quick resnet8]",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Students per reported row.")] = 5,
    suite: Annotated[
        str, typer.Option("--suite", help="See sdbctl list suites.", autocompletion=complete("suites"))
    ] = "standard",
    surrogate: o.Surrogate = None,
    tune: Annotated[
        int | None,
        typer.Option("--tune", min=1, help="Configurations to try per row; 1 tunes nothing. [default: the suite's]"),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option("--jobs", min=0, help="Students side by side; 0 means one per CPU core, at most 4 on a GPU."),
    ] = 0,
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="Train students as jobs of a submitit cluster: slurm, or local.")
    ] = None,
    gate: Gates = None,
    report: Annotated[Path, typer.Option("--report", help="Folder of the report.")] = Path("sdbctl-report"),
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help="Folder of finished students, which reports may share. [default: REPORT]"),
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
    key = read_key(key_file, insecure_key_file) if key_file else None

    import torch

    from sdbctl import evaluate, files
    from sdbctl.cells import Bench, EvalConfig, as_worker, cluster_library
    from sdbctl.curves import listening
    from sdbctl.distill import build_student
    from sdbctl.protocol import plan
    from sdbctl.report.render import FORMATS
    from sdbctl.suites import suite as find_suite
    from sdbctl.training import Recipe, image_seconds, pick_device, scaled

    chosen = find_suite(suite)
    student = student or chosen.student
    if cluster not in (None, "slurm", "local"):
        raise UsageError(f"unknown cluster {cluster}", "use slurm or local")
    if cluster and attack:
        cluster_library()
    for item in FORMATS.values():
        if (report / item.file).exists() and not force:
            raise UsageError(f"output {report / item.file} already exists", "use --force to replace it")
    cache = cache or report
    for folder in {report, cache}:
        if folder.is_file():
            raise UsageError(f"{folder} is a file, and a folder is needed", "name a folder")
    opened = open_model(box, device, arch=arch, trust=trust)
    meta = opened.meta
    notes: list[str] = []
    sources = gather(
        opened, key, original, reference, notes, pick_device(device), arch=arch, trust=trust, attack=attack
    )
    dataset = open_data(
        data,
        data_root,
        download=download,
        size=image_size,
        recorded=opened.recorded,
        classes=opened.classes,
        shape=opened.shape,
    )
    dataset = check_classes(dataset, opened.classes, meta, box.name)
    size = dataset.train.shape
    splits = split_like(dataset, meta.data if meta else None, transfer=transfer_size, test=test_size)
    if meta is not None and meta.data.get("fingerprint") not in (None, dataset.fingerprint):
        notes.append("This is not the data that the file was made with: splits may overlap.")
    if jobs == 0:
        jobs = torch.get_num_threads()
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
    engine = pick(device, precision, net, size, config.recipe.batch_size, kept=kept)
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
        cpu = engine.device.type == "cpu"
        with as_worker(jobs if cpu and not cluster else 1):
            one = image_seconds(net, config.recipe.batch_size, size, engine)
            told = answer_seconds(bench.sources["boxed"], size, engine, bench.classes)
            weights = bench.sources["boxed"].weights
            own = 0.0
            if weights is not None and planned.tuned:
                own = image_seconds(copy.deepcopy(weights), min(64, len(transfer)), size, engine)
        images = len(transfer) * config.recipe.epochs
        say(
            f"suite {suite}: {planned.students:,} students, at most {planned.runs:,.0f} whole trainings "
            f"({len(transfer):,} images × {config.recipe.epochs} epochs each), {jobs} side by side"
        )
        # who holds the file trains it, or asks it several times
        work = planned.runs * one + (planned.teachers + 4 * planned.held) * told
        # each is looked at, too, which takes a third of a step
        seen = planned.students * len(validation) + planned.reported * len(test)
        # processes that share a GPU are hardly faster together
        at_once = jobs if cluster else min(jobs, torch.get_num_threads()) if cpu else max(1, min(jobs, 2) * 0.8)
        seconds = (work * images + seen * one / 3 + planned.tuned * own) / at_once
        announce({"students": seconds}, dry_run=dry_run)
        for folder in (cells, cache / "answers"):
            folder.mkdir(parents=True, exist_ok=True)
        # measured again, it might be another, and all students would be trained again
        files.write(remembered, engine.precision)
    elif dry_run:
        announce({}, dry_run=True)
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


def answer_seconds(source: Source, shape: tuple[int, int, int], engine: Engine, classes: int) -> float:
    """Seconds of a teacher's answer to one image [C, H, W]: the last of some batches."""
    import torch

    from sdbctl.bench import in_turn
    from sdbctl.training import unseen_batch

    teacher, x = source.open(engine.device, classes), torch.zeros(unseen_batch(shape), *shape, device=engine.device)
    return in_turn({"answer": lambda: teacher.logits(x)}, 1, engine.device)["answer"][-1] / len(x)


def stand_in(opened: Opened, held: Loaded, device: torch.device, notes: list[str]) -> nn.Module | None:
    """The network in an ONNX file, as the file serves it, if ONNX Runtime cannot use the device.

    It is taken only if it computes what the file does, with and without what hides it, on random images.
    """
    import torch

    from sdbctl import boxfile, onnxfile
    from sdbctl.wrappers import as_exported

    served, meta = opened.served, opened.meta
    if served is None or meta is None or served.device.type == device.type:
        return None
    net = as_exported(held.net, meta, boxfile.serves(opened.path))
    x = meta.preprocess(torch.rand(16, *meta.preprocess.size, generator=torch.Generator().manual_seed(0)))
    difference = math.inf
    # weights of another shape cannot even be asked
    with contextlib.suppress(RuntimeError, ValueError):
        if net is not None:
            difference = onnxfile.parity(onnxfile.read(opened.path), net.eval(), x)
    if not difference <= onnxfile.PARITY_TOLERANCE:
        notes.append("ONNX Runtime cannot use CUDA here: the file was asked on the CPU.")
        return None
    notes.append("ONNX Runtime cannot use CUDA here: torch computed what the file does, as checked on random images.")
    return net


def rebuilt(opened: Opened) -> nn.Module:
    """The network in an ONNX file, as somebody who has nothing else makes it out of the graph.

    Raises:
        UsageError: That is not possible, or the two predict other classes for random images.
    """
    import torch

    from sdbctl import onnxfile
    from sdbctl.models.graph import Graph

    assert opened.served is not None
    x = torch.rand(16, *opened.served.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    x = opened.meta.preprocess(x + 0.5) if opened.meta else x
    try:
        net = Graph(onnxfile.read(opened.path), opened.classes).eval()
        with torch.no_grad():
            same = torch.equal(net(x).argmax(1), opened.served.logits(x).argmax(1))
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, StopIteration):
        raise UsageError("the ONNX graph cannot be rebuilt in torch") from None
    if not same:
        raise UsageError("what was rebuilt of the ONNX graph predicts something else")
    return net


def gather(
    opened: Opened,
    key: Key | None,
    original: Path | None,
    reference: Path | None,
    notes: list[str],
    device: torch.device,
    *,
    arch: str | None = None,
    trust: bool = False,
    attack: bool = True,
) -> dict[str, Source]:
    """The teachers of an evaluation: the box without, with and with wrong keys, the original, trivial defences.

    What is missing and matters is added to ``notes``.
    """
    from dataclasses import replace

    import torch

    from sdbctl import boxfile, files
    from sdbctl.boxfile import check_key, pattern
    from sdbctl.cells import Source
    from sdbctl.key import near, wrong
    from sdbctl.suites import ASSISTANTS, NEAR_PERCENT
    from sdbctl.wrappers import WRAPPERS

    box, meta = opened.path, opened.meta
    boxed = Source(sha256=boxfile.identity(box))
    if opened.loaded is not None:
        boxed = replace(boxed, net=opened.loaded.net)
        if meta is not None and "flat_spread" in meta.measured:
            notes.append("The bare weights were asked; the exported graph shows less: evaluate the ONNX file for that.")
    else:
        beside, boxed = box.with_suffix(".safetensors"), replace(boxed, onnx=box)
        held, why = None, "is not there"
        if beside.exists():
            why = "is not what was exported"
            with contextlib.suppress(BadInput):
                held = boxfile.load(beside)
        unboxed = meta is None or meta.kind != "box"
        if held is not None and (held.meta == meta or (unboxed and held.meta is None)):
            boxed = replace(
                boxed, held=held.net, held_sha256=held.sha256, stand_in=stand_in(opened, held, device, notes)
            )
        elif attack:
            try:
                boxed = replace(boxed, held=rebuilt(opened), held_sha256=f"{boxed.sha256} graph")
                notes.append(
                    f"Attacks on the file train what the ONNX graph holds, since {beside.name} {why}: BatchNorm may be "
                    "folded into its convolutions."
                )
            except UsageError as error:
                notes.append(f"Attacks on the file were left out: {error.message}, and {beside.name} {why}.")
    sources = {"boxed": boxed}
    if key is not None:
        if meta is None or meta.kind != "box":
            raise BadInput(f"{box} is no box of sdbctl", "leave --key-file out, or make one with: sdbctl box")
        check_key(meta, key)
        sources["keyed"] = boxed.keyed(pattern(meta, key), meta.strength, key.id)
        generator, secret = torch.Generator().manual_seed(1), key.pattern(meta.preprocess.size)
        patterns = {"wrong": wrong(secret, generator)}
        patterns |= {f"near_{percent}": near(secret, percent / 100, generator) for percent in NEAR_PERCENT}
        for name, other in patterns.items():
            sources[name] = boxed.keyed(meta.preprocess(other), meta.strength, f"{name} {key.id}")
        if opened.sealed or meta.parameters.get("sealed"):
            try:
                helpers = boxfile.unsealed(opened.sealed, key, meta, box.name)
                sources |= {
                    name: Source(net=helper.net, sha256=helper.sha256)
                    for name, helper in zip(ASSISTANTS, helpers, strict=False)
                }
            except BadInput as error:
                notes.append(f"Students of an assistant were left out: {error.message}.")
    if original is not None:
        same = meta.architecture if meta is not None and meta.kind == "box" else None
        loaded = boxfile.load(original, arch=arch or same, trust=trust)
        check_alike(opened, loaded, original)
        if meta is not None and meta.original_sha256 and loaded.sha256 != meta.original_sha256:
            raise BadInput(f"{original} is not the checkpoint that was boxed", "its hash is another")
        sources["original"] = Source(net=loaded.net, sha256=loaded.sha256)
    if reference is None and meta is not None and meta.kind == "box":
        beside = box.with_suffix(".reference.safetensors")
        if beside.exists() and files.sha256(files.read(beside, "reference")) == meta.reference_sha256:
            reference = beside
        elif beside.exists():
            notes.append(f"{beside.name} is the reference of another box, and was left out.")
    if reference is not None:
        loaded = boxfile.load(reference)
        check_alike(opened, loaded, reference)
        if meta is not None and meta.reference_sha256 and loaded.sha256 != meta.reference_sha256:
            raise BadInput(f"{reference} is not the reference of this box", "its hash is another")
        sources["reference"] = Source(net=loaded.net, sha256=loaded.sha256)
    elif meta is not None:
        notes.append("Without the reference N_ft, costs are measured against the original as it was.")
    undefended = sources.get("reference") or sources.get("original")
    if undefended is not None:
        sources |= {name: undefended.wrapped(name) for name in WRAPPERS}
    return sources


def check_alike(opened: Opened, loaded: Loaded, path: Path) -> None:
    """Refuse a network that cannot be compared with the one that is evaluated.

    Raises:
        BadInput: It has other classes or channels.
    """
    if loaded.classes != opened.classes:
        raise BadInput(
            f"{path} has {loaded.classes} classes, {opened.path.name} has {opened.classes}", "name what was boxed"
        )
    channels = opened.loaded.channels if opened.loaded else opened.shape[0] if opened.shape else loaded.channels
    if loaded.channels != channels:
        raise BadInput(
            f"{path} takes {loaded.channels} channels, {opened.path.name} takes {channels}", "name what was boxed"
        )


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

    gates = known_gates(gate)
    made = Report.read(path)
    if baseline is not None:
        if folder is not None:
            raise UsageError("--baseline compares and writes nothing", "leave out --report or --baseline")
        old = Report.read(baseline)
        before, now = old.means(), made.means()
        changes = {name: {"before": before.get(name), "now": now.get(name)} for name in {**now, **before}}
        results = check(made, gates)
        emit(changes | judged(results), json_, comparison(made, old), *gate_table(results))
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
    from sdbctl.suites import BY_NAME

    gates = load_gates(path) if path else []
    check_names(gates, (*BY_NAME, "control", "control_unlabelled"))
    return gates


def judged(results: list[GateResult]) -> dict[str, object]:
    """What ``--json`` says of gates, if there are any; the report itself does not know them."""
    return {"gates": [asdict(result) for result in results]} if results else {}


def enforce(results: list[GateResult]) -> None:
    """Leave with exit code 3 if a gate is broken."""
    broken = [f"{result.rule} ({result.reason})" for result in results if not result.passed]
    if broken:
        raise GateFailed(f"gate broken: {'; '.join(broken)}", "see the report")
