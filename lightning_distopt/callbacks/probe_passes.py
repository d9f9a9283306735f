"""Probes that make forward and backward passes of their own, which leave no trace in training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.nn import Parameter
from torchmetrics import Metric

from lightning_distopt.callbacks.norms import norms, wide_of
from lightning_distopt.callbacks.probes import Probe, batch_size

__all__ = ["LoaderProbe", "SampleProbe", "gradients_of", "probe_loss", "side_pass"]


class LoaderProbe(Probe):
    """Gradients of extra batches, which leave no trace in training.

    Args:
        count: batches a step.
        gradients: of the loss of one batch with respect to parameters; see :func:`side_pass`.
        loader: gives batches; begins anew when it runs dry.
        guard: surrounds a step's passes.
    """

    def __init__(
        self,
        count: int,
        gradients: Callable[[Any, Sequence[Parameter]], Sequence[Tensor | None]],
        loader: Iterable[Any],
        guard: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._count, self._gradients, self._loader, self._guard = count, gradients, loader, guard
        self._iterator: Iterator[Any] = iter(())

    def collect(self, params: Sequence[Parameter]) -> Tensor:
        with self._guard():
            return self._norms((self._next() for _ in range(self._count)), params)

    def _norms(self, batches: Iterable[Any], params: Sequence[Parameter]) -> Tensor:
        rows = []
        for batch in batches:
            found = self._gradients(batch, params)
            used = [gradient for gradient in found if gradient is not None]
            values = iter(norms(used, params[0].device).unbind())
            absent = torch.full((), -1.0, device=params[0].device, dtype=wide_of(params))
            rows.append(torch.stack([absent if gradient is None else next(values).to(absent) for gradient in found]))
        return torch.stack(rows) if rows else torch.zeros((0, len(params)))

    def _next(self) -> Any:
        try:
            return next(self._iterator)
        except StopIteration:
            self._iterator = iter(self._loader)
        try:
            return next(self._iterator)
        except StopIteration:
            raise ValueError(
                f"`probe_loader` must give at least one batch: got a {type(self._loader).__name__} that gives none, even from "
                "its beginning. Pass a loader over a data set (not a generator that is used up), or use `probe='micro'`."
            ) from None


class SampleProbe(LoaderProbe):
    """The batches of the step itself, cut into parts of ``size`` samples.

    Args:
        size: samples a part.
        gradients: as in :class:`LoaderProbe`.
        guard: as in :class:`LoaderProbe`.
    """

    def __init__(
        self,
        size: int,
        gradients: Callable[[Any, Sequence[Parameter]], Sequence[Tensor | None]],
        guard: Callable[[], AbstractContextManager[None]],
    ) -> None:
        super().__init__(0, gradients, (), guard)
        self._size = size
        self._batches: list[Any] = []

    def begin_batch(self, batch: Any) -> None:
        if self.active:
            self._batches.append(batch)

    def collect(self, params: Sequence[Parameter]) -> Tensor:
        batches, self._batches = self._batches, []
        with self._guard():
            return self._norms((part for batch in batches for part in self._parts(batch)), params)

    def _parts(self, batch: Any) -> Iterator[Any]:
        whole = batch_size(batch)
        for start in range(0, whole, self._size):
            yield apply_to_collection(batch, Tensor, partial(_part, whole, start, start + self._size))


def _part(whole: int, start: int, stop: int, tensor: Tensor) -> Tensor:
    """Return the samples from ``start`` to ``stop`` of a tensor with ``whole`` samples; any other as it is."""
    return tensor[start:stop] if tensor.ndim and len(tensor) == whole else tensor


@contextmanager
def side_pass(module: pl.LightningModule, keep_statistics: bool) -> Iterator[None]:
    """Let passes through ``module`` leave no trace: random numbers, metrics, logs, buffers.

    Args:
        module: whose ``training_step`` is called inside.
        keep_statistics: let buffers (BatchNorm's running statistics) absorb what they see.
    """
    buffers = [] if keep_statistics else [(buffer, buffer.clone()) for buffer in module.buffers()]
    metrics = {metric: metric.__getstate__() for metric in module.modules() if isinstance(metric, Metric)}
    held = {metric: apply_to_collection(state, Tensor, torch.clone) for metric, state in metrics.items()}
    for name in ("log", "log_dict"):
        object.__setattr__(module, name, lambda *args, **kwargs: None)
    try:
        with isolate_rng(), torch.enable_grad():
            yield
    finally:
        for name in ("log", "log_dict"):
            object.__delattr__(module, name)
        for metric, state in held.items():
            metric.__setstate__(state)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def gradients_of(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    transfer: bool,
    decay: Callable[[Parameter], float] | None,
    batch: Any,
    params: Sequence[Parameter],
) -> Sequence[Tensor | None]:
    """Return the gradient of the loss of one extra batch; ``.grad`` is not touched and no rank is talked to.

    Args:
        trainer: for devices and precision.
        module: its ``probe_loss(batch)``, or else its ``training_step``, gives the loss.
        transfer: whether the batch is still to be moved to the device.
        decay: weight decay of a parameter, which is added; ``None`` adds none.
        batch: of small size.
        params: to differentiate by.

    Returns:
        One gradient a parameter, ``None`` where the loss does not depend on it.
    """
    if transfer:
        batch = trainer.strategy.batch_to_device(batch)
    with trainer.precision_plugin.train_step_context():
        loss = probe_loss(module, batch)
    found = torch.autograd.grad(loss, params, allow_unused=True)
    if decay is None:
        return found
    with torch.no_grad():
        return [None if g is None else g + decay(p) * p for g, p in zip(found, params, strict=True)]


def probe_loss(module: pl.LightningModule, batch: Any) -> Tensor:
    """Return the loss of a batch: ``module.probe_loss(batch)`` if there is one, else ``training_step``'s.

    Raises:
        TypeError: if that is no tensor with a gradient.
    """
    own = getattr(module, "probe_loss", None)
    if own is not None:
        loss = own(batch)
    else:
        wants_index = len(inspect.signature(module.training_step).parameters) > 1
        loss = module.training_step(batch, 0) if wants_index else module.training_step(batch)
    if isinstance(loss, Mapping):
        loss = loss["loss"]
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise TypeError(
            f"`training_step` must return a loss with a gradient for a probe: got {loss!r}. Return it, or give the module a "
            "method `probe_loss(batch)`."
        )
    return loss
