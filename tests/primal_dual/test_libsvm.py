"""LIBSVM files: whole, in shards, and broken."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.datasets import dump_svmlight_file

from lightning_distopt.errors import DataError
from lightning_distopt.primal_dual import ACPDClassifier, read_libsvm
from tests.primal_dual.problems import sparse_problem


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_shards_are_the_file(tmp_path: Path) -> None:
    x, y = sparse_problem("logistic", 53, 20)
    dump_svmlight_file(x, y, str(tmp_path / "a"), zero_based=False, comment="made by a test")
    whole, labels = read_libsvm(tmp_path / "a")
    np.testing.assert_allclose(whole.toarray(), x, rtol=1e-12)
    np.testing.assert_array_equal(labels, y)
    parts = [read_libsvm(tmp_path / "a", 20, shard=k, shards=3) for k in range(3)]
    assert [len(part[1]) for part in parts] == [18, 18, 17]
    rows = np.argsort(np.concatenate([np.arange(k, 53, 3) for k in range(3)]))
    np.testing.assert_array_equal(sp.vstack([part[0] for part in parts]).toarray()[rows], whole.toarray())
    (tmp_path / "a.gz").write_bytes(gzip.compress((tmp_path / "a").read_bytes()))
    np.testing.assert_array_equal(read_libsvm(tmp_path / "a.gz")[0].toarray(), whole.toarray())
    fit = ACPDClassifier(lam=1e-2).fit(tmp_path / "a")
    assert fit.score(x, y) > 0.8
    np.testing.assert_array_equal(fit.predict(tmp_path / "a"), fit.predict(whole))


def test_blank_lines_comments_and_order_are_taken(tmp_path: Path) -> None:
    x, y = read_libsvm(
        written(tmp_path / "a", "# a comment\n1 3:2 1:1e-1  # end\n\n-1\n+2.5\t2:.5\n"), dtype=np.float32
    )
    np.testing.assert_allclose(x.toarray(), [[0.1, 0, 2], [0, 0, 0], [0, 0.5, 0]])
    assert y.tolist() == [1.0, -1.0, 2.5]
    assert x.dtype == np.float32


def test_an_empty_file_has_no_samples(tmp_path: Path) -> None:
    x, y = read_libsvm(written(tmp_path / "a", "\n"), 3)
    assert x.shape == (0, 3)
    assert len(y) == 0


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("1 2:x", "'2:x' is no pair"),
        ("1 2", "'2' is no pair"),
        ("1 2:3:4 5", "'2:3:4' is no pair"),
        ("1 2: 3:1 4", "'2:' is no pair"),
        ("1:2 3:4", "'1:2' is no number"),
        ("1 qid:3 2:1", "'qid:3' is no pair"),
        ("spam 1:2", "'spam' is no number"),
        ("1 0:2", "index 0 is not from 1"),
        ("1 -2:2", "'-2:2' is no pair"),
        ("1 1.5:2", "'1.5:2' is no pair"),
        ("1 9:2", "index 9 is not from 1 to 8"),
        ("1 2:1 2:5", "index 2 is there twice"),
        ("1 2:nan", "'2:nan' is not finite"),
        ("inf 2:1", "label is not finite"),
    ],
)
def test_a_broken_line_is_named_with_its_number(tmp_path: Path, line: str, says: str) -> None:
    path = written(tmp_path / "a", f"1 1:1\n\n{line}\n1 1:1\n")
    with pytest.raises(DataError, match=says) as caught:
        read_libsvm(path, 8)
    assert caught.value.line == 3
    assert "Line 3" in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no"):
        read_libsvm(tmp_path / "none")
    with pytest.raises(ValueError, match="`shard` must be from 0 to 1: got 2"):
        read_libsvm(written(tmp_path / "a", "1 1:1\n"), shard=2, shards=2)


@pytest.mark.parametrize("content", [gzip.compress(b"1 1:2\n-1 2:1\n" * 2000)[:60], b"1 1:2\n-1 2:1\n"])
def test_a_broken_gzip_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"data\.gz' must be a whole gzip file"):
        read_libsvm(path)
