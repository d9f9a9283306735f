"""Moving parameters layer by layer while a model runs, so that one layer is kept aside instead of a copy of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_distopt.zeroth_order.asking import Layout

__all__ = ["LayerwiseMove"]


class LayerwiseMove:
    """Forward hooks that move the parameters of a layer before it runs and put them back, bit for bit, afterwards.

    A parameter that is used while no module that owns it runs (read by other code, or of a layer whose ``forward`` is
    bypassed) is "outside": it must be moved for the whole time by whoever asks. Which ones these are is seen in the first
    run, so the first query of all must be a plain one.

    Args:
        module: whose layers run inside of a query.
        layout: of the parameters to be moved.
    """

    def __init__(self, module: nn.Module, layout: Layout) -> None:
        places = dict(layout)
        self._owners: dict[nn.Module, list[tuple[nn.Parameter, int]]] = {}
        for owner in module.modules():
            own = [(p, places[p]) for p in owner.parameters(recurse=False) if p in places]
            if own:
                self._owners[owner] = own
        self._move: Callable[[nn.Parameter, int], None] | None = None
        self._depth: dict[nn.Parameter, int] = {}
        self._aside: dict[nn.Parameter, Tensor] = {}
        self._seen: set[nn.Parameter] = set()

    def is_outside(self, parameter: nn.Parameter) -> bool:
        """Whether no module that owns the parameter has run so far."""
        return parameter not in self._seen

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Keep the hooks attached, also for queries that move nothing: some layers run otherwise with hooks on them."""
        handles: list[Any] = []
        for owner in self._owners:
            handles.append(owner.register_forward_pre_hook(self._before, prepend=True))
            handles.append(owner.register_forward_hook(self._after, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def moving(self, move: Callable[[nn.Parameter, int], None]) -> Iterator[None]:
        """Apply ``move(parameter, offset)`` to every parameter while its layer runs."""
        self._move = move
        try:
            yield
        finally:
            self._move = None
            for parameter, before in self._aside.items():  # a layer that never came to its end
                parameter.copy_(before)
            self._aside.clear()
            self._depth.clear()

    def _before(self, owner: nn.Module, args: Any) -> None:
        for parameter, offset in self._owners[owner]:
            self._seen.add(parameter)
            depth = self._depth[parameter] = self._depth.get(parameter, 0) + 1
            if depth == 1 and self._move is not None:
                self._aside[parameter] = parameter.detach().clone()
                self._move(parameter, offset)

    def _after(self, owner: nn.Module, args: Any, output: Any) -> None:
        for parameter, _ in self._owners[owner]:
            self._depth[parameter] = self._depth.get(parameter, 1) - 1
            if self._depth[parameter] == 0 and parameter in self._aside:
                parameter.copy_(self._aside.pop(parameter))
