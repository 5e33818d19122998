"""What only a GPU can show: python -m pytest -m gpu."""

import copy

import pytest
import torch
from torch import nn

from sdbctl import boxfile, models
from sdbctl.attacks import ATTACKS
from sdbctl.box import fine_tune
from sdbctl.boxstep import BoxConfig, BoxStep, Task
from sdbctl.data import Batch, ImageSet, Preprocess, Splits
from sdbctl.distill import build_student, distill
from sdbctl.engine import Engine, place
from sdbctl.key import Key
from sdbctl.losses import cross_entropy
from sdbctl.objectives import LOSSES
from sdbctl.state import State
from sdbctl.teacher import Access, OnnxTeacher, TorchTeacher
from sdbctl.updates import WARM_STEPS, Recipe, Updater, recording

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
SIZE = (3, 32, 32)
STEPS = WARM_STEPS + 6


def images(count=256):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, *SIZE), generator=generator, dtype=torch.uint8)
    return ImageSet.of(pixels, torch.randint(0, 10, (count,), generator=generator), "cifar10")


def task(precision="fp32"):
    some = images()
    splits = Splits(some, some, some, some, 0, "")
    preprocess = Preprocess((0.5,) * 3, (0.25,) * 3, SIZE)
    return Task("cifar10", tuple(map(str, range(10))), splits, preprocess, Engine(GPU, precision))


def batch_of(some, preprocess, count=64):
    x = preprocess(some.pixels[:count].float().to(GPU) / 255).contiguous(memory_format=torch.channels_last)
    return Batch(x, some.labels[:count].to(GPU), torch.arange(count, device=GPU))


def updated(step, net, batch, *, record, rate=0.01, steps=STEPS):
    """Terms of some steps, the trained network and the updater."""
    net = place(copy.deepcopy(net), GPU).train()
    optimiser = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, nesterov=True, fused=record or None)
    seen = []
    with recording(GPU, record):
        update = Updater(net, step, optimiser, 5.0, record=record)
        for _ in range(steps):
            seen.append({name: float(term) for name, term in update(batch, rate).items()})
    torch.cuda.synchronize()
    return seen, net, update


@pytest.mark.parametrize("disturb", [0.0, 0.8])
@pytest.mark.parametrize("name", LOSSES)
def test_a_recorded_box_step_is_the_step(name, disturb):
    t, config = task(), BoxConfig(name, disturb=disturb, wrong_share=0.0)
    torch.manual_seed(0)
    net, other = models.build("resnet8", 10, 3).to(GPU), models.build("resnet8", 10, 3).to(GPU)
    step = BoxStep(net, net, other, [Key.generate()], t, config)
    batch = batch_of(t.data.owner, t.preprocess)
    (seen, one, update), (plain, two, usual) = (
        updated(step, net, batch, record=True),
        updated(step, net, batch, record=False),
    )
    assert update.recorded and not usual.recorded
    assert plain[0] != plain[-1]
    if LOSSES[name].needs_memory:
        # it draws a temperature for each step, and a recorded step draws others
        assert seen[0] != seen[-1]
        return
    for a, b in zip(seen, plain, strict=True):
        assert a == pytest.approx(b, rel=2e-2, abs=2e-3)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert (a - b).norm() <= 1e-2 * (b.norm() + 1)


def test_a_recorded_step_draws_wrong_keys_anew():
    t, config = task(), BoxConfig("conceal", wrong_share=1.0)
    net = models.build("resnet8", 10, 3).to(GPU)
    step = BoxStep(net, net, None, [Key.generate()], t, config)
    before = step.wrong_keys.rising.clone()
    seen, _, update = updated(step, net, batch_of(t.data.owner, t.preprocess), record=True, rate=0.0)
    assert update.recorded
    # patterns that climb do so in the graph
    assert (step.wrong_keys.rising != before).flatten(1).any(1).all()
    assert len({terms["hide"] for terms in seen[WARM_STEPS:]}) == STEPS - WARM_STEPS


def test_a_recorded_step_takes_the_learning_rate_and_the_batch_it_is_given():
    some, preprocess = images(), Preprocess((0.5,) * 3, (0.25,) * 3, SIZE)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))

    def step(model, batch):
        return {"label": cross_entropy(model(batch.x), batch.y)}

    _, net, update = updated(step, net, batch_of(some, preprocess), record=True)
    before = copy.deepcopy(net.state_dict())
    update(batch_of(some, preprocess), 0.0)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    other = Batch(*(tensor.flip(0) for tensor in batch_of(images(300), preprocess, 64)))
    with torch.no_grad():
        expected = float(cross_entropy(net(other.x), other.y))
    assert float(update(other, 0.01)["label"]) == pytest.approx(expected, rel=1e-3)
    # a last batch of another size is taken as usual
    few = batch_of(some, preprocess, 10)
    with torch.no_grad():
        expected = float(cross_entropy(net(few.x), few.y))
    assert float(update(few, 0.01)["label"]) == pytest.approx(expected, rel=1e-3)


def test_a_step_that_cannot_be_recorded_is_taken_as_usual():
    some, preprocess = images(), Preprocess((0.5,) * 3, (0.25,) * 3, SIZE)
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(3072, 10))

    def step(model, batch):
        loss = cross_entropy(model(batch.x), batch.y)
        return {"label": loss if loss.item() > 0 else -loss}

    seen, _, update = updated(step, net, batch_of(some, preprocess), record=True)
    assert not update.recorded
    assert seen[-1]["label"] < seen[0]["label"]


def test_fine_tuning_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    t, recipe = task(), Recipe(epochs=3, batch_size=64, lr=0.01)
    torch.manual_seed(0)
    torch.save(models.build("resnet8", 10, 3).state_dict(), tmp_path / "net.pt")
    original = boxfile.load(tmp_path / "net.pt")
    whole = fine_tune(original, t, recipe)
    saved = State.save

    def killed(self, epoch, *rest, **more):
        saved(self, epoch, *rest, **more)
        if epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(State, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(original, t, recipe, resume_from=tmp_path / "state")
    monkeypatch.setattr(State, "save", saved)
    resumed = fine_tune(original, t, recipe, resume_from=tmp_path / "state")
    begun, one, other = (
        torch.cat([p.flatten().cpu() for p in net.parameters()]) for net in (original.net, whole, resumed)
    )
    assert (one - other).norm() <= 0.1 * (one - begun).norm()


@pytest.fixture(scope="module")
def boxed(work):
    return boxfile.load_box(work / "boxed.safetensors")


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_trains_on_a_gpu(name, boxed, splits, monkeypatch):
    recorded, attack, engine = [], ATTACKS[name], Engine(GPU)
    record = Updater._record

    def watched(self, batch):
        record(self, batch)
        recorded.append(self.recorded)

    monkeypatch.setattr(Updater, "_record", watched)
    net = copy.deepcopy(boxed.net)
    teacher = TorchTeacher(copy.deepcopy(boxed.net), 10, engine) if attack.access > Access.NONE else None
    config = {key: min(value, 4.0) if key in ("tries", "rounds") else value for key, value in attack.grid[0].items()}
    student = distill(
        attack, config, teacher, "cnn-tiny", 10, splits.transfer.take(range(96)), boxed.meta.preprocess,
        Recipe(epochs=3, batch_size=32), engine, weights=net, strength=boxed.meta.strength,
        surrogate=splits.validation.take(range(96)), levels=torch.zeros(2, 10),
    ).student  # fmt: skip
    assert all(torch.isfinite(parameter).all() for parameter in student.parameters())
    assert all(recorded) and bool(recorded) is (name != "data_free")


@pytest.mark.parametrize("name", ["kd", "averaged_noise", "scm"])
def test_a_recorded_attack_learns_from_the_answers_of_every_epoch(name, boxed, splits, monkeypatch):
    engine, attack, trained = Engine(GPU), ATTACKS[name], []
    teacher = TorchTeacher(copy.deepcopy(boxed.net), 10, engine)
    for record in (True, False):
        if not record:
            monkeypatch.setattr(Updater, "_record", lambda self, batch: None)
        student = distill(
            attack, attack.grid[0], teacher, "cnn-tiny", 10, splits.transfer.take(range(96)), boxed.meta.preprocess,
            Recipe(epochs=4, batch_size=32, lr=0.05), engine,
        ).student  # fmt: skip
        trained.append(torch.cat([p.detach().flatten().cpu() for p in student.parameters()]))
    begun = torch.cat([p.detach().flatten() for p in build_student("cnn-tiny", 10, 1, 0).parameters()])
    assert (trained[0] - trained[1]).norm() <= 0.1 * (trained[1] - begun).norm()


def test_onnx_runtime_without_its_cuda_provider_answers_on_the_cpu(work, boxed, splits):
    import onnxruntime

    path = work / "boxed.onnx"
    x = boxed.meta.preprocess(splits.test.pixels[:50].float() / 255)
    served = OnnxTeacher(path, GPU)
    answers = served.logits(x.to(GPU))
    assert answers.device.type == "cuda"
    assert ("cpu" in served.where) is ("CUDAExecutionProvider" not in onnxruntime.get_available_providers())
    expected = OnnxTeacher(path, torch.device("cpu")).logits(x)
    assert torch.allclose(answers.cpu(), expected, atol=1e-3)


def test_a_key_opens_the_same_box_on_both_devices(work, boxed, splits):
    x = boxed.meta.preprocess(splits.test.pixels[:50].float() / 255)
    opened = boxed.unlock(Key.load(work / "k.bin"))
    with torch.no_grad():
        cpu, gpu = opened(x), copy.deepcopy(opened).to(GPU)(x.to(GPU)).cpu()
    assert torch.allclose(cpu, gpu, atol=2e-2)


def test_the_whole_job_runs_on_a_gpu(work, tmp_path):
    from tests.conftest import CONCEAL, run_cli

    common = ("--data", "digits", "--transfer-size", 128, "--test-size", 300, "--device", "cuda")
    short = ("--epochs", 2, "--batch-size", 64)
    box = run_cli(
        *CONCEAL, work / "teacher.safetensors", "--key-file", work / "k.bin", *common, *short, "--precision", "bf16",
        "-o", tmp_path / "b.safetensors",
    )  # fmt: skip
    assert box.returncode == 0, box.stderr
    assert run_cli("export", tmp_path / "b.safetensors").returncode == 0
    done = run_cli(
        "eval", tmp_path / "b.onnx", "--attack", "--suite", "quick", "--student", "cnn-tiny", "--key-file",
        work / "k.bin", "--original", work / "teacher.safetensors", *common, "--epochs", 2, "--report",
        tmp_path / "r", "--jobs", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r" / "report.json").exists()
    assert run_cli("bench", "--arch", "cnn", "--student", "cnn-tiny", "--device", "cuda", "--json").returncode == 0
