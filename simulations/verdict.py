"""The verdict: one word, the figures that justify it, and what a reader must not miss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from silotune.common.contract import Contract
from silotune.common.metrics import METRICS
from silotune.simulations.arms import JobResult

OTHERS = {
    "alone": "sites alone",
    "federated-head": "DP head",
    "federated-one-hot": "DP one-hot regression",
    "federated-no-dp": "without DP",
    "pooled-no-dp": "pooled without DP",
}
BASELINES = {
    "federated-head": "the DP head on the frozen encoder",
    "federated-one-hot": "the DP one-hot regression",
}


def verdict(
    rows: Sequence[Mapping[str, Any]], results: Sequence[JobResult], metric: str,
    contract: Contract,
) -> dict[str, Any]:
    """rows: the arms of result.json. Returns word, lines and warnings.

    word: "useless" if the metric is not above always answering the majority class; "weak" if the
    sites alone do as well or the model knows one class only; else "usable".
    """
    by_name = {row["name"]: row for row in rows}
    means = {name: row["metrics"][metric]["mean"] for name, row in by_name.items()}
    main, here, name = by_name["federated-lora"], means["federated-lora"], METRICS[metric]
    runs = [r for r in results if r.arm == "federated-lora"]

    plus_minus = f" ±{main['metrics'][metric]['sd']:.3f}" if main["repeats"] > 1 else ""
    parts = [f"{name} {here:.3f}{plus_minus}", f"always-majority {means['majority']:.3f}"]
    parts += [f"{words} {means[arm]:.3f}" for arm, words in OTHERS.items() if arm in means]
    lines, warnings = [" · ".join(parts)], []

    gain = None
    if "alone" in by_name:
        ours, alone = (by_name[n]["sites_mean"]["mean"] for n in ("federated-lora", "alone"))
        gain = ours - alone
        lines.append(
            f"On its own test rows a site gets {name} {ours:.3f} from the federation and "
            f"{alone:.3f} alone at the same ε ({gain:+.3f} on average)."
        )
        if gain <= 0:
            warnings.append("Federating does not help: the sites alone do as well.")
    if "federated-no-dp" in means:
        lines.append(f"The price of privacy: {here - means['federated-no-dp']:+.3f} {name}.")
    lines += [
        _against(words, here - means[arm], main, by_name[arm], metric)
        for arm, words in BASELINES.items()
        if arm in means
    ]
    one_class = [r for r in runs if r.scores[""]["predicted_classes"] == 1]
    if one_class:
        warnings.append(
            f"The model predicts only one class in {len(one_class)} of {len(runs)} runs. "
            "Likely: too much noise for this many records."
        )
    failed = sorted({site for r in runs for facts in r.rounds for site in facts.failed})
    if failed:
        warnings.append(f"Some rounds went on without: {', '.join(failed)}.")
    useless = here <= means["majority"] + 0.01
    if useless:
        warnings.append(f"{name} is not above always answering the majority class.")
    spent = [e for r in runs for e in r.rounds[-1].epsilon.values() if e is not None]
    if spent:
        p = contract.privacy
        lines.append(
            f"ε {max(spent):.2f} of {p.epsilon:.2f} per {p.unit} at each site, δ {p.delta:g} "
            "(RDP), for one run of this plan and the adapter it releases. The other arms and "
            "repeats compare on public data; on real records each would cost as much again."
        )
    weak = bool(one_class) or (gain is not None and gain <= 0)
    return {
        "word": "useless" if useless else "weak" if weak else "usable",
        "lines": lines,
        "warnings": warnings,
    }


def _against(
    words: str, gain: float, main: Mapping[str, Any], other: Mapping[str, Any], metric: str
) -> str:
    """LoRA against a baseline; a lead within one standard deviation is no lead."""
    noise = max(main["metrics"][metric]["sd"], other["metrics"][metric]["sd"])
    won = "beats" if gain > noise else "does not beat"
    return f"LoRA {won} {words} on this data: {gain:+.3f}."
