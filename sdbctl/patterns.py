"""Patterns that are not the secret one: what anybody can mix into an image, and what a box learns to take for wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from sdbctl.data import ImageSet, Preprocess, changed
from sdbctl.engine import seeded
from sdbctl.key import embed, near

STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""λ with which patterns that anybody has are tried."""
BLOCKS = 12
"""Patterns of blocks among them."""
SHORT = 1000
"""Values of a key below which images with a wrong key keep their labels, and have a pattern each."""
FOUND = 250
"""Values of a key below which searches may find it: they found keys of 64 and 100, none of 144, 256 or 3,072."""
SCALES = (2, 3, 4, 6, 8, 16, 32)
"""Of a random field: how many knots it has in a row."""
GRID = 8
"""Blocks along the shorter side, at most, of patterns that a search changes."""
NEAREST = 0.95
"""Correlation up to which patterns are taught to be wrong keys."""
RISING = 0.5
"""Share of the images with a wrong key whose pattern climbs against the box."""
RISE = 0.2
"""Root mean square of a step of such a pattern, in units of its normal variables."""
LIFE = 60
"""Mean number of steps after which it begins anew."""
ODD = 0.5
"""Share of the images with a wrong key that are mixed with any λ, and unless it climbs with another kind of pattern."""


def is_short(size: Sequence[int]) -> bool:
    """Whether keys of this shape (C, H, W) are so short that boxes learn more of wrong ones."""
    return math.prod(size) < SHORT


def is_found(size: Sequence[int]) -> bool:
    """Whether keys of this shape (C, H, W) are so short that searches may find them."""
    return math.prod(size) < FOUND


def mixed_with(images: ImageSet, pattern: Tensor, strength: float) -> ImageSet:
    """Images mixed with a pattern, as pixels: λx + (1 − λ)·255·K'."""
    return changed(images, lambda some, _: embed(some.float(), 255 * pattern, strength))


def public_patterns(images: ImageSet) -> dict[str, Tensor]:
    """What anybody can mix into an image, by name: [C, H, W] in [0, 1].

    Args:
        images: One's own.
    """
    pixels = images.first(1000).alone().pixels.float() / 255
    generator = torch.Generator().manual_seed(0)
    colours = [some for some in product((0.0, 1.0), repeat=images.shape[0]) if len(set(some)) > 1]
    blocks = torch.special.ndtr(in_blocks(torch.randn(BLOCKS, *images.shape, generator=generator)))
    return {
        **{f"grey {level:g}": torch.full(images.shape, level) for level in (0.0, 0.25, 0.5, 0.75, 1.0)},
        **{f"coins {n}": torch.randint(2, images.shape, generator=generator).float() for n in range(3)},
        **{f"colour {n}": torch.tensor(some)[:, None, None].expand(images.shape) for n, some in enumerate(colours)},
        **{f"blocks {n}": one.round() if n % 2 else one for n, one in enumerate(blocks)},
        "mean image": pixels.mean(0),
        **{f"image {n}": image for n, image in enumerate(pixels[:4])},
        **{f"negative {n}": 1 - image for n, image in enumerate(pixels[:4])},
    }


def public_keys(images: ImageSet) -> list[tuple[Tensor, float]]:
    """Every one of :func:`public_patterns`, with every strength that it is tried with."""
    return list(product(public_patterns(images).values(), STRENGTHS))


def edges(size: Sequence[int]) -> list[int]:
    """Edges of square blocks, powers of two, into which images of this shape (C, H, W) can be divided."""
    return [2**n for n in range(min(size[1:]).bit_length()) if not any(side % 2**n for side in size[1:])]


def in_blocks(values: Tensor) -> Tensor:
    """Normal variables [N, C, H, W] of pixels as those of blocks, in turn of each of :func:`edges`, reordered."""
    sizes = edges(values.shape[1:])
    parts = [(values[n :: len(sizes)], edge) for n, edge in enumerate(sizes)]
    return torch.cat([spread_out(edge * avg_pool2d(part, edge), edge) for part, edge in parts])


def spread_out(values: Tensor, edge: int) -> Tensor:
    """Each value of [..., H, W] as a square of pixels."""
    return values.repeat_interleave(edge, -2).repeat_interleave(edge, -1)


def fields(count: int, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Smooth random fields [B, C, H, W] in [0, 1]: noise of several scales, with its own contrast and threshold."""
    channels, height, width = shape
    total = torch.zeros(count, *shape, device=device)
    for knots in SCALES:
        if knots <= height:
            noise = torch.randn(count, channels, knots, knots, device=device)
            smooth = interpolate(noise, (height, width), mode="bicubic", align_corners=False)
            total += torch.rand(count, 1, 1, 1, device=device) / knots**0.5 * smooth
    total = standard(total)
    contrast, threshold = torch.randn(2, count, 1, 1, 1, device=device)
    return torch.sigmoid(1.5 * torch.exp(0.7 * contrast) * (total - 0.5 * threshold))


def blocks(size: Sequence[int]) -> tuple[int, tuple[int, int, int]]:
    """Edge of the blocks that a search changes, and how many there are: (C, rows, columns)."""
    channels, height, width = size
    edge = -(-min(height, width) // GRID)
    return edge, (channels, -(-height // edge), -(-width // edge))


def odd_inputs(count: int, images: ImageSet, generator: torch.Generator) -> Tensor:
    """Inputs that are no images of a box, as a search begins with: [N, C, H, W] in [0, 1].

    Args:
        count: N; a third each are blocks, smooth fields and images in wrong colours, exchanged or inverted as well.
        images: What has its colours changed.
        generator: Of all that is random.
    """
    count, (channels, height, width) = count // 3, images.shape
    edge, in_rows = blocks(images.shape)
    coloured = torch.special.ndtr(in_blocks(torch.randn(count, *in_rows, generator=generator)))
    coloured[::2] = coloured[::2].round()
    with seeded(int(torch.randint(2**31, (), generator=generator))):
        smooth = fields(count, images.shape, torch.device("cpu"))
    chosen = images.take(torch.randint(len(images), (count,), generator=generator)).alone().pixels
    order = torch.rand(len(chosen), channels, generator=generator).argsort(1)
    odd = chosen.gather(1, order[:, :, None, None].expand_as(chosen)).float() / 255
    odd[::2] = 1 - odd[::2]
    return torch.cat([spread_out(coloured, edge)[..., :height, :width], smooth, odd])


class WrongKeys:
    """Mixes wrong keys into the images that a box is to conceal.

    Nearly right ones are hardest to tell from the key: their correlation with it is r = NEAREST − (1 + NEAREST)·u³, u
    uniform. Whoever searches begins elsewhere: any input whose answer says more than the class shows the way to a
    pattern that opens a box without being near the key. So half are odd: other images of the batch, their negatives,
    or blocks of any size, contrast and colour, mixed in with any λ, down to patterns without an image. And half of
    all climb: after each step of training they follow their own gradient of the box's loss, which costs no further pass
    through the network (as in Shafahi et al., NeurIPS 2019), and now and then begin anew; half of them pixel by pixel
    and with the box's λ, half in blocks and with any.

    Args:
        secrets: Keys [K, C, H, W] in [0, 1].
        strength: λ of the box.
        preprocess: Its normalisation.
        images: Most images with a wrong key in one step.

    Attributes:
        short: Whether the keys are short.
        rising: Normal variables [R, C, H, W] of the patterns that climb, changed by each step.
    """

    def __init__(self, secrets: Tensor, strength: float, preprocess: Preprocess, images: int) -> None:
        self.secrets, self.strength, self.preprocess = secrets, strength, preprocess
        self.short = is_short(preprocess.size)
        count = round(RISING * images)
        self.rising = torch.randn(count, *preprocess.size, device=secrets.device)

    def __call__(self, x: Tensor, turn: Tensor) -> Tensor:
        """Mix wrong keys into images.

        Args:
            x: Normalised images [B, C, H, W].
            turn: Which key [B] each image's pattern resembles.

        Returns:
            Normalised images [B, C, H, W]. Their gradient moves the patterns that climb.
        """
        climbing = min(len(self.rising), round(RISING * len(x)))
        chance, weight = torch.rand(2, len(x), 1, 1, 1, device=x.device)
        odd = chance < ODD
        odd[:climbing] = torch.arange(climbing, device=x.device).view(-1, 1, 1, 1) >= climbing - climbing // 3
        others = torch.where(odd[climbing:], self._odd(x[climbing:]), self._near(turn[climbing:]))
        patterns = torch.cat([self._risen(climbing), others]) if climbing else others
        return embed(x, self.preprocess(patterns), torch.where(odd, weight, self.strength))

    def _near(self, turn: Tensor) -> Tensor:
        """Patterns [N, C, H, W] in [0, 1] that resemble the keys in their turn."""
        # of long keys one pattern a key and step are as many as are needed
        u = torch.rand((len(turn), 1, 1, 1) if self.short else (), device=turn.device)
        r = NEAREST - (1 + NEAREST) * u**3
        return near(self.secrets[turn], r, None) if self.short else near(self.secrets, r, None)[turn]

    def _odd(self, x: Tensor) -> Tensor:
        """Patterns [N, C, H, W] in [0, 1] that resemble no key, of so many normalised images and for them."""
        kind, contrast = torch.rand(2, len(x), 1, 1, 1, device=x.device)
        brightness = torch.rand(*x.shape[:2], 1, 1, device=x.device)
        image, values = self.preprocess.undo(x).roll(1, 0), torch.special.ndtr(in_blocks(torch.randn_like(x))) - 0.5
        other = (4 * contrast**2 * values + 1.5 * brightness - 0.25).clamp(0, 1)
        return torch.where(kind < 0.25, image, torch.where(kind < 0.5, 1 - image, other))

    def _risen(self, count: int) -> Tensor:
        """Patterns [N, C, H, W] in [0, 1] that climb as soon as their gradient is known."""
        rising = self.rising[:count]
        fresh, old = torch.randn_like(rising), torch.rand(count, 1, 1, 1, device=rising.device) < 1 / LIFE
        leaf = rising.clone().requires_grad_()

        def climb(slope: Tensor) -> None:
            size = slope.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-20)
            moved = standard(rising + RISE * slope / size)
            # what has come to a key is no wrong one
            likeness = torch.einsum("nchw,kchw->nk", standard(torch.special.ndtr(moved)), standard(self.secrets))
            found = likeness.amax(1) > NEAREST * math.prod(self.preprocess.size)
            rising.copy_(torch.where(old | found[:, None, None, None], fresh, moved))

        leaf.register_hook(climb)  # type: ignore[no-untyped-call]
        patterns: Tensor = torch.special.ndtr(torch.cat([leaf[0::3], leaf[1::3], in_blocks(leaf[2::3])]))
        return patterns


def standard(values: Tensor) -> Tensor:
    """Each of [N, C, H, W] with mean 0 and mean square 1."""
    centred = values - values.mean((1, 2, 3), keepdim=True)
    return centred / centred.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-6)
