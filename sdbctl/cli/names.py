"""Names that options take, for shell completion and help.

They are those of the registries, which import torch and would make a shell wait: a test holds these against them.
"""

from __future__ import annotations

from collections.abc import Callable

_PLAIN = [f"resnet{depth}{shortcut}" for depth in (8, 14, 20, 32, 44, 56, 110) for shortcut in ("", "_b")]
_STEMS = [f"resnet{depth}_cifar" for depth in (18, 34, 50)] + [f"vgg{depth}_cifar" for depth in (11, 13, 16, 19)]
DEFAULT = "guard"
"""Objective of a box unless another is asked for."""
NAMES = {
    "objectives": ["guard", "conceal", "ast", "cmim", "nasty", "sdb"],
    "teachers": ["auto", "reference", "original", "assistant"],
    "students": ["wrn16", *_PLAIN, *_STEMS, "mobilenetv2", "shufflenetv2", "cnn", "cnn-tiny"],
    "methods": ["kd", "dkd", "dist"],
    "suites": ["quick", "core", "strong", "file", "foreign", "standard", "full"],
    "wrappers": [
        "top1",
        "class-constant",
        "uniform-nontarget",
        "quantised-confidence",
        "rounded",
        "high-confidence",
        "reverse-sigmoid",
        "gaussian-noise",
        "stingy",
        "misdirection",
    ],
    "confidences": ["class", "rough", "exact"],
    "keyed": ["itself", "assistant"],
    "data": ["cifar10", "cifar100", "svhn", "stl10", "mnist", "fashionmnist", "digits", "folder:", "parquet:", "npz:"],
    "normalisations": [
        "imagenet",
        "cifar10",
        "cifar10-narrow",
        "cifar100",
        "svhn",
        "mnist",
        "fashionmnist",
        "half",
        "none",
    ],
    "precisions": ["auto", "fp32", "bf16"],
}


def complete(kind: str) -> Callable[[str], list[str]]:
    """What tells a shell how a name of this kind goes on."""

    def matching(incomplete: str) -> list[str]:
        return [name for name in NAMES[kind] if name.startswith(incomplete)]

    return matching
