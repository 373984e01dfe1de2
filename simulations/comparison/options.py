"""The key=value settings of `sim run`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from silotune.common.config.diagnostics import contract_error
from silotune.common.contract.compute import Performance
from silotune.common.data.text_decoding import Reading
from silotune.common.errors import (
    UsageError,
    did_you_mean,
)

AT_LEAST_ONE = ("repeats", "baseline_repeats", "evaluate_every", "processes")
REFUSED = ("compile",)  # as Performance says, so it is not offered
OF_FILE = ("encoding", "delimiter")  # settings of how `data` is read
OF_COMPUTING = tuple(Performance.model_fields)


def _flag(word: str) -> bool:
    if word not in ("true", "false"):
        raise ValueError(word)
    return word == "true"


READERS: dict[str, Any] = {
    "epsilon": float,
    "delta": float,
    "repeats": int,
    "baseline_repeats": int,
    "evaluate_every": int,
    "processes": int,
    "insecure_seed": int,
    "variants": lambda text: text.split(","),
    "masked": _flag,
    "data": Path,
    "site_column": str,
    "model": Path,
}
EXAMPLES = {
    "epsilon": "3",
    "delta": "1e-5",
    "repeats": "3",
    "variants": "federated-lora,alone",
    "data": "FILE.csv",
    "site_column": "COLUMN",
    "model": "FOLDER",
}
OF_RUN = (*READERS, *OF_FILE, *OF_COMPUTING)  # all settings of `sim run`
OF_COMPARE = ("data", "site_column", "model", *OF_FILE, *OF_COMPUTING)  # … of `sim compare`


@dataclass
class Options:
    """What `key=value` on the command line can change; none can weaken a guarantee silently."""

    epsilon: float | None = None
    delta: float | None = None
    repeats: int | None = None
    baseline_repeats: int | None = None
    evaluate_every: int | None = None
    variants: list[str] = field(default_factory=list)
    processes: int = 0
    insecure_seed: int | None = None
    masked: bool = True
    data: Path | None = None
    site_column: str | None = None
    reading: Reading = field(default_factory=Reading)
    model: Path | None = None
    performance: Performance = field(default_factory=Performance)
    quick: bool = False

    @classmethod
    def parse(cls, words: tuple[str, ...]) -> Options:
        """From `key=value` words; UsageError names the key, the value and what is allowed."""
        options, computing, of_file = cls(), dict[str, str](), dict[str, str]()
        for word in words:
            key, value = _setting(word, OF_RUN)
            if key in OF_FILE:
                of_file[key] = value
                continue
            if key in OF_COMPUTING:
                computing[key] = value
                continue
            try:
                setattr(options, key, READERS[key](value))
            except ValueError:
                kind = {int: "a whole number", _flag: "true or false"}.get(READERS[key], "a number")
                raise UsageError(f"'{key}' must be {kind}, got '{value}'.") from None
            if key in AT_LEAST_ONE and int(value) < 1:
                raise UsageError(f"'{key}' must be at least 1, got '{value}'.")
        options.performance = _performance(computing)
        options.reading = Reading.of(
            of_file.get("encoding"), of_file.get("delimiter"), "{key}='{value}'"
        )
        return options


def computing(words: tuple[str, ...]) -> Performance:
    """How to compute, from `key=value` words: such as may change a result by its roundings alone.
    UsageError for others."""
    return _exact(_performance(dict(_setting(word, OF_COMPUTING) for word in words)))


def comparing(words: tuple[str, ...]) -> Options:
    """What `key=value` says to `sim compare`: how to compute, and the records of a contract of
    one's own. UsageError for others."""
    for word in words:
        _setting(word, OF_COMPARE)
    found = Options.parse(words)
    _exact(found.performance)
    return found


def _exact(performance: Performance) -> Performance:
    if performance.gradients == "ghost":
        raise UsageError(
            "gradients=ghost does not clip exactly: figures made with it are not those of the "
            "contract. Use expanded or hooks."
        )
    return performance


def misplaced_option(option: str, words: Sequence[str], known: Sequence[str]) -> str:
    """What to type instead of a setting that was given like an option; "" if it is no setting.

    Args:
        option: as it was given: --epsilon.
        words: the command line's.
        known: the settings.
    """
    key = option.lstrip("-").replace("-", "_")
    if key not in known:
        return ""
    value = "VALUE"
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith(f"{option}="):
            value = word.partition("=")[2]
        elif word == option and following and not following.startswith("-"):
            value = following
    return f"Settings are KEY=VALUE, without dashes: {shlex.quote(f'{key}={value}')}."


def _setting(word: str, known: Sequence[str]) -> tuple[str, str]:
    key, _, value = word.partition("=")
    if key in known and not value:
        raise UsageError(f"'{key}' needs a value: {key}={EXAMPLES.get(key, 'VALUE')}.")
    if key not in known:
        offered = sorted(set(known) - set(REFUSED))
        rounds = (
            (
                " Rounds are the contract's: `silotune sim export RECIPE --rounds N --out FOLDER` "
                "writes a contract with others."
            )
            if key == "rounds"
            else ""
        )
        raise UsageError(
            f"'{word}' is not a setting. Use key=value with one of: {', '.join(offered)}."
            + (rounds or did_you_mean(key, offered))
        )
    return key, value


def _performance(words: dict[str, str]) -> Performance:
    """From key=value words, each read as the type it has to be."""
    values = {
        key: value == "true"
        if value in ("true", "false")
        else int(value)
        if value.isdecimal()
        else value
        for key, value in words.items()
    }
    try:
        return Performance.model_validate(values)
    except ValidationError as error:
        raise contract_error(error, "key=value", Performance) from None
