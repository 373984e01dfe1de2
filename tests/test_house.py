"""The house: which room may import which, what the wheel holds, what the README shows."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "common": {"common"},
    "client": {"client", "common"},
    "server": {"server", "common"},
    "simulations": {"simulations", "client", "server", "common"},
}
MAY_IMPORT_FLWR = {
    "server/flower/server_app.py",
    "server/flower/strategy.py",
    "client/relay/client_app.py",
    "client/operations/node_admission.py",
    "simulations/execution/flower_engine.py",
    "simulations/benchmarks/secagg.py",  # Flower's own protocol beside ours
    "simulations/benchmarks/sim_stock.py",  # its simulation
    "simulations/benchmarks/stock_app.py",  # and a Flower app as its documentation teaches
}


def modules() -> list[str]:
    return sorted(
        str(path.relative_to(ROOT)) for room in ROOMS for path in (ROOT / room).rglob("*.py")
    )


def imports(module: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{a.name}" for a in node.names}
    return found


@pytest.mark.parametrize("module", modules())
def test_imports_go_in_the_allowed_direction(module: str) -> None:
    allowed = ROOMS[module.split("/", maxsplit=1)[0]]
    names = imports(module)
    rooms = {name.split(".")[1] for name in names if name.startswith("silotune.")}
    assert rooms <= allowed, f"{module} imports {rooms - allowed}"
    tops = {name.split(".")[0] for name in names}
    if module not in MAY_IMPORT_FLWR:
        assert "flwr" not in tops, f"{module} imports flwr"
    if not module.startswith(("client/", "simulations/benchmarks/")):
        assert "opacus" not in tops, f"{module} imports opacus"
    assert not tops & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}


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
        ast.unparse(node.func)
        for node in ast.walk(ast.parse((ROOT / module).read_text()))
        if isinstance(node, ast.Call)
    }
    names = imports(module)
    assert not calls & {"print", "click.echo", "click.secho", "sys.stdout.write"}, module
    assert not {name for name in names if name.startswith("rich")}, module


def test_the_wheel_holds_every_module_and_data_file(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            str(tmp_path),
            str(ROOT),
        ],
        check=True,
        capture_output=True,
    )
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        inside = {name.removeprefix("silotune/") for name in wheel.namelist()}
    files = {
        str(path.relative_to(ROOT))
        for room in ROOMS
        for pattern in ("*.py", "*.toml", "*.md", "*.j2", "py.typed")
        for path in (ROOT / room).rglob(pattern)
        if "studies" not in path.parts or path.suffix == ".toml"  # results stay out
    }
    assert files <= inside, f"not in the wheel: {sorted(files - inside)}"


def test_every_package_is_listed() -> None:
    listed = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    found = {
        "silotune." + ".".join(path.parent.relative_to(ROOT).parts)
        for room in ROOMS
        for path in (ROOT / room).rglob("__init__.py")
    }
    assert listed == found
