"""Asking by a closure that reads the parameters: works for any black box, one point at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distopt.compressors.randomness import normals
from lightning_distopt.zeroth_order.asking import Ask, Layout, QueryCount
from lightning_distopt.zeroth_order.directions import pieces
from lightning_distopt.zeroth_order.layers import LayerwiseMove
from lightning_distopt.zeroth_order.retry import RetryPolicy

__all__ = ["ClosureAsk", "move_"]


def move_(tensor: Tensor, offset: int, key: Tensor, amount: float) -> None:
    """Add ``amount`` times the tensor's part of a direction, piece by piece."""
    flat = tensor.view(-1)
    for first, last in pieces(0, tensor.numel()):
        part = normals(key, offset + first, offset + last)[0].to(tensor.dtype)
        flat[first:last] += part.mul_(amount)


class ClosureAsk(Ask):
    """``closure(indices)`` reads the parameters, which are moved in place and put back from copies, bit for bit.

    A coordinate is moved alone and only its old value kept. A direction moves everything, so a copy of the parameters is
    kept meanwhile; with ``module``, parameters are moved layer by layer while each layer runs, and one layer is kept.

    Args:
        closure: takes int64 indices of shape ``(b,)``, returns losses of shape ``(b,)``.
        layout: of the parameters.
        count: of queries.
        retry: what happens when a query fails.
        layers: moves the parameters of a module while its layers run.
    """

    batched = False

    def __init__(
        self,
        closure: Callable[[Tensor], Any],
        layout: Layout,
        count: QueryCount,
        retry: RetryPolicy,
        layers: LayerwiseMove | None = None,
    ) -> None:
        super().__init__(layout, count, retry)
        self.closure, self.layers = closure, layers

    def point(self) -> Tensor:
        return self.layout.flat()

    @contextmanager
    def session(self) -> Iterator[None]:
        if self.layers is None:
            yield
        else:
            with self.layers.attached():
                yield

    @contextmanager
    def at(self, base: Sequence[Tensor] | None) -> Iterator[None]:
        if base is None:
            yield
            return
        with self._kept(self.layout.params):
            for parameter, value in zip(self.layout.params, base, strict=True):
                parameter.copy_(value)
            yield

    def plain(self, indices: Tensor) -> Tensor:
        return self.checked(lambda: self.closure(indices), indices)

    def shared(self, indices: Tensor, keys: Tensor, amounts: Tensor) -> Tensor:
        values = [self._along(indices, key, float(a)) for key, a in zip(keys.view(-1, 1), amounts, strict=True)]
        return torch.stack(values)

    def own(self, indices: Tensor, keys: Tensor, amounts: Tensor) -> Tensor:
        each = zip(indices.view(-1, 1), keys.view(-1, 1), amounts, strict=True)
        return torch.cat([self._along(index, key, float(amount)) for index, key, amount in each])

    def coordinates(self, indices: Tensor, first: int, last: int, moved: Tensor) -> Tensor:
        values = moved.new_empty((*moved.shape, len(indices)), dtype=torch.float64)
        for parameter, offset in self.layout:
            flat = parameter.view(-1)
            for j in range(max(first, offset), min(last, offset + parameter.numel())):
                entry = flat[j - offset : j - offset + 1]
                before = entry.clone()
                try:
                    for k in range(len(moved)):
                        entry.copy_(moved[k, j - first : j - first + 1])
                        values[k, j - first] = self.plain(indices)
                finally:
                    entry.copy_(before)
        return values

    def _along(self, indices: Tensor, key: Tensor, amount: float) -> Tensor:
        with self._moved(key, amount):
            return self.plain(indices)

    @contextmanager
    def _moved(self, key: Tensor, amount: float) -> Iterator[None]:
        if self.layers is None:
            with self._kept(self.layout.params):
                for parameter, offset in self.layout:
                    move_(parameter, offset, key, amount)
                yield
            return
        outside = [(p, offset) for p, offset in self.layout if self.layers.is_outside(p)]
        with self._kept([p for p, _ in outside]):
            for parameter, offset in outside:
                move_(parameter, offset, key, amount)
            with self.layers.moving(lambda parameter, offset: move_(parameter, offset, key, amount)):
                yield

    @contextmanager
    def _kept(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        aside = [parameter.detach().clone() for parameter in parameters]
        try:
            yield
        finally:
            for parameter, before in zip(parameters, aside, strict=True):
                parameter.copy_(before)
