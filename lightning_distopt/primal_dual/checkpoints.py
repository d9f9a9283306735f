"""Checkpoints of a fit: the dual variables by sample, from which all else can be computed, and what makes the path the same.

The model is kept too, for one that is computed anew differs from it in the last bits, and so is how far each worker has come
in its orders of samples: with as many workers a run goes on as if it had not been interrupted. With another number, or where
the last synchronisation left residuals, it goes on from the dual variables alone, which are a valid start.

A file is taken back only for the same samples, targets, weights and objective; it appears whole or not at all.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from lightning_distopt.errors import CheckpointError

__all__ = ["Checkpoint", "CheckpointFile", "Start", "fingerprint_of", "save_array"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Checkpoint:
    """A state that a run can go on from.

    Attributes:
        alpha: dual variables, by sample.
        rounds: done so far.
        seconds: spent so far.
        bytes_up: sent by the workers so far.
        bytes_down: sent by the server so far.
        sigma: the safety factor that the guard has come to; 0 is that of the settings.
        drawn: samples visited by each worker; empty if it is not known.
        model: w, bit for bit; empty if it is not known.
    """

    alpha: Array
    rounds: int = 0
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    sigma: float = 0.0
    drawn: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    model: Array = field(default_factory=lambda: np.empty(0))

    def starts(self, rows: Sequence[Any]) -> list[Start]:
        """Return where each worker begins, given its rows of ``alpha``."""
        same = bool(self.model.size) and self.drawn.size == len(rows)
        alphas = [self.alpha[part] if self.alpha.any() else None for part in rows]
        if not same:
            return [Start(alpha, rounds=self.rounds) for alpha in alphas]
        return [
            Start(alpha, self.rounds, int(drawn), self.model, self.sigma)
            for alpha, drawn in zip(alphas, self.drawn, strict=True)
        ]


@dataclass(frozen=True)
class Start:
    """Where one worker, and the server with it, begins.

    Attributes:
        alpha: dual variables of its samples; ``None`` is 0.
        rounds: done before: the budget and the periods count them.
        drawn: samples visited before.
        model: w, bit for bit; ``None`` is that of all workers' dual variables.
        sigma: the safety factor; 0 is that of the settings.
    """

    alpha: Array | None = None
    rounds: int = 0
    drawn: int = 0
    model: Array | None = None
    sigma: float = 0.0


def fingerprint_of(x: Any, y: Array, weight: Array, *objective: object) -> int:
    """Return a number that tells problems apart."""
    mark = zlib.crc32(repr((x.shape, objective)).encode())
    for array in (x.indptr, x.indices, x.data, y, weight):
        mark = zlib.crc32(cast("Any", np.ascontiguousarray(array)).view(np.uint8), mark)
    return mark


class CheckpointFile:
    """The checkpoint of one problem.

    Args:
        path: of the file.
        fingerprint: of the problem.
    """

    def __init__(self, path: Path, fingerprint: int) -> None:
        self.path, self.fingerprint = path, fingerprint

    def load(self) -> Checkpoint | None:
        """Return what the file holds, ``None`` if there is none.

        Raises:
            CheckpointError: if it cannot be read, or belongs to another problem.
        """
        if not self.path.exists():
            return None
        try:
            with np.load(self.path, allow_pickle=False) as kept:
                found = int(kept["fingerprint"])
                state = Checkpoint(
                    np.asarray(kept["alpha"], np.float64), int(kept["rounds"]), float(kept["seconds"]),
                    int(kept["bytes_up"]), int(kept["bytes_down"]), float(kept["sigma"]),
                    np.asarray(kept["drawn"], np.int64), np.asarray(kept["model"], np.float64),
                )  # fmt: skip
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise CheckpointError(
                f"`checkpoint` must hold files that this package wrote: '{self.path}' cannot be read ({error}). Remove it to "
                "start anew.",
                str(self.path),
            ) from error
        if found != self.fingerprint:
            raise CheckpointError(
                f"`checkpoint` must belong to the same samples, loss and `lam`: '{self.path}' has the mark {found}, this problem "
                f"{self.fingerprint}. Remove it, or name another folder.",
                str(self.path),
            )
        return state

    def save(self, state: Checkpoint) -> None:
        """Write the file.

        Raises:
            CheckpointError: if that fails; the one before is still there.
        """
        part = self.path.with_suffix(".part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                np.savez(file, **cast("Any", {"fingerprint": self.fingerprint, **vars(state)}))
            os.replace(part, self.path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise CheckpointError(
                f"`checkpoint` must be a folder that can be written: '{self.path}' could not be ({error}). Free some space, or "
                "name another.",
                str(self.path),
            ) from error

    def remove(self) -> None:
        """Forget it: the fit has ended."""
        self.path.unlink(missing_ok=True)


def save_array(path: Path, array: Array) -> None:
    """Write an array so that the file appears whole or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.save(file, array)
    os.replace(part, path)
