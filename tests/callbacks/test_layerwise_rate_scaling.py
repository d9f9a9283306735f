"""Fits with per-tensor rates: what an explicit loop over tensors does, on one device and on several."""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_distopt.callbacks import LayerwiseRateScaling
from lightning_distopt.optimizers import RSGD
from tests.strategies.fits import Agree, At, compressed, distance, fit
from tests.strategies.models import BATCH, Manual, Net, data, network
from tests.strategies.test_resume import epochs, saving

pytestmark = [
    pytest.mark.filterwarnings("ignore:`LayerwiseRateScaling` got . probes"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

Scaling = partial(LayerwiseRateScaling, heat_map=False)
STEPS = 6


def momentum(params: Any, **arguments: Any) -> Optimizer:
    return SGD(params, **{"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01, **arguments})


def micro_batches(rank: int = 0, batches: int = 5) -> list[tuple[Tensor, Tensor]]:
    return list(DataLoader(data(rank, batches), batch_size=BATCH))


def gradients(net: nn.Module, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(nn.functional.mse_loss(net(batch[0]), batch[1]), list(net.parameters())))


def skipped(name: str) -> bool:
    return name.startswith("1.") or name.endswith("bias")  # layer 1 is the BatchNorm


def reference(
    windows: list[list[list[tuple[Tensor, Tensor]]]],
    optimizer: Callable[[Any], Optimizer],
    eta: float = 0.01,
    clip: float = 0.1,
    rank_norms: bool = False,
) -> dict[str, Tensor]:
    """CLARS by hand: for each step, rank and micro-batch a gradient; one group a tensor, its rate set before the step."""
    net = network()
    groups = [{"params": [p]} for p in net.parameters()]
    stepper = optimizer(groups)
    rates = [group["lr"] for group in stepper.param_groups]
    for ranks in windows:
        found = [[gradients(net, batch) for batch in micro] for micro in ranks]
        local = [[torch.stack(g).mean(0) for g in zip(*each, strict=True)] for each in found]
        probes = local if rank_norms else [g for each in found for g in each]
        for k, (name, p) in enumerate(net.named_parameters()):
            p.grad = torch.stack([g[k] for g in local]).mean(0)
            n = torch.stack([g[k].norm() for g in probes]).mean()
            s = 1.0 if skipped(name) else min(clip, eta * float(p.detach().norm() / n))
            stepper.param_groups[k]["lr"] = rates[k] * s
        stepper.step()
    return {f"net.{name}": value for name, value in net.state_dict().items()}


def parameters_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    # BatchNorm takes the bias before it away: its gradient is rounding, which Adam makes a step of
    return {n: v for n, v in state.items() if not n.endswith(("running_mean", "running_var", "tracked", "0.bias"))}


def assert_near(state: dict[str, Tensor], expected: dict[str, Tensor], within: float = 2e-6) -> None:
    assert distance(parameters_of(state), parameters_of(expected)) < within
    assert distance(parameters_of(state), parameters_of(Net().state_dict())) > 1e-3  # something moved


# --- the same as by hand ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer", [momentum, partial(momentum, nesterov=True), partial(AdamW, lr=0.05), partial(SGD, lr=0.5, fused=True)]
)
def test_on_one_device_each_tensor_steps_at_its_own_rate(optimizer: Callable[[Any], Optimizer]) -> None:
    state = fit(Net(optimizer=optimizer), "auto", 5, devices=1, callbacks=[Scaling()])
    assert_near(state, reference([[[batch]] for batch in micro_batches()], optimizer))


@pytest.mark.parametrize("probe", ["micro", "rank"])
def test_accumulation_takes_the_norm_of_each_micro_batch_or_of_their_mean(probe: Any) -> None:
    batches = micro_batches(batches=6)
    windows = [[batches[i : i + 3]] for i in (0, 3)]
    state = fit(
        Net(batches=6, optimizer=momentum), "auto", 2, devices=1, accumulate_grad_batches=3, callbacks=[Scaling(probe=probe)]
    )  # fmt: skip
    assert_near(state, reference(windows, momentum, rank_norms=probe == "rank"))


@pytest.mark.parametrize("probe", ["micro", "rank"])
@pytest.mark.parametrize("strategy", ["ddp_fork", "gradients"])
def test_on_two_ranks_norms_are_averaged_and_weights_stay_equal(strategy: str, probe: Any) -> None:
    ranks = [micro_batches(rank, 4) for rank in (0, 1)]
    windows = [[each[i : i + 2] for each in ranks] for i in (0, 2)]
    found = compressed(compressor="fp32", error_feedback="none") if strategy == "gradients" else strategy
    state = fit(
        Net(batches=4, optimizer=momentum), found, 2, accumulate_grad_batches=2, callbacks=[Scaling(probe=probe), Agree()]
    )  # fmt: skip
    assert_near(state, reference(windows, momentum, rank_norms=probe == "rank"), within=1e-5)


def test_where_updates_are_exchanged_all_ranks_use_the_mean_norm_of_local_gradients() -> None:
    """Each rank steps by its own gradient at the common rate; for SGD and an exact exchange that is CLARS by ranks."""
    ranks = [micro_batches(rank) for rank in (0, 1)]
    windows = [[[each[i]] for each in ranks] for i in range(5)]

    def check(trainer: Trainer, module: Net) -> None:
        assert trainer.strategy.meter.sent["layer rates"] > 0
        (scaling,) = [callback for callback in trainer.callbacks if isinstance(callback, LayerwiseRateScaling)]
        assert all(rho != rho for watched in scaling._watched.values() for _, _, rho in watched.figures)

    callbacks = [Scaling(probe="rank"), Agree(), At(train_batch_end=check)]
    state = fit(Net(optimizer=momentum), compressed(compressor="fp32"), 5, callbacks=callbacks)
    assert_near(state, reference(windows, momentum, rank_norms=True), within=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"compressor": "topk:0.2", "sync_every": 2}])
def test_ranks_agree_where_compressed_updates_are_exchanged(arguments: dict[str, Any]) -> None:
    callbacks = [Scaling()] if "sync_every" in arguments else [Scaling(), Agree()]
    fit(Net(optimizer=momentum), compressed(**arguments), 6, callbacks=callbacks)


def test_probes_every_few_steps_and_their_running_mean() -> None:
    """n is updated in steps 0, 2 and 4, as a mean that is corrected for its start."""
    net, beta, norm, weight = network(), 0.6, {}, 0.0
    stepper = momentum([{"params": [p]} for p in net.parameters()])
    for step, batch in enumerate(micro_batches()):
        if step % 2 == 0:
            weight = beta * weight + 1 - beta
        for k, ((name, p), g) in enumerate(zip(net.named_parameters(), gradients(net, batch), strict=True)):
            if step % 2 == 0:
                norm[name] = beta * norm.get(name, 0.0) + (1 - beta) * float(g.norm())
            p.grad = g
            s = 1.0 if skipped(name) else min(0.1, 0.01 * float(p.detach().norm()) * weight / norm[name])
            stepper.param_groups[k]["lr"] = 0.5 * s
        stepper.step()
    state = fit(Net(optimizer=momentum), "auto", 5, devices=1, callbacks=[Scaling(probe_every=2, probe_ema=beta)])
    assert_near(state, {f"net.{name}": value for name, value in net.state_dict().items()})


# --- LARS ------------------------------------------------------------------------------------------------------------


class Golden(pl.LightningModule):
    """One tensor w = (3, 4) whose gradient is (0.7, 0.1) in every step, from two micro-batches."""

    def __init__(self, optimizer: Callable[[Any], Optimizer], scheduler: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
        self.make, self.scheduler = optimizer, scheduler

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (batch[0].mean(0) * self.weight).sum()

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        return [optimizer], [] if self.scheduler is None else [self.scheduler(optimizer)]

    def train_dataloader(self) -> DataLoader[Any]:
        probes = torch.tensor([[0.6, 0.8], [0.8, -0.6]], dtype=torch.float64)
        return DataLoader(TensorDataset(probes.repeat(4, 1)), batch_size=1)


@pytest.mark.parametrize(
    ("scaling", "decay", "expected"),
    [
        (partial(Scaling, mode="authors", skip="none", first_step_eta=0.01), 0.0, (2.98985335, 3.99855048)),
        (partial(Scaling, mode="authors", skip="none", first_step_eta=0.01), 2e-4, (2.98984466, 3.99853888)),
        (partial(Scaling, "lars"), 5e-4, (2.99856660, 3.99979158)),
        (partial(Scaling, "lars", rate_in_momentum=False), 0.0, (2.99856464, 3.99979495)),
    ],
)
def test_the_golden_numbers_after_two_steps(
    scaling: Callable[[], LayerwiseRateScaling], decay: float, expected: tuple[float, float]
) -> None:
    module = Golden(partial(SGD, lr=0.1, momentum=0.9, weight_decay=decay))
    fit(module, "auto", 2, devices=1, accumulate_grad_batches=2, callbacks=[scaling()])
    assert module.weight.tolist() == pytest.approx(expected, abs=1e-8)


def test_the_rate_inside_the_momentum_is_the_papers_form_also_where_the_rate_changes() -> None:
    halving = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    module = Golden(partial(SGD, lr=0.1, momentum=0.9), lambda o: {"scheduler": halving(o), "interval": "step"})
    fit(module, "auto", 3, devices=1, accumulate_grad_batches=2, callbacks=[Scaling("lars")])
    w, v = torch.tensor([3.0, 4.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    g = torch.tensor([0.7, 0.1], dtype=torch.float64)
    for lr in (0.1, 0.05, 0.025):
        v = 0.9 * v + lr * 0.001 * w.norm() / g.norm() * g
        w = w - v
    assert module.weight.tolist() == pytest.approx(w.tolist(), abs=1e-12)
    assert module.weight.grad is None or module.weight.grad.tolist() == pytest.approx(g.tolist())  # not scaled any more


def test_lars_with_everything_skipped_is_the_optimizer_alone() -> None:
    alone = fit(Net(optimizer=momentum), "auto", 5, devices=1)
    for inside in (True, False):
        scaling = Scaling("lars", rate_in_momentum=inside, skip=lambda name, parameter: True)
        state = fit(Net(optimizer=momentum), "auto", 5, devices=1, callbacks=[scaling])
        assert distance(state, alone) < (1e-6 if inside else 1e-12)


# --- nobody else sees it ---------------------------------------------------------------------------------------------


def test_monitors_schedulers_and_checkpoints_see_the_base_rate(tmp_path: Path) -> None:
    seen: list[float] = []

    def look(trainer: Trainer, module: Net) -> None:
        (optimizer,) = trainer.optimizers
        seen.append(optimizer.param_groups[0]["lr"])
        assert len(optimizer.param_groups) == 1
        assert len(optimizer.param_groups[0]["params"]) == 6
        assert [group["lr"] for group in optimizer.state_dict()["param_groups"]] == [seen[-1]]

    fit(
        Net(optimizer=momentum, step_size=2), "auto", 5, devices=1, log_every_n_steps=1,
        logger=CSVLogger(tmp_path, "", ""), callbacks=[LearningRateMonitor(), Scaling(), At(train_batch_end=look)],
    )  # fmt: skip
    assert seen == [0.5, 0.25, 0.25, 0.125, 0.125]
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert {float(row["lr-SGD"]) for row in rows if row["lr-SGD"]} == {0.5, 0.25, 0.125}
    rates = [row for row in rows if row.get("layer_rates/net.0.weight")]
    assert len(rates) == 5
    assert float(rates[-1]["layer_rates/net.0.bias"]) == 0.125  # skipped: the whole rate
    assert all(0 < float(row["layer_rates/net.0.weight"]) < 0.05 for row in rates)
    assert all(float(row["layer_rho/net.0.weight"]) == pytest.approx(1.0, rel=1e-5) for row in rates)  # one probe
    assert {float(row["layer_rates_probes/count"]) for row in rates} == {1.0}
    assert {float(row["layer_rates_probes/batch_size"]) for row in rates} == {float(BATCH)}


def test_a_step_that_fails_leaves_the_groups_as_they_were() -> None:
    class Failing(SGD):
        def step(self, closure: Any = None) -> Any:
            closure()
            assert len(self.param_groups) > 1
            raise ArithmeticError("in the update")

    kept: list[Optimizer] = []

    def make(params: Any) -> Optimizer:
        kept.append(Failing(params, lr=0.5))
        return kept[0]

    with pytest.raises(ArithmeticError):
        fit(Net(optimizer=make), "auto", 1, devices=1, callbacks=[Scaling()])
    assert [group["lr"] for group in kept[0].param_groups] == [0.5]


def test_what_an_optimizer_notes_in_its_group_is_kept() -> None:
    class Counting(SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            for group in self.param_groups:
                group["count"] = group.get("count", 0) + 1
            return loss

    counts: list[int] = []
    fit(
        Net(optimizer=partial(Counting, lr=0.5)), "auto", 3, devices=1,
        callbacks=[Scaling(), At(train_batch_end=lambda t, m: counts.append(t.optimizers[0].param_groups[0]["count"]))],
    )  # fmt: skip
    assert counts == [1, 2, 3]


def test_a_resumed_fit_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def scaling() -> LayerwiseRateScaling:
        return Scaling(probe_every=2, probe_ema=0.9)

    module = partial(Net, optimizer=partial(Adam, lr=0.05))
    whole = epochs(module(), "ddp_fork", 2, callbacks=[scaling()])
    save = saving(tmp_path)
    epochs(module(), "ddp_fork", 1, **{**save, "callbacks": [scaling(), *save["callbacks"]]})
    resumed = epochs(module(), "ddp_fork", 2, tmp_path / "epoch=0.ckpt", callbacks=[scaling()])
    assert distance(resumed, whole) == 0


# --- precision, clipping, several optimizers, odd parameters ---------------------------------------------------------


def test_mixed_precision_takes_norms_of_unscaled_gradients() -> None:
    plain = fit(Net(optimizer=momentum), "auto", 5, devices=1, callbacks=[Scaling()])
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

    class Exact(MixedPrecision):  # with loss scaling, without half precision, to compare numbers
        def autocast_context_manager(self) -> Any:
            return torch.autocast("cpu", enabled=False)

    mixed = Exact("16-mixed", "cpu", scaler)
    state = fit(Net(optimizer=momentum), "auto", 5, devices=1, plugins=[mixed], callbacks=[Scaling()])
    assert distance(parameters_of(state), parameters_of(plain)) < 1e-6


def test_a_skipped_overflow_leaves_no_norm_behind() -> None:
    class Overflowing(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 2 else loss

    mixed = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    scaling = Scaling()
    state = fit(Overflowing(optimizer=momentum), "auto", 5, devices=1, plugins=[mixed], callbacks=[scaling])
    assert all(value.isfinite().all() for name, value in parameters_of(state).items())
    assert scaling.dropped == 0


def test_a_probe_that_is_not_finite_is_dropped_and_counted() -> None:
    class Once(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if batch_idx == 1 else loss

        def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
            for p in self.parameters():
                p.grad = torch.ones_like(p)

    scaling = Scaling()
    fit(Once(batches=4, optimizer=momentum), "auto", 1, devices=1, accumulate_grad_batches=4, callbacks=[scaling])
    assert (scaling.dropped, scaling.count) == (1, 3)


def test_bf16_mixed_works() -> None:
    fit(Net(optimizer=momentum), "auto", 3, devices=1, precision="bf16-mixed", callbacks=[Scaling()])


def test_several_optimizers_in_manual_optimization_each_have_their_rates() -> None:
    class Two(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [momentum(self.net[0].parameters()), momentum(self.net[1:].parameters())]

    state = fit(Two(), "auto", 10, devices=1, callbacks=[Scaling()])  # `max_steps` counts both optimizers' steps
    net, buffers = network(), {}
    for batch in micro_batches():
        for part in (0, 1):
            for k, ((name, p), g) in enumerate(zip(net.named_parameters(), gradients(net, batch), strict=True)):
                if (k < 2) == (part == 0):
                    s = 1.0 if skipped(name) else min(0.1, 0.01 * float(p.detach().norm() / g.norm()))
                    d = g + 0.01 * p.detach()
                    buffers[name] = 0.9 * buffers[name] + d if name in buffers else d
                    p.data -= 0.5 * s * buffers[name]
    assert_near(state, {f"net.{name}": value for name, value in net.state_dict().items()})


def test_frozen_tied_and_unused_parameters_have_one_rate_or_none() -> None:
    class Odd(Net):
        def __init__(self) -> None:
            super().__init__(optimizer=momentum)
            self.frozen, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)
            self.frozen.requires_grad_(False)
            self.twin = self.net[0]  # the same tensors under another name

        def configure_optimizers(self) -> Any:
            return momentum(self.parameters())

    module = Odd()
    before = copy.deepcopy(module.state_dict())
    rated: list[set[str]] = []

    def look(trainer: Trainer, module: Net) -> None:
        (scaling,) = [callback for callback in trainer.callbacks if isinstance(callback, LayerwiseRateScaling)]
        rated.append({name for watched in scaling._watched.values() for name, _, _ in watched.figures})

    state = fit(module, "auto", 5, devices=1, callbacks=[Scaling(), At(train_batch_end=look)])
    assert rated[-1] == {f"net.{name}" for name, _ in network().named_parameters()}
    for name in ("frozen.weight", "unused.weight"):
        assert torch.equal(state[name], before[name])
    expected = reference([[[batch]] for batch in micro_batches()], momentum)
    assert distance(parameters_of(expected), {n: v for n, v in parameters_of(state).items() if n in expected}) < 2e-6


def test_a_parameter_that_is_unfrozen_later_is_probed() -> None:
    class Thaw(Callback):
        def on_train_epoch_start(self, trainer: Trainer, module: Any) -> None:
            module.net[0].requires_grad_(trainer.current_epoch > 0)

    class All(Net):
        def configure_optimizers(self) -> Any:
            return momentum(self.parameters())

    counts: list[int] = []

    def look(trainer: Trainer, module: Net) -> None:
        (scaling,) = [callback for callback in trainer.callbacks if isinstance(callback, LayerwiseRateScaling)]
        counts.append(sum(len(watched.figures) for watched in scaling._watched.values()))
        assert float(scaling.count) == 1

    fit(All(batches=2), "auto", 4, devices=1, callbacks=[Thaw(), Scaling(), At(train_batch_end=look)])
    assert counts == [4, 4, 6, 6]


def test_rsgd_explores_at_per_tensor_rates() -> None:
    plain = fit(Net(optimizer=momentum), "auto", 5, devices=1, callbacks=[Scaling()])
    state = fit(
        Net(optimizer=lambda params: RSGD(momentum(params), "ema:0.5")), "auto", 5, devices=1, callbacks=[Scaling()]
    )
    assert distance(state, plain) == 0


def test_skipped_tensors_can_go_without_decay() -> None:
    class Still(Net):  # no gradient but that of the decay
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return 0.0 * super().training_step(batch, batch_idx)

    state = fit(Still(optimizer=momentum), "auto", 3, devices=1, callbacks=[Scaling(skip_decay=False)])
    assert torch.equal(state["net.0.bias"], network()[0].bias)
    assert not torch.equal(state["net.0.weight"], network()[0].weight)
    state = fit(Still(optimizer=momentum), "auto", 3, devices=1, callbacks=[Scaling()])
    assert not torch.equal(state["net.0.bias"], network()[0].bias)


# --- probes that make passes of their own ----------------------------------------------------------------------------


class Observed(Net):
    """Counts what a trace of an extra pass would be."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(dropout=0.5, optimizer=momentum, **arguments)
        self.metric = MeanMetric()
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.metric.update(loss.detach())
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen.append(float(self.metric.compute()))
        self.seen.append(float(torch.rand(())))


@pytest.mark.parametrize("probe", ["loader", "sample"])
def test_extra_passes_leave_no_trace(probe: Any) -> None:
    """With eta so large that the clip binds, the norms do not matter, and nothing else may."""
    arguments = {"devices": 1, "num_sanity_val_steps": 0}
    plain, probed = Observed(), Observed()
    binding = {"eta": 1e9, "clip": 0.1}
    torch.manual_seed(0)
    a = fit(plain, "auto", 5, callbacks=[Scaling(**binding)], **arguments)
    torch.manual_seed(0)
    b = fit(probed, "auto", 5, callbacks=[Scaling(**binding, probe=probe, probes=3, probe_batch_size=8)], **arguments)
    assert len(plain.seen) == len(probed.seen) == 10
    assert plain.seen == probed.seen
    assert distance(a, b) == 0


def test_statistics_of_batch_norm_see_the_probes_on_request() -> None:
    seen = {
        kind: fit(
            Net(optimizer=momentum), "auto", 2, devices=1,
            callbacks=[Scaling(eta=1e9, probe="loader", probes=3, bn_probe=kind)],
        )["net.1.num_batches_tracked"]
        for kind in ("freeze", "train")
    }  # fmt: skip
    assert {kind: int(value) for kind, value in seen.items()} == {"freeze": 2, "train": 8}


def test_per_sample_norms_are_those_of_vmap() -> None:
    """The slow loop against torch.func, on a network without BatchNorm."""
    torch.manual_seed(0)
    found: list[Tensor] = []

    class Plain(Net):
        def __init__(self) -> None:
            super().__init__(batches=1, optimizer=momentum)
            self.net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))

    module = Plain()
    params = {name: p.detach().clone() for name, p in module.net.named_parameters()}
    scaling = Scaling(probe="sample", probe_batch_size=1)

    def look(trainer: Trainer, module: Net) -> None:
        state = scaling.state_dict()["optimizers"][0]
        found.append(dict(zip(state["names"], state["values"].tolist(), strict=True)))

    fit(module, "auto", 1, devices=1, callbacks=[scaling, At(train_batch_end=look)])

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(torch.func.functional_call(module.net, params, (x[None],)), y[None])

    (batch,) = micro_batches(batches=1)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, *batch)
    for name, gradient in each.items():
        assert found[0][f"net.{name}"] == pytest.approx(float(gradient.flatten(1).norm(dim=1).mean()), rel=1e-5)
    assert scaling.count == BATCH


def test_a_loader_that_runs_dry_begins_anew() -> None:
    loader = DataLoader(data(5, 2), batch_size=BATCH)
    scaling = Scaling(probe="loader", probes=3, probe_loader=loader)
    fit(Net(optimizer=momentum), "auto", 3, devices=1, callbacks=[scaling])
    assert scaling.count == 3


def test_decay_in_the_norm_of_probes() -> None:
    norms = []
    for decayed in (False, True):
        scaling = Scaling(probe="loader", probes=1, probe_loader=DataLoader(data(5, 1), BATCH), decay_in_norm=decayed)
        values: list[Any] = []
        take = At(train_batch_end=lambda t, m: values.append(scaling.state_dict()["optimizers"][0]["values"]))  # noqa: B023
        fit(Net(optimizer=momentum), "auto", 1, devices=1, callbacks=[scaling, take])
        norms.append(values[0])
    net = network()
    (batch,) = list(DataLoader(data(5, 1), BATCH))
    plain = gradients(net, batch)
    decayed_ones = [g + 0.01 * p.detach() for g, p in zip(plain, net.parameters(), strict=True)]
    for got, expected in zip(norms, (plain, decayed_ones), strict=True):
        torch.testing.assert_close(got, torch.stack([g.norm() for g in expected]), rtol=1e-4, atol=1e-6)


def test_the_authors_mode_starts_with_the_eta_of_lars() -> None:
    assert Scaling(mode="authors").first_step_eta == 0.001
    assert (Scaling(mode="authors").skip.skip, Scaling(mode="authors").bn_probe) == ("name", "train")
    assert (Scaling().first_step_eta, Scaling().eta, Scaling("lars").eta, Scaling().clip) == (0.01, 0.01, 0.001, 0.1)
    assert (Scaling("lars").rate_in_momentum, Scaling().rate_in_momentum, Scaling("lars").clip) == (True, False, None)
