"""The students of an evaluation: what one is, what it is trained with, and where it runs."""

from __future__ import annotations

import functools
import hashlib
import json
import pickle
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdbctl import boxfile, files, metrics
from sdbctl.attacks import ATTACKS, Config
from sdbctl.data import ImageSet, Preprocess
from sdbctl.distill import distill
from sdbctl.engine import Engine, peak_memory
from sdbctl.errors import EnvironmentFailure, SdbError
from sdbctl.inference import accuracy, predict
from sdbctl.key import correlation
from sdbctl.report import codec
from sdbctl.suites import BY_NAME, Row, Suite, asks, suite
from sdbctl.teacher import Access, ClosedTeacher, KeyedTeacher, OnnxTeacher, Record, Teacher, TorchTeacher
from sdbctl.training import Progress, digest
from sdbctl.updates import Recipe, scaled
from sdbctl.wrappers import WrappedTeacher


@dataclass(frozen=True)
class Source:
    """A teacher that can be sent to another process.

    Attributes:
        net: A torch network, or None.
        onnx: An ONNX file, or None.
        pattern: Normalised key pattern [C, H, W] to embed, or None.
        strength: λ of the embedding.
        sha256: Identity of the weights, for caching.
        stand_in: A network that computes what the ONNX file does, for a GPU that ONNX Runtime cannot use, or None.
        held: The network inside the ONNX file, for attackers who hold it, or None.
        held_sha256: Identity of its weights.
        wrapper: Name in :data:`sdbctl.wrappers.WRAPPERS` that answers pass, or "".
        levels: What answers look like that say nothing but the predicted class, or None.
    """

    net: nn.Module | None = None
    onnx: Path | None = None
    stand_in: nn.Module | None = None
    pattern: Tensor | None = field(default=None, repr=False)
    strength: float = 0.0
    sha256: str = ""
    held: nn.Module | None = None
    held_sha256: str = ""
    wrapper: str = ""
    levels: Tensor | None = None

    @property
    def weights(self) -> nn.Module | None:
        """What an attacker who holds the file can train."""
        return self.held if self.net is None else self.net

    def open(self, device: torch.device, classes: int) -> Teacher:
        """Start the teacher on a device, in full precision, as ONNX Runtime has it: none is better for its rounding."""
        teacher: Teacher
        net = self.stand_in or self.net
        if net is not None:
            teacher = TorchTeacher(net, classes, Engine(device))
        else:
            assert self.onnx is not None
            teacher = OnnxTeacher(self.onnx, device)
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
        tune: Configurations to try per attack and teacher at most, in the attack's order; None for the suite's number.
        jobs: Students trained side by side, each in its own process.
        cluster: Where jobs run: None for this machine's processes, or a submitit cluster such as ``slurm``.
        suite: Name in :data:`sdbctl.suites.SUITES`, or None to train no student at all.
    """

    student: str = "wrn16"
    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=20, lr=0.1))
    seeds: int = 5
    tune: int | None = None
    jobs: int = 1
    cluster: str | None = None
    suite: str | None = "core"

    @property
    def chosen(self) -> Suite:
        """The suite, or one without rows."""
        return suite(self.suite) if self.suite else Suite("no students", ())

    @property
    def reported(self) -> int:
        """Students per reported row."""
        return self.chosen.seeds or self.seeds

    @property
    def tuned(self) -> int:
        """Configurations per attack and teacher at most."""
        return self.tune or self.chosen.tune


INDIFFERENT = {
    *("__init__", "__main__", "cli", "demo", "bench", "report", "evaluate", "protocol", "curves", "suites", "sources"),
    *("box", "boxing", "objectives", "checkpoint", "seal", "errors", "files", "state", "timing"),
}
"""Modules that have no part in what a student becomes: those of boxes, of whole evaluations, and of what is shown."""


@functools.cache
def code() -> str:
    """Hash of the modules that decide what a student becomes, so that a changed attack is run again."""
    root, hashed = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).parts[0].removesuffix(".py") not in INDIFFERENT:
            hashed.update(path.read_bytes())
    return hashed.hexdigest()


MOST_PASSES = 4
"""How many times more epochs a student of few images is trained at most."""


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
        limited: Whether the teacher tells nothing but the predicted class.
    """

    row: str
    teacher: str
    config: Config
    seed: int
    final: bool
    epochs: int | None = None
    images: int | None = None
    limited: bool = False

    @property
    def id(self) -> str:
        """What tells cells of one evaluation apart."""
        return json.dumps(asdict(self), sort_keys=True, default=dict)


@dataclass(frozen=True)
class Outcome:
    """One trained student: accuracies in percent, the test accuracy only for reported ones.

    ``correlation`` is that of the secret pattern with what an attack on the key found; ``beyond`` is how many answers
    said more than the predicted class, or None if nobody knows what that is; ``digest`` tells students apart;
    ``memory`` is the most that its process has held, in bytes.
    """

    validation: float
    test: float | None
    seconds: float
    queries: int
    correlation: float | None = None
    beyond: int | None = None
    digest: str = ""
    memory: int = 0


@dataclass(frozen=True)
class _Kept:
    """The file of one student; the row is for who looks into it."""

    row: str
    outcome: Outcome


@dataclass
class Spent:
    """What the students of an evaluation cost, filled while it runs.

    Attributes:
        earlier: Seconds of the students that runs before this one trained, by what tells them apart.
        memory: The most bytes that one of them needed.
    """

    earlier: dict[str, float] = field(default_factory=dict)
    memory: int = 0


@dataclass(frozen=True)
class Bench:
    """Everything a worker needs to train students.

    Attributes:
        sources: Teachers by name: boxed, keyed, wrong, original, reference, assistant, disturbed; some may be missing.
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
        spent: What the students cost.
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
    spent: Spent = field(default_factory=Spent)

    def rows(self) -> list[Row]:
        """The rows whose teachers are there, and which the attacker can try on them."""
        return [
            replace(row, teachers=tuple(name for name in row.teachers if name in self.sources))
            for row in self.config.chosen.rows
            if self._possible(row)
        ]

    def telling_classes(self) -> Bench:
        """The same, with what answers to attackers look like that say nothing but the class, on validation images."""
        asked = {name for row in self.rows() if asks(row) for name in row.teachers}
        sources = dict(self.sources)
        for name in sorted(asked):
            teacher = sources[name].open(self.engine.device, self.classes)
            answers = predict(teacher.logits, self.validation, self.preprocess, self.engine)
            sources[name] = replace(sources[name], levels=metrics.usual(answers))
        return replace(self, sources=sources)

    def _possible(self, row: Row) -> bool:
        boxed, attack = self.sources.get("boxed"), ATTACKS[row.attack]
        return (
            (not row.teachers or any(name in self.sources for name in row.teachers))
            and (row.access == "api" or (boxed is not None and boxed.weights is not None))
            and (self.strength > 0 or not attack.on_key)
            and (self.surrogate is not None or not attack.surrogate)
        )

    def recipe(self, cell: Cell) -> Recipe:
        """How a student is trained: of few images on more passes over the same queries, or it would learn nothing."""
        recipe = scaled(self.config.recipe, seed=cell.seed, epochs=cell.epochs)
        if cell.images is None:
            return recipe
        return scaled(
            recipe,
            epochs=recipe.epochs * self.passes(cell.images),
            batch_size=min(recipe.batch_size, max(8, cell.images // 4)),
        )

    def passes(self, images: int) -> int:
        """How many times more epochs a student of so few images is trained."""
        return min(MOST_PASSES, len(self.transfer) // images)

    def key(self, cell: Cell) -> str:
        """Content hash of a cell, under which its outcome is kept."""
        source = self.sources[cell.teacher].sha256 if cell.teacher else ""
        name = BY_NAME[cell.row].attack
        attack = ATTACKS[name]
        images = [
            self.transfer,
            self.validation,
            self.test if cell.final else None,
            self.surrogate if attack.surrogate else None,
        ]
        parts = [
            boxfile.versions(),
            code(),
            self.engine.precision,
            self.engine.device.type,
            name,
            source,
            # what a key is compared with, and the weights in an ONNX file
            self.sources["keyed"].sha256 if "keyed" in self.sources and attack.on_key else "",
            self.sources[cell.teacher].held_sha256 if cell.teacher and attack.access == Access.WEIGHTS else "",
            dict(cell.config),
            asdict(self.recipe(cell)),
            cell.final,
            cell.images,
            cell.limited,
            self.config.student,
            self.fingerprint,
            self.preprocess.to_dict(),
            [some.identity if some is not None else "" for some in images],
        ]
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def runs(self, row: str, epochs: int | None = None) -> float:
        """How many whole runs on the transfer set a student takes."""
        whole = len(self.transfer) * self.config.recipe.epochs
        own = len(self.transfer) * (epochs or self.config.recipe.epochs)
        foreign = len(self.surrogate) if self.surrogate is not None else 0
        return (own + ATTACKS[BY_NAME[row].attack].extra(own, foreign)) / whole

    @property
    def secret(self) -> Tensor | None:
        """The secret pattern [C, H, W] in [0, 1], to judge what attackers found."""
        pattern = self.sources["keyed"].pattern if "keyed" in self.sources else None
        if pattern is None:
            return None
        return self.preprocess.undo(pattern)

    def record(self, teacher: str) -> Record | None:
        """Where this teacher's answers are kept."""
        if self.answers is None or not teacher:
            return None
        where = [self.engine.device.type, self.engine.precision]
        parts = [self.sources[teacher].sha256, where, self.preprocess.to_dict(), boxfile.versions(), code()]
        return Record(self.answers, json.dumps(parts, sort_keys=True))

    def run(self, cell: Cell, progress: Progress | None = None) -> Outcome:
        """Train and measure one student."""
        config, source = self.config, self.sources[cell.teacher] if cell.teacher else None
        attack = ATTACKS[BY_NAME[cell.row].attack]
        teacher = None
        if source and attack.asks:
            teacher = ClosedTeacher(self.classes, partial(source.open, self.engine.device, self.classes))
        made = distill(
            attack,
            cell.config,
            teacher,
            config.student,
            self.classes,
            self.transfer if cell.images is None else self.transfer.take(range(cell.images)),
            self.preprocess,
            self.recipe(cell),
            self.engine,
            weights=source.weights if source else None,
            surrogate=self.surrogate,
            strength=self.strength,
            views=cell.epochs or config.recipe.epochs,
            record=self.record(cell.teacher),
            levels=source.levels if source else None,
            limited=cell.limited,
            progress=progress,
        )
        validation = accuracy(made.student, self.validation, self.preprocess, self.engine)
        test = accuracy(made.student, self.test, self.preprocess, self.engine) if cell.final else None
        found = correlation(made.guess, self.secret) if made.guess is not None and self.secret is not None else None
        beyond = made.beyond if source is not None and source.levels is not None else None
        trained = digest(made.student), peak_memory()
        return Outcome(validation, test, made.seconds, made.queries, found, beyond, *trained)


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
            bench.spent.earlier.setdefault(cell.id, stored.seconds)
            bench.spent.memory = max(bench.spent.memory, stored.memory)
        elif cell not in todo:
            todo.append(cell)
    if done:
        progress.note(f"{len(done)} students were trained before")
        progress.advance(len(done), {})

    def finish(cell: Cell, outcome: Outcome) -> None:
        done[cell.id] = outcome
        bench.spent.earlier[cell.id] = 0.0
        bench.spent.memory = max(bench.spent.memory, outcome.memory)
        if folder is not None:
            _keep(bench, cell, outcome, folder)
        progress.advance(1, {"validation": outcome.validation})

    # those who hold weights train more than one network: begun last, they would be waited for
    todo.sort(key=lambda cell: (-bench.runs(cell.row, cell.epochs), -ATTACKS[BY_NAME[cell.row].attack].access))
    jobs = min(bench.config.jobs, len(todo))
    if bench.config.cluster and todo:
        assert folder is not None
        _on_cluster(bench, todo, folder, finish)
    elif jobs <= 1:
        # the last of many has the threads of the others, whose number decides how sums are rounded
        with as_worker(bench.config.jobs):
            _finish_all(((cell, partial(bench.run, cell)) for cell in todo), finish)
    else:
        with workers(bench) as pool:
            running = {pool.submit(_work, cell): cell for cell in todo}
            _finish_all(((running[future], future.result) for future in as_completed(running)), finish)
    return done


def _finish_all(trained: Iterable[tuple[Cell, Callable[[], Outcome]]], finish: Callable[[Cell, Outcome], None]) -> None:
    """Collect outcomes. A student that fails does not cost the others, whose outcomes are kept; then it is an error."""
    failed: Exception | None = None
    for cell, outcome in trained:
        try:
            result = outcome()
        except BrokenProcessPool:
            raise
        except Exception as error:
            if isinstance(error, SdbError):
                error.message = f"{cell.row}: {error.message}"
            failed = failed or error
        else:
            finish(cell, result)
    if failed:
        raise failed


_open: ContextVar[tuple[Bench, ProcessPoolExecutor] | None] = ContextVar("_open", default=None)


def threads_of(jobs: int) -> int:
    """Threads of each of some processes side by side."""
    return max(1, torch.get_num_threads() // jobs)


@contextmanager
def as_worker(jobs: int) -> Iterator[None]:
    """Compute with as many threads as one of some processes has, to measure how long it takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads_of(jobs))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def workers(bench: Bench) -> Iterator[ProcessPoolExecutor]:
    """The processes that train students of a bench; those within share them, so that they start once."""
    import multiprocessing

    known = _open.get()
    if known is not None and known[0] is bench:
        yield known[1]
        return
    jobs = bench.config.jobs
    # each starts when there is work for it
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start_worker, (bench, threads_of(jobs)))
    before = _open.set((bench, pool))
    try:
        yield pool
    except BrokenProcessPool:
        raise EnvironmentFailure(
            "a process that trained a student was ended, perhaps for lack of memory", "run it again with fewer --jobs"
        ) from None
    finally:
        _open.reset(before)
        # shutdown forgets them, and the interpreter would wait for those that are busy
        started = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in started:
            process.terminate()


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


def cluster_library() -> Any:
    """The module submitit.

    Raises:
        EnvironmentFailure: It is not installed.
    """
    try:
        import submitit
    except ImportError:
        raise EnvironmentFailure("--cluster needs submitit", "in its source: pip install '.[cluster]'") from None
    return submitit


def _on_cluster(bench: Bench, todo: Sequence[Cell], folder: Path, finish: Callable[[Cell, Outcome], None]) -> None:
    """Share the students among jobs of a cluster, which leave an outcome file each.

    The jobs read images, networks and the key's pattern from a folder that only its owner can read and that is
    removed at the end.
    """
    submitit = cluster_library()
    with tempfile.TemporaryDirectory(prefix=".cluster-", dir=folder.parent) as private:
        shared = Path(private) / "bench"
        shared.touch(mode=0o600)
        shared.write_bytes(pickle.dumps(bench))
        executor = submitit.AutoExecutor(folder=private, cluster=bench.config.cluster)
        executor.update_parameters(name="sdbctl", timeout_min=24 * 60, cpus_per_task=torch.get_num_threads())
        if bench.engine.device.type == "cuda":
            executor.update_parameters(gpus_per_node=1)
        count = min(max(1, bench.config.jobs), len(todo))
        jobs = [executor.submit(work_through, shared, todo[number::count], folder) for number in range(count)]
        try:
            left = list(todo)
            while left:
                over = all(job.done() for job in jobs)
                for cell in list(left):
                    outcome = _stored(bench, cell, folder)
                    if outcome is not None:
                        left.remove(cell)
                        finish(cell, outcome)
                if left and over:
                    failed = next((error for job in jobs if (error := job.exception()) is not None), None)
                    lines = [
                        line for line in str(failed).splitlines() if re.match(r"[\w.]+(Error|Exception|Input)\b", line)
                    ]
                    reason = lines[-1] if lines else f"{failed or 'no reason was given'}".splitlines()[0]
                    raise SdbError(f"{len(left)} students were not trained: {reason}", "run it again; it resumes")
                time.sleep(0.5 if left else 0)
        finally:
            for job in jobs:
                if not job.done():
                    job.cancel(check=False)


def work_through(shared: Path, cells: Sequence[Cell], folder: Path) -> None:
    """What one cluster job does: train its students, each into a file."""
    bench: Bench = pickle.loads(shared.read_bytes())
    for cell in cells:
        if _stored(bench, cell, folder) is None:
            _keep(bench, cell, bench.run(cell), folder)


def _keep(bench: Bench, cell: Cell, outcome: Outcome, folder: Path) -> None:
    files.write(folder / f"{bench.key(cell)}.json", json.dumps(codec.encode(_Kept(cell.row, outcome))))


def _stored(bench: Bench, cell: Cell, folder: Path | None) -> Outcome | None:
    if folder is None:
        return None
    try:
        content = codec.parse((folder / f"{bench.key(cell)}.json").read_bytes())
        return codec.decode(_Kept, content).outcome
    except (OSError, ValueError, RecursionError):
        return None
