"""How time and memory of boxing and of students grow: measured, against what ``--dry-run`` announces.

    python examples/bench/cost.py [--json]

Every point runs in a fresh process on noise images, since neither time nor memory depends on what is learned. One
thing is varied at a time around a base point: images, epochs, classes, the size of the network.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Point:
    """One box run."""

    arch: str = "resnet8"
    images: int = 2048
    epochs: int = 2
    classes: int = 10


BASE = Point()
VARIED = ("images", "epochs")
GRID = (
    BASE,
    replace(BASE, images=4096),
    replace(BASE, images=8192),
    replace(BASE, epochs=4),
    replace(BASE, classes=100),
    replace(BASE, classes=1000),
    replace(BASE, arch="resnet20"),
    replace(BASE, arch="wrn-16-2"),
)


def measure(point: Point) -> dict[str, float]:
    """Box once in this process: announced and measured seconds, and peak MiB."""
    import torch

    from sdbctl import models
    from sdbctl.box import box, estimate, fine_tune
    from sdbctl.boxfile import Loaded
    from sdbctl.boxstep import BoxConfig, Task
    from sdbctl.data import ImageSet, Preprocess, Splits
    from sdbctl.engine import peak_memory, place
    from sdbctl.key import Key
    from sdbctl.timing import pick_engine
    from sdbctl.updates import Recipe

    generator = torch.Generator().manual_seed(0)

    def noise(count: int) -> ImageSet:
        pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return ImageSet.of(pixels, torch.arange(count) % point.classes)

    few = noise(256)
    splits = Splits(noise(point.images), few, few, few, 0, "noise")
    preprocess = Preprocess((0.5,) * 3, (0.5,) * 3, (3, 32, 32))
    net = models.build(point.arch, point.classes, 3)
    engine, _ = pick_engine("auto", "auto", net, torch.zeros(128, 3, 32, 32))
    net = place(net, engine.device)
    names = tuple(str(number) for number in range(point.classes))
    task = Task("noise", names, splits, preprocess, engine)
    config = BoxConfig("conceal", teacher="original", recipe=Recipe(epochs=point.epochs))
    announced = estimate(config, net, preprocess, point.images, engine)
    keys = {name: name for name in net.state_dict()}
    original = Loaded(net, keys, {}, None, point.arch, point.classes, 3, "")
    begin = time.perf_counter()
    reference = fine_tune(original, task, config.recipe)
    middle = time.perf_counter()
    box(original, reference, [Key.generate()], task, config)
    return {
        "reference_announced_s": round(announced["reference"], 1),
        "reference_s": round(middle - begin, 1),
        "box_announced_s": round(announced["box"], 1),
        "box_s": round(time.perf_counter() - middle, 1),
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "peak_mib": round(peak_memory() / 2**20, 1),
    }


def fit(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Seconds = per_image · images · epochs + fixed, over the points that differ from the base in nothing else."""
    import numpy as np

    plain = [r for r in results if all(r[name] == value for name, value in asdict(BASE).items() if name not in VARIED)]
    shown = np.array([r["images"] * r["epochs"] for r in plain])
    found = {}
    for name in ("reference_s", "box_s"):
        seconds = np.array([r[name] for r in plain])
        slope, fixed = np.polyfit(shown, seconds, 1)
        left = ((seconds - slope * shown - fixed) ** 2).sum() / ((seconds - seconds.mean()) ** 2).sum()
        found[name] = {
            "ms_per_image": round(1e3 * slope, 3),
            "fixed_s": round(fixed, 1),
            "explained": round(1 - left, 3),
            "points": len(plain),
        }
    return found


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description="Time and memory of boxing, against what is announced.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point:
        print(json.dumps(measure(Point(**json.loads(given.point)))))
        return
    results = []
    for point in GRID:
        command = [sys.executable, __file__, "--point", json.dumps(asdict(point))]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        results.append({**asdict(point), **json.loads(done.stdout.splitlines()[-1])})
        print(results[-1], file=sys.stderr)
    if given.json:
        import torch

        where = {"torch": torch.__version__, "cores": os.cpu_count(), "cuda": torch.cuda.is_available()}
        print(json.dumps({**where, "fit": fit(results), "points": results}, indent=2))


if __name__ == "__main__":
    main()
