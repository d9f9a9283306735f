"""``distopt advise``: the table, the picture, and every way to ask wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_distopt.advice import CANDIDATES, CodecSpeed, Link, Workload, measure_codec, measure_link
from lightning_distopt.advice.measure import alone
from lightning_distopt.advice.probe import AdviceProbe
from lightning_distopt.advice.report import parse_bandwidth, parse_seconds, show_bandwidth
from lightning_distopt.cli import main
from tests.ranks import run_ranks
from tests.strategies.fits import fit
from tests.strategies.models import Manual, Net


@pytest.mark.parametrize(
    ("text", "bytes_a_second"), [("10gbit", 1.25e9), ("100mbit", 1.25e7), ("1.5Gbit", 1.875e8), ("56kbit", 7e3)]
)
def test_bandwidths_are_bits(text: str, bytes_a_second: float) -> None:
    assert parse_bandwidth(text) == pytest.approx(bytes_a_second)


@pytest.mark.parametrize(("text", "seconds"), [("0.5ms", 5e-4), ("30us", 3e-5), ("2s", 2.0)])
def test_times_have_units(text: str, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("bandwidth", "shown"),
    [(1.25e9, "10 Gbit/s"), (1.25e7, "100 Mbit/s"), (1e3, "8 kbit/s"), (0, "never"), (1e12, "any")],
)
def test_bandwidths_are_shown_as_bits(bandwidth: float, shown: str) -> None:
    assert show_bandwidth(bandwidth) == shown


def test_a_cluster_that_is_not_at_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "advice.png"
    words = ["--ranks", "64", "--bandwidth", "100mbit", "--latency", "0.5ms", "--elements", "1e6", "--compute", "20ms"]
    assert main(["advise", *words, "--picture", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "64 ranks, 100 Mbit/s, 0.5 ms latency, 1 M parameters, 20 ms a step" in shown
    assert all(candidate.name in shown for candidate in CANDIDATES)
    assert "The choice would be" in shown
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs a `--config` to measure, or `--ranks` and `--bandwidth`"),
        (["--ranks", "1", "--bandwidth", "1gbit"], "`--ranks` must be from 2 to 4096: got 1"),
        (["--ranks", "9999", "--bandwidth", "1gbit"], "`--ranks` must be from 2 to 4096: got 9999"),
        (["--ranks", "4", "--bandwidth", "fast"], "`--bandwidth` must be a positive number and one of kbit, mbit"),
        (["--ranks", "4", "--bandwidth=-1gbit"], "got '-1gbit'. Write 10gbit"),
        (["--ranks", "4", "--latency", "1ms"], "`--latency 1ms` needs `--bandwidth`"),
        (["--config", "my.yaml", "--elements", "1e6"], "`--elements` describes a model that is not at hand: got 1e6"),
        (
            ["--ranks", "4", "--bandwidth", "1gbit", "--latency", "soon"],
            "`--latency` must be a positive number and one of",
        ),
        (
            ["--ranks", "4", "--bandwidth", "1gbit", "--compute", "5"],
            "`--compute` must be a positive number and one of",
        ),
        (["--ranks", "4", "--bandwidth", "1gbit", "--elements", "-5"], "`--elements` must be at least 1: got -5"),
        (["--ranks", "many"], "`--ranks` must be a whole number: got 'many'"),
        (["--ranks", "4", "--bandwidth", "1gbit", "--overlap", "2"], "`--overlap` must be in [0, 1]: got 2"),
        (["--ranks", "4", "--bandwidth", "1gbit", "--picture", "a.svgz/none.png"], "folder of `--picture`"),
    ],
)
def test_a_wrong_question_is_answered_with_the_rule(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["advise", *words]) == 2
    assert message in capsys.readouterr().err


# ---- measurements ----------------------------------------------------------------------------------------------------


def _link(rank: int, world: int) -> Link:
    return measure_link(torch.device("cpu"), seconds=0.5)


def test_all_ranks_measure_the_same_link() -> None:
    links = run_ranks(2, _link)
    assert links[0] == links[1]
    assert 1e6 < links[0].bandwidth < 1e12
    assert 1e-7 < links[0].latency < 1.0
    assert 0.0 <= links[0].overlap <= 1.0


def test_one_rank_has_no_link() -> None:
    with pytest.raises(AssertionError, match=r"needs at least 2 ranks: got 1"):
        run_ranks(1, _link)


def _alone(rank: int, world: int) -> tuple[int, int]:
    with alone() as group:
        return dist.get_world_size(group), dist.get_rank(group)


def test_codecs_are_measured_without_the_others() -> None:
    assert run_ranks(2, _alone) == [(1, 0), (1, 0)]


def test_up_to_4096_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", "--ranks", "4096", "--bandwidth", "10gbit", "--elements", "1e6"]) == 0
    shown = capsys.readouterr().out
    assert "4096 ranks, 10 Gbit/s" in shown
    assert "SignSGD" not in shown  # counts votes of at most 127 ranks
    assert "server" in shown


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda candidate: candidate.name)
def test_codecs_take_time_that_grows_with_the_elements(candidate) -> None:  # type: ignore[no-untyped-def]
    speed = measure_codec(candidate, torch.device("cpu"), 1 << 16)
    assert speed.encode > 0
    assert speed.decode > 0
    assert speed.fixed >= 0


class _Kept(AdviceProbe):
    """Writes down what it would say."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def advise(self, work: Workload, link: Link, codecs: dict[str, CodecSpeed], ranks: int, speaks: bool) -> None:
        if speaks:
            numbers = torch.tensor([work.numel, work.forward, work.backward, link.bandwidth, ranks])
            torch.save(numbers, self.folder / "said.pt")


class Short(Net):
    """Does not ask for the number of a batch, and has its loaders in a dictionary."""

    def training_step(self, batch: Any) -> Any:
        return super().training_step(batch["mine"], 0)

    def train_dataloader(self) -> Any:
        return {"mine": super().train_dataloader()}


def test_it_takes_what_lightning_takes_and_trains_nothing_whatever_the_least_number_of_epochs(tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in Short().named_parameters()}
    after = fit(Short(), "ddp_fork", callbacks=[_Kept(tmp_path)], min_epochs=2)
    assert (tmp_path / "said.pt").exists()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("module", [Net, Manual])
@pytest.mark.parametrize("strategy", ["ddp_fork", "compressed_ddp_fork"])
def test_the_probe_measures_and_trains_nothing(tmp_path: Path, module: type[Net], strategy: str) -> None:
    before = {name: value.clone() for name, value in module().state_dict().items()}
    after = fit(module(), strategy, callbacks=[_Kept(tmp_path)])
    numel, forward, backward, bandwidth, ranks = torch.load(tmp_path / "said.pt").tolist()
    assert numel == sum(p.numel() for p in module().parameters())
    assert min(forward, backward, bandwidth) > 0
    assert ranks == 2
    if module is Net:  # a manual step is a step
        assert all(torch.equal(before[name], after[name]) for name, _ in module().named_parameters())


def test_an_error_of_the_model_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(words: object, probe: object) -> None:
        raise ValueError("of the model")

    monkeypatch.setattr("lightning_distopt.advice.command._with_config", failing)
    with pytest.raises(ValueError, match="of the model"):
        main(["advise", "--config", "model.yaml"])
