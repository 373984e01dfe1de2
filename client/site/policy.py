"""The site's policy: what the owner of the records permits. It can only narrow a contract.

A site runs on one TOML file that its owner signs: an edited file, or an older one put back, is
refused until the owner signs it (serial numbers only rise; the ledger records each policy adopted).
Nothing that arrives from a server changes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from silotune.client.privacy.budget import Limit, rows_of_one_record
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.records import record_ids
from silotune.client.records.canonical_values import canonical
from silotune.client.records.record_ids import RecordSet
from silotune.client.site.preparation_rules import Prepare
from silotune.common.config import types
from silotune.common.config.types import (
    Count,
    Delta,
    Distinct,
    Epsilon,
    Flag,
    Frozen,
    Name,
    Positive,
    Sha256,
)
from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.common.contract.model import OneHotModel
from silotune.common.contract.privacy import Metric, Target, Unit
from silotune.common.contract.task import TaskKind
from silotune.common.data import file_source, records, sql_source
from silotune.common.data.file_source import SHOWN_ROWS, rows_in_words
from silotune.common.data.records import Table
from silotune.common.data.text_decoding import Reading, delimiter_of
from silotune.common.errors import DataError, ErrorCode, RefusalError, counted
from silotune.common.formats.encodings import encoding_of

SHOWN_GROUPS = 3  # of rows that are one record, in the sentence that refuses them


def _flag_or_auto(value: object) -> object:
    if not isinstance(value, bool) and value != "auto":  # a Literal would take 1 for true
        raise ValueError('permits.masked_only must be true, false or "auto"')
    return value


class Data(Frozen):
    """The records: a file (common/data/file_source.py), or what a query of a database gives
    (common/data/sql_source.py).

    Encodings are those of common/formats/encodings.py.
    """

    file: Path | None = Field(
        default=None, description="Path of the file with the records; excludes url and query."
    )
    url: str | None = Field(
        default=None,
        description="SQLAlchemy URL of a database, in which ${NAME} stands for an environment "
        "variable.",
    )
    query: str | None = Field(
        default=None, description="SQL query whose rows are the records; required with url."
    )
    encoding: Annotated[str, AfterValidator(encoding_of)] = Field(
        default="utf-8", description="Character encoding of a CSV, JSON Lines or CoNLL file."
    )
    delimiter: Annotated[str, AfterValidator(delimiter_of)] | None = Field(
        default=None, description="Delimiter of a CSV file; detected from the header if absent."
    )
    key: Annotated[tuple[str, ...], Distinct] = Field(
        default=(),
        description="Columns that identify a record, or the entity whose records they are; a "
        "row's whole content if empty.",
    )
    duplicate_records: Literal["refuse", "keep"] = Field(
        default="refuse",
        description="Whether rows that are the same record, or keys that are the same entity in "
        'different forms, are an error ("refuse") or count separately ("keep").',
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.file is None) == (self.url is None and self.query is None):
            raise ValueError("[data] needs either a file, or a url and a query")
        if (self.url is None) != (self.query is None):
            raise ValueError("[data] url and query belong together: one of them is missing")
        names = [canonical(name) for name in self.key]
        for at, name in enumerate(names):
            if name in names[:at]:
                raise ValueError(f"[data] key names the column {self.key[at]!r} more than once")
        return self

    @property
    def source(self) -> str:
        """What the records come from, in a word."""
        return self.file.name if self.file else sql_source.SOURCE

    def table(self) -> Table:
        """All rows, read now. DataError if they cannot be."""
        if self.file:
            return records.table(self.file, Reading(self.encoding, self.delimiter))
        assert self.url is not None
        assert self.query is not None
        return Table(
            sql_source.SOURCE, *file_source.contents(*sql_source.read(self.url, self.query))
        )

    def within(self, folder: Path) -> Self:
        """With its path, also that of an SQLite file, made absolute."""
        if self.file:
            return self.model_copy(update={"file": folder / self.file})
        start, path = "sqlite:///", (self.url or "").removeprefix("sqlite:///")
        if path == self.url or path.startswith("$"):
            return self
        return self.model_copy(update={"url": f"{start}{folder / path}"})


class Model(Frozen):
    folder: Path | None = Field(
        default=None,
        description="Folder of the base model; needed unless the contract's model is one-hot.",
    )


class Budgets(Frozen):
    """For each unit, what all replies on the same records may cost together, over their
    lifetime."""

    class Budget(Frozen):
        epsilon: Epsilon = Field(
            description="Largest total ε of all replies on the same records, over all runs."
        )
        delta: Delta = Field(
            description="δ at which the total ε is accounted; a contract's δ may not exceed it."
        )

    record: Budget | None = Field(
        default=None,
        description="Lifetime budget of each record, for contracts whose unit is a record.",
    )
    entity: Budget | None = Field(
        default=None,
        description="Lifetime budget of each entity, for contracts whose unit is an entity.",
    )

    @model_validator(mode="after")
    def _any(self) -> Self:
        if not (self.record or self.entity):
            raise ValueError("[budgets.record] or [budgets.entity] is needed")
        return self


class Run(Frozen):
    """A limit for single runs. Where it is less than a contract's ε the site adds the noise that
    this takes, and nobody else has to agree."""

    epsilon: Epsilon | None = Field(
        default=None,
        description="Largest ε that one run may cost here; a smaller one than the contract's adds "
        "noise. The contract's if absent.",
    )


class Permits(Frozen):
    """What the site takes part in.

    Without masks a program at the relay can ask this site alone and so use up its lifetime budget;
    with them it needs the signatures of as many sites as the threshold says.

    The default of `set_changes` (client/privacy/site_sets.py) lets ten absences with their returns
    pass; the 20 differences of neighbouring rounds that they give show at most what 20 / (2 n - 1)
    updates of one of n equal sites would without masks, three with four sites, of one a round
    (simulations/benchmarks/differences.py).
    """

    contracts: Annotated[tuple[Sha256, ...], Distinct] = Field(
        default=(),
        description="SHA-256 of each contract that the site takes part in (`silotune contract "
        "show`).",
    )
    tasks: Annotated[tuple[TaskKind, ...], Distinct] = Field(
        default=("classification",), description="Kinds of task that the site takes part in."
    )
    models: Annotated[tuple[Sha256, ...], Distinct] = Field(
        default=(),
        description="SHA-256 of each permitted base model; empty permits whatever a permitted "
        "contract names.",
    )
    metrics: Annotated[tuple[Metric, ...], Distinct] = Field(
        default=(), description="Training metrics that may leave the site, noised and charged to ε."
    )
    max_clip_norm: Positive = Field(
        default=1.0, description="Largest clip norm that a contract may set, an L2 norm."
    )
    min_records: Count = Field(
        default=100,
        description="Smallest number of records, or of entities, with which the site takes part.",
    )
    min_sites: Count = Field(
        default=2, description="Smallest number of sites that a contract's roster must hold."
    )
    min_quorum: Count = Field(
        default=2, description="Smallest quorum that a contract may set, in sites."
    )
    masked_only: Annotated[bool | Literal["auto"], BeforeValidator(_flag_or_auto)] = Field(
        default="auto",
        description='Whether updates leave by secure aggregation alone; "auto" requires it with '
        "three or more sites, unless a rule needs each update by itself.",
    )
    max_colluding_sites: Annotated[int, Field(ge=0, le=126, strict=True)] = Field(
        default=0,
        description="Number of other sites, colluding with the server, from which this site's "
        "update must stay hidden.",
    )
    set_changes: Annotated[int, Field(ge=0, le=1_000_000, strict=True)] = Field(
        default=20,
        description="How often the set of sites in the masked sums of one run may change.",
    )
    allow_without_dp: Flag = Field(
        default=False,
        description='Whether contracts with privacy.mode = "none" are permitted; their updates '
        "have no privacy.",
    )
    allow_inexact_clipping: Flag = Field(
        default=False,
        description='Whether performance.gradients = "ghost", which does not clip exactly, is '
        "permitted.",
    )


class Server(Frozen):
    """Where the relay connects to."""

    address: Annotated[str, Field(pattern=r"^[A-Za-z0-9.\-\[\]:]+:\d{1,5}$")] = Field(
        description="Address of the server that the relay connects to, as host:port."
    )
    ca: Path = Field(
        description="Path of the operator's CA certificate, which authenticates the server."
    )


class Policy(Frozen):
    """site.toml. Paths in it start at the file's own folder."""

    name: Name = Field(description="Name of this site, as the contract's roster has it.")
    data: Data = Field(description="Where the records are and what identifies one.")
    prepare: Prepare = Field(
        default=Prepare(),
        description="What `silotune site prepare` may do to rows that do not fit.",
    )
    model: Model = Field(default=Model(), description="Folder of the base model on this machine.")
    budgets: Budgets = Field(description="Lifetime privacy budgets, one for each privacy unit.")
    run: Run = Field(default=Run(), description="Privacy limits of a single run at this site.")
    permits: Permits = Field(
        description="Which contracts the site takes part in, and under which conditions."
    )
    performance: Performance = Field(
        default=Performance(),
        description="How this machine computes; nothing in it changes a guarantee.",
    )
    server: Server | None = Field(
        default=None,
        description="The server that the relay connects to; `silotune site join` writes it.",
    )

    @property
    def limits(self) -> dict[Unit, Limit]:
        """The budget of each unit that has one."""
        found: tuple[tuple[Unit, Budgets.Budget | None], ...] = (
            ("record", self.budgets.record),
            ("entity", self.budgets.entity),
        )
        return {unit: Limit(b.epsilon, b.delta) for unit, b in found if b}

    def limits_in_words(self) -> str:
        return " and ".join(
            f"ε ≤ {limit.epsilon:g}, δ = {limit.delta:g} per {unit}"
            for unit, limit in self.limits.items()
        )

    def target(self, contract: Contract) -> Target:
        """What a run of `contract` may cost a unit here."""
        agreed = contract.target_of(self.name)
        return agreed._replace(epsilon=min(agreed.epsilon, self.run.epsilon or agreed.epsilon))

    def check_records(self, found: RecordSet, unit: Unit, ledger: PrivacyLedger | None) -> None:
        """DataError unless the records are as many and as distinct as the owner wants."""
        for problem in self.problems_of_records(found, unit, ledger):
            raise problem

    def problems_of_records(
        self, found: RecordSet, unit: Unit, ledger: PrivacyLedger | None
    ) -> list[DataError]:
        """In which way the records are fewer or less distinct than the owner wants.

        Args:
            found: The records.
            unit: The privacy unit of the contract.
            ledger: The site's, which knows which rows `site prepare` made of which; None if there
                is none yet.

        Returns:
            E304 for too few; E307 for rows that are one unit but would be clipped as several.
        """
        problems = []
        count, what = found.rows, "rows"
        if unit == "entity":
            count, what = len(found.fingerprints), f"entities ({', '.join(self.data.key)})"
        if count < self.permits.min_records:
            problems.append(
                DataError(
                    f"{self.data.source} has fewer {what} than permits.min_records = "
                    f"{self.permits.min_records}. Add records, or lower permits.min_records.",
                    code=ErrorCode.TOO_FEW_ROWS,
                )
            )
        if unit == "record" and found.repeated and self.data.duplicate_records == "refuse":
            problems.append(
                DataError(
                    f"Rows of {self.data.source} are the same record more than once; the privacy "
                    "unit is one record. Name the columns that tell records apart in data.key, "
                    'remove the copies (duplicates = "drop" in [prepare], then `silotune site '
                    'prepare`), or set data.duplicate_records = "keep" if equal rows are '
                    "different people.",
                    code=ErrorCode.DUPLICATE_RECORDS,
                    local=f"{counted(found.repeated, 'row repeats', 'rows repeat')} another one.",
                )
            )
        same = rows_of_one_record(ledger, found)
        if same and self.data.duplicate_records == "refuse":
            problems.append(self._of_one_record(same, unit))
        return problems

    def _of_one_record(self, same: Sequence[Sequence[int]], unit: Unit) -> DataError:
        """That rows which are clipped apart are one record or entity in several forms."""
        what, remedy = "record", "Keep one row of each record: the raw or the prepared one"
        if unit == "entity":
            what = f"entity ({', '.join(self.data.key)})"
            remedy = "Write its key alike in each of its rows"
        shown = "; ".join(
            rows_in_words(rows[:SHOWN_ROWS], len(rows)) for rows in same[:SHOWN_GROUPS]
        )
        more = f"; and {len(same) - SHOWN_GROUPS:,} more" if len(same) > SHOWN_GROUPS else ""
        return DataError(
            f"Rows of {self.data.source} are one {what} in different forms: `silotune site "
            "prepare` made one of the other, or the same values are written in two ways; the "
            f"privacy unit is one {unit}. {remedy}, or set data.duplicate_records = "
            '"keep" if they are different people.',
            code=ErrorCode.DUPLICATE_RECORDS,
            local=f"The same {unit} each: {shown}{more}.",
        )

    def for_worker_of(self, started: Policy) -> Policy:
        """What this policy says of a worker that runs: its own rules, over the records, the model
        and the way of computing that the worker has loaded under the policy it `started` with.

        Raises:
            RefusalError: E213 if this policy names other records than the worker has loaded.
        """
        loaded = started.data.model_copy(update={"duplicate_records": self.data.duplicate_records})
        if self.data != loaded:
            raise RefusalError(
                "[data] of the policy that the owner signed last names other records than this "
                "worker has loaded. Start the worker again.",
                code=ErrorCode.POLICY_NOT_SIGNED,
            )
        return self.model_copy(update={"model": started.model, "performance": started.performance})

    def refusals(self, contract: Contract) -> list[RefusalError]:
        """Every reason why this site does not take part in `contract`; empty if it does."""
        p, permits, secure = contract.privacy, self.permits, contract.secure_aggregation
        limit, entity, target = self.limits.get(p.unit), p.entity, self.target(contract)
        found: list[tuple[ErrorCode, str]] = []
        if contract.hash not in permits.contracts:
            found.append(
                (
                    ErrorCode.CONTRACT_NOT_ACCEPTED,
                    f"The contract '{contract.name}' ({contract.hash}) is not among the contracts "
                    "this site permits. If you agree to it: `silotune site join`, or add its hash "
                    "to permits.contracts and sign.",
                )
            )
        if self.name not in contract.weights():
            found.append(
                (
                    ErrorCode.CONTRACT_NOT_ACCEPTED,
                    f"'{self.name}' is not in the contract's sites: "
                    f"{', '.join(contract.weights())}.",
                )
            )
        if p.mode == "none" and not permits.allow_without_dp:
            found.append(
                (
                    ErrorCode.DP_REQUIRED,
                    f"The contract '{contract.name}' trains without differential privacy and "
                    f"{self.name} does not allow that (allow_without_dp = false).",
                )
            )
        for wrong, what in (
            (
                limit is None,
                f"it protects the unit '{p.unit}', for which site.toml has no [budgets.{p.unit}]",
            ),
            (
                entity is not None and not record_ids.same_columns(entity.key, self.data.key),
                f"its entity is known by {', '.join(entity.key if entity else ())}, data.key is "
                f"{', '.join(self.data.key) or 'empty'}",
            ),
            (
                p.largest_clip_norm > permits.max_clip_norm,
                f"clip norm {p.largest_clip_norm:g} is looser than permits.max_clip_norm = "
                f"{permits.max_clip_norm:g}",
            ),
            (
                limit is not None and target.delta > limit.delta,
                f"δ = {target.delta:g} is larger than the budget's {limit.delta if limit else 0:g}",
            ),
            (
                self.performance.gradients == "ghost" and not permits.allow_inexact_clipping,
                'performance.gradients = "ghost" does not clip exactly, which '
                "permits.allow_inexact_clipping does not allow",
            ),
            (
                self.performance.gradients == "ghost" and entity is not None,
                'performance.gradients = "ghost" has no gradient of an entity',
            ),
            (
                self.performance.gradients == "ghost" and contract.reads_apart,
                'performance.gradients = "ghost" has no gradient of pairs read apart, whose two '
                "texts go through the same layers",
            ),
            (
                contract.task.kind not in permits.tasks,
                f"task '{contract.task.kind}' is not in permits.tasks",
            ),
            (
                not isinstance(contract.model, OneHotModel)
                and bool(permits.models)
                and contract.model.sha256 not in permits.models,
                "its model's SHA-256 is not in permits.models",
            ),
            (
                secure is None and permits.masked_only is True,
                "it has no [secure_aggregation], and permits.masked_only = true",
            ),
            (
                secure is None and permits.masked_only == "auto" and contract.can_be_masked,
                f'it has no [secure_aggregation], which permits.masked_only = "auto" asks for '
                f"where three or more sites take part, and it has {len(contract.sites)}. The "
                "operator makes the contract with masks by `silotune server contract`, without "
                "--unmasked; or set permits.masked_only = false and sign",
            ),
            (
                secure is not None and secure.max_colluding_sites < permits.max_colluding_sites,
                "secure_aggregation.max_colluding_sites = "
                f"{secure.max_colluding_sites if secure else 0} is below "
                f"permits.max_colluding_sites = {permits.max_colluding_sites}",
            ),
            (
                len(contract.sites) < permits.min_sites,
                f"it has {counted(len(contract.sites), 'site')}, fewer than "
                f"permits.min_sites = {permits.min_sites}",
            ),
            (
                contract.quorum < permits.min_quorum,
                f"a quorum of {contract.quorum} is below permits.min_quorum = {permits.min_quorum}",
            ),
        ):
            if wrong:
                found.append(
                    (ErrorCode.POLICY_VIOLATED, f"The contract '{contract.name}': {what}.")
                )
        found += [
            (
                ErrorCode.METRIC_NOT_PERMITTED,
                f"The contract '{contract.name}' asks for the metric '{metric}', which is not in "
                "permits.metrics.",
            )
            for metric in contract.metrics
            if metric not in permits.metrics
        ]
        return [RefusalError(sentence, code=code) for code, sentence in found]


def load(path: Path) -> Policy:
    """Read site.toml, its paths made absolute; ContractError lists every problem."""
    return parse(types.read_text(path, "Policy"), path)


def parse(text: str, path: Path) -> Policy:
    """site.toml's text, as if it stood at `path`; ContractError lists every problem."""
    policy = types.parse(text, str(path), Policy)
    base = path.resolve().parent
    data = policy.data.within(base)
    model, server = policy.model, policy.server
    cache = base / (policy.performance.cache_folder or "state")
    performance = policy.performance.model_copy(update={"cache_folder": cache})
    if model.folder is not None:
        model = model.model_copy(update={"folder": base / model.folder})
    if server is not None:
        server = server.model_copy(update={"ca": base / server.ca})
    prepare = policy.prepare
    if prepare.deidentify is not None and prepare.deidentify.model is not None:
        found = prepare.deidentify.model_copy(update={"model": base / prepare.deidentify.model})
        prepare = prepare.model_copy(update={"deidentify": found})
    return policy.model_copy(
        update={
            "data": data,
            "model": model,
            "server": server,
            "performance": performance,
            "prepare": prepare,
        }
    )


def permissive_policy(
    contract: Contract,
    name: str,
    data: Path,
    model: Path | None,
    performance: Performance | None = None,
) -> Policy:
    """A policy that permits exactly `contract` and its budget once: for simulations and tests."""
    p, target = contract.privacy, contract.target_of(name)
    budget = Budgets.Budget(epsilon=target.epsilon, delta=target.delta)
    return Policy(
        name=name,
        data=Data(file=data, duplicate_records="keep", key=p.entity.key if p.entity else ()),
        model=Model(folder=model),
        budgets=Budgets(**{p.unit: budget}),
        performance=performance or Performance(),
        permits=Permits(
            contracts=(contract.hash,),
            tasks=(contract.task.kind,),
            max_clip_norm=p.largest_clip_norm,
            min_records=1,
            min_sites=1,
            metrics=contract.metrics,
            min_quorum=1,
            masked_only=contract.secure_aggregation is not None,
            set_changes=1_000_000,
            allow_without_dp=p.mode == "none",
            allow_inexact_clipping=True,
        ),
    )
