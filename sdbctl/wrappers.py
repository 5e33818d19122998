"""Serving-time defences that change answers and need no training.

Those in :data:`WRAPPERS` are what a box must be better than: each maps probabilities [B, C] to probabilities [B, C] of
the undefended model. :class:`Concealed` is what the box itself is served through. Whoever holds the file strips them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from sdbctl.boxfile import GUARD, Metadata
from sdbctl.data import Preprocess
from sdbctl.errors import BadInput, UsageError, check_known
from sdbctl.teacher import Teacher

_FLOOR = 1e-6
CONFIDENCE = 0.9


def _normalised(p: Tensor) -> Tensor:
    p = p.clamp(min=_FLOOR)
    return p / p.sum(1, keepdim=True)


def top1(p: Tensor) -> Tensor:
    """The predicted class, with certainty (ART's ClassLabels)."""
    return one_hot(p.argmax(1), p.shape[1]).to(p.dtype)


def class_constant(p: Tensor) -> Tensor:
    """The predicted class with one confidence for all images, the others alike."""
    return CONFIDENCE * top1(p) + (1 - CONFIDENCE) * (1 - top1(p)) / (p.shape[1] - 1)


def uniform_nontarget(p: Tensor) -> Tensor:
    """The predicted class with its confidence, the others alike."""
    best, chosen = p.max(1, keepdim=True).values, top1(p)
    return best * chosen + (1 - best) * (1 - chosen) / (p.shape[1] - 1)


def quantised_confidence(p: Tensor) -> Tensor:
    """The predicted class with one of four confidences, two bits a query beside the class, the others alike."""
    least = 1 / p.shape[1]
    step = (1 - least) / 4
    best = p.amax(1, keepdim=True)
    level = least + step * (((best - least) / step).floor().clamp(0, 3) + 0.5)
    chosen = top1(p)
    return level * chosen + (1 - level) * (1 - chosen) / (p.shape[1] - 1)


def rounded(p: Tensor) -> Tensor:
    """Three decimals (ART's Rounded), normalised again."""
    return (1000 * p).round() / 1000


def high_confidence(p: Tensor) -> Tensor:
    """Probabilities below 0.25 become zero (ART's HighConfidence), normalised again; the best one stays."""
    return torch.where((p >= 0.25) | (top1(p) > 0), p, torch.zeros_like(p))


def reverse_sigmoid(p: Tensor) -> Tensor:
    """p − β·(σ(γ·σ⁻¹(p)) − ½) with β = 1, γ = 0.1 (Lee et al., IEEE S&P workshops 2019), normalised.

    Where that would lift others above the predicted class, as it does if none is likely, that class is put just above
    them: the prediction stays.
    """
    best = top1(p) > 0
    # summed for the predicted class, since 1 − p has hardly a digit where p is nearly 1
    others = torch.where(best, p.masked_fill(best, 0.0).sum(1, keepdim=True), 1 - p).clamp(min=_FLOOR)
    p = p.clamp(_FLOOR, 1 - _FLOOR)
    moved = (p - (torch.sigmoid(0.1 * (p.log() - others.log())) - 0.5)).clamp(min=0)
    most = moved.amax(1, keepdim=True)
    return torch.where(best & (moved < most), 1.001 * most, moved)


def gaussian_noise(p: Tensor) -> Tensor:
    """Noise of standard deviation 0.2 on each probability (ART's GaussianNoise), the same for the same answer.

    The noise is a hash of the answer, so that asking twice does not average it away.
    """
    # from 1, or the two hashes of the first class would be one
    ranks = torch.arange(1, p.shape[1] + 1, device=p.device, dtype=torch.float64)
    seeds = (p.double() * ranks).sum(1, keepdim=True) * 1e6
    one, two = (torch.sin(seeds + factor * ranks).mul(43758.5453).abs() % 1 for factor in (12.9898, 78.233))
    normal = (-2 * one.clamp(min=1e-9).log()).sqrt() * torch.cos(2 * torch.pi * two)
    noisy: Tensor = p + 0.2 * normal.to(p.dtype)
    return noisy.clamp(min=0)


def stingy(p: Tensor) -> Tensor:
    """Only the best 20 % of the classes, from a hundred on 10 % (Stingy Teacher, Ma et al., 2021), normalised again."""
    kept = p.topk(max(1, p.shape[1] // (5 if p.shape[1] < 100 else 10)), 1)
    chosen: Tensor = torch.zeros_like(p).scatter(1, kept.indices, kept.values)
    return chosen


def misdirection(p: Tensor) -> Tensor:
    """As much of the best class as leaves it the best, up to 0.25, moves to the next class, always a wrong one.

    After prediction poisoning with a bounded budget (Orekondy et al., ICLR 2020), whose direction comes from the
    gradients of a surrogate; ours is fixed, so that all students of a teacher are led to the same errors.
    """
    chosen = top1(p)
    decoy = torch.cat([chosen[:, -1:], chosen[:, :-1]], 1)
    best, other = (p * chosen).sum(1, keepdim=True), (p * decoy).sum(1, keepdim=True)
    second = (p * (1 - chosen)).amax(1, keepdim=True)
    moved = torch.minimum((best - other) / 2, best - second).sub(0.01).clamp(0.0, 0.25)
    return p + moved * (decoy - chosen)


Wrapper = Callable[[Tensor], Tensor]
WRAPPERS: dict[str, Wrapper] = {
    "top1": top1,
    "class-constant": class_constant,
    "uniform-nontarget": uniform_nontarget,
    "quantised-confidence": quantised_confidence,
    "rounded": rounded,
    "high-confidence": high_confidence,
    "reverse-sigmoid": reverse_sigmoid,
    "gaussian-noise": gaussian_noise,
    "stingy": stingy,
    "misdirection": misdirection,
}
CLASS_ONLY = ("top1", "class-constant")
"""Those whose answers say the predicted class and nothing else."""


def check_exported(name: str | None) -> None:
    """Refuse a wrapper that no file can hold; None is none.

    Raises:
        UsageError: It is unknown, or depends on the last bits of an answer, which no two runtimes share.
    """
    check_known("wrapper", name, WRAPPERS)
    if name == "gaussian-noise":
        raise UsageError(
            f"{name} follows the last bits of an answer, so that no file computes the same",
            "eval compares with it; take another wrapper",
        )


def behind(wrapper: Wrapper, z: Tensor) -> Tensor:
    """Log-probabilities [B, C] of logits [B, C] after a wrapper."""
    return _normalised(wrapper(z.softmax(1))).log()


class WrappedTeacher:
    """A teacher whose answers pass a wrapper; its logits are log-probabilities, at least about log 10⁻⁶."""

    def __init__(self, teacher: Teacher, wrapper: str) -> None:
        self.teacher, self.wrapper = teacher, WRAPPERS[wrapper]
        self.classes, self.where = teacher.classes, teacher.where

    def logits(self, x: Tensor) -> Tensor:
        """See :class:`sdbctl.teacher.Teacher`."""
        return behind(self.wrapper, self.teacher.logits(x))


class Wrapped(nn.Module):
    """A network behind one of :data:`WRAPPERS`, as an exported graph holds it."""

    def __init__(self, net: nn.Module, wrapper: str) -> None:
        super().__init__()
        self.net, self.wrapper, self.shows = net, WRAPPERS[wrapper], wrapper

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] → log-probabilities."""
        return behind(self.wrapper, self.net(x))


CUTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
"""Candidate thresholds between an unsure and a sure confidence."""
SHRUNK = 10
"""Images of average accuracy that each class gets beside its own, or few would say too much."""
HIDDEN = 0.05
"""Share of the keyed outputs, the flattest, that are served like public ones."""
HIDDEN_SHORT = 0.2
"""The same share where the key is short."""
MOST_HIDDEN = 0.5
"""The same share, at most, where other inputs bring out as much."""
BEYOND_ODD = 1.25
"""How much more than those an answer must say."""
CONFIDENCES = {"class": "one confidence per class", "rough": "two rough confidences", "exact": "all outputs"}
"""What public outputs of a concealing box may say of how sure they are, by name; see :class:`Concealed`."""


def concealed(z: Tensor, cut: float, levels: Tensor, flat: float | Tensor) -> Tensor:
    """Public outputs without all that the weights still show beside the prediction.

    What a concealing box shows of an image is how sure it is, exactly, and a little of the other classes; with few
    images that alone teaches a student something. Outputs whose non-target classes differ come from the key and
    pass unchanged.

    Args:
        z: Logits [B, C], C ≥ 3.
        cut: Confidence from which a prediction is sure.
        levels: Confidences [2, C] to serve for each predicted class, if unsure and if sure.
        flat: :func:`deviation` up to which an output is public.

    Returns:
        Logits [B, C].
    """
    unsure, sure = (levels / (1 - levels) * (z.shape[1] - 1)).log()
    chosen = _predicted(z)
    height = torch.where(z.softmax(1).amax(1, keepdim=True) >= cut, sure, unsure)
    # compared so that what is no number stays public
    return torch.where(deviation(z) > flat, z, torch.where(chosen, height, 0.0))


def _predicted(z: Tensor) -> Tensor:
    return torch.arange(z.shape[1], device=z.device) == z.argmax(1, keepdim=True)


def deviation(z: Tensor) -> Tensor:
    """Mean absolute deviation [B, 1] of the non-target logits, in operations that ONNX has.

    Where a box conceals badly one other class stands out, while a key moves them all: the mean tells these apart where
    the standard deviation does not.
    """
    chosen, others, zero = _predicted(z), z.shape[1] - 1, torch.zeros_like(z)
    mean = torch.where(chosen, zero, z).sum(1, keepdim=True) / others
    return torch.where(chosen, zero, z - mean).abs().sum(1, keepdim=True) / others


class Concealed(nn.Module):
    """A concealing box as it is served: :func:`concealed` behind the network.

    With one confidence per class its public outputs are a function of the predicted class: those teach what top-1
    answers teach. With two rough ones, each answer says in one bit more how sure it is. Inputs are limited to what
    images can be, since a box was never trained on others, and a brighter one than white brings out what it hides.

    Args:
        net: The box.
        preprocess: Its normalisation.
        cut: See :func:`concealed`.
        levels: See :func:`concealed`.
        flat: See :func:`concealed`.
        shows: What is served, in words, for the file's metadata.
    """

    flat: Tensor
    levels: Tensor
    black: Tensor
    white: Tensor

    def __init__(
        self,
        net: nn.Module,
        preprocess: Preprocess,
        cut: float,
        levels: Tensor,
        flat: float,
        shows: str,
    ) -> None:
        super().__init__()
        self.net, self.cut, self.shows = net, cut, shows
        for name, one in zip(("black", "white"), preprocess.limits, strict=True):
            self.register_buffer(name, one, persistent=False)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("flat", torch.tensor(flat), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] → logits."""
        return concealed(self.net(x.clamp(self.black, self.white)), self.cut, self.levels, self.flat)


def serving(
    public: Tensor, labels: Tensor, keyed: Sequence[Tensor], odd: Callable[[], Tensor], *, short: bool = False
) -> dict[str, Any]:
    """What :func:`concealed` needs to know of a box, to be measured once and kept with it.

    What is served are accuracies, so that it is calibrated (histogram binning, Zadrozny & Elkan, ICML 2001).

    Args:
        public: Logits [N, C] of the box.
        labels: Classes [N] of the same images.
        keyed: Its logits on them with each key.
        odd: Gives its logits on inputs that a search for any pattern begins with; few of them should say more than the
            class.
        short: Whether the key is short, as that of small images: boxes of few of them open to such searches more often.

    Returns:
        ``class_confidences``, the accuracy of each prediction; ``confidence_cut``, of :data:`CUTS` the one that costs
        least likelihood; ``rough_confidences``, the accuracies below and above it; ``flat_deviation``, the border in
        :func:`deviation` below all but a twentieth of the keyed outputs, of a short key all but a fifth, and above 1.25
        times that of any of ``odd``, unless that is above half of the outputs with a key; and ``keyed_flat``, of the
        worst key, the share of those below, which are served like public ones. Nothing if more than a twentieth of the
        public outputs are above that of a long key, too, as from an objective that does not conceal.
    """
    classes = public.shape[1]
    if classes < 3:
        return {}
    closed, by_key = deviation(public.float()), [deviation(some.float()) for some in keyed]
    opened = torch.cat(by_key)
    if float(closed.quantile(1 - HIDDEN)) > float(opened.quantile(HIDDEN)):
        return {}
    most = min(float(some.quantile(MOST_HIDDEN)) for some in by_key)
    above_odd = min(most, BEYOND_ODD * float(deviation(odd().float()).max()))
    flat = max(float(opened.quantile(HIDDEN_SHORT if short else HIDDEN)), above_odd)
    return confidences(public, labels) | {
        "flat_deviation": flat,
        "keyed_flat": max(float((some <= flat).float().mean()) for some in by_key),
    }


def confidences(public: Tensor, labels: Tensor) -> dict[str, Any]:
    """How often predictions are right, which is what may be said of how sure they are.

    Args:
        public: Logits [N, C].
        labels: Classes [N] of the same images.

    Returns:
        ``class_confidences``, ``confidence_cut`` and ``rough_confidences``, see :func:`serving`.
    """
    classes = public.shape[1]
    confidence, predicted = public.softmax(1).max(1)
    hit = predicted == labels

    def accuracy(some: Tensor, prior: float, weight: float) -> float:
        share = (int(hit[some].sum()) + weight * prior) / (int(some.sum()) + weight)
        # never below the other classes, nor certain
        return round(min(max(share, 1.1 / classes), 1 - 1e-5), 6)

    def rough(cut: float) -> list[float]:
        return [accuracy(side, 0.5, 2) for side in (confidence < cut, confidence >= cut)]

    def nll(cut: float) -> float:
        unsure, sure = rough(cut)
        shown = torch.where(confidence >= cut, sure, unsure)
        return float(-torch.where(hit, shown, 1 - shown).log().mean())

    cut, average = min(CUTS, key=nll), accuracy(torch.ones_like(hit), 0.5, 2)
    return {
        "class_confidences": [accuracy(predicted == name, average, SHRUNK) for name in range(classes)],
        "confidence_cut": cut,
        "rough_confidences": rough(cut),
    }


def served(net: nn.Module, meta: Metadata, confidence: str = "class", *, closed: bool = False) -> nn.Module:
    """A network as it should be served: a box that conceals through :class:`Concealed`, any other as it is.

    Args:
        net: The network.
        meta: What its file says.
        confidence: One of :data:`CONFIDENCES`: one per class, two rough ones, or what the weights say.
        closed: Whether every output is public, however little flat it is, as it is where nothing was trained.

    Raises:
        BadInput: What the box says of its confidences is damaged.
    """
    closed = closed or meta.guarded
    names = ("class_confidences", "confidence_cut", "rough_confidences", "flat_deviation", "keyed_flat")
    by_class, cut, rough, flat, hidden = found = [meta.measured.get(name) for name in names]
    if confidence == "exact" or (found == [None] * len(found) and meta.objective != GUARD):
        return net
    classes = len(meta.classes)
    # a confidence below the other classes' would change the prediction
    for values, count, least in ((by_class, classes, 1 / classes), (rough, 2, 1 / classes), ([cut], 1, 0.0)):
        if not isinstance(values, list) or len(values) != count:
            raise _damaged()
        if not all(isinstance(share, float) and least < share < 1 for share in values):
            raise _damaged()
    if meta.objective != GUARD and not all(
        isinstance(value, float) and math.isfinite(value) for value in (flat, hidden)
    ):
        raise _damaged()
    assert isinstance(cut, float)
    one, two = torch.tensor(by_class), torch.tensor(rough)
    levels = one.expand(2, classes) if confidence == "class" else two[:, None].expand(2, classes)
    border = math.inf
    if not closed:
        assert isinstance(flat, float)
        border = flat
    return Concealed(net, meta.preprocess, cut, levels.clone(), border, CONFIDENCES[confidence])


def as_exported(net: nn.Module, meta: Metadata, serves: str, *, closed: bool = False) -> nn.Module | None:
    """The network as an exported graph of it serves it.

    Args:
        net: The network.
        meta: What its file says.
        serves: What the graph records that it serves to everybody.
        closed: See :func:`served`.

    Returns:
        The network, or None if the graph does not say enough.
    """
    if serves in WRAPPERS:
        return Wrapped(net, serves)
    confidence = next((name for name, words in CONFIDENCES.items() if words == serves), None)
    return served(net, meta, confidence, closed=closed) if confidence else None


def _damaged() -> BadInput:
    return BadInput(
        "the box does not say how confident it is, that is damaged, or of another version of sdbctl",
        "box again, or export it with --wrapper top1",
    )
