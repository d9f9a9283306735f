"""What tells one method of the update engine from another, as numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_distopt.compressors import Compressor
from lightning_distopt.data_parallel.cohort import Weighting
from lightning_distopt.data_parallel.exchanges import ExchangeName
from lightning_distopt.data_parallel.outer_optimizer import OuterOptimizer, Plain

__all__ = ["UpdateSyncConfig"]


@dataclass(frozen=True)
class UpdateSyncConfig:
    """The point in the engine's parameter space; a method of a paper is a row of such numbers.

    Args:
        compressor: of the displacements, contractive.
        exchange: how payloads are averaged.
        coefficient: share of the residual that is stepped ahead, in [0, 1]: 0 is EF, 1 is SAEF.
        averaging_period: residuals are averaged over ranks every this many rounds, before the step ahead (not in dense
            rounds, which leave none); 0: never.
        server_compression: compress the average again, with the server's own residual.
        dense_steps: rounds at the start that send everything.
        sync_every: local optimizer steps a round.
        scope: what the compressor is handed: each parameter ("tensor") or all of them as one ("model").
        bucket_bytes: size of what is compressed while the bucket before it is on the network.
        seed: enters the keys of all randomness.
        residuals: remember what the compressor leaves out; else it is forgotten.
        outer: what moves the common model.
        weighting: how much each rank counts.
        participation: share of the ranks that take part in a round, in (0, 1].
        warm_steps: rounds at the start of one step each, in which all ranks take part alike and the model becomes their
            average.
        fragments: parts of the model that end their rounds in turn; divides ``sync_every``.
        delay: local steps between the start of a fragment's exchange and its arrival, below ``sync_every / fragments``.
        mix: what stays of the local parameters when the common ones arrive, in [0, 1].
    """

    compressor: Compressor
    exchange: ExchangeName
    coefficient: float = 1.0
    averaging_period: int = 0
    server_compression: bool = False
    dense_steps: int = 0
    sync_every: int = 1
    scope: str = "tensor"
    bucket_bytes: float = 25 * 2**20
    seed: int = 0
    residuals: bool = True
    outer: OuterOptimizer = field(default_factory=Plain)
    weighting: Weighting = "uniform"
    participation: float = 1.0
    warm_steps: int = 0
    fragments: int = 1
    delay: int = 0
    mix: float = 0.0

    def __post_init__(self) -> None:
        if self.sync_every % self.fragments:
            raise ValueError(
                f"`fragments` must divide `sync_every`, or rounds would be shorter than asked for: got {self.fragments} "
                f"fragments and `sync_every={self.sync_every}`. Use `sync_every={self._next_multiple()}`."
            )
        if not 0 <= self.delay < self.sync_every // self.fragments:
            raise ValueError(
                "`delay` must be below `sync_every / fragments`, so that one fragment is on its way at a time: got "
                f"{self.delay} with {self.sync_every} / {self.fragments}. Use `delay=1`, or fewer fragments."
            )

    def _next_multiple(self) -> int:
        return -(-self.sync_every // self.fragments) * self.fragments

    @property
    def streams(self) -> bool:
        """Whether replicas go on from their own parameters while, or after, the common ones arrive."""
        return self.delay > 0 or self.mix > 0

    def length(self, rounds: int, fragment: int) -> int:
        """Return the local steps before the exchange that ends a fragment's round number ``rounds`` begins."""
        if rounds < self.warm_steps:
            return 1
        if rounds == self.warm_steps:  # the first rounds are cut so that the fragments take turns from then on
            return (fragment + 1) * self.sync_every // self.fragments - self.delay
        return self.sync_every

    def steps_before(self, rounds: int) -> int:
        """Return the optimizer steps before round number ``rounds`` of the last fragment."""
        warm = min(rounds, self.warm_steps)
        return warm + (rounds - warm) * self.sync_every
