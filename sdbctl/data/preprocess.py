"""Normalisation."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdbctl.data.images import Shape, sized
from sdbctl.errors import BadInput

PRESETS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar10-narrow": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashionmnist": ((0.2860,), (0.3530,)),
    "half": ((0.5,), (0.5,)),
    "none": ((0.0,), (1.0,)),
}


def presets(channels: int) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
    """Known (mean, std) by name for images of so many channels."""
    found = {}
    for name, (mean, std) in PRESETS.items():
        if name in ("half", "none"):
            found[name] = (mean * channels, std * channels)
        elif len(mean) == channels:
            found[name] = (mean, std)
    return found


def usable(size: Sequence[int]) -> bool:
    """Whether (C, H, W) may be the size of an image: what a file says may be absurd."""
    return len(size) == 3 and size[0] <= 64 and all(1 <= side <= 8192 for side in size)


@dataclass(frozen=True)
class Preprocess:
    """Normalisation and input size; it travels inside the box.

    Attributes:
        mean: Per channel, for pixels in [0, 1].
        std: Per channel.
        size: (C, H, W).

    Raises:
        BadInput: The values cannot normalise such images.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: Shape

    def __post_init__(self) -> None:
        if not (usable(self.size) and len(self.mean) == len(self.std) == self.size[0]):
            raise BadInput(f"a normalisation for {len(self.mean)} channels does not fit images of {sized(self.size)}")
        # also false for NaN
        if not all(abs(value) <= 1e4 for value in self.mean) or not all(1e-4 <= value <= 1e4 for value in self.std):
            raise BadInput(f"mean {self.mean} and std {self.std} are no normalisation", "std must be positive")

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise pixels in [0, 1]: […, C, H, W] → the same shape."""
        mean, std = (_per_channel(values, x.device, x.dtype) for values in (self.mean, self.std))
        return (x - mean) / std

    def undo(self, x: Tensor) -> Tensor:
        """The pixels in [0, 1] of normalised images: […, C, H, W] → the same shape."""
        mean, std = (_per_channel(values, x.device, x.dtype) for values in (self.mean, self.std))
        return x * std + mean

    @property
    def limits(self) -> tuple[Tensor, Tensor]:
        """Black and white, normalised: two of [1, C, 1, 1]."""
        dark, bright = (self(torch.full((1, self.size[0], 1, 1), pixel)) for pixel in (0.0, 1.0))
        return dark, bright

    def to_dict(self) -> dict[str, list[float]]:
        """As JSON values."""
        return {"mean": list(self.mean), "std": list(self.std), "size": list(self.size)}

    @classmethod
    def from_dict(cls, values: Any) -> Preprocess:
        """Read untrusted JSON values.

        Raises:
            BadInput: They are no normalisation.
        """
        try:
            found = {name: tuple(values[name]) for name in ("mean", "std", "size")}
        except (TypeError, KeyError):
            found = {}
        kinds = {"mean": (int, float), "std": (int, float), "size": (int,)}
        if not found or any(type(value) not in kinds[name] for name in found for value in found[name]):
            raise BadInput("the metadata has no usable normalisation", "write the file again")
        try:
            return cls(tuple(map(float, found["mean"])), tuple(map(float, found["std"])), found["size"])
        except (BadInput, OverflowError):
            raise BadInput("the metadata has no usable normalisation", "write the file again") from None


@functools.cache
def _per_channel(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Kept on the device, since each copy to a GPU waits for it."""
    # made in inference mode it could never be used in training
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)[:, None, None]
