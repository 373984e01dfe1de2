"""`make lock`: what is installed is listed with its hash, from the indexes that pip uses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from silotune.common.runtime import requirements_lock
from silotune.common.runtime.requirements_lock import (
    BUILD_LOCK,
    EXTRAS,
    LOCK,
    index_options,
    main,
    pip_settings,
)

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def locked(path: Path) -> dict[str, tuple[str, list[str]]]:
    """Version and hashes of each package; a line that is neither fails."""
    text = path.read_text().replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        if line.startswith("#") or not line:
            continue
        requirement, *hashes = line.split(" --hash=")
        name, version = requirement.strip().split("==")
        found[canonicalize_name(name)] = version, [h.strip() for h in hashes]
    return found


def test_pips_settings_are_read_as_pip_install_takes_them() -> None:
    assert pip_settings(
        [
            ":env:.extra-index-url='https://e.example'",
            "global.cert='/ca'",
            "global.index-url='https://g.example/a=b'",
            "global.extra-index-url='file:///x file:///y'",
            "install.index-url='https://i.example'",
            "download.index-url='https://d.example'",
            "",
            "a line that is no setting",
        ]
    ) == {
        "cert": "/ca",
        "index-url": "https://i.example",
        "extra-index-url": "https://e.example",
    }


def test_every_index_of_pip_is_uvs_too_and_no_other_is_named() -> None:
    options = index_options(
        {
            "index-url": "https://i.example",
            "extra-index-url": "file:///x\nfile:///y",
            "find-links": "/wheels",
            "no-index": "true",
        }
    )
    assert options == [
        "--index-strategy",
        "unsafe-best-match",
        "--no-index",
        "--default-index",
        "https://i.example",
        "--index",
        "file:///x",
        "--index",
        "file:///y",
        "--find-links",
        "/wheels",
    ]
    assert index_options({}) == options[:2]
    assert "http" not in Path(requirements_lock.__file__).read_text().replace("https://…", "")


def test_credentials_of_an_index_do_not_get_into_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def run(words: list[str], **more: object) -> subprocess.CompletedProcess[str]:
        calls.append(words)
        shown = "global.index-url='https://user:secret@i.example'\n"
        return subprocess.CompletedProcess(words, 0, shown if "config" in words else "a==1\n")

    monkeypatch.setattr(requirements_lock.subprocess, "run", run)
    main(ROOT, tmp_path, [])
    assert sum("https://user:secret@i.example" in words for words in calls) == 2
    assert all({"--generate-hashes", "--no-header"} <= set(w) for w in calls if "compile" in w)
    for name in (LOCK, BUILD_LOCK):
        assert "secret" not in (tmp_path / name).read_text()


def test_an_installation_has_every_extra_that_is_not_for_development() -> None:
    assert {*EXTRAS, "dev", "bench", "docs", "mutation", "simulation"} == set(
        PROJECT["project"]["optional-dependencies"]
    )


def test_the_locks_are_not_committed() -> None:
    for name in (LOCK, BUILD_LOCK):
        done = subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT, check=False)
        assert done.returncode == 0, name


@pytest.mark.parametrize("side", ["client", "server"])
def test_an_image_installs_by_hash_where_there_is_a_lock(side: str) -> None:
    text = (ROOT / side / "deploy" / "Dockerfile").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"if \[ -f /src/requirements\.lock \]; then(.*?); +else", text)
    first, second, third = (part.split() for part in command.split("&&"))
    for words, name in ((first, BUILD_LOCK), (second, LOCK)):
        assert words[:2] == ["pip", "install"]
        assert "--require-hashes" in words
        assert words[-2:] == ["-r", f"/src/{name}"]
    # What builds a source archive is in the first list, and the last step fetches nothing.
    assert "--no-build-isolation" in second
    assert {"--no-index", "--no-deps", "--no-build-isolation", "/src"} <= set(third)


@pytest.mark.nightly
@pytest.mark.download
def test_the_locks_cover_what_the_project_needs_and_pip_accepts_them(tmp_path: Path) -> None:
    main(ROOT, tmp_path, [])
    found, builders = locked(tmp_path / LOCK), locked(tmp_path / BUILD_LOCK)
    for version, hashes in [*found.values(), *builders.values()]:
        assert re.fullmatch(r"[0-9][A-Za-z0-9.+!]*", version)
        assert hashes
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", h) for h in hashes)
    project = PROJECT["project"]
    wanted = [*project["dependencies"]]
    for extra in EXTRAS:
        wanted += project["optional-dependencies"][extra]
    for requirement in map(Requirement, wanted):
        version, _ = found[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), requirement
    for requirement in map(Requirement, PROJECT["build-system"]["requires"]):
        assert requirement.specifier.contains(builders[requirement.name][0])
    report = tmp_path / "report.json"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--require-hashes",
            "--dry-run",
            "--ignore-installed",
            "--no-build-isolation",
            "--report",
            str(report),
            "-r",
            str(tmp_path / LOCK),
        ],
        check=True,
        capture_output=True,
    )
    installed = {
        canonicalize_name(one["metadata"]["name"]): one["metadata"]["version"]
        for one in json.loads(report.read_text())["install"]
    }
    assert installed == {name: version for name, (version, _) in found.items()}
