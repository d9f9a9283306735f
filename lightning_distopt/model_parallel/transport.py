"""Channels carry nests of tensors, labelled with their batch, from one stage to the next; in order, each as one message.

    sender                                                   receiver
    message i: | header | description | tensors ... | pad |  one buffer of a size that both know: posted ``depth`` messages ahead

Gloo moves data only once the receiver has posted a buffer of exactly the right size. So buffers are posted early, and
their size is agreed without a word: message i uses the largest size that any message up to i - depth needed. What does not
fit (the first messages, a growing batch) follows in a buffer of its own. Nothing waits for a peer but ``receive``, which has
a time-out, and ``send`` for a message that the delays of the plan say must have arrived.

Messages are in host memory and go through a Gloo group, also between GPUs: NCCL knows no tags and runs the messages between two
ranks in one order, so that a buffer posted early would hold up what is sent after it.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_distopt.errors import PipelineError
from lightning_distopt.exchange import ask_around, roll_call
from lightning_distopt.exchange.meter import Meter
from lightning_distopt.model_parallel.structure import flatten, unflatten

__all__ = ["Channel", "Endpoint", "LocalChannel", "Receiver", "Sender"]

_MAGIC = 0x1D157007
_WORDS = (
    8  # magic, batch, bytes of the description, bytes needed in all, whether they follow, sent at (ns), read, 1 spare
)
_ALIGN = 64
_HEADER = _WORDS * 8
_FIRST = 1024  # bytes of the messages before any size is known


class Endpoint(NamedTuple):
    """One end of a channel.

    Attributes:
        stage: on this side, for messages.
        peer: global rank of the other side.
        tag: of this channel; ``tag + 1`` belongs to it, too.
        purpose: "activations" or "gradients".
    """

    stage: int
    peer: int
    tag: int
    purpose: str


class Channel(ABC):
    """One direction of one hop, seen from one of its ends."""

    def send(self, batch: int, nest: Any) -> None:
        """Send; returns as soon as the tensors may be changed."""
        raise TypeError(f"{type(self).__name__} does not send.")

    def receive(self, batch: int) -> Any:
        """Return the next message, which must be that of this batch."""
        raise TypeError(f"{type(self).__name__} does not receive.")

    @abstractmethod
    def depth(self) -> int:
        """Return the number of messages that are under way or wait at the other end, as far as this end knows."""


class LocalChannel(Channel):
    """Both ends in one process: stages of one worker, and pipelines without processes.

    Args:
        stage: on the receiving side, for messages.
    """

    def __init__(self, stage: int = 0) -> None:
        self._stage = stage
        self._queue: deque[tuple[int, Any]] = deque()

    def send(self, batch: int, nest: Any) -> None:
        spec, tensors = flatten(nest)
        self._queue.append((batch, unflatten(spec, [tensor.detach().clone() for tensor in tensors])))

    def receive(self, batch: int) -> Any:
        if not self._queue:
            raise PipelineError(
                f"Stage {self._stage} waits for batch {batch}, which its neighbour in the same process has not sent.",
                self._stage,
                0,
                batch,
            )
        found, nest = self._queue.popleft()
        _check_batch(found, batch, Endpoint(self._stage, 0, 0, "a message"))
        return nest

    def depth(self) -> int:
        return len(self._queue)


class Sender(Channel):
    """The sending end of a channel between processes.

    Args:
        end: which one.
        depth: buffers that the other end posts ahead, >= 1; the same there.
        in_flight: messages after which the oldest must have arrived, by the delays of the plan.
        group: process group of the pipeline.
        meter: counts bytes.
        timeout: seconds to wait for the peer.

    Attributes:
        back: receives what comes the other way over the same hop, and with it how much of what was sent has been read.
        count: messages sent.
        nbytes: bytes sent.
    """

    def __init__(
        self,
        end: Endpoint,
        depth: int,
        in_flight: int,
        group: dist.ProcessGroup | None,
        meter: Meter,
        timeout: float,
    ) -> None:
        self._end, self._group, self._meter, self._timeout = end, group, meter, timeout
        self._sizes = deque([_FIRST] * depth)
        self._largest = _FIRST
        self._in_flight = max(1, in_flight)
        self._works: deque[tuple[int, list[dist.Work], list[Tensor]]] = deque()
        self.back: Receiver | None = None
        self.count = self.nbytes = 0

    def send(self, batch: int, nest: Any) -> None:
        spec, tensors = flatten(nest)
        layout = [[str(t.dtype)[6:], list(t.shape)] for t in tensors]
        description = json.dumps([spec, layout], separators=(",", ":")).encode()
        needed = _padded(_HEADER + len(description)) + sum(_padded(t.nbytes) for t in tensors)
        size = self._sizes.popleft()
        self._largest = max(self._largest, needed)
        self._sizes.append(self._largest)
        fits = needed <= size
        read = self.back.count if self.back is not None else 0
        header = [_MAGIC, batch, len(description), needed, int(not fits), time.monotonic_ns(), read, 0]
        buffer = torch.empty(size if fits else needed, dtype=torch.uint8)
        buffer[:_HEADER].view(torch.int64).copy_(torch.tensor(header))
        buffer[_HEADER : _HEADER + len(description)].copy_(torch.frombuffer(bytearray(description), dtype=torch.uint8))
        offset = _padded(_HEADER + len(description))
        for tensor in tensors:
            if tensor.numel():
                place = buffer[offset : offset + tensor.nbytes].view(tensor.dtype)
                place.copy_(tensor.detach().reshape(-1))
            offset += _padded(tensor.nbytes)
        parts = [(buffer, self._end.tag)]
        if not fits:
            short = torch.zeros(size, dtype=torch.uint8)
            short[:_HEADER].copy_(buffer[:_HEADER])
            parts = [(short, self._end.tag), (buffer, self._end.tag + 1)]
        self._post(batch, parts)
        sent = sum(part.numel() for part, _ in parts)
        self._meter.message(self._end.purpose, sent=sent)
        self.count, self.nbytes = self.count + 1, self.nbytes + sent

    def _post(self, batch: int, parts: Sequence[tuple[Tensor, int]]) -> None:
        try:
            works = [dist.isend(part, self._end.peer, group=self._group, tag=tag) for part, tag in parts]
            assert all(work is not None for work in works)
            self._works.append((batch, works, [part for part, _ in parts]))  # type: ignore[arg-type]
            while len(self._works) > self._in_flight:
                batch, oldest, _ = self._works[0]
                with roll_call.during(f"send {self._end.purpose}", waiting=True):
                    for work in oldest:
                        work.wait(timedelta(seconds=self._timeout))
                self._works.popleft()
        except RuntimeError as error:
            raise _failed("send", self._end, batch, self._timeout, error) from error

    def depth(self) -> int:
        return self.count - (self.back.read_there if self.back is not None else 0)

    def settle(self) -> None:
        """Wait until all messages have arrived (they have, when the run is drained)."""
        for batch, works, _ in self._works:
            try:
                with roll_call.during(f"send {self._end.purpose}", waiting=True):
                    for work in works:
                        work.wait(timedelta(seconds=self._timeout))
            except RuntimeError as error:
                raise _failed("send", self._end, batch, self._timeout, error) from error
        self._works.clear()


class Receiver(Channel):
    """The receiving end of a channel between processes; see :class:`Sender`.

    Args:
        end: which one.
        depth: buffers posted ahead, >= 1.
        group: process group of the pipeline.
        meter: counts bytes, and the seconds waited ("exchange").
        timeout: seconds to wait for the peer.
        device: where tensors are to be.
        latency: seconds added to the way of every message, for experiments.

    Attributes:
        count: messages read.
        read_there: how many that went the other way had been read when the last message left.
    """

    def __init__(
        self,
        end: Endpoint,
        depth: int,
        group: dist.ProcessGroup | None,
        meter: Meter,
        timeout: float,
        device: torch.device,
        latency: float = 0.0,
    ) -> None:
        self._end, self._group, self._meter, self._timeout = end, group, meter, timeout
        self._device, self._latency, self._largest = device, latency, _FIRST
        self._posted: deque[tuple[dist.Work, Tensor]] = deque()
        self._ahead = depth
        self.count = self.read_there = 0

    def receive(self, batch: int) -> Any:
        while len(self._posted) < self._ahead:
            self._post(batch)
        work, buffer = self._posted.popleft()
        with self._meter.timed("exchange"):
            self._wait(work, batch)
            header = buffer[:_HEADER].view(torch.int64).tolist()
            if header[0] != _MAGIC:
                raise PipelineError(
                    f"Stage {self._end.stage} got something else than {self._end.purpose} of batch {batch} from rank "
                    f"{self._end.peer}. Both ends must run the same version and plan.",
                    self._end.stage,
                    self._end.peer,
                    batch,
                )
            self._meter.message(self._end.purpose, received=buffer.numel())
            if header[4]:
                buffer = torch.empty(header[3], dtype=torch.uint8)
                self._wait(self._start(buffer, self._end.tag + 1, batch), batch)
                self._meter.message(self._end.purpose, received=buffer.numel())
            if self._latency:
                time.sleep(max(0.0, self._latency - (time.monotonic_ns() - header[5]) * 1e-9))
        self._largest = max(self._largest, header[3])
        self.count, self.read_there = self.count + 1, header[6]
        self._post(batch)
        _check_batch(header[1], batch, self._end)
        spec, layout = json.loads(bytes(buffer[_HEADER : _HEADER + header[2]].tolist()))
        tensors = _views(buffer, _padded(_HEADER + header[2]), layout)
        return unflatten(spec, [tensor.to(self._device) for tensor in tensors])

    def _post(self, batch: int) -> None:
        buffer = torch.empty(self._largest, dtype=torch.uint8)
        self._posted.append((self._start(buffer, self._end.tag, batch), buffer))

    def _start(self, buffer: Tensor, tag: int, batch: int) -> dist.Work:
        try:
            work = dist.irecv(buffer, self._end.peer, group=self._group, tag=tag)
        except RuntimeError as error:
            raise _failed("receive", self._end, batch, self._timeout, error) from error
        assert work is not None
        return work

    def _wait(self, work: dist.Work, batch: int) -> None:
        try:
            with roll_call.during(f"receive {self._end.purpose}", waiting=True):
                work.wait(timedelta(seconds=self._timeout))
        except RuntimeError as error:
            raise _failed("receive", self._end, batch, self._timeout, error) from error

    def depth(self) -> int:
        return len(self._posted)  # buffers: what has arrived in them only a wait would tell


def _views(buffer: Tensor, offset: int, layout: Sequence[tuple[str, list[int]]]) -> list[Tensor]:
    tensors = []
    for name, shape in layout:
        dtype = getattr(torch, name)
        numel = 1
        for size in shape:
            numel *= size
        nbytes = numel * dtype.itemsize
        flat = (
            buffer[offset : offset + nbytes].view(dtype) if numel else torch.empty(0, dtype=dtype, device=buffer.device)
        )
        tensors.append(flat.view(shape))
        offset += _padded(nbytes)
    return tensors


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


def _check_batch(found: int, expected: int, end: Endpoint) -> None:
    if found != expected:
        raise PipelineError(
            f"Stage {end.stage} expected {end.purpose} of batch {expected} from rank {end.peer} and got those of "
            f"batch {found}. All "
            "ranks must run as many batches: check that every rank has the same `limit_train_batches` and `max_steps`.",
            end.stage,
            end.peer,
            expected,
        )


def _failed(doing: str, end: Endpoint, batch: int, timeout: float, error: RuntimeError) -> PipelineError:
    reason = " ".join(str(error).split()).split("] ")[-1].split(". ")[0]
    way = "to" if doing == "send" else "from"
    rank = dist.get_rank()
    culprits, advice = ask_around()
    return PipelineError(
        f"Stage {end.stage} on rank {rank} could not {doing} the {end.purpose} of batch {batch} {way} rank {end.peer} within "
        f"{timeout:g} s: {reason}. {advice}",
        end.stage,
        end.peer,
        batch,
        rank,
        culprits,
    )
