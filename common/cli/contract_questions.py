"""The questions of `silotune contract new`: each answer is checked at once, and none is lost.

What was answered lies in a file beside the contract's, OUT.answers.json, until the contract is
written. Whoever asks again for the same contract finds these answers offered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError
from pydantic_core import InitErrorDetails

from silotune.common.cli.main import command
from silotune.common.config.diagnostics import contract_error
from silotune.common.contract.drafting import Answers, Column
from silotune.common.errors import ErrorCode, SilotuneError, UsageError, did_you_mean
from silotune.common.formats import strict_json
from silotune.common.runtime.atomic_files import write_durably
from silotune.common.runtime.terminal import echo

TASKS = "classification, multi-label, tokens, regression, ranking or language"
OF_LABELS = ("classification", "multi-label", "tokens", "ranking")
LABELS = {
    "tokens": "Kinds of entities, between commas",
    "ranking": "Values that say a pair belongs together, between commas",
}
SHOWN = 40  # names of a header
KEYS = (
    "task", "label", "labels", "bounds", "others", "query", "pair", "text", "columns", "sites",
    "records", "epsilon",
)  # fmt: skip


class Questions:
    """Asks on a terminal for what was not given.

    Args:
        out: The contract's file, beside which the answers are kept.
        header: The names of the table's columns; None if the file does not name them.
        words: The command that asks again, for the advice to whoever stops.
    """

    def __init__(self, out: Path, header: Sequence[str] | None, words: Sequence[object]) -> None:
        self.file = out.with_suffix(".answers.json")
        self.header, self.words = header, words
        self.answered: dict[str, Any] = {}
        self._offered, self._introduced = self._kept(), False

    def ask(self, given: dict[str, Any]) -> dict[str, Any]:
        """The answers to all questions: those that were given, and those that are asked for now.

        Raises:
            Abort: Whoever answers stops: it says where the answers are and how to resume.
        """
        found = dict(given)
        try:
            self._ask_task(found)
            self._ask_input(found)
            self._missing(found, "sites", "Names of the sites, between commas", self._sites)
            self._missing(found, "records", "Records (or entities) of a site, roughly", self._whole)
            if self.answered:  # it has a default: who was asked nothing else is not asked for it
                question = "ε of the guarantee, for each unit of a site and one run"
                self._offered.setdefault("epsilon", "8")
                self._missing(found, "epsilon", question, self._epsilon)
        except click.Abort:
            raise click.Abort(self._advice()) from None
        return found

    @property
    def kept(self) -> str:
        """Where the answers are and how to go on with them; "" if there are none."""
        if not self.answered and not self._offered:
            return ""
        return f"The answers are kept in {self.file}; to resume: {command(*self.words)}"

    def done(self) -> None:
        """The contract is written: its answers are in it. A file that this did not write stays."""
        if self.answered:
            self.file.unlink(missing_ok=True)

    def _ask_task(self, found: dict[str, Any]) -> None:
        self._missing(found, "task", f"Task ({TASKS})", lambda text: self._valid("task", text))
        self._missing(found, "label", "Column that holds what is to be learnt", self._column)
        task = found["task"]
        if task in OF_LABELS:
            question = LABELS.get(task, "Values of that column, or name=value, between commas")
            least = 2 if task == "classification" else 1
            self._missing(found, "labels", question, lambda text: self._values(text, least))
        if task == "regression":
            question = "Lowest and highest number, between commas"
            self._missing(found, "bounds", question, self._bounds)
        if task == "ranking":
            question = "Values that say a pair does not belong together, between commas"
            self._missing(found, "others", question, self._values)
            question = "Column whose equal values are ranked together"
            self._missing(found, "query", question, self._column)

    def _ask_input(self, found: dict[str, Any]) -> None:
        if found["task"] == "ranking":
            self._missing(found, "pair", "Its two columns of text, between commas", self._pair)
            return
        if found["columns"]:
            return
        if found["task"] in ("tokens", "language"):
            self._missing(found, "text", "Column of text", self._column)
            return
        question = "Column of text (- if the input is a table)"
        self._missing(found, "text", question, lambda t: "" if t == "-" else self._column(t))
        if not found["text"]:
            found["text"] = None
            self._ask_columns(found)

    def _ask_columns(self, found: dict[str, Any]) -> None:
        """One column after the other; those of before first."""
        columns: list[str] = []
        offered = list(self._offered.get("columns", []))
        while True:
            question = "A column, 'age: 40, 60' (bin edges) or 'sex: m, f' (values); - if done"
            default = offered.pop(0) if offered else ("-" if columns else None)
            check = partial(self._table_column, before=columns)
            _, answer = self._answer(question, default, check)
            if answer:
                columns.append(answer)
                found["columns"] = tuple(columns)
                self._keep("columns", columns)
            elif columns:
                return
            else:
                echo("✗ A table needs one column at least.", err=True)

    def _missing(
        self, found: dict[str, Any], key: str, question: str, check: Callable[[str], Any]
    ) -> None:
        """Ask for an answer that was not given."""
        if found.get(key) not in (None, (), ""):
            return
        typed, found[key] = self._answer(question, self._offered.get(key), check)
        self._keep(key, typed)

    def _answer(
        self, question: str, default: str | None, check: Callable[[str], Any]
    ) -> tuple[str, Any]:
        """One that is right, as typed and as it is meant: what is wrong with another is said, and
        it is asked for again."""
        self._introduce()
        while True:
            text = click.prompt(question, default=default, type=str, err=True).strip()
            try:
                return text, check(text)
            except SilotuneError as error:
                echo(f"✗ {error}", err=True)

    def _introduce(self) -> None:
        """Before the first question: what can be answered."""
        if self._introduced:
            return
        self._introduced = True
        if self.file.exists() and not self._offered:
            raise UsageError(
                f"{self.file} is there and holds no answers of before: rename it, or name another "
                "contract with --out.",
                code=ErrorCode.COMMAND_LINE_INVALID,
            )
        if self.header is not None:
            more = ", …" if len(self.header) > SHOWN else ""
            echo(f"Columns: {', '.join(self.header[:SHOWN])}{more}", err=True)
        if self._offered:
            echo(f"The answers of before are offered in brackets ({self.file}).", err=True)

    # What an answer has to be

    def _valid(self, key: str, value: Any) -> Any:
        """As the draft's own checks see it."""
        try:
            Answers.model_validate({key: value})
        except ValidationError as error:
            own = [
                InitErrorDetails(
                    type=e["type"], loc=e["loc"], input=e["input"], ctx=e.get("ctx", {})
                )
                for e in error.errors()
                if e["loc"][:1] == (key,)
            ]
            if own:
                found = ValidationError.from_exception_data("answers", own)
                raise contract_error(found, "this answer", Answers) from None
        return value

    def _column(self, text: str) -> str:
        if self.header is not None and text not in self.header:
            raise UsageError(f"'{text}' is no column.{did_you_mean(text, self.header)}")
        return text

    def _table_column(self, text: str, before: Sequence[str]) -> str:
        if text == "-":
            return ""
        name = self._column(Column.parse(text).name)
        if name in [Column.parse(answer).name for answer in before]:
            raise UsageError(f"Column '{name}' is named already; name another one, or - if done.")
        return text

    def _pair(self, text: str) -> tuple[str, str]:
        names = [self._column(name) for name in listed(text)]
        if len(names) != 2:
            raise UsageError(f"A pair is two columns, got {len(names)}. Write: FIRST, SECOND.")
        return names[0], names[1]

    def _values(self, text: str, least: int = 1) -> str:
        if len(listed(text)) < least:
            raise UsageError(f"Name {'two values' if least > 1 else 'one value'} at least.")
        return text

    def _bounds(self, text: str) -> tuple[float, float]:
        try:
            low, high = (float(part) for part in listed(text))
        except ValueError:
            raise UsageError(f"'{text}' is not two numbers. Write, say: 0, 100.") from None
        if low >= high:
            raise UsageError(f"The lowest number must be below the highest, got {low:g}, {high:g}.")
        return self._valid("bounds", (low, high))  # type: ignore[no-any-return]

    def _sites(self, text: str) -> tuple[str, ...]:
        names = tuple(listed(text))
        if len(set(names)) < len(names):
            raise UsageError("Each site needs a name of its own.")
        return self._valid("sites", names)  # type: ignore[no-any-return]

    def _whole(self, text: str) -> int:
        if not text.isdecimal():
            raise UsageError(f"'{text}' is not a whole number. Write, say: 2000.")
        return self._valid("records", int(text))  # type: ignore[no-any-return]

    def _epsilon(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise UsageError(f"'{text}' is not a number. Write, say: 8.") from None
        return self._valid("epsilon", value)  # type: ignore[no-any-return]

    # The answers of before

    def _kept(self) -> dict[str, Any]:
        try:
            found = strict_json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        if not isinstance(found, dict) or not set(found) <= set(KEYS):
            return {}
        kinds = {"columns": list}  # of the others the answer is as it was typed
        return {key: v for key, v in found.items() if isinstance(v, kinds.get(key, str))}

    def _keep(self, key: str, answer: str | list[str]) -> None:
        self.answered[key] = answer
        write_durably(self.file, json.dumps(self._offered | self.answered, indent=1).encode())

    def _advice(self) -> str:
        if self.kept:
            return f"Stopped. {self.kept}"
        return "Stopped before the first answer: nothing was written."


def listed(words: str | None) -> list[str]:
    """The parts between commas."""
    return [word.strip() for word in (words or "").split(",") if word.strip()]
