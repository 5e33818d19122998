"""``sdbctl box``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdbctl.cli import options as o
from sdbctl.cli.common import (
    announce,
    begin,
    box_fields,
    check_classes,
    check_known,
    finite,
    named,
    open_data,
    pick,
    preprocess_of,
    read_key,
    recipe_of,
    split_like,
    together,
)
from sdbctl.cli.names import complete
from sdbctl.cli.output import Live, emit, pairs, say, warn, warned
from sdbctl.errors import BadInput, GateFailed, UsageError

if TYPE_CHECKING:
    from torch import nn

    from sdbctl.boxfile import Loaded, Metadata

DIVISORS = ("temperature", "limit")
"""Parameters that something is divided by."""
MOST = 1_000_000
"""What no parameter of an objective may exceed: losses would overflow."""
DEAR = 2.0
"""Points of top-1 that a box may lose before its maker is warned."""


def parse_parameters(given: list[str] | None) -> dict[str, float]:
    """Turn ``NAME=NUMBER`` options into a mapping.

    Raises:
        UsageError: One is no such pair, or the number can be no parameter of an objective.
    """
    parameters = {}
    for item in given or []:
        name, _, value = (part.strip() for part in item.partition("="))
        try:
            parameters[name] = number = finite(value)
        except ValueError:
            raise UsageError(f"--set {item} is not NAME=NUMBER", "for example --set hide=2") from None
        # the direction of a term is no weight
        if (name != "away" and not (number > 0 if name in DIVISORS else number >= 0)) or abs(number) > MOST:
            least = "above 0" if name in DIVISORS else "from 0"
            raise UsageError(f"--set {item} is out of range", f"use a number {least} to {MOST:,}")
    return parameters


def reference_of(path: Path, original: Loaded) -> Loaded:
    """The reference N_ft in a file.

    Raises:
        BadInput: It is none of this checkpoint.
    """
    from sdbctl import boxfile

    found = boxfile.load(path)
    if found.meta is None or found.meta.kind != "reference" or found.meta.original_sha256 != original.sha256:
        raise BadInput(f"{path} is no reference of this checkpoint", "name the one that box wrote")
    return found


def assistant_of(path: Path, described: Metadata) -> Loaded | None:
    """The assistant that was taught before a run was interrupted; None if there is none, or another one."""
    from sdbctl import boxfile

    if not path.exists():
        return None
    found = boxfile.load(path)
    return found if found.meta is not None and found.meta.run == described.run else None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Settings that are not the same, with both values."""
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new)
        elif old != new:
            yield f"{name} {str(old)[:40]}, not {str(new)[:40]}"


def decided(teacher: str, seal: bool | None, learned: Mapping[str, float]) -> tuple[str, bool]:
    """Whom the key opens and whether something is sealed: as asked for, else by what students learned."""
    from sdbctl.box import better_teacher, worth_sealing

    return (
        better_teacher(learned) if teacher == "auto" else teacher,
        worth_sealing(learned) if seal is None else seal,
    )


def box(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="The trained classifier.")],
    key_file: Annotated[
        list[Path],
        typer.Option(
            "--key-file",
            metavar="FILE",
            help="Secret key made by keygen; - reads standard input. Repeat it to give each partner a key.",
        ),
    ],
    data: o.Data = None,
    data_root: o.DataRoot = Path("data"),
    download: o.Download = False,
    image_size: o.ImageSize = None,
    owner_size: o.OwnerSize = None,
    transfer_size: o.TransferSize = None,
    test_size: o.TestSize = None,
    arch: o.Arch = None,
    normalize: o.Normalize = None,
    objective: Annotated[
        str, typer.Option("--objective", help="See sdbctl list objectives.", autocompletion=complete("objectives"))
    ] = "conceal",
    preset: Annotated[
        str | None, typer.Option("--preset", help="Published or default parameters of the objective.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=NUMBER", help="A parameter of the objective."),
    ] = None,
    strength: Annotated[
        float | None, typer.Option("--strength", help="λ of the key embedding x_k = λx + (1−λ)K.")
    ] = None,
    disturb: Annotated[
        float,
        typer.Option("--disturb", help="Lead plain distillation astray, 0 to 1, at a price in calibration."),
    ] = 0.0,
    wrong_share: Annotated[
        float | None, typer.Option("--wrong-share", help="Share of the public batch mixed with wrong keys.")
    ] = None,
    teacher: Annotated[
        str,
        typer.Option(
            "--teacher",
            autocompletion=complete("teachers"),
            help="Whose answers the key opens: reference, original, or auto, from whom of the two small students learn "
            "more; or assistant, a small network that the reference taught: students learn more from it, users lose "
            "accuracy.",
        ),
    ] = "auto",
    seal: Annotated[
        bool | None,
        typer.Option(
            "--seal/--no-seal",
            help="Whether to put the assistant into the file, encrypted, for key holders to distill. "
            "[default: if small students learn more from it]",
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option("--reference", help="An N_ft that box made of this checkpoint before, to be used again."),
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
    max_cost: Annotated[
        float | None,
        typer.Option("--max-cost", metavar="POINTS", parser=finite, help="Exit with 3 if the box costs more top-1."),
    ] = None,
    output: o.Output = None,
    resume: o.Resume = False,
    force: o.Force = False,
    insecure_key_file: o.InsecureKey = False,
    trust: o.Trust = False,
    json_: o.Json = False,
) -> None:
    """Put a trained classifier into a Safe Distillation Box.

    Writes the box, with the original's weight names, and beside it the reference, which eval compares with.

    The reference is the original fine-tuned with plain cross-entropy on the same data: keep it private.
    """
    output = output or named(checkpoint).with_name(f"{checkpoint.stem}.boxed.safetensors")
    if output.suffix != ".safetensors":
        raise UsageError(f"output {output} is not named .safetensors", "box writes safetensors; export makes ONNX")
    from sdbctl import files
    from sdbctl.seal import MOST_KEYS

    reference_path = reference or output.with_suffix(".reference.safetensors")
    parts = ("box", "reference", "assistant", "assistant-late")
    states = [output.with_name(f".{output.stem}.{name}.resume") for name in parts]
    state, reference_state, *assistant_states = states
    if len({path.resolve() for path in (checkpoint, output, reference_path)}) < 3:
        raise UsageError("checkpoint, reference and output must be three files", "give another --output")
    processes = together(devices, nodes)
    own = not (resume or reference)
    begin(
        output,
        states,
        [reference_path if own else None, profile],
        resume=resume,
        force=force,
        kept=[checkpoint, *key_file, *([] if own else [reference_path])],
    )
    if sum(str(path) == "-" for path in key_file) > 1:
        raise UsageError("standard input holds one key", "give --key-file FILE for the others")
    if seal is not False and len(key_file) > MOST_KEYS:
        raise UsageError(f"a file seals nothing for more than {MOST_KEYS} keys", "use --no-seal")
    keys = [read_key(path, insecure_key_file, processes) for path in key_file]

    from dataclasses import asdict, replace

    from sdbctl import boxfile, team
    from sdbctl.box import (
        TEACHERS,
        BoxConfig,
        Task,
        assist,
        assisted_epochs,
        check_above_chance,
        check_held,
        describe_assistant,
        estimate,
        fine_tune,
        sealed,
        tried_images,
        what_students_learn,
    )
    from sdbctl.box import box as make_box
    from sdbctl.boxfile import Metadata
    from sdbctl.key import ids_of
    from sdbctl.models.stages import width
    from sdbctl.objectives import OBJECTIVES
    from sdbctl.training import recorded_precision, scaled

    ids_of(keys)
    usual = BoxConfig(objective)
    presets = OBJECTIVES[objective].presets
    check_known(f"preset of {objective}", preset, presets)
    check_known("teacher", teacher, ("auto", *TEACHERS))
    base = presets[preset or "default"]
    asked: dict[str, Any] = {"strength": strength, "wrong_share": wrong_share}
    settings = {
        name: next(value for value in (given, getattr(base, name), getattr(usual, name)) if value is not None)
        for name, given in asked.items()
    }
    config = BoxConfig(
        objective,
        {**base.parameters, **parse_parameters(set_)},
        **settings,
        disturb=disturb,
        teacher="reference" if teacher == "auto" else teacher,
        recipe=recipe_of(
            scaled(usual.recipe, epochs=base.epochs, lr=base.lr),
            processes,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            seed=seed,
        ),
    )
    original = boxfile.load(checkpoint, arch=arch, trust=trust)
    if original.meta is not None and original.meta.kind == "box":
        raise BadInput(f"{checkpoint} is a box already", "give the original; without a key in it, that key is revoked")
    say(f"checkpoint: {original.architecture}, {original.classes} classes")
    if (features := width(original.net)) < original.classes - 1:
        say(
            f"note: {features} features cannot flatten the outputs of {original.classes} classes "
            f"({original.classes - 1} can): the file will show more than the exported graph, and cost more"
        )
    found = reference_of(reference_path, original) if reference or (resume and reference_path.exists()) else None
    recorded = original.meta
    shape = recorded.preprocess.size if recorded else None
    dataset = open_data(
        data,
        data_root,
        download=download,
        size=image_size,
        recorded=str(recorded.data.get("name", "")) if recorded else None,
        classes=original.classes,
        shape=shape,
    )
    dataset = check_classes(dataset, original.classes, recorded, checkpoint.name)
    if disturb and original.classes < 3:
        raise UsageError("--disturb moves probability to a third class", "leave it out for two classes")
    if dataset.train.shape[0] != original.channels:
        raise UsageError(
            f"the checkpoint takes {original.channels} channels, the images have {dataset.train.shape[0]}",
            "use the data it was trained on",
        )
    splits = split_like(
        dataset, recorded.data if recorded else None, owner=owner_size, transfer=transfer_size, test=test_size
    )
    if OBJECTIVES[objective].needs_adversarial:
        check_held(splits.owner)
    size = dataset.train.shape
    engine = pick(
        device,
        precision,
        original.net,
        size,
        config.recipe.batch_size,
        devices=devices,
        nodes=nodes,
        strategy=strategy,
        profile=profile,
        kept=recorded_precision(state, reference_state) if resume else None,
    )
    preprocess = preprocess_of(original, normalize, splits.validation, engine, size)
    accuracy = check_above_chance(original.net, splits.validation, preprocess, engine, original.classes)
    say(f"original: {accuracy:.1f} % top-1 on {len(splits.validation):,} validation images")

    reference_meta = Metadata(
        kind="reference",
        architecture=original.architecture,
        classes=dataset.classes,
        preprocess=preprocess,
        objective="cross_entropy",
        parameters={"recipe": asdict(config.recipe)},
        data={"name": dataset.name, **splits.describe()},
        original_sha256=original.sha256,
        versions=boxfile.versions(),
    )
    reference_sha256 = found.sha256 if found is not None else ""
    tuned, learned = None, dict[str, float]()
    if found is not None and found.meta is not None:
        # one that was asked for may be of another recipe
        before, now = (replace(meta, versions={}, measured={}) for meta in (found.meta, reference_meta))
        if reference is None and before != now:
            other = "; ".join(differences(box_fields(before), box_fields(now)))
            raise UsageError(
                f"{reference_path} was made with other settings ({other})",
                "use those, delete it, or give it with --reference",
            )
        tuned = found.net
        learned = {name: value for name, value in found.meta.measured.items() if name in TEACHERS}
        say("the reference was finished before")
    fresh = tuned is None
    team.agree(int(fresh), "the finished reference")
    parameters = config.resolved()
    if not getattr(parameters, "preserve", getattr(parameters, "teach", 1.0)):
        if teacher == "assistant":
            raise UsageError(
                "this objective has no keyed branch that could learn from an assistant", "leave out --teacher"
            )
        teacher, seal = "reference", bool(seal)
    # the rivals are students of those who are in question
    rivals = TEACHERS if seal is None else TEACHERS[:2] if teacher == "auto" else ()
    task = Task(dataset.name, dataset.classes, splits, preprocess, engine)
    lengths = assisted_epochs(len(splits.owner))
    assistants: dict[int, nn.Module] = {}
    if resume and tuned is not None:
        for length, path in zip(lengths, assistant_states, strict=False):
            taught = assistant_of(path, describe_assistant(tuned, task, length))
            if taught is not None and taught.meta is not None:
                assistants[length] = taught.net
                learned |= {name: value for name, value in taught.meta.measured.items() if name in TEACHERS}
    team.agree(len(assistants), "the finished assistants")
    compare = not learned.keys() >= set(rivals)
    if not compare:
        teacher, seal = decided(teacher, seal, learned)
    # one is enough to be compared and opened; the others are taught if they will be sealed
    wanted = lengths if seal else lengths[:1] if seal is None or teacher == "assistant" else []
    config = replace(config, teacher="reference" if teacher == "auto" else teacher)
    expected = estimate(
        config,
        original.net,
        preprocess,
        len(splits.owner),
        engine,
        compared=tried_images(splits) if compare else 0,
        assisted=sum(length for length in (wanted if seal is False else lengths) if length not in assistants),
        teachers=len(rivals),
    )
    if not fresh:
        expected.pop("reference")
    announce(expected, dry_run=dry_run)
    if not resume:
        for old in states:
            old.unlink(missing_ok=True)

    def keep_reference(tuned: nn.Module) -> str:
        content = boxfile.dump(original.file_state(tuned), reference_meta)
        files.write(reference_path, content, private=True)
        return files.sha256(content)

    def keep(length: int, tuned: nn.Module) -> None:
        described = replace(describe_assistant(tuned, task, length), measured=learned)
        path = assistant_states[lengths.index(length)]
        boxfile.save(path, assistants[length].state_dict(), described, force=True)

    def teach(wanted: list[int], tuned: nn.Module, progress: Live) -> None:
        for length in wanted:
            if length not in assistants:
                assistants[length] = assist(tuned, task, length, progress=progress)
                keep(length, tuned)

    with Live() as progress:
        if tuned is None:
            tuned = fine_tune(original, task, config.recipe, progress=progress, resume_from=reference_state)
            reference_sha256 = keep_reference(tuned)
        teach(wanted, tuned, progress)
        if compare:
            known = {"reference": tuned, "original": original.net}
            if lengths[0] in assistants:
                known["assistant"] = assistants[lengths[0]]
            learned = what_students_learn({name: known[name] for name in rivals}, task, progress=progress)
            if lengths[0] in assistants:
                keep(lengths[0], tuned)
            reference_meta = replace(reference_meta, measured=learned)
            reached = ", ".join(f"of the {name} {accuracy:.1f} %" for name, accuracy in learned.items())
            teacher, seal = decided(teacher, seal, learned)
            team.agree(2 * TEACHERS.index(teacher) + seal, "the better teacher")
            config = replace(config, teacher=teacher)
            progress.note(
                f"small students reach {reached}: the key will open the {teacher}"
                + (", and in the file the assistant" if seal else "")
            )
            if not reference:
                reference_sha256 = keep_reference(tuned)
        teach(lengths if seal else [], tuned, progress)
        made = make_box(
            original,
            tuned,
            keys,
            task,
            config,
            assistant=assistants.get(lengths[0]),
            progress=progress,
            resume_from=state,
        )
    if team.rank() > 0:
        return
    meta = replace(
        made.model.meta,
        parameters={**made.model.meta.parameters, "sealed": bool(seal)},
        reference_sha256=reference_sha256,
    )
    inner = ""
    if seal:
        readable = []
        for length in lengths:
            net = assistants[length]
            top1 = round(task.top1(net, splits.test), 3)
            readable.append((net, replace(describe_assistant(tuned, task, length), measured={"top1": top1})))
        inner = sealed(readable, meta, keys)
    boxfile.save(output, made.state_dict, meta, sealed=inner, force=force)
    for done in states:
        done.unlink(missing_ok=True)
    cost, measured = made.cost, made.measured
    if measured["keyed_residual"] < 3 * measured["residual"]:
        warn("the key opens hardly more than everybody sees; train for more --epochs")
    if cost > DEAR:
        warn(f"the box lost {cost:.1f} points of top-1; train for more --epochs, or on more images")
    emit(
        {
            "box": str(output),
            "reference": str(reference_path),
            "sealed": bool(inner),
            "key_ids": meta.key_ids,
            "cost_top1": cost,
            **measured,
            "warnings": warned,
        },
        json_,
        pairs(
            "",
            {
                "original": f"{measured['original_top1']:.2f} % top-1 on {len(splits.test):,} test images",
                "reference (N_ft)": f"{measured['reference_top1']:.2f} %",
                "box": f"{measured['boxed_top1']:.2f} %  (cost {cost:+.2f} points)",
                "box with the key": f"{measured['keyed_top1']:.2f} %",
                "dark knowledge left": f"{measured['residual']:.4f} nats (key holders see "
                f"{measured['keyed_residual']:.4f})",
                "written": f"{output}; for eval: --reference {reference}"
                if reference
                else f"{output}, {reference_path.name} (private)",
                **({"sealed in it": f"{len(lengths)} assistant(s) for key holders to distill"} if inner else {}),
            },
        ),
    )
    if max_cost is not None and cost > max_cost:
        raise GateFailed(
            f"the box costs {cost:.2f} top-1 points, more than --max-cost {max_cost:g}", "the files were kept"
        )
