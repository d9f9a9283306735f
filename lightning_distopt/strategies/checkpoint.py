"""Sidecars: one file a rank, beside the ordinary Lightning checkpoint, for what differs between ranks.

    epoch=3.ckpt                     the common model, rank 0's optimizer, the save id: loads anywhere
    epoch=3.ckpt.ranks/<save id>/0.pt   residuals, local optimizer state, server shards, random states of rank 0
    epoch=3.ckpt.ranks/<save id>/1.pt   ... of rank 1

A save that replaces a checkpoint writes its sidecars beside the old ones, then replaces the checkpoint, then removes the
old ones: at every moment the checkpoint that is there has all of its own. Files hold tensors and plain values only and
are loaded with ``weights_only=True``; each appears atomically or not at all. Paths may be remote, as far as fsspec knows
them.
"""

from __future__ import annotations

import io
import os
from contextlib import suppress
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_distopt.strategies.files import save_atomically

__all__ = ["forget_other_saves", "forget_save", "read_sidecar", "remove_sidecars", "saves_of", "write_sidecar"]


def _folder(checkpoint: str, follow: bool = True) -> str:
    # ModelCheckpoint(save_last="link") makes a symbolic link; the sidecars lie beside the file that it points to. A save
    # replaces the link itself, and must leave that file's sidecars alone.
    if follow and os.path.islink(checkpoint):
        checkpoint = os.path.realpath(checkpoint)
    return checkpoint.rstrip("/") + ".ranks"


def write_sidecar(checkpoint: str, save_id: str, rank: int, content: dict[str, Any]) -> None:
    """Write ``content`` (tensors and plain values) as the sidecar of ``rank``: first under another name, then renamed.

    Raises:
        CheckpointError: naming the path, if it cannot be written.
    """
    save_atomically(content, f"{_folder(checkpoint, follow=False)}/{save_id}/{rank}.pt")


def read_sidecar(checkpoint: str, save_id: str, rank: int) -> dict[str, Any]:
    """Return the content of a sidecar on the CPU.

    Raises:
        FileNotFoundError: if there is none.
        Exception: whatever reading a damaged file raises.
    """
    path = f"{_folder(checkpoint)}/{save_id}/{rank}.pt"
    with get_filesystem(path).open(path, "rb") as file:
        data = io.BytesIO(file.read())
    content = torch.load(data, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise TypeError(f"`{path}` must hold a dictionary: got {type(content).__name__}.")
    return content


def saves_of(checkpoint: str) -> dict[str, set[int]]:
    """Return the ranks whose sidecars lie beside a checkpoint, by save id; files that are not whole do not count."""
    folder = _folder(checkpoint)
    filesystem = get_filesystem(folder)
    found: dict[str, set[int]] = {}
    with suppress(FileNotFoundError, NotADirectoryError):
        for save in filesystem.ls(folder, detail=False):
            with suppress(FileNotFoundError, NotADirectoryError):
                names = [str(file).rsplit("/", 1)[-1] for file in filesystem.ls(save, detail=False)]
                ranks = {int(name[:-3]) for name in names if name.endswith(".pt") and name[:-3].isdecimal()}
                if ranks:
                    found[str(save).rstrip("/").rsplit("/", 1)[-1]] = ranks
    return found


def forget_save(checkpoint: str, save_id: str) -> None:
    """Delete the sidecars of a save that did not become a checkpoint."""
    folder = _folder(checkpoint, follow=False)
    filesystem = get_filesystem(folder)
    with suppress(OSError):
        filesystem.rm(f"{folder}/{save_id}", recursive=True)
    with suppress(OSError):
        filesystem.rmdir(folder)  # if it was the first


def forget_other_saves(checkpoint: str, *keep: str) -> None:
    """Delete the sidecars of all saves of a checkpoint but these."""
    folder = _folder(checkpoint, follow=False)
    filesystem = get_filesystem(folder)
    with suppress(FileNotFoundError, NotADirectoryError):
        for save in [str(save).rstrip("/") for save in filesystem.ls(folder, detail=False)]:
            if save.rsplit("/", 1)[-1] not in keep:
                filesystem.rm(save, recursive=True)


def remove_sidecars(checkpoint: str) -> None:
    """Delete the sidecars of a checkpoint, if it has any."""
    folder = _folder(checkpoint)
    filesystem = get_filesystem(folder)
    if filesystem.exists(folder):
        filesystem.rm(folder, recursive=True)
