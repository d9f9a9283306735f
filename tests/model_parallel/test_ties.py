"""Parameters that stages share on one worker: one tensor, whose gradient is put together from what the stages bring."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_distopt.model_parallel import StalenessPlan, simulate
from lightning_distopt.model_parallel.in_process import InProcessPipeline
from lightning_distopt.model_parallel.simulate import Simulation
from lightning_distopt.model_parallel.ties import find_ties
from tests.model_parallel.language import Remembering, TiedHead, chain, parameters_of, texts
from tests.model_parallel.test_simulate import OPTIMIZERS, SGD

OPTIONS: dict[str, dict[str, Any]] = {
    "current": {},
    "stashed": {"backward_weights": "stashed"},
    "graph": {"backward_weights": "stashed", "keep": "graph"},
    "mean": {"tied_grad": "mean"},
    "other_masks": {"repeatable_dropout": False},
}


def ouroboros(stages: int = 3, **options: Any) -> StalenessPlan:
    return StalenessPlan.preset("ouroboros", stages, **options)


def exact(stages: int = 3, **options: Any) -> StalenessPlan:
    """Return the same plan with all delays forced to zero."""
    return ouroboros(stages, gradient_delays=[0] * (stages - 1), **options)


def plain(
    stages: int, make: Callable[..., Any], count: int, clip: float | None = None, batches: Any = None
) -> tuple[list[Tensor], list[float]]:
    """Back-propagation of the whole model, with a state of each stateful layer that is handed on."""
    modules, head = chain(stages, dropout=0.0)
    layers = [layer for module in modules for layer in module]
    parameters = parameters_of(modules, head)
    optimizer, states, losses = make(parameters), {}, []
    for x, y in batches or texts(count):
        for index, layer in enumerate(layers):
            if isinstance(layer, Remembering):
                x, after = layer(x, states.get(index, layer.initial_state(x)))
                states[index] = after.detach()
            else:
                x = layer(x)
        loss = head(x, y)
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    return [p.detach().clone() for p in parameters], losses


def same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


# --- equal to back-propagation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [Simulation, InProcessPipeline])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_without_delays_it_is_back_propagation_bit_for_bit(engine: Any, stages: int, make: Any) -> None:
    expected, losses = plain(stages, make, 7)
    modules, head = chain(stages, dropout=0.0)
    plan = exact(stages) if stages > 1 else ouroboros(1)
    assert engine(modules, head, plan, make).run(texts(7)) == losses
    assert same(parameters_of(modules, head), expected)


def test_without_delays_clipping_of_one_device_is_that_of_one_device() -> None:
    """Two modules on one device: the norm is over both, and counts what they share once."""
    expected, losses = plain(2, SGD, 6, clip=0.5)
    modules, head = chain(2, dropout=0.0)
    assert simulate(modules, head, texts(6), exact(2), SGD, clip=0.5) == losses
    assert same(parameters_of(modules, head), expected)


# --- with delays, by hand ------------------------------------------------------------------------------------------


def test_three_numbers_two_of_which_are_one() -> None:
    """``y = v w v x`` and loss ``(y - 2)^2 / 2`` at K = 3, in plain floats: v acts in modules 0 and 2, w in module 1."""

    class Times(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    v, w = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (0.9, 1.1))
    inputs, rate = [1.0, 0.5, 2.0, 1.5, 0.25, 1.25], 0.05
    losses = simulate(
        [Times(v), Times(w), Times(v)],
        lambda y, target: (y - target).square() / 2,
        [(torch.tensor(x, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)) for x in inputs],
        ouroboros(3),
        partial(torch.optim.SGD, lr=rate),
    )
    a, b, delta, below, expected = 0.9, 1.1, {}, {}, []
    kept = {}
    for t in range(len(inputs) + 2):
        grad_a = grad_b = 0.0
        if t < len(inputs):
            kept[t] = a * inputs[t]  # what module 1 gets
            h = b * kept[t]
            error = a * h - 2.0
            expected.append(error**2 / 2)
            grad_a += error * h
            delta[t] = error * a
        if 1 <= t < len(inputs) + 1:  # module 1 replays batch t - 1 with the w of now
            grad_b += delta[t - 1] * kept[t - 1]
            below[t - 1] = delta[t - 1] * b
        if t >= 2:  # module 0 replays batch t - 2
            grad_a += below[t - 2] * inputs[t - 2]
        a, b = a - rate * grad_a, b - rate * grad_b
    assert losses == pytest.approx(expected, rel=1e-12)
    assert [float(v.detach()), float(w.detach())] == pytest.approx([a, b], rel=1e-12)


# --- the engine is the simulator ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("row", OPTIONS)
def test_the_engine_is_the_simulator_bit_for_bit(row: str, stages: int) -> None:
    """Ties, memories, dropout, weight decay, clipping, a schedule, and a drain in the middle."""
    plan = ouroboros(stages, **OPTIONS[row])
    options: dict[str, Any] = {
        "seed": 5,
        "clip": 0.5,
        "scheduler": partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=13),
    }
    make = OPTIMIZERS["momentum"]
    (ours, our_head), (theirs, their_head) = chain(stages), chain(stages)
    engine = InProcessPipeline(ours, our_head, plan, make, **options)
    reference = Simulation(theirs, their_head, plan, make, **options)
    data = list(texts(13))
    for part in (data[:8], data[8:]):
        assert engine.run(part) == reference.run(part)
        assert same(parameters_of(ours, our_head), parameters_of(theirs, their_head))
    assert [o.param_groups[0]["lr"] for o in engine.optimizers] == pytest.approx([0.0] * plan.workers, abs=1e-9)


@pytest.mark.parametrize("name", ["sgd", "adam"])
@pytest.mark.parametrize("stages", [3, 4])
def test_with_other_optimizers_too(stages: int, name: str) -> None:
    (ours, our_head), (theirs, their_head) = chain(stages), chain(stages)
    engine = InProcessPipeline(ours, our_head, ouroboros(stages), OPTIMIZERS[name])
    assert engine.run(texts(9)) == simulate(theirs, their_head, texts(9), ouroboros(stages), OPTIMIZERS[name])
    assert same(parameters_of(ours, our_head), parameters_of(theirs, their_head))


@pytest.mark.parametrize("delays", [((1, 1), (1, 1)), ((0, 2), (2, 0)), ((2, 0), (0, 0))])
def test_with_any_delays(delays: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    plan = StalenessPlan(*delays, placement=(0, 1, 0))
    (ours, our_head), (theirs, their_head) = chain(3), chain(3)
    assert InProcessPipeline(ours, our_head, plan, SGD).run(texts(9)) == simulate(
        theirs, their_head, texts(9), plan, SGD
    )
    assert same(parameters_of(ours, our_head), parameters_of(theirs, their_head))


def test_current_stashed_and_mean_learn_different_things() -> None:
    found = []
    for options in OPTIONS.values():
        modules, head = chain(3)
        simulate(modules, head, texts(9), ouroboros(3, **options), SGD)
        found.append(parameters_of(modules, head))
    stashed, graph = found.pop(1), found[1]
    assert same(stashed, graph)
    assert not any(same(a, b) for a, b in itertools.combinations(found, 2))


def test_memory_is_that_of_the_plan() -> None:
    for options in ({}, {"backward_weights": "stashed"}, {"backward_weights": "stashed", "keep": "graph"}):
        plan = ouroboros(4, **options)
        modules, head = chain(4)
        engine = InProcessPipeline(modules, head, plan, SGD)
        engine.run(texts(15))
        assert [s.peak for s in engine.stages] == [plan.stored_inputs(k) for k in range(4)]
        assert [s.stash.peak for s in engine.stages] == [plan.weight_versions(k) for k in range(4)]


# --- gradients ------------------------------------------------------------------------------------------------------


class Still(torch.optim.SGD):
    """Notes gradients by parameter and steps nothing."""

    def __init__(self, parameters: Any, seen: dict[int, list[Tensor]]) -> None:
        super().__init__(parameters, lr=1.0)
        self.seen = seen

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.seen.setdefault(id(p), []).append(p.grad.clone())


def gradients(plan: StalenessPlan, engine: Any = InProcessPipeline, count: int = 6) -> list[list[Tensor]]:
    """Return each parameter's gradients, update by update, of a run that changes no weight."""
    modules, head = chain(plan.stages, dropout=0.5)
    seen: dict[int, list[Tensor]] = {}
    engine(modules, head, plan, lambda p: Still(p, seen)).run(texts(count))
    return [seen[id(p)] for p in parameters_of(modules, head)]


@pytest.mark.parametrize("options", [OPTIONS["current"], OPTIONS["stashed"], OPTIONS["graph"]])
@pytest.mark.parametrize("stages", [3, 4])
def test_without_a_learning_rate_gradients_are_exact(stages: int, options: dict[str, Any]) -> None:
    """Dropout draws again what it drew, memories are those of the forward; V gets its two parts at different times."""
    staleness = stages - 1
    (tied, *wanted), (found, *others) = gradients(exact(stages)), gradients(ouroboros(stages, **options))
    for a, b in zip(wanted, others, strict=True):
        assert same(a, b)
    head, late = gradients(ouroboros(stages, **options), Parts)[0], len(tied)
    assert len(found) == late + staleness
    parts = [(h, t - h) for t, h in zip(tied, head, strict=True)]
    for tick, gradient in enumerate(found):
        expected = torch.zeros_like(gradient)
        if tick < late:
            expected += parts[tick][0]
        if tick >= staleness:
            expected += parts[tick - staleness][1]
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


class Parts(InProcessPipeline):
    """Shows the optimizer the head's part of V alone."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        first = self.stages[0]
        inner = first.backward

        def backward(*given: Any) -> Any:
            result = inner(*given)
            first.sums = {p: g for p, g in first.sums.items() if all(p is not q for q in shared)}
            return result

        shared = [p for p in first.parameters.values() if any(p is q for q in self.stages[-1].parameters.values())]
        first.backward = backward  # type: ignore[method-assign]


def test_the_tied_gradient_is_the_sum_of_its_parts_or_their_mean() -> None:
    modules, head = chain(3, dropout=0.0)
    x, y = next(texts(1))
    weight = modules[0][0].weight
    head_only = nn.Parameter(weight.detach().clone())

    def loss() -> Tensor:
        h, _ = Simulation(modules, head, exact(3), SGD).modules[0](x)
        for module in modules[1:]:
            for layer in module:
                h = layer(h, layer.initial_state(h))[0] if isinstance(layer, Remembering) else layer(h)
        return head.of(h, y, head_only)

    below, above = torch.autograd.grad(loss(), [weight, head_only])
    for tied_grad, expected in (("sum", below + above), ("mean", (below + above) / 2)):
        seen: dict[int, list[Tensor]] = {}
        engine = InProcessPipeline(modules, head, exact(3, tied_grad=tied_grad), partial(Still, seen=seen))
        engine.run([(x, y)])
        torch.testing.assert_close(seen[id(weight)][0], expected, rtol=1e-12, atol=1e-15)


def test_a_part_that_is_missing_does_not_count_in_the_mean() -> None:
    total, mean = (gradients(ouroboros(3, tied_grad=how))[0] for how in ("sum", "mean"))
    assert same(mean[:2], total[:2])  # fill: head alone
    assert same(mean[-2:], total[-2:])  # drain: input alone
    assert same(mean[2:-2], [g / 2 for g in total[2:-2]])


def test_memories_begin_anew_when_told_to() -> None:
    for make in (InProcessPipeline, Simulation):
        modules, head = chain(3, dropout=0.0)
        engine: Any = make(modules, head, ouroboros(3), partial(torch.optim.SGD, lr=0.0))
        data = list(texts(4))
        first, second = engine.run(data), engine.run(data)
        engine.forget()
        assert engine.run(data) == first
        assert second[0] != first[0]


# --- refused --------------------------------------------------------------------------------------------------------


def built(plan: StalenessPlan, modules: list[nn.Sequential], head: nn.Module) -> Iterator[Any]:
    for engine in (InProcessPipeline, Simulation):
        yield partial(engine, modules, head, plan, SGD)


def test_ties_between_workers_are_refused() -> None:
    for make in built(StalenessPlan.preset("features_replay", 3), *chain(3)):
        with pytest.raises(ValueError, match=r"different processes.*stage 0.*stage 2.*ouroboros"):
            make()


def test_two_parameters_of_one_memory_are_refused() -> None:
    modules, head = chain(3)
    head.weight = nn.Parameter(head.weight.data)
    for make in built(ouroboros(3), modules, head):
        with pytest.raises(ValueError, match=r"one nn\.Parameter.*head\.weight = embedding\.weight"):
            make()


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"versions": "vertical", "backward_weights": "stashed"}])
def test_what_would_tear_the_parts_apart_is_refused(options: dict[str, Any]) -> None:
    for make in built(ouroboros(3, **options), *chain(3)):
        with pytest.raises(ValueError, match="accumulate=1"):
            make()


def test_ties_are_found_by_their_memory() -> None:
    a, b, c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
    b.weight = a.weight
    c.bias = nn.Parameter(a.bias.data)  # another parameter, the same memory
    named = [dict(m.named_parameters()) for m in (a, b, c)]
    assert find_ties(named) == [[(0, "weight"), (1, "weight")], [(0, "bias"), (2, "bias")]]
    assert find_ties([dict(nn.Sequential(a, a).named_parameters()), {"w": c.weight}]) == []
    assert isinstance(chain(2)[1], TiedHead)
