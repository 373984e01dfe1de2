"""What gets into an image: the package, and no key, no record, no repository.

No image is built here. `included` says which files of a folder Docker sends to a build: of the
patterns of .dockerignore, where `**` stands for any folders, the last one that matches a file or a
folder above it decides (docs.docker.com/build/concepts/context, "Syntax").
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.test_layout import ROOT

KEYS = (
    "hospital-a/keys/owner.key",
    "hospital-a/keys/head",
    "hospital-a/state/ledger.sqlite",
    "hospital-a/relay/node.key",
    "hospital-a/records.csv",
    "hospital-a/site.toml",
    "federation/ca.key",
    "federation/state.db",
    "federation/roster/hospital-a.json",
    ".git/config",
    ".git/objects/00/1",
    ".venv/lib/python3.11/site-packages/x.py",
    ".env",
    "data/records/cleveland.csv",
    "runs/demo/contract.json",
    "client/keys/secret.key",
    "client/site.toml",
    "client/deploy/site/keys/secret.key",
    "client/deploy/site/site.toml",
    "client/deploy/site/records.csv",
    "client/deploy/relay/node.key",
    "client/deploy/.env",
    "server/deploy/federation/ca.key",
    "server/deploy/federation/server.toml",
    "server/deploy/federation/runs/r/adapter.safetensors",
    "server/ca.key",
    "node.key",
    "simulations/keys/owner.key",
    "simulations/recipes/own/records.csv",
    "ca.key",
    "core.1",
)


def regex(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(words.get(part, re.escape(part)) for part in parts))


def included(folder: Path) -> set[str]:
    """The files of a build's context that Docker sends to the build."""
    lines = (folder / ".dockerignore").read_text().splitlines()
    rules = [
        (line.startswith("!"), regex(line.removeprefix("!").strip("/")))
        for line in (raw.strip() for raw in lines)
        if line and not line.startswith("#")
    ]
    found = set()
    for path in folder.rglob("*"):
        if path.is_dir():
            continue
        name, kept = path.relative_to(folder), True
        names = [str(name), *(str(parent) for parent in name.parents if str(parent) != ".")]
        for keeps, rule in rules:
            if any(rule.fullmatch(one) for one in names):
                kept = keeps
        if kept:
            found.add(str(name))
    return found


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with what lies about in one that is used: folders of sites and servers."""
    folder = tmp_path_factory.mktemp("context")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    for name in KEYS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("secret")
    return folder


def tracked() -> list[str]:
    done = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("not in a repository")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def test_no_key_record_or_repository_gets_into_an_image(context: Path) -> None:
    assert not included(context) & set(KEYS)
    assert included(context) <= set(tracked())


@pytest.mark.parametrize("room", ["client", "server"])
def test_a_deploy_folder_as_the_context_sends_nothing(context: Path, room: str) -> None:
    assert included(context / room / "deploy") == set()


def test_an_image_has_all_that_the_package_is_made_of(context: Path) -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    needed = {"LICENSE", "README.md", "constraints.txt", "pyproject.toml"}
    for package in data["packages"]:
        folder = ROOT / package.removeprefix("silotune").removeprefix(".").replace(".", "/")
        for pattern in ("*.py", *data["package-data"].get(package, ())):
            needed |= {
                str(path.relative_to(ROOT))
                for path in folder.glob(pattern)
                if path.is_file() and path.name != ".dockerignore"
            }
    needed &= set(tracked())
    assert len(needed) > 200
    assert needed <= included(context), needed - included(context)


def test_the_dockerfiles_are_built_in_the_folder_that_has_the_list() -> None:
    for room in ("client", "server"):
        compose = (ROOT / room / "deploy" / "compose.yaml").read_text()
        assert f"-f {room}/deploy/Dockerfile ." in compose
        assert "COPY . /src" in (ROOT / room / "deploy" / "Dockerfile").read_text()
