"""The CIFAR residual networks as a chain of layers: one module for one device, ``ddp`` and every pipeline."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_distopt import LayeredModule
from recipes.resnet.models import CIFAR_BLOCKS, DEFAULT_WIDTH, CifarResNet
from recipes.scheduled import scheduled

CifarName = Literal["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]


class Classify(nn.Module):
    """Mean over the positions, then a linear layer.

    Args:
        linear: from channels to classes.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape ``(N, num_classes)`` for maps of shape ``(N, maps, H, W)``."""
        return self.linear(x.mean(dim=(2, 3)))


class LayeredClassifier(LayeredModule):
    """Train and evaluate a CIFAR residual network, layer by layer: stem, residual blocks, classifier.

    Logs ``train/loss``, ``val/loss``, ``test/loss`` and the accuracies.

    Args:
        model: ``resnet20`` to ``resnet110``; weights start at random.
        num_classes: number of classes, at least 2.
        in_channels: channels of the images: 3 for colour, 1 for grey.
        width: maps of the first stage, at least 1.
        image_size: height and width of the images, for the example by which layers are balanced over devices.
        optimizer: any torch optimizer by class, with its arguments and without the parameters.
        scheduler: any learning-rate scheduler by class; ``null`` keeps the rate constant.
        scheduler_interval: what the scheduler counts: ``epoch`` or optimizer ``step``.
    """

    def __init__(
        self,
        model: CifarName = "resnet20",
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = DEFAULT_WIDTH,
        image_size: int = 32,
        optimizer: OptimizerCallable = torch.optim.SGD,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"`num_classes` must be at least 2: got {num_classes}.")
        whole = CifarResNet(CIFAR_BLOCKS[model], num_classes, in_channels, width)
        stem = nn.Sequential(whole.stem, whole.norm, nn.ReLU())
        self.layers = nn.Sequential(stem, *whole.blocks, Classify(whole.head))
        self.example_input_array = torch.zeros(16, in_channels, image_size, image_size)
        self.optimizer, self.scheduler, self.scheduler_interval = optimizer, scheduler, scheduler_interval

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross-entropy."""
        return F.cross_entropy(output, target)

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the accuracy."""
        return {"accuracy": (output.argmax(dim=1) == target).float().mean()}

    def configure_optimizers(self) -> Any:
        """Build the optimizer over all parameters; a pipeline keeps each device's own."""
        return scheduled(self.optimizer(self.parameters()), self.scheduler, self.scheduler_interval)
