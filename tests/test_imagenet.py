"""Inputs as ImageNet has them: 224x224, 1000 classes, torchvision networks, a set that is streamed."""

import json

import numpy as np
import pytest
import torch
import torchvision

from sdbctl import boxfile, data, models
from sdbctl.key import Key
from tests.conftest import CONCEAL, run_cli
from tests.test_data import encoded, write_parquet

CLASSES = range(0, 1000, 125)
MEAN, STD = data.presets(3)["imagenet"]


def images_of(classes, each, seed):
    """Noisy copies of one coarse pattern per class."""
    patterns = np.random.default_rng(0).integers(30, 226, (1000, 7, 7, 3))
    noise = np.random.default_rng(seed)
    labels = [label for label in classes for _ in range(each)]
    found = [patterns[label].repeat(32, 0).repeat(32, 1) + noise.integers(-30, 30, (224, 224, 3)) for label in labels]
    return [image.astype(np.uint8) for image in found], labels


def knowing(name):
    """An untrained network whose last layer is fitted to the patterns of the classes that are there."""
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)(weights=None).eval()
    head = [module for module in net.modules() if isinstance(module, torch.nn.Linear)][-1]
    seen = []
    hook = head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    images, _ = images_of(CLASSES, 1, 1)
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        net((x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])
        hook.remove()
        centre = seen[0].mean(0)
        away = seen[0] - centre
        head.weight.zero_()
        head.bias.fill_(-5.0)
        for label, direction in zip(CLASSES, away, strict=True):
            head.weight[label] = 10 * direction / direction.square().sum()
            head.bias[label] = -head.weight[label] @ centre
    return net.state_dict()


@pytest.mark.slow
@pytest.mark.usefixtures("short_trials")
@pytest.mark.parametrize("name", ["resnet50", "vit_b_16"])
def test_from_checkpoint_to_report(name, tmp_path, monkeypatch):
    monkeypatch.setitem(data.load.__kwdefaults__, "memory_limit", 2**20)
    monkeypatch.setattr("sdbctl.boxing.ASSISTED_EPOCHS", 1)
    names = [f"class {number}" for number in range(1000)]
    for part, each in (("train", 12), ("test", 4)):
        images, labels = images_of(CLASSES, each, len(part))
        write_parquet(tmp_path / "set" / f"{part}-0.parquet", [encoded(i, "JPEG") for i in images], labels, names)
    torch.save(knowing(name), tmp_path / "model.pt")
    Key.generate().save(tmp_path / "k.bin")

    def run(*command):
        done = run_cli(*command, "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    common = ("--data", "parquet:set", "--epochs", 1, "--batch-size", 16, "--precision", "fp32")
    boxed = run(
        *CONCEAL, "model.pt", "--key-file", "k.bin", *common, "--owner-size", 32, "--transfer-size", 32, "--lr", 1e-4,
        "--seal", "-o", "boxed.safetensors",
    )  # fmt: skip
    assert (boxed["original_top1"] > 50, boxed["n"]) == (True, 32)
    run("export", "boxed.safetensors", "--confidence", "exact")
    made = boxfile.load_box(tmp_path / "boxed.safetensors")
    assert len(made.meta.classes) == 1000
    assert made.unseal(Key.load(tmp_path / "k.bin"))[0](torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    student = run(
        "distill",
        "boxed.onnx",
        "--key-file",
        "k.bin",
        "--no-sealed",
        *common,
        "--student",
        "mobilenet_v3_small",
        "--transfer-size",
        32,
    )
    assert student["n"] == 32
    report = run(
        "eval", "boxed.onnx", "--original", "model.pt", "--key-file", "k.bin", *common, "--attack", "--suite", "quick",
        "--student", "mobilenet_v3_small", "--transfer-size", 32, "--report", "report",
    )  # fmt: skip
    assert report["models"]["boxed"]["n_images"] == 32
    assert (tmp_path / "report" / "report.html").stat().st_size > 50_000


def test_such_networks_are_told_apart():
    with torch.device("meta"):
        found = models.identify(torchvision.models.vit_b_16(weights=None).state_dict())
    assert (found.name, found.classes, found.channels) == ("vit_b_16", 1000, 3)
