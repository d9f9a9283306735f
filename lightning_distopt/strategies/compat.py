"""Every private name of Lightning and torch that this package touches; ``tests/strategies/test_compat.py`` tests each.

====================================================  ==================================================================
name                                                  use
====================================================  ==================================================================
``DDPStrategy._register_ddp_hooks``                   overridden: Lightning attaches hooks on CUDA only (2.6.6)
``DDPStrategy._configure_launcher``                   overridden: our launchers let survivors of a failure speak
``DDPStrategy._launcher``                             written by it
``DDPStrategy._start_method``                         read by it
``DDPStrategy._timeout``                              read: how long a rank waits for the others' notes
``Strategy._precision_plugin``                        written by our ``precision_plugin`` setter, as FSDPStrategy does
``_SubprocessScriptLauncher._call_children_scripts``  called by our launcher, which watches the children another way
``Trainer._logger_connector.should_update_logs``      read: whether loggers write now, as Lightning's monitors do
``Trainer.fit_loop._skip_backward``                   read: the pass for BatchNorm of StochasticWeightAveraging
``distributed_c10d._get_default_store``               the store of the process group, for notes between ranks
``_BaseDataLoaderIter._next_index``                   the next batch's indices, to skip it without reading it
``torch._foreach_norm``                               the norms of all parameters in one call, as in torch.nn.utils
``DistributedDataParallel._get_ddp_logging_data``     tests only: the name of the attached hook
``DDPStrategy._ddp_kwargs``                           tests only: what reached DistributedDataParallel
====================================================  ==================================================================
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerStatus

__all__ = ["backward_is_skipped", "default_store", "is_interrupted", "loggers_write_now", "skip_batches"]


def default_store() -> Any:
    """Return the store that the default process group was made with."""
    return dist.distributed_c10d._get_default_store()


def is_interrupted(trainer: pl.Trainer) -> bool:
    """Whether an exception is ending what the trainer does."""
    return trainer.state.status == TrainerStatus.INTERRUPTED


def skip_batches(iterator: Any, number: int) -> None:
    """Let a ``DataLoader``'s iterator without worker processes go over some batches without reading them."""
    for _ in range(number):
        iterator._next_index()


def loggers_write_now(trainer: pl.Trainer) -> bool:
    """Whether values logged in ``on_train_batch_end`` reach the loggers: every ``log_every_n_steps`` batches that stepped."""
    return bool(trainer._logger_connector.should_update_logs)


def backward_is_skipped(trainer: pl.Trainer) -> bool:
    """Whether the training steps of this epoch only look at the data, as for the BatchNorm statistics of averaged weights."""
    return bool(trainer.fit_loop._skip_backward)
