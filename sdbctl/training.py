"""The one fit() loop. Whoever trains something differs only in the step function it passes."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from sdbctl import files, team
from sdbctl.batchnorm import one_batch
from sdbctl.data import ImageSet, Preprocess, batches
from sdbctl.engine import Engine, place, seeded, synchronise
from sdbctl.errors import UsageError
from sdbctl.state import Resume, State
from sdbctl.updates import Recipe, Step, Updater, learning_rate, recording, sgd

READ_SECONDS = 0.3
"""How often the loss terms of a student are read, which waits for a GPU."""


class Progress(Protocol):
    """What a long run reports to; the CLI draws it, the default ignores it."""

    def start(self, name: str, steps: int, work: float | None = None) -> None:
        """A run of ``steps`` steps begins, which are ``work`` in all, in any unit, if some take longer than others."""

    def advance(self, steps: int, metrics: Mapping[str, float], work: float | None = None) -> None:
        """Some steps are done, which were so much of the work; ``metrics`` are means over them."""

    def note(self, text: str) -> None:
        """Something worth a line."""


class Silent:
    """Progress that nobody watches."""

    def start(self, name: str, steps: int, work: float | None = None) -> None:
        """Ignore."""

    def advance(self, steps: int, metrics: Mapping[str, float], work: float | None = None) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""


@dataclass(frozen=True)
class Named:
    """Progress that calls every run what it is for.

    Attributes:
        progress: Where it goes.
        name: What runs are called.
    """

    progress: Progress
    name: str

    def start(self, name: str, steps: int, work: float | None = None) -> None:
        """See :class:`Progress`."""
        self.progress.start(self.name, steps, work)

    def advance(self, steps: int, metrics: Mapping[str, float], work: float | None = None) -> None:
        """See :class:`Progress`."""
        self.progress.advance(steps, metrics, work)

    def note(self, text: str) -> None:
        """See :class:`Progress`."""
        self.progress.note(text)


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
    state = None
    if resume_from is not None:
        state = State(resume_from.path, identity, model, optimiser, generator, kept, engine.device)
    begin_epoch = 0
    seconds = 0.0
    extra: Mapping[str, float] = {}
    with (
        seeded(recipe.seed),
        recording(engine.device, record),
        one_batch(model, recipe.batch_size),
        ExitStack() as stack,
    ):
        if state is not None and state.path.exists():
            begin_epoch, seconds = state.restore()
            for group in optimiser.param_groups:
                # the state may be of a run on another number of devices
                group["fused"] = record or None
            progress.note(f"resumed {name} after epoch {begin_epoch} of {recipe.epochs}")
        team.agree(begin_epoch, "the state to go on from")
        left = total - begin_epoch * per_epoch
        progress.start(name, left)
        stepped = stack.enter_context(_profiled(engine.profile, left))
        update = Updater(model, step, optimiser, recipe.clip, record=record, forward=wrapped, backward=fabric.backward)
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
                state.save(epoch + 1, seconds, last=epoch + 1 == recipe.epochs)
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


def digest(model: nn.Module) -> str:
    """Hash of a network's weights."""
    hashed = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        # not all files keep this count, which changes nothing
        if name.endswith("num_batches_tracked"):
            continue
        hashed.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()
