"""A site that lies under masks shifts the sum as far as it says, and the bound is what holds it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silotune.common.contract.contract import Contract
from silotune.common.errors import ContractError, RunError, UsageError
from silotune.server.rounds.exchange import drive_round
from silotune.simulations.attacks import poisoning
from silotune.simulations.attacks.poisoning import Poison, malicious_sites, poisoned_client
from silotune.simulations.comparison.recipe import Recipe
from silotune.simulations.datasets.split import Split
from silotune.simulations.execution.variants import Job
from silotune.simulations.study.config import Study
from silotune.simulations.study.study import cells_of, compare, request_digest
from tests import tiny
from tests.client.worker.test_secagg import SITES, Federation
from tests.simulations.datasets.test_partition import contract_of, split_where_smokers_are_ill

Mean = Callable[..., np.ndarray]
SECURE = {"bound": 4.0}
QUANTUM = 4 * 4.0 / 2**22  # of the bound above, of four sites


@pytest.fixture
def mean(table_contract: Contract, tmp_path: Path, write_rows: Callable[..., Path]) -> Mean:
    """mean(poison, clear=False, rounds=1, **secure) -> the entries that the server's sum opens to,
    divided by the weights; the sites' noise is the same each time."""
    count = 0

    def opened(
        poison: Poison | None = None, *, clear: bool = False, rounds: int = 1, **secure: Any
    ) -> np.ndarray:
        nonlocal count
        count += 1
        contract = table_contract.changed(
            aggregation={"server_momentum": 0.0, "averaging_start": 0.9}
        )
        federation = Federation(contract, tmp_path / str(count), write_rows, **SECURE | secure)
        if clear:
            # Without keys, for what `poisoned_client` sends is not signed anew.
            federation.contract = federation.contract.changed(
                secure_aggregation=None,
                sites=[
                    {"name": site.name, "weight": site.weight} for site in federation.contract.sites
                ],
            )
            for site in SITES:
                federation.restart(site)
        handles = federation.handles()
        federation.poison = poison
        for site in malicious_sites(federation.contract, poison):
            assert poison is not None
            if clear:
                handles[site] = poisoned_client(handles[site], poison)
            else:
                federation.restart(site)
        run = federation.run(evaluate=None)
        for _ in range(rounds):
            drive_round(run.stages(handles), handles)
        return np.concatenate([run.adapter[n].ravel() for n in sorted(run.adapter)])

    return opened


@pytest.mark.parametrize("kind", ["sign", "scale"])
def test_a_lie_under_masks_comes_to_what_it_comes_to_in_the_clear(mean: Mean, kind: str) -> None:
    lie = Poison.model_validate({"kind": kind, "factor": 5.0})
    masked, clear = mean(lie), mean(lie, clear=True)
    np.testing.assert_allclose(masked, clear, atol=10 * QUANTUM)
    honest = mean()
    np.testing.assert_allclose(mean(clear=True), honest, atol=2 * QUANTUM)
    assert np.abs(masked - honest).max() > 1000 * QUANTUM


def test_the_bound_holds_the_sum_and_not_the_site(mean: Mean) -> None:
    """The site has a tenth of the weights: an honest worker's code could shift an entry by 0.4."""
    lie, shifts = Poison(kind="bound"), {}
    for bound in (4.0, 64.0):
        honest, found = mean(bound=bound), mean(lie, bound=bound)
        shifts[bound] = np.abs(found - honest)
        assert (np.abs(found) <= bound).all()
        assert (shifts[bound] <= bound + np.abs(honest)).all()
        assert (shifts[bound] > 0.5 * bound).all()
    assert shifts[64.0].min() > 10 * shifts[4.0].max()
    # However large a factor, the sum opens, and the bound is where it ends.
    found = mean(Poison(kind="scale", factor=1e6))
    assert 0.5 * 4.0 < np.abs(found).max() <= 4.0


def test_a_lie_that_leaves_the_others_no_room_stops_the_run(
    mean: Mean, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poisoning, "ROOM", -4)
    with pytest.raises(RunError, match="beyond what the contract's bound allows") as caught:
        mean(Poison(kind="bound"))
    assert caught.value.code == "E505"


def test_a_lie_now_and_then_is_told_in_those_rounds_alone(mean: Mean) -> None:
    lie = Poison(kind="sign", every=2)
    np.testing.assert_array_equal(mean(lie), mean())
    assert np.abs(mean(lie, rounds=2) - mean(rounds=2)).max() > 1000 * QUANTUM


def test_a_lie_of_the_sums_bound_needs_masks() -> None:
    with pytest.raises(UsageError, match="it needs masks"):
        malicious_sites(contract_of(), Poison(kind="bound"))


# In studies


@pytest.fixture
def study() -> Study:
    secure = {"bound": 8.0, "max_colluding_sites": 1, "threshold": 5}
    sign, gate = {"kind": "sign", "factor": 100.0}, {"metric": "accuracy", "max_degradation": 0.2}
    return Study.model_validate(
        {
            "title": "lies",
            "recipe": "small",
            "repeats": 1,
            "sites": 5,
            "epsilons": [50.0],
            "partitions": {"alike": {"kind": "iid"}},
            "variants": {
                "honest": {"masked": True, "contract": {"secure_aggregation": secure}},
                "sign": {
                    "masked": True,
                    "poison": sign,
                    "contract": {"secure_aggregation": secure},
                },
                "gate": {
                    "masked": True,
                    "poison": sign | {"every": 2},
                    "contract": {"secure_aggregation": secure, "aggregation": {"gate": gate}},
                },
            },
        }
    )


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Smokers are ill here, so that there is something to learn."""
    source = split_where_smokers_are_ill(tmp_path / "rows")
    base = contract_of().changed(
        phases=[{"trains": "head", "rounds": 4, "sampling_rate": 1.0, "head_lr": 2.0}],
        aggregation={"server_momentum": 0.0},
    )
    return Recipe(
        "small", base, tiny.recipe_config("small", "accuracy"), {}, lambda _: Split([], source)
    )


def test_variants_with_masks_are_run_with_them_and_asked_once(
    study: Study, recipe: Recipe, tmp_path: Path, ran: list[Job]
) -> None:
    found = compare(study, tmp_path / "out", 1, recipe)
    cells = {cell["variant"]: cell for cell in found["cells"].values()}
    accuracy = {variant: cell["scores"]["accuracy"] for variant, cell in cells.items()}
    assert accuracy["honest"] == 1.0
    assert accuracy["sign"] < 0.5
    assert accuracy["gate"] == 1.0
    assert [cells[variant]["declined"] for variant in cells] == [2, 0, 0]  # gate, honest, sign
    rosters = set()
    for job in ran:
        secure = job.contract.secure_aggregation
        assert secure is not None
        assert (secure.bound, secure.max_colluding_sites, secure.threshold) == (8.0, 1, 5)
        assert set(job.keys) == set(job.contract.weights())
        rosters |= {site.public_key for site in job.contract.sites}
    (kept,) = next(cells_of(study, recipe)).contracts
    assert len(rosters) == 3 * 5  # each job's own
    assert not rosters & {site.public_key for site in kept.sites}
    ran.clear()
    assert compare(study, tmp_path / "out", 1, recipe)["cells"] == found["cells"]
    assert not ran


def test_what_a_cell_asks_for_is_the_bound_and_not_the_keys(study: Study, recipe: Recipe) -> None:
    def hashes(study: Study) -> list[str]:
        return [request_digest(cell, study, "rows") for cell in cells_of(study, recipe)]

    wide = study.model_dump()
    wide["variants"]["sign"]["contract"]["secure_aggregation"]["bound"] = 9.0
    assert hashes(study) == hashes(study)
    same = [a == b for a, b in zip(hashes(study), hashes(Study.model_validate(wide)), strict=True)]
    assert same == [True, False, True]


@pytest.mark.parametrize(
    ("variant", "why"),
    [
        ({"masked": True, "rows": "alone"}, "masks are of sites together"),
        ({"contract": {"secure_aggregation": {"bound": 1.0}}}, "goes with masked = true"),
    ],
)
def test_variants_that_cannot_be_masked_are_refused(variant: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Study.model_validate({"title": "x", "recipe": "small", "variants": {"one": variant}})


def test_masks_that_a_contract_cannot_have_are_told(study: Study, recipe: Recipe) -> None:
    data = study.model_dump()
    data["variants"]["sign"]["contract"]["aggregation"] = {"robust": {"rule": "median"}}
    with pytest.raises(ContractError, match="needs each site's update by itself"):
        list(cells_of(Study.model_validate(data), recipe))
