"""What a workbook may have lost is refused, and what is left is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from silotune.common.data import records
from silotune.common.errors import DataError

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
