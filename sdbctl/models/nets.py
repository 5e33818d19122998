"""Small networks for small images. Every one ends in global average pooling, so any input size of 8 or more works."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu


def conv3(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias that keeps the size."""
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False, groups=groups)


def conv1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias."""
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


def initialise(net: nn.Module) -> nn.Module:
    """He initialisation of convolutions (He et al., ICCV 2015)."""
    for module in net.modules():
        # where there is no memory torch would load its compiler, for seconds, to draw nothing
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def pooled(x: Tensor) -> Tensor:
    """Global average: [B, C, H, W] → [B, C]."""
    return x.mean((2, 3))


class ZeroPad(nn.Module):
    """Option-A shortcut: every second pixel, new channels zero (He et al., CVPR 2016, section 4.2)."""

    def __init__(self, added: int) -> None:
        super().__init__()
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C + added, H/2, W/2]."""
        return pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., CVPR 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int, option_a: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or inputs != outputs:
            project = nn.Sequential(conv1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
            self.shortcut = ZeroPad(outputs - inputs) if option_a else project

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C', H', W']."""
        out = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return relu(out + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (He et al., CVPR 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv1(inputs, outputs), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv3(outputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv3, self.bn3 = conv1(outputs, 4 * outputs), nn.BatchNorm2d(4 * outputs)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or inputs != 4 * outputs:
            self.shortcut = nn.Sequential(conv1(inputs, 4 * outputs, stride), nn.BatchNorm2d(4 * outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, 4C', H', W']."""
        out = relu(self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))))
        return relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """ResNet-6n+2 for CIFAR: 16, 32, 64 channels, n blocks each (He et al., CVPR 2016, section 4.2)."""

    def __init__(self, depth: int, classes: int, channels: int, option_a: bool = True) -> None:
        super().__init__()
        n = (depth - 2) // 6
        self.conv1, self.bn1 = conv3(channels, 16), nn.BatchNorm2d(16)
        stages, inputs = [], 16
        for outputs in (16, 32, 64):
            blocks = []
            for index in range(n):
                stride = 2 if index == 0 and outputs > 16 else 1
                blocks.append(BasicBlock(inputs, outputs, stride, option_a))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(64, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] → logits [B, classes]."""
        x = relu(self.bn1(self.conv1(x)))
        return self.linear(pooled(self.layer3(self.layer2(self.layer1(x)))))  # type: ignore[no-any-return]


class StemResNet(nn.Module):
    """ImageNet's ResNet with a 3x3 stem and no first pooling, as everyone uses it on CIFAR."""

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], counts: tuple[int, ...], classes: int, channels: int
    ):
        super().__init__()
        expansion = 4 if block is Bottleneck else 1
        self.conv1, self.bn1 = conv3(channels, 64), nn.BatchNorm2d(64)
        stages, inputs = [], 64
        for number, count in enumerate(counts):
            outputs, blocks = 64 * 2**number, []
            for index in range(count):
                blocks.append(block(inputs, outputs, 2 if index == 0 and number else 1))
                inputs = outputs * expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = nn.Linear(inputs, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] → logits [B, classes]."""
        x = relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(pooled(x))  # type: ignore[no-any-return]


class WideBlock(nn.Module):
    """Pre-activation block (Zagoruyko & Komodakis, BMVC 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv3(outputs, outputs)
        self.shortcut = conv1(inputs, outputs, stride) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C', H', W']."""
        out = relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return shortcut + self.conv2(relu(self.bn2(self.conv1(out))))  # type: ignore[no-any-return]


class WideResNet(nn.Module):
    """WRN-d-k (Zagoruyko & Komodakis, BMVC 2016)."""

    def __init__(self, depth: int, width: int, classes: int, channels: int) -> None:
        super().__init__()
        n = (depth - 4) // 6
        self.conv1 = conv3(channels, 16)
        stages, inputs = [], 16
        for number, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            blocks = []
            for index in range(n):
                blocks.append(WideBlock(inputs, outputs, 2 if index == 0 and number else 1))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        self.block1, self.block2, self.block3 = stages
        self.bn1, self.fc = nn.BatchNorm2d(inputs), nn.Linear(inputs, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] → logits [B, classes]."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(pooled(relu(self.bn1(x))))  # type: ignore[no-any-return]


class InvertedResidual(nn.Module):
    """Expand, depthwise, project (Sandler et al., CVPR 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.conv1, self.bn1 = conv1(inputs, hidden), nn.BatchNorm2d(hidden)
        self.conv2, self.bn2 = conv3(hidden, hidden, stride, groups=hidden), nn.BatchNorm2d(hidden)
        self.conv3, self.bn3 = conv1(hidden, outputs), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module | None = None
        if stride == 1:
            project = nn.Sequential(conv1(inputs, outputs), nn.BatchNorm2d(outputs))
            self.shortcut = nn.Sequential() if inputs == outputs else project

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C', H', W']."""
        out = relu(self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))))
        out = self.bn3(self.conv3(out))
        return out if self.shortcut is None else out + self.shortcut(x)  # type: ignore[no-any-return]


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al., CVPR 2018) with the strides that people use on 32x32 images."""

    SETTINGS = (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(channels, 32), nn.BatchNorm2d(32)
        blocks, inputs = [], 32
        for expansion, outputs, count, stride in self.SETTINGS:
            for index in range(count):
                blocks.append(InvertedResidual(inputs, outputs, stride if index == 0 else 1, expansion))
                inputs = outputs
        self.layers = nn.Sequential(*blocks)
        self.conv2, self.bn2 = conv1(320, 1280), nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] → logits [B, classes]."""
        x = self.layers(relu(self.bn1(self.conv1(x))))
        return self.linear(pooled(relu(self.bn2(self.conv2(x)))))  # type: ignore[no-any-return]


class ShuffleUnit(nn.Module):
    """Split, depthwise branch, concatenate, shuffle (Ma et al., ECCV 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, half = stride, outputs // 2
        enter = inputs if stride > 1 else inputs // 2
        self.branch = nn.Sequential(
            conv1(enter, half),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            conv3(half, half, stride, groups=half),
            nn.BatchNorm2d(half),
            conv1(half, half),
            nn.BatchNorm2d(half),
            nn.ReLU(),
        )
        self.shortcut: nn.Module = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(
                conv3(inputs, inputs, stride, groups=inputs),
                nn.BatchNorm2d(inputs),
                conv1(inputs, half),
                nn.BatchNorm2d(half),
                nn.ReLU(),
            )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C', H', W']."""
        kept, changed = x.chunk(2, 1) if self.stride == 1 else (x, x)
        out = torch.stack([self.shortcut(kept), self.branch(changed)], 2)
        return out.flatten(1, 2)


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 1x (Ma et al., ECCV 2018) with a stride-1 stem for 32x32 images."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(channels, 24), nn.BatchNorm2d(24)
        blocks, inputs = [], 24
        for outputs, count in ((116, 4), (232, 8), (464, 4)):
            for index in range(count):
                blocks.append(ShuffleUnit(inputs, outputs, 2 if index == 0 else 1))
                inputs = outputs
        self.layers = nn.Sequential(*blocks)
        self.conv2, self.bn2 = conv1(464, 1024), nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] → logits [B, classes]."""
        x = self.layers(relu(self.bn1(self.conv1(x))))
        return self.linear(pooled(relu(self.bn2(self.conv2(x)))))  # type: ignore[no-any-return]


class Vgg(nn.Module):
    """VGG with BatchNorm and one linear layer, as everyone uses it on CIFAR (Simonyan & Zisserman, ICLR 2015)."""

    COUNTS: ClassVar[dict[int, tuple[int, ...]]] = {
        11: (1, 1, 2, 2, 2),
        13: (2, 2, 2, 2, 2),
        16: (2, 2, 3, 3, 3),
        19: (2, 2, 4, 4, 4),
    }

    def __init__(self, depth: int, classes: int, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for count, outputs in zip(self.COUNTS[depth], (64, 128, 256, 512, 512), strict=True):
            for _ in range(count):
                layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
                channels = outputs
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] → logits [B, classes]."""
        return self.classifier(pooled(self.features(x)))  # type: ignore[no-any-return]


class Cnn(nn.Module):
    """A plain network: convolution, BatchNorm, ReLU, pooling, once per width."""

    def __init__(self, widths: tuple[int, ...], classes: int, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, outputs in enumerate(widths):
            layers += [conv3(channels, outputs), nn.BatchNorm2d(outputs), nn.ReLU()]
            if number < len(widths) - 1:
                layers.append(nn.MaxPool2d(2))
            channels = outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] → logits [B, classes]."""
        return self.classifier(pooled(self.features(x)))  # type: ignore[no-any-return]
