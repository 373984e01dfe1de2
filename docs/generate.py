"""The reference pages that are made from the code when the site is built.

`python docs/generate.py` writes them. A setting or an option without a description is an error.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click
from click.testing import CliRunner
from jinja2 import Template
from pydantic import BaseModel

from silotune.client.operations import telemetry
from silotune.client.site import folder as site_folder
from silotune.client.site.policy import Policy
from silotune.common import errors
from silotune.common.cli.main import silotune
from silotune.common.contract.contract import Contract
from silotune.server.cli import init as server_init
from silotune.server.operations.server_folder import ServerFolder, ServerSettings
from silotune.server.operations.telemetry import ServerMonitor
from silotune.server.storage import events
from silotune.simulations.recipes.recipe_config import RecipeConfig
from silotune.simulations.study.config import Study

NOTE = "*This page is generated from the code.*"
NONE = "–"
Schema = Mapping[str, Any]


def write(folder: Path) -> None:
    """Write every page; one that has not changed keeps its time, so that Sphinx skips it.
    ValueError names the settings and options of which nothing is said."""
    if missing := list(undescribed()):
        raise ValueError("no description: " + ", ".join(missing))
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Each generated file's name and text."""
    return {
        "cli.md": cli(),
        "contract.md": contract(),
        "contract.schema.json": CliRunner().invoke(silotune, ["contract", "schema"]).output,
        "site.md": site(),
        "server.md": server(),
        "errors.md": codes(),
        "metrics.md": metrics(),
    }


# Settings


class Setting(NamedTuple):
    """One key of a configuration file."""

    model: str
    key: str
    kind: str
    default: str
    about: str


def prose(text: str) -> str:
    """A docstring as Markdown: a table that is aligned by spaces becomes a block of text."""
    made = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        lines = paragraph.splitlines()
        at = next((i for i, line in enumerate(lines) if re.match(r"\S+ {2,}\S", line)), None)
        if at is None:
            made.append(paragraph)
        else:
            made.append("\n".join(lines[:at]))
            made.append("```text\n" + "\n".join(lines[at:]) + "\n```")
    return "\n\n".join(filter(None, made))


def settings(model: type[BaseModel]) -> Iterator[tuple[str, str, list[Setting]]]:
    """Each table of a file: its title, its docstring, its keys."""
    schema = model.model_json_schema()
    defs = schema.get("$defs", {})
    seen: set[str] = set()

    def table(path: str, part: Schema, title: str) -> Iterator[tuple[str, str, list[Setting]]]:
        properties = part.get("properties", {})
        rows, below = [], []
        for key, value in properties.items():
            kind, references, many = kind_of(value, defs)
            constant = value.get("const")
            default = default_of(value, key in part.get("required", ()), constant)
            rows.append(Setting(title, key, kind, default, value.get("description", "")))
            for reference in references:
                below.append((f"{path}.{key}".lstrip("."), reference, many))
        yield path, part.get("description", ""), rows
        for where, reference, many in below:
            found = defs[reference]
            if (mark := f"{where}:{reference}") not in seen:
                seen.add(mark)
                name = f"[[{where}]]" if many else f"[{where}]"
                kinds = found.get("properties", {}).get("kind", {})
                alternatives = [kinds["const"]] if "const" in kinds else []
                alternatives += [v for part in kinds.get("anyOf", []) for v in part.get("enum", [])]
                if alternatives and [w for w, *_ in below].count(where) > 1:
                    name += " kind = " + " or ".join(f'"{v}"' for v in alternatives)
                yield from renamed(table(where, found, found.get("title", reference)), name)

    def renamed(
        parts: Iterator[tuple[str, str, list[Setting]]], name: str
    ) -> Iterator[tuple[str, str, list[Setting]]]:
        for number, (path, doc, rows) in enumerate(parts):
            yield (name if number == 0 else path), doc, rows

    yield from table("", schema, model.__name__)


def default_of(value: Schema, required: bool, constant: object) -> str:
    if required:
        return "required"
    default = value.get("default", constant)
    if default is None:
        return NONE
    return "its defaults" if isinstance(default, dict) else f"`{json.dumps(default)}`"


def kind_of(value: Schema, defs: Schema) -> tuple[str, list[str], bool]:  # noqa: PLR0911
    """A key's type and bounds in words, the tables it may be, and whether there may be several."""
    if "$ref" in value:
        return "table", [value["$ref"].rpartition("/")[2]], False
    for alternatives in ("anyOf", "oneOf"):
        if alternatives in value:
            parts = [kind_of(v, defs) for v in value[alternatives] if v.get("type") != "null"]
            kinds = list(dict.fromkeys(kind for kind, _, _ in parts))
            references = list(dict.fromkeys(r for _, found, _ in parts for r in found))
            return " or ".join(kinds), references, any(many for _, _, many in parts)
    if "const" in value:
        return f"`{json.dumps(value['const'])}`", [], False
    if "enum" in value:
        return ", ".join(f"`{json.dumps(v)}`" for v in value["enum"]), [], False
    if value.get("type") == "array":
        if "prefixItems" in value.get("items", {}):
            return "table of text", [], False
        kind, references, _ = kind_of(value.get("items", {}), defs)
        least = f", at least {value['minItems']}" if value.get("minItems") else ""
        return ("tables" if references else f"list of {kind}") + least, references, True
    if value.get("type") == "object" and "properties" not in value:
        return "table of text", [], False
    words = {"integer": "integer", "number": "number", "boolean": "true or false"}
    kind = words.get(value.get("type", ""), "text")
    if value.get("format") == "path":
        kind = "path"
    if pattern := value.get("pattern"):
        kind = "64 hexadecimal digits" if "{64}" in pattern else kind
    signs = {"exclusiveMinimum": "> ", "minimum": "≥ ", "exclusiveMaximum": "< ", "maximum": "≤ "}
    bounds = [f"{sign}{number(value[key])}" for key, sign in signs.items() if key in value]
    if "maxLength" in value:
        bounds.append(f"{value.get('minLength', 0)} to {value['maxLength']} characters")
    return ", ".join([kind, *bounds]), [], False


def number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ") or NONE


def tables_of(model: type[BaseModel], top: str) -> str:
    made = []
    for name, doc, rows in settings(model):
        made.append(f"## {top if not name else '`' + name + '`'}")
        made.append(prose(doc))
        made.append(
            "\n".join(
                [
                    "| key | type and bounds | default | description |",
                    "|---|---|---|---|",
                    *(
                        f"| `{row.key}` | {cell(row.kind)} | {cell(row.default)} | "
                        f"{cell(row.about)} |"
                        for row in rows
                    ),
                ]
            )
        )
    return "\n\n".join(filter(None, made))


def contract() -> str:
    return f"""# contract.toml

{NOTE} A contract is the shared run configuration of a federation: one TOML file that every site
and the operator have. Keys that are not listed here are refused. `silotune contract validate FILE`
reports every problem of a file at once, with its line. For editors and other programs:
{{download}}`JSON Schema <contract.schema.json>`, which `silotune contract schema` prints.

A key without a default and not marked "required" is optional; when it is absent it is no part of
the contract's hash.

{tables_of(Contract, "Top level")}
"""


def site() -> str:
    source = Path(inspect.getfile(site_folder)).with_name("site.toml.j2")
    example = Template(source.read_text(encoding="utf-8")).render(
        name="hospital-a", data='"records.csv"'
    )
    return f"""# site.toml

{NOTE} The policy of one site, written and signed by the owner of the records. It can narrow a
contract, never widen one. After each change run `silotune site sign`. For editors:
`silotune contract schema site` prints a JSON Schema.

## The file that `silotune site init` writes

```toml
{example.strip()}
```

{tables_of(Policy, "Top level")}
"""


def server() -> str:
    return f"""# server.toml

{NOTE} The addresses of a server. `silotune server init` writes the file from its options; after a
change restart `silotune server start`. For editors: `silotune contract schema server` prints a
JSON Schema.

{tables_of(ServerSettings, "Keys")}
"""


# The command line

# click keeps a command's help option as it is first asked for it, for the whole process.
SETTINGS: dict[str, Any] = dict(silotune.context_settings)


def commands(
    command: click.Command = silotune, path: tuple[str, ...] = ("silotune",)
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command with its path, groups included."""
    yield path, command
    if isinstance(command, click.Group):
        with click.Context(command, **SETTINGS) as context:
            for name in command.list_commands(context):
                found = command.get_command(context, name)
                if found is not None and not found.hidden:
                    yield from commands(found, (*path, name))


def help_as_markdown(text: str) -> str:
    """click's help: what follows a backspace is set as it stands."""
    made = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("\b\n"):
            made.append("```text\n" + paragraph[2:] + "\n```")
        else:
            made.append(paragraph)
    return "\n\n".join(made)


def cli() -> str:
    made = [
        "# Command line",
        f"{NOTE} Every command has `--help`. Commands that print facts have `--json`. Exit codes: "
        "0 done, 1 failed, 2 usage, 130 interrupted. An error is one sentence with a code; "
        "`silotune explain CODE` says what to do, and [Error codes](errors.md) lists all of them. "
        "With `--json` an error is the last line of standard error, one object: "
        '`{"error": {"code", "message", "exit_code"}}`, and a list `problems` in it if there are '
        "several. Colours appear on a terminal alone, and never with `NO_COLOR` set.",
    ]
    for path, command in commands():
        with click.Context(command, info_name=" ".join(path), **SETTINGS) as context:
            depth = "##" if len(path) <= 2 else "###"
            made.append(f"{depth} {' '.join(path)}")
            usage = " ".join(command.collect_usage_pieces(context))
            made.append(f"```text\n{' '.join(path)} {usage}\n```")
            made.append(help_as_markdown(command.help or ""))
            arguments = [p for p in command.params if isinstance(p, click.Argument)]
            if arguments:
                rows = ["| argument | description |", "|---|---|"]
                rows += [
                    f"| `{cell(one.make_metavar(context))}` | {cell(one.help or '')} |"
                    for one in arguments
                ]
                made.append("\n".join(rows))
            options = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
            if options:
                rows = ["| option | default | description |", "|---|---|---|"]
                for option in options:
                    names = ", ".join(f"`{n}`" for n in (*option.opts, *option.secondary_opts))
                    kind = "" if option.is_flag else f" `{option.make_metavar(context)}`"
                    default: object = option.get_default(context)
                    shown = (
                        "required"
                        if option.required
                        else NONE
                        if option.is_flag or not isinstance(default, str | int | float | Path)
                        else f"`{default}`"
                    )
                    rows.append(f"| {names}{kind} | {shown} | {cell(option.help or '')} |")
                made.append("\n".join(rows))
    return "\n\n".join(filter(None, made)) + "\n"


# Error codes


def codes() -> str:
    kinds = {
        "1": "Usage: the command line, a file or a configuration is wrong. Exit code 2.",
        "2": "Refusals: a site or its ledger refuses. Nothing ran and nothing was spent, unless "
        "the text says otherwise.",
        "3": "Data: records or model files are missing, damaged or do not fit the schema.",
        "4": "Peers: another process cannot be reached or did not answer.",
        "5": "Protocol: a message or an update is not what the contract allows.",
        "6": "Runs: a run could not continue.",
    }
    made = ["# Error codes", f"{NOTE} `silotune explain CODE` prints the same text offline."]
    for digit, about in kinds.items():
        made.append(f"## E{digit}xx")
        made.append(about)
        found = sorted(code for code in errors.CODES if code[1] == digit)
        made.append("\n".join(f"{code}\n: {errors.CODES[code]}\n" for code in found))
    return "\n\n".join(made)


# Metrics


def metrics() -> str:
    rows: dict[str, list[tuple[str, str, str, str]]] = {"site": [], "server": []}
    for name, known in telemetry.WRITTEN.items():
        rows["site"].append((name, known.kind, ", ".join(known.labels), known.help))
    running = telemetry.Running(worker=True, relay=True, relay_starts=1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        monitor = telemetry.SiteMonitor(folder / "none", 0, running)
        rows["site"] += [_row(family) for family in monitor.collect()]
        done = CliRunner().invoke(
            server_init, ["--host", "localhost", "--folder", str(folder / "server")]
        )
        if done.exception is not None:
            raise done.exception
        run = folder / "server" / "runs" / "example"
        events.append(run, "run", rounds=1)
        events.append(run, "rejected", site="a", code="E502", round=1)
        server = ServerMonitor(ServerFolder(folder / "server"), lambda _: True)
        rows["server"] += [_row(family) for family in server.collect()]
    made = [
        "# Metrics",
        f"{NOTE} In Prometheus' text format on 127.0.0.1 ([Monitor](../how-to/monitor.md)). A "
        "counter's samples end in `_total`, a summary has `_count` and `_sum`.",
    ]
    for side, title in (("site", "A site"), ("server", "The server")):
        made.append(f"## {title}")
        table = ["| metric | type | labels | description |", "|---|---|---|---|"]
        table += [f"| `{n}` | {k} | {cell(labels)} | {cell(h)} |" for n, k, labels, h in rows[side]]
        made.append("\n".join(table))
    return "\n\n".join(made) + "\n"


def _row(family: Any) -> tuple[str, str, str, str]:
    labels = sorted({label for sample in family.samples for label in sample.labels})
    return family.name, family.type, ", ".join(labels), family.documentation


# Docstrings for autodoc


def docstring_as_rst(*event: Any) -> None:
    """Sphinx's autodoc-process-docstring: our docstrings are plain text with Google's sections, no
    reStructuredText. What is aligned by spaces, or indented, is set as it stands."""
    lines: list[str] = event[-1]
    with contextlib.suppress(StopIteration):
        lines[:] = list(_as_rst(lines))


def short_signature(*event: Any) -> tuple[str, None] | None:
    """Sphinx's autodoc-process-signature: a configuration's keys are on pages of their own."""
    found = event[3]
    is_settings = isinstance(found, type) and issubclass(found, BaseModel)
    return ("", None) if is_settings else None


SECTION = re.compile(r"^(:\w+|\.\. )")


def _as_rst(lines: list[str]) -> Iterator[str]:
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            paragraphs[-1].append(line)
        elif paragraphs[-1]:
            paragraphs.append([])
    for paragraph in filter(None, paragraphs):
        if any(SECTION.match(line.strip()) for line in paragraph):  # napoleon has made it
            yield from paragraph
        elif any(line.startswith(" ") or re.match(r"\S.* {2,}\S", line) for line in paragraph):
            yield from ("::", "", *(f"    {line}" for line in paragraph))
        else:
            yield from (re.sub(r"([*|\\]|(?<=\w)_(?!\w))", r"\\\1", line) for line in paragraph)
        yield ""


def undescribed() -> Iterator[str]:
    """Settings and options of which nothing is said."""
    for file, model in (
        ("contract.toml", Contract),
        ("site.toml", Policy),
        ("server.toml", ServerSettings),
        ("recipe.toml", RecipeConfig),
        ("study", Study),
    ):
        for name, _, rows in settings(model):
            for setting in rows:
                if not setting.about:
                    yield f"{file} {name or 'top level'} {setting.key}"
    for path, command in commands():
        for option in command.params:
            if isinstance(option, click.Option) and not (option.help or option.hidden):
                yield f"{' '.join(path)} {option.opts[0]}"


if __name__ == "__main__":
    write(Path(__file__).resolve().parent / "reference")
