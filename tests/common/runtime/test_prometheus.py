"""The metrics' HTTP: two pages, on the loopback interface alone, for whoever asks however."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import psutil
import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from silotune.common.errors import UsageError
from silotune.common.runtime import prometheus
from silotune.common.runtime.prometheus import Monitor

Start = Callable[..., Monitor]


def families() -> list[Metric]:
    metric = Metric("things", "Things.", "counter")
    metric.add_sample("things_total", {"kind": 'a"\n\\'}, 2.0)
    return [metric]


@pytest.fixture
def start() -> Iterator[Start]:
    """start(collect, health): served on a free port; closed with the test."""
    made: list[Monitor] = []

    def call(
        collect: prometheus.Collect = families, health: prometheus.Health = lambda: ""
    ) -> Monitor:
        made.append(prometheus.serve(0, collect, health))
        return made[-1]

    yield call
    for served in made:
        served.close()


def get(served: Monitor, path: str, method: str = "GET") -> httpx.Response:
    return httpx.request(method, f"http://127.0.0.1:{served.port}{path}", trust_env=False)


def raw(served: Monitor, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", served.port), 30) as client:
        client.sendall(data)
        found = b""
        while more := client.recv(65536):
            found += more
        return found


def test_metrics_are_what_was_collected(start: Start) -> None:
    reply = get(start(), "/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    (found,) = text_string_to_metric_families(reply.text)
    assert [(s.name, s.labels, s.value) for s in found.samples] == [
        ("things_total", {"kind": 'a"\n\\'}, 2.0)
    ]


def test_health_is_ok_or_one_word(start: Start) -> None:
    why = [""]
    served = start(health=lambda: why[0])
    assert (get(served, "/healthz").status_code, get(served, "/healthz").text) == (200, "ok\n")
    why[0] = "nginx"
    assert (get(served, "/healthz").status_code, get(served, "/healthz").text) == (503, "nginx\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "NO"])
def test_get_alone(start: Start, method: str) -> None:
    served = start()
    for path in ("/metrics", "/healthz", "/x"):
        reply = get(served, path, method)
        assert (reply.status_code, reply.headers["allow"]) == (405, "GET")


@pytest.mark.parametrize(
    "path", ["/", "/metrics/", "/metrics?a=1", "/../etc/passwd", "/health", "/%6detrics"]
)
def test_no_other_page(start: Start, path: str) -> None:
    assert get(start(), path).status_code == 404


def test_the_loopback_interface_alone(start: Start) -> None:
    served = start()
    listening = [
        c.laddr.ip
        for c in psutil.Process().net_connections("inet")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == served.port
    ]
    assert listening == ["127.0.0.1"]


def test_a_port_in_use_is_said_in_one_sentence(start: Start) -> None:
    served = start()
    with pytest.raises(UsageError) as error:
        prometheus.serve(served.port, families, lambda: "")
    assert str(error.value) == (
        f"Metrics cannot be served on 127.0.0.1:{served.port}: Address already in use. Choose "
        "another port."
    )


def test_a_closed_port_is_free_again(start: Start) -> None:
    first = prometheus.serve(0, families, lambda: "")
    first.close()
    prometheus.serve(first.port, families, lambda: "").close()


def test_a_failure_shows_no_text_of_its_own(start: Start) -> None:
    def fails() -> list[Metric]:
        raise ValueError("Jane Doe, 1961")

    served = start(fails)
    reply = get(served, "/metrics")
    assert (reply.status_code, reply.text) == (500, "not collected (ValueError)\n")
    assert get(served, "/healthz").status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /metrics\r\n\r\n",
        b"\0\xff\r\n\r\n",
        b"GET /metrics HTTP/9.9\r\n\r\n",
        b"A" * 4096,
        b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n" + b"a: b\r\n" * 600 + b"\r\n\r\n",
        b"POST /metrics HTTP/1.1\r\nContent-Length: 999999999\r\n\r\n",
    ],
)
def test_nonsense_is_survived(start: Start, data: bytes) -> None:
    served = start()
    try:
        reply = raw(served, data)
    except ConnectionResetError:  # it closed with bytes of ours unread
        reply = b""
    assert b"Traceback" not in reply
    assert get(served, "/healthz").status_code == 200


def test_who_asks_and_says_nothing_is_cut_off(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then does not hold a connection: the limit is on the whole head."""
    monkeypatch.setattr(prometheus, "SECONDS", 0.3)
    served = start()
    with socket.create_connection(("127.0.0.1", served.port), 30) as client:
        done = threading.Event()

        def drip() -> None:
            try:
                while not done.wait(0.05):
                    client.sendall(b"G")
            except OSError:
                pass

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            assert client.recv(1) == b""
        except ConnectionResetError:
            pass
        finally:
            done.set()
            thread.join()


def test_many_at_once_take_no_more_than_their_places(start: Start) -> None:
    before = threading.active_count()
    served = start()
    idle = [socket.create_connection(("127.0.0.1", served.port), 30) for _ in range(50)]
    # The last was turned away, so all places before it are taken.
    assert idle[-1].recv(1) == b""
    assert threading.active_count() <= before + 1 + prometheus.AT_ONCE
    for client in idle:
        client.close()
    end = time.monotonic() + 30
    while True:
        try:
            assert get(served, "/healthz").status_code == 200
            break
        except httpx.HTTPError:  # no place is free yet
            assert time.monotonic() < end
