"""Nests of tuples, lists and dictionaries, taken apart into tensors and a plain description, and put together again.

The description is JSON-able, so that a stage can receive what it has never seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor

__all__ = ["Spec", "flatten", "map_tensors", "unflatten"]

Spec: TypeAlias = Any
"""``0`` for a tensor, ``["tuple" | "list", specs]``, ``["dict", keys, specs]``, ``["value", plain]``."""


def flatten(nest: Any) -> tuple[Spec, list[Tensor]]:
    """Return the description of a nest and its tensors in order.

    Raises:
        TypeError: for a leaf that is neither a tensor nor None, a number, a flag or a text.
    """
    tensors: list[Tensor] = []
    return _describe(nest, tensors), tensors


def unflatten(spec: Spec, tensors: Sequence[Tensor]) -> Any:
    """Return the nest that :func:`flatten` described, with these tensors."""
    source = iter(tensors)

    def build(part: Spec) -> Any:
        if part == 0:
            return next(source)
        kind = part[0]
        if kind == "value":
            return part[1]
        if kind == "dict":
            return {key: build(inner) for key, inner in zip(part[1], part[2], strict=True)}
        built = [build(inner) for inner in part[1]]
        return tuple(built) if kind == "tuple" else built

    return build(spec)


def map_tensors(function: Callable[[Tensor], Tensor], nest: Any) -> Any:
    """Return the nest with ``function`` applied to every tensor."""
    spec, tensors = flatten(nest)
    return unflatten(spec, [function(tensor) for tensor in tensors])


def _describe(nest: Any, tensors: list[Tensor]) -> Spec:
    if isinstance(nest, Tensor):
        tensors.append(nest)
        return 0
    if isinstance(nest, (tuple, list)):
        return ["tuple" if isinstance(nest, tuple) else "list", [_describe(inner, tensors) for inner in nest]]
    if isinstance(nest, dict) and all(isinstance(key, str) for key in nest):
        return ["dict", list(nest), [_describe(inner, tensors) for inner in nest.values()]]
    if nest is None or isinstance(nest, (bool, int, float, str)):
        return ["value", nest]
    raise TypeError(
        "Stages pass tensors, None, numbers and texts in tuples, lists and dictionaries with text keys: got "
        f"{type(nest).__name__}. Return tensors from the layers and from the data loader."
    )
