"""Which checkpoints of a folder are whole: the file loads, and every rank's sidecar of its save is there."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_distopt.errors import CheckpointError
from lightning_distopt.strategies.checkpoint import saves_of
from lightning_distopt.strategies.files import is_local
from lightning_distopt.strategies.header import read_header

__all__ = ["is_whole", "newest_whole_checkpoint", "read_safely"]


def newest_whole_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """Return the path of the newest checkpoint of a folder that an exact continuation can start from.

    Args:
        folder: where ``ModelCheckpoint`` saves, local or any that fsspec knows; its sub-folders are not looked at.

    Returns:
        The path of the file ``*.ckpt`` that was saved last and is whole; ``None`` if there is none.
    """
    root = os.fspath(folder)
    if is_local(root):
        files = [path for path in Path(root).glob("*.ckpt") if path.exists()]
        names = [str(path) for path in sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True)]
    else:
        filesystem = get_filesystem(root)
        listed = [f for f in filesystem.ls(root, detail=False) if str(f).endswith(".ckpt")]
        listed.sort(key=filesystem.modified, reverse=True)
        names = [filesystem.unstrip_protocol(name) for name in listed]
    return next((name for name in names if is_whole(name)), None)


def is_whole(path: str) -> bool:
    """Whether a checkpoint can be read and has the sidecars of all ranks that saved it, if it should have any."""
    try:
        header = read_header(_load(path), path)
    except Exception:  # a damaged file raises what it will
        return False
    if header is None:
        return True
    return saves_of(path).get(header.save_id, set()) >= set(range(header.world_size))


def read_safely(path: str, load: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what ``load`` returns.

    Args:
        path: of the checkpoint.
        load: reads it, with ``weights_only=True``.

    Raises:
        CheckpointError: for a file that cannot be read so; it names the newest one of the folder that can.
    """
    try:
        return load()
    except (FileNotFoundError, IsADirectoryError):
        raise
    except Exception as error:  # a damaged file raises what it will
        newest = newest_whole_checkpoint(os.path.dirname(path) or ".")
        cure = f"Resume from `{newest}`, the newest whole checkpoint there" if newest else "Choose another checkpoint"
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"`{path}` cannot be read safely ({reason}). {cure}.", path) from error


def _load(path: str) -> Any:
    """Read a checkpoint, its tensors only when they are looked at where that is possible."""
    if is_local(path):
        with suppress(RuntimeError):  # an old format cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    with get_filesystem(path).open(path, "rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)
