"""From displacements to the next model: mean, noise, momentum; pure functions of tensors.

mean         g = sum / weights                             trainable ones over all examples with "paper" weights
private      g = (sum of clipped ones + noise) / m
next_model   trainable:  v' = w - lr g;  w' = v' + momentum (v' - v)       buffers:  w' = w - g       integers: as given
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from lightning_distopt.compressors.base import wide
from lightning_distopt.errors import NonFiniteError
from lightning_distopt.federated.nesterov import nesterov_step
from lightning_distopt.federated.privacy import noise_

__all__ = ["mean", "next_model", "private_mean", "trainable_names"]

_BUFFERS = ("running_mean", "running_var")  # of torch's BatchNorm


def trainable_names(arrays: Mapping[str, Tensor], chosen: Collection[str] | None) -> frozenset[str]:
    """Return the arrays that momentum moves: the chosen floating-point ones, or all but BatchNorm's running statistics."""
    floating = frozenset(name for name, tensor in arrays.items() if tensor.is_floating_point())
    if chosen is not None:
        return floating & frozenset(chosen)
    return frozenset(name for name in floating if name.rsplit(".", 1)[-1] not in _BUFFERS)


def mean(
    total: Mapping[str, Tensor], weights: float, trainable: Collection[str], total_examples: float | None
) -> dict[str, Tensor]:
    """Return the mean displacement; trainable ones are divided by ``total_examples`` instead of ``weights`` if it is given."""
    return {
        name: tensor / (total_examples if total_examples is not None and name in trainable else weights)
        for name, tensor in total.items()
    }


def private_mean(
    total: Mapping[str, Tensor], sent: Mapping[str, Tensor], deviation: float, expected: float, key: int
) -> dict[str, Tensor]:
    """Return ``(total + N(0, deviation²)) / expected`` for every floating-point array, also if nobody has answered.

    Args:
        total: sum of clipped displacements; may be empty.
        sent: the model.
        deviation: of the noise on the sum.
        expected: size of a cohort, not the realised one.
        key: of the noise; secret.
    """
    noised = {
        name: total[name] if name in total else torch.zeros(tensor.shape, dtype=wide(tensor.dtype))
        for name, tensor in sent.items()
        if tensor.is_floating_point()
    }
    if deviation > 0:
        noise_(noised, deviation, key)
    return {name: tensor / expected for name, tensor in noised.items()}


def next_model(
    sent: Mapping[str, Tensor],
    v: Mapping[str, Tensor],
    g: Mapping[str, Tensor],
    trainable: Collection[str],
    lr: float,
    momentum: float,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the next model, in the dtypes of ``sent``, and ``v'``, at least float32.

    Args:
        sent: the model as the clients received it.
        v: of the round before; empty in the first one.
        g: mean displacement of floating-point arrays, next value of integer ones; those that lack stay.
        trainable: names that momentum moves.
        lr: server step.
        momentum: in [0, 1).

    Raises:
        NonFiniteError: naming the array, if it would not be finite.
    """
    arrays, following = {}, {}
    for name, tensor in sent.items():
        if not tensor.is_floating_point():
            arrays[name] = g.get(name, tensor).to(tensor.dtype).reshape(tensor.shape)
            continue
        w = tensor.to(wide(tensor.dtype))
        moved = g[name].to(w.dtype)
        if name in trainable:
            new, following[name] = nesterov_step(w, v.get(name, w), moved, lr, momentum)
        else:
            new = w - moved
            if name.endswith("running_var"):
                new.clamp_(min=0)  # the noise of privacy may push a variance below
        arrays[name] = new.to(tensor.dtype)
        if not bool(arrays[name].isfinite().all()):
            raise NonFiniteError(
                f"The server step would make `{name}` infinite or NaN in {tensor.dtype}: lower `lr={lr}` or "
                f"`momentum={momentum}`. The model of the round before is as it was."
            )
    return arrays, following
