"""Feature maps of any network: the last one of each size, as feature distillation compares them."""

from __future__ import annotations

from torch import Tensor, nn


class Stages:
    """Remembers, at each forward pass of a network, its last feature map of each height and width.

    Args:
        net: Any convolutional network.

    Attributes:
        maps: [B, C, H, W] by size, largest first, after a forward pass; the inputs of the last linear layer
            [B, D] under ``features``.
    """

    def __init__(self, net: nn.Module) -> None:
        self.maps: dict[tuple[int, int], Tensor] = {}
        self.features: Tensor | None = None
        linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
        self._handles = [
            module.register_forward_hook(self._keep)
            for module in net.modules()
            if module is not net and not isinstance(module, nn.Linear)
        ]
        self._handles.append(net.register_forward_pre_hook(self._clear))
        if linear:
            self._handles.append(linear[-1].register_forward_pre_hook(self._keep_features))

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
        self.features = inputs[0]
