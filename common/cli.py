"""`silotune`: noun, then verb. Each noun's commands live with their side and load when used.

Exit codes: 0 done, 1 failed, 2 usage. Errors are one sentence with a code that
`silotune explain` knows; a traceback shows only with --debug.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import click

from silotune.common.errors import CODES, DataError, SilotuneError, UsageError, did_you_mean

# Named, not imported: a side loads only when its noun is used, so --help takes no time.
NOUNS = {
    "adapter": ("silotune.common.adapter_cli", "use what a run has made"),
    "contract": ("silotune.common.contract_cli", "show or validate a contract"),
    "data": ("silotune.simulations.cli", "list and fetch public data and models"),
    "model": ("silotune.common.model_cli", "check the folder of a base model"),
    "sim": ("silotune.simulations.cli", "run recipes on this machine"),
    "privacy": ("silotune.client.privacy_cli", "see what is spent, plan a budget"),
    "server": ("silotune.server.cli", "run the server of a federation"),
    "site": ("silotune.client.cli", "run a site"),
}
# What `contract validate` asks, named for the same reason: what a site would refuse of a contract,
# and where the folder of a packaged model is.
CONTRACT_CHECK = "silotune.client.contract_check"
MODEL_SOURCES = "silotune.simulations.data"


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
        rows = [(name, about) for name, (_, about) in NOUNS.items()]
        rows += [(n, c.get_short_help_str()) for n, c in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(sorted(rows))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None:
            known = self.list_commands(ctx)
            raise UsageError(
                f"There is no command '{args[0]}'.{did_you_mean(args[0], known)} "
                f"Known: {', '.join(known)}."
            )
        return super().resolve_command(ctx, args)


@click.group(
    cls=Nouns,
    epilog="Example:  silotune sim run heart-diagnosis",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="silotune")
def silotune(debug: bool) -> None:
    """Federated, differentially private fine-tuning across institutions."""


@silotune.command()
@click.argument("code")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(code: str, as_json: bool) -> None:
    """Explain an error code, offline."""
    code = code.upper()
    if code not in CODES:
        raise UsageError(
            f"There is no code '{code}'.{did_you_mean(code, CODES)} Known: {', '.join(CODES)}."
        )
    emit({"code": code, "text": CODES[code]}, as_json, f"{code}  {CODES[code]}")


def emit(data: Any, as_json: bool, text: str) -> None:
    """Print JSON or text."""
    click.echo(json.dumps(data, ensure_ascii=False) if as_json else text)


def main() -> None:
    """The entry point: turns errors into one sentence and an exit code."""
    args = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(args) < len(sys.argv) - 1  # wherever it stands
    try:
        silotune.main(args, standalone_mode=False)
    except SilotuneError as error:
        if debug:
            raise
        click.echo(f"✗ {error.code} {error}", err=True)
        if isinstance(error, DataError) and error.local:
            click.echo(f"  on your screen only: {error.local}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("Stopped.", err=True)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        click.echo(
            f"✗ E500 An unexpected failure ({type(error).__name__}). Run again with --debug to "
            "see where.", err=True,
        )
        sys.exit(1)
