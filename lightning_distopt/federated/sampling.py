"""Which clients take part in a round: a function of seed and round, so that a resumed run asks the same ones."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

__all__ = ["fixed_cohort", "key_of", "poisson_cohort"]

T = TypeVar("T")


def key_of(seed: int, *what: int | str) -> int:
    """Return a 63-bit key that depends on all arguments, the same on every machine and in every version of Python."""
    text = "/".join(str(part) for part in (seed, *what))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def fixed_cohort(clients: Sequence[T], size: int, seed: int, server_round: int) -> list[T]:
    """Return ``size`` clients, uniformly without replacement, in the order in which they were given.

    Raises:
        ValueError: if fewer clients are there.
    """
    if size > len(clients):
        raise ValueError(
            f"`size` must be at most the {len(clients)} clients: got {size}. Ask for fewer, or wait for more."
        )
    chosen = random.Random(key_of(seed, "cohort", server_round)).sample(range(len(clients)), size)
    return [clients[at] for at in sorted(chosen)]


def poisson_cohort(clients: Sequence[T], rate: float, seed: int, server_round: int) -> list[T]:
    """Return each client with probability ``rate``, independently of the others; the cohort may be empty."""
    generator = random.Random(key_of(seed, "poisson", server_round))
    return [client for client in clients if generator.random() < rate]
