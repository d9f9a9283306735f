"""Exchanges by name, and which one suits a compressor on a number of ranks."""

from __future__ import annotations

from typing import Literal

import torch.distributed as dist

from lightning_distopt.compressors import Compressor, Dense, PowerSGD, SignSGD, Specification
from lightning_distopt.exchange import (
    AllGatherExchange,
    AllReduceExchange,
    CompressedMean,
    Exchange,
    MajorityVote,
    Meter,
    PowerSGDMean,
    ShardedServerExchange,
    TensorMean,
)

__all__ = ["ExchangeName", "choose_exchange", "make_exchange", "make_tensor_mean"]

ExchangeName = Literal["all_reduce", "all_gather", "sharded_server"]

# An all-gather receives W - 1 payloads and a sharded server about 2: from here on the second round trip is worth it.
ALL_GATHER_RANKS = 8


def choose_exchange(compressor: Compressor, world: int) -> ExchangeName:
    """Return the cheapest exchange: all-reduce for linear payloads, else by the number of ranks."""
    if compressor.linear:
        return "all_reduce"
    return "all_gather" if world <= ALL_GATHER_RANKS or not compressor.splittable else "sharded_server"


def make_exchange(
    name: ExchangeName,
    compressor: Compressor,
    meter: Meter,
    group: dist.ProcessGroup | None = None,
    *,
    compress_answer: bool = False,
    keep_residual: bool = True,
    seed: int = 0,
) -> Exchange:
    """Build an exchange; the options concern the sharded server's answers only.

    Raises:
        ValueError: if the compressor cannot travel that way.
    """
    if name == "sharded_server":
        return ShardedServerExchange(
            compressor, meter, group, compress_answer=compress_answer, keep_residual=keep_residual, seed=seed
        )
    exchanges = {"all_reduce": AllReduceExchange, "all_gather": AllGatherExchange}
    return exchanges[name](compressor, meter, group)


def make_tensor_mean(
    compressor: Compressor | Specification | None,
    exchange: ExchangeName,
    meter: Meter,
    group: dist.ProcessGroup | None = None,
    *,
    residual: bool = False,
    server_compression: bool = False,
    seed: int = 0,
) -> TensorMean:
    """Build what averages gradients: by payloads, or as a specification says; without a compressor, everything is sent.

    Raises:
        ValueError: if the compressor cannot travel that way, or there are too many ranks for it.
        TypeError: for a specification that is not known here.
    """
    if isinstance(compressor, PowerSGD):
        return PowerSGDMean(compressor.rank, meter, group, seed=seed)
    if isinstance(compressor, SignSGD):
        return MajorityVote(meter, group)
    if isinstance(compressor, Specification):
        raise TypeError(
            f"`compressor` must be `PowerSGD`, `SignSGD` or a `Compressor`: got {compressor}. Use one of these."
        )
    made = make_exchange(
        exchange,
        Dense("float32") if compressor is None else compressor,
        meter,
        group,
        compress_answer=server_compression,
        keep_residual=False,
        seed=seed,
    )
    answer = server_compression and exchange != "sharded_server"  # that server answers by itself
    return CompressedMean(made, residual=residual, answer=answer, seed=seed)
