"""What the README and the pages in docs/ show is true: commands and Python run, files exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.test_layout import FOLDERS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# docs/generate.py writes these when the site is built.
GENERATED = {
    f"docs/reference/{name}.md"
    for name in ("cli", "contract", "site", "server", "errors", "metrics")
}
# A note from one working session to the next, no page.
NOTES = {"docs/project/progress.md"}
PAGES = sorted(
    path
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
    if path.relative_to(ROOT).as_posix() not in GENERATED | NOTES
)
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))
HEAVY = (
    "silotune sim run",
    "silotune sim compare",
    "silotune contract tune",
    "silotune server start",
)


class Block(NamedTuple):
    """A fenced block of a page, as it stands."""

    page: str
    number: int
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        lines = self.text.splitlines() if not self.language else []
        return [line for line in lines if line.startswith("silotune ")]


def blocks() -> Iterator[Block]:
    for path in PAGES:
        found = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.S | re.M)
        for number, (language, text) in enumerate(found, 1):
            yield Block(path.relative_to(ROOT).as_posix(), number, language, text)


BLOCKS = list(blocks())
COMMANDS = [block for block in BLOCKS if block.commands]
PYTHON = [block for block in BLOCKS if block.language == "python"]


def name(block: Block) -> str:
    return f"{block.page}-{block.number}"


def test_there_are_commands() -> None:
    assert sum(len(block.commands) for block in COMMANDS) >= 20
    assert any(block.page == "README.md" for block in COMMANDS)
    assert PYTHON
    assert "make demo" in README.splitlines()
    assert "`make test`" in README


def test_the_readme_in_chinese_has_the_same_commands() -> None:
    text = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith(("silotune ", "make "))]
    assert len(lines) >= 5
    assert set(lines) <= set(README.splitlines())


def test_the_glossary_in_chinese_has_the_same_terms() -> None:
    english = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").split("{glossary}")[1]
    chinese = (ROOT / "docs" / "glossary.zh-CN.md").read_text(encoding="utf-8")
    terms = re.findall(r"^(\S.*)\n    ", english, re.M)
    rows = re.findall(r"^\| (.+?) \|", chinese, re.M)
    assert len(terms) > 20
    assert rows[1:] == terms  # the first row is the table's head


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def run(words: list[str | Path], folder: Path) -> str:
    """What a program prints that is run in the folder; it must end well and print something."""
    done = subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}{done.stderr}"
    assert done.stdout.strip()
    return done.stdout


@pytest.mark.download
@pytest.mark.parametrize(
    "block",
    [
        # A simulation of a whole recipe takes a minute: `make nightly` runs it.
        pytest.param(
            block,
            id=name(block),
            marks=pytest.mark.nightly
            if any(command.startswith(HEAVY) for command in block.commands)
            else (),
        )
        for block in COMMANDS
    ],
)
def test_every_command_runs(block: Block, tmp_path: Path) -> None:
    # Paths in a page start at the repository; what a command writes goes elsewhere.
    (tmp_path / "simulations").symlink_to(ROOT / "simulations")
    for command in block.commands:
        words = shlex.split(command)
        run([Path(sys.executable).parent / words[0], *words[1:]], tmp_path)


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(
            block, id=name(block), marks=pytest.mark.nightly if "simulate(" in block.text else ()
        )
        for block in PYTHON
    ],
)
def test_every_block_of_python_runs(block: Block, tmp_path: Path) -> None:
    (tmp_path / "simulations").symlink_to(ROOT / "simulations")
    printed = run([sys.executable, "-c", block.text], tmp_path)
    assert " ... " not in printed  # pandas cuts a table that is too wide


def test_the_layout_page_names_each_folder_in_its_order() -> None:
    page = (ROOT / "docs" / "project" / "layout.md").read_text(encoding="utf-8")
    text, package = page.split("# Repository layout")[1].split("```")[1], ""
    named: dict[str, list[str]] = {}
    for line in filter(None, text.splitlines()):
        first = line.split()[0].rstrip("/")
        if not line.startswith(" "):
            package, named[first] = first, []
        else:
            named[package].append(first.removesuffix(".py"))
            assert (ROOT / package / first).exists(), f"{package}/{first}"
    for package, folders in FOLDERS.items():
        listed = [folder for folder in named[package] if folder in folders]
        assert listed == [folder for folder in folders if folder], package


# Where a page may name a file of the repository: between backticks, or in a link.
NAMED = re.compile(
    r"`((?:common|client|server|simulations|tests|docs|\.ci)/[\w./-]+\.(?:py|toml|md|json|j2|yml))`"
)
LINK = re.compile(r"\]\(<?([^)>#\s][^)>#]*)(?:#[^)]*)?>?\)")


@pytest.mark.parametrize(
    "page", [*(path.relative_to(ROOT).as_posix() for path in PAGES), "README.zh-CN.md"]
)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    missing = [found for found in NAMED.findall(text) if not (ROOT / found).exists()]
    for link in LINK.findall(text):
        target = os.path.normpath((ROOT / page).parent / link)
        generated = Path(target).is_relative_to(ROOT) and (
            Path(target).relative_to(ROOT).as_posix() in GENERATED
        )
        if not generated and not Path(target).exists():
            missing.append(link)
    assert not missing


# Tests that a page names by function, mutation or file, without a folder.
TEST = re.compile(r"`(tests/[\w/]+\.py)` \(((?:`\w+`(?:, )?)+)\)")


def test_every_test_that_a_page_names_exists() -> None:
    pages = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    found = TEST.findall(pages)
    assert len(found) > 5
    for file, names in found:
        source = (ROOT / file).read_text(encoding="utf-8")
        for test in re.findall(r"`(\w+)`", names):
            assert f"def {test}(" in source, f"{file} {test}"


def test_nothing_is_left_to_fill_in() -> None:
    for path in PAGES:
        assert not re.findall(r"@[A-Z_]+@", path.read_text(encoding="utf-8")), path
