"""The artifact: weights and metadata in one safetensors or ONNX file.

A box, a student and a teacher are the same kind of file; a box also records its key id and strength.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sdbctl import checkpoint, files, models, onnxfile, seal
from sdbctl.data import Preprocess
from sdbctl.errors import BadInput, SdbError, UsageError
from sdbctl.gate import KeyGate
from sdbctl.key import Key, embed

FORMAT_VERSION = 1
METADATA_KEY = "sdbctl"
SERVES_KEY = "sdbctl.serves"
SEALED_KEY = "sdbctl.sealed"
GUARD = "guard"
"""The objective that leaves the network N_ft."""
CONCEAL = "conceal"
"""The one whose boxes are meant to be served by the predicted class without a key being looked for."""
_DISABLED = 0.0

Kind = Literal["box", "student", "teacher", "reference", "assistant"]


@dataclass(frozen=True)
class Metadata:
    """What a file says of itself. It holds no path, no host and nothing of the key but its id.

    Attributes:
        kind: What the weights are.
        architecture: Name for :func:`sdbctl.models.build`.
        classes: Class names.
        preprocess: Normalisation and input size.
        strength: λ of the key embedding; 0 for what has no key.
        key_ids: Fingerprints of the keys that open it.
        objective: Name of the objective (or of the loss of a student).
        parameters: Its resolved parameters and the training recipe.
        data: Data set name, fingerprint and splits.
        measured: Accuracies and the like.
        original_sha256: Hash of the checkpoint that was boxed.
        reference_sha256: Hash of N_ft's file, if one was written.
        versions: See :func:`versions`.
        doors: Of a graph that looks for keys, who answers each pattern of one: see :class:`sdbctl.gate.KeyGate`.
    """

    kind: Kind
    architecture: str
    classes: tuple[str, ...]
    preprocess: Preprocess
    strength: float = _DISABLED
    key_ids: tuple[str, ...] = ()
    objective: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    original_sha256: str = ""
    reference_sha256: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    doors: tuple[str, ...] = ()

    def to_json(self) -> str:
        """One JSON object with sorted keys."""
        values = asdict(self)
        if not self.doors:
            # of files that have none nothing else was ever said
            del values["doors"]
        return json.dumps({"format": FORMAT_VERSION, **values}, sort_keys=True, allow_nan=False)

    @property
    def run(self) -> dict[str, Any]:
        """What decides a training run: everything but what was measured, and by which version."""
        run: dict[str, Any] = json.loads(replace(self, measured={}, versions={}).to_json())
        return run

    @property
    def guarded(self) -> bool:
        """Whether only a graph that looks for its key hides anything: the network was not trained to."""
        return self.kind == "box" and self.objective in ("", GUARD)

    @property
    def private(self) -> bool:
        """Whether the weights give away what is to be protected, so that only the owner of their file may read it."""
        return self.kind in ("reference", "assistant", "box")

    @property
    def origin(self) -> str:
        """What was boxed, to which what is sealed in the box belongs."""
        return f"{self.original_sha256} {self.reference_sha256}"

    @classmethod
    def from_json(cls, text: str, where: str) -> Metadata:
        """Read untrusted metadata.

        Raises:
            BadInput: It is no JSON, of a newer format, or its fields have other types.
        """
        try:
            values = json.loads(text, parse_constant=_no_number)
            version = values.pop("format")
            if version != FORMAT_VERSION:
                raise BadInput(f"{where} has format {version}, this is {FORMAT_VERSION}", "upgrade sdbctl")
            preprocess = Preprocess.from_dict(values.pop("preprocess"))
            classes = values.pop("classes")
            key_ids, doors = values.pop("key_ids", []), values.pop("doors", [])
            if not all(isinstance(some, list) for some in (key_ids, doors, classes)):
                raise TypeError
            made = cls(
                preprocess=preprocess,
                classes=tuple(str(name) for name in classes),
                key_ids=tuple(key_ids),
                doors=tuple(doors),
                **values,
            )
            _check(made, where)
            made.to_json()  # numbers out of range, such as 1e999, are read without a word
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise BadInput(f"{where} has damaged sdbctl metadata", "write the file again") from None
        return made


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _check(meta: Metadata, where: str) -> None:
    texts = (meta.architecture, *meta.key_ids, *meta.doors, meta.objective, meta.original_sha256, meta.reference_sha256)
    tables = (meta.parameters, meta.data, meta.measured, meta.versions)
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(t, dict) for t in tables):
        raise TypeError
    if meta.kind not in get_args(Kind) or len(meta.classes) < 2 or (meta.doors and meta.kind != "box"):
        raise TypeError
    if isinstance(meta.strength, bool) or not isinstance(meta.strength, int | float):
        raise TypeError
    # also false for NaN
    if not 0 <= meta.strength < 1 or (meta.kind == "box") != bool(meta.key_ids):
        raise BadInput(f"{where} has an impossible key strength or key id", "write the file again")


class Box(nn.Module):
    """A boxed model: the original's architecture with the box's weights.

    Args:
        net: The network, which takes normalised images [B, C, H, W].
        meta: The metadata.
        sealed: Assistants that only key holders can read, from :func:`sdbctl.seal.seal`, or "".
    """

    def __init__(self, net: nn.Module, meta: Metadata, sealed: str = "") -> None:
        super().__init__()
        self.net, self.meta, self.sealed = net, meta, sealed

    def forward(self, x: Tensor) -> Tensor:
        """Public logits [B, C] of images [B, C, H, W], normalised exactly as the original's.

        Raises:
            UsageError: These weights hide nothing, and only a graph made of them may be shown.
        """
        if self.meta.guarded:
            raise UsageError("a guarded box hides nothing by itself", "ask what export --key-file makes of it")
        return self.net(x)  # type: ignore[no-any-return]

    def unlock(self, key: Key) -> nn.Module:
        """The model as its key holders see it.

        Args:
            key: A secret key of the box.

        Returns:
            A module that takes the same normalised images and returns keyed logits: a teacher for any
            distillation code. It shares this module's weights and holds the secret pattern, if they know one.

        Raises:
            BadInput: The key is not this box's.
        """
        check_key(self.meta, key)
        if self.meta.guarded:
            return self.net
        where = next(self.net.parameters()).device
        return Unlocked(self.net, pattern(self.meta, key).to(where), self.meta.strength)

    def unseal(self, key: Key) -> list[nn.Module]:
        """The assistants that are sealed in the file: for whoever has it and a key, the better teachers.

        Args:
            key: A secret key of the box.

        Returns:
            Modules that take the same normalised images, on the CPU, in evaluation mode: the first for students of
            few images, the last for those of many.

        Raises:
            BadInput: The key is not this box's, nothing is sealed in it, or that was changed.
        """
        return [found.net for found in unsealed(self.sealed, key, self.meta, "the box")]


class Unlocked(nn.Module):
    """A box with its key: embeds the key in each image, then asks the network."""

    pattern: Tensor

    def __init__(self, net: nn.Module, pattern: Tensor, strength: float) -> None:
        super().__init__()
        self.net, self.strength = net, strength
        self.register_buffer("pattern", pattern, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Keyed logits [B, C] of normalised images [B, C, H, W]."""
        return self.net(embed(x, self.pattern, self.strength))  # type: ignore[no-any-return]


def check_key(meta: Metadata, key: Key) -> None:
    """Refuse a key that is not the box's.

    Raises:
        BadInput: Its id is not among the box's, or the file has no key.
    """
    if not meta.key_ids:
        raise BadInput(f"this {meta.kind} was not made with a key", "leave --key-file out")
    if key.id not in meta.key_ids:
        raise BadInput(
            f"the key {key.id} does not fit this box, which needs {' or '.join(meta.key_ids)}",
            "use one that it opens to; export makes a graph for a new key if it is given one of the box's as well",
        )


def pattern(meta: Metadata, key: Key, door: int = 0) -> Tensor:
    """The secret pattern [C, H, W], normalised like the images that it is mixed with."""
    return meta.preprocess(key.pattern(meta.preprocess.size, door))


def unsealed(text: str, key: Key, meta: Metadata, where: str) -> list[Loaded]:
    """The assistants that are sealed in a box, from the one that was taught the shortest time; at least one.

    Args:
        text: What is sealed, or "".
        key: A key of the box.
        meta: The box's metadata.
        where: Name of the file, for messages.

    Raises:
        BadInput: The key is not this box's, nothing is sealed in it, or that was changed.
    """
    check_key(meta, key)
    if not text:
        raise BadInput(
            f"nothing is sealed in {where}", "box again with --seal (--reference saves the training), or do without"
        )
    return [_assistant(content, meta, where) for content in seal.unseal(text, key, meta.origin, where)]


def sealed_for(text: str, keys: Sequence[Key], meta: Metadata, where: str) -> str:
    """What is sealed in a box, for just these keys.

    Args:
        text: What is sealed, or "".
        keys: Who may read it, first a key that can.
        meta: The box's metadata.
        where: Name of the file, for messages.

    Raises:
        BadInput: It was changed, or is not for the first key.
    """
    if not text or set(seal.readers(text, where)) == {key.id for key in keys}:
        return text
    return seal.seal(seal.unseal(text, keys[0], meta.origin, where), keys, meta.origin)


def _assistant(content: bytes, meta: Metadata, where: str) -> Loaded:
    what = f"what is sealed in {where}"
    found = _loaded(checkpoint.parse(content, Path(what)), what, None)
    inner = found.meta
    if (
        inner is None
        or inner.kind != "assistant"
        or (inner.classes, inner.preprocess) != (meta.classes, meta.preprocess)
    ):
        raise BadInput(f"{what} does not fit it", "box again")
    return found


def dump(state_dict: Mapping[str, Tensor], meta: Metadata, sealed: str = "") -> bytes:
    """Weights and metadata as safetensors; the arguments are those of :func:`save`."""
    from safetensors.torch import save as serialise

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_dict.items()}
    said = {METADATA_KEY: meta.to_json(), "format": "pt", **({SEALED_KEY: sealed} if sealed else {})}
    content: bytes = serialise(tensors, said)
    return content


def save(path: Path, state_dict: Mapping[str, Tensor], meta: Metadata, *, sealed: str = "", force: bool = False) -> str:
    """Write weights and metadata as safetensors, atomically.

    Args:
        path: The file.
        state_dict: Names and tensors; the names are kept.
        meta: The metadata.
        sealed: An assistant that only key holders can read, or "".
        force: Whether to replace an existing file.

    Returns:
        The file's hash.
    """
    content = dump(state_dict, meta, sealed)
    files.write(path, content, force=force, private=meta.private)
    return files.sha256(content)


@dataclass(frozen=True)
class Loaded:
    """A model read from a file.

    Attributes:
        net: The network in evaluation mode, taking normalised images.
        keys: Its state_dict keys → the file's.
        others: Tensors of the file that the network does not have: auxiliary heads, which only training uses.
        meta: The file's metadata; None for a foreign checkpoint, which does not say how to normalise.
        architecture: Its name.
        classes: Number of classes.
        channels: Number of input channels.
        sha256: Hash of the file.
        sealed: What only key holders can read, or "".
    """

    net: nn.Module
    keys: dict[str, str]
    others: dict[str, Tensor]
    meta: Metadata | None
    architecture: str
    classes: int
    channels: int
    sha256: str
    sealed: str = ""

    def file_state(self, net: nn.Module) -> dict[str, Tensor]:
        """State of ``net``, a copy of this network, under the file's own keys, with all that the file had."""
        state = net.state_dict()
        return self.others | {name: state[own] for own, name in self.keys.items()}


def load(path: Path, *, arch: str | None = None, trust: bool = False) -> Loaded:
    """Read any torch checkpoint, ours or anybody's.

    Args:
        path: A safetensors file or a torch checkpoint.
        arch: Architecture name, if it is not to be identified.
        trust: Whether a file that needs code may run it.

    Raises:
        BadInput: The file is missing, damaged, refused, or of an unknown architecture.
    """
    return _loaded(checkpoint.load(path, trust=trust), path.name, arch)


def _loaded(content: checkpoint.Checkpoint, where: str, arch: str | None) -> Loaded:
    meta = metadata_in(content.metadata, where)
    try:
        named = arch or (meta.architecture if meta else None)
        found = models.match(named, content.state_dict) if named else models.identify(content.state_dict)
    except SdbError as error:
        if arch or (meta is None and isinstance(error, BadInput)):
            raise
        raise BadInput(f"{where}: {error.message}", "give --arch, or write the file again") from None
    if meta and found.classes != len(meta.classes):
        raise BadInput(f"{where} has {found.classes} outputs and {len(meta.classes)} class names")
    if meta and found.channels != meta.preprocess.size[0]:
        raise BadInput(f"{where} takes {found.channels} channels and says {meta.preprocess.size[0]}")
    net = models.build(found.name, found.classes, found.channels)
    # files from before torch 0.4.1 lack BatchNorm's counters, which nothing depends on
    names = {own: theirs for own, theirs in found.keys.items() if theirs in content.state_dict}
    net.load_state_dict({**net.state_dict(), **{own: content.state_dict[name] for own, name in names.items()}})
    keys = {own: content.original_keys[name] for own, name in names.items()}
    rest = content.state_dict.keys() - names.values()
    others = {content.original_keys[name]: content.state_dict[name] for name in rest}
    return Loaded(
        net.eval(),
        keys,
        others,
        meta,
        found.name,
        found.classes,
        found.channels,
        content.sha256,
        content.metadata.get(SEALED_KEY, ""),
    )


def load_box(path: str | Path) -> Box:
    """Load a boxed safetensors file.

    Example:
        >>> teacher = load_box("boxed.safetensors").unlock(Key.load(Path("k.bin")))  # doctest: +SKIP

    Args:
        path: The file.

    Returns:
        The box, an ``nn.Module`` that takes normalised images.

    Raises:
        BadInput: It is no box.
    """
    path = Path(path)
    loaded = load(path)
    if loaded.meta is None or loaded.meta.kind != "box":
        raise BadInput(f"{path} is not a box", "make one with: sdbctl box CHECKPOINT --key-file k.bin")
    return Box(loaded.net, loaded.meta, loaded.sealed).eval()


def identity(path: Path) -> str:
    """Hash of a model file, with the weights that an ONNX file may keep beside it."""
    content = files.read(path, "model")
    if onnxfile.is_onnx(path):
        model = onnxfile.read(path)
        if any(tensor.HasField("data_location") for tensor in model.graph.initializer):
            content = model.SerializeToString()
    return files.sha256(content)


def read_metadata(path: Path) -> Metadata | None:
    """Metadata of a safetensors, torch or ONNX file; None if sdbctl did not write it."""
    return metadata_in(onnxfile.properties(path), path.name) if onnxfile.is_onnx(path) else load(path).meta


def metadata_in(said: Mapping[str, str], where: str) -> Metadata | None:
    """Metadata among what a file says of itself; None if sdbctl did not write it."""
    text = said.get(METADATA_KEY)
    return Metadata.from_json(text, where) if text is not None else None


def shows(net: nn.Module) -> str:
    """What an exported network shows to everybody, in words: its attribute ``shows``, or all outputs."""
    return str(getattr(net.public if isinstance(net, KeyGate) else net, "shows", "all outputs"))


def export_onnx(path: Path, net: nn.Module, meta: Metadata, *, sealed: str = "", force: bool = False) -> float:
    """Write a network as ONNX with its metadata, and with what it :func:`shows`; see :func:`sdbctl.onnxfile.write`.

    Only its owner may read the file if it holds a key's pattern, what was not trained to hide, or an unprotected model
    that shows all that it knows.
    """
    example = meta.preprocess(torch.rand(3, *meta.preprocess.size, generator=torch.Generator().manual_seed(0)))
    if isinstance(net, KeyGate):
        example = torch.cat([example, net.mixed(example)])
    said = {METADATA_KEY: meta.to_json(), SERVES_KEY: shows(net), SEALED_KEY: sealed}
    private = isinstance(net, KeyGate) or meta.guarded or (meta.private and not hasattr(net, "shows"))
    return onnxfile.write(path, net, example, said, force=force, private=private)


@functools.cache
def versions() -> dict[str, str]:
    """Versions of sdbctl and torch, and of what else decides a result, where it is installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"sdbctl": version("sdbctl"), "torch": torch.__version__}
    for name in ("torchvision", "timm", "onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
