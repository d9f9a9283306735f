"""Logs what comes back from the end of a pipeline, and how busy it is; drains it before other callbacks see the end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_distopt.model_parallel.queues import Queues
from lightning_distopt.strategies.compat import loggers_write_now

if TYPE_CHECKING:
    from lightning_distopt.strategies.stale_pipeline import StalePipelineStrategy

__all__ = ["PipelineMonitor"]


class PipelineMonitor(Callback):
    """Added by the strategy itself, before all others.

    ============================  ================================================================================
    ``train/loss``, metrics       of the batches whose figures arrived since the last batch
    ``pipeline/staleness``        batches between what rank 0 forwards and what it back-propagates
    ``pipeline/bubble_fraction``  share of the time since the last log in which rank 0 neither forwarded nor back-propagated
    ``pipeline/stored_inputs``    inputs or graphs that rank 0 holds
    ``pipeline/skipped``          updates that rank 0 skipped because of gradients that were not finite
    ``pipeline/bytes_sent``       bytes that rank 0 sent a batch, since the last log
    ``pipeline/wait_seconds``     seconds a batch that rank 0 waited for its neighbours
    ``pipeline/queue_depth``      messages that rank 0 has sent and, as far as it knows, its neighbours have not read
    ============================  ================================================================================

    With ``drain_every_epoch`` also, at the end of each epoch, for every hop k, from stage k to k+1:
    ``pipeline/hop_k/bytes_forward`` and ``.../bytes_back`` (of activations and gradients, a message),
    ``.../queue_forward`` and ``.../queue_back`` (messages sent and not read, mean over batches).
    """

    def __init__(self) -> None:
        self._last = (0.0, 0.0, 0, 0.0, 0)
        self._queues = Queues({})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = self._now(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        engine = self._strategy(trainer).engine
        self._queues = Queues(engine.hops if engine is not None else {})

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        strategy = self._strategy(trainer)
        figures, strategy.figures = strategy.figures, {}
        for batch in sorted(figures):
            pl_module.log_figures("train", figures[batch], strategy.batch_size)  # type: ignore[operator]
        self._queues.look()
        if not loggers_write_now(trainer) or strategy.engine is None:
            return
        now, before = self._now(trainer), self._last
        self._last = now
        batches = max(1, now[4] - before[4])
        elapsed = max(1e-9, now[0] - before[0])
        engine = strategy.engine
        pl_module.log_dict(
            {
                "pipeline/staleness": float(max(strategy.plan.staleness[k] for k in engine.stages)),
                "pipeline/bubble_fraction": max(0.0, 1.0 - (now[1] - before[1]) / elapsed),
                "pipeline/stored_inputs": float(sum(len(stage) for stage in engine.stages.values())),
                "pipeline/skipped": float(strategy.skipped),
                "pipeline/bytes_sent": (now[2] - before[2]) / batches,
                "pipeline/wait_seconds": (now[3] - before[3]) / batches,
                "pipeline/queue_depth": float(self._queues.deepest()),
            }
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = self._strategy(trainer)
        if strategy.drain_every_epoch:  # all have come to the end anyway
            pl_module.log_dict(strategy.from_all(self._queues.means()))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let those that come after find all updates done: what averages weights leaves the average in the model here."""
        self._strategy(trainer).drain()

    def _now(self, trainer: pl.Trainer) -> tuple[float, float, int, float, int]:
        strategy = self._strategy(trainer)
        busy = strategy.engine.busy if strategy.engine is not None else 0.0
        meter = strategy.meter
        return time.perf_counter(), busy, meter.bytes_sent, meter.seconds["exchange"], trainer.global_step

    @staticmethod
    def _strategy(trainer: pl.Trainer) -> StalePipelineStrategy:
        strategy: Any = trainer.strategy
        found: StalePipelineStrategy = strategy
        return found
