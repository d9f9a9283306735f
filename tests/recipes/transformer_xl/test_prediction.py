"""`distopt predict` prints text of a checkpoint, which knows its own alphabet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_distopt.cli import main
from recipes.transformer_xl import Sampling, TextFile, TransformerXL
from tests.recipes.transformer_xl.models import LETTERS, Letters, segments, small
from tests.strategies.fits import trainer

CONFIG = Path(__file__).parents[3] / "recipes" / "transformer_xl" / "shakespeare.yaml"
QUIET = [
    "trainer.logger=false",
    "trainer.enable_progress_bar=false",
    "trainer.callbacks=null",
    "trainer.accelerator=cpu",
]
TINY = ["n_layer=1", "d_model=16", "n_head=2", "d_head=4", "d_inner=16", "vocabulary=5", "context.mem_len=8"]
TINY += ["eval_context.mem_len=8", "sampling.length=30"]


def distopt(command: str, text: Path, *more: str) -> int:
    """Run the command on a tiny model."""
    arguments = [f"--{flag}" for flag in QUIET] + [f"--model.init_args.{flag}" for flag in TINY]
    arguments += [f"--data.init_args.path={text}", "--data.init_args.tgt_len=8", "--data.init_args.batch_size=2"]
    arguments += ["--data.init_args.eval_tgt_len=8", "--data.init_args.eval_batch_size=2", *more]
    arguments += [] if command == "fit" else ["--trainer.enable_checkpointing=false"]
    return main([command, "--config", str(CONFIG), *arguments])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonargparse, about LightningCLI
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # whoever writes text saves no checkpoints
def test_the_command_trains_saves_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, checkpoint = tmp_path / "text", tmp_path / "last.ckpt"
    text.write_text("abcd\n" * 100)
    keep = [
        "--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoint",
        f"--trainer.callbacks.dirpath={tmp_path}",
    ]
    keep += ["--trainer.callbacks.filename=last"]
    distopt("fit", text, "--trainer.max_steps=60", "--trainer.val_check_interval=20", "--model.init_args.scheduler=null",
            "--model.init_args.optimizer.lr=0.01", *keep)  # fmt: skip
    capsys.readouterr()
    ask = [f"--ckpt_path={checkpoint}", "--data.init_args.prompt=cd\na", "--model.init_args.sampling.temperature=0"]
    distopt("predict", text, *ask)
    assert "cd\nabcd\nabcd\nabcd\nabcd\nabcd\nabc" in capsys.readouterr().out

    text.write_text("abcdé" * 100)
    with pytest.raises(ValueError, match=r"\(test\) has 1 characters outside the vocabulary of 5: 'é'"):
        distopt("test", text, f"--ckpt_path={checkpoint}")


def test_what_is_written_is_what_the_model_believes_likeliest() -> None:
    """Token by token with a memory is the whole text at once."""
    model = small(context=small().context, sampling=Sampling(length=10, temperature=0)).eval()
    prompt = torch.randint(len(LETTERS), (1, 3))
    long = small(context=type(model.context)(40), sampling=model.sampling).eval()
    long.load_state_dict(model.state_dict())
    with torch.inference_mode():
        long.forget()
        written = long.write(long(prompt)[:, -1])
        whole = segments(torch.cat([prompt, written], dim=1), 13, long)
        assert torch.equal(written[0], long.loss.log_prob(whole[0, 2:-1]).argmax(1))


def test_the_same_seed_writes_the_same_text(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed, top_k in ((1, 0), (1, 0), (2, 0), (1, 1)):
        torch.manual_seed(5)
        module = small(sampling=Sampling(length=20, seed=seed, top_k=top_k))
        trainer("auto", 1, 1).predict(module, datamodule=Letters(prompt="ab"))
        texts.append(capsys.readouterr().out)
        assert texts[-1].startswith("ab")
        assert len(texts[-1]) == 23
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_a_checkpoint_of_another_data_class_is_read_with_its_own_alphabet(tmp_path: Path) -> None:
    torch.manual_seed(5)
    trained = trainer("auto", 3, 1)
    trained.fit(small(), datamodule=Letters())
    trained.save_checkpoint(tmp_path / "x.ckpt")
    (tmp_path / "text").write_text("badge cab\n" * 40)
    data = TextFile(str(tmp_path / "text"), held_out=0.2, tgt_len=6, batch_size=2, prompt="a")
    trainer("auto", 1, 1).test(small(), datamodule=data, ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert data.vocabulary.symbols == tuple(LETTERS)
    assert data.vocabulary.decode(data.streams["test"][:10]) == "badge cab\n"
    data.prompt = "x"
    with pytest.raises(ValueError, match=r"The text has 1 characters outside the vocabulary of 12: 'x'"):
        trainer("auto", 1, 1).predict(small(), datamodule=data, ckpt_path=tmp_path / "x.ckpt")
    with pytest.raises(
        ValueError, match=r"`vocabulary` must be the number of different tokens: got 9 for 12 characters"
    ):
        trainer("auto", 1, 1).test(small(vocabulary=9), datamodule=data, ckpt_path=tmp_path / "x.ckpt")
    assert isinstance(TransformerXL.load_from_checkpoint(tmp_path / "x.ckpt", **_arguments()), TransformerXL)


def _arguments() -> dict[str, int]:
    return {"vocabulary": len(LETTERS), "n_layer": 2, "d_model": 8, "n_head": 2, "d_head": 4, "d_inner": 16}


def test_pipelines_do_not_write_text() -> None:
    model = small(tie_weight=False)
    model.trainer = type("T", (), {"strategy": type("S", (), {"placement": (0, 1)})()})()  # as a Trainer would say it
    with pytest.raises(MisconfigurationException, match="got S with 2 stages"):
        model.setup("predict")
