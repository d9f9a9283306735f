"""Asking by a function of the parameters: many displaced points in one batched call, in chunks that fit a memory bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_distopt.compressors.randomness import normals
from lightning_distopt.errors import QueryError
from lightning_distopt.zeroth_order.asking import Ask, Layout, QueryCount
from lightning_distopt.zeroth_order.retry import RetryPolicy

__all__ = ["FunctionalAsk", "Objective"]

Objective = Callable[..., Tensor]
"""``f(params: tuple[Tensor, ...], indices or what was fetched for them) -> losses of shape (b,)``."""

_ENOUGH = 64  # coordinates that are worth a call
_SAMPLE = 64  # numbers that a sample is taken to need in the model's layers, for the size of a chunk


class FunctionalAsk(Ask):
    """``objective(params, indices)`` is vectorised by ``torch.func.vmap`` over copies of the parameters.

    Args:
        objective: a function of torch operations that changes nothing.
        layout: of the parameters.
        count: of queries.
        retry: what happens when a query fails.
        chunk_bytes: of the displaced copies (and a guess of what a sample needs) that exist at the same time.
        fetch: makes what the objective takes as its second argument from indices; tensors in it begin with the samples.
    """

    batched = True

    def __init__(
        self,
        objective: Objective,
        layout: Layout,
        count: QueryCount,
        retry: RetryPolicy,
        chunk_bytes: int,
        fetch: Callable[[Tensor], Any] | None = None,
    ) -> None:
        super().__init__(layout, count, retry)
        self.objective, self.chunk_bytes, self.fetch = objective, chunk_bytes, fetch
        self._base: list[Tensor] = [parameter.detach() for parameter in layout.params]

    def point(self) -> Tensor:
        return self.layout.flat(self._base)

    @contextmanager
    def at(self, base: Sequence[Tensor] | None) -> Iterator[None]:
        before = self._base
        self._base = before if base is None else list(base)
        try:
            yield
        finally:
            self._base = before

    def plain(self, indices: Tensor) -> Tensor:
        return self.checked(lambda: self.objective(tuple(self._base), self._fetched(indices)), indices)

    def shared(self, indices: Tensor, keys: Tensor, amounts: Tensor) -> Tensor:
        rows = self._rows(len(indices))
        values = []
        for some in range(0, len(keys), rows):
            part = slice(some, some + rows)
            points = [self._displaced(x, offset, keys[part], amounts[part]) for x, offset in self._each_with_offset()]
            values.append(self._call(points, [0] * len(points), indices))
        return torch.cat(values)

    def own(self, indices: Tensor, keys: Tensor, amounts: Tensor) -> Tensor:
        rows = self._rows(1)
        values = []
        for some in range(0, len(indices), rows):
            part = slice(some, some + rows)
            points = tuple(
                self._displaced(x, offset, keys[part], amounts[part]) for x, offset in self._each_with_offset()
            )

            def query(points: tuple[Tensor, ...] = points, part: slice = part) -> Tensor:
                single = tree_map(
                    lambda t: t.unsqueeze(1) if isinstance(t, Tensor) else t, self._fetched(indices[part])
                )
                answer = self._vectorised((0,) * len(points), 0)(points, single)
                return answer.flatten(1).squeeze(1) if answer.dim() > 1 else answer

            values.append(self.checked(query, indices[part]))
        return torch.cat(values)

    def coordinates(self, indices: Tensor, first: int, last: int, moved: Tensor) -> Tensor:
        variants = len(moved)
        rows = max(1, self._rows(len(indices)) // variants)
        values = []
        start = stop = first
        while stop < last:
            start, stop = stop, min(stop + rows, last)
            ends = [offset + x.numel() for x, offset in self._each_with_offset()]
            # At the end of a parameter: the others need no copies then.
            stop = next((end for end in ends if start + _ENOUGH <= end < stop), stop)
            points: list[Tensor] = []
            dims: list[int | None] = []
            for x, offset in self._each_with_offset():
                low, high = max(start, offset), min(stop, offset + x.numel())
                if low >= high:  # none of these coordinates is in this parameter
                    points.append(x)
                    dims.append(None)
                    continue
                copies = x.reshape(1, 1, -1).repeat(variants, stop - start, 1)
                places = torch.arange(low, high, device=x.device)
                copies[:, places - start, places - offset] = moved[:, low - first : high - first]
                points.append(copies.view(-1, *x.shape))
                dims.append(0)
            answer = self._call(points, dims, indices, variants * (stop - start))
            values.append(answer.view(variants, stop - start, -1))
        return torch.cat(values, 1)

    def _each_with_offset(self) -> Iterator[tuple[Tensor, int]]:
        return iter(zip(self._base, self.layout.offsets, strict=True))

    def _rows(self, samples: int) -> int:
        """Return how many displaced copies fit into a chunk."""
        one = self.layout.dtype.itemsize * (2 * self.layout.numel + _SAMPLE * samples)
        return max(1, self.chunk_bytes // one)

    def _displaced(self, x: Tensor, offset: int, keys: Tensor, amounts: Tensor) -> Tensor:
        u = normals(keys, offset, offset + x.numel()).to(x.dtype)
        return u.mul_(amounts.to(x.dtype)[:, None]).add_(x.reshape(-1)).view(len(keys), *x.shape)

    def _call(
        self, points: Sequence[Tensor], dims: Sequence[int | None], indices: Tensor, count: int | None = None
    ) -> Tensor:
        count = len(points[0]) if count is None else count

        def query() -> Tensor:
            return self._vectorised(tuple(dims), None)(tuple(points), self._fetched(indices))

        return self.checked(query, indices, count)

    def _vectorised(self, dims: tuple[int | None, ...], of_samples: int | None) -> Callable[..., Tensor]:
        vectorised = torch.func.vmap(self.objective, in_dims=(dims, of_samples))

        def call(points: tuple[Tensor, ...], given: Any) -> Tensor:
            try:
                answer: Tensor = vectorised(points, given)
            except (RuntimeError, ValueError) as error:
                if "vmap" not in str(error) and "functorch" not in str(error):
                    raise
                reason = str(error).split(". ")[0]
                raise QueryError(
                    f"The objective cannot be vectorised over the parameters: {reason}. Write it with torch operations that "
                    "neither draw random numbers nor look at single values, or ask with `step(closure)`."
                ) from error
            return answer

        return call

    def _fetched(self, indices: Tensor) -> Any:
        return indices if self.fetch is None else self.fetch(indices)
