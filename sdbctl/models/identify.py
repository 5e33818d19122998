"""Recognise a network by the names and shapes of its weights."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdbctl.errors import BadInput, UsageError

Shape = tuple[int, ...]
_COUNTER = "num_batches_tracked"

# other people's names for the same parts → one spelling, applied to both sides
_SPELLINGS = (
    (r"^block(\d)\.", r"layer\1."),
    (r"\.layer\.(\d)", r".\1"),
    (r"\b(downsample|conv_?[sS]hortcut|skip)\b", "shortcut"),
    (r"\bshortcut\.weight$", "shortcut.0.weight"),
    (r"^(fc|linear|classifier|head|output|last_linear|logits)\.(weight|bias)$", r"head.\2"),
)
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")


@dataclass(frozen=True)
class Identified:
    """A recognised network.

    Attributes:
        name: For :func:`sdbctl.models.build`.
        classes: Number of outputs.
        channels: Number of input channels.
        keys: The built network's state_dict keys → the checkpoint's.
    """

    name: str
    classes: int
    channels: int
    keys: dict[str, str]


def identify(state: Mapping[str, Tensor]) -> Identified:
    """Find the network whose weights these are.

    Args:
        state: Bare state_dict, without wrappers' prefixes.

    Raises:
        BadInput: No known network fits.
    """
    shapes = _shapes(state)
    for name in _candidates(shapes):
        found = _match(name, shapes)
        if isinstance(found, Identified):
            return found
    first = ", ".join(list(shapes)[:3])
    raise BadInput(
        f"unknown architecture: {len(shapes)} tensors, the first are {first}",
        "name it with --arch (sdbctl list students); others cannot be boxed, but distill and eval take them as ONNX",
    )


def match(name: str, state: Mapping[str, Tensor]) -> Identified:
    """Check that a checkpoint is of the named architecture.

    Raises:
        BadInput: It is not; says which weight does not fit.
        UsageError: The name is unknown.
    """
    found = _match(name, _shapes(state))
    if isinstance(found, str):
        raise BadInput(f"the checkpoint is no {name}: {found}", "name another --arch, or leave it out")
    return found


def _shapes(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {key: tuple(tensor.shape) for key, tensor in state.items() if not key.endswith(_COUNTER)}


def _candidates(shapes: Mapping[str, Shape]) -> Iterator[str]:
    """Own networks of the right number of tensors, the one WRN that these shapes allow, then torchvision's."""
    from sdbctl import models

    for name in models.OWN:
        if len(_template(name)) == len(shapes):
            yield name
    convolutions = [shape for shape in shapes.values() if len(shape) == 4]
    linear = [shape for shape in shapes.values() if len(shape) == 2]
    if len(linear) == 1 and linear[0][1] % 64 == 0 and len(convolutions) > 6:
        width, blocks = linear[0][1] // 64, (len(convolutions) - 3) // 6
        yield f"wrn-{6 * blocks + 4}-{width}"
    import torchvision.models as tv

    regnet = any(key.startswith("trunk_output.") for key in shapes)
    names = [name for name in tv.list_models(module=tv) if name.startswith("regnet") == regnet]
    yield from sorted(names, key=lambda name: (not name.startswith("resnet"), name))


@functools.cache
def _template(name: str, classes: int = 10, channels: int = 3) -> dict[str, Shape]:
    """Names and shapes of a network's weights, in order of definition, without memory or time for them."""
    return _shapes(_skeleton(name, classes, channels).state_dict())


def _skeleton(name: str, classes: int, channels: int) -> nn.Module:
    from sdbctl import models

    try:
        with torch.device("meta"):
            return models.build(name, classes, channels)
    except NotImplementedError:  # torchvision's RegNets compute their widths with tensors
        return models.build(name, classes, channels)


def _match(name: str, shapes: Mapping[str, Shape]) -> Identified | str:
    """The match, or a sentence on the first thing that does not fit."""
    template = _template(name)
    kept = {key: shape for key, shape in shapes.items() if not key.startswith(_AUXILIARY)}
    if len(template) != len(kept):
        return f"it has {len(kept)} weights, {name} has {len(template)}"
    names = _by_name(template, kept) or _by_place(template, kept)
    if names is None:
        missing = next((key for key in template if key not in kept), "")
        return f"it lacks {missing}" if missing else "the order of its weights differs"
    head = next(key for key in reversed(template) if template[key][0] == 10)
    stem = next((key for key, shape in template.items() if len(shape) == 4), None)
    classes = next(iter(kept[names[head]]), 0)
    channels = kept[names[stem]][1] if stem and len(kept[names[stem]]) == 4 else 3
    if classes < 2:
        return f"it has {classes} outputs"
    try:
        exact = _template(name, classes, channels)
    except UsageError as error:
        return error.message
    for key, shape in exact.items():
        if kept[names[key]] != shape:
            return f"{names[key]} is {list(kept[names[key]])}, {name} has {list(shape)}"
    for key in _skeleton(name, classes, channels).state_dict():
        if key.endswith(_COUNTER):
            base = names[key.replace(_COUNTER, "running_mean")]
            names[key] = base.removesuffix("running_mean") + _COUNTER
    return Identified(name, classes, channels, names)


def _by_name(template: Mapping[str, Shape], shapes: Mapping[str, Shape]) -> dict[str, str] | None:
    spelled = {_spell(key): key for key in shapes}
    names = {key: key if key in shapes else spelled.get(_spell(key), "") for key in template}
    return names if all(names.values()) and len(set(names.values())) == len(names) else None


def _by_place(template: Mapping[str, Shape], shapes: Mapping[str, Shape]) -> dict[str, str] | None:
    """Pair weights in order of definition, if kinds and sizes agree all along (the head may differ)."""
    pairs = list(zip(template.items(), shapes.items(), strict=True))
    for (own, expected), (other, found) in pairs:
        if own.rsplit(".", 1)[-1] != other.rsplit(".", 1)[-1] or len(expected) != len(found):
            return None
        if expected != found and 10 not in expected and expected[1:2] != (3,):
            return None
    return {own: other for (own, _), (other, _) in pairs}


def _spell(key: str) -> str:
    for pattern, replacement in _SPELLINGS:
        key = re.sub(pattern, replacement, key)
    return key
