"""Top-k sparsification: keep the entries of largest magnitude, exactly.

Source: arXiv:1809.07599; as used with error feedback in arXiv:1901.09847 and arXiv:2008.05823.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_distopt.compressors.base import Compressor, Field, Payload, check_ratio, kept
from lightning_distopt.compressors.kernels import kernels_for

__all__ = ["TopK"]

_MAX_INDEX = 2**31 - 1


class TopK(Compressor):
    """Keep the ``k = max(1, int(n * ratio))`` largest magnitudes of each tensor, with their places.

    ``C(v)_i = v_i`` where ``|v_i|`` is among the k largest, else 0. What is sent is sent exactly, so its residual is
    exactly 0. Contraction: ``|v - C(v)|² = (1 - Σ_top v²/|v|²)|v|² <= (1 - k/n)|v|²``.

    Payload: k values in the tensor's dtype and k int32 places: 8 bytes a kept entry for float32.

    Args:
        ratio: fraction kept, in (0, 1]. Bytes are ``8 * ratio * n``: 0.01 is 50x smaller than float32, and 0.5 saves
            nothing.

    Raises:
        ValueError: if ``ratio`` is outside (0, 1], or a tensor has more than 2**31 - 1 elements.
    """

    contractive = True

    def __init__(self, ratio: float = 0.01) -> None:
        self.ratio = check_ratio(ratio)

    def layout(self, numel: int, dtype: torch.dtype, entries: int | None = None) -> tuple[Field, ...]:
        k = kept(numel, self.ratio) if entries is None else entries
        return Field("values", dtype, k), Field("indices", torch.int32, k)

    def _encode(self, flat: Tensor, key: int) -> dict[str, Tensor]:
        n = flat.numel()
        if n > _MAX_INDEX:
            raise ValueError(f"`tensor` must have at most {_MAX_INDEX} elements for 4-byte places: got {n}. Split it.")
        kernels = kernels_for(flat)
        if kernels is not None:
            places: Tensor = kernels.select_largest(flat, kept(n, self.ratio))
            return {"values": flat[places], "indices": places}
        # torch sorts NaN above all numbers, so a non-finite entry is always sent and never hidden.
        indices = flat.abs().topk(kept(n, self.ratio), sorted=False).indices.sort().values
        return {"values": flat[indices], "indices": indices.to(torch.int32)}

    def _decode_add_(self, fields: dict[str, Tensor], key: int, out: Tensor, alpha: float) -> None:
        kernels = kernels_for(out)
        if kernels is not None and fields["values"].dtype is out.dtype:
            kernels.scatter_add_(out, fields["indices"], fields["values"], alpha)
            return
        out.index_add_(0, fields["indices"], fields["values"].to(out.dtype), alpha=alpha)

    def split(self, payload: Payload, bounds: list[int]) -> list[Payload]:
        values, indices = payload.fields["values"], payload.fields["indices"]
        cuts = torch.searchsorted(indices, torch.tensor(bounds, dtype=indices.dtype, device=indices.device)).tolist()
        return [
            Payload({"values": values[i:j], "indices": indices[i:j] - a}, torch.Size([b - a]), payload.dtype)
            for a, b, i, j in zip(bounds[:-1], bounds[1:], cuts[:-1], cuts[1:], strict=True)
        ]

    def problem(self, payload: Payload) -> str | None:
        places = payload.fields["indices"]
        ascending = bool((places[1:] > places[:-1]).all())  # a difference of 4-byte numbers could wrap around
        if places.numel() and not (ascending and places[0] >= 0 and places[-1] < payload.numel):
            return f"`indices` are not ascending places below {payload.numel}"
        return super().problem(payload)

    def entries(self, payload: Payload) -> int | None:
        return payload.fields["indices"].numel()

    def __repr__(self) -> str:
        return f"TopK(ratio={self.ratio})"
