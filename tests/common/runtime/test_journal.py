"""One event a line, whatever is said and whoever says it."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest

from silotune.common.runtime.journal import Journal

ANSWERED = {"kind": "train", "code": "ok", "run": "r", "round": 3, "attempt": 1, "seconds": 0.25}


class Written(list[str]):
    """A journal and the lines it wrote."""

    def __init__(self, *, as_json: bool = True) -> None:
        self.journal = Journal("supervisor", as_json=as_json, write=self.append)

    def events(self) -> list[dict[str, Any]]:
        assert not any("\n" in line for line in self)
        return [json.loads(line) for line in self]


@pytest.fixture
def written() -> Written:
    return Written()


def of_worker(**changes: Any) -> str:
    lines: list[str] = []
    Journal("worker", as_json=True, write=lines.append).emit("train r: ok", "answered", ANSWERED)
    return json.dumps(json.loads(lines[0]) | changes)


def test_an_event_is_one_object(written: Written) -> None:
    written.journal.emit("worker is ready", "ready")
    (event,) = written.events()
    assert list(event) == ["at", "from", "event", "text"]
    assert (event["from"], event["event"]) == ("supervisor", "ready")
    assert datetime.fromisoformat(event["at"]).utcoffset() is not None
    assert event["at"].endswith("Z")
    assert len(event["at"].split(".")[1]) == len("123Z")


def test_people_read_the_text_and_who_said_it() -> None:
    written = Written(as_json=False)
    written.journal.emit("stopped", "stopped", {"round": 1})
    written.journal.emit("hello", source="relay")
    written.journal.pass_on("hospital-a is ready", "worker")
    assert written == ["stopped", "relay: hello", "worker: hospital-a is ready"]


@pytest.mark.parametrize("text", ["a\nb", "\x1b[2J", "\x9b2J", "\u202e", "\ud800", "\0", '"}', ""])
def test_no_text_ends_its_line_or_reaches_the_terminal(written: Written, text: str) -> None:
    written.journal.emit(text, source="relay")
    assert written.events()[0]["text"] == text
    assert written[0].isascii()
    assert written[0].isprintable()


def test_a_workers_own_object_is_not_wrapped_again(written: Written) -> None:
    line = of_worker()
    written.journal.pass_on(line, "worker")
    assert written.events() == [json.loads(line)]
    assert {k: v for k, v in written.events()[0].items() if k in ANSWERED} == ANSWERED


def test_what_a_relay_prints_is_text_also_if_it_looks_like_a_workers_line(written: Written) -> None:
    line = of_worker()
    written.journal.emit(line, source="relay")
    (event,) = written.events()
    assert (event["from"], event["event"], event["text"]) == ("relay", "output", line)


def test_an_object_of_another_source_is_text(written: Written) -> None:
    for other in ("supervisor", "relay", "", 1, None):
        written.journal.pass_on(of_worker(**{"from": other}), "worker")
    assert {(e["from"], e["event"]) for e in written.events()} == {("worker", "output")}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{}",
        "[]",
        "null",
        "1",
        '"x"',
        "{",
        "[" * 1990,
        '{"a":' * 300,
        "hospital-a is ready",
        of_worker()[:-1],
        of_worker() + "x",
        of_worker(more=1),
        of_worker(text=["x"]),
        of_worker(at="yesterday"),
        of_worker(at=""),
        of_worker(seconds=float("nan")),
        of_worker(seconds=float("inf")),
        of_worker(seconds=0).replace(": 0}", ": 1e999}"),
        of_worker(round="3"),
        of_worker(round=True),
        of_worker(round=1.5),
        of_worker(run={"a": 1}),
        of_worker(loss=0.5),
        of_worker(records=80),
        '{"from": "worker", "event": "answered", "text": "x"}',
    ],
)
def test_what_is_no_event_is_text(written: Written, line: str) -> None:
    written.journal.pass_on(line, "worker")
    (event,) = written.events()
    assert (event["event"], event["text"]) == ("output", line)


def test_a_key_said_twice_is_said_once(written: Written) -> None:
    line = of_worker().replace('"code": "ok"', '"code": "E210", "code": "ok"')
    written.journal.pass_on(line, "worker")
    assert written[0].count('"code"') == 1


def test_a_reader_that_has_gone_does_not_stop_the_work() -> None:
    def gone(_: str) -> None:
        raise BrokenPipeError

    Journal("worker", write=gone).emit("hello")
