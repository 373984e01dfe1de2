"""What a site tells of itself: what its replies have shown, and nothing of its records."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from silotune.client.operations import telemetry
from silotune.client.operations.telemetry import Running, SiteMonitor, Tally
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.site.policy import permissive_policy
from silotune.client.worker.request_outcome import Answered
from silotune.client.worker.worker import Worker
from silotune.common.contract.contract import Contract
from silotune.common.protocol import messages
from silotune.common.protocol.messages import Describe, Message, Train, Update
from silotune.common.runtime import prometheus
from silotune.common.runtime.journal import Journal

Rows = Callable[..., Path]
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
TIMES = {telemetry.READY, telemetry.LAST, f"{telemetry.SECONDS}_sum"}
GOOD = "# TYPE silotune_site_requests_total counter\n"


class Told:
    """A worker that keeps its tally and its journal in a folder."""

    def __init__(self, contract: Contract, rows: Path, folder: Path) -> None:
        folder.mkdir()
        self.file, self.lines = folder / telemetry.FILE, list[str]()
        self.tally = Tally(self.file)
        self.tally.ready()
        journal = Journal("worker", as_json=True, write=self.lines.append)

        def told(answered: Answered) -> None:
            self.tally.note(answered)
            journal.emit(answered.text, "answered", answered.facts)

        self.worker = Worker(
            permissive_policy(contract, "north", rows, None),
            contract,
            PrivacyLedger.in_memory("north"),
            on_answer=told,
        )

    def ask(self, run: str = "r", number: int = 1, attempt: int = 1, bias: float = 0.0) -> Message:
        header = Train(contract=self.worker.contract.hash, run=run, round=number, attempt=attempt)
        arrays = self.worker.model.initial_arrays()
        arrays["head.bias"] = np.full_like(arrays["head.bias"], bias)
        return messages.unpack(self.worker.handle(messages.pack(Message(header, arrays))))

    def describe(self) -> None:
        header = Describe(contract=self.worker.contract.hash, challenge="0" * 64)
        self.worker.handle(messages.pack(Message(header)))

    @property
    def samples(self) -> Samples:
        return samples(self.file.read_text())

    @property
    def events(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.lines]


def samples(text: str) -> Samples:
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


@pytest.fixture
def told(table_contract: Contract, write_rows: Rows, tmp_path: Path) -> Told:
    return Told(table_contract, write_rows(tmp_path / "rows.csv", 83), tmp_path / "state")


def test_each_answer_is_told_with_its_code(told: Told) -> None:
    told.describe()
    reply = told.ask().header
    assert isinstance(reply, Update)
    told.ask()
    told.ask(bias=1.0)
    told.ask(number=9, attempt=2)
    told.worker.handle(b"what is this?")
    found = told.samples
    counts = {labels: v for (name, labels), v in found.items() if name.endswith("requests_total")}
    assert counts == {
        (("code", "ok"), ("kind", "describe")): 1,
        (("code", "ok"), ("kind", "train")): 2,
        (("code", "E202"), ("kind", "train")): 2,
        (("code", "E501"), ("kind", "other")): 1,
    }
    assert found["silotune_site_request_seconds_count", (("kind", "train"),)] == 4
    assert found["silotune_site_run_epsilon", (("run", "r"),)] == reply.epsilon
    assert abs(found[telemetry.LAST, ()] - time.time()) < 60
    said = [{k: v for k, v in e.items() if k not in ("at", "from", "seconds")} for e in told.events]
    assert said[1] == {
        "event": "answered",
        "kind": "train",
        "code": "ok",
        "run": "r",
        "round": 1,
        "attempt": 1,
        "text": said[1]["text"],
    }
    assert [e["code"] for e in said] == ["ok", "ok", "ok", "E202", "E202", "E501"]
    assert str(said[4]["text"]).startswith("train r round 9 attempt 2: E202, ")


def test_neighbouring_records_show_the_same(
    table_contract: Contract, write_rows: Rows, tmp_path: Path
) -> None:
    """One record more, another outcome, other values: nothing but times may differ."""
    everybody = write_rows(tmp_path / "rows.csv", 83)
    header, *rows = everybody.read_text().splitlines()
    fewer, others = tmp_path / "fewer.csv", tmp_path / "others.csv"
    fewer.write_text("\n".join([header, *rows[:-1]]) + "\n")
    others.write_text("\n".join([header, *(f"{row[:-1]}0" for row in rows)]) + "\n")
    shown = []
    for at, path in enumerate((everybody, fewer, others)):
        told = Told(table_contract, path, tmp_path / f"state-{at}")
        told.describe()
        for run in ("first", "second"):
            for number in (1, 2, 3, 4):
                told.ask(run, number)
                told.ask(run, number, bias=0.5)
        told.worker.handle(b"")
        values = {what: v for what, v in told.samples.items() if what[0] not in TIMES}
        events = [
            {k: v for k, v in event.items() if k not in ("at", "seconds", "text")}
            | {"text": str(event["text"]).rsplit(",", 1)[0]}
            for event in told.events
        ]
        shown.append((values, set(told.samples), events))
        assert {name for name, _ in told.samples} <= {
            "silotune_site_requests_total",
            "silotune_site_request_seconds_count",
            "silotune_site_request_seconds_sum",
            *telemetry.WRITTEN,
        }
    assert shown[0] == shown[1] == shown[2]
    assert {e["code"] for e in shown[0][2]} >= {"ok", "E202", "E210", "E501"}


def test_seconds_are_tenths(tmp_path: Path) -> None:
    """Finer ones would tell code at the relay more than its own clock does."""
    tally = Tally(tmp_path / "metrics.prom")
    for seconds in (0.04, 0.26, 1.2345678):
        tally.note(Answered("train", "ok", seconds))
    found = samples((tmp_path / "metrics.prom").read_text())
    assert found["silotune_site_request_seconds_sum", (("kind", "train"),)] == 1.5


def test_the_file_is_replaced_whole_and_its_users_alone(told: Told) -> None:
    told.describe()
    assert stat.S_IMODE(told.file.stat().st_mode) == 0o600
    assert stat.S_IMODE(told.file.parent.stat().st_mode) == 0o700
    with told.file.open() as before:
        told.describe()
        assert samples(before.read()) != told.samples
    assert os.listdir(told.file.parent) == [told.file.name]


def test_a_disk_that_takes_nothing_costs_no_reply(told: Told) -> None:
    told.file.unlink()
    told.file.mkdir()  # a rename onto a folder fails for root, too
    assert isinstance(told.ask().header, Update)


def test_a_server_that_invents_runs_does_not_fill_the_file(tmp_path: Path) -> None:
    tally = Tally(tmp_path / "metrics.prom")
    for number in range(telemetry.MOST_RUNS + 20):
        tally.note(Answered("train", "ok", 0.0, f"r{number}", 1, 1, 0.5))
    tally.note(Answered("train", "E210", 0.0, "refused", 1, 1))
    runs = {
        dict(labels).get("run") for _, labels in samples((tmp_path / "metrics.prom").read_text())
    } - {None}
    assert runs == {f"r{number}" for number in range(20, telemetry.MOST_RUNS + 20)}


def test_what_is_written_is_what_is_served(told: Told) -> None:
    told.describe()
    told.ask()
    shown = telemetry.read(told.file, os.geteuid())
    assert shown.fresh
    assert samples(prometheus.text(shown.families).decode()) == told.samples
    assert {family.name: family.documentation for family in shown.families} == {
        name: known.help for name, known in telemetry.WRITTEN.items() if name != telemetry.CA
    }


# A file that somebody else has written


def line(
    name: str = "silotune_site_requests_total",
    labels: str = 'kind="train",code="ok"',
    value: str = "1",
) -> str:
    return f"{GOOD}{name}{{{labels}}} {value}\n"


def served(file: Path, owner: int | None = None) -> str:
    shown = telemetry.read(file, os.geteuid() if owner is None else owner)
    return prometheus.text(shown.families).decode()


def test_the_good_line_is_served(tmp_path: Path) -> None:
    (tmp_path / "m").write_text(line())
    assert 'silotune_site_requests_total{code="ok",kind="train"} 1.0' in served(tmp_path / "m")


@pytest.mark.parametrize(
    "text",
    [
        "root:x:0:0:root:/root:/bin/bash\n",
        "\0",
        "{",
        "# TYPE",
        'a{b="c',
        "\xff",
        line(name="silotune_site_records"),
        line(name="silotune_site_requests_created"),
        line(labels='kind="train"'),
        line(labels=""),
        line(labels='kind="train",code="ok",more="1"'),
        line(labels='kind="Jane Doe",code="ok"'),
        line(labels='kind="train",code="E999"'),
        line(labels='kind="train\\n",code="ok"'),
        line(labels='kind="train",code="ok",code="ok"'),
        line(value="-1"),
        line(value="NaN"),
        line(value="+Inf"),
        line(value="9" * 380),
        line(value="x"),
        line(value=""),
        line(labels='kind="train",code="' + "\\" * 500 + '"'),
        line() * 2 + "\0{",
        GOOD.replace("counter", "gauge") + line().removeprefix(GOOD),
        "# TYPE silotune_site_run_epsilon gauge\n"
        + 'silotune_site_run_epsilon{run="Jane Doe"} 1\n',
    ],
    ids=range(25),
)
def test_nothing_unknown_gets_through(tmp_path: Path, text: str) -> None:
    (tmp_path / "m").write_bytes(text.encode("latin-1"))
    assert served(tmp_path / "m") == ""


def test_a_help_text_of_somebodys_own_is_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("# HELP silotune_site_requests_total Jane Doe\n" + line() + line())
    found = served(tmp_path / "m")
    assert "Jane" not in found
    assert found.count("silotune_site_requests_total{") == 1


def test_a_link_a_pipe_a_giant_and_anothers_file_are_not_read(tmp_path: Path) -> None:
    secret, file = tmp_path / "secret", tmp_path / "m"
    secret.write_text(line())
    file.symlink_to(secret)
    assert served(file) == ""
    file.unlink()
    file.symlink_to("/etc/shadow")
    assert served(file) == ""
    file.unlink()
    os.link(secret, file)
    assert served(file) == ""
    file.unlink()
    os.mkfifo(file)
    assert served(file) == ""  # and does not wait for somebody to write
    file.unlink()
    file.mkdir()
    assert served(file) == ""
    file.rmdir()
    file.write_text(line())
    assert served(file, os.geteuid() + 1) == ""
    os.truncate(file, 1 << 30)
    assert served(file) == ""
    assert not telemetry.read(file, os.geteuid()).fresh


def test_a_file_that_takes_long_to_parse_is_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "m").write_text(line(labels='kind="' + '\\"' * 100_000))
    began = time.monotonic()
    assert served(tmp_path / "m") == ""
    assert time.monotonic() - began < 5


# Health


def test_health_follows_worker_file_and_relay(told: Told) -> None:
    running = Running(worker=True, relay=True, relay_starts=3)
    shown = SiteMonitor(told.file, os.geteuid(), running)
    assert shown.health() == ""
    found = samples(prometheus.text(shown.collect()).decode())
    assert found["silotune_site_worker_up", ()] == found["silotune_site_relay_up", ()] == 1
    assert found["silotune_site_relay_restarts_total", ()] == 2
    running.relay = False
    assert shown.health() == "relay"
    running.worker = False
    assert shown.health() == "worker"
    assert samples(prometheus.text(shown.collect()).decode())["silotune_site_worker_up", ()] == 0


def test_without_a_supervisor_the_file_says_whether_the_worker_runs(told: Told) -> None:
    shown = SiteMonitor(told.file, os.geteuid())
    assert shown.health() == ""
    names = {name for name, _ in samples(prometheus.text(shown.collect()).decode())}
    assert "silotune_site_worker_up" in names
    assert not any("relay" in name for name in names)
    then = time.time() - telemetry.FRESH_SECONDS - 1
    os.utime(told.file, (then, then))
    assert shown.health() == "worker"
    told.tally.write()
    assert shown.health() == ""
    told.file.unlink()
    assert shown.health() == "worker"


def test_the_cas_expiry_is_shown(tmp_path: Path) -> None:
    from silotune.server.operations import certificate_authority

    pem, _, certificate = certificate_authority.make_ca("test")
    (tmp_path / "ca.crt").write_bytes(pem.certificate)
    for ca, shown in ((tmp_path / "ca.crt", True), (tmp_path / "none.crt", False), (None, False)):
        Tally(tmp_path / "m", ca).write()
        found = samples((tmp_path / "m").read_text())
        assert (telemetry.CA, ()) in found or not shown
        if shown:
            assert found[telemetry.CA, ()] == certificate.not_valid_after_utc.timestamp()


def test_nobody_shows_the_process_itself() -> None:
    """Its memory grows with the records: prometheus_client's default registry is not used."""
    for room in ("client", "common"):
        for file in (Path(__file__).parents[3] / room).rglob("*.py"):
            assert "REGISTRY" not in file.read_text()
