"""The verdict: no lead without a margin, and what must not be missed is said."""

from __future__ import annotations

import re
from typing import Any

import pytest

from silotune.common.contract.contract import Contract
from silotune.common.tasks.metrics import constant
from silotune.common.tokenization.token_lengths import Lengths
from silotune.simulations.verdict.verdict import verdict
from tests.simulations.verdict.models import Skills, rows_of, runs_of, temperature


def row(name: str, auc: float, *, sd: float = 0.002, own: float = 0.8) -> dict[str, Any]:
    cell = {"mean": auc, "sd": sd, "values": [auc]}
    return {
        "name": name,
        "label": f"Label of {name}",
        "main": name == "federated-lora",
        "private": "no-dp" not in name and name != "plain",
        "repeats": 3,
        "metrics": {"auc": cell, "loss": {"mean": 0.5, "sd": 0.0, "values": [0.5]}},
        "sites_mean": {"mean": own, "sd": 0.01},
        "sites": {"north": cell, "south": None},
    }


def words(
    rows: list[dict[str, Any]],
    contract: Contract,
    skills: Skills | None = None,
    *,
    metric: str = "auc",
    lengths: Lengths = Lengths(),  # noqa: B008 - frozen
    insecure: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """The verdict of rows of the table, and of models of these skills."""
    held_out = rows_of(400)
    runs = runs_of(held_out, skills or {"federated-lora": 1.5}, **more)
    same = constant(contract.task, held_out.labels)
    found = verdict(rows, runs, metric, contract, held_out, same, lengths, insecure=insecure)
    verdict_: dict[str, Any] = found["verdict"]
    return verdict_


def test_a_lead_within_the_error_of_the_rows_is_no_lead(table_contract: Contract) -> None:
    rows = [row("majority", 0.5), row("federated-lora", 0.91), row("federated-one-hot", 0.90)]
    skills = {"federated-lora": 1.5, "federated-one-hot": 1.4}
    text = " ".join(words(rows, table_contract, skills)["lines"])
    assert "The one-hot does not beat the DP one-hot regression" in text
    text = " ".join(words(rows, table_contract, skills | {"federated-one-hot": 0.5})["lines"])
    assert "beats the DP one-hot regression on this data: +0." in text
    assert "over test examples" in text
    assert "LoRA" not in text


def test_lora_is_named_where_it_is_trained(lora_contract: Contract) -> None:
    rows = [row("majority", 0.5), row("federated-lora", 0.91), row("federated-one-hot", 0.90)]
    skills = {"federated-lora": 1.5, "federated-one-hot": 0.5}
    assert "LoRA beats the DP one-hot" in " ".join(words(rows, lora_contract, skills)["lines"])


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


def test_the_headline_is_of_the_checklist_and_names_no_word_that_claims_more(
    table_contract: Contract,
) -> None:
    majority, main = row("majority", 0.5), row("federated-lora", 0.8)
    found = words([majority, main], table_contract)
    assert found["word"] == "learns"
    assert found["headline"].startswith("learns; ")
    assert [item["name"] for item in found["checklist"]] == [
        "constant",
        "alone",
        "alone-own",
        "calibrated",
        "budget",
        "baselines",
    ]
    none = words([majority, row("federated-lora", 0.505)], table_contract, {"federated-lora": -0.5})
    assert none["word"] == "learns nothing"
    assert "AUC is not better than always giving the same answer." in none["warnings"]
    one = words([majority, main], table_contract, classes=1)
    assert "only one class" in one["warnings"][0]
    assert "in 1 of 1 run." in one["warnings"][0]


def test_texts_behind_the_cut_are_the_cause_that_is_named(table_contract: Contract) -> None:
    rows = [row("majority", 0.5), row("federated-lora", 0.5)]
    behind = Lengths([0] * 9 + [60], 8, entities=240, lost=200, losing=60)
    found = words(rows, table_contract, lengths=behind, classes=1)
    assert any("does not read most of the entities" in w for w in found["warnings"])
    assert any("60 of 60 texts are longer than" in w for w in found["warnings"])
    assert not any("noise" in w for w in found["warnings"])
    few = Lengths([0] * 9 + [60], 8, entities=240, lost=20, losing=20)
    found = words(rows, table_contract, lengths=few, classes=1)
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
    said = [*found["lines"], *(item["detail"] for item in found["checklist"])]
    stated = [line for line in said if "ε" in line]
    assert stated
    for line in stated:
        assert all(word in line for word in ("δ", "per record", "exact composition"))


def test_noise_from_a_known_seed_has_no_epsilon_and_a_warning(table_contract: Contract) -> None:
    rows = [row("majority", 0.5), row("federated-lora", 0.8)]
    found = words(rows, table_contract, insecure=True)
    assert not any("ε" in line for line in found["lines"])
    assert found["word"] == "no guarantee"
    assert found["warnings"][0] == (
        "insecure_seed: the noise can be removed; this run gives no privacy."
    )


def test_where_less_is_better_a_smaller_number_leads(table_contract: Contract) -> None:
    def of(name: str, value: float) -> dict[str, Any]:
        found = row(name, 0.0)
        found["metrics"]["loss"] = {"mean": value, "sd": 1.0, "values": [value]}
        found["sites_mean"]["mean"] = value
        return found

    def verdict_of(main: float, alone: float, skills: Skills, **more: Any) -> dict[str, Any]:
        rows = [of("majority", 200.0), of("federated-lora", main), of("alone", alone)]
        return words(rows, table_contract, skills, metric="loss", **more)

    better = verdict_of(150.0, 170.0, {"federated-lora": 2.5, "alone": 0.4})
    assert [item["status"] for item in better["checklist"][:2]] == ["yes", "yes"]
    worse = verdict_of(150.0, 140.0, {"federated-lora": 0.8, "alone": 3.0})
    assert [item["status"] for item in worse["checklist"][:2]] == ["yes", "no"]
    assert any("no measurable gain" in line for line in worse["warnings"])
    nothing = verdict_of(199.0, 210.0, {"federated-lora": 0.2}, sharpness=20.0)
    assert nothing["word"] == "learns nothing"  # a loss above that of a constant answer


def test_calibration_is_said_with_the_loss_of_a_constant_answer(table_contract: Contract) -> None:
    rows = [row("majority", 0.5), row("federated-lora", 0.8)]
    found = words(rows, table_contract, sharpness=4.0, calibration=temperature(4.0))
    (said,) = [line for line in found["lines"] if line.startswith("Calibration")]
    assert re.fullmatch(
        r"Calibration by 40 public rows that no figure uses: temperature 4\.00; log loss "
        r"(\S+) → (\S+) \(a constant answer: 0\.693\), calibration error (\S+) → (\S+)\.",
        said,
    )
    numbers = [float(number) for number in re.findall(r"(\d\.\d+) → (\d\.\d+)", said)[0]]
    assert numbers[0] > numbers[1]
    assert "Calibration: none." in words(rows, table_contract)["lines"]
