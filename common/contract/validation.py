"""What in a contract does not fit together; every misfit stands under the key to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from silotune.common.contract.adapter import Lora
from silotune.common.contract.aggregation import BY_ONE
from silotune.common.contract.inputs import PairInput, TableInput, TextInput
from silotune.common.contract.model import EncoderModel, LanguageModel, OneHotModel
from silotune.common.contract.privacy import delta_for
from silotune.common.contract.task import Language, Ranking, Regression, Tokens
from silotune.common.secagg import key_agreement

if TYPE_CHECKING:
    from silotune.common.contract.contract import Contract

MOST_UNEQUAL = 10  # weights under secure aggregation
ConstraintViolations = list[tuple[str, str]]  # key, why


def constraint_violations(contract: Contract) -> ConstraintViolations:
    """All of them; none for a contract that can be carried out."""
    return [
        *_of_sites(contract),
        *_of_delta(contract),
        *_of_masks(contract),
        *_of_releases(contract),
        *_of_phases(contract),
        *_of_task(contract),
        *_of_aggregation(contract),
        *_of_personal(contract),
        *_of_ranks(contract),
        *_of_input(contract),
    ]


def _repeated(names: Sequence[str]) -> list[str]:
    """Those that stand there more than once."""
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]


def _of_sites(contract: Contract) -> ConstraintViolations:
    names = [site.name for site in contract.sites]
    wrong = [("sites", f"site '{name}' stands twice in the roster") for name in _repeated(names)]
    if contract.quorum > len(names):
        wrong.append(
            ("quorum", f"quorum is {contract.quorum}, but the roster has {len(names)} sites")
        )
    return wrong


def _of_delta(contract: Contract) -> ConstraintViolations:
    p = contract.privacy
    largest = contract.largest_delta
    if p.allow_large_delta or contract.size_of_delta != "meaningless":
        return []
    return [
        (
            "privacy",
            f"delta = {largest:g} times expected_units = {p.expected_units:g} is "
            f"{largest * p.expected_units:.3g}: with 1 or more, publishing a whole {p.unit} of "
            f"each site would satisfy the guarantee. Set delta to "
            f"{delta_for(p.expected_units):g}, "
            "in [privacy] and wherever [[sites]] has one, or privacy.allow_large_delta = true if a "
            "larger one is meant",
        )
    ]


def _of_releases(contract: Contract) -> ConstraintViolations:
    metrics = [released.metric for released in contract.releases]
    wrong = [("releases", f"metric '{metric}' stands twice") for metric in _repeated(metrics)]
    if contract.released_share > 0.5:
        wrong.append(("releases", "the shares add up to more than half of the budget"))
    return wrong


def _of_phases(contract: Contract) -> ConstraintViolations:
    adapter_active, wrong = [phase.adapts for phase in contract.phases], []
    if isinstance(contract.model, OneHotModel) and contract.adapter is not None:
        wrong.append(("adapter", "the one-hot model has no layers for an [adapter]"))
    elif any(adapter_active) != (contract.adapter is not None):
        wrong.append(
            (
                "adapter" if contract.adapter else "phases",
                "an [adapter] and a phase that trains it go together",
            )
        )
    if adapter_active != sorted(adapter_active):
        wrong.append(
            (
                "phases",
                "phases that train only the head must come first: they use the frozen features",
            )
        )
    if abs(sum(phase.budget_share for phase in contract.phases) - 1) > 1e-9:
        wrong.append(("phases", "the phases' budget shares must add up to 1"))
    return wrong


def _of_input(contract: Contract) -> ConstraintViolations:
    wrong = []
    if isinstance(contract.model, OneHotModel) and not isinstance(contract.input, TableInput):
        wrong.append(("input", 'the one-hot model needs input.kind = "table"'))
    if (
        not isinstance(contract.input, TableInput)
        and isinstance(contract.model, EncoderModel)
        and contract.model.standardise is not None
        and not contract.model.standardise.sentences
    ):
        wrong.append(("model", "model.standardise needs public sentences for free text"))
    if contract.task.label_column in contract.columns:
        wrong.append(("task", f"the label column '{contract.task.label_column}' is also an input"))
    return wrong


def _of_personal(contract: Contract) -> ConstraintViolations:
    """What of a site's own, and which corrections of drift, do not go with the method."""
    settings, wrong, last = contract.aggregation, [], contract.phases[-1]
    if any(phase.personal for phase in contract.phases[:-1]):
        wrong.append(
            (
                "phases",
                "personal is for the last phase: what comes after would begin from "
                "a model that no site has",
            )
        )
    if frozenset() in contract.sendings:
        wrong.append(
            (
                "phases",
                "a phase trains nothing but what stays at its site: there would be "
                "nothing to federate",
            )
        )
    if last.personal == "mean-regularised" and (
        settings.server_momentum
        or settings.server_optimizer
        or settings.robust
        or settings.max_update_norm
        or settings.gate
    ):
        wrong.append(
            (
                "aggregation",
                'personal = "mean-regularised" needs the plain mean of what is sent, or '
                "the sites' copies would be pulled to where it is not: server_momentum = 0, and no "
                "server_optimizer, robust, max_update_norm or gate",
            )
        )
    if any(plan.stays for plan in contract.kinds_of_round()) and (
        settings.gate or settings.early_stop
    ):
        wrong.append(
            (
                "aggregation",
                "gate and early_stop look at the released adapter, which here "
                "is no site's model: a part of it stays with each site",
            )
        )
    controlled = any(phase.drift_correction and phase.adapts for phase in contract.phases)
    for what, wanted, methods in (
        ("mean-regularised", last.personal == "mean-regularised", ("ffa", "fedavg")),
        ("adapter", last.personal == "adapter", ("ffa",)),
        ("scaffold", controlled, ("ffa", "fedavg")),
    ):
        if wanted and settings.method not in methods:
            wrong.append(
                (
                    "aggregation",
                    f'"{what}" does not go with method = "{settings.method}", '
                    f"but with {' and '.join(methods)}",
                )
            )
    if any(phase.drift_correction for phase in contract.phases) and settings.robust:
        wrong.append(
            (
                "aggregation",
                "scaffold's corrections add up to nothing in a mean, and a robust rule takes none",
            )
        )
    return wrong


def _of_ranks(contract: Contract) -> ConstraintViolations:
    """Sites that train less of LoRA than others."""
    spec, wrong = contract.adapter, []
    for site in contract.sites:
        if site.rank and not (isinstance(spec, Lora) and site.rank <= spec.rank):
            wrong.append(
                (
                    "sites",
                    f"site '{site.name}' has rank = {site.rank}: it needs LoRA, of "
                    "at least that rank",
                )
            )
    if wrong or not isinstance(spec, Lora):
        return wrong
    ranks = [site.rank or spec.rank for site in contract.sites]
    if max(ranks) < spec.rank:
        wrong.append(
            (
                "sites",
                f"no site has the whole adapter.rank = {spec.rank}: nobody would train the rest",
            )
        )
    for what, there in (
        ('method = "fedex"', contract.aggregation.method == "fedex"),
        ("robust", contract.aggregation.robust is not None),
        ("control", any(phase.drift_correction for phase in contract.phases)),
        ('personal = "head"', any(phase.personal == "head" for phase in contract.phases)),
    ):
        if there and min(ranks) < spec.rank:
            wrong.append(
                (
                    "sites",
                    f"{what} needs sites of one rank: what a site of a lower one "
                    "sends has zeros that are no measurement",
                )
            )
    return wrong


def _of_task(contract: Contract) -> ConstraintViolations:
    """What the task does not go with."""
    task, wrong = contract.task, []
    language = isinstance(task, Language)
    if language != isinstance(contract.model, LanguageModel):
        wrong.append(
            ("model", 'a task of kind "language" and a model of kind "language-model" go together')
        )
    for at, phase in enumerate(contract.phases):
        if language != (phase.trains == "adapter"):
            wrong.append(
                (
                    "phases",
                    f'phase {at + 1} trains "{phase.trains}": a language model\'s '
                    'phases train "adapter", for it has no head, and no others do',
                )
            )
    if isinstance(task, Ranking) != isinstance(contract.input, PairInput) and (
        isinstance(task, Ranking) or (contract.input.kind == "pair" and contract.input.by == "bi")
    ):
        wrong.append(
            (
                "input",
                'a task of kind "ranking" needs input.kind = "pair", and '
                'pairs read apart (by = "bi") are for ranking',
            )
        )
    if isinstance(task, Tokens | Language) and not isinstance(contract.input, TextInput):
        wrong.append(("input", f'a task of kind "{task.kind}" needs input.kind = "text"'))
    if (
        isinstance(task, Tokens)
        and isinstance(contract.model, EncoderModel)
        and contract.model.standardise
        and contract.model.standardise.whiten
    ):
        wrong.append(("model", "model.standardise.whiten is for pooled texts, not for tokens"))
    if isinstance(task, Regression) and any(r.metric == "accuracy" for r in contract.releases):
        wrong.append(("releases", "a regression has no accuracy to release"))
    others = contract.aggregation.of_other_tasks(task.metrics)
    return wrong + [("aggregation", why) for why in others]


def _of_aggregation(contract: Contract) -> ConstraintViolations:
    """Methods that cannot go together, or not with what else the contract says."""
    settings, wrong = contract.aggregation, []
    method, robust, sites = settings.method, settings.robust, len(contract.sites)
    if method != "ffa" and not isinstance(contract.adapter, Lora):
        wrong.append(f'method = "{method}" is about LoRA\'s two factors, and there is no LoRA')
    if method in ("fedsvd", *BY_ONE) and settings.server_optimizer:
        wrong.append(
            f'method = "{method}" turns the factors\' coordinates each round, and '
            "server_optimizer keeps a rate for each coordinate"
        )
    if method in BY_ONE and settings.server_momentum:
        wrong.append(f'method = "{method}" replaces the weights in each round: server_momentum = 0')
    alone = robust.rule if robust else method if method in BY_ONE else None
    if alone and contract.secure_aggregation is not None:
        wrong.append(
            f'"{alone}" needs each site\'s update by itself, and secure_aggregation '
            "hides it: take out one of the two"
        )
    if robust and method in BY_ONE:
        wrong.append(f'robust rules are for means of updates, and method = "{method}" is none')
    if robust and contract.metrics:
        wrong.append(
            "robust rules are for updates: a released metric, or adaptive clipping, "
            "would still be a plain mean, which one malicious site can set to any value"
        )
    if robust and len(set(contract.weights().values())) > 1:
        wrong.append("robust rules count every site once: leave out the sites' weights")
    if method == "rolora" and any(p.adapts and p.rounds < 2 for p in contract.phases):
        wrong.append('method = "rolora" needs two rounds in a phase, or A is never trained')
    if robust and robust.rule != "norm":
        least = 2 * robust.byzantine + (3 if "krum" in robust.rule else 1)
        if contract.quorum < least:
            wrong.append(
                f'rule = "{robust.rule}" against {robust.byzantine} sites needs '
                f"{least} updates at least, and quorum is {contract.quorum} of {sites}"
            )
    return [("aggregation", why) for why in wrong]


def _of_masks(contract: Contract) -> ConstraintViolations:
    secure, sites = contract.secure_aggregation, len(contract.sites)
    if secure is None:
        return []
    wrong = []
    keys = [site.public_key for site in contract.sites]
    why = key_agreement.problem_with(sites, contract.threshold, secure.max_colluding_sites)
    if why:
        wrong.append(("secure_aggregation", why))
    without = [
        site.name
        for site in contract.sites
        if keys.count(site.public_key) > 1 or site.public_key is None
    ]
    if without:
        wrong.append(
            (
                "sites",
                "secure_aggregation needs a public_key of each site's own; not so: "
                f"{', '.join(without)}",
            )
        )
    if contract.aggregation.max_update_norm is not None:
        wrong.append(
            (
                "aggregation",
                "nobody can see a masked update's norm: use "
                "secure_aggregation.bound instead of aggregation.max_update_norm",
            )
        )
    weights = contract.weights().values()
    if max(weights) > MOST_UNEQUAL * min(weights):
        wrong.append(
            (
                "sites",
                f"with secure_aggregation a weight may be at most {MOST_UNEQUAL} times "
                "another, or the sum is hardly more than the heaviest site's update",
            )
        )
    if contract.quorum < contract.threshold:
        wrong.append(
            (
                "quorum",
                f"quorum is {contract.quorum}, but {contract.threshold} sites must answer "
                "for a masked sum to open (secure_aggregation.threshold)",
            )
        )
    return wrong
