"""`silotune privacy`: what has been spent, what a plan would cost, and whether the ledger holds."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from silotune.client.cli.options import CONFIG
from silotune.common.cli.main import emit, next_step
from silotune.common.cli.options import JSON
from silotune.common.errors import UsageError, counted
from silotune.common.runtime.terminal import echo


@click.group()
def privacy() -> None:
    """Look at the privacy ledger, or plan a budget."""


@privacy.command()
@CONFIG
@JSON
def spent(config: Path, as_json: bool) -> None:
    """Show what the site's records have spent, file by file.

    \b
    $ silotune privacy spent
    hospital-a · ε ≤ 8, δ = 0.0001 per record over its lifetime, add or remove one
    Records    first used   rows  runs  rounds  ε spent     per         counted by  further plan
    notes.csv  2026-11-22  6,000     1      18     4.90  record  exact composition          2.93
    """
    from silotune.client.privacy.budget import Budget
    from silotune.client.site.folder import SiteFolder

    policy, ledger, _ = SiteFolder.at(config).open()
    limits = policy.limits
    rows: list[dict[str, Any]] = []
    for entry in ledger.record_sets().values():
        budget = Budget(ledger, ledger.record_set(entry), entry.unit)
        # Without a budget for the unit any more: at the one that there is.
        limit = limits.get(entry.unit) or next(iter(limits.values()))
        charges = [c for c in ledger.charges.values() if c.record_set == entry.record_set]
        spent_ = budget.spent(limit.delta)
        rows.append(
            {
                "records": entry.source,
                "record_set": entry.record_set,
                "first_used": entry.at,
                "rows": entry.rows,
                "unit": entry.unit,
                "runs": len({(c.contract, c.run) for c in charges}),
                "rounds": len(charges),
                "not_released": sum(c.sequence not in ledger.releases for c in charges),
                "epsilon": _finite(spent_.epsilon),
                "accountant": spent_.accountant,
                "remaining_epsilon": budget.remaining_epsilon(limit),
            }
        )
    facts = {
        "site": policy.name,
        "adjacency": "add or remove one",
        "limits": {unit: asdict(limit) for unit, limit in limits.items()},
        "record_sets": rows,
    }
    head = f"{policy.name} · {policy.limits_in_words()} over its lifetime, add or remove one"
    if not rows:
        emit(facts, as_json, f"{head}\nNothing was ever charged.")
        return
    titles = (
        "Records",
        "first used",
        "rows",
        "runs",
        "rounds",
        "ε spent",
        "per",
        "counted by",
        "further plan",
    )
    cells: list[tuple[str, ...]] = [
        (
            r["records"],
            _day(r["first_used"]),
            f"{r['rows']:,}",
            str(r["runs"]),
            str(r["rounds"]),
            _shown(r["epsilon"]),
            r["unit"],
            r["accountant"],
            _shown(r["remaining_epsilon"]),
        )
        for r in rows
    ]
    notes = [
        "A file's ε is that of the record in it that has spent most, over every file. The first "
        "plan on these records is counted by exact composition. From a second one on all is "
        "counted by RDP, which gives more, so the room for a further plan is less than the limit "
        "less what is spent."
    ]
    lost = sum(r["not_released"] for r in rows)
    if lost:
        rounds, what = counted(lost, "charged round"), "it counts" if lost == 1 else "they count"
        notes.append(f"{rounds} never left (a crash or a failure); {what}.")
    emit(facts, as_json, "\n".join([head, *_table(titles, cells), *notes]))


@privacy.command()
@click.option(
    "--contract", type=click.Path(path_type=Path), help="Print the privacy plan of this contract."
)
@click.option("--site", help="Whose plan of the contract, where sites differ.")
@click.option("--epsilon", type=float, help="Target: prints the noise it needs.")
@click.option("--noise-multiplier", type=float, help="Noise: prints the epsilon it costs.")
@click.option(
    "--delta",
    type=float,
    default=1e-4,
    show_default=True,
    help="δ of the guarantee, at which ε is computed.",
)
@click.option(
    "--sampling-rate",
    type=float,
    default=1.0,
    show_default=True,
    help="Probability with which a step samples each unit.",
)
@click.option(
    "--steps",
    type=int,
    default=1,
    show_default=True,
    help="Number of noised steps of the whole run.",
)
@JSON
def plan(
    contract: Path | None,
    site: str | None,
    epsilon: float | None,
    noise_multiplier: float | None,
    delta: float,
    sampling_rate: float,
    steps: int,
    as_json: bool,
) -> None:
    """Compute the noise that an epsilon needs, or the reverse.

    \b
    $ silotune privacy plan --epsilon 8 --delta 1e-4 --sampling-rate 0.25 --steps 30
    30 steps, sampling rate 0.25, noise multiplier 1.0300
      ε 8.00 (exact composition) at δ = 0.0001 per record, add or remove one
    """
    from pydantic import TypeAdapter, ValidationError

    from silotune.client.privacy import accountant
    from silotune.client.privacy.accountant import Mechanism
    from silotune.common.config import types
    from silotune.common.contract import contract as contracts
    from silotune.common.contract.privacy import epsilon_text

    source = click.get_current_context().get_parameter_source
    alone = ("epsilon", "noise_multiplier", "delta", "sampling_rate", "steps")
    given = [
        f"--{key.replace('_', '-')}" for key in alone if source(key) != ParameterSource.DEFAULT
    ]
    if contract is not None and given:
        raise UsageError(
            f"--contract has a plan of its own: leave out {', '.join(given)}, or --contract."
        )
    for name, value, kind in (
        ("--epsilon", epsilon, types.Epsilon),
        ("--delta", delta, types.Delta),
        ("--noise-multiplier", noise_multiplier, types.Positive),
        ("--sampling-rate", sampling_rate, types.Rate),
        ("--steps", steps, types.Count),
    ):
        try:
            if value is not None:
                TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            what = error.errors()[0]["msg"].replace("Input should be", "must be")
            raise UsageError(f"{name} {what}, got {value}.") from None
    unit, weights = "record", dict[str, float]()
    if contract is not None:
        found = contracts.load(contract)
        unit = found.privacy.unit
        if found.privacy.mode == "none":
            raise UsageError(f"{contract} trains without differential privacy: ε is infinite.")
        if site is not None and site not in found.weights():
            raise UsageError(
                f"'{site}' is not in the contract's sites: {', '.join(found.weights())}."
            )
        target = found.target_of(site or "")
        delta, mechanisms = target.delta, accountant.plan(found, target)
        if len({found.target_of(name) for name in found.weights()}) > 1:
            weights = accountant.inverse_variance_weights(found)
    elif (epsilon is None) == (noise_multiplier is None):
        raise UsageError("Give --contract, or one of --epsilon and --noise-multiplier.")
    else:
        sigma = noise_multiplier or accountant.noise_for(
            epsilon or 0.0, delta, sampling_rate, steps
        )
        mechanisms = [Mechanism(sigma, sampling_rate, steps)]
    cost = accountant.plan_epsilon(mechanisms, delta)
    shares = accountant.shares(mechanisms, delta)
    facts = {
        "unit": unit,
        "adjacency": "add or remove one",
        "delta": delta,
        "epsilon": cost,
        "accountant": accountant.EXACT,
        "mechanisms": [
            {**m._asdict(), "share": share} for m, share in zip(mechanisms, shares, strict=True)
        ],
        **({"inverse_variance_weights": weights} if weights else {}),
    }
    emit(
        facts,
        as_json,
        "\n".join(
            [
                *(
                    f"{m.steps} steps, sampling rate {m.sampling_rate:g}, noise multiplier "
                    f"{m.noise_multiplier:.4f}"
                    + (f", {100 * share:.0f}% of the budget" if len(shares) > 1 else "")
                    for m, share in zip(mechanisms, shares, strict=True)
                ),
                f"  ε {epsilon_text(cost)} ({accountant.EXACT}) at δ = {delta:g} per {unit}, "
                "add or remove one",
                *(
                    [
                        "  sites' weights with the least noise in the mean: "
                        + ", ".join(f"{name} {weight:.2f}" for name, weight in weights.items())
                    ]
                    if weights
                    else []
                ),
            ]
        ),
    )


@privacy.command()
@click.argument(
    "file",
    required=False,
    type=click.Path(path_type=Path),
    help="An export of a ledger (`silotune privacy export`), instead of the site's own ledger.",
)
@CONFIG
@click.option("--public-key", help="The site's key, as the auditor knows it (with FILE).")
@JSON
def verify(file: Path | None, config: Path, public_key: str | None, as_json: bool) -> None:
    """Verify the chain of the site's ledger, or of an export.

    \b
    $ silotune privacy verify
    ✓ 124 entries: chain, MACs, head, fingerprints and links hold · 60 charges, 59 released
    """
    from silotune.client.privacy.keys import Keys
    from silotune.client.privacy.ledger import PrivacyLedger
    from silotune.client.privacy.ledger_entries import Charged, Released, verify_export
    from silotune.client.site.folder import SiteFolder
    from silotune.common.config import types

    if file is not None:
        lines = types.read_text(file, "Export").splitlines()
        entries = verify_export(lines, public_key)
        what = "chain and signed receipt hold"
        if public_key is None:
            what += " by the key the file names; compare it: --public-key"
    else:
        site = SiteFolder.at(config)
        entries = PrivacyLedger.open(site.state, Keys.load(site.keys)).entries
        what = "chain, MACs, head, fingerprints and links hold"
    charges = sum(isinstance(entry, Charged) for entry in entries)
    released = sum(isinstance(entry, Released) for entry in entries)
    emit(
        {"valid": True, "entries": len(entries), "charges": charges, "released": released},
        as_json,
        f"✓ {counted(len(entries), 'entry', 'entries')}: {what} · {counted(charges, 'charge')}, "
        f"{released} released",
    )


@privacy.command()
@click.argument(
    "file", type=click.Path(path_type=Path), help="The .jsonl file to write, which must not exist."
)
@CONFIG
def export(file: Path, config: Path) -> None:
    """Write the ledger's entries for an auditor.

    They have names of files and numbers of rows, but no record and no fingerprint.

    \b
    $ silotune privacy export ledger.jsonl
    ✓ 124 entries in ledger.jsonl
    next:   silotune privacy verify ledger.jsonl --public-key 5c0e…
    """
    from silotune.client.privacy.keys import Keys
    from silotune.client.privacy.ledger import PrivacyLedger
    from silotune.client.site.folder import SiteFolder
    from silotune.common.runtime.atomic_files import write_durably

    site = SiteFolder.at(config)
    if file.exists():
        raise UsageError(f"{file} is there already. Name a new file.")
    keys = Keys.load(site.keys)
    lines = list(PrivacyLedger.open(site.state, keys).export())
    write_durably(file, ("\n".join(lines) + "\n").encode())
    echo(f"✓ {counted(len(lines) - 2, 'entry', 'entries')} in {file}")
    echo(next_step("privacy", "verify", file, "--public-key", keys.public))


def _finite(value: float) -> float | None:
    """None for infinity, which JSON does not have."""
    return None if math.isinf(value) else value


def _shown(value: float | None) -> str:
    from silotune.common.contract.privacy import epsilon_text

    return "∞" if value is None else epsilon_text(value)


def _day(at: float) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(at, UTC).date().isoformat()


def _table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Text lines; the first two columns to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [titles, *rows]
    ]
