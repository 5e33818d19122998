"""Soft-output attacks that differ only in the loss of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize, one_hot

from sdbctl.attacks.base import Attack, Config, Loss, PerBatch
from sdbctl.attacks.floor import from_label, from_top1
from sdbctl.attacks.kd import TAU4, soft_labels, target_of
from sdbctl.errors import UsageError
from sdbctl.losses import cross_entropy, kd, split_target
from sdbctl.teacher import Access

METHODS: Mapping[str, Config] = {
    "kd": TAU4,
    "dkd": {"temperature": 4.0, "beta": 1.0},
    "dist": {"temperature": 4.0, "weight": 1.0},
}
"""Usual settings of the losses that :func:`soft_loss` knows, by name."""
EITHER: tuple[Config, ...] = (TAU4, {"temperature": 4.0, "weight": 2.0})
"""Settings of :func:`soft_loss` for attacks that have something else to set."""
AMPLIFYING: tuple[Config, ...] = tuple({**METHODS["dkd"], "scale": scale} for scale in (1.0, 3.0))


def _centred(z: Tensor) -> Tensor:
    return z - z.mean(1, keepdim=True)


def logits_mse(z: Tensor, answer: Tensor | None, y: Tensor | None, config: Config) -> Tensor:
    """Mean squared distance of centred logits (Ba & Caruana, NeurIPS 2014); needs no temperature.

    Log-probabilities are logits up to a constant, which centring takes away.
    """
    assert answer is not None
    return (_centred(z) - _centred(answer)).square().mean()


def dkd(z: Tensor, answer: Tensor | None, y: Tensor | None, config: Config) -> Tensor:
    """Decoupled distillation: CE + τ²·(KL_binary + β·KL of the non-target classes) (Zhao et al., CVPR 2022, eq. 7).

    Without labels the teacher's own prediction is the target.
    """
    assert answer is not None
    tau = config["temperature"]
    target = target_of(answer, y)
    (own_s, rest_s), (own_t, rest_t) = split_target(z / tau, target), split_target(answer / tau, target)
    pair_s, pair_t = (torch.stack([own, rest.logsumexp(1)], 1) for own, rest in ((own_s, rest_s), (own_t, rest_t)))
    soft = kd(pair_s, pair_t, 1.0) + config["beta"] * kd(rest_s, rest_t, 1.0)
    return cross_entropy(z, target) + tau**2 * soft


def dist(z: Tensor, answer: Tensor | None, y: Tensor | None, config: Config) -> Tensor:
    """Correlation instead of equality: CE + τ²·(β·(1 − ρ over classes) + γ·(1 − ρ over images)).

    Pearson's ρ between student's and teacher's probabilities at τ; β = γ = ``weight`` (Huang et al., NeurIPS 2022).
    """
    assert answer is not None
    tau = config["temperature"]
    p, q = (z / tau).softmax(1), (answer / tau).softmax(1)

    def apart(a: Tensor, b: Tensor, dim: int) -> Tensor:
        a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
        return 1 - torch.nn.functional.cosine_similarity(a, b, dim=dim, eps=1e-8).mean()

    target = target_of(answer, y)
    return cross_entropy(z, target) + config["weight"] * tau**2 * (apart(p, q, 1) + apart(p, q, 0))


def amplified(z: Tensor, scale: float) -> Tensor:
    """Logits [B, C] with whatever is left of the other classes brought to one size.

    A box leaves little of them, but what is left may point the right way; how large it is says nothing. The non-target
    logits of each image get the standard deviation ``scale`` (compare logit standardisation, Sun et al., CVPR 2024),
    and the predicted class keeps its distance from their mean, or just leads.
    """
    target = z.argmax(1)
    own, rest = split_target(z, target)
    mean, size = rest.mean(1, keepdim=True), rest.std(1, unbiased=False, keepdim=True).clamp(min=1e-6)
    least = (scale * (rest - mean) / size).amax(1) + 0.1
    return (scale * (z - mean) / size).scatter(1, target[:, None], (own - mean[:, 0]).maximum(least)[:, None])


def soft_loss(z: Tensor, answer: Tensor | None, y: Tensor | None, config: Config) -> Tensor:
    """The loss that the configuration has settings of: :func:`dist`, :func:`dkd`, else plain distillation.

    With a ``scale`` the answers are :func:`amplified` first.
    """
    assert answer is not None
    if "scale" in config:
        answer = amplified(answer, config["scale"])
    return (dist if "weight" in config else dkd if "beta" in config else soft_labels)(z, answer, y, config)


def clipped(z: Tensor, answer: Tensor | None, y: Tensor | None, config: Config) -> Tensor:
    """:func:`kd` from the ``top`` best classes; the others share the remaining probability evenly.

    It keeps what a defence cannot spoil without changing rankings, and drops a poisoned tail.
    """
    assert answer is not None
    top = min(int(config["top"]), answer.shape[1] - 1)
    p = answer.softmax(1)
    best = p.topk(top, 1)
    rest = (1 - best.values.sum(1, keepdim=True)).clamp(min=1e-6) / (answer.shape[1] - top)
    # of an answer that is very sure, what is not zero is as good as zero
    target = rest.expand_as(p).scatter(1, best.indices, best.values).clamp(min=torch.finfo(p.dtype).tiny).log()
    return soft_labels(z, target, y, config)


def repaired(z: Tensor, answer: Tensor | None, y: Tensor | None, config: Config) -> Tensor:
    """:func:`kd` from outputs whose maximum is moved to the label where it is elsewhere."""
    assert answer is not None and y is not None
    best = answer.argmax(1, keepdim=True)
    highest, own = answer.gather(1, best), answer.gather(1, y[:, None])
    return soft_labels(z, answer.scatter(1, best, own).scatter(1, y[:, None], highest), y, config)


def htc(z: Tensor, answer: Tensor | None, y: Tensor | None, config: Config) -> Tensor:
    """HTC: cross-entropy to s·onehot(ŷ) + (1 − s)·mean over τ ∈ {4, 20, 50} of softmax(log p / τ), s = ``share``.

    After the high-temperature attack on nasty teachers of Jandial et al. (ECCV 2022): false peaks melt at a
    high temperature, while the prediction is put back by hand. The composition is ours.
    """
    assert answer is not None
    target = target_of(answer, y)
    soft = torch.stack([(answer / tau).softmax(1) for tau in (4.0, 20.0, 50.0)]).mean(0)
    share = config["share"]
    mixed = share * one_hot(target, answer.shape[1]).float() + (1 - share) * soft
    return -(mixed * log_softmax(z, 1)).sum(1).mean()


def info_nce(a: Tensor, b: Tensor) -> Tensor:
    """InfoNCE: contrast of images in two sets of vectors [B, D], the batch's other images as negatives, τ = 0.1.

    Van den Oord et al., arXiv 1807.03748.
    """
    return cross_entropy(normalize(a) @ normalize(b).T / 0.1, torch.arange(len(a), device=a.device))


def chosen(
    method: str, temperature: float, alpha: float | None, *, labels: bool, foreign: bool
) -> tuple[str, dict[str, float]]:
    """The attack that somebody means who names a loss, and its configuration.

    Args:
        method: One of :data:`METHODS`.
        temperature: τ.
        alpha: Share of the soft loss, if it was asked for.
        labels: Whether the transfer set has labels.
        foreign: Whether there are images of another data set to begin with.

    Raises:
        UsageError: There is no such share.
    """
    config = {**METHODS[method], "temperature": temperature}
    if alpha is not None and "alpha" not in config:
        raise UsageError(f"{method} has no --alpha", "leave it out, or use --method kd")
    if not labels and alpha not in (None, 1.0):
        raise UsageError(f"without labels {alpha:g} is no --alpha", "leave it out, or use --labels")
    if "alpha" in config:
        config["alpha"] = 1.0 if not labels else config["alpha"] if alpha is None else alpha
    return f"{'pretrained' if foreign else method}{'' if labels else '_unlabelled'}", config


def _without_soft(what: str, source: str, loss: Loss, *grid: Config) -> tuple[Attack, Attack]:
    """The floor of an attack: the same from the label, and from top-1 answers, which must not look like a leak."""

    def floor(told: str, how: str, access: Access, constants: Callable[..., Tensor]) -> Attack:
        return Attack(
            f"{what}, constant {told} logits", f"{source}, {how}", PerBatch(partial(constants, loss)), grid, access
        )

    return (
        floor("label", "without a teacher", Access.NONE, from_label),
        floor("top-1", "with top-1 access", Access.LABELS, from_top1),
    )


LOGITS_MSE = Attack(
    "squared distance of centred logits",
    "Ba & Caruana, NeurIPS 2014",
    PerBatch(logits_mse),
    labels=False,
    twin="hard_constant",
)
DKD = Attack(
    "decoupled distillation",
    "Zhao et al., CVPR 2022",
    PerBatch(dkd),
    (METHODS["dkd"], {"temperature": 4.0, "beta": 8.0}),
    twin="dkd_hard",
)
DKD_CONSTANT, DKD_HARD = _without_soft(
    "DKD",
    "Zhao et al., CVPR 2022",
    dkd,
    *({**METHODS["dkd"], "confidence": confidence} for confidence in (0.8, 0.4, 0.95)),
)
DIST = Attack(
    "correlations of probabilities",
    "Huang et al., NeurIPS 2022",
    PerBatch(dist),
    ({"temperature": 4.0, "weight": 2.0}, {"temperature": 1.0, "weight": 2.0}, METHODS["dist"]),
    twin="dist_hard",
)
DIST_CONSTANT, DIST_HARD = _without_soft(
    "DIST",
    "Huang et al., NeurIPS 2022",
    dist,
    *({**config, "confidence": confidence} for config, confidence in zip(DIST.grid, (0.4, 0.9, 0.4), strict=True)),
)
AMPLIFIED_ANSWERS = Attack(
    "what answers still show of the other classes, amplified",
    "own",
    PerBatch(soft_loss),
    (*AMPLIFYING, {**METHODS["dist"], "scale": 1.0}),
    twin="dkd_hard",
)
CLIPPED = Attack(
    "top-k distillation",
    "a common repair of poisoned outputs",
    PerBatch(clipped),
    tuple({"temperature": tau, "top": top, "alpha": 0.9} for tau, top in ((4.0, 3.0), (4.0, 2.0), (1.0, 3.0))),
    twin="hard_mixed",
)
REPAIRED = Attack(
    "distillation with the maximum moved to the label",
    "own",
    PerBatch(repaired),
    (TAU4, {"temperature": 20.0, "alpha": 0.9}),
    twin="hard_mixed",
)
HTC = Attack(
    "HTC, high-temperature composition",
    "after Jandial et al., ECCV 2022",
    PerBatch(htc),
    tuple({"share": share} for share in (0.5, 0.1, 0.9)),
    twin="hard_mixed",
)
