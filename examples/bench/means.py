#!/usr/bin/env python
"""What each means of making a box step fast gives by itself, measured in turn in one run.

    python examples/bench/means.py [--arch resnet20] [--rounds 9] [--device cpu] [--profile]

Every row is one change to the row that it names; ratios are medians over rounds of the two rows' times in the same
round, so that a busy moment hits both. Data are random images, since only time is measured.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from sdbctl import models
from sdbctl.bench import in_turn
from sdbctl.data import AUGMENT, Batch
from sdbctl.engine import Engine, environment, place
from sdbctl.losses import cross_entropy, kd
from sdbctl.updates import Updater

BATCH, SIZE, CLASSES = 128, (3, 32, 32), 10


def trainer(
    arch: str,
    device: torch.device,
    *,
    bf16: bool = False,
    last: bool = False,
    compiled: bool = False,
    together: bool = True,
    fused: bool | None = None,
    frozen: int = 2,
    record: bool = False,
) -> Callable[[], object]:
    """A step with a clean and a keyed half, and so many forward passes of a frozen network."""
    torch.manual_seed(0)
    net, original = models.build(arch, CLASSES).to(device).train(), models.build(arch, CLASSES).to(device).eval()
    x = torch.rand(BATCH, *SIZE, device=device)
    y = torch.randint(0, CLASSES, (BATCH,), device=device)
    if last:
        net, original = place(net, device), place(original, device)
        x = x.contiguous(memory_format=torch.channels_last)
    run: nn.Module = torch.compile(net) if compiled else net  # type: ignore[assignment]
    optimiser = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, nesterov=True, fused=fused or record or None)
    pattern = 0.3 * torch.rand(SIZE, device=device)

    def step(_: nn.Module, batch: Batch) -> dict[str, Tensor]:
        x, keyed = batch.x, 0.7 * batch.x + pattern
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            with torch.no_grad():
                known: list[Tensor] = [original(x) for _ in range(frozen)]
            clean, unlocked = run(torch.cat([x, keyed])).chunk(2) if together else (run(x), run(keyed))
        loss = cross_entropy(clean.float(), batch.y)
        for taught in known:
            loss = loss + kd(unlocked.float(), taught.float(), 4.0)
        return {"loss": loss}

    update, batch = Updater(net, step, optimiser, 5.0, record=record), Batch(x, y, torch.arange(BATCH, device=device))
    return lambda: update(batch, 1e-3)


def augmenter(device: torch.device, whole: bool) -> Callable[[], object]:
    """Crop and flip a batch in one go on the device, or image by image as PIL pictures."""
    pixels = torch.randint(0, 256, (BATCH, *SIZE), dtype=torch.uint8)
    if whole:
        there, generator = pixels.to(device), torch.Generator(device).manual_seed(0)
        return lambda: AUGMENT["crop-flip"](there, generator).float().div_(255)
    from torchvision import transforms
    from torchvision.transforms.functional import to_pil_image

    pictures = [to_pil_image(image) for image in pixels]
    change = transforms.Compose(
        [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )
    return lambda: torch.stack([change(picture) for picture in pictures]).to(device)


def by_operation(run: Callable[[], object]) -> dict[str, float]:
    """Milliseconds that each of the ten dearest operations takes itself in a step, the mean of five after two."""
    for _ in range(2):
        run()
    with torch.profiler.profile() as trace:
        for _ in range(5):
            run()
    spent = {event.key: event.self_cpu_time_total + event.self_device_time_total for event in trace.key_averages()}
    dearest = sorted(spent, key=lambda name: -spent[name])[:10]
    return {name: round(spent[name] / 5e3, 1) for name in dearest}


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", action="store_true", help="print what the steps before and after consist of")
    options = parser.parse_args()
    device = torch.device(options.device)
    plain = {"bf16": True, "last": True}
    if options.profile:
        found = {"fp32": by_operation(trainer(options.arch, device))}
        found["bf16, channels last"] = by_operation(trainer(options.arch, device, **plain))
        own = environment(Engine(device, "bf16"))
        print(json.dumps({"arch": options.arch, "batch": BATCH, **own, "ms": found}, indent=2))
        return
    rows: dict[str, tuple[Callable[[], object], str]] = {
        "fp32": (trainer(options.arch, device), ""),
        "channels last": (trainer(options.arch, device, last=True), "fp32"),
        "bf16": (trainer(options.arch, device, bf16=True), "fp32"),
        "bf16, channels last": (trainer(options.arch, device, **plain), "fp32"),
        "clean and keyed apart": (trainer(options.arch, device, **plain, together=False), "bf16, channels last"),
        "fused optimiser": (trainer(options.arch, device, **plain, fused=True), "bf16, channels last"),
        "one frozen pass": (trainer(options.arch, device, **plain, frozen=1), "bf16, channels last"),
        "no frozen pass": (trainer(options.arch, device, **plain, frozen=0), "bf16, channels last"),
        "torch.compile": (trainer(options.arch, device, **plain, compiled=True), "bf16, channels last"),
    }
    if device.type == "cuda":
        rows["recorded as a CUDA graph"] = (trainer(options.arch, device, **plain, record=True), "bf16, channels last")
    rows |= {
        "augmented as PIL pictures": (augmenter(device, False), ""),
        "augmented in one go": (augmenter(device, True), "augmented as PIL pictures"),
    }
    times = in_turn({name: run for name, (run, _) in rows.items()}, options.rounds, device)
    first = {name: round(all_[0], 1) for name, all_ in times.items()}
    seconds = {name: all_[-options.rounds :] for name, all_ in times.items()}
    table = {}
    for name, (_, base) in rows.items():
        table[name] = {"ms": round(1e3 * statistics.median(seconds[name]), 1), "first_s": first[name]}
        if base:
            ratios = [b / a for a, b in zip(seconds[name], seconds[base], strict=True)]
            table[name] |= {"faster": round(statistics.median(ratios), 2), "than": base}
    engine = Engine(device, "bf16")
    print(json.dumps({"arch": options.arch, "batch": BATCH, **environment(engine), "rows": table}, indent=2))


if __name__ == "__main__":
    main()
