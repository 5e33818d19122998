"""An independent check: model extraction of the Adversarial Robustness Toolbox against a box, beside ours."""

from statistics import mean

import numpy as np
import pytest
import torch
from torch import nn

from sdbctl import boxfile, metrics
from sdbctl.attacks import ATTACKS
from sdbctl.distill import build_student, distill
from sdbctl.teacher import TorchTeacher
from sdbctl.training import Engine, Recipe, predict

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
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
    teacher, config = TorchTeacher(box.net, 10, ENGINE.autocast, ENGINE.device), ATTACKS[kind].grid[0]
    # the toolbox, too, is asked about images without labels
    known = {"surrogate": splits.transfer.unlabelled()}
    done = distill(
        ATTACKS[kind], config, teacher, "cnn-tiny", 10, splits.transfer, box.meta.preprocess, recipe, ENGINE, **known
    )
    return metrics.top1(predict(done.student, splits.test, box.meta.preprocess, ENGINE), splits.test.labels)


@pytest.mark.parametrize("kind", ["knockoff", "copycat"])
def test_extraction_agrees_with_the_toolbox(kind, work, splits):
    pytest.importorskip("art", reason="the Adversarial Robustness Toolbox is in the test extra")
    box = boxfile.load_box(work / "boxed.safetensors")
    mine, other = ([run(kind, box, splits, seed) for seed in range(SEEDS)] for run in (ours, theirs))
    assert abs(mean(mine) - mean(other)) < 5, (mine, other)
    assert mean(other) > 60
