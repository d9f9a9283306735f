"""Sidecars: one file a rank, beside the ordinary Lightning checkpoint, for what differs between ranks.

    epoch=3.ckpt             the common model, rank 0's optimizer: loads anywhere
    epoch=3.ckpt.ranks/0.pt  residuals, local optimizer state, server shards, random states of rank 0
    epoch=3.ckpt.ranks/1.pt  ... of rank 1

Files hold tensors and plain values only and are loaded with ``weights_only=True``; each appears atomically or not at all.
Paths may be remote, as far as fsspec knows them.
"""

from __future__ import annotations

import io
import os
import random
import sys
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem

__all__ = ["collect_random_states", "read_sidecar", "remove_sidecars", "restore_random_states", "write_sidecar"]


def _folder(checkpoint: str) -> str:
    # ModelCheckpoint(save_last="link") makes a symbolic link; the sidecars lie beside the file that it points to.
    if os.path.islink(checkpoint):
        checkpoint = os.path.realpath(checkpoint)
    return checkpoint.rstrip("/") + ".ranks"


def write_sidecar(checkpoint: str, rank: int, content: dict[str, Any]) -> None:
    """Write ``content`` (tensors and plain values) as the sidecar of ``rank``: first under another name, then renamed."""
    folder = _folder(checkpoint)
    filesystem = get_filesystem(folder)
    filesystem.makedirs(folder, exist_ok=True)
    path = f"{folder}/{rank}.pt"
    data = io.BytesIO()
    torch.save(content, data)
    temporary = f"{path}.part"
    with filesystem.open(temporary, "wb") as file:
        file.write(data.getbuffer())
    filesystem.mv(temporary, path)


def read_sidecar(checkpoint: str, rank: int) -> dict[str, Any]:
    """Return the content of a sidecar on the CPU.

    Raises:
        FileNotFoundError: if there is none.
        Exception: whatever reading a damaged file raises.
    """
    path = f"{_folder(checkpoint)}/{rank}.pt"
    with get_filesystem(path).open(path, "rb") as file:
        data = io.BytesIO(file.read())
    content = torch.load(data, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise TypeError(f"`{path}` must hold a dictionary: got {type(content).__name__}.")
    return content


def remove_sidecars(checkpoint: str) -> None:
    """Delete the sidecars of a checkpoint, if it has any."""
    folder = _folder(checkpoint)
    filesystem = get_filesystem(folder)
    if filesystem.exists(folder):
        filesystem.rm(folder, recursive=True)


def collect_random_states() -> dict[str, Any]:
    """Return the states of torch's, Python's and NumPy's global generators of this process, as tensors and plain values."""
    version, internal, gauss = random.getstate()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "internal": list(internal), "gauss": gauss},
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    if "numpy" in sys.modules:
        name, keys, position, has_gauss, cached = sys.modules["numpy"].random.get_state(legacy=True)
        states["numpy"] = {
            "name": str(name),
            "keys": torch.tensor(keys.astype("int64")),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        }
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Set the global generators to collected states; those that were not collected stay."""
    torch.set_rng_state(states["torch"])
    python = states["python"]
    random.setstate((python["version"], tuple(python["internal"]), python["gauss"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if "numpy" in states and "numpy" in sys.modules:
        numpy, saved = sys.modules["numpy"], states["numpy"]
        keys = saved["keys"].numpy().astype("uint32")
        numpy.random.set_state((saved["name"], keys, saved["position"], saved["has_gauss"], saved["cached"]))
