"""LIBSVM files, read as a stream: ``label index:value ...`` a line, indices from 1, ``#`` begins a comment.

    lines  ->  blocks of bytes  ->  only this shard's lines  ->  CSR arrays

A shard is every K-th line, so that it is as good as any other, whatever the order of the file; nothing but it is held.
Blocks are parsed by numpy; a block that does not look right is read again line by line, to name the one that is broken.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from lightning_distopt.errors import DataError

__all__ = ["read_libsvm"]

_BLOCK = 2**22
_ODD = re.compile(rb":[^\s:]*:|:\s|\s:|:\Z")
_PAIR = re.compile(rb"(\d+):([^:\s]+)\Z")


def read_libsvm(
    path: str | os.PathLike[str],
    columns: int | None = None,
    *,
    shard: int = 0,
    shards: int = 1,
    dtype: type[np.floating[Any]] = np.float64,
) -> tuple[Any, NDArray[np.float64]]:
    """Return ``(X, y)``: CSR, and the labels.

    Args:
        path: of the file, plain or gzip (``.gz``); blank lines are passed over.
        columns: features d; ``None`` is the largest index that is read.
        shard: which part, from 0.
        shards: of how many; each is every ``shards``-th sample.
        dtype: of the values, float32 or float64.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if ``shard`` is not one of ``shards``.
        DataError: naming the line that is not in the format, repeats an index, is not finite, or has one above ``columns``.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"`path` must be a LIBSVM file: there is no '{path}'. Give the file's own path.")
    if not 0 <= shard < shards:
        raise ValueError(f"`shard` must be from 0 to {shards - 1}: got {shard} of {shards}.")
    labels: list[NDArray[np.float64]] = []
    indices: list[NDArray[np.int32]] = []
    values: list[NDArray[np.floating[Any]]] = []
    lengths: list[NDArray[np.int64]] = []
    for numbers, lines in _shard_lines(path, shard, shards):
        y, length, places, data = _parsed(path, numbers, lines, columns)
        labels.append(y)
        lengths.append(length)
        indices.append(places.astype(np.int32))
        values.append(data.astype(dtype))
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(_joined(lengths, np.int64))])
    places = _joined(indices, np.int32)
    width = int(places.max(initial=-1)) + 1 if columns is None else columns
    if bounds[-1] < 2**31:
        bounds = bounds.astype(np.int32)
    return sp.csr_matrix((_joined(values, dtype), places, bounds), shape=(len(bounds) - 1, width)), _joined(
        labels, np.float64
    )


def _joined(parts: list[Any], dtype: Any) -> Any:
    """Concatenate arrays and let go of them."""
    whole = np.concatenate(parts) if parts else np.empty(0, dtype)
    parts.clear()
    return whole


def _shard_lines(path: str | os.PathLike[str], shard: int, shards: int) -> Iterator[tuple[list[int], list[bytes]]]:
    """Yield blocks of this shard's lines with their numbers in the file, from 1."""
    number = sample = 0
    with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
        while lines := _block(path, file, number):
            numbers, kept = [], []
            for line in lines:
                number += 1
                text = line.partition(b"#")[0].strip() if b"#" in line else line.strip()
                if text:
                    if sample % shards == shard:
                        numbers.append(number)
                        kept.append(text)
                    sample += 1
            if kept:
                yield numbers, kept


def _block(path: str | os.PathLike[str], file: Any, number: int) -> list[bytes]:
    try:
        lines: list[bytes] = file.readlines(_BLOCK)
        return lines
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"'{path}' must be a whole gzip file: {error}, somewhere after line {number}. Copy it again, or, if it is not "
            "compressed, take '.gz' off its name.",
            str(path),
            number + 1,
        ) from error


def _parsed(
    path: str | os.PathLike[str], numbers: list[int], lines: list[bytes], columns: int | None
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return labels, entries of each line, places from 0, and values."""
    length = np.array([line.count(b":") for line in lines], np.int64)
    block = b"\n".join(lines)
    words = block.replace(b":", b" ").split()
    try:
        # Every word but a line's first has one colon, in its middle: else numbers could be paired that do not belong together.
        if len(words) != len(lines) + 2 * int(length.sum()) or _ODD.search(block):
            raise ValueError
        if any(b":" in line.split(None, 1)[0] for line in lines):
            raise ValueError
        flat = np.array(words, dtype="S").astype(np.float64)
    except ValueError:
        raise _first_error(path, numbers, lines, columns) from None
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(1 + 2 * length)[:-1]])
    pairs = np.delete(flat, starts).reshape(-1, 2)
    places, data = pairs[:, 0].astype(np.int64) - 1, pairs[:, 1]
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(length)[:-1]])
    rises = np.diff(places) > 0
    rises[first[(first > 0) & (first < len(places))] - 1] = True  # from one line to the next
    good = (
        rises.all()
        and places.min(initial=0) >= 0
        and places.max(initial=-1) < (2**31 - 1 if columns is None else columns)
        and np.isfinite(flat).all()
        and (pairs[:, 0] == places + 1).all()
    )
    if not good:
        order = [_sorted_line(path, number, line, columns) for number, line in zip(numbers, lines, strict=True)]
        places = np.concatenate([places for places, _ in order])
        data = np.concatenate([data for _, data in order])
    return flat[starts], length, places, data


def _first_error(
    path: str | os.PathLike[str], numbers: list[int], lines: list[bytes], columns: int | None
) -> DataError:
    for number, line in zip(numbers, lines, strict=True):
        try:
            _sorted_line(path, number, line, columns)
        except DataError as error:
            return error
    return DataError(f"'{path}' could not be read near line {numbers[0]}.", str(path), numbers[0])  # pragma: no cover


def _sorted_line(
    path: str | os.PathLike[str], number: int, line: bytes, columns: int | None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return places and values of one line, ascending.

    Raises:
        DataError: naming the line and what is wrong with it.
    """

    def wrong(what: str) -> DataError:
        shown = line[:60].decode(errors="replace")
        return DataError(
            f"Line {number} of '{path}' must be 'label index:value ...': {what}, in {shown!r}.", str(path), number
        )

    words = line.split()
    try:
        label = float(words[0])
    except ValueError:
        raise wrong(f"{words[0].decode(errors='replace')!r} is no number") from None
    if not np.isfinite(label):
        raise wrong("its label is not finite")
    places, values = [], []
    for word in words[1:]:
        pair = _PAIR.match(word)
        text = word.decode(errors="replace")
        if pair is None:
            raise wrong(f"{text!r} is no pair")
        try:
            value = float(pair[2])
        except ValueError:
            raise wrong(f"{text!r} is no pair") from None
        index = int(pair[1])
        if not 1 <= index <= (2**31 - 1 if columns is None else columns):
            limit = "2147483647" if columns is None else str(columns)
            raise wrong(f"index {index} is not from 1 to {limit}")
        if not np.isfinite(value):
            raise wrong(f"{text!r} is not finite")
        places.append(index - 1)
        values.append(value)
    order = np.argsort(places, kind="stable")
    found = np.array(places, np.int64)[order]
    if (found[1:] == found[:-1]).any():
        twice = int(found[1:][found[1:] == found[:-1]][0]) + 1
        raise wrong(f"index {twice} is there twice")
    return found, np.array(values, np.float64)[order]
