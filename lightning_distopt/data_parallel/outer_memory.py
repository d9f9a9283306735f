"""What an outer optimizer remembers, by parameter name: the same on every rank, so a checkpoint holds it once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_distopt.data_parallel.buckets import Bucket
from lightning_distopt.data_parallel.outer_optimizer import Memory, OuterOptimizer
from lightning_distopt.error_feedback import FlatViews

__all__ = ["OuterMemory"]


class OuterMemory:
    """Memories by parameter name; parameters that do not take part now keep theirs."""

    def __init__(self) -> None:
        self._memories: dict[str, Memory] = {}

    def step_(self, outer: OuterOptimizer, bucket: Bucket, mean: FlatViews, round: int) -> None:
        """Move a bucket's ``x`` by the averaged displacement, which is scratch afterwards."""
        memories = [self._memory_like(name, x) for name, x in zip(bucket.names, bucket.anchor.views, strict=True)]
        outer.step_(bucket.anchor.views, mean.views, memories, round)

    def _memory_like(self, name: str, x: Tensor) -> Memory:
        memory = self._memories.setdefault(name, {})
        for key, value in memory.items():
            if isinstance(value, Tensor) and value.dim() and value.device != x.device:  # from a file; counters stay
                memory[key] = value.to(x.device)
        return memory

    def state_dict(self) -> dict[str, Memory]:
        """Return all of them: tensors and numbers, references."""
        return {name: dict(memory) for name, memory in self._memories.items() if memory}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take them over, by copies."""
        self._memories = {
            name: {key: value.clone() if isinstance(value, Tensor) else value for key, value in memory.items()}
            for name, memory in state.items()
        }
