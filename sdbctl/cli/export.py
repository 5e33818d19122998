"""``sdbctl export`` and ``sdbctl inspect``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdbctl.cli import options as o
from sdbctl.cli.common import arch_of, box_fields, named, only, preset, read_key
from sdbctl.cli.names import complete
from sdbctl.cli.output import emit, pairs, say, warn, warned
from sdbctl.cli.settings import APPLIED
from sdbctl.errors import BadInput, UsageError, check_known

if TYPE_CHECKING:
    from torch.nn import Module

    from sdbctl.boxfile import Loaded, Metadata
    from sdbctl.gate import KeyGate
    from sdbctl.key import Key


def export(
    model: Annotated[Path, typer.Argument(metavar="FILE", help="A box, student, teacher, or checkpoint.")],
    format_: Annotated[str, typer.Option("--format", help="onnx or safetensors.")] = "onnx",
    output: o.Output = None,
    arch: o.Arch = None,
    normalize: o.Normalize = None,
    image_size: o.ImageSize = None,
    confidence: Annotated[
        str | None,
        typer.Option(
            "--confidence",
            autocompletion=complete("confidences"),
            help="What public outputs of a box say of how sure they are: class, one per class; rough, two; or "
            "exact, all that they show, which helps attackers. \\[default: class]",
        ),
    ] = None,
    key_file: Annotated[
        list[Path] | None,
        typer.Option(
            "--key-file",
            metavar="FILE",
            help="A key, for whose pattern the graph then looks itself: a search finds no other. The graph holds the "
            "pattern, so keep it on your server. Repeat it for each partner: keys left out open it no more, and of a "
            "box one must be its own, the others may be new.",
        ),
    ] = None,
    keyed: Annotated[
        list[str] | None,
        typer.Option(
            "--keyed",
            metavar="WHO",
            autocompletion=complete("keyed"),
            help="With --key-file, who answers key holders: the model itself, the assistants that are sealed in the "
            "box, or another model's FILE. Repeat it, and each has a pattern of the key's. "
            "\\[default: itself, and the assistants if there are any]",
        ),
    ] = None,
    wrapper: Annotated[
        str | None,
        typer.Option(
            "--wrapper",
            metavar="NAME",
            autocompletion=complete("wrappers"),
            help="Put a serving-time defence into the graph; see sdbctl list. With --key-file anything can be served "
            "so, without being boxed.",
        ),
    ] = None,
    insecure_key_file: o.InsecureKey = False,
    force: o.Force = False,
    trust: o.Trust = False,
    json_: o.Json = False,
) -> None:
    """Write a model as ONNX, after checking that it computes the same, or as safetensors.

    The ONNX graph of a box serves the predicted class with the accuracy of this prediction and nothing else. With
    --key-file it looks for the key and answers its holders with what teaches best; such a file should never leave your
    servers. Without it a graph of the default objective answers no key, and one of conceal lets pass what its key
    opens, but for the few outputs that are as flat as public ones.
    """
    suffixes = {"onnx": ".onnx", "safetensors": ".safetensors"}
    if format_ not in suffixes:
        raise UsageError(f"unknown format {format_}", "use onnx or safetensors")
    from sdbctl import boxfile, files
    from sdbctl.gate import in_words
    from sdbctl.timing import check_takes
    from sdbctl.wrappers import CONFIDENCES, check_exported

    check_exported(wrapper)
    check_known("confidence", confidence, CONFIDENCES)
    if wrapper is not None and format_ != "onnx":
        raise UsageError(f"weights cannot hold the wrapper {wrapper}", "use --format onnx")
    if confidence is not None and (format_ != "onnx" or wrapper is not None):
        what = f"the wrapper {wrapper}" if wrapper else "a file of weights"
        raise UsageError(f"--confidence has no meaning for {what}", "leave one of them out")
    if key_file and format_ != "onnx":
        raise UsageError("weights cannot look for a key", "leave --key-file out, or use --format onnx")
    if key_file and confidence == "exact":
        raise UsageError("exact shows everybody all, and leaves nothing to a key", "leave --confidence exact out")
    if keyed and not key_file:
        raise UsageError("--keyed says who answers key holders", "give --key-file as well")

    output = output or named(model).with_suffix(suffixes[format_])
    if output.suffix != suffixes[format_]:
        raise UsageError(f"output {output} is not named {suffixes[format_]}", "name it so, or give another --format")
    files.claim(output, force=force)
    loaded = boxfile.load(model, arch=arch, trust=trust)
    meta = loaded.meta
    if meta is None:
        if normalize is None or image_size is None:
            raise UsageError(
                f"{model} does not record how it wants its images",
                "give --normalize PRESET and --image-size N",
            )
        meta = boxfile.Metadata(
            kind="teacher",
            architecture=loaded.architecture,
            classes=tuple(str(index) for index in range(loaded.classes)),
            preprocess=preset(normalize, (loaded.channels, image_size, image_size)),
            versions=boxfile.versions(),
        )
    elif (normalize and "normalize" not in APPLIED) or (image_size and "image_size" not in APPLIED):
        raise UsageError(f"{model} records how it wants its images", "leave out --normalize and --image-size")
    if confidence is not None and meta.kind != "box":
        if "confidence" not in APPLIED:
            raise UsageError(f"{model} is no box, and shows all that it knows", "give --wrapper, such as top1")
        confidence = None
    if confidence == "exact" and meta.guarded:
        raise UsageError(f"{model} was not trained to hide: exact would show everybody all", "leave out --confidence")
    result: dict[str, Any] = {"file": str(output), "format": format_}
    if format_ == "onnx":
        keys = [read_key(path, insecure_key_file) for path in key_file or []]
        check_takes(loaded.net, meta.preprocess.size)
        meta = _for_keys(meta, keys, loaded.sha256)
        net = _public(loaded.net, meta, confidence, wrapper, checks=bool(keys))
        # a graph of what is guarded opens to nobody unless it looks for keys
        sealed = loaded.sealed if keys or not meta.guarded else ""
        if keys:
            net, doors = _gate(net, loaded, meta, keys, keyed or [], trust=trust)
            meta, sealed = replace(meta, doors=doors), boxfile.sealed_for(sealed, keys, meta, model.name)
        parity = boxfile.export_onnx(output, net, meta, sealed=sealed, force=force)
        result |= {"serves": in_words(boxfile.shows(net), meta.doors), "parity": parity}
        say(f"parity with torch through ONNX Runtime: {result['parity']:.1e} of the largest logit")
    else:
        boxfile.save(output, loaded.file_state(loaded.net), meta, sealed=loaded.sealed, force=force)
    emit({**result, "warnings": warned}, json_, f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)")


def _for_keys(meta: Metadata, keys: list[Key], source: str) -> Metadata:
    """What a graph that looks for keys says of itself.

    The keys of a box come first after it: a graph looks for any pattern, but only they open what is behind it.

    Raises:
        BadInput: No key is that of the box.
        UsageError: A key is given twice, or images are too small to look for it.
    """
    from sdbctl.boxfile import check_key
    from sdbctl.gate import SAFE, key_margin, key_strength
    from sdbctl.key import ids_of

    if not keys:
        return meta
    ids, size = ids_of(keys), meta.preprocess.size
    if meta.kind != "box":
        plain = replace(meta, objective="", parameters={}, measured={}, reference_sha256="", original_sha256=source)
        return replace(plain, kind="box", key_ids=ids, strength=key_strength(size))
    keys.sort(key=lambda key: key.id not in meta.key_ids)
    check_key(meta, keys[0])
    if key_margin(size, meta.strength) < SAFE:
        why = "images so small, or so little of the key in them, have a key by chance: no graph can look for it"
        raise UsageError(why, "leave --key-file out; without it the graph opens to the keys of the box")
    if left := [name for name in meta.key_ids if name not in ids]:
        say(f"note: without their key files this graph does not open to {', '.join(left)}")
    if new := [name for name in ids if name not in meta.key_ids]:
        say(f"note: the box was not made for {', '.join(new)}; this graph opens to them as well")
    return replace(meta, key_ids=ids)


def _public(net: Module, meta: Metadata, confidence: str | None, wrapper: str | None, *, checks: bool) -> Module:
    """A network as its graph is to serve it to everybody; what this means is said.

    Raises:
        UsageError: It would show everybody what a key, or a choice of confidences, is to hide.
    """
    from sdbctl import boxfile
    from sdbctl.gate import SAFE, key_margin
    from sdbctl.wrappers import CLASS_ONLY, Concealed, Wrapped, served

    if wrapper is not None:
        if meta.kind == "box" and wrapper not in CLASS_ONLY:
            warn(f"{wrapper} shows everybody more than the predicted class")
        if meta.key_ids and not checks:
            say(
                "note: without --key-file this graph answers no key"
                if meta.guarded
                else f"note: {wrapper} hides what the key opens, too"
            )
        return Wrapped(net, wrapper)
    shown = served(net, meta, confidence or "class", closed=checks)
    if isinstance(shown, Concealed):
        least, most = (f"{level:.1%}" for level in shown.levels.aminmax())
        how = "one if it is unsure, one if it is sure" if confidence == "rough" else "one for each predicted class"
        say(f"public outputs are served with a confidence of {least} to {most}, {how}")
        if meta.guarded and not checks:
            warn("without --key-file this graph answers no key; whoever has its file has the whole network")
        elif not checks:
            say(f"so are {meta.measured['keyed_flat']:.1%} of the outputs with the key, which are as flat")
            if meta.key_ids and key_margin(meta.preprocess.size, meta.strength) >= SAFE:
                say("note: searches may find patterns that open this graph; --key-file lets it look for the key")
        return shown
    hides = meta.objective == boxfile.CONCEAL and not meta.parameters.get("disturb")
    if len(meta.classes) < 3:
        why = "two classes leave no others to hide"
    elif meta.parameters.get("disturb"):
        why = "it was made to disturb"
    elif hides:
        why = "what it shows with and without the key cannot be told apart; box for more --epochs"
    else:
        why = "nothing was done to conceal it"
    if checks or confidence in ("class", "rough") or (confidence is None and hides):
        hint = "give --wrapper, such as top1" + ("" if checks else ", or --confidence exact")
        raise UsageError(f"everybody would be shown ALL that this model knows: {why}", hint)
    if meta.kind == "reference":
        warn("this is the private reference, and its graph shows everybody all that it knows")
    elif meta.kind != "box" and meta.kind != "student":
        say("note: this graph shows everybody all that the model knows; --wrapper top1 hides it")
    return shown


def _gate(
    public: Module, loaded: Loaded, meta: Metadata, keys: list[Key], who: list[str], *, trust: bool
) -> tuple[KeyGate, tuple[str, ...]]:
    """A graph that looks for keys, and who answers their holders through its doors.

    Raises:
        BadInput: Nothing is sealed in the box, or the file is no model of the same classes and images.
    """
    from sdbctl import boxfile
    from sdbctl.gate import ANOTHER, ASSISTANT, ITSELF, KEYED, KeyGate, opened, patterns

    if twice := next((name for number, name in enumerate(who) if name in who[:number]), None):
        raise UsageError(f"--keyed {twice} is given twice", "leave one out")
    answers: list[Module] = []
    doors: list[str] = []
    for name in who or (KEYED if loaded.sealed else [ITSELF]):
        if name == ITSELF:
            found = [boxfile.Box(loaded.net, meta).unlock(keys[0])]
        elif name == ASSISTANT:
            found = [one.net for one in boxfile.unsealed(loaded.sealed, keys[0], meta, "the box")]
        else:
            other = _another(Path(name), loaded, meta, trust=trust)
            found = [other.net]
        answers += found
        doors += [name if name in KEYED else ANOTHER + other.architecture] * len(found)
    say(f"key holders are served {opened(doors)}")
    say("the graph holds the patterns of the keys: whoever reads it can ask as their holders do")
    secrets = patterns(keys, meta.preprocess.size, len(answers))
    return KeyGate(public, answers, secrets, meta.strength, meta.preprocess), tuple(doors)


def _another(path: Path, loaded: Loaded, meta: Metadata, *, trust: bool) -> Loaded:
    """Another network that is to answer in place of a first one.

    Raises:
        BadInput: It is a box, or of other classes or images.
        UsageError: It cannot take such images.
    """
    from sdbctl import boxfile
    from sdbctl.timing import check_takes

    if not path.exists():
        raise BadInput(f"--keyed {path} is no file", "say itself, assistant, or name another model's file")
    found = boxfile.load(path, trust=trust)
    if found.meta is not None and found.meta.kind == "box":
        raise BadInput(f"{path} is a box", "name an ordinary model, such as its reference")
    if (found.classes, found.channels) != (loaded.classes, loaded.channels):
        raise BadInput(
            f"{path} has {found.classes} classes and {found.channels} channels, not {loaded.classes} and "
            f"{loaded.channels}",
            "name a model of the same data",
        )
    if found.meta is None:
        say(f"note: {path} does not say how it wants its images; it is given them as the other network is")
    elif found.meta.preprocess != meta.preprocess:
        raise BadInput(f"{path} wants images of another size or normalisation", "name a model that wants the same")
    elif loaded.meta is not None and found.meta.classes != meta.classes:
        raise BadInput(f"{path} has other classes, or in another order", "name a model of the same data")
    check_takes(found.net, meta.preprocess.size)
    return found


def inspect(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Any model file.")],
    key_file: o.KeyFile = None,
    arch: o.Arch = None,
    insecure_key_file: o.InsecureKey = False,
    trust: o.Trust = False,
    json_: o.Json = False,
) -> None:
    """Show what a file says of itself, and whether a key fits."""
    from sdbctl import boxfile
    from sdbctl.gate import in_words
    from sdbctl.key import KEY_BYTES
    from sdbctl.seal import readers
    from sdbctl.sources import open_model

    if path.is_file() and path.stat().st_size == KEY_BYTES:
        found = {"file": path.name, "format": "key", "id": read_key(path, insecure_key_file).id}
        hint = "to see whether it fits a box: sdbctl inspect BOX --key-file FILE"
        emit(found, json_, pairs("", {**found, "format": "a key, or whatever else has 32 bytes", "hint": hint}))
        return
    key: Any | None = read_key(place, insecure_key_file) if (place := only(key_file)) else None
    opened = open_model(path, "cpu", arch=arch_of(path, arch), trust=trust)
    meta, sealed, loaded = opened.meta, opened.sealed, opened.loaded
    extra: dict[str, Any]
    if loaded is None:
        extra = {"format": "ONNX", "input": list(opened.shape or ()), "outputs": opened.classes}
        if meta is not None:
            extra["serves"] = in_words(opened.serves, opened.doors) or "not recorded"
    else:
        extra = {
            "format": "torch",
            "architecture": loaded.architecture,
            "outputs": loaded.classes,
            "parameters": sum(parameter.numel() for parameter in loaded.net.parameters()),
        }
    fits, shut = None, meta is not None and meta.guarded and loaded is None and not opened.doors
    if key is not None:
        fits = meta is not None and key.id in meta.key_ids and not shut
    lost = meta is not None and meta.kind == "box" and meta.parameters.get("sealed") and not shut
    extra["sealed"] = "nothing, although it was made with something sealed" if lost else "nothing"
    if sealed:
        # a file with a damaged part is shown as well
        try:
            extra["sealed"] = f"{len(sealed) / 1e3:.0f} kB for {', '.join(readers(sealed, path.name))}"
            if key is not None and meta is not None and fits:
                inner = [
                    f"{found.architecture}, {found.meta.measured.get('top1', '?') if found.meta else '?'} % top-1"
                    for found in boxfile.unsealed(sealed, key, meta, path.name)
                ]
                extra["sealed"] = f"{'; '.join(inner)}; opened with this key"
        except BadInput as error:
            extra["sealed"] = error.message
    result = {"file": path.name, **extra, "metadata": box_fields(meta) if meta else None, "key_fits": fits}
    rows: dict[str, Any] = {"file": path.name, **extra}
    if meta is None:
        rows["metadata"] = "none (sdbctl did not write this file)"
    else:
        size = meta.preprocess.size
        rows |= {
            "kind": meta.kind,
            "architecture": meta.architecture,
            "classes": f"{len(meta.classes)}: {', '.join(meta.classes[:10])}{' …' if len(meta.classes) > 10 else ''}",
            "input": f"{size[0]}x{size[1]}x{size[2]}",
            "normalisation": f"mean {_short(meta.preprocess.mean)}, std {_short(meta.preprocess.std)}",
            "objective": meta.objective or "-",
            "key": f"{', '.join(meta.key_ids)}, λ = {meta.strength:g}" if meta.key_ids else "none",
            "data": f"{meta.data.get('name', '-')}",
            **({"hides": "nothing by itself: serve what export --key-file makes of it"} if opened.bare else {}),
            **({"opens": "to nobody: it looks for no key"} if shut else {}),
            **_figures(meta),
            "written by": ", ".join(f"{name} {value}" for name, value in meta.versions.items()),
        }
    if fits is not None:
        none = "opens nothing: this graph looks for none" if shut else "opens nothing: this file has no key"
        other = "does not fit" if meta is not None and meta.key_ids and not shut else none
        rows["this key"] = "fits" if fits else other
    emit(result, json_, pairs("", rows))


def _figures(meta: Metadata) -> dict[str, str]:
    """What was measured of a model; of a reference, what small students learned from each possible teacher."""
    what = "small students of the {}, %" if meta.kind == "reference" else "{}"
    # of what is guarded, who answers keys is the graph's to say
    left = ("seconds", *(("residual", "keyed_residual", "keyed_top1") if meta.guarded else ()))
    return {what.format(name): _short(value) for name, value in meta.measured.items() if name not in left}


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "/".join(map(_short, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
