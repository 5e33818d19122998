"""What every renderer shows: the report as cards and tables of clean text.

Text in a report may come from a box somebody else made. It is cleaned here, once; renderers only escape it
for their own format.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sdbctl.report import (
    ADVANTAGE_LIMIT,
    COST_LIMIT,
    MODELS,
    OPEN,
    RECOVERED,
    Interval,
    Model,
    Report,
    Role,
    Student,
    worth_protecting,
)
from sdbctl.report.gates import GateResult

Status = Literal["pass", "fail", "neutral"]
ICONS: dict[Status, str] = {"pass": "✓", "fail": "✗", "neutral": "–"}
NOT_MEASURED = "not measured"
ROLES: dict[Role, str] = {
    "floor": "floor",
    "reference": "reference",
    "target": "assistant",
    "authorized": "with the key",
    "wrong_key": "wrong key",
    "attack": "attack",
    "baseline": "trivial defence",
    "disturb": "disturbed",
}
ABOUT = (
    (
        "Inference cost",
        "what users of the boxed model lose against the original. The original is fine-tuned on the"
        " owner's data, as the box was, otherwise adaptation to new data would hide the cost. Bounds"
        " come from a paired bootstrap over test images.",
    ),
    (
        "Advantage without the key",
        "the best student over all attacks minus the best student over the floor. The floor is what an"
        " attacker has without any soft output: cross-entropy, label smoothing, class-constant and top-1-only"
        " students, with the same images, queries, epochs and tuning. An attacker may always ignore the"
        " teacher, so no box that keeps its predictions can push an attacker below the floor. Beside it stands a weaker"
        " criterion of the literature, over the student of smoothed labels alone.",
    ),
    (
        "Two attackers",
        "“API” queries logits or probabilities. “File” holds the model file and may strip wrappers, re-head"
        " features and fine-tune. “Labelled” has labels for the transfer images, “unlabelled” has none.",
    ),
    (
        "Authorized gain",
        "the student distilled with the key minus the student distilled from the original, both tuned, with"
        " the same data, epochs and queries. Of several ways to distil the original the one that leaves the least gain"
        " counts. Who holds the file as well as the key distills what is sealed in it.",
    ),
    (
        "Selection",
        "settings are chosen on validation data; the chosen ones are then run again with fresh seeds and tested"
        " once. The control is the best of the floor: for each seed the mean of its rows, weighted by the chance that"
        " each is the best by the validation accuracy of all other seeds, which does not flatter it; of each threat the"
        " two rows that are best on validation data are held against it, and the higher difference counts. The upper"
        " bound of an advantage is the highest of both rows, the lower bound of a gain the lowest over the references,"
        " so that it holds whichever row is truly the best. Bounds are 95 %, over seeds on these very test images;"
        " “surely” means that the bound, not only the mean, says so.",
    ),
    (
        "What is not promised",
        "the key, as an API is asked with it, is a secret pattern, not cryptography: one pair of an image with and"
        " without the pattern gives it away. What is sealed in the file is encrypted. Attacks that are not listed here"
        " were not measured.",
    ),
)
_UNSAFE = {"Cc", "Cf", "Cn", "Cs", "Zl", "Zp"}
_SHORT = {"temperature": "τ", "alpha": "α"}


@dataclass(frozen=True)
class Card:
    """One headline number.

    Attributes:
        title: What it is.
        value: The mean with its sign, or "not measured".
        unit: "points", or nothing.
        bounds: The 95 % bounds in words.
        n: What it rests on.
        status: Whether it is good.
        words: Why.
        by: Label of the student behind it, if it is one.
    """

    title: str
    value: str
    unit: str
    bounds: str
    n: str
    status: Status
    words: str
    by: str = ""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: Its heading.
        numeric: Whether it holds numbers.
        wide: Whether only wide media show it.
        spare: When it gives way where a table is wider than the terminal: 1 is the first, 0 never.
        legend: What it shows, for the note of a table that has it.
    """

    title: str
    numeric: bool = True
    wide: bool = False
    spare: int = 0
    legend: str = ""


@dataclass(frozen=True)
class Table:
    """A table of text. A ``marks`` entry per row, if any, is a status or a role to colour it by."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    marks: tuple[str, ...] = ()

    def about(self, columns: Iterable[Column] | None = None) -> str:
        """The note of a table that shows some of its columns, all if None."""
        legends = [column.legend for column in (self.columns if columns is None else columns)]
        return " ".join(filter(None, (self.note, *legends)))


@dataclass(frozen=True)
class View:
    """A report, ready to be rendered."""

    title: str
    created: str
    tool: str
    verdict: str
    notes: tuple[str, ...]
    cards: tuple[Card, ...]
    tables: tuple[Table, ...]
    details: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


def view(report: Report, gates: Sequence[GateResult] = ()) -> View:
    """Turn a report, and the gates it was held against, into cards and tables."""
    tables = [gates_table(gates), _costs(report), _models(report), _students(report), _screened(report)]
    details = {
        "Configuration": report.config,
        "Box": report.box,
        "Environment": report.environment,
        "Cost of this run": report.cost,
    }
    return View(
        title=clean(report.title),
        created=clean(report.created),
        tool=clean(report.tool),
        verdict=clean(report.verdict),
        notes=tuple(map(clean, report.notes)),
        cards=tuple(_cards(report)),
        tables=tuple(table for table in tables if table.rows),
        details=tuple((title, tuple(_settings(content))) for title, content in details.items() if content),
    )


def compare(report: Report, baseline: Report) -> Table:
    """What changed since another report, of the means that one of them has measured, and how they were made."""
    before, now = baseline.means(), report.means()
    columns = (Column("Number", numeric=False), Column("Before"), Column("Now"), Column("Change"))

    def change(path: str) -> float | None:
        return now[path] - before[path] if path in before and path in now else None

    paths = [path for path in {**now, **before} if number(before.get(path), 3) != number(now.get(path), 3)]
    same = len({**now, **before}) - len(paths)
    rows = tuple(
        (clean(path), number(before.get(path), 3), number(now.get(path), 3), number(change(path), 3, sign=True))
        for path in paths
    )
    old, new = _made(baseline), _made(report)
    other = sorted(clean(name) for name in {**old, **new} if old.get(name) != new.get(name))
    note = f"{same} other numbers are as they were." if same else ""
    note += f" These differ in {', '.join(other)}, not only in the model." if other else ""
    return Table("Compared with the baseline", columns, rows, note=note.strip())


def made_otherwise(report: Report, baseline: Report) -> str:
    """In what makes numbers no match two reports differ, or nothing."""
    old, new = _made(baseline), _made(report)
    names = {
        "original": "original",
        "suite": "suite",
        "student": "student",
        "recipe.epochs": "epochs",
        "data_fingerprint": "data",
    }
    told = [
        f"{words} {old.get(name, 'none')[:40]}, now {new.get(name, 'none')[:40]}"
        for name, words in names.items()
        if old.get(name) != new.get(name)
    ]
    return f"Made otherwise, so numbers may not be compared: {'; '.join(told)}." if told else ""


def _made(report: Report) -> dict[str, str]:
    """How a report was made, by dotted names."""
    names = {"original_ft": "fine-tuned", "original": "as it was"}
    original = next((words for name, words in names.items() if name in report.models), "none")
    return {"original": original, **dict(_settings(report.config))}


def headline(cards: Sequence[Card]) -> Table:
    """The cards as a table, for media without cards."""
    columns = (
        Column("Headline", numeric=False),
        Column("Points"),
        Column("95 % bounds", spare=2),
        Column("Over", spare=1),
        Column("Verdict", numeric=False),
    )
    values = (card.value if card.unit in ("", "points") else f"{card.value} {card.unit}" for card in cards)
    rows = tuple(
        (card.title, value, card.bounds, card.n, f"{ICONS[card.status]} {card.words}")
        for card, value in zip(cards, values, strict=True)
    )
    return Table("", columns, rows, marks=tuple(card.status for card in cards))


def clean(text: str) -> str:
    """``text`` on one line, without control and direction characters."""
    return " ".join("".join(" " if unicodedata.category(c) in _UNSAFE else c for c in text).split())


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A number with a real minus sign, or "not measured"."""
    if value is None:
        return NOT_MEASURED
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def bounds(interval: Interval, digits: int = 2, sign: bool = True) -> str:
    """The 95 % bounds, or nothing where one of them is missing."""
    if interval.low is None or interval.high is None:
        return ""
    return f"{number(interval.low, digits, sign)} to {number(interval.high, digits, sign)}"


def ordered(students: Mapping[str, Student]) -> list[Student]:
    """Students by role, then from good to bad; the controls only once, under their own names."""
    roles = list(ROLES)
    return sorted(
        (student for name, student in students.items() if not name.startswith("control")),
        key=lambda student: (roles.index(student.role), -(student.mean or 0)),
    )


def spread(student: Student) -> str:
    """Mean ± standard deviation of a student."""
    if student.mean is None or student.sd is None:
        return number(student.mean)
    return f"{number(student.mean)} ± {number(student.sd)}"


def _cards(report: Report) -> Iterator[Card]:
    cost, advantage = report.inference_cost.top1, report.unauthorized_advantage
    yield _card("Inference cost, top-1", cost, *_at_most(cost, COST_LIMIT), images=True)
    nothing, unlabelled = report.nothing_to_protect, report.nothing_to_protect_unlabelled
    api, held = advantage.api, advantage.file
    with_labels, without = (report.protectable, nothing), (report.protectable_unlabelled, unlabelled)
    for title, interval, by, (worth, vain), always in (
        ("Advantage without key, API, labelled", api.labelled, api.labelled_by, with_labels, True),
        ("Advantage without key, API, unlabelled", api.unlabelled, api.unlabelled_by, without, True),
        ("Advantage without key, file, labelled", held.labelled, held.labelled_by, with_labels, False),
        ("Advantage without key, file, unlabelled", held.unlabelled, held.unlabelled_by, without, False),
    ):
        student = report.students.get(by)
        status, words = _at_most(interval, ADVANTAGE_LIMIT)
        if vain and interval.mean is not None:
            status, words = "neutral", "nothing to protect here"
        elif status == "pass" and not worth_protecting(worth):
            status, words = "neutral", f"{words}, if there is something to protect"
        if always or interval.mean is not None:
            yield replace(_card(title, interval, status, words), by=clean(student.label) if student else "")
    if api.over_smoothing.mean is not None:
        yield _card("Over label smoothing, API", api.over_smoothing, "neutral", "a weaker criterion")
    yield _card("Authorized gain", report.authorized_gain, *_above_zero(report.authorized_gain))
    if report.sealed_gain.mean is not None:
        yield _card("Authorized gain, file", report.sealed_gain, *_above_zero(report.sealed_gain))
    key = report.key_strength
    heard, searched = f"correlation {RECOVERED:g}", Interval(key.searched)
    for title, found, digits, unit, tries, words in (
        ("Pattern that half opens the box", key.opens_at, 2, "correlation", "patterns", "with the key"),
        ("Queries that give the key away", key.queries_to_recover, 0, "keyed queries", "eavesdroppers", heard),
        ("Best key that attacks found", searched, 2, "correlation", "", "with the key"),
    ):
        if found.mean is not None:
            count = f"{found.n} {tries}" if (found.n or 0) > 1 else ""
            yield Card(title, number(found.mean, digits), unit, bounds(found, digits, False), count, "neutral", words)
    if key.public is not None:
        status, words = ("fail", "a key for all") if key.public > OPEN else ("neutral", "through the best of them")
        yield Card("Patterns that anybody has", number(100 * key.public), "% of answers", "", "", status, words)
    for title, worth, vain in (
        ("Original over the floor", report.protectable, nothing),
        ("Original over the floor, unlabelled", report.protectable_unlabelled, unlabelled),
    ):
        if worth.mean is not None:
            surely = worth_protecting(worth)
            words = "nothing to protect here" if vain else "something to protect" if surely else "no claim is made"
            yield _card(title, worth, "neutral", words)


def _card(title: str, interval: Interval, status: Status, words: str, images: bool = False) -> Card:
    measured = interval.mean is not None
    kind = "image" if images else "seed"
    count = "" if interval.n is None else f"{interval.n:,} {kind}{'' if interval.n == 1 else 's'}"
    return Card(
        title=title,
        value=number(interval.mean, sign=True),
        unit="points" if measured else "",
        bounds=bounds(interval),
        n=count if measured else "",
        status=status,
        words=words,
    )


def _at_most(interval: Interval, limit: float) -> tuple[Status, str]:
    if interval.mean is None:
        return "neutral", "no claim is made"
    if interval.high is None:
        return "neutral", "no bounds, so no claim is made"
    if interval.high <= limit:
        return "pass", f"surely at most {limit:g}"
    if interval.low is not None and interval.low > limit:
        return "fail", f"surely above {limit:g}"
    return "fail", f"above {limit:g} not ruled out"


def _above_zero(interval: Interval) -> tuple[Status, str]:
    if interval.mean is None:
        return "neutral", "no claim is made"
    if interval.low is None:
        return "neutral", "no bounds, so no claim is made"
    if interval.low > 0:
        return "pass", "surely above 0"
    return "fail", "no gain is shown"


def gates_table(gates: Sequence[GateResult]) -> Table:
    """Rules and whether they hold."""
    columns = (Column("Gate", numeric=False), Column("Value"), Column("Result", numeric=False))
    rows = tuple(
        (
            clean(gate.rule),
            number(gate.value, 3),
            f"{ICONS['pass']} holds" if gate.passed else f"{ICONS['fail']} broken",
        )
        for gate in gates
    )
    return Table("Gates", columns, rows, marks=tuple("pass" if gate.passed else "fail" for gate in gates))


def _costs(report: Report) -> Table:
    cost = report.inference_cost
    columns = (
        Column("Metric", numeric=False),
        Column("Boxed is worse by"),
        Column("95 % bounds"),
        Column("Images", spare=1),
    )
    rows = (
        _cost("Top-1 accuracy, points", cost.top1, 2),
        _cost("Calibration error (ECE)", cost.ece, 4),
        _cost("NLL of the predicted class", cost.nll_binary, 4),
        _cost("Full NLL *", cost.nll, 4),
        _cost("Top-5 accuracy, points *", cost.top5, 2),
    )
    note = "* The known price of hiding what the model knows about the other classes."
    measured = any(row[1] != NOT_MEASURED for row in rows)
    return Table("Inference cost", columns, rows if measured else (), note)


def _cost(label: str, interval: Interval, digits: int) -> tuple[str, ...]:
    count = "" if interval.n is None else f"{interval.n:,}"
    return label, number(interval.mean, digits, sign=True), bounds(interval, digits), count


def _models(report: Report) -> Table:
    columns = (
        Column("Model", numeric=False),
        Column("Top-1 %"),
        Column("Top-5 %", spare=2),
        Column("ECE", spare=4),
        Column("NLL of prediction", spare=3),
        Column("NLL", spare=1),
        Column("Dark knowledge left"),
        Column("Beyond top-1 %"),
        Column("Images", wide=True),
    )
    names = [name for name in MODELS if name in report.models]
    names += [name for name in report.models if name not in MODELS]
    rows = tuple(_model(report.models[name]) for name in names)
    note = (
        "Dark knowledge left: KL from uniform to the outputs for all but the predicted class; 0 hides all. Beyond "
        "top-1: images whose outputs say more than the predicted class; without any, nobody can learn more from the "
        "outputs than from top-1 answers."
    )
    return Table("Models", columns, rows, note)


def _model(model: Model) -> tuple[str, ...]:
    images = NOT_MEASURED if model.n_images is None else f"{model.n_images:,}"
    losses = (model.ece, model.nll_binary, model.nll, model.residual)
    return (
        clean(model.label),
        number(model.top1),
        number(model.top5),
        *(number(value, 3) for value in losses),
        number(None if model.beyond_top1 is None else 100 * model.beyond_top1),
        images,
    )


def _students(report: Report) -> Table:
    students = [student for student in ordered(report.students) if student.n]
    told = any(student.leak.mean is not None for student in students)
    brackets = "In brackets: answers that said more than the predicted class." if told else ""
    leak = "Leak: gain over the same attack that is told nothing but classes." if told else ""
    columns = (
        Column("Student", numeric=False),
        Column("Role", numeric=False),
        Column("Accuracy %"),
        Column("Seeds", spare=1),
        Column("Over control"),
        Column("95 % bounds", spare=2),
        Column("Settings", numeric=False, wide=True),
        Column("Queries", wide=True, legend=brackets),
        Column("Leak", wide=True, legend=leak),
        Column("Seconds", wide=True),
    )
    shared = _shared(students)
    note = "Mean ± standard deviation over seeds. Control: best of the floor. Differences are paired, in points."
    if shared:
        note += f" All: {', '.join(_pair(name, value) for name, value in shared.items())}."
    rows = tuple(_student(student, shared) for student in students)
    return Table("Students", columns, rows, note, tuple(s.role for s in students))


def _shared(students: Sequence[Student]) -> dict[str, str]:
    """Settings that all students have, which need not be said of each."""
    if len(students) < 2:
        return {}
    first, *others = [dict(_settings(student.config)) for student in students]
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def _screened(report: Report) -> Table:
    columns = (
        Column("Not the best of its kind", numeric=False),
        Column("Attacker holds", numeric=False),
        Column("Validation %"),
        Column("Epochs"),
        Column("Settings", numeric=False, wide=True),
    )
    students = [s for s in ordered(report.students) if not s.n and s.validation is not None]
    students.sort(key=lambda s: (-_epochs(s), -(s.validation or 0.0)))
    rows = tuple(
        (
            clean(student.label),
            "the file" if student.access == "file" else f"the API{'' if student.labels else ', no labels'}",
            number(student.validation),
            f"{_epochs(student):g}",
            _short_settings(student, {"epochs": ""}),
        )
        for student in students
    )
    note = "One seed each, on validation data: the best of each kind were trained on and are in the table above."
    return Table("Screened out", columns, rows, note)


def _epochs(student: Student) -> float:
    epochs = student.config.get("epochs")
    return epochs if isinstance(epochs, int | float) else 0.0


def _short_settings(student: Student, shared: Mapping[str, str]) -> str:
    return ", ".join(_pair(name, value) for name, value in _settings(student.config) if name not in shared)


def _pair(name: str, value: str) -> str:
    return f"{_SHORT.get(name, name)}\u00a0{value}"


def _student(student: Student, shared: Mapping[str, str]) -> tuple[str, ...]:
    label = clean(student.label) + (f" ({clean(student.note)})" if student.note else "")
    return (
        label,
        ROLES[student.role],
        spread(student),
        str(student.n),
        number(student.difference.mean, sign=True),
        bounds(student.difference),
        _short_settings(student, shared),
        _queries(student),
        "" if student.leak.mean is None else number(student.leak.mean, sign=True),
        number(student.seconds, 1),
    )


def _queries(student: Student) -> str:
    if student.queries is None:
        return "none"
    return f"{student.queries:,}" + (f" ({student.beyond:,})" if student.beyond else "")


def _settings(content: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted names and short text."""
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _settings(value, f"{prefix}{name}.")
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text = clean(text)
        yield clean(f"{prefix}{name}"), text if len(text) <= 300 else f"{text[:299]}…"
