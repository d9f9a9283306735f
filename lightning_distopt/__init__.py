"""PyTorch Lightning plugins for training where the network is the problem.

``import lightning_distopt`` makes the strategy names known: ``Trainer(strategy="compressed_ddp")``.
"""

from importlib.metadata import version

from lightning_distopt import callbacks, compressors, data_parallel, model_parallel, optimizers
from lightning_distopt.model_parallel.layered import LayeredModule
from lightning_distopt.resumable_loader import ResumableLoader
from lightning_distopt.strategies import (
    AutoCompressedDDPStrategy,
    CompressedDDPStrategy,
    DSPStrategy,
    LocalUpdateStrategy,
    OuroborosStrategy,
    PipelineStrategy,
    StalePipelineStrategy,
    ZeroOrderDDPStrategy,
    list_strategies,
    newest_whole_checkpoint,
    register,
)

__version__ = version("lightning-distopt")
__all__ = [
    "AutoCompressedDDPStrategy",
    "CompressedDDPStrategy",
    "DSPStrategy",
    "LayeredModule",
    "LocalUpdateStrategy",
    "OuroborosStrategy",
    "PipelineStrategy",
    "ResumableLoader",
    "StalePipelineStrategy",
    "ZeroOrderDDPStrategy",
    "callbacks",
    "compressors",
    "data_parallel",
    "list_strategies",
    "model_parallel",
    "newest_whole_checkpoint",
    "optimizers",
    "register",
]

register()
