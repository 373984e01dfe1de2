"""A record is known again in the other forms in which programs write it and encodings read it."""

from __future__ import annotations

import csv
import json
import re
import warnings
import zipfile
from datetime import date, datetime, time
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import pytest
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st

from silotune.client.records import written_forms
from silotune.client.records.canonical_values import value
from silotune.client.records.record_ids import RecordSet, of_table
from silotune.common.data import records, sql_source
from silotune.common.data.records import Table
from silotune.common.data.text_decoding import Reading
from silotune.common.errors import DataError
from tests.client.records.record_tables import (
    HEADER,
    SECRET,
    made,
    shared,
    text_of,
)

# Numbers that programs write with fewer digits


REWRITTEN = {
    "pandas to Excel": ("19.651209561794023", "19.65120956179402"),
    "the digits were noise": ("19.531249999999996", "19.53125"),
    "pandas reads the last digit otherwise": ("0.12345678901234567", "0.12345678901234566"),
    "pandas to JSON": ("0.12345678901234567", "0.123456789"),
    "pandas to JSON, small": ("0.000012345678901234567", "0.0000123457"),
    "noise in the digits after the twelfth": ("0.012345678901000001", "0.012345678901"),
    "more digits than a double": ("0.1234567890123456789", "0.12345678901234568"),
    "R": ("1234567890123.4567", "1234567890123.46"),
    "R, to a whole number": ("123456789012345.67", "123456789012346"),
    "half-way": ("1.2345678901235", "1.2345678901234999"),
    "half-way, twice": ("1.23456789013499999", "1.234567890135"),
    "negative": ("-19.651209561794023", "-19.65120956179402"),
    "to the next power of ten": ("9.9999999999999982", "10"),
    "an identifier as a double": ("12345678901234567", "1.2345678901234568e+16"),
    "a long identifier as a double": ("110101199003078888", "1.1010119900307888e+17"),
    "very small": ("1.2345678901234567e-300", "1.234567890123457e-300"),
}


@pytest.mark.parametrize("how", REWRITTEN)
def test_a_number_that_lost_its_last_digits_makes_no_new_record(how: str) -> None:
    one, other = (made([["p", cell, "é"]]) for cell in REWRITTEN[how])
    assert shared(one, other).all()
    assert shared(other, one).all()


def test_four_numbers_of_a_row_are_rounded_both_ways_and_no_more() -> None:
    """Each of them doubles the row's fingerprints."""
    one, other = (made([["p", *[cell] * 4, "é"]]) for cell in REWRITTEN["half-way"])
    assert shared(one, other).all()
    half_way = "1.234567890125"
    forms = {n: written_forms._rounded_forms([half_way] * n, range(n)) for n in (1, 4, 8)}
    ten_decimals = 1  # where no number is half-way
    assert {n: len(of) for n, of in forms.items()} == {
        1: 2 + ten_decimals,
        4: 2**4 + ten_decimals,
        8: 2**4 + ten_decimals,
    }


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("12.3456789012", "12.3456789013"),
        ("1.2345678901234", "1.2345678902234"),
        ("1234567890123", "1234567890124"),
        ("9007199254740991", "9007199254740990"),
        ("110101199003078888", "110101199003078899"),
        ("4.2e-9", "4.3e-9"),
        ("4.2e-20", "4.3e-20"),
        ("0.63696170", "0.63696171"),
        ("16777217", "16777218"),
        ("12345.5", "12345.6"),
    ],
)
def test_numbers_that_differ_within_twelve_digits_are_two_records(one: str, other: str) -> None:
    """Nor are whole numbers joined that a double tells apart: they identify people."""
    assert not shared(made([["p", one, "é"]]), made([["p", other, "é"]])).any()


doubles = st.floats(-1e15, 1e15).filter(lambda x: x == 0 or abs(x) > 1e-300)


@given(
    st.lists(
        st.tuples(doubles, st.sampled_from(["r", ".17g", ".16g", ".15g"])), min_size=1, max_size=4
    )
)
@example([(19.651209561794023, ".16g"), (1.2345678901235, ".17g"), (19.531249999999996, ".15g")])
def test_a_row_of_numbers_may_lose_the_digits_of_any(numbers: list[tuple[float, str]]) -> None:
    header = [f"c{i}" for i in range(len(numbers))]
    full = made([[repr(number) for number, _ in numbers]], header)
    written = [repr(x) if how == "r" else format(x, how) for x, how in numbers]
    assert shared(full, made([written], header)).all()


def test_a_long_number_in_a_row_that_was_read_wrongly() -> None:
    """Both at once, also where the number itself was read wrongly."""
    right = Table("a.csv", ["x", "t"], [(2, ["−19.65120956179402", "é"])])
    cells = [cell.encode().decode("cp1252") for cell in ("−19.651209561794023", "é")]
    wrong = Table("a.csv", ["x", "t"], [(2, cells)], encoding="cp1252")
    one, other = (of_table(table, (), SECRET) for table in (right, wrong))
    assert shared(one, other).all()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("08:00", "08:00:00"),
        ("8:00", "08:00:00.000000"),
        ("23:59:59.5", "23:59:59.500"),
        ("0001-01-01 00:00:00+05:00", "0001-01-01T00:00+05:00"),
        ("2026-01-31", "2026-01-31 00:00:00"),
        ("2026-01-31", "2026-01-31T00:00:00.000Z"),
        ("2026-01-31", "2026-01-31 00:00"),
        ("2026-01-31 10:00:00", "2026-01-31T10:00:00.000"),
        ("2026-01-31 10:30:00.5", "2026-01-31t10:30:00.500000+00:00"),
    ],
)
def test_a_date_is_its_midnight(one: str, other: str) -> None:
    assert made([["p", one, ""]]).id == made([["p", other, ""]]).id


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2026-01-31T10:00:00+01:00", "2026-01-31 09:00:00+00:00"),
        ("2026-01-31T00:30:00.25+0100", "2026-01-30 23:30:00.250Z"),
        ("2026-01-31 22:00-05:30", "2026-02-01T03:30:00Z"),
        ("2026-01-31 22:00-05:30", "2026-02-01T05:30:00+0200"),
    ],
)
def test_one_instant_is_one_value_in_any_zone(one: str, other: str) -> None:
    assert value(one) == value(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2026-01-31", "2026-01-31 00:00:01"),
        ("2026-01-31", "2026-01-31T00:00:00+02:00"),
        ("2026-01-31", "2026-02-01 00:00:00"),
        ("08:00", "08:01"),
        ("08:00", "08:00:01"),
        ("2026-01-31T10:00:00+01:00", "2026-01-31T10:00:00+02:00"),
        ("x 00:00:00", "x"),
    ],
)
def test_another_moment_is_another_value(one: str, other: str) -> None:
    assert made([["p", one, ""]]).id != made([["p", other, ""]]).id


# What programs make of a typed value: of a whole row at once


REWRITTEN_ROWS = {
    "yes and no in a database": (["True", "false", "TRUE"], ["1", "0", "1"]),
    "yes, no and nothing in a data frame": (["true", "FALSE", ""], ["1.0", "0.0", ""]),
    "few digits, many decimals": (
        ["0.001428571429", "3.210e-09", "x"],
        ["0.0014285714", "3.2e-9", "x"],
    ),
    "JSON has nothing so small": (["4.2e-11", "a", "x"], ["0.0", "a", "x"]),
    "JSON with an exponent": (["1.23456789012345e-16", "a", "x"], ["1.2345678901e-16", "a", "x"]),
    "JSON has no infinity": (["inf", "-Infinity", "x"], ["", "null", "x"]),
    "single precision in a database": (
        ["0.6369617", "1.2345678e-05", "5"],
        ["0.6369616985321045", "1.2345678169594612e-05", "5"],
    ),
    "single precision in a workbook": (
        ["0.1", "0.6369617", "x"],
        ["0.1000000014901161", "0.636961698532105", "x"],
    ),
    "single and double precision in JSON": (
        ["0.6369617", "0.12345678901234567", "1.2345678e-05"],
        ["0.6369616985", "0.123456789", "0.0000123457"],
    ),
    "single precision, whole": (["123456790", "a", "x"], ["123456792", "a", "x"]),
    "single precision, large": (["1e+20", "a", "x"], ["1.0000000200408773e+20", "a", "x"]),
    "half precision": (["0.099975586", "a", "x"], ["0.0999755859375", "a", "x"]),
    "milliseconds of a workbook": (
        ["2026-01-01 10:00:00.123999", "08:00:00.123456", "x"],
        ["2026-01-01 10:00:00.124", "08:00:00.123", "x"],
    ),
    "milliseconds of a workbook, to the next second": (
        ["2026-01-01 23:59:59.999999", "08:00:59.9996", "x"],
        ["2026-01-02", "08:01:00", "x"],
    ),
    "milliseconds of JSON": (
        ["2026-01-01T10:00:00.123999", "08:00:00.123456", "x"],
        ["2026-01-01T10:00:00.123", "08:00:00.123456", "x"],
    ),
    "dates since 1970": (
        ["2026-01-01", "1966-12-12 10:00:00.123999", "1931-02-03"],
        ["1767225600000", "-96386399877", "-1227916800000"],
    ),
    "dates since 1970 and an identifier": (
        ["2026-01-01 10:00:00.123456", "1970-01-01", "1767225600001"],
        ["1767261600123", "0", "1767225600001"],
    ),
    "a zone that a database has not": (
        ["2026-01-01 11:00:00+01:00", "2026-07-01 11:00:00.5+02:00", "x"],
        ["2026-01-01 11:00:00.000000", "2026-07-01 11:00:00.500000", "x"],
    ),
}


@pytest.mark.parametrize("how", REWRITTEN_ROWS)
@pytest.mark.parametrize("more", ["x", "é"])
def test_a_typed_value_that_a_program_wrote_otherwise_makes_no_new_record(
    how: str, more: str
) -> None:
    one, other = (made([[*row, more]], [*HEADER, "more"]) for row in REWRITTEN_ROWS[how])
    assert shared(one, other).all()
    assert shared(other, one).all()


singles = st.floats(width=32, allow_nan=False, allow_infinity=False).filter(
    lambda x: x == 0 or 1e-14 < abs(x) < 1e15
)

halves = st.floats(-2048, 2048, width=16).filter(lambda x: x == 0 or abs(x) > 1e-3)

moments = st.datetimes(datetime(1901, 1, 1), datetime(2099, 1, 1))

typed_rows = st.tuples(
    singles,
    halves,
    st.floats(-1e14, 1e14).filter(lambda x: x == 0 or abs(x) > 1e-14),
    st.booleans(),
    moments,
    st.dates(date(1901, 1, 1), date(2099, 1, 1)),
    st.times(),
)


@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(row=typed_rows, zone=st.sampled_from(["", "Europe/Berlin", "Asia/Kolkata"]))
@example((0.1, 0.5, 0.12345678901234567, True, datetime(1970, 1, 1), date(1970, 1, 1), time(8)), "")
@example(
    (44004632.0, 0.1, 1.5, False, datetime(2026, 1, 1), date(1931, 2, 3), time(8, 1, 2, 3)), ""
)
def test_what_pandas_makes_of_a_parquet_file_are_the_same_records(
    tmp_path_factory: pytest.TempPathFactory, row: tuple[Any, ...], zone: str
) -> None:
    """By its defaults, in all formats and a database."""
    found = typed_forms(tmp_path_factory.mktemp("typed"), [row], zone)
    for name, one in found.items():
        assert shared(one, found["parquet"]).all(), name
        assert shared(found["parquet"], one).all(), name


def typed_forms(folder: Path, rows: list[tuple[Any, ...]], zone: str) -> dict[str, RecordSet]:
    """Of a Parquet file with typed columns what pandas saves."""
    import pandas as pd
    import pyarrow as pa
    import sqlalchemy
    from pyarrow import parquet

    kinds = [
        pa.float32(),
        pa.float16(),
        pa.float64(),
        pa.bool_(),
        pa.timestamp("us", tz=zone or None),
        pa.date32(),
        pa.time64("us"),
    ]
    values = [list(column) for column in zip(*rows, strict=True)]
    values[1] = [np.float16(x) for x in values[1]]
    arrays = [pa.array(one, kind) for one, kind in zip(values, kinds, strict=True)]
    names = [*"abcdefg", "t"]
    table = pa.table([*arrays, pa.array([f"text {i}" for i in range(len(rows))])], names)
    parquet.write_table(table, folder / "a.parquet")
    frame = pd.read_parquet(folder / "a.parquet")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # CSV has fewer digits of a 16-bit number: that is not known again.
        frame.astype({"b": "float32"}).to_csv(folder / "a.csv", index=False)
        frame.to_json(folder / "a.jsonl", orient="records", lines=True)
        if not zone:  # Excel has none, and pandas refuses it
            frame.to_excel(folder / "a.xlsx", index=False)
        engine = sqlalchemy.create_engine(f"sqlite:///{folder}/a.db")
        frame.astype({"b": "float32"}).to_sql("t", engine, index=False)
        engine.dispose()
    found = {"parquet": records.table(folder / "a.parquet")}
    for name in ("a.csv", "a.jsonl", "a.xlsx"):
        if (folder / name).exists():
            found[name] = records.table(folder / name)
    header, rows_of = sql_source.read(f"sqlite:///{folder}/a.db", "SELECT * FROM t", {})[:2]
    found["database"] = Table("a.db", header, rows_of)
    return {name: of_table(table, (), SECRET) for name, table in found.items()}


# Any chain of format, encoding and escape


def as_excel_writes(text: str) -> str:
    """ST_Xstring, as Excel and XlsxWriter write it."""
    text = re.sub("_x[0-9A-Fa-f]{4}_", lambda found: "_x005F" + found[0], text)
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\ufffe\uffff]", lambda found: f"_x{ord(found[0]):04X}_", text
    )


def write_workbook(path: Path, text: str) -> None:
    """As Excel does: text in a table of shared strings. (openpyxl writes it within the sheet.)"""
    import openpyxl

    book = openpyxl.Workbook()
    book.active.append(["t", "u"])
    book.active.append(["TEXT", "x"])
    book.save(path.with_suffix(".tmp"))
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    strings = "".join(
        f'<si><t xml:space="preserve">{escape(one)}</t></si>'
        for one in ("t", "u", as_excel_writes(text), "x")
    )
    cells = [
        f'<c r="{place}" t="s"><v>{at}</v></c>' for at, place in enumerate(("A1", "B1", "A2", "B2"))
    ]
    sheet = (
        f'<worksheet xmlns="{main}"><sheetData><row r="1">{"".join(cells[:2])}</row>'
        f'<row r="2">{"".join(cells[2:])}</row></sheetData></worksheet>'
    )
    with zipfile.ZipFile(path.with_suffix(".tmp")) as made:
        parts = {name: made.read(name) for name in made.namelist()}
    parts["xl/worksheets/sheet1.xml"] = sheet.encode()
    parts["xl/sharedStrings.xml"] = f'<sst xmlns="{main}">{strings}</sst>'.encode()
    kind = "application/vnd.openxmlformats-officedocument.spreadsheetml.sharedStrings+xml"
    if b"sharedStrings" not in parts["[Content_Types].xml"]:
        parts["[Content_Types].xml"] = parts["[Content_Types].xml"].replace(
            b"</Types>",
            f'<Override PartName="/xl/sharedStrings.xml" ContentType="{kind}"/></Types>'.encode(),
        )
    with zipfile.ZipFile(path, "w") as out:
        for name, data in parts.items():
            out.writestr(name, data)


def as_windows_reads(raw: bytes) -> str:
    """Windows-1252 in which no byte is missing: 81 8D 8F 90 9D are control characters."""
    return "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in raw)


def json_line(text: str, escaped: str) -> str:
    """Only these characters as escapes."""
    line = json.dumps({"t": text, "u": "x"}, ensure_ascii=False)
    for character in escaped:
        line = line.replace(character, json.dumps(character)[1:-1])
    return line + "\n"


def forms_on_disk(folder: Path, text: str) -> dict[str, RecordSet]:
    """The row with this text in every format."""
    import openpyxl
    import pyarrow as pa
    from pyarrow import parquet

    found = {}
    table = text_of(["t", "u"], [[text, "x"]], quoting=csv.QUOTE_ALL)  # also a lone CR
    (folder / "a.csv").write_text(table, "utf-8", newline="")
    (folder / "a.jsonl").write_text(json_line(text, ""), "utf-8", newline="")
    parquet.write_table(pa.table({"t": [text], "u": ["x"]}), folder / "a.parquet")
    write_workbook(folder / "a.xlsx", text)
    book = openpyxl.Workbook()
    for row in (["t", "u"], [as_excel_writes(text), "x"]):
        book.active.append(row)
    book.save(folder / "inline.xlsx")
    for name in ("a.csv", "a.jsonl", "a.parquet", "a.xlsx", "inline.xlsx"):
        found[name] = of_table(records.table(folder / name), (), SECRET)
    return found


@settings(max_examples=60, deadline=None)
@given(text=st.text("abx05FD_ \r\n\t\x02\x0b\x1fé’", min_size=1, max_size=12).filter(str.strip))
@example(text="pain in the chest\r\nburn today")
@example(text="pain\x02 in the chest")
@example(text="code _x0041_")
@example(text="code _x000D_")
@example(text="code _x005F_ and x005F_")
def test_the_format_of_a_file_makes_no_new_record(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    forms = forms_on_disk(tmp_path_factory.mktemp("forms"), "a" + text)
    for one in forms.values():
        for other in forms.values():
            assert shared(one, other).all()


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("a\r\nb", "a\r\nb"),
        ("a\x02b", "a\x02b"),
        ("a _x0041_ b", "a _x0041_ b"),
        ("x000D_", "x000D_"),
        ("_x00E9_", "_x00E9_"),
        ("a_x000d_b", "a\rb"),
        ("a x005F_", "a "),  # what openpyxl makes of them
    ],
)
def test_a_model_is_trained_on_the_text_that_a_workbook_means(
    tmp_path: Path, text: str, read: str
) -> None:
    write_workbook(tmp_path / "a.xlsx", text)
    assert records.table(tmp_path / "a.xlsx").rows[0][1] == [read, "x"]


def misread(folder: Path, line: str, encoding: str) -> RecordSet | None:
    """A file of this JSON line in UTF-8, declared as another encoding; None where it cannot be."""
    (folder / "a.jsonl").write_bytes(line.encode())
    try:
        found = records.table(folder / "a.jsonl", Reading(encoding))
    except DataError:
        return None
    return of_table(found, (), SECRET)


def known_again(folder: Path, line: str, encoding: str) -> bool | None:
    """Whether the row is one record when declared wrongly and rightly; None: it cannot be read."""
    wrong, right = misread(folder, line, encoding), misread(folder, line, "utf-8")
    if wrong is None or right is None:
        return None
    return bool(shared(wrong, right).all() and shared(right, wrong).all())


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("Müller pain\u2028chest", "\u2028"),
        ("Müller pain 😀 chest", "😀"),
        ("Müller\u00a0pain é chest", "\u00a0"),
        ("é Müller é", "é"),
        ("😀 Müller", "😀"),
        ("für\u2028 naïve “😀” ", "\u2028😀“"),
    ],
)
@pytest.mark.parametrize(
    "encoding",
    ["cp1252", "iso8859-1", "cp850", "cp437", "mac-roman", "koi8-r", "cp1251", "gb18030", "cp932"],
)
def test_an_escape_in_json_hides_no_wrong_encoding(
    tmp_path: Path, text: str, escaped: str, encoding: str
) -> None:
    assert known_again(tmp_path, json_line(text, escaped), encoding) is not False


@settings(max_examples=150, deadline=None)
@given(
    words=st.lists(
        st.text("abü é ñ “\u2028😀\u00a0 дя 熱", min_size=1, max_size=5), min_size=1, max_size=5
    ),
    escaped=st.sets(st.sampled_from("é“\u2028😀\u00a0я"), max_size=3),
    encoding=st.sampled_from(
        [
            "cp1252",
            "iso8859-1",
            "cp850",
            "cp437",
            "mac-roman",
            "koi8-r",
            "cp1251",
            "gb18030",
            "euc_kr",
        ]
    ),
)
@example(words=["Müller", "\u2028", "chest"], escaped={"\u2028"}, encoding="cp1252")
@example(words=["Müller", "😀", "chest"], escaped={"😀"}, encoding="gb18030")
def test_no_escape_and_no_encoding_make_a_new_record(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], escaped: set[str], encoding: str
) -> None:
    """Beside an escape stands a space, so that no wrong encoding takes its backslash."""
    text = "".join(f" {c} " if c in escaped else c for c in " ".join(words))
    found = known_again(
        tmp_path_factory.mktemp("json"), json_line(text, "".join(sorted(escaped))), encoding
    )
    assume(found is not None)
    assert found


several_forms = st.text("㎎⇐≒∪∩¬∵㈱№ⅰⅠ髙﨑まみだ十卅╭熱“éíú ab", min_size=1, max_size=6).filter(
    str.strip
)


@settings(max_examples=200, deadline=None)
@given(text=several_forms, wrong=st.sampled_from(["cp932", "big5", "cp950", "euc_jp", "shift_jis"]))
@example(text="㎎⇐≒a", wrong="cp932")
def test_an_encoding_with_several_forms_of_a_character_hides_nothing(text: str, wrong: str) -> None:
    right = Table("a.csv", ["t", "u"], [(2, [text, "x"])])
    try:
        cells = [text.encode().decode(wrong), "x"]
    except UnicodeDecodeError:
        assume(False)
    misread = Table("a.csv", ["t", "u"], [(2, cells)], encoding=wrong)
    one, other = (of_table(table, (), SECRET) for table in (right, misread))
    assert shared(one, other).all()
    assert shared(other, one).all()


@given(st.text("Mülr “que” Ávita à ÍÏÐÝ 😀\u2028", min_size=1, max_size=12).filter(str.strip))
@example("Müller “quoted” pain")
def test_windows_reading_of_utf8_saved_as_unicode_is_known(text: str) -> None:
    wrong = as_windows_reads(text.encode())
    one, other = made([[text, "", ""]]), made([[wrong, "", ""]])
    assert shared(one, other).all()
    assert shared(other, one).all()


@pytest.mark.parametrize("encoding", ["cp932", "big5", "cp950", "euc_jp", "gb18030", "cp1252"])
def test_every_byte_form_of_a_character_is_known(encoding: str) -> None:
    """Encoding is not decoding backwards everywhere; the forms are."""
    forms = written_forms._byte_forms(encoding)
    for character, found in forms.items():
        for form in found:
            assert form.decode(encoding, "ignore") in (character, "")
    most = max(map(len, forms.values()))
    assert most == {"cp932": 3, "big5": 2, "cp950": 2, "euc_jp": 2}.get(encoding, 1)
