"""``distopt solve``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import dump_svmlight_file

from lightning_distopt.cli import main
from tests.primal_dual.problems import sparse_problem


@pytest.mark.parametrize(
    "words", [["--loss", "logistic"], ["--loss", "smoothed_hinge", "--c", "0.05", "--workers", "2"]]
)
def test_a_file_becomes_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    x, y = sparse_problem("logistic", 100, 30)
    data, model, history = (str(tmp_path / name) for name in ("data", "model.npz", "history.csv"))
    dump_svmlight_file(x, y, data, zero_based=False)
    code = main(
        ["solve", "--data", data, "--test", data, "--lam", "0.01", *words, "--output", model, "--history", history]
    )
    out = capsys.readouterr().out
    assert code == 0
    assert "duality gap" in out
    assert out.count("accuracy on") == 2
    with np.load(model) as kept:
        assert kept["coef"].shape == (1, 30)
        assert kept["classes"].tolist() == [-1.0, 1.0]
    assert Path(history).read_text().startswith("seconds,rounds,primal,dual,gap,bytes_up,bytes_down")


def test_a_squared_loss_is_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = sparse_problem("squared", 100, 30)
    dump_svmlight_file(x, y, str(tmp_path / "data"), zero_based=False)
    assert main(["solve", "--data", str(tmp_path / "data"), "--loss", "squared", "--quiet"]) == 0
    assert "R2 on" in capsys.readouterr().out


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").write_text("1 1:1\n1 2;3\n")
    assert main(["solve", "--data", str(tmp_path / "data")]) == 2
    assert "Line 2" in capsys.readouterr().err
    assert main(["solve", "--data", str(tmp_path / "none")]) == 2
    assert "there is no" in capsys.readouterr().err
