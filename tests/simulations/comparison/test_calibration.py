"""A run of each task sets public rows aside, calibrates by them, and reports on the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from silotune.common.contract.contract import Contract
from silotune.common.tasks.calibration import FILE, Calibration
from silotune.simulations.comparison.options import Options
from silotune.simulations.comparison.recipe import recipe_of
from silotune.simulations.comparison.run import run
from silotune.simulations.comparison.run_result import RunResult
from silotune.simulations.datasets.split import CALIBRATION, TEST, public_files
from tests import tiny

SITES = [{"name": "north"}, {"name": "south"}]


def ran(tmp_path: Path, kind: str, model: str, rows: int = 600, **options: Any) -> dict[str, Any]:
    """The result of a small run."""
    contract: Contract = tiny.contract_of(kind, model, sites=SITES, quorum=2)
    table = tiny.write(tmp_path / "rows.csv", tiny.rows_of(kind, rows))
    folder = None if model == "one-hot" else tiny.folder_of(model)
    chosen = Options(
        repeats=options.pop("repeats", 1),
        baseline_repeats=1,
        processes=1,
        model=folder,
        variants=options.pop("variants", ["federated-lora"]),
    )
    recipe = recipe_of(contract, "own", table, None)
    run(recipe, chosen, tmp_path / "run", "a test", quiet=True)
    result: dict[str, Any] = json.loads((tmp_path / "run" / "result.json").read_text())
    return result


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("classification", "one-hot"),
        ("multi-label", "one-hot"),
        ("regression", "one-hot"),
        ("tokens", "bert"),
    ],
)
def test_each_task_is_calibrated_by_rows_that_no_figure_uses(
    tmp_path: Path, kind: str, model: str
) -> None:
    result = ran(tmp_path, kind, model, repeats=2)
    public, counts = tmp_path / "run" / "public-rows", result["data"]["sites"]
    parts = {
        part: [
            row for file in public_files(public, part).values() for row in pd.read_csv(file)["id"]
        ]
        for part in (TEST, CALIBRATION)
    }
    assert len(parts[CALIBRATION]) == 40
    assert not set(parts[TEST]) & set(parts[CALIBRATION])
    trained = pd.read_csv(tmp_path / "run" / "split" / "pooled.csv")["id"]
    assert not set(trained) & {*parts[TEST], *parts[CALIBRATION]}
    for part in (TEST, CALIBRATION):
        assert sum(site[part] for site in counts) == len(parts[part])
    assert len(trained) + len(parts[TEST]) + 40 == 600
    content = result["calibration"]
    fitted = Calibration.model_validate(content["fitted"])
    assert fitted.kind == ("affine" if kind == "regression" else "temperature")
    assert fitted.rows == 40
    beside = (tmp_path / "run" / "variants" / "federated-lora-0" / FILE).read_bytes()
    assert Calibration.model_validate_json(beside) == fitted
    assert RunResult.load(tmp_path / "run").calibration == fitted
    main = next(variant for variant in result["variants"] if variant["main"])
    for name, found in main["metrics"].items():  # of the first run, and on the test rows alone
        before = content["before"]["metrics"][name]
        assert (found["values"][0] if found else None) == pytest.approx(before)
    lines = " ".join(result["verdict"]["lines"])
    assert "Calibration by 40 public rows that no figure uses" in lines
    constant = next(item for item in result["verdict"]["checklist"] if item["name"] == "constant")
    assert constant["figures"]["over_seeds"] is not None
    assert "Rows to calibrate by" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("kind", "model"), [("bi", "bert"), ("language", "llama")])
def test_without_calibration_it_is_said_and_the_checklist_is_there(
    tmp_path: Path, kind: str, model: str
) -> None:
    """Of few queries; and of a task that has none."""
    result = ran(tmp_path, kind, model, rows=300 if kind == "bi" else 600)
    assert result["calibration"]["fitted"] is None
    assert result["calibration"]["after"] is None
    assert RunResult.load(tmp_path / "run").calibration is None
    assert any("no calibration: it needs 120" in n for n in result["data"]["notes"]) == (
        kind == "bi"
    )
    assert not list((tmp_path / "run").rglob(FILE))
    found = {item["name"]: item for item in result["verdict"]["checklist"]}
    assert set(found) >= {"constant", "alone", "calibrated", "budget"}
    if kind == "language":
        assert found["calibrated"]["status"] == "cannot tell"
        base, main = result["variants"]
        assert (base["label"], base["epsilon"]) == ("The base model as it is", None)
        metric = result["metric"]["name"]
        assert found["constant"]["figures"]["second"] == base["metrics"][metric]["mean"]
        assert base["metrics"]["loss"]["mean"] != main["metrics"]["loss"]["mean"]
        assert f"base model {base['metrics'][metric]['mean']:.3f}" in result["verdict"]["lines"][0]
    assert "None was fitted" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.usefixtures("in_process")
def test_the_checklist_of_a_run_compares_the_runs_that_were_made(tmp_path: Path) -> None:
    names = ["federated-lora", "alone", "federated-no-dp", "plain"]
    result = ran(tmp_path, "classification", "one-hot", variants=names)
    items = {item["name"]: item for item in result["verdict"]["checklist"]}
    assert set(items["alone"]["figures"]["sites"]) == {"north", "south"}
    assert set(items["baselines"]["figures"]["variants"]) == {"federated-no-dp", "plain"}
    budget = items["budget"]["figures"]["sites"]
    assert all(site["epsilon"] <= site["limit"] for site in budget.values())
    main = next(variant for variant in result["variants"] if variant["main"])
    metric = result["metric"]["name"]
    assert items["constant"]["figures"]["first"] == pytest.approx(main["metrics"][metric]["mean"])
    assert result["verdict"]["headline"].startswith(result["verdict"]["word"])
    assert (tmp_path / "run" / "variants" / "federated-no-dp-0" / FILE).is_file()
