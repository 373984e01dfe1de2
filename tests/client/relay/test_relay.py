"""The relay and the socket: bytes pass unchanged, and nothing of the site's making leaks."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.supercore.task_identity import TaskIdentity

from silotune.client.relay.client_app import RECORD, WIRE, relay_app
from silotune.client.relay.transport import ask
from silotune.common.errors import PeerError


def send(worker_of: Any, wire: bytes) -> bytes:
    # A process of a Flower app has an identity, set once when it starts.
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    message = Message(RecordDict({RECORD: ConfigRecord({WIRE: wire})}), 1, "train")
    context = Context(
        run_id=1, node_id=1, node_config=UserConfig(), state=RecordDict(), run_config=UserConfig()
    )
    reply = relay_app(worker_of)(message, context)
    assert list(reply.content) == [RECORD]
    assert list(reply.content[RECORD]) == [WIRE]
    found = reply.content[RECORD][WIRE]
    assert isinstance(found, bytes)
    return found


def test_bytes_pass_unchanged() -> None:
    seen = []

    def worker(_: Context, wire: bytes) -> bytes:
        seen.append(wire)
        return b"\x00reply\xff"

    assert send(worker, b"\x00request\xff") == b"\x00reply\xff"
    assert seen == [b"\x00request\xff"]


def test_a_failure_leaves_as_an_empty_reply() -> None:
    def worker(_: Context, wire: bytes) -> bytes:
        raise ValueError("Jane Doe, 1961")

    assert send(worker, b"x") == b""


def test_the_relay_loads_neither_torch_nor_the_record_code() -> None:
    code = """
    import sys
    import silotune.client.relay.client_app
    bad = {"torch", "transformers", "peft", "opacus", "pandas", "silotune.common.data.records",
           "silotune.client.worker.worker", "silotune.common.models.factory"} & set(sys.modules)
    sys.exit(f"loaded: {sorted(bad)}" if bad else 0)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_socket_carries_bytes_and_is_the_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "run" / "worker.sock"
    code = """
    import sys
    from pathlib import Path
    from silotune.client.relay.transport import listen, serve
    serve(lambda wire: wire[::-1], listen(Path(sys.argv[1])), lambda: print("ready", flush=True))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert ask(path, b"\x00abc\xff" * 100_000, 10) == b"\xffcba\x00" * 100_000
    finally:
        process.terminate()
        process.wait(timeout=10)
        assert process.stdout is not None
        process.stdout.close()


def test_a_worker_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"worker\.sock") as error:
        ask(tmp_path / "worker.sock", b"x", 1)
    assert error.value.code == "E401"
