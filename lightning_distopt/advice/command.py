"""The sub-command ``distopt advise``: whether compression pays, here or on a cluster that is not at hand."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from lightning_distopt.advice.candidates import CANDIDATES
from lightning_distopt.advice.cost_model import Link, Workload
from lightning_distopt.advice.measure import measure_codec
from lightning_distopt.advice.probe import AdviceProbe
from lightning_distopt.advice.report import parse_bandwidth, parse_seconds

__all__ = ["HELP", "prepare"]

HELP = "predict the step time of the common methods, on this network or on an imagined one"
_EXAMPLES = """\
examples:
  distopt advise --config recipes/resnet/configs/demo.yaml
      (measure model, link and compressors with the config's processes)
  distopt advise --ranks 64 --bandwidth 10gbit --latency 0.5ms --elements 25e6 --compute 120ms --picture advice.png
      (measure only the compressors, imagine the rest)
  distopt advise --config my.yaml --ranks 64 --bandwidth 10gbit --latency 0.5ms
      (measure the model too)

how to read the table:
  by          how payloads are averaged: summed in the network, gathered by all, or by a server that all ranks share
  ms          a step, from its start to the next one's; network and codec are parts of it that may be hidden
  pays        the bandwidths, below (<) or above (>), at which the method is faster than gradients in 16 bit
  The choice is the fastest method whose accuracy this project has evidence for, if it gains 10 % on 16 bit.
  strategy="compressed_ddp_auto" does the same at the start of a fit, by real steps. docs/advice.md says how far to trust it.
"""


def prepare(args: Sequence[str]) -> Callable[[], None]:
    """Read the arguments; return what measures, predicts, prints and draws.

    In two steps, so that an error in the arguments can be told from one in the model.

    Raises:
        ValueError: for a bandwidth, latency or number outside its range.
    """
    parser = argparse.ArgumentParser(
        prog="distopt advise",
        description=f"{HELP[0].upper()}{HELP[1:]}. What follows `--config` is as in `distopt fit`.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--ranks", help="ranks to imagine, 2 to 4096; the config's own if left out")
    parser.add_argument(
        "--bandwidth", help="of each rank's link and direction, for example 10gbit; measured if left out"
    )
    parser.add_argument("--latency", help="of a message, for example 0.5ms or 30us (default 0.1ms with --bandwidth)")
    parser.add_argument("--elements", help="trainable parameters, without --config, for example 25e6 (the default)")
    parser.add_argument("--compute", help="a step without communication, without --config (default 100ms)")
    parser.add_argument(
        "--overlap",
        help="share of the time on the network that computing hides, 0 to 1 (default 1 without --config, else measured): "
        "lower where sending takes the cores that train",
    )
    parser.add_argument("--picture", type=Path, help="draw step times and crossovers into this PNG")
    options, rest = parser.parse_known_args(args)
    ranks = None if options.ranks is None else int(_number("--ranks", options.ranks, "64", whole=True))
    if ranks is not None and not 2 <= ranks <= 4096:
        raise ValueError(f"`--ranks` must be from 2 to 4096: got {ranks}. Write for example --ranks 64.")
    if options.picture is not None and not options.picture.absolute().parent.is_dir():
        raise ValueError(f"The folder of `--picture` must exist: got {options.picture}. Make it, or name another.")
    if options.picture is not None and find_spec("matplotlib") is None:
        raise ValueError(
            "`--picture` needs matplotlib, which is not installed. Run `pip install matplotlib`, or leave it out."
        )
    overlap = 1.0 if options.overlap is None else _number("--overlap", options.overlap, "0.5")
    if not 0 <= overlap <= 1:
        raise ValueError(f"`--overlap` must be in [0, 1]: got {options.overlap}. Write for example --overlap 0.5.")
    link = None
    if options.bandwidth is not None:
        link = Link(parse_bandwidth(options.bandwidth), parse_seconds(options.latency or "0.1ms"), overlap)
    elif options.latency is not None:
        raise ValueError(f"`--latency {options.latency}` needs `--bandwidth`: otherwise both are measured. Add it.")
    probe = AdviceProbe(link, ranks, options.picture, measure_overlap=options.overlap is None)
    if rest:
        imagined = next((name for name in ("elements", "compute") if getattr(options, name) is not None), None)
        if imagined is not None:
            raise ValueError(
                f"`--{imagined}` describes a model that is not at hand: got {getattr(options, imagined)} beside "
                f"`{rest[0]}`, whose model is measured. Leave one of them out."
            )
        return partial(_with_config, rest, probe)
    if link is None or ranks is None:
        raise ValueError(
            "`distopt advise` needs a `--config` to measure, or `--ranks` and `--bandwidth` to imagine a cluster: got "
            f"{' '.join(args) or 'nothing'}. See `distopt advise --help`."
        )
    compute = parse_seconds(options.compute or "100ms", "--compute")
    numel = int(_number("--elements", options.elements or "25e6", "25e6"))
    if numel < 1:
        raise ValueError(f"`--elements` must be at least 1: got {numel}. Write for example --elements 25e6.")
    work = Workload(numel, compute / 3, 2 / 3 * compute, max(1, round(4 * numel / (25 * 2**20))))
    return partial(_imagined, work, link, ranks, probe)


def _number(argument: str, text: str, example: str, whole: bool = False) -> float:
    try:
        found = int(text) if whole else float(text)
        if not math.isfinite(found):
            raise ValueError(text)
        return found
    except ValueError:
        kind = "a whole number" if whole else "a number"
        raise ValueError(
            f"`{argument}` must be {kind}: got {text!r}. Write for example {argument} {example}."
        ) from None


def _imagined(work: Workload, link: Link, ranks: int, probe: AdviceProbe) -> None:
    codecs = {candidate.name: measure_codec(candidate, torch.device("cpu")) for candidate in CANDIDATES}
    probe.advise(work, link, codecs, ranks, speaks=True)


def _with_config(words: Sequence[str], probe: AdviceProbe) -> None:
    from lightning_distopt.cli import DistoptCLI  # the floor above: the command line of a command

    cli = DistoptCLI(list(words), run=False)
    trainer = cli.trainer
    trainer.callbacks.append(probe)  # type: ignore[attr-defined]
    trainer.limit_val_batches = trainer.num_sanity_val_steps = 0
    trainer.fit(cli.model, datamodule=cli.datamodule)
