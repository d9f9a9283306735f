"""Training under staleness in one process: what a pipeline of any speed and latency learns, without the devices.

    for b = 0, 1, 2, ...:                                        w_k[v]: weights of stage k after v updates
        for k = 0..K-1:   h_k = F_k( h_{k-1}; w_k[max(0, b - m_k)] )
        for k = K-1..0:   (g_k, delta_{k-1}) = vjp of F_k at (h_{k-1}; w_k[b], or the weights of its forward)
        for k:            w_k[b+1] = optimizer_k(w_k[b], g_k)

This is the slow reference that every distributed run is tested against: it keeps weights, inputs, states and random seeds in
the plainest way, and knows no queues or messages.

Where several stages of a worker update together, or share a parameter V, the batch alone does not say which weights there are:
V moves with every part of its gradient, as soon as the first is there. Then the same is done tick by tick:

    for t = 0, 1, 2, ...:                                        all read the weights of the start of the tick
        for k = 0..K-1:   h_k of batch t - P_k
        for k = K-1..0:   (g_k, delta_{k-1}) of batch t - P_k - m_k, as above
        for each worker:  one update; V.grad = sum (or mean) of the parts that its stages brought
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from lightning_distopt.model_parallel.block import Block, States, as_block
from lightning_distopt.model_parallel.randomness import keyed_random
from lightning_distopt.model_parallel.staleness import StalenessPlan
from lightning_distopt.model_parallel.structure import flatten, unflatten
from lightning_distopt.model_parallel.ties import refuse_ties

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
        modules: one a stage, updated in place. A stage takes what the one before returns: a tensor, or a nest of tuples. Stateful
            layers are stages or children of an ``nn.Sequential``.
        loss_fn: ``(output of the last module, target) -> scalar``; a module's own parameters train with the last stage.
        batches: pairs (input, target); all are run and drained.
        plan: staleness and backward weights; its speed and timetable do not matter here.
        optimizer: called with the parameters of each stage.
        scheduler: called with each worker's optimizer; stepped after each update that its last stage takes part in.
        clip: largest 2-norm of a worker's gradient (each worker by itself).
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
        blocks = [as_block(module) for module in modules]
        self.modules: list[nn.Module] = [*blocks[:-1], _Last(blocks[-1], loss_fn)]
        self.plan, self.clip, self.seed = plan, clip, seed
        self.states: list[States] = [{} for _ in modules]
        refuse_ties(plan, [dict(module.named_parameters()) for module in self.modules])
        self._together = plan.workers < plan.stages and plan.accumulate == 1 and plan.versions == "newest"
        if plan.workers < plan.stages and not self._together and (clip is not None or scheduler is not None):
            raise ValueError(
                "`clip` and `scheduler` must stay away from plans with several stages a worker and `accumulate` or `versions`: "
                f"got {plan}, whose stages update together with gradients of different batches. Leave them out."
            )
        workers: list[list[nn.Parameter]] = [[] for _ in range(plan.workers)]
        for stage, module in enumerate(self.modules):
            known = {id(p) for p in workers[plan.placement[stage]]}
            workers[plan.placement[stage]] += [p for p in module.parameters() if id(p) not in known]
        self.optimizers = [optimizer(parameters) for parameters in workers]
        self.schedulers = [scheduler(o) for o in self.optimizers] if scheduler else []
        self.done = 0

    def run(self, batches: Iterable[tuple[Any, Any]]) -> list[float]:
        """Train on these batches and drain; return their losses."""
        return self._by_ticks(list(batches)) if self._together else self._by_batches(batches)

    def forget(self) -> None:
        """Let stateful layers begin anew."""
        self.states = [{} for _ in self.modules]

    def _by_batches(self, batches: Iterable[tuple[Any, Any]]) -> list[float]:
        plan, last = self.plan, self.plan.stages - 1
        history: list[list[Weights]] = [[_copy(module)] for module in self.modules]
        count = 0
        losses: list[float] = []
        sums: list[dict[nn.Parameter, Tensor]] = [{} for _ in self.modules]
        for b, (x, target) in enumerate(batches):
            inputs, seen = [x], list(self.states)
            for k in range(last):
                inputs.append(self._forward(k, history[k][plan.forward_version(k, b)], inputs[k], self.done + b))
            delta: list[Tensor | None] | None = None
            for k in reversed(range(plan.stages)):
                weights = history[k][plan.backward_version(k, b)]
                loss, gradients, delta = self._differentiate(
                    k, weights, inputs[k], seen[k], delta, target, self.done + b
                )
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

    def _by_ticks(self, batches: list[tuple[Any, Any]]) -> list[float]:
        plan, last, count = self.plan, self.plan.stages - 1, len(batches)
        inputs = {(0, b): x for b, (x, _) in enumerate(batches)}  # by (stage, batch), as everything here
        then: dict[tuple[int, int], Weights] = {}
        seen: dict[tuple[int, int], States] = {}
        deltas: dict[tuple[int, int], list[Tensor | None] | None] = {(last, b): None for b in range(count)}
        losses: list[float] = []
        for tick in range(plan.ticks(count)):
            now = [_copy(module) for module in self.modules]
            for k, b in ((k, plan.forward_batch(k, tick)) for k in range(plan.stages)):
                if 0 <= b < count:
                    then[k, b], seen[k, b] = now[k], self.states[k]
                    if k < last:
                        inputs[k + 1, b] = self._forward(k, now[k], inputs[k, b], self.done + b)
            parts: list[dict[nn.Parameter, list[Tensor]]] = [{} for _ in range(plan.workers)]
            newest: set[int] = set()
            for k, b in ((k, plan.backward_batch(k, tick)) for k in reversed(range(plan.stages))):
                if 0 <= b < count:
                    weights, worker = then.pop((k, b)), plan.placement[k]
                    loss, gradients, below = self._differentiate(
                        k,
                        now[k] if plan.backward_weights == "current" else weights,
                        inputs.pop((k, b)),
                        seen.pop((k, b)),
                        deltas.pop((k, b)),
                        batches[b][1],
                        self.done + b,
                    )
                    if k == last:
                        losses.append(loss)
                    if k > 0:
                        deltas[k - 1, b] = below
                    if k == max(j for j in range(plan.stages) if plan.placement[j] == worker):
                        newest.add(worker)
                    for parameter, gradient in gradients:
                        parts[worker].setdefault(parameter, []).append(gradient)
            for worker, found in enumerate(parts):
                self._update_together(worker, found, worker in newest)
        self.done += count
        return losses

    def _forward(self, k: int, weights: Weights, x: Any, batch: int) -> Any:
        with torch.no_grad(), keyed_random(self.seed, k, batch):
            y, self.states[k] = functional_call(self.modules[k], weights, (x, self.states[k]))
        return y

    def _update_together(self, worker: int, parts: dict[nn.Parameter, list[Tensor]], newest: bool) -> None:
        if not parts:
            return
        optimizer = self.optimizers[worker]
        for parameter, several in parts.items():
            total = reduce(torch.add, several)
            parameter.grad = total / len(several) if self.plan.tied_grad == "mean" and len(several) > 1 else total
        if self.clip is not None:
            nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], self.clip)
        optimizer.step()
        optimizer.zero_grad()
        if self.schedulers and newest:
            self.schedulers[worker].step()

    def _differentiate(
        self,
        k: int,
        weights: Weights,
        x: Any,
        states: States,
        delta: list[Tensor | None] | None,
        target: Any,
        batch: int,
    ) -> tuple[float, list[tuple[nn.Parameter, Tensor]], list[Tensor | None]]:
        module, last = self.modules[k], k == self.plan.stages - 1
        spec, tensors = flatten(x)
        tensors = [t.detach().requires_grad_(k > 0 and t.is_floating_point()) for t in tensors]
        leaves = {name: w.detach().requires_grad_(p.requires_grad) for (name, p), w in _pairs(module, weights)}
        # Running statistics belong to the first forward; the second one changes copies that nobody reads.
        buffers = {} if last else {name: buffer.clone() for name, buffer in module.named_buffers()}
        owners = [(p, leaves[name]) for name, p in module.named_parameters() if p.requires_grad]
        other = not last and not self.plan.repeatable_dropout
        with keyed_random(self.seed, k + self.plan.stages * other, batch):
            given = (unflatten(spec, tensors), states, *((target,) if last else ()))
            output, after = functional_call(module, {**leaves, **buffers}, given)
            if last:
                self.states[k] = after
        outputs = [t for t in flatten(output)[1] if t.is_floating_point()]
        wanted = [t for t in tensors if t.requires_grad] + [leaf for _, leaf in owners]
        heads = [None] * len(outputs) if delta is None else delta
        pairs = [(o, h) for o, h in zip(outputs, heads, strict=True) if o.requires_grad and (last or h is not None)]
        if not pairs or not wanted:
            return 0.0, [], [None for t in tensors if t.is_floating_point()]
        found = torch.autograd.grad([o for o, _ in pairs], wanted, [h for _, h in pairs], allow_unused=True)
        inner = iter(found)
        below = [next(inner) if t.requires_grad else None for t in tensors if t.is_floating_point()]
        gradients = [(p, g) for (p, _), g in zip(owners, inner, strict=True) if g is not None]
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


class _Last(nn.Module):
    """The last stage and the loss, so that both read the same weights, also where they share some."""

    def __init__(self, block: Block, loss: Loss) -> None:
        super().__init__()
        self.block, self.loss = block, loss

    def forward(self, x: Any, states: States, target: Any) -> tuple[Tensor, States]:
        y, after = self.block(x, states)
        return self.loss(y, target), after


def _copy(module: nn.Module) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def _pairs(module: nn.Module, weights: Weights) -> list[tuple[tuple[str, nn.Parameter], Tensor]]:
    return [((name, parameter), weights[name]) for name, parameter in module.named_parameters()]
