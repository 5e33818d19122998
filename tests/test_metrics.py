"""Metrics against independent formulas."""

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import log_softmax, softmax

from sdbctl import metrics

RNG = np.random.default_rng(1)
Z, Y = RNG.normal(0, 2, (400, 7)), RNG.integers(0, 7, 400)
LOGITS, LABELS = torch.tensor(Z), torch.tensor(Y)


def test_accuracies():
    scores = metrics.score(LOGITS, LABELS)
    assert scores.top1 == pytest.approx(100 * (Z.argmax(1) == Y).mean())
    assert scores.top5 == pytest.approx(100 * np.mean([y in np.argsort(-z)[:5] for z, y in zip(Z, Y, strict=True)]))


def test_likelihoods():
    scores = metrics.score(LOGITS, LABELS)
    assert scores.nll == pytest.approx(-log_softmax(Z, 1)[np.arange(400), Y].mean(), rel=1e-5)
    confidence, hit = softmax(Z, 1).max(1), Z.argmax(1) == Y
    assert scores.nll_binary == pytest.approx(-np.log(np.where(hit, confidence, 1 - confidence)).mean(), rel=1e-4)


def test_ece():
    confidence, hit = softmax(Z, 1).max(1), Z.argmax(1) == Y
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - hit[inside].mean())
    assert metrics.ece(LOGITS, LABELS) == pytest.approx(expected, rel=1e-6)


def test_ece_of_a_perfectly_calibrated_model_is_zero():
    logits = torch.log(torch.tensor([[0.75, 0.25]] * 4))
    assert metrics.ece(logits, torch.tensor([0, 0, 0, 1])) == pytest.approx(0, abs=1e-6)


def test_beyond_top1_counts_images_whose_outputs_are_no_function_of_the_prediction():
    heights = torch.tensor([2.0, 3.0, 1.0])
    predicted = torch.arange(300) % 3
    z = torch.nn.functional.one_hot(predicted, 3) * heights[predicted][:, None]
    # a constant on all logits is no difference
    assert metrics.beyond_top1(z + torch.randn(300, 1)) == 0
    z[:6] += 0.5 * torch.eye(3).repeat(2, 1)
    assert metrics.beyond_top1(z) == pytest.approx(6 / 300)
    assert metrics.beyond_top1(LOGITS) > 0.5
    assert metrics.beyond_top1(LOGITS / 2e4) > 0.5
    # nothing to compare with says nothing
    assert metrics.beyond_top1(LOGITS[:1]) == metrics.beyond_top1(5 * torch.eye(3)) == 1


def test_residual_is_zero_only_for_flat_non_targets():
    flat = torch.zeros(3, 6)
    flat[:, 2] = 4.0
    assert metrics.residual(flat) == pytest.approx(0, abs=1e-7)
    rest = np.array([np.delete(z, z.argmax()) for z in Z]) / 4
    expected = (-np.log(6) - log_softmax(rest, 1).mean(1)).mean()
    assert metrics.residual(LOGITS) == pytest.approx(expected)


def test_seed_interval_is_students_t():
    values = [1.0, 2.0, 4.0, 4.5, 3.0]
    mean, low, high = metrics.seed_interval(values)
    expected = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (low, high) == pytest.approx(expected)
    assert mean == pytest.approx(2.9)
    assert metrics.seed_interval([1.0]) == (1.0, None, None)


def test_bootstrap_interval_covers_the_normal_interval():
    before = torch.tensor(RNG.normal(size=2000))
    after = before + torch.tensor(RNG.normal(0.3, 1, 2000))
    mean, low, high = metrics.bootstrap_interval(before, after)
    difference = (after - before).numpy()
    half = 1.96 * difference.std() / 2000**0.5
    assert mean == pytest.approx(difference.mean())
    assert low == pytest.approx(mean - half, abs=0.02)
    assert high == pytest.approx(mean + half, abs=0.02)
    assert metrics.bootstrap_interval(before, after) == (mean, low, high)


def test_bootstrap_ece_of_equal_models_is_zero():
    assert metrics.bootstrap_ece(LOGITS, LOGITS, LABELS) == (0.0, 0.0, 0.0)


def test_the_bound_of_a_loss_of_calibration_is_not_below_what_is_lost():
    """The error itself is too high where there is none to lose, and resamples are once more."""

    def logits(confidence):
        return torch.stack([confidence.log(), (1 - confidence).log()], 1)

    bounds = []
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        confidence = 0.55 + 0.35 * torch.rand(2000, generator=rng).double()
        labels = (torch.rand(2000, generator=rng) >= confidence).long()
        mean, least, most = metrics.bootstrap_ece(logits(confidence), logits(confidence + 0.06), labels)
        assert least <= mean <= most
        bounds.append((least, most))
    low, high = np.array(bounds).T
    # which percentiles miss in 19 of 20
    assert np.mean(high < 0.06) <= 0.3 and high.mean() < 0.09 and low.mean() > 0.02


def test_crossfit_is_judged_by_the_other_seeds():
    validation = [[90.0, 50.0, 50.0], [60.0, 70.0, 60.0]]
    # seed 0: the second row is better in both others; seeds 1 and 2: in one of two, and in one of four resamples
    found = metrics.crossfit(validation, [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert found == [4.0, pytest.approx(2.75, abs=0.1), pytest.approx(3.75, abs=0.1)]
    assert metrics.crossfit([[90.0], [60.0]], [[1.0], [4.0]]) == [1.0]


def test_chances_of_being_the_best():
    assert metrics.chances([[90.0, 91.0, 92.0], [60.0, 61.0, 62.0]]) == [1.0, 0.0]
    assert metrics.chances([[60.0], [90.0]]) == [0.0, 1.0]
    # two seeds are resampled as 00, 01, 10 and 11; the first of equals counts
    assert metrics.chances([[1.0, 3.0], [2.0, 2.0]]) == pytest.approx([0.75, 0.25], abs=0.03)


def test_crossfit_does_not_flatter_the_best_of_equals():
    rng = np.random.default_rng(0)
    chosen, plain = [], []
    for _ in range(2000):
        # validation and test share what a seed's student learned
        skill = rng.normal(size=(7, 5))
        chosen.append(np.mean(metrics.crossfit(skill, skill)))
        plain.append(skill[skill.mean(1).argmax()].mean())
    assert abs(np.mean(chosen)) < 0.04 < 0.5 < np.mean(plain)
