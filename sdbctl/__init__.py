"""sdbctl: put a trained image classifier into a Safe Distillation Box, and measure what an attacker gets.

The names below load on first use, so that importing this package stays cheap. The jobs themselves are
``sdbctl.box.box``, ``sdbctl.distill.distill`` and ``sdbctl.evaluate.evaluate``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdbctl.boxfile import Box, load, load_box
    from sdbctl.boxstep import BoxConfig
    from sdbctl.key import Key
    from sdbctl.report import Report

__all__ = ["Box", "BoxConfig", "Key", "Report", "load", "load_box"]

_HOMES = {
    "Box": "boxfile",
    "BoxConfig": "boxstep",
    "Key": "key",
    "Report": "report",
    "load": "boxfile",
    "load_box": "boxfile",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sdbctl' has no attribute {name!r}")
    return getattr(import_module(f"sdbctl.{_HOMES[name]}"), name)
