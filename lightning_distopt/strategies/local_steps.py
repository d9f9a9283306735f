"""When a rank goes to ``y``, exchanges, and comes back to ``x``, in terms of Lightning's loops.

automatic   step ( enter ─ training_step ( forward ) ─ backward ─ optimizer ─ exchange )
            accumulating:  training_step ( enter ─ forward ) ─ backward ─ leave
manual      training_step ( enter ─ forward ─ backward ─ step ( optimizer ─ exchange ) ─ enter ─ forward ... ─ leave )

Before and after these lines the parameters hold the common model ``x``; with ``sync_every`` > 1, inside a round, ``z``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_distopt.data_parallel import UpdateSync
from lightning_distopt.data_parallel.non_finite import drop_gradients
from lightning_distopt.data_parallel.replicas import broadcast_
from lightning_distopt.exchange import Meter, network_failures
from lightning_distopt.strategies.compat import backward_is_skipped

if TYPE_CHECKING:
    from lightning_distopt.strategies.compressed_ddp import CompressedDDPStrategy

__all__ = ["LocalSteps"]


class LocalSteps:
    """Drives one rank's engine through the steps of a fit.

    Args:
        strategy: whose optimizers and module are trained.
        sync: the engine.
        send_buffers: broadcast rank 0's buffers when a round begins, as ``ddp`` does.
        average_buffers: average them when a round ends instead.
        fresh_state: forget the local optimizers' state when a round ends.
    """

    def __init__(
        self,
        strategy: CompressedDDPStrategy,
        sync: UpdateSync,
        send_buffers: bool,
        *,
        average_buffers: bool = False,
        fresh_state: bool = False,
    ) -> None:
        self.sync = sync
        self._strategy = strategy
        self._send_buffers = send_buffers and not average_buffers
        self._average_buffers = send_buffers and average_buffers
        self._fresh_state = fresh_state
        if self._average_buffers:
            sync.average_buffers(self._module.named_buffers)
        self._members: list[tuple[int, int, bool]] | None = None
        self._buffers_due = True
        self._in_training_step = False
        self._stepping = False
        self._skips = False  # some rank's gradient is bad, and nobody takes this step
        self._bare: Optimizer | None = None
        self._norms_ahead: Tensor | None = None
        self._untouched = True  # no step yet in this `training_step`
        self._stepped = True  # since buffers were last counted
        self._buffer_bytes = 0
        self._warned = False
        # `self.optimizers(use_pl_optimizer=False)` steps without passing through Lightning, and its steps count, too.
        self._hooks = [
            register_optimizer_step_pre_hook(self._before_bare_step),
            register_optimizer_step_post_hook(self._after_bare_step),
        ]

    def close(self) -> None:
        """Stop watching optimizers; the parameters hold the common model."""
        for hook in self._hooks:
            hook.remove()
        self.sync.restore()

    # ---- one step ---------------------------------------------------------------------------------------------------

    def training_step(self, run: Callable[[], Any]) -> Any:
        """Take the forward of one batch (in manual optimization all that it does) at ``y``."""
        if backward_is_skipped(self._module.trainer):
            self.sync.look()
            output = run()
            if self._stepping:  # after the last batch Lightning steps once more, with the gradients of before
                self.sync.enter()
            return output
        self._track()
        if self._buffers_due:
            self._buffer_bytes = self._bytes_under_ddp() if self._average_buffers else self.broadcast_buffers("buffers")
            self._buffers_due = False
        if self._stepped:
            self._strategy.meter.dense_bytes += self._buffer_bytes  # ddp sends them before every step
            self._stepped = False
        self.sync.enter()
        self._in_training_step = True
        self._untouched = True
        if not self._module.automatic_optimization:
            self._norms_ahead = self._norms()
        try:
            output = run()
        finally:
            self._in_training_step = False
        if not self._module.automatic_optimization:
            self._warn_of_edits()
            self.sync.leave()  # backward and steps are over; else they follow
        return output

    def after_backward(self) -> None:
        """Come back to ``x`` after a micro-batch that no optimizer's step contains."""
        if self._module.automatic_optimization and not self._stepping:
            self.sync.leave()

    def optimizer_step(self, optimizer: Optimizer, run: Callable[[], Any]) -> Any:
        """Step an optimizer and exchange what it did."""
        number = self._number_of(optimizer)
        if number is None:
            raise ValueError(
                f"`optimizer_step` got a {type(optimizer).__name__} that is none of the strategy's "
                f"{len(self._strategy.optimizers)} optimizers. Return every optimizer from `configure_optimizers`."
            )
        self._begin()
        output = run()
        self._end(number)
        return output

    def guarded(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
        """Take forward and backward, and see whether the gradients may be stepped with, before they are clipped."""
        output = closure()
        self._look_before(optimizer)
        return output

    def _look_before(self, optimizer: Optimizer) -> None:
        params = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._skips = self._strategy.guard.before_step(params)
        drop_gradients(self.sync.resting)  # who sits a round out takes no step in it

    def _before_bare_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._stepping and self._owners_of(optimizer):
            self._begin()
            self._look_before(optimizer)
            self._bare = optimizer

    def _after_bare_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._bare is optimizer:
            self._bare = None
            skips = self._skips
            for number in self._owners_of(optimizer):
                self._skips = skips
                self._end(number)

    def _owners_of(self, optimizer: Optimizer) -> list[int]:
        """Return the strategy's optimizers that a step of this one is a step of: itself, or those it works for.

        Raises:
            MisconfigurationException: if it would step trainable parameters that no optimizer of the strategy holds.
        """
        number = self._number_of(optimizer)
        if number is not None:
            return [number]
        theirs = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        owners = [
            number
            for number, known in enumerate(self._strategy.optimizers)
            if any(parameter in theirs for group in known.param_groups for parameter in group["params"])
        ]
        mine = {p: name for name, p in self._module.named_parameters() if p.requires_grad}
        if not owners and not theirs.isdisjoint(mine):
            name = next(name for parameter, name in mine.items() if parameter in theirs)
            raise MisconfigurationException(
                f"A {type(optimizer).__name__} steps `{name}` and was not returned from `configure_optimizers`, so its updates "
                "would not be exchanged and ranks would drift apart. Return every optimizer from `configure_optimizers`, or "
                "use `error_feedback='none'`."
            )
        return owners

    def _begin(self) -> None:
        if self._untouched:
            self._norms_ahead = None  # what changed before the first step is part of it
        self._untouched = False
        self._warn_of_edits()
        self.sync.enter()  # the gradients were, or will be, taken at y
        self._stepping = True

    def _end(self, number: int) -> None:
        self._stepping = False
        self._stepped = True
        if self._skips:
            self._skips = False
            self.sync.leave()
        elif self.sync.exchange(number):
            self._buffers_due = True
            if self._fresh_state and not self.sync.warm:
                self._strategy.optimizers[number].state.clear()
        if self._in_training_step and not self._module.automatic_optimization:
            self.sync.enter()  # more forwards may follow in this training_step
            self._norms_ahead = self._norms()

    # ---- what takes part --------------------------------------------------------------------------------------------

    @property
    def _module(self) -> pl.LightningModule:
        module = self._strategy.lightning_module
        assert module is not None
        return module

    def _number_of(self, optimizer: Optimizer) -> int | None:
        return next((number for number, known in enumerate(self._strategy.optimizers) if known is optimizer), None)

    def _track(self) -> None:
        """Tell the engine which parameters take part: trainable ones that some optimizer steps."""
        members = [
            (number, id(parameter), parameter.requires_grad)
            for number, optimizer in enumerate(self._strategy.optimizers)
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]
        if members == self._members:  # collecting names takes milliseconds in a deep model
            return
        self._members = members
        owners: dict[Parameter, tuple[int, ...]] = {}
        for number, optimizer in enumerate(self._strategy.optimizers):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    owners[parameter] = (*owners.get(parameter, ()), number)
        named = {n: p for n, p in self._module.named_parameters() if p.requires_grad and p in owners}
        self.sync.track(named, {name: owners[parameter] for name, parameter in named.items()})

    # ---- the common model -------------------------------------------------------------------------------------------

    def show_common(self) -> None:
        """Let every rank hold rank 0's buffers and the common model, to validate it."""
        self.sync.show_common()
        self.broadcast_buffers("validation")

    def finish(self) -> None:
        """End rounds early, so that the common model has every step in it."""
        self.sync.flush()
        self.broadcast_buffers("validation")

    def _bytes_under_ddp(self) -> int:
        """Return the bytes of buffers that this rank would send before a step of ``ddp``."""
        would = Meter()
        nbytes = sum(buffer.nbytes for buffer in self._module.buffers())
        would.broadcast("buffers", nbytes, self.sync.world, self.sync.rank)
        return would.bytes_sent

    def broadcast_buffers(self, purpose: str) -> int:
        """Overwrite the module's buffers by rank 0's; return the bytes that this rank sent."""
        if not self._send_buffers:
            return 0
        meter = self._strategy.meter
        with network_failures(self.sync.rank, meter.steps, doing="broadcast buffers"):
            return broadcast_(self._module.buffers(), meter, purpose)

    # ---- edits that would be lost -----------------------------------------------------------------------------------

    def _norms(self) -> Tensor | None:
        """Return the norm of every parameter at ``y``; ``None`` where :meth:`UpdateSync.leave` would not drop ``y``."""
        params = [param for bucket in self.sync.buckets for param in bucket.data]
        if self._warned or not params or self.sync.config.sync_every > 1:
            return None
        return torch.stack([norm.double() for norm in torch._foreach_norm(params)])

    def _warn_of_edits(self) -> None:
        before, self._norms_ahead = self._norms_ahead, None
        now = None if before is None else self._norms()
        if before is None or now is None or torch.equal(before, now):
            return
        self._warned = True
        rank_zero_warn(
            "`training_step` changed parameters, and no optimizer's step followed. With error feedback they hold `x - e` "
            "there, which is dropped at the end of `training_step`, and the change with it. Change parameters in "
            "`on_train_batch_end`, where they hold the common model, or let an optimizer make the change."
        )
