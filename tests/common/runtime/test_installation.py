"""What `silotune doctor` says of an installation: what is missing, and the command that adds it."""

from __future__ import annotations

import shlex
import shutil
import sys
import tomllib
from importlib import metadata, util
from pathlib import Path

import pytest

from silotune.common.runtime import installation
from silotune.common.runtime.check import Check

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"
OF_DEVELOPERS = {"bench", "dev", "docs", "mutation"}


def rows() -> dict[str, Check]:
    return {row.name: row for row in installation.checks()}


def without(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Packages that are missing (None), or have this version."""
    real = metadata.version

    def version(name: str) -> str:
        if name not in versions:
            return real(name)
        if (found := versions[name]) is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)


def test_this_installation_is_whole() -> None:
    found = rows()
    assert not [row for row in found.values() if row.state == "problem"]
    for package in installation.SHOWN:
        assert f"{package} {metadata.version(package)}" in found["packages"].result
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    assert f"the {len(project['dependencies'])} it needs" in found["packages"].result


def test_every_extra_of_users_is_checked_and_says_what_it_is_for() -> None:
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    assert set(installation.EXTRAS) == set(extras) - OF_DEVELOPERS
    assert {f"extra {name}" for name in installation.EXTRAS} <= set(rows())


def test_a_package_that_is_missing_or_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, flwr="1.30.0", peft=None)
    found = rows()["packages"]
    assert found.state == "problem"
    assert "flwr is 1.30.0, not " in found.result
    assert "peft is missing" in found.result
    *pip, first, second = shlex.split(found.fix)
    assert pip == [sys.executable, "-m", "pip", "install"]
    assert {first[:8], second[:8]} == {"flwr<1.4", "peft<0.2"}


def test_an_extra_that_is_missing_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, sqlalchemy=None, psycopg=None)
    found = rows()["extra sql"]
    assert found.state == "warning"
    assert installation.EXTRAS["sql"] in found.result
    assert shlex.split(found.fix)[-2:] == ["sqlalchemy>=2", "psycopg[binary]>=3.2"]
    assert rows()["packages"].state == "ok"


def test_programs_that_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(installation, "BIN", tmp_path)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(util, "find_spec", lambda _: None)
    found = rows()
    assert {name: found[name].state for name in ("flower", "nginx", "pip")} == {
        "flower": "problem",
        "nginx": "warning",
        "pip": "warning",
    }
    for name in ("flower", "nginx", "pip"):
        assert found[name].fix
