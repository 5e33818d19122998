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
from sdbctl.key import correlation, embed
from sdbctl.report import (
    ADVANTAGE_LIMIT,
    PROTECTABLE_LIMIT,
    Advantage,
    Bin,
    Curve,
    InferenceCost,
    Interval,
    Model,
    Point,
    Report,
    Student,
    UnauthorizedAdvantage,
)
from sdbctl.suites import ALWAYS, BY_NAME, MINOR, TUNED, UNLABELLED_FLOOR, Option, Row, suite
from sdbctl.teacher import KeyedTeacher, OnnxTeacher, Record, Teacher, TorchTeacher
from sdbctl.training import Engine, Progress, Recipe, Silent, environment, predict, scaled
from sdbctl.wrappers import WrappedTeacher

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
        held: The network inside the ONNX file, for attackers who hold it, or None.
        wrapper: Name in :data:`sdbctl.wrappers.WRAPPERS` that answers pass, or "".
    """

    net: nn.Module | None = None
    onnx: Path | None = None
    pattern: Tensor | None = field(default=None, repr=False)
    strength: float = 0.0
    sha256: str = ""
    held: nn.Module | None = None
    wrapper: str = ""

    @property
    def weights(self) -> nn.Module | None:
        """What an attacker who holds the file can train."""
        return self.held if self.net is None else self.net

    def open(self, engine: Engine, classes: int) -> Teacher:
        """Start the teacher on the engine's device."""
        teacher: Teacher
        if self.onnx is not None:
            teacher = OnnxTeacher(self.onnx, engine.device)
        else:
            assert self.net is not None
            teacher = TorchTeacher(self.net, classes, engine.autocast, engine.device)
        if self.pattern is not None:
            teacher = KeyedTeacher(teacher, self.pattern, self.strength)
        return WrappedTeacher(teacher, self.wrapper) if self.wrapper else teacher

    def wrapped(self, wrapper: str) -> Source:
        """The same teacher behind a serving-time defence."""
        return replace(self, wrapper=wrapper, sha256=f"{self.sha256}:{wrapper}")

    def keyed(self, pattern: Tensor, strength: float, label: str) -> Source:
        """The same teacher asked with a key; ``label`` tells cached results apart and must not be secret."""
        return replace(self, pattern=pattern, strength=strength, sha256=f"{self.sha256}:{label}")


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
        suite: Name in :data:`sdbctl.suites.SUITES`, or None to train no student at all.
    """

    student: str = "wrn16"
    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=20, lr=0.1))
    seeds: int = 5
    tune: int = 6
    trials: int = 1
    jobs: int = 1
    suite: str | None = "core"

    @property
    def reported(self) -> int:
        """Students per reported row."""
        return (suite(self.suite).seeds if self.suite else None) or self.seeds


@dataclass(frozen=True)
class Cell:
    """One student to train.

    Attributes:
        row: Name of its row.
        teacher: Name of its teacher, or "".
        config: Settings of the attack.
        seed: Of student and training.
        final: Whether it is measured on the test split.
        epochs: Epochs, if not those of the recipe.
        images: Transfer images, if not all.
    """

    row: str
    teacher: str
    config: Config
    seed: int
    final: bool
    epochs: int | None = None
    images: int | None = None

    @property
    def id(self) -> str:
        """What tells cells of one evaluation apart."""
        return json.dumps(asdict(self), sort_keys=True, default=dict)


@dataclass(frozen=True)
class Outcome:
    """One trained student: accuracies in percent, the test accuracy only for reported ones.

    ``correlation`` is that of the secret pattern with what an attack on the key found.
    """

    validation: float
    test: float | None
    seconds: float
    queries: int
    correlation: float | None = None


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
        surrogate: Unlabelled images of another data set, or None.
        strength: λ of the box, 0 if the teacher is none.
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
    surrogate: ImageSet | None = None
    strength: float = 0.0

    def rows(self) -> list[Row]:
        """The rows whose teachers are there, and which the attacker can try on them."""
        if self.config.suite is None:
            return []
        boxed = self.sources.get("boxed")
        rows = []
        for row in suite(self.config.suite).rows:
            teachers = tuple(name for name in row.teachers if name in self.sources)
            possible = (bool(teachers) or not row.teachers) and (
                row.access == "api" or (boxed is not None and boxed.weights is not None)
            )
            if possible and (self.strength > 0 or not row.attack.endswith(("_keys", "_key"))):
                rows.append(replace(row, teachers=teachers))
        return rows

    def key(self, cell: Cell) -> str:
        """Content hash of a cell, under which its outcome is kept."""
        source = self.sources[cell.teacher].sha256 if cell.teacher else ""
        parts = [
            boxfile.versions(),
            self.engine.precision,
            BY_NAME[cell.row].attack,
            source,
            dict(cell.config),
            asdict(scaled(self.config.recipe, seed=cell.seed, epochs=cell.epochs)),
            cell.final,
            cell.images,
            self.config.student,
            self.fingerprint,
            len(self.surrogate) if self.surrogate is not None else 0,
        ]
        text = json.dumps([*parts, len(self.transfer), len(self.validation), len(self.test)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    @property
    def secret(self) -> Tensor | None:
        """The secret pattern [C, H, W] in [0, 1], to judge what attackers found."""
        pattern = self.sources["keyed"].pattern if "keyed" in self.sources else None
        if pattern is None:
            return None
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.preprocess.mean, self.preprocess.std))
        return pattern * std + mean

    def record(self, teacher: str) -> Record | None:
        """Where this teacher's answers are kept."""
        if self.answers is None or not teacher:
            return None
        parts = [self.sources[teacher].sha256, self.engine.precision, self.preprocess.to_dict(), boxfile.versions()]
        return Record(self.answers, json.dumps(parts, sort_keys=True))

    def run(self, cell: Cell, progress: Progress | None = None) -> Outcome:
        """Train and measure one student."""
        config, source = self.config, self.sources[cell.teacher] if cell.teacher else None
        teacher = source.open(self.engine, self.classes) if source else None
        student, seconds, queries, guess = distill(
            ATTACKS[BY_NAME[cell.row].attack],
            cell.config,
            teacher,
            config.student,
            self.classes,
            self.transfer if cell.images is None else self.transfer.take(range(cell.images)),
            self.preprocess,
            scaled(config.recipe, seed=cell.seed, epochs=cell.epochs),
            self.engine,
            weights=source.weights if source else None,
            surrogate=self.surrogate,
            strength=self.strength,
            record=self.record(cell.teacher),
            progress=progress,
        )

        def accuracy(images: ImageSet) -> float:
            return metrics.top1(predict(student, images, self.preprocess, self.engine), images.labels)

        test = accuracy(self.test) if cell.final else None
        found = correlation(guess, self.secret) if guess is not None and self.secret is not None else None
        return Outcome(accuracy(self.validation), test, seconds, queries, found)


def run_cells(bench: Bench, cells: Iterable[Cell], folder: Path | None, progress: Progress) -> dict[str, Outcome]:
    """Train the students of ``cells``, each once, and keep each outcome as a file.

    Args:
        bench: What to train with.
        cells: Which students.
        folder: Where outcomes are kept; those that are there already are read, so a killed run resumes.
        progress: Advanced by one per student.
    """
    done: dict[str, Outcome] = {}
    todo: list[Cell] = []
    for cell in cells:
        stored = _stored(bench, cell, folder)
        if stored:
            done[cell.id] = stored
        elif cell not in todo:
            todo.append(cell)
    if done:
        progress.note(f"{len(done)} students were trained before")

    def finish(cell: Cell, outcome: Outcome) -> None:
        done[cell.id] = outcome
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


def _stored(bench: Bench, cell: Cell, folder: Path | None) -> Outcome | None:
    if folder is None:
        return None
    try:
        values = json.loads((folder / f"{bench.key(cell)}.json").read_text())
        return Outcome(*(values[name] for name in ("validation", "test", "seconds", "queries", "correlation")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


KEPT = 8
"""Of so many candidates of a group that is screened, one goes on."""


def options(bench: Bench) -> dict[str, list[Option]]:
    """The candidates of each group that competes for one place in the report."""
    groups: dict[str, list[Option]] = {}
    if bench.config.suite is None:
        return groups
    chosen = suite(bench.config.suite)
    for row in bench.rows():
        tune = min(bench.config.tune, chosen.tune or bench.config.tune, TUNED.get(row.role, bench.config.tune))
        group = groups.setdefault(chosen.group(row), [])
        group += [
            Option(row, teacher, config)
            for teacher in (row.teachers[:1] if chosen.tune == 1 else row.teachers) or ("",)
            for config in ATTACKS[row.attack].grid[:tune]
        ]
    return groups


def screened_epochs(bench: Bench) -> int | None:
    """Epochs after which candidates are dropped, or None."""
    share = suite(bench.config.suite).screen if bench.config.suite else None
    return max(1, round(share * bench.config.recipe.epochs)) if share else None


@dataclass(frozen=True)
class Plan:
    """How many students an evaluation trains, and how many whole runs that is."""

    students: int
    runs: float


def plan(bench: Bench) -> Plan:
    """Count the students before any is trained."""
    groups, short, config = options(bench), screened_epochs(bench), bench.config
    cells: list[float] = []
    for name, found in groups.items():
        left = len(found)
        if short and left > 1:
            cells += [short / config.recipe.epochs] * left
            left = _kept(left)
        cells += [1.0] * (left * config.trials if left > 1 else 0)
        cells += [1.0] * _seeds(bench, name)
    cells += [size / len(bench.transfer) for _, size in _budgets(bench)]
    # whether they win is not known yet
    cells += [1.0] * len(_controls(bench))
    return Plan(len(cells), sum(cells))


def _controls(bench: Bench) -> list[str]:
    """Rows of the floor that are shown with one seed if others of their group beat them."""
    competing = [found for found in options(bench).values() if len({option.row.name for option in found}) > 1]
    return [name for name in ALWAYS if any(option.row.name == name for found in competing for option in found)]


def _seeds(bench: Bench, group: str) -> int:
    """Students of a group's winner: what is no headline has one where attacks compete."""
    minor = bench.config.suite is not None and suite(bench.config.suite).elect and group in MINOR
    return 1 if minor else bench.config.reported


def _kept(count: int) -> int:
    return max(1, -(-count // KEPT))


@dataclass
class Choice:
    """A candidate, its mean validation accuracy, and after how many epochs; None if there was no choice."""

    option: Option
    validation: float | None = None
    epochs: int = 0


def choose(bench: Bench, folder: Path | None, progress: Progress) -> tuple[dict[str, Choice], dict[str, Choice]]:
    """Choose one candidate per group by validation accuracy, after a short screening if the suite has one.

    Returns:
        The winner of each group, and the best candidate of each row with how long it was trained.
    """
    groups, short, config = options(bench), screened_epochs(bench), bench.config
    rows: dict[str, Choice] = {}

    def rank(found: Mapping[str, list[Option]], epochs: int, trials: int) -> dict[str, list[Choice]]:
        def cells(option: Option) -> list[Cell]:
            seeds, length = range(SELECTION_SEED, SELECTION_SEED + trials), None if epochs == full else epochs
            return [Cell(option.row.name, option.teacher, option.config, seed, False, length) for seed in seeds]

        open_ = {group: some for group, some in found.items() if len(some) > 1}
        done = run_cells(bench, [c for some in open_.values() for o in some for c in cells(o)], folder, progress)
        ranked = {group: [Choice(some[0])] for group, some in found.items()}
        for group, some in open_.items():
            scores = [float(np.mean([done[cell.id].validation for cell in cells(option)])) for option in some]
            pairs = zip(some, scores, strict=True)
            ranked[group] = sorted((Choice(o, v, epochs) for o, v in pairs), key=lambda c: -(c.validation or 0.0))
        for choice in (choice for some in ranked.values() for choice in reversed(some)):
            name = choice.option.row.name
            if name not in rows or rows[name].epochs <= choice.epochs:
                rows[name] = choice
        return ranked

    full = config.recipe.epochs
    if short:
        ranked = rank(groups, short, 1)
        groups = {group: [choice.option for choice in some[: _kept(len(some))]] for group, some in ranked.items()}
    return {group: some[0] for group, some in rank(groups, full, config.trials).items()}, rows


def train_students(bench: Bench, folder: Path | None, progress: Progress) -> dict[str, Student]:
    """Choose settings, train the reported students with fresh paired seeds, and name the control.

    Returns:
        Students by row name, and ``control`` and ``control_unlabelled``, the best of the floor.
    """
    config = bench.config
    progress.start("students", plan(bench).students)
    winners, rows = choose(bench, folder, progress)
    finals = {choice.option.row.name: (choice, _seeds(bench, group)) for group, choice in winners.items()}
    for name in _controls(bench):
        finals.setdefault(name, (rows[name], 1))
    cells = {
        name: [Cell(name, choice.option.teacher, choice.option.config, seed, True) for seed in range(seeds)]
        for name, (choice, seeds) in finals.items()
    }
    outcomes = run_cells(bench, [cell for some in cells.values() for cell in some], folder, progress)
    finished = {name: [outcomes[cell.id] for cell in some] for name, some in cells.items()}
    validation = {name: float(np.mean([run.validation for run in runs])) for name, runs in finished.items()}

    def best(names: Iterable[str]) -> str:
        # rows that were elected have all seeds
        return max(names, key=lambda name: (len(cells[name]), finals[name][0].validation or 0.0, validation[name]))

    floor = best(name for name in finished if BY_NAME[name].role == "floor")
    unlabelled = best(name for name in finished if name in UNLABELLED_FLOOR)
    control = [outcome.test or 0.0 for outcome in finished[floor]]
    students = {}
    for row in bench.rows():
        if row.name not in finished:
            students[row.name] = Student(
                name=row.name,
                label=row.label,
                role=row.role,
                access=row.access,
                labels=row.labels,
                config={**rows[row.name].option.config, "epochs": rows[row.name].epochs},
                validation=rows[row.name].validation,
            )
            continue
        runs, option = finished[row.name], finals[row.name][0].option
        values = [outcome.test or 0.0 for outcome in runs]
        found = [outcome.correlation for outcome in runs if outcome.correlation is not None]
        students[row.name] = Student(
            name=row.name,
            label=row.label,
            role=row.role,
            access=row.access,
            labels=row.labels,
            mean=float(np.mean(values)),
            sd=float(np.std(values, ddof=1)) if len(values) > 1 else None,
            n=len(values),
            values=tuple(values),
            difference=_paired(values, control),
            config={
                **({"teacher": option.teacher} if option.teacher else {}),
                **option.config,
                **({"key_correlation": float(np.mean(found))} if found else {}),
                "epochs": config.recipe.epochs,
                "student": config.student,
            },
            seconds=float(np.mean([outcome.seconds for outcome in runs])),
            queries=runs[0].queries or None,
            validation=validation[row.name],
            note="not tuned" if row.role == "disturb" else "",
        )
    for name, chosen, note in (
        ("control_unlabelled", unlabelled, "the control without labels"),
        ("control", floor, "the control"),
    ):
        students[name] = replace(students[chosen], name=name)
        before = f"{students[chosen].note}, " if students[chosen].note else ""
        students[chosen] = replace(students[chosen], note=f"{before}{note}")
    return students


BUDGETS = (1000, 5000, 10_000)
FEW_SHOT = (0.01, 0.05, 0.1)
"""Transfer images of the budget curve, in number and as shares of all."""
BUDGET_ROWS = ("cross_entropy", "kd_original", "unauthorized", "authorized")
NEAR_PERCENT = (10, 30, 50, 70, 90, 95, 99)
"""Correlations, in percent, of the keys that are nearly right."""
LEAKS = (1, 10, 100, 1000)
"""Keyed queries that somebody listens to, for the leak curve."""


def _budgets(bench: Bench) -> list[tuple[str, int]]:
    if bench.config.suite is None or not suite(bench.config.suite).curves:
        return []
    names = [row.name for row in bench.rows() if row.name in BUDGET_ROWS]
    whole = len(bench.transfer)
    sizes = {*BUDGETS, *(round(share * whole) for share in FEW_SHOT)}
    return [(name, size) for size in sorted(sizes) if 2 * bench.classes <= size < whole for name in names]


def budget_curve(
    bench: Bench, students: Mapping[str, Student], folder: Path | None, progress: Progress
) -> dict[str, Curve]:
    """Accuracy over the number of transfer images, with the settings chosen for all of them; one seed a point."""
    budgets = [(name, size) for name, size in _budgets(bench) if students[name].config]
    if not budgets:
        return {}
    cells = {}
    for name, size in budgets:
        known = set(ATTACKS[BY_NAME[name].attack].grid[0])
        config = {setting: float(str(v)) for setting, v in students[name].config.items() if setting in known}
        cells[name, size] = Cell(name, str(students[name].config.get("teacher", "")), config, 0, True, images=size)
    outcomes = run_cells(bench, list(cells.values()), folder, progress)
    series: dict[str, tuple[Point, ...]] = {}
    for name in dict.fromkeys(name for name, _ in budgets):
        points = [Point(size, outcomes[cell.id].test) for (other, size), cell in cells.items() if other == name]
        whole = students[name]
        series[whole.label] = (*points, Point(len(bench.transfer), whole.values[0] if whole.values else None))
    views = bench.config.recipe.epochs
    return {
        "budget": Curve(
            title="Query budget",
            x_label=f"Transfer images, {views} queries each",
            y_label="Test accuracy, %",
            x_log=True,
            series=series,
        )
    }


def key_curves(bench: Bench) -> dict[str, Curve]:
    """How much a key that is nearly right opens, and how fast listening to keyed queries gives the key away."""
    secret = bench.secret
    if secret is None:
        return {}
    some = bench.validation.take(range(min(1000, len(bench.validation))))
    opened = []
    for name, source in bench.sources.items():
        if source.pattern is not None and name != "disturbed":
            teacher = source.open(bench.engine, bench.classes)
            outputs = predict(teacher.logits, some, bench.preprocess, bench.engine)
            pattern = replace(bench, sources={"keyed": source}).secret
            assert pattern is not None
            opened.append(Point(round(correlation(pattern, secret), 3), metrics.residual(outputs)))
    curves = {
        "near_keys": Curve(
            title="Keys that are nearly right",
            x_label="Correlation with the secret pattern",
            y_label="Dark knowledge shown, nats",
            series={"box": tuple(sorted(opened, key=lambda point: point.x or 0.0))},
        )
    }
    if bench.transfer.in_memory and bench.strength > 0:
        own = bench.transfer.pixels.float().mean(0) / 255
        heard = bench.validation.pixels.float() / 255 if bench.validation.in_memory else None
        if heard is not None:
            points = []
            for count in (count for count in LEAKS if count <= len(heard)):
                mean = embed(heard[:count], secret, bench.strength).mean(0)
                guess = (mean - bench.strength * own) / (1 - bench.strength)
                points.append(Point(count, round(correlation(guess, secret), 4)))
            curves["leak"] = Curve(
                title="Listening to key holders",
                x_label="Keyed queries overheard",
                y_label="Correlation of the recovered key",
                x_log=True,
                series={"mean of the queries": tuple(points)},
            )
    return curves


def _paired(values: Sequence[float | None], control: Sequence[float | None]) -> Interval:
    # both have the seeds 0, 1, 2, …; one of them may have more
    differences = [(a or 0.0) - (b or 0.0) for a, b in zip(values, control, strict=False)]
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
    curves = key_curves(bench)
    if bench.config.suite:
        students = train_students(bench, folder, progress)
        curves.update(budget_curve(bench, students, folder, progress))
    report = Report(
        title=title,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        tool=boxfile.versions()["sdbctl"],
        verdict="",
        notes=(*notes, *_caveats(bench, students)),
        inference_cost=cost,
        models=models,
        students=students,
        curves=curves,
        environment=environment(bench.engine),
        config={
            "suite": bench.config.suite,
            "student": bench.config.student,
            "seeds": bench.config.reported,
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

    def worst(access: Sequence[str], labels: Sequence[bool]) -> str:
        """The best attack of those that the attacker can run, chosen on validation data."""
        attacks = [s for s in students.values() if s.role == "attack" and s.access in access and s.labels in labels]
        known = [s for s in attacks if s.n == max(s.n for s in attacks) and s.mean is not None]
        return max(known, key=lambda s: s.validation or 0.0).name if known else ""

    def advantage(access: Sequence[str]) -> Advantage:
        own = [s for s in students.values() if s.role == "attack" and s.access == access[0] and s.mean is not None]
        if not own:
            return Advantage()
        unlabelled = difference(worst(access, [False]), "control_unlabelled") if access[0] == "api" else Interval()
        return Advantage(difference(worst(access, [True, False]), "control"), unlabelled)

    return {
        "unauthorized_advantage": UnauthorizedAdvantage(api=advantage(["api"]), file=advantage(["file", "api"])),
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
    held = report.unauthorized_advantage.file.labelled
    if held.mean is None:
        file = "Attackers who hold the file were not tried"
    else:
        most = f", at most {held.high:+.1f}" if held.high is not None else ""
        file = f"Who holds the file gains {held.mean:+.1f}{most}"
    return f"{finding}; {worth}{key}. {file}."


def _caveats(bench: Bench, students: Mapping[str, Student]) -> list[str]:
    notes = []
    if students:
        notes.append(
            f"Students see {len(bench.transfer):,} transfer images for {bench.config.recipe.epochs} epochs; short "
            "training exaggerates what distillation gives."
        )
        if bench.config.reported < 5:
            notes.append(f"n = {bench.config.reported}: a headline needs 5 seeds.")
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
