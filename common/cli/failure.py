"""How a command says that it failed: in text, or with --json as one JSON object.

Errors of the command line that click finds look like all others. Both forms go to standard error;
the JSON object is its last line, for warnings may stand before it.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import click

from silotune.common.errors import DataError, ErrorCode, SilotuneError, did_you_mean
from silotune.common.runtime.terminal import escaped, escaped_json

USAGE = 2  # the exit code


class Failure(NamedTuple):
    """An error as a person or a program is told of it.

    Attributes:
        code: of common/errors.py.
        problems: one sentence each; nearly always there is one.
        exit_code: of the process.
        local: what only the owner of the records may see. It is no part of the JSON object, which
            programs read and may log.
    """

    code: str
    problems: tuple[str, ...]
    exit_code: int = 1
    local: str = ""

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """What any error that ended a command is to a person."""
        if isinstance(error, SilotuneError):
            local = error.local if isinstance(error, DataError) else ""
            sentences = error.problems or [str(error)]
            return cls(error.code, tuple(sentences), error.exit_code, local)
        if isinstance(error, click.ClickException):
            return _of_click(error)
        if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
            file = os.fsdecode(error.filename)
            user = f"This command runs as user {os.geteuid()}."
            return cls(ErrorCode.FILE_ACCESS_DENIED, (f"{file}: {error.strerror}. {user}",))
        return cls(
            ErrorCode.UNEXPECTED,
            (
                f"An unexpected failure ({type(error).__name__}). Run again with --debug to see "
                "where.",
            ),
        )

    def text(self) -> str:
        """The lines for a person. None of what they quote looks like a line of ours."""
        lines = [escaped(problem, lines=False) for problem in self.problems]
        lines[0] = f"✗ {self.code} {lines[0]}"
        if self.local:
            lines.append("  on your screen only: " + self.local.replace("\n", "\n  "))
        return "\n".join(lines)

    def json(self) -> str:
        """The object for a program, in one line."""
        error: dict[str, Any] = {"code": self.code, "message": "\n".join(self.problems)}
        if len(self.problems) > 1:
            error["problems"] = list(self.problems)
        return escaped_json({"error": error | {"exit_code": self.exit_code}})


def wants_json(words: list[str]) -> bool:
    """Whether the words of a command ask for JSON, also where click could not read them."""
    options = words[: words.index("--")] if "--" in words else words
    return "--json" in options


def _of_click(error: click.ClickException) -> Failure:
    context = error.ctx if isinstance(error, click.UsageError) else None
    said = error.format_message().rstrip(".")
    if context is None:  # click does not always say which command it was reading
        return Failure(
            ErrorCode.COMMAND_LINE_INVALID,
            (f"{said}. The command's --help describes its options.",),
            USAGE,
        )
    command, path = context.command, context.command_path
    if isinstance(error, click.NoSuchCommand) and isinstance(command, click.Group):
        known = command.list_commands(context)
        _, *groups = path.split()
        sentence = (
            f"There is no command '{' '.join([*groups, error.command_name])}'."
            f"{did_you_mean(error.command_name, known)} Known: {', '.join(known)}."
        )
        return Failure(ErrorCode.UNKNOWN_NAME, (sentence,), USAGE)
    if isinstance(error, click.NoSuchOption):
        known = [
            max(option.opts, key=len)
            for option in command.get_params(context)
            if isinstance(option, click.Option) and not option.hidden
        ]
        sentence = (
            f"There is no option '{error.option_name}' of `{path}`."
            f"{did_you_mean(error.option_name, known)} Known: {', '.join(known)}."
        )
        return Failure(ErrorCode.UNKNOWN_NAME, (sentence,), USAGE)
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    found = error.param if isinstance(error, click.BadParameter) else None
    if found is None:
        return Failure(ErrorCode.COMMAND_LINE_INVALID, (f"{said}. Usage: `{usage}`",), USAGE)
    option = isinstance(found, click.Option)
    name = max(found.opts, key=len) if option else found.human_readable_name
    if isinstance(error, click.MissingParameter):
        sentence = f"`{path}` lacks {name}: {found.help or ''} Usage: `{usage}`"
    else:
        assert isinstance(error, click.BadParameter)
        sentence = f"{name} of `{path}`: {error.message} `{path} --help` describes it."
    return Failure(ErrorCode.COMMAND_LINE_INVALID, (sentence,), USAGE)
