"""`silotune contract`: draft one, look at one before agreeing to it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from silotune.common import contract as contracts
from silotune.common.cli import emit
from silotune.common.durable import write_durably
from silotune.common.errors import UsageError
from silotune.common.problems import contract_error


@click.group()
def contract() -> None:
    """Draft, show or validate a contract."""


@contract.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the canonical form as JSON.")
def show(file: Path, as_json: bool) -> None:
    """What a contract says, and its hash.

    \b
    $ silotune contract show heart.toml
    heart-diagnosis  2ba6e7630193…
    """
    found = contracts.load(file)
    p = found.privacy
    guarantee = (
        f"ε ≤ {p.epsilon:g}, δ = {p.delta:g} per {p.unit} and site (RDP; add or remove one)"
        if p.mode == "dp"
        else "NO differential privacy"
    )
    text = [
        f"{found.name}  {found.hash}",
        f"  privacy  {guarantee}; clip {p.clip_norm:g}",
        f"  rounds   {found.rounds}; quorum {found.quorum} of {len(found.sites)}",
        f"  masks    {found.masks}",
        f"  sites    {', '.join(s.name for s in found.sites)}",
        f"  answers  {found.task.answers}",
        f"  leaves a site: {found.leaves}",
    ]
    data = json.loads(found.model_dump_json()) | {"sha256": found.hash}
    emit(data, as_json, "\n".join(text))


@contract.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", type=click.Path(path_type=Path), help="The folder of its base model.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def validate(file: Path, model: Path | None, as_json: bool) -> None:
    """Check a contract; every problem is listed with its line, exit code 2 if there is any.

    What every site would refuse is found too (exit code 1): a bound that does not fit the noise
    and, with the model's folder (--model, or the cache's of a packaged model), targets and layers
    that the model does not have.
    """
    from silotune.common import contract_validation

    found = contracts.load(file)
    left_out = contract_validation.validate(found, model)
    emit(
        {"valid": True, "sha256": found.hash, "not_checked": left_out}, as_json,
        "\n".join([f"✓ {file.name} is valid  {found.hash}", *(f"  {what}" for what in left_out)]),
    )


@contract.command()
@click.option("--from", "data", required=True, type=click.Path(path_type=Path),
              help="A CSV file; its header is read and nothing else.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new .toml file.")
@click.option("--name", help="Of the contract; the file's if not given.")
@click.option("--task",
              help="classification, multi-label, tokens, regression, ranking or language.")
@click.option("--label", help="The column that holds what is to be learnt.")
@click.option("--labels", help="Its values, or name=value, between commas; entities for tokens; of "
              "a ranking the values that say a pair belongs together.")
@click.option("--others", help="Of a ranking: the values that say it does not.")
@click.option("--pair", nargs=2, metavar="FIRST SECOND", help="Of a ranking: its columns of text.")
@click.option("--query", help="Of a ranking: the column whose equal values are ranked together.")
@click.option("--bounds", nargs=2, type=float, help="Lowest and highest number of a regression.")
@click.option("--log", is_flag=True, help="Learn the logarithm of the number.")
@click.option("--text", help="The column of text.")
@click.option("--column", "columns", multiple=True,
              help="'age: 40, 50, 60' (bin edges) or 'sex: male, female' (values).")
@click.option("--entity", help="The columns that identify a person with several records.")
@click.option("--cap", type=int, default=10, show_default=True, help="Most records of an entity.")
@click.option("--site", "sites", multiple=True, help="Name of a site; once each.")
@click.option("--records", type=int, help="How many records (or entities) a site is to have.")
@click.option("--epsilon", type=float, default=8.0, show_default=True)
@click.option("--delta", type=float, default=1e-4, show_default=True)
@click.option("--masked", is_flag=True, help="Updates leave by secure aggregation.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def new(data: Path, out: Path, as_json: bool, **given: Any) -> None:
    """Draft a contract from a table's header and your answers.

    What is not given is asked for, in a terminal. No value of the table is looked at: labels, bin
    edges and numbers are what the field knows, and whoever gets the contract may know them.

    \b
    $ silotune contract new --from loans.csv --out loans.toml --label status \\
        --labels good,bad --column 'age: 25, 40, 60' --column 'home: rent, own' \\
        --site bank-a --site bank-b --records 2000
    ✓ loans.toml  2 columns, 2 sites  5f1c09aa3b7e…
    """
    from silotune.common import draft

    if out.exists():
        raise UsageError(f"{out} is there already; name a new file.")
    names = draft.header(data)
    answers = _answers(given | {"name": given["name"] or data.stem})
    draft.check_header(names, answers, data.name)
    write_durably(out, draft.draft(answers).encode())
    found = contracts.load(out)
    texts = answers.pair or ((answers.text,) if answers.text else ())
    what = f"{len(texts) or len(answers.columns)} columns"
    emit(
        {"file": str(out), "sha256": found.hash}, as_json,
        f"✓ {out}  {what}, {len(found.sites)} sites  {found.hash[:12]}…\n"
        f"Look at edges, values and numbers: all of it is public.\n"
        f"next:  silotune sim run {out} data={data}",
    )


def _answers(given: dict[str, Any]) -> Any:
    """The answers, asked for where they are missing and somebody is there. UsageError."""
    from silotune.common.draft import Answers, Column

    asks: list[tuple[str, str]] = [
        ("task", "Task (classification, multi-label, tokens, regression, ranking, language)"),
        ("label", "Which column holds it"),
        ("records", "How many records a site is to have, roughly"),
    ]
    if given["task"] not in ("regression", "language"):
        asks.insert(2, ("labels", "Its labels, between commas"))
    missing = [key for key, _ in asks if given[key] is None]
    missing += [key for key in ("sites",) if not given[key]]
    inputs = given["text"] or given["columns"] or given["pair"]
    missing += [] if inputs else ["text or column or pair"]
    if missing and not sys.stdin.isatty():
        raise UsageError("Not given: " + ", ".join(f"--{key}" for key in missing) + ".")
    for key, question in asks:
        if given[key] is None:
            answer: Any = click.prompt(question)
            given[key] = int(answer) if key == "records" and answer.isdigit() else answer
    if not inputs:
        given["text"] = click.prompt("Column of text (empty for a table)", default="") or None
        while given["text"] is None:
            answer = click.prompt("A column, as 'age: 40, 60' or 'sex: m, f' (empty: done)",
                                  default="")
            if not answer:
                break
            given["columns"] = [*given["columns"], answer]
    given["sites"] = given["sites"] or _list(click.prompt("Names of the sites, between commas"))
    values = given | {
        "columns": [Column.parse(answer) for answer in given["columns"]],
        "labels": _list(given["labels"]), "entity": _list(given["entity"]),
        "others": _list(given["others"]),
    }
    try:
        return Answers.model_validate({k: v for k, v in values.items() if v is not None})
    except ValidationError as error:
        raise contract_error(error, "the answers", Answers) from None


def _list(words: str | None) -> list[str]:
    return [word.strip() for word in (words or "").split(",") if word.strip()]
