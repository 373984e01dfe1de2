"""Every source gives the same records; what cannot be read is one sentence without a value."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from silotune.common.contract.contract import Contract
from silotune.common.data import file_source, records, text_table
from silotune.common.data.records import Table
from silotune.common.data.text_decoding import Reading
from silotune.common.data.text_table import Builder, Rows
from silotune.common.errors import DataError
from silotune.common.formats.cell_values import NotTextError, cell

CANARY = "Kanarienvogel77"
OPTION = "--{key} {value}"
FUZZ = settings(deadline=None, max_examples=60, derandomize=True, database=None)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


@pytest.fixture
def refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Callable[..., DataError]:
    """refused(name, content, encoding="utf-8") -> the error; no value of a record is anywhere but
    in its `local`."""

    def read(name: str, content: str | bytes, encoding: str = "utf-8") -> DataError:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with caplog.at_level(logging.DEBUG), pytest.raises(DataError) as caught:
            records.table(path, Reading.of(encoding, None, OPTION))
        error = caught.value
        out = capfd.readouterr()
        for shown in (
            str(error),
            repr(error),
            out.out,
            out.err,
            caplog.text,
            "".join(traceback.format_exception(error)),
        ):
            assert CANARY not in shown
        assert "\n" not in str(error)
        assert name in str(error)
        return error

    return read


def table_of(path: Path, columns: dict[str, Any]) -> Table:
    parquet.write_table(pa.table(columns), path)
    return records.table(path)


# Rows -----------------------------------------------------------------------------------------


@FUZZ
@given(
    st.lists(st.tuples(st.integers(0, 2**40), st.lists(texts, max_size=4)), max_size=40),
    st.integers(1, 7),
    st.integers(1, 40),
)
def test_rows_are_what_was_added(rows: list[Any], block: int, characters: int) -> None:
    """Also rows of unlike lengths, and over the ends of blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_table, "BLOCK_ROWS", block)
        patch.setattr(text_table, "BLOCK_CHARACTERS", characters)
        builder = Builder()
        for line, row in rows:
            builder.add(line, row)
        found = builder.rows()
    assert list(found) == list(found) == rows  # again and again
    assert len(found) == len(rows)
    assert [found[i] for i in range(-len(rows), len(rows))] == rows + rows
    assert found[1:-1:2] == rows[1:-1:2]
    for beyond in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError):
            found[beyond]


def test_no_rows() -> None:
    assert not Rows()
    assert list(Rows()) == []


def test_what_is_read_may_be_changed_without_changing_the_rows() -> None:
    builder = Builder()
    builder.add(2, ["a", "a"])
    rows = builder.rows()
    rows[0][1][0] = next(iter(rows))[1][1] = "changed"
    assert list(rows) == [(2, ["a", "a"])]


# Cells ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (float("nan"), ""),
        (Decimal("NaN"), ""),
        ("", ""),
        (" x ", " x "),
        (1, "1"),
        (1.0, "1"),
        (-0.0, "0"),
        (Decimal("1.00"), "1"),
        (Decimal("-0.0"), "0"),
        (100, "100"),
        (100.0, "100"),
        (Decimal("1E+2"), "100"),
        (0.1, "0.1"),
        (Decimal("0.10"), "0.1"),
        (1e-7, "1e-07"),
        (1e16, "1e+16"),
        (Decimal("1E+16"), "1e+16"),
        (10**16, str(10**16)),
        (2.5, "2.5"),
        (float("inf"), "inf"),
        (Decimal("-Infinity"), "-infinity"),
        (Decimal("123456789.123456789123456789"), "123456789.123456789123456789"),
        (True, "true"),
        (False, "false"),
        (date(2026, 1, 31), "2026-01-31"),
        (datetime(2026, 1, 31, 10), "2026-01-31 10:00:00"),
        (datetime(2026, 1, 31, 10, tzinfo=UTC), "2026-01-31 10:00:00+00:00"),
        (time(10, 30), "10:30:00"),
        (timedelta(minutes=1), "60"),
        (UUID(int=1), str(UUID(int=1))),
    ],
)
def test_a_value_is_written_in_one_way(value: object, text: str) -> None:
    assert cell(value) == text


@pytest.mark.parametrize(
    "value", [b"x", [1], ["a b"], [""], [None], {"a": 1}, (1,), object(), "\ud800"]
)
def test_what_is_no_single_value(value: object) -> None:
    with pytest.raises(NotTextError):
        cell(value)


# Formats --------------------------------------------------------------------------------------


def test_all_formats_give_the_same_records(tmp_path: Path, table_contract: Contract) -> None:
    rows: list[dict[str, Any]] = [
        {"age": 71, "smoker": "yes", "outcome": 1},
        {"age": None, "smoker": None, "outcome": 0},
        {"age": 20.5, "smoker": "no", "outcome": 1},
    ]
    (tmp_path / "a.csv").write_text("age,smoker,outcome\n71,yes,1\n,,0\n20.5,no,1\n")
    for name in ("a.jsonl", "a.NDJSON"):
        (tmp_path / name).write_text("\n\n".join(map(json.dumps, rows)))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [records.table(path) for path in sorted(tmp_path.iterdir())]
    assert len(found) == 4
    for table in found:
        assert table.header == ["age", "smoker", "outcome"]
        assert [row for _, row in table.rows] == [
            ["71", "yes", "1"],
            ["", "", "0"],
            ["20.5", "no", "1"],
        ]
        assert records.parse(table, table_contract).inputs == [(1, 0), (None, None), (0, 1)]
    lines = {table.source: [line for line, _ in table.rows] for table in found}
    assert lines == {
        "a.csv": [2, 3, 4],
        "a.jsonl": [1, 3, 5],
        "a.NDJSON": [1, 3, 5],
        "a.parquet": [1, 2, 3],
    }


def test_a_json_line_may_name_its_keys_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "x\\ny\\u2028", "b": NaN}\n{"b": true, "a": 1e2}\r\n')
    table = records.table(path)
    assert list(table.rows) == [(1, ["x\ny\u2028", ""]), (2, ["100", "true"])]


def test_parquet_of_all_plain_types(tmp_path: Path) -> None:
    table = table_of(
        tmp_path / "a.parquet",
        {
            "small": pa.array([0.1, None], pa.float32()),
            "half": pa.array([1.5, 2], pa.float16()),
            "large": pa.array(["x", None], pa.large_string()),
            "null": pa.nulls(2),
            "word": pa.array(["x", "x"]).dictionary_encode(),
            "view": pa.array(["y", "z"], pa.string_view()),
            "decimal": pa.array([Decimal("1.50"), None], pa.decimal128(5, 2)),
            "day": pa.array([date(2026, 1, 31), None]),
            "yes": [True, None],
            "nanoseconds": pa.array([1, None], pa.timestamp("ns")),
            "zone": pa.array([0, None], pa.timestamp("ms", "Europe/Berlin")),
            "time": pa.array([time(1, 2), None]),
            "for": pa.array([60, None], pa.duration("s")),
        },
    )
    assert list(table.rows) == [
        (
            1,
            [
                "0.1",
                "1.5",
                "x",
                "",
                "x",
                "y",
                "1.5",
                "2026-01-31",
                "true",
                "1970-01-01 00:00:00.000000001",
                "1970-01-01 01:00:00+01:00",
                "01:02:00",
                "60",
            ],
        ),
        (2, ["", "2", "", "", "x", "z"] + [""] * 7),
    ]


def test_csv_lines_over_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_table, "BLOCK_ROWS", 3)
    path = tmp_path / "a.csv"
    path.write_text("a,b\n" + 'x,"two\nlines"\n\n' * 5 + "y\n")
    found = list(records.table(path).rows)
    assert [line for line, _ in found] == [2, 5, 8, 11, 14, 17]
    assert found[-1] == (17, ["y"])


def test_another_encoding_by_its_name(tmp_path: Path) -> None:
    for name, encoding in (
        ("a.csv", "latin-1"),
        ("b.csv", "utf-16"),
        ("c.csv", "utf-8-sig"),
        ("d.csv", "UTF8"),
    ):
        (tmp_path / name).write_text("wörd\nÄrger\n", encoding=encoding)
        found = records.table(tmp_path / name, Reading.of(encoding, None, OPTION))
        assert (found.header, list(found.rows)) == (["wörd"], [(2, ["Ärger"])])


# What is refused ------------------------------------------------------------------------------


GERMAN = "note,outcome\n" + "Über Nacht heftige Schmerzen, später Übelkeit und Müdigkeit.\n" * 20


@pytest.mark.parametrize(
    ("encoding", "likely"),
    [
        ("latin-1", "latin-1"),
        ("cp1252", "latin-1"),
        ("utf-16", "utf-16"),
    ],
)
def test_another_encoding_is_named(
    refused: Callable[..., DataError], encoding: str, likely: str
) -> None:
    error = refused("a.csv", (GERMAN + CANARY).encode(encoding))
    assert error.code == "E301"
    assert f"set --encoding {likely}." in str(error)
    assert f"line {1 if encoding.startswith('utf') else 2} is not UTF-8" in str(error)


def test_the_line_of_what_is_no_utf8_is_told_far_into_a_file(
    refused: Callable[..., DataError],
) -> None:
    good = "a\n" + "ärger\n" * 50_000
    error = refused("a.csv", good.encode() + b"\xe4rger " + CANARY.encode() + b"\n")
    assert "line 50002 is not UTF-8" in str(error)
    error = refused("a.jsonl", b'{"a": "' + CANARY.encode() + b'"}\n{"a": "\xff"}\n')
    assert "line 2 is not UTF-8" in str(error)


def test_a_wrong_encoding_of_the_owners(refused: Callable[..., DataError]) -> None:
    error = refused("a.csv", f"a\nš{CANARY}\n".encode("cp1257") + b"\xaa\n", "cp1253")
    assert "cannot be read as CP1253 CSV" in str(error)
    assert "line 3" in str(error)


def test_an_open_quote_is_told_by_the_line_it_starts_on(
    refused: Callable[..., DataError],
) -> None:
    error = refused("a.csv", f'a,b\n1,2\n3,"{CANARY}\n5,6\n')
    assert "the row that starts on line 3" in str(error)


def test_ragged_rows(tmp_path: Path, table_contract: Contract) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"age,smoker,outcome\n71,yes,1\n71,{CANARY}\n71,yes,1,{CANARY}\n")
    with pytest.raises(DataError, match="3 fields are expected: rows 3, 4") as caught:
        records.read(path, table_contract)
    assert CANARY not in str(caught.value)
    assert CANARY in caught.value.local


@pytest.mark.parametrize(
    ("kind", "column"),
    [
        ("list", pa.array([[1.0]])),
        ("struct", pa.array([{"a": CANARY}])),
        ("binary", pa.array([CANARY.encode()])),
        ("map", pa.array([[("a", CANARY)]], pa.map_(pa.string(), pa.string()))),
    ],
)
def test_a_parquet_column_that_is_no_single_value(
    tmp_path: Path, refused: Callable[..., DataError], kind: str, column: Any
) -> None:
    parquet.write_table(pa.table({"age": [1], "visits": column}), tmp_path / "b.parquet")
    error = refused("a.parquet", (tmp_path / "b.parquet").read_bytes())
    assert error.code == "E311"
    assert f"'visits' ({kind})" in str(error)


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_parquet_that_is_cut_short(
    tmp_path: Path, refused: Callable[..., DataError], part: float
) -> None:
    parquet.write_table(pa.table({"a": [CANARY] * 5000}), tmp_path / "b.parquet")
    whole = (tmp_path / "b.parquet").read_bytes()
    error = refused("a.parquet", whole[: int(len(whole) * part)])
    assert error.code == "E301"
    assert "cannot be read as Parquet" in str(error)


def test_parquet_with_damage_inside(tmp_path: Path, refused: Callable[..., DataError]) -> None:
    parquet.write_table(
        pa.table({"a": [f"{CANARY}{i}" for i in range(5000)]}),
        tmp_path / "b.parquet",
        compression="none",
        use_dictionary=False,
    )
    whole = bytearray((tmp_path / "b.parquet").read_bytes())
    whole[30:60] = b"\xff" * 30
    assert "cannot be read as Parquet" in str(refused("a.parquet", bytes(whole)))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"a": "CANARY"', "a line is no JSON object: row 3"),
        ('["CANARY"]', "a line is no JSON object: row 3"),
        ("CANARY", "a line is no JSON object: row 3"),
        ("[" * 100_000, "a line is no JSON object: row 3"),
        ('{"a": ' + "1" * 5000 + "}", "a line is no JSON object: row 3"),
        ('{"a": "CANARY", "b": 1}', "a line has other keys than the first one: row 3"),
        ("{}", "a line has other keys than the first one: row 3"),
        ('{"a": "CANARY", "a": 1}', "a key stands twice in a line: row 3"),
        ('{"a": ["CANARY x"]}', "a list with a word that is empty or has a space in it: row 3"),
        ('{"a": ["CANARY", 1]}', "a list of other things than words: row 3"),
        ('{"a": {"CANARY": 1}}', "an object or bytes where one value is expected: row 3"),
        ('{"a": "CANARY\\ud800"}', "half a character (a lone surrogate): row 3"),
    ],
)
def test_json_lines_that_are_no_rows(
    refused: Callable[..., DataError], line: str, words: str
) -> None:
    line = line.replace("CANARY", CANARY)
    error = refused("a.jsonl", f'{{"a": "1"}}\n\n{line}\n{{"a": "{CANARY}"}}\n')
    assert error.code == "E311"
    assert words in str(error)


def test_all_bad_json_lines_are_told_at_once(refused: Callable[..., DataError]) -> None:
    error = refused("a.jsonl", '{"a": 1}\n' + f'"{CANARY}\n' * 12 + '{"b": 1}\n')
    assert "rows 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 2 more" in str(error)
    assert "other keys than the first one: row 14" in str(error)
    assert CANARY in error.local


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_file_with_nothing_in_it(refused: Callable[..., DataError], name: str) -> None:
    assert refused(name, "\n\n").code == "E304"


def test_the_neighbours_of_a_missing_file_by_format(tmp_path: Path) -> None:
    for name in ("b.parquet", "c.ndjson", "c.jsonl", "x.txt"):
        (tmp_path / name).touch()
    with pytest.raises(DataError) as caught:
        records.table(tmp_path / "a.parquet")
    assert "JSON Lines files in that folder: c.jsonl, c.ndjson." in str(caught.value)
    assert "Parquet files in that folder: b.parquet." in str(caught.value)
    assert "CSV" not in str(caught.value)


def test_any_bytes_are_a_table_or_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("bytes")

    @FUZZ
    @given(st.sampled_from(file_source.SUFFIXES), st.binary(max_size=60), st.booleans())
    def check(suffix: str, content: bytes, magic: bool) -> None:
        path = folder / f"a{suffix}"
        path.write_bytes(b"PAR1" * magic + content + b"PAR1" * magic)
        try:
            found = records.table(path)
        except DataError:
            return
        assert len(list(found.rows)) == len(found.rows)

    check()


# Size -----------------------------------------------------------------------------------------

COLUMNS = 14
# What 2,000,000 rows may take, and what Python takes before it reads any.
MOST, START, MANY = 2 << 30, 120 << 20, 2_000_000
MEASURE = """
    import json, pathlib, re, sys, time
    from silotune.client.records import record_ids
    from silotune.common.contract import contract
    from silotune.common.data import records

    agreed = contract.load(pathlib.Path(sys.argv[2]))
    began = time.monotonic()
    table = records.table(pathlib.Path(sys.argv[1]))
    read = time.monotonic()
    found = records.parse(table, agreed)
    parsed = time.monotonic()
    prints = record_ids.of_table(table, (), bytes(32))
    # Not ru_maxrss: that begins with what the process had that started this one.
    peak = re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())
    print(json.dumps({"rows": len(found), "peak": int(peak[1]) << 10, "read": read - began,
                      "parse": parsed - read, "record_set": time.monotonic() - parsed}))
"""


def measured(folder: Path, contract: Contract, rows: int) -> dict[str, float]:
    """Seconds and bytes that a process of its own takes for a made-up file."""
    columns = [f"c{i}" for i in range(COLUMNS - 2)]
    spec = {
        "kind": "table",
        "columns": [
            {
                "kind": "number",
                "name": name,
                "phrase": name,
                "edges": [40, 60],
                "words": ["low", "middle", "high"],
            }
            for name in columns
        ],
    }
    agreed = Contract.model_validate(contract.model_dump(mode="json") | {"input": spec})
    (folder / "contract.json").write_text(
        json.dumps(agreed.model_dump(mode="json", exclude_none=True))
    )
    with (folder / "rows.csv").open("w") as file:
        file.write(f"id,{','.join(columns)},outcome\n")
        for i in range(rows):
            x = i * 2_654_435_761 % 2**32
            cells = ",".join(str((x >> k) % 90) for k in range(COLUMNS - 3))
            file.write(f"{i},{x / 1000:.3f},{cells},{x >> 20 & 1}\n")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(MEASURE),
            folder / "rows.csv",
            folder / "contract.json",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    assert found["rows"] == rows
    return found


@pytest.mark.parametrize("rows", [200_000, pytest.param(MANY, marks=pytest.mark.nightly)])
def test_memory_is_in_proportion_to_the_rows(
    tmp_path: Path, table_contract: Contract, rows: int
) -> None:
    found = measured(tmp_path, table_contract, rows)
    print(found)
    assert found["peak"] < START + (MOST - START) * rows / MANY
    assert found["parse"] < max(90 * rows / MANY, 20)
