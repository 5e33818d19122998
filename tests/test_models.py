"""Networks are built by name and recognised by their weights, whoever named them."""

import math
import pickle

import pytest
import torch

from sdbctl import boxfile, models, onnxfile
from sdbctl.boxfile import Metadata
from sdbctl.data import Preprocess
from sdbctl.errors import BadInput, UsageError
from sdbctl.gate import KeyGate
from sdbctl.models.graph import Graph
from sdbctl.models.stages import Stages, head, width
from sdbctl.wrappers import Concealed

OWN = [*models.OWN, "wrn-16-1", "wrn-16-2", "wrn-28-10"]


def meta(name, classes=10, channels=3):
    with torch.device("meta"):
        return models.build(name, classes, channels)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(("classes", "channels"), [(7, 1), (100, 3)])
def test_own_networks_are_recognised(name, classes, channels):
    state = meta(name, classes, channels).state_dict()
    found = models.identify(state)
    assert found.name == name or {found.name, name} == {"resnet18_cifar", name}
    assert (found.classes, found.channels) == (classes, channels)
    assert found.keys == {key: key for key in state}


@pytest.mark.parametrize(
    "name", ["resnet8", "resnet8_b", "wrn-10-1", "resnet18_cifar", "mobilenetv2", "shufflenetv2", "vgg11_cifar", "cnn"]
)
@pytest.mark.parametrize("size", [8, 32])
def test_own_networks_run_on_small_images(name, size):
    net = models.build(name, 5, 1).eval()
    with torch.no_grad():
        out = net(torch.zeros(2, 1, size, size))
    assert out.shape == (2, 5)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg16_bn", "mobilenet_v2", "vit_b_16", "squeezenet1_0"])
def test_torchvision_networks_are_recognised(name):
    found = models.identify(meta(name, 37).state_dict())
    assert (found.name, found.classes) == (name, 37)


@pytest.mark.parametrize(
    ("name", "features"),
    [("resnet20", 64), ("wrn-16-2", 128), ("vgg16", 4096), ("vit_b_16", 768), ("squeezenet1_1", 512)],
)
def test_the_width_is_that_of_the_last_layer(name, features):
    assert width(meta(name, 37)) == features


def test_features_of_a_network_that_ends_in_a_convolution():
    net = models.build("squeezenet1_1", 5).eval()
    stages = Stages(net)
    with torch.no_grad():
        logits = net(torch.rand(2, 3, 64, 64))
        assert stages.features.shape == (2, 512)
        # the logits are rectified before they are averaged
        bound = head(net)(stages.features[..., None, None]).flatten(1).relu()
    assert (logits >= bound - 1e-6).all()
    stages.close()


RENAMED = {
    "resnet20_b": lambda key: key.replace("shortcut", "downsample").replace("linear", "fc"),
    "resnet18_cifar": lambda key: key.replace("shortcut", "downsample").replace("linear", "fc"),
    "wrn-16-2": lambda key: (
        key.replace("block1.", "block1.layer.").replace("block2.", "block2.layer.").replace("shortcut", "convShortcut")
    ),
    "vgg16_cifar": lambda key: key.replace("classifier", "linear"),
}


@pytest.mark.parametrize("name", RENAMED)
def test_other_peoples_names(name):
    state = meta(name).state_dict()
    renamed = {RENAMED[name](key): tensor for key, tensor in state.items()}
    assert set(renamed) != set(state)
    found = models.identify(dict(sorted(renamed.items())))
    assert found.name == name
    assert found.keys == {key: RENAMED[name](key) for key in state}


def test_unheard_of_names_are_paired_by_place():
    state = meta("resnet20").state_dict()
    renamed = {f"layers.{n}.{key.rsplit('.', 1)[-1]}": tensor for n, (key, tensor) in enumerate(state.items())}
    found = models.identify(renamed)
    assert found.name == "resnet20"
    assert list(found.keys.values())[:2] == list(renamed)[:2]


def test_counters_may_be_missing():
    state = {k: v for k, v in meta("resnet20").state_dict().items() if "num_batches" not in k}
    assert models.identify(state).name == "resnet20"


def test_unknown_architectures_and_names():
    with pytest.raises(BadInput, match="--arch"):
        models.identify({"a.weight": torch.zeros(3, 4)})
    with pytest.raises(BadInput, match="resnet20"):
        models.match("resnet20", meta("resnet32").state_dict())
    with pytest.raises(UsageError, match="did you mean"):
        models.build("resnet2", 10)
    with pytest.raises(UsageError, match="6n"):
        models.build("wrn-17-2", 10)
    with pytest.raises(UsageError, match="3 channels"):
        models.build("resnet18", 10, 1)


def test_match_says_which_weight_differs():
    state = dict(meta("resnet20").state_dict())
    state["layer1.0.conv1.weight"] = torch.zeros(16, 8, 3, 3, device="meta")
    with pytest.raises(BadInput, match=r"layer1\.0\.conv1\.weight"):
        models.match("resnet20", state)


def test_wrn16_is_wrn_16_2():
    assert sum(p.numel() for p in models.build("wrn16", 10).parameters()) == sum(
        p.numel() for p in models.build("wrn-16-2", 10).parameters()
    )


def test_parameter_counts_of_the_papers():
    def millions(name, classes=10):
        return sum(p.numel() for p in meta(name, classes).parameters()) / 1e6

    assert millions("resnet20") == pytest.approx(0.27, abs=0.01)
    assert millions("resnet110") == pytest.approx(1.7, abs=0.05)
    assert millions("wrn-40-4") == pytest.approx(8.9, abs=0.1)
    assert millions("wrn-28-10") == pytest.approx(36.5, abs=0.1)


def exported(net, path, size, **options):
    example = torch.zeros(2, 3, size, size)
    free = {"input": {0: "n"}}
    torch.onnx.export(net, (example,), path, dynamo=False, input_names=["input"], dynamic_axes=free, **options)
    return onnxfile.read(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["resnet8", "resnet18_cifar", "mobilenetv2", "densenet121", "efficientnet_b0", "vgg11_cifar"]
)
@pytest.mark.parametrize("folded", [True, False])
def test_a_graph_becomes_the_network_that_it_was_exported_from(name, folded, tmp_path):
    net = models.build(name, 5)
    size = 32 if name in models.OWN else 64
    # statistics of BatchNorm that are not those of the beginning
    net.train()(torch.rand(4, 3, size, size))
    net.eval()
    # an exporter that keeps BatchNorm, and one that folds it
    mode = torch.onnx.TrainingMode.EVAL if folded else torch.onnx.TrainingMode.PRESERVE
    model = exported(net, tmp_path / "x.onnx", size, training=mode, do_constant_folding=folded)
    found = pickle.loads(pickle.dumps(Graph(model, 5).eval()))
    x = torch.randn(3, 3, size, size)
    with torch.no_grad():
        assert torch.allclose(found(x), net(x), atol=1e-4)
    assert head(found).weight.shape == head(net).weight.shape and width(found) == width(net)
    # every weight can be trained
    found(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in found.parameters())
    assert sum(p.numel() for p in found.parameters()) >= 0.9 * sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("keys", [0, 1, 2])
def test_a_box_of_coloured_images_is_rebuilt_without_what_hides_it(keys, tmp_path):
    size = (3, 16, 16)
    net, preprocess = models.build("resnet8", 10).eval(), Preprocess((0.5,) * 3, (0.2, 0.25, 0.3), size)
    meta = Metadata("teacher", "resnet8", tuple(map(str, range(10))), preprocess)
    # as an exported graph has it: what looks for keys is closed to all others
    border = math.inf if keys else 1.0
    shown = Concealed(net, preprocess, 0.5, torch.full((2, 10), 0.9), border, "class")
    if keys:
        shown = KeyGate(shown, [models.build("resnet14", 10).eval()], torch.rand(keys, 1, *size), 0.7, preprocess)
    assert boxfile.export_onnx(tmp_path / "x.onnx", shown, meta) < 1e-4
    found = Graph(onnxfile.read(tmp_path / "x.onnx"), 10).eval()
    x = preprocess(torch.rand(4, *size))
    with torch.no_grad():
        assert torch.allclose(found(x), net(x), atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_logits_of_a_graph_may_be_averaged_maps_and_vectors_normalised(tmp_path):
    class Averaged(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = torch.nn.Linear(48, 48), torch.nn.BatchNorm1d(48)
            self.last = torch.nn.Conv2d(3, 5, 1)

        def forward(self, x):
            x = self.norm(self.first(x.flatten(1))).view(-1, 3, 4, 4)
            return self.last(x.relu()).mean((2, 3))

    net = Averaged()
    net.train()(torch.rand(8, 3, 4, 4))
    model = exported(net.eval(), tmp_path / "x.onnx", 4, training=torch.onnx.TrainingMode.PRESERVE)
    x = torch.randn(3, 3, 4, 4)
    with torch.no_grad():
        assert torch.allclose(Graph(model, 5).eval()(x), net(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_what_of_a_graph_cannot_be_trained_is_named(tmp_path):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.last = torch.nn.Linear(48, 5)

        def forward(self, x):
            return self.last(x.flatten(1).cumsum(1))

    model = exported(Odd(), tmp_path / "x.onnx", 4)
    with pytest.raises(UsageError, match="operator CumSum"):
        Graph(model, 5)
    with pytest.raises(UsageError, match="no last layer of 7 classes"):
        Graph(model, 7)
