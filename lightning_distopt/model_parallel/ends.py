"""Cuts for a chain whose first and last stage share a device: balanced with the double load there, or as the authors cut.

With a cost ``c_k`` of forward and backward of stage k, a third of it forward, and r = 1/3 where a stage runs again (else 0), a
batch takes, in steady state and without latency (:mod:`lightning_distopt.model_parallel.timeline`):

    T = max( max((1 + r) c_0, (c_0 + ... + c_{K-2}) / 3) + c_{K-1},  (1 + r) c_k for 0 < k < K - 1 )
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

__all__ = ["Head", "authors_split", "balance_ends"]

_FORWARD = 1 / 3  # of forward and backward, as everywhere in our figures


class Head(NamedTuple):
    """What the last stage has besides its layers.

    Attributes:
        cost: of forward and backward, in the unit of the layers' costs.
        memory: of its own parameters, in the unit of the layers' memory; 0 for one that is a layer's.
    """

    cost: float = 0.0
    memory: float = 0.0


def balance_ends(
    costs: Sequence[float],
    stages: int,
    head: Head = Head(),  # noqa: B008
    *,
    replay: bool = True,
    memory: Sequence[float] | None = None,
    limit: float | None = None,
) -> tuple[int, ...]:
    """Return the cuts with the shortest time a batch; of several, those with the least work on the shared device.

    Args:
        costs: of each layer, forward and backward, >= 0.
        stages: K, from 2 to the number of layers.
        head: of the last stage.
        replay: whether all stages but the last run their layers a second time.
        memory: of each layer, in megabytes.
        limit: most memory of one device.

    Raises:
        ValueError: if no cuts stay below the limit.
    """
    n, again = len(costs), 1.0 + _FORWARD * replay
    sums, held = ([0.0, *accumulate(map(float, values))] for values in (costs, memory or [0.0] * n))
    best: tuple[float, float] | None = None
    cuts: tuple[int, ...] = ()
    for i in range(1, n - stages + 2):
        middles = _middles(sums, held, i, stages - 2, limit)
        for j in range(i + stages - 2, n):
            middle = middles[stages - 2][j]
            if middle is None or (limit is not None and held[i] + held[n] - held[j] + head.memory > limit):
                continue
            last = sums[n] - sums[j] + head.cost
            own = max(again * sums[i], _FORWARD * sums[j]) + last
            found = max(own, again * middle[0]), again * sums[i] + last
            if best is None or found < best:
                best, cuts = found, (i, *middle[1], *((j,) if stages > 2 else ()))
            if stages == 2:
                break  # nothing between the two: j is i
    if best is None:
        raise ValueError(
            f"`memory_limit_mb` leaves no way to cut {n} layers into {stages} stages, the first and the last on one device: got "
            f"{limit:g}, and all take {held[n] + head.memory:.3g}. Raise the limit or use more devices."
        )
    return cuts


def _middles(
    sums: Sequence[float], held: Sequence[float], begin: int, blocks: int, limit: float | None
) -> list[list[tuple[float, tuple[int, ...]] | None]]:
    """Return, by number of blocks and end, the least possible cost of the most expensive block from ``begin``, and its cuts."""
    n = len(sums) - 1
    table: list[list[tuple[float, tuple[int, ...]] | None]] = [[None] * (n + 1) for _ in range(blocks + 1)]
    table[0][begin] = (0.0, ())
    for k in range(1, blocks + 1):
        for end in range(begin + k, n):
            for cut in range(begin + k - 1, end):
                before = table[k - 1][cut]
                if before is None or (limit is not None and held[end] - held[cut] > limit):
                    continue
                worst = max(before[0], sums[end] - sums[cut])
                known = table[k][end]
                if known is None or worst < known[0]:
                    table[k][end] = worst, (*before[1], cut) if k > 1 else ()
    return table


def authors_split(kinds: Sequence[str], devices: int) -> tuple[int, ...]:
    """Return the cuts of the authors' code, which counts blocks: layers of the kind that there are most of.

    With L blocks, ``n = L // devices``: n // 2 in the first stage, n - n // 2 in the last, the rest in order over the other
    devices. Layers before the first block go with the first stage, those after a block with that block.

    Args:
        kinds: what each layer is.
        devices: K - 1.

    Raises:
        ValueError: if a stage would be empty.

    Example:
        >>> authors_split(["embedding", *["block"] * 12], devices=2)  # 3, 6 and 3 blocks
        (4, 10)
    """
    most = Counter(kinds).most_common(1)[0][0]
    places = [index for index, kind in enumerate(kinds) if kind == most]
    each = len(places) // devices
    ends = each // 2, each - each // 2
    between = len(places) - sum(ends)
    sizes = [ends[0], *(between // (devices - 1) + (d < between % (devices - 1)) for d in range(devices - 1)), ends[1]]
    cuts = tuple(places[count] for count in list(accumulate(sizes))[:-1] if count < len(places))
    edges = (0, *cuts, len(kinds))
    if len(cuts) != devices or any(a >= b for a, b in pairwise(edges)):
        raise ValueError(
            f"`split='authors'` must leave no stage empty: got {len(places)} layers of the kind {most} among {len(kinds)} for "
            f"{devices + 1} stages on {devices} devices, {sizes} a stage. Use at most {max(1, len(places) // 2)} devices, or "
            "`split='balanced'`."
        )
    return cuts
