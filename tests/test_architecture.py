"""Imports point down only, the package imports cheaply, and the registries are what the CLI offers."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import typer.testing

import sdbctl

ROOT = Path(sdbctl.__file__).parent

# each module may import those on lines below its own, and its own package
LAYERS = [
    {"__main__"},
    {"cli"},
    {"demo", "bench"},
    {"boxing"},
    {"evaluate", "box"},
    {"boxstep"},
    {"protocol"},
    {"curves", "sources"},
    {"workers"},
    {"cells"},
    {"suites"},
    {"distill"},
    {"attacks", "objectives", "report"},
    {"wrappers", "patterns"},
    {"teacher"},
    {"boxfile", "training", "inference"},
    {"timing", "gate"},
    {"updates", "state"},
    {"checkpoint", "data", "models", "onnxfile", "seal"},
    {"losses", "metrics", "key"},
    {"engine"},
    {"files", "batchnorm"},
    {"team"},
    {"errors"},
]
LEVEL = {name: depth for depth, names in enumerate(LAYERS) for name in names}
ALLOWED = {("metrics", "losses")}


def modules():
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sdbctl":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("sdbctl."):
                    yield alias.name.split(".")[1]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for other in imported(path):
        if other not in LEVEL or other == own or (own, other) in ALLOWED:
            continue
        assert LEVEL[other] > LEVEL[own], f"{own} imports {other}"


def test_every_module_has_a_layer():
    assert {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in modules()} <= set(LEVEL)


def test_the_command_line_imports_no_torch():
    code = "import sys, sdbctl.cli; sys.exit(any(m in sys.modules for m in ('torch', 'onnx', 'onnxruntime', 'scipy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_a_shell_completes_is_what_there_is():
    from sdbctl.attacks.soft import METHODS
    from sdbctl.boxstep import TEACHERS
    from sdbctl.cli.listing import TOPICS
    from sdbctl.cli.names import NAMES
    from sdbctl.data import PRESETS
    from sdbctl.engine import Engine
    from sdbctl.gate import KEYED
    from sdbctl.wrappers import CONFIDENCES

    listed = {topic: list(TOPICS[topic]()) for topic in TOPICS if topic != "attacks"}
    listed["students"] = [name for name in listed["students"] if name not in ("wrn-D-K", "…")]
    listed["data"] = [name.removesuffix("PATH") for name in listed["data"]]
    precisions = get_args(get_type_hints(Engine)["precision"])
    others = {"methods": METHODS, "confidences": CONFIDENCES, "normalisations": PRESETS}
    others |= {"keyed": KEYED, "teachers": ("auto", *TEACHERS), "precisions": ("auto", *precisions)}
    assert listed | {kind: list(names) for kind, names in others.items()} == NAMES


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("eval --suite st", ["strong", "standard"]),
        ("sweep x --objective c", ["conceal", "cmim"]),
        ("box x --objective c", ["conceal", "cmim"]),
        ("box x --teacher a", ["auto", "assistant"]),
        ("export x --wrapper uni", ["uniform-nontarget"]),
        ("sweep x --confidence r", ["rough"]),
        ("distill x --student cnn", ["cnn", "cnn-tiny"]),
        ("distill x --method d", ["dkd", "dist"]),
        ("distill x --surrogate n", ["npz:"]),
        ("train --arch vgg11", ["vgg11_cifar"]),
        ("eval --arch vgg11", ["vgg11_cifar"]),
        ("eval --normalize m", ["mnist"]),
        ("bench --precision b", ["bf16"]),
    ],
)
def test_a_shell_completes_values(words, offered):
    from sdbctl import cli

    words = f"sdbctl {words}"
    asked = {"_SDBCTL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    assert typer.testing.CliRunner().invoke(cli.app, [], prog_name="sdbctl", env=asked).stdout.split() == offered


def test_what_objectives_say_of_their_parameters_is_of_parameters_they_have():
    from sdbctl.objectives import OBJECTIVES

    for objective in OBJECTIVES.values():
        assert {objective.keyed, *objective.divisors, *objective.signed} - {None} <= vars(objective.parameters()).keys()


def test_help_says_what_happens_without_an_option():
    """Rich takes what is in brackets for a style, and leaves it out."""
    from sdbctl import cli

    said = {}
    for path in (ROOT / "cli").glob("*.py"):
        for escaped, default in re.findall(r"(\\\\)?\[default: ([a-z]+)", path.read_text()):
            assert escaped, default
            said.setdefault(path.stem, set()).add(default)
    assert said["export"] == {"class", "itself"}
    shown = typer.testing.CliRunner().invoke(cli.app, ["export", "--help"], env={"COLUMNS": "300"}).stdout
    assert all(f"[default: {default}" in shown for default in said["export"])


def test_nobody_imports_click():
    for path in modules():
        assert "import click" not in path.read_text()
