"""The state of a training run, from which it goes on if it was interrupted."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sdbctl import files, team
from sdbctl.errors import BadInput

SAVED_SECONDS, SAVED_SHARE = 0.1, 0.05
"""The state of a run is kept after each epoch if that takes no longer, else as often as it costs this share of time."""


class Resume(NamedTuple):
    """Where an interrupted run goes on.

    Attributes:
        path: File of the state after one of the last epochs: see :data:`SAVED_SHARE`.
        run: What decides the result beside the recipe; the state of another run is refused.
    """

    path: Path
    run: Mapping[str, Any]

    def done(self) -> None:
        """Forget the state, once the result is saved."""
        if team.rank() == 0:
            self.path.unlink(missing_ok=True)


def recorded_precision(*states: Path) -> str | None:
    """The precision with which an interrupted run began, or None."""
    for path in states:
        if path.exists():
            try:
                found = torch.load(path, map_location="cpu", weights_only=True)["identity"]["precision"]
            except Exception:
                continue
            return found if found in ("fp32", "bf16") else None
    return None


@dataclass
class State:
    """All that changes while a network is trained, and the file where it is kept.

    Attributes:
        path: The file.
        identity: What decides the result; the state of another run is refused.
        model: The network.
        optimiser: With its momenta.
        generator: Of order and augmentation.
        kept: Tensors that the step changes in place beside the model.
        device: Whose random numbers are drawn.
    """

    path: Path
    identity: Mapping[str, Any]
    model: nn.Module
    optimiser: torch.optim.Optimizer
    generator: torch.Generator
    kept: Sequence[Tensor]
    device: torch.device
    _saved: float = field(default_factory=time.perf_counter)
    _cost: float = 0.0

    def save(self, epoch: int, seconds: float, *, last: bool) -> None:
        """Keep it after an epoch, unless that took too long before: see :data:`SAVED_SHARE`.

        Args:
            epoch: How many epochs are done.
            seconds: Time spent in training steps.
            last: Whether it must be kept.
        """
        now = time.perf_counter()
        if not last and self._cost > max(SAVED_SECONDS, SAVED_SHARE * (now - self._saved)):
            return
        state = {
            "identity": dict(self.identity),
            "epoch": epoch,
            "seconds": seconds,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "kept": list(self.kept),
            "cpu_rng": torch.random.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        # torch hides from files.write what the system says of a full disk
        content = io.BytesIO()
        torch.save(state, content)
        files.write(self.path, content.getvalue(), private=True)
        self._saved = time.perf_counter()
        self._cost = self._saved - now

    def restore(self) -> tuple[int, float]:
        """Go back to what was kept.

        Returns:
            Epochs done, and seconds spent.

        Raises:
            BadInput: The file is damaged, or of another run.
        """
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            if other := "; ".join(differences(state["identity"], self.identity)):
                raise BadInput(
                    f"{self.path} belongs to a run with other settings ({other})", "use those, or delete the file"
                )
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.generator.set_state(state["generator"])
            for tensor, before in zip(self.kept, state["kept"], strict=True):
                tensor.copy_(before)
            torch.random.set_rng_state(state["cpu_rng"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"], self.device)
            return int(state["epoch"]), float(state["seconds"])
        except BadInput:
            raise
        except Exception:
            raise BadInput(f"resume file {self.path} is damaged", "delete it to start over") from None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings that are not the same, with both values, each once."""
    found: list[str] = []
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new)
        elif old != new:
            found.append(f"{name} {str(old)[:40]}, not {str(new)[:40]}")
    return list(dict.fromkeys(found))
