"""The table of recipes: which columns a recipe has, and that each is written when it is done."""

from __future__ import annotations

from typing import Any

import pytest

from silotune.client.operations.contract_plan import planned
from silotune.common.contract.head_facts import rule_warnings
from silotune.common.errors import ErrorCode, RunError
from silotune.common.planning import adapter_rule, head_rule
from silotune.simulations.comparison import recipe_table
from silotune.simulations.comparison.recipe import load_recipe, recipe_names
from silotune.simulations.comparison.recipe_table import COLUMNS, ColumnRuns, columns_of, markdown
from silotune.simulations.execution.variants import JobResult, Stopped
from tests import tiny

HEADS = [name for name in recipe_names() if load_recipe(name).contract.adapter is None]
KEPT = ("task", "input", "model", "sites", "quorum", "name")


def result_of(variant: str, repeat: int, **more: Any) -> JobResult:
    scores = {"": {"accuracy": 0.5 + repeat / 10}}
    return JobResult(variant, repeat, ("a", "b"), scores, (), 1.0, 0, 0, **more)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_s_plan_is_the_rule_s_and_nothing_else_changes(name: str) -> None:
    contract = load_recipe(name).at(3.0).contract
    found = planned(contract, None)
    assert found is not None
    assert not rule_warnings(found)
    (phase,) = found.phases
    assert (phase.trains, phase.rule) == ("head", head_rule.VERSION)
    assert all(getattr(found, key) == getattr(contract, key) for key in KEPT)
    assert found.privacy == contract.privacy.model_copy(
        update={"clip_norm": found.privacy.clip_norm}
    )
    assert planned(found, None) == found  # whatever rates a contract has


@pytest.mark.parametrize(("units", "phases"), [(10_000, 2), (20, 1)])
def test_an_adapter_s_plan_has_two_phases_where_there_is_room(units: int, phases: int) -> None:
    folder = tiny.folder_of("bert")
    contract = tiny.contract_of("classification", "bert", folder)
    contract = contract.changed(
        privacy={"mode": "dp", "epsilon": 8.0, "delta": 1e-6, "expected_units": units},
        sites=[{"name": name} for name in "abcd"],
        quorum=1,
    )
    found = planned(contract, folder)
    assert found is not None
    assert not rule_warnings(found)
    assert (found.adapter is None, len(found.phases)) == (phases == 1, phases)
    assert sum(phase.budget_share for phase in found.phases) == 1
    if phases == 2:
        head, both = found.phases
        assert head.budget_share == adapter_rule.HEAD_SHARE
        assert (both.rounds, both.sampling_rate) == (
            adapter_rule.ROUNDS,
            adapter_rule.SAMPLING_RATE,
        )
        assert both.adapter_lr
        assert both.head_lr == head.head_lr  # by its own noise it would be larger


def test_no_rule_plans_a_language_model() -> None:
    folder = tiny.folder_of("llama")
    assert planned(tiny.contract_of("language", "llama", folder), folder) is None


def test_no_rule_plans_methods_whose_iterates_are_not_averaged() -> None:
    folder = tiny.folder_of("bert")
    contract = tiny.contract_of("classification", "bert", folder)
    assert planned(contract, folder) is not None
    assert planned(contract.changed(aggregation={"method": "fedavg"}), folder) is None


def test_a_recipe_s_columns_are_those_that_are_named() -> None:
    recipe = load_recipe("credit-scoring")
    names = ["pooled", "epsilon-3", "computed-3", "computed-1"]
    found = columns_of(recipe, names, None)
    assert [column.variant.name for column in found] == names
    chosen, three, one = (column.variant.contracts[0].privacy.epsilon for column in found[1:])
    assert (chosen, three, one) == (3.0, 3.0, 1.0)
    assert len({column.asked for column in found}) == len(names)


def test_a_column_is_written_when_its_last_run_ends() -> None:
    written = []
    runs = ColumnRuns({"a": 2, "b": 1}, lambda name, own: written.append((name, len(own))))
    runs.done(result_of("a", 0))
    assert not written
    runs.done(result_of("b", 0))
    runs.done(result_of("a", 1))
    assert written == [("b", 1), ("a", 2)]


def test_a_run_that_stops_ends_the_table() -> None:
    runs = ColumnRuns({"a": 1}, lambda *_: None)
    with pytest.raises(RunError, match="a: values beyond"):
        runs.done(result_of("a", 0, stopped=Stopped(ErrorCode.DIVERGED, "values beyond 1e6")))


def test_a_missing_column_is_a_dash() -> None:
    figure = {"metrics": {"accuracy": {"mean": 0.5, "sd": 0.1}}, "repeats": 2}
    one = {"recipe": "r", "metric": "accuracy", "columns": {"pooled": figure}}
    header, line, cells = markdown({"recipes": [one]}).splitlines()
    assert header.count("|") == line.count("|") == cells.count("|") == len(COLUMNS) + 3
    assert cells == "| r | accuracy | 0.500 ± 0.100 |" + " – |" * (len(COLUMNS) - 1)
    assert len(recipe_table.EPSILONS) * 2 + 3 == len(COLUMNS)
