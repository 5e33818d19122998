"""Attacks that choose what to ask: averaged, mixed, foreign and made-up queries."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from sdbctl.attacks.base import Attack, Attacker, Config, Loss, Train
from sdbctl.attacks.floor import CONSTANTS, from_top1, hard_constant, hard_label
from sdbctl.attacks.kd import ALONE, TAU4, soft_labels
from sdbctl.attacks.soft import METHODS, soft_loss
from sdbctl.data import Batch, ImageSet, changed, view
from sdbctl.errors import UsageError
from sdbctl.losses import cross_entropy, kd
from sdbctl.patterns import fields
from sdbctl.teacher import Access
from sdbctl.updates import scaled

AVERAGED = 4
"""Answers that are averaged into one."""
HANDFUL = 100
"""Labelled images that a recalibration is fitted on."""


def _kd(attacker: Attacker, config: Config, **options: object) -> None:
    attacker.learn(lambda z, answer, y: soft_labels(z, answer, y, config), **options)  # type: ignore[arg-type]


def _several(attacker: Attacker) -> Tensor:
    """Answers to each of several augmented copies: [copies, N, C], or [copies, N] from one that shows only classes."""
    return torch.stack([attacker.ask(attacker.view(number)) for number in range(min(2 * AVERAGED, attacker.views))])


def _mean(answers: Tensor, config: Config) -> Tensor:
    """Logarithm [N, C] of the mean probabilities of answers [copies, N, C], or if ``geometric`` the mean logarithm.

    The first is the nearest to what is behind noise. In the second a single zero outweighs the other answers, so that
    it ranks classes by how often noise takes all they have; which of both teaches more, validation data say.
    """
    return answers.mean(0) if config.get("geometric") else answers.logsumexp(0) - math.log(len(answers))


def averaged_views(attacker: Attacker, config: Config) -> None:
    """KD from the mean probabilities of an image over several augmented copies, which averages noise away."""
    mean = _mean(_several(attacker), config)
    _kd(attacker, config, targets=lambda images: mean)


def hard_views(attacker: Attacker, config: Config) -> None:
    """The same from top-1 answers: KD from the votes, (1 − ε)·share of the copies with each answer + ε/C."""
    assert attacker.oracle is not None
    classes, epsilon = attacker.oracle.classes, config["smoothing"]
    votes = one_hot(_several(attacker), classes).float().mean(0)
    target = ((1 - epsilon) * votes + epsilon / classes).log()
    _kd(attacker, config, targets=lambda images: target)


def averaged_noise(attacker: Attacker, config: Config) -> None:
    """KD from the mean probabilities under small pixel noise, which smooths a jagged defence.

    The budget is that of the other attacks: fewer augmented copies, each asked about several times.
    """
    copies, sigma = max(1, attacker.views // AVERAGED), 255 * config["noise"]

    def noisy(images: ImageSet, number: int) -> ImageSet:
        generator = torch.Generator().manual_seed(number)
        return changed(images, lambda some, _: some + sigma * torch.randn(some.shape, generator=generator))

    def mean(images: ImageSet) -> Tensor:
        return _mean(torch.stack([attacker.ask(noisy(images, number)) for number in range(AVERAGED)]), config)

    _kd(attacker, config, sets=lambda epoch: attacker.view(epoch % copies), targets=mean)


def vector_scaling(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Scale [1] and class biases [C] with which logits [N, C] have the least cross-entropy (Guo et al., ICML 2017)."""
    scale, bias = torch.ones(1, requires_grad=True), torch.zeros(z.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([scale, bias], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = cross_entropy(z * scale + bias, y) + 1e-2 * bias.square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return scale.detach(), bias.detach()


def recalibrated(attacker: Attacker, config: Config) -> None:
    """KD from answers whose temperature and class biases are refitted on a handful of labelled images."""
    few = attacker.images.first(HANDFUL)
    a, b = vector_scaling(attacker.ask(few), few.labels)
    _kd(attacker, config, targets=lambda images: attacker.ask(images) * a + b)


def between(attacker: Attacker, epoch: int) -> ImageSet:
    """Convex combinations of two images each (mixup, Zhang et al., ICLR 2018): queries between the data points."""
    images = attacker.view(epoch)
    pixels = images.pixels
    generator = torch.Generator().manual_seed(epoch % attacker.views)
    share = torch.rand(len(images), 1, 1, 1, generator=generator)
    other = torch.randperm(len(images), generator=generator)
    return changed(images, lambda some, p: share[p] * some + (1 - share[p]) * pixels[other[p]])


def pasted(attacker: Attacker, epoch: int) -> ImageSet:
    """Images with a rectangle of another image (CutMix, Yun et al., ICCV 2019)."""
    images = attacker.view(epoch)
    pixels = images.pixels
    generator = torch.Generator().manual_seed(epoch % attacker.views)
    n, (_, h, w) = len(images), images.shape
    side = (1 - torch.rand(n, generator=generator)).sqrt()
    top, left = (torch.rand(n, generator=generator) * (1 - side) for _ in range(2))
    rows, columns = torch.arange(h)[None] / h, torch.arange(w)[None] / w
    inside_rows = (rows >= top[:, None]) & (rows < (top + side)[:, None])
    inside_columns = (columns >= left[:, None]) & (columns < (left + side)[:, None])
    other = torch.randperm(n, generator=generator)

    def paste(some: Tensor, p: slice) -> Tensor:
        inside = (inside_rows[p, :, None] & inside_columns[p, None, :])[:, None]
        return torch.where(inside, pixels[other[p]], some)

    return changed(images, paste)


Mix = Callable[[Attacker, int], ImageSet]


def mixed_soft(mix: Mix) -> Train:
    """KD on mixed images."""
    return lambda attacker, config: _kd(attacker, config, sets=lambda epoch: mix(attacker, epoch))


def mixed_hard(mix: Mix) -> Train:
    """KD from constant logits of the top-1 answers to mixed images."""
    return lambda attacker, config: attacker.learn(
        lambda z, answer, y: hard_constant(z, answer, None, config), sets=lambda epoch: mix(attacker, epoch)
    )


def knockoff(attacker: Attacker, config: Config) -> None:
    """Knockoff Nets with random selection: soft answers to images of another data set (Orekondy et al., CVPR 2019)."""
    _kd(attacker, config, sets=lambda epoch: _some_foreign(attacker, epoch))


def copycat(attacker: Attacker, config: Config) -> None:
    """Copycat CNN: top-1 answers to images of another data set (Correia-Silva et al., IJCNN 2018).

    With a ``confidence`` KD from their constant logits: what :func:`knockoff` gives by its regularisation alone.
    """
    loss = hard_constant if "confidence" in config else hard_label
    attacker.learn(
        lambda z, answer, y: loss(z, answer, None, config), sets=lambda epoch: _some_foreign(attacker, epoch)
    )


def _foreign(attacker: Attacker) -> ImageSet:
    if attacker.surrogate is None:
        raise UsageError("this attack asks about images of another data set", "give --surrogate SPEC")
    return attacker.surrogate


def _some_foreign(attacker: Attacker, epoch: int) -> ImageSet:
    """As many images of the other data set as the transfer set has, others in each epoch while there are any."""
    foreign = _foreign(attacker)
    size = min(len(attacker.images), len(foreign))
    return attacker.augmented(foreign.take((epoch * size + torch.arange(size)) % len(foreign)), epoch)


PRETRAINED = 150_000
"""Images of another data set that a student sees before those of its transfer set, at most."""
PASSES = 40
"""Passes over that data set, at most."""
TUNED = 0.25
"""Of the learning rate, for what was trained before."""


def _passes(foreign: int) -> int:
    return min(PASSES, PRETRAINED // max(foreign, 1))


def first_foreign(run: float, foreign: int) -> float:
    """Images of another data set, of ``foreign`` many, that a student sees before its transfer set."""
    some = min(foreign, PRETRAINED)
    return float(some * _passes(some))


def pretrained(
    attacker: Attacker, config: Config, loss: Loss, tell: Callable[[ImageSet], Tensor] | None = None
) -> None:
    """Images of another data set first, then the transfer set: ``loss`` of the answers, with labels where there are.

    Foreign images are plentiful, so each is asked about once, as it is, and learned from as augmented as the others
    (Knockoff Nets, Orekondy et al., CVPR 2019, then a second stage on the attacker's own images).

    Args:
        attacker: Who trains.
        config: Settings of the loss.
        loss: Of a batch.
        tell: Answers to a set; None for what the oracle says.
    """
    foreign = _foreign(attacker)
    foreign = foreign.first(PRETRAINED)
    told = (tell or attacker.ask)(foreign)
    attacker.learn(
        lambda z, answer, y: loss(z, answer, None, config),
        sets=lambda epoch: view(foreign, epoch, attacker.recipe.augment),
        targets=lambda images: told,
        recipe=scaled(attacker.recipe, epochs=_passes(len(foreign))),
    )
    attacker.learn(
        lambda z, answer, y: loss(z, answer, y, config),
        targets=tell,
        recipe=scaled(attacker.recipe, lr=TUNED * attacker.recipe.lr),
    )


MOVES, MOVED = 4, 2.4
"""Steps of a field towards a class, and how far they go together, as a root mean square of its pixels' logits."""
REPLAYED_BYTES = 2**27
"""Old queries that are kept to be learned from again."""


def data_free(attacker: Attacker, config: Config) -> None:
    """No images at all: smooth random fields, half of them moved to where the student is sure of a class.

    Networks learn from such noise (Baradad et al., NeurIPS 2021). A black box gives no gradient, so the student's own
    shows the way (compare DFMS-HL, Sanyal et al., CVPR 2022). Each batch is learned from with an old one, whose answers
    are known.
    """
    assert attacker.oracle is not None
    oracle, device, shape = attacker.oracle, attacker.engine.device, attacker.preprocess.size
    asked: list[tuple[Tensor, Tensor]] = []

    def towards(pixels: Tensor) -> Tensor:
        """Fields of which the student is surer."""
        wanted = torch.randint(oracle.classes, (len(pixels),), device=device)
        free = pixels.clamp(0.02, 0.98).logit()
        attacker.student.eval()
        for _ in range(MOVES):
            free.requires_grad_()
            with attacker.engine.autocast():
                loss = cross_entropy(attacker.student(attacker.preprocess(free.sigmoid())).float(), wanted)
            (slope,) = torch.autograd.grad(loss, free)
            steepness = slope.square().mean((1, 2, 3), keepdim=True).sqrt()
            free = free.detach() - MOVED / MOVES * slope / (steepness + 1e-9)
        attacker.student.train()
        return free.sigmoid()

    def step(model: nn.Module, batch: Batch) -> Tensor:
        pixels = fields(len(batch.x), shape, device)
        half = len(pixels) // 2
        queries = (255 * torch.cat([towards(pixels[:half]), pixels[half:]])).round().to(torch.uint8)
        new = queries, oracle(attacker.preprocess(queries.float() / 255))
        old = asked[int(torch.randint(len(asked), ()))] if asked else new
        if len(asked) < max(1, REPLAYED_BYTES // queries.numel()):
            asked.append(new)
        else:
            asked[int(torch.randint(len(asked), ()))] = new
        x = attacker.preprocess(torch.cat([new[0], old[0]]).float() / 255)
        return kd(model(x), torch.cat([new[1], old[1]]), config["temperature"])

    attacker.fit(attacker.student, step, attacker.images, record=False)


GEOMETRIC: Config = {**TAU4, "geometric": 1.0}
AVERAGED_VIEWS = Attack(
    "answers averaged over augmented copies", "own", averaged_views, (TAU4, GEOMETRIC), twin="hard_views"
)
HARD_VIEWS = Attack(
    "top-1 answers to augmented copies, as votes",
    "own",
    hard_views,
    tuple(
        {"temperature": tau, "alpha": 0.9, "smoothing": share}
        for tau, share in ((4.0, 0.6), (1.0, 0.2), (4.0, 0.3), (1.0, 0.5))
    ),
    Access.LABELS,
)
AVERAGED_NOISE = Attack(
    "answers to noisy copies, averaged",
    "own",
    averaged_noise,
    tuple({**config, "noise": sigma} for config in (TAU4, GEOMETRIC) for sigma in (0.02, 0.06)),
    twin="hard_views",
)
RECALIBRATED = Attack(
    "answers recalibrated on 100 labels",
    "vector scaling, Guo et al., ICML 2017",
    recalibrated,
    (TAU4,),
    twin="hard_mixed",
)
_MIXES = (
    (between, "between two images", "Zhang et al., ICLR 2018", "hard_mixup"),
    (pasted, "with a pasted part", "Yun et al., ICCV 2019", "hard_cutmix"),
)
MIXUP, CUTMIX = (
    Attack(
        f"queries {how}",
        source,
        mixed_soft(mix),
        (ALONE, {"temperature": 1.0, "alpha": 1.0}),
        labels=False,
        twin=twin,
    )
    for mix, how, source, twin in _MIXES
)
HARD_MIXUP, HARD_CUTMIX = (
    Attack(f"top-1 answers to queries {how}", source, mixed_hard(mix), CONSTANTS[:2], Access.LABELS, labels=False)
    for mix, how, source, _ in _MIXES
)
KNOCKOFF = Attack(
    "Knockoff Nets: soft answers on another data set",
    "Orekondy et al., CVPR 2019",
    knockoff,
    ({"temperature": 1.0, "alpha": 1.0}, ALONE),
    labels=False,
    surrogate=True,
    twin="copycat",
)
COPYCAT = Attack(
    "Copycat CNN: top-1 answers on another data set",
    "Correia-Silva et al., IJCNN 2018",
    copycat,
    ({}, *CONSTANTS[:2]),
    Access.LABELS,
    labels=False,
    surrogate=True,
)
PRETRAINING = (METHODS["dist"],)
"""Settings of :func:`pretrained`."""
_THEN_OWN, _FIRST = "surrogate set first, then own images", "after Orekondy et al., CVPR 2019"
PRETRAINED_SOFT = Attack(
    _THEN_OWN,
    _FIRST,
    partial(pretrained, loss=soft_loss),
    PRETRAINING,
    surrogate=True,
    twin="pretrained_hard",
    extra=first_foreign,
)
PRETRAINED_HARD = Attack(
    f"top-1 answers, {_THEN_OWN}",
    _FIRST,
    partial(pretrained, loss=partial(from_top1, soft_loss)),
    tuple({**config, "confidence": 0.4} for config in PRETRAINING),
    Access.LABELS,
    surrogate=True,
    extra=first_foreign,
)
DATA_FREE = Attack(
    "queries from a generator of random fields",
    "own, after Baradad et al., NeurIPS 2021",
    data_free,
    tuple({"temperature": tau} for tau in (4.0, 1.0)),
    labels=False,
)
