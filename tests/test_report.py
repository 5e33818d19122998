"""The report: JSON and its schema, gates, and every renderer, on one realistic report."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from junitparser import JUnitXml
from matplotlib.figure import Figure
from rich.console import Console

import sdbctl.report as module
from sdbctl import evaluate
from sdbctl.errors import BadInput, EnvironmentFailure, UsageError
from sdbctl.report import (
    Advantage,
    Bin,
    Curve,
    InferenceCost,
    Interval,
    Model,
    Point,
    Report,
    Student,
    UnauthorizedAdvantage,
    schema,
)
from sdbctl.report.gates import Gate, GateResult, check, check_names, load_gates, parse_gate
from sdbctl.report.html import html
from sdbctl.report.junit import junit
from sdbctl.report.markdown import markdown
from sdbctl.report.render import FORMATS, write
from sdbctl.report.terminal import comparison, rich_table, tables
from sdbctl.report.view import Column, Table, bounds, compare, number, view
from tests.conftest import run_cli

RESULTS = Path(__file__).parent.parent / "examples" / "results"
SCHEMA = Path(module.__file__).with_name("report.schema.json")
EVIL = "<script>alert(1)</script> | [x](http://evil.example) $a$ \x1b[31m‮ \"'&"


def student(name, label, role, mean, difference=None, n=5, **more) -> Student:
    values = tuple(round(mean + shift, 2) for shift in (-0.31, 0.18, 0.02, 0.27, -0.16)[:n]) if n > 1 else (mean,)
    gap = Interval()
    if difference is not None:
        gap = Interval(difference, difference - 0.3, difference + 0.3, n) if n > 1 else Interval(difference, n=1)
    soft = {} if role == "floor" else {"teacher": "boxed", "temperature": 4, "alpha": 0.9}
    config = {**soft, "epochs": 20}
    return Student(
        name=name,
        label=label,
        role=role,
        mean=mean,
        sd=float(np.std(values, ddof=1)) if n > 1 else None,
        n=n,
        values=values,
        difference=gap,
        **{"config": config, "seconds": 182.4, "queries": 10_000, "validation": mean + 0.4, **more},
    )


def bins(slope: float) -> tuple[Bin, ...]:
    shares = (0.01, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.16, 0.52)
    full = tuple(Bin((i + 1.5) / 10, min(1, (i + 1.5) / 10 * slope), share) for i, share in enumerate(shares))
    return (Bin(None, None, 0.0), *full)


def sample() -> Report:
    """A report as ``sdbctl eval --attack`` would make it."""
    students = [
        student("control", "Best of the floor: label smoothing", "floor", 82.31),
        student("cross_entropy", "Cross-entropy", "floor", 81.72, -0.59, n=1),
        student("label_smoothing", "Label smoothing", "floor", 82.26, -0.05, n=1),
        student("class_constant", "Class-constant outputs", "floor", 82.02, -0.29, n=1),
        student("hard_label", "Top-1 only", "floor", 81.95, -0.36, n=1),
        student("kd_original", "Distilled from the original", "reference", 84.96, 2.65),
        student("kd_q", "Distilled from q", "target", 85.38, 3.07, n=1),
        student("unauthorized", "Plain KD, tuned", "attack", 82.18, -0.13),
        student("nasty_htc", "Sequence of checkpoints (HTC)", "attack", 82.40, 0.09, n=1),
        student("features", "Re-headed features", "attack", 82.61, 0.3, note="used to train the box"),
        student("authorized", "With the key", "authorized", 85.52, 3.21),
        student("authorized_wrong_key", "With a wrong key", "wrong_key", 82.11, -0.2, n=1),
        student("disturbed", "Plain KD, box disturbed", "disturb", 31.4, -50.91, n=1),
    ]
    models = [
        Model(name="original", label="Original", top1=92.6,
              top5=99.81, ece=0.041, nll=0.281, nll_binary=0.26),
        Model(name="original_ft", label="Original, fine-tuned", top1=92.71, top5=99.8, ece=0.038, nll=0.274,
              nll_binary=0.259, residual=1.92, n_images=10_000, reliability=bins(0.95)),
        Model(name="boxed", label="Boxed", top1=92.63, top5=97.12, ece=0.036, nll=0.402, nll_binary=0.255,
              residual=0.004, n_images=10_000, reliability=bins(0.99)),
        Model(name="boxed_keyed", label="Boxed, with the key", top1=91.4, top5=99.6, ece=0.05, nll=0.31),
    ]  # fmt: skip
    budgets = (1_000, 5_000, 10_000, 40_000)
    series = {
        "Original": tuple(Point(x, y, y - 0.4, y + 0.4) for x, y in zip(budgets, (71, 80.2, 85, 88.4), strict=True)),
        "Boxed": tuple(Point(x, y, y - 0.4, y + 0.4) for x, y in zip(budgets, (66, 77.1, 82.2, 86.3), strict=True)),
        "Floor": tuple(Point(x, y) for x, y in zip(budgets, (66.2, 77.3, 82.3, 86.2), strict=True)),
    }
    return Report(
        title="resnet20 on CIFAR-10, boxed with conceal",
        created="2026-11-23T10:57:20+00:00",
        tool="0.1.0",
        verdict="Without the key, distilling this box gains nothing over ignoring it; with it, 0.6 points.",
        notes=("Students trained for 20 epochs; short training exaggerates gains.", "Some rows have n = 1."),
        inference_cost=InferenceCost(
            top1=Interval(0.08, -0.11, 0.27, 10_000),
            ece=Interval(-0.002, -0.005, 0.001, 10_000),
            nll_binary=Interval(-0.004, -0.01, 0.002, 10_000),
            nll=Interval(0.128, 0.117, 0.139, 10_000),
            top5=Interval(2.68, 2.4, 2.97, 10_000),
        ),
        unauthorized_advantage=UnauthorizedAdvantage(
            api=Advantage(labelled=Interval(0.09, -0.21, 0.39, 5), labelled_by="nasty_htc"),
            file=Advantage(labelled=Interval(0.62, 0.11, 1.13, 5)),
        ),
        authorized_gain=Interval(0.56, 0.21, 0.91, 5),
        protectable=Interval(2.65, 2.35, 2.95, 5),
        models={model.name: model for model in models},
        students={student.name: student for student in students},
        curves={
            "queries": Curve(
                title="Accuracy over the query budget", x_label="Queries", y_label="Accuracy, %", x_log=True,
                series=series,
            )
        },
        environment={"python": "3.12.4", "torch": "2.10.0", "device": "NVIDIA H100 80GB HBM3", "cuda": True},
        config={"objective": {"name": "conceal", "beta": 2.0, "temperatures": [0.5, 20]}, "seed": 7},
        box={"architecture": "resnet20", "key id": "8d1f0c", "classes": ["airplane", "automobile", "bird"]},
        cost={"seconds": 5123.4, "images per second": 18_210, "peak memory MiB": 2311},
    )  # fmt: skip


def bare() -> Report:
    """A report in which nothing was measured."""
    return Report(title="Nothing", created="2026-11-23", tool="0.1.0", verdict="Nothing was measured.")


def hostile() -> Report:
    """A report whose every text was written by somebody else."""
    report = sample()
    control = report.students["control"]
    return dataclasses.replace(
        report,
        title=EVIL,
        verdict=EVIL,
        notes=(EVIL,),
        box={EVIL: {EVIL: [EVIL, {"deep": EVIL}]}, "half": "\ud800"},
        students={"control": dataclasses.replace(control, label=EVIL, note=EVIL, config={EVIL: EVIL})},
        models={"boxed": dataclasses.replace(report.models["boxed"], label=EVIL)},
        curves={EVIL: dataclasses.replace(report.curves["queries"], title=EVIL, x_label=EVIL, y_label=EVIL,
                                          series={EVIL: (Point(1, 2), Point(0, 3), Point(None, None))})},
    )  # fmt: skip


@pytest.fixture(scope="module")
def report() -> Report:
    return sample()


GATES = (
    GateResult("inference_cost.top1.high <= 0.5", 0.27, True, "it is 0.27"),
    GateResult("authorized_gain.low > 1", 0.21, False, "it is 0.21"),
)


# JSON


def test_json_round_trip(report):
    assert Report.from_json(report.to_json()) == report
    assert Report.from_json(bare().to_json()) == bare()


def test_committed_results_follow_the_schema():
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    known = [path for path in sorted(RESULTS.glob("*.json")) if b'"schema_version"' in path.read_bytes()]
    assert known or not RESULTS.exists()
    for path in known:
        validator.validate(json.loads(path.read_text()))
        assert Report.read(path).to_json() == path.read_text()


def test_shipped_schema_is_the_dataclasses():
    assert SCHEMA.read_text() == schema(), "write sdbctl.report.schema() to it"


@pytest.mark.parametrize("make", [sample, bare, hostile])
def test_reports_follow_the_schema(make):
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    validator.check_schema(validator.schema)
    validator.validate(json.loads(make().to_json()))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schema_version", 2),
        ("students.control.role", "thief"),
        ("students.control.mean", "82"),
        ("students.control.n", 1.5),
        ("students.control.extra", 1),
        ("inference_cost.top1", None),
        ("notes", "one"),
        ("config", []),
        ("students.two\nlines", {}),
        ("models.boxed", {"two\nlines\x1b": 1}),
    ],
)
def test_schema_and_reader_refuse_the_same(report, path, value):
    content = json.loads(report.to_json())
    *parents, last = path.split(".")
    place = content
    for name in parents:
        place = place[name]
    place[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, json.loads(SCHEMA.read_text()))
    with pytest.raises(BadInput) as caught:
        Report.from_json(json.dumps(content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "null",
     '{"schema_version": 1}', '{"schema_version": true}', '{"schema_version": NaN}',
     "[" * 100_000, '{"schema_version": ' + "9" * 5000 + "}", b"\xff\xfe\x00"],
)  # fmt: skip
def test_other_files_are_refused_in_one_line(text):
    with pytest.raises(BadInput) as caught:
        Report.from_json(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_missing_member_is_named(report):
    content = json.loads(report.to_json())
    del content["students"]["control"]["values"]
    with pytest.raises(BadInput, match=r"students\.control\.values is missing"):
        Report.from_json(json.dumps(content))


def test_huge_numbers_are_refused(report):
    with pytest.raises(BadInput, match="too large"):
        Report.from_json(report.to_json().replace('"mean": 0.56', '"mean": 1e999'))


def test_read_names_the_file(tmp_path, report):
    path = tmp_path / "report.json"
    with pytest.raises(BadInput, match="does not exist"):
        Report.read(path)
    path.write_text(report.to_json())
    assert Report.read(path) == report
    path.write_text("x")
    with pytest.raises(BadInput, match=re.escape(str(path))):
        Report.read(path)


def test_what_is_not_finite_is_null(report):
    odd = student("odd", "Odd", "attack", math.nan, config={"a": math.inf, "b": np.float32(2), "c": np.int64(3)})
    text = dataclasses.replace(report, students={"odd": odd}).to_json()
    assert "NaN" not in text and "Infinity" not in text
    content = json.loads(text)["students"]["odd"]
    assert content["mean"] is None and content["values"] == [None] * 5
    assert content["config"] == {"a": None, "b": 2.0, "c": 3}


def test_other_objects_are_not_written(report):
    with pytest.raises(TypeError, match="Path"):
        dataclasses.replace(report, config={"where": Path("x")}).to_json()


# Paths and gates


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("unauthorized_advantage.api.labelled.high", 0.39),
        ("unauthorized_advantage.api.labelled", 0.39),
        ("unauthorized_advantage.file.unlabelled.high", None),
        ("unauthorized_advantage.file.unlabelled", None),
        ("inference_cost.top1", 0.27),
        ("inference_cost.top1.mean", 0.08),
        ("authorized_gain", 0.21),
        ("protectable", 2.35),
        ("students.unauthorized.mean", 82.18),
        ("students.features.difference.high", 0.6),
        ("models.boxed.residual", 0.004),
        ("models.boxed_wrong_key.top1", None),
        ("config.objective.beta", 2.0),
        ("cost.seconds", 5123.4),
        ("students.authorized.values.4", sample().students["authorized"].values[4]),
        ("students.authorized.values.5", None),
        ("models.boxed.reliability.2.share", 0.02),
        ("curves.queries.series.Boxed.1.high", 77.5),
    ],
)
def test_get(report, path, value):
    assert report.get(path) == (value if value is None else pytest.approx(value))


def test_known_students_that_were_not_trained_are_null():
    assert bare().get("students.authorized.mean") is None


@pytest.mark.parametrize("path", ["cost.gpu_hours", "box.measured.accuracy", "config.recipe.lr_decay"])
def test_what_a_run_did_not_say_is_not_measured(report, path):
    assert report.get(path) is None


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("inference_cost.top_1", "inference_cost.top1"),
        ("students.unauthorized.maen", "students.unauthorized.mean"),
        ("authorized_gain.lower", "authorized_gain.low"),
        ("title", ""),
        ("environment.cuda", ""),
        ("students", ""),
    ],
)
def test_get_names_the_nearest(report, path, nearest):
    with pytest.raises(UsageError, match=f"did you mean {re.escape(nearest)}"):
        report.get(path)


def test_gates_from_a_file(tmp_path, report):
    path = tmp_path / "gate.toml"
    path.write_text(
        '[gates]\nrules = ["unauthorized_advantage.api.labelled.high <= 0.5", "inference_cost.top1<-1e-1",'
        ' "authorized_gain > 0", "unauthorized_advantage.file.unlabelled.high<=0.5"]'
    )
    results = check(report, load_gates(path))
    assert [result.passed for result in results] == [True, False, True, False]
    assert results[1].rule == "inference_cost.top1 < -0.1" and "0.27" in results[1].reason
    assert results[3].value is None and "not measured" in results[3].reason


@pytest.mark.parametrize(("symbol", "holds"), [("<=", True), ("<", False), (">=", True), (">", False)])
def test_operators_at_the_limit(report, symbol, holds):
    assert check(report, [Gate("protectable.low", symbol, 2.35)])[0].passed == holds


@pytest.mark.parametrize(
    "rule", ["", "a", "a <= b", "a == 1", "a <= 1 <= 2", "<= 1", "a <= 1.2.3", "a <= nan", "a < 1e999"]
)
def test_broken_rules_are_named(rule):
    with pytest.raises(UsageError, match=re.escape(repr(rule))):
        parse_gate(rule)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[gates\n", "line 1"),
        ("x = 1", "no rules"),
        ("gates = 1", "no rules"),
        ("[gates]\nrules = []", "no rules"),
        ("[gates]\nrules = [1]", "no rules"),
        ('[gates]\nrules = ["a <= 1"]\nrule = 1', "gates.rule"),
        ('[gates]\nrules = ["a <= 1"]\n[other]', "other"),
    ],
)
def test_broken_gate_files_are_explained(tmp_path, text, words):
    path = tmp_path / "gate.toml"
    path.write_text(text)
    with pytest.raises(BadInput, match=words):
        load_gates(path)


@pytest.mark.parametrize(
    "path",
    [
        "inferense_cost.top1",
        "key_strenght.opens_at",
        "key_strength.open_at",
        "students.kd_orignal.mean",
        "models.boxd.top1",
        "authorized_gain.lower",
    ],
)
def test_a_slip_of_the_pen_is_found_before_anything_is_trained(path):
    with pytest.raises(UsageError, match=f"(has no|no report has a) number {path}; did you mean"):
        check_names([parse_gate(f"{path} <= 1")], ["kd_original"])


def test_rules_may_be_on_any_number():
    rules = ["students.kd_original.values.3 > 1", "models.boxed.reliability.9.accuracy > 1", "environment.cores > 1"]
    rules += ["curves.budget.series.KD from the box, no labels.0.y > 1", "students.kd_original.config.temperature > 1"]
    check_names(list(map(parse_gate, rules)), ["kd_original"])


def test_a_report_that_holds_its_gates_passes(tmp_path):
    gate, path = tmp_path / "gate.toml", tmp_path / "report.json"
    path.write_text(sample().to_json())
    gate.write_text('[gates]\nrules = ["inference_cost.top1.high <= 99"]\n')
    done = run_cli("report", path, "--gate", gate, "--json")
    assert done.returncode == 0 and [one["passed"] for one in json.loads(done.stdout)["gates"]] == [True]


def test_gate_on_unknown_path(report):
    with pytest.raises(UsageError, match="did you mean"):
        check(report, [parse_gate("inference_cots.top1 <= 1")])


# What is shown


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "not measured"), (-0.004, "0.00"), (-1.5, "−1.50"), (1.5, "+1.50"), (0.0, "0.00")],
)
def test_number(value, text):
    assert number(value, sign=True) == text


def test_bounds_need_both():
    assert bounds(Interval(1, 0.5, 1.5)) == "+0.50 to +1.50"
    assert bounds(Interval(1, None, 1.5)) == ""


def test_cards_judge_by_bounds(report):
    cards = {card.title: card for card in view(report).cards}
    assert cards["Inference cost, top-1"].status == "pass"
    assert cards["Inference cost, top-1"].n == "10,000 images"
    assert cards["Advantage without key, API, labelled"].status == "pass"
    assert cards["Advantage without key, API, labelled"].by == "Sequence of checkpoints (HTC)"
    assert "by: Sequence of checkpoints (HTC)" in html(report)
    assert cards["Advantage without key, API, unlabelled"].value == "not measured"
    assert cards["Advantage without key, file, labelled"].words == "above 0.5 not ruled out"
    assert cards["Authorized gain"].status == "pass"
    assert "Advantage without key, file, unlabelled" not in cards


def test_nothing_to_protect_is_no_success(report):
    cards = view(dataclasses.replace(report, protectable=Interval(0.4, -0.2, 1.0, 5))).cards
    shown = [card for card in cards if card.title.startswith("Advantage") and card.value != "not measured"]
    assert {(card.status, card.words) for card in shown} == {("neutral", "nothing to protect here")}


def test_without_bounds_no_claim(report):
    cards = view(dataclasses.replace(report, authorized_gain=Interval(3.0, n=1))).cards
    assert [(card.status, card.n) for card in cards if card.title == "Authorized gain"] == [("neutral", "1 seed")]


def test_students_start_with_the_floor_and_show_the_control_once(report):
    table = next(table for table in view(report).tables if table.title == "Students")
    assert table.marks[0] == "floor"
    assert not any("Best of the floor" in row[0] for row in table.rows)
    order = ["floor", "reference", "target", "authorized", "wrong_key", "attack", "disturb"]
    assert table.marks == tuple(sorted(table.marks, key=order.index))
    assert ("Re-headed features (used to train the box)", "attack") in [row[:2] for row in table.rows]


# Formats


def printed(report: Report, width: int = 120) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    for table in tables(report, GATES):
        console.print(table)
    return console.export_text(styles=False)


def test_terminal(report):
    text = printed(report)
    assert report.verdict in text.replace("\n", " ").replace("  ", " ")
    assert "85.52 ± 0.24" in text and "+2.91 to +3.51" in text and "not measured" in text
    assert "✗ broken" in text and "Settings" not in text


@pytest.mark.parametrize(("width", "over", "bounds"), [(48, False, False), (60, False, True), (110, True, True)])
def test_a_narrow_terminal_shows_every_verdict(report, width, over, bounds):
    text = printed(report, width)
    shown = text[: text.index("Gates")]
    assert "Verdict" in shown and shown.count("✓") == 3 and "surely" in shown and "broken" in text
    assert (" Over " in shown, "to +0.27" in shown) == (over, bounds)
    assert max(map(len, text.splitlines())) <= width


def test_terminal_prints_hostile_text_as_text():
    text = printed(hostile())
    assert "\x1b" not in text and "‮" not in text and "[x](http" in text


def test_markdown(report):
    text = markdown(report, GATES)
    assert text.startswith("# resnet20 on CIFAR-10")
    assert "| Boxed | 92.63 | 97.12 | 0.036 |" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") - line.count(r"\|") for line in block.splitlines()}) == 1
    assert text.count("<details>") == text.count("</details>") == 5


def test_markdown_escapes(report):
    text = markdown(hostile())
    assert "<script" not in text and "[x](" not in text and "http://" not in text


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags close."""

    VOID = ("meta", "br", "path", "use", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("make", [sample, bare, hostile])
def test_html_stands_alone(make):
    page = Page(html(make(), GATES))
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "href") and (name != "xlink:href" or value.startswith("#"))
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for name, value in page.attributes if name == "xlink:href"}
    assert used <= set(ids)


def test_html_shows_the_report(report):
    text = html(report, GATES)
    page = Page(text)
    numbers = ("85.52 ± 0.24", "−50.91", "not measured", "τ\u00a04, α\u00a00.9")
    for words in (
        *numbers,
        "Accuracy over the query budget",
        "objective.beta",
        "surely at most 0.5",
        "✗ broken",
    ):
        assert words in page.text
    assert page.tags.count("svg") == 4
    assert not re.search(r"(fill|stroke): #(?!ffffff)[0-9a-f]{6}", text), "plot colours must follow the theme"


def test_html_puts_the_finding_above_its_grounds(report):
    said = "Not protected: distilling the box gains +1.7 points; the original gives +2.0 points. Others: not tried."
    text = html(dataclasses.replace(report, verdict=said))
    finding, grounds = (re.search(f'<p class="{name}">(.*?)</p>', text)[1] for name in ("verdict", "grounds"))
    assert finding == "Not protected"
    assert grounds == "Distilling the box gains +1.7 points; the original gives +2.0 points. Others: not tried."
    assert 'class="grounds"' not in html(dataclasses.replace(report, verdict="Nothing is known."))


def test_few_images_are_no_bin_and_legends_hide_nothing(report):
    from sdbctl.report import plots

    assert [plots._many(share, 1000) for share in (0.009, 0.01, None)] == [False, True, True]
    few = dataclasses.replace(report.models["boxed"], n_images=20, reliability=(Bin(0.5, 0.5, 0.1), Bin(0.9, 0.9, 0.9)))
    (one,) = plots.reliability(dataclasses.replace(report, models={"boxed": few}))
    (both,) = plots.reliability(dataclasses.replace(report, models={"boxed": dataclasses.replace(few, n_images=200)}))
    assert both.svg.count("<path") > one.svg.count("<path")
    axes = Figure(layout="constrained").add_subplot()
    axes.plot([0, 1], label="a")
    plots._legend(axes)
    axes.figure.draw_without_rendering()
    (legend,) = axes.figure.legends
    assert legend.get_window_extent().y0 >= axes.get_window_extent().y1


def test_html_is_reproducible(report):
    assert html(report) == html(report)


def test_html_escapes():
    text = html(hostile())
    assert "<script>alert" not in text and "\x1b" not in text
    assert "<script>alert(1)</script>" in Page(text).text


def test_junit(report):
    suite = next(iter(JUnitXml.fromstring(junit(report, GATES).encode())))
    assert (suite.tests, suite.failures) == (2, 1)
    assert [case.name for case in suite] == [gate.rule for gate in GATES]
    assert JUnitXml.fromstring(junit(hostile(), GATES).encode())


def test_junit_without_gates_is_no_success(report):
    with pytest.raises(UsageError, match="no"):
        junit(report, [])


# Writing


def test_write(tmp_path, report):
    folder = tmp_path / "a" / "b"
    paths = write(report, folder, gates=GATES)
    assert [path.name for path in paths] == ["report.json", "report.md", "report.html", "junit.xml"]
    assert sorted(folder.iterdir()) == sorted(paths)
    assert Report.read(paths[0]) == report
    with pytest.raises(UsageError, match="already exists"):
        write(report, folder)
    write(report, folder, force=True)
    assert not (folder / "junit.xml").exists(), "it was of other gates"


def test_write_all_or_nothing(tmp_path, report):
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(UsageError, match="already exists"):
        write(report, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_write_refuses(tmp_path, report):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFailure, match="file"):
        write(report, tmp_path / "file")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("make", [sample, bare, hostile])
def test_every_format_renders_every_report(name, make):
    assert FORMATS[name](Report.from_json(make().to_json()), GATES)


def test_gate_results_survive_hostile_rules(report):
    gates = [GateResult(EVIL, None, False, EVIL)]
    assert "<script>alert" not in html(report, gates)
    assert JUnitXml.fromstring(junit(report, gates).encode())


def test_no_two_rows_have_the_same_name_in_a_chart():
    from sdbctl.report.plots import _short
    from sdbctl.suites import ALL

    names = [_short(row.label) for row in ALL]
    assert len(set(names)) == len(names)


def test_a_comparison_shows_what_is_no_longer_measured_and_what_else_changed(report):
    config = {**report.config, "suite": "other"}
    now = dataclasses.replace(report, authorized_gain=Interval(), config=config)
    table = compare(now, report)
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["authorized_gain.mean"][1:] == ("not measured", "not measured")
    assert "suite" in table.note
    assert compare(report, report).note == f"{len(report.means())} other numbers are as they were."
    assert list(rows) == ["authorized_gain.mean"] and not compare(report, report).rows, "only what changed is shown"
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(comparison(now, report))
    assert console.export_text().startswith("Made otherwise, so numbers may not be compared: suite none, now other.")


@pytest.mark.parametrize("worth", [Interval(2.5, -3.0, 8.0, 5), Interval(1.0, n=1), Interval()])
def test_no_protection_is_claimed_where_nothing_is_known_to_be_worth_it(report, worth):
    threats = UnauthorizedAdvantage(api=Advantage(labelled=Interval(0.1, -0.1, 0.4, 5)))
    made = dataclasses.replace(
        report, protectable=worth, protectable_unlabelled=Interval(), unauthorized_advantage=threats
    )
    assert not evaluate.verdict(made).startswith("Undistillable")
    assert {card.title: card for card in view(made).cards}["Advantage without key, API, labelled"].status == "neutral"
    shown = dataclasses.replace(made, protectable=Interval(2.5, 0.3, 5.0, 5))
    assert evaluate.verdict(shown).startswith("Undistillable")


def test_a_leak_is_said_though_with_labels_there_is_nothing_to_protect(report):
    """What the default box of digits measured: each threat is judged by itself, and who holds the file is named."""
    measured = dataclasses.replace(
        report,
        protectable=Interval(1.9, 0.9, 2.9, 10),
        protectable_unlabelled=Interval(2.1, 1.0, 3.2, 10),
        unauthorized_advantage=UnauthorizedAdvantage(
            api=Advantage(labelled=Interval(-0.4, -1.3, 0.6, 10), unlabelled=Interval(-0.5, -1.5, 0.4, 10)),
            file=Advantage(labelled=Interval(1.0, 0.3, 1.7, 10), unlabelled=Interval(1.3, 0.8, 1.9, 10)),
        ),
    )
    said = evaluate.verdict(measured)
    assert said.startswith(
        "Undistillable through its outputs by the attacks tried: distilling the box gains -0.4 points"
    )
    assert "the original gives +1.9 points and +2.1 points without labels, so there is nothing to protect with" in said
    assert "Who holds the file gains +1.0 points (at most +1.7) and +1.3 points without labels" in said
    neither = dataclasses.replace(
        measured,
        protectable_unlabelled=Interval(1.1, 0.4, 1.8, 10),
        unauthorized_advantage=dataclasses.replace(
            measured.unauthorized_advantage, file=Advantage(labelled=Interval(0.2, -0.3, 0.7, 10))
        ),
    )
    said = evaluate.verdict(neither)
    assert said.startswith("Nothing to protect here: ") and "Who holds the file gains +0.2 points" in said


@pytest.mark.parametrize(
    ("worth", "advantage", "nothing"),
    [
        (Interval(0.5, -1.0, 2.0, 5), Interval(0.1, -0.5, 0.7, 5), True),
        (Interval(9.0, n=1), Interval(0.1, n=1), False),
        (Interval(4.1, -0.7, 8.9, 3), Interval(0.1, -0.5, 0.7, 3), False),
        (Interval(-6.1, n=1), Interval(52.9, n=1), False),
        (Interval(-6.1, -7.0, -5.0, 5), Interval(52.9, 50.0, 55.0, 5), False),
        (Interval(9.0, 8.0, 10.0, 5), Interval(0.1, -0.5, 0.7, 5), False),
    ],
)
def test_nothing_to_protect_is_said_only_where_it_is_known(report, worth, advantage, nothing):
    threats = UnauthorizedAdvantage(api=Advantage(labelled=advantage))
    made = dataclasses.replace(report, protectable=worth, unauthorized_advantage=threats)
    assert made.nothing_to_protect == nothing
    assert evaluate.verdict(made).startswith("Nothing to protect") == nothing
    words = {card.title: card.words for card in view(made).cards}
    assert (words["Original over the floor"] == "nothing to protect here") == nothing
    assert (words["Advantage without key, API, labelled"] == "nothing to protect here") == nothing


@pytest.mark.slow
def test_the_example_for_ci_gates_with_the_key_from_a_variable(work, tmp_path):
    key = base64.b64encode((work / "k.bin").read_bytes()).decode()
    script = Path(__file__).parent.parent / "examples/ci/gate.sh"
    command = ["sh", script, work / "boxed.onnx", work / "teacher.safetensors", "digits", tmp_path / "report"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SDBCTL_KEY": key, "SDBCTL_SUITE": "quick"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    # what was exported here shows all that the box knows
    assert done.returncode == 3 and "gate broken" in done.stderr.splitlines()[-1]
    written = [file.read_bytes() for file in (tmp_path / "report").iterdir() if file.is_file()]
    assert any(b"<failure" in text for text in written)
    raw = (work / "k.bin").read_bytes()
    shown = [done.stdout.encode(), done.stderr.encode(), *written]
    assert not any(secret in text for text in shown for secret in (key.encode(), raw, raw.hex().encode()))


@pytest.mark.slow
def test_a_service_is_evaluated_by_its_answers(tmp_path):
    script = Path(__file__).parent.parent / "examples" / "endpoint.py"
    done = subprocess.run([sys.executable, script, tmp_path, "2", "2"], capture_output=True, timeout=300)
    assert done.returncode == 0 and b"through its outputs" in done.stdout, done.stderr
    report = Report.read(tmp_path / "report.json")
    assert report.models["boxed"].top1 > 90
    assert report.students["unauthorized"].queries > 0


def test_a_column_is_explained_where_it_is_shown():
    columns = (Column("First"), Column("Second", wide=True, legend="Second: rare."))
    table = Table("Numbers", columns, (("1", "2"),), "All are made up.")
    console = Console(width=80, file=io.StringIO())
    console.print(rich_table(table))
    shown = console.file.getvalue().split()
    assert "made" in shown and "rare." not in shown
    assert table.about() == "All are made up. Second: rare."
