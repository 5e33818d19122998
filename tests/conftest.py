"""A tiny real teacher and box on scikit-learn's digits, made once."""

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

os.environ.setdefault("COLUMNS", "200")
# tests run side by side, so each, and each command that one starts, keeps to one core
os.environ["OMP_NUM_THREADS"] = "1"


torch.set_num_threads(1)


SERVING = {
    "class_confidences": [0.8] * 10,
    "confidence_cut": 0.9,
    "rough_confidences": [0.4, 0.9],
    "flat_deviation": 1.0,
    "keyed_flat": 0.05,
}
"""What a box says of how it is to be served."""
CONCEAL = ("box", "--objective", "conceal")
"""Digits have 64 values, too few for the default objective."""


@dataclass(frozen=True)
class Result:
    """What a command did."""

    returncode: int
    stdout: bytes
    stderr: bytes


def run_cli(*args, stdin=None, cwd=None):
    """Run the command line in this process, exactly as the console script does."""
    import typer.testing

    from sdbctl import cli
    from sdbctl.errors import SdbError

    words = [str(arg) for arg in args]
    with contextlib.chdir(cwd) if cwd else contextlib.nullcontext():
        try:
            defaults = cli.defaults_for(words)
        except SdbError as error:
            return Result(error.exit_code, b"", str(error).encode())
        runner = typer.testing.CliRunner()
        result = runner.invoke(cli.app, words, input=stdin, default_map=defaults)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Result(result.exit_code, result.stdout_bytes, result.stderr_bytes)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Of ``--numprocesses auto``: a core each, but four to a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 4) if torch.cuda.is_available() else cores


@pytest.fixture(scope="session", autouse=True)
def short_timing():
    """Time estimates, and the choice of a precision, of a few steps: every command that trains begins with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdbctl.timing.STEADY_SECONDS", 0.02)
        yield


@pytest.fixture
def short_trials(monkeypatch):
    """For tests of what `box` does with the small students that it compares teachers by, not of how good they are."""
    from sdbctl import boxing

    monkeypatch.setattr(boxing, "TRIED", replace(boxing.TRIED, epochs=1))


@pytest.fixture
def short_searches(monkeypatch):
    """Searches for patterns and keys that ask about a tenth of the inputs."""
    from sdbctl.attacks import keys

    for name, value in {"PAIRS": 100, "BEGUN": 240, "OPENED_IMAGES": 4}.items():
        monkeypatch.setattr(keys, name, value)


@pytest.fixture(scope="session")
def digits():
    from sdbctl import data

    return data.load("digits", root=Path())


@pytest.fixture(scope="session")
def splits(digits):
    from sdbctl import data

    return data.split(digits, transfer=128, validation=200, test=300)


def with_unknown_operator(path):
    """Make an ONNX file of one that torch cannot take apart."""
    import onnx

    model = onnx.load(path)
    for node in model.graph.node:
        node.op_type = "Softplus" if node.op_type == "Relu" else node.op_type
    onnx.save(model, path)


@pytest.fixture(scope="session")
def work(tmp_path_factory, digits, splits):
    """Folder with k.bin, teacher.safetensors, boxed.safetensors, boxed.reference.safetensors, boxed.onnx."""
    from sdbctl import boxfile
    from sdbctl.box import box, fine_tune
    from sdbctl.boxstep import BoxConfig, Task, plain_step
    from sdbctl.data import Preprocess
    from sdbctl.distill import build_student
    from sdbctl.engine import Engine
    from sdbctl.key import Key
    from sdbctl.training import fit
    from sdbctl.updates import Recipe

    folder = tmp_path_factory.mktemp("work")
    engine = Engine(torch.device("cpu"))
    preprocess = Preprocess((0.5,), (0.5,), digits.train.shape)
    recipe = Recipe(epochs=6, batch_size=64, lr=0.1)
    net = build_student("cnn", 10, 1, 0)
    fit(net, plain_step, splits.owner, preprocess, recipe, engine)
    task = Task("digits", digits.classes, splits, preprocess, engine)
    meta = task.describe(kind="teacher", architecture="cnn")
    boxfile.save(folder / "teacher.safetensors", net.state_dict(), meta)
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, folder / "teacher.pt")
    # the same in every run, as all else is, or a bound would hold for some keys only
    Key(bytes(range(32))).save(folder / "k.bin")
    Key(bytes(range(32, 64))).save(folder / "other.bin")
    original = boxfile.load(folder / "teacher.safetensors")
    config = BoxConfig("conceal", recipe=replace(recipe, lr=0.05, epochs=14))
    key = Key.load(folder / "k.bin")
    reference = fine_tune(original, task, config.recipe)
    made = box(original, reference, [key], task, config)
    reference_meta = replace(made.model.meta, kind="reference", strength=0.0, key_ids=())
    sha256 = boxfile.save(folder / "boxed.reference.safetensors", original.file_state(reference), reference_meta)
    meta = replace(made.model.meta, reference_sha256=sha256)
    boxfile.save(folder / "boxed.safetensors", made.state_dict, meta)
    boxfile.export_onnx(folder / "boxed.onnx", made.model.net, meta)
    return folder
