#!/usr/bin/env python
"""Images per second of the whole training loop, data included: recorded as a CUDA graph, and launched step by step.

    python examples/bench/loop.py [--arch resnet18_cifar resnet20 resnet8] [--images 20000] [--device cpu]

Each is the second of two epochs on random images. On a CPU nothing is recorded, and only one row a network is printed.
"""

import argparse
import json

import torch

from sdbctl import models
from sdbctl.boxstep import BoxConfig, BoxStep, Task, plain_step
from sdbctl.data import ImageSet, Preprocess, Splits
from sdbctl.engine import Engine, environment
from sdbctl.key import Key
from sdbctl.training import fit
from sdbctl.updates import Recipe, Step

SIZE = (3, 32, 32)


def rate(arch: str, images: ImageSet, precision: str, record: bool, batch_size: int, device: torch.device, box: bool):
    """Images per second of plain training or of boxing with conceal."""
    preprocess, engine = Preprocess((0.5,) * 3, (0.25,) * 3, SIZE), Engine(device, precision)
    net, recipe = models.build(arch, 10, 3), Recipe(epochs=1, batch_size=batch_size, lr=0.01)
    step: Step = plain_step
    if box:
        reference, splits = models.build(arch, 10, 3), Splits(images, images, images, images, 0, "")
        task = Task("cifar10", tuple(map(str, range(10))), splits, preprocess, engine)
        step = BoxStep(reference, reference, None, [Key.generate()], task, BoxConfig("conceal"))
    for _ in range(2):
        seconds = fit(net, step, images, preprocess, recipe, engine, record=record)
    return round(len(images) / seconds)


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="+", default=["resnet18_cifar", "resnet20", "resnet8"])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device, generator = torch.device(options.device), torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (options.images, *SIZE), generator=generator, dtype=torch.uint8)
    images = ImageSet.of(pixels, torch.randint(0, 10, (options.images,), generator=generator), "cifar10")
    ways = [True, False] if device.type == "cuda" else [False]
    rows = []
    for arch in options.arch:
        for precision in ("bf16", "fp32"):
            for record in ways:
                found = rate(arch, images, precision, record, 128, device, False)
                rows.append({"arch": arch, "step": "train", "precision": precision, "batch": 128, "recorded": record,
                             "images_per_second": found})  # fmt: skip
    for size, precision in ((128, "bf16"), (256, "bf16"), (128, "fp32")):
        found = rate(options.arch[0], images, precision, ways[0], size, device, True)
        rows.append({"arch": options.arch[0], "step": "box conceal", "precision": precision, "batch": size,
                     "recorded": ways[0], "images_per_second": found})  # fmt: skip
    known = {name: value for name, value in environment(Engine(device)).items() if name != "precision"}
    print(json.dumps({"rows": rows, **known}, indent=1))


if __name__ == "__main__":
    main()
