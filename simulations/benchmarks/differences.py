"""What the difference of two sums shows of one site: `make bench-differences` writes
results/differences.json.

Secure aggregation hides one update within one sum. A server that gets a sum with a site and a sum
without it can subtract them: what is left is that site's update, its noise, and the noise that all
the other sites added to both sums (So et al. 2023, arXiv 2106.03328). Here the server has its best
case: both sums begin with the same adapter, so that the others' updates are the same but for their
noise. (Sites refuse that: client/privacy/site_sets.py. A server that changes the adapter's last
bits, or waits until it hardly moves, comes near to it.)

The recipe heart-diagnosis, its records, its plan at three ε, the head phase, in which every record
is in every step; the adapters are those of a run without masks under the same noise. For a site:

  signal      the norm of its weighted update as it would be without noise, clipped as always
  deviation   the standard deviation of an entry of the difference around that, over DRAWS of the
              noise; `alone` is the same for the weighted update by itself, as a server sees it
              that has no masks
  stands_out  signal / deviation: by how many standard deviations the update stands out of the
              noise along its own direction, which is the most that any linear test can have whose
              server knows what it looks for
  energy      signal^2 / (entries x deviation^2): against the noise in all directions, as a server
              has it that knows nothing; below 1 the difference is mostly noise
  cosine      between the difference and the update, the mean over the draws
  record      by how many standard deviations one record moves it, at most (its clip norm at each
              step): what the site's (ε, δ) bounds, whoever looks
  as_one      of how many differences the mean shows as much as the update by itself:
              (alone.stands_out / stands_out)^2

Sums in clear stand for masked ones, which differ from them by the ring's rounding
(common/secagg/fixed_point.py).
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from subprocess import check_output
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from silotune.client.privacy import accountant
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.site.policy import permissive_policy
from silotune.client.training.local_round import train_round
from silotune.client.training.noise import NoiseSource
from silotune.client.worker.worker import Worker
from silotune.common.contract.contract import Contract
from silotune.common.protocol.messages import Arrays
from silotune.server.aggregation.server_state import ServerState
from silotune.simulations.benchmarks import command_line
from silotune.simulations.comparison.recipe import load_recipe
from silotune.simulations.datasets import catalog

RESULTS = Path("simulations/benchmarks/results/differences.json")
RECIPE, EPSILONS, ROUNDS, DRAWS = "heart-diagnosis", (8.0, 3.0, 1.0), (1, 10), 20
Vector = NDArray[np.float64]


class NoNoise(NoiseSource):
    """For what an update would be; nothing that is computed with it may leave a site."""

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        return np.zeros(shape)


class Site:
    """A site's updates in a round, with and without noise, as they stand in the sum."""

    def __init__(self, contract: Contract, name: str, file: Path, model: Path | None) -> None:
        policy = permissive_policy(contract, name, file, model)
        self.worker = Worker(policy, contract, PrivacyLedger.in_memory(name))
        self.contract, self.weight = contract, contract.weight_share(name)
        self._silent = NoNoise(site=name)

    def update(self, number: int, adapter: Arrays, *, noise: bool = True) -> Arrays:
        contract, worker = self.contract, self.worker
        change, _ = train_round(
            contract,
            contract.round_plan(number),
            accountant.mechanism_of(contract, worker.plan, number),
            worker.model,
            worker.data,
            adapter,
            worker.source if noise else self._silent,
            contract.privacy.clip_norm,
        )
        return {name: np.float32(self.weight) * array for name, array in change.items()}

    def vector(self, number: int, adapter: Arrays, *, noise: bool = True) -> Vector:
        found = self.update(number, adapter, noise=noise)
        return np.concatenate([found[name].ravel() for name in sorted(found)]).astype(np.float64)

    def one_record(self, number: int) -> float:
        """By how much one record moves the weighted update, at most."""
        mechanism = accountant.mechanism_of(self.contract, self.worker.plan, number)
        plan, p = self.contract.round_plan(number), self.contract.privacy
        divisor = p.expected_units * mechanism.sampling_rate
        rate = plan.learning_rate("head.weight")
        return self.weight * rate * mechanism.steps * p.clip_norm / divisor


def measure(sites: Mapping[str, Site], number: int, adapter: Arrays, draws: int) -> dict[str, Any]:
    """Each site's update of this round, as the difference of a sum with it and one without."""
    found = {}
    noisy = {
        name: [site.vector(number, adapter) for _ in range(2 * draws)]
        for name, site in sites.items()
    }
    for name, site in sites.items():
        update = site.vector(number, adapter, noise=False)
        others = [other for other in sites if other != name]
        signal = float(np.linalg.norm(update))
        alone = np.array([noisy[name][at] - update for at in range(draws)])
        with_it = [sum(noisy[s][at] for s in sites) for at in range(draws)]
        without = [sum(noisy[s][draws + at] for s in others) for at in range(draws)]
        differences = [a - b for a, b in zip(with_it, without, strict=True)]
        noise = np.array([difference - update for difference in differences])
        deviation, by_itself = float(noise.std()), float(alone.std())
        cosines = [d @ update / (np.linalg.norm(d) * signal) for d in differences]
        found[name] = {
            "entries": len(update),
            "signal": signal,
            "deviation": deviation,
            "stands_out": signal / deviation,
            "energy": signal**2 / (len(update) * deviation**2),
            "cosine": float(np.mean(cosines)),
            "record": site.one_record(number) / deviation,
            "as_one": (deviation / by_itself) ** 2,
            "alone": {
                "deviation": by_itself,
                "stands_out": signal / by_itself,
                "energy": signal**2 / (len(update) * by_itself**2),
                "record": site.one_record(number) / by_itself,
            },
        }
    return found


def adapters(sites: Mapping[str, Site], contract: Contract, last: int) -> list[Arrays]:
    """What the rounds up to `last` begin with, in a run of all these sites."""
    model = next(iter(sites.values())).worker.model
    iterate, found = ServerState(contract, model.initial_arrays()), []
    for _ in range(last):
        found.append(iterate.request_tensors())
        updates = [
            site.update(iterate.server_round, iterate.request_tensors()) for site in sites.values()
        ]
        iterate.step({n: np.sum([u[n] for u in updates], axis=0) for n in updates[0]}, {})
        iterate.next()
    return found


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    """Measure, print the table and write the results."""
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for epsilon in EPSILONS:
            recipe = load_recipe(RECIPE).at(epsilon)
            contract = recipe.contract
            _, split, _ = recipe.rows(Path(folder))
            sites = {
                name: Site(
                    contract,
                    name,
                    split / "train" / f"{name}.csv",
                    catalog.fetch("all-MiniLM-L6-v2"),
                )
                for name in contract.weights()
            }
            begun = adapters(sites, contract, max(ROUNDS))
            plan = next(iter(sites.values())).worker.plan
            for number in ROUNDS:
                found = measure(sites, number, begun[number - 1], DRAWS)
                sigma = accountant.mechanism_of(contract, plan, number).noise_multiplier
                rows.append(
                    {"epsilon": epsilon, "round": number, "noise_multiplier": sigma, "sites": found}
                )
                for name, row in found.items():
                    alone = row["alone"]
                    print(
                        f"ε {epsilon:g}  round {number:2}  {name:14} stands out "
                        f"{row['stands_out']:5.2f} (alone {alone['stands_out']:5.2f})  "
                        f"energy {row['energy']:6.3f} ({alone['energy']:6.3f})  cosine "
                        f"{row['cosine']:5.2f}  one record {row['record']:.3f} "
                        f"({alone['record']:.3f})  as one: {row['as_one']:.1f}",
                        flush=True,
                    )
    RESULTS.write_text(
        json.dumps(
            rounded(
                {
                    "commit": check_output(
                        ["git", "rev-parse", "--short", "HEAD"], text=True
                    ).strip(),
                    "machine": f"{platform.machine()}, {os.cpu_count()} cores, one used",
                    "at": datetime.now(UTC).isoformat(timespec="seconds"),
                    "recipe": RECIPE,
                    "draws": DRAWS,
                    "rows": rows,
                }
            ),
            indent=1,
            ensure_ascii=False,
        )
        + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    command_line.parser(__doc__).parse_args()
    main()
