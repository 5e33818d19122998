"""Networks by name: small ones for small images, and every torchvision classifier."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from functools import partial

from torch import nn

from sdbctl.errors import UsageError
from sdbctl.models import nets
from sdbctl.models.identify import Identified, identify, match

Builder = Callable[[int, int], nn.Module]
"""(classes, channels) → network."""

ALIASES = {"wrn16": "wrn-16-2", "wrn40": "wrn-40-2"}


def _entries() -> dict[str, tuple[Builder, str]]:
    found: dict[str, tuple[Builder, str]] = {}
    for depth in (8, 14, 20, 32, 44, 56, 110):
        for option_a, suffix in ((True, ""), (False, "_b")):
            found[f"resnet{depth}{suffix}"] = (
                partial(nets.SmallResNet, depth, option_a=option_a),
                f"CIFAR ResNet-{depth} of He et al., {'zero-padded' if option_a else 'projection'} shortcut",
            )
    for depth, block, counts in (
        (18, nets.BasicBlock, (2, 2, 2, 2)),
        (34, nets.BasicBlock, (3, 4, 6, 3)),
        (50, nets.Bottleneck, (3, 4, 6, 3)),
    ):
        found[f"resnet{depth}_cifar"] = (
            partial(nets.StemResNet, block, counts),
            f"ResNet-{depth} with a 3x3 stem",
        )
    for depth in nets.Vgg.COUNTS:
        found[f"vgg{depth}_cifar"] = (
            partial(nets.Vgg, depth),
            f"VGG-{depth} with BatchNorm and one linear layer",
        )
    found["mobilenetv2"] = (nets.MobileNetV2, "MobileNetV2 for 32x32 images")
    found["shufflenetv2"] = (nets.ShuffleNetV2, "ShuffleNetV2 1x for 32x32 images")
    found["cnn"] = (partial(nets.Cnn, (32, 64, 128)), "a plain CNN of 3 layers")
    found["cnn-tiny"] = (partial(nets.Cnn, (8, 16)), "a plain CNN of 2 layers")
    return found


OWN = _entries()


def students() -> dict[str, str]:
    """Names of the own networks and one line each."""
    listed = {"wrn16": "WRN-16-2", "wrn-D-K": "any WRN of depth D = 6n + 4 and width K"}
    return listed | {name: text for name, (_, text) in OWN.items()}


def build(name: str, classes: int, channels: int = 3) -> nn.Module:
    """Build a network with fresh weights.

    Args:
        name: One of :func:`students`, or a torchvision classifier such as ``resnet18``.
        classes: Number of outputs.
        channels: Number of input channels.

    Raises:
        UsageError: The name is unknown, or the network cannot take so many channels.
    """
    name = ALIASES.get(name, name)
    if name in OWN:
        return OWN[name][0](classes, channels)
    wide = re.fullmatch(r"wrn-(\d{2,3})-(\d{1,2})", name)
    if wide:
        depth, width = int(wide[1]), int(wide[2])
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise UsageError(f"there is no WRN of depth {depth} and width {width}", "depth is 6n + 4: wrn-16-2")
        return nets.WideResNet(depth, width, classes, channels)
    return torchvision_net(name, classes, channels)


def torchvision_net(name: str, classes: int, channels: int = 3) -> nn.Module:
    """A torchvision classifier without pretrained weights."""
    import torchvision.models as tv

    known = tv.list_models(module=tv)
    if name not in known:
        close = difflib.get_close_matches(name, [*OWN, *ALIASES, *known], n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "see: sdbctl list students"
        raise UsageError(f"unknown network {name}", hint)
    if channels != 3:
        raise UsageError(f"{name} takes 3 channels, not {channels}", "sdbctl list students has others")
    extra = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    net: nn.Module = tv.get_model(name, weights=None, num_classes=classes, **extra)
    return net


__all__ = ["Identified", "build", "identify", "match", "students"]
