"""`silotune site prepare`: records checked, cleaned and written for the worker, with a report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from silotune.client.cli.options import CONFIG, CONTRACT
from silotune.client.site.commands import on_site
from silotune.common.cli.main import command, emit, next_step
from silotune.common.config.types import as_toml
from silotune.common.contract import contract as contracts
from silotune.common.data import sql_source
from silotune.common.errors import DataError, ErrorCode, SilotuneError, UsageError, counted
from silotune.common.runtime.terminal import busy

if TYPE_CHECKING:
    from silotune.client.preparation.cleaning import Prepared
    from silotune.client.preparation.profile import Charged, Counts
    from silotune.client.privacy.ledger import PrivacyLedger
    from silotune.client.records.record_identity import Origin
    from silotune.client.site.folder import SiteFolder
    from silotune.client.site.policy import Data, Policy
    from silotune.common.contract.contract import Contract
    from silotune.common.data.records import Table

MARKS = {"refused": "✗"}  # what was done with rows; all else is a warning


@click.command()
@CONTRACT
@CONFIG
@click.option(
    "--out",
    default=None,
    type=click.Path(path_type=Path),
    help="The folder to write to; 'prepared' beside site.toml.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: counts of private records.")
def prepare(contract: Path, config: Path, out: Path | None, as_json: bool) -> None:
    """Check and clean the records, and write them with a report.

    They are checked against the contract and cleaned by [prepare] in site.toml. Records and report
    stay here; nothing is sent, nothing is spent.

    \b
    $ silotune site prepare heart.toml
      Problem                                       rows  done
    ! column 'chol' is below 1: counts as missing     12  left as they are: rows 4, 9, …
    ! rows repeat an earlier one                       2  dropped: rows 88, 103
    ✓ 226 of 228 rows kept · 226 records, 0 of them charged before
    report    prepared/report.html  (counts of private records: it must not leave this site)
    records   prepared/records.parquet
    next:   set file = "prepared/records.parquet" in [data] of site.toml, then: silotune site sign
    """
    with busy(f"preparing the records of {config}"):
        facts, lines, failure = _prepare(contract, config, out)
    emit(facts, as_json, "\n".join(lines))
    if failure is not None:
        raise failure


def _prepare(
    contract: Path, config: Path, out: Path | None
) -> tuple[dict[str, Any], list[str], SilotuneError | None]:
    """Facts and lines about it, and why nothing was prepared if that is so."""
    from silotune.client.preparation import cleaning, profile
    from silotune.client.preparation import report as prepare_report
    from silotune.client.privacy.keys import make_private_folder
    from silotune.client.site import policy as policies
    from silotune.client.site.folder import SiteFolder
    from silotune.common.data.text_decoding import stem_of
    from silotune.common.runtime.atomic_files import write_durably

    agreed, site = contracts.load(contract), SiteFolder.at(config)
    policy = policies.load(config)
    again = on_site(config, "prepare", contract)
    data, folder = policy.data, out or site.folder / "prepared"
    file = folder / f"{stem_of(data.file) if data.file else policy.name}.parquet"
    report = folder / "report.html"
    _keep_what_is_there(data, file, report, command(*again, "--out", "FOLDER"))
    ledger = _ledger(site)
    pseudonyms = ledger.identity.pseudonyms_key if ledger else None
    raw = data.table()
    prepared = cleaning.prepare(raw, agreed, policy.prepare, data.key, pseudonyms)
    found = profile.count(prepared.table, agreed, policy.model.folder)
    secret = ledger.identity.fingerprint_key if ledger else bytes(32)
    origin = cleaning.origin(prepared, data.key, secret)
    charged = profile.charged(prepared.table, data.key, ledger, origin.links)
    warnings = prepared.warnings + _of_other_columns(ledger, origin, site)
    shown = {
        "site": policy.name,
        "contract": agreed.name,
        "hash": agreed.hash,
        "source": data.source,
        "file": str(file),
        "key": data.key,
        "notes": (*raw.notes, *warnings),
        "charged": charged,
        "made_up": profile.made_up(agreed),
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "numbering": _numbering(data),
        "rules": ", ".join(_settings(policy.prepare.model_dump(mode="json", exclude_none=True))),
    }
    page = prepare_report.render(shown, prepared, found)
    if not folder.exists():
        make_private_folder(folder)
    write_durably(report, page.encode())
    written = not prepared.refused and found.rows > 0 and ledger is not None
    hindrances: list[str] = []
    if written:
        assert ledger is not None
        # Before the rows are on disk: no prepared row may exist that the ledger does not know.
        ledger.link(origin, source=data.source, rows=found.rows)
        cleaning.write(prepared.table, file)
        hindrances = _hindrances(policy, agreed, prepared.table, ledger, file)
    lines, lengths = _lines(data, raw, prepared, found, charged, warnings), found.lengths
    lines += [f"! `silotune site check` would refuse these rows. {text}" for text in hindrances]
    lines.append(f"report    {report}  (counts of private records: it must not leave this site)")
    if written:
        lines.append(f"records   {file} (0600)")
        where = as_toml(str(site.from_policy(file)))
        instead = "" if data.file else "instead of url and query "
        first = f"set file = {where} {instead}in [data] of {config}, then: "
        sign = next_step(*on_site(config, "sign"), first=first)
        words = (*again, "--out", out) if out else again
        in_policy = (
            f"site.toml needs its owner's signature again: {command(*on_site(config, 'sign'))}"
        )
        prepare_again = next_step(
            *words,
            first="correct what has a !, then: ",
            note=f"after a change, {in_policy}" if hindrances else "",
        )
        lines.append(prepare_again if hindrances or lengths.all_lost else sign)
    facts = {
        "prepared": written,
        "read": prepared.read,
        "kept": found.rows,
        "problems": [asdict(p) for p in prepared.problems],
        "charged": asdict(charged),
        "notes": raw.notes,
        "warnings": warnings,
        "refused_by_check": hindrances,
        "cut": lengths.cut,
        "texts": lengths.texts,
        "entities": lengths.entities,
        "entities_cut": lengths.lost,
        "report": str(report),
        "file": str(file),
    }
    return facts, lines, _failure(data, site, prepared, config, ledger, policy.name)


def _keep_what_is_there(data: Data, file: Path, report: Path, again: str) -> None:
    """UsageError if what is written would stand beside or replace the records that are read, or a
    file that no `site prepare` wrote."""
    folder = file.parent.resolve()
    if data.file is not None and data.file.resolve().parent == folder:
        raise UsageError(
            f"{file.parent} is the folder of {data.file.name}, the records that are read: nothing "
            f"is written there, for it could replace them. Name another folder: {again} If an "
            f"earlier `silotune site prepare` wrote {data.file.name}, set file in [data] to the "
            "records that it was made of."
        )
    if file.exists() and not report.exists():
        raise UsageError(
            f"{file} is there already, and no `silotune site prepare` wrote it. Name another "
            f"folder: {again}"
        )


def _hindrances(
    policy: Policy, contract: Contract, table: Table, ledger: PrivacyLedger, file: Path
) -> list[str]:
    """Why `silotune site check` would refuse the prepared rows, with its own words."""
    from silotune.client.records import record_ids
    from silotune.client.site.policy import Data

    data = Data(file=file, key=policy.data.key, duplicate_records=policy.data.duplicate_records)
    judged = policy.model_copy(update={"data": data})
    found = record_ids.of_table(table, data.key, ledger.identity.fingerprint_key)
    return [
        f"{problem} {problem.local}".strip()
        for problem in judged.problems_of_records(found, contract.privacy.unit, ledger)
    ]


def _failure(
    data: Data,
    site: SiteFolder,
    prepared: Prepared,
    config: Path,
    ledger: PrivacyLedger | None,
    name: str,
) -> SilotuneError | None:
    """Why nothing was prepared."""
    if refused := prepared.refused:
        remedies = "; ".join(f"{problem.sentence}: {problem.remedy}" for problem in refused)
        return DataError(
            f"{data.source} has {counted(len(refused), 'kind')} of problem: nothing was prepared. "
            f"{remedies}. [prepare] is in {config}.",
            code=ErrorCode.RECORDS_NOT_PREPARED,
        )
    if not len(prepared.table.rows):
        return DataError(
            f"No row of {data.source} is left; nothing was prepared. Correct the rows, or "
            f"[prepare] in {config}, which left them out.",
            code=ErrorCode.TOO_FEW_ROWS,
        )
    if ledger is None:
        made = command("site", "init", "--name", name, "--folder", "FOLDER")
        return UsageError(
            f"Nothing was prepared: {site.keys} does not exist, and only this site's ledger can "
            "remember which record a prepared row is. Make keys, ledger and site.toml in a new "
            f"folder, and copy [data] and [prepare] into that site.toml: {made}",
            code=ErrorCode.KEY_UNUSABLE,
        )
    return None


def _settings(found: dict[str, Any], before: str = "") -> Iterator[str]:
    """Settings as they can stand in [prepare] of site.toml, one a member."""
    for key, value in found.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{before}{key}.")
        else:
            yield f"{before}{key} = {as_toml(value)}"


def _of_other_columns(ledger: PrivacyLedger | None, origin: Origin, site: SiteFolder) -> list[str]:
    """A warning where records are known that this preparation can make count as spent."""
    charges = ledger.record_sets().values() if ledger else ()
    sources = dict.fromkeys(one.source for one in charges if one.basis not in origin.links)
    if not sources or not origin.changed:
        return []
    return [
        f"cells of column{'s' * (len(origin.changed) > 1)} {', '.join(map(repr, origin.changed))} "
        "change here, and this ledger has charges on records of other columns or of another key "
        f"({', '.join(sources)}): new records of theirs that have a cell equal to a changed one, "
        f"such as an empty one, will count as spent; name data.key in {site.config}, the columns "
        "that identify a record, the same ones from the first use"
    ]


def _lines(
    data: Data,
    raw: Table,
    prepared: Prepared,
    found: Counts,
    charged: Charged,
    warnings: Sequence[str],
) -> list[str]:
    """The problems, and what is kept."""
    lines = []
    wide = max((len(p.sentence) for p in prepared.problems), default=0)
    if prepared.problems:
        lines.append(f"  {'Problem':<{wide}}     rows  done")
    for p in prepared.problems:
        mark = MARKS.get(p.done, "!")
        lines.append(f"{mark} {p.sentence:<{wide}}  {p.count:>7,}  {p.done}: {p.places}")
    lines += [f"! {note}" for note in (*raw.notes, *warnings)]
    if data.query and not sql_source.ordered(data.query):
        lines.append("! the query has no ORDER BY: row numbers may change when it is read again")
    refused = prepared.refused
    before = "no ledger yet" if charged.before is None else f"{charged.before:,} charged before"
    lines.append(
        f"{'✗' if refused else '✓'} {found.rows:,} of {prepared.read:,} rows "
        f"{'fit' if refused else 'kept'} · {charged.records:,} records, {before}"
    )
    lengths = found.lengths
    if lengths.texts:
        lines.append(f"{'!' if lengths.cut else '✓'} {lengths.sentence}")
    return lines


def _ledger(site: SiteFolder) -> PrivacyLedger | None:
    """This site's ledger, verified; None before `site init`."""
    from silotune.client.privacy.keys import Keys
    from silotune.client.privacy.ledger import PrivacyLedger

    return PrivacyLedger.open(site.state, Keys.load(site.keys)) if site.keys.is_dir() else None


def _numbering(data: Data) -> str:
    """What a row's number counts."""
    if data.file is None:
        return "the rows of the query's result, from 1, in the order of that reading"
    suffix = data.file.suffix.lower()
    if suffix == ".parquet":
        return "its rows, from 1"
    if suffix == ".xlsx":
        return "the row of the sheet"
    return "the line of the file on which the row starts"
