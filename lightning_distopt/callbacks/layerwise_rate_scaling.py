"""CLARS and LARS for any optimizer: every tensor gets a learning rate of its own, from norms that training has anyway.

    backward ─▶ norms of small batches ─▶ mean over micro-batches and ranks: n
    step     ─▶ |w|, |g| ─▶ s = min(clip, eta |w| / n) ─▶ the optimizer's update of each tensor at rate lr * s
    after    ─▶ groups as they were; rates and rho = |g| / n to the loggers and, at the end, into a picture

Source: arXiv:2002.01576 (CLARS), arXiv:1708.03888 (LARS); differences are listed in ``docs/large_batch.md``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_distopt.callbacks import rate_checks as checks
from lightning_distopt.callbacks import rate_rules as rules
from lightning_distopt.callbacks.norms import gradient_norms, norms
from lightning_distopt.callbacks.probe_passes import LoaderProbe, SampleProbe, gradients_of, side_pass
from lightning_distopt.callbacks.probes import MicroProbe, Probe, RankProbe, batch_size
from lightning_distopt.callbacks.rate_checks import Skip, SkipRule
from lightning_distopt.callbacks.rate_history import RateHistory
from lightning_distopt.callbacks.rated_step import RatedStep, Scales
from lightning_distopt.callbacks.running_mean import RunningMean
from lightning_distopt.exchange import network_failures
from lightning_distopt.strategies.checks import choice, count, flag, positive
from lightning_distopt.strategies.compat import loggers_write_now

__all__ = ["LayerwiseRateScaling"]

Rule = Literal["clars", "lars"]
ProbeName = Literal["micro", "rank", "loader", "sample"]
Mode = Literal["default", "authors"]
Statistics = Literal["freeze", "train"]

_CLARS_ETA, _LARS_ETA, _CLIP = 0.01, 0.001, 0.1


@dataclass
class _Watched:
    """One optimizer of the fit.

    Args:
        step: where it is split.
        mean: of the probes' norms of its tensors.
        steps: how often it has stepped.
        figures: name, rate and rho of each tensor that moved in the last step.
    """

    step: RatedStep
    mean: RunningMean
    steps: int = 0
    figures: list[tuple[str, float, float]] = field(default_factory=list)


class LayerwiseRateScaling(Callback):
    """Give every parameter tensor k the learning rate ``lr * s_k``.

    CLARS: ``s_k = min(clip, eta |w_k| / n_k)``, with ``n_k`` the mean of the norms of gradients of small batches (probes);
    where they disagree, ``n_k`` is larger than the norm of their mean and the rate smaller, by ``rho_k = |g_k| / n_k``, which
    is what warm-up does by hand. LARS: ``s_k = eta |w_k| / (|g_k| + decay |w_k|)``.

    The groups of the optimizer are split during its ``step`` only. Schedulers, ``LearningRateMonitor`` and checkpoints see the
    base rate. All ranks use the same norms, so their weights stay equal. Only the means of probes are a state; they are in
    checkpoints, and a resumed run continues bit for bit (but for the place in a probe loader).

    ``|w_k| = 0`` or ``n_k = 0``: ``s_k = clip`` (CLARS); 1 if ``|w_k|`` or ``|g_k|`` is 0 (LARS). A probe that is not finite is
    dropped and counted. A tensor without any probe keeps its last ``n_k``, before the first ``n_k = |g_k|``.

    ======================================  ====================================================================
    ``layer_rates/<parameter>``             rate in the last step, ``lr * s_k``
    ``layer_rho/<parameter>``               ``rho_k``; not where updates are exchanged: no rank has ``g_k`` there
    ``layer_rates_probes/count``            probes in the last mean, of all ranks; ``/dropped``: not finite, so far
    ``layer_rates_probes/batch_size``       samples in each, where known; **eta belongs to this number**
    ======================================  ====================================================================

    Args:
        rule: "clars" or "lars".
        eta: trust coefficient, above 0; ``None`` is 0.01 for CLARS, 0.001 for LARS. It does not carry over to other models or
            batch sizes of the probes: tune it.
        clip: largest ``s_k``, above 0; ``None`` is 0.1 for CLARS and no limit for LARS.
        probe: where ``n_k`` comes from: "micro" (each micro-batch of each rank), "rank" (each rank's gradient before it is
            averaged), "loader" (extra batches), "sample" (the batches again, in parts of ``probe_batch_size``; a slow reference).
        probe_every: optimizer steps between probes, at least 1; the last ``n_k`` is used in between.
        probe_ema: keep this share of the old mean at each probe, in [0, 1), corrected for its start at 0.
        rate_in_momentum: let the rate act inside the momentum (``v = mu v + lr s (g + decay w)``, for ``torch.optim.SGD`` only)
            or outside. ``None`` is outside for CLARS, as its authors do, and inside for LARS, as its paper does; LARS outside
            divides by ``|g + decay w| + 1e-6`` instead.
        skip: tensors that keep the whole rate: "norm_bias" (those of normalisation layers, and biases), "name" ("bn" or "bias"
            in the name), "none", or a function of name and parameter; ``None`` is "norm_bias", or "name" for the authors' mode.
        mode: "authors" follows the authors' code where it is odd: ``eta`` is 0.001 in the first step, ``skip="name"``,
            BatchNorm's statistics see the probes, a zero gradient stops a tensor.
        probes: batches of ``probe="loader"`` in a step and rank, at least 1.
        probe_batch_size: samples in each, at least 1, and in each part of ``probe="sample"``.
        probe_loader: batches for "loader"; begins anew when it is used up. ``None`` shuffles the training data set.
        decay_in_norm: probes' norms are those of ``g + decay w`` (not for "micro" and "rank", which see no decay).
        skip_decay: skipped tensors keep the optimizer's weight decay, as in the authors' code; ``False`` takes it from them.
        first_step_eta: ``eta`` of the first step; ``None`` is ``eta``, or 0.001 for the authors' mode.
        bn_probe: "freeze" gives buffers back what they held before the passes of "loader" and "sample"; "train" does not.
            ``None`` is "freeze", or "train" for the authors' mode.
        allow_clip: accept gradient clipping with CLARS, which shrinks ``g_k`` and not ``n_k``.
        log: send rates and rho to the loggers.
        heat_map: write rho over layers and time as a PNG when the fit ends: a path, or ``True`` for ``layer_rates.png`` in
            the logger's folder.

    Raises:
        ValueError: for a value outside its range.
        TypeError: for a value of the wrong kind; in a step, for a sparse gradient.
        MisconfigurationException: at the start of the fit, for what cannot go together; it says why and what to do.

    Example::

        Trainer(callbacks=[LayerwiseRateScaling(), LinearScaling()])                    # CLARS, no warm-up
        Trainer(callbacks=[LayerwiseRateScaling("lars"), LinearScaling(), GradualWarmup()])

    Source: arXiv:2002.01576, arXiv:1708.03888.
    """

    def __init__(
        self,
        rule: Rule = "clars",
        eta: float | None = None,
        clip: float | None = None,
        probe: ProbeName = "micro",
        probe_every: int = 1,
        probe_ema: float = 0.0,
        rate_in_momentum: bool | None = None,
        skip: Skip | None = None,
        mode: Mode = "default",
        probes: int = 64,
        probe_batch_size: int = 8,
        probe_loader: Iterable[Any] | None = None,
        decay_in_norm: bool = False,
        skip_decay: bool = True,
        first_step_eta: float | None = None,
        bn_probe: Statistics | None = None,
        allow_clip: bool = False,
        log: bool = True,
        heat_map: bool | str = True,
    ) -> None:
        self.rule: Rule = choice("rule", rule, Rule)
        self.mode: Mode = choice("mode", mode, Mode)
        authors = self.mode == "authors"
        clars = self.rule == "clars"
        self.eta = positive("eta", (_CLARS_ETA if clars else _LARS_ETA) if eta is None else eta)
        self.clip = None if clip is None and not clars else positive("clip", _CLIP if clip is None else clip)
        self.probe: ProbeName = choice("probe", probe, ProbeName)
        self.probe_every = count("probe_every", probe_every, 1)
        self.probe_ema = checks.share("probe_ema", probe_ema)
        self.rate_in_momentum = not clars if rate_in_momentum is None else flag("rate_in_momentum", rate_in_momentum)
        self.skip = SkipRule(("name" if authors else "norm_bias") if skip is None else skip)
        self.probes = count("probes", probes, 1)
        self.probe_batch_size = count("probe_batch_size", probe_batch_size, 1)
        self.probe_loader = probe_loader
        self.decay_in_norm = flag("decay_in_norm", decay_in_norm)
        self.skip_decay = flag("skip_decay", skip_decay)
        if first_step_eta is None and authors and clars:
            first_step_eta = _LARS_ETA
        self.first_step_eta = self.eta if first_step_eta is None else positive("first_step_eta", first_step_eta)
        self.bn_probe: Statistics = choice("bn_probe", bn_probe or ("train" if authors else "freeze"), Statistics)
        self.allow_clip = flag("allow_clip", allow_clip)
        self.log = flag("log", log)
        self.heat_map = heat_map
        checks.arguments(self)
        self.dropped = 0
        self.count = 0.0
        self._batch_size = 0
        self._probe: Probe | None = None
        self._watched: dict[int, _Watched] = {}
        self._names: dict[Tensor, str] = {}
        self._skipped: set[Tensor] = set()
        self._averages = False  # over ranks
        self._local = False  # whether each rank steps by its own gradient
        self._trainer: pl.Trainer | None = None
        self._warned = False
        self._loaded: list[dict[str, Any]] = []
        self._history = RateHistory()

    # ---- lifecycle ------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()
        self._averages = checks.strategy(trainer.strategy) and trainer.world_size > 1
        self._local = bool(getattr(trainer.strategy, "sends_updates", False)) and trainer.world_size > 1
        checks.fit(self, trainer, pl_module, self._local)
        self._trainer = trainer
        self._names = {parameter: name for name, parameter in pl_module.named_parameters()}
        self._skipped = self.skip.of(pl_module)
        for number, optimizer in enumerate(trainer.optimizers):
            step = RatedStep(
                optimizer, self._scales, self.rate_in_momentum, lambda p: not self.skip_decay and p in self._skipped
            )
            watched = self._watched[id(optimizer)] = _Watched(step, RunningMean(self.probe_ema))
            if number < len(self._loaded):
                watched.steps = int(self._loaded[number]["steps"])
                watched.mean.load_state_dict(self._loaded[number])
        self._loaded = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The loaders exist only now.
        self._probe = self._make_probe(trainer, pl_module) if self.rule == "clars" else None
        self._attach(pl_module)  # a resumed epoch does not start again
        self._rest_between_probes()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._attach(pl_module)  # parameters may have been unfrozen

    def _attach(self, module: pl.LightningModule) -> None:
        if self._probe is not None:
            self._probe.attach({p: name for name, p in module.named_parameters() if p.requires_grad})

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for watched in self._watched.values():
            watched.step.restore()  # after a step whose exception somebody caught
        if self._probe is not None:
            self._probe.begin_batch(batch)
            self._batch_size = batch_size(batch)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._probe is not None:
            automatic = pl_module.automatic_optimization
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            divided_by = trainer.accumulate_grad_batches if automatic else 1
            self._probe.begin_backward(divided_by, 1.0 if scaler is None else scaler.get_scale())

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        figures = [figure for watched in self._watched.values() for figure in watched.figures]
        if not figures or not self.log or not loggers_write_now(trainer):
            return
        values = {f"layer_rates/{name}": rate for name, rate, _ in figures}
        values |= {f"layer_rho/{name}": rho for name, _, rho in figures if rho == rho}
        if self._probe is not None:
            values |= {"layer_rates_probes/count": self.count, "layer_rates_probes/dropped": float(self.dropped)}
            if self.samples_in_a_probe:
                values["layer_rates_probes/batch_size"] = float(self.samples_in_a_probe)
        pl_module.log_dict(values)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.heat_map or getattr(trainer, "fast_dev_run", False):
            return
        folder = trainer.log_dir if self.heat_map is True else None  # all ranks: it may be broadcast
        if trainer.is_global_zero and (trainer.loggers or self.heat_map is not True):
            path = str(self.heat_map) if folder is None else os.path.join(folder, "layer_rates.png")
            batches = max(1.0, float(trainer.num_training_batches) / trainer.accumulate_grad_batches)
            self._history.draw(path, self.rule.upper(), batches)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._let_go()  # the means stay, for a checkpoint that another callback may write now

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._loaded = []  # of the fit before; a checkpoint is read after this

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._loaded = self.state_dict()["optimizers"]  # for a checkpoint after the fit
            self._close()

    def _let_go(self) -> None:
        for watched in self._watched.values():
            watched.step.close()
        if self._probe is not None:
            self._probe.detach()

    def _close(self) -> None:
        self._let_go()
        self._watched, self._probe, self._trainer = {}, None, None

    @property
    def samples_in_a_probe(self) -> int:
        """Samples in each probe of this rank, 0 where that is not known: the number that ``eta`` belongs to."""
        assert self._trainer is not None
        if self.probe in ("loader", "sample"):
            return self.probe_batch_size if self.probe_loader is None else 0
        return self._batch_size * (self._trainer.accumulate_grad_batches if self.probe == "rank" else 1)

    # ---- probes ---------------------------------------------------------------------------------------------------------

    def _make_probe(self, trainer: pl.Trainer, module: pl.LightningModule) -> Probe:
        if self.probe == "micro":
            return MicroProbe()
        if self.probe == "rank":
            return RankProbe()
        decay = self._decay if self.decay_in_norm else None
        gradients = partial(gradients_of, trainer, module, self.probe == "loader", decay)
        guard = partial(side_pass, module, self.bn_probe == "train")
        if self.probe == "sample":
            return SampleProbe(self.probe_batch_size, gradients, guard)
        loader = self.probe_loader
        if loader is None:
            loader = checks.loader_like(trainer.train_dataloader, self.probe_batch_size, trainer.global_rank)
        return LoaderProbe(self.probes, gradients, loader, guard)

    def _decay(self, parameter: Parameter) -> float:
        assert self._trainer is not None
        groups = (group for optimizer in self._trainer.optimizers for group in optimizer.param_groups)
        holding = (group for group in groups if any(member is parameter for member in group["params"]))
        return next((float(group.get("weight_decay", 0.0)) for group in holding), 0.0)

    # ---- rates ----------------------------------------------------------------------------------------------------------

    def _scales(self, optimizer: Optimizer) -> Scales:
        """Return ``s_k`` of every tensor that moves in this step and is not skipped."""
        watched = self._watched[id(optimizer)]
        members = [(p, group) for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        if not members:
            return {}
        params = [p for p, _ in members]
        checks.gradients(params, self._names)
        names = [self._names.get(p, f"parameter {number}") for number, p in enumerate(params)]
        weights = norms(params, params[0].device)
        gradients = gradient_norms(members, weights, decayed=False)
        found = torch.zeros(2, device=weights.device, dtype=weights.dtype)
        probes = torch.full_like(weights, torch.nan)
        if self.rule == "clars":
            weights, found = self._probed(watched, params, names, weights)
            probes = watched.mean.mean(names, otherwise=gradients)
        eta = self.eta if watched.steps else self.first_step_eta
        scales = self._rule(members, weights, gradients, probes, eta)
        rho = gradients / torch.where(probes == 0, 1.0, probes)
        columns = torch.stack([scales, torch.full_like(rho, torch.nan) if self._local else rho])
        table = torch.cat([columns.flatten(), found]).tolist()  # the one look from the host
        return self._note(watched, members, names, table)

    def _probed(
        self, watched: _Watched, params: Sequence[Parameter], names: list[str], weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add what the probes have found to the mean; return ``|w|``, alike on all ranks, and numbers of probes."""
        assert self._probe is not None
        parts: list[Tensor] = []
        due = self._is_due(watched)
        if due:
            rows = self._probe.collect(params).to(weights)
            self._refuse_parts_of_a_loss(len(rows))
            good = rows.isfinite().all(1, keepdim=True)
            there = good & (rows >= 0)
            parts = [torch.where(there, rows, 0.0).sum(0), there.sum(0), (~good).sum().view(1), good.sum().view(1)]
        if self._local:  # ranks are at points of their own
            parts.append(weights)
        message = torch.cat([part.to(weights) for part in parts]) if parts else weights.new_zeros(0)
        if self._averages and parts:
            self._sum_over_ranks(message, watched.steps)
        size = len(params)
        if self._local:
            weights = message[-size:] / dist.get_world_size()
        if not due:
            return weights, weights.new_zeros(2)
        sums, counts = message[:size], message[size : 2 * size]
        watched.mean.update(names, sums / counts.clamp(min=1), counts > 0)
        return weights, message[2 * size : 2 * size + 2]

    def _refuse_parts_of_a_loss(self, rows: int) -> None:
        assert self._trainer is not None
        if self.probe == "micro" and rows > 1 and not self._trainer.lightning_module.automatic_optimization:
            raise MisconfigurationException(
                f"`probe='micro'` cannot know in manual optimization how the losses of {rows} backward passes before one step "
                "belong together. Use `probe='rank'`, or one backward pass a step."
            )

    def _sum_over_ranks(self, message: Tensor, step: int) -> None:
        assert self._trainer is not None
        with network_failures(self._trainer.global_rank, step, doing="average the norms of probes"):
            dist.all_reduce(message)
        meter = getattr(self._trainer.strategy, "meter", None)
        if meter is not None:
            meter.all_reduce("layer rates", message.nbytes, dist.get_world_size())

    def _rule(
        self,
        members: Sequence[tuple[Parameter, dict[str, Any]]],
        weights: Tensor,
        gradients: Tensor,
        probes: Tensor,
        eta: float,
    ) -> Tensor:
        if self.rule == "clars":
            assert self.clip is not None
            if self.mode == "default":
                return rules.clars(weights, probes, eta, self.clip)
            return rules.clars_authors(weights, gradient_norms(members, weights, True), probes, eta, self.clip)
        if self.rate_in_momentum:
            decay = weights.new_tensor([float(group.get("weight_decay", 0.0)) for _, group in members])
            scales = rules.lars(weights, gradients, decay, eta)
        else:
            scales = rules.lars_outside(weights, gradient_norms(members, weights, True), eta)
        return scales if self.clip is None else scales.clamp(max=self.clip)

    def _note(
        self,
        watched: _Watched,
        members: Sequence[tuple[Parameter, dict[str, Any]]],
        names: list[str],
        table: list[float],
    ) -> Scales:
        size = len(members)
        scales, rho, (dropped, counted) = table[:size], table[size : 2 * size], table[2 * size :]
        self.dropped += int(dropped)
        if self.rule == "clars" and self._is_due(watched):
            self.count = counted
            self._warn_of_few_probes()
        moving = [place for place, (p, _) in enumerate(members) if p.grad is not None]
        lrs = {id(group): float(group["lr"]) for _, group in members}
        scaled = [place for place in moving if members[place][0] not in self._skipped]
        used = dict.fromkeys(moving, 1.0) | {place: scales[place] for place in scaled}
        watched.figures = [(names[i], lrs[id(members[i][1])] * used[i], rho[i]) for i in moving]
        known = self.rule == "clars" and not self._local
        if watched is next(iter(self._watched.values())):  # the picture is of the first optimizer
            values = [(rho if known else scales)[place] for place in scaled]
            self._history.add(watched.steps, [names[place] for place in scaled], values, known)
        watched.steps += 1
        self._rest_between_probes()
        return {members[place][0]: scales[place] for place in scaled}

    def _is_due(self, watched: _Watched) -> bool:
        return watched.steps % self.probe_every == 0

    def _rest_between_probes(self) -> None:
        if self._probe is not None:
            self._probe.active = any(self._is_due(watched) for watched in self._watched.values())

    def _warn_of_few_probes(self) -> None:
        if self.count < 4 and not self._warned and self._probe is not None:
            self._warned = True
            rank_zero_warn(
                f"`LayerwiseRateScaling` got {int(self.count)} probes in a step: with fewer than 4 the mean of norms is "
                f"hardly more than the norm of the mean, and CLARS is LARS with `eta={self.eta:g}`. Use more ranks or "
                "`accumulate_grad_batches` (smaller micro-batches), or `probe='loader'`."
            )

    # ---- state ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return means of probes, counters and the picture so far: plain values and tensors."""
        optimizers = [{"steps": w.steps, **w.mean.state_dict()} for w in self._watched.values()] or self._loaded
        return {"optimizers": optimizers, "dropped": self.dropped, "history": self._history.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded, self.dropped = list(state_dict["optimizers"]), int(state_dict["dropped"])
        self._history.load_state_dict(state_dict["history"])
