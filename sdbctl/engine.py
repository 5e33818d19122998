"""Where and how precisely to compute."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sdbctl.errors import EnvironmentFailure, UsageError

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class Engine:
    """Where and how precisely to compute.

    Attributes:
        device: The torch device.
        precision: ``fp32``, or ``bf16`` autocast.
        profile: File for a torch profiler trace of some training steps, or None.
    """

    device: torch.device
    precision: Literal["fp32", "bf16"] = "fp32"
    profile: Path | None = None

    def autocast(self) -> torch.autocast:
        """The context in which every forward pass runs."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def pick_device(name: str) -> torch.device:
    """Resolve ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.

    Raises:
        EnvironmentFailure: CUDA was asked for and torch sees none.
        UsageError: Another name.
    """
    kind, _, number = name.partition(":")
    if name not in ("auto", "cpu", "cuda") and not re.fullmatch("cuda:(0|[1-9][0-9]*)", name):
        raise UsageError(f"unknown device {name}", "use auto, cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFailure("device cuda was asked for, but torch sees no GPU", "use --device cpu")
    if number and int(number) >= torch.cuda.device_count():
        raise EnvironmentFailure(f"there is no GPU number {number}", f"torch sees {torch.cuda.device_count()}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to a device, convolutions in the channels-last layout."""
    return model.to(device).to(memory_format=torch.channels_last)


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was told, so that a clock means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Compute in full precision: on a GPU TF32 is less, in convolutions and in products of matrices."""
    if device.type != "cuda":
        yield
        return
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with torch's global generator at ``seed``, and put it back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def peak_memory() -> int:
    """The most bytes that this process has held so far, on the GPU if there is one in use."""
    import resource  # which Windows has not

    used = [torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count())]
    if any(used):
        return max(used)
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def environment(engine: Engine) -> dict[str, Any]:
    """Versions and hardware, for reports; nothing that names the machine or its user."""
    import platform

    import torchvision

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu",
        "precision": engine.precision,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
