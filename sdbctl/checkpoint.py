"""Any torch checkpoint → a plain state_dict, without running code from it."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdbctl import files
from sdbctl.errors import BadInput

_WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "teacher",
    "params",
    "weights",
    "ema",
    "module",
)
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.", "_forward_module.")
_MODULE_PACKAGES = ("torch.nn.", "torchvision.models.", "torchvision.ops.")
_BESIDE = re.compile(
    r"argparse\.Namespace|numpy\.(dtype|ndarray|dtypes\.\w+DType)|numpy\._?core\.multiarray\.(scalar|_reconstruct)"
)
"""What training scripts keep beside the weights; of it nothing is needed."""


class _Inert:
    """Stands for an object of a pickle whose class is not called, lest what a stranger wrote is computed."""

    def __init__(self, *args: object, **options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _Module(_Inert):
    """Stands for a pickled ``nn.Module``, of which only the tensors are kept."""

    _own: Mapping[str, Tensor] = {}
    _inner: Mapping[str, object] = {}

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            return
        parts = [state.get(name) or {} for name in ("_parameters", "_buffers", "_modules")]
        parameters, buffers, modules = (dict(part) if isinstance(part, dict) else {} for part in parts)
        passing = state.get("_non_persistent_buffers_set")
        kept = {name: value for name, value in buffers.items() if not isinstance(passing, set) or name not in passing}
        self._own = {name: value for name, value in (parameters | kept).items() if isinstance(value, Tensor)}
        self._inner = modules

    def state_dict(self) -> dict[str, Tensor]:
        """Names → tensors, as of a real one.

        Raises:
            ValueError: A module holds itself, or there are too many.
        """
        found, ahead, count = dict[str, Tensor](), list[tuple[str, _Module, tuple[int, ...]]]([("", self, ())]), 0
        while ahead:
            prefix, module, holders = ahead.pop()
            count += 1
            if id(module) in holders or count > MODULES:
                raise ValueError
            found |= {prefix + name: value for name, value in module._own.items()}
            inner = [(f"{prefix}{name}.", one) for name, one in module._inner.items() if isinstance(one, _Module)]
            ahead += [(name, one, (*holders, id(module))) for name, one in reversed(inner)]
        return found


BROADCAST = 2**24
"""Bytes up to which a tensor may repeat fewer numbers."""
MODULES = 10_000
"""Modules at most of a pickled network."""
LEGACY = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")
"""What torch's files of the old format begin with, behind the opcodes."""
OTHERS = {
    b"PK": "a zip file that torch did not write",
    b"\x80": "a pickle that torch did not write",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
}
"""What is often taken for a checkpoint, by how it begins."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights read from a file.

    Attributes:
        state_dict: Bare names → tensors on the CPU; floating point ones in float32.
        original_keys: Bare names → names in the file.
        sha256: Hash of the file.
        metadata: Of a safetensors file; empty otherwise.
    """

    state_dict: dict[str, Tensor]
    original_keys: dict[str, str]
    sha256: str
    metadata: dict[str, str]


def load(path: Path, *, trust: bool = False) -> Checkpoint:
    """Read a checkpoint by its content, whatever its name.

    Args:
        path: A safetensors file, a torch file with a state_dict in one of the usual wrappers, or a pickled
            ``nn.Module`` of torch or torchvision classes.
        trust: Whether a file that needs code may run it.

    Raises:
        BadInput: The file is missing or damaged, has no usable weights, or would have to run code.
    """
    return parse(files.read(path, "checkpoint"), path, trust=trust)


def parse(content: bytes, path: Path, *, trust: bool = False) -> Checkpoint:
    """Read what a checkpoint file holds; ``path`` only names it in messages. See :func:`load`."""
    metadata: dict[str, str] = {}
    if _is_safetensors(content):
        found, metadata = _read_safetensors(content, path)
    else:
        found = _read_torch(content, path, trust)
    try:
        tensors = _unwrap(found, path)
    except (AttributeError, TypeError, ValueError):
        raise BadInput(f"{path} holds a damaged network", "save model.state_dict()") from None
    bare = _strip(tensors)
    clean = {name: _clean(name, tensors[key], path) for name, key in bare.items()}
    return Checkpoint(clean, bare, files.sha256(content), metadata)


def _is_safetensors(content: bytes) -> bool:
    return len(content) > 8 and content[8:9] == b"{" and int.from_bytes(content[:8], "little") < 2**27


def _read_safetensors(content: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    import json

    from safetensors.torch import load as parse

    try:
        tensors = parse(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except Exception:
        raise BadInput(f"{path} is a damaged safetensors file", "it was probably cut off; get it again") from None
    return tensors, dict(header.get("__metadata__") or {})


def _read_torch(content: bytes, path: Path, trust: bool) -> Any:
    archive = _archive(content, path)
    kind = None
    if any(record.filename.endswith("constants.pkl") for record in archive):
        kind = "a TorchScript program"
    elif any(record.filename.endswith((".json", "archive_format")) for record in archive):
        kind = "an exported program (.pt2)"
    if kind is not None:
        if not trust:
            raise BadInput(
                f"{path} is {kind}, which runs code when it is loaded",
                "save its state_dict instead, or use --trust if you made it",
            )
        return _trusted(content, path, kind)
    # of these torch compresses nothing, and so a small file cannot become a large one
    if sum(record.file_size for record in archive) > len(content):
        raise BadInput(f"{path} is compressed, which torch's files are not", "save the state_dict again")
    stream = io.BytesIO(content)
    try:
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(stream)
    except Exception:
        wanted = []
    known = {name: _stand_in(name) for name in wanted}
    refused = [name for name, found in known.items() if found is None]
    allowed: list[Any] = [(found, name) for name, found in known.items() if found is not None]
    if refused and not trust:
        raise BadInput(
            f"{path} would run {', '.join(refused[:3])}{' …' if len(refused) > 3 else ''} to be loaded",
            "save its state_dict instead, or use --trust if you made it",
        )
    if refused:
        return _trusted(content, path, "a pickle")
    stream.seek(0)
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception:
        begun = _pickle(content)
        if begun and trust:
            # torch does not list what it would run of files of its older format and of other protocols
            return _trusted(content, path, "a pickle")
        raise _unreadable(content, path, begun) from None


def _pickle(content: bytes) -> bytes:
    """How the pickle begins that torch wrote into a file; nothing of what torch did not write."""
    if content[:2] != b"PK":
        return content[:2] if LEGACY in content[:32] else b""
    with contextlib.suppress(Exception), zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))[:2]
    return b""


def _unreadable(content: bytes, path: Path, begun: bytes) -> BadInput:
    """What is said of a file that cannot be read without running code, or not at all; see :func:`_pickle`."""
    if begun:
        what, how = "holds more than tensors, or is damaged", "again"
        if begun not in (b"\x80\x02", b"\x80\x03"):
            what, how = "was saved with another pickle protocol than torch's own", "without pickle_protocol"
        elif content[:2] != b"PK":
            what = "is of torch's old format and holds more than tensors, or is cut off"
        return BadInput(
            f"{path} {what}", f"save its state_dict {how}, or use --trust if you made it: it runs whatever it holds"
        )
    if path.suffix.lower() == ".onnx":
        return BadInput(f"{path} is an ONNX file, and weights are needed", "give the safetensors")
    what = next((kind for start, kind in OTHERS.items() if content.startswith(start)), "not a readable checkpoint")
    return BadInput(f"{path} is {what}", "save model.state_dict() with torch.save, or get the file again")


def _archive(content: bytes, path: Path) -> list[zipfile.ZipInfo]:
    if content[:2] != b"PK":
        return []
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        raise BadInput(f"{path} is a damaged checkpoint", "it was probably cut off; get it again") from None


def _stand_in(name: str) -> type[_Inert] | None:
    """What is made instead of the objects of a class that a pickle names; None of one that it must not name.

    Nothing but modules of torch.nn and torchvision is imported to look for it, whatever the file names.
    """
    if _BESIDE.fullmatch(name):
        return _Inert
    module, _, attribute = name.rpartition(".")
    if not f"{module}.".startswith(_MODULE_PACKAGES):
        return None
    import torchvision  # noqa: F401

    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        return None
    return _Module if isinstance(found, type) and issubclass(found, nn.Module) else None


def _trusted(content: bytes, path: Path, kind: str) -> Any:
    try:
        if "TorchScript" in kind:
            return dict(torch.jit.load(io.BytesIO(content), map_location="cpu").state_dict())  # type: ignore[no-untyped-call]
        if ".pt2" in kind:
            return dict(torch.export.load(io.BytesIO(content)).state_dict)
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=False)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:100]
        raise BadInput(f"{path} cannot be loaded: {type(error).__name__}: {reason}") from None


def _unwrap(found: Any, path: Path) -> dict[str, Tensor]:
    for _ in range(4):
        if isinstance(found, nn.Module | _Module):
            found = found.state_dict()
        if not isinstance(found, Mapping):
            break
        tensors = {key: value for key, value in found.items() if isinstance(value, Tensor)}
        inner = next(
            (
                found[key]
                for key in _WRAPPERS
                if isinstance(found.get(key), Mapping | nn.Module | _Module) and found[key]
            ),
            None,
        )
        if inner is None or len(tensors) > 3:
            if not tensors:
                break
            if not all(isinstance(key, str) for key in tensors):
                break
            return tensors
        found = inner
    raise BadInput(f"{path} holds no state_dict ({type(found).__name__})", "save model.state_dict()")


def _strip(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Bare names → names in the file, without the prefixes that every name has."""
    names = {key: key for key in tensors}
    changed = True
    while changed:
        changed = False
        for prefix in _PREFIXES:
            if names and all(name.startswith(prefix) for name in names):
                names = {name[len(prefix) :]: key for name, key in names.items()}
                changed = True
    return names


def _clean(name: str, tensor: Tensor, path: Path) -> Tensor:
    # attributes that a file gives it do not stand for methods
    tensor = Tensor.detach(tensor)
    if (
        tensor.layout != torch.strided
        or tensor.is_nested
        or tensor.is_meta
        or tensor.is_quantized
        or tensor.is_complex()
        # a few numbers can pretend to be any number of them
        or tensor.numel() * tensor.element_size() > max(BROADCAST, tensor.untyped_storage().nbytes())
    ):
        raise BadInput(f"{name} in {path} is no plain tensor", "save a float state_dict")
    if tensor.is_floating_point():
        tensor = tensor.float()
        if not torch.isfinite(tensor).all():
            raise BadInput(f"{name} in {path} holds NaN or infinite weights", "train it again, or take an older one")
    return tensor.cpu().contiguous().clone()
