"""How full the queues between stages are, and how much goes through them, seen from the sending ends of one process."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_distopt.model_parallel.transport import Sender
from lightning_distopt.model_parallel.worker import Hop

__all__ = ["Queues"]


class Queues:
    """Looked at once a tick.

    Args:
        hops: of this process, by the stage before them.
    """

    def __init__(self, hops: Mapping[int, Hop]) -> None:
        self._ends: dict[tuple[int, str], Sender] = {}
        for index, hop in hops.items():
            for way, channel in (("forward", hop.activations_out), ("back", hop.gradients_out)):
                if isinstance(channel, Sender):
                    self._ends[index, way] = channel
        self._begun = {key: (end.count, end.nbytes) for key, end in self._ends.items()}
        self._depths = dict.fromkeys(self._ends, 0)
        self._looks = 0

    def look(self) -> None:
        """Take the depths of now into the means."""
        self._looks += 1
        for key, end in self._ends.items():
            self._depths[key] += end.depth()

    def deepest(self) -> int:
        """Return the depth of the fullest queue now."""
        return max((end.depth() for end in self._ends.values()), default=0)

    def means(self) -> dict[str, float]:
        """Return bytes a message and mean depth of each queue, by ``pipeline/hop_<stage before it>/...``."""
        found: dict[str, float] = {}
        for (index, way), end in self._ends.items():
            count, nbytes = self._begun[index, way]
            found[f"pipeline/hop_{index}/bytes_{way}"] = (end.nbytes - nbytes) / max(1, end.count - count)
            found[f"pipeline/hop_{index}/queue_{way}"] = self._depths[index, way] / max(1, self._looks)
        return found
