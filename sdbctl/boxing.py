"""A box run from the reference to the file: whom the key opens, what is sealed, and how it goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from sdbctl import boxfile, seal, team
from sdbctl.attacks import ATTACKS
from sdbctl.box import Boxed, box, estimate, fine_tune
from sdbctl.boxfile import Loaded, Metadata
from sdbctl.boxstep import TEACHERS, BoxConfig, Task
from sdbctl.data import Splits
from sdbctl.distill import build_student, distill
from sdbctl.errors import BadInput, UsageError
from sdbctl.key import Key
from sdbctl.state import Resume, differences
from sdbctl.teacher import TorchTeacher
from sdbctl.timing import image_seconds
from sdbctl.training import Named, Progress, Silent, digest
from sdbctl.updates import Recipe, scaled

TRIED = Recipe(epochs=20, batch_size=64, lr=0.1)
"""Training of the small students that compare teachers."""
TRIED_STUDENT = "resnet8"
"""Their architecture."""
TRIED_IMAGES = 2000
"""Validation images that they learn from, at most."""
TRIED_SEEDS = 2
"""Students of each teacher."""
WORTH = 1.0
"""Points by which the original must teach better than the reference, or an assistant than both, to be taken."""
ASSISTED_IMAGES = (150_000, 300_000)
"""Images that the assistant for students of few images sees, and the one for those of more."""
ASSISTED_EPOCHS = 40
"""Passes over the owner's images in which it sees them, at most."""
ASSISTANT_SEED = 20_000
"""Its seed, which no student has."""


def assisted_epochs(images: int) -> list[int]:
    """How often assistants see each of so many images, in rising order."""
    return sorted({min(ASSISTED_EPOCHS, max(1, round(seen / images))) for seen in ASSISTED_IMAGES})


def assist(
    reference: nn.Module,
    task: Task,
    epochs: int,
    *,
    progress: Progress | None = None,
    resume_from: Path | None = None,
) -> nn.Module:
    """A teaching assistant: the reference, distilled into a small network on the owner's images (KD, τ = 4, α = 0.9).

    What a small network has learned another can learn, too, and from fewer images (Mirzadeh et al., AAAI 2020, for one
    that is between teacher and student in size). It is less accurate than the reference, and a box whose key opens it
    pays for being both. The longer it is taught, the more images its students need.
    """
    attack, engine = ATTACKS["kd"], replace(task.engine, profile=None)
    images = task.data.owner.first(ASSISTED_IMAGES[-1])
    return distill(
        attack,
        attack.grid[0],
        TorchTeacher(reference, len(task.classes), engine),
        TRIED_STUDENT,
        len(task.classes),
        images,
        task.preprocess,
        scaled(Recipe(), epochs=epochs, seed=ASSISTANT_SEED),
        engine,
        progress=Named(progress or Silent(), "assistant"),
        resume_from=[Resume(resume_from, describe_assistant(reference, task, epochs).run)] if resume_from else [],
    ).student


def describe_assistant(reference: nn.Module, task: Task, epochs: int) -> Metadata:
    """What is said of the assistant of a reference, but for what is measured."""
    return task.describe(
        kind="assistant",
        architecture=TRIED_STUDENT,
        objective="kd",
        parameters={"reference": digest(reference), "epochs": epochs},
    )


def sealed(assistants: Sequence[tuple[nn.Module, Metadata]], box: Metadata, keys: Sequence[Key]) -> str:
    """Assistants, with their own metadata, as only key holders of a box can read them."""
    return seal.seal([boxfile.dump(net.state_dict(), meta) for net, meta in assistants], keys, box.origin)


def what_students_learn(
    teachers: Mapping[str, nn.Module], task: Task, *, progress: Progress | None = None
) -> dict[str, float]:
    """How good small students of some teachers become: mean top-1 by the teacher's name, in percent.

    A more accurate teacher need not be the better one. Half of the validation images, at most :data:`TRIED_IMAGES`, are
    distilled by DIST at τ = 4; the others judge.
    """
    images, attack, engine = task.data.validation, ATTACKS["dist"], replace(task.engine, profile=None)
    count = tried_images(task.data)
    some, others = images.take(range(count)).alone(), images.take(range(count, len(images)))
    learned = {}
    for name, net in teachers.items():
        teacher = TorchTeacher(net, len(task.classes), engine)
        students = [
            distill(
                attack,
                attack.grid[0],
                teacher,
                TRIED_STUDENT,
                len(task.classes),
                some,
                task.preprocess,
                scaled(TRIED, seed=seed, batch_size=max(TRIED.batch_size, 2 * team.size())),
                engine,
                progress=Named(progress or Silent(), f"student {seed + 1} of the {name}"),
            ).student
            for seed in range(TRIED_SEEDS)
        ]
        learned[name] = sum(task.top1(student, others) for student in students) / TRIED_SEEDS
    return learned


def tried_images(data: Splits) -> int:
    """On how many images teachers are compared."""
    return min(TRIED_IMAGES, len(data.validation) // 2)


def better_teacher(learned: Mapping[str, float]) -> str:
    """Whom the key should open: the reference, unless students learn clearly more from the original."""
    return "original" if learned["original"] - learned["reference"] > WORTH else "reference"


def worth_sealing(learned: Mapping[str, float]) -> bool:
    """Whether students learn clearly more from the assistant than from the others."""
    return learned["assistant"] - max(top1 for name, top1 in learned.items() if name != "assistant") > WORTH


def reference_of(path: Path, original: Loaded) -> Loaded:
    """The reference N_ft in a file.

    Raises:
        BadInput: It is none of this checkpoint.
    """
    found = boxfile.load(path)
    if found.meta is None or found.meta.kind != "reference" or found.meta.original_sha256 != original.sha256:
        raise BadInput(f"{path} is no reference of this checkpoint", "name the one that box wrote")
    return found


def recipe_in(reference: Loaded, other: Recipe) -> Recipe:
    """How a reference was trained, as its file says, or another recipe if that says nothing that can be read."""
    assert reference.meta is not None
    try:
        return Recipe(**reference.meta.parameters["recipe"])
    except (KeyError, TypeError, UsageError):
        return other


@dataclass
class Kept:
    """A network that is made when it is first needed, and kept in a file for a run that goes on.

    Attributes:
        path: The file.
        make: Trains it.
        describe: What decides it, which may depend on a network that is made before.
        state: Its weights as the file names them.
        part: Where its training is kept until it is finished, or None.
        net: The network, once there is one.
        learned: What students learned from it and its rivals, if it was found and its file says so.
        sha256: Hash of its file.
    """

    path: Path
    make: Callable[[], nn.Module]
    describe: Callable[[], Metadata]
    state: Callable[[nn.Module], Mapping[str, Tensor]] = nn.Module.state_dict
    part: Path | None = None
    net: nn.Module | None = None
    learned: Mapping[str, float] = field(default_factory=dict)
    sha256: str = ""

    def take(self, found: Loaded) -> None:
        """Have what was made before."""
        assert found.meta is not None
        self.net, self.sha256 = found.net, found.sha256
        # a file says anything, and what else it measured is no accuracy of a student
        numbers = {name: value for name, value in found.meta.measured.items() if isinstance(value, int | float)}
        self.learned = {name: numbers[name] for name in TEACHERS if name in numbers}

    def look(self) -> None:
        """Have what an interrupted run left, if that was the same run."""
        if self.path.exists():
            try:
                found = boxfile.load(self.path)
            except BadInput:
                raise BadInput(f"resume file {self.path} is damaged", "delete it to start over") from None
            if found.meta is not None and found.meta.run == self.describe().run:
                self.take(found)

    def get(self) -> nn.Module:
        """The network: what there is, else made and kept."""
        if self.net is None:
            self.net = self.make()
            self.keep({})
            if self.part is not None:
                Resume(self.part, {}).done()
        return self.net

    def keep(self, learned: Mapping[str, float]) -> None:
        """Write it, with what students learned."""
        meta = replace(self.describe(), measured=learned)
        self.sha256 = boxfile.save(self.path, self.state(self.get()), meta, force=True)


@dataclass
class Run:
    """A whole box run: made with what an interrupted one left, and called to do the rest.

    Attributes:
        original: The checkpoint.
        keys: The secret keys.
        task: The owner's data.
        config: How to box.
        auto: Whether the key opens whom students learn more from, reference or original.
        seal: Whether assistants are sealed in the file; None if students learn more from them.
        output: File of the box.
        place: File of the reference N_ft.
        states: Files that stay until the box is written: of its training, of the reference's, of the assistants, of
            their trainings.
        found: The reference, if it is there.
        given: Whether that one was asked for: its recipe may be another, and its file is left as it is.
        resume: Whether to go on from the states.
        force: Whether to replace an existing box.
        progress: Where progress goes.

    Raises:
        UsageError: The reference was made with other settings.
    """

    original: Loaded
    keys: Sequence[Key]
    task: Task
    config: BoxConfig
    auto: bool
    seal: bool | None
    output: Path
    place: Path
    states: Sequence[Path]
    found: Loaded | None
    given: bool
    resume: bool
    force: bool
    progress: Progress

    def __post_init__(self) -> None:
        if not self.config.keyed:
            self.seal = bool(self.seal)
        if not (self.config.keyed and self.config.trained):
            self.config, self.auto = replace(self.config, teacher="reference"), False
        self.reference = self._reference()
        self.lengths = assisted_epochs(len(self.task.data.owner))
        self.assistants = [self._assistant(*one) for one in zip(self.lengths, self.states[2:4], strict=False)]
        if self.found is not None and self.found.meta is not None:
            before, now = self.found.meta.run, self.reference.describe().run
            if not self.given and (other := "; ".join(differences(before, now))):
                raise UsageError(
                    f"{self.place} was made with other settings ({other})",
                    "use those, delete it, or give it with --reference",
                )
            self.reference.take(self.found)
            self.progress.note("the reference was finished before")
            if self.found.meta.data != self.reference.describe().data:
                self.reference.learned = {}
                self.progress.note("it was made with other splits: it may have seen images that judge the box")
        team.agree(int(self.found is None), "the finished reference")
        if self.found is not None and self.resume:
            for assistant in self.assistants:
                assistant.look()
        team.agree(sum(assistant.net is not None for assistant in self.assistants), "the finished assistants")
        self.learned = dict(pair for kept in (self.reference, *self.assistants) for pair in kept.learned.items())
        # who is in question; where nothing is trained, nothing of the box is the original as it was given
        others = TEACHERS if self.config.trained else tuple(name for name in TEACHERS if name != "original")
        self.rivals: tuple[str, ...] = others if self.seal is None else TEACHERS[:2] if self.auto else ()
        self.compared = self.learned.keys() >= set(self.rivals)
        if self.compared:
            self._decide()

    def _reference(self) -> Kept:
        original, task, recipe = self.original, self.task, self.config.recipe
        described = task.describe(
            kind="reference",
            architecture=original.architecture,
            objective="cross_entropy",
            parameters={"recipe": asdict(recipe)},
            original_sha256=original.sha256,
        )

        def make() -> nn.Module:
            return fine_tune(original, task, recipe, progress=self.progress, resume_from=self.states[1])

        return Kept(self.place, make, lambda: described, original.file_state)

    def _assistant(self, epochs: int, path: Path) -> Kept:
        reference, task, part = self.reference, self.task, self.states[2 + self.states.index(path)]
        return Kept(
            path,
            lambda: assist(reference.get(), task, epochs, progress=self.progress, resume_from=part),
            lambda: describe_assistant(reference.get(), task, epochs),
            part=part,
        )

    def estimate(self) -> dict[str, float]:
        """Expected seconds of each part that is left, from timed training steps."""
        data, preprocess, engine, recipe = self.task.data, self.task.preprocess, self.task.engine, self.config.recipe
        images = len(data.owner)
        whole = estimate(self.config, self.original.net, preprocess, images, engine)
        parts = {"reference": whole["reference"]} if self.reference.net is None else {}
        possible = self.assistants if self.seal is None else self._wanted()
        epochs = sum(epochs for epochs, kept in zip(self.lengths, possible, strict=False) if kept.net is None)
        seen = epochs * min(images, ASSISTED_IMAGES[-1])
        if not self.compared:
            seen += len(self.rivals) * tried_images(data) * TRIED.epochs * TRIED_SEEDS
        if seen:
            student = build_student(TRIED_STUDENT, 10, preprocess.size[0], 0)
            asked = whole["reference"] / (3 * images * recipe.epochs)
            one = image_seconds(student, recipe.batch_size, images, preprocess.size, engine)
            parts["teachers"] = seen * (one + asked)
        return parts | {"box": whole["box"]}

    def __call__(self) -> Boxed:
        """Do the rest; of several processes the first one writes the box."""
        if not self.resume:
            self._forget()
        self.reference.get()
        self._teach()
        if not self.compared:
            self._compare()
            self._teach()
        made = box(
            self.original,
            self.reference.get(),
            self.keys,
            self.task,
            self.config,
            assistant=self.assistants[0].net,
            progress=self.progress,
            resume_from=self.states[0],
        )
        if team.rank() == 0:
            self._write(made)
            self._forget()
        return made

    def _wanted(self) -> list[Kept]:
        """Assistants that are needed for sure: one is enough to be compared and opened, all of them are sealed."""
        if self.seal:
            return self.assistants
        return self.assistants[:1] if self.seal is None or self.config.teacher == "assistant" else []

    def _teach(self) -> None:
        for assistant in self._wanted():
            assistant.get()

    def _compare(self) -> None:
        first = self.assistants[0]
        nets = {"reference": self.reference.get, "original": lambda: self.original.net, "assistant": first.get}
        rivals = {name: nets[name]() for name in self.rivals}
        self.learned = what_students_learn(rivals, self.task, progress=self.progress)
        keeper = first if self.given else self.reference
        if keeper.net is not None:
            keeper.keep(self.learned)
        self._decide()
        team.agree(2 * TEACHERS.index(self.config.teacher) + bool(self.seal), "the better teacher")

    def _decide(self) -> None:
        if self.auto:
            self.config = replace(self.config, teacher=better_teacher(self.learned))
        if self.seal is None:
            self.seal = worth_sealing({name: self.learned[name] for name in self.rivals})
        if self.rivals:
            reached = ", ".join(f"of the {name} {accuracy:.1f} %" for name, accuracy in self.learned.items())
            if self.config.trained:
                opened = f"the key will open the {self.config.teacher}" + (
                    ", and in the file the assistant" if self.seal else ""
                )
            else:
                opened = "key holders will be answered by the reference" + (" and the assistants" if self.seal else "")
            self.progress.note(f"small students reach {reached}: {opened}")

    def _write(self, made: Boxed) -> None:
        model, task = made.model, self.task
        parameters = {**model.meta.parameters, "sealed": bool(self.seal)}
        model.meta = replace(model.meta, parameters=parameters, reference_sha256=self.reference.sha256)
        if self.seal:
            inner = []
            for kept in self.assistants:
                measured = {"top1": round(task.top1(kept.get(), task.data.test), 3)}
                inner.append((kept.get(), replace(kept.describe(), measured=measured)))
            model.sealed = sealed(inner, model.meta, self.keys)
        boxfile.save(self.output, made.state_dict, model.meta, sealed=model.sealed, force=self.force)

    def _forget(self) -> None:
        for state in self.states:
            state.unlink(missing_ok=True)
