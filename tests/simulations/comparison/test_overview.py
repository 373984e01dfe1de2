"""What `sim ls`, `sim show` and `data ls` say of recipes and data, and that it is what was
recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.cells import cell_len

from silotune.common.contract.compute import Performance
from silotune.simulations.comparison.duration import Duration, clock, file_of
from silotune.simulations.comparison.recipe import load_recipe, recipe_names
from silotune.simulations.datasets import catalog
from tests.conftest import Ran
from tests.test_layout import ROOT


@pytest.mark.parametrize("name", recipe_names())
def test_records_and_time_of_a_recipe_are_those_of_the_recorded_results(name: str) -> None:
    recorded = json.loads((ROOT / "simulations" / "studies" / "recipes.json").read_text())
    (found,) = [recipe for recipe in recorded["recipes"] if recipe["recipe"] == name]
    config, column = load_recipe(name).config, found["columns"]["epsilon-8"]
    assert config.records == sum(site["train"] + site["test"] for site in found["rows"])
    seconds = round(column["seconds"] / column["repeats"])
    measured = {key: column[key] for key in ("machine", "commit")} | {"seconds": seconds}
    recorded_facts = config.measured and config.measured.model_dump()
    assert recorded_facts == (measured if seconds else None)


def test_show_says_what_a_recipe_is(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SILOTUNE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    code, said, wrong = run("sim", "show", "heart-diagnosis")
    assert code == 0, wrong
    assert max(map(cell_len, said.splitlines())) <= 80
    shown = " ".join(said.split())
    for part in (
        "classification: no disease, disease; measured by AUC",
        "920 records are used; a run fetches it",
        "CC BY 4.0 (UCI Machine Learning Repository)",
        "4: Cleveland, Hungary, Switzerland, VA Long Beach",
        "all-MiniLM-L6-v2; trains LoRA r=2",
        "ε ≤ 8.00, δ = 0.0001 per record and site (exact composition)",
        "rounds 30",
        "federated-lora, alone, alone-tuned, federated-head",
        "37s for one run of federated-lora (x86_64, 2 cores, commit 30774eb+)",
    ):
        assert part in shown
    assert "GB of memory" not in shown
    recipe = load_recipe("heart-diagnosis")
    Duration(1.0, 2**31, "2026-11-30").keep(file_of(recipe.contract, Performance()))
    assert "2.0 GB of memory here on 2026-11-30" in " ".join(
        run("sim", "show", "heart-diagnosis")[1].split()
    )
    found = json.loads(run("sim", "show", "heart-diagnosis", "--json")[1])
    assert found["last_run"] == {"date": "2026-11-30", "memory_bytes": 2**31}
    assert found["sha256"] == recipe.contract.hash
    assert found["data"]["here"] is False


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_shown(name: str, run: Callable[..., Ran]) -> None:
    code, said, wrong = run("sim", "show", name)
    assert code == 0, wrong
    assert said.startswith(f"{name}  ")


def test_an_unknown_recipe_is_not_shown(run: Callable[..., Ran]) -> None:
    code, _, wrong = run("sim", "show", "hart-diagnosis")
    assert code == 2
    assert "Did you mean 'heart-diagnosis'" in wrong


def test_ls_has_records_and_times(run: Callable[..., Ran]) -> None:
    rows = json.loads(run("sim", "ls", "--json")[1])
    (heart,) = [row for row in rows if row["name"] == "heart-diagnosis"]
    assert (heart["records"], heart["seconds"]) == (920, 37)
    (line,) = [one for one in run("sim", "ls")[1].splitlines() if one.startswith("heart-")]
    assert "920 records" in line
    assert "37s" in line


def test_data_ls_has_sizes(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SILOTUNE_HOME", str(tmp_path))
    folder = tmp_path / "sources" / "heart-disease-uci"
    folder.mkdir(parents=True)
    (folder / "heart_disease_uci.csv").write_bytes(b"x" * 1_250_000)
    rows = {row["name"]: row for row in json.loads(run("data", "ls", "--json")[1])}
    assert rows["heart-disease-uci"]["bytes"] == 1_250_000
    assert rows["heart-disease-uci"]["download_bytes"] == 812_492
    assert rows["airline-tweets"]["bytes"] is None
    assert rows["banking77"]["download_bytes"] is None
    assert all(archive.size > 0 for archive in catalog.ARCHIVES.values())
    (line,) = [one for one in run("data", "ls")[1].splitlines() if one.startswith("heart-")]
    assert "on disk    1.2 · download   0.8" in line


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (200, "3m20s")]
)
def test_seconds_as_people_say_them(seconds: float, text: str) -> None:
    assert clock(seconds) == text
