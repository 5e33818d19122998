"""How fast this machine boxes and distils, beside the physical floor of each step, and how long evaluations take."""

from __future__ import annotations

import copy
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sdbctl import boxfile, models
from sdbctl.attacks import ATTACKS
from sdbctl.attacks.kd import soft_labels
from sdbctl.boxfile import Metadata
from sdbctl.boxstep import BoxConfig, BoxStep, Task, plain_step
from sdbctl.cells import Bench, Source
from sdbctl.data import Batch, ImageSet, Preprocess, Shape, Splits
from sdbctl.data.images import cores
from sdbctl.distill import build_student
from sdbctl.engine import Engine, place, synchronise
from sdbctl.gate import KeyGate, patterns
from sdbctl.inference import unseen_batch
from sdbctl.key import Key
from sdbctl.objectives import LOSSES
from sdbctl.protocol import Plan
from sdbctl.teacher import OnnxTeacher, Oracle, Teacher, TorchTeacher
from sdbctl.timing import image_seconds
from sdbctl.updates import WARM_STEPS, Recipe, Step, Updater, recording, sgd
from sdbctl.workers import as_worker
from sdbctl.wrappers import Concealed


@dataclass(frozen=True)
class Timing:
    """One measured step.

    Attributes:
        name: What was timed.
        images_per_second: Median rate.
        ratio: Its time over that of its floor, or of what ``against`` names; None for what is compared with.
        against: What the ratio compares with.
    """

    name: str
    images_per_second: float
    ratio: float | None = None
    against: str = ""


def measure(
    arch: str,
    student: str,
    shape: tuple[int, int, int],
    classes: int,
    batch_size: int,
    engine: Engine,
    rounds: int = 7,
) -> list[Timing]:
    """Time steps in turn, round after round, so that a drifting machine speed hits all alike.

    Args:
        arch: Network to box.
        student: Student to distil.
        shape: Images (C, H, W).
        classes: Number of classes.
        batch_size: Images per step.
        engine: Device and precision.
        rounds: How often each is timed; the median counts.
    """
    net = models.build(arch, classes, shape[0])
    preprocess = Preprocess((0.5,) * shape[0], (0.5,) * shape[0], shape)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, *shape, generator=generator).to(engine.device, memory_format=torch.channels_last)
    y = torch.randint(0, classes, (batch_size,), generator=generator).to(engine.device)
    batch = Batch(x, y, torch.arange(batch_size, device=engine.device))
    key = Key.generate()
    black = torch.zeros(batch_size, *shape, dtype=torch.uint8)
    none = ImageSet.of(black, torch.zeros(batch_size, dtype=torch.int64))
    names = tuple(map(str, range(classes)))
    task = Task("bench", names, Splits(none, none, none, none, 0, ""), preprocess, engine)
    runs: dict[str, Callable[[], object]] = {"train": _trainer(net, plain_step, batch, engine)}
    floors: dict[str, float] = {}
    for name in LOSSES:
        config = BoxConfig(name)
        trainable, frozen = config.trainable_and_frozen()
        floors[f"box {name}"] = (3 * trainable + frozen) / 3
        runs[f"box {name}"] = _trainer(net, BoxStep(net, net, net, [key], task, config), batch, engine)
    with tempfile.TemporaryDirectory() as folder:
        meta = Metadata("teacher", arch, names, preprocess)
        as_served = Concealed(net, preprocess, 1.0, torch.full((2, classes), 0.9), 0.1, "class")
        helpers = [models.build(student, classes, shape[0]) for _ in range(2)]
        checked = KeyGate(as_served, [net, *helpers], patterns([key], shape, 3), 0.7, preprocess)
        graphs = {"ONNX": net, "boxed ONNX": as_served, "boxed ONNX with a key": checked}
        onnx = {}
        for name, shown in graphs.items():
            boxfile.export_onnx(path := Path(folder) / "teacher.onnx", shown, meta, force=True)
            onnx[name] = OnnxTeacher(path, engine.device)
    exact = Engine(engine.device)
    teachers: dict[str, Teacher] = {
        "torch": TorchTeacher(net, classes, engine),
        "torch, fp32": TorchTeacher(net, classes, exact),
    }
    if onnx["ONNX"].device.type == engine.device.type:
        teachers |= onnx
    pupil = models.build(student, classes, shape[0])
    runs["train student"] = _trainer(pupil, plain_step, batch, engine, record=False)
    for name, teacher in teachers.items():
        runs[f"predict {name}"] = functools.partial(teacher.logits, x)
        runs[f"distill {name}"] = _trainer(pupil, _kd_step(teacher), batch, engine, record=False)
    seconds = {name: times[-rounds:] for name, times in in_turn(runs, rounds, engine.device).items()}
    median = {name: statistics.median(values) for name, values in seconds.items()}

    def timing(name: str, against: str = "", *others: str, scale: float = 1.0) -> Timing:
        floors = [scale * sum(seconds[other][i] for other in others) for i in range(rounds)]
        ratio = statistics.median(a / b for a, b in zip(seconds[name], floors, strict=True)) if others else None
        return Timing(name, batch_size / median[name], ratio, against)

    timings = [timing("train"), timing("train student")]
    for name, floor in floors.items():
        timings.append(timing(name, f"floor of {floor:.2f} training steps", "train", scale=floor))
    alike = {"ONNX": "torch, fp32", "boxed ONNX": "ONNX", "boxed ONNX with a key": "ONNX"}
    for name in teachers:
        other = [f"predict {alike[name]}"] if name in alike else []
        timings.append(timing(f"predict {name}", "".join(other), *other))
    for name in teachers:
        parts = ("train student", f"predict {name}")
        timings.append(timing(f"distill {name}", "floor of both its parts", *parts))
    return timings


def in_turn(runs: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each of some steps, run in turn, so that a busy moment hits all: some to warm up, then ``rounds``."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with recording(device, True) as recorded:
        for _ in range((WARM_STEPS + 1 if recorded else 1) + rounds):
            for name, run in runs.items():
                synchronise(device)
                begin = time.perf_counter()
                run()
                synchronise(device)
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def evaluation_seconds(bench: Bench, planned: Plan) -> float:
    """Seconds that the students of an evaluation will take, by a step of each kind and an answer of the box."""
    engine, config, shape, boxed = bench.engine, bench.config, bench.transfer.shape, bench.sources["boxed"]
    cpu = engine.device.type == "cpu"
    with as_worker(config.jobs if cpu and not config.cluster else 1):
        net = build_student(config.student, bench.classes, shape[0], 0)
        one = image_seconds(net, config.recipe.batch_size, len(bench.transfer), shape, engine)
        told, own = _answer_seconds(boxed, shape, engine, bench.classes), 0.0
        if boxed.weights is not None and planned.tuned:
            own = image_seconds(copy.deepcopy(boxed.weights), 64, len(bench.transfer), shape, engine)
    # who holds the file trains it, or asks it several times
    work = planned.runs * one + (planned.teachers + 4 * planned.held) * told
    images = len(bench.transfer) * config.recipe.epochs
    # each is looked at, too, which takes a third of a step
    seen = planned.students * len(bench.validation) + planned.reported * len(bench.test)
    # processes that share a GPU are hardly faster together
    jobs = config.jobs
    at_once = jobs if config.cluster else min(jobs, cores()) if cpu else max(1, min(jobs, 2) * 0.8)
    return (work * images + seen * one / 3 + planned.tuned * own) / at_once


def _answer_seconds(source: Source, shape: Shape, engine: Engine, classes: int) -> float:
    """Seconds of a teacher's answer to one image [C, H, W]: the last of some batches."""
    teacher, x = source.open(engine.device, classes), torch.zeros(unseen_batch(shape), *shape, device=engine.device)
    return in_turn({"answer": lambda: teacher.logits(x)}, 1, engine.device)["answer"][-1] / len(x)


class Cast(nn.Module):
    """A network that computes in the engine's precision, as Fabric's wrapper makes it."""

    def __init__(self, net: nn.Module, engine: Engine) -> None:
        super().__init__()
        self.net, self.engine = net, engine

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] → logits, float32."""
        with self.engine.autocast():
            return self.net(x).float()  # type: ignore[no-any-return]


def _trainer(net: nn.Module, step: Step, batch: Batch, engine: Engine, *, record: bool = True) -> Callable[[], object]:
    net = place(copy.deepcopy(net), engine.device).train()
    record = record and engine.device.type == "cuda"
    optimiser = sgd(net, Recipe(), fused=record)
    update = Updater(net, step, optimiser, 5.0, record=record, forward=Cast(net, engine).train())
    return lambda: update(batch, 1e-3)


def _kd_step(teacher: Teacher) -> Step:
    attack = ATTACKS["kd"]
    oracle = Oracle(teacher, attack.access)
    return lambda model, batch: {"loss": soft_labels(model(batch.x), oracle(batch.x), batch.y, attack.grid[0])}
