"""Ways to train a student: one file per family, one line here."""

from sdbctl.attacks import file, floor, kd, keys, queries, soft, staged
from sdbctl.attacks.base import Attack, Attacker, Config

ATTACKS: dict[str, Attack] = {
    "cross_entropy": floor.CROSS_ENTROPY,
    "label_smoothing": floor.LABEL_SMOOTHING,
    "class_constant": floor.CLASS_CONSTANT,
    "hard_label": floor.HARD_LABEL,
    "hard_constant": floor.HARD_CONSTANT,
    "kd": kd.KD,
    "kd_unlabelled": kd.KD_UNLABELLED,
    "logits_mse": soft.LOGITS_MSE,
    "dkd": soft.DKD,
    "dist": soft.DIST,
    "clipped": soft.CLIPPED,
    "repaired": soft.REPAIRED,
    "composed": soft.COMPOSED,
    "composed_unlabelled": soft.COMPOSED_UNLABELLED,
    "averaged_views": queries.AVERAGED_VIEWS,
    "averaged_noise": queries.AVERAGED_NOISE,
    "recalibrated": queries.RECALIBRATED,
    "mixup": queries.MIXUP,
    "cutmix": queries.CUTMIX,
    "knockoff": queries.KNOCKOFF,
    "copycat": queries.COPYCAT,
    "data_free": queries.DATA_FREE,
    "two_stage": staged.TWO_STAGE,
    "sequence": staged.SEQUENCE,
    "skeptical": staged.SKEPTICAL,
    "markov": staged.MARKOV,
    "restored": staged.RESTORED,
    "random_keys": keys.RANDOM_KEYS,
    "simple_keys": keys.SIMPLE_KEYS,
    "searched_key": keys.SEARCHED_KEY,
    "inverted_key": keys.INVERTED_KEY,
    "rehead": file.REHEAD,
    "fine_tuned": file.FINE_TUNED,
    "pruned": file.PRUNED,
    "noisy": file.NOISY,
    "reestimated": file.REESTIMATED,
    "fitnet": file.FITNET,
    "attention": file.ATTENTION,
    "similarity": file.SIMILARITY,
    "contrast": file.CONTRAST,
}

__all__ = ["ATTACKS", "Attack", "Attacker", "Config"]
