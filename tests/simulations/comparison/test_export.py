"""A recipe as files for a deployment."""

from __future__ import annotations

from pathlib import Path

import pytest

from silotune.common.contract import contract as contracts
from silotune.common.data import records
from silotune.common.errors import UsageError
from silotune.simulations.comparison.export import export
from silotune.simulations.comparison.recipe import load_recipe

pytestmark = pytest.mark.download


def test_a_contract_without_keys_and_the_records_of_each_site(tmp_path: Path) -> None:
    recipe = load_recipe("heart-diagnosis")
    sites = export(recipe, "federated-one-hot", 5, tmp_path / "data")
    assert sites == ["cleveland", "hungary", "switzerland", "va-long-beach"]
    contract = contracts.load(tmp_path / "data" / "contract.json")
    assert contract.rounds == 5
    assert contract.privacy == recipe.contract.privacy
    assert [(s.name, s.public_key) for s in contract.sites] == [(name, None) for name in sites]
    rows = {f.stem: len(records.read(f, contract)) for f in (tmp_path / "data/records").iterdir()}
    assert set(rows) == set(sites)
    assert sum(rows.values()) + len(records.read(tmp_path / "data/test.csv", contract)) == 920
    assert sorted(f.name for f in (tmp_path / "data").iterdir()) == [
        "contract.json",
        "records",
        "test.csv",
    ]


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    recipe = load_recipe("heart-diagnosis")
    for variant, said in (
        ("federated-onehot", "Did you mean 'federated-one-hot'"),
        ("alone", "Known"),
    ):
        with pytest.raises(UsageError, match=said):
            export(recipe, variant, None, tmp_path / "data")
    (tmp_path / "data").mkdir()
    with pytest.raises(UsageError, match="is there already"):
        export(recipe, "federated-lora", None, tmp_path / "data")
