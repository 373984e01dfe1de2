"""An export of the ledger: whatever is changed in it, it does not verify."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger_entries import (
    verify_export,
)
from silotune.common.errors import RefusalError
from silotune.common.protocol.messages import Receipt
from tests.client.privacy.ledger_home import (
    HASH,
    Home,
)


def test_an_export_verifies(home: Home, exported: tuple[list[str], str]) -> None:
    lines, public = exported
    assert verify_export(lines, public) == verify_export(lines) == home.open().entries


@pytest.mark.parametrize("public", ["0" * 64, "x", "00" * 31])
def test_an_export_is_of_the_key_the_auditor_knows(
    exported: tuple[list[str], str], public: str
) -> None:
    with pytest.raises(RefusalError) as refusal:
        verify_export(exported[0], public)
    assert refusal.value.code == "E212"


def exports_refused(lines: list[str], public: str) -> bool:
    try:
        verify_export(lines, public)
    except RefusalError as refusal:
        if refusal.code != "E212":
            raise
        return True
    return False


def test_no_line_of_an_export_can_be_taken_out_doubled_or_moved(
    exported: tuple[list[str], str],
) -> None:
    lines, public = exported
    for i in range(len(lines)):
        assert exports_refused(lines[:i] + lines[i + 1 :], public)
        assert exports_refused([*lines[: i + 1], *lines[i:]], public)
        assert exports_refused([*lines[:i], "", *lines[i:]], public)
        if i:
            assert exports_refused([*lines[:i], "[1, 2]", *lines[i + 1 :]], public)
        for k in range(i):
            moved = list(lines)
            moved[i], moved[k] = lines[k], lines[i]
            assert exports_refused(moved, public)
    for wrong in ([], lines[:1], [lines[0], lines[-1]], ["{}", "{}"]):
        assert exports_refused(wrong, public)


@pytest.mark.parametrize(
    "first",
    [
        '{"silotune": "ledger 2"}',
        "[1, 2]",
        "{}",
        "null",
        '"KEY"',
        '{"public": "KEY"}',
        '{"silotune": "ledger 1"}',
        '{"silotune": "ledger 2", "public": "KEY"}',
        '{"silotune": "ledger 1", "public": "KEY", "more": 1}',
        '{"silotune": "ledger 1", "public": ["KEY"]}',
    ],
)
def test_the_first_line_of_an_export_says_what_it_is(
    exported: tuple[list[str], str], first: str
) -> None:
    lines, public = exported
    first = first.replace("KEY", public)
    assert exports_refused([first, *lines[1:]], public)
    with pytest.raises(RefusalError):
        verify_export([first, *lines[1:]])


def test_no_field_of_an_exported_entry_can_be_changed(exported: tuple[list[str], str]) -> None:
    lines, public = exported
    for i in range(1, len(lines) - 1):
        row = json.loads(lines[i])
        body = json.loads(row["body"])
        changed = [{**row, "mac": "00" * 32}]
        for name, value in body.items():
            other = value + 1 if isinstance(value, int | float) else HASH
            changed.append({**row, "body": json.dumps({**body, name: other})})
        for content in changed:
            edited = [*lines[:i], json.dumps(content), *lines[i + 1 :]]
            assert exports_refused(edited, public), content


def test_the_last_exported_entry_cannot_be_made_cheaper(exported: tuple[list[str], str]) -> None:
    """No other follows on it; the receipt signs its body as well as its MAC."""
    lines, public = exported
    row = json.loads(lines[-2])
    row["body"] = json.dumps({**json.loads(row["body"]), "steps": 1, "noise_multiplier": 99.0})
    assert exports_refused([*lines[:-2], json.dumps(row), lines[-1]], public)


def test_the_receipt_of_an_export_cannot_be_changed(exported: tuple[list[str], str]) -> None:
    lines, public = exported
    right = json.loads(lines[-1])
    for name, value in (("sequence", 4), ("head", "0" * 64), ("signature", "0" * 128)):
        assert exports_refused([*lines[:-1], json.dumps({**right, name: value})], public)


def test_the_key_an_export_names_is_the_one_it_was_opened_with(
    exported: tuple[list[str], str], tmp_path: Path
) -> None:
    """Somebody signs the last entry with a key of their own and names that in the first line."""
    lines, _ = exported
    own = Keys.create(tmp_path / "own")
    receipt = json.loads(lines[-1])
    statement = Receipt.statement("north", receipt["sequence"], receipt["head"])
    receipt["signature"] = own.signing.sign(statement).hex()
    first = json.dumps({**json.loads(lines[0]), "public": own.public})
    edited = [first, *lines[1:-1], json.dumps(receipt)]
    assert exports_refused(edited, own.public)
    with pytest.raises(RefusalError):
        verify_export(edited)
