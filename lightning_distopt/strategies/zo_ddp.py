"""Zeroth-order data parallelism as a Lightning strategy: ranks divide the queries and tell each other the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lightning_distopt.data_parallel.replicas import broadcast_, check_alike
from lightning_distopt.exchange import Meter, ScalarGather
from lightning_distopt.exchange.meter import ring_all_reduce_bytes
from lightning_distopt.strategies.checks import ddp_arguments
from lightning_distopt.strategies.watched_ddp import WatchedDDPStrategy
from lightning_distopt.zeroth_order.base import ZeroOrderOptimizer

__all__ = ["ZeroOrderDDPStrategy"]


class ZeroOrderDDPStrategy(WatchedDDPStrategy):
    """Data parallel training by queries: no gradient travels, and no parameter after the start.

    All ranks draw the same samples and directions from the same seed; each evaluates a part of them, and the values are
    gathered: 8 bytes a number, however many parameters there are (with coordinates, a number a parameter). Each rank then
    makes the same step, so that parameters stay equal bit for bit, and equal to those of one process wherever a sample's loss
    does not depend on the samples that it is evaluated with.

    The batch size is that of all ranks together; every rank needs the whole data set. Needs the optimizers of
    ``lightning_distopt.zeroth_order``, as ``BlackBoxModule`` brings them. Checkpoints are rank 0's: there is nothing that
    differs between ranks.

    Args:
        **ddp_kwargs: for ``DDPStrategy``: ``start_method``, ``timeout``, ``process_group_backend``, ... What belongs to
            gradients (``find_unused_parameters``, ``bucket_cap_mb``, ...) has nothing to act on.

    Raises:
        TypeError: for an unknown argument.

    Example::

        trainer = Trainer(devices=8, strategy="zo_ddp")

    Source: arXiv:1902.06158 for the methods; seeds instead of vectors as in MeZO.
    """

    strategy_name: ClassVar[str] = "zo_ddp"

    def __init__(self, **ddp_kwargs: Any) -> None:
        ddp_arguments(type(self).__name__, ddp_kwargs)
        super().__init__(**ddp_kwargs)
        self.meter = Meter()
        self._steps = 0

    def configure_ddp(self) -> None:
        # No DDP wrapper: there are no gradients to reduce.
        module = self.lightning_module
        assert module is not None
        self.meter = Meter()
        self.watch.begin()
        lines = [f"{name} {tuple(p.shape)} {p.dtype} {p.requires_grad}" for name, p in module.named_parameters()]
        check_alike(lines, self.meter, self.root_device)
        broadcast_([*module.parameters(), *module.buffers()], self.meter, "setup")

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if not isinstance(optimizer, ZeroOrderOptimizer):
                raise MisconfigurationException(
                    f"`{type(self).__name__}` needs optimizers that ask for values only: got {type(optimizer).__name__}, whose "
                    "gradients would not be averaged. Use ZOProxSGD, ZOProxSVRG or ZOProxSAGA, or `strategy='ddp'`."
                )
            check_alike([_settings(optimizer)], self.meter, self.root_device, doing="zeroth-order steps")
            optimizer.team = ScalarGather(self.meter)

    @property
    def round(self) -> int:
        return self._steps

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], model: Any | None = None, **kwargs: Any
    ) -> Any:
        with self.watch.step(self.round, "optimizer_step"):
            result = super().optimizer_step(optimizer, closure, model, **kwargs)
        self._steps += 1
        nbytes = sum(p.nbytes for group in optimizer.param_groups for p in group["params"])
        self.meter.step(ring_all_reduce_bytes(nbytes, dist.get_world_size()))
        return result

    def teardown(self) -> None:
        for optimizer in self.optimizers:
            if isinstance(optimizer, ZeroOrderOptimizer):
                optimizer.team = None
        super().teardown()

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        from lightning_distopt.strategies.registry import register

        register(strategy_registry)


def _settings(optimizer: ZeroOrderOptimizer) -> str:
    """Return what must be alike on all ranks, or their walks would part."""
    return (
        f"{type(optimizer).__name__} seed={optimizer.seed} n={optimizer.n_samples} b={optimizer.batch_size} "
        f"m={optimizer.inner_steps} {type(optimizer.estimator).__name__} {sorted(vars(optimizer.estimator).items())} "
        f"h={optimizer.smoothing} {optimizer.proximal!r} budget={optimizer.max_queries} "
        f"lr={[group['lr'] for group in optimizer.param_groups]}"
    )
