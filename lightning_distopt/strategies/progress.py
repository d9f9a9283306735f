"""How far a run has come, and where its loaders are, in a checkpoint of Lightning's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_distopt.resumable_loader import ResumableLoader

__all__ = ["end_unless_inside", "epochs_over", "is_inside_epoch", "places_of", "with_places"]


def is_inside_epoch(checkpoint: Mapping[str, Any]) -> bool:
    """Whether batches of the epoch were left when it was saved."""
    epoch = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    return bool(epoch.get("current", {}).get("ready", 0)) and not epoch.get("is_last_batch", True)


def epochs_over(checkpoint: Mapping[str, Any]) -> int:
    """Return how many epochs had been trained to their end."""
    begun = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {}).get("current", {}).get("ready", 0)
    return int(begun) - is_inside_epoch(checkpoint)


def places_of(checkpoint: Mapping[str, Any]) -> list[Any]:
    """Return the places of this rank's loaders in a checkpoint; the list itself, if there is one."""
    loop = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
    found = loop.get("combined_loader", [])
    return found if isinstance(found, list) else []


def end_unless_inside(checkpoint: Mapping[str, Any]) -> None:
    """Let the next epoch begin at the first batch where no batch of this one is left, also if it was cut short."""
    if not is_inside_epoch(checkpoint):
        places = places_of(checkpoint)
        places[:] = [ResumableLoader.at_end(place) for place in places]


def with_places(checkpoint: dict[str, Any], places: list[Any]) -> dict[str, Any]:
    """Return a checkpoint with these places, if it has any."""
    if not places_of(checkpoint):
        return checkpoint
    loops = checkpoint["loops"]
    loop = loops["fit_loop"]
    state = {**loop["state_dict"], "combined_loader": places}
    return {**checkpoint, "loops": {**loops, "fit_loop": {**loop, "state_dict": state}}}
