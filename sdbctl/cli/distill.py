"""``sdbctl distill`` and ``sdbctl train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sdbctl.cli import options as o
from sdbctl.cli.common import (
    announce,
    arch_of,
    begin,
    data_of,
    of_other_data,
    only,
    open_data,
    open_surrogate,
    pick,
    preprocess_for,
    preset,
    read_key,
    recipe_of,
    split_like,
    together,
)
from sdbctl.cli.names import complete
from sdbctl.cli.output import Live, emit, pairs, say, warned
from sdbctl.errors import BadInput, UsageError, check_known

FEW = 10_000
"""Images of a transfer set up to which the key opens what is sealed, unless the user says otherwise."""


def distill(
    teacher: Annotated[Path, typer.Argument(metavar="TEACHER", help="A box, checkpoint or ONNX file.")],
    student: Annotated[
        str, typer.Option("--student", help="See sdbctl list students.", autocompletion=complete("students"))
    ] = "wrn16",
    key_file: o.KeyFile = None,
    data: o.Data = None,
    data_root: o.DataRoot = Path("data"),
    download: o.Download = False,
    image_size: o.ImageSize = None,
    transfer_size: o.TransferSize = None,
    test_size: o.TestSize = None,
    arch: o.Arch = None,
    normalize: o.Normalize = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            autocompletion=complete("methods"),
            help="Loss: kd, dkd or dist, which often teaches more.",
            metavar="NAME",
        ),
    ] = "kd",
    temperature: Annotated[float, typer.Option("--temperature", help="τ of the soft labels.")] = 4.0,
    alpha: Annotated[
        float | None, typer.Option("--alpha", min=0, max=1, help="Weight of the soft labels of kd. \\[default: 0.9]")
    ] = None,
    labels: Annotated[bool, typer.Option("--labels/--no-labels", help="Whether the student has labels.")] = True,
    surrogate: o.Surrogate = None,
    sealed: Annotated[
        bool | None,
        typer.Option(
            "--sealed/--no-sealed",
            help="Whether the key opens what is sealed in the file, or is mixed into each image, as an API is asked. "
            "\\[default: what is sealed, if anything is, for up to 10,000 images]",
        ),
    ] = None,
    door: Annotated[
        int | None,
        typer.Option(
            "--door",
            metavar="N",
            min=1,
            help="Which of the key's patterns to ask with, if the file looks for several: inspect says what each "
            "opens. \\[default: the one that teaches this student most]",
        ),
    ] = None,
    epochs: o.Epochs = None,
    batch_size: o.BatchSize = None,
    lr: o.LearningRate = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    precision: o.PrecisionOption = "auto",
    devices: o.Devices = 1,
    nodes: o.Nodes = 1,
    strategy: o.Strategy = "auto",
    profile: o.Profile = None,
    dry_run: o.DryRun = False,
    output: o.Output = None,
    resume: o.Resume = False,
    force: o.Force = False,
    insecure_key_file: o.InsecureKey = False,
    trust: o.Trust = False,
    json_: o.Json = False,
) -> None:
    """Train a student from a teacher: with the key as its holders do, without it as an attacker does."""
    output = output or Path(f"{teacher.stem}.{student}{'.keyed' if key_file else ''}.safetensors")
    if output.suffix != ".safetensors":
        raise UsageError(f"output {output} is not named .safetensors", "students are written as safetensors")
    if not 0 < temperature < 1e4:
        raise UsageError(f"temperature is {temperature:g}", "use a number above 0, such as 4")
    processes = together(devices, nodes)
    # a student of two data sets is trained in two runs
    states = [output.with_name(f".{output.stem}{part}.resume") for part in ("", ".second")]
    begin(
        output,
        states,
        [profile],
        resume=resume,
        force=force or dry_run,
        kept=[teacher, *(key_file or [])],
    )
    key = read_key(path, insecure_key_file, processes) if (path := only(key_file)) else None
    if sealed and key is None:
        raise UsageError("only a key opens what is sealed", "give --key-file, or leave out --sealed")
    if door is not None and (key is None or sealed):
        raise UsageError("--door is about what a key opens through the API", "give --key-file, and no --sealed")

    from dataclasses import replace

    from sdbctl import boxfile, metrics, team
    from sdbctl.attacks import ATTACKS
    from sdbctl.attacks.queries import PRETRAINED
    from sdbctl.attacks.soft import METHODS, chosen
    from sdbctl.boxfile import Loaded, check_key, pattern
    from sdbctl.boxing import TRIED_IMAGES
    from sdbctl.boxstep import Task
    from sdbctl.distill import build_student
    from sdbctl.distill import distill as train_student
    from sdbctl.gate import best_door
    from sdbctl.gate import opened as opened_by
    from sdbctl.inference import accuracy
    from sdbctl.sources import open_model
    from sdbctl.state import Resume, recorded_precision
    from sdbctl.teacher import KeyedTeacher, OnnxTeacher, Teacher, TorchTeacher
    from sdbctl.timing import image_seconds
    from sdbctl.updates import Recipe

    check_known("method", method, METHODS)
    opened = open_model(teacher, device, arch=arch_of(teacher, arch), trust=trust)
    meta, classes, loaded = opened.meta, opened.classes, opened.loaded
    helper, helpers, shown = None, list[Loaded](), "public outputs"
    open_to = opened.doors
    opened.check_guard(keyed=key is not None)
    if door is not None and opened.bare:
        raise UsageError(f"{teacher} looks for no pattern", "give the graph that export --key-file makes of it")
    if key is not None:
        if meta is None:
            raise BadInput(f"{teacher} has no sdbctl metadata, so it is no box", "leave --key-file out")
        check_key(meta, key)
        shown = "keyed outputs"
        if door is not None and door > max(1, len(open_to)):
            raise UsageError(f"there is no pattern {door} of the key", f"this file has {max(1, len(open_to))}")
        if sealed or (sealed is None and door is None and (opened.sealed or meta.parameters.get("sealed"))):
            try:
                helpers = boxfile.unsealed(opened.sealed, key, meta, teacher.name)
            except BadInput as error:
                hint = "--no-sealed asks with the key in each image"
                again = "box again with --seal" if not opened.sealed and sealed else "get the file again"
                raise BadInput(error.message, f"{again}; {hint}") from None
    dataset, splits = data_of(
        opened, data, data_root, download=download, size=image_size, transfer=transfer_size, test=test_size
    )
    recorded = meta.data if meta else {}
    own = "transfer" not in recorded or of_other_data(recorded, dataset)
    if own and transfer_size is None:
        # a split has no empty part, and the owner's is of no use here
        most = len(splits.transfer) + len(splits.owner) - 1
        say(
            f"note: the student learns from {len(splits.transfer):,} of the images; --transfer-size may be up to {most}"
        )
    # foreign images are many, too
    late = len(splits.transfer) > TRIED_IMAGES or surrogate is not None
    if helpers and sealed is None and len(splits.transfer) > FEW:
        say(f"note: of more than {FEW:,} images students were not seen to learn more from what is sealed (--sealed)")
    elif helpers:
        helper = helpers[-1 if late else 0]
        shown = f"{helper.architecture} number {helpers.index(helper) + 1} of {len(helpers)} that were sealed in it"
    size = dataset.train.shape
    recipe = recipe_of(Recipe(), processes, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed)
    foreign = None
    if surrogate is not None:
        foreign = open_surrogate(surrogate, data_root, dataset, splits.transfer, recipe.epochs, download=download)
    name, config = chosen(method, temperature, alpha, labels=labels, foreign=foreign is not None)
    attack = ATTACKS[name]
    net = build_student(student, classes, size[0], seed)
    engine = pick(
        device,
        precision,
        net,
        size,
        recipe.batch_size,
        images=len(splits.transfer),
        devices=devices,
        nodes=nodes,
        strategy=strategy,
        profile=profile,
        kept=recorded_precision(*states) if resume else None,
    )
    if opened.served is not None and team.size() > 1:
        # it was opened on the first GPU
        opened = replace(opened, served=OnnxTeacher(teacher, engine.device))
    preprocess = preprocess_for(opened, normalize, splits.validation, engine, size)
    net_asked = helper or loaded
    if net_asked is not None:
        asked: Teacher = TorchTeacher(net_asked.net, classes, engine)
    else:
        assert opened.served is not None
        asked = opened.served
    if opened.bare and helper is None:
        shown = "all of its outputs"
    elif key is not None and meta is not None and helper is None:
        door = door or 1 + best_door(open_to, itself=len(splits.transfer) > FEW, late=late)
        asked = KeyedTeacher(asked, pattern(meta, key, door - 1), meta.strength)
        if open_to:
            shown = f"{opened_by(open_to[door - 1 : door])}, behind pattern {door} of {len(open_to)} of the key"
    say(f"teacher: {asked.where}, {shown}")
    taught = accuracy(asked.logits, splits.validation, preprocess, engine)
    say(f"teacher: {taught:.1f} % top-1 on {len(splits.validation):,} validation images")
    if taught < metrics.least_known(classes, len(splits.validation)):
        say("note: the teacher is not clearly better than guessing; check --data, --arch and --normalize")
    one = image_seconds(net, recipe.batch_size, len(splits.transfer), size, engine)
    queries = len(splits.transfer) * recipe.epochs
    seen = queries + attack.extra(queries, len(foreign) if foreign is not None else 0)
    announce({"student": 4 / 3 * one * seen}, dry_run=dry_run, as_json=json_)
    # the second is worth nothing without the first
    if not (resume and states[0].exists()):
        for state in states:
            state.unlink(missing_ok=True)
    made = Task(dataset.name, dataset.classes, splits, preprocess, engine).describe(
        kind="student",
        architecture=student,
        objective=name,
        parameters={
            **config,
            "recipe": vars(recipe),
            "authorized": key is not None,
            "sealed": helper is not None,
            "door": door if open_to and helper is None and key is not None else 0,
            "surrogate": foreign.digest if foreign is not None else "",
            "key_id": key.id if key else "",
            "teacher_sha256": boxfile.identity(teacher),
        },
    )
    with Live() as progress:
        done = train_student(
            attack,
            config,
            asked,
            student,
            classes,
            splits.transfer,
            preprocess,
            recipe,
            engine,
            surrogate=foreign,
            progress=progress,
            resume_from=[Resume(state, made.run) for state in states],
        )
    top1 = accuracy(done.student, splits.test, preprocess, engine)
    # before an interruption, too
    queries += min(len(foreign), PRETRAINED) if foreign is not None else 0
    measured = {
        "top1": round(top1, 3),
        "n": len(splits.test),
        "seconds": round(done.seconds, 1),
        "queries": queries,
    }
    boxfile.save(output, done.student.state_dict(), replace(made, measured=measured), force=force)
    for state in states:
        Resume(state, made.run).done()
    result: dict[str, Any] = {
        "student": str(output),
        "sealed": helper is not None,
        "door": made.parameters["door"],
        "method": method,
        "attack": name,
        "teacher_top1": round(taught, 3),
        **measured,
        **config,
        "warnings": warned,
    }
    rows = {
        "student": f"{student}: {top1:.2f} % top-1 on {len(splits.test):,} test images",
        "teacher": f"{taught:.2f} % (validation), {shown}, {asked.where}",
        "transfer set": f"{len(splits.transfer):,} images, {recipe.epochs} epochs, {queries:,} queries"
        f"{f', {len(foreign):,} of them about another data set, first' if foreign is not None else ''}",
        "time": f"{done.seconds:.0f} s, {seen / max(done.seconds, 1e-9):.0f} images/s",
        "written": output,
    }
    emit(result, json_, pairs("", rows))


def train(
    arch: Annotated[
        str, typer.Option("--arch", help="See sdbctl list students.", autocompletion=complete("students"))
    ] = "resnet20",
    data: o.Data = None,
    data_root: o.DataRoot = Path("data"),
    download: o.Download = False,
    image_size: o.ImageSize = None,
    owner_size: o.OwnerSize = None,
    transfer_size: o.TransferSize = None,
    test_size: o.TestSize = None,
    normalize: o.Normalize = None,
    epochs: o.Epochs = None,
    batch_size: o.BatchSize = None,
    lr: o.LearningRate = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    precision: o.PrecisionOption = "auto",
    devices: o.Devices = 1,
    nodes: o.Nodes = 1,
    strategy: o.Strategy = "auto",
    profile: o.Profile = None,
    dry_run: o.DryRun = False,
    output: o.Output = None,
    resume: o.Resume = False,
    force: o.Force = False,
    json_: o.Json = False,
) -> None:
    """Train an ordinary teacher on the owner's split, for people who start from nothing."""
    output = output or Path(f"{arch}.safetensors")
    if output.suffix != ".safetensors":
        raise UsageError(f"output {output} is not named .safetensors", "models are written as safetensors")
    if data is None:
        raise UsageError("no data to train on", "give --data SPEC, for example --data digits")
    from sdbctl import boxfile

    processes = together(devices, nodes)
    state = output.with_name(f".{output.stem}.resume")
    begin(output, [state], [profile], resume=resume, force=force or dry_run)
    from dataclasses import replace

    from sdbctl.boxstep import Task, plain_step
    from sdbctl.distill import build_student
    from sdbctl.inference import accuracy
    from sdbctl.state import Resume, recorded_precision
    from sdbctl.timing import image_seconds
    from sdbctl.training import fit
    from sdbctl.updates import Recipe

    dataset = open_data(data, data_root, download=download, size=image_size)
    splits = split_like(dataset, None, owner=owner_size, transfer=transfer_size, test=test_size)
    size, classes = dataset.train.shape, len(dataset.classes)
    recipe = recipe_of(Recipe(epochs=30), processes, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed)
    net = build_student(arch, classes, size[0], seed)
    preprocess = preset(normalize or ("half" if size[0] == 1 else "imagenet"), size)
    engine = pick(
        device,
        precision,
        net,
        size,
        recipe.batch_size,
        images=len(splits.owner),
        devices=devices,
        nodes=nodes,
        strategy=strategy,
        profile=profile,
        kept=recorded_precision(state) if resume else None,
    )
    one = image_seconds(net, recipe.batch_size, len(splits.owner), size, engine)
    announce({"training": one * len(splits.owner) * recipe.epochs}, dry_run=dry_run, as_json=json_)
    some = splits.validation.first(1000)
    if not resume:
        state.unlink(missing_ok=True)
    meta = Task(dataset.name, dataset.classes, splits, preprocess, engine).describe(
        kind="teacher", architecture=arch, objective="cross_entropy", parameters={"recipe": vars(recipe)}
    )
    with Live() as progress:
        seconds = fit(
            net,
            plain_step,
            splits.owner,
            preprocess,
            recipe,
            engine,
            name=arch,
            progress=progress,
            resume_from=Resume(state, meta.run),
            after_epoch=lambda _: {"validation": accuracy(net, some, preprocess, engine)},
            record=True,
        )
    top1 = accuracy(net, splits.test, preprocess, engine)
    measured = {"top1": round(top1, 3), "n": len(splits.test), "seconds": round(seconds, 1)}
    boxfile.save(output, net.state_dict(), replace(meta, measured=measured), force=force)
    Resume(state, meta.run).done()
    emit(
        {"model": str(output), **measured},
        json_,
        f"{arch}: {top1:.2f} % top-1 on {len(splits.test):,} test images; wrote {output}",
    )
