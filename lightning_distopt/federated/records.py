"""Flower's records and torch's tensors, in both directions; nothing that a client sent is believed before it is checked.

A reply is one array record with the names that were sent, and one metric record with ``num-examples``. An array is the
client's whole tensor, or, where the server asked for compressed uploads, the framed payload (bytes) of the displacement
``w - y`` of that parameter.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from torch import Tensor

from lightning_distopt.compressors import Compressor
from lightning_distopt.compressors.base import all_finite, wide
from lightning_distopt.compressors.framing import frame, unframe
from lightning_distopt.errors import PayloadError, ReplyError

__all__ = [
    "BASE_ROUND",
    "COMPRESSED_KEY",
    "COMPRESSOR_KEY",
    "NUM_EXAMPLES",
    "PROX_KEY",
    "ROUND_KEY",
    "SEED_KEY",
    "Update",
    "array_of_payload",
    "metric_record",
    "metrics_of",
    "read_metrics",
    "read_update",
    "release",
    "tensors_of",
    "to_record",
    "widened",
]

NUM_EXAMPLES, BASE_ROUND = "num-examples", "base-round"  # in a reply's metrics
ROUND_KEY, SEED_KEY, PROX_KEY = "server-round", "seed", "proximal-mu"  # in the server's config
COMPRESSOR_KEY, COMPRESSED_KEY = "compressor", "compressed"  # what uploads are compressed with, and which arrays
_HEADER = 4096  # bytes that numpy's header of an array may take
_MOST_EXAMPLES = 2.0**53  # more would take the weighted sum of float32 arrays out of range
_MOST_METRIC = 1e100  # more would take the variance over clients out of range
_Arrays = np.lib.format


@dataclass
class Update:
    """What one client's reply says.

    Attributes:
        node: Flower's id of the client.
        examples: that it trained on, above 0.
        displacement: ``w - y`` for each floating-point array, at least float32.
        counters: integer arrays as the client returned them.
        metrics: finite numbers other than the two that we read ourselves.
        nbytes: of its arrays, as they travelled.
    """

    node: int
    examples: float
    displacement: dict[str, Tensor]
    counters: dict[str, Tensor]
    metrics: dict[str, float]
    nbytes: int
    message: Message | None = field(default=None, repr=False)


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return tensors as Flower's arrays; bfloat16, which numpy lacks, travels as float32."""
    return ArrayRecord({name: Array(_numpy(tensor)) for name, tensor in tensors.items()})


def tensors_of(record: ArrayRecord) -> dict[str, Tensor]:
    """Return the arrays of a record that we trust as tensors of their own memory."""
    return {name: torch.from_numpy(np.array(array.numpy(), copy=True)) for name, array in record.items()}


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the floating-point ones in the precision of the server's arithmetic, at least float32, as copies."""
    return {name: t.to(wide(t.dtype), copy=True) for name, t in tensors.items() if t.is_floating_point()}


def array_of_payload(compressor: Compressor, buffer: Tensor, key: int) -> Array:
    """Return the framed payload of a tensor as an array of bytes; the tensor keeps the residual."""
    return Array(np.frombuffer(frame(compressor.compress_(buffer, key)), dtype=np.uint8).copy())


def read_update(
    message: Message,
    sent: Mapping[str, Tensor],
    server_round: int,
    compressor: Compressor | None = None,
    compressed: Collection[str] = (),
) -> Update:
    """Return what a reply to round ``server_round`` says.

    Args:
        message: from a client that need not be trusted.
        sent: the tensors that it got in this round.
        server_round: the round.
        compressor: of uploads, if the server asked for one.
        compressed: names of the arrays that it applies to.

    Raises:
        ReplyError: with the reason, if anything is wrong with it.
    """
    if message.has_error():
        raise ReplyError(f"the client failed: {str(message.error.reason).strip()[-500:]}", "error")
    metrics, examples = read_metrics(message, server_round)
    records = list(message.content.array_records.values())
    if len(records) != 1:
        raise ReplyError(f"one array record was expected: got {len(records)}", "malformed")
    record = records[0]
    if set(record) != set(sent):
        odd = sorted(set(record) ^ set(sent))
        raise ReplyError(f"its arrays are not those that were sent: {len(odd)} differ, such as {odd[:3]}", "malformed")
    update = Update(message.metadata.src_node_id, examples, {}, {}, metrics, 0, message)
    for name, tensor in sent.items():
        array = record[name]
        update.nbytes += len(array.data)
        if compressor is not None and name in compressed:
            update.displacement[name] = _decoded(name, array, tensor, compressor)
            continue
        value = _plain(name, array, tensor)
        if not tensor.is_floating_point():
            update.counters[name] = value
            continue
        if not all_finite(value.reshape(-1)):
            raise ReplyError(f"`{name}` holds a NaN or an infinity", "non_finite")
        update.displacement[name] = tensor.to(wide(tensor.dtype)) - value
    return update


def read_metrics(message: Message, server_round: int) -> tuple[dict[str, float], float]:
    """Return the finite metrics of a reply to ``server_round``, and its number of examples.

    Raises:
        ReplyError: with the reason, if the client failed, or the reply belongs elsewhere or has no number of examples.
    """
    if message.has_error():
        raise ReplyError(f"the client failed: {str(message.error.reason).strip()[-500:]}", "error")
    records = list(message.content.metric_records.values())
    if len(records) != 1:
        raise ReplyError(f"one metric record was expected: got {len(records)}", "malformed")
    record = records[0]
    group, base = message.metadata.group_id, record.get(BASE_ROUND)
    if (group or base is not None) and (group not in ("", str(server_round)) or base not in (None, server_round)):
        raise ReplyError(f"it answers round {base if base is not None else group!r}, not {server_round}", "stale")
    examples = record.get(NUM_EXAMPLES)
    if isinstance(examples, bool) or not isinstance(examples, (int, float)) or not 0 <= examples <= _MOST_EXAMPLES:
        raise ReplyError(
            f"`{NUM_EXAMPLES}` must be a number of at least 0 and at most 2^53: got {examples!r}", "malformed"
        )
    if examples == 0:
        raise ReplyError(f"`{NUM_EXAMPLES}` is 0: nothing was learnt", "no_examples")
    return metrics_of(record), float(examples)


def metrics_of(record: MetricRecord) -> dict[str, float]:
    """Return the scalars of a record up to 1e100, but for those that the server reads itself."""
    return {
        name: float(value)
        for name, value in record.items()
        if name not in (NUM_EXAMPLES, BASE_ROUND) and isinstance(value, (int, float)) and abs(value) <= _MOST_METRIC
    }


def release(message: Message) -> None:
    """Drop the arrays of a reply that has been read: Flower's records hold cycles, which would wait for the garbage collector."""
    if message.has_content():
        for record in message.content.array_records.values():
            record.clear()


def metric_record(metrics: Mapping[str, float]) -> MetricRecord:
    """Return numbers as Flower's record."""
    record = MetricRecord()
    for name, value in metrics.items():
        record[name] = value
    return record


def _numpy(tensor: Tensor) -> np.ndarray:  # type: ignore[type-arg]
    plain = tensor.detach().cpu()
    return np.asarray((plain.float() if plain.dtype is torch.bfloat16 else plain).contiguous().numpy())


def _plain(name: str, array: Array, like: Tensor) -> Tensor:
    """Return an array as a tensor; numpy's header is compared with what is expected before anything is allocated."""
    expected = _numpy(like[:0] if like.dim() else like.reshape(1)[:0]).dtype
    data = memoryview(array.data)
    if array.stype != "numpy.ndarray" or len(data) > like.numel() * expected.itemsize + _HEADER:
        raise ReplyError(f"`{name}` is no array of {like.numel()} elements: {len(data)} bytes", "malformed")
    try:
        stream = io.BytesIO(data)
        version = _Arrays.read_magic(stream)
        read = _Arrays.read_array_header_1_0 if version == (1, 0) else _Arrays.read_array_header_2_0
        shape, fortran, dtype = read(stream, max_header_size=_HEADER)
    except Exception as error:  # numpy's parser of headers raises almost anything: TokenError, MemoryError, ...
        raise ReplyError(f"`{name}` is no array: {error}", "malformed") from error
    if tuple(shape) != tuple(like.shape) or dtype != expected:
        raise ReplyError(
            f"`{name}` must have shape {tuple(like.shape)} and dtype {expected}: got {tuple(shape)} and {dtype}",
            "malformed",
        )
    body = bytearray(data[stream.tell() :])
    if len(body) != like.numel() * expected.itemsize:
        raise ReplyError(f"`{name}` must have {like.numel() * expected.itemsize} bytes: got {len(body)}", "malformed")
    values = np.frombuffer(body, dtype=dtype)
    return torch.from_numpy(values.reshape(tuple(like.shape), order="F" if fortran else "C").copy())


def _decoded(name: str, array: Array, like: Tensor, compressor: Compressor) -> Tensor:
    dtype = wide(like.dtype)
    most = compressor.nbytes(like.numel(), dtype) + _HEADER
    if len(array.data) > most + _HEADER:
        raise ReplyError(f"`{name}` has {len(array.data)} bytes: a payload has at most {most}", "malformed")
    blank = torch.empty(max(0, len(array.data)), dtype=torch.uint8)
    try:
        if len(array.shape) != 1 or array.dtype != "uint8":
            raise ReplyError(f"`{name}` must be bytes: got {array.dtype} of shape {array.shape}", "malformed")
        data = _plain(name, array, blank[: array.shape[0]]).numpy()
        payload = unframe(data, compressor, tuple(like.shape), dtype)  # type: ignore[arg-type]
    except PayloadError as error:
        reason = "non_finite" if "NaN or an infinity" in str(error) else "malformed"
        raise ReplyError(f"`{name}`: {error}", reason) from error
    return compressor.decompress(payload)
