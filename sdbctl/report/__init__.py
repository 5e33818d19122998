"""The report of one evaluation: what was measured, as frozen dataclasses and as versioned JSON.

The JSON is the truth; ``terminal``, ``markdown``, ``html`` and ``junit`` only render it. Accuracies are in
percent and differences in points; calibration errors and confidences are fractions, losses are in nats. What
was not measured is null, and so is every number that is not finite.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sdbctl import files
from sdbctl.errors import BadInput, UsageError
from sdbctl.report import codec

SCHEMA_VERSION = 1
COST_LIMIT = 0.5
"""The price of a box is fine if the upper bound of the top-1 cost is at most this (points)."""
ADVANTAGE_LIMIT = 0.5
"""A box is undistillable if the upper bound of the unauthorized advantage is at most this, in points."""
PROTECTABLE_LIMIT = 2.0
"""Distilling the original must beat the floor by this, in points, or there is nothing to protect."""

RECOVERED = 0.9
"""A pattern with this correlation counts as the secret one."""
OPEN = 0.2
"""A box is open to a pattern through which more than this share of its answers say more than the predicted class."""

MORE_IS_BETTER = (
    "authorized_gain",
    "sealed_gain",
    "protectable",
    "protectable_unlabelled",
    "key_strength.opens_at",
    "key_strength.queries_to_recover",
)
"""Headline numbers of a report whose cautious bound is the lower one."""
VARIABLE = ("box", "config", "cost", "curves")
"""Parts of a report that hold other numbers in each."""

Role = Literal["floor", "reference", "target", "attack", "authorized", "wrong_key", "baseline", "disturb"]
MODELS = {
    "original": "original",
    "original_ft": "original, fine-tuned on the same data",
    "assistant": "assistant, sealed in the file",
    "assistant_late": "assistant taught longer, sealed in the file",
    "boxed": "boxed",
    "boxed_keyed": "boxed, with the key",
    "boxed_keyed_2": "boxed, with the key's second pattern",
    "boxed_keyed_3": "boxed, with the key's third pattern",
    "boxed_wrong_key": "boxed, with a wrong key",
    "disturbed": "boxed, with --disturb",
}


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bounds; without arguments, a number that was not measured.

    Attributes:
        mean: The estimate.
        low: Its lower 95 % bound.
        high: Its upper 95 % bound.
        n: How many paired seeds or images it rests on.
    """

    mean: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class InferenceCost:
    """What users of the boxed model lose; positive is worse, whatever the metric.

    Attributes:
        top1: Top-1 accuracy, original − boxed, in points.
        ece: Expected calibration error, boxed − original.
        nll_binary: Negative log-likelihood of the predicted class, boxed − original.
        nll: Full negative log-likelihood, boxed − original: the known price of hiding the other classes.
        top5: Top-5 accuracy, original − boxed, in points: likewise.
    """

    top1: Interval = Interval()
    ece: Interval = Interval()
    nll_binary: Interval = Interval()
    nll: Interval = Interval()
    top5: Interval = Interval()


@dataclass(frozen=True)
class Advantage:
    """Best student over all attacks − best student over the floor, in points.

    Mean and lower bound are those of the student that is named, the upper bound is the highest of all finalists.

    Attributes:
        labelled: The attacker has labels for the transfer images.
        unlabelled: The attacker has none.
        labelled_by: Name of that student in ``Report.students``.
        unlabelled_by: Likewise.
        over_smoothing: The best attacker with labels − the label-smoothing student: the weaker criterion of arXiv
            2507.00012, by which a model is undistillable if this is not positive.
    """

    labelled: Interval = Interval()
    unlabelled: Interval = Interval()
    labelled_by: str = ""
    unlabelled_by: str = ""
    over_smoothing: Interval = Interval()


@dataclass(frozen=True)
class UnauthorizedAdvantage:
    """What an attacker without the key gains.

    Attributes:
        api: The attacker queries logits or probabilities.
        file: The attacker holds the model file.
    """

    api: Advantage = Advantage()
    file: Advantage = Advantage()


@dataclass(frozen=True)
class KeyStrength:
    """How hard the key is to guess and how easily it is given away; null where nobody tried.

    Attributes:
        opens_at: Least correlation with the secret pattern, of those tried, that shows half of the dark knowledge.
        queries_to_recover: Fewest overheard keyed queries, of those tried, from which a pattern with a correlation of
            :data:`RECOVERED` was had.
        searched: Highest correlation that an attack on the key ended with, of all that were tried: it has no bounds.
        public: Share of answers that say more than the predicted class, asked through patterns that anybody has: of
            those tried the highest, in [0, 1]; None of a model that says more without any.
    """

    opens_at: Interval = Interval()
    queries_to_recover: Interval = Interval()
    searched: float | None = None
    public: float | None = None


@dataclass(frozen=True)
class Bin:
    """One bar of a reliability diagram; all three are fractions.

    Attributes:
        confidence: Mean confidence of the predictions in the bin.
        accuracy: How many of them are right.
        share: How many of all predictions fall in the bin.
    """

    confidence: float | None
    accuracy: float | None
    share: float | None


@dataclass(frozen=True, kw_only=True)
class Model:
    """How well one model serves its users.

    Attributes:
        name: Its key in ``Report.models``.
        label: Its name for people.
        top1: Top-1 accuracy in percent.
        top5: Top-5 accuracy in percent.
        ece: Expected calibration error.
        nll: Negative log-likelihood.
        nll_binary: Negative log-likelihood of the predicted class against all others.
        residual: KL(u ‖ p̂^τ) from uniform to the non-target classes: what is left of dark knowledge.
        beyond_top1: Share of images whose outputs say more than the predicted class.
        n_images: How many test images.
        reliability: Bins of the reliability diagram.
    """

    name: str
    label: str
    top1: float | None = None
    top5: float | None = None
    ece: float | None = None
    nll: float | None = None
    nll_binary: float | None = None
    residual: float | None = None
    beyond_top1: float | None = None
    n_images: int | None = None
    reliability: tuple[Bin, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Student:
    """One way to train a student, over its seeds.

    Attributes:
        name: Its key in ``Report.students``.
        label: Its name for people.
        role: What it stands for in the comparison.
        access: What the attacker needs: ``api`` or ``file``.
        labels: Whether the attacker needs labels.
        mean: Mean test accuracy in percent.
        sd: Standard deviation over seeds; null for one seed.
        n: How many seeds.
        values: Test accuracy of each seed in percent.
        validations: Validation accuracy of each seed in percent.
        difference: Paired difference to ``control`` in points.
        leak: Paired difference to the same attack by somebody who is told nothing but the predicted classes, in points:
            what the rest of the answers taught. Exactly zero if no answer said more. Measured of attacks on the API
            that a headline is made of.
        config: The tuned settings: teacher, temperature, alpha, epochs, …
        seconds: Time for one student.
        queries: Inputs sent to the teacher, each view counted.
        beyond: How many of the answers said more than the predicted class, at most of all seeds; null if nobody knows.
        validation: Accuracy on the validation split, which selected the settings.
        note: A mark beside the label, such as "not tuned".
    """

    name: str
    label: str
    role: Role
    access: str = "api"
    labels: bool | None = None
    mean: float | None = None
    sd: float | None = None
    n: int = 0
    values: tuple[float | None, ...] = ()
    validations: tuple[float | None, ...] = ()
    difference: Interval = Interval()
    leak: Interval = Interval()
    config: dict[str, object] = field(default_factory=dict)
    seconds: float | None = None
    queries: int | None = None
    beyond: int | None = None
    validation: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Point:
    """One point of a curve, with bounds and how many measurements it is the mean of where they are known."""

    x: float | None
    y: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A plot of one or more series, such as accuracy over queries.

    Attributes:
        title: Its heading.
        x_label: What runs to the right.
        y_label: What runs upwards.
        x_log: Whether the x axis is logarithmic.
        series: Points by series name.
    """

    title: str
    x_label: str
    y_label: str
    x_log: bool = False
    series: dict[str, tuple[Point, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything one evaluation measured.

    Attributes:
        schema_version: Version of the JSON layout.
        title: Heading.
        created: When, in ISO 8601.
        tool: Version of sdbctl.
        verdict: One sentence in words.
        notes: Caveats.
        inference_cost: What users lose.
        unauthorized_advantage: What attackers gain.
        authorized_gain: Best student distilled with the key − best one distilled from the original, in points.
        sealed_gain: The same of the assistant that is sealed in the file, for who holds file and key.
        protectable: Best student of the original − ``control``, in points: whether there is something to protect.
        protectable_unlabelled: The same of attackers without labels, against their own control.
        key_strength: How far from the key one may be, and what finds it.
        models: By name, see ``MODELS``.
        students: By name, see :data:`sdbctl.suites.BY_NAME`.
        curves: By name.
        environment: Versions and hardware.
        config: The resolved configuration, without local paths.
        box: Metadata of the box. It is untrusted.
        cost: Seconds, with those of the students that earlier runs trained, images per second, peak memory.
    """

    schema_version: int = SCHEMA_VERSION
    title: str
    created: str
    tool: str
    verdict: str
    notes: tuple[str, ...] = ()
    inference_cost: InferenceCost = InferenceCost()
    unauthorized_advantage: UnauthorizedAdvantage = UnauthorizedAdvantage()
    authorized_gain: Interval = Interval()
    sealed_gain: Interval = Interval()
    protectable: Interval = Interval()
    protectable_unlabelled: Interval = Interval()
    key_strength: KeyStrength = KeyStrength()
    models: dict[str, Model] = field(default_factory=dict)
    students: dict[str, Student] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    environment: dict[str, object] = field(default_factory=dict)
    config: dict[str, object] = field(default_factory=dict)
    box: dict[str, object] = field(default_factory=dict)
    cost: dict[str, object] = field(default_factory=dict)

    def get(self, path: str) -> float | None:
        """The number at a dotted path, such as ``unauthorized_advantage.api.labelled.high``.

        An interval alone stands for its cautious bound: ``low`` for ``authorized_gain`` and ``protectable``, where more
        is better, and ``high`` everywhere else.

        Args:
            path: Where the number stands in the JSON.

        Returns:
            The number, or None if it was not measured: a model or student that the report lacks was not.

        Raises:
            UsageError: There is no number at that path.
        """
        numbers = dict(self.numbers())
        root, _, rest = path.partition(".")
        name, _, number = rest.partition(".")
        counted = root in ("models", "students") and any(part.isdigit() for part in path.split("."))
        if rest and (root in VARIABLE or counted):
            # not all of these are always there
            return numbers.get(path)
        absent = {"students": _NO_STUDENT, "models": _NO_MODEL}.get(root)
        if absent and number and name not in getattr(self, root):
            numbers |= {known: None for known, _ in _flatten(absent, f"{root}.{name}")}
        if path not in numbers:
            printable = filter(str.isprintable, numbers)
            nearest = difflib.get_close_matches(path, printable, n=1, cutoff=0)[0]
            raise UsageError(f"the report has no number {path}", f"did you mean {nearest}?")
        return numbers[path]

    def means(self) -> dict[str, float]:
        """The means that were measured, by dotted path: headline numbers, costs, models and students."""

        def shown(path: str) -> bool:
            of_models = (".top1", ".ece", ".residual", ".beyond_top1")
            return path.endswith(of_models if path.startswith("models.") else ".mean")

        return {path: value for path, value in self.numbers() if value is not None and shown(path)}

    def numbers(self) -> Iterator[tuple[str, float | None]]:
        """All numbers, by dotted path; None where one was not measured."""
        for item in dataclasses.fields(self):
            yield from _flatten(getattr(self, item.name), item.name)

    @property
    def nothing_to_protect(self) -> bool:
        """Whether distilling the original is known to be worth little, and no attack says otherwise."""
        threats = self.unauthorized_advantage
        return _worth_little(self.protectable, threats.api.labelled, threats.file.labelled)

    @property
    def nothing_to_protect_unlabelled(self) -> bool:
        """The same for attackers without labels."""
        threats = self.unauthorized_advantage
        return _worth_little(self.protectable_unlabelled, threats.api.unlabelled, threats.file.unlabelled)

    def to_json(self) -> str:
        """The report as JSON text; numbers that are not finite become null."""
        return json.dumps(codec.encode(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, what: str = "report") -> Report:
        """Read what ``to_json`` wrote.

        Args:
            text: The JSON.
            what: What it is, for the message.

        Raises:
            BadInput: It is damaged, something else, or of another version.
        """
        try:
            content = codec.parse(text)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{what} is not JSON: {error}", "the file is damaged or something else") from None
        if not isinstance(content, dict) or "schema_version" not in content:
            raise BadInput(f"{what} is not an sdbctl report", "give the report.json that sdbctl eval wrote")
        version = content["schema_version"]
        if version != SCHEMA_VERSION or isinstance(version, bool):
            raise BadInput(
                f"{what} has schema version {str(version)[:20]!r}, this sdbctl reads {SCHEMA_VERSION}",
                "use the sdbctl that wrote it",
            )
        # what a command prints has the gates beside it, which are judged anew
        content.pop("gates", None)
        try:
            return codec.decode(cls, content)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{what} is damaged: {error}", "write it again with sdbctl eval") from None

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read a ``report.json``.

        Raises:
            BadInput: It is missing, damaged, something else, or of another version.
        """
        return cls.from_json(files.text(path, "report"), f"report {path}")


def worth_protecting(worth: Interval) -> bool:
    """Whether what distilling the original is worth over the floor is enough to judge a box by."""
    return (worth.mean or 0) >= PROTECTABLE_LIMIT and (worth.low or 0) > 0


def _worth_little(worth: Interval, *advantages: Interval) -> bool:
    beaten = any((advantage.low or 0) > ADVANTAGE_LIMIT for advantage in advantages)
    # more than that with wide bounds is not known to be little
    return worth.mean is not None and worth.mean < PROTECTABLE_LIMIT and worth.low is not None and not beaten


def schema() -> str:
    """The JSON Schema of a report, as ``report.schema.json`` in this package holds it."""
    return json.dumps(codec.schema(Report), indent=2, ensure_ascii=False) + "\n"


_NO_STUDENT = Student(name="", label="", role="attack")
_NO_MODEL = Model(name="", label="")


def _flatten(value: object, path: str) -> Iterator[tuple[str, float | None]]:
    """Every number below ``value`` with its dotted path; what stands in a list is counted from 0."""
    if value is None:
        yield path, None
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value if math.isfinite(value) else None
    elif isinstance(value, Interval):
        bound = value.low if path in MORE_IS_BETTER else value.high
        yield from _flatten(bound, path)
    if dataclasses.is_dataclass(value):
        for item in dataclasses.fields(value):
            yield from _flatten(getattr(value, item.name), f"{path}.{item.name}")
    elif isinstance(value, dict | list | tuple):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flatten(inner, f"{path}.{name}")
