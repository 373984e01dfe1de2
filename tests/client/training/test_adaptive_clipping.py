"""A clip norm that follows a quantile: the noise is split right, and the server finds the quantile.

Each way to break the released share, in MUTATIONS, must be seen by a property here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from silotune.client.privacy.accountant import Mechanism, plan
from silotune.client.site.policy import permissive_policy
from silotune.client.training import dataset, dp_optimizer, local_round, released_metrics
from silotune.client.training.local_round import train_round
from silotune.client.training.noise import NoiseSource
from silotune.client.worker.worker import Worker
from silotune.common.contract.contract import Contract
from silotune.common.contract.privacy import AdaptiveClipping, Metric
from silotune.common.data.records import table
from silotune.common.errors import ContractError, RefusalError
from silotune.common.models.factory import build
from silotune.common.protocol import messages
from silotune.common.protocol.messages import Arrays, Message, Refusal, Train, Update
from silotune.server.aggregation.mean import mean_figures
from silotune.server.aggregation.server_optimizer import next_clip_norm
from silotune.server.rounds.run import FederatedRun
from silotune.server.storage.run_store import RunStore

MakeWorker = Callable[..., Worker]
N = 40
AGES = (5, 15, 25, 35)  # four bins, so four norms
LEVELS = (0.1, 0.3, 0.5, 0.7)  # of p("ill") in each bin


def contract_with(table_contract: Contract, **adaptive: Any) -> Contract:
    """One column in four bins; the weights of `initial` give each bin its own norm."""
    return table_contract.changed(
        input={
            "columns": [
                {
                    "kind": "number",
                    "name": "age",
                    "phrase": "age",
                    "edges": [10, 20, 30],
                    "words": ["a", "b", "c", "d"],
                }
            ]
        },
        privacy={
            "clip_norm": 0.5,
            "expected_units": float(N),
            "adaptive": {"max_clip_norm": 5.0} | adaptive,
        },
        phases=[{"trains": "head", "rounds": 3, "sampling_rate": 1.0, "head_lr": 1e-9}],
    )


@pytest.fixture
def adaptive(table_contract: Contract) -> Contract:
    return contract_with(table_contract)


def initial() -> Arrays:
    """All rows are "well": the gradient's norm is sqrt(2) p sqrt(|x|^2 + 1), with |x| = 2."""
    weight = np.zeros((2, 5), np.float32)
    weight[1, :4] = [math.log(p / (1 - p)) / 2 for p in LEVELS]
    return {"head.weight": weight, "head.bias": np.zeros(2, np.float32)}


NORMS = [math.sqrt(2) * p * math.sqrt(5) for p in LEVELS]


def rows(path: Path, ages: list[int]) -> Path:
    path.write_text("\n".join(["age,outcome", *(f"{age},0" for age in ages)]) + "\n")
    return path


def everybody(path: Path) -> Path:
    return rows(path, list(AGES) * (N // 4))


def ask(worker: Worker, number: int = 1, **header: Any) -> Any:
    header = {"clip_norm": 0.5} | header
    asked = Train(contract=worker.contract.hash, run="r", round=number, **header)
    return messages.unpack(worker.handle(messages.pack(Message(asked, initial())))).header


# --- properties that a mutation below must break ---------------------------------------------


def the_noises_together_are_the_mechanism_that_is_charged(
    contract: Contract, path: Path, make_worker: MakeWorker, patch: pytest.MonkeyPatch
) -> None:
    """In units of what one record can move: the squares of 1/s_i add up to the charged 1/s^2."""
    contract = contract.changed(
        releases=[
            {"metric": "loss", "share": 0.1, "bound": 2.0},
            {"metric": "accuracy", "share": 0.05},
        ],
    )
    stds: list[tuple[tuple[int, ...], float]] = []
    for module in (dp_optimizer, released_metrics):
        inner = vars(module)["add_gaussian_noise"]

        def spy(total: Tensor, std: float, source: NoiseSource, inner: Any = inner) -> Tensor:
            stds.append((tuple(total.shape), std))
            found: Tensor = inner(total, std, source)
            return found

        patch.setattr(module, "add_gaussian_noise", spy)
    worker = make_worker(contract, path)
    stds.clear()  # the self-test's
    assert isinstance(ask(worker, clip_norm=2.5), Update)
    # Weight and bias share one norm, so they are one part; loss, accuracy and the count one each.
    gradients = {std for shape, std in stds if shape}
    scalars = [std for shape, std in stds if not shape]
    assert len(gradients) == 1
    assert len(scalars) == 3
    parts = [(2.5, gradients.pop()), *zip((2.0, 1.0, 0.5), scalars, strict=True)]
    (charge,) = worker.ledger.charges.values()
    s, share = charge.noise_multiplier, 0.05
    assert sum((most / std) ** 2 for most, std in parts) == pytest.approx(1 / s**2, rel=1e-9)
    assert parts[0][1] == pytest.approx(2.5 * s / math.sqrt(1 - 0.2))
    assert parts[-1][1] == pytest.approx(0.5 * s / math.sqrt(share))


def unclipped(
    contract: Contract,
    path: Path,
    clip: float,
    rounds: int,
    *,
    rate: float = 1.0,
    steps: int = 1,
    sigma: float = 2.0,
) -> NDArray[np.float64]:
    """What `rounds` rounds release as the share of unclipped units."""
    model = build(contract, None)
    data = dataset.load(table(path), contract, model)
    source = NoiseSource(site="x", insecure_seed=5)
    return np.array(
        [
            train_round(
                contract,
                contract.round_plan(1),
                Mechanism(sigma, rate, steps),
                model,
                data,
                initial(),
                source,
                clip,
            )[1]["unclipped"]
            for _ in range(rounds)
        ]
    )


def the_released_share_has_the_stated_noise(
    contract: Contract, path: Path, make_worker: MakeWorker, patch: pytest.MonkeyPatch
) -> None:
    """0.5 s / sqrt(share) over the expected batch, and less by sqrt(steps) in the mean of them."""
    for steps in (1, 4):
        found = unclipped(contract, path, 1.0, 500, steps=steps)
        expected = 0.5 * 2.0 / math.sqrt(0.05) / N / math.sqrt(steps)
        # The standard deviation of 500 draws is known to 3.2%.
        assert np.std(found) == pytest.approx(expected, rel=0.13)


def the_released_share_is_right_in_the_mean(
    contract: Contract, path: Path, make_worker: MakeWorker, patch: pytest.MonkeyPatch
) -> None:
    """With as many units as expected it is the true share, also of a sample of half of them."""
    for clip, rate in ((NORMS[0] * 0.9, 1.0), (NORMS[2] * 0.9, 1.0), (9.0, 1.0), (1.0, 0.5)):
        true = np.mean([norm <= clip for norm in NORMS])
        found = unclipped(contract, path, clip, 400, rate=rate, sigma=0.2)
        assert abs(found.mean() - true) < 4 * found.std() / math.sqrt(len(found))


def a_site_with_other_numbers_is_drawn_to_a_half(
    contract: Contract, path: Path, make_worker: MakeWorker, patch: pytest.MonkeyPatch
) -> None:
    """1/2 + (unclipped - units / 2) / expected: no units at all say nothing, which is a half."""
    for count in (4, 20, 80):
        found = unclipped(
            contract, rows(path.with_name(f"{count}.csv"), [AGES[0]] * count), 1.0, 300, sigma=0.1
        )
        expected = 0.5 + count / 2 / N
        assert abs(found.mean() - expected) < 4 * found.std() / math.sqrt(len(found))


Property = Callable[[Contract, Path, MakeWorker, pytest.MonkeyPatch], None]
PROPERTIES: dict[str, Property] = {
    f.__name__: f
    for f in (
        the_noises_together_are_the_mechanism_that_is_charged,
        the_released_share_has_the_stated_noise,
        the_released_share_is_right_in_the_mean,
        a_site_with_other_numbers_is_drawn_to_a_half,
    )
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(
    name: str,
    adaptive: Contract,
    tmp_path: Path,
    make_worker: MakeWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    PROPERTIES[name](adaptive, everybody(tmp_path / "rows.csv"), make_worker, monkeypatch)


# --- mutations -------------------------------------------------------------------------------

Patch = pytest.MonkeyPatch


def the_count_without_noise(patch: Patch) -> None:
    patch.setattr(released_metrics, "add_gaussian_noise", lambda total, std, source: total)


def the_count_with_half_the_noise(patch: Patch) -> None:
    """As if a unit moved it by 1/4."""
    patch.setattr(
        released_metrics,
        "add_gaussian_noise",
        lambda total, std, source: dp_optimizer.add_gaussian_noise(total, std / 2, source),
    )


def a_whole_unit_each(patch: Patch) -> None:
    """1 for an unclipped unit and 0 for others, with noise for 1/2."""
    step = vars(local_round)["_Measured"].step

    def broken(self: Any, groups: Any, optimizer: Any) -> None:
        optimizer.units = 0
        step(self, groups, optimizer)

    patch.setattr(vars(local_round)["_Measured"], "step", broken)


def gradients_with_all_of_the_budget(patch: Patch) -> None:
    patch.setattr(Contract, "released_share", 0.0)


def the_count_not_paid_for(patch: Patch) -> None:
    def share(self: Contract) -> float:
        return sum(r.share for r in self.releases)

    patch.setattr(Contract, "released_share", property(share))


def the_share_for_its_root(patch: Patch) -> None:
    patch.setattr(
        vars(local_round)["_Measured"],
        "_noise",
        lambda self, b: self.mechanism.noise_multiplier / b,
    )


def the_clipped_counted(patch: Patch) -> None:
    count = dp_optimizer.DPOptimizer.count

    def broken(self: Any, norms: Tensor) -> None:
        count(self, norms)
        self.unclipped += 2 * int((norms > self.max_grad_norm).sum()) - len(norms)

    patch.setattr(dp_optimizer.DPOptimizer, "count", broken)


MUTATIONS: dict[Callable[[Patch], None], tuple[str, ...]] = {
    the_count_without_noise: ("the_released_share_has_the_stated_noise",),
    the_count_with_half_the_noise: ("the_released_share_has_the_stated_noise",),
    a_whole_unit_each: (
        "the_released_share_is_right_in_the_mean",
        "a_site_with_other_numbers_is_drawn_to_a_half",
    ),
    gradients_with_all_of_the_budget: ("the_noises_together_are_the_mechanism_that_is_charged",),
    the_count_not_paid_for: ("the_noises_together_are_the_mechanism_that_is_charged",),
    the_share_for_its_root: (
        "the_noises_together_are_the_mechanism_that_is_charged",
        "the_released_share_has_the_stated_noise",
    ),
    the_clipped_counted: ("the_released_share_is_right_in_the_mean",),
}
CASES = [(mutation, name) for mutation, names in MUTATIONS.items() for name in names]


@pytest.mark.parametrize(
    ("mutation", "name"), CASES, ids=[f"{m.__name__}-{name}" for m, name in CASES]
)
def test_a_broken_share_is_caught(
    mutation: Callable[[Patch], None],
    name: str,
    adaptive: Contract,
    tmp_path: Path,
    make_worker: MakeWorker,
    monkeypatch: Patch,
) -> None:
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        PROPERTIES[name](adaptive, everybody(tmp_path / "rows.csv"), make_worker, monkeypatch)


# --- the server's update ---------------------------------------------------------------------

SETTINGS = AdaptiveClipping(quantile=0.3, lr=0.5, min_clip_norm=0.01, max_clip_norm=2.0)
SHARES: dict[Metric, tuple[float, float]] = {"unclipped": (0.0, 1.0)}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.9, 1.0])
def test_the_clip_norm_moves_geometrically(share: float) -> None:
    found = next_clip_norm(0.5, share, SETTINGS)
    assert found == pytest.approx(0.5 * math.exp(-0.5 * (share - 0.3)))


def test_the_mean_is_by_the_contracts_weights() -> None:
    figures: dict[str, Mapping[Metric, float]] = {"a": {"unclipped": 0.1}, "b": {"unclipped": 0.7}}
    found = mean_figures(figures, {"a": 3.0, "b": 1.0, "c": 9.0}, SHARES)
    assert found == {"unclipped": pytest.approx(0.25)}


@pytest.mark.parametrize(
    ("share", "end"),
    [
        (-5.0, 0.0),
        (1.5, 1.0),
        (1e6, 1.0),
        (-1e308, 0.0),
        (1e308, 1.0),
        (math.inf, 1.0),
        (-math.inf, 0.0),
    ],
)
def test_a_share_beyond_its_ends_says_no_more_than_the_end(share: float, end: float) -> None:
    assert next_clip_norm(0.5, share, SETTINGS) == next_clip_norm(0.5, end, SETTINGS)
    assert mean_figures({"a": {"unclipped": share}}, {"a": 2.0}, SHARES) == {"unclipped": end}


def test_the_clip_norm_stays_within_its_bounds() -> None:
    up = down = 0.5
    for _ in range(200):
        up = next_clip_norm(up, 0.0, SETTINGS)
        down = next_clip_norm(down, 1.0, SETTINGS)
    assert (down, up) == (0.01, 2.0)
    wild = SETTINGS.model_copy(update={"lr": 10.0})
    assert next_clip_norm(0.5, 1.0, wild) == 0.01


def test_the_largest_rate_goes_to_the_bound() -> None:
    wild = SETTINGS.model_copy(update={"lr": 10.0})
    assert next_clip_norm(0.5, 0.0, wild) == 2.0


def test_two_hostile_sites_cannot_make_it_not_a_number() -> None:
    """Finite numbers, so the wire lets them through; each overflows with its weight."""
    figures: dict[str, Mapping[Metric, float]] = {
        "a": {"unclipped": 1e308},
        "b": {"unclipped": -1e308},
    }
    assert mean_figures(figures, {"a": 10.0, "b": 10.0}, SHARES) == {"unclipped": 0.5}


# --- end to end ------------------------------------------------------------------------------


@pytest.mark.parametrize("quantile", [0.25, 0.5, 0.8])
def test_a_run_finds_the_quantile(
    table_contract: Contract, tmp_path: Path, make_worker: MakeWorker, quantile: float
) -> None:
    """Two sites, together twenty norms in equal steps; the noise is small beside a step."""
    bins = 20
    edges = list(range(1, bins))
    levels = (np.arange(bins) + 1) / (bins + 1)
    contract = contract_with(table_contract, quantile=quantile, lr=0.6).changed(
        input={
            "columns": [
                {
                    "kind": "number",
                    "name": "age",
                    "phrase": "age",
                    "edges": edges,
                    "words": [f"w{k}" for k in range(bins)],
                }
            ]
        },
        privacy={"expected_units": 200.0, "epsilon": 100.0, "clip_norm": 0.2},
        phases=[{"trains": "head", "rounds": 40, "sampling_rate": 1.0, "head_lr": 1e-9}],
    )
    weight = np.zeros((2, bins + 1), np.float32)
    weight[1, :bins] = np.log(levels / (1 - levels)) / 2
    start = {"head.weight": weight, "head.bias": np.zeros(2, np.float32)}
    ages = {"north": list(range(0, bins, 2)) * 20, "south": list(range(1, bins, 2)) * 20}
    workers = {
        site: make_worker(contract, rows(tmp_path / f"{site}.csv", found), site, seed=1)
        for site, found in ages.items()
    }
    run = FederatedRun(contract, RunStore.create(tmp_path / "run", contract), "r", start)
    used = []
    for _ in range(contract.rounds):
        run.begin()
        asked = messages.unpack(run.request("north")).header
        assert isinstance(asked, Train)
        assert asked.clip_norm == run.server_state.clip_norm
        for site, worker in workers.items():
            request = run.request(site)
            run.accept(site, len(request), worker.handle(request))
        facts = run.finish()
        assert facts.sites == ("north", "south")
        assert facts.clip_norm == asked.clip_norm
        assert set(facts.released["north"]) == {"unclipped"}
        used.append(run.server_state.clip_norm)
    norms = np.sort(math.sqrt(2) * math.sqrt(5) * levels)
    # Of n equal shares the one at the quantile, and half a step to each side for the noise.
    low, high = (norms[int(quantile * bins) + k] for k in (-2, 1))
    assert low < float(np.exp(np.mean(np.log(used[-10:])))) < high
    assert used[0] < 0.6 * low  # it began far below


# --- what a server may ask -------------------------------------------------------------------


@pytest.mark.parametrize("asked", [None, 9.9e-4, 1e-6, 5.1, 1e6])
def test_a_clip_norm_outside_the_contract_is_refused(
    adaptive: Contract, tmp_path: Path, make_worker: MakeWorker, asked: float | None
) -> None:
    worker = make_worker(adaptive, everybody(tmp_path / "rows.csv"))
    reply = ask(worker, clip_norm=asked)
    assert isinstance(reply, Refusal)
    assert reply.code == "E202"
    assert not worker.ledger.charges
    for number, bound in ((1, 1e-3), (2, 5.0)):
        assert isinstance(ask(worker, number, clip_norm=bound), Update)


def test_a_clip_norm_without_adaptive_clipping_is_refused(
    adaptive: Contract, tmp_path: Path, make_worker: MakeWorker
) -> None:
    contract = adaptive.changed(privacy={"adaptive": None})
    worker = make_worker(contract, everybody(tmp_path / "rows.csv"))
    for given in (0.5, contract.privacy.clip_norm):
        reply = ask(worker, clip_norm=given)
        assert isinstance(reply, Refusal)
        assert reply.code == "E202"
    assert not worker.ledger.charges
    assert isinstance(ask(worker, clip_norm=None), Update)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "0.0", "-1.0", '"1"', "1e300"])
def test_what_is_no_clip_norm_is_no_message(
    adaptive: Contract, tmp_path: Path, make_worker: MakeWorker, value: str
) -> None:
    worker = make_worker(adaptive, everybody(tmp_path / "rows.csv"))
    wire = messages.pack(
        Message(Train(contract=worker.contract.hash, run="r", round=1, clip_norm=0.25), initial())
    )
    text = b'\\"clip_norm\\":0.25'
    assert text in wire
    # Of the same length, so that the file's own header stays right.
    other = f'\\"clip_norm\\":{value}'.encode()
    size = int.from_bytes(wire[:8], "little") + len(other) - len(text)
    body = wire[8:].replace(text, other)
    reply = messages.unpack(worker.handle(size.to_bytes(8, "little") + body)).header
    assert isinstance(reply, Refusal)
    assert reply.code == "E501"
    assert not worker.ledger.charges


def test_the_same_round_with_another_clip_norm_is_another_request(
    adaptive: Contract, tmp_path: Path, make_worker: MakeWorker
) -> None:
    """Else a server would get two sums of one step for the price of one."""
    worker = make_worker(adaptive, everybody(tmp_path / "rows.csv"))
    ask(worker, clip_norm=0.5)
    again = ask(worker, clip_norm=0.6)
    assert isinstance(again, Refusal)
    assert again.code == "E202"
    assert len(worker.ledger.charges) == 1


def test_the_clip_norm_that_is_asked_for_is_the_one_that_holds(
    adaptive: Contract, tmp_path: Path, make_worker: MakeWorker, monkeypatch: Patch
) -> None:
    """Everybody is clipped: twice the norm gives twice the sum."""
    monkeypatch.setattr(dp_optimizer, "NOISE_ROUNDING_LOG2", -40)
    contract = adaptive.changed(
        phases=[{"trains": "head", "rounds": 3, "sampling_rate": 1.0, "head_lr": 10.0}]
    )
    worker = make_worker(contract, everybody(tmp_path / "rows.csv"))
    monkeypatch.setattr(NoiseSource, "normal", lambda self, shape: np.zeros(shape))
    sums = []
    for number, clip in ((1, 0.1), (2, 0.2)):
        asked = Train(contract=contract.hash, run="r", round=number, clip_norm=clip)
        reply = messages.unpack(worker.handle(messages.pack(Message(asked, initial()))))
        sums.append(reply.arrays["head.weight"])
    np.testing.assert_allclose(sums[1], 2 * sums[0], rtol=1e-4, atol=1e-6)
    assert np.abs(sums[0]).max() > 0.01


# --- contract, policy, ledger ----------------------------------------------------------------


def codes(contract: Contract, path: Path, **permits: Any) -> list[tuple[str, str]]:
    policy = permissive_policy(contract, "north", path, None)
    policy = policy.model_copy(update={"permits": policy.permits.model_copy(update=permits)})
    found: list[RefusalError] = policy.refusals(contract)
    return [(refusal.code, str(refusal)) for refusal in found]


def test_the_owners_clip_norm_is_held_against_the_highest(
    adaptive: Contract, tmp_path: Path
) -> None:
    """The first clip norm (0.5) fits below 4.9, the highest (5.0) does not."""
    assert codes(adaptive, tmp_path / "x", max_clip_norm=5.0) == []
    assert codes(adaptive, tmp_path / "x", max_clip_norm=4.9) == [
        (
            "E205",
            "The contract 'small': clip norm 5 is looser than permits.max_clip_norm = 4.9.",
        )
    ]


def test_the_share_is_a_metric_that_the_owner_must_permit(
    adaptive: Contract, tmp_path: Path
) -> None:
    assert adaptive.metrics == ("unclipped",)
    assert codes(adaptive, tmp_path / "x", metrics=("loss", "accuracy")) == [
        (
            "E206",
            "The contract 'small' asks for the metric 'unclipped', which is not in "
            "permits.metrics.",
        )
    ]


def test_it_costs_what_the_plan_costs_without(
    adaptive: Contract, tmp_path: Path, make_worker: MakeWorker
) -> None:
    plain = adaptive.changed(privacy={"adaptive": None})
    assert plan(adaptive) == plan(plain)
    charged = []
    for contract, clips in ((adaptive, (0.5, 5.0, 1e-3)), (plain, (None,) * 3)):
        worker = make_worker(contract, everybody(tmp_path / "rows.csv"))
        spent = [ask(worker, n, clip_norm=clip).epsilon for n, clip in enumerate(clips, 1)]
        charged.append(
            (
                spent,
                [
                    (c.noise_multiplier, c.sampling_rate, c.steps, c.order)
                    for c in worker.ledger.charges.values()
                ],
            )
        )
    assert charged[0] == charged[1]
    assert charged[0][0][-1] == pytest.approx(8.0, rel=1e-4)


@pytest.mark.parametrize(
    ("privacy", "told"),
    [
        (
            {"clip_norm": 6.0},
            "clip_norm must be between adaptive.min_clip_norm and adaptive.max_clip_norm",
        ),
        (
            {"clip_norm": 1e-4},
            "clip_norm must be between adaptive.min_clip_norm and adaptive.max_clip_norm",
        ),
        ({"mode": "none"}, 'mode = "none" does not clip'),
        ({"adaptive": {"quantile": 1.0}}, "privacy.adaptive.quantile"),
        ({"adaptive": {"quantile": 0.0}}, "privacy.adaptive.quantile"),
        ({"adaptive": {"share": 0.0}}, "privacy.adaptive.share"),
        ({"adaptive": {"share": 0.51}}, "privacy.adaptive.share"),
        ({"adaptive": {"lr": math.nan}}, "privacy.adaptive.lr"),
        ({"adaptive": {"max_clip_norm": math.inf}}, "privacy.adaptive.max_clip_norm"),
    ],
)
def test_a_contract_that_means_nothing_is_refused(
    adaptive: Contract, privacy: dict[str, Any], told: str
) -> None:
    with pytest.raises(ContractError) as error:
        adaptive.changed(privacy=privacy)
    assert [told in problem for problem in error.value.problems] == [True]


def test_all_shares_together_are_at_most_a_half(adaptive: Contract) -> None:
    releases = [{"metric": "loss", "share": 0.46}]
    with pytest.raises(ContractError, match="more than half of the budget"):
        adaptive.changed(releases=releases)
    assert adaptive.changed(releases=[{"metric": "loss", "share": 0.45}]).released_share == 0.5


def test_a_unit_whose_gradient_is_not_finite_counts_as_clipped() -> None:
    optimizer = dp_optimizer.DPOptimizer(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0),
        source=NoiseSource(site="x", insecure_seed=1),
        noise_multiplier=1.0,
        clip_norm=1.0,
        divisor=1.0,
    )
    optimizer.begin()
    p = optimizer.params[0]
    p.grad_sample = torch.tensor([[0.5, 0.5], [3.0, 4.0], [math.nan, 0.0], [math.inf, 1.0]])
    optimizer.clip_and_accumulate()
    assert (optimizer.units, optimizer.unclipped) == (4, 1)
