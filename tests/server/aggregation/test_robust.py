"""Robust rules: what an honest crowd says survives a few that say anything."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.common.contract.aggregation import Robust
from silotune.common.protocol.messages import Arrays
from silotune.server.aggregation import robust

FUZZ = settings(deadline=None, max_examples=40, derandomize=True, database=None)
RULES = ["krum", "multi-krum", "trimmed-mean", "median"]


def crowd(rng: np.random.Generator, honest: int) -> dict[str, Arrays]:
    """Changes near 1 in every entry."""
    return {
        f"h{k}": {
            "head.weight": (1 + 0.1 * rng.standard_normal((2, 4))).astype(np.float32),
            "head.bias": (1 + 0.1 * rng.standard_normal(2)).astype(np.float32),
        }
        for k in range(honest)
    }


def vectors(updates: dict[str, Arrays]) -> np.ndarray:
    return np.stack(
        [
            np.concatenate([updates[s][n].ravel() for n in sorted(updates[s])])
            for s in sorted(updates)
        ]
    ).astype(np.float64)


@FUZZ
@given(st.integers(0, 2**32 - 1), st.floats(-1e6, 1e6).filter(lambda x: abs(x - 1) > 20))
@pytest.mark.parametrize("rule", RULES)
def test_one_that_says_anything_cannot_carry_it_away(rule: str, seed: int, said: float) -> None:
    rng = np.random.default_rng(seed)
    updates = crowd(rng, 7)
    plain = vectors(updates)
    updates["m"] = {n: np.full_like(a, said) for n, a in updates["h0"].items()}
    found = robust.combined(updates, Robust(rule=rule))  # type: ignore[arg-type]
    values = np.concatenate([found[n].ravel() for n in sorted(found)])
    assert (values >= plain.min(axis=0) - 1e-5).all()
    assert (values <= plain.max(axis=0) + 1e-5).all()
    broken = np.mean([*plain, np.full(10, said)], axis=0)
    assert np.abs(broken - 1).max() > 1  # the mean is carried away


@FUZZ
@given(st.integers(0, 2**32 - 1), st.integers(1, 2))
def test_scores_and_trimmed_means_are_those_of_the_papers(seed: int, f: int) -> None:
    x = np.random.default_rng(seed).standard_normal((8, 5))
    for at, score in enumerate(robust.krum_scores(x, f)):
        others = np.delete(x, at, axis=0)
        distances = sorted(float(((x[at] - other) ** 2).sum()) for other in others)
        assert score == pytest.approx(sum(distances[: 8 - f - 2]))
    for column, mean in zip(x.T, robust.trimmed_mean(x, f), strict=True):
        assert mean == pytest.approx(np.mean(sorted(column)[f:-f]))


def test_a_long_update_is_cut_and_a_short_one_is_not() -> None:
    found = robust.cut(np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]), 1.0)
    np.testing.assert_allclose(found, [[0.6, 0.8], [0.3, 0.4], [0, 0]])
    updates = {
        "a": {"head.bias": np.array([30, 40], np.float32)},
        "b": {"head.bias": np.array([0, 0], np.float32)},
    }
    mean = robust.combined(updates, Robust(rule="norm", max_norm=1.0))["head.bias"]
    np.testing.assert_allclose(mean, [0.3, 0.4], rtol=1e-6)


def test_krum_is_one_of_the_updates_and_multi_krum_the_mean_of_most() -> None:
    updates = crowd(np.random.default_rng(0), 7)
    one = robust.combined(updates, Robust(rule="krum", byzantine=2))
    assert any(all((u[n] == one[n]).all() for n in u) for u in updates.values())
    scores = robust.krum_scores(vectors(updates), 2)
    most = vectors(updates)[np.argsort(scores)[:5]].mean(axis=0)
    found = robust.combined(updates, Robust(rule="multi-krum", byzantine=2))
    np.testing.assert_allclose(
        np.concatenate([found[n].ravel() for n in sorted(found)]), most, rtol=1e-6
    )


def test_too_few_updates_are_refused() -> None:
    with pytest.raises(ValueError, match="needs 5 updates"):
        robust.krum_scores(np.zeros((4, 2)), 1)
    with pytest.raises(ValueError, match="is none"):
        robust.trimmed_mean(np.zeros((2, 2)), 1)
