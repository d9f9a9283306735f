"""An estimate of the smoothness constant L from values alone, for optimizers without a given rate."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_distopt.zeroth_order.asking import Ask
from lightning_distopt.zeroth_order.directions import direction_keys
from lightning_distopt.zeroth_order.estimators import Draw

__all__ = ["estimate_smoothness", "smoothness_queries"]

_RADII = (0.1, 0.3, 1.0)
_DIRECTIONS = 4


def smoothness_queries(samples: int) -> int:
    """Return what :func:`estimate_smoothness` asks."""
    return samples * len(_RADII) * _DIRECTIONS * 3


def estimate_smoothness(ask: Ask, draw: Draw) -> float:
    """Return the largest mean curvature along random directions, over a few distances r from the present point.

        L = max over r of  mean over i, w ~ N(0, I) of  |f_i(x + 2 r w) - 2 f_i(x + r w) + f_i(x)| / r^2

    This estimates the sum of absolute second derivatives, at least the largest one where f_i is convex and equal to it for
    functions of one inner product (generalised linear models): a careful value, not a tight one. Distances are in units of
    the root mean square of the parameters (of 1 if all are 0), since the curvature may vanish at the start itself.

    Args:
        ask: queries, at the present point.
        draw: the samples, shared by all distances and directions.
    """
    x = ask.point().double()
    scale = float(x.square().mean().sqrt()) or 1.0
    keys = direction_keys(draw.seed, draw.step, "smoothness", torch.zeros(1, dtype=torch.int64), _DIRECTIONS)[0]
    keys = keys.to(x.device)
    radii = [scale * radius for radius in _RADII]

    def compute(first: int, last: int) -> Tensor:
        found = []
        for cell in range(first, last):
            radius, key = radii[cell // _DIRECTIONS], keys[cell % _DIRECTIONS]
            amounts = torch.tensor([radius, 2 * radius], dtype=torch.float64, device=x.device)
            near, far = ask.shared(draw.indices, key.repeat(2), amounts)
            found.append((far - 2 * near + ask.plain(draw.indices)).abs().mean() / radius**2)
        return torch.stack(found)[:, None]

    curvatures = draw.across(ask, len(radii) * _DIRECTIONS, 1, compute)
    return float(curvatures.view(len(radii), _DIRECTIONS).mean(1).max())
