"""The study of zeroth-order methods: equal grids, resumed where it stopped, slopes as defined."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks import black_box
from benchmarks.results_file import ResultsFile


def test_the_slope_of_a_power_law_is_its_exponent() -> None:
    curve = [(q, 0.0, 3.0 * q**-1.3) for q in range(100, 10_000, 100)]
    assert black_box.slope(curve, 10_000) == pytest.approx(-1.3)
    steady = black_box.averaged([(q, 0.0, 2.0) for q in range(1, 50)])
    assert [g for _, _, g in steady] == pytest.approx([2.0] * 49)
    assert math.isnan(black_box.slope(curve[:2], 10))
    assert black_box.reached([(1, 3.0, 0.0), (2, 1.0, 0.0)], 2.0) == 2
    assert black_box.reached([(1, 3.0, 0.0)], 2.0) == math.inf


def test_a_study_resumes_and_is_told_in_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    lines = []
    for _ in range(40):
        values = torch.randn(4)
        lines.append(f"{1 if values[0] > 0 else -1} " + " ".join(f"{i + 1}:{v:.3f}" for i, v in enumerate(values)))
    (tmp_path / "data").write_text("\n".join(lines))
    results = ResultsFile(tmp_path / "results.csv", black_box.RESULTS.columns, black_box.RESULTS.key)
    study = black_box.Study(
        {"coordinate": 6000}, {"coordinate": (0.3, 1.0)}, {"coordinate": black_box.CoordinateEstimator()}
    )
    monkeypatch.setattr(black_box, "RESULTS", results)
    monkeypatch.setattr(black_box, "STUDIES", {"a9a": study})
    monkeypatch.setattr(black_box, "SAMPLES", {"a9a": 30})
    monkeypatch.setitem(__import__("sys").modules, "nevergrad", None)
    black_box.measure("a9a", str(tmp_path / "data"), until=-math.inf)
    assert results.rows() == []  # no time
    black_box.measure("a9a", str(tmp_path / "data"), until=math.inf)
    rows = results.rows()
    assert len(rows) == 3 * (2 + 2 * 2)
    assert all(int(row["queries"]) <= 6000 for row in rows)
    black_box.measure("a9a", str(tmp_path / "data"), until=math.inf)
    assert results.rows() == rows
    assert black_box.table("a9a").count("3 seeds") == 3
    black_box.draw(tmp_path)
    assert (tmp_path / "zeroth_order_a9a.png").read_bytes().startswith(b"\x89PNG")
