"""Which students an evaluation trains: rows of the report, and suites of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from sdbctl.attacks import ATTACKS, Config
from sdbctl.errors import UsageError, check_known
from sdbctl.report import Role, Student
from sdbctl.teacher import Access
from sdbctl.wrappers import WRAPPERS


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

    @property
    def access(self) -> Literal["api", "file"]:
        """What the attacker needs to hold."""
        return "file" if ATTACKS[self.attack].access == Access.WEIGHTS else "api"

    @property
    def labels(self) -> bool:
        """Whether the attacker needs labels."""
        return ATTACKS[self.attack].labels


WRONG_KEY = "authorized_wrong_key"
"""The row that asks with a key that does not fit."""


def threatens(row: Row | Student) -> bool:
    """Whether it counts as an attack, as distilling with a pattern of one's own does."""
    return row.role == "attack" or row.name == WRONG_KEY


def asks(row: Row | Student) -> bool:
    """Whether it is an attack through the API."""
    return threatens(row) and row.access == "api"


def class_only(row: Row) -> Row:
    """The same student, who is told nothing but the predicted classes, as a row of the floor."""
    return replace(row, name=f"{row.name}_class_only", label=f"{row.label}, told classes only", role="floor")


ORIGINALS = ("reference", "original")
"""What the owner protects, fine-tuned or as it was given."""
ASSISTANTS = ("assistant", "assistant_late")
"""What may be sealed in a box: for students of few images, and of more."""
WITH_KEY = ("keyed", "keyed_2", "keyed_3")
"""What the key opens through the API, and what its other patterns do if the graph has several doors."""
NEAR_PERCENT = (10, 30, 50, 70, 90, 95, 99)
"""Correlations, in percent, of the keys that are nearly right."""
CORE = (
    Row("cross_entropy", "labels", "floor", "cross_entropy"),
    Row("label_smoothing", "smoothed labels", "floor", "label_smoothing"),
    Row("class_constant", "constant label logits", "floor", "class_constant"),
    Row("dist_constant", "DIST, constant label logits", "floor", "dist_constant"),
    Row("dist_hard", "DIST, constant top-1 logits", "floor", "dist_hard", ("boxed",)),
    Row("dist_hard_unlabelled", "DIST, constant top-1 logits, no labels", "floor", "dist_hard_unlabelled", ("boxed",)),
    Row("hard_mixed", "labels and constant top-1 logits", "floor", "hard_mixed", ("boxed",)),
    Row("hard_label", "top-1 of the box", "floor", "hard_label", ("boxed",)),
    Row("hard_constant", "constant top-1 logits", "floor", "hard_constant", ("boxed",)),
    Row("hard_distances", "top-1 distances", "floor", "hard_distances", ("boxed",)),
    Row("hard_distances_unlabelled", "top-1 distances, no labels", "floor", "hard_distances_unlabelled", ("boxed",)),
    Row("kd_original", "KD from the original", "reference", "kd", ORIGINALS),
    Row("dist_original", "DIST from the original", "reference", "dist", ORIGINALS),
    Row("kd_original_unlabelled", "KD from the original, no labels", "reference", "kd_unlabelled", ORIGINALS),
    Row("dist_original_unlabelled", "DIST from the original, no labels", "reference", "dist_unlabelled", ORIGINALS),
    Row("unauthorized", "KD from the box", "attack", "kd", ("boxed",)),
    Row("unauthorized_unlabelled", "KD from the box, no labels", "attack", "kd_unlabelled", ("boxed",)),
    Row("dist", "DIST from the box", "attack", "dist", ("boxed",)),
    Row("dist_unlabelled", "DIST from the box, no labels", "attack", "dist_unlabelled", ("boxed",)),
    Row("simple_keys", "patterns that anybody has", "attack", "simple_keys", ("boxed",)),
    Row(
        "simple_keys_unlabelled", "patterns that anybody has, no labels", "attack", "simple_keys_unlabelled", ("boxed",)
    ),
    Row("searched_key", "key that a search finds", "attack", "searched_key", ("boxed",)),
    Row(
        "searched_key_unlabelled", "key that a search finds, no labels", "attack", "searched_key_unlabelled", ("boxed",)
    ),
    Row("searched_pattern", "patterns that a search finds", "attack", "searched_pattern", ("boxed",)),
    Row(
        "searched_pattern_unlabelled",
        "patterns that a search finds, no labels",
        "attack",
        "searched_pattern_unlabelled",
        ("boxed",),
    ),
    Row("kd_q", "KD from the assistant", "target", "kd", ASSISTANTS),
    Row("dist_q", "DIST from the assistant", "target", "dist", ASSISTANTS),
    Row("authorized", "KD from the box with the key", "authorized", "kd", WITH_KEY),
    Row("dist_authorized", "DIST from the box with the key", "authorized", "dist", WITH_KEY),
    Row(WRONG_KEY, "KD from the box with a wrong key", "wrong_key", "kd", ("wrong",)),
    Row("disturbed", "KD from a box with --disturb", "disturb", "kd", ("disturbed",)),
)
ALSO = (
    Row("dkd_original", "DKD from the original", "reference", "dkd", ORIGINALS),
    Row("dkd_original_unlabelled", "DKD from the original, no labels", "reference", "dkd_unlabelled", ORIGINALS),
    Row("dkd_q", "DKD from the assistant", "target", "dkd", ASSISTANTS),
    Row("dkd_authorized", "DKD from the box with the key", "authorized", "dkd", WITH_KEY),
    Row("pretrained_original", "surrogate set first, original", "reference", "pretrained", ORIGINALS),
    Row(
        "pretrained_original_unlabelled",
        "surrogate set first, original, no labels",
        "reference",
        "pretrained_unlabelled",
        ORIGINALS,
    ),
    Row("pretrained_q", "surrogate set first, assistant", "target", "pretrained", ASSISTANTS),
    Row("pretrained_authorized", "surrogate set first, with the key", "authorized", "pretrained", WITH_KEY),
)
"""What an attacker may do with the box, owners and key holders may do, too."""
NEAR = (
    *(
        Row(f"near_key_{percent}", f"KD, key correlation 0.{percent}", "wrong_key", "kd", (f"near_{percent}",))
        for percent in NEAR_PERCENT
    ),
    Row("overheard_key", "DIST, key heard in ten queries", "wrong_key", "dist", ("overheard",)),
)
WRAPPED = tuple(
    Row(f"wrapped_{name.replace('-', '_')}", f"KD behind {name}", "baseline", "kd", (name,)) for name in WRAPPERS
)
EXTRA = tuple(
    Row(name, attack.summary, attack.role, name, ("boxed",) if attack.access > Access.NONE else ())
    for name, attack in ATTACKS.items()
    if name not in {row.attack for row in CORE}
)
ALL = (*CORE, *ALSO, *NEAR, *WRAPPED, *EXTRA)
BY_NAME = {row.name: row for row in ALL}
REPORTED = (
    *BY_NAME,
    *(class_only(row).name for row in ALL if asks(row)),
    "control",
    "control_unlabelled",
)
"""Names of students that a report may have."""
MINOR = {row.name for row in (*NEAR, *WRAPPED)}
"""Rows that are no headline."""
TUNED: Mapping[Role, int] = {"disturb": 1, "baseline": 1}
"""Configurations at most of rows that are shown beside the comparison: plain distillation, as most papers report."""
USUAL = 6
"""Configurations per row at most where a suite does not try all, and of :data:`MINOR` rows."""
EVERY = max(len(attack.grid) for attack in ATTACKS.values())
"""As many configurations as any attack has."""
ALWAYS = ("cross_entropy", "label_smoothing", "kd_original", "unauthorized", "authorized", "authorized_wrong_key")
"""Rows that are reported even if others of their group are better: what every paper has."""
TWINS = {row.name: ATTACKS[row.attack].twin for row in ALL if row.role == "attack" and ATTACKS[row.attack].twin}
"""Rows of attacks, and the same loss without soft outputs: where the attack is reported, so is this."""
FINALISTS = 2
"""Attacks of a threat that are held against the control."""
PLACES: Mapping[Role, int] = {"floor": 2, "attack": FINALISTS}
"""Rows of a group that are trained with all seeds, where not one: one screening picks its winner partly by luck."""


@dataclass(frozen=True)
class Suite:
    """A fixed set of students.

    Attributes:
        summary: One line for people.
        rows: Which rows.
        tune: Configurations per row at most, unless the user asks for others.
        rungs: Shares of the epochs after which candidates are compared: most are dropped after each but the last,
            which names the winner.
        elect: Whether the rows of one threat compete, so that only the best two of each get all seeds.
        seeds: Students per reported row, or None for the user's choice.
        student: Architecture of the students unless the user asks for another.
        epochs: Passes over the transfer set unless the user asks for others, or None for the usual number.
        curves: Whether query budgets are measured.
        foreign: Whether it is about attackers who have images of another data set, and so cannot be run without.
    """

    summary: str
    rows: tuple[Row, ...]
    tune: int = USUAL
    rungs: tuple[float, ...] = (1.0,)
    elect: bool = False
    seeds: int | None = None
    student: str = "wrn16"
    epochs: int | None = None
    curves: bool = False
    foreign: bool = False

    def alone(self, row: Row) -> bool:
        """Whether a row is reported whatever others do, since it is what claims are made against or for."""
        # nor do defences compete to be the worst
        return (
            not self.elect
            or row.role in ("disturb", "authorized", "target")
            or (row.role == "reference" and row.labels)
            # whether a search finds a pattern, one seed does not tell
            or ATTACKS[row.attack].searches
        )

    def compared(self, row: Row) -> tuple[float, ...]:
        """Shares of the epochs after which a row's settings are compared: a claim is not left to a short screening."""
        return self.rungs[-1:] if self.alone(row) else self.rungs

    def group(self, row: Row) -> str:
        """Rows with the same name compete for one place in the report."""
        if row.name in MINOR or self.alone(row):
            return row.name
        # a pattern of one's own is an attack like any other
        threat = row.access if row.role in ("attack", "wrong_key") else row.role
        return threat if row.labels else f"{threat}, unlabelled"


def _named(*names: str) -> tuple[Row, ...]:
    return tuple(BY_NAME[name] for name in names)


SUITES: Mapping[str, Suite] = {
    "quick": Suite(
        "ten small students or twelve, one seed, few epochs, nothing tuned: a smoke test",
        _named(
            "cross_entropy",
            "label_smoothing",
            "class_constant",
            "dist_hard",
            "kd_original",
            "unauthorized",
            "dist",
            "fine_tuned",
            "authorized",
            "authorized_wrong_key",
        ),
        tune=1,
        seeds=1,
        student="resnet8",
        epochs=6,
    ),
    "core": Suite("the floor and tuned distillation, without, with and with a wrong key", CORE),
    "strong": Suite(
        "what decides most standard evaluations: the floor, KD, DIST, DKD, pre-training, attacks on files that won one",
        (
            *CORE,
            *ALSO,
            *_named(
                *(
                    f"{name}{who}"
                    for name in (
                        "dkd",
                        "dkd_hard",
                        "amplified_answers",
                        "amplified",
                        "reestimated",
                        "pretrained",
                        "pretrained_hard",
                        "pretrained_held",
                        "pretrained_searched",
                    )
                    for who in ("", "_unlabelled")
                ),
                "pruned",
            ),
        ),
        rungs=(1 / 8, 1 / 2),
        elect=True,
    ),
    "file": Suite(
        "who holds the file: its attacks, the floor and the original, the two best of each with all seeds",
        tuple(row for row in ALL if row.role in ("floor", "reference") or row.access == "file"),
        tune=EVERY,
        rungs=(1 / 8, 1 / 2),
        elect=True,
    ),
    "foreign": Suite(
        "who has images of another data set, and how users of the original and key holders learn from them",
        tuple(row for row in ALL if ATTACKS[row.attack].surrogate or row.name in ALWAYS),
        foreign=True,
    ),
    "standard": Suite(
        "every attack, the two best of each threat with all seeds",
        ALL,
        tune=EVERY,
        rungs=(1 / 8, 1 / 2),
        elect=True,
        curves=True,
    ),
    "full": Suite("every attack, tuned, with all seeds", ALL, tune=EVERY, curves=True),
}


def suite(name: str, *, foreign: bool = True) -> Suite:
    """A suite by name.

    Raises:
        UsageError: There is none of this name, or it cannot be run without ``foreign`` images.
    """
    check_known("suite", name, SUITES)
    if SUITES[name].foreign and not foreign:
        raise UsageError(f"suite {name} asks about images of another data set", "give --surrogate SPEC")
    return SUITES[name]


@dataclass(frozen=True)
class Option:
    """A candidate: one way to train a row's student."""

    row: Row
    teacher: str
    config: Config
