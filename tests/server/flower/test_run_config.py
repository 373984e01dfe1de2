"""Run configs of Flower's apps beside a contract: agreement passes, contradiction is refused."""

from __future__ import annotations

import pytest

from silotune.common.contract.contract import Contract
from silotune.common.errors import UsageError
from silotune.server.flower.run_config import check_run_config

AGREES: dict[str, object] = {
    "num-server-rounds": 3,
    "num-rounds": 3,
    "fraction-train": 1.0,
    "fraction-fit": 1,
    "fraction-evaluate": 0.0,
    "min-available-nodes": 2,
    "min-available-clients": 2,
    "min-train-nodes": 2,
    "min-fit-clients": 2,
    "min-evaluate-nodes": 0,
    "local-epochs": 0.5,
    "learning-rate": 0.5,
    "lr": 0.5,
    "batch-size": 25,
}


def test_what_agrees_with_the_contract_passes(table_contract: Contract) -> None:
    check_run_config(AGREES | {"folder": "app", "model": "", "site-epsilon": 16.0}, table_contract)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epsilon", 100.0),
        ("noise-multiplier", 0.0),
        ("delta", 0.5),
        ("sampling-rate", 1.0),
        ("num_server_rounds", 3),
    ],
)
def test_a_key_that_nothing_reads_is_refused(
    table_contract: Contract, key: str, value: object
) -> None:
    with pytest.raises(UsageError, match=rf"^{key} in .* remove it, .* folder, .* batch-size\.$"):
        check_run_config(AGREES | {key: value}, table_contract)


def test_a_product_may_differ_by_its_rounding(table_contract: Contract) -> None:
    phase = table_contract.phases[0].model_dump(mode="json", exclude_none=True)
    changed = table_contract.changed(
        phases=[phase | {"sampling_rate": 0.07}], privacy={"expected_units": 100}
    )
    check_run_config({"batch-size": 7}, changed)
    changed = table_contract.changed(phases=[phase | {"sampling_rate": 0.1, "local_steps": 3}])
    check_run_config({"local-epochs": 0.3}, changed)


@pytest.mark.parametrize("key", AGREES)
def test_each_key_is_held_against_the_contract(table_contract: Contract, key: str) -> None:
    with pytest.raises(UsageError, match=f"^{key} = 7 in the run config, and the contract"):
        check_run_config({key: 7}, table_contract)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("num-server-rounds", 5, "num-server-rounds = 5 .* rounds = 3"),
        ("fraction-train", 0.5, "fraction-train = 0.5 .* fraction of 1.0"),
        ("min-available-nodes", 1, "min-available-nodes = 1 .* quorum = 2"),
        ("learning-rate", 0.1, "learning-rate = 0.1 .* learning rates 0.5"),
        ("batch-size", "32", "batch-size = '32' .* batches of 25"),
        ("local-epochs", 2, "local-epochs = 2 .* pass 0.5 times"),
    ],
)
def test_a_refusal_names_both_values(
    table_contract: Contract, key: str, value: object, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        check_run_config({key: value}, table_contract)


def test_phases_with_different_rates_agree_with_no_single_one(lora_contract: Contract) -> None:
    with pytest.raises(UsageError, match=r"learning rates 0\.5 and 0\.1"):
        check_run_config({"learning-rate": 0.5}, lora_contract)
