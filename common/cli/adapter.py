"""`silotune adapter`: use what a run has made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from silotune.common.cli.contract import check_ended
from silotune.common.cli.main import emit, reading_options
from silotune.common.cli.options import JSON
from silotune.common.contract import contract as contracts
from silotune.common.errors import DataError, ErrorCode, ProtocolError, UsageError, counted
from silotune.common.model_files.model_source import required
from silotune.common.protocol.tensors import check, load

if TYPE_CHECKING:
    from silotune.common.contract.contract import Contract
    from silotune.common.data.text_decoding import Reading


@click.group()
def adapter() -> None:
    """Use the adapter of a run."""


ADAPTER, MODEL = "adapter.safetensors", "--model FOLDER"
MOST_NAMED = 8  # variants, in an error
_run = click.argument(
    "run",
    type=click.Path(path_type=Path),
    help="The folder of a run, which holds contract.json and adapter.safetensors.",
)
_data = click.argument(
    "data",
    type=click.Path(path_type=Path),
    help="A file of rows: CSV, JSON Lines, Parquet, Excel or CoNLL.",
)
_model = click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="Folder of the base model, if it is no packaged one.",
)


@adapter.command()
@_run
@_data
@_model
@reading_options
@click.option("--order-by", "column", help="Column of the rows' time; else they are in order.")
@click.option(
    "--false-alarms",
    default=0.01,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Bound for each look at a label (ADWIN's delta).",
)
@click.option(
    "--out",
    default=Path("watch"),
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder that the result is written to.",
)
@JSON
def watch(
    run: Path,
    data: Path,
    model: Path | None,
    reading: Reading,
    column: str | None,
    false_alarms: float,
    out: Path,
    as_json: bool,
) -> None:
    """Find out which labels of a stream of rows changed, and when.

    The run's adapter predicts the label of each row of DATA, which needs no labels. What is written
    is computed from the rows without noise: keep the output with the records.

    \b
    $ silotune adapter watch runs/market-sentiment/variants/federated-lora-0 stream.csv
    2,000 rows of stream.csv · 1 change
    earnings  row 1,607: 61% → 30% since row 1,498
    picture  watch/watch.svg
    """
    from silotune.common.data import records
    from silotune.common.inference import drift, label_monitor
    from silotune.common.models import factory as models
    from silotune.common.tasks.calibration import Calibration

    contract = _contract(run)
    label_monitor.check_task(contract)
    table = records.table(data, reading)
    if column:
        table = label_monitor.ordered(table, column)
    inputs = records.unlabelled(table, contract)
    network = models.build(contract, required(contract, model, MODEL))
    calibration = Calibration.read(run, contract.task)
    values = label_monitor.scores_by_tag(
        contract, network, _arrays(run, network), inputs, calibration
    )
    alerts = drift.alerts(values, false_alarms)
    out.mkdir(parents=True, exist_ok=True)
    shares = {label: sum(own) / len(own) for label, own in values.items()}
    result: dict[str, Any] = {
        "contract": contract.hash,
        "rows": len(inputs),
        "shares": shares,
        "alerts": [
            alert._asdict() | {"row": alert.row + 1, "since": alert.since + 1} for alert in alerts
        ],
    }
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    for file in (out / "watch.json", out / "watch.svg"):  # the rows may be private
        file.touch(mode=0o600)
        file.chmod(0o600)
    (out / "watch.json").write_text(text, encoding="utf-8")
    label_monitor.draw(values, alerts, out / "watch.svg")
    wide = max(map(len, values))
    lines = [f"{counted(len(inputs), 'row')} of {data.name} · {counted(len(alerts), 'change')}"]
    lines += [
        f"{a.label:<{wide}}  row {a.row + 1:,}: {a.before:.0%} → {a.after:.0%} since row "
        f"{a.since + 1:,}"
        for a in alerts
    ]
    lines.append(f"picture  {out / 'watch.svg'}")
    emit(result, as_json, "\n".join(lines))


@adapter.command()
@_run
@_data
@click.argument(
    "queries", nargs=-1, required=True, help="Texts to rank the items for, each in quotes."
)
@_model
@reading_options
@click.option(
    "-k",
    default=10,
    show_default=True,
    type=click.IntRange(1),
    help="Number of items to list for each query.",
)
@click.option(
    "--index",
    type=click.Path(path_type=Path),
    help="File that keeps the items' vectors for the next time.",
)
@JSON
def search(
    run: Path,
    data: Path,
    queries: tuple[str, ...],
    model: Path | None,
    reading: Reading,
    k: int,
    index: Path | None,
    as_json: bool,
) -> None:
    """Rank the items of DATA for each of the QUERIES.

    The run is one of a ranking with input.by = "bi". DATA has a column of the items' texts, named
    as in the contract.

    \b
    $ silotune adapter search runs/recommend/variants/federated-lora-0 films.csv "woman, artist"
     1.92  Schindler's List (1993): Drama, War
    """
    from silotune.common.data import records
    from silotune.common.inference.retrieval import Index, check_contract
    from silotune.common.models import factory as models
    from silotune.common.tasks.calibration import Calibration

    contract = _contract(run)
    column = check_contract(contract).second
    items = list(dict.fromkeys(records.column(records.table(data, reading), column)))
    calibration = Calibration.read(run, contract.task)
    network = models.build(contract, required(contract, model, MODEL))
    found = Index(contract, network, _arrays(run, network))
    found.read(items, index)
    results: list[dict[str, Any]] = [
        {"query": query, "items": [{"text": items[f.item], "score": f.score} for f in best]}
        for query, best in zip(queries, found.search(queries, k, calibration), strict=True)
    ]
    lines = []
    for result in results:
        lines += [f"{result['query']}  ({len(items):,} items)"] * (len(queries) > 1)
        lines += [f"{item['score']:5.2f}  {item['text']}" for item in result["items"]]
    emit(results, as_json, "\n".join(lines))


@adapter.command()
@_run
@_data
@_model
@reading_options
@click.option(
    "--rows",
    type=click.IntRange(1),
    help="Number of rows to answer, from the first; all if absent.",
)
@click.option(
    "--most",
    default=64,
    show_default=True,
    type=click.IntRange(1),
    help="Largest number of tokens of an answer.",
)
@JSON
def answer(
    run: Path,
    data: Path,
    model: Path | None,
    reading: Reading,
    rows: int | None,
    most: int,
    as_json: bool,
) -> None:
    """Answer each row of DATA with the adapter of a language model.

    Decoding is greedy. Where DATA has answers, too, these are compared: ROUGE-1 and ROUGE-L (Lin
    2004), exact matches.

    \b
    $ silotune adapter answer runs/service-answers/variants/federated-lora-0 questions.csv --rows 5
    """
    from silotune.common.data import records
    from silotune.common.models import factory as models
    from silotune.common.models.causal_lm import LanguageModel
    from silotune.common.tasks.rouge import require_rouge, rouge

    contract = _contract(run)
    if contract.task.kind != "language":
        raise UsageError(f"'{contract.name}' is a task of {contract.task.kind}: it has no answers.")
    table, label = records.table(data, reading), contract.task.label_column
    prompts = records.column(table, contract.columns[0])[:rows]
    wanted = records.column(table, label)[:rows] if label in table.header else None
    if wanted:
        require_rouge()  # before minutes of writing
    network = models.build(contract, required(contract, model, MODEL))
    assert isinstance(network, LanguageModel)
    with network.lock:
        network.load(_arrays(run, network))
        answers = [network.answer(prompt, most) for prompt in prompts]
    result: dict[str, Any] = {"answers": answers}
    lines = [f"{prompt}\n  → {found}" for prompt, found in zip(prompts, answers, strict=True)]
    if wanted:
        result["scores"] = rouge(answers, wanted)
        lines.append(
            "  ".join(f"{name} {value:.3f}" for name, value in result["scores"].items())
            + f"  ({len(answers):,} rows)"
        )
    emit(result, as_json, "\n".join(lines))


def _contract(run: Path) -> Contract:
    """The contract of the run; UsageError that names its variants for a folder of `sim run`."""
    check_ended(run)
    variants = [file.parent for file in sorted((run / "variants").glob(f"*/{ADAPTER}"))]
    if variants and not (run / ADAPTER).is_file():
        variants.sort(
            key=lambda variant: not variant.name.startswith("federated")
        )  # what a run is about
        more = ", …" if len(variants) > MOST_NAMED else ""
        named = ", ".join(map(str, variants[:MOST_NAMED]))
        raise UsageError(f"{run} has no adapter of its own, its variants have: {named}{more}.")
    return contracts.load(run / "contract.json")


def _arrays(run: Path, network: Any) -> Any:
    """The run's adapter; DataError unless it is the contract's."""
    file = run / ADAPTER
    arrays = load(file)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.named_tensors().items()}
    try:
        check(arrays, shapes, str(file))
    except ProtocolError as error:
        raise DataError(
            f"{error} The contract beside it asks for another.", code=ErrorCode.HASH_MISMATCH
        ) from None
    return arrays
