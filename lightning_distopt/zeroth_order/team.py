"""Who evaluates what: rows of numbers that are computed here, or by several processes that tell each other the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from lightning_distopt.errors import QueryError
from lightning_distopt.zeroth_order.asking import QueryCount

__all__ = ["Gather", "across", "share"]


class Gather(Protocol):
    """Tells every process the numbers of all."""

    rank: int
    world: int

    def gather(self, mine: Tensor, step: int) -> Tensor:
        """Return everyone's 1-D float64 numbers, equally many from each, shape ``(world, len(mine))``."""
        ...


def share(count: int, rank: int, world: int) -> tuple[int, int]:
    """Return the bounds of a rank's part of ``count`` rows: contiguous, in rank order, of nearly equal lengths."""
    return count * rank // world, count * (rank + 1) // world


def across(
    team: Gather | None,
    count: QueryCount,
    step: int,
    rows: int,
    columns: int,
    compute: Callable[[int, int], Tensor],
    device: torch.device,
) -> Tensor:
    """Return ``compute(0, rows)``, each process computing a part of the rows and telling the others.

    The numbers are the same on all ranks bit for bit: each comes from one rank. If any rank fails, all raise.

    Args:
        team: the processes; ``None`` for this one alone.
        count: of queries; the other ranks' are added to it.
        step: number of the step, for messages.
        rows: how many there are.
        columns: of every row.
        compute: takes the bounds of some rows, returns float64 of shape ``(last - first, columns)``.
        device: of the result.

    Raises:
        QueryError: on the ranks whose queries were answered, if those of another were not.
        Exception: whatever ``compute`` raises, on the rank where it does.
    """
    if team is None or team.world == 1:
        return compute(0, rows)
    bounds = [share(rows, rank, team.world) for rank in range(team.world)]
    first, last = bounds[team.rank]
    mine = torch.zeros(2 + columns * max(high - low for low, high in bounds), dtype=torch.float64, device=device)
    asked, failure = count.mine, None
    try:
        if last > first:
            mine[2 : 2 + columns * (last - first)] = compute(first, last).reshape(-1)
    except Exception as error:  # the others wait: tell them first
        failure = error
        mine[0] = 1
    mine[1] = count.mine - asked
    everyones = team.gather(mine, step)
    count.others += int(everyones[:, 1].sum()) - (count.mine - asked)
    if failure is not None:
        raise failure
    failed = everyones[:, 0].nonzero().view(-1).tolist()
    if failed:
        raise QueryError(
            f"The queries of ranks {failed} failed in step {step}; their own messages say why. All ranks hold the parameters "
            "and the state from before the step."
        )
    parts = [row[2 : 2 + columns * (high - low)] for row, (low, high) in zip(everyones, bounds, strict=True)]
    return torch.cat(parts).view(rows, columns)
