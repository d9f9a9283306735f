"""The idx format of MNIST: a magic number, the sizes of the dimensions, then bytes."""

import gzip
import math
import struct
from pathlib import Path

import torch
from torch import Tensor


def read_idx(path: str | Path) -> Tensor:
    """Return an idx file of unsigned bytes, plain or gzip, as a uint8 tensor.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an idx file of unsigned bytes, or not whole.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`path` must be an idx file: there is no '{path}'. Give the folder that holds MNIST.")
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    zero, kind, dimensions = struct.unpack(">HBB", data[:4])
    if zero != 0 or kind != 8:
        raise ValueError(f"'{path}' must be an idx file of unsigned bytes: its magic number is {data[:4].hex()}.")
    shape = struct.unpack(f">{dimensions}I", data[4 : 4 + 4 * dimensions])
    body = data[4 + 4 * dimensions :]
    if len(body) != math.prod(shape):
        raise ValueError(
            f"'{path}' must hold {math.prod(shape)} bytes for shape {shape}: got {len(body)}. Copy it again."
        )
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(shape)
