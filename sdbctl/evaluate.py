"""Measure a box: what its users lose, what an attacker gains, what key holders gain."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sdbctl import boxfile, metrics
from sdbctl.attacks import ATTACKS
from sdbctl.cells import Bench, Spent
from sdbctl.curves import budget_curve, key_curves, key_strength, opened_by_anybody, taught_by_keys
from sdbctl.engine import environment, peak_memory
from sdbctl.inference import predict
from sdbctl.protocol import accuracies, best_first, best_of, finalists, needless, paired, train_students
from sdbctl.report import (
    ADVANTAGE_LIMIT,
    MODELS,
    OPEN,
    Advantage,
    Bin,
    InferenceCost,
    Interval,
    Model,
    Report,
    Role,
    Student,
    UnauthorizedAdvantage,
    worth_protecting,
)
from sdbctl.suites import USUAL, WITH_KEY
from sdbctl.training import Progress, Silent
from sdbctl.workers import workers

MOSTLY = 0.02
"""Share of images up to which it is worth saying that the others' outputs are a function of the predicted class."""
_SOURCES = {"original_ft": "reference", "boxed_wrong_key": "wrong"} | {f"boxed_{name}": name for name in WITH_KEY}


def measure_models(bench: Bench) -> tuple[dict[str, Model], dict[str, Tensor]]:
    """Quality of every model on the test split, and its logits."""
    models, outputs = {}, {}
    for key, label in MODELS.items():
        if (name := _SOURCES.get(key, key)) not in bench.sources:
            continue
        teacher = bench.sources[name].open(bench.engine.device, bench.classes)
        outputs[name] = predict(teacher.logits, bench.test, bench.preprocess, bench.engine)
        scores = asdict(metrics.score(outputs[name], bench.test.labels))
        bins = tuple(Bin(*values) for values in scores.pop("reliability"))
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
    begin, bench = time.perf_counter(), replace(bench, spent=Spent()).telling_classes()
    progress = progress or Silent()
    models, outputs = measure_models(bench)
    guesses = [
        f"The {what} is not clearly better than guessing: check the data and --normalize."
        for name, what in (("original", "original"), ("boxed", "model"))
        if name in models and (models[name].top1 or 0.0) < metrics.least_known(bench.classes, len(bench.test))
    ]
    for guess in guesses:
        progress.note(f"note: {guess}")
    before = outputs.get("reference", outputs.get("original"))
    cost = InferenceCost()
    if before is not None and "boxed" in outputs:
        cost = inference_cost(before, outputs["boxed"], bench.test.labels)
    students: dict[str, Student] = {}
    curves = key_curves(bench)
    if bench.config.suite:
        with workers(bench) if bench.config.jobs > 1 and not bench.config.cluster else contextlib.nullcontext():
            students = train_students(bench, folder, progress)
            if not _is_box(box):
                students = {
                    name: replace(row, label=row.label.replace("the box", "the model"))
                    for name, row in students.items()
                }
            curves.update(budget_curve(bench, students, folder, progress))
        curves.update(taught_by_keys(students))
    report = Report(
        title=title,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        tool=boxfile.versions()["sdbctl"],
        verdict="",
        notes=(*notes, *guesses, *_caveats(bench, students)),
        inference_cost=cost,
        key_strength=replace(key_strength(curves, students), public=opened_by_anybody(bench)),
        models=models,
        students=students,
        curves=curves,
        environment=environment(bench.engine),
        config={
            "suite": bench.config.suite,
            "student": bench.config.student,
            "seeds": bench.config.reported,
            "tuned_configurations": bench.config.tuned,
            "recipe": asdict(bench.config.recipe),
            "transfer_images": len(bench.transfer),
            "surrogate_images": len(bench.surrogate) if bench.surrogate is not None else 0,
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
    """The numbers in front: advantage, gain, and whether there is something to protect.

    What a claim is made against is the strongest of its rows. Of each threat the two rows that are best on validation
    data are held against the control: the mean, and the lower bound, are those of the row with the highest mean, the
    upper bound is the highest of both, so that it holds whichever row is truly the best. Attacks that were told nothing
    but classes are students of the floor and gain nothing, so if there are no others, the bound is exactly zero.
    Likewise a gain is the lowest over the references, with the lowest lower bound. The control, and key holders, for
    whom a claim is made, come from :func:`sdbctl.metrics.crossfit`, which flatters none.
    """

    trained = {name: row for name, row in students.items() if not name.startswith("control")}

    def rivals(role: Role, labels: Sequence[bool | None] | None = None) -> list[Student]:
        return best_first((row for row in trained.values() if row.role == role), labels=labels)

    def over(values: list[float], control: str) -> Interval:
        return paired(values, students[control].values) if values and control in students else Interval()

    def strongest(access: Sequence[str], labels: Sequence[bool | None] | None, control: str) -> tuple[Interval, str]:
        rows = [row for kind in access for row in finalists(trained, kind, labels)]
        found = {}
        for row in rows if control in students else []:
            gained = over(accuracies(row.values), control)
            found[row.name] = none(gained) if needless(row) else gained
        highs = [one.high for one in found.values() if one.high is not None]
        # of one seed there are no bounds
        high = max(highs) if highs and len(highs) == len(found) else None
        best = max(found, key=lambda name: found[name].mean or 0.0, default="")
        return (replace(found[best], high=high), best) if best else (Interval(), "")

    def advantage(access: Sequence[str]) -> Advantage:
        if not any(s.role == "attack" and s.access == access[0] and s.mean is not None for s in students.values()):
            return Advantage()
        labelled, best = strongest(access, None, "control")
        unlabelled, other = strongest(access, [False], "control_unlabelled")
        smoothing = over(accuracies(students[best].values), "label_smoothing") if best else Interval()
        return Advantage(labelled, unlabelled, best, other, smoothing)

    def gain(role: Role) -> Interval:
        own = best_of(rivals(role))
        # key holders are measured with labels
        gains = [paired(own, row.values) for row in rivals("reference", labels=[True, None])] if own else []
        low = min((one.low for one in gains if one.low is not None), default=None)
        return replace(min(gains, key=lambda gain: gain.mean or 0.0), low=low) if gains else Interval()

    return {
        "unauthorized_advantage": UnauthorizedAdvantage(api=advantage(["api"]), file=advantage(["file", "api"])),
        "authorized_gain": gain("authorized"),
        "sealed_gain": gain("target"),
        "protectable": over(best_of(rivals("reference")), "control"),
        "protectable_unlabelled": over(best_of(rivals("reference", labels=[False])), "control_unlabelled"),
    }


def none(advantage: Interval) -> Interval:
    """The advantage of an attack that got no soft output: none, exactly, since it is one of the floor's students."""
    low = None if advantage.low is None else min(advantage.low, 0.0)
    return replace(advantage, mean=min(advantage.mean or 0.0, 0.0), low=low, high=0.0)


def verdict(report: Report) -> str:
    """One sentence: what this box protects against, and what it does not."""
    api, held = report.unauthorized_advantage.api, report.unauthorized_advantage.file
    # a suite may have tried only those who hold the file
    threat, means = (held, "file") if api.labelled.mean is None else (api, "outputs")
    if threat.labelled.mean is None:
        return f"No student was trained, so nothing is known about protection; use --attack.{_shown(report)}"
    # each is compared with a floor of its own, and judged only where the original is worth distilling
    threats = [
        (threat.labelled, "", report.protectable, report.nothing_to_protect),
        (threat.unlabelled, " without labels", report.protectable_unlabelled, report.nothing_to_protect_unlabelled),
    ]
    known = [one for one in threats if one[0].mean is not None]
    gains = " and ".join(_gain(interval, who) for interval, who, _, _ in known)
    if threat is held:
        other = "This is about who holds the file; attackers through the API were not tried"
    elif held.labelled.mean is None:
        other = "Attackers who hold the file were not tried"
    elif held.labelled.n == 1:
        other = "Attackers who hold the file were hardly tried, by one seed"
    else:
        parts = [(held.labelled, ""), (held.unlabelled, " without labels")]
        other = "Who holds the file gains " + " and ".join(_gain(*part) for part in parts if part[0].mean is not None)
    end = f"{other}.{_shown(report)}"
    what = "box" if _boxed(report) else "model"
    if report.protectable.mean is None:
        if what == "model" and any(interval.n == 1 for interval, *_ in known):
            return f"One seed only: through its {means} one gains {gains} over the floor. {end}"
        if what == "model":
            surely = any((interval.low or 0.0) > ADVANTAGE_LIMIT for interval, *_ in known)
            finding = "Distillable" if surely else "Not shown to be distillable"
            return f"{finding}: through its {means} one gains {gains} over the floor. {end}"
        return (
            f"Distilling the box gains {gains} over the floor; whether there was something to protect is unknown "
            f"without --original. {end}"
        )
    judged = [(interval, worth) for interval, _, worth, vain in known if not vain]
    if not judged:
        finding = "Nothing to protect here"
    elif any(interval.high is None for interval, _ in judged):
        finding = "One seed only"
    elif all((interval.high or 0.0) <= ADVANTAGE_LIMIT for interval, _ in judged):
        finding = f"Undistillable through its {means} by the attacks tried"
        if not all(worth_protecting(worth) for _, worth in judged if worth.mean is not None):
            finding = (
                f"No attack tried gains more than {ADVANTAGE_LIMIT:g} points, but the original is not sure to be worth "
                "distilling"
            )
    elif any((interval.low or 0.0) > ADVANTAGE_LIMIT for interval, _ in judged):
        finding = "Not protected"
    else:
        finding = "Not shown to be undistillable"
    worths = " and ".join(_points(worth, who) for _, who, worth, _ in known if worth.mean is not None)
    said = f"{finding}: distilling the {what} gains {gains} over the floor; the original gives {worths}"
    if 0 < len(judged) < len(known):
        vain = "with labels" if report.nothing_to_protect else "without labels"
        said += f", so there is nothing to protect {vain}"
    if (gain := report.authorized_gain).mean is not None:
        said += f"; the key is worth {_signed(gain.mean)} points against distilling the original"
    if (inner := report.sealed_gain).mean is not None:
        said += f"; the assistant sealed in the file is worth {_signed(inner.mean)} points to key holders"
    return f"{said}. {end}"


def _boxed(report: Report) -> bool:
    """Whether what was measured is a box, and not a model that nobody defends."""
    return _is_box(report.box)


def _is_box(said: Mapping[str, Any]) -> bool:
    return bool(said) and said.get("kind", "box") == "box"


def _shown(report: Report) -> str:
    """What no attack can change: that anybody opens a box, or that outputs say no more than top-1 answers, or more."""
    boxed, public = report.models.get("boxed"), report.key_strength.public
    if public is not None and public > OPEN:
        return f" A pattern that anybody has opens it for {100 * public:.0f} % of the images."
    if boxed is None or boxed.beyond_top1 is None:
        return ""
    if boxed.beyond_top1 > 0.5 and _boxed(report):
        return f" Its outputs say more than the predicted class for {100 * boxed.beyond_top1:.0f} % of the images."
    if boxed.beyond_top1 > MOSTLY:
        return ""
    few = f" of all but {100 * boxed.beyond_top1:.2g} % of the images" if boxed.beyond_top1 else ""
    told = {row.name: row.beyond for row in report.students.values() if row.beyond is not None}
    more = ", and no attacker was told more" if told and not any(told.values()) else ""
    if any(told.get(name) for name in _searching()):
        more = ", but do through patterns that a search found"
    return f" Its outputs{few} say no more than the predicted class{more}."


def _signed(value: float | None) -> str:
    shown = round(value or 0.0, 1)
    return f"{shown:+.1f}" if shown else "0.0"


def _points(interval: Interval, who: str) -> str:
    return f"{_signed(interval.mean)} points{who}"


def _gain(interval: Interval, who: str) -> str:
    """``+0.8 points without labels (at most +1.9)``, the bound where there is one."""
    most = "" if interval.high is None else f" (at most {_signed(interval.high)})"
    return f"{_points(interval, who)}{most}"


def _caveats(bench: Bench, students: Mapping[str, Student]) -> list[str]:
    notes = []
    if students:
        tried = bench.config.chosen.rows
        if bench.strength == 0 and any(ATTACKS[row.attack].on_key for row in tried):
            notes.append("No key: the model has none to look for, so attacks on the key were left out.")
        if bench.strength > 0 and not any(ATTACKS[row.attack].searches for row in tried):
            notes.append("Nobody searched for a pattern that opens the box, as attackers of the suite core do.")
        notes += _searches(students)
        if bench.surrogate is None and any(ATTACKS[row.attack].surrogate for row in tried):
            notes.append(
                "Attackers had no images of another data set; with --surrogate they have, and often learn much more."
            )
        notes.append(
            f"Students see {len(bench.transfer):,} transfer images for {bench.config.recipe.epochs} epochs; short "
            "training exaggerates what distillation gives."
        )
        if bench.config.chosen.tune == 1 and WITH_KEY[1] in bench.sources:
            notes.append("The key's first pattern alone was asked with; others may teach better.")
        if bench.config.reported < 5:
            notes.append(f"n = {bench.config.reported}: a headline needs 5 seeds.")
        if bench.config.tuned < max(USUAL, bench.config.chosen.tune):
            notes.append("Settings were not fully tuned; the attacker may do better.")
    return notes


def _searching() -> set[str]:
    """The rows whose attackers search for patterns by answers."""
    return {name for name, attack in ATTACKS.items() if attack.searches}


def _searches(students: Mapping[str, Student]) -> list[str]:
    """What searches for patterns that found none say of the next one."""
    tries: dict[str, int] = {}
    searching = _searching()
    rows = [row for name, row in students.items() if name in searching and row.beyond is not None]
    for row in rows:
        # with labels and without it is the same search
        name, patterns = row.name.removesuffix("_unlabelled"), row.config.get("patterns", 1)
        assert isinstance(patterns, int | float)
        tries[name] = max(tries.get(name, 0), max(1, row.n) * int(patterns))
    if not rows or any(row.beyond for row in rows):
        return []
    count = sum(tries.values())
    return [
        f"{count} searches for a pattern found none that brings out more than the class, so fewer than "
        f"{100 * (1 - 0.05 ** (1 / count)):.0f} % of such searches do (with 95 % confidence)."
    ]


def _cost(bench: Bench, students: Mapping[str, Student], seconds: float) -> dict[str, object]:
    plain = [row.name for row in bench.rows() if bench.runs(row.name) == 1]
    trained = [students[name] for name in plain if name in students and students[name].seconds]
    images = len(bench.transfer) * bench.config.recipe.epochs
    rate = images / float(np.mean([student.seconds for student in trained])) if trained else None
    # what it goes on with took its time, too
    seconds += sum(bench.spent.earlier.values()) / bench.config.jobs
    return {
        "seconds": round(seconds, 1),
        "student_images_per_second": round(rate, 1) if rate else None,
        "peak_memory_mib": round(max(bench.spent.memory, peak_memory()) / 2**20),
        "jobs": bench.config.jobs,
    }
