"""Errors: what a process that gets one from another process reads."""

from __future__ import annotations

import pickle

import pytest

from silotune.common.errors import ContractError, DataError, ErrorCode, RefusalError, SilotuneError

ERRORS = [
    ContractError(["small.toml line 3: first.", "small.toml line 9: second."]),
    DataError("A row is wrong.", code=ErrorCode.SCHEMA_MISMATCH, local="line 7"),
    RefusalError("The budget is spent.", code=ErrorCode.BUDGET_EXCEEDED),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_survives_pickling(error: SilotuneError) -> None:
    found = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert vars(found) == vars(error)
