"""How long a step takes, from what was measured of the link, the codec and the model; no method has a number of its own.

With ``W`` ranks, ``L`` seconds of latency a message, ``B`` bytes a second and direction, and payloads of ``p`` bytes:

===============  ===================================  ==========================
exchange         seconds on the network               payloads decoded by a rank
===============  ===================================  ==========================
all-reduce       ``2 (W-1) L + 2 p (W-1) / W / B``    1
all-gather       ``(W-1) L + p (W-1) / B``            ``W``
sharded server   ``2 (W-1) L + 2 p (W-1) / W / B``    2
===============  ===================================  ==========================

PowerSGD is two all-reduces a bucket, of ``P`` and what is dense, and, when backward has ended, of ``Q``. SignSGD gathers
bits up to 8 ranks and all-reduces bytes above. Before updates travel, ranks agree in one all-reduce of 32 bytes.

A step is a walk along two time lines, the processor's and the network's (buckets ``0 .. n-1``):

    gradients    outside ─ backward to 0 ─ encode 0 ─ backward to 1 ─ encode 1 ─ ... ┐    ┌ decode 0 ─ decode 1
    updates      outside ─ backward ─ encode 0 ─ encode 1 ─ decode 0 ─ encode 2 ...
    network                                 └ bucket 0 ──────── ┴ bucket 1 ────┴ ...

What the walk hides of the network behind the processor's work is hidden only as far as the machine can do both at once:
``seconds = walk + (1 - overlap) * hidden``. Where sending and summing need the core that trains, ``overlap`` is near 0.

The costs, and where they come from:

=======================  ==============================================================================================
``backward``, ``cuts``   when each bucket of DDP is full, timed in real steps (``compressed_ddp_auto``) or trial ones
``forward``              all else of a real step: data, forward, optimizer, callbacks; of a trial one the forward alone
``bandwidth, latency``   all-reduces of a large and a small message on the process group (:func:`measure_link`)
``overlap``              a fixed computation beside a large all-reduce, and each by itself (:func:`measure_link`)
``encode, fixed``        the whole engine of a path on one rank, less ``decode``: with residuals, checks and copies
``decode``               decompressing one payload and adding it (:func:`measure_codec`)
=======================  ==============================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import NamedTuple

from lightning_distopt.advice.candidates import Candidate
from lightning_distopt.compressors import Compressor, PowerSGD
from lightning_distopt.data_parallel.exchanges import ALL_GATHER_RANKS
from lightning_distopt.exchange.majority_vote import BIT_RANKS, MOST_RANKS

__all__ = [
    "CodecSpeed",
    "Link",
    "Prediction",
    "Workload",
    "crossover",
    "cut",
    "low_rank_numel",
    "predict",
    "rank_methods",
]

# Bytes; DistributedDataParallel's, and the second also of the updates' engine.
_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20
_MATRIX = 512  # rows and columns of an imagined model's matrices


@dataclass(frozen=True)
class Link:
    """The network between ranks.

    Args:
        bandwidth: bytes a second, each way, of one rank.
        latency: seconds a message takes whatever its size.
        overlap: share of the time on the network that computing hides, in [0, 1]: 0 where sending takes the core that
            computes, 1 where it costs nothing.
    """

    bandwidth: float
    latency: float
    overlap: float = 1.0


@dataclass(frozen=True)
class CodecSpeed:
    """Seconds an element, on one rank.

    Args:
        encode: all that a path's engine does with an element, but for ``decode``.
        decode: decompress one payload and add it.
        fixed: seconds a bucket that do not depend on its size.
    """

    encode: float
    decode: float
    fixed: float = 0.0


@dataclass(frozen=True)
class Workload:
    """The model's part of a step.

    Args:
        numel: trainable elements.
        forward: seconds outside of backward.
        backward: seconds, without communication.
        buckets: in which elements travel, alike and evenly ready, where ``cuts`` are not known.
        cuts: (elements, seconds from the start of backward until they are ready) of each bucket of DDP.
        shapes: of the parameters; where they are not known, matrices of 512 x 512.
    """

    numel: int
    forward: float
    backward: float
    buckets: int = 1
    cuts: tuple[tuple[int, float], ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def compute(self) -> float:
        """Seconds of a step that sends nothing."""
        return self.forward + self.backward

    def ready(self, candidate: Candidate) -> list[tuple[float, float]]:
        """Return (elements, seconds from the start of the step until they can be encoded) of each bucket."""
        if candidate.path == "gradients":
            if self.cuts:
                return [(numel, self.forward + seconds) for numel, seconds in self.cuts]
            each = self.backward / self.buckets
            return [(self.numel / self.buckets, self.forward + (i + 1) * each) for i in range(self.buckets)]
        number = ceil(4 * self.numel / _BUCKET) if self.cuts else self.buckets
        return [(self.numel / number, self.compute)] * number


class Prediction(NamedTuple):
    """What the model says of one method.

    Args:
        candidate: the method.
        exchange: the cheapest that can carry it.
        seconds: of a step.
        network: seconds on the network, hidden or not.
        codec: seconds of encoding and decoding.
        nbytes: sent by a rank in a step.
    """

    candidate: Candidate
    exchange: str
    seconds: float
    network: float
    codec: float
    nbytes: float


def cut(numels: Sequence[int], ready: Sequence[float], itemsize: int = 4) -> tuple[tuple[int, float], ...]:
    """Return the buckets of ``DistributedDataParallel`` (1 MB, then 25 MB) over gradients in the order of backward.

    Args:
        numels: elements of each gradient.
        ready: seconds from the start of backward until each is there, ascending.
        itemsize: bytes of an element.
    """
    cuts: list[tuple[int, float]] = []
    collected, limit = 0, _FIRST_BUCKET
    for numel, seconds in zip(numels, ready, strict=True):
        collected += numel
        if collected * itemsize >= limit:
            cuts.append((collected, seconds))
            collected, limit = 0, _BUCKET
    if collected:
        cuts.append((collected, ready[-1]))
    return tuple(cuts)


def low_rank_numel(rank: int, work: Workload) -> tuple[float, float]:
    """Return how many elements PowerSGD sends at first (``P`` and what is dense) and afterwards (``Q``)."""
    shapes = work.shapes or ((_MATRIX, _MATRIX),)
    first = second = 0
    for shape in shapes:
        rows, columns = (shape[0], prod(shape[1:])) if len(shape) > 1 else (prod(shape), 0)
        thin = columns > 0 and rank * (rows + columns) < rows * columns
        first += rank * rows if thin else prod(shape)
        second += rank * columns if thin else 0
    scale = work.numel / sum(prod(shape) for shape in shapes)
    return first * scale, second * scale


def predict(
    candidate: Candidate, work: Workload, link: Link, codec: CodecSpeed, world: int, exchange: str | None = None
) -> Prediction:
    """Return the prediction for an exchange, or for the one that is fastest.

    Gradients have no choice: they are gathered by few ranks and served by many, as the strategy's ``exchange="auto"`` says.
    """
    plans = _plans(candidate, work, world)
    plans = [plan for plan in plans if plan.exchange == exchange] or plans
    if world == 1:
        return Prediction(candidate, plans[0].exchange, work.compute, 0.0, 0.0, 0.0)
    return min((_with(plan, candidate, work, link, codec, world) for plan in plans), key=lambda p: p.seconds)


def rank_methods(
    work: Workload,
    link: Link,
    codecs: Mapping[str, CodecSpeed],
    world: int,
    candidates: Sequence[Candidate],
) -> list[Prediction]:
    """Return a prediction for every candidate that ``world`` ranks can use, the fastest first; ``codecs`` are by name."""
    usable = [c for c in candidates if c.text != "signsgd" or world <= MOST_RANKS]
    return sorted((predict(c, work, link, codecs[c.name], world) for c in usable), key=lambda p: p.seconds)


def crossover(
    candidate: Candidate,
    baseline: Candidate,
    work: Workload,
    link: Link,
    codecs: Mapping[str, CodecSpeed],
    world: int,
) -> float:
    """Return the bandwidth, bytes a second, at which ``candidate`` ceases to be faster than ``baseline``.

    Positive: it is faster below. 0: it is faster nowhere. Negative: it is faster above the magnitude only, as a method with
    fewer messages and more bytes may be. Latency and overlap are those of ``link``.
    """

    def faster(bandwidth: float) -> bool:
        there = Link(bandwidth, link.latency, link.overlap)
        ours, theirs = (predict(c, work, there, codecs[c.name], world).seconds for c in (candidate, baseline))
        return ours < theirs

    bandwidths = [_LEAST * 10 ** (step / 10) for step in range(101)]
    where = [faster(bandwidth) for bandwidth in bandwidths]
    if not any(where):
        return 0.0
    first = where.index(not where[0]) if (not where[0]) in where else len(where)
    if first == len(where):
        return bandwidths[-1]
    low, high = bandwidths[first - 1], bandwidths[first]
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if faster(middle) is where[0] else (low, middle)
    return low if where[0] else -high


_LEAST = 1e3  # bytes a second, from which bandwidths are looked at, up to 10 ** 10 times as many


# ---- one method on one exchange --------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """What travels for one element: how often ranks talk, and how much each sends and decodes.

    Args:
        exchange: its name.
        messages: that follow one another in the first collective, and in the second.
        nbytes: sent a rank and element in the first, and in the second.
        decoded: payloads decoded by a rank.
        answered: share of the elements that a rank compresses once more.
    """

    exchange: str
    messages: tuple[int, int]
    nbytes: tuple[float, float]
    decoded: float
    answered: float = 0.0


def _plans(candidate: Candidate, work: Workload, world: int) -> list[_Plan]:
    scheme, n = candidate.compressor, work.numel
    share, around = (world - 1) / world, 2 * (world - 1)
    if isinstance(scheme, PowerSGD):
        first, second = low_rank_numel(scheme.rank, work)
        return [_Plan("all_reduce", (around, around), (8 * share * first / n, 8 * share * second / n), 1)]
    if not isinstance(scheme, Compressor):  # SignSGD
        if world <= BIT_RANKS:
            return [_Plan("all_gather", (world - 1, 0), ((world - 1) / 8, 0), world)]
        return [_Plan("all_reduce", (around, 0), (2 * share, 0), 1)]
    payload = scheme.nbytes(n) / n
    if scheme.linear:
        return [_Plan("all_reduce", (around, 0), (2 * share * payload, 0), 1)]
    plans = [_Plan("all_gather", (world - 1, 0), (payload * (world - 1), 0), world)]
    if scheme.splittable and not candidate.residual:  # with residuals in units of gradients, its answers are dense
        plans.append(_Plan("sharded_server", (around, 0), (2 * share * payload, 0), 2, 1 / world))
        if candidate.path == "gradients":
            plans = plans[1:] if world > ALL_GATHER_RANKS else plans[:1]
    return plans


class _Bucket(NamedTuple):
    """Seconds of one bucket: when it is ready, in the codec before and after the network, and on it, first and second."""

    ready: float
    encode: float
    decode: float
    first: float
    second: float


def _with(plan: _Plan, candidate: Candidate, work: Workload, link: Link, codec: CodecSpeed, world: int) -> Prediction:
    buckets = []
    for numel, ready in work.ready(candidate):
        encode = codec.encode * numel * (1 + plan.answered) + codec.fixed
        first, second = (
            messages * link.latency + numel * nbytes / link.bandwidth
            for messages, nbytes in zip(plan.messages, plan.nbytes, strict=True)
        )
        buckets.append(_Bucket(ready, encode, codec.decode * numel * plan.decoded, first, second))
    agreement = 0.0 if candidate.path == "gradients" else 2 * (world - 1) * link.latency
    walk = _walk_gradients if candidate.path == "gradients" else _walk_updates
    seconds = walk(buckets, work.compute + agreement)
    alone = walk([bucket._replace(first=0.0, second=0.0) for bucket in buckets], work.compute)
    network = sum(bucket.first + bucket.second for bucket in buckets) + agreement
    hidden = max(0.0, network - (seconds - alone))
    return Prediction(
        candidate,
        plan.exchange,
        seconds + (1 - link.overlap) * hidden,
        network,
        sum(bucket.encode + bucket.decode for bucket in buckets),
        work.numel * sum(plan.nbytes),
    )


def _walk_gradients(buckets: Sequence[_Bucket], compute: float) -> float:
    """Return the end of the step: all buckets start in backward, and are finished in order when it has ended."""
    spent, free = 0.0, 0.0
    arrivals, answers = [], []
    for bucket in buckets:
        spent += bucket.encode
        free = max(bucket.ready + spent, free) + bucket.first
        arrivals.append(free)
    now = compute + spent
    for bucket, arrival in zip(buckets, arrivals, strict=True):
        now = max(now, arrival) + (bucket.decode / 2 if bucket.second else 0.0)
        free = max(now, free) + bucket.second
        answers.append(free if bucket.second else arrival)
    for bucket, arrival in zip(buckets, answers, strict=True):
        now = max(now, arrival) + (bucket.decode / 2 if bucket.second else bucket.decode)
    return now


def _walk_updates(buckets: Sequence[_Bucket], compute: float) -> float:
    """Return the end of the step: after it, a bucket is decoded when the next one is on its way."""
    now, free = compute, 0.0
    under_way: list[tuple[float, float]] = []
    for bucket in buckets:
        now += bucket.encode
        free = max(now, free) + bucket.first
        under_way.append((free, bucket.decode))
        if len(under_way) > 1:
            arrival, decode = under_way.pop(0)
            now = max(now, arrival) + decode
    for arrival, decode in under_way:
        now = max(now, arrival) + decode
    return now
