"""A contract's text with other learning rates."""

from __future__ import annotations

import json
from typing import Any

import tomlkit
from tomlkit.items import InlineTable

RATES = ("head_lr", "adapter_lr")


def tuned_text(text: str, factor: float, *, is_json: bool = False) -> str:
    """A contract as TOML whose learning rates are multiplied by a factor.

    The phases lose their `rule`: their rates are no longer those that the rule computes.

    Args:
        text: A valid contract. The comments of TOML stay.
        factor: Of all rates.
        is_json: Whether the text is the canonical JSON of a run, in which there are no comments.

    Returns:
        The contract's text. Each new rate has a comment that says where it is from, unless its
        phase is written on one line, where TOML has no comments.
    """
    document: Any = tomlkit.parse(tomlkit.dumps(_written(json.loads(text))) if is_json else text)
    for phase in document["phases"]:
        phase.pop("rule", None)
        for key in RATES:
            if phase.get(key) is None:
                continue
            own = float(phase[key])
            rate = tomlkit.item(own * factor)
            if not isinstance(phase, InlineTable):
                rate.comment(
                    f"{factor:g} times {own:g}, by `silotune contract tune` on public rows; other "
                    f"comments describe {own:g}"
                )
            phase[key] = rate
    return tomlkit.dumps(document)


def _written(value: Any) -> Any:
    """A value of JSON without what is None, which TOML does not have."""
    if isinstance(value, dict):
        return {key: _written(own) for key, own in value.items() if own is not None}
    return [_written(own) for own in value] if isinstance(value, list) else value
