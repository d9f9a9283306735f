"""Image classifiers by name: the CIFAR residual networks, and torchvision's models for ImageNet.

Source: arXiv:1512.03385, section 4.2 (CIFAR networks of depth 6n+2 with parameter-free shortcuts, "option A").

    image (C, H, W) -> conv 3x3, w maps
                    -> n blocks, w  maps, H   x W
                    -> n blocks, 2w maps, H/2 x W/2
                    -> n blocks, 4w maps, H/4 x W/4
                    -> mean over the positions -> linear
"""

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

ModelName = Literal[
    "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet50", "densenet121", "mobilenet_v2"
]

CIFAR_BLOCKS: dict[str, int] = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}
"""Blocks in each of the three stages; the depth in the name is 6 * blocks + 2."""

TORCHVISION_MODELS: tuple[str, ...] = ("resnet50", "densenet121", "mobilenet_v2")
"""Names in ``torchvision.models``, built with random weights."""

DEFAULT_WIDTH = 16


def _conv3x3(in_maps: int, out_maps: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_maps, out_maps, kernel_size=3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: ``relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))``.

    Where the shape changes, the shortcut takes every second position and pads the new maps with zeros (option A):
    it has no parameter.
    """

    def __init__(self, in_maps: int, out_maps: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv3x3(in_maps, out_maps, stride), nn.BatchNorm2d(out_maps)
        self.conv2, self.norm2 = _conv3x3(out_maps, out_maps), nn.BatchNorm2d(out_maps)
        self.stride, self.new_maps = stride, out_maps - in_maps

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_maps, H, W)`` to ``(N, out_maps, H / stride, W / stride)``."""
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        if self.stride != 1 or self.new_maps:
            before = self.new_maps // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_maps - before))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """Residual network of depth ``6 * blocks + 2`` for small images.

    Args:
        blocks: residual blocks in each of the three stages, at least 1; 9 gives ResNet-56.
        num_classes: outputs of the linear layer, at least 1.
        in_channels: channels of the images: 3 for colour, 1 for grey.
        width: maps of the first stage, at least 1; parameters and time grow with its square.
    """

    def __init__(self, blocks: int, num_classes: int, in_channels: int = 3, width: int = DEFAULT_WIDTH) -> None:
        super().__init__()
        self.stem, self.norm = _conv3x3(in_channels, width), nn.BatchNorm2d(width)
        layers: list[nn.Module] = []
        maps = width
        for stage in range(3):
            for block in range(blocks):
                out_maps, stride = width * 2**stage, 2 if stage > 0 and block == 0 else 1
                layers.append(BasicBlock(maps, out_maps, stride))
                maps = out_maps
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(maps, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of shape ``(N, num_classes)`` for images of shape ``(N, in_channels, H, W)``."""
        x = F.relu(self.norm(self.stem(images)))
        x = self.blocks(x)
        return self.head(x.mean(dim=(2, 3)))


def _build_torchvision(name: str, num_classes: int) -> nn.Module:
    # Imported here: it costs seconds, and the small networks do not need it.
    import torchvision.models

    build: Callable[..., nn.Module] = getattr(torchvision.models, name)
    return build(weights=None, num_classes=num_classes)


def build_model(name: ModelName, num_classes: int, in_channels: int = 3, width: int = DEFAULT_WIDTH) -> nn.Module:
    """Build a model with random weights.

    Args:
        name: one of :data:`ModelName`.
        num_classes: outputs, at least 1.
        in_channels: channels of the images, at least 1; torchvision's models take 3 only.
        width: maps of the first stage of the CIFAR networks; torchvision's models take the default only.

    Raises:
        ValueError: if the name is unknown, a number is below 1, or a torchvision model is asked for other channels
            or another width.

    Example:
        >>> sum(p.numel() for p in build_model("resnet56", num_classes=10).parameters())
        853018
    """
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels), ("width", width)):
        if value < 1:
            raise ValueError(f"`{argument}` must be at least 1: got {value}.")
    if name in CIFAR_BLOCKS:
        return CifarResNet(CIFAR_BLOCKS[name], num_classes, in_channels, width)
    if name not in TORCHVISION_MODELS:
        raise ValueError(f"`name` must be one of {', '.join([*CIFAR_BLOCKS, *TORCHVISION_MODELS])}: got {name!r}.")
    if in_channels != 3 or width != DEFAULT_WIDTH:
        raise ValueError(
            f"`{name}` takes `in_channels=3` and `width={DEFAULT_WIDTH}` only: got {in_channels} and {width}. "
            f"Leave both at their defaults, or choose one of {', '.join(CIFAR_BLOCKS)}."
        )
    return _build_torchvision(name, num_classes)
