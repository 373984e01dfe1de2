"""Each item of the checklist on models that are made to hold, not to hold, and to leave it open."""

from __future__ import annotations

import json
from typing import Any

import pytest

from silotune.common.contract.contract import Contract
from silotune.common.data.calibration_rows import LARGEST_SHARE, LEAST, SHARE
from silotune.common.tasks.resampling import RESAMPLES
from silotune.server.report.formatting import MARKS
from silotune.simulations.verdict.calibration import HIGHEST_SLOPE, LOWEST_SLOPE
from silotune.simulations.verdict.checklist import LABELS
from silotune.simulations.verdict.differences import ERRORS, LEAST_GAIN
from silotune.simulations.verdict.headline import WORDS, headline, word
from tests.simulations.verdict.models import SITES, Skills, items_of, rows_of, temperature
from tests.test_readme import ROOT

GOOD = {"federated-lora": 1.5}


@pytest.mark.parametrize(
    ("n", "skill", "expected"),
    [(400, 1.5, "yes"), (2000, -0.1, "no"), (80, 0.2, "cannot tell"), (4000, 0.2, "yes")],
)
def test_better_than_a_constant_answer(
    table_contract: Contract, n: int, skill: float, expected: str
) -> None:
    """More rows turn what cannot be told into a decision, of the same model."""
    item = items_of(table_contract, rows_of(n), {"federated-lora": skill})["constant"]
    assert item.status == expected
    assert "against 0.500" in item.detail
    assert "over test examples" in item.detail


def test_a_model_that_always_says_the_same_is_no_better_than_the_majority(
    table_contract: Contract,
) -> None:
    rows = rows_of(50)
    found = items_of(
        table_contract, rows, {"federated-lora": 0.0}, metric="accuracy", sharpness=0.0
    )
    assert found["constant"].status == "no"
    assert found["constant"].figures["difference"] == 0


@pytest.mark.parametrize(
    ("n", "alone", "expected"),
    [
        (1200, 0.3, "yes"),
        (1200, 2.5, "no"),
        (60, 1.2, "cannot tell"),
    ],
)
def test_better_than_each_site_alone(
    table_contract: Contract, n: int, alone: float, expected: str
) -> None:
    skills: Skills = {"federated-lora": [1.5, 1.5], "alone": [alone, alone]}
    found = items_of(table_contract, rows_of(n), skills)
    for name in ("alone", "alone-own"):
        assert found[name].status == expected
        assert set(found[name].figures["sites"]) == set(SITES)
        assert "over seeds" in found[name].detail


def test_the_better_of_a_sites_own_models_is_compared_and_one_site_is_enough_for_no(
    table_contract: Contract,
) -> None:
    skills = {"federated-lora": 1.5, "alone": 0.2, "alone-tuned": 2.8}
    assert items_of(table_contract, rows_of(1200), skills)["alone"].status == "no"


def test_a_site_whose_rows_define_nothing_is_named(table_contract: Contract) -> None:
    rows = rows_of(800)
    labels = [
        1 if site == "south" else label for site, label in zip(rows.sites, rows.labels, strict=True)
    ]
    rows = type(rows)(labels, rows.sites)
    found = items_of(table_contract, rows, {"federated-lora": 1.5, "alone": 0.1})
    assert "not defined for south" in found["alone-own"].detail
    assert set(found["alone-own"].figures["sites"]) == {"north"}


@pytest.mark.parametrize(
    ("n", "head", "expected"), [(1500, 0.8, "yes"), (1500, 2.2, "no"), (60, 1.3, "cannot tell")]
)
def test_better_than_the_dp_head(
    lora_contract: Contract, n: int, head: float, expected: str
) -> None:
    skills = {"federated-lora": 1.5, "federated-head": head}
    assert items_of(lora_contract, rows_of(n), skills)["head"].status == expected


def test_what_was_not_run_cannot_be_told_and_what_does_not_apply_is_left_out(
    lora_contract: Contract, table_contract: Contract
) -> None:
    rows = rows_of(200)
    found = items_of(lora_contract, rows, GOOD)
    for name, variant in (("head", "federated-head"), ("alone", "alone"), ("alone-own", "alone")):
        assert found[name].status == "cannot tell"
        assert found[name].detail == f"variant {variant} was not run"
    assert found["baselines"].status == "cannot tell"
    assert "head" not in items_of(table_contract, rows, GOOD)
    other = items_of(lora_contract, rows, {"federated-head": 1.5}, main="federated-head")
    assert set(other) == {"constant", "calibrated", "budget"}
    one = table_contract.changed(sites=[{"name": "north"}], quorum=1)
    assert not {"alone", "alone-own"} & set(items_of(one, rows, GOOD))


@pytest.mark.parametrize(
    ("n", "sharpness", "expected"),
    [(6000, 1.0, "yes"), (6000, 3.0, "no"), (100, 1.0, "cannot tell")],
)
def test_calibrated(table_contract: Contract, n: int, sharpness: float, expected: str) -> None:
    item = items_of(table_contract, rows_of(n), GOOD, sharpness=sharpness)["calibrated"]
    assert item.status == expected
    assert "of outputs that were not calibrated" in item.detail


def test_it_is_the_calibrated_outputs_that_count(table_contract: Contract) -> None:
    rows = rows_of(6000)
    found = items_of(table_contract, rows, GOOD, sharpness=3.0, calibration=temperature(3.0))
    assert found["calibrated"].status == "yes"
    assert "not calibrated" not in found["calibrated"].detail
    worse = items_of(table_contract, rows, GOOD, sharpness=1.0, calibration=temperature(0.3))
    assert worse["calibrated"].status == "no"


@pytest.mark.parametrize(
    ("more", "expected", "detail"),
    [
        ({}, "yes", "ε 7.90 of 8.00 per record, δ 0.001 (exact composition)"),
        ({"epsilon": {"north": 7.0, "south": 8.4}}, "no", "ε 8.40 of 8.00 per record"),
        ({"epsilon": {"north": 7.0, "south": None}}, "cannot tell", "what south has spent"),
        ({"insecure": True}, "no", "seed that is known"),
        ({"private": False}, "no", "without DP"),
    ],
)
def test_within_the_budget(
    table_contract: Contract, more: dict[str, Any], expected: str, detail: str
) -> None:
    contract = table_contract.changed(privacy={"epsilon": 8.0, "delta": 1e-3})
    item = items_of(contract, rows_of(100), GOOD, **more)["budget"]
    assert item.status == expected
    assert detail in item.detail


def test_a_site_has_its_own_limit(table_contract: Contract) -> None:
    sites = [{"name": "north", "epsilon": 5.0}, {"name": "south"}]
    contract = table_contract.changed(sites=sites, privacy={"epsilon": 8.0})
    item = items_of(contract, rows_of(100), GOOD)["budget"]
    assert item.status == "no"
    assert "of 5.00" in item.detail


@pytest.mark.parametrize(
    ("n", "skills", "expected"),
    [
        (800, {"federated-no-dp": 1.8, "pooled-no-dp": 2.0, "plain": 1.0}, "yes"),
        (800, {"federated-no-dp": 1.8, "pooled-no-dp": 0.0}, "no"),
        (800, {"federated-no-dp": 0.7}, "no"),  # better than a constant, worse than with DP
        (2000, {"plain": -0.2}, "no"),
        (60, {"federated-no-dp": 0.4}, "cannot tell"),
    ],
)
def test_baselines_without_dp_mean_something(
    table_contract: Contract, n: int, skills: dict[str, float], expected: str
) -> None:
    skills = ({"federated-lora": 0.5} if n == 60 else GOOD) | skills
    assert items_of(table_contract, rows_of(n), skills)["baselines"].status == expected


def test_the_headline_follows_from_the_checklist(lora_contract: Contract) -> None:
    rows, skills = rows_of(1200), {"federated-lora": 1.5, "federated-head": 2.2}
    items = list(items_of(lora_contract, rows, skills, sharpness=3.0).values())
    assert headline(items) == (
        "learns; not better than the DP head; not calibrated; cannot tell whether it is better "
        "than sites alone or better than sites alone on their own rows"
    )
    assert word(items) == "learns"
    seeded = list(items_of(lora_contract, rows, skills, insecure=True).values())
    assert headline(seeded).startswith("no guarantee; better than a constant answer; ")
    few = list(items_of(lora_contract, rows_of(80), {"federated-lora": 0.2}).values())
    assert word(few) == "cannot tell whether it learns"
    none = list(items_of(lora_contract, rows_of(2000), {"federated-lora": -0.1}).values())
    assert word(none) == "learns nothing"


def test_the_page_shows_the_table_and_the_limits_by_which_it_is_made() -> None:
    page = (ROOT / "docs" / "explanation" / "verdict.md").read_text(encoding="utf-8")
    rows = [f"| {LABELS[name]} | {MARKS[holds]} | {word} |" for name, holds, word in WORDS]
    assert "\n".join(rows) in page
    for label in LABELS.values():
        assert f"| {label} | " in page
    assert f"{RESAMPLES:,} bootstrap resamples" in page
    assert f"less than {LEAST_GAIN}," in page
    assert f"between {LOWEST_SLOPE} and {HIGHEST_SLOPE} by two" in page
    assert ERRORS == 2
    assert f"A fifth of the public rows, and at least {LEAST}," in page
    assert (SHARE, LARGEST_SHARE) == (1 / 5, 1 / 3)


def test_all_of_it_is_json(lora_contract: Contract) -> None:
    skills: Skills = {"federated-lora": [1.5, 1.6], "alone": 1.0, "federated-no-dp": 1.8}
    for item in items_of(lora_contract, rows_of(200), skills).values():
        content = json.loads(json.dumps(item.content(), allow_nan=False))
        assert set(content) == {"name", "label", "status", "detail", "figures"}
