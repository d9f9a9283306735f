"""Arguments, modules and callbacks that cannot go together in ``CompressedDDPStrategy``: each with the value and the cure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn import Embedding, EmbeddingBag

from lightning_distopt.compressors import Specification
from lightning_distopt.strategies.checks import choice, fraction

if TYPE_CHECKING:
    from lightning_distopt.strategies.compressed_ddp import CompressedDDPStrategy

__all__ = [
    "ErrorFeedback",
    "ExchangeChoice",
    "Scope",
    "checked_coefficient",
    "checked_error_feedback",
    "refuse_averages_of_local_parameters",
    "refuse_tensors_that_cannot_be_compressed",
    "refuse_what_a_specification_brings",
    "refuse_what_belongs_to_updates",
]

ErrorFeedback = Literal["step_ahead", "local", "gradient", "none"]
ExchangeChoice = Literal["auto", "all_reduce", "all_gather", "sharded_server"]
Scope = Literal["tensor", "model"]


def checked_error_feedback(strategy: CompressedDDPStrategy, error_feedback: ErrorFeedback) -> ErrorFeedback:
    """Return ``error_feedback`` if what travels allows it."""
    specification = strategy.compressor if isinstance(strategy.compressor, Specification) else None
    chosen: ErrorFeedback = choice("error_feedback", error_feedback, ErrorFeedback)
    if specification is None or chosen == "none" or (chosen == "gradient" and specification.keeps_residual):
        return chosen
    fitting = "'gradient' or 'none'" if specification.keeps_residual else "'none'"
    raise ValueError(
        f"`error_feedback` must be {fitting} with `compressor={specification}`, which works on gradients"
        f"{'' if specification.keeps_residual else ' and keeps no residual'}: got {chosen!r}. Use "
        f"`error_feedback={specification.error_feedback!r}`."
    )


def checked_coefficient(strategy: CompressedDDPStrategy, coefficient: float | None) -> float:
    """Return the coefficient, or its default."""
    if not strategy.sends_updates:
        if coefficient is not None:
            raise ValueError(
                f"`coefficient` belongs to error feedback in units of parameters: got {coefficient} with "
                f"`error_feedback={strategy.error_feedback!r}`. Leave it out."
            )
        return 0.0
    if strategy.error_feedback in ("local", "none"):
        if coefficient:
            raise ValueError(
                f"`coefficient` must be 0 with `error_feedback={strategy.error_feedback!r}`: got {coefficient}. Use "
                "`error_feedback='step_ahead'` to take gradients ahead of the common model."
            )
        return 0.0
    return 1.0 if coefficient is None else fraction("coefficient", coefficient)


def refuse_what_belongs_to_updates(strategy: CompressedDDPStrategy) -> None:
    """Raise for arguments that would do nothing where gradients are sent."""
    for argument, value, idle in (
        ("averaging_period", strategy.averaging_period, 0),
        ("sync_every", strategy.sync_every, 1),
        ("scope", strategy.scope, "tensor"),
    ):
        if value != idle:
            raise ValueError(
                f"`{argument}` belongs to error feedback in units of parameters: got {value!r} with "
                f"`error_feedback={strategy.error_feedback!r}`. Leave it out, or use `error_feedback='step_ahead'`."
            )
    if strategy.allow_noncontractive and not strategy.uses_residuals:
        raise ValueError(
            "`allow_noncontractive` belongs to error feedback: got True with `error_feedback='none'`, where no residual "
            "can grow. Leave it out."
        )
    if strategy.error_feedback == "gradient" and strategy.server_compression:
        raise ValueError(
            "`server_compression` must be False with `error_feedback='gradient'`: got True, and what the server left out "
            "would be lost. Leave it out, or use `error_feedback='step_ahead'`, where the server has a residual."
        )


def refuse_what_a_specification_brings(strategy: CompressedDDPStrategy) -> None:
    """Raise for arguments that would do nothing beside a scheme with communication of its own."""
    for argument, value, idle in (
        ("exchange", strategy.exchange, "auto"),
        ("server_compression", bool(strategy.server_compression), False),
        ("allow_noncontractive", strategy.allow_noncontractive, False),
    ):
        if value != idle:
            raise ValueError(
                f"`{argument}` must be {idle!r} with `compressor={strategy.compressor}`, which brings communication of its own: "
                f"got {value!r}. Leave it out."
            )


def refuse_averages_of_local_parameters(strategy: CompressedDDPStrategy) -> None:
    """Raise for callbacks that would average what each rank has for itself."""
    assert strategy.lightning_module is not None
    callbacks = strategy.lightning_module.trainer.callbacks  # type: ignore[attr-defined]
    averaging = [type(c).__name__ for c in callbacks if isinstance(c, (StochasticWeightAveraging, WeightAveraging))]
    if strategy.sync_every > 1 and averaging:
        raise MisconfigurationException(
            f"`sync_every={strategy.sync_every}` does not go with {averaging[0]}: between exchanges each rank holds parameters "
            "of its own, and each would average those. Use `sync_every=1`, or leave the callback out."
        )


def refuse_tensors_that_cannot_be_compressed(strategy: CompressedDDPStrategy) -> None:
    """Raise for complex parameters, and for layers with sparse gradients where those are sent."""
    module, name = strategy.lightning_module, type(strategy).__name__
    assert module is not None
    odd = [n for n, parameter in module.named_parameters() if parameter.is_complex()]
    if odd:
        raise TypeError(
            f"`{name}` cannot compress complex parameters: got {odd}. Hold their real and imaginary parts in real "
            "parameters (`torch.view_as_real`), or use `strategy='ddp'`."
        )
    sparse = [n for n, m in module.named_modules() if isinstance(m, (Embedding, EmbeddingBag)) and m.sparse]
    if sparse and not strategy.sends_updates:
        raise MisconfigurationException(
            f"`error_feedback={strategy.error_feedback!r}` cannot compress sparse gradients, which {sparse} would make. Use "
            "`sparse=False` there, or `error_feedback='step_ahead'`, which sends updates."
        )
