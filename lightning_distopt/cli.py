"""The `distopt` command: LightningCLI with this package's names registered, and sub-commands of our own.

distopt fit|validate|test|predict ...   -> LightningCLI: any LightningModule and LightningDataModule by class path
distopt strategies ...                  -> a function of the table `COMMANDS`
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger, WandbLogger

import lightning_distopt
from lightning_distopt.errors import DistoptError

if TYPE_CHECKING:
    from lightning.pytorch.cli import ArgsType

__all__ = ["COMMANDS", "Command", "DistoptCLI", "RunConfigCallback", "main"]


@dataclass(frozen=True)
class Command:
    """A sub-command of our own.

    Attributes:
        run: takes the arguments after the sub-command's name and returns the exit code.
        help: one line for ``distopt --help``.
    """

    run: Callable[[Sequence[str]], int]
    help: str


def strategies(args: Sequence[str]) -> int:
    """Print every strategy name, its paper and a one-line description."""
    parser = argparse.ArgumentParser(prog="distopt strategies", description=COMMANDS["strategies"].help)
    parser.parse_args(args)

    # Imported here: the table needs rich, the other sub-commands do not.
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Strategies registered by lightning_distopt")
    for column in ("name", "paper", "description"):
        table.add_column(column, no_wrap=column == "name")
    for record in lightning_distopt.list_strategies():
        table.add_row(record.name, record.paper, record.description)
    Console().print(table)
    return 0


def advise(args: Sequence[str]) -> int:
    """Predict step times; see :mod:`lightning_distopt.advice.command`."""
    from lightning_distopt.advice.command import prepare

    try:
        measure = prepare(args)
    except ValueError as error:
        print(f"distopt advise: {error}", file=sys.stderr)
        return 2
    measure()
    return 0


def timeline(args: Sequence[str]) -> int:
    """Draw a staleness plan; see :mod:`lightning_distopt.model_parallel.command`."""
    from lightning_distopt.model_parallel.command import run

    return run(args)


def solve(args: Sequence[str]) -> int:
    """Solve a linear model; see :mod:`lightning_distopt.primal_dual.command`."""
    try:
        from lightning_distopt.primal_dual.command import run

        return run(args)
    except (ImportError, OSError, ValueError, DistoptError) as error:
        print(f"distopt solve: {error}", file=sys.stderr)
        return 2


LIGHTNING_COMMANDS: dict[str, str] = {
    "fit": "train a model, validating as the trainer's settings say",
    "validate": "one pass over the validation data",
    "test": "one pass over the test data",
    "predict": "predictions for the prediction data",
}

COMMANDS: dict[str, Command] = {
    "advise": Command(advise, "predict the step time of the common methods, on this network or on an imagined one"),
    "solve": Command(solve, "a linear model from a LIBSVM file, to a duality gap, on one or many workers"),
    "strategies": Command(strategies, "list every strategy that importing this package registers"),
    "timeline": Command(timeline, "draw which stage of a pipeline works on which batch when, and what that costs"),
}

EXAMPLES = """\
examples:
  distopt fit --config recipes/resnet/configs/demo.yaml
  distopt fit --config recipes/resnet/configs/demo.yaml --trainer.strategy=ddp --trainer.max_epochs=5
  distopt fit --config a.yaml --config b.yaml --print_config    (b overrides a; print instead of running)
  distopt fit --help                                            (every setting of the trainer)
  distopt fit --trainer.strategy.help=lightning_distopt.CompressedDDPStrategy
  distopt timeline --plan dsp --stages 3
  distopt solve --data file.libsvm --loss logistic --workers 4
"""


class RunConfigCallback(SaveConfigCallback):
    """Put the configuration into the run of every logger, so that a run can be repeated with ``--config``.

    A logger with a folder for each run (CSV, TensorBoard) gets ``config.yaml`` there; W&B gets ``distopt.yaml`` among
    the run's files and the settings in the run's config; any other logger gets the text as hyper-parameter ``config``.
    Nothing is written without a logger. Unlike its base class it never writes to a folder shared by several runs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the configuration; Lightning calls this on rank 0 only."""
        text = self.parser.dump(self.config, skip_none=False)
        for logger in trainer.loggers:
            self._save_to(logger, text)

    def _save_to(self, logger: Logger, text: str) -> None:
        log_dir = getattr(logger, "log_dir", None)
        if isinstance(logger, WandbLogger):
            # W&B writes a `config.yaml` of its own into this folder.
            Path(logger.experiment.dir, "distopt.yaml").write_text(text)
            logger.experiment.config.update({"distopt": yaml.safe_load(text)}, allow_val_change=True)
        elif log_dir is not None:
            files = get_filesystem(log_dir)  # it may be a bucket's address
            files.makedirs(log_dir, exist_ok=True)
            with files.open(os.path.join(log_dir, self.config_filename), "w") as file:
                file.write(text)
        else:
            logger.log_hyperparams({"config": text})


class DistoptCLI(LightningCLI):
    """LightningCLI for any module and data module by class path.

    Optimizers are not settings of their own: LightningCLI would build them from all parameters before a strategy could
    partition the model. Modules take ``OptimizerCallable`` and build theirs in ``configure_optimizers``.
    """

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        names = ", ".join(LIGHTNING_COMMANDS)
        super().__init__(
            save_config_callback=RunConfigCallback,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "distopt", "description": f"Lightning's own sub-commands of distopt: {names}."},
            args=args,
            run=run,
        )


def main(args: Sequence[str] | None = None) -> int:
    """Run the ``distopt`` command.

    The current folder is put on the import path, as ``python -m`` does, so that ``recipes.`` and your own modules
    resolve. While the command runs, ``sys.argv`` holds its arguments: strategies that start processes by running the
    script again read them there.

    Args:
        args: what follows ``distopt`` on the command line; ``None`` takes it from ``sys.argv``.

    Returns:
        The exit code: 0, or 2 for a command line that cannot be understood.
    """
    words = list(sys.argv[1:] if args is None else args)
    _put_current_folder_on_path()
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"lightning_distopt {lightning_distopt.__version__}")
        return 0
    if words[0] in COMMANDS:
        with _command_line(words):
            return COMMANDS[words[0]].run(words[1:])
    if words[0] not in LIGHTNING_COMMANDS and not words[0].startswith("-"):
        print(_unknown(words[0]), file=sys.stderr)
        return 2
    with _command_line(words):
        DistoptCLI()
    return 0


def _help() -> str:
    lines = [
        "usage: distopt <sub-command> [options]",
        "",
        "Train with Lightning and the strategies of lightning_distopt.",
    ]
    lines += ["", "sub-commands of Lightning (each takes --config, --help and --print_config):"]
    lines += [f"  {name:<12}{text}" for name, text in LIGHTNING_COMMANDS.items()]
    lines += ["", "sub-commands of this package (each takes --help):"]
    lines += [f"  {name:<12}{command.help}" for name, command in COMMANDS.items()]
    lines += ["", "options:", f"  {'-h, --help':<12}this text", f"  {'--version':<12}the version of this package"]
    return "\n".join([*lines, "", EXAMPLES.rstrip()])


def _unknown(word: str) -> str:
    known = [*LIGHTNING_COMMANDS, *COMMANDS]
    close = difflib.get_close_matches(word, known, n=1)
    hint = f" Did you mean `distopt {close[0]}`?" if close else ""
    return f"distopt: the sub-command must be one of {', '.join(known)}: got {word!r}.{hint} See `distopt --help`."


def _put_current_folder_on_path() -> None:
    folder = os.getcwd()
    # `python -P` and PYTHONSAFEPATH (Python >= 3.11) ask for exactly the opposite.
    if folder not in sys.path and not getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, folder)


@contextmanager
def _command_line(words: list[str]) -> Iterator[None]:
    before = sys.argv[1:]
    sys.argv[1:] = words
    try:
        yield
    finally:
        sys.argv[1:] = before


if __name__ == "__main__":
    sys.exit(main())
