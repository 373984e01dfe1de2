"""`Contract.load` and `Contract.draft`, as a notebook calls them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from silotune import Contract
from silotune.common.contract import contract as contracts
from silotune.common.contract.drafting import Answers, Column, draft
from silotune.common.errors import ContractError, DataError, UsageError
from silotune.simulations.execution.roster_keys import with_secure_aggregation

HEADER = ["age", "home", "branch", "status"]
ANSWERS: dict[str, Any] = {
    "task": "classification",
    "label": "status",
    "labels": ["good", "bad"],
    "columns": {"age": [25, 30.5], "home": ["rent", "own"]},
    "sites": ["a", "b"],
    "records": 100,
}


def test_load_is_the_function_of_the_command_line(tmp_path: Path) -> None:
    text = draft(
        Answers(
            name="small", task="regression", label="cost", bounds=(0.0, 9.0), text="note",
            sites=("a",), records=50,
        )
    )  # fmt: skip
    file = tmp_path / "small.toml"
    file.write_text(text)
    assert Contract.load(file) == Contract.load(str(file)) == contracts.load(file)
    with pytest.raises(UsageError, match=r"none\.toml cannot be read"):
        Contract.load(tmp_path / "none.toml")
    file.write_text(text.replace("quorum", "quorm"))
    with pytest.raises(ContractError, match=r"Unknown key 'quorm' \(.*small\.toml:\d+\)"):
        Contract.load(file)


def test_draft_is_what_the_command_drafts() -> None:
    found = Contract.draft(HEADER, **ANSWERS, name="loans")
    answers = Answers(
        name="loans",
        task="classification",
        label="status",
        labels=("good", "bad"),
        columns=(Column.parse("age: 25, 30.5"), Column.parse("home: rent, own")),
        sites=("a", "b"),
        records=100,
    )
    assert found == contracts.parse(draft(answers))
    numbers = Contract.draft(HEADER, **ANSWERS | {"labels": [0, 1]})
    assert numbers.task.labels[1].values == ("1",)  # type: ignore[union-attr]


def test_a_draft_is_masked_when_its_sites_keys_are_known() -> None:
    """It has no keys, so `Contract.draft` cannot ask for secure aggregation itself."""
    found = Contract.draft(HEADER, **ANSWERS | {"sites": ["a", "b", "c"]})
    assert found.secure_aggregation is None
    masked, keys = with_secure_aggregation(found, 1)
    assert masked.secure_aggregation is not None
    assert set(keys) == {"a", "b", "c"}
    arguments = set(inspect.signature(Contract.draft).parameters) - {"header"}
    assert arguments == set(Answers.model_fields)


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"task": "clasification"}, ContractError, r"'task' must be .* Did you mean 'classific"),
        ({"labels": "good"}, UsageError, r"'labels' must be a list, got 'good'\. Write \['good'\]"),
        ({"labels": []}, ContractError, "needs its labels"),
        ({"columns": None}, ContractError, "name the column of text"),
        ({"columns": {"age": []}}, UsageError, "says nothing of a column"),
        ({"sites": []}, ContractError, "'sites' needs at least 1, has 0"),
        ({"records": 0}, ContractError, "'records' must be greater than or equal to 1, got 0"),
        ({"epsilon": -1.0}, ContractError, "'epsilon' must be greater than 0, got -1.0"),
        ({"label": "statu"}, DataError, r"Column 'statu' is not in the header\.\n"),
    ],
)
def test_wrong_answers_are_named(
    changed: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said) as caught:
        Contract.draft(HEADER, **ANSWERS | changed)
    if isinstance(caught.value, DataError):
        (note,) = caught.value.__notes__
        assert "Did you mean 'status'" in note
