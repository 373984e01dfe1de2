"""The Flower app of a deployment: its run config is TOML whatever stands in a path."""

from __future__ import annotations

import tomllib
from pathlib import Path

from silotune.server.flower.app_bundle import write_app


def test_paths_with_quotes_and_backslashes(tmp_path: Path) -> None:
    contract = tmp_path / 'a "b" \\new' / "contract.toml"
    folder = write_app(
        tmp_path / "app", contract=contract, model=None, run="r1", runs=tmp_path / "runs"
    )
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    config = project["tool"]["flwr"]["app"]["config"]
    assert config["contract"] == str(contract.resolve())
    assert config["model"] == ""
