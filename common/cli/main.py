"""`silotune`: noun, then verb. Each noun's commands live with their side and load when used.

Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted. Errors are one sentence with a code that
`silotune explain` knows, and with --json one JSON object on standard error (failure.py); a
traceback shows only with --debug.
"""

from __future__ import annotations

import functools
import importlib
import shlex
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
from click.shell_completion import CompletionItem

from silotune.common.cli.completion import known
from silotune.common.cli.failure import USAGE, Failure, wants_json
from silotune.common.cli.options import JSON
from silotune.common.errors import CODES, ErrorCode, UsageError, did_you_mean
from silotune.common.runtime.terminal import echo, escaped_json

if TYPE_CHECKING:
    from silotune.common.contract.contract import Contract
    from silotune.common.data.text_decoding import Reading

PROGRAM = "silotune"
CLOSE_CODE = 0.8  # codes are short: one of four characters in common says nothing
F = TypeVar("F", bound=Callable[..., Any])

# Named, not imported: a side loads only when its noun is used, so --help takes no time.
NOUNS = {
    "adapter": ("silotune.common.cli.adapter", "Use the adapter of a run."),
    "completion": (
        "silotune.common.cli.completion",
        "Print a script by which a shell completes commands, options and values.",
    ),
    "contract": ("silotune.common.cli.contract", "Draft, show, validate or tune a contract."),
    "data": ("silotune.simulations.cli", "List and fetch public data and models."),
    "doctor": ("silotune.common.cli.doctor", "Check this machine and this installation."),
    "model": ("silotune.common.cli.model", "Check the folder of a base model."),
    "sim": ("silotune.simulations.cli", "Run recipes on this machine."),
    "privacy": ("silotune.client.cli.privacy", "Look at the privacy ledger, or plan a budget."),
    "server": ("silotune.server.cli", "Run the server of a federation."),
    "site": ("silotune.client.cli.site", "Run a site."),
}
# What `contract validate` asks, named for the same reason: what a site would refuse of a contract.
CONTRACT_CHECK = "silotune.client.operations.contract_check"


class Nouns(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*NOUNS, *super().list_commands(ctx)])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in NOUNS:
            return super().get_command(ctx, cmd_name)
        module = importlib.import_module(NOUNS[cmd_name][0])
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(self._listed())

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[str]]:
        found = [
            CompletionItem(name, help=about)
            for name, about in self._listed()
            if name.startswith(incomplete)
        ]
        return found + click.Command.shell_complete(self, ctx, incomplete)  # the options

    def _listed(self) -> list[tuple[str, str]]:
        """Each command and what it is for."""
        rows = [(name, about) for name, (_, about) in NOUNS.items()]
        return sorted(rows + [(n, c.get_short_help_str()) for n, c in self.commands.items()])


@click.group(
    cls=Nouns,
    epilog="Example:  silotune sim run heart-diagnosis",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--debug", is_flag=True, help="Show the Python traceback of an error.")
@click.version_option(package_name="silotune", help="Print the version of Silotune and exit.")
def silotune(debug: bool) -> None:
    """Federated, differentially private fine-tuning across institutions."""


@silotune.command()
@click.argument(
    "code", shell_complete=known(lambda _: CODES), help="A code as errors show it, such as E302."
)
@JSON
def explain(code: str, as_json: bool) -> None:
    """Explain an error code, offline.

    \b
    $ silotune explain E601
    E601  The run directory already holds a run, or is not a run.
    """
    code = code.upper()
    if code not in CODES:
        raise UsageError(
            f"There is no code '{code}'.{did_you_mean(code, CODES, CLOSE_CODE)} "
            f"Known: {', '.join(CODES)}."
        )
    text = CODES[ErrorCode(code)]
    emit({"code": code, "text": text}, as_json, f"{code}  {text}")


def reading_options(command: F) -> F:
    """Adds --encoding and --delimiter, of the file that a command reads, as `reading`."""

    @click.option(
        "--encoding", help="Encoding of a text file that is not UTF-8: cp1252, latin-1, …"
    )
    @click.option(
        "--delimiter", help="Delimiter of a CSV file if its header does not show it: , ; tab or |"
    )
    @functools.wraps(command)
    def reads(*words: Any, encoding: str | None, delimiter: str | None, **more: Any) -> Any:
        from silotune.common.data.text_decoding import Reading

        return command(*words, reading=Reading.of(encoding, delimiter, "--{key} '{value}'"), **more)

    return cast(F, reads)


def reading_words(reading: Reading, option: str) -> str:
    """The options by which another command reads the same file likewise, for a line of advice;
    option: '--{key} {value}'. Begins with a space, or is ''."""
    given = {
        "encoding": reading.encoding if reading.encoding != "utf-8" else "",
        "delimiter": {"\t": "tab"}.get(reading.delimiter or "", reading.delimiter or ""),
    }
    return "".join(
        " " + option.format(key=key, value=shlex.quote(value))
        for key, value in given.items()
        if value
    )


def emit(data: Any, as_json: bool, text: str) -> None:
    """Print JSON or text."""
    echo(escaped_json(data) if as_json else text)


def _show_traceback(*error: Any) -> None:
    echo("".join(traceback.format_exception(*error)).rstrip("\n"), err=True)


def warning_lines(contract: Contract) -> list[str]:
    """What those who agree to a contract should know of it, each as a line of its own."""
    return [f"! {warning}" for warning in contract.warnings]


def command(*words: object) -> str:
    """A command of `silotune` that can be pasted into a shell. words: as of `next_step`."""
    return shlex.join(["silotune", *map(str, words)])


def next_step(*words: object, first: str = "", note: str = "") -> str:
    """The line that says what to do next: a command of `silotune` that can be pasted into a shell.

    Every such line is made here, and tests/test_next_steps.py runs each of them.

    Args:
        words: the command without `silotune`. One in capitals stands for what the person knows.
        first: what to do before it, if that is no command.
        note: what else there is to know, behind the command.
    """
    return f"next:   {first}{command(*words)}" + (f"   ({note})" if note else "")


def main() -> None:
    """The entry point: turns errors into one sentence and an exit code."""
    args = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(args) < len(sys.argv) - 1  # wherever it stands
    sys.excepthook = _show_traceback
    try:
        silotune.main(args, prog_name=PROGRAM, standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort) as error:
        # click makes an Abort of the other; who was interrupted may have said what is lost.
        echo(str(error.__cause__ or error) or "Stopped.", err=True)
        sys.exit(130)
    except click.exceptions.NoArgsIsHelpError as error:
        echo(error.format_message(), err=True)
        sys.exit(USAGE)
    except Exception as error:
        if debug and not isinstance(error, click.ClickException):
            raise
        failure = Failure.of(error)
        echo(failure.json() if wants_json(args) else failure.text(), err=True)
        sys.exit(failure.exit_code)
