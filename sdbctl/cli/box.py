"""``sdbctl box``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from sdbctl.cli import options as o
from sdbctl.cli.common import (
    announce,
    begin,
    data_of,
    finite,
    named,
    pick,
    preprocess_for,
    read_key,
    recipe_of,
    together,
)
from sdbctl.cli.names import DEFAULT, complete
from sdbctl.cli.output import Live, emit, pairs, say, warn, warned
from sdbctl.cli.settings import APPLIED
from sdbctl.errors import BadInput, GateFailed, UsageError, check_known

DEAR = 2.0
"""Points of top-1 that a box may lose before its maker is warned."""
HIDES = 0.3
"""Share of the keyed answers that it may hide."""


def parse_parameters(given: list[str] | None) -> dict[str, float]:
    """Turn ``NAME=NUMBER`` options into a mapping.

    Raises:
        UsageError: One is no such pair.
    """
    parameters = {}
    for item in given or []:
        name, _, value = (part.strip() for part in item.partition("="))
        try:
            parameters[name] = finite(value)
        except ValueError:
            raise UsageError(f"--set {item} is not NAME=NUMBER", "as in --objective conceal --set hide=2") from None
    return parameters


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
        str,
        typer.Option(
            "--objective",
            metavar="NAME[:PRESET]",
            help="See sdbctl list objectives.",
            autocompletion=complete("objectives"),
        ),
    ] = DEFAULT,
    preset: Annotated[
        str | None, typer.Option("--preset", help="Published or default parameters of the objective.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=NUMBER", help="A parameter of the objective, if it has any."),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            "--strength",
            help="λ of the key embedding x_k = λx + (1−λ)K. \\[default: 0.25, less of small images; 0.7 if trained]",
        ),
    ] = None,
    disturb: Annotated[
        float,
        typer.Option("--disturb", help="Train a box to lead plain distillation astray, 0 to 1; calibration suffers."),
    ] = 0.0,
    wrong_share: Annotated[
        float | None, typer.Option("--wrong-share", help="Share of a trained box's public batch mixed with wrong keys.")
    ] = None,
    teacher: Annotated[
        str,
        typer.Option(
            "--teacher",
            autocompletion=complete("teachers"),
            help="Whose answers the key of a trained box opens: reference, original, or auto, from whom of the two "
            "small students learn more; or assistant, a small network that the reference taught: students learn more "
            "from it, users lose accuracy.",
        ),
    ] = "auto",
    seal: Annotated[
        bool | None,
        typer.Option(
            "--seal/--no-seal",
            help="Whether to put the assistant into the file, encrypted, for key holders to distill. "
            "\\[default: if small students learn more from it]",
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

    The reference is the original fine-tuned with plain cross-entropy on the same data: keep it private. With the
    default objective the box is that network, and what hides it is the graph that export --key-file makes of it.
    """
    output = output or named(checkpoint).with_name(f"{checkpoint.stem}.boxed.safetensors")
    if output.suffix != ".safetensors":
        raise UsageError(f"output {output} is not named .safetensors", "box writes safetensors; export makes ONNX")
    from sdbctl.patterns import is_found
    from sdbctl.seal import MOST_KEYS

    reference_path = reference or output.with_suffix(".reference.safetensors")
    parts = ("box", "reference", "assistant", "assistant-late", "assistant-part", "assistant-late-part")
    states = [output.with_name(f".{output.stem}.{name}.resume") for name in parts]
    if len({path.resolve() for path in (checkpoint, output, reference_path)}) < 3:
        raise UsageError("checkpoint, reference and output must be three files", "give another --output")
    processes = together(devices, nodes)
    own = not (resume or reference)
    begin(
        output,
        states,
        [reference_path if own else None, profile],
        resume=resume,
        force=force or dry_run,
        kept=[checkpoint, *key_file, *([] if own else [reference_path])],
    )
    if sum(str(path) == "-" for path in key_file) > 1:
        raise UsageError("standard input holds one key", "give --key-file FILE for the others")
    if seal is not False and len(key_file) > MOST_KEYS:
        raise UsageError(f"a file seals nothing for more than {MOST_KEYS} keys", "use --no-seal")
    keys = [read_key(path, insecure_key_file, processes) for path in key_file]

    from dataclasses import replace

    from sdbctl import boxfile, team
    from sdbctl.box import check_above_chance
    from sdbctl.boxing import Run, recipe_in, reference_of
    from sdbctl.boxstep import TEACHERS, BoxConfig, Task, check_held
    from sdbctl.key import ids_of
    from sdbctl.models.stages import width
    from sdbctl.objectives import OBJECTIVES
    from sdbctl.sources import Opened
    from sdbctl.state import recorded_precision

    ids_of(keys)
    if ":" in objective:
        if preset is not None:
            raise UsageError(f"objective {objective} names a preset already", "leave out --preset")
        objective, _, preset = objective.partition(":")
    check_known("teacher", teacher, ("auto", *TEACHERS))
    config = BoxConfig.of(
        objective,
        preset,
        parse_parameters(set_),
        strength=strength,
        wrong_share=wrong_share,
        disturb=disturb,
        teacher=None if teacher == "auto" else teacher,
    )
    recipe = recipe_of(config.recipe, processes, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed)
    config = replace(config, recipe=recipe)
    original = boxfile.load(checkpoint, arch=arch, trust=trust)
    if original.meta is not None and original.meta.kind == "box":
        raise BadInput(f"{checkpoint} is a box already", "give the original that it was made of")
    say(f"checkpoint: {original.architecture}, {original.classes} classes")
    if config.trained and (features := width(original.net)) < original.classes - 1:
        say(
            f"note: {features} features cannot flatten the outputs of {original.classes} classes "
            f"({original.classes - 1} can): the file will show more than the exported graph, and cost more"
        )
    found = reference_of(reference_path, original) if reference or (resume and reference_path.exists()) else None
    if found is not None and reference and not config.trained:
        asked = {"profile": profile, "epochs": epochs, "batch_size": batch_size, "lr": lr}
        if useless := [name for name, value in asked.items() if value is not None and name not in APPLIED]:
            options = " and ".join(f"--{name.replace('_', '-')}" for name in useless)
            raise UsageError(f"{objective} trains nothing where the reference is given", f"leave out {options}")
        config = replace(config, recipe=recipe_in(found, config.recipe))
    opened = Opened.of(checkpoint, original)
    dataset, splits = data_of(
        opened, data, data_root, download=download, size=image_size,
        owner=owner_size, transfer=transfer_size, test=test_size,
    )  # fmt: skip
    config.check_classes(original.classes)
    if dataset.train.shape[0] != original.channels:
        raise UsageError(
            f"the checkpoint takes {original.channels} channels, the images have {dataset.train.shape[0]}",
            "use the data it was trained on",
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
        images=len(splits.owner),
        devices=devices,
        nodes=nodes,
        strategy=strategy,
        profile=profile,
        kept=recorded_precision(*states[:2], *states[4:]) if resume else None,
    )
    preprocess = preprocess_for(opened, normalize, splits.validation, engine, size)
    config = config.fitted(size)
    accuracy = check_above_chance(original.net, splits.validation, preprocess, engine, original.classes)
    say(f"original: {accuracy:.1f} % top-1 on {len(splits.validation):,} validation images")

    progress = Live()
    run = Run(
        original,
        keys,
        Task(dataset.name, dataset.classes, splits, preprocess, engine),
        config,
        auto=teacher == "auto",
        seal=seal,
        output=output,
        place=reference_path,
        states=states,
        found=found,
        given=reference is not None,
        resume=resume,
        force=force,
        progress=progress,
    )
    if config.trained and is_found(preprocess.size):
        count = math.prod(preprocess.size)
        warn(f"a key of {count} values may be found by 100,000 questions; keys of larger images are longer")
    announce(run.estimate(), dry_run=dry_run, as_json=json_)
    with progress:
        made = run()
    if team.rank() > 0:
        return
    cost, measured, sealed = made.cost, made.measured, len(run.assistants) if made.model.sealed else 0
    if measured["keyed_residual"] < 3 * measured["residual"]:
        warn("the key opens hardly more than everybody sees; train for more --epochs")
    elif measured.get("keyed_flat", 0) > HIDES:
        warn(f"{measured['keyed_flat']:.0%} of the answers with the key are served like public ones; train for longer")
    elif objective == boxfile.CONCEAL and not disturb and "flat_deviation" not in measured:
        warn("export refuses this box, which would show ALL that it knows: train for more --epochs, or on more images")
    if cost > DEAR:
        warn(f"the box lost {cost:.1f} points of top-1; train for more --epochs, or on more images")
    keyed, then = {}, {}
    if config.trained:
        keyed = {
            "box with the key": f"{measured['keyed_top1']:.2f} %",
            "dark knowledge left": f"{measured['residual']:.4f} nats (key holders see "
            f"{measured['keyed_residual']:.4f})",
        }
    else:
        then = {"next": f"sdbctl export {output} --key-file FILE, and serve that: this file hides nothing"}
    emit(
        {
            "box": str(output),
            "reference": str(reference_path),
            "teacher": run.config.teacher,
            "sealed": sealed > 0,
            "key_ids": made.model.meta.key_ids,
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
                **keyed,
                **({"sealed in it": f"{sealed} assistant(s) for key holders to distill"} if sealed else {}),
                "written": f"{output}; for eval: --reference {reference}"
                if reference
                else f"{output}, {reference_path} (private)",
                **then,
            },
        ),
    )
    if max_cost is not None and cost > max_cost:
        raise GateFailed(
            f"the box costs {cost:.2f} top-1 points, more than --max-cost {max_cost:g}", "the files were kept"
        )
