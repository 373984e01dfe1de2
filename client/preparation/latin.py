"""Latin letters, and where a word of them begins and ends beside other scripts.

For Python a Chinese character is a letter like any other, so that there is no `\\b` inside 编号A12.
Patterns say `\\b` and `\\w` as usual and go through `bounded`, which knows Latin letters only.
"""

from __future__ import annotations

import re

# With and without marks, and marks that stand by themselves.
LETTERS = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff\u0300-\u036f"
_WORD = f"{LETTERS}0-9_"


def bounded(pattern: str) -> str:
    """`pattern` with `\\b` of Latin letters, digits and _, and with them for `\\w` in sets.

    A `\\b` before a group, a letter, a digit or a set begins a word, any other ends one.
    """
    begins = re.sub(r"\\b(?=\(\?:|[A-Za-z]|\\d|\[[^^])", f"(?<![{_WORD}])", pattern)
    return begins.replace(r"\b", f"(?![{_WORD}])").replace(r"\w", _WORD)
