"""Attacks of somebody who holds the file: weights are changed until they teach, or features are copied."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, mse_loss, normalize

from sdbctl.attacks.base import Attack, Attacker, Config, Train, without_labels
from sdbctl.attacks.kd import KD, KD_UNLABELLED
from sdbctl.attacks.queries import PRETRAINING, first_foreign, pretrained
from sdbctl.attacks.soft import AMPLIFYING, DIST, EITHER, info_nce, soft_loss
from sdbctl.attacks.staged import outputs
from sdbctl.data import Batch, ImageSet, batches
from sdbctl.engine import place, seeded
from sdbctl.errors import UsageError
from sdbctl.models.stages import Stages, head
from sdbctl.teacher import Access
from sdbctl.updates import scaled

TUNE_EPOCHS, TUNE_STEPS = 10, 300
"""How long, at least, an attacker trains the box itself."""
BATCHED = 256
"""Images of a batch that statistics of BatchNorm are taken from, at most."""
FEW = 256
"""Images below which statistics of BatchNorm are not to be had from them."""


def held(attacker: Attacker) -> nn.Module:
    """The network in the file, of which every attack gets its own copy."""
    if attacker.weights is None:
        raise UsageError("attacks on the file need the weights", "give the safetensors file, not the ONNX")
    return place(attacker.weights, attacker.engine.device)


def _from(attacker: Attacker, nets: list[nn.Module], config: Config) -> None:
    """Distil the student from the mean log-probabilities of boxes."""

    def targets(images: ImageSet) -> Tensor:
        return torch.stack([outputs(attacker, net, images) for net in nets]).mean(0)

    attacker.learn(lambda z, answer, y: soft_loss(z, answer, y, config), targets=targets)


def stripped(attacker: Attacker, config: Config) -> None:
    """Distillation from the weights as they are: whatever the graph does behind the network is left out."""
    _from(attacker, [held(attacker)], config)


def pretrained_held(attacker: Attacker, config: Config) -> None:
    """Images of another data set first, then the transfer set, by what the bare weights say, amplified or as it is."""
    net = held(attacker)
    pretrained(attacker, config, soft_loss, lambda images: outputs(attacker, net, images))


def _tuning(images: int) -> tuple[int, int]:
    """Batch size and epochs with which the box itself is trained on so many images."""
    size = min(64, images)
    return size, max(TUNE_EPOCHS, -(-TUNE_STEPS * size // images))


def _tuned(images: int) -> int:
    return images * _tuning(images)[1]


def _train_box(
    attacker: Attacker,
    net: nn.Module,
    images: ImageSet,
    rate: float,
    mode: Callable[[nn.Module], nn.Module] = nn.Module.train,
) -> None:
    size, epochs = _tuning(len(images))
    recipe = scaled(attacker.recipe, epochs=epochs, lr=rate, batch_size=size)
    attacker.fit(net, lambda model, batch: cross_entropy(mode(model)(batch.x), batch.y), images, recipe=recipe)


def rehead(attacker: Attacker, config: Config) -> None:
    """min over W, b of CE(W·f(x) + b, y), f the box's features (Alain & Bengio, ICLR 2017 workshop), then KD from it.

    A new last layer brings back what only the outputs hid.
    """
    net = held(attacker)
    last = head(net)
    net.requires_grad_(False)
    with seeded(attacker.recipe.seed):
        last.reset_parameters()
    last.requires_grad_(True)
    # statistics of BatchNorm are part of the features
    _train_box(attacker, net, attacker.images, 0.1, nn.Module.eval)
    _from(attacker, [net], config)


def fine_tuned(attacker: Attacker, config: Config) -> None:
    """The box fine-tuned by CE(B(x), y) on a share of the labels, then KD from it.

    Fine-tuning is the usual way to take out what was trained in (Liu et al., RAID 2018).
    """
    net = held(attacker)
    few = attacker.images.take(range(max(2, round(config["share"] * len(attacker.images)))))
    _train_box(attacker, net, few, 0.01, nn.Module.eval if len(few) < FEW else nn.Module.train)
    _from(attacker, [net], config)


def pruned(attacker: Attacker, config: Config) -> None:
    """w = 0 where |w| is below the ``share`` quantile of its convolution, statistics taken anew, then KD.

    Pruning by magnitude (Han et al., NeurIPS 2015) as an attack on what was trained in (Liu et al., RAID 2018).
    """
    net = held(attacker)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                size = module.weight.abs()
                module.weight[size < size.flatten().float().quantile(config["share"])] = 0
    _reestimate(attacker, net)
    _from(attacker, [net], config)


def noisy(attacker: Attacker, config: Config) -> None:
    """KD from the mean of four B(x; w + ε), ε ~ N(0, (sigma·sd(w))²) for every matrix and kernel: our own."""
    nets = []
    with seeded(attacker.recipe.seed), torch.no_grad():
        for _ in range(4):
            net = copy.deepcopy(held(attacker))
            for parameter in net.parameters():
                if parameter.ndim > 1:
                    parameter.add_(torch.randn_like(parameter), alpha=config["sigma"] * float(parameter.std()))
            nets.append(net)
    _from(attacker, nets, config)


def reestimated(attacker: Attacker, config: Config) -> None:
    """BatchNorm statistics of the box taken anew on the transfer set, then KD."""
    net = held(attacker)
    _reestimate(attacker, net)
    _from(attacker, [net], config)


def _reestimate(attacker: Attacker, net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
    net.train()
    seen = attacker.view(0)
    # alike in size: each counts the same, and a single image has no statistics
    parts = torch.arange(len(seen)).tensor_split(math.ceil(len(seen) / BATCHED))
    with torch.no_grad(), attacker.engine.autocast():
        for part in parts:
            some = seen.take(part)
            for batch in batches(some, attacker.preprocess, batch_size=len(some), device=attacker.engine.device):
                net(batch.x)
    net.eval()


# --- features --------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """A student, and projections of its feature maps to those of the box."""

    def __init__(self, student: nn.Module, teacher: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.net, self.mine, self._theirs = student, Stages(student), Stages(teacher)
        self._teacher = [teacher.eval()]
        with torch.no_grad():
            student.eval()(example)
            teacher(example)
        sizes = [(size, size) for size in self.mine.maps if size in self._theirs.maps]
        # without a size in common the last maps of both, averaged to the smaller
        self.sizes = sizes or [(list(self.mine.maps)[-1], list(self._theirs.maps)[-1])]
        self.projections = nn.ModuleList(
            nn.Conv2d(self.mine.maps[own].shape[1], self._theirs.maps[other].shape[1], 1) for own, other in self.sizes
        )
        own, other = self.features()
        self.embed_own, self.embed_other = nn.Linear(own.shape[1], 64), nn.Linear(other.shape[1], 64)

    def forward(self, x: Tensor) -> Tensor:
        """Images → the student's logits [B, C]; the maps of both stay in ``maps()``."""
        with torch.no_grad():
            self._teacher[0](x)
        return self.net(x)  # type: ignore[no-any-return]

    def maps(self) -> list[tuple[Tensor, Tensor, nn.Module]]:
        """Feature maps of one size: the student's, the box's, and the projection."""
        found = []
        for (mine, theirs), layer in zip(self.sizes, self.projections, strict=True):
            own, other = self.mine.maps[mine].float(), self._theirs.maps[theirs].float()
            size = min(mine[0], theirs[0]), min(mine[1], theirs[1])
            found.append((adaptive_avg_pool2d(own, size), adaptive_avg_pool2d(other, size), layer))
        return found

    def features(self) -> tuple[Tensor, Tensor]:
        """Inputs of the last layers: the student's [B, D] and the box's [B, E]."""
        assert self.mine.features is not None and self._theirs.features is not None
        return self.mine.features.float(), self._theirs.features.float()

    def close(self) -> None:
        """Leave both networks as they were."""
        self.mine.close()
        self._theirs.close()


def fitnet(pair: Pair) -> Tensor:
    """Mean squared distance of projected feature maps (Romero et al., ICLR 2015)."""
    return torch.stack([mse_loss(layer(own), other) for own, other, layer in pair.maps()]).sum()


def attention(pair: Pair) -> Tensor:
    """Distance of normalised attention maps, the mean of squares over channels (Zagoruyko & Komodakis, ICLR 2017)."""

    def summary(maps: Tensor) -> Tensor:
        return normalize(maps.square().mean(1).flatten(1))

    return torch.stack([(summary(own) - summary(other)).square().mean() for own, other, _ in pair.maps()]).sum()


def similarity(pair: Pair) -> Tensor:
    """Distance of the images' similarity matrices (Tung & Mori, ICCV 2019)."""

    def matrix(maps: Tensor) -> Tensor:
        flat = maps.flatten(1)
        return normalize(flat @ flat.T)

    own, other, _ = pair.maps()[-1]
    return (matrix(own) - matrix(other)).square().mean()


def contrast(pair: Pair) -> Tensor:
    """Contrast of images in embeddings of both networks' features (CRD, Tian et al., ICLR 2020), negatives in batch."""
    own, other = pair.features()
    return info_nce(pair.embed_own(own), pair.embed_other(other))


def _features(distance: Callable[[Pair], Tensor]) -> Callable[[Attacker, Config], None]:
    def train(attacker: Attacker, config: Config) -> None:
        with seeded(attacker.recipe.seed):
            pair = Pair(attacker.student.cpu(), held(attacker).cpu(), torch.zeros(2, *attacker.preprocess.size))
        place(pair._teacher[0], attacker.engine.device)

        def step(model: nn.Module, batch: Batch) -> Tensor:
            z = model(batch.x)
            return cross_entropy(z, batch.y) + config["features"] * distance(pair)

        attacker.fit(pair, step, attacker.images)
        pair.close()

    return train


_GRID = (*EITHER, {"temperature": 8.0, "alpha": 1.0})
_ANY = (*EITHER, AMPLIFYING[0])


def _attack(summary: str, source: str, train: Train, grid: Iterable[Config], twin: str = "") -> Attack:
    return Attack(summary, source, train, tuple(grid), Access.WEIGHTS, twin=twin)


STRIPPED = _attack("KD from the bare weights", "Hinton et al., arXiv 1503.02531", stripped, KD.grid, "hard_mixed")
STRIPPED_UNLABELLED = replace(without_labels(STRIPPED), grid=KD_UNLABELLED.grid)
STRIPPED_DIST = _attack(
    "correlations with the bare weights", "Huang et al., NeurIPS 2022", stripped, DIST.grid, "dist_hard"
)
AMPLIFIED = _attack("what the bare weights still show, amplified", "own", stripped, AMPLIFYING, "dkd_hard")
REHEAD = Attack(
    "a new last layer on the box's features",
    "Alain & Bengio, ICLR 2017 workshop",
    rehead,
    _GRID,
    Access.WEIGHTS,
    own=_tuned,
)
FINE_TUNED = Attack(
    "the box fine-tuned on few labels",
    "Liu et al., RAID 2018",
    fine_tuned,
    (
        *({**config, "share": 1.0} for config in _ANY),
        *({**config, "share": 0.1} for config in _ANY[1:]),
        {**_ANY[-1], "share": 0.01},
    ),
    Access.WEIGHTS,
    own=_tuned,
)
PRUNED = _attack("the box pruned", "Han et al., NeurIPS 2015", pruned, ({**config, "share": 0.3} for config in _ANY))
NOISY = _attack(
    "boxes with noisy weights, averaged", "own", noisy, ({**config, "sigma": 0.1} for config in _ANY), "dist_hard"
)
REESTIMATED = _attack("BatchNorm statistics taken anew", "own", reestimated, (*_GRID, AMPLIFYING[0]), "dist_hard")
PRETRAINED_HELD = Attack(
    "bare weights, amplified or not, surrogate set first, then own images",
    "own",
    pretrained_held,
    # what was not trained to hide teaches more as it is
    (*({**config, "scale": 1.0} for config in PRETRAINING), *PRETRAINING),
    Access.WEIGHTS,
    surrogate=True,
    twin="pretrained_hard",
    extra=first_foreign,
)
FITNET = _attack(
    "feature maps copied",
    "Romero et al., ICLR 2015",
    _features(fitnet),
    ({"features": weight} for weight in (1.0, 100.0)),
)
ATTENTION = _attack(
    "attention maps copied",
    "Zagoruyko & Komodakis, ICLR 2017",
    _features(attention),
    ({"features": weight} for weight in (1000.0, 100.0)),
)
SIMILARITY = _attack(
    "similarities copied",
    "Tung & Mori, ICCV 2019",
    _features(similarity),
    ({"features": weight} for weight in (3000.0, 300.0)),
)
CONTRAST = _attack("features contrasted", "Tian et al., ICLR 2020", _features(contrast), ({"features": 0.8},))
