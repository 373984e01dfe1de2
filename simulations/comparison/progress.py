"""What a person sees while a recipe runs: a line a round, and one live line for the rest."""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from silotune.client.privacy.accountant import EXACT
from silotune.common.cli.main import next_step
from silotune.common.contract.contract import Contract
from silotune.common.contract.head_facts import forecast_sentences
from silotune.common.contract.inputs import PairInput
from silotune.common.contract.model import OneHotModel
from silotune.common.contract.privacy import epsilon_text
from silotune.common.errors import counted
from silotune.common.model_files.model_source import folder_of
from silotune.common.runtime.terminal import escaped
from silotune.common.tasks.metrics import METRICS
from silotune.common.tokenization.token_lengths import Lengths
from silotune.server.report.formatting import MARKS
from silotune.server.rounds.run import RoundRecord
from silotune.simulations.comparison.duration import Duration, clock
from silotune.simulations.datasets.split import TEST
from silotune.simulations.execution.variants import PLAIN, Job, JobResult
from silotune.simulations.recipes.recipe_config import RecipeConfig

BAR = 12
# What the main run must have done before its rounds say how long the rest takes: seconds, share.
LEAST_SECONDS, LEAST_SHARE = 5.0, 0.05
WIDE = 80  # columns of what is no terminal and does not say by COLUMNS how many it has
# What uses the adapter of a task: a verb of `silotune adapter`, the package that it needs, and the
# extra that has it.
USES = {
    **dict.fromkeys(("classification", "multi-label", "regression"), ("watch", "river", "monitor")),
    "ranking": ("search", "", ""),
    "language": ("answer", "rouge_score", "llm"),
}
NEXT, NOTE = "next:   ", "   ("  # how a `next:` line begins, and what comes behind its command
GAP, SHORTEST_NAME = 2, 16  # characters between columns; of a name, before it takes several lines
MEASURING = Console()
Columns = list[tuple[str, list[str]]]  # a title and a cell for each row


class EscapingConsole(Console):
    """A console on which text is text: no markup, and no control sequence but rich's own."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else escaped(segment.text)
            yield segment._replace(text=text)


class Progress:
    """Prints to the terminal; on anything else the same lines without the live one."""

    def __init__(
        self,
        config: RecipeConfig,
        contract: Contract,
        *,
        quiet: bool = False,
        stderr: bool = False,
    ) -> None:
        self.config, self.contract = config, contract
        self.console = EscapingConsole(
            highlight=False,
            markup=False,
            soft_wrap=True,
            quiet=quiet,
            stderr=stderr,
            force_jupyter=False,
        )
        if not self.console.is_terminal and not os.environ.get("COLUMNS", "").isdecimal():
            self.console.width = WIDE
        self._live: Live | None = None
        self._jobs: list[Job] = []
        self._insecure = False  # the noise is from a seed that is known
        self._main: tuple[str, int] | None = None
        self._cost_done = self._cost_all = 0.0
        # Of the runs that the rate is taken from: all of their cost, that of their rounds after the
        # first, which ends the loading of models, when that was, and how long these took.
        self._rated_all = self._rated = self._rated_seconds = 0.0
        self._rated_began: float | None = None
        self._at_a_time = 1
        self._last_time = 0.0
        self._started = time.monotonic()
        self._finished = 0

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Show that something of unknown length goes on; in a file or a pipe as a line."""
        if not self.console.is_terminal:
            self._entry("", what)
        with self.console.status(what):
            yield

    def start(
        self,
        counts: list[dict[str, Any]],
        jobs: list[Job],
        processes: int,
        notes: tuple[str, ...] = (),
        lengths: Lengths = Lengths(),  # noqa: B008 - frozen
        last_time: Duration | None = None,
    ) -> None:
        """The header: model, data, what is to be said of the data, plan, and how long it takes by
        the last comparison like it."""
        c, say, entry = self.contract, self.console.print, self._entry
        self._insecure = jobs[0].insecure_seed is not None
        records = sum(n for own in counts for n in own.values() if isinstance(n, int))
        where = f"{os.cpu_count()} cores, device {jobs[0].performance.device}"
        entry("", f"Silotune · {where} · nothing keeps running afterwards")
        model = "one-hot public bins"
        if not isinstance(c.model, OneHotModel):
            model = f"{c.model.name} (sha256 {c.model.sha256[:4]}…)"
        entry("Model  ", model)
        entry("Data   ", f"{self.config.title}, {records:,} records")
        for note in (*notes, *([lengths.sentence] if lengths.cut else [])):
            entry("       ", note)
        p = c.privacy
        lora = f"{c.adapter.words} · " if c.adapter else ""
        entry(
            "Plan   ",
            f"{c.rounds} rounds · {lora}"
            + (
                f"unit: one {p.unit} · "
                f"each site ε ≤ {epsilon_text(p.epsilon)}, δ = {p.delta:g} ({EXACT})"
                if p.mode == "dp" and not self._insecure
                else "no differential privacy"
            ),
        )
        if p.mode == "dp" and not self._insecure and c.own_targets:
            entry("       ", f"but {c.own_targets} ({EXACT})")
        for warning in c.delta_warnings:
            entry("     ! ", warning)
        for sentence in forecast_sentences(c):
            entry("     " if sentence.startswith("!") else "       ", sentence)
        if c.secure_aggregation:
            entry("       ", f"updates masked: the server sees sums of at least {c.quorum} sites")
        entry(
            "       ",
            f"{counted(len(jobs), 'run')} to compare "
            f"{counted(len({j.variant for j in jobs}), 'variant')}, "
            f"{processes} at a time",
        )
        entry(
            "       ",
            f"about {clock(last_time.seconds(jobs, processes))} and "
            f"{last_time.memory / 2**30:.1f} GB of memory, measured on this machine on "
            f"{last_time.date}"
            if last_time
            else "first run on this machine: its first rounds show how long it takes",
        )
        if self._insecure:
            say("insecure_seed: the noise can be removed. For tests only.", style="bold red")
        say("")
        tested = "(public test)" if self.config.table else "(held-out)"
        say(
            f"Round  sites  loss   {self._metric_label():<8} {tested:<13}  "
            f"ε of {epsilon_text(c.largest_target.epsilon)}           left"
        )
        self._jobs, first = jobs, (jobs[0].variant, jobs[0].repeat)
        # Of sites by themselves there are several, whose rounds would be mixed.
        if sum((job.variant, job.repeat) == first for job in jobs) == 1:
            self._main = first
        self._cost_all = self._rated_all = sum(job.cost for job in jobs)
        if self._main:
            self._rated_all, self._at_a_time = jobs[0].cost, min(processes, len(jobs))
        self._last_time = last_time.seconds(jobs, processes) if last_time else 0.0
        self._started = time.monotonic()
        if self.console.is_terminal:
            self._live = Live(
                get_renderable=self._status,
                console=self.console,
                transient=True,
                refresh_per_second=4,
            )
            self._live.start(refresh=True)

    def round(self, variant: str, repeat: int, cost: float, facts: RoundRecord) -> None:
        """One committed round of any run; those of the main run become lines."""
        known = self._measured
        self._cost_done += cost
        if self._main in (None, (variant, repeat)):
            if self._rated_began is None:
                self._rated_began = time.monotonic()
            else:
                self._rated += cost
                self._rated_seconds = time.monotonic() - self._rated_began
        if not known and self._left() and self._measured and not self.console.is_terminal:
            self._entry("       ", f"about {self._left()} left, measured by the first rounds")
        if (variant, repeat) == self._main:
            self.console.print(self._line(facts))
            if facts.failed:
                self._entry("         ", f"without {', '.join(facts.failed)}")

    def done(self, result: JobResult) -> None:
        self._finished += 1
        self._cost_done += self._cost_without_rounds(result)
        if result.stopped:
            self._entry(
                f"{result.stopped.word}: ",
                f"{result.variant}, repeat {result.repeat + 1}, {result.stopped.why}",
            )
        if not self.console.is_terminal:
            self._entry(
                f"done {self._finished}/{len(self._jobs)}: ",
                f"{result.variant}, repeat {result.repeat + 1}, {', '.join(result.sites)} "
                f"({result.seconds:.0f} s)",
            )

    def _cost_without_rounds(self, result: JobResult) -> float:
        """Of a run that has ended: what was planned beyond its rounds, which is all of one without
        rounds and the rest of one that stopped."""
        asked = (result.variant, result.repeat, result.sites)
        of_job = next(
            job
            for job in self._jobs
            if (job.variant, job.repeat, tuple(site.name for site in job.contract.sites)) == asked
        )
        return of_job.cost - sum(of_job.cost_of(facts.round) for facts in result.rounds)

    def finish(self, result: dict[str, Any], folder: Path) -> None:
        """The verdict, the table, where the report is and what to do next."""
        if self._live:
            self._live.stop()
        say = self.console.print
        say("")
        verdict = result["verdict"]
        self._entry("RESULT  ", verdict["headline"])
        for item in verdict["checklist"]:
            self._entry(f"  {MARKS[item['status']]} ", f"{item['label']}: {item['detail']}")
        for line in verdict["lines"]:
            self._entry("  ", line)
        for line in result["verdict"]["warnings"]:
            self._entry("  Warning: ", line)
        say("")
        for table in result_tables(result, self.console.width):
            say(table, soft_wrap=False)
            say("")
        stopped = any(variant["main"] and variant["stopped"] for variant in result["variants"])
        memory = result["peak_memory_bytes"] / 2**30
        say(f"{result['seconds']:.0f} s · {memory:.1f} GB memory")
        say(f"report  {folder / 'report.html'}")
        if not stopped and self._jobs and (line := adapter_step(self._jobs[0])):
            say(folded_step(line, self.console.width))
        say(folded_step(next_step("contract", "show", folder), self.console.width))

    def stop(self) -> None:
        """Give the terminal back, whatever happened."""
        if self._live:
            self._live.stop()

    def interrupted(self, folder: Path) -> str:
        """What is left of a run that was stopped, in sentences; "" before it began."""
        if not self._jobs:
            return ""
        return (
            f"Stopped: {self._finished} of {counted(len(self._jobs), 'run')} were done, and "
            "their comparison is lost: a new `silotune sim run` begins again. What they wrote is "
            f"in {folder / 'variants'}."
        )

    def _entry(self, label: str, text: str) -> None:
        """A label and sentences, in lines that the console holds."""
        self.console.print(folded(label, text, self.console.width))

    def _metric_label(self) -> str:
        return METRICS[self.config.metric]

    def _line(self, facts: RoundRecord) -> str:
        total = self.contract.rounds
        metric = facts.metrics.get(self.config.metric)
        loss = facts.metrics.get("loss")
        spent = max((e for e in facts.epsilon.values() if e is not None), default=None)
        budget = self.contract.largest_target.epsilon
        if self._insecure:
            spent = math.inf
        shown = "–" if spent is None else "∞" if self._insecure else epsilon_text(spent)
        filled = 0 if spent is None or self._insecure else min(BAR, round(BAR * spent / budget))
        return (
            f"{facts.round:>3}/{total:<3} {len(facts.sites):>2}/{len(self.contract.sites):<2}  "
            f"{_number(loss, 2):>5}   {_number(metric, 3):>7}                "
            f"{shown:>5} {'█' * filled}{'░' * (BAR - filled)} {self._left():>7}"
        )

    @property
    def _measured(self) -> bool:
        """Whether there is a rate. Where there is a main run it is that of its rounds: those of a
        cheap variant beside it say nothing of the others."""
        enough = self._rated >= LEAST_SHARE * self._rated_all
        return enough and self._rated_seconds >= LEAST_SECONDS

    def _left(self) -> str:
        """By the rate, and before there is one by the last comparison like this; else ""."""
        if self._measured:
            rest = (self._cost_all - self._cost_done) / self._at_a_time
            return clock(self._rated_seconds / self._rated * rest)
        left = self._last_time - (time.monotonic() - self._started)
        return clock(left) if left > 0 else ""

    def _status(self) -> Text:
        """The live line, as it is now."""
        since = clock(time.monotonic() - self._started)
        if not self._cost_done:
            return Text(f"starting {counted(len(self._jobs), 'run')}, {since}")
        left = self._left()
        return Text(
            f"comparing: {self._finished} of {counted(len(self._jobs), 'run')} done, "
            f"{100 * self._cost_done / self._cost_all:.0f} %, {since} so far"
            + (f", {left} left" if left else "")
        )


def adapter_step(job: Job) -> str:
    """The line that uses a run's adapter on rows that it was tested by; "" if no command does."""
    if job.variant == PLAIN:
        return ""
    contract, files = job.contract, list(job.public_files(TEST).values())
    verb, package, extra = USES.get(contract.task.kind, ("", "", ""))
    more: list[object] = []
    if verb == "search":
        if not isinstance(contract.input, PairInput) or contract.input.by != "bi":
            return ""
        more = ["QUERY"]
    if not verb or not files:
        return ""
    if job.model_folder is not None and folder_of(contract, None) != job.model_folder:
        more += ["--model", job.model_folder]
    missing = package and find_spec(package) is None
    return next_step(
        "adapter",
        verb,
        job.folder,
        files[0],
        *more,
        note=f"needs: pip install 'silotune[{extra}]'" if missing else "",
    )


def folded(label: str, text: str, width: int) -> str:
    """`text` in lines of at most `width` characters: behind a label, and below each other."""
    indent = cell_len(label)
    lines = [line.plain.rstrip() for line in Text(text).wrap(MEASURING, max(width - indent, 1))]
    return "\n".join((" " * indent if place else label) + line for place, line in enumerate(lines))


def folded_step(line: str, width: int) -> str:
    """A `next:` line that can still be pasted into a shell where it takes several lines. Only a
    word that is too long by itself, a path, say, is longer than `width`."""
    if cell_len(line) <= width:
        return line
    step, _, note = line.partition(NOTE)
    first, *words = map(shlex.quote, shlex.split(step.removeprefix(NEXT)))
    lines = [NEXT + first]
    for word in words:
        if cell_len(f"{lines[-1]} {word} \\") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(" " * len(NEXT) + word)
    return " \\\n".join(lines) + (f"\n{' ' * len(NEXT)}({note}" if note else "")


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _pm(variant: dict[str, Any], found: dict[str, Any] | None) -> str:
    """A figure of a variant in a table's cell: with its spread, if there are several runs."""
    if variant["stopped"]:
        return str(variant["stopped"]["word"])
    if not found:
        return "–"
    return f"{found['mean']:.3f}" + (f" ±{found['sd']:.3f}" if variant["repeats"] > 1 else "")


def result_tables(result: dict[str, Any], width: int) -> list[Table]:
    """The figures of a result, none of them broken over two lines.

    One table if `width` characters hold it: a row for each variant, a column for each site.
    Otherwise one of the variants without sites, and one with a row for each site and a column for
    each variant; each in as many parts as it takes.
    """
    metric, variants = result["metric"], result["variants"]
    sites = [s["site"] for s in result["privacy"]["sites"]]
    labels, bold = (
        [variant["label"] for variant in variants],
        {i for i, variant in enumerate(variants) if variant["main"]},
    )
    overall: Columns = [
        (
            f"{metric['label']}, all",
            [_pm(a, a["metrics"][metric["name"]]) for a in variants],
        ),
        ("mean of sites", [_pm(a, a["sites_mean"]) for a in variants]),
    ]
    of_sites: Columns = [(site, [_pm(a, a["sites"][site]) for a in variants]) for site in sites]
    cost: Columns = [
        (
            "ε (δ)",
            [_guarantee(a, insecure=result["privacy"].get("insecure", False)) for a in variants],
        ),
        ("kB up", [_kilobytes(a["bytes_up"]) for a in variants]),
        ("kB down", [_kilobytes(a["bytes_down"]) for a in variants]),
        ("seconds", [f"{a['seconds']:.0f}" for a in variants]),
    ]
    whole = [*overall, *of_sites, *cost]
    if not sites or sum(_width(column) for column in [("Variant", labels), *whole]) - GAP <= width:
        return _parts("Variant", labels, whole, width, bold)
    of_variants: Columns = [
        (label, [cells[place] for _, cells in of_sites]) for place, label in enumerate(labels)
    ]
    return [
        *_parts("Variant", labels, [*overall, *cost], width, bold),
        *_parts("Site", sites, of_variants, width, set()),
    ]


def _guarantee(variant: dict[str, Any], *, insecure: bool) -> str:
    """ε and δ in a table's cell; noise from a known seed gives no guarantee."""
    if variant["epsilon"]:
        return "∞" if insecure else f"{variant['epsilon']:g} ({variant['delta']:g})"
    return "–" if variant["private"] else "∞"


def _parts(
    head: str,
    rows: Sequence[str],
    columns: Columns,
    width: int,
    bold: Collection[int],
) -> list[Table]:
    """Tables of named rows, each with as many of the columns as `width` holds. Names and titles
    may take several lines, cells do not."""
    longest = max(cell_len(text) for text in (head, *rows))
    least = min(longest, SHORTEST_NAME)
    narrow = [_narrowest(title, cells) for title, cells in columns]

    def dealt(most: int) -> list[list[int]]:
        """The columns of each part."""
        parts: list[list[int]] = [[]]
        for place, own in enumerate(narrow):
            used = least + sum(narrow[other] + GAP for other in parts[-1])
            if parts[-1] and (len(parts[-1]) == most or used + own + GAP > width):
                parts.append([])
            parts[-1].append(place)
        return parts

    most = math.ceil(len(columns) / len(dealt(len(columns))))  # parts of about one size
    tables = []
    for part in dealt(most):
        left = width - sum(narrow[place] + GAP for place in part)
        spare = max(left - longest, 0)  # to titles, if all names have their one line
        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
        table.add_column(head, width=max(min(longest, left), 1), overflow="fold")
        for place in part:
            title, own = columns[place][0], narrow[place]
            more = min(spare, max(cell_len(title) - own, 0))
            spare -= more
            lines = [line.plain.rstrip() for line in Text(title).wrap(MEASURING, own + more)]
            table.add_column(Text("\n".join(lines)), justify="right", no_wrap=True, min_width=own)
        for row, name in enumerate(rows):
            cells = [Text(columns[place][1][row]) for place in part]
            table.add_row(Text(name), *cells, style="bold" if row in bold else None)
        tables.append(table)
    return tables


def _width(column: tuple[str, Sequence[str]]) -> int:
    """Of a column on one line, with its gap."""
    return max(cell_len(text) for text in (column[0], *column[1])) + GAP


def _narrowest(title: str, cells: Sequence[str]) -> int:
    """The width of a column whose title has a word a line, unless a word is longer than any name
    needs to be."""
    words = [min(cell_len(word), SHORTEST_NAME) for word in title.split()]
    return max([*words, *map(cell_len, cells), 1])


def _kilobytes(size: float | None) -> str:
    return f"{size / 1000:,.0f}" if size else "–"
