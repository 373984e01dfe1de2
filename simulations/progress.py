"""What a person sees while a recipe runs: a line a round, and one live line for the rest."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from silotune.common.architecture import OneHotModel
from silotune.common.contract import Contract
from silotune.common.lengths import Lengths
from silotune.common.metrics import METRICS
from silotune.server.rounds import RoundFacts
from silotune.simulations.arms import Job, JobResult

BAR = 12


class Progress:
    """Prints to the terminal; on anything else the same lines without the live one."""

    def __init__(self, facts: dict[str, Any], contract: Contract, *, quiet: bool = False) -> None:
        self.facts, self.contract = facts, contract
        self.console = Console(highlight=False, soft_wrap=True, quiet=quiet)
        if not self.console.is_terminal:
            self.console.width = 160
        self._live: Live | None = None
        self._jobs: list[Job] = []
        self._main: tuple[str, int] = ("", 0)
        self._rounds: dict[tuple[str, int], int] = {}
        self._cost_done = self._cost_all = 0.0
        self._began = time.monotonic()
        self._finished = 0

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Show that something of unknown length goes on."""
        with self.console.status(f"fetching and checking {what}"):
            yield

    def start(
        self, counts: list[dict[str, Any]], jobs: list[Job], processes: int,
        notes: tuple[str, ...] = (), lengths: Lengths = Lengths(),  # noqa: B008 - frozen
    ) -> None:
        """The header: model, data, what is to be said of the data, plan."""
        c, say = self.contract, self.console.print
        records = sum(int(k["train"]) + int(k["test"]) for k in counts)
        say(f"Silotune · CPU, {os.cpu_count()} cores · nothing keeps running afterwards")
        model = "one-hot public bins"
        if not isinstance(c.model, OneHotModel):
            model = f"{c.model.name} (sha256 {c.model.sha256[:4]}…)"
        say(f"Model  {model}   Data  {self.facts['title']}, {records:,} records")
        for note in notes:
            say(f"       {note}")
        if lengths.cut:
            say(f"       {lengths.sentence}")
        p = c.privacy
        lora = f"{c.adapter.words} · " if c.adapter else ""
        say(
            f"Plan   {c.rounds} rounds · {lora}unit: one {p.unit} · "
            f"each site ε ≤ {p.epsilon:.2f}, δ = {p.delta:g} (RDP)"
        )
        if c.secure_aggregation:
            say(f"       updates masked: the server sees sums of at least {c.quorum} sites")
        say(
            f"       {len(jobs)} runs to compare {len({j.arm for j in jobs})} arms, "
            f"{processes} at a time"
        )
        if jobs[0].insecure_seed is not None:
            say("[bold red]insecure_seed: the noise can be removed. For tests only.[/]")
        say("")
        say(
            f"Round  sites  loss   {self._metric_label():<8} (public test)  "
            f"ε of {p.epsilon:.2f}           left"
        )
        self._jobs, self._main = jobs, (jobs[0].arm, jobs[0].repeat)
        self._cost_all = sum(job.cost for job in jobs)
        self._began = time.monotonic()
        if self.console.is_terminal:
            self._live = Live(Text(""), console=self.console, transient=True, refresh_per_second=4)
            self._live.start()

    def round(self, arm: str, repeat: int, cost: float, facts: RoundFacts) -> None:
        """One committed round of any run; those of the main run become lines."""
        if not self._cost_done:
            self._began = time.monotonic()  # loading models is over; the rate counts from here
        self._cost_done += cost
        if (arm, repeat) == self._main:
            self.console.print(self._line(facts))
        self._refresh()

    def done(self, result: JobResult) -> None:
        self._finished += 1
        self._refresh()
        if not self.console.is_terminal:
            self.console.print(
                f"done {self._finished}/{len(self._jobs)}: {result.arm}, repeat "
                f"{result.repeat + 1}, {', '.join(result.sites)} ({result.seconds:.0f} s)"
            )

    def finish(self, result: dict[str, Any], folder: Path) -> None:
        """The verdict, the table, where the report is and what to do next."""
        if self._live:
            self._live.stop()
        say = self.console.print
        say("")
        say(f"RESULT  {result['verdict']['word']}")
        for line in result["verdict"]["lines"]:
            say(f"  {line}")
        for line in result["verdict"]["warnings"]:
            say(f"  Warning: {line}")
        say("")
        say(arms_table(result))
        memory = result["peak_memory_bytes"] / 2**30
        say(f"{result['seconds']:.0f} s · {memory:.1f} GB memory")
        say(f"report  {folder / 'report.html'}")
        say("next:   silotune contract show " + result["recipe"])

    def stop(self) -> None:
        """Give the terminal back, whatever happened."""
        if self._live:
            self._live.stop()

    def _metric_label(self) -> str:
        return METRICS[str(self.facts["metric"])]

    def _line(self, facts: RoundFacts) -> str:
        total = self.contract.rounds
        metric = facts.metrics.get(self.facts["metric"])
        loss = facts.metrics.get("loss")
        spent = max((e for e in facts.epsilon.values() if e is not None), default=None)
        budget = self.contract.privacy.epsilon
        filled = 0 if spent is None else min(BAR, round(BAR * spent / budget))
        failed = f"  without {', '.join(facts.failed)}" if facts.failed else ""
        return (
            f"{facts.round:>3}/{total:<3} {len(facts.sites):>2}/{len(self.contract.sites):<2}  "
            f"{_number(loss, 2):>5}   {_number(metric, 3):>7}                "
            f"{_number(spent, 2):>5} {'█' * filled}{'░' * (BAR - filled)} {self._left():>7}{failed}"
        )

    def _left(self) -> str:
        if self._cost_done < 0.02 * self._cost_all:
            return ""  # too early for a rate
        seconds = (time.monotonic() - self._began) * (self._cost_all / self._cost_done - 1)
        minutes, rest = divmod(round(max(0.0, seconds)), 60)
        return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"

    def _refresh(self) -> None:
        if self._live:
            share = self._cost_done / self._cost_all if self._cost_all else 0
            self._live.update(
                Text(
                    f"comparing: {self._finished} of {len(self._jobs)} runs done, "
                    f"{100 * share:.0f} %, {self._left()} left"
                )
            )


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _pm(found: dict[str, Any] | None, repeats: int) -> str:
    if not found:
        return "–"
    return f"{found['mean']:.3f}" + (f" ±{found['sd']:.3f}" if repeats > 1 else "")


def arms_table(result: dict[str, Any]) -> Table:
    """arm | metric pooled and per site | ε | bytes | seconds."""
    metric = result["metric"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Arm", no_wrap=True)
    for head in (f"{metric['label']}, all", "mean of sites"):
        table.add_column(head, justify="right", no_wrap=True)
    sites = [s["site"] for s in result["privacy"]["sites"]]
    for site in sites:
        table.add_column(site, justify="right")
    for head in ("ε (δ)", "kB up", "kB down", "seconds"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in result["arms"]:
        table.add_row(
            row["label"],
            _pm(row["metrics"][metric["name"]], row["repeats"]),
            _pm(row["sites_mean"], row["repeats"]),
            *(_pm(row["sites"][s], row["repeats"]) for s in sites),
            f"{row['epsilon']:g} ({row['delta']:g})" if row["epsilon"] else
            ("–" if row["private"] else "∞"),
            f"{row['bytes_up'] / 1000:,.0f}" if row["bytes_up"] else "–",
            f"{row['bytes_down'] / 1000:,.0f}" if row["bytes_down"] else "–",
            f"{row['seconds']:.0f}",
            style="bold" if row["main"] else None,
        )
    return table
