"""How settings are chosen and students reported.

Settings are chosen on the validation split with one set of seeds; the chosen ones are trained again with fresh,
paired seeds, and only those, after their last epoch, are measured on the test split. The control is what the best of
the floor reaches, by the judgement of all other seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sdbctl import metrics
from sdbctl.attacks import ATTACKS
from sdbctl.cells import Bench, Cell, Outcome
from sdbctl.curves import budgets
from sdbctl.report import Interval, Student
from sdbctl.suites import (
    ALWAYS,
    BY_NAME,
    EVERY,
    FINALISTS,
    MINOR,
    PLACES,
    TUNED,
    TWINS,
    USUAL,
    Option,
    Row,
    asks,
    class_only,
    threatens,
)
from sdbctl.training import Progress
from sdbctl.workers import run_cells

SELECTION_SEED = 10_000
"""Seed of the students that only choose settings; the reported ones have seeds 0, 1, 2, …"""
SHORTEST = 3
"""Epochs of a screening at least: after fewer, the order of candidates is noise."""
NO_LEAK = Interval(0.0, 0.0, 0.0, n=0)
"""Of students that are the same, weight by weight, without what answers said beside the predicted class."""
THREATS = ((True, False), (False,))
"""Attackers who may have labels, and those who have none."""
KEPT = 8
"""Reduction factor of successive halving: one of so many candidates goes on, but one more than there are places."""


def options(bench: Bench) -> dict[str, list[Option]]:
    """The candidates of each group that competes for one place in the report."""
    groups: dict[str, list[Option]] = {}
    chosen = bench.config.chosen
    for row in bench.rows():
        tune = min(bench.config.tuned, TUNED.get(row.role, USUAL if row.name in MINOR else EVERY))
        group = groups.setdefault(chosen.group(row), [])
        group += [
            Option(row, teacher, config)
            for teacher in (row.teachers[:1] if chosen.tune == 1 else row.teachers) or ("",)
            for config in ATTACKS[row.attack].grid[:tune]
        ]
    return groups


def rungs(bench: Bench, row: Row | None = None) -> list[int]:
    """Epochs after which candidates, or those of one row, are compared, in rising order; the last names the winners."""
    chosen, epochs = bench.config.chosen, bench.config.recipe.epochs
    shares = chosen.compared(row) if row else chosen.rungs
    return sorted({min(epochs, max(SHORTEST, round(share * epochs))) for share in shares})


@dataclass(frozen=True)
class Plan:
    """How much an evaluation trains and asks.

    Attributes:
        students: Their number.
        reported: How many of them are measured on the test split, too.
        runs: How many whole runs that is.
        held: Whole runs of students whose attacker trains or runs the box's weights as well.
        teachers: Who is asked.
        tuned: Images that attackers train the network of the box itself on.
    """

    students: int
    reported: int
    runs: float
    held: float
    teachers: int
    tuned: int


def plan(bench: Bench) -> Plan:
    """Count the students before any is trained."""
    groups = options(bench)
    cells: list[float] = []
    held, screened, tuned = 0.0, 0, 0
    for name, found in groups.items():
        left, places, before = len(found), _places(found), sum(cells)
        own = _tuned(bench, (option.row.name for option in found))
        for epochs in (lengths := rungs(bench, found[0].row)):
            if left > (goal := _goal(left, places, epochs == lengths[-1])):
                # the longest may go on, and win
                cells += _longest(bench, (option.row.name for option in found), epochs)[:left]
                screened += left
                tuned += sum(own[:left])
                left = goal
        cells += _longest(bench, _rows(found))[:places] * _seeds(bench, name)
        tuned += sum(_tuned(bench, _rows(found))[:places]) * _seeds(bench, name)
        held += sum(cells) - before if found[0].row.access == "file" else 0.0
    cells += [bench.share(size) for _, size in budgets(bench)]
    # whether they win is not known yet
    cells += _spare(bench)
    teachers = {option.teacher for found in groups.values() for option in found} - {""}
    return Plan(len(cells), len(cells) - screened, sum(cells), held, len(teachers), tuned)


def _longest(bench: Bench, rows: Iterable[str], epochs: int | None = None) -> list[float]:
    """How many whole runs a student of each of some rows takes, from the longest."""
    return sorted((bench.runs(row, epochs) for row in rows), reverse=True)


def _tuned(bench: Bench, rows: Iterable[str]) -> list[int]:
    """On how many images the attackers of some rows train the network of the box itself, from the most."""
    return sorted((ATTACKS[BY_NAME[row].attack].own(len(bench.transfer)) for row in rows), reverse=True)


def _competing(bench: Bench) -> list[list[Option]]:
    """The groups that have several rows."""
    return [found for found in options(bench).values() if len(_rows(found)) > 1]


def _controls(bench: Bench) -> dict[str, int]:
    """Rows that are shown even if others of their group beat them, with how many seeds: what is compared with, all."""
    rows = {name for found in _competing(bench) for name in _rows(found)}
    return {name: bench.config.reported if name == "label_smoothing" else 1 for name in ALWAYS if name in rows}


def _spare(bench: Bench) -> list[float]:
    """Runs at most of the students that are trained beside the winners, depending on who wins."""
    runs = [1.0] * sum(_controls(bench).values())
    for found in _competing(bench):
        twins = _longest(bench, [TWINS[row] for row in TWINS.keys() & _rows(found)])
        runs += twins[: _places(found)] * bench.config.reported
    # finalists that are told nothing but classes, if answers of the box say more
    asking = [row for row in bench.rows() if asks(row)]
    for labels in THREATS:
        runs += (
            _longest(bench, [row.name for row in asking if row.labels in labels])[:FINALISTS] * bench.config.reported
        )
    return runs


def _rows(found: Sequence[Option]) -> set[str]:
    return {option.row.name for option in found}


def _seeds(bench: Bench, group: str) -> int:
    """Students of a group's winner: what is no headline has one where attacks compete."""
    minor = bench.config.chosen.elect and group in MINOR
    return 1 if minor else bench.config.reported


def _goal(count: int, places: int, last: bool) -> int:
    """How many of ``count`` candidates go on after a comparison."""
    return places if last else min(count, max(places + 1, -(-count // KEPT)))


def _places(found: Sequence[Option]) -> int:
    """How many rows of a group are reported with all seeds."""
    return min(PLACES.get(found[0].row.role, 1), len(_rows(found)))


@dataclass
class Choice:
    """A candidate, its mean validation accuracy, and after how many epochs; None if there was no choice.

    ``correlation`` is that of the secret pattern with what an attack on the key found, ``beyond`` how many answers said
    more than the predicted class.
    """

    option: Option
    validation: float | None = None
    epochs: int = 0
    correlation: float | None = None
    beyond: int | None = None


def choose(bench: Bench, folder: Path | None, progress: Progress) -> tuple[dict[str, list[Choice]], dict[str, Choice]]:
    """Choose among the candidates of each group by validation accuracy; successive halving if there are several rungs.

    Returns:
        The winners of each group, of different rows, and the best candidate of each row with how long it was trained.
    """
    groups = options(bench)
    left = {group: [Choice(option) for option in some] for group, some in groups.items()}
    places = {group: _places(some) for group, some in groups.items()}
    # who is never compared has its first settings
    rows = {choice.option.row.name: choice for some in left.values() for choice in reversed(some)}
    full = bench.config.recipe.epochs
    for epochs in (lengths := rungs(bench)):

        def cell(choice: Choice, length: int | None = None if epochs == full else epochs) -> Cell:
            option = choice.option
            return Cell(option.row.name, option.teacher, option.config, SELECTION_SEED, False, length)

        last = epochs == lengths[-1]
        goals = {group: _goal(len(some), places[group], last) for group, some in left.items()}
        compared = {
            group: some
            for group, some in left.items()
            if len(some) > goals[group] and epochs in rungs(bench, some[0].option.row)
        }
        done = run_cells(bench, [cell(choice) for some in compared.values() for choice in some], folder, progress)
        for group, some in compared.items():
            outcomes = [done[cell(choice).id] for choice in some]
            order = [
                Choice(choice.option, outcome.validation, epochs, outcome.correlation, outcome.beyond)
                for choice, outcome in zip(some, outcomes, strict=True)
            ]
            # of attacks on an API those first that got more than predicted classes: no others can gain
            order.sort(key=lambda choice: (asks(choice.option.row) and not choice.beyond, -(choice.validation or 0.0)))
            best: dict[str, Choice] = {}
            for choice in order:
                best.setdefault(choice.option.row.name, choice)
            rows |= best
            left[group] = (list(best.values()) if last else order)[: goals[group]]
    return left, rows


def train_students(bench: Bench, folder: Path | None, progress: Progress) -> dict[str, Student]:
    """Choose settings, train the reported students with fresh paired seeds, and name the control.

    Returns:
        Students by row name, and ``control`` and ``control_unlabelled``, the best of the floor.
    """
    config = bench.config
    planned = plan(bench)
    progress.start("students", planned.students, planned.runs)
    winners, rows = choose(bench, folder, progress)
    finals = {
        choice.option.row.name: (choice, _seeds(bench, group)) for group, some in winners.items() for choice in some
    }
    for name, (_, seeds) in list(finals.items()):
        if (twin := TWINS.get(name)) in rows:
            finals.setdefault(twin, (rows[twin], seeds))
    for name, seeds in _controls(bench).items():
        finals.setdefault(name, (rows[name], seeds))
    cells = {
        name: [Cell(name, choice.option.teacher, choice.option.config, seed, True) for seed in range(seeds)]
        for name, (choice, seeds) in finals.items()
    }
    outcomes = run_cells(bench, [cell for some in cells.values() for cell in some], folder, progress)
    finished = {name: [outcomes[cell.id] for cell in some] for name, some in cells.items()}

    students = {}
    for row in bench.rows():
        student = Student(name=row.name, label=row.label, role=row.role, access=row.access, labels=row.labels)
        if row.name not in finished:
            students[row.name] = replace(
                student,
                config={**_settings(rows[row.name]), "epochs": rows[row.name].epochs},
                validation=rows[row.name].validation,
                beyond=rows[row.name].beyond,
            )
            continue
        runs = finished[row.name]
        found = [outcome.correlation for outcome in runs if outcome.correlation is not None]
        chosen = replace(finals[row.name][0], correlation=max(found, default=None))
        students[row.name] = replace(
            student,
            **_measured(runs),
            config={
                **_settings(chosen),
                "epochs": config.recipe.epochs,
                "student": config.student,
            },
            beyond=max((run.beyond for run in runs if run.beyond is not None), default=None),
            note="not tuned" if row.role in TUNED else "",
        )
    return controlled(students | _class_only(bench, students, cells, finished, folder, progress))


def _class_only(
    bench: Bench,
    students: Mapping[str, Student],
    cells: Mapping[str, Sequence[Cell]],
    finished: Mapping[str, Sequence[Outcome]],
    folder: Path | None,
    progress: Progress,
) -> dict[str, Student]:
    """Finalists whose answers said more than the class, and the same students if they are told nothing else.

    What the former gain over the latter, seed by seed, is what the rest of the answers taught them.
    """
    rows = {row.name: row for labels in THREATS for row in finalists(students, "api", labels) if row.beyond}
    # of a seed that was told nothing else both are the same student
    twins = {
        name: [replace(cell, limited=bool(run.beyond)) for cell, run in zip(cells[name], finished[name], strict=True)]
        for name in rows
    }
    outcomes = run_cells(bench, [cell for some in twins.values() for cell in some if cell.limited], folder, progress)
    made: dict[str, Student] = {}
    for name, row in rows.items():
        runs = [outcomes.get(cell.id, run) for cell, run in zip(twins[name], finished[name], strict=True)]
        if all(run.digest and run.digest == before.digest for run, before in zip(runs, finished[name], strict=True)):
            made[name] = replace(row, leak=NO_LEAK)
            continue
        told = class_only(BY_NAME[name])
        twin = replace(row, name=told.name, label=told.label, role=told.role, beyond=0, **_measured(runs))
        made |= {told.name: twin, name: replace(row, leak=paired(row.values, twin.values))}
    return made


def _measured(runs: Sequence[Outcome]) -> dict[str, Any]:
    """What a report says of the students of a row, one for each seed."""
    values, validations = [run.test or 0.0 for run in runs], [run.validation for run in runs]
    return {
        "mean": float(np.mean(values)),
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "n": len(values),
        "values": tuple(values),
        "validations": tuple(validations),
        "seconds": float(np.mean([run.seconds for run in runs])),
        "queries": runs[0].queries or None,
        "validation": float(np.mean(validations)),
    }


def needless(row: Student) -> bool:
    """Whether an attack needs no soft output, and is one of the floor: it got none, or became the same without."""
    return asks(row) and (row.beyond == 0 or row.leak == NO_LEAK)


def finalists(
    students: Mapping[str, Student], access: str, labels: Sequence[bool | None] | None = None
) -> list[Student]:
    """The attacks of a threat that are held against the control: the two best that got soft outputs, and one without.

    Of attacks that were told nothing but classes one stands for all.
    """
    rows = best_first(filter(threatens, students.values()), access, labels)
    told, bare = ([row for row in rows if needless(row) == alike] for alike in (False, True))
    return [*told[:FINALISTS], *bare[:1]]


def best_first(
    rows: Iterable[Student], access: str = "api", labels: Sequence[bool | None] | None = None
) -> list[Student]:
    """Rows of one access, with or without labels, that have all seeds, from the best on validation data."""
    kept = [
        row
        for row in rows
        if row.mean is not None and row.access == access and (labels is None or row.labels in labels)
    ]
    return sorted(with_all_seeds(kept), key=lambda row: -float(np.mean(validations_of(row))))


def controlled(students: Mapping[str, Student]) -> dict[str, Student]:
    """Students with the controls, the best of the floor with and without labels, and how all differ from the first."""
    made, found = dict(students), dict[str, Student]()
    for name, note, labels in (
        ("control_unlabelled", "most of the control without labels", False),
        ("control", "most of the control", True),
    ):
        floor = [one for one in students.values() if one.role == "floor" or needless(one)]
        rivals = [one for one in floor if one.values and (labels or not one.labels)]
        if not rivals:
            continue
        rivals = with_all_seeds(rivals)
        seen = [validations_of(one) for one in rivals]
        values, validations, weights = best_of(rivals), metrics.crossfit(seen, seen), metrics.chances(seen)
        winner = rivals[int(np.argmax(weights))]
        found[name] = replace(
            winner,
            name=name,
            mean=float(np.mean(values)),
            sd=float(np.std(values, ddof=1)) if len(values) > 1 else None,
            values=tuple(values),
            validations=tuple(validations),
            validation=float(np.mean(validations)),
            config={"weights": {one.name: round(w, 3) for one, w in zip(rivals, weights, strict=True) if w}},
        )
        before = made[winner.name].note
        made[winner.name] = replace(made[winner.name], note=f"{before}, {note}" if before else note)
    made |= found
    if "control" in made:
        control = made["control"].values
        made = {
            name: replace(one, difference=paired(one.values, control)) if one.values else one
            for name, one in made.items()
        }
    return made


def _settings(choice: Choice) -> dict[str, object]:
    option, found = choice.option, choice.correlation
    teacher = {"teacher": option.teacher} if option.teacher else {}
    return {**teacher, **option.config, **({"key_correlation": round(found, 3)} if found is not None else {})}


def with_all_seeds(rows: Sequence[Student]) -> list[Student]:
    """Those that have most seeds: rows that won their group."""
    most = max((row.n for row in rows), default=0)
    return [row for row in rows if row.n == most]


def best_of(rows: Sequence[Student]) -> list[float]:
    """What the best of rows with the same seeds reaches, by seed; see :func:`sdbctl.metrics.crossfit`."""
    if not rows:
        return []
    return metrics.crossfit([validations_of(row) for row in rows], [accuracies(row.values) for row in rows])


def validations_of(row: Student) -> list[float]:
    """Validation accuracies by seed."""
    return accuracies(row.validations or (row.validation,) * row.n)


def accuracies(values: Sequence[float | None]) -> list[float]:
    """Accuracies by seed of a row that was trained."""
    return [value or 0.0 for value in values]


def paired(values: Sequence[float | None], control: Sequence[float | None]) -> Interval:
    """Mean paired difference of two lists of accuracies by seed, with its 95 % bounds."""
    # both have the seeds 0, 1, 2, …; one of them may have more
    differences = [(a or 0.0) - (b or 0.0) for a, b in zip(values, control, strict=False)]
    return Interval(*metrics.seed_interval(differences), n=len(differences))
