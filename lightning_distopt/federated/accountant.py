"""How much privacy the noised rounds have cost: Renyi accounting of sampled Gaussian releases, client level.

Google's ``dp-accounting`` (extra ``federated``) counts where it is installed; else :func:`renyi_epsilon` does, the plain formula
that the tests hold beside it:

    no sampling:  eps(a) = a / (2 z²)
    Poisson q:    eps(a) = log( sum_j binom(a, j) (1-q)^(a-j) q^j exp(j (j-1) / (2 z²)) ) / (a - 1)
    epsilon     = min over a of  sum of eps(a) + log((a-1)/a) - (log delta + log a) / (a-1)

Neighbours differ by one client, added or removed. Fixed-size cohorts are counted without amplification (q = 1).

Source: arXiv:1702.07476 (Renyi DP), arXiv:1908.10530 (Poisson sampling), arXiv:2004.00010 (conversion).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

__all__ = ["Accountant", "Release", "renyi_epsilon"]

_ORDERS = range(2, 257)


class Release(NamedTuple):
    """Some rounds of one kind.

    Attributes:
        rate: probability with which a client takes part, in (0, 1]; 1: no amplification.
        noise_multiplier: standard deviation of the noise on the sum, over the clipping bound.
        rounds: how many.
    """

    rate: float
    noise_multiplier: float
    rounds: int


def renyi_epsilon(releases: Sequence[Release], delta: float) -> float:
    """Return epsilon at ``delta`` of all releases together, by the formula above over orders 2 to 256."""
    if not any(release.rounds for release in releases):
        return 0.0
    if any(release.rounds and release.noise_multiplier == 0 for release in releases):
        return math.inf
    best = math.inf
    for order in _ORDERS:
        total = sum(release.rounds * _renyi(release.rate, release.noise_multiplier, order) for release in releases)
        best = min(best, total + math.log((order - 1) / order) - (math.log(delta) + math.log(order)) / (order - 1))
    return max(0.0, best)


def _renyi(rate: float, z: float, order: int) -> float:
    if rate >= 1.0:
        return order / (2 * z * z)
    terms = [
        math.lgamma(order + 1) - math.lgamma(j + 1) - math.lgamma(order - j + 1)
        + (order - j) * math.log1p(-rate) + j * math.log(rate) + j * (j - 1) / (2 * z * z)
        for j in range(order + 1)
    ]  # fmt: skip
    top = max(terms)
    return (top + math.log(sum(math.exp(term - top) for term in terms))) / (order - 1)


class Accountant:
    """Counts releases, and says what they cost.

    Args:
        delta: probability with which the bound may fail, in (0, 1); below one over the number of clients.
        backend: ``"dp-accounting"``, ``"renyi"``, or ``"auto"``: the first if it is installed.

    Raises:
        ValueError: if an argument is out of range.
        ModuleNotFoundError: if the backend that was asked for is not installed.
    """

    def __init__(self, delta: float, backend: str = "auto") -> None:
        if not 0.0 < delta < 1.0:
            raise ValueError(f"`delta` must be in (0, 1): got {delta}. Use less than one over the number of clients.")
        if backend not in ("auto", "renyi", "dp-accounting"):
            raise ValueError(f"`backend` must be 'auto', 'dp-accounting' or 'renyi': got {backend!r}.")
        installed = find_spec("dp_accounting") is not None
        if backend == "dp-accounting" and not installed:
            raise ModuleNotFoundError(
                "`backend='dp-accounting'` needs the extra `federated`: pip install dp-accounting."
            )
        self.delta = delta
        self.backend = "dp-accounting" if installed and backend != "renyi" else "renyi"
        self.releases: list[Release] = []

    def spend(self, rate: float, noise_multiplier: float) -> None:
        """Count one round."""
        last = self.releases[-1] if self.releases else None
        if last is not None and last[:2] == (rate, noise_multiplier):
            self.releases[-1] = last._replace(rounds=last.rounds + 1)
        else:
            self.releases.append(Release(rate, noise_multiplier, 1))

    def epsilon(self, *more: Release) -> float:
        """Return what has been spent, and ``more`` if it came on top of it."""
        releases = [*self.releases, *more]
        if self.backend == "renyi":
            return renyi_epsilon(releases, self.delta)
        return _library_epsilon(tuple(releases), self.delta)

    def state_dict(self) -> list[list[float]]:
        """Return plain numbers."""
        return [list(release) for release in self.releases]

    def load_state_dict(self, state: Sequence[Sequence[float]]) -> None:
        """Take the numbers of :meth:`state_dict`."""
        self.releases = [Release(float(rate), float(z), int(rounds)) for rate, z, rounds in state]


@lru_cache(maxsize=16)  # what was looked ahead at is asked for again once it is spent
def _library_epsilon(releases: tuple[Release, ...], delta: float) -> float:
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    if any(release.rounds and release.noise_multiplier == 0 for release in releases):
        return math.inf
    accountant = RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for rate, z, rounds in releases:
        event: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(z)
        if rate < 1.0:
            event = dp_accounting.PoissonSampledDpEvent(rate, event)
        accountant.compose(event, rounds)
    return float(accountant.get_epsilon(delta))
