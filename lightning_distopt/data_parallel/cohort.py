"""Who takes part in a round, and how much each counts: functions of the seed, the round and the numbers of samples."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Literal

import torch

from lightning_distopt.compressors.randomness import derive_key

__all__ = ["Weighting", "cohort", "shares"]

Weighting = Literal["normalized", "paper", "uniform"]


def cohort(world: int, participation: float, seed: int, round: int) -> list[int]:
    """Return ``max(1, ceil(participation * world))`` ranks, uniformly without replacement, in order.

    The same on all ranks, and the same again after a resume, because nothing but the arguments enters.
    """
    size = max(1, math.ceil(participation * world - 1e-9))  # 0.1 * 30 is a little above 3
    if size >= world:
        return list(range(world))
    draw = torch.Generator().manual_seed(derive_key(seed, 0, round, "@cohort") % 2**63)
    return sorted(torch.randperm(world, generator=draw)[:size].tolist())


def shares(weighting: Weighting, samples: Sequence[int], chosen: Collection[int]) -> list[float]:
    """Return ``p_k`` of every rank; 0 for those that are not in the cohort ``S``, and for those without samples.

    ==============  =======================  ==========================================
    ``normalized``  ``n_k / Σ_S n_j``        goes with a server rate of 1
    ``paper``       ``n_k / n``, of all K    goes with a server rate of ``K / |S|``; unbiased
    ``uniform``     ``1 / |S|``              needs no numbers of samples
    ==============  =======================  ==========================================

    Source: arXiv:2002.02090, section 2.1 of the specification.

    Args:
        weighting: see the table.
        samples: ``n_k`` by rank.
        chosen: ranks of the cohort.
    """
    counts = [(1 if weighting == "uniform" else n) if rank in chosen else 0 for rank, n in enumerate(samples)]
    total = sum(samples) if weighting == "paper" else sum(counts)
    return [n / total if total else 0.0 for n in counts]
