"""Every name of Flower that is not in its public API; each has a test."""

from __future__ import annotations

__all__ = ["identify_process", "label"]


def identify_process(run_id: int = 1, node_id: int = 1) -> None:
    """Say which run this process serves, which ``Message`` (flwr 1.41) asks for outside of Flower's own processes."""
    from flwr.supercore.task_identity import TaskIdentity

    if getattr(TaskIdentity, "_run_id", None) is None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, node_id


def label(message: object, message_id: str) -> None:
    """Give a message the id by which its reply is found; Flower's own grids write it the same way."""
    message.metadata.__dict__["_message_id"] = message_id  # type: ignore[attr-defined]
