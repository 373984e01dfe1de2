"""The documentation's site: the generated pages are whole, and every page is in its contents."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from types import ModuleType

import click
import pytest

from silotune.client.operations.telemetry import WRITTEN
from silotune.client.site.policy import Permits
from silotune.common.contract.contract import Contract
from silotune.common.contract.training import Phase
from silotune.common.errors import CODES
from tests.test_readme import GENERATED, NOTEBOOKS, NOTES, PAGES, ROOT

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """docs/generate.py, which is in no package. It needs no Sphinx."""
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(generate: ModuleType) -> dict[str, str]:
    made: dict[str, str] = generate.pages()
    return made


def test_the_generated_pages_are_those_that_git_ignores(pages: dict[str, str]) -> None:
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    made = {f"docs/reference/{name}" for name in pages}
    assert made == {line for line in ignored if line.startswith("docs/")}
    assert {name for name in made if name.endswith(".md")} == GENERATED


def test_every_error_code_has_its_text(pages: dict[str, str]) -> None:
    for code, text in CODES.items():
        assert f"{code}\n: {text}\n" in pages["errors.md"]


def test_every_command_and_option_is_there(generate: ModuleType, pages: dict[str, str]) -> None:
    found = list(generate.commands())
    assert len(found) > 30
    for path, command in found:
        assert re.search(rf"^##+ {' '.join(path)}$", pages["cli.md"], re.M), path
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert f"`{parameter.opts[0]}`" in pages["cli.md"], (path, parameter.opts)
            elif isinstance(parameter, click.Argument):
                assert f" | {parameter.help} |" in pages["cli.md"], (path, parameter.name)


@pytest.mark.parametrize(
    ("page", "keys"),
    [
        ("contract.md", [*Contract.model_fields, *Phase.model_fields]),
        ("site.md", [*Permits.model_fields]),
        ("metrics.md", [*WRITTEN, "silotune_server_run_stopped", "silotune_server_run_rejected"]),
    ],
)
def test_every_key_has_a_row(pages: dict[str, str], page: str, keys: list[str]) -> None:
    for key in keys:
        assert f"| `{key}` |" in pages[page], key


def test_every_key_of_a_result_is_on_its_page() -> None:
    """The keys of the tables that `sim run` writes, from its source."""
    page, found = (DOCS / "reference" / "result.md").read_text(encoding="utf-8"), set[str]()
    for name in ("run.py", "summary.py"):
        tree = ast.parse((ROOT / "simulations" / "comparison" / name).read_text(encoding="utf-8"))
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and function.name in (
                "run",
                "summarise",
                "_variant_row",
            ):
                for node in ast.walk(function):
                    if isinstance(node, ast.Dict):
                        found |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
    assert len(found) > 40
    named = set(re.findall(r"`(\w+)`", page))
    assert not found - named - {"site"}


def test_every_page_is_in_the_contents_once() -> None:
    listed: list[str] = []
    for page in (DOCS / "index.md", DOCS / "results" / "studies" / "index.md"):
        for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text("utf-8"), re.S):
            names = [line for line in block.splitlines() if line and not line.startswith(":")]
            where = page.parent.relative_to(ROOT)
            listed += [(where / name).as_posix() for name in names]
    assert len(listed) == len(set(listed))
    files = {path.relative_to(ROOT).as_posix() for path in (*PAGES, *NOTEBOOKS)} | GENERATED
    pages = files - {"README.md", "docs/index.md"} - NOTES
    assert set(listed) == {name.rpartition(".")[0] for name in pages}
