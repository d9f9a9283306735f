"""The engine, all workers in one process, against the simulator: weights, logs, queues, memory, random numbers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_distopt.model_parallel import StalenessPlan, simulate
from lightning_distopt.model_parallel.in_process import InProcessPipeline
from lightning_distopt.model_parallel.simulate import Simulation
from tests.model_parallel.models import batches_of, blocks
from tests.model_parallel.test_simulate import OPTIMIZERS, SGD

LOSS = nn.functional.cross_entropy
PLANS = {
    "naive": {},
    "ddg": {},
    "ddg_inputs": {"keep": "input"},
    "features_replay": {},
    "pipedream": {},
    "pipedream_vertical": {"versions": "vertical"},
    "pipedream_2bw": {"accumulate": 4},
    "pipedream_2bw_inputs": {"accumulate": 5, "keep": "input"},
    "dsp": {},
    "dsp_accumulated": {"accumulate": 3},
    "dsp_stashed": {"backward_weights": "stashed"},
}


def plan_for(row: str, stages: int) -> StalenessPlan:
    name = next(
        n for n in ("features_replay", "pipedream_2bw", "pipedream", "naive", "ddg", "dsp") if row.startswith(n)
    )
    options = dict(PLANS[row])
    if "accumulate" in options and "2bw" in row:
        options["accumulate"] = max(options["accumulate"], stages)
    return StalenessPlan.preset(name, stages, **options)


def weights(modules: list[nn.Module]) -> list[Tensor]:
    return [t.detach().clone() for m in modules for t in (*m.parameters(), *m.buffers())]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("row", PLANS)
def test_the_engine_is_the_simulator_bit_for_bit(row: str, stages: int) -> None:
    """With momentum, weight decay, dropout, batch norm and a drain in the middle."""
    plan = plan_for(row, stages)
    ours, theirs = (blocks(stages, dropout=0.3, norm=True) for _ in range(2))
    engine = InProcessPipeline(ours, LOSS, plan, OPTIMIZERS["momentum"], seed=5)
    reference = Simulation(theirs, LOSS, plan, OPTIMIZERS["momentum"], seed=5)
    data = list(batches_of(17))
    for part in (data[:10], data[10:]):
        assert engine.run(part) == reference.run(part)
        assert same(weights(ours), weights(theirs))


@pytest.mark.parametrize("row", ["ddg", "features_replay", "dsp"])
def test_adam_too(row: str) -> None:
    plan = plan_for(row, 3)
    ours, theirs = blocks(3), blocks(3)
    InProcessPipeline(ours, LOSS, plan, OPTIMIZERS["adam"]).run(batches_of(12))
    simulate(theirs, LOSS, batches_of(12), plan, OPTIMIZERS["adam"])
    assert same(weights(ours), weights(theirs))


@pytest.mark.parametrize("p", [0, 1, 2])
@pytest.mark.parametrize("q", [0, 1, 2])
def test_all_delays(p: int, q: int) -> None:
    plan = StalenessPlan((p, p), (q, q))
    ours, theirs = blocks(3), blocks(3)
    engine = InProcessPipeline(ours, LOSS, plan, SGD)
    assert engine.run(batches_of(11)) == simulate(theirs, LOSS, batches_of(11), plan, SGD)
    assert same(weights(ours), weights(theirs))
    assert [stage.peak for stage in engine.stages] == [m + 1 for m in plan.staleness]
    assert engine.depths == {(k, name): d for k in range(2) for name, d in (("activations", p), ("gradients", q))}


@pytest.mark.parametrize(
    "name", ["naive", "ddg", "features_replay", "pipedream", "dsp", "dsp(2,2,0;6,3,0)", "ouroboros"]
)
def test_the_log_is_the_table(name: str) -> None:
    plan, batches = StalenessPlan.preset(name, 3), 9
    engine = InProcessPipeline(blocks(3), LOSS, plan, SGD)
    engine.run(batches_of(batches))
    wanted = {
        (c.tick, c.stage, kind, b)
        for c in plan.cells(plan.ticks(batches), batches)
        for kind, b in (("F", c.forward), ("B", c.backward))
        if b is not None
    }
    assert set(engine.log) == wanted
    assert len(engine.log) == len(wanted)


@pytest.mark.parametrize("row", PLANS)
def test_memory_is_that_of_the_plan(row: str) -> None:
    plan = plan_for(row, 3)
    engine = InProcessPipeline(blocks(3), LOSS, plan, SGD)
    engine.run(batches_of(25))
    assert [s.peak for s in engine.stages] == [plan.stored_inputs(k) for k in range(3)]
    assert [s.stash.peak for s in engine.stages] == [plan.weight_versions(k) for k in range(3)]
    assert all(not s.stash.old and not len(s) for s in engine.stages)


@pytest.mark.parametrize(("bn_update", "runs"), [("forward", 1), ("backward", 1), ("both", 2)])
def test_running_statistics_change_when_asked(bn_update: Any, runs: int) -> None:
    modules = blocks(2, norm=True)
    InProcessPipeline(modules, LOSS, StalenessPlan.preset("dsp", 2), SGD, bn_update=bn_update).run(batches_of(7))
    assert int(modules[0][1].num_batches_tracked) == 7 * runs


def test_ouroboros_trains_both_ends_on_one_worker() -> None:
    plan = StalenessPlan.preset("ouroboros", 3)
    ours, theirs = blocks(3), blocks(3)
    engine = InProcessPipeline(ours, LOSS, plan, OPTIMIZERS["momentum"])
    assert len(engine.optimizers) == 2
    assert engine.run(batches_of(9)) == simulate(theirs, LOSS, batches_of(9), plan, OPTIMIZERS["momentum"])
    assert same(weights(ours), weights(theirs))


class Memory(nn.Module):
    """Adds the mean of its last inputs: a layer with a state."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((), 0.5, dtype=torch.float64))
        self.fed: list[float] = []

    def initial_state(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        self.fed.append(float(state.sum()))
        return torch.tanh(x + self.weight * state), x


@pytest.mark.parametrize("name", ["ddg", "features_replay", "dsp"])
def test_a_backward_sees_the_state_of_its_forward(name: str) -> None:
    """Without a learning rate the gradients of a stale plan are those of plain back-propagation, memory on."""
    seen: list[list[Tensor]] = []
    for which in ("naive", name):
        grads: list[Tensor] = []

        class Still(torch.optim.SGD):
            def step(self, closure: Any = None, grads: list[Tensor] = grads) -> None:
                grads.extend(p.grad.clone() for g in self.param_groups for p in g["params"] if p.ndim == 0)

        modules = [Memory(), *blocks(2)]
        InProcessPipeline(modules, LOSS, StalenessPlan.preset(which, 3), partial(Still, lr=1.0)).run(batches_of(6))
        seen.append(grads)
    assert len(seen[0]) == 6
    assert len({float(g) for g in seen[0]}) == 6
    assert same(*seen)


def test_gradients_that_do_not_fit_are_refused() -> None:
    from lightning_distopt.errors import PipelineError

    engine = InProcessPipeline(blocks(2), LOSS, StalenessPlan.preset("dsp", 2), SGD)
    stage = engine.stages[0]
    stage.forward(0, next(batches_of(1))[0])
    with pytest.raises(PipelineError, match=r"gradients .*\(5, 5\).*outputs .*\(5, 6\)"):
        stage.backward(0, [torch.zeros(5, 5, dtype=torch.float64)])


def test_layers_pass_masks_and_skips_along() -> None:
    class Split(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return {"h": super().forward(x).tanh(), "skip": x, "mask": x > 0, "note": "as it is"}

    class Use(nn.Linear):
        def forward(self, parts: Any) -> Any:
            assert parts["note"] == "as it is"
            assert parts["mask"].dtype is torch.bool
            return {**parts, "h": super().forward(parts["h"] * parts["mask"]).tanh()}

    class Join(nn.Linear):
        def forward(self, parts: Any) -> Tensor:
            return super().forward(parts["h"] + parts["skip"])

    def made() -> list[nn.Module]:
        torch.manual_seed(2)
        return [Split(6, 6).double(), Use(6, 6).double(), Join(6, 4).double()]

    ours, theirs = made(), made()
    for plan in (StalenessPlan.preset(name, 3) for name in ("naive", "ddg", "dsp")):
        engine = InProcessPipeline(ours, LOSS, plan, SGD)
        assert engine.run(batches_of(6)) == simulate(theirs, LOSS, batches_of(6), plan, SGD)
        assert same(weights(ours), weights(theirs))


def test_the_rest_of_the_process_draws_as_before() -> None:
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    InProcessPipeline(blocks(2, dropout=0.5), LOSS, StalenessPlan.preset("dsp", 2), SGD).run(batches_of(3))
    assert torch.equal(torch.rand(3), expected)
