"""Box objectives: one file per objective, one line here."""

from sdbctl.objectives.ast import AST
from sdbctl.objectives.base import Objective, Terms, Views
from sdbctl.objectives.cmim import CMIM
from sdbctl.objectives.conceal import CONCEAL
from sdbctl.objectives.guard import GUARD
from sdbctl.objectives.nasty import NASTY
from sdbctl.objectives.sdb import SDB

OBJECTIVES: dict[str, Objective] = {
    "guard": GUARD,
    "conceal": CONCEAL,
    "ast": AST,
    "cmim": CMIM,
    "nasty": NASTY,
    "sdb": SDB,
}

LOSSES = {name: objective for name, objective in OBJECTIVES.items() if objective.terms is not None}
"""Those that train a network."""

__all__ = ["LOSSES", "OBJECTIVES", "Objective", "Terms", "Views"]
