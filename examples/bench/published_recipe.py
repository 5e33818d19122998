#!/usr/bin/env python
"""Images per second of boxing: the published recipe's way against sdbctl's, the same losses, in one run.

    python examples/bench/published_recipe.py [--arch resnet20] [--seconds 20] [--device cpu]

The published way is what the papers' scripts do: PIL images through torchvision transforms in a DataLoader with
four workers, fp32, NCHW, deterministic kernels, clean and keyed images in two forward passes. Ours is
``sdbctl box --objective sdb``. Data are random images, since only time is measured.
"""

import argparse
import itertools
import json
import statistics
import time
import warnings

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from sdbctl import models
from sdbctl.bench import Cast
from sdbctl.boxstep import BoxConfig, BoxStep, Task
from sdbctl.data import ImageSet, Preprocess, Splits, batches
from sdbctl.engine import environment, place, synchronise
from sdbctl.key import Key
from sdbctl.losses import cross_entropy
from sdbctl.objectives.sdb import SdbParameters, augmentation, disturbance, preservation
from sdbctl.timing import pick_engine
from sdbctl.updates import Recipe, Updater, recording, sgd

BATCH, SIZE = 128, (3, 32, 32)
STRENGTH = 0.7


class Pictures(Dataset):
    """PIL images, cropped, mirrored and normalised one by one."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        self.images = [Image.fromarray(image) for image in pixels]
        self.labels = labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.5,) * 3, (0.25,) * 3),
            ]
        )

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """One augmented image and its label."""
        return self.transform(self.images[index]), int(self.labels[index])


def published(arch: str, pixels: np.ndarray, labels: np.ndarray, pattern: torch.Tensor, device: torch.device):
    """Yield after each step of the published way."""
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    nets = [models.build(arch, 10, 3).to(device) for _ in range(3)]
    net, original, random = nets
    net.train()
    original.eval()
    random.eval()
    optimiser, p = sgd(net, Recipe(lr=0.01), fused=False), SdbParameters()
    loader = DataLoader(Pictures(pixels, labels), batch_size=BATCH, shuffle=True, num_workers=4, drop_last=True)
    pattern = pattern.to(device)
    while True:
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            keyed = STRENGTH * x + (1 - STRENGTH) * pattern
            clean, unlocked = net(x), net(keyed)
            with torch.no_grad():
                taught, other = original(x), random(keyed)
            loss = (
                cross_entropy(clean, y)
                - p.omega * disturbance(clean, taught, unlocked, p.temperature, p.limit)
                + preservation(unlocked, taught, y, p.temperature)
                + p.eta * augmentation(unlocked, taught, other, p.away, p.limit)
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            yield


def ours(arch: str, pixels: np.ndarray, labels: np.ndarray, key: Key, device: torch.device):
    """Yield after each step of ``sdbctl box --objective sdb``; the first value is the engine."""
    net = models.build(arch, 10, 3)
    engine, _ = pick_engine(str(device), "auto", net, torch.zeros(BATCH, *SIZE))
    yield engine
    images = ImageSet.of(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels), "cifar10")
    preprocess = Preprocess((0.5,) * 3, (0.25,) * 3, SIZE)
    task = Task(
        "cifar10", tuple(map(str, range(10))), Splits(images, images, images, images, 0, ""), preprocess, engine
    )
    config = BoxConfig("sdb", strength=STRENGTH, wrong_share=0.0)
    original = models.build(arch, 10, 3)
    step = BoxStep(original, original, models.build(arch, 10, 3), [key], task, config)
    place(net, engine.device).train()
    record = device.type == "cuda"
    generator = torch.Generator(engine.device).manual_seed(0)
    optimiser = sgd(net, Recipe(lr=0.01), fused=record)
    update = Updater(net, step, optimiser, 5.0, record=record, forward=Cast(net, engine))

    while True:
        for batch in batches(
            images, preprocess, batch_size=BATCH, device=engine.device, generator=generator, augment=None, shuffle=True
        ):
            update(batch, 0.01)
            yield


def kernels(way: str, device: torch.device):
    """Where each way runs: deterministic kernels, as the papers set, or what sdbctl takes."""
    if way == "ours":
        return recording(device, True)
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True)


def rate(steps, seconds: float, device: torch.device) -> float:
    """Images per second over so many seconds, after what is there has warmed up."""
    done, begin = 0, time.perf_counter()
    for _ in steps:
        done += 1
        if done % 10 == 0 or device.type == "cpu":
            # a GPU has done what it was told only then
            synchronise(device)
            if time.perf_counter() - begin > seconds:
                break
    return done * BATCH / (time.perf_counter() - begin)


def main() -> None:
    """Measure in turns, so that a busy moment hits both, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (20_000, 32, 32, 3), dtype=np.uint8)
    labels = random.integers(0, 10, 20_000)
    key = Key.generate()
    fast = ours(options.arch, pixels, labels, key, device)
    engine = next(fast)
    slow = published(options.arch, pixels, labels, key.pattern(SIZE), device)
    ways = {"published": slow, "ours": fast}
    for way, steps in ways.items():
        with kernels(way, device):
            for _ in itertools.islice(steps, 10 if device.type == "cuda" else 3):
                pass
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, steps in ways.items():
            with kernels(way, device):
                rates[way].append(rate(steps, options.seconds, device))
    medians = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    ratio = round(medians["ours"] / medians["published"], 2)
    print(json.dumps({"arch": options.arch, "images_per_second": medians, "ratio": ratio, **environment(engine)}))


if __name__ == "__main__":
    main()
