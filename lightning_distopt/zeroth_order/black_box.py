"""A LightningModule for models that can only be asked: the user writes ``query(batch) -> losses`` and nothing else."""

from __future__ import annotations

import random
import sys
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import Parameter

from lightning_distopt.errors import BudgetError
from lightning_distopt.optimizers.proximal import Proximal
from lightning_distopt.zeroth_order.base import ZeroOrderOptimizer
from lightning_distopt.zeroth_order.estimators import CoordinateEstimator, Estimator
from lightning_distopt.zeroth_order.prox_saga import ZOProxSAGA
from lightning_distopt.zeroth_order.prox_sgd import ZOProxSGD
from lightning_distopt.zeroth_order.prox_svrg import ZOProxSVRG
from lightning_distopt.zeroth_order.retry import RetryPolicy
from lightning_distopt.zeroth_order.step_loader import Samples

__all__ = ["BlackBoxModule", "Method"]

Method = Literal["sgd", "svrg", "saga"]
_METHODS: dict[str, type[ZeroOrderOptimizer]] = {"sgd": ZOProxSGD, "svrg": ZOProxSVRG, "saga": ZOProxSAGA}


class BlackBoxModule(LightningModule):
    """Minimises the mean of ``query`` over the training data by queries only.

    A subclass writes :meth:`query`. Inside of it the module is in eval mode, autograd is off, and the generators of torch,
    Python and NumPy start from the same seed each time, so that the same question has the same answer. The optimizer draws
    its samples itself, from the data set of the training loader; use :class:`StepLoader` for one that loads nothing in vain.
    Parameters that do not require gradients are left alone.

    Logs ``zo/queries``, ``zo/batch_value`` (about the mean value of the step's batch), and every ``evaluate_every`` steps
    ``objective`` (on a fixed part of the training data, with the proximal terms) and ``best_objective``; W&B shows them
    against ``zo/queries``. The fit ends when ``max_queries`` does not allow another step. Steps, queries, snapshot, table
    and the best objective are in the checkpoint, from which a run continues bit for bit.

    Args:
        method: "sgd", "svrg" or "saga".
        lr: step size; ``None`` estimates one from the smoothness.
        batch_size: samples of a step, over all processes; ``None`` is ``floor(n^(2/3))``.
        inner_steps: steps between snapshots of "svrg"; ``None`` is ``floor(n^(1/3))``.
        estimator: ``None`` is ``CoordinateEstimator()``.
        smoothing: distance of the points that are compared; ``None`` takes the estimator's.
        proximal: the term that is not smooth, ``None`` for none.
        max_queries: budget of the fit; ``None`` for no bound.
        seed: of samples, directions, and of the generators inside of ``query``.
        functional: ``query`` is made of torch operations that can be vectorised over the parameters: many directions are
            then evaluated in one call.
        retry: what happens when a query fails.
        evaluate_every: steps between evaluations of the objective, at least 1; their queries are counted apart.
        evaluation_samples: of an evaluation, evenly spaced over the training data; ``None`` takes all.
        output: what the parameters are after the fit: the "last" iterate, the "best" one of the evaluations, or one drawn
            "uniform"ly from all (which is what the theory speaks of). The last two keep a copy of the parameters.
        options: further arguments of the method, such as ``{"schedule": "constant"}``.

    Raises:
        ValueError: for a value outside its range.
    """

    def __init__(
        self,
        method: Method = "svrg",
        lr: float | None = None,
        batch_size: int | None = None,
        inner_steps: int | None = None,
        estimator: Estimator | None = None,
        smoothing: float | None = None,
        proximal: Proximal | None = None,
        max_queries: int | None = None,
        seed: int = 0,
        functional: bool = False,
        retry: RetryPolicy | None = None,
        evaluate_every: int = 10,
        evaluation_samples: int | None = 256,
        output: Literal["last", "best", "uniform"] = "last",
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if method not in _METHODS:
            raise ValueError(f"`method` must be one of {', '.join(map(repr, _METHODS))}: got {method!r}.")
        if output not in get_args(Literal["last", "best", "uniform"]):
            raise ValueError(f"`output` must be 'last', 'best' or 'uniform': got {output!r}.")
        if evaluate_every < 1 or (evaluation_samples is not None and evaluation_samples < 1):
            raise ValueError(
                f"`evaluate_every` and `evaluation_samples` must be at least 1: got {evaluate_every} and {evaluation_samples}."
            )
        self.automatic_optimization = False
        self.method: Method = method
        self.functional, self.seed = functional, seed
        self.evaluate_every, self.evaluation_samples, self.output = evaluate_every, evaluation_samples, output
        self._arguments: dict[str, Any] = {
            "lr": lr, "batch_size": batch_size, "inner_steps": inner_steps, "estimator": estimator, "smoothing": smoothing,
            "proximal": proximal, "max_queries": max_queries, "seed": seed, "retry": retry, **(options or {}),
        }  # fmt: skip
        #: Lowest objective that an evaluation has found.
        self.best_objective = float("inf")
        self._kept: list[Tensor] | None = None
        self._samples: Samples | None = None

    @abstractmethod
    def query(self, batch: Any) -> Tensor:
        """Return one loss for each sample of a batch, float32 or wider; may ask a remote service or any function."""
        raise NotImplementedError(f"`{type(self).__name__}.query` must return one loss for each sample of the batch.")

    def query_parameters(self) -> dict[str, Parameter]:
        """Return what is optimized, by name; those that require gradients."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    # ---- Lightning ---------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> ZeroOrderOptimizer:
        """Build the method over the data set of the training loader."""
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise MisconfigurationException(
                f"`{type(self).__name__}` does not support `precision='16-mixed'`: there is no gradient whose loss could be "
                "scaled. Use `precision='bf16-mixed'` or '32-true'."
            )
        self._samples = self._find_samples()
        parameters = self.query_parameters()
        if not parameters:
            raise ValueError(
                f"`{type(self).__name__}` needs a parameter that requires gradients: it has none to optimize."
            )
        estimator = self._arguments["estimator"] or CoordinateEstimator()
        by_layer = not self.functional and not isinstance(estimator, CoordinateEstimator)
        optimizer = _METHODS[self.method](
            list(parameters.values()),
            n_samples=len(self._samples),
            module=self if by_layer else None,
            **self._arguments,
        )
        if self.functional:
            optimizer.ask(objective=self._functional(list(parameters)), fetch=self._samples)
        else:
            optimizer.ask(self._closure)
        return optimizer

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Make one step; ``batch`` is not looked at."""
        wrapped: Any = self.optimizers()
        optimizer: ZeroOrderOptimizer = wrapped.optimizer
        if optimizer.steps == 0:
            self._evaluate(optimizer)
        try:
            with self._still():
                value = wrapped.step()
        except BudgetError:
            if optimizer.steps == 0:
                raise
            if optimizer.steps % self.evaluate_every:
                self._evaluate(optimizer)  # of the last iterate, which may be the best
            self.trainer.should_stop = True
            return
        if optimizer.steps % self.evaluate_every == 0 or self.trainer.is_last_batch:
            self._evaluate(optimizer)
        if self.output == "uniform" and random.Random(f"{self.seed} {optimizer.steps}").random() * optimizer.steps < 1:
            self._keep()
        queries = torch.tensor(float(optimizer.queries), dtype=torch.float64)
        self.log("zo/queries", queries, prog_bar=True)
        self.log("zo/batch_value", value)

    def on_fit_start(self) -> None:
        """Let W&B draw objectives against queries."""
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger) and self.trainer.is_global_zero:
                for name in ("objective", "best_objective", "zo/batch_value"):
                    logger.experiment.define_metric(name, step_metric="zo/queries")

    def on_train_end(self) -> None:
        """Put the chosen iterate in place."""
        if self._kept is not None and self.output != "last":
            with torch.no_grad():
                for parameter, value in zip(self.query_parameters().values(), self._kept, strict=True):
                    parameter.copy_(value)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the optimizer does not know."""
        checkpoint["black_box"] = {"best_objective": self.best_objective, "kept": self._kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back."""
        own = checkpoint.get("black_box", {})
        self.best_objective, self._kept = own.get("best_objective", float("inf")), own.get("kept")

    # ---- asking ------------------------------------------------------------------------------------------------------

    def _find_samples(self) -> Samples:
        self.trainer.fit_loop.setup_data()
        loader = self.trainer.train_dataloader
        dataset = getattr(loader, "dataset", None)
        if dataset is None or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"`{type(self).__name__}` needs one training loader whose `dataset` has `len` and `dataset[i]`, since the "
                f"optimizer draws samples by index: got {type(loader).__name__} over {type(dataset).__name__}. Use "
                "`StepLoader(dataset, steps)`, or a DataLoader over a map-style data set."
            )
        return Samples(dataset, getattr(loader, "collate_fn", None), self._prepared)

    def _prepared(self, batch: Any) -> Any:
        batch = self.trainer.precision_plugin.convert_input(batch)
        return self.trainer.strategy.batch_to_device(batch, self.device)

    def _closure(self, indices: Tensor) -> Tensor:
        assert self._samples is not None
        with fixed_randomness(self.seed, self.device):
            return self.query(self._samples(indices))

    def _functional(self, names: list[str]) -> Any:
        wrapped = _Query(self)

        def objective(params: tuple[Tensor, ...], batch: Any) -> Tensor:
            values = {f"owner.{name}": value for name, value in zip(names, params, strict=True)}
            answer: Tensor = torch.func.functional_call(wrapped, values, (batch,))
            return answer

        return objective

    def _evaluate(self, optimizer: ZeroOrderOptimizer) -> None:
        assert self._samples is not None
        n = len(self._samples)
        count = n if self.evaluation_samples is None else min(self.evaluation_samples, n)
        with self._still():
            value = optimizer.evaluate(torch.arange(count) * n // count)
        if value < self.best_objective:
            self.best_objective = value
            if self.output == "best":
                self._keep()
        self.log("objective", torch.tensor(value, dtype=torch.float64))
        self.log("best_objective", torch.tensor(self.best_objective, dtype=torch.float64), prog_bar=True)
        self.on_evaluation(value)

    def on_evaluation(self, value: float) -> None:
        """Log more at an evaluation that found ``value``; does nothing by itself."""

    def _keep(self) -> None:
        self._kept = [parameter.detach().clone() for parameter in self.query_parameters().values()]

    @contextmanager
    def _still(self) -> Iterator[None]:
        """Eval mode; every module's own mode comes back."""
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


class _Query(nn.Module):
    """Makes a module's ``query`` callable with other parameters."""

    def __init__(self, owner: BlackBoxModule) -> None:
        super().__init__()
        self.owner = owner

    def forward(self, batch: Any) -> Tensor:
        return self.owner.query(batch)


@contextmanager
def fixed_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Let the global generators of torch, Python and NumPy (if it is there) start from ``seed``, and come back after it."""
    python, numpy = random.getstate(), sys.modules.get("numpy")
    before = None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        random.seed(seed)
        if numpy is not None:
            numpy.random.seed(seed % (1 << 32))
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(before)
