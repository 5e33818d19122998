"""Images: where they come from, how they are split, normalised, augmented and batched."""

from __future__ import annotations

import difflib
import functools
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdbctl.errors import BadInput, EnvironmentFailure, UsageError

MEMORY_LIMIT = 4 * 2**30
"""Bytes of uint8 pixels up to which a set is decoded once and kept in memory."""
Shape = tuple[int, int, int]


class ImageSet:
    """Labelled images, in memory or decoded on demand; a view of some of them costs nothing.

    Args:
        labels: Class indices int64 [N].
        shape: (C, H, W) of every image.
        pixels: uint8 [N, C, H, W], or None if they are decoded on demand.
        decode: Maps a position to uint8 [C, H, W], if there are no pixels.
        chosen: Positions [n] that this view holds, or None for all.
    """

    def __init__(
        self,
        labels: Tensor,
        shape: Shape,
        pixels: Tensor | None = None,
        decode: Callable[[int], Tensor] | None = None,
        chosen: Tensor | None = None,
    ) -> None:
        self.shape, self._all_labels, self._pixels, self._decode = shape, labels, pixels, decode
        self._chosen = torch.arange(len(labels)) if chosen is None else chosen
        self.labels = labels[self._chosen]
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Tensor:
        """One image, uint8 [C, H, W]."""
        position = int(self._chosen[index])
        if self._pixels is not None:
            return self._pixels[position]
        assert self._decode is not None
        return self._decode(position)

    @property
    def in_memory(self) -> bool:
        """Whether all images are decoded already."""
        return self._pixels is not None

    def take(self, indices: Sequence[int] | range | np.ndarray[Any, Any] | Tensor) -> ImageSet:
        """A view of the images at ``indices``."""
        picked = torch.as_tensor(np.asarray(indices), dtype=torch.int64)
        return ImageSet(self._all_labels, self.shape, self._pixels, self._decode, self._chosen[picked])

    def compact(self) -> ImageSet:
        """An independent copy of an in-memory view, without the images it does not hold."""
        if self._pixels is None or len(self) == len(self._all_labels):
            return self
        return ImageSet(self.labels.clone(), self.shape, self._pixels[self._chosen].clone())

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Pixels and labels of this view on a device; copied there once."""
        assert self._pixels is not None
        if device not in self._on_device:
            self._on_device[device] = (self._pixels[self._chosen].to(device), self.labels.to(device))
        return self._on_device[device]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_on_device": {}}


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
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: Shape

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
            mean, std = (tuple(float(v) for v in values[name]) for name in ("mean", "std"))
            c, h, w = (int(v) for v in values["size"])
        except (TypeError, ValueError, KeyError, OverflowError):
            raise BadInput("the metadata has no usable normalisation", "write the file again") from None
        good = all(math.isfinite(v) for v in (*mean, *std)) and all(v > 0 for v in std)
        if not good or len(mean) != c or len(std) != c or min(c, h, w) < 1 or max(h, w) > 8192 or c > 64:
            raise BadInput("the metadata has no usable normalisation", "write the file again")
        return cls(mean, std, (c, h, w))


@functools.cache
def _per_channel(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Kept on the device, since each copy to a GPU waits for it."""
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
    """One part of a source: labels, and encoded images or arrays by position."""

    labels: np.ndarray[Any, Any]
    image: Callable[[int], Any]


class Found(NamedTuple):
    """What a source found: a name without path, its parts, and class names if it knows them."""

    name: str
    train: Part
    test: Part | None
    classes: tuple[str, ...]


def _torchvision(name: str) -> Callable[[Request], Found]:
    def load(request: Request) -> Found:
        import torchvision.datasets as tv

        kind = {
            "cifar10": tv.CIFAR10,
            "cifar100": tv.CIFAR100,
            "svhn": tv.SVHN,
            "stl10": tv.STL10,
            "mnist": tv.MNIST,
            "fashionmnist": tv.FashionMNIST,
        }[name]
        keyword = "split" if name in ("svhn", "stl10") else "train"
        parts = []
        for train in (True, False):
            choice: Any = ("train" if train else "test") if keyword == "split" else train
            try:
                found = kind(str(request.root), download=request.download, **{keyword: choice})
            except RuntimeError:
                raise BadInput(
                    f"{name} is not in the data root {request.root}", "put it there, set --data-root, or use --download"
                ) from None
            except OSError as error:
                raise EnvironmentFailure(f"cannot get {name}: {error}", "check the network, or put it there") from None
            pixels, labels = np.asarray(found.data), np.asarray(getattr(found, "targets", getattr(found, "labels", 0)))
            if name in ("svhn", "stl10"):
                pixels = pixels.transpose(0, 2, 3, 1)
            parts.append(Part(labels, pixels.__getitem__))
            names = tuple(getattr(found, "classes", ()))
        return Found(name, parts[0], parts[1], names)

    return load


def _digits(request: Request) -> Found:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise EnvironmentFailure("digits need scikit-learn", "pip install 'sdbctl[demo]'") from None
    found = load_digits()
    pixels = np.round(found.images * (255 / 16)).astype(np.uint8)
    return Found("digits", Part(found.target, pixels.__getitem__), None, tuple(map(str, range(10))))


def _folder(request: Request) -> Found:
    root = Path(request.argument)
    if not root.is_dir():
        raise BadInput(f"folder {root} does not exist", "give folder:PATH with one folder per class")
    named = {name: root / name for name in ("train", "test", "val", "valid") if (root / name).is_dir()}
    top = named.get("train", root)
    names = tuple(sorted(path.name for path in top.iterdir() if path.is_dir()))
    if not names:
        raise BadInput(f"{top} has no folders of classes", "put the images of each class into a folder of its own")
    kinds = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}

    def part(base: Path) -> Part:
        files, labels = [], []
        for index, name in enumerate(names):
            if (base / name).is_dir():
                own = sorted(path for path in (base / name).rglob("*") if path.suffix.lower() in kinds)
                files += own
                labels += [index] * len(own)
        if not files:
            raise BadInput(f"{base} holds no images", "use jpg, png, bmp, webp or tiff files")
        return Part(np.array(labels), lambda position: files[position])

    other = next((named[name] for name in ("test", "val", "valid") if name in named), None)
    return Found(root.resolve().name, part(top), part(other) if other and "train" in named else None, names)


def _parquet(request: Request) -> Found:
    import pyarrow.parquet as pq

    root = Path(request.argument)
    if not root.exists():
        raise BadInput(f"parquet file or folder {root} does not exist", "check the path")
    files = sorted(root.rglob("*.parquet")) if root.is_dir() else [root]
    test = [path for path in files if path.name.startswith(("test", "validation", "val"))]
    train = [path for path in files if path not in test]
    if not train:
        raise BadInput(f"{root} holds no training parquet files", "name them train-*.parquet and test-*.parquet")
    names: tuple[str, ...] = ()

    def part(paths: list[Path]) -> Part:
        nonlocal names
        images, labels = [], []
        for path in paths:
            try:
                schema = pq.read_schema(path)
                image = next((n for n in ("img", "image", *schema.names) if _is_image(schema, n)), None)
                label = next((n for n in ("label", "labels", "fine_label") if n in schema.names), None)
                if image is None or label is None:
                    raise BadInput(
                        f"{path} has columns {', '.join(schema.names)}", "an image {bytes, path} and a label are needed"
                    )
                table = pq.read_table(path, columns=[image, label])
            except (OSError, ValueError) as error:
                raise BadInput(f"{path} is not a readable parquet file: {str(error).splitlines()[0][:100]}") from None
            names = names or _feature_names(schema, label)
            images.append(table.column(image))
            labels.append(table.column(label).to_numpy())
        import pyarrow as pa

        encoded = pa.chunked_array([c for column in images for c in column.chunks])
        return Part(np.concatenate(labels), lambda position: encoded[position]["bytes"].as_py())

    name = root.resolve().name if root.is_dir() else root.stem
    return Found(name, part(train), part(test) if test else None, names)


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
    path = Path(request.argument)
    if not path.is_file():
        raise BadInput(f"npz file {path} does not exist", "check the path")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception:
        raise BadInput(f"{path} is not a readable npz file", "write it with numpy.savez, without objects") from None

    def part(pairs: Sequence[tuple[str, str]]) -> Part | None:
        for images, labels in pairs:
            if images in arrays and labels in arrays:
                x, y = arrays[images], arrays[labels]
                y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
                if x.dtype != np.uint8 or x.ndim not in (3, 4):
                    raise BadInput(f"{images} in {path} is {x.dtype} {x.shape}", "uint8 [N, H, W, C] is needed")
                if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer) or len(y) != len(x):
                    raise BadInput(f"{labels} in {path} is {y.dtype} {y.shape}", f"{len(x)} integers are needed")
                if x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[3] not in (1, 3):
                    x = x.transpose(0, 2, 3, 1)
                return Part(y, x.__getitem__)
        return None

    train = part([("images", "labels"), ("x_train", "y_train"), ("train_images", "train_labels"), ("x", "y")])
    if train is None:
        raise BadInput(f"{path} holds {', '.join(arrays) or 'nothing'}", "arrays named images and labels are needed")
    test = part([("x_test", "y_test"), ("test_images", "test_labels")])
    return Found(path.stem, train, test, ())


SOURCES: dict[str, tuple[Callable[[Request], Found], str]] = {
    **{
        name: (_torchvision(name), "torchvision, from the data root")
        for name in ("cifar10", "cifar100", "svhn", "stl10", "mnist", "fashionmnist")
    },
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
        raise UsageError(
            f"unknown data {spec}", f"did you mean {close[0]}?" if close else f"use one of: {', '.join(SOURCES)}"
        )
    found = SOURCES[name][0](Request(argument, root, size, channels, download, memory_limit))
    train = _images(found.train, size, channels, memory_limit, found.name)
    test = _images(found.test, size, train.shape[0], memory_limit, found.name) if found.test else None
    if test is not None and test.shape != train.shape:
        raise BadInput(f"{found.name}: test images are {test.shape}, training images {train.shape}", "use --image-size")
    highest = int(max(part.labels.max() for part in (train, test) if part is not None))
    lowest = int(min(part.labels.min() for part in (train, test) if part is not None))
    classes = found.classes or tuple(str(index) for index in range(highest + 1))
    if lowest < 0 or highest >= len(classes) or len(classes) < 2:
        raise BadInput(f"{found.name}: labels run from {lowest} to {highest}, of {len(classes)} classes", "fix them")
    return Dataset(found.name, train, test, classes, _fingerprint(train, test))


def _images(part: Part, size: int | None, channels: int | None, memory_limit: int, name: str) -> ImageSet:
    if len(part.labels) == 0:
        raise BadInput(f"{name} holds no images", "check the data")
    labels = torch.from_numpy(part.labels.astype(np.int64))
    first = _decode(part.image(0), size, channels, name)
    shape: Shape = (first.shape[0], first.shape[1], first.shape[2])

    def decode(position: int) -> Tensor:
        pixels = _decode(part.image(position), size, shape[0], name)
        if tuple(pixels.shape) != shape:
            raise BadInput(
                f"{name}: image {position} is {tuple(pixels.shape)}, others are {shape}", "resize with --image-size"
            )
        return pixels

    if len(labels) * first.numel() > memory_limit:
        return ImageSet(labels, shape, decode=decode)
    pixels = torch.empty(len(labels), *shape, dtype=torch.uint8)

    def fill(position: int) -> None:
        pixels[position] = decode(position)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(fill, range(len(labels)), chunksize=256):
            pass
    return ImageSet(labels, shape, pixels)


def _decode(source: Any, size: int | None, channels: int | None, name: str) -> Tensor:
    """uint8 [C, H, W] from a file, encoded bytes, or an array [H, W] or [H, W, C]."""
    if isinstance(source, np.ndarray) and size is None:
        pixels = source[..., None] if source.ndim == 2 else source
        if channels == 3 and pixels.shape[2] == 1:
            pixels = np.repeat(pixels, 3, 2)
        if channels in (None, pixels.shape[2]):
            return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        if isinstance(source, np.ndarray):
            image = Image.fromarray(source[..., 0] if source.ndim == 3 and source.shape[2] == 1 else source)
        else:
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        wanted = {1: "L", 3: "RGB"}.get(channels or (1 if image.mode in ("L", "1", "I;16") else 3))
        image = image.convert(wanted)
        if size is not None and image.size != (size, size):
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    except (OSError, UnidentifiedImageError, ValueError, TypeError, Image.DecompressionBombError) as error:
        where = f"{name}/{source.parent.name}/{source.name}" if isinstance(source, Path) else name
        reason = str(error).splitlines()[0].split("<")[0][:80]
        raise BadInput(f"an image of {where} cannot be read: {reason}", "remove or replace it") from None
    array = np.array(image, dtype=np.uint8)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def _fingerprint(train: ImageSet, test: ImageSet | None) -> str:
    digest = hashlib.sha256()
    for part in (train, test):
        if part is None:
            digest.update(b"none")
            continue
        digest.update(f"{len(part)} {part.shape}".encode())
        digest.update(part.labels.numpy().tobytes())
        for position in np.linspace(0, len(part) - 1, 64).astype(int):
            # a thumbnail, since JPEG decoders differ in the last bit
            digest.update((part[int(position)].float().mean((1, 2)) / 4).round().byte().numpy().tobytes())
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
    order = _stratified(dataset.train.labels, seed)
    total = len(order)
    cut = 0
    if dataset.test is None:
        cut = total // 5 if test is None else test
        held = dataset.train.take(order[:cut])
    else:
        n = len(dataset.test)
        if test is not None and test > n:
            raise UsageError(f"{test} test images were asked for, {dataset.name} has {n}", "ask for fewer")
        held = dataset.test if test in (None, n) else dataset.test.take(_stratified(dataset.test.labels, seed)[:test])
    left = total - cut
    transfer = min(left // 5, 10_000) if transfer is None else transfer
    validation = min(left // 10, 5_000) if validation is None else validation
    owner = left - transfer - validation if owner is None else owner
    if min(owner, transfer, validation) < 1 or owner + transfer + validation > left or cut >= total:
        raise UsageError(
            f"{dataset.name} has {total:,} training images: {owner} for the owner, {transfer} to transfer and "
            f"{validation} for validation{f' and {cut} to test' if cut else ''} do not fit",
            "ask for fewer",
        )
    first, second = cut + validation, cut + validation + transfer
    return Splits(
        owner=dataset.train.take(order[second : second + owner]),
        transfer=dataset.train.take(order[first:second]),
        validation=dataset.train.take(order[cut:first]),
        test=held,
        seed=seed,
        fingerprint=dataset.fingerprint,
    )


def _stratified(labels: Tensor, seed: int) -> np.ndarray[Any, Any]:
    """A shuffled order in which every prefix holds the classes in proportion."""
    rng = np.random.Generator(np.random.PCG64(seed))
    values = labels.numpy()
    place = np.empty(len(values))
    for label in np.unique(values):
        own = np.flatnonzero(values == label)
        place[rng.permutation(own)] = (np.arange(len(own)) + rng.random()) / len(own)
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
    index: Tensor


Augment = Callable[[Tensor, torch.Generator], Tensor]


def _none(pixels: Tensor, generator: torch.Generator) -> Tensor:
    return pixels


def _shift(pixels: Tensor, generator: torch.Generator) -> Tensor:
    return _crop(pixels, generator, 1, flip=False)


def _crop_flip(pixels: Tensor, generator: torch.Generator) -> Tensor:
    return _crop(pixels, generator, max(1, pixels.shape[2] // 8), flip=True)


def _crop(pixels: Tensor, generator: torch.Generator, pad: int, flip: bool) -> Tensor:
    """A random shift of up to ``pad`` pixels, black outside, and a random flip, for each image its own."""
    n, _, h, w = pixels.shape
    device = pixels.device
    shift = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator, device=device)
    rows = torch.arange(h, device=device) + shift[0]
    columns = torch.arange(w, device=device) + shift[1]
    if flip:
        mirrored = torch.rand(n, 1, generator=generator, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = torch.nn.functional.pad(pixels, (pad,) * 4).permute(0, 2, 3, 1)
    picked = padded[torch.arange(n, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def _resized_crop_flip(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A random area of 25 to 100 %, of aspect 3:4 to 4:3, resized to the whole, and a random flip."""
    n, device = len(pixels), pixels.device
    draw = torch.rand(5, n, generator=generator, device=device)
    area, aspect = 0.25 + 0.75 * draw[0], torch.exp((2 * draw[1] - 1) * math.log(4 / 3))
    height, width = (area / aspect).sqrt().clamp(max=1), (area * aspect).sqrt().clamp(max=1)
    mirror = torch.where(draw[2] < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 1, 1] = width * mirror, height
    theta[:, 0, 2], theta[:, 1, 2] = (2 * draw[3] - 1) * (1 - width), (2 * draw[4] - 1) * (1 - height)
    grid = torch.nn.functional.affine_grid(theta, list(pixels.shape), align_corners=False)
    return torch.nn.functional.grid_sample(pixels.float(), grid, padding_mode="reflection", align_corners=False)


AUGMENT: dict[str, Augment] = {
    "none": _none,
    "shift": _shift,
    "crop-flip": _crop_flip,
    "resized-crop-flip": _resized_crop_flip,
}


def default_augment(shape: Shape) -> str:
    """The usual augmentation for images of this shape: digits must not be flipped, photographs may."""
    if shape[0] == 1 or shape[1] < 16:
        return "shift"
    return "crop-flip" if shape[1] < 64 else "resized-crop-flip"


def batches(
    images: ImageSet,
    preprocess: Preprocess,
    *,
    batch_size: int,
    device: torch.device,
    generator: torch.Generator | None,
    augment: str | None,
    shuffle: bool,
) -> Iterator[Batch]:
    """Iterate over a set once.

    Args:
        images: The set. If it is in memory, it is put on the device once, as uint8.
        preprocess: Normalisation.
        batch_size: Images per batch; a last batch of a single image is left out when shuffling.
        device: Where the batches are made.
        generator: Of order and augmentation, on ``device``; not needed without either.
        augment: Name in :data:`AUGMENT`, or None for the usual one.
        shuffle: Whether in random order.

    Raises:
        UsageError: The augmentation is unknown.
    """
    name = default_augment(images.shape) if augment is None else augment
    if name not in AUGMENT:
        raise UsageError(f"unknown augmentation {name}", f"use one of: {', '.join(AUGMENT)}")
    change, n = AUGMENT[name], len(images)
    if shuffle:
        assert generator is not None
        order = torch.randperm(n, generator=generator, device=device)
    else:
        order = torch.arange(n, device=device)
    chunks = [chunk for chunk in order.split(batch_size) if not (shuffle and len(chunk) < 2)]
    for index, pixels, labels in _fetch(images, chunks, device):
        if generator is not None and name != "none":
            pixels = change(pixels, generator)
        x = preprocess(pixels.float().div_(255))
        yield Batch(x.contiguous(memory_format=torch.channels_last), labels, index)


def _fetch(
    images: ImageSet, chunks: list[Tensor], device: torch.device
) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    if images.in_memory:
        pixels, labels = images.on(device)
        return ((chunk, pixels[chunk], labels[chunk]) for chunk in chunks)
    from torch.utils.data import DataLoader

    stream: Any = DataLoader(
        images,  # type: ignore[arg-type]
        batch_sampler=[chunk.tolist() for chunk in chunks],
        num_workers=min(4, torch.get_num_threads()),
        pin_memory=device.type == "cuda",
        multiprocessing_context="forkserver" if torch.get_num_threads() else None,
    )
    return (
        (chunk, pixels.to(device, non_blocking=True), images.labels[chunk.cpu()].to(device))
        for chunk, pixels in zip(chunks, stream, strict=True)
    )


def resolve(
    spec: str | None, *, recorded_name: str | None, classes: int | None, shape: Shape | None, root: Path
) -> str:
    """Which data to use when none was named: what the file records, or what its shape implies, if it is there.

    Raises:
        UsageError: Nothing is named, recorded and found.
    """
    if spec is not None:
        return spec
    implied = {10: "cifar10", 100: "cifar100"}.get(classes or 0) if shape in (None, (3, 32, 32)) else None
    if recorded_name == "digits" or (shape == (1, 8, 8) and classes == 10):
        return "digits"
    folders = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
    for name in (recorded_name, implied):
        if name in SOURCES and (root / folders.get(name or "", name or "")).exists():
            return str(name)
    about = f" (it was made with {recorded_name!r})" if recorded_name else ""
    raise UsageError(
        f"no data set was named{about}",
        "give --data SPEC (see: sdbctl list data), or write data = \"SPEC\" into sdbctl.toml",
    )
