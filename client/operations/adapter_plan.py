"""The learning rates of a drafted contract's adapter phase, from its noise and its model."""

from __future__ import annotations

import math
from pathlib import Path

from silotune.client.operations import adapter_tolerance
from silotune.client.privacy import accountant
from silotune.common.contract.contract import Contract
from silotune.common.contract.head_facts import facts_of
from silotune.common.models.adapted import Adapted
from silotune.common.models.factory import build
from silotune.common.planning import head_rule
from silotune.common.planning.adapter_rule import (
    AdapterFacts,
    AdapterPlan,
    adapter_rate,
    signal_ratio,
)
from silotune.common.protocol.tensors import trained_names


def plan_adapter(contract: Contract, folder: Path) -> AdapterPlan:
    """The plan of a contract's last phase, which trains an adapter and, where there is one, a head.

    The head's rate there is at most that of the first phase, which has trained it: longer steps
    move the outputs further than those of the adapter can follow. (Disease-ner's words all came to
    one tag with 5 times that rate, and to an entity F1 of .49 with it.)

    Args:
        contract: A draft, whose adapter's and head's rates in that phase are of no matter; those
            of its first phase are.
        folder: Its base model's.

    Returns:
        The rates, and whether there is room for an adapter.

    Raises:
        DataError: If the folder does not hold the contract's model, or the adapter does not fit it.
        UsageError: E103, if no noise reaches the contract's epsilon.
    """
    plan, p = contract.round_plan(contract.rounds), contract.privacy
    phase, aggregation = plan.phase, contract.aggregation
    mechanism = accountant.mechanism_of(contract, accountant.plan(contract), contract.rounds)
    model = build(contract, folder)
    assert isinstance(model, Adapted)
    shapes = model.initial_arrays()
    names = [n for n in trained_names(shapes, plan.trains) if not n.startswith("head.")]
    tolerance = adapter_tolerance.adapter_tolerance(
        model, adapter_tolerance.public_inputs(contract, model), plan.trains
    )
    facts = AdapterFacts(
        noise_multiplier=mechanism.noise_multiplier,
        clip_norm=p.clip_norm,
        sampling_rate=phase.sampling_rate,
        units=p.expected_units,
        sites=len(contract.sites),
        weights=head_rule.step_weights(
            phase.rounds, aggregation.server_momentum, aggregation.averaging_start
        ),
        entries=sum(shapes[name].size for name in names),
        tolerated_noise=tolerance.noise,
        tolerated_step=tolerance.step,
    )
    head_lr, head = None, facts_of(contract, phase)
    if phase.head_lr is not None and head is not None:
        by_noise = head_rule.head_rate(head, facts.noise_at_unit_rate, p.clip_norm)
        head_lr = min(by_noise, contract.phases[0].head_lr or math.inf)
    return AdapterPlan(
        adapter_lr=head_rule.two_digits(adapter_rate(facts)),
        head_lr=None if head_lr is None else head_rule.two_digits(head_lr),
        cosine=adapter_tolerance.COSINE,
        signal_ratio=signal_ratio(facts),
    )
