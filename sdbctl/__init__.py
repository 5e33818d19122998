"""sdbctl: put a trained image classifier into a Safe Distillation Box, and measure what an attacker gets.

The public API loads on first use, so that importing this package stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdbctl.box import BoxConfig, box
    from sdbctl.boxfile import Box, load, load_box
    from sdbctl.distill import distill
    from sdbctl.evaluate import evaluate
    from sdbctl.key import Key
    from sdbctl.report import Report

__all__ = ["Box", "BoxConfig", "Key", "Report", "box", "distill", "evaluate", "load", "load_box"]

_HOMES = {
    "Box": "boxfile",
    "BoxConfig": "box",
    "Key": "key",
    "Report": "report",
    "load": "boxfile",
    "load_box": "boxfile",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sdbctl' has no attribute {name!r}")
    return getattr(import_module(f"sdbctl.{_HOMES[name]}"), name)
