from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_distopt.federated import partitions
from lightning_distopt.federated.partition_picture import class_counts, draw_partitions

LABELS = np.random.default_rng(0).integers(0, 10, 2000)


def check(parts: list[np.ndarray], samples: int) -> None:
    joined = np.concatenate(parts)
    assert len(joined) == samples
    assert np.array_equal(np.sort(joined), np.arange(samples))


MAKERS = {
    "iid": lambda n, k, seed: partitions.iid(n, k, seed),
    "dirichlet": lambda n, k, seed: partitions.dirichlet(LABELS[:n], k, 0.5, seed, min_size=0),
    "pathological": lambda n, k, seed: partitions.pathological(LABELS[:n], k, 2, seed),
    "quantity": lambda n, k, seed: partitions.quantity(n, k, 0.3, seed),
}


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=15, deadline=None)
@given(samples=st.integers(60, 2000), clients=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_parts_are_disjoint_cover_everything_and_come_back(name: str, samples: int, clients: int, seed: int) -> None:
    parts = MAKERS[name](samples, clients, seed)
    assert len(parts) == clients
    check(parts, samples)
    again = MAKERS[name](samples, clients, seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_iid_sizes_differ_by_at_most_one() -> None:
    sizes = [len(part) for part in partitions.iid(103, 10)]
    assert max(sizes) - min(sizes) == 1


@pytest.mark.parametrize(("alpha", "deviation"), [(0.1, 0.2121), (1.0, 0.0905), (100.0, 0.0095)])
def test_dirichlet_shares_vary_as_their_distribution(alpha: float, deviation: float) -> None:
    labels = np.zeros(10_000, dtype=int)
    shares = [len(p) / 10_000 for seed in range(100) for p in partitions.dirichlet(labels, 10, alpha, seed, min_size=0)]
    assert np.std(shares) == pytest.approx(deviation, rel=0.1)  # 1000 shares, a tenth of their deviation


def test_dirichlet_gives_everybody_enough_or_says_that_it_cannot() -> None:
    assert min(len(part) for part in partitions.dirichlet(LABELS, 10, 0.3, min_size=30)) >= 30
    with pytest.raises(ValueError, match="1000 draws"):
        partitions.dirichlet(LABELS[:400], 20, 0.01, min_size=20)


def test_pathological_clients_see_few_classes() -> None:
    labels = np.repeat(np.arange(10), 100)
    counts = class_counts(partitions.pathological(labels, 10, 2), labels)
    assert ((counts > 0).sum(1) <= 2).all()
    straddling = class_counts(partitions.pathological(LABELS, 10, 2), LABELS)
    assert ((straddling > 0).sum(1) <= 4).all()


def test_natural_ids_stay_together() -> None:
    keys = ["b", "a", "b", "c", "a"]
    assert [part.tolist() for part in partitions.natural_id(keys)] == [[0, 2], [1, 4], [3]]


@pytest.mark.parametrize(
    ("call", "numbers"),
    [
        (lambda: partitions.iid(3, 4), "3.*4"),
        (lambda: partitions.iid(3, 0), "0"),
        (lambda: partitions.dirichlet(LABELS, 5, 0.0), "alpha.*0.0"),
        (lambda: partitions.dirichlet(LABELS, 5, 1.0, min_size=500), "2000.*500 \\* 5"),
        (lambda: partitions.pathological(LABELS, 5, 0), "shards.*0"),
        (lambda: partitions.quantity(10, 2, -1.0), "beta.*-1"),
    ],
)
def test_bad_numbers_are_refused(call, numbers: str) -> None:
    with pytest.raises(ValueError, match=numbers):
        call()


@pytest.mark.slow  # to import datasets takes 15 s
def test_flowers_partitioners_take_labels_at_hand() -> None:
    pytest.importorskip("flwr_datasets")
    from flwr_datasets.partitioner import DirichletPartitioner

    parts = partitions.from_flower(DirichletPartitioner(5, "label", alpha=0.5, min_partition_size=10, seed=1), LABELS)
    check(parts, len(LABELS))
    assert min(len(part) for part in parts) >= 10


def test_the_picture_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "who.png"
    draw_partitions(partitions.dirichlet(LABELS, 10, 0.5), LABELS, path, "Dirichlet")
    assert path.read_bytes()[:4] == b"\x89PNG"
