"""Compiled passes against the plain reference."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from lightning_distopt.errors import DataError
from lightning_distopt.primal_dual import LOSSES, kernels
from lightning_distopt.primal_dual.reference import local_sdca, permutation
from lightning_distopt.primal_dual.shard import pass_key
from lightning_distopt.primal_dual.split import as_csr, make_shard, parts, shards_of
from tests.primal_dual.problems import sparse_problem


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_pass_equals_the_reference(loss: str, bias: bool) -> None:
    x, y = sparse_problem(loss, 60, 40)
    x[3] = 0.0  # an empty row
    rng = np.random.default_rng(2)
    weight, base = rng.uniform(0, 2, 60), rng.normal(size=40 + bias)
    shard = make_shard(sp.csr_matrix(x), y, LOSSES[loss], 1e-2, 100.0, weight, bias)
    alpha, m, sigma = np.zeros(60), base.copy(), 3.0
    shard.draws(alpha, m, sigma, seed=7, worker=2, start=0, count=90)
    order = permutation(60, pass_key(7, 2, 0)) + permutation(60, pass_key(7, 2, 1))
    full = np.hstack([x, np.ones((60, 1))]) if bias else x
    delta, u = local_sdca(full, y, weight, np.zeros(60), base, order[:90], LOSSES[loss], 1e-2, 100.0, sigma)
    np.testing.assert_allclose(alpha, delta, atol=1e-11)
    np.testing.assert_allclose((m - base) / sigma, u, atol=1e-11)


@pytest.mark.parametrize("values", [np.float32, np.float64])
@pytest.mark.parametrize("places", [np.int32, np.int64])
def test_every_kind_of_csr_gives_the_same(values: type, places: type) -> None:
    x, y = sparse_problem("logistic", 40, 30)
    x = x.astype(np.float32).astype(values)
    csr = sp.csr_matrix(x)
    csr.indices, csr.indptr = csr.indices.astype(places), csr.indptr.astype(places)
    shard = make_shard(csr, y, LOSSES["logistic"], 1e-2, 40.0)
    alpha, m = np.zeros(40), np.zeros(30)
    shard.passes(alpha, m, 1.0, [pass_key(0, 0, 0)])
    delta, u = local_sdca(
        x.astype(float), y, np.ones(40), np.zeros(40), np.zeros(30), permutation(40, pass_key(0, 0, 0)), LOSSES["logistic"],
        1e-2, 40.0, 1.0,
    )  # fmt: skip
    np.testing.assert_allclose(alpha, delta, atol=1e-10)
    np.testing.assert_allclose(m, u, atol=1e-10)


@pytest.mark.parametrize("loss", ["squared_hinge", "logistic"])
def test_a_model_that_leaves_the_caches_changes_no_bit(loss: str) -> None:
    x, y = sparse_problem(loss, 60, 40)
    near = sp.csr_matrix(x)
    far = sp.csr_matrix((near.data, near.indices * 2000, near.indptr), shape=(60, 80_000))
    found = []
    for samples in (near, far):
        shard = make_shard(samples, y, LOSSES[loss], 1e-2, 60.0)
        alpha, m = np.zeros(60), np.zeros(shard.dim)
        shard.passes(alpha, m, 1.0, [pass_key(0, 0, 0)])
        found.append((alpha, m[m != 0], shard.primal_sum(m), shard.contribution(alpha)[m != 0]))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("loss", ["hinge", "smoothed_hinge", "squared_hinge"])
def test_a_certificate_names_the_samples_that_a_step_would_move(loss: str) -> None:
    x, y = sparse_problem(loss, 60, 40)
    shard = make_shard(sp.csr_matrix(x), y, LOSSES[loss], 1e-2, 60.0)
    alpha, w = np.zeros(60), np.zeros(40)
    shard.passes(alpha, w, 1.0, [pass_key(0, 0, k) for k in range(3)])
    out = np.empty(60, np.int32)
    total, count = shard.primal_and_unsettled(w, alpha, np.inf if loss == "squared_hinge" else 1.0, out)
    steps = [LOSSES[loss].step(alpha[i], y[i], float(x[i] @ w), shard.q[i]) for i in range(60)]
    assert 0 < count < 60
    assert total == pytest.approx(shard.primal_sum(w))
    assert set(np.flatnonzero(np.abs(steps) > 1e-12)) <= set(out[:count].tolist())


@pytest.mark.parametrize("loss", LOSSES)
def test_sums_equal_the_table(loss: str) -> None:
    x, y = sparse_problem(loss, 50, 30)
    rng = np.random.default_rng(3)
    w, weight = rng.normal(size=30), rng.uniform(0, 2, 50)
    row = LOSSES[loss]
    alpha = row.feasible(rng.normal(size=50), y)
    shard = make_shard(sp.csr_matrix(x), y, row, 1e-2, 50.0, weight)
    assert shard.primal_sum(w) == pytest.approx(float(weight @ row.value(x @ w, y)))
    assert shard.dual_sum(alpha) == pytest.approx(float(weight @ row.dual(alpha, y)))
    np.testing.assert_allclose(shard.contribution(alpha), x.T @ (weight * alpha) / (1e-2 * 50.0), atol=1e-12)


def test_permutations_are_those_of_the_reference_and_differ_between_workers() -> None:
    order = np.empty(1000, np.int32)
    kernels.permutation(order, np.uint64(pass_key(1, 2, 3)))
    assert order.tolist() == permutation(1000, pass_key(1, 2, 3))
    assert sorted(order.tolist()) == list(range(1000))
    assert permutation(1000, pass_key(1, 1, 3)) != order.tolist()


def test_parts_are_a_partition() -> None:
    found = parts(103, 4, seed=5)
    assert sorted(np.concatenate(found).tolist()) == list(range(103))
    assert {len(part) for part in found} == {25, 26}
    blocks = parts(30_001, 4, seed=5)  # by blocks of 14 rows
    assert sorted(np.concatenate(blocks).tolist()) == list(range(30_001))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 2 * 14


def test_samples_that_cannot_be_used_are_named() -> None:
    broken = sp.csr_matrix(np.eye(4))
    broken.data[2] = np.inf
    with pytest.raises(DataError, match="inf in row 2"):
        as_csr(broken)
    twice = sp.csr_matrix((np.ones(3), np.array([1, 0, 1]), np.array([0, 0, 3])), shape=(2, 2))
    with pytest.raises(DataError, match=r"row 1 does not.*sum_duplicates"):
        as_csr(twice)
    with pytest.raises(DataError, match=r"must be -1 or 1 .*got 0\.0"):
        shards_of(np.eye(3), np.array([1.0, 0.0, 1.0]), 1, loss="hinge")
