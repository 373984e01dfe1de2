"""A value falls into one public choice or is refused without being told; nothing else counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.common.contract.inputs import CategoryColumn, NumberColumn, TableInput
from silotune.common.data import featurize
from silotune.common.data.featurize import OutsideSchemaError, choice_of

FUZZ = settings(deadline=None, max_examples=100, derandomize=True, database=None)

AGE = NumberColumn(
    name="age", phrase="age", edges=(40, 50.5, 60), words=("a", "b", "c", "d"), lowest=1
)
PAIN = CategoryColumn(
    kind="category", name="pain", phrase="chest pain", values={"TA": "typical", "none": "no pain"}
)
TABLE = TableInput(columns=(AGE, PAIN))

choices = st.tuples(
    st.none() | st.integers(0, len(AGE.choices) - 1),
    st.none() | st.integers(0, len(PAIN.choices) - 1),
)


@pytest.mark.parametrize(
    ("raw", "choice"),
    [
        ("39.999", 0),
        ("40", 1),
        ("40.0", 1),
        ("  40 ", 1),
        ("50.4", 1),
        ("50.5", 2),
        ("60", 3),
        ("1e9", 3),
        ("1", 0),
        ("0.999", None),
        ("-5", None),
        ("", None),
        ("  ", None),
        ("nan", None),
        ("NaN", None),
        ("4e1", 1),
        ("+40", 1),
    ],
)
def test_an_edge_belongs_to_the_bin_above_it(raw: str, choice: int | None) -> None:
    assert choice_of(AGE, raw) == choice


def test_without_lowest_any_number_counts() -> None:
    column = NumberColumn(name="t", phrase="t", edges=(0,), words=("below", "above"))
    assert [choice_of(column, raw) for raw in ("-1e300", "-0.1", "0")] == [0, 0, 1]


@FUZZ
@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6, unique=True).map(sorted),
)
def test_a_number_passes_as_many_edges_as_it_reaches(value: float, edges: list[float]) -> None:
    column = NumberColumn(
        name="x", phrase="x", edges=tuple(edges), words=tuple(map(str, range(len(edges) + 1)))
    )
    assert choice_of(column, repr(value)) == sum(edge <= value for edge in edges)


def test_categories_match_exactly() -> None:
    assert [choice_of(PAIN, raw) for raw in ("TA", " none ", "")] == [0, 1, None]
    for raw in ("ta", "typical", "TA,none", "non"):
        with pytest.raises(OutsideSchemaError):
            choice_of(PAIN, raw)


@pytest.mark.parametrize("raw", ["1_030", "inf", "-Infinity", "+nan", "1e999", "1,5", "٤٠", "0x1f"])
def test_what_is_no_number_of_a_table_is_refused(raw: str) -> None:
    with pytest.raises(OutsideSchemaError):
        choice_of(AGE, raw)


@pytest.mark.parametrize(
    ("column", "allowed"), [(AGE, "numbers or nothing"), (PAIN, "TA, none or nothing")]
)
def test_a_value_outside_names_the_column_and_the_allowed(
    column: NumberColumn | CategoryColumn, allowed: str
) -> None:
    with pytest.raises(OutsideSchemaError) as caught:
        choice_of(column, "Maria K., 63")
    assert str(caught.value) == f"column '{column.name}' allows {allowed}"
    assert (caught.value.column, caught.value.value) == (column.name, "Maria K., 63")


@FUZZ
@given(st.text(max_size=12), st.sampled_from([AGE, PAIN]))
def test_no_value_stands_in_the_error(text: str, column: NumberColumn | CategoryColumn) -> None:
    raw = f"§{text}§"
    with pytest.raises(OutsideSchemaError) as caught:
        choice_of(column, raw)
    assert "§" not in str(caught.value)
    assert "§" not in repr(caught.value)
    assert caught.value.value == raw.strip()


@FUZZ
@given(st.text(max_size=20), st.sampled_from([AGE, PAIN]))
def test_any_text_is_a_choice_or_refused(text: str, column: NumberColumn | CategoryColumn) -> None:
    try:
        choice = choice_of(column, text)
    except OutsideSchemaError:
        return
    assert choice is None or 0 <= choice < len(column.choices)


def test_text_names_each_column_once() -> None:
    assert featurize.to_text(TABLE, (2, 0)) == "age: c. chest pain: typical."
    assert featurize.to_text(TABLE, (None, 1)) == "age: unknown. chest pain: no pain."


def test_an_empty_word_for_missing_leaves_the_column_out() -> None:
    quiet = TableInput(columns=(AGE, PAIN), missing="")
    assert featurize.to_text(quiet, (None, 0)) == "chest pain: typical."
    assert featurize.to_text(quiet, (None, None)) == ""


@FUZZ
@given(choices)
def test_texts_of_different_rows_differ(row: tuple[featurize.Choice, ...]) -> None:
    for other in [(None, None), (0, 0), (3, 1)]:
        same = featurize.to_text(TABLE, row) == featurize.to_text(TABLE, other)
        assert same == (row == other)


def test_a_row_must_have_every_column() -> None:
    with pytest.raises(ValueError, match="shorter"):
        featurize.to_text(TABLE, (1,))


@pytest.mark.parametrize("row", [(1,), (1, 1, 1)], ids=["short", "long"])
def test_a_one_hot_row_must_have_every_column(row: tuple[int, ...]) -> None:
    """As in `to_text`: otherwise a row loses a column, or its sum, in silence."""
    with pytest.raises(ValueError, match=r"shorter|longer"):
        featurize.to_one_hot(TABLE, [row])


@FUZZ
@given(st.lists(choices, max_size=8))
def test_one_hot(rows: list[tuple[featurize.Choice, ...]]) -> None:
    cells = featurize.to_one_hot(TABLE, rows)
    assert cells.shape == (len(rows), 4 + 1 + 2 + 1)
    assert cells.dtype == np.float32
    assert set(cells.ravel().tolist()) <= {0.0, 1.0}
    assert (cells.sum(axis=1) == len(TABLE.columns)).all()
    for row, cell in zip(rows, cells, strict=True):
        assert np.flatnonzero(cell).tolist() == [
            4 if row[0] is None else row[0],
            5 + (2 if row[1] is None else row[1]),
        ]


def test_synthetic_rows_are_the_seeds_alone() -> None:
    first = featurize.synthetic(TABLE, 50, 7)
    np.random.seed(1)
    assert featurize.synthetic(TABLE, 50, 7) == first
    assert featurize.synthetic(TABLE, 50, 8) != first
    assert len(first) == 50
    # Other edges or phrases are other words, not other draws.
    reworded = AGE.model_copy(update={"phrase": "years", "edges": (1.0, 2.0, 3.0)})
    assert featurize.synthetic(TableInput(columns=(reworded, PAIN)), 50, 7) == first


def test_synthetic_rows_are_uniform_over_choices_and_missing() -> None:
    rows: Any = featurize.synthetic(TABLE, 6000, 0)
    for place, column in enumerate(TABLE.columns):
        drawn = [row[place] for row in rows]
        kinds = [None, *range(len(column.choices))]
        assert set(drawn) == set(kinds)
        for kind in kinds:
            # Five standard deviations of a binomial count.
            expected = len(rows) / len(kinds)
            assert abs(drawn.count(kind) - expected) < 5 * expected**0.5
    pairs = {(a is None, b is None) for a, b in rows}
    assert len(pairs) == 4


def test_no_synthetic_rows() -> None:
    assert featurize.synthetic(TABLE, 0, 0) == []
