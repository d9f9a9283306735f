"""Replicas step locally, then exchange compressed displacements: one engine for EF, SAEF, DEF, SA-PEF and local SGD.

One round of one rank (H = ``sync_every`` optimizer steps; numbers as in the code):

    parameters   x ──[1]──▶ y ──local steps──▶ z ──[3]──▶ x'
    residual     e ──[0: mean over ranks, every p rounds]──▶ e ──[2: D = x - z + (1-a) e;  c = C(D);  e = D - c]──▶ e'
    network           dense, rarely                               [3: u = mean c;  (s += u; u = C(s); s -= u)]

[3] ends with the outer optimizer, ``x' = x - u`` without one; see :mod:`~lightning_distopt.data_parallel.round_end`.

Between rounds with H = 1 the parameters hold the common model ``x``, the same bits on every rank; so validation,
checkpoints and callbacks need nothing. With H > 1 they hold ``z`` inside a round, and :meth:`UpdateSync.show_common`
swaps ``x`` in. Fragments are groups whose rounds end in turn (:mod:`~lightning_distopt.data_parallel.fragments`).

Memory beyond parameters, gradients and optimizer, in copies of the parameters (of float32 for half-precision ones):
``x`` and ``e`` are one each; ``s`` is one if replicated, ``1 / W`` if sharded; an outer optimizer's is its own. An exchange
takes temporaries of less than a bucket (of a bucket with an outer optimizer) and the payloads of two buckets: a rank's own
and those that it receives; one that is delayed takes two fragments. A look at ``x`` in the middle of a round takes one more
copy; so does, once, handing a sharded ``s`` to new owners.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from lightning_distopt.data_parallel.agreement import agree, first_bad_parameter
from lightning_distopt.data_parallel.buckets import Bucket, Group, make_buckets
from lightning_distopt.data_parallel.common_buffers import CommonBuffers
from lightning_distopt.data_parallel.figures import mismatch
from lightning_distopt.data_parallel.fragments import cut
from lightning_distopt.data_parallel.replicas import check_alike
from lightning_distopt.data_parallel.round_end import RoundEnd
from lightning_distopt.data_parallel.server_memory import ServerMemory
from lightning_distopt.data_parallel.state import collect_state, no_state, place_state, rescue_lost
from lightning_distopt.data_parallel.update_config import UpdateSyncConfig
from lightning_distopt.error_feedback import FlatViews, average_, step_ahead_
from lightning_distopt.errors import NonFiniteError
from lightning_distopt.exchange import Meter, network_failures, overlap
from lightning_distopt.exchange.meter import ring_all_reduce_bytes

__all__ = ["UpdateSync", "UpdateSyncConfig"]


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
        self._ends = RoundEnd(config, meter, group)
        self._server = ServerMemory(self._ends.exchange, self._ends.whole(config.compressor))
        self._buffers: CommonBuffers | None = None
        self._groups: list[Group] = []
        self._tracked: dict[str, tuple[int, ...]] | None = None
        self._lines: list[str] = []  # what all ranks must track alike
        self._checksum = 0  # of these lines
        self._asleep = no_state()  # of parameters that do not take part now

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self._ends.exchange.world

    @property
    def rank(self) -> int:
        """Number of the own process among them."""
        return self._ends.exchange.rank

    @property
    def away(self) -> bool:
        """Whether some parameters, or averaged buffers, hold something else than the common model."""
        changed = self._buffers is not None and self._buffers.changed
        return changed or any(group.away for group in self._groups)

    @property
    def buckets(self) -> list[Bucket]:
        """All buckets, in the order of their collectives."""
        return [bucket for group in self._groups for bucket in group.buckets]

    @property
    def rounds(self) -> int:
        """Exchanges so far, of the group that had the most."""
        return max((group.rounds for group in self._groups), default=0)

    @property
    def warm(self) -> bool:
        """Whether the next round is one of the synchronous ones at the start."""
        return any(self._ends.is_warm(group) for group in self._groups)

    @property
    def resting(self) -> list[Parameter]:
        """The parameters whose local steps count for nothing, because this rank sits their round out."""
        out = [group for group in self._groups if self._ends.sits_out(group)]
        return [param for group in out for bucket in group.buckets for param in bucket.params]

    def count_samples(self, samples: Sequence[int]) -> None:
        """Let ranks count by these numbers, one a rank, the same on all ranks."""
        self._ends.samples = list(samples)

    def average_buffers(self, named: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        """Average buffers, too, whenever a round ends; ``named`` returns them by name."""
        self._buffers = CommonBuffers(named, self.meter, self.group)

    # ---- what takes part ------------------------------------------------------------------------------------------

    def track(self, params: Mapping[str, Parameter], owners: Mapping[str, tuple[int, ...]]) -> None:
        """Take part with these parameters; cheap where nothing has changed.

        Residuals are kept by name, those of parameters that no longer take part too, until they do again.

        Args:
            params: by full name, in an order that is the same on all ranks.
            owners: for each name, the numbers of the optimizers that step it.

        Raises:
            RankMismatchError: on all ranks, if they disagree on names, shapes, dtypes or owners. The first call finds
                out by itself; after later ones the next exchange does, because a rank where nothing changed sends nothing.
        """
        if self._tracked == owners and all(
            p is params[n] for bucket in self.buckets for n, p in zip(bucket.names, bucket.params, strict=True)
        ):
            return
        self.flush()
        self._lines = [
            f"{name} {owner} {tuple(params[name].shape)} {params[name].dtype}" for name, owner in owners.items()
        ]
        self._checksum = zlib.crc32("\n".join(self._lines).encode())
        first = self._tracked is None
        device = next(iter(params.values())).device if params else torch.device("cpu")
        if first and self.world > 1:
            check_alike(self._lines, self.meter, device, self.group)
        kept = self.state_dict()
        by_owners: dict[tuple[int, ...], dict[str, Parameter]] = {}
        for name, owner in owners.items():
            if params[name].numel():
                by_owners.setdefault(owner, {})[name] = params[name]
        limit = float("inf") if self.config.scope == "model" else self.config.bucket_bytes
        parts = self.config.fragments
        self._groups = [
            Group(owner, make_buckets(part, limit), fragment, fragment == parts - 1)
            for owner, named in by_owners.items()
            for fragment, part in enumerate(cut(named, parts))
        ]
        if self.config.server_compression and self.config.exchange != "sharded_server":
            for bucket in self.buckets:
                bucket.server = FlatViews(bucket.params)
        self._tracked = dict(owners)
        self.load_state_dict(kept)
        if first and self.world > 1 and self._groups:
            rescue_lost(self._groups, self.meter, self.group)

    # ---- one step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def enter(self) -> bool:
        """Move the parameters to where this rank takes its gradient; do nothing inside a round.

        Returns:
            Whether a round begins with this call (the moment to broadcast buffers).
        """
        for group in self._groups:
            group.hide_common()
        if self._buffers is not None:
            self._buffers.enter()
        entering = [group for group in self._groups if not group.away]
        beginning = [group for group in entering if not group.begun]
        self._average([group for group in beginning if self._averages(group)])  # [0]
        for group in entering:
            ahead = 0.0 if self._ends.is_dense(group) else self.config.coefficient
            for bucket in group.buckets:
                step_ahead_(bucket.data, bucket.anchor, bucket.residual, ahead)  # [1]
            group.begun = group.away = True
        return bool(beginning)

    def look(self) -> None:
        """Be about to run forwards that no step follows, which may change buffers all the same."""
        self.leave()
        if self._buffers is not None:
            self._buffers.enter()

    @torch.no_grad()
    def leave(self) -> None:
        """Bring the common model back without an exchange, unless inside a round of several local steps."""
        for group in self._groups:
            if not group.inside:
                group.restore()

    @torch.no_grad()
    def exchange(self, owner: int | None = None) -> bool:
        """Count one local step of optimizer ``owner`` (``None``: of all) and end its round if it is the last.

        With fragments the rounds of those whose turn it is end or begin to end, and those on their way may arrive.

        Returns:
            Whether a round has ended, of the last fragment if there are several.

        Raises:
            NonFiniteError: on all ranks, if a parameter of any rank is not finite after its step; the parameters hold the
                common model again, and no residual has changed.
            RankMismatchError: on all ranks, if they do not exchange the same parameters; the same holds.
            ExchangeError: if a collective failed or timed out; :meth:`restore` brings the common model back.
        """
        due, landed = [], False
        for group in self._groups:
            if group.away and (owner is None or owner in group.owners):
                group.local_steps += 1
                if group.local_steps >= self._ends.length(group) and group.flight is None:
                    due.append(group)
                    continue
                if group.bad is None:  # the end of the round would find it everywhere
                    found = first_bad_parameter([group])
                    group.bad = None if found is None else (group.local_steps, found)
                if group.flight is not None and group.local_steps >= self.config.delay:
                    self._ends.land(group)
                    landed = landed or group.last
        self._end_rounds(due)
        landed = landed or any(group.last and group.flight is None for group in due)
        if landed:
            self._average_buffers()
        return landed

    @torch.no_grad()
    def flush(self) -> None:
        """End rounds that have begun early, so that all ranks hold the common model with every step in it."""
        for group in self._groups:
            group.hide_common()
            if group.flight is not None:
                self._ends.land(group)
        self._end_rounds([group for group in self._groups if group.inside], at_once=True)
        self.leave()
        if self._groups and self._buffers is not None and self._buffers.changed:
            self._average_buffers()

    def _end_rounds(self, groups: Sequence[Group], at_once: bool = False) -> None:
        """End rounds together; ``at_once``: nothing stays on its way, and nothing of the local parameters."""
        if not groups:
            return
        for group in groups:
            group.hide_common()
        compressed = [bucket for group in groups if not self._ends.is_dense(group) for bucket in group.buckets]
        if self._agree("exchange", groups, self._first_bad(groups), self._server.waits_for(compressed)):
            with network_failures(self.rank, groups[0].rounds, doing="hand over a server's residual", only=False):
                self._server.hand_over(compressed)
        streams = self.config.streams and not at_once
        later = [group for group in groups if streams and not self._ends.is_warm(group)]
        now = [group for group in groups if not streams or self._ends.is_warm(group)]
        overlap(self._ends.end(group, bucket) for group in now for bucket in group.buckets)
        for group in later:
            self._ends.take_off(group)
        ring = sum(ring_all_reduce_bytes(sum(p.nbytes for p in g.data), self.world) * g.local_steps for g in groups)
        self.meter.step(ring, max((group.local_steps for group in groups if group.last), default=0))
        for group in groups:
            group.local_steps = 0
        for group in now:
            group.rounds += 1
            group.begun = group.away = group.mixed = False
        if not self.config.delay:
            for group in later:
                self._ends.land(group)

    def _average_buffers(self) -> None:
        if self._buffers is not None:
            with network_failures(self.rank, self.rounds, doing="average buffers"):
                self._buffers.average(self._ends.last_share)

    def _first_bad(self, groups: Sequence[Group]) -> int | None:
        """Return the local step and the parameter, as one number, in which a NaN or an infinity was first seen."""
        names = sum(len(group.names) for group in groups)
        before, found = 0, []
        for group in groups:
            if group.bad is not None:
                found.append((group.bad[0] - 1) * names + before + group.bad[1])
            before += len(group.names)
        if found:
            return min(found)
        last = first_bad_parameter(groups)
        return None if last is None else max(0, groups[0].local_steps - 1) * names + last

    def _averages(self, group: Group) -> bool:
        period = self.config.averaging_period
        return period > 0 and (group.rounds + 1) % period == 0 and not self._ends.is_dense(group)

    def _average(self, groups: Sequence[Group]) -> None:
        if groups and self.world > 1:
            self._agree("average", groups)
            residuals = [bucket.residual for group in groups for bucket in group.buckets]
            with network_failures(self.rank, groups[0].rounds, doing="average residuals"):
                average_(residuals, self.meter, self.group, self.world)

    def _agree(
        self,
        doing: Literal["average", "exchange"],
        groups: Sequence[Group],
        bad: int | None = None,
        wants: bool = False,
    ) -> bool:
        """Go on together with ``groups`` or raise on all ranks; return whether any rank ``wants``."""
        doing_what = f"{doing} {[(group.key, group.rounds, group.local_steps) for group in groups]}"
        device = groups[0].buckets[0].anchor.flat.device
        checksum = zlib.crc32(doing_what.encode(), self._checksum)
        with network_failures(self.rank, groups[0].rounds, groups[0].buckets[0].names, f"agree to {doing}"):
            agreement = agree(checksum, bad, wants, self.meter, device, self.group)
        if not agreement.alike:
            self.restore()
            check_alike(self._lines, self.meter, device, self.group, doing_what)
        if agreement.culprit is not None:
            rank, index = agreement.culprit
            names = [name for group in groups for name in group.names]
            name = names[index % len(names)]
            step = self.config.steps_before(groups[0].rounds) + index // len(names)
            self.restore()
            raise NonFiniteError(
                f"Parameter `{name}` got a NaN or an infinity on rank {rank} in step {step}, and all "
                f"{self.world} ranks stopped before it entered a residual; the parameters hold the common model of the step "
                "before. Look for the cause in that rank's batch or loss, lower the learning rate, or clip gradients "
                "(`gradient_clip_val`)."
            )
        return agreement.wanted

    # ---- the common model -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def restore(self) -> None:
        """Drop what happened since the last exchange: the parameters hold the common model."""
        for group in self._groups:
            group.restore()
        if self._buffers is not None:
            self._buffers.drop()

    @torch.no_grad()
    def show_common(self) -> None:
        """Let the parameters hold the common model, to look at it in the middle of a round; :meth:`enter` swaps back."""
        for group in self._groups:
            if group.inside and group.away and not group.stash:
                group.show_common()
        self.leave()
        if self._buffers is not None:
            self._buffers.show()

    @contextmanager
    def common_model(self) -> Iterator[None]:
        """Let the parameters hold ``x`` inside, even in the middle of a step."""
        shown = [group for group in self._groups if group.away and not group.stash]
        with torch.no_grad():
            for group in shown:
                group.show_common()
            buffers_shown = self._buffers is not None and self._buffers.show()
            try:
                yield
            finally:
                for group in shown:
                    group.hide_common()
                if self._buffers is not None and buffers_shown:
                    self._buffers.hide()

    # ---- figures ----------------------------------------------------------------------------------------------------

    def residual_norm(self) -> float:
        """Return the 2-norm of this rank's residuals."""
        return math.sqrt(sum(float(bucket.residual.flat.square().sum()) for bucket in self.buckets))

    def mismatch(self) -> float:
        """Return ``mean_k |mean(e) + s - a e_k|²``, how far gradients are taken from the auxiliary point.

        A collective (a dense all-reduce of the residuals, counted as "diagnostics"): call it on all ranks, rarely.
        """
        return mismatch(self.buckets, self._server, self.config.coefficient, self.meter, self.group)

    # ---- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state: tensors, numbers and strings only. Tensors are references, except inside a round."""
        state = collect_state(self._groups, self._server, self._asleep)
        if not self.config.residuals and not self.config.server_compression:
            state["residuals"] = dict(self._asleep["residuals"])  # the others are zeros
        buffers = {} if self._buffers is None else self._buffers.state_dict()
        more = {"outer": self._ends.outer.state_dict(), "buffers": buffers, "flight": state.pop("flight")}
        return {**state, **{key: values for key, values in more.items() if values}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; parameters that are not tracked yet receive theirs when they are.

        The parameters must hold the common model. Ranks may have lost their states: if nothing was tracked before, the
        first :meth:`track` gives them the others' counters.
        """
        self._ends.outer.load_state_dict(state.get("outer", {}))
        if self._buffers is not None and not self._buffers.changed:
            self._buffers.load_state_dict(state.get("buffers", {}))
        self._asleep = place_state(state, self._groups, self._server)
