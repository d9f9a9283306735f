"""Every private name of Lightning and torch that this package touches; ``tests/strategies/test_compat.py`` tests each.

======================================================  ==========================================================
name                                                    use
======================================================  ==========================================================
``DDPStrategy._register_ddp_hooks``                     overridden: Lightning attaches hooks on CUDA only (2.6.6)
``Strategy._precision_plugin``                          written by our ``precision_plugin`` setter, as FSDPStrategy does
``Trainer._logger_connector.should_update_logs``        read: whether loggers write now, as Lightning's monitors do
``Trainer.fit_loop._skip_backward``                     read: the pass for BatchNorm of StochasticWeightAveraging
``torch._foreach_norm``                                 the norms of all parameters in one call, as in torch.nn.utils
``DistributedDataParallel._get_ddp_logging_data``       tests only: the name of the attached hook
``DDPStrategy._ddp_kwargs``                             tests only: what reached DistributedDataParallel
``DDPStrategy._timeout``                                tests only: what reached the process group
``_MultiProcessingLauncher._start_method``              tests only: how processes are started
======================================================  ==========================================================
"""

from __future__ import annotations

import lightning.pytorch as pl

__all__ = ["backward_is_skipped", "loggers_write_now"]


def loggers_write_now(trainer: pl.Trainer) -> bool:
    """Whether values logged in ``on_train_batch_end`` reach the loggers: every ``log_every_n_steps`` batches that stepped."""
    return bool(trainer._logger_connector.should_update_logs)


def backward_is_skipped(trainer: pl.Trainer) -> bool:
    """Whether the training steps of this epoch only look at the data, as for the BatchNorm statistics of averaged weights."""
    return bool(trainer.fit_loop._skip_backward)
