"""Files that appear whole or not at all, on the local disk or wherever fsspec reaches."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_distopt.errors import CheckpointError

__all__ = ["can_replace", "is_local", "save_atomically", "save_checkpoint", "sync_folder"]


def is_local(path: str) -> bool:
    """Whether a path is one of this machine's file system."""
    return "://" not in path or path.startswith(("file://", "local://"))


def can_replace(path: str, plugin: Any) -> bool:
    """Whether a checkpoint is written here, by one move, and not by a plugin; Lightning's own goes through another disk."""
    return type(plugin) is TorchCheckpointIO and is_local(path) and not os.path.isdir(path)


def save_checkpoint(content: Any, path: str, plugin: Any, write: Callable[[], None]) -> None:
    """Write a checkpoint to ``path``: whole or not at all, where :func:`can_replace`.

    Args:
        content: of the checkpoint.
        path: where.
        plugin: the ``CheckpointIO`` of the strategy.
        write: writes it by that plugin.

    Raises:
        CheckpointError: naming the path, if it cannot be written.
    """
    if can_replace(path, plugin):
        save_atomically(content, path)
        return
    try:
        write()
    except OSError as error:
        raise CheckpointError(f"`{path}` could not be written: {error}.", path) from error


def save_atomically(content: Any, path: str) -> None:
    """Write ``torch.save(content)`` to ``path``, which holds what it held before until all of the new is on the disk.

    Args:
        content: tensors and plain values.
        path: where; its folder is made.

    Raises:
        CheckpointError: naming the path, if it cannot be written; nothing is left of the attempt.
    """
    data = io.BytesIO()  # a writer that fails half-way inside of torch would report less than the file system does
    torch.save(content, data)
    part = f"{path}.part"
    try:
        if is_local(path):
            _write_local(data, path, part)
        else:
            _write_remote(data, path, part)
    except OSError as error:
        with suppress(Exception):
            get_filesystem(part).rm(part)
        raise CheckpointError(
            f"`{path}` could not be written: {error.strerror or error}. What was saved before is as it was, and so is the "
            "state of the training. Make room, or choose a folder that can be written (`ModelCheckpoint(dirpath=...)`).",
            path,
        ) from error


def _write_local(data: io.BytesIO, path: str, part: str) -> None:
    path, part = (name.removeprefix("file://").removeprefix("local://") for name in (path, part))
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(part, "wb") as file:
        file.write(data.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(os.path.dirname(path) or ".")


def _write_remote(data: io.BytesIO, path: str, part: str) -> None:
    filesystem = get_filesystem(path)
    filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    with filesystem.open(part, "wb") as file:
        file.write(data.getbuffer())
    filesystem.mv(part, path)


def sync_folder(folder: str) -> None:
    """Let a new name in a local folder survive a power cut, where the system knows how."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
