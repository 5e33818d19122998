"""Measure a box: what its users lose, what an attacker gains, what key holders gain."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sdbctl import boxfile, metrics
from sdbctl.cells import Bench
from sdbctl.curves import budget_curve, key_curves
from sdbctl.protocol import paired, train_students
from sdbctl.report import (
    ADVANTAGE_LIMIT,
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
from sdbctl.training import Progress, Silent, environment, peak_memory, predict

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
        teacher = bench.sources[name].open(bench.engine.device, bench.classes)
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
            "tuned_configurations": bench.config.tuned,
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

    def best(role: Role, access: Sequence[str] = ("api",), labels: Sequence[bool | None] | None = None) -> list[float]:
        """By seed, the best of several rows that compete."""
        rows = [
            student
            for name, student in students.items()
            # a pattern of one's own is an attack like any other
            if (student.role == role or (role == "attack" and name == "authorized_wrong_key"))
            and student.mean is not None
            and student.access in access
            and (labels is None or student.labels in labels)
            and not name.startswith("control")
        ]
        if not rows:
            return []
        most = max(student.n for student in rows)
        rows = [student for student in rows if student.n == most]
        known = [student.validations or (student.validation,) * most for student in rows]
        return metrics.crossfit(
            [[value or 0.0 for value in values] for values in known],
            [[value or 0.0 for value in student.values] for student in rows],
        )

    def over(values: list[float], control: str) -> Interval:
        return paired(values, students[control].values) if values and control in students else Interval()

    def advantage(access: Sequence[str]) -> Advantage:
        if not any(s.role == "attack" and s.access == access[0] and s.mean is not None for s in students.values()):
            return Advantage()
        unlabelled = best("attack", access, [False])
        return Advantage(over(best("attack", access), "control"), over(unlabelled, "control_unlabelled"))

    original, authorized = best("reference"), best("authorized")
    return {
        "unauthorized_advantage": UnauthorizedAdvantage(api=advantage(["api"]), file=advantage(["file", "api"])),
        "authorized_gain": paired(authorized, original) if authorized and original else Interval(),
        "protectable": over(original, "control"),
    }


def verdict(report: Report) -> str:
    """One sentence: what this box protects against, and what it does not."""
    api, held, protectable = report.unauthorized_advantage.api, report.unauthorized_advantage.file, report.protectable
    # a suite may have tried only those who hold the file
    threat, means = (held, "file") if api.labelled.mean is None else (api, "outputs")
    advantage, who = threat.labelled, ""
    if threat.unlabelled.mean is not None and _most(threat.unlabelled) > _most(threat.labelled):
        # each is compared with a floor of its own
        advantage, who = threat.unlabelled, " without labels"
    if advantage.mean is None:
        return "No student was trained, so nothing is known about protection; use --attack."
    if protectable.mean is None:
        return (
            f"The attacker gains {advantage.mean:+.1f} points over the floor; whether there was something to protect "
            "is unknown without --original."
        )
    if report.nothing_to_protect:
        finding = (
            f"Nothing to protect here: distilling the original is worth only {protectable.mean:+.1f} points over "
            "what an attacker has anyway."
        )
        if (threat.unlabelled.low or 0) > ADVANTAGE_LIMIT:
            finding += f" Attackers without labels gain {threat.unlabelled.mean:+.1f} points over their own floor."
        return finding
    if advantage.high is None:
        finding = f"One seed only: distilling the box{who} gains {advantage.mean:+.1f} points over the floor"
    elif advantage.high <= ADVANTAGE_LIMIT:
        finding = (
            f"Undistillable through its {means} by the attacks tried: at most {advantage.high:+.1f} points over the "
            f"floor{who} (95 %)"
        )
    elif advantage.low is not None and advantage.low > ADVANTAGE_LIMIT:
        finding = f"Not protected: distilling the box{who} gains {advantage.mean:+.1f} points over the floor"
    else:
        finding = (
            f"Not shown to be undistillable: distilling the box{who} gains {advantage.mean:+.1f} points over the "
            f"floor, at most {advantage.high:+.1f} (95 %)"
        )
    worth = f"the original gives {protectable.mean:+.1f}"
    gain = report.authorized_gain
    key = f"; the key is worth {gain.mean:+.1f} points against distilling the original" if gain.mean is not None else ""
    if threat is held:
        other = "This is about who holds the file; attackers through the API were not tried"
    elif held.labelled.mean is None:
        other = "Attackers who hold the file were not tried"
    else:
        most = f", at most {held.labelled.high:+.1f}" if held.labelled.high is not None else ""
        other = f"Who holds the file gains {held.labelled.mean:+.1f}{most}"
    return f"{finding}; {worth}{key}. {other}."


def _most(interval: Interval) -> float:
    """The upper bound, or for lack of one the mean."""
    known = interval.mean if interval.high is None else interval.high
    return -math.inf if known is None else known


def _caveats(bench: Bench, students: Mapping[str, Student]) -> list[str]:
    notes = []
    if students:
        notes.append(
            f"Students see {len(bench.transfer):,} transfer images for {bench.config.recipe.epochs} epochs; short "
            "training exaggerates what distillation gives."
        )
        if bench.config.reported < 5:
            notes.append(f"n = {bench.config.reported}: a headline needs 5 seeds.")
        if bench.config.tuned < 6:
            notes.append("Settings were not fully tuned; the attacker may do better.")
    return notes


def _cost(bench: Bench, students: Mapping[str, Student], seconds: float) -> dict[str, object]:
    trained = [student for student in students.values() if student.seconds]
    images = len(bench.transfer) * bench.config.recipe.epochs
    rate = images / float(np.mean([student.seconds for student in trained])) if trained else None
    return {
        "seconds": round(seconds, 1),
        "student_images_per_second": round(rate, 1) if rate else None,
        "peak_memory_mib": round(peak_memory() / 2**20),
        "jobs": bench.config.jobs,
    }
