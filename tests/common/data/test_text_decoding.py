"""One table has the same cells however it is written; what is not read is named with a remedy."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from collections.abc import Sequence
from datetime import date, datetime
from functools import cache
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openpyxl.worksheet.worksheet import Worksheet
from pyarrow import parquet

from silotune.client.site.policy import Data
from silotune.common.config.types import parse as parse_toml
from silotune.common.contract.contract import Contract, parse
from silotune.common.data import file_source, records
from silotune.common.data.text_decoding import DELIMITERS, Reading
from silotune.common.errors import ContractError, DataError, UsageError
from silotune.common.formats.encodings import ENCODINGS, encoding_of, usual_name
from tests.conftest import TABLE_CONTRACT

OPTION = "--{key} '{value}'"
FUZZ = settings(deadline=None, max_examples=25, derandomize=True, database=None)
Cells = list[list[str]]

# The first rows of files that were read wrongly.
NOTES = [
    ["note", "outcome"],
    ["Température normale, pas de fièvre", "no"],
    ["Douleur à l'épaule – prescrit 2 mg", "yes"],
    ["Größe 180 cm, Müdigkeit", "yes"],
    ["Contrôle à 6 mois, coût 20 €", "no"],
]


def reading(encoding: str | None = None, delimiter: str | None = None) -> Reading:
    return Reading.of(encoding, delimiter, OPTION)


def cells_of(path: Path, how: Reading | None = None) -> Cells:
    table = records.table(path, how)
    return [table.header, *(cells for _, cells in table.rows)]


# Writers of one table in every format ---------------------------------------------------------


def csv_text(table: Cells, delimiter: str = ",", quoting: Any = csv.QUOTE_MINIMAL) -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, quoting=quoting, lineterminator="\n").writerows(table)
    return out.getvalue()


def json_text(table: Sequence[Sequence[Any]]) -> str:
    header, *rows = table
    return "".join(
        json.dumps(dict(zip(header, row, strict=True)), ensure_ascii=False) + "\n" for row in rows
    )


def write_text(path: Path, text: str, encoding: str) -> None:
    data = text.encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_parquet(path: Path, table: Sequence[Sequence[Any]]) -> None:
    header, *rows = table
    columns = [pa.array(column) for column in zip(*rows, strict=True)]
    parquet.write_table(pa.table(columns, names=list(header)), path)


def write_xlsx(path: Path, table: Sequence[Sequence[Any]]) -> None:
    book = openpyxl.Workbook()
    sheet = book.active
    assert isinstance(sheet, Worksheet)
    for line, row in enumerate(table, start=1):
        for column, value in enumerate(row, start=1):
            one = sheet.cell(line, column, value)
            if isinstance(value, str):
                one.data_type = "s"  # also where it begins with '='
    book.save(path)


@cache
def alphabet(encoding: str) -> list[str]:
    """Printable characters that an encoding writes and reads as themselves."""
    blocks = [
        (0x20, 0x250),
        (0x370, 0x700),
        (0x2010, 0x20C0),
        (0x2500, 0x2550),
        (0x3041, 0x30FF),
        (0x4E00, 0x4E80),
        (0xAC00, 0xAC40),
        (0x1F600, 0x1F610),
    ]
    found = []
    for character in (chr(code) for block in blocks for code in range(*block)):
        data = character.encode(encoding, "ignore")
        if character.isprintable() and data and data.decode(encoding) == character:
            found.append(character)
    return found


@st.composite
def tables(draw: Any) -> tuple[Cells, str]:
    """A table of text and an encoding that has all its characters."""
    encoding = draw(st.sampled_from(ENCODINGS))
    characters = st.sampled_from(alphabet(encoding))
    extra = st.sampled_from(["\n", '"', ",", ";", "|", " ", "'", "=", "A"])
    text = st.lists(characters | extra, max_size=8).map("".join)
    names = st.lists(characters | st.sampled_from("ab _-"), min_size=1, max_size=6).map("".join)
    names = names.map(str.strip).filter(lambda name: name and not set(name) & {*DELIMITERS, '"'})
    header = draw(st.lists(names, min_size=2, max_size=4, unique=True))
    # The first cell holds something: a blank row is no row of a workbook.
    rows = draw(
        st.lists(
            st.tuples(text.map(lambda t: f"x{t}"), *[text] * (len(header) - 1)).map(list),
            min_size=1,
            max_size=5,
        )
    )
    return [header, *rows], encoding


@FUZZ
@given(
    tables(),
    st.sampled_from(list(DELIMITERS)),
    st.booleans(),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
@example((NOTES, "cp1252"), ",", False, csv.QUOTE_MINIMAL)
@example((NOTES, "utf-8"), ";", True, csv.QUOTE_MINIMAL)
@example((NOTES, "utf-16"), "\t", True, csv.QUOTE_ALL)
@example((NOTES, "gb18030"), "|", True, csv.QUOTE_MINIMAL)
def test_a_table_is_the_same_in_every_format_encoding_and_delimiter(
    tmp_path_factory: pytest.TempPathFactory,
    drawn: tuple[Cells, str],
    delimiter: str,
    found: bool,
    quoting: int,
) -> None:
    table, encoding = drawn
    folder = tmp_path_factory.mktemp("table")
    how = reading(encoding, None if found else DELIMITERS[delimiter])
    text = csv_text(table, delimiter, quoting)
    for name in ("a.csv", "b.tsv", "c.csv.gz", "d.tsv.gz"):
        write_text(folder / name, text, encoding)
        assert cells_of(folder / name, how) == table, name
        assert file_source.header(folder / name, how).header == table[0]
    for name in ("a.jsonl", "b.ndjson.gz"):
        write_text(folder / name, json_text(table), encoding)
        assert cells_of(folder / name, how) == table, name
    write_parquet(folder / "a.parquet", table)
    write_xlsx(folder / "a.xlsx", table)
    if encoding.startswith("utf"):
        mark = "utf-8-sig" if encoding == "utf-8" else "utf-16"
        write_text(folder / "marked.csv.gz", text, mark)
        assert cells_of(folder / "marked.csv.gz", how) == table
    for name in ("a.parquet", "a.xlsx"):
        assert cells_of(folder / name) == table, name


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet", "a.xlsx"])
def test_names_of_columns_are_trimmed_in_every_format(tmp_path: Path, name: str) -> None:
    table = [["\ufeff age ", "smoker\u200b", " outcome\u00a0"], ["1", "yes", "0"]]
    path = tmp_path / name
    if name.endswith("sv"):
        path.write_text(csv_text(table, "\t" if name == "a.tsv" else ","))
    elif name == "a.jsonl":
        path.write_text(json_text(table))
    else:
        (write_parquet if name == "a.parquet" else write_xlsx)(path, table)
    assert records.table(path).header == ["age", "smoker", "outcome"]


# Values with a type ---------------------------------------------------------------------------

TYPED = TABLE_CONTRACT.replace(
    'values = { yes = "yes", no = "no" }', 'values = { "true" = "yes", "false" = "no" }'
)
ROWS: list[list[Any]] = [["age", "smoker", "outcome"], [30.0, True, 1.0], [61.5, False, 0.0]]


@pytest.fixture
def typed() -> Contract:
    return parse(TYPED, "typed.toml")


def in_every_format(folder: Path, table: list[list[Any]]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name, write in (("lower", str.lower), ("python", str), ("upper", str.upper)):
        # float_labels.csv and bool_case.csv: 0.0 and 1.0, True and False
        text = [
            [value if isinstance(value, str) else write(str(value)) for value in row]
            for row in table
        ]
        (folder / f"{name}.csv").write_text(csv_text(text))
    (folder / "a.jsonl").write_text(json_text(table))
    write_parquet(folder / "a.parquet", table)
    write_xlsx(folder / "a.xlsx", table)
    return sorted(folder.iterdir())


def test_numbers_and_yes_or_no_mean_the_same_in_every_format(
    tmp_path: Path, typed: Contract
) -> None:
    for path in in_every_format(tmp_path / "typed", ROWS):
        found = records.read(path, typed)
        assert (found.inputs, found.labels) == ([(0, 0), (1, 1)], [1, 0]), path.name


@pytest.mark.parametrize("value", ["1_030", "inf", "-Infinity", "1,030.5", float("inf")])
def test_what_is_no_number_is_refused_by_row_in_every_format(
    tmp_path: Path, typed: Contract, value: object
) -> None:
    table = [ROWS[0], [str(value), "true", "1"], [str(value), "false", "0"]]
    for path in in_every_format(tmp_path / "wrong", table):
        with pytest.raises(DataError, match="column 'age' allows numbers or nothing") as caught:
            records.read(path, typed)
        first = 1 if path.suffix in (".jsonl", ".parquet") else 2
        assert f"rows {first}, {first + 1}" in str(caught.value)
        assert str(value) not in str(caught.value)


def test_codes_with_leading_zeros_are_not_numbers(tmp_path: Path, typed: Contract) -> None:
    path = tmp_path / "a.csv"
    cells = ["01", "1e0", "10", "01.0", "1.", "+1"]
    path.write_text("\n".join(["age,smoker,outcome", *(f"30,true,{cell}" for cell in cells)]))
    with pytest.raises(DataError, match=r"labels \(0, 1\): rows 2, 3, 4, 5, 6, 7\."):
        records.read(path, typed)


# Encodings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "encoding"),
    [
        ("UTF8", "utf-8"),
        ("utf-8-sig", "utf-8"),
        ("Latin1", "iso8859-1"),
        ("ISO-8859-1", "iso8859-1"),
        ("windows-1252", "cp1252"),
        ("GBK", "gb18030"),
        ("gb2312", "gb18030"),
        ("MacRoman", "mac-roman"),
        ("sjis", "shift_jis"),
    ],
)
def test_an_encoding_goes_by_any_of_its_names(name: str, encoding: str) -> None:
    assert encoding_of(name) == encoding
    assert Data(file=Path("a.csv"), encoding=name).encoding == encoding


def test_every_member_of_the_list_is_a_name_of_itself() -> None:
    for encoding in ENCODINGS:
        assert encoding_of(encoding) == encoding_of(usual_name(encoding)) == encoding


@pytest.mark.parametrize(
    "name",
    [
        "rot13",
        "idna",
        "unicode_escape",
        "utf-7",
        "hz",
        "base64",
        "zlib",
        "ascii",
        "utf-32",
        "mbcs",
        "punycode",
        "raw_unicode_escape",
        "",
        "\0",
        "latin-9000",
    ],
)
def test_other_codecs_are_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match="is not an encoding that data files may have") as caught:
        reading(name)
    assert "cp1252" in str(caught.value)
    with pytest.raises(ContractError, match="is not an encoding that data files may have"):
        parse_toml(f'file = "a.csv"\nencoding = {json.dumps(name)}', "site.toml", Data)


def test_windows_1252_is_told_from_latin_1(tmp_path: Path) -> None:
    """Bytes 0x80 to 0x9F are the sign, wherever in the file they stand. Read as latin-1 they would
    be control characters in place of € and –."""
    path = tmp_path / "cp1252.csv"
    table = [NOTES[0], *[NOTES[1]] * 3_000, *NOTES[2:]]  # the sign is behind the first 64 KiB
    path.write_bytes(csv_text(table).encode("cp1252"))
    with pytest.raises(DataError, match=r"looks like cp1252.*set --encoding 'cp1252'"):
        records.table(path, reading())
    with pytest.raises(DataError) as caught:
        records.table(path, reading("latin-1"))
    assert "control characters (U+0080 to U+009F) in rows 3002, 3004" in str(caught.value)
    assert "set --encoding 'cp1252'" in str(caught.value)
    assert cells_of(path, reading("cp1252")) == table
    path.write_bytes(csv_text(table[:2]).encode("cp1252"))
    with pytest.raises(DataError, match="looks like latin-1"):
        records.table(path)
    assert cells_of(path, reading("latin-1")) == table[:2]


def test_latin_1_that_is_not_windows_1252_either(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"note,outcome\nx\x81\xe9,no\n")
    with pytest.raises(DataError, match=r"in row 2, so it is not latin-1\. Set --encoding 'NAME'"):
        records.table(path, reading("latin-1"))


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_control_characters_are_reported_with_their_rows(tmp_path: Path, name: str) -> None:
    table = [["note", "outcome"], ["a\0b", "1"], ["tab\tand\nline", "0"], ["\x85x", "1"]]
    path = tmp_path / name
    if name == "a.parquet":
        write_parquet(path, table)
    else:
        path.write_text(csv_text(table) if name == "a.csv" else json_text(table))
    rows = {"a.csv": "2, 5", "a.jsonl": "1, 3", "a.parquet": "1, 3"}[name]
    found = records.table(path)
    assert found.notes == (f"control characters stand in rows {rows}; they are kept as they are",)
    assert [cells for _, cells in found.rows] == table[1:]


def test_a_header_with_control_characters_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("note,outcome\nx,1\n".encode("utf-16-le"))  # ASCII in it is UTF-8 with NULs
    with pytest.raises(DataError, match=r"header of a\.csv holds control characters"):
        records.table(path)
    assert cells_of(path, reading("utf-16-le"))[0] == ["note", "outcome"]


def test_a_header_may_have_line_ends_and_every_space_of_its_script(tmp_path: Path) -> None:
    names = ["Age\n(years)", "Größe\u00a0cm", "نیم\u200cفاصله", "体\u3000重"]
    (tmp_path / "a.csv").write_text(csv_text([names, ["1", "2", "3", "4"]]), encoding="utf-8")
    assert records.table(tmp_path / "a.csv").header == names


def test_a_header_in_windows_1252_is_told_too(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("coût €,outcome\nx,1\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"in its header.*set --encoding 'cp1252'"):
        records.table(path, reading("latin-1"))
    with pytest.raises(DataError, match=r"in its header.*set --encoding 'cp1252'"):
        file_source.header(path, reading("latin-1"))


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        ("utf-8-sig", "latin-1"),
        ("utf-16", "utf-8"),
        ("utf-16", "cp1252"),
        ("utf-8-sig", "utf-16-le"),
    ],
)
def test_the_mark_of_another_encoding_is_named(tmp_path: Path, mark: str, said: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(csv_text(NOTES).encode(mark))
    right = mark.removesuffix("-sig")
    with pytest.raises(DataError, match=f"mark of {right.upper()}.*set --encoding '{right}'"):
        records.table(path, reading(said))
    assert cells_of(path, reading(right)) == NOTES


# Delimiters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", DELIMITERS)
def test_the_delimiter_is_found_in_the_header(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "semicolon.csv"
    path.write_text(csv_text(NOTES, delimiter), encoding="utf-8")
    assert cells_of(path) == NOTES
    assert file_source.header(path).header == NOTES[0]


def test_a_quoted_name_with_another_delimiter_in_it_leaves_no_doubt(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('"pressure (sys;dia)",age|years\n120;80,3\n')
    assert cells_of(path) == [["pressure (sys;dia)", "age|years"], ["120;80", "3"]]


def test_rows_decide_where_the_header_leaves_doubt(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id;note, as dictated;outcome\n1;x;no\n2;y, and z;yes\n")
    assert cells_of(path)[0] == ["id", "note, as dictated", "outcome"]


def test_two_delimiters_that_both_fit_are_refused_until_one_is_set(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,b;c\n1,2;3\n")
    with pytest.raises(DataError, match="divided by ',' and ';': set --delimiter ';'"):
        records.table(path, reading())
    assert cells_of(path, reading(None, ";")) == [["a,b", "c"], ["1,2", "3"]]
    assert cells_of(path, reading(None, ",")) == [["a", "b;c"], ["1", "2;3"]]
    assert Data(file=path, delimiter=",").table().header == ["a", "b;c"]
    (tmp_path / "a.tsv").write_text("a\tb;c\n1\t2;3\n")
    assert cells_of(tmp_path / "a.tsv")[0] == ["a", "b;c"]


@pytest.mark.parametrize(
    ("word", "delimiter"), [("tab", "\t"), ("\\t", "\t"), ("\t", "\t"), ("|", "|")]
)
def test_a_delimiter_by_its_name(word: str, delimiter: str) -> None:
    assert reading(None, word).delimiter == delimiter
    assert Data(file=Path("a.csv"), delimiter=word).delimiter == delimiter


@pytest.mark.parametrize("word", ["", ":", ",,", "comma "])
def test_other_delimiters_are_refused(word: str) -> None:
    with pytest.raises(UsageError, match=r"is not a delimiter; use one of: , ; tab \|"):
        reading(None, word)


def test_one_column_needs_no_delimiter(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("note\nx;y\n\nz|u\n")
    assert list(records.table(path).rows) == [(2, ["x;y"]), (4, ["z|u"])]


# Files of other kinds -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("a.zip", "Unpack it first"),
        ("a.csv.zip", "Unpack it first"),
        ("a.tar", "Unpack it first"),
        ("a.tgz", "Unpack it first"),
        ("a.parquet.gz", "Unpack it first"),
        ("a.gz", "Unpack it first"),
        ("a.csv.xz", "Unpack it first"),
        ("a.xls", "Save the sheet as .xlsx or .csv"),
        ("a.ods", "Save the sheet as .xlsx or .csv"),
        ("a.json", "Write one object a line"),
        ("a.sav", "Save it in one of these"),
        ("records", "a file without a suffix is not read"),
    ],
)
def test_other_suffixes_are_refused_by_name(tmp_path: Path, name: str, advice: str) -> None:
    (tmp_path / name).write_text(csv_text(NOTES))
    with pytest.raises(DataError) as caught:
        records.table(tmp_path / name)
    assert advice in str(caught.value)
    assert ".csv, .tsv, .jsonl" in str(caught.value)


@pytest.mark.parametrize("begins", ["gzip", "zip", "parquet"])
def test_a_file_of_another_format_than_its_name_is_named(tmp_path: Path, begins: str) -> None:
    path, right = (
        tmp_path / "a.csv",
        tmp_path / {"gzip": "a.csv.gz", "parquet": "a.parquet", "zip": "a.xlsx"}[begins],
    )
    if begins == "gzip":
        path.write_bytes(gzip.compress(csv_text(NOTES).encode()))
    else:
        (write_parquet if begins == "parquet" else write_xlsx)(path, NOTES)
    with pytest.raises(DataError, match=r"add \.gz|name it"):
        records.table(path)
    path.rename(right)
    assert cells_of(right) == NOTES


@pytest.mark.parametrize("part", [0.3, 0.9])
def test_a_gzip_file_that_is_cut_short(tmp_path: Path, part: float) -> None:
    path = tmp_path / "a.csv.gz"
    whole = gzip.compress(csv_text([["n"], *[[str(i)] for i in range(5000)]]).encode())
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(DataError, match="cannot be decompressed"):
        records.table(path)
    path.write_bytes(b"note,outcome\n")
    with pytest.raises(DataError, match="cannot be decompressed"):
        records.table(path)


# Excel ----------------------------------------------------------------------------------------


def test_a_sheet_has_its_own_row_numbers_and_plain_values(tmp_path: Path) -> None:
    table = [
        [],
        ["day", "at", "n", "half", "yes", "text"],
        [],
        [date(2026, 1, 31), datetime(2026, 1, 31, 10), 3, 2.5, True, "007"],
        [None, None, None, None, None, "x"],
    ]
    write_xlsx(tmp_path / "a.xlsx", table)
    found = records.table(tmp_path / "a.xlsx")
    assert found.header == ["day", "at", "n", "half", "yes", "text"]
    assert list(found.rows) == [
        (4, ["2026-01-31", "2026-01-31 10:00:00", "3", "2.5", "true", "007"]),
        (5, ["", "", "", "", "", "x"]),
    ]


def test_a_row_that_is_longer_than_the_header_is_refused(
    tmp_path: Path, table_contract: Contract
) -> None:
    write_xlsx(tmp_path / "a.xlsx", [["age", "smoker", "outcome"], [1, "yes", 1, "x"]])
    with pytest.raises(DataError, match="3 fields are expected: row 2"):
        records.read(tmp_path / "a.xlsx", table_contract)


def test_several_sheets_are_refused_and_empty_ones_are_not(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    for title in ("Kanarienvogel", "empty", "other"):
        sheet = book.create_sheet(title)
        if title != "empty":
            sheet.append(["note", "outcome"])
    book.save(tmp_path / "a.xlsx")
    with pytest.raises(DataError, match="2 sheets with cells in them: keep the one") as caught:
        records.table(tmp_path / "a.xlsx")
    assert "Kanarienvogel" not in str(caught.value)
    assert "Kanarienvogel, other" in caught.value.local
    del book["other"]
    book.save(tmp_path / "a.xlsx")
    assert records.table(tmp_path / "a.xlsx").header == ["note", "outcome"]
    write_xlsx(tmp_path / "b.xlsx", [])
    with pytest.raises(DataError, match="is empty"):
        records.table(tmp_path / "b.xlsx")


@pytest.mark.parametrize("value", ["#N/A", "=1+1"])
def test_a_cell_without_a_value_of_its_own_is_refused_by_row(tmp_path: Path, value: str) -> None:
    """A formula that was never computed would be read as missing."""
    book = openpyxl.Workbook()
    sheet = book.active
    assert isinstance(sheet, Worksheet)
    for row in (["note", "n"], ["x", 1], ["y", value]):
        sheet.append(row)
    book.save(tmp_path / "a.xlsx")
    with pytest.raises(DataError, match=r"a formula without a value.*: row 3"):
        records.table(tmp_path / "a.xlsx")


def test_a_formula_that_was_computed_is_its_value(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    sheet = book.active
    assert isinstance(sheet, Worksheet)
    for row in (["note", "n"], ["x", "=1+1"]):
        sheet.append(row)
    book.save(tmp_path / "b.xlsx")
    with (
        zipfile.ZipFile(tmp_path / "b.xlsx") as old,
        zipfile.ZipFile(tmp_path / "a.xlsx", "w") as new,
    ):
        for name in old.namelist():
            content = old.read(name).replace(b"<f>1+1</f><v></v>", b"<f>1+1</f><v>2</v>")
            new.writestr(name, content.replace(b"<f>1+1</f><v />", b"<f>1+1</f><v>2</v>"))
    assert cells_of(tmp_path / "a.xlsx") == [["note", "n"], ["x", "2"]]


def test_a_damaged_workbook(tmp_path: Path) -> None:
    write_xlsx(tmp_path / "a.xlsx", NOTES)
    whole = (tmp_path / "a.xlsx").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"PK\x03\x04" + bytes(50), b"note,outcome\n"):
        (tmp_path / "a.xlsx").write_bytes(content)
        with pytest.raises(DataError, match="cannot be read as an Excel workbook"):
            records.table(tmp_path / "a.xlsx")


# Words and tags -------------------------------------------------------------------------------

TOKENS = (
    TABLE_CONTRACT[: TABLE_CONTRACT.index("[task]")]
    + """
[task]
kind = "tokens"
label_column = "marks"
entities = ["Disease", "Drug"]

[input]
kind = "text"
column = "sentence"

[model]
kind = "encoder"
name = "tiny"
sha256 = "%s"
max_tokens = 8
"""
    % ("0" * 64)
    + TABLE_CONTRACT[TABLE_CONTRACT.index("[privacy]") :]
)
SENTENCES = [
    (["history", "of", "gout", "."], ["O", "O", "B-Disease", "O"]),
    (["type", "2", "diabetes"], ["B-Disease", "I-Disease", "I-Disease"]),
]


@pytest.fixture
def tokens() -> Contract:
    return parse(TOKENS, "tokens.toml")


def conll(between: str, middle: str = "") -> str:
    return (
        "\n\n".join(
            "\n".join(
                between.join([word, *middle.split(), tag])
                for word, tag in zip(words, tags, strict=True)
            )
            for words, tags in SENTENCES
        )
        + "\n"
    )


@pytest.mark.parametrize("name", ["a.txt", "a.conll", "a.iob", "a.bio", "a.iob2", "a.conll.gz"])
@pytest.mark.parametrize(
    "text",
    [
        conll("\t"),
        conll(" "),
        conll(" ", "NN B-NP"),
        "-DOCSTART- O\n\n" + conll(" ") + "\n\n",
        conll("\t", "_ _").replace("\n", "\r\n"),
    ],
)
def test_a_conll_file_is_read_as_the_columns_of_the_contract(
    tmp_path: Path, tokens: Contract, name: str, text: str
) -> None:
    write_text(tmp_path / name, text, "utf-8")
    found = records.read(tmp_path / name, tokens)
    assert found.inputs == ["history of gout .", "type 2 diabetes"]
    assert found.labels == [[0, 0, 1, 0], [1, 2, 2]]
    first = 3 if text.startswith("-DOC") else 1
    assert [line for line, _ in records.table(tmp_path / name).rows] == [first, first + 5]
    assert records.unlabelled(records.table(tmp_path / name), tokens) == found.inputs


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_lists_of_words_and_tags_are_read(tmp_path: Path, tokens: Contract, name: str) -> None:
    table = [["sentence", "marks"], *map(list, SENTENCES)]
    if name == "a.jsonl":
        (tmp_path / name).write_text(json_text(table))
    else:
        write_parquet(tmp_path / name, table)
    found = records.read(tmp_path / name, tokens)
    assert found.inputs == ["history of gout .", "type 2 diabetes"]
    assert found.labels == [[0, 0, 1, 0], [1, 2, 2]]


def test_a_list_with_a_space_in_a_word_is_refused_by_row(tmp_path: Path) -> None:
    """It would move the tags of all words behind it."""
    write_parquet(tmp_path / "a.parquet", [["words"], [["a", "b"]], [["New York"]], [[""]]])
    with pytest.raises(DataError, match="a word that is empty or has a space in it: rows 2, 3"):
        records.table(tmp_path / "a.parquet")


@pytest.mark.parametrize("line", ["gout", "a b\tO", "a\t", "a O O O"])
def test_a_line_of_a_conll_file_that_is_no_word_with_its_tag(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.conll").write_text(conll("\t").replace("gout\tB-Disease", line))
    with pytest.raises(DataError, match=r"cannot be read as CoNLL: .*row 3\."):
        records.table(tmp_path / "a.conll")


def test_a_conll_file_for_another_task_names_what_it_holds(
    tmp_path: Path, table_contract: Contract
) -> None:
    (tmp_path / "a.txt").write_text(conll(" "))
    with pytest.raises(DataError, match="holds words and their tags, and 'small' is a task of"):
        records.read(tmp_path / "a.txt", table_contract)


def test_numbers_outside_the_bounds_are_counted_with_their_rows(
    tmp_path: Path, table_contract: Contract
) -> None:
    text = TABLE_CONTRACT.replace("edges = [50],", "edges = [50], lowest = 1,").replace(
        'labels = [{ name = "well", values = ["0"] }, { name = "ill", values = ["1"] }]',
        'kind = "regression"\nlowest = 0.0\nhighest = 10.0',
    )
    path = tmp_path / "a.csv"
    path.write_text("age,smoker,outcome\n0,yes,5\n20,no,-1\n30,no,10\n40,no,11\n-3,,2\n")
    assert records.read(path, parse(text, "small.toml")).notes == (
        "column 'age' is below 1: counts as missing: rows 2, 6",
        "column 'outcome' is not within 0 to 10: counts as the bound: rows 3, 5",
    )
