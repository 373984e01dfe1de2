"""`silotune sim run`: every variant of a recipe, live progress, a verdict, a table and a report."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import queue
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from silotune.common.contract.contract import Contract
from silotune.common.contract.model import OneHotModel
from silotune.common.data import records
from silotune.common.errors import (
    DataError,
    ErrorCode,
    RefusalError,
    RunError,
    SilotuneError,
    UsageError,
    did_you_mean,
)
from silotune.common.tasks.metrics import METRICS, constant, score
from silotune.common.tokenization import token_lengths
from silotune.common.tokenization.token_lengths import Lengths
from silotune.server.rounds.run import RoundRecord
from silotune.simulations.comparison.duration import Duration, file_of
from silotune.simulations.comparison.options import Options
from silotune.simulations.comparison.progress import Progress
from silotune.simulations.comparison.provenance import _processor, commit
from silotune.simulations.comparison.recipe import Recipe
from silotune.simulations.comparison.summary import summarise
from silotune.simulations.datasets import catalog, split
from silotune.simulations.datasets.split import Split
from silotune.simulations.execution import worker_pool
from silotune.simulations.execution.pool_context import PoolContext
from silotune.simulations.execution.roster_keys import SigningKeys, with_secure_aggregation
from silotune.simulations.execution.variants import (
    MAIN,
    PLAIN,
    Job,
    JobResult,
    Variant,
    main_of,
    variants_of,
)

QUICK = (MAIN, "federated-head", "pooled-no-dp")  # variants of the quick form, as far as there are
PUBLIC = "public-rows"  # of a run's folder: rows for tests, and those to calibrate by
OF_A_RUN = (
    "result.json",
    "variants",
    "split",
    PUBLIC,
    "contract.json",
)  # one of them is in a run's folder


def run(
    recipe: Recipe,
    options: Options,
    folder: Path,
    command: str,
    *,
    quiet: bool = False,
    stderr: bool = False,
) -> dict[str, Any]:
    """Run the recipe, write `folder`/{contract.json,result.json,report.html}; the result. A variant
    whose training diverges is marked in it, a baseline also where it fails otherwise.

    quiet: nothing is shown meanwhile. stderr: what is shown goes to standard error.
    """
    began, given, whole = time.perf_counter(), recipe, recipe.contract
    if options.quick:
        recipe = recipe.quick()
    if options.epsilon is not None:
        recipe = recipe.at(options.epsilon)
    contract, keys = recipe.contract, SigningKeys()
    if options.delta is not None:
        contract = contract.changed(privacy={"delta": options.delta})
    if options.masked and len(contract.sites) >= 3:
        contract, keys = with_secure_aggregation(
            contract, options.insecure_seed, recipe.config.bound
        )
    variants = _chosen(
        variants_of(contract, recipe.config.variants), options.variants, options.quick
    )
    main = main_of(variants)
    quick = _quick_form(main, given) if options.quick else ""
    progress = Progress(recipe.config, main.contracts[0], quiet=quiet, stderr=stderr)
    with _instead_of_older(folder) as older:
        with progress.busy(f"fetching and checking data {recipe.config.title}"):
            (counts, rows, notes), public = _rows(recipe, folder)
        check_figure(recipe.config.metric, contract, public)
        model_folder = None
        if not isinstance(contract.model, OneHotModel):
            with progress.busy(f"fetching and checking model {contract.model.name}"):
                model_folder = options.model or catalog.fetch(contract.model.name)
        measured = lengths_of(contract, model_folder, rows)
    notes = (*notes, *([quick] if quick else []), *older)
    processes = options.processes or os.cpu_count() or 1
    jobs = list(_jobs(recipe, options, variants, folder, model_folder, rows, public, keys))
    last_time = file_of(whole, options.performance)
    results, seconds = _results(
        jobs,
        processes,
        progress,
        folder,
        partial(
            progress.start,
            counts,
            jobs,
            processes,
            notes,
            measured,
            Duration.load(last_time),
        ),
        own_masks=recipe.contract.secure_aggregation is None,
    )
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + sum(
        {r.pid: r.peak_bytes for r in results}.values()
    )
    if not any(r.stopped for r in results):  # what stopped early has not taken its time
        today = datetime.now(UTC).date().isoformat()
        Duration.of(jobs, processes, seconds, memory, today).keep(last_time)
    with progress.busy("checking which differences the test rows can tell"):
        result = summarise(
            contract,
            variants,
            results,
            recipe.config,
            public,
            measured,
            insecure=options.insecure_seed is not None,
        )
    result |= {
        "format": 1,
        "recipe": recipe.name,
        "quick": options.quick,
        "title": recipe.config.title,
        "about": recipe.config.about.strip(),
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": command,
        "commit": commit(),
        "machine": ", ".join(
            [
                f"{os.cpu_count()} cores",
                _processor(),
                *(sorted({r.gpu for r in results if r.gpu}) or ["no GPU used"]),
            ]
        ),
        "seconds": round(time.perf_counter() - began, 1),
        "peak_memory_bytes": memory,
        "versions": {
            name: metadata.version(name)
            for name in ("flwr", "torch", "transformers", "peft", "opacus")
        },
        "contract_sha256": contract.hash,
        "contract_json": json.dumps(contract.model_dump(mode="json"), indent=1, ensure_ascii=False),
        "model": contract.model.model_dump(mode="json"),
        "data": recipe.source | {"sites": counts, "notes": notes},
    }
    if quick:
        result["verdict"]["warnings"].insert(0, quick)
    result["privacy"]["insecure"] = options.insecure_seed is not None
    if options.insecure_seed is not None:
        result["privacy"]["noise"] = f"ChaCha20 from the PUBLIC seed {options.insecure_seed}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "contract.json").write_text(result["contract_json"] + "\n")
    (folder / "result.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    from silotune.server.report.report import write_report

    write_report(result, folder / "report.html")
    progress.finish(result, folder)
    return result


def _rows(recipe: Recipe, folder: Path) -> tuple[Split, Path]:
    """The recipe's rows, with counts of all parts, and the folder of the public ones."""
    found = recipe.rows(folder)
    unknown = set(recipe.contract.weights()) - {str(own["site"]) for own in found.counts}
    if unknown:
        raise RunError(
            f"The data has no rows of: {', '.join(sorted(unknown))}.",
            code=ErrorCode.TOO_FEW_ROWS,
        )
    public = split.calibration(found.folder, recipe.contract, folder / PUBLIC)
    of_site = {own["site"]: own for own in public.counts}
    counts = [own | of_site[own["site"]] for own in found.counts]
    return Split(counts, found.folder, (*found.notes, *public.notes)), public.folder


def _results(
    jobs: list[Job],
    processes: int,
    progress: Progress,
    folder: Path,
    start: Callable[[], None],
    *,
    own_masks: bool,
) -> tuple[list[JobResult], float]:
    """Of all jobs, and how many seconds they took. start: shows the plan, once nothing of it would
    be refused. own_masks: they are the simulation's, the contract has none."""
    waiting = ExitStack()
    waiting.enter_context(progress.busy("checking the plan"))
    began = 0.0

    def checked() -> None:
        nonlocal began
        waiting.close()
        start()
        began = time.perf_counter()

    try:
        return run_jobs(jobs, processes, progress, checked=checked), time.perf_counter() - began
    except KeyboardInterrupt:
        raise KeyboardInterrupt(progress.interrupted(folder)) from None
    except RefusalError as error:
        if error.code == ErrorCode.POLICY_VIOLATED and own_masks:
            raise RefusalError(
                f"{error} The masks are the simulation's: masked=false runs without.",
                code=ErrorCode.POLICY_VIOLATED,
            ) from None
        raise
    finally:
        waiting.close()
        progress.stop()


def _quick_form(main: Variant, recipe: Recipe) -> str:
    """What has to be known of figures of the quick form. main: the variant that is judged; recipe:
    the whole form."""
    known = {v.name: v for v in variants_of(recipe.contract, recipe.config.variants)}
    rounds, whole = main.contracts[0].rounds, known[main.name].contracts[0].rounds
    if rounds == whole:
        return "Quick form, with fewer variants and runs: their spread is not known."
    return (
        f"Quick form, with fewer variants and runs, and {rounds} of {whole} rounds: the figures "
        "are not those of the contract, and the hash is of another one."
    )


def _chosen(variants: list[Variant], names: Sequence[str], quick: bool) -> list[Variant]:
    """The variants that are named; if none is all of them, or those of the quick form. UsageError:
    no such variant."""
    known = [variant.name for variant in variants]
    for name in names:
        if name not in known:
            raise UsageError(
                f"There is no variant '{name}'.{did_you_mean(name, known)} "
                f"Known: {', '.join(known)}."
            )
    if quick and not names:
        names = [name for name in QUICK if name in known]
    return [variant for variant in variants if not names or variant.name in names]


def check_figure(metric: str, contract: Contract, public: Path) -> None:
    """DataError where the rows for tests do not define the figure of the run: an AUC, say, of rows
    that all have the same label."""
    files = split.public_files(public, split.TEST)
    test = [records.read(files[site], contract) for site in contract.weights()]
    labels = [label for found in test for label in found.labels]
    outputs = constant(contract.task, labels)
    if outputs is None:
        return
    queries = [query for found in test for query in found.queries]
    if score(contract.task, outputs, labels, queries)[metric] is None:
        raise DataError(
            f"The {len(labels):,} rows that are held back for tests do not define "
            f"{METRICS[metric]}: column '{contract.task.label_column}' is the same in all of them. "
            "More rows are needed, or others.",
            code=ErrorCode.TOO_FEW_ROWS,
        )


def lengths_of(contract: Contract, model: Path | None, rows: Path) -> Lengths:
    """Of the texts of all rows, those for tests as well."""
    files = [rows / "pooled.csv", *split.public_files(rows, split.TEST).values()]
    if isinstance(contract.model, OneHotModel):
        return Lengths()
    return token_lengths.measure(
        (records.read(file, contract) for file in files),
        contract,
        token_lengths.tokenizer_of(model),
    )


def _jobs(
    recipe: Recipe,
    options: Options,
    variants: list[Variant],
    folder: Path,
    model_folder: Path | None,
    rows: Path,
    public: Path,
    keys: SigningKeys,
) -> Iterator[Job]:
    """The main variant's first run first, so that it can be watched; then the costly ones."""
    config, main = recipe.config, main_of(variants)
    every = options.evaluate_every or config.evaluate_every
    found = []
    for variant in variants:
        if variant.name == PLAIN:
            repeats = 1  # nothing in it is drawn
        elif variant.cheap:
            repeats = options.baseline_repeats or config.baseline_repeats
        else:
            repeats = options.repeats or config.repeats
        for repeat in range(repeats):
            for contract in variant.contracts:
                place = f"{variant.name}-{repeat}"
                if len(variant.contracts) > 1:
                    place += f"-{contract.sites[0].name.replace(' ', '-')}"
                found.append(
                    Job(
                        variant.name,
                        repeat,
                        contract,
                        folder / "variants" / place,
                        model_folder,
                        rows,
                        # One site has nothing to federate; no message needs to travel.
                        federated=len(contract.sites) > 1,
                        evaluate_every=every
                        if variant is main and repeat == 0
                        else contract.rounds,
                        insecure_seed=options.insecure_seed,
                        performance=options.performance,
                        keys=keys,
                        optional=variant is not main,
                        public=public,
                        keeps_outputs=True,
                    )
                )
    yield from sorted(
        found, key=lambda job: (job.variant != main.name or job.repeat > 0, -job.cost)
    )


class Watcher(Protocol):
    """Who is told of the rounds and the ends of jobs."""

    def round(self, variant: str, repeat: int, cost: float, facts: RoundRecord) -> None: ...

    def done(self, result: JobResult) -> None: ...


def run_jobs(
    jobs: list[Job],
    processes: int,
    progress: Watcher,
    *,
    checked: Callable[[], object] | None = None,
) -> list[JobResult]:
    """All jobs over a pool of processes; each loads the base model once. checked: is called before
    the first one, and once it is known that no site would refuse any of them; None: nobody asks."""
    context = PoolContext()
    channel = context.Queue()
    threads = max(1, (os.cpu_count() or 1) // processes)
    results: list[JobResult] = []
    with ProcessPoolExecutor(
        processes, mp_context=context, initializer=worker_pool.start, initargs=(channel, threads)
    ) as executor:
        try:
            if checked is not None:
                distinct = list({job.contract.hash: job for job in jobs}.values())
                parts = [distinct[start::processes] for start in range(processes)]
                for asked in [executor.submit(worker_pool.check, part) for part in parts if part]:
                    asked.result()
                checked()
            pending: set[Future[JobResult]] = {
                executor.submit(worker_pool.work, job) for job in jobs
            }
            while pending:
                done, pending = wait(pending, timeout=0.1)
                _drain(channel, progress)
                for future in done:
                    results.append(future.result())
                    progress.done(results[-1])
        except BaseException as error:
            executor.shutdown(wait=False, cancel_futures=True)
            for child in mp.active_children():
                child.terminate()
            if isinstance(error, SilotuneError):
                _name_settings_as_typed(error)
            raise
    _drain(channel, progress)
    return results


def _name_settings_as_typed(error: SilotuneError) -> None:
    """Without the section that they have in a site's policy (performance.device)."""
    error.args = (re.sub(r"\bperformance\.(?=[a-z])", "", str(error)),)


def _drain(channel: Any, progress: Watcher) -> None:
    while True:
        try:
            variant, repeat, cost, facts = channel.get_nowait()
        except queue.Empty:
            return
        progress.round(variant, repeat, cost, facts)


@contextmanager
def _instead_of_older(folder: Path) -> Iterator[list[str]]:
    """Set an older run aside; where the body fails, it gets its place back. Yields what to say."""
    older = _set_aside(folder)
    try:
        yield [f"the older run in {folder} is now {older}"] if older else []
    except BaseException:
        if older:
            shutil.rmtree(folder, ignore_errors=True)
            older.rename(folder)
        raise


def _set_aside(folder: Path) -> Path | None:
    """Rename an older run out of the way, so that nothing is lost; its new place, if there is
    one. UsageError: what is there is no run."""
    if folder.exists():
        _check_folder(folder)
        if not any(folder.iterdir()):
            return None
        stamp = datetime.fromtimestamp(folder.stat().st_mtime, UTC).strftime("%Y%m%d-%H%M%S")
        name, number = f"{folder.name}-{stamp}", 1
        while folder.with_name(name).exists():  # of the same second
            number += 1
            name = f"{folder.name}-{stamp}-{number}"
        return folder.rename(folder.with_name(name))
    return None


def _check_folder(folder: Path) -> None:
    """UsageError where a new run would move what is no older one."""
    files = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    if files and files.isdisjoint(OF_A_RUN):
        raise UsageError(
            f"{folder} is there and is no run's folder: name a new folder, or an empty one.",
            code=ErrorCode.RUN_FOLDER_UNUSABLE,
        )
