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
from sdbctl.key import Key, embed

CHECKED = 0.75
"""Part of a key's pattern that an image must have for its answer not to be public."""
SAFE = 6.0
"""Least :func:`key_margin` where a graph looks for keys."""
ITSELF, ASSISTANT, ANOTHER = "itself", "assistant", "another "
"""Doors: who answers key holders. Another model's has its architecture's name behind it."""
KEYED = {ITSELF: "all of its outputs", ASSISTANT: "all outputs of an assistant"}
"""What they are answered, in words, of the doors that have a name of their own."""
MOST, LEAST = 0.25, 0.1
"""λ of what was not trained with one: of eight bits of a pixel, six or at least four are the image's."""


class KeyGate(nn.Module):
    """A network for everybody, and others for who mixes a key into the image.

    A key has a pattern for each of them, its doors. They see the image without it: x = (x_k − (1 − λ)K) / λ, and are
    asked only if their pattern is in an image of the batch, so that public queries cost what they did. Own.

    Args:
        public: Images [B, C, H, W] → logits or log-probabilities [B, classes] for everybody.
        answers: Networks for key holders, images → logits, one for each door.
        secrets: Patterns K [K, D, C, H, W] in [0, 1] of K keys and D doors.
        strength: λ.
        preprocess: Normalisation of all networks.
    """

    filters: Tensor
    patterns: Tensor
    black: Tensor
    white: Tensor

    def __init__(
        self,
        public: nn.Module,
        answers: Sequence[nn.Module],
        secrets: Tensor,
        strength: float,
        preprocess: Preprocess,
    ) -> None:
        super().__init__()
        self.public, self.answers, self.strength = public, nn.ModuleList(answers), strength
        secrets = secrets.flatten(0, 1)
        for name, one in zip(("black", "white"), preprocess.limits, strict=True):
            self.register_buffer(name, one, persistent=False)
        filters = key_filters(secrets, strength, preprocess).flatten(1).T.contiguous()
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("patterns", preprocess(secrets).flatten(1), persistent=False)

    def mixed(self, x: Tensor) -> Tensor:
        """Normalised images [B, C, H, W], each mixed with every pattern: [K·D·B, C, H, W]."""
        return torch.cat([embed(x, one.view_as(x[0]), self.strength) for one in self.patterns])

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] → logits or log-probabilities [B, classes]."""
        x = x.clamp(self.black, self.white)
        found = x.flatten(1) @ self.filters
        shown: Tensor = self.public(x)
        has = found.amax(1, keepdim=True) >= 1  # also false for what is no number
        which = found.argmax(1, keepdim=True) % len(self.answers)
        for door, net in enumerate(self.answers):
            asks = has & (which == door)
            shown = torch.where(asks, self._ask(net, x, found, shown, asks.any()), shown)
        return shown

    def _ask(self, net: nn.Module, x: Tensor, found: Tensor, shown: Tensor, needed: Tensor) -> Tensor:
        """What a network says of images without the pattern that was found in each, if that is needed."""

        def ask(x: Tensor, found: Tensor, shown: Tensor) -> Tensor:
            its = one_hot(found.argmax(1), found.shape[1]).to(x.dtype) @ self.patterns
            image = (x - (1 - self.strength) * its.view_as(x)) / self.strength
            return net(image.clamp(self.black, self.white))  # type: ignore[no-any-return]

        def spare(x: Tensor, found: Tensor, shown: Tensor) -> Tensor:
            return shown.clone()

        if torch.compiler.is_exporting():
            return torch.cond(needed, ask, spare, (x, found, shown))  # type: ignore[no-any-return]
        return (ask if needed else spare)(x, found, shown)


def patterns(keys: Sequence[Key], size: tuple[int, int, int], doors: int) -> Tensor:
    """Patterns [K, D, C, H, W] of some keys, for so many doors of a :class:`KeyGate`."""
    return torch.stack([torch.stack([key.pattern(size, door) for door in range(doors)]) for key in keys])


def in_words(serves: str, doors: Sequence[str]) -> str:
    """What a graph serves to everybody and, if it looks for keys, through its doors."""
    return f"{serves}; to key holders {opened(doors)}" if doors else serves


def opened(doors: Sequence[str]) -> str:
    """What doors open, in words, with their numbers if there are several."""
    words = [KEYED.get(door, f"all outputs of {door}") for door in doors]
    return ", ".join(f"({number}) {what}" for number, what in enumerate(words, 1)) if len(words) > 1 else "".join(words)


def best_door(doors: Sequence[str], *, itself: bool, late: bool) -> int:
    """The door through which a student learns most, from 0: the network itself or an assistant, or else the first.

    Args:
        doors: Those of a graph.
        itself: Whether students of so many images were not seen to learn more from assistants.
        late: Whether they are enough for the last assistant, who was taught longest.
    """
    if itself and ITSELF in doors:
        return doors.index(ITSELF)
    found = [number for number, door in enumerate(doors) if door == ASSISTANT] or [0]
    return found[-1 if late else 0]


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


def key_strength(size: Sequence[int], asked: float = MOST) -> float:
    """λ for what was not trained with one: :data:`MOST`, of small images what leaves a :func:`key_margin` that is safe.

    Args:
        size: (C, H, W).
        asked: Another λ.

    Raises:
        UsageError: Images so small leave none, or not the one that was asked for.
    """
    most = math.floor(100 * (1 - SAFE / key_margin(size, 0.0))) / 100
    if most < LEAST:
        why = f"images of {sized(size)} are so small that they have a key by chance"
        raise UsageError(why, "take larger images; box --objective conceal takes these, but searches find such keys")
    if asked == MOST:
        return min(MOST, most)
    if not LEAST <= asked <= most:
        why = f"at a key strength of {asked:g} a graph cannot tell the key from chance, or hardly sees the image"
        raise UsageError(why, f"of {sized(size)} it may be {LEAST:g} to {most:g}")
    return asked
