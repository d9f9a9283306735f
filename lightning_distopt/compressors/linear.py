"""Linear quantisation: unbiased random rounding to levels spread over the bucket's range.

Source: a baseline of arXiv:2002.11082; which grid it used there is not known to us.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_distopt.compressors.quantizer import RandomRounding, check_levels

__all__ = ["LinearQuantizer"]

Grid = Literal["minmax", "quantile"]


class LinearQuantizer(RandomRounding):
    """Round at random to levels between a bucket's minimum and maximum, evenly spaced in value or in rank.

    ``E[C(v)] = v``. Payload: 2 floats a bucket ("minmax") or ``levels`` floats ("quantile"); 1.6 bits an element for 3
    levels, 3 for 5, 4 for 9, 8 for 256.

    Args:
        levels: from 3 to 256.
        grid: "minmax" (evenly spaced values) or "quantile" (evenly spaced ranks).
        bucket_size: elements that share levels; ``None`` is all of a tensor.
        clip: clip to this many standard deviations first, which is biased but errs less; ``None`` does not.

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self, levels: int = 5, grid: Grid = "minmax", bucket_size: int | None = 2048, clip: float | None = None
    ) -> None:
        if grid not in get_args(Grid):
            raise ValueError(f"`grid` must be one of 'minmax', 'quantile': got {grid!r}. 'minmax' is the usual one.")
        check_levels(levels, tuple(range(3, 257)))
        super().__init__(levels, 2 if grid == "minmax" else levels, bucket_size, clip)
        self.grid: Grid = grid
        self.unbiased = clip is None

    def _side(self, rows: Tensor) -> Tensor:
        if self.grid == "minmax":
            return torch.stack((rows.amin(1), rows.amax(1)), 1)
        ranks = torch.linspace(0, rows.size(1) - 1, self.symbols, dtype=torch.float64, device=rows.device)
        return rows.sort(1).values[:, ranks.round().long()]

    def _compiled_side(self, kernels: ModuleType, flat: Tensor, size: int, limits: Tensor | None) -> Tensor | None:
        if self.grid == "quantile":
            return None
        ends: Tensor = kernels.ranges(flat, size)
        return ends if limits is None else torch.clamp(ends, -limits, limits)

    def _table(self, side: Tensor) -> Tensor:
        if self.grid == "quantile":
            return side
        share = torch.arange(self.symbols, device=side.device).to(side.dtype) / (self.symbols - 1)
        table = side[:, :1] * (1 - share) + side[:, 1:] * share
        return torch.minimum(torch.maximum(table, side[:, :1]), side[:, 1:])  # ascending whatever the rounding

    def __repr__(self) -> str:
        options = f"grid={self.grid!r}, bucket_size={self.bucket_size}, clip={self.clip}"
        return f"LinearQuantizer(levels={self.symbols}, {options})"
