"""What a contract says that the rule for heads and the forecast need, and where its numbers are not
the rule's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from silotune.common.contract.inputs import PairInput, TableInput
from silotune.common.contract.model import EncoderModel, LanguageModel, OneHotModel
from silotune.common.contract.task import Language
from silotune.common.planning import head_rule
from silotune.common.planning.forecast import Forecast, forecast
from silotune.common.planning.head_rule import HeadFacts, plan_head
from silotune.common.planning.plan_facts import PlanFacts

if TYPE_CHECKING:
    from silotune.common.contract.contract import Contract
    from silotune.common.contract.training import Phase

# How many equally strong features an encoder's of texts count as. With 100 the forecast's formula
# gives from the accuracy without DP about the one with it, by simulations/studies/recipes.json:
# service-intents .877 and .770 at ε 8 and 3 (measured .891 and .810), service-sentiment .830 and
# .829 (.829 and .818). With MiniLM's 384 it gives .532 and .181, .821 and .799.
FEATURES_OF_TEXT = 100
WIDTH = 384  # of MiniLM's features; with another width w a pair's norm is off by sqrt(WIDTH / w)


def facts_of(contract: Contract, phase: Phase) -> HeadFacts | None:
    """The facts by which the rule plans a phase that trains the head alone.

    Args:
        contract: Whose phase it is.
        phase: Only its share of the budget is looked at.

    Returns:
        The facts; None where the rule does not apply: there is no linear head, or the norm of its
        inputs does not follow from the contract.
    """
    norm, task, privacy = _feature_norm(contract), contract.task, contract.privacy
    if norm is None or isinstance(task, Language):
        return None
    return HeadFacts(
        task=task.kind,
        outputs=task.outputs,
        feature_norm=norm,
        units=privacy.expected_units,
        sites=len(contract.sites),
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        budget_share=phase.budget_share,
        class_weights=getattr(task, "class_weights", None),
    )


def _feature_norm(contract: Contract) -> float | None:
    """Root mean square norm of the head's inputs, of records like the public ones. The features of
    a pair that is read apart are products of two texts': where these are standardised, as if each
    of WIDTH features were as strong and the two texts independent (recommend: 3.3, and measured
    3.6)."""
    model = contract.model
    if isinstance(model, OneHotModel):
        return None if model.hidden else model.norm
    if isinstance(model, LanguageModel):
        return None
    if isinstance(contract.input, PairInput) and contract.input.by == "bi":
        return model.standardise.norm**2 / math.sqrt(WIDTH) if model.standardise else None
    return _norm_of_text(model)


def _norm_of_text(model: EncoderModel) -> float | None:
    if model.standardise:
        return model.standardise.norm
    return 1.0 if model.normalise else None


def forecast_of(contract: Contract) -> Forecast | None:
    """What the plan of a contract can learn by its first phase, if that trains the head alone with
    full batches and plain steps that all sites share.

    Args:
        contract: The contract.

    Returns:
        The forecast; None where there is none, or no noise.
    """
    phase, aggregation = contract.phases[0], contract.aggregation
    plain = phase.trains == "head" and phase.sampling_rate == 1
    special = (phase.adam, phase.personal, aggregation.server_optimizer, aggregation.robust)
    head = facts_of(contract, phase)
    if contract.privacy.mode == "none" or not plain or any(special) or head is None:
        return None
    assert phase.head_lr is not None
    features, spread = _features(contract, head.feature_norm)
    return forecast(
        PlanFacts(
            head=head,
            rounds=phase.rounds,
            rate=phase.head_lr * phase.local_steps,
            clip_norm=contract.privacy.clip_norm,
            server_momentum=aggregation.server_momentum,
            averaging_start=aggregation.averaging_start,
            features=features,
            spread=spread,
        )
    )


def forecast_sentences(contract: Contract) -> list[str]:
    """The forecast for people, the first one with a "!" where records are too few; empty if there
    is none."""
    found = forecast_of(contract)
    if found is None:
        return []
    plan = "this plan" if len(contract.phases) == 1 else "this plan's first phase"
    first, *rest = found.sentences(contract.privacy.unit, plan)
    return [first if found.shows else f"! {first}", *rest]


def _features(contract: Contract, norm: float) -> tuple[int, float]:
    """How many equally strong features there are, and their root mean square norm less their mean.
    Rows of a table differ in its columns' values, also as texts that an encoder reads; of a one-hot
    table each column's values count as equally common."""
    if not isinstance(contract.input, TableInput):
        return FEATURES_OF_TEXT, norm
    sizes = [len(column.choices) for column in contract.input.columns]
    values = max(sum(size - 1 for size in sizes), 1)
    if not isinstance(contract.model, OneHotModel):
        return values, norm
    varying = sum(1 - 1 / size for size in sizes) / len(sizes)
    return values, norm * max(varying, 1e-3) ** 0.5


def rule_warnings(contract: Contract) -> tuple[str, ...]:
    """Of phases that name a rule whose numbers they do not have, in sentences."""
    return tuple(
        sentence
        for at, phase in enumerate(contract.phases)
        if phase.rule is not None and (sentence := _warning(contract, f"phases.{at + 1}", phase))
    )


def _warning(contract: Contract, key: str, phase: Phase) -> str:
    if phase.rule != head_rule.VERSION:
        return (
            f"{key}.rule = {phase.rule}: this Silotune has rule {head_rule.VERSION} and cannot "
            "compare its numbers with the contract's."
        )
    facts = facts_of(contract, phase)
    if facts is None:
        return (
            f"{key}.rule = {phase.rule}, but the rule needs a linear head on features whose norm "
            f"the contract says. Remove {key}.rule."
        )
    wrong = [
        f"{name} = {_words(planned)} where the contract has {_words(found)}"
        for name, (planned, found) in _numbers(contract, key, phase, facts).items()
        if planned != found
    ]
    if not wrong:
        return ""
    return (
        f"{key}.rule = {phase.rule} gives {'; '.join(wrong)}. Set the rule's numbers, or remove "
        f"{key}.rule if the contract's are meant."
    )


def _numbers(
    contract: Contract, key: str, phase: Phase, facts: HeadFacts
) -> dict[str, tuple[Any, Any]]:
    """By setting: what the rule plans, and what the contract has."""
    plan, aggregation = plan_head(facts), contract.aggregation
    planned = {
        "trains": "head",
        "rounds": plan.rounds,
        "sampling_rate": plan.sampling_rate,
        "local_steps": 1,
        "budget_share": phase.budget_share,
        "head_lr": plan.head_lr,
        "rule": phase.rule,
    }
    found = phase.model_dump(mode="json", exclude_none=True)
    return {
        **{f"{key}.{name}": (planned.get(name), found.get(name)) for name in planned | found},
        "privacy.clip_norm": (plan.clip_norm, contract.privacy.clip_norm),
        "aggregation.server_momentum": (plan.server_momentum, aggregation.server_momentum),
        "aggregation.averaging_start": (plan.averaging_start, aggregation.averaging_start),
    }


def _words(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
