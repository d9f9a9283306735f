"""Lightning strategies: thin lifecycles over the engines."""

from lightning_distopt.strategies.compressed_ddp import CompressedDDPStrategy
from lightning_distopt.strategies.registry import StrategyRecord, list_strategies, register

__all__ = ["CompressedDDPStrategy", "StrategyRecord", "list_strategies", "register"]
