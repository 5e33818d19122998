"""Dataclasses to JSON and back, strictly, and the JSON Schema that says the same."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import types
from collections.abc import Mapping
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, NoReturn, TypeVar, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")
_NAMES = {float: "number", int: "integer", str: "string", bool: "boolean"}


def encode(value: object) -> object:
    """Turn dataclasses, mappings and sequences into what JSON knows.

    Numbers that are not finite become null, and half a surrogate pair becomes "?".
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: encode(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {encode(str(name)): encode(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [encode(inner) for inner in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    raise TypeError(f"a report cannot hold a {type(value).__name__}")


def parse(text: str | bytes) -> object:
    """Read JSON, without the NaN and Infinity that Python would add to it.

    Raises:
        ValueError: It is not JSON.
    """
    return json.loads(text, parse_constant=_not_finite)


def _not_finite(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def decode(kind: type[T], value: object, path: str = "") -> T:
    """Build a ``kind`` from parsed JSON; nothing may be missing, added, or of another type.

    Args:
        kind: A dataclass, or the type of one of its fields.
        value: The parsed JSON.
        path: Where it stands, for the message.

    Raises:
        ValueError: It does not fit.
    """
    return cast("T", _decode(kind, value, path))


def _decode(kind: Any, value: object, path: str) -> object:
    optional = _optional(kind)
    if optional is not None:
        return None if value is None else _decode(optional, value, path)
    if _is_dataclass(kind):
        content = _typed(dict, value, path, "an object")
        fields = _fields(kind)
        for name in fields.keys() - content.keys():
            raise ValueError(f"{_join(path, name)} is missing")
        for name in content.keys() - fields.keys():
            raise ValueError(f"{_join(path, name[:60])} is unknown")
        return kind(**{name: _decode(inner, content[name], _join(path, name)) for name, inner in fields.items()})
    origin = get_origin(kind)
    if origin is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{path} is not one of {', '.join(get_args(kind))}")
        return value
    if origin is tuple:
        inner = get_args(kind)[0]
        items = _typed(list, value, path, "a list")
        return tuple(_decode(inner, item, f"{path}.{index}") for index, item in enumerate(items))
    if origin is dict:
        inner = get_args(kind)[1]
        content = _typed(dict, value, path, "an object")
        return {name: _decode(inner, item, _join(path, name)) for name, item in content.items()}
    if kind is float:
        number = _typed((int, float), value, path, "a number")
        if abs(number) > 1e300:
            raise ValueError(f"{path} is too large")
        return float(number)
    return value if kind is object else _typed(kind, value, path, f"of type {_NAMES[kind]}")


def _typed(kind: Any, value: object, path: str, words: str) -> Any:
    """``value``, if it is a ``kind``; True is not a number."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{path or 'it'} is not {words}")
    return value


def _join(path: str, name: str) -> str:
    """A path for messages, which must stay on one line whatever the name."""
    name = name if name.isidentifier() else repr(name)[:60]
    return f"{path}.{name}" if path else name


def _optional(kind: Any) -> Any:
    """``X`` for ``X | None``, otherwise None."""
    if not isinstance(kind, types.UnionType):
        return None
    return next(inner for inner in get_args(kind) if inner is not types.NoneType)


def _is_dataclass(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind)


@cache
def _fields(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {item.name: hints[item.name] for item in dataclasses.fields(kind)}


def schema(kind: type) -> dict[str, object]:
    """The JSON Schema that accepts what ``encode`` makes of a ``kind``."""
    definitions: dict[str, object] = {}
    root = _schema(kind, definitions)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "$defs": definitions}


def _schema(kind: Any, definitions: dict[str, object]) -> dict[str, object]:
    optional = _optional(kind)
    if optional is not None:
        return {"type": [_NAMES[optional], "null"]}
    if _is_dataclass(kind):
        name = kind.__name__
        if name not in definitions:
            fields = {item: _schema(inner, definitions) for item, inner in _fields(kind).items()}
            if "schema_version" in fields:
                fields["schema_version"] = {"const": kind.schema_version}
            definitions[name] = {
                "description": (inspect.getdoc(kind) or "").partition("\n")[0],
                "type": "object",
                "properties": fields,
                "required": list(fields),
                "additionalProperties": False,
            }
        return {"$ref": f"#/$defs/{name}"}
    origin = get_origin(kind)
    if origin is Literal:
        return {"enum": list(get_args(kind))}
    if origin is tuple:
        return {"type": "array", "items": _schema(get_args(kind)[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(get_args(kind)[1], definitions)}
    return {} if kind is object else {"type": _NAMES[kind]}
