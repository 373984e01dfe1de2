"""A record is the same one through every tool of ours: what it has spent follows it.

The commands are run from end to end: spend on one form of the records, make another form of
them, and ask `site check` and a worker what is left.
"""

from __future__ import annotations

import csv
import json
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from silotune.client.preparation.cleaning import Prepared, origin, prepare
from silotune.client.privacy import ledger as ledgers
from silotune.client.privacy.budget import Budget, overlaps, rows_of_one_record, untraceable
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.records import record_identity, record_ids
from silotune.client.records.canonical_values import value
from silotune.client.records.record_identity import Links, components
from silotune.client.records.record_ids import RecordSet, of_table
from silotune.client.records.written_forms import READ_AS
from silotune.client.site import policy as policies
from silotune.client.site.folder import SiteFolder
from silotune.client.site.preparation_rules import Prepare
from silotune.client.worker.worker import Worker
from silotune.common.cli.main import silotune
from silotune.common.contract.contract import Contract
from silotune.common.data import records
from silotune.common.data.records import Table
from silotune.common.data.text_decoding import Reading
from silotune.common.errors import DataError, RefusalError
from silotune.common.protocol import messages
from silotune.common.protocol.messages import Message, Train, Update
from tests import tiny

ROWS = 104
NAMES = ["Müller", "Smith", "O’Brien", "Garcia"]
LIMIT = 8.0


# Components ------------------------------------------------------------------------------------


def file_of(codes: Sequence[int], decodings: Sequence[Sequence[int]] = ()) -> RecordSet:
    """A record_set whose records have these codes."""
    order = sorted(codes, key=lambda code: code.to_bytes(8, "little"))
    prints = b"".join(code.to_bytes(8, "little") + bytes(8) for code in order)
    own = dict(zip(codes, decodings, strict=True)) if decodings else {}
    counts = np.array([len(own.get(code, ())) for code in order], np.uint32)
    flat = np.array([r for code in order for r in own.get(code, ())], np.uint64)
    return RecordSet.of_bytes("b", prints, len(codes), "", counts.tobytes(), flat.tobytes())


def links_of(stars: dict[int, list[int]]) -> Links:
    return Links(
        np.array(list(stars), np.uint64),
        np.array([len(s) for s in stars.values()], np.uint32),
        np.array([node for star in stars.values() for node in star], np.uint64),
    )


def partition(edges: Sequence[tuple[int, int]]) -> dict[int, int]:
    """An independent way to components: merge until nothing changes."""
    label = {node: node for edge in edges for node in edge}
    changed = True
    while changed:
        changed = False
        for one, other in edges:
            low = min(label[one], label[other])
            changed |= label[one] != low or label[other] != low
            label[one] = label[other] = low
    return label


codes = st.integers(1, 12)
files = st.lists(
    st.dictionaries(codes, st.lists(codes, max_size=2), min_size=1, max_size=5),
    min_size=1,
    max_size=3,
)


@given(
    files,
    st.lists(
        st.dictionaries(codes, st.lists(codes, min_size=1, max_size=3), max_size=3), max_size=2
    ),
)
def test_records_are_one_where_a_path_joins_them(
    found: list[dict[int, list[int]]], stars: list[dict[int, list[int]]]
) -> None:
    record_sets = [file_of(list(f), list(f.values())) for f in found]
    edges = [(code, other) for f in found for code, own in f.items() for other in [code, *own]]
    edges += [(code, other) for star in stars for code, nodes in star.items() for other in nodes]
    label = partition(edges)
    numbers = components(record_sets, [links_of(star) for star in stars])
    pairs = [
        (label[int(code)], int(number))
        for file, own in zip(record_sets, numbers, strict=True)
        for code, number in zip(file.codes, own, strict=True)
    ]
    for one in pairs:
        for other in pairs:
            assert (one[0] == other[0]) == (one[1] == other[1])


@given(st.dictionaries(codes, st.lists(codes, max_size=4), max_size=5))
def test_links_are_read_back_from_their_bytes(stars: dict[int, list[int]]) -> None:
    found = links_of(stars)
    again = Links.of_content(found.content())
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    with pytest.raises(ValueError, match="cut short"):
        Links.of_content(found.content() + b"\0" * 8)
    with pytest.raises(ValueError, match="cut short"):
        Links.of_content(found.content()[:-8])


# Any chain of our tools ------------------------------------------------------------------------

SECRET = bytes(range(32))
letters = st.text("ab ÄÖéñ€“’ß", min_size=1, max_size=6)
rows_of_text = st.lists(
    st.tuples(letters, letters, st.sampled_from(["ill", "well"])), min_size=1, max_size=5
)


HEADER = ["note", "place", "outcome"]


def table_of(rows: Sequence[Sequence[str]], encoding: str = "utf-8") -> Table:
    numbered = [(line, list(row)) for line, row in enumerate(rows, start=2)]
    return Table("notes.csv", HEADER, numbered, encoding=encoding)


def text_table(rows: Sequence[Sequence[str]]) -> Table:
    """Of the columns that the contract of a classification names."""
    return Table(
        "notes.csv", ["text", "label"], [(at, list(row)) for at, row in enumerate(rows, 2)]
    )


def declared(table: Table, written: str, read: str) -> Table:
    """The table as it is read if its file was written in one encoding and declared as another."""
    rows = [
        (line, [cell.encode(written).decode(read) for cell in cells]) for line, cells in table.rows
    ]
    return Table(table.source, table.header, rows, encoding=read)


def saved(table: Table, taken_for: str) -> Table:
    """The table after a program took its UTF-8 for another encoding and saved it as Unicode; bytes
    for which that has nothing it keeps as control characters."""
    rows = [
        (
            line,
            [
                "".join(
                    bytes([byte]).decode(taken_for, "ignore") or chr(byte) for byte in cell.encode()
                )
                for cell in cells
            ],
        )
        for line, cells in table.rows
    ]
    return Table(table.source, table.header, rows)


def prepared_by(change: Callable[[str], str], raw: Table, columns: Sequence[int]) -> Prepared:
    rows = [
        (line, [change(cell) if i in columns else cell for i, cell in enumerate(cells)])
        for line, cells in raw.rows
    ]
    cleaned = Table(raw.source, raw.header, rows)
    return Prepared(raw, cleaned, [], {}, cleaned, range(len(rows)))


CHANGES: dict[str, Callable[[str], str]] = {
    "redact": lambda cell: cell.replace("a", "<PERSON>"),
    "mask": lambda cell: "*" * len(cell),
    "missing": lambda _: "",
    "trim": str.strip,
    "nothing": lambda cell: cell,
}
steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("prepare"), st.sampled_from(sorted(CHANGES)), st.sampled_from([(0,), (0, 1)])
        ),
        st.tuples(
            st.just("declare"),
            st.sampled_from(["cp1252", "utf-8"]),
            st.sampled_from(["latin-1", "cp1252", "cp850", "koi8-r", "mac-roman"]),
        ),
        st.tuples(st.just("save"), st.sampled_from(["latin-1", "cp1252"]), st.none()),
    ),
    max_size=4,
)


def charge(ledger: PrivacyLedger, found: RecordSet) -> None:
    with ledger.writing():
        ledger.charge(
            found,
            source="notes.csv",
            contract="0" * 64,
            run="r",
            round=1,
            attempt=len(ledger.charges) + 1,
            request="0" * 64,
            unit="record",
            noise_multiplier=1.0,
            sampling_rate=0.5,
            steps=1,
            order=4.0,
        )


def all_charged(ledger: PrivacyLedger, table: Table, key: Sequence[str] = ()) -> bool:
    found = of_table(table, key, ledger.identity.fingerprint_key)
    (overlap,) = overlaps(ledger, found).values()
    return bool(overlap.all())


@settings(max_examples=150, deadline=None)
@given(rows_of_text, steps, st.data())
def test_every_form_of_a_charged_table_is_charged(
    rows: list[tuple[str, str, str]], chain: list[tuple[Any, ...]], data: st.DataObject
) -> None:
    """A wrong declaration is of a file as it was written, so it ends at the next preparation. Text
    that was saved misread is not misread once more: what was misread twice is not known."""
    ledger = PrivacyLedger.in_memory("north")
    forms, true = [table_of(rows)], table_of(rows)
    misread: list[Table] = []
    for kind, what, where in chain:
        if kind != "prepare" and any(true is one for one in misread):
            continue
        if kind == "save":
            forms.append(saved(true, what))
            misread.append(forms[-1])
        elif kind == "declare":
            try:
                forms.append(declared(true, what, where))
            except UnicodeError:
                continue
        else:
            raw = data.draw(st.sampled_from(forms))
            done = prepared_by(CHANGES[what], raw, where)
            made = origin(done, (), ledger.identity.fingerprint_key)
            ledger.link(made, source="notes.csv", rows=len(rows))
            forms.append(done.table)
            true = done.table
            if any(raw is one for one in misread):
                misread.append(true)
    first = data.draw(st.integers(0, len(forms) - 1))
    charge(ledger, of_table(forms[first], (), ledger.identity.fingerprint_key))
    for form in forms:
        assert all_charged(ledger, form)


def misdecodings() -> list[tuple[str, str, str]]:
    """A text, the encoding its file has, and another one in which the bytes are text, too."""
    found = []
    for true in ("utf-8", "cp1252", "gb18030", "shift_jis"):
        text = "熱がある" if true in ("gb18030", "shift_jis") else "Ärger “über” 5 € – naïve"
        for wrong in READ_AS:
            try:
                text.encode(true).decode(wrong).encode(wrong)
            except UnicodeError:
                continue
            found.append((text, true, wrong))
    return found


@pytest.mark.parametrize(("text", "true", "wrong"), misdecodings())
def test_a_wrong_encoding_then_the_right_one_is_no_fresh_budget(
    text: str, true: str, wrong: str
) -> None:
    """And the other way round, and then by way of a format that has Unicode only."""
    right = table_of([[text, "x", "ill"]], true)
    misread = declared(right, true, wrong)
    unicode = table_of([[text, "x", "ill"]])
    for one in (right, misread, unicode):
        for other in (right, misread, unicode):
            ledger = PrivacyLedger.in_memory("north")
            charge(ledger, of_table(one, (), ledger.identity.fingerprint_key))
            assert all_charged(ledger, other)


def test_text_that_a_tool_decoded_wrongly_and_saved_as_unicode_is_known() -> None:
    for text in ("Ärger", "“quoted” – 5 €"):
        right = table_of([[text, "x", "ill"]])
        for written, read in (("utf-8", "latin-1"), ("utf-8", "cp1252"), ("cp1252", "latin-1")):
            # A program that takes text for Windows-1252 keeps the bytes that it has nothing for.
            wrong = [
                [
                    "".join(
                        bytes([byte]).decode(read, "ignore") or chr(byte)
                        for byte in text.encode(written)
                    ),
                    "x",
                    "ill",
                ]
            ]
            for one, other in ((right, table_of(wrong)), (table_of(wrong), right)):
                ledger = PrivacyLedger.in_memory("north")
                charge(ledger, of_table(one, (), ledger.identity.fingerprint_key))
                assert all_charged(ledger, other)


SAME_CELL = {
    "NUL padding": ("Ärger", "Ärger\0\0"),
    "control characters": ("note", "\x02no\x1bte\x7f"),
    "quotes": ('O\'Brien "said"', "O’Brien “said”"),
    "dashes": ("A-B", "A–B"),
    "ligature": ("fi", "ﬁ"),
    "fullwidth": ("ABC 5", "ＡＢＣ　５"),
    **{
        f"missing as {word}": ("", word)
        for word in (
            "NULL",
            "NA",
            "None",
            "N/A",
            "nan",
            "#N/A",
            "<NA>",
            " null ",
            "NaT",
            "\\N",
        )
    },
}


@pytest.mark.parametrize("how", SAME_CELL)
def test_ways_to_write_a_cell_are_no_fresh_budget(how: str) -> None:
    one, other = SAME_CELL[how]
    ledger = PrivacyLedger.in_memory("north")
    charge(ledger, of_table(table_of([[one, "x", "ill"]]), (), ledger.identity.fingerprint_key))
    assert all_charged(ledger, table_of([[other, "x", "ill"]]))
    assert not all_charged(ledger, table_of([["another note", "x", "ill"]]))


def test_other_records_are_not_charged_by_a_link() -> None:
    """Links join what is one record, and no more."""
    ledger = PrivacyLedger.in_memory("north")
    raw = table_of([["a b", "x", "ill"], ["b é", "y", "well"]])
    done = prepared_by(CHANGES["redact"], raw, (0,))
    made = origin(done, (), ledger.identity.fingerprint_key)
    ledger.link(made, source="notes.csv", rows=2)
    charge(ledger, of_table(table_of([["a b", "x", "ill"]]), (), ledger.identity.fingerprint_key))
    found = of_table(done.table, (), ledger.identity.fingerprint_key)
    (overlap,) = overlaps(ledger, found).values()
    assert int(overlap.sum()) == 1


def test_where_a_preparation_changed_a_column_of_another_key_all_count_as_charged() -> None:
    """Prepared without a key, then known by a column that it changed: nothing can be compared."""
    ledger = PrivacyLedger.in_memory("north")
    raw = table_of([["a b", "x", "ill"], ["b a", "y", "well"]])
    charge(ledger, of_table(raw, ["note"], ledger.identity.fingerprint_key))
    done = prepared_by(CHANGES["redact"], raw, (0,))
    made = origin(done, (), ledger.identity.fingerprint_key)
    assert made.changed == ("note",)
    ledger.link(made, source="notes.csv", rows=2)
    assert all_charged(ledger, done.table, ["note"])
    # A key that it did not change is as good as before.
    other = PrivacyLedger.in_memory("north")
    charge(other, of_table(raw, ["place"], other.identity.fingerprint_key))
    other.link(origin(done, (), other.identity.fingerprint_key), source="notes.csv", rows=2)
    assert not all_charged(other, table_of([["a b", "z", "well"]]), ["place"])
    assert all_charged(other, table_of([["<PERSON>", "x", "well"]]), ["place"])


def view(table: Table, columns: dict[str, str]) -> Table:
    """Columns of a table by other names: SELECT old AS new."""
    places = [table.header.index(old) for old in columns.values()]
    rows = [(line, [cells[i] for i in places]) for line, cells in table.rows]
    return Table(table.source, list(columns), rows, encoding=table.encoding)


NAMES_SINCE = ["note", "place", "outcome", "text", "ward", "label"]


@settings(max_examples=150, deadline=None)
@given(
    rows=rows_of_text,
    changes=st.lists(
        st.tuples(st.sampled_from(sorted(CHANGES)), st.sampled_from([(0,), (1,), (0, 1)])),
        min_size=1,
        max_size=2,
    ),
    names=st.permutations(NAMES_SINCE),
    chosen=st.lists(st.sampled_from(HEADER), min_size=1, unique=True),
    keys=st.integers(0, 3),
    prepared_by_key=st.booleans(),
    raw_first=st.booleans(),
)
@example(
    [("a b", "x", "ill")], [("redact", (0,))], [*NAMES_SINCE[3:], *HEADER], HEADER, 1, True, True
)
@example(
    [("a b", "x", "ill")],
    [("redact", (0,))],
    ["place", *HEADER],
    ["note", "outcome"],
    0,
    False,
    True,
)
def test_columns_that_are_selected_or_renamed_since_are_no_fresh_budget(
    rows: list[tuple[str, str, str]],
    changes: list[tuple[str, tuple[int, ...]]],
    names: list[str],
    chosen: list[str],
    keys: int,
    prepared_by_key: bool,
    raw_first: bool,
) -> None:
    """Each record and what was made of it, by fewer columns, other names and another key. Columns
    that exchanged their names and nothing else are not covered."""
    columns = dict(zip(names, chosen, strict=False))
    assume(set(columns) != set(HEADER) or list(columns) == chosen)
    ledger = PrivacyLedger.in_memory("north")
    key = [chosen[0]] if prepared_by_key else []
    forms = [table_of(rows)]
    for what, where in changes:
        done = prepared_by(CHANGES[what], forms[-1], where)
        ledger.link(
            origin(done, key, ledger.identity.fingerprint_key), source="notes.csv", rows=len(rows)
        )
        forms.append(done.table)
    since = list(columns)[:keys]
    views = [view(form, columns) for form in (forms[0], forms[-1])]
    first, second = views if raw_first else views[::-1]
    charge(ledger, of_table(first, since, ledger.identity.fingerprint_key))
    assert all_charged(ledger, second, since)


def test_other_people_are_not_charged_by_a_preparation_of_other_columns() -> None:
    """Only those with a cell that it changed."""
    ledger = PrivacyLedger.in_memory("north")
    january = table_of([["a b", "x", "ill"], ["b c", "y", "well"]])
    charge(ledger, of_table(january, (), ledger.identity.fingerprint_key))
    letters = Table("letters.csv", ["letter", "city"], [(2, ["an a", "x"]), (3, ["b", "z"])])
    done = prepared_by(CHANGES["redact"], letters, (0,))
    ledger.link(origin(done, (), ledger.identity.fingerprint_key), source="letters.csv", rows=2)
    february = table_of([["c d", "x", "ill"], ["d", "y", "ill"], ["an a", "x", "ill"]])
    found = of_table(february, (), ledger.identity.fingerprint_key)
    (overlap,) = overlaps(ledger, found).values()
    assert int(overlap.sum()) == 1
    assert untraceable(ledger, found).tolist() == overlap.tolist()
    assert all_charged(ledger, january)


def test_what_was_prepared_from_a_wrong_encoding_counts_as_charged_under_a_key() -> None:
    """Prepared without a key: no cell was changed, but what is written are wrong characters."""
    ledger = PrivacyLedger.in_memory("north")
    true = table_of([["Ärger", "x", "ill"], ["Öl", "y", "well"]])
    done = prepared_by(CHANGES["nothing"], declared(true, "utf-8", "cp850"), (0,))
    made = origin(done, (), ledger.identity.fingerprint_key)
    assert made.changed == ("note",)
    ledger.link(made, source="notes.csv", rows=2)
    charge(ledger, of_table(true, ["note"], ledger.identity.fingerprint_key))
    assert all_charged(ledger, done.table, ["note"])


def test_a_preparation_before_any_charge_costs_nothing() -> None:
    ledger = PrivacyLedger.in_memory("north")
    raw = table_of([["a b", "x", "ill"]])
    done = prepared_by(CHANGES["redact"], raw, (0,))
    made = origin(done, (), ledger.identity.fingerprint_key)
    ledger.link(made, source="notes.csv", rows=1)
    found = of_table(done.table, (), ledger.identity.fingerprint_key)
    assert overlaps(ledger, found) == {}
    assert Budget(ledger, found, "record").spent(1e-4).epsilon == 0


def test_a_row_that_was_dropped_as_a_copy_is_the_row_that_stays(table_contract: Contract) -> None:
    """Both raw rows stand behind the prepared one."""
    ledger = PrivacyLedger.in_memory("north")
    header = ["age", "smoker", "outcome"]
    rows = [["71", "often", "1"], ["71", "never", "1"], ["20", "yes", "0"]]
    raw = Table("a.csv", header, list(enumerate(rows, start=2)))
    rules = Prepare(duplicates="drop", outside="missing")
    done = prepare(raw, table_contract, rules, ())
    assert [row for _, row in done.table.rows] == [["71", "", "1"], ["20", "yes", "0"]]
    made = origin(done, (), ledger.identity.fingerprint_key)
    ledger.link(made, source="a.csv", rows=2)
    charge(
        ledger,
        of_table(Table("a.csv", header, [(2, rows[1])]), (), ledger.identity.fingerprint_key),
    )
    (overlap,) = overlaps(
        ledger, of_table(done.table, (), ledger.identity.fingerprint_key)
    ).values()
    assert int(overlap.sum()) in (1, 2)
    assert all_charged(ledger, Table("a.csv", header, [(2, rows[0])]))


@pytest.mark.parametrize("word", ["Carrà", "douleur…", "à côté", "là”", "Å"])
@pytest.mark.parametrize(
    ("written", "read"), [("utf-8", "latin-1"), ("utf-8", "cp1252"), ("cp1252", "latin-1")]
)
def test_trimming_takes_no_part_of_a_letter(
    contract: Contract, word: str, written: str, read: str
) -> None:
    """Its last byte can read as white space that is not ASCII's. What was misread was saved as
    Unicode, and then prepared; a key is named later."""
    raw = text_table([[f" {word} ", "a"], ["fever", "b"]])
    misread = saved(raw, read) if written == "utf-8" else declared(raw, written, read)
    misread = text_table([cells for _, cells in misread.rows])
    done = prepare(misread, contract, Prepare(), ())
    ledger = PrivacyLedger.in_memory("north")
    ledger.link(origin(done, (), ledger.identity.fingerprint_key), source="notes.csv", rows=2)
    charge(ledger, of_table(raw, ["text"], ledger.identity.fingerprint_key))
    assert all_charged(ledger, done.table, ["text"])


def test_a_cell_with_other_decodings_is_a_changed_cell() -> None:
    """Even if its value is the same one."""
    raw = table_of([["Carr\u00c3\u00a0", "x", "ill"]])
    done = prepared_by(str.strip, raw, (0,))
    assert value(raw.rows[0][1][0]) == value(done.table.rows[0][1][0])
    assert origin(done, (), SECRET).changed == ("note",)
    spaced = prepared_by(str.strip, table_of([[" Carrà\t", "x", "ill"]]), (0,))
    assert origin(spaced, (), SECRET).changed == ()


# The ledger keeps the links --------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM links",
        "UPDATE links SET content = x'00'",
        "DROP TABLE links",
        "UPDATE links SET digest = lower(hex(randomblob(32)))",
    ],
)
def test_links_that_are_gone_or_changed_are_refused(
    site: SiteFolder, run: Callable[..., str], statement: str
) -> None:
    run("prepare")
    run("sign")
    _, ledger, keys = site.open()
    ledger._database.execute(statement)
    ledger._database.close()
    with pytest.raises(RefusalError) as refusal:
        PrivacyLedger.open(site.state, keys)
    assert refusal.value.code == "E212"


def test_rows_that_the_ledger_does_not_know_are_never_on_disk(
    site: SiteFolder, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entry comes first: where it cannot be written, no prepared file is."""

    def fails(*_: object, **__: object) -> None:
        raise RefusalError("full", code="E216")

    monkeypatch.setattr(PrivacyLedger, "link", fails)
    assert run("prepare", fails=True) == "E216"
    assert not (site.folder / "prepared" / "records.parquet").exists()


def test_a_file_with_too_many_rows_for_the_ledger_is_refused_and_the_ledger_stays_whole(
    site: SiteFolder, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite's limit is lowered here; a charge has the same one."""
    connect = ledgers._connect

    def limited(path: Path) -> sqlite3.Connection:
        database = connect(path)
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 3_000)
        return database

    rule(site, "redact")
    run("sign")
    with monkeypatch.context() as patched:
        patched.setattr(ledgers, "_connect", limited)
        done = CliRunner().invoke(silotune, ["site", "prepare", "contract.json"])
        assert getattr(done.exception, "code", "") == "E217"
        assert "has too many rows" in str(done.exception)
        assert "Split the file" in str(done.exception)
        _, ledger, _ = site.open()
        many = file_of(range(1, 500))
        with pytest.raises(RefusalError, match="too many rows") as refusal:
            charge(ledger, many)
        assert refusal.value.code == "E217"
        assert (ledger.preparations, ledger.charges) == ([], {})
        ledger._database.close()
    assert not (site.folder / "prepared" / "records.parquet").exists()
    run("prepare")
    assert len(site.open()[1].preparations) == 1


def test_every_preparation_is_one_entry_whatever_it_changed(
    site: SiteFolder, run: Callable[..., str]
) -> None:
    """A receipt shows the number of entries: it must not depend on the records."""
    for action in ("redact", "mask", "none"):
        rule(site, action)
        run("prepare")
    run("prepare")
    run("sign")
    _, ledger, _ = site.open()
    assert len(ledger.preparations) == 4
    assert ledger.preparations[-1].changed == ()
    assert ledger.preparations[0].changed == ("text",)
    assert ledger.preparations[0].rows == ROWS


# From end to end -------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """run("prepare"): `silotune site prepare contract.json`. With fails: the code of its error."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str, fails: bool = False) -> str:
        contract = ["contract.json"] if words[0] in ("prepare", "check") else []
        done = CliRunner().invoke(silotune, ["site", *words, *contract])
        assert (done.exit_code != 0) == fails, done.output + repr(done.exception)
        return str(getattr(done.exception, "code", "")) if fails else done.output

    return call


@pytest.fixture
def contract() -> Contract:
    return contract_of("classification")


def contract_of(task: str) -> Contract:
    return tiny.contract_of(
        task,
        "bert",
        privacy={"clip_norm": 0.1, "expected_units": 16.0, "epsilon": LIMIT, "delta": 1e-4},
        phases=[
            {
                "trains": "head+adapter",
                "rounds": 2,
                "sampling_rate": 1.0,
                "head_lr": 1.0,
                "adapter_lr": 1.0,
            }
        ],
    )


@pytest.fixture
def site(tmp_path: Path, run: Callable[..., str], contract: Contract) -> SiteFolder:
    """A site with notes that each hold a name, an address and a letter beyond ASCII."""
    found = site_of(tmp_path, run, contract, "records.csv")
    write_csv(tmp_path / "records.csv", raw_rows())
    return found


def site_of(folder: Path, run: Callable[..., str], contract: Contract, data: str) -> SiteFolder:
    (folder / "contract.json").write_text(contract.model_dump_json(exclude_none=True))
    run("init", "--name", "north", "--folder", ".", "--data", data)
    found = SiteFolder(folder / "site.toml")
    text = found.config.read_text()
    for old, new in (
        ("contracts = []", f'contracts = ["{contract.hash}"]'),
        ("[model]", f'[model]\nfolder = "{tiny.folder_of("bert")}"'),
        ("min_sites = 2", "min_sites = 1"),
        ("min_quorum = 2", "min_quorum = 1"),
        ('tasks = ["classification"]', f'tasks = ["{contract.task.kind}"]'),
    ):
        assert old in text
        text = text.replace(old, new)
    found.config.write_text(text)
    return found


def raw_rows(outside: str = "") -> list[list[str]]:
    return [
        [f"Mr {NAMES[i % 4]} of naïve pain, {i}, mail p{i}@clinic.example", "abc"[i % 3], outside]
        for i in range(ROWS)
    ]


def write_csv(path: Path, rows: Sequence[Sequence[str]], encoding: str = "utf-8") -> None:
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows([["text", "label", "ward"], *rows])
    path.chmod(0o600)


def rule(site: SiteFolder, action: str) -> None:
    """[prepare.deidentify] with this action, or without any."""
    text = site.config.read_text().split("\n[prepare.deidentify]")[0]
    if action != "none":
        text += f'\n[prepare.deidentify]\naction = "{action}"\n'
    site.config.write_text(text)


def set_key(site: SiteFolder, key: str) -> None:
    """data.key: this column, or none."""
    lines = [line for line in site.config.read_text().splitlines() if not line.startswith("key = ")]
    lines.insert(lines.index("[data]") + 1, f"key = {json.dumps([key] if key else [])}")
    site.config.write_text("\n".join(lines) + "\n")


def use(site: SiteFolder, run: Callable[..., str], file: str, encoding: str = "utf-8") -> None:
    lines = site.config.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("file = "))
    lines[at] = f'file = "{file}"\nencoding = "{encoding}"'
    lines = [
        line for i, line in enumerate(lines) if not (line.startswith("encoding = ") and i != at)
    ]
    site.config.write_text("\n".join(lines) + "\n")
    run("sign")


def spend_all(site: SiteFolder, contract: Contract) -> None:
    policy, ledger, _ = site.open()
    worker = Worker(policy, contract, ledger)
    for number in range(1, contract.rounds + 1):
        assert isinstance(answer(worker, number, "first"), Update)
    ledger._database.close()


def answer(worker: Worker, number: int, run_id: str) -> Any:
    header = Train(contract=worker.contract.hash, run=run_id, round=number)
    wire = worker.handle(messages.pack(Message(header, worker.model.initial_arrays())))
    return messages.unpack(wire).header


def budget_row() -> dict[str, str]:
    """What `site check` says of the budget."""
    return check_row("privacy budget")


def check_row(name: str) -> dict[str, str]:
    """A row of `site check`."""
    done = CliRunner().invoke(silotune, ["site", "check", "contract.json", "--json"])
    found: list[dict[str, str]] = json.loads(done.output)["checks"]
    return next(row for row in found if row["name"] == name)


def nothing_is_left(site: SiteFolder, run: Callable[..., str], contract: Contract) -> None:
    """`site check` says so, and a worker does not start."""
    budget = budget_row()
    assert (budget["state"], budget["code"]) == ("problem", "E210")
    assert "spent before 9.75" in budget["result"]  # by RDP, as another plan
    policy, ledger, _ = site.open()
    table = records.named_by(contract, policy.data.table())
    found = of_table(table, policy.data.key, ledger.identity.fingerprint_key)
    for overlap in overlaps(ledger, found).values():
        assert overlap.all()  # every record, not only one that no rule touched


ACTIONS = ["redact", "mask", "pseudonymise", "none"]


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("raw_first", [True, False])
def test_prepared_records_have_spent_what_the_raw_ones_did(
    site: SiteFolder, run: Callable[..., str], contract: Contract, action: str, raw_first: bool
) -> None:
    """And the raw ones what the prepared ones did."""
    rule(site, action)
    forms = ["records.csv", "prepared/records.parquet"]
    first, second = forms if raw_first else forms[::-1]
    run("prepare")
    use(site, run, first)
    spend_all(site, contract)
    use(site, run, second)
    nothing_is_left(site, run, contract)


def test_raw_records_that_were_charged_before_they_were_prepared(
    site: SiteFolder, run: Callable[..., str], contract: Contract
) -> None:
    """The way of the fault: spend all, prepare, follow `next:`."""
    run("sign")
    spend_all(site, contract)
    rule(site, "redact")
    said = run("prepare")
    assert f"{ROWS} charged before" in said
    assert (
        f">{ROWS}<small>of them, in this site"
        in (site.folder / "prepared" / "report.html").read_text()
    )
    use(site, run, "prepared/records.parquet")
    nothing_is_left(site, run, contract)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("utf-8", "utf-8"),
        ("cp1252", "cp1252"),
        ("cp1252", "latin-1"),
        ("utf-8", "cp1252"),
    ],
)
def test_prepared_records_saved_as_csv_are_known(
    site: SiteFolder, run: Callable[..., str], contract: Contract, written: str, read: str
) -> None:
    """A file beside them would be lost with that."""
    run("sign")
    spend_all(site, contract)
    rule(site, "redact")
    run("prepare")
    prepared = parquet.read_table(site.folder / "prepared" / "records.parquet").to_pylist()
    write_csv(site.folder / "export.csv", [list(row.values()) for row in prepared][::-1], written)
    use(site, run, "export.csv", read)
    nothing_is_left(site, run, contract)


def mixed(site: SiteFolder, forms: int = ROWS) -> None:
    """both.csv: the raw rows, and the first `forms` of the prepared ones."""
    prepared = parquet.read_table(site.folder / "prepared" / "records.parquet").to_pylist()
    write_csv(
        site.folder / "both.csv",
        [*raw_rows(), *(list(row.values()) for row in prepared[:forms])],
    )


def test_a_raw_row_and_the_row_that_was_made_of_it_are_refused_in_one_file(
    site: SiteFolder,
    run: Callable[..., str],
    contract: Contract,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They would be charged as one record and clipped as two: twice the sensitivity."""
    rule(site, "redact")
    run("prepare")
    mixed(site)
    use(site, run, "both.csv")
    policy, ledger, _ = site.open()
    assert policy.data.duplicate_records == "refuse"
    with pytest.raises(DataError, match="one record in different forms") as error:
        Worker(policy, contract, ledger)
    assert error.value.code == "E307"
    assert "rows 2, 106; rows 3, 107; rows 4, 108; and 101 more" in error.value.local
    assert "106" not in str(error.value)
    row = check_row("records")
    assert (row["state"], row["code"]) == ("problem", "E307")
    assert "keep one row of each record" in row["fix"]
    # Without the refusal one record would take two places in what is trained on.
    monkeypatch.setattr(policies, "rows_of_one_record", lambda *_: [])
    worker = Worker(policy, contract, ledger)
    found = components([worker.record_set], ledger.links(worker.record_set.basis))[0]
    assert np.bincount(found).max() == 2
    assert len(worker.data.units) == 2 * ROWS


def test_the_remedies_of_rows_in_two_forms_work(
    site: SiteFolder, run: Callable[..., str], contract: Contract
) -> None:
    rule(site, "redact")
    run("prepare")
    mixed(site, forms=1)
    lines = (site.folder / "both.csv").read_text(encoding="utf-8").splitlines()
    use(site, run, "both.csv")
    policy, ledger, _ = site.open()
    with pytest.raises(DataError, match="different forms") as error:
        Worker(policy, contract, ledger)
    assert error.value.local == "The same record each: rows 2, 106."
    (site.folder / "both.csv").write_text("\n".join(lines[:1] + lines[2:]) + "\n")
    Worker(policy, contract, ledger)
    text = "\n".join(lines) + "\n"
    (site.folder / "both.csv").write_text(text)
    keep = policy.data.model_copy(update={"duplicate_records": "keep"})
    Worker(policy.model_copy(update={"data": keep}), contract, ledger)


def test_rows_in_two_ways_of_writing_are_refused_in_one_file() -> None:
    ledger = PrivacyLedger.in_memory("north")
    table = table_of([["0.1", "x", "ill"], ["7", "y", "ill"], ["0.10000000149011612", "x", "ill"]])
    found = of_table(table, (), ledger.identity.fingerprint_key)
    assert found.repeated == 0
    assert rows_of_one_record(ledger, found) == [[2, 4]]
    assert rows_of_one_record(None, found) == [[2, 4]]


def test_an_entity_whose_key_was_changed_is_refused_beside_itself() -> None:
    """With the raw key in some rows and the prepared one in others it would be two entities, also
    where several rows have each."""
    ledger = PrivacyLedger.in_memory("north")
    raw = table_of([["anna", "x", "ill"], ["bob", "y", "well"], ["anna", "z", "ill"]])
    done = prepared_by(CHANGES["redact"], raw, (0,))
    made = origin(done, ["note"], ledger.identity.fingerprint_key)
    ledger.link(made, source="notes.csv", rows=3)
    both = Table("both.csv", HEADER, [*raw.rows, *((9, cells) for _, cells in done.table.rows[:1])])
    found = of_table(both, ["note"], ledger.identity.fingerprint_key)
    assert rows_of_one_record(ledger, found) == [[2, 9]]
    alone = of_table(raw, ["note"], ledger.identity.fingerprint_key)
    assert rows_of_one_record(ledger, alone) == []


def test_records_prepared_twice_are_known(
    site: SiteFolder, run: Callable[..., str], contract: Contract
) -> None:
    """Raw, then redacted, then masked; the first and the last never met."""
    run("sign")
    spend_all(site, contract)
    rule(site, "redact")
    run("prepare")
    use(site, run, "prepared/records.parquet")
    rule(site, "mask")
    run("prepare", "--out", "again")
    use(site, run, "again/records.parquet")
    nothing_is_left(site, run, contract)


def write_as(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Notes and labels in the format of the file's suffix; in CoNLL each word with a tag."""
    frame = pd.DataFrame(rows, columns=["text", "label", "ward"])
    if path.suffix == ".conll":
        tags = ("O", "B-sign")
        path.write_text(
            "\n\n".join(
                "\n".join(f"{word}\t{tags[at == 0]}" for at, word in enumerate(text.split()))
                for text in frame["text"]
            ),
            encoding="utf-8",
        )
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".xlsx":
        frame.to_excel(path, index=False)
    elif path.suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False, sep="\t" if ".tsv" in path.name else ",")
    path.chmod(0o600)


@pytest.mark.parametrize(
    "suffix",
    [
        ".csv",
        ".csv.gz",
        ".tsv",
        ".jsonl",
        ".parquet",
        ".xlsx",
        ".conll",
    ],
)
def test_records_of_any_kind_of_file_are_known_when_they_are_prepared_and_prepared_anew(
    suffix: str, tmp_path: Path, run: Callable[..., str]
) -> None:
    """Spend on the prepared rows; then on rows that were prepared by another rule."""
    contract = contract_of("tokens" if suffix == ".conll" else "classification")
    found = site_of(tmp_path, run, contract, f"records{suffix}")
    write_as(tmp_path / f"records{suffix}", raw_rows("w"))
    run("prepare")
    use(found, run, "prepared/records.parquet")
    spend_all(found, contract)
    use(found, run, f"records{suffix}")
    nothing_is_left(found, run, contract)
    rule(found, "mask")
    run("prepare", "--out", "again")
    use(found, run, "again/records.parquet")
    nothing_is_left(found, run, contract)


def test_columns_renamed_after_a_preparation_are_not_new_records() -> None:
    """By hand, where no link can follow: without a key all records count as charged."""
    ledger = PrivacyLedger.in_memory("north")
    raw = table_of([["a b", "x", "ill"], ["b c", "y", "well"]])
    done = prepared_by(CHANGES["redact"], raw, (0,))
    ledger.link(origin(done, (), ledger.identity.fingerprint_key), source="notes.csv", rows=2)
    renamed = [
        Table(table.source, ["text", "ward", "label"], table.rows) for table in (raw, done.table)
    ]
    charge(ledger, of_table(renamed[1], (), ledger.identity.fingerprint_key))
    assert all_charged(ledger, renamed[0])


@pytest.mark.parametrize("key", ["text", ""])
def test_a_changed_column_by_another_name_is_no_fresh_budget(
    tmp_path: Path, run: Callable[..., str], contract: Contract, key: str
) -> None:
    """Prepared as 'note' for one contract, then read as 'text' for another, which was the name of
    a column that was not changed. With a key it is the key that has another name."""
    of_note = tiny.contract_of("classification", "bert", input={"kind": "text", "column": "note"})
    found = site_of(tmp_path, run, contract, "records.csv")
    (tmp_path / "contract.json").write_text(of_note.model_dump_json(exclude_none=True))
    frame = pd.DataFrame(raw_rows(), columns=["note", "label", "text"])
    frame["text"] = [f"short {i % 9}" for i in range(ROWS)]
    if key:
        frame = frame.drop(columns="text")
    frame.to_csv(tmp_path / "records.csv", index=False)
    (tmp_path / "records.csv").chmod(0o600)
    set_key(found, "note" if key else "")
    rule(found, "pseudonymise")
    run("prepare")
    (tmp_path / "contract.json").write_text(contract.model_dump_json(exclude_none=True))
    prepared = pd.read_parquet(tmp_path / "prepared" / "records.parquet")
    for name, form in (("raw.csv", frame), ("made.csv", prepared)):
        renamed = form[["note", "label"]].rename(columns={"note": "text"})
        renamed.to_csv(tmp_path / name, index=False)
        (tmp_path / name).chmod(0o600)
    set_key(found, key)
    use(found, run, "raw.csv")
    spend_all(found, contract)
    use(found, run, "made.csv")
    nothing_is_left(found, run, contract)


def test_a_preparation_of_another_table_is_told_and_charges_only_equal_cells(
    tmp_path: Path, run: Callable[..., str], contract: Contract
) -> None:
    """`site prepare` and `site check` say which table it was, and what to do."""
    of_letters = tiny.contract_of(
        "classification", "bert", input={"kind": "text", "column": "letter"}
    )
    found = site_of(tmp_path, run, contract, "january.csv")
    for name, start in (("january.csv", 0), ("february.csv", 1000), ("march.csv", 2000)):
        write_csv(tmp_path / name, [[f"pain {start + i}", "abc"[i % 3], "w"] for i in range(ROWS)])
    letters = pd.DataFrame(raw_rows("w"), columns=["letter", "label", "city"])
    letters.loc[0, "letter"] = "Mr Smith"
    letters.to_csv(tmp_path / "letters.csv", index=False)
    (tmp_path / "letters.csv").chmod(0o600)
    run("sign")
    use(found, run, "january.csv")
    spend_all(found, contract)
    use(found, run, "letters.csv")
    rule(found, "redact")
    (tmp_path / "contract.json").write_text(of_letters.model_dump_json(exclude_none=True))
    said = run("prepare")
    assert "cells of column 'letter' change here" in said
    assert "(january.csv): new records of theirs that have a cell equal" in said
    assert "name data.key in " in said
    (tmp_path / "contract.json").write_text(contract.model_dump_json(exclude_none=True))
    use(found, run, "february.csv")
    assert budget_row()["state"] == "ok"
    rows = [[f"pain {2000 + i}", "abc"[i % 3], "w"] for i in range(ROWS)]
    write_csv(tmp_path / "march.csv", [*rows, ["Mr Smith", "a", "w"]])
    use(found, run, "march.csv")
    row = budget_row()
    assert row["code"] == "E210"
    assert "a cell that `silotune site prepare` changed in letters.csv" in row["result"]
    assert "data.key" in row["fix"]


@pytest.mark.parametrize("read", [name for name in READ_AS if name != "utf-8"])
@pytest.mark.parametrize("word", ["à", "Å", "là", "città", "п", "ú", "naïve", "Müller", "ö"])
def test_words_of_conll_read_in_a_wrong_encoding_keep_their_bytes(
    word: str, read: str, tmp_path: Path
) -> None:
    """In many encodings a byte of a letter reads as white space that is not ASCII's."""
    path = tmp_path / "records.conll"
    path.write_text(f"douleur\tO\n{word}\tO\ndroite\tB-sign\n", encoding="utf-8")
    try:
        wrong = records.table(path, Reading(encoding=read))
    except DataError:  # it is no text, or a word has white space in it: nothing is charged
        return
    ledger = PrivacyLedger.in_memory("north")
    charge(ledger, of_table(wrong, (), ledger.identity.fingerprint_key))
    assert all_charged(ledger, records.table(path, Reading(encoding="utf-8")))


def test_records_prepared_from_a_wrong_encoding_are_known_in_the_right_one(
    site: SiteFolder, run: Callable[..., str], contract: Contract
) -> None:
    """`site prepare` writes Unicode, so the bytes that were read wrongly are in the ledger only."""
    write_csv(site.folder / "records.csv", raw_rows(), "utf-8")
    use(site, run, "records.csv", "cp850")
    run("prepare")
    use(site, run, "prepared/records.parquet")
    spend_all(site, contract)
    use(site, run, "records.csv", "utf-8")
    nothing_is_left(site, run, contract)


@pytest.mark.parametrize("raw_first", [True, False])
def test_values_set_to_missing_are_known(
    tmp_path: Path, run: Callable[..., str], table_contract: Contract, raw_first: bool
) -> None:
    """`outside = "missing"` touches every row here."""
    (tmp_path / "contract.json").write_text(table_contract.model_dump_json(exclude_none=True))
    run("init", "--name", "north", "--folder", ".", "--data", "records.csv")
    found = SiteFolder(tmp_path / "site.toml")
    rng = np.random.default_rng(0)
    rows = [[f"{i / 7:.3f}", "often", str(int(rng.integers(2)))] for i in range(ROWS)]
    lines = [["age", "smoker", "outcome"], *rows]
    (tmp_path / "records.csv").write_text("\n".join(map(",".join, lines)) + "\n")
    (tmp_path / "records.csv").chmod(0o600)
    text = (
        found.config.read_text()
        .replace("contracts = []", f'contracts = ["{table_contract.hash}"]')
        .replace("[model]", '[prepare]\noutside = "missing"\n\n[model]')
    )
    found.config.write_text(text)
    run("prepare")
    # The raw rows do not fit the contract: they are charged as the ledger would be by another one.
    run("sign")
    _, ledger, _ = found.open()
    forms = [records.table(tmp_path / name) for name in ("records.csv", "prepared/records.parquet")]
    first, second = forms if raw_first else forms[::-1]
    charge(ledger, of_table(first, (), ledger.identity.fingerprint_key))
    assert all_charged(ledger, second)


def test_a_preparation_counts_for_a_budget_that_was_read_before() -> None:
    """A worker keeps its Budget: it must see links that another process writes meanwhile."""
    ledger = PrivacyLedger.in_memory("north")
    raw = table_of([["a b", "x", "ill"]])
    done = prepared_by(CHANGES["redact"], raw, (0,))
    charge(ledger, of_table(raw, (), ledger.identity.fingerprint_key))
    budget = Budget(ledger, of_table(done.table, (), ledger.identity.fingerprint_key), "record")
    assert budget.spent(1e-4).epsilon == 0
    made = origin(done, (), ledger.identity.fingerprint_key)
    ledger.link(made, source="notes.csv", rows=1)
    assert budget.spent(1e-4).epsilon > 0


def test_a_lineage_of_a_wrong_encoding_is_stored_with_its_decodings() -> None:
    ledger = PrivacyLedger.in_memory("north")
    right = table_of([["Ärger", "x", "ill"], ["plain", "x", "ill"]])
    found = of_table(declared(right, "utf-8", "cp850"), (), ledger.identity.fingerprint_key)
    assert sorted(found.decodings.counts.tolist())[0] == 0
    assert max(found.decodings.counts) > 3
    charge(ledger, found)
    (entry,) = ledger.record_sets().values()
    again = ledger.record_set(entry)
    assert again.id == found.id
    assert again.columns == found.columns
    assert again.names == {"note", "place", "outcome"}
    assert np.array_equal(again.decodings.codes, found.decodings.codes)
    assert record_ids.basis_of(again.columns) == again.basis
    assert record_identity.components([again], [])[0].shape == (2,)
