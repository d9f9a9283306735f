"""Relative attention is what the paper's sums say, written out one number at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recipes.transformer_xl.attention import distance_encoding, relative_attention, shift, visible


def by_loops(q: Tensor, k: Tensor, v: Tensor, r: Tensor, u: Tensor, w: Tensor, same_length: int | None) -> Tensor:
    """Plain reference: r[h, K - 1 - d] is the encoding of distance d."""
    (batch, heads, queries, size), keys = q.shape, k.shape[2]
    rows = []
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                place = keys - queries + i
                seen = [j for j in range(place + 1) if same_length is None or place - j < same_length]
                scores = [
                    ((q[b, h, i] + u[h]) @ k[b, h, j] + (q[b, h, i] + w[h]) @ r[h, keys - 1 - (place - j)])
                    / math.sqrt(size)
                    for j in seen
                ]
                share = torch.stack(scores).softmax(0)
                rows.append(sum(s * v[b, h, j] for s, j in zip(share, seen, strict=True)))
    return torch.stack(rows).view(batch, heads, queries, size)


def _inputs(queries: int, keys: int) -> list[Tensor]:
    shapes = [(2, 2, queries, 3), (2, 2, keys, 3), (2, 2, keys, 3), (2, keys, 3), (2, 3), (2, 3)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (4, 4), (3, 7), (1, 5), (5, 6)])
@pytest.mark.parametrize("same_length", [None, 2, 4])
def test_attention_and_its_gradients_are_those_of_the_loops(queries: int, keys: int, same_length: int | None) -> None:
    inputs = _inputs(queries, keys)
    fast = relative_attention(*inputs, visible(queries, keys, same_length, inputs[0].device))
    slow = by_loops(*inputs, same_length)
    torch.testing.assert_close(fast, slow)
    weights = torch.randn_like(slow)
    for ours, plain in zip(
        torch.autograd.grad((fast * weights).sum(), inputs),
        torch.autograd.grad((slow * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain)


@given(st.integers(1, 6), st.integers(0, 6))
def test_shift_puts_each_distance_under_its_key(queries: int, memory: int) -> None:
    keys = queries + memory
    scores = torch.randn(2, 3, queries, keys)
    moved = shift(scores)
    for i in range(queries):
        for j in range(memory + i + 1):
            distance = memory + i - j
            assert torch.equal(moved[..., i, j], scores[..., i, keys - 1 - distance])


def test_keys_that_are_seen() -> None:
    drawn = ["".join("x" if seen else "." for seen in row) for row in visible(3, 5, None, torch.device("cpu"))]
    assert drawn == ["xxx..", "xxxx.", "xxxxx"]
    drawn = ["".join("x" if seen else "." for seen in row) for row in visible(3, 5, 2, torch.device("cpu"))]
    assert drawn == [".xx..", "..xx.", "...xx"]


def test_far_distances_share_the_encoding_of_the_clamp() -> None:
    free = distance_encoding(6, 4, None, torch.device("cpu"))
    clamped = distance_encoding(6, 4, 2, torch.device("cpu"))
    assert torch.equal(free[-3:], clamped[-3:])
    assert torch.equal(clamped[:3], clamped[3].expand(3, 4))
    torch.testing.assert_close(free[0], torch.tensor([math.sin(5), math.sin(0.05), math.cos(5), math.cos(0.05)]))
