"""Labelled images, in memory or decoded when they are asked for."""

from __future__ import annotations

import functools
import hashlib
import io
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sdbctl.errors import BadInput, UsageError

MEMORY_LIMIT = 4 * 2**30
"""Bytes of uint8 pixels up to which a set is decoded once and kept in memory."""
READERS = 8
"""Threads or processes that decode images, at most."""
THREADED = 128
"""Height and width from which images are decoded by several threads."""
Shape = tuple[int, int, int]
Array = np.ndarray[Any, Any]


class Encoded(Protocol):
    """Images by position, each a file, encoded bytes, or an array [H, W] or [H, W, C] of uint8."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> Any: ...


class Memory:
    """Decoded images, shared by all views of them.

    Args:
        pixels: uint8 [N, C, H, W].
    """

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels
        self.shape: Shape = (pixels.shape[1], pixels.shape[2], pixels.shape[3])
        self._copies: dict[torch.device, Tensor] = {}

    def __getitem__(self, position: int) -> Tensor:
        return self.pixels[position]

    def on(self, device: torch.device) -> Tensor:
        """The pixels on a device, where they are copied once."""
        if device == self.pixels.device:
            return self.pixels
        if device not in self._copies:
            self._copies[device] = self.pixels.to(device)
        return self._copies[device]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copies": {}}


@dataclass(frozen=True)
class Stream:
    """Images that are decoded whenever they are asked for."""

    images: Encoded
    shape: Shape
    size: int | None
    name: str

    def __getitem__(self, position: int) -> Tensor:
        pixels = decode(self.images[position], self.size, self.shape[0], self.name, position)
        if pixels.shape != self.shape:
            raise BadInput(
                f"{self.name}: image {position}{_file(self.images[position])} is {sized(pixels.shape)}, the first is "
                f"{sized(self.shape)}",
                "resize them with --image-size",
            )
        return torch.from_numpy(pixels)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images, in memory or decoded on demand; views share them.

    Attributes:
        labels: Class indices int64 [N].
        source: The images that this set and others choose from.
        positions: Where each image is in ``source``, int64 [N].
        name: The data set's name, or "".
    """

    labels: Tensor
    source: Memory | Stream
    positions: Tensor
    name: str = ""

    @classmethod
    def of(cls, pixels: Tensor, labels: Tensor, name: str = "") -> ImageSet:
        """A set in memory: uint8 [N, C, H, W] with int64 [N].

        Raises:
            BadInput: They are not, or do not belong together.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or len(pixels) != len(labels) or labels.ndim != 1:
            raise BadInput(
                f"images {pixels.dtype} {sized(pixels.shape)} with labels {sized(labels.shape)}",
                "uint8 [N, C, H, W] and int64 [N] are needed",
            )
        return cls(labels.to(torch.int64), Memory(pixels), torch.arange(len(labels)), name)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Tensor:
        """One image, uint8 [C, H, W]."""
        return self.source[int(self.positions[index])]

    @property
    def shape(self) -> Shape:
        """(C, H, W) of every image."""
        return self.source.shape

    @property
    def in_memory(self) -> bool:
        """Whether all images are decoded already."""
        return isinstance(self.source, Memory)

    def take(self, indices: Sequence[int] | range | Array | Tensor) -> ImageSet:
        """A view of the images at ``indices``."""
        chosen = torch.as_tensor(np.asarray(indices), dtype=torch.int64)
        return replace(self, labels=self.labels[chosen], positions=self.positions[chosen])

    def first(self, count: int) -> ImageSet:
        """The first so many images, or all if there are fewer."""
        return self.take(range(min(count, len(self))))

    @property
    def pixels(self) -> Tensor:
        """All images of a set in memory, uint8 [N, C, H, W].

        Raises:
            UsageError: The set is decoded on demand.
        """
        if not isinstance(self.source, Memory):
            raise UsageError(f"{self.name or 'the set'} is not held in memory", "use fewer images")
        return self.source.pixels[self.positions]

    def alone(self) -> ImageSet:
        """The same images in memory, without those that they were chosen from.

        Raises:
            UsageError: They are larger than :data:`MEMORY_LIMIT`.
        """
        size = len(self) * math.prod(self.shape)
        if size > MEMORY_LIMIT:
            raise UsageError(
                f"{len(self):,} images of {sized(self.shape)} take {size / 2**30:.1f} GiB of memory",
                "use fewer; --transfer-size has the attacker's",
            )
        if isinstance(self.source, Memory):
            return ImageSet.of(self.pixels, self.labels, self.name)
        pixels = torch.empty(len(self), *self.shape, dtype=torch.uint8)

        def fill(start: int) -> None:
            for index in range(start, min(start + 256, len(self))):
                pixels[index] = self[index]

        # decoding a small image hardly leaves the interpreter, where threads only wait for each other
        with ThreadPoolExecutor(1 if min(self.shape[1:]) < THREADED else min(READERS, cores())) as pool:
            for _ in pool.map(fill, range(0, len(self), 256)):
                pass
        return ImageSet.of(pixels, self.labels, self.name)

    @functools.cached_property
    def identity(self) -> str:
        """Hash of size, labels, positions and a sample of the images, by which results are told apart."""
        digest = hashlib.sha256()
        self.describe(digest, self.labels, self.positions)
        return digest.hexdigest()

    def describe(self, digest: hashlib._Hash, *numbers: Tensor) -> None:
        """Put size, numbers of the images, and 64 of the images into a digest."""
        digest.update(f"{len(self)} {sized(self.shape)} ".encode())
        for of_images in numbers:
            digest.update(of_images.numpy().astype("<i8").tobytes())
        for step in range(64):
            digest.update(self[step * (len(self) - 1) // 63].numpy().tobytes())

    @functools.cached_property
    def digest(self) -> str:
        """Hash of the pixels of a set in memory, in order."""
        content = self.pixels.contiguous()
        digest = hashlib.sha256(f"{tuple(content.shape)}".encode())
        digest.update(content.numpy().data)  # not copied first
        return digest.hexdigest()

    def unlabelled(self) -> ImageSet:
        """The same images with −1 for every label."""
        return replace(self, labels=torch.full_like(self.labels, -1))


@dataclass(frozen=True)
class Dataset:
    """A data set as it was found.

    Attributes:
        name: Its name, never a path.
        train: Training images.
        test: Test images, or None if the source has one part only.
        classes: Class names.
        fingerprint: Hash of sizes, labels and a sample of the decoded images.
    """

    name: str
    train: ImageSet
    test: ImageSet | None
    classes: tuple[str, ...]
    fingerprint: str


FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF")
"""Image formats that are read; others may start programs, as EPS does."""


def decode(source: Any, size: int | None, channels: int | None, name: str, position: int) -> Array:
    """uint8 [C, H, W] from a file, encoded bytes, or an array [H, W] or [H, W, C].

    Raises:
        BadInput: It is no image.
    """
    from PIL import Image, ImageOps

    if source is None:
        raise BadInput(f"{name}: image {position} has no bytes, only a path", "embed the images in the file")
    if isinstance(source, np.ndarray) and not source.size:
        raise BadInput(f"{name}: image {position} has no pixels", "leave it out")
    try:
        if isinstance(source, np.ndarray):
            image = Image.fromarray(source[..., 0] if source.ndim == 3 and source.shape[2] == 1 else source)
        else:
            assert isinstance(source, bytes | Path)
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
        if image.mode.startswith("I"):
            # 16 bits; Pillow would clip instead of scale
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        grey = image.mode in ("1", "L", "LA") if channels is None else channels == 1
        image = image.convert("L" if grey else "RGB")
        if size is not None and image.size != (size, size):
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        array = np.array(image, dtype=np.uint8)
    except MemoryError:
        raise
    except Exception as error:  # damaged files make Pillow raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0].split("<")[0].split("'/")[0].strip()
        what = f"{name}: image {position}{_file(source)} cannot be read: {reason}"
        raise BadInput(what, "remove or replace it") from None
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _file(source: Any) -> str:
    return f" ({source.parent.name}/{source.name})" if isinstance(source, Path) else ""


def sized(shape: Sequence[int]) -> str:
    """As people write it: 3x32x32."""
    return "x".join(map(str, shape))


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
