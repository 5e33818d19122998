"""sdbctl.toml: defaults for options, unknown keys named."""

import os
import sys

import pytest
import typer

from sdbctl import cli
from sdbctl.cli import app
from sdbctl.cli.settings import read_settings
from sdbctl.errors import BadInput, UsageError
from tests.conftest import run_cli

ROOT = typer.main.get_command(app)


def read(tmp_path, text):
    path = tmp_path / "sdbctl.toml"
    path.write_text(text)
    return read_settings(path, ROOT)


def test_a_missing_file_sets_nothing(tmp_path):
    assert read_settings(tmp_path / "sdbctl.toml", ROOT) == {}


def test_common_and_own_keys(tmp_path):
    defaults = read(tmp_path, 'data = "digits"\n[box]\nepochs = 3\nkey-file = "k.bin"\n[eval]\ndata = "cifar10"\n')
    assert defaults["box"] == {"data": "digits", "epochs": 3, "key_file": ["k.bin"]}
    assert defaults["eval"]["data"] == "cifar10"
    assert defaults["train"] == {"data": "digits"}
    assert defaults["keygen"] == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[box]\nepoch = 3", "unknown key epoch; did you mean epochs"),
        ("[bx]\nepochs = 3", "unknown command .bx.; did you mean box"),
        ("dta = 'digits'", "unknown key dta; did you mean data"),
        ("[keygen]\nepochs = 3", "unknown key epochs"),
        ("no-labels = true", "unknown key no-labels; did you mean labels"),
        ("trust = true", "trust is not taken from a file; it must be said on the command line"),
        ("force = true", "force is not taken from a file"),
        ("[keygen]\nforce = true", "force is not taken from a file"),
        ("train = [1]", "train is a command; write its options below .train."),
        ("data = ['digits']", "data is .'digits'.; give one number or text"),
        ("[box]\nepochs = true", "epochs is True; give one number or text"),
        ("download = 1", "download is 1; give true or false"),
        ("[distill]\ninsecure_key_file = true", "insecure_key_file is not taken from a file"),
    ],
)
def test_unknown_keys_name_the_nearest(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        read(tmp_path, text)


def test_one_value_of_an_option_that_may_be_repeated(tmp_path):
    defaults = read(tmp_path, 'key-file = "a.bin"\n[box]\nkey-file = ["a.bin", "b.bin"]\nset = "hide=2"\n')
    assert defaults["box"] == {"key_file": ["a.bin", "b.bin"], "set_": ["hide=2"]}
    assert defaults["distill"] == {"key_file": ["a.bin"]}


def test_broken_toml(tmp_path):
    with pytest.raises(BadInput, match="not TOML"):
        read(tmp_path, "data = ")


def test_of_a_key_named_sdbctl_toml_nothing_is_shown(tmp_path):
    (tmp_path / "sdbctl.toml").write_bytes(bytes(range(0xF0, 0xD0, -1)))
    with pytest.raises(BadInput, match=r"sdbctl.toml is not text; check the path$"):
        read_settings(tmp_path / "sdbctl.toml", ROOT)


def test_a_key_at_the_top_is_each_commands_own_option(tmp_path):
    defaults = read(tmp_path, 'output = "x.safetensors"\nreport = "rep"\n')
    assert {"box", "distill", "export", "train"} <= {name for name, own in defaults.items() if "output" in own}
    # the parameter behind --report has another name here
    assert defaults["report"] == {"folder": "rep"}


def test_a_folder_from_elsewhere_cannot_make_a_checkpoint_run_code(tmp_path):
    (tmp_path / "sdbctl.toml").write_text("trust = true\n")
    result = run_cli("inspect", "x.pth", cwd=tmp_path)
    assert result.returncode == 2
    assert b"trust is not taken from a file" in result.stderr
    assert run_cli("inspect", "--help", cwd=tmp_path).returncode == 0


def test_a_folder_that_cannot_be_searched(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", "sdbctl.toml")

    monkeypatch.setattr(cli, "read_settings", refuse)
    monkeypatch.setattr(sys, "argv", ["sdbctl", "list", "data"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 6
    assert "error: Permission denied (sdbctl.toml)" in capsys.readouterr().err


def test_defaults_that_apply_are_named(tmp_path, capsys):
    (tmp_path / "sdbctl.toml").write_text('data = "digits"\n')
    run_cli("list", "suites", cwd=tmp_path)
    assert not capsys.readouterr().err
    run_cli("train", "--epochs", 0, cwd=tmp_path)
    assert "defaults from sdbctl.toml: data" in capsys.readouterr().err


def test_what_is_set_for_all_commands_is_left_where_it_has_no_meaning(work, tmp_path, capsys):
    (tmp_path / "sdbctl.toml").write_text('image-size = 8\nnormalize = "half"\narch = "cnn"\nformat = "onnx"\n')
    assert (
        run_cli("export", work / "teacher.safetensors", "-o", "x.onnx", "--format", "onnx", cwd=tmp_path).returncode
        == 0
    )
    assert "defaults from sdbctl.toml: arch, image-size, normalize\n" in capsys.readouterr().err
    assert run_cli("inspect", "x.onnx", cwd=tmp_path).returncode == 0
    assert run_cli("inspect", "x.onnx", "--arch", "cnn", cwd=tmp_path).returncode == 2


@pytest.mark.parametrize(
    ("given", "found"), [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)]
)
def test_waiting_threads_sleep_soon_unless_told_otherwise(given, found, monkeypatch, tmp_path):
    # set first, so that what main adds is taken back, too
    monkeypatch.setenv("GOMP_SPINCOUNT", "")
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sdbctl", "--version"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert os.environ.get("GOMP_SPINCOUNT") == found


def test_the_console_script_reads_them(monkeypatch, tmp_path, capsys):
    (tmp_path / "sdbctl.toml").write_text('data = "nope"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sdbctl", "train"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "unknown data nope" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("box x.pt --epochs 0", "error: Invalid value for '--epochs': "),
        ("box", "error: Missing argument 'CHECKPOINT'; "),
        ("eval x.onnx --seed", "error: "),
        ("bxo", "Did you mean 'box'?\n"),
    ],
)
def test_a_command_line_that_cannot_be_read_gets_one_line_as_well(command, said, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sdbctl", *command.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    written = capsys.readouterr().err
    assert ended.value.code == 2 and said in written and len(written.splitlines()) == 1


@pytest.mark.parametrize(("key", "value"), [("epochs", "0"), ("epochs", '"many"'), ("seed", "1.5")])
def test_a_value_that_an_option_cannot_have_names_the_file(key, value, tmp_path):
    with pytest.raises(UsageError, match=rf"sdbctl.toml, \[train\]: {key} is .*(greater than|valid integer|is not)"):
        read(tmp_path, f"[train]\n{key} = {value}\n")


def test_values_that_options_can_have_are_taken(tmp_path):
    text = """
[box]
epochs = 30
max-cost = 1
lr = 0.05
seal = false
data-root = "images"
key-file = ["a.bin", "b.bin"]
[train]
lr = 1
arch = "resnet8"
"""
    found = read(tmp_path, text)
    assert found["box"] == {
        "epochs": 30, "max_cost": 1, "lr": 0.05, "seal": False, "data_root": "images", "key_file": ["a.bin", "b.bin"],
    }  # fmt: skip
    assert found["train"] == {"lr": 1, "arch": "resnet8"}
