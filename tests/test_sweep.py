"""Several boxes side by side."""

import json

import pytest

from sdbctl.cli.sweep import grid
from sdbctl.errors import UsageError
from tests.conftest import run_cli


def test_a_grid_is_all_combinations():
    assert grid(["hide=1,2", "teach=4"]) == [{"hide": "1", "teach": "4"}, {"hide": "2", "teach": "4"}]


@pytest.mark.parametrize("bad", ["hide", "hide=", "hide=a", "=1", "hide=1,x"])
def test_a_bad_grid_is_refused(bad):
    with pytest.raises(UsageError, match="NAME=NUMBER"):
        grid([bad])


def test_a_sweep_boxes_evaluates_and_goes_on_where_it_stopped(work, tmp_path):
    out = tmp_path / "sweep"
    command = (
        "sweep",
        work / "teacher.safetensors",
        "--key-file",
        work / "k.bin",
        "--set",
        "hide=1,8",
        "--data",
        "digits",
    )
    short = (
        "--epochs",
        2,
        "--student",
        "cnn-tiny",
        "--student-epochs",
        2,
        "--suite",
        "quick",
        "--report",
        out,
        "--json",
    )
    done = run_cli(*command, *short)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result["settings"]) == ["hide=1", "hide=8"]
    for numbers in result["settings"].values():
        assert {"inference_cost.top1.mean", "unauthorized_advantage.api.labelled.mean"} <= set(numbers)
    assert json.loads((out / "sweep.json").read_text()) == result
    page = (out / "sweep.html").read_text()
    assert page.count("<svg") == 2
    assert page.count("hide=8") >= 3
    assert "hide=8" in (out / "sweep.md").read_text()
    references = {(out / f"hide={n}" / "box.reference.safetensors").read_bytes() for n in (1, 8)}
    assert len(references) == 1
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    (out / "hide=8" / "report" / "report.json").unlink()
    again = run_cli(*command, *short)
    assert json.loads(again.stdout)["settings"]["hide=8"].keys() == result["settings"]["hide=8"].keys()
    assert {path: path.stat().st_mtime_ns for path in before} == before
