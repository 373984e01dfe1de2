"""The site's policy: what the owner of the records permits. It can only narrow a contract.

A site runs on one TOML file that its owner signs: an edited file, or an older one put back, is
refused until the owner signs it (serial numbers only rise; the ledger records each policy adopted).
Nothing that arrives from a server changes it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from silotune.client import keys
from silotune.client.budget import Limit
from silotune.client.entries import Adopted
from silotune.client.ledger import Ledger
from silotune.client.lineage import Lineage
from silotune.common import fields
from silotune.common.contract import Contract, EncoderModel, Metric
from silotune.common.errors import DataError, RefusalError
from silotune.common.fields import Count, Delta, Epsilon, Flag, Frozen, Name, Positive, Sha256
from silotune.common.signing import verifies


class Data(Frozen):
    """The records. key: the columns that identify one; repeated: rows that are the same record."""

    file: Path
    key: tuple[str, ...] = ()
    repeated: Literal["refuse", "keep"] = "refuse"


class Model(Frozen):
    folder: Path | None = None


class Budgets(Frozen):
    """For each unit, what all replies on the same records may cost together, for ever."""

    class Budget(Frozen):
        epsilon: Epsilon
        delta: Delta

    record: Budget


class Permits(Frozen):
    """What the site takes part in. An empty list of models allows what a permitted contract names.

    contracts: SHA-256 (`silotune contract show`). min_sites: how many the roster must hold,
    min_quorum: how many must answer for a round to count.
    """

    contracts: tuple[Sha256, ...] = ()
    tasks: tuple[str, ...] = ("classification",)
    models: tuple[Sha256, ...] = ()
    metrics: tuple[Metric, ...] = ()
    max_clip_norm: Positive = 1.0
    min_records: Count = 100
    min_sites: Count = 2
    min_quorum: Count = 2
    allow_without_dp: Flag = False


class Server(Frozen):
    """Where the relay connects to. ca: the operator's CA certificate; address: host:port."""

    address: Annotated[str, Field(pattern=r"^[A-Za-z0-9.\-\[\]:]+:\d{1,5}$")]
    ca: Path


class Policy(Frozen):
    """site.toml. Paths in it start at the file's own folder."""

    name: Name
    data: Data
    model: Model = Model()
    budgets: Budgets
    permits: Permits
    server: Server | None = None

    @property
    def limit(self) -> Limit:
        """The budget of the unit a record."""
        return Limit(self.budgets.record.epsilon, self.budgets.record.delta)

    def check_records(self, found: Lineage) -> None:
        """DataError unless the records are as many and as distinct as the owner wants."""
        if found.rows < self.permits.min_records:
            raise DataError(
                f"{self.data.file.name} has fewer rows than permits.min_records = "
                f"{self.permits.min_records}.", code="E304",
            )
        if found.repeated and self.data.repeated == "refuse":
            raise DataError(
                f"Rows of {self.data.file.name} are the same record more than once; the privacy "
                "unit is one record. Name the columns that tell records apart in data.key, remove "
                "the copies, or set data.repeated = \"keep\" if equal rows are different people.",
                code="E307", local=f"{found.repeated} rows repeat another one.",
            )

    def refusals(self, contract: Contract) -> list[RefusalError]:
        """Every reason why this site does not take part in `contract`; empty if it does."""
        p, permits = contract.privacy, self.permits
        found: list[tuple[str, str]] = []
        if contract.hash not in permits.contracts:
            found.append((
                "E201",
                f"The contract '{contract.name}' ({contract.hash}) is not among the contracts this "
                "site permits. If you agree to it, add its hash to permits.contracts and sign.",
            ))
        if self.name not in contract.weights():
            found.append((
                "E201",
                f"'{self.name}' is not in the contract's sites: {', '.join(contract.weights())}.",
            ))
        if p.mode == "none" and not permits.allow_without_dp:
            found.append((
                "E203",
                f"The contract '{contract.name}' trains without differential privacy and "
                f"{self.name} does not allow that (allow_without_dp = false).",
            ))
        for wrong, what in (
            (p.clip_norm > permits.max_clip_norm,
             f"clip norm {p.clip_norm:g} is looser than permits.max_clip_norm = "
             f"{permits.max_clip_norm:g}"),
            (p.delta > self.limit.delta,
             f"δ = {p.delta:g} is larger than the budget's {self.limit.delta:g}"),
            (contract.task.kind not in permits.tasks,
             f"task '{contract.task.kind}' is not in permits.tasks"),
            (isinstance(contract.model, EncoderModel) and bool(permits.models)
             and contract.model.sha256 not in permits.models,
             "its model's SHA-256 is not in permits.models"),
            (len(contract.sites) < permits.min_sites,
             f"{len(contract.sites)} sites are fewer than permits.min_sites = "
             f"{permits.min_sites}"),
            (contract.quorum < permits.min_quorum,
             f"a quorum of {contract.quorum} is below permits.min_quorum = {permits.min_quorum}"),
        ):
            if wrong:
                found.append(("E205", f"The contract '{contract.name}': {what}."))
        found += [
            ("E206",
             f"The contract '{contract.name}' asks for the metric '{released.metric}', which is "
             "not in permits.metrics.")
            for released in contract.releases if released.metric not in permits.metrics
        ]
        return [RefusalError(sentence, code=code) for code, sentence in found]


def load(path: Path) -> Policy:
    """Read site.toml, its paths made absolute; ContractError lists every problem."""
    return _parse(fields.read_text(path, "Policy"), path)


def _parse(text: str, path: Path) -> Policy:
    policy = fields.parse(text, path.name, Policy)
    base = path.resolve().parent
    data = policy.data.model_copy(update={"file": base / policy.data.file})
    model, server = policy.model, policy.server
    if model.folder is not None:
        model = model.model_copy(update={"folder": base / model.folder})
    if server is not None:
        server = server.model_copy(update={"ca": base / server.ca})
    return policy.model_copy(update={"data": data, "model": model, "server": server})


class Signature(Frozen):
    """site.toml.sig: the owner's signature of the policy's bytes, with a number that only rises."""

    policy: Sha256
    serial: Annotated[int, Field(ge=1, strict=True)]
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    @staticmethod
    def statement(policy: str, serial: int) -> bytes:
        return f"silotune policy 1\n{policy}\n{serial}".encode()


def signature_file(path: Path) -> Path:
    return path.with_name(path.name + ".sig")


def sign(path: Path, owner_key: Path, after: int) -> Signature:
    """Sign a policy as the one that follows on serial number `after`; writes the .sig beside it."""
    text = fields.read_text(path, "Policy")
    _parse(text, path)
    digest = hashlib.sha256(text.encode()).hexdigest()
    signed = keys.sign(owner_key, Signature.statement(digest, after + 1))
    found = Signature(policy=digest, serial=after + 1, signature=signed.hex())
    keys.write_durably(signature_file(path), found.model_dump_json().encode())
    return found


def adopt(path: Path, ledger: Ledger, owner: bytes) -> Policy:
    """The policy, if its owner signed these bytes and no later ones; notes a new one in the ledger.

    RefusalError E213 otherwise.
    """
    text = fields.read_text(path, "Policy")
    mend = "Look at it, then let the owner sign it: silotune site sign."
    try:
        found = Signature.model_validate_json(signature_file(path).read_bytes())
    except (OSError, ValidationError):
        raise RefusalError(f"{path.name} is not signed. {mend}", code="E213") from None
    digest = hashlib.sha256(text.encode()).hexdigest()
    if found.policy != digest:
        raise RefusalError(
            f"{path.name} has changed since its owner signed it. {mend}", code="E213"
        )
    statement = Signature.statement(digest, found.serial)
    if not verifies(owner.hex(), found.signature, statement):
        raise RefusalError(
            f"{path.name} carries a signature that is not the owner's. {mend}", code="E213"
        )
    policy = _parse(text, path)
    if policy.name != ledger.site:
        raise RefusalError(
            f"{path.name} is for '{policy.name}', but the ledger is that of '{ledger.site}'.",
            code="E213",
        )
    with ledger.writing():
        last = ledger.policy
        if last is None or found.serial > last.serial:
            ledger.append(
                Adopted, serial=found.serial, policy=digest, unit="record",
                epsilon=policy.limit.epsilon, delta=policy.limit.delta,
            )
        elif (last.policy, last.serial) != (digest, found.serial):
            raise RefusalError(
                f"{path.name} is an older policy (number {found.serial}); the ledger has "
                f"adopted number {last.serial}. {mend}", code="E213",
            )
    return policy


def permitting(contract: Contract, name: str, data: Path, model: Path | None) -> Policy:
    """A policy that permits exactly `contract` and its budget once: for simulations and tests."""
    p = contract.privacy
    return Policy(
        name=name,
        data=Data(file=data, repeated="keep"),
        model=Model(folder=model),
        budgets=Budgets(record=Budgets.Budget(epsilon=p.epsilon, delta=p.delta)),
        permits=Permits(
            contracts=(contract.hash,), max_clip_norm=p.clip_norm, min_records=1, min_sites=1,
            metrics=tuple(released.metric for released in contract.releases), min_quorum=1,
            allow_without_dp=p.mode == "none",
        ),
    )
