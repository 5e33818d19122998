"""How the demo's transfer set was chosen: by the floor and by the original alone.

No box exists while this runs: whoever needs top-1 answers of the box gets the original's. Accuracies are on the
validation split; the test split is not looked at. Writes a Markdown table to standard output:
python examples/demo_choice.py > examples/results/demo-choice.md
"""

import tempfile
from pathlib import Path

import numpy as np
import torch

from sdbctl import boxfile, data, demo, metrics, suites
from sdbctl.boxstep import plain_step
from sdbctl.cells import Bench, EvalConfig, Source
from sdbctl.data import Preprocess
from sdbctl.distill import build_student
from sdbctl.engine import Engine
from sdbctl.protocol import train_students
from sdbctl.report import Student
from sdbctl.training import Silent, fit

SEEDS = 8
ROWS = tuple(row for row in suites.CORE if row.role in ("floor", "reference"))


def best(students: dict[str, Student], role: str) -> list[float]:
    """Validation accuracies of the best row of a role, chosen for each seed by all others."""
    seen = [
        [value or 0.0 for value in one.validations]
        for one in students.values()
        if one.role == role and not one.name.startswith("control")
    ]
    return metrics.crossfit(seen, seen)


def main() -> None:
    torch.set_num_threads(1)
    engine = Engine(torch.device("cpu"))
    dataset = data.load("digits", root=Path())
    preprocess = Preprocess((0.5,), (0.5,), dataset.train.shape)
    suites.SUITES = {**suites.SUITES, "choice": suites.Suite("", ROWS)}
    print(f"Validation top-1 of students, {SEEDS} seeds, {demo.STUDENT}, {demo.STUDENT_RECIPE.epochs} epochs;")
    print(f"sdbctl {boxfile.versions()['sdbctl']}, torch {torch.__version__}.\n")
    print("| transfer images | best of the floor | best from the original | difference | 95 % bounds |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for size in (64, 96, 128):
        splits = data.split(dataset, **{**demo.SIZES, "transfer": size})
        teacher = build_student(demo.TEACHER, 10, 1, 0)
        fit(teacher, plain_step, splits.owner, preprocess, demo.TEACHER_RECIPE, engine)
        original = Source(net=teacher, sha256="teacher")
        with tempfile.TemporaryDirectory() as answers:
            bench = Bench(
                {"original": original, "boxed": original.wrapped("top1")},
                splits.transfer.alone(),
                splits.validation,
                splits.test,
                preprocess,
                EvalConfig(demo.STUDENT, demo.STUDENT_RECIPE, seeds=SEEDS, tune=3, suite="choice"),
                engine,
                10,
                dataset.fingerprint,
                answers=Path(answers),
            )
            students = train_students(bench, None, Silent())
        floor, reference = best(students, "floor"), best(students, "reference")
        mean, low, high = metrics.seed_interval([a - b for a, b in zip(reference, floor, strict=True)])
        print(
            f"| {size} | {np.mean(floor):.1f} | {np.mean(reference):.1f} | {mean:+.1f} | {low:+.1f} to {high:+.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
