"""Every private name of Lightning and torch that this package touches; ``tests/strategies/test_compat.py`` tests each.

=============================================  ========================================================================
name                                           use
=============================================  ========================================================================
``DDPStrategy._register_ddp_hooks``            overridden: Lightning attaches hooks on CUDA devices only (2.6.6)
``DDPStrategy._ddp_kwargs``                    read: which arguments the user gave to DDP
``Strategy._precision_plugin``                 written by our ``precision_plugin`` setter, like FSDPStrategy's
``_TrainingEpochLoop._batches_that_stepped``    read: whether loggers write in this batch, like LearningRateMonitor (2.6.6)
``DistributedDataParallel._get_ddp_logging_data``  tests only: the name of the attached hook
``torch._foreach_norm``                        one call for the norms of all parameters, as torch's own optimizers do
=============================================  ========================================================================
"""

from __future__ import annotations

import inspect
from typing import Any

import lightning.pytorch as pl
from torch.nn.parallel import DistributedDataParallel

__all__ = ["check_ddp_arguments", "loggers_write_now"]


def check_ddp_arguments(strategy: str, arguments: dict[str, Any]) -> None:
    """Raise at construction for a keyword that ``DistributedDataParallel`` would refuse only at the start of the fit.

    Raises:
        TypeError: naming the unknown arguments and the known ones.
    """
    known = [p for p in inspect.signature(DistributedDataParallel.__init__).parameters if p not in ("self", "module")]
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise TypeError(
            f"`{strategy}` got unknown arguments {unknown}: what it does not know itself goes to DistributedDataParallel, "
            f"which takes {', '.join(known)}. Check the spelling."
        )


def loggers_write_now(trainer: pl.Trainer) -> bool:
    """Whether values logged in ``on_train_batch_end`` reach the loggers: every ``log_every_n_steps`` batches that stepped."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning's logger connector
    return (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0
