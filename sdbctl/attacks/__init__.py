"""Ways to train a student: one file per family, one line here."""

from sdbctl.attacks.base import Attack, Attacker, Config
from sdbctl.attacks.floor import CLASS_CONSTANT, CROSS_ENTROPY, HARD_CONSTANT, HARD_LABEL, LABEL_SMOOTHING
from sdbctl.attacks.kd import KD, KD_UNLABELLED

ATTACKS: dict[str, Attack] = {
    "cross_entropy": CROSS_ENTROPY,
    "label_smoothing": LABEL_SMOOTHING,
    "class_constant": CLASS_CONSTANT,
    "hard_label": HARD_LABEL,
    "hard_constant": HARD_CONSTANT,
    "kd": KD,
    "kd_unlabelled": KD_UNLABELLED,
}

__all__ = ["ATTACKS", "Attack", "Attacker", "Config"]
