"""What all strategies of replicas share: when one rank fails, the others end in time with an error that names it."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Any

from lightning.pytorch.strategies import DDPStrategy

from lightning_distopt.exchange import network_failures, roll_call
from lightning_distopt.strategies.attempts import meet_again
from lightning_distopt.strategies.compat import begin_next_epoch, is_interrupted
from lightning_distopt.strategies.launchers import PatientProcesses, PatientScripts
from lightning_distopt.strategies.watch import Watch
from lightning_distopt.strategies.whole import read_safely

__all__ = ["WatchedDDPStrategy"]


class WatchedDDPStrategy(DDPStrategy):
    """Base class of the strategies of replicas, which begin to watch in ``configure_ddp``.

    Args:
        **ddp_kwargs: of ``DDPStrategy``.
    """

    def __init__(self, **ddp_kwargs: Any) -> None:
        super().__init__(**ddp_kwargs)
        self.watch = Watch(self)

    # ---- lifecycle --------------------------------------------------------------------------------------------------

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        start: Any = self._start_method
        if start == "popen":
            self._launcher = PatientScripts(self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = PatientProcesses(self, start_method=start)

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        timeout = timedelta(seconds=self.patience)
        meet_again(self.global_rank, self.world_size, self.process_group_backend, self.root_device, timeout)
        super().setup_distributed()

    def on_train_start(self) -> None:
        super().on_train_start()
        self.watch.guard_signals()
        assert self.lightning_module is not None
        begin_next_epoch(self.lightning_module.trainer)

    def on_exception(self, exception: BaseException) -> None:
        roll_call.leave_last_words(f"{type(exception).__name__}: {exception}")
        super().on_exception(exception)

    def teardown(self) -> None:
        self.watch.end()
        super().teardown()

    # ---- when a rank fails ------------------------------------------------------------------------------------------

    @property
    def round(self) -> int:
        """Number of the exchange that comes next."""
        raise NotImplementedError

    @property
    def torn(self) -> bool:
        """Whether an exchange failed in the middle of a step, so that ranks may hold different models."""
        return self.watch.torn

    @property
    def is_ending(self) -> bool:
        """Whether an exception is ending what the trainer does, so that other ranks may be anywhere."""
        module = self.lightning_module
        return module is not None and is_interrupted(module.trainer)

    @property
    def patience(self) -> float:
        """Seconds after which a rank that does not answer counts as gone: the process group's time-out."""
        return self._timeout.total_seconds() if self._timeout is not None else 1800.0

    # ---- collectives of Lightning's ---------------------------------------------------------------------------------

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if self.torn or self.is_ending:
            return  # the others are elsewhere
        with network_failures(self.global_rank, self.round, doing="meet at a barrier"):
            super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        with network_failures(self.global_rank, self.round, doing="broadcast an object"):
            return super().broadcast(obj, src)

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        with network_failures(self.global_rank, self.round, doing="reduce a value"):
            return super().reduce(tensor, group, reduce_op)

    # ---- files ------------------------------------------------------------------------------------------------------

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        # From the network, too, nothing is loaded that could run code, unless asked for.
        load = partial(super().load_checkpoint, checkpoint_path, weights_only=weights_only is not False)
        return read_safely(str(checkpoint_path), load)
