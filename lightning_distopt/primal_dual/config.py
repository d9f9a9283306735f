"""What a run is: the numbers that make ACPD, CoCoA, CoCoA+ and DisDCA points of one engine."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lightning_distopt.compressors.base import check_ratio

__all__ = ["PRESETS", "Config", "preset"]


@dataclass(frozen=True)
class Config:
    """The engine's settings, checked at construction.

    Attributes:
        workers: K, at least 1.
        group_size: B, answers that the server waits for, 1 to K.
        sync_period: T; in every T-th round it waits for all.
        density: rho, share of the coordinates that a message carries, in (0, 1].
        gamma: share of each local step that is taken, in (0, 1].
        sigma: the safety factor sigma' of the local problems. ``gamma K`` is safe; less is faster on data without much in
            common between shards, and may diverge.
        guard: compare the dual at certified synchronisations; where it fell, go back to the last one and double ``sigma``, at
            most to ``gamma K``.
        residual_weight: what has not been sent counts in the local model with this weight: 1 (as what it is), 0 (not), or
            any other number; the authors' code has sigma'.
        downlink: "assign" sends the values of changed coordinates, after which a worker's model equals the server's bit for
            bit; "topk" sends the largest changes and keeps the rest (the authors' code).
        flush_every: all residuals are sent, dense, at every such full synchronisation; 0 is never before the end.
        certify_every: the gap is taken at every such full synchronisation; ``None`` is when its rate so far says that it may
            have reached ``tol``, and after 1, 2, 4, ... rounds at the latest.
        local_steps: H, coordinate steps a round; ``None`` is one pass over the worker's samples.
        draws: "permutation" visits all samples before one again; "uniform" draws with replacement.
        tol: the run ends when ``(P - D) / max(1, |P|)`` is at most this.
        max_rounds: server rounds at most, at least 1.
        exact_every: the model is computed anew from the dual variables at the next synchronisation after so many rounds.
        seed: of the orders of samples.

    Raises:
        ValueError: for a number outside its range.
    """

    workers: int
    group_size: int
    sync_period: int = 10
    density: float = 0.05
    gamma: float = 1.0
    sigma: float = 1.0
    guard: bool = False
    residual_weight: float = 1.0
    downlink: str = "assign"
    flush_every: int = 1
    certify_every: int | None = 1
    local_steps: int | None = None
    draws: str = "permutation"
    tol: float = 1e-4
    max_rounds: int = 10_000
    exact_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "workers",
            "group_size",
            "sync_period",
            "flush_every",
            "certify_every",
            "local_steps",
            "max_rounds",
            "exact_every",
        ):
            # A numpy integer overflows in the arithmetic of keys, where Python's does not.
            if isinstance(getattr(self, name), np.integer):
                object.__setattr__(self, name, int(getattr(self, name)))
        _at_least("n_workers", self.workers, 1)
        if not _whole(self.group_size) or not 1 <= self.group_size <= self.workers:
            raise ValueError(
                f"`group_size` must be a whole number from 1 to the number of workers: got {self.group_size!r} of "
                f"{self.workers}. Use None for half of them."
            )
        _at_least("sync_period", self.sync_period, 1)
        check_density(self.density)
        if not (_number(self.gamma) and 0 < self.gamma <= 1):
            raise ValueError(f"`gamma` must be in (0, 1]: got {self.gamma!r}. 1 takes local steps whole.")
        if not (_number(self.sigma) and 0 < self.sigma < math.inf):
            raise ValueError(f"`sigma` must be a positive number: got {self.sigma!r}. None takes the safe gamma K.")
        if self.downlink not in ("assign", "topk"):
            raise ValueError(f"`downlink` must be 'assign' or 'topk': got {self.downlink!r}.")
        if self.guard and self.downlink == "topk" and self.flush_every != 1:
            raise ValueError(
                f"`sigma='group'` with `downlink='topk'` needs `flush_every=1`: got {self.flush_every}. Going back needs a point "
                "that all workers know."
            )
        if self.draws not in ("permutation", "uniform"):
            raise ValueError(f"`draws` must be 'permutation' or 'uniform': got {self.draws!r}.")
        if self.local_steps is not None:
            _at_least("local_steps", self.local_steps, 1)
        _at_least("flush_every", self.flush_every, 0)
        if self.certify_every is not None:
            _at_least("certify_every", self.certify_every, 1)
        _at_least("max_rounds", self.max_rounds, 1)
        _at_least("exact_every", self.exact_every, 1)
        check_tol(self.tol)

    @property
    def safe_sigma(self) -> float:
        """``gamma K``, with which the dual cannot fall where all workers answer from the newest model."""
        return self.gamma * self.workers

    def but(self, **changes: Any) -> Config:
        """Return the same settings with some changed."""
        return replace(self, **changes)


def check_tol(tol: float) -> None:
    """Raise a ``ValueError`` unless ``tol`` is a number from 0."""
    if not (_number(tol) and 0 <= tol < math.inf):
        raise ValueError(f"`tol` must be a number from 0: got {tol!r}. It bounds (P - D) / max(1, |P|).")


def check_density(density: object) -> float:
    """Return a density; raise a ``ValueError`` or ``TypeError`` naming it if it is none."""
    try:
        return check_ratio(density)
    except (TypeError, ValueError) as error:
        raise type(error)(f"`density` must be in (0, 1]: got {density!r}. Use 'auto', or 1.0 to send all.") from None


_MANY = 16  # workers, above which what a group has changed is soon every coordinate

# What each name fixes, as functions of K; everything else is the user's.
PRESETS: dict[str, str] = {
    "acpd": "the first B of K, the largest entries, residuals sent whole at full synchronisations (arXiv:1910.04235)",
    "acpd_authors": "the same with the choices of the authors' code: residual weight sigma', top-k both ways, uniform draws",
    "cocoa": "all of K, dense, averaged: gamma 1/K, sigma' 1",
    "cocoa_plus": "all of K, dense, added: gamma 1, sigma' K",
    "disdca": "the practical variant: the map of CoCoA+ with draws with replacement",
}


def preset(name: str, workers: int, **changes: Any) -> Config:
    """Return the settings of a named method for K workers.

    ``sigma=None`` is the method's own: safe for all but ``cocoa`` (which is safe by averaging); under the guard,
    ``sigma="group"`` starts at ``gamma B`` and ``sigma="alone"`` at ``gamma``, as if no worker shared a feature.

    Args:
        name: one of ``PRESETS``.
        workers: K.
        **changes: fields of :class:`Config`; ``None`` leaves the method's own.

    Raises:
        ValueError: for an unknown name, or numbers that :class:`Config` refuses.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"`algorithm` must be one of {', '.join(PRESETS)}: got {name!r}.")
    _at_least("n_workers", workers, 1)
    half = max(1, workers // 2)
    dense: dict[str, Any] = {
        "group_size": workers, "sync_period": 1, "density": 1.0, "flush_every": 0, "certify_every": 1,
    }  # fmt: skip
    methods: dict[str, dict[str, Any]] = {
        # Exact answers to many workers are dense: docs/primal_dual.md has the figures.
        "acpd": {"group_size": half, "downlink": "assign" if workers <= _MANY else "topk"},
        "acpd_authors": {"group_size": half, "downlink": "topk", "draws": "uniform"},
        "cocoa": {**dense, "gamma": 1.0 / workers, "sigma": 1.0},
        "cocoa_plus": dense,
        "disdca": {**dense, "draws": "uniform"},
    }
    own = methods[name]
    sigma = changes.pop("sigma", None)
    own.update({field: value for field, value in changes.items() if value is not None})
    gamma = own.get("gamma", 1.0)
    if not _number(gamma):
        raise ValueError(f"`gamma` must be in (0, 1]: got {gamma!r}. 1 takes local steps whole.")
    if isinstance(sigma, str):
        if sigma not in ("group", "alone"):
            raise ValueError(f"`sigma` must be a number, 'group', 'alone' or None: got {sigma!r}.")
        own.update(sigma=gamma * (own["group_size"] if sigma == "group" else 1), guard=True)
    elif sigma is not None:
        own["sigma"] = sigma
    own.setdefault("sigma", gamma * workers)
    if name == "acpd_authors":
        own.setdefault("residual_weight", own["sigma"])
    return Config(workers=workers, **own)


def check_seed(seed: object) -> int:
    """Return a seed as an int; raise a ``ValueError`` unless it is a whole number."""
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool):
        raise ValueError(
            f"`seed` must be a whole number: got {seed!r}. It names the orders of samples and the partition."
        )
    return int(seed)


def check_positive(name: str, value: Any, cure: str, most: float = sys.float_info.max) -> None:
    """Raise a ``ValueError`` unless ``value`` is a number above 0 and at most ``most``."""
    if not (_number(value) and 0 < value <= most):
        raise ValueError(
            f"`{name}` must be a {'finite ' if most < math.inf else ''}number above 0: got {value!r}. {cure}"
        )


def check_whole(name: str, value: Any, least: int) -> None:
    """Raise a ``ValueError`` unless ``value`` is a whole number from ``least``."""
    _at_least(name, value, least)


def _number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _at_least(name: str, value: Any, least: int) -> None:
    if hasattr(value, "__index__") and not isinstance(value, bool) and value.__index__() >= least:
        return
    raise ValueError(f"`{name}` must be a whole number from {least}: got {value!r}.")
