"""What the README shows is true: its commands run, its files exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_layout import FOLDERS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [
    commands
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
    if not language
    and (commands := [line for line in block.splitlines() if line.startswith("silotune ")])
]


def test_there_are_commands() -> None:
    assert sum(map(len, BLOCKS)) >= 10
    assert {"make demo", "make test"} <= set(README.splitlines())


@pytest.mark.download
@pytest.mark.xdist_group("system")
@pytest.mark.parametrize(
    "commands",
    [
        # A simulation of a whole recipe takes a minute: `make nightly` runs it.
        pytest.param(
            block,
            id=block[0],
            marks=pytest.mark.nightly
            if any(command.startswith("silotune sim run") for command in block)
            else (),
        )
        for block in BLOCKS
    ],
)
def test_every_command_of_the_readme_runs(commands: list[str], tmp_path: Path) -> None:
    # Paths in the README start at the repository; what a command writes goes elsewhere.
    (tmp_path / "simulations").symlink_to(ROOT / "simulations")
    for command in commands:
        words = shlex.split(command)
        done = subprocess.run(
            [Path(sys.executable).parent / words[0], *words[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
        )
        assert done.returncode == 0, command + done.stdout[-2000:] + done.stderr
        assert done.stdout.strip()


def test_the_readme_names_each_folder_of_the_layout_in_its_order() -> None:
    text, named, package = README.split("## Repository layout")[1].split("```")[1], {}, ""
    for line in filter(None, text.splitlines()):
        name = line.split()[0].rstrip("/")
        if not line.startswith(" "):
            package, named[name] = name, []
        else:
            named[package].append(name.removesuffix(".py"))
            assert (ROOT / package / name).exists(), f"{package}/{name}"
    for package, folders in FOLDERS.items():
        listed = [name for name in named[package] if name in folders]
        assert listed == [folder for folder in folders if folder], package


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.findall(r"@[A-Z_]+@", README)
