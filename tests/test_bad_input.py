"""Whatever is wrong: one line that says what, where and what to do; the right exit code; nothing half-written."""

import contextlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import load_file, save_file

from sdbctl import boxfile, data, files, team
from sdbctl.box import digest
from sdbctl.cli import common
from sdbctl.data import PRESETS
from sdbctl.errors import UsageError
from sdbctl.key import Key
from tests.conftest import CONCEAL, run_cli

MARK = "pwned"


class Evil:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def check(result, code, *words):
    """One line on stderr after the progress lines, no traceback, nothing on stdout."""
    text = result.stderr.decode()
    assert result.returncode == code, text
    assert "Traceback" not in text
    assert "internal error" not in text
    last = text.strip().splitlines()[-1]
    assert last.startswith("error: "), text
    for word in words:
        assert word in last, last
    assert result.stdout == b""
    return last


def parts(folder):
    return [path.name for path in folder.iterdir() if path.name.endswith((".part", ".resume"))]


BROKEN = {
    "missing": (None, "check the path"),
    "empty": (b"", ""),
    "random": (np.random.default_rng(0).bytes(3000), ""),
    "text": (b"hello, I am no model\n" * 50, ""),
    "zip": (b"PK\x03\x04" + b"\0" * 500, ""),
}
REPORT = Path(__file__).parents[1] / "examples" / "results" / "demo.json"
BOX, TEACHER, KEY, DIGITS = "boxed.safetensors", "teacher.safetensors", "k.bin", ("--data", "digits")
HIDES = (*CONCEAL[1:], "--set", "hide=1,2")
COMMANDS = {
    "box": lambda path, work: [*CONCEAL, path, "--key-file", work / KEY, *DIGITS],
    "box --key-file": lambda path, work: [*CONCEAL, work / TEACHER, "--key-file", path, *DIGITS],
    "box --reference": lambda path, work: [
        *CONCEAL,
        work / TEACHER,
        "--key-file",
        work / KEY,
        *DIGITS,
        "--reference",
        path,
    ],
    "export": lambda path, work: ["export", path, "-o", path.parent / "out.onnx"],
    "inspect": lambda path, work: ["inspect", path],
    "inspect --key-file": lambda path, work: ["inspect", work / BOX, "--key-file", path],
    "distill": lambda path, work: ["distill", path, *DIGITS],
    "distill --key-file": lambda path, work: ["distill", work / BOX, *DIGITS, "--key-file", path],
    "distill parquet": lambda path, work: [
        "distill",
        work / "teacher.pt",
        "--arch",
        "cnn",
        "--data",
        f"parquet:{path}",
    ],
    "distill npz": lambda path, work: ["distill", work / "teacher.pt", "--arch", "cnn", "--data", f"npz:{path}"],
    "eval": lambda path, work: ["eval", path, *DIGITS],
    "eval --key-file": lambda path, work: ["eval", work / BOX, *DIGITS, "--key-file", path],
    "eval --original": lambda path, work: ["eval", work / BOX, *DIGITS, "--original", path],
    "eval --reference": lambda path, work: ["eval", work / BOX, *DIGITS, "--reference", path],
    "eval --surrogate": lambda path, work: ["eval", work / BOX, *DIGITS, "--surrogate", f"npz:{path}"],
    "eval --gate": lambda path, work: ["eval", work / BOX, *DIGITS, "--gate", path],
    "report": lambda path, work: ["report", path],
    "report --baseline": lambda path, work: ["report", REPORT, "--baseline", path],
    "report --gate": lambda path, work: ["report", REPORT, "--gate", path],
    "sweep": lambda path, work: ["sweep", path, "--key-file", work / KEY, *DIGITS, *HIDES],
    "sweep --key-file": lambda path, work: ["sweep", work / TEACHER, "--key-file", path, *DIGITS, *HIDES],
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("command", COMMANDS)
def test_broken_files(command, kind, work, tmp_path):
    content, words = BROKEN[kind]
    for suffix in (".file", ".onnx") if command in ("distill", "eval", "inspect") else (".file",):
        path = tmp_path / f"in{suffix}"
        if content is not None:
            path.write_bytes(content)
            path.chmod(0o600)
        check(run_cli(*COMMANDS[command](path, work), cwd=tmp_path), 4, words)
    assert {p.stem for p in tmp_path.iterdir()} <= {"in"}


@pytest.mark.parametrize("kind", [kind for kind in BROKEN if kind not in ("missing", "empty")])
def test_settings_that_are_none(kind, tmp_path):
    (tmp_path / "sdbctl.toml").write_bytes(BROKEN[kind][0])
    result = run_cli("list", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (4, b"")
    assert b"sdbctl.toml is not TOML" in result.stderr or b"sdbctl.toml is not text" in result.stderr


@pytest.mark.parametrize("text", ["seed = " + "9" * 5000, "x = " + "[" * 5000])
def test_settings_that_no_parser_likes(text, tmp_path):
    (tmp_path / "sdbctl.toml").write_text(text)
    assert run_cli("list", cwd=tmp_path).returncode == 4


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors", ".pt"])
def test_truncated_models(suffix, work, tmp_path):
    source = work / ("teacher.pt" if suffix == ".pt" else f"boxed{suffix}")
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(source.read_bytes()[: source.stat().st_size * 2 // 3])
    check(run_cli("distill", path, "--data", "digits", cwd=tmp_path), 4, f"cut{suffix}")


def test_a_malicious_pickle_is_refused_and_nothing_runs(work, tmp_path):
    path = tmp_path / "evil.pt"
    torch.save({"state_dict": Evil(tmp_path / MARK)}, path)
    check(run_cli(*COMMANDS["box"](path, work), cwd=tmp_path), 4, "would run", "--trust")
    path.write_bytes(pickle.dumps(Evil(tmp_path / MARK)))
    check(run_cli(*COMMANDS["box"](path, work), cwd=tmp_path), 4)
    assert not (tmp_path / MARK).exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_and_pt2_are_refused(work, tmp_path):
    from sdbctl import models

    net = models.build("cnn-tiny", 10, 1).eval()
    path = tmp_path / "script.pt"
    torch.jit.trace(net, torch.zeros(1, 1, 8, 8)).save(path)
    check(run_cli("inspect", path), 4, "TorchScript", "--trust")
    path = tmp_path / "program.pt2"
    torch.export.save(torch.export.export(net, (torch.zeros(2, 1, 8, 8),)), path)
    check(run_cli("inspect", path), 4, ".pt2", "--trust")


def test_a_pt2_with_a_pickle_inside_runs_nothing(tmp_path):
    path = tmp_path / "evil.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/archive_format", "pt2")
        archive.writestr("archive/data/weights/model.pt", pickle.dumps(Evil(tmp_path / MARK)))
    check(run_cli("inspect", path), 4)
    assert not (tmp_path / MARK).exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [(bytes(range(31)), "31 bytes"), (bytes(range(33)), "33 bytes"), (b"", "0 bytes"), (b"\7" * 32, "constant")],
)
def test_bad_keys(content, words, work, tmp_path):
    path = tmp_path / "k.bin"
    path.write_bytes(content)
    path.chmod(0o600)
    last = check(run_cli("inspect", work / "boxed.safetensors", "--key-file", path), 4, words)
    assert not content or content.hex() not in last


def test_a_key_that_others_can_read(work, tmp_path):
    path = tmp_path / "k.bin"
    shutil.copy(work / "k.bin", path)
    path.chmod(0o644)
    check(run_cli("inspect", work / "boxed.safetensors", "--key-file", path), 4, "chmod 600")
    result = run_cli("inspect", work / "boxed.safetensors", "--key-file", path, "--insecure-key-file")
    assert result.returncode == 0
    assert b"other users" in result.stderr


def test_a_key_from_standard_input(work):
    content = (work / "k.bin").read_bytes()
    result = run_cli("inspect", work / "boxed.safetensors", "--key-file", "-", stdin=content)
    assert result.returncode == 0
    assert b"fits" in result.stdout
    check(run_cli("inspect", work / "boxed.safetensors", "--key-file", "-", stdin=content[:5]), 4, "5 bytes")


def test_a_wrong_key_is_refused(work, tmp_path):
    for box in ("boxed.safetensors", "boxed.onnx"):
        check(run_cli("distill", work / box, "--key-file", work / "other.bin", cwd=tmp_path), 4, "does not fit")
    check(run_cli("distill", work / "teacher.safetensors", "--key-file", work / "k.bin", cwd=tmp_path), 4, "key")


def graph(inputs, batch="batch", classes=10):
    names = [f"input{i}" for i in range(inputs)]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [batch, 1, 8, 8]) for n in names]
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, classes])
    weight = helper.make_tensor("w", TensorProto.FLOAT, [64, classes], np.ones(64 * classes, np.float32))
    nodes = [
        helper.make_node("Flatten", [names[0]], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["logits"]),
    ]
    made = helper.make_graph(nodes, "g", values, [output], [weight])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def test_unusable_onnx(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(graph(2), path)
    check(run_cli("distill", path, "--data", "digits", cwd=tmp_path), 4, "2 inputs")
    onnx.save(graph(1, batch=1), path)
    check(run_cli("distill", path, "--data", "digits", cwd=tmp_path), 4, "fixed batch size of 1")
    onnx.save(graph(1), path)
    check(run_cli("distill", path, "--data", "digits", cwd=tmp_path), 2, "--normalize")
    check(run_cli("eval", path, "--data", "digits", cwd=tmp_path), 2, "--normalize", "guessing", "none")
    model = graph(1)
    model.graph.initializer[0].float_data[3] = float("nan")
    onnx.save(model, path)
    check(run_cli("inspect", path), 4, "w in", "NaN")
    onnx.save(graph(1, classes=7), path)
    check(run_cli("distill", path, "--data", "digits", "--normalize", "half", cwd=tmp_path), 2, "7 classes")


def damaged(change):
    """A graph whose only weight is changed."""
    model = graph(1)
    change(model.graph.initializer[0])
    return model


def absurd(height, classes):
    """A graph that takes images of any size and answers for any number of classes."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Expand", ["flat", "shape"], ["logits"]),
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", ["batch", 1, height, 8]), ("logits", ["batch", classes]))
    ]
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [1, classes])
    made = helper.make_graph(nodes, "g", values[:1], values[1:], [shape])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def external(tensor):
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "w", "offset": "0", "length": "0"}.items():
        tensor.external_data.add(key=key, value=value)


def infinite(tensor):
    tensor.float_data[3] = float("inf")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (damaged(lambda tensor: tensor.dims.insert(0, 10**12)), "weights"),
        (damaged(lambda tensor: setattr(tensor, "raw_data", b"abc")), "weights"),
        (damaged(external), "weights"),
        (damaged(infinite), "no number"),
        (absurd(10**9, 10), "1x1000000000x8"),
        (absurd(0, 10), "1x0x8"),
        (absurd(8, 10**12), "output classes"),
    ],
)
def test_absurd_onnx(model, words, tmp_path):
    (tmp_path / "w").touch()
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    check(run_cli("inspect", tmp_path / "m.onnx"), 4, words)


def test_onnx_weights_outside_the_folder(tmp_path):
    model = graph(1)
    tensor = model.graph.initializer[0]
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    check(run_cli("distill", path, "--data", "digits", cwd=tmp_path), 4, "../../etc/passwd")


def test_nan_weights(work, tmp_path):
    state = load_file(work / "teacher.safetensors")
    name = next(name for name, tensor in state.items() if tensor.ndim == 4)
    state[name][0, 0, 0, 0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    check(run_cli(*COMMANDS["box"](tmp_path / "nan.safetensors", work)), 4, "NaN", name)


def npz(path, classes=10, size=8, channels=1):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (200, size, size, channels), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(200) % classes)
    return f"npz:{path}"


def test_data_that_does_not_fit_the_checkpoint(work, tmp_path):
    box = [*CONCEAL, work / "teacher.safetensors", "--key-file", work / "k.bin", "-o", tmp_path / "b.safetensors"]
    check(run_cli(*box, "--data", npz(tmp_path / "a.npz", classes=7)), 2, "10 classes", "7")
    check(run_cli(*box, "--data", npz(tmp_path / "b.npz")), 4, "not clearly better than guessing")
    distill = ["distill", work / "boxed.onnx", "--data", npz(tmp_path / "c.npz", size=12), "--image-size", "12"]
    check(run_cli(*distill, cwd=tmp_path), 2, "(1, 8, 8)")
    assert {p.suffix for p in tmp_path.iterdir()} == {".npz"}


def named_folder(folder, names):
    """An image of the colour n and its neighbours for class n."""
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for copy in range(12 if name != "none" else 0):
            pixels = np.full((8, 8), 40 * number + copy, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{copy}.png")
    return f"folder:{folder}"


def test_classes_count_in_the_order_of_the_model(tmp_path, capsys):
    from sdbctl.cli.common import check_classes, open_data

    model = SimpleNamespace(classes=("dog", "ant", "cat"))
    found = open_data(named_folder(tmp_path / "a", ("ant", "cat", "dog")), tmp_path)
    same = check_classes(found, 3, model, "m")
    assert same.classes == model.classes and same.fingerprint != found.fingerprint
    brightness = [float(same.train.pixels[same.train.labels == label].float().mean()) for label in range(3)]
    assert brightness[1] < brightness[2] < brightness[0], "ant, cat, dog"
    assert "in another order" in " ".join(capsys.readouterr().err.split())
    assert data.same_images(same, found)
    # sorted as text
    numbers = replace(found, classes=("1", "10", "2"))
    assert check_classes(numbers, 3, SimpleNamespace(classes=("1", "2", "10")), "m").classes == ("1", "2", "10")
    other = open_data(named_folder(tmp_path / "b", ("ant", "bee", "none")), tmp_path)
    assert "no training image is of class none" in capsys.readouterr().err
    assert not data.same_images(other, found)
    with pytest.raises(UsageError, match="class 0 of m is 'dog', of the data set b 'ant'"):
        check_classes(other, 3, model, "m")
    for names in (("0", "1", "2"), ("Ant", "bee", "NONE")):
        assert check_classes(other, 3, SimpleNamespace(classes=names), "m") is other
    assert check_classes(other, 3, None, "m") is other


def test_the_split_is_said_and_that_it_is_small(tmp_path, capsys):
    from sdbctl.cli.common import open_data, split_like

    split_like(open_data(named_folder(tmp_path / "a", ("ant", "cat")), tmp_path), None)
    said = capsys.readouterr().err
    assert "split: 14 owner, 4 transfer, 2 validation, 4 test images" in said.replace("\n", " ")
    assert "one of 2 validation images is 50.0 points" in said and "one of 4 test images is 25.0" in said


def test_a_key_is_no_model(work):
    shown = run_cli("inspect", work / "k.bin", "--json")
    assert json.loads(shown.stdout) == {"file": "k.bin", "format": "key", "id": Key.load(work / "k.bin").id}
    assert b"--key-file" in run_cli("inspect", work / "k.bin").stdout


def test_the_normalisation_of_an_onnx_of_somebody_else_is_found(work, tmp_path):
    model = onnx.load(work / "boxed.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "m.onnx")
    made = run_cli("eval", tmp_path / "m.onnx", "--data", "digits", "--report", tmp_path / "r", "--json")
    assert made.returncode == 0 and b"normalisation, by accuracy: " in made.stderr, made.stderr
    assert json.loads(made.stdout)["models"]["boxed"]["top1"] > 90
    shown = " ".join(run_cli("eval", "--help").stdout.decode().replace("│", " ").split())
    assert all(f"{name}," in shown or f"{name} (" in shown for name in PRESETS)


def test_partners_learn_from_all_that_they_have(work, tmp_path):
    common = (
        "distill",
        work / "boxed.safetensors",
        "--key-file",
        work / "k.bin",
        "--student",
        "cnn-tiny",
        "--epochs",
        1,
    )
    common = (*common, "--precision", "fp32", "-o", tmp_path / "s.safetensors", "--force", "--json")
    other = ("--data", npz(tmp_path / "a.npz"))
    made = run_cli(*common, *other)
    said = made.stderr.decode()
    assert "split: 112 owner, 32 transfer, 16 validation, 40 test images" in said
    assert "the student learns from 32 of the images" in said
    most = int(said.partition("--transfer-size may be up to ")[2].split()[0])
    assert most == 143 and json.loads(made.stdout)["queries"] == 32
    more = run_cli(*common, *other, "--transfer-size", most)
    assert json.loads(more.stdout)["queries"] == most and b"--transfer-size" not in more.stderr
    assert run_cli(*common, *other, "--transfer-size", most + 1).returncode == 2
    # of the box maker's data the others are those that it was made with
    assert b"--transfer-size" not in run_cli(*common, "--data", "digits", "--dry-run").stderr


def test_a_teacher_that_guesses_is_said(work, tmp_path):
    common = ("--data", npz(tmp_path / "a.npz"), "--precision", "fp32")
    small = ("--student", "cnn-tiny", "--epochs", 1, "-o", tmp_path / "s.safetensors")
    said = run_cli("distill", work / "teacher.safetensors", *common, *small)
    assert b"not clearly better than guessing" in said.stderr
    made = run_cli("eval", work / "teacher.safetensors", *common, "--report", tmp_path / "r", "--json")
    notes = " ".join(json.loads(made.stdout)["notes"])
    assert "not clearly better than guessing" in notes and "splits may overlap" in notes


def test_unknown_names(work, tmp_path):
    check(run_cli("distill", work / "boxed.onnx", "--student", "wrn17", cwd=tmp_path), 2, "did you mean wrn16")
    check(run_cli("distill", work / "boxed.onnx", "--data", "digit", cwd=tmp_path), 2, "did you mean digits")
    check(run_cli("train", "--data", "digits", "--arch", "wrn-17-2", cwd=tmp_path), 2, "6n + 4")
    check(run_cli("list", "nonsense"), 2, "objectives")
    box = [*CONCEAL, work / "teacher.safetensors", "--key-file", work / "k.bin", "-o", tmp_path / "b.safetensors"]
    check(run_cli(*box, "--objective", "magic"), 2, "conceal")
    check(run_cli(*box, "--set", "hyde=1"), 2, "hide")
    check(run_cli(*box, "--set", "hide"), 2, "NAME=NUMBER")
    check(run_cli(*box, "--preset", "none"), 2, "default")
    check(run_cli(*box, "--normalize", "imagnet"), 2, "half")
    for device in ("tpu", "cpu:0", "cuda:x", "cuda:", "cuda:01", "cuda:٠"):
        check(run_cli(*box, "--device", device), 2, "auto, cpu or cuda")
    check(run_cli(*box, "--epochs", "1", "--strength", "1.5"), 2, "between 0 and 1")


def test_a_box_is_asked_with_the_normalisation_it_was_boxed_with(work, tmp_path):
    for command in ("distill", "eval"):
        wrong = run_cli(command, work / "boxed.onnx", "--normalize", "none", cwd=tmp_path)
        check(wrong, 2, "boxed with another normalisation", "leave --normalize out")
    planned = run_cli("distill", work / "boxed.onnx", "--normalize", "half", "--dry-run", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr.decode()


def test_one_image_is_nothing_to_train_on(tmp_path):
    train = ("train", "--arch", "cnn-tiny", "--data", "digits", "--owner-size", 1, "-o", tmp_path / "x.safetensors")
    check(run_cli(*train), 2, "too little to train on: 1 image", "at least 2")
    assert parts(tmp_path) == [] and not (tmp_path / "x.safetensors").exists()


def test_names_that_are_no_text_are_shown_all_the_same(work, tmp_path):
    loaded = boxfile.load(work / "teacher.safetensors")
    names = ("\ud800", "\x9b31m", *loaded.meta.classes[2:])
    boxfile.save(tmp_path / "x.safetensors", loaded.net.state_dict(), replace(loaded.meta, classes=names))
    shown = run_cli("inspect", tmp_path / "x.safetensors", "--json")
    assert shown.returncode == 0 and b"\\ud800" in shown.stdout and b"\x9b" not in shown.stdout


def test_usage_errors_exit_with_2(work):
    assert run_cli("box").returncode == 2
    assert run_cli("nonsense").returncode == 2
    assert run_cli("box", "x", "--epochs", "many", "--key-file", "k").returncode == 2


def test_what_would_do_nothing_is_refused(work, tmp_path):
    graph, key, box = work / "boxed.onnx", work / KEY, work / "boxed.safetensors"
    twice = ("--key-file", key, "--key-file", work / "other.bin")
    for command in (("inspect", box), ("distill", box, *DIGITS), ("eval", box, *DIGITS), ("sweep", work / TEACHER)):
        check(run_cli(*command, *twice), 2, "give --key-file once")
    check(run_cli("keygen", "-"), 2, "name a file")
    check(run_cli("inspect", graph, "--arch", "resnet8"), 2, "leave --arch out")
    check(run_cli("distill", graph, *DIGITS, "--arch", "resnet8"), 2, "leave --arch out")
    check(run_cli("train", "--arch", "cnn-tiny", *DIGITS, "--normalize", "imagenet"), 2, "with 1 channel")
    check(run_cli("sweep", work / TEACHER, "--key-file", key, "--objective", "nope"), 2, "unknown objective nope")


def test_existing_output_is_kept_without_force(work, tmp_path):
    path = tmp_path / "out.onnx"
    path.write_text("precious")
    check(run_cli("export", work / "boxed.safetensors", "-o", path), 2, "--force")
    check(run_cli("keygen", path), 2, "--force")
    assert path.read_text() == "precious"
    assert run_cli("export", work / "boxed.safetensors", "-o", path, "--force").returncode == 0
    assert path.stat().st_size > 10_000


def test_no_command_replaces_what_is_there(work, tmp_path):
    output, trace = tmp_path / "x.safetensors", tmp_path / "trace.json"
    for path in (output, trace):
        path.write_text("precious")
    for command in ([*CONCEAL, work / TEACHER, "--key-file", work / KEY], ["distill", work / BOX], ["train"]):
        check(run_cli(*command, *DIGITS, "-o", output), 2, "x.safetensors already exists", "--force")
        other = tmp_path / "y.safetensors"
        check(run_cli(*command, *DIGITS, "-o", other, "--profile", trace), 2, "trace.json already exists")
    assert {path.read_text() for path in tmp_path.iterdir()} == {"precious"}
    original = shutil.copy(work / TEACHER, tmp_path / "t.safetensors")
    box = [*CONCEAL, original, "--key-file", work / KEY, *DIGITS, "--force"]
    check(run_cli(*box, "-o", original), 2, "three files")
    check(run_cli(*box, "--reference", original), 2, "three files")


def test_two_runs_do_not_write_the_same_file(work, tmp_path):
    output = tmp_path / "x.safetensors"
    commands = ([*CONCEAL, work / TEACHER, "--key-file", work / KEY], ["distill", work / BOX], ["train"])
    for command in commands:
        with files.alone(output):
            check(run_cli(*command, *DIGITS, "-o", output, "--force"), 2, "another run is writing", "x.safetensors")
        assert run_cli(*command, *DIGITS, "-o", output, "--dry-run").returncode == 0
    assert not list(tmp_path.iterdir())


def test_only_the_first_of_several_processes_holds_the_output(monkeypatch, tmp_path):
    monkeypatch.setattr(team, "_several", True)
    with files.alone(tmp_path / "x"):
        for name, sign in (("RANK", "TORCHELASTIC_RUN_ID"), ("SLURM_PROCID", "SLURM_NTASKS"), ("LOCAL_RANK", "_")):
            with monkeypatch.context() as other:
                other.setenv(name, "1")
                other.setenv(sign, "2")
                with files.alone(tmp_path / "x"):
                    pass


def test_two_outputs_are_two_files(work, tmp_path):
    output = tmp_path / "x.safetensors"
    box = [*CONCEAL, work / TEACHER, "--key-file", work / KEY]
    for command in (box, ["distill", work / BOX], ["train"]):
        for profile in ("x.safetensors", "./.x.resume" if command[0] != "box" else "x.reference.safetensors"):
            args = (*command, *DIGITS, "-o", output, "--force", "--profile", tmp_path / profile)
            check(run_cli(*args), 2, Path(profile).name, "two files")
    for kept in (TEACHER, KEY):
        check(run_cli(*box, *DIGITS, "-o", output, "--force", "--profile", work / kept), 2, kept, "two files")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_paths_without_a_name(path, work, tmp_path):
    for command in (["keygen", path, "--force"], ["export", path], [*CONCEAL, path, "--key-file", work / KEY, *DIGITS]):
        check(run_cli(*command, cwd=tmp_path), 2, "no name of a file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_may_never_end_is_not_read(work, tmp_path):
    for name in ("pipe", "pipe.onnx"):
        os.mkfifo(tmp_path / name)
        check(run_cli("inspect", tmp_path / name), 4, "device or a pipe")
    check(run_cli("inspect", work / BOX, "--key-file", "/dev/zero"), 4, "at least 33 bytes")
    check(run_cli("inspect", work / BOX, "--key-file", "-", stdin=b"x" * 99), 4, "at least 33 bytes")


def test_outputs_that_cannot_be_written(work, tmp_path):
    check(run_cli("export", work / "boxed.safetensors", "-o", tmp_path / "no" / "x.onnx"), 6, "does not exist")
    check(run_cli("keygen", tmp_path / "no" / "k.bin"), 6, "cannot write")
    check(run_cli("demo", "-o", work / "k.bin" / "x"), 6, "cannot make folder")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that not even root can write to")
def test_a_folder_that_cannot_be_written_to(work):
    for command in (["export", work / BOX, "-o", "/proc/x.onnx"], ["distill", work / BOX, "-o", "/proc/x.safetensors"]):
        check(run_cli(*command), 6, "cannot write to folder /proc")


@contextlib.contextmanager
def full_disk(size):
    """Files of this process end at so many bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(work, tmp_path):
    quick = ("--precision", "fp32", "--epochs", "1", "--transfer-size", "64")
    made = {
        "x.safetensors": ["train", "--arch", "cnn-tiny", *DIGITS, "--precision", "fp32", "--epochs", "1"],
        "y.safetensors": ["distill", work / BOX, "--student", "cnn-tiny", *DIGITS, *quick],
        "z.onnx": ["export", work / BOX],
    }
    for name, command in made.items():
        with full_disk(5000):
            result = run_cli(*command, "-o", tmp_path / name)
        check(result, 6, "space")
    assert not list(tmp_path.iterdir())


def test_cuda_without_a_gpu(work, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    check(run_cli("distill", work / "boxed.onnx", "--device", "cuda", cwd=tmp_path), 6, "no GPU")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_box_run_leaves_nothing_half_written_and_resumes(stop, work, tmp_path):
    original = work / "teacher.safetensors"
    before = original.read_bytes()
    output = tmp_path / "b.safetensors"
    args = [*CONCEAL, original, "--key-file", work / "k.bin", "-o", output, "--no-seal", "--precision", "fp32"]
    args += ["--epochs", "15"]
    command = [sys.executable, "-c", "from sdbctl.cli import main; main()", *map(str, args)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.time() + 300
    # a kill is to leave the reference unfinished, other stops may come later on a busy machine
    state = ".b.reference.resume" if stop == signal.SIGKILL else ".b.*.resume"
    while not list(tmp_path.glob(state)) and time.time() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.glob(state))
    process.send_signal(stop)
    _, err = process.communicate(timeout=300)
    assert not output.exists()
    assert original.read_bytes() == before
    if stop != signal.SIGKILL:
        assert process.returncode == 130, err.decode()
        assert b"Traceback" not in err
        assert b"interrupted; --resume goes on" in err.splitlines()[-1]
        assert not [p for p in tmp_path.iterdir() if p.suffix == ".part"]
        return
    assert process.returncode == -signal.SIGKILL
    check(run_cli(*args), 2, "an interrupted run left", "--resume goes on, --force starts again")
    check(run_cli(*args[:-1], "3", "--resume"), 4, "other settings")
    result = run_cli(*args, "--resume")
    assert result.returncode == 0, result.stderr.decode()
    assert b"resumed reference after epoch" in result.stderr
    left = {p.name for p in tmp_path.iterdir() if p.suffix != ".part"}
    assert left == {"b.reference.safetensors", "b.safetensors"}


def test_a_killed_box_whose_key_opens_an_assistant_goes_on(work, tmp_path):
    output, chosen = tmp_path / "b.safetensors", tmp_path / "a.reference.safetensors"
    common = [*CONCEAL, work / "teacher.safetensors", "--key-file", work / "k.bin", "--owner-size", 100]
    made = run_cli(*common, "-o", tmp_path / "a.safetensors", "--epochs", 1, "--teacher", "reference", "--no-seal")
    assert made.returncode == 0, made.stderr.decode()
    common += ["--reference", chosen, "--teacher", "assistant", "--seal"]
    args = [*common, "-o", output, "--epochs", 100]
    command = [sys.executable, "-c", "from sdbctl.cli import main; main()", *map(str, args)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while not (tmp_path / ".b.box.resume").exists() and time.time() < deadline:
        time.sleep(0.05)
    assert (tmp_path / ".b.box.resume").exists()
    process.kill()
    process.wait()
    assert not output.exists()
    result = run_cli(*args, "--resume")
    assert result.returncode == 0, result.stderr.decode()
    assert b"resumed box after epoch" in result.stderr
    # what was taught before is used again
    assert b"resnet8" not in result.stderr, result.stderr.decode()
    boxed = boxfile.load_box(output)
    assert boxed.meta.parameters["teacher"] == "assistant"
    assert boxed.meta.parameters["assistant"] == digest(boxed.unseal(Key.load(work / "k.bin"))[0])
    assert not list(tmp_path.glob(".b.*"))
    unkeyed = run_cli(*common, "-o", tmp_path / "c.safetensors", "--set", "teach=0")
    check(unkeyed, 2, "no keyed branch", "--teacher")


def test_an_evaluation_that_is_killed_goes_on_to_the_same_students(work, tmp_path):
    args = ["eval", work / "boxed.onnx", "--attack", "--original", work / "teacher.safetensors", "--precision", "fp32"]
    args += ["--key-file", work / "k.bin", "--suite", "quick", "--student", "cnn-tiny", "--epochs", "3", "--jobs", "1"]
    code = "from sdbctl.cli import main; main()"
    killed = [sys.executable, "-c", code, *map(str, args), "--report", str(tmp_path / "killed")]
    process = subprocess.Popen(killed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    cells, deadline = tmp_path / "killed/cells", time.time() + 300
    while not (cells.exists() and len(list(cells.glob("*.json"))) > 2) and time.time() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in cells.glob("*.json")}
    found = []
    for name in ("killed", "whole"):
        assert run_cli(*args, "--report", tmp_path / name).returncode == 0
        students = json.loads((tmp_path / name / "report.json").read_text())["students"]
        found.append({row: (student["values"], student["validations"]) for row, student in students.items()})
    assert found[0] == found[1]
    assert len(list(cells.glob("*.json"))) > len(before) > 2
    # what was finished was not trained again
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


def test_a_bug_is_one_line_with_a_code_of_its_own(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("boom\nsecond line")

    monkeypatch.setattr(Key, "generate", broken)
    result = run_cli("keygen", tmp_path / "k.bin")
    assert result.returncode == 1
    assert b"internal error: RuntimeError: boom" in result.stderr
    assert b"Traceback" not in result.stderr and b"second" not in result.stderr


def test_ctrl_c_that_a_library_made_an_error_of_is_still_ctrl_c(tmp_path, monkeypatch):
    def broken():
        try:
            try:
                raise KeyboardInterrupt
            finally:
                raise AttributeError("half imported")
        except AttributeError as error:
            raise RuntimeError("failed to export") from error

    monkeypatch.setattr(Key, "generate", broken)
    result = run_cli("keygen", tmp_path / "k.bin")
    assert result.returncode == 130 and b"error: interrupted; --force starts again" in result.stderr
    assert b"internal error" not in result.stderr and not list(tmp_path.iterdir())


def test_max_cost(work, tmp_path, monkeypatch):
    from sdbctl.cli import box

    monkeypatch.setattr(box, "DEAR", -100.0)
    shutil.copy(work / "k.bin", tmp_path / "k.bin")
    (tmp_path / "k.bin").chmod(0o644)
    args = [*CONCEAL, work / "teacher.safetensors", "--key-file", tmp_path / "k.bin", "-o", tmp_path / "b.safetensors"]
    options = ["--insecure-key-file", "--no-seal", "--epochs", 1, "--precision", "fp32", "--json"]
    assert run_cli(*args, *options, "--max-cost", 100).returncode == 0
    result = run_cli(*args, *options, "--max-cost", -50, "--force")
    assert result.returncode == 3
    warnings = json.loads(result.stdout)["warnings"]
    assert any("a key of 64 values may be found" in warning for warning in warnings)
    assert "read by other users" in warnings[0] and "points of top-1; train for more --epochs" in warnings[-1]
    assert all(f"warning: {warning}\n".encode() in result.stderr for warning in warnings)
    assert b"more than --max-cost" in result.stderr.splitlines()[-1]
    assert (tmp_path / "b.safetensors").exists()


def test_auxiliary_heads_stay_in_the_file_and_say_nothing(work, tmp_path):
    state, head = load_file(work / TEACHER), {"aux1.fc.weight": torch.ones(10, 4)}
    torch.save(state | head, tmp_path / "t.pt")
    args = [*CONCEAL, tmp_path / "t.pt", "--arch", "cnn", "--key-file", work / KEY, *DIGITS, "--normalize", "half"]
    output = tmp_path / "b.safetensors"
    result = run_cli(*args, "-o", output, "--no-seal", "--epochs", "1", "--precision", "fp32", "--teacher", "reference")
    assert result.returncode == 0, result.stderr.decode()
    boxed, reference = load_file(output), load_file(tmp_path / "b.reference.safetensors")
    assert boxed.keys() == reference.keys() == state.keys() | head.keys()
    assert boxed["aux1.fc.weight"].abs().max() == 0
    assert reference["aux1.fc.weight"].min() == 1
    assert run_cli("inspect", output, "--key-file", work / KEY).returncode == 0


def test_broken_settings(tmp_path):
    (tmp_path / "sdbctl.toml").write_text("[box]\nepoch = 1\n")
    result = run_cli("list", cwd=tmp_path)
    assert result.returncode == 2
    assert b"did you mean epochs" in result.stderr


def test_two_keys_that_are_one(work, tmp_path):
    box = [*CONCEAL, work / "teacher.safetensors", "--data", "digits", "-o", tmp_path / "b.safetensors", "--epochs", 1]
    key = work / "k.bin"
    check(run_cli(*box, "--key-file", key, "--key-file", key), 2, "same key")
    check(run_cli(*box, "--key-file", "-", "--key-file", "-", stdin=key.read_bytes()), 2, "standard input")
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("option", [("--set", "hide=nan"), ("--set", "hide=inf"), ("--max-cost", "nan")])
def test_numbers_that_nothing_can_be_compared_with(option, work, tmp_path):
    box = [*CONCEAL, work / "teacher.safetensors", "--key-file", work / "k.bin", "-o", tmp_path / "b.safetensors"]
    done = run_cli(*box, *option, "--epochs", 1)
    assert done.returncode == 2
    assert option[1].encode() in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option",
    [
        ("--set", "temperature=0"),
        ("--set", "temperature=1e308"),
        ("--set", "hide=-1"),
        ("--objective", "nasty", "--set", "limit=0"),
        ("--lr", "1e308"),
        ("--lr", "nan"),
        ("--batch-size", 10**18),
        ("--batch-size", 10**30),
        ("--epochs", 10**18),
        ("--image-size", 10**5),
    ],
)
def test_numbers_that_nothing_can_be_trained_with(option, work, tmp_path):
    box = [*CONCEAL, work / TEACHER, "--key-file", work / KEY, *DIGITS, "-o", tmp_path / "b.safetensors", "--dry-run"]
    done = run_cli(*box, *option)
    assert done.returncode == 2 and (b"use a number" in done.stderr or option[0].encode() in done.stderr)


def test_memory_that_the_cpu_has_not():
    from sdbctl.cli.output import explained

    for size in ((2**50,), (2**62, 2**62)):
        with pytest.raises(RuntimeError) as raised:
            torch.zeros(*size)
        assert explained(raised.value).exit_code == 6


def test_a_broken_gate_counts_although_nobody_reads_the_output(tmp_path):
    from sdbctl.report import Report

    (tmp_path / "r.json").write_text(Report(title="t" * 200_000, created="", tool="", verdict="").to_json())
    (tmp_path / "g.toml").write_text('[gates]\nrules = ["inference_cost.top1.high <= 0.5"]')
    command = [sys.executable, "-m", "sdbctl", "report", tmp_path / "r.json", "--gate", tmp_path / "g.toml", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert b"gate broken" in process.stderr.read()
    assert process.wait(60) == 3


def test_a_gate_with_a_slip_of_the_pen_is_refused_before_any_work(work, tmp_path):
    (tmp_path / "g.toml").write_text('[gates]\nrules = ["inference_cost.top1.hihg <= 0.5"]')
    result = run_cli("eval", work / "boxed.onnx", "--data", "digits", "--gate", tmp_path / "g.toml")
    check(result, 2, "inference_cost.top1.hihg", "did you mean inference_cost.top1.high")
    assert b"data:" not in result.stderr
    (tmp_path / "g.toml").write_text('[gates]\nrules = ["students.overherd_key.mean <= 50"]')
    result = run_cli("eval", work / "boxed.onnx", "--data", "digits", "--gate", tmp_path / "g.toml")
    check(result, 2, "students.overherd_key.mean", "did you mean students.overheard_key.mean")
    (tmp_path / "g.toml").write_text('[gates]\nrules = ["students.overheard_key.mean <= 50"]')
    args = ("--gate", tmp_path / "g.toml", "--report", tmp_path / "r")
    result = run_cli("eval", work / "boxed.onnx", "--data", "digits", *args)
    assert result.returncode == 3 and b"gate broken: students.overheard_key.mean" in result.stderr
    assert b"was not measured" in (tmp_path / "r" / "junit.xml").read_bytes()


def test_ranks_in_the_environment_mean_nothing_to_one_process(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    listed = run_cli("list", "objectives").stdout
    assert b"hide=8" in listed and b"sdb:paper" in listed


def test_only_torchrun_says_the_rank_of_all(monkeypatch):
    """Other job managers set one that processes started here inherit."""
    monkeypatch.setattr(team, "_several", True)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert team.rank() == 1
    monkeypatch.setenv("SLURM_PROCID", "2")
    assert team.rank() == 1
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JOB_NAME", "box")
    assert team.rank() == 2
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert team.rank() == 0


def test_a_process_that_waits_for_a_dead_one_ends_with_a_word():
    code = (
        "import subprocess, sys\nfrom sdbctl import team\nteam.PATIENCE = 0\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\nteam._end([child])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30)
    assert ended.returncode == 6 and ended.stderr == b"error: another training process has ended; --resume goes on\n"


def test_a_batch_too_small_for_its_processes(work, tmp_path):
    args = (
        "train",
        "--arch",
        "cnn",
        "--data",
        "digits",
        "--devices",
        8,
        "--batch-size",
        4,
        "-o",
        tmp_path / "x.safetensors",
    )
    check(run_cli(*args), 2, "batch of 4", "8 processes")


def test_torch_files_of_the_old_format_need_trust_for_more_than_tensors(work, tmp_path):
    import argparse

    state = torch.load(work / "teacher.pt", weights_only=True)["state_dict"]
    path = tmp_path / "old.pth"
    torch.save({"state_dict": state, "args": Evil(tmp_path / MARK)}, path, _use_new_zipfile_serialization=False)
    check(run_cli("inspect", path), 4, "old format", "--trust")
    assert not (tmp_path / MARK).exists()
    torch.save({"state_dict": state, "args": argparse.Namespace(a=1)}, path, _use_new_zipfile_serialization=False)
    assert run_cli("inspect", path, "--trust").returncode == 0


def test_a_network_that_cannot_take_the_images(tmp_path):
    args = ("train", "--arch", "alexnet", "--data", f"npz:{tmp_path / 'x.npz'}", "-o", tmp_path / "x.safetensors")
    np.savez(tmp_path / "x.npz", images=np.zeros((40, 32, 32, 3), np.uint8), labels=np.arange(40) % 2)
    check(run_cli(*args), 2, "3x32x32", "--image-size")
    check(run_cli(*args, "--precision", "fp32"), 2, "3x32x32", "--image-size")


def test_a_teacher_that_cannot_take_the_images(tmp_path):
    from sdbctl import models

    path = tmp_path / "rgb.pt"
    torch.save(models.build("cnn-tiny", 10, 3).state_dict(), path)
    for command in (["distill", path], ["eval", path]):
        check(run_cli(*command, *DIGITS, "--precision", "fp32", cwd=tmp_path), 2, "1x8x8", "--image-size")
    check(run_cli(*COMMANDS["box"](path, tmp_path)), 4, "k.bin")


def test_networks_that_cannot_be_compared(work, tmp_path):
    from sdbctl import models

    for classes, channels, words in ((7, 1, "7 classes"), (10, 3, "3 channels")):
        path = tmp_path / f"{classes}.pt"
        torch.save(models.build("cnn", classes, channels).state_dict(), path)
        check(run_cli("eval", work / BOX, *DIGITS, "--original", path, "--arch", "cnn"), 4, words)


def test_names_from_a_file_neither_mark_up_nor_control_the_terminal(work, tmp_path):
    loaded = boxfile.load(work / "boxed.safetensors")
    names = ("[/x]", "[bold]b", "\x1b]0;owned\x07", *map(str, range(7)))
    boxfile.save(tmp_path / "x.safetensors", loaded.net.state_dict(), replace(loaded.meta, classes=names))
    shown = run_cli("inspect", tmp_path / "x.safetensors").stdout.decode()
    assert "[/x], [bold]b, ]0;owned" in shown
    assert "\x1b" not in shown
    assert "[none, labels]" in run_cli("list", "attacks").stdout.decode()


@pytest.mark.parametrize("change", [{"measured": {"top1": float("nan")}}, {"architecture": "nope"}])
def test_damaged_metadata(change, work, tmp_path):
    import json

    from safetensors.torch import save_file as write

    meta = {**json.loads(boxfile.load(work / "boxed.safetensors").meta.to_json()), **change}
    write(load_file(work / "boxed.safetensors"), tmp_path / "x.safetensors", {"sdbctl": json.dumps(meta)})
    check(run_cli("inspect", tmp_path / "x.safetensors"), 4, "x.safetensors")


@pytest.mark.parametrize("change", [{"classes": ["ant", "bee"]}, {"preprocess": ((0.5,), (0.5,), (1, 9, 9))}])
@pytest.mark.parametrize("command", ["eval", "distill"])
def test_onnx_metadata_of_another_network(command, change, work, tmp_path):
    model = onnx.load(work / "boxed.onnx")
    said = {entry.key: entry for entry in model.metadata_props}["sdbctl"]
    values = json.loads(said.value)
    if "preprocess" in change:
        change = {"preprocess": dict(zip(("mean", "std", "size"), change["preprocess"], strict=True))}
    said.value = json.dumps(values | change)
    onnx.save(model, tmp_path / "m.onnx")
    check(run_cli(command, tmp_path / "m.onnx", "--data", "digits", "--dry-run"), 4, "m.onnx", "another network")


@pytest.mark.parametrize("flat", ["lots", None])
def test_a_box_that_does_not_say_what_is_flat(flat, work, tmp_path):
    loaded = boxfile.load(work / "boxed.safetensors")
    measured = {**loaded.meta.measured, "class_confidences": [0.5] * 10, "confidence_cut": 0.5}
    measured |= {"rough_confidences": [0.5, 0.9], "flat_deviation": 0.5, "keyed_flat": flat}
    boxfile.save(tmp_path / "x.safetensors", loaded.net.state_dict(), replace(loaded.meta, measured=measured))
    check(run_cli("export", tmp_path / "x.safetensors"), 4, "how confident")


def test_an_onnx_graph_with_a_fixed_batch_inside(work, tmp_path):
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [1, 64])
    nodes = [
        helper.make_node("Reshape", ["input", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["logits"]),
    ]
    weights = helper.make_tensor("w", TensorProto.FLOAT, [64, 10], np.zeros(640, np.float32))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [shape, weights],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    args = ("distill", tmp_path / "m.onnx", "--data", "digits", "--normalize", "half", "-o", tmp_path / "s.safetensors")
    check(run_cli(*args), 4, "ONNX model fails", "free batch size")


def test_parquet_images_are_bytes_and_start_no_program(work, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    args = ("distill", work / "teacher.pt", "--arch", "cnn", "--data")
    text = pa.array([{"bytes": "/etc/passwd"}] * 30, pa.struct([("bytes", pa.string())]))
    pq.write_table(pa.table({"image": text, "label": [n % 10 for n in range(30)]}), tmp_path / "a.parquet")
    check(run_cli(*args, f"parquet:{tmp_path / 'a.parquet'}"), 4, "a.parquet has columns")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    rows = pa.array([{"bytes": eps}] * 30, pa.struct([("bytes", pa.binary())]))
    pq.write_table(pa.table({"image": rows, "label": [n % 10 for n in range(30)]}), tmp_path / "b.parquet")
    check(run_cli(*args, f"parquet:{tmp_path / 'b.parquet'}"), 4, "image 0", "cannot identify")


def test_demo_replaces_nothing(tmp_path):
    (tmp_path / "boxed.onnx").write_text("mine")
    check(run_cli("demo", "-o", tmp_path), 2, "boxed.onnx already exists")
    assert (tmp_path / "boxed.onnx").read_text() == "mine"


def test_a_box_is_not_boxed_again(work, tmp_path):
    args = ("--key-file", work / "other.bin", "--data", "digits", "-o", tmp_path / "b.safetensors")
    check(run_cli("box", work / "boxed.safetensors", *args), 4, "is a box already", "give the original")


def test_names_that_do_not_fit_what_is_written_or_read(work, tmp_path):
    check(run_cli("export", work / "boxed.safetensors", "-o", tmp_path / "x.safetensors"), 2, "is not named .onnx")
    check(run_cli("export", work / "boxed.onnx", "-o", tmp_path / "x.onnx"), 4, "is an ONNX file")
    check(run_cli("inspect", work / "boxed.onnx", "--key-file", work / "boxed.onnx"), 4, "bytes, not 32")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["report", "gate"])
def test_of_a_key_named_by_mistake_nothing_is_shown(command, work, tmp_path):
    # no UTF-8 from its first byte on, which an error of the decoder would show
    key = tmp_path / "sdbctl.toml"
    key.write_bytes(bytes(range(0xF0, 0xD0, -1)))
    asked = {"report": ("report", key), "gate": ("report", REPORT, "--gate", key)}
    last = check(run_cli(*asked[command]), 4, "is not text")
    assert "0xf0" not in last and "byte" not in last


def test_several_machines_need_a_launcher(work, tmp_path, monkeypatch):
    for name in common.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    command = ("train", *DIGITS, "--arch", "cnn-tiny", "--nodes", 2, "-o", tmp_path / "x.safetensors")
    check(run_cli(*command), 2, "needs torchrun or Slurm")
    check(run_cli(*command[:-4], "--strategy", "foo", *command[-2:]), 2, "strategy foo", "ddp")


def test_an_objective_may_name_its_preset(work, tmp_path):
    box = (*CONCEAL, work / TEACHER, "--key-file", work / KEY, *DIGITS, "-o", tmp_path / "x.safetensors")
    check(run_cli(*box, "--objective", "sdb:paper", "--preset", "paper", "--dry-run"), 2, "names a preset already")
    check(run_cli(*box, "--objective", "sdb:nope", "--dry-run"), 2, "unknown sdb preset nope", "paper-100")
    assert run_cli(*box, "--objective", "sdb:paper", "--epochs", 1, "--dry-run").returncode == 0


def test_two_classes_are_refused_before_hours_of_training(tmp_path, work):
    pixels, labels = np.random.default_rng(0).integers(0, 255, (200, 8, 8), dtype=np.uint8), np.arange(200) % 2
    np.savez(tmp_path / "two.npz", x_train=pixels, y_train=labels)
    spec = f"npz:{tmp_path / 'two.npz'}"
    made = run_cli("train", "--arch", "cnn-tiny", "--data", spec, "--epochs", 1, "-o", tmp_path / "t.safetensors")
    assert made.returncode == 0, made.stderr
    check(
        run_cli(*CONCEAL, tmp_path / "t.safetensors", "--key-file", work / KEY, "--data", spec),
        2,
        "of 2 classes conceal has none to hide",
    )


def test_a_dry_run_needs_no_force_and_can_be_read_by_scripts(work, tmp_path):
    output = tmp_path / "x.safetensors"
    output.write_bytes(b"here already")
    box = (*CONCEAL, work / TEACHER, "--key-file", work / KEY, *DIGITS, "-o", output, "--batch-size", 10**6)
    done = run_cli(*box, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["seconds"] == pytest.approx(sum(found["parts"].values())) and found["seconds"] > 0
    # no step of a million images was timed
    assert found["memory_bytes"] < 4 * 2**30
    (tmp_path / "report.json").write_text("here already")
    evaluate = ("eval", work / BOX, *DIGITS, "--report", tmp_path, "--dry-run", "--json")
    planned = json.loads(run_cli(*evaluate, "--attack", "--suite", "quick", "--jobs", 2).stdout)
    assert planned["jobs"] == 2 and planned["students"] >= 10
    assert {path.name for path in tmp_path.iterdir()} == {"x.safetensors", "report.json"}


def test_what_a_suite_does_not_use_is_said(work, tmp_path):
    np.savez(
        tmp_path / "other.npz", x_train=np.zeros((50, 8, 8), np.uint8) + np.arange(50, dtype=np.uint8)[:, None, None]
    )
    suite = ("eval", work / BOX, *DIGITS, "--suite", "quick", "--report", tmp_path / "r", "--dry-run")
    said = run_cli(*suite, "--attack", "--seeds", 3, "--surrogate", f"npz:{tmp_path / 'other.npz'}").stderr
    assert b"suite quick trains 1 student(s) of each row" in said and b"nobody in suite quick asks" in said
    assert b"without --attack no student is trained" in run_cli(*suite).stderr
