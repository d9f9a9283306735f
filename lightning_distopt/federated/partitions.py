"""Who holds which samples: partitions of a data set over clients, as lists of index arrays.

Every function is a pure function of its arguments: the same seed gives the same partition. The parts are disjoint and cover
all samples. :func:`from_flower` takes any partitioner of ``flwr-datasets`` instead, on labels that are at hand.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["dirichlet", "from_flower", "iid", "natural_id", "pathological", "quantity"]

Indices = NDArray[np.int64]
_TRIES = 1000


def iid(samples: int, clients: int, seed: int = 0) -> list[Indices]:
    """Return random parts whose sizes differ by at most one.

    Raises:
        ValueError: if there are fewer samples than clients, or no client.
    """
    _check(samples, clients)
    return [np.sort(part) for part in np.array_split(np.random.default_rng(seed).permutation(samples), clients)]


def dirichlet(
    labels: Sequence[int] | NDArray[Any], clients: int, alpha: float, seed: int = 0, min_size: int = 10
) -> list[Indices]:
    """Return parts whose shares of each class are drawn from a symmetric Dirichlet distribution.

    For each class its samples are shuffled and cut at ``floor(cumsum(p) n_c)``, ``p ~ Dir(alpha, ..., alpha)``; all is drawn
    again until every client has ``min_size`` samples.

    Args:
        labels: class of each sample.
        clients: at least 1.
        alpha: above 0; 0.1 is far from, 100 near to equal shares. A share's variance is ``(K-1) / (K² (K alpha + 1))``.
        seed: of the draws.
        min_size: smallest part, at least 0.

    Raises:
        ValueError: if an argument is out of range, or 1000 draws did not give every client ``min_size`` samples.
    """
    labels = np.asarray(labels)
    _check(len(labels), clients)
    _positive("alpha", alpha)
    if min_size * clients > len(labels):
        raise ValueError(
            f"`min_size` * `clients` must be at most the {len(labels)} samples: got {min_size} * {clients}. Ask for less."
        )
    generator = np.random.default_rng(seed)
    for _ in range(_TRIES):
        parts: list[list[Indices]] = [[] for _ in range(clients)]
        for label in np.unique(labels):
            members = generator.permutation(np.flatnonzero(labels == label))
            shares = generator.dirichlet(np.full(clients, alpha))
            cuts = np.floor(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
            for part, piece in zip(parts, np.split(members, cuts), strict=True):
                part.append(piece)
        joined = [np.sort(np.concatenate(part)) for part in parts]
        if min(len(part) for part in joined) >= min_size:
            return joined
    raise ValueError(
        f"`alpha={alpha}` gave no partition of {len(labels)} samples with `min_size={min_size}` for each of {clients} clients "
        f"in {_TRIES} draws. Use a larger `alpha`, fewer clients, or a smaller `min_size`."
    )


def pathological(labels: Sequence[int] | NDArray[Any], clients: int, shards: int = 2, seed: int = 0) -> list[Indices]:
    """Return parts of a few classes each: samples sorted by label, cut into equal shards, some shards a client.

    A client sees at most ``shards`` classes if no shard straddles two classes, and at most twice as many if no class is
    smaller than a shard.

    Args:
        labels: class of each sample.
        clients: at least 1.
        shards: of each client, at least 1.
        seed: of the draw of shards.

    Raises:
        ValueError: if an argument is out of range, or there are fewer samples than shards.
    """
    labels = np.asarray(labels)
    _check(len(labels), clients)
    if shards < 1 or shards * clients > len(labels):
        raise ValueError(
            f"`shards` must be at least 1, and `shards` * `clients` at most the {len(labels)} samples: got {shards} * {clients}."
        )
    pieces = np.array_split(np.argsort(labels, kind="stable"), shards * clients)
    order = np.random.default_rng(seed).permutation(len(pieces))
    return [
        np.sort(np.concatenate([pieces[at] for at in order[client * shards : (client + 1) * shards]]))
        for client in range(clients)
    ]


def quantity(samples: int, clients: int, beta: float, seed: int = 0) -> list[Indices]:
    """Return random parts of very different sizes, ``~ Dir(beta, ..., beta)``, at least one sample each.

    Raises:
        ValueError: if an argument is out of range.
    """
    _check(samples, clients)
    _positive("beta", beta)
    generator = np.random.default_rng(seed)
    shares = generator.dirichlet(np.full(clients, beta))
    cuts = np.floor(np.cumsum(shares)[:-1] * (samples - clients)).astype(np.int64) + np.arange(1, clients)
    return [np.sort(part) for part in np.split(generator.permutation(samples), cuts)]


def natural_id(keys: Sequence[Hashable]) -> list[Indices]:
    """Return one part for each key (a writer, a speaker, ...), in the order in which the keys first appear."""
    places: dict[Hashable, list[int]] = {}
    for at, key in enumerate(keys):
        places.setdefault(key, []).append(at)
    return [np.asarray(part, dtype=np.int64) for part in places.values()]


def from_flower(partitioner: Any, labels: Sequence[int] | NDArray[Any], column: str = "label") -> list[Indices]:
    """Return the parts that a partitioner of ``flwr-datasets`` makes of labels that are at hand; no hub is asked.

    Args:
        partitioner: for example ``flwr_datasets.partitioner.DirichletPartitioner(10, "label", alpha=0.5)``.
        labels: class of each sample.
        column: what the partitioner calls the labels.

    Raises:
        ModuleNotFoundError: without the extra ``federated``.
    """
    from datasets import Dataset  # comes with flwr-datasets; heavy

    labels = np.asarray(labels)
    partitioner.dataset = Dataset.from_dict({column: labels.tolist(), "__index": np.arange(len(labels)).tolist()})
    parts = [partitioner.load_partition(client)["__index"] for client in range(partitioner.num_partitions)]
    return [np.sort(np.asarray(part, dtype=np.int64)) for part in parts]


def _check(samples: int, clients: int) -> None:
    if clients < 1 or samples < clients:
        raise ValueError(
            f"`clients` must be at least 1 and at most the number of samples, {samples}: got {clients}. Use fewer clients."
        )


def _positive(name: str, value: float) -> None:
    if not value > 0 or not np.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number above 0: got {value}. 1.0 is moderate, 0.1 strong skew.")
