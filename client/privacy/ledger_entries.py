"""What a ledger's entries are, and how each follows on the one before.

An entry's bytes are its JSON (`body`) and its MAC. The chain: each names the SHA-256 of the body
and MAC of the one before. Fields may be added with a default: the bytes that were written are what
is verified, so entries of older versions stay valid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from silotune.common.config.types import (
    Count,
    Delta,
    Epsilon,
    Frozen,
    Name,
    Number,
    Rate,
    Sha256,
)
from silotune.common.contract.privacy import Unit
from silotune.common.errors import ErrorCode, RefusalError
from silotune.common.formats import strict_json
from silotune.common.protocol.messages import Receipt, Round, RunId
from silotune.common.signing import verifies

EXPORT = "ledger 1"
FIRST = "0" * 64  # what stands before the first entry


class EntryBase(Frozen):
    sequence: Annotated[int, Field(ge=1, strict=True)]
    previous: Sha256
    at: Number


class Opened(EntryBase):
    """The first entry: whose ledger this is."""

    state: Literal["OPENED"] = "OPENED"
    site: Name
    public: Sha256
    owner: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]


class UnitLimit(Frozen):
    unit: Unit
    epsilon: Epsilon
    delta: Delta


class Adopted(EntryBase):
    """A policy the owner signed: from here on these limits hold; `others`: of other units."""

    state: Literal["POLICY"] = "POLICY"
    serial: Annotated[int, Field(ge=1, strict=True)]
    policy: Sha256
    unit: Unit
    epsilon: Epsilon
    delta: Delta
    others: tuple[UnitLimit, ...] = ()


class PlannedSteps(Frozen):
    """Equal steps of a run's plan."""

    noise_multiplier: Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
    sampling_rate: Rate
    steps: Count


class Charged(EntryBase):
    """`steps` steps of a mechanism on the records of `record_set`; stands whatever happens next.

    basis, rows: of the record_set; source: the file's name, for people. They stand in every charge
    and not in an entry of their own when the records are new, so that the number of entries, which
    a receipt shows, depends on requests alone. order: the Rényi order by which all is accounted,
    the same in every charge with noise (client/privacy/budget.py). request: SHA-256 of what was
    asked. noise_multiplier 0: without DP. plan: in the first charge of a run, all steps that the
    run may take, in order; in its later ones, and without DP, nothing. adapter: SHA-256 of the
    adapter that the round began with, under secure aggregation (client/privacy/site_sets.py).
    """

    state: Literal["CHARGED"] = "CHARGED"
    record_set: Sha256
    basis: str
    source: str
    rows: Annotated[int, Field(ge=0, strict=True)]
    unit: Unit
    contract: Sha256
    run: RunId
    round: Round
    attempt: Round
    request: Sha256
    noise_multiplier: Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
    sampling_rate: Rate
    steps: Count
    order: Annotated[float, Field(gt=1, allow_inf_nan=False, strict=True)]
    plan: tuple[PlannedSteps, ...] = ()
    adapter: Sha256 | None = None

    @property
    def key(self) -> RequestKey:
        return self.contract, self.run, self.round, self.attempt


class Released(EntryBase):
    """The reply to the charge with number `charge` was durable, and may have left. own: SHA-256 of
    what stayed (client/training/local_state.py)."""

    state: Literal["RELEASED"] = "RELEASED"
    charge: Annotated[int, Field(ge=1, strict=True)]
    reply: Sha256
    local_state: Sha256 | None = None


class BasisLinks(Frozen):
    """links: SHA-256 of the links (client/records/record_identity.py) between rows known by
    `basis`."""

    basis: str
    links: Sha256


class Prepared(EntryBase):
    """Rows were made of the records of `source` (client/preparation/cleaning.py). columns: the
    records', by their canonical names; changed: those whose cells are other ones since; made: which
    prepared row is of which raw one, for each basis by which both can be known; cells: SHA-256 of
    the codes of the changed cells. An entry for each preparation, also where nothing changed: their
    number depends on what the owner does, never on the records.
    """

    state: Literal["PREPARED"] = "PREPARED"
    source: str
    rows: Annotated[int, Field(ge=0, strict=True)]
    columns: tuple[str, ...]
    changed: tuple[str, ...]
    made: tuple[BasisLinks, ...]
    cells: Sha256 | None = None

    @property
    def bases(self) -> dict[str, str]:
        """The digest of the links of each basis."""
        return {one.basis: one.links for one in self.made}


class Settled(EntryBase):
    """The sites of the sum in which the round of the charge with number `charge` may be opened.
    Written before this site endorses that set, or reveals a share for it."""

    state: Literal["SETTLED"] = "SETTLED"
    charge: Annotated[int, Field(ge=1, strict=True)]
    sites: tuple[Name, ...]


Entry = Opened | Adopted | Charged | Released | Prepared | Settled
RequestKey = tuple[str, str, int, int]  # contract, run, round, attempt
_READ: TypeAdapter[Any] = TypeAdapter(Annotated[Entry, Field(discriminator="state")])


def damaged(why: str) -> RefusalError:
    return RefusalError(
        f"The ledger cannot be trusted: {why}. Nothing is computed. Restore the newest state/ and "
        "keys/head of this site together; a new ledger cannot be started on records that it knew.",
        code=ErrorCode.LEDGER_DAMAGED,
    )


def digest(body: str, mac: bytes) -> str:
    return hashlib.sha256(body.encode() + mac).hexdigest()


def chained(body: str, before: int, previous: str) -> Entry:
    """The entry in `body` if it is number before + 1 and follows on `previous`."""
    try:
        entry: Entry = _READ.validate_json(body, strict=True)
    except ValidationError:
        raise damaged(f"entry {before + 1} is not in a ledger's form") from None
    if entry.sequence != before + 1 or entry.previous != previous:
        raise damaged(f"entry {before + 1} does not follow on the one before")
    return entry


def verify_export(lines: Iterable[str], public: str | None = None) -> list[Entry]:
    """The entries of an export whose chain holds and ends in a receipt signed by its site.

    public: the site's key (hexadecimal) as the auditor knows it; without it the key in the file
    is believed. RefusalError E212 otherwise. The MACs need the site's secret: `PrivacyLedger.open`.
    """
    try:
        first, *rows = [strict_json.loads(line) for line in lines]
        key = str(public or first["public"])
        if first != {"silotune": EXPORT, "public": key}:
            raise ValueError("another form, or another key")
        receipt = Receipt.model_validate(rows.pop())
        entries: list[Entry] = []
        previous = FIRST
        for body, mac in ((row.pop("body"), row.pop("mac")) for row in rows if row):
            strict_json.loads(body)
            entries.append(chained(body, len(entries), previous))
            previous = digest(body, bytes.fromhex(mac))
        if any(rows):
            raise ValueError("something stands beside an entry")
        opened = entries[0]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise damaged("the export is not in a ledger's form") from None
    if not isinstance(opened, Opened) or opened.public != key:
        raise damaged("the export is of another site's key")
    statement = Receipt.statement(opened.site, len(entries), previous)
    if (receipt.sequence, receipt.head) != (len(entries), previous) or not verifies(
        key, receipt.signature, statement
    ):
        raise damaged("the export's last entry is not the one its receipt signs")
    return entries
