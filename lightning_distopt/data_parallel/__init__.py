"""Replicas talk: the engines behind compressed data parallelism.

:class:`GradientSync` compresses gradients inside backward; :class:`UpdateSync` compresses what local optimizer steps did, and
an :class:`OuterOptimizer` says what the replicas do with the average.
"""

from lightning_distopt.data_parallel.fed_mom import FedMom
from lightning_distopt.data_parallel.gradient_sync import GradientSync
from lightning_distopt.data_parallel.outer_optimizer import OuterOptimizer, Plain
from lightning_distopt.data_parallel.torch_outer import TorchOuter
from lightning_distopt.data_parallel.update_sync import UpdateSync, UpdateSyncConfig

__all__ = ["FedMom", "GradientSync", "OuterOptimizer", "Plain", "TorchOuter", "UpdateSync", "UpdateSyncConfig"]
