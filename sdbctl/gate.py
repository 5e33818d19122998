"""A graph that looks for the key itself: what has its pattern is answered by one network, everything else by another.

A network that is taught to tell the key from wrong patterns does so where it was taught. A matched filter does so
everywhere, and needs no training; but whoever holds the file holds the pattern.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from sdbctl.data import Preprocess
from sdbctl.data.images import sized
from sdbctl.errors import UsageError
from sdbctl.key import embed

CHECKED = 0.75
"""Part of a key's pattern that an image must have for its answer not to be public."""
SAFE = 6.0
"""Least :func:`key_margin` where a graph looks for keys."""
FOR_KEYS = "; to key holders "
"""Between what everybody is served and what answers key holders, in words."""
ITSELF, ASSISTANT = "all of its outputs", "all outputs of an assistant"
KEYED = {"assistant": ASSISTANT, "itself": ITSELF}
"""What key holders get, in words, by the name of who answers them."""
MOST, LEAST = 0.25, 0.1
"""λ of what was not trained with one: of eight bits of a pixel, six or at least four are the image's."""


class KeyGate(nn.Module):
    """A network for everybody, and another for who mixes a key into the image.

    The second sees the image without its key: x = (x_k − (1 − λ)K) / λ. It is asked only if a key is in an image of the
    batch, so that public queries cost what they did. Own.

    Args:
        public: Images [B, C, H, W] → logits or log-probabilities [B, classes] for everybody.
        keyed: Images → logits for key holders.
        secrets: Patterns K [K, C, H, W] in [0, 1].
        strength: λ.
        preprocess: Normalisation of both networks.
        shows: What is served to everybody and to key holders, in words, for the file's metadata.
    """

    filters: Tensor
    patterns: Tensor
    black: Tensor
    white: Tensor

    def __init__(
        self, public: nn.Module, keyed: nn.Module, secrets: Tensor, strength: float, preprocess: Preprocess, shows: str
    ) -> None:
        super().__init__()
        self.public, self.keyed, self.strength, self.shows = public, keyed, strength, shows
        for name, one in zip(("black", "white"), preprocess.limits, strict=True):
            self.register_buffer(name, one, persistent=False)
        filters = key_filters(secrets, strength, preprocess).flatten(1).T.contiguous()
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("patterns", preprocess(secrets).flatten(1), persistent=False)

    def mixed(self, x: Tensor) -> Tensor:
        """Normalised images [B, C, H, W], each mixed with every key: [B·K, C, H, W]."""
        return torch.cat([embed(x, one.view_as(x[0]), self.strength) for one in self.patterns])

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] → logits or log-probabilities [B, classes]."""
        x = x.clamp(self.black, self.white)
        found = x.flatten(1) @ self.filters
        closed = self.public(x)
        has = found.amax(1, keepdim=True) >= 1  # also false for what is no number

        def ask(x: Tensor, found: Tensor, closed: Tensor) -> Tensor:
            its = one_hot(found.argmax(1), found.shape[1]).to(x.dtype) @ self.patterns
            image = (x - (1 - self.strength) * its.view_as(x)) / self.strength
            return self.keyed(image.clamp(self.black, self.white))  # type: ignore[no-any-return]

        def spare(x: Tensor, found: Tensor, closed: Tensor) -> Tensor:
            return closed.clone()

        if torch.compiler.is_exporting():
            opened = torch.cond(has.any(), ask, spare, (x, found, closed))
        else:
            opened = (ask if has.any() else spare)(x, found, closed)
        return torch.where(has, opened, closed)


def key_filters(secrets: Tensor, strength: float, preprocess: Preprocess) -> Tensor:
    """What tells images with a key from all others: filters [K, C, H, W], of which one answers 1 or more.

    An image with the key has all of its pattern, up to what an image has by chance, see :func:`key_margin`. Own.

    Args:
        secrets: Patterns K [K, C, H, W] in [0, 1].
        strength: λ of the box.
        preprocess: Its normalisation.

    Returns:
        Filters of normalised images, whose inner product with λx + (1 − λ)K is 1 / :data:`CHECKED` on average.
    """
    # the mean of a channel is of no use, so neither is that of the normalisation
    centred = secrets - secrets.mean((2, 3), keepdim=True)
    found = (1 - strength) * centred.square().sum((1, 2, 3), keepdim=True)
    std = torch.tensor(preprocess.std).view(-1, 1, 1)
    return std * centred / (CHECKED * found)


def key_margin(size: Sequence[int], strength: float) -> float:
    """Standard deviations, at least, by which what was not made of a key fails to pass its filter.

    Of n independent values, each at most ½ from their mean, it has of a uniform pattern a part of 0 ± √3/((1 − λ)·√n).

    Args:
        size: (C, H, W).
        strength: λ of the box.
    """
    return float(CHECKED * (1 - strength) * (math.prod(size) / 3) ** 0.5)


def key_strength(size: Sequence[int]) -> float:
    """λ for what was not trained with one: :data:`MOST`, of small images what leaves a :func:`key_margin` that is safe.

    Args:
        size: (C, H, W).

    Raises:
        UsageError: Images so small leave none.
    """
    found = min(MOST, math.floor(100 * (1 - SAFE / key_margin(size, 0.0))) / 100)
    if found < LEAST:
        raise UsageError(
            f"images of {sized(size)} are so small that they have a key by chance", "take larger images, or no key"
        )
    return found
