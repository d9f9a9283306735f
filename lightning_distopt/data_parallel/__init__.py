"""Replicas talk: the engines behind compressed data parallelism.

:class:`GradientSync` compresses gradients inside backward; :class:`UpdateSync` compresses what local optimizer steps did.
"""

from lightning_distopt.data_parallel.gradient_sync import GradientSync
from lightning_distopt.data_parallel.update_sync import UpdateSync, UpdateSyncConfig

__all__ = ["GradientSync", "UpdateSync", "UpdateSyncConfig"]
