"""What an attack is: a loss, the access it needs, and the configurations it may tune."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sdbctl.teacher import Access

Config = Mapping[str, float]
Loss = Callable[[Tensor, Tensor | None, Tensor | None, Config], Tensor]
"""(student logits [B, C], the oracle's answer or None, labels [B] or None, configuration) → scalar loss."""


@dataclass(frozen=True)
class Attack:
    """A way to train a student.

    Attributes:
        summary: One line for ``sdbctl list``.
        source: Citation.
        role: ``floor`` for what needs no soft output, ``attack`` for what does.
        access: The most it may see of the teacher; it is given an oracle of this level and nothing else.
        labels: Whether it needs the labels of the transfer set; they are withheld otherwise.
        grid: Configurations to choose from on validation data.
        loss: A pure function of student logits, answer, labels and configuration.
    """

    summary: str
    source: str
    role: Literal["floor", "attack"]
    access: Access
    labels: bool
    grid: tuple[Config, ...]
    loss: Loss
