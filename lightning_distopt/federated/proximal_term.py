"""FedProx: each client stays near the model that it received.

    minimise  F_k(y) + (mu / 2) |y - w|²            gradient + mu (y - w)

Source: arXiv:1812.06127.
"""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["ProximalTerm"]


class ProximalTerm(Callback):
    """Add ``mu (y - w)`` to the gradient before each optimizer step, before gradients are clipped.

    Args:
        mu: at least 0; 0.01 to 1 are common.
    """

    def __init__(self, mu: float) -> None:
        self.mu = mu
        self.anchor: dict[Tensor, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.anchor = {param: param.detach().clone() for param in pl_module.parameters() if param.requires_grad}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if param.grad is not None and param in self.anchor:
                        param.grad.add_(param - self.anchor[param], alpha=self.mu)
