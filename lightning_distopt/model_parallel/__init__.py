"""Stages talk: the engine behind pipelines with stale gradients."""

from lightning_distopt.model_parallel.simulate import simulate
from lightning_distopt.model_parallel.staleness import StalenessPlan

__all__ = ["StalenessPlan", "simulate"]
