"""A site's metrics: the worker writes a file, and whoever has a network serves it.

The worker has no network, so it keeps `state/metrics/metrics.prom` (Prometheus' text format, 0600,
replaced by one rename, alone in its folder so that a unit can be shown it and nothing else).
`silotune site start` or `silotune site metrics` reads it and answers on 127.0.0.1.

What is shown: code that arrives with a Flower app runs on this machine and can read that address,
so nothing is shown that replies through the relay have not shown: how many requests of which kind
got which code, how long they took (in tenths of a second; the relay's own clock is finer), the ε
that updates have stated, when the worker was ready and when it last answered, the CA's expiry, and
whether the two processes run. Left out on purpose, in addition to records, samples, losses and what
is
left of a budget: free disk and memory, which the cache of frozen outputs changes by the number of
records (prometheus_client's own process metrics for that reason, too), and how long the worker
took to start. `site check` and node_exporter tell the owner of disks.
"""

from __future__ import annotations

import logging
import math
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cryptography import x509
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from silotune.client.privacy.keys import make_private_folder
from silotune.client.site.safe_read import read_plain
from silotune.client.worker.request_outcome import OTHER, REQUESTS, Answered
from silotune.common.errors import CODES, UsageError
from silotune.common.runtime import prometheus

log = logging.getLogger(__name__)

FILE = "metrics/metrics.prom"  # in state/
BEAT_SECONDS, FRESH_SECONDS = 15.0, 60.0
MOST_BYTES, LONGEST_LINE = 1 << 18, 400
MOST_RUNS = 50


class Known(NamedTuple):
    """A metric that may be shown: no other name, label or form of a label's value is."""

    kind: Literal["counter", "gauge", "summary"]
    help: str
    labels: dict[str, re.Pattern[str]]


_KIND = re.compile("|".join((*REQUESTS, OTHER)))
_CODE = re.compile("|".join(("ok", *CODES)))
_RUN = re.compile("[a-z0-9][a-z0-9-]{0,63}")
REQUEST, SECONDS = "silotune_site_requests", "silotune_site_request_seconds"
EPSILON, CA = "silotune_site_run_epsilon", "silotune_site_ca_expiry_timestamp_seconds"
READY, LAST = (f"silotune_site_{what}_timestamp_seconds" for what in ("ready", "last_answer"))
WRITTEN = {
    REQUEST: Known(
        "counter", "Requests answered, by kind and code.", {"kind": _KIND, "code": _CODE}
    ),
    SECONDS: Known("summary", "Seconds from request to reply, in tenths.", {"kind": _KIND}),
    EPSILON: Known("gauge", "The epsilon that the run's last update stated.", {"run": _RUN}),
    READY: Known("gauge", "When the worker was ready.", {}),
    LAST: Known("gauge", "When the worker last answered.", {}),
    CA: Known("gauge", "When the first certificate in server.ca expires.", {}),
}
_SUFFIXES = {"counter": ("_total",), "gauge": ("",), "summary": ("_count", "_sum")}


class Tally:
    """The worker's counts, and the file that shows them."""

    def __init__(self, file: Path, ca: Path | None = None) -> None:
        self.file, self._lock = file, threading.Lock()
        self._requests: Counter[tuple[str, str]] = Counter()
        self._seconds: Counter[str] = Counter()
        self._epsilon: dict[str, float] = {}
        self._moments: dict[str, float] = {}
        if (expiry := _expiry(ca)) is not None:
            self._moments[CA] = expiry

    def ready(self) -> None:
        """From here on the file is rewritten before it counts as stale."""
        self._moments[READY] = float(int(time.time()))
        self.write()
        threading.Thread(target=self._beat, daemon=True).start()

    def note(self, answered: Answered) -> None:
        with self._lock:
            self._requests[answered.kind, answered.code] += 1
            self._seconds[answered.kind] += round(10 * answered.seconds)
            self._moments[LAST] = float(int(time.time()))
            if answered.run is not None and answered.epsilon is not None:
                self._epsilon.pop(answered.run, None)
                self._epsilon[answered.run] = answered.epsilon
                if len(self._epsilon) > MOST_RUNS:
                    del self._epsilon[next(iter(self._epsilon))]
        self.write()

    def write(self) -> None:
        """Replace the file; a disk that is full does not keep the worker from answering."""
        with self._lock:
            half = self.file.with_name(f".{self.file.name}.tmp")
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            try:
                make_private_folder(self.file.parent)
                with open(os.open(half, flags, 0o600), "wb") as file:
                    file.write(prometheus.text(self._families()))
                half.rename(self.file)
            except OSError as error:
                log.warning("%s cannot be written: %s", self.file, error.strerror)

    def _families(self) -> Iterator[Metric]:
        requests, seconds = _family(REQUEST), _family(SECONDS)
        asked: Counter[str] = Counter()
        for (kind, code), count in self._requests.items():
            requests.add_sample(f"{REQUEST}_total", {"kind": kind, "code": code}, count)
            asked[kind] += count
        for kind, count in asked.items():
            seconds.add_sample(f"{SECONDS}_count", {"kind": kind}, count)
            seconds.add_sample(f"{SECONDS}_sum", {"kind": kind}, self._seconds[kind] / 10)
        epsilon = _family(EPSILON)
        for run, value in self._epsilon.items():
            epsilon.add_sample(EPSILON, {"run": run}, value)
        yield from (requests, seconds, epsilon)
        for name, value in self._moments.items():
            moment = _family(name)
            moment.add_sample(name, {}, value)
            yield moment

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            self.write()


def _family(name: str) -> Metric:
    return Metric(name, WRITTEN[name].help, WRITTEN[name].kind)


def _expiry(ca: Path | None) -> float | None:
    """When the first of the certificates expires; None if there is none to read."""
    try:
        found = x509.load_pem_x509_certificates(read_plain(ca).data) if ca else []
    except (UsageError, ValueError):
        return None
    return min((c.not_valid_after_utc.timestamp() for c in found), default=None)


class ShownMetric(NamedTuple):
    """What a file shows; fresh: the worker has written it lately."""

    families: list[Metric]
    fresh: bool


def read(file: Path, owner: int) -> ShownMetric:
    """The known metrics of a worker's file. Whoever wrote it, nothing else of it gets through: root
    reads it in a folder that the worker's user can change."""
    try:
        data, changed = read_plain(file, owner, MOST_BYTES)
    except UsageError:
        return ShownMetric([], False)
    return ShownMetric(list(_known(data)), abs(time.time() - changed) < FRESH_SECONDS)


def _known(data: bytes) -> Iterable[Metric]:
    found: dict[str, Metric] = {}
    seen = set()
    try:
        text = data.decode("ascii")
        if max(map(len, text.splitlines()), default=0) > LONGEST_LINE:
            return []  # the parser's time grows with the square of a line
        for family in text_string_to_metric_families(text):
            for name, labels, value, *_ in family.samples:
                what = (name, *sorted(labels.items()))
                if what not in seen and _may_show(family, name, labels, float(value)):
                    seen.add(what)
                    shown = found.setdefault(family.name, _family(family.name))
                    shown.add_sample(name, labels, float(value))
    except Exception:  # the parser raises whatever comes up in what is not its format
        return []
    return found.values()


def _may_show(family: Metric, name: str, labels: dict[str, Any], value: float) -> bool:
    known = WRITTEN.get(family.name)
    return (
        known is not None
        and family.type == known.kind
        and name in [family.name + suffix for suffix in _SUFFIXES[known.kind]]
        and labels.keys() == known.labels.keys()
        and all(known.labels[key].fullmatch(text) for key, text in labels.items())
        and math.isfinite(value)
        and value >= 0
    )


@dataclass
class Running:
    """What a supervisor knows of its processes; None: what nobody here knows."""

    worker: bool | None = None
    relay: bool | None = None
    relay_starts: int = 0


class SiteMonitor:
    """What is served of a site. `running` is the supervisor's, where there is one."""

    def __init__(self, file: Path, owner: int, running: Running | None = None) -> None:
        self._read: Callable[[], ShownMetric] = lambda: read(file, owner)
        self.running = running or Running()

    def health(self) -> str:
        """ "" or which is not well: "worker" (it does not run, or has not written), "relay"."""
        if self.running.worker is False or not self._read().fresh:
            return "worker"
        return "relay" if self.running.relay is False else ""

    def collect(self) -> Iterator[Metric]:
        shown, running = self._read(), self.running
        yield from shown.families
        up = shown.fresh if running.worker is None else running.worker
        yield _gauge("silotune_site_worker_up", "The worker runs.", up)
        if running.relay is not None:
            yield _gauge("silotune_site_relay_up", "The relay's process runs.", running.relay)
            restarts = Metric("silotune_site_relay_restarts", "Starts after the first.", "counter")
            restarts.add_sample(
                "silotune_site_relay_restarts_total", {}, max(running.relay_starts - 1, 0)
            )
            yield restarts


def _gauge(name: str, text: str, value: float) -> Metric:
    metric = Metric(name, text, "gauge")
    metric.add_sample(name, {}, float(value))
    return metric
