"""The command line of a benchmark: its --help is what the module says of itself."""

from __future__ import annotations

import argparse
from pathlib import Path


def parser(about: str | None) -> argparse.ArgumentParser:
    """A parser without arguments of its own. about: the module's docstring."""
    return argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def is_quick(about: str | None) -> bool:
    """Whether a benchmark, which has this option alone, is asked to do little."""
    asked = parser(about)
    asked.add_argument("--quick", action="store_true", help="do little, and write no results")
    return bool(asked.parse_args().quick)


def side(about: str | None) -> tuple[str, str, Path, int, Path]:
    """What sim.py asks of one side: its name, the case, the folder, the rounds, the output."""
    asked = parser(about)
    asked.add_argument("side", help="the name of the side in sim.py")
    asked.add_argument("case", help="head or adapter: what is trained")
    asked.add_argument("folder", type=Path, help="where sim.py laid the clients' texts")
    asked.add_argument("rounds", type=int, help="how many rounds to run")
    asked.add_argument("out", type=Path, help="the file to write the weights to")
    found = asked.parse_args()
    return found.side, found.case, found.folder, found.rounds, found.out
