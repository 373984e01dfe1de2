"""What a record is: no way of writing a file makes its records new ones, and nothing else does."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import pytest
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from silotune.client.privacy import record_ids
from silotune.client.privacy.record_identity import components
from silotune.client.privacy.record_ids import RecordSet, of_table
from silotune.common.data import records, sql_source
from silotune.common.data.records import Table
from silotune.common.data.text_decoding import Reading
from silotune.common.errors import DataError

SECRET = bytes(range(32))
HEADER = ["patient", "âge", "note"]
ROWS = [["p1", "5", "rué"], ["p2", "60.50", "plain, quoted"], ["p3", "-0.125", ""]]


def shared(records: RecordSet, others: RecordSet) -> NDArray[np.bool_]:
    """[R] for each of `records`, whether it is among the others; all of them if bases differ."""
    if records.basis != others.basis:
        return np.ones(len(records.fingerprints), dtype=bool)
    own, other = components([records, others], [])
    return np.isin(own, other)


def made(
    rows: Sequence[Sequence[str]] = ROWS,
    header: Sequence[str] = HEADER,
    key: Sequence[str] = (),
    secret: bytes = SECRET,
) -> RecordSet:
    numbered = [(i + 2, list(row)) for i, row in enumerate(rows)]
    return of_table(Table("made.csv", list(header), numbered), key, secret)


def text_of(
    header: Sequence[str] = HEADER,
    rows: Sequence[Sequence[str]] = ROWS,
    *,
    end: str = "\n",
    quoting: int = csv.QUOTE_MINIMAL,
) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator=end, quoting=quoting)  # type: ignore[arg-type]
    writer.writerows([header, *rows])
    return out.getvalue()


def of_bytes(path: Path, data: bytes, key: Sequence[str] = ()) -> RecordSet:
    path.write_bytes(data)
    return of_table(records.table(path), key, SECRET)


def reordered(places: Sequence[int]) -> str:
    return text_of([HEADER[i] for i in places], [[row[i] for i in places] for row in ROWS])


RESPELT: dict[str, bytes] = {
    "rows reordered": text_of(rows=ROWS[::-1]).encode(),
    "columns reordered": reordered([2, 0, 1]).encode(),
    "byte order mark": text_of().encode("utf-8-sig"),
    "CRLF": text_of(end="\r\n").encode(),
    "every cell quoted": text_of(quoting=csv.QUOTE_ALL).encode(),
    "no last line end": text_of().rstrip("\n").encode(),
    "blank lines": text_of().replace("\n", "\n\n").encode(),
    "NFD": unicodedata.normalize("NFD", text_of()).encode(),
    "5 as '5.0 '": text_of().replace("p1,5,", "p1,5.0 ,").encode(),
    "5 as 5e0": text_of().replace("p1,5,", "p1,5e0,").encode(),
    "5 as +05": text_of().replace("p1,5,", "p1,+05,").encode(),
    "fullwidth 5": text_of().replace("p1,5,", "p1,５,").encode(),
    "other exponents": text_of().replace("60.50", "0.605E+2").replace("-0.125", "-125e-3").encode(),
    "other case": text_of().replace("p2", "P2").encode(),
    "spaces in a cell": text_of().replace("p2", "  p2\t").encode(),
    "spaces in a header": text_of().replace("patient", " Patient ").encode(),
}
CHANGED: dict[str, bytes] = {
    "another key": text_of().replace("p1", "p9").encode(),
    "another number": text_of().replace("60.50", "60.51").encode(),
    "another sign": text_of().replace("-0.125", "0.125").encode(),
    "another text": text_of().replace("rué", "rue").encode(),
    "a row more": text_of(rows=[*ROWS, ["p4", "1", "x"]]).encode(),
    "a row less": text_of(rows=ROWS[:2]).encode(),
    "two cells exchanged": text_of().replace("p1,5", "5,p1").encode(),
}


@pytest.mark.parametrize("how", RESPELT)
def test_a_file_written_another_way_has_the_same_records(how: str, tmp_path: Path) -> None:
    plain = of_bytes(tmp_path / "rows.csv", text_of().encode())
    again = of_bytes(tmp_path / "renamed.csv", RESPELT[how])
    assert again.id == plain.id
    assert shared(again, plain).all()


@pytest.mark.parametrize("how", CHANGED)
def test_a_file_with_other_content_has_another_id(how: str, tmp_path: Path) -> None:
    plain = of_bytes(tmp_path / "rows.csv", text_of().encode())
    other = of_bytes(tmp_path / "other.csv", CHANGED[how])
    assert other.id != plain.id
    assert other.basis == plain.basis
    assert int(shared(other, plain).sum()) == len(set(other.fingerprints) & set(plain.fingerprints))


def test_negative_zero_is_zero() -> None:
    assert made([["p", "-0.0", ""]]).id == made([["p", "0", ""]]).id == made([["p", "0e7", ""]]).id


def test_a_subset_is_found() -> None:
    assert shared(made(ROWS[:2]), made()).all()
    assert shared(made(), made(ROWS[:2])).sum() == 2


def test_an_overlap_is_found_and_nothing_more() -> None:
    left, right = made([["a", "1", ""], ["b", "2", ""]]), made([["b", "2.0", ""], ["c", "3", ""]])
    found = shared(left, right)
    assert found.sum() == 1
    assert left.fingerprints[found][0] in set(right.fingerprints)


def test_new_rows_share_nothing() -> None:
    assert not shared(made(), made([["q", "1.5", "x"], ["p1", "5", "rue"]])).any()


def test_with_key_columns_a_corrected_row_is_the_same_record() -> None:
    corrected = [["p1", "99", "typo mended"], *ROWS[1:]]
    assert made(corrected, key=["patient"]).id == made(key=["patient"]).id
    assert made(corrected).id != made().id


def test_the_order_and_spelling_of_the_key_columns_do_not_count() -> None:
    assert made(key=["patient", "âge"]).id == made(key=["ÂGE ", "Patient"]).id


def test_a_column_beside_the_key_changes_nothing() -> None:
    wider = made([[*row, "new"] for row in ROWS], [*HEADER, "hospital"], key=["patient"])
    assert wider.id == made(key=["patient"]).id


def test_another_key_makes_other_records() -> None:
    other = [["q" + row[0], *row[1:]] for row in ROWS]
    assert not shared(made(other, key=["patient"]), made(key=["patient"])).any()


def test_rows_with_one_key_are_one_record() -> None:
    twice = made([*ROWS, ["P1", "7", "second visit"]], key=["patient"])
    assert (twice.rows, twice.repeated) == (4, 1)
    assert twice.id == made(key=["patient"]).id


@pytest.mark.parametrize(
    "other",
    [
        made(key=["patient"]),
        made([row[:2] for row in ROWS], HEADER[:2]),
        made([[*row, "x"] for row in ROWS], [*HEADER, "extra"]),
        made(ROWS, ["patient", "years", "note"]),
    ],
    ids=["key", "column less", "column more", "column renamed"],
)
def test_what_cannot_be_compared_counts_as_the_same(other: RecordSet) -> None:
    assert shared(other, made()).all()
    assert shared(made(), other).all()


def test_a_key_of_every_column_is_not_the_basis_without_key() -> None:
    assert made(key=HEADER).basis != made().basis


@pytest.mark.parametrize("cell", ["{}", "x{}", "p1", ""])
def test_a_second_column_of_one_name_does_not_make_the_records_new(cell: str) -> None:
    wider = made([[*row, cell.format(i)] for i, row in enumerate(ROWS)], [*HEADER, " PATIENT"])
    assert wider.basis != made().basis
    assert shared(wider, made()).all()
    assert shared(made(), wider).all()


def test_the_order_of_two_columns_of_one_name_does_not_count() -> None:
    header, rows = [*HEADER, "Patient"], [[*row, f"x{i}"] for i, row in enumerate(ROWS)]
    turned = made([row[::-1] for row in rows], header[::-1])
    assert turned.id == made(rows, header).id


@pytest.mark.parametrize("other", ["patient", " PATIENT"])
def test_a_key_column_that_stands_twice_is_refused(other: str) -> None:
    """Which of the two names the patient, nobody can tell."""
    rows = [[*row, f"x{i}"] for i, row in enumerate(ROWS)]
    with pytest.raises(DataError, match=r"Key column 'patient' stands twice in made.csv") as error:
        made(rows, [*HEADER, other], key=["patient"])
    assert error.value.code == "E302"
    made(rows, [*HEADER, other], key=["note"])  # beside the key it changes nothing


@pytest.mark.parametrize("key", [(), ("patient",)])
@pytest.mark.parametrize("digits", [28, 30, 300])
def test_long_numbers_that_differ_stay_different(key: Sequence[str], digits: int) -> None:
    whole = "1" * digits
    for first, second in (
        (whole + ".1", whole + ".2"),
        (whole + "1.5", whole + "2.5"),
        (f"0.{whole}1", f"0.{whole}2"),
        (f"1.{whole}1e9", f"1.{whole}2e9"),
    ):
        found = made([[first, "", ""], [second, "", ""]], key=key)
        assert (found.rows, found.repeated) == (2, 0)
        one, again = (made([[c, "", ""]], key=key) for c in (first, f" +0{first.upper()}"))
        assert one.id == again.id
    assert made([[whole + "1", "", ""], [whole + "2", "", ""]], key=["patient"]).repeated == 0


# Columns that only number the rows


def with_index(
    numbers: Sequence[object], place: int = 0, name: str = "nr", **given: Any
) -> RecordSet:
    """ROWS with another column at `place`."""
    rows = [[*row[:place], str(n), *row[place:]] for row, n in zip(ROWS, numbers, strict=True)]
    return made(rows, [*HEADER[:place], name, *HEADER[place:]], **given)


@pytest.mark.parametrize("name", ["nr", "", "Unnamed: 0"])
@pytest.mark.parametrize("place", [0, 2, 3])
@pytest.mark.parametrize(
    "numbers",
    [
        range(3),
        range(1, 4),
        range(100, 103),
        (7, 3, 5),
        ("0.0", "1.0", "2.0"),
        (10**40, 5, 0),
        ("001", "002", "003"),
        (" 4", "5 ", "6"),
    ],
)
def test_a_column_that_only_numbers_the_rows_is_left_out(
    numbers: Sequence[object], place: int, name: str
) -> None:
    """Added, numbered anew or dropped: the records are the same ones."""
    found = with_index(numbers, place, name)
    assert found.id == made().id
    assert shared(found, made()).all()


def test_a_numbered_subset_of_the_records_is_found() -> None:
    rows = [[str(i), *row] for i, row in enumerate(ROWS)]
    some = made([["7", *ROWS[2]], ["8", *ROWS[0]]], ["nr", *HEADER])
    assert shared(some, made(rows, ["nr", *HEADER])).all()
    assert int(shared(made(rows, ["nr", *HEADER]), some).sum()) == 2


@pytest.mark.parametrize(
    "numbers",
    [
        (-1, 0, 1),
        ("1", "2", "3.00"),
        ("1", "2", "3e0"),
        ("1", "2", "+3"),
        ("1", "2", "３"),
    ],
)
def test_numbering_in_any_spelling_is_left_out(numbers: Sequence[object]) -> None:
    assert with_index(numbers).id == made().id


@pytest.mark.parametrize(
    "numbers",
    [
        (1, 1, 2),
        (1, 2, ""),
        (1, 2, "x3"),
        (1.5, 2, 3),
    ],
)
def test_a_column_that_does_more_than_number_takes_part(numbers: Sequence[object]) -> None:
    """Other bases: not one record is taken for a new one."""
    found = with_index(numbers)
    assert found.basis != made().basis
    for one, other in ((found, made()), (made(), found), (found, with_index(range(3)))):
        assert shared(one, other).all()


def test_records_that_differ_only_in_their_number_are_one() -> None:
    found = made([["1", "a", "b"], ["2", "a", "b"], ["3", "a", "c"]])
    assert (found.rows, found.repeated) == (3, 1)


def test_a_column_that_numbers_the_rows_can_be_the_key() -> None:
    one, other = with_index(range(3), key=["nr"]), with_index(range(1, 4), key=["nr"])
    assert one.repeated == 0
    assert int(shared(other, one).sum()) == 2


def test_one_row_is_told_by_all_its_columns() -> None:
    """Of a single row nobody can tell what numbers it: then more counts as the same, not less."""
    one = made([["1", *ROWS[0]]], ["nr", *HEADER])
    assert one.id != made([ROWS[0]]).id
    assert shared(one, made()).all()
    assert shared(one, with_index(range(3))).all()


def test_where_every_column_numbers_the_rows_all_of_them_count() -> None:
    rows = [["1", "11", "21"], ["2", "12", "22"]]
    assert made(rows).repeated == 0
    assert made(rows).id == made(rows[::-1]).id
    assert not shared(made([["3", "13", "23"], ["4", "14", "24"]]), made(rows)).any()
    assert shared(made([*rows, ["2", "12", "22"]]), made(rows)).all()


def test_a_row_that_lacks_cells_is_the_row_with_empty_ones() -> None:
    assert made([["p1", "5"], ["p2"]]).id == made([["p1", "5", ""], ["p2", "", " "]]).id


def test_an_empty_cell_is_not_zero_and_not_another_cells_place() -> None:
    assert made([["p1", "", ""]]).id != made([["p1", "0", ""]]).id
    assert made([["p1", "", "5"]]).id != made([["p1", "5", ""]]).id


@pytest.mark.parametrize("cell", ["nan", "sNaN", "inf", "1e999999999999", "1e-999999999999", "0x1"])
def test_words_and_numbers_beyond_measure_are_values_too(cell: str) -> None:
    assert made([["p", cell, ""]]).id == made([["p", cell.upper() + " ", ""]]).id
    assert made([["p", cell, ""]]).id != made([["p", "1", ""]]).id


def test_a_key_column_that_is_not_there_is_told_without_the_records() -> None:
    with pytest.raises(DataError, match=r"Key column 'pacient' is not in made.csv") as error:
        made(key=["pacient"])
    assert error.value.code == "E302"
    assert "Did you mean 'patient'" in error.value.local
    assert "âge" not in str(error.value)


def test_the_fingerprints_depend_on_the_key() -> None:
    other = made(secret=SECRET[::-1])
    assert other.basis == made().basis
    assert not shared(other, made()).any()
    assert other.id != made().id


def test_fingerprints_are_read_back_from_their_bytes() -> None:
    found = made()
    again = RecordSet.of_bytes(found.basis, found.fingerprints.tobytes(), found.rows)
    assert again.id == found.id
    assert shared(again, found).all()


def test_fingerprints_with_zero_bytes_stay_apart() -> None:
    """NumPy's fixed strings lose zeros at their end when read one by one; comparing must not."""
    tails = [bytes(8), b"a" + bytes(7), b"a" * 7 + b"\0", bytes(7) + b"a"]
    data = b"".join(sorted(tail + bytes(8) for tail in tails))
    found = RecordSet.of_bytes("b", data, 4)
    assert len(np.unique(found.fingerprints)) == 4
    for i in range(4):
        one = RecordSet.of_bytes("b", data[16 * i : 16 * i + 16], 1)
        assert shared(found, one).tolist() == [i == k for k in range(4)]


def test_no_records_share_nothing_and_have_an_id() -> None:
    empty = made([])
    assert shared(empty, made()).shape == (0,)
    assert not shared(made(), empty).any()
    assert len(empty.id) == 64


def spelt(number: Decimal, way: int) -> str:
    ways: list[Callable[[], str]] = [
        lambda: f"{number:f}",
        lambda: f"{number:e}",
        lambda: f" {number:f} ",
        lambda: f"{number:f}" + ("0" if "." in f"{number:f}" else ".00"),
        lambda: f"{number:E}".replace("E+", "E+0"),
    ]
    return ways[way]()


# Of twelve digits at most: longer ones are joined where these are equal.
numbers = st.decimals(-(10**6), 10**6, allow_nan=False, places=5)
tables = st.lists(st.tuples(numbers, st.text("abß é5", max_size=4)), min_size=1, max_size=8)


@given(tables, st.data())
def test_no_order_and_no_spelling_of_numbers_changes_the_id(
    rows: list[tuple[Decimal, str]], data: st.DataObject
) -> None:
    plain = made([[f"{n:f}", t] for n, t in rows], ["n", "t"])
    mixed = data.draw(st.permutations(rows))
    ways = data.draw(st.lists(st.integers(0, 4), min_size=len(rows), max_size=len(rows)))
    again = made(
        [
            [unicodedata.normalize("NFD", t), spelt(n, w)]
            for (n, t), w in zip(mixed, ways, strict=True)
        ],
        ["T", " n"],
    )
    assert again.id == plain.id


@given(tables, st.data())
def test_any_changed_record_changes_the_id(
    rows: list[tuple[Decimal, str]], data: st.DataObject
) -> None:
    """The last record gets another number; unless that is another one's copy, it is a new one."""
    number, text = rows[-1]
    step = data.draw(st.integers(-(10**11), 10**11).filter(bool))
    changed = (number + Decimal(step).scaleb(-5), text)
    before = {(n, record_ids.canonical(t)) for n, t in rows}
    after = {(n, record_ids.canonical(t)) for n, t in [*rows[:-1], changed]}
    cells = [[[str(n), t] for n, t in found] for found in (rows, [*rows[:-1], changed])]
    # A column that only numbers the rows is left out.
    numbered = [list(enumerate(found, 2)) for found in cells]
    assume(not any(record_ids._numbering(Table("a.csv", ["n", "t"], found)) for found in numbered))
    one, other = (made(found, ["n", "t"]) for found in cells)
    assert (one.id == other.id) == (before == after)
    assert len(other.fingerprints) == len(after)
    assert int(shared(other, one).sum()) == len(before & after)


def test_a_numbering_named_like_another_column_gives_no_new_records() -> None:
    """Numbered this way or that way the records are the same, and none is new to the plain file."""
    name = HEADER[0].upper()
    first, second = (with_index(n, 3, name) for n in (range(3), (9, 7, 8)))
    assert first.id == second.id
    assert shared(made(), first).all()


def test_of_two_columns_of_one_name_neither_counts_when_one_only_numbers() -> None:
    """Or a row added to the file would decide which of them does, and renew all records."""
    rows = [["a", "0", "x"], ["b", "1", "y"], ["c", "2", "x"]]
    first = made([[str(i), *row] for i, row in enumerate(rows)], ["", "", "age", "sick"])
    more = [*rows, ["d", "3", "y"]]
    numbers = ["0", "1", "2", "2"]  # an index that is repeated numbers nothing any more
    second = made(
        [[n, *row] for n, row in zip(numbers, more, strict=True)], ["", "", "age", "sick"]
    )
    assert shared(second, first).sum() >= len(rows)


@pytest.mark.parametrize(("one", "other"), [("", "nan"), ("", "NaN"), ("ab", "a\u200bb")])
def test_spellings_of_nothing_are_nothing(one: str, other: str) -> None:
    header = ["a", "b"]
    assert made([[one, "x"], ["q", "x"]], header).id == made([[other, "x"], ["q", "x"]], header).id


@pytest.mark.parametrize("name", ["Na", "Nil", "None", "NULL"])
def test_a_person_whose_name_means_missing_is_a_person(name: str) -> None:
    """As a key such a name is not empty: an entity of that name is not refused. In fingerprints it
    is the missing value, so that a file that writes it so has no new records."""
    table = Table("a.csv", ["patient", "x"], [(2, [name, "1"]), (3, ["", "1"])])
    assert list(record_ids.keys(table, ["patient"])) == [(name.lower(),), ("",)]
    assert of_table(table, ["patient"], SECRET).repeated == 1


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
    forms = {n: record_ids._rounded_forms([half_way] * n, range(n)) for n in (1, 4, 8)}
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
    assert record_ids.value(one) == record_ids.value(other)


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


# What nobody sees


ALIKE = [
    ("❤\ufe0f", "❤"),
    ("a\u034fb", "ab"),
    ("x\u3164", "x"),
    ("x\uffa0", "x"),
    ("a\u2800", "a"),
    ("a\U000e0101", "a"),
    ("ab\u180b", "ab"),
    ("｀", "`"),
    ("ʻ", "'"),
    ("İ", "i"),
    ("ı", "I"),
    ("ILICA", "ılıca"),
    ("ŉ", "ʼN"),
    ("⁻5", "-5"),
    ("a\u00adb", "ab"),
    ("a_x000D_\nb", "a\r\nb"),
    ("a_x000d_b", "a\rb"),
    ("a_x0002_b", "ab"),
    ("_x005F_x0041_", "_x0041_"),
    ("a_x005F_x000D_b", "a_x000D_b"),
]


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_what_looks_alike_is_one_value(one: str, other: str) -> None:
    assert record_ids.value(one) == record_ids.value(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("_x0041_", "A"),
        ("x000D", ""),
        ("_x00E9_", "é"),
        ("é", "e"),
        ("ñ", "n"),
        ("5-", "5"),
    ],
)
def test_what_can_be_told_apart_is_two_values(one: str, other: str) -> None:
    assert record_ids.value(one) != record_ids.value(other)


plain_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
unseen = st.text("\u034f\u3164\ufe0f\u200b\u2060\U000e0100\x02\u115f", min_size=1, max_size=3)


@given(plain_text, plain_text, unseen)
def test_invisible_characters_anywhere_change_nothing(left: str, right: str, more: str) -> None:
    assert record_ids.canonical(left + more + right) == record_ids.canonical(left + right)


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
    forms = record_ids._byte_forms(encoding)
    for character, found in forms.items():
        for form in found:
            assert form.decode(encoding, "ignore") in (character, "")
    most = max(map(len, forms.values()))
    assert most == {"cp932": 3, "big5": 2, "cp950": 2, "euc_jp": 2}.get(encoding, 1)


# Numbers in workbooks that may have lost digits


@pytest.mark.parametrize("number", [110101199003078888, 1.10101199003079e17, 12345678901234567])
def test_a_workbook_with_identifiers_as_numbers_is_refused(tmp_path: Path, number: float) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    for row in (["id", "t"], [number, "x"], [7, "y"]):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    with pytest.raises(DataError, match=r"beyond 2\^53 .*: row 2\. Write that column") as error:
        records.table(tmp_path / "a.xlsx")
    assert error.value.code == "E311"
    assert str(number) not in str(error.value)


@pytest.mark.parametrize("number", [1 << 53, 6.02214076e23, 1e300, 0.12345678901234567])
def test_other_numbers_of_a_workbook_are_read(tmp_path: Path, number: float) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    for row in (["id", "t"], [number, "x"]):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    found = float(records.table(tmp_path / "a.xlsx").rows[0][1][0])
    assert found == pytest.approx(number, rel=1e-15)


# Texts in workbooks that may have been cut


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("a" * 40_000, True),
        ("a" * 32_767, True),
        ("a" * 32_766, False),
        ("😀" * 16_384, True),
        ("😀" * 16_383, True),
        ("😀" * 16_382, False),
        ("é" * 32_767, True),
    ],
)
def test_a_workbook_with_a_text_that_may_have_been_cut_is_refused(
    tmp_path: Path, text: str, refused: bool
) -> None:
    """openpyxl, and so pandas, cuts it without a word."""
    import openpyxl

    book = openpyxl.Workbook()
    for row in (["t", "u"], ["x", "y"], [text, "x"]):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    if not refused:
        assert records.table(tmp_path / "a.xlsx").rows[1][1] == [text, "x"]
        return
    with pytest.raises(DataError, match=r"a.xlsx has a text of 32,767 .*: row 3\. Save") as error:
        records.table(tmp_path / "a.xlsx")
    assert error.value.code == "E311"
    assert ".csv or .parquet" in str(error.value)
