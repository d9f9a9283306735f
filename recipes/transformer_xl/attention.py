"""Attention that knows distances instead of positions, so that what is remembered needs no position of its own.

    score(i, j) = [ (q_i + u) k_j + (q_i + v) r_(i-j) ] / sqrt(D)          i - j: how far back token j lies

Letters: B rows, H heads, T tokens of this segment, M remembered ones, K = M + T keys, D numbers a head.

Source: arXiv:1901.02860, section 3.3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def distance_encoding(keys: int, width: int, clamp_len: int | None, device: torch.device) -> Tensor:
    """Return sines, then cosines, of the distances ``keys - 1, ..., 1, 0``; float32 of shape ``(keys, width)``.

    Args:
        keys: number of distances.
        width: even.
        clamp_len: largest distance that has an encoding of its own; ``None`` gives each its own.
        device: of the result.
    """
    distances = torch.arange(keys - 1, -1, -1, device=device, dtype=torch.float32)
    if clamp_len is not None:
        distances = distances.clamp(max=clamp_len)
    rates = 10000.0 ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    angles = torch.outer(distances, rates)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def shift(scores: Tensor) -> Tensor:
    """Move row i of ``(..., T, K)`` so that column j holds the score of the distance between query i and key j.

    Column c of the input belongs to distance ``K - 1 - c``; the output at (i, j) is the input at (i, j + T - 1 - i). Where that
    lies beyond the last column, key j is in the future of query i and the value means nothing.
    """
    *front, queries, keys = scores.shape
    # One column of padding makes each row one longer than it is read again, which moves it by one more than the row above.
    padded = F.pad(scores, (1, 0)).view(*front, keys + 1, queries)
    return padded[..., 1:, :].reshape(*front, queries, keys)


def visible(queries: int, keys: int, same_length: int | None, device: torch.device) -> Tensor:
    """Return which key each query may see, bool of shape ``(queries, keys)``: itself and before.

    Args:
        queries: T.
        keys: K, the last T of which are the queries' own.
        same_length: most keys that one query sees; ``None`` shows all.
        device: of the result.
    """
    back = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    seen = back >= 0
    return seen if same_length is None else seen & (back < same_length)


def relative_attention(
    q: Tensor, k: Tensor, v: Tensor, r: Tensor, u: Tensor, w: Tensor, seen: Tensor, dropout: float = 0.0
) -> Tensor:
    """Return the attended values, shape ``(B, H, T, D)``.

    The term of the positions goes into torch's fused attention as its additive mask.

    Args:
        q: queries ``(B, H, T, D)``.
        k: keys ``(B, H, K, D)``.
        v: values ``(B, H, K, D)``.
        r: projected encodings of the distances ``K - 1, ..., 0``, shape ``(H, K, D)``.
        u: bias of the content term, ``(H, D)``.
        w: bias of the position term, ``(H, D)``.
        seen: bool ``(T, K)``, at least one key in each row.
        dropout: share of the attention weights that are dropped.
    """
    scale = q.shape[-1] ** -0.5
    by_distance = shift(torch.matmul((q + w.to(q.dtype)[:, None]) * scale, r.transpose(1, 2)))
    mask = by_distance.masked_fill(~seen, float("-inf"))
    return F.scaled_dot_product_attention(q + u.to(q.dtype)[:, None], k, v, mask, dropout, scale=scale)
