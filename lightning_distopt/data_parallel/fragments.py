"""Fragments: the parameters cut, in order, into parts that are exchanged in turn; and a part that is on its way.

    local steps   0 . . . . . . . . . . . . 12      sync_every = 12, fragments = 3, delay = 1
    fragment 0          s a           s a           s: its exchange starts, a: it arrives
    fragment 1                s a                   a is sync_every / fragments steps after the last one's
    fragment 2                      s a

Source: arXiv:2501.18512; the order of one fragment's round is that of public implementations (see ``docs/local_updates.md``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from torch.nn import Parameter

from lightning_distopt.error_feedback import FlatViews
from lightning_distopt.exchange import Steps
from lightning_distopt.exchange.base import drain

__all__ = ["Flight", "cut"]


@dataclass
class Flight:
    """The averaged displacement of a fragment, under way or arrived.

    Args:
        means: one a bucket; complete once all works have ended.
        works: exchanges that have started.
    """

    means: list[FlatViews]
    works: list[Steps] = field(default_factory=list)

    def arrive(self) -> None:
        """Wait for the network and decode."""
        drain(self.works)
        self.works = []


def cut(params: Mapping[str, Parameter], parts: int) -> list[dict[str, Parameter]]:
    """Cut parameters, in order, into parts of nearly equal bytes; each is in exactly one, and no part is empty.

    A parameter goes to the part in which its middle lies, moved where a part would stay empty.

    Raises:
        ValueError: if there are fewer parameters than parts.
    """
    if len(params) < parts:
        raise ValueError(
            f"`fragments` must be at most the number of parameters that an optimizer steps: got {parts} fragments for "
            f"{len(params)}. Use `fragments={max(1, len(params))}`."
        )
    owner = _owners([param.nbytes for param in params.values()], parts)
    found: list[dict[str, Parameter]] = [{} for _ in range(parts)]
    for part, (name, param) in zip(owner, params.items(), strict=True):
        found[part][name] = param
    assert [name for part in found for name in part] == list(params), "every parameter exactly once"
    return found


def _owners(sizes: Sequence[int], parts: int) -> list[int]:
    total = max(1, sum(sizes))
    owners = [
        min(parts - 1, parts * (2 * end - size) // (2 * total))
        for size, end in zip(sizes, accumulate(sizes), strict=True)
    ]
    for i in range(len(owners)):  # ascending by at most one, and far enough to fill what follows
        least = 0 if i == 0 else owners[i - 1]
        owners[i] = max(min(owners[i], least + (i > 0)), parts - (len(owners) - i), least)
    return owners
