"""Completion in a shell: the script that a shell reads, and the values that commands know.

click completes commands, options and files by itself. An argument or option whose values are known
says so with `known`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import click
from click.shell_completion import CompletionItem, get_completion_class

from silotune.common.runtime.terminal import echo

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem[str]]]
INSTALL = {
    "bash": "silotune completion bash >> ~/.bashrc",
    "zsh": "silotune completion zsh >> ~/.zshrc",
    "fish": "silotune completion fish > ~/.config/fish/completions/silotune.fish",
}
NOTES = {
    "zsh": "compinit has to come before it there: autoload -Uz compinit && compinit",
}


def known(names: Callable[[click.Context], Iterable[str]], *, files: bool = False) -> Complete:
    """The `shell_complete` of an argument or an option.

    Args:
        names: its values, from the context of what was typed before. Called while a person waits.
        files: whether the name of a file is one, too.
    """

    def complete(
        context: click.Context, _: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        # Files first: bash drops what stands before them.
        items = [CompletionItem(incomplete, type="file")] if files else []
        return items + [
            CompletionItem(name) for name in names(context) if name.startswith(incomplete)
        ]

    return complete


@click.command()
@click.argument(
    "shell",
    type=click.Choice(list(INSTALL)),
    help="The shell whose script is printed; `echo $SHELL` shows yours.",
)
def completion(shell: str) -> None:
    """Print a script by which a shell completes commands, options and values.

    Its last lines say how to install it. bash has to be 4.4 or newer.

    \b
    $ silotune completion bash >> ~/.bashrc
    $ silotune completion zsh >> ~/.zshrc
    $ silotune completion fish > ~/.config/fish/completions/silotune.fish
    """
    from silotune.common.cli.main import PROGRAM, silotune

    found = get_completion_class(shell)
    assert found is not None
    script = found(silotune, {}, PROGRAM, f"_{PROGRAM.upper()}_COMPLETE").source().rstrip("\n")
    lines = [f"# To install it: {INSTALL[shell]}", "# Then open a new shell."]
    if note := NOTES.get(shell):
        lines.insert(1, f"# {note}")
    echo("\n".join([script, "", *lines]))
