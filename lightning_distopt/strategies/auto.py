"""Compressed DDP that chooses its compressor: real steps are timed at the start of the fit, then the winner takes over."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor

from lightning_distopt.advice.auto_sync import TIMED_TO, AutoSync, sixteen_bit
from lightning_distopt.advice.candidates import CANDIDATES
from lightning_distopt.advice.choice import MARGIN, Decision
from lightning_distopt.advice.cost_model import Link
from lightning_distopt.compressors.text import as_compressor
from lightning_distopt.data_parallel.non_finite import NonFinite
from lightning_distopt.errors import CheckpointError
from lightning_distopt.strategies.checks import ddp_arguments, fraction
from lightning_distopt.strategies.compressed_ddp import CompressedDDPStrategy
from lightning_distopt.strategies.header import Header

__all__ = ["AutoCompressedDDPStrategy"]


class AutoCompressedDDPStrategy(CompressedDDPStrategy):
    """Data parallel training that finds out, at the start of the fit, whether compression pays on this network.

    It starts with gradients in 16 bit, all-reduced inside backward. Steps 3 to 6 are timed; then, between two steps, the
    ranks measure the link and the compressors (some seconds, once), predict the step time of each method that keeps the
    accuracy of ``ddp`` in this project's studies, and agree on one. If none is faster by ``margin``, 16 bit stays. The
    choice is logged with its reason, goes into checkpoints, and holds to the end of the fit, in resumed fits, and in later
    ones of the same module in the same processes.

    Gradients are compressed in DDP's hook, so the optimizer sees their average, as with ``ddp``; methods that exchange
    updates cannot be switched to inside a fit, and are only named where they would be faster still. With several
    optimizers none with a residual is taken: it would keep what a zeroed gradient has left. Under ``16-mixed`` and with
    sparse gradients it is refused, as all of this family.

    Memory a rank, beyond ``ddp``: nothing, or one copy of the gradients where the choice has a residual.

    Args:
        margin: what a method must gain over 16 bit to be taken, as a share of the step's time, in [0, 1].
        non_finite: see ``CompressedDDPStrategy``.
        strict_sidecars: see there.
        **ddp_kwargs: for ``DDPStrategy`` and ``DistributedDataParallel``.

    Raises:
        ValueError: for a value outside its range.
        TypeError: for an unknown argument.

    Example::

        import lightning_distopt
        trainer = Trainer(devices=8, strategy="compressed_ddp_auto")

    Source: none; ``docs/advice.md`` says how the choice is made.
    """

    strategy_name: ClassVar[str] = "compressed_ddp_auto"
    _assumed_link: ClassVar[Link | None] = None  # for tests: instead of measuring it

    def __init__(
        self,
        margin: float = MARGIN,
        non_finite: NonFinite = "raise",
        strict_sidecars: bool = False,
        **ddp_kwargs: Any,
    ) -> None:
        ddp_arguments(type(self).__name__, ddp_kwargs)
        super().__init__("bf16", "none", non_finite=non_finite, strict_sidecars=strict_sidecars, **ddp_kwargs)
        self.margin = fraction("margin", margin)
        self._auto: AutoSync | None = None
        self._decision: Decision | None = None
        self._decided_for: weakref.ref[Any] | None = None
        self._whose = ""
        self._baseline = "bf16"

    @property
    def decision(self) -> dict[str, Any] | None:
        """What was chosen, as numbers and strings; ``None`` before that."""
        return None if self._decision is None else self._decision.state_dict()

    # ---- lifecycle --------------------------------------------------------------------------------------------------

    def configure_ddp(self) -> None:
        if self._decision is not None and self._decided_for is not None:
            if self._decided_for() is self.lightning_module:
                self._keep()
            else:
                rank_zero_info(f"`{type(self).__name__}` fits another module: it measures again.")
                self._decision = None
        if self._decision is None:
            text = sixteen_bit(self.root_device) if dist.get_world_size() > 1 else "bf16"
            self.compressor, self.error_feedback, self.exchange = as_compressor(text), "none", "auto"
            self._baseline = text
        super().configure_ddp()

    def _taker_of_buckets(self) -> Any:
        assert self._gradient_sync is not None
        self._auto = AutoSync(
            self._gradient_sync,
            self._baseline,
            self.root_device,
            margin=self.margin,
            candidates=CANDIDATES,
            link=self._assumed_link,
        )
        if self._decision is not None:  # the engine was built with it
            self._auto.decision = self._decision
        return self._auto

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._auto is not None and not self._auto.done:
            self._auto.residuals = len(self.optimizers) == 1
            decision = self._auto.between_steps()
            if decision is not None:
                self._adopt(decision, "the fit before")
                rank_zero_info(f"`{type(self).__name__}` after {TIMED_TO} steps: {decision.report}")
                self._log(decision)
        return super().training_step(*args, **kwargs)

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._auto is not None:
            self._auto.begin_backward()
        return super().backward(closure_loss, *args, **kwargs)

    def teardown(self) -> None:
        super().teardown()
        self._auto = None

    # ---- the decision -----------------------------------------------------------------------------------------------

    def _adopt(self, decision: Decision, whose: str) -> None:
        """Be a strategy with the decision's arguments; ``whose`` it is in later fits' words."""
        self._decision, self._whose = decision, whose
        self._decided_for = weakref.ref(self.lightning_module)
        self.compressor = as_compressor(decision.compressor)
        self.error_feedback = "gradient" if decision.residual else "none"
        self.exchange = decision.exchange  # type: ignore[assignment]

    def _keep(self) -> None:
        """Say that an earlier decision holds."""
        assert self._decision is not None
        d = self._decision
        rank_zero_info(
            f"`{type(self).__name__}` keeps {d.name}, which {self._whose} chose on {d.world} ranks, and does not measure again."
        )
        if d.world != self.world_size:
            rank_zero_warn(
                f"`{type(self).__name__}` chose {d.name} on {d.world} ranks, and this run has {self.world_size}: it is kept, but "
                "may not be the fastest here. Ask `distopt advise`, or start a fit without the checkpoint to measure again."
            )

    @rank_zero_only
    def _log(self, decision: Decision) -> None:
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        figures = {
            "comm/auto_predicted_seconds": decision.seconds,
            "comm/auto_sixteen_bit_seconds": decision.baseline_seconds,
        }
        for logger in trainer.loggers:
            logger.log_hyperparams({"compressed_ddp_auto": f"{decision.name} ({decision.compressor})"})
            logger.log_metrics(figures, trainer.global_step)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def adopt(self, header: Header) -> None:
        if header.decision is None:
            return
        try:
            decision = Decision.from_state(header.decision)
        except ValueError as error:
            raise CheckpointError(
                f"The choice in the checkpoint cannot be used: {error}. Choose another checkpoint.",
                self._rank_state.path or "",
            ) from None
        self._adopt(decision, "the checkpoint's fit")
