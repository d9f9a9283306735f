"""`distopt timeline`: the table, the costs, the picture, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_distopt.cli import main
from lightning_distopt.model_parallel.trace import Trace, chrome_trace
from tests.model_parallel.test_staleness import DSP


def test_the_table_and_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["timeline", "--plan", "dsp", "--stages", "3", "--png", str(tmp_path / "t.png")]) == 0
    out = capsys.readouterr().out
    assert DSP in out
    assert "dsp(1,1,0;4,2,0)" in out
    assert "at most 2.25 x naive" in out
    assert "w0[b - 4]" in out
    assert (tmp_path / "t.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("plan", ["naive", "ddg", "pipedream_2bw", "ouroboros", "dsp(2,2,0;6,3,0)"])
def test_every_plan_can_be_shown(plan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["timeline", "--plan", plan, "--latency", "1", "--png", str(tmp_path / "t.png")]) == 0
    assert "tick | w0" in capsys.readouterr().out


def test_stages_of_different_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["timeline", "--plan", "ouroboros", "--png", str(tmp_path / "t.png"), "--lengths"]
    assert main([*words, "3,6,3"]) == 0
    assert "at most 1.50 x naive" in capsys.readouterr().out
    for lengths in ("3,6", "3,0,3"):
        assert main([*words, lengths]) == 2
        assert "`lengths` must be one a stage" in capsys.readouterr().err


def test_what_cannot_be_drawn_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["timeline", "--plan", "gpipe"]) == 2
    assert "gpipe" in capsys.readouterr().err


def test_a_trace_opens_in_chrome(tmp_path: Path) -> None:
    trace = Trace()
    trace.add("F", 0, 3, 1.0, 1.5)
    trace.add("B", 0, 1, 2.0, 2.5)
    assert trace.idle_fraction() == pytest.approx(1 / 3)
    trace.save(tmp_path / "trace.json", worker=2)
    found = json.loads((tmp_path / "trace.json").read_text())
    assert found == chrome_trace([(2, trace.work)])
    events = [e for e in found["traceEvents"] if e["ph"] == "X"]
    assert [(e["name"], e["ts"], e["dur"], e["pid"]) for e in events] == [("F3", 0.0, 5e5, 2), ("B1", 1e6, 5e5, 2)]
    assert Trace().idle_fraction() == 0.0
