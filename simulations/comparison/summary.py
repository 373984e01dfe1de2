"""From the runs of all variants to one result: means, spreads and curves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from silotune.client.privacy.accountant import EXACT
from silotune.common.contract.contract import Contract
from silotune.common.contract.task import LOWER_IS_BETTER, Language, Ranking
from silotune.common.errors import counted
from silotune.common.tasks.metrics import METRICS, constant
from silotune.common.tokenization.token_lengths import Lengths
from silotune.server.rounds.evaluation import scores_by_group
from silotune.simulations.execution.variants import JobResult, Variant, main_of
from silotune.simulations.recipes.recipe_config import RecipeConfig
from silotune.simulations.verdict.differences import HeldOut
from silotune.simulations.verdict.verdict import verdict


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
    contract: Contract,
    variants: list[Variant],
    results: list[JobResult],
    config: RecipeConfig,
    public: Path,
    lengths: Lengths,
    *,
    insecure: bool = False,
) -> dict[str, Any]:
    """The parts of result.json that come from the runs. public: where the test rows are; lengths:
    of the texts of all rows; insecure: the noise is from a seed that is known."""
    metric = config.metric
    sites = [site.name for site in contract.sites]
    held_out = HeldOut.read(public, contract)
    same_outputs = _same_outputs(contract, held_out, results)
    main = main_of(variants)
    rows = [
        _variant_row(
            variant, [r for r in results if r.variant == variant.name], sites, metric, contract
        )
        | {"main": variant is main}
        for variant in variants
    ]
    if same_outputs is not None:
        rows = [_same_answer(held_out, same_outputs, contract, metric), *rows]
    own = main.contracts[0]
    first_runs = [r for r in results if r.variant == main.name and r.repeat == 0]
    spent = {
        site: e for run in first_runs if run.rounds for site, e in run.rounds[-1].epsilon.items()
    }
    # Sites by themselves have a curve each, and none of them is the variant's.
    curve = first_runs[0].rounds if len(first_runs) == 1 else ()
    return {
        "privacy": {
            "unit": contract.privacy.unit,
            "adjacency": f"add or remove one {contract.privacy.unit}",
            "masked": own.quorum if own.secure_aggregation else None,
            **contract.largest_target._asdict(),
            "accountant": EXACT,
            "noise": "ChaCha20, keyed by the operating system",
            "sites": [
                {
                    "site": s,
                    "epsilon": spent.get(s),
                    "budget": contract.target_of(s).epsilon,
                    "delta": contract.target_of(s).delta,
                }
                for s in sites
            ],
        },
        "metric": {
            "name": metric,
            "label": METRICS[metric],
            "higher_is_better": metric not in LOWER_IS_BETTER,
        },
        **_verdict(
            rows, results, metric, contract, held_out, same_outputs, lengths, insecure=insecure
        ),
        "variants": rows,
        "curve": [
            {
                "round": f.round,
                "phase": own.round_plan(f.round).phase.trains,
                "metric": f.metrics.get(metric),
                "loss": f.metrics.get("loss"),
                "seconds": f.seconds,
                "sites": list(f.sites),
                "epsilon": dict(f.epsilon),
            }
            for f in curve
        ],
    }


def _verdict(
    rows: list[dict[str, Any]],
    results: list[JobResult],
    metric: str,
    contract: Contract,
    held_out: HeldOut,
    same: list[Any] | None,
    lengths: Lengths,
    *,
    insecure: bool,
) -> dict[str, Any]:
    """Verdict and calibration, of the variants that have figures. Those without are warnings; where
    the main one has none the word says so."""
    warnings = [
        f"{row['label']} {stopped['word']} in {stopped['runs']} of "
        f"{counted(row['repeats'], 'repeat')} ({stopped['code']}). {stopped['why']}"
        for row in rows
        if (stopped := row["stopped"])
    ]
    main = next(row for row in rows if row["main"])
    if main["stopped"]:
        word = main["stopped"]["word"]
        stopped = {"word": word, "headline": word, "checklist": [], "lines": []}
        return {"verdict": stopped | {"warnings": warnings}, "calibration": None}
    found = verdict(
        [row for row in rows if not row["stopped"]],
        results,
        metric,
        contract,
        held_out,
        same,
        lengths,
        insecure=insecure,
    )
    found["verdict"]["warnings"] += warnings
    return found


def _variant_row(
    variant: Variant, runs: list[JobResult], sites: list[str], metric: str, contract: Contract
) -> dict[str, Any]:
    repeats = sorted({r.repeat for r in runs})
    in_order = sorted(runs, key=lambda r: r.repeat)  # not as they ended
    stopped = next((r.stopped for r in in_order if r.stopped), None)
    done = [] if stopped else runs  # a mean over the runs that did not diverge says nothing
    alone = len(variant.contracts) > 1
    # A site alone is judged on the rows like its own; pooled figures would mix four models.
    by_site = {
        s: spread([r.scores[s][metric] for r in done if not alone or r.sites == (s,)])
        for s in sites
    }
    means = []
    for repeat in repeats:
        of_sites = [
            r.scores[s][metric]
            for s in sites
            for r in done
            if r.repeat == repeat and (not alone or r.sites == (s,))
        ]
        known = [v for v in of_sites if v is not None]
        means.append(statistics.fmean(known) if known else None)
    per_site_up = [sum(f.bytes_up for f in r.rounds) / len(r.sites) for r in runs]
    per_site_down = [sum(f.bytes_down for f in r.rounds) / len(r.sites) for r in runs]
    targets = [own.largest_target for own in variant.contracts]
    federated = variant.contracts[0].rounds and len(variant.contracts[0].sites) > 1
    return {
        "name": variant.name,
        "label": variant.label,
        "private": variant.private,
        "repeats": len(repeats),
        "epsilon": max(target.epsilon for target in targets) if variant.private else None,
        "delta": max(target.delta for target in targets) if variant.private else None,
        "stopped": stopped
        and {
            "word": stopped.word,
            "runs": sum(r.stopped is not None for r in runs),
            "code": stopped.code,
            "why": stopped.why,
        },
        "metrics": {name: spread(_overall(done, repeats, name)) for name in contract.task.metrics},
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
            v for r in runs if r.repeat == repeat and (v := r.scores[""].get(name)) is not None
        ]
        values.append(statistics.fmean(known) if known else None)
    return values


def _same_outputs(
    contract: Contract, rows: HeldOut, results: Sequence[JobResult]
) -> list[Any] | None:
    """The outputs of always giving the best same answer (common/tasks/metrics.py). For a ranking it
    is a random order: with equal scores the relevant candidates count as the last. For language
    the base model as it is; None where no run has its outputs."""
    if isinstance(contract.task, Language):
        return next((list(run.untrained) for run in results if len(run.untrained)), None)
    if isinstance(contract.task, Ranking):
        drawn = np.random.default_rng(0).random((len(rows.labels), 1)).astype(np.float32)
        return list(drawn)
    return constant(contract.task, rows.labels)


def _same_answer(
    rows: HeldOut, outputs: list[Any], contract: Contract, metric: str
) -> dict[str, Any]:
    """The row of `_same_outputs` in the table of variants."""
    task = contract.task
    scores = scores_by_group(task, outputs, rows.labels, rows.queries, rows.sites)
    by_site = {site: spread([own.get(metric)]) for site, own in scores.items() if site}
    known = [v["mean"] for v in by_site.values() if v]
    overall = scores[""]
    labels_of = {
        "classification": "Always the majority class",
        "ranking": "A random order",
        "language": "The base model as it is",
    }
    return {
        "name": "majority",
        "label": labels_of.get(task.kind, "Always the same"),
        "main": False,
        "private": True,
        "repeats": 1,
        "epsilon": None,
        "delta": None,
        "stopped": None,
        "metrics": {name: spread([overall.get(name)]) for name in task.metrics},
        "sites": by_site,
        "sites_mean": spread(known),
        "bytes_up": 0,
        "bytes_down": 0,
        "seconds": 0.0,
    }
