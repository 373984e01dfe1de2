"""`--help` of every command: summaries are whole, defaults are shown, and examples are right."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from silotune.common.cli.main import NOUNS, silotune
from silotune.simulations.comparison.options import Options, comparing
from silotune.simulations.comparison.recipe import recipe_names
from silotune.simulations.study.config import study_file
from tests.conftest import Ran

WIDTH = 78  # click's, on a terminal of 80 columns
EXAMPLE = re.compile(r"\$ (silotune (?:.*\\\n)*.*)")
# The examples whose output is the same each time, but for what '…' stands for.
PRINTED = [
    "contract show",
    "contract validate",
    "explain",
    "privacy plan",
    "server init",
    "site init",
]


def commands(
    command: click.Command = silotune, parent: click.Context | None = None
) -> Iterator[click.Context]:
    """A context for every command, hidden ones left out."""
    context = click.Context(
        command,
        parent,
        info_name=command.name,
        terminal_width=WIDTH,
        **command.context_settings,  # type: ignore[arg-type]
    )
    yield context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            if not found.hidden:
                yield from commands(found, context)


def examples(context: click.Context) -> list[str]:
    """The commands that the help shows after `$` or `Example:`."""
    text = f"{context.command.help}\n{context.command.epilog or ''}".replace("Example:  ", "$ ")
    return [found.replace("\\\n", " ") for found in EXAMPLE.findall(text)]


CONTEXTS = {context.command_path: context for context in commands()}
EXAMPLES = [line for context in CONTEXTS.values() for line in examples(context)]


def test_every_command_is_looked_at() -> None:
    assert {path.split()[1] for path in CONTEXTS if " " in path} >= set(NOUNS)
    assert len(CONTEXTS) > 40
    assert len(EXAMPLES) > 35


@pytest.mark.parametrize("path", CONTEXTS)
def test_no_summary_is_cut(path: str) -> None:
    lines = CONTEXTS[path].get_help().splitlines()
    assert not [line for line in lines if line.endswith("...") and not line.startswith("Usage: ")]


def test_a_group_is_summed_up_alike_wherever_it_is_listed() -> None:
    with click.Context(silotune) as context:
        for name, (_, about) in NOUNS.items():
            command = silotune.get_command(context, name)
            assert command is not None
            assert command.get_short_help_str(WIDTH) == about


@pytest.mark.parametrize("path", CONTEXTS)
def test_every_default_is_shown(path: str) -> None:
    context = CONTEXTS[path]
    for option in context.command.params:
        if isinstance(option, click.Option) and not option.is_flag and not option.hidden:
            default = option.to_info_dict()["default"]
            record = option.get_help_record(context)
            assert record is not None
            if default not in (None, ()):
                assert f"[default: {default}" in record[1], option.name


@pytest.mark.parametrize("path", CONTEXTS)
def test_every_command_refuses_an_unknown_option_in_the_same_form(
    run: Callable[..., Ran], path: str
) -> None:
    _, *words = path.split()
    sentence = f"There is no option '--no-such' of `{path}`. Known: "
    code, out, err = run(*words, "--no-such")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"✗ E101 {sentence}")
    found = json.loads(run(*words, "--no-such", "--json")[2])["error"]
    assert found["code"] == "E101"
    assert found["message"].startswith(sentence)


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_is_a_command_that_can_be_read(
    example: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """click reads its options, arguments and values; nothing is carried out."""
    read: list[click.Context] = []
    monkeypatch.setattr(click.Command, "invoke", lambda _, context: read.append(context))
    _, *words = shlex.split(re.sub(r" >>? \S+$", "", example))  # without a file that is written to
    silotune.main(words, prog_name="silotune", standalone_mode=False)
    context = read[-1]
    assert not isinstance(context.command, click.Group)
    params = context.params
    if context.command_path in ("silotune sim run", "silotune sim export"):
        assert params["recipe"] in recipe_names() or Path(params["recipe"]).suffix == ".toml"
    if context.command_path == "silotune sim run":
        Options.parse(params["settings"])
    if context.command_path == "silotune sim compare":
        options = comparing(params["settings"])
        assert options.data or study_file(params["study"])


def test_an_example_of_a_command_or_option_that_is_not_there_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for wrong in ("silotune contract look x", "silotune contract show --shw x"):
        with pytest.raises(click.UsageError):
            test_every_example_is_a_command_that_can_be_read(wrong, monkeypatch)


@pytest.mark.parametrize("path", PRINTED)
def test_an_example_prints_what_the_help_shows(
    run: Callable[..., Ran], path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = inspect.cleandoc(CONTEXTS[f"silotune {path}"].command.help or "")
    _, _, example = text.partition("$ silotune ")
    command, _, shown = example.partition("\n")
    code, out, err = run(*shlex.split(command))
    assert (code, err) == (0, "")
    assert shown
    pattern = ".*".join(map(re.escape, shown.strip().split("…")))
    dots = re.DOTALL if shown.strip().endswith("\n…") else re.NOFLAG  # more lines than are shown
    assert re.fullmatch(pattern, out.strip(), dots)
