"""`BlackBoxModule` in the Trainer: still inside of queries, resumed bit for bit, logged against queries."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_distopt.errors import BudgetError, NonDeterministicError
from lightning_distopt.zeroth_order import BlackBoxModule, CoordinateEstimator, GaussianEstimator, StepLoader
from tests.strategies.fits import distance, trainer
from tests.zeroth_order.models import N, Regression, dataset, loader


def fit(module: BlackBoxModule, steps: int = 6, data: Any = None, **arguments: Any) -> Trainer:
    chosen = trainer("auto", steps, devices=1, **arguments)
    chosen.fit(module, loader() if data is None else data)
    return chosen


@pytest.mark.parametrize("method", ["sgd", "svrg", "saga"])
@pytest.mark.parametrize("functional", [False, True])
def test_a_fit_lowers_the_objective_and_counts(method: str, functional: bool) -> None:
    module = Regression(method=method, functional=functional, lr=0.1 if method != "sgd" else 0.5)  # type: ignore[arg-type]
    modes = [m.training for m in module.modules()]
    ran = fit(module, 8)
    metrics = ran.callback_metrics
    optimizer = ran.optimizers[0]
    c = 2 * sum(p.numel() for p in module.parameters())
    expected = {"sgd": 8 * 8, "svrg": 4 * (N + 4 * 8), "saga": N + 8 * 8}[method]
    assert metrics["zo/queries"] == optimizer.queries == c * expected
    assert metrics["best_objective"] == module.best_objective < 0.9 * float(_objective(Regression()))
    assert optimizer.evaluation_queries == 6 * N  # at the start, every second step, and at the end of an epoch
    assert ran.global_step == 8
    assert [m.training for m in module.modules()] == modes
    assert module.net[1].num_batches_tracked == 0


def _objective(module: Regression) -> Tensor:
    module.eval()
    with torch.no_grad():
        return module.query(dataset().tensors).mean()


def test_functional_or_not_the_path_is_the_same() -> None:
    a, b = Regression(functional=True), Regression(functional=False)
    fit(a)
    fit(b)
    assert distance(a.state_dict(), b.state_dict()) < 1e-9


@pytest.mark.filterwarnings(
    "ignore:Using ModelCheckpoint with manual optimization"
)  # nothing is lost by saving after the step
@pytest.mark.parametrize("method", ["sgd", "svrg", "saga"])
@pytest.mark.parametrize("estimator", [CoordinateEstimator(), GaussianEstimator(2)], ids=["coordinate", "gauss"])
def test_a_resumed_fit_continues_bit_for_bit(method: str, estimator: Any, tmp_path: Path) -> None:
    arguments: Any = {"method": method, "estimator": estimator, "lr": 0.05, "output": "best"}
    arguments["functional"] = isinstance(estimator, CoordinateEstimator)
    straight = Regression(**arguments)
    whole = fit(straight, 9)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1)
    fit(Regression(**arguments), 5, enable_checkpointing=True, callbacks=[saving])
    resumed = Regression(**arguments)
    again = trainer("auto", 9, devices=1, enable_checkpointing=True, callbacks=[copy.deepcopy(saving)])
    again.fit(resumed, loader(), ckpt_path=saving.best_model_path)
    assert distance(straight.state_dict(), resumed.state_dict()) == 0
    assert again.optimizers[0].queries == whole.optimizers[0].queries
    assert resumed.best_objective == straight.best_objective


def test_the_fit_ends_with_the_budget() -> None:
    module = Regression(method="sgd", max_queries=700, estimator=GaussianEstimator(), lr=0.05)
    ran = fit(module, 1000)
    assert ran.optimizers[0].queries == 688  # 43 steps of 16
    with pytest.raises(BudgetError, match="first step"):
        fit(Regression(method="svrg", max_queries=80, lr=0.1))


def test_generators_start_alike_in_every_query_and_come_back() -> None:
    class Noisy(Regression):
        drawn: ClassVar[list[tuple[float, float, float]]] = []

        def query(self, batch: Any) -> Tensor:
            draws = (float(torch.rand(1)), random.random(), float(np.random.rand()))
            self.drawn.append(draws)
            return super().query(batch) + sum(draws)

    torch.manual_seed(9)
    random.seed(9)
    np.random.seed(9)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    fit(Noisy(lr=0.01), 2)
    assert len(set(Noisy.drawn)) == 1
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()


def test_a_query_with_a_will_of_its_own_is_found() -> None:
    class Counting(Regression):
        calls = 0

        def query(self, batch: Any) -> Tensor:
            self.calls += 1
            return super().query(batch) + self.calls

    with pytest.raises(NonDeterministicError):
        fit(Counting(lr=0.1))


def test_any_loader_with_a_data_set_will_do() -> None:
    class Items(Dataset[Any]):
        def __len__(self) -> int:
            return N

        def __getitem__(self, index: int) -> Any:
            return tuple(tensor[index] for tensor in dataset().tensors)

    a, b = Regression(lr=0.05), Regression(lr=0.05)
    fit(a, 2)
    fit(b, 2, DataLoader(Items(), batch_size=10))
    assert distance(a.state_dict(), b.state_dict()) == 0

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(range(9))

    with pytest.raises(TypeError, match="StepLoader"):
        fit(Regression(lr=0.1), 2, DataLoader(Stream()))


def test_the_output_may_be_the_best_or_any_iterate() -> None:
    arguments: Any = {
        "method": "sgd",
        "lr": 3.0,
        "options": {"schedule": "constant"},
        "evaluate_every": 1,
        "functional": True,
    }  # too large
    last, best, uniform = (Regression(output=output, **arguments) for output in ("last", "best", "uniform"))
    for module in (last, best, uniform):
        fit(module, 8)
    ran = fit(Regression(output="best", **arguments), 8)
    assert float(_objective(best)) <= float(_objective(last)) + 0.01
    assert ran.callback_metrics["best_objective"] <= ran.callback_metrics["objective"]
    assert distance(uniform.state_dict(), last.state_dict()) > 0


def test_the_progress_bar_shows_queries_and_the_best_objective() -> None:
    class Look(Callback):
        shown: ClassVar[dict[str, Any]] = {}

        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            self.shown.update(trainer.progress_bar_metrics)

    look = Look()
    with mock.patch("sys.stderr"):
        fit(Regression(lr=0.1), 4, callbacks=[look, TQDMProgressBar()], enable_progress_bar=True)
    assert {"zo/queries", "best_objective"} <= set(look.shown)


def test_loggers_get_objective_and_queries(tmp_path: Path) -> None:
    fit(Regression(lr=0.1), 4, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    header, *rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert {"zo/queries", "objective", "best_objective", "zo/batch_value"} <= set(header.split(","))
    assert len(rows) == 4


def test_wandb_draws_objectives_against_queries() -> None:
    logger = mock.create_autospec(WandbLogger, instance=True)
    logger.experiment = mock.Mock()
    module = Regression(lr=0.1)
    module._trainer = mock.Mock(loggers=[logger], is_global_zero=True)
    module.on_fit_start()
    calls = {call.args[0]: call.kwargs for call in logger.experiment.define_metric.call_args_list}
    assert calls["objective"] == calls["best_objective"] == {"step_metric": "zo/queries"}


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="'adam'"):
        Regression(method="adam")
    with pytest.raises(ValueError, match="'mean'"):
        Regression(output="mean")
    with pytest.raises(ValueError, match="`evaluate_every`"):
        Regression(evaluate_every=0)
    with pytest.raises(ValueError, match="`steps`"):
        StepLoader(dataset(), 0)
    frozen = Regression()
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="requires gradients"):
        fit(frozen)


def test_scaled_losses_are_refused() -> None:
    module = Regression()
    module._trainer = mock.Mock()
    with pytest.raises(MisconfigurationException, match="16-mixed"):
        module.configure_optimizers()


def test_query_must_be_written() -> None:
    class Empty(BlackBoxModule):
        pass

    module = Empty(lr=0.1)
    module.x = nn.Parameter(torch.zeros(2))
    with pytest.raises(NotImplementedError, match=r"`Empty.query`"):
        fit(module)


def test_the_last_iterate_of_a_spent_budget_is_evaluated_too() -> None:
    c = 2 * sum(p.numel() for p in Regression().parameters())
    module = Regression(method="sgd", functional=True, lr=0.5, evaluate_every=4, max_queries=7 * 8 * c)
    ran = fit(module, 50)
    assert ran.optimizers[0].steps == 7
    last = float(_objective(module)) + ran.optimizers[0].penalty()  # type: ignore[attr-defined]
    assert ran.callback_metrics["objective"] == pytest.approx(last, abs=1e-9)
    assert module.best_objective == ran.callback_metrics["best_objective"] <= ran.callback_metrics["objective"]
