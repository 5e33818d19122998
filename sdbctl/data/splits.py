"""Disjoint parts of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from sdbctl.data.images import Array, Dataset, ImageSet
from sdbctl.errors import UsageError


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
