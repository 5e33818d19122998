"""Checkpoints in the shapes people have; nothing but BadInput for the rest."""

import argparse
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from sdbctl import boxfile, checkpoint, models
from sdbctl.errors import BadInput

NET = models.build("cnn-tiny", 10, 1)
STATE = NET.state_dict()


def same(loaded):
    assert set(loaded.state_dict) == set(STATE)
    assert all(torch.equal(loaded.state_dict[k], STATE[k]) for k in STATE)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "net", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
@pytest.mark.parametrize("legacy", [False, True])
def test_wrappers_and_prefixes(wrapper, prefix, legacy, tmp_path):
    state = {prefix + k: v for k, v in STATE.items()}
    content = state if wrapper is None else {wrapper: state, "epoch": 3, "best_prec1": 91.2}
    path = tmp_path / "x.anything"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    loaded = checkpoint.load(path)
    same(loaded)
    assert all(loaded.original_keys[k] == prefix + k for k in STATE)


def test_safetensors_by_content(tmp_path):
    path = tmp_path / "x.pt"
    save_file({k: v.clone() for k, v in STATE.items()}, path, {"sdbctl": "{}"})
    loaded = checkpoint.load(path)
    same(loaded)
    assert loaded.metadata == {"sdbctl": "{}"}


def test_harmless_extras_of_training_scripts(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"state_dict": STATE, "args": argparse.Namespace(lr=0.1), "best": np.float64(3.0)}, path)
    same(checkpoint.load(path))


def test_whole_torchvision_modules(tmp_path):
    import torchvision

    net = torchvision.models.squeezenet1_1(num_classes=4)
    path = tmp_path / "x.pt"
    torch.save(net, path)
    loaded = boxfile.load(path)
    assert (loaded.architecture, loaded.classes) == ("squeezenet1_1", 4)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.net(x), net.eval()(x))


def test_half_precision_becomes_float(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in STATE.items()}, path)
    loaded = checkpoint.load(path)
    assert {t.dtype for t in loaded.state_dict.values()} == {torch.float32, torch.int64}


def test_shared_and_strided_tensors_come_out_independent(tmp_path):
    base = torch.randn(4, 6)
    torch.save({"a.weight": base.t(), "b.weight": base, "c.bias": base[0]}, tmp_path / "x.pt")
    state = checkpoint.load(tmp_path / "x.pt").state_dict
    assert all(t.is_contiguous() for t in state.values())
    assert len({t.untyped_storage().data_ptr() for t in state.values()}) == 3


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, [1, 2], 3, "text", {"epoch": 3}, {1: torch.zeros(2)}])
def test_files_without_a_state_dict(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(BadInput, match="no state_dict"):
        checkpoint.load(tmp_path / "x.pt")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(bad, tmp_path):
    torch.save({**STATE, "classifier.bias": torch.full((10,), bad)}, tmp_path / "x.pt")
    with pytest.raises(BadInput, match=r"classifier\.bias"):
        checkpoint.load(tmp_path / "x.pt")


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize("call", [os.system, eval, exec, print, getattr])
def test_code_is_refused_and_does_not_run(call, tmp_path):
    mark = tmp_path / "mark"
    argument = f"touch {mark}" if call is os.system else f"open({str(mark)!r}, 'w')"
    torch.save({"state_dict": STATE, "x": Runs(call, argument)}, tmp_path / "x.pt")
    with pytest.raises(BadInput, match="would run"):
        checkpoint.load(tmp_path / "x.pt")
    assert not mark.exists()


def test_trust_runs_it(tmp_path):
    mark = tmp_path / "mark"
    torch.save({"state_dict": STATE, "x": Runs(os.system, f"touch {mark}")}, tmp_path / "x.pt")
    same(checkpoint.load(tmp_path / "x.pt", trust=True))
    assert mark.exists()


def test_kinds_are_told_by_content(tmp_path):
    save_file(STATE, tmp_path / "x.pt")
    torch.save(STATE, tmp_path / "x.safetensors")
    for path in tmp_path.iterdir():
        same(checkpoint.load(path))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [4, 5])
def test_other_pickle_protocols_are_named_and_need_trust(protocol, legacy, tmp_path):
    path = tmp_path / "x.pt"
    torch.save(STATE, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(BadInput, match=r"another pickle protocol.*without pickle_protocol, or use --trust"):
        checkpoint.load(path)
    same(checkpoint.load(path, trust=True))


def _pickled(protocol):
    return lambda path: path.write_bytes(pickle.dumps(STATE, protocol=protocol))


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize(
    ("write", "words"),
    [
        (_pickled(2), "a pickle that torch did not write; save model.state_dict()"),
        (_pickled(4), "a pickle that torch did not write; save model.state_dict()"),
        (
            lambda path: np.savez(path.open("wb"), **STATE),
            "a zip file that torch did not write; save model.state_dict()",
        ),
        (
            lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            "a Git LFS pointer",
        ),
        (lambda path: path.write_bytes(b"\x1f\x8b" + bytes(99)), "not a readable checkpoint; save model.state_dict()"),
        (lambda path: path.write_bytes(b""), "empty; the file was probably cut off"),
    ],
)
def test_what_else_lies_about_is_named(write, words, trust, tmp_path):
    write(tmp_path / "x.pt")
    with pytest.raises(BadInput) as error:
        checkpoint.load(tmp_path / "x.pt", trust=trust)
    assert words in str(error.value) and "--trust" not in str(error.value)


def test_a_module_named_in_the_file_is_not_imported(tmp_path):
    (tmp_path / "evilmodule.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    torch.save({"x": STATE["classifier.bias"]}, tmp_path / "x.pt")
    pickled = b"\x80\x02cevilmodule\nThing\nq\x00)\x81q\x01."
    (tmp_path / "y.pt").write_bytes(pickled)
    with pytest.raises(BadInput):
        checkpoint.load(tmp_path / "y.pt")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("made", [torch.nn.Linear, argparse.Namespace, np.dtype, np.ndarray])
def test_no_class_of_a_file_is_called(made, tmp_path, monkeypatch):
    torch.save({"state_dict": STATE, "x": Runs(made, 10**12)}, tmp_path / "x.pt")
    if made is torch.nn.Linear:
        monkeypatch.setattr(made, "__init__", lambda *_: pytest.fail("called"))
    # a dtype of this name does not exist, and such an array has no room
    same(checkpoint.load(tmp_path / "x.pt"))


def test_attributes_of_a_module_are_no_classes(tmp_path):
    pickled = b"\x80\x02cnumpy.dtypes\n__getattribute__\nX\x08\x00\x00\x00__dict__\x85R."
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    with pytest.raises(BadInput, match=r"would run numpy\.dtypes\.__getattribute__"):
        checkpoint.load(tmp_path / "x.pt")


def test_a_network_that_holds_itself(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2))
    net._modules["again"] = net
    torch.save(net, tmp_path / "x.pt")
    with pytest.raises(BadInput, match="damaged network"):
        checkpoint.load(tmp_path / "x.pt")


def test_a_module_twice_and_buffers_that_are_not_kept(tmp_path):
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 3, 1))
    net.append(net[0])
    net.register_buffer("passing", torch.ones(1), persistent=False)
    torch.save(net, tmp_path / "x.pt")
    assert list(checkpoint.load(tmp_path / "x.pt").state_dict) == list(net.state_dict())


def test_one_number_that_pretends_to_be_many(tmp_path):
    torch.save({**STATE, "x": torch.ones(1).as_strided((10**6, 10**6), (0, 0))}, tmp_path / "x.pt")
    with pytest.raises(BadInput, match=r"x in .* is no plain tensor"):
        checkpoint.load(tmp_path / "x.pt")


def test_small_numbers_repeated_are_tensors(tmp_path):
    torch.save({"x": torch.arange(4.0)[:, None].expand(4, 1000)}, tmp_path / "x.pt")
    assert checkpoint.load(tmp_path / "x.pt").state_dict["x"].shape == (4, 1000)


def test_attributes_of_a_parameter_do_not_stand_for_its_methods(tmp_path):
    bad = torch.nn.Parameter(torch.full((2,), float("nan")))
    bad.is_floating_point = OrderedDict
    torch.save({**STATE, "x": bad}, tmp_path / "x.pt")
    with pytest.raises(BadInput, match=r"x in .* NaN"):
        checkpoint.load(tmp_path / "x.pt")


def test_compressed_files_are_refused(tmp_path):
    torch.save({"x": torch.zeros(10**6)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as stored, zipfile.ZipFile(tmp_path / "y.pt", "w", 8) as small:
        for name in stored.namelist():
            small.writestr(name, stored.read(name))
    with pytest.raises(BadInput, match="compressed"):
        checkpoint.load(tmp_path / "y.pt")


WHOLE = save({k: v.clone() for k, v in STATE.items()})


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=400))
def test_random_bytes_give_bad_input(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "x"
    path.write_bytes(content)
    with pytest.raises(BadInput):
        checkpoint.load(path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_files_give_bad_input_or_load(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    torch.save(STATE, folder / "zip")
    content = bytearray(data.draw(st.sampled_from([WHOLE, (folder / "zip").read_bytes()])))
    cut = data.draw(st.integers(1, len(content)))
    place = data.draw(st.integers(0, cut - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    (folder / "x").write_bytes(content[:cut])
    try:
        checkpoint.load(folder / "x")
    except BadInput as error:
        assert "\n" not in str(error)


@pytest.mark.data
def test_real_checkpoints():
    folder = Path(os.environ["SDBCTL_TEST_DATA"]) / "checkpoints"
    for name, arch in (("resnet20-12fca82f.th", "resnet20"), ("resnet32-d509ac18.th", "resnet32")):
        loaded = boxfile.load(folder / name)
        assert (loaded.architecture, loaded.classes) == (arch, 10)
        assert all(key.startswith("module.") for key in loaded.keys.values())
