"""A block is the layers of one stage, run in order under the names that they have in the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

from torch import Tensor, nn

from lightning_distopt.model_parallel.structure import map_tensors

__all__ = ["Block", "StatefulLayer", "States", "as_block", "is_stateful", "run_layers"]

States: TypeAlias = dict[str, Any]
"""The state of each stateful layer by name: nests of tensors without graph."""


@runtime_checkable
class StatefulLayer(Protocol):
    """A layer with a memory from batch to batch: ``forward(x, state) -> (y, new_state)``.

    The state is a nest of tensors. It is stored with the input that it belongs to, so that a second forward sees what the
    first one saw; no gradient flows into it. It must not be changed in place.
    """

    def initial_state(self, x: Any) -> Any:
        """Return the state before the first batch, whose input is ``x``."""


def is_stateful(layer: nn.Module) -> bool:
    """Whether the layer is a :class:`StatefulLayer`; asked for every layer and batch, where ``isinstance`` would be slow."""
    return hasattr(type(layer), "initial_state")


def run_layers(layers: Mapping[str, nn.Module], x: Any, states: States) -> tuple[Any, States]:
    """Return what the layers make of ``x``, one after the other, and their new states.

    As in ``nn.Sequential`` a layer takes what the one before returns as its one argument, be it a tensor or a tuple.
    """
    new: States = {}
    for name, layer in layers.items():
        if is_stateful(layer):
            state = states[name] if name in states else cast(StatefulLayer, layer).initial_state(x)
            x, after = layer(x, state)
            new[name] = map_tensors(Tensor.detach, after)
        else:
            x = layer(x)
    return x, new


class Block(nn.Module):
    """The layers of a stage; the last stage also owns the loss, where that is a module.

    Args:
        layers: by name, in order. Parameters are called ``layers.<name>...``, as in the whole model.
        loss: a loss that is a module, or ``None``.
    """

    def __init__(self, layers: Mapping[str, nn.Module], loss: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        if loss is not None:
            self.loss = loss

    def forward(self, x: Any, states: States | None = None) -> tuple[Any, States]:
        """Return the output and the new states of the stateful layers."""
        return run_layers(dict(self.layers.items()), x, states or {})


def as_block(module: nn.Module, name: str = "0", loss: nn.Module | None = None) -> Block:
    """Return a module as a block: the layers of an ``nn.Sequential`` one by one, anything else as one layer called ``name``."""
    layers = dict(module.named_children()) if isinstance(module, nn.Sequential) else {name: module}
    return Block(layers, loss)
