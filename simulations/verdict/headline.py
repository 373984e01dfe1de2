"""The headline of a result: it follows from the checklist by a table, and from nothing else
(docs/explanation/verdict.md shows the table)."""

from __future__ import annotations

from collections.abc import Sequence

from silotune.simulations.verdict.checklist import Item
from silotune.simulations.verdict.differences import Status

# The first row that fits gives the word: an item, what it says, the word.
WORDS: tuple[tuple[str, Status, str], ...] = (
    ("budget", "no", "no guarantee"),
    ("constant", "no", "learns nothing"),
    ("constant", "cannot tell", "cannot tell whether it learns"),
    ("constant", "yes", "learns"),
)
# Behind the word: what other items say.
SHORT = {
    "constant": "better than a constant answer",
    "alone": "better than sites alone",
    "alone-own": "better than sites alone on their own rows",
    "head": "better than the DP head",
    "calibrated": "calibrated",
}


def word(items: Sequence[Item]) -> str:
    """The first word of the headline."""
    return _deciding(items)[1]


def headline(items: Sequence[Item]) -> str:
    """The word; what holds; what does not; what cannot be told."""
    decided, first = _deciding(items)
    parts = [first]
    named = [item for item in items if item.name in SHORT and item.name != decided]
    parts += [SHORT[item.name] for item in named if item.status == "yes"]
    parts += [f"not {SHORT[item.name]}" for item in named if item.status == "no"]
    if unknown := [SHORT[item.name] for item in named if item.status == "cannot tell"]:
        others = ", ".join(unknown[:-1]) + " or " if unknown[1:] else ""
        parts.append(f"cannot tell whether it is {others}{unknown[-1]}")
    return "; ".join(parts)


def _deciding(items: Sequence[Item]) -> tuple[str, str]:
    """The item that gives the word, and the word."""
    status = {item.name: item.status for item in items}
    return next((name, word) for name, holds, word in WORDS if status.get(name) == holds)
