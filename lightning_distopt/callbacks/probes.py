"""Where the norms of small-batch gradients come from: micro-batches, ranks, a loader, or single samples.

==========  ================================================  =======================================================
``micro``   each micro-batch of the accumulation, each rank   a norm a tensor inside backward
``rank``    the local gradient before it is averaged          the same
``loader``  extra batches of a loader                         their forward and backward (``probe_passes.py``)
``sample``  every part of ``size`` samples of the batches     one more forward and backward of everything: a reference
==========  ================================================  =======================================================

Nothing here communicates: a probe says what this rank has seen, and its user averages over ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.nn import Parameter

from lightning_distopt.callbacks.norms import wide_of

__all__ = ["MicroProbe", "Probe", "RankProbe", "batch_size", "sparse_message"]


class Probe(ABC):
    """Norms of the gradients of small batches, at the weights that the next step starts from."""

    active = True
    """Whether the coming gradients are looked at; a probe every few steps rests in between."""

    def attach(self, params: Mapping[Parameter, str]) -> None:  # noqa: B027  # not every probe watches backward
        """Watch these parameters from now on, those that are watched already too."""

    def detach(self) -> None:  # noqa: B027
        """Stop watching."""

    def begin_backward(self, divided_by: float, loss_scale: float) -> None:  # noqa: B027
        """Learn how the loss of the backward that follows was changed.

        Args:
            divided_by: number of micro-batches that the loss was divided by.
            loss_scale: factor of mixed precision.
        """

    def begin_batch(self, batch: Any) -> None:  # noqa: B027
        """Learn the micro-batch that follows."""

    @abstractmethod
    def collect(self, params: Sequence[Parameter]) -> Tensor:
        """Return the norms since the last call, and forget them.

        Returns:
            Shape ``(J, len(params))``; -1 where a parameter has fewer than J of them, because it was not used.
        """


class MicroProbe(Probe):
    """The norm of each micro-batch's own mean gradient, taken by a hook before it is added to ``.grad``."""

    def __init__(self) -> None:
        self._found: dict[Parameter, list[Tensor]] = {}
        self._handles: dict[Parameter, Any] = {}
        self._factor = 1.0

    def attach(self, params: Mapping[Parameter, str]) -> None:
        for parameter, name in params.items():
            if parameter not in self._handles:
                # One norm at a time, not all at the end of backward: to hold on to the gradients would make autograd
                # copy each of them.
                self._handles[parameter] = parameter.register_hook(self._hook(parameter, name))  # type: ignore[no-untyped-call]

    def detach(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles, self._found = {}, {}

    def begin_backward(self, divided_by: float, loss_scale: float) -> None:
        self._factor = divided_by / loss_scale

    def _hook(self, parameter: Parameter, name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if gradient.layout is not torch.strided:
                raise TypeError(sparse_message(name))
            if self.active:
                self._note(parameter, gradient.detach())

        return hook

    def _note(self, parameter: Parameter, gradient: Tensor) -> None:
        if parameter.grad is None:
            self._found[parameter] = []  # gradients were dropped without a step: a new window begins
        self._found.setdefault(parameter, []).append(self._norm(gradient))

    def _norm(self, gradient: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(gradient, dtype=wide_of([gradient]))
        return norm * self._factor

    def collect(self, params: Sequence[Parameter]) -> Tensor:
        most = max((len(self._found.get(parameter, ())) for parameter in params), default=0)
        device = params[0].device if params else None
        absent = torch.full((), -1.0, device=device, dtype=wide_of(params))
        columns = [self._found.get(parameter, []) for parameter in params]
        rows = [
            torch.stack([column[row].to(absent) if row < len(column) else absent for column in columns])
            for row in range(most)
        ]
        for parameter in params:
            self._found.pop(parameter, None)
        return torch.stack(rows) if rows else torch.zeros((0, len(params)), device=device)


class RankProbe(MicroProbe):
    """The norm of this rank's gradient over all micro-batches, before ranks are averaged."""

    def begin_backward(self, divided_by: float, loss_scale: float) -> None:
        self._factor = 1.0 / loss_scale

    def _note(self, parameter: Parameter, gradient: Tensor) -> None:
        # The last micro-batch is not known before the step, so each overwrites the one before.
        local = gradient if parameter.grad is None else parameter.grad.detach() + gradient
        self._found[parameter] = [self._norm(local)]


def sparse_message(name: str) -> str:
    """Say why a sparse gradient has no rate."""
    return (
        f"`LayerwiseRateScaling` needs dense gradients: that of `{name}` is sparse, and the norm of the rows that a batch "
        "has touched is not that of the tensor. Use `sparse=False` in the embedding."
    )


def batch_size(batch: Any) -> int:
    """Return the length of the first tensor in a batch; 0 without one."""
    sizes: list[int] = []
    apply_to_collection(batch, Tensor, lambda tensor: sizes.append(len(tensor)) if tensor.ndim else None)
    return sizes[0] if sizes else 0
