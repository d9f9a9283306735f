"""How long a step takes, from the link, the codec and the model: latency and bandwidth, nothing else.

With ``W`` ranks, ``L`` seconds of latency a message, ``B`` bytes a second and direction, and payloads of ``p`` bytes:

===============  ===================================  ==========================
exchange         seconds on the network               payloads decoded by a rank
===============  ===================================  ==========================
all-reduce       ``2 (W-1) L + 2 p (W-1) / W / B``    1
all-gather       ``(W-1) L + p (W-1) / B``            ``W``
sharded server   ``2 (W-1) L + 2 p (W-1) / W / B``    2
===============  ===================================  ==========================

A step is a walk along two time lines, the processor's and the network's (buckets ``0 .. n-1``):

    gradients    forward ─ backward 0 ─ encode 0 ─ backward 1 ─ encode 1 ─ ... ┐           ┌ decode 0 ─ decode 1 ─ step
    updates      forward ─ backward ─ step ─ encode 0 ─ encode 1 ─ decode 0 ─ encode 2 ...
    network                                 └ bucket 0 ──────── ┴ bucket 1 ────┴ ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_distopt.advice.candidates import Candidate

__all__ = ["CodecSpeed", "Link", "Prediction", "Workload", "crossover", "predict", "rank_methods"]


@dataclass(frozen=True)
class Link:
    """The network between ranks.

    Args:
        bandwidth: bytes a second, each way, of one rank.
        latency: seconds a message takes whatever its size.
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class CodecSpeed:
    """Seconds an element, on one rank.

    Args:
        encode: compress, with the residual where the path has one.
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
        forward: seconds.
        backward: seconds, without communication.
        buckets: in which elements travel.
    """

    numel: int
    forward: float
    backward: float
    buckets: int = 1

    @property
    def compute(self) -> float:
        """Seconds of a step that sends nothing."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Prediction:
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


def predict(candidate: Candidate, work: Workload, link: Link, codec: CodecSpeed, world: int) -> Prediction:
    """Return the prediction for the exchange that is fastest."""
    compressor = candidate.compressor
    possible = ["all_reduce"] if compressor.linear else ["all_gather"]
    if compressor.splittable and not compressor.linear:
        possible.append("sharded_server")
    if world == 1:
        return Prediction(candidate, possible[0], work.compute, 0.0, 0.0, 0.0)
    return min((_with(e, candidate, work, link, codec, world) for e in possible), key=lambda p: p.seconds)


def rank_methods(
    work: Workload,
    link: Link,
    codecs: Mapping[str, CodecSpeed],
    world: int,
    candidates: Sequence[Candidate],
) -> list[Prediction]:
    """Return a prediction for every candidate, the fastest first; ``codecs`` are by the compressor's text."""
    return sorted((predict(c, work, link, codecs[c.text], world) for c in candidates), key=lambda p: p.seconds)


def crossover(
    candidate: Candidate,
    baseline: Candidate,
    work: Workload,
    latency: float,
    codecs: Mapping[str, CodecSpeed],
    world: int,
) -> float:
    """Return the bandwidth, bytes a second, below which ``candidate`` is faster than ``baseline``; 0 if it never is."""

    def faster(bandwidth: float) -> bool:
        ours, theirs = (
            predict(c, work, Link(bandwidth, latency), codecs[c.text], world).seconds for c in (candidate, baseline)
        )
        return ours < theirs

    low, high = 1e3, 1e13
    if not faster(low):
        return 0.0
    for _ in range(80):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if faster(middle) else (low, middle)
    return low


def _with(exchange: str, candidate: Candidate, work: Workload, link: Link, codec: CodecSpeed, world: int) -> Prediction:
    payload = candidate.compressor.nbytes(work.numel) / work.buckets
    share = (world - 1) / world
    messages, nbytes, decoded = {
        "all_reduce": (2 * (world - 1), 2 * payload * share, 1),
        "all_gather": (world - 1, payload * (world - 1), world),
        "sharded_server": (2 * (world - 1), 2 * payload * share, 2),
    }[exchange]
    network = messages * link.latency + nbytes / link.bandwidth
    elements = work.numel / work.buckets
    encode = codec.encode * elements + codec.fixed
    decode = codec.decode * elements * decoded
    if exchange == "sharded_server":
        encode += codec.encode * elements / world  # the answer
    seconds = _walk(candidate, work, network, encode, decode)
    return Prediction(
        candidate, exchange, seconds, network * work.buckets, (encode + decode) * work.buckets, nbytes * work.buckets
    )


def _walk(candidate: Candidate, work: Workload, network: float, encode: float, decode: float) -> float:
    """Return the end of the step on the processor's time line."""
    in_backward = candidate.path == "gradients"
    now, free = (work.forward if in_backward else work.compute), 0.0
    arrivals: list[float] = []
    for _ in range(work.buckets):
        now += encode + (work.backward / work.buckets if in_backward else 0.0)
        free = max(now, free) + network
        arrivals.append(free)
        if not in_backward and len(arrivals) > 1:  # updates: decode a bucket when the next one is on its way
            now = max(now, arrivals.pop(0)) + decode
    for arrival in arrivals:
        now = max(now, arrival) + decode
    return now
