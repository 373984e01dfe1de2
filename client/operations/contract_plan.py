"""A contract with the plan that the rules compute from its public facts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from silotune.client.operations.adapter_plan import plan_adapter
from silotune.common.contract.contract import Contract
from silotune.common.contract.head_facts import facts_of
from silotune.common.planning import adapter_rule, head_rule
from silotune.common.planning.head_rule import HeadPlan


def planned(contract: Contract, folder: Path | None) -> Contract | None:
    """A contract with its phases, clip norm, momentum and averaging replaced by the rules'.

    Args:
        contract: Task, input, model, adapter, privacy and sites stay as they are; so does what
            the aggregation says beside momentum and averaging.
        folder: Of its base model; not needed without an adapter.

    Returns:
        The contract: a phase for the head and, where it has an adapter and there is room, one for
        both, without local steps. Without room it has no adapter. None where the rules do not
        apply: a language model, a head whose features' norm the contract does not say, a personal
        part, or an aggregation method other than ffa, of most of which the iterates are not
        averaged.

    Raises:
        DataError: If the folder does not hold the contract's model.
        UsageError: E103, if no noise reaches the contract's epsilon.
    """
    facts = facts_of(contract, contract.phases[0].model_copy(update={"budget_share": 1.0}))
    if facts is None or contract.personal:
        return None
    if contract.aggregation.method != "ffa":
        return None
    alone = _with_phases(contract, head_rule.plan_head(facts), None)
    if contract.adapter is None:
        return alone
    assert folder is not None
    share = adapter_rule.HEAD_SHARE
    facts = facts_of(contract, contract.phases[0].model_copy(update={"budget_share": share}))
    assert facts is not None
    head = head_rule.plan_head(facts)
    # With rates that plan_adapter replaces.
    rates = plan_adapter(_with_phases(contract, head, (1.0, 1.0)), folder)
    if not rates.has_room:
        return alone
    assert rates.head_lr is not None
    return _with_phases(contract, head, (rates.head_lr, rates.adapter_lr))


def _with_phases(contract: Contract, head: HeadPlan, joint: tuple[float, float] | None) -> Contract:
    """joint: the rates of head and adapter in the phase that trains both; the head alone if it is
    None."""
    raw = contract.model_dump(mode="json", exclude_none=True)
    first: dict[str, Any] = {
        "trains": "head",
        "rounds": head.rounds,
        "sampling_rate": head.sampling_rate,
        "head_lr": head.head_lr,
        "rule": head_rule.VERSION,
    }
    raw["phases"] = [first]
    if joint is None:
        raw.pop("adapter", None)
    else:
        first["budget_share"] = adapter_rule.HEAD_SHARE
        raw["phases"] += [
            {
                "trains": "head+adapter",
                "rounds": adapter_rule.ROUNDS,
                "sampling_rate": adapter_rule.SAMPLING_RATE,
                "budget_share": 1 - adapter_rule.HEAD_SHARE,
                "head_lr": joint[0],
                "adapter_lr": joint[1],
            }
        ]
    raw["privacy"]["clip_norm"] = head.clip_norm
    raw["aggregation"] |= {
        "server_momentum": head.server_momentum,
        "averaging_start": head.averaging_start,
    }
    return Contract.model_validate(raw)
