"""Differences of models: paired over test examples, between runs over seeds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from silotune.common.contract.contract import Contract
from silotune.common.models.factory import build
from silotune.server.rounds.evaluation import PublicTest
from silotune.simulations.datasets.split import TEST, public_files
from silotune.simulations.verdict.differences import (
    LEAST_GAIN,
    Difference,
    Figure,
    HeldOut,
    difference,
    figures,
)
from tests.simulations.verdict.models import auc_of, outputs_of, rows_of

LEAD = Difference(0.8, 0.7, 0.1, 0.0, (0.0, 0.2), None, None)


def figures_of(contract: Contract, rows: HeldOut, *outputs: Any, site: str = "") -> list[Figure]:
    return figures(contract.task, "auc", outputs, rows, site)


def test_both_models_are_judged_on_the_same_resamples(table_contract: Contract) -> None:
    """The error of a difference of like models is far less than that of either."""
    rows = rows_of(400)
    first, like, other = figures_of(
        table_contract,
        rows,
        outputs_of(rows, 1.0),
        outputs_of(rows, 1.02),
        outputs_of(rows, 1.0, seed=1),
    )
    one, two = difference("auc", [first], [like]), difference("auc", [first], [other])
    assert one is not None
    assert two is not None
    assert one.examples_error < 0.1 * two.examples_error
    assert two.examples_error == pytest.approx(np.sqrt(2) * first.resamples.std(), rel=0.15)
    assert two.examples_interval[0] < two.value < two.examples_interval[1]
    assert two.value == pytest.approx(first.value - other.value)


@pytest.mark.parametrize("skill", [0.8, 1.8])
def test_the_standard_error_is_that_of_other_rows(table_contract: Contract, skill: float) -> None:
    """What the bootstrap says of 229 rows is how AUCs of models on other 229 rows are spread."""
    rows, rng, labels = rows_of(229), np.random.default_rng(0), np.array([0] * 107 + [1] * 122)
    aucs = [roc_auc_score(labels, rng.normal(skill * labels)) for _ in range(400)]
    outputs = [np.stack([0 * labels, rng.normal(skill * labels)], 1) for _ in range(12)]
    found = figures_of(table_contract, replace(rows, labels=labels.tolist()), *outputs)
    errors = [float(figure.resamples.std()) for figure in found]
    assert np.mean(errors) == pytest.approx(np.std(aucs), rel=0.15)


def test_over_seeds_it_is_the_spread_of_the_runs(table_contract: Contract) -> None:
    ours, theirs = (
        [Figure(value, np.full(2000, value)) for value in values]
        for values in ((0.80, 0.82, 0.84), (0.70, 0.71))
    )
    found = difference("auc", ours, theirs)
    assert found is not None
    assert found.value == pytest.approx(0.115)
    assert found.seeds_error == pytest.approx(np.hypot(0.02 / np.sqrt(3), 0.01 / 2))
    reach = stats.t.ppf(0.975, 1) * found.seeds_error
    assert found.seeds_interval == pytest.approx((0.115 - reach, 0.115 + reach))
    assert "0.000 over test examples, 0.013 over seeds" in found.text
    assert found.error == found.seeds_error  # over test examples it is 0 here
    assert found.content()["over_seeds"]["standard_error"] == found.seeds_error
    one = difference("auc", ours, theirs[:1])
    assert one is not None
    assert one.seeds_error is None
    assert "seeds" not in one.text
    fixed = difference("auc", ours, theirs[:1], drawn=False)
    assert fixed is not None
    assert fixed.seeds_error == pytest.approx(0.02 / np.sqrt(3))


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (0.031, 0.015, "yes"),
        (0.029, 0.015, "cannot tell"),
        (0.0, 0.0, "no"),  # the same answers
        (0.005, 0.001, "yes"),  # little, and it is measured
        (0.004, 0.0025, "no"),
        (0.006, 0.0035, "cannot tell"),
        (-0.05, 0.02, "no"),
        (-0.01, 0.02, "cannot tell"),
    ],
)
def test_a_lead_is_measured_or_too_small_or_cannot_be_told(
    value: float, error: float, expected: str
) -> None:
    assert replace(LEAD, value=value, examples_error=error).status(LEAST_GAIN) == expected
    both = replace(LEAD, value=value, examples_error=0.6 * error, seeds_error=0.8 * error)
    assert both.status(LEAST_GAIN) == expected


def test_where_less_is_better_a_smaller_number_leads() -> None:
    ours, theirs = Figure(100.0, np.full(10, 100.0)), Figure(120.0, np.full(10, 120.0))
    found = difference("mae", [ours], [theirs])
    assert found is not None
    assert (found.first, found.second, found.value) == (100.0, 120.0, 20.0)


def test_rows_that_do_not_define_a_figure_have_no_difference(table_contract: Contract) -> None:
    rows = HeldOut([1] * 40, ["north"] * 20 + ["south"] * 20)
    found = figures_of(table_contract, rows, outputs_of(rows, 1.0), outputs_of(rows, 2.0))
    assert difference("auc", found[:1], found[1:]) is None


def test_of_a_site_its_own_rows_alone_count(table_contract: Contract) -> None:
    rows = rows_of(200)
    outputs = outputs_of(rows, 1.5)
    (found,) = figures_of(table_contract, rows, outputs, site="south")
    chosen = rows.of_site("south")
    own = HeldOut([rows.labels[row] for row in chosen], ["south"] * len(chosen))
    assert found.value == pytest.approx(auc_of(table_contract, own, outputs[chosen]))
    assert len(chosen) == 100


def test_the_rows_are_in_the_order_in_which_models_are_judged(
    table_contract: Contract, tmp_path: Path
) -> None:
    """A name that another begins with comes behind it as a file, and before it as a text."""
    (tmp_path / TEST).mkdir()
    for site, ages in (("VA", (20, 30)), ("VA Long Beach", (40,))):
        lines = "".join(f"{age},no,{int(age < 25)}\n" for age in ages)
        (tmp_path / TEST / f"{site}.csv").write_text(f"age,smoker,outcome\n{lines}")
    rows = HeldOut.read(tmp_path, table_contract)
    test = PublicTest(table_contract, build(table_contract, None), public_files(tmp_path, TEST))
    assert (rows.sites, rows.labels) == (test.groups, test.labels)
    assert rows.labels == [0, 1, 0]
