"""The verdict: no lead without a margin, and what must not be missed is said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from silotune.common.contract.contract import Contract
from silotune.common.tokenization.token_lengths import Lengths
from silotune.server.rounds.run import RoundRecord
from silotune.simulations.comparison.verdict import standard_error, verdict
from silotune.simulations.execution.variants import JobResult


def row(name: str, auc: float, *, sd: float = 0.002, own: float = 0.8) -> dict[str, Any]:
    cell = {"mean": auc, "sd": sd, "values": [auc]}
    return {
        "name": name,
        "label": f"Label of {name}",
        "main": name == "federated-lora",
        "repeats": 3,
        "metrics": {"auc": cell, "loss": {"mean": 0.5, "sd": 0.0, "values": [0.5]}},
        "sites_mean": {"mean": own, "sd": 0.01},
        "sites": {"north": cell, "south": None},
    }


def job(classes: int = 2, failed: dict[str, str] | None = None) -> JobResult:
    facts = RoundRecord(1, ("north",), failed or {}, {"north": 7.9}, 1, 1, 0.1)
    scores = {"": {"predicted_classes": classes}}
    return JobResult("federated-lora", 0, ("north",), scores, (facts,), 1.0, 1, 1)


def words(rows: list[dict[str, Any]], contract: Contract, **kind: Any) -> dict[str, Any]:
    return verdict(rows, [job(**kind)], "auc", contract, [0] * 107 + [1] * 122)


def test_a_lead_within_the_error_of_the_rows_is_no_lead(lora_contract: Contract) -> None:
    table_contract = lora_contract
    rows = [row("majority", 0.5), row("federated-lora", 0.91), row("federated-head", 0.90)]
    text = " ".join(words(rows, table_contract)["lines"])
    assert "LoRA does not beat the DP head" in text
    rows[2] = row("federated-head", 0.80)
    assert "LoRA beats the DP head" in " ".join(words(rows, table_contract)["lines"])


@pytest.mark.parametrize("name", ["federated-no-dp", "pooled-no-dp"])
def test_a_baseline_without_dp_that_is_no_measure_of_its_cost_is_a_warning(
    table_contract: Contract, name: str
) -> None:
    """At the majority class it gave a price of privacy of +0.196, without a word."""
    rows = [row("majority", 0.5), row("federated-lora", 0.8)]
    for auc, expected in (
        (0.505, f"Label of {name}: AUC is not better than label of majority. It says nothing of"),
        (0.785, f"Label of {name}: AUC is worse than with DP by 0.015. It says nothing of what"),
        (0.795, None),
        (0.9, None),
    ):
        found = words([*rows, row(name, auc)], table_contract)["warnings"]
        assert [w.startswith(str(expected)) for w in found] == ([True] if expected else [])
    noisy = row(name, 0.75, sd=0.06)
    assert not words([*rows, noisy], table_contract)["warnings"]


def test_a_plain_model_may_be_worse_but_not_learn_nothing(table_contract: Contract) -> None:
    rows = [row("majority", 0.5), row("federated-lora", 0.8)]
    assert not words([*rows, row("plain", 0.7)], table_contract)["warnings"]
    found = words([*rows, row("plain", 0.5)], table_contract)
    assert found["warnings"] == [
        "Label of plain: AUC is not better than label of majority. The records may be too few "
        "for it, or tell little about the answers."
    ]
    assert "plain model without DP 0.500" in found["lines"][0]


def test_the_verdict_words(table_contract: Contract) -> None:
    majority = row("majority", 0.5)
    assert words([majority, row("federated-lora", 0.505)], table_contract)["word"] == "useless"
    both = [majority, row("federated-lora", 0.8), row("alone", 0.82)]
    assert words(both, table_contract)["word"] == "weak"
    one = words([majority, row("federated-lora", 0.8)], table_contract, classes=1)
    assert one["word"] == "weak"
    assert "only one class" in one["warnings"][0]
    assert words([majority, row("federated-lora", 0.8)], table_contract)["word"] == "usable"


def test_texts_behind_the_cut_are_the_cause_that_is_named(table_contract: Contract) -> None:
    rows = [row("majority", 0.5), row("federated-lora", 0.5)]
    behind = Lengths([0] * 9 + [60], 8, entities=240, lost=200, losing=60)
    found = verdict(rows, [job(classes=1)], "auc", table_contract, [0, 1], 0, behind)
    assert any("does not read most of the entities" in w for w in found["warnings"])
    assert any("60 of 60 texts are longer than" in w for w in found["warnings"])
    assert not any("noise" in w for w in found["warnings"])
    few = Lengths([0] * 9 + [60], 8, entities=240, lost=20, losing=20)
    found = verdict(rows, [job(classes=1)], "auc", table_contract, [0, 1], 0, few)
    assert any("too much noise" in w for w in found["warnings"])
    assert any("20 of 240 entities" in w for w in found["warnings"])


def test_no_gain_on_own_rows_and_lost_sites_are_warnings(table_contract: Contract) -> None:
    rows = [row("majority", 0.5), row("federated-lora", 0.9, own=0.80), row("alone", 0.8, own=0.81)]
    found = words(rows, table_contract, failed={"south": "E501"})
    assert any("no measurable gain" in w for w in found["warnings"])
    assert any("without: south" in w for w in found["warnings"])
    assert "1 of 2 sites" in " ".join(found["lines"])


def test_an_epsilon_is_never_without_delta_unit_and_accountant(table_contract: Contract) -> None:
    found = words([row("majority", 0.5), row("federated-lora", 0.8)], table_contract)
    for line in found["lines"]:
        if "ε" in line:
            assert all(word in line for word in ("δ", "per record", "exact composition"))
    assert "ε 7.90 of 8.00 per record at each site" in " ".join(found["lines"])
    own = table_contract.changed(sites=[{"name": "north", "epsilon": 7.95}, {"name": "south"}])
    found = words([row("majority", 0.5), row("federated-lora", 0.8)], own)
    assert "of 8.00 per record at the site that spends most" in " ".join(found["lines"])


def test_noise_from_a_known_seed_has_no_epsilon_and_a_warning(table_contract: Contract) -> None:
    rows = [row("majority", 0.5), row("federated-lora", 0.8)]
    found = verdict(rows, [job()], "auc", table_contract, [0] * 107 + [1] * 122, insecure=True)
    assert not any("ε" in line for line in found["lines"])
    assert found["warnings"][0] == (
        "insecure_seed: the noise can be removed; this run gives no privacy."
    )


def test_where_less_is_better_a_smaller_number_leads(table_contract: Contract) -> None:
    def of(name: str, value: float) -> dict[str, Any]:
        found = row(name, 0.0)
        found["metrics"]["mae"] = {"mean": value, "sd": 1.0, "values": [value]}
        found["sites_mean"]["mean"] = value
        return found

    def verdict_of(main: float, alone: float) -> dict[str, Any]:
        rows = [of("majority", 200.0), of("federated-lora", main), of("alone", alone)]
        return verdict(rows, [job()], "mae", table_contract, [0.1, 0.2])

    assert verdict_of(150.0, 170.0)["word"] == "usable"
    assert verdict_of(150.0, 140.0)["word"] == "weak"
    assert verdict_of(199.0, 210.0)["word"] == "useless"
    assert not any("standard error" in line for line in verdict_of(150.0, 170.0)["lines"])
    assert any("no measurable gain" in line for line in verdict_of(150.0, 140.0)["warnings"])


def test_a_figure_without_a_known_error_has_no_standard_error(table_contract: Contract) -> None:
    sentence = "standard error"
    found = words([row("majority", 0.5), row("federated-lora", 1.0)], table_contract)
    assert sentence not in " ".join(found["lines"])
    found = words([row("majority", 0.5), row("federated-lora", 0.9)], table_contract)
    assert sentence in " ".join(found["lines"])
    one = words([row("majority", 0.5), row("federated-lora", 0.8)], table_contract, classes=1)
    assert "in 1 of 1 run." in one["warnings"][0]


def test_a_recipe_without_an_adapter_does_not_speak_of_lora(table_contract: Contract) -> None:
    rows = [row("majority", 0.5), row("federated-lora", 0.8), row("federated-one-hot", 0.9)]
    text = " ".join(words(rows, table_contract)["lines"])
    assert "LoRA" not in text
    assert "The one-hot does not beat" in text


@pytest.mark.parametrize("shift", [0.8, 1.8])
def test_the_standard_error_is_that_of_resampled_rows(shift: float) -> None:
    rng = np.random.default_rng(0)
    y = np.array([0] * 107 + [1] * 122)
    aucs = [roc_auc_score(y, rng.normal(shift * y)) for _ in range(400)]
    expected = standard_error("auc", float(np.mean(aucs)), [0] * 107 + [1] * 122)
    assert np.std(aucs) == pytest.approx(expected, rel=0.15)
