"""The facts that a contract gives the rule for heads, and the warning where its numbers differ."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from silotune.client.privacy import accountant
from silotune.client.worker.secagg import check_bound
from silotune.common.contract import drafting
from silotune.common.contract.contract import Contract, parse
from silotune.common.contract.drafting import Answers, Column
from silotune.common.contract.head_facts import (
    facts_of,
    forecast_of,
    forecast_sentences,
    rule_warnings,
)
from silotune.common.errors import UsageError
from silotune.common.planning import head_rule
from silotune.common.planning.head_rule import HeadFacts, plan_head
from tests.conftest import Ran

ANSWERS: dict[str, Any] = {
    "name": "loans",
    "task": "classification",
    "label": "status",
    "labels": ("good", "bad"),
    "columns": (Column.parse("age: 25, 40"), Column.parse("home: rent, own")),
    "sites": ("a", "b", "c", "d"),
    "records": 500,
}
TEXT: dict[str, Any] = {"columns": (), "text": "message"}
RANKING: dict[str, Any] = {
    "task": "ranking",
    "others": ("1",),
    "columns": (),
    "query": "who",
    "pair": ("user", "item"),
}


def drafted(**more: Any) -> Contract:
    return parse(drafting.draft(Answers.model_validate(ANSWERS | more)))


def test_the_facts_of_a_table() -> None:
    contract = drafted(epsilon=3.0)
    assert facts_of(contract, contract.phases[0]) == HeadFacts(
        task="classification",
        outputs=2,
        feature_norm=2.0,
        units=500,
        sites=4,
        epsilon=3.0,
        delta=1e-4,
    )


def test_the_norm_of_texts_features() -> None:
    contract = drafted(**TEXT)
    (head, _) = contract.phases
    facts = facts_of(contract, head)
    assert facts is not None
    assert (facts.feature_norm, facts.budget_share) == (4.0, 0.25)
    for model, norm in (
        ({"standardise": {"norm": 3.0, "sentences": ["a", "b"]}}, 3.0),
        ({"standardise": None}, 1.0),
        ({"standardise": None, "normalise": False}, None),
    ):
        raw = contract.model_dump(mode="json") | {"model": contract.model.model_dump() | model}
        found = facts_of(Contract.model_validate(raw), head)
        assert (found and found.feature_norm) == norm


def test_where_the_rule_does_not_apply() -> None:
    for more in (TEXT | {"task": "language", "labels": ()}, RANKING):
        contract = drafted(**more)
        assert facts_of(contract, contract.phases[0]) is None
        assert all(phase.rule is None for phase in contract.phases)
    contract = drafted()
    assert facts_of(contract.changed(model={"hidden": 8}), contract.phases[0]) is None


@pytest.mark.parametrize(
    "more",
    [
        {},
        TEXT,
        {"task": "multi-label"},
        {"task": "regression", "labels": (), "bounds": (0.0, 1e5)},
        {"records": 100_000, "epsilon": 0.5},
    ],
)
def test_a_draft_has_the_rules_numbers(more: dict[str, Any]) -> None:
    contract = drafted(**more)
    head = contract.phases[0]
    facts = facts_of(contract, head)
    assert facts is not None
    plan = plan_head(facts)
    assert head.rule == head_rule.VERSION
    assert (head.trains, head.rounds, head.sampling_rate) == ("head", plan.rounds, 1.0)
    assert (head.head_lr, contract.privacy.clip_norm) == (plan.head_lr, plan.clip_norm)
    assert rule_warnings(contract) == ()


def test_a_draft_says_what_noise_alone_does() -> None:
    text = drafting.draft(Answers.model_validate(ANSWERS))
    contract = parse(text)
    head = contract.phases[0]
    facts = facts_of(contract, head)
    assert facts is not None
    assert head.head_lr is not None
    noise = head_rule.output_noise(facts, head.rounds, head.head_lr, contract.privacy.clip_norm)
    (said,) = re.findall(r"a standard deviation of ([0-9.e-]+)\.\n", text)
    assert float(said) == pytest.approx(noise, rel=0.06)


@pytest.mark.parametrize(
    ("section", "change", "named"),
    [
        ("phases", {"head_lr": 123.0}, "phases.1.head_lr"),
        ("phases", {"rounds": 7}, "phases.1.rounds"),
        ("phases", {"local_steps": 3}, "phases.1.local_steps"),
        ("phases", {"schedule": {"shape": "linear"}}, "phases.1.schedule"),
        ("privacy", {"clip_norm": 0.7}, "privacy.clip_norm"),
        ("privacy", {"epsilon": 0.5}, "phases.1.head_lr"),
        ("aggregation", {"server_momentum": 0.5}, "aggregation.server_momentum"),
    ],
)
def test_other_numbers_than_the_rules_are_named(
    section: str, change: dict[str, Any], named: str
) -> None:
    contract = drafted(records=100)
    if section == "phases":
        (head,) = contract.model_dump(mode="json", exclude_none=True)["phases"]
        contract = contract.changed(phases=[head | change])
    else:
        contract = contract.changed(**{section: change})
    (sentence,) = rule_warnings(contract)
    assert named in sentence
    assert sentence in contract.warnings
    without = [phase | {"rule": None} for phase in contract.model_dump(mode="json")["phases"]]
    assert rule_warnings(contract.changed(phases=without)) == ()


def test_the_advice_of_the_warning_is_right() -> None:
    """Numbers set as the sentence says: no warning is left."""
    contract = drafted().changed(privacy={"epsilon": 0.5})
    (sentence,) = rule_warnings(contract)
    (rate,) = re.findall(r"phases\.1\.head_lr = ([0-9.e+-]+) where", sentence)
    (head,) = contract.model_dump(mode="json", exclude_none=True)["phases"]
    assert rule_warnings(contract.changed(phases=[head | {"head_lr": float(rate)}])) == ()


def test_a_rule_of_another_version_is_a_warning() -> None:
    contract = drafted()
    (head,) = contract.model_dump(mode="json", exclude_none=True)["phases"]
    (sentence,) = rule_warnings(contract.changed(phases=[head | {"rule": 2}]))
    assert sentence.startswith("phases.1.rule = 2: this Silotune has rule 1")


def test_a_rule_where_it_cannot_apply() -> None:
    contract = drafted()
    (sentence,) = rule_warnings(contract.changed(model={"hidden": 8}))
    assert "Remove phases.1.rule" in sentence
    phases = [phase.model_dump(exclude_none=True) for phase in drafted(**TEXT).phases]
    with pytest.raises(UsageError, match="rule is of a phase that trains the head alone"):
        drafted(**TEXT).changed(phases=[phases[0], phases[1] | {"rule": 1}])


@pytest.mark.parametrize("records", [20, 500, 100_000])
@pytest.mark.parametrize("epsilon", [0.5, 8.0])
def test_a_drafts_updates_fit_the_bound_of_masked_ones(records: int, epsilon: float) -> None:
    """The bound that masks get once the roster's keys are known."""
    draft = drafted(records=records, epsilon=epsilon)
    keys = [{"name": site.name, "public_key": f"{at:064x}"} for at, site in enumerate(draft.sites)]
    masked = draft.changed(sites=keys).with_masks()
    assert masked.secure_aggregation is not None
    assert masked.secure_aggregation.bound == draft.update_bound
    check_bound(masked, accountant.plan(masked))


def test_a_bound_of_the_contracts_own_stays() -> None:
    draft = drafted(records=100_000)
    keys = [{"name": site.name, "public_key": f"{at:064x}"} for at, site in enumerate(draft.sites)]
    own = draft.changed(sites=keys, quorum=3, secure_aggregation={"bound": 99.0}).with_masks()
    assert own.secure_aggregation is not None
    assert own.secure_aggregation.bound == 99.0
    given = own.with_masks(300.0).secure_aggregation
    assert given is not None
    assert given.bound == 300.0


def test_which_plans_have_a_forecast() -> None:
    draft = drafted()
    phase = draft.phases[0].model_dump(mode="json", exclude_none=True) | {"rule": None}
    own = {"personal": "mean-regularised", "proximal_mu": 0.01}
    assert forecast_of(draft) is not None
    for changed in (
        {"privacy": {"mode": "none"}},
        {"phases": [phase | {"sampling_rate": 0.5}]},
        {"phases": [phase | own], "aggregation": {"server_momentum": 0.0}},
        {"phases": [phase | {"local_steps": 4, "adam": {"floor": 1e-3}}]},
        {"aggregation": {"robust": {"rule": "median"}}},
        {"model": {"hidden": 8}},
    ):
        assert forecast_of(draft.changed(**changed)) is None, changed
    # Several steps a round cost the budget of one, and go as far together.
    several = forecast_of(draft.changed(phases=[phase | {"local_steps": 4}]))
    once = forecast_of(draft)
    assert several is not None
    assert once is not None
    assert several.expected == once.expected
    assert several.noise == pytest.approx(4 * once.noise)


def test_a_forecast_counts_the_columns_values() -> None:
    """Of a one-hot table: three and two values are three features."""
    few = forecast_of(drafted(epsilon=0.5))
    many = forecast_of(
        drafted(epsilon=0.5, columns=[Column.parse(f"c{i}: 1, 2, 3, 4, 5") for i in range(20)])
    )
    assert few is not None
    assert many is not None
    assert few.expected > many.expected + 0.1
    text = forecast_of(drafted(epsilon=0.5, **TEXT))
    assert text is not None
    assert text.expected < many.expected


def test_a_longer_plan_says_which_phase_is_meant() -> None:
    draft = drafted()
    phase = draft.phases[0].model_dump(mode="json", exclude_none=True) | {"rule": None}
    two = draft.changed(phases=[phase | {"budget_share": 0.5}] * 2)
    assert "the model of this plan's first phase" in forecast_sentences(two)[0]
    assert "the model of this plan is" in forecast_sentences(draft)[0]


def test_the_commands_say_it(tmp_path: Path, run: Callable[..., Ran]) -> None:
    path = tmp_path / "loans.toml"
    path.write_text(drafting.draft(Answers.model_validate(ANSWERS)).replace("= 8.0", "= 0.5", 1))
    for command in ("show", "validate"):
        code, out, _ = run("contract", command, path)
        assert code == 0
        assert "phases.1.rule = 1 gives" in " ".join(out.split())
