"""What the zeroth-order proximal optimizers share: arguments, the budget, the checks at the start, one proximal step."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_distopt.compressors.randomness import derive_key
from lightning_distopt.errors import BudgetError, NonDeterministicError
from lightning_distopt.optimizers.proximal import Proximal, Zero
from lightning_distopt.zeroth_order.arguments import check_parameters, checked_count, root
from lightning_distopt.zeroth_order.asking import Ask, Layout, QueryCount
from lightning_distopt.zeroth_order.closure import ClosureAsk
from lightning_distopt.zeroth_order.directions import pieces
from lightning_distopt.zeroth_order.estimators import CoordinateEstimator, Draw, Estimator
from lightning_distopt.zeroth_order.functional import FunctionalAsk, Objective
from lightning_distopt.zeroth_order.layers import LayerwiseMove
from lightning_distopt.zeroth_order.retry import RetryPolicy
from lightning_distopt.zeroth_order.smoothness import estimate_smoothness, smoothness_queries
from lightning_distopt.zeroth_order.team import Gather, across

__all__ = ["ZeroOrderOptimizer"]

_CHECKED = 2  # samples of the repeated query
_AT_ONCE = 4096  # samples of an evaluation that are asked about in one query
_SMOOTHNESS = 32  # samples from which the smoothness constant is estimated


class ZeroOrderOptimizer(Optimizer):
    """A proximal method that asks for values only: ``x <- prox(x - lr v, lr)``, with v estimated by a subclass.

    No gradient is ever asked or kept. Randomness is a function of (seed, step), so that a run repeats, a checkpoint
    continues bit for bit, and ranks that share a seed draw alike.
    """

    def __init__(
        self,
        params: Any,
        *,
        n_samples: int,
        lr: float | None = None,
        batch_size: int | None = None,
        inner_steps: int | None = None,
        estimator: Estimator | None = None,
        smoothing: float | None = None,
        proximal: Proximal | None = None,
        max_queries: int | None = None,
        seed: int = 0,
        replacement: bool = True,
        chunk_bytes: int = 1 << 24,
        retry: RetryPolicy | None = None,
        module: nn.Module | None = None,
    ) -> None:
        name = type(self).__name__
        self.n_samples = checked_count("n_samples", n_samples)
        if lr is not None and not (isinstance(lr, (int, float)) and 0 < lr < math.inf):
            raise ValueError(f"`lr` must be above 0, or None to estimate it: got {lr!r}. Write `lr=0.01`.")
        self.batch_size = checked_count("batch_size", root(n_samples, 2) if batch_size is None else batch_size)
        self.inner_steps = checked_count("inner_steps", root(n_samples, 1) if inner_steps is None else inner_steps)
        if self.batch_size > self.n_samples:
            raise ValueError(
                f"`batch_size` must be at most `n_samples`: got {self.batch_size} of {self.n_samples} samples. Lower it."
            )
        self.estimator = CoordinateEstimator() if estimator is None else estimator
        if not isinstance(self.estimator, Estimator):
            raise TypeError(f"`estimator` must be an Estimator such as CoordinateEstimator(): got {estimator!r}.")
        self.proximal = Zero() if proximal is None else proximal
        if not isinstance(self.proximal, Proximal):
            raise TypeError(f"`proximal` must be a Proximal such as L1(1e-4): got {proximal!r}.")
        self.max_queries = None if max_queries is None else checked_count("max_queries", max_queries)
        self.smoothing, self.seed = smoothing, int(seed)
        self.replacement = replacement
        self.chunk_bytes = checked_count("chunk_bytes", chunk_bytes)
        self.retry = retry or RetryPolicy()
        #: The processes among which queries are divided; strategies set it. ``None``: this one alone.
        self.team: Gather | None = None
        self._count, self._steps, self._evaluated = QueryCount(), 0, 0
        self._memory: dict[str, Any] = {}
        self._was_checked = False
        self._standing: tuple[Any, Any, Any] | None = None
        super().__init__(params, {"lr": lr})
        self.layout = Layout([p for group in self.param_groups for p in group["params"]])
        self._layers = None if module is None else LayerwiseMove(module, self.layout)
        check_parameters(self.layout, name)
        self._check_operators()
        self._check_smoothing()
        self._check_budget()

    # ---- one step ---------------------------------------------------------------------------------------------------

    def ask(
        self,
        closure: Callable[[Tensor], Any] | None = None,
        *,
        objective: Objective | None = None,
        fetch: Callable[[Tensor], Any] | None = None,
    ) -> None:
        """Set what every later ``step()`` asks, whatever it is given: for frameworks that wrap closures, as Lightning does."""
        self._standing = (closure, objective, fetch)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[Tensor], Any] | None = None,
        *,
        objective: Objective | None = None,
        fetch: Callable[[Tensor], Any] | None = None,
    ) -> float:
        """Make one step and return about the mean value of f over its batch, at the point before it.

        Args:
            closure: ``closure(indices) -> losses``: f_i at the parameters' present values, for int64 ``indices`` on the CPU;
                shapes ``(b,)`` and ``(b,)``. Called under ``no_grad``.
            objective: ``objective(params, indices) -> losses``, a function of torch operations with a tuple of tensors for the
                parameters; evaluated at many points in one call, so several times faster on small models.
            fetch: makes what the objective gets instead of indices (a batch, outside of the vectorised code).

        Raises:
            BudgetError: if the queries left do not suffice for the step; nothing was asked.
            QueryError: if a query had no usable answer; parameters and state are those before the step.
            NonFiniteError: if an answer holds a NaN or an infinity; the same.
            TypeError: if neither, or both, of closure and objective are given.
        """
        ask = self._question(closure, objective, fetch)
        if self._standing is not None and closure is not None:
            closure()  # type: ignore[call-arg]  # a framework's own, with its hooks
        with ask.session():
            if not self._was_checked:
                self._check_determinism(ask)
            rates = self._rates(ask)
            self._require(self._next_queries())
            value = self._estimate(ask)
            self._update(rates)
        self._steps += 1
        return value

    @torch.no_grad()
    def evaluate(
        self,
        indices: Tensor | None = None,
        closure: Callable[[Tensor], Any] | None = None,
        *,
        objective: Objective | None = None,
        fetch: Callable[[Tensor], Any] | None = None,
    ) -> float:
        """Return the mean of f_i over some samples (``None``: all) plus the proximal terms, at the present parameters.

        Counted in :attr:`evaluation_queries`, not in the budget.
        """
        ask = self._question(closure, objective, fetch)
        ask.count = QueryCount()
        indices = torch.arange(self.n_samples) if indices is None else indices
        b = len(indices)

        def compute(first: int, last: int) -> Tensor:
            some = range(first, last, _AT_ONCE)
            return torch.cat([ask.plain(indices[at : min(at + _AT_ONCE, last)]) for at in some])[:, None]

        with ask.session():
            values = across(self.team, ask.count, self._steps, b, 1, compute, self.layout.device)
        self._evaluated += ask.count.total
        return float(values.mean()) + self.penalty()

    @abstractmethod
    def _next_queries(self) -> int:
        """Return the queries of the next step."""

    @abstractmethod
    def _estimate(self, ask: Ask) -> float:
        """Estimate the step's direction, so that :meth:`_slice` can hand it out; return the batch's value."""

    @abstractmethod
    def _slice(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Return a piece of the direction; every piece is asked for once, in order."""

    def _update(self, rates: list[float]) -> None:
        offset = 0
        for group, rate in zip(self.param_groups, rates, strict=True):
            proximal: Proximal = group.get("proximal", self.proximal)
            for parameter in group["params"]:
                flat, end = parameter.view(-1), parameter.numel()
                for first, last in pieces(0, end) if proximal.elementwise else [(0, end)]:
                    v = self._slice(offset + first, offset + last, parameter.dtype)
                    z = flat[first:last].add(v, alpha=-rate)
                    if isinstance(proximal, Zero):
                        flat[first:last] = z
                    elif proximal.elementwise:
                        flat[first:last] = proximal(z, rate)
                    else:
                        parameter.copy_(proximal(z.view(parameter.shape), rate))
                offset += end

    def _rates(self, ask: Ask) -> list[float]:
        if any(group["lr"] is None for group in self.param_groups):
            draw = self._draw("smoothness", torch.arange(min(_SMOOTHNESS, self.n_samples)))
            self._require(self._next_queries() + smoothness_queries(len(draw.indices)))
            smoothness = estimate_smoothness(ask, draw)
            if not 0 < smoothness < math.inf:
                raise ValueError(
                    f"`lr=None` needs curvature to estimate the rate 1 / L: got L = {smoothness} at the start. Pass `lr`."
                )
            self._memory["smoothness"] = smoothness
            for group in self.param_groups:
                if group["lr"] is None:
                    group["lr"] = 1 / smoothness if self.estimator.dense else 1 / (3 * smoothness)
        return [float(group["lr"]) for group in self.param_groups]

    def _draw(self, purpose: str, indices: Tensor) -> Draw:
        return Draw(indices, self.seed, self._steps, purpose, self.batch_size, self.team)

    def _batch(self, replacement: bool) -> Tensor:
        """Return the step's samples: a function of (seed, step)."""
        generator = torch.Generator().manual_seed(derive_key(self.seed, 0, self._steps, "batch") >> 1)
        if replacement:
            return torch.randint(0, self.n_samples, (self.batch_size,), generator=generator)
        return torch.randperm(self.n_samples, generator=generator)[: self.batch_size]

    def _question(self, closure: Any, objective: Any, fetch: Any) -> Ask:
        if self._standing is not None:
            closure, objective, fetch = self._standing
        if (closure is None) == (objective is None):
            raise TypeError(
                f"`{type(self).__name__}.step` takes either a closure or an objective: got "
                f"{'neither' if closure is None else 'both'}. Write `step(closure)` or `step(objective=f)`."
            )
        if closure is not None:
            return ClosureAsk(closure, self.layout, self._count, self.retry, self._layers)
        return FunctionalAsk(objective, self.layout, self._count, self.retry, self.chunk_bytes, fetch)

    # ---- figures ----------------------------------------------------------------------------------------------------

    @property
    def queries(self) -> int:
        """Evaluations of single f_i so far, of all processes: all but those of :attr:`check_queries`."""
        return self._count.total

    @property
    def queries_here(self) -> int:
        """Those of this process since it started."""
        return self._count.mine

    @property
    def check_queries(self) -> int:
        """Evaluations of the repeated query at the start, at most four in each process."""
        return self._count.checks

    @property
    def evaluation_queries(self) -> int:
        """Evaluations of single f_i by :meth:`evaluate`, of all processes."""
        return self._evaluated

    @property
    def steps(self) -> int:
        """Steps so far."""
        return self._steps

    def next_queries(self) -> int:
        """Return the queries that the next step will make (without those of an estimate of the rate)."""
        return self._next_queries()

    def penalty(self) -> float:
        """Return the proximal terms at the present parameters."""
        with torch.no_grad():
            terms = [
                float(group.get("proximal", self.proximal).value(p))
                for group in self.param_groups
                for p in group["params"]
            ]
        return sum(terms)

    # ---- checks -----------------------------------------------------------------------------------------------------

    def _require(self, needed: int) -> None:
        if self.max_queries is not None and self._count.total + needed > self.max_queries:
            left = self.max_queries - self._count.total
            raise BudgetError(
                f"`max_queries` must allow the next step of {needed} queries: {left} of {self.max_queries} are left. The "
                "parameters hold the last iterate; raise the budget to go on.",
                needed,
                left,
            )

    def _check_budget(self) -> None:
        if self.max_queries is None:
            return
        first = self._next_queries()
        if any(group["lr"] is None for group in self.param_groups):
            first += smoothness_queries(min(_SMOOTHNESS, self.n_samples))
        if self.max_queries < first:
            raise BudgetError(
                f"`max_queries` must allow at least the first step of `{type(self).__name__}`, {first} queries "
                f"({self.estimator.queries(self.layout.numel)} for each of {self.n_samples} samples with "
                f"{self.layout.numel} parameters and batches of {self.batch_size}): got {self.max_queries}. Raise it, use "
                "GaussianEstimator, whose cost does not grow with the parameters, or ZOProxSGD, which needs no pass over all "
                "samples.",
                first,
                self.max_queries,
            )

    def _check_smoothing(self) -> None:
        dtype = self.layout.dtype
        if self.smoothing is None:
            return
        values = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        norm = math.sqrt(sum(float(p.detach().double().square().sum()) for p in self.layout.params))
        least = max(10 * values, torch.finfo(dtype).eps * norm / math.sqrt(self.layout.numel))
        if not least <= self.smoothing < math.inf:
            raise ValueError(
                f"`smoothing` must be at least {least:.1e} for parameters of {dtype} and this size, below which differences are "
                f"rounding: got {self.smoothing!r}. Leave it out for {self.estimator.smoothing(dtype):g}, or use float64."
            )

    def _check_operators(self) -> None:
        for group in self.param_groups:
            proximal = group.get("proximal", self.proximal)
            if not isinstance(proximal, Proximal):
                raise TypeError(f"`proximal` of a parameter group must be a Proximal: got {proximal!r}.")
            if not proximal.elementwise:  # refuses tensors of a shape that it cannot treat
                for parameter in group["params"]:
                    proximal(parameter, group["lr"] or 1.0)

    def _check_determinism(self, ask: Ask) -> None:
        indices = torch.arange(min(_CHECKED, self.n_samples))
        counted, ask.count = ask.count, QueryCount(compared=True)

        def compute(first: int, last: int) -> Tensor:
            answers = ask.plain(indices), ask.plain(indices)
            if not torch.equal(*answers):
                number = int((answers[0] != answers[1]).nonzero()[0])
                raise NonDeterministicError(
                    f"A query must give the same answer twice: sample {number} gave {float(answers[0][number])!r}, then "
                    f"{float(answers[1][number])!r}, and differences of noise are no gradients. Put the model into eval mode "
                    "(dropout off, BatchNorm frozen), fix augmentation by sample, and seed the black box for each query."
                )
            return torch.zeros(last - first, 1, dtype=torch.float64, device=self.layout.device)

        try:  # every rank asks its own black box, and all stop if one of them is not fit for use
            across(
                self.team, ask.count, self._steps, self.team.world if self.team else 1, 1, compute, self.layout.device
            )
        finally:
            self._count.checks += ask.count.mine
            ask.count = counted
        self._was_checked = True

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return steps, queries and memory as tensors and plain values; operators and questions are not state."""
        groups, start = [], 0
        for group in self.param_groups:
            plain = {k: v for k, v in group.items() if k not in ("params", "proximal")}
            groups.append({**plain, "params": list(range(start, start + len(group["params"])))})
            start += len(group["params"])
        own = {
            "steps": self._steps,
            "queries": self._count.total,
            "check_queries": self._count.checks,
            "evaluation_queries": self._evaluated,
            "seed": self.seed,
            "device": self.layout.device.type,
            "memory": dict(self._memory),
        }
        return {"state": {}, "param_groups": groups, "zeroth_order": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            ValueError: if it is of other parameters or of another optimizer.
        """
        groups, own = state_dict["param_groups"], state_dict.get("zeroth_order")
        sizes = [len(group["params"]) for group in groups]
        mine = [len(group["params"]) for group in self.param_groups]
        if own is None or sizes != mine:
            raise ValueError(
                f"`state_dict` must be of a `{type(self).__name__}` with the same parameters: got groups of {sizes} for {mine}"
                f"{' without a zeroth-order state' if own is None else ''}. Build the optimizer as in the run that saved it."
            )
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update({k: v for k, v in saved.items() if k != "params"})
        if own["device"] != self.layout.device.type:
            warnings.warn(
                f"The state was saved on {own['device']} and goes on on {self.layout.device.type}, whose random directions may "
                "differ in the last bit: the run continues, but not bit for bit.",
                stacklevel=2,
            )
        self._steps, self.seed, self._evaluated = int(own["steps"]), int(own["seed"]), int(own["evaluation_queries"])
        self._count = QueryCount(others=int(own["queries"]), checks=int(own["check_queries"]), compared=True)
        self._memory = {k: self._loaded(k, v) for k, v in own["memory"].items()}

    def _loaded(self, name: str, value: Any) -> Any:
        """Return a piece of memory where it belongs."""
        if isinstance(value, list):
            return [tensor.to(self.layout.device, copy=True) for tensor in value]
        return value.to(self.layout.device, copy=True) if isinstance(value, Tensor) else value

    def __getstate__(self) -> dict[str, Any]:  # torch's keeps three attributes only
        return dict(self.__dict__)
