"""What protecting entities costs: the cap bounds what is computed, not what is charged."""

from __future__ import annotations

import dp_accounting  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant  # type: ignore[import-untyped]
from dp_accounting.rdp import RdpAccountant  # type: ignore[import-untyped]

from silotune.client.privacy import accountant
from silotune.client.training.dp_optimizer import DPOptimizer, private_gradient
from silotune.client.training.noise import NoiseSource
from silotune.client.training.privacy_units import Units
from silotune.common.contract.contract import Contract
from silotune.common.models.batching import Block

DELTA = 1e-4
ORDERS = [2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 64]


def entities(contract: Contract, cap: int) -> Contract:
    """`contract` for persons with up to `cap` rows, in two phases of unlike rates."""
    phase = {"trains": "head", "head_lr": 0.5}
    return contract.changed(
        privacy={"unit": "entity", "entity": {"key": ["person"], "max_records_per_entity": cap}},
        phases=[
            {**phase, "rounds": 4, "local_steps": 3, "sampling_rate": 0.3, "budget_share": 0.4},
            {**phase, "rounds": 5, "sampling_rate": 0.1, "budget_share": 0.6, "noise_decay": 0.8},
        ],
    )


@pytest.mark.parametrize("cap", [1, 4, 100])
def test_a_plan_for_entities_costs_what_the_oracle_says_at_any_cap(
    table_contract: Contract, cap: int
) -> None:
    """At whole orders the two RDP accountants are one to 1e-6."""
    plan = accountant.plan(entities(table_contract, cap))
    assert plan == accountant.plan(entities(table_contract, 7))
    rdp, pld = RdpAccountant(ORDERS), PLDAccountant()
    for sigma, rate, steps in plan:
        event = dp_accounting.SelfComposedDpEvent(
            dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma)), steps
        )
        rdp.compose(event)
        pld.compose(event)
    for order in ORDERS:
        oracle = dict(zip(ORDERS, rdp._rdp, strict=True))[order]
        assert accountant._rdp_at(order, plan) == pytest.approx(oracle, rel=1e-6)
    assert accountant.plan_epsilon(plan, DELTA) == pytest.approx(8.0, rel=1e-4)
    assert pld.get_epsilon(0.9 * DELTA) == pytest.approx(8.0, rel=1e-3)


def gradient_of(units: Units, x: torch.Tensor, source: NoiseSource, sigma: float) -> torch.Tensor:
    linear = torch.nn.Linear(x.shape[1], 1, bias=False)
    optimizer = DPOptimizer(
        torch.optim.SGD(linear.parameters(), lr=1.0),
        source=source,
        noise_multiplier=sigma,
        clip_norm=1.0,
        divisor=1.0,
    )
    groups = units.groups(torch.arange(len(units)), lambda rows: [Block(rows, len(rows))])
    private_gradient([linear], optimizer, groups, lambda index: linear(x[index])[:, 0])
    assert linear.weight.grad is not None
    return linear.weight.grad.flatten()


def clipped_by_record(units: Units) -> Units:
    """The mutation: each row of an entity is a unit of its own."""
    return Units(units.members, torch.arange(len(units.members) + 1))


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("mutated", [False, True])
def test_an_entity_shows_no_more_than_one_gaussian_step_allows(mean: bool, mutated: bool) -> None:
    """The empirical mu of data with and without an entity of five equal rows, along their
    difference, lies in [0.8 / sigma, 1 / sigma]; clipped by record it would be five times that.
    """
    sigma, trials, rows = 2.0, 600, 5
    x = torch.zeros(12, 8)
    x[:, 1] = 0.5
    x[-rows:, 0] = 3.0  # the entity that is there or not
    source = NoiseSource(site="a", insecure_seed=11)
    starts = torch.tensor([0, 2, 4, 7, 12])
    units = Units(torch.arange(12), starts, mean)
    without = Units(torch.arange(7), starts[:-1], mean)
    if mutated:
        units, without = clipped_by_record(units), clipped_by_record(without)
    values = [
        [float(gradient_of(u, x, source, sigma)[0]) for _ in range(trials)]
        for u in (units, without)
    ]
    spread = np.sqrt((np.var(values[0]) + np.var(values[1])) / 2)
    mu = (np.mean(values[0]) - np.mean(values[1])) / spread
    slack = 3 * np.sqrt(2 / trials)  # three standard errors of the difference of the means
    within = 0.8 / sigma - slack <= mu <= 1 / sigma + slack
    assert within != mutated
