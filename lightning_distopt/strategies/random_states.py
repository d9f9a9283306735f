"""The states of all global random generators of a process, as tensors and plain values."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["check_random_states", "collect_random_states", "restore_random_states"]


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


def restore_random_states(states: Mapping[str, Any]) -> None:
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


def check_random_states(states: Any) -> None:
    """Raise whatever is wrong with states that :func:`restore_random_states` is to take, without changing a generator."""
    torch.Generator().set_state(states["torch"])
    python = states["python"]
    random.Random().setstate((python["version"], tuple(python["internal"]), python["gauss"]))
    if "cuda" in states and not isinstance(states["cuda"], torch.Tensor):
        raise TypeError(f"CUDA's random state must be a tensor: got {type(states['cuda']).__name__}")
    if "numpy" in states and "numpy" in sys.modules:
        numpy, saved = sys.modules["numpy"], states["numpy"]
        keys = saved["keys"].numpy().astype("uint32")
        generator = numpy.random.RandomState(0)
        generator.set_state((saved["name"], keys, saved["position"], saved["has_gauss"], saved["cached"]))
