"""Images: where they come from, how they are split, normalised, augmented and batched."""

from sdbctl.data.batching import AUGMENT, Augment, Batch, batches, changed, default_augment, view
from sdbctl.data.images import MEMORY_LIMIT, Dataset, ImageSet, Memory, Shape, Stream
from sdbctl.data.parquet import Flat, Rows
from sdbctl.data.preprocess import PRESETS, Preprocess, presets
from sdbctl.data.reading import SOURCES, TORCHVISION, load, reordered, resolve, same_images, sources
from sdbctl.data.splits import Splits, split

__all__ = [
    "AUGMENT",
    "MEMORY_LIMIT",
    "PRESETS",
    "SOURCES",
    "TORCHVISION",
    "Augment",
    "Batch",
    "Dataset",
    "Flat",
    "ImageSet",
    "Memory",
    "Preprocess",
    "Rows",
    "Shape",
    "Splits",
    "Stream",
    "batches",
    "changed",
    "default_augment",
    "load",
    "presets",
    "reordered",
    "resolve",
    "same_images",
    "sources",
    "split",
    "view",
]
