"""Settings are judged on validation images, students reported on test images with fresh seeds; what costs say."""

import numpy as np
import pytest
import torch

from sdbctl import evaluate, protocol, workers
from sdbctl.attacks import ATTACKS
from sdbctl.cells import Bench, Cell, EvalConfig, Outcome, Source
from sdbctl.data import ImageSet, Preprocess
from sdbctl.engine import Engine
from sdbctl.training import Silent
from sdbctl.updates import Recipe


def labelled(label, n=40):
    return ImageSet.of(torch.zeros(n, 1, 8, 8, dtype=torch.uint8), torch.full((n,), label))


@pytest.fixture
def bench():
    config = EvalConfig("cnn-tiny", Recipe(epochs=2, batch_size=8), seeds=3, tune=4, suite="core")
    return Bench(
        {"boxed": Source(sha256="b")},
        labelled(0),
        labelled(1),
        labelled(0),
        Preprocess((0.0,), (1.0,), (1, 8, 8)),
        config,
        Engine(torch.device("cpu")),
        2,
        "f",
    )


def test_the_setting_that_is_best_on_validation_images_is_reported_with_fresh_seeds(bench, monkeypatch):
    best, seen = ATTACKS["kd"].grid[2], []

    def run(bench, some, folder, progress):
        seen.extend(some)
        values = {cell.id: 90.0 if cell.row == "unauthorized" and cell.config == best else 50.0 for cell in some}
        return {
            cell.id: Outcome(values[cell.id], 100 - values[cell.id] if cell.final else None, 0.0, 1, None, 1)
            for cell in some
        }

    monkeypatch.setattr(protocol, "run_cells", run)
    row = protocol.train_students(bench, None, Silent())["unauthorized"]
    assert row.config.items() >= best.items()
    assert (row.values, set(row.validations)) == ((10.0,) * 3, {90.0})
    tried, reported = ([cell for cell in seen if cell.final is final] for final in (False, True))
    assert {cell.seed for cell in tried}.isdisjoint({0, 1, 2})
    assert {cell.seed for cell in reported} == {0, 1, 2}


def test_a_student_is_reported_on_test_images(bench):
    """Of one that learns that everything is of class 0, which is so of the test images alone."""
    row = Cell("cross_entropy", "", ATTACKS["cross_entropy"].grid[0], 0, True)
    outcome = bench.run(row)
    assert (outcome.validation, outcome.test) == (0.0, 100.0)


@pytest.mark.parametrize("value", ["null", '"x"', "true", "NaN", "1e999", "[1.0]", "60.0}", ""])
def test_a_student_whose_file_is_damaged_is_trained_again(bench, value, tmp_path):
    cell = Cell("cross_entropy", "", {}, 0, True)
    workers._keep(bench, cell, Outcome(60.0, 61.0, 0.1, 0), tmp_path)
    assert workers._stored(bench, cell, tmp_path) == Outcome(60.0, 61.0, 0.1, 0)
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().replace("60.0", value))
    assert workers._stored(bench, cell, tmp_path) is None


def test_a_box_that_is_worse_costs_something():
    labels = torch.arange(100) % 6
    good = 12 * torch.eye(6)[labels]
    bad = good.clone()
    bad[:10] = 12 * torch.eye(6)[(labels[:10] + 1) % 6]
    cost = evaluate.inference_cost(good, bad, labels)
    assert cost.top1.mean == pytest.approx(10) and 0 < cost.top1.low < 10 < cost.top1.high
    # of what is said to be certain nine in ten are right
    assert cost.ece.mean == pytest.approx(0.1, abs=0.01)
    assert cost.nll.mean == pytest.approx(1.2, abs=0.01) and cost.nll_binary.mean == pytest.approx(1.04, abs=0.01)
    assert cost.top5.mean >= 0
    gain = evaluate.inference_cost(bad, good, labels)
    assert [number.mean for number in (gain.top1, gain.ece, gain.nll)] == pytest.approx(
        [-number.mean for number in (cost.top1, cost.ece, cost.nll)]
    )


@pytest.mark.parametrize("seeds", [3, 5])
def test_the_control_with_labels_is_not_chosen_by_luck(seeds):
    """Of eight rows of the floor that are alike, four of which have labels."""
    from tests.test_attacks import made_of, some

    rng, found = np.random.default_rng(0), []
    for _ in range(400):
        skill = rng.normal(size=(8, seeds))
        rows = [some(f"r{n}", "floor", skill[n], skill[n], labels=n % 2 == 0) for n in range(8)]
        found.append(protocol.controlled(made_of(*rows))["control"].mean)
    assert abs(np.mean(found)) < 0.08
