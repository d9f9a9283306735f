"""Local updates as a Lightning strategy: replicas that talk every H steps, and what they do with the average."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from lightning_distopt.compressors import Compressor, Specification
from lightning_distopt.compressors.exact import Exact
from lightning_distopt.compressors.text import as_compressor
from lightning_distopt.data_parallel import OuterOptimizer, UpdateSync, UpdateSyncConfig
from lightning_distopt.data_parallel.cohort import Weighting
from lightning_distopt.data_parallel.exchanges import ExchangeName
from lightning_distopt.data_parallel.non_finite import NonFinite
from lightning_distopt.data_parallel.torch_outer import as_outer_optimizer
from lightning_distopt.strategies.checks import choice, count, ddp_arguments, fraction
from lightning_distopt.strategies.combinations import ExchangeChoice, Scope
from lightning_distopt.strategies.compressed_ddp import CompressedDDPStrategy
from lightning_distopt.strategies.local_steps import LocalSteps
from lightning_distopt.strategies.samples import samples_of_all_ranks

__all__ = ["InnerState", "LocalUpdateStrategy", "UpdateFeedback"]

UpdateFeedback = Literal["local", "step_ahead", "none"]
InnerState = Literal["keep", "reset"]


class LocalUpdateStrategy(CompressedDDPStrategy):
    """Data parallel training whose replicas take ``sync_every`` local steps, then exchange how far they came.

    With ``x`` the common model and ``z_k`` what rank k has after its local steps::

        g = Σ p_k (x - z_k)        averaged displacement, the pseudo-gradient, in units of parameters
        x' = outer step(x, g)      "plain": x - g;  FedMom: v' = x - lr g, x' = v' + momentum (v' - v)

    It is the engine of ``compressed_ddp`` with more than one step a round. Every ``training_step`` and every optimizer is the
    module's own, and acts on local gradients: with ``sync_every=1``, plain SGD inside and "plain" outside it equals ``ddp``.
    Validation and checkpoints see ``x`` and averaged buffers, also in the middle of a round; ``on_train_batch_end`` there sees
    the rank's own parameters. BatchNorm's statistics are averaged when a round ends, integer buffers become their maximum,
    and neither gets momentum.

    Memory a rank, beyond ``ddp``'s parameters, gradients and optimizer: two copies of the parameters (``x``, and the residual or
    what is sent), and the outer optimizer's (one for FedMom), less the gradient buckets of ``ddp``.

    Args:
        sync_every: local optimizer steps a round, H >= 1; divides the bytes by it.
        outer_optimizer: what moves the common model: "plain" (local SGD, FedAvg), "fedmom", an ``OuterOptimizer`` such as
            ``FedMom(0.7, 0.9)`` (DiLoCo) or ``TorchOuter("torch.optim.Adam", {"lr": 0.1})``, or the class path of an optimizer in
            ``torch.optim``. Momentum 0.9 amplifies a constant displacement tenfold: where it oscillates, lower its rate first.
        compressor: what travels of the displacement: ``None`` (all of it, as it is), or as in ``CompressedDDPStrategy``.
        error_feedback: what becomes of what the compressor leaves out: "local" (sent later; the default with a
            compressor), "step_ahead" (and local steps begin ``coefficient`` of it ahead), "none" (forgotten).
        coefficient: for "step_ahead", in [0, 1]; ``None`` is 1. 0.85 is SA-PEF.
        weighting: how much a rank counts: "normalized" (samples of its training data over those of the ranks in the round;
            goes with a server rate of 1), "paper" (over those of all ranks; goes with ranks over participants), "uniform".
        participation: share of the ranks in a round, in (0, 1], at least one rank; drawn from the seed of
            ``seed_everything``, alike on all ranks. The others' steps do not happen: their gradients are dropped, their
            optimizers left alone, and they take the common model. Saves neither time nor bytes here; it is what a federation
            does.
        warm_start_steps: optimizer steps at the start with an exact plain average after each, as in ``ddp`` for SGD.
        inner_state: "keep" the local optimizer's state from round to round (DiLoCo), or "reset" it (FedAvg, FedMom).
        fragments: parts of the model that are exchanged in turn, each every ``sync_every`` steps, which they must divide;
            divides the greatest bytes at a time (Streaming DiLoCo, arXiv:2501.18512).
        delay: local steps that go on while a fragment's exchange is under way, below ``sync_every / fragments``.
        mix: what stays of a rank's own parameters when the common ones arrive, in [0, 1].
        server_compression: see ``CompressedDDPStrategy``.
        exchange: the same.
        scope: the same.
        bucket_mb: the same.
        non_finite: the same.
        strict_sidecars: the same.
        allow_noncontractive: the same.
        **ddp_kwargs: the same.

    Raises:
        ValueError: for a value outside its range, or a combination that cannot work; it says which and what to do.
        TypeError: for an unknown argument, or something else than an outer optimizer.

    Example::

        import lightning_distopt
        trainer = Trainer(devices=8, strategy="fedmom")
        trainer = Trainer(devices=8, strategy=LocalUpdateStrategy(sync_every=100, outer_optimizer=FedMom(0.7, 0.9)))

    Source: arXiv:2002.02090 (FedMom), arXiv:2311.08105 (DiLoCo), arXiv:2501.18512 (fragments); differences with the papers
    are listed in ``docs/local_updates.md``.
    """

    strategy_name: ClassVar[str] = "local_sgd"

    def __init__(
        self,
        sync_every: int = 8,
        outer_optimizer: OuterOptimizer | str = "plain",
        compressor: Compressor | str | None = None,
        error_feedback: UpdateFeedback | None = None,
        coefficient: float | None = None,
        weighting: Weighting = "normalized",
        participation: float = 1.0,
        warm_start_steps: int = 0,
        inner_state: InnerState = "keep",
        fragments: int = 1,
        delay: int = 0,
        mix: float = 0.0,
        server_compression: bool | None = None,
        exchange: ExchangeChoice = "auto",
        scope: Scope = "tensor",
        bucket_mb: float = 25.0,
        non_finite: NonFinite = "raise",
        strict_sidecars: bool = False,
        allow_noncontractive: bool = False,
        **ddp_kwargs: Any,
    ) -> None:
        ddp_arguments(type(self).__name__, ddp_kwargs)
        super().__init__(
            Exact() if compressor is None else _of_updates(compressor),
            _feedback(compressor, error_feedback, coefficient, server_compression, scope),
            coefficient,
            averaging_period=0,  # said, so that the command line does not offer them
            dense_steps=0,
            server_compression=server_compression,
            exchange=exchange,
            sync_every=sync_every,
            scope=scope,
            bucket_mb=bucket_mb,
            non_finite=non_finite,
            strict_sidecars=strict_sidecars,
            allow_noncontractive=allow_noncontractive,
            **ddp_kwargs,
        )
        self.outer_optimizer = as_outer_optimizer(outer_optimizer)
        self.weighting: Weighting = choice("weighting", weighting, Weighting)
        self.participation = fraction("participation", participation)
        if self.participation == 0.0:
            raise ValueError("`participation` must be in (0, 1]: got 0. Use for example `participation=0.1`.")
        self.warm_start_steps = count("warm_start_steps", warm_start_steps, 0)
        self.inner_state: InnerState = choice("inner_state", inner_state, InnerState)
        self.fragments = count("fragments", fragments, 1)
        self.delay = count("delay", delay, 0)
        self.mix = fraction("mix", mix)
        self._update_config("all_reduce")  # what does not go together is refused here, not in the workers
        self._refuse_what_fragments_do_not_bear()

    def _refuse_what_fragments_do_not_bear(self) -> None:
        given = {name: getattr(self, name) for name, idle in (("fragments", 1), ("delay", 0), ("mix", 0.0))
                 if getattr(self, name) != idle}  # fmt: skip
        if not given:
            return
        named = ", ".join(f"`{name}={value}`" for name, value in given.items())
        for argument, value, wanted, why in (
            ("participation", self.participation, 1.0, "rounds of fragments overlap, so no rank could sit one out"),
            ("inner_state", self.inner_state, "keep", "one part of the optimizer's state would outlive another"),
        ):
            if value != wanted:
                raise ValueError(
                    f"`{argument}` must be {wanted!r} with {named}, because {why}: got {value!r}. Leave one of them out."
                )
        if self.coefficient and (self.delay or self.mix):
            raise ValueError(
                f"`coefficient` must be 0 with {named}, because such a round does not begin at the common model: got "
                f"{self.coefficient}. Use `error_feedback='local'`."
            )

    @property
    def sends_updates(self) -> bool:
        """Always: gradients stay where they are."""
        return True

    @property
    def _sending(self) -> str:
        return f"`{type(self).__name__}`"

    def _serves(self, exchange: str) -> bool:
        if self.server_compression is None:
            return exchange == "sharded_server" and self.uses_residuals
        return self.server_compression

    def _update_config(self, exchange: ExchangeName) -> UpdateSyncConfig:
        return replace(
            super()._update_config(exchange),
            residuals=self.uses_residuals,
            outer=self.outer_optimizer,
            weighting=self.weighting,
            participation=self.participation,
            warm_steps=self.warm_start_steps,
            fragments=self.fragments,
            delay=self.delay,
            mix=self.mix,
        )

    def _make_local_steps(self, sync: UpdateSync) -> LocalSteps:
        fresh = self.inner_state == "reset"
        return LocalSteps(self, sync, self._sends_buffers, average_buffers=True, fresh_state=fresh)

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.weighting != "uniform" and self.update_sync is not None:
            self.update_sync.count_samples(samples_of_all_ranks(self, self.weighting))


def _of_updates(compressor: Compressor | str) -> Compressor:
    made = as_compressor(compressor)
    if isinstance(made, Specification):
        raise ValueError(
            f"`compressor` must work on displacements: {made} brings communication of its own, for gradients. Use for example "
            "'topk:0.01' or 'sign', or `CompressedDDPStrategy`."
        )
    return made


def _feedback(
    compressor: Compressor | str | None,
    error_feedback: UpdateFeedback | None,
    coefficient: float | None,
    server_compression: bool | None,
    scope: Scope,
) -> UpdateFeedback:
    """Return what becomes of what is left out; raise for what would do nothing where nothing is."""
    if compressor is None:
        for name, value in (
            ("error_feedback", None if error_feedback == "none" else error_feedback),
            ("coefficient", coefficient),
            ("server_compression", server_compression or None),
            ("scope", None if scope == "tensor" else scope),
        ):
            if value is not None:
                raise ValueError(
                    f"`{name}` belongs to a compressor: got {value!r} with `compressor=None`, where nothing is left out. Leave "
                    "it out, or use for example `compressor='topk:0.01'`."
                )
        return "none"
    if error_feedback is None:
        return "local" if coefficient is None else "step_ahead"
    chosen: UpdateFeedback = choice("error_feedback", error_feedback, UpdateFeedback)
    return chosen
