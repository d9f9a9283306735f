"""How one rank ends a round: the displacement is weighed, compressed, averaged and given to the outer optimizer.

D = w (x - z) + (1 - w a) e        w = p_k W, so that the mean over the W ranks is Σ p_k; w = 1 where all count alike
c = C(D);  e = D - c               a rank that sits out sends zeros, and keeps its e
g = mean c;  (s += g; g = C(s); s -= g)
x = outer step of x and g          x - g without an outer optimizer, straight into the parameters
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_distopt.compressors import Compressor, Dense, Payload
from lightning_distopt.compressors.exact import Exact
from lightning_distopt.compressors.randomness import derive_key
from lightning_distopt.data_parallel.buckets import Bucket, Group
from lightning_distopt.data_parallel.cohort import cohort, shares
from lightning_distopt.data_parallel.exchanges import make_exchange
from lightning_distopt.data_parallel.fragments import Flight
from lightning_distopt.data_parallel.outer_memory import OuterMemory
from lightning_distopt.data_parallel.outer_optimizer import OuterOptimizer, Plain, rate_at
from lightning_distopt.data_parallel.update_config import UpdateSyncConfig
from lightning_distopt.error_feedback import FlatViews, compress_, displacements
from lightning_distopt.exchange import Exchange, Meter, Steps

__all__ = ["RoundEnd"]

_AVERAGE = Plain(1.0)


class RoundEnd:
    """Ends rounds of one rank, a bucket at a time; the exchanges and the outer memory are its own.

    Args:
        config: the method.
        meter: counts what travels.
        group: process group; the default one if ``None``.

    Attributes:
        samples: ``n_k`` of every rank; alike as long as nobody says otherwise.
        last_share: what this rank counted in the round that ended last, with shares that add up to 1; 0 if it sat out.
    """

    def __init__(self, config: UpdateSyncConfig, meter: Meter, group: dist.ProcessGroup | None = None) -> None:
        self.config = config
        self.meter = meter
        self.exchange = make_exchange(
            config.exchange,
            config.compressor,
            meter,
            group,
            compress_answer=config.server_compression,
            seed=config.seed,
        )
        exact = isinstance(config.compressor, Exact)
        self._dense: Exchange = self.exchange if exact else make_exchange("all_reduce", Dense("float32"), meter, group)
        self.outer = OuterMemory()
        self.samples = [1] * self.exchange.world
        self.last_share = 1.0 / self.exchange.world

    # ---- what kind of round it is -----------------------------------------------------------------------------------

    def is_warm(self, group: Group) -> bool:
        """Whether the group's round is one of the synchronous ones at the start."""
        return group.rounds < self.config.warm_steps

    def is_dense(self, group: Group) -> bool:
        """Whether everything is sent in the group's round."""
        return group.rounds < max(self.config.dense_steps, self.config.warm_steps)

    def _exchange(self, group: Group) -> Exchange:
        return self._dense if self.is_dense(group) else self.exchange

    def length(self, group: Group) -> int:
        """Return the local steps before the exchange that ends the group's round begins."""
        return self.config.length(group.rounds, group.fragment)

    def shares(self, group: Group) -> list[float]:
        """Return what each rank counts in the group's round, 0 for those that sit it out."""
        world = self.exchange.world
        if self.is_warm(group):
            return [1.0 / world] * world
        chosen = cohort(world, self.config.participation, self.config.seed, group.rounds)
        return shares(self.config.weighting, self.samples, chosen)

    def _weight(self, group: Group) -> tuple[float, bool]:
        """Return ``w`` of this rank in the group's round, and whether nobody has anything that counts."""
        by_rank = self.shares(group)
        mine = by_rank[self.exchange.rank]
        alike = mine > 0 and by_rank.count(mine) == len(by_rank)
        self.last_share = mine / sum(by_rank) if any(by_rank) else 1.0 / len(by_rank)
        return (1.0 if alike else mine * len(by_rank)), not any(by_rank)

    def sits_out(self, group: Group) -> bool:
        """Whether this rank's steps of the group's round count for nothing."""
        return self.config.participation < 1.0 and self.shares(group)[self.exchange.rank] == 0.0

    def whole(self, compressor: Compressor) -> bool:
        """Whether the compressor is handed a bucket as one tensor: to have one scale, or because it makes no difference."""
        return self.config.scope == "model" or not compressor.per_tensor

    def _outer(self, group: Group) -> tuple[OuterOptimizer, int]:
        """Return what moves the common model at the end of the group's round, and the number of that step."""
        warm = self.config.warm_steps
        return (_AVERAGE, group.rounds) if self.is_warm(group) else (self.config.outer, group.rounds - warm)

    # ---- at once ----------------------------------------------------------------------------------------------------

    def end(self, group: Group, bucket: Bucket) -> Steps:
        """End a bucket's round: its parameters hold the new common model afterwards."""
        weight, nobody = self._weight(group)
        outer, number = self._outer(group)
        if nobody:  # neither x nor the outer memory moves
            bucket.restore()
            return
        if type(outer) is Plain:  # straight into the parameters, or into x where those do not lie end to end
            whole = self.whole(self._exchange(group).compressor)
            direct = bucket.direct and not whole
            models = [param.view(-1) for param in bucket.data] if direct else bucket.parts(bucket.anchor, whole)[1]
            yield from self._mean(group, bucket, models, -rate_at(outer.lr, number), weight)
            if not direct:
                with self.meter.timed("encode"):
                    bucket.restore()
            return
        mean = FlatViews(bucket.params)
        yield from self._mean_onto(group, bucket, mean, weight)
        with self.meter.timed("encode"):
            self.outer.step_(outer, bucket, mean, number)
            bucket.restore()

    # ---- in two halves ----------------------------------------------------------------------------------------------

    def take_off(self, group: Group) -> None:
        """Begin the exchange of what the group's parameters hold, and let them keep it."""
        weight, _ = self._weight(group)
        flight = Flight([FlatViews(bucket.params) for bucket in group.buckets])
        for bucket, mean in zip(group.buckets, flight.means, strict=True):
            local = [param.clone() for param in bucket.data]
            work = self._mean_onto(group, bucket, mean, weight)
            next(work)  # up to where the network works
            flight.works.append(work)
            for param, z in zip(bucket.data, local, strict=True):
                param.copy_(z)
        group.flight = flight

    def land(self, group: Group) -> None:
        """Take in what the group's exchange brings: ``x' = outer step``, then ``z = mix z + (1 - mix) x'``."""
        assert group.flight is not None
        group.flight.arrive()
        outer, number = self._outer(group)
        with self.meter.timed("encode"):
            for bucket, mean in zip(group.buckets, group.flight.means, strict=True):
                if not self._weight(group)[1]:
                    self.outer.step_(outer, bucket, mean, number)
                for param, x in zip(bucket.data, bucket.anchor.views, strict=True):
                    param.copy_(torch.lerp(x, param.to(x.dtype), self.config.mix) if self.config.mix else x)
        group.flight = None
        group.rounds += 1
        group.begun = group.away = group.mixed = True

    # ---- the mean ---------------------------------------------------------------------------------------------------

    def _mean_onto(self, group: Group, bucket: Bucket, mean: FlatViews, weight: float) -> Steps:
        whole = self.whole(self._exchange(group).compressor)
        return self._mean(group, bucket, bucket.parts(mean, whole)[1], 1.0, weight)

    def _mean(self, group: Group, bucket: Bucket, onto: Sequence[Tensor], alpha: float, weight: float) -> Steps:
        """Add ``alpha`` times the averaged displacement to ``onto``; the parameters hold ``x`` as soon as it is compressed."""
        exchange = self._exchange(group)
        whole = self.whole(exchange.compressor)
        names, residuals = bucket.parts(bucket.residual, whole)
        with self.meter.timed("encode"):
            payloads = self._payloads(exchange.compressor, group, bucket, weight)
        served = None if bucket.server is None or self.is_dense(group) else bucket.parts(bucket.server, whole)[1]
        if served is None:
            mean = exchange.mean(names, payloads, group.rounds, onto=onto, alpha=alpha)
        else:
            mean = exchange.mean(names, payloads, group.rounds, onto=served)
        del payloads  # so that the exchange can free them
        yield from mean  # [3]
        with self.meter.timed("encode"):
            if served is not None:
                self._serve(names, served, onto, alpha, group.rounds)
            if not self.config.residuals:
                for residual in residuals:
                    residual.zero_()

    def _payloads(self, compressor: Compressor, group: Group, bucket: Bucket, weight: float) -> list[Payload]:
        whole = self.whole(compressor)
        names, residuals = bucket.parts(bucket.residual, whole)
        keys = self._keys(names, group.rounds)
        if weight == 0.0:
            bucket.restore()
            nothing = bucket.parts(FlatViews(bucket.params), whole)[1]
            return compress_(compressor, nothing, keys)
        coefficient = 0.0 if self.is_dense(group) else self.config.coefficient
        displaced: Iterable[Tensor] = displacements(
            bucket.data, bucket.anchor, bucket.residual, coefficient, weight
        )  # [2]
        if whole:
            _, displaced = list(displaced), residuals
        if self.config.residuals:
            return compress_(compressor, displaced, keys)
        return [compressor.compress(d, key, assume_finite=True) for d, key in zip(displaced, keys, strict=True)]

    def _serve(
        self, names: Sequence[str], servers: Sequence[Tensor], onto: Sequence[Tensor], alpha: float, step: int
    ) -> None:
        """Let the replicated server answer, the same on every rank: ``v = C(s);  s -= v;  onto += alpha v``."""
        compressor = self.config.compressor
        for s, x, key in zip(servers, onto, self._keys(names, step, "@server"), strict=True):
            compressor.decompress_add_(compressor.compress_(s, key, assume_finite=True), x, alpha=alpha)

    def _keys(self, names: Sequence[str], step: int, suffix: str = "") -> list[int]:
        # The replicated server's draws must be the same on all ranks, like those of shared randomness.
        rank = 0 if suffix or self.config.compressor.shared_randomness else self.exchange.rank
        return [derive_key(self.config.seed, rank, step, name + suffix) for name in names]
