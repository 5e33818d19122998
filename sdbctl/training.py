"""The one fit() loop. Whoever trains something differs only in the step function it passes."""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sdbctl import files, metrics, team
from sdbctl.batchnorm import one_batch
from sdbctl.data import Batch, ImageSet, Preprocess, batches
from sdbctl.data.images import sized
from sdbctl.errors import BadInput, EnvironmentFailure, UsageError

Precision = Literal["auto", "fp32", "bf16"]


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


READ_SECONDS = 0.3
"""How often the loss terms of a student are read, which waits for a GPU."""
SAVED_SECONDS, SAVED_SHARE = 0.1, 0.05
"""The state of a run is kept after each epoch if that takes no longer, else as often as it costs this share of time."""


class Resume(NamedTuple):
    """Where an interrupted run goes on.

    Attributes:
        path: File of the state after one of the last epochs: see :data:`SAVED_SHARE`.
        run: What decides the result beside the recipe; the state of another run is refused.
    """

    path: Path
    run: Mapping[str, Any]

    def done(self) -> None:
        """Forget the state, once the result is saved."""
        if team.rank() == 0:
            self.path.unlink(missing_ok=True)


def recorded_precision(*states: Path) -> str | None:
    """The precision with which an interrupted run began, or None."""
    for path in states:
        if path.exists():
            try:
                found = torch.load(path, map_location="cpu", weights_only=True)["identity"]["precision"]
            except Exception:
                continue
            return found if found in ("fp32", "bf16") else None
    return None


class Progress(Protocol):
    """What a long run reports to; the CLI draws it, the default ignores it."""

    def start(self, name: str, steps: int) -> None:
        """A run of ``steps`` steps begins."""

    def advance(self, steps: int, metrics: Mapping[str, float]) -> None:
        """Some steps are done; ``metrics`` are means over them."""

    def note(self, text: str) -> None:
        """Something worth a line."""


class Silent:
    """Progress that nobody watches."""

    def start(self, name: str, steps: int) -> None:
        """Ignore."""

    def advance(self, steps: int, metrics: Mapping[str, float]) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""


Step = Callable[[nn.Module, Batch], Mapping[str, Tensor]]
"""Maps the model in training mode and a batch to named loss terms, whose sum is minimised."""


@dataclass(frozen=True)
class Engine:
    """Where and how precisely to compute.

    Attributes:
        device: The torch device.
        precision: ``fp32``, or ``bf16`` autocast.
        profile: File for a torch profiler trace of some training steps, or None.
    """

    device: torch.device
    precision: Literal["fp32", "bf16"] = "fp32"
    profile: Path | None = None

    def autocast(self) -> torch.autocast:
        """The context in which every forward pass runs."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def pick_device(name: str) -> torch.device:
    """Resolve ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.

    Raises:
        EnvironmentFailure: CUDA was asked for and torch sees none.
        UsageError: Another name.
    """
    kind, _, number = name.partition(":")
    if name not in ("auto", "cpu", "cuda") and not re.fullmatch("cuda:(0|[1-9][0-9]*)", name):
        raise UsageError(f"unknown device {name}", "use auto, cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFailure("device cuda was asked for, but torch sees no GPU", "use --device cpu")
    if number and int(number) >= torch.cuda.device_count():
        raise EnvironmentFailure(f"there is no GPU number {number}", f"torch sees {torch.cuda.device_count()}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


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


def image_seconds(model: nn.Module, batch_size: int, shape: Sequence[int], engine: Engine) -> float:
    """Seconds of a plain training step per image [C, H, W], if all processes share each batch."""
    part = max(1, batch_size // team.size())
    return step_seconds(model, torch.zeros(part, *shape), engine) / (part * team.size())


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to a device, convolutions in the channels-last layout."""
    return model.to(device).to(memory_format=torch.channels_last)


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was told, so that a clock means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory() -> int:
    """The most bytes that this process has held so far, on the GPU if there is one in use."""
    import resource  # which Windows has not

    used = [torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count())]
    if any(used):
        return max(used)
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with torch's global generator at ``seed``, and put it back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Linear warm-up, then cosine decay to zero at ``steps``."""
    warm = max(1, round(recipe.warmup * steps))
    if step < warm:
        return recipe.lr * (step + 1) / warm
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


WARM_STEPS = 3
"""Steps before one is recorded: the first ones allocate, and choose kernels."""


class Updater:
    """Optimiser steps. A GPU records one and replays it: to launch its many small kernels takes longer than they do.

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


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Compute in full precision: on a GPU TF32 is less, in convolutions and in products of matrices."""
    if device.type != "cuda":
        yield
        return
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def steps_per_epoch(n: int, batch_size: int, processes: int = 1) -> int:
    """Batches of one epoch; a last one of a single image each is left out, since BatchNorm cannot use it."""
    return n // batch_size + (n % batch_size // processes > 1)


def fit(
    model: nn.Module,
    step: Step,
    images: ImageSet | Callable[[int], ImageSet],
    preprocess: Preprocess,
    recipe: Recipe,
    engine: Engine,
    *,
    name: str = "training",
    progress: Progress | None = None,
    resume_from: Resume | None = None,
    after_epoch: Callable[[int], Mapping[str, float]] | None = None,
    record: bool = False,
    kept: Sequence[Tensor] = (),
) -> float:
    """Train ``model`` in place.

    Args:
        model: The network; left in evaluation mode on the engine's device.
        step: Computes the loss terms of a batch.
        images: The training set, or a function that makes the set of each epoch, all of one size.
        preprocess: Normalisation of what the step sees.
        recipe: Optimisation.
        engine: Device and precision.
        name: What the progress display calls this run.
        progress: Where progress goes.
        resume_from: Where the state is kept; if there is one, training goes on from there. It stays after the last
            epoch, so that nothing is lost until the result is saved: then call its ``done``.
        after_epoch: Called after each epoch; what it returns is shown beside the loss terms.
        record: Whether a GPU may record the step and replay it; see :class:`Updater`.
        kept: What the step changes in place beside the model, which is part of the state.

    Returns:
        Seconds spent in the training steps.

    Raises:
        UsageError: The loss stopped being a number, or there is too little to train on.
        BadInput: The resume file belongs to another run.
    """
    progress = progress or Silent()
    fabric = team.fabric(engine.device, engine.precision)
    generator = torch.Generator(engine.device).manual_seed(recipe.seed)
    place(model, engine.device)
    record = record and fabric.world_size == 1 and engine.device.type == "cuda"
    wrapped, optimiser = fabric.setup(model, sgd(model, recipe, fused=record))
    set_of = images if callable(images) else lambda _: images
    size = len(set_of(0))
    per_epoch = steps_per_epoch(size, recipe.batch_size, fabric.world_size)
    if not per_epoch:
        least = 2 * fabric.world_size
        raise UsageError(f"there is too little to train on: {size} image(s)", f"at least {least} are needed")
    total = recipe.epochs * per_epoch
    identity = {"recipe": asdict(recipe), "images": size, "name": name}
    # a GPU draws other random numbers
    identity |= {"precision": engine.precision, "device": engine.device.type}
    identity["run"] = dict(resume_from.run) if resume_from else {}
    state = resume_from.path if resume_from else None
    begin_epoch = 0
    seconds = 0.0
    extra: Mapping[str, float] = {}
    with (
        seeded(recipe.seed),
        recording(engine.device, record),
        one_batch(model, recipe.batch_size),
        ExitStack() as stack,
    ):
        if state is not None and state.exists():
            begin_epoch, seconds = _restore(state, identity, model, optimiser, generator, kept, engine.device)
            for group in optimiser.param_groups:
                # the state may be of a run on another number of devices
                group["fused"] = record or None
            progress.note(f"resumed {name} after epoch {begin_epoch} of {recipe.epochs}")
        team.agree(begin_epoch, "the state to go on from")
        left = total - begin_epoch * per_epoch
        progress.start(name, left)
        stepped = stack.enter_context(_profiled(engine.profile, left))
        update = Updater(model, step, optimiser, recipe.clip, record=record, forward=wrapped, backward=fabric.backward)
        saved, cost = time.perf_counter(), 0.0
        # what is not looked at between epochs a GPU works through without a halt
        halts = after_epoch is not None or state is not None or fabric.world_size > 1
        meter = _Meter(progress, max(1, min(50, per_epoch // 4)) if halts else None)
        for epoch in range(begin_epoch, recipe.epochs):
            model.train()
            begin = time.perf_counter()
            meter.where, meter.extra = f"{name}, epoch {epoch + 1}", extra
            stream = batches(
                set_of(epoch),
                preprocess,
                batch_size=recipe.batch_size,
                device=engine.device,
                generator=generator,
                augment=recipe.augment,
                shuffle=True,
                share=(fabric.global_rank, fabric.world_size),
            )
            with team.together():
                for number, batch in enumerate(stream):
                    meter.add(update(batch, learning_rate(recipe, epoch * per_epoch + number, total)))
                    stepped()
                if halts or epoch + 1 == recipe.epochs:
                    meter.flush()
                    _check_weights(model, name)
                    synchronise(engine.device)
            seconds += time.perf_counter() - begin
            model.eval()
            if after_epoch is not None:
                extra = after_epoch(epoch)
                progress.advance(0, extra)
            # what is saved is the first one's, so that a run that goes on is the run that was not stopped
            if kept:
                with team.together():
                    team.share(*kept)
            if state is not None and team.rank() == 0:
                now = time.perf_counter()
                if epoch + 1 == recipe.epochs or cost <= max(SAVED_SECONDS, SAVED_SHARE * (now - saved)):
                    _save(state, identity, epoch + 1, seconds, model, optimiser, generator, kept, engine.device)
                    saved = time.perf_counter()
                    cost = saved - now
    model.eval()
    with team.together():
        team.share(*model.buffers())
    return seconds


def _check_weights(model: nn.Module, name: str) -> None:
    """Refuse what the last step ruined, of which no loss was computed."""
    means = (value for at, value in model.named_buffers() if at.endswith(("running_mean", "running_var")))
    if not all(value.isfinite().all() for value in (*model.parameters(), *means)):
        raise UsageError(f"{name}: the weights are no longer numbers", "lower --lr or use --precision fp32")


@contextmanager
def _profiled(path: Path | None, steps: int) -> Iterator[Callable[[], None]]:
    """Trace five steps after the first ten, of a short run the last third, and yield what to call after each step."""
    if path is None or team.rank() > 0:
        yield lambda: None
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]

    def write(trace: profile) -> None:
        files.write(path, lambda part: trace.export_chrome_trace(str(part)))

    part = min(5, steps // 3)
    plan = schedule(wait=part, warmup=part, active=max(1, part), repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as trace:
        yield trace.step


class _Meter:
    """Averages loss terms on the device and reads them rarely, since each read waits for the GPU.

    They are read after ``every`` so many steps, in all processes the same, or once in :data:`READ_SECONDS`.
    """

    def __init__(self, progress: Progress, every: int | None) -> None:
        self.progress, self.where = progress, ""
        self.extra: Mapping[str, float] = {}
        self.every = every
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.read = time.perf_counter()

    def add(self, terms: Mapping[str, Tensor]) -> None:
        for name, term in terms.items():
            value = term.float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1
        due = time.perf_counter() - self.read > READ_SECONDS if self.every is None else self.count == self.every
        if due:
            self.flush()

    def flush(self) -> None:
        if not self.count:
            return
        values = team.averaged(torch.stack(list(self.sums.values())) / self.count)
        means = dict(zip(self.sums, values.tolist(), strict=True))
        if not all(math.isfinite(value) for value in means.values()):
            bad = ", ".join(name for name, value in means.items() if not math.isfinite(value))
            raise UsageError(
                f"{self.where}: the loss term {bad} is no longer a number",
                "lower --lr or use --precision fp32",
            )
        self.progress.advance(self.count, {**means, **self.extra})
        self.sums, self.count, self.read = {}, 0, time.perf_counter()


def _save(
    path: Path,
    identity: dict[str, Any],
    epoch: int,
    seconds: float,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    generator: torch.Generator,
    kept: Sequence[Tensor],
    device: torch.device,
) -> None:
    state = {
        "identity": identity,
        "epoch": epoch,
        "seconds": seconds,
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "generator": generator.get_state(),
        "kept": list(kept),
        "cpu_rng": torch.random.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }
    # torch hides from files.write what the system says of a full disk
    content = io.BytesIO()
    torch.save(state, content)
    files.write(path, content.getvalue(), private=True)


def _restore(
    path: Path,
    identity: dict[str, Any],
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    generator: torch.Generator,
    kept: Sequence[Tensor],
    device: torch.device,
) -> tuple[int, float]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["identity"]
        if other := "; ".join(differences(before, identity)):
            raise BadInput(f"{path} belongs to a run with other settings ({other})", "use those, or delete the file")
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        generator.set_state(state["generator"])
        for tensor, before_it in zip(kept, state["kept"], strict=True):
            tensor.copy_(before_it)
        torch.random.set_rng_state(state["cpu_rng"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], device)
        return int(state["epoch"]), float(state["seconds"])
    except BadInput:
        raise
    except Exception:
        raise BadInput(f"resume file {path} is damaged", "delete it to start over") from None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Settings that are not the same, with both values."""
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new)
        elif old != new:
            yield f"{name} {str(old)[:40]}, not {str(new)[:40]}"


def digest(model: nn.Module) -> str:
    """Hash of a network's weights."""
    hashed = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        # not all files keep this count, which changes nothing
        if name.endswith("num_batches_tracked"):
            continue
        hashed.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()


def unseen_batch(shape: tuple[int, ...]) -> int:
    """Images [C, H, W] of a batch that no gradient is needed of: 500, of more than 64×64 pixels fewer."""
    return max(1, min(500, 500 * 64 * 64 // (shape[1] * shape[2])))


@torch.no_grad()
def predict(
    model: Callable[[Tensor], Tensor],
    images: ImageSet,
    preprocess: Preprocess,
    engine: Engine,
) -> Tensor:
    """Logits [N, C] (float32, on the CPU) of a set in order, without augmentation, of large images in small batches."""
    if isinstance(model, nn.Module):
        model.eval()
    outputs = []
    for batch in batches(images, preprocess, batch_size=unseen_batch(images.shape), device=engine.device):
        with engine.autocast():
            outputs.append(model(batch.x).float())
    return torch.cat(outputs).cpu()


def accuracy(model: Callable[[Tensor], Tensor], images: ImageSet, preprocess: Preprocess, engine: Engine) -> float:
    """Top-1 accuracy of a model in percent, see :func:`predict`."""
    return metrics.top1(predict(model, images, preprocess, engine), images.labels)


def scaled(recipe: Recipe, **changes: Any) -> Recipe:
    """A recipe with some fields replaced; None leaves a field as it is."""
    return replace(recipe, **{name: value for name, value in changes.items() if value is not None})


def environment(engine: Engine) -> dict[str, Any]:
    """Versions and hardware, for reports; nothing that names the machine or its user."""
    import platform

    import torchvision

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu",
        "precision": engine.precision,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
