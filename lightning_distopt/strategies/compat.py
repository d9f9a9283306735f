"""Every private name of Lightning and torch that this package touches; ``tests/strategies/test_compat.py`` tests each.

=============================================================  ==============================================================
name                                                           use
=============================================================  ==============================================================
``DDPStrategy._register_ddp_hooks``                            overridden: Lightning attaches hooks on CUDA only (2.6.6)
``DDPStrategy._configure_launcher``                            overridden: our launchers let survivors of a failure speak
``DDPStrategy._start_method``                                  read by it
``DDPStrategy._timeout``                                       read: how long a rank waits for the others' notes
``Strategy._precision_plugin``                                 written by our ``precision_plugin`` setter, as FSDP's
``_SubprocessScriptLauncher._call_children_scripts``           called by our launcher, which watches the children another way
``Trainer._logger_connector.should_update_logs``               read: whether loggers write now, as Lightning's monitors do
``Trainer._signal_connector.received_sigterm``                 written: that SIGTERM came, without a collective
``Trainer.fit_loop._skip_backward``                            read: the pass for BatchNorm of StochasticWeightAveraging
``distributed_c10d._get_default_store``                        the store of the process group, for notes between ranks
``_BaseDataLoaderIter._next_index``                            the next batch's indices, to skip it without reading it
``torch._foreach_norm``                                        the norms of all parameters in one call, as in torch.nn.utils
``Strategy._launcher``                                         written by it, and by pipelines
``ParallelStrategy._layer_sync``                               read: whether `sync_batchnorm` was asked for, to refuse it
``launchers._MultiProcessingLauncher``                         processes by fork, spawn or forkserver
``launchers._SubprocessScriptLauncher``                        processes by running the script again
``distributed._init_dist_connection``                          the process group, as DDPStrategy makes it
``distributed._get_default_process_group_backend_for_device``  gloo or nccl, by device
``fit_loop.epoch_loop._broadcast_sigterm_tensor``              silenced: a broadcast a batch would tie free stages together
``WeightAveraging._average_model``                             read: a pipeline averages the part of it that it trains
``PipelineStage._get_init_p2p_neighbors_ops``                  wrapped: in a V a stage's neighbour may be in its own process
``DistributedDataParallel._get_ddp_logging_data``              tests only: the name of the attached hook
``DDPStrategy._ddp_kwargs``                                    tests only: what reached DistributedDataParallel
=============================================================  ==============================================================
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities import distributed
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerStatus
from torch.optim.swa_utils import AveragedModel

from lightning_distopt.strategies.attempts import meet_again
from lightning_distopt.strategies.launchers import PatientProcesses, PatientScripts

if TYPE_CHECKING:
    from lightning_distopt.strategies.process_group import ProcessGroupStrategy

__all__ = [
    "average_of",
    "backward_is_skipped",
    "begin_next_epoch",
    "connect_processes",
    "default_store",
    "is_interrupted",
    "launcher_for",
    "loggers_write_now",
    "note_sigterm",
    "silence_sigterm_broadcast",
    "skip_batches",
    "without_greetings_to_itself",
]


def default_store() -> Any:
    """Return the store that the default process group was made with."""
    return dist.distributed_c10d._get_default_store()


def is_interrupted(trainer: pl.Trainer) -> bool:
    """Whether an exception is ending what the trainer does."""
    return trainer.state.status == TrainerStatus.INTERRUPTED


def note_sigterm(trainer: pl.Trainer) -> None:
    """Let the trainer know of SIGTERM; it tells all ranks before the next batch, in the order of their collectives."""
    trainer._signal_connector.received_sigterm = True


def begin_next_epoch(trainer: pl.Trainer) -> None:
    """Let a fit that resumes from the last batch of an epoch count the next epoch as begun.

    Lightning (2.6.6) trains it without that, and a run that is interrupted again inside of it would repeat its beginning.
    """
    loop = trainer.fit_loop
    steps = loop.epoch_loop
    if loop.restarted_mid_epoch and steps.restarted_on_train_batch_end and steps.batch_progress.is_last_batch:
        loop.reset_restart_stage()


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


def average_of(callback: WeightAveraging) -> AveragedModel:
    """Return the averaged model of a callback that was set up for a fit."""
    average = callback._average_model
    assert average is not None
    return average


def launcher_for(strategy: ProcessGroupStrategy, start_method: str) -> Any:
    """Return what starts the processes of a strategy."""
    if start_method != "popen":
        return PatientProcesses(strategy, start_method=start_method)  # type: ignore[arg-type]
    assert strategy.cluster_environment is not None
    return PatientScripts(strategy.cluster_environment, strategy.num_processes, strategy.num_nodes)


def connect_processes(
    environment: ClusterEnvironment, backend: str | None, device: torch.device, timeout: timedelta
) -> None:
    """Make the default process group."""
    backend = backend or distributed._get_default_process_group_backend_for_device(device)
    device_id = device if device.type != "cpu" else None
    meet_again(environment.global_rank(), environment.world_size(), backend, device, timeout)
    distributed._init_dist_connection(environment, backend, timeout=timeout, device_id=device_id)


def silence_sigterm_broadcast(trainer: pl.Trainer) -> None:
    """Take out the broadcast from rank 0 before every batch, by which Lightning tells of a SIGTERM.

    It would hold every stage back until stage 0 begins the same tick. A SIGTERM still ends the process that gets it, and its
    neighbours with a typed error.
    """
    loop = trainer.fit_loop.epoch_loop
    try:
        known = loop._broadcast_sigterm_tensor
    except AttributeError:  # 2.6.0
        return
    assert callable(known)
    vars(loop)["_broadcast_sigterm_tensor"] = _nothing


def without_greetings_to_itself(stage: Any) -> Any:
    """Return a stage of ``torch.distributed.pipelining`` that does not greet neighbours in its own process.

    Before the first batch torch up to 2.13 sends one number to each neighbour, which Gloo cannot within a process ("Pair is not
    connected"). Batches go from stage to stage of one process without messages.
    """
    try:
        greet = stage._get_init_p2p_neighbors_ops
    except AttributeError:  # 2.15
        return stage
    vars(stage)["_get_init_p2p_neighbors_ops"] = lambda: [op for op in greet() if op.group_peer != stage.group_rank]
    return stage


def _nothing() -> None:
    pass
