"""What the pages say is so."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_distopt
from lightning_distopt import (
    CompressedDDPStrategy,
    DSPStrategy,
    LocalUpdateStrategy,
    OuroborosStrategy,
    PipelineStrategy,
    StalePipelineStrategy,
    errors,
)
from lightning_distopt.compressors.text import KNOWN

PROJECT = Path(__file__).parents[1]
PAGES = [PROJECT / "README.md", PROJECT / "CHANGELOG.md", *sorted((PROJECT / "docs").glob("*.md"))]
PAGES += sorted((PROJECT / "recipes").rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]*)", page.read_text()):
        assert not target or (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_headings_that_links_name_exist(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]*)\)", page.read_text()):
        text = (page.parent / target if target else page).read_text()
        anchors = [
            re.sub(r"[^\w\- ]", "", line.lstrip("# ")).lower().replace(" ", "-")
            for line in text.splitlines()
            if line[:1] == "#"
        ]
        assert anchor in anchors, f"{page.name} links to #{anchor}"


def test_no_page_has_a_placeholder_left() -> None:
    assert not [page.name for page in PAGES if re.search(r"@[A-Z_]+@|TODO|FIXME", page.read_text())]


def test_the_readme_has_a_row_for_every_strategy_and_compressor() -> None:
    readme = (PROJECT / "README.md").read_text()
    for record in lightning_distopt.list_strategies():
        method, start = re.fullmatch(r"(.*?)(_spawn|_fork|_notebook)?", record.name).groups()
        assert f"`{method}`" in readme, method
        assert start is None or f"`{start}`" in readme, start
    for name in ("sign", "topk", "random_block", "bf16", "fp16", "fp32", "powersgd", "signsgd"):
        assert f"`{name}" in readme
    assert {form.example.partition(":")[0] for form in KNOWN.values()} >= {"topk", "sign", "random_block", "dense"}


def test_the_readme_quotes_the_error_of_a_forgotten_import() -> None:
    script = "from lightning.pytorch import Trainer\nTrainer(accelerator='cpu', devices=2, strategy='compressed_ddp')"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    error = ended.stderr.strip().splitlines()[-1]
    assert error.startswith("ValueError: You selected an invalid strategy name")
    assert error.split(" Example")[0] in " ".join((PROJECT / "README.md").read_text().split())


@pytest.mark.parametrize(
    "strategy",
    [
        CompressedDDPStrategy,
        DSPStrategy,
        LocalUpdateStrategy,
        OuroborosStrategy,
        PipelineStrategy,
        StalePipelineStrategy,
    ],
)
def test_every_argument_of_a_strategy_is_explained(strategy: type) -> None:
    text = inspect.getdoc(strategy) or ""
    for name in inspect.signature(strategy.__init__).parameters:
        assert name in ("self", "ddp_kwargs", "process_group", "options") or re.search(
            rf"^ +{name}: ", text, re.MULTILINE
        ), name


def test_the_troubleshooting_page_knows_every_error() -> None:
    page = (PROJECT / "docs" / "troubleshooting.md").read_text()
    assert all(name in page for name in errors.__all__ if name != "DistoptError")
