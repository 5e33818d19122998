"""The whole pipeline on scikit-learn's digits: small, offline, and real.

Transfer set, student and epochs were chosen on validation data, of 8x8 pixels then, by looking at the floor and at
distillation from the original (``examples/results/demo-choice.md``); 64 transfer images, where there is most to
protect, were given up for 96 after one run with a box, whose students of one row differed too much
(``examples/results/objectives.md``).
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sdbctl import boxfile, data, evaluate, files
from sdbctl.box import box, fine_tune
from sdbctl.boxstep import BoxConfig, Task, plain_step
from sdbctl.cells import Bench, EvalConfig, Source
from sdbctl.data import Preprocess
from sdbctl.distill import build_student
from sdbctl.engine import Engine
from sdbctl.gate import ITSELF, KeyGate, patterns
from sdbctl.key import Key, wrong
from sdbctl.report import Report
from sdbctl.training import Progress, Silent, fit
from sdbctl.updates import Recipe
from sdbctl.wrappers import served

TEACHER = "cnn"
SIZE = 16
"""Pixels in a row: the 64 values that digits have are too few for a graph to find a key in."""
TEACHER_RECIPE = Recipe(epochs=40, batch_size=64, lr=0.1)
BOX_RECIPE = Recipe(epochs=100, batch_size=64, lr=0.05)
BOX = replace(BoxConfig.of("guard", None, {}), recipe=BOX_RECIPE)
DISTURBED = BoxConfig("conceal", teacher="original", disturb=0.8, recipe=replace(BOX_RECIPE, epochs=40))
"""A row that is only shown, so it has less time."""
STUDENT = "cnn-tiny"
STUDENT_RECIPE = Recipe(epochs=120, batch_size=32, lr=0.1)
JOBS = 2
"""Students trained side by side."""
SIZES = {"transfer": 96, "validation": 250, "test": 500}


@dataclass(frozen=True)
class Demo:
    """What the demo leaves behind: the report, and the files of a real session."""

    report: Report
    files: tuple[Path, ...]


def demo(folder: Path, *, seeds: int = 10, progress: Progress | None = None) -> Demo:
    """Train a teacher on digits, box it, export it to ONNX, and evaluate the ONNX file.

    Args:
        folder: Where the key, the models and the report go; it exists.
        seeds: Students per row.
        progress: Where progress goes.
    """
    progress = progress or Silent()
    engine = Engine(torch.device("cpu"))
    threads = torch.get_num_threads()
    # the teacher that the settings were chosen with
    torch.set_num_threads(1)
    dataset = data.load("digits", root=folder, size=SIZE)
    splits = data.split(dataset, **SIZES)
    preprocess = Preprocess((0.5,), (0.5,), dataset.train.shape)
    classes, task = len(dataset.classes), Task("digits", dataset.classes, splits, preprocess, engine)

    net = build_student(TEACHER, classes, 1, 0)
    fit(
        net,
        plain_step,
        splits.owner,
        preprocess,
        TEACHER_RECIPE,
        engine,
        name="teacher",
        progress=progress,
    )
    teacher_path = folder / "teacher.safetensors"
    described = task.describe(kind="teacher", architecture=TEACHER)
    boxfile.save(teacher_path, net.state_dict(), described, force=True)
    original = boxfile.load(teacher_path)
    torch.set_num_threads(min(threads, JOBS))

    key_path = folder / "k.bin"
    if not key_path.exists():
        Key.generate().save(key_path)
    key = Key.load(key_path)
    reference = fine_tune(original, task, BOX.recipe, progress=progress)
    made = box(original, reference, [key], task, BOX, progress=progress)
    disturbing = box(original, reference, [key], task, DISTURBED, progress=progress)
    box_path, onnx_path = folder / "boxed.safetensors", folder / "boxed.onnx"
    meta = made.model.meta
    boxfile.save(box_path, made.state_dict, meta, force=True)
    public, holders = served(made.model.net, meta), [made.model.unlock(key)]
    graph = KeyGate(public, holders, patterns([key], preprocess.size, 1), meta.strength, preprocess)
    boxfile.export_onnx(onnx_path, graph, replace(meta, doors=(ITSELF,)), force=True)

    boxed = Source(onnx=onnx_path, sha256=files.sha256(onnx_path.read_bytes()))
    secret = key.pattern(preprocess.size)
    other = wrong(secret, torch.Generator().manual_seed(1))
    sources = {
        "original": Source(net=original.net, sha256=original.sha256),
        "reference": Source(net=reference, sha256="reference"),
        "boxed": boxed,
        "keyed": boxed.keyed(preprocess(secret), meta.strength, key.id),
        "wrong": boxed.keyed(preprocess(other), meta.strength, "wrong key 1"),
        "disturbed": Source(net=disturbing.model.net, sha256="disturbed"),
    }
    with tempfile.TemporaryDirectory() as answers:
        bench = Bench(
            sources,
            splits.transfer.alone(),
            splits.validation,
            splits.test,
            preprocess,
            EvalConfig(STUDENT, STUDENT_RECIPE, seeds=seeds, tune=3, jobs=JOBS),
            engine,
            classes,
            dataset.fingerprint,
            answers=Path(answers),
            strength=meta.strength,
        )
        report = evaluate.evaluate(
            bench, title="sdbctl demo: digits", box=json.loads(meta.to_json()), progress=progress
        )
    torch.set_num_threads(threads)
    return Demo(report, (key_path, teacher_path, box_path, onnx_path))
