"""The verdict: the checklist, the headline, figures beside it, and what a reader must not miss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from silotune.client.privacy.accountant import EXACT
from silotune.common.contract.contract import Contract
from silotune.common.contract.task import LOWER_IS_BETTER
from silotune.common.errors import counted
from silotune.common.tasks.metrics import METRICS
from silotune.common.tokenization.token_lengths import Lengths
from silotune.simulations.execution.variants import MAIN, JobResult, trained
from silotune.simulations.verdict.calibration import calibration_of, line
from silotune.simulations.verdict.checklist import ALONE, WITHOUT_DP, Comparison, checklist
from silotune.simulations.verdict.differences import ERRORS, Difference, HeldOut
from silotune.simulations.verdict.headline import headline, word

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


def verdict(
    rows: Sequence[Mapping[str, Any]],
    results: Sequence[JobResult],
    metric: str,
    contract: Contract,
    held_out: HeldOut,
    same: Sequence[Any] | None,
    lengths: Lengths = Lengths(),  # noqa: B008 - frozen
    *,
    insecure: bool = False,
) -> dict[str, Any]:
    """The checklist of the main variant, the headline that follows from it, and what must not be
    missed.

    Args:
        rows: The variants of result.json that have figures, of which the one that is "main" is
            judged.
        results: The runs of these variants, with their outputs for the test rows.
        metric: Which figure is compared.
        contract: Of the run.
        held_out: The test rows.
        same: The outputs of a constant answer to them, if there is one.
        lengths: Of the texts.
        insecure: Whether the noise is from a seed that is known.

    Returns:
        `verdict` and `calibration` of result.json.
    """
    by_name = {row["name"]: row for row in rows}
    main = next(row for row in rows if row["main"])
    runs = [run for run in results if run.variant == main["name"]]
    # The others are baselines of the contract's own variant, and of no other.
    baselines = dict(by_name) if main["name"] == MAIN else {}
    known = [run for run in results if run.variant in by_name]
    comparison = Comparison(contract, metric, main["name"], known, held_out, same)
    first = next((run for run in runs if run.repeat == 0 and len(run.outputs)), None)
    calibration = calibration_of(contract, first, held_out, same) if first else None
    spent = _spent(runs)
    items = checklist(comparison, calibration, spent, private=main["private"], insecure=insecure)
    lines = _lines(main, by_name, baselines, comparison)
    if calibration:
        lines.insert(1, line(calibration))
    if any(spent.values()) and not insecure:
        p = contract.privacy
        lines.append(
            f"The ε is per {p.unit}, with δ {p.delta:g} ({EXACT}), for one run of this plan and "
            "the adapter it releases. On private records each other variant and each repeat costs "
            "as much again, and so does choosing the learning rates. The metrics are computed on "
            "held-out records, without DP."
        )
    warnings = [INSECURE] if insecure else []
    warnings += _warnings(main, baselines, runs, comparison, lengths)
    if word(items) == "learns nothing":
        answer = {"ranking": "a random order", "language": "the base model as it is"}.get(
            contract.task.kind, "always giving the same answer"
        )
        warnings.append(f"{METRICS[metric]} is not better than {answer}.")
    return {
        "verdict": {
            "word": word(items),
            "headline": headline(items),
            "checklist": [item.content() for item in items],
            "lines": lines,
            "warnings": warnings,
        },
        "calibration": calibration,
    }


def _lines(
    main: Mapping[str, Any],
    by_name: Mapping[str, Mapping[str, Any]],
    baselines: Mapping[str, Mapping[str, Any]],
    comparison: Comparison,
) -> list[str]:
    """Figures beside the checklist, in sentences."""
    contract, metric = comparison.contract, comparison.metric
    name, here = METRICS[metric], main["metrics"][metric]["mean"]
    means = {variant: row["metrics"][metric]["mean"] for variant, row in by_name.items()}
    lines = [_figures(main, means, metric, contract)]
    if not baselines:
        lines.append(f"These are of: {main['label']}. The contract's own variant was not run.")
    if main["repeats"] > 1:
        lines.append("± is the standard deviation over the runs of a variant.")
    alone = _alone(main, baselines)
    if alone:
        defined = sum(cell is not None for cell in main["sites"].values())
        lines.append(
            f"On test records of its own site: {name} {main['sites_mean']['mean']:.3f} with the "
            f"federation (mean over {defined} of {counted(len(contract.sites), 'site')}, for "
            "which it is defined); "
            + ", ".join(f"{row['sites_mean']['mean']:.3f} {SHORT[a]}" for a, row in alone.items())
            + f". On all test records: {here:.3f}; "
            + ", ".join(f"{means[a]:.3f} {SHORT[a]}" for a in alone)
            + "."
        )
    if "federated-no-dp" in baselines:
        losses = [row["metrics"]["loss"]["mean"] for row in (main, baselines["federated-no-dp"])]
        lines.append(
            f"Utility loss due to DP: {here - means['federated-no-dp']:+.3f} {name}, and a log "
            f"loss of {losses[0]:.2f} against {losses[1]:.2f}: the noise makes it overconfident."
            if losses[0] > losses[1] and contract.task.kind in LOG_LOSS and metric != "loss"
            else f"Utility loss due to DP: {here - means['federated-no-dp']:+.3f} {name}."
        )
    if "federated-one-hot" in baselines and (lead := comparison.over("federated-one-hot")):
        lines.append(_against_one_hot(contract, lead))
    return lines


def _alone(
    main: Mapping[str, Any], baselines: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """The variants of sites alone, if all have a figure on the sites' own rows."""
    found = {variant: baselines[variant] for variant in ALONE if variant in baselines}
    return found if all(row["sites_mean"] for row in (main, *found.values())) else {}


def _warnings(
    main: Mapping[str, Any],
    baselines: Mapping[str, Mapping[str, Any]],
    runs: Sequence[JobResult],
    comparison: Comparison,
    lengths: Lengths,
) -> list[str]:
    """What a reader must not miss."""
    contract, metric = comparison.contract, comparison.metric
    sign, warnings = -1 if metric in LOWER_IS_BETTER else 1, list[str]()
    if alone := _alone(main, baselines):
        own = {variant: row["sites_mean"]["mean"] for variant, row in alone.items()}
        best = max(own, key=lambda variant: sign * own[variant])
        noise = max(row["sites_mean"]["sd"] for row in (main, alone[best]))
        lead = main["sites_mean"]["mean"] - own[best]
        if sign * lead <= noise:
            warnings.append(
                "On their own test records sites have no measurable gain over "
                f"{SHORT[best]}: {lead:+.3f} ±{noise:.3f}."
            )
    ranking = contract.task.kind == "ranking"
    one_class = [r for r in runs if r.scores[""]["predicted_classes"] == 1 and not ranking]
    if one_class:
        warnings.append(_one_class(len(one_class), len(runs), contract, lengths))
    if lengths.cut:
        warnings.append(f"{lengths.sentence}.")
    failed = sorted({site for r in runs for facts in r.rounds for site in facts.failed})
    if failed:
        warnings.append(f"Some rounds went on without: {', '.join(failed)}.")
    return warnings + _poor_baselines(baselines, metric, comparison.margin)


def _spent(runs: Sequence[JobResult]) -> dict[str, float | None]:
    """The largest ε that each site has spent in one of the runs."""
    found: dict[str, float | None] = {}
    for run in runs:
        for site, epsilon in run.rounds[-1].epsilon.items() if run.rounds else ():
            if epsilon is not None:
                found[site] = max(epsilon, found.get(site) or 0.0)
    return found


def _figures(
    main: Mapping[str, Any], means: Mapping[str, float], metric: str, contract: Contract
) -> str:
    """The figure of the variant that is judged, and those of the others, in one line."""
    spread = f" ±{main['metrics'][metric]['sd']:.3f}" if main["repeats"] > 1 else ""
    parts = [f"{METRICS[metric]} {means[main['name']]:.3f}{spread}"]
    constant = {
        "classification": "always-majority",
        "ranking": "a random order",
        "language": "base model",
    }
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


def _against_one_hot(contract: Contract, lead: Difference) -> str:
    """The main variant against the DP one-hot regression."""
    ours, won = trained(contract), lead.value > ERRORS * lead.error
    return (
        f"{ours if ours == 'LoRA' else f'The {ours}'} {'beats' if won else 'does not beat'} the DP "
        f"one-hot regression on this data: {lead.text}."
    )
