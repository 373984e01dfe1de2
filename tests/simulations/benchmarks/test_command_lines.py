"""Every program of the repository that a person starts with `python -m` answers --help."""

from __future__ import annotations

import inspect
import runpy
import sys
from importlib import import_module

import pytest

from tests.test_layout import ROOT, name_of


def programs() -> list[str]:
    """Modules with a main part, of benchmarks and of the tests' tools, and two others."""
    files = [*(ROOT / "simulations" / "benchmarks").glob("*.py"), *(ROOT / "tests").glob("*.py")]
    files.append(ROOT / "tests" / "system" / "soak.py")
    relative = [
        str(file.relative_to(ROOT))
        for file in files
        if '\nif __name__ == "__main__":' in file.read_text(encoding="utf-8")
    ]
    names = [
        name.removesuffix(".py").replace("/", ".") if name.startswith("tests/") else name_of(name)
        for name in relative
    ]
    names.append("silotune.simulations.comparison.recipe_table")
    return sorted([*names, "silotune.simulations.datasets.character_model"])


@pytest.mark.parametrize("name", programs())
def test_a_program_answers_help_and_refuses_an_unknown_option(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    about = inspect.getdoc(import_module(name))
    assert about is not None
    for words, code in ((["--help"], 0), (["--no-such-option"], 2)):
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "argv", [name, *words])
        with pytest.raises(SystemExit) as stop:
            runpy.run_module(name, run_name="__main__")
        assert stop.value.code == code
        shown = capsys.readouterr()
        if code == 0:
            assert about.splitlines()[0] in shown.out
        import_module(name)


def test_the_programs_are_found() -> None:
    assert len(programs()) > 12
    assert {"silotune.simulations.benchmarks.dp", "tests.system.soak"} <= set(programs())
