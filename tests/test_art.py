"""An independent check: extraction and postprocessors of the Adversarial Robustness Toolbox, beside ours."""

from math import sqrt
from statistics import mean, variance

import numpy as np
import pytest
import torch
from torch import nn

from sdbctl import boxfile, metrics
from sdbctl.attacks import ATTACKS
from sdbctl.distill import build_student, distill
from sdbctl.engine import Engine
from sdbctl.inference import predict
from sdbctl.teacher import TorchTeacher
from sdbctl.updates import Recipe
from sdbctl.wrappers import WRAPPERS, behind

pytestmark = pytest.mark.filterwarnings("ignore")
ENGINE = Engine(torch.device("cpu"))
EPOCHS, SEEDS = 60, 4


def theirs(kind, box, splits, seed):
    from art.attacks.extraction import CopycatCNN, KnockoffNets
    from art.estimators.classification import PyTorchClassifier

    def classifier(net):
        optimiser = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
        shape = tuple(box.meta.preprocess.size)
        return PyTorchClassifier(net, nn.CrossEntropyLoss(), shape, 10, optimiser, device_type="cpu")

    def pixels(images):
        return box.meta.preprocess(images.pixels.float() / 255).numpy()

    np.random.seed(seed)
    torch.manual_seed(seed)
    victim = classifier(nn.Sequential(box, nn.Softmax(1)).eval())
    options = {"batch_size_fit": 32, "batch_size_query": 128, "nb_epochs": EPOCHS, "nb_stolen": len(splits.transfer)}
    if kind == "knockoff":
        attack = KnockoffNets(victim, use_probability=True, verbose=False, **options)
    else:
        attack = CopycatCNN(victim, **options)
    thief = classifier(build_student("cnn-tiny", 10, 1, seed))
    stolen = attack.extract(pixels(splits.transfer), thieved_classifier=thief)
    return metrics.top1(torch.tensor(stolen.predict(pixels(splits.test))), splits.test.labels)


def ours(kind, box, splits, seed):
    recipe = Recipe(epochs=EPOCHS, batch_size=32, lr=0.1, augment="none", seed=seed)
    teacher, config = TorchTeacher(box.net, 10, ENGINE), ATTACKS[kind].grid[0]
    # the toolbox, too, is asked about images without labels
    known = {"surrogate": splits.transfer.unlabelled()}
    done = distill(
        ATTACKS[kind], config, teacher, "cnn-tiny", 10, splits.transfer, box.meta.preprocess, recipe, ENGINE, **known
    )
    return metrics.top1(predict(done.student, splits.test, box.meta.preprocess, ENGINE), splits.test.labels)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["knockoff", "copycat"])
def test_extraction_agrees_with_the_toolbox(kind, work, splits):
    pytest.importorskip("art", reason="the Adversarial Robustness Toolbox is in the test extra")
    box = boxfile.load_box(work / "boxed.safetensors")
    mine, other = ([run(kind, box, splits, seed) for seed in range(SEEDS)] for run in (ours, theirs))
    noise = sqrt((variance(mine) + variance(other)) / SEEDS)
    assert abs(mean(mine) - mean(other)) < min(5, 3 * noise), (mine, other)
    assert mean(other) > 60


def test_postprocessors_agree_with_the_toolbox():
    found = pytest.importorskip("art.defences.postprocessor", reason="it is in the test extra")
    # none so small that it is clipped, which ours does at 1e-6, theirs at 1e-9
    z = torch.randn(200, 10, generator=torch.Generator().manual_seed(0)) * 2
    p = z.softmax(1).numpy()
    # one answer at a time: of a batch, the toolbox's ClassLabels marks the predictions of all in every row
    labels = np.concatenate([found.ClassLabels()(one[None]) for one in p])
    for name, theirs in (
        ("top1", labels),
        ("rounded", found.Rounded()(p)),
        ("high-confidence", found.HighConfidence()(p)),
        ("reverse-sigmoid", found.ReverseSigmoid()(p)),
    ):
        # its answers need not sum to one; where it leaves nothing, ours keeps the predicted class
        kept = theirs.sum(1) > 0
        assert kept.sum() > 150
        ours = behind(WRAPPERS[name], z).exp().numpy()[kept]
        assert np.allclose(ours, theirs[kept] / theirs[kept].sum(1, keepdims=True), atol=1e-4), name
    # noise is not the same noise, but of one size: of what is not clipped, and before both divide by the sum
    certain = np.full((2000, 2), 0.5, dtype=np.float32) + np.linspace(-0.01, 0.01, 2000, dtype=np.float32)[:, None]
    np.random.seed(0)
    ours = WRAPPERS["gaussian-noise"](torch.from_numpy(certain)).numpy() - certain
    theirs = found.GaussianNoise()(certain) - certain
    assert ours.std() == pytest.approx(0.2, abs=0.02) and theirs.std() == pytest.approx(0.2, abs=0.02)
    assert abs(ours.mean()) < 0.02
