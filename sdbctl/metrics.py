"""What is measured on logits, and with what certainty. Accuracies in percent, likelihoods in nats."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import stdtrit
from torch import Tensor
from torch.nn.functional import log_softmax

from sdbctl.losses import conceal_kl

ECE_BINS = 15
RESIDUAL_TEMPERATURE = 4.0
RESAMPLES, ECE_RESAMPLES = 2000, 200
SAME = 1e-4
"""Difference of two outputs, relative to their range, below which they are the same but for rounding."""


@dataclass(frozen=True)
class Scores:
    """Quality of one set of predictions.

    Attributes:
        top1: Accuracy in percent.
        top5: Accuracy of the five best classes in percent.
        ece: Expected calibration error in [0, 1], 15 equal-width bins (Guo et al., ICML 2017).
        nll: Negative log-likelihood of the label.
        nll_binary: Negative log-likelihood of the event "the prediction is right" under its confidence.
        residual: Dark knowledge left, KL(u ‖ p̂^τ) at τ = 4 over the non-target classes.
        beyond_top1: Share of images whose outputs say more than which class is predicted.
        reliability: Per bin (mean confidence, accuracy, share of images); empty bins are left out.
    """

    top1: float
    top5: float
    ece: float
    nll: float
    nll_binary: float
    residual: float
    beyond_top1: float
    n: int
    reliability: tuple[tuple[float, float, float], ...]


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether each prediction is right: bool [N]."""
    return logits.argmax(1) == labels


def top1(logits: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent."""
    return 100 * correct(logits, labels).float().mean().item()


def per_image(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Per-image scores [N] whose means are the metrics (all but ECE), for paired statistics."""
    logp = log_softmax(logits.double(), 1)
    confidence, predicted = logp.max(1)
    hit = predicted == labels
    miss_logp = torch.log((-torch.expm1(confidence)).clamp(min=1e-12))
    best = logits.topk(min(5, logits.shape[1]), 1).indices
    return {
        "top1": 100 * hit.double(),
        "top5": 100 * (best == labels[:, None]).any(1).double(),
        "nll": -logp.gather(1, labels[:, None]).squeeze(1),
        "nll_binary": -torch.where(hit, confidence, miss_logp),
    }


def reliability(logits: Tensor, labels: Tensor) -> tuple[tuple[float, float, float], ...]:
    """Bins of (mean confidence, accuracy, share of images) over equal-width confidence bins."""
    confidence, predicted = logits.double().softmax(1).max(1)
    hit = (predicted == labels).double()
    place = (confidence * ECE_BINS).long().clamp(max=ECE_BINS - 1)
    bins = []
    for index in range(ECE_BINS):
        inside = place == index
        if inside.any():
            share = inside.double().mean().item()
            bins.append((confidence[inside].mean().item(), hit[inside].mean().item(), share))
    return tuple(bins)


def ece(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error in [0, 1] over 15 equal-width bins (Guo et al., ICML 2017, eq. 3)."""
    return _gap(reliability(logits, labels))


def _gap(bins: Iterable[tuple[float, float, float]]) -> float:
    return sum(abs(c - a) * share for c, a, share in bins)


def residual(logits: Tensor) -> float:
    """Dark knowledge left: KL(u ‖ p̂^τ) at τ = 4 over the non-target classes, nats."""
    target = logits.argmax(1)
    return conceal_kl(logits, target, RESIDUAL_TEMPERATURE).item() / RESIDUAL_TEMPERATURE**2


def class_only(z: Tensor, levels: Tensor) -> Tensor:
    """Logits [B, C] that tell of logits ``z`` [B, C] only the predicted class.

    Args:
        z: What a model says.
        levels: Logits [2, C] to say of each predicted class, its own and that of all others.
    """
    predicted = z.argmax(1, keepdim=True)
    own, others = levels.to(z.device)[:, predicted]
    limited: Tensor = others.expand_as(z).scatter(1, predicted, own)
    return limited


def usual(z: Tensor, elsewhere: Tensor | None = None) -> Tensor:
    """Levels [2, C] of :func:`class_only` that logits ``z`` [N, C] usually have.

    Medians: where most answers of a class are the same, and alike for all other classes, just those.

    Args:
        z: What a model says.
        elsewhere: Levels [2, C] of the classes that are never predicted; None if they have those of all.
    """
    predicted = z.argmax(1)
    own = z.gather(1, predicted[:, None])
    others = z.scatter(1, predicted[:, None], torch.nan)
    if elsewhere is None:
        elsewhere = torch.stack([own.median(), others.nanmedian()])[:, None].expand(2, z.shape[1])
    levels = elsewhere.clone()
    for name in set(predicted.tolist()):
        some = predicted == name
        levels[:, name] = torch.stack([own[some].median(), others[some].nanmedian()])
    return levels


def beyond_top1(logits: Tensor) -> float:
    """Share of images whose outputs say more than the predicted class, in [0, 1]: they are not what is usual for it.

    Where it is zero the outputs of these images are a function of the predicted class, and alike for all other classes,
    so that nobody, by whatever method, learns more from them than from top-1 answers. What all logits of an image have
    in common does not count, nor what may be rounding. An image that is the only one of its prediction says nothing; if
    all are, the share is 1.
    """
    z, predicted = logits.double() - logits.double().mean(1, keepdim=True), logits.argmax(1)
    off = (z - class_only(z, usual(z))).abs().amax(1) > SAME * (z.amax(1) - z.amin(1))
    compared = predicted.bincount()[predicted] > 1
    return off[compared].double().mean().item() if compared.any() else 1.0


def score(logits: Tensor, labels: Tensor) -> Scores:
    """All scores of logits [N, C] against labels [N] (on any device; computed on the CPU)."""
    logits, labels = logits.float().cpu(), labels.cpu()
    means = {name: values.mean().item() for name, values in per_image(logits, labels).items()}
    bins = reliability(logits, labels)
    return Scores(
        **means,
        ece=_gap(bins),
        residual=residual(logits),
        beyond_top1=beyond_top1(logits),
        n=len(labels),
        reliability=bins,
    )


def seed_interval(differences: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean and 95 % t-interval of paired differences over seeds; bounds are None for a single one."""
    mean = float(np.mean(differences))
    if len(differences) < 2:
        return mean, None, None
    freedom = len(differences) - 1
    half = float(stdtrit(freedom, 0.975)) * float(np.std(differences, ddof=1)) / math.sqrt(freedom + 1)
    return mean, mean - half, mean + half


def chances(accuracies: Sequence[Sequence[float]]) -> list[float]:
    """How likely each of several rows is the best: the share of bootstrap resamples of the seeds in which it is.

    Args:
        accuracies: Accuracies [R][S] by row and seed.

    Returns:
        Chances [R], which sum to 1.
    """
    known = np.array(accuracies, dtype=float)
    best = (known @ _resamples(known.shape[1])).argmax(0)
    return [float(share) for share in np.bincount(best, minlength=len(known)) / RESAMPLES]


@functools.cache
def _resamples(seeds: int) -> npt.NDArray[np.int64]:
    """How often each of the seeds is in each bootstrap resample of them: [S, :data:`RESAMPLES`]."""
    draws = np.random.default_rng(0).integers(0, seeds, (RESAMPLES, seeds))
    return np.stack([(draws == seed).sum(1) for seed in range(seeds)])


def crossfit(validation: Sequence[Sequence[float]], test: Sequence[Sequence[float]]) -> list[float]:
    """Accuracy of the best of several rows, without looking at the student that is reported.

    The best of few noisy means is too good by chance, so which row is best is decided for each seed by the students of
    all *other* seeds. Where they do not tell, it is not left to luck either: each row counts with the chance that it is
    the best (as in D'Eramo et al., "Estimating the Maximum Expected Value through Gaussian Approximation", ICML 2016).
    With one seed there are no others, and the choice is biased.

    Args:
        validation: Accuracies [R][S] by row and seed, to judge by.
        test: Accuracies [R][S] to report.

    Returns:
        One accuracy per seed [S].
    """
    known, shown = np.array(validation, dtype=float), np.array(test, dtype=float)
    seeds = range(known.shape[1])
    others = [known[:, [other for other in seeds if other != seed] or [seed]].tolist() for seed in seeds]
    return [float(np.dot(chances(rest), shown[:, seed])) for seed, rest in zip(seeds, others, strict=True)]


def least_known(classes: int, images: int) -> float:
    """The top-1 accuracy, in percent, from which a model clearly knows more of so many images than guessing does."""
    chance = 100 / classes
    # five standard deviations of guessing, but of few images half of what there is to know
    clearly = max(5 * math.sqrt(chance * (100 - chance) / images), 1.0)
    return chance + min(clearly, (100 - chance) / 2)


def bootstrap_interval(before: Tensor, after: Tensor) -> tuple[float, float, float]:
    """Mean and 95 % percentile interval of ``after − before`` by a paired bootstrap over images.

    Args:
        before: Per-image scores [N].
        after: Per-image scores [N] of the same images.
    """
    difference = (after - before).double().cpu().numpy()
    rng = np.random.default_rng(0)
    means = [difference[rng.integers(0, len(difference), len(difference))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(difference.mean()), float(low), float(high)


def bootstrap_ece(before: Tensor, after: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Like :func:`bootstrap_interval` for the difference of two expected calibration errors.

    The error of finitely many images is too high, more so the smaller it is, so a loss of calibration looks smaller
    than it is: of 10,000 images 0.06 looks like 0.05, 0.01 like 0.003. Resamples exaggerate that once more, so the
    interval is the basic one, mirrored at the mean (Davison & Hinkley, Bootstrap Methods and their Application, 1997,
    section 5.2).
    """
    rng = np.random.default_rng(0)
    mean = ece(after, labels) - ece(before, labels)
    draws = []
    for _ in range(ECE_RESAMPLES):
        pick = torch.from_numpy(rng.integers(0, len(labels), len(labels)))
        draws.append(ece(after[pick], labels[pick]) - ece(before[pick], labels[pick]))
    low, high = np.quantile(draws, (0.025, 0.975))
    return mean, min(mean, 2 * mean - float(high)), max(mean, 2 * mean - float(low))
