"""The students of an evaluation: what one is, and what it is trained with."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sdbctl import boxfile, metrics
from sdbctl.attacks import ATTACKS, Config
from sdbctl.data import ImageSet, Preprocess
from sdbctl.distill import distill
from sdbctl.engine import Engine, peak_memory
from sdbctl.inference import accuracy, predict
from sdbctl.key import correlation
from sdbctl.suites import BY_NAME, WITH_KEY, Row, Suite, asks, suite
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
    *("box", "boxstep", "boxing", "objectives", "checkpoint", "seal", "errors", "files", "state", "timing"),
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
        """The same, with what answers to attackers look like that say nothing but the class, on validation images.

        With a wrong key most images may be of one class, so that only plain ones tell how the others are answered.
        """
        asked = {name for row in self.rows() if asks(row) for name in row.teachers}
        sources = dict(self.sources)
        plain: Tensor | None = None
        for name in sorted(asked, key=lambda name: name != "boxed"):
            teacher = sources[name].open(self.engine.device, self.classes)
            answers = predict(teacher.logits, self.validation, self.preprocess, self.engine)
            sources[name] = replace(sources[name], levels=metrics.usual(answers, plain))
            plain = sources[name].levels if name == "boxed" else plain
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

    def share(self, images: int | None) -> float:
        """The part of a whole run that a student of so many images takes, of all of them if None."""
        return 1.0 if images is None else self.passes(images) * images / len(self.transfer)

    def work(self, cell: Cell) -> float:
        """How many whole runs one student takes."""
        return self.share(cell.images) * self.runs(cell.row, cell.epochs)

    @property
    def secrets(self) -> list[Tensor]:
        """The key's patterns [C, H, W] in [0, 1], to judge what attackers found; of several the first opens the box."""
        known = [self.sources[name].pattern for name in WITH_KEY if name in self.sources]
        return [self.preprocess.undo(pattern) for pattern in known if pattern is not None]

    @property
    def secret(self) -> Tensor | None:
        """The first of them."""
        return next(iter(self.secrets), None)

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
        guess = made.guess
        found = (
            max((correlation(guess, secret) for secret in self.secrets), default=None) if guess is not None else None
        )
        beyond = made.beyond if source is not None and source.levels is not None else None
        trained = digest(made.student), peak_memory()
        return Outcome(validation, test, made.seconds, made.queries, found, beyond, *trained)
