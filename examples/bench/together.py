#!/usr/bin/env python
"""Which way to train the many small students of an evaluation on one device: images per second of all together.

    python examples/bench/together.py [--student resnet8] [--students 8] [--seconds 3] [--device cpu]

Ways: one student after another, launched step by step or, on a GPU, recorded as a CUDA graph; recorded on streams of
their own, launched in turn by one process; in processes of their own; stacked with torch.func.vmap, all in one step.
Every student distils known answers; data are random, since only time is measured.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from sdbctl import models
from sdbctl.bench import Cast
from sdbctl.data import Batch
from sdbctl.engine import Engine, environment, place, synchronise
from sdbctl.losses import kd
from sdbctl.timing import pick_engine
from sdbctl.updates import WARM_STEPS, Recipe, Updater, recording, sgd

CLASSES, SIZE = 10, (3, 32, 32)


def batch_of(count: int, device: torch.device) -> tuple[Batch, Tensor]:
    """Random images and answers."""
    x = torch.rand(count, *SIZE, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, CLASSES, (count,), device=device)
    return Batch(x, y, torch.arange(count, device=device)), torch.randn(count, CLASSES, device=device)


def alone(student: str, count: int, engine: Engine, record: bool) -> Callable[[], object]:
    """A step of one student."""
    net = place(models.build(student, CLASSES), engine.device).train()
    batch, answers = batch_of(count, engine.device)
    optimiser = sgd(net, Recipe(), fused=record)

    def step(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"loss": kd(model(batch.x), answers[batch.index], 4.0)}

    update = Updater(net, step, optimiser, 5.0, record=record, forward=Cast(net, engine))
    return lambda: update(batch, 0.1)


def in_turn(student: str, students: int, count: int, engine: Engine) -> Callable[[], object]:
    """A step of every student, each recorded on a stream of its own, so that the GPU may take several at once."""
    lanes = []
    for _ in range(students):
        with recording(engine.device, True):
            run = alone(student, count, engine, True)
            for _ in range(WARM_STEPS + 2):
                run()
            lanes.append((torch.cuda.current_stream(engine.device), run))
    synchronise(engine.device)

    def step() -> None:
        for stream, run in lanes:
            with torch.cuda.stream(stream):
                run()

    return step


def stacked(student: str, students: int, count: int, engine: Engine) -> Callable[[], object]:
    """A step of all students at once, each on its own images: vmap has neither autocast nor channels last."""
    nets = [models.build(student, CLASSES).to(engine.device).train() for _ in range(students)]
    for net in nets:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats, module.running_mean, module.running_var = False, None, None
                module.num_batches_tracked = None
    parameters, buffers = stack_module_state(nets)
    batches = [batch_of(count, engine.device) for _ in nets]
    x = torch.stack([batch.x.contiguous() for batch, _ in batches])
    answers = torch.stack([told for _, told in batches])
    speeds = {name: torch.zeros_like(value) for name, value in parameters.items()}

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, answers: Tensor) -> Tensor:
        return kd(functional_call(nets[0], (parameters, buffers), (x,)), answers, 4.0)

    slopes = vmap(grad(loss))

    @torch.no_grad()
    def run() -> None:
        found = slopes(parameters, buffers, x, answers)
        names = list(parameters)
        torch._foreach_mul_([speeds[name] for name in names], 0.9)
        torch._foreach_add_([speeds[name] for name in names], [found[name] for name in names])
        torch._foreach_add_([parameters[name] for name in names], [speeds[name] for name in names], alpha=-0.1)

    return run


def rate(run: Callable[[], object], images: int, seconds: float, device: torch.device) -> float:
    """Images per second of a step over so many images."""
    for _ in range(WARM_STEPS + 2):
        run()
    synchronise(device)
    done, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        run()
        done += 1
        if done % 10 == 0:
            synchronise(device)
    synchronise(device)
    return done * images / (time.perf_counter() - begin)


def one_process(
    student: str, count: int, engine: Engine, seconds: float, barrier: object, rates: "multiprocessing.Queue[float]"
) -> None:
    """A process that trains students of its own, at the same time as the others."""
    torch.set_num_threads(1)
    with recording(engine.device, True) as recorded:
        run = alone(student, count, engine, recorded)
        for _ in range(WARM_STEPS + 2):
            run()
        synchronise(engine.device)
        barrier.wait()  # type: ignore[attr-defined]
        rates.put(rate(run, count, seconds, engine.device))


def processes(student: str, number: int, count: int, engine: Engine, seconds: float) -> float:
    """Images per second of so many processes together."""
    context = multiprocessing.get_context("spawn")
    barrier, rates = context.Barrier(number), context.Queue()
    workers = [
        context.Process(target=one_process, args=(student, count, engine, seconds, barrier, rates))
        for _ in range(number)
    ]
    for worker in workers:
        worker.start()
    total = sum(rates.get(timeout=60 + 10 * seconds) for _ in workers)
    for worker in workers:
        worker.join()
    return total


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--students", type=int, default=8)
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device, size = torch.device(options.device), options.batch_size
    example = torch.zeros(size, *SIZE)
    engine, _ = pick_engine(options.device, "auto", models.build(options.student, CLASSES), example)
    found = {}
    with recording(device, True) as recorded:
        found["one after another"] = rate(alone(options.student, size, engine, False), size, options.seconds, device)
        if recorded:
            run = alone(options.student, size, engine, True)
            found["one after another, recorded"] = rate(run, size, options.seconds, device)
            for number in (2, options.students):
                run = in_turn(options.student, number, size, engine)
                found[f"{number} streams"] = rate(run, size * number, options.seconds, device)
        run = stacked(options.student, options.students, size, engine)
        found[f"{options.students} stacked"] = rate(run, size * options.students, options.seconds, device)
    for number in options.processes:
        found[f"{number} processes"] = processes(options.student, number, size, engine, options.seconds)
        print(found, file=sys.stderr, flush=True)
    rates = {name: round(value) for name, value in found.items()}
    print(json.dumps({"student": options.student, "batch": size, "images_per_second": rates, **environment(engine)}))


if __name__ == "__main__":
    main()
