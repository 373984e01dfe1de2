"""A model from a hub: a real client of one, against a server of our own that speaks as one does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from silotune.common.errors import DataError, UsageError
from silotune.common.model_files import model_folder
from silotune.simulations.datasets import hub
from tests import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The address of a hub that has one model, acme/tiny, and its files."""
    files = {p.name: p.read_bytes() for p in tiny.folder_of("bert").iterdir()}
    files["evil.py"] = b"raise SystemExit"

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(body=True)

        def do_HEAD(self) -> None:
            self.reply(body=False)

        def reply(self, *, body: bool) -> None:
            path = self.path.split("?", maxsplit=1)[0]
            name = path.rsplit("/", maxsplit=1)[-1]
            kind = "application/json"
            if path.startswith("/api/models/acme/tiny/tree/"):
                content = json.dumps(
                    [
                        {"type": "file", "path": name, "size": len(own), "oid": "0" * 40}
                        for name, own in files.items()
                    ]
                ).encode()
            elif path.startswith("/api/models/acme/tiny"):
                content = json.dumps(
                    {
                        "_id": "1",
                        "id": "acme/tiny",
                        "sha": COMMIT,
                        "private": False,
                        "downloads": 0,
                        "likes": 0,
                        "tags": [],
                        "siblings": [{"rfilename": name} for name in files],
                    }
                ).encode()
            elif path.startswith(f"/acme/tiny/resolve/{COMMIT}/") and name in files:
                content, kind = files[name], "application/octet-stream"
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", files
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def fetch(endpoint: str, home: Path, name: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's client reads its address once."""
    return subprocess.run(
        [Path(sys.executable).parent / "silotune", "data", "fetch", name],
        env=os.environ
        | {
            "HF_ENDPOINT": endpoint,
            "SILOTUNE_HOME": str(home),
            "HF_HOME": str(home / "hf"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_model_is_fetched_once_with_its_hash_and_without_code(
    served: tuple[str, dict[str, bytes]], tmp_path: Path
) -> None:
    endpoint, files = served
    done = fetch(endpoint, tmp_path, "acme/tiny")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "hub" / "acme%2Ftiny"
    assert f'sha256 = "{model_folder.manifest(folder).sha256}"' in done.stdout
    assert str(folder) in done.stdout
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert (folder / "config.json").is_file()
    assert not (folder / "evil.py").exists()
    again = fetch("http://127.0.0.1:9", tmp_path, "acme/tiny")
    assert again.stdout == done.stdout  # without a network


def test_what_is_not_there_is_one_sentence(
    served: tuple[str, dict[str, bytes]], tmp_path: Path
) -> None:
    done = fetch(served[0], tmp_path, "acme/other")
    assert done.returncode == 1
    assert done.stderr.startswith("✗ E306 The model 'acme/other' could not be fetched:")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_weights_in_another_format_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setenv("SILOTUNE_HOME", str(tmp_path))
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, local_dir, **__: local_dir.mkdir()
    )
    with pytest.raises(DataError, match=r"has no model\.safetensors") as error:
        hub.fetch_model("acme/pickled@main")
    assert error.value.code == "E310"


def test_a_download_that_breaks_off_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def broken(*_: object, local_dir: Path, **__: object) -> None:
        local_dir.mkdir()
        (local_dir / "model.safetensors").write_bytes(b"half")
        raise OSError("the line went dead")

    monkeypatch.setenv("SILOTUNE_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(DataError, match="the line went dead"):
        hub.fetch_model("acme/tiny")
    assert list((tmp_path / "hub").iterdir()) == []


def test_another_form_of_name_is_refused() -> None:
    with pytest.raises(UsageError, match="OWNER/NAME"):
        hub.fetch_model("acme/../etc/passwd")
