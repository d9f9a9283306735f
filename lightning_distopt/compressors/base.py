"""A compressor turns a tensor into a payload, the bytes that travel, and a payload back into a tensor.

    tensor ──compress──▶ Payload ──decompress──▶ tensor'          residual = tensor - tensor'

A scheme implements three small functions (``layout``, ``_encode``, ``_decode_add_``) and declares what it bears:

==================  =========================================================================================
``unbiased``        ``E[decompress(compress(v))] == v``: may be averaged without a residual
``contractive``     ``E|v - decompress(compress(v))|² <= (1 - d)|v|²`` with ``d > 0``: may carry error feedback
``linear``          the fields of payloads with one key can be summed: all-reduce is allowed
``shared_randomness``  all ranks must use the same key, and the receiver decodes with it
``per_tensor``      the result depends on how a buffer is cut into tensors
``splittable``      a payload can be cut by coordinates (:meth:`Compressor.split`), so ranks can share the serving
``granularity``     the coordinates at which it can be cut are multiples of this
==================  =========================================================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_distopt.compressors.randomness import fresh_key
from lightning_distopt.errors import NonFiniteError

__all__ = ["Compressor", "Field", "Payload", "check_ratio"]

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Field(NamedTuple):
    """One named section of a payload: ``numel`` elements of ``dtype``."""

    name: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class Payload:
    """What travels for one tensor, and what the receiver needs to rebuild it.

    Only ``fields`` travel. Shape and dtype are known on both ends (all replicas hold the same parameters), and the key
    is derived on both ends.

    Args:
        fields: 1-D contiguous tensors by name, in the order of the compressor's layout.
        shape: shape of the tensor that was compressed.
        dtype: dtype of the tensor that was compressed, and of the one that ``decompress`` returns.
        key: 64-bit key of the randomness; 0 where the scheme draws nothing.
    """

    fields: dict[str, Tensor]
    shape: torch.Size
    dtype: torch.dtype
    key: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that travel, exactly."""
        return sum(field.nbytes for field in self.fields.values())

    @property
    def numel(self) -> int:
        """Elements of the tensor that was compressed."""
        return self.shape.numel()


class Compressor(ABC):
    """Base class of all schemes; see the module's table for the flags."""

    unbiased: bool = False
    contractive: bool = False
    linear: bool = False
    shared_randomness: bool = False
    per_tensor: bool = True
    splittable: bool = True
    granularity: int = 8
    random: bool = False

    @abstractmethod
    def layout(self, numel: int, dtype: torch.dtype, entries: int | None = None) -> tuple[Field, ...]:
        """Describe the payload of a tensor with ``numel`` elements of ``dtype``, so that receivers can parse bytes.

        Args:
            numel: elements of the tensor.
            dtype: its dtype.
            entries: number of entries actually present, for a part of a payload whose size depends on the data.
        """

    @abstractmethod
    def _encode(self, flat: Tensor, key: int) -> dict[str, Tensor]:
        """Return the fields for a 1-D, contiguous tensor, without changing it.

        The input may be non-finite only if the caller said ``assume_finite``; then the fields must decode to something
        non-finite too, never to plausible numbers.
        """

    def _encode_(self, flat: Tensor, key: int) -> dict[str, Tensor]:
        """Like :meth:`_encode`, and leave the residual in ``flat``."""
        fields = self._encode(flat, key)
        self._decode_add_(fields, key, flat, -1.0)
        return fields

    @abstractmethod
    def _decode_add_(self, fields: dict[str, Tensor], key: int, out: Tensor, alpha: float) -> None:
        """Add ``alpha * decoded`` to the 1-D tensor ``out``."""

    def compress(self, tensor: Tensor, key: int | None = None, *, assume_finite: bool = False) -> Payload:
        """Return the payload of ``tensor``, which is not changed.

        Args:
            tensor: any shape, float16, bfloat16, float32 or float64.
            key: 64-bit key of the randomness; ``None`` draws a fresh one from torch's global generator. Schemes that
                draw nothing ignore it.
            assume_finite: the caller vouches that all values are finite; saves one pass over the tensor.

        Raises:
            TypeError: if ``tensor`` is not a dense floating-point tensor.
            NonFiniteError: if ``tensor`` holds a NaN or an infinity.
        """
        flat, key = self._prepared(tensor, key, assume_finite)
        return Payload(self._encode(flat, key), tensor.shape, tensor.dtype, key)

    def compress_(self, buffer: Tensor, key: int | None = None, *, assume_finite: bool = False) -> Payload:
        """Like :meth:`compress`, and leave the residual in ``buffer``.

        Contract: ``buffer_after == buffer_before - decompress(payload)``, rounded in its dtype.
        """
        if not buffer.is_contiguous():
            payload = self.compress(buffer, key, assume_finite=assume_finite)
            self.decompress_add_(payload, buffer, alpha=-1.0)
            return payload
        flat, key = self._prepared(buffer, key, assume_finite)
        return Payload(self._encode_(flat, key), buffer.shape, buffer.dtype, key)

    def _prepared(self, tensor: Tensor, key: int | None, assume_finite: bool) -> tuple[Tensor, int]:
        """Check ``tensor``; return it flat (the same memory if it is contiguous) and the key to use."""
        if tensor.dtype not in _FLOATING or tensor.layout is not torch.strided:
            raise TypeError(
                f"`tensor` must be a dense floating-point tensor: got {tensor.dtype} with layout {tensor.layout}. "
                "Convert it, or leave it out of the exchange."
            )
        flat = tensor.detach().contiguous().view(-1)
        if not assume_finite:
            _check_finite(flat)
        if not self.random:
            return flat, 0
        return flat, fresh_key() if key is None else key

    def decompress(self, payload: Payload) -> Tensor:
        """Return the tensor that the payload stands for, in its original shape and dtype."""
        device = next(iter(payload.fields.values())).device
        out = torch.zeros(payload.shape, dtype=payload.dtype, device=device)
        self.decompress_add_(payload, out)
        return out

    def decompress_add_(self, payload: Payload, out: Tensor, alpha: float = 1.0) -> None:
        """Add ``alpha * decompress(payload)`` to ``out``, any tensor with as many elements.

        Raises:
            ValueError: if ``out`` has another number of elements than the payload's tensor.
        """
        if out.numel() != payload.numel:
            raise ValueError(f"`out` must have {payload.numel} elements like the payload's tensor: got {out.numel()}.")
        with torch.no_grad():
            if out.is_contiguous():
                self._decode_add_(payload.fields, payload.key, out.view(-1), alpha)
            else:
                flat = out.contiguous().view(-1)
                self._decode_add_(payload.fields, payload.key, flat, alpha)
                out.copy_(flat.view(out.shape))

    def split(self, payload: Payload, bounds: list[int]) -> list[Payload]:
        """Cut a payload by coordinates of the flat tensor: part ``i`` decodes to elements ``bounds[i]:bounds[i + 1]``.

        Args:
            payload: of a tensor with ``n`` elements.
            bounds: ascending, from 0 to ``n``; inner bounds are multiples of ``granularity``, so that packed codes
                stay whole bytes.
        """
        raise TypeError(f"`{self}` cannot be split by coordinates. Use `exchange='all_reduce'` or `'all_gather'`.")

    def entries(self, payload: Payload) -> int | None:
        """Return how many entries a (part of a) payload holds, or None where the layout alone decides."""
        return None

    def problem(self, payload: Payload) -> str | None:
        """Say what is wrong with the contents of a payload that fits the layout and may come from anywhere; ``None`` if nothing.

        Decoding it then reads and writes nothing but what belongs to it, and gives finite numbers.
        """
        for name, values in payload.fields.items():
            if values.is_floating_point() and not all_finite(values):
                return f"`{name}` holds a NaN or an infinity"
        return None

    def nbytes(self, numel: int, dtype: torch.dtype = torch.float32) -> int:
        """Return the exact payload size in bytes of a tensor with ``numel`` elements."""
        return sum(field.numel * field.dtype.itemsize for field in self.layout(numel, dtype))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def check_ratio(ratio: object) -> float:
    """Return ``ratio`` as a float if it is a fraction in (0, 1].

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is outside of its range.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, Real):
        raise TypeError(f"`ratio` must be a number in (0, 1]: got {ratio!r}. Use for example `ratio=0.01` to keep 1 %.")
    value = float(ratio)
    if not 0.0 < value <= 1.0:
        raise ValueError(f"`ratio` must be in (0, 1], the fraction kept: got {ratio}. Use 0.01 to keep 1 %.")
    return value


def kept(numel: int, ratio: float) -> int:
    """Return ``max(1, int(numel * ratio))``, the entries kept of ``numel``; 0 of an empty tensor."""
    return min(numel, max(1, int(numel * ratio)))


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums over a tensor of ``dtype`` are taken in: at least float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def fractions(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row over its largest magnitude, in float64, and that magnitude: sums and squares cannot overflow.

    Args:
        rows: shape ``(rows, elements)``; the second result has shape ``(rows, 1)``, and is 0 for a row of zeros.
    """
    largest = rows.abs().amax(1, keepdim=True).double()
    return rows.double() / torch.where(largest > 0, largest, 1.0), largest


def all_finite(flat: Tensor) -> bool:
    """Whether every element is finite, by one sum in the common case."""
    # A sum is finite only if all terms are; it may overflow without a bad term, so only then look at each. Torch sums
    # bfloat16 in float32 by itself, nine times faster than when it is asked to.
    dtype = None if flat.dtype is torch.bfloat16 else wide(flat.dtype)
    return bool(flat.sum(dtype=dtype).isfinite()) or bool(flat.isfinite().all())


def _check_finite(flat: Tensor) -> None:
    if all_finite(flat):
        return
    bad = (~flat.isfinite()).nonzero().view(-1)
    nans = int(flat.isnan().sum())
    raise NonFiniteError(
        f"`tensor` must be finite: got {nans} NaN and {len(bad) - nans} infinite of {flat.numel()} elements, the first "
        f"at flat index {int(bad[0])}. Clip or skip the step before compressing; a payload would hide them."
    )
