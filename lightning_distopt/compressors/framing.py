"""A payload as bytes that may come from anywhere: a header says what it is, and nothing is believed before it is checked.

    magic | version | dtype | dimensions | fields | header bytes | body bytes | digest     fixed, 36 bytes
    key, shape, (dtype, elements) of each field                                            header bytes - 36
    field | field | ...                                                                    body bytes

All numbers are little-endian. The digest (BLAKE2b, 16 bytes) covers everything but itself, so a flipped bit or a cut is
always noticed. It is no signature: whoever can reach the receiver can send a well-made payload, so the receiver says which
tensor it expects and the compressor checks the contents. Lengths are compared before anything is allocated.

Collectives between the ranks of one run need none of this: they trust one another, and know all sizes.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_distopt.compressors.base import Compressor, Field, Payload
from lightning_distopt.errors import PayloadError

__all__ = ["VERSION", "frame", "unframe"]

VERSION = 1
_MAGIC = b"LDOP"
_FIXED = struct.Struct("<4sHBBHHQ16s")  # magic, version, dtype, dimensions, fields, header bytes, body bytes, digest
_FIELD = struct.Struct("<BxxxxxxxQ")  # dtype, elements
_KEY = struct.Struct("<Q")
_MAX_DIMENSIONS, _MAX_FIELDS = 32, 16
_DTYPES: tuple[torch.dtype, ...] = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int32, torch.int64,
)  # fmt: skip


def frame(payload: Payload) -> bytes:
    """Return a payload with a header, ready for a sender whom the receiver does not know.

    Raises:
        TypeError: for a field of a dtype that has no number in the format.
    """
    body = [tensor.detach().cpu().contiguous() for tensor in payload.fields.values()]
    header = _KEY.pack(payload.key & (2**64 - 1))
    header += struct.pack(f"<{len(payload.shape)}Q", *payload.shape)
    header += b"".join(_FIELD.pack(_number(tensor.dtype), tensor.numel()) for tensor in body)
    data = b"".join(tensor.view(-1).view(torch.uint8).numpy().tobytes() for tensor in body)
    sizes = (_FIXED.size + len(header), len(data))
    unsigned = _fixed(payload.dtype, len(payload.shape), len(body), sizes, b"")
    digest = _digest(unsigned, header, data)
    return _fixed(payload.dtype, len(payload.shape), len(body), sizes, digest) + header + data


def unframe(
    data: bytes | bytearray | memoryview,
    compressor: Compressor,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Payload:
    """Return the payload in ``data``, if it is one of ``compressor`` for a tensor of this shape and dtype.

    Allocates at most a copy of ``data``; what it says of sizes is compared with its own length and with what is expected.

    Args:
        data: bytes from a sender who need not be trusted.
        compressor: the scheme that both sides agreed on.
        shape: of the tensor that the receiver has a place for.
        dtype: of that tensor.

    Raises:
        PayloadError: naming what is wrong, for anything else.
    """
    view = memoryview(data).cast("B")
    if len(view) < _FIXED.size:
        raise PayloadError(
            f"A payload has at least {_FIXED.size} bytes: got {len(view)}. It was cut off; send it again."
        )
    magic, version, number, dimensions, fields, header_bytes, body_bytes, digest = _FIXED.unpack(view[: _FIXED.size])
    if magic != _MAGIC:
        raise PayloadError(f"A payload begins with {_MAGIC!r}: got {magic!r}. These bytes are something else.")
    if version != VERSION:
        raise PayloadError(
            f"Version {VERSION} of the format is known: got {version}. Use the same release on both sides."
        )
    if dimensions > _MAX_DIMENSIONS or fields > _MAX_FIELDS:
        raise PayloadError(
            f"A payload has at most {_MAX_DIMENSIONS} dimensions and {_MAX_FIELDS} fields: got {dimensions} and {fields}. Its "
            "sender is broken."
        )
    if header_bytes != _FIXED.size + _KEY.size + 8 * dimensions + _FIELD.size * fields:
        raise PayloadError(
            f"The header's length, {header_bytes} bytes, is not that of {dimensions} dimensions and {fields} fields. It was "
            "damaged; send it again."
        )
    if header_bytes + body_bytes != len(view):
        raise PayloadError(
            f"The header promises {header_bytes + body_bytes} bytes: got {len(view)}. It was cut off or added to; send it again."
        )
    header, body = view[_FIXED.size : header_bytes], view[header_bytes:]
    expected = _fixed_of(number, dimensions, fields, (header_bytes, body_bytes), b"")
    if _digest(expected, header, body) != digest:
        raise PayloadError("The digest does not fit: the payload was damaged on its way. Send it again.")
    (key,) = _KEY.unpack(header[: _KEY.size])
    sizes = struct.unpack(f"<{dimensions}Q", header[_KEY.size : _KEY.size + 8 * dimensions])
    if tuple(shape) != sizes or _dtype(number) is not dtype:
        raise PayloadError(
            f"A payload of a tensor of shape {tuple(shape)} and {dtype} was expected: got {sizes} and {_dtype(number)}. Use the "
            "same model on both sides."
        )
    told = [(int(kind), int(numel)) for kind, numel in _FIELD.iter_unpack(header[_KEY.size + 8 * dimensions :])]
    return _payload(compressor, torch.Size(shape), dtype, key, told, body)


def _payload(
    compressor: Compressor,
    shape: torch.Size,
    dtype: torch.dtype,
    key: int,
    told: list[tuple[int, int]],
    body: memoryview,
) -> Payload:
    layout = compressor.layout(shape.numel(), dtype)
    if told != [(_number(field.dtype), field.numel) for field in layout]:
        raise PayloadError(
            f"{compressor} sends the fields {_shown(layout)}: got others. Use the same compressor on both sides."
        )
    if sum(field.numel * field.dtype.itemsize for field in layout) != len(body):
        raise PayloadError(f"The fields {_shown(layout)} do not fill {len(body)} bytes. Its sender is broken.")
    fields: dict[str, Tensor] = {}
    at = 0
    for field in layout:
        nbytes = field.numel * field.dtype.itemsize
        part = bytearray(body[at : at + nbytes])  # memory of its own, aligned and writable
        fields[field.name] = torch.frombuffer(part, dtype=field.dtype) if part else torch.empty(0, dtype=field.dtype)
        at += nbytes
    payload = Payload(fields, shape, dtype, key)
    problem = compressor.problem(payload)
    if problem is not None:
        raise PayloadError(
            f"The payload of {compressor} is no tensor: {problem}. Its sender is broken, or not what it seems."
        )
    return payload


def _fixed(dtype: torch.dtype, dimensions: int, fields: int, sizes: tuple[int, int], digest: bytes) -> bytes:
    return _fixed_of(_number(dtype), dimensions, fields, sizes, digest)


def _fixed_of(dtype: int, dimensions: int, fields: int, sizes: tuple[int, int], digest: bytes) -> bytes:
    return _FIXED.pack(_MAGIC, VERSION, dtype, dimensions, fields, *sizes, digest)


def _digest(fixed: bytes, header: bytes | memoryview, body: bytes | memoryview) -> bytes:
    hashed = hashlib.blake2b(fixed, digest_size=16)
    hashed.update(header)
    hashed.update(body)
    return hashed.digest()


def _number(dtype: torch.dtype) -> int:
    if dtype not in _DTYPES:
        raise TypeError(f"`dtype` must be one of {_DTYPES}: got {dtype}. Convert the tensor.")
    return _DTYPES.index(dtype)


def _dtype(number: int) -> torch.dtype | None:
    return _DTYPES[number] if number < len(_DTYPES) else None


def _shown(layout: Sequence[Field]) -> str:
    return ", ".join(f"{field.name} ({field.numel} x {field.dtype})" for field in layout)
