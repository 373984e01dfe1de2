"""`silotune.simulate`: a contract on a table in memory, or a recipe, as `silotune sim run` does."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import ValidationError

from silotune.common.config.diagnostics import contract_error
from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.common.data.text_decoding import Reading
from silotune.common.errors import DataError, UsageError, did_you_mean
from silotune.simulations.comparison.options import Options
from silotune.simulations.comparison.recipe import (
    Recipe,
    load_recipe,
    recipe_of,
    with_baselines,
)
from silotune.simulations.comparison.run import run
from silotune.simulations.comparison.run_result import RunResult
from silotune.simulations.execution.device import check_device
from silotune.simulations.execution.variants import MAIN, trained, variants_of

if TYPE_CHECKING:
    import pandas as pd  # takes a while to import

    Data: TypeAlias = pd.DataFrame | Mapping[str, pd.DataFrame] | str | Path

SITE = "site"  # the column that is added to tables by site, unless they have it


def simulate(
    contract: Contract | Recipe | str,
    data: Data | None = None,
    *,
    site: str | None = None,
    epsilon: float | None = None,
    delta: float | None = None,
    baselines: Sequence[str] | None = None,
    repeats: int | None = None,
    baseline_repeats: int | None = None,
    evaluate_every: int | None = None,
    processes: int | None = None,
    secure_aggregation: bool = True,
    model: str | Path | None = None,
    encoding: str | None = None,
    delimiter: str | None = None,
    compute: Mapping[str, object] | None = None,
    insecure_seed: int | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> RunResult:
    """Run a contract on this machine, with other methods beside it.

    Sites, server and boundary are those of a deployment, in one process for each run; a quarter of
    each site's rows is held back for tests and calibration. Runs work side by side in processes of
    their own, which do not import the calling script: it needs no `__main__` guard.

    Args:
        contract: A contract, a recipe, or the name of a shipped recipe, which has its own data.
        data: The records: a DataFrame, a DataFrame for each site of the contract, or a file.
        site: The column that says of which site a row is. Without it each row, or entity, goes to
            a site drawn by a fixed seed.
        epsilon: Instead of the contract's ε. Of a recipe, learning rates that it has for this ε
            are taken.
        delta: Instead of the contract's δ.
        baselines: The methods to compare with: names of the result's table, or without
            "federated-" and "-no-dp": "alone", "head", "one-hot", "no-dp", "pooled", "plain". None
            for all that the contract allows; an empty list for none.
        repeats: How many runs each method has that trains layers or splits the budget.
        baseline_repeats: How many runs the others have.
        evaluate_every: Rounds between the evaluations of the first run.
        processes: How many runs at a time; as many as there are cores if None.
        secure_aggregation: Whether updates are masked, where there are three sites or more.
        model: The folder of a base model that is not packaged.
        encoding: Of a text file, if it is not UTF-8.
        delimiter: Of a text file, if its header does not show it.
        compute: How to compute, by the keys of [performance]: device, bf16, micro_batch and so on.
        insecure_seed: Makes the noise reproducible, and removable: for tests only.
        folder: Of the run; `runs/` and the name of the contract or recipe if None. An older run
            there is renamed.
        progress: Whether progress and result are shown on standard error.

    Returns:
        Figures, report, adapter and folder of the run.

    Raises:
        UsageError: If an argument is wrong; it says which one, and what is allowed. As a
            ContractError, if the contract does not allow a value.
        DataError: If the records do not fit the contract. What names rows or columns is a note
            of the error, since it may hold what a record says. If the device is not there.
        RefusalError: If every site would refuse the plan.

    Example:
        >>> run = silotune.simulate("heart-diagnosis", epsilon=3, baselines=["head"])
        >>> run.table()[["auc", "auc_sd", "epsilon", "delta"]]
    """
    options = Options(
        epsilon=epsilon,
        delta=delta,
        repeats=_count("repeats", repeats),
        baseline_repeats=_count("baseline_repeats", baseline_repeats),
        evaluate_every=_count("evaluate_every", evaluate_every),
        processes=_count("processes", processes) or 0,
        insecure_seed=insecure_seed,
        masked=secure_aggregation,
        model=None if model is None else Path(model),
        performance=_performance(compute or {}),
    )
    check_device(options.performance)
    reading = Reading.of(encoding, delimiter, "{key}={value!r}")
    with _local_notes(), _recipe(contract, data, site, reading) as recipe:
        options.variants = _variants(recipe, baselines)
        place = Path("runs") / recipe.name if folder is None else Path(folder)
        command = _command(recipe, options, baselines, site, encoding, delimiter)
        content = run(recipe, options, place, command, quiet=not progress, stderr=True)
    return RunResult.of(place, content)


def _count(key: str, value: int | None) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise UsageError(f"'{key}' must be a whole number, got {value!r}.")
    if value is not None and value < 1:
        raise UsageError(f"'{key}' must be at least 1, got {value!r}.")
    return value


def _performance(compute: Mapping[str, object]) -> Performance:
    try:
        return Performance.model_validate(dict(compute))
    except ValidationError as error:
        raise contract_error(error, "compute", Performance) from None


@contextmanager
def _local_notes() -> Iterator[None]:
    """What a DataError tells the records' owner alone, as a note: a traceback shows it."""
    try:
        yield
    except DataError as error:
        if error.local:
            error.add_note(error.local)
        raise


@contextmanager
def _recipe(
    contract: Contract | Recipe | str, data: Data | None, site: str | None, reading: Reading
) -> Iterator[Recipe]:
    """The recipe to run; a table in memory is a file as long as it lasts."""
    if isinstance(contract, Contract):
        if data is None:
            raise UsageError("data is missing: name the contract's records, data=DataFrame.")
        with tempfile.TemporaryDirectory(prefix="silotune-") as place:
            table, site = _table(data, site, contract, Path(place))
            if not isinstance(data, str | Path):
                reading = Reading()  # of the file that was just written
            yield with_baselines(recipe_of(contract, contract.name, table, site, reading))
        return
    if isinstance(contract, str):
        if contract.endswith((".toml", ".json")):
            raise UsageError(f"{contract!r} is a file: read it with Contract.load({contract!r}).")
        contract = load_recipe(contract)
    if not isinstance(contract, Recipe):
        raise UsageError(
            f"contract is a {type(contract).__name__}, and must be a Contract, a Recipe or the "
            "name of a recipe."
        )
    for key, value in (("data", data), ("site", site)):
        if value is not None:
            raise UsageError(
                f"'{key}' goes with a contract, and recipe '{contract.name}' has its own data. "
                f"Leave {key} out."
            )
    yield contract


def _table(
    data: Data, site: str | None, contract: Contract, folder: Path
) -> tuple[Path, str | None]:
    """The file of the records, and its column of sites."""
    if isinstance(data, str | Path):
        if not Path(data).is_file():
            raise UsageError(f"data = {str(data)!r} is no file. Name a file of records.")
        return Path(data), site
    import pandas as pd

    if isinstance(data, Mapping):
        table, site = _joined(data, site, list(contract.weights()))
    elif isinstance(data, pd.DataFrame):
        table = data
    else:
        raise UsageError(
            f"data is a {type(data).__name__}, and must be a DataFrame, a dict with a DataFrame "
            "for each site, or the path of a file."
        )
    if site is not None and site not in table.columns:
        names = [str(name) for name in table.columns]
        raise UsageError(
            f"site = {site!r} is no column of data.{did_you_mean(str(site), names)} "
            f"Known: {', '.join(names[:40])}."
        )
    file = folder / "data.csv"
    table.to_csv(file, index=False, quoting=csv.QUOTE_ALL)
    return file, site


def _joined(
    data: Mapping[str, pd.DataFrame], site: str | None, sites: list[str]
) -> tuple[pd.DataFrame, str]:
    """Tables by site as one, with a column of sites."""
    import pandas as pd

    if site is not None:
        raise UsageError("'site' goes with one table, and data has one for each site.")
    for name, table in data.items():
        if name not in sites:
            raise UsageError(
                f"data has {name!r}, which is no site of the contract."
                f"{did_you_mean(str(name), sites)} Known: {', '.join(sites)}."
            )
        if not isinstance(table, pd.DataFrame):
            raise UsageError(
                f"data[{name!r}] is a {type(table).__name__}, and must be a DataFrame."
            )
    missing = [name for name in sites if name not in data]
    if missing:
        raise UsageError(f"data has no table of: {', '.join(missing)}. Each site needs one.")
    column = SITE
    while any(column in table.columns for table in data.values()):
        column += "_"
    parts = [table.assign(**{column: name}) for name, table in data.items()]
    return pd.concat(parts, ignore_index=True), column


def _variants(recipe: Recipe, baselines: Sequence[str] | None) -> list[str]:
    """The variants that the names mean; no name at all means every variant.

    What the contract itself trains is its own method and no baseline: "head" of a contract without
    an adapter is refused.
    """
    if baselines is None:
        return []
    if isinstance(baselines, str):
        raise UsageError(f"baselines must be a list, got {baselines!r}. Write [{baselines!r}].")
    variants = [
        variant.name
        for variant in variants_of(recipe.contract, recipe.config.variants)
        if variant.name != MAIN
    ]
    known = {_short(name): name for name in variants}
    own = set[str]()
    if recipe.contract.adapter is None:
        own = {"head", "federated-head", trained(recipe.contract)}
    chosen = [MAIN]
    for name in baselines:
        if name == MAIN:
            continue
        if name in own:
            raise UsageError(
                f"baselines has {name!r}, which is the method itself of this contract: leave it "
                f"out. Known: {', '.join(known)}."
            )
        if name not in variants and name not in known:
            raise UsageError(
                f"baselines has {name!r}, which is no method of this contract."
                f"{did_you_mean(str(name), known)} Known: {', '.join(known)}."
            )
        chosen.append(known.get(name, name))
    return chosen


def _short(variant: str) -> str:
    return "pooled" if variant == "pooled-no-dp" else variant.removeprefix("federated-")


def _command(
    recipe: Recipe,
    options: Options,
    baselines: Sequence[str] | None,
    site: str | None,
    encoding: str | None,
    delimiter: str | None,
) -> str:
    """The call as it stands in the report: what can change a figure."""
    given: dict[str, Any] = {
        "site": site,
        "epsilon": options.epsilon,
        "delta": options.delta,
        "baselines": None if baselines is None else list(baselines),
        "repeats": options.repeats,
        "baseline_repeats": options.baseline_repeats,
        "evaluate_every": options.evaluate_every,
        "secure_aggregation": None if options.masked else False,
        "encoding": encoding,
        "delimiter": delimiter,
        "compute": options.performance.model_dump(exclude_defaults=True) or None,
        "insecure_seed": options.insecure_seed,
    }
    words = [repr(recipe.name), *(f"{k}={v!r}" for k, v in given.items() if v is not None)]
    return f"silotune.simulate({', '.join(words)})"
