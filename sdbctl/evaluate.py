"""Measure a box: what its users lose, what an attacker gains, what key holders gain.

Settings are chosen on the validation split with one set of seeds; the chosen ones are trained again with fresh,
paired seeds, and only those, after their last epoch, are measured on the test split.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import resource
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sdbctl import boxfile, files, metrics
from sdbctl.attacks import ATTACKS, Config
from sdbctl.data import ImageSet, Preprocess
from sdbctl.distill import distill
from sdbctl.report import (
    ADVANTAGE_LIMIT,
    PROTECTABLE_LIMIT,
    Advantage,
    Bin,
    InferenceCost,
    Interval,
    Model,
    Report,
    Role,
    Student,
    UnauthorizedAdvantage,
)
from sdbctl.teacher import KeyedTeacher, OnnxTeacher, Record, Teacher, TorchTeacher
from sdbctl.training import Engine, Progress, Recipe, Silent, environment, predict, scaled

SELECTION_SEED = 10_000
"""Seed of the students that only choose settings; the reported ones have seeds 0, 1, 2, …"""


@dataclass(frozen=True)
class Source:
    """A teacher that can be sent to another process.

    Attributes:
        net: A torch network, or None.
        onnx: An ONNX file, or None.
        pattern: Normalised key pattern [C, H, W] to embed, or None.
        strength: λ of the embedding.
        sha256: Identity of the weights, for caching.
    """

    net: nn.Module | None = None
    onnx: Path | None = None
    pattern: Tensor | None = field(default=None, repr=False)
    strength: float = 0.0
    sha256: str = ""

    def open(self, engine: Engine, classes: int) -> Teacher:
        """Start the teacher on the engine's device."""
        teacher: Teacher
        if self.onnx is not None:
            teacher = OnnxTeacher(self.onnx, engine.device)
        else:
            assert self.net is not None
            teacher = TorchTeacher(self.net, classes, engine.autocast, engine.device)
        return KeyedTeacher(teacher, self.pattern, self.strength) if self.pattern is not None else teacher

    def keyed(self, pattern: Tensor, strength: float, label: str) -> Source:
        """The same teacher asked with a key; ``label`` tells cached results apart and must not be secret."""
        return replace(self, pattern=pattern, strength=strength, sha256=f"{self.sha256}:{label}")


@dataclass(frozen=True)
class Row:
    """One kind of student in the report.

    Attributes:
        name: Its key in the report.
        label: Its name for people.
        role: Its part in the comparison.
        attack: Name in :data:`sdbctl.attacks.ATTACKS`.
        teachers: Names of the sources it may learn from, the best of which is chosen; empty for none.
    """

    name: str
    label: str
    role: Role
    attack: str
    teachers: tuple[str, ...] = ()


ROWS = (
    Row("cross_entropy", "labels", "floor", "cross_entropy"),
    Row("label_smoothing", "smoothed labels", "floor", "label_smoothing"),
    Row("class_constant", "class-constant logits of the label", "floor", "class_constant"),
    Row("hard_label", "top-1 of the box", "floor", "hard_label", ("boxed",)),
    Row("hard_constant", "class-constant logits of the box's top-1", "floor", "hard_constant", ("boxed",)),
    Row("kd_original", "KD from the original", "reference", "kd", ("original", "reference")),
    Row("unauthorized", "KD from the box", "attack", "kd", ("boxed",)),
    Row("unauthorized_unlabelled", "KD from the box, no labels", "attack", "kd_unlabelled", ("boxed",)),
    Row("authorized", "KD from the box with the key", "authorized", "kd", ("keyed",)),
    Row("authorized_wrong_key", "KD from the box with a wrong key", "wrong_key", "kd", ("wrong",)),
    Row("disturbed", "KD from a box with --disturb", "disturb", "kd", ("disturbed",)),
)
UNLABELLED_FLOOR = ("hard_label", "hard_constant")
FIXED = ("disturbed",)
"""Rows that are not tuned: plain distillation with the first configuration, which most papers report."""


@dataclass(frozen=True)
class EvalConfig:
    """How to evaluate.

    Attributes:
        student: Architecture of the students.
        recipe: Their training.
        seeds: Students per reported row.
        tune: Configurations to try per attack and teacher, in the attack's order; 1 tunes nothing.
        trials: Students per configuration that is tried; more make the choice less of a lottery.
        jobs: Students trained side by side, each in its own process.
        attack: Whether to train students at all.
    """

    student: str = "wrn16"
    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=20, lr=0.1))
    seeds: int = 5
    tune: int = 6
    trials: int = 1
    jobs: int = 1
    attack: bool = True


@dataclass(frozen=True)
class Cell:
    """One student to train."""

    row: str
    teacher: str
    config: Config
    seed: int
    final: bool


@dataclass(frozen=True)
class Outcome:
    """One trained student: accuracies in percent, the test accuracy only for reported ones."""

    validation: float
    test: float | None
    seconds: float
    queries: int


@dataclass(frozen=True)
class Bench:
    """Everything a worker needs to train students.

    Attributes:
        sources: Teachers by name: boxed, keyed, wrong, original, reference, disturbed; some may be missing.
        transfer: The attacker's images.
        validation: Images to choose settings on.
        test: Images to report on.
        preprocess: Normalisation.
        config: How to evaluate.
        engine: Where to compute.
        classes: Number of classes.
        fingerprint: Identity of the data.
        answers: Folder in which the teachers' answers are kept, so that students share one set of queries.
    """

    sources: Mapping[str, Source]
    transfer: ImageSet
    validation: ImageSet
    test: ImageSet
    preprocess: Preprocess
    config: EvalConfig
    engine: Engine
    classes: int
    fingerprint: str
    answers: Path | None = None

    def rows(self) -> list[Row]:
        """The rows whose teachers are there."""
        return [
            replace(row, teachers=tuple(name for name in row.teachers if name in self.sources))
            for row in ROWS
            if not row.teachers or any(name in self.sources for name in row.teachers)
        ]

    def key(self, cell: Cell) -> str:
        """Content hash of a cell, under which its outcome is kept."""
        row = next(row for row in ROWS if row.name == cell.row)
        source = self.sources[cell.teacher].sha256 if cell.teacher else ""
        recipe = asdict(scaled(self.config.recipe, seed=cell.seed))
        parts = [
            boxfile.versions(),
            self.engine.precision,
            row.attack,
            source,
            dict(cell.config),
            recipe,
            cell.final,
            self.config.student,
            self.fingerprint,
        ]
        text = json.dumps([*parts, len(self.transfer), len(self.validation), len(self.test)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def record(self, teacher: str) -> Record | None:
        """Where this teacher's answers are kept."""
        if self.answers is None or not teacher:
            return None
        parts = [self.sources[teacher].sha256, self.engine.precision, self.preprocess.to_dict(), boxfile.versions()]
        return Record(self.answers, json.dumps(parts, sort_keys=True))

    def run(self, cell: Cell, progress: Progress | None = None) -> Outcome:
        """Train and measure one student."""
        row = next(row for row in ROWS if row.name == cell.row)
        config = self.config
        teacher = self.sources[cell.teacher].open(self.engine, self.classes) if cell.teacher else None
        student, seconds, queries = distill(
            ATTACKS[row.attack],
            cell.config,
            teacher,
            config.student,
            self.classes,
            self.transfer,
            self.preprocess,
            scaled(config.recipe, seed=cell.seed),
            self.engine,
            record=self.record(cell.teacher),
            progress=progress,
        )

        def accuracy(images: ImageSet) -> float:
            return metrics.top1(predict(student, images, self.preprocess, self.engine), images.labels)

        test = accuracy(self.test) if cell.final else None
        return Outcome(accuracy(self.validation), test, seconds, queries)


def run_cells(bench: Bench, cells: Iterable[Cell], folder: Path | None, progress: Progress) -> dict[Cell_, Outcome]:
    """Train the students of ``cells``, each once, and keep each outcome as a file.

    Args:
        bench: What to train with.
        cells: Which students.
        folder: Where outcomes are kept; those that are there already are read, so a killed run resumes.
        progress: Advanced by one per student.
    """
    done: dict[Cell_, Outcome] = {}
    todo: list[Cell] = []
    for cell in cells:
        stored = _stored(bench, cell, folder)
        if stored:
            done[_hashable(cell)] = stored
        elif cell not in todo:
            todo.append(cell)
    if done:
        progress.note(f"{len(done)} students were trained before")

    def finish(cell: Cell, outcome: Outcome) -> None:
        done[_hashable(cell)] = outcome
        if folder is not None:
            files.write(folder / f"{bench.key(cell)}.json", json.dumps({"row": cell.row, **asdict(outcome)}))
        progress.advance(1, {"validation": outcome.validation})

    jobs = min(bench.config.jobs, len(todo))
    if jobs <= 1:
        for cell in todo:
            finish(cell, bench.run(cell))
        return done
    import multiprocessing

    threads = max(1, torch.get_num_threads() // jobs)
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start_worker, (bench, threads))
    try:
        running: dict[Future[Outcome], Cell] = {pool.submit(_work, cell): cell for cell in todo}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                finish(running.pop(future), future.result())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list((pool._processes or {}).values()):
            process.terminate()
    return done


_bench: Bench | None = None


def _start_worker(bench: Bench, threads: int) -> None:
    import signal

    global _bench
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    _bench = bench


def _work(cell: Cell) -> Outcome:
    assert _bench is not None
    return _bench.run(cell)


Cell_ = tuple[str, str, str, int, bool]


def _hashable(cell: Cell) -> Cell_:
    return cell.row, cell.teacher, json.dumps(dict(cell.config), sort_keys=True), cell.seed, cell.final


def _stored(bench: Bench, cell: Cell, folder: Path | None) -> Outcome | None:
    if folder is None:
        return None
    try:
        values = json.loads((folder / f"{bench.key(cell)}.json").read_text())
        return Outcome(*(values[name] for name in ("validation", "test", "seconds", "queries")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def selection_cells(bench: Bench) -> list[Cell]:
    """Students that choose settings, for every row that has a choice of teacher or configuration."""
    cells = []
    for row in bench.rows():
        grid = ATTACKS[row.attack].grid[: 1 if row.name in FIXED else bench.config.tune]
        options = [(teacher, config) for teacher in row.teachers or ("",) for config in grid]
        if len(options) > 1:
            seeds = range(SELECTION_SEED, SELECTION_SEED + bench.config.trials)
            cells += [Cell(row.name, *option, seed, final=False) for option in options for seed in seeds]
    return cells


def choose(bench: Bench, outcomes: Mapping[Cell_, Outcome]) -> dict[str, tuple[str, Config, float | None]]:
    """Best teacher and configuration of each row by validation accuracy, with that accuracy."""
    chosen: dict[str, tuple[str, Config, float | None]] = {}
    cells = selection_cells(bench)
    for row in bench.rows():
        tried: dict[str, list[float]] = {}
        settings: dict[str, tuple[str, Config]] = {}
        for cell in cells:
            if cell.row == row.name and _hashable(cell) in outcomes:
                setting = f"{cell.teacher} {dict(cell.config)}"
                settings[setting] = (cell.teacher, cell.config)
                tried.setdefault(setting, []).append(outcomes[_hashable(cell)].validation)
        means = {setting: float(np.mean(values)) for setting, values in tried.items()}
        if means:
            best = max(means, key=lambda setting: means[setting])
            chosen[row.name] = (*settings[best], means[best])
        else:
            chosen[row.name] = (row.teachers[0] if row.teachers else "", ATTACKS[row.attack].grid[0], None)
    return chosen


def train_students(bench: Bench, folder: Path | None, progress: Progress) -> dict[str, Student]:
    """Choose settings, train the reported students with fresh paired seeds, and name the control.

    Returns:
        Students by row name, and ``control`` and ``control_unlabelled``, the best of the floor.
    """
    rows, config = bench.rows(), bench.config
    trials = selection_cells(bench)
    progress.start("students", len(trials) + len(rows) * config.seeds)
    chosen = choose(bench, run_cells(bench, trials, folder, progress))
    finals = [Cell(row.name, *chosen[row.name][:2], seed, final=True) for seed in range(config.seeds) for row in rows]
    outcomes = run_cells(bench, finals, folder, progress)
    by_row = {row.name: [outcomes[_hashable(cell)] for cell in finals if cell.row == row.name] for row in rows}
    validation = {name: float(np.mean([outcome.validation for outcome in runs])) for name, runs in by_row.items()}

    def best(names: Iterable[str]) -> str:
        return max(names, key=lambda name: (chosen[name][2] or 0.0, validation[name]))

    floor = best(row.name for row in rows if row.role == "floor")
    unlabelled = best(name for name in UNLABELLED_FLOOR if name in by_row)
    control = [outcome.test or 0.0 for outcome in by_row[floor]]
    students = {}
    for row in rows:
        teacher, setting, _ = chosen[row.name]
        values = [outcome.test or 0.0 for outcome in by_row[row.name]]
        students[row.name] = Student(
            name=row.name,
            label=row.label,
            role=row.role,
            mean=float(np.mean(values)),
            sd=float(np.std(values, ddof=1)) if len(values) > 1 else None,
            n=len(values),
            values=tuple(values),
            difference=_paired(values, control),
            config={
                "teacher": teacher or None,
                **setting,
                "epochs": config.recipe.epochs,
                "student": config.student,
            },
            seconds=float(np.mean([outcome.seconds for outcome in by_row[row.name]])),
            queries=by_row[row.name][0].queries or None,
            validation=validation[row.name],
            note="not tuned" if row.name in FIXED else "",
        )
    students["control"] = replace(students[floor], name="control", label=f"best of the floor: {students[floor].label}")
    students["control_unlabelled"] = replace(
        students[unlabelled],
        name="control_unlabelled",
        label=f"best without labels: {students[unlabelled].label}",
    )
    return students


def _paired(values: Sequence[float | None], control: Sequence[float | None]) -> Interval:
    differences = [(a or 0.0) - (b or 0.0) for a, b in zip(values, control, strict=True)]
    return Interval(*metrics.seed_interval(differences), n=len(differences))


MODEL_LABELS = {
    "original": "original",
    "reference": "original, fine-tuned on the same data",
    "boxed": "boxed",
    "keyed": "boxed, with the key",
    "wrong": "boxed, with a wrong key",
    "disturbed": "boxed, with --disturb",
}
_MODEL_NAMES = {"reference": "original_ft", "keyed": "boxed_keyed", "wrong": "boxed_wrong_key"}


def measure_models(bench: Bench) -> tuple[dict[str, Model], dict[str, Tensor]]:
    """Quality of every model on the test split, and its logits."""
    models, outputs = {}, {}
    for name, label in MODEL_LABELS.items():
        if name not in bench.sources:
            continue
        teacher = bench.sources[name].open(bench.engine, bench.classes)
        outputs[name] = predict(teacher.logits, bench.test, bench.preprocess, bench.engine)
        scores = asdict(metrics.score(outputs[name], bench.test.labels))
        bins = tuple(Bin(*values) for values in scores.pop("reliability"))
        scores.pop("spread")
        key = _MODEL_NAMES.get(name, name)
        models[key] = Model(name=key, label=label, n_images=scores.pop("n"), reliability=bins, **scores)
    return models, outputs


def inference_cost(before: Tensor, after: Tensor, labels: Tensor) -> InferenceCost:
    """What the box costs its users against N_ft, with paired bootstrap bounds over the test images."""
    old, new = metrics.per_image(before, labels), metrics.per_image(after, labels)
    n = len(labels)

    def interval(name: str) -> Interval:
        loss = (new[name], old[name]) if name.startswith("top") else (old[name], new[name])
        return Interval(*metrics.bootstrap_interval(*loss), n=n)

    ece = Interval(*metrics.bootstrap_ece(before, after, labels), n=n)
    return InferenceCost(interval("top1"), ece, interval("nll_binary"), interval("nll"), interval("top5"))


def evaluate(
    bench: Bench,
    *,
    title: str,
    box: Mapping[str, Any],
    folder: Path | None = None,
    progress: Progress | None = None,
    notes: Sequence[str] = (),
) -> Report:
    """Measure a box.

    Args:
        bench: The models, data and settings.
        title: Heading of the report.
        box: Metadata of the box, for the record.
        folder: Where finished students are kept, so that a killed run resumes.
        progress: Where progress goes.
        notes: Caveats to print.

    Returns:
        The report; what was not measured is None in it.
    """
    begin = time.perf_counter()
    progress = progress or Silent()
    models, outputs = measure_models(bench)
    before = outputs.get("reference", outputs.get("original"))
    cost = InferenceCost()
    if before is not None and "boxed" in outputs:
        cost = inference_cost(before, outputs["boxed"], bench.test.labels)
    students: dict[str, Student] = {}
    if bench.config.attack:
        students = train_students(bench, folder, progress)
    report = Report(
        title=title,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        tool=boxfile.versions()["sdbctl"],
        verdict="",
        notes=(*notes, *_caveats(bench, students)),
        inference_cost=cost,
        models=models,
        students=students,
        environment=environment(bench.engine),
        config={
            "student": bench.config.student,
            "seeds": bench.config.seeds,
            "tuned_configurations": bench.config.tune,
            "recipe": asdict(bench.config.recipe),
            "transfer_images": len(bench.transfer),
            "validation_images": len(bench.validation),
            "test_images": len(bench.test),
            "data_fingerprint": bench.fingerprint,
        },
        box=dict(box),
        cost=_cost(bench, students, time.perf_counter() - begin),
    )
    report = replace(report, **headline(students))
    return replace(report, verdict=verdict(report))


def headline(students: Mapping[str, Student]) -> dict[str, Any]:
    """The numbers in front: advantage, gain, and whether there is something to protect."""

    def difference(one: str, other: str) -> Interval:
        if one not in students or other not in students:
            return Interval()
        return _paired(students[one].values, students[other].values)

    attacks = [s for s in students.values() if s.role == "attack" and "unlabelled" not in s.name]
    best = max(attacks, key=lambda s: s.validation or 0.0).name if attacks else "unauthorized"
    return {
        "unauthorized_advantage": UnauthorizedAdvantage(
            api=Advantage(difference(best, "control"), difference("unauthorized_unlabelled", "control_unlabelled"))
        ),
        "authorized_gain": difference("authorized", "kd_original"),
        "protectable": difference("kd_original", "control"),
    }


def verdict(report: Report) -> str:
    """One sentence: what this box protects against, and what it does not."""
    advantage, protectable = report.unauthorized_advantage.api.labelled, report.protectable
    if advantage.mean is None:
        return "No student was trained, so nothing is known about protection; use --attack."
    if protectable.mean is None:
        return (
            f"The attacker gains {advantage.mean:+.1f} points over the floor; whether there was something to protect "
            "is unknown without --original."
        )
    if protectable.mean < PROTECTABLE_LIMIT or (protectable.low is not None and protectable.low <= 0):
        return (
            f"Nothing to protect here: distilling the original is worth only {protectable.mean:+.1f} points over "
            "what an attacker has anyway."
        )
    if advantage.high is None:
        finding = f"One seed only: distilling the box gains {advantage.mean:+.1f} points over the floor"
    elif advantage.high <= ADVANTAGE_LIMIT:
        finding = (
            f"Undistillable through its outputs by the attacks tried: at most {advantage.high:+.1f} points over the "
            "floor (95 %)"
        )
    elif advantage.low is not None and advantage.low > ADVANTAGE_LIMIT:
        finding = f"Not protected: distilling the box gains {advantage.mean:+.1f} points over the floor"
    else:
        finding = (
            f"Not shown to be undistillable: distilling the box gains {advantage.mean:+.1f} points over the floor, "
            f"at most {advantage.high:+.1f} (95 %)"
        )
    worth = f"the original gives {protectable.mean:+.1f}"
    gain = report.authorized_gain
    key = f"; the key is worth {gain.mean:+.1f} points against distilling the original" if gain.mean is not None else ""
    return f"{finding}; {worth}{key}. Attackers who hold the file were not tried."


def _caveats(bench: Bench, students: Mapping[str, Student]) -> list[str]:
    notes = []
    if students:
        notes.append(
            f"Students see {len(bench.transfer):,} transfer images for {bench.config.recipe.epochs} epochs; short "
            "training exaggerates what distillation gives."
        )
        if bench.config.seeds < 5:
            notes.append(f"n = {bench.config.seeds}: a headline needs 5 seeds.")
        if bench.config.tune < 6:
            notes.append("Settings were not fully tuned; the attacker may do better.")
    return notes


def _cost(bench: Bench, students: Mapping[str, Student], seconds: float) -> dict[str, object]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if os.uname().sysname == "Darwin" else 1024)
    trained = [student for student in students.values() if student.seconds]
    images = len(bench.transfer) * bench.config.recipe.epochs
    rate = images / float(np.mean([student.seconds for student in trained])) if trained else None
    return {
        "seconds": round(seconds, 1),
        "student_images_per_second": round(rate, 1) if rate else None,
        "peak_memory_mib": round(peak),
        "jobs": bench.config.jobs,
    }
