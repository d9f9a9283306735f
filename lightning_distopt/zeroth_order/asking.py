"""Asking a black box: values of f_i at displaced points, checked and counted.

``closure.py`` asks at the parameters' present values, one point at a time; ``functional.py`` many points in one call.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_distopt.errors import NonFiniteError, QueryShapeError
from lightning_distopt.zeroth_order.retry import RetryPolicy

__all__ = ["Ask", "Layout", "QueryCount"]


@dataclass
class QueryCount:
    """Evaluations of single f_i.

    Attributes:
        mine: answered in this process.
        others: answered in other processes, or before a checkpoint.
        checks: answered for the repeated query at the start; not part of the others.
        compared: whether a difference has been compared with the rounding of the values.
    """

    mine: int = 0
    others: int = 0
    checks: int = 0
    compared: bool = False

    @property
    def total(self) -> int:
        """All but the checks."""
        return self.mine + self.others


@dataclass
class Layout:
    """All parameters laid end to end.

    Attributes:
        params: in order.
        offsets: place of the first entry of each.
        numel: entries of all together.
    """

    params: list[Parameter]
    offsets: list[int] = field(init=False)
    numel: int = field(init=False)

    def __post_init__(self) -> None:
        self.offsets, total = [], 0
        for parameter in self.params:
            self.offsets.append(total)
            total += parameter.numel()
        self.numel = total

    def __iter__(self) -> Iterator[tuple[Parameter, int]]:
        return iter(zip(self.params, self.offsets, strict=True))

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return self.params[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.params[0].dtype

    def flat(self, tensors: Sequence[Tensor] | None = None) -> Tensor:
        """Return the parameters, or tensors of their shapes, as one vector."""
        return torch.cat([tensor.detach().reshape(-1) for tensor in (tensors or self.params)])


class Ask(ABC):
    """Values of f_i, float64; everything that comes back is checked and counted.

    Args:
        layout: of the parameters.
        count: is increased by every answer.
        retry: what happens when a query fails.
    """

    #: Whether each sample may have a direction of its own at no extra cost.
    batched: bool

    def __init__(self, layout: Layout, count: QueryCount, retry: RetryPolicy) -> None:
        self.layout, self.count, self.retry = layout, count, retry
        self._epsilon = 0.0

    @abstractmethod
    def point(self) -> Tensor:
        """Return the point at which queries are made, as one vector."""

    @contextmanager
    def session(self) -> Iterator[None]:
        """Surround all queries of one step."""
        yield

    @abstractmethod
    def at(self, base: Sequence[Tensor] | None) -> Any:
        """Return a context in which queries are made at ``base`` instead of at the parameters' values (``None``: there)."""

    @abstractmethod
    def plain(self, indices: Tensor) -> Tensor:
        """Return f_i(x), shape ``(b,)``."""

    @abstractmethod
    def shared(self, indices: Tensor, keys: Tensor, amounts: Tensor) -> Tensor:
        """Return f_i(x + amounts[k] u_k) for every i and k, shape ``(K, b)``."""

    @abstractmethod
    def own(self, indices: Tensor, keys: Tensor, amounts: Tensor) -> Tensor:
        """Return f_i(x + amounts[i] u_i), each sample along its own direction, shape ``(b,)``."""

    @abstractmethod
    def coordinates(self, indices: Tensor, first: int, last: int, moved: Tensor) -> Tensor:
        """Return f_i at points that differ from x in one entry, which is ``moved[k, j - first]``.

        Args:
            indices: shape ``(b,)``.
            first: first coordinate.
            last: after the last one.
            moved: new values of the entries, shape ``(K, last - first)``: K points for every coordinate.

        Returns:
            Shape ``(K, last - first, b)``.
        """

    def checked(self, query: Callable[[], Any], indices: Tensor, points: int | None = None) -> Tensor:
        """Ask, count, and return the answer as float64 of shape ``(b,)``, or ``(points, b)``.

        Raises:
            QueryError: if there is no answer.
            QueryShapeError: if it is not one value a sample.
            NonFiniteError: if it holds a NaN or an infinity.
            TypeError: if it is not a floating-point tensor of at least 32 bits.
        """
        b = len(indices)
        samples = b * (points or 1)
        answer = self.retry.answer(query, samples)
        self.count.mine += samples
        if not isinstance(answer, Tensor):
            try:
                # Of a function that knows nothing of torch; a list of Python's numbers has their 64 bits.
                answer = torch.as_tensor(answer, dtype=None if hasattr(answer, "dtype") else torch.float64)
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(
                    f"A query must return a tensor of {b} losses: got {type(answer).__name__}. Return for example "
                    "`torch.tensor(losses)`."
                ) from error
        shape = (b,) if points is None else (points, b)
        if tuple(answer.shape) != shape:
            inner = tuple(answer.shape if points is None else answer.shape[1:])
            hint = (
                "It looks like a mean: leave out the reduction, as in `cross_entropy(..., reduction='none')`."
                if inner in ((), (1,))
                else "Return one loss for each index, in the order of the indices, without further dimensions."
            )
            raise QueryShapeError(
                f"A query for {b} samples must return {b} losses, shape ({b},): got shape {inner}. {hint}"
            )
        if not answer.is_floating_point() or answer.dtype.itemsize < 4:
            raise TypeError(
                f"A query must return losses of at least 32 bits: got {answer.dtype}, whose differences are mostly rounding. "
                "Compute the loss as `loss_function(logits.float(), ...)`."
            )
        self._epsilon = torch.finfo(answer.dtype).eps
        answer = answer.detach().to(self.layout.device, torch.float64)
        if not bool(answer.isfinite().all()):
            bad = (~answer.isfinite()).view(-1, b).any(0).nonzero().view(-1)
            raise NonFiniteError(
                f"A query returned a NaN or an infinity for {len(bad)} of {b} samples, the first of them number "
                f"{int(indices[int(bad[0])])}. The parameters are those before the step: look at that sample, lower `lr` or "
                "`smoothing`, or bound the loss."
            )
        return answer

    def compare(self, high: Tensor, low: Tensor) -> None:
        """Warn, once, if the first differences of values are no more than rounding."""
        if self.count.compared:
            return
        self.count.compared = True
        if bool(((high - low).abs() < 100 * self._epsilon * low.abs()).all()):
            warnings.warn(
                "All first differences of the objective are within 100 roundings of its values, so the estimated gradient is "
                "mostly rounding: raise `smoothing`, return losses of a wider type, or look whether the output is flat there "
                "(hard labels, saturation).",
                stacklevel=2,
            )
