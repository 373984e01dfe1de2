"""Lying sites do what they say, only they, and robust rules bear what the plain mean does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from silotune.common.errors import UsageError
from silotune.common.protocol import messages
from silotune.common.protocol.messages import Message, Receipt, Refusal, Update
from silotune.simulations.attacks.poisoning import (
    TRIGGERED,
    Poison,
    malicious_sites,
    poisoned_client,
    poisoned_rows,
)
from silotune.simulations.comparison.recipe import Recipe
from silotune.simulations.datasets.split import Split
from silotune.simulations.study.config import Study
from silotune.simulations.study.study import compare
from tests import tiny
from tests.simulations.datasets.test_partition import (
    contract_of,
    split_of,
    split_where_smokers_are_ill,
)


def rows_of(folder: Path, part: str, site: str) -> pd.DataFrame:
    return pd.read_csv(folder / part / f"{site}.csv", dtype=str, keep_default_na=False)


def test_one_site_has_other_labels_and_nobody_else(tmp_path: Path) -> None:
    source, contract = split_of(tmp_path / "rows"), contract_of()
    made = poisoned_rows(source, tmp_path / "new", contract, Poison(kind="labels"))
    before, after = (rows_of(f, "train", "a") for f in (source, made))
    assert (before["ill"] != after["ill"]).all()
    assert (before.drop(columns="ill") == after.drop(columns="ill")).all().all()
    for part, site in (("train", "b"), ("test", "a"), ("test", "b")):
        assert rows_of(made, part, site).equals(rows_of(source, part, site))
    assert not (made / TRIGGERED).exists()


def test_a_backdoor_is_in_half_the_rows_and_in_the_rows_it_is_measured_on(tmp_path: Path) -> None:
    source, contract = split_of(tmp_path / "rows"), contract_of()
    poison = Poison(kind="backdoor", trigger="smoker=yes", label="yes")
    made = poisoned_rows(source, tmp_path / "new", contract, poison)
    rows = rows_of(made, "train", "a")
    assert (rows["smoker"][::2] == "yes").all()
    assert (rows["ill"][::2] == "1").all()
    untouched = rows_of(source, "train", "a")
    assert rows.iloc[1::2].equals(untouched.iloc[1::2])
    nobody = poisoned_rows(
        source, tmp_path / "none", contract, poison.model_copy(update={"sites": 0})
    )
    assert rows_of(nobody, "train", "a").equals(untouched)
    fooled = rows_of(made, TRIGGERED, "b")
    assert rows_of(nobody, TRIGGERED, "b").equals(fooled)
    assert len(fooled) == (rows_of(source, "test", "b")["ill"] == "0").sum()
    assert set(fooled["ill"]) == {"1"}
    assert set(fooled["smoker"]) == {"yes"}


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    source, contract = split_of(tmp_path / "rows"), contract_of()
    with pytest.raises(UsageError, match="'perhaps' is not one of: no, yes"):
        poisoned_rows(
            source,
            tmp_path / "x",
            contract,
            Poison(kind="backdoor", trigger="smoker=yes", label="perhaps"),
        )
    with pytest.raises(UsageError, match="column=value"):
        poisoned_rows(
            source, tmp_path / "y", contract, Poison(kind="backdoor", trigger="cf", label="yes")
        )


def test_an_update_is_longer_or_turned_and_a_refusal_is_passed_on() -> None:
    header = Update(
        contract="0" * 64,
        site="a",
        run="r",
        round=1,
        attempt=1,
        request="0" * 64,
        epsilon=1.0,
        receipt=Receipt(sequence=1, head="0" * 64, signature="0" * 128),
        metrics={},
    )
    honest = messages.pack(Message(header, {"head.bias": np.array([1, -2], np.float32)}))
    for kind, expected in (("sign", [-5, 10]), ("scale", [5, -10])):
        poison = Poison.model_validate({"kind": kind, "factor": 5.0})
        found = messages.unpack(poisoned_client(lambda _: honest, poison)(b""))
        assert found.header == header
        np.testing.assert_array_equal(found.arrays["head.bias"], expected)
    refusal = messages.pack(
        Message(Refusal(contract="0" * 64, site="a", code="E201", incident="0" * 16))
    )
    assert poisoned_client(lambda _: refusal, Poison(kind="sign"))(b"") == refusal
    contract = contract_of()
    assert malicious_sites(contract, Poison(kind="sign")) == ["a"]
    assert malicious_sites(contract, Poison(kind="labels")) == malicious_sites(contract, None) == []


def test_the_plain_mean_is_carried_away_and_the_median_is_not(tmp_path: Path) -> None:
    """Seven sites of which one sends its update backwards and a hundred times over. Smokers are ill
    here, so that there is something to learn."""
    source = split_where_smokers_are_ill(tmp_path / "rows")
    base = contract_of().changed(
        phases=[{"trains": "head", "rounds": 6, "sampling_rate": 1.0, "head_lr": 2.0}],
        aggregation={"server_momentum": 0.0},
    )
    recipe = Recipe(
        "small", base, tiny.recipe_config("small", "accuracy"), {}, lambda _: Split([], source)
    )
    poison = {"kind": "sign", "factor": 100.0}
    robust = {"aggregation": {"robust": {"rule": "median"}}}
    study = Study.model_validate(
        {
            "title": "lies",
            "recipe": "small",
            "repeats": 1,
            "sites": 7,
            "epsilons": [float("inf")],
            "partitions": {"alike": {"kind": "iid"}},
            "variants": {
                "honest": {},
                "plain": {"poison": poison},
                "median": {"contract": robust, "poison": poison},
            },
        }
    )
    cells = compare(study, tmp_path / "out", 1, recipe)["cells"]
    accuracy = {cell["variant"]: cell["scores"]["accuracy"] for cell in cells.values()}
    assert accuracy["honest"] == accuracy["median"] == 1.0
    assert accuracy["plain"] < 0.5
