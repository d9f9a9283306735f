"""``fit_shard``: ranks that exist already, each with its own samples."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.fabric import Fabric
from sklearn.datasets import dump_svmlight_file

from lightning_distopt.primal_dual import ACPDClassifier, ACPDRegressor
from tests.primal_dual.problems import sparse_problem
from tests.ranks import run_ranks

X, Y = sparse_problem("logistic", 200, 60)
LABELS = np.where(Y > 0, "up", "down")
ARGUMENTS: dict[str, Any] = {"lam": 1e-1, "tol": 1e-6, "density": 0.5, "class_weight": "balanced"}


def sharded(rank: int, world: int, path: str) -> Any:
    mine = slice(rank, None, world)
    wide = 60 if rank else 40  # features that a rank has not seen: it stores fewer columns
    x = X[mine].copy()
    x[:, wide:] = 0.0
    fit = ACPDClassifier(**ARGUMENTS).fit_shard(x[:, :wide], LABELS[mine])
    from_file = ACPDClassifier(**ARGUMENTS).fit_shard(path)
    errors = []
    for labels in (LABELS[mine], np.array(["up"] * len(LABELS[mine]))):
        broken = x[:, :wide].copy()
        if rank == 1:
            broken[3, 2] = np.nan
        try:
            ACPDClassifier().fit_shard(broken, labels)
        except ValueError as error:
            errors.append(str(error))
    with pytest.raises(ValueError, match="'down'"):
        ACPDClassifier().fit_shard(X[mine], LABELS[mine], classes=["up", "left"])
    regression = ACPDRegressor(lam=1e-1, tol=1e-6, density=1.0).fit_shard(X[mine], X[mine, 0])
    return (
        fit.coef_, fit.n_features_in_, len(fit.dual_), from_file.coef_, from_file.history_[-1]["gap"], errors, regression.coef_
    )  # fmt: skip


def test_shards_are_fitted_like_the_whole(tmp_path: Path) -> None:
    dump_svmlight_file(X, Y, str(tmp_path / "all"), zero_based=False)
    found = run_ranks(3, sharded, str(tmp_path / "all"))
    seen = X.copy()
    seen[0::3, 40:] = 0.0
    whole = ACPDClassifier(**{**ARGUMENTS, "tol": 1e-9}).fit(seen, LABELS)
    from_file = ACPDClassifier(**{**ARGUMENTS, "tol": 1e-9}).fit(X, Y)
    line = ACPDRegressor(lam=1e-1, tol=1e-6).fit(X, X[:, 0])
    for rank, (coef, columns, own, coef_of_file, gap, errors, slope) in enumerate(found):
        np.testing.assert_array_equal(coef, found[0][0])
        np.testing.assert_allclose(coef, whole.coef_, atol=5e-3)
        np.testing.assert_allclose(coef_of_file, from_file.coef_, atol=5e-3)
        np.testing.assert_allclose(slope, line.coef_, atol=5e-3)
        assert (columns, own) == (60, len(LABELS[rank::3]))
        assert gap <= 1e-6
        assert all("rank 1: DataError: `X` must not hold NaN" in text for text in errors)
        assert len(errors) == 2


def checkpointed(rank: int, world: int, folder: str) -> Any:
    mine = slice(rank, None, world)
    fit = ACPDClassifier(**ARGUMENTS, max_rounds=10, checkpoint=folder)
    fit.set_params(tol=1e-12)
    import warnings

    from lightning_distopt.primal_dual.checkpoints import CheckpointFile

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keep, CheckpointFile.remove = CheckpointFile.remove, lambda self: None  # type: ignore[assignment, method-assign]
        first = fit.fit_shard(X[mine], LABELS[mine]).gap_
        CheckpointFile.remove = keep  # type: ignore[method-assign]
        second = fit.fit_shard(X[mine], LABELS[mine])
    return first, second.history_[0]["gap"], sorted(path.name for path in Path(folder).iterdir())


def test_ranks_go_on_from_their_checkpoints(tmp_path: Path) -> None:
    for first, second, left in run_ranks(2, checkpointed, str(tmp_path)):
        assert second < 0.5 * first
        assert left in ([], ["problem-0.rank-0-of-2.npz"], ["problem-0.rank-1-of-2.npz"])


def in_fabric(fabric: Fabric) -> Any:
    mine = slice(fabric.global_rank, None, fabric.world_size)
    return ACPDClassifier(**ARGUMENTS).fit_shard(X[mine], LABELS[mine], fabric=fabric).coef_


def test_fabric_launches_the_ranks() -> None:
    fabric = Fabric(accelerator="cpu", strategy="ddp_fork", devices=2)
    coef = fabric.launch(in_fabric)
    np.testing.assert_allclose(coef, ACPDClassifier(**{**ARGUMENTS, "tol": 1e-9}).fit(X, LABELS).coef_, atol=5e-3)


def test_alone_it_is_fit() -> None:
    np.testing.assert_array_equal(
        ACPDClassifier(lam=1e-2).fit_shard(X, LABELS).coef_, ACPDClassifier(lam=1e-2).fit(X, LABELS).coef_
    )


@pytest.mark.slow
def test_torchrun_solves_a_file(tmp_path: Path) -> None:
    dump_svmlight_file(X, Y, str(tmp_path / "all"), zero_based=False)
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lightning_distopt.cli", "solve"]
    done = subprocess.run(
        [sys.executable, *words, "--data", str(tmp_path / "all"), "--lam", "0.01", "--quiet"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("duality gap") == 1
