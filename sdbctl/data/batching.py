"""Augmentation, and batches of normalised images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdbctl.data.images import READERS, ImageSet, Memory, Shape, Stream, cores, sized
from sdbctl.data.preprocess import Preprocess
from sdbctl.errors import SdbError, UsageError, check_known

VIEW_CHUNK = 2048
"""Images that are augmented at a time when a whole set is."""


class Batch(NamedTuple):
    """Images for one step.

    Attributes:
        x: Normalised images float32 [B, C, H, W], channels last.
        y: Class indices int64 [B].
        index: Positions int64 [B] in the image set.
    """

    x: Tensor
    y: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index


Augment = Callable[[Tensor, torch.Generator], Tensor]


def _none(pixels: Tensor, generator: torch.Generator) -> Tensor:
    return pixels


def _shift(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A random shift by up to one pixel."""
    return _crop(pixels, generator, 1, flip=False)


def _crop_flip(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """The usual one for CIFAR: a shift by up to an eighth (4 of 32 pixels) and a horizontal flip."""
    return _crop(pixels, generator, max(1, pixels.shape[2] // 8), flip=True)


def _crop(pixels: Tensor, generator: torch.Generator, pad: int, flip: bool) -> Tensor:
    """A random shift of up to ``pad`` pixels, black outside, and a random flip, for each image its own."""
    n, c, h, w = pixels.shape
    device, drawn = pixels.device, generator.device
    shift = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator, device=drawn).to(device, non_blocking=True)
    rows = torch.arange(h, device=device) + shift[0]
    columns = torch.arange(w, device=device) + shift[1]
    if flip:
        mirrored = torch.rand(n, 1, generator=generator, device=drawn).to(device, non_blocking=True) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = torch.nn.functional.pad(pixels, (pad,) * 4)
    places = (rows[:, :, None] * (w + 2 * pad) + columns[:, None, :]).view(n, 1, h * w).expand(n, c, h * w)
    return padded.flatten(2).gather(2, places).view(n, c, h, w)


def _resized_crop_flip(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A random area of 25 to 100 %, of aspect 3:4 to 4:3, resized to the whole, and a random flip."""
    n, device = len(pixels), pixels.device
    draw = torch.rand(5, n, generator=generator, device=generator.device).to(device, non_blocking=True)
    area, aspect = 0.25 + 0.75 * draw[0], torch.exp((2 * draw[1] - 1) * math.log(4 / 3))
    height, width = (area / aspect).sqrt().clamp(max=1), (area * aspect).sqrt().clamp(max=1)
    theta = torch.zeros(n, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 1, 1] = torch.where(draw[2] < 0.5, -width, width), height
    theta[:, 0, 2], theta[:, 1, 2] = (2 * draw[3] - 1) * (1 - width), (2 * draw[4] - 1) * (1 - height)
    grid = torch.nn.functional.affine_grid(theta, list(pixels.shape), align_corners=False)
    return torch.nn.functional.grid_sample(pixels.float(), grid, padding_mode="reflection", align_corners=False)


AUGMENT: dict[str, Augment] = {
    "none": _none,
    "shift": _shift,
    "crop-flip": _crop_flip,
    "resized-crop-flip": _resized_crop_flip,
}


def default_augment(name: str, shape: Shape) -> str:
    """The usual augmentation of a data set: digits must not be flipped, photographs may.

    Args:
        name: The data set's name, or "".
        shape: (C, H, W).
    """
    if name in ("digits", "mnist", "svhn") or shape[0] == 1 or min(shape[1:]) < 16:
        return "shift"
    return "crop-flip" if min(shape[1:]) < 64 else "resized-crop-flip"


def view(images: ImageSet, number: int, augment: str | None = None) -> ImageSet:
    """One fixed augmented copy of a set in memory: the same arguments give the same pixels.

    Args:
        images: The set.
        number: Which copy; it seeds the augmentation.
        augment: Name in :data:`AUGMENT`, or None for the usual one.
    """
    change = AUGMENT[default_augment(images.name, images.shape) if augment is None else augment]
    generator = torch.Generator().manual_seed(number)
    return changed(images, lambda some, _: change(some, generator))


def changed(images: ImageSet, change: Callable[[Tensor, slice], Tensor]) -> ImageSet:
    """A set in memory with the labels of another, made piece by piece, so that only bytes are ever held of all images.

    Args:
        images: The other set.
        change: (pixels uint8 [B, C, H, W], where they are among all) → as many, of any type in [0, 255].
    """
    pixels = images.pixels
    pieces = [slice(start, start + VIEW_CHUNK) for start in range(0, len(pixels), VIEW_CHUNK)]
    return ImageSet.of(torch.cat([_bytes(change(pixels[p], p)) for p in pieces]), images.labels, images.name)


def _bytes(pixels: Tensor) -> Tensor:
    return pixels if pixels.dtype == torch.uint8 else pixels.round().clamp(0, 255).to(torch.uint8)


def batches(
    images: ImageSet,
    preprocess: Preprocess,
    *,
    batch_size: int,
    device: torch.device,
    generator: torch.Generator | None = None,
    augment: str | None = None,
    shuffle: bool = False,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Iterate over a set once.

    The same generator gives the same batches, whether the set is in memory or not.

    Args:
        images: The set. If it is in memory, it is put on the device once, as uint8.
        preprocess: Normalisation.
        batch_size: Images per batch; a last batch of a single image is left out when shuffling.
        device: Where the batches are made.
        generator: Of order and augmentation, on the CPU or on ``device``; None if nothing is random.
        augment: Name in :data:`AUGMENT`; None takes the usual one if there is a generator, else none.
        shuffle: Whether in random order.
        share: (i, n) for the i-th of n equal parts of each batch; what cannot be shared evenly is left out.

    Raises:
        UsageError: The augmentation is unknown, a generator is missing, or the images have another shape.
        BadInput: An image cannot be read.
    """
    usual = default_augment(images.name, images.shape) if generator is not None else "none"
    name = usual if augment is None else augment
    check_known("augmentation", name, AUGMENT)
    if generator is None and (shuffle or name != "none"):
        raise UsageError("shuffled or augmented batches need a generator")
    if batch_size < 1:
        raise UsageError(f"a batch size of {batch_size} is impossible", "use at least 1")
    if images.shape != tuple(preprocess.size):
        raise UsageError(
            f"images are {sized(images.shape)}, {sized(preprocess.size)} are expected",
            "resize them with --image-size",
        )
    n = len(images)
    if generator is not None and shuffle:
        order = torch.randperm(n, generator=generator, device=generator.device)
    else:
        order = torch.arange(n)
    smallest = min(2, batch_size) if shuffle else 1
    # chunks of one tensor on the device: no copy per batch
    chunks = [chunk for chunk in _chunks(order.to(device), batch_size) if len(chunk) >= smallest]
    part, parts = share
    if parts > 1:
        chunks = [chunk[part : len(chunk) - len(chunk) % parts : parts] for chunk in chunks]
        chunks = [chunk for chunk in chunks if len(chunk) >= smallest]

    def run() -> Iterator[Batch]:
        for index, pixels, labels in _fetch(images, chunks, device):
            if generator is not None and name != "none":
                pixels = AUGMENT[name](pixels, generator)
            x = preprocess(pixels.float().div_(255))
            yield Batch(x.contiguous(memory_format=torch.channels_last), labels, index)

    return run()


def _chunks(order: Tensor, size: int) -> list[Tensor]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def _fetch(images: ImageSet, chunks: list[Tensor], device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield positions int64 [B], pixels uint8 [B, C, H, W] and labels int64 [B], all on the device."""
    labels = images.labels.to(device)
    if isinstance(images.source, Memory):
        pixels, positions = images.source.on(device), images.positions.to(device)
        for chunk in chunks:
            yield chunk, pixels[positions[chunk]], labels[chunk]
        return
    from torch.utils.data import DataLoader

    workers = min(READERS, cores(), len(chunks)) if cores() > 1 else 0
    # all at once: a GPU would have to be waited for at each chunk
    order = torch.cat([torch.empty(0, dtype=torch.long, device=device), *chunks]).cpu()
    wanted = [some.tolist() for some in torch.split(images.positions[order], [len(chunk) for chunk in chunks])]
    loader: Any = DataLoader(
        _Decoded(images.source, wanted),
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # the global one is left alone
    )
    for chunk, content in zip(chunks, loader, strict=True):
        if isinstance(content, SdbError):
            raise content
        yield chunk, content.to(device, non_blocking=True), labels[chunk]


class _Decoded(torch.utils.data.Dataset[Any]):
    """Decoded batches uint8 [B, C, H, W]; what goes wrong in a worker is handed over, not raised there."""

    def __init__(self, source: Stream, chunks: list[list[int]]) -> None:
        self.source, self.chunks = source, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> Tensor | SdbError:
        try:
            return torch.stack([self.source[position] for position in self.chunks[number]])
        except SdbError as error:
            return error
