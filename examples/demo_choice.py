"""How the demo's student and epochs were chosen: by the floor and by distillation from the original alone.

No box exists while this runs. Accuracies are on the validation split, mean of five seeds; the test split is not
touched. Writes a Markdown table to standard output: python examples/demo_choice.py > examples/results/demo-choice.md
"""

from pathlib import Path

import numpy as np
import torch

from sdbctl import boxfile, data, demo
from sdbctl.attacks import ATTACKS
from sdbctl.box import plain_step
from sdbctl.cells import Bench, Cell, EvalConfig, Source, run_cells
from sdbctl.data import Preprocess
from sdbctl.distill import build_student
from sdbctl.suites import BY_NAME
from sdbctl.training import Engine, Recipe, Silent, fit

SEEDS = 5
FLOOR = ("cross_entropy", "label_smoothing", "class_constant")


def main() -> None:
    torch.set_num_threads(1)
    engine = Engine(torch.device("cpu"))
    dataset = data.load("digits", root=Path())
    splits = data.split(dataset, **demo.SIZES)
    preprocess = Preprocess((0.5,), (0.5,), dataset.train.shape)
    teacher = build_student(demo.TEACHER, 10, 1, 0)
    fit(teacher, plain_step(), splits.owner, preprocess, demo.TEACHER_RECIPE, engine)
    print(f"Validation top-1 of students, {SEEDS} seeds; {splits.describe()['transfer']} transfer images;")
    print(f"sdbctl {boxfile.versions()['sdbctl']}, torch {torch.__version__}.\n")
    print("| student | epochs | best of the floor | KD from the original | difference |")
    print("| --- | --- | --- | --- | --- |")
    for student in ("cnn-tiny",):
        for epochs in (60, 120):
            recipe = Recipe(epochs=epochs, batch_size=32, lr=0.1)
            bench = Bench(
                {"original": Source(net=teacher, sha256="teacher")},
                splits.transfer,
                splits.validation,
                splits.test,
                preprocess,
                EvalConfig(student, recipe),
                engine,
                10,
                dataset.fingerprint,
            )

            def best(row: str, teacher: str, bench: Bench = bench) -> float:
                attack = BY_NAME[row].attack
                means = []
                for config in ATTACKS[attack].grid:
                    cells = [Cell(row, teacher, config, seed, final=False) for seed in range(SEEDS)]
                    means.append(np.mean([o.validation for o in run_cells(bench, cells, None, Silent()).values()]))
                return float(max(means))

            floor = max(best(row, "") for row in FLOOR)
            kd = best("kd_original", "original")
            print(f"| {student} | {epochs} | {floor:.1f} | {kd:.1f} | {kd - floor:+.1f} |", flush=True)


if __name__ == "__main__":
    main()
