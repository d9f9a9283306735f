"""Scaled sign: one bit an element and one scale a tensor.

Source: arXiv:1901.09847 (EF-SignSGD, scale per tensor); arXiv:2008.05823 takes one scale for the whole model.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lightning_distopt.compressors.base import Compressor, Field, Payload, wide
from lightning_distopt.compressors.bits import add_signs_, pack_bits
from lightning_distopt.compressors.kernels import kernels_for

__all__ = ["ScaledSign"]


class ScaledSign(Compressor):
    """Send signs and the mean magnitude: ``C(v) = a * sgn(v)`` with ``a = |v|_1 / n`` and ``sgn(0) = +1``.

    Contraction: ``|v - C(v)|² = (1 - |v|_1² / (n |v|_2²)) |v|²``: good where magnitudes are alike (0.36 left of a
    Gaussian), poor where few entries dominate. The zero's sign costs no third symbol; its error enters the residual.

    Payload: ``ceil(n / 8)`` bytes of bits and one scale (float32; float64 for float64 tensors): 32x smaller than
    float32. The scale is that of the tensor handed to it.
    """

    contractive = True

    def layout(self, numel: int, dtype: torch.dtype, entries: int | None = None) -> tuple[Field, ...]:
        return Field("scale", wide(dtype), 1), Field("bits", torch.uint8, (numel + 7) // 8)

    def _encode(self, flat: Tensor, key: int) -> dict[str, Tensor]:
        kernels = kernels_for(flat)
        scale = self._rounded_scale(flat)
        bits = pack_bits(flat >= 0) if kernels is None else kernels.encode_signs(flat, scale, residual=False)
        return {"scale": scale, "bits": bits}

    def _encode_(self, flat: Tensor, key: int) -> dict[str, Tensor]:
        kernels = kernels_for(flat)
        if kernels is None:
            return super()._encode_(flat, key)
        scale = self._rounded_scale(flat)
        return {"scale": scale, "bits": kernels.encode_signs(flat, scale, residual=True)}

    def _rounded_scale(self, flat: Tensor) -> Tensor:
        # Rounded to the tensor's precision here, so that it is the same number whatever dtype it is decoded into.
        return self._scale(flat).to(flat.dtype).to(wide(flat.dtype)).view(1)

    def _scale(self, flat: Tensor) -> Tensor:
        kernels = kernels_for(flat)
        return _mean_magnitude(flat) if kernels is None else kernels.absolute_sum(flat) / flat.numel()

    def _decode_add_(self, fields: dict[str, Tensor], key: int, out: Tensor, alpha: float) -> None:
        scale = (fields["scale"] * alpha).to(out.dtype)
        kernels = kernels_for(out)
        if kernels is None:
            add_signs_(fields["bits"], scale, out)
        else:
            kernels.add_signs_(fields["bits"], scale, out)

    def split(self, payload: Payload, bounds: list[int]) -> list[Payload]:
        scale, bits = payload.fields["scale"], payload.fields["bits"]
        return [
            Payload({"scale": scale, "bits": bits[a // 8 : (b + 7) // 8]}, torch.Size([b - a]), payload.dtype)
            for a, b in pairwise(bounds)
        ]


def _mean_magnitude(flat: Tensor) -> Tensor:
    if flat.numel() == 0:
        return torch.zeros((), dtype=wide(flat.dtype), device=flat.device)
    mean: Tensor = torch.linalg.vector_norm(flat, 1, dtype=wide(flat.dtype)) / flat.numel()
    if not mean.isfinite() and flat.isfinite().all():  # the sum overflowed: sum fractions of the largest instead
        largest = flat.abs().max().to(mean.dtype)
        mean = (flat.to(mean.dtype) / largest).abs().mean() * largest
    return mean
