"""`silotune site check`: can this site take part in this contract? Each row is proved by doing it.

Every problem is found at once; nothing is sent and nothing is spent.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from silotune.client import accounting, budget, lineage, units
from silotune.client import policy as policies
from silotune.client.budget import Budget, Limit
from silotune.client.handshake import shake
from silotune.client.keys import Keys
from silotune.client.ledger import Ledger
from silotune.client.lineage import Lineage
from silotune.client.masking import check_bound
from silotune.client.policy import Data, Policy, Server
from silotune.client.site import Site
from silotune.common import contract as contracts
from silotune.common import query, records
from silotune.common.architecture import OneHotModel
from silotune.common.contract import Contract
from silotune.common.errors import DataError, RefusalError, SilotuneError
from silotune.common.plan import Unit, delta_for, epsilon_text, size_of_delta

T = TypeVar("T")
LEAST_DISK = 200 << 20  # bytes: a run's replies, the ledger and its log


@dataclass(frozen=True)
class Check:
    """One row. local: what only the owner may see, for the screen."""

    name: str
    state: Literal["ok", "warning", "problem"]
    result: str
    fix: str = ""
    code: str = ""
    local: str = ""


class _Table:
    """The rows so far."""

    def __init__(self) -> None:
        self.rows: list[Check] = []

    def attempt(self, name: str, fix: str, step: Callable[[], tuple[T, str]]) -> T | None:
        """Do a step: it returns its value and what to say, or raises what is wrong."""
        try:
            value, result = step()
        except SilotuneError as error:
            local = error.local if isinstance(error, DataError) else ""
            self.rows += [
                Check(name, "problem", line, fix, error.code, local)
                for line in str(error).splitlines()
            ]
            return None
        self.rows.append(Check(name, "ok", result))
        return value


def check(site: Site, contract_file: Path, *, network: bool = False) -> list[Check]:
    """All rows, in the order in which a person would mend them. network: shake hands with the
    server, too (a worker has no network)."""
    table = _Table()
    contract = table.attempt("contract", "correct it, or ask the operator",
                             lambda: _contract(contract_file))
    keys = table.attempt("keys", "silotune site init", lambda: _keys(site))
    policy = table.attempt("policy", "correct site.toml", lambda: _policy(site))
    ledger = table.attempt("ledger", "restore it", lambda: _ledger(site, keys)) if keys else None
    if ledger and keys:
        table.rows.append(_clock(ledger))
        if policy:
            table.attempt("signature", "silotune site sign", lambda: _signature(site, ledger, keys))
    table.rows.append(_disk(site))
    if network and policy:
        _check_server(table, policy, site)
    if policy and contract:
        table.rows += _permission(policy, contract)
        table.rows.append(_roster(policy, contract, keys))
        table.rows.append(_masks(policy, contract))
        if not isinstance(contract.model, OneHotModel):
            table.attempt("model", "silotune data fetch, or set model.folder",
                          lambda: _model(policy, contract))
    if policy:
        table.attempt("device", "performance.device in site.toml", lambda: _device(policy))
        _check_records(table, policy, contract, ledger)
    if contract:
        table.rows.append(Check("leaves the site", "ok", contract.leaves))
    return table.rows


def _check_server(table: _Table, policy: Policy, site: Site) -> None:
    if policy.server is None:
        table.rows.append(Check("handshake", "warning", "[server] is not set: nothing to reach",
                                "server.address and server.ca in site.toml"))
        return
    server = policy.server
    if table.attempt("handshake", "see the sentence; [server] in site.toml",
                     lambda: (True, shake(server))):
        table.attempt("node key", f"see the sentence; the request is {policy.name}.request.json",
                      lambda: (True, _admission(server, site.relay / "node.key")))


def _admission(server: Server, node_key: Path) -> str:
    from silotune.client import admission  # Flower: not for a worker, which has no network

    return admission.check(server, node_key)


def _check_records(
    table: _Table, policy: Policy, contract: Contract | None, ledger: Ledger | None
) -> None:
    data = policy.data
    if file := data.file:
        table.attempt("data access", f"chown and chmod 600 {file}", lambda: _access(file))
    else:
        table.rows += _query(data)
    found = table.attempt("data", "[data] in site.toml", lambda: _data(data, contract))
    if found is None:
        return
    if contract:
        notes = table.attempt("columns", "correct the rows, or agree on another contract",
                              lambda: _columns(found, contract))
        table.rows += [Check("rows", "warning", note, "see whether that is what they mean")
                       for note in notes or ()]
    secret = ledger.fingerprint_key if ledger else bytes(32)
    records_ = table.attempt("record key", "data.key in site.toml",
                             lambda: _lineage(found, policy, secret))
    if records_ is None:
        return
    if not policy.data.key:
        table.rows[-1] = Check(
            "record key", "warning", "none: a row that is corrected counts as a new record",
            "data.key = [\"patient_id\"]",
        )
    unit = contract.privacy.unit if contract else next(iter(policy.limits))
    table.attempt("records", "data.repeated, data.key or permits.min_records in site.toml",
                  lambda: _records(policy, records_, unit))
    if contract and contract.privacy.unit in policy.limits:
        if contract.privacy.mode == "dp":
            table.rows += _deltas(records_, policy, contract)
        if ledger:
            table.rows.append(_budget(ledger, records_, policy, contract))


def _contract(file: Path) -> tuple[Contract, str]:
    contract = contracts.load(file)
    return contract, f"{contract.name} {contract.hash[:12]}…"


def _keys(site: Site) -> tuple[Keys, str]:
    keys = Keys.load(site.keys)
    return keys, f"this user's alone; public key {keys.public[:12]}…"


def _policy(site: Site) -> tuple[Policy, str]:
    policy = policies.load(site.config)
    return policy, f"{policy.name}: {policy.limits_in_words()}, for ever"


def _ledger(site: Site, keys: Keys) -> tuple[Ledger, str]:
    ledger = Ledger.open(site.state, keys)
    return ledger, f"{len(ledger.entries)} entries, chain, MACs and head verified"


def _signature(site: Site, ledger: Ledger, keys: Keys) -> tuple[Policy, str]:
    policy = policies.adopt(site.config, ledger, keys.owner)
    assert ledger.policy is not None
    return policy, f"the owner's, number {ledger.policy.serial}"


def _permission(policy: Policy, contract: Contract) -> list[Check]:
    refusals = policy.refusals(contract)
    if not refusals:
        return [Check("permission", "ok", "the policy permits this contract")]
    return [
        Check("permission", "problem", str(refusal), "[permits] in site.toml, then sign it",
              refusal.code)
        for refusal in refusals
    ]


def _roster(policy: Policy, contract: Contract, keys: Keys | None) -> Check:
    entry = next((site for site in contract.sites if site.name == policy.name), None)
    if entry is None:
        return Check("roster", "problem", f"'{policy.name}' is not in it",
                     "the operator adds the site to the contract", "E201")
    if entry.public_key is None:
        return Check("roster", "warning", "this site is in it, without a key",
                     f"public_key = \"{keys.public}\"" if keys else "")
    if keys is not None and entry.public_key != keys.public:
        return Check("roster", "problem", f"the key {entry.public_key[:12]}… is not this site's",
                     f"public_key = \"{keys.public}\"", "E201")
    return Check("roster", "ok", f"{policy.name}, key {entry.public_key[:12]}…")


def _masks(policy: Policy, contract: Contract) -> Check:
    if contract.secure_aggregation is None:
        return Check("masks", "warning", contract.masks, "[secure_aggregation] in the contract")
    try:
        check_bound(contract, accounting.plan(contract, policy.target(contract)))
    except RefusalError as error:
        return Check("masks", "problem", str(error), "the operator changes the contract",
                     error.code)
    return Check("masks", "ok", contract.masks)


def _model(policy: Policy, contract: Contract) -> tuple[None, str]:
    assert not isinstance(contract.model, OneHotModel)
    if policy.model.folder is None:
        raise DataError(f"The contract needs the model '{contract.model.name}'; model.folder is "
                        "not set.", code="E305")
    from silotune.common import model_fit

    model_fit.check(contract.at(policy.name), policy.model.folder, policy.performance)
    return None, f"{contract.model.name} {contract.model.sha256[:12]}…"


def _device(policy: Policy) -> tuple[None, str]:
    from silotune.common.network import device_of

    return None, str(device_of(policy.performance))


def _access(file: Path) -> tuple[None, str]:
    try:
        facts = file.stat()
    except OSError as error:
        raise DataError(f"{file} cannot be reached: {error.strerror}.") from None
    mode = facts.st_mode & 0o777
    if facts.st_uid != os.geteuid():
        raise DataError(f"{file.name} belongs to another user ({facts.st_uid}).")
    if mode & 0o077:
        raise DataError(f"{file.name} is open to other users (mode {mode:o}).")
    return None, f"mode {mode:o}: this user alone"


def _query(data: Data) -> list[Check]:
    """What may be better about how a database is asked; that it answers is another row."""
    found = []
    if query.shows_password(data.url or ""):
        found.append(Check("data access", "warning", "a password stands in site.toml",
                           "data.url = \"…://user:${PASSWORD}@…\", set for the worker alone"))
    if not query.ordered(data.query or ""):
        found.append(Check("row numbers", "warning", "the query has no ORDER BY: the numbers of "
                           "rows in messages may change from one reading to the next",
                           "ORDER BY in data.query"))
    return found


def _data(data: Data, contract: Contract | None) -> tuple[records.Table, str]:
    found = records.named_by(contract, data.table()) if contract else data.table()
    return found, f"{found.source}, {len(found.rows):,} rows"


def _columns(found: records.Table, contract: Contract) -> tuple[tuple[str, ...], str]:
    """The notes about rows that are read otherwise than they stand."""
    notes = records.parse(found, contract).notes
    if contract.privacy.entity:
        units.of_entities(found, contract.privacy.entity)
    return notes, f"{len(contract.columns)} and the label fit the schema"


def _lineage(found: records.Table, policy: Policy, secret: bytes) -> tuple[Lineage, str]:
    return lineage.of_table(found, policy.data.key, secret), ", ".join(policy.data.key)


def _records(policy: Policy, found: Lineage, unit: Unit) -> tuple[None, str]:
    policy.check_records(found, unit)
    if unit == "entity":
        return None, f"{found.rows:,} rows of {len(found.fingerprints):,} entities"
    repeated = f", {found.repeated} of them repeated" if found.repeated else ""
    return None, f"{found.rows:,}{repeated}"


def _deltas(found: Lineage, policy: Policy, contract: Contract) -> list[Check]:
    """The delta of this run and that of the lifetime budget, each held against the number of units
    that this site really has; that number is in `local` alone."""
    unit = contract.privacy.unit
    units, what = found.rows, "records"
    if unit == "entity":
        units, what = len(found.fingerprints), "entities"
    fitting, of_run = delta_for(units), policy.target(contract).delta
    budget_fix = f"set delta in [budgets.{unit}] of site.toml, then sign it"
    if of_run > fitting:
        budget_fix = f"first the contract's delta, then {budget_fix}"
    checks = []
    for name, delta, fix in (
        ("delta of the run", of_run, "the operator sets delta in the contract's [privacy], or at "
         "this site in [[sites]]"),
        ("delta of the budget", policy.limits[unit].delta, budget_fix),
    ):
        size = size_of_delta(delta, units)
        if size == "small":
            checks.append(Check(name, "ok", f"{delta:g}, small for this site's number of {what}"))
            continue
        refused = size == "meaningless" and not contract.privacy.allow_large_delta
        checks.append(Check(
            name, "problem" if refused else "warning",
            f"{delta:g} is large for this site's number of {what}: some of them could be "
            "published whole within the guarantee",
            fix, "E205" if refused else "",
            f"{units:,} {what} times {delta:g} is {delta * units:.3g}; delta should be "
            f"{fitting:g}.",
        ))
    return checks


def _budget(ledger: Ledger, found: Lineage, policy: Policy, contract: Contract) -> Check:
    if contract.privacy.mode == "none":
        return Check("privacy budget", "warning", "the contract trains WITHOUT privacy: afterwards "
                     "nothing is left of any budget for these records")
    unit = contract.privacy.unit
    limit, purse = policy.limits[unit], Budget(ledger, found, unit)
    plan = accounting.plan(contract, policy.target(contract))
    order = ledger.order or budget.order_of(plan, limit)
    spent, together = purse.spent(limit.delta), purse.together(plan, order, limit.delta)
    text = (f"this plan {epsilon_text(accounting.epsilon(plan, limit.delta))} · "
            f"spent before {epsilon_text(spent)} · "
            f"together {epsilon_text(together)} (RDP, δ = {limit.delta:g}) · "
            f"limit {epsilon_text(limit.epsilon)}")
    try:
        purse.check(plan, order, limit, "this plan")
    except RefusalError as error:
        return Check("privacy budget", "problem", text,
                     _alternatives(purse, plan, order, limit, policy, contract), error.code)
    return Check("privacy budget", "ok", text)


def _alternatives(
    purse: Budget, plan: list[accounting.Mechanism], order: float, limit: Limit, policy: Policy,
    contract: Contract,
) -> str:
    """What would fit instead: fewer rounds at this noise, or more noise over these rounds."""
    kept = purse.longest_that_fits(plan, order, limit)
    rounds = accounting.rounds_in(contract, kept)
    if not rounds:
        return "nothing fits: this site cannot take part with these records"

    def louder(factor: float) -> list[accounting.Mechanism]:
        return [m._replace(noise_multiplier=m.noise_multiplier * factor) for m in plan]

    low, high = 1.0, 2.0
    while high < accounting.MOST_NOISE and (
        purse.together(louder(high), order, limit.delta) > limit.epsilon
    ):
        low, high = high, high * 2
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        fits = purse.together(louder(middle), order, limit.delta) <= limit.epsilon
        low, high = (low, middle) if fits else (middle, high)
    smaller = accounting.epsilon(louder(high), policy.target(contract).delta)
    if smaller < 0.01:
        return f"would fit: {rounds} of {contract.rounds} rounds at this noise"
    return (
        f"would fit: {rounds} of {contract.rounds} rounds at this noise, or all of them with "
        f"run.epsilon = {int(smaller * 100) / 100:.2f} in site.toml"
    )


def _clock(ledger: Ledger) -> Check:
    last = ledger.entries[-1].at
    if time.time() < last:
        return Check("clock", "warning", "it stands before the ledger's last entry; accounting "
                     "does not use it", "set the machine's clock")
    return Check("clock", "ok", "after the ledger's last entry")


def _disk(site: Site) -> Check:
    folder = site.state if site.state.is_dir() else site.folder
    free = shutil.disk_usage(folder).free
    if free < LEAST_DISK or not os.access(folder, os.W_OK):
        return Check("disk", "problem", f"{free >> 20} MB free for {folder}, or not writable",
                     f"free at least {LEAST_DISK >> 20} MB")
    return Check("disk", "ok", f"{free >> 30} GB free")
