"""Several boxes side by side."""

import hashlib
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdbctl import boxfile
from sdbctl.cli.sweep import Row, _check_box, grid, rows_of
from sdbctl.errors import UsageError
from tests.conftest import CONCEAL, run_cli


def test_a_grid_is_all_combinations():
    assert grid(["hide=1,2", "teach=4"]) == [{"hide": "1", "teach": "4"}, {"hide": "2", "teach": "4"}]


@pytest.mark.parametrize("bad", ["hide", "hide=", "hide=a", "=1", "hide=1,x"])
def test_a_bad_grid_is_refused(bad):
    with pytest.raises(UsageError, match="NAME=NUMBER"):
        grid([bad])


def test_rows_are_objectives_with_settings_and_then_wrappers():
    rows = rows_of(["sdb", "sdb:paper"], ["omega=0.1,1"], ["top1"])
    assert [row.name for row in rows] == [
        "sdb, omega=0.1",
        "sdb, omega=1",
        "sdb:paper, omega=0.1",
        "sdb:paper, omega=1",
        "wrapper top1",
    ]
    assert [row.preset for row in rows] == [None, None, "paper", "paper", None]
    assert rows[3].folder == "sdb-paper_omega=1"
    assert [row.name for row in rows_of([], [], ["top1"])] == ["guard", "wrapper top1"]
    # another objective's boxes have other folders, whatever stood beside it
    assert [row.name for row in rows_of(["nasty"], ["omega=1,2"], [])] == ["nasty, omega=1", "nasty, omega=2"]
    rows = rows_of([], [], [], ["class", "exact"])
    assert [(row.name, row.confidence, row.box == rows[0].box) for row in rows] == [
        ("guard, confidence class", "class", True),
        ("guard, confidence exact", "exact", True),
    ]
    for nothing in (([], [], []), (["sdb"], [], []), (["conceal"], ["hide=1"], [])):
        with pytest.raises(UsageError, match="several"):
            rows_of(*nothing)


def test_a_box_of_another_row_is_not_taken(work):
    meta = boxfile.load_box(work / "boxed.safetensors").meta
    same = {name: meta.parameters[name] for name in ("hide", "turn", "confidence", "teach", "blind", "temperature")}
    _check_box(Row("x", meta.objective, None, same), work / "boxed.safetensors")
    for other in (Row("x", "sdb"), Row("x", meta.objective, None, same | {"hide": 0.5})):
        with pytest.raises(UsageError, match="another objective or other parameters"):
            _check_box(other, work / "boxed.safetensors")


@pytest.mark.parametrize(
    "option",
    [
        ("--objective", "nope"),
        ("--objective", "sdb:nope"),
        ("--wrapper", "nope"),
        ("--confidence", "nope", "--confidence", "class"),
        ("--set", "../../nope=1,2"),
        ("--objective", "sdb", "--suite", "nope"),
    ],
)
def test_an_unknown_row_is_refused_before_work_starts(option, work, tmp_path):
    done = run_cli(
        "sweep",
        work / "teacher.safetensors",
        "--key-file",
        work / "k.bin",
        "--objective",
        "conceal",
        *option,
        "--data",
        "digits",
        "--report",
        tmp_path / "out",
    )
    assert done.returncode == 2
    assert b"nope" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_bad_number_or_folder_is_refused_before_work_starts(work, tmp_path):
    bare = ("sweep", work / "teacher.safetensors", "--key-file", work / "k.bin", "--data", "digits")
    done = run_cli(*bare, "--set", "hide=1,2", "--report", tmp_path / "out")
    assert done.returncode == 2 and b"guard has no parameter hide" in done.stderr
    assert b"--objective conceal has it" in done.stderr and not list(tmp_path.iterdir())
    sweep = (*bare, *CONCEAL[1:])
    done = run_cli(*sweep, "--set", "hide=1,2", "--suite", "foreign", "--report", tmp_path / "out")
    assert done.returncode == 2 and b"give --surrogate SPEC" in done.stderr and not list(tmp_path.iterdir())
    for said, *more in ((b"1x8x8 are so small", "sdb"), (b"shows classes only", "sdb", "--confidence", "exact")):
        done = run_cli(*bare, "--objective", "guard", "--objective", *more, "--report", tmp_path / "out")
        assert done.returncode == 2 and said in done.stderr and not list(tmp_path.iterdir())
    done = run_cli(*sweep, "--set", "hide=1,-1", "--report", tmp_path / "out")
    assert done.returncode == 2 and b"hide of conceal is -1" in done.stderr and not list(tmp_path.iterdir())
    for code, said, *options in (
        (2, b"nosuch", "--student", "nosuch"),
        (2, b"unknown objective", "--objective", ":paper"),
        (4, b"does not exist", "--surrogate", f"npz:{tmp_path}/nosuch.npz"),
        (2, b"is the data set itself", "--surrogate", "digits"),
        (2, b"--student-batch-size", "--student-batch-size", 1),
    ):
        done = run_cli(*sweep, "--set", "hide=1,2", *options, "--report", tmp_path / "out")
        assert done.returncode == code and said in done.stderr and not list(tmp_path.iterdir())
    larger = run_cli(*sweep, "--set", "hide=1,2", "--image-size", 16, "--dry-run", "--report", tmp_path / "out")
    assert b"1x16x16" in larger.stderr and not list(tmp_path.iterdir())
    # of any size, as for an evaluation
    np.savez(tmp_path / "foreign.npz", x=np.zeros((50, 20, 20), np.uint8), y=np.arange(50) % 5)
    foreign = (*sweep, "--set", "hide=1,2", "--surrogate", f"npz:{tmp_path}/foreign.npz", "--dry-run")
    assert run_cli(*foreign, "--report", tmp_path / "out").returncode == 0
    (tmp_path / "foreign.npz").unlink()
    (tmp_path / "file").touch()
    done = run_cli(*sweep, "--set", "hide=1,2", "--report", tmp_path / "file")
    assert done.returncode == 2 and b"is a file" in done.stderr


def test_no_row_writes_outside_the_report():
    assert {"/", "."} & set(rows_of(["conceal"], ["../../a=1,2"], [])[0].folder) <= {"."}


FOLDER = "conceal_hide=8_confidence-class"


@pytest.mark.usefixtures("short_trials")
def test_a_sweep_boxes_evaluates_and_goes_on_where_it_stopped(work, tmp_path):
    out, wrapper = tmp_path / "sweep", "wrapper uniform-nontarget"
    usual, exact = "conceal, hide=8, confidence class", "conceal, hide=8, confidence exact"
    command = ("sweep", work / "teacher.safetensors", "--key-file", work / "k.bin", "--data", "digits")
    served = ("--confidence", "class", "--confidence", "exact")
    rows = (*CONCEAL[1:], "--set", "hide=8", *served, "--wrapper", "uniform-nontarget", "--epochs", 2)
    students = ("--student", "cnn-tiny", "--student-epochs", 2, "--suite", "quick")
    short = (*rows, *students, "--report", out, "--json")
    planned = run_cli(*command, *short, "--dry-run")
    assert planned.returncode == 0 and f"3 settings: {usual}; {exact}; {wrapper}".encode() in planned.stderr
    assert b"time estimate" in planned.stderr and not out.exists()
    done = run_cli(*command, *short)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result["settings"]) == [usual, exact, wrapper]
    boxed, shown, wrapped = result["settings"].values()
    for numbers in (boxed, shown, wrapped):
        assert {"inference_cost.top1.mean", "inference_cost.top1.low"} <= set(numbers)
        assert {"unauthorized_advantage.api.labelled.mean", "unauthorized_advantage.api.labelled.n"} <= set(numbers)
    assert boxed["models.original_ft.top1"] == wrapped["models.original_ft.top1"]
    assert wrapped["inference_cost.top1.mean"] == pytest.approx(0, abs=0.01)
    assert "authorized_gain.mean" in boxed and "authorized_gain.mean" not in wrapped
    assert json.loads((out / "sweep.json").read_text()) == result
    page = (out / "sweep.html").read_text()
    assert page.count("<svg") == 3
    assert page.count("hide=8") >= 3
    assert "hide=8" in (out / "sweep.md").read_text()
    # what does not depend on the row; two rows that serve the same have the same students throughout
    assert done.stderr.count(b"students were trained before") == 3
    own, other = (
        boxfile.load_box(out / name / "box.safetensors") for name in (FOLDER, "conceal_hide=8_confidence-exact")
    )
    assert all(torch.equal(a, b) for a, b in zip(own.net.parameters(), other.net.parameters(), strict=True))
    shared = hashlib.sha256((out / "reference.safetensors").read_bytes()).hexdigest()
    assert boxfile.load(out / FOLDER / "box.safetensors").meta.reference_sha256 == shared
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    (out / FOLDER / "report" / "report.json").unlink()
    again = run_cli(*command, *short)
    assert json.loads(again.stdout)["settings"][usual].keys() == boxed.keys()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    other = run_cli(*command, *short, "--seeds", 3)
    assert other.returncode == 2 and b"holds a sweep with other students" in other.stderr
    (out / "run.json").write_text("junk")
    assert run_cli(*command, *short).returncode == 4


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_labels_of_a_plot_keep_apart_in_order(heights):
    from sdbctl.report.plots import _apart

    moved = _apart(sorted(heights), 1 / len(heights))
    gap = min(0.07, 1 / len(heights))
    assert all(second - first > 0.999 * gap for first, second in itertools.pairwise(moved))
    assert -1e-9 <= moved[0] <= moved[-1] <= 1
