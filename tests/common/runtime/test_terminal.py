"""No text of a file, a peer or a user reaches a terminal as a control sequence."""

from __future__ import annotations

import io
import json
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.live import Live
from rich.table import Table
from rich.text import Text

from silotune.common.cli import main
from silotune.common.cli.main import silotune
from silotune.common.errors import ContractError, DataError, SilotuneError, UsageError
from silotune.common.runtime.journal import Journal
from silotune.common.runtime.terminal import escaped, escaped_json
from silotune.simulations.comparison.progress import EscapingConsole

FUZZ = settings(deadline=None, max_examples=100, derandomize=True, database=None)
TITLE, CLIPBOARD = "a\x1b]0;PWNED\x07b", "\x1b]52;c;cm0gLXJmIC8K\x1b\\"
HOSTILE = [
    TITLE,
    CLIPBOARD,
    "\x9b2J",
    "\x1b[8mhidden",
    "a\rb",
    "\u202eexe.csv",
    "\u2066",
    "\ud800",
    "\udcff",
    "\U000e0041",
    "\x7f",
    "\0",
    "\u2028",
    "\b\b\b",
]
TEXT = st.text(st.characters(), max_size=40) | st.text(
    st.sampled_from("ab\x1b[]0;\x07\x9b\r\n\u202e\ud800"), max_size=12
)


def check_safe(text: str) -> None:
    """Apart from line feeds and tabs nothing here is a control, a format or a surrogate."""
    bad = [
        c
        for c in text
        if c not in "\n\t\u200c\u200d" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    ]
    assert not bad, bad


def examples(test: Callable[[str], None]) -> Callable[[str], None]:
    for text in HOSTILE:
        test = example(text)(test)
    return test


@FUZZ
@given(TEXT)
@examples
def test_an_escaped_text_is_safe_and_stays_as_it_is(text: str) -> None:
    for lines in (True, False):
        found = escaped(text, lines=lines)
        check_safe(found)
        found.encode()
        assert escaped(found, lines=lines) == found
        assert lines or "\n" not in found


@pytest.mark.parametrize(
    "text",
    [
        "ε ≤ 8 · ✓ ✗ → █░",
        "北京协和医院　内科",
        "Müller\u00a0GmbH",
        "می\u200cخواهم",
        "👩\u200d⚕️",
        "a\tb\nc",
        "\\x1b",
    ],
)
def test_what_people_write_is_shown_as_it_is(text: str) -> None:
    assert escaped(text) == text


@FUZZ
@given(st.recursive(TEXT, lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXT, x, max_size=3)))
@example(HOSTILE)
def test_json_output_is_one_safe_line_and_means_the_same(data: Any) -> None:
    text = escaped_json(data)
    check_safe(text)
    assert "\n" not in text
    assert json.loads(text) == data


def printed(monkeypatch: pytest.MonkeyPatch, error: Exception) -> tuple[str, str]:
    """What `silotune` prints where a command raises this."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    out, err = io.StringIO(), io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(silotune, "main", fail)
        patch.setattr(sys, "argv", ["silotune"])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        with pytest.raises(SystemExit):
            main.main()
    return out.getvalue(), err.getvalue()


@FUZZ
@given(TEXT)
@examples
def test_an_error_is_safe_and_its_sentence_one_line(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for error in (UsageError(text), DataError(text, local=text), ContractError([text, text])):
            out, err = printed(patch, error)
            check_safe(err)
            assert out == ""
            # No line of foreign text begins as one of ours does.
            own = [line for line in err.splitlines() if not line.startswith("  ")]
            assert len(own) == (2 if isinstance(error, ContractError) else 1)


@FUZZ
@given(TEXT)
@examples
def test_a_journal_is_safe_in_both_forms(text: str) -> None:
    for as_json in (False, True):
        lines: list[str] = []
        journal = Journal("supervisor", as_json=as_json, write=lines.append)
        journal.emit(text)
        journal.emit(text, source="relay")
        journal.pass_on(text, "worker")
        assert len(lines) == 3
        for line in lines:
            check_safe(line)
            assert "\n" not in line


def test_a_journals_text_has_no_colours() -> None:
    lines: list[str] = []
    Journal("supervisor", write=lines.append).emit("\x1b[92mINFO \x1b[0m: started", source="relay")
    assert lines == ["relay: INFO : started"]


@FUZZ
@given(TEXT)
@examples
def test_richs_tables_and_lines_are_safe(text: str) -> None:
    console = EscapingConsole(file=io.StringIO(), markup=False, width=60, soft_wrap=True)
    table = Table(box=None)
    table.add_column(text)
    table.add_row(text)
    for what in (text, table, Text(text)):
        console.print(what)
    file = console.file
    assert isinstance(file, io.StringIO)
    check_safe(file.getvalue())


def test_rich_keeps_its_own_styles_and_controls_on_a_terminal() -> None:
    file = io.StringIO()
    console = EscapingConsole(
        file=file,
        markup=False,
        highlight=False,
        force_terminal=True,
        color_system="standard",
        width=60,
        _environ={"TERM": "xterm"},
    )
    with Live(Text(TITLE), console=console, transient=True):
        console.print("[link=http://x]a[/link]", style="bold red")
    text = file.getvalue()
    assert "\x1b[1;31m[link=http://x]a[/link]" in text
    assert "\x1b]" not in text
    assert "\x1b[2K" in text  # the live line is taken away


@pytest.mark.parametrize("text", [TITLE, CLIPBOARD, "\x9b2J", "\u202e"])
def test_a_header_with_control_sequences_is_shown_escaped(
    text: str, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    """The same header is a column's name in an error, in a contract and on the owner's screen."""
    rows, contract = tmp_path / "rows.csv", tmp_path / "c.toml"
    rows.write_text(f"note,{text},status\nx,y,a\n")
    words = [
        "contract",
        "new",
        "--from",
        str(rows),
        "--out",
        str(contract),
        "--task",
        "classification",
        "--labels",
        "a,b",
        "--site",
        "a",
        "--site",
        "b",
        "--records",
        "9",
    ]
    code, out, err = run(*words, "--label", "absent", "--text", text)
    assert (code, out) == (1, "")
    check_safe(err)
    if "holds control characters" in err:  # such a header is not read any further
        return
    assert "on your screen only" in err
    code, out, err = run(*words, "--label", "status", "--text", text)
    assert code == 0, err
    check_safe(out)
    code, out, err = run("contract", "show", str(contract), "--json")
    assert json.loads(out)["input"]["column"] == text
    check_safe(out)


def test_a_wrong_option_or_path_is_shown_escaped(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    for words in (
        (f"--{TITLE}",),
        (TITLE,),
        ("contract", "show", TITLE),
        ("contract", "show", "x", TITLE),
        ("explain", CLIPBOARD),
    ):
        code, out, err = run(*words)
        assert code == 2, words
        check_safe(out + err)
        assert "\\x1b]" in err


def test_a_traceback_is_shown_escaped() -> None:
    hook, err = sys.excepthook, io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", err)
        try:
            raise SilotuneError(TITLE)
        except SilotuneError:
            main._show_traceback(*sys.exc_info())
    assert sys.excepthook is hook
    check_safe(err.getvalue())
    assert "a\\x1b]0;PWNED\\x07b" in err.getvalue()
