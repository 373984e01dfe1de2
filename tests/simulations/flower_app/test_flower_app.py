"""The Flower app of a recipe: its folder, and its apps on Flower's grid without Ray's actors."""

from __future__ import annotations

import importlib.util
import json
import math
import stat
import tomllib
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.serverapp import Grid

from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.common.contract import contract as contracts
from silotune.common.errors import ErrorCode, RunError, UsageError
from silotune.server.storage.run_store import RunStore
from silotune.simulations.cli import sim_flower_app
from silotune.simulations.comparison.recipe import load_recipe
from silotune.simulations.execution.flower_engine import simulate
from silotune.simulations.flower_app.app_folder import write_app
from silotune.simulations.flower_app.sites import lifetime_epsilon
from silotune.simulations.flower_app.sockets import socket_folder

pytestmark = pytest.mark.download


def write(folder: Path, sites: int = 2, rounds: int = 2) -> str:
    recipe = load_recipe("heart-diagnosis")
    return write_app(recipe, "federated-one-hot", rounds, sites, folder)


def part(folder: Path, name: str) -> ModuleType:
    """A module of the app's folder, as Flower loads it."""
    spec = importlib.util.spec_from_file_location(name, folder / "silotune_app" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flwr_run(folder: Path, nodes: int, **changes: Any) -> int:
    """Run the app with that many simulated nodes; returns the number of the run."""
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    config, runs = project["tool"]["flwr"]["app"]["config"] | changes, list[int]()
    server = part(folder, "server_app")

    def serve(grid: Grid) -> None:
        runs.append(grid.run.run_id)
        context = Context(grid.run.run_id, 1, {}, RecordDict(), config)
        server.app(grid, context)

    try:
        simulate(serve, part(folder, "client_app").app, nodes)
    finally:
        assert not socket_folder(runs[0]).exists()
    return runs[0]


def charges(folder: Path, site: str) -> list[tuple[str, int]]:
    place = folder / "sites" / site
    ledger = PrivacyLedger.open(place / "state", Keys.load(place / "keys"))
    return [(charge.run, charge.round) for charge in ledger.charges.values()]


def test_the_folder_is_a_flower_app(tmp_path: Path) -> None:
    folder = tmp_path / 'a "folder"'
    command = "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 flwr run . --stream"
    assert write(folder) == command
    assert f"    {command}\n" in (folder / "README.md").read_text(encoding="utf-8")
    assert command in str(sim_flower_app.help)
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    config = project["tool"]["flwr"]["app"]["config"]
    assert config == {
        "folder": str(folder),
        "model": "",
        "site-epsilon": 16.0,
        "num-server-rounds": 2,
    }
    contract = contracts.load(folder / "contract.json")
    assert [site.name for site in contract.sites] == ["cleveland", "hungary"]
    assert contract.secure_aggregation is None
    for site in contract.sites:
        assert site.public_key == Keys.load(folder / "sites" / site.name / "keys").public
        assert charges(folder, site.name) == []
        assert (folder / "records" / f"{site.name}.csv").is_file()


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's own
def test_flower_accepts_the_app_and_packs_no_record_and_no_key(tmp_path: Path) -> None:
    write(tmp_path / "app")
    with ZipFile(BytesIO(build_fab_from_disk(tmp_path / "app"))) as bundle:
        assert sorted(bundle.namelist()) == [
            ".info/CONTENT",
            "LICENSE",
            "README.md",
            "pyproject.toml",
            "silotune_app/__init__.py",
            "silotune_app/client_app.py",
            "silotune_app/server_app.py",
        ]


def test_masked_sites_are_trained_and_charged_on_disk(tmp_path: Path) -> None:
    folder = tmp_path / "app"
    assert '--federation-config "num-supernodes=3"' in write(folder, sites=3)
    contract = contracts.load(folder / "contract.json")
    assert contract.secure_aggregation is not None
    run = flwr_run(folder, 3)
    for site in contract.sites:
        assert charges(folder, site.name) == [(str(run), 1), (str(run), 2)]
    place = folder / "runs" / str(run)
    found = json.loads((place / "metrics.json").read_text())
    adapter = RunStore.open(place, contract).adapter()
    assert {name: tuple(shape) for name, shape in found["arrays"].items()} == {
        name: array.shape for name, array in adapter.items()
    }
    assert all(np.isfinite(array).all() for array in adapter.values())
    assert [found["train"][n]["sites"] for n in ("1", "2")] == [3, 3]
    spent = [found["train"][n]["epsilon"] for n in ("1", "2")]
    assert 0 < spent[0] < spent[1] <= contract.privacy.epsilon
    assert found["evaluate"]["2"]["auc"] > 0.6


def test_the_budget_of_a_site_lasts_over_runs(tmp_path: Path) -> None:
    folder = tmp_path / "app"
    write(folder)
    flwr_run(folder, 2, **{"site-epsilon": 8.0})
    with pytest.raises(RunError, match="cleveland: E210, hungary: E210"):
        flwr_run(folder, 2, **{"site-epsilon": 8.0})
    assert len(charges(folder, "hungary")) == 2


def test_what_contradicts_the_contract_is_refused_before_anything_is_charged(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "app"
    write(folder)
    with pytest.raises(UsageError, match=r"num-server-rounds = 9 .* rounds = 2"):
        flwr_run(folder, 2, **{"num-server-rounds": 9})
    with pytest.raises(UsageError, match=r"has 3 SuperNodes.* 2 sites.*num-supernodes=2"):
        flwr_run(folder, 3)
    assert charges(folder, "hungary") == []
    assert not (folder / "runs").exists()


def test_a_run_config_cannot_raise_the_budget_of_the_ledgers(tmp_path: Path) -> None:
    (tmp_path / "sites").mkdir()
    with pytest.raises(UsageError, match="make the app again"):
        lifetime_epsilon(tmp_path, 8.0)
    (tmp_path / "sites" / "site-epsilon").write_text("16.0\n")
    assert lifetime_epsilon(tmp_path, 16) == 16.0
    for asked in (16.1, math.inf, math.nan, 0, "8"):
        with pytest.raises(UsageError, match="at most 16"):
            lifetime_epsilon(tmp_path, asked)


def test_what_a_site_says_of_its_records_stays_in_a_file_of_the_owners(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "app"
    write(folder)
    file = folder / "records" / "hungary.csv"
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[3] = lines[3].replace("Male", "Marsian").replace("Female", "Marsian")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(RunError, match=r"^Site hungary does not take part \(E302\)") as failed:
        flwr_run(folder, 2)
    assert failed.value.code == ErrorCode.SCHEMA_MISMATCH
    assert failed.value.__suppress_context__
    said = "".join(capfd.readouterr()) + str(failed.value)
    assert "allows" not in said
    log = folder / "sites.log"
    assert "column 'sex' allows" in log.read_text(encoding="utf-8")
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--sites 5, and recipe heart-diagnosis has 4 sites"):
        write(tmp_path / "app", sites=5)
    (tmp_path / "app").mkdir()
    with pytest.raises(UsageError, match="is there already"):
        write(tmp_path / "app")
