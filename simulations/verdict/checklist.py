"""What holds of a trained model, item by item, each with the numbers behind it.

An item holds ("yes"), does not ("no"), or the rows and runs are too few to tell. A comparison holds
if the lead exceeds two standard errors, and does not if even two standard errors more would be less
than LEAST_GAIN (differences.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from silotune.client.privacy.accountant import EXACT
from silotune.common.contract.contract import Contract
from silotune.common.contract.privacy import epsilon_text
from silotune.common.contract.task import LOWER_IS_BETTER
from silotune.common.tasks.metrics import METRICS
from silotune.server.report.formatting import MARKS
from silotune.simulations.execution.variants import MAIN, JobResult
from silotune.simulations.verdict.calibration import HIGHEST_SLOPE, LOWEST_SLOPE
from silotune.simulations.verdict.differences import (
    ERRORS,
    LEAST_GAIN,
    Difference,
    Figure,
    HeldOut,
    Status,
    difference,
    figures,
)

LABELS = {
    "constant": "better than a constant answer",
    "alone": "better than each site alone, on all test rows",
    "alone-own": "better than each site alone, on the site's own test rows",
    "head": "better than the DP head",
    "calibrated": "calibrated",
    "budget": "within its privacy budget",
    "baselines": "baselines without DP mean something",
}
ALONE = ("alone", "alone-tuned")
WITHOUT_DP = ("federated-no-dp", "pooled-no-dp", "plain")


@dataclass(frozen=True)
class Item:
    """name: a key of LABELS. detail: the numbers in words. figures: the numbers."""

    name: str
    status: Status
    detail: str
    figures: Mapping[str, Any] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """For result.json."""
        return {"label": LABELS[self.name]} | asdict(self)

    @property
    def line(self) -> str:
        return f"{MARKS[self.status]} {LABELS[self.name]}: {self.detail}"


class Comparison:
    """The figures of all models on the same test rows. results: those of variants that have them,
    with their outputs. same: the outputs of a constant answer, if there is one."""

    def __init__(
        self,
        contract: Contract,
        metric: str,
        main: str,
        results: Sequence[JobResult],
        rows: HeldOut,
        same: Sequence[Any] | None,
    ) -> None:
        self.contract, self.metric, self.main = contract, metric, main
        self.runs = sorted(
            (run for run in results if len(run.outputs)), key=lambda run: (run.repeat, run.sites)
        )
        self.variants = {run.variant for run in self.runs}
        models = [run.outputs for run in self.runs] + ([] if same is None else [same])
        task = contract.task
        found = figures(task, metric, models, rows)
        self._all = dict(zip(map(id, self.runs), found, strict=False))
        self.same = None if same is None else found[-1]
        self._own = {
            site: self._on_own_rows(site, rows)
            for site in dict.fromkeys(rows.sites)
            if self.variants & set(ALONE)
        }
        self.margin = LEAST_GAIN
        if metric in LOWER_IS_BETTER and self.same is not None:
            self.margin *= abs(self.same.value)

    def _on_own_rows(self, site: str, rows: HeldOut) -> dict[int, Figure]:
        chosen = [
            run
            for run in self.runs
            if run.variant == self.main or (run.variant in ALONE and run.sites == (site,))
        ]
        models = [run.outputs for run in chosen]
        found = figures(self.contract.task, self.metric, models, rows, site)
        return dict(zip(map(id, chosen), found, strict=True))

    def of(self, variant: str) -> list[Figure]:
        """A figure for each repeat; of sites alone the mean over their models."""
        runs = [run for run in self.runs if run.variant == variant]
        return [
            Figure.mean([self._all[id(run)] for run in runs if run.repeat == repeat])
            for repeat in dict.fromkeys(run.repeat for run in runs)
        ]

    def over(self, variant: str) -> Difference | None:
        """The lead of the main variant over another one, on all test rows."""
        return difference(
            self.metric, self.of(self.main), self.of(variant), drawn=variant != "plain"
        )

    def over_site(self, site: str, *, own: bool) -> Difference | None:
        """The same over the better of a site's own models. own: on the site's own test rows."""
        known = self._own[site] if own else self._all
        ours = [known[id(run)] for run in self.runs if run.variant == self.main]
        found = []
        for variant in ALONE:
            theirs = [
                known[id(run)]
                for run in self.runs
                if run.variant == variant and run.sites == (site,)
            ]
            if theirs and (lead := difference(self.metric, ours, theirs)):
                found.append(lead)
        return min(found, key=lambda lead: lead.value, default=None)

    @property
    def sites(self) -> list[str]:
        """Whose own models there are."""
        return sorted({run.sites[0] for run in self.runs if run.variant in ALONE})


def checklist(
    comparison: Comparison,
    calibration: Mapping[str, Any] | None,
    spent: Mapping[str, float | None],
    *,
    private: bool,
    insecure: bool,
) -> list[Item]:
    """The items of the main variant.

    Args:
        comparison: The figures of all variants.
        calibration: `calibration` of result.json; None where there are no outputs.
        spent: The ε that each site has spent.
        private: Whether the main variant trains with DP.
        insecure: Whether the noise is from a seed that is known.

    Returns:
        The items, but for those that do not apply.
    """
    found = [_constant(comparison)]
    if comparison.main == MAIN:
        if len(comparison.contract.sites) > 1:
            found += [_alone(comparison, own=False), _alone(comparison, own=True)]
        if comparison.contract.adapter:
            found.append(_head(comparison))
    found.append(_calibrated(calibration))
    found.append(_budget(comparison.contract, spent, private=private, insecure=insecure))
    if comparison.main == MAIN:
        found.append(_baselines(comparison))
    return found


def _against(lead: Difference) -> str:
    return f"{lead.first:.3f} against {lead.second:.3f}, {lead.text}"


def _constant(comparison: Comparison) -> Item:
    if comparison.same is None:
        return Item("constant", "cannot tell", "this task has no constant answer to compare with")
    ours = comparison.of(comparison.main)
    lead = difference(comparison.metric, ours, [comparison.same], drawn=False)
    if lead is None:
        return _undefined("constant", comparison)
    status = lead.status(comparison.margin)
    return Item("constant", status, _against(lead), lead.content())


def _undefined(name: str, comparison: Comparison) -> Item:
    return Item(name, "cannot tell", f"the test rows do not define {METRICS[comparison.metric]}")


def _not_run(name: str, variant: str) -> Item:
    return Item(name, "cannot tell", f"variant {variant} was not run")


def _alone(comparison: Comparison, *, own: bool) -> Item:
    name = "alone-own" if own else "alone"
    if not comparison.sites:
        return _not_run(name, "alone")
    of_sites = {site: comparison.over_site(site, own=own) for site in comparison.sites}
    leads = {site: lead for site, lead in of_sites.items() if lead is not None}
    if not leads:
        return _undefined(name, comparison)
    statuses = {site: lead.status(comparison.margin) for site, lead in leads.items()}
    status = _all_of(list(statuses.values()))
    if len(leads) < len(of_sites) and not own:
        status = "no" if status == "no" else "cannot tell"
    parts = [f"{site} {MARKS[statuses[site]]} {lead.text}" for site, lead in leads.items()]
    if left := [site for site in of_sites if site not in leads]:
        parts.append(f"not defined for {', '.join(left)}")
    content = {site: lead.content() | {"status": statuses[site]} for site, lead in leads.items()}
    return Item(name, status, "; ".join(parts), {"sites": content})


def _all_of(statuses: Sequence[Status]) -> Status:
    """Of what has to hold each time."""
    if all(status == "yes" for status in statuses):
        return "yes"
    return "no" if "no" in statuses else "cannot tell"


def _head(comparison: Comparison) -> Item:
    if "federated-head" not in comparison.variants:
        return _not_run("head", "federated-head")
    lead = comparison.over("federated-head")
    if lead is None:
        return _undefined("head", comparison)
    return Item("head", lead.status(comparison.margin), _against(lead), lead.content())


def _calibrated(content: Mapping[str, Any] | None) -> Item:
    """By the calibration slope of the outputs as they are delivered."""
    found = content and (content["after"] or content["before"])
    if not found or found["slope"] is None:
        return Item("calibrated", "cannot tell", "the outputs have no calibration slope")
    value, error = found["slope"]["value"], found["slope"]["standard_error"]
    low, high = value - ERRORS * error, value + ERRORS * error
    status: Status = "cannot tell"
    if low >= LOWEST_SLOPE and high <= HIGHEST_SLOPE:
        status = "yes"
    elif not low <= 1 <= high:
        status = "no"
    fitted = "" if content and content["after"] else ", of outputs that were not calibrated"
    detail = (
        f"slope {value:.2f} (standard error {error:.2f} over test examples){fitted}; 1 is "
        f"calibrated, {LOWEST_SLOPE:g} to {HIGHEST_SLOPE:g} is near enough"
    )
    return Item("calibrated", status, detail, found)


def _budget(
    contract: Contract, spent: Mapping[str, float | None], *, private: bool, insecure: bool
) -> Item:
    limits = {site: contract.target_of(site) for site in contract.weights()}
    content = {
        "sites": {
            site: {"epsilon": spent.get(site), "limit": target.epsilon, "delta": target.delta}
            for site, target in limits.items()
        }
    }
    if not private:
        return Item("budget", "no", "it was trained without DP")
    if insecure:
        return Item(
            "budget", "no", "the noise is from a seed that is known, so no ε holds", content
        )
    known = {site: e for site in limits if (e := spent.get(site)) is not None}
    over = [site for site, epsilon in known.items() if epsilon > limits[site].epsilon + 1e-9]
    nearest = max(known, key=lambda site: known[site] / limits[site].epsilon, default="")
    if over:
        return Item("budget", "no", _spent(contract, nearest, known[nearest]), content)
    if len(known) < len(limits):
        left = ", ".join(site for site in limits if site not in known)
        return Item("budget", "cannot tell", f"what {left} has spent is not known", content)
    return Item("budget", "yes", _spent(contract, nearest, known[nearest]), content)


def _spent(contract: Contract, site: str, epsilon: float) -> str:
    """What the site has spent that has the least left."""
    limit = contract.target_of(site)
    return (
        f"ε {epsilon_text(epsilon)} of {epsilon_text(limit.epsilon)} per {contract.privacy.unit}, "
        f"δ {limit.delta:g} ({EXACT}), at the site with the least left"
    )


def _baselines(comparison: Comparison) -> Item:
    """Whether what is trained without DP has learnt something, and no less than with DP. (A plain
    model may be worse than the main one.)"""
    known = [variant for variant in WITHOUT_DP if variant in comparison.variants]
    if not known:
        return Item("baselines", "cannot tell", "no variant without DP was run")
    if comparison.same is None:
        return Item("baselines", "cannot tell", "this task has no constant answer to compare with")
    statuses, parts, content = list[Status](), list[str](), dict[str, Any]()
    for variant in known:
        theirs, drawn = comparison.of(variant), variant != "plain"
        learnt = difference(comparison.metric, theirs, [comparison.same], drawn=False)
        lead = comparison.over(variant)
        if learnt is None or lead is None:
            return _undefined("baselines", comparison)
        status = learnt.status(comparison.margin)
        part = f"{variant} {{}} {learnt.value:+.3f} over a constant answer"
        if drawn and lead.value > max(ERRORS * lead.error, comparison.margin):
            status = "no"
            part += f", {lead.value:.3f} worse than with DP"
        statuses.append(status)
        parts.append(part.format(MARKS[status]))
        content[variant] = {
            "status": status,
            "over_constant": learnt.content(),
            "main_over_it": lead.content(),
        }
    return Item("baselines", _all_of(statuses), "; ".join(parts), {"variants": content})
