"""The notebooks in docs/: each runs from its first cell to its last, and is stored with outputs."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.test_readme import LINK, NOTEBOOKS


def name(path: Path) -> str:
    return path.stem


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["notebook-privacy", "notebook-quickstart"]


@pytest.mark.nightly  # a minute each
@pytest.mark.download
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter's packages
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_every_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    work = tmp_path / "work"
    work.mkdir()
    notebook = read(path)
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(work)}}
    )
    client.execute(env=dict(os.environ))
    stored = [kinds(cell) for cell in read(path).cells]
    assert [kinds(cell) for cell in notebook.cells] == stored


def kinds(cell: nbformat.NotebookNode) -> list[tuple[str, tuple[str, ...]]]:
    """What a cell's outputs are: of what a kernel prints in pieces, one."""
    found = [
        (out.output_type, tuple(sorted(out.get("data", {})))) for out in cell.get("outputs", ())
    ]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_a_notebook_is_stored_with_outputs_and_without_traces_of_a_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"[\"\s](?:/tmp|/home|/root|/work)/", text)
    cells = read(path).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.outputs for cell in code)
    assert not any(out.output_type == "error" for cell in code for out in cell.outputs)
    assert not any(cell.metadata for cell in cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_every_page_that_a_notebook_names_exists(path: Path) -> None:
    pages = [link for cell in read(path).cells for link in LINK.findall(cell.source)]
    assert pages
    missing = [page for page in pages if not (path.parent / page).exists()]
    assert not missing
