"""Attacks on the secret pattern: guess it or search for it, then distil with what was found.

Whoever has a pattern K' can ask about λx + (1 − λ)K', with the box's λ, which is public, or any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from sdbctl.attacks.base import Attack, Attacker, Config
from sdbctl.attacks.file import held
from sdbctl.attacks.queries import PRETRAINING, first_foreign, pretrained
from sdbctl.attacks.soft import EITHER, soft_loss
from sdbctl.attacks.staged import outputs
from sdbctl.data import ImageSet
from sdbctl.engine import seeded
from sdbctl.inference import unseen_batch
from sdbctl.key import embed, ordered
from sdbctl.losses import conceal_spread, cross_entropy
from sdbctl.patterns import blocks, mixed_with, odd_inputs, public_keys, spread_out, standard
from sdbctl.teacher import Access
from sdbctl.wrappers import deviation

SEARCH_IMAGES = 64
"""Images on which a pattern is judged."""
SEARCHED_IMAGES = 1000
"""Images with which a search for a key asks, at most."""
PAIRS = 1024
"""Opposite directions that it tries in a step."""
REACH, STEP, PERSISTENCE = 0.6, 0.5, 0.7
"""How far around a pattern it looks and how far it goes, in normal variables, and how much of its heading it keeps."""
DIMMED = (1.0, 0.7)
"""Of the box's λ, what it asks with: with more of the pattern an image keeps its class less often."""
SHOWN = 0.01
"""Mean deviation of the logits of the other classes above which an answer says more than the class."""
OPENED_IMAGES = 24
"""Images on which a search for any pattern judges it."""
BEGUN = 2400
"""Inputs that it looks for a beginning among."""
AT_ONCE = 240
"""Inputs that are asked about at once; of a beginning a third each are blocks, smooth fields and odd images."""
KEPT = 0.5
"""Weight of images that keep their class."""
MOST = 0.6
"""Share of images that are open from which there may be more of them."""
HIGHEST = 0.8
"""λ up to which it goes."""
RATES = (0.02, 0.06, 0.2)
"""Shares of blocks that change in a step."""
STARTS = 4
"""Random patterns that a white-box search starts from."""
SMOOTHED = 4
"""Last batches by which it judges them."""


def opened(z: Tensor, y: Tensor) -> Tensor:
    """By what an attacker judges a guess: the log-likelihood of the labels, plus the dark knowledge that shows.

    Wrong patterns spoil predictions, the right one does not; and only its outputs tell the other classes apart.
    """
    return conceal_spread(z, z.detach().argmax(1)) - cross_entropy(z, y)


Patterns = Sequence[tuple[Tensor, float]]
"""Patterns [C, H, W] in [0, 1], each with its λ."""


def _with(
    attacker: Attacker,
    patterns: Patterns,
    config: Config,
    ask: Callable[[ImageSet], Tensor] | None = None,
) -> None:
    """Distil what images with patterns, each of its λ, bring out; of another data set first if the attacker has one."""
    attacker.guess, answers = patterns[0][0], ask or attacker.ask

    def told(images: ImageSet) -> Tensor:
        """The class is that of the images themselves: patterns spoil it."""
        return of_class(answers(images), combined([answers(mixed_with(images, *some)) for some in patterns]))

    if attacker.surrogate is None:
        attacker.learn(lambda z, answer, y: soft_loss(z, answer, y, config), targets=told)
    else:
        pretrained(attacker, config, soft_loss, told)


def combined(opened: Sequence[Tensor]) -> Tensor:
    """Log-probabilities [N, C] that several patterns brought out, as one.

    Answers that say nothing are left out: they would add the class that a spoilt image is taken for. Of several
    patterns so is what each says of every image, which is of the pattern.
    """
    total = torch.zeros_like(opened[0])
    for z in opened:
        says = deviation(z) > SHOWN
        centred = torch.where(says, z - z.mean(1, keepdim=True), 0.0)
        usual = centred.sum(0) / says.sum().clamp(min=1) if len(opened) > 1 else 0.0
        total += torch.where(says, centred - usual, 0.0)
    return total.log_softmax(1)


def shared(
    attacker: Attacker, images: ImageSet, what: Sequence[object], find: Callable[[torch.Generator], Patterns]
) -> Patterns:
    """:meth:`Attacker.search` for patterns."""
    size = attacker.preprocess.size

    def found(generator: torch.Generator) -> Tensor:
        return torch.stack(
            [torch.cat([torch.tensor([lam], dtype=torch.float64), some.flatten()]) for some, lam in find(generator)]
        )

    rows = attacker.search(images, what, found).view(-1, 1 + math.prod(size))
    return [(row[1:].view(size).float(), float(row[0])) for row in rows]


def of_class(plain: Tensor, opened: Tensor) -> Tensor:
    """The predicted class and its confidence from one answer, what else there is from another.

    Args:
        plain: Log-probabilities [N, C] of the class.
        opened: Log-probabilities [N, C] of how the others share the rest.

    Returns:
        Log-probabilities [N, C].
    """
    top = plain.argmax(1, keepdim=True)
    sure = plain.gather(1, top).exp().clamp(max=1 - 1e-5)
    others = opened.scatter(1, top, -torch.inf).log_softmax(1) + torch.log1p(-sure)
    return others.scatter(1, top, sure.log())


def _judge(attacker: Attacker, pattern: Tensor, strength: float | None = None) -> float:
    some = attacker.images.first(SEARCH_IMAGES)
    mixed = mixed_with(some, pattern, strength or attacker.strength)
    # who has no labels compares with what is predicted without the pattern
    labels = some.labels if attacker.labels else attacker.ask(some).argmax(1)
    # of thousands of patterns none is asked about again, so no answer is kept
    return float(opened(attacker.ask_pixels(mixed.pixels.float() / 255), labels))


def random_keys(attacker: Attacker, config: Config) -> None:
    """The random pattern, of ``tries``, that opens most."""
    generator = torch.Generator().manual_seed(attacker.recipe.seed)
    tried = [torch.rand(attacker.preprocess.size, generator=generator) for _ in range(int(config["tries"]))]
    _with(attacker, [(max(tried, key=lambda some: _judge(attacker, some)), attacker.strength)], config)


def simple_keys(attacker: Attacker, config: Config) -> None:
    """What opens most of the patterns that anybody has, mixed in with any strength."""
    _with(attacker, [max(public_keys(attacker.images), key=lambda some: _judge(attacker, *some))], config)


def search(
    ask: Callable[[Tensor], Tensor], images: Tensor, strength: float, rounds: int, generator: torch.Generator
) -> Tensor:
    """The key's pattern, by what answers keep of the predicted class and say beside it.

    What is secret of a key is the order of its levels. Natural evolution strategies (Ilyas et al., ICML 2018) find one
    that opens a box. Each pair of opposite directions is asked about with an image of its own, so that what moves the
    prediction of a single image averages out, and what they have in common remains: nearer to the key more images keep
    their class, and the first answers say more than it. The first step goes as far as patterns can differ.

    Args:
        ask: Log-probabilities [N, C] of pixels [N, C, H, W] in [0, 1].
        images: Own ones: uint8 [N, C, H, W].
        strength: λ.
        rounds: Steps, of twice :data:`PAIRS` queries each; one more query an image says what its class is.
        generator: Of the directions that are tried.

    Returns:
        [C, H, W], in [0, 1].
    """
    at_once = max(2, min(AT_ONCE, unseen_batch(images.shape[1:])))
    plain = torch.cat([ask(part.float() / 255).argmax(1) for part in torch.split(images, at_once)])
    values = heading = torch.zeros(images.shape[1:])

    def gain(moved: Tensor, chosen: Tensor) -> Tensor:
        z = ask(embed(images[chosen].float() / 255, torch.special.ndtr(standard(moved)), strength))
        says = deviation(z).squeeze(1)
        return (z.argmax(1) == plain[chosen]).float() + (says > SHOWN) * (1 + says)

    for number in range(rounds):
        reach, slope = REACH if number else 1.0, torch.zeros_like(values)
        for pairs in torch.split(torch.arange(PAIRS), at_once // 2):
            noise = torch.randn(len(pairs), *values.shape, generator=generator)
            chosen = torch.randint(len(images), (len(pairs),), generator=generator)
            near, aside = (1 - reach**2) ** 0.5 * values, reach * noise
            slope += torch.einsum("n,nchw->chw", gain(near + aside, chosen) - gain(near - aside, chosen), noise)
        slope = standard(slope[None])[0]
        heading = PERSISTENCE * heading + (1 - PERSISTENCE) * slope if number else slope
        values = standard((values + STEP * heading)[None])[0] if number else slope
    return ordered(values)


def searched(attacker: Attacker, config: Config) -> None:
    """Black-box :func:`search` with several λ; the pattern and λ with most λ² × open share are used."""
    rounds, strengths = int(config["rounds"]), [share * attacker.strength for share in DIMMED]
    # no label is needed
    images = attacker.images.unlabelled()

    def find(generator: torch.Generator) -> Patterns:
        own = images.first(SEARCHED_IMAGES).alone().pixels
        few = own[:SEARCH_IMAGES].float() / 255
        plain = attacker.ask_pixels(few).argmax(1)

        def worth(some: tuple[Tensor, float]) -> tuple[float, float]:
            z = attacker.ask_pixels(embed(few, *some))
            share = float((deviation(z) > SHOWN).float().mean())
            return some[1] ** 2 * share, float((z.argmax(1) == plain).float().mean())

        found = [search(attacker.ask_pixels, own, lam, rounds, generator) for lam in strengths]
        return [max(product(found, strengths), key=worth)]

    _with(attacker, shared(attacker, images, ["order", rounds, attacker.strength], find), config)


def search_any(
    ask: Callable[[Tensor], Tensor], images: Tensor, others: ImageSet, steps: int, generator: torch.Generator
) -> tuple[Tensor, float]:
    """A pattern and its λ that open a box, from whatever opens it first.

    Blocks and smooth fields without an image, and images in wrong colours, are asked about until an answer says more
    than the class. From the one that says most an evolution strategy (one parent, one child) goes on, in blocks; as
    soon as most images are open with a pattern, there is more of the image, as long as any is open. Own.

    Args:
        ask: Log-probabilities [N, C] of pixels [N, C, H, W] in [0, 1].
        images: Own ones, on which a pattern is judged: [N, C, H, W] in [0, 1].
        others: Images whose colours are exchanged and inverted, the less like the box's the better.
        steps: Patterns that are tried on all of ``images``; looking for a beginning counts as well, but for the first
            time.
        generator: Of all that is random.

    Returns:
        [C, H, W] in [0, 1] and λ, with which there was most of all images that are open; λ = 0 if there was none.
    """
    height, width = images.shape[2:]
    edge, in_rows = blocks(images.shape[1:])

    def pattern(values: Tensor) -> Tensor:
        return spread_out(values, edge)[..., :height, :width]

    def begun() -> tuple[Tensor, float]:
        """The best of some inputs, and how much it says."""
        best, most = images[0], -1.0
        for _ in range(BEGUN // AT_ONCE):
            tried = odd_inputs(AT_ONCE, others, generator)
            said = deviation(ask(tried))
            if float(said.max()) > most:
                best, most = tried[int(said.argmax())], float(said.max())
        return best, most

    plain = ask(images).argmax(1)
    values, says = begun()
    # without a beginning there is nothing to improve
    while says <= SHOWN and (steps := steps - BEGUN // len(images)) > 0:
        values, says = begun()
    strength = 0.0

    def judge(values: Tensor, lam: float) -> tuple[float, float]:
        z = ask(embed(images, values, lam))
        says = deviation(z)
        open_ones = (says > SHOWN).float()
        kept = (z.argmax(1) == plain).float()
        return float((open_ones * (1 + says)).mean() + KEPT * kept.mean()), float(open_ones.mean())

    best, share = judge(values, strength)
    found, shown, highest = (values, strength), 0.0, HIGHEST
    for _ in range(steps):
        # the image has λ² of the input's power
        if strength**2 * share > shown:
            found, shown = (values, strength), strength**2 * share
        if share > MOST and strength < highest:
            more = round(strength + 0.02, 2)
            reached = judge(values, more)
            if reached[1] > 0:
                strength, (best, share) = more, reached
            else:
                # not with this pattern
                highest = strength
            continue
        rate, kind = RATES[int(torch.randint(len(RATES), (), generator=generator))], torch.rand((), generator=generator)
        moved, noise = pattern(torch.rand(2, *in_rows, generator=generator))
        new = noise.round() if kind < 0.5 else (values + 0.6 * (noise - 0.5)).clamp(0, 1)
        child = torch.where(moved < rate, new, values)
        reached = judge(child, strength)
        if reached[0] >= best:
            values, (best, share), highest = child, reached, HIGHEST
    return found


def searched_any(attacker: Attacker, config: Config) -> None:
    """Black-box search for any patterns that open a box (:func:`search_any`), and what several of them tell."""
    images = attacker.images.first(OPENED_IMAGES).alone().pixels.float() / 255
    others = attacker.surrogate or attacker.images.unlabelled()
    steps, count = int(config["steps"]), int(config["patterns"])

    def find(generator: torch.Generator) -> Patterns:
        found = [search_any(attacker.ask_pixels, images, others, steps, generator) for _ in range(count)]
        # what opens no image tells nothing of any
        return [some for some in found if some[1] > 0] or found[:1]

    own = attacker.images.first(OPENED_IMAGES).unlabelled().identity
    _with(attacker, shared(attacker, others, ["any", steps, count, own], find), config)


def inverted(attacker: Attacker, config: Config) -> None:
    """White-box inversion: gradient ascent over the pattern on :func:`opened` of the file's outputs, then KD from them.

    The best of several random starts goes on.
    """
    device = attacker.engine.device
    net = held(attacker).eval().requires_grad_(False)
    pixels, labels = attacker.images.pixels, attacker.images.labels

    def climb(free: Tensor, rounds: int) -> float:
        """Improve a pattern in place; how well it opens at last."""
        optimiser, reached = torch.optim.Adam([free], lr=0.1), []
        for _ in range(rounds):
            some = torch.randint(0, len(pixels), (SEARCH_IMAGES,))
            x = embed(pixels[some].to(device).float() / 255, free.sigmoid(), attacker.strength)
            loss = -opened(net(attacker.preprocess(x)).float(), labels[some].to(device))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            reached.append(-loss.detach())
        return float(torch.stack(reached[-SMOOTHED:]).sum())

    with seeded(attacker.recipe.seed):
        rounds = int(config["rounds"])
        starts = [torch.randn(attacker.preprocess.size, device=device).requires_grad_() for _ in range(STARTS)]
        free = max(starts, key=lambda start: climb(start, max(1, rounds // (2 * STARTS))))
        climb(free, rounds // 2)
    found = free.detach().sigmoid().cpu()
    _with(attacker, [(found, attacker.strength)], config, lambda images: outputs(attacker, net, images))


def _grid(**settings: float) -> tuple[Config, ...]:
    return tuple({**loss, **settings} for loss in EITHER)


RANDOM_KEYS = Attack("the best of random keys", "own", random_keys, _grid(tries=16), on_key=True)
SIMPLE_KEYS = Attack("greys, images and other patterns that anybody has", "own", simple_keys, EITHER, on_key=True)
SEARCHED_KEY = Attack(
    "search for a key by answers",
    "natural evolution strategies, Ilyas et al., ICML 2018",
    searched,
    _grid(rounds=50),
    on_key=True,
    searches=True,
)
SEARCHED_PATTERN = Attack(
    "search for any pattern by answers",
    "own",
    searched_any,
    _grid(steps=1250, patterns=3),
    on_key=True,
    searches=True,
    twin="dist_hard",
)
PRETRAINED_SEARCHED = replace(
    SEARCHED_PATTERN,
    summary="any pattern, surrogate set first",
    grid=tuple({**config, "steps": 1250, "patterns": 3} for config in PRETRAINING),
    surrogate=True,
    twin="pretrained_hard",
    extra=first_foreign,
)
INVERTED_KEY = Attack(
    "white-box search for a key", "own", inverted, _grid(rounds=800), access=Access.WEIGHTS, on_key=True
)
