"""The server's metrics: its two processes, its certificates, and how far each run is.

Runs are read from `runs/*/events.jsonl`, which hold names, numbers and codes
(server/storage/events.py). Served on 127.0.0.1 (common/runtime/prometheus.py); nginx has no way to
it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

from cryptography import x509
from prometheus_client.core import Metric

from silotune.server.operations.server_folder import ServerFolder
from silotune.server.storage.events import Events, RunStatus, run_status
from silotune.server.storage.run_store import died

PROCESSES = ("superlink", "nginx")
PROBE_SECONDS = 2.0
MOST_RUNS = 50  # the newest: a run that is shown costs Prometheus a series for ever


class ServerMonitor:
    """What is served. `runs`: whether the process of a name runs."""

    def __init__(self, place: ServerFolder, runs: Callable[[str], bool]) -> None:
        self.place, self._runs = place, runs
        settings = place.settings
        self._ports = {
            "superlink": ("127.0.0.1", settings.link_port),
            "nginx": (settings.reachable, settings.port),
        }

    def health(self) -> str:
        """ "", or the first process that does not run or does not answer on its port."""
        for name in PROCESSES:
            if not self._runs(name) or not answers(*self._ports[name]):
                return name
        return ""

    def collect(self) -> Iterator[Metric]:
        yield _metric(
            "process_up",
            "The process runs.",
            [({"process": name}, self._runs(name)) for name in PROCESSES],
        )
        yield _metric(
            "certificate_expiry_timestamp_seconds",
            "When the certificate expires.",
            [
                ({"certificate": name}, _expiry(self.place.folder / f"{name}.crt"))
                for name in ("ca", "server")
            ],
        )
        yield _metric(
            "roster_sites",
            "Sites in the roster.",
            [({}, len(list((self.place.folder / "roster").glob("*.json"))))],
        )
        runs = dict(_newest(self.place.runs))

        def of_each(name: str, text: str, value: Callable[[RunStatus], float]) -> Metric:
            return _metric(name, text, [({"run": run}, value(s)) for run, s in runs.items()])

        yield of_each("run_rounds_planned", "Rounds of the contract.", lambda s: s.planned)
        yield of_each("run_rounds_committed", "Rounds on disk.", lambda s: len(s.committed))
        yield _metric(
            "run_stopped",
            "It stopped or failed or its process died, and it was not resumed since.",
            [
                ({"run": run}, bool(s.why) or died(self.place.runs / run, s))
                for run, s in runs.items()
            ],
        )
        yield of_each("run_released", "Its adapter is released.", lambda s: s.released)
        yield of_each("run_last_event_timestamp_seconds", "Its last event.", lambda s: s.last)
        yield _metric(
            "run_rejected",
            "Replies that did not count, by site and code.",
            [
                ({"run": run, "site": site, "code": code}, count)
                for run, s in runs.items()
                for (site, code), count in s.rejected.items()
            ],
            "counter",
        )
        seconds = _metric("run_round_seconds", "Seconds from round to round.", [], "summary")
        for run, s in runs.items():
            seconds.add_sample(f"{seconds.name}_count", {"run": run}, s.timed)
            seconds.add_sample(f"{seconds.name}_sum", {"run": run}, s.seconds)
        yield seconds


def answers(host: str, port: int) -> bool:
    """Somebody listens there."""
    try:
        with socket.create_connection((host, port), PROBE_SECONDS):
            return True
    except OSError:
        return False


def _newest(runs: Path) -> Iterator[tuple[str, RunStatus]]:
    files = {path: path.stat() for path in runs.glob("*/events.jsonl")}
    newest = sorted(files, key=lambda path: files[path].st_mtime_ns)[-MOST_RUNS:]
    for path in sorted(newest):
        yield path.parent.name, _read(path, files[path].st_mtime_ns, files[path].st_size)


@lru_cache(maxsize=2 * MOST_RUNS)
def _read(path: Path, _changed: int, _size: int) -> RunStatus:
    """A file's events; it is read again when it has changed."""
    return run_status(Events(path.parent).new())


def _expiry(file: Path) -> float:
    return x509.load_pem_x509_certificate(file.read_bytes()).not_valid_after_utc.timestamp()


def _metric(
    name: str,
    text: str,
    values: list[tuple[Mapping[str, str], float]],
    kind: Literal["gauge", "counter", "summary"] = "gauge",
) -> Metric:
    metric = Metric(f"silotune_server_{name}", text, kind)
    for labels, value in values:
        suffix = "_total" if kind == "counter" else ""
        metric.add_sample(metric.name + suffix, dict(labels), float(value))
    return metric
