"""Ouroboros: a stale pipeline that bites its tail: the first and the last stage are on one device, and share what is tied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import nn

from lightning_distopt.model_parallel.ends import Head, authors_split, balance_ends
from lightning_distopt.model_parallel.layered import LayeredModule, loss_of
from lightning_distopt.model_parallel.partition import LayerCost, costs_by_parameters, megabytes
from lightning_distopt.model_parallel.staleness import BackwardWeights, Keep, TiedGrad, Timetable
from lightning_distopt.strategies.checks import choice, flag
from lightning_distopt.strategies.stale_pipeline import StalePipelineStrategy

__all__ = ["OuroborosStrategy", "Split"]

Split = Literal["balanced", "authors"]


class OuroborosStrategy(StalePipelineStrategy):
    """Train a language model with tied embeddings in a pipeline without backward locking: K modules on K - 1 devices.

    Device 0 has the first module (embedding) and the last one (softmax, the loss), and with them the tied matrix V as one
    tensor that never travels; each module between them has a device of its own. Module k of K is trained with gradients that
    are ``K - 1 - k`` batches old. In batch t::

        V.grad = head's part of batch t + embedding's part of batch t - (K - 1)

    Device 0 updates both of its modules in one step, clips them by one norm, and works on whichever can go on. While the
    pipeline fills, V and the last module are trained on the head's part alone; while it drains, V and the first module on
    the embedding's. Stateful layers (memories) see in the delayed backward what their forward saw. Parameters shared by
    modules on different devices are refused. With one device there are two modules on it, or one with ``stages=1``: plain
    training.

    Everything else is as in :class:`StalePipelineStrategy`; the model must be a ``LayeredModule``.

    Args:
        stages: K; ``None`` is one more than devices. With fewer there are replicas of K - 1 devices each.
        tied_grad: of tied parameters: the "sum" of the two parts (the true gradient if nothing were old), or their "mean".
        recompute_with: weights of the delayed backward: "current", or "stashed" (those of the forward, kept until then).
        keep: "input" (run the layers again in the backward) or "graph" (keep autograd's graph: faster, more memory; only with
            ``recompute_with="stashed"``).
        repeatable_dropout: draw in the second run what the first one drew; ``False`` draws other masks, as an ablation.
        timetable: "free", or "barrier" to reproduce the forward locking of the paper; what is learned is the same.
        split: where nothing is said by ``cuts``: "balanced" (shortest time a batch, by ``balance``, with the two modules of
            device 0 counted together), or "authors" (of ``n = layers // devices`` repeated layers a device, n // 2 in the first
            module and the other half in the last).
        **options: see :class:`StalePipelineStrategy`. The cost of the loss is measured where the module has an
            ``example_target_array`` beside its ``example_input_array``, else taken from its parameters.

    Raises:
        ValueError: for values that cannot work, with the cure.

    Source: arXiv:1909.06695; ``docs/ouroboros.md`` lists the differences.
    """

    strategy_name: ClassVar[str] = "ouroboros"

    def __init__(
        self,
        stages: int | None = None,
        tied_grad: TiedGrad = "sum",
        recompute_with: BackwardWeights = "current",
        keep: Keep = "input",
        repeatable_dropout: bool = True,
        timetable: Timetable = "free",
        split: Split = "balanced",
        **options: Any,
    ) -> None:
        super().__init__("ouroboros", stages, timetable=timetable, **options)
        chosen = {
            "tied_grad": choice("tied_grad", tied_grad, TiedGrad),
            "backward_weights": choice("recompute_with", recompute_with, BackwardWeights),
            "keep": choice("keep", keep, Keep),
            "repeatable_dropout": flag("repeatable_dropout", repeatable_dropout),
        }
        if keep == "graph" and recompute_with == "current":
            raise ValueError(
                "`keep='graph'` must go with `recompute_with='stashed'`: got 'current', and a graph holds the weights of its "
                "forward. Add `recompute_with='stashed'`, or use `keep='input'`."
            )
        self._options.update(chosen)
        self.split: Split = choice("split", split, Split)

    def _balanced(self, module: LayeredModule, layers: Mapping[str, nn.Module]) -> tuple[tuple[int, ...], Any]:
        if self.stages == 1:
            return (), costs_by_parameters(layers)
        if self.split == "authors":
            kinds = [type(layer).__name__ for layer in layers.values()]
            return authors_split(kinds, self.stages - 1), costs_by_parameters(layers)
        costs, head = self._costs(module, layers)
        weights = [c.milliseconds for c in costs] if self._by_time(module) else self._sizes(module, layers)
        replay, memory = self.plan.keep == "input", megabytes(layers)
        cuts = balance_ends(weights, self.stages, head, replay=replay, memory=memory, limit=self.memory_limit_mb)
        return cuts, costs

    def _costs(self, module: LayeredModule, layers: Mapping[str, nn.Module]) -> tuple[tuple[LayerCost, ...], Head]:
        """Return what layers and loss cost."""
        known = {id(p) for layer in layers.values() for p in layer.parameters()}
        held = list(module.loss.parameters()) if isinstance(module.loss, nn.Module) else []
        memory = sum(p.nbytes for p in held if id(p) not in known) / 2**20
        if not self._by_time(module):
            return costs_by_parameters(layers), Head(
                0.0 if self.balance == "layers" else float(sum(p.numel() for p in held)), memory
            )
        target = getattr(module, "example_target_array", None)
        if target is not None:
            *costs, loss = self._measured(module, {**layers, "loss": _WithTarget(module, target)})
            return tuple(costs), Head(loss.milliseconds, memory)
        found = self._measured(module, layers)
        sizes = sum(self._sizes(module, layers))
        a_parameter = sum(c.milliseconds for c in found) / sizes if sizes else 0.0
        return found, Head(a_parameter * sum(p.numel() for p in held), memory)

    def _sizes(self, module: LayeredModule, layers: Mapping[str, nn.Module]) -> list[float]:
        """Return the work of each layer by its parameters; one that the loss shares works there (here it is looked up)."""
        if self.balance == "layers":
            return [1.0] * len(layers)
        shared = {id(p) for p in module.loss.parameters()} if isinstance(module.loss, nn.Module) else set()
        return [float(sum(p.numel() for p in layer.parameters() if id(p) not in shared)) for layer in layers.values()]


class _WithTarget(nn.Module):
    """The loss as a last layer, to be measured."""

    def __init__(self, module: LayeredModule, target: Any) -> None:
        super().__init__()
        if isinstance(module.loss, nn.Module):
            self.loss = module.loss
        self._of, self._target = [module], target  # in a list, so that the module is no part of this one

    def forward(self, x: Any) -> Any:
        return loss_of(self._of[0], x, self._target)
