"""What a checkpoint says about the files beside it, and what such a file must look like before anything of it is used.

Class names in files are words: nothing here, or elsewhere in this package, imports what a file names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from lightning_distopt.errors import CheckpointError
from lightning_distopt.strategies.random_states import check_random_states

__all__ = ["KEY", "Header", "check_engine", "check_sidecar", "read_header"]

KEY = "lightning_distopt"
_FORMAT = 2
_MOST_RANKS = 1 << 16
_SAVE_ID = re.compile(r"[A-Za-z0-9_-]{1,200}")  # it is a folder's name, so nothing in it may lead elsewhere
_FEEDBACK = ("step_ahead", "local", "gradient", "none")


@dataclass(frozen=True)
class Header:
    """Describes one save.

    Args:
        world_size: ranks that saved.
        algorithm: the strategy's name.
        error_feedback: the unit of the residuals.
        save_id: in every file of this save, and in no other.
        inside_epoch: batches of the epoch were left.
        shared: engine state that is the same on all ranks.
        decision: what ``compressed_ddp_auto`` has chosen, as numbers and strings.
        format: of the sidecars.
    """

    world_size: int
    algorithm: str
    error_feedback: str
    save_id: str
    inside_epoch: bool
    shared: dict[str, Any]
    decision: dict[str, Any] | None = None
    format: int = _FORMAT

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for a file."""
        return {**asdict(self), "shared": self.shared}


def read_header(checkpoint: Mapping[str, Any], path: str) -> Header | None:
    """Return the header of a loaded checkpoint; ``None`` if it was not written by a strategy of this package.

    Raises:
        CheckpointError: if there is one that no version wrote, or a later version did.
    """
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(
            f"`{path}` is no Lightning checkpoint: it holds a {type(checkpoint).__name__} instead of a dictionary. Choose "
            "another file.",
            path,
        )
    values = checkpoint.get(KEY)
    if values is None:
        return None
    try:
        header = _checked(values)
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"`{path}` holds an entry `{KEY}` that this version cannot use: {error}. Choose another checkpoint, or update "
            "the package if a later version wrote it.",
            path,
        ) from None
    return header


def _checked(values: Any) -> Header:
    if not isinstance(values, dict):
        raise TypeError(f"it is a {type(values).__name__}, not a dictionary")
    if values.get("format") != _FORMAT:
        raise ValueError(f"its format is {values.get('format')!r}, and {_FORMAT} is known")
    types = {
        "world_size": int,
        "algorithm": str,
        "error_feedback": str,
        "save_id": str,
        "inside_epoch": bool,
        "shared": dict,
    }
    for name, kind in types.items():
        if type(values.get(name)) is not kind:
            raise TypeError(f"its `{name}` is {_shown(values.get(name))}, not {kind.__name__}")
    if not 1 <= values["world_size"] <= _MOST_RANKS:
        raise ValueError(f"its `world_size` is {values['world_size']}, outside of [1, {_MOST_RANKS}]")
    if values["error_feedback"] not in _FEEDBACK:
        raise ValueError(f"its `error_feedback` is {_shown(values['error_feedback'])}, none of {_FEEDBACK}")
    if not _SAVE_ID.fullmatch(values["save_id"]):
        raise ValueError(f"its `save_id` is {_shown(values['save_id'])}, not letters, digits, '-' and '_'")
    shared = values["shared"]
    check_engine({k: v for k, v in shared.items() if k in ("rounds", "rates", "mean", "outer", "flight")})
    decision = values.get("decision")
    if decision is not None and not (
        isinstance(decision, dict) and all(type(value) in (str, int, float) for value in decision.values())
    ):
        raise TypeError(f"its `decision` is {_shown(decision)}, not numbers and strings by name")
    return Header(**{name: values[name] for name in types}, decision=decision)


def check_sidecar(content: Mapping[str, Any], save_id: str, rank: int) -> None:
    """Raise unless a loaded sidecar is that of this rank and save, and every part of it can be used.

    Raises:
        LookupError: if it is of another save: the checkpoint and the file do not belong together.
        TypeError: for a part of another kind than it must be.
        ValueError: for a part of another value.
    """
    if content.get("save_id") != save_id:
        raise LookupError("it belongs to another save")
    if type(content.get("rank")) is not int or content["rank"] != rank:
        raise ValueError(f"it is that of rank {_shown(content.get('rank'))}")
    for name, kind in (("state", dict), ("optimizers", list), ("random", dict), ("loaders", list)):
        if not isinstance(content.get(name), kind):
            raise TypeError(f"its `{name}` is {_shown(content.get(name))}, not a {kind.__name__}")
    check_engine(content["state"])
    for optimizer in content["optimizers"]:
        if not isinstance(optimizer, dict) or not {"state", "param_groups"} <= optimizer.keys():
            raise TypeError("an entry of its `optimizers` is not an optimizer's state")
    check_random_states(content["random"])


def check_engine(state: Mapping[str, Any]) -> None:
    """Check the parts of an engine's state that are used by name; what nobody reads may be anything."""
    for key, value in _items(state, "buffers"):
        if not isinstance(value, Tensor) or value.is_sparse:
            raise TypeError(f"`buffers` of {_shown(key)} is {_shown(value)}, not a dense tensor")
    for key, memory in _items(state, "outer"):
        if not isinstance(memory, dict) or not all(isinstance(v, (Tensor, int, float)) for v in memory.values()):
            raise TypeError(f"`outer` of {_shown(key)} is {_shown(memory)}, not tensors and numbers by name")
        if not all(bool(v.isfinite().all()) for v in memory.values() if isinstance(v, Tensor)):
            raise ValueError(f"`outer` of {_shown(key)} holds a NaN or an infinity")
    for name in ("residuals", "server", "local", "flight"):
        for key, value in _items(state, name):
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_sparse:
                raise TypeError(f"`{name}` of {_shown(key)} is {_shown(value)}, not a dense tensor of floats")
            if not bool(value.isfinite().all()):
                raise ValueError(f"`{name}` of {_shown(key)} holds a NaN or an infinity")
    for key, pieces in _items(state, "shards"):
        for piece in _listed(pieces, f"`shards` of {_shown(key)}"):
            values = piece.get("values") if isinstance(piece, dict) else None
            start = piece.get("start") if isinstance(piece, dict) else None
            if not isinstance(values, Tensor) or values.dim() != 1 or not values.is_floating_point():
                raise TypeError(f"a piece of `shards` of {_shown(key)} has no 1-D tensor of floats")
            if type(start) is not int or start < 0:
                raise ValueError(f"a piece of `shards` of {_shown(key)} starts at {_shown(start)}")
    for key, counters in _items(state, "groups"):
        known = ("rounds", "local_steps", "begun")
        if not isinstance(counters, dict) or any(
            type(counters.get(n)) not in (int, bool) or counters[n] < 0 for n in known
        ):
            raise TypeError(f"`groups` of {_shown(key)} is {_shown(counters)}, not counters")
    for key, rate in _items(state, "rates"):
        if type(rate) not in (int, float):
            raise TypeError(f"`rates` of {_shown(key)} is {_shown(rate)}, not a number")
    if type(state.get("rounds", 0)) is not int or state.get("rounds", 0) < 0:
        raise TypeError(f"`rounds` is {_shown(state['rounds'])}, not a counter")
    mean = state.get("mean", {})
    for key, value in _items(mean, "queries") if isinstance(mean, dict) else [("mean", None)]:
        if not isinstance(value, Tensor) or value.dim() != 2 or not value.is_floating_point():
            raise TypeError(f"`mean` of {_shown(key)} is {_shown(value)}, not a matrix of floats")


def _items(state: Mapping[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    values = state.get(name, {})
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise TypeError(f"`{name}` is {_shown(values)}, not a dictionary by name")
    yield from values.items()


def _listed(values: Any, what: str) -> list[Any]:
    if not isinstance(values, list):
        raise TypeError(f"{what} is {_shown(values)}, not a list")
    return values


def _shown(value: Any) -> str:
    """A value from a file, short enough for a message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
