"""Alerts of a stream: real changes are found, where and which way; chance raises hardly any."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.common.errors import UsageError
from silotune.common.inference import drift


def stream(rng: np.random.Generator, *parts: tuple[float, int]) -> list[float]:
    return [float(rng.random() < share) for share, n in parts for _ in range(n)]


def test_a_change_is_found_with_its_place_and_both_shares() -> None:
    values = stream(np.random.default_rng(0), (0.1, 500), (0.5, 300))
    (found,) = drift.alerts({"fraud": values})
    assert found.label == "fraud"
    assert abs(found.since - 500) <= 15
    assert 500 < found.row <= 600  # within a hundred rows
    assert found.before == pytest.approx(0.1, abs=0.05)
    assert found.after == pytest.approx(0.5, abs=0.15)


def test_a_return_is_a_second_change_and_labels_are_apart() -> None:
    rng = np.random.default_rng(1)
    values = {
        "still": stream(rng, (0.3, 1200)),
        "burst": stream(rng, (0.05, 400), (0.6, 400), (0.05, 400)),
    }
    found = drift.alerts(values)
    assert [a.label for a in found] == ["burst", "burst"]
    assert found[0].before < found[0].after
    assert found[1].before > found[1].after
    assert abs(found[1].since - 800) <= 15


def test_chance_raises_fewer_alarms_than_the_bound_for_each_stream() -> None:
    """100 streams of 1,000 rows without a change. Looked at 125 times each, so delta = 0.01 by
    itself would allow more than one alarm a stream; ADWIN divides it."""
    rng = np.random.default_rng(2)
    raised = sum(
        len(drift.alerts({"x": stream(rng, (share, 1000))}))
        for share in np.linspace(0.02, 0.98, 100)
    )
    assert raised <= 3


def test_later_rows_change_no_alert() -> None:
    rng = np.random.default_rng(3)
    values = stream(rng, (0.2, 300), (0.8, 200), (0.4, 300))
    whole = drift.alerts({"x": values})
    assert whole
    for end in range(0, len(values), 97):
        assert drift.alerts({"x": values[:end]}) == [a for a in whole if a.row < end]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(0, 1), min_size=2 * drift.SHORTEST, max_size=120),
)
def test_the_change_point_is_that_of_least_squares(values: list[float]) -> None:
    x = np.array(values)
    found = drift.change_point(x)

    def squares(k: int) -> float:
        return float(((x[:k] - x[:k].mean()) ** 2).sum() + ((x[k:] - x[k:].mean()) ** 2).sum())

    best = min(squares(k) for k in range(drift.SHORTEST, len(x) - drift.SHORTEST + 1))
    assert squares(found) == pytest.approx(best, abs=1e-9)


def test_without_river_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match="pip install river"):
        drift.alerts({"x": [0.0]})
