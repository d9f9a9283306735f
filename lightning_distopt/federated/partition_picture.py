"""A picture of who has what: one bar a client, one colour a class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["class_counts", "draw_partitions"]


def class_counts(parts: Sequence[NDArray[np.int64]], labels: Sequence[int] | NDArray[Any]) -> NDArray[np.int64]:
    """Return how many samples of each class each client holds, shape ``(clients, classes)``."""
    classes, codes = np.unique(np.asarray(labels), return_inverse=True)
    return np.stack([np.bincount(codes[part], minlength=len(classes)) for part in parts])


def draw_partitions(
    parts: Sequence[NDArray[np.int64]], labels: Sequence[int] | NDArray[Any], path: str | Path, title: str = ""
) -> None:
    """Write a picture of the samples of each client by class.

    Args:
        parts: index arrays, as the functions of :mod:`lightning_distopt.federated.partitions` return them.
        labels: class of each sample of the whole data set.
        path: of the picture; its folder is made.
        title: above it.

    Raises:
        ModuleNotFoundError: without matplotlib (extra ``recipes``).
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    counts, classes = class_counts(parts, labels), np.unique(np.asarray(labels))
    figure = Figure(figsize=(max(5.0, min(14.0, 0.3 * len(parts) + 3)), 3.6), layout="constrained", dpi=150)
    axes = figure.subplots()
    colours = colormaps["tab10" if len(classes) <= 10 else "viridis"].resampled(len(classes))
    base = np.zeros(len(parts), dtype=np.int64)
    for number, label in enumerate(classes):
        axes.bar(range(len(parts)), counts[:, number], bottom=base, color=colours(number), label=str(label), width=0.85)
        base += counts[:, number]
    axes.set(xlabel="client", ylabel="samples", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    if len(classes) <= 20:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", title="class", frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
