"""Which layers belong to which stage: given, or balanced by cost and bounded by memory.

Balanced: the cuts of a chain into K blocks whose most expensive block is cheapest, by dynamic programming:

    best[k][j] = min over i < j of  max( best[k-1][i], cost of layers i..j-1 ),    blocks over the memory limit excluded
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_distopt.model_parallel.block import run_layers
from lightning_distopt.model_parallel.structure import flatten, map_tensors

__all__ = ["LayerCost", "Partition", "balance", "costs_by_parameters", "measure", "megabytes"]


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs.

    Attributes:
        name: of the layer.
        parameters: number of its parameters.
        milliseconds: of forward and backward of the example; 0 if not measured.
        output_bytes: of what it gives to the next layer; 0 if not measured.
    """

    name: str
    parameters: int
    milliseconds: float = 0.0
    output_bytes: int = 0


@dataclass(frozen=True)
class Partition:
    """Contiguous blocks of layers, one a stage.

    Args:
        layers: names of all layers in order.
        cuts: index of the first layer of every stage but the first, rising.
        costs: for the table; may be empty.
    """

    layers: tuple[str, ...]
    cuts: tuple[int, ...]
    costs: tuple[LayerCost, ...] = ()

    def __post_init__(self) -> None:
        edges = (0, *self.cuts, len(self.layers))
        if any(not isinstance(c, int) or isinstance(c, bool) for c in self.cuts) or any(
            a >= b for a, b in itertools.pairwise(edges)
        ):
            raise ValueError(
                f"`cuts` must rise and lie between 1 and {len(self.layers) - 1}, so that every stage has a layer of the "
                f"{len(self.layers)}: got {list(self.cuts)}. Write for example {_even(len(self.layers), len(self.cuts) + 1)}."
            )

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.cuts) + 1

    def names(self, stage: int) -> tuple[str, ...]:
        """Return the names of a stage's layers."""
        edges = (0, *self.cuts, len(self.layers))
        return self.layers[edges[stage] : edges[stage + 1]]

    def table(self) -> str:
        """Show stages, layers, parameters, milliseconds and bytes to the next stage."""
        by_name = {cost.name: cost for cost in self.costs}
        rows = [("stage", "layers", "parameters", "ms", "bytes to next")]
        for stage in range(self.stages):
            names = self.names(stage)
            mine = [by_name[name] for name in names if name in by_name]
            shown = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"
            ms, out = sum(c.milliseconds for c in mine), mine[-1].output_bytes if mine else 0
            rows.append(
                (
                    str(stage),
                    shown,
                    f"{sum(c.parameters for c in mine):,}",
                    f"{ms:.2f}" if ms else "-",
                    f"{out:,}" if out and stage < self.stages - 1 else "-",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def balance(
    costs: Sequence[float], stages: int, memory: Sequence[float] | None = None, limit: float | None = None
) -> tuple[int, ...]:
    """Return the cuts whose most expensive block is cheapest; of several, the first found from the left.

    Args:
        costs: of each layer, >= 0.
        stages: number of blocks, from 1 to the number of layers.
        memory: of each layer, in megabytes; checked against ``limit``.
        limit: most memory of one block.

    Raises:
        ValueError: if there are more stages than layers, or no partition stays below the limit.
    """
    n = len(costs)
    if not 1 <= stages <= n:
        raise ValueError(
            f"`stages` must be from 1 to the number of layers: got {stages} for {n} layers. Use at most {n} stages, or split "
            "`self.layers` finer."
        )
    sums, held = [0.0], [0.0]
    for index, cost in enumerate(costs):
        sums.append(sums[-1] + float(cost))
        held.append(held[-1] + (float(memory[index]) if memory is not None else 0.0))
    infinite = float("inf")
    best = [[infinite] * (n + 1) for _ in range(stages + 1)]
    cut = [[0] * (n + 1) for _ in range(stages + 1)]
    best[0][0] = 0.0
    for k in range(1, stages + 1):
        for j in range(k, n - (stages - k) + 1):
            for i in range(k - 1, j):
                if limit is not None and held[j] - held[i] > limit:
                    continue
                worst = max(best[k - 1][i], sums[j] - sums[i])
                if worst < best[k][j]:
                    best[k][j], cut[k][j] = worst, i
    if best[stages][n] == infinite:
        raise ValueError(
            f"`memory_limit_mb` leaves no partition of {n} layers into {stages} stages: got {limit:g}, and the largest layer "
            f"takes {max(memory or [0]):.3g}. Raise the limit or use more stages."
        )
    cuts, j = [], n
    for k in range(stages, 1, -1):
        j = cut[k][j]
        cuts.append(j)
    return tuple(reversed(cuts))


def megabytes(layers: Mapping[str, nn.Module]) -> list[float]:
    """Return the size of each layer's parameters, in units of 2**20 bytes."""
    return [sum(p.nbytes for p in layer.parameters()) / 2**20 for layer in layers.values()]


def costs_by_parameters(layers: Mapping[str, nn.Module]) -> tuple[LayerCost, ...]:
    """Return the costs that need no run."""
    return tuple(LayerCost(name, sum(p.numel() for p in layer.parameters())) for name, layer in layers.items())


def measure(
    layers: Mapping[str, nn.Module], example: Any, repeats: int = 3, device: torch.device | None = None
) -> tuple[LayerCost, ...]:
    """Run each layer forward and backward on an example; return the least of the times taken.

    Gradients, buffers and random numbers are left as they were. On another device there is one layer at a time.

    Args:
        layers: by name, in order.
        example: the input of the first one, on any device.
        repeats: runs a layer, after one to warm up.
        device: where they are to run; where they are if ``None``.

    Raises:
        ValueError: if the example does not pass through a layer.
    """
    buffers = {name: [b.clone() for b in layer.buffers()] for name, layer in layers.items()}
    found: list[LayerCost] = []
    with torch.random.fork_rng([device] if device is not None and device.type == "cuda" else []):
        x = example
        for name, layer in layers.items():
            try:
                x, cost = _cost(name, layer, x, repeats, device)
            except Exception as error:
                raise ValueError(
                    f"`example_input_array` must pass through all layers: got {type(error).__name__} in layer {name!r}: {error}. "
                    "Give a batch as the model gets it, or use `balance='parameters'`."
                ) from error
            found.append(cost)
    for name, layer in layers.items():
        for buffer, before in zip(layer.buffers(), buffers[name], strict=True):
            buffer.copy_(before)
    return tuple(found)


def _cost(name: str, layer: nn.Module, x: Any, repeats: int, device: torch.device | None) -> tuple[Any, LayerCost]:
    home = next((t.device for t in (*layer.parameters(), *layer.buffers())), None)
    if device is not None:
        layer.to(device)
        x = map_tensors(lambda t: t.to(device), x)
    try:
        seconds = [_time(name, layer, x) for _ in range(repeats + 1)][1:]
        with torch.no_grad():
            y, _ = run_layers({name: layer}, x, {})
    finally:
        if home is not None:
            layer.to(home)
    nbytes = sum(t.nbytes for t in flatten(y)[1])
    return y, LayerCost(name, sum(p.numel() for p in layer.parameters()), 1e3 * min(seconds), nbytes)


def _time(name: str, layer: nn.Module, x: Any) -> float:
    x = map_tensors(lambda t: t.detach().requires_grad_(t.is_floating_point()), x)
    _finish(x)
    begin = time.perf_counter()
    with torch.enable_grad():
        y, _ = run_layers({name: layer}, x, {})
    outputs = [t for t in flatten(y)[1] if t.requires_grad]
    inputs = [t for t in flatten(x)[1] if t.requires_grad] + [p for p in layer.parameters() if p.requires_grad]
    if outputs and inputs:
        torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs], allow_unused=True)
    _finish(y)
    return time.perf_counter() - begin


def _finish(nest: Any) -> None:
    """Wait for what a GPU was told to do."""
    for device in {t.device for t in flatten(nest)[1] if t.device.type == "cuda"}:
        torch.cuda.synchronize(device)


def _even(layers: int, stages: int) -> list[int]:
    return [layers * k // stages for k in range(1, stages)]
