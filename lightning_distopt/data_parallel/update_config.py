"""What tells one method of the update engine from another, as numbers."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_distopt.compressors import Compressor
from lightning_distopt.data_parallel.exchanges import ExchangeName

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
