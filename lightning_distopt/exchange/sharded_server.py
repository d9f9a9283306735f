"""A parameter server without a server process: each rank serves ``1 / W`` of the coordinates.

    tensors of a bucket   [■■■■■■|■■■][■■■|■■■■■■■■]        cut by coordinates, inner cuts at multiples of the granularity
                             owner 0  ↑   owner 1

    1. (sizes)    all-to-all   entries of each part, where they depend on the data (top-k)
    2. up         all-to-all   every rank's payload parts go to their owner
    3. serve                   owner: s += mean of the parts;  v = C(s);  s -= v
    4. down       all-gather   every owner's v

Bytes a rank: about ``2 * payload * (W - 1) / W``, whatever W. A compressor that works per tensor selects on the whole
tensor on the way up, and on each owner's part of it on the way down.

Source: the two-way compression of arXiv:2008.05823 with the sharding of 1-bit Adam (arXiv:2102.02888).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_distopt.compressors.base import Compressor, Payload
from lightning_distopt.compressors.exact import Exact
from lightning_distopt.compressors.randomness import derive_key
from lightning_distopt.exchange.base import Arrived, Arriving, Exchange, Piece, device_of
from lightning_distopt.exchange.meter import Meter
from lightning_distopt.exchange.wire import Wire

__all__ = ["ServerResidual", "ShardedServerExchange"]


class ServerResidual(NamedTuple):
    """What one owner has not yet sent of one tensor: ``values`` belong at ``start`` of the flat tensor."""

    start: int
    values: Tensor


class _Part(NamedTuple):
    """One owner's share of one tensor of the bucket."""

    tensor: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


class ShardedServerExchange(Exchange):
    """Averages at the coordinates' owners and gathers what they answer.

    Args:
        compressor: of the payloads, and of the answers if ``compress_answer``.
        meter: counts what travels.
        group: process group; the default one if ``None``.
        compress_answer: compress the average again before it is gathered; else it travels in full precision.
        keep_residual: add what the answer's compression left out to the next average (error feedback at the server).
        seed: enters the keys of the answers' randomness.

    Raises:
        ValueError: if the compressor's payloads cannot be split by coordinates.
    """

    def __init__(
        self,
        compressor: Compressor,
        meter: Meter,
        group: dist.ProcessGroup | None = None,
        *,
        compress_answer: bool = True,
        keep_residual: bool = True,
        seed: int = 0,
    ) -> None:
        if not compressor.splittable:
            raise ValueError(
                "`exchange='sharded_server'` needs a compressor whose payloads can be split by coordinates: those of "
                f"{compressor} cannot. Use `exchange='all_reduce'`, whose cost does not grow with the ranks either."
            )
        super().__init__(compressor, meter, group)
        self.answer: Compressor = compressor if compress_answer else Exact()
        self.keep_residual = keep_residual and compress_answer
        self.seed = seed
        self.residuals: dict[str, ServerResidual] = {}
        self._restored: dict[str, list[ServerResidual]] = {}

    def restore_residuals(self, pieces: Mapping[str, Sequence[ServerResidual]]) -> None:
        """Start from these residuals, by tensor name; pieces may be cut for another number of ranks."""
        self.residuals = {}
        self._restored = {name: list(those) for name, those in pieces.items()}

    def gather(self, names: Sequence[str], payloads: Sequence[Payload], step: int) -> Arriving:
        shares = _shares([payload.numel for payload in payloads], self.world, self.compressor.granularity)
        mine = shares[self.rank]
        device, dtype = device_of(payloads), payloads[0].dtype

        # 1, 2: payload parts to their owners
        with self.meter.timed("encode"):
            parts = self._split(payloads, shares)
        entries: list[list[int | None]]
        if any(self.compressor.entries(payload) is not None for payload in payloads):
            sizes = [[self.compressor.entries(part) or 0 for part in owner] for owner in parts]
            arriving, work = self._all_to_all_sizes(sizes, len(mine), device)
            yield
            self.wait(work, names, step)
            entries = [row.tolist() for row in arriving.view(self.world, len(mine))]
        else:
            entries = [[None] * len(mine)] * self.world
        wires = [
            Wire([self.compressor.layout(part.numel, dtype, n) for part, n in zip(mine, row, strict=True)])
            for row in entries
        ]
        received, work = self._all_to_all(parts, [wire.nbytes for wire in wires], device)
        yield
        self.wait(work, names, step)

        # 3: serve
        with self.meter.timed("encode"):
            sums = [self._sum_buffer(names[part.tensor], part, dtype, device) for part in mine]
            for wire, data in zip(wires, received, strict=True):  # in rank order
                for fields, part, total in zip(wire.unpack(data), mine, sums, strict=True):
                    payload = Payload(fields, torch.Size([part.numel]), dtype, payloads[part.tensor].key)
                    self.compressor.decompress_add_(payload, total, 1.0 / self.world)
            answers = [self._compress(names[part.tensor], total, step) for part, total in zip(mine, sums, strict=True)]

        # 4: answers to everyone; slices differ by a few elements, so pad to the longest
        answer_wires = [Wire([self.answer.layout(part.numel, dtype) for part in share]) for share in shares]
        longest = max(wire.nbytes for wire in answer_wires)
        sent = answer_wires[self.rank].pack(answers, device)
        everyones, work = self._all_gather(torch.nn.functional.pad(sent, (0, longest - sent.numel())))
        yield
        self.wait(work, names, step)
        return Arrived(
            [
                Piece(self.answer, Payload(fields, torch.Size([part.numel]), dtype), part.tensor, part.start, 1.0)
                for wire, data, share in zip(answer_wires, everyones.view(self.world, longest), shares, strict=True)
                for fields, part in zip(wire.unpack(data[: wire.nbytes]), share, strict=True)
            ]
        )

    def _split(self, payloads: Sequence[Payload], shares: list[list[_Part]]) -> list[list[Payload]]:
        by_tensor: list[dict[int, Payload]] = []
        for tensor, payload in enumerate(payloads):
            cuts = [(owner, part) for owner, share in enumerate(shares) for part in share if part.tensor == tensor]
            pieces = self.compressor.split(payload, [0, *(part.stop for _, part in cuts)])
            by_tensor.append({owner: piece for (owner, _), piece in zip(cuts, pieces, strict=True)})
        return [[by_tensor[part.tensor][owner] for part in share] for owner, share in enumerate(shares)]

    def _sum_buffer(self, name: str, part: _Part, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return where the mean of ``part`` is summed: onto the residual, so that ``s += mean`` costs nothing extra."""
        if not self.keep_residual:
            return torch.zeros(part.numel, dtype=dtype, device=device)
        kept = self.residuals.get(name)
        if kept is None or kept.start != part.start or kept.values.numel() != part.numel:
            kept = ServerResidual(part.start, torch.zeros(part.numel, dtype=dtype, device=device))
            for old in self._restored.pop(name, []):
                _copy_overlap(old, kept)
            self.residuals[name] = kept
        return kept.values

    def _compress(self, name: str, total: Tensor, step: int) -> Payload:
        key = derive_key(self.seed, self.rank, step, f"{name}@server")
        if self.keep_residual:
            return self.answer.compress_(total, key, assume_finite=True)  # leaves s - C(s) in the residual
        return self.answer.compress(total, key, assume_finite=True)

    def _all_to_all_sizes(
        self, sizes: list[list[int]], mine: int, device: torch.device
    ) -> tuple[Tensor, dist.Work | None]:
        sent = torch.tensor([n for owner in sizes for n in owner], dtype=torch.int32, device=device)
        if self.world == 1:
            return sent, None
        received = torch.empty(self.world * mine, dtype=torch.int32, device=device)
        lengths = [len(owner) for owner in sizes]
        work = dist.all_to_all_single(received, sent, [mine] * self.world, lengths, group=self.group, async_op=True)
        self.meter.all_to_all("exchange", [4 * n for n in lengths], [4 * mine] * self.world, self.rank)
        return received, work

    def _all_to_all(
        self, parts: list[list[Payload]], arriving: list[int], device: torch.device
    ) -> tuple[tuple[Tensor, ...], dist.Work | None]:
        packed = [self._pack(owner, device) for owner in parts]
        sent = torch.cat(packed)
        if self.world == 1:
            return (sent,), None
        lengths = [part.numel() for part in packed]
        received = torch.empty(sum(arriving), dtype=torch.uint8, device=sent.device)
        work = dist.all_to_all_single(received, sent, arriving, lengths, group=self.group, async_op=True)
        self.meter.all_to_all("exchange", lengths, arriving, self.rank)
        return torch.split(received, arriving), work

    def _all_gather(self, sent: Tensor) -> tuple[Tensor, dist.Work | None]:
        if self.world == 1:
            return sent, None
        everyones = torch.empty(self.world * sent.numel(), dtype=torch.uint8, device=sent.device)
        work = dist.all_gather_into_tensor(everyones, sent, group=self.group, async_op=True)
        self.meter.all_gather("exchange", sent.numel(), self.world)
        return everyones, work

    def _pack(self, parts: list[Payload], device: torch.device) -> Tensor:
        layouts = [self.compressor.layout(part.numel, part.dtype, self.compressor.entries(part)) for part in parts]
        return Wire(layouts).pack(parts, device)


def _copy_overlap(source: ServerResidual, target: ServerResidual) -> None:
    start = max(source.start, target.start)
    stop = min(source.start + source.values.numel(), target.start + target.values.numel())
    if start < stop:
        part = source.values[start - source.start : stop - source.start]
        target.values[start - target.start : stop - target.start].copy_(part)


def _shares(numels: Sequence[int], world: int, granularity: int) -> list[list[_Part]]:
    """Cut tensors of these sizes, laid end to end, into ``world`` nearly equal shares; empty parts are left out."""
    starts = [0, *accumulate(numels)]
    targets = [starts[-1] * rank // world for rank in range(world + 1)]
    shares: list[list[_Part]] = [[] for _ in range(world)]
    for tensor, (begin, end) in enumerate(pairwise(starts)):
        cuts = [min(max(target - begin, 0), end - begin) for target in targets]
        cuts = [cut if cut == end - begin else cut // granularity * granularity for cut in cuts]
        for owner, (start, stop) in enumerate(pairwise(cuts)):
            if stop > start:
                shares[owner].append(_Part(tensor, start, stop))
    return shares
