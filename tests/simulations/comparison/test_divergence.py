"""A variant whose training diverges, or which fails otherwise, ends no comparison."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from silotune.common.contract import contract as contracts
from silotune.common.contract.contract import Contract
from silotune.common.errors import RunError, UsageError
from silotune.simulations.comparison.options import Options
from silotune.simulations.comparison.recipe import Recipe, recipe_of
from silotune.simulations.comparison.run import run
from silotune.simulations.comparison.run_result import RunResult
from silotune.simulations.execution import job as job_module
from silotune.simulations.execution.variants import Job
from silotune.simulations.verdict.headline import WORDS
from tests import tiny

Ran = tuple[int, str, str]
WILD = {"trains": "head", "rounds": 8, "sampling_rate": 1.0, "budget_share": 1.0, "head_lr": 1e4}
DIVERGED = "training diverged: "
REMEDY = "Lower head_lr and adapter_lr in the contract's [[phases]]."


@pytest.fixture
def contract() -> Contract:
    """Of a regression, whose gradients know no bound, at two sites."""
    sites = [{"name": "north"}, {"name": "south"}]
    return tiny.contract_of("regression", "one-hot", sites=sites, quorum=2)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "rows.csv", tiny.rows_of("regression", 80))


def with_wild_baselines(contract: Contract, table: Path) -> Recipe:
    """A recipe whose variants without DP have rates at which they diverge."""
    recipe = recipe_of(contract, "wild", table, None)
    config = recipe.config.model_copy(update={"variants": {"no-dp": {"phases": [WILD]}}})
    return replace(recipe, config=config)


def options_of(*variants: str) -> Options:
    return Options(repeats=2, baseline_repeats=2, processes=1, variants=list(variants))


def row_of(result: Any, name: str) -> Any:
    return next(variant for variant in result["variants"] if variant["name"] == name)


@pytest.mark.usefixtures("in_process")
def test_a_baseline_that_diverges_is_marked_and_the_others_are_reported(
    contract: Contract,
    table: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It left no result, no report, and E402."""
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path / "run"
    names = ("federated-lora", "federated-no-dp", "pooled-no-dp")
    run(with_wild_baselines(contract, table), options_of(*names), folder, "a test")
    result = json.loads((folder / "result.json").read_text())
    for name in names[1:]:
        row = row_of(result, name)
        assert (row["stopped"]["word"], row["stopped"]["code"]) == ("diverged", "E508")
        assert row["stopped"]["runs"] == row["repeats"] == 2
        assert DIVERGED in row["stopped"]["why"]
        assert REMEDY in row["stopped"]["why"]
        assert set(row["metrics"].values()) == set(row["sites"].values()) == {None}
        assert row["sites_mean"] is None
        (warning,) = [w for w in result["verdict"]["warnings"] if w.startswith(row["label"])]
        assert f"{row['label']} diverged in 2 of 2 repeats (E508). Run stopped at round" in warning
    main = row_of(result, "federated-lora")
    assert main["stopped"] is None
    assert main["metrics"]["r2"]["mean"] is not None
    assert result["verdict"]["word"] in {word for _, _, word in WORDS}
    shown = " ".join(capsys.readouterr().out.split())
    assert "diverged: federated-no-dp, repeat 1, Run stopped at round" in shown
    assert "Federated one-hot without DP diverged diverged diverged diverged ∞" in shown
    assert "adapter watch" in shown
    assert ">diverged<" in "".join((folder / "report.html").read_text().split())
    found = RunResult.load(folder).table()
    assert found["stopped"].to_dict() == {
        "majority": "",
        "federated-lora": "",
        "federated-no-dp": "diverged",
        "pooled-no-dp": "diverged",
    }
    assert found["r2"].isna().to_dict()["federated-no-dp"]
    assert "<td>diverged</td>" in RunResult.load(folder)._repr_html_()


@pytest.mark.usefixtures("in_process")
def test_with_the_contracts_clipping_its_rates_fit_without_noise(
    contract: Contract, table: Path, tmp_path: Path
) -> None:
    """The same rates without clipping: a price of privacy below zero, or none at all."""
    own = contract.changed(phases=[WILD | {"head_lr": 20.0}])
    recipe, names = recipe_of(own, "own", table, None), ("federated-no-dp", "pooled-no-dp")
    result = run(recipe, options_of(*names), tmp_path / "run", "a test", quiet=True)
    for name in names:
        row = row_of(result, name)
        assert (row["stopped"], row["private"], row["epsilon"]) == (None, False, None)
        assert row["label"].endswith("one-hot without noise")
        found = contracts.load(tmp_path / "run" / "variants" / f"{name}-0" / "contract.json")
        assert found.privacy.model_dump(include={"mode", "clip_only", "clip_norm"}) == {
            "mode": "none",
            "clip_only": True,
            "clip_norm": own.privacy.clip_norm,
        }
        assert (found.phases, found.aggregation) == (own.phases, own.aggregation)
    unclipped = recipe.config.model_copy(
        update={"variants": {"no-dp": {"phases": [WILD | {"head_lr": 20.0}]}}}
    )
    other = replace(recipe, config=unclipped)
    result = run(other, options_of(*names), tmp_path / "other", "a test", quiet=True)
    assert all(row_of(result, name)["stopped"] for name in names)


@pytest.mark.usefixtures("in_process")
def test_where_the_contract_itself_diverges_there_is_a_result_and_the_exit_code_is_1(
    contract: Contract, table: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    wild = contract.changed(phases=[WILD], privacy={"clip_norm": 1000.0})
    (tmp_path / "wild.json").write_text(wild.model_dump_json(exclude_none=True))
    words = ["sim", "run", tmp_path / "wild.json", f"data={table}", "processes=1", "repeats=1"]
    words += ["baseline_repeats=1", "variants=federated-lora", "--out", tmp_path / "run"]
    code, said, wrong = run(*words)
    assert code == 1, wrong
    shown = " ".join(said.split())
    assert "RESULT diverged" in shown
    assert "Warning: Federated DP one-hot diverged in 1 of 1 repeat (E508). Run stopped" in shown
    assert REMEDY in shown
    assert "adapter watch" not in shown  # there is none to watch
    found = RunResult.load(tmp_path / "run")
    assert found.content["verdict"]["word"] == "diverged"
    assert found.metrics["r2"] is None
    assert len(found.content["curve"]) < wild.rounds
    with pytest.raises(UsageError, match=r"released no adapter\. Run stopped at round"):
        _ = found.adapter
    report = (tmp_path / "run" / "report.html").read_text()
    assert '<p class="word">diverged</p>' in report
    assert REMEDY.replace("'", "&#39;") in report
    assert run(*words[:-2], "--json", "--out", tmp_path / "second")[0] == 1


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("error", [RunError("No room."), ZeroDivisionError("of a record: 17")])
def test_a_baseline_that_fails_otherwise_is_marked_and_the_contract_itself_raises(
    contract: Contract,
    table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    """What an unexpected failure says may be of a record: it stays on this machine."""
    original = job_module.run_job

    def run_job(job: Job, *more: Any) -> Any:
        if job.variant == failing:
            raise error
        return original(job, *more)

    failing = "pooled-no-dp"
    monkeypatch.setattr(job_module, "run_job", run_job)
    recipe, folder = recipe_of(contract, "own", table, None), tmp_path / "run"
    result = run(recipe, options_of("federated-lora", failing), folder, "a test", quiet=True)
    row = row_of(result, failing)
    assert row["stopped"]["word"] == "failed"
    trace = folder / "variants" / "pooled-no-dp-0" / "failure.txt"
    if isinstance(error, RunError):
        assert (row["stopped"]["code"], row["stopped"]["why"]) == (error.code, "No room.")
        assert not trace.exists()
    else:
        assert row["stopped"]["code"] == "E500"
        assert f"(ZeroDivisionError): {trace} says where." in row["stopped"]["why"]
        assert "17" in trace.read_text()
        assert "of a record" not in (folder / "result.json").read_text()
    assert row_of(result, "federated-lora")["metrics"]["r2"]
    failing = "federated-lora"
    with pytest.raises(type(error)):
        run(recipe, options_of(failing), tmp_path / "second", "a test", quiet=True)
