"""Files that appear whole or not at all, on the local disk or wherever fsspec reaches."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_distopt.errors import CheckpointError

__all__ = ["is_local", "save_atomically", "sync_folder"]


def is_local(path: str) -> bool:
    """Whether a path is one of this machine's file system."""
    return "://" not in path or path.startswith(("file://", "local://"))


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
