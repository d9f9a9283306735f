"""Compressed DDP as a Lightning strategy: lifecycle, checks and checkpoints; the algorithms live in ``data_parallel``."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_distopt.compressors import Compressor, Specification
from lightning_distopt.compressors.kernels import kernels_of
from lightning_distopt.compressors.text import as_compressor
from lightning_distopt.data_parallel import GradientSync, UpdateSync, UpdateSyncConfig
from lightning_distopt.data_parallel.exchanges import ExchangeName, choose_exchange, make_exchange
from lightning_distopt.data_parallel.non_finite import NonFinite, NonFiniteGuard
from lightning_distopt.data_parallel.replicas import broadcast_, check_alike
from lightning_distopt.error_feedback import refuse_unless_contractive
from lightning_distopt.exchange import Meter, network_failures, roll_call
from lightning_distopt.optimizers import RSGD
from lightning_distopt.strategies.checks import choice, count, ddp_arguments, flag, positive
from lightning_distopt.strategies.combinations import (
    ErrorFeedback,
    ExchangeChoice,
    Scope,
    checked_coefficient,
    checked_error_feedback,
    refuse_averages_of_local_parameters,
    refuse_tensors_that_cannot_be_compressed,
    refuse_what_a_specification_brings,
    refuse_what_belongs_to_updates,
)
from lightning_distopt.strategies.header import Header
from lightning_distopt.strategies.local_steps import LocalSteps
from lightning_distopt.strategies.rank_state import RankState
from lightning_distopt.strategies.watched_ddp import WatchedDDPStrategy

__all__ = ["CompressedDDPStrategy"]


class CompressedDDPStrategy(WatchedDDPStrategy):
    """Data parallel training that sends compressed updates instead of gradients.

    Each rank steps its own optimizer from ``y = x - coefficient * e``, where ``e`` is what it has not sent yet, and the
    ranks exchange the compressed displacement (step-ahead error feedback). Between steps all ranks hold the same common
    model ``x``, which is what is validated, saved and exported. No argument is needed.

    With error feedback the optimizer acts before the exchange, on local gradients: for SGD (with momentum, weight decay,
    schedules) an uncompressed exchange equals ``ddp``; gradient clipping and non-linear optimizers such as Adam act on
    local instead of averaged gradients, so they differ from ``ddp`` even uncompressed. ``error_feedback="gradient"`` and
    ``"none"`` compress gradients inside backward instead, overlapped with it, and the optimizer sees their average, as with
    ``ddp``; so does PowerSGD.

    In manual optimization every optimizer's step is followed by an exchange of its parameters. To change parameters by
    hand, do it in ``on_train_batch_end``: inside of ``training_step`` a change that no optimizer's step follows would be lost
    (with a warning).

    Memory a rank, beyond ``ddp``'s parameters, gradients and optimizer: two copies of the parameters (``x`` during a
    step, and ``e``), ``1 / W`` copy (sharded server) or one (server compression elsewhere), and two buckets; less the
    gradient buckets of ``ddp``, which are not needed. ``error_feedback="gradient"``: one copy of the gradients, and
    until backward ends another where what arrives is dense (16 bits, ``dense_steps``) or gradients are in half precision.
    ``"none"``: nothing.

    Args:
        compressor: what travels: "sign" (1 bit an element), "topk:0.01" (the largest 1 % of each parameter, 8 bytes
            each), "random_block:0.01", "bf16", "fp16", "fp32", or a ``Compressor``. Or a specification, for gradients only:
            "powersgd:2" (matrices by their best rank 2), "signsgd" (the majority's sign, 1 bit an element).
        error_feedback: "step_ahead" (gradients at ``x - e``; converges best), "local" (gradients at ``x``; classic error
            feedback), "gradient" (classic error feedback in units of gradients, overlapped with backward; every gradient
            that is averaged must be stepped), or "none" (compress gradients, forget what is left out: for unbiased or
            16-bit compressors). "powersgd" needs "gradient" (or "none"), "signsgd" needs "none".
        coefficient: share of the residual that is stepped ahead, in [0, 1]; ``None`` is 1 for "step_ahead", 0 for
            "local". 0.3 is DEF, 0.85 SA-PEF.
        averaging_period: average the residuals over ranks, uncompressed, before every this many-th exchange; 0 is never.
            Costs ``1 / averaging_period`` of ``ddp``'s bytes, less with ``sync_every``. arXiv:2008.05823 uses 20 with top-k.
        server_compression: compress the average again, with a residual of its own; ``None`` is true for
            "sharded_server" (where it halves the bytes) and false otherwise (where it would save none). With
            ``error_feedback="gradient"`` it is false: a sharded server's answers travel in full precision.
        exchange: "all_reduce" (payloads that can be summed), "all_gather" (bytes grow with the ranks), "sharded_server"
            (about two payloads a rank on any number of ranks), or "auto": the first that fits, all-gather up to 8 ranks
            (on any number with ``error_feedback="gradient"``). Specifications bring their own.
        dense_steps: exchanges at the start that send everything (each of ``sync_every`` optimizer steps), at least 0.
        sync_every: local optimizer steps between exchanges, at least 1; divides all bytes by it. Between exchanges each rank
            holds parameters of its own, so callbacks that average weights need 1.
        scope: "tensor" compresses each parameter by itself; "model" all of them as one vector (one scale for "sign", as
            in arXiv:2008.05823; one vector a dtype and optimizer), which needs one bucket of the model's size.
        bucket_mb: megabytes compressed while the bucket before is on the network, above 0; a larger parameter is a
            bucket of its own. More buckets overlap better, fewer cost less latency. Of gradients ("gradient", "none"),
            ``bucket_cap_mb`` says it.
        non_finite: what all ranks do in a step in which a gradient of any of them holds a NaN or an infinity: "raise" an error
            that names rank, step and parameter; "skip" the step, which leaves parameters, optimizers and residuals as they
            were; or "zero": the bad entries count as zero. Logged as ``feedback/non_finite_steps``.
        strict_sidecars: raise an error on all ranks, instead of a warning, where a rank's file beside a checkpoint is
            missing or unreadable; its residual would be lost.
        allow_noncontractive: let error feedback go round a compressor whose residual may grow without bound, with a warning.
        **ddp_kwargs: for ``DDPStrategy`` (``start_method``, ``timeout``, ``process_group_backend``, ...) and
            ``DistributedDataParallel``. Where updates are sent ("step_ahead", "local"), ``find_unused_parameters``,
            ``static_graph``, ``gradient_as_bucket_view`` and ``bucket_cap_mb`` have nothing to act on.

    Raises:
        ValueError: for a value outside its range, or a combination that cannot work; it says which and what to do.
        TypeError: for an unknown argument.

    Example::

        import lightning_distopt
        trainer = Trainer(devices=8, strategy="compressed_ddp")
        trainer = Trainer(devices=8, strategy=CompressedDDPStrategy("topk:0.01"))

    Source: arXiv:2008.05823; differences with the paper are listed in ``docs/compressed_ddp.md``.
    """

    strategy_name: ClassVar[str] = "compressed_ddp"

    def __init__(
        self,
        compressor: Compressor | Specification | str = "sign",
        error_feedback: ErrorFeedback = "step_ahead",
        coefficient: float | None = None,
        averaging_period: int = 0,
        server_compression: bool | None = None,
        exchange: ExchangeChoice = "auto",
        dense_steps: int = 0,
        sync_every: int = 1,
        scope: Scope = "tensor",
        bucket_mb: float = 25.0,
        non_finite: NonFinite = "raise",
        strict_sidecars: bool = False,
        allow_noncontractive: bool = False,
        **ddp_kwargs: Any,
    ) -> None:
        ddp_arguments(type(self).__name__, ddp_kwargs)
        super().__init__(**ddp_kwargs)
        self.compressor = as_compressor(compressor)
        self.error_feedback: ErrorFeedback = checked_error_feedback(self, error_feedback)
        self.exchange: ExchangeChoice = choice("exchange", exchange, ExchangeChoice)
        self.scope: Scope = choice("scope", scope, Scope)
        self.dense_steps = count("dense_steps", dense_steps, 0)
        self.sync_every = count("sync_every", sync_every, 1)
        self.bucket_mb = positive("bucket_mb", bucket_mb)
        self.non_finite: NonFinite = choice("non_finite", non_finite, NonFinite)
        self.strict_sidecars = flag("strict_sidecars", strict_sidecars)
        self.server_compression = None if server_compression is None else flag("server_compression", server_compression)
        self.coefficient = checked_coefficient(self, coefficient)
        self.averaging_period = count("averaging_period", averaging_period, 0)
        self.allow_noncontractive = flag("allow_noncontractive", allow_noncontractive)
        if not self.sends_updates:
            refuse_what_belongs_to_updates(self)
        if isinstance(self.compressor, Specification):
            refuse_what_a_specification_brings(self)
        else:
            if self.uses_residuals:
                refuse_unless_contractive(self.compressor, self.error_feedback, self.allow_noncontractive)
            if self.exchange != "auto":  # what cannot carry the compressor is refused here, not in the workers
                make_exchange(self.exchange, self.compressor, Meter())
        self.meter = Meter()
        self.guard = NonFiniteGuard(self.non_finite, self.meter)
        self.run_id = 0
        self._shared_seed = 0
        # As in DistributedDataParallel: torch 2.15 renamed `broadcast_buffers`, which also spared the first broadcast.
        in_forward, spared = ddp_kwargs.get("forward_sync_buffers"), ddp_kwargs.get("broadcast_buffers") is False
        self._sends_buffers = not spared if in_forward is None else bool(in_forward)
        self._sends_buffers_first = not spared or in_forward is not None
        self._local_steps: LocalSteps | None = None
        self._gradient_sync: GradientSync | None = None
        self._buckets_go_to: Any = None
        self._judged = 0
        self._rank_state = RankState(self)

    # ---- configuration ----------------------------------------------------------------------------------------------

    @property
    def uses_residuals(self) -> bool:
        """Whether what compression leaves out is remembered and sent later."""
        return self.error_feedback != "none"

    @property
    def sends_updates(self) -> bool:
        """Whether local optimizer steps are exchanged (else gradients, inside backward)."""
        return self.error_feedback in ("step_ahead", "local")

    @property
    def _sending(self) -> str:
        """The choice by which updates are sent, for messages."""
        return f"`error_feedback={self.error_feedback!r}`"

    @property
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        if (
            getattr(precision_plugin, "scaler", None) is not None
            or getattr(precision_plugin, "precision", "") == "16-mixed"
        ):
            raise MisconfigurationException(
                f"`{type(self).__name__}` does not support `precision='16-mixed'`: each rank would skip overflowing steps by "
                "itself, and residuals would hold loss-scaled values. Use `precision='bf16-mixed'` or `'32-true'`."
            )
        self._precision_plugin = precision_plugin

    # ---- lifecycle --------------------------------------------------------------------------------------------------

    def configure_ddp(self) -> None:
        assert self.lightning_module is not None
        refuse_averages_of_local_parameters(self)
        refuse_tensors_that_cannot_be_compressed(self)
        self.meter = Meter()
        self.guard = NonFiniteGuard(self.non_finite, self.meter)
        world = dist.get_world_size()
        self.watch.begin()
        # Ranks may have seeded themselves differently; what they draw together must not depend on it.
        shared = torch.tensor([secrets.randbits(62), _seed()], device=self.root_device)
        broadcast_([shared], self.meter, "setup")
        self.run_id, self._shared_seed = shared.tolist()
        if world > 1:
            named = self.lightning_module.named_parameters()
            lines = [f"{name} {tuple(p.shape)} {p.dtype} {p.requires_grad}" for name, p in named]
            # A kernel may round a scale otherwise than plain torch, and replicated servers must give the same bits.
            check_alike(lines, self.meter, self.root_device, doing=kernels_of(self.root_device))
        else:
            rank_zero_info(
                f"`{type(self).__name__}` runs on one device: nothing is sent, and compression only delays updates. Use "
                "`devices=2` or more, or `strategy='auto'`."
            )
        if self.sends_updates:
            self._configure_local_steps(world)
        else:
            super().configure_ddp()

    def _configure_local_steps(self, world: int) -> None:
        # No DDP wrapper: gradients stay local, so its reducer and its copy of all gradients would be idle.
        assert self.lightning_module is not None
        buffers = self.lightning_module.buffers() if self._sends_buffers_first else ()
        broadcast_([*self.lightning_module.parameters(), *buffers], self.meter, "setup")
        config = self._update_config(self._exchange_on(world))
        self._local_steps = self._make_local_steps(UpdateSync(config, self.meter))
        self._rank_state.go_on(self._local_steps.sync)

    def _update_config(self, exchange: ExchangeName) -> UpdateSyncConfig:
        """Return the method as the engine's numbers."""
        assert isinstance(self.compressor, Compressor)
        return UpdateSyncConfig(
            compressor=self.compressor,
            exchange=exchange,
            coefficient=self.coefficient,
            averaging_period=self.averaging_period,
            server_compression=self._serves(exchange),
            dense_steps=self.dense_steps,
            sync_every=self.sync_every,
            scope=self.scope,
            bucket_bytes=self.bucket_mb * 2**20,
            seed=self._shared_seed,
        )

    def _make_local_steps(self, sync: UpdateSync) -> LocalSteps:
        """Return what drives the engine through the steps of a fit."""
        return LocalSteps(self, sync, self._sends_buffers)

    def _exchange_on(self, world: int) -> ExchangeName:
        if self.exchange != "auto":
            return self.exchange
        if isinstance(self.compressor, Specification):
            return "all_reduce"  # asked by nobody
        # A sharded server's exact answers cost more than the payloads of dozens of ranks.
        return choose_exchange(self.compressor, 1 if self.error_feedback == "gradient" else world)

    def _serves(self, exchange: str) -> bool:
        if self.server_compression is None:
            return exchange == "sharded_server" and self.error_feedback != "gradient"
        return self.server_compression

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if self.sends_updates and isinstance(optimizer, RSGD):
                raise MisconfigurationException(
                    f"{self._sending} does not go with RSGD: its second point follows the local steps, and would be another one "
                    "on each rank. Use `CompressedDDPStrategy` with `error_feedback='gradient'` or `'none'`, where all ranks "
                    "step alike."
                )
            if self.sends_updates and hasattr(optimizer, "consolidate_state_dict"):
                raise MisconfigurationException(
                    f"{self._sending} does not go with {type(optimizer).__name__}: each rank must step all parameters by its own "
                    "gradient, and this optimizer steps a part of them and sends it to the others. Use the optimizer that it "
                    "wraps, or `CompressedDDPStrategy` with `error_feedback='none'`."
                )

    def _register_ddp_hooks(self) -> None:
        # Lightning attaches hooks on CUDA only; ours works on every device.
        assert isinstance(self.model, DistributedDataParallel)
        assert self.lightning_module is not None
        exchange = self._exchange_on(dist.get_world_size())
        self._gradient_sync = GradientSync(
            {parameter: name for name, parameter in self.lightning_module.named_parameters()},
            self.compressor,
            exchange,
            self._serves(exchange),
            self.dense_steps,
            self.meter,
            self._shared_seed,
            residuals=self.uses_residuals,
            rates=self._learning_rates,
            find_unused=self.model.find_unused_parameters,
        )
        self._rank_state.go_on(self._gradient_sync)
        self._buckets_go_to = self._taker_of_buckets()
        self.model.register_comm_hook(self, _hook)

    def _taker_of_buckets(self) -> Any:
        """Return what takes DDP's buckets, by a method ``hook``."""
        return self._gradient_sync

    def _learning_rates(self) -> dict[Parameter, float]:
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups if "lr" in group]
        return {parameter: float(group["lr"]) for group in groups for parameter in group["params"]}

    def teardown(self) -> None:
        self._rank_state.close()
        if self._local_steps is not None:
            self._local_steps.close()
        self._rank_state.keep()
        self._local_steps = None
        self._gradient_sync = None
        super().teardown()

    def on_exception(self, exception: BaseException) -> None:
        if self._local_steps is not None:
            self._local_steps.sync.restore()
        super().on_exception(exception)

    # ---- one step ---------------------------------------------------------------------------------------------------

    @property
    def round(self) -> int:
        """Number of the exchange that comes next."""
        if self._gradient_sync is not None:
            return self._gradient_sync.rounds
        return 0 if self._local_steps is None else self._local_steps.sync.rounds

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.watch.step(self.round, "training_step"):
            return self._training_step(partial(super().training_step, *args, **kwargs))

    def _training_step(self, run: Callable[[], Any]) -> Any:
        if self._local_steps is not None:
            return self._local_steps.training_step(run)
        if isinstance(self.model, DistributedDataParallel) and self.model.will_sync_module_buffers():  # type: ignore[no-untyped-call]
            self._count_buffers(self.model)
        with self._failures_of_the_wrapper("forward"):
            return run()

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with self.watch.step(self.round, "backward"), self._failures_of_the_wrapper("backward"):
            return super().backward(closure_loss, *args, **kwargs)

    def _failures_of_the_wrapper(self, doing: str) -> AbstractContextManager[None]:
        """DDP has collectives of its own: buffers in forward, which parameters are unused in backward."""
        step = 0 if self._gradient_sync is None else self._gradient_sync.rounds
        return network_failures(self.global_rank, step, doing=f"end {doing}", only=False)

    def _count_buffers(self, wrapper: DistributedDataParallel) -> None:
        """Count what the wrapper broadcasts in forward."""
        before = self.meter.sent["buffers"]
        nbytes = sum(buffer.nbytes for buffer in wrapper.buffers())
        self.meter.broadcast("buffers", nbytes, self.world_size, self.global_rank)
        self.meter.dense_bytes += self.meter.sent["buffers"] - before

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], model: Any | None = None, **kwargs: Any
    ) -> Any:
        if self._local_steps is not None:
            closure = partial(self._local_steps.guarded, optimizer, closure)
        run = partial(super().optimizer_step, optimizer, closure, model, **kwargs)
        with self.watch.step(self.round, "optimizer_step"):
            output = run() if self._local_steps is None else self._local_steps.optimizer_step(optimizer, run)
        roll_call.now_at(self.round, "the hooks after a step")
        return output

    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        if self._local_steps is not None:
            self._local_steps.after_backward()
        sync = self._gradient_sync
        if sync is not None and self.non_finite == "raise":
            sync.raise_if_non_finite()
        elif sync is not None and sync.rounds != self._judged:
            self._judged = sync.rounds
            self.guard.after_backward(list(sync.names), sync.forget_non_finite())

    def on_validation_start(self) -> None:
        super().on_validation_start()
        if self._local_steps is not None:
            with self.watch.step(self.round, "validation"):
                self._local_steps.show_common()

    def on_train_end(self) -> None:
        super().on_train_end()
        if self._local_steps is not None:
            with self.watch.step(self.round, "the end of training"):
                self._local_steps.finish()

    # ---- figures ----------------------------------------------------------------------------------------------------

    @property
    def update_sync(self) -> UpdateSync | None:
        """The engine of this rank while fitting with ``error_feedback="step_ahead"`` or ``"local"``."""
        return None if self._local_steps is None else self._local_steps.sync

    @property
    def gradient_sync(self) -> GradientSync | None:
        """The engine of this rank while fitting with ``error_feedback="gradient"`` or ``"none"``."""
        return self._gradient_sync

    @property
    def decision(self) -> dict[str, Any] | None:
        """What was chosen during the fit, for checkpoints; ``None`` where the arguments say it all."""
        return None

    def adopt(self, header: Header) -> None:
        """Take over from a checkpoint's header what the arguments leave open, before an engine is built."""

    @property
    def non_finite_steps(self) -> int:
        """Steps so far in which some rank's gradient held a NaN or an infinity, and which were skipped or mended."""
        return self.guard.steps

    @property
    def sidecars_lost(self) -> int:
        """Files beside the loaded checkpoint, of all ranks, that could not be used."""
        return self._rank_state.lost

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        sync = self.update_sync
        if sync is None or not sync.away:
            return super().lightning_module_state_dict()
        with sync.common_model():  # saved inside a step or a round: the checkpoint holds the common model
            state = super().lightning_module_state_dict()
            return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        self._rank_state.save(
            checkpoint, filepath, partial(super().save_checkpoint, checkpoint, filepath, storage_options)
        )

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        return self._rank_state.read(checkpoint, str(checkpoint_path))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(self._rank_state.restore(checkpoint))

    def remove_checkpoint(self, filepath: Any) -> None:
        super().remove_checkpoint(filepath)
        self._rank_state.remove(filepath)

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        from lightning_distopt.strategies.registry import register

        register(strategy_registry)


def _hook(strategy, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations by identity, and ours are strings
    strategy.guard.look_at(bucket.buffer())
    return strategy._buckets_go_to.hook(bucket)


def _seed() -> int:
    """Return this process's seed of ``seed_everything``; 0 without."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
