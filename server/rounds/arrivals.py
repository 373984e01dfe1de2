"""Which sites of a contract's roster have answered at the start of a run, and what is known of the
others.

A connected node does not say which site it is before its worker answers, so an answer that names no
site is counted by its code alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from silotune.common.errors import ErrorCode

SAY_SECONDS = 15.0  # between two events about the same missing sites


class Arrivals:
    """The sites that are connected, by node; the others with the last code they answered."""

    def __init__(self, roster: Collection[str]) -> None:
        self._roster = frozenset(roster)
        self.nodes: dict[int, str] = {}
        self._refused: dict[str, ErrorCode] = {}
        self._unnamed: dict[int, ErrorCode] = {}
        self._said: tuple[float, dict[str, Any]] | None = None

    @property
    def missing(self) -> list[str]:
        return sorted(self._roster - set(self.nodes.values()))

    def here(self, node: int, site: str) -> bool:
        """Note that a node is a site; False if it is not in the roster, or is here already."""
        self._unnamed.pop(node, None)
        if site not in self._roster or site in self.nodes.values():
            return False
        self._refused.pop(site, None)
        self.nodes[node] = site
        return True

    def failed(self, node: int, site: str | None, code: ErrorCode) -> None:
        """Note the code that a node answered, and the site it says it is (nothing proves it)."""
        if site in self._roster:
            self._refused[str(site)] = code
            self._unnamed.pop(node, None)
        else:
            self._unnamed[node] = code

    def absent(self, code: ErrorCode) -> dict[str, ErrorCode]:
        """Each missing site with the code it answered, or `code` if it answered nothing."""
        return {site: self._refused.get(site, code) for site in self.missing}

    def missing_in_words(self, code: ErrorCode) -> str:
        """All that is known of the missing sites; `code` is for one that answered nothing."""
        return in_words(self._facts() | {"refused": self.absent(code)})

    def _facts(self) -> dict[str, Any]:
        return {
            "sites": self.missing,
            "refused": {s: c for s, c in sorted(self._refused.items()) if s in self.missing},
            "nodes": dict(sorted(Counter(self._unnamed.values()).items())),
        }

    def to_say(self, passed: float) -> dict[str, Any] | None:
        """The facts of an event about the missing sites, if they have changed or it is time again.

        passed: seconds since the start.
        """
        facts = self._facts()
        if not facts["sites"]:
            return None
        if (
            self._said is not None
            and self._said[1] == facts
            and (passed < self._said[0] + SAY_SECONDS)
        ):
            return None
        self._said = passed, facts
        return facts


def in_words(facts: Mapping[str, Any]) -> str:
    """The missing sites of such facts: "hungary (E201), switzerland"."""
    refused = facts["refused"]
    named = [f"{site} ({refused[site]})" if site in refused else site for site in facts["sites"]]
    unnamed = [
        f"{count} connected node{'s' * (count > 1)} without a name ({code})"
        for code, count in facts["nodes"].items()
    ]
    return "; ".join([", ".join(named), *unnamed])
