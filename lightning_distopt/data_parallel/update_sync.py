"""Replicas step locally, then exchange compressed displacements: one engine for EF, SAEF, DEF, SA-PEF and local SGD.

One round of one rank (H = ``sync_every`` optimizer steps; numbers as in the code):

    parameters   x ──[1]──▶ y ──local steps──▶ z ──[3]──▶ x'
    residual     e ──[0: mean over ranks, every p rounds]──▶ e ──[2: D = x - z + (1-a) e;  c = C(D);  e = D - c]──▶ e'
    network           dense, rarely                               [3: u = mean c;  (s += u; u = C(s); s -= u)]

Between rounds with H = 1 the parameters hold the common model ``x``, the same bits on every rank; so validation,
checkpoints and callbacks need nothing. With H > 1 they hold ``z`` inside a round, and :meth:`UpdateSync.show_common`
swaps ``x`` in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from lightning_distopt.compressors import Compressor, Dense
from lightning_distopt.compressors.randomness import derive_key
from lightning_distopt.data_parallel.buckets import Bucket, make_buckets
from lightning_distopt.data_parallel.exchanges import ExchangeName, make_exchange
from lightning_distopt.data_parallel.replicas import check_alike
from lightning_distopt.error_feedback import FlatViews, average_, compensate_, compress_, step_ahead_
from lightning_distopt.errors import NonFiniteError
from lightning_distopt.exchange import Exchange, Meter, ServerResidual, ShardedServerExchange, Steps, overlap
from lightning_distopt.exchange.meter import ring_all_reduce_bytes

__all__ = ["UpdateSync", "UpdateSyncConfig"]


@dataclass(frozen=True)
class UpdateSyncConfig:
    """The point in the engine's parameter space; a method of a paper is a row of such numbers.

    Args:
        compressor: of the displacements, contractive.
        exchange: how payloads are averaged.
        coefficient: share of the residual that is stepped ahead, in [0, 1]: 0 is EF, 1 is SAEF.
        averaging_period: residuals are averaged over ranks every this many rounds, before the step ahead; 0: never.
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


@dataclass
class _Group:
    """The parameters that the same optimizers step: they are exchanged together."""

    owners: tuple[int, ...]
    buckets: list[Bucket]
    rounds: int = 0
    local_steps: int = 0
    begun: bool = False  # a micro-batch of this round has been seen, and its averaging is done
    away: bool = False  # the parameters hold y or z, and the anchor holds x
    stash: list[Tensor] = field(default_factory=list)  # z, while x is shown in the middle of a round


class UpdateSync:
    """The engine of one rank; see the module's drawing.

    Args:
        config: the method.
        meter: counts what travels.
        group: process group; the default one if ``None``.

    The call order of a training step is :meth:`enter`, forward and backward, the optimizer's step, :meth:`exchange`;
    a micro-batch after which nothing steps ends with :meth:`leave`. :meth:`track` comes before them and says which
    parameters take part.
    """

    def __init__(self, config: UpdateSyncConfig, meter: Meter, group: dist.ProcessGroup | None = None) -> None:
        self.config = config
        self.meter = meter
        self.group = group
        self._exchange = make_exchange(
            config.exchange,
            config.compressor,
            meter,
            group,
            compress_answer=config.server_compression,
            seed=config.seed,
        )
        self._dense: Exchange = make_exchange("all_reduce", Dense("float32"), meter, group)
        self._groups: list[_Group] = []
        self._tracked: dict[str, tuple[int, ...]] = {}
        self._restored: dict[str, Any] = {}

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self._exchange.world

    @property
    def rank(self) -> int:
        """Number of the own process among them."""
        return self._exchange.rank

    @property
    def away(self) -> bool:
        """Whether some parameters hold something else than the common model."""
        return any(group.away for group in self._groups)

    @property
    def buckets(self) -> list[Bucket]:
        """All buckets, in the order of their collectives."""
        return [bucket for group in self._groups for bucket in group.buckets]

    @property
    def _shards(self) -> Mapping[str, ServerResidual]:
        return self._exchange.residuals if isinstance(self._exchange, ShardedServerExchange) else {}

    def _numbered(self) -> Iterator[tuple[_Group, int, Bucket]]:
        return ((group, index, bucket) for group in self._groups for index, bucket in enumerate(group.buckets))

    # ---- what takes part ------------------------------------------------------------------------------------------

    def track(self, params: Mapping[str, Parameter], owners: Mapping[str, tuple[int, ...]]) -> None:
        """Take part with these parameters; cheap where nothing has changed, residuals are kept where something has.

        Args:
            params: by full name, in an order that is the same on all ranks.
            owners: for each name, the numbers of the optimizers that step it.

        Raises:
            RankMismatchError: if the ranks disagree on names, shapes, dtypes or owners.
        """
        if self._tracked == owners and all(
            p is params[n] for bucket in self.buckets for n, p in zip(bucket.names, bucket.params, strict=True)
        ):
            return
        if self.world > 1:
            lines = [
                f"{name} {owner} {tuple(params[name].shape)} {params[name].dtype}" for name, owner in owners.items()
            ]
            device = next(iter(params.values())).device if params else torch.device("cpu")
            check_alike(lines, self.meter, device, self.group)
        self.flush()
        kept = self.state_dict()
        by_owners: dict[tuple[int, ...], dict[str, Parameter]] = {}
        for name, owner in owners.items():
            if params[name].numel():
                by_owners.setdefault(owner, {})[name] = params[name]
        limit = float("inf") if self.config.scope == "model" else self.config.bucket_bytes
        self._groups = [_Group(owner, make_buckets(named, limit)) for owner, named in by_owners.items()]
        if self.config.server_compression and self.config.exchange != "sharded_server":
            for bucket in self.buckets:
                bucket.server = FlatViews(bucket.params)
        self._tracked = dict(owners)
        restored = self._restored or kept
        self._restored = {}
        self._load(restored)

    # ---- one step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def enter(self) -> bool:
        """Move the parameters to where this rank takes its gradient; do nothing inside a round.

        Returns:
            Whether a round begins with this call (the moment to broadcast buffers).
        """
        begins = False
        for group in self._groups:
            if group.stash:
                self._hide_common(group)
            if group.away:
                continue
            begins = begins or not group.begun
            period = self.config.averaging_period
            if period and not group.begun and (group.rounds + 1) % period == 0:
                average_([bucket.residual for bucket in group.buckets], self.meter, self.group, self.world)  # [0]
            group.begun = True
            ahead = 0.0 if self._is_dense(group) else self.config.coefficient
            for bucket in group.buckets:
                step_ahead_(bucket.data, bucket.anchor, bucket.residual, ahead)  # [1]
            group.away = True
        return begins

    @torch.no_grad()
    def leave(self) -> None:
        """Bring the common model back without an exchange, unless inside a round of several local steps."""
        for group in self._groups:
            if group.away and not group.local_steps:
                self._restore(group)

    @torch.no_grad()
    def exchange(self, owner: int | None = None) -> bool:
        """Count one local step of optimizer ``owner`` (``None``: of all) and end its round if it is the last.

        Returns:
            Whether something was exchanged.

        Raises:
            NonFiniteError: on all ranks, if a parameter of any rank is not finite after its step; the parameters hold the
                common model again, and no residual has changed.
        """
        due = []
        for group in self._groups:
            if group.away and (owner is None or owner in group.owners):
                group.local_steps += 1
                if group.local_steps >= self.config.sync_every:
                    due.append(group)
        self._end_rounds(due)
        return bool(due)

    @torch.no_grad()
    def flush(self) -> None:
        """End rounds that have begun early, so that all ranks hold the common model with every step in it."""
        self._end_rounds([group for group in self._groups if group.local_steps])
        self.leave()

    def _end_rounds(self, groups: Sequence[_Group]) -> None:
        if not groups:
            return
        for group in groups:
            if group.stash:
                self._hide_common(group)
        self._agree_on_finite([bucket for group in groups for bucket in group.buckets])
        overlap(self._end_round(group, bucket, i) for group in groups for i, bucket in enumerate(group.buckets))
        for group in groups:
            ring = ring_all_reduce_bytes(sum(p.nbytes for bucket in group.buckets for p in bucket.params), self.world)
            self.meter.step(ring * group.local_steps, group.local_steps)
            group.rounds += 1
            group.local_steps = 0
            group.begun = group.away = False

    def _end_round(self, group: _Group, bucket: Bucket, index: int) -> Steps:
        dense = self._is_dense(group)
        exchange = self._dense if dense else self._exchange
        names, tensors = self._handed(group, bucket, bucket.residual, index)
        with self.meter.timed("encode"):
            coefficient = 0.0 if dense else self.config.coefficient
            compensate_(bucket.data, bucket.anchor, bucket.residual, coefficient)  # [2]
            payloads = compress_(exchange.compressor, tensors, self._keys(names, group.rounds, ""))
        means = yield from exchange.mean(names, payloads, group.rounds)  # [3]
        with self.meter.timed("encode"):
            if bucket.server is not None and not dense:
                means = self._serve(names, means, self._handed(group, bucket, bucket.server, index)[1], group.rounds)
            _, anchors = self._handed(group, bucket, bucket.anchor, index)
            for x, update in zip(anchors, means, strict=True):
                x.sub_(update)
            bucket.restore()

    def _serve(self, names: Sequence[str], means: list[Tensor], server: Sequence[Tensor], step: int) -> list[Tensor]:
        """Compress the mean again on every rank alike: ``s += u;  v = C(s);  s -= v``."""
        keys = self._keys(names, step, "@server")
        for i, (s, key) in enumerate(zip(server, keys, strict=True)):
            s.add_(means[i])
            payload = self.config.compressor.compress_(s, key, assume_finite=True)
            means[i].zero_()
            self.config.compressor.decompress_add_(payload, means[i])
        return means

    def _handed(self, group: _Group, bucket: Bucket, memory: FlatViews, index: int) -> tuple[list[str], list[Tensor]]:
        """Return what the compressor sees of a bucket: its parameters one by one, or all of it as one tensor."""
        if self.config.scope == "model":
            return [f"model/{'+'.join(map(str, group.owners))}/{index}"], [memory.flat]
        return bucket.names, memory.flats

    def _keys(self, names: Sequence[str], step: int, suffix: str) -> list[int]:
        # The replicated server's draws must be the same on all ranks, like those of shared randomness.
        rank = 0 if suffix or self.config.compressor.shared_randomness else self.rank
        return [derive_key(self.config.seed, rank, step, name + suffix) for name in names]

    def _is_dense(self, group: _Group) -> bool:
        return group.rounds < self.config.dense_steps

    def _agree_on_finite(self, buckets: Sequence[Bucket]) -> None:
        """Let all ranks know of a non-finite parameter on any of them, by one all-reduce of 8 bytes."""
        params = [param for bucket in buckets for param in bucket.data]
        names = [name for bucket in buckets for name in bucket.names]
        bad = _first_non_finite(params, [p.grad for bucket in buckets for p in bucket.params])
        code = torch.tensor(0 if bad is None else 1 + self.rank * len(names) + bad, device=params[0].device)
        if self.world > 1:
            with self.meter.timed("exchange"):
                dist.all_reduce(code, op=dist.ReduceOp.MAX, group=self.group)
            self.meter.all_reduce("flag", code.nbytes, self.world)
        if not code:
            return
        rank, index = divmod(int(code) - 1, len(names))
        step = max(group.rounds for group in self._groups)
        for group in self._groups:
            self._restore(group)
        raise NonFiniteError(
            f"Parameter `{names[index]}` got a NaN or an infinity on rank {rank} in step {step}, and all {self.world} ranks "
            "stopped before it entered a residual; the parameters hold the common model of the step before. Look for the "
            "cause in that rank's batch or loss, lower the learning rate, or clip gradients (`gradient_clip_val`)."
        )

    # ---- the common model -------------------------------------------------------------------------------------------

    def _restore(self, group: _Group) -> None:
        if group.away:
            with torch.no_grad():
                for bucket in group.buckets:
                    bucket.restore()
        group.away = False
        group.local_steps = 0
        group.stash = []

    def restore(self) -> None:
        """Drop what happened since the last exchange: the parameters hold the common model."""
        for group in self._groups:
            self._restore(group)

    @torch.no_grad()
    def show_common(self) -> None:
        """Let the parameters hold the common model, to look at it in the middle of a round; :meth:`enter` swaps back."""
        for group in self._groups:
            if group.away and group.local_steps and not group.stash:
                group.stash = [param.clone() for bucket in group.buckets for param in bucket.data]
                for bucket in group.buckets:
                    bucket.restore()
        self.leave()

    def _hide_common(self, group: _Group) -> None:
        params = [param for bucket in group.buckets for param in bucket.data]
        for param, local in zip(params, group.stash, strict=True):
            param.copy_(local)
        group.stash = []

    def common_model(self) -> dict[Parameter, Tensor]:
        """Return copies of ``x`` for the parameters that hold something else now."""
        return {
            param: x.to(param.dtype, copy=True)
            for group in self._groups
            if group.away and not group.stash
            for bucket in group.buckets
            for param, x in zip(bucket.params, bucket.anchor.views, strict=True)
        }

    # ---- figures ----------------------------------------------------------------------------------------------------

    def residual_norm(self) -> float:
        """Return the 2-norm of this rank's residuals."""
        return math.sqrt(sum(float(bucket.residual.flat.square().sum()) for bucket in self.buckets))

    def mismatch(self) -> float:
        """Return ``mean_k |mean(e) + s - a e_k|²``, how far gradients are taken from the auxiliary point.

        A collective (a dense all-reduce of the residuals, counted as "diagnostics"): call it on all ranks, rarely.
        """
        total = torch.zeros(1, dtype=torch.float64)
        for group, index, bucket in self._numbered():
            memory = FlatViews(bucket.params)
            mean = memory.flat.copy_(bucket.residual.flat)
            names, tensors = self._handed(group, bucket, memory, index)
            for name, tensor in zip(names, tensors, strict=True):
                shard = self._shards.get(name)
                if shard is not None:  # every coordinate of s has one owner, so W of it in the sum is s in the mean
                    part = tensor[shard.start : shard.start + shard.values.numel()]
                    part.add_(shard.values, alpha=self.world)
            if self.world > 1:
                dist.all_reduce(mean, group=self.group)
                self.meter.all_reduce("diagnostics", mean.nbytes, self.world)
            mean.div_(self.world)
            if bucket.server is not None:
                mean.add_(bucket.server.flat)
            total += mean.sub_(bucket.residual.flat, alpha=self.config.coefficient).square().sum().double().cpu()
        if self.world > 1:
            total = total.to(self.buckets[0].residual.flat.device)
            dist.all_reduce(total, group=self.group)
        return float(total) / self.world

    # ---- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state: tensors, numbers and strings only. Tensors are references, except inside a round."""
        state: dict[str, Any] = {"residuals": {}, "server": {}, "shards": {}, "local": {}, "groups": {}}
        for group in self._groups:
            state["groups"]["+".join(map(str, group.owners))] = {
                "rounds": group.rounds,
                "local_steps": group.local_steps,
                "begun": group.begun,
            }
            for bucket in group.buckets:
                state["residuals"].update(zip(bucket.names, bucket.residual.views, strict=True))
                if bucket.server is not None:
                    state["server"].update(zip(bucket.names, bucket.server.views, strict=True))
            if group.local_steps:
                local = group.stash or [param for bucket in group.buckets for param in bucket.data]
                names = [name for bucket in group.buckets for name in bucket.names]
                state["local"].update({name: z.clone() for name, z in zip(names, local, strict=True)})
        state["shards"] = {n: [{"start": r.start, "values": r.values}] for n, r in self._shards.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; parameters that are not tracked yet receive theirs when they are."""
        if self._groups:
            self._load(state)
        else:
            self._restored = dict(state)

    @torch.no_grad()
    def _load(self, state: Mapping[str, Any]) -> None:
        residuals, server = state.get("residuals", {}), state.get("server", {})
        for group in self._groups:
            counters = state.get("groups", {}).get("+".join(map(str, group.owners)), {})
            group.rounds = int(counters.get("rounds", 0))
            group.begun = bool(counters.get("begun", False))
            for bucket in group.buckets:
                _fill(bucket.names, bucket.residual, residuals)
                if bucket.server is not None:
                    _fill(bucket.names, bucket.server, server)
            names = [name for bucket in group.buckets for name in bucket.names]
            local = state.get("local", {})
            if counters.get("local_steps") and all(name in local for name in names):
                for bucket in group.buckets:
                    step_ahead_(bucket.data, bucket.anchor, bucket.residual, 0.0)
                device = group.buckets[0].anchor.flat.device
                group.stash = [local[name].to(device) for name in names]
                group.local_steps, group.away = int(counters["local_steps"]), True
        if isinstance(self._exchange, ShardedServerExchange) and self._groups:
            shards = state.get("shards", {})
            self._exchange.restore_residuals(
                {
                    name: [ServerResidual(int(p["start"]), p["values"]) for p in pieces]
                    for name, pieces in shards.items()
                }
            )


def _fill(names: Sequence[str], memory: FlatViews, values: Mapping[str, Tensor]) -> None:
    for name, view in zip(names, memory.views, strict=True):
        value = values.get(name)
        if value is not None and value.shape == view.shape:
            view.copy_(value)


def _first_non_finite(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> int | None:
    """Return the index of the parameter to blame, or None; one pass over the parameters in the usual case."""
    norms = torch._foreach_norm(list(params), float("inf"))
    if bool(torch.stack([norm.to(torch.float64) for norm in norms]).isfinite().all()):
        return None
    for tensors in (
        grads,
        params,
    ):  # a clipped NaN spreads over all parameters: the gradients know better where it began
        for index, tensor in enumerate(tensors):
            if tensor is not None and not bool(tensor.isfinite().all()):
                return index
    return None
