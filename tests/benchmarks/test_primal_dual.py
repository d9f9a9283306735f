"""The studies of the primal-dual solver, in small."""

from __future__ import annotations

from pathlib import Path

import pytest
from sklearn.datasets import dump_svmlight_file

from benchmarks import primal_dual, primal_dual_problems
from benchmarks.results_file import ResultsFile


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResultsFile:
    file = ResultsFile(tmp_path / "results.csv", primal_dual_problems.RESULTS.columns, primal_dual_problems.RESULTS.key)
    monkeypatch.setattr(primal_dual_problems, "RESULTS", file)
    return file


SMALL = ["--rows", "300", "--columns", "400", "--nonzeros", "10", "--patience", "0", "--lam", "0.05", "--repeats", "1"]


def test_one_worker_and_two_are_compared_and_told_in_a_table(
    results: ResultsFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dump_svmlight_file(*primal_dual_problems.generated(100, 60, 5), str(tmp_path / "data"), zero_based=False)
    primal_dual.main(["single", f"mine={tmp_path / 'data'}", *SMALL])
    primal_dual.main(["two", "generated", *SMALL])
    made = [(row["data"], row["loss"], row["method"]) for row in results.rows()]
    assert len(made) == len(set(made)) == 16
    assert ("mine", "logistic", "liblinear") in made
    assert ("generated 300x400", "logistic", "2 workers") in made
    primal_dual.main(["two", "generated", *SMALL, "--table"])
    assert len(results.rows()) == 16  # nothing is run twice
    assert "| mine | hinge | lam=0.05 |" in capsys.readouterr().out


@pytest.mark.slow
def test_the_simulated_tables_are_made(results: ResultsFile) -> None:
    primal_dual.main(["simulated", "--simulated-workers", "4"])
    assert len(results.rows()) == 60
