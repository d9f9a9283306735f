"""Gradient estimators from values alone: coordinates, Gaussian directions, directions on the sphere.

=====================  ==============================================  ==========================
estimator              of the gradient of f_i at x                     queries for each f_i
=====================  ==============================================  ==========================
CooSGE                 sum_j [f(x + h_j e_j) - f(x - h_j e_j)]         2 d
                       / (2 h_j) e_j
... forward            sum_j [f(x + h_j e_j) - f(x)] / h_j e_j         d + 1
GauSGE                 mean_k [f(x + h u_k) - f(x)] / h u_k            q + 1
... central            mean_k [f(x + h u_k) - f(x - h u_k)]            2 q
                       / (2 h) u_k
sphere                 GauSGE with u_k on the unit sphere, times d     q + 1 (2 q)
=====================  ==============================================  ==========================

``d`` parameters, ``q`` directions, smoothing ``h``, u_k ~ N(0, I). CooSGE's error vanishes with ``h``; GauSGE's does not:
its mean square is at most ``2 (2d + 9) |grad|^2 + h^2 L^2 (d + 6)^3``.

Source: arXiv:1902.06158.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_distopt.zeroth_order.asking import Ask
from lightning_distopt.zeroth_order.directions import direction_keys, sphere_scales
from lightning_distopt.zeroth_order.estimates import Dense, Estimate, Replayed
from lightning_distopt.zeroth_order.team import Gather, across

__all__ = ["CoordinateEstimator", "Draw", "Estimator", "GaussianEstimator", "Sharing", "SphereEstimator"]

Sharing = Literal["auto", "per_example", "per_batch"]
_BLOCKS = 16  # parts of a batch whose sums travel, so that a sum does not depend on the number of ranks
_SAMPLES = 4096  # that are asked about at once in a pass over all of them


@dataclass
class Draw:
    """Which samples are asked about, at which directions.

    Attributes:
        indices: of the samples, int64 on the CPU, shape ``(b,)``.
        seed: of the run.
        step: number of the step.
        purpose: what the directions are for.
        group: samples that share a direction where directions are shared.
        team: the processes among which the queries are divided.
    """

    indices: Tensor
    seed: int
    step: int
    purpose: str
    group: int
    team: Gather | None = None

    def keys(self, first: int, last: int, directions: int, shared: bool) -> Tensor:
        """Return the keys of the samples (or groups) from ``first`` to ``last``, shape ``(last - first, directions)``."""
        purpose = f"{self.purpose}, shared" if shared else self.purpose
        return direction_keys(self.seed, self.step, purpose, torch.arange(first, last), directions)

    def across(self, ask: Ask, rows: int, columns: int, compute: Callable[[int, int], Tensor]) -> Tensor:
        """Divide rows among the processes; see :func:`across`."""
        return across(self.team, ask.count, self.step, rows, columns, compute, ask.layout.device)


class Estimator(ABC):
    """Estimates gradients of f_i from values of f_i.

    Attributes:
        dense: rows for single samples are vectors, not scalars.
    """

    dense: bool

    @abstractmethod
    def queries(self, numel: int) -> int:
        """Return the queries for one f_i with ``numel`` parameters."""

    @abstractmethod
    def smoothing(self, dtype: torch.dtype) -> float:
        """Return the default smoothing for parameters of a dtype."""

    @abstractmethod
    def mean(self, ask: Ask, draw: Draw, smoothing: float | None) -> tuple[Estimate, float]:
        """Return the estimate for the mean of the drawn f_i, and about the mean of their values.

        Args:
            ask: queries, at the point that it stands at.
            draw: samples and directions.
            smoothing: distance in x; ``None`` takes the default.
        """

    @abstractmethod
    def rows(self, ask: Ask, draw: Draw, smoothing: float | None) -> tuple[Tensor, Tensor | None, float]:
        """Return what a table keeps of each f_i: vectors ``(b, d)``, or scalars and keys ``(b, q)``; and a mean value."""


class CoordinateEstimator(Estimator):
    """CooSGE: the difference along every coordinate; exact for quadratics if central.

    The smoothing is divided out as it came to be in floating point. The default is relative: ``h_j = h max(1, |x_j|)`` with
    1e-4 (float64), 5e-3 (float32); a number given to the optimizer is the distance itself.

    Args:
        central: differences to both sides, ``2 d`` queries; else forward, ``d + 1``, with an error of first order.
    """

    dense = True

    def __init__(self, central: bool = True) -> None:
        self.central = central

    def queries(self, numel: int) -> int:
        return 2 * numel if self.central else numel + 1

    def smoothing(self, dtype: torch.dtype) -> float:
        return {torch.float64: 1e-4, torch.float32: 5e-3, torch.float16: 2e-2}.get(dtype, 5e-2)

    def mean(self, ask: Ask, draw: Draw, smoothing: float | None) -> tuple[Estimate, float]:
        b = len(draw.indices)
        base = None if self.central else self._base(ask, draw)

        def compute(first: int, last: int) -> Tensor:
            sums = torch.zeros(last - first, 2, dtype=torch.float64, device=ask.layout.device)
            for some in range(0, b, _SAMPLES):
                part = slice(some, some + _SAMPLES)
                slopes, level = self._slopes(ask, draw.indices[part], first, last, smoothing, base, part)
                sums[:, 0] += slopes.sum(1)
                sums[:, 1] += level.sum(1)
            return sums / b

        found = draw.across(ask, ask.layout.numel, 2, compute)
        return Dense(found[:, 0]), float(found[:, 1].mean())

    def rows(self, ask: Ask, draw: Draw, smoothing: float | None) -> tuple[Tensor, Tensor | None, float]:
        b, numel = len(draw.indices), ask.layout.numel
        out = torch.empty(b, numel, dtype=ask.layout.dtype, device=ask.layout.device)
        value = 0.0
        base = None if self.central else self._base(ask, draw)
        for some in range(0, b, _SAMPLES):
            part = slice(some, some + _SAMPLES)
            size = len(draw.indices[part])

            def compute(first: int, last: int, part: slice = part) -> Tensor:
                slopes, level = self._slopes(ask, draw.indices[part], first, last, smoothing, base, part)
                return torch.cat([slopes, level.mean(1, keepdim=True)], 1)

            found = draw.across(ask, numel, size + 1, compute)
            out[part] = found[:, :-1].T.to(out.dtype)
            value += float(found[:, -1].mean()) * size / b
        return out, None, value

    def _base(self, ask: Ask, draw: Draw) -> Tensor:
        def compute(first: int, last: int) -> Tensor:
            indices = draw.indices[first:last]
            return torch.cat([ask.plain(indices[some : some + _SAMPLES]) for some in range(0, len(indices), _SAMPLES)])[
                :, None
            ]

        return draw.across(ask, len(draw.indices), 1, compute)[:, 0]

    def _slopes(
        self,
        ask: Ask,
        indices: Tensor,
        first: int,
        last: int,
        smoothing: float | None,
        base: Tensor | None,
        part: slice,
    ) -> tuple[Tensor, Tensor]:
        """Return slopes and levels of f_i along coordinates, both of shape ``(last - first, b)``."""
        x = ask.point()[first:last]
        step = torch.full_like(x, smoothing) if smoothing else self.smoothing(x.dtype) * x.abs().clamp(min=1)
        moved = torch.stack([x + step, x - step]) if self.central else (x + step)[None]
        low = moved[1] if self.central else x
        width = (moved[0].double() - low.double())[:, None]
        if not bool((width > 0).all()):
            entry = int((width[:, 0] <= 0).nonzero()[0])
            raise ValueError(
                f"`smoothing` must move every parameter: {float(step[entry])!r} is lost to rounding beside entry {first + entry} "
                f"of {float(x[entry])!r} in {x.dtype}. Leave it out, which scales it with the parameter, raise it, or use "
                "float64. Nothing has moved."
            )
        values = ask.coordinates(indices, first, last, moved)
        ask.compare(values[0], values[1] if base is None else base[part].expand(last - first, -1))
        if base is None:
            return (values[0] - values[1]) / width, (values[0] + values[1]) / 2
        level = base[part].expand(last - first, -1)
        return (values[0] - level) / width, level


class GaussianEstimator(Estimator):
    """GauSGE: differences along Gaussian directions, which come back from keys and are never stored.

    The default smoothing is 1e-4 (float64), 1e-3 (float32), the distance in units of a direction.

    Args:
        directions: of each sample (or batch), at least 1; the mean over them is taken.
        sharing: ``per_example`` gives every sample directions of its own, as in the paper; ``per_batch`` gives one
            set to the whole batch (the cheap form for a closure, of higher variance); ``auto`` takes the first with an
            objective, the second with a closure.
        central: differences to both sides, ``2 q`` queries; else forward, ``q + 1``.
    """

    dense = False

    def __init__(self, directions: int = 1, sharing: Sharing = "auto", central: bool = False) -> None:
        if isinstance(directions, bool) or not isinstance(directions, int) or directions < 1:
            raise ValueError(f"`directions` must be an integer >= 1: got {directions!r}. Write `directions=1`.")
        if sharing not in get_args(Sharing):
            raise ValueError(f"`sharing` must be one of {', '.join(map(repr, get_args(Sharing)))}: got {sharing!r}.")
        self.directions, self.sharing, self.central = directions, sharing, central

    def queries(self, numel: int) -> int:
        return 2 * self.directions if self.central else self.directions + 1

    def smoothing(self, dtype: torch.dtype) -> float:
        return {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 1e-2}.get(dtype, 2e-2)

    def scales(self, keys: Tensor, numel: int) -> tuple[Tensor, float]:
        """Return what directions are multiplied by, shape of ``keys``, and what scalars are multiplied by."""
        return torch.ones_like(keys, dtype=torch.float64), 1.0

    def mean(self, ask: Ask, draw: Draw, smoothing: float | None) -> tuple[Estimate, float]:
        b = len(draw.indices)
        if not self._shares(ask):
            scalars, keys, value = self._own_rows(ask, draw, smoothing)
        elif draw.group >= b:
            scalars, keys, value = self._one_set(ask, draw, smoothing)
        else:
            scalars, keys, value = self._many_sets(ask, draw, smoothing)
        return Replayed(keys.reshape(-1), scalars.reshape(-1)), value

    def rows(self, ask: Ask, draw: Draw, smoothing: float | None) -> tuple[Tensor, Tensor | None, float]:
        b = len(draw.indices)
        if not self._shares(ask):
            scalars, keys, value = self._own_rows(ask, draw, smoothing)
            return scalars * b, keys, value
        groups = torch.arange(b) // draw.group
        keys = draw.keys(0, int(groups[-1]) + 1, self.directions, True).to(ask.layout.device)
        distance = self._distance(ask, smoothing)

        def compute(first: int, last: int) -> Tensor:
            parts = []
            for group in sorted(set(groups[first:last].tolist())):
                own = draw.indices[first:last][groups[first:last] == group]
                parts.append(self._differences(ask, own, keys[group], distance))
            return torch.cat(parts)

        found = draw.across(ask, b, self.directions + 1, compute)
        return found[:, :-1], keys[groups.to(keys.device)], float(found[:, -1].mean())

    def _shares(self, ask: Ask) -> bool:
        return self.sharing == "per_batch" or (self.sharing == "auto" and not ask.batched)

    def _distance(self, ask: Ask, smoothing: float | None) -> float:
        return smoothing if smoothing else self.smoothing(ask.layout.dtype)

    def _own_rows(self, ask: Ask, draw: Draw, smoothing: float | None) -> tuple[Tensor, Tensor, float]:
        """Directions of each sample; return weights of the mean, keys, and a mean value."""
        b, numel, distance = len(draw.indices), ask.layout.numel, self._distance(ask, smoothing)
        keys = draw.keys(0, b, self.directions, False).to(ask.layout.device)
        scales, factor = self.scales(keys, numel)

        def compute(first: int, last: int) -> Tensor:
            out = []
            for some in range(first, last, _SAMPLES):
                part = slice(some, min(some + _SAMPLES, last))
                indices, amounts = draw.indices[part], scales[part] * distance
                low = None if self.central else ask.plain(indices)
                slopes, level = [], low
                for k in range(self.directions):
                    high = ask.own(indices, keys[part, k], amounts[:, k])
                    if self.central:
                        other = ask.own(indices, keys[part, k], -amounts[:, k])
                        ask.compare(high, other)
                        slopes.append((high - other) / (2 * distance))
                        level = (high + other) / 2
                    else:
                        assert low is not None
                        ask.compare(high, low)
                        slopes.append((high - low) / distance)
                assert level is not None
                out.append(torch.stack([*slopes, level], 1))
            return torch.cat(out)

        found = draw.across(ask, b, self.directions + 1, compute)
        weights = found[:, :-1] * scales * (factor / (self.directions * b))
        return weights, keys, float(found[:, -1].mean())

    def _differences(self, ask: Ask, indices: Tensor, keys: Tensor, distance: float) -> Tensor:
        """Slopes of each sample along shared directions, scaled for the table, and values: shape ``(b, q + 1)``."""
        scales, factor = self.scales(keys, ask.layout.numel)
        high = ask.shared(indices, keys, scales * distance)
        if self.central:
            low = ask.shared(indices, keys, -scales * distance)
            slopes, level = (high - low) / (2 * distance), (high[-1] + low[-1]) / 2
        else:
            level = ask.plain(indices)
            slopes = (high - level) / distance
            ask.compare(high, level.expand_as(high))
        return torch.cat([(slopes * (scales * factor / self.directions)[:, None]).T, level[:, None]], 1)

    def _many_sets(self, ask: Ask, draw: Draw, smoothing: float | None) -> tuple[Tensor, Tensor, float]:
        """One set of directions for each group of samples, in a pass over many."""
        b, distance = len(draw.indices), self._distance(ask, smoothing)
        groups = -(-b // draw.group)
        keys = draw.keys(0, groups, self.directions, True).to(ask.layout.device)

        def compute(first: int, last: int) -> Tensor:
            each = [draw.indices[g * draw.group : (g + 1) * draw.group] for g in range(first, last)]
            found = [self._differences(ask, own, keys[first + i], distance).sum(0) for i, own in enumerate(each)]
            return torch.stack(found) / b

        found = draw.across(ask, groups, self.directions + 1, compute)
        return found[:, :-1], keys, float(found[:, -1].sum())

    def _one_set(self, ask: Ask, draw: Draw, smoothing: float | None) -> tuple[Tensor, Tensor, float]:
        """One set of directions for the batch: sums over parts of the batch at every point are all that travels.

        Points (x, then x + h u_k, or both sides of x) times parts of the batch are divided among the processes.
        """
        b, q, distance = len(draw.indices), self.directions, self._distance(ask, smoothing)
        keys = draw.keys(0, 1, q, True).to(ask.layout.device)[0]
        scales, factor = self.scales(keys, ask.layout.numel)
        amounts = scales * distance
        blocks = min(b, _BLOCKS)
        edges = [b * block // blocks for block in range(blocks + 1)]
        points = 2 * q if self.central else q + 1
        sides = torch.cat([amounts, -amounts]) if self.central else torch.cat([amounts.new_zeros(1), amounts])
        of_points = torch.cat([keys, keys]) if self.central else torch.cat([keys[:1], keys])

        def compute(first: int, last: int) -> Tensor:
            sums = []
            cell = first
            while cell < last:
                point, block = divmod(cell, blocks)
                whole = 1 if block else max(1, (last - cell) // blocks)  # points whose blocks are all this rank's
                stop = blocks if whole > 1 or last - cell >= blocks - block else block + last - cell
                indices = draw.indices[edges[block] : edges[stop]]
                values = self._at_points(ask, indices, of_points[point : point + whole], sides[point : point + whole])
                sizes = [edges[i + 1] - edges[i] for i in range(block, stop)]
                sums += [part.sum(1) for part in torch.split(values, sizes, 1)] if whole == 1 else []
                if whole > 1:
                    sums.append(torch.stack([part.sum(1) for part in torch.split(values, sizes, 1)], 1).view(-1))
                cell += whole * (stop - block)
            return torch.cat(sums)[:, None]

        sums = draw.across(ask, points * blocks, 1, compute).view(points, blocks)
        low, high = (sums[q:], sums[:q]) if self.central else (sums[:1], sums[1:])
        ask.compare(high, low.expand_as(high))
        slopes = (high - low).sum(1) / (b * distance * (2 if self.central else 1))
        value = float((high[-1] + low[-1]).sum() / (2 * b) if self.central else low.sum() / b)
        return slopes * scales * (factor / q), keys, value

    def _at_points(self, ask: Ask, indices: Tensor, keys: Tensor, amounts: Tensor) -> Tensor:
        """Values at some points, shape ``(K, b)``; a point at distance 0 is x itself."""
        if not self.central and float(amounts[0]) == 0.0:
            plain = ask.plain(indices)[None]
            return plain if len(keys) == 1 else torch.cat([plain, ask.shared(indices, keys[1:], amounts[1:])])
        return ask.shared(indices, keys, amounts)


class SphereEstimator(GaussianEstimator):
    """``d / h [f(x + h u) - f(x)] u`` with ``u`` uniform on the unit sphere; the factor ``d`` belongs to the sphere only.

    Args:
        directions: see :class:`GaussianEstimator`.
        sharing: see :class:`GaussianEstimator`.
        central: see :class:`GaussianEstimator`.
    """

    def smoothing(self, dtype: torch.dtype) -> float:
        return {torch.float64: 1e-4, torch.float32: 5e-3, torch.float16: 2e-2}.get(dtype, 5e-2)

    def scales(self, keys: Tensor, numel: int) -> tuple[Tensor, float]:
        return sphere_scales(keys.reshape(-1), numel).view(keys.shape), float(numel)
