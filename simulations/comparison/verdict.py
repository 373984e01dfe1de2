"""The verdict: one word, the figures that justify it, and what a reader must not miss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from silotune.client.privacy.accountant import EXACT
from silotune.common.contract.contract import Contract
from silotune.common.contract.privacy import epsilon_text
from silotune.common.contract.task import LOWER_IS_BETTER
from silotune.common.errors import counted
from silotune.common.tasks.metrics import METRICS
from silotune.common.tokenization.token_lengths import Lengths
from silotune.simulations.execution.variants import MAIN, JobResult, trained

OTHERS = {
    "alone-tuned": "sites alone",
    "federated-head": "DP head",
    "federated-one-hot": "DP one-hot regression",
    "federated-no-dp": "without DP",
    "pooled-no-dp": "pooled without DP",
    "plain": "plain model without DP",
}
INSECURE = "insecure_seed: the noise can be removed; this run gives no privacy."
LOG_LOSS = ("classification", "multi-label", "ranking")  # of these the loss is a log loss
SHORT = {"alone": "alone by the same plan", "alone-tuned": "alone with own learning rates"}
WITHOUT_DP = ("federated-no-dp", "pooled-no-dp", "plain")
BASELINES = {
    "federated-head": "the DP head on the frozen encoder",
    "federated-one-hot": "the DP one-hot regression",
}


def verdict(
    rows: Sequence[Mapping[str, Any]],
    results: Sequence[JobResult],
    metric: str,
    contract: Contract,
    labels: Sequence[Any],
    queries: int = 0,
    lengths: Lengths = Lengths(),  # noqa: B008 - frozen
    *,
    insecure: bool = False,
) -> dict[str, Any]:
    """rows: the variants of result.json, of which the one that is "main" is judged; labels: the
    public rows' targets; queries: how many there are to rank for; lengths: of the
    texts; insecure: the noise is from a seed that is known. Word, lines and warnings.

    word: "useless" if the metric is not better than always giving the same answer; "weak" if a
    site alone does as well on everybody's rows, or the model knows one class only; else "usable".
    """
    by_name = {row["name"]: row for row in rows}
    means = {name: row["metrics"][metric]["mean"] for name, row in by_name.items()}
    main, name = next(row for row in rows if row["main"]), METRICS[metric]
    here, runs = means[main["name"]], [r for r in results if r.variant == main["name"]]
    # The others are baselines of the contract's own variant, and of no other.
    baselines = set(by_name) if main["name"] == MAIN else set[str]()
    sign = -1 if metric in LOWER_IS_BETTER else 1

    def lead(other: float) -> float:
        """How much better the federation is."""
        return float(sign * (here - other))

    same, error = means.get("majority"), standard_error(metric, here, labels, queries)
    lines, warnings = [_figures(main, means, metric, contract)], list[str]()
    if not baselines:
        lines.append(f"These are of: {main['label']}. The contract's own variant was not run.")
    if error:  # of figures such as AUC 1 the formula gives 0, which is no error that rows have
        lines.append(
            ("± is the spread over runs. " if main["repeats"] > 1 else "")
            + f"With {len(labels):,} test records each figure has a standard error of {error:.3f}."
        )

    alone = {
        variant: by_name[variant] for variant in ("alone", "alone-tuned") if variant in baselines
    }
    if alone and all(row["sites_mean"] for row in (main, *alone.values())):
        defined = sum(cell is not None for cell in main["sites"].values())
        own = {
            variant: row["sites_mean"]["mean"]
            for variant, row in {**alone, main["name"]: main}.items()
        }
        lines.append(
            f"On test records of its own site: {name} {own[main['name']]:.3f} with the "
            f"federation (mean over {defined} of {counted(len(contract.sites), 'site')}, for "
            "which it is defined); "
            + ", ".join(f"{own[a]:.3f} {SHORT[a]}" for a in alone)
            + ". On all test records: "
            + f"{here:.3f}; "
            + ", ".join(f"{means[a]:.3f} {SHORT[a]}" for a in alone)
            + "."
        )
        best = max(alone, key=lambda variant: sign * own[variant])
        noise = max(row["sites_mean"]["sd"] for row in (main, alone[best]))
        if sign * (own[main["name"]] - own[best]) <= noise:
            warnings.append(
                "On their own test records sites have no measurable gain over "
                f"{SHORT[best]}: {own[main['name']] - own[best]:+.3f} ±{noise:.3f}."
            )
    if "federated-no-dp" in baselines:
        losses = [by_name[a]["metrics"]["loss"]["mean"] for a in (main["name"], "federated-no-dp")]
        lines.append(
            f"Utility loss due to DP: {here - means['federated-no-dp']:+.3f} {name}, and a log "
            f"loss of {losses[0]:.2f} against {losses[1]:.2f}: the noise makes it overconfident."
            if losses[0] > losses[1] and contract.task.kind in LOG_LOSS and metric != "loss"
            else f"Utility loss due to DP: {here - means['federated-no-dp']:+.3f} {name}."
        )
    lines += [
        _against(
            trained(contract), words, lead(means[variant]), main, by_name[variant], metric, error
        )
        for variant, words in BASELINES.items()
        if variant in baselines
    ]
    ranking = contract.task.kind == "ranking"
    one_class = [r for r in runs if r.scores[""]["predicted_classes"] == 1 and not ranking]
    if one_class:
        warnings.append(_one_class(len(one_class), len(runs), contract, lengths))
    if lengths.cut:
        warnings.append(f"{lengths.sentence}.")
    failed = sorted({site for r in runs for facts in r.rounds for site in facts.failed})
    if failed:
        warnings.append(f"Some rounds went on without: {', '.join(failed)}.")
    # What is no share is in a unit of its own.
    least = 0.01 * abs(same) if same is not None and metric in LOWER_IS_BETTER else 0.01
    useless = same is not None and lead(same) <= least
    if useless:
        warnings.append(
            f"{name} is not better than "
            + ("a random order." if ranking else "always giving the same answer.")
        )
    if baselines:
        warnings += _poor_baselines(by_name, metric, least)
    spent = [e for r in runs if r.rounds for e in r.rounds[-1].epsilon.values() if e is not None]
    if insecure:
        warnings.insert(0, INSECURE)
    elif spent:
        lines.append(_spent(max(spent), contract))
    weak = bool(one_class) or any(lead(means[variant]) <= 0 for variant in alone)
    return {
        "word": "useless" if useless else "weak" if weak else "usable",
        "lines": lines,
        "warnings": warnings,
    }


def _spent(epsilon: float, contract: Contract) -> str:
    """The ε of the site that has spent most, with all that makes it a guarantee."""
    target, unit = contract.largest_target, contract.privacy.unit
    which = "the site that spends most" if contract.own_targets else "each site"
    return (
        f"ε {epsilon_text(epsilon)} of {epsilon_text(target.epsilon)} per {unit} at {which}, δ "
        f"{target.delta:g} ({EXACT}), for one run of this plan and the adapter it releases. On "
        "private records each other variant and each repeat costs as much again, and so does "
        "choosing the learning rates. The metrics are computed on held-out records, without DP."
    )


def _figures(
    main: Mapping[str, Any], means: Mapping[str, float], metric: str, contract: Contract
) -> str:
    """The figure of the variant that is judged, and those of the others, in one line."""
    spread = f" ±{main['metrics'][metric]['sd']:.3f}" if main["repeats"] > 1 else ""
    parts = [f"{METRICS[metric]} {means[main['name']]:.3f}{spread}"]
    constant = {"classification": "always-majority", "ranking": "a random order"}
    words = {"majority": constant.get(contract.task.kind, "always the same")} | OTHERS
    parts += [
        f"{words[variant]} {means[variant]:.3f}"
        for variant in words
        if variant in means and variant != main["name"]
    ]
    return " · ".join(parts)


def _poor_baselines(
    by_name: Mapping[str, Mapping[str, Any]], metric: str, least: float
) -> list[str]:
    """Of baselines without DP that say nothing of what DP costs: they have learnt nothing, or are
    worse than the main variant by more than `least` and the spread over runs. (A plain model may be
    worse.)"""
    sign, found = -1 if metric in LOWER_IS_BETTER else 1, []

    def lead(first: str, second: str) -> float:
        pair = (by_name[name]["metrics"][metric]["mean"] for name in (first, second))
        return float(sign * (next(pair) - next(pair)))

    for name in (name for name in WITHOUT_DP if name in by_name):
        label, plain = by_name[name]["label"], name == "plain"
        sds = (by_name[other]["metrics"][metric]["sd"] for other in (MAIN, name))
        if "majority" in by_name and lead(name, "majority") <= least:
            found.append(
                f"{label}: {METRICS[metric]} is not better than "
                f"{by_name['majority']['label'].lower()}. "
                + (
                    "The records may be too few for it, or tell little about the answers."
                    if plain
                    else "It says nothing of what DP costs; its learning rates may not suit it."
                )
            )
        elif not plain and lead(MAIN, name) > max(least, *sds):
            found.append(
                f"{label}: {METRICS[metric]} is worse than with DP by {lead(MAIN, name):.3f}. It "
                "says nothing of what DP costs; its learning rates or rounds may not suit it."
            )
    return found


def _one_class(found: int, runs: int, contract: Contract, lengths: Lengths) -> str:
    """What is said when a model always gives the same answer, and the likely cause."""
    what = "the same number" if contract.task.kind == "regression" else "only one class"
    unread = 2 * lengths.lost > lengths.entities
    return f"The model predicts {what} in {found} of {counted(runs, 'run')}. Likely: " + (
        "it does not read most of the entities, which lie behind the cut."
        if unread
        else "too much noise for this many records."
    )


def _against(
    ours: str,
    words: str,
    gain: float,
    main: Mapping[str, Any],
    other: Mapping[str, Any],
    metric: str,
    error: float | None,
) -> str:
    """The main variant against a baseline. A lead must exceed the spread over runs and the standard
    error of the public rows (which is cautious: both variants are judged on the same rows)."""
    noise = max(main["metrics"][metric]["sd"], other["metrics"][metric]["sd"], error or 0.0)
    won = "beats" if gain > noise else "does not beat"
    subject = ours if ours == "LoRA" else f"The {ours}"
    return (
        f"{subject} {won} {words} on this data: {gain:+.3f} "
        f"(smallest detectable difference: {noise:.3f})."
    )


def standard_error(
    metric: str, value: float, labels: Sequence[Any], queries: int = 0
) -> float | None:
    """The error of a metric that comes from having only these public rows; None where it is not
    known (errors in a unit of their own).

    AUC: Hanley and McNeil 1982 (doi:10.1148/radiology.143.1.7063747). R²: Wishart 1931, for many
    rows. AUPRC: binomial over the rows of the class (Boyd, Eng and Page 2013). Ranking: binomial
    over the queries, more than which a mean of numbers from 0 to 1 cannot have. Others: binomial.
    """
    rows = len(labels)
    if metric in LOWER_IS_BETTER:
        return None
    if metric == "r2":
        return 2 * math.sqrt(max(value, 0.0) / rows) * (1 - max(value, 0.0))
    if metric != "auc":
        n = sum(label != 0 for label in labels) if metric == "auprc" else queries or rows
        return math.sqrt(max(value * (1 - value), 0.0) / n)
    n = sum(label != 0 for label in labels)
    m = rows - n
    q1, q2 = value / (2 - value), 2 * value**2 / (1 + value)
    return math.sqrt(
        (value * (1 - value) + (n - 1) * (q1 - value**2) + (m - 1) * (q2 - value**2)) / (n * m)
    )
