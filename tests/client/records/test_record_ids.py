"""What a record is: no way of writing a file makes its records new ones, and nothing else does."""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from silotune.client.records import record_ids
from silotune.client.records.canonical_values import canonical
from silotune.client.records.record_ids import RecordSet, of_table
from silotune.common.data.records import Table
from silotune.common.errors import DataError
from tests.client.records.record_tables import (
    HEADER,
    ROWS,
    SECRET,
    made,
    of_bytes,
    shared,
    text_of,
)


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
    before = {(n, canonical(t)) for n, t in rows}
    after = {(n, canonical(t)) for n, t in [*rows[:-1], changed]}
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
