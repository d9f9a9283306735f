"""The residual of a sharded server, by parameter, so that it survives a resume and other buckets, ranks or exchanges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch.distributed as dist

from lightning_distopt.data_parallel.buckets import Bucket
from lightning_distopt.error_feedback import FlatViews
from lightning_distopt.exchange import Exchange, ServerResidual, ShardedServerExchange

__all__ = ["ServerMemory"]


class ServerMemory:
    """The pieces of ``s`` on one rank: live ones in the exchange, and waiting ones that nobody serves yet.

    Pieces wait when they come from a checkpoint, or when their bucket was cut anew; whoever serves them then may be
    another rank. Every coordinate has at most one owner over all ranks.

    Args:
        exchange: keeps the live pieces if it is a sharded server; else there are none.
        whole: whether the compressor is handed whole buckets.
    """

    def __init__(self, exchange: Exchange, whole: bool) -> None:
        self.exchange = exchange
        self.whole = whole
        self.waiting: dict[str, list[ServerResidual]] = {}

    @property
    def serves(self) -> bool:
        """Whether the exchange keeps a residual of its answers."""
        return isinstance(self.exchange, ShardedServerExchange) and self.exchange.keep_residual

    def pieces(self, buckets: Sequence[Bucket]) -> dict[str, list[ServerResidual]]:
        """Return all pieces by parameter, references."""
        found = {name: list(pieces) for name, pieces in self.waiting.items()}
        if isinstance(self.exchange, ShardedServerExchange):
            for bucket in buckets:
                for name, piece in _by_parameter(bucket, self.whole, self.exchange.residuals):
                    found.setdefault(name, []).append(piece)
        return found

    def replace(self, pieces: Mapping[str, Sequence[ServerResidual]]) -> None:
        """Forget the live pieces, and let these wait."""
        self.waiting = {name: list(those) for name, those in pieces.items()}
        if isinstance(self.exchange, ShardedServerExchange):
            self.exchange.restore_residuals({})

    def waits_for(self, buckets: Sequence[Bucket]) -> bool:
        """Whether pieces of these buckets wait on this rank."""
        return any(name in self.waiting for bucket in buckets for name in bucket.names)

    def hand_over(self, buckets: Sequence[Bucket]) -> None:
        """Give waiting pieces to whoever serves them now: a collective, one dense all-reduce of these buckets.

        Without a server residual they join the displacements of all ranks alike, by way of the parameters, so that
        ``mean(e) + s`` stays where it was. Call it between the optimizer's step and the exchange.
        """
        exchange = self.exchange
        sharded: dict[str, list[ServerResidual]] = {}
        for bucket in buckets:
            memory = FlatViews(bucket.params)
            for name, flat in zip(bucket.names, memory.flats, strict=True):
                for start, values in self.waiting.pop(name, []):
                    flat[start : start + values.numel()] = values
            if exchange.world > 1:
                exchange.meter.all_reduce("averaging", memory.flat.nbytes, exchange.world)
                with exchange.meter.timed("exchange"):
                    dist.all_reduce(memory.flat, group=exchange.group)
            if self.serves:
                names, tensors = bucket.parts(memory, self.whole)
                sharded |= {name: [ServerResidual(0, t)] for name, t in zip(names, tensors, strict=True)}
            elif bucket.server is not None:
                bucket.server.flat.add_(memory.flat)
            else:
                for param, s in zip(bucket.data, memory.views, strict=True):
                    param.sub_(s)
        if isinstance(exchange, ShardedServerExchange) and sharded:
            live = exchange.residuals
            exchange.restore_residuals(sharded)  # cut to this rank's part in the exchange that follows
            exchange.residuals.update(live)


def _by_parameter(
    bucket: Bucket, whole: bool, residuals: Mapping[str, ServerResidual]
) -> Iterator[tuple[str, ServerResidual]]:
    """Cut the residuals of what the exchange was handed into pieces of parameters."""
    (first, *_), _ = bucket.parts(bucket.residual, whole)
    offset = 0
    for name, flat in zip(bucket.names, bucket.residual.flats, strict=True):
        begin = offset if whole else 0
        offset += flat.numel()
        kept = residuals.get(first if whole else name)
        if kept is None:
            continue
        start = max(kept.start, begin)
        stop = min(kept.start + kept.values.numel(), begin + flat.numel())
        if start < stop:
            yield name, ServerResidual(start - begin, kept.values[start - kept.start : stop - kept.start])
