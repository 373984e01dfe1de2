"""The ledger on disk: whatever is changed, taken away or put back, it does not open."""

from __future__ import annotations

import contextlib
import hmac
import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
from pydantic import Field, TypeAdapter, ValidationError

from silotune.client.privacy import ledger as ledgers
from silotune.client.privacy import ledger_entries
from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import FILE, PrivacyLedger
from silotune.client.privacy.ledger_entries import (
    FIRST,
    Charged,
    Opened,
    Released,
    digest,
    verify_export,
)
from silotune.client.privacy.reply_store import ReplyStore
from silotune.common.errors import RefusalError, UsageError
from tests.client.privacy.ledger_home import (
    ALL_FACTS,
    FACTS,
    HASH,
    Home,
    charge,
    close,
    lineage_of,
    put,
)

# What a ledger is


def test_a_ledger_opens_with_the_entries_it_was_left_with(home: Home) -> None:
    ledger = home.open()
    kinds = [type(entry) for entry in ledger.entries]
    assert kinds == [Opened, Charged, Released, Charged, Charged]
    assert [entry.sequence for entry in ledger.entries] == list(range(1, 6))
    assert ledger.identity.name == "north"
    assert ledger.policy is None
    assert set(ledger.charges) == {("1" * 64, "r", 1, attempt) for attempt in (1, 2, 3)}
    assert ReplyStore(ledger).reply(ledger.releases[2]) == b"the reply"
    five, four = lineage_of(*range(5)), lineage_of(*range(4))
    found = ledger.record_sets()
    assert [(name, first.sequence, first.rows) for name, first in found.items()] == [
        (five.id, 2, 5),
        (four.id, 4, 4),
    ]
    for first, records in zip(found.values(), (five, four), strict=True):
        assert (first.basis, first.source) == ("basis", "rows.csv")
        assert ledger.record_set(first).id == records.id


def test_each_entry_names_the_digest_of_the_one_before(home: Home) -> None:
    previous = FIRST
    for (_, body, mac), entry in zip(home.rows(), home.open().entries, strict=True):
        assert entry.previous == previous
        previous = digest(body, mac)
    # Receipt and head name the last one: its body as well as its MAC.
    assert home.open().receipt().head == previous
    assert Keys.load(home.keys).read_head() == (5, previous)


def test_a_ledger_in_memory_leaves_nothing_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ledger = PrivacyLedger.in_memory("north")
    paid = charge(ledger, 1, lineage_of(1, 2))
    ReplyStore(ledger).release(paid, b"reply")
    assert ReplyStore(ledger).reply(ledger.releases[paid.sequence]) == b"reply"
    assert not list(tmp_path.iterdir())


def test_records_are_kept_once_and_named_by_their_first_charge(home: Home) -> None:
    ledger = home.open()
    charge(ledger, 9, lineage_of(*range(5)), source="renamed.csv")
    with home.tampering() as database:
        assert database.execute("SELECT count(*) FROM record_sets").fetchone() == (2,)
    first = ledger.record_sets()[lineage_of(*range(5)).id]
    assert (first.sequence, first.source) == (2, "rows.csv")
    assert home.open().record_sets() == ledger.record_sets()


def test_a_charge_is_one_entry_whether_its_records_are_new_or_not(home: Home) -> None:
    """Or the number in a receipt would tell which."""
    ledger = home.open()
    for number, records in enumerate((lineage_of(*range(5)), lineage_of(77), lineage_of(77)), 6):
        assert charge(ledger, number, records).sequence == number == len(ledger.entries)


def test_a_request_is_charged_once(home: Home) -> None:
    ledger = home.open()
    before = (list(ledger.entries), dict(ledger.charges), home.rows())
    for records in (lineage_of(*range(5)), lineage_of(77)):
        with pytest.raises(RefusalError, match="charged already") as refusal:
            charge(ledger, 1, records, request="3" * 64, noise_multiplier=99.0)
        assert refusal.value.code == "E202"
        assert (ledger.entries, ledger.charges, home.rows()) == before
    with home.tampering() as database:
        assert database.execute("SELECT count(*) FROM record_sets").fetchone() == (2,)
    for other in ({"contract": "9" * 64}, {"run": "s"}, {"round": 2}):
        charge(ledger, 1, lineage_of(77), **other)
    assert len(ledger.charges) == 6
    close(ledger)
    assert not home.refuses()


def test_two_processes_cannot_both_charge_a_request(home: Home) -> None:
    one, other = home.open(), home.open()
    paid = charge(one, 9, lineage_of(1))
    with pytest.raises(RefusalError, match="charged already"):
        charge(other, 9, lineage_of(2))
    assert other.charges[paid.key] == paid
    assert len(home.open().entries) == 6


def test_a_second_ledger_is_not_made_beside_the_first(home: Home, tmp_path: Path) -> None:
    held = Keys.load(home.keys)
    for folder in (home.state, tmp_path / "elsewhere"):
        with pytest.raises(RefusalError, match="already belong to a ledger") as refusal:
            PrivacyLedger.create(folder, held, "north")
        assert refusal.value.code == "E212"
    home.file.unlink()
    with pytest.raises(RefusalError, match="already belong"):
        PrivacyLedger.create(home.state, held, "north")


# Edits


def test_no_byte_of_any_body_or_mac_can_be_changed(home: Home) -> None:
    """Every byte of the first charge and of every MAC, and some of every other body."""
    rng = np.random.default_rng(0)
    rows = home.rows()
    with home.tampering() as database:
        for sequence, body, mac in rows:
            data = body.encode()
            places = range(len(data)) if sequence == 2 else rng.integers(len(data), size=25)
            for place in places:
                changed = bytearray(data)
                changed[place] ^= 1 << int(rng.integers(8))
                put(database, sequence, bytes(changed), mac)
                assert home.refuses(), (sequence, changed)
            for place in range(32):
                flipped = bytearray(mac)
                flipped[place] ^= 1 << int(rng.integers(8))
                put(database, sequence, data, bytes(flipped))
                assert home.refuses(), (sequence, flipped)
            put(database, sequence, data, mac)
            assert not home.refuses()


def test_no_field_of_any_entry_can_be_changed(home: Home) -> None:
    other: dict[type, Callable[[Any], Any]] = {
        str: lambda v: ("0" if v[0] != "0" else "1") + v[1:],
        int: lambda v: v + 1,
        float: lambda v: v / 2,
        list: lambda v: [*v, {"noise_multiplier": 1.0, "sampling_rate": 0.5, "steps": 1}],
        type(None): lambda _: "0" * 64,
    }
    rows = home.rows()
    with home.tampering() as database:
        for sequence, body, mac in rows:
            fields = json.loads(body)
            changed = [{**fields, k: other[type(v)](v)} for k, v in fields.items()]
            changed += [{k: v for k, v in fields.items() if k != name} for name in fields]
            changed += [{**fields, "more": 1}]
            for content in changed:
                put(database, sequence, json.dumps(content).encode(), mac)
                assert home.refuses(), content
            put(database, sequence, json.dumps(fields, indent=1).encode(), mac)
            assert home.refuses()
            put(database, sequence, body.encode(), mac)
            assert not home.refuses()


def test_no_entry_can_be_taken_out(home: Home) -> None:
    for sequence, body, mac in home.rows():
        with home.tampering() as database:
            database.execute("DELETE FROM entries WHERE sequence = ?", (sequence,))
            assert home.refuses()
            # Nor when the others close up the gap.
            database.execute(
                "UPDATE entries SET sequence = -sequence WHERE sequence > ?", (sequence,)
            )
            database.execute("UPDATE entries SET sequence = -sequence - 1 WHERE sequence < 0")
            assert home.refuses()
            database.execute(
                "UPDATE entries SET sequence = -sequence - 1 WHERE sequence >= ?", (sequence,)
            )
            database.execute("UPDATE entries SET sequence = -sequence WHERE sequence < 0")
            database.execute("INSERT INTO entries VALUES (?, ?, ?)", (sequence, body, mac))
        assert not home.refuses()


@pytest.mark.parametrize("last", [1, 2, 3, 5])
def test_the_last_entries_cannot_be_cut_off(home: Home, last: int) -> None:
    with home.tampering() as database:
        database.execute("DELETE FROM entries WHERE sequence > ?", (5 - last,))
    assert home.refuses()


@pytest.mark.parametrize(("one", "other"), [(4, 5), (2, 4), (2, 3), (1, 5)])
def test_entries_cannot_change_places(home: Home, one: int, other: int) -> None:
    rows = {sequence: (body, mac) for sequence, body, mac in home.rows()}
    with home.tampering() as database:
        put(database, one, rows[other][0].encode(), rows[other][1])
        put(database, other, rows[one][0].encode(), rows[one][1])
    assert home.refuses()


@pytest.mark.parametrize("sequence", [-1, 0, 6, 7])
@pytest.mark.parametrize("of", [2, 5])
def test_a_copy_of_an_entry_cannot_be_put_in(home: Home, sequence: int, of: int) -> None:
    _, body, mac = home.rows()[of - 1]
    with home.tampering() as database:
        database.execute("INSERT INTO entries VALUES (?, ?, ?)", (sequence, body, mac))
    # Before the first place nothing is read, so nothing is put in there either.
    assert home.refuses() == (sequence > 0)
    if sequence <= 0:
        assert len(home.open().entries) == 5


@pytest.mark.parametrize(
    "change",
    [
        "sequence = 50 WHERE sequence = 5",
        "sequence = 6 WHERE sequence = 5",
        "sequence = sequence + 100",
        "sequence = sequence + 1 WHERE sequence > 4",
        "sequence = sequence * 10 WHERE sequence > 3",
    ],
)
def test_the_number_of_an_entrys_row_cannot_be_changed(home: Home, change: str) -> None:
    ledger = home.open()
    with home.tampering() as database:
        database.execute(f"UPDATE entries SET {change}")
    assert home.refuses()
    with pytest.raises(RefusalError) as refusal:
        charge(ledger, 9, lineage_of(1))
    assert refusal.value.code == "E212"


def test_an_entry_of_another_site_cannot_be_put_in(home: Home, tmp_path: Path) -> None:
    _, body, mac = Home.begin(tmp_path / "other").rows()[4]
    with home.tampering() as database:
        put(database, 5, body.encode(), mac)
    assert home.refuses()


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE record_sets SET fingerprints = zeroblob(length(fingerprints))",
        "UPDATE record_sets SET fingerprints = zeroblob(0)",
        "UPDATE record_sets SET fingerprints = substr(fingerprints, 1, 16)",
        "UPDATE record_sets SET id = substr(id, 2) || 'x'",
        "DELETE FROM record_sets",
        "DELETE FROM record_sets WHERE rowid = 2",
        "DROP TABLE record_sets",
        "DROP TABLE entries",
        "DELETE FROM entries",
        "ALTER TABLE entries RENAME COLUMN mac TO mic",
        "UPDATE record_sets SET fingerprints = substr(fingerprints, 1, 15)",
    ],
)
def test_neither_fingerprints_nor_tables_can_be_changed(home: Home, change: str) -> None:
    with home.tampering() as database:
        database.execute(change)
    assert home.refuses()


@pytest.mark.parametrize(
    "change",
    [
        "mac = 'text'",
        "mac = NULL",
        "mac = 5",
        "body = CAST(body AS BLOB)",
        "body = NULL",
        "body = 1.5",
        "sequence = CAST(sequence AS TEXT)",
    ],
)
def test_a_value_of_another_type_is_refused(home: Home, change: str) -> None:
    """A table that takes any type is not what this wrote, and it is told as a damaged ledger."""
    loose = (
        "CREATE TABLE loose (sequence, body, mac); INSERT INTO loose SELECT * FROM entries;"
        "DROP TABLE entries; ALTER TABLE loose RENAME TO entries;"
    )
    with home.tampering() as database:
        database.executescript(f"{loose} UPDATE entries SET {change};")
    assert home.refuses()


@pytest.mark.parametrize("change", ["'text'", "NULL", "5", "CAST(fingerprints AS TEXT)"])
def test_fingerprints_of_another_type_are_refused(home: Home, change: str) -> None:
    with home.tampering() as database:
        database.executescript(
            "CREATE TABLE loose AS SELECT * FROM record_sets; DROP TABLE record_sets;"
            f"ALTER TABLE loose RENAME TO record_sets;"
            f" UPDATE record_sets SET fingerprints = {change};"
        )
    assert home.refuses()


def test_no_flipped_bit_of_the_file_gives_other_entries(home: Home, tmp_path: Path) -> None:
    """A disk's fault anywhere in the file: the ledger opens as it was, or not at all."""
    close(home.open())
    good, right = home.file.read_bytes(), home.open()
    close(right)
    rng = np.random.default_rng(1)
    opened, codes = 0, set()
    for _ in range(400):
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
        for path in home.state.glob(f"{FILE}*"):
            path.unlink()
        home.file.write_bytes(bad)
        try:
            ledger = home.open()
        except RefusalError as refusal:
            codes.add(refusal.code)
            continue
        assert ledger.entries == right.entries
        close(ledger)
        opened += 1
    assert 0 < opened < 400
    assert codes == {"E212"}


def test_a_damaged_schema_is_refused_with_a_code(home: Home) -> None:
    close(home.open())
    data = home.file.read_bytes()
    home.file.write_bytes(data.replace(b"CREATE TABLE entries", b"CREATE TABL\xc5 entries"))
    assert home.refuses()


# What is missing or put back


def test_a_deleted_ledger_is_refused(home: Home) -> None:
    home.file.unlink()
    assert home.refuses()
    assert not home.file.exists()


@pytest.mark.parametrize("content", [b"", b"no database", bytes(4096)])
def test_another_file_in_its_place_is_refused(home: Home, content: bytes) -> None:
    home.file.write_bytes(content)
    assert home.refuses()


def test_the_log_holds_the_last_entries_and_cannot_be_left_out(home: Home, tmp_path: Path) -> None:
    ledger = home.open()
    charge(ledger, 9, lineage_of(1))
    assert (home.state / f"{FILE}-wal").stat().st_size > 0
    whole, without = tmp_path / "whole", tmp_path / "without"
    for copy in (whole, without):
        shutil.copytree(home.folder, copy)
    close(ledger)
    (without / "state" / f"{FILE}-wal").unlink()
    assert Home(without).refuses()
    assert len(Home(whole).open().entries) == 6


@pytest.mark.parametrize("later", [1, 3])
def test_an_older_copy_put_back_is_refused(home: Home, tmp_path: Path, later: int) -> None:
    copy = tmp_path / "copy.sqlite"
    shutil.copy(home.file, copy)
    ledger = home.open()
    for i in range(later):
        charge(ledger, 10 + i, lineage_of(1))
    close(ledger)
    shutil.copy(copy, home.file)
    assert home.refuses()


def test_an_older_copy_put_in_place_of_an_open_ledger_is_refused(
    home: Home, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.sqlite"
    shutil.copy(home.file, copy)
    ledger = home.open()
    charge(ledger, 10, lineage_of(1))
    for path in home.state.glob(f"{FILE}*"):
        path.unlink()
    copy.rename(home.file)
    assert home.refuses()
    close(ledger)


HEADS: dict[str, Callable[[int, str], str | None]] = {
    "missing": lambda n, last: None,
    "empty": lambda n, last: "",
    "no number": lambda n, last: f"x {last}",
    "no digest": lambda n, last: f"{n}",
    "no hexadecimal": lambda n, last: f"{n} {last[:-1]}g",
    "a number ahead": lambda n, last: f"{n + 1} {last}",
    "a number behind": lambda n, last: f"{n - 1} {last}",
    "zero": lambda n, last: f"0 {last}",
    "minus": lambda n, last: f"-1 {last}",
    "another digest": lambda n, last: f"{n} {'0' * 64}",
    "a shorter digest": lambda n, last: f"{n} {last[:-2]}",
    "words": lambda n, last: f"{n} {last} é",
}


def head_mac(home: Home, content: str) -> str:
    """As client/privacy/keys.py makes it."""
    return hmac.digest(Keys.load(home.keys).derive("head mac"), content.encode(), "sha256").hex()


@pytest.mark.parametrize("how", HEADS)
def test_a_head_that_is_not_the_ledgers_is_refused(home: Home, how: str) -> None:
    """Also with the site's own MAC."""
    head = home.keys / "head"
    number, last, _ = head.read_text().split()
    content = HEADS[how](int(number), last)
    head.unlink()
    if content is not None:
        head.write_text(f"{content} {head_mac(home, content)}\n")
    with pytest.raises((RefusalError, UsageError)) as refusal:
        home.open()
    assert refusal.value.code == "E212"


def test_a_head_with_the_last_entrys_mac_is_refused(home: Home) -> None:
    """Not its digest: the MAC alone does not name the body."""
    content = f"5 {home.rows()[4][2].hex()}"
    (home.keys / "head").write_text(f"{content} {head_mac(home, content)}\n")
    assert home.refuses()


@pytest.mark.parametrize("mac", ["", "0" * 64, "é", "of the entry after it"])
def test_a_head_without_the_sites_mac_is_refused(home: Home, mac: str) -> None:
    """Who can write keys/ but not read the secret cannot move the head back to an older entry."""
    head = home.keys / "head"
    number, _, after = head.read_text().split()
    ledger = home.open()
    older = f"{int(number) - 1} {ledger._digests[int(number) - 1]}"
    close(ledger)
    head.write_text(f"{older} {after if mac.startswith('of') else mac}\n")
    with pytest.raises(UsageError, match="missing or damaged") as refusal:
        home.open()
    assert refusal.value.code == "E212"
    head.write_text(f"{older} {head_mac(home, older)}\n")
    close(home.open())  # by the MAC alone it was refused


def test_a_crash_between_commit_and_head_leaves_a_ledger_that_opens(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = home.open()
    with monkeypatch.context() as patch:
        patch.setattr(Keys, "write_head", lambda *_: (_ for _ in ()).throw(OSError("power cut")))
        with pytest.raises(RefusalError, match="entries up to 6 stand") as refusal:
            charge(ledger, 9, lineage_of(1))
    assert refusal.value.code == "E216"
    close(ledger)
    again = home.open()
    assert len(again.entries) == 6  # what was committed stands
    with again.writing():
        pass
    assert Keys.load(home.keys).read_head()[0] == 6


def test_the_keys_of_another_site_do_not_open_it(home: Home, tmp_path: Path) -> None:
    other = Home.begin(tmp_path / "other")
    with pytest.raises(RefusalError) as refusal:
        PrivacyLedger.open(home.state, Keys.load(other.keys))
    assert refusal.value.code == "E212"


@pytest.mark.parametrize("name", ["secret.key", "site.key", "owner.pub"])
def test_one_exchanged_key_does_not_open_it(home: Home, tmp_path: Path, name: str) -> None:
    other = Home.begin(tmp_path / "other", charges=0)
    shutil.copy(other.keys / name, home.keys / name)
    assert home.refuses()


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_only_the_site_itself_can_read_what_is_made(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        home = Home.begin(tmp_path / "site")
        ledger = home.open()
        charge(ledger, 9, lineage_of(1))  # so that the log is there
    finally:
        os.umask(before)
    found = [home.keys, home.state, *home.keys.rglob("*"), *home.state.rglob("*")]
    names = {path.name for path in found}
    assert {FILE, f"{FILE}-wal", "lock", "head", "secret.key", "site.key", "owner.key"} <= names
    for path in found:
        wanted = 0o700 if path.is_dir() else 0o600
        assert path.stat().st_mode & 0o777 == wanted, path
    assert not [name for name in names if name.endswith(".tmp")]


@pytest.mark.parametrize("name", ["site#1", "site?1", "site%41", "site?mode=ro", "Sité 1&a=b"])
def test_a_folder_of_any_name_holds_its_ledger(tmp_path: Path, name: str) -> None:
    home = Home.begin(tmp_path / name)
    assert home.file.stat().st_size > 0
    assert [path.name for path in tmp_path.iterdir()] == [name]
    charge(home.open(), 9, lineage_of(1))
    assert len(home.open().entries) == 6


# Writing


def test_a_failure_in_writing_leaves_nothing(home: Home) -> None:
    ledger = home.open()
    before = (list(ledger.entries), dict(ledger.charges), dict(ledger.releases), home.rows())

    def fails() -> None:
        with ledger.writing():
            paid = ledger.charge(lineage_of(7, 8), attempt=9, **FACTS)
            assert lineage_of(7, 8).id in ledger.record_sets()
            ledger.append(Released, charge=paid.sequence, reply=HASH)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert (ledger.entries, ledger.charges, ledger.releases, home.rows()) == before
    assert lineage_of(7, 8).id not in ledger.record_sets()
    with home.tampering() as database:
        assert database.execute("SELECT count(*) FROM record_sets").fetchone() == (2,)
    assert charge(ledger, 4, lineage_of(7, 8)).sequence == 6
    close(ledger)
    assert not home.refuses()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("noise_multiplier", math.nan),
        ("noise_multiplier", -1.0),
        ("noise_multiplier", math.inf),
        ("sampling_rate", math.nan),
        ("sampling_rate", 0.0),
        ("sampling_rate", 1.5),
        ("sampling_rate", -0.5),
        ("steps", 0),
        ("steps", -3),
        ("steps", 1.5),
        ("steps", 10**9),
        ("steps", True),
        ("order", math.nan),
        ("order", 1.0),
        ("order", -2.0),
        ("order", math.inf),
        ("unit", "patient"),
        ("round", 0),
        ("request", "x"),
        ("record_set", "../x"),
        ("run", "A B"),
        ("noise_multiplier", "1.0"),
        ("rows", -1),
        ("rows", 1.5),
        ("rows", True),
        ("basis", 5),
        ("source", None),
    ],
)
def test_a_charge_that_means_nothing_is_not_written(home: Home, field: str, value: object) -> None:
    ledger = home.open()
    with pytest.raises(ValidationError), ledger.writing():
        ledger.append(Charged, **{**ALL_FACTS, field: value})
    assert len(ledger.entries) == len(home.rows()) == 5
    close(ledger)
    assert not home.refuses()


def test_nothing_is_appended_outside_of_writing(home: Home) -> None:
    ledger = home.open()
    with pytest.raises(AssertionError):
        ledger.append(Charged, **ALL_FACTS)
    with pytest.raises(AssertionError):
        ledger.charge(lineage_of(*range(5)), attempt=9, **FACTS)
    assert len(ledger.entries) == len(home.rows()) == 5


def test_writing_within_writing_is_refused_and_waits_for_nobody(home: Home) -> None:
    ledger = home.open()
    with ledger.writing():
        paid = ledger.charge(lineage_of(1), attempt=8, **FACTS)
        with pytest.raises(RuntimeError, match="written by this thread already"):
            charge(ledger, 9, lineage_of(2))
        with pytest.raises(RuntimeError, match="written by this thread already"):
            ReplyStore(ledger).release(paid, b"must not leave yet")
    # The outer one is whole, and nothing of the inner ones is there.
    assert [entry.sequence for entry in home.open().charges.values()] == [2, 4, 5, 6]
    assert set(home.open().releases) == {2}

    def fails() -> None:
        with ledger.writing():
            ledger.charge(lineage_of(1), attempt=10, **FACTS)
            charge(ledger, 11, lineage_of(2))

    with pytest.raises(RuntimeError):
        fails()
    assert len(home.open().entries) == 6
    assert charge(ledger, 12, lineage_of(2)).sequence == 7


def test_other_threads_wait_until_a_ledger_is_written(home: Home) -> None:
    ledger = home.open()
    thread = threading.Thread(target=charge, args=(ledger, 9, lineage_of(2)))
    with ledger.writing():
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        ledger.charge(lineage_of(1), attempt=8, **FACTS)
    thread.join(60)
    assert [c.attempt for c in home.open().charges.values()] == [1, 2, 3, 8, 9]


def test_writing_sees_what_another_process_wrote(home: Home) -> None:
    one, other = home.open(), home.open()
    charge(one, 9, lineage_of(1))
    assert len(other.entries) == 5
    with other.writing():
        assert other.entries == one.entries
        assert other.charges.keys() == one.charges.keys()
    assert other.receipt() == one.receipt()


def test_an_open_ledger_stops_when_its_last_entry_is_gone_or_another(home: Home) -> None:
    for change in (
        "DELETE FROM entries WHERE sequence = 5",
        "UPDATE entries SET mac = zeroblob(32) WHERE sequence = 5",
    ):
        ledger, row = home.open(), home.rows()[4]
        with home.tampering() as database:
            database.execute(change)
            with pytest.raises(RefusalError, match="entry 5 is gone"):
                charge(ledger, 9, lineage_of(1))
            database.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", row)
        close(ledger)
    assert not home.refuses()


def test_an_open_ledger_stops_at_an_entry_without_the_sites_mac(home: Home) -> None:
    ledger = home.open()
    forged = ledger.entries[4].model_copy(update={"sequence": 6}).model_dump_json()
    with home.tampering() as database:
        database.execute("INSERT INTO entries VALUES (6, ?, ?)", (forged, bytes(32)))
    with pytest.raises(RefusalError, match="entry 6 does not carry this site's MAC"):
        charge(ledger, 9, lineage_of(1))
    assert len(ledger.entries) == 5


def test_a_trigger_that_swallows_entries_is_noticed(home: Home) -> None:
    """Somebody who can write to the file but has no key lets each new charge vanish."""
    with home.tampering() as database:
        database.execute(
            "CREATE TRIGGER t AFTER INSERT ON entries BEGIN "
            "DELETE FROM entries WHERE sequence = NEW.sequence; END"
        )
    ledger = home.open()
    paid = charge(ledger, 9, lineage_of(*range(5)))
    with pytest.raises(RefusalError) as refusal:
        ReplyStore(ledger).release(paid, b"must not leave")
    assert refusal.value.code == "E212"
    close(ledger)
    assert home.refuses()


APPENDING = """
import sys
from pathlib import Path
from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.records.record_ids import RecordSet

folder, run, times = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
ledger = PrivacyLedger.open(folder / "state", Keys.load(folder / "keys"))
print("ready", flush=True)
sys.stdin.readline()
for attempt in range(1, times + 1):
    with ledger.writing():
        ledger.charge(
            RecordSet.of_bytes("basis", bytes(16), 1), source="rows.csv", unit="record",
            contract="1" * 64, run=run, round=1, attempt=attempt, request="2" * 64, order=3.0,
            noise_multiplier=1.0, sampling_rate=0.5, steps=1,
        )
    print(attempt, flush=True)
"""


@contextlib.contextmanager
def appending(home: Home, run: str, times: int) -> Iterator[subprocess.Popen[str]]:
    """A process that appends `times` charges once a line is written to it."""
    command = [sys.executable, "-c", APPENDING, str(home.folder), run, str(times)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            yield child
        finally:
            child.kill()


def go(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("go\n")
    child.stdin.flush()


def test_two_processes_write_one_chain_and_lose_nothing(home: Home) -> None:
    with appending(home, "a", 40) as one, appending(home, "b", 40) as other:
        go(one)
        go(other)
        assert one.wait(60) == other.wait(60) == 0
    ledger = home.open()
    assert len(ledger.entries) == 85
    for run in "ab":
        found = [e for e in ledger.entries if isinstance(e, Charged) and e.run == run]
        assert [entry.attempt for entry in found] == list(range(1, 41))


def test_two_threads_with_a_ledger_each_write_one_chain(home: Home) -> None:
    def append(run: str) -> None:
        ledger = home.open()
        start.wait()
        for attempt in range(1, 26):
            charge(ledger, attempt, lineage_of(*range(5)), run=run)

    start = threading.Barrier(2)
    threads = [threading.Thread(target=append, args=(run,)) for run in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(home.open().entries) == 55


def test_what_was_committed_survives_a_kill_and_a_killed_writer_blocks_nobody(
    home: Home,
) -> None:
    with appending(home, "a", 100_000) as child:
        go(child)
        assert child.stdout is not None
        for wanted in range(1, 21):
            assert int(child.stdout.readline()) == wanted
        child.kill()
        child.wait()
    assert (home.state / f"{FILE}-wal").exists()
    shutil.copytree(home.folder, without := home.folder.with_name("without"))
    ledger = home.open()
    found = [entry.attempt for entry in ledger.charges.values() if entry.run == "a"]
    assert len(found) >= 20
    assert found == list(range(1, len(found) + 1))
    charge(ledger, 9, lineage_of(1))
    (without / "state" / f"{FILE}-wal").unlink()
    assert Home(without).refuses()


# Later versions


class ChargedLater(Charged):
    """What a later version may make of it."""

    group: str = "none"


def test_entries_written_today_stay_readable_when_a_field_is_added(
    home: Home, monkeypatch: pytest.MonkeyPatch, exported: tuple[list[str], str]
) -> None:
    later = Opened | ledger_entries.Adopted | ChargedLater | Released
    monkeypatch.setattr(
        ledger_entries, "_READ", TypeAdapter(Annotated[later, Field(discriminator="state")])
    )
    ledger = home.open()
    assert [entry.group for entry in ledger.entries if isinstance(entry, ChargedLater)] == (
        ["none"] * 3
    )
    charge(ledger, 9, lineage_of(1))
    close(ledger)
    assert len(home.open().entries) == 6
    assert len(verify_export(*exported)) == 5


def test_a_field_this_version_does_not_know_is_refused(home: Home) -> None:
    """Not passed over: what it means might be that more was spent."""
    ledger = home.open()
    known = {**ALL_FACTS, "record_set": lineage_of(*range(5)).id, "rows": 5}
    with ledger.writing():
        ledger.append(ChargedLater, group="g", **known)
    close(ledger)
    with pytest.raises(RefusalError, match="entry 6 is not in a ledger's form") as refusal:
        home.open()
    assert refusal.value.code == "E212"


# No room, or in use


def entries_on_disk(home: Home) -> int:
    ledger = home.open()
    count = len(ledger.entries)
    close(ledger)
    return count


def test_a_full_disk_is_not_damage(home: Home) -> None:
    """SQLite's own error, from its own limit on pages: nothing is spent, and there is nothing to
    restore; with room the same charge is written."""
    before = entries_on_disk(home)
    ledger = home.open()
    (pages,) = ledger._database.execute("PRAGMA page_count").fetchone()
    ledger._database.execute(f"PRAGMA max_page_count = {pages}")
    many = lineage_of(*range(1, 2000))
    with pytest.raises(RefusalError, match=r"The disk of this site is full: .* has no room") as no:
        charge(ledger, 20, many)
    assert no.value.code == "E216"
    assert "nothing was spent" in str(no.value)
    assert "estore" not in str(no.value)
    ledger._database.execute("PRAGMA max_page_count = 100000")
    assert charge(ledger, 20, many).sequence == before + 1
    close(ledger)
    assert entries_on_disk(home) == before + 1


@pytest.mark.parametrize("opened_before", [True, False])
def test_a_database_that_another_program_holds_is_not_damage(
    home: Home, monkeypatch: pytest.MonkeyPatch, opened_before: bool
) -> None:
    """A database browser or a backup with a lock; once it is gone everything is as before."""
    monkeypatch.setattr(ledgers, "BUSY_SECONDS", 0.1)
    before = entries_on_disk(home)
    ledger = home.open() if opened_before else None
    other = sqlite3.connect(home.file, isolation_level=None)
    if not opened_before:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    use = home.open if ledger is None else partial(charge, ledger, 20, lineage_of(1))
    with pytest.raises(RefusalError, match="Another program has held the ledger") as busy:
        use()
    assert busy.value.code == "E216"
    assert "Nothing was lost and nothing was spent" in str(busy.value)
    other.execute("ROLLBACK")
    other.close()
    if ledger is not None:
        close(ledger)
    assert entries_on_disk(home) == before


@pytest.mark.parametrize(
    ("code", "free", "meant"),
    [
        (sqlite3.SQLITE_FULL, 1 << 30, "E216"),
        (sqlite3.SQLITE_BUSY, 1 << 30, "E216"),
        (sqlite3.SQLITE_LOCKED, 1 << 30, "E216"),
        (sqlite3.SQLITE_IOERR_WRITE, 1 << 30, "E216"),
        (sqlite3.SQLITE_IOERR_SHMSIZE, 0, "E216"),
        (sqlite3.SQLITE_CORRUPT, 1 << 30, "E212"),
        (sqlite3.SQLITE_NOTADB, 1 << 30, "E212"),
        (sqlite3.SQLITE_CANTOPEN, 1 << 30, "E212"),
        (sqlite3.SQLITE_CORRUPT, 0, "E212"),
    ],
)
def test_what_an_error_of_the_database_means(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, free: int, meant: str
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    error = sqlite3.OperationalError("words")
    error.sqlite_errorcode = code
    found = ledgers._refusal(error, tmp_path, "It is spent.")
    assert found.code == meant
    no_room = code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR_SHMSIZE and not free)
    assert ("is full" in str(found)) == no_room
    assert ("estore" in str(found)) == (meant == "E212")
    assert ("It is spent." in str(found)) == (meant == "E216")


def test_a_number_written_as_text_is_not_in_the_ledgers_form(tmp_path: Path) -> None:
    ledger = PrivacyLedger.create(tmp_path / "state", Keys.create(tmp_path / "keys"), "north")
    close(ledger)
    with sqlite3.connect(tmp_path / "state" / FILE) as connection:
        ((body,),) = connection.execute("SELECT body FROM entries WHERE sequence = 1").fetchall()
    connection.close()
    assert ledger_entries.chained(body, 0, FIRST).sequence == 1
    with pytest.raises(RefusalError, match="entry 1 is not in a ledger's form"):
        ledger_entries.chained(body.replace('"sequence":1', '"sequence":"1"'), 0, FIRST)
