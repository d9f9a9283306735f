from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("flwr")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from lightning_distopt import federated
from recipes.federated import demo
from recipes.federated.app.digits_federation import DigitsPart, digits


def test_the_table_and_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [demo.Run("FedAvg", 3.0, [0.1, 0.5], 0.5, 0.2), demo.Run("FedMom", 3.0, [0.1, 0.9], 0.9, 0.8)]
    demo.print_table(runs)
    shown = capsys.readouterr().out
    assert "90.0%" in shown
    assert "50.0%" in shown
    demo.draw(runs, tmp_path / "new" / "accuracy.png")
    assert (tmp_path / "new" / "accuracy.png").read_bytes()[:4] == b"\x89PNG"


def test_a_round_must_be_asked_for() -> None:
    with pytest.raises(SystemExit):
        demo.main(["--rounds", "0"])


def test_the_parts_are_the_training_images() -> None:
    held = [DigitsPart(partition, 5) for partition in range(5)]
    assert sum(len(part.fit_part) + len(part.val_part) for part in held) == len(digits()[0])


def test_every_public_name_exists_and_is_explained() -> None:
    for name in federated.__all__:
        assert getattr(federated, name).__doc__
    with pytest.raises(AttributeError, match="nothing"):
        _ = federated.nothing
