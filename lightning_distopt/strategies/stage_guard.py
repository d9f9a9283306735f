"""What all devices of a synchronous pipeline do when a gradient on any of them holds a NaN or an infinity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn import Parameter

from lightning_distopt.data_parallel.agreement import agree
from lightning_distopt.data_parallel.non_finite import NonFinite, drop_gradients, first_bad_gradient, zero_bad_entries
from lightning_distopt.errors import NonFiniteError
from lightning_distopt.exchange import Meter

__all__ = ["judge_gradients"]


def judge_gradients(
    policy: NonFinite,
    own: Sequence[Parameter],
    names: Mapping[Parameter, str],
    step: int,
    meter: Meter,
    device: torch.device,
) -> bool:
    """Look at the gradients of this device before the optimizer does; a collective of 32 bytes.

    Args:
        policy: "raise", "skip" (no device steps) or "zero" (bad entries count as zero).
        own: parameters of this device, in the order of the model.
        names: of all parameters of the model, alike on all ranks, in its order.
        step: for the message.
        meter: counts what travels.
        device: where collectives take their tensors.

    Returns:
        Whether any device had a bad gradient, the same on all.

    Raises:
        NonFiniteError: on all ranks, naming rank, step and parameter, if the policy is "raise".
    """
    backwards = own[::-1]  # a NaN spreads from the last layer that has one to those before it
    bad = first_bad_gradient(backwards)
    order = list(names.values())
    if bad is not None and policy == "zero":
        zero_bad_entries(parameter.grad for parameter in own)
    culprit = agree(0, None if bad is None else order.index(names[backwards[bad]]), False, meter, device).culprit
    if culprit is None:
        return False
    if policy == "raise":
        raise NonFiniteError(
            f"In step {step} the gradient of `{order[culprit[1]]}` holds a NaN or an infinity on rank {culprit[0]}, and all "
            "ranks stopped before the optimizer's step. Look for the cause in that layer, in the batch or in the loss, lower "
            "the learning rate, or use `non_finite='skip'`."
        )
    if policy == "skip":
        drop_gradients(own)
    return True
