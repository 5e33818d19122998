"""``guard``: nothing is trained to hide; the exported graph hides, and looks for the key itself."""

from __future__ import annotations

from dataclasses import dataclass

from sdbctl.objectives.base import Objective, Preset


@dataclass(frozen=True)
class GuardParameters:
    """It has none."""


GUARD = Objective(
    "the network stays N_ft: the graph that export --key-file makes of it hides, and looks for the key (default)",
    GuardParameters,
    None,
    # what a graph needs to find a key in images of usual sizes
    presets={"default": Preset(strength=0.25)},
    keyed=None,
    divisors=(),
)
