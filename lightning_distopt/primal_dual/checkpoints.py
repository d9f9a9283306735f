"""Checkpoints of a fit: the dual variables by sample, from which everything else is computed.

A file is taken back only for the same samples, targets, weights and objective; it appears whole or not at all.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from lightning_distopt.errors import CheckpointError

__all__ = ["Checkpoint", "CheckpointFile", "fingerprint_of", "save_array"]

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
    """

    alpha: Array
    rounds: int = 0
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0


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
                    int(kept["bytes_up"]), int(kept["bytes_down"]),
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
