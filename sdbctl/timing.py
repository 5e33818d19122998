"""How long training takes on this machine, and the precision that is faster."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from sdbctl import team
from sdbctl.data import Batch
from sdbctl.data.images import sized
from sdbctl.engine import Engine, Precision, pick_device, place, synchronise
from sdbctl.errors import UsageError
from sdbctl.updates import WARM_STEPS, Recipe, Updater, recording, sgd


@torch.no_grad()
def check_takes(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Refuse a network that cannot take such images, before anything else is asked of it.

    Args:
        model: The network.
        shape: Of an image (C, H, W).

    Raises:
        UsageError: It fails on two of them.
    """
    weight = next(model.parameters())
    training = model.training
    try:
        model.eval()(torch.zeros(2, *shape, device=weight.device))
    except (RuntimeError, AssertionError, ValueError, IndexError, TypeError):
        raise UsageError(f"the network cannot take images of {sized(shape)}", "use --image-size") from None
    finally:
        model.train(training)


def pick_engine(
    device: str, precision: Precision, model: nn.Module, example: Tensor, reason: str = "as asked"
) -> tuple[Engine, str]:
    """Choose the precision by timing some training steps of each.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: A fixed choice, or ``auto``.
        model: The network to be trained; it is not changed.
        example: A batch [B, C, H, W] of its input.
        reason: Why a fixed choice is one, in words.

    Returns:
        The engine and one line that says what was chosen and why.

    Raises:
        UsageError: The network cannot take such images.
    """
    where = pick_device(device)
    check_takes(model, tuple(example.shape[1:]))
    if precision != "auto":
        return Engine(where, precision), f"{where}, {precision} ({reason})"
    seconds = {"fp32": math.inf, "bf16": math.inf}
    # in turn, so that a machine that is busy for a moment hits both
    for _ in range(3 if where.type == "cpu" else 1):
        for name in ("fp32", "bf16"):
            try:
                once = step_seconds(model, example.to(where), Engine(where, name))
                seconds[name] = min(seconds[name], once)
            except RuntimeError:
                # not every device and layer has bf16
                if name == "fp32":
                    raise
    best: Literal["fp32", "bf16"] = "bf16" if seconds["bf16"] < 0.9 * seconds["fp32"] else "fp32"
    ratio = seconds["fp32"] / seconds["bf16"]
    return Engine(where, best), f"{where}, {best} (bf16 is {ratio:.1f}x fp32 here)"


STEADY_SECONDS = 0.3


def step_seconds(model: nn.Module, example: Tensor, engine: Engine) -> float:
    """Seconds of one plain training step, the best of some; weights are not changed."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    training = model.training
    place(model, engine.device).train()
    x = example.to(engine.device, memory_format=torch.channels_last)
    none = torch.zeros(len(x), dtype=torch.int64, device=engine.device)

    def step(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        with engine.autocast():
            return {"loss": model(batch.x).float().square().mean()}

    best, begun, done = math.inf, time.perf_counter(), 0
    try:
        with recording(engine.device, True) as recorded:
            update = Updater(model, step, sgd(model, Recipe(lr=0.1), fused=recorded), 5.0, record=recorded)
            least = 3 + (WARM_STEPS if recorded else 0)
            # quick steps are timed more often: a busy machine must not spoil all of them
            while done < least or time.perf_counter() - begun < STEADY_SECONDS:
                done += 1
                synchronise(engine.device)
                begin = time.perf_counter()
                update(Batch(x, none, none), 0.0)
                synchronise(engine.device)
                best = min(best, time.perf_counter() - begin)
    finally:
        model.zero_grad(set_to_none=True)
        model.load_state_dict(state)
        model.train(training)
    return best


def image_seconds(model: nn.Module, batch_size: int, images: int, shape: Sequence[int], engine: Engine) -> float:
    """Seconds of a plain training step per image [C, H, W] of so many, if all processes share each batch."""
    part = max(1, min(batch_size, images) // team.size())
    return step_seconds(model, torch.zeros(part, *shape), engine) / (part * team.size())
