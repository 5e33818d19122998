"""Images: where they come from, how they are split, normalised, augmented and batched."""

from __future__ import annotations

import difflib
import functools
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sdbctl.errors import BadInput, EnvironmentFailure, SdbError, UsageError

MEMORY_LIMIT = 4 * 2**30
"""Bytes of uint8 pixels up to which a set is decoded once and kept in memory."""
VIEW_CHUNK = 2048
"""Images that are augmented at a time when a whole set is."""
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
        pixels = _decode(self.images[position], self.size, self.shape[0], self.name, position)
        if pixels.shape != self.shape:
            raise BadInput(
                f"{self.name}: image {position} is {_text(pixels.shape)}, others are {_text(self.shape)}",
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
                f"images {pixels.dtype} {_text(pixels.shape)} with labels {_text(labels.shape)}",
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

    @property
    def pixels(self) -> Tensor:
        """All images of a set in memory, uint8 [N, C, H, W].

        Raises:
            UsageError: The set is decoded on demand.
        """
        if not isinstance(self.source, Memory):
            raise UsageError(f"{self.name or 'the set'} is too large to be held in memory", "use --transfer-size")
        return self.source.pixels[self.positions]

    def digest(self) -> str:
        """Hash of the pixels of a set in memory, in order."""
        content = self.pixels.contiguous()
        return hashlib.sha256(f"{tuple(content.shape)}".encode() + content.numpy().tobytes()).hexdigest()

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


# --- normalisation ---------------------------------------------------------------------------------------------

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
        fits = len(self.size) == 3 and len(self.mean) == len(self.std) == self.size[0] <= 64
        if not fits or not all(1 <= side <= 8192 for side in self.size):
            raise BadInput(f"a normalisation for {len(self.mean)} channels does not fit images of {_text(self.size)}")
        # also false for NaN
        if not all(abs(value) <= 1e4 for value in self.mean) or not all(1e-4 <= value <= 1e4 for value in self.std):
            raise BadInput(f"mean {self.mean} and std {self.std} are no normalisation", "std must be positive")

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise pixels in [0, 1]: [B, C, H, W] → [B, C, H, W]."""
        mean, std = (_per_channel(values, x.device, x.dtype) for values in (self.mean, self.std))
        return (x - mean) / std

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


# --- sources ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What a source is asked for: the part of the spec after the colon, and how to read it."""

    argument: str
    root: Path
    size: int | None
    channels: int | None
    download: bool
    memory_limit: int


class Part(NamedTuple):
    """One part of a source: labels [N] and as many images."""

    labels: Array
    images: Encoded


class Found(NamedTuple):
    """What a source found: a name without path, its parts, and class names if it knows them."""

    name: str
    train: Part
    test: Part | None
    classes: tuple[str, ...]


TORCHVISION = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
    "svhn": ("SVHN", "train_32x32.mat"),
    "stl10": ("STL10", "stl10_binary"),
    "mnist": ("MNIST", "MNIST/raw"),
    "fashionmnist": ("FashionMNIST", "FashionMNIST/raw"),
}
"""Class in torchvision, and what its data looks like in the data root."""


def _torchvision(name: str, request: Request) -> Found:
    if not _in_root(name, request.root) and not request.download:
        raise BadInput(
            f"{name} is not in the data root {request.root}",
            f"put {TORCHVISION[name][1]} there, set --data-root, or use --download",
        )
    if any((request.root / name).glob("*.parquet")):
        return _parquet(replace(request, argument=str(request.root / name)))
    import torchvision.datasets as tv

    kind, by_split = getattr(tv, TORCHVISION[name][0]), name in ("svhn", "stl10")
    parts = []
    for split_name in ("train", "test"):
        choice: dict[str, Any] = {"split": split_name} if by_split else {"train": split_name == "train"}
        try:
            found = kind(str(request.root), download=request.download, **choice)
        except OSError as error:
            raise EnvironmentFailure(f"cannot get {name}: {error}", "check the network and the disk") from None
        except (RuntimeError, ValueError, EOFError) as error:
            reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
            raise BadInput(f"{name} in {request.root} is damaged: {reason}", "delete it and get it again") from None
        pixels = np.asarray(found.data)
        labels = np.asarray(found.targets if hasattr(found, "targets") else found.labels)
        parts.append(Part(labels, pixels.transpose(0, 2, 3, 1) if by_split else pixels))
    return Found(name, parts[0], parts[1], tuple(getattr(found, "classes", ())))


def _in_root(name: str, root: Path) -> bool:
    """Whether a torchvision data set is there, as torchvision keeps it or as parquet files in a folder ``name``."""
    return (root / TORCHVISION[name][1]).exists() or any((root / name).glob("*.parquet"))


def _digits(request: Request) -> Found:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise EnvironmentFailure("digits need scikit-learn", "pip install 'sdbctl[demo]'") from None
    found = load_digits()
    pixels = np.round(found.images * (255 / 16)).astype(np.uint8)
    return Found("digits", Part(found.target, pixels), None, tuple(map(str, range(10))))


IMAGE_FILES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}


def _folder(request: Request) -> Found:
    root = Path(request.argument).expanduser()
    if not root.is_dir():
        raise BadInput(f"folder {root} does not exist", "give folder:PATH with one folder per class")
    top = root / "train" if (root / "train").is_dir() else root
    other = next((root / name for name in ("test", "val", "valid") if (root / name).is_dir()), None)
    names = _subfolders(top)
    if not names:
        raise BadInput(f"{top} has no folders of classes", "put the images of each class into a folder of its own")

    def part(base: Path) -> Part:
        unknown = sorted(set(_subfolders(base)) - set(names))
        if unknown:
            raise BadInput(f"{base} has a class {unknown[0]} that {top} has not", "use the same class folders in both")
        own = [
            sorted(file for file in (base / name).rglob("*") if file.suffix.lower() in IMAGE_FILES) for name in names
        ]
        if not any(own):
            raise BadInput(f"{base} holds no images", f"use {', '.join(sorted(IMAGE_FILES))} files")
        return Part(
            np.repeat(np.arange(len(names)), [len(files) for files in own]), [file for files in own for file in files]
        )

    test = part(other) if other is not None and top != root else None
    return Found(root.resolve().name or "data", part(top), test, names)


def _subfolders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))


class Rows:
    """The encoded images of parquet files, by row.

    Args:
        files: The files.
        columns: The name of each file's struct column with a field ``bytes``.
        keep: Whether to read all encoded images into memory; else a row group at a time.
    """

    def __init__(self, files: list[Path], columns: list[str], keep: bool) -> None:
        import pyarrow.parquet as pq

        self.keep = keep
        groups = []
        for file, column in zip(files, columns, strict=True):
            metadata = pq.read_metadata(file)
            groups += [(file, column, g, metadata.row_group(g).num_rows) for g in range(metadata.num_row_groups)]
        self.groups = [(file, column, group) for file, column, group, _ in groups]
        self.starts = np.cumsum([0, *(rows for *_, rows in groups)])
        # read before worker processes start, which then share it
        self._cached = {number: self._read(number) for number in range(len(groups))} if keep else {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, position: int) -> bytes | None:
        number = int(np.searchsorted(self.starts, position, side="right")) - 1
        rows = self._cached.get(number)
        if rows is None:
            rows = self._read(number)
            # two, so that threads at a boundary do not read both again and again
            while not self.keep and len(self._cached) >= 2:
                self._cached.pop(next(iter(self._cached)), None)
            self._cached[number] = rows
        content: bytes | None = rows[position - int(self.starts[number])].as_py()
        return content

    def _read(self, number: int) -> Any:
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        file, column, group = self.groups[number]
        try:
            table = pq.ParquetFile(file).read_row_group(group, columns=[column], use_threads=False)
        except (OSError, ValueError) as error:
            raise BadInput(f"{file} cannot be read: {str(error).splitlines()[0][:100]}") from None
        return pc.struct_field(table.column(0), "bytes")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "keep": False, "_cached": {}}


def _parquet(request: Request) -> Found:
    import pyarrow.parquet as pq

    root = Path(request.argument).expanduser()
    if not root.exists():
        raise BadInput(f"parquet file or folder {root} does not exist", "check the path")
    found: dict[str, list[Path]] = {}
    for file in sorted(root.rglob("*.parquet")) if root.is_dir() else [root]:
        # Hugging Face writes train-00000-of-00001.parquet, or train/0000.parquet
        named = re.match("train|test|valid", file.name) or re.match("train|test|val", file.parent.name)
        found.setdefault(named.group()[:3] if named and root.is_dir() else "tra", []).append(file)
    if "tra" not in found:
        raise BadInput(f"{root} holds no training parquet files", "name them train-*.parquet and test-*.parquet")
    names: list[tuple[str, ...]] = []

    def part(files: list[Path]) -> Part:
        labels, columns = [], []
        for file in files:
            try:
                schema = pq.read_schema(file)
                image = next((n for n in ("img", "image", *schema.names) if _is_image(schema, n)), None)
                label = next((n for n in ("label", "labels", "fine_label") if n in schema.names), None)
                if image is None or label is None:
                    raise BadInput(
                        f"{file} has columns {', '.join(schema.names)}", "an image {bytes, path} and a label are needed"
                    )
                labels.append(pq.read_table(file, columns=[label]).column(0).to_numpy())
            except (OSError, ValueError) as error:
                raise BadInput(f"{file} is not a readable parquet file: {str(error).splitlines()[0][:100]}") from None
            columns.append(image)
            names.append(_feature_names(schema, label))
        keep = sum(file.stat().st_size for file in files) <= request.memory_limit
        return Part(np.concatenate(labels), Rows(files, columns, keep))

    train = part(found["tra"])
    test = next((part(found[kind]) for kind in ("tes", "val") if kind in found), None)
    return Found((root.resolve().name if root.is_dir() else root.stem) or "data", train, test, names[0])


def _is_image(schema: Any, name: str) -> bool:
    import pyarrow as pa

    if name not in schema.names:
        return False
    kind = schema.field(name).type
    return bool(pa.types.is_struct(kind)) and kind.get_field_index("bytes") >= 0


def _feature_names(schema: Any, label: str) -> tuple[str, ...]:
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def _npz(request: Request) -> Found:
    path = Path(request.argument).expanduser()
    if not path.is_file():
        raise BadInput(f"npz file {path} does not exist", "check the path")
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = [name for pair in NPZ_TRAIN + NPZ_TEST for name in pair if name in archive.files]
            arrays, held = {name: archive[name] for name in names}, ", ".join(archive.files)
    except Exception:  # zip, zlib and numpy each have their own
        raise BadInput(f"{path} is not a readable npz file", "write it with numpy.savez, without objects") from None

    def part(pairs: list[tuple[str, str]]) -> Part | None:
        for images, labels in pairs:
            if images in arrays and labels in arrays:
                x, y = arrays[images], arrays[labels]
                y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
                if x.ndim == 4 and x.shape[3] not in (1, 3) and x.shape[1] in (1, 3):
                    x = x.transpose(0, 2, 3, 1)
                if x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3)):
                    raise BadInput(
                        f"{images} in {path} is {x.dtype} {_text(x.shape)}", "uint8 [N, H, W] or [N, H, W, C] is needed"
                    )
                if y.ndim != 1 or len(y) != len(x):
                    raise BadInput(f"{labels} in {path} is {y.dtype} {_text(y.shape)}", f"{len(x)} integers are needed")
                return Part(y, x)
        return None

    train = part(NPZ_TRAIN)
    if train is None:
        raise BadInput(f"{path} holds {held or 'nothing'}", "arrays named images and labels are needed")
    return Found(path.stem, train, part(NPZ_TEST), ())


NPZ_TRAIN = [("images", "labels"), ("x_train", "y_train"), ("train_images", "train_labels"), ("x", "y")]
NPZ_TEST = [("x_test", "y_test"), ("test_images", "test_labels")]


SOURCES: dict[str, tuple[Callable[[Request], Found], str]] = {
    **{name: (functools.partial(_torchvision, name), "torchvision, from the data root") for name in TORCHVISION},
    "digits": (_digits, "scikit-learn's 1,797 digits of 8x8, offline"),
    "folder:PATH": (_folder, "a folder per class, optionally under train/ and test/"),
    "parquet:PATH": (_parquet, "Hugging Face image layout, read with pyarrow"),
    "npz:PATH": (_npz, "numpy arrays: images and labels, or x_train, y_train, x_test, y_test"),
}


def sources() -> dict[str, str]:
    """Data specs and one line each."""
    return {name: text for name, (_, text) in SOURCES.items()}


def load(
    spec: str,
    *,
    root: Path,
    size: int | None = None,
    channels: int | None = None,
    download: bool = False,
    memory_limit: int = MEMORY_LIMIT,
) -> Dataset:
    """Find and read a data set.

    Args:
        spec: A name, or ``scheme:path``; see :data:`SOURCES`.
        root: Folder of torchvision's data sets.
        size: Height and width to resize to; None if all images are of one size already.
        channels: 1 or 3; None takes what the images have.
        download: Whether torchvision may download.
        memory_limit: Bytes of pixels up to which the set is kept in memory; larger ones are decoded on demand.

    Raises:
        UsageError: The spec is unknown.
        BadInput: The data is missing or damaged.
    """
    scheme, colon, argument = spec.partition(":")
    name = f"{scheme}:PATH" if colon else scheme
    if name not in SOURCES or (colon and not argument):
        close = difflib.get_close_matches(name, SOURCES, n=1)
        known = f"did you mean {close[0]}?" if close else f"use one of: {', '.join(SOURCES)}"
        path = Path(spec).expanduser()
        scheme = {".npz": "npz", ".parquet": "parquet"}.get(path.suffix, "folder")
        raise UsageError(f"unknown data {spec}", f"write {scheme}:{spec}" if path.exists() else known)
    found = SOURCES[name][0](Request(argument, root, size, channels, download, memory_limit))
    parts = [part for part in (found.train, found.test) if part is not None]
    for part in parts:
        if len(part.labels) == 0:
            raise BadInput(f"{found.name} holds no images", "check the data")
        if not np.issubdtype(part.labels.dtype, np.integer):
            raise BadInput(f"{found.name}: labels are {part.labels.dtype}", "integers from 0 are needed")
    lowest = min(int(part.labels.min()) for part in parts)
    highest = max(int(part.labels.max()) for part in parts)
    # without names, a class number beyond the number of images is damage, not a class
    limit = len(found.classes) or sum(len(part.labels) for part in parts)
    if lowest < 0 or highest >= limit:
        raise BadInput(
            f"{found.name}: labels run from {lowest} to {highest}", f"they must be from 0 to at most {limit - 1}"
        )
    classes = found.classes or tuple(str(index) for index in range(highest + 1))
    if len(classes) < 2:
        raise BadInput(f"{found.name} has a single class", "at least two are needed")
    train = _images(found.train, size, channels, memory_limit, found.name)
    test = _images(found.test, size, train.shape[0], memory_limit, found.name) if found.test else None
    if test is not None and test.shape != train.shape:
        raise BadInput(
            f"{found.name}: test images are {_text(test.shape)}, training images {_text(train.shape)}",
            "resize them with --image-size",
        )
    return Dataset(found.name, train, test, classes, _fingerprint(train, test))


def _images(part: Part, size: int | None, channels: int | None, memory_limit: int, name: str) -> ImageSet:
    """Decode one part, or arrange for decoding it on demand if it is too large."""
    total = len(part.labels)
    if channels is None and not isinstance(part.images, np.ndarray):
        # a grey image may be the first of many in colour
        some = {i * (total - 1) // 15 for i in range(16)}
        channels = max(_decode(part.images[i], None, None, name, i).shape[0] for i in some)
    first = _decode(part.images[0], size, channels, name, 0)
    stream = Stream(part.images, (first.shape[0], first.shape[1], first.shape[2]), size, name)
    labels, positions = torch.from_numpy(part.labels.astype(np.int64)), torch.arange(total)
    if total * first.size > memory_limit:
        return ImageSet(labels, stream, positions, name)
    pixels = torch.empty(total, *first.shape, dtype=torch.uint8)

    def fill(start: int) -> None:
        for position in range(start, min(start + 256, total)):
            pixels[position] = stream[position]

    array = part.images if isinstance(part.images, np.ndarray) else None
    if array is not None and array[0].size == first.size and array.shape[1:3] == first.shape[1:]:
        # neither resized nor of other colours
        pixels.copy_(torch.from_numpy(array.reshape(total, *first.shape[1:], first.shape[0])).permute(0, 3, 1, 2))
    else:
        with ThreadPoolExecutor(_cores()) as pool:
            for _ in pool.map(fill, range(0, total, 256)):
                pass
    return ImageSet(labels, Memory(pixels), positions, name)


def _decode(source: Any, size: int | None, channels: int | None, name: str, position: int) -> Array:
    """uint8 [C, H, W] from a file, encoded bytes, or an array [H, W] or [H, W, C].

    Raises:
        BadInput: It is no image.
    """
    from PIL import Image, ImageOps

    if source is None:
        raise BadInput(f"{name}: image {position} has no bytes, only a path", "embed the images in the file")
    try:
        if isinstance(source, np.ndarray):
            image = Image.fromarray(source[..., 0] if source.ndim == 3 and source.shape[2] == 1 else source)
        else:
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        if image.mode.startswith("I"):
            # 16 bits; Pillow would clip instead of scale
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        grey = image.mode in ("1", "L", "LA") if channels is None else channels == 1
        image = image.convert("L" if grey else "RGB")
        if size is not None and image.size != (size, size):
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        array = np.array(image, dtype=np.uint8)
    except Exception as error:  # damaged files make Pillow raise nearly anything
        where = f" ({source.parent.name}/{source.name})" if isinstance(source, Path) else ""
        reason = (str(error).splitlines() or [type(error).__name__])[0].split("<")[0].split("'/")[0].strip()
        raise BadInput(f"{name}: image {position}{where} cannot be read: {reason}", "remove or replace it") from None
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _cores() -> int:
    """Processors that this process may use, at most 8."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _fingerprint(train: ImageSet, test: ImageSet | None) -> str:
    """SHA-256 of sizes, labels and 64 decoded images of each part."""
    digest = hashlib.sha256()
    for part in (train, test):
        if part is None:
            digest.update(b"none")
            continue
        digest.update(f"{len(part)} {_text(part.shape)} ".encode())
        digest.update(part.labels.numpy().astype("<i8").tobytes())
        for step in range(64):
            digest.update(part[step * (len(part) - 1) // 63].numpy().tobytes())
    return digest.hexdigest()


# --- splits ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Splits:
    """Disjoint parts of a data set: the owner's, the attacker's, for choosing, and for reporting."""

    owner: ImageSet
    transfer: ImageSet
    validation: ImageSet
    test: ImageSet
    seed: int
    fingerprint: str

    def describe(self) -> dict[str, Any]:
        """Sizes, seed and fingerprint, from which the same splits are made again."""
        sizes = {name: len(getattr(self, name)) for name in ("owner", "transfer", "validation", "test")}
        return {**sizes, "seed": self.seed, "fingerprint": self.fingerprint}


def split(
    dataset: Dataset,
    *,
    seed: int = 0,
    owner: int | None = None,
    transfer: int | None = None,
    validation: int | None = None,
    test: int | None = None,
) -> Splits:
    """Split a data set, every class in proportion.

    Args:
        dataset: The data set.
        seed: Of the shuffling.
        owner: Images to train the box on; None for all that are left.
        transfer: The attacker's images; by default 20 % of the training images, at most 10,000.
        validation: By default 10 %, at most 5,000.
        test: How many test images to use; if the data has no test part, they come from the training images
            (by default 20 %).

    Raises:
        UsageError: They are more than there are.
    """
    asked = {"owner": owner, "transfer": transfer, "validation": validation, "test": test}
    for part, size in asked.items():
        if size is not None and size < 1:
            raise UsageError(f"{size} images for {part} are too few", "ask for at least 1")
    order = _stratified(dataset.train.labels, seed)
    total, cut = len(order), 0
    if dataset.test is None:
        cut = total // 5 if test is None else test
        held = dataset.train.take(order[:cut])
    else:
        there = len(dataset.test)
        if test is not None and test > there:
            raise UsageError(f"{test} test images were asked for, {dataset.name} has {there}", "ask for fewer")
        held = dataset.test
        if test not in (None, there):
            held = held.take(_stratified(held.labels, seed)[:test])
    left = total - cut
    transfer = min(left // 5, 10_000) if transfer is None else transfer
    validation = min(left // 10, 5_000) if validation is None else validation
    owner = left - transfer - validation if owner is None else owner
    if min(owner, transfer, validation, len(held)) < 1 or owner + transfer + validation > left:
        sizes = {"owner": owner, "transfer": transfer, "validation": validation, "test": cut}
        wanted = ", ".join(f"{size} for {part}" for part, size in sizes.items() if size > 0)
        raise UsageError(f"{dataset.name} has {total} training images, too few for {wanted}", "ask for fewer")
    first, second = cut + validation, cut + validation + transfer
    return Splits(
        owner=dataset.train.take(order[second : second + owner]),
        transfer=dataset.train.take(order[first:second]),
        validation=dataset.train.take(order[cut:first]),
        test=held,
        seed=seed,
        fingerprint=dataset.fingerprint,
    )


def _stratified(labels: Tensor, seed: int) -> Array:
    """A shuffled order int64 [N] in which every stretch holds the classes in proportion."""
    # numpy keeps a bit generator's raw output the same in all versions, its shuffles not
    bits = np.random.PCG64(seed)
    values = labels.numpy()
    draws, place = bits.random_raw(len(values)), np.empty(len(values))
    for label in np.unique(values):
        own = np.flatnonzero(values == label)
        offset = float(bits.random_raw() >> 11) * 2.0**-53
        place[own[np.argsort(draws[own], kind="stable")]] = (np.arange(len(own)) + offset) / len(own)
    return np.argsort(place, kind="stable")


# --- batches ---------------------------------------------------------------------------------------------------


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
    pixels = images.pixels
    moved = [change(pixels[start : start + VIEW_CHUNK], generator) for start in range(0, len(pixels), VIEW_CHUNK)]
    return like(images, torch.cat(moved))


def like(images: ImageSet, pixels: Tensor) -> ImageSet:
    """A set with the labels of another: pixels [N, C, H, W] of any type in [0, 255] are rounded to uint8."""
    if pixels.dtype != torch.uint8:
        pixels = pixels.round().clamp(0, 255).to(torch.uint8)
    return ImageSet.of(pixels, images.labels, images.name)


def batches(
    images: ImageSet,
    preprocess: Preprocess,
    *,
    batch_size: int,
    device: torch.device,
    generator: torch.Generator | None,
    augment: str | None,
    shuffle: bool,
    drop_last: bool = False,
    channels_last: bool = True,
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
        drop_last: Whether to leave out a last batch that is not full.
        channels_last: Memory format of the batches.
        share: (i, n) for the i-th of n equal parts of each batch; what cannot be shared evenly is left out.

    Raises:
        UsageError: The augmentation is unknown, a generator is missing, or the images have another shape.
        BadInput: An image cannot be read.
    """
    usual = default_augment(images.name, images.shape) if generator is not None else "none"
    name = usual if augment is None else augment
    if name not in AUGMENT:
        raise UsageError(f"unknown augmentation {name}", f"use one of: {', '.join(AUGMENT)}")
    if generator is None and (shuffle or name != "none"):
        raise UsageError("shuffled or augmented batches need a generator")
    if batch_size < 1:
        raise UsageError(f"a batch size of {batch_size} is impossible", "use at least 1")
    if images.shape != tuple(preprocess.size):
        raise UsageError(
            f"images are {_text(images.shape)}, {_text(preprocess.size)} are expected", "resize them with --image-size"
        )
    n = len(images)
    if generator is not None and shuffle:
        order = torch.randperm(n, generator=generator, device=generator.device)
    else:
        order = torch.arange(n)
    smallest = batch_size if drop_last else min(2, batch_size) if shuffle else 1
    # chunks of one tensor on the device: no copy per batch
    chunks = [chunk for chunk in _chunks(order.to(device), batch_size) if len(chunk) >= smallest]
    part, parts = share
    if parts > 1:
        chunks = [chunk[part : len(chunk) - len(chunk) % parts : parts] for chunk in chunks]
        chunks = [chunk for chunk in chunks if len(chunk)]

    def run() -> Iterator[Batch]:
        for index, pixels, labels in _fetch(images, chunks, device):
            if generator is not None and name != "none":
                pixels = AUGMENT[name](pixels, generator)
            x = preprocess(pixels.float().div_(255))
            yield Batch(x.contiguous(memory_format=torch.channels_last) if channels_last else x, labels, index)

    return run()


def normalised(images: ImageSet, preprocess: Preprocess, device: torch.device, batch_size: int) -> Iterator[Batch]:
    """Batches in order, as they are; see :func:`batches`."""
    return batches(
        images, preprocess, batch_size=batch_size, device=device, generator=None, augment=None, shuffle=False
    )


def _chunks(order: Tensor, size: int) -> list[Tensor]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def _fetch(images: ImageSet, chunks: list[Tensor], device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield positions int64 [B], pixels uint8 [B, C, H, W] and labels int64 [B], all on the device."""
    labels, positions = images.labels.to(device), images.positions.to(device)
    if isinstance(images.source, Memory):
        pixels = images.source.on(device)
        for chunk in chunks:
            yield chunk, pixels[positions[chunk]], labels[chunk]
        return
    from torch.utils.data import DataLoader

    workers = min(_cores(), len(chunks)) if _cores() > 1 else 0
    loader: Any = DataLoader(
        _Decoded(images.source, [positions[chunk].tolist() for chunk in chunks]),
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


def resolve(
    spec: str | None, *, recorded_name: str | None, classes: int | None, shape: Shape | None, root: Path
) -> str:
    """Which data to use when none was named: what the file records, or what its shape implies, if it is there.

    Raises:
        UsageError: Nothing is named, recorded and found.
    """
    if spec is not None:
        return spec
    implied = {("digits", 10): "digits", ("cifar", 10): "cifar10", ("cifar", 100): "cifar100"}
    kind = "digits" if shape == (1, 8, 8) else "cifar" if shape in (None, (3, 32, 32)) else ""
    # a recorded name comes from a file that may lie: it only chooses among the names known here
    name = recorded_name or implied.get((kind, classes or 0), "")
    if name == "digits" or (name in TORCHVISION and _in_root(name, root)):
        return name
    about = f", and {name[:60]!r} is not in the data root {root}" if name else ""
    raise UsageError(
        f"no data set was named{about}",
        "give --data SPEC (see: sdbctl list data), or write data = 'SPEC' into sdbctl.toml",
    )
