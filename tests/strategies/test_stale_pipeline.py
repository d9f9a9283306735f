"""Pipelines with stale gradients in the Trainer, on real processes, against the simulator: bit for bit."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_distopt import DSPStrategy, LayeredModule, StalePipelineStrategy
from lightning_distopt.model_parallel import StalenessPlan
from lightning_distopt.model_parallel.stage import Stage
from tests.strategies.fits import At, Failures, State, trainer
from tests.strategies.pipelines import MOMENTUM, Chain, Predicts, equal, fit_pipeline, simulated

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*was called without a model:UserWarning"),
]


HOP = ("bytes_forward", "bytes_back", "queue_forward", "queue_back")


def stale(plan: Any = "dsp", **options: Any) -> StalePipelineStrategy:
    return StalePipelineStrategy(plan, **{"start_method": "fork", "timeout": 20, "balance": "layers", **options})


# --- equal to the simulator -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "devices"),
    [("naive", 2), ("ddg", 3), ("features_replay", 2), ("pipedream", 2), ("pipedream_2bw", 2), ("dsp", 4)],
)
def test_a_fit_is_the_simulation_bit_for_bit(name: str, devices: int) -> None:
    """Momentum, weight decay, dropout, batch norm, two drained epochs."""
    plan = StalenessPlan.preset(name, devices)
    expected, _ = simulated(Chain(4, batches=6), plan, epochs=2, cuts=[4 * k // devices for k in range(1, devices)])
    assert equal(fit_pipeline(Chain(4, batches=6), stale(name), devices, max_epochs=2), expected)


@pytest.mark.parametrize(
    "plan", [StalenessPlan.preset("ouroboros", 3), StalenessPlan.preset("dsp", 4, placement=(0, 1, 0, 1))], ids=str
)
def test_a_worker_may_have_several_stages(plan: StalenessPlan) -> None:
    """Ouroboros: first and last stage on one process, the middle on another; and stages that take turns."""
    expected, _ = simulated(Chain(plan.stages, batches=7), plan)
    assert equal(fit_pipeline(Chain(plan.stages, batches=7), stale(plan), 2), expected)


def test_delays_schedules_clipping_losses_and_a_short_last_batch() -> None:
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.5)
    module = partial(Chain, 3, batches=9, schedule=schedule, last=2)
    plan = StalenessPlan.preset("dsp(2,2,0;6,3,0)")
    expected, losses = simulated(module(), plan, epochs=2, clip=0.5, scheduler=schedule)

    def check(trainer: Trainer, module: Any) -> None:
        assert module.seen["train"] == losses  # on every rank, in order, none missing
        assert trainer.global_step == 18
        assert trainer.strategy.updates == 18
        assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 18
        assert {"pipeline/bubble_fraction", "pipeline/queue_depth"} <= trainer.callback_metrics.keys()
        for hop in range(2):  # every rank knows all of them
            hops = {name: trainer.callback_metrics[f"pipeline/hop_{hop}/{name}"] for name in HOP}
            assert hops["bytes_forward"] > 5 * 6 * 8  # a batch of float64
            assert 0 <= hops["queue_back"] <= plan.staleness[hop] + 2
            assert 0 < hops["queue_forward"] <= plan.staleness[hop] + 2
        assert trainer.callback_metrics["pipeline/staleness"] == plan.staleness[trainer.global_rank]

    strategy = DSPStrategy([2, 2], staleness=[6, 3, 0], start_method="fork", timeout=20, balance="layers")
    found = fit_pipeline(
        module(), strategy, max_epochs=2, gradient_clip_val=0.5, log_every_n_steps=2, callbacks=[At(train_end=check)]
    )
    assert equal(found, expected)


def test_a_fit_that_ends_inside_of_an_epoch_logs_all_its_losses() -> None:
    def check(trainer: Trainer, module: Any) -> None:
        assert len(module.seen["train"]) == trainer.global_step == 5

    trainer(stale(), 5, 3, max_epochs=2, callbacks=[At(train_end=check)]).fit(Chain(3, batches=8))


def test_a_stage_may_have_nothing_to_train() -> None:
    """And a clipped norm of nothing is no warning."""
    module = Chain(2, batches=4, norm=False)
    module.layers = nn.Sequential(nn.Flatten(), *module.layers)
    module.layers[1].requires_grad_(False)
    before = module.layers[1][0].weight.clone()
    found = fit_pipeline(module, stale(), 3, gradient_clip_val=0.5)
    assert torch.equal(found["layers.1.0.weight"], before)


def test_a_fit_exports_its_timeline(tmp_path: Path) -> None:
    def check(trainer: Trainer, module: Any) -> None:
        trainer.strategy.save_trace(tmp_path / "trace.json")

    fit_pipeline(Chain(2, batches=4), stale(trace=True), 2, callbacks=[At(train_end=check)])
    found = json.loads((tmp_path / "trace.json").read_text())
    events = [e for e in found["traceEvents"] if e["ph"] == "X"]
    assert sorted(e["name"] for e in events) == sorted(
        f"{kind}{b}" for kind in "FB" for b in range(4) for _ in range(2)
    )
    names = [e["args"]["name"] for e in found["traceEvents"] if e["name"] == "process_name"]
    assert all("idle" in name for name in names)
    assert set(found["otherData"]["idle_fraction"]) == {"worker 0", "worker 1"}


def test_epoch_schedules_step_when_the_epoch_is_learned_from() -> None:
    schedule = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)

    def check(trainer: Trainer, module: Any) -> None:
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 / 8)

    for drain in (True, False):
        module = Chain(2, batches=4, schedule=schedule, interval="epoch")
        strategy = stale("dsp", drain_every_epoch=drain)
        fit_pipeline(module, strategy, 2, max_epochs=3, callbacks=[At(fit_end=check)])


def test_a_run_that_never_drains_is_one_long_run() -> None:
    one = Chain(2, batches=10)
    plan = StalenessPlan.preset("dsp", 2, accumulate=3)
    expected, _ = simulated(one, plan)
    two = Chain(2, batches=10)
    two.data = two.data[:5]

    def second(trainer: Trainer, module: Any) -> None:
        module.data[:] = Chain(2, batches=10).data[5:]

    strategy = stale("dsp", accumulate=3, drain_every_epoch=False)
    found = fit_pipeline(two, strategy, 2, max_epochs=2, callbacks=[At(train_epoch_end=second)])
    assert equal(found, expected)


def test_validation_in_the_middle_drains_and_all_ranks_see_the_same() -> None:
    def check(trainer: Trainer, module: Any) -> None:
        assert len(module.seen["val"]) == 6
        gathered: list[Any] = [None] * 2
        assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(sum(module.seen["val"][3:]) / 3, rel=1e-5)
        torch.distributed.all_gather_object(gathered, module.seen["val"])
        assert gathered[0] == gathered[1]

    module = Chain(2, batches=6, validation=3)
    plan = StalenessPlan.preset("dsp", 2)
    expected = Chain(2, batches=6)
    from lightning_distopt.model_parallel.simulate import Simulation

    simulation = Simulation(list(expected.layers), nn.functional.cross_entropy, plan, MOMENTUM)
    simulation.run(expected.data[:3])
    simulation.run(expected.data[3:])
    found = fit_pipeline(module, stale(), 2, val_check_interval=3, limit_val_batches=3, callbacks=[At(train_end=check)])
    assert equal(found, expected.state_dict())


@pytest.mark.parametrize("late", ["tick", "random"])
def test_sleeping_stages_change_no_weight(late: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Stage.forward

    def slow(self: Stage, batch: int, x: Any, target: Any = None) -> Any:
        if late == "random" or (self.index == 1 and batch % 3 == 1):
            time.sleep(random.random() * 0.02)
        return inner(self, batch, x, target)

    monkeypatch.setattr(Stage, "forward", slow)
    plan = StalenessPlan.preset("dsp", 3)
    expected, _ = simulated(Chain(3, batches=10), plan)
    assert equal(fit_pipeline(Chain(3, batches=10), stale(latency_ms=3.0 if late == "tick" else 0.0)), expected)


class Tuples(LayeredModule):
    """Skips across cuts, a mask, and a loss with parameters."""

    def __init__(self, batches: int = 6) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)

            class Skip(nn.Linear):
                def forward(self, x: Any) -> Any:
                    h, skip, mask = x if isinstance(x, tuple) else (x, x, x > 0)
                    return super().forward(h * mask).tanh(), skip, mask

            class Head(nn.Linear):
                def forward(self, output: Any, target: Tensor) -> Tensor:
                    return nn.functional.cross_entropy(super().forward(output[0] + output[1]), target)

            self.layers = nn.ModuleList([Skip(6, 6).double() for _ in range(2)])
            self.loss = Head(6, 4).double()
        self.data = Chain(2, batches=batches).data

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.data, batch_size=None)


def test_tuples_and_a_loss_with_parameters() -> None:
    from lightning_distopt.model_parallel import simulate

    expected = Tuples()
    make = partial(torch.optim.Adam, lr=0.01)
    simulate(list(expected.layers), expected.loss, expected.data, StalenessPlan.preset("dsp", 2), make)
    found = fit_pipeline(Tuples(), stale(), 2)
    assert equal(found, expected.state_dict())
    assert "loss.weight" in found


# --- the same module elsewhere --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["auto", "ddp_fork", "compressed_ddp_fork"])
def test_the_same_module_trains_in_one_process_and_under_ddp(strategy: str) -> None:
    devices = 1 if strategy == "auto" else 2
    module = Chain(2, batches=4, norm=False, dropout=0.0, validation=2)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = fit_pipeline(module, strategy, devices, limit_val_batches=2)
    assert found.keys() == before.keys()
    assert not equal(found, before)


def test_one_process_alone_is_plain_training() -> None:
    module, other = (Chain(2, batches=5, norm=False, dropout=0.0) for _ in range(2))
    fit_pipeline(module, "auto", 1)
    assert equal(fit_pipeline(other, stale("naive"), 1), module.state_dict())


# --- evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 3])
def test_validate_test_and_predict_without_a_fit(devices: int) -> None:
    module = Chain(3, batches=4, validation=4)
    module.eval()
    with torch.no_grad():
        outputs = [module(x) for x, _ in module.data]
        losses = [float(module.loss(o, y)) for o, (_, y) in zip(outputs, module.data, strict=True)]
    made = trainer(stale(), devices=devices, limit_val_batches=4)
    assert made.validate(module, verbose=False)[0]["val/loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    made = trainer(stale(), devices=devices)
    assert made.test(module, verbose=False)[0]["test/loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    made = trainer(stale(), devices=devices, callbacks=[Predicts(outputs)])
    made.predict(module, return_predictions=False)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def saved_at(folder: Path, devices: int, strategy: Any, epochs: int = 1, **module: Any) -> tuple[Path, State]:
    """Fit and save at each epoch's end."""
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    chain = Chain(4, batches=5, **module)
    state = fit_pipeline(chain, strategy, devices, max_epochs=epochs, callbacks=[saver], enable_checkpointing=True)
    return folder / f"epoch={epochs - 1}.ckpt", state


@pytest.mark.parametrize("make", [MOMENTUM, partial(torch.optim.Adam, lr=0.01)], ids=["momentum", "adam"])
def test_a_resumed_run_continues_bit_for_bit(make: Any, tmp_path: Path) -> None:
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.5)
    chain = partial(Chain, 4, batches=5, make=make, schedule=schedule)
    whole = fit_pipeline(chain(), stale(), 2, max_epochs=3)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}")
    fit_pipeline(chain(), stale(), 2, max_epochs=1, callbacks=[saver], enable_checkpointing=True)
    resumed = chain()
    trainer(stale(), -1, 2, max_epochs=3).fit(resumed, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert equal(resumed.state_dict(), whole)


def test_a_checkpoint_is_an_ordinary_one(tmp_path: Path) -> None:
    """Whole weights and optimizer state under one device's numbers and names; loads on one device and other stages."""
    path, state = saved_at(tmp_path, 3, stale())
    content = torch.load(path, weights_only=True)
    assert equal(content["state_dict"], state)
    (optimizer,) = content["optimizer_states"]
    names = [name for name, _ in Chain(4).named_parameters()]
    assert optimizer["param_groups"][0]["param_names"] == names
    assert list(optimizer["state"]) == list(range(len(names)))
    assert content["global_step"] == 5

    # No step: what was loaded is what is there.
    def check(trainer: Trainer, module: Any) -> None:
        kept = dict(module.named_parameters())
        for group in trainer.optimizers[0].param_groups:
            for p in group["params"]:
                name = next(n for n, q in kept.items() if q is p)
                loaded = trainer.optimizers[0].state[p]["momentum_buffer"]
                assert torch.equal(loaded, optimizer["state"][names.index(name)]["momentum_buffer"]), name

    for strategy, devices in (("auto", 1), (stale("ddg"), 2), (stale("naive"), 4)):
        other = Chain(4, batches=5)
        trainer(strategy, -1, devices, max_epochs=2, callbacks=[At(train_start=check)]).fit(other, ckpt_path=path)


def test_a_single_devices_checkpoint_resumes_in_a_pipeline(tmp_path: Path) -> None:
    quiet = {"norm": False, "dropout": 0.0}
    path, _ = saved_at(tmp_path, 1, "auto", **quiet)
    alone, piped = Chain(4, batches=5, **quiet), Chain(4, batches=5, **quiet)
    trainer("auto", -1, 1, max_epochs=2).fit(alone, ckpt_path=path)

    def check(trainer: Trainer, module: Any) -> None:
        assert (trainer.strategy.updates, trainer.strategy.clock.epochs) == (5, 1)  # steps were updates there

    made = trainer(stale("naive"), -1, 2, max_epochs=2, callbacks=[At(train_start=check)])
    made.fit(piped, ckpt_path=path)
    assert equal(alone.state_dict(), piped.state_dict())


# --- rescheduling, non-finite gradients -----------------------------------------------------------------------------


def test_pipemares_rates_rise_with_the_updates() -> None:
    rates: list[float] = []

    class Seen(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    def check(trainer: Trainer, module: Any) -> None:
        tau = max(1, trainer.strategy.plan.staleness[trainer.global_rank])
        assert rates == pytest.approx([tau ** -(1 - min(u / 4, 1)) for u in range(6)])
        assert trainer.optimizers[0].param_groups[0]["lr"] == 1.0

    module = Chain(3, batches=6, make=partial(Seen, lr=1.0))
    fit_pipeline(module, stale(lr_rescale_steps=4), callbacks=[At(train_end=check)])


class Bad(nn.Module):
    """Gives NaN gradients in one batch, and only to what is before it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            self.calls += 1
            if self.calls == 3:
                x.register_hook(lambda g: g * float("nan"))
        return x * self.weight


@pytest.mark.filterwarnings("ignore:Stage 0")
def test_a_stage_skips_what_is_not_finite_and_the_others_go_on() -> None:
    def check(trainer: Trainer, module: Any) -> None:
        assert trainer.strategy.skipped == (1 if trainer.global_rank == 0 else 0)
        assert trainer.strategy.updates == 6
        assert all(p.isfinite().all() for p in module.parameters())

    module = Chain(2, batches=6, norm=False)
    module.layers = nn.Sequential(module.layers[0], nn.Sequential(Bad(), module.layers[1]))
    fit_pipeline(module, stale(), 2, callbacks=[At(train_end=check)])


def test_or_raises_if_asked_to() -> None:
    module = Chain(2, batches=6, norm=False)
    module.layers = nn.Sequential(module.layers[0], nn.Sequential(Bad(), module.layers[1]))
    with pytest.raises(Exception, match=r"NonFiniteError: Stage 0 on rank 0 got a gradient that is not finite"):
        fit_pipeline(module, stale(non_finite="raise"), 2)


def test_a_hanging_stage_ends_the_fit_with_one_typed_error_a_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = Stage.forward

    def hang(self: Stage, batch: int, x: Any, target: Any = None) -> Any:
        if self.index == 1 and batch == 3:
            time.sleep(2.5)
        return inner(self, batch, x, target)

    monkeypatch.setattr(Stage, "forward", hang)
    errors = Failures(tmp_path).fit(Chain(2, batches=8), stale(timeout=1))
    assert len(errors) == 2
    assert errors[0].startswith("PipelineError: Stage 0 on rank 0 could not receive the gradients of batch")
    assert "from rank 1 within 1 s" in errors[0]
    assert "rank 1 late, it is in" in errors[0]
    assert errors[1].startswith("PipelineError: Stage 1 on rank 1 could not")


# --- what is refused ------------------------------------------------------------------------------------------------


class OwnStep(Chain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx)


class Stray(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.stray = nn.Linear(2, 2)


class Tied(Chain):
    def __init__(self) -> None:
        super().__init__(3, norm=False, dropout=0.0)
        self.layers[1][0].weight = self.layers[0][0].weight


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        (OwnStep, {}, "OwnStep.training_step"),
        (Stray, {}, "stray.weight"),
        (Tied, {}, "layers.0.0.weight.*stage 0.*layers.1.0.weight.*stage 1"),
        (Chain, {"accumulate_grad_batches": 2}, "accumulate_grad_batches=2"),
        (Chain, {"sync_batchnorm": True}, "sync_batchnorm"),
        (Chain, {"callbacks": [StochasticWeightAveraging(0.1)]}, "StochasticWeightAveraging"),
        (Chain, {"callbacks": [OnExceptionCheckpoint("x")], "enable_checkpointing": True}, "OnExceptionCheckpoint"),
        (Chain, {"devices": 4}, "4 stages|from 1 to the number of layers"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(module: Any, arguments: dict[str, Any], words: str) -> None:
    arguments = {"devices": 3, **arguments}
    with pytest.raises(Exception, match=words):
        fit_pipeline(module(), stale(), **arguments)


def test_what_rank_0_finds_wrong_is_raised_on_all_ranks(tmp_path: Path) -> None:
    errors = Failures(tmp_path).fit(Chain(3), stale(memory_limit_mb=1e-5))
    assert len(errors) == 2
    assert all(re.match(r"ValueError: `memory_limit_mb` .*got 1e-05", error) for error in errors)


def test_arguments_are_checked_at_once() -> None:
    for wrong in (3, "1", ["a"]):
        with pytest.raises(TypeError, match="cuts"):
            DSPStrategy(cuts=wrong)
    with pytest.raises(ValueError, match=r"cuts.*\[5, 2\]"):
        DSPStrategy(cuts=[5, 2])
    with pytest.raises(TypeError, match="plan"):
        StalePipelineStrategy(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="forward_delays"):
        DSPStrategy(1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="start_method"):
        DSPStrategy(start_method="thread")
    with pytest.raises(ValueError, match="gpipe"):
        StalePipelineStrategy("gpipe")
    with pytest.raises(ValueError, match="staleness"):
        DSPStrategy(staleness=[1, 2, 0])
    with pytest.raises(ValueError, match="timeout"):
        DSPStrategy(timeout=0)
    with pytest.raises(ValueError, match="non_finite"):
        DSPStrategy(non_finite="ignore")
    scaling = Precision()
    scaling.precision = "16-mixed"  # type: ignore[assignment]
    with pytest.raises(MisconfigurationException, match="16-mixed"):
        DSPStrategy(precision_plugin=scaling)


def test_devices_must_fit_the_plan() -> None:
    with pytest.raises(Exception, match=r"multiple.*2 for 3"):
        fit_pipeline(Chain(3), stale("dsp(1,1,0;4,2,0)"), 2)


# --- other ways to start --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_by_spawn_are_the_simulation_too() -> None:
    """Strategy, plan and trainer are pickled."""
    expected, _ = simulated(Chain(2, batches=5), StalenessPlan.preset("dsp", 2))
    assert equal(fit_pipeline(Chain(2, batches=5), stale(start_method="spawn", timeout=60), 2), expected)


SCRIPT = """
import sys
import torch
import lightning_distopt
from lightning_distopt.model_parallel import StalenessPlan
from lightning_distopt.model_parallel.stage import Stage
from tests.strategies.fits import trainer
from tests.strategies.pipelines import Chain, equal, simulated

if __name__ == "__main__":
    module = Chain(2, batches=5)
    made = trainer(lightning_distopt.DSPStrategy(balance="layers"), -1, 2, max_epochs=1)
    made.fit(module)
    expected, _ = simulated(Chain(2, batches=5), StalenessPlan.preset("dsp", 2))
    assert equal(dict(module.state_dict()), expected), made.global_rank  # every process has the whole model
    print("equal on rank", made.global_rank)
"""


@pytest.mark.slow
def test_processes_by_running_the_script_again(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert "equal on rank 0" in ended.stdout
