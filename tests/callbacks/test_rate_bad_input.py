"""What per-tensor rates cannot go with is refused before the first step, with the reason and the cure."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam
from torch.utils.data import DataLoader

from lightning_distopt.callbacks import LayerwiseRateScaling
from lightning_distopt.callbacks.rate_checks import strategy
from lightning_distopt.callbacks.rate_history import RateHistory
from lightning_distopt.callbacks.running_mean import RunningMean
from tests.strategies.fits import compressed, fit
from tests.strategies.models import BATCH, Manual, Net, data

Scaling = partial(LayerwiseRateScaling, heat_map=False)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"rule": "lamb"}, ValueError, "`rule` must be one of 'clars', 'lars': got 'lamb'"),
        ({"eta": 0}, ValueError, "`eta` must be above 0: got 0"),
        ({"eta": -0.1}, ValueError, "`eta` must be above 0: got -0.1"),
        ({"eta": float("nan")}, ValueError, "`eta` must be above 0: got nan"),
        ({"clip": 0}, ValueError, "`clip` must be above 0: got 0"),
        ({"probe": "layer"}, ValueError, "`probe` must be one of .*: got 'layer'"),
        ({"probe_every": 0}, ValueError, "`probe_every` must be an integer >= 1: got 0"),
        ({"probe_ema": 1.0}, ValueError, r"`probe_ema` must be in \[0, 1\): got 1.0"),
        ({"rate_in_momentum": 1}, TypeError, "`rate_in_momentum` must be True or False: got 1"),
        ({"skip": "bias"}, ValueError, "`skip` must be 'norm_bias', .*: got 'bias'"),
        ({"mode": "paper"}, ValueError, "`mode` must be one of 'default', 'authors': got 'paper'"),
        ({"probes": 0}, ValueError, "`probes` must be an integer >= 1: got 0"),
        ({"probe_batch_size": 2.5}, TypeError, "`probe_batch_size` must be an integer >= 1: got 2.5"),
        ({"probe_loader": [1]}, ValueError, "`probe_loader` is read by `probe='loader'` only: got `probe='micro'`"),
        ({"probe": "loader", "probe_loader": 3}, TypeError, "`probe_loader` must give batches: got 3"),
        ({"decay_in_norm": True}, ValueError, "`decay_in_norm=True` needs .*: got `probe='micro'`"),
        ({"first_step_eta": 0.0}, ValueError, "`first_step_eta` must be above 0: got 0.0"),
        ({"bn_probe": "eval"}, ValueError, "`bn_probe` must be one of 'freeze', 'train': got 'eval'"),
        (
            {"mode": "authors", "rate_in_momentum": True},
            ValueError,
            "outside the momentum: got `rate_in_momentum=True`",
        ),
        ({"allow_clip": "no"}, TypeError, "`allow_clip` must be True or False: got 'no'"),
        ({"heat_map": 3}, TypeError, "`heat_map` must be True, False or a path: got 3"),
    ],
)
def test_wrong_values_are_refused(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        LayerwiseRateScaling(**arguments)


class Embedded(Net):
    """A table of rows, of which a batch touches some."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(10, 3, sparse=sparse), nn.Flatten(), nn.Linear(18, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net((batch[0].abs() * 3).long().clamp(max=9)).square().mean()

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)


def test_sparse_gradients_are_refused_before_the_first_step() -> None:
    with pytest.raises(TypeError, match=r"that of `net.0.weight` is sparse.* Use `sparse=False`"):
        fit(Embedded(sparse=True), "auto", 1, devices=1, callbacks=[Scaling()])
    fit(Embedded(sparse=False), "auto", 1, devices=1, callbacks=[Scaling("lars")])


@pytest.mark.parametrize("rule", ["clars", "lars"])
def test_sparse_gradients_of_other_layers_are_refused_in_the_step(rule: Any) -> None:
    class Hidden(Embedded):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            rows = nn.functional.embedding((batch[0].abs() * 3).long().clamp(max=9), self.net[0].weight, sparse=True)
            return self.net[2](rows.flatten(1)).square().mean()

    with pytest.raises(TypeError, match=r"that of `net.0.weight` is sparse"):
        fit(Hidden(sparse=False), "auto", 1, devices=1, callbacks=[Scaling(rule)])


def refused(words: str, module: Any = None, strategy: Any = "auto", scaling: Any = None, **arguments: Any) -> None:
    with pytest.raises(MisconfigurationException, match=words):
        fit(module or Net(), strategy, 1, devices=1, callbacks=[scaling or Scaling()], **arguments)


def test_clipping_goes_with_clars_on_request_only() -> None:
    refused("does not need `gradient_clip_val`, and got 0.5", gradient_clip_val=0.5)
    fit(Net(), "auto", 1, devices=1, gradient_clip_val=0.5, callbacks=[Scaling("lars")])
    with pytest.warns(UserWarning, match="1 probes"):
        fit(Net(), "auto", 1, devices=1, gradient_clip_val=0.5, callbacks=[Scaling(allow_clip=True)])


def test_fused_optimizers_under_loss_scaling_are_refused() -> None:
    mixed = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    fused = Net(optimizer=partial(Adam, lr=0.1, fused=True))
    refused("fused Adam under `precision='16-mixed'` unscales them inside", fused, plugins=[mixed])


def test_optimizers_that_cannot_be_split_are_refused() -> None:
    refused("does not support LBFGS: it asks for several gradients", Net(optimizer=LBFGS))

    class Rateless(SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1)
            for group in self.param_groups:
                del group["lr"]

    refused("a group of Rateless has no `lr`", Net(optimizer=Rateless))


def test_a_group_that_notes_what_depends_on_its_tensors_is_refused() -> None:
    class Summing(SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            for group in self.param_groups:
                group["largest"] = max(float(p.detach().abs().max()) for p in group["params"])
            return loss

    with (
        pytest.raises(RuntimeError, match="`Summing` keeps `largest` for a whole group"),
        pytest.warns(UserWarning, match="1 probes"),
    ):
        fit(Net(optimizer=partial(Summing, lr=0.1)), "auto", 1, devices=1, callbacks=[Scaling()])


@pytest.mark.parametrize("optimizer", [partial(Adam, lr=0.1), partial(SGD, lr=0.1, momentum=0.9, dampening=0.5)])
def test_the_rate_goes_inside_the_momentum_of_sgd_only(optimizer: Any) -> None:
    refused("scales gradients, which is a rate only for", Net(optimizer=optimizer), scaling=Scaling("lars"))


def test_two_of_them_are_refused() -> None:
    with pytest.raises(
        RuntimeError, match="more than one stateful callback of type `LayerwiseRateScaling`"
    ):  # Lightning's
        fit(Net(), "auto", 1, devices=1, callbacks=[Scaling(), Scaling("lars")])


@pytest.mark.parametrize("arguments", [{"rule": "lars"}, {"mode": "authors"}])
def test_where_updates_are_exchanged_there_is_no_mean_gradient(arguments: Any) -> None:
    with pytest.raises(Exception, match="needs the norm of the mean gradient, and no rank knows it"):
        fit(Net(), compressed(), 1, callbacks=[Scaling(**arguments)])


def test_strategies_that_cut_or_flatten_tensors_are_refused() -> None:
    from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy

    with pytest.raises(MisconfigurationException, match="`FSDPStrategy`: it flattens or cuts parameters"):
        strategy(FSDPStrategy())

    class Stages:
        holds_whole_tensors = True

    class Unknown:
        pass

    with pytest.raises(
        MisconfigurationException, match="`Unknown`: whether it cuts or flattens parameters is not known"
    ):
        strategy(Unknown())  # type: ignore[arg-type]
    assert strategy(Stages()) is strategy(SingleDeviceStrategy()) is False  # type: ignore[arg-type]


def test_few_probes_are_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"got 1 probes .* CLARS is LARS with `eta=0.01`"):
        fit(Net(), "auto", 2, devices=1, callbacks=[Scaling()])
    fit(Net(batches=4), "auto", 1, devices=1, accumulate_grad_batches=4, callbacks=[Scaling()])  # warnings are errors


def test_a_loader_that_gives_nothing_is_refused() -> None:
    empty = Scaling(probe="loader", probe_loader=DataLoader(data(0, 0), BATCH))
    with pytest.raises(ValueError, match="`probe_loader` must give at least one batch: got a DataLoader"):
        fit(Net(), "auto", 1, devices=1, callbacks=[empty])
    used_up = Scaling(probe="loader", probes=2, probe_loader=iter(list(DataLoader(data(0, 1), BATCH))))
    with pytest.raises(ValueError, match="not a generator that is used up"):
        fit(Net(), "auto", 1, devices=1, callbacks=[used_up])


def test_a_loader_cannot_be_made_from_batches_alone() -> None:
    class Listed(Net):
        def train_dataloader(self) -> Any:
            return list(DataLoader(data(0, 2), BATCH))

    refused(
        "shuffles the training data set, and list has none with a length", Listed(), scaling=Scaling(probe="loader")
    )


class Step(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch) / 2)
        self.manual_backward(self.loss(batch) / 2)
        optimizer.step()


def test_passes_of_their_own_need_a_loss_in_manual_optimization() -> None:
    refused("in manual optimization that would step", Step(), scaling=Scaling(probe="loader"))
    refused("`probe='sample'` needs automatic optimization", Step(), scaling=Scaling(probe="sample"))

    class WithLoss(Step):
        def probe_loss(self, batch: Any) -> Tensor:
            return self.loss(batch)

    fit(WithLoss(), "auto", 1, devices=1, callbacks=[Scaling(probe="loader", probes=4)])


def test_parts_of_a_loss_cannot_be_told_apart_in_manual_optimization() -> None:
    refused("the losses of 2 backward passes before one step", Step())
    with pytest.warns(UserWarning, match="1 probes"):
        fit(Step(), "auto", 1, devices=1, callbacks=[Scaling(probe="rank")])


def test_a_probe_without_a_loss_is_refused() -> None:
    class Silent(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss if batch_idx or loss.grad_fn is None else {"loss": loss}

    fit(Silent(), "auto", 1, devices=1, callbacks=[Scaling(probe="loader", probes=4)])

    class Detached(Net):
        def probe_loss(self, batch: Any) -> Any:
            return super().training_step(batch, 0).detach()

    with pytest.raises(TypeError, match="must return a loss with a gradient for a probe"):
        fit(Detached(), "auto", 1, devices=1, callbacks=[Scaling(probe="loader")])


# --- the picture, and the mean ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`LayerwiseRateScaling` got . probes")
@pytest.mark.parametrize("rule", ["clars", "lars"])
def test_the_heat_map_is_drawn_where_it_was_asked_for(tmp_path: Path, rule: Any) -> None:
    path = tmp_path / "new" / "rates.png"
    fit(Net(), "auto", 10, devices=1, callbacks=[LayerwiseRateScaling(rule, heat_map=str(path))])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_without_a_logger_no_file_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit(Net(batches=4), "auto", 1, devices=1, accumulate_grad_batches=4, callbacks=[LayerwiseRateScaling()])
    assert not list(tmp_path.iterdir())


def test_the_history_stays_small_and_covers_the_whole_fit() -> None:
    history = RateHistory()
    for step in range(5000):
        history.add(step, ["a"], [step / 5000], True)
    state = history.state_dict()
    assert 256 <= len(state["steps"]) <= 512
    assert state["steps"][0] == 0
    assert 5000 - state["steps"][-1] <= state["every"]
    again = RateHistory()
    again.load_state_dict(state)
    assert again.state_dict()["steps"] == state["steps"]


def test_the_running_mean_is_corrected_for_its_start_and_keeps_what_is_missing() -> None:
    mean, other = RunningMean(0.9), torch.tensor([7.0, 7.0])
    mean.update(["a", "b"], torch.tensor([2.0, 3.0]), torch.tensor([True, False]))
    assert mean.mean(["a", "b"], other).tolist() == pytest.approx([2.0, 7.0])
    mean.update(["a", "b"], torch.tensor([4.0, 3.0]), torch.tensor([True, True]))
    assert mean.mean(["a", "b"], other).tolist() == pytest.approx([(0.9 * 2 + 4) / 1.9, 3.0])
    assert mean.mean(["b", "c"], other).tolist() == pytest.approx([3.0, 7.0])  # by name
