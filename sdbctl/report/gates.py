"""Gates: rules on the numbers of a report, such as ``inference_cost.top1.high <= 0.5``."""

from __future__ import annotations

import difflib
import math
import operator
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdbctl import files
from sdbctl.errors import BadInput, UsageError
from sdbctl.report import MODELS, VARIABLE, Report

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
}
_RULE = re.compile(r"([^<>=]+?)\s*(<=|<|>=|>)\s*([-+]?[0-9.]+(?:e[-+]?[0-9]+)?)", re.IGNORECASE)
_EXAMPLE = "write it like inference_cost.top1.high <= 0.5"


@dataclass(frozen=True)
class Gate:
    """One rule: the number at ``path`` must compare with ``limit`` as ``operator`` says."""

    path: str
    operator: str
    limit: float

    def __str__(self) -> str:
        return f"{self.path} {self.operator} {self.limit:.12g}"


@dataclass(frozen=True)
class GateResult:
    """What became of one rule.

    Attributes:
        rule: The rule as text.
        value: The number it was held against, None if that was not measured.
        passed: Whether it holds.
        reason: Why, in words.
    """

    rule: str
    value: float | None
    passed: bool
    reason: str


def parse_gate(rule: str) -> Gate:
    """Read ``PATH OP NUMBER``.

    Raises:
        UsageError: It is something else.
    """
    match = _RULE.fullmatch(rule.strip())
    if not match:
        raise UsageError(f"gate rule {rule!r} is not PATH OP NUMBER", _EXAMPLE)
    path, symbol, number = match.groups()
    try:
        limit = float(number)
    except ValueError:
        limit = math.inf
    if not math.isfinite(limit):
        raise UsageError(f"gate rule {rule!r}: {number!r} is not a number", _EXAMPLE)
    return Gate(path, symbol, limit)


def load_gates(path: Path) -> list[Gate]:
    """Read a TOML file with the rules under ``[gates]``, ``rules = ["PATH OP NUMBER", …]``.

    Raises:
        BadInput: The file is missing, is not TOML, or has no rules.
        UsageError: A rule does not parse.
    """
    content = files.text(path, "gate file")
    try:
        table = tomllib.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"gate file {path} is not TOML: {error}") from None
    section = table.get("gates")
    gates = section if isinstance(section, dict) else {}
    rules = gates.get("rules")
    if not rules or not isinstance(rules, list) or not all(isinstance(rule, str) for rule in rules):
        raise BadInput(
            f"gate file {path} has no rules", 'write [gates] and rules = ["inference_cost.top1.high <= 0.5"]'
        )
    others = [f"gates.{name}" for name in gates if name != "rules"] + [name for name in table if name != "gates"]
    if others:
        raise BadInput(f"gate file {path}: {others[0]!r} is unknown", "only gates.rules is read")
    return [parse_gate(rule) for rule in rules]


def check_names(gates: Sequence[Gate], students: Iterable[str]) -> None:
    """Refuse a rule with a slip of the pen before hours of work, as far as a report's names are known.

    Args:
        gates: The rules.
        students: Names of the rows that a report may have.

    Raises:
        UsageError: No report has such a number, model or student.
    """
    empty = Report(title="", created="", tool="", verdict="")
    known = {"students": list(students), "models": list(MODELS)}
    for gate in gates:
        root, _, rest = gate.path.partition(".")
        name, _, number = rest.partition(".")
        if root in known and name not in known[root]:
            nearest = difflib.get_close_matches(name, known[root], n=1, cutoff=0)[0]
            raise UsageError(f"no report has a number {gate.path}", f"did you mean {root}.{nearest}.{number}?")
        if root not in (*VARIABLE, "environment") and not (root == "students" and number.startswith("config.")):
            empty.get(gate.path)


def check(report: Report, gates: Sequence[Gate]) -> list[GateResult]:
    """Hold each rule against the report; a number that was not measured fails.

    Raises:
        UsageError: A rule names a number that no report has.
    """
    return [_check(report, gate) for gate in gates]


def _check(report: Report, gate: Gate) -> GateResult:
    value = report.get(gate.path)
    if value is None:
        return GateResult(str(gate), None, False, f"{gate.path} was not measured")
    passed = OPERATORS[gate.operator](value, gate.limit)
    words = "as required" if passed else "but must be"
    return GateResult(str(gate), value, passed, f"{gate.path} is {value:.6g}, {words} {gate.operator} {gate.limit:g}")
