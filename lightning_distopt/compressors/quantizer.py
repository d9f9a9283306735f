"""Quantisers: bucket by bucket, a few levels and a small code an element.

    tensor    [ bucket 0: d values | bucket 1: d values | ... | the rest, at its own length ]
    payload     levels               levels                     levels        (side information, wide floats)
                code code code ...   code code code ...         code ...      (packed, see ``codes``)

A scheme says what it sends of a bucket (``_side``) and which levels follow from that (``_table``). Most round at random
to the two levels next to a value, so that the mean is the value; :class:`RandomRounding` does that for them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from lightning_distopt.compressors.base import Compressor, Field, Payload, fractions, wide
from lightning_distopt.compressors.codes import alignment, bits_per_code, pack_codes, packed_bytes, unpack_codes
from lightning_distopt.compressors.kernels import kernels_for
from lightning_distopt.compressors.randomness import uniform

__all__ = ["Quantizer", "RandomRounding"]

_PART = 40 * (1 << 13)  # elements handled at once: whole bytes of every code, and temporaries that stay in the cache


class Quantizer(Compressor):
    """Base class of the schemes with levels and codes.

    Args:
        symbols: number of levels, 2 to 256.
        side: numbers sent a bucket.
        bucket_size: elements that share levels; ``None`` is all of the tensor.
        clip: clip values to this many standard deviations of their bucket (round zero) before levels are chosen; ``None``
            does not. What is clipped away is part of the residual.

    Raises:
        ValueError: if ``bucket_size`` is below 1 or ``clip`` not above 0.
    """

    splittable = True

    def __init__(self, symbols: int, side: int, bucket_size: int | None, clip: float | None = None) -> None:
        self.symbols = symbols
        self.side = side
        self.bucket_size = check_bucket_size(bucket_size)
        self.clip = _check_clip(clip)
        self.granularity = math.lcm(8, alignment(symbols), bucket_size or 1)

    @abstractmethod
    def _table(self, side: Tensor) -> Tensor:
        """Return the levels, ascending, shape ``(buckets, symbols)``, of side information ``(buckets, side)``."""

    @abstractmethod
    def _quantize(self, rows: Tensor, dtype: torch.dtype, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return side information ``(buckets, side)``, made by :meth:`_settle`, and uint8 codes like ``rows``.

        Args:
            rows: buckets, shape ``(buckets, elements)``, clipped, float32 or float64.
            dtype: of the tensor; levels are rounded to it.
            draws: uniforms in [0, 1) like ``rows`` where the scheme is random.
        """

    def layout(self, numel: int, dtype: torch.dtype, entries: int | None = None) -> tuple[Field, ...]:
        levels = self.side * -(-numel // (self.bucket_size or max(1, numel)))
        return Field("levels", wide(dtype), levels), Field("codes", torch.uint8, packed_bytes(numel, self.symbols))

    def _compiled(self, kernels: ModuleType, flat: Tensor, key: int, residual: bool) -> dict[str, Tensor] | None:
        """Return the fields by compiled kernels, and leave the residual if asked; ``None`` where the scheme has none."""
        return None

    def _encode(self, flat: Tensor, key: int) -> dict[str, Tensor]:
        kernels = kernels_for(flat)
        compiled = None if kernels is None else self._compiled(kernels, flat, key, residual=False)
        return self._plain(flat, key) if compiled is None else compiled

    def _encode_(self, flat: Tensor, key: int) -> dict[str, Tensor]:
        kernels = kernels_for(flat)
        compiled = None if kernels is None else self._compiled(kernels, flat, key, residual=True)
        return super()._encode_(flat, key) if compiled is None else compiled

    def _plain(self, flat: Tensor, key: int) -> dict[str, Tensor]:
        sides, codes = [flat.new_empty(0, dtype=wide(flat.dtype))], [flat.new_empty(0, dtype=torch.uint8)]
        start = 0
        for rows in self._buckets(flat):
            values = rows.to(wide(flat.dtype))
            if self.clip is not None:
                values = clipped(values, self.clip)
            draws = uniform(key, rows.numel(), flat.device, start).view_as(rows) if self.random else None
            side, code = self._quantize(values, flat.dtype, draws)
            sides.append(side.view(-1))
            codes.append(code.view(-1))
            start += rows.numel()
        return {"levels": torch.cat(sides), "codes": pack_codes(torch.cat(codes), self.symbols)}

    def _buckets(self, flat: Tensor) -> Iterator[Tensor]:
        """Yield the buckets as rows, some at a time, and the shorter last one by itself."""
        size = self.bucket_size or max(1, flat.numel())
        whole = flat.numel() // size * size
        yield from torch.split(flat[:whole].view(-1, size), max(1, _PART // size)) if whole else ()
        if whole < flat.numel():
            yield flat[whole:].view(1, -1)

    def _settle(self, side: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``side`` as the receiver will see it: rounded to ``dtype``, in range, NaN for a bucket that holds one."""
        limit = torch.finfo(dtype).max
        settled = side.clamp(-limit, limit).to(dtype).to(rows.dtype)
        return torch.where(rows.isfinite().all(1, keepdim=True), settled, math.nan)

    def _levels(self, side: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the table of flat side information, rounded to ``dtype``."""
        return self._table(side.view(-1, self.side)).to(dtype)

    def _decode_add_(self, fields: dict[str, Tensor], key: int, out: Tensor, alpha: float) -> None:
        if not out.numel():
            return
        levels = self._levels(fields["levels"], out.dtype) * alpha
        size = self.bucket_size or out.numel()
        kernels = kernels_for(out)
        if kernels is not None:
            kernels.add_levels_(kernels.unpack(fields["codes"], out.numel(), self.symbols), levels, size, out)
            return
        table = levels.view(-1)
        bits = packed_bytes(_PART, self.symbols)
        for start, packed in zip(range(0, out.numel(), _PART), torch.split(fields["codes"], bits), strict=True):
            part = out[start : start + _PART]
            codes = unpack_codes(packed, part.numel(), self.symbols).int()
            bucket = torch.arange(start, start + part.numel(), device=out.device) // size
            part.add_(table[bucket * self.symbols + codes])

    def decompress_add_(self, payload: Payload, out: Tensor, alpha: float = 1.0) -> None:
        if out.dtype is payload.dtype or out.numel() != payload.numel:
            super().decompress_add_(payload, out, alpha)
        else:  # levels that follow from others are rounded to the payload's dtype, on every receiver alike
            out.add_(self.decompress(payload).view(out.shape), alpha=alpha)

    def split(self, payload: Payload, bounds: list[int]) -> list[Payload]:
        levels, codes = payload.fields["levels"], payload.fields["codes"]
        parts = []
        for a, b in pairwise(bounds):
            first, last = (0, 1) if self.bucket_size is None else (a // self.bucket_size, -(-b // self.bucket_size))
            fields = {
                "levels": levels[self.side * first : self.side * last] if b > a else levels[:0],
                "codes": codes[packed_bytes(a, self.symbols) : packed_bytes(b, self.symbols)],
            }
            parts.append(Payload(fields, torch.Size([b - a]), payload.dtype))
        return parts

    def problem(self, payload: Payload) -> str | None:
        codes = payload.fields["codes"]
        if self.symbols == 3:
            bad = bool((codes >= 3**5).any())
        else:
            bad = bool((unpack_codes(codes, payload.numel, self.symbols) >= self.symbols).any())
        return f"`codes` are not all below {self.symbols}" if bad else super().problem(payload)

    @property
    def bits(self) -> float:
        """Bits of a code on the wire."""
        return 1.6 if self.symbols == 3 else float(bits_per_code(self.symbols))


class RandomRounding(Quantizer):
    """A quantiser that rounds at random to a neighbouring level, up with probability ``(v - low) / (high - low)``.

    So ``E[C(v)] = v`` within the outer levels, and values outside of them become the nearest.
    """

    random = True

    @abstractmethod
    def _side(self, rows: Tensor) -> Tensor:
        """Return what is sent of each of ``rows``, shape ``(buckets, side)``."""

    def _quantize(self, rows: Tensor, dtype: torch.dtype, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        assert draws is not None
        side = self._settle(self._side(rows), rows, dtype)
        return side, round_randomly(rows, self._table(side).to(dtype).to(rows.dtype), draws)

    def _compiled_side(self, kernels: ModuleType, flat: Tensor, size: int, limits: Tensor | None) -> Tensor | None:
        """Return what is sent of each bucket, shape ``(buckets, side)``, not finite where a value is not.

        Args:
            kernels: see :mod:`lightning_distopt.compressors.kernels`.
            flat: float32.
            size: of a bucket.
            limits: values are clipped to plus and minus these, float32, shape ``(buckets, 1)``.
        """
        return None

    def _compiled(self, kernels: ModuleType, flat: Tensor, key: int, residual: bool) -> dict[str, Tensor] | None:
        size = self.bucket_size or flat.numel()
        limits = None if self.clip is None else (self.clip * kernels.deviations(flat, size)).float()[:, None]
        side = self._compiled_side(kernels, flat, size, limits)
        if side is None:
            return None
        side = torch.where(side.isfinite().all(1, keepdim=True), side, math.nan)
        codes = kernels.round_randomly(flat, self._table(side), size, key, residual)
        return {"levels": side.view(-1), "codes": kernels.pack(codes, self.symbols)}


def clipped(rows: Tensor, deviations: float) -> Tensor:
    """Return values clipped, round zero, to this many of their row's population standard deviations."""
    parts, largest = fractions(rows)
    limit = (deviations * parts.std(1, correction=0, keepdim=True) * largest).to(rows.dtype)
    return torch.where(rows.isfinite(), rows.clamp(-limit, limit), rows)


def round_randomly(rows: Tensor, table: Tensor, draws: Tensor) -> Tensor:
    """Return the code of the level, one of the two next to a value, that each draw decides on.

    Args:
        rows: values, shape ``(buckets, elements)``.
        table: ascending levels, shape ``(buckets, symbols)``.
        draws: uniforms in [0, 1), shape of ``rows``.
    """
    cell = torch.zeros_like(rows, dtype=torch.uint8)
    for level in range(1, table.size(1) - 1):
        cell += rows >= table[:, level : level + 1]
    half = table * 0.5  # the whole width can overflow
    low = half.gather(1, cell.long())
    width = half.gather(1, cell.long() + 1) - low
    return cell + (draws * width < rows * 0.5 - low).to(torch.uint8)


def check_bucket_size(bucket_size: int | None) -> int | None:
    """Return ``bucket_size`` if it is ``None`` or an integer of at least 1."""
    if bucket_size is None:
        return None
    if isinstance(bucket_size, bool) or not isinstance(bucket_size, int):
        raise TypeError(f"`bucket_size` must be an integer >= 1 or None: got {bucket_size!r}. Use for example 2048.")
    if bucket_size < 1:
        raise ValueError(f"`bucket_size` must be an integer >= 1: got {bucket_size}. Use for example 2048.")
    return bucket_size


def check_levels(levels: int, allowed: tuple[int, ...]) -> int:
    """Return ``levels`` if it is an integer, and one of ``allowed``."""
    if isinstance(levels, bool) or not isinstance(levels, int) or levels not in allowed:
        named = [str(count) for count in allowed]
        if len(named) > 5:
            named[3:-1] = ["..."]
        raise ValueError(f"`levels` must be one of {', '.join(named)}: got {levels!r}. Use for example 5.")
    return levels


def _check_clip(clip: float | None) -> float | None:
    if clip is None:
        return None
    if isinstance(clip, bool) or not isinstance(clip, (int, float)) or not 0.0 < clip < math.inf:
        raise ValueError(f"`clip` must be above 0, in standard deviations, or None: got {clip!r}. Use for example 2.5.")
    return float(clip)
