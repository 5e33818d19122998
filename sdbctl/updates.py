"""One step of training: what is updated how, and on a GPU its capture as a CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sdbctl.data import Batch
from sdbctl.errors import UsageError


@dataclass(frozen=True)
class Recipe:
    """How to train: SGD with Nesterov momentum, linear warm-up, cosine decay to zero.

    Attributes:
        epochs: Passes over the training set.
        batch_size: Images per step.
        lr: Peak learning rate.
        momentum: Of SGD.
        weight_decay: On all parameters.
        warmup: Share of the steps in which the learning rate rises linearly.
        clip: Largest gradient norm.
        augment: Name of the augmentation, or None for the data set's usual one.
        seed: Of batch order, augmentation and initialisation.
    """

    epochs: int = 20
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.05
    clip: float = 5.0
    augment: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', ' ')} is {getattr(self, name)}", "use 1 or more")
        if not 0 < self.lr <= 1000:  # also for NaN
            raise UsageError(f"learning rate is {self.lr:g}", "use a number above 0, up to 1000")


def scaled(recipe: Recipe, **changes: Any) -> Recipe:
    """A recipe with some fields replaced; None leaves a field as it is."""
    return replace(recipe, **{name: value for name, value in changes.items() if value is not None})


Step = Callable[[nn.Module, Batch], Mapping[str, Tensor]]
"""Maps the model in training mode and a batch to named loss terms, whose sum is minimised."""


WARM_STEPS = 3
"""Steps before one is recorded: the first ones allocate, and choose kernels."""


class Updater:
    """Optimiser steps. On a GPU one is captured as a CUDA graph and replayed, which spares launching its many kernels.

    Args:
        model: The network whose parameters are updated.
        step: Computes the loss terms of a batch.
        optimiser: SGD over the parameters.
        clip: Largest gradient norm.
        record: Whether ``step`` may be recorded: it reads nothing but the batch and tensors that stay where they are,
            draws random numbers on the device alone, and does the same every time.
        forward: What ``step`` gets as its model, if that is not ``model`` itself.
        backward: Computes gradients of a loss.
    """

    def __init__(
        self,
        model: nn.Module,
        step: Step,
        optimiser: torch.optim.Optimizer,
        clip: float,
        *,
        record: bool = False,
        forward: nn.Module | None = None,
        backward: Callable[[Tensor], object] = torch.Tensor.backward,
    ) -> None:
        self.model, self.optimiser, self.clip = model, optimiser, clip
        self._step, self._forward, self._backward = step, forward or model, backward
        self._wait = WARM_STEPS if record else -1
        self._shape: torch.Size | None = None
        self._recording: tuple[torch.cuda.CUDAGraph, Batch, Mapping[str, Tensor]] | None = None
        # a recorded step reads the rate from the device
        device = next(model.parameters()).device
        self._rate: Tensor | None = torch.zeros((), device=device) if record else None

    @property
    def recorded(self) -> bool:
        """Whether steps are replayed."""
        return self._recording is not None

    def __call__(self, batch: Batch, rate: float) -> Mapping[str, Tensor]:
        """Take one step with a learning rate; returns its loss terms, detached."""
        if self._rate is not None:
            self._rate.fill_(rate)
        for group in self.optimiser.param_groups:
            group["lr"] = rate if self._rate is None else self._rate
        self._shape = self._shape or batch.x.shape
        # a last batch of another size is neither recorded nor replayed
        if batch.x.shape != self._shape:
            return self._once(batch)
        if self._wait == 0:
            self._record(batch)
        self._wait -= 1
        if self._recording is None:
            return self._once(batch)
        graph, recorded, terms = self._recording
        for own, new in zip(recorded, batch, strict=True):
            own.copy_(new)
        graph.replay()
        # the next replay overwrites them
        return {name: term.clone() for name, term in terms.items()}

    def _once(self, batch: Batch) -> Mapping[str, Tensor]:
        terms = self._step(self._forward, batch)
        loss = torch.stack([term.float() for term in terms.values()]).sum()
        self.optimiser.zero_grad(set_to_none=True)
        self._backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimiser.step()
        return {name: term.detach() for name, term in terms.items()}

    def _record(self, batch: Batch) -> None:
        """Record a step, without taking it; a step that cannot be recorded is taken as usual from then on."""
        graph, own = torch.cuda.CUDAGraph(), Batch(*(tensor.clone() for tensor in batch))
        drawn = torch.cuda.default_generators[torch.cuda.current_device()]
        before = drawn.clone_state()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                terms = self._once(own)
        except RuntimeError:
            # a recording that broke off would keep the generator for itself
            drawn.graphsafe_set_state(before)
            return
        self._recording = graph, own, terms


def sgd(model: nn.Module, recipe: Recipe, *, fused: bool) -> torch.optim.SGD:
    """The optimiser of whatever in ``model`` is to be trained; a recorded step needs it fused."""
    return torch.optim.SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0,
        fused=fused or None,
    )


@contextmanager
def recording(device: torch.device, record: bool) -> Iterator[bool]:
    """Where steps can be recorded: on a stream of its own, with kernels chosen by measurement, on a GPU alone.

    Yields:
        Whether they can.
    """
    if not record or device.type != "cuda":
        yield False
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=True)
    try:
        with torch.cuda.device(device), torch.cuda.stream(stream), flags:
            yield True
    finally:
        torch.cuda.current_stream(device).wait_stream(stream)


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Linear warm-up, then cosine decay to zero at ``steps``."""
    warm = max(1, round(recipe.warmup * steps))
    if step < warm:
        return recipe.lr * (step + 1) / warm
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
