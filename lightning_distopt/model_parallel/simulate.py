"""Training under staleness in one process: what a pipeline of any speed and latency learns, without the devices.

    for b = 0, 1, 2, ...:                                        w_k[v]: weights of stage k after v updates
        for k = 0..K-1:   h_k = F_k( h_{k-1}; w_k[max(0, b - m_k)] )
        for k = K-1..0:   (g_k, delta_{k-1}) = vjp of F_k at (h_{k-1}; w_k[b], or the weights of its forward)
        for k:            w_k[b+1] = optimizer_k(w_k[b], g_k)

This is the slow reference that every distributed run is tested against: it keeps weights, inputs and random seeds in the
plainest way, and knows no ticks, queues or messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from lightning_distopt.model_parallel.randomness import keyed_random
from lightning_distopt.model_parallel.staleness import StalenessPlan
from lightning_distopt.model_parallel.structure import flatten, unflatten

__all__ = ["Simulation", "simulate"]

Loss: TypeAlias = Callable[[Any, Any], Tensor]
MakeOptimizer: TypeAlias = Callable[[Any], Optimizer]
Weights: TypeAlias = dict[str, Tensor]


def simulate(
    modules: Sequence[nn.Module],
    loss_fn: Loss,
    batches: Iterable[tuple[Any, Any]],
    plan: StalenessPlan,
    optimizer: MakeOptimizer,
    scheduler: Callable[[Optimizer], Any] | None = None,
    clip: float | None = None,
    seed: int = 0,
) -> list[float]:
    """Train in one process exactly as a pipeline with this plan would, whatever its speed; return the losses by batch.

    Args:
        modules: one a stage, updated in place. A stage takes what the one before returns: a tensor, or a nest of tuples.
        loss_fn: ``(output of the last module, target) -> scalar``; a module's own parameters train with the last stage.
        batches: pairs (input, target); all are run and drained.
        plan: staleness and backward weights; its speed and timetable do not matter here.
        optimizer: called with the parameters of each stage.
        scheduler: called with each stage's optimizer; stepped after each of its updates.
        clip: largest 2-norm of a stage's gradient (each stage by itself).
        seed: of the random numbers that layers draw: batch b in stage k always draws the same.

    Returns:
        The loss of every batch, in order.

    Raises:
        ValueError: if the number of modules is not that of the plan's stages.

    Example:
        >>> stages = [nn.Linear(2, 2), nn.Linear(2, 1)]
        >>> data = [(torch.ones(4, 2), torch.zeros(4, 1))] * 3
        >>> plan = StalenessPlan.preset("dsp", stages=2)
        >>> len(simulate(stages, nn.functional.mse_loss, data, plan, lambda p: torch.optim.SGD(p, lr=0.1)))
        3
    """
    return Simulation(modules, loss_fn, plan, optimizer, scheduler, clip, seed).run(batches)


class Simulation:
    """The same with the optimizers kept, so that drained runs can follow each other; see :func:`simulate`."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        loss_fn: Loss,
        plan: StalenessPlan,
        optimizer: MakeOptimizer,
        scheduler: Callable[[Optimizer], Any] | None = None,
        clip: float | None = None,
        seed: int = 0,
    ) -> None:
        if len(modules) != plan.stages:
            raise ValueError(
                f"`modules` must be one a stage: got {len(modules)} for {plan.stages} stages of {plan}. Give as many."
            )
        shared = sum(len(set(map(id, m.parameters()))) for m in modules) - len(
            {id(p) for m in modules for p in m.parameters()}
        )
        if plan.workers < plan.stages and (clip is not None or scheduler is not None or shared):
            raise ValueError(
                "`clip`, `scheduler` and parameters in several modules must stay away from plans with several stages a worker: "
                f"got {plan}, whose stages update together with gradients of different batches. Leave them out."
            )
        self.modules, self.loss_fn, self.plan, self.clip, self.seed = list(modules), loss_fn, plan, clip, seed
        self.owned = [list(module.parameters()) for module in modules]
        if isinstance(loss_fn, nn.Module):
            self.owned[-1] += list(loss_fn.parameters())
        workers: list[list[nn.Parameter]] = [[] for _ in range(plan.workers)]
        for stage, parameters in enumerate(self.owned):
            known = {id(p) for p in workers[plan.placement[stage]]}
            workers[plan.placement[stage]] += [p for p in parameters if id(p) not in known]
        self.optimizers = [optimizer(parameters) for parameters in workers]
        self.schedulers = [scheduler(o) for o in self.optimizers] if scheduler else []
        self.done = 0

    def run(self, batches: Iterable[tuple[Any, Any]]) -> list[float]:
        """Train on these batches and drain; return their losses."""
        plan, last = self.plan, self.plan.stages - 1
        history: list[list[Weights]] = [[_copy(module)] for module in self.modules]
        count = 0
        losses: list[float] = []
        sums: list[dict[nn.Parameter, Tensor]] = [{} for _ in self.modules]
        for b, (x, target) in enumerate(batches):
            inputs = [x]
            for k in range(last):
                weights = history[k][plan.forward_version(k, b)]
                with torch.no_grad(), keyed_random(self.seed, k, self.done + b):
                    inputs.append(functional_call(self.modules[k], weights, (inputs[k],)))
            delta: list[Tensor | None] | None = None
            for k in reversed(range(plan.stages)):
                weights = history[k][plan.backward_version(k, b)]
                loss, gradients, delta = self._differentiate(k, weights, inputs[k], delta, target, self.done + b)
                if k == last:
                    losses.append(loss)
                for parameter, gradient in gradients:
                    sums[k][parameter] = sums[k][parameter] + gradient if parameter in sums[k] else gradient
            count = b + 1
            if count % plan.accumulate == 0:
                self._update(sums, history)
        if count % plan.accumulate:
            self._update(sums, history)
        self.done += count
        return losses

    def _differentiate(
        self, k: int, weights: Weights, x: Any, delta: list[Tensor | None] | None, target: Any, batch: int
    ) -> tuple[float, list[tuple[nn.Parameter, Tensor]], list[Tensor | None]]:
        module, last = self.modules[k], k == self.plan.stages - 1
        spec, tensors = flatten(x)
        tensors = [t.detach().requires_grad_(k > 0 and t.is_floating_point()) for t in tensors]
        leaves = {name: w.detach().requires_grad_(p.requires_grad) for (name, p), w in _pairs(module, weights)}
        # Running statistics belong to the first forward; the second one changes copies that nobody reads.
        buffers = {} if last else {name: buffer.clone() for name, buffer in module.named_buffers()}
        owners = [(p, leaves[name]) for name, p in module.named_parameters() if p.requires_grad]
        extra = [p for p in self.owned[k] if p.requires_grad and all(p is not q for q, _ in owners)]
        with keyed_random(self.seed, k, batch):
            output = functional_call(module, {**leaves, **buffers}, (unflatten(spec, tensors),))
            if last:
                output = self.loss_fn(output, target)
        outputs = [t for t in flatten(output)[1] if t.is_floating_point()]
        wanted = [t for t in tensors if t.requires_grad] + [leaf for _, leaf in owners] + extra
        heads = [None] * len(outputs) if delta is None else delta
        pairs = [(o, h) for o, h in zip(outputs, heads, strict=True) if o.requires_grad and (last or h is not None)]
        if not pairs or not wanted:
            return 0.0, [], [None for t in tensors if t.is_floating_point()]
        found = torch.autograd.grad([o for o, _ in pairs], wanted, [h for _, h in pairs], allow_unused=True)
        inner = iter(found)
        below = [next(inner) if t.requires_grad else None for t in tensors if t.is_floating_point()]
        gradients = [(p, g) for p, g in zip([p for p, _ in owners] + extra, inner, strict=True) if g is not None]
        return float(output.detach()) if last else 0.0, gradients, below

    def _update(self, sums: list[dict[nn.Parameter, Tensor]], history: list[list[Weights]]) -> None:
        for worker, optimizer in enumerate(self.optimizers):
            for k in (k for k in range(self.plan.stages) if self.plan.placement[k] == worker):
                for parameter, gradient in sums[k].items():
                    mean = gradient / self.plan.accumulate if self.plan.accumulate > 1 else gradient
                    parameter.grad = mean if parameter.grad is None else parameter.grad + mean
                sums[k].clear()
            if self.clip is not None:
                nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], self.clip)
            optimizer.step()
            optimizer.zero_grad()
            if self.schedulers:
                self.schedulers[worker].step()
        for k, module in enumerate(self.modules):
            history[k].append(_copy(module))


def _copy(module: nn.Module) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def _pairs(module: nn.Module, weights: Weights) -> list[tuple[tuple[str, nn.Parameter], Tensor]]:
    return [((name, parameter), weights[name]) for name, parameter in module.named_parameters()]
