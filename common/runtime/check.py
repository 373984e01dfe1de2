"""One row of a table of checks (`silotune doctor`, `silotune site check`), and the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from silotune.common.errors import counted

State = Literal["ok", "warning", "problem"]
SIGNS = {"ok": "✓", "warning": "!", "problem": "✗"}


@dataclass(frozen=True)
class Check:
    """One row. local: what only the owner may see, for the screen."""

    name: str
    state: State
    result: str
    fix: str = ""
    code: str = ""
    local: str = ""


def table(rows: Sequence[Check], *, local: bool = False, end: str = "") -> list[str]:
    """The lines of a table of checks, and how many problems and warnings there are.

    Args:
        rows: at least one.
        local: also what only the owner may see.
        end: what else to say of them, in sentences.
    """
    wide = max(len(row.name) for row in rows)
    lines = [f"  {'Check':<{wide}}  Result"]
    for row in rows:
        lines.append(f"{SIGNS[row.state]} {row.name:<{wide}}  {row.result}")
        if row.local and local:
            lines.append(f"  {'':<{wide}}  on your screen only: {row.local}")
        if row.fix and row.state != "ok":
            lines.append(f"  {'':<{wide}}  → {row.fix}")
    problems = sum(row.state == "problem" for row in rows)
    warnings = sum(row.state == "warning" for row in rows)
    lines.append(
        f"{'Not ready' if problems else 'Ready'}: {counted(problems, 'problem')}, "
        f"{counted(warnings, 'warning')}." + f" {end}" * bool(end)
    )
    return lines
