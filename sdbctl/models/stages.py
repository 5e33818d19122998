"""Feature maps of any network: the last one of each size, as feature distillation compares them."""

from __future__ import annotations

from torch import Tensor, nn

from sdbctl.errors import UsageError


def head(net: nn.Module) -> nn.Linear | nn.Conv2d:
    """The layer that makes logits of features: the last linear one, or without one the last convolution.

    Raises:
        UsageError: The network has neither.
    """
    for kind in (nn.Linear, nn.Conv2d):
        found = [module for module in net.modules() if isinstance(module, kind)]
        if found:
            return found[-1]
    raise UsageError("the network has neither a linear layer nor a convolution")


def width(net: nn.Module) -> int:
    """How many features the logits are made of."""
    layer = head(net)
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


class Stages:
    """Remembers, at each forward pass of a network, its last feature map of each height and width.

    Args:
        net: Any convolutional network.

    Attributes:
        maps: [B, C, H, W] by size, largest first, after a forward pass; the inputs of the last layer
            [B, D] under ``features``.
    """

    def __init__(self, net: nn.Module) -> None:
        self.maps: dict[tuple[int, int], Tensor] = {}
        self.features: Tensor | None = None
        last = head(net)
        self._handles = [
            module.register_forward_hook(self._keep)
            for module in net.modules()
            if module is not net and module is not last and not isinstance(module, nn.Linear)
        ]
        self._handles.append(net.register_forward_pre_hook(self._clear))
        self._handles.append(last.register_forward_pre_hook(self._keep_features))

    def close(self) -> None:
        """Leave the network as it was."""
        for handle in self._handles:
            handle.remove()

    def _clear(self, module: nn.Module, inputs: object) -> None:
        self.maps, self.features = {}, None

    def _keep(self, module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] > 1:
            self.maps[(output.shape[2], output.shape[3])] = output

    def _keep_features(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.features = inputs[0] if inputs[0].ndim == 2 else inputs[0].flatten(2).mean(2)
