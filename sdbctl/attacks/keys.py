"""Attacks on the secret pattern: guess it or search for it, then distil with what was found.

The box's λ is public, so that whoever has a pattern K' can ask about λx + (1 − λ)K'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdbctl.attacks.base import Attack, Attacker, Config, Train
from sdbctl.attacks.file import held
from sdbctl.attacks.kd import soft_labels
from sdbctl.data import ImageSet, like
from sdbctl.key import embed
from sdbctl.losses import conceal_spread
from sdbctl.teacher import Access
from sdbctl.training import place, seeded

SEARCH_IMAGES = 64
"""Images on which a pattern is judged."""


def keyed(images: ImageSet, pattern: Tensor, strength: float) -> ImageSet:
    """Images mixed with a pattern, as pixels: λx + (1 − λ)·255·K'."""
    return like(images, embed(images.pixels.float(), 255 * pattern, strength))


def spread(z: Tensor) -> Tensor:
    """How much dark knowledge outputs show, which is what an attacker without the key can judge a guess by."""
    return conceal_spread(z, z.detach().argmax(1))


def _with(attacker: Attacker, pattern: Tensor, config: Config) -> None:
    attacker.guess = pattern
    attacker.learn(
        lambda z, answer, y: soft_labels(z, answer, y, config),
        targets=lambda images: attacker.ask(keyed(images, pattern, attacker.strength)),
    )


def _judge(attacker: Attacker, pattern: Tensor) -> float:
    some = attacker.images.take(range(min(SEARCH_IMAGES, len(attacker.images))))
    return float(spread(attacker.ask(keyed(some, pattern, attacker.strength))))


def random_keys(attacker: Attacker, config: Config) -> None:
    """The random pattern, of ``tries``, whose answers show the most dark knowledge."""
    generator = torch.Generator().manual_seed(attacker.recipe.seed)
    tried = [torch.rand(attacker.preprocess.size, generator=generator) for _ in range(int(config["tries"]))]
    _with(attacker, max(tried, key=lambda pattern: _judge(attacker, pattern)), config)


def simple_keys(attacker: Attacker, config: Config) -> None:
    """The best of constant patterns, the mean image and some images of the transfer set."""
    pixels = attacker.images.pixels[:1000].float() / 255
    tried = [torch.full(attacker.preprocess.size, level) for level in (0.0, 0.25, 0.5, 0.75, 1.0)]
    tried += [pixels.mean(0), *pixels[:5]]
    _with(attacker, max(tried, key=lambda pattern: _judge(attacker, pattern)), config)


def searched(attacker: Attacker, config: Config) -> None:
    """Black-box search by natural evolution strategies (Ilyas et al., ICML 2018) for the most talkative pattern."""
    generator = torch.Generator().manual_seed(attacker.recipe.seed)
    pattern, sigma = torch.full(attacker.preprocess.size, 0.5), 0.2
    for _ in range(int(config["rounds"])):
        noise = torch.randn(8, *pattern.shape, generator=generator)
        gains = [
            _judge(attacker, (pattern + sigma * n).clamp(0, 1)) - _judge(attacker, (pattern - sigma * n).clamp(0, 1))
            for n in noise
        ]
        slope = (torch.tensor(gains).view(-1, 1, 1, 1) * noise).mean(0)
        pattern = (pattern + 0.05 * slope.sign()).clamp(0, 1)
    _with(attacker, pattern, config)


def inverted(attacker: Attacker, config: Config) -> None:
    """White-box inversion: gradient ascent on the dark knowledge of the file's outputs over the pattern."""
    net = place(held(attacker), attacker.engine.device).eval().requires_grad_(False)
    pixels = attacker.images.pixels
    with seeded(attacker.recipe.seed):
        free = torch.zeros(attacker.preprocess.size, device=attacker.engine.device, requires_grad=True)
        optimiser = torch.optim.Adam([free], lr=0.1)
        for _ in range(int(config["rounds"])):
            some = pixels[torch.randint(0, len(pixels), (SEARCH_IMAGES,))].to(attacker.engine.device).float() / 255
            z = net(attacker.preprocess(embed(some, free.sigmoid(), attacker.strength))).float()
            optimiser.zero_grad()
            (-spread(z)).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    _with(attacker, free.detach().sigmoid().cpu(), config)


_TAU4 = {"temperature": 4.0, "alpha": 0.9}


def _attack(summary: str, source: str, train: Train, config: Config, access: Access = Access.PROBABILITIES) -> Attack:
    return Attack(summary, source, "attack", access, True, ({**_TAU4, **config},), train)


RANDOM_KEYS = _attack("the best of random keys", "own", random_keys, {"tries": 16.0})
SIMPLE_KEYS = _attack("the best of constant and natural keys", "own", simple_keys, {})
SEARCHED_KEY = _attack(
    "black-box search for a key", "natural evolution strategies, Ilyas et al., ICML 2018", searched, {"rounds": 50.0}
)
INVERTED_KEY = _attack("white-box search for a key", "own", inverted, {"rounds": 300.0}, Access.WEIGHTS)
