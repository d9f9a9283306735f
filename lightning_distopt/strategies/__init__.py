"""Lightning strategies: thin lifecycles over the engines."""

from lightning_distopt.strategies.auto import AutoCompressedDDPStrategy
from lightning_distopt.strategies.compressed_ddp import CompressedDDPStrategy
from lightning_distopt.strategies.dsp import DSPStrategy
from lightning_distopt.strategies.local_update import LocalUpdateStrategy
from lightning_distopt.strategies.ouroboros import OuroborosStrategy
from lightning_distopt.strategies.pipeline import PipelineStrategy
from lightning_distopt.strategies.registry import StrategyRecord, list_strategies, register
from lightning_distopt.strategies.stale_pipeline import StalePipelineStrategy
from lightning_distopt.strategies.whole import newest_whole_checkpoint
from lightning_distopt.strategies.zo_ddp import ZeroOrderDDPStrategy

__all__ = [
    "AutoCompressedDDPStrategy",
    "CompressedDDPStrategy",
    "DSPStrategy",
    "LocalUpdateStrategy",
    "OuroborosStrategy",
    "PipelineStrategy",
    "StalePipelineStrategy",
    "StrategyRecord",
    "ZeroOrderDDPStrategy",
    "list_strategies",
    "newest_whole_checkpoint",
    "register",
]
