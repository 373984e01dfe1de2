"""From the runs of all arms to one result: means, spreads and curves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from silotune.common import records
from silotune.common.contract import Contract
from silotune.common.metrics import METRICS, score
from silotune.simulations.arms import Arm, JobResult
from silotune.simulations.verdict import verdict

SHOWN = ("auc", "accuracy", "macro_f1", "loss")


def spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean, sample standard deviation and the values; None when no value is defined."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    return {
        "mean": statistics.fmean(known),
        "sd": statistics.stdev(known) if len(known) > 1 else 0.0,
        "values": known,
    }


def summarise(
    contract: Contract, arms: list[Arm], results: list[JobResult], facts: dict[str, Any],
    split: Path,
) -> dict[str, Any]:
    """The parts of result.json that come from the runs."""
    metric = facts["metric"]
    sites = [site.name for site in contract.sites]
    labels = {  # the classes of the public test rows of each site
        site: records.read(split / "test" / f"{site}.csv", contract).labels for site in sites
    }
    counts = np.bincount(np.concatenate(list(labels.values())), minlength=len(contract.label_names))
    rows = [_majority(labels, counts, metric)]
    rows += [
        _arm_row(arm, [r for r in results if r.arm == arm.name], sites, metric, contract)
        for arm in arms
    ]
    main = min((r for r in results if r.arm == arms[0].name), key=lambda r: r.repeat)
    last = main.rounds[-1]
    return {
        "privacy": {
            "unit": contract.privacy.unit,
            "adjacency": f"add or remove one {contract.privacy.unit}",
            "masked": contract.quorum if contract.secure_aggregation else None,
            "epsilon": contract.privacy.epsilon,
            "delta": contract.privacy.delta,
            "accountant": "RDP",
            "noise": "ChaCha20, keyed by the operating system",
            "sites": [
                {"site": s, "epsilon": last.epsilon.get(s), "delta": contract.target_of(s).delta}
                for s in sites
            ],
        },
        "metric": {"name": metric, "label": METRICS[metric], "higher_is_better": True},
        "verdict": verdict(rows, results, metric, contract, counts.tolist()),
        "arms": rows,
        "curve": [
            {
                "round": f.round,
                "phase": contract.phase_of(f.round).trains,
                "metric": f.metrics.get(metric),
                "loss": f.metrics.get("loss"),
                "seconds": f.seconds,
                "sites": list(f.sites),
                "epsilon": dict(f.epsilon),
            }
            for f in main.rounds
        ],
    }


def _arm_row(
    arm: Arm, runs: list[JobResult], sites: list[str], metric: str, contract: Contract
) -> dict[str, Any]:
    repeats = sorted({r.repeat for r in runs})
    alone = len(arm.contracts) > 1
    # A site alone is judged on the rows like its own; pooled figures would mix four models.
    by_site = {
        s: spread([r.scores[s][metric] for r in runs if not alone or r.sites == (s,)])
        for s in sites
    }
    means = []
    for repeat in repeats:
        of_sites = [
            r.scores[s][metric]
            for s in sites
            for r in runs
            if r.repeat == repeat and (not alone or r.sites == (s,))
        ]
        known = [v for v in of_sites if v is not None]
        means.append(statistics.fmean(known) if known else None)
    per_site_up = [sum(f.bytes_up for f in r.rounds) / len(r.sites) for r in runs]
    per_site_down = [sum(f.bytes_down for f in r.rounds) / len(r.sites) for r in runs]
    federated = arm.contracts[0].rounds and len(arm.contracts[0].sites) > 1
    return {
        "name": arm.name,
        "label": arm.label,
        "main": arm.main,
        "private": arm.private,
        "repeats": len(repeats),
        "epsilon": contract.privacy.epsilon if arm.private else None,
        "delta": contract.privacy.delta if arm.private else None,
        "metrics": {
            name: spread(_overall(runs, repeats, name)) for name in SHOWN
        },
        "sites": by_site,
        "sites_mean": spread(means),
        "bytes_up": round(statistics.fmean(per_site_up)) if federated else 0,
        "bytes_down": round(statistics.fmean(per_site_down)) if federated else 0,
        "seconds": sum(r.seconds for r in runs) / len(repeats),
    }


def _overall(runs: list[JobResult], repeats: list[int], name: str) -> list[float | None]:
    """One value a repeat on all public rows; for sites alone, the mean over their models."""
    values: list[float | None] = []
    for repeat in repeats:
        known = [
            v for r in runs if r.repeat == repeat and (v := r.scores[""][name]) is not None
        ]
        values.append(statistics.fmean(known) if known else None)
    return values


def _majority(
    labels: dict[str, np.ndarray], counts: np.ndarray, metric: str
) -> dict[str, Any]:
    """Always answering the class that most public test rows have."""
    everything = np.concatenate(list(labels.values()))
    shares = counts / len(everything)
    # Logits of the class shares, the same for every row: AUC 0.5, the best constant log loss.
    row = np.log(np.maximum(shares, 1e-9)).astype(np.float32)

    def of(ys: np.ndarray) -> dict[str, Any]:
        return vars(score(np.tile(row, (len(ys), 1)), ys))

    by_site = {s: spread([of(ys)[metric]]) for s, ys in labels.items()}
    known = [v["mean"] for v in by_site.values() if v]
    return {
        "name": "majority",
        "label": "Always the majority class",
        "main": False,
        "private": True,
        "repeats": 1,
        "epsilon": None,
        "delta": None,
        "metrics": {name: spread([of(everything)[name]]) for name in SHOWN},
        "sites": by_site,
        "sites_mean": spread(known),
        "bytes_up": 0,
        "bytes_down": 0,
        "seconds": 0.0,
    }
