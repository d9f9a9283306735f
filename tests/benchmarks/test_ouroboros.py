"""The benchmarks of Ouroboros: a small race, a study that goes on where it was stopped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ouroboros, ouroboros_accuracy
from benchmarks.language import Size, build, parameters_of, segments, text
from benchmarks.ouroboros_accuracy import PLANS, Recipe
from benchmarks.results_file import ResultsFile

SIZE = Size(vocabulary=20, blocks=3, width=8, length=4)


@pytest.fixture
def story(tmp_path: Path) -> Path:
    (tmp_path / "story.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return tmp_path / "story.txt"


def test_segments_go_on_where_the_last_one_of_their_row_ended(story: Path) -> None:
    train, val, test, kinds = text(story)
    assert (len(train) + len(val) + len(test), kinds) == (1800, 28)
    stream = segments(train, rows=3, length=5)
    (a, b), (c, _) = next(stream), next(stream)
    assert torch.equal(a[:, 1:], b[:, :-1])
    assert torch.equal(b[:, -1], c[:, 0])
    again = segments(train, rows=3, length=5, begin=1)
    assert torch.equal(next(again)[0], c)
    story.write_text("short")
    with pytest.raises(ValueError, match="1,000 characters: got 5"):
        text(story)


def test_the_head_has_the_embeddings_weight() -> None:
    model = build("small", SIZE)
    assert model.head.weight is model.layers[0].tokens.weight
    assert len(parameters_of(*model.layers, model.head)) == len(
        {id(p) for p in parameters_of(*model.layers, model.head)}
    )


@pytest.mark.parametrize("name", ["backprop", "ouroboros"])
def test_a_run_goes_on_where_it_was_stopped(name: str, tmp_path: Path, story: Path) -> None:
    train, val, _, kinds = text(story)
    recipe = Recipe("small", SIZE._replace(vocabulary=kinds), 2, 0.01, 2, 12, 0.25, 4)
    curves: list[list[Any]] = [[], []]

    def go(steps: int, file: str, curve: list[Any]) -> None:
        part = recipe._replace(steps=steps)
        part_of = type("Part", (Recipe,), {"rate": lambda self, step: recipe.rate(step)})
        ouroboros_accuracy.train(
            PLANS[name], 0, part_of(*part), (train, val), tmp_path / file, lambda *row: curve.append(row)
        )

    go(12, "whole", curves[0])
    go(8, "stopped", curves[1])
    go(12, "stopped", curves[1])
    assert curves[0] == curves[1]
    assert [step for step, _, _ in curves[0]] == [4, 8, 12]
    assert all(math.isfinite(bpc) for row in curves[0] for bpc in row[1:])


def test_the_study_writes_curves_and_runs_nothing_twice(tmp_path: Path, story: Path, capsys: Any) -> None:
    options = {"data": story, "steps": 4, "evaluate": 2, "seeds": 2, "blocks": 3, "width": 8, "length": 4, "rows": 2,
               "scratch": tmp_path, "results": tmp_path / "results.csv"}  # fmt: skip
    args = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    assert ouroboros_accuracy.main(args) == 0
    rows = ResultsFile(tmp_path / "results.csv", ouroboros_accuracy.COLUMNS, ouroboros_accuracy.KEY).rows()
    assert len(rows) == 2 * 2 * 2
    before = (tmp_path / "results.csv").read_text()
    assert ouroboros_accuracy.main(args) == 0
    assert (tmp_path / "results.csv").read_text() == before
    assert "ouroboros: " in capsys.readouterr().out


def test_ceilings_are_those_of_the_timetable() -> None:
    equal = [(1.0, 2.0)] * 13
    assert ouroboros.ceiling_of("ouroboros", equal[:12], [3, 9]) == pytest.approx(1.5)
    assert ouroboros.ceiling_of("ouroboros graph", equal[:12], [3, 9]) == pytest.approx(2.0)
    assert ouroboros.ceiling_of("naive", equal[:12], [3, 9]) == pytest.approx(1.0)
    assert ouroboros.ceiling_of("1f1b M=4", equal, [3, 9]) == pytest.approx(1.6)


@pytest.mark.slow
def test_the_race_runs(tmp_path: Path) -> None:
    assert ouroboros.main(["--quick", "--results", str(tmp_path / "results.csv")]) == 0
    rows = ResultsFile(tmp_path / "results.csv", ouroboros.COLUMNS, ("part", "method")).rows()
    assert {row["part"] for row in rows} >= {"order", "speed"}
