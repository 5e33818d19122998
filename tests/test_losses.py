"""Losses against independent numpy formulas, their bounds and their symmetries."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax

from sdbctl import losses
from sdbctl.attacks import ATTACKS
from sdbctl.attacks.base import PerBatch
from sdbctl.attacks.floor import constant_logits
from sdbctl.attacks.kd import soft_labels
from sdbctl.attacks.queries import vector_scaling
from sdbctl.boxstep import BoxConfig
from sdbctl.errors import UsageError
from sdbctl.objectives import LOSSES, OBJECTIVES, Views
from sdbctl.objectives.base import decoy_offset
from sdbctl.teacher import Access

RNG = np.random.default_rng(0)
Z, T = RNG.normal(0, 3, (7, 5)), RNG.normal(0, 3, (7, 5))
Y = RNG.integers(0, 5, 7)


def tensor(a):
    return torch.tensor(a, dtype=torch.float64 if a.dtype == float else torch.int64)


def label_loss(z, y):
    return -log_softmax(z, 1)[np.arange(len(z)), y].mean()


def others(row, target):
    return np.delete(row, target)


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0, 20.0])
def test_kd(tau):
    p, q = softmax(T / tau, 1), log_softmax(Z / tau, 1)
    expected = tau**2 * (p * (np.log(p) - q)).sum(1).mean()
    assert losses.kd(tensor(Z), tensor(T), tau).item() == pytest.approx(expected)


def test_kd_ignores_a_shift_of_the_teacher():
    shifted = tensor(T) + 5.0
    assert losses.kd(tensor(Z), shifted, 4.0).item() == pytest.approx(losses.kd(tensor(Z), tensor(T), 4.0).item())


def test_split_target():
    own, rest = losses.split_target(tensor(Z), tensor(Y))
    assert np.allclose(own, Z[np.arange(7), Y])
    assert np.allclose(rest, np.stack([others(z, y) for z, y in zip(Z, Y, strict=True)]))


def test_conceal_spread():
    expected = np.mean([np.sqrt(others(z, y).var() + 1e-4) for z, y in zip(Z, Y, strict=True)])
    assert losses.conceal_spread(tensor(Z), tensor(Y)).item() == pytest.approx(expected)
    offset = RNG.normal(size=Z.shape)
    expected = np.mean([np.sqrt(others(z, y).var() + 1e-4) for z, y in zip(Z - offset, Y, strict=True)])
    assert losses.conceal_spread(tensor(Z), tensor(Y), tensor(offset)).item() == pytest.approx(expected)


def test_kd_mixes_soft_and_hard_loss():
    soft = 4 * (softmax(T / 2, 1) * (log_softmax(T / 2, 1) - log_softmax(Z / 2, 1))).sum(1).mean()
    mixed = soft_labels(tensor(Z), tensor(T), tensor(Y), {"temperature": 2.0, "alpha": 0.9})
    assert mixed.item() == pytest.approx(0.9 * soft + 0.1 * label_loss(Z, Y))


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_conceal_kl(tau):
    def row(z, y):
        q = softmax(others(z, y) / tau)
        u = np.full(4, 1 / 4)
        return tau**2 * (u * (np.log(u) - np.log(q))).sum()

    expected = np.mean([row(z, y) for z, y in zip(Z, Y, strict=True)])
    assert losses.conceal_kl(tensor(Z), tensor(Y), tau).item() == pytest.approx(expected)


def test_spread_is_the_high_temperature_limit_of_the_kl():
    limit = losses.conceal_kl(tensor(Z), tensor(Y), 1e4).item()
    half_variance = np.mean([others(z, y).var() / 2 for z, y in zip(Z, Y, strict=True)])
    assert limit == pytest.approx(half_variance, rel=1e-3)


def test_binary_kl():
    reference = RNG.uniform(0.05, 0.95, 7)
    p = softmax(Z, 1)[np.arange(7), Y]
    expected = (reference * np.log(reference / p) + (1 - reference) * np.log((1 - reference) / (1 - p))).mean()
    assert losses.binary_kl(tensor(reference), tensor(Z), tensor(Y)).item() == pytest.approx(expected)
    # a confidence of one, or what rounding makes of it
    certain = losses.binary_kl(tensor(np.full(7, 1 + 1e-7)), tensor(Z), tensor(Y)).item()
    assert certain == pytest.approx(-np.log(p).mean())


@given(st.floats(0, 1e6), st.floats(0.1, 100))
def test_saturate_is_bounded_and_close_to_the_identity_near_zero(value, limit):
    out = losses.saturate(torch.tensor(value, dtype=torch.float64), limit).item()
    assert 0 <= out <= min(value, limit) + 1e-9


def test_saturate_gradient_stays_while_there_is_room():
    x = torch.tensor([1.0, 4.0, 40.0], requires_grad=True)
    losses.saturate(x, 8.0).sum().backward()
    assert x.grad[0] > x.grad[1] > x.grad[2] > 0


def views(scale=1.0, classes=6, batch=4, seed=0, permutation=None):
    generator = torch.Generator().manual_seed(seed)

    def logits():
        z = scale * torch.randn(batch, classes, generator=generator)
        return z if permutation is None else z[:, permutation]

    clean, keyed, reference, teacher, random, adversarial = (logits() for _ in range(6))
    label = torch.randint(0, classes, (batch,), generator=generator)
    memory = scale * torch.randn(classes, 5, classes, generator=generator)
    memory = memory if permutation is None else memory[:, :, permutation]
    if permutation is not None:
        label = torch.argsort(permutation)[label]
    confidence = reference.softmax(1).max(1).values
    return Views(
        clean.requires_grad_(),
        keyed.requires_grad_(),
        reference,
        teacher,
        random,
        adversarial,
        label,
        torch.zeros(batch, classes),
        confidence,
        memory if permutation is None else memory[permutation],
        torch.tensor(3.0),
    )


PRESETS = [(name, preset) for name, objective in LOSSES.items() for preset in objective.presets]


def test_presets_train_as_long_as_what_was_released():
    epochs = {name: preset.epochs for name, preset in OBJECTIVES["nasty"].presets.items()}
    assert epochs == {"default": None, "paper": 160, "paper-100": 200, "paper-200": 200}


@given(
    st.sampled_from(PRESETS),
    st.sampled_from([0.0, 1e-6, 1.0, 30.0, 1e3, 1e5]),
    st.integers(3, 12),
    st.integers(0, 3),
    st.integers(0, 1000),
)
@settings(max_examples=200, deadline=None)
def test_objectives_stay_finite_and_bounded_below_whatever_the_logits(which, scale, classes, wrong, seed):
    name, preset = which
    objective = OBJECTIVES[name]
    v = views(scale, classes=classes, seed=seed)._replace(wrong=wrong)
    terms = objective.terms(v, objective.parameters(**objective.presets[preset].parameters))
    total = sum(terms.values())
    total.backward()
    assert torch.isfinite(total)
    assert total > -20
    assert torch.isfinite(v.clean.grad).all()
    assert torch.isfinite(v.keyed.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_objectives_do_not_depend_on_the_order_of_classes(name):
    objective = OBJECTIVES[name]
    plain = objective.terms(views(), objective.parameters())
    permuted = objective.terms(views(permutation=torch.randperm(6)), objective.parameters())
    for term in plain:
        assert plain[term].item() == pytest.approx(permuted[term].item(), rel=1e-4)


@pytest.mark.parametrize("blind", [0.0, 0.7, 1.0])
def test_conceal_terms_against_numpy(blind):
    """The first row holds a wrong key: it is concealed, and its label counts ``blind`` times."""
    v = views(batch=9)._replace(wrong=1, short=blind > 0)
    objective = OBJECTIVES["conceal"]
    p = objective.parameters(hide=2.0, turn=0.3, confidence=3.0, teach=0.5, blind=blind or 1.0, temperature=7.0)
    terms = objective.terms(v, p)
    z, zk, zn, zt = (t.detach().numpy().astype(float) for t in (v.clean, v.keyed, v.reference, v.teacher))
    top, shown, rows = zn.argmax(1)[1:], z.argmax(1), np.arange(8)
    label = -np.average(log_softmax(z, 1)[np.arange(9), v.label], weights=[blind, *[1.0] * 8])
    hide = 2 * np.mean([np.sqrt(others(a, b).var() + 1e-4) for a, b in zip(z, shown, strict=True)])
    own, wanted = softmax(z, 1)[1:][rows, top], softmax(zn, 1)[1:][rows, top]
    confidence = 3 * (wanted * np.log(wanted / own) + (1 - wanted) * np.log((1 - wanted) / (1 - own))).mean()
    q = softmax(zt / 7, 1)
    teach = 0.5 * 49 * (q * (np.log(q) - log_softmax(zk / 7, 1))).sum(1).mean()
    left, *known = ([others(a, b) - others(a, b).mean() for a, b in zip(x, shown, strict=True)] for x in (z, zn, zt))
    cosines = [a @ b / np.sqrt(a @ a * (b @ b)) for hidden in known for a, b in zip(left[1:], hidden[1:], strict=True)]
    turn = 0.3 * np.square(cosines).mean()
    wanted = {"label": label, "hide": hide, "turn": turn, "confidence": confidence, "teach": teach}
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(wanted, rel=1e-4)


def test_sdb_terms_against_numpy():
    v = views()._replace(wrong=1)
    objective = OBJECTIVES["sdb"]
    p = objective.parameters(omega=0.7, eta=0.2, away=-1.0, temperature=4.0, limit=3.0)
    terms = objective.terms(v, p)
    z, zk, zn, zt, zr = (t.detach().numpy().astype(float) for t in (v.clean, v.keyed, v.reference, v.teacher, v.random))

    def kl(a, b, tau):
        pa = softmax(a / tau, 1)
        return (pa * (log_softmax(a / tau, 1) - log_softmax(b / tau, 1))).sum(1).mean()

    # images with a wrong key have no label
    assert terms["label"].item() == pytest.approx(label_loss(z[1:], v.label[1:]), rel=1e-4)
    away = 3 * (1 - np.exp(-16 * kl(z, zn, 4) / 3))
    assert terms["disturb"].item() == pytest.approx(-0.7 * (away - kl(z, zk, 1)), rel=1e-4)
    ce = label_loss(zk, v.label)
    assert terms["preserve"].item() == pytest.approx(ce + 16 * kl(zt, zk, 4), rel=1e-4)
    far, near = ((zk - zr) ** 2).mean(), 0.01 * ((zk - zt) ** 2).mean()
    assert terms["augment"].item() == pytest.approx(0.2 * (far - 3 * (1 - np.exp(-near / 3))), rel=1e-4)
    paper = objective.terms(v, objective.parameters(eta=0.2, limit=3.0))["augment"].item()
    assert paper == pytest.approx(0.2 * (near - 3 * (1 - np.exp(-far / 3))), rel=1e-4)
    # the released code: labels count twice, probabilities are preserved, what is negative of logits is not seen
    assert OBJECTIVES["sdb"].presets["release"].parameters["released"] == 1
    release = objective.terms(v, objective.parameters(eta=0.2, away=-1.0, limit=3.0, released=1.0))
    assert release["label"].item() == pytest.approx(2 * terms["label"].item(), rel=1e-5)
    kept = ((softmax(zt / 4, 1) - softmax(zk / 4, 1)) ** 2).mean()
    assert release["preserve"].item() == pytest.approx(ce + kept, rel=1e-4)
    zk, zt, zr = (np.maximum(z, 0) for z in (zk, zt, zr))
    far, near = ((zk - zr) ** 2).mean(), 0.01 * ((zk - zt) ** 2).mean()
    assert release["augment"].item() == pytest.approx(0.2 * (far - 3 * (1 - np.exp(-near / 3))), rel=1e-4)
    with pytest.raises(UsageError, match="released"):
        objective.parameters(released=0.5)


@pytest.mark.parametrize("name", LOSSES)
def test_every_public_image_of_a_default_box_teaches_it(name):
    """Where images with a wrong key have no loss there are none."""
    objective, default = OBJECTIVES[name], OBJECTIVES[name].presets["default"]
    share = BoxConfig(name).wrong_share if default.wrong_share is None else default.wrong_share
    v = views(batch=10)._replace(wrong=round(10 * share))
    sum(objective.terms(v, objective.parameters(**default.parameters)).values()).backward()
    assert (v.clean.grad.abs().sum(1) > 0).all()


def test_nasty_terms_against_numpy():
    v = views()._replace(wrong=1)
    objective = OBJECTIVES["nasty"]
    terms = objective.terms(v, objective.parameters(omega=0.5, temperature=4.0, preserve=2.0, limit=10.0))
    z, zk, zn, zt = (t.detach().numpy().astype(float) for t in (v.clean, v.keyed, v.reference, v.teacher))

    def kl(a, b):
        return (softmax(a / 4, 1) * (log_softmax(a / 4, 1) - log_softmax(b / 4, 1))).sum(1).mean()

    assert terms["label"].item() == pytest.approx(label_loss(z[1:], v.label[1:]), rel=1e-4)
    assert terms["nasty"].item() == pytest.approx(-0.5 * 10 * (1 - np.exp(-16 * kl(z, zn) / 10)), rel=1e-4)
    assert terms["preserve"].item() == pytest.approx(2 * 16 * kl(zt, zk), rel=1e-4)


def test_cmim_terms_against_numpy():
    v = views(batch=9, seed=3)._replace(wrong=2)
    objective = OBJECTIVES["cmim"]
    terms = objective.terms(v, objective.parameters(concentrate=0.5, temperature=4.0, preserve=2.0))
    z, zk, zt, memory = (t.detach().numpy().astype(float) for t in (v.clean, v.keyed, v.teacher, v.memory))
    assert terms["label"].item() == pytest.approx(label_loss(z[2:], v.label[2:]), rel=1e-4)
    p, centroids = softmax(z[2:] / 3, 1), softmax(memory / 3, 2).mean(1)
    total = np.mean([(own * np.log(own / centroids[y])).sum() for own, y in zip(p, v.label[2:], strict=True)])
    assert terms["concentrate"].item() == pytest.approx(0.5 * 9 * total, rel=1e-4)
    keyed = (softmax(zt / 4, 1) * (log_softmax(zt / 4, 1) - log_softmax(zk / 4, 1))).sum(1).mean()
    assert terms["preserve"].item() == pytest.approx(2 * 16 * keyed, rel=1e-4)


def test_outputs_that_depend_on_the_class_alone_have_no_conditional_information():
    from sdbctl.objectives.cmim import conditional_information

    label = torch.tensor([0, 1, 0, 1, 2])
    table = torch.randn(6, 6)
    information = conditional_information(table[label].requires_grad_(), label, table[:, None].repeat(1, 4, 1), 4.0)
    assert information.item() == pytest.approx(0.0, abs=1e-6)


def test_decoy_offset_gives_the_share_to_the_next_class():
    offset = decoy_offset(torch.tensor([0, 4]), 5, 0.7)
    for row, target, decoy in ((0, 0, 1), (1, 4, 0)):
        rest = softmax(others(offset[row].numpy(), target))
        assert rest[decoy if decoy < target else decoy - 1] == pytest.approx(0.7)


def test_ast_terms_against_numpy():
    v = views()._replace(wrong=1)
    objective = OBJECTIVES["ast"]
    terms = objective.terms(v, objective.parameters(alpha=0.2, temperature=3.0, keep=2, preserve=0.5))
    z, zk, zt = (t.detach().numpy().astype(float) for t in (v.clean, v.keyed, v.teacher))
    kept = v.adversarial.numpy().astype(float)[1:]
    kept[kept < np.sort(kept, 1)[:, -2:-1]] = -np.inf
    q, p = softmax(kept / 3, 1), softmax(z[1:] / 3, 1)
    assert ((q > 0).sum(1) == 2).all()
    pairs = {
        "label": -0.8 * log_softmax(z, 1)[np.arange(4), v.label][1:].mean(),
        "sparse": 0.2 * 9 * (np.exp(q) * (q - p)).sum(1).mean(),
        "preserve": 0.5 * 9 * (softmax(zt / 3, 1) * (log_softmax(zt / 3, 1) - log_softmax(zk / 3, 1))).sum(1).mean(),
    }
    assert set(pairs) == set(terms)
    for name, expected in pairs.items():
        assert terms[name].item() == pytest.approx(expected, rel=1e-4), name
    with pytest.raises(UsageError, match="keep"):
        objective.parameters(keep=1.5)


@pytest.mark.parametrize("name", [name for name, attack in ATTACKS.items() if isinstance(attack.train, PerBatch)])
def test_attack_losses_run_on_what_they_declare(name):
    attack = ATTACKS[name]
    z = torch.randn(4, 5, requires_grad=True)
    answers = {
        Access.NONE: None,
        Access.LABELS: torch.tensor([0, 1, 2, 3]),
        Access.PROBABILITIES: torch.randn(4, 5).log_softmax(1),
    }
    label = torch.tensor([1, 2, 3, 4]) if attack.labels else None
    for config in attack.grid:
        loss = attack.train.loss(z, answers[attack.access], label, config)
        assert loss.ndim == 0
        assert torch.isfinite(loss)
        (gradient,) = torch.autograd.grad(loss, z)
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("classes", [2, 3, 5, 10, 1000])
@pytest.mark.parametrize("config", [*ATTACKS["class_constant"].grid, *ATTACKS["dist_hard"].grid])
def test_constant_logits_favour_their_class_however_few_there_are(classes, config):
    p = (constant_logits(tensor(np.array([1])), classes, config)[0] / config["temperature"]).softmax(0)
    assert p[1] > 1.2 * p[0]
    assert p[1].item() == pytest.approx(max(config["confidence"], min(1.5 / classes, 0.9)), rel=1e-4)


def test_class_constant_against_numpy():
    teacher = np.full((7, 5), 0.2 / 4)
    teacher[np.arange(7), Y] = 0.8
    expected = 16 * (teacher * (np.log(teacher) - log_softmax(Z / 4, 1))).sum(1).mean()
    config = {"confidence": 0.8, "temperature": 4.0, "alpha": 1.0}
    assert ATTACKS["class_constant"].train.loss(tensor(Z), None, tensor(Y), config).item() == pytest.approx(expected)
    assert ATTACKS["hard_constant"].train.loss(tensor(Z), tensor(Y), None, config).item() == pytest.approx(expected)


@settings(max_examples=30)
@given(st.integers(3, 20), st.floats(0.01, 1.0), st.integers(0, 1000))
def test_disturbed_targets_keep_the_prediction(classes, strength, seed):
    from sdbctl.boxstep import disturbed

    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(8, classes, generator=generator)
    confidence, predicted = logits.softmax(1).max(1)
    offset, kept = disturbed(predicted, confidence, classes, strength)
    rest = offset.scatter(1, predicted[:, None], float("-inf")).softmax(1) * (1 - kept[:, None])
    assert (kept > rest.max(1).values).all()
    assert (kept < 1).all()


@pytest.mark.parametrize("name", ["clipped", "clipped_unlabelled"])
def test_the_tail_of_a_very_sure_answer_is_a_number(name):
    answer = tensor(np.array([[0.0, 300.0, -20.0, -400.0, -500.0]] * 7))
    labels = None if name.endswith("unlabelled") else tensor(Y)
    z = tensor(Z).requires_grad_()
    for config in ATTACKS[name].grid:
        loss = ATTACKS[name].train.loss(z, answer, labels, config)
        (gradient,) = torch.autograd.grad(loss, z)
        assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("margin", [2.0, 15.0, 100.0])
def test_vector_scaling_finds_the_least_loss_however_sure_the_answers_are(margin):
    draws = np.random.default_rng(0)
    labels = draws.integers(0, 10, 100)
    told = np.where(draws.random(100) < 0.8, labels, draws.integers(0, 10, 100))
    z, y = tensor(margin * np.eye(10)[told] + draws.normal(size=(100, 10))), tensor(labels)

    def loss(scale, bias):
        return float(losses.cross_entropy(z * scale + bias, y) + 1e-2 * bias.square().mean())

    scale, bias = vector_scaling(z, y)
    found = loss(scale, bias)
    assert scale > 0 and found <= loss(torch.ones(1), torch.zeros(10))
    assert all(found <= loss(other * scale, bias) + 1e-3 for other in (0.5, 0.9, 1.1, 2.0))
