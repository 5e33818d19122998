"""What several commands do before their real work: find the data, read the key, pick the engine."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdbctl import team
from sdbctl.cli.names import NAMES
from sdbctl.cli.output import duration, emit, ending, err, say, warn
from sdbctl.cli.settings import APPLIED
from sdbctl.errors import UsageError, check_known

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sdbctl.boxfile import Metadata
    from sdbctl.data import Dataset, ImageSet, Preprocess, Splits
    from sdbctl.engine import Engine
    from sdbctl.key import Key
    from sdbctl.sources import Opened
    from sdbctl.updates import Recipe


FEW_IMAGES = 200
"""Validation or test images below which it is said that they are few."""


LAUNCHED = {"TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "MASTER_ADDR", "NODE_RANK", "GROUP_RANK"}
"""Of these a launcher of several machines sets one: without it each would wait for the others for ever."""


def together(devices: int, nodes: int) -> int:
    """How many processes train together; of several only the first talks."""
    if nodes > 1 and not LAUNCHED & os.environ.keys():
        raise UsageError(f"--nodes {nodes} needs torchrun or Slurm", "start this command on each machine through one")
    team.expect(devices * nodes)
    err.quiet = team.rank() > 0
    return devices * nodes


def named(path: Path) -> Path:
    """The path itself, if it can be a file: names of other files are made of its own.

    Raises:
        UsageError: It has no name, as ``.`` or ``/``.
    """
    if not path.name:
        raise UsageError(f"{path} is no name of a file", "name a file")
    return path


def finite(value: str | float) -> float:
    """A number that can be compared with another.

    Raises:
        ValueError: It is none, or not finite.
    """
    try:
        number = float(value)
    except TypeError:
        raise ValueError(f"{value} is not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{value} is not a finite number")
    return number


def begin(
    output: Path,
    states: Iterable[Path],
    others: Iterable[Path | None],
    *,
    resume: bool,
    force: bool,
    kept: Iterable[Path] = (),
) -> None:
    """Hold the output to the end of the command, and throw nothing away unless that was asked for.

    Args:
        output: What will be written; no other run may write it meanwhile.
        states: Where runs keep their state.
        others: What will be written beside the output.
        resume: Whether the run goes on with its state.
        force: Whether it starts again.
        kept: What is read.

    Raises:
        UsageError: There is an interrupted run or a finished file and nothing was said, two files are one, or another
            run is writing the output.
        EnvironmentFailure: An output cannot be written.
    """
    from sdbctl import files

    outputs = [path for path in (output, *others) if path is not None]
    paths = [path.resolve() for path in (*states, *outputs, *set(kept))]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise UsageError(
            f"{twice.name} would be two files of this run at once", "give --output or --profile another name"
        )
    ending.enter_context(files.alone(output))
    found = next((path for path in states if path.exists()), None)
    if found is not None and not (resume or force):
        raise UsageError(f"an interrupted run left {found}", "--resume goes on, --force starts again")
    if found is not None and resume and output.exists() and not force:
        raise UsageError(f"output {output} already exists", "--resume --force goes on and replaces it")
    for path in outputs:
        files.claim(path, force=force)


def arch_of(path: Path, arch: str | None) -> str | None:
    """The architecture to read a model file as.

    Raises:
        UsageError: One was asked for of an ONNX file.
    """
    from sdbctl import onnxfile

    if arch is None or not onnxfile.is_onnx(path):
        return arch
    if "arch" not in APPLIED:
        raise UsageError(f"{path} is ONNX, which says itself what it computes", "leave --arch out")
    return None


def only(key_file: list[Path] | None) -> Path | None:
    """The one key file of a command that asks with one.

    Raises:
        UsageError: There are several, of which others would be forgotten.
    """
    if key_file and len(key_file) > 1:
        raise UsageError("this command takes one key", "give --key-file once")
    return key_file[0] if key_file else None


def read_key(path: Path, insecure: bool, processes: int = 1) -> Key:
    """The key in a file, or on standard input for ``-``, which only one process can read."""
    from sdbctl.key import Key

    if processes > 1 and str(path) == "-":
        raise UsageError("several processes cannot read the key from standard input", "give --key-file FILE")
    return Key.load("-" if str(path) == "-" else path, insecure=insecure)


def open_data(
    spec: str | None,
    root: Path,
    *,
    download: bool = False,
    size: int | None = None,
    recorded: str | None = None,
    classes: int | None = None,
    shape: tuple[int, int, int] | None = None,
) -> Dataset:
    """Load the data set that was named, recorded in a box, or implied by the model's shape."""
    from sdbctl import data

    spec = data.resolve(spec, recorded_name=recorded, classes=classes, shape=shape, root=root)
    channels = shape[0] if shape else None
    dataset = data.load(spec, root=root, size=size or _side(shape), channels=channels, download=download, notice=say)
    c, h, w = dataset.train.shape
    images = f"{len(dataset.train):,} {'' if dataset.test is None else 'training '}images"
    say(f"data: {dataset.name}, {images}, {len(dataset.classes)} classes, {c}x{h}x{w}")
    there = set(dataset.train.labels.tolist())
    if empty := [name for label, name in enumerate(dataset.classes) if label not in there]:
        say(f"note: no training image is of class {', '.join(empty[:5])}{' …' if len(empty) > 5 else ''}")
    return dataset


def _side(shape: tuple[int, int, int] | None) -> int | None:
    """What others are resized to, to go with such images; those that are not square are taken as they are."""
    return shape[1] if shape and shape[1] == shape[2] else None


def open_surrogate(spec: str, root: Path, dataset: Dataset, own: ImageSet, epochs: int, *, download: bool) -> ImageSet:
    """Images of another data set, at most as many as queries are sent about the transfer set, in memory.

    Of large images fewer: a gigabyte, but as many as the transfer set has.

    Raises:
        UsageError: It is the very ``dataset`` that the transfer set ``own`` is of, or cannot be made to fit it.
    """
    import torch

    from sdbctl import data
    from sdbctl.attacks.base import COPY_BYTES

    other = data.load(spec, root=root, size=_side(own.shape), channels=own.shape[0], download=download, notice=say)
    if data.same_images(other, dataset):
        raise UsageError(f"--surrogate {spec} is the data set itself", "name another, whose images are not tested on")
    if other.train.shape != own.shape:
        raise UsageError(f"--surrogate {spec} has images {other.train.shape}, not {own.shape}", "name another")
    images = other.train
    # at random, since files may be sorted by class
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    most = min(len(own) * epochs, max(len(own), COPY_BYTES // math.prod(own.shape)))
    some = images.take(order[:most]).alone()
    say(f"surrogate: {len(some):,} images")
    return some


def check_classes(dataset: Dataset, classes: int, meta: Metadata | None, what: str) -> Dataset:
    """The data with its labels in the order of the model's classes.

    Raises:
        UsageError: It has other classes than the model.
    """
    from sdbctl.data import reordered

    hint, own = "use the data it was trained on", dataset.classes
    if len(own) != classes:
        raise UsageError(f"{what} has {classes} classes, the data set {dataset.name} has {len(own)}", hint)
    names = own if meta is None else meta.classes
    if own == names:
        return dataset
    if set(own) == set(names) and len(set(own)) == classes:
        say(f"note: {dataset.name} has the classes in another order than {what}; its labels are put in that of {what}")
        return reordered(dataset, names)
    if any(all(name.isdigit() for name in found) for found in (own, names)):
        # numbers are no names: they may only count
        return dataset
    plain, other = (["".join(filter(str.isalnum, name.lower())) for name in found] for found in (own, names))
    if plain == other:
        return dataset
    number = next(number for number, name in enumerate(plain) if name != other[number])
    raise UsageError(
        f"class {number} of {what} is {names[number][:40]!r}, of the data set {dataset.name} {own[number][:40]!r}", hint
    )


def of_other_data(recorded: Mapping[str, Any], dataset: Dataset) -> bool:
    """Whether a file that records its data was made with others."""
    return recorded.get("fingerprint") not in (None, dataset.fingerprint)


def data_of(
    opened: Opened, spec: str | None, root: Path, *, download: bool, size: int | None, **sizes: int | None
) -> tuple[Dataset, Splits]:
    """The data of a model: as named, recorded or implied, with labels in its order, and its splits."""
    shape, recorded = opened.shape, opened.meta.data if opened.meta else None
    dataset = open_data(
        spec, root, download=download, size=size, recorded=opened.recorded, classes=opened.classes, shape=shape
    )
    dataset = check_classes(dataset, opened.classes, opened.meta, opened.path.name)
    return dataset, split_like(dataset, recorded, **sizes)


def split_like(dataset: Dataset, recorded: Mapping[str, Any] | None, **sizes: int | None) -> Splits:
    """Split a data set as a file records it, so that what was disjoint stays disjoint.

    Args:
        dataset: The data set.
        recorded: What the file says of its splits.
        sizes: Sizes asked for; of a recorded part its first images.

    Raises:
        UsageError: A part is to be larger than recorded: the rest may be what the model was trained on.
    """
    from sdbctl import data

    recorded = recorded or {}
    if of_other_data(recorded, dataset):
        warn("this is not the data that the file was made with; splits may overlap")
        recorded = {}
    asked = {name: size for name, size in sizes.items() if size is not None}
    kept = {
        name: size
        for name in ("owner", "transfer", "validation", "test")
        if isinstance(size := recorded.get(name), int)
    }
    if dataset.test is not None and "test" in asked:
        # nobody trains on a test part
        kept.pop("test", None)
    seed = recorded.get("seed")
    splits = data.split(dataset, seed=seed if isinstance(seed, int) and 0 <= seed < 2**63 else 0, **(asked | kept))
    for name in asked.keys() & kept.keys():
        part = getattr(splits, name)
        if asked[name] > len(part):
            raise UsageError(
                f"{asked[name]} {name} images were asked for, but the file was made with {len(part)}",
                "ask for fewer; the others may be what it was trained on",
            )
        splits = replace(splits, **{name: part.take(range(asked[name]))})
    parts = {name: len(getattr(splits, name)) for name in ("owner", "transfer", "validation", "test")}
    say(f"split: {', '.join(f'{size:,} {name}' for name, size in parts.items())} images")
    for name in ("validation", "test"):
        if parts[name] < FEW_IMAGES:
            say(f"note: one of {parts[name]} {name} images is {100 / parts[name]:.1f} points: differences may be luck")
    return splits


def pick(
    device: str,
    precision: str,
    model: nn.Module,
    shape: tuple[int, int, int],
    batch_size: int,
    *,
    images: int,
    devices: int = 1,
    nodes: int = 1,
    strategy: str = "auto",
    profile: Path | None = None,
    kept: str | None = None,
) -> Engine:
    """Choose device and precision by a short measurement, say so, and gather the processes that train together.

    No more images are measured than there are: a batch that holds all of them has no others.

    Raises:
        UsageError: Precision or strategy is unknown, or the batch is too small for the processes.
    """
    import torch

    from sdbctl.engine import pick_device
    from sdbctl.timing import pick_engine

    reason = "as asked"
    if precision == "auto" and kept is not None:
        # what was measured when the run began, or what it made would not fit
        precision, reason = kept, "as in the run before"
    check_known("precision", precision, NAMES["precisions"])
    several = devices * nodes > 1
    if batch_size < 2 * devices * nodes:
        raise UsageError(
            f"a batch of {batch_size} is too small for {devices * nodes} processes", "--batch-size counts all"
        )
    if several and precision == "auto":
        # processes that start together would spoil each other's timings, and must all choose the same
        precision = "bf16" if pick_device(device).type == "cuda" else "fp32"
    if strategy not in team.STRATEGIES:
        raise UsageError(f"strategy {strategy} cannot be used", f"use one of: {', '.join(team.STRATEGIES)}")
    example = torch.zeros(max(2, min(batch_size, images)), *shape)
    engine, why = pick_engine(device, precision, model, example, reason)  # type: ignore[arg-type]
    if several:
        team.join(engine.device, engine.precision, devices, nodes, strategy)
        err.quiet = team.rank() > 0
        engine = replace(engine, device=team.fabric(engine.device, engine.precision).device)
        why += f", {team.size()} processes of {batch_size // team.size()} images each"
    say(f"computing on {why}")
    return replace(engine, profile=profile)


def recipe_of(
    usual: Recipe, processes: int, *, epochs: int | None, batch_size: int | None, lr: float | None, seed: int
) -> Recipe:
    """A recipe with what was asked for in place of the usual.

    ``--batch-size`` counts the images of one step of all processes together. If it is not given, it grows with the
    number of processes and the learning rate grows alike (Goyal et al., arXiv 1706.02677).
    """
    from sdbctl.updates import scaled

    grown = processes if batch_size is None else 1
    return scaled(
        usual,
        epochs=epochs,
        batch_size=batch_size or usual.batch_size * grown,
        lr=usual.lr * grown if lr is None else lr,
        seed=seed,
    )


def preset(name: str, size: tuple[int, int, int]) -> Preprocess:
    """A normalisation preset by name."""
    from sdbctl.data import Preprocess, presets

    known = presets(size[0])
    if name in NAMES["normalisations"] and name not in known:
        what = f"{name} is no normalisation of images with {size[0]} channel{'s' if size[0] != 1 else ''}"
        raise UsageError(what, f"use one of: {', '.join(known)}")
    check_known("normalisation", name, known)
    return Preprocess(*known[name], size)


def preprocess_for(
    opened: Opened, normalize: str | None, images: ImageSet, engine: Engine, size: tuple[int, int, int]
) -> Preprocess:
    """How a model wants its images: as asked for, as recorded, or found by trying."""
    from sdbctl import metrics
    from sdbctl.data import presets
    from sdbctl.timing import check_takes

    if opened.shape is not None and tuple(opened.shape) != tuple(size):
        raise UsageError(
            f"{opened.path.name} takes images {opened.shape}, the data has {size}", "leave --image-size out"
        )
    if opened.meta is not None and (normalize is None or opened.meta.kind == "box"):
        if normalize is not None and opened.meta.preprocess != preset(normalize, size):
            raise UsageError(f"{opened.path.name} was boxed with another normalisation", "leave --normalize out")
        return opened.meta.preprocess
    if opened.loaded is not None:
        check_takes(opened.loaded.net, size)
    if normalize is not None:
        return preset(normalize, size)
    if opened.loaded is not None:
        return tried_preprocess(opened.loaded.net, images, engine, size)[0]
    assert opened.served is not None
    found, best = tried_preprocess(opened.served.logits, images, engine, size)
    if best < metrics.least_known(opened.classes, len(images)):
        raise UsageError(
            f"{opened.path} does not record how it wants its images, and with no known normalisation it clearly does "
            "better than guessing",
            f"check --data, or give --normalize PRESET: {', '.join(presets(size[0]))}",
        )
    return found


def tried_preprocess(
    model: Callable[[Tensor], Tensor], images: ImageSet, engine: Engine, size: tuple[int, int, int]
) -> tuple[Preprocess, float]:
    """The known normalisation with which a model is most accurate, and how accurate it is, in percent."""
    from sdbctl.box import find_preprocess

    best, tried = find_preprocess(model, images, engine, size=size)
    ranked = sorted(tried.items(), key=lambda item: -item[1])
    say("normalisation, by accuracy: " + ", ".join(f"{name} {value:.1f} %" for name, value in ranked))
    say(f"taking {ranked[0][0]} (--normalize overrides)")
    return best, ranked[0][1]


def announce(estimates: Mapping[str, float], *, dry_run: bool = False, as_json: bool = False, **planned: float) -> None:
    """Print how long a run will take; a dry run ends here, with the memory that its first steps took.

    Args:
        estimates: Seconds of its parts.
        dry_run: Whether it is one.
        as_json: Whether it prints JSON.
        planned: What else scripts are told.

    Raises:
        Exit: This is a dry run.
    """
    import typer

    from sdbctl.engine import peak_memory

    total = sum(estimates.values())
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in estimates.items())
    say(f"time estimate: {duration(total)}" + (f" ({parts})" if len(estimates) > 1 else ""))
    if dry_run:
        held = peak_memory()
        say(f"memory after a training step of this size: {held / 2**30:.1f} GiB; nothing was written")
        emit({"seconds": total, "parts": dict(estimates), "memory_bytes": held, **planned}, as_json)
        raise typer.Exit


def box_fields(meta: Metadata) -> dict[str, Any]:
    """A file's metadata as JSON, for reports."""
    fields: dict[str, Any] = json.loads(meta.to_json())
    return fields
