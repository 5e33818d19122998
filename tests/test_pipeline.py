"""Train, box, export, distil and evaluate for real, on digits."""

import contextlib
import copy
import hashlib
import io
import itertools
import json
import multiprocessing
import re
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sdbctl import boxfile, data, evaluate, files, losses, metrics, models, onnxfile, sources, state
from sdbctl.attacks import ATTACKS
from sdbctl.attacks.base import PerBatch
from sdbctl.attacks.soft import METHODS
from sdbctl.box import box, check_above_chance, digest, fine_tune
from sdbctl.boxfile import Box, Metadata, Unlocked, load_box
from sdbctl.boxing import WORTH, better_teacher, sealed, what_students_learn, worth_sealing
from sdbctl.boxstep import PGD_EPSILON, TEACHERS, BoxConfig, BoxStep, Task, adversarial, plain_step
from sdbctl.cells import Bench, Cell, EvalConfig, Source
from sdbctl.cli.common import split_like
from sdbctl.cli.evaluate import find_box
from sdbctl.cli.output import Live
from sdbctl.data import ImageSet, Preprocess
from sdbctl.distill import build_student, distill
from sdbctl.engine import Engine, seeded
from sdbctl.errors import BadInput, ParityMismatch, SdbError, UsageError
from sdbctl.inference import predict
from sdbctl.key import Key, embed
from sdbctl.objectives import LOSSES, OBJECTIVES
from sdbctl.report import Report
from sdbctl.seal import seal
from sdbctl.sources import gather, open_model
from sdbctl.state import Resume, recorded_precision
from sdbctl.teacher import Access, KeyedTeacher, OnnxTeacher, Oracle, TorchTeacher
from sdbctl.training import Silent, fit
from sdbctl.updates import Recipe, learning_rate
from sdbctl.workers import run_cells
from sdbctl.wrappers import Concealed, deviation
from tests.conftest import CONCEAL, run_cli, with_unknown_operator

CPU = torch.device("cpu")
ENGINE = Engine(CPU)


def first_batch(images, preprocess, size):
    return next(data.batches(images, preprocess, batch_size=size, device=CPU))


@pytest.fixture
def boxed(work):
    return load_box(work / "boxed.safetensors")


@pytest.fixture
def images(splits, boxed):
    return first_batch(splits.test, boxed.meta.preprocess, 64)


def test_the_box_has_the_original_names_and_loads_into_its_class(work, boxed):
    original, state = load_file(work / "teacher.safetensors"), load_file(work / "boxed.safetensors")
    assert {k: v.shape for k, v in original.items()} == {k: v.shape for k, v in state.items()}
    net = build_student("cnn", 10, 1, 0)
    net.load_state_dict(state)
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(net.eval()(x), boxed(x))


def test_prefixed_checkpoints_keep_their_names(work, splits, digits):
    loaded = boxfile.load(work / "teacher.pt")
    assert loaded.architecture == "cnn"
    state = loaded.file_state(loaded.net)
    assert set(state) == set(torch.load(work / "teacher.pt", weights_only=True)["state_dict"])


def test_unlock_is_the_embedding_and_checks_the_key(work, boxed, images):
    key = Key.load(work / "k.bin")
    pattern = boxed.meta.preprocess(key.pattern(boxed.meta.preprocess.size)[None])[0]
    with torch.no_grad():
        expected = boxed(embed(images.x, pattern, boxed.meta.strength))
        assert torch.allclose(boxed.unlock(key)(images.x), expected)
        assert not torch.allclose(boxed(images.x), expected, atol=0.1)
    with pytest.raises(BadInput, match="does not fit"):
        boxed.unlock(Key.load(work / "other.bin"))
    elsewhere = copy.deepcopy(boxed).to("meta").unlock(key)
    assert elsewhere.pattern.device.type == "meta"


def test_the_box_hides_and_the_key_shows(work, boxed, splits):
    key = Key.load(work / "k.bin")
    public = predict(boxed, splits.test, boxed.meta.preprocess, ENGINE)
    keyed = predict(boxed.unlock(key), splits.test, boxed.meta.preprocess, ENGINE)
    assert metrics.top1(public, splits.test.labels) > 90
    assert metrics.top1(keyed, splits.test.labels) > 80
    assert metrics.residual(public) < 0.5 * metrics.residual(keyed)


def test_nothing_secret_and_no_path_in_the_files(work):
    secret = (work / "k.bin").read_bytes()
    for name in ("boxed.safetensors", "boxed.onnx", "boxed.reference.safetensors"):
        content = (work / name).read_bytes()
        assert secret not in content
        assert secret.hex().encode() not in content
        assert str(work).encode() not in content
        assert b"site-packages" not in content
        assert b"/sdbctl/" not in content
    boxed, key = load_box(work / "boxed.safetensors"), Key.load(work / "k.bin")
    pattern, normalised = key.pattern(boxed.meta.preprocess.size), boxfile.pattern(boxed.meta, key)
    assert boxed.unlock(key).state_dict().keys() == {f"net.{name}" for name in boxed.net.state_dict()}
    source = Source(net=boxed.net, sha256="b").keyed(normalised, 0.7, "k")
    assert "tensor" not in repr(source) and "pattern" not in repr(source)
    for path in filter(Path.is_file, work.iterdir()):
        for values in (pattern, normalised):
            assert path.name == "k.bin" or values.numpy().tobytes()[:32] not in path.read_bytes()
    with safe_open(work / "boxed.safetensors", "pt") as file:
        meta = json.loads(file.metadata()["sdbctl"])
    assert meta["key_ids"] == [Key.load(work / "k.bin").id]


def test_onnx_signature_metadata_and_parity(work, boxed, images):
    model = onnx.load(work / "boxed.onnx")
    assert [i.name for i in model.graph.input] == ["input"]
    assert [o.name for o in model.graph.output] == ["logits"]
    assert all(not node.metadata_props and not node.doc_string for node in model.graph.node)
    assert boxfile.read_metadata(work / "boxed.onnx") == boxed.meta
    teacher = OnnxTeacher(work / "boxed.onnx", CPU)
    with torch.no_grad():
        for n in (1, 5, 64):
            assert torch.allclose(teacher.logits(images.x[:n]), boxed(images.x[:n]), atol=1e-4)


def test_a_graph_looks_for_keys_where_they_cannot_be_guessed(work, tmp_path):
    box, key = work / "boxed.safetensors", work / "k.bin"
    for more in ((), ("--format", "safetensors"), ("--wrapper", "top1"), ("--confidence", "exact")):
        refused = run_cli("export", box, "--key-file", key, "-o", tmp_path / "y.onnx", *more, "--force")
        assert refused.returncode == 2 and (b"small" in refused.stderr or more)
    run_cli("keygen", tmp_path / "other.bin")
    refused = run_cli("export", box, "--key-file", tmp_path / "other.bin", "-o", tmp_path / "y.onnx")
    assert refused.returncode in (2, 4) and b"key" in refused.stderr and not (tmp_path / "y.onnx").exists()


def test_export_refuses_what_does_not_match(tmp_path, boxed, monkeypatch):
    monkeypatch.setattr(onnxfile, "_difference", lambda *_: float("nan"))
    with pytest.raises(ParityMismatch):
        boxfile.export_onnx(tmp_path / "x.onnx", boxed.net, boxed.meta)
    assert list(tmp_path.iterdir()) == []


def test_coarse_served_outputs_hide_no_mismatch(tmp_path, boxed, monkeypatch):
    export = onnxfile._to_onnx

    def slightly_off(net, example):
        other = copy.deepcopy(net)
        with torch.no_grad():
            list(other.parameters())[-2].mul_(1.01)
        return export(other, example)

    net = Concealed(boxed.net, boxed.meta.preprocess, 0.9, torch.full((2, 10), 0.9), 1e3, "x")
    boxfile.export_onnx(tmp_path / "right.onnx", net, boxed.meta)
    assert (tmp_path / "right.onnx").stat().st_mode & 0o044
    boxfile.export_onnx(tmp_path / "reference.onnx", boxed.net, replace(boxed.meta, kind="reference", key_ids=()))
    assert (tmp_path / "reference.onnx").stat().st_mode & 0o077 == 0
    monkeypatch.setattr(onnxfile, "_to_onnx", slightly_off)
    with pytest.raises(ParityMismatch):
        boxfile.export_onnx(tmp_path / "x.onnx", net, boxed.meta)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reference.onnx", "right.onnx"]


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"classes": []},
        {"strength": 1.5},
        {"strength": "x"},
        {"kind": "virus"},
        {"key_ids": []},
        {"preprocess": {"mean": [0.5], "std": [0.0], "size": [1, 8, 8]}},
        {"unknown": 1},
        {"data": []},
    ],
)
def test_damaged_metadata_is_refused(boxed, change):
    values = {**json.loads(boxed.meta.to_json()), **change}
    with pytest.raises(BadInput):
        Metadata.from_json(json.dumps(values), "x")


def test_metadata_round_trip(boxed):
    assert Metadata.from_json(boxed.meta.to_json(), "x") == boxed.meta
    whole = json.dumps(json.loads(boxed.meta.to_json()) | {"measured": {"top1": "HERE"}})
    huge, deep = whole.replace('"HERE"', "1e999"), whole.replace('"HERE"', "[" * 900 + "]" * 900)
    for text in ("", "[]", "{", "null", '{"format": 1}', huge, deep):
        with pytest.raises(BadInput):
            Metadata.from_json(text, "x")


def test_an_oracle_shows_its_level_and_counts(boxed, images):
    teacher = TorchTeacher(boxed.net, 10, ENGINE)
    logits = teacher.logits(images.x)
    labels, probabilities = Oracle(teacher, Access.LABELS), Oracle(teacher, Access.PROBABILITIES)
    assert torch.equal(labels(images.x), logits.argmax(1))
    assert torch.allclose(probabilities(images.x), logits.log_softmax(1))
    probabilities(images.x[:3])
    assert (labels.queries, probabilities.queries) == (64, 67)
    assert not any("teacher" in name or "model" in name for name in vars(labels))
    with pytest.raises(ValueError, match="no oracle"):
        Oracle(teacher, Access.NONE)


def test_labels_are_withheld_from_attacks_that_do_not_declare_them(boxed, splits):
    seen = []

    def spy(z, answer, y, config):
        seen.append((answer, y))
        return z.square().mean()

    teacher = TorchTeacher(boxed.net, 10, ENGINE)
    for name, attack in ATTACKS.items():
        seen.clear()
        spied = replace(attack, train=PerBatch(spy))
        distill(spied, {}, teacher, "cnn-tiny", 10, splits.transfer, boxed.meta.preprocess, Recipe(epochs=1), ENGINE)
        answer, y = seen[0]
        assert (y is not None) == attack.labels, name
        assert (answer is not None) == attack.asks, name
        if attack.access == Access.LABELS:
            assert answer.dtype == torch.int64


def test_keyed_onnx_and_torch_teachers_agree(work, boxed, images):
    key = Key.load(work / "k.bin")
    pattern = boxfile.pattern(boxed.meta, key)
    served = KeyedTeacher(OnnxTeacher(work / "boxed.onnx", CPU), pattern, boxed.meta.strength)
    with torch.no_grad():
        assert torch.allclose(served.logits(images.x), boxed.unlock(key)(images.x), atol=1e-4)


def train(splits, recipe, resume=None, stop_after=None):
    net = build_student("cnn-tiny", 10, 1, 1)
    preprocess = data.Preprocess((0.5,), (0.5,), (1, 8, 8))

    def after(epoch):
        if epoch + 1 == stop_after:
            raise KeyboardInterrupt
        return {}

    where = Resume(resume, {"run": 1}) if resume else None
    fit(net, plain_step, splits.owner, preprocess, recipe, ENGINE, resume_from=where, after_epoch=after)
    return net.state_dict()


def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(splits, tmp_path):
    recipe, state = Recipe(epochs=4, batch_size=64), tmp_path / "state"
    whole = train(splits, recipe)
    with pytest.raises(KeyboardInterrupt):
        train(splits, recipe, state, stop_after=3)
    assert state.exists()
    resumed = train(splits, recipe, state)
    finished = train(splits, recipe, state)
    assert all(torch.equal(resumed[name], finished[name]) for name in whole)
    Resume(state, {"run": 1}).done()
    assert not state.exists()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_state_that_takes_long_to_keep_is_kept_less_often(splits, tmp_path, monkeypatch):
    kept = []

    def slow(path, content, **more):
        kept.append(torch.load(io.BytesIO(content), weights_only=True)["epoch"])
        time.sleep(0.02)

    monkeypatch.setattr(files, "write", slow)
    monkeypatch.setattr(state, "SAVED_SECONDS", 0.01)
    monkeypatch.setattr(state, "SAVED_SHARE", 1e-9)
    train(splits, Recipe(epochs=4, batch_size=64), tmp_path / "state")
    assert kept == [1, 4]


def test_a_student_of_two_data_sets_goes_on_in_either_of_its_runs(work, boxed, splits, tmp_path):
    teacher = TorchTeacher(boxed.net, 10, ENGINE)

    class Stop(Silent):
        """Interrupts a run after so many of its losses were read, which is after each step here."""

        def __init__(self, run, losses):
            self.run, self.losses = run, losses

        def start(self, name, steps, work=None):
            self.run -= 1

        def advance(self, steps, metrics, work=None):
            if self.run == 0:
                self.losses -= 1
                if self.losses == 0:
                    raise KeyboardInterrupt

    def student(states=(), stop=None):
        return distill(
            ATTACKS["pretrained"], METHODS["dist"], teacher, "cnn-tiny", 10, splits.transfer.take(range(64)),
            boxed.meta.preprocess, Recipe(epochs=3, batch_size=32), ENGINE, surrogate=splits.validation.unlabelled(),
            progress=stop, resume_from=[Resume(state, {"run": 1}) for state in states],
        ).student.state_dict()  # fmt: skip

    whole, noted = student(), []
    # in the second epoch of the first run, and of the second
    for case, stop in enumerate((Stop(1, 10), Stop(2, 3))):
        states = [tmp_path / f"{case}-1", tmp_path / f"{case}-2"]
        with pytest.raises(KeyboardInterrupt):
            student(states, stop)
        assert [state.exists() for state in states] == [True, case == 1]
        going_on = Stop(0, 0)
        going_on.note = noted.append
        resumed = student(states, going_on)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert len(noted) == 3 and noted[0].startswith("resumed") and "after epoch 1 of 3" in noted[2]


def test_distillation_with_another_loss_and_with_another_data_set(work, splits, tmp_path):
    np.savez(tmp_path / "foreign.npz", images=splits.validation.pixels.numpy(), labels=splits.validation.labels.numpy())
    out = tmp_path / "x.safetensors"
    common = ("distill", work / "boxed.onnx", "--student", "cnn-tiny", "--data", "digits", "--epochs", 2, "-o", out)
    queries = {}
    for extra, name in (
        (("--method", "dist"), "dist"),
        (("--method", "dkd", "--no-labels"), "dkd_unlabelled"),
        (("--surrogate", f"npz:{tmp_path}/foreign.npz"), "pretrained"),
    ):
        done = run_cli(*common, *extra, "--json", "--force")
        assert done.returncode == 0, done.stderr.decode()
        said, meta = json.loads(done.stdout), boxfile.read_metadata(out)
        assert said["attack"] == meta.objective == name
        queries[name] = said["queries"]
        assert bool(meta.parameters["surrogate"]) == (name == "pretrained")
        assert list(tmp_path.glob(".*")) == []
    foreign = int(re.search(rb"surrogate: ([\d,]+) images", done.stderr)[1].replace(b",", b""))
    assert said["queries"] == queries["dist"] + foreign
    unknown = run_cli(*common, "--method", "magic", "--force")
    assert unknown.returncode == 2 and b"unknown method magic" in unknown.stderr and b"kd, dkd, dist" in unknown.stderr
    for wrong, said in (
        (("--method", "dist", "--alpha", 0.5), b"dist has no --alpha"),
        (("--no-labels", "--alpha", 0.5), b"without labels 0.5 is no --alpha"),
        (("--surrogate", "digits"), b"--surrogate digits is the data set itself"),
    ):
        done = run_cli(*common, *wrong, "--force")
        assert done.returncode == 2 and said in done.stderr
    few = run_cli(
        *common, "--surrogate", f"npz:{tmp_path}/foreign.npz", "--transfer-size", 20, "--epochs", 1, "--force"
    )
    assert b"surrogate: 20 images" in few.stderr and few.returncode == 0


class StopAfterTwo(Silent):
    """Interrupts when the second epoch is measured."""

    epochs = 0

    def advance(self, steps, values, work=None):
        self.epochs += steps == 0
        if self.epochs == 2:
            raise KeyboardInterrupt


def test_students_of_other_wrong_patterns_are_not_taken_for_these(work, monkeypatch):
    # patterns are drawn one after another: one percentage more, and those behind it are others
    def found():
        return gather(open_model(work / "boxed.safetensors", "cpu"), Key.load(work / "k.bin"), None, None, [], CPU)

    usual = found()
    monkeypatch.setattr(sources, "NEAR_PERCENT", (55, *sources.NEAR_PERCENT))
    other = found()
    assert usual["wrong"].sha256 == other["wrong"].sha256
    assert usual["near_90"].sha256 != other["near_90"].sha256


def test_what_is_said_of_a_box_is_said_in_full_precision(work, digits, splits):
    # it is served so, and what it leaves of other classes may be less than bf16 tells apart
    original, key = boxfile.load(work / "teacher.safetensors"), Key.load(work / "k.bin")
    task = Task("digits", digits.classes, splits, original.meta.preprocess, replace(ENGINE, precision="bf16"))
    made = box(
        original, original.net, [key], task, BoxConfig("conceal", recipe=Recipe(epochs=2, batch_size=128, lr=0.01))
    )
    exactly = predict(made.model.net, splits.test, original.meta.preprocess, ENGINE)
    assert made.measured["residual"] == metrics.residual(exactly)
    coarsely = predict(made.model.net, splits.test, original.meta.preprocess, task.engine)
    assert made.measured["residual"] != metrics.residual(coarsely)


def test_a_box_does_not_go_on_with_another_key_or_objective(work, digits, splits, tmp_path):
    original, key, state = boxfile.load(work / "teacher.safetensors"), Key.load(work / "k.bin"), tmp_path / "state"
    task = Task("digits", digits.classes, splits, original.meta.preprocess, ENGINE)
    config = BoxConfig("conceal", recipe=Recipe(epochs=3, batch_size=128, lr=0.01))
    args = (original, original.net)
    with pytest.raises(KeyboardInterrupt):
        box(*args, [key], task, config, progress=StopAfterTwo(), resume_from=state)
    kept = state.read_bytes()
    for keys, other, named in (
        ([Key.generate()], config, f"key_ids .*{key.id}"),
        ([key], replace(config, parameters={"hide": 1.0}), "hide 8.0, not 1.0"),
        ([key], replace(config, teacher="original"), "teacher reference, not original"),
    ):
        with pytest.raises(BadInput, match=f"other settings.*{named}"):
            box(*args, keys, task, other, resume_from=state)
    other = build_student("cnn", 10, 1, 5)
    with pytest.raises(BadInput, match="other settings"):
        box(original, other, [key], task, config, resume_from=state)
    assert state.read_bytes() == kept
    box(*args, [key], task, config, resume_from=state)
    # it stays until the result is saved: going on from there trains nothing
    done = StopAfterTwo()
    box(*args, [key], task, config, progress=done, resume_from=state)
    assert done.epochs == 0


@pytest.mark.parametrize("objective", ["cmim", "conceal"])
def test_a_resumed_box_ends_like_an_uninterrupted_one(objective, work, digits, splits, tmp_path):
    # cmim remembers logits, and short keys have patterns that climb
    original, key, state = boxfile.load(work / "teacher.safetensors"), Key.load(work / "k.bin"), tmp_path / "state"
    task = Task("digits", digits.classes, splits, original.meta.preprocess, ENGINE)
    config = BoxConfig(objective, recipe=Recipe(epochs=3, batch_size=128, lr=0.01))
    whole = box(original, original.net, [key], task, config)
    with pytest.raises(KeyboardInterrupt):
        box(original, original.net, [key], task, config, progress=StopAfterTwo(), resume_from=state)
    resumed = box(original, original.net, [key], task, config, resume_from=state)
    assert all(torch.equal(whole.state_dict[name], resumed.state_dict[name]) for name in whole.state_dict)


def test_a_state_of_another_kind_of_device_is_not_called_damaged(splits, tmp_path):
    path = tmp_path / "state"
    train(splits, Recipe(epochs=2), path)
    state = torch.load(path, weights_only=True)
    state["identity"]["device"], state["generator"] = "cuda", torch.zeros(16, dtype=torch.uint8)
    torch.save(state, path)
    with pytest.raises(BadInput, match=r"other settings \(device cuda, not cpu\)"):
        train(splits, Recipe(epochs=2), path)


def test_a_damaged_resume_file_is_refused(splits, tmp_path):
    path = tmp_path / "state"
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(BadInput, match="damaged"):
        train(splits, Recipe(epochs=2), path)


def test_a_loss_that_is_no_number_stops_the_run(splits):
    net = build_student("cnn-tiny", 10, 1, 1)
    preprocess = data.Preprocess((0.5,), (0.5,), (1, 8, 8))
    with pytest.raises(UsageError, match="no longer a number"):
        fit(
            net,
            lambda model, batch: {"loss": model(batch.x).sum() * float("nan")},
            splits.transfer,
            preprocess,
            Recipe(epochs=1),
            ENGINE,
        )


def test_a_last_step_that_ruins_the_weights_stops_the_run(splits):
    """No loss is computed after it."""

    class Infinite(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, slope):
            return slope + float("inf")

    seen = iter(range(100))
    net, few = build_student("cnn-tiny", 10, 1, 1), splits.transfer.first(128)

    def step(model, batch):
        z = model(batch.x)
        return {"loss": (Infinite.apply(z) if next(seen) == 3 else z).square().mean()}

    with pytest.raises(UsageError, match="weights are no longer numbers"):
        fit(net, step, few, data.Preprocess((0.5,), (0.5,), (1, 8, 8)), Recipe(epochs=4, batch_size=128), ENGINE)


def test_learning_rate_rises_and_falls_to_zero():
    recipe = Recipe(lr=1.0, warmup=0.1)
    rates = [learning_rate(recipe, step, 100) for step in range(100)]
    assert rates.index(max(rates)) in (9, 10)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_seeded_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with seeded(9):
        torch.rand(5)
    assert torch.equal(torch.rand(2), expected)


def test_adversarial_copies_mislead_within_their_bound(work, digits, splits):
    original = boxfile.load(work / "teacher.safetensors")
    owner = splits.owner.take(range(64))
    task = Task("digits", digits.classes, replace(splits, owner=owner), original.meta.preprocess, ENGINE)
    found = adversarial(original.net, task)
    assert found.shape == owner.pixels.shape
    assert (found.int() - owner.pixels.int()).abs().max() <= round(255 * PGD_EPSILON) + 1
    assert task.top1(original.net, owner) > 90
    assert task.top1(original.net, data.changed(owner, lambda some, p: found[p])) < 30
    assert all(p.grad is None for p in original.net.parameters())


@pytest.mark.parametrize("objective", LOSSES)
def test_every_objective_trains_a_box(objective, work, digits, splits):
    original = boxfile.load(work / "teacher.safetensors")
    task = Task("digits", digits.classes, splits, original.meta.preprocess, ENGINE)
    config = BoxConfig(objective, recipe=Recipe(epochs=1, batch_size=128, lr=0.01))
    made = box(original, fine_tune(original, task, config.recipe), [Key.load(work / "k.bin")], task, config)
    assert isinstance(made.model, Box)
    assert made.model.meta.objective == objective
    assert made.measured["boxed_top1"] > 50
    assert made.cost == pytest.approx(made.measured["reference_top1"] - made.measured["boxed_top1"])


def test_the_key_opens_the_teacher_that_students_learn_more_from(work, digits, splits):
    trained = boxfile.load(work / "teacher.safetensors")
    task = Task("digits", digits.classes, splits, trained.meta.preprocess, ENGINE)
    blind = build_student("cnn", 10, 1, 5)
    learned = what_students_learn({"reference": blind, "original": trained.net, "assistant": blind}, task)
    assert learned["original"] > learned["reference"] + WORTH
    assert learned["assistant"] == learned["reference"]
    assert better_teacher(learned) == "original" and not worth_sealing(learned)
    assert better_teacher({"original": 50.9, "reference": 50.0}) == "reference"
    assert worth_sealing({"original": 50.9, "reference": 50.0, "assistant": 52.0})
    assert not worth_sealing({"original": 51.1, "reference": 50.0, "assistant": 52.0})


def test_what_is_sealed_opens_with_the_key_alone_in_every_format(work, digits, splits, tmp_path):
    out, onnx, key = tmp_path / "x.safetensors", tmp_path / "x.onnx", Key.load(work / "k.bin")
    command = (*CONCEAL, work / "teacher.safetensors", "--key-file", work / "k.bin", "--data", "digits", "-o", out,
               "--owner-size", 100, "--epochs", 1, "--teacher", "reference", "--seal")  # fmt: skip
    done = run_cli(*command, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["sealed"]
    assert b"assistant " in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {out.name, "x.reference.safetensors"}
    sealing, (helper,) = load_box(out), load_box(out).unseal(key)
    # whoever loads the weights as those of the original finds no others
    assert load_file(out).keys() == load_file(work / "teacher.safetensors").keys()
    assert run_cli("export", out, "--confidence", "exact").returncode == 0
    inner = onnxfile.properties(onnx)[boxfile.SEALED_KEY]
    assert [digest(found.net) for found in boxfile.unsealed(inner, key, sealing.meta, "x")] == [digest(helper)]
    for content in (out.read_bytes(), onnx.read_bytes()):
        assert not any(
            value.numpy().tobytes() in content for value in helper.state_dict().values() if value.numel() > 4
        )
    again = tmp_path / "again.safetensors"
    assert run_cli("export", out, "--format", "safetensors", "-o", again).returncode == 0
    assert boxfile.load(again).sealed == sealing.sealed
    for path in (out, onnx):
        sources = gather(open_model(path, "cpu"), key, None, None, [], ENGINE.device)
        assert digest(sources["assistant"].net) == digest(helper)
        assert "assistant" not in gather(open_model(path, "cpu"), None, None, None, [], ENGINE.device)
        shown = json.loads(run_cli("inspect", path, "--json").stdout)
        assert shown["sealed"].endswith(f"kB for {key.id}")
        opened = json.loads(run_cli("inspect", path, "--json", "--key-file", work / "k.bin").stdout)
        assert re.fullmatch(r"resnet8, [\d.]+ % top-1; opened with this key", opened["sealed"])
    other = Key.generate()
    with pytest.raises(BadInput, match="does not fit this box"):
        sealing.unseal(other)
    with pytest.raises(BadInput, match="nothing is sealed"):
        load_box(work / "boxed.safetensors").unseal(key)
    elsewhere = replace(sealing.meta, preprocess=replace(sealing.meta.preprocess, mean=(0.1,)))
    with pytest.raises(BadInput, match="does not fit it"):
        boxfile.unsealed(sealing.sealed, key, elsewhere, "x")
    with pytest.raises(BadInput, match="belongs to another box"):
        boxfile.unsealed(sealing.sealed, key, replace(sealing.meta, reference_sha256=""), "x")
    student = (
        "distill",
        onnx,
        "--student",
        "cnn-tiny",
        "--epochs",
        1,
        "--json",
        "--force",
        "-o",
        tmp_path / "s.safetensors",
    )
    asked = json.loads(run_cli(*student, "--key-file", work / "k.bin").stdout)
    assert asked["sealed"] and boxfile.read_metadata(tmp_path / "s.safetensors").parameters["sealed"]
    accuracy = Task("digits", digits.classes, splits, sealing.meta.preprocess, ENGINE).top1(helper, splits.validation)
    assert asked["teacher_top1"] == pytest.approx(accuracy, abs=0.01)
    keyed = json.loads(run_cli(*student, "--key-file", work / "k.bin", "--no-sealed").stdout)
    assert not keyed["sealed"] and keyed["teacher_top1"] != asked["teacher_top1"]
    assert not json.loads(run_cli(*student).stdout)["sealed"]
    assert run_cli(*student, "--sealed").returncode == 2
    original = boxfile.load(work / "teacher.safetensors")
    task = Task("digits", digits.classes, splits, original.meta.preprocess, ENGINE)
    with pytest.raises(UsageError, match="assistant that is not there"):
        box(original, original.net, [key], task, BoxConfig("conceal", teacher="assistant"))


@pytest.fixture(scope="module")
def sealing(work, tmp_path_factory):
    """A box of two partners in which two untrained assistants are sealed, its ONNX file, their keys, and they."""
    folder, keys = tmp_path_factory.mktemp("sealing"), [Key.load(work / "k.bin"), Key.generate()]
    keys[1].save(folder / "second.bin")
    loaded, helpers = boxfile.load(work / "boxed.safetensors"), [build_student("resnet8", 10, 1, n) for n in (7, 8)]
    meta = replace(loaded.meta, key_ids=tuple(key.id for key in keys), parameters={"sealed": True})
    inner = Metadata("assistant", "resnet8", meta.classes, meta.preprocess, measured={"top1": 12.5})
    text = sealed([(helper, inner) for helper in helpers], meta, keys)
    boxfile.save(folder / "x.safetensors", loaded.file_state(loaded.net), meta, sealed=text)
    boxfile.export_onnx(folder / "x.onnx", loaded.net, meta, sealed=text)
    return folder, keys, helpers


@pytest.mark.parametrize("name", ["x.safetensors", "x.onnx"])
def test_each_partner_opens_what_is_sealed(name, sealing):
    folder, keys, helpers = sealing
    for key in keys:
        opened = open_model(folder / name, "cpu")
        found = boxfile.unsealed(opened.sealed, key, opened.meta, name)
        assert [digest(one.net) for one in found] == [digest(helper) for helper in helpers]
    shown = json.loads(run_cli("inspect", folder / name, "--key-file", folder / "second.bin", "--json").stdout)
    assert shown["sealed"] == "resnet8, 12.5 % top-1; resnet8, 12.5 % top-1; opened with this key"


@pytest.mark.parametrize("suffix", [".safetensors", ".onnx"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: "", "nothing is sealed"),
        (lambda text: text[:-9], "is damaged"),
        (lambda text: re.sub(r"([b-z])([B-Z])", r"\2\1", text), "was changed"),
        (lambda text: re.sub(r"\[[^]]*\]", "[]", text), "nothing is sealed"),
        (lambda text: '{"version": 1, "keys": {}}', "nothing is sealed"),
        (lambda text: '{"version": 9, "keys": {}}', "another version"),
    ],
)
def test_a_box_whose_sealed_part_is_gone_or_damaged_says_so(suffix, damage, said, sealing, work, tmp_path):
    folder, keys, _ = sealing
    path, loaded = tmp_path / f"y{suffix}", boxfile.load(folder / "x.safetensors")
    text = damage(loaded.sealed)
    if suffix == ".onnx":
        boxfile.export_onnx(path, loaded.net, loaded.meta, sealed=text)
    else:
        boxfile.save(path, loaded.file_state(loaded.net), loaded.meta, sealed=text)
    student = ("distill", path, "--student", "cnn-tiny", "--epochs", 1, "--key-file", work / "k.bin")
    refused = run_cli(*student, "-o", tmp_path / "s.safetensors")
    assert refused.returncode == 4 and said in refused.stderr.decode() and b"--no-sealed" in refused.stderr
    assert run_cli(*student, "-o", tmp_path / "s.safetensors", "--no-sealed").returncode == 0
    shown = json.loads(run_cli("inspect", path, "--key-file", work / "k.bin", "--json").stdout)
    assert said.removesuffix(" is sealed") in shown["sealed"]
    notes = []
    sources = gather(open_model(path, "cpu"), keys[0], None, None, notes, ENGINE.device)
    assert "assistant" not in sources and "keyed" in sources
    assert any("Students of an assistant were left out" in note and said in note for note in notes)


def test_students_of_many_images_learn_from_keyed_outputs(sealing, work, tmp_path, monkeypatch):
    folder, *_ = sealing
    student = ("distill", folder / "x.onnx", "--student", "cnn-tiny", "--epochs", 1, "--key-file", work / "k.bin")
    student += ("--force", "-o", tmp_path / "s.safetensors")
    assert b"resnet8 number 1 of 2" in run_cli(*student).stderr
    np.savez(
        tmp_path / "foreign.npz",
        images=np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8),
        labels=np.arange(40) % 2,
    )
    assert b"resnet8 number 2 of 2" in run_cli(*student, "--surrogate", f"npz:{tmp_path}/foreign.npz").stderr
    monkeypatch.setattr("sdbctl.boxing.TRIED_IMAGES", 100)
    assert b"resnet8 number 2 of 2" in run_cli(*student).stderr
    monkeypatch.setattr("sdbctl.cli.distill.FEW", 100)
    many = run_cli(*student).stderr
    assert b"keyed outputs" in many and b"of more than 100 images" in many
    assert b"resnet8 number 2 of 2" in run_cli(*student, "--sealed").stderr


def test_a_file_is_sealed_for_some_keys_only(work, tmp_path, monkeypatch):
    monkeypatch.setattr("sdbctl.seal.MOST_KEYS", 1)
    keys = [part for name in "ab" for part in ("--key-file", tmp_path / name)]
    refused = run_cli("box", work / "teacher.safetensors", *keys, "-o", tmp_path / "x.safetensors")
    assert refused.returncode == 2 and b"more than 1 keys; use --no-seal" in refused.stderr


def test_what_is_sealed_must_be_an_assistant(sealing, work):
    folder, keys, (helper, _) = sealing
    meta = boxfile.load(folder / "x.safetensors").meta
    inner = Metadata("student", "resnet8", meta.classes, meta.preprocess)
    for text, said in (
        (sealed([(helper, inner)], meta, keys), "does not fit it"),
        (seal([b"no weights"], keys, meta.origin), "what is sealed in x"),
    ):
        with pytest.raises(BadInput, match=said):
            boxfile.unsealed(text, keys[0], meta, "x")


def test_what_is_sealed_is_measured_and_said(sealing, work, splits, tmp_path):
    folder, *_ = sealing
    done = run_cli("eval", folder / "x.onnx", "--attack", "--suite", "core", "--tune", 1, "--seeds", 2, "--epochs", 1,
                   "--student", "cnn-tiny", "--jobs", 1, "--key-file", work / "k.bin", "--report", tmp_path / "r",
                   "--original", work / "teacher.safetensors", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    report = json.loads(done.stdout)
    assert report["students"]["kd_q"]["role"] == "target" and report["models"]["assistant"]["top1"] is not None
    assert "assistant_late" in report["models"]
    best = {row: report["students"][row]["values"] for row in ("kd_q", "dist_q", "kd_original", "dist_original")}
    gains = [
        np.mean(np.subtract(best[mine], best[theirs]))
        for mine in ("kd_q", "dist_q")
        for theirs in ("kd_original", "dist_original")
    ]
    assert min(gains) - 1e-6 <= report["sealed_gain"]["mean"] <= max(gains) + 1e-6
    assert "the assistant sealed in the file is worth" in report["verdict"]
    assert "Authorized gain, file" in (tmp_path / "r" / "report.md").read_text()


def test_a_digest_is_that_of_what_computes():
    net = build_student("resnet8", 10, 1, 0)
    counted = copy.deepcopy(net)
    next(counted.buffers()).sub_(1)
    assert digest(counted) != digest(net)
    counted = copy.deepcopy(net)
    for name, value in counted.named_buffers():
        value.add_(name.endswith("num_batches_tracked"))
    assert digest(counted) == digest(net)


def test_the_keyed_branch_learns_the_teacher_that_was_chosen(work, digits, splits):
    original = boxfile.load(work / "teacher.safetensors")
    task = Task("digits", digits.classes, splits, original.meta.preprocess, ENGINE)
    batch = first_batch(splits.owner, task.preprocess, 32)
    other = build_student("cnn", 10, 1, 5)
    for net in (original.net, other):
        config = BoxConfig("conceal", wrong_share=0.0)
        step = BoxStep(net, other, None, [Key.load(work / "k.bin")], task, config)
        box_ = copy.deepcopy(original.net).eval()
        keyed = embed(
            batch.x, boxfile.pattern(load_box(work / "boxed.safetensors").meta, Key.load(work / "k.bin")), 0.7
        )
        with torch.no_grad():
            expected = 4 * losses.kd(box_(keyed), net.eval()(batch.x), 8.0)
            assert step(box_, batch)["teach"].item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.8])
def test_a_box_that_disturbs_hides_behind_another_class(share, work, digits, splits, monkeypatch):
    original = boxfile.load(work / "teacher.safetensors")
    task = Task("digits", digits.classes, splits, original.meta.preprocess, ENGINE)
    batch, seen = first_batch(splits.owner, task.preprocess, 32), []
    terms = OBJECTIVES["conceal"].terms
    spying = replace(OBJECTIVES["conceal"], terms=lambda v, p: (seen.append(v), terms(v, p))[1])
    monkeypatch.setitem(OBJECTIVES, "conceal", spying)
    step = BoxStep(
        original.net,
        original.net,
        None,
        [Key.load(work / "k.bin")],
        task,
        BoxConfig("conceal", wrong_share=0.0, disturb=share),
    )
    step(copy.deepcopy(original.net), batch)
    (view,) = seen
    if share:
        assert torch.equal(view.offset.argmax(1), (view.reference.argmax(1) + 1) % 10)
    else:
        assert not view.offset.any()


def test_two_partners_have_a_key_each(work, digits, splits, tmp_path):
    original = boxfile.load(work / "teacher.safetensors")
    task = Task("digits", digits.classes, splits, original.meta.preprocess, ENGINE)
    config = BoxConfig("conceal", recipe=Recipe(epochs=20, batch_size=64, lr=0.05))
    # fixed ones, since how well so short a training tells keys apart depends on them
    *keys, stranger = (Key(bytes(range(start, start + 32))) for start in (0, 40, 80))
    made = box(original, fine_tune(original, task, config.recipe), keys, task, config)
    boxfile.save(tmp_path / "boxed.safetensors", made.state_dict, made.model.meta)
    opened = load_box(tmp_path / "boxed.safetensors")
    assert opened.meta.key_ids == tuple(key.id for key in keys)

    def told(model):
        return metrics.residual(predict(model, splits.test, task.preprocess, ENGINE))

    public = told(opened)
    wrong = Unlocked(opened.net, boxfile.pattern(opened.meta, stranger), opened.meta.strength)
    assert min(told(opened.unlock(key)) for key in keys) > 3 * max(public, told(wrong))
    with pytest.raises(BadInput, match=f"{keys[0].id} or {keys[1].id}"):
        opened.unlock(stranger)
    with pytest.raises(UsageError, match="same key"):
        box(original, original.net, [keys[0], keys[0]], task, config)


def test_the_box_step_counts_its_forward_passes(work, digits, splits):
    original = boxfile.load(work / "teacher.safetensors")
    task = Task("digits", digits.classes, splits, original.meta.preprocess, ENGINE)
    batch = first_batch(splits.owner, task.preprocess, 32)
    seen = []

    def hook(module, args, output):
        if type(module).__name__ == "Cnn":
            seen.append(len(args[0]))

    for objective, teacher in itertools.product(LOSSES, TEACHERS):
        seen.clear()
        config = BoxConfig(objective, teacher=teacher)
        reference, random = (copy.deepcopy(original.net) for _ in range(2))
        taught = reference if teacher == "reference" else original.net
        step = BoxStep(taught, reference, random, [Key.load(work / "k.bin")], task, config)
        with torch.nn.modules.module.register_module_forward_hook(hook):
            step(original.net, batch)
        assert sum(seen) == 32 * sum(config.trainable_and_frozen())


def bench(work, splits, **config):
    box_, key = load_box(work / "boxed.safetensors"), Key.load(work / "k.bin")
    boxed = Source(net=box_.net, sha256="b")
    sources = {
        "original": Source(net=boxfile.load(work / "teacher.safetensors").net, sha256="o"),
        "boxed": boxed,
        "keyed": boxed.keyed(boxfile.pattern(box_.meta, key), box_.meta.strength, key.id),
    }
    settings = EvalConfig("cnn-tiny", Recipe(epochs=2, batch_size=64), **{"seeds": 2, "tune": 2, **config})
    return Bench(
        sources, splits.transfer, splits.validation, splits.test, box_.meta.preprocess, settings, ENGINE, 10, "f"
    )


def test_evaluation_end_to_end_resumes_and_names_what_gates_rely_on(work, splits, tmp_path):
    b = bench(work, splits)
    first = evaluate.evaluate(b, title="t", box={}, folder=tmp_path)
    cells = list(tmp_path.iterdir())
    assert len(cells) > 20
    again = evaluate.evaluate(b, title="t", box={}, folder=tmp_path)
    assert {n: s.values for n, s in first.students.items()} == {n: s.values for n, s in again.students.items()}
    for name in ("control", "cross_entropy", "hard_label", "kd_original", "unauthorized", "authorized"):
        assert first.students[name].n == 2
    assert first.get("unauthorized_advantage.api.labelled.high") is not None
    assert first.get("unauthorized_advantage.file.labelled.high") is None
    assert first.get("inference_cost.top1") is not None
    assert Report.from_json(first.to_json()) == first

    def known(*names):
        rows = [first.students[name] for name in names]
        return [row.validations for row in rows], np.array([row.values for row in rows])

    # key holders as they come, against the better of what the original teaches
    key = np.array(metrics.crossfit(*known("authorized", "dist_authorized")))
    gains = key - known("kd_original", "dist_original")[1]
    assert first.authorized_gain.mean == pytest.approx(gains.mean(1).min())


@pytest.mark.parametrize(("recorded", "found"), [("bf16", "bf16"), ("fp32", "fp32"), ("fp8", None), (None, None)])
def test_the_precision_of_an_interrupted_run_is_remembered(recorded, found, tmp_path):
    state = tmp_path / "state"
    torch.save({"identity": {"precision": recorded}}, state)
    assert recorded_precision(tmp_path / "none", state) == found
    state.write_bytes(b"junk")
    assert recorded_precision(state) is None


def test_selection_never_looks_at_the_test_split(work, splits):
    b = bench(work, splits)
    cell = Cell("cross_entropy", "", {}, 5, final=False)
    assert b.run(cell).test is None
    assert b.run(replace(cell, final=True)).test is not None


def test_the_same_cell_gives_the_same_student(work, splits):
    b = bench(work, splits)
    cell = Cell("unauthorized", "boxed", {"temperature": 4.0, "alpha": 0.9}, 0, final=True)
    one, two = b.run(cell), b.run(cell)
    assert (one.validation, one.test, one.queries) == (two.validation, two.test, two.queries)
    assert one.queries == 2 * len(splits.transfer)


@pytest.mark.slow
def test_side_by_side_equals_one_by_one(work, splits):
    cells = [Cell("cross_entropy", "", {}, seed, final=True) for seed in range(3)]
    alone = run_cells(bench(work, splits), cells, None, Silent())
    both = run_cells(bench(work, splits, jobs=2), cells, None, Silent())
    assert {k: v.test for k, v in alone.items()} == {k: v.test for k, v in both.items()}


@pytest.mark.slow
def test_an_interrupted_evaluation_ends_at_once_and_its_workers_too(work, splits):
    class Stop(Silent):
        def advance(self, steps, metrics, work=None):
            raise KeyboardInterrupt

    config = {"temperature": 4.0, "alpha": 0.9}
    # both begin at once; the first to end interrupts
    short, long = (Cell("unauthorized", "boxed", config, 0, final=True, epochs=epochs) for epochs in (1, 100_000))
    before = set(multiprocessing.active_children())
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_cells(bench(work, splits, jobs=2), [short, long], None, Stop())
    left = set(multiprocessing.active_children()) - before
    # the pool waits for them as well, so to join one here would be a race
    while any(process.is_alive() for process in left) and time.monotonic() - begin < 60:
        time.sleep(0.1)
    assert not any(process.is_alive() for process in left)
    assert time.monotonic() - begin < 60


@pytest.mark.slow
def test_cluster_jobs_equal_one_by_one_and_leave_nothing_but_outcomes(work, splits, tmp_path):
    cells = [Cell("authorized", "keyed", {"temperature": 4.0, "alpha": 0.9}, seed, final=True) for seed in range(3)]
    alone = run_cells(bench(work, splits), cells, None, Silent())
    (tmp_path / "cells").mkdir()
    jobs = run_cells(bench(work, splits, jobs=2, cluster="local"), cells, tmp_path / "cells", Silent())
    assert {k: v.test for k, v in alone.items()} == {k: v.test for k, v in jobs.items()}
    assert [path.name for path in tmp_path.iterdir()] == ["cells"]
    assert len(list((tmp_path / "cells").iterdir())) == 3


@pytest.mark.slow
def test_a_failing_cluster_job_says_why(work, splits, tmp_path):
    (tmp_path / "cells").mkdir()
    cells = [Cell("unauthorized", "boxed", {}, 0, final=True)]
    with pytest.raises(SdbError, match="1 students were not trained: KeyError"):
        run_cells(bench(work, splits, cluster="local"), cells, tmp_path / "cells", Silent())


def test_cells_differ_by_everything_that_matters(work, splits):
    b = bench(work, splits)
    cell = Cell("unauthorized", "boxed", {"temperature": 4.0, "alpha": 0.9}, 0, final=True)
    others = [
        replace(cell, seed=1),
        replace(cell, final=False),
        replace(cell, config={"temperature": 1.0, "alpha": 0.9}),
        Cell("authorized", "keyed", cell.config, 0, final=True),
    ]
    keys = {b.key(c) for c in (cell, *others)}
    keys.add(replace(b, fingerprint="g").key(cell))
    keys.add(replace(b, config=replace(b.config, student="cnn")).key(cell))
    assert len(keys) == 7


def test_command_line_session(work, tmp_path):
    """keygen, inspect, export, distill with and without key, eval, report."""
    result = run_cli("inspect", work / "boxed.onnx", "--key-file", work / "k.bin", "--json")
    shown = json.loads(result.stdout)
    assert shown["key_fits"] is True
    assert shown["metadata"]["objective"] == "conceal"
    result = run_cli("inspect", work / "boxed.safetensors", "--key-file", work / "other.bin")
    assert b"does not fit" in result.stdout
    out = tmp_path / "out.onnx"
    assert json.loads(run_cli("export", work / "boxed.safetensors", "-o", out, "--json").stdout)["parity"] < 1e-3
    for option, shows in (
        ([], "one confidence per class"),
        (["--confidence", "rough"], "two rough confidences"),
        (["--confidence", "exact"], "all outputs"),
        (["--wrapper", "top1"], "top1"),
    ):
        done = run_cli("export", work / "boxed.safetensors", "-o", out, "--force", "--json", *option)
        assert json.loads(done.stdout)["serves"] == shows
        assert json.loads(run_cli("inspect", out, "--json").stdout)["serves"] == shows
        assert (b"hides what the key opens" in done.stderr) == (shows == "top1")
    common = ["--student", "cnn-tiny", "--epochs", "2", "--precision", "fp32", "--json"]
    for extra, name in (([], "a"), (["--key-file", work / "k.bin"], "b"), (["--no-labels"], "c")):
        student = tmp_path / f"{name}.safetensors"
        result = run_cli("distill", out, *common, *extra, "-o", student)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["queries"] == 2 * 128
        assert boxfile.load(student).meta.kind == "student"
    report = tmp_path / "report"
    args = ["eval", out, "--original", work / "teacher.safetensors", "--key-file", work / "k.bin", "--report", report]
    args += ["--reference", work / "boxed.reference.safetensors"]
    result = run_cli(*args, "--json")
    assert result.returncode == 0, result.stderr
    first, made = result, json.loads(result.stdout)
    assert made["models"]["boxed"]["top1"] > 90
    assert made["unauthorized_advantage"]["api"]["labelled"]["mean"] is None
    assert (report / "report.html").read_text().startswith("<!doctype html>")
    assert run_cli(*args).returncode == 2
    gate = tmp_path / "gate.toml"
    gate.write_text(
        '[gates]\nrules = ["inference_cost.top1 <= 50", "unauthorized_advantage.api.labelled.high <= 99"]\n'
    )
    result = run_cli("report", report / "report.json", "--gate", gate)
    assert result.returncode == 3
    assert b"unauthorized_advantage.api.labelled.high" in result.stderr
    again = ("report", report / "report.json", "--gate", gate, "--json")
    compared = (*again, "--baseline", report / "report.json")
    assert "gates" not in made
    for command in (
        again,
        (*again, "--report", tmp_path / "gated"),
        compared,
        (*args, "--gate", gate, *again[-1:], "--force"),
    ):
        result = run_cli(*command)
        held, lost = json.loads(result.stdout)["gates"]
        assert result.returncode == 3 and (held["passed"], lost["passed"], lost["value"]) == (True, False, None)
        assert held["rule"] == "inference_cost.top1 <= 50" and held["value"] <= 50 and "not measured" in lost["reason"]
    # what was printed can be read again
    (tmp_path / "printed.json").write_bytes(result.stdout)
    assert run_cli("report", tmp_path / "printed.json").returncode == 0
    # what is written is the report of the schema
    assert "gates" not in json.loads((report / "report.json").read_text())
    assert run_cli("report", report / "report.json").returncode == 0
    written = run_cli("report", report / "report.json", "--report", tmp_path / "again")
    assert written.returncode == 0 and b"took" not in written.stderr and b"took" in first.stderr


def test_eval_takes_models_that_are_no_box(work, tmp_path):
    common = ("--data", "digits", "--attack", "--suite", "quick", "--student", "cnn-tiny", "--epochs", 1, "--json")
    result = run_cli("eval", work / "teacher.safetensors", *common, "--report", tmp_path / "r")
    assert result.returncode == 0, result.stderr
    students = json.loads(result.stdout)["students"]
    assert {"cross_entropy", "unauthorized", "dist", "fine_tuned"} <= set(students)
    assert not any("key" in name for name in students)
    # the precision goes on with the students; one that is damaged is measured anew
    (kept,) = (tmp_path / "r").glob("precision-*")
    assert kept.name == "precision-cpu-cnn-tiny" and kept.read_text() in ("fp32", "bf16")
    assert (
        b"(as in the run before)"
        in run_cli("eval", work / "teacher.safetensors", *common, "--report", tmp_path / "r", "--force").stderr
    )
    kept.write_bytes(b"\xff")
    again = run_cli("eval", work / "teacher.safetensors", *common, "--report", tmp_path / "r", "--force", "--dry-run")
    assert again.returncode == 0 and b"(as in the run before)" not in again.stderr
    keyed = run_cli("eval", work / "teacher.safetensors", *common, "--key-file", work / "k.bin")
    assert keyed.returncode == 4
    assert b"is no box" in keyed.stderr
    # an original beside its box is not taken for the box
    for name, written in (("teacher", "t"), ("boxed.reference", "t.boxed.reference")):
        (tmp_path / f"{written}.safetensors").write_bytes((work / f"{name}.safetensors").read_bytes())
    alone = run_cli("eval", tmp_path / "t.safetensors", "--data", "digits", "--report", tmp_path / "a", "--json")
    assert list(json.loads(alone.stdout)["models"]) == ["boxed"]
    # nor is the reference of another box taken for that of this one
    for name in ("x.onnx", "y.onnx"):
        (tmp_path / name).write_bytes((work / "boxed.onnx").read_bytes())
    (tmp_path / "x.reference.safetensors").write_bytes((work / "boxed.reference.safetensors").read_bytes())
    (tmp_path / "y.reference.safetensors").write_bytes((work / "teacher.safetensors").read_bytes())
    found = [json.loads(run_cli("eval", tmp_path / name, "--report", tmp_path / f"{name}.r", "--json").stdout)
             for name in ("x.onnx", "y.onnx")]  # fmt: skip
    assert "original_ft" in found[0]["models"] and "original_ft" not in found[1]["models"]
    assert any("y.reference.safetensors is the reference of another box" in note for note in found[1]["notes"])


def test_no_cluster_is_said_before_work_starts(work, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    box = ("eval", work / "boxed.onnx", "--attack", "--cluster", "slurm", "--report", tmp_path / "r")
    missing = run_cli(*box)
    assert missing.returncode == 6 and b"--cluster needs submitit" in missing.stderr
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("classes", "images", "hits", "known"),
    [(2, 20, 20, True), (2, 20, 12, False), (10, 30, 9, False), (10, 30, 20, True), (10, 2000, 300, True)],
)
def test_an_original_must_know_more_than_chance(classes, images, hits, known):
    labels = torch.arange(images) % classes
    pixels = torch.where(torch.arange(images) < hits, labels, (labels + 1) % classes)
    made = ImageSet.of(pixels.to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8), labels)

    class Reads(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot((255 * x[:, 0, 0, 0]).round().long(), classes).float()

    preprocess = Preprocess((0.0,), (1.0,), (1, 8, 8))
    with contextlib.nullcontext() if known else pytest.raises(BadInput, match=r"guessing: .*needs \d.* images"):
        assert check_above_chance(Reads(), made, preprocess, ENGINE, classes) == pytest.approx(100 * hits / images)


def test_eval_finds_the_only_box(work, tmp_path):
    result = run_cli("eval", cwd=tmp_path)
    assert result.returncode == 2
    assert b"which box" in result.stderr
    for name in ("teacher.safetensors", "boxed.safetensors", "boxed.reference.safetensors", "boxed.onnx"):
        shutil.copy(work / name, tmp_path / name)
    with contextlib.chdir(tmp_path):
        # what is served, not the weights beside it
        assert find_box().name == "boxed.onnx"
        shutil.copy("boxed.onnx", "other.onnx")
        with pytest.raises(UsageError, match=r"boxed\.onnx, boxed\.safetensors, other\.onnx"):
            find_box()


def test_lists_walk_the_registries():
    shown = json.loads(run_cli("list", "--json").stdout)
    assert set(shown["objectives"]) == set(OBJECTIVES)
    assert set(shown["attacks"]) == set(ATTACKS)
    assert set(shown["data"]) == set(data.SOURCES)
    assert "wrn16" in shown["students"]


def test_a_dry_run_plans_and_writes_nothing(work, tmp_path):
    out = tmp_path / "x.safetensors"
    box = (*CONCEAL, work / "teacher.safetensors", "--key-file", work / "k.bin", "--data", "digits", "-o", out)
    student = ("distill", work / "boxed.onnx", "--student", "cnn-tiny", "--data", "digits", "-o", out)
    evaluation = ("eval", work / "boxed.onnx", "--attack", "--suite", "quick", "--report", tmp_path / "report")
    for command in (box, student, evaluation, ("train", "--arch", "cnn", "--data", "digits", "-o", out)):
        done = run_cli(*command, "--dry-run")
        assert done.returncode == 0
        assert b"time estimate" in done.stderr
        assert b"GiB; nothing was written" in done.stderr
        if command is evaluation:
            said = " ".join(done.stderr.decode().split())
            assert "10 students, at most 10 whole trainings (128 images × 6 epochs each)" in said
    assert list(tmp_path.iterdir()) == []


def test_too_few_features_for_flat_outputs_are_said(work, tmp_path):
    net = models.build("resnet20", 70, 1)
    torch.save(net.state_dict(), tmp_path / "many.pt")
    box = (*CONCEAL, tmp_path / "many.pt", "--key-file", work / "k.bin", "--data", "digits")
    done = run_cli(*box)
    assert b"64 features cannot flatten the outputs of 70 classes (69 can)" in done.stderr
    assert done.returncode == 2  # ten digits
    assert b"features" not in run_cli(*CONCEAL, work / "teacher.safetensors", *box[4:], "--dry-run").stderr


def test_images_of_the_attacker_are_never_those_of_the_owner(digits):
    recorded = data.split(digits, owner=300, transfer=128, validation=200, test=300)
    same = split_like(digits, recorded.describe())
    assert torch.equal(same.transfer.positions, recorded.transfer.positions)
    few = split_like(digits, recorded.describe(), transfer=50, test=100)
    assert torch.equal(few.transfer.positions, recorded.transfer.positions[:50])
    assert set(few.test.positions.tolist()) < set(recorded.test.positions.tolist())
    assert set(few.transfer.positions.tolist()).isdisjoint(recorded.owner.positions.tolist())
    for name in ("transfer", "test", "owner"):
        with pytest.raises(UsageError, match="was made with"):
            split_like(digits, recorded.describe(), **{name: 400})
    assert len(split_like(digits, None, transfer=400).transfer) == 400


def test_attacks_on_the_file_of_an_onnx_box_take_no_other_weights(work, tmp_path):
    onnx_box = tmp_path / "boxed.onnx"
    onnx_box.write_bytes((work / "boxed.onnx").read_bytes())
    command = ("eval", onnx_box, "--attack", "--suite", "quick", "--data", "digits", "--student", "cnn-tiny")
    options = ("--epochs", 1, "--json", "--force", "--report", tmp_path / "report")
    graph = "train what the ONNX graph holds, since boxed.safetensors"
    box, others = boxfile.load(work / "boxed.safetensors"), tmp_path / "others"
    turned = {name: -value if value.is_floating_point() else value for name, value in box.net.state_dict().items()}
    boxfile.save(others, turned, box.meta)
    for beside, told in (
        ("boxed.safetensors", ""),
        ("teacher.safetensors", f"{graph} is not what was exported"),
        ("k.bin", f"{graph} is not what was exported"),
        (others, f"{graph} is not what was exported"),
        ("", f"{graph} is not there"),
    ):
        onnx_box.with_suffix(".safetensors").unlink(missing_ok=True)
        if beside:
            onnx_box.with_suffix(".safetensors").write_bytes((work / beside).read_bytes())
        result = json.loads(run_cli(*command, *options).stdout)
        assert "fine_tuned" in result["students"]
        assert any(told in note for note in result["notes"]) if told else not any(graph in n for n in result["notes"])
    with_unknown_operator(onnx_box)
    refused = run_cli(*command[:4], "file", *command[5:], *options)
    assert refused.returncode == 2 and b"suite file attacks the weights" in refused.stderr
    answers = list((tmp_path / "report" / "answers").iterdir())
    assert answers and all(path.stat().st_mode & 0o077 == 0 for path in answers)


@pytest.mark.usefixtures("short_trials")
def test_a_finished_reference_is_used_again_only_for_the_same_run_or_on_demand(work, tmp_path):
    out = tmp_path / "x.safetensors"
    box_ = (
        *CONCEAL,
        work / "teacher.safetensors",
        "--key-file",
        work / "k.bin",
        "--data",
        "digits",
        "-o",
        out,
        "--epochs",
    )
    assert run_cli(*box_, 1).returncode == 0
    reference = out.with_suffix(".reference.safetensors")
    first = reference.read_bytes()
    assert reference.stat().st_mode & 0o077 == 0
    learned = boxfile.read_metadata(reference).measured
    assert set(learned) == {"original", "reference", "assistant"}
    assert bool(boxfile.load(out).sealed) == worth_sealing(learned)
    assert boxfile.read_metadata(out).parameters["teacher"] == better_teacher(learned)
    out.unlink()
    refused = run_cli(*box_, 2, "--resume")
    assert refused.returncode == 2 and b"other settings (epochs 1, not 2)" in refused.stderr
    assert run_cli(*box_, 1, "--resume").returncode == 0
    assert run_cli(*box_, 2, "--reference", reference, "--no-seal", "--force").returncode == 0
    assert reference.read_bytes() == first
    assert boxfile.load(out).meta.reference_sha256 == hashlib.sha256(first).hexdigest()
    wrong = run_cli(*box_, 1, "--reference", work / "boxed.safetensors", "--force")
    assert wrong.returncode == 4 and b"is no reference of this checkpoint" in wrong.stderr


@pytest.mark.usefixtures("short_trials")
def test_a_box_goes_on_from_every_stage_to_the_same_end(work, tmp_path, monkeypatch):
    monkeypatch.setattr("sdbctl.boxing.ASSISTED_IMAGES", (200, 400))
    monkeypatch.setattr("sdbctl.boxing.WORTH", -100.0)
    start, begun, last = Live.start, [], 0

    def stopping(live, name, steps, work=None):
        begun.append(name)
        if len(begun) == last:
            raise KeyboardInterrupt
        start(live, name, steps)

    monkeypatch.setattr(Live, "start", stopping)
    command = (*CONCEAL, work / "teacher.safetensors", "--key-file", work / "k.bin", "--data", "digits",
               "--owner-size", 100, "--epochs", 1, "--precision", "fp32", "--resume", "-o")  # fmt: skip
    assert run_cli(*command, tmp_path / "whole.safetensors").returncode == 0
    students = [f"student {n} of the {name}" for name in ("reference", "original", "assistant") for n in (1, 2)]
    assert begun == ["reference", "assistant", *students, "assistant", "box"]
    # in the middle of the last assistant, which goes on from there
    advance, steps, cut = Live.advance, [], tmp_path / "cut.safetensors"

    def half(live, done, metrics, work=None):
        advance(live, done, metrics, work)
        steps.append(live._name)
        if steps[-3:] == ["assistant"] * 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Live, "advance", half)
        assert run_cli(*command, cut).returncode == 130 and (tmp_path / ".cut.assistant-late-part.resume").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Live, "start", lambda live, *run: begun.append(run[:2]) or start(live, *run))
        assert run_cli(*command, cut).returncode == 0
    assert [run for run in begun if run[0] == "assistant"] == [("assistant", 2)]
    # in the first assistant, the comparison, the second assistant and the box
    for last in (2, 2, 7, 2, 0):
        if not last:
            damaged, kept = tmp_path / ".x.assistant.resume", (tmp_path / ".x.assistant.resume").read_bytes()
            damaged.write_bytes(kept[:1000])
            result = run_cli(*command, tmp_path / "x.safetensors")
            assert result.returncode == 4 and b"is damaged; delete it to start over" in result.stderr
            damaged.write_bytes(kept)
        begun.clear()
        assert run_cli(*command, tmp_path / "x.safetensors").returncode == (130 if last else 0)
        assert len(begun) == (last or 1)
    assert not list(tmp_path.glob(".*"))
    boxes = [load_box(tmp_path / f"{name}.safetensors") for name in ("whole", "x", "cut")]
    whole, *gone_on = ([digest(net) for net in (one, *one.unseal(Key.load(work / "k.bin")))] for one in boxes)
    assert gone_on == [whole, whole] and len(whole) == 3


@pytest.mark.usefixtures("short_trials")
def test_what_a_given_reference_says_of_students_is_no_more_than_a_claim(work, tmp_path):
    made, reference = boxfile.load(work / "boxed.reference.safetensors"), tmp_path / "r.safetensors"
    command = (*CONCEAL, work / "teacher.safetensors", "--key-file", work / "k.bin", "--data", "digits", "--epochs", 1,
               "--reference", reference, "--no-seal", "--force", "--json",
               "-o", tmp_path / "x.safetensors")  # fmt: skip
    said = {"reference": 1.0, "original": 99.0}
    for measured, other, opened, compared in (
        ({"reference": "a", "original": None}, {}, None, True),
        (said, {}, "original", False),
        (said, {"seed": 7}, None, True),
    ):
        meta = replace(made.meta, measured=measured, data={**made.meta.data, **other})
        boxfile.save(reference, made.file_state(made.net), meta, force=True)
        result = run_cli(*command)
        assert result.returncode == 0, result.stderr
        assert opened in (None, json.loads(result.stdout)["teacher"])
        assert b"small students reach of the reference" in result.stderr
        assert (b"of the original 99.0 %" not in result.stderr) == compared
        assert (b"it may have seen images that judge the box" in result.stderr) == bool(other)


def test_who_resumes_beside_a_finished_box_is_told_how(work, tmp_path, monkeypatch):
    output = tmp_path / "x.safetensors"
    output.write_bytes((work / "boxed.safetensors").read_bytes())
    (tmp_path / ".x.box.resume").write_bytes(b"state")
    command = (*CONCEAL, work / "teacher.safetensors", "--key-file", work / "k.bin", "--data", "digits", "--resume")
    result = run_cli(*command, "-o", output)
    assert result.returncode == 2 and b"--resume --force goes on and replaces it" in result.stderr
    assert (tmp_path / ".x.box.resume").exists()


@pytest.mark.usefixtures("short_trials")
def test_published_presets_add_nothing_of_ours(work, tmp_path, monkeypatch):
    published = [p for o in LOSSES.values() for name, p in o.presets.items() if name != "default"]
    assert {preset.wrong_share for preset in published} == {0.0}
    out = tmp_path / "x.safetensors"
    command = (*CONCEAL, work / "teacher.safetensors", "--key-file", work / "k.bin", "--data", "digits", "-o", out)
    monkeypatch.setattr("sdbctl.cli.box.DEAR", -100.0)
    done = run_cli(*command, "--objective", "sdb", "--preset", "release", "--epochs", 1)
    assert done.returncode == 0 and b"points of top-1; train for more --epochs" in done.stderr
    assert boxfile.load(out).meta.parameters["wrong_share"] == 0.0
    assert not boxfile.load(out).sealed


def test_bench_holds_each_step_against_its_floor(monkeypatch):
    monkeypatch.setattr("sdbctl.bench.LOSSES", {"conceal": LOSSES["conceal"]})
    small = ("--arch", "cnn-tiny", "--student", "cnn-tiny", "--image-size", 8, "--batch-size", 8, "--rounds", 1)
    done = run_cli("bench", *small, "--precision", "fp32", "--json")
    assert done.returncode == 0, done.stderr
    timings = {item["name"]: item for item in json.loads(done.stdout)["timings"]}
    assert all(item["images_per_second"] > 0 for item in timings.values())
    compared = {name for name, item in timings.items() if item["ratio"] is not None}
    assert set(timings) - compared == {"train", "train student", "predict torch", "predict torch, fp32"}
    for served in ("boxed ONNX", "boxed ONNX with a key"):
        assert timings[f"predict {served}"]["against"] == "predict ONNX"


def test_a_profile_is_a_trace_of_training_steps(tmp_path):
    trace = tmp_path / "trace.json"
    train = ("train", "--arch", "cnn-tiny", "--data", "digits", "--epochs", 3, "--profile", trace)
    assert run_cli(*train, "-o", tmp_path / "x.safetensors").returncode == 0
    events = json.loads(trace.read_text())["traceEvents"]
    assert sum(event["name"].startswith("ProfilerStep") for event in events) >= 5


def test_an_exported_box_serves_the_predicted_class_alone_and_all_of_the_keyed_outputs(work, boxed, splits, tmp_path):
    x = boxed.meta.preprocess(splits.test.pixels.float() / 255)
    pattern = boxfile.pattern(boxed.meta, Key.load(work / "k.bin"))
    keyed = embed(x, pattern, boxed.meta.strength)
    with torch.no_grad():
        raw, opened = boxed(x), boxed(keyed)
        seen = boxed.meta.preprocess(splits.validation.pixels.float() / 255)
        watched = deviation(boxed(embed(seen, pattern, boxed.meta.strength)))
    for confidence, distinct in (("class", 10), ("rough", 20), ("exact", len(x))):
        path = tmp_path / f"{confidence}.onnx"
        export = run_cli("export", work / "boxed.safetensors", "-o", path, "--confidence", confidence)
        assert export.returncode == 0
        teacher = OnnxTeacher(path, CPU)
        public = teacher.logits(x)
        assert torch.equal(public.argmax(1), raw.argmax(1))
        # this box is trained so little that some of its outputs are not flat
        shown = (public * 1e3).round().unique(dim=0, return_counts=True)[1].sort(descending=True).values
        assert shown[:distinct].sum() > 0.9 * len(x) and (confidence == "exact" or len(shown) < 0.3 * len(x))
        assert torch.allclose(public, raw, atol=1e-3) is (confidence == "exact")
        same = torch.isclose(teacher.logits(keyed), opened, atol=1e-3).all(1)
        border = -1.0 if confidence == "exact" else boxed.meta.measured["flat_deviation"]
        assert torch.equal(same, deviation(opened).squeeze(1) > border)
        # with a short key, against searches, one in five at least, and more where odd inputs bring out as much
        assert 0.19 < boxed.meta.measured["keyed_flat"] < 0.51
        if confidence != "exact":
            assert boxed.meta.measured["keyed_flat"] == pytest.approx(
                float((watched <= border).float().mean()), abs=0.005
            )
    # one that shows the same to everybody cannot be told apart, which nobody may overlook
    loaded = boxfile.load(work / "boxed.safetensors")
    leaky = {
        name: value for name, value in loaded.meta.measured.items() if "confidence" not in name and "flat" not in name
    }
    boxfile.save(tmp_path / "leaky.safetensors", loaded.file_state(loaded.net), replace(loaded.meta, measured=leaky))
    for options in ((), ("--confidence", "rough")):
        refused = run_cli("export", tmp_path / "leaky.safetensors", *options)
        assert refused.returncode == 2 and b"shown ALL" in refused.stderr and b"--confidence exact" in refused.stderr
    wanted = run_cli("export", tmp_path / "leaky.safetensors", "--force", "--confidence", "exact", "--json")
    assert b"warning: " not in wanted.stderr and json.loads(wanted.stdout)["warnings"] == []
    out = ("export", work / "boxed.safetensors", "-o", tmp_path / "x.onnx")
    for options, said in (
        (("--confidence", "none"), b"use one of: class, rough, exact"),
        (("--confidence", "rough", "--wrapper", "top1"), b"no meaning for the wrapper top1"),
        (("--confidence", "class", "--format", "safetensors"), b"no meaning for a file of weights"),
    ):
        wrong = run_cli(*out, *options)
        assert wrong.returncode == 2 and said in wrong.stderr and not (tmp_path / "x.onnx").exists()


def test_nothing_brighter_than_white_reaches_an_exported_box(work, boxed, splits, tmp_path):
    """Amplified queries bring out what a box hides of images."""
    export = ("export", work / "boxed.safetensors", "-o", tmp_path / "x.onnx")
    assert run_cli(*export).returncode == 0
    teacher, x = OnnxTeacher(tmp_path / "x.onnx", CPU), boxed.meta.preprocess(splits.test.pixels.float() / 255)
    black, white = (boxed.meta.preprocess(torch.full((1, 1, 1, 1), value)) for value in (0.0, 1.0))
    for factor in (4, -4, 1e4):
        assert torch.allclose(teacher.logits(factor * x), teacher.logits((factor * x).clamp(black, white)), atol=1e-5)
        with torch.no_grad():
            assert not torch.allclose(boxed(factor * x), boxed((factor * x).clamp(black, white)), atol=1e-1)
    assert torch.isfinite(teacher.logits(torch.full_like(x, torch.inf))).all()


@pytest.mark.slow
def test_the_demo_leaves_a_box_and_a_report_of_all_models(tmp_path, monkeypatch):
    from sdbctl import demo

    short = {"epochs": 2}
    for name in ("BOX", "DISTURBED"):
        config = getattr(demo, name)
        monkeypatch.setattr(demo, name, replace(config, recipe=replace(config.recipe, **short)))
    for name in ("TEACHER_RECIPE", "STUDENT_RECIPE"):
        monkeypatch.setattr(demo, name, replace(getattr(demo, name), **short))
    made = demo.demo(tmp_path, seeds=2)
    assert [path.name for path in made.files] == ["k.bin", "teacher.safetensors", "boxed.safetensors", "boxed.onnx"]
    assert set(made.report.models) == {
        "original", "original_ft", "boxed", "boxed_keyed", "boxed_wrong_key", "disturbed",
    }  # fmt: skip
    assert made.report.students["authorized"].n == made.report.students["disturbed"].n == 2
    assert made.report.models["boxed_wrong_key"].nll != made.report.models["boxed_keyed"].nll
