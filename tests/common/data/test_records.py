"""A file that does not fit is refused with every problem and without one value of a record."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.common.contract.contract import Contract
from silotune.common.data import records
from silotune.common.errors import DataError

FUZZ = settings(deadline=None, max_examples=60, derandomize=True, database=None)
HEADER = "age,smoker,outcome\n"


@pytest.fixture
def refused(tmp_path: Path, table_contract: Contract) -> Callable[..., DataError]:
    """refused(content, contract=table_contract) -> the error that reading it raises."""

    def read(content: str | bytes, contract: Contract = table_contract) -> DataError:
        path = tmp_path / "notes.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(DataError) as caught:
            records.read(path, contract)
        assert "\n" not in str(caught.value)
        assert "notes.csv" in str(caught.value)
        return caught.value

    return read


@pytest.fixture
def text_contract(table_contract: Contract) -> Contract:
    encoder = {"kind": "encoder", "name": "m", "sha256": "0" * 64, "max_tokens": 32}
    return Contract.model_validate(
        table_contract.model_dump(mode="json")
        | {"input": {"kind": "text", "column": "note"}, "model": encoder}
    )


def test_rows_become_choices_and_classes(tmp_path: Path, table_contract: Contract) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(
        "smoker,id,outcome,age\nyes,p1,1,71\n no ,p2, 0 ,20\n,p3,1,nan\nno,p4,0,\nyes,p5,0,50\n"
    )
    found = records.read(path, table_contract)
    assert found.inputs == [(1, 0), (0, 1), (None, None), (None, 1), (1, 0)]
    assert found.labels == [1, 0, 1, 0, 0]
    assert {type(label) for label in found.labels} == {int}
    assert len(found) == 5


def test_made_up_rows_fit(
    tmp_path: Path, table_contract: Contract, write_rows: Callable[..., Path]
) -> None:
    found = records.read(write_rows(tmp_path / "rows.csv", 40), table_contract)
    assert len(found) == len(found.inputs) == 40
    assert set(found.labels) == {0, 1}


def test_text_is_taken_as_it_stands(tmp_path: Path, text_contract: Contract) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('note,outcome\n"A line,\nand ""another"".",0\nNA,1\n,1\n', encoding="utf-8")
    found = records.read(path, text_contract)
    assert found.inputs == ['A line,\nand "another".', "NA", ""]


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_byte_order_marks(
    tmp_path: Path, table_contract: Contract, ends: str, mark: bytes
) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(mark + (HEADER + "71,yes,1\n").replace("\n", ends).encode())
    assert records.read(path, table_contract).inputs == [(1, 0)]


def test_a_missing_file_lists_its_neighbours(tmp_path: Path, table_contract: Contract) -> None:
    for name in ("b.csv", "a.csv", "notes.doc"):
        (tmp_path / name).touch()
    with pytest.raises(DataError) as caught:
        records.read(tmp_path / "nots.csv", table_contract)
    assert "nots.csv does not exist" in str(caught.value)
    assert str(caught.value).endswith("CSV files in that folder: a.csv, b.csv.")
    assert (caught.value.code, caught.value.exit_code) == ("E301", 1)
    with pytest.raises(DataError, match=r"does not exist\.$"):
        records.read(tmp_path / "no" / "such.csv", table_contract)


def test_a_missing_column_is_named_with_its_likeness(refused: Callable[..., DataError]) -> None:
    error = refused("agee,smoker,Outcome\n71,yes,1\n")
    assert error.code == "E302"
    for part in (
        "Column 'age' is not in notes.csv.",
        "Column 'outcome' is not in notes.csv.",
        "Rename the columns of the file",
    ):
        assert part in str(error)
    for part in ("Did you mean 'agee'?", "Did you mean 'Outcome'?", "agee, smoker, Outcome"):
        assert part in f"{error} {error.local}"


def test_a_missing_text_column(refused: Callable[..., DataError], text_contract: Contract) -> None:
    error = refused("notes,outcome\nx,1\n", text_contract)
    assert "Column 'note' is not in" in str(error)
    assert "Did you mean 'notes'?" in f"{error} {error.local}"


@pytest.mark.parametrize("raw", ["2", "", "ill", "1.1", "01", "-", "nan"])
def test_a_label_outside_the_set(refused: Callable[..., DataError], raw: str) -> None:
    error = refused(HEADER + f"71,yes,1\n20,no,{raw}\n")
    assert error.code == "E303"
    assert "column 'outcome' allows one of the contract's labels (0, 1): row 3." in str(error)
    assert error.local == f"row 3 has {raw!r}"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("Maria,yes,1", "column 'age' allows numbers or nothing: row 3."),
        ("71,often,1", "column 'smoker' allows yes, no or nothing: row 3."),
    ],
)
def test_a_value_outside_the_schema(
    refused: Callable[..., DataError], row: str, words: str
) -> None:
    error = refused(HEADER + f"71,yes,1\n{row}\n20,no,0\n")
    assert error.code == "E302"
    assert words in str(error)
    assert error.local in ("row 3 has 'Maria'", "row 3 has 'often'")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file(refused: Callable[..., DataError], content: str) -> None:
    error = refused(content)
    assert error.code == "E304"
    assert "no header" in str(error)


def test_a_file_with_a_header_only(refused: Callable[..., DataError]) -> None:
    error = refused(HEADER)
    assert error.code == "E304"
    assert "no rows" in str(error)


@pytest.mark.parametrize(
    "content",
    [
        HEADER.encode() + b"71,Andr\xe9,1\n",
        (HEADER + "71,yes,1\n").encode("utf-16"),
        (HEADER + "71,yes,1\n").encode("utf-16-le"),
        HEADER.encode() + b'71,"Maria K.,1\n',
        bytes(range(256)) * 4,
    ],
    ids=["latin-1", "utf-16", "utf-16 without a mark", "open quote", "binary"],
)
def test_no_utf8_csv(refused: Callable[..., DataError], content: bytes) -> None:
    error = refused(content)
    assert error.code == "E301"
    assert "Maria" not in f"{error}"


@pytest.mark.parametrize("row", ["71,yes", "71,yes,1,Maria K."])
def test_rows_of_another_width_are_refused(refused: Callable[..., DataError], row: str) -> None:
    error = refused(HEADER + row + "\n")
    assert error.code == "E302"
    assert "3 fields are expected: row 2" in str(error)
    assert "Maria" not in str(error)


def test_many_problems_are_ten_rows_and_a_count(refused: Callable[..., DataError]) -> None:
    error = refused(HEADER + "".join(f"P{i},yes,1\n" for i in range(25)))
    assert ": rows 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 15 more." in str(error)
    assert str(error).count("column 'age'") == 1
    assert "'P9'" in error.local
    assert "'P10'" not in error.local


def test_ten_problems_have_no_count(refused: Callable[..., DataError]) -> None:
    error = refused(HEADER + "x,yes,1\n" * 10)
    assert ": rows 2, 3, 4, 5, 6, 7, 8, 9, 10, 11." in str(error)


def test_one_kind_of_problem_does_not_hide_another(refused: Callable[..., DataError]) -> None:
    error = refused(HEADER + "Maria,yes,1\n" * 25 + "71,often,7\n")
    for what in ("column 'age'", "column 'smoker'", "column 'outcome'"):
        assert what in str(error)


def test_every_problem_of_a_row_is_told(refused: Callable[..., DataError]) -> None:
    """One round of corrections must do."""
    error = refused(HEADER + "Maria,often,7\n")
    for column in ("age", "smoker", "outcome"):
        assert f"column '{column}'" in str(error)
    for value in ("Maria", "often", "7"):
        assert repr(value) in error.local


def test_the_row_number_is_the_lines(refused: Callable[..., DataError]) -> None:
    assert ": row 5." in str(refused(HEADER + "71,yes,1\n\n\nMaria,yes,1\n"))


def test_no_value_stands_in_the_error(
    tmp_path_factory: pytest.TempPathFactory, table_contract: Contract
) -> None:
    folder = tmp_path_factory.mktemp("values")

    @FUZZ
    @given(
        st.lists(
            st.tuples(*[st.text(st.characters(exclude_categories=["Cs"]), max_size=6)] * 3),
            min_size=1,
            max_size=12,
        )
    )
    def check(rows: list[tuple[str, str, str]]) -> None:
        path = folder / "notes.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            file.write(HEADER)
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([f"§{c}" for c in r] for r in rows)
        with pytest.raises(DataError) as caught:
            records.read(path, table_contract)
        assert "§" not in str(caught.value)
        assert "§" not in repr(caught.value)
        assert "§" in caught.value.local

    check()


def test_any_bytes_are_records_or_refused(
    tmp_path_factory: pytest.TempPathFactory, table_contract: Contract
) -> None:
    path = tmp_path_factory.mktemp("bytes") / "notes.csv"
    pieces = st.sampled_from([b"71", b"yes", b"1", b",", b"\n", b'"', b"\r\n", b"\x00", b"\xff"])

    @FUZZ
    @given(st.lists(pieces | st.binary(max_size=3), max_size=20).map(b"".join), st.booleans())
    def check(content: bytes, header: bool) -> None:
        path.write_bytes(HEADER.encode() * header + content)
        try:
            found = records.read(path, table_contract)
        except DataError:
            return
        assert len(found.inputs) == len(found.labels) > 0

    check()


def test_a_file_without_a_header_does_not_show_its_first_record(
    refused: Callable[..., DataError],
) -> None:
    """What stands where the header should be may be a record: it is for the owner's eyes."""
    error = refused("Maria K.,yes,1\nJon D.,no,0\n")
    assert error.code == "E302"
    assert "Maria" not in str(error)
    assert "Maria" in error.local


def test_longer_rows_than_the_header_are_refused(refused: Callable[..., DataError]) -> None:
    """pandas takes the first field of such rows for an index and moves every value by one
    column; where the types fit, a site would train on them in silence."""
    refused(HEADER + "63,71,yes,1\n18,20,no,0\n")


def test_two_columns_of_one_name_are_refused(refused: Callable[..., DataError]) -> None:
    assert "'age'" in str(refused("age,age,smoker,outcome\n20,71,yes,1\n"))


def test_a_folder_is_not_a_missing_file(tmp_path: Path, table_contract: Contract) -> None:
    with pytest.raises(DataError) as caught:
        records.read(tmp_path, table_contract)
    assert "does not exist" not in str(caught.value)
