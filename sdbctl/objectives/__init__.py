"""Box objectives: one file per objective, one line here."""

from sdbctl.objectives.base import Objective, Terms, Views
from sdbctl.objectives.conceal import CONCEAL
from sdbctl.objectives.sdb import SDB

OBJECTIVES: dict[str, Objective] = {
    "conceal": CONCEAL,
    "sdb": SDB,
}

__all__ = ["OBJECTIVES", "Objective", "Terms", "Views"]
