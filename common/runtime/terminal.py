"""What reaches a terminal: text in which nothing is a control sequence.

Names, file names, column headers, cells and messages of other processes can hold any character.
Some of them move the cursor, set the window's title, write the clipboard (OSC 52), hide what
follows or turn the direction of writing. Every command prints by `echo` (tests/test_layout.py holds
the code to that), and rich prints by a console that does the same
(simulations/comparison/progress.py). The only control sequences are the colours that `echo` gives
to its own signs, on a terminal alone and never with NO_COLOR set (https://no-color.org).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, formats, surrogates, separators of lines
_COLOURS = {"✗": "red", "✓": "green", "!": "yellow", "next:": "cyan"}
_SIGN = re.compile(rf"^({'|'.join(_COLOURS)})(?= )", re.MULTILINE)
_JOINERS = "\u200c\u200d"  # formats that spelling needs and that change nothing else


def _unsafe(character: str) -> bool:
    return unicodedata.category(character) in _UNSAFE and character not in _JOINERS


def escaped(text: str, *, lines: bool = True) -> str:
    """`text` with each control and format character and each lone surrogate written as an escape.

    Args:
        text: Any string.
        lines: Whether line feeds and tabs stay. False for what has to stay on one line and to show
            every character that it has: what Python does not call printable is escaped, too.
    """
    if text.isascii() and text.isprintable():
        return text
    if not lines:
        return "".join(c if c.isprintable() else _escape(c) for c in text)
    return "".join(_escape(c) if _unsafe(c) and c not in "\n\t" else c for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def escaped_json(data: Any) -> str:
    """`data` as JSON, in one line, with the same characters as JSON's own escapes."""
    text = json.dumps(data, ensure_ascii=False)
    return "".join(json.dumps(c)[1:-1] if _unsafe(c) else c for c in text)


def echo(text: str, *, err: bool = False) -> None:
    """Print lines of text to standard output or, with `err`, to standard error. A sign at the start
    of a line has its colour; click removes that where the stream is no terminal."""
    shown = _SIGN.sub(lambda sign: click.style(sign[0], fg=_COLOURS[sign[0]]), escaped(text))
    click.echo(shown, err=err, color=False if os.environ.get("NO_COLOR") else None)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Show `what` on the last line of a terminal (standard error) until the body has ended, so that
    a command of many seconds says at once what it does. Elsewhere nothing is written."""
    if not sys.stderr.isatty():
        yield
        return
    line = escaped(what, lines=False)[: max(shutil.get_terminal_size().columns - 3, 0)]
    click.echo(f"{line} …", err=True, nl=False)
    try:
        yield
    finally:
        click.echo("\r\x1b[K", err=True, nl=False)  # to the line's start, and clear it
