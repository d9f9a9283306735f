"""What the network carries while training, in any logger, and as a table at the end."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy

from lightning_distopt.exchange.meter import NOT_IN_STEPS, Meter, ring_all_reduce_bytes
from lightning_distopt.strategies.checks import count
from lightning_distopt.strategies.compat import loggers_write_now

__all__ = ["CommunicationMonitor"]


class CommunicationMonitor(Callback):
    """Logs what rank 0 sends, receives and waits for; prints a table when the fit ends.

    ========================  ====================================================================================
    ``comm/bytes_sent``       bytes that rank 0 sent in an optimizer step, mean since the last log
    ``comm/bytes_received``   the same for received bytes
    ``comm/bytes_sent_total`` bytes sent in all optimizer steps so far
    ``comm/compression_ratio``  bytes that ``ddp`` would have sent, over the bytes sent, since the start of the fit
    ``comm/exchange_seconds`` seconds a step that the process waited for the network
    ``comm/encode_seconds``   seconds a step spent compressing and decoding
    ``feedback/residual_norm``  2-norm of rank 0's residual
    ``feedback/mismatch``     squared distance between where gradients are taken and the auxiliary point
    ``feedback/sidecars_lost``  files beside the loaded checkpoint, of all ranks, that could not be used
    ========================  ====================================================================================

    With ``non_finite="skip"`` or ``"zero"``, ``feedback/non_finite_steps`` counts the steps that were skipped or mended.

    What is sent before the first step, in validation and for ``mismatch_every`` is in the table only.

    Under plain ``ddp`` nothing counts, so the bytes are computed from the parameters (ring all-reduce of the gradients,
    broadcast of the buffers) and the seconds are left out. Under a stale pipeline rank 0's messages are counted,
    a step is an update, and the ratio compares with ``ddp`` on as many devices. Under other strategies on several devices,
    synchronous pipelines among them, nothing is logged.
    Values are logged every ``log_every_n_steps`` of the Trainer. ``summary`` holds the totals when the fit has ended.

    Args:
        mismatch_every: log ``feedback/mismatch`` every this many optimizer steps; it costs a dense all-reduce, counted
            as "diagnostics". 0: never.
        table: print the table at the end of the fit.
    """

    def __init__(self, mismatch_every: int = 0, table: bool = True) -> None:
        self.mismatch_every = count("mismatch_every", mismatch_every, 0)
        self.table = table
        self.summary: dict[str, float] = {}
        self._meter = Meter()
        self._last = (0, 0, 0, 0.0, 0.0)
        self._steps = (0, 0)
        self._last_mismatch = 0
        self._started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        counted = getattr(trainer.strategy, "counts_bytes", False)
        known = isinstance(trainer.strategy, DDPStrategy) or trainer.world_size == 1 or counted
        if not known:
            rank_zero_info(
                f"`CommunicationMonitor` does not know what `{type(trainer.strategy).__name__}` sends, and logs nothing. Use it "
                "with `compressed_ddp`, `ddp` or a stale pipeline."
            )
        meter = getattr(trainer.strategy, "meter", None) if known else Meter()
        self._meter = meter or _ComputedMeter(trainer)
        self._started = time.perf_counter()
        self._last = self._totals()
        self._steps, self._last_mismatch = (0, 0), 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if isinstance(self._meter, _ComputedMeter):
            self._meter.catch_up(trainer.global_step)
        before, self._steps = self._steps, (trainer.global_step, self._meter.steps)
        steps = self._meter.steps - self._last[0]
        if not steps or before == self._steps or not loggers_write_now(trainer):  # a micro-batch does not step
            return
        now = self._totals()
        per_step = [(new - old) / steps for new, old in zip(now, self._last, strict=True)]
        self._last = now
        figures = {
            "comm/bytes_sent": per_step[1],
            "comm/bytes_received": per_step[2],
            "comm/bytes_sent_total": float(now[1]),
        }
        if self._meter.step_bytes_sent:  # not on one device
            figures["comm/compression_ratio"] = self._meter.compression_ratio
        if not isinstance(self._meter, _ComputedMeter):
            figures |= {"comm/exchange_seconds": per_step[3], "comm/encode_seconds": per_step[4]}
        figures |= self._feedback(trainer)
        if getattr(trainer.strategy, "non_finite", "raise") != "raise":
            figures["feedback/non_finite_steps"] = float(trainer.strategy.non_finite_steps)  # type: ignore[attr-defined]
        pl_module.log_dict(figures)

    def _feedback(self, trainer: pl.Trainer) -> dict[str, float]:
        sync = getattr(trainer.strategy, "update_sync", None)
        gradient_sync = getattr(trainer.strategy, "gradient_sync", None)
        if gradient_sync is not None and gradient_sync.memory is not None:
            sync = gradient_sync
        if sync is None:
            return {}
        figures = {
            "feedback/residual_norm": sync.residual_norm(),
            "feedback/sidecars_lost": float(trainer.strategy.sidecars_lost),  # type: ignore[attr-defined]
        }
        if (
            sync is not gradient_sync
            and self.mismatch_every
            and self._meter.steps - self._last_mismatch >= self.mismatch_every
        ):
            self._last_mismatch = self._meter.steps
            figures["feedback/mismatch"] = sync.mismatch()
        return figures

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        meter, steps = self._meter, max(1, self._meter.steps)
        self.summary = {
            "steps": float(meter.steps),
            "seconds": time.perf_counter() - self._started,
            "bytes_sent": float(meter.step_bytes_sent),
            "bytes_received": float(meter.step_bytes_received),
            "bytes_sent_per_step": meter.step_bytes_sent / steps,
            "compression_ratio": meter.compression_ratio,
            "exchange_seconds": meter.seconds["exchange"],
            "encode_seconds": meter.seconds["encode"],
        }
        if self.table and meter.steps and trainer.is_global_zero:
            self._print(type(trainer.strategy).__name__)
            decision = getattr(trainer.strategy, "decision", None)
            if decision is not None:
                print(
                    f"chosen at the start: {decision['name']}, predicted {1e3 * decision['seconds']:.1f} ms / step; 16 bit "
                    f"{1e3 * decision['baseline_seconds']:.1f} ms / step"
                )

    def _print(self, strategy: str) -> None:
        from rich.console import Console
        from rich.table import Table

        steps = max(1, self._meter.steps)
        computed = isinstance(self._meter, _ComputedMeter)
        table = Table(title=f"Communication of rank 0 ({strategy}, {self._meter.steps} steps)", title_justify="left")
        for column in ("purpose", "sent / step", "received / step", "sent in all"):
            table.add_column(column, justify="left" if column == "purpose" else "right")
        for purpose in sorted(self._meter.sent, key=lambda p: -self._meter.sent[p]):
            sent, received = self._meter.sent[purpose], self._meter.received[purpose]
            if sent or received:
                each = ("", "") if purpose in NOT_IN_STEPS else (_si(sent / steps), _si(received / steps))
                table.add_row(purpose, *each, _si(sent))
        sent, received = self._meter.step_bytes_sent, self._meter.step_bytes_received
        table.add_section()
        table.add_row("all", _si(sent / steps), _si(received / steps), _si(self._meter.bytes_sent))
        console = Console()
        console.print(table)
        if computed:
            console.print("computed from the parameters, not counted")
            return
        encode, exchange = (1e3 * self.summary[f"{what}_seconds"] / steps for what in ("encode", "exchange"))
        console.print(
            f"compression ratio against ddp: {self.summary['compression_ratio']:.1f}\n"
            f"encode {encode:.2f} ms / step, waiting for the network {exchange:.2f} ms / step",
            highlight=False,
        )

    def _totals(self) -> tuple[int, int, int, float, float]:
        meter = self._meter
        seconds = meter.seconds
        return meter.steps, meter.step_bytes_sent, meter.step_bytes_received, seconds["exchange"], seconds["encode"]


class _ComputedMeter(Meter):
    """What ``ddp`` sends by its definition: one ring all-reduce of the gradients a step, one broadcast of the buffers."""

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__()
        module = trainer.lightning_module
        self._world = trainer.world_size if isinstance(trainer.strategy, DDPStrategy) else 1
        self._rank = trainer.global_rank
        self._gradients = sum(p.nbytes for p in module.parameters() if p.requires_grad)
        self._buffers = sum(b.nbytes for b in module.buffers())
        self._before = trainer.global_step

    def catch_up(self, global_step: int) -> None:
        for _ in range(global_step - self._before):
            self.all_reduce("gradients", self._gradients, self._world)
            self.broadcast("buffers", self._buffers, self._world, self._rank)
            self.step(ring_all_reduce_bytes(self._gradients, self._world))
        self.dense_bytes = self.bytes_sent
        self._before = global_step


def _si(nbytes: float) -> str:
    """Bytes for people: 1234567 -> '1.23 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}" if unit != "B" else f"{nbytes:.0f} B"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
