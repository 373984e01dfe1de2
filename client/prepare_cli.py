"""`silotune site prepare`: records checked, cleaned and written for the worker, with a report."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from silotune.common import contract as contracts
from silotune.common import query
from silotune.common.cli import emit, next_step
from silotune.common.errors import DataError, UsageError

if TYPE_CHECKING:
    from silotune.client.counts import Charged, Counts
    from silotune.client.ledger import Ledger
    from silotune.client.policy import Data
    from silotune.client.prepare import Prepared
    from silotune.client.site import Site
    from silotune.common.records import Table

MARKS = {"refused": "✗"}  # what was done with rows; all else is a warning


@click.command()
@click.argument("contract", type=click.Path(path_type=Path))
@click.option("--config", default="site.toml", type=click.Path(path_type=Path),
              help="The site's policy.")
@click.option("--out", default=None, type=click.Path(path_type=Path),
              help="The folder to write to; 'prepared' beside site.toml.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: counts of private records.")
def prepare(contract: Path, config: Path, out: Path | None, as_json: bool) -> None:
    """Check all records against a contract, clean them by [prepare] in site.toml, and write them
    with a report. Both stay here; nothing is sent, nothing is spent.

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
    from silotune.client import counts, prepare_report
    from silotune.client import policy as policies
    from silotune.client import prepare as preparing
    from silotune.client.keys import make_private_folder
    from silotune.client.site import Site
    from silotune.common.durable import write_durably
    from silotune.common.reading import stem_of

    agreed, policy, site = contracts.load(contract), policies.load(config), Site(config)
    ledger = _ledger(site)
    data, folder = policy.data, out or site.folder / "prepared"
    file = folder / f"{stem_of(data.file) if data.file else policy.name}.parquet"
    pseudonyms = ledger.pseudonyms_key if ledger else None
    raw = data.table()
    prepared = preparing.prepare(raw, agreed, policy.prepare, data.key, pseudonyms)
    found = counts.count(prepared.table, agreed, policy.model.folder)
    secret = ledger.fingerprint_key if ledger else bytes(32)
    origin = preparing.origin(prepared, data.key, secret)
    charged = counts.charged(prepared.table, data.key, ledger, origin.links)
    facts = {
        "site": policy.name, "contract": agreed.name, "hash": agreed.hash, "source": data.source,
        "file": str(file), "key": data.key, "notes": raw.notes, "charged": charged,
        "made_up": counts.made_up(agreed),
        "when": time.strftime("%Y-%m-%d %H:%M"), "numbering": _numbering(data),
        "rules": ", ".join(f"{k} = {v}".lower() for k, v in policy.prepare.model_dump().items()),
    }
    page = prepare_report.render(facts, prepared, found)
    if not folder.exists():
        make_private_folder(folder)
    report = folder / "report.html"
    write_durably(report, page.encode())
    written = not prepared.refused and found.rows > 0 and ledger is not None
    if written:
        assert ledger is not None
        # Before the rows are on disk: no prepared row may exist that the ledger does not know.
        ledger.link(origin, source=data.source, rows=found.rows)
        preparing.write(prepared.table, file)
    lines, lengths = _lines(data, raw, prepared, found, charged), found.lengths
    lines.append(f"report    {report}  (counts of private records: it must not leave this site)")
    if written:
        lines += [
            f"records   {file} (0600)",
            next_step("site", "sign", "--config", config, first=f"set file = \""
                      f"{_from(site.folder, file)}\" in [data] of {config}, then: "),
        ]
    emit(
        {"prepared": written, "read": prepared.read, "kept": found.rows,
         "problems": [asdict(p) for p in prepared.problems], "charged": asdict(charged),
         "notes": raw.notes, "cut": lengths.cut, "texts": lengths.texts,
         "entities": lengths.entities, "entities_cut": lengths.lost,
         "report": str(report), "file": str(file)},
        as_json, "\n".join(lines),
    )
    if refused := prepared.refused:
        raise DataError(
            f"{data.source} has {len(refused)} kind{'s' * (len(refused) != 1)} of problem: nothing "
            "was prepared. Correct the rows, or say in [prepare] of site.toml what to do with them "
            "(outside, missing_target).", code="E313",
        )
    if not found.rows:
        raise DataError(f"No row of {data.source} is left; nothing was prepared.", code="E304")
    if ledger is None:
        raise UsageError(
            f"Nothing was prepared: {site.keys} does not exist, and only this site's ledger can "
            "remember which record a prepared row is. `silotune site init` makes keys, ledger and "
            "site.toml in a new folder; copy [data] and [prepare] into that site.toml.",
            code="E214",
        )


def _lines(
    data: Data, raw: Table, prepared: Prepared, found: Counts, charged: Charged
) -> list[str]:
    """The problems, and what is kept."""
    lines = []
    wide = max((len(p.sentence) for p in prepared.problems), default=0)
    if prepared.problems:
        lines.append(f"  {'Problem':<{wide}}     rows  done")
    for p in prepared.problems:
        mark = MARKS.get(p.done, "!")
        lines.append(f"{mark} {p.sentence:<{wide}}  {p.count:>7,}  {p.done}: {p.places}")
    lines += [f"! {note}" for note in raw.notes]
    if data.query and not query.ordered(data.query):
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


def _ledger(site: Site) -> Ledger | None:
    """This site's ledger, verified; None before `site init`."""
    from silotune.client.keys import Keys
    from silotune.client.ledger import Ledger

    return Ledger.open(site.state, Keys.load(site.keys)) if site.keys.is_dir() else None


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


def _from(folder: Path, file: Path) -> Path:
    """The file's path as site.toml has it: from its own folder on, if it lies there."""
    file = file.resolve()
    return file.relative_to(folder) if file.is_relative_to(folder) else file
