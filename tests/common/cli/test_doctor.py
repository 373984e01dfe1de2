"""`silotune doctor`: the machine and the installation in one table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from silotune.common.runtime import installation
from silotune.common.runtime.check import Check
from tests.conftest import Ran

Silotune = Callable[..., Ran]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SILOTUNE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SILOTUNE_DATA", str(tmp_path))


def test_a_machine_that_is_ready(
    run: Silotune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_PASSWORD", "s3cret-word")
    monkeypatch.setenv("SILOTUNE_TOKEN", "t0ken-word")
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    for name in ("python", "packages", "extra sql", "torch", "clock", "umask", "nginx"):
        assert f" {name} " in out
    assert f"{tmp_path / 'cache'}, " in out
    assert "Ready: 0 problems" in out
    found = json.loads(text := run("doctor", "--json")[1])
    assert found["ready"] is True
    assert all(row.keys() == {"name", "state", "result", "fix"} for row in found["checks"])
    assert all(row["fix"] for row in found["checks"] if row["state"] != "ok")
    assert "-word" not in out + text


def test_a_problem_ends_in_1_and_what_needs_its_packages_is_not_loaded(
    run: Silotune, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Check("packages", "problem", "pydantic is missing", "pip install pydantic")
    monkeypatch.setattr(installation, "checks", lambda: [row])
    monkeypatch.setattr("silotune.common.model_files.model_source.SOURCES", "no.such.module")
    code, out, _ = run("doctor")
    assert code == 1
    assert "✗ packages     pydantic is missing\n               → pip install pydantic\n" in out
    assert "Not ready: 1 problem" in out
    assert run("doctor", "--json")[0] == 1


def test_a_cache_that_takes_no_file(
    run: Silotune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SILOTUNE_HOME", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("SILOTUNE_DATA", str(tmp_path / "none"))
    code, out, _ = run("doctor")
    assert code == 1
    assert "→ set SILOTUNE_HOME to a folder of yours" in out
    assert "SILOTUNE_DATA is " in out
