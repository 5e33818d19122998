"""Model files of any kind, and the teachers that an evaluation makes of them."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sdbctl import boxfile, files, onnxfile
from sdbctl.boxfile import Loaded, Metadata, Unlocked, check_key, pattern
from sdbctl.cells import Source
from sdbctl.engine import pick_device, seeded
from sdbctl.errors import BadInput, UsageError
from sdbctl.gate import ASSISTANT, ITSELF, KeyGate
from sdbctl.gate import opened as opened_by
from sdbctl.key import Key, fingerprint, near, wrong
from sdbctl.models.graph import Graph
from sdbctl.patterns import fields
from sdbctl.suites import ASSISTANTS, NEAR_PERCENT, WITH_KEY
from sdbctl.teacher import OnnxTeacher
from sdbctl.wrappers import WRAPPERS, as_exported

ALIKE = 0.75
"""Share of random images for which weights must predict what a graph does that is said to hold them; some defences
change a prediction."""


@dataclass(frozen=True)
class Opened:
    """A model file, whatever its format.

    Attributes:
        path: Where it is.
        meta: What sdbctl wrote into it, or None.
        classes: Number of outputs.
        shape: Input (C, H, W), or None if the file does not say.
        loaded: Its torch network, or None for an ONNX file.
        served: Its ONNX session, or None.
        sealed: What only key holders can read, or "".
        serves: What an ONNX file of ours says that it serves to everybody, or "".
    """

    path: Path
    meta: Metadata | None
    classes: int
    shape: tuple[int, int, int] | None
    loaded: Loaded | None
    served: OnnxTeacher | None
    sealed: str
    serves: str = ""

    @classmethod
    def of(cls, path: Path, loaded: Loaded) -> Opened:
        """A file that was read as a torch network."""
        shape = loaded.meta.preprocess.size if loaded.meta else None
        return cls(path, loaded.meta, loaded.classes, shape, loaded, None, loaded.sealed)

    @property
    def doors(self) -> tuple[str, ...]:
        """Who answers each pattern of a key, if the file looks for them."""
        return self.meta.doors if self.meta else ()

    @property
    def bare(self) -> bool:
        """Whether it is the weights of a guarded box, which hide nothing."""
        return self.loaded is not None and self.meta is not None and self.meta.guarded

    def check_guard(self, *, keyed: bool) -> None:
        """Refuse a guarded box where nothing guards it.

        Args:
            keyed: Whether it is asked with a key.

        Raises:
            BadInput: Its bare weights are asked without a key, or a graph that looks for none with one.
        """
        if self.meta is None or not self.meta.guarded:
            return
        if self.bare and not keyed:
            raise BadInput(f"{self.path} hides nothing by itself", "use what export --key-file makes of it")
        if self.loaded is None and keyed and not self.doors:
            raise BadInput(f"{self.path} does not look for a key", "export it with --key-file")

    @property
    def recorded(self) -> str | None:
        """Name of the data set that it was made with."""
        return str(self.meta.data.get("name", "")) if self.meta else None


def open_model(path: Path, device: str, *, arch: str | None = None, trust: bool = False) -> Opened:
    """Read a box, a checkpoint or an ONNX file, ours or anybody's."""
    if onnxfile.is_onnx(path):
        served = OnnxTeacher(path, pick_device(device))
        said = onnxfile.properties(path)
        meta, sealed = boxfile.metadata_in(said, path.name), said.get(boxfile.SEALED_KEY, "")
        if meta and (len(meta.classes) != served.classes or served.shape != meta.preprocess.size):
            raise BadInput(f"{path} has metadata of another network's classes or images", "export it again")
        serves = said.get(boxfile.SERVES_KEY, "")
        if meta and "; to key holders " in serves:
            raise BadInput(f"{path} looks for its key as an earlier version did", "export it again")
        return Opened(path, meta, served.classes, served.shape, None, served, sealed, serves)
    return Opened.of(path, boxfile.load(path, arch=arch, trust=trust))


def stand_in(opened: Opened, held: Loaded, key: Key | None, device: torch.device, notes: list[str]) -> nn.Module | None:
    """The network in an ONNX file, as the file serves it, if ONNX Runtime cannot use the device.

    It is taken only if it computes what the file does, with and without what hides it, on random images, and on those
    with each key that a graph looks for.
    """
    served, meta = opened.served, opened.meta
    if served is None or meta is None or served.device.type == device.type:
        return None
    net, difference = None, math.inf
    # weights of another shape cannot even be asked, nor those of another version be served
    with contextlib.suppress(RuntimeError, ValueError, BadInput):
        proto, x = onnxfile.read(opened.path), _noise(served, meta)
        net = as_exported(held.net, meta, opened.serves, closed=bool(opened.doors))
        if net is not None and opened.doors:
            net = _gate(net, held, opened, key, onnxfile.constant(proto, "patterns"))
        if isinstance(net, KeyGate):
            x = torch.cat([x, net.mixed(x)])
        if net is not None:
            difference = onnxfile.parity(proto, net.eval(), x)
    if not difference <= onnxfile.PARITY_TOLERANCE:
        notes.append("ONNX Runtime cannot use CUDA here: the file was asked on the CPU.")
        return None
    notes.append("ONNX Runtime cannot use CUDA here: torch computed what the file does, as checked on random images.")
    return net


def _gate(public: nn.Module, held: Loaded, opened: Opened, key: Key | None, patterns: Tensor | None) -> KeyGate | None:
    """What a graph that looks for keys does, as far as who holds one of them can know."""
    meta = opened.meta
    if meta is None or patterns is None:
        return None
    open_to = opened.doors
    normalised = patterns.view(-1, len(open_to), *meta.preprocess.size)
    itself = held.net if meta.guarded else Unlocked(held.net, normalised[0, 0], meta.strength)
    known = {ITSELF: [itself], ASSISTANT: list[nn.Module]()}
    if ASSISTANT in open_to and key is not None:
        known[ASSISTANT] = [one.net for one in boxfile.unsealed(opened.sealed, key, meta, opened.path.name)]
    answers = []
    for who in open_to:
        if not known.get(who):
            return None
        answers.append(known[who].pop(0))
    return KeyGate(public, answers, meta.preprocess.undo(normalised), meta.strength, meta.preprocess)


def rebuilt(opened: Opened) -> nn.Module:
    """The network in an ONNX file, as somebody who has nothing else makes it out of the graph.

    Raises:
        UsageError: That is not possible, or the two predict other classes for random images.
    """
    assert opened.served is not None
    try:
        net = Graph(onnxfile.read(opened.path), opened.classes).eval()
        same = _agreement(net, opened.served, opened.meta) >= ALIKE
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, StopIteration):
        raise UsageError("the ONNX graph cannot be rebuilt in torch") from None
    if not same:
        raise UsageError("what was rebuilt of the ONNX graph predicts something else")
    return net


def _agreement(net: nn.Module, served: OnnxTeacher, meta: Metadata | None) -> float:
    """For how many random images a network predicts what a file does, as a share."""
    x = _noise(served, meta)
    with torch.no_grad():
        return float((net.eval()(x).argmax(1) == served.logits(x).argmax(1)).float().mean())


def _noise(served: OnnxTeacher, meta: Metadata | None) -> Tensor:
    """Random images [32, C, H, W] as a file wants them, the same in every run; half of them are smooth."""
    with seeded(0):
        x = torch.cat([torch.rand(16, *served.shape), fields(16, served.shape, torch.device("cpu"))])
    return meta.preprocess(x) if meta else x - 0.5


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

    Raises:
        BadInput: The key, the original or the reference is not that of the box, or cannot be compared with it.
    """
    boxed = _boxed(opened, key, device, notes, attack=attack)
    sources = {"boxed": boxed}
    if key is not None:
        sources |= _with_key(opened, boxed, key, notes)
    sources |= _originals(opened, original, reference, notes, arch=arch, trust=trust)
    undefended = sources.get("reference") or sources.get("original")
    if undefended is not None:
        sources |= {name: undefended.wrapped(name) for name in WRAPPERS}
    return sources


def _boxed(opened: Opened, key: Key | None, device: torch.device, notes: list[str], *, attack: bool) -> Source:
    """The model, and what whoever holds its file can train."""
    box, meta = opened.path, opened.meta
    opened.check_guard(keyed=False)
    boxed = Source(sha256=boxfile.identity(box))
    if opened.loaded is not None:
        if meta is not None and "flat_deviation" in meta.measured:
            notes.append("The bare weights were asked; the exported graph shows less: evaluate the ONNX file for that.")
        return replace(boxed, net=opened.loaded.net)
    beside, boxed = box.with_suffix(".safetensors"), replace(boxed, onnx=box)
    held, why = None, "is not there"
    if beside.exists():
        why = "is not what was exported"
        with contextlib.suppress(BadInput):
            held = boxfile.load(beside)
    assert opened.served is not None
    if opened.served.unasked:
        notes.append(
            f"The file has other outputs ({', '.join(opened.served.unasked)}), which nobody asked for here; "
            "attackers may."
        )
    if not opened.served.is_steady():
        notes.append(
            "The file answers an image otherwise when it is asked again, or with others: who asks often averages that, "
            "while each image was asked about once here."
        )
    if opened.doors:
        notes.append(
            f"The file looks for its key, and serves key holders {opened_by(opened.doors)}. It holds the pattern, and "
            "what answers it, which attacks on the file did not use."
        )
    alike = False
    if held is not None and _described(meta, held):
        # weights of another shape cannot even be asked
        with contextlib.suppress(RuntimeError, ValueError):
            alike = _agreement(held.net, opened.served, meta) >= ALIKE
    if held is not None and alike:
        known = held.meta.key_ids if held.meta else ()
        if key is not None and meta is not None and not meta.guarded and key.id not in known:
            notes.append(
                "The weights were made for other keys: who searches them is judged by the pattern of this one."
            )
        return replace(
            boxed, held=held.net, held_sha256=held.sha256, stand_in=stand_in(opened, held, key, device, notes)
        )
    if attack:
        try:
            boxed = replace(boxed, held=rebuilt(opened), held_sha256=f"{boxed.sha256} graph")
            notes.append(
                f"Attacks on the file train what the ONNX graph holds, since {beside.name} {why}: BatchNorm may be "
                "folded into its convolutions."
            )
        except UsageError as error:
            notes.append(f"Attacks on the file were left out: {error.message}, and {beside.name} {why}.")
    return boxed


def _described(meta: Metadata | None, held: Loaded) -> bool:
    """Whether what an ONNX file says of itself fits weights."""
    # a graph that looks for keys may be of what has none, or open to some of a box's only
    if meta is not None and meta.kind == "box" and not meta.objective:
        return held.sha256 == meta.original_sha256
    if meta is None or held.meta is None:
        return held.meta is None and (meta is None or meta.kind != "box")
    return held.meta == replace(meta, key_ids=held.meta.key_ids, doors=())


def _with_key(opened: Opened, boxed: Source, key: Key, notes: list[str]) -> dict[str, Source]:
    """The box with its key and with wrong ones, and what is sealed in its file."""
    meta = opened.meta
    if meta is None or meta.kind != "box":
        raise BadInput(f"{opened.path} is no box of sdbctl", "leave --key-file out, or make one with: sdbctl box")
    check_key(meta, key)
    opened.check_guard(keyed=True)
    count = max(1, len(opened.doors))
    if count > len(WITH_KEY):
        notes.append(f"Of {count} patterns of the key, only the first {len(WITH_KEY)} were asked with.")
    sources = {
        name: boxed.keyed(pattern(meta, key, door), meta.strength, key.id + (f" {door}" if door else ""))
        for door, name in enumerate(WITH_KEY[:count])
    }
    generator, secret = torch.Generator().manual_seed(1), key.pattern(meta.preprocess.size)
    patterns = {"wrong": wrong(secret, generator)}
    patterns |= {f"near_{percent}": near(secret, percent / 100, generator) for percent in NEAR_PERCENT}
    for name, other in patterns.items():
        sources[name] = boxed.keyed(meta.preprocess(other), meta.strength, fingerprint(other))
    if opened.sealed or meta.parameters.get("sealed"):
        try:
            helpers = boxfile.unsealed(opened.sealed, key, meta, opened.path.name)
            for name, helper in zip(ASSISTANTS, helpers, strict=False):
                sources[name] = Source(net=helper.net, sha256=helper.sha256)
        except BadInput as error:
            notes.append(f"Students of an assistant were left out: {error.message}.")
    return sources


def _originals(
    opened: Opened, original: Path | None, reference: Path | None, notes: list[str], *, arch: str | None, trust: bool
) -> dict[str, Source]:
    """The original and N_ft, which stands beside a box unless it is named."""
    box, meta, sources = opened.path, opened.meta, dict[str, Source]()
    if original is not None:
        same = meta.architecture if meta is not None and meta.kind == "box" else None
        loaded = boxfile.load(original, arch=arch or same, trust=trust)
        recorded = meta.original_sha256 if meta is not None else ""
        sources["original"] = _alike(opened, loaded, original, recorded, "the checkpoint that was boxed")
    if reference is None and meta is not None and meta.kind == "box":
        beside = box.with_suffix(".reference.safetensors")
        if beside.exists() and files.sha256(files.read(beside, "reference")) == meta.reference_sha256:
            reference = beside
        elif beside.exists():
            notes.append(f"{beside.name} is the reference of another box, and was left out.")
    if reference is not None:
        recorded = meta.reference_sha256 if meta is not None else ""
        sources["reference"] = _alike(opened, boxfile.load(reference), reference, recorded, "the reference of this box")
    elif meta is not None and original is not None:
        notes.append("Without the reference N_ft, costs are measured against the original as it was.")
    return sources


def _alike(opened: Opened, loaded: Loaded, path: Path, recorded: str, what: str) -> Source:
    """A network to compare with, which is ``what``, unless its hash is not the ``recorded`` one.

    Raises:
        BadInput: It is another, or has other classes or channels.
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
    if recorded and loaded.sha256 != recorded:
        raise BadInput(f"{path} is not {what}", "its hash is another")
    return Source(net=loaded.net, sha256=loaded.sha256)
