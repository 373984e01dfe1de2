"""`silotune completion`: what a shell is told, and by which script it asks."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from click.shell_completion import ShellComplete

from silotune.common.cli import completion
from silotune.common.cli.contract import recipe_files
from silotune.common.cli.main import NOUNS, PROGRAM, silotune
from silotune.common.contract.drafting import Answers
from silotune.common.errors import CODES
from silotune.simulations.comparison.export import contracts_of
from silotune.simulations.comparison.recipe import load_recipe, recipe_names
from silotune.simulations.datasets.catalog import SOURCES
from tests.conftest import Ran

Silotune = Callable[..., Ran]
ROOT = Path(__file__).parents[3]


def completed(*words: str) -> list[str]:
    """What is offered for the last of the words, in which only its beginning was typed."""
    asked = ShellComplete(silotune, {}, PROGRAM, "_SILOTUNE_COMPLETE")
    return [item.value for item in asked.get_completions(list(words[:-1]), words[-1])]


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["explain"], CODES),
        (["data", "fetch"], SOURCES),
        (["data", "fetch", "heart-disease"], SOURCES),
        (["sim", "run"], recipe_names()),
        (["sim", "export"], recipe_names()),
        (["contract", "show"], recipe_names()),
        (["contract", "validate"], recipe_names()),
        (["contract", "schema"], ["contract", "recipe", "server", "site", "study"]),
        (["contract", "new", "--task"], get_args(Answers.model_fields["task"].annotation)),
        (["sim", "compare"], [p.stem for p in (ROOT / "simulations/studies").glob("*.toml")]),
        (
            ["sim", "export", "heart-diagnosis", "--variant"],
            contracts_of(load_recipe("heart-diagnosis")),
        ),
        (["sim", "export", "--variant"], []),
        (["completion"], ["bash", "zsh", "fish"]),
        ([], [*NOUNS, *silotune.commands]),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_known_values_are_offered(words: list[str], values: object) -> None:
    offered = [value for value in completed(*words, "") if value]
    assert sorted(offered) == sorted(values)  # type: ignore[call-overload]


def test_only_what_begins_as_it_was_typed() -> None:
    assert completed("explain", "E60") == sorted(code for code in CODES if code[:3] == "E60")
    assert completed("contract", "show", "heart-") == ["heart-", "heart-diagnosis"]  # and files
    assert completed("ser") == ["server"]
    assert "--debug" in completed("--")


def test_runs_of_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "second", "\x1b[31mred", "a\nb"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "events.jsonl").touch()
    for verb in ("stop", "resume"):
        assert completed("server", verb, "--folder", str(tmp_path), "") == ["first", "second"]
        assert completed("server", verb, "--folder", str(tmp_path / "none"), "") == []
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            assert completed("server", verb, "s") == ["second"]


def test_the_first_word_is_completed_without_loading_what_it_runs() -> None:
    heavy = "[name for name in ('numpy', 'pydantic', 'torch') if name in sys.modules]"
    ask = "ShellComplete(silotune, {}, 'silotune', '').get_completions([], 's')"
    lines = [
        "import sys",
        "from click.shell_completion import ShellComplete",
        "from silotune.common.cli.main import silotune",
        f"print([item.value for item in {ask}], {heavy})",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "['server', 'sim', 'site'] []\n"


@pytest.mark.parametrize("shell", completion.INSTALL)
def test_a_script_says_how_to_install_it(run: Silotune, shell: str) -> None:
    code, out, _ = run("completion", shell)
    assert code == 0
    assert f"_SILOTUNE_COMPLETE={shell}_complete" in out
    assert f"\n# To install it: {completion.INSTALL[shell]}\n" in out
    assert f"$ {completion.INSTALL[shell]}" in run("completion", "--help")[1]
    assert run("completion", "tcsh")[0] == 2


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes_by_the_script(run: Silotune, tmp_path: Path) -> None:
    script = tmp_path / "silotune.bash"
    script.write_text(run("completion", "bash")[1])
    ask = (
        f'PATH="{Path(sys.executable).parent}:$PATH"; compopt() {{ :; }}; . "{script}"; '
        "COMP_WORDS=(silotune explain E30); COMP_CWORD=2; _silotune_completion silotune; "
        'echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [code for code in CODES if code.startswith("E30")]


def test_the_recipes_that_are_offered_are_those_that_there_are() -> None:
    assert sorted(recipe_files()) == recipe_names()
