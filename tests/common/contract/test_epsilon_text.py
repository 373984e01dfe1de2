"""A small ε is not shown as none."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.common.contract.privacy import epsilon_text
from tests.conftest import Ran


@pytest.mark.parametrize(
    ("epsilon", "text"),
    [
        (8.0, "8.00"),
        (0.5, "0.50"),
        (0.1, "0.10"),
        (0.04, "0.040"),
        (0.004, "0.0040"),
        (0.00012, "0.00012"),
        (0.0, "0.00"),
        (math.inf, "∞"),
    ],
)
def test_digits(epsilon: float, text: str) -> None:
    assert epsilon_text(epsilon) == text


@settings(deadline=None, derandomize=True, database=None)
@given(st.floats(1e-9, 1e4))
def test_what_is_read_is_within_a_twentieth(epsilon: float) -> None:
    assert float(epsilon_text(epsilon)) == pytest.approx(epsilon, rel=0.051)


def test_a_plan_with_a_small_epsilon_says_it(run: Callable[..., Ran]) -> None:
    code, out, err = run(
        "privacy",
        "plan",
        "--epsilon",
        "0.004",
        "--delta",
        "1e-6",
        "--sampling-rate",
        "0.25",
        "--steps",
        "30",
    )
    assert code == 0, err
    assert "ε 0.0040 (exact composition)" in out
