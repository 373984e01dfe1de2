"""Adam whose second moment is freed of the noise: equal to torch's without noise, right with it.

Each way to break it, in MUTATIONS, must be seen by a property here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from silotune.client.privacy.accountant import Mechanism
from silotune.client.training import dataset, dp_optimizer, local_round
from silotune.client.training.dp_adam import NoiseCorrectedAdam
from silotune.client.training.local_round import train_round
from silotune.client.training.noise import NoiseSource
from silotune.common.contract.contract import Contract
from silotune.common.contract.training import Adam
from silotune.common.data.records import Table
from silotune.common.errors import ContractError
from silotune.common.models.factory import build
from silotune.common.protocol.messages import Arrays

SMALL = 1e-12  # a floor that is never reached


class Silent(NoiseSource):
    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        return np.zeros(shape)


def adam(
    parameters: list[Tensor], rate: float = 0.1, *, noise_std: float = 0.0, **settings: float
) -> NoiseCorrectedAdam:
    chosen = Adam.model_validate({"floor": SMALL} | settings)
    return NoiseCorrectedAdam([{"params": parameters, "lr": rate}], chosen, noise_std=noise_std)


def drawn(steps: int, size: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(steps, size, generator=g, dtype=torch.float64)


# --- properties that a mutation below must break ---------------------------------------------


def without_noise_it_is_torchs_adam() -> None:
    """Torch adds eps to the root where we take the larger of it and the floor: both are tiny."""
    for beta1, beta2 in ((0.9, 0.999), (0.0, 0.9), (0.5, 0.0), (0.0, 0.0)):
        ours, torchs = (torch.nn.Parameter(torch.ones(6, dtype=torch.float64)) for _ in range(2))
        us = adam([ours], beta1=beta1, beta2=beta2)
        them = torch.optim.Adam([torchs], lr=0.1, betas=(beta1, beta2), eps=1e-12)
        for gradient in drawn(30, 6) + 0.5:
            ours.grad, torchs.grad = gradient.clone(), gradient.clone()
            us.step()
            them.step()
            torch.testing.assert_close(ours, torchs, rtol=1e-8, atol=1e-8)


def each_group_has_its_own_rate() -> None:
    a, b = (torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
    both = NoiseCorrectedAdam(
        [{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.7}], Adam(floor=SMALL), noise_std=0.0
    )
    a.grad = b.grad = torch.tensor([2.0, -3.0, 0.5], dtype=torch.float64)
    both.step()
    # The first step of Adam is the rate in the gradient's direction.
    torch.testing.assert_close(a.data, torch.tensor([-0.1, 0.1, -0.1], dtype=torch.float64))
    torch.testing.assert_close(b.data, torch.tensor([-0.7, 0.7, -0.7], dtype=torch.float64))


def second_moments(g: float, std: float, steps: int, beta2: float) -> tuple[Tensor, float]:
    """What the step divides by, squared, for many coordinates with the gradient g under noise; and
    the standard deviation that it should have. Seen through the step: with beta1 = 0 it is
    rate grad / sqrt(v - noise^2)."""
    size = 20_000
    x = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))
    optimizer = adam([x], rate=1.0, noise_std=std, beta1=0.0, beta2=beta2)
    for noise in drawn(steps, size, seed=1, scale=std):
        x.data.zero_()
        x.grad = g + noise
        optimizer.step()
        left = (x.grad / x.detach()).square()
    weights = beta2 ** np.arange(steps)
    weights = weights / weights.sum()
    # The variance of (g + noise)^2 is 2 std^4 + 4 g^2 std^2.
    spread = math.sqrt((2 * std**4 + 4 * g**2 * std**2) * float((weights**2).sum()))
    return left, spread


def a_gradient_below_the_noise_is_seen_for_what_it_is() -> None:
    """By the median, which those that were cut off at the floor do not move. A sum of some 40
    squares is skewed: its median lies within a sixth of a deviation of the mean."""
    left, spread = second_moments(0.5, 1.0, 60, 0.98)
    assert abs(float(left.median()) - 0.25) < spread / 6


def the_corrected_moment_has_no_bias() -> None:
    """With a gradient well above the noise nothing is cut off, so the mean itself is g^2."""
    left, spread = second_moments(4.0, 1.0, 40, 0.95)
    assert abs(float(left.mean()) - 16.0) < 4 * spread / math.sqrt(len(left))


def what_is_left_is_at_least_the_floor() -> None:
    """Pure noise: v - noise^2 is about zero, so the step is never more than rate m / floor."""
    x = torch.nn.Parameter(torch.zeros(500, dtype=torch.float64))
    optimizer = adam([x], rate=1.0, noise_std=1.0, floor=0.25, beta1=0.0, beta2=0.5)
    smallest = []
    for noise in drawn(50, 500, seed=2):
        x.grad = noise.clone()
        before = x.detach().clone()
        optimizer.step()
        root = noise / (before - x.detach())
        assert bool((root >= 0.25 - 1e-9).all())
        smallest.append(float(root.min()))
    assert min(smallest) == pytest.approx(0.25)


def a_round_equals_the_formula_by_hand() -> None:
    """Through train_round: three local steps, everybody sampled, noise_std = s C / divisor."""
    rows = toy_rows()
    for sigma in (1e-6, 1.5):
        found, expected = a_round(sigma), by_hand(rows, sigma)
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


def every_round_begins_anew() -> None:
    first, second = a_round(1.5), a_round(1.5)
    assert np.array_equal(first, second)


# --- a round by hand -------------------------------------------------------------------------

CLIP, EXPECTED, RATE, STEPS = 0.8, 20.0, 0.3, 3
BETA1, BETA2, FLOOR = 0.6, 0.8, 0.02
CONTRACT: list[Contract] = []


@pytest.fixture(autouse=True)
def contract(table_contract: Contract, monkeypatch: pytest.MonkeyPatch) -> Iterator[Contract]:
    monkeypatch.setattr(dp_optimizer, "NOISE_ROUNDING_LOG2", -40)
    found = table_contract.changed(
        privacy={"clip_norm": CLIP, "expected_units": EXPECTED},
        releases=[{"metric": "loss", "share": 0.19}],
        phases=[
            {
                "trains": "head",
                "rounds": 2,
                "sampling_rate": 1.0,
                "local_steps": STEPS,
                "head_lr": RATE,
                "adam": {"beta1": BETA1, "beta2": BETA2, "floor": FLOOR},
            }
        ],
    )
    CONTRACT[:] = [found]
    yield found
    CONTRACT.clear()


def toy_rows() -> list[tuple[int, str, int]]:
    rng = np.random.default_rng(4)
    return [
        (int(rng.integers(20, 90)), ("yes", "no")[int(rng.integers(2))], int(rng.random() < 0.7))
        for _ in range(15)
    ]


def start() -> Arrays:
    rng = np.random.default_rng(5)
    return {
        "head.weight": rng.normal(0, 0.5, (2, 6)).astype(np.float32),
        "head.bias": rng.normal(0, 0.5, 2).astype(np.float32),
    }


def a_round(sigma: float) -> NDArray[np.float64]:
    """The change of bias and weight."""
    (contract,) = CONTRACT
    model = build(contract, None)
    table = Table(
        "rows.csv",
        ["age", "smoker", "outcome"],
        [(line, [str(cell) for cell in row]) for line, row in enumerate(toy_rows(), 2)],
    )
    data = dataset.load(table, contract, model)
    change, _ = train_round(
        contract,
        contract.round_plan(1),
        Mechanism(sigma, 1.0, STEPS),
        model,
        data,
        start(),
        Silent(site="x"),
        CLIP,
    )
    return np.concatenate([change[name].astype(float).ravel() for name in sorted(change)])


def by_hand(rows: list[tuple[int, str, int]], sigma: float) -> NDArray[np.float64]:
    """The clipped mean by the softmax's formula, then Tang et al., Algorithm 1, in float64."""
    w = start()
    x0 = np.concatenate([w["head.bias"], w["head.weight"].ravel()]).astype(np.float64)
    x, m, v = x0.copy(), np.zeros(14), np.zeros(14)
    noise = sigma / math.sqrt(1 - 0.19) * CLIP / EXPECTED
    for t in range(1, STEPS + 1):
        total = np.zeros(14)
        for age, smoker, outcome in rows:
            f = np.zeros(6)
            f[int(age >= 50)] = f[3 + ["yes", "no"].index(smoker)] = math.sqrt(2)
            logits = x[2:].reshape(2, 6) @ f + x[:2]
            off = np.exp(logits) / np.exp(logits).sum() - np.eye(2)[outcome]
            g = np.concatenate([off, np.outer(off, f).ravel()])
            total += g * min(1.0, CLIP / float(np.linalg.norm(g)))
        g = total / EXPECTED
        m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g**2
        left = np.maximum(v / (1 - BETA2**t) - noise**2, FLOOR**2)
        x = x - RATE * m / (1 - BETA1**t) / np.sqrt(left)
    return x - x0


PROPERTIES: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (
        without_noise_it_is_torchs_adam,
        each_group_has_its_own_rate,
        a_gradient_below_the_noise_is_seen_for_what_it_is,
        the_corrected_moment_has_no_bias,
        what_is_left_is_at_least_the_floor,
        a_round_equals_the_formula_by_hand,
        every_round_begins_anew,
    )
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name: str) -> None:
    PROPERTIES[name]()


# --- mutations -------------------------------------------------------------------------------

Patch = pytest.MonkeyPatch


def with_noise_of(patch: Patch, change: Callable[[float], float]) -> None:
    original = NoiseCorrectedAdam.__init__

    def broken(self: Any, groups: Any, settings: Adam, *, noise_std: float) -> None:
        original(self, groups, settings, noise_std=change(noise_std))

    patch.setattr(NoiseCorrectedAdam, "__init__", broken)


def no_correction(patch: Patch) -> None:
    with_noise_of(patch, lambda std: 0.0)


def twice_the_correction(patch: Patch) -> None:
    with_noise_of(patch, lambda std: std * math.sqrt(2))


def the_noise_before_dividing(patch: Patch) -> None:
    with_noise_of(patch, lambda std: std * EXPECTED)


def the_whole_budgets_noise(patch: Patch) -> None:
    """The noise of the step as charged, and not that of the gradients."""
    with_noise_of(patch, lambda std: std * math.sqrt(1 - 0.19))


def no_floor(patch: Patch) -> None:
    original = NoiseCorrectedAdam.__init__

    def broken(self: Any, groups: Any, settings: Adam, *, noise_std: float) -> None:
        original(self, groups, settings.model_copy(update={"floor": 1e-9}), noise_std=noise_std)

    patch.setattr(NoiseCorrectedAdam, "__init__", broken)


def no_bias_correction(patch: Patch) -> None:
    original = NoiseCorrectedAdam.step

    def broken(self: Any, closure: Any = None) -> None:
        for state in self.state.values():
            state["t"] = 10**6
        original(self)

    patch.setattr(NoiseCorrectedAdam, "step", broken)


def moments_that_stay(patch: Patch) -> None:
    kept: dict[int, dict[str, Any]] = {}
    original = NoiseCorrectedAdam.step

    def broken(self: Any, closure: Any = None) -> None:
        for k, p in enumerate(p for group in self.param_groups for p in group["params"]):
            if not self.state[p] and k in kept:
                self.state[p] |= kept[k]
        original(self)
        for k, p in enumerate(p for group in self.param_groups for p in group["params"]):
            kept[k] = dict(self.state[p])

    patch.setattr(NoiseCorrectedAdam, "step", broken)


MUTATIONS: dict[Callable[[Patch], None], tuple[str, ...]] = {
    no_correction: (
        "a_gradient_below_the_noise_is_seen_for_what_it_is",
        "the_corrected_moment_has_no_bias",
        "a_round_equals_the_formula_by_hand",
    ),
    twice_the_correction: (
        "a_gradient_below_the_noise_is_seen_for_what_it_is",
        "the_corrected_moment_has_no_bias",
        "a_round_equals_the_formula_by_hand",
    ),
    the_noise_before_dividing: ("a_round_equals_the_formula_by_hand",),
    the_whole_budgets_noise: ("a_round_equals_the_formula_by_hand",),
    no_floor: ("what_is_left_is_at_least_the_floor", "a_round_equals_the_formula_by_hand"),
    no_bias_correction: ("without_noise_it_is_torchs_adam", "a_round_equals_the_formula_by_hand"),
    moments_that_stay: ("every_round_begins_anew",),
}
CASES = [(mutation, name) for mutation, names in MUTATIONS.items() for name in names]


@pytest.mark.parametrize(
    ("mutation", "name"), CASES, ids=[f"{m.__name__}-{name}" for m, name in CASES]
)
def test_a_broken_adam_is_caught(
    mutation: Callable[[Patch], None], name: str, monkeypatch: Patch
) -> None:
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        PROPERTIES[name]()


# --- through a contract ----------------------------------------------------------------------


def test_without_privacy_a_round_is_torchs_adam_on_the_plain_mean(
    contract: Contract, monkeypatch: Patch
) -> None:
    """mode "none": no noise to take off. Compared with torch's own optimizer put in its place."""
    plain = contract.changed(privacy={"mode": "none"}, releases=[])
    of_torch = plain.phases[0].model_copy(
        update={"adam": Adam(beta1=BETA1, beta2=BETA2, floor=1e-10)}
    )
    model = build(plain, None)
    table = Table(
        "rows.csv",
        ["age", "smoker", "outcome"],
        [(line, [str(cell) for cell in row]) for line, row in enumerate(toy_rows(), 2)],
    )
    data = dataset.load(table, plain, model)
    seen: list[float] = []

    def torchs(groups: Any, settings: Adam, *, noise_std: float) -> torch.optim.Adam:
        seen.append(noise_std)
        return torch.optim.Adam(groups, betas=(settings.beta1, settings.beta2), eps=1e-10)

    changes = []
    for put in (NoiseCorrectedAdam, torchs):
        monkeypatch.setattr(local_round, "NoiseCorrectedAdam", put)
        changes.append(
            train_round(
                plain,
                replace(plain.round_plan(1), phase=of_torch),
                Mechanism(0.0, 1.0, STEPS),
                model,
                data,
                start(),
                Silent(site="x"),
                CLIP,
            )[0]
        )
    assert seen == [0.0]
    for name, change in changes[0].items():
        np.testing.assert_allclose(change, changes[1][name], rtol=1e-4, atol=1e-5)
        moved = np.abs(change).max(axis=-1)
        assert bool((moved > 0.1).all())


def test_it_takes_no_more_of_the_budget(contract: Contract) -> None:
    from silotune.client.privacy.accountant import plan

    phase = contract.phases[0].model_dump()
    assert plan(contract) == plan(contract.changed(phases=[phase | {"adam": None}]))


def test_the_noise_it_takes_off_is_the_noise_that_is_there(
    contract: Contract, monkeypatch: Patch
) -> None:
    """Nobody is sampled: what is in `.grad` is noise alone, of the variance that is taken off."""
    told: list[NoiseCorrectedAdam] = []
    seen: list[NDArray[np.float64]] = []

    class Spy(NoiseCorrectedAdam):
        def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
            told.append(self)
            seen.extend(
                p.grad.numpy(force=True).ravel() for g in self.param_groups for p in g["params"]
            )
            super().step()

    monkeypatch.setattr(local_round, "NoiseCorrectedAdam", Spy)
    model = build(contract, None)
    table = Table(
        "rows.csv",
        ["age", "smoker", "outcome"],
        [(line, [str(cell) for cell in row]) for line, row in enumerate(toy_rows(), 2)],
    )
    data = dataset.load(table, contract, model)
    rate = 1e-6
    train_round(
        contract,
        contract.round_plan(1),
        Mechanism(1.5, rate, 400),
        model,
        data,
        start(),
        NoiseSource(site="x", insecure_seed=1),
        CLIP,
    )
    values = np.concatenate(seen)
    assert len(values) == 400 * 14
    # The standard deviation of 5,600 draws is known to 1%.
    assert np.std(values) == pytest.approx(math.sqrt(told[0].noise_variance), rel=0.04)
    assert math.sqrt(told[0].noise_variance) == pytest.approx(
        1.5 / math.sqrt(1 - 0.19) * CLIP / (EXPECTED * rate)
    )


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"beta1": 1.0}, "phases.1.adam.beta1"),
        ({"beta2": -0.1}, "phases.1.adam.beta2"),
        ({"floor": 0.0}, "phases.1.adam.floor"),
        ({"eps": 1e-8}, "Unknown key 'phases.1.adam.eps'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    contract: Contract, settings: dict[str, float], told: str
) -> None:
    phase = contract.phases[0].model_dump() | {"adam": settings}
    with pytest.raises(ContractError) as error:
        contract.changed(phases=[phase])
    assert [told in problem for problem in error.value.problems] == [True]
