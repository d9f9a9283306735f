"""A rate of its own for each tensor, during an optimizer's ``step`` and at no other time.

    step(closure)   closure: forward ─ backward ─ clip ─▶ [split]   update, tensor by tensor   ─▶ [restore]
    step()                                        ─────▶ [split]   update, tensor by tensor   ─▶ [restore]

The gradients of a step exist only when its closure has run, so that is where the groups are split. Schedulers, monitors and
checkpoints come before or after and see the groups that the user made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["RatedStep", "Scales"]

Scales = Mapping[Tensor, float]
"""Factor of the learning rate, by parameter; parameters that are not in it keep the rate of their group."""

_OURS = ("params", "param_names", "lr", "weight_decay", "foreach")


class RatedStep:
    """Watches one optimizer.

    Args:
        optimizer: with a learning rate ``lr`` in each group.
        scales: asked once a step, when the gradients are there.
        inside: let the rate act inside the momentum: the gradient becomes ``lr * s * (g + weight_decay * w)``, and the step has
            rate 1 and no decay. Only for ``torch.optim.SGD``, where momentum adds up what it is given.
        undecayed: whether a parameter goes without weight decay.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scales: Callable[[Optimizer], Scales],
        inside: bool,
        undecayed: Callable[[Tensor], bool],
    ) -> None:
        self.optimizer = optimizer
        self._scales, self._inside, self._undecayed = scales, inside, undecayed
        self._saved: list[dict[str, Any]] | None = None
        self._gradients: dict[Tensor, Tensor] = {}
        self._closure: Callable[[], Any] | None = None
        self._nested = 0
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def close(self) -> None:
        """Leave the optimizer as it was found."""
        for handle in self._handles:
            handle.remove()
        self.restore()

    def restore(self) -> None:
        """Put the user's groups and gradients back; for a step that ended with an exception."""
        if self._saved is not None:
            self.optimizer.param_groups[:] = self._saved
            self._saved = None
        self._closure, self._nested = None, 0
        for parameter, gradient in self._gradients.items():
            parameter.grad = gradient
        self._gradients = {}

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        given = args[1] if len(args) > 1 else kwargs.get("closure")
        if self._saved is not None if given is None else given is self._closure:
            self._nested += 1  # a subclass's step has called that of its base, and hooks run for both
            return None
        self.restore()
        if given is None:
            self._split()
            return None

        def closure() -> Any:
            loss = given()
            self._split()
            return loss

        self._closure = closure
        if len(args) > 1:
            return (args[0], closure, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure}

    @torch.no_grad()
    def _split(self) -> None:
        if self._saved is not None:
            raise RuntimeError(
                f"`{type(self.optimizer).__name__}` ran its closure twice in one step, and per-tensor rates belong to one "
                "gradient. Leave `LayerwiseRateScaling` out, or use an optimizer that asks for one gradient a step."
            )
        scales = self._scales(self.optimizer)
        groups = self.optimizer.param_groups
        self._saved = list(groups)
        groups[:] = [part for group in groups for part in (self._rated if self._inside else self._parts)(group, scales)]

    def _parts(self, group: dict[str, Any], scales: Scales) -> list[dict[str, Any]]:
        """Return one group a rated tensor, and the rest of the group in at most two."""
        shared = {key: value for key, value in group.items() if key != "param_names"}
        # Multi-tensor kernels have nothing to gather in a group of one tensor, and a price of their own.
        alone = {"foreach": False} if "foreach" in group and group["foreach"] is None else {}
        parts = [
            {**shared, **alone, "params": [parameter], "lr": group["lr"] * scales[parameter]}
            for parameter in group["params"]
            if parameter in scales
        ]
        rest = [parameter for parameter in group["params"] if parameter not in scales]
        undecayed = [parameter for parameter in rest if self._undecayed(parameter)]
        decayed = [parameter for parameter in rest if not self._undecayed(parameter)]
        if decayed or not group["params"]:
            parts.append({**shared, "params": decayed})
        if undecayed:
            parts.append({**shared, "params": undecayed, "weight_decay": 0.0})
        return parts

    def _rated(self, group: dict[str, Any], scales: Scales) -> list[dict[str, Any]]:
        """Return the group with rate 1, and put the rates into its gradients."""
        moving = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in moving:
            gradient = parameter.grad
            decay = 0.0 if self._undecayed(parameter) else group["weight_decay"]
            self._gradients[parameter] = gradient
            decayed = gradient.add(parameter, alpha=decay) if decay else gradient
            parameter.grad = decayed * (group["lr"] * scales.get(parameter, 1.0))
        return [{**group, "lr": 1.0, "weight_decay": 0.0}]

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._nested:
            self._nested -= 1
            return
        if self._saved is not None:
            self._keep_changes(self._saved, self.optimizer.param_groups)
        self.restore()

    def _keep_changes(self, groups: list[dict[str, Any]], parts: list[dict[str, Any]]) -> None:
        """Write what the optimizer noted in its groups (counters, ...) into the user's.

        Raises:
            RuntimeError: if it noted different things for tensors of one group.
        """
        owner = {parameter: group for group in groups for parameter in group["params"]}
        noted: dict[tuple[int, str], Any] = {}
        for part in parts:
            if not part["params"]:
                continue
            group = owner[part["params"][0]]
            for key, value in part.items():
                if key in _OURS or value is group.get(key) or _same(value, group.get(key)):
                    continue
                if not _same(noted.setdefault((id(group), key), value), value):
                    raise RuntimeError(
                        f"`{type(self.optimizer).__name__}` keeps `{key}` for a whole group and computes it from the group's "
                        "tensors, so groups cannot be split. Use an optimizer whose state is by parameter, such as SGD or Adam."
                    )
        for group in groups:
            group.update({key: value for (owned, key), value in noted.items() if owned == id(group)})


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))
    return bool(a == b)
