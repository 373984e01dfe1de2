"""`silotune site check`: can this site take part in this contract? Each row is proved by doing it.

Every problem is found at once; nothing is sent and nothing is spent.
"""

from __future__ import annotations

import importlib
import os
import pwd
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from silotune.client.operations.server_probe import shake
from silotune.client.privacy import accountant
from silotune.client.privacy.budget import Budget, Limit, order_of, planned
from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.records import record_ids
from silotune.client.records.record_ids import RecordSet
from silotune.client.site import policy as policies
from silotune.client.site import signed_policy
from silotune.client.site.commands import JOIN, JOIN_NOTE, on_site
from silotune.client.site.folder import SiteFolder
from silotune.client.site.policy import Data, Policy, Server
from silotune.client.training import privacy_units
from silotune.client.worker.secagg import check_bound
from silotune.common.cli.main import command
from silotune.common.config.types import as_toml
from silotune.common.contract import contract as contracts
from silotune.common.contract.contract import Contract
from silotune.common.contract.head_facts import forecast_of, forecast_sentences
from silotune.common.contract.model import OneHotModel
from silotune.common.contract.privacy import Unit, delta_for, size_of_delta
from silotune.common.data import records, sql_source
from silotune.common.data.records import Records
from silotune.common.errors import DataError, ErrorCode, RefusalError, SilotuneError, counted
from silotune.common.model_files.model_source import SOURCES
from silotune.common.runtime.check import Check
from silotune.common.secagg import key_agreement
from silotune.common.tokenization import token_lengths

T = TypeVar("T")
LEAST_DISK = 200 << 20  # bytes: a run's replies, the ledger and its log
MOST_MEASURED = 4096  # records whose lengths are measured: some seconds of one core
Fix = str | Callable[[SilotuneError], str]  # a remedy, or what gives the one for an error


class _Table:
    """The rows so far."""

    def __init__(self) -> None:
        self.rows: list[Check] = []

    def attempt(self, name: str, fix: Fix, step: Callable[[], tuple[T, str]]) -> T | None:
        """Do a step: it returns its value and what to say, or raises what is wrong."""
        try:
            value, result = step()
        except SilotuneError as error:
            local = error.local if isinstance(error, DataError) else ""
            remedy = fix if isinstance(fix, str) else fix(error)
            self.rows += [
                Check(name, "problem", line, remedy, error.code, local)
                for line in str(error).splitlines()
            ]
            return None
        self.rows.append(Check(name, "ok", result))
        return value


def check(site: SiteFolder, contract_file: Path, *, network: bool = False) -> list[Check]:
    """All rows, in the order in which a person would correct them. network: shake hands with the
    server, too (a worker has no network)."""
    table = _Table()
    contract = table.attempt(
        "contract",
        "name the contract's file, or ask the operator for a contract that is valid",
        lambda: _contract(contract_file),
    )
    keys = table.attempt("keys", lambda _: _fix_of_keys(site), lambda: _keys(site))
    policy = table.attempt(
        "policy", _then_sign(site, f"correct {site.config}"), lambda: _policy(site)
    )
    ledger = (
        table.attempt(
            "ledger", lambda error: _fix_of_ledger(site, error), lambda: _ledger(site, keys)
        )
        if keys
        else None
    )
    if ledger and keys:
        table.rows.append(_clock(ledger))
        if policy:
            table.attempt(
                "signature",
                command(*on_site(site.config, "sign")),
                lambda: _signature(site, ledger, keys),
            )
    table.rows.append(_disk(site))
    if network and policy:
        _check_server(table, policy, site, contract_file)
    if policy and contract:
        table.rows += _permission(policy, contract, site, contract_file)
        table.rows.append(_roster(policy, contract, keys, site))
        table.rows.append(_masks(policy, contract))
        if not isinstance(contract.model, OneHotModel):
            table.attempt(
                "model",
                lambda error: _fix_of_model(site, policy, contract, error),
                lambda: _model(policy, contract),
            )
    if policy:
        table.attempt(
            "device",
            _in_policy(site, 'set device = "auto" in [performance]'),
            lambda: _device(policy),
        )
        _check_records(table, policy, contract, ledger, site, contract_file)
    if contract:
        table.rows += _forecast(contract)
        table.rows.append(Check("leaves the site", "ok", contract.leaves))
    return table.rows


def _then_sign(site: SiteFolder, what: str) -> str:
    """What to change in the policy, and that it has to be signed after it."""
    return f"{what}, then: {command(*on_site(site.config, 'sign'))}"


def _in_policy(site: SiteFolder, what: str) -> str:
    return _then_sign(site, f"{what} of {site.config}")


def _fix_of_keys(site: SiteFolder) -> str:
    try:
        open_ = sorted(str(file) for file in site.keys.iterdir() if file.stat().st_mode & 0o077)
    except OSError:
        open_ = []
    if open_:
        return shlex.join(["chmod", "600", *open_])
    return (
        f"restore {site.keys} from this site's backup, or make a site in another folder: "
        + command("site", "init", "--name", "NAME", "--folder", "FOLDER")
    )


def _fix_of_ledger(site: SiteFolder, error: SilotuneError) -> str:
    if error.code == ErrorCode.LEDGER_UNAVAILABLE:
        return "free space on the disk or close the other program, then run this again"
    return f"restore the newest backup of {site.state} and {site.keys / 'head'}, then: " + command(
        "privacy", "verify", "--config", site.config
    )


def _check_server(table: _Table, policy: Policy, site: SiteFolder, contract_file: Path) -> None:
    if policy.server is None:
        join = command(*on_site(site.config, "join", contract_file, *JOIN))
        table.rows.append(
            Check(
                "handshake",
                "warning",
                "[server] is not set: nothing to reach, and `site start` needs it",
                f"{join}   ({JOIN_NOTE})",
            )
        )
        return
    server = policy.server
    fix = _in_policy(site, "correct address and ca in [server]")
    if table.attempt(
        "handshake",
        f"ask the operator whether the server runs, or {fix}",
        lambda: (True, shake(server)),
    ):
        table.attempt(
            "node key",
            lambda error: _fix_of_node_key(site, policy, error),
            lambda: (True, _admission(server, site.relay / "node.key")),
        )


def _fix_of_node_key(site: SiteFolder, policy: Policy, error: SilotuneError) -> str:
    if isinstance(error, DataError):
        return f"restore {site.relay / 'node.key'} from this site's backup"
    if error.code == ErrorCode.NODE_UNKNOWN:
        return f"send {site.folder / policy.name}.request.json to the operator"
    return "run this again; if it stays so, ask the operator whether the server runs"


def _admission(server: Server, node_key: Path) -> str:
    from silotune.client.operations import (
        node_admission,  # Flower: not for a worker, which has no network
    )

    return node_admission.check(server, node_key)


def _check_records(
    table: _Table,
    policy: Policy,
    contract: Contract | None,
    ledger: PrivacyLedger | None,
    site: SiteFolder,
    contract_file: Path,
) -> None:
    data = policy.data
    if file := data.file:
        table.rows.append(_access(file, site))
    else:
        table.rows += _query(data)
    found = table.attempt("data", _in_policy(site, "correct [data]"), lambda: _data(data, contract))
    if found is None:
        return
    if contract:
        prepare = command(*on_site(site.config, "prepare", contract_file))
        parsed = table.attempt(
            "columns",
            f"correct the rows, or agree on another contract; all problems are listed by {prepare}",
            lambda: _columns(found, contract),
        )
        if parsed is not None:
            table.rows += [
                Check(
                    "rows",
                    "warning",
                    note,
                    "correct these rows if they mean something else; "
                    f"tags are rewritten by {prepare}",
                )
                for note in parsed.notes
            ]
            if policy.model.folder is not None:
                table.rows += _lengths(parsed, contract, policy.model.folder)
    secret = ledger.identity.fingerprint_key if ledger else bytes(32)
    records_ = table.attempt(
        "record key",
        _in_policy(site, "correct key in [data]"),
        lambda: _record_set(found, policy, secret),
    )
    if records_ is None:
        return
    if not policy.data.key:
        table.rows[-1] = Check(
            "record key",
            "warning",
            "none: a row that is corrected counts as a new record",
            _in_policy(
                site,
                'name the columns that identify a record, such as key = ["patient_id"], in [data]',
            ),
        )
    unit = contract.privacy.unit if contract else next(iter(policy.limits))
    table.attempt(
        "records",
        lambda error: _fix_of_records(site, error, unit),
        lambda: _records(policy, records_, unit, ledger),
    )
    if contract and contract.privacy.unit in policy.limits:
        if contract.privacy.mode == "dp":
            table.rows += _deltas(records_, policy, contract, site)
        if ledger:
            table.rows.append(_budget(ledger, records_, policy, contract))


def _contract(file: Path) -> tuple[Contract, str]:
    contract = contracts.load(file)
    return contract, f"{contract.name} {contract.hash[:12]}…"


def _keys(site: SiteFolder) -> tuple[Keys, str]:
    keys = Keys.load(site.keys)
    return keys, f"this user's alone; public key {keys.public[:12]}…"


def _policy(site: SiteFolder) -> tuple[Policy, str]:
    policy = policies.load(site.config)
    return policy, f"{policy.name}: {policy.limits_in_words()}, over its lifetime"


def _ledger(site: SiteFolder, keys: Keys) -> tuple[PrivacyLedger, str]:
    ledger = PrivacyLedger.open(site.state, keys)
    count = counted(len(ledger.entries), "entry", "entries")
    return ledger, f"{count}, chain, MACs and head verified"


def _signature(site: SiteFolder, ledger: PrivacyLedger, keys: Keys) -> tuple[Policy, str]:
    policy = signed_policy.adopt(site.config, ledger, keys.owner)
    assert ledger.policy is not None
    return policy, f"the owner's, number {ledger.policy.serial}"


def _permission(
    policy: Policy, contract: Contract, site: SiteFolder, contract_file: Path
) -> list[Check]:
    refusals = policy.refusals(contract)
    if not refusals:
        return [Check("permission", "ok", "the policy permits this contract")]
    fixes = [
        "ask the operator for a contract that fits, or, "
        f"if the records' owner agrees, {_then_sign(site, f'change {site.config}')}"
    ] * len(refusals)
    if contract.hash not in policy.permits.contracts:  # which is the first of the reasons
        join = command(*on_site(site.config, "join", contract_file, *JOIN))
        fixes[0] = f"if the records' owner agrees to it: {join}   ({JOIN_NOTE})"
    return [
        Check("permission", "problem", str(refusal), fix, refusal.code)
        for refusal, fix in zip(refusals, fixes, strict=True)
    ]


def _roster(policy: Policy, contract: Contract, keys: Keys | None, site: SiteFolder) -> Check:
    entry = next((entry for entry in contract.sites if entry.name == policy.name), None)
    if entry is None:
        return Check(
            "roster",
            "problem",
            f"'{policy.name}' is not in it",
            f"the operator names it in the draft; {_fix_of_roster(policy, site)}",
            ErrorCode.CONTRACT_NOT_ACCEPTED,
        )
    if entry.public_key is None:
        return Check(
            "roster",
            "warning",
            "this site is in it, without a key",
            _fix_of_roster(policy, site),
        )
    if keys is not None and entry.public_key != keys.public:
        return Check(
            "roster",
            "problem",
            f"the key {entry.public_key[:12]}… is not this site's",
            _fix_of_roster(policy, site),
            ErrorCode.CONTRACT_NOT_ACCEPTED,
        )
    return Check("roster", "ok", f"{policy.name}, key {entry.public_key[:12]}…")


def _fix_of_roster(policy: Policy, site: SiteFolder) -> str:
    words = ("--folder", "FOLDER")
    add = command("server", "add", "REQUEST", "--fingerprint", "FINGERPRINT", *words)
    return (
        f"send {site.folder / policy.name}.request.json to the operator, whose commands are: "
        f"{add}, then: {command('server', 'contract', 'DRAFT', *words)}"
    )


def _masks(policy: Policy, contract: Contract) -> Check:
    if contract.secure_aggregation is None:
        return Check(
            "masks",
            "warning",
            contract.masks,
            _fix_of_masks(contract),
        )
    try:
        check_bound(contract, accountant.plan(contract, policy.target(contract)))
    except RefusalError as error:
        return Check(
            "masks", "problem", str(error), "the operator changes the contract", error.code
        )
    return Check("masks", "ok", contract.masks)


def _fix_of_masks(contract: Contract) -> str:
    if contract.can_be_masked:
        made = command("server", "contract", "DRAFT", "--folder", "FOLDER")
        return f"ask the operator for a contract with [secure_aggregation]: {made}"
    if len(contract.sites) < key_agreement.LEAST_SITES:
        return (
            f"secure aggregation needs {key_agreement.LEAST_SITES} sites, and the contract has "
            f"{len(contract.sites)}"
        )
    return "the contract's [aggregation] needs each site's update by itself"


def _model(policy: Policy, contract: Contract) -> tuple[None, str]:
    assert not isinstance(contract.model, OneHotModel)
    if policy.model.folder is None:
        raise DataError(
            f"The contract needs the model '{contract.model.name}', and folder in "
            "[model] is not set.",
            code=ErrorCode.HASH_MISMATCH,
        )
    from silotune.common.models import compatibility

    compatibility.check(contract.at(policy.name), policy.model.folder, policy.performance)
    return None, f"{contract.model.name} {contract.model.sha256[:12]}…"


def _fix_of_model(
    site: SiteFolder, policy: Policy, contract: Contract, error: SilotuneError
) -> str:
    """The worker is another user than the operator of this machine, and reads only what its owner
    has named: so the cache is never taken silently, but its path is said."""
    assert not isinstance(contract.model, OneHotModel)
    name = contract.model.name
    if policy.model.folder is not None:
        if error.code == ErrorCode.MODEL_UNSUITABLE:
            return "ask the operator to correct [model] and [adapter] of the contract"
        return _in_policy(site, f"name the folder of '{name}' as folder in [model]")
    sources = importlib.import_module(SOURCES)
    source = sources.SOURCES.get(name)
    if source is None or (source.converted or source.sha256) != contract.model.sha256:
        return _in_policy(
            site,
            "take the model from where the operator has it, and put "
            f"folder = \"…\", the folder of '{name}', in [model]",
        )
    fetch = "" if sources.present(name) else f"{command('data', 'fetch', name)}, then "
    folder = as_toml(str(source.path))
    return (
        f"{fetch}"
        + _in_policy(site, f"put folder = {folder} in [model]")
        + "   (the worker's user must be able to read that folder; a copy of it will do)"
    )


def _device(policy: Policy) -> tuple[None, str]:
    from silotune.common.models.base import device_of

    return None, str(device_of(policy.performance))


def _access(file: Path, site: SiteFolder) -> Check:
    """Whether the file is there, and for this user alone; the remedy is that of the cause."""

    def problem(what: str, fix: str) -> Check:
        return Check("data access", "problem", what, fix, ErrorCode.DATA_UNREADABLE)

    absent = _in_policy(site, "put the records there, or correct file in [data]")
    try:
        facts = file.stat()
    except PermissionError:
        return problem(
            f"{file} is in a folder that this user may not enter.",
            "run this as the user of the records, or move the file",
        )
    except OSError as error:
        return problem(f"{file} cannot be reached: {error.strerror}.", absent)
    mode, user = facts.st_mode & 0o777, os.geteuid()
    if not file.is_file():
        return problem(f"{file} is no file.", _in_policy(site, "name a file as file in [data]"))
    close = shlex.join(["chmod", "600", str(file)])
    if facts.st_uid != user:
        own = shlex.join(["chown", _user_name(user), str(file)])
        return problem(
            f"{file.name} belongs to another user ({facts.st_uid}).", f"as root: {own} && {close}"
        )
    if mode & 0o077:
        return problem(f"{file.name} is open to other users (mode {mode:o}).", close)
    return Check("data access", "ok", f"mode {mode:o}: this user alone")


def _user_name(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _query(data: Data) -> list[Check]:
    """What may be better about how a database is asked; that it answers is another row."""
    found = []
    if sql_source.shows_password(data.url or ""):
        found.append(
            Check(
                "data access",
                "warning",
                "a password stands in site.toml",
                "write ${PASSWORD} in its place in data.url, and set that variable for "
                "the worker alone",
            )
        )
    if not sql_source.ordered(data.query or ""):
        found.append(
            Check(
                "row numbers",
                "warning",
                "the query has no ORDER BY: the numbers of "
                "rows in messages may change from one reading to the next",
                "add ORDER BY to data.query",
            )
        )
    return found


def _data(data: Data, contract: Contract | None) -> tuple[records.Table, str]:
    found = records.named_by(contract, data.table()) if contract else data.table()
    return found, f"{found.source}, {counted(len(found.rows), 'row')}"


def _columns(found: records.Table, contract: Contract) -> tuple[Records, str]:
    parsed = records.parse(found, contract)
    if contract.privacy.entity:
        privacy_units.of_entities(found, contract.privacy.entity)
    count = counted(len(contract.columns), "column")
    return parsed, f"{count} and the label fit the schema"


def _lengths(found: Records, contract: Contract, folder: Path) -> list[Check]:
    """What the model does not read of the texts; nothing where it reads no text. The counts are of
    records, so for the owner's screen alone."""
    every = -(-len(found) // MOST_MEASURED)
    part = Records(found.inputs[::every], found.labels[::every])
    lengths_ = token_lengths.measure([part], contract, token_lengths.tokenizer_of(folder))
    if not lengths_.texts:
        return []
    limit = counted(lengths_.limit, "token")
    if not lengths_.cut:
        return [Check("lengths", "ok", f"no text is longer than the model's {limit}")]
    local = lengths_.sentence
    if every > 1:
        local = f"one record in {every} was measured: {local}"
    text = f"texts are longer than the model's {limit}: what is beyond is not read"
    fix = "ask the operator to raise model.max_tokens in the contract, or split the texts"
    if lengths_.all_lost:
        return [
            Check(
                "lengths",
                "problem",
                f"{text}, and each entity is there",
                fix,
                ErrorCode.ENTITIES_BEYOND_TEXT,
                local,
            )
        ]
    return [Check("lengths", "warning", text, fix, "", local)]


def _record_set(found: records.Table, policy: Policy, secret: bytes) -> tuple[RecordSet, str]:
    return record_ids.of_table(found, policy.data.key, secret), ", ".join(policy.data.key)


def _records(
    policy: Policy, found: RecordSet, unit: Unit, ledger: PrivacyLedger | None
) -> tuple[None, str]:
    policy.check_records(found, unit, ledger)
    if unit == "entity":
        count = counted(len(found.fingerprints), "entity", "entities")
        return None, f"{counted(found.rows, 'row')} of {count}"
    repeated = f", {found.repeated} of them repeated" if found.repeated else ""
    return None, f"{found.rows:,}{repeated}"


def _fix_of_records(site: SiteFolder, error: SilotuneError, unit: Unit) -> str:
    if error.code == ErrorCode.TOO_FEW_ROWS:
        return "add records, or " + _in_policy(site, "lower min_records in [permits]")
    if unit == "entity":
        return "write the key alike in each row of an entity, or " + _in_policy(
            site, 'set duplicate_records = "keep" in [data]'
        )
    return "keep one row of each record, or " + _in_policy(
        site,
        'name the columns that tell records apart as key, or set duplicate_records = "keep", '
        "in [data]",
    )


def _deltas(found: RecordSet, policy: Policy, contract: Contract, site: SiteFolder) -> list[Check]:
    """The delta of this run and that of the lifetime budget, each held against the number of units
    that this site really has; that number is in `local` alone."""
    unit = contract.privacy.unit
    units, what = found.rows, "records"
    if unit == "entity":
        units, what = len(found.fingerprints), "entities"
    fitting, of_run = delta_for(units), policy.target(contract).delta
    budget_fix = _in_policy(site, f"set delta in [budgets.{unit}]")
    if of_run > fitting:
        budget_fix = f"first the contract's delta, then {budget_fix}"
    checks = []
    for name, delta, fix in (
        (
            "delta of the run",
            of_run,
            "the operator sets delta in the contract's [privacy], or at this site in [[sites]]",
        ),
        ("delta of the budget", policy.limits[unit].delta, budget_fix),
    ):
        size = size_of_delta(delta, units)
        if size == "small":
            checks.append(Check(name, "ok", f"{delta:g}, small for this site's number of {what}"))
            continue
        refused = size == "meaningless" and not contract.privacy.allow_large_delta
        checks.append(
            Check(
                name,
                "problem" if refused else "warning",
                f"{delta:g} is large for this site's number of {what}: some of them could be "
                "published whole within the guarantee",
                fix,
                ErrorCode.POLICY_VIOLATED if refused else "",
                f"{units:,} {what} times {delta:g} is {delta * units:.3g}; delta should be "
                f"{fitting:g}.",
            )
        )
    return checks


def _budget(ledger: PrivacyLedger, found: RecordSet, policy: Policy, contract: Contract) -> Check:
    if contract.privacy.mode == "none":
        return Check(
            "privacy budget",
            "warning",
            "the contract trains WITHOUT privacy: afterwards "
            "nothing is left of any budget for these records",
        )
    unit = contract.privacy.unit
    limit, budget = policy.limits[unit], Budget(ledger, found, unit)
    plan = planned(ledger, contract, policy.target(contract))
    order = ledger.order or order_of(plan, limit)
    text = budget.figures(budget.with_plan(plan, order, limit.delta), plan, order, limit)
    try:
        budget.check_plan(plan, order, limit, "this plan")
    except RefusalError as error:
        fix = _alternatives(budget, plan, order, limit, policy, contract)
        if reasons := budget.reasons():
            text += "".join(f"; {reason}" for reason in reasons)
            fix += (
                "; records are compared if data.key names the same columns that identify a record "
                "each time, from before they are first prepared or used"
            )
        return Check("privacy budget", "problem", text, fix, error.code)
    if budget.ends_early(plan, order, limit):
        return Check(
            "privacy budget",
            "warning",
            f"{text}; a run of this contract has begun: it can go on, and a further one has only "
            "the rounds that it leaves",
            "ask the operator to resume that run, which charges no round twice: "
            f"{command('server', 'resume', 'RUN')}",
        )
    return Check("privacy budget", "ok", text)


def _forecast(contract: Contract) -> list[Check]:
    """What the plan can learn, by the contract alone."""
    found = forecast_of(contract)
    if found is None:
        return []
    return [
        Check(
            "forecast",
            "ok" if found.shows else "warning",
            "; ".join(forecast_sentences(contract)).removeprefix("! "),
            ""
            if found.shows
            else "ask the operator for a contract with more records at each site (n is "
            "privacy.expected_units), more sites or a larger ε, before anything is spent",
        )
    ]


def _alternatives(
    budget: Budget,
    plan: list[accountant.Mechanism],
    order: float,
    limit: Limit,
    policy: Policy,
    contract: Contract,
) -> str:
    """What would fit instead: fewer rounds at this noise, or more noise over these rounds."""
    kept = budget.longest_that_fits(plan, order, limit)
    rounds = accountant.rounds_in(contract, kept)
    if not rounds:
        return "nothing fits: this site cannot take part with these records"

    def fits(factor: float) -> bool:
        noisier = accountant.scaled(plan, factor)
        return budget.with_plan(noisier, order, limit.delta).epsilon <= limit.epsilon

    low, high = 1.0, 2.0
    while high < accountant.MOST_NOISE and not fits(high):
        low, high = high, high * 2
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fits(middle) else (middle, high)
    noisier = accountant.scaled(plan, high)
    smaller = accountant.plan_epsilon(noisier, policy.target(contract).delta)
    if smaller < 0.01:
        return f"would fit: {rounds} of {contract.rounds} rounds at this noise"
    return (
        f"would fit: {rounds} of {contract.rounds} rounds at this noise, or all of them with "
        f"run.epsilon = {int(smaller * 100) / 100:.2f} in site.toml"
    )


def _clock(ledger: PrivacyLedger) -> Check:
    last = ledger.entries[-1].at
    if time.time() < last:
        return Check(
            "clock",
            "warning",
            "it stands before the ledger's last entry; accounting does not use it",
            "set the machine's clock",
        )
    return Check("clock", "ok", "after the ledger's last entry")


def _disk(site: SiteFolder) -> Check:
    folder = site.state if site.state.is_dir() else site.folder
    if not os.access(folder, os.W_OK):
        return Check(
            "disk",
            "problem",
            f"{folder} is not writable by this user",
            f"run this as the user of {folder}",
        )
    free = shutil.disk_usage(folder).free
    if free < LEAST_DISK:
        return Check(
            "disk",
            "problem",
            f"{free >> 20} MB free for {folder}",
            f"free at least {LEAST_DISK >> 20} MB",
        )
    return Check("disk", "ok", f"{free >> 30} GB free")
