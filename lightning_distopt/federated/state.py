"""The state of a federation's server after a round: one file, tensors and plain values only, that appears whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_distopt.errors import CheckpointError
from lightning_distopt.strategies.files import save_atomically

__all__ = ["STATE_FILE", "ServerState"]

STATE_FILE = "server.pt"
_VERSION = 1


@dataclass
class ServerState:
    """What the server needs to go on.

    Attributes:
        round: the last one that is finished.
        arrays: the model as clients will receive it.
        v: the last ``v'`` of each trainable array, at least float32.
        seed: of the cohorts.
        secret: key of noise and Poisson cohorts; whoever knows it can subtract the noise.
        norms: of updates accepted lately.
        releases: what the accountant has counted.
        settings: learning rate, momentum and the like of the round; a run that goes on with others is told so.
        record: of the round, without its evaluation: the beginning of its line in the log, which is written later.
    """

    round: int
    arrays: dict[str, Tensor]
    v: dict[str, Tensor]
    seed: int
    secret: int
    norms: list[float] = field(default_factory=list)
    releases: list[list[float]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        """Write the state into ``folder``.

        Raises:
            CheckpointError: naming the path, if it cannot be written; what was there before is as it was.
        """
        save_atomically({"version": _VERSION, **{f.name: getattr(self, f.name) for f in fields(self)}}, _path(folder))

    @classmethod
    def load(cls, folder: str | Path) -> ServerState | None:
        """Return the state in ``folder``, or ``None`` if there is none.

        Raises:
            CheckpointError: if the file is no such state.
        """
        path = _path(folder)
        if not Path(path).is_file():
            return None
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            version = content.pop("version")
            state = cls(**content)
        except Exception as error:
            raise CheckpointError(
                f"`{path}` is no state of a federation's server that can be read: {error}. Restore it, or remove it.",
                path,
            ) from error
        if version != _VERSION:
            raise CheckpointError(
                f"`{path}` has version {version}; version {_VERSION} is known. Use the same release.", path
            )
        return state

    def fits(self, arrays: dict[str, Tensor], folder: str | Path) -> None:
        """Raise a ``CheckpointError`` unless the state is one of a model with these arrays."""
        mine = {name: (tuple(t.shape), t.dtype) for name, t in self.arrays.items()}
        theirs = {name: (tuple(t.shape), t.dtype) for name, t in arrays.items()}
        if mine != theirs:
            odd = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
            path = _path(folder)
            raise CheckpointError(
                f"`{path}` belongs to another model: {len(odd)} arrays differ, such as {odd[:3]}. Give another `state_dir`.",
                path,
            )


def _path(folder: str | Path) -> str:
    return str(Path(folder) / STATE_FILE)
