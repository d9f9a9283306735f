"""Optimizers for ``torch.optim``'s place: one a file."""

from lightning_distopt.optimizers.residual_schemes import Average, Ema, Periodic, ResidualScheme, Sign, Sparsify
from lightning_distopt.optimizers.rsgd import RSGD

__all__ = ["RSGD", "Average", "Ema", "Periodic", "ResidualScheme", "Sign", "Sparsify"]
