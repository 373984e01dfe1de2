"""The package layout: which folder may import which, what the wheel holds, what reaches a
screen."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "common": {"common"},
    "client": {"client", "common"},
    "server": {"server", "common"},
    "simulations": {"simulations", "client", "server", "common"},
}
# A folder imports itself and those above it in its package's list. A module that lies in no folder
# (server/cli.py) has its own place in the list; FIRST stands for those of common/.
FIRST = ""
# The package `silotune` itself: its modules lie in a folder of the package that imports all.
API = "simulations/api/"
FOLDERS = {
    "common": [
        FIRST, "runtime", "formats", "config", "secagg", "planning", "contract", "protocol", "data",
        "tasks", "model_files", "tokenization", "models", "inference", "cli",
    ],
    "client": [
        "records", "privacy", "relay", "site", "training", "preparation", "worker", "operations",
        "cli",
    ],
    "server": ["storage", "aggregation", "rounds", "operations", "flower", "report", "cli"],
    "simulations": [
        "recipes", "datasets", "attacks", "execution", "verdict", "comparison", "flower_app",
        "study", "benchmarks", "cli", "api",
    ],
}  # fmt: skip
MOST_MODULES = 13  # of a folder
# Modules that are named in strings, so that they load only when they are asked for.
NAMED = {
    ("common/cli/main.py", "silotune.client.cli.privacy"): "the group of commands",
    ("common/cli/main.py", "silotune.client.cli.site"): "the group of commands",
    ("common/cli/main.py", "silotune.server.cli"): "the group of commands",
    ("common/cli/main.py", "silotune.simulations.cli"): "the group of commands",
    ("common/cli/main.py", "silotune.client.operations.contract_check"): "`contract validate`",
    ("common/cli/contract.py", "silotune.client.operations.adapter_plan"): "`contract new`",
    ("common/cli/contract.py", "silotune.simulations.recipes"): "recipes are contracts by name",
    ("common/cli/contract.py", "silotune.client.site.policy"): "`contract schema site`",
    ("common/cli/contract.py", "silotune.server.operations.server_folder"): "`… schema server`",
    ("common/cli/contract.py", "silotune.simulations.recipes.recipe_config"): "`… schema recipe`",
    ("common/cli/contract.py", "silotune.simulations.study.config"): "`contract schema study`",
    ("common/cli/contract.py", "silotune.simulations.study.tuned_contract"): "`contract tune`",
    ("common/cli/contract.py", "silotune.simulations.study.tuning"): "`contract tune`",
    ("common/model_files/model_source.py", "silotune.simulations.datasets.catalog"): "the cache",
    ("server/flower/app_bundle.py", "silotune.client.relay.client_app"): "a site's half of the app",
}
MAY_IMPORT_FLWR = {
    "server/flower/server_app.py",
    "server/flower/strategy.py",
    "client/relay/client_app.py",
    "client/operations/node_admission.py",
    "simulations/execution/flower_engine.py",
    "simulations/flower_app/client_app.py",
    "simulations/flower_app/server_app.py",
    "simulations/flower_app/sites.py",
    "simulations/flower_app/sockets.py",
    "simulations/benchmarks/secagg.py",  # Flower's own protocol beside ours
    "simulations/benchmarks/sim_stock.py",  # its simulation
    "simulations/benchmarks/stock_app.py",  # and a Flower app as its documentation teaches
}
# What a part of the project never loads: the boundary, and what has to start fast.
NO_TORCH = (
    "common/planning/",
    "common/contract/",
    "common/protocol/",
    "common/secagg/",
    "client/relay/",
)


def modules() -> list[str]:
    return sorted(
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    )


def tree_of(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text(encoding="utf-8"))


def imports(module: str) -> set[str]:
    found = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{a.name}" for a in node.names}
    return found


def named_in_strings(module: str) -> set[str]:
    found = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r"silotune\.[a-z_]+(?:\.[a-z_]+)*", node.value))
    return {name for name in found if path_of(name) is not None}


def path_of(name: str) -> Path | None:
    """The file or folder of a name `silotune.….…`; None if there is none."""
    path = ROOT.joinpath(*name.split(".")[1:])
    in_api = ROOT.joinpath(API, *name.split(".")[1:]).with_suffix(".py")
    for found in (path.with_suffix(".py"), path, in_api):
        if found.exists() and found != ROOT:
            return found
    return None


def name_of(module: str) -> str:
    """The name by which a file is imported."""
    path = module.removeprefix(API).removesuffix(".py").removesuffix("__init__").rstrip("/")
    return ".".join(["silotune", *filter(None, path.split("/"))])


def place(name: str) -> tuple[str, str]:
    """Package and folder of a module's file or of its name."""
    parts = name.removesuffix(".py").split("/") if "/" in name else name.split(".")[1:]
    if parts[0] not in PACKAGES:
        return "simulations", "api"
    package, rest = parts[0], parts[1:]
    if rest and rest[0] in FOLDERS[package]:
        return package, rest[0]
    return package, FIRST


@pytest.mark.parametrize("module", modules())
def test_imports_go_in_the_allowed_direction(module: str) -> None:
    package, folder = place(module)
    names = imports(module)
    for name in names | named_in_strings(module):
        if name.count(".") < 2 or not name.startswith("silotune.") or (module, name) in NAMED:
            continue
        its_package, its_folder = place(name)
        assert its_package in PACKAGES[package], f"{module} imports {name}"
        if its_package == package and module != f"{package}/__init__.py":
            order = FOLDERS[package]
            assert order.index(its_folder) <= order.index(folder), f"{module} imports {name}"
    tops = {name.split(".")[0] for name in names}
    if module not in MAY_IMPORT_FLWR:
        assert "flwr" not in tops, f"{module} imports flwr"
    if not module.startswith(("client/", "simulations/benchmarks/")):
        assert "opacus" not in tops, f"{module} imports opacus"
    if module.startswith(NO_TORCH):
        assert "torch" not in tops, f"{module} imports torch"
    assert not tops & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}


def first_imports(body: list[ast.stmt]) -> Iterator[str]:
    """What a module imports while it is being imported."""
    for node in body:
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from first_imports([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            yield from first_imports(node.body)


def test_no_module_imports_itself_by_way_of_others() -> None:
    names = {name_of(m): m for m in modules()}
    graph = {
        name: {i for i in first_imports(tree_of(m).body) if i in names and i != name}
        for name, m in names.items()
    }
    TopologicalSorter(graph).prepare()  # CycleError names the modules


def test_every_module_that_is_named_in_a_string_is_listed_once() -> None:
    named = {(module, name) for module in modules() for name in named_in_strings(module)}
    assert set(NAMED) <= named


@pytest.mark.parametrize("package", PACKAGES)
def test_each_module_lies_in_a_folder_of_the_list(package: str) -> None:
    inside = [m for m in modules() if m.startswith(f"{package}/") and not m.endswith("__init__.py")]
    for module in inside:
        _, folder = place(module)
        assert folder in FOLDERS[package], module
        assert folder != FIRST or module in ("common/errors.py", "common/signing.py"), module
    sizes = Counter(place(module)[1] for module in inside)
    sizes.pop("benchmarks", None)
    assert max(sizes.values()) <= MOST_MODULES, sizes


def test_tests_lie_in_the_folders_of_what_they_test() -> None:
    for path in (ROOT / "tests").rglob("test_*.py"):
        parts = path.relative_to(ROOT / "tests").parts
        if parts[0] in PACKAGES:
            assert (len(parts) == 2 and parts[1] == "test_cli.py") or (
                len(parts) == 3 and (ROOT / parts[0] / parts[1]).is_dir()
            ), path


PRINTS = {
    "common/runtime/terminal.py",  # `echo` itself
    "simulations/comparison/progress.py",  # rich, by a console that escapes
}


@pytest.mark.parametrize("module", modules())
def test_text_reaches_a_terminal_escaped_only(module: str) -> None:
    """By `echo` of common/runtime/terminal.py: names, files and peers can hold control
    sequences."""
    if module in PRINTS or module.startswith("simulations/benchmarks/"):
        return
    calls = {
        ast.unparse(node.func) for node in ast.walk(tree_of(module)) if isinstance(node, ast.Call)
    }
    names = imports(module)
    assert not calls & {"print", "click.echo", "click.secho", "sys.stdout.write"}, module
    assert not {name for name in names if name.startswith("rich")}, module


def test_the_wheel_holds_every_module_and_data_file(tmp_path: Path) -> None:
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [sys.executable, *command, "--wheel-dir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        inside = {name.removeprefix("silotune/") for name in wheel.namelist()}
    files = {
        str(path.relative_to(ROOT)).removeprefix(API)
        for package in PACKAGES
        for pattern in ("*.py", "*.toml", "*.md", "*.j2", "py.typed")
        for path in (ROOT / package).rglob(pattern)
        if "studies" not in path.parts or path.suffix == ".toml"  # results stay out
    }
    assert files <= inside, f"not in the wheel: {sorted(files - inside)}"


def test_every_package_is_listed() -> None:
    listed = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    found = {
        name_of(str(path.relative_to(ROOT)))
        for package in PACKAGES
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert listed == found
